"""Out-of-distribution images: another dataset's, a folder's, or noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ensembler.data import datasets
from ensembler.data.decoded import DecodedSplit, find_unreadable
from ensembler.data.decoding import suffixes
from ensembler.data.folders import describe, find_images, split_folder
from ensembler.data.images import FileSplit, Split, resized
from ensembler.errors import DataError, UsageError
from ensembler.eval.shift.test_set import Source, TestSet, check_images
from ensembler.seeds import derive, generator

__all__ = ["NOISES", "load_ood", "noise_images"]

NOISES = ("gaussian", "uniform", "constant")

_EXAMPLES = 10_000  # of noise


def load_ood(
    name: str,
    shape: tuple[int, int],
    *,
    root: str | Path | None = None,
    download: bool = False,
    examples: int | None = None,
    seed: int = 0,
    corrupt: str = "refuse",
) -> TestSet:
    """Load images that a network was not trained on, at its image size.

    That they have no class in common with the training images is not checked.

    Args:
        name: ``noise:KIND`` of :data:`NOISES`; ``folder:PATH``: every image in the folder and below, sorted by class or
            not, or those in its ``test/`` where it has ``train/`` and ``test/``, also named as
            :mod:`ensembler.data.folders` knows them; or another dataset of :data:`ensembler.data.datasets.NAMES`, of
            which the test images are taken.
        shape: (H, W) to bring them to by a plain bilinear resize, whatever their proportions.
        root, download: of a dataset's files, see :func:`ensembler.data.datasets.load`.
        examples: how many, drawn with the seed where there are more; by default all, and of noise 10,000.
        seed: of the choice, and of noise.
        corrupt: ``"refuse"`` images of a folder that cannot be read, or ``"skip"`` them; the title then counts them.

    Raises:
        UsageError: an unknown name, or an option out of range.
        DataError: files missing or malformed, or too many images to hold.
    """
    if examples is not None and examples < 1:
        raise UsageError(f"give at least 1 example out of distribution, not {examples}")
    if name.startswith("noise:"):
        kind = name.removeprefix("noise:")
        images = noise_images(kind, examples or _EXAMPLES, shape, seed)
        return _test_set(name, f"{kind} noise (generated, seed {seed})", images, "generated")
    if name.startswith("folder:"):
        folder = Path(name.removeprefix("folder:")).expanduser().resolve()
        files, skipped = _folder(folder, corrupt == "skip")
        split = FileSplit(folder, files, torch.zeros(len(files), dtype=torch.int64), shape)
        chosen = split.part(_some(len(split), examples, seed))
        chosen.check_memory()
        title = f"images of {folder.name}" + f" ({skipped} unreadable left out)" * (skipped > 0)
        return _test_set(f"folder:{folder}", title, DecodedSplit(chosen, "out-of-distribution").images, "folder")
    dataset = datasets.load(name, root, download=download)
    check_images(dataset, "--ood")
    images = dataset.test[_some(len(dataset.test), examples, seed)].images
    return _test_set(dataset.name, f"{dataset.title}, test images", resized(images, shape), "dataset")


def noise_images(kind: str, count: int, shape: tuple[int, int], seed: int = 0) -> Tensor:
    """Draw images of noise; image i depends only on the seed, the kind, the shape and i.

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


def _test_set(name: str, title: str, images: Tensor, source: Source) -> TestSet:
    labels = torch.full((len(images),), -1)  # no class is right
    return TestSet(name, title, Split(images, labels), "ood", source=source)


def _folder(folder: Path, skip: bool) -> tuple[tuple[str, ...], int]:
    """Return the names of a folder's images, and how many are left out as they cannot be read."""
    part = split_folder(folder, "test")
    paths, left_out = find_images(part)
    if not paths:
        held = f"; it holds {describe(left_out)}" if left_out else ""
        raise DataError(
            f"{part} holds no image that is read ({', '.join(sorted(suffixes()))}){held}: name a folder of images"
        )
    files = [path.relative_to(folder).as_posix() for path in paths]
    bad = find_unreadable(folder, files) if skip else set()
    if len(bad) == len(paths):
        raise DataError(f"none of the {len(paths)} images in {part} can be read: repair or remove them")
    return tuple(file for file in files if file not in bad), len(bad)


def _some(available: int, examples: int | None, seed: int) -> Tensor:
    """Return the indices of the images, in order."""
    if examples is None or examples >= available:
        return torch.arange(available)
    return torch.randperm(available, generator=generator(seed, "ood"))[:examples].sort().values
