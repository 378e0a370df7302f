"""What a user of Python or of a notebook meets: networks that are passed, images of any kind, results that show."""

from __future__ import annotations

import ast
import pickle
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from torch import nn
from typer.testing import CliRunner

from ensembler import Ensemble, calibration, load_dataset
from ensembler.cli import app
from ensembler.errors import DataError, ShapeError, UsageError
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.given import Predictions
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.shift.writer import write_corruptions
from ensembler.prediction import predict
from ensembler.progress import bars_on, has_bars
from ensembler.run import Gaussians, Run
from ensembler.serve import Runtime, export_run
from ensembler.serve.client import predict_files
from ensembler.side_by_side import SideBySide
from ensembler.trainers import (
    FGE,
    DeepEnsemble,
    Settings,
    Simplex,
    Trainer,
    collapse_run,
    combine,
    import_checkpoints,
    train,
)
from tests import _small
from tests._ports import free_port
from tests._runs import make_bundle
from tests._small import dataset
from tests._training import same, saved

SMALL = {name: value for name, value in _small.SETTINGS.items() if name != "architecture"}
SETTINGS = Settings(**SMALL)
ONE = DeepEnsemble(members=1)


def own(num_classes: int, width: int = 4, size: int = 8) -> nn.Module:
    side = (size - 1) // 2
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(width * side**2, num_classes)
    )


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = own(num_classes)

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def notebooks(monkeypatch):
    """A factory that a notebook defines, in ``__main__``."""

    def notebooks(num_classes: int) -> nn.Module:
        return own(num_classes)

    notebooks.__module__, notebooks.__qualname__ = "__main__", "notebooks"
    monkeypatch.setattr(sys.modules["__main__"], "notebooks", notebooks, raising=False)
    return notebooks


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "name"), [(_small.network, "network"), (_small.WithBatchNorm, "WithBatchNorm")])
def test_a_network_that_can_be_imported_is_recorded_by_its_name(network, name, tmp_path):
    run = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=network)
    assert run.manifest.architecture == run.manifest.settings["architecture"] == f"tests._small:{name}"
    named = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=f"tests._small:{name}")
    assert run.manifest.fingerprint == named.manifest.fingerprint
    found = Ensemble.load(saved(run, tmp_path / "run"), "cpu").predict_members(dataset().test.images)
    assert torch.equal(found, Ensemble(named, "cpu").predict_members(dataset().test.images))


@pytest.mark.parametrize("kind", ["notebook", "lambda", "partial", "class"])
def test_a_network_that_cannot_be_imported_trains_and_is_passed_again(kind, notebooks, tmp_path):
    network = {
        "notebook": notebooks,
        "lambda": lambda num_classes: nn.Sequential(own(num_classes)),
        "partial": partial(own, width=6),
        "class": type("Local", (Net,), {"__module__": "__main__"}),
    }[kind]
    run = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=network)
    assert run.manifest.architecture.startswith("__main__:")
    images = dataset().test.images
    expected = Ensemble(run, "cpu").predict_members(images)
    path = saved(run, tmp_path / "run")
    assert torch.equal(Ensemble.load(path, "cpu", network=network).predict_members(images), expected)
    sampled = Ensemble(run, "cpu").sample(4, train=dataset().train)
    assert torch.equal(sampled.sample(3, train=dataset().train).predict_members(images), expected)
    assert Ensemble(collapse_run(run, dataset(), "cpu"), "cpu").members == 1
    fge = train(dataset(), FGE(members=1, cycle=1), Settings(**SMALL, init=path), network=network)
    assert fge.manifest.architecture == run.manifest.architecture
    for load in (Ensemble.load, partial(export_run, out=tmp_path / "bundle")):
        with pytest.raises(UsageError, match=r"defined in a notebook or script, .*: pass it from Python \(network="):
            load(path)
    assert not (tmp_path / "bundle").exists()


def test_the_name_of_another_notebooks_network_is_not_taken(notebooks, tmp_path):
    """By its name, the function of today's notebook would be found."""
    run = train(dataset(), ONE, SETTINGS, network=notebooks)
    path = saved(run, tmp_path / "run")
    with pytest.raises(UsageError, match="pass it from Python"):
        Ensemble.load(path)
    with pytest.raises(UsageError, match=r"trained with the network __main__:notebooks, not tests.test_notebook:own"):
        Ensemble.load(path, network=own)
    with pytest.raises(UsageError, match="pass it from Python"):
        train(dataset(), ONE, Settings(**SMALL, architecture="__main__:notebooks"))


def test_two_networks_of_one_name_stay_apart():
    """A cell that was run again: the first run keeps its own network."""
    runs = []
    for activation in (nn.Tanh, nn.ReLU):

        def cell(num_classes: int, activation=activation) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), activation(), nn.Flatten(), nn.Linear(36, num_classes))

        runs.append(train(dataset(), ONE, SETTINGS, network=cell))
    first = Ensemble(runs[0], "cpu").network(0)
    assert isinstance(first[1], nn.Tanh)
    assert combine({"a": runs[0], "b": runs[1]}, dataset(), "cpu").manifest.parts == 2


def test_jobs_elsewhere_have_the_network_too():
    """Side by side each has a network of its own; another process is sent the function."""
    network = lambda num_classes: own(num_classes, width=5)  # noqa: E731
    here, beside = (
        train(dataset(), DeepEnsemble(members=2), SETTINGS, network=network, engine=engine)
        for engine in (None, SideBySide(2))
    )
    assert same(here, beside)
    data = dataset()
    trainer = Trainer(data, Settings(**SMALL, architecture="__main__:own").resolved(data), factory=own)
    sent = pickle.loads(pickle.dumps(trainer))
    assert sent.factory is own and len(sent.weights) == len(trainer.weights)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (own(3), "given as a Sequential, but every member needs one of its own: give the function or class"),
        (7, "network must be a function or text, not 7"),
        (lambda: own(3), r"cannot be called as <lambda>\(num_classes=3\)"),
        (lambda num_classes: 3, "returned int, not a torch.nn.Module"),
        ("tests._small:nothing", "cannot import the architecture 'tests._small:nothing'"),
    ],
)
def test_what_builds_no_network_is_refused(network, message):
    with pytest.raises(UsageError, match=message):
        train(dataset(), ONE, SETTINGS, network=network)


def test_two_answers_to_which_network_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the network is tests._small:network, and the settings name cnn: give one"):
        train(dataset(), ONE, Settings(**SMALL, architecture="cnn"), network=_small.network)
    path = saved(train(dataset(), ONE, SETTINGS, network=_small.network), tmp_path / "run")
    with pytest.raises(UsageError, match=r"is a run of tests._small:network, and tests._small:batchnorm is to be"):
        train(dataset(), ONE, Settings(**SMALL, init=path), network=_small.batchnorm)


def test_checkpoints_of_a_network_that_is_passed(notebooks, tmp_path):
    torch.manual_seed(0)
    weights = own(3)
    torch.save(weights.state_dict(), tmp_path / "a.pt")
    run = import_checkpoints([str(tmp_path / "a.pt")], notebooks, dataset(), device="cpu")
    x = torch.randn(2, 3, 8, 8).clamp(-1, 1)
    torch.testing.assert_close(Ensemble(run, "cpu").predict_outputs(x)[0], weights.eval()(x).detach())


# --- results --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of digits, saved, of a network that only its caller has."""
    network = partial(own, width=4, size=32)
    run = train("digits", Simplex(vertices=2, members=3), Settings(epochs=2, lr=0.02, device="cpu"), network=network)
    run.save(str(tmp_path_factory.mktemp("runs") / "digits"))
    return run


def images_of(kind, path):
    """The first two test images of digits, as a user may have them."""
    two = load_dataset("digits").test.images[:2]
    pictures = [Image.fromarray(image.numpy()) for image in two]
    files = [path / f"{number}.png" for number in range(2)]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    return {
        "tensor": two,
        "array": two.numpy(),
        "pictures": pictures,
        "large pictures": [picture.resize((64, 64), Image.Resampling.NEAREST) for picture in pictures],
        "grey pictures": [picture.convert("L") for picture in pictures],
        "paths": files,
        "texts": list(map(str, files)),
        "arrays": list(two.numpy()),
        "mixed": (str(files[0]), pictures[1]),
        "examples": load_dataset("digits").test[:2],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["tensor", "array", "pictures", "grey pictures", "paths", "texts", "arrays", "mixed", "examples"]
)
def test_images_of_any_kind_have_one_answer(digits, kind, tmp_path):
    ensemble = Ensemble(digits, "cpu", batch_size=1)
    found = ensemble.predict(images_of(kind, tmp_path))
    members = ensemble.predict_members(load_dataset("digits").test.images[:2]).numpy()
    np.testing.assert_array_equal(found.members, members)
    np.testing.assert_allclose(found.probabilities, members.mean(axis=0, dtype=np.float64))
    assert found.classes.tolist() == members.mean(axis=0).argmax(axis=1).tolist()
    assert found.labels == [ensemble.classes[number] for number in found.classes]
    assert {type(value) for name, value in vars(found).items() if name != "labels"} == {np.ndarray}


def test_one_image_and_images_of_other_sizes(digits, tmp_path):
    ensemble, two = Ensemble(digits, "cpu"), images_of("array", tmp_path)
    expected = ensemble.predict(two)
    for one in (two[0], images_of("pictures", tmp_path)[0], images_of("texts", tmp_path)[0], two[:1]):
        found = ensemble.predict(one)
        assert len(found) == 1
        np.testing.assert_allclose(found.probabilities[0], expected.probabilities[0], atol=1e-6)
    larger = images_of("large pictures", tmp_path)
    resized = np.stack([np.asarray(one.resize((32, 32), Image.Resampling.BILINEAR)) for one in larger])
    np.testing.assert_array_equal(ensemble.predict(larger).members, ensemble.predict(resized).members)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ShapeError, "no image to predict: give a path"),
        (np.zeros((0, 32, 32, 3), np.uint8), ShapeError, "no image"),
        (np.zeros((2, 8, 8, 3), np.uint8), ShapeError, "resize them to 32 x 32 pixels"),
        (np.zeros((2, 32, 32, 3)), ShapeError, r"images \* 255"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)], ShapeError, "of different kinds"),
        ("missing.png", DataError, "cannot read the image missing.png: .* give the path of an image file"),
        ([None], UsageError, "image 0 is of type NoneType: give a path, an image of Pillow"),
        (7, UsageError, "image 0 is of type int"),
        ([Image.new("I", (32, 32))], ShapeError, "image 0 cannot be read: .*mode I"),
        (".", UsageError, "is a folder: give its images"),
    ],
)
def test_what_is_no_image_is_refused(digits, images, error, message):
    with pytest.raises(error, match=message):
        Ensemble(digits, "cpu").predict(images)


def test_an_ensemble_does_as_the_commands_do(digits, notebooks, tmp_path, monkeypatch, capsys):
    """From a network that no other process has: evaluated, calibrated, exported and asked, all from text."""
    monkeypatch.chdir(tmp_path)
    ensemble = Ensemble.load(str(digits.path), "cpu", network=digits.network)
    fitted = ensemble.calibrate(alpha=0.2)
    assert calibration.load(str(digits.path)) == fitted
    found = ensemble.evaluate(ood="noise:gaussian", examples=10, cache="kept")
    expected = ensemble.predict(load_dataset("digits").test).classes == load_dataset("digits").test.labels.numpy()
    clean = ensemble.evaluate()
    assert clean.report.runs[0].clean.accuracy == pytest.approx(expected.mean())
    assert found.report.test_examples == 10 and found.report.ood[0].images == 10
    bundle = ensemble.export("bundle", quiet=True)
    runtime = Runtime.load("bundle")
    assert runtime.calibration == fitted and bundle.name == "bundle"
    images = load_dataset("digits").test.images[:4].numpy()
    order = runtime.manifest.order
    np.testing.assert_allclose(runtime.predict_members(images), ensemble.predict(images).members[order], atol=1e-5)
    assert not (tmp_path / "kept").exists()  # another function of the same name may come
    assert capsys.readouterr() == ("", "")
    for thing in (clean, clean.report, fitted, runtime, runtime.manifest, ensemble, digits, digits.manifest):
        assert 1 <= len(repr(thing).splitlines()) <= 5, repr(thing)
        assert max(map(len, repr(thing).splitlines())) <= 130
    assert f"accuracy {expected.mean():.4f}" in repr(clean)
    assert "<img src" in clean._repr_html_() and "<table" in clean._repr_html_()
    assert "data:image/png;base64" in ensemble._repr_html_()
    for thing, rows in ((ensemble, 4), (digits, 4), (ensemble.predict(images), 5)):
        shown = thing._repr_html_()
        assert shown.count("<tr>") == rows and shown.count("<table>") == 1, shown
    assert 'alt="members and vertices in weight space' in digits._repr_html_()


def test_an_evaluation_writes_the_report_that_the_command_writes(tmp_path):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), (2, 3, 15))
    for number, own in enumerate(probabilities):
        np.savez(tmp_path / f"{number}.npz", probabilities=own, labels=np.arange(15) % 3)
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    found = evaluate_paths(files).compare("1.npz")
    assert found.save(str(tmp_path / "python")) == tmp_path / "python" / "report.html"
    command = ["compare", *map(str, files), "--baseline", str(files[1]), "--out", str(tmp_path / "command"), "--quiet"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    written = [{one.name: one.read_bytes() for one in (tmp_path / name).iterdir()} for name in ("python", "command")]
    assert written[0].keys() == written[1].keys()
    assert {name for name in written[0] if written[0][name] != written[1][name]} == {"report.html", "files.sha256"}
    with pytest.raises(UsageError, match=r"the baseline 'x' is none of '0.npz', '1.npz'"):
        found.compare("x")
    with pytest.raises(UsageError, match="a folder on this machine, not s3://bucket/report"):
        found.save("s3://bucket/report")


def test_names_in_a_notebook_are_text():
    found = predict(np.full((2, 1, 2), 0.5, np.float32), np.array([2]), 2, ["<img src=x>", "b"])
    assert "&lt;img src=x&gt;" in found._repr_html_() and "<img" not in found._repr_html_()


def test_members_that_are_not_saved(digits, tmp_path):
    ensemble = Ensemble(digits, "cpu").sample(2, seed=1)
    accuracy = (
        ensemble.predict(load_dataset("digits").test).classes == load_dataset("digits").test.labels.numpy()
    ).mean()
    report = ensemble.evaluate().report.runs[0]
    assert (report.clean.accuracy, report.members) == (pytest.approx(accuracy), 2)
    assert ensemble.run.path is None and "not saved" in repr(ensemble)
    with pytest.raises(UsageError, match=r"kept beside its run: save this one first, run.save\('runs/NAME'\)"):
        ensemble.calibrate()


def test_what_things_say():
    assert repr(Simplex(vertices=3, members=7)) == "Simplex(vertices=3, members=7)"
    assert repr(Settings()) == "Settings()"
    lines = repr(load_dataset("digits")).splitlines()
    assert lines[0] == "Dataset 'digits': digits (scikit-learn, 32 x 32)"
    assert len(lines) <= 5
    assert repr(load_dataset("digits").test) == "Split of 360 images (32, 32, 3)"
    assert repr(Gaussians(scale=1.0)) == "Gaussians(scale=1.0)"


def test_one_text_where_several_are_taken():
    assert EvaluationOptions(shift="cifar10c").shift == ["cifar10c"]
    assert EvaluationOptions(data="x").data == Path("x")
    assert Settings(init=Path("runs/x")).init == "runs/x"
    with pytest.raises(UsageError, match="shift"):
        EvaluationOptions(shift=7)


def test_text_is_a_path(tmp_path):
    bundle, picture = make_bundle(tmp_path / "bundle"), tmp_path / "one.png"
    Image.new("RGB", (6, 4)).save(picture)
    assert len(predict_files(str(bundle), str(picture))["predictions"]) == 1
    assert write_corruptions(dataset(), str(tmp_path / "made"), ["brightness"]) == ["brightness"]
    np.savez(tmp_path / "given.npz", probabilities=np.full((2, 15, 3), 1 / 3), labels=np.arange(15) % 3)
    assert evaluate_paths(str(tmp_path / "given.npz")).report.test_examples == 15
    assert Predictions.read(str(tmp_path / "given.npz")).C == 3


# --- progress -------------------------------------------------------------------------------------------------------


def test_training_is_silent_where_nobody_looks(capsys):
    train(dataset(), ONE, SETTINGS, network=_small.network)
    assert capsys.readouterr() == ("", "")


def test_training_shows_bars_where_somebody_looks(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(dataset(), ONE, SETTINGS, network=_small.network)
    assert "solution 1: 2 epochs" in capsys.readouterr().err
    train(dataset(), ONE, SETTINGS, network=_small.network, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_notebooks_bars_are_one_output_that_is_replaced(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    for name in ("display", "update_display"):
        monkeypatch.setattr(
            display, name, lambda data, **given: shown.append((given["display_id"], data["text/plain"]))
        )
    monkeypatch.setattr("ensembler.progress._REDRAWN", 0.0)
    console = Console(force_jupyter=True)
    assert has_bars(console)
    with bars_on(console, TextColumn("{task.description}"), BarColumn(bar_width=10)) as bars:
        task = bars.add_task("vertex 2", total=4)
        for done in range(5):
            bars.update(task, completed=done)
    assert len({name for name, _ in shown}) == 1
    assert "━" * 5 in shown[3][1] and "━" * 10 in shown[-2][1] and "vertex 2" in shown[3][1]
    assert shown[-1][1] == ""


# --- the notebook in examples/ --------------------------------------------------------------------------------------

NOTEBOOK = Path(__file__).parents[1] / "examples" / "from_images_to_a_service.ipynb"


def test_the_notebook_does_what_it_says(tmp_path):
    """Executed from its first cell to its last, with less training, fewer images, and a port of its own."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    text = NOTEBOOK.read_text()
    port, lighter = free_port(), {"epochs=10": "epochs=1", "examples=100": "examples=4"}
    for old, new in (lighter | {":3000": f":{port}"}).items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    notebook = nbformat.reads(text, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept without
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = {cell.id: list(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}
    assert shown["data"][0].data["text/plain"].startswith("Dataset 'digits'")
    printed = "".join(output.get("text", "") for output in shown["train"])
    assert "solution 1: 1 epoch, " in printed and "vertex 3: " in printed
    bars = [output for output in shown["train"] if output.output_type == "display_data"]
    assert [bar.data for bar in bars] == [{"text/plain": ""}]  # they were replaced, and at last by nothing
    assert '<img src="data:image/png' in shown["look"][-1].data["text/html"]
    assert "Prediction of 360 images by 5 members" in shown["predict"][-1].data["text/plain"]
    assert shown["predict"][-1].data["text/html"].endswith("<p>and 350 more</p>")
    assert "<table" in shown["evaluate"][-1].data["text/html"] and "svg" in shown["evaluate"][-1].data["text/html"]
    assert "Calibration of digits" in shown["calibrate"][-1].data["text/plain"]
    answer = ast.literal_eval(shown["ask"][-1].data["text/plain"])
    assert answer["label"] in list("0123456789") and 0 <= answer["predictive_entropy"] <= np.log(10)
    run = Run.load(tmp_path / "runs" / "digits")
    assert run.manifest.architecture == "__main__:network"
    assert Runtime.load(tmp_path / "bundles" / "digits").manifest.run.sha256 == run.sha256
    errors = [output for outputs in shown.values() for output in outputs if output.get("name") == "stderr"]
    assert errors == []
