"""The scores against loops over examples and bins written out by hand."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ensembler.calibration_maps import FLOOR, bin_indices, temper
from ensembler.errors import EnsemblerError, ShapeError, UsageError
from ensembler.eval.metrics.classification import (
    Answers,
    accuracy,
    adaptive_ece,
    brier,
    classwise_ece,
    ece,
    l2_calibration_error,
    max_calibration_error,
    nll,
    scores,
    smooth_ece,
)
from ensembler.eval.metrics.embedding import classical_scaling, pairwise_disagreement
from ensembler.eval.metrics.recalibration import TEMPERATURES, fit_temperature
from ensembler.eval.metrics.selective import (
    augrc,
    aurc,
    coverage_at_risk,
    misclassification_auroc,
    reliability,
    risk_at_coverage,
    risk_coverage,
    risks,
)
from ensembler.uncertainty import disagreement, mean_probabilities, mutual_information, uncertainty

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def sample(count: int, classes: int, seed: int = 0, sharpness: float = 1.0) -> tuple[Floats, Labels]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(classes, 1 / sharpness), count), rng.integers(0, classes, count)


def calibrated(count: int, classes: int, seed: int = 0) -> tuple[Floats, Labels]:
    """Labels drawn from the probabilities, so that the bins' gaps have both signs, and it matters who is in which."""
    probs, _ = sample(count, classes, seed)
    draws = np.random.default_rng(seed + 1).random((count, 1))
    return probs, (probs.cumsum(axis=1) < draws).sum(axis=1).clip(0, classes - 1)


def answers(probs: Floats, labels: Labels) -> tuple[Floats, NDArray[np.bool_]]:
    """What selective prediction is scored on."""
    found = Answers(probs, labels)
    return found.confidence, found.correct


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


def slow_mce(probs: Floats, labels: Labels, bins: int = 15) -> float:
    return max(
        abs(sum(r for _, r in held) - math.fsum(c for c, _ in held)) / len(held)
        for held in slow_bins(probs, labels, bins)
        if held
    )


def slow_adaptive_ece(probs: Floats, labels: Labels, bins: int = 15) -> float:
    answers = [(confidence, right) for held in slow_bins(probs, labels, 1) for confidence, right in held]
    ordered = sorted(confidence for confidence, _ in answers)
    edges = [ordered[math.ceil(Fraction(b * len(ordered), bins)) - 1] for b in range(1, bins + 1)]
    held: list[list[float]] = [[] for _ in range(bins)]
    for confidence, right in answers:
        held[next(b for b in range(bins) if confidence <= edges[b])].append(right - confidence)
    return sum(abs(math.fsum(gaps)) for gaps in held) / len(answers)


def slow_classwise_ece(probs: Floats, labels: Labels, bins: int = 15) -> float:
    edges = np.linspace(0, 1, bins + 1)
    total = 0.0
    for c in range(probs.shape[1]):
        held: list[list[float]] = [[] for _ in range(bins)]
        for row, label in zip(probs, labels, strict=True):
            p = min(row[c], 1.0)
            held[next(b for b in range(bins) if p <= edges[b + 1])].append((label == c) - row[c])
        total += sum(abs(math.fsum(gaps)) for gaps in held) / len(labels)
    return total / probs.shape[1]


def slow_risks(probs: Floats, labels: Labels) -> list[Fraction]:
    """Error rate of the k most confident, k = 1 to B: each example counts by its chance to be among them."""
    answers = [(confidence, right) for held in slow_bins(probs, labels, 1) for confidence, right in held]
    risks = []
    for k in range(1, len(answers) + 1):
        wrong = Fraction(0)
        for confidence, right in answers:
            above = sum(other > confidence for other, _ in answers)
            tied = sum(other == confidence for other, _ in answers)
            wrong += (not right) * min(max(Fraction(k - above, tied), Fraction(0)), Fraction(1))
        risks.append(wrong / k)
    return risks


def slow_auroc(probs: Floats, labels: Labels) -> float | None:
    answers = [(confidence, right) for held in slow_bins(probs, labels, 1) for confidence, right in held]
    pairs = [(a > b) + 0.5 * (a == b) for a, right in answers if right for b, also in answers if not also]
    return sum(pairs) / len(pairs) if pairs else None


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
    assert max_calibration_error(probs, labels, bins) == pytest.approx(slow_mce(probs, labels, bins), abs=1e-12)
    assert adaptive_ece(probs, labels, bins) == pytest.approx(slow_adaptive_ece(probs, labels, bins), abs=1e-12)
    assert classwise_ece(probs, labels, bins) == pytest.approx(slow_classwise_ece(probs, labels, bins), abs=1e-12)
    assert misclassification_auroc(*answers(probs, labels)) == pytest.approx(slow_auroc(probs, labels), abs=1e-12)
    diagram = reliability(*answers(probs, labels), bins)
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
    check_against_loops(*calibrated(400, classes), bins)


@st.composite
def odd_predictions(draw: st.DrawFn) -> tuple[Floats, Labels]:
    """Few examples and classes, with the corners: one class, ties, exactly 0 and 1, confidences on a bin's edge."""
    classes = draw(st.integers(1, 5))
    weights = st.sampled_from([0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 5.0, 1e-9, 1e-300]) | st.floats(0, 1, width=32)
    rows = st.lists(weights, min_size=classes, max_size=classes).filter(lambda row: sum(row) > 1e-6)
    found = np.array(draw(st.lists(rows, min_size=1, max_size=12)))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(found), max_size=len(found)))
    return found / found.sum(axis=1, keepdims=True), np.array(labels)


@given(odd_predictions(), st.sampled_from([1, 2, 3, 4, 15]))
@settings(max_examples=200, deadline=None)
def test_scores_equal_loops_on_odd_inputs(prediction: tuple[Floats, Labels], bins: int) -> None:
    check_against_loops(*prediction, bins)
    found = scores(*prediction)
    alone: dict[str, Any] = {
        "accuracy": accuracy,
        "error": lambda *both: 1 - accuracy(*both),
        "nll": nll,
        "brier": brier,
        "ece": ece,
        "adaptive_ece": adaptive_ece,
        "classwise_ece": classwise_ece,
        "max_calibration_error": max_calibration_error,
        "l2_calibration_error": l2_calibration_error,
        "smooth_ece": smooth_ece,
        "aurc": lambda *both: aurc(risks(*answers(*both))),
        "augrc": lambda *both: augrc(risks(*answers(*both))),
        "risk_at_80": lambda *both: risk_at_coverage(risks(*answers(*both)), 0.8),
        "coverage_at_5": lambda *both: coverage_at_risk(risks(*answers(*both)), 0.05),
        "misclassification_auroc": lambda *both: misclassification_auroc(*answers(*both)),
    }
    assert found == {name: score(*prediction) for name, score in alone.items()}
    assert list(found) == list(alone)
    assert all(math.isfinite(value) for name, value in found.items() if name != "misclassification_auroc")
    assert found["ece"] <= found["max_calibration_error"] + 1e-12 <= 1 + 1e-9
    assert 0 <= found["ece"] <= 1
    assert 0 <= found["brier"] <= 2 + 1e-12
    assert found["accuracy"] + found["error"] == pytest.approx(1)


@given(odd_predictions())
@settings(max_examples=50, deadline=None)
def test_reliability_adds_up_to_the_ece(prediction: tuple[Floats, Labels]) -> None:
    diagram = reliability(*answers(*prediction))
    gaps = np.nansum(diagram.count * np.abs(diagram.accuracy - diagram.confidence)) / diagram.count.sum()
    assert ece(*prediction) == pytest.approx(gaps, abs=1e-12)


@given(odd_predictions())
@settings(max_examples=100, deadline=None)
def test_risks_equal_loops_on_odd_inputs(prediction: tuple[Floats, Labels]) -> None:
    slow, found = slow_risks(*prediction), risks(*answers(*prediction))
    np.testing.assert_allclose(found, [float(risk) for risk in slow], atol=1e-12)
    assert aurc(found) == pytest.approx(float(sum(slow) / len(slow)), abs=1e-12)
    for coverage in ("0.01", "0.3", "0.8", "1"):
        k = max(1, math.ceil(Fraction(coverage) * len(slow)))
        assert risk_at_coverage(found, float(coverage)) == pytest.approx(float(slow[k - 1]), abs=1e-12)
    curve = risk_coverage(*answers(*prediction))
    np.testing.assert_array_equal(curve.risk, found)
    np.testing.assert_allclose(curve.coverage, np.arange(1, len(slow) + 1) / len(slow))


@given(odd_predictions(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_no_score_depends_on_the_order_of_the_examples(prediction: tuple[Floats, Labels], random: Any) -> None:
    probs, labels = prediction
    order = list(range(len(labels)))
    random.shuffle(order)
    assert scores(probs[order], labels[order]) == pytest.approx(scores(probs, labels), abs=1e-12)


def test_tied_examples_count_by_their_expectation() -> None:
    probs = np.array([[0.9, 0.1], [0.7, 0.3], [0.7, 0.3], [0.7, 0.3], [0.6, 0.4]])
    labels = np.array([0, 1, 0, 1, 1])
    areas = []
    for middle in permutations([1, 2, 3]):
        wrong = np.cumsum(labels[[0, *middle, 4]] != 0)
        areas.append((wrong / np.arange(1, 6)).mean())
    assert aurc(risks(*answers(probs, labels))) == pytest.approx(np.mean(areas), abs=1e-12)


def test_a_coverage_in_hundredths_is_exact() -> None:
    # 0.07 * 100 is 7.000000000000001, and the eighth is wrong.
    probs = np.stack([np.linspace(0.99, 0.6, 100), np.linspace(0.01, 0.4, 100)], axis=1)
    labels = (np.arange(100) >= 7).astype(int)
    found = risks(*answers(probs, labels))
    assert risk_at_coverage(found, 0.07) == 0
    assert risk_at_coverage(found, 0.08) == pytest.approx(1 / 8)


def test_a_curve_is_decimated() -> None:
    probs, labels = sample(5000, 3)
    curve, whole = (risk_coverage(*answers(probs, labels), points=points) for points in (50, 5000))
    assert len(curve.risk) == 50
    assert len(whole.risk) == 5000
    assert (curve.coverage[0], curve.coverage[-1]) == (1 / 5000, 1)
    assert set(zip(curve.coverage, curve.risk, strict=True)) <= set(zip(whole.coverage, whole.risk, strict=True))
    assert curve.risk[-1] == pytest.approx(1 - accuracy(probs, labels))


@given(
    st.lists(st.floats(0, 1) | st.integers(0, 60).map(lambda k: k / 60), min_size=1, max_size=60),
    st.sampled_from([1, 2, 7, 10, 15]),
)
@settings(max_examples=200, deadline=None)
def test_the_bins_are_those_of_netcal(values: list[float], bins: int) -> None:
    """Every value lies in the bin whose edges hold it, and the gaps by bin add up to the ECE that netcal measures."""
    from netcal.metrics import ECE

    found, edges = bin_indices(values, bins), np.linspace(0, 1, bins + 1)
    for value, place in zip(values, found, strict=True):
        assert edges[place] < value <= edges[place + 1] or (value == 0 and place == 0)
    confidence, right = np.array(values), np.arange(len(values)) % 2
    gaps = np.abs(np.bincount(found, weights=right - confidence, minlength=bins)).sum() / len(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single confidence
        netcal = ECE(bins).measure(np.nextafter(confidence, 0.0), right)
    assert gaps == pytest.approx(netcal, abs=1e-9)


def test_binned_errors_equal_netcal() -> None:
    from netcal.metrics import ECE

    probs, labels = calibrated(15 * 40, 4)
    right, confidence = (probs.argmax(axis=1) == labels).astype(int), probs.max(axis=1)
    assert adaptive_ece(probs, labels) == pytest.approx(ECE(15, equal_intervals=False).measure(confidence, right))
    each = [ECE(15).measure(probs[:, c].copy(), (labels == c).astype(int)) for c in range(4)]
    assert classwise_ece(probs, labels) == pytest.approx(np.mean(each), abs=1e-12)


# --- temperature ----------------------------------------------------------------------------------------------------


def slow_temper(probs: Floats, temperature: float) -> Floats:
    powers = [[max(p, FLOOR) ** (1 / temperature) for p in row] for row in probs]
    return np.array([[p / math.fsum(row) for p in row] for row in powers])


@given(odd_predictions())
@settings(max_examples=100, deadline=None)
def test_no_other_temperature_is_better(prediction: tuple[Floats, Labels]) -> None:
    probs, labels = prediction
    found = fit_temperature(probs, labels)
    assert TEMPERATURES[0] <= found <= TEMPERATURES[1]
    np.testing.assert_allclose(temper(probs, 1.7), slow_temper(probs, 1.7), atol=1e-12)

    def loss(temperature: float) -> float:
        logs = np.log(np.maximum(probs, FLOOR)) / temperature
        return float((np.logaddexp.reduce(logs, axis=1) - logs[np.arange(len(labels)), labels]).mean())

    if (probs[np.arange(len(labels)), labels] >= probs.max(axis=1)).all():
        assert found == 1  # the lower the better, for ever, or all the same
    else:
        assert loss(found) <= min(map(loss, np.geomspace(*TEMPERATURES, 300))) + 1e-9


def test_temperature_equals_netcal() -> None:
    from netcal.scaling import TemperatureScaling

    probs, labels = calibrated(3000, 5, seed=5)
    sharp = slow_temper(probs, 0.6)
    found = fit_temperature(sharp, labels)
    assert found == pytest.approx(1 / 0.6, rel=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pyro's
        other = TemperatureScaling().fit(sharp, labels, tensorboard=False)
    assert found == pytest.approx(1 / other.weights[0], rel=1e-3)
    assert nll(temper(sharp, found), labels) < nll(sharp, labels)


def test_temperature_of_corners() -> None:
    assert fit_temperature([[0.6, 0.4]], [0]) == 1
    assert fit_temperature([[0.6, 0.4]], [1]) == TEMPERATURES[1]
    assert fit_temperature([[0.5, 0.5]] * 3, [0, 1, 1]) == 1
    assert fit_temperature(np.ones((4, 1)), np.zeros(4, int)) == 1
    # Sure, and right nine times of ten: at the best T, FLOOR ** (1 / T) is a ninth of 1 ** (1 / T).
    sure = np.tile([1.0, 0.0], (10, 1))
    assert fit_temperature(sure, [0] * 9 + [1]) == pytest.approx(-math.log(FLOOR) / math.log(9))
    assert temper(sure, fit_temperature(sure, [0] * 9 + [1]))[0] == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("temperature", [0, -1, math.inf, math.nan])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(UsageError, match="must be positive and finite"):
        temper(HALVES, temperature)


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
    found = scores(np.ones((5, 1)), np.zeros(5, int))
    assert found.pop("misclassification_auroc") is None
    assert (found.pop("accuracy"), found.pop("coverage_at_5")) == (1, 1)
    assert found == pytest.approx(dict.fromkeys(found, 0))


def test_one_example() -> None:
    expected = {"accuracy": 0.0, "error": 1.0, "nll": -math.log(0.3), "brier": 0.7**2 * 2, "ece": 0.7}
    expected |= {"adaptive_ece": 0.7, "classwise_ece": 0.7, "max_calibration_error": 0.7, "aurc": 1, "risk_at_80": 1}
    expected |= {"l2_calibration_error": 0, "smooth_ece": 0.7, "augrc": 1, "coverage_at_5": 0}
    assert scores([[0.7, 0.3]], [1]) == pytest.approx(expected | {"misclassification_auroc": None})


def test_bins_are_left_open() -> None:
    # 0.6 is the edge of bins 9 and 10 of 15, and belongs with 0.55 to (0.5333, 0.6].
    probs, labels = np.array([[0.6, 0.4], [0.55, 0.45]]), np.array([0, 1])
    assert reliability(*answers(probs, labels)).count.tolist() == [0] * 8 + [2] + [0] * 6
    assert ece(probs, labels) == pytest.approx(abs(0.5 - 0.575))


def test_sure_and_wrong_is_costly_but_finite() -> None:
    found = scores([[1.0, 0.0]], [1])
    expected = {"accuracy": 0, "error": 1, "nll": -math.log(FLOOR), "brier": 2, "ece": 1}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["nll"] == pytest.approx(87.3365, abs=1e-4)


def test_of_equally_probable_classes_the_first_counts() -> None:
    assert accuracy([[0.4, 0.4, 0.2]] * 2, [0, 1]) == 0.5


def test_a_calibrated_prediction_has_small_ece_and_brier_is_its_variance() -> None:
    probs, _ = sample(20_000, 5, seed=1)
    rng = np.random.default_rng(2)
    labels = (probs.cumsum(axis=1) < rng.random((len(probs), 1))).sum(axis=1)
    assert ece(probs, labels) < 0.02
    assert brier(probs, labels) == pytest.approx((1 - (probs**2).sum(axis=1)).mean(), abs=0.01)


def test_low_precision_rows_are_normalised() -> None:
    probs = np.array([[0.3335, 0.3335, 0.3335]], dtype=np.float32)
    assert nll(probs, [0]) == pytest.approx(math.log(3), abs=1e-12)
    assert ece(np.array([[1.0005, 0.0]]), [0]) == pytest.approx(0, abs=1e-12)
    single = np.array([[0.6, 0.4000005]], dtype=np.float32)
    assert nll(single, [0]) == -math.log(single[0, 0].astype(float)), "float32 is left as it is"


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [True, False])
def test_a_softmax_of_16_bits_is_taken(kind: str, tensor: bool) -> None:
    """Through the package's own names; of tensors, also where NumPy lacks their type."""
    torch = pytest.importorskip("torch")
    from ensembler.eval import metrics

    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 2
    labels = logits.argmax(1)
    right, close = logits.softmax(1), logits.to(getattr(torch, kind)).softmax(1)
    misses = (close.double().sum(1) - 1).abs().max()
    assert misses > 1e-4
    found = close if tensor else close.float().numpy()
    for score in (metrics.nll, metrics.ece, metrics.brier):
        assert score(found, labels) == pytest.approx(score(right, labels), abs=2e-2)
    assert metrics.scores(found, labels.numpy())["accuracy"] == pytest.approx(1, abs=0.05)


def test_logits_and_nan_have_no_uncertainty() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 4, 5))
    for wrong in (logits, np.full((2, 4, 5), np.nan), np.full((2, 4, 5), 0.3)):
        for measure in (uncertainty, mutual_information, mean_probabilities, disagreement):
            with pytest.raises(ShapeError, match="give probabilities that sum to 1, not logits"):
                measure(wrong)


def test_a_mean_never_scores_worse_than_its_members_on_average() -> None:
    members = np.random.default_rng(3).dirichlet(np.full(5, 0.5), (6, 200))
    labels = np.random.default_rng(4).integers(0, 5, 200)
    mean = members.mean(axis=0)
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
@pytest.mark.parametrize("score", [accuracy, ece, fit_temperature, scores])
def test_bad_predictions_are_named(score, probs, labels, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        score(probs, labels)


@pytest.mark.parametrize(
    ("confidence", "correct"), [([], []), ([0.5], [True, False]), ([[0.5]], [[True]]), ([np.nan], [True])]
)
@pytest.mark.parametrize("score", [risks, risk_coverage, misclassification_auroc, reliability])
def test_bad_answers_are_refused(score, confidence, correct) -> None:
    with pytest.raises(ShapeError, match=r"confidence and correct must be \(B,\), none empty, finite, found "):
        score(confidence, correct)


def test_bad_coverages_and_points_are_refused() -> None:
    for coverage in (0, -0.1, 1.01, math.nan):
        with pytest.raises(UsageError, match=r"coverage must lie in \(0, 1\]"):
            risk_at_coverage(np.zeros(3), coverage)
    with pytest.raises(UsageError, match="at least 2 points, not 1"):
        risk_coverage([0.5], [True], points=1)


@pytest.mark.parametrize("score", [ece, max_calibration_error, adaptive_ece, classwise_ece])
def test_no_bins_is_refused(score) -> None:
    for bins in (0, 2.5, "5"):
        with pytest.raises(UsageError, match=f"bins is {bins!r}; give a whole number, at least 1"):
            score(HALVES, [0], bins=bins)
        with pytest.raises(UsageError, match=f"bins is {bins!r}; give a whole number, at least 1"):
            reliability([0.5], [True], bins=bins)
    assert issubclass(UsageError, EnsemblerError)


def test_a_map_of_members_is_the_principal_components_of_their_predictions():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, (6, 40))
    classes[3] = classes[2]
    squared = pairwise_disagreement(classes)
    assert squared[0, 1] == np.mean(classes[0] != classes[1])
    assert squared[2, 3] == 0
    points, shares = classical_scaling(squared, 6)
    between = ((points[:, None] - points[None]) ** 2).sum(-1)
    np.testing.assert_allclose(between, squared, atol=1e-12)  # in all dimensions, exactly the disagreements
    np.testing.assert_allclose(shares.sum(), 1)
    rows = np.eye(3)[classes].reshape(6, -1) / np.sqrt(80)
    _, values, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(shares, values**2 / (values**2).sum(), atol=1e-12)
    plane, of = classical_scaling(squared)
    np.testing.assert_allclose(np.abs(plane), np.abs(points[:, :2]), atol=1e-12)
    assert of.tolist() == shares[:2].tolist()
    assert classical_scaling(np.zeros((3, 3)))[0].any() == 0
