from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensembler.errors import ShapeError
from ensembler.ordering import greedy_order


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_each_next_member_is_the_best_one_by_brute_force(members: int, examples: int, seed: int) -> None:
    likely = np.random.default_rng(seed).random((members, examples)) ** 3
    order = greedy_order(likely)
    assert sorted(order) == list(range(members))
    for size in range(1, members + 1):
        rest = sorted(set(range(members)) - set(order[: size - 1]))
        losses = [-np.mean(np.log(np.mean(likely[[*order[: size - 1], m]], axis=0))) for m in rest]
        assert losses[rest.index(order[size - 1])] <= min(losses) + 1e-12


def test_of_equals_the_first_comes_first_and_zero_is_no_infinity() -> None:
    assert greedy_order(np.full((3, 4), 0.5)) == [0, 1, 2]
    assert greedy_order([[0.0, 0.9], [0.4, 0.4]]) == [1, 0]


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0), (2, 3, 4)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"\(M, B\), found shape"):
        greedy_order(np.zeros(shape))
