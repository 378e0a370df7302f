"""What decoding a folder once saves: 60,000 small JPEGs, trained on and scored twice, each command in a fresh process.

For each command, with an empty cache of decoded images and with what the first one has kept:

``seconds``    from the start of its process to its end, the import of PyTorch included;
``cpu``        seconds of CPU that it took, which other work on the machine does not change much;
``beyond``     of a training: its seconds without those of the training itself (loading, measuring, saving);
``decoded``    how many image files it decoded, and ``decoded_mb`` their size;
``read_mb``    all that it read: images, libraries, what is mapped not included;
``kept_mb``    size of the cache after it.

Predictions are not kept from one evaluation to the next, so that both predict.

    python benchmarks/decoded.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _harness import arguments, report
from PIL import Image

from ensembler.run import Run

CLASSES, SIDE = 10, 32
COMMAND = """
import functools, json, os, sys
from pathlib import Path
from ensembler.data import decoding
from ensembler.cli import main

decoded, decode = [], decoding.decode

@functools.wraps(decode)
def counted(file, *arguments, **options):
    decoded.append(os.stat(file).st_size)
    return decode(file, *arguments, **options)

decoding.decode = counted
out, sys.argv = sys.argv[1], ["ensembler", *sys.argv[2:]]
try:
    main()
finally:
    read = int(Path("/proc/self/io").read_text().split()[1])
    Path(out).write_text(json.dumps({"decoded": len(decoded), "decoded_mb": sum(decoded) / 1e6, "read_mb": read / 1e6}))
"""


def make_folder(folder: Path, count: int) -> None:
    """Write so many JPEGs, five of six of them in ``train/`` and the rest in ``test/``, with classes to be learned."""
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 196, (CLASSES, 3))
    for label in range(CLASSES):
        for split in ("train", "test"):
            (folder / split / f"class {label}").mkdir(parents=True)
    for number in range(count):
        label = number % CLASSES
        pixels = (colours[label] + rng.integers(-60, 60, (SIDE, SIDE, 3))).astype(np.uint8)
        split = "test" if number // CLASSES % 6 == 5 else "train"
        Image.fromarray(pixels).save(folder / split / f"class {label}" / f"{number:05}.jpg")


def run(folder: Path, *command: str) -> dict[str, Any]:
    """Run a command in a process of its own, and measure it."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"}
    out, before, start = folder / "measured", os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", COMMAND, out, *command], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    kept = sum(file.stat().st_size for file in (folder / "cache" / "ensembler" / "images").glob("*"))
    return {"seconds": seconds, "cpu": cpu, **json.loads(out.read_text()), "kept_mb": kept / 1e6}


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), dict[str, dict[str, Any]]()
        make_folder(folder / "photos", 1200 if options.quick else 60_000)
        for which in ("first", "second"):
            command = [
                "train-deep-ensemble",
                "--dataset",
                f"folder:{folder / 'photos'}",
                "--arch",
                "cnn",
                "--members",
                "1",
            ]
            path = folder / f"run {which}"
            measured = run(folder, *command, "--epochs", "0.02", "--device", "cpu", "--quiet", "--out", str(path))
            found[f"train, {which}"] = measured | {
                "beyond": measured["seconds"] - (Run.load(path).manifest.cost.seconds or 0.0)
            }
        shutil.rmtree(folder / "cache", ignore_errors=True)
        for which in ("first", "second"):
            where = [
                "--device",
                "cpu",
                "--quiet",
                "--cache",
                str(folder / which),
                "--out",
                str(folder / f"report {which}"),
            ]
            found[f"eval, {which}"] = run(folder, "eval", str(folder / "run first"), *where)
    keys = ("seconds", "beyond", "cpu", "decoded", "decoded_mb", "read_mb", "kept_mb")
    print(f"{'':16}" + "".join(f"{key:>12}" for key in keys))
    for title, measured in found.items():
        print(f"{title:16}" + "".join(f"{measured[key]:>12,.1f}" if key in measured else " " * 12 for key in keys))
    figures = {f"{key}.{title}": value for title, measured in found.items() for key, value in measured.items()}
    report(figures, 1, options.json)


if __name__ == "__main__":
    main()
