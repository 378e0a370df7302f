"""The check of a machine with a GPU: is what is computed there right, and how fast is it?

- ``tests``: the tests marked ``cuda``;
- ``together``: images a second of M members side by side;
- ``score``: seconds to predict 10,000 images, clean and 95 times, by one network and by ten members;
- ``onnx``: ONNX Runtime's CUDA provider, where it is installed: agreement and milliseconds a batch;
- ``train``: images a second of this package, eager and captured, and of a plain PyTorch loop.

Each part is timed, and one that fails is named and does not end the others. Figures are written as they come. Without a
GPU the same is done on the CPU, tiny, to show that it works; its figures say nothing.

    python benchmarks/gpu.py [--parts train,score] [--minutes 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ensembler import Ensemble
from ensembler.data.datasets import Dataset, Split
from ensembler.data.images import augment, draw, normaliser
from ensembler.device import configure
from ensembler.networks import architectures
from ensembler.side_by_side import SideBySide
from ensembler.trainers import DeepEnsemble, Settings, train
from ensembler.trainers.events import EpochEnd

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PARTS = ("tests", "train", "together", "score", "onnx")
IMAGES, SIZE = (45_000, 32) if CUDA else (64, 8)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
GRID = (
    [(name, batch, kind) for name in ("resnet20", "vgg16") for batch in (128, 512) for kind in ("bfloat16", "float32")]
    + [(name, batch, "bfloat16") for name in ("preresnet164", "wrn28x10") for batch in (128, 512)]
    if CUDA
    else [("tests._small:batchnorm", 16, "float32")]
)
SECONDS = 3.0 if CUDA else 0.1  # of measuring each


class Report:
    """The figures so far, and the time."""

    def __init__(self, minutes: float, file: Path | None) -> None:
        self._end, self._file = time.monotonic() + 60 * minutes, file
        self._began = time.monotonic()
        self.found: dict[str, Any] = {
            "machine": torch.cuda.get_device_name() if CUDA else "CPU: the figures say nothing",
            "torch": torch.__version__,
        }

    def tell(self, name: str, value: Any) -> None:
        self.found[name] = value
        print(f"{time.monotonic() - self._began:6.1f} s  {name}: {value}", flush=True)
        if self._file:
            self._file.write_text(json.dumps(self.found, indent=1) + "\n")

    def attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Tell what ``measure`` returns, or why it fails."""
        if time.monotonic() > self._end - 10:
            self.tell(name, "no time left")
            return None
        try:
            value = measure()
        except Exception as error:  # whatever it is, the other parts go on
            self.tell(name, f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            return None
        finally:
            if CUDA:
                torch.cuda.empty_cache()
        self.tell(name, value)
        return value


def images(count: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.randint(3, (count,), generator=generator))


def dataset(count: int) -> Dataset:
    own = images(count)
    return Dataset("noise", "noise", ("a", "b", "c"), "crop-flip", own, own[:12], own[:12], MEAN, STD)


def per_second(run: Callable[[int], None], examples: int) -> int:
    """Examples a second of ``run(steps)``, each step of so many; the median of five measurements."""

    def measure(steps: int) -> float:
        began = time.perf_counter()
        run(steps)
        if CUDA:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    measure(5)
    steps = max(1, round(3 * SECONDS / 5 / max(measure(3), 1e-6)))
    return round(statistics.median(steps * examples / measure(steps) for _ in range(5)))


def plain(architecture: str, batch: int, precision: str) -> int:
    """A loop as one writes it: crops and flips on the device, fused SGD, autocast."""
    data, labels = (tensor.to(DEVICE) for tensor in (images(IMAGES).images, images(IMAGES).labels))
    network = architectures.build(architecture, 3).to(DEVICE).train()
    optimiser = torch.optim.SGD(network.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    prepare, dtype = normaliser(MEAN, STD, DEVICE), getattr(torch, precision)
    stream = torch.Generator().manual_seed(0)

    def run(steps: int) -> None:
        for _ in range(steps):
            index = torch.randint(IMAGES, (batch,), generator=stream).to(DEVICE, non_blocking=True)
            choices = draw("crop-flip", batch, stream).to(DEVICE, non_blocking=True)
            optimiser.zero_grad()
            with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
                outputs = network(prepare(augment(data[index], "crop-flip", choices)))
            torch.nn.functional.cross_entropy(outputs.float(), labels[index]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()

    return per_second(run, batch)


def own(architecture: str, batch: int, precision: str, steps: int, eager: bool = False, members: int = 1) -> int:
    """The package's own training in epochs of so many steps, less the first (capture, choice of algorithms)."""
    ends: list[tuple[str, float]] = []

    def note(event: Any) -> None:
        if isinstance(event, EpochEnd):
            ends.append((event.part, time.perf_counter()))

    settings = Settings(
        architecture=architecture, batch_size=batch, precision=precision, eager=eager, epochs=3, lr=1e-3
    )
    engine = SideBySide(members) if members > 1 else None
    train(dataset(steps * batch), DeepEnsemble(members=members), settings, on_event=note, engine=engine)
    first = dict(reversed(ends))
    later = [when for _, when in ends if when > max(first.values())]
    return round(len(later) * steps * batch / (later[-1] - max(first.values())))


@contextmanager
def saved(members: int) -> Iterator[Path]:
    """A run of so many untrained members."""
    architecture = "resnet20" if CUDA else "tests._small:batchnorm"
    settings = Settings(architecture=architecture, epochs=0.01, batch_size=32)
    with tempfile.TemporaryDirectory() as folder:
        yield train(dataset(64), DeepEnsemble(members=members), settings).save(Path(folder) / "run")


def score(members: int, times: int) -> float:
    """Seconds to predict 10,000 images so many times, after loading."""
    x = images(10_000 if CUDA else 20).images
    with saved(members) as run:
        ensemble = Ensemble.load(run)
        configure(ensemble.device)
        ensemble.predict_proba(x[:2048])
        began = time.perf_counter()
        for _ in range(times):
            ensemble.predict_proba(x)
        return round(time.perf_counter() - began, 3)


def onnx() -> dict[str, Any]:
    """Agreement and milliseconds a batch, beside eager PyTorch."""
    import onnxruntime

    from ensembler.serve.export.bundle import export_run
    from ensembler.serve.runtime.runtime import Runtime

    with saved(4) as run:
        bundle = run.parent / "bundle"
        export_run(run, bundle, use_data=False)
        runtime, ensemble = Runtime.load(bundle), Ensemble.load(run)
        found: dict[str, Any] = {"providers": onnxruntime.get_available_providers()}
        for batch in (1, 8, 64, 512):
            x = images(batch).images
            served, eager = partial(runtime.predict, x.numpy()), partial(ensemble.predict_proba, x)
            difference = (torch.as_tensor(served().probabilities) - eager()).abs().max().item()
            milliseconds = {}
            for name, ask in (("onnx", served), ("torch", eager)):
                seconds = []
                for _ in range(20 if CUDA else 3):
                    began = time.perf_counter()
                    ask()
                    seconds.append(time.perf_counter() - began)
                milliseconds[name] = round(1000 * statistics.median(seconds), 3)
            found[f"batch {batch}"] = {"difference": difference, **milliseconds}
        return found


def tests() -> str:
    """The last line of pytest, and the names of what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests/test_cuda.py", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        check=False,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"COLUMNS": "300"},
    )
    lines = done.stdout.strip().splitlines()
    return "; ".join([*(line for line in lines if line.startswith(("FAILED", "ERROR"))), *lines[-1:]])[:4000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further part begins")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as they come")
    options = parser.parse_args()
    parts, report = options.parts.split(","), Report(options.minutes, options.json)
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part is called {unknown[0]}: there are {', '.join(PARTS)}")
    configure(DEVICE)
    if "tests" in parts:
        report.attempt("tests", tests)
    if "together" in parts:
        for members in (2, 4, 8) if CUDA else (2,):
            architecture, batch, precision = GRID[0]
            name = f"images a second, {architecture}, {batch}, {precision}, {members} side by side"
            measure = partial(own, architecture, batch, precision, 300 if CUDA else 2, members=members)
            report.attempt(name, measure)
    if "score" in parts:
        for members in (1, 10):
            for name, times in (("clean", 1), ("95 cells", 95)):
                report.attempt(f"seconds, {members} members, {name}", partial(score, members, times if CUDA else 1))
    if "onnx" in parts:
        report.attempt("onnx", onnx)
    if "train" in parts:
        for architecture, batch, precision in GRID:
            name = f"images a second, {architecture}, {batch}, {precision}"
            alone = report.attempt(f"{name}, plain", partial(plain, architecture, batch, precision))
            steps = max(1, round(SECONDS / 3 * (alone or batch) / batch))  # an epoch of a second in a plain loop
            for eager in (True, False):
                measure = partial(own, architecture, batch, precision, steps, eager)
                report.attempt(f"{name}, {'eager' if eager else 'captured'}", measure)
    if CUDA:
        report.tell("peak memory, GiB", round(torch.cuda.max_memory_allocated() / 2**30, 2))


if __name__ == "__main__":
    main()
