"""Images per second under each corruption, and the speedup over one image at a time.

The reference is ``per_image.py``: each corruption of one image in NumPy, SciPy and Pillow, following the authors'
script step by step. 32 x 32 pixels, severity 3; the two are timed in turn, and medians are compared. Time on the clock
needs an idle machine; processor time, summed over threads, hardly depends on other processes.

Figures: ``images_per_second.<corruption>``, ``speedup.<corruption>`` with its ``.median`` and ``.least`` on the clock,
and ``work.<corruption>`` with its ``.median``, the same ratio in processor time.

    python benchmarks/corruptions.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import per_image
import torch
from _harness import arguments, report, spread, timed
from numpy.typing import NDArray

from ensembler.eval.shift.corruptions import AVAILABLE, corrupt

SEVERITY = 3


def main() -> None:
    options = arguments(__doc__ or "")
    count, singly, repeats = (500, 20, 3) if options.quick else (10_000, 100, 7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = photographs(count)
    batch = torch.from_numpy(images).to(device)
    figures: dict[str, float] = {}
    print(f"{count} images of 32 x 32, severity {SEVERITY}, {device}, {torch.get_num_threads()} threads\n")
    print("| corruption | images per second | one at a time | ratio | of processor time |\n|---|---|---|---|---|")
    for name in AVAILABLE:
        reference = getattr(per_image, name)
        constants = per_image.CIFAR[name][SEVERITY - 1]
        rng = np.random.default_rng(0)

        def alone(
            reference: Callable[..., NDArray[np.float64]] = reference,
            constants: object = constants,
            rng: np.random.Generator = rng,
        ) -> None:
            for image in images[:singly]:
                per_image.truncated(reference(image, constants, rng))

        def together(name: str = name) -> None:
            corrupt(batch, name, SEVERITY)

        together()
        alone()
        times = [both(together, count) + both(alone, singly) for _ in range(repeats)]
        ours, ours_worked, theirs, theirs_worked = (statistics.median(column) for column in zip(*times, strict=True))
        figures[f"images_per_second.{name}"] = 1 / ours
        figures[f"speedup.{name}"] = theirs / ours
        figures[f"work.{name}"] = theirs_worked / ours_worked
        ratios = spread([b / a for a, _, b, _ in times])
        print(
            f"| {name} | {1 / ours:,.0f} | {1 / theirs:,.0f} | {ratios} | {figures[f'work.{name}']:.1f} |", flush=True
        )
    for kind in ("speedup", "work"):
        ratios_of_all = [value for figure, value in figures.items() if figure.startswith(f"{kind}.")]
        figures[f"{kind}.median"], figures[f"{kind}.least"] = statistics.median(ratios_of_all), min(ratios_of_all)
        print(f"\n{kind}: median {figures[f'{kind}.median']:.1f}, least {figures[f'{kind}.least']:.1f}")
    report(figures, repeats, options.json)


def both(run: Callable[[], None], count: int) -> tuple[float, float]:
    """Measure the seconds per image of ``run()``: on the clock, and of processor time."""
    before = time.process_time()
    clock = timed(run)
    return clock / count, (time.process_time() - before) / count


def photographs(count: int) -> NDArray[np.uint8]:
    """Draw smooth colour images with some grain, (count, 32, 32, 3)."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(count, 32, 32, 3)), (0, 3, 3, 0.5))
    return np.clip(smooth * 600 + rng.normal(128, 5, smooth.shape), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
