"""Is a simplex worth its passes? SPRO with lambda = 0 and with ``auto``, by volume and by function, against its own
base solution, against the base trained for as many passes more, and against two independent networks.

For every seed: a base of ``--epochs``; a control of as many epochs as the base and the added vertices together; three
simplexes around the base. Scores are those of the test images; what chooses (lambda, which members) sees the held-out
images alone. Figures: ``<what>.<score>``, the mean over the seeds.

    python benchmarks/simplexes.py                                             # the digits
    python benchmarks/simplexes.py --dataset folder:PATH --epochs 30           # any images
    python benchmarks/simplexes.py --bases RUN RUN RUN --controls RUN RUN RUN  # networks that are trained already
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import report

from ensembler.data import datasets
from ensembler.data.datasets import Dataset, Split
from ensembler.ensemble import Ensemble
from ensembler.run import Run, Sampling
from ensembler.sampling import sample_coefficients
from ensembler.task import Classification
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from ensembler.trainers.events import Message
from ensembler.uncertainty import disagreement

VARIANTS: dict[str, dict[str, Any]] = {
    "lambda = 0": {"regularisation": 0.0},
    "volume": {"regularisation": "auto", "regulariser": "volume"},
    "function": {"regularisation": "auto", "regulariser": "function"},
}
MEMBERS: dict[str, dict[str, Any]] = {  # which points of a simplex of K vertices are members
    "vertices": {"corners": True, "concentration": 1.0, "more": 0},
    "vertices and 7 points": {"corners": True, "concentration": 1.0, "more": 7},
    "vertices and 7 points, alpha 0.3": {"corners": True, "concentration": 0.3, "more": 7},
    "10 points": {"corners": False, "concentration": 1.0, "more": 7},
    "10 points, alpha 0.3": {"corners": False, "concentration": 0.3, "more": 7},
}


def main() -> None:
    options = _arguments()
    found: dict[str, list[dict[str, float]]] = {}
    dataset = Run.load(options.bases[0]).manifest.dataset.load() if options.bases else datasets.load(options.dataset)
    members: list[torch.Tensor] = []
    scratch = tempfile.TemporaryDirectory()
    for number, seed in enumerate(options.seeds):
        settings = {"epochs": options.epochs, "seed": seed, "architecture": options.arch}
        longer = options.epochs + (options.vertices - 1) * options.vertex_epochs

        start = Path(scratch.name, str(seed))
        if options.bases:
            start = options.bases[number]
        else:
            train(dataset, DeepEnsemble(members=1), Settings(**settings)).save(start)
        base = Run.load(start)
        if options.controls:
            control = Run.load(options.controls[number])
        else:
            control = train(dataset, DeepEnsemble(members=1), Settings(**settings | {"epochs": longer}))
        members.append(Ensemble(base).predict_members(dataset.test.images))
        scores = _scores(Ensemble(control).predict_members(dataset.test.images), dataset.test)
        _note(found, "base", seed, _scores(members[-1], dataset.test), base)
        _note(found, "control", seed, scores, control)
        for name, variant in VARIANTS.items():
            method = Simplex(
                vertices=options.vertices,
                members=options.vertices,
                vertex_epochs=options.vertex_epochs,
                tolerance=options.tolerance,
                **variant,
            )
            run = train(dataset, method, Settings(**settings, init=str(start)), on_event=_print)
            scores = _scores(Ensemble(run).predict_members(dataset.test.images), dataset.test)
            simplex = run.manifest.metrics["simplexes"][0]
            scores |= {"log volume": simplex["log_volume"], "lambda": float(run.manifest.metrics.get("lambda", 0.0))}
            for group in ("vertices", "centroid", "inside"):
                scores[f"train loss, {group}"] = simplex["train_loss"][group]
            scores |= {f"held-out NLL, {kind}": v for kind, v in _kinds(run, dataset, options.vertices).items()}
            _note(found, name, seed, scores, run)
    scratch.cleanup()
    for one, other in zip(range(len(members)), (*range(1, len(members)), 0), strict=True):
        if one != other:
            scores = _scores(torch.cat([members[one], members[other]]), dataset.test)
            scores |= {"example passes": 2 * found["base"][one]["example passes"]}
            _note(found, "two networks", options.seeds[one], scores)
    figures = {
        f"{what}.{score}": statistics.mean(row[score] for row in rows)
        for what, rows in found.items()
        for score in rows[0]
    }
    print("\nmeans over the seeds (from, to)")
    for what, rows in found.items():
        print(what)
        for score in rows[0]:
            values = [row[score] for row in rows]
            print(f"    {score:50} {statistics.mean(values):10.4f} ({min(values):.4f}, {max(values):.4f})")
    report(figures, len(options.seeds), options.json)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--arch", default="cnn")
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--vertices", type=int, default=3)
    parser.add_argument("--vertex-epochs", type=float, help="of each added vertex (default: a quarter of --epochs)")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of auto (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bases", type=Path, nargs="+", help="runs of one network, in place of training them")
    parser.add_argument("--controls", type=Path, nargs="+", help="likewise")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.epochs = [0], 4
    options.vertex_epochs = options.vertex_epochs or options.epochs / 4
    for runs in (options.bases, options.controls):
        if runs is not None and len(runs) != len(options.seeds):
            sys.exit(f"{len(runs)} runs for {len(options.seeds)} seeds: give one for each")
    return options


def _print(event: object) -> None:
    if isinstance(event, Message):
        print(f"    {event.text}", flush=True)


def _scores(members: torch.Tensor, split: Split) -> dict[str, float]:
    mean = members.mean(dim=0)
    differ = disagreement(members.numpy())
    return {
        "error %": 100 * (mean.argmax(1) != split.labels).double().mean().item(),
        "NLL": Classification().nll(mean, split.labels),
        "disagreement %": 0.0 if differ is None else 100 * float(differ.mean()),
    }


def _kinds(run: Run, dataset: Dataset, vertices: int) -> dict[str, float]:
    """The held-out NLL of each kind of members, the same for every run."""
    ensemble, found = Ensemble(run), {}
    for kind, choice in MEMBERS.items():
        rows = [list(range(vertices))]
        sampling = Sampling(simplexes=rows, concentration=choice["concentration"], corners=choice["corners"])
        coefficients = sample_coefficients(sampling, vertices, vertices + choice["more"], seed=0)
        at = ensemble.at(coefficients, dataset.train)
        found[kind] = Classification().nll(at.predict_proba(dataset.validation.images), dataset.validation.labels)
    return found


def _note(
    found: dict[str, list[dict[str, float]]], what: str, seed: int, scores: dict[str, float], run: Run | None = None
) -> None:
    if run is not None:
        scores = {
            "example passes": float(run.manifest.cost.example_passes),
            "forward passes": float(run.manifest.cost.forward_passes),
        } | scores
    found.setdefault(what, []).append(scores)
    texts = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    print(f"seed {seed}, {what}: {texts}", flush=True)


if __name__ == "__main__":
    main()
