"""``ensembler eval`` over all corruptions against a bare loop of forward passes over the same images.

``overhead`` is the time of a whole evaluation (corrupting images, predicting, scoring, keeping predictions) divided by
that of the forward passes alone, on corrupted images in the same batches: the median over pairs that ran one after the
other, both keeping freed memory (``ensembler.device.keep_freed``). ``seconds.again`` is the time of a second
evaluation, from kept predictions.

    python benchmarks/evaluation.py [--quick] [--json FILE]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from _harness import arguments, report, spread, timed

from ensembler import load_dataset
from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.shift.corruptions import AVAILABLE, SEVERITIES, corrupt
from ensembler.networks import architectures
from ensembler.run import Cost, DatasetRecord, Manifest, Run
from ensembler.weights import FlatWeights

MEMBERS = 4


def make_run(path: Path, architecture: str) -> Path:
    """Save an untrained deep ensemble for the digits, which predicts at the same speed as a trained one."""
    record = DatasetRecord.of(load_dataset("digits"))
    networks = [FlatWeights(architectures.build(architecture, len(record.classes), seed)) for seed in range(MEMBERS)]
    buffers = [weights.buffers() for weights in networks]
    manifest = Manifest(
        method="deep-ensemble",
        architecture=architecture,
        dataset=record,
        seed=0,
        vertices=MEMBERS,
        members=MEMBERS,
        parameters=len(networks[0]),
        sampling=None,
        cost=Cost(example_passes=0, forward_passes=0, seconds=0, peak_memory=None, device="cpu", entries={}),
        metrics={},
        created="",
        versions={},
    )
    return Run(
        manifest,
        networks[0].unflatten(torch.stack([weights.vector for weights in networks])),
        torch.eye(MEMBERS),
        {name: torch.stack([own[name] for own in buffers]) for name in buffers[0]},
    ).save(path)


def main() -> None:
    options = arguments(__doc__)
    architecture, repeats = ("cnn", 1) if options.quick else ("resnet20", 3)
    with tempfile.TemporaryDirectory() as folder:
        path = make_run(Path(folder) / "run", architecture)
        ensemble = Ensemble.load(path)
        record, test = ensemble.run.manifest.dataset, load_dataset("digits").test
        corrupted = [corrupt(test.images, name, severity) for name in AVAILABLE for severity in SEVERITIES]
        images = [load_dataset("digits").validation.images, test.images, *corrupted]

        def bare() -> None:
            with torch.inference_mode():
                for cell in images:
                    for member in range(MEMBERS):
                        network = ensemble.network(member)
                        for batch in cell.split(ensemble.batch_size):
                            inputs = normalise(batch.to(ensemble.device), tuple(record.mean), tuple(record.std))
                            torch.softmax(network(inputs), dim=1).cpu()

        def whole(cache: str) -> None:
            evaluate_paths([path], EvaluationOptions(shift=["corruptions"], cache=Path(folder) / cache))

        evaluate_paths([path], EvaluationOptions(cache=Path(folder) / "warm"))  # imports
        ratios, forward = [], []
        for repeat in range(repeats):
            forward.append(timed(bare))
            ratios.append(timed(lambda repeat=repeat: whole(str(repeat))) / forward[-1])  # type: ignore[misc]
        again = timed(lambda: whole("0"))
    print(f"{architecture}, {MEMBERS} members, {len(corrupted)} cells of {len(test)} images")
    print(f"evaluation / forward passes {spread(ratios)}; the passes {statistics.median(forward):.1f} s")
    print(f"again, from the kept predictions: {again:.2f} s")
    report({"overhead": statistics.median(ratios), "seconds.again": again}, repeats, options.json)


if __name__ == "__main__":
    main()
