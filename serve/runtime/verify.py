"""Whether a bundle is complete and answers here as it did where it was exported. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.errors import ArtefactError, first_line
from ensembler.machine import available_cpus
from ensembler.serve.runtime.arrays import read_arrays
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.manifest import MERGED, PROBE, SINGLE, BundleManifest, read_bundle
from ensembler.serve.runtime.sessions import open_bundle, open_merged, open_session, providers
from ensembler.serve.runtime.strategies import Members
from ensembler.uncertainty import mean_probabilities, uncertainty

__all__ = ["TOLERANCE", "Verified", "single_difference", "verify_bundle"]

TOLERANCE = 1e-4  # the largest difference of a float32 probability from PyTorch's, where float32 computes it that well
# From the stored answers, on any machine.
_ALLOWED = {"float32": TOLERANCE, "tf32": 1e-2, "float16": 1e-2, "int8": 1e-1}


@dataclass(frozen=True)
class Verified:
    """The result of a verification that found no fault.

    Attributes:
        manifest: the bundle's.
        device: where its members ran.
        images: how many were compared.
        differences: (M,) each member's largest difference of a probability from the stored one, in the order in which
            members are asked. Stored are PyTorch's, or at a lower precision the member's own where it was exported.
        merged: the same of all members in one graph; ``None`` where the bundle has none.
        single: the same of the file that contains the whole ensemble, and of its mean and uncertainty.
        allowed: the largest difference that was accepted.
    """

    manifest: BundleManifest
    device: str
    images: int
    differences: list[float]
    merged: float | None
    single: float | None
    allowed: float


def verify_bundle(bundle: str | Path, key: str | Path | None = None) -> Verified:
    """Verify every byte of a bundle, run every member, and compare its answers with the stored ones.

    At a lower precision than float32, the answers may differ by more: processors round 8-bit products differently.

    Args:
        bundle: its folder.
        key: PEM file of the public key that it must be signed with.

    Raises:
        UsageError: no key there.
        ArtefactError: no bundle there, not signed with the key, a graph that cannot be opened or run, or a member that
            answers differently.
        CorruptError: a file is missing or changed; it is named.
    """
    bundle = Path(bundle)
    manifest = read_bundle(bundle, key)
    if manifest.calibration:
        calibration.read(bundle / manifest.calibration, manifest.run.sha256, len(manifest.classes))
    images, expected = _probe(bundle, manifest)
    threads, classes = available_cpus(), len(manifest.classes)
    together, scaled = MERGED in manifest.files, manifest.input == "float"
    ways = providers(GpuOptions(), manifest.precision == "tf32", manifest.members + together)
    merged = open_merged(bundle, manifest.layout, manifest.order, threads, ways) if together else None
    sessions = open_bundle(bundle, manifest, ways=ways)
    members = Members(sessions, threads, manifest.image_shape, classes, scaled, merged)
    try:
        found = members.ask(images)
        found_merged = None if merged is None else members.ask(images, "merged")
    except ArtefactError as error:
        raise ArtefactError(f"{bundle}: {error}") from error
    finally:
        members.close()
    allowed = max(_ALLOWED[manifest.precision], manifest.tolerance)
    differences = [float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)]
    for member, difference in zip(manifest.order, differences, strict=True):
        _check(f"member {member + 1} of {bundle} differs", difference, allowed)
    merged_difference = None if found_merged is None else float(np.abs(found_merged - expected).max())
    if merged_difference is not None:
        _check(f"the members of {bundle} in one graph differ", merged_difference, allowed)
    single = None
    if SINGLE in manifest.files:
        single = single_difference(bundle / SINGLE, images / np.float32(255) if scaled else images, expected)
        _check(f"{bundle / SINGLE} differs", single, allowed)
    return Verified(manifest, members.device, len(images), differences, merged_difference, single, allowed)


def single_difference(file: Path, images: NDArray[np.generic], expected: NDArray[np.floating]) -> float:
    """Return the largest difference of what one file of the whole ensemble says of images.

    Args:
        file: ONNX.
        images: (B, H, W, 3) as its graph takes them.
        expected: (M, B, C) the members' probabilities; the mean and the uncertainty are computed of those in the file.

    Raises:
        ArtefactError: it cannot be opened or run, or lacks an output.
    """
    session = open_session(file)
    try:
        values = session.run(None, {"images": images})
        found = dict(zip([output.name for output in session.get_outputs()], values, strict=True))
        members = found["members"].swapaxes(0, 1)
        computed = uncertainty(members)
        pairs = [
            (members, expected),
            (found["probabilities"], mean_probabilities(members)),
            (found["predictive_entropy"], computed.predictive_entropy),
            (found["expected_entropy"], computed.expected_entropy),
        ]
        if computed.mutual_information is not None:
            pairs.append((found["mutual_information"], computed.mutual_information))
        if any(a.shape != b.shape for a, b in pairs):
            raise ValueError("an output has another shape")
        return max(float(np.abs(a - b).max()) for a, b in pairs)
    except Exception as error:  # ONNX Runtime's, of any class
        raise ArtefactError(f"{file} cannot be run ({first_line(error)}): export the run again") from error


def _check(what: str, difference: float, allowed: float) -> None:
    if not difference <= allowed:  # NaN is refused, too
        raise ArtefactError(
            f"{what} by {difference:.1e} in a probability from the stored answer, more than {allowed:.0e}: export the "
            "run again on this machine"
        )


def _probe(bundle: Path, manifest: BundleManifest) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The stored images and answers (M, B, C), in the order in which members are asked."""
    try:
        arrays = read_arrays(bundle / PROBE)
        images, answers = arrays["images"], arrays["probabilities"]
        shape = (manifest.members, len(images), len(manifest.classes))
        if images.dtype != np.uint8 or images.shape[1:] != tuple(manifest.image_shape) or answers.shape != shape:
            raise ValueError(f"images {images.shape} and answers {answers.shape} are not of this bundle's members")
        return images, answers[manifest.order]
    except (OSError, ValueError, KeyError) as error:
        raise ArtefactError(f"{bundle / PROBE} cannot be read ({first_line(error)}): export the run again") from error
