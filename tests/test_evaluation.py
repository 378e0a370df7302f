"""Whole evaluations: every score of the images it names, the means, the comparison, the report's bytes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.data.datasets import Split
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.eval.comparison import compare_runs
from ensembler.eval.shift.corruptions import AVAILABLE, HEADLINE, SEVERITIES, VALIDATION, corrupt
from ensembler.run import Run
from ensembler.task import Classification
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from tests._evaluate import calibrate, evaluate
from tests._small import SETTINGS, dataset


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    return [
        train(dataset(), method, Settings(**SETTINGS)).save(tmp_path / "runs" / name)
        for name, method in (("simplex", Simplex(vertices=3, members=4)), ("single", DeepEnsemble(members=1)))
    ]


def test_every_score_is_of_the_images_it_names(runs):
    report = evaluate(runs, "cifar10c", device="cpu", seed=3).report
    test = dataset().test
    for path, found in zip(runs, report.runs, strict=True):
        ensemble = Ensemble.load(path, device="cpu")
        for corruption, severity in (("shot_noise", 2), ("contrast", 5)):
            mean = ensemble.predict_proba(corrupt(test.images, corruption, severity, seed=3)).double()
            cell = found.cells[corruption][severity]
            assert cell.accuracy == pytest.approx((mean.argmax(1) == test.labels).double().mean().item())
            nll = -mean[torch.arange(len(test)), test.labels].log().mean().item()
            assert cell.nll == pytest.approx(nll, rel=1e-5)
        headline = [name for name in HEADLINE if name in AVAILABLE]
        errors = {s: [found.cells[name][s].error for name in headline] for s in SEVERITIES}
        for severity in SEVERITIES:
            assert found.by_severity[severity].error == pytest.approx(np.mean(errors[severity]))
        assert found.shifted.error == pytest.approx(np.mean(list(errors.values())))
        assert found.clean.error == pytest.approx(1 - found.clean.accuracy)
    simplex, single = report.runs
    assert simplex.forward_passes_per_prediction == 4
    assert simplex.training_example_passes == 60 + 2 * 16
    assert single.clean.disagreement is None
    assert single.shifted.mutual_information is None


def test_generated_shift_is_said_and_what_it_lacks_is_named(runs):
    report = evaluate(runs[:1], "cifar10c", device="cpu").report
    assert report.shift.source == "generated"
    assert "not the official files" in report.shift.note
    assert set(report.shift.not_covered) | set(AVAILABLE) == set(HEADLINE + VALIDATION)
    assert not set(report.shift.headline) & set(VALIDATION)


def test_the_same_seed_gives_the_same_bytes(runs, tmp_path):
    one, other = (
        evaluate(runs, "cifar10c", ood=["noise:uniform"], device="cpu", examples=9, cache=tmp_path / name).report
        for name in ("one", "other")
    )
    assert one.model_dump_json() == other.model_dump_json()
    assert one.test_examples == 9
    found = json.loads(one.model_dump_json())["runs"][1]
    assert found["cells"]["contrast"]["5"]["mutual_information"] is None
    assert found["ood"]["noise:uniform"]["mutual_information"] is None
    assert found["ood"]["noise:uniform"]["predictive_entropy"]["examples_out"] == 9


def test_clean_alone(runs):
    found = evaluate(runs, device="cpu")
    assert found.report.shift is None
    assert found.report.runs[0].by_severity == {}
    assert found.runs[0].shifted is None


def test_calibrated_nll_uses_a_temperature_of_the_validation_images(runs, monkeypatch):
    images, labels = dataset(), dataset().validation.labels
    wrong = torch.where(torch.arange(len(labels)) % 4 == 0, (labels + 1) % 3, labels)  # too sure of a quarter of them
    images = dataclasses.replace(images, validation=Split(images.validation.images, wrong))
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: images)
    monkeypatch.setattr("ensembler.run.DatasetRecord.check", lambda self, dataset: None)
    found = evaluate(runs, device="cpu").report.runs[0]
    ensemble = Ensemble.load(runs[0], device="cpu")
    logs = ensemble.predict_proba(images.validation.images).double().log()
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    losses = [-torch.log_softmax(logs / T, 1)[range(len(logs)), images.validation.labels].mean() for T in grid]
    assert found.temperature == pytest.approx(grid[int(np.argmin(losses))].item(), rel=5e-3)
    logs = ensemble.predict_proba(images.test.images).double().log() / found.temperature
    calibrated = -torch.log_softmax(logs, 1)[range(len(logs)), images.test.labels].mean().item()
    assert found.clean.calibrated_nll == pytest.approx(calibrated, rel=1e-5)


def test_members_and_families(runs):
    found = evaluate(runs, "corruptions", device="cpu").report.runs[0]
    members = Ensemble.load(runs[0], device="cpu").predict_members(dataset().test.images)
    labels = dataset().test.labels
    for single, probabilities in zip(found.single_members, members, strict=True):
        assert single.accuracy == pytest.approx((probabilities.argmax(1) == labels).double().mean().item())
        assert single.nll == pytest.approx(-probabilities[range(len(labels)), labels].log().mean().item(), rel=1e-5)
    cells = [found.cells[name][s].nll for name in ("gaussian_noise", "shot_noise", "impulse_noise") for s in SEVERITIES]
    assert found.by_family["noise"].nll == pytest.approx(np.mean(cells))
    assert set(found.by_family) == {"noise", "blur", "weather", "digital", "validation"}


def test_a_comparison_is_paired_and_knows_its_baseline(runs):
    found = evaluate(runs, "corruptions", device="cpu")
    report = compare_runs(found, baseline=1, curves=True)
    simplex, single = report.runs
    (difference,) = report.comparison.differences
    assert (report.comparison.baseline, difference.run) == ("single", "simplex")
    for score in ("error", "nll", "brier", "ece"):
        for here, a, b in (("clean", simplex.clean, single.clean), ("shifted", simplex.shifted, single.shifted)):
            one = getattr(difference, here)[score]
            assert one.difference == pytest.approx(getattr(a, score) - getattr(b, score), abs=1e-6)
            assert one.low <= one.high
    (curve,) = report.comparison.curves
    assert curve.run == "simplex"
    assert sorted(curve.order) == [0, 1, 2, 3]
    assert curve.points[-1].nll.mean == pytest.approx(simplex.clean.nll)
    assert report.comparison.equivalents == {}
    assert compare_runs(found).comparison.curves == []


def test_deep_ensembles_give_the_equivalents_and_seeds_are_grouped(runs, tmp_path):
    paths = [runs[0]]
    for seed in (0, 1):
        run = train(dataset(), DeepEnsemble(members=3), Settings(**SETTINGS | {"seed": seed}))
        paths.append(run.save(tmp_path / "runs" / f"deep{seed}"))
    comparison = compare_runs(evaluate(paths, device="cpu")).comparison
    assert {found.reference for found in comparison.equivalents.values()} == {"deep0"}
    assert [group.runs for group in comparison.groups] == [[0], [1, 2]]
    assert comparison.groups[1].scores["nll"].n == 2
    assert comparison.equivalents["deep0"].members == pytest.approx(3, abs=1e-6)


def test_the_equivalent_is_read_off_a_deep_ensemble_of_the_same_network(runs, tmp_path):
    """Five networks of another architecture are more, but no measure of what more of this one would give."""

    def deep(name, members, **changes):
        run = train(dataset(), DeepEnsemble(members=members), Settings(**SETTINGS | changes))
        return run.save(tmp_path / "runs" / name)

    paths = [
        runs[0],
        deep("same", 3),
        deep("other-network", 5, architecture="tests._small:batchnorm"),
        runs[1],
        deep("smaller", 2),
    ]
    comparison = compare_runs(evaluate(paths, device="cpu")).comparison
    references = {name: found.reference for name, found in comparison.equivalents.items()}
    assert references == {
        "simplex": "same",
        "same": "same",
        "other-network": "other-network",
        "single": "same",
        "smaller": "same",
    }
    assert {found.largest for name, found in comparison.equivalents.items() if name != "other-network"} == {3}
    assert [curve.run for curve in comparison.curves] == ["same", "other-network"]

    found = evaluate([*paths[:1], paths[2]], device="cpu")
    assert set(compare_runs(found).comparison.equivalents) == {"other-network"}  # for the simplex there is none


def test_a_folder_under_two_names_is_one_run(runs, tmp_path):
    """``compare runs/*``: the shell gives ``runs/latest``, a link to one of the others, too."""
    folder = tmp_path / "runs"
    shown = sorted(folder.iterdir())
    assert [path.name for path in shown] == ["latest", "simplex", "single"]
    found = evaluate(shown, device="cpu")
    assert [run.name for run in found.report.runs] == ["single", "simplex"]
    assert [
        run.name for run in evaluate([runs[0], folder / "simplex" / ".." / "simplex"], device="cpu").report.runs
    ] == ["simplex"]
    for command in (["eval"], ["compare"], ["compare", "--baseline", folder / "latest"]):
        options = ["--device", "cpu", "--quiet", "--json", tmp_path / "report.json", "--out", tmp_path / "report"]
        result = CliRunner().invoke(app, [*map(str, [*command, *shown, *options])])
        assert result.exit_code == 0, result.output
        report = json.loads((tmp_path / "report.json").read_text())
        assert [run["name"] for run in report["runs"]] == ["single", "simplex"]
    result = CliRunner().invoke(app, ["compare", str(folder / "latest"), str(runs[1])])
    assert "a comparison takes at least two runs" in result.stderr


def test_what_cannot_be_compared_is_refused(runs, tmp_path):
    with pytest.raises(UsageError, match="at least two runs"):
        compare_runs(evaluate(runs[:1], device="cpu"))
    shutil.copytree(runs[1], tmp_path / "other" / "simplex")
    with pytest.raises(UsageError, match="two runs are called simplex: rename"):
        compare_runs(evaluate([runs[0], tmp_path / "other" / "simplex"], device="cpu"))


def test_what_cannot_be_evaluated_is_refused(runs, monkeypatch):
    with pytest.raises(UsageError, match="no run to evaluate"):
        evaluate([])
    with pytest.raises(UsageError, match="--shift imagenet-c is none of cifar10c"):
        evaluate(runs, "imagenet-c", device="cpu")
    for wrong in (0, -5):
        with pytest.raises(UsageError, match="batch_size must be at least 1"):
            evaluate(runs, device="cpu", batch_size=wrong)
    for wrong, message in ((0, "examples must be at least 1"), (16, "the test set has 15 images")):
        with pytest.raises(UsageError, match=message):
            evaluate(runs, device="cpu", examples=wrong)
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset(train=31))
    with pytest.raises(DataError, match="is not what the run was trained on, or has changed since"):
        evaluate(runs, device="cpu")


def test_only_classifiers_are_scored(runs, tmp_path):
    run = Run.load(runs[0])
    run.manifest.task = "tests.test_evaluation:Toy"
    path = run.save(tmp_path / "runs" / "toy")
    for score in (lambda: evaluate([path], device="cpu"), lambda: calibrate(path, device="cpu")):
        with pytest.raises(UsageError, match="only classifiers are scored here, not tests"):
            score()


class Toy(Classification):
    name = "tests.test_evaluation:Toy"


def test_runs_of_different_datasets_are_not_compared(runs, tmp_path):
    other = dataclasses.replace(dataset(), title="other", test=dataset().validation)
    path = train(other, DeepEnsemble(members=1), Settings(**SETTINGS)).save(tmp_path / "runs" / "other")
    with pytest.raises(UsageError, match="evaluate runs of one dataset together"):
        evaluate([runs[0], path], device="cpu")
