"""Whether exported members give PyTorch's probabilities."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import ExportError
from ensembler.seeds import derive
from ensembler.serve.export.reasons import unfit
from ensembler.serve.runtime.manifest import PROBE, Precision
from ensembler.serve.runtime.strategies import Members
from ensembler.serve.runtime.verify import TOLERANCE

__all__ = ["BATCHES", "Agreement", "check_merged", "compare", "patches"]

_ROUNDING = 10  # times what float32 itself costs PyTorch: ONNX Runtime rounds as often, elsewhere

BATCHES = (1, 2, 7)  # a graph whose batch was fixed by tracing fails at two of them at least


@dataclass(frozen=True)
class Agreement:
    """The result of a comparison with PyTorch.

    Attributes:
        max_difference: the largest difference of any member's probability.
        tolerance: the largest that was accepted.
        compared_on: the images, in words.
    """

    max_difference: float
    tolerance: float
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
        precision: of the exported members; only float32 is held to a bound here: ``TOLERANCE``, or where PyTorch in
            float32 itself differs from PyTorch in float64 on these images, a small multiple of that.
        test: (B, H, W, 3) images of the dataset.

    Raises:
        ExportError: a member that differs; it is named.
    """
    count, exact = sum(BATCHES), precision == "float32"
    probe = patches(ensemble.run.manifest.dataset.shape, count)
    sets = {"test images": test[:count]} if test is not None and len(test) >= count else {}
    sets |= {"seeded patches": probe} if exact or not sets else {}
    largest, tolerance, expected = 0.0, TOLERANCE, np.empty(0, np.float32)
    for images in sets.values():
        expected = ensemble.predict_members(images).numpy()
        for member in range(len(opened)):
            try:
                difference, batch = _difference(opened, member, images, expected[member])
            except ExportError as error:
                raise ExportError(f"member {member + 1}: {error}") from error
            if exact and difference > TOLERANCE:
                tolerance = max(tolerance, _ROUNDING * _rounding(ensemble, member, images, expected[member]))
            if exact and difference > tolerance:
                raise ExportError(
                    f"member {member + 1}: ONNX differs from PyTorch by {difference:.1e} in a probability at a "
                    f"batch of {batch}, more than {tolerance:.0e}: the network computes something that ONNX does not "
                    "reproduce"
                )
            largest = max(largest, difference)
    np.savez(folder / PROBE, images=probe, probabilities=expected if exact else opened.ask(probe))
    return Agreement(largest, tolerance, list(sets))


def check_merged(opened: Members, images: NDArray[np.uint8], tolerance: float) -> None:
    """Compare the graph of all members with the members, which may differ by at most ``tolerance``.

    Raises:
        ExportError: it differs.
    """
    few = images[: sum(BATCHES)]
    difference = float(np.abs(opened.ask(few, "merged") - opened.ask(few)).max())
    if not difference <= tolerance:
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
    opened: Members, member: int, images: NDArray[np.uint8], expected: NDArray[np.float32]
) -> tuple[float, int]:
    """Return the largest difference of a probability between one member and PyTorch, and at which batch size."""
    differences: list[tuple[float, int]] = []
    start = 0
    for batch in BATCHES:
        part = slice(start, start + batch)
        try:
            found = opened.ask(images[part], "loop", member, member + 1)[0]
        except Exception as error:
            raise ExportError(unfit(error)) from error
        difference = float(np.abs(found - expected[part]).max())
        if np.isnan(difference):
            raise ExportError(
                f"ONNX Runtime answers with NaN at a batch of {batch}, where PyTorch does not: look in its forward for "
                "what overflows, or an infinity that is multiplied by zero"
            )
        differences.append((difference, batch))
        start += batch
    return max(differences, key=lambda found: found[0])


def _rounding(ensemble: Ensemble, member: int, images: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """Largest difference between PyTorch's probabilities in float32 and in float64; 0 where it cannot be computed.

    Logits of 1e5, as small networks give for images unlike the few that they were trained on, are rounded to steps that
    change whole probabilities: no two programs agree on them.
    """
    record = ensemble.run_of(member).manifest.dataset
    inputs = normalise(torch.from_numpy(images), record.mean, record.std)
    try:
        twin = copy.deepcopy(ensemble.network(member)).cpu().double()
        with torch.no_grad():
            exact = twin(inputs.double()).softmax(dim=-1).numpy()
    except RuntimeError:  # a type of its own somewhere inside
        return 0.0
    rounding = float(np.abs(exact - expected).max())
    return rounding if np.isfinite(rounding) else 0.0
