"""Serving an ensemble: the strategy that tuning chose against all others, and members that need not be asked.

``slowdown_from_best.B<b>``: the time of a tuned bundle for a batch of b images over that of the fastest of: members
side by side, one after another, all in one graph, and PyTorch eager. Medians of runs that take turns.

``exact.*`` compares asking members until the class can no longer change with asking all of them, on every test image
and on generated corruptions of them, in batches of 64: the share of equal classes, the mean number of members asked,
and the ratio of the times, one batch after the other. ``exact.clean.*`` is of the clean images alone;
``confidence.*`` is the mode that may change a class.

    python benchmarks/ensemble_runtime.py                 # 8 small networks on the digits, trained here
    python benchmarks/ensemble_runtime.py RUN             # a run on disk whose images are at hand
    python benchmarks/ensemble_runtime.py [RUN] --quick --json FILE
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _harness import report
from numpy.typing import NDArray

from ensembler.data import datasets
from ensembler.data.datasets import Dataset
from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.machine import available_cpus
from ensembler.serve.export.bundle import export_run
from ensembler.serve.export.writer import write_merged
from ensembler.serve.runtime.early_exit import Mode
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.manifest import MERGED
from ensembler.serve.runtime.runtime import Runtime
from ensembler.serve.runtime.sessions import open_bundle, open_merged, providers
from ensembler.serve.runtime.strategies import Members
from ensembler.serve.runtime.tune import BATCHES, measure

MEMBERS = 8
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN")
    parser.add_argument("--members", type=int, help="sample this many from RUN's simplexes")
    parser.add_argument("--data", type=Path, help="folder of the dataset's files")
    parser.add_argument("--quick", action="store_true", help="one epoch, few repeats, few corruptions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their context here")
    options = parser.parse_args()
    torch.set_num_threads(available_cpus())
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or _train(Path(folder) / "run", options.quick)
        bundle = export_run(
            run, Path(folder) / "bundle", members=options.members, data=options.data, tune=True, say=print
        )
        runtime = Runtime.load(bundle)
        runtime.warm_up()
        ensemble = Ensemble.load(run, device="cpu")
        dataset = ensemble.run.manifest.dataset.load(options.data)
        if options.members:
            ensemble = ensemble.sample(options.members, 0, dataset.train)
        manifest = runtime.manifest
        print(
            f"{manifest.architecture}, {runtime.members} members ({manifest.method}, {dataset.title}); "
            f"{available_cpus()} CPUs, load {os.getloadavg()[0]:.1f}"
        )
        figures = _slowdown(runtime, bundle, ensemble, dataset, 0.5 if options.quick else 20.0)
        figures |= _early(runtime, dataset, options.quick)
    report(figures, 1 if options.quick else 5, options.json)


def _train(path: Path, quick: bool) -> Path:
    from ensembler.trainers import DeepEnsemble, Settings, train

    settings = Settings(architecture="cnn", epochs=1 if quick else 4)
    return train(datasets.load("digits"), DeepEnsemble(members=MEMBERS), settings).save(path)


def _slowdown(runtime: Runtime, bundle: Path, ensemble: Ensemble, dataset: Dataset, seconds: float) -> dict[str, float]:
    """The tuned choice, every strategy and PyTorch, taking turns."""
    manifest, threads = runtime.manifest, available_cpus()
    scratch = shutil.copytree(bundle, bundle.with_name("with-merged"))
    if MERGED not in manifest.files:
        write_merged(scratch, manifest.layout, manifest.graphs, manifest.order)
    ways = providers(GpuOptions(), manifest.precision == "tf32", manifest.members + 1)
    every = Members(
        open_bundle(scratch, manifest, ways=ways),
        threads,
        manifest.image_shape,
        len(manifest.classes),
        merged=open_merged(scratch, manifest.layout, manifest.order, threads, ways),
    )
    networks = [copy.deepcopy(ensemble.network(member)) for member in manifest.order]
    record = ensemble.run.manifest.dataset

    def eager(images: NDArray[np.uint8]) -> torch.Tensor:
        with torch.inference_mode():
            inputs = normalise(torch.from_numpy(images), tuple(record.mean), tuple(record.std))
            return torch.stack([torch.softmax(network(inputs), dim=-1) for network in networks])

    figures = {}
    for batch in BATCHES:
        images = dataset.test[:batch].images.numpy()
        assert np.abs(runtime.predict_members(images) - eager(images).numpy()).max() < 1e-4
        ways = {name: partial(every.ask, images, name) for name in every.strategies}
        tuned, torchs = partial(runtime.predict_members, images), partial(eager, images)
        found = measure({"tuned": tuned, **ways, "PyTorch": torchs}, seconds)
        medians = {name: statistics.median(times) for name, times in found.items()}
        best = min(medians.values())
        words = ", ".join(f"{name} {median * 1e3:.2f} ms" for name, median in medians.items())
        print(f"batch {batch}: {runtime.strategy(batch)} is the choice; {words}; {len(found['tuned'])} times")
        figures[f"slowdown_from_best.B{batch}"] = medians["tuned"] / best
        figures[f"speedup_over_pytorch.B{batch}"] = medians["PyTorch"] / medians["tuned"]
    return figures


def _early(runtime: Runtime, dataset: Dataset, quick: bool) -> dict[str, float]:
    """Asking fewer members, on clean and corrupted test images."""
    modes: tuple[Mode, ...] = ("exact", "confidence")
    cells = list(_cells(dataset, quick))
    same: dict[str, list[NDArray[np.bool_]]] = {}
    asked: dict[str, list[NDArray[np.int64]]] = {}
    times: dict[str, list[float]] = {}
    for name, images in cells:
        wheres = ["", ".clean"] if name == "clean" else [""]
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            started = time.perf_counter()
            full = runtime.predict(part)
            whole = time.perf_counter() - started
            for mode in modes:
                started = time.perf_counter()
                found = runtime.predict(part, mode)
                took = time.perf_counter() - started
                for key in (mode + where for where in wheres):
                    same.setdefault(key, []).append(found.classes == full.classes)
                    asked.setdefault(key, []).append(found.members_used)
                    times.setdefault(key, []).append(took)
                    times.setdefault(f"full of {key}", []).append(whole)
    figures = {}
    for key, equal in same.items():
        images = np.concatenate(equal)
        figures[f"{key}.same_class"] = float(images.mean())
        figures[f"{key}.members_asked"] = float(np.concatenate(asked[key]).mean())
        figures[f"{key}.time_ratio"] = sum(times[key]) / sum(times[f"full of {key}"])
        print(
            f"{key}: same class {figures[f'{key}.same_class']:.5f} of {len(images):,} images, "
            f"{figures[f'{key}.members_asked']:.2f} of {runtime.members} members asked, "
            f"{figures[f'{key}.time_ratio']:.3f} of the time"
        )
    print(f"shift: {len(cells) - 1} cells of corruptions generated here, not the official files")
    return figures


def _cells(dataset: Dataset, quick: bool) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The clean test images, and each corruption of them."""
    from ensembler.eval.shift.corruptions import HEADLINE, corrupt

    test = dataset.test[: BATCH if quick else 1024]
    yield "clean", test.images.numpy()
    for severity in (3,) if quick else (1, 3, 5):
        for name in HEADLINE[:3] if quick else HEADLINE:
            yield f"{name} {severity}", corrupt(test.images, name, severity).numpy()


if __name__ == "__main__":
    main()
