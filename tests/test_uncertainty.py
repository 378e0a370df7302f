"""Measures of doubt against sums written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ensembler.uncertainty
from ensembler.errors import ShapeError
from ensembler.uncertainty import uncertainty


@st.composite
def members(draw):
    M, B, C = draw(st.integers(1, 5)), draw(st.integers(0, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(size=(M, B, C)) * draw(st.sampled_from([0.0, 1.0, 30.0]))
    if draw(st.booleans()):
        return np.eye(C)[logits.argmax(-1)]  # probabilities of exactly 0 and 1
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


@given(members())
def test_every_measure_is_its_definition(p):
    M, B, C = p.shape
    found = uncertainty(p)
    for b in range(B):
        mean = [sum(p[m, b, c] for m in range(M)) / M for c in range(C)]
        expected = sum(entropy(p[m, b]) for m in range(M)) / M
        assert found.predictive_entropy[b] == pytest.approx(entropy(mean), abs=1e-9)
        assert found.expected_entropy[b] == pytest.approx(expected, abs=1e-9)
        if M == 1:
            assert found.mutual_information is found.disagreement is found.variation_ratio is None
            continue
        assert found.mutual_information[b] == pytest.approx(max(0, entropy(mean) - expected), abs=1e-9)
        assert 0 <= found.mutual_information[b] <= math.log(min(M, C)) + 1e-9
        votes = [int(p[m, b].argmax()) for m in range(M)]
        pairs = [(i, j) for i in range(M) for j in range(i)]
        assert found.disagreement[b] == pytest.approx(sum(votes[i] != votes[j] for i, j in pairs) / len(pairs))
        most = max(votes.count(c) for c in range(C))
        assert found.variation_ratio[b] == pytest.approx(1 - most / M)


def test_members_that_are_sure_of_different_classes():
    p = np.eye(4)[:, None, :]
    found = uncertainty(p)
    assert found.mutual_information[0] == pytest.approx(math.log(4))
    assert found.expected_entropy[0] == 0
    assert found.disagreement[0] == 1


def test_a_batch_without_a_members_axis_is_refused():
    with pytest.raises(ShapeError, match=r"\(M, B, C\), found shape \(3, 10\)"):
        uncertainty(np.full((3, 10), 0.1))


def test_members_may_be_a_tensor():
    """As ``Ensemble.predict_members`` returns them."""
    p = np.random.default_rng(0).dirichlet(np.ones(3), (2, 5)).astype(np.float32)
    for tensor in (torch.from_numpy(p), torch.from_numpy(p).requires_grad_()):
        for name, values in vars(uncertainty(tensor)).items():
            np.testing.assert_array_equal(values, getattr(uncertainty(p), name))
            np.testing.assert_array_equal(values, getattr(ensembler.uncertainty, name)(tensor))
