"""Test-time augmentation: against a loop by hand, its passes, its place in the cache, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ensembler.data.images import Split, augment, draw
from ensembler.engine import Local
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.eval.comparison import compare_runs
from ensembler.eval.predictions import Predictor, predictions
from ensembler.eval.report.text import markdown
from ensembler.eval.shift.corruptions import corrupt
from ensembler.eval.shift.test_set import TestSet
from ensembler.eval.views import passes
from ensembler.seeds import generator
from ensembler.trainers import DeepEnsemble, Settings, train
from tests._evaluate import evaluate
from tests._training import call

NET = "tests.test_views:network"


def network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(108, num_classes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("views")
    for name, members, augmentation in (("one", 1, "crop-flip"), ("three", 3, "crop"), ("plain", 1, "none")):
        settings = Settings(architecture=NET, epochs=1, augmentation=augmentation, device="cpu")
        train("digits", DeepEnsemble(members=members), settings).save(folder / name)
    return folder


def by_hand(ensemble: Ensemble, images: torch.Tensor, views: int, augmentation: str, seed: int) -> torch.Tensor:
    """Each member's probabilities (M, B, C), image by image: member m sees variations m, m + M, ..."""
    members = ensemble.members
    rounds = max(1, -(-views // members))
    found = torch.zeros(members, len(images), 10)
    for member in range(members):
        for place in range(member, rounds * members, members):
            choices = draw(augmentation, len(images), generator(seed, "views", place))
            for i, image in enumerate(images):
                varied = augment(image[None], augmentation, choices[i : i + 1])
                found[member, i] += ensemble.predict_members(varied)[member, 0] / rounds
    return found


@pytest.mark.parametrize(("name", "views", "augmentation"), [("one", 4, "crop-flip"), ("three", 3, "crop")])
def test_a_prediction_is_the_mean_over_the_members_variations(runs, tmp_path, monkeypatch, name, views, augmentation):
    images = Split(torch.randint(0, 256, (7, 32, 32, 3), dtype=torch.uint8), torch.arange(7) % 10)
    monkeypatch.setattr("ensembler.eval.predictions._CHUNK", 2 * 32 * 32 * 3)  # two images at a time
    ensemble = Ensemble.load(runs / name, device="cpu")
    predictor = Predictor(ensemble, tmp_path, views, seed=5)
    ((_, (found,)),) = predictions([predictor], [TestSet("clean", "clean", images, "clean", members=True)])
    expected = by_hand(ensemble, images.images, views, augmentation, seed=5).numpy()
    np.testing.assert_allclose(found.members, expected, atol=1e-6)
    np.testing.assert_allclose(found.mean, expected.mean(0), atol=1e-6)
    without = ensemble.predict_members(images.images).numpy()
    assert np.abs(found.members - without).max() > 1e-3
    assert len({one.tobytes() for one in found.members}) == ensemble.members


def test_variations_come_after_corruptions(runs, tmp_path):
    digits = Ensemble.load(runs / "one", device="cpu")
    found = evaluate([runs / "one"], "corruptions", examples=8, views=[2], device="cpu", cache=tmp_path)
    dataset = digits.run.manifest.dataset.load()
    indices = torch.randperm(len(dataset.test), generator=generator(0, "examples"))[:8].sort().values
    test = dataset.test.part(indices)
    name = "brightness"
    images = corrupt(test.images, name, 3)
    expected = by_hand(digits, images, 2, "crop-flip", seed=0)[0]
    accuracy = float((expected.argmax(1) == test.labels).double().mean())
    assert found.report.runs[0].cells[name][3].accuracy == accuracy


def test_rows_costs_and_kept_predictions(runs, tmp_path):
    places = [runs / "one", runs / "three"]
    options = {"examples": 60, "device": "cpu", "cache": tmp_path}
    found = evaluate(places, views=[0, 4], **options)
    rows = [(run.name, run.members, run.views, run.forward_passes_per_prediction) for run in found.report.runs]
    assert rows == [("one", 1, 0, 1), ("one +TTA 4", 1, 4, 4), ("three", 3, 0, 3), ("three +TTA 4", 3, 4, 6)]
    assert len({run.clean.nll for run in found.report.runs}) == 4
    plain = evaluate(places, **options)
    assert [run.clean for run in plain.report.runs] == [run.clean for run in found.report.runs[::2]]
    again = evaluate(places, views=[4, 0], **options)
    assert [run.clean for run in again.report.runs[::2]] == [run.clean for run in found.report.runs[1::2]]
    seeds = [evaluate(places[:1], views=[4], seed=seed, device="cpu", cache=tmp_path) for seed in (0, 1)]
    assert seeds[0].report.runs[0].clean != seeds[1].report.runs[0].clean
    compared = compare_runs(found, baseline=2, curves=True)
    assert "| 3 x 2 |" in markdown(compared)
    assert [len(group.runs) for group in compared.comparison.groups] == [1, 1, 1, 1]
    assert {one.reference for one in compared.comparison.equivalents.values()} == {"three"}


def test_passes_are_a_members_variations_times_members():
    assert [passes(views, members) for views, members in ((0, 1), (0, 5), (1, 1), (8, 1), (5, 5), (2, 5), (6, 5))] == [
        *(1, 5, 1, 8),
        *(5, 5, 10),
    ]


def test_the_command_scores_with_and_without(runs, tmp_path):
    common = ["--device", "cpu", "--examples", "40", "--cache", tmp_path / "cache", "--quiet"]
    result = call("eval", runs / "one", "--views", 0, "--views", 3, "--out", tmp_path / "report", *common)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["forward_passes_per_prediction"] for run in report["runs"]] == [1, 3]
    given = tmp_path / "given.npz"
    arguments = ["--views", 3, "--save-predictions", given, "--out", tmp_path / "saved"]
    assert call("eval", runs / "one", *arguments, *common).exit_code == 0
    result = call(
        "compare", runs / "one", given, "--views", 3, "--baseline", given, "--out", tmp_path / "both", *common
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "both" / "report.json").read_text())
    assert report["comparison"]["baseline"] == "given.npz"
    assert report["runs"][0]["clean"] == report["runs"][1]["clean"]


def test_what_has_no_variations_is_refused(runs, tmp_path):
    options = {"examples": 10, "device": "cpu", "cache": tmp_path}
    with pytest.raises(UsageError, match="plain was trained with --augmentation none, so that its images have no"):
        evaluate([runs / "plain"], views=[2], **options)
    for wrong in ([2, 2], [-1], []):
        with pytest.raises(UsageError, match="--views takes different numbers of variations, 0 or more, not"):
            evaluate([runs / "one"], views=wrong, **options)
    with pytest.raises(UsageError, match="give --views once"):
        evaluate([runs / "one"], views=[0, 2], save_predictions=tmp_path / "x.npz", **options)
    np.savez(tmp_path / "given.npz", probabilities=np.full((3, 2), 0.5), labels=[0, 1, 0])
    with pytest.raises(UsageError, match="--views predicts images by a run, and only files of predictions are named"):
        evaluate([tmp_path / "given.npz"], views=[2])


class Elsewhere(Local):
    """An engine that is asked for predictions as one of other processes is."""

    here = False


def test_an_engine_predicts_the_same_variations(runs, tmp_path):
    places, options = [runs / "one", runs / "three"], {"examples": 20, "ood": ["noise:uniform"], "device": "cpu"}
    found = [
        evaluate(places, views=[4, 0], engine=engine, cache=tmp_path / name, **options).report.runs
        for name, engine in (("here", None), ("elsewhere", Elsewhere()))
    ]
    assert [run.ood for run in found[0]] == [run.ood for run in found[1]]
    assert found[0][0].ood != found[0][1].ood
