"""The whole ensemble in one ONNX file (``export --layout single``) beside the runtime: difference and milliseconds.

``slowdown.B<b>``: the time of the file in one ONNX Runtime session over that of ``Runtime.predict``, for a batch of b
images; quartiles of runs that take turns. ``difference``: the largest of any probability or entropy.

    python benchmarks/single_file.py [RUN] [--quick] [--json FILE]    # by default 4 small networks, trained here
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
from _harness import report

from ensembler.data import datasets
from ensembler.machine import available_cpus
from ensembler.serve.export.bundle import export_run
from ensembler.serve.runtime.manifest import SINGLE
from ensembler.serve.runtime.runtime import Runtime
from ensembler.serve.runtime.tune import BATCHES, measure
from ensembler.trainers import DeepEnsemble, Settings, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their context here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(architecture="cnn", epochs=1)
        method, saved = DeepEnsemble(members=4), Path(folder) / "run"
        run = options.run or train(datasets.load("digits"), method, settings).save(saved)
        bundle = export_run(run, Path(folder) / "bundle", layout="single", say=print)
        figures = compare(bundle, 0.3 if options.quick else 10.0)
    report(figures, 1 if options.quick else 3, options.json)


def compare(bundle: Path, seconds: float) -> dict[str, float]:
    """The file and the runtime, taking turns."""
    runtime = Runtime.load(bundle)
    runtime.warm_up()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = available_cpus()
    session = onnxruntime.InferenceSession(bundle / SINGLE, options, providers=["CPUExecutionProvider"])
    names = ["probabilities", "predictive_entropy", "expected_entropy", "mutual_information"]
    figures = {"difference": 0.0}
    for batch in BATCHES:
        images = np.random.default_rng(0).integers(0, 256, (batch, *runtime.manifest.image_shape), dtype=np.uint8)
        ways = {"file": partial(session.run, names, {"images": images}), "runtime": partial(runtime.predict, images)}
        found, expected = session.run(names, {"images": images}), runtime.predict(images)
        differences = [np.abs(a - getattr(expected, name)).max() for a, name in zip(found, names, strict=True)]
        figures["difference"] = max(figures["difference"], float(max(differences)))
        times = {name: statistics.quantiles(taken, n=4)[0] for name, taken in measure(ways, seconds).items()}
        print(f"batch {batch}: file {times['file'] * 1e3:.2f} ms, runtime {times['runtime'] * 1e3:.2f} ms")
        figures[f"slowdown.B{batch}"] = times["file"] / times["runtime"]
    print(f"largest difference: {figures['difference']:.1e}")
    return figures


if __name__ == "__main__":
    main()
