"""The layout "vertices": one graph without weights, and each member's weights made of the vertices. NumPy only.

``weights.npz`` names tensors by kind and by the graph's own initialisers:

======================  =========  ================================================================================
``coefficients``        (M, K)     each member as a sum of the vertices
``vertex/NAME``         (K, ...)   what is combined
``buffer/NAME``         (M, ...)   each member's own: BatchNorm's statistics belong to one point and are not combined
``shared/NAME``         (...)      every member's, such as frozen parameters
======================  =========  ================================================================================

In the graph, these initialisers are declared as external data, which ONNX Runtime takes from memory: no file of a
member is ever written, and no graph grows to protobuf's 2 GB.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, UsageError
from ensembler.seeds import derive
from ensembler.serve.runtime.manifest import Simplexes

__all__ = ["Vertices", "further_coefficients"]

Array = NDArray[np.floating]


class Vertices:
    """K vertices and what makes members of them.

    Args:
        coefficients: (M, K).
        vertices: initialiser to (K, ...).
        buffers: initialiser to (M, ...).
        shared: initialiser to (...).
    """

    def __init__(
        self,
        coefficients: Array,
        vertices: Mapping[str, Array],
        buffers: Mapping[str, Array],
        shared: Mapping[str, Array],
    ) -> None:
        self.coefficients = coefficients
        self._vertices, self._buffers, self._shared = dict(vertices), dict(buffers), dict(shared)

    @classmethod
    def load(cls, path: Path) -> Vertices:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: it is not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                tensors = {name: file[name] for name in file.files}
            coefficients = tensors.pop("coefficients")
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ArtefactError(f"{path} holds no vertices that can be read: export the run again") from error
        parts: dict[str, dict[str, Array]] = {"vertex": {}, "buffer": {}, "shared": {}}
        for name, tensor in tensors.items():
            kind, _, initialiser = name.partition("/")
            parts.setdefault(kind, {})[initialiser] = tensor
        return cls(coefficients, parts["vertex"], parts["buffer"], parts["shared"])

    def save(self, path: Path) -> None:
        """Write everything to one file of arrays."""
        tensors = {"coefficients": self.coefficients}
        for kind, part in (("vertex", self._vertices), ("buffer", self._buffers), ("shared", self._shared)):
            tensors |= {f"{kind}/{name}": tensor for name, tensor in part.items()}
        np.savez(path, **tensors)  # type: ignore[arg-type]  # its flags are positional nowhere here

    def member(self, index: int) -> dict[str, Array]:
        """The weights of one of the M members, by initialiser."""
        own = self.at(self.coefficients[index]) if self._vertices else {}
        return own | {name: rows[index] for name, rows in self._buffers.items()} | self._shared

    def further(self, coefficients: Array) -> dict[str, Array]:
        """The weights at a point of the vertices' span that no member has.

        Raises:
            UsageError: members have buffers of their own, which only training images can give a new one.
        """
        if self._buffers:
            raise UsageError(
                "this bundle cannot make new members: its networks have BatchNorm, whose statistics are found from the "
                "training images: export them with ensembler export --members"
            )
        return self.at(coefficients) | self._shared

    def at(self, coefficients: Array) -> dict[str, Array]:
        """``c @ V``, tensor by tensor, in float32 and rounded once to the vertices' own type."""
        c = coefficients.astype(np.float32)
        return {
            name: np.tensordot(c, rows.astype(np.float32, copy=False), axes=1).astype(rows.dtype, copy=False)
            for name, rows in self._vertices.items()
        }


def further_coefficients(sampling: Simplexes, vertices: int, members: int, seed: int) -> Array:
    """Coefficients (members, K) of new members, each Dirichlet in one of the simplexes, none at a corner.

    Their stream of random numbers is not the one that :meth:`ensembler.ensemble.Ensemble.sample` draws from, so that
    they never repeat the members that a bundle holds.
    """
    rng = np.random.default_rng(derive(seed, "served members"))
    count = len(sampling.simplexes)
    chosen = np.arange(members) % count if sampling.weights is None else rng.choice(count, members, p=sampling.weights)
    coefficients = np.zeros((members, vertices), dtype=np.float32)
    for row, simplex in enumerate(sampling.simplexes[index] for index in chosen):
        coefficients[row, simplex] = rng.dirichlet([sampling.concentration] * len(simplex))
    return coefficients
