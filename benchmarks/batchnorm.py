"""What BatchNorm statistics are worth: points inside a simplex with statistics of their own, against the same points
with those of the first vertex.

Figures: ``accuracy.<what>`` on the test images.

    python benchmarks/batchnorm.py                                  # resnet20 on the digits
    python benchmarks/batchnorm.py --dataset folder:PATH --epochs 10
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _harness import report

from ensembler.data import datasets
from ensembler.data.datasets import Split
from ensembler.ensemble import Ensemble
from ensembler.subspace import dirichlet
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train


def main() -> None:
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--quick", action="store_true", help="two epochs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    dataset = datasets.load(options.dataset)
    settings: dict[str, Any] = {"architecture": "resnet20", "epochs": 2 if options.quick else options.epochs}
    base = train(dataset, DeepEnsemble(members=1), Settings(**settings))
    with tempfile.TemporaryDirectory() as scratch:
        start = base.save(Path(scratch, "base"))
        run = train(dataset, Simplex(vertices=3), Settings(**settings, init=str(start)))
    inside = dirichlet(4, 3, np.random.default_rng(0))
    own = Ensemble(run).at(inside, dataset.train)
    of_the_vertex = {name: rows.expand(4, *rows.shape[1:]) for name, rows in base.buffers.items()}
    foreign = Ensemble(replace(own.run, buffers=of_the_vertex))
    found = {
        "the vertex, as trained": _accuracies(Ensemble(base), dataset.test)[0],
        "inside, recomputed": sum(_accuracies(own, dataset.test)) / 4,
        "inside, the vertex's": sum(_accuracies(foreign, dataset.test)) / 4,
    }
    for what, accuracy in found.items():
        print(f"{what:30} {accuracy:.4f}")
    report({f"accuracy.{what}": accuracy for what, accuracy in found.items()}, 1, options.json)


def _accuracies(ensemble: Ensemble, split: Split) -> list[float]:
    members = ensemble.predict_members(split.images)
    accuracies: list[float] = (members.argmax(2) == split.labels).double().mean(1).tolist()
    return accuracies


if __name__ == "__main__":
    main()
