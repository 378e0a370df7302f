"""Checkpoints that were trained elsewhere become a run like any other; what could be wrong with them is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ensembler import Ensemble, Run
from ensembler.data.normalisation import NAMES, normalised, parse, text
from ensembler.errors import ShapeError, UsageError
from ensembler.trainers import FGE, DeepEnsemble, collapse_run, import_checkpoints
from tests._small import dataset
from tests._training import call, make, passes

ARCHITECTURE = "tests._small:batchnorm"


@pytest.fixture(scope="module")
def trained():
    return make(DeepEnsemble(members=2), dataset(train=90), architecture=ARCHITECTURE, epochs=8)


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    """The members of a run as somebody else would have saved them."""
    folder, ensemble = tmp_path_factory.mktemp("elsewhere"), Ensemble(trained, "cpu")
    for member, name in enumerate("ab"):
        torch.save({"state_dict": ensemble.network(member).state_dict()}, folder / f"{name}.pt")
    return [folder / "a.pt", folder / "b.pt"]


def imported(files, data=None, said=None, architecture=ARCHITECTURE):
    def tell(event):
        said.append(event.text)

    options = {} if said is None else {"on_event": tell}
    return import_checkpoints(files, architecture, data or dataset(train=90), device="cpu", **options)


def test_members_are_the_checkpoints_to_the_bit(trained, files, tmp_path):
    said = []
    run = imported(files, said=said)
    assert torch.equal(run.coefficients, torch.eye(2))
    for name, rows in trained.vertices.items():
        assert torch.equal(rows, run.vertices[name])
    for name, rows in trained.buffers.items():
        assert torch.equal(rows, run.buffers[name])
    assert run.manifest.metrics["test"] == trained.manifest.metrics["test"]
    assert (run.manifest.method, run.manifest.command, run.manifest.independent) == ("deep-ensemble", "import", True)
    assert said[:2] == ["a.pt: taken from 'state_dict'", "b.pt: taken from 'state_dict'"]
    assert "inputs are normalised with mean 0.4, 0.4, 0.4 and std 0.25, 0.25, 0.25" in said
    assert not any("warning" in line for line in said)
    run.save(tmp_path / "run")
    assert Run.load(tmp_path / "run").manifest.cost == run.manifest.cost


def test_the_cost_is_unknown_not_0(files):
    cost = imported(files).manifest.cost
    assert (cost.example_passes, cost.seconds, cost.unknown) == (None, None, ["a.pt", "b.pt"])
    first = imported(files[:1])
    assert (first.manifest.method, first.manifest.cost.example_passes) == ("single", None)
    whole = collapse_run(imported(files), dataset(train=90), "cpu")
    assert (whole.manifest.cost.example_passes, whole.manifest.cost.unknown) == (None, ["a.pt", "b.pt"])


def test_training_goes_on_from_an_imported_run(files, tmp_path):
    """It inherits the first member, whose cost alone is unknown."""
    path = str(imported(files).save(tmp_path / "run"))
    run = make(FGE(members=1, cycle=1), dataset(train=90), architecture=ARCHITECTURE, init=path)
    assert run.manifest.cost.unknown == ["a.pt"]
    assert run.manifest.cost.example_passes == sum(passes(run).values())


def test_a_wrong_normalisation_is_found(files):
    """Networks that were trained on one normalisation, measured with another: accuracy falls, and the mend is said."""
    data, said = dataset(train=90), []
    assert normalised(data, None) is data
    run = imported(files, replace(normalised(data, "bytes"), validation=data.train), said)
    assert run.manifest.dataset.std == [1 / 255] * 3
    assert any(line.startswith("warning: without --normalisation, ") or "warning: with --norm" in line for line in said)


def test_networks_that_guess_are_named(tmp_path):
    from ensembler.networks.architectures import build

    said, data = [], dataset(train=90)
    torch.save(build(ARCHITECTURE, 3).state_dict(), tmp_path / "a.pt")
    imported([tmp_path / "a.pt"], said=said, data=data)
    assert any(
        "not clearly better than guessing (33.3 %): check the architecture, the order of" in line for line in said
    )


def test_what_cannot_be_members_is_refused(files, tmp_path):
    with pytest.raises(UsageError, match="name at least one checkpoint"):
        imported([])
    with pytest.raises(UsageError, match=r"a\.pt and .*again\.pt hold the same weights: leave one of them out"):
        again = tmp_path / "again.pt"
        torch.save(torch.load(files[0], weights_only=True)["state_dict"], again)
        imported([*files, again])
    with pytest.raises(UsageError) as caught:
        imported(files, dataset(train=90, classes=4))
    assert "was not trained on the 4 classes of small: 'head.weight' is (3, 36) in the file, (4, 36) in" in str(
        caught.value
    )
    with pytest.raises(ShapeError, match=r"^a\.pt .*does not fit the network"):
        imported(files, architecture="cnn")


def test_files_of_one_name_are_told_apart(files, tmp_path):
    for number, file in enumerate(files):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "best.pt").write_bytes(file.read_bytes())
    paths = [tmp_path / "0" / "best.pt", tmp_path / "1" / "best.pt"]
    assert imported(paths).manifest.cost.unknown == [str(path) for path in paths]


def test_frozen_weights_that_differ_are_refused(files):
    with pytest.raises(UsageError, match=r"'body.0.weight' is frozen in the network .* differs between .*a\.pt and"):
        imported(files, architecture="tests._small:frozen")


def test_a_run_keeps_its_normalisation_wherever_training_goes_on(files, tmp_path):
    """Loaded again, its dataset is normalised as the checkpoints were, not as its pixels would be."""
    other = normalised(dataset(train=90), "half")
    path = str(imported(files, other).save(tmp_path / "run"))
    assert Run.load(tmp_path / "run").manifest.dataset.adopt(dataset(train=90)).mean == (0.5, 0.5, 0.5)
    run = make(FGE(members=1, cycle=1), dataset(train=90), architecture=ARCHITECTURE, init=path)
    assert run.manifest.dataset.mean == [0.5, 0.5, 0.5]


def test_the_command(tmp_path, monkeypatch):
    from ensembler.networks.architectures import build

    monkeypatch.chdir(tmp_path)
    torch.save(build("cnn", 10, seed=1).state_dict(), "a.pt")
    result = call("import", "a.pt", "--arch", "cnn", "--out", "run")
    assert (result.exit_code, result.stderr) == (2, "error: --dataset is missing: see ensembler import --help\n")
    result = call(
        "import", "a.pt", "--arch", "cnn", "--dataset", "digits", "--normalisation", "imagenet", "--out", "run"
    )
    assert result.exit_code == 0
    assert "inputs are normalised with mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225" in result.stderr
    assert "cost: unknown, a.pt was trained elsewhere" in result.stdout
    assert Run.load(tmp_path / "run").manifest.dataset.mean == [0.485, 0.456, 0.406]
    assert "cost       unknown" in call("show", "run").stdout or "unknown cost of a.pt" in call("show", "run").stdout
    again = call("import", "--config", "run", "--arch", "cnn", "--out", "again")
    assert again.exit_code == 0, again.output
    assert Run.load(tmp_path / "again").manifest.fingerprint == Run.load(tmp_path / "run").manifest.fingerprint


@pytest.mark.parametrize("given", [*NAMES, "0.1,0.2,0.3/0.4,0.5,0.6"])
def test_a_normalisation_is_read_as_it_is_written(given):
    assert text(*parse(given)) == given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("imagenets", "--normalisation must be imagenet, half, none, bytes or MEAN/STD such as"),
        ("0.5", "--normalisation must be"),
        ("123.7,116.3,103.5/58.4,57.1,57.4", "of pixels from 0 to 1: divide the mean 123.7 by 255"),
        ("0,0,0/0,1,1", "a std is above 0 and at most 1, not 0"),
        ("0.5/0.5", "--normalisation needs 3 means and as many stds, not '0.5/0.5'"),
    ],
)
def test_a_normalisation_that_is_none_is_refused(given, message):
    with pytest.raises(UsageError) as caught:
        normalised(dataset(), given)
    assert message in str(caught.value)
