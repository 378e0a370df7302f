"""``train(dataset, method, settings)``: from data and a method to a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from threading import RLock
from typing import Any

import torch

from ensembler.arguments import checked
from ensembler.data import datasets
from ensembler.data.datasets import Dataset
from ensembler.data.examples import Examples
from ensembler.data.normalisation import describe
from ensembler.device import default_modes
from ensembler.engine import Engine, Local
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.naming import is_given
from ensembler.networks.architectures import Factory, factory_name
from ensembler.networks.dropout import without_masks
from ensembler.progress import interactive
from ensembler.run import DatasetRecord, Manifest, Run, versions
from ensembler.source import hash_sources
from ensembler.trainers.distributed import ALONE, Group
from ensembler.trainers.dry_pass import dry_pass
from ensembler.trainers.events import Message, OnEvent
from ensembler.trainers.measure import averages, member_buffers
from ensembler.trainers.method import Members, Method
from ensembler.trainers.progress import progress
from ensembler.trainers.resume import Store
from ensembler.trainers.settings import Settings
from ensembler.trainers.spec import Spec
from ensembler.trainers.starts import Start, identity, load_starts, vertices
from ensembler.trainers.trainer import Trainer

__all__ = ["Training", "assemble", "centroid", "collapse_run", "measure", "train", "with_network"]

_TURN = RLock()  # a thread's, as PyTorch's random generators are those of the process


@default_modes()
@checked
def train(
    dataset: Any,
    method: Method,
    settings: Settings | None = None,
    *,
    on_event: OnEvent | None = None,
    quiet: bool = False,
    network: Factory | str | None = None,
    engine: Engine | None = None,
) -> Run:
    """Make an ensemble, and measure it on the held-out and the test data. Threads that train take turns.

    ::

        run = train("digits", FGE(members=5), Settings(epochs=20), network=my_network)
        run.save("runs/fge")

    Args:
        dataset: what to train on: a dataset, the name of one (:func:`ensembler.data.datasets.load`), or what one can
            be made of (:func:`ensembler.data.own_data.as_dataset`).
        method: what to make, e.g. ``FGE(members=5)``.
        settings: what all methods share.
        on_event: told of the dataset's notes, of every epoch, and of what the method finds on its way. By default these
            are shown, with bars, where somebody looks: on a terminal and in a notebook.
        quiet: show nothing; for ``on_event`` it means nothing.
        network: the function or class that builds the network, called as ``network(num_classes=C)``, or a name as of
            ``Settings(architecture=...)``, in whose place it is given. The run records it as ``package.module:name``.
            One that cannot be imported, such as a notebook's or a lambda, is recorded as ``__main__:name``, and is
            passed again where the run is loaded: ``Ensemble.load(path, network=...)``.
        engine: what runs its independent jobs; by default this process.

    Raises:
        UsageError: options that do not go together, or a network that cannot be trained; see
            :func:`ensembler.trainers.dry_pass.dry_pass`. DataError: the data are not those that a start was trained on.
        DivergedError: the loss is not finite.
    """
    if on_event is None:
        with progress(quiet=quiet or not interactive()) as shown:
            return train(dataset, method, settings, on_event=shown, network=network, engine=engine)
    settings, factory = with_network(settings or Settings(), network)
    starts = load_starts(method, settings)
    check_network(settings, starts)
    dataset = datasets.find(dataset)
    for note in dataset.notes:
        on_event(Message(note))
    training = Training.of(dataset, method, settings, starts, factory=factory)
    with _TURN:
        return training.tried(on_event).make(on_event, engine=engine)


def with_network(settings: Settings, network: Factory | str | None) -> tuple[Settings, Factory | None]:
    """Return settings with the name of a network, and what builds it, if it cannot be imported by that name.

    Raises:
        UsageError: the settings name another network, or it is no function or class.
    """
    if network is None:
        return settings, None
    name = network if isinstance(network, str) else factory_name(network)
    if "architecture" in settings.model_fields_set and settings.architecture != name:
        raise UsageError(f"the network is {name}, and the settings name {settings.architecture}: give one of them")
    named = settings.model_copy(update={"architecture": name})
    return named, network if not isinstance(network, str) and is_given(name) else None


@dataclass(frozen=True, eq=False)
class Training:
    """A run before it is made: the data, the options resolved, and what it starts from. See :meth:`of`."""

    dataset: Dataset
    method: Method
    settings: Settings
    starts: Mapping[str, Start]
    collapse: bool = False
    factory: Factory | None = None

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        method: Method,
        settings: Settings,
        starts: Mapping[str, Start],
        collapse: bool = False,
        factory: Factory | None = None,
    ) -> Training:
        """Fill in everything that is not given.

        Raises:
            UsageError: options that do not go together. DataError: a start was trained on other data.
        """
        runs = {name: start for name, start in starts.items() if isinstance(start, Run)}
        for run in runs.values():
            run.check_one_network("to start from")
            dataset = run.manifest.dataset.adopt(dataset)
        check_inputs(runs)
        check_frozen(list(runs.values()))
        first = next(iter(runs.values()), None)
        settings = settings.resolved(dataset, first.manifest.architecture if first else None)
        if settings.early_stopping and not method.stops_early:
            raise UsageError(
                f"{method.command} trains no solution that could stop early: leave out --early-stopping, or train a "
                "solution with it and start from that"
            )
        return cls(dataset, method.resolved(settings), settings, starts, collapse, factory)

    @cached_property
    def spec(self) -> Spec:
        """What decides the run, with its fingerprint."""
        own, shared = type(self.method), Settings
        spec = Spec(
            command=own.command,
            options=self.method.model_dump(mode="json"),
            settings=self.settings.model_dump(mode="json"),
            dataset=DatasetRecord.of(self.dataset, self.settings.augmentation),
            task=self.dataset.task,
            starts={name: identity(name, start) for name, start in self.starts.items()},
            collapse=self.collapse,
            code=hash_sources(self.settings.model_dump(mode="json")),
        )
        marks = [options.marked(mark) for options in (own, shared) for mark in ("path", "computing")]
        return spec.fingerprinted(set().union(*marks))

    def with_seed(self, seed: int) -> Training:
        """The same with another seed."""
        return replace(self, settings=self.settings.model_copy(update={"seed": seed}))

    def tried(self, on_event: OnEvent = lambda event: None, processes: int = 1) -> Training:
        """Try the network before anything is trained or written; the same, with its memory format filled in.

        Raises:
            UsageError: the network cannot be trained, stored or evaluated.
        """
        say, check = lambda text: on_event(Message(text)), self.method.check
        memory_format = dry_pass(self.dataset, self.settings, say, processes, check, self.factory)
        return replace(self, settings=self.settings.model_copy(update={"memory_format": memory_format}))

    def make(
        self,
        on_event: OnEvent = lambda event: None,
        store: Store | None = None,
        engine: Engine | None = None,
        group: Group = ALONE,
    ) -> Run:
        """Train. Arguments as of :class:`ensembler.trainers.trainer.Trainer`."""
        method = self.method
        given = (self.dataset, self.settings, self.starts, on_event, store, engine or Local(), group)
        trainer = Trainer(*given, self.factory)
        if method.starts_fresh and trainer.starts_solved:
            raise UsageError(
                f"{method.command} starts from fresh weights: leave out --init, or give one of other classes"
            )
        if self.settings.early_stopping and trainer.starts_solved:
            raise UsageError("--early-stopping has no solution to stop where one is given: leave it out")
        members, name, independent = method.train(trainer), method.name, method.independent
        if self.collapse:
            members = centroid(trainer, members)
            name, independent = f"{name}-centroid", False
        return assemble(self.spec, trainer, members, name, independent)


def check_network(settings: Settings, starts: Mapping[str, Start]) -> None:
    """Refuse settings that name a network, and a run of another one to start from."""
    for name, start in starts.items():
        own = start.manifest.architecture if isinstance(start, Run) else settings.architecture
        if "architecture" in settings.model_fields_set and own != settings.architecture and " + " not in own:
            raise UsageError(
                f"{name} is a run of {own}, and {settings.architecture} is to be trained: leave out the network, or "
                "start from a run of it"
            )


def check_frozen(runs: Sequence[Run]) -> None:
    """Refuse runs of one architecture whose frozen weights differ: what joins them has one set only."""
    for run in runs[1:]:
        for name, tensor in run.frozen.items():
            if name in runs[0].frozen and not torch.equal(tensor, runs[0].frozen[name]):
                raise UsageError(
                    f"the runs differ in {name}, which is frozen, so that no weights lie between them: train all of "
                    "them from one --init or from the same published --weights"
                )


def check_inputs(runs: Mapping[str, Run]) -> None:
    """Refuse runs whose networks take differently normalised images.

    Raises:
        UsageError: two of them; the message names both.
    """
    for (first, one), (name, other) in pairwise(runs.items()):
        ours, theirs = one.manifest.dataset, other.manifest.dataset
        if (ours.mean, ours.std) != (theirs.mean, theirs.std):
            raise UsageError(
                f"{first} takes images normalised with {describe(ours.mean, ours.std)}, {name} with "
                f"{describe(theirs.mean, theirs.std)}: their weights cannot be joined"
            )


def centroid(trainer: Trainer, members: Members) -> Members:
    """The average of the vertices (K, P) as one network: SWA of snapshots (Izmailov et al. 2018).

    Where members are drawn from Gaussians, it is the average of their means instead: SWA of all iterates. BatchNorm
    statistics are recomputed for it (sec. 3.2), unless it is the one vertex that there is; all other buffers are the
    first member's. Dropout's masks are left out. Its metrics are the :func:`~ensembler.trainers.measure.averages`.
    """
    vertices, gaussians = members.vertices, members.gaussians
    means = trainer.weights.flatten({name: rows[:, 0] for name, rows in gaussians.items()}) if gaussians else vertices
    one = means.mean(dim=0, keepdim=True)
    first = {name: rows[0] for name, rows in without_masks(members.buffers).items()}
    solved = {0: first} if len(vertices) == 1 and not gaussians else {}
    found = averages(trainer, means, first)
    metrics = {"averages": found} if found else {}
    buffers = member_buffers(trainer, one, torch.ones(1, 1), first, solved)
    return Members(one, torch.ones(1, 1), buffers, metrics=metrics)


@default_modes()
@checked
def collapse_run(run: Run, dataset: Dataset, device: str | torch.device | None = None) -> Run:
    """The centroid of a run's vertices as a run of one network; it costs what the run cost, and its statistics.

    Raises:
        DataError: ``dataset`` is not what the run was trained on.
    """
    run.check_one_network("to average")
    manifest = run.manifest
    settings = Settings(**manifest.settings | {"init": None, "weights": None, "device": device})
    trainer = Trainer(manifest.dataset.adopt(dataset), settings, factory=run.network)
    rows = vertices(trainer, run)
    trainer.ledger.entries.update({name: entry.model_copy() for name, entry in manifest.cost.entries.items()})
    trainer.ledger.before, trainer.ledger.history = manifest.cost.seconds or 0.0, [dict(line) for line in run.history]
    buffers = {name: own.to(trainer.device) for name, own in run.buffers.items()}
    spec = Spec(
        command=manifest.command or "",
        options=manifest.options,
        settings=manifest.settings,
        dataset=manifest.dataset,
        task=manifest.task,
        starts={"run": run.sha256},
        collapse=True,
    ).fingerprinted(set())
    members = Members(rows, run.coefficients, buffers, gaussians=run.gaussians)
    return assemble(spec, trainer, centroid(trainer, members), f"{manifest.method}-centroid", False)


def assemble(spec: Spec, trainer: Trainer, members: Members, name: str, independent: bool) -> Run:
    """The run, measured on the held-out and the test data."""
    cost = trainer.ledger.cost()
    for part, entry in cost.entries.items():
        entry.ids = entry.ids or [f"{spec.fingerprint}/{part}"]
    manifest = Manifest(
        method=name,
        command=spec.command,
        independent=independent,
        task=spec.task,
        architecture=trainer.settings.architecture,
        dataset=trainer.record,
        seed=trainer.settings.seed,
        vertices=len(members.vertices),
        members=len(members.coefficients),
        parameters=len(trainer.weights),
        sampling=members.sampling,
        options=spec.options | ({"collapse": "centroid"} if spec.collapse else {}),
        settings=spec.settings,
        fingerprint=spec.fingerprint,
        cost=cost,
        metrics={},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )
    run = Run(
        manifest=manifest,
        vertices=trainer.weights.unflatten(members.vertices.cpu()),
        coefficients=members.coefficients.cpu(),
        buffers=members.buffers,
        frozen={key: tensor.cpu() for key, tensor in trainer.weights.frozen().items()},
        gaussians={key: tensor.cpu() for key, tensor in members.gaussians.items()},
        history=trainer.ledger.history,
        network=trainer.factory,
    )

    manifest.metrics = members.metrics | trainer.group.from_first(lambda: measure(run, trainer.dataset, trainer.device))
    return run


def measure(run: Run, dataset: Dataset, device: torch.device | str | None) -> dict[str, dict[str, float | None]]:
    """The run's scores on the held-out and the test data; its manifest gets what its networks compute."""
    ensemble = Ensemble(run, device)
    ensemble.record_probes()
    splits = {"validation": dataset.validation, "test": dataset.test}
    return {split: _scores(ensemble, examples) for split, examples in splits.items()}


def _scores(ensemble: Ensemble, examples: Examples) -> dict[str, float | None]:
    parts = examples.batches(16 * ensemble.batch_size)  # files are decoded a few at a time
    members = torch.cat([ensemble.predict_members(part.data) for part in parts], dim=1)
    return ensemble.task.scores(members, examples.labels) | {"examples": len(examples)}
