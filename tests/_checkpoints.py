"""A small network, its weights as others save them, and a pickle that would run code."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn


class Makes:
    """Leaves a file or folder behind when it is unpickled."""

    def __init__(self, path: Path, how=Path.touch) -> None:
        self.path, self.how = path, how

    def __reduce__(self):
        return self.how, (self.path.as_posix() if self.how is os.mkdir else self.path,)


class Small(nn.Module):
    def __init__(self, classes=3, width=4) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)  # made first: it is the last linear layer all the same
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def noted(seed=0, **options):
    torch.manual_seed(seed)
    network = Small(**options)
    network(torch.randn(5, 3, 8, 8))  # moves the BatchNorm statistics
    return network


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
