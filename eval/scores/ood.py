"""Can an ensemble tell images unlike any that it was trained on? Detectors, their scores, and such images.

A detector is one number an image that should be larger out of distribution. Out of distribution is the positive class
everywhere but in ``aupr_in``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ensembler import datasets
from ensembler.errors import DataError, ShapeError, UsageError
from ensembler.images import FileSplit
from ensembler.record import Record
from ensembler.seeds import derive, generator
from ensembler.uncertainty import entropy

__all__ = [
    "DETECTORS",
    "NOISES",
    "OodImages",
    "OodScores",
    "detector_scores",
    "detectors",
    "load_ood",
    "noise_images",
    "ood_scores",
]

Array = NDArray[np.float64]

DETECTORS = ("predictive_entropy", "mutual_information", "one_minus_max")
NOISES = ("gaussian", "uniform", "constant")

_TRUE_POSITIVES = 0.95
_EXAMPLES = 10_000


class OodScores(Record):
    """How well one detector tells images out of distribution from images in distribution.

    Attributes:
        auroc: the probability that an image out of distribution has the higher value; of a tie, half.
        aupr_out: average precision with out of distribution as the positive class (scikit-learn's, no interpolation).
        aupr_in: average precision with in distribution as the positive class, found by low values.
        fpr_at_95: the share of the images *in* distribution that are flagged at the highest threshold that flags at
            least 95 % of those *out* of it. Lower is better. Papers that call in distribution positive report another
            number by this name.
        examples_in, examples_out: how many images. Both average precisions depend on their ratio: a detector that knows
            nothing gets the positive class's share.
    """

    auroc: float
    aupr_out: float
    aupr_in: float
    fpr_at_95: float
    examples_in: int
    examples_out: int


def detectors(mean: NDArray[np.floating], expected_entropy: NDArray[np.floating] | None) -> dict[str, Array | None]:
    """The three detectors' values of each image, by their names in :data:`DETECTORS`.

    Args:
        mean: (B, C) the members' mean probabilities.
        expected_entropy: (B,) the mean of the members' own entropies, in nats; ``None`` where M = 1, whose mutual
            information is not known: it is then ``None``.

    Returns:
        (B,) each: the entropy of the mean (nats); that less the expected entropy, at least 0 (nats); 1 less the largest
        probability (Hendrycks & Gimpel 2017, https://arxiv.org/abs/1610.02136).
    """
    total = entropy(mean)
    return {
        "predictive_entropy": total,
        "mutual_information": None if expected_entropy is None else np.maximum(total - expected_entropy, 0.0),
        "one_minus_max": 1.0 - np.minimum(np.asarray(mean).max(axis=1), 1.0).astype(np.float64),
    }


def detector_scores(
    inside: Mapping[str, Array | None], outside: Mapping[str, Array | None]
) -> dict[str, OodScores | None]:
    """:func:`ood_scores` of every detector; ``None`` where it is ``None`` (M = 1).

    Args:
        inside, outside: what :func:`detectors` gives for images in and out of distribution.
    """
    found: dict[str, OodScores | None] = {}
    for name in DETECTORS:
        one, other = inside[name], outside[name]
        found[name] = None if one is None or other is None else ood_scores(one, other)
    return found


def ood_scores(uncertainty_in: NDArray[np.floating], uncertainty_out: NDArray[np.floating]) -> OodScores:
    """The scores of one detector.

    Args:
        uncertainty_in: (B,) its values of images in distribution.
        uncertainty_out: (B',) of images out of distribution, which should be larger.

    Raises:
        ShapeError: empty, not one number an image, or not finite.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    inside, outside = (_finite(values, n) for values, n in ((uncertainty_in, "in"), (uncertainty_out, "out")))
    values = np.concatenate([inside, outside])
    is_out = np.arange(len(values)) >= len(inside)
    # With drop_intermediate, the points left out could be the one that reaches 95 %.
    false, true, _ = roc_curve(is_out, values, drop_intermediate=False)
    return OodScores(
        auroc=float(roc_auc_score(is_out, values)),
        aupr_out=float(average_precision_score(is_out, values)),
        aupr_in=float(average_precision_score(~is_out, -values)),
        fpr_at_95=float(false[np.argmax(true >= _TRUE_POSITIVES)]),
        examples_in=len(inside),
        examples_out=len(outside),
    )


def _finite(values: NDArray[np.floating], which: str) -> Array:
    found = np.asarray(values)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise ShapeError(
            f"uncertainty_{which} must be finite numbers, one an image, at least one, found {found.dtype} {found.shape}"
            + (" with NaN or infinity" if found.ndim == 1 and len(found) and found.dtype.kind == "f" else "")
        )
    return found.astype(np.float64)


# --- images ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OodImages:
    """Images out of distribution, at a network's size.

    Attributes:
        name: as the user asked for them.
        title: as a report should call them.
        source: where they are from: a named ``"dataset"``'s test images, a ``"folder"``, or ``"generated"`` here.
        images: (N, H, W, 3) uint8.
    """

    name: str
    title: str
    source: Literal["dataset", "folder", "generated"]
    images: Tensor


def load_ood(
    name: str,
    shape: tuple[int, int],
    *,
    root: Path | None = None,
    download: bool = False,
    examples: int | None = None,
    seed: int = 0,
) -> OodImages:
    """Images that a network was not trained on.

    Nothing here knows what it *was* trained on: that the two have no class in common is the caller's to see to.

    Args:
        name: ``noise:KIND`` of :data:`NOISES`; ``folder:PATH``: every image in the folder and below, sorted by class or
            not, or those in its ``test/`` where it has ``train/`` and ``test/``; or another dataset of
            :data:`ensembler.datasets.NAMES`, of which the test images are taken.
        shape: (H, W) to bring them to by a plain bilinear resize, whatever their proportions.
        root, download: of a dataset's files, see :func:`ensembler.datasets.load`.
        examples: how many, drawn with the seed where there are more; by default all, and of noise 10,000.
        seed: of the choice, and of noise.

    Raises:
        UsageError: an unknown name, or an option out of range.
        DataError: files missing or malformed, or too many images to hold.
    """
    if examples is not None and examples < 1:
        raise UsageError(f"give at least 1 example out of distribution, not {examples}")
    if name.startswith("noise:"):
        kind = name.removeprefix("noise:")
        images = noise_images(kind, examples or _EXAMPLES, shape, seed)
        return OodImages(name, f"{kind} noise (generated, seed {seed})", "generated", images)
    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser().resolve()
        split = _folder(folder, shape)
        chosen = split[_some(len(split), examples, seed)]
        return OodImages(f"folder:{folder}", f"images of {folder.name}", "folder", chosen.images)
    dataset = datasets.load(name, root, download=download)
    images = dataset.test[_some(len(dataset.test), examples, seed)].images
    return OodImages(dataset.name, f"{dataset.title}, test images", "dataset", _resized(images, shape))


def noise_images(kind: str, count: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Images of noise: image i depends on the seed, the kind, the shape and i alone.

    Args:
        kind: ``"gaussian"``: each byte of N(0.5, 1), clipped to [0, 1]; ``"uniform"``: each byte uniform (both as in
            Liang et al. 2018, https://arxiv.org/abs/1706.02690); ``"constant"``: one uniform colour an image.
        count: N, at least 1.
        shape: (H, W).
        seed: any integer.

    Returns:
        (N, H, W, 3) uint8.

    Raises:
        UsageError: an unknown kind, no image, or no pixel.
    """
    if kind not in NOISES:
        raise UsageError(f"unknown noise {kind!r}: use one of {', '.join(NOISES)}")
    if count < 1 or min(shape) < 1:
        raise UsageError(f"noise takes at least 1 image of at least 1 x 1 pixels, not {count} of {shape}")
    images = np.empty((count, *shape, 3), dtype=np.uint8)
    for index, image in enumerate(images):
        rng = np.random.default_rng(derive(seed, "noise", kind, index))
        if kind == "gaussian":
            image[:] = np.rint(255 * np.clip(rng.normal(0.5, 1.0, image.shape), 0.0, 1.0))
        else:
            image[:] = rng.integers(0, 256, image.shape if kind == "uniform" else 3, dtype=np.uint8)
    return torch.from_numpy(images)


def _folder(folder: Path, shape: tuple[int, int]) -> FileSplit:
    if not folder.is_dir():
        raise DataError(f"no folder of images at {folder}")
    part = folder / "test" if (folder / "train").is_dir() and (folder / "test").is_dir() else folder
    files = sorted(path for path in part.rglob("*") if path.suffix.lower() in datasets.IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{part} holds no image ({', '.join(sorted(datasets.IMAGE_SUFFIXES))})")
    names = tuple(path.relative_to(folder).as_posix() for path in files)
    return FileSplit(folder, names, torch.zeros(len(names), dtype=torch.int64), shape)


def _some(available: int, examples: int | None, seed: int) -> Tensor:
    """Which images, in their order."""
    if examples is None or examples >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=generator(seed, "ood"))[:examples].sort().values


def _resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    if tuple(images.shape[1:3]) == shape:
        return images
    parts = [
        resize(images[start : start + 1024].permute(0, 3, 1, 2), list(shape), antialias=True).permute(0, 2, 3, 1)
        for start in range(0, len(images), 1024)
    ]
    return torch.cat(parts).contiguous()
