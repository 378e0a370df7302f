"""The rules of stopping early, against the whole ensemble and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ensembler.errors import UsageError
from ensembler.serve.runtime import early_exit as adaptive


def draws(seed: int, members: int, examples: int, classes: int, sharpness: float) -> np.ndarray:
    """Members' probabilities (M, B, C) float32; rounded to tenths half of the time, so that sums tie."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, sharpness), (members, examples))
    if seed % 2:
        p = np.eye(classes)[p.argmax(-1)] if seed % 4 == 1 else np.round(p, 1)
    return p.astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from([0.02, 0.1, 0.5, 2.0]),
)
def test_exact_never_changes_a_class(seed: int, members: int, examples: int, classes: int, sharpness: float) -> None:
    p = draws(seed, members, examples, classes, sharpness)
    whole = p.mean(axis=0, dtype=np.float64).argmax(-1)
    for k in range(1, members + 1):
        settled = adaptive.exact(p[:k], members)
        np.testing.assert_array_equal(p[:k].mean(axis=0, dtype=np.float64).argmax(-1)[settled], whole[settled])
        if classes > 1:
            # Not settled only where the members left could really change or tie it: each could give all to a rival.
            total = np.sort(p[:k].sum(axis=0, dtype=np.float64))
            np.testing.assert_array_equal(settled, total[:, -1] - total[:, -2] > members - k + 1e-9 * members)


@given(st.integers(2, 12))
def test_a_lead_that_the_others_can_just_undo_is_not_settled(members: int) -> None:
    """Half say class 1, half say class 0, which wins a tie: no sooner than one past half is anything settled."""
    k = members // 2
    p = np.zeros((members, 1, 2), np.float32)
    p[:k, 0, 1] = 1
    assert not adaptive.exact(p[:k], members).any()
    p[k : k + 1, 0, 1] = 1
    assert adaptive.exact(p[: k + 1], members).all()
    assert next(adaptive.waves("exact", members)) == (0, k + 1)


@pytest.mark.parametrize(("mode", "members"), [(m, n) for m in ("exact", "confidence") for n in range(1, 12)])
def test_waves_ask_everyone_once_in_order(mode: adaptive.Mode, members: int) -> None:
    waves = list(adaptive.waves(mode, members))
    assert [member for first, last in waves for member in range(first, last)] == list(range(members))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 30, 99])
def test_students_quantile_is_scipys(level: float, freedom: int) -> None:
    assert adaptive.student_t(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-8)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(2, 5), st.sampled_from([0.6, 0.9, 0.99]))
def test_confidence_is_the_paired_interval_of_scipy(seed: int, k: int, classes: int, level: float) -> None:
    p = np.random.default_rng(seed).dirichlet(np.full(classes, 0.5), (k, 6)).astype(np.float32)
    for example, settled in enumerate(adaptive.confident(p, level)):
        second, best = np.argsort(p[:, example].mean(0, dtype=np.float64), kind="stable")[-2:]
        gaps = p[:, example, best].astype(np.float64) - p[:, example, second]
        low, _ = stats.t.interval(level, k - 1, gaps.mean(), stats.sem(gaps))
        if abs(low) > 1e-5:  # the gaps are float32's
            assert settled == (low > 0)


def test_of_two_classes_it_is_the_best_ones_probability_above_a_half() -> None:
    best = np.array([0.9, 0.7, 0.95, 0.6])
    for shift in (-0.2, -0.1, 0.0):
        p = np.stack([best + shift, 1 - best - shift], axis=-1)[:, None]
        mean, error = (best + shift).mean(), (best + shift).std(ddof=1) / math.sqrt(4)
        assert adaptive.confident(p)[0] == (mean - adaptive.student_t(0.95, 3) * error > 0.5)


def test_one_member_settles_nothing_by_its_spread() -> None:
    assert not adaptive.confident(np.array([[[1.0, 0.0]]])).any()
    assert adaptive.confident(np.array([[[1.0]]])).all()  # there is no other class


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_levels_out_of_range_are_refused(level: float) -> None:
    with pytest.raises(UsageError, match="level of confidence must lie between 0 and 1"):
        adaptive.rule("confidence", level)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown mode 'quick': use one of full, exact, confidence"):
        adaptive.rule("quick")
