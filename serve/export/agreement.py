"""Whether exported members give PyTorch's probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler.ensemble import Ensemble
from ensembler.errors import ExportError
from ensembler.seeds import derive
from ensembler.serve.runtime.manifest import PROBE, Precision
from ensembler.serve.runtime.strategies import Members
from ensembler.serve.runtime.verify import TOLERANCE

__all__ = ["BATCHES", "Agreement", "check_merged", "compare", "patches"]

BATCHES = (1, 2, 7)  # a graph whose batch was fixed by tracing fails at two of them at least


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison with PyTorch.

    Attributes:
        max_difference: the largest difference of any member's probability.
        compared_on: the images, in words.
    """

    max_difference: float
    compared_on: list[str]


def compare(
    opened: Members, ensemble: Ensemble, folder: Path, precision: Precision, test: NDArray[np.uint8] | None
) -> Agreement:
    """Compare every member with PyTorch at each of :data:`BATCHES`, and write the probe that ``verify`` compares with.

    The probe holds PyTorch's answers, or at a lower precision the members' own: on images unlike the dataset's these
    may differ from PyTorch's by more than any fault that ``verify`` should find.

    Args:
        opened: the members as they will be served, in the ensemble's order.
        ensemble: in PyTorch.
        folder: of the bundle.
        precision: of the exported members; only float32 is held to a bound here.
        test: (B, H, W, 3) images of the dataset.

    Raises:
        ExportError: a member that differs; it is named.
    """
    count, exact = sum(BATCHES), precision == "float32"
    probe = patches(ensemble.run.manifest.dataset.shape, count)
    sets = {"test images": test[:count]} if test is not None and len(test) >= count else {}
    sets |= {"seeded patches": probe} if exact or not sets else {}
    largest, expected = 0.0, np.empty(0, np.float32)
    for images in sets.values():
        expected = ensemble.predict_members(images).numpy()
        for member in range(len(opened)):
            try:
                largest = max(largest, _difference(opened, member, images, expected[member], exact))
            except ExportError as error:
                raise ExportError(f"member {member}: {error}") from error
    np.savez(folder / PROBE, images=probe, probabilities=expected if exact else opened.ask(probe))
    return Agreement(largest, list(sets))


def check_merged(opened: Members, images: NDArray[np.uint8]) -> None:
    """Compare the graph of all members with the members.

    Raises:
        ExportError: it differs.
    """
    few = images[: sum(BATCHES)]
    difference = float(np.abs(opened.ask(few, "merged") - opened.ask(few)).max())
    if not difference <= TOLERANCE:
        raise ExportError(f"the members differ by {difference:.1e} when they run in one graph: export without --tune")


def patches(image_shape: list[int], count: int) -> NDArray[np.uint8]:
    """Return images (count, H, W, 3) for a comparison without a dataset: seeded coarse patches under fine noise.

    Agreement is a property of the graph, not of the data; the patches give the deeper layers large structures, where
    pure noise would be averaged away by the first layer.
    """
    height, width, channels = image_shape
    rng = np.random.default_rng(derive(0, "export"))
    coarse = rng.integers(0, 200, (count, 4, 4, channels))
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    noise = rng.integers(0, 56, (count, *image_shape))
    return (coarse[:, rows][:, :, columns] + noise).astype(np.uint8)


def _difference(
    opened: Members, member: int, images: NDArray[np.uint8], expected: NDArray[np.float32], exact: bool
) -> float:
    """Largest difference of a probability between one member and PyTorch, at each batch size."""
    largest, start = 0.0, 0
    for batch in BATCHES:
        part = slice(start, start + batch)
        try:
            found = opened.ask(images[part], "loop", member, member + 1)[0]
        except Exception as error:
            raise ExportError(f"the graph fails at a batch of {batch}: {str(error).splitlines()[0]}") from error
        difference = float(np.abs(found - expected[part]).max())
        if not difference <= (TOLERANCE if exact else 1.0):  # NaN is too large, too
            raise ExportError(
                f"ONNX differs from PyTorch by {difference:.1e} in a probability at a batch of {batch}, "
                f"more than {TOLERANCE:.0e}: the network computes something that ONNX does not reproduce"
            )
        largest, start = max(largest, difference), start + batch
    return largest
