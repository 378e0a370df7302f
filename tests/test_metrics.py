"""The scores against loops over examples and bins written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.eval.metrics import FLOOR, accuracy, brier, ece, ensemble_log_probs, nll, reliability, scores

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def sample(count: int, classes: int, seed: int = 0, sharpness: float = 1.0) -> tuple[Floats, Labels]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 1 / sharpness), count), rng.integers(0, classes, count)


def slow_bins(probs: Floats, labels: Labels, bins: int) -> list[list[tuple[float, bool]]]:
    """(confidence, right?) of each example, sorted into bins that are open on the left."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    edges = np.linspace(0, 1, bins + 1)
    for row, label in zip(probs, labels, strict=True):
        best = max(range(len(row)), key=lambda c: row[c])
        confidence = min(row[best], 1.0)
        place = next(b for b in range(bins) if confidence <= edges[b + 1])
        found[place].append((confidence, best == label))
    return found


def slow_ece(probs: Floats, labels: Labels, bins: int = 15) -> float:
    total = 0.0
    for members in slow_bins(probs, labels, bins):
        if members:
            confidence = math.fsum(c for c, _ in members) / len(members)
            right = sum(r for _, r in members) / len(members)
            total += len(members) / len(labels) * abs(right - confidence)
    return total


def slow_nll(probs: Floats, labels: Labels) -> float:
    return math.fsum(-math.log(max(row[label], FLOOR)) for row, label in zip(probs, labels, strict=True)) / len(labels)


def slow_brier(probs: Floats, labels: Labels) -> float:
    return math.fsum(
        (p - (c == label)) ** 2 for row, label in zip(probs, labels, strict=True) for c, p in enumerate(row)
    ) / len(labels)


def check_against_loops(probs: Floats, labels: Labels, bins: int = 15) -> None:
    assert nll(probs, labels) == pytest.approx(slow_nll(probs, labels), abs=1e-12, rel=1e-12)
    assert brier(probs, labels) == pytest.approx(slow_brier(probs, labels), abs=1e-12)
    assert ece(probs, labels, bins) == pytest.approx(slow_ece(probs, labels, bins), abs=1e-12)
    right = [max(range(len(row)), key=lambda c: row[c]) == label for row, label in zip(probs, labels, strict=True)]
    assert accuracy(probs, labels) == pytest.approx(sum(right) / len(right), abs=1e-15)
    diagram = reliability(probs, labels, bins)
    for b, members in enumerate(slow_bins(probs, labels, bins)):
        assert diagram.count[b] == len(members)
        if members:
            assert diagram.confidence[b] == pytest.approx(sum(c for c, _ in members) / len(members), abs=1e-12)
            assert diagram.accuracy[b] == pytest.approx(sum(r for _, r in members) / len(members), abs=1e-12)
        else:
            assert np.isnan(diagram.confidence[b])
            assert np.isnan(diagram.accuracy[b])


# --- against the loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bins", [1, 7, 10, 15])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_scores_equal_loops(classes: int, bins: int) -> None:
    check_against_loops(*sample(400, classes, sharpness=4), bins)


@st.composite
def odd_predictions(draw: st.DrawFn) -> tuple[Floats, Labels]:
    """Few examples and classes, with the corners: one class, ties, exactly 0 and 1, confidences on a bin's edge."""
    classes = draw(st.integers(1, 5))
    weights = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 1e-9, 1e-300]) | st.floats(0, 1, width=32)
    rows = st.lists(weights, min_size=classes, max_size=classes).filter(lambda row: sum(row) > 1e-6)
    found = np.array(draw(st.lists(rows, min_size=1, max_size=12)))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(found), max_size=len(found)))
    return found / found.sum(axis=1, keepdims=True), np.array(labels)


@given(odd_predictions())
@settings(max_examples=150, deadline=None)
def test_scores_equal_loops_on_odd_inputs(prediction: tuple[Floats, Labels]) -> None:
    check_against_loops(*prediction)
    found = scores(*prediction)
    assert list(found) == ["accuracy", "error", "nll", "brier", "ece"]
    assert all(math.isfinite(value) for value in found.values())
    assert 0 <= found["ece"] <= 1
    assert 0 <= found["brier"] <= 2 + 1e-12
    assert found["accuracy"] + found["error"] == pytest.approx(1)


@given(odd_predictions())
@settings(max_examples=50, deadline=None)
def test_reliability_adds_up_to_the_ece(prediction: tuple[Floats, Labels]) -> None:
    diagram = reliability(*prediction)
    gaps = np.nansum(diagram.count * np.abs(diagram.accuracy - diagram.confidence)) / diagram.count.sum()
    assert ece(*prediction) == pytest.approx(gaps, abs=1e-12)


# --- corners known by heart -----------------------------------------------------------------------------------------


def test_two_classes_are_scored_by_the_top_class() -> None:
    # Taken as a binary problem, class 1's confidence 0.1 would be compared with class 1's frequency.
    probs, labels = np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([0, 0])
    assert ece(probs, labels) == pytest.approx(0.1)


def test_labels_of_two_values_among_more_classes() -> None:
    probs, _ = sample(50, 4)
    for labels in (np.zeros(50, int), np.arange(50) % 2):
        assert ece(probs, labels) == pytest.approx(slow_ece(probs, labels))


def test_one_class_is_perfect() -> None:
    expected = {"accuracy": 1.0, "error": 0.0, "nll": 0.0, "brier": 0.0, "ece": 0.0}
    assert scores(np.ones((5, 1)), np.zeros(5, int)) == pytest.approx(expected)


def test_one_example() -> None:
    expected = {"accuracy": 0.0, "error": 1.0, "nll": -math.log(0.3), "brier": 0.7**2 * 2, "ece": 0.7}
    assert scores([[0.7, 0.3]], [1]) == pytest.approx(expected)


def test_bins_are_left_open() -> None:
    # 0.6 is the edge of bins 9 and 10 of 15, and belongs with 0.55 to (0.5333, 0.6].
    probs, labels = np.array([[0.6, 0.4], [0.55, 0.45]]), np.array([0, 1])
    assert reliability(probs, labels).count.tolist() == [0] * 8 + [2] + [0] * 6
    assert ece(probs, labels) == pytest.approx(abs(0.5 - 0.575))


def test_sure_and_wrong_is_costly_but_finite() -> None:
    found = scores([[1.0, 0.0]], [1])
    assert found == pytest.approx({"accuracy": 0, "error": 1, "nll": -math.log(FLOOR), "brier": 2, "ece": 1})
    assert found["nll"] == pytest.approx(87.3365, abs=1e-4)


def test_of_equally_probable_classes_the_first_counts() -> None:
    assert accuracy([[0.4, 0.4, 0.2]] * 2, [0, 1]) == 0.5


def test_a_calibrated_prediction_has_small_ece_and_brier_is_its_variance() -> None:
    probs, _ = sample(20_000, 5, seed=1)
    rng = np.random.default_rng(2)
    labels = (probs.cumsum(axis=1) < rng.random((len(probs), 1))).sum(axis=1)
    assert ece(probs, labels) < 0.02
    assert brier(probs, labels) == pytest.approx((1 - (probs**2).sum(axis=1)).mean(), abs=0.01)


def test_low_precision_rows_are_taken_as_they_are() -> None:
    probs = np.array([[0.3335, 0.3335, 0.3335]], dtype=np.float32)
    assert nll(probs, [0]) == pytest.approx(-math.log(0.3335), abs=1e-6)
    assert ece(np.array([[1.0005, 0.0]]), [0]) == pytest.approx(0, abs=1e-12)


# --- the ensemble's prediction --------------------------------------------------------------------------------------


def test_probabilities_are_averaged_not_logits() -> None:
    members = np.array([[[0.99, 0.01]], [[0.3, 0.7]]])
    mean = [(0.99 + 0.3) / 2, (0.01 + 0.7) / 2]
    np.testing.assert_allclose(ensemble_log_probs(members), np.log([mean]), rtol=1e-14)
    logits = np.log(members).mean(axis=0)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.abs(np.exp(ensemble_log_probs(members)) - softmax).max() > 0.2


@pytest.mark.parametrize("members", [1, 2, 7])
def test_ensemble_equals_a_loop_over_members(members: int) -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), (members, 30))
    found = ensemble_log_probs(probs.astype(np.float32))
    assert found.dtype == np.float64
    for b in range(30):
        for c in range(4):
            mean = math.fsum(probs[m, b, c] for m in range(members)) / members
            assert found[b, c] == pytest.approx(math.log(mean), abs=1e-5)


def test_members_that_all_say_no_give_a_finite_log() -> None:
    found = ensemble_log_probs([[[1.0, 0.0]], [[1.0, 0.0]]])
    np.testing.assert_allclose(found, [[0.0, math.log(FLOOR)]])
    assert nll(np.exp(found), [1]) == pytest.approx(-math.log(FLOOR))


def test_a_mean_never_scores_worse_than_its_members_on_average() -> None:
    members = np.random.default_rng(3).dirichlet(np.full(5, 0.5), (6, 200))
    labels = np.random.default_rng(4).integers(0, 5, 200)
    mean = np.exp(ensemble_log_probs(members))
    assert nll(mean, labels) <= np.mean([nll(member, labels) for member in members])
    assert brier(mean, labels) <= np.mean([brier(member, labels) for member in members])


# --- bad input ------------------------------------------------------------------------------------------------------

HALVES = [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        ([0.5, 0.5], [0], r"probs must be probabilities \(B, C\), none empty, found float64 \(2,\)"),
        (np.empty((0, 3)), [], r"found float64 \(0, 3\)"),
        ([["a", "b"]], [0], "probs must be probabilities"),
        (HALVES, [0, 1], r"labels must be 1 integers, one an example, found int64 \(2,\)"),
        (HALVES, [0.0], "found float64"),
        (HALVES, [[0]], r"\(1, 1\)"),
        (HALVES * 3, [0, 1, 2], r"labels\[2\] is 2, but probs has the classes 0 to 1"),
        (HALVES, [-1], r"labels\[0\] is -1"),
        ([[0.5, 0.5], [0.6, 0.5]], [0, 0], r"probs\[1\] is no distribution: .* sums to 1.1; give probabilities"),
        ([[np.nan, 0.5]], [0], r"probs\[0\] is no distribution"),
        ([[np.inf, -np.inf]], [0], r"probs\[0\] is no distribution"),
        ([[1.2, -0.2]], [0], "smallest entry is -0.2"),
    ],
)
@pytest.mark.parametrize("score", [accuracy, nll, brier, ece, reliability, scores])
def test_bad_predictions_are_named(score, probs, labels, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        score(probs, labels)


def test_bad_members_are_named() -> None:
    with pytest.raises(ShapeError, match=r"members must be probabilities \(M, B, C\), none empty, found .* \(1, 2\)"):
        ensemble_log_probs(HALVES)
    with pytest.raises(ShapeError, match=r"members\[0, 1\] is no distribution"):
        ensemble_log_probs([[[0.5, 0.5], [3.0, -1.0]]])


@pytest.mark.parametrize("score", [ece, reliability])
def test_no_bins_is_refused(score) -> None:
    with pytest.raises(UsageError, match="bins is 0; give at least 1"):
        score(HALVES, [0], bins=0)
    assert issubclass(UsageError, EnsemblerError)
