"""Is a bundle whole, and does it answer here as it did where it was exported? No torch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.errors import ArtefactError
from ensembler.serve.runtime.machine import available_cpus
from ensembler.serve.runtime.manifest import MERGED, PROBE, BundleManifest, read_bundle
from ensembler.serve.runtime.sessions import open_members, open_merged
from ensembler.serve.runtime.strategies import Members

__all__ = ["TOLERANCE", "Verified", "verify_bundle"]

TOLERANCE = 1e-4  # the largest difference of a float32 probability from PyTorch's
_ELSEWHERE = {"float32": TOLERANCE, "float16": 1e-2, "int8": 1e-1}  # from the stored one, on any machine


@dataclass(frozen=True)
class Verified:
    """What was found of a bundle that is as it should be.

    Attributes:
        manifest: the bundle's.
        device: where its members ran.
        images: of the probe; 0 for bundles of format 1, which have none: their members ran, and no more is known.
        differences: (M,) each member's largest difference of a probability from the stored one, in the order in which
            members are asked. Stored are PyTorch's, or, in fewer bits, the member's own where it was exported.
        merged: the same of all members in one graph; ``None`` where the bundle has none.
        allowed: the largest difference that was accepted.
    """

    manifest: BundleManifest
    device: str
    images: int
    differences: list[float]
    merged: float | None
    allowed: float


def verify_bundle(bundle: str | Path) -> Verified:
    """Verify every byte of a bundle, open every member, run it, and compare its answers with the stored ones.

    In float32 these are PyTorch's. In fewer bits they are the members' own, as exported, and may differ by more:
    processors round 8-bit products in their own ways.

    Raises:
        ArtefactError: no bundle there, a graph that cannot be opened or run, or a member that answers otherwise.
        CorruptError: a file of it is missing or has changed; it is named.
    """
    bundle = Path(bundle)
    manifest = read_bundle(bundle)
    if manifest.calibration:
        calibration.read(bundle / manifest.calibration, manifest.run.sha256)
    images, expected = _probe(bundle, manifest)
    threads = available_cpus()
    merged = open_merged(bundle, manifest, threads) if MERGED in manifest.files else None
    sessions, classes = open_members(bundle, manifest), len(manifest.classes)
    members = Members(sessions, threads, manifest.image_shape, classes, manifest.input == "float", merged)
    allowed = _ELSEWHERE[manifest.precision]
    try:
        found = members.ask(images)
        together = members.ask(images, "merged") if merged is not None else None
    except Exception as error:  # ONNX Runtime's, of any class
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"a member of {bundle} cannot be run: {reason}: export the run again") from error
    finally:
        members.close()
    differences = [
        float(np.abs(a - b).max()) for a, b in zip(found, found if expected is None else expected, strict=True)
    ]
    for place, difference in enumerate(differences):
        if not difference <= allowed:  # not a number is refused too
            raise ArtefactError(
                f"member {manifest.order[place]} of {bundle} differs by {difference:.1e} in a probability from "
                f"what it must answer, more than {allowed:.0e}: export the run again on this machine"
            )
    apart = None if together is None else float(np.abs(together - (found if expected is None else expected)).max())
    if apart is not None and not apart <= allowed:
        raise ArtefactError(
            f"the members of {bundle} in one graph differ by {apart:.1e} in a probability from what they must "
            f"answer, more than {allowed:.0e}: export the run again on this machine"
        )
    return Verified(manifest, members.device, 0 if expected is None else len(images), differences, apart, allowed)


def _probe(bundle: Path, manifest: BundleManifest) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """The stored images, and what each member should say of them (M, B, C), in the order in which members are asked."""
    if PROBE not in manifest.files:
        return np.zeros((1, *manifest.image_shape), dtype=np.uint8), None
    try:
        with np.load(bundle / PROBE, allow_pickle=False) as file:
            return file["images"], file["probabilities"][manifest.order]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ArtefactError(f"{bundle / PROBE} cannot be read: export the run again") from error
