"""A dataset small enough to train on in a second, and networks to match."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import nn

from ensembler.datasets import Dataset, Split

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
        held = os.environ.get("TESTS_HOLD_AT") if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" else None
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
