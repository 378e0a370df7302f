"""Volumes against Cayley and Menger in exact fractions, gradients against differences in 200 digits."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch

from ensembler.errors import ShapeError, UsageError
from ensembler.subspace import AffineHull, dirichlet, edge_lengths, log_volume

mpmath.mp.dps = 200


def determinant(matrix):
    """Exact, by elimination in fractions."""
    rows, result = [list(row) for row in matrix], Fraction(1)
    for i in range(len(rows)):
        pivot = next((r for r in range(i, len(rows)) if rows[r][i]), None)
        if pivot is None:
            return Fraction(0)
        if pivot != i:
            rows[i], rows[pivot], result = rows[pivot], rows[i], -result
        result *= rows[i][i]
        for r in range(i + 1, len(rows)):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return result


def cayley_menger_log_volume(vertices):
    """``vol^2 = (-1)^(n+1) / (2^n (n!)^2) * det(CM)`` for n + 1 vertices; exact up to the logarithm."""
    rows = [[Fraction(float(x)) for x in row] for row in vertices]
    n = len(rows) - 1
    squares = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    matrix = [[Fraction(0)] + [Fraction(1)] * (n + 1)] + [[Fraction(1), *row] for row in squares]
    squared = (-1) ** (n + 1) * determinant(matrix) / (2**n * math.factorial(n) ** 2)
    return mpmath.log(mpmath.mpf(squared.numerator) / squared.denominator) / 2


def simplex(K, P=7, seed=0, scale=1.0, shift=0.0):
    return scale * (torch.from_numpy(np.random.default_rng(seed).normal(size=(K, P))) + shift)


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("scale", [1.0, 1e120, 1e-120])
def test_log_volume_is_cayley_mengers(K, scale):
    vertices = simplex(K, scale=scale)
    assert log_volume(vertices).item() == pytest.approx(float(cayley_menger_log_volume(vertices)), rel=1e-12)


@pytest.mark.parametrize("height", [1e-3, 1e-5])
def test_log_volume_of_a_nearly_flat_simplex(height):
    vertices = simplex(4)
    vertices[3] = vertices[:3].mean(dim=0) + height * simplex(1, seed=1)[0]
    exact = float(cayley_menger_log_volume(vertices))
    assert log_volume(vertices).item() == pytest.approx(exact, abs=1e-5)


def test_edges_of_very_different_lengths():
    vertices = simplex(4)
    vertices[2] = vertices[0] + 1e-9 * vertices[2]
    vertices[3] *= 1e9
    exact = float(cayley_menger_log_volume(vertices))
    assert log_volume(vertices).item() == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
def test_affinely_dependent_vertices_have_no_volume(K):
    vertices = simplex(K)
    vertices[-1] = vertices[:-1].mean(dim=0)
    assert log_volume(vertices).item() == -math.inf
    vertices[-1] = vertices[0]
    assert log_volume(vertices).item() == -math.inf


def test_log_volume_needs_a_simplex():
    with pytest.raises(ShapeError, match=r"2 to P \+ 1 = 3 vertices, found 4"):
        log_volume(torch.randn(4, 2))
    with pytest.raises(ShapeError, match="found 1"):
        log_volume(torch.randn(1, 2))
    with pytest.raises(ShapeError, match="floating-point"):
        log_volume(torch.zeros(3, 4, dtype=torch.int64))


def cayley_menger_gradient(vertices, k):
    """Central differences in 200 digits: exact to far more digits than a float holds."""
    step = mpmath.mpf(10) ** -60 * max(1, abs(float(vertices.abs().max())))
    exact = [[mpmath.mpf(float(x)) for x in row] for row in vertices]

    def moved(p, by):
        rows = [list(row) for row in exact]
        rows[k][p] += by
        return log_volume_exact(rows)

    return [float((moved(p, step) - moved(p, -step)) / (2 * step)) for p in range(vertices.shape[1])]


def log_volume_exact(rows):
    edges = mpmath.matrix([[a - b for a, b in zip(row, rows[0], strict=True)] for row in rows[1:]])
    return mpmath.log(mpmath.det(edges * edges.T)) / 2 - mpmath.log(mpmath.factorial(len(rows) - 1))


@pytest.mark.parametrize("K", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_the_closed_form_gradient_is_the_exact_one(K, scale):
    vertices = simplex(K, scale=scale)
    assert float(log_volume_exact([[mpmath.mpf(float(x)) for x in r] for r in vertices])) == pytest.approx(
        float(cayley_menger_log_volume(vertices)), rel=1e-12
    )
    for k in (0, K - 1):
        residual = AffineHull(vertices[[i for i in range(K) if i != k]]).residual(vertices[k])
        found = residual / residual.dot(residual) * scale  # of the log of the distance to the others' hull
        exact = [g * scale for g in cayley_menger_gradient(vertices, k)]
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-9, atol=1e-11)


def test_the_residual_is_the_shortest_way_to_the_hull():
    vertices, point = simplex(4, P=40).float(), torch.randn(40, generator=torch.Generator().manual_seed(0))
    hull = AffineHull(vertices)
    residual = hull.residual(point, out=torch.empty(40))
    edges = (vertices[1:] - vertices[0]).double().numpy()
    best, *_ = np.linalg.lstsq(edges.T, (point - vertices[0]).double().numpy())
    np.testing.assert_allclose(residual.numpy(), (point - vertices[0]).numpy() - best @ edges, atol=2e-5)


def test_dirichlet_one_is_uniform_in_the_simplex():
    points = dirichlet(40_000, 3, np.random.default_rng(0)).double()
    torch.testing.assert_close(points.sum(1), torch.ones(40_000, dtype=torch.float64), atol=1e-6, rtol=0)
    # Uniform in a triangle: a coordinate is Beta(1, 2), with mean 1/3, variance 1/18 and P(c < x) = 1 - (1 - x)^2.
    assert points.mean(0).sub(1 / 3).abs().max() < 0.005
    assert points.var(0).sub(1 / 18).abs().max() < 0.001
    for x in (0.1, 0.5, 0.9):
        assert (points[:, 0] < x).double().mean().item() == pytest.approx(1 - (1 - x) ** 2, abs=0.01)


def test_concentration_moves_points_between_corners_and_centre():
    largest = [dirichlet(2000, 4, np.random.default_rng(0), a).amax(1).mean().item() for a in (0.1, 1, 10)]
    assert largest[0] > 0.83 > largest[1] > 0.4 > largest[2]
    assert torch.equal(dirichlet(3, 1, np.random.default_rng(0)), torch.ones(3, 1))


def test_dirichlet_refuses_what_is_no_distribution():
    for concentration in (0, -1, math.nan, math.inf):
        with pytest.raises(UsageError, match="concentration"):
            dirichlet(1, 3, np.random.default_rng(0), concentration)
    with pytest.raises(UsageError, match="0 vertices"):
        dirichlet(1, 0, np.random.default_rng(0))


def test_edge_lengths():
    vertices = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    assert edge_lengths(vertices).tolist() == [5.0, 4.0, 3.0]
