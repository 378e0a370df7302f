"""Scores beside torch-uncertainty's: against loops written out by hand, and against its figures, written down.

The figures are those of torch-uncertainty 0.13.0 (and of torchmetrics 1.9.0 for the plug-in l2 error) on the same
arrays.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensembler.errors import ShapeError, UsageError
from ensembler.eval.metrics.classification import Answers, l2_calibration_error, scores, smooth_ece
from ensembler.eval.metrics.ood import fpr_at_recall, scod_aurc
from ensembler.eval.metrics.selective import augrc, aurc, coverage_at_risk, risk_at_coverage, risks
from ensembler.eval.metrics.sets import coverage, mean_set_size
from ensembler.eval.metrics.smooth import smooth_error
from ensembler.eval.predictions import reduce_logits

# --- selective prediction -------------------------------------------------------------------------------------------


def slow_risks(confidence: list[float], losses: list[float]) -> list[Fraction]:
    """The mean loss of the first k, where tied examples have the mean of theirs."""
    found, kept = [], Fraction(0)
    for value in sorted(set(confidence), reverse=True):
        tied = [Fraction(loss) for c, loss in zip(confidence, losses, strict=True) if c == value]
        for _ in tied:
            kept += sum(tied) / len(tied)
            found.append(kept / (len(found) + 1))
    return found


examples = st.lists(
    st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]) | st.floats(0, 1, width=32), st.booleans()),
    min_size=1,
    max_size=40,
)
same = st.builds(lambda rows, right: [(c, right) for c, _ in rows], examples, st.booleans())  # all right, all wrong


@given(examples | same)
@settings(max_examples=150, deadline=None)
def test_selective_scores_equal_loops(rows: list[tuple[float, bool]]) -> None:
    confidence, correct = map(list, zip(*rows, strict=True))
    slow, found = slow_risks(confidence, [not right for right in correct]), risks(confidence, correct)
    B = len(rows)
    assert augrc(found) == pytest.approx(float(sum(k * risk for k, risk in enumerate(slow, 1)) / B**2), abs=1e-12)
    for most in (0.0, 0.05, 0.5, 1.0):
        reached = [k for k, risk in enumerate(slow, 1) if risk <= Fraction(most) + Fraction(1, 10**12)]
        assert coverage_at_risk(found, most) == max(reached, default=0) / B


def test_selective_scores_of_corners() -> None:
    right, wrong = risks([0.9, 0.8], [True, True]), risks([0.9, 0.8], [False, False])
    assert (augrc(right), coverage_at_risk(right, 0.0)) == (0, 1)
    assert (augrc(wrong), coverage_at_risk(wrong, 0.5)) == (0.75, 0)  # 1/2 and 2/2 of all are answered wrongly
    for most in (-0.1, 1.1, math.nan):
        with pytest.raises(UsageError, match=r"a risk must lie in \[0, 1\], not"):
            coverage_at_risk(right, most)


# --- calibration ----------------------------------------------------------------------------------------------------


def slow_l2(probs: np.ndarray, labels: np.ndarray, bins: int, debiased: bool) -> float:
    total = 0.0
    confidence = np.minimum(probs.max(axis=1), 1.0)
    edges = np.linspace(0, 1, bins + 1)
    for b in range(bins):
        inside = [i for i, c in enumerate(confidence) if edges[b] < c <= edges[b + 1]]
        right = [float(probs[i].argmax() == labels[i]) for i in inside]
        n = len(inside)
        if n < (2 if debiased else 1):
            continue
        gap = math.fsum(right) / n - math.fsum(confidence[i] for i in inside) / n
        mean = math.fsum(right) / n
        total += n / len(labels) * (gap**2 - (mean * (1 - mean) / (n - 1) if debiased else 0))
    return math.sqrt(max(total, 0.0))


def slow_smoothed(confidence: np.ndarray, correct: np.ndarray, width: float) -> float:
    """The integral of the smoothed gaps' absolute value, with the Gaussian's mirror images summed one by one."""
    t = np.linspace(0, 1, 4001)
    smoothed = np.zeros_like(t)
    for c, right in zip(confidence, correct, strict=True):
        for centre in (2 * mirror + sign * c for mirror in range(-3, 4) for sign in (1, -1)):
            smoothed += (right - c) * np.exp(-((t - centre) ** 2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))
    return float(np.trapezoid(np.abs(smoothed), t)) / len(confidence)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Few examples: ties, a class that is never the label, all right, all wrong."""
    classes = draw(st.integers(2, 4))
    weights = st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0]) | st.floats(0, 1, width=32)
    rows = st.lists(weights, min_size=classes, max_size=classes).filter(lambda row: sum(row) > 1e-6)
    probs = np.array(draw(st.lists(rows, min_size=1, max_size=12)))
    probs /= probs.sum(axis=1, keepdims=True)
    best = probs.argmax(axis=1)
    kind = draw(st.sampled_from(["random", "right", "wrong", "one"]))
    if kind == "random":
        return probs, np.array(draw(st.lists(st.integers(0, classes - 1), min_size=len(best), max_size=len(best))))
    return probs, {"right": best, "wrong": (best + 1) % classes, "one": np.zeros_like(best)}[kind]


@given(predictions(), st.sampled_from([1, 3, 15]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_l2_error_equals_loops(prediction: tuple[np.ndarray, np.ndarray], bins: int, debiased: bool) -> None:
    found = l2_calibration_error(*prediction, bins, debiased=debiased)
    assert found**2 == pytest.approx(slow_l2(*prediction, bins, debiased) ** 2, abs=1e-12)


@given(predictions())
@settings(max_examples=30, deadline=None)
def test_the_smooth_error_is_where_the_smoothed_gaps_equal_the_width(prediction: tuple[np.ndarray, np.ndarray]) -> None:
    answers = Answers(*prediction)
    found = smooth_ece(*prediction)
    assert 0 <= found <= 1
    if found > 0.005:  # the slow integral needs a width of some grid points
        assert slow_smoothed(answers.confidence, answers.correct, found) == pytest.approx(found, abs=1e-5)
    else:
        assert slow_smoothed(answers.confidence, answers.correct, 0.005) <= 0.005 + 1e-5


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([1.0, 1.0], [True, True], 0.0),
        ([1.0, 1.0], [False, False], 1.0),
        ([0.7, 0.7], [True, False], 0.2),  # one place: the width does not matter
        ([0.5, 0.5], [True, False], 0.0),
    ],
)
def test_smooth_errors_known_by_heart(confidence, correct, expected) -> None:
    assert smooth_error(confidence, correct) == pytest.approx(expected, abs=1e-9)


def test_a_calibrated_prediction_has_a_small_debiased_error() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 4000)
    probs, labels = np.stack([p, 1 - p], axis=1), (rng.random(4000) > p).astype(int)
    assert l2_calibration_error(probs, labels, debiased=False) > 2 * l2_calibration_error(probs, labels)


# --- prediction sets and detectors ----------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_scores_of_sets_equal_loops(B: int, C: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sets, labels = rng.random((B, C)) < rng.choice([0, 0.5, 1]), rng.integers(0, C, B)
    assert coverage(sets, labels) == pytest.approx(sum(bool(s[y]) for s, y in zip(sets, labels, strict=True)) / B)
    assert mean_set_size(sets) == pytest.approx(sum(int(each) for s in sets for each in s) / B)


@pytest.mark.parametrize(
    ("sets", "labels", "message"),
    [
        ([[0.5, 0.5]], [0], r"sets must be \(B, C\) of bool, none empty, found float64 \(1, 2\)"),
        (np.empty((0, 2), bool), [], "none empty"),
        ([[True, False]], [0, 1], "labels must be 1 integers of 0 to 1"),
        ([[True, False]], [2], "labels must be 1 integers of 0 to 1"),
        ([[True, False]], [0.0], "found float64"),
    ],
)
def test_bad_sets_are_refused(sets, labels, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        coverage(sets, labels)


values = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 3, width=32), min_size=1, max_size=30)


@given(values, values, st.integers(1, 100))
@settings(max_examples=100, deadline=None)
def test_fpr_at_any_recall_equals_a_search_over_thresholds(inside, outside, percent: int) -> None:
    for threshold in sorted(set(outside), reverse=True):
        if 100 * sum(value >= threshold for value in outside) >= percent * len(outside):
            break
    expected = sum(value >= threshold for value in inside) / len(inside)
    assert fpr_at_recall(np.array(inside), np.array(outside), percent / 100) == pytest.approx(expected)


@given(values, values, st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_scod_equals_loops(inside, outside, cost: float, kind: int) -> None:
    correct = [(True, False, n % 2 == 0)[kind] for n in range(len(inside))]
    losses = [(1 - cost) * (not right) for right in correct] + [cost] * len(outside)
    slow = slow_risks([-value for value in inside + outside], losses)
    found = scod_aurc(np.array(inside), np.array(correct), np.array(outside), cost)
    assert found == pytest.approx(float(sum(slow) / len(slow)), abs=1e-12)


def test_bad_recalls_costs_and_answers_are_refused() -> None:
    one = np.ones(1)
    for recall in (0, -1, 1.1, math.nan):
        with pytest.raises(UsageError, match=r"a recall must lie in \(0, 1\]"):
            fpr_at_recall(one, one, recall)
    with pytest.raises(UsageError, match=r"ood_cost must lie in \[0, 1\], not 2"):
        scod_aurc(one, one > 0, one, 2)
    with pytest.raises(ShapeError, match=r"correct must be one answer per image in distribution, found shape \(2,\)"):
        scod_aurc(one, np.ones(2, bool), one)


# --- torch-uncertainty's figures ------------------------------------------------------------------------------------


AURC, AUGRC, L2, SMOOTH = 0.2122966977849937, 0.109374749498998, 0.2511162757873535, 0.18834498524665833
COVERAGE, SIZE = 0.844, 2.162
FPR = {0.5: 0.16, 0.8: 0.46, 0.95: 0.7366666666666667, 1.0: 0.9566666666666667}
SCOD = {0.5: 0.19432360408930835, 0.9: 0.2022603538613215}
ENERGY = [
    *(-2.491931557235342, -2.9767076748473027, -2.290016898949257),
    *(-1.480031120216362, -2.190529413910465, -2.560771685754789),
]
MAX_LOGIT = [
    *(-1.9442447114772954, -2.8522830344631345, -1.6907188730116314),
    *(-0.6380026133546032, -1.5503890190454175, -2.0378439709706933),
]


def arrays() -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    rng = np.random.default_rng(13)
    probs = rng.dirichlet(np.full(5, 0.4), 500)
    labels = np.where(rng.random(500) < 0.7, probs.argmax(1), rng.integers(0, 5, 500))
    return probs, labels, rng


def trapezoid(curve: np.ndarray) -> float:
    """Its areas: by trapezoids from coverage 1 / B to 1, divided by that width; ours are means over all coverages."""
    return float(np.trapezoid(curve) / (len(curve) - 1))


def test_the_figures_of_torch_uncertainty() -> None:
    probs, labels, rng = arrays()
    found = risks(Answers(probs, labels).confidence, Answers(probs, labels).correct)
    B = len(found)
    assert trapezoid(found) == pytest.approx(AURC, abs=1e-12)
    assert trapezoid(found * np.arange(1, B + 1) / B) == pytest.approx(AUGRC, abs=1e-12)
    assert aurc(found) == pytest.approx(AURC, abs=1e-3)
    assert augrc(found) == pytest.approx(AUGRC, abs=1e-3)
    assert coverage_at_risk(found, 0.1) == 0.006
    assert coverage_at_risk(found, 0.2) == 0.51
    assert risk_at_coverage(found, 0.5) == pytest.approx(0.192)
    assert l2_calibration_error(probs, labels, debiased=False) == pytest.approx(L2, abs=1e-6)  # float32
    assert smooth_ece(probs, labels) == pytest.approx(SMOOTH, abs=2e-4)  # its grid has 200 points, in float32
    sets = probs >= 0.15
    assert (coverage(sets, labels), mean_set_size(sets)) == (COVERAGE, SIZE)
    inside, outside, wrong = rng.normal(0, 1, 300).round(1), rng.normal(1, 1, 200).round(1), rng.random(300) < 0.2
    for recall, share in FPR.items():
        assert fpr_at_recall(inside, outside, recall) == pytest.approx(share, abs=1e-6)
    inside, outside = rng.normal(0, 1, 300), rng.normal(1, 1, 200)
    for cost, area in SCOD.items():
        costs = np.where(np.arange(500) < 300, (1 - cost) * np.r_[wrong, np.zeros(200)], cost)
        ordered = costs[np.argsort(np.r_[inside, outside])].cumsum() / np.arange(1, 501)
        assert trapezoid(ordered) == pytest.approx(area, abs=1e-12)
        assert scod_aurc(inside, ~wrong, outside, cost) == pytest.approx(ordered.mean(), abs=1e-12)
    logits = rng.normal(0, 3, (4, 6, 5))  # (M, B, C)
    reduced = reduce_logits(logits)
    np.testing.assert_allclose(reduced["energy"], ENERGY, atol=1e-12)
    np.testing.assert_allclose(reduced["max_logit"], MAX_LOGIT, atol=1e-12)


def test_scores_name_each_of_them() -> None:
    probs, labels, _ = arrays()
    found, answers = scores(probs, labels), Answers(probs, labels)
    risk = risks(answers.confidence, answers.correct)
    assert found["augrc"] == augrc(risk)
    assert found["coverage_at_5"] == coverage_at_risk(risk, 0.05)
    assert found["smooth_ece"] == smooth_ece(probs, labels)
    assert found["l2_calibration_error"] == l2_calibration_error(probs, labels, 15, debiased=True)
