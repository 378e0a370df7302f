"""Normalisation of a network's inputs: ``(pixel - mean) / std`` of each channel, pixels from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ensembler.errors import UsageError

if TYPE_CHECKING:
    from ensembler.data.datasets import Dataset

__all__ = ["NAMES", "describe", "normalised", "parse", "text"]

Moments = tuple[tuple[float, ...], tuple[float, ...]]

NAMES: dict[str, Moments] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,) * 3, (0.5,) * 3),
    "none": ((0.0,) * 3, (1.0,) * 3),
    "bytes": ((0.0,) * 3, (1 / 255,) * 3),
}
"""Mean and standard deviation by name: ImageNet's, (-1, 1) as of Inception, (0, 1) as of ToTensor, and 0 to 255."""


def parse(given: str) -> Moments:
    """Return the mean and standard deviation of a name, or of ``MEAN/STD`` with numbers separated by commas.

    Raises:
        UsageError: neither, or numbers out of range.
    """
    if given in NAMES:
        return NAMES[given]
    parts = given.split("/")
    try:
        mean, std = (tuple(float(number) for number in part.split(",")) for part in parts)
    except ValueError as error:
        raise UsageError(
            f"--normalisation must be {', '.join(NAMES)} or MEAN/STD such as 0.5,0.5,0.5/0.25,0.25,0.25, not {given!r}"
        ) from error
    for number in mean:
        if not -1 <= number <= 1:
            raise UsageError(f"--normalisation is of pixels from 0 to 1: divide the mean {number:g} by 255")
    for number in std:
        if not (0 < number <= 1 and math.isfinite(number)):
            raise UsageError(
                f"--normalisation is of pixels from 0 to 1: a std is above 0 and at most 1, not {number:g}"
            )
    return mean, std


def normalised(dataset: Dataset, given: str | None) -> Dataset:
    """Return a dataset with another normalisation; ``None`` keeps its own.

    Raises:
        UsageError: an unknown name, or another number of channels.
    """
    if given is None:
        return dataset
    mean, std = parse(given)
    if len(mean) != len(dataset.mean) or len(std) != len(dataset.std):
        raise UsageError(f"--normalisation needs {len(dataset.mean)} means and as many stds, not {given!r}")
    return replace(dataset, mean=mean, std=std)


def text(mean: Sequence[float], std: Sequence[float]) -> str:
    """Return what :func:`parse` reads: a name, or ``MEAN/STD``, exactly."""
    moments = tuple(mean), tuple(std)
    names = [name for name, known in NAMES.items() if known == moments]
    return names[0] if names else "/".join(",".join(map(repr, part)) for part in moments)


def describe(mean: Sequence[float], std: Sequence[float]) -> str:
    """Describe a normalisation in words."""
    return " and ".join(
        f"{name} {', '.join(f'{number:.4g}' for number in part)}" for name, part in (("mean", mean), ("std", std))
    )
