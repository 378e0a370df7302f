"""Common image corruptions at the constants of CIFAR-10-C and ImageNet-C, on whole batches of bytes.

The nineteen corruptions and their five severities are those of Hendrycks & Dietterich 2019
(https://arxiv.org/abs/1903.12261); they follow the scripts with which the authors made CIFAR-10-C and ImageNet-C, which
work on ``x / 255``, clip to [0, 1], multiply by 255 and truncate to a byte. Where a function differs, its docstring
says so, and docs/corruptions.md says why.

The authors used no seed, so nothing generated here equals the published files, or may be reported as if it did. It is
reproducible: a random number depends only on (seed, corruption, severity, index of the image, position in the image),
and no sum depends on the rest of the batch, so a slice of a batch has the bytes that the whole batch would.

To add a corruption, write one function ``(images, level, keys) -> images`` and add its line to the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ensembler.errors import ShapeError, UsageError
from ensembler.eval.shift.pixels.blurs import defocus_blur, gaussian_blur, glass_blur, motion_blur, zoom_blur
from ensembler.eval.shift.pixels.digital import brightness, contrast, pixelate, saturate
from ensembler.eval.shift.pixels.jpeg import jpeg_compression
from ensembler.eval.shift.pixels.noise import gaussian_noise, image_keys, impulse_noise, shot_noise, speckle_noise
from ensembler.eval.shift.pixels.spatter import spatter
from ensembler.eval.shift.pixels.warps import elastic_transform
from ensembler.eval.shift.pixels.weather import fog, frost, snow

__all__ = [
    "AVAILABLE",
    "FAMILIES",
    "HEADLINE",
    "SEVERITIES",
    "VALIDATION",
    "Constants",
    "constants_for",
    "corrupt",
    "fingerprint",
]

FAMILIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "validation": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The families of Hendrycks & Dietterich 2019, and the four corruptions kept for validation, which no other mean
includes."""

VALIDATION = FAMILIES["validation"]
HEADLINE = tuple(name for family, names in FAMILIES.items() if family != "validation" for name in names)
AVAILABLE = HEADLINE + VALIDATION
SEVERITIES = (1, 2, 3, 4, 5)

Constants = Literal["cifar", "imagenet"]


class _Corruption(NamedTuple):
    """A corruption and its constants at severities 1 to 5, which each function's docstring explains."""

    apply: Callable[[Tensor, Any, Tensor], Tensor]
    cifar: tuple[Any, ...]
    imagenet: tuple[Any, ...]


_244 = 244 / 224  # the script writes 244 where it means 224 pixels

# fmt: off
_TABLE = {
    "gaussian_noise": _Corruption(gaussian_noise, (.04, .06, .08, .09, .10), (.08, .12, .18, .26, .38)),
    "shot_noise": _Corruption(shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": _Corruption(impulse_noise, (.01, .02, .03, .05, .07), (.03, .06, .09, .17, .27)),
    "speckle_noise": _Corruption(speckle_noise, (.06, .1, .12, .16, .2), (.15, .2, .35, .45, .6)),
    "gaussian_blur": _Corruption(gaussian_blur, (.4, .6, .7, .8, 1), (1, 2, 3, 4, 6)),
    "defocus_blur": _Corruption(  # radius, smoothing
        defocus_blur,
        ((.3, .4), (.4, .5), (.5, .6), (1, .2), (1.5, .1)),
        ((3, .1), (4, .5), (6, .5), (8, .5), (10, .5)),
    ),
    "glass_blur": _Corruption(  # sigma, reach, rounds
        glass_blur,
        ((.05, 1, 1), (.25, 1, 1), (.4, 1, 1), (.25, 1, 2), (.4, 1, 2)),
        ((.7, 1, 2), (.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": _Corruption(  # radius, sigma
        motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": _Corruption(  # stop, step
        zoom_blur,
        ((1.06, .01), (1.11, .01), (1.16, .01), (1.21, .01), (1.26, .01)),
        ((1.11, .01), (1.16, .01), (1.21, .02), (1.26, .02), (1.31, .03)),
    ),
    "snow": _Corruption(  # mean, deviation, zoom, threshold, radius, sigma, mix
        snow,
        ((.1, .2, 1, .6, 8, 3, .95), (.1, .2, 1, .5, 10, 4, .9), (.15, .3, 1.75, .55, 10, 4, .9),
         (.25, .3, 2.25, .6, 12, 6, .85), (.3, .3, 1.25, .65, 14, 12, .8)),
        ((.1, .3, 3, .5, 10, 4, .8), (.2, .3, 2, .5, 12, 4, .7), (.55, .3, 4, .9, 12, 8, .7),
         (.55, .3, 4.5, .85, 12, 8, .65), (.55, .3, 2.5, .85, 12, 12, .55)),
    ),
    "frost": _Corruption(  # image's share, frost's share, how much the photographs are shrunk
        frost,
        ((1, .2, 5), (1, .3, 5), (.9, .4, 5), (.85, .4, 5), (.75, .45, 5)),
        ((1, .4, 1), (.8, .6, 1), (.7, .7, 1), (.65, .7, 1), (.6, .75, 1)),
    ),
    "fog": _Corruption(  # weight, decay
        fog,
        ((.2, 3), (.5, 3), (.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "spatter": _Corruption(  # mean, deviation, sigma, threshold, strength, mud?
        spatter,
        ((.62, .1, .7, .7, .5, False), (.65, .1, .8, .7, .5, False), (.65, .3, 1, .69, .5, False),
         (.65, .1, .7, .69, .6, True), (.65, .1, .5, .68, .6, True)),
        ((.65, .3, 4, .69, .6, False), (.65, .3, 3, .68, .6, False), (.65, .3, 2, .68, .5, False),
         (.65, .3, 1, .65, 1.5, True), (.67, .4, 1, .65, 1.5, True)),
    ),
    "brightness": _Corruption(brightness, (.05, .1, .15, .2, .3), (.1, .2, .3, .4, .5)),
    "contrast": _Corruption(contrast, (.75, .5, .4, .3, .15), (.4, .3, .2, .1, .05)),
    "saturate": _Corruption(  # factor, shift
        saturate,
        ((.3, 0), (.1, 0), (1.5, 0), (2, .1), (2.5, .2)),
        ((.3, 0), (.1, 0), (2, 0), (5, .1), (20, .2)),
    ),
    "elastic_transform": _Corruption(  # alpha, sigma, jitter, in parts of the smaller side
        elastic_transform,
        ((0, 0, .08), (.05, .2, .07), (.08, .06, .06), (.1, .04, .05), (.1, .03, .03)),
        ((2 * _244, .7 * _244, .1 * _244), (2 * _244, .08 * _244, .2 * _244), (.05 * _244, .01 * _244, .02 * _244),
         (.07 * _244, .01 * _244, .02 * _244), (.12 * _244, .01 * _244, .02 * _244)),
    ),
    "pixelate": _Corruption(pixelate, (.95, .9, .85, .75, .65), (.6, .5, .4, .3, .25)),
    "jpeg_compression": _Corruption(jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
# fmt: on

_SMALLEST = 4  # pixels a side
_LARGE = 64  # pixels of the smaller side above which the constants are those of ImageNet-C
_CHUNK = {"cpu": 2**18, "cuda": 2**25}  # bytes processed at once: what fits a core's cache, or fills a GPU
# Larger chunks where the number of steps does not depend on the number of images.
_LARGER = {"motion_blur": 64, "snow": 128} | dict.fromkeys(
    ("frost", "fog", "contrast", "pixelate", "jpeg_compression"), 2
)


def corrupt(
    images: Tensor,
    corruption: str,
    severity: int,
    *,
    indices: Tensor | Sequence[int] | None = None,
    seed: int = 0,
    constants: Constants | None = None,
) -> Tensor:
    """Corrupt a batch of images.

    Args:
        images: (N, H, W, 3) uint8 on any device, H and W at least 4.
        corruption: one of ``AVAILABLE``.
        severity: 1 to 5.
        indices: (N,) integers, each image's position in the whole test set; 0 to N - 1 by default. Only what is drawn
            at random reads them.
        seed: any integer.
        constants: those of CIFAR-10-C (``"cifar"``), or of ImageNet-C (``"imagenet"``), which by default are taken
            where both sides have more than 64 pixels.

    Returns:
        (N, H, W, 3) uint8 on the same device; the input is left as it was.

    Raises:
        UsageError: an unknown corruption, severity or set of constants.
        ShapeError: images or indices of the wrong shape or type.
    """
    if corruption not in _TABLE:
        raise UsageError(f"corruption {corruption!r} is not available here; choose one of {', '.join(AVAILABLE)}")
    if severity not in SEVERITIES or not isinstance(severity, Integral) or isinstance(severity, bool):
        raise UsageError(f"severity {severity!r} of {corruption} does not exist; choose one of 1, 2, 3, 4, 5")
    if not isinstance(seed, Integral):
        raise UsageError(f"the seed must be a whole number, not {seed!r}")
    if constants not in (None, "cifar", "imagenet"):
        raise UsageError(f"constants {constants!r} do not exist; choose 'cifar', 'imagenet' or None")
    _check(images)
    positions = _positions(indices, len(images))
    found = _TABLE[corruption]
    chosen = constants or constants_for((images.shape[1], images.shape[2]))
    level = (found.imagenet if chosen == "imagenet" else found.cifar)[severity - 1]
    # Not every accelerator has the float64 and int64 arithmetic that makes the bytes the same everywhere.
    device = images.device if images.device.type in _CHUNK else torch.device("cpu")
    keys = image_keys(f"{seed:d}/{corruption}/{severity:d}", positions.to(device))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)

    def work(part: slice) -> None:
        out[part] = found.apply(images[part].to(device).contiguous(), level, keys[part]).to(out.device)

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    size = _CHUNK[device.type] * _LARGER.get(corruption, 1) // max(1, images[:1].numel())
    size = max(1, min(size, -(-len(images) // threads)))
    _side_by_side(work, [slice(start, start + size) for start in range(0, len(images), size)], threads)
    return out


def constants_for(shape: tuple[int, int]) -> Constants:
    """Return the constants that :func:`corrupt` uses by default for images of ``shape`` (H, W)."""
    return "imagenet" if min(shape) > _LARGE else "cifar"


def _side_by_side(work: Callable[[slice], None], parts: list[slice], threads: int) -> None:
    """Process the parts in threads: some operations have no threads of their own, others wait for theirs."""
    if threads == 1 or len(parts) == 1:
        for part in parts:
            work(part)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, parts))
    finally:
        torch.set_num_threads(threads)  # the workers set their own number, and with it that of threads yet to start


def fingerprint(corruption: str, severity: int, seed: int, shape: tuple[int, int]) -> str:
    """Hash eight fixed images of ``shape`` (H, W) after the corruption.

    It changes whenever a constant, the code or a library changes what a corruption does to them, and so tells a cache
    of predictions that the images behind it are no longer those that would be made.
    """
    height, width = shape
    places = torch.arange(8 * height * width * 3).view(8, height, width, 3)
    probe = ((places * 0x9E3779B1) >> 13 & 0x3F) + (torch.arange(8) * 24).view(8, 1, 1, 1)
    corrupted = corrupt(probe.to(torch.uint8), corruption, severity, seed=seed)
    return hashlib.sha256(corrupted.numpy().tobytes()).hexdigest()


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images must be a uint8 tensor (N, H, W, 3), found {found}; give the bytes 0 to 255")
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < _SMALLEST:
        raise ShapeError(
            f"images must be (N, H, W, 3) with H and W at least {_SMALLEST}, found {tuple(images.shape)}; "
            "put the channels last and repeat a single channel three times"
        )


def _positions(indices: Tensor | Sequence[int] | None, count: int) -> Tensor:
    """Return the positions of the images in the whole test set, (N,) int64."""
    if indices is None:
        return torch.arange(count)
    positions = torch.as_tensor(indices)
    if positions.dtype.is_floating_point or positions.dtype == torch.bool or positions.shape != (count,):
        raise ShapeError(
            f"indices must be {count} integers, one an image, found {positions.dtype} {tuple(positions.shape)}"
        )
    return positions.to(torch.int64)
