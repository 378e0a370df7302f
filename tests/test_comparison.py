"""Comparisons against loops written out by hand, simulations with a known truth, and curves known in closed form."""

from __future__ import annotations

import io
import json
import math
from itertools import combinations, permutations, product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import norm as normal
from scipy.stats import t as student

from ensembler.calibration_maps import FLOOR
from ensembler.errors import ShapeError, UsageError
from ensembler.eval import comparison as grouping
from ensembler.eval.comparison import group_key
from ensembler.eval.metrics import comparison
from ensembler.eval.metrics import members as of_members
from ensembler.eval.metrics.classification import brier, ece, nll, scores
from ensembler.eval.metrics.comparison import Difference, Losses, best, differences, resample, spread
from ensembler.eval.metrics.members import (
    CurvePoint,
    MemberScores,
    curve,
    deep_ensemble_equivalent,
    recommended_members,
    score_subsets,
)
from ensembler.eval.shift.corruptions import FAMILIES, HEADLINE, SEVERITIES, VALIDATION
from ensembler.ordering import greedy_order
from ensembler.run import Cost, DatasetRecord, Manifest

NAMES = ("error", "nll", "brier", "ece")


def predictions(count: int, classes: int, seed: int, sharpness: float = 1.0, members: int | None = None):
    rng = np.random.default_rng(seed)
    shape = (count,) if members is None else (members, count)
    return rng.dirichlet(np.full(classes, sharpness), shape)


def informed(count: int, classes: int, seed: int, noise: float, members: int | None = None):
    """Probabilities that know something of the labels, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    shape = (count, classes) if members is None else (members, count, classes)
    logits = 2.0 * np.eye(classes)[labels] + noise * rng.normal(size=shape)
    exponents = np.exp(logits)
    return exponents / exponents.sum(axis=-1, keepdims=True), labels


@st.composite
def odd_pairs(draw: st.DrawFn):
    """Two predictions for the same few examples, with the corners: one class, one example, ties, exactly 0 and 1."""
    classes, count = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    weights = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 1e-300])
    row = st.lists(weights, min_size=classes, max_size=classes).filter(lambda row: sum(row) > 1e-6)
    pair = [np.array(draw(st.lists(row, min_size=count, max_size=count))) for _ in range(2)]
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return *(p / p.sum(axis=1, keepdims=True) for p in pair), np.array(labels)


# --- the bootstrap --------------------------------------------------------------------------------------------------


def paired_bootstrap(a, b, labels, confidence: float = 0.95, **options) -> dict[str, Difference]:
    return compare_losses(Losses.of(a, labels), Losses.of(b, labels), confidence, **options)


def compare_losses(a: Losses, b: Losses, confidence: float = 0.95, **options) -> dict[str, Difference]:
    return differences(resample(a, **options), resample(b, **options), confidence)


def slow_draws(probs, labels, resamples: int, seed: int):
    """Every resample written out: the examples are repeated, and scored as a test set of their own."""
    weights = np.concatenate(list(comparison._resamples(len(labels), resamples, seed)))
    rows = []
    for counts in weights.astype(int):
        assert counts.sum() == len(labels)
        chosen = np.repeat(np.arange(len(labels)), counts)
        found = scores(probs[chosen], labels[chosen])
        rows.append([found[name] for name in NAMES])
    return np.array(rows)


def interval(drawn, examples: int, confidence: float) -> tuple[float, float]:
    """Expanded percentiles, which hold 0 where one sign of all examples is no surprise."""
    if examples == 1:
        return min(drawn.min(), 0.0), max(drawn.max(), 0.0)
    wide = student.ppf((1 + confidence) / 2, examples - 1) / math.sqrt(1 - 1 / examples)
    low, high = np.quantile(drawn, [normal.cdf(-wide), normal.cdf(wide)])
    signs = list(product([0, 1], repeat=min(examples, 10)))
    surprise = np.mean([all(each) or not any(each) for each in signs])
    return (min(low, 0.0), max(high, 0.0)) if surprise > 1 - confidence else (low, high)


def check_against_resampling(a, b, labels, resamples: int) -> None:
    slow = slow_draws(a, labels, resamples, 3) - slow_draws(b, labels, resamples, 3)
    slow[:, 3] += ece(a, labels) - ece(b, labels) - slow[:, 3].mean()
    found = paired_bootstrap(a, b, labels, resamples=resamples, seed=3, confidence=0.8)
    assert tuple(found) == NAMES
    for column, name in enumerate(NAMES):
        one = found[name]
        low, high = interval(slow[:, column], len(labels), 0.8)
        assert one.low == pytest.approx(low, abs=1e-11)
        assert one.high == pytest.approx(high, abs=1e-11)
        assert one.difference == pytest.approx(scores(a, labels)[name] - scores(b, labels)[name], abs=1e-12)
        wins = [1 if value < -1e-12 else 0.5 if abs(value) <= 1e-12 else 0 for value in slow[:, column]]
        assert one.probability_better == pytest.approx(np.mean(wins))


@pytest.mark.parametrize(("count", "classes"), [(40, 3), (7, 10), (1, 2)])
def test_the_bootstrap_equals_scoring_every_resample(count: int, classes: int) -> None:
    labels = np.random.default_rng(0).integers(0, classes, count)
    check_against_resampling(predictions(count, classes, 1), predictions(count, classes, 2), labels, 25)


@given(odd_pairs())
@settings(max_examples=15, deadline=None)
def test_the_bootstrap_of_odd_predictions(pair) -> None:
    a, b, labels = pair
    found = paired_bootstrap(a, b, labels, resamples=20)
    for one in found.values():
        assert math.isfinite(one.difference)
        assert one.low <= one.high
        assert 0 <= one.probability_better <= 1
    turned = paired_bootstrap(b, a, labels, resamples=20)
    for name in NAMES:
        assert turned[name].difference == -found[name].difference
        assert turned[name].low == pytest.approx(-found[name].high, abs=1e-12)
        assert turned[name].probability_better == pytest.approx(1 - found[name].probability_better)
    check_against_resampling(a, b, labels, 4)


def test_chunks_change_nothing(monkeypatch) -> None:
    a, b, labels = predictions(30, 4, 0), predictions(30, 4, 1), np.arange(30) % 4
    whole = paired_bootstrap(a, b, labels, resamples=50)
    monkeypatch.setattr(comparison, "_DRAWS", 100)
    parts = paired_bootstrap(a, b, labels, resamples=50)
    for name in NAMES:
        assert parts[name].model_dump() == pytest.approx(whole[name].model_dump(), abs=1e-14)


def test_weights_are_multinomial() -> None:
    weights = np.concatenate(list(comparison._resamples(50, 20_000, 0)))
    assert (weights.sum(axis=1) == 50).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.04)
    covariance = np.cov(weights[:, :2].T)
    assert covariance == pytest.approx(np.array([[0.98, -0.02], [-0.02, 0.98]]), abs=0.04)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """1,000 test sets of a population: the mean difference is known from a million examples."""

    def sample(count: int, seed: int):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(0.2, 1.0, count)
        labels = (rng.random(count) > truth).astype(int)
        one = np.clip(truth + rng.normal(0, 0.1, count), 0.05, 0.95)
        other = np.clip(truth + rng.normal(0, 0.2, count), 0.05, 0.95)
        return *(np.stack([p, 1 - p], axis=1) for p in (one, other)), labels

    a, b, labels = sample(1_000_000, 0)
    true = {"nll": nll(a, labels) - nll(b, labels), "brier": brier(a, labels) - brier(b, labels)}
    inside = dict.fromkeys(true, 0)
    for trial in range(1000):
        found = paired_bootstrap(*sample(150, 1 + trial), resamples=200, seed=trial, confidence=0.9)
        for name, value in true.items():
            inside[name] += found[name].low <= value <= found[name].high
    for name, hits in inside.items():
        assert 0.86 <= hits / 1000 <= 0.93, name


@pytest.mark.parametrize("count", [6, 10])
def test_the_interval_covers_the_difference_of_few_images(count: int) -> None:
    """Plain percentiles of 6 images cover the true difference in 86 % of test sets, and of 10 in 89 %."""
    rng, inside = np.random.default_rng(0), 0
    for trial in range(400):
        losses = rng.normal(0, 1, (2, count))
        pair = [np.exp(-np.stack([each + 9, 9 - each], axis=1)) for each in losses]
        a, b = (each / each.sum(axis=1, keepdims=True) for each in pair)
        found = paired_bootstrap(a, b, np.zeros(count, int), resamples=300, seed=trial)["nll"]
        inside += found.low <= 0 <= found.high
    assert 0.91 <= inside / 400 <= 0.99


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_handful_of_images_tells_nothing_apart(count: int) -> None:
    """Whatever one image says, every resample of it says: it made one run the best alone."""
    labels = np.zeros(count, int)
    runs = [resample(Losses.of(np.tile([p, 1 - p], (count, 1)), labels), 50) for p in (0.9, 0.6, 0.2)]
    for name, found in best(runs).items():
        assert sorted(found) == [0, 1, 2], name
    assert best([resample(Losses.of(np.tile([p, 1 - p], (6, 1)), np.zeros(6, int))) for p in (0.9, 0.6)])["nll"] == [0]


def test_the_best_are_those_whose_interval_from_the_lowest_holds_0() -> None:
    labels = np.random.default_rng(0).integers(0, 3, 300)
    sure = np.full((300, 3), 0.1) + 0.7 * np.eye(3)[labels]
    other = sure.copy()
    other[:3] = np.roll(sure[:3], 1, axis=1)  # three more mistakes of 300
    bad = np.full((300, 3), 1 / 3)
    bad[:, 0] += 1e-3
    bad /= bad.sum(axis=1, keepdims=True)
    drawn = [resample(Losses.of(probs, labels), 200) for probs in (bad, other, sure, sure)]
    assert best(drawn)["error"] == [2, 3] or best(drawn)["error"] == [2, 1, 3]
    assert best(drawn)["nll"][0] == 2
    assert 3 in best(drawn)["nll"]
    assert all(0 not in found for name, found in best(drawn).items() if name != "ece")
    assert best(drawn[:1]) == {name: [0] for name in ("error", "nll", "brier", "ece")}


def test_the_best_of_many_runs_is_seldom_called_worse() -> None:
    """Of 11 equal runs the lowest is low by chance: one at a time, intervals tell each apart from it more than 5 %."""
    rng = np.random.default_rng(0)
    labels, together, alone, trials = np.zeros(60, int), 0, 0, 30
    for _ in range(trials):
        p = rng.uniform(0.3, 0.9, (11, 60))
        drawn = [resample(Losses.of(np.stack([each, 1 - each], axis=1), labels), 500) for each in p]
        lowest, *tied = best(drawn)["nll"]
        together += 10 - len(tied)
        others = [differences(run, drawn[lowest])["nll"].low for place, run in enumerate(drawn) if place != lowest]
        alone += sum(low > 0 for low in others)
    assert together / trials / 11 < 0.05
    assert alone / trials / 11 > 0.1


def test_the_interval_of_ece_covers_what_another_test_set_would_measure() -> None:
    """A calibrated run against one that is too sure of itself: what is measured is known from 200 test sets."""

    def sample(seed: int):
        rng = np.random.default_rng(seed)
        logits = 2.5 * rng.normal(size=(500, 4))
        one, other = (np.exp(scale * logits) for scale in (1.0, 1.3))
        one, other = one / one.sum(axis=1, keepdims=True), other / other.sum(axis=1, keepdims=True)
        return one, other, (one.cumsum(axis=1) < rng.random((500, 1))).sum(axis=1).clip(0, 3)

    found = [paired_bootstrap(*sample(trial), resamples=200, seed=trial)["ece"] for trial in range(200)]
    assert all(one.low < one.difference < one.high for one in found)
    measured = np.mean([one.difference for one in found])
    assert 0.9 <= np.mean([one.low <= measured <= one.high for one in found]) <= 0.99


def test_what_rounding_makes_is_no_difference() -> None:
    """The same members, saved in another precision: lower in every resample, and by nothing that can be printed."""
    members = np.random.default_rng(0).dirichlet(np.ones(5), (3, 200))
    labels = np.random.default_rng(1).integers(0, 5, 200)
    other = members ** (1 + 1e-7)
    runs = [resample(Losses.of(each.mean(axis=0), labels)) for each in (members, other / other.sum(axis=2)[..., None])]
    found = differences(runs[1], runs[0])["nll"]
    assert found.difference != 0.0
    assert (found.low, found.high, found.probability_better) == (0.0, 0.0, 0.5)
    assert sorted(best(runs)["nll"]) == [0, 1]


def test_pairing_narrows_the_interval() -> None:
    a, labels = informed(400, 3, 0, noise=1.0)
    b = 0.9 * a + 0.1 / 3
    drawn, other = resample(Losses.of(a, labels), 500), resample(Losses.of(b, labels), 500, seed=1)
    paired = paired_bootstrap(a, b, labels, resamples=500)["nll"]
    assert paired.high - paired.low < 0.4 * np.ptp(np.quantile(drawn.drawn[:, 1] - other.drawn[:, 1], [0.025, 0.975]))


def test_a_run_is_no_better_than_itself() -> None:
    a, labels = informed(50, 3, 0, noise=1.0)
    for one in paired_bootstrap(a, a, labels, resamples=20).values():
        assert one.model_dump() == {"difference": 0, "low": 0, "high": 0, "probability_better": 0.5}


def test_under_shift_an_example_is_drawn_with_all_its_cells() -> None:
    labels = np.arange(25) % 3
    cells = [[predictions(25, 3, 10 * run + cell) for cell in range(4)] for run in range(2)]
    one, other = (Losses.over_cells([Losses.of(cell, labels) for cell in run]) for run in cells)
    assert one.scores() == pytest.approx(
        {name: np.mean([scores(cell, labels)[name] for cell in cells[0]]) for name in NAMES}, abs=1e-12
    )
    slow = np.mean([slow_draws(cell, labels, 15, 2) for cell in cells[0]], axis=0)
    slow -= np.mean([slow_draws(cell, labels, 15, 2) for cell in cells[1]], axis=0)
    measured = [np.mean([ece(cell, labels) for cell in run]) for run in cells]
    slow[:, 3] += measured[0] - measured[1] - slow[:, 3].mean()
    found = compare_losses(one, other, resamples=15, seed=2)
    for column, name in enumerate(NAMES):
        low, high = interval(slow[:, column], 25, 0.95)
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=1e-11)


@given(odd_pairs())
@settings(max_examples=50, deadline=None)
def test_losses_add_up_to_the_scores(pair) -> None:
    a, _, labels = pair
    expected = scores(a, labels)
    assert Losses.of(a, labels).scores() == pytest.approx({name: expected[name] for name in NAMES}, abs=1e-12)


def test_bad_comparisons_are_refused() -> None:
    a, labels = informed(10, 3, 0, noise=1.0)
    losses = Losses.of(a, labels)
    with pytest.raises(ShapeError, match="labels must be 10 integers"):
        paired_bootstrap(a, a, labels[:5])
    with pytest.raises(ShapeError, match="score both on the same images"):
        compare_losses(losses, Losses.of(a[:5], labels[:5]), resamples=5)
    with pytest.raises(ShapeError, match="must have the same"):
        differences(resample(losses, 5, seed=0), resample(losses, 5, seed=1))
    with pytest.raises(UsageError, match="at least 1 resample, not 0"):
        paired_bootstrap(a, a, labels, resamples=0)
    with pytest.raises(UsageError, match="confidence must lie between 0 and 1, not 95"):
        paired_bootstrap(a, a, labels, resamples=2, confidence=95)
    with pytest.raises(ShapeError, match=r"found cells of \[5, 10\] examples"):
        Losses.over_cells([losses, Losses.of(a[:5], labels[:5])])
    with pytest.raises(ShapeError, match="found cells of no examples"):
        Losses.over_cells([])


# --- groups ---------------------------------------------------------------------------------------------------------


def manifest(**changes) -> Manifest:
    options = {"members": 4} | changes.pop("options", {})
    settings = {"epochs": 10.0, "seed": 0, "device": "cpu", "init": None} | changes.pop("settings", {})
    record = DatasetRecord(
        name="folder:/here/a",
        title="made by hand",
        classes=["a", "b"],
        shape=[8, 8, 3],
        mean=[0.5] * 3,
        std=[0.2] * 3,
        augmentation="none",
        train_examples=100,
        train_sha256=changes.pop("train_sha256", "0" * 64),
        test_sha256="1" * 64,
    )
    cost = Cost(
        entries={},
        example_passes=changes.pop("example_passes", 1000),
        forward_passes=0,
        seconds=1.0,
        peak_memory=None,
        device="cpu",
    )
    facts = {
        "method": "fge",
        "architecture": "cnn",
        "seed": 0,
        "vertices": 4,
        "members": 4,
        "parameters": 10,
        "sampling": None,
        "metrics": {},
        "created": "2026-01-01T00:00:00+00:00",
        "versions": {},
    }
    return Manifest(**(facts | changes), dataset=record, cost=cost, options=options, settings=settings)


@pytest.mark.parametrize(
    "same",
    [
        {"seed": 1, "settings": {"seed": 1}},
        {"created": "2026-02-02T00:00:00+00:00", "versions": {"torch": "9"}, "metrics": {"test": {"nll": 1.0}}},
        {"settings": {"device": "cuda", "workers": 4, "compile": True}},
        {"settings": {"threads": 1}},
        {"options": {"second": None}},
    ],
)
def test_runs_that_differ_in_their_seed_are_one_group(same) -> None:
    assert group_key(manifest(**same)) == group_key(manifest())


@pytest.mark.parametrize(
    "other",
    [
        {"method": "snapshot"},
        {"architecture": "resnet20"},
        {"members": 5},
        {"train_sha256": "2" * 64},
        {"example_passes": 2000},
        {"settings": {"epochs": 20.0}},
        {"settings": {"init": "runs/single"}},
        {"options": {"members": 5}},
        {"settings": {"weights": "DEFAULT"}},
    ],
)
def test_runs_that_differ_otherwise_are_not(other) -> None:
    assert group_key(manifest(**other)) != group_key(manifest())


def test_runs_from_different_solutions_are_one_group() -> None:
    keys = {
        group_key(manifest(seed=n, settings={"seed": n, "init": f"runs/{n}"}, options={"first": f"runs/{n}"}))
        for n in range(3)
    }
    assert len(keys) == 1
    (key,) = keys
    assert "runs/" not in key
    assert json.loads(key)["starts"] == {"first": 1, "init": 1}
    assert len({group_key(manifest(options={"modes": ["a", "b"][:n]})) for n in (1, 2)}) == 2


def test_every_option_that_does_not_identify_a_method_is_left_out() -> None:
    """Those that name a path, and those that say how something is computed: the training commands mark them."""
    from ensembler.trainers import Settings
    from ensembler.trainers.method import methods

    records = (Settings, *methods())
    assert set().union(*(record.marked("path") for record in records)) == grouping._STARTS
    assert set().union(*(record.marked("computing") for record in records)) | {"seed"} == grouping._HOW


def test_groups_hold_the_mean_and_the_spread() -> None:
    names = ("error", "nll", "calibrated_nll", "brier", "ece")
    losses, seeds, methods = (1.0, 5.0, 2.0, 4.5), (0, 0, 1, 2), ("fge", "snapshot", "fge", "fge")
    scored = [
        SimpleNamespace(clean=SimpleNamespace(**dict.fromkeys(names, loss)), shifted=None, seed=seed)
        for loss, seed in zip(losses, seeds, strict=True)
    ]
    runs = [
        SimpleNamespace(manifest=manifest(seed=seed, method=method), views=0)
        for seed, method in zip(seeds, methods, strict=True)
    ]
    found = grouping._groups(SimpleNamespace(runs=scored), runs)
    assert [one.runs for one in found] == [[0, 2, 3], [1]]
    assert found[0].seeds == [0, 1, 2]
    mean = (1 + 2 + 4.5) / 3
    assert set(found[0].scores) == set(names)
    assert found[0].scores["nll"].model_dump() == pytest.approx(
        {
            "mean": mean,
            "low": 1.0,
            "high": 4.5,
            "deviation": math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + (4.5 - mean) ** 2) / 2),
            "n": 3,
        }
    )
    assert found[1].scores["nll"].model_dump() == {"mean": 5.0, "low": 5.0, "high": 5.0, "deviation": None, "n": 1}
    with pytest.raises(UsageError, match="at least one"):
        spread([])


# --- members --------------------------------------------------------------------------------------------------------


def slow_temperature(probs, labels) -> float:
    """The best of a fine grid, twice refined."""
    low, high = math.log(0.01), math.log(100)
    for _ in range(3):
        grid = np.linspace(low, high, 200)
        losses = [nll(slow_temper(probs, math.exp(t)), labels) for t in grid]
        best = grid[int(np.argmin(losses))]
        low, high = best - (grid[1] - grid[0]), best + (grid[1] - grid[0])
    return math.exp(best)


def slow_temper(probs, temperature: float):
    logits = np.log(np.maximum(probs, FLOOR)) / temperature
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def test_subsets_are_scored_as_their_mean_prediction(monkeypatch) -> None:
    members, labels = informed(60, 4, 0, noise=1.5, members=5)
    validation, held_out = informed(50, 4, 1, noise=1.5, members=5)
    subsets = [(0,), (1, 3), (0, 1, 2, 3, 4)]
    monkeypatch.setattr(of_members, "_ELEMENTS", 700)  # several chunks of rows
    found = score_subsets(members.astype(np.float32), labels, validation, held_out, subsets)
    for subset, one in zip(subsets, found, strict=True):
        mean = np.mean([members[m].astype(np.float32) for m in subset], axis=0, dtype=np.float64)
        expected = scores(mean, labels)
        assert {name: getattr(one, name) for name in NAMES} == pytest.approx({name: expected[name] for name in NAMES})
        temperature = slow_temperature(np.mean([validation[m] for m in subset], axis=0), held_out)
        assert one.calibrated_nll == pytest.approx(nll(slow_temper(mean, temperature), labels), abs=1e-6)


def test_a_curve_takes_every_subset_where_they_are_few() -> None:
    members, labels = informed(40, 3, 0, noise=1.5, members=4)
    found = curve(members, labels, members, labels, order=[2, 0, 1, 3], subsets=6)
    assert [point.members for point in found] == [1, 2, 3, 4]
    for point in found:
        expected = [
            nll(np.mean([members[m] for m in subset], axis=0), labels)
            for subset in combinations(range(4), point.members)
        ]
        assert point.nll.n == math.comb(4, point.members)
        assert point.nll.mean == pytest.approx(np.mean(expected))
        assert (point.nll.low, point.nll.high) == pytest.approx((min(expected), max(expected)))
        chosen = [2, 0, 1, 3][: point.members]
        assert point.ordered.brier == pytest.approx(brier(members[chosen].mean(axis=0), labels))
        assert point.ordered.ece == pytest.approx(ece(members[chosen].mean(axis=0), labels))
    assert found[-1].nll.deviation is None


def test_a_long_curve_takes_some_sizes_and_some_subsets() -> None:
    members, labels = informed(20, 2, 0, noise=1.0, members=30)
    found = curve(members, labels, members, labels, subsets=3)
    sizes = [point.members for point in found]
    assert sizes[0] == 1
    assert sizes[-1] == 30
    assert 9 <= len(sizes) <= 12
    assert sizes == sorted(set(sizes))
    assert [point.error.n for point in found] == [3] * (len(sizes) - 1) + [1]
    assert all(point.ordered is None for point in found)
    assert found == curve(members, labels, members, labels, subsets=3)
    assert found != curve(members, labels, members, labels, subsets=3, seed=1)


def test_one_member_has_a_curve_of_one_point() -> None:
    members, labels = informed(20, 3, 0, noise=1.0, members=1)
    (point,) = curve(members, labels, members, labels, order=greedy_order(likelihoods(members, labels)))
    assert point.members == 1
    assert point.nll.n == 1
    assert point.ordered.nll == point.nll.mean == pytest.approx(nll(members[0], labels))
    assert recommended_members(likelihoods(members, labels)) == 1


def test_members_may_lie_on_disk(tmp_path) -> None:
    members, labels = informed(30, 3, 0, noise=1.0, members=3)
    np.save(tmp_path / "members.npy", members.astype(np.float32))
    mapped = np.load(tmp_path / "members.npy", mmap_mode="r")
    assert curve(mapped, labels, mapped, labels) == curve(np.asarray(mapped), labels, np.asarray(mapped), labels)


def likelihoods(members, labels):
    """(M, B) what each member gives to the labels."""
    return np.asarray(members)[:, np.arange(len(labels)), labels]


def slow_greedy(members, labels) -> list[int]:
    order: list[int] = []
    while len(order) < len(members):
        rest = [m for m in range(len(members)) if m not in order]
        order.append(min(rest, key=lambda m: nll(members[[*order, m]].mean(axis=0), labels)))
    return order


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_order_is_that_of_an_exhaustive_loop(seed: int) -> None:
    members, labels = informed(30, 3, seed, noise=2.0, members=7)
    order = greedy_order(likelihoods(members, labels))
    assert order == slow_greedy(members, labels)
    assert all(type(member) is int for member in order)
    # Its first member is the best one, and its first two are the best pair that holds that one.
    pairs = [pair for pair in permutations(range(7), 2) if pair[0] == order[0]]
    assert tuple(order[:2]) == min(pairs, key=lambda pair: nll(members[list(pair)].mean(axis=0), labels))


def test_of_equal_members_the_first_comes_first() -> None:
    members, labels = informed(20, 3, 0, noise=1.0, members=1)
    assert greedy_order(likelihoods(np.repeat(members, 4, axis=0), labels)) == [0, 1, 2, 3]


@given(odd_pairs())
@settings(max_examples=30, deadline=None)
def test_odd_members_have_an_order_and_a_curve(pair) -> None:
    a, b, labels = pair
    members = np.stack([a, b])
    assert greedy_order(likelihoods(members, labels)) in ([0, 1], [1, 0])
    assert recommended_members(likelihoods(members, labels)) in (None, 1, 2)
    for point in curve(members, labels, members, labels, order=[1, 0]):
        assert all(math.isfinite(value) for value in point.ordered.model_dump().values())


def test_the_recommended_number_is_within_a_standard_error_of_all() -> None:
    members, labels = informed(400, 4, 0, noise=2.0, members=12)
    members = 0.7 * members[:1] + 0.3 * members  # alike, so that it does not take all
    order = list(range(11, -1, -1))
    whole = members.mean(axis=0)

    def each(probs):
        return np.array([-math.log(row[label]) for row, label in zip(probs, labels, strict=True)])

    enough = []
    for size in range(1, 13):
        excess = each(members[order[:size]].mean(axis=0)) - each(whole)
        enough.append(excess.mean() <= np.sqrt(((excess - excess.mean()) ** 2).sum() / 399) / 20)
    assert recommended_members(likelihoods(members, labels), order) == enough.index(True) + 1
    assert 1 < recommended_members(likelihoods(members, labels), order) < 12
    assert recommended_members(likelihoods(np.repeat(members[:1], 5, axis=0), labels)) == 1


def test_nothing_is_called_sufficient_where_so_few_images_cannot_tell() -> None:
    members, labels = informed(2000, 4, 0, noise=2.0, members=6)
    found = {count: recommended_members(likelihoods(members[:, :count], labels[:count])) for count in (20, 2000)}
    assert found[20] is None
    assert found[2000] is not None and found[2000] > 1  # one member is worse than all, which 2000 images tell
    certain = np.full((3, 20), 0.9)  # nothing is lost by one of three that are one
    assert recommended_members(certain) == 1


def test_bad_members_are_refused() -> None:
    members, labels = informed(10, 3, 0, noise=1.0, members=3)
    with pytest.raises(ShapeError, match=r"expected the members' probabilities \(M, B, C\)"):
        curve(members[0], labels, members, labels)
    with pytest.raises(ShapeError, match="labels must be 10 integers"):
        curve(members, labels[:5], members, labels)
    with pytest.raises(ShapeError, match="no distribution"):
        curve(np.log(members), labels, members, labels)
    with pytest.raises(ShapeError, match=r"probabilities of the labels, \(M, B\), found shape \(3, 10, 3\)"):
        recommended_members(members)
    with pytest.raises(ShapeError, match="same members and classes"):
        curve(members, labels, members[:2], labels)
    with pytest.raises(UsageError, match="different members of 0 to 2"):
        curve(members, labels, members, labels, order=[0, 3])
    with pytest.raises(UsageError, match="at least 1 subset"):
        curve(members, labels, members, labels, subsets=0)
    with pytest.raises(UsageError, match="0 to 2 once each"):
        recommended_members(likelihoods(members, labels), [0, 1])


# --- the deep-ensemble equivalent -----------------------------------------------------------------------------------


def point(members: int, value: float, deviation: float | None = None) -> CurvePoint:
    found = spread([value]).model_copy(update={"deviation": deviation})
    scores = MemberScores(error=0, nll=0, calibrated_nll=value, brier=0, ece=0)
    return CurvePoint(members=members, error=found, nll=found, calibrated_nll=found, brier=found, ece=found,
                      ordered=scores)  # fmt: skip


# Calibrated NLL 1 / l: at real numbers between two measured ones, the chord.
HARMONIC = [point(size, 1 / size, 0.02 if size < 8 else None) for size in (1, 2, 4, 8)]


@pytest.mark.parametrize(
    ("value", "members"),
    [(0.5, 2), (0.75, 1.5), (0.25, 4), (0.375, 3), (0.1875, 6), (0.125, 8), (1.0, 1), (0.4, 2.8)],
)
def test_the_equivalent_lies_on_the_chord(value: float, members: float) -> None:
    found = deep_ensemble_equivalent(HARMONIC, value)
    assert found.members == pytest.approx(members)
    assert not found.below_one
    assert found.low <= found.members <= (found.high or math.inf)
    assert str(found) == f"{members:.1f}"


def test_the_equivalents_bounds_are_a_deviation_away() -> None:
    found = deep_ensemble_equivalent(HARMONIC, 0.75)
    assert found.low == pytest.approx(1 + (0.98 - 0.75) / 0.5)  # the better curve is there sooner
    assert found.high == pytest.approx(1 + (1.02 - 0.75) / 0.5)


def test_equivalents_beyond_the_curve() -> None:
    better = deep_ensemble_equivalent(HARMONIC, 0.1)
    assert (better.members, better.high, better.largest, str(better)) == (None, None, 8, "more than 8")
    worse = deep_ensemble_equivalent(HARMONIC, 1.01)
    assert (worse.members, worse.low, worse.below_one, str(worse)) == (1, 1, True, "fewer than 1")
    assert worse.high == pytest.approx(1 + (1.02 - 1.01) / 0.5)
    assert json.loads(better.model_dump_json())["members"] is None


def test_of_a_wavy_curve_the_first_number_counts() -> None:
    wavy = [point(1, 1.0), point(2, 0.5), point(3, 0.6), point(4, 0.4)]
    assert deep_ensemble_equivalent(wavy, 0.55).members == pytest.approx(1.9)
    assert deep_ensemble_equivalent(wavy, 0.45).members == pytest.approx(3.75)


def test_a_deep_ensemble_equals_itself() -> None:
    members, labels = informed(200, 4, 0, noise=2.0, members=6)
    validation, held_out = informed(200, 4, 1, noise=2.0, members=6)
    points = curve(members, labels, validation, held_out)
    for one in points:
        found = deep_ensemble_equivalent(points, one.calibrated_nll.mean)
        assert found.members == pytest.approx(one.members)


def test_bad_curves_are_refused() -> None:
    with pytest.raises(UsageError, match=r"from 1 member up, not over \[2, 4, 8\]"):
        deep_ensemble_equivalent(HARMONIC[1:], 0.3)
    with pytest.raises(UsageError, match="from 1 member up"):
        deep_ensemble_equivalent([], 0.3)
    with pytest.raises(UsageError, match="finite"):
        deep_ensemble_equivalent(HARMONIC, math.nan)


# --- shift ----------------------------------------------------------------------------------------------------------


def test_families_part_the_protocols_corruptions() -> None:
    headline = [name for family, names in FAMILIES.items() if family != "validation" for name in names]
    assert tuple(headline) == HEADLINE
    assert FAMILIES["validation"] == VALIDATION
    assert [len(names) for names in FAMILIES.values()] == [3, 4, 4, 4, 4]


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_show_what_they_are_given() -> None:
    from ensembler.eval.metrics.selective import risk_coverage
    from ensembler.eval.report.comparison_plots import plot_differences, plot_members
    from ensembler.eval.report.plots import plot_boxes, plot_entropy, plot_rejection, to_png
    from ensembler.eval.report.styles import PALETTE
    from ensembler.uncertainty import predictive_entropy

    members, labels = informed(60, 3, 0, noise=1.5, members=3)
    one = members.mean(axis=0)
    found = paired_bootstrap(one, members[0], labels, resamples=50)
    forest = plot_differences(["all"], PALETTE[:1], "one", [found])
    ends = forest.axes[1].lines[0].get_xdata()
    assert list(ends) == [found["nll"].low, found["nll"].high]
    assert forest.axes[0].lines[1].get_xdata()[0] == pytest.approx(100 * found["error"].difference)

    points = curve(members, labels, members, labels, order=greedy_order(likelihoods(members, labels)))
    lines = plot_members(["all", "other"], PALETTE[:2], ["1k passes", "2k passes"], [points, points])
    solid, dashed = lines.axes[0].lines[:2]
    assert list(solid.get_ydata()) == [p.calibrated_nll.mean for p in points]
    assert list(dashed.get_ydata()) == [p.ordered.calibrated_nll for p in points]
    assert [text.get_text() for text in lines.legends[0].get_texts()] == ["all (1k passes)", "other (2k passes)"]

    level = lambda value: SimpleNamespace(error=value, nll=value, ece=value)  # noqa: E731
    cells = {name: {s: level(k * s) for s in SEVERITIES} for k, name in enumerate(HEADLINE)}
    run = SimpleNamespace(cells=cells, by_severity=dict.fromkeys(SEVERITIES), clean=level(0.5))
    boxes = plot_boxes(["a", "b"], PALETTE[:2], [run, run], HEADLINE)
    assert sum(len(axes.patches) for axes in boxes.axes) == 2 * 5 * 3
    quartiles = boxes.axes[1].patches[1].get_path().vertices[:, 1]  # of 0, 2, ..., 28
    assert (min(quartiles[quartiles > 0]), max(quartiles)) == (7, 21)

    answers = [(probs.max(axis=1), probs.argmax(axis=1) == labels) for probs in (one, members[0])]
    curves = [risk_coverage(*answer) for answer in answers]
    kept = plot_rejection(["a"], PALETTE[:1], curves[:1], curves[1:])
    assert kept.axes[0].lines[0].get_ydata()[-1] == pytest.approx(100 * (one.argmax(axis=1) == labels).mean())

    entropies = predictive_entropy(members)
    histograms = plot_entropy(["a"], PALETTE, [entropies], {"noise": [entropies]}, classes=3)
    heights, _, _ = histograms.axes[0].patches[0].get_data()
    assert heights.sum() == pytest.approx(1)

    for figure in (forest, lines, boxes, kept, histograms, plot_rejection(["a"], PALETTE[:1], curves[:1])):
        picture = Image.open(io.BytesIO(to_png(figure)))
        assert min(picture.size) > 100
        assert np.asarray(picture.convert("L")).std() > 5
