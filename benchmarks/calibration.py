"""The guarantees of a calibration over random splits of images that the members were not trained on: how often the
coverage of prediction sets and the risk of the answers hold, clean and under shift.

Each split calibrates on as many images as ``ensembler calibrate`` would, half of them for the map, and tests on the
rest. ``as_theory``: the share of splits whose coverage is in the central 95 % of its exact beta-binomial distribution.

Figures: ``clean.*`` and ``severityS.*``.

    python benchmarks/calibration.py                           # three small networks on the digits, trained here
    python benchmarks/calibration.py RUN... --shift cifar10c   # runs on disk, and generated corruptions
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _harness import report
from numpy.typing import NDArray
from torch import Tensor

from ensembler.calibration import Calibration, abstain, apply, prediction_sets
from ensembler.data import datasets
from ensembler.data.datasets import Dataset
from ensembler.ensemble import Ensemble
from ensembler.eval.calibrate import fit
from ensembler.eval.metrics.classification import ece, nll
from ensembler.eval.metrics.recalibration import METHODS
from ensembler.eval.options import CalibrationOptions
from ensembler.seeds import generator
from ensembler.uncertainty import mean_probabilities

_SEVERITIES = (1, 3, 5)


class Predicted(NamedTuple):
    """Pooled probabilities (N, C), labels (N,), and each image's index among the held-out ones."""

    probs: NDArray[np.float64]
    labels: NDArray[np.int64]
    places: NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN")
    parser.add_argument("--shift", choices=["cifar10c"], help="also test on corrupted images")
    parser.add_argument("--examples", type=int, default=1000, help="test images to corrupt (default: 1000)")
    parser.add_argument("--splits", type=int, default=100)
    parser.add_argument("--method", choices=METHODS, default="temperature")
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--risk", type=float, default=0.1)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--data", type=Path, help="folder of the dataset's files")
    parser.add_argument("--quick", action="store_true", help="one epoch, 20 splits")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.splits = 20
    figures: dict[str, float] = {}
    for name, ensemble, dataset in _ensembles(options):
        clean = _predict(
            ensemble,
            torch.cat([dataset.validation[:].images, dataset.test[:].images]),
            torch.cat([dataset.validation.labels, dataset.test.labels]),
        )
        tested = {"clean": clean} | (_corrupted(ensemble, dataset, options.examples) if options.shift else {})
        found = _measure(clean, tested, len(dataset.validation), options)
        print(
            f"\n{name}: {ensemble.members} members, {dataset.title}; {options.splits} splits of {len(clean.labels):,} "
            f"images, {len(dataset.validation):,} to calibrate on ({options.method}), alpha {options.alpha}, "
            f"risk {options.risk} with confidence {options.confidence}"
        )
        if options.shift:
            print(f"severities: corruptions generated here, {options.examples:,} test images; not the official files")
        for figure in next(iter(found.values())):
            cells = (f"{where} {values[figure]:.4f}" for where, values in found.items() if figure in values)
            print(f"  {figure:18}", "   ".join(cells))
        figures |= {f"{name}.{where}.{key}": v for where, values in found.items() for key, v in values.items()}
    report(figures, options.splits, options.json)


def _ensembles(options: argparse.Namespace) -> Iterator[tuple[str, Ensemble, Dataset]]:
    for path in options.runs:
        ensemble = Ensemble.load(path)
        yield path.name, ensemble, ensemble.run.manifest.dataset.load(options.data)
    if not options.runs:
        from ensembler.trainers import DeepEnsemble, Settings, train

        digits = datasets.load("digits")
        settings = Settings(architecture="cnn", epochs=1 if options.quick else 3)
        yield "digits", Ensemble(train(digits, DeepEnsemble(members=3), settings)), digits


def _predict(ensemble: Ensemble, images: Tensor, labels: Tensor, places: Tensor | None = None) -> Predicted:
    probs = [mean_probabilities(ensemble.predict_members(part).numpy()) for part in images.split(1024)]
    places = torch.arange(len(labels)) if places is None else places
    return Predicted(np.concatenate(probs), labels.numpy(), places.numpy())


def _corrupted(ensemble: Ensemble, dataset: Dataset, examples: int) -> dict[str, Predicted]:
    """All headline corruptions of some test images, by severity."""
    from ensembler.eval.shift.corruptions import AVAILABLE, HEADLINE, corrupt

    index = torch.randperm(len(dataset.test), generator=generator(0, "examples"))[:examples].sort().values
    test = dataset.test[index]
    places = len(dataset.validation) + index
    found = {}
    for severity in _SEVERITIES:
        cells = [
            _predict(ensemble, corrupt(test.images, name, severity, indices=index), test.labels, places)
            for name in HEADLINE
            if name in AVAILABLE
        ]
        found[f"severity{severity}"] = Predicted(*map(np.concatenate, zip(*cells, strict=True)))
    return found


def _measure(
    clean: Predicted, tested: dict[str, Predicted], size: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Means over the splits, of the images that were not calibrated on.

    ``certified`` and ``risk_held`` are shares of the splits: in those where nothing is certified nothing is answered,
    and the risk holds. ``risk`` is the error rate among the answers, of the splits that gave any.
    """
    rows: dict[str, list[dict[str, float]]] = {where: [] for where in tested}
    for split in range(options.splits):
        used = np.random.default_rng(split).permutation(len(clean.labels))[:size]
        calibration = fit(
            clean.probs[used],
            clean.labels[used],
            CalibrationOptions(
                method=options.method,
                alpha=options.alpha,
                risk=options.risk,
                confidence=options.confidence,
                seed=split,
            ),
            run_sha256="",
            dataset="",
            validation_sha256="",
        )
        for where, predicted in tested.items():
            fresh = ~np.isin(predicted.places, used)
            row = _look(calibration, predicted.probs[fresh], predicted.labels[fresh], options.risk)
            if where == "clean":
                row |= _theory(calibration, int(fresh.sum()), row)
            rows[where].append(row)
    means: dict[str, dict[str, float]] = {}
    for where, found in rows.items():
        columns = {figure: [row[figure] for row in found if figure in row] for row in found for figure in row}
        means[where] = {figure: float(np.mean(column)) for figure, column in columns.items()}
    return means


def _look(
    calibration: Calibration, probs: NDArray[np.float64], labels: NDArray[np.int64], risk: float
) -> dict[str, float]:
    calibrated = apply(calibration, probs)
    wrong = calibrated.argmax(axis=1) != labels
    row = {"error": float(wrong.mean()), "nll.before": nll(probs, labels), "nll": nll(calibrated, labels)}
    row |= {"ece.before": ece(probs, labels), "ece": ece(calibrated, labels)}
    for method in ("lac", "aps"):
        sets = prediction_sets(calibration, probs, method=method)
        row[f"{method}.coverage"] = float(sets[np.arange(len(labels)), labels].mean())
        row[f"{method}.size"] = float(sets.sum(axis=1).mean())
        row[f"{method}.empty"] = float((~sets.any(axis=1)).mean())
    answered = ~abstain(calibration, probs)
    assert calibration.abstention is not None
    certified = calibration.abstention.threshold is not None
    row |= {"certified": float(certified), "answered": float(answered.mean())}
    row["risk_held"] = float(not answered.any() or wrong[answered].mean() <= risk)
    return row | ({"risk": float(wrong[answered].mean())} if answered.any() else {})


def _theory(calibration: Calibration, count: int, row: dict[str, float]) -> dict[str, float]:
    """Whether each coverage is within the central 95 % of what exchangeable images without ties give."""
    from scipy.stats import betabinom

    n, alpha = calibration.held_out, calibration.conformal.alpha
    rank = int(np.ceil(round((n + 1) * (1 - alpha), 9)))
    low, high = betabinom(count, rank, n + 1 - rank).interval(0.95) if rank <= n else (count, count)
    return {
        f"{method}.as_theory": float(low <= round(row[f"{method}.coverage"] * count) <= high)
        for method in ("lac", "aps")
    }


if __name__ == "__main__":
    main()
