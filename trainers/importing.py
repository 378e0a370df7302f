"""``import_checkpoints(files, ...)``: checkpoints that were trained elsewhere as a run, a deep ensemble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.arguments import checked
from ensembler.data import datasets, normalisation
from ensembler.data.examples import Examples
from ensembler.device import default_modes
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.networks import checkpoints, matching
from ensembler.networks.architectures import Factory
from ensembler.run import CostEntry, Run
from ensembler.seeds import generator
from ensembler.storage.artefact import MANIFEST, sha256
from ensembler.storage.urls import as_paths
from ensembler.trainers.dry_pass import dry_pass
from ensembler.trainers.events import Message, OnEvent
from ensembler.trainers.ledger import Ledger
from ensembler.trainers.method import Members
from ensembler.trainers.settings import Settings
from ensembler.trainers.spec import Spec
from ensembler.trainers.starts import Solution, stack_buffers
from ensembler.trainers.trainer import Trainer
from ensembler.trainers.training import assemble, with_network
from ensembler.weights import FlatWeights

__all__ = ["import_checkpoints"]

EXAMPLES = 1000  # validation examples on which other normalisations are tried, at most


@default_modes()
@checked
def import_checkpoints(
    files: str | Path | Sequence[str | Path],
    architecture: str | Factory,
    dataset: Any,
    *,
    device: str | torch.device | None = None,
    on_event: OnEvent = lambda event: None,
) -> Run:
    """Make a deep ensemble of checkpoints, and measure it on the held-out and the test data.

    ::

        run = import_checkpoints(["a.pt", "b.pt"], "torchvision:resnet18", "cifar10")
        run.save("runs/imported")

    Weights and BatchNorm statistics stay as they are. What the training cost is unknown. The images are normalised as
    ``dataset`` says (:func:`ensembler.data.normalisation.normalised` changes it), which must be what the checkpoints
    were trained with; where another normalisation gives clearly more right answers, that is reported.

    Args:
        files: safetensors, or what ``torch.save`` made of a state dict; one for each member.
        architecture: a name of :mod:`ensembler.networks.architectures`, or what builds the network.
        dataset: what they were trained on, as of :func:`ensembler.trainers.train`. Its validation images should not
            have been trained on.
        device: where they are measured.
        on_event: told what was taken of each file, and how well it does.

    Raises:
        ArtefactError, CorruptError: a file cannot be read.
        ShapeError: a file's weights do not fit the network.
        UsageError: a head of other classes, two files with the same weights, or frozen weights that differ.
    """
    if not (paths := as_paths(files)):
        raise UsageError("name at least one checkpoint")
    dataset = datasets.find(dataset)
    for note in dataset.notes:
        on_event(Message(note))
    settings, factory = with_network(Settings(device=device), architecture)
    settings = settings.resolved(dataset)
    chosen = dry_pass(dataset, settings, lambda text: on_event(Message(text)), factory=factory)
    settings = settings.model_copy(update={"memory_format": chosen})
    trainer = Trainer(dataset, settings, on_event=on_event, factory=factory)
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # seed0/best.pt, seed1/best.pt
        names = [str(path) for path in paths]
    given = [_read(trainer, path, name) for path, name in zip(paths, names, strict=True)]
    _check(given, names)
    trainer.weights.load_frozen(given[0].frozen)
    origins = {f"solution {number}": name for number, name in enumerate(names, start=1)}
    entries = {name: CostEntry(seconds=None, device="unknown", origin=origin) for name, origin in origins.items()}
    trainer.ledger = Ledger("unknown", entries)
    members = Members(torch.stack([one.vector for one in given]), torch.eye(len(given)), stack_buffers(given))
    spec = Spec(
        command="import",
        options={"checkpoints": [str(path.resolve()) for path in paths]},
        settings=settings.model_dump(mode="json", include={"architecture", "augmentation", "memory_format"}),
        dataset=trainer.record,
        task=dataset.task,
        starts={str(path): sha256(path) for path in paths},
    ).fingerprinted({"checkpoints", "memory_format"})
    run = assemble(spec, trainer, members, "single" if len(paths) == 1 else "deep-ensemble", independent=True)
    trainer.say(f"inputs are normalised with {normalisation.describe(dataset.mean, dataset.std)}")
    _judge(trainer, run, names)
    return run


@dataclass(frozen=True)
class _Given(Solution):
    """A checkpoint's weights in the network, on the CPU.

    Attributes:
        frozen: parameters that the network does not train, by name.
    """

    frozen: Mapping[str, Tensor]


def _read(trainer: Trainer, path: Path, name: str) -> _Given:
    """Read a checkpoint of the trainer's network.

    Raises:
        As :func:`import_checkpoints`.
    """
    if (path / MANIFEST).is_file():
        raise UsageError(f"{path} is a run, not a file of weights: join runs with ensembler combine")
    network = trainer.network(trainer.settings.seed)
    found = matching.load(network, replace(checkpoints.read(path), origin=name))
    if found.fresh:
        raise UsageError(
            f"{path} was not trained on the {len(trainer.dataset.classes)} classes of {trainer.dataset.title}: "
            f"{found.head}: choose another --dataset, or train the head with train-fge --init {path}"
        )
    if found.said:
        trainer.say(found.said)
    weights = FlatWeights(network)
    frozen = {name: tensor.cpu() for name, tensor in weights.frozen().items()}
    return _Given(weights.vector.cpu(), {name: tensor.cpu() for name, tensor in weights.buffers().items()}, frozen)


def _check(given: Sequence[_Given], names: Sequence[str]) -> None:
    """Refuse members that are the same, and frozen parameters that are not.

    Raises:
        UsageError: the message names both files.
    """
    for (one, path), (other, another) in combinations(zip(given, names, strict=True), 2):
        differing = [name for name, tensor in one.frozen.items() if not torch.equal(tensor, other.frozen[name])]
        if differing:
            raise UsageError(
                f"{differing[0]!r} is frozen in the network (requires_grad=False) and differs between {path} and "
                f"{another}: build the network without freezing it"
            )
        alike = all(torch.equal(tensor, other.buffers[name]) for name, tensor in one.buffers.items())
        if alike and torch.equal(one.vector, other.vector):
            raise UsageError(f"{path} and {another} hold the same weights: leave one of them out")


def _judge(trainer: Trainer, run: Run, names: Sequence[str]) -> None:
    """Report each checkpoint's accuracy on validation images, and what may be wrong with it."""
    dataset = trainer.dataset
    if not dataset.classes:
        return
    order = torch.randperm(len(dataset.validation), generator=generator(0, "import"))
    some = dataset.validation.part(order[:EXAMPLES].sort().values)
    right = _right(run, trainer, some)
    for name, own in zip(names, right, strict=True):
        trainer.say(f"{name}: {_share(own)} of {len(own):,} validation images right")
    guessing = float(torch.bincount(some.labels.cpu(), minlength=len(dataset.classes)).max() / len(some))
    most = guessing + 3 * math.sqrt(guessing * (1 - guessing) / len(some))
    poor = [name for name, own in zip(names, right, strict=True) if own.double().mean() <= most]
    if poor:
        trainer.say(
            f"warning: {', '.join(poor)}: not clearly better than guessing ({100 * guessing:.1f} %): check the "
            "architecture, the order of the classes, --normalisation and --image-size"
        )
    if run.manifest.dataset.kind == "images":
        _try_others(trainer, run, some, right[0], names[0])


def _try_others(trainer: Trainer, run: Run, some: Examples, right: Tensor, path: str) -> None:
    """Report another normalisation with which the first checkpoint does clearly better."""
    record = run.manifest.dataset
    tried = {f"with --normalisation {name}": moments for name, moments in normalisation.NAMES.items()}
    tried["without --normalisation"] = datasets.moments(trainer.dataset.train)
    first = {name: rows[:1] for name, rows in run.buffers.items()}
    found = {}
    for name, (mean, std) in tried.items():
        if len(mean) == len(record.mean):
            own = run.manifest.model_copy(
                update={"dataset": record.model_copy(update={"mean": list(mean), "std": list(std)})}
            )
            one = replace(run, manifest=own, coefficients=run.coefficients[:1], buffers=first)
            found[name] = _right(one, trainer, some)[0]
    name, best = max(found.items(), key=lambda item: int(item[1].sum()))
    gained, lost = int((best & ~right).sum()), int((right & ~best).sum())
    if gained - lost > 3 * math.sqrt(gained + lost):  # a sign test
        trainer.say(
            f"warning: {name}, {path} would have {_share(best)} of the validation images right instead of "
            f"{_share(right)}: import with the normalisation that it was trained with"
        )


def _right(run: Run, trainer: Trainer, examples: Examples) -> Tensor:
    """Return whether each member answers each example rightly, (M, B)."""
    ensemble = Ensemble(run, trainer.device)
    parts = [ensemble.predict_members(part.data) for part in examples.batches(16 * ensemble.batch_size)]
    return torch.cat(parts, dim=1).argmax(dim=-1) == examples.labels.cpu()


def _share(right: Tensor) -> str:
    return f"{100 * float(right.double().mean()):.1f} %"
