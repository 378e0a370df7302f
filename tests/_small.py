"""A dataset small enough to train on in a second, and networks to match."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ensembler.data.datasets import Dataset, Split

NEWER = pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="PyTorch 2.8 cannot compute this")

SETTINGS = {"architecture": "tests._small:network", "epochs": 2, "batch_size": 8, "device": "cpu"}


class WithBatchNorm(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(4 * 3 * 3, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3, num_classes))


def noisy(num_classes: int) -> nn.Module:
    """BatchNorm and dropout: buffers and random numbers, all that a checkpoint must hold."""
    return nn.Sequential(WithBatchNorm(8), nn.Dropout(0.3), nn.Linear(8, num_classes))


def dropout(num_classes: int) -> nn.Module:
    return nn.Sequential(network(8), nn.Dropout(0.3), nn.Linear(8, num_classes))


def layernorm(num_classes: int) -> nn.Module:
    return nn.Sequential(network(8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, num_classes))


def channels_last(num_classes: int) -> nn.Module:
    return WithBatchNorm(num_classes).to(memory_format=torch.channels_last)


class ReadingAValue(nn.Module):
    """Decides on the host by what is in the images, which no graph can."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = WithBatchNorm(num_classes)

    def forward(self, x):
        outputs = self.network(x)
        return outputs * 2 if x.mean() > 0 else outputs


class DroppingALayer(nn.Module):
    """Leaves a layer out as Python's random numbers have it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8 * 8 * 3, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        if not self.training or random.random() < 0.5:
            x = x + self.second(x).relu()
        return self.head(x)


def drops_a_layer(num_classes: int) -> nn.Module:
    return DroppingALayer(num_classes)


def reads_a_value(num_classes: int) -> nn.Module:
    return ReadingAValue(num_classes)


class Counting(nn.Module):
    """Lets everything pass, and counts it in a buffer that no statistics are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return x


def counting(num_classes: int) -> nn.Module:
    return nn.Sequential(Counting(), noisy(num_classes))


class Holding(nn.Module):
    """Lets everything pass until the folder in ``TESTS_HOLD_AT`` has a checkpoint of a second part; then waits."""

    def forward(self, x):
        held = os.environ.get("TESTS_HOLD_AT") if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else None
        while held and any(Path(held).glob("*/vertex-2.*")):
            time.sleep(0.01)
        return x


def holding(num_classes: int) -> nn.Module:
    return nn.Sequential(Holding(), noisy(num_classes))


def batchnorm(num_classes: int) -> nn.Module:
    return WithBatchNorm(num_classes)


def frozen(num_classes: int) -> nn.Module:
    network = WithBatchNorm(num_classes)
    network.body[0].requires_grad_(False)
    return network


def dataset(train: int = 30, classes: int = 3, size: int = 8) -> Dataset:
    """Noisy images whose brightest third gives the class; sorted by class, as folders are."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        labels = (torch.arange(count) % classes).sort().values
        images = torch.randint(0, 120, (count, size, size, 3), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[label * size // classes : (label + 1) * size // classes] += 100
        return Split(images.to(torch.uint8), labels)

    names = tuple(f"class {i}" for i in range(classes))
    return Dataset(
        "small", "small", names, "none", split(train), split(12), split(15), (0.4, 0.4, 0.4), (0.25, 0.25, 0.25)
    )


def make_images(folder: Path) -> list[str]:
    """Make a folder of 90 images of three classes, told apart by where they are bright; as options of a command."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("top", "middle", "bottom")):
        (folder / name).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 100, (8, 8, 3), dtype=np.uint8)
            pixels[label * 3 : label * 3 + 2] += 120
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return ["--dataset", f"folder:{folder}"]
