"""Mean absolute change of CIFAR-10 images under each corruption, by severity, here and by the authors' steps.

The reference is ``per_image.py``, which follows the authors' script one image at a time; both draw with three seeds.

Figures: ``change.<corruption>.<severity>``, in levels of 255, and ``ratio.<corruption>``, ours over the reference's
mean over severities.

    python benchmarks/corruption_changes.py FOLDER_OF_IMAGES
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import per_image
import torch
from _harness import report

from ensembler.data.decoding import suffixes
from ensembler.data.images import read_images
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES, corrupt

SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200, help="number of images, evenly spaced in the sorted files")
    parser.add_argument("--corruptions", default=",".join(AVAILABLE))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    files = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in suffixes())
    images = read_images(files[:: max(1, len(files) // options.count)][: options.count], (32, 32))
    clean = images.numpy().astype(np.int16)
    figures: dict[str, float] = {}
    print(f"{len(images)} images, {SEEDS} seeds: mean absolute change in levels at severities 1 to 5\n")
    print("| corruption | here | one image at a time | ratio |\n|---|---|---|---|")
    for name in options.corruptions.split(","):
        ours, theirs = np.zeros((SEEDS, 5)), np.zeros((SEEDS, 5))
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            for severity in SEVERITIES:
                made = corrupt(images, name, severity, seed=seed).numpy()
                ours[seed, severity - 1] = np.abs(made - clean).mean()
                constants = per_image.CIFAR[name][severity - 1]
                levels = [getattr(per_image, name)(image, constants, rng) for image in images.numpy()]
                theirs[seed, severity - 1] = np.abs(per_image.truncated(np.stack(levels)) - clean).mean()
        figures |= {f"change.{name}.{level}": float(ours[:, level - 1].mean()) for level in SEVERITIES}
        figures[f"ratio.{name}"] = float(ours.mean() / theirs.mean())
        columns = (" ".join(f"{value:.2f}" for value in each.mean(0)) for each in (ours, theirs))
        print(f"| {name} | {' | '.join(columns)} | {figures[f'ratio.{name}']:.3f} |", flush=True)
    report(figures, SEEDS, options.json)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
