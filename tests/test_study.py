"""``ensembler study``: budgets, sharing, resuming, statistics, and what is said."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.live import Live
from scipy.stats import t, ttest_rel
from sklearn.metrics import roc_auc_score

from ensembler.engine import Local
from ensembler.errors import CorruptError, UsageError
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.metrics.members import Equivalent
from ensembler.run import Run
from ensembler.side_by_side import SideBySide
from ensembler.study import statistics
from ensembler.study.analysis import _behind, equivalents_said
from ensembler.study.board import Board
from ensembler.study.file import known_methods, study_of
from ensembler.study.plan import plan
from ensembler.study.report import files, terminal
from ensembler.study.run import Maker, index
from ensembler.study.schema import CellReport, Estimate, StudyReport
from ensembler.study.sentences import answers, compared, pareto, recommendations, worse
from ensembler.study.statistics import Scored, auroc, behind, estimate, mean, scored
from ensembler.trainers import DeepEnsemble, train
from ensembler.trainers.budget import Budget
from tests import _tally
from tests._small import dataset, make_images
from tests.test_cli import ROOT, call

SMALL = {"arch": "tests._tally:tallying", "budget": 4, "batch-size": 8, "budgets": [1, 2, 3], "seeds": 1}
METHODS = {name: {} for name in known_methods()} | {"simplexes": {"vertices": 3}}


def planned(**changes):
    study = study_of(SMALL | {"methods": METHODS} | changes, {})
    return study, plan(study, dataset(120))


def made(found, folder, **options):
    """Each cell's run, and the examples that each training really saw."""
    counted = {}
    _tally.seen.clear()

    def on_run(name, run, how):
        counted[name] = (how, sum(_tally.seen))
        _tally.seen.clear()

    engine, elsewhere = options.get("engine", Local()), options.get("elsewhere", {})
    return Maker(found, dataset(120), folder, engine, {"device": "cpu"}, elsewhere, on_run).make(), counted


# --- budgets --------------------------------------------------------------------------------------------------------


def test_every_method_takes_its_budget_and_no_more(tmp_path):
    _, found = planned(budgets=[1, 3])
    places, counted = made(found, tmp_path)
    assert {name: node.passes for name, node in found.nodes.items()} == {
        name: seen for name, (how, seen) in counted.items() if how == "trained"
    }
    for cell in found.cells:
        total = cell.budget * 4 * 120
        taken = sum(counted[name][1] for name in cell.needs)
        assert 0.98 * total <= taken <= total
        assert Run.load(places[cell.name]).manifest.cost.example_passes == taken  # what is shared counts in each
    assert {cell.label for cell in found.cells} == set(METHODS)
    assert found.passes == sum(seen for how, seen in counted.values() if how == "trained")


def test_what_fits_no_budget_is_left_out_with_a_reason():
    _, found = planned(budgets=[1, 1.5])
    reasons = {(one.label, one.budget): one.why for one in found.left_out}
    assert reasons["deep-ensemble", 1] == "a budget below 2 holds one network only"
    assert reasons["simplex", 1] == "one network leaves nothing for a vertex"
    assert reasons["simplexes", 1.5] == "two simplexes of 3 vertices take 3 budgets"
    assert {cell.label for cell in found.cells if cell.budget == 1.5} == {
        *("single", "fge", "simplex", "snapshots", "subspace", "swag", "csgmcmc", "mc-dropout"),
    }
    with pytest.raises(UsageError, match=r"no method fits a budget \(deep-ensemble at 1: a budget below 2 holds one"):
        planned(methods={"deep-ensemble": {}}, budgets=[1])


def test_rates_are_those_of_each_methods_optimiser_and_nothing_stops_early():
    changed = {"snapshots": {"optimiser": "adamw"}, "csgmcmc": {"optimiser": "adamw"}, "simplex": {"warmup": 1}}
    _, found = planned(methods={"single": {}, "fge": {}} | changed, budgets=[1, 2])
    rates = {cell.label: (node.settings.optimiser, node.settings.lr) for cell in found.cells for node in cell.nodes}
    assert rates == {"single": ("sgd", 0.1), "fge": ("sgd", 0.1), "snapshots": ("adamw", 1e-3), "simplex": ("sgd", 0.1)}
    reasons = {(one.label, one.budget): one.why for one in found.left_out}
    assert reasons["csgmcmc", 1].endswith("samples by SGD at one learning rate: leave out --optimiser adamw")
    for changes in ({"early-stopping": 2}, {"methods": {"single": {"early-stopping": 2}}}):
        with pytest.raises(
            UsageError, match="--early-stopping ends trainings before their budget, and a study compares"
        ):
            planned(**changes)


def test_a_method_without_a_rule_is_refused(monkeypatch):
    kind, _ = known_methods()["fge"]
    monkeypatch.delattr(kind, "at_budget")
    with pytest.raises(UsageError, match="train-fge has no rule for a budget of passes: leave fge out of the study"):
        planned()
    study = study_of({}, {})  # where no method is named, it is not among them
    assert {entry.label for entry in study.entries} == known_methods().keys() - {"fge"}


def test_a_vertex_gets_the_epochs_that_are_asked_for():
    _, found = planned(methods={"simplex": {"vertices": 3, "vertex-epochs": 3}}, budgets=[2, 2.5])
    assert [one.why for one in found.left_out] == ["what a network leaves is less than 3 epochs for each vertex"]
    assert {cell.budget for cell in found.cells} == {2.5}


def test_a_cost_that_is_unknown_before_training_is_refused():
    with pytest.raises(UsageError, match="auto takes an unknown number of passes"):
        planned(methods={"simplex": {"regularisation": "auto"}})


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [7]])
def test_steps_are_the_most_that_passes_allow(sizes):
    budget = Budget(1, 1, 1, sizes)
    for passes in range(40):
        steps = budget.steps(passes)
        stream = np.cumsum(sizes * 20)
        assert steps == (stream <= passes).sum()
        assert budget.passes(steps) == ([0, *stream])[steps]


# --- sharing --------------------------------------------------------------------------------------------------------


def test_a_network_is_trained_once_and_shared():
    _, found = planned(seeds=2)
    (base,) = next(cell for cell in found.cells if (cell.label, cell.budget, cell.seed) == ("single", 1, 1)).needs
    users = {(cell.label, cell.budget) for cell in found.cells if base in cell.needs}
    shared = {"single", "deep-ensemble", "simplex", "simplexes", "curve-bezier", "complex"}
    assert {label for label, _ in users} == shared
    assert ("single", 2) not in users  # the control is trained from fresh weights
    assert found.passes < sum(cell.passes for cell in found.cells)
    seeds = {name: node.settings.seed for name, node in found.nodes.items()}
    assert {cell.seed for cell in found.cells if base in cell.needs} == {1}
    assert set(seeds.values()) == {0, 1, 1000, 1001, 2000, 2001}


def test_another_seed_budget_or_method_keeps_the_runs_that_there_are():
    _, few = planned(methods={"single": {}, "fge": {}}, budgets=[1])
    _, many = planned(seeds=2)
    assert set(few.nodes) < set(many.nodes)
    _, other = planned(methods={"single": {}, "fge": {}}, budgets=[1], lr=0.05)
    assert not set(few.nodes) & set(other.nodes)
    _, own = planned(methods={"single": {}, "fge": {"batch-size": 2}}, budgets=[1])
    assert len(set(few.nodes) & set(own.nodes)) == 1  # the network that all share keeps the study's settings
    assert all(0.98 * 480 <= cell.passes <= 480 for cell in own.cells)


def test_runs_that_exist_are_taken_wherever_they_are(tmp_path):
    changes = {"methods": {"single": {}, "simplex": {"vertices": 2}, "deep-ensemble": {}}, "budgets": [2]}
    _, found = planned(**changes)
    first, _ = made(found, tmp_path / "a")
    again, counted = made(found, tmp_path / "a")
    assert first == again
    assert set(counted.values()) == {("taken", 0)}
    elsewhere, counted = made(found, tmp_path / "b", elsewhere=index([tmp_path / "a"]))
    assert elsewhere == first
    assert set(counted.values()) == {("taken", 0)}


def test_runs_side_by_side_are_those_one_after_another(tmp_path):
    _, found = planned(methods={"single": {}, "simplex": {"vertices": 2}}, budgets=[1, 2])
    alone, _ = made(found, tmp_path / "alone")
    together, _ = made(found, tmp_path / "together", engine=SideBySide(2))
    assert alone.keys() == together.keys()
    for name, path in alone.items():
        one, other = Run.load(path).vertices, Run.load(together[name]).vertices
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_of_a_training_command_is_taken(tmp_path):
    study, found = planned(methods={"single": {}}, budgets=[1])
    run = train(dataset(120), DeepEnsemble(members=1), study.settings.model_copy(update={"device": "cpu"}))
    run.save(tmp_path / "mine")
    places, counted = made(found, tmp_path / "runs", elsewhere=index([tmp_path]))
    assert list(counted.values()) == [("taken", 0)]
    assert list(places.values()) == [tmp_path / "mine"]


def test_an_error_names_its_run(tmp_path):
    _, found = planned(methods={"fge": {"low": 0.5}}, budgets=[1])
    (name,) = found.nodes
    with pytest.raises(UsageError, match=f"{name}: FGE's rates must satisfy 0 < low < high"):
        made(found, tmp_path)
    assert not (tmp_path / name).exists()


def test_what_started_from_a_run_that_was_trained_again_is_not_taken(tmp_path, monkeypatch):
    _, found = planned(methods={"simplex": {"vertices": 2}}, budgets=[2])
    made(found, tmp_path)
    base = next(name for name, node in found.nodes.items() if not node.starts)
    manifest = tmp_path / base / "manifest.json"
    manifest.write_text(manifest.read_text().replace("20", "21"))
    with pytest.raises(CorruptError, match=f"{base}/manifest.json has changed since it was written"):
        made(found, tmp_path)
    shutil.rmtree(tmp_path / base)
    later = SimpleNamespace(now=lambda zone: datetime.now(zone) + timedelta(seconds=1))  # as its manifest says
    monkeypatch.setattr("ensembler.trainers.training.datetime", later)
    with pytest.raises(UsageError, match="what it starts from was trained again"):
        made(found, tmp_path)


def test_a_run_of_other_data_is_not_taken(tmp_path):
    _, found = planned(methods={"single": {}}, budgets=[1])
    (name,) = found.nodes
    _, other = planned(methods={"single": {}}, budgets=[1], lr=0.05)
    made(other, tmp_path)
    (tmp_path / next(iter(other.nodes))).rename(tmp_path / name)
    with pytest.raises(UsageError, match="is not the run that the study needs there"):
        made(found, tmp_path)


def test_a_network_whose_code_has_changed_is_trained_again(tmp_path, monkeypatch):
    """The runs of the old code were taken, and scored as the new network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    one = Path("one.py")
    one.write_text(
        "from torch import nn\n\nSTRIDE = 3\nunused = [1]\n\n\ndef middle():\n    return nn.Tanh()\n\n\n"
        "class Net(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x)\n\n\n"
        "def make(num_classes):\n    unused.append(2)\n"
        "    return Net(nn.Conv2d(3, 4, 3, STRIDE), middle(), nn.Flatten(), nn.LazyLinear(num_classes))\n"
    )
    text = one.read_text()

    def nodes(old="", new=""):
        one.write_text(text.replace(old, new))
        sys.modules.pop("one", None)
        shutil.rmtree("__pycache__", ignore_errors=True)
        importlib.invalidate_caches()
        study = study_of(SMALL | {"arch": "one:make", "methods": {"single": {}}, "budgets": [1]}, {})
        found = plan(study, dataset(40))
        (node,) = found.nodes.values()
        return node.name, Maker(found, dataset(40), tmp_path, Local(), {}, {}, print).training(node).spec.fingerprint

    before = nodes()
    assert (
        nodes("STRIDE = 3", "STRIDE = 3  # a note")
        == nodes("\n\n\ndef make", "\n\n\nOTHER = 1\n\n\ndef make")
        == before
    )
    for old, new in (("nn.Tanh", "nn.ReLU"), ("STRIDE = 3", "STRIDE = 2"), ("forward(x)\n", "forward(x) / 2\n")):
        assert not set(nodes(old, new)) & set(before)


# --- statistics -----------------------------------------------------------------------------------------------------


class OfRun:
    """What :func:`scored` reads of a run."""

    def __init__(self, probs, labels, entropies):
        self.losses, self.clean, self.entropies = Losses.of(probs, labels), self, entropies
        self.shifted = self.shifted_calibrated = None
        self.mean = probs


def test_an_interval_is_of_seeds_and_images():
    """From per-image losses, by formulas: the bootstrap's covariance is that of the images' mean."""
    S, N = 3, 60
    rng = np.random.default_rng(0)
    labels, easy = rng.integers(0, 3, N), rng.normal(0, 1, (N, 1))
    logits = [2 * np.eye(3)[labels] * easy + rng.normal(0, 1, (N, 3)) for _ in range(S)]
    probs = [np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in logits]
    runs = [scored(OfRun(p, labels, {"clean": rng.random(N)}), labels, 1.0) for p in probs]
    for name, losses in {
        "nll": np.array([-np.log(p[np.arange(N), labels]) for p in probs]),
        "error": np.array([p.argmax(axis=1) != labels for p in probs], dtype=float),
    }.items():
        found, values = estimate([run[name] for run in runs]), losses.mean(axis=1)
        covariance = np.cov(losses) / N
        shared = (covariance.sum() - np.trace(covariance)) / (S * (S - 1))
        seeds = t.ppf(0.975, S - 1) * values.std(ddof=1) / np.sqrt(S)
        half = np.hypot(seeds, t.ppf(0.975, N - 1) * np.sqrt(shared))
        assert found.mean == pytest.approx(values.mean())
        assert (found.mean - found.low, found.high - found.mean) == pytest.approx((half, half), rel=0.06)
        (one,) = [estimate([runs[0][name]])]
        assert one.high - one.mean == pytest.approx(t.ppf(0.975, N - 1) * losses[0].std() / np.sqrt(N), rel=0.06)
    plain, calibrated = (estimate([run[name] for run in runs]) for name in ("nll", "calibrated_nll"))
    assert (calibrated.mean, calibrated.low) == pytest.approx((plain.mean, plain.low))  # a temperature of 1


def crossed(rng, seeds, *, images=200, of_seed, of_image, of_both, skewed=False):
    """A score of each seed whose true mean is 0, from losses of every seed on the same images."""
    shared = rng.exponential(1, images) - 1 if skewed else rng.normal(0, 1, images)
    own = rng.normal(0, of_seed, (seeds, 1)) + rng.normal(0, of_both, (seeds, images))
    losses = own + of_image * shared
    # A bootstrap's resamples by their first two moments, at a hundredth of its cost.
    root = np.linalg.cholesky(np.atleast_2d(np.cov(losses)) / images + 1e-12 * np.eye(seeds))
    drawn = losses.mean(axis=1, keepdims=True) + root @ rng.normal(0, 1, (seeds, 300))
    return [Scored(row.mean(), around, images) for row, around in zip(losses, drawn, strict=True)]


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize(
    "variance",
    [
        {"of_seed": 0.1, "of_image": 0.1, "of_both": 0.1},  # seeds decide: resampled, 3 of them covered 75 %
        {"of_seed": 0.05, "of_image": 0.5, "of_both": 0.5},
        {"of_seed": 0.0, "of_image": 0.1, "of_both": 0.5},  # as differences between methods
        {"of_seed": 0.02, "of_image": 1.0, "of_both": 0.3, "skewed": True},  # as scores
    ],
)
def test_intervals_of_a_few_seeds_hold_as_often_as_they_say(seeds, variance):
    rng = np.random.default_rng(0)
    found = [estimate(crossed(rng, seeds, **variance)) for _ in range(400)]
    assert sum(one.low <= 0 <= one.high for one in found) / 400 >= 0.925


def test_differences_are_paired():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2, 1000))
    a = [{"nll": Scored(1.0, 1 + row, 50)} for row in common]
    b = [{"nll": Scored(0.9, 0.9 + row, 50)} for row in common]
    found, own = behind([a, b], 1, "nll")
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (own.mean, own.low, own.high) == (0, 0, 0)


def test_what_seeds_do_to_differences_is_estimated_from_all_methods():
    """Two methods: the paired t interval. Four: an analysis of variance with seeds as blocks, and Bonferroni."""
    values = np.array([[1.0, 1.2, 1.1], [1.3, 1.6, 1.2], [1.4, 1.5, 1.6], [1.1, 1.4, 1.2]])
    methods = [[{"nll": Scored(value, np.full(9, value), 50)} for value in row] for row in values]
    found = behind(methods[:2], 0, "nll")[1]
    paired = ttest_rel(values[1], values[0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((paired.low, paired.high))
    design = np.column_stack([np.kron(np.eye(4), np.ones((3, 1))), np.kron(np.ones((4, 1)), np.eye(3))])
    rest = values.ravel() - design @ np.linalg.lstsq(design, values.ravel(), rcond=None)[0]
    pooled = 2 * (rest @ rest) / 6
    for row, one in zip(values, behind(methods, 0, "nll"), strict=True):
        variance = max(pooled, (row - values[0]).var(ddof=1))  # a method of more noise is not taken for the others
        half = t.ppf(1 - 0.025 / 3, 6) * np.sqrt(variance / 3)
        assert (one.mean, one.high - one.mean) == pytest.approx((row.mean() - 1.1, half))
    assert max((row - values[0]).var(ddof=1) for row in values) > pooled


def test_intervals_of_means_end_with_the_scores_range():
    runs = [
        {name: Scored(value, np.full(9, value), 50) for name in ("error", "nll", "shifted_nll", "ood_auroc")}
        for value in (0.01, 0.99)
    ]
    for name, most in (("error", 1), ("ood_auroc", 1), ("nll", 6.7261), ("shifted_nll", 6.7261)):
        found = mean(runs, name)
        assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0, most), rel=1e-4)


@pytest.mark.parametrize("noise", [1, 3])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_of_equal_methods_none_is_called_worse(seeds, noise):
    """Of 11 equal methods, the lowest is low by chance: in half of all studies one seemed worse than it.

    So, too, where the seeds of one differ ``noise`` times as much as those of the others.
    """
    rng, studies, wrong, first = np.random.default_rng(0), 60, 0, 0
    for _ in range(studies):
        of = {
            (1.0, f"m{number}"): [
                {"nll": one}
                for one in crossed(rng, seeds, of_seed=0.05 * (1 if number else noise), of_image=0.0, of_both=0.3)
            ]
            for number in range(11)
        }
        cells = [cell(label, 1, 1, np.mean([one["nll"].value for one in scores])) for (_, label), scores in of.items()]
        found = [worse(one.behind) for one in _behind(cells, of, "nll")]
        wrong += any(found)
        first += found[0]
    assert wrong / studies <= 0.2
    assert first / studies <= 0.1


def test_a_difference_of_rounding_is_none():
    alike = Estimate(mean=3e-8, low=3e-8, high=3e-8)
    assert not worse(alike)
    assert worse(Estimate(mean=3e-5, low=3e-5, high=3e-5))


def test_auroc_of_resamples_is_that_of_the_drawn_images(monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 7)
    rng = np.random.default_rng(1)
    inside, outside = rng.integers(0, 5, 30) / 5, rng.integers(1, 6, 20) / 5  # with ties
    labels = np.repeat([0, 1], [30, 20])
    found = auroc(inside, outside)
    assert found.value == pytest.approx(roc_auc_score(labels, np.concatenate([inside, outside])))
    again = np.random.default_rng(statistics.derive(0, "out of distribution"))
    weights = [statistics._counts(again, 7, size) for size in (30, 20)]
    for row, value in enumerate(found.drawn):
        counts = np.concatenate([weights[0][row], weights[1][row]])
        expected = roc_auc_score(labels, np.concatenate([inside, outside]), sample_weight=counts)
        assert value == pytest.approx(expected)


def test_an_equivalent_beyond_the_reference_is_a_bound():
    def equivalent(members, below_one=False):
        return Equivalent(members=members, low=None, high=None, largest=3, below_one=below_one)

    assert equivalents_said([equivalent(1.5), equivalent(2.5)]) == "2.0"
    assert equivalents_said([equivalent(None), equivalent(None)]) == "> 3"
    assert equivalents_said([equivalent(2.0), equivalent(None)]) == "> 2.5"
    assert equivalents_said([equivalent(1.0, True), equivalent(1.0, True)]) == "< 1"


# --- sentences ------------------------------------------------------------------------------------------------------


def cell(method, budget, members, nll, behind=None, behind_all=None, shifted=None, shift_behind=None):
    def around(mean, width=0.01):
        return None if mean is None else Estimate(mean=mean, low=mean - width, high=mean + width)

    scores = {"error": around(0.1), "nll": around(nll), "ece": around(0.02)}
    return CellReport(
        method=method,
        budget=budget,
        seeds=[0, 1],
        members=members,
        passes=round(1000 * budget),
        forward_passes=0,
        scores=scores | ({} if shifted is None else {"shifted_nll": around(shifted)}),
        behind=around(behind),
        behind_all=around(behind_all),
        shift_behind=around(shift_behind),
        needed=1.0,
        equivalent="1.5",
    )


def report(*cells, seeds=(0, 1)):
    return StudyReport(
        dataset="digits",
        architecture="cnn",
        epochs=4,
        one=1000,
        seeds=list(seeds),
        rules={},
        trained=5000,
        by="nll",
        test_examples=360,
        test_sha256=None,
        shift=None,
        ood=[],
        confidence=0.95,
        resamples=1000,
        cells=list(cells),
        left_out=[],
        published=[],
        device="cpu",
        versions={},
    )


def test_the_answer_names_the_best_and_what_is_not_told_apart():
    found = report(
        cell("one", 1, 1, 0.5, None, 0.2),
        cell("a", 2, 10, 0.30, None, None),
        cell("b", 2, 2, 0.305, 0.005, 0.005),
        cell("c", 2, 5, 0.4, 0.1, 0.1),
    )
    assert answers(found) == [
        "At 1 budget, one: NLL 0.5000 (0.4900 to 0.5100), error 10.00 %, 1 forward pass a prediction; nothing else was "
        "compared at this budget.",
        "At 2 budgets, a: NLL 0.3000 (0.2900 to 0.3100), error 10.00 %, 10 forward passes a prediction; not told apart "
        "from it: b (0.3050).",
    ]
    said = recommendations(found)
    assert said["Cheapest to train"].startswith("b at 2 budgets: NLL 0.3050")
    assert said["Cheapest to serve"].startswith("b at 2 budgets: NLL 0.3050 (0.2950 to 0.3150), 2 forward passes")
    assert said["Cheapest to serve"].endswith(
        "not told apart from the lowest NLL of all, a at 2 budgets (0.3000): 0.0050 (-0.0050 to 0.0150) higher."
    )
    assert said["Best under shift"] == "not measured: name shifted test images with --shift."
    assert "2 seeds say little of the next, so intervals are wide: more seeds tell more apart." in compared(found)


def test_a_confidence_that_a_temperature_mends_does_not_decide():
    cells = [cell("sharp", 1, 1, 0.9, None, None), cell("soft", 1, 4, 0.5, 0.1, 0.1)]
    for one, value in zip(cells, (0.3, 0.4), strict=True):
        one.scores["calibrated_nll"] = Estimate(mean=value, low=value - 0.01, high=value + 0.01)
    found = report(*cells).model_copy(update={"by": "calibrated_nll"})
    assert answers(found)[0].startswith("At 1 budget, sharp: calibrated NLL 0.3000 (0.2900 to 0.3100), error")
    said = recommendations(found)
    assert said["Cheapest to serve"].startswith("sharp at 1 budget: calibrated NLL 0.3000")
    assert said["Cheapest to train"].endswith(
        "it has the lowest calibrated NLL of all, and nothing at smaller budgets comes near enough to be taken instead."
    )
    assert [one.method for one in pareto(cells, "members", "calibrated_nll")] == ["sharp"]
    assert [one.method for one in pareto(cells, "members", "nll")] == ["sharp", "soft"]


def test_under_shift_the_same_score_decides(tmp_path, images):
    """A temperature of the clean validation images, as what is shipped has it, on every corruption."""
    command = [*WHOLE, *images, "--shift", "fog,gaussian_noise", "--out", tmp_path / "out"]
    result = call(*command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "report.json").read_bytes())
    best = min(found["cells"], key=lambda one: one["scores"]["shifted_calibrated_nll"]["mean"])
    assert best["shift_behind"] is None
    assert all(one["shift_behind"] is not None for one in found["cells"] if one is not best)
    assert "shifted cal. NLL" in recommendations(StudyReport.model_validate(found))["Best under shift"]


def test_where_everything_else_is_worse_it_is_said():
    found = report(
        cell("a", 1, 1, 0.3, None, None, 0.9, 0.1),
        cell("b", 1, 4, 0.5, 0.2, 0.2, 0.8, None),
        seeds=(0,),
    )
    assert answers(found)[0].endswith("; everything else is worse, its interval without 0.")
    said = recommendations(found)
    assert said["Cheapest to train"].endswith(
        "it has the lowest NLL of all, and nothing at smaller budgets comes near enough to be taken instead."
    )
    assert said["Best under shift"].startswith("b at 1 budget: shifted NLL 0.8000")
    assert said["Best under shift"].endswith("everything else is worse.")
    assert "One seed says nothing of the next: the intervals hold for these networks only." in compared(found)


def test_a_wide_interval_recommends_nothing():
    """Of two methods at one budget, the worse one was recommended, as its difference from the best was less certain."""
    unsure = cell("unsure", 1, 1, 0.35, None, 0.05)
    unsure.behind_all = Estimate(mean=0.05, low=-0.01, high=0.11)
    found = report(cell("best", 2, 3, 0.3, None, None), cell("near", 1, 1, 0.33, None, 0.03), unsure)
    said = recommendations(found)
    assert said["Cheapest to train"].startswith("best at 2 budgets")
    assert said["Cheapest to serve"].endswith(
        "it has the lowest NLL of all, and nothing of fewer forward passes comes near enough to be taken instead."
    )


def test_methods_at_one_budget_cost_the_same_to_train():
    """A method that spends 98 % of a budget is no cheaper: it was recommended over a better one of fewer members."""
    most = cell("most", 2, 9, 0.30, None, None)
    short = cell("short", 2, 4, 0.38, 0.08, 0.0).model_copy(update={"passes": 1965})
    found = report(most, cell("whole", 2, 1, 0.31, 0.01, 0.0), short)
    for to in ("train", "serve"):
        assert recommendations(found)[f"Cheapest to {to}"].startswith("whole at 2 budgets: NLL 0.3100")


def test_of_many_methods_under_shift_the_best_are_named():
    cells = [cell(f"m{n}", 1, 1, 0.3, n * 0.001 or None, n * 0.001 or None, 0.9 - n / 100, 0.001) for n in range(9)]
    cells[8].shift_behind = None
    said = recommendations(report(*cells))["Best under shift"]
    assert said.startswith("m8 at 1 budget: shifted NLL 0.8200")
    assert said.endswith(
        "not told apart from it: m7 at 1 budget (0.8300), m6 at 1 budget (0.8400), m5 at 1 budget (0.8500), m4 at 1 "
        "budget (0.8600), m3 at 1 budget (0.8700), 3 more."
    )


def test_a_terminal_of_80_columns_shows_every_score():
    found = report(
        cell("a-method-of-a-long-name", 1, 10, 0.3, None, None, 0.9, None), cell("b", 1, 4, 0.5, 0.2, 0.2, 0.8)
    )
    shown = io.StringIO()
    Console(file=shown, width=80).print(terminal(found))
    text = shown.getvalue()
    assert all(part in text for part in ("DEE", "1.5", "0.3000", "0.9000", "0.8000", "2.00", "b*"))
    markdown = files(found)["report.md"].decode()
    assert "0.9000 (0.8900 to 0.9100)" in markdown


def test_the_pareto_front_is_what_nothing_beats():
    cells = [cell("a", 1, 1, 0.5), cell("b", 1, 3, 0.4), cell("c", 2, 2, 0.45), cell("d", 3, 9, 0.3)]
    assert [one.method for one in pareto(cells, "passes", "nll")] == ["b", "d"]
    assert [one.method for one in pareto(cells, "members", "nll")] == ["a", "c", "b", "d"]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bugdet = 4", "there is no option 'bugdet': did you mean budget or budgets?"),
        ("budget = true", "budget must be a number, not True"),
        ("budget = 0", "budget must be positive, not 0"),
        ('seeds = "3"', "seeds must be a whole number, not '3'"),
        ("budgets = [1, 1]", "budgets are each given once, not as in '1,1'"),
        ('budgets = [1, "two"]', "budgets must be positive numbers such as 1,2,3, not '1,two'"),
        ("budgets = []", "budgets must be positive numbers"),
        ("epochs = 4", "epochs is not an option of a study: the plan decides it"),
        ("lr = nan", "lr must be finite"),
        ("batch-size = 4\nbatch_size = 4", "batch_size is given twice"),
        ("[method.fge]\ncycle = 2", "there is no table [method]: there are [methods.NAME] and [[published]]"),
        ("published = 3", "published must be a list of tables: write [[published]]"),
        ("methods = 3", "methods must be text, not 3"),
        (
            'methods = ["fgee"]',
            "methods.fgee: there is no method 'fgee': there are complex, csgmcmc, curve-bezier, single",
        ),
        ("[methods.fge]\ncycles = 2", "methods.fge: there is no option 'cycles': did you mean cycle"),
        ("[methods.fge]\ncycle = -2", "methods.fge: cycle must be positive, not -2"),
        ("[methods.fge]\nseed = 2", "methods.fge: seed is not an option of a study: the plan decides it"),
        ('[methods.fge]\nlr = "high"', "methods.fge: lr must be a number, not 'high'"),
        ("[methods.fge]\nmembers = 7", "methods.fge: members is not an option of a study: the plan decides it"),
        ('[methods.curve-bezier]\ncurve = "chain"', "these options make it curve-chain: give the table another name"),
        ("methods = []", "a method's name has letters, digits, - and _, 40 at most, not ''"),
        (
            "[[published]]\nsource='a'\ndataset='b'\narch='c'\nscore='nll'\n[published.values]\nfgee = {1 = 2.0}",
            "published 1: no method is called 'fgee': there are complex",
        ),
        ("[methods]\nfge = 2", "methods.fge must hold options, not 2: write [methods.fge]"),
        ("[methods.mine]\ncycle = 2", "methods.mine: there is no method 'mine'"),
        ("[methods.curve-bezier]\nfirst = 'runs/a'", "methods.curve-bezier: first is not an option of a study"),
        (
            '[methods."../fge"]\nmethod = "fge"',
            "a method's name has letters, digits, - and _, 40 at most, not '../fge'",
        ),
        ('methods = ["fge", "fge"]', "methods are each named once"),
        ("[published]\nscore = 'nll'", "published must be a list of tables: write [[published]]"),
        ("[[published]]\nscore = 'nll'", "published 1: source is required"),
        (
            "[[published]]\nsource='a'\ndataset='b'\narch='c'\nscore='accuracy'\n[published.values]\n",
            "published 1: score must be error or nll or calibrated_nll or ece, not 'accuracy'",
        ),
        *(
            (
                f"[[published]]\nsource='a'\ndataset='b'\narch='c'\nscore='nll'\n[published.values]\nfge = {values}",
                f"published 1: values {said}",
            )
            for values, said in (
                ("3", "must be a table of numbers, not 3"),
                ("{a = 3}", "must be a table of numbers, not 'a'"),
                ("{-1 = 3}", "of fge must be at budgets, each given once, not {'-1': 3}"),
                ('{1 = 3, "1.0" = 4}', "of fge must be at budgets, each given once, not {'1': 3, '1.0': 4}"),
            )
        ),
        ("out = 'x'", "out says how a study is run, not what it is: type --out"),
        ("BUDGET = 3", "there is no option 'BUDGET': did you mean budget"),
        ("recipe = 'paper'", "no recipe was published for cnn on digits: give the options instead of recipe"),
        ("budget = ", "is not TOML"),
    ],
)
def test_a_file_is_refused_in_one_sentence(tmp_path, text, said):
    file = tmp_path / "study.toml"
    file.write_text(text)
    result = call("study", file, "--out", tmp_path / "out")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert str(file) in lines[0]
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path):
    common = ("study", "--budget", 1, "--budgets", 1, "--methods", "single", "--out", tmp_path / "out")
    for wrong, said in (
        (("--ood", "nothing"), "nothing"),
        (("--shift", "nothing"), "nothing"),
        (("--examples", 1000), "the test set has 360 images: give at most as many examples, not 1,000"),
        (("--examples", 1), "one test image gives no interval: a study takes two at least"),
    ):
        result = call(*common, *wrong)
        assert result.exit_code == 1
        assert said in result.stderr
        assert not (tmp_path / "out").exists()


def test_the_command_line_takes_precedence_over_the_file():
    content = {"budget": 4, "budgets": [1, 2], "lr": 0.05, "methods": {"fge": {"cycle": 1}, "single": {}}}
    study = study_of(content, {"budgets": "1", "methods": "fge", "seeds": 5})
    assert (study.grid.multiples, study.grid.seeds, study.settings.lr, study.settings.epochs) == ([1], 5, 0.05, 4)
    assert [(entry.label, entry.method.cycle) for entry in study.entries] == [("fge", 1)]


def test_one_of_a_list_may_be_written_alone():
    study = study_of({"shift": "fog", "ood": "noise:uniform", "methods": "fge, single"}, {})
    assert (study.grid.shift, study.grid.ood) == (["fog"], ["noise:uniform"])
    assert [entry.label for entry in study.entries] == ["fge", "single"]


def test_a_recipe_gives_each_method_what_was_published():
    study = study_of({"recipe": "paper", "arch": "vgg16", "dataset": "cifar100", "methods": {"fge": {}}}, {})
    assert (study.settings.epochs, study.settings.lr, study.settings.schedule) == (200, 0.05, "piecewise")
    assert (study.entries[0].method.cycle, study.entries[0].method.low, study.entries[0].settings) == (2, 5e-4, {})


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.toml")), ids=lambda path: path.stem)
def test_the_studies_that_are_shipped_can_be_read(path):
    from ensembler.study.file import read

    study = study_of(read(path), {}, str(path))
    assert study.entries
    assert study.grid.multiples
    if "published" in path.read_text():
        labels = {entry.label for entry in study.entries}
        assert study.published
        assert all(set(one.values) <= labels for one in study.published)


def test_the_board_fills_as_runs_are_there(tmp_path):
    _, found = planned(methods={"single": {}, "deep-ensemble": {}}, budgets=[1, 2], seeds=2)
    board = Board(found)
    base = next(cell for cell in found.cells if (cell.label, cell.budget, cell.seed) == ("single", 1, 0))
    places, _ = made(plan_of_one(found, base), tmp_path)
    run = Run.load(places[base.name])
    board.live = Live(console=Console(file=io.StringIO()))
    board.on_run(base.name, run, "trained")
    shown = io.StringIO()
    Console(file=shown, width=80).print(board.table())
    nll = run.manifest.metrics["test"]["nll"] + 0.0  # 0 has no sign there
    assert f"{nll:.3f} 1/2" in shown.getvalue()
    assert "0/2" in shown.getvalue()
    assert "–" in shown.getvalue()  # one network is no deep ensemble


def plan_of_one(found, cell):
    return dataclasses.replace(found, cells=[cell])


# --- the whole way --------------------------------------------------------------------------------------------------

WHOLE = ["study", "--arch", "tests._small:noisy", "--batch-size", "4", "--budget", "2", "--budgets", "1,2"]
WHOLE += ["--seeds", "1", "--methods", "single,deep-ensemble,fge", "--ood", "noise:uniform", "--examples", "18"]
WHOLE += ["--device", "cpu", "--threads", "1", "--checkpoint-every", "0.05", "--runs", "nowhere"]
REPORT = ("report.html", "report.md", "report.json", "pareto-training.png", "pareto-serving.png")


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in REPORT]


KILLED = """
import os, sys
from pathlib import Path
left = int(sys.argv.pop(1))
def hook(event, found):
    global left
    if event == "os.rename" and Path(found[1]).match("runs/[!.]*-s*-*") and Path(found[1]).suffix != ".unfinished":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
from ensembler.cli import main
main()
"""


def killed(folder: Path, *command, runs: int) -> None:
    """Start a study that is killed after so many of its runs are there, when the next one is trained but not saved."""
    started = [sys.executable, "-c", KILLED, str(runs), *map(str, command), "--out", str(folder)]
    assert subprocess.run(started, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len(list(folder.glob("runs/[!.]*-s*-*/manifest.json"))) == runs


def finished(folder: Path, *command) -> list[str]:
    """Run a study to its end, and return the runs that were trained for it."""
    result = call(*command, "--out", folder)
    assert result.exit_code == 0, result.output
    return trained(result)


def trained(result) -> list[str]:
    return [line.split(": ")[1].split()[0] for line in result.stderr.splitlines() if " trained," in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished study, its command, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    command = [*WHOLE, *make_images(folder / "images")]
    result = call(*command, "--out", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out", command, result


def test_a_terminal_says_what_is_left_out_and_why(whole):
    folder, _, result = whole
    assert "left out: deep-ensemble at 1: a budget below 2 holds one network only" in result.stdout
    assert "| deep-ensemble | 1 | a budget below 2" in (folder / "report.md").read_text()


def test_a_run_of_another_name_is_taken_too(whole, tmp_path):
    """Its name is of what was typed, its fingerprint of what was trained: --methods may say the same in other words."""
    folder, command, result = whole
    out = Path(shutil.copytree(folder, tmp_path / "out"))
    first = out / "runs" / trained(result)[0]
    first.rename(first.with_name("another-s0-name"))
    assert finished(out, *command) == []


def test_killed_and_resumed_it_says_the_same_and_a_seed_more_trains_its_own_runs_only(whole, tmp_path):
    folder, command, result = whole
    every = trained(result)
    killed(tmp_path / "killed", *command, runs=1)
    assert set(finished(tmp_path / "killed", *command)) < set(every)
    assert contents(tmp_path / "killed") == contents(folder)
    found = json.loads((folder / "report.json").read_bytes())
    assert {cell["method"] for cell in found["cells"]} == {"single", "deep-ensemble", "fge"}
    assert set(found["cells"][0]["scores"]) == {"error", "nll", "ece", "calibrated_nll", "ood_auroc"}
    assert found["by"] == "calibrated_nll"
    for budget in (1, 2):
        judged = [one["scores"]["calibrated_nll"]["mean"] for one in found["cells"] if one["budget"] == budget]
        assert judged == sorted(judged)
    names = {cell["method"]: cell["scores"]["nll"]["mean"] for cell in found["cells"] if cell["budget"] == 2}
    folders = {path.name.split("-b2")[0]: path for path in (folder / "runs").glob("*-b2-s0-*")}
    measured = {name: Run.load(path).manifest.metrics["test"]["nll"] for name, path in folders.items()}
    assert measured.keys() == {"deep-ensemble", "fge"}
    assert all(names[name] == pytest.approx(nll, rel=1e-5) for name, nll in measured.items())
    more = finished(tmp_path / "killed", *command, "--seeds", 2)
    assert len(more) == len(every)
    assert {name.split("-s")[1].split("-")[0] for name in more} == {"1", "1001"}


@pytest.mark.long
def test_digits_killed_three_times(tmp_path):
    command = ("study", "--dataset", "digits", "--budget", 4, "--budgets", "1,2", "--seeds", 2, "--device", "cpu")
    command += ("--threads", 1, "--checkpoint-every", 0.5, "--runs", "nowhere")
    every = finished(tmp_path / "whole", *command)
    for runs in (1, 7, 15):
        killed(tmp_path / "killed", *command, runs=runs)
    assert set(finished(tmp_path / "killed", *command)) < set(every)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    more = finished(tmp_path / "killed", *command[:8], 3, *command[9:])
    assert {name.split("-s")[1].split("-")[0] for name in more} == {"2", "1002"}


def test_a_dry_run_trains_nothing(tmp_path, images):
    result = call(*WHOLE, *images, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "left out: deep-ensemble at 1: a budget below 2 holds one network only" in result.stdout
    assert "runs, seed 0:" in result.stdout
    assert re.search(r"about \d+ minutes?, one run at a time, on cpu", result.stdout.replace("\n", " "))
    assert not (tmp_path / "out").exists()
