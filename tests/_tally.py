"""A network that counts the examples it is trained on."""

from __future__ import annotations

import torch
from torch import nn

from tests._small import dropout

seen: list[int] = []  # the size of every batch


class Tally(nn.Module):
    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            seen.append(len(x))
        return x


def tallying(num_classes: int) -> nn.Module:
    return nn.Sequential(Tally(), dropout(num_classes))
