"""The tests' helpers are importable as ``tests._small`` and ``tests._runs``, by the tests and as ``--arch``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)  # the networks here are too small for two
