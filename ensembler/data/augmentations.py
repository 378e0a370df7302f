"""Augmentation by name: a random crop and flip, then a policy of torchvision's or a transform of your own.

``"crop-flip"`` is a crop alone; ``"crop-flip+trivialaugment"`` a crop followed by a policy, as their papers have it;
``"package.module:transform"`` a transform alone. A transform takes an image (3, H, W) uint8 and returns another one of
the same shape and type, as those of ``torchvision.transforms.v2`` do. It draws from the global generators of PyTorch,
NumPy or Python, which are seeded for each image: so what it draws is a function of the seed, the part, the epoch and
the example, in any process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ensembler.device import restored_generators, seed_generators
from ensembler.errors import UsageError
from ensembler.naming import import_object, is_importable, reason

__all__ = ["CROPS", "POLICIES", "check_augmentation", "check_repeatable", "resolve", "split", "transform"]

CROPS = ("crop-flip", "crop", "resized-crop-flip", "none")
POLICIES = ("trivialaugment", "randaugment", "autoaugment")

_SMALL = 64  # pixels a side up to which images are more like CIFAR-10's than ImageNet's


def split(augmentation: str) -> tuple[str, str | None]:
    """Return the crop, one of :data:`CROPS`, and the name of the transform that follows it, if one does."""
    crop, _, name = augmentation.partition("+")
    return (crop, name or None) if crop in CROPS else ("none", augmentation)


def resolve(asked: str | None, default: str) -> str:
    """Return the augmentation that is asked for; by default the dataset's, whose crop also precedes a policy."""
    if asked in POLICIES and default != "none":
        return f"{split(default)[0]}+{asked}"
    return asked or default


def check_augmentation(augmentation: str) -> None:
    """Refuse the name of no augmentation; a transform of one's own is not imported.

    Raises:
        UsageError: the message says what there is.
    """
    name = split(augmentation)[1]
    if (name or "none") not in (*POLICIES, "none") and not is_importable(str(name)):
        raise UsageError(
            f"unknown augmentation {augmentation!r}: use one of {', '.join(CROPS)}, {', '.join(POLICIES)}, or "
            "package.module:transform"
        )


def transform(images: Tensor, name: str, seeds: Tensor) -> Tensor:
    """Transform images (B, H, W, 3) uint8 one by one, on the CPU, each with its seed (B,).

    Returns:
        (B, H, W, 3) uint8, on the images' device.

    Raises:
        UsageError: the transform cannot be imported, fails, or returns something else than such an image.
    """
    host, own = images.cpu(), _find(name, max(images.shape[1:3]))
    found = torch.empty_like(host)
    with restored_generators():
        for place, (image, seed) in enumerate(zip(host, seeds.tolist(), strict=True)):
            seed_generators(seed)
            # A copy in the layout that the transform expects: the images themselves stay as they are.
            found[place] = _called(name, own, image.permute(2, 0, 1).contiguous()).permute(1, 2, 0)
    return found.to(images.device)


def check_repeatable(augmented: Callable[[], Tensor], augmentation: str) -> None:
    """Refuse a transform of one's own that makes different images of the same ones with the same seeds.

    Raises:
        UsageError: it does, or :func:`transform` raises it.
    """
    name = split(augmentation)[1]
    if name is None or name in POLICIES:
        return
    if not torch.equal(augmented(), augmented()):
        raise UsageError(
            f"the augmentation {name} makes another image of the same one with the same seed, so that no run could be "
            "repeated: draw from torch, numpy.random or random, not from a generator or counter of its own"
        )


def _called(name: str, own: Callable[[Tensor], Any], image: Tensor) -> Tensor:
    shape = tuple(image.shape)
    try:
        found = own(image)
    except Exception as error:  # whatever a user's code raises
        raise UsageError(f"the augmentation {name} fails on an image {shape} uint8: {reason(error)}") from error
    said = f"the augmentation {name}, given an image {shape} uint8, returns"
    if not isinstance(found, Tensor):
        raise UsageError(f"{said} a {type(found).__name__}, expected a tensor of that shape and type")
    if found.dtype != torch.uint8:
        kind = str(found.dtype).removeprefix("torch.")
        raise UsageError(f"{said} {kind}: leave out ToDtype and Normalize, images are normalised after it")
    if tuple(found.shape) != shape:
        raise UsageError(f"{said} {tuple(found.shape)}: end it with a Resize or crop to {shape[1:]}")
    return found


def _find(name: str, side: int) -> Callable[[Tensor], Any]:
    """Return a transform by its name, for images whose longer side has so many pixels."""
    if name in POLICIES:
        return _policy(name, side <= _SMALL)
    found = import_object(name, "augmentation")
    if isinstance(found, type) or not callable(found):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
        raise UsageError(f"the augmentation {name} is {what}, expected a function of an image, or an instance")
    function: Callable[[Tensor], Any] = found
    return function


@cache
def _policy(name: str, small: bool) -> Callable[[Tensor], Any]:
    """Return torchvision's policy: TrivialAugment (Wide; Müller & Hutter 2021), RandAugment (Cubuk et al. 2020) or
    AutoAugment (Cubuk et al. 2019), whose sub-policies are CIFAR-10's for small images and otherwise ImageNet's.
    """
    from torchvision.transforms import v2

    policies: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        "trivialaugment": v2.TrivialAugmentWide,
        "randaugment": v2.RandAugment,
        "autoaugment": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10 if small else v2.AutoAugmentPolicy.IMAGENET),
    }
    return policies[name]()
