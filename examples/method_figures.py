"""Draw the figures of docs/how.md whose runs are on the digits: python examples/method_figures.py FOLDER

Trains SSE, FGE, a simplex and a joint subspace with `cnn`, and draws the learning rate and the loss of the first two,
and the planes of the last three.
"""

from __future__ import annotations

import io
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ensembler import Run, load_dataset
from ensembler.eval.options import SurfaceOptions
from ensembler.eval.report.plots import new_figure, to_png
from ensembler.eval.report.styles import PALETTE
from ensembler.eval.report.surface_figures import plot_surface
from ensembler.eval.surface import measure_surface
from ensembler.trainers import FGE, Settings, Simplex, Snapshots, Subspace, train
from ensembler.trainers.methods.fge import cyclic
from ensembler.trainers.schedules import after, cosine, one_cycle, repeated


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    digits = load_dataset("digits")

    sse = train(digits, Snapshots(members=3), Settings(epochs=12))
    fge = train(digits, FGE(members=4, cycle=1), Settings(epochs=5))
    steps = math.ceil(len(digits.train) / sse.manifest.settings["batch_size"])
    lr, cycle, begin = sse.manifest.settings["lr"], 4 * steps, 4 * steps
    schedules = {
        "SSE: cosine cycles": (sse, repeated(cosine(lr, cycle), cycle), [4.0, 8.0, 12.0]),
        "FGE: triangles after 80 % of a budget of 5 epochs": (
            fge,
            after(begin, one_cycle(lr, 5 * steps), cyclic(5e-2, 5e-4, steps)),
            [4.5, 5.5, 6.5, 7.5],
        ),
    }
    _write(folder / "schedules.png", _plot_schedules(schedules, steps))
    planes = {
        "fge": fge,
        "simplex": train(digits, Simplex(vertices=3, members=8), Settings(epochs=6)),
        "subspace": train(digits, Subspace(vertices=3, members=8), Settings(epochs=40)),
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in planes.items():
            path = run.save(Path(scratch) / name)
            _write(
                folder / f"{name}-surface.png",
                plot_surface(measure_surface([path], options=SurfaceOptions(grid=11, examples=300))),
            )


def _plot_schedules(schedules: dict[str, tuple[Run, Callable[[int], float], list[float]]], steps: int) -> bytes:
    """Plot the learning rate per step above the training loss per epoch, with snapshots, in a column per method."""
    figure = new_figure(11, 4.6)
    grid = figure.subplots(2, len(schedules), sharex="col", sharey="row")
    for (upper, lower), (title, (run, schedule, snapshots)) in zip(grid.T, schedules.items(), strict=True):
        epochs = [min(row["number"], snapshots[-1]) for row in run.history]
        every = np.arange(1, round(steps * snapshots[-1]) + 1)
        upper.plot(every / steps, [schedule(int(step)) for step in every], color=PALETTE[0].colour)
        upper.plot(snapshots, [schedule(round(at * steps)) for at in snapshots], "o", color=PALETTE[1].colour)
        upper.set(title=title, ylabel="learning rate")
        lower.plot(epochs, [row["loss"] for row in run.history], color=PALETTE[0].colour, label="training loss")
        for at in snapshots:
            first = at == snapshots[0]
            lower.axvline(at, color=PALETTE[1].colour, ls="--", lw=1, label="a snapshot" if first else None)
        lower.set(xlabel="epochs", ylabel="loss (nats)", yscale="log")
        lower.legend(frameon=False, fontsize="small")
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    return to_png(figure)


def _write(path: Path, png: bytes) -> None:
    """Write a figure with 128 colours, which is a third of the size and looks the same."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
