"""What every benchmark shares: ``--quick``, ``--json FILE``, the machine's description, medians with their spread."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their context here")
    return parser.parse_args()


def timed(run: Callable[[], None]) -> float:
    """Seconds that ``run()`` takes, what it leaves on a GPU included."""
    import torch

    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    """The median and the middle half of the values."""
    if len(values) < 4:
        return f"{statistics.median(values):.3f} (from {min(values):.3f} to {max(values):.3f})"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} (middle half {low:.3f} to {high:.3f})"


def report(figures: dict[str, float], repeats: int, file: Path | None) -> None:
    """Write the figures where the user wants them."""
    import torch

    from ensembler.run import versions

    context: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
    }
    if file:
        file.write_text(json.dumps({"figures": figures, "context": context}, indent=2) + "\n")
