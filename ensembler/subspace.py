"""Vertices and coefficients: the mathematics of weight-space ensembles.

An ensemble is ``members = C @ V`` with vertices ``V`` (K, P) and coefficients ``C`` (M, K). Nothing here knows what a
network is.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ensembler.errors import ShapeError, UsageError

__all__ = ["CURVES", "AffineHull", "bezier", "chain", "dirichlet", "edge_lengths", "log_volume"]

_CHUNK = 1 << 22  # columns of V converted to float64 at a time: limits the memory of a Gram matrix


def dirichlet(members: int, vertices: int, rng: np.random.Generator, concentration: float = 1.0) -> Tensor:
    """Draw barycentric coordinates from a symmetric Dirichlet distribution.

    ``concentration = 1`` is uniform in the simplex (Benton et al. 2021, sec. 4); below 1 favours the corners, above 1
    the centre.

    Args:
        members: M >= 0, the number of points.
        vertices: K >= 1.
        rng: the generator to draw from.
        concentration: > 0.

    Returns:
        (M, K) float32, rows non-negative with sum 1.

    Raises:
        UsageError: an argument is out of range.
    """
    if vertices < 1 or members < 0:
        raise UsageError(f"cannot draw {members} points in a simplex of {vertices} vertices")
    if not 0 < concentration < math.inf:
        raise UsageError(f"the concentration of a Dirichlet must be positive and finite, not {concentration}")
    return torch.from_numpy(rng.dirichlet([concentration] * vertices, size=members)).float()


def bezier(t: Tensor, vertices: int) -> Tensor:
    """Compute the basis of a Bezier curve of K vertices: ``binomial(K-1, k) t^k (1-t)^(K-1-k)``.

    For K = 3 the curve is ``(1-t)^2 w1 + 2 t (1-t) theta + t^2 w2`` (Garipov et al. 2018, sec. 3.2).

    Args:
        t: (M,) in [0, 1].
        vertices: K >= 2.

    Returns:
        (M, K), rows non-negative with sum 1.
    """
    n = vertices - 1
    return torch.stack([math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(vertices)], dim=1)


def chain(t: Tensor, vertices: int) -> Tensor:
    """Compute the basis of a polygonal chain through K vertices, whose segments have equal shares of [0, 1].

    For K = 3 the chain is ``2 (t theta + (0.5 - t) w1)`` up to t = 1/2, then ``2 ((t - 0.5) w2 + (1 - t) theta)``
    (Garipov et al. 2018, sec. 3.2). Arguments and result as in :func:`bezier`.
    """
    places = torch.arange(vertices, dtype=t.dtype)
    return (1 - (t[:, None] * (vertices - 1) - places).abs()).clamp_min(0)


CURVES = {"bezier": bezier, "chain": chain}


def edge_lengths(vertices: Tensor) -> Tensor:
    """Compute the Euclidean distances between all pairs of vertices.

    Args:
        vertices: (K, P) float.

    Returns:
        (K * (K - 1) / 2,) float64, in the order (0, 1), (0, 2), ..., (K - 2, K - 1).
    """
    _check_vertices(vertices, least=1)
    pairs = torch.combinations(torch.arange(len(vertices)), 2)
    lengths = [torch.linalg.vector_norm(vertices[i] - vertices[j], dtype=torch.float64) for i, j in pairs]
    return torch.stack(lengths).cpu() if lengths else torch.empty(0, dtype=torch.float64)


def log_volume(vertices: Tensor) -> Tensor:
    """Compute the log of the simplex's (K-1)-dimensional volume.

    ``log vol = 1/2 * logdet(E @ E.T) - log((K-1)!)`` with the edge matrix ``E = V[1:] - V[0]``: the same number as
    the Cayley-Menger determinant, without its overflow and underflow (Benton et al. 2021, sec. 4). Edges are first
    scaled to unit length, so that only the angles between them enter the determinant.

    Args:
        vertices: (K, P) float, K >= 2.

    Returns:
        Scalar, float64; ``-inf`` if the vertices are affinely dependent (to about 1e-7, relative).

    Raises:
        ShapeError: fewer than two vertices, or more than P + 1.
    """
    _check_vertices(vertices)
    log_lengths, cosines = _edge_geometry(vertices)
    eigenvalues = torch.linalg.eigvalsh(cosines)
    edges = len(cosines)
    if not torch.isfinite(log_lengths).all() or eigenvalues[0] <= 8 * edges * torch.finfo(torch.float64).eps:
        return torch.tensor(-math.inf, dtype=torch.float64)
    return log_lengths.sum() + eigenvalues.log().sum() / 2 - math.lgamma(edges + 1)


class AffineHull:
    """The affine hull of fixed vertices, and the distance of a point from it.

    The edges' Gram matrix is inverted once, in float64; each query then costs two passes over the vertices.

    Args:
        vertices: (K, P) float, K >= 1; not copied.
    """

    def __init__(self, vertices: Tensor) -> None:
        _check_vertices(vertices, least=1)
        self._origin, self._rest = vertices[0], vertices[1:]
        if len(self._rest):
            log_lengths, cosines = _edge_geometry(vertices)
            lengths = log_lengths.exp().to(vertices.device)
            self._scale = torch.where(lengths > 0, 1 / lengths, 0.0)
            self._inverse = torch.linalg.pinv(cosines, hermitian=True).to(vertices.device)

    def residual(self, point: Tensor, out: Tensor | None = None) -> Tensor:
        """Compute the vector from the hull's nearest point to ``point``; its length is the distance.

        Args:
            point: (P,).
            out: (P,), where to write the result, so that nothing of size P is allocated.
        """
        residual = torch.sub(point, self._origin, out=out)
        if not len(self._rest):
            return residual
        # The edges E = rest - origin are never formed: E @ e = rest @ e - origin . e.
        projections = (self._rest @ residual - self._origin.dot(residual)).double()
        weights = (self._scale * (self._inverse @ (self._scale * projections))).to(residual.dtype)
        return residual.addmv_(self._rest.T, weights, alpha=-1).addcmul_(self._origin, weights.sum())


def _edge_geometry(vertices: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log lengths (K-1,) of the edges from vertex 0 and their cosines (K-1, K-1); float64, on the CPU."""
    origin, rest = vertices[0], vertices[1:]
    largest = torch.stack([(row - origin).abs().amax().double() for row in rest])
    scale = torch.where(largest > 0, largest, 1.0)
    gram = torch.zeros(len(rest), len(rest), dtype=torch.float64, device=vertices.device)
    for start in range(0, vertices.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        edges = (rest[:, columns].double() - origin[columns].double()) / scale[:, None]
        gram += edges @ edges.T
    lengths = gram.diagonal().sqrt()
    unit = torch.where(lengths > 0, lengths, 1.0)
    return (lengths.log() + scale.log()).cpu(), (gram / unit / unit[:, None]).cpu()


def _check_vertices(vertices: Tensor, least: int = 2) -> None:
    if vertices.dim() != 2 or not vertices.is_floating_point():
        found = f"{tuple(vertices.shape)} of {vertices.dtype}"
        raise ShapeError(f"expected vertices (K, P) of a floating-point type, found {found}")
    K, P = vertices.shape
    if not least <= K <= P + 1:
        raise ShapeError(f"a simplex needs {least} to P + 1 = {P + 1} vertices, found {K}")
