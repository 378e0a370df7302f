"""Whole evaluations: the official layout, the generated shift, the means, the report's bytes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from ensembler.datasets import Split
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.eval.corruptions import AVAILABLE, HEADLINE, SEVERITIES, VALIDATION, corrupt
from ensembler.eval.evaluation import evaluate
from ensembler.eval.plots import plot_reliability, plot_severity
from ensembler.eval.shift import Cell, find_shift
from ensembler.trainers import Session, Settings, train_deep_ensemble, train_simplex
from tests._small import SETTINGS, dataset


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.datasets.load", lambda name, root=None, **_: dataset())
    session = lambda: Session(dataset(), Settings(**SETTINGS))  # noqa: E731
    return [
        train_simplex(session(), vertices=3, members=4).save(tmp_path / "runs" / "simplex"),
        train_deep_ensemble(session(), members=1).save(tmp_path / "runs" / "single"),
    ]


def test_every_score_is_of_the_images_it_names(runs):
    report, _ = evaluate(runs, "cifar10c", device="cpu", seed=3)
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
    report, _ = evaluate(runs[:1], "cifar10c", device="cpu")
    assert report.shift.source == "generated"
    assert "not the official files" in report.shift.note
    assert set(report.shift.not_covered) | set(AVAILABLE) == set(HEADLINE + VALIDATION)
    assert not set(report.shift.headline) & set(VALIDATION)


def test_the_same_seed_gives_the_same_bytes(runs):
    (one, drawn), (other, again) = (evaluate(runs, "cifar10c", device="cpu", examples=9) for _ in range(2))
    assert one.model_dump_json() == other.model_dump_json()
    assert plot_severity(one) == plot_severity(other)
    assert plot_reliability(one, drawn) == plot_reliability(other, again)
    assert plot_severity(one).startswith(b"\x89PNG")
    assert one.test_examples == 9
    assert json.loads(one.model_dump_json())["runs"][1]["cells"]["contrast"]["5"]["mutual_information"] is None


def test_clean_alone(runs):
    report, (diagram, _) = evaluate(runs, device="cpu")
    assert report.shift is None
    assert report.runs[0].by_severity == {}
    assert diagram.shifted is None
    assert plot_reliability(report, [diagram, diagram]).startswith(b"\x89PNG")


def test_what_cannot_be_evaluated_is_refused(runs, monkeypatch):
    with pytest.raises(UsageError, match="no run to evaluate"):
        evaluate([])
    with pytest.raises(UsageError, match="unknown shift 'imagenet-c': use cifar10c"):
        evaluate(runs, "imagenet-c", device="cpu")
    for wrong in (0, -5):
        with pytest.raises(UsageError, match="batch size must be at least 1"):
            evaluate(runs, device="cpu", batch_size=wrong)
    for wrong in (0, 16):
        with pytest.raises(UsageError, match="the test set has 15 images"):
            evaluate(runs, device="cpu", examples=wrong)
    monkeypatch.setattr("ensembler.datasets.load", lambda name, root=None, **_: dataset(train=31))
    with pytest.raises(DataError, match="has changed since the run was trained"):
        evaluate(runs, device="cpu")


def test_runs_of_different_datasets_are_not_compared(runs, tmp_path):
    other = dataclasses.replace(dataset(), title="other", test=dataset().validation)
    path = train_deep_ensemble(Session(other, Settings(**SETTINGS)), members=1).save(tmp_path / "runs" / "other")
    with pytest.raises(UsageError, match="evaluate runs of one dataset together"):
        evaluate([runs[0], path], device="cpu")


def official(folder, count=12, corruptions=("fog", "shot_noise")):
    """Files of the official layout: severity s in rows [(s - 1) * n : s * n], filled with a number of their own."""
    folder.mkdir()
    for number, name in enumerate(corruptions):
        rows = np.zeros((5 * count, 8, 8, 3), dtype=np.uint8)
        for severity in range(5):
            for image in range(count):
                rows[severity * count + image] = 100 * number + 20 * severity + image
        np.save(folder / f"{name}.npy", rows)
    test = Split(torch.zeros(count, 8, 8, 3, dtype=torch.uint8), torch.arange(count) % 3)
    np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5))
    return dataclasses.replace(dataset(), name="cifar10", test=test)


@pytest.mark.parametrize("below", [True, False])
def test_official_files_are_read_in_their_order(tmp_path, below):
    folder = tmp_path / "CIFAR-10-C"
    images = official(folder)
    indices = torch.tensor([1, 7])
    shift = find_shift("cifar10c", images, indices, tmp_path if below else folder)
    assert shift.source == "official"
    assert shift.corruptions == ("shot_noise", "fog")
    assert "gaussian_noise" in shift.not_covered
    corrupted = shift.images(Cell("shot_noise", 4))
    assert corrupted.shape == (2, 8, 8, 3)
    assert corrupted[:, 0, 0, 0].tolist() == [161, 167]
    assert torch.equal(shift.test.labels, images.test.labels[indices])


def test_official_files_serve_cifar10_alone(tmp_path):
    images = official(tmp_path / "CIFAR-10-C")
    for name, source in (("cifar10", "official"), ("digits", "generated")):
        assert (
            find_shift("cifar10c", dataclasses.replace(images, name=name), torch.arange(12), tmp_path).source == source
        )


def test_official_files_are_found_where_datasets_lie(tmp_path, monkeypatch):
    images = official(tmp_path / "CIFAR-10-C")
    monkeypatch.setenv("ENSEMBLER_DATA", str(tmp_path))
    assert find_shift("cifar10c", images, torch.arange(12)).source == "official"


def test_official_files_that_are_not_what_they_should_be_are_named(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    images = official(folder)
    find = lambda: find_shift("cifar10c", images, torch.arange(12), tmp_path)  # noqa: E731
    find()
    fog, labels = np.load(folder / "fog.npy"), np.load(folder / "labels.npy")
    for wrong, message in ((fog[:-1], r"fog\.npy holds \(59, 8, 8, 3\)"), (fog.astype(float), "of float64, not")):
        np.save(folder / "fog.npy", wrong)
        with pytest.raises(DataError, match=message):
            find()
    np.save(folder / "fog.npy", fog)
    content = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"cannot read .*fog\.npy"):
        find()
    np.save(folder / "fog.npy", np.array([{"a": "pickle"}], dtype=object))
    with pytest.raises(DataError, match=r"cannot read .*fog\.npy"):
        find()
    np.save(folder / "fog.npy", fog)
    np.save(folder / "labels.npy", np.roll(labels, 1))
    with pytest.raises(DataError, match="not the test set's labels five times"):
        find()
