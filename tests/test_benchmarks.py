"""The benchmarks that other machines are to run do run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU: make gpu")
def test_the_check_of_a_gpu_runs_without_one(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--parts", "train,together,score,onnx", "--json", tmp_path / "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "gpu").read_text())
    assert "FAILED" not in done.stdout
    assert {"plain", "eager", "captured", "2 side by side"} <= {name.split(", ")[-1] for name in found}
    assert all(value > 0 for name, value in found.items() if name.startswith("images a second"))
    assert found["onnx"]["batch 64"]["difference"] < 1e-5
