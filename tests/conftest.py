"""Helpers of the tests are importable by name, and small networks by ``tests._small:network``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
torch.set_num_threads(1)  # the networks here are too small for two
