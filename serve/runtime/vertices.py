"""The layout "vertices": one graph without weights, and the vertices that members' weights are made of. NumPy only.

``weights.npz`` names tensors by kind and by the graph's initialisers:

======================  =========  ================================================================================
``coefficients``        (M, K)     each member as a sum of the vertices
``vertex/NAME``         (K, ...)   the vertices' trained parameters
``buffer/NAME``         (M, ...)   each member's own: BatchNorm statistics cannot be combined
``shared/NAME``         (...)      the same for all members, such as frozen parameters and their BatchNorm statistics
======================  =========  ================================================================================

The graph declares these initialisers as external data, which ONNX Runtime takes from memory: no file is written for a
member, and no graph reaches protobuf's limit of 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler.errors import ArtefactError, UsageError, first_line
from ensembler.seeds import derive
from ensembler.serve.runtime.arrays import read_arrays
from ensembler.serve.runtime.manifest import WEIGHTS, BundleManifest, Simplexes
from ensembler.text import counted

__all__ = ["Vertices", "check_members", "further_coefficients"]

Array = NDArray[np.floating]


def check_members(bundle: Path, manifest: BundleManifest, wanted: int) -> None:
    """Refuse a number of members that a bundle neither holds nor can make, without opening any.

    Raises:
        UsageError: the message says how many there are, and how to have more.
    """
    if wanted < 1:
        raise UsageError(f"an ensemble needs at least one member, not {wanted}")
    if wanted <= manifest.members:
        return
    held = counted(manifest.members, "member")
    if manifest.layout == "members":
        raise UsageError(
            f"the bundle holds {held} and no vertices to make {wanted} of: ask for fewer, or export the run with "
            "--layout vertices"
        )
    if manifest.sampling is None:
        raise UsageError(
            f"the bundle holds {held} of a run by {manifest.method}, which draws no others: ask for at most "
            f"{manifest.members}, not {wanted}"
        )
    Vertices.load(bundle / WEIGHTS).check_further()


class Vertices:
    """K vertices, and the coefficients and buffers of M members.

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
        """Read a file that :meth:`save` wrote.

        Raises:
            ArtefactError: it is not one.
        """
        parts: dict[str, dict[str, Array]] = {"vertex": {}, "buffer": {}, "shared": {}}
        try:
            tensors = read_arrays(path)
            coefficients = tensors.pop("coefficients")
            rows = dict(zip(("buffer", "vertex"), coefficients.shape, strict=True))  # M, K
            for name, tensor in tensors.items():
                kind, _, initialiser = name.partition("/")
                parts[kind][initialiser] = tensor
                if kind in rows and tensor.shape[:1] != (rows[kind],):
                    raise ValueError(f"{name} has the shape {tensor.shape}, not {rows[kind]} rows")
        except (OSError, ValueError, KeyError) as error:
            raise ArtefactError(
                f"{path} holds no vertices that can be read ({first_line(error)}): export the run again"
            ) from error
        return cls(coefficients, parts["vertex"], parts["buffer"], parts["shared"])

    def save(self, path: Path) -> None:
        """Write everything to one ``.npz`` file."""
        tensors = {"coefficients": self.coefficients}
        for kind, part in (("vertex", self._vertices), ("buffer", self._buffers), ("shared", self._shared)):
            tensors |= {f"{kind}/{name}": tensor for name, tensor in part.items()}
        np.savez(path, **tensors)  # type: ignore[arg-type]  # no tensor has the name of a flag

    def member(self, index: int) -> dict[str, Array]:
        """Return the weights of one of the M members, by initialiser.

        Raises:
            ArtefactError: there is no such member.
        """
        if not 0 <= index < len(self.coefficients):
            raise ArtefactError(f"{WEIGHTS} has no member {index}: export the run again")
        own = self.at(self.coefficients[index]) if self._vertices else {}
        return own | {name: rows[index] for name, rows in self._buffers.items()} | self._shared

    def further(self, coefficients: Array) -> dict[str, Array]:
        """Return the weights of a new member, at coefficients (K,).

        Raises:
            As :meth:`check_further`.
        """
        self.check_further()
        return self.at(coefficients) | self._shared

    def check_further(self) -> None:
        """Refuse to make new members.

        Raises:
            UsageError: members have buffers of their own, which a new one could get only from training images.
        """
        if self._buffers:
            raise UsageError(
                "this bundle cannot make new members: their BatchNorm statistics, or other buffers, are found from the "
                "training images: export them with ensembler export --members"
            )

    def at(self, coefficients: Array) -> dict[str, Array]:
        """Return ``c @ V``, tensor by tensor, in float32 and rounded once to the vertices' type."""
        c = coefficients.astype(np.float32)
        return {
            name: np.asarray(np.tensordot(c, rows.astype(np.float32, copy=False), axes=1), dtype=rows.dtype)
            for name, rows in self._vertices.items()
        }


def further_coefficients(sampling: Simplexes, vertices: int, members: int, seed: int) -> Array:
    """Return coefficients (members, K) of new members, each Dirichlet in one of the simplexes.

    They come from another stream of random numbers than :meth:`ensembler.ensemble.Ensemble.sample`'s, so they never
    repeat the members that a bundle holds.

    Raises:
        ArtefactError: there are no such simplexes.
    """
    rows = [row for simplex in sampling.simplexes for row in simplex]
    if not all(sampling.simplexes) or not rows or min(rows) < 0 or max(rows) >= vertices:
        raise ArtefactError(f"the simplexes of this bundle are not of its {vertices} vertices: export the run again")
    rng = np.random.default_rng(derive(seed, "served members"))
    count = len(sampling.simplexes)
    chosen = np.arange(members) % count if sampling.weights is None else rng.choice(count, members, p=sampling.weights)
    coefficients = np.zeros((members, vertices), dtype=np.float32)
    for row, simplex in enumerate(sampling.simplexes[index] for index in chosen):
        coefficients[row, simplex] = rng.dirichlet([sampling.concentration] * len(simplex))
    return coefficients
