"""``combine(runs, ...)``: the members of several runs of one dataset as one run.

Runs of one network are one matrix of vertices, of which each run's members are sums as before: the coefficients are
block-diagonal. Different networks, or differently normalised images, are parts of the run: a run each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import torch

from ensembler.arguments import checked
from ensembler.data.datasets import Dataset
from ensembler.device import default_modes
from ensembler.errors import UsageError
from ensembler.run import Cost, CostEntry, Run, versions
from ensembler.trainers.spec import Spec
from ensembler.trainers.training import measure

__all__ = ["combination", "combine"]


@default_modes()
@checked
def combine(runs: Mapping[str, Run], dataset: Dataset | None = None, device: str | torch.device | None = None) -> Run:
    """Combine the members of runs of one dataset, and measure them on the held-out and the test data.

    ::

        run = combine({"a": Run.load("runs/a"), "b": Run.load("runs/b")})
        run.save("runs/both")

    The networks may differ. The members are fixed, and keep their order. Of members with the same weights, the first
    is kept. Costs are added up; what several runs had in common, such as the solution that they started from, counts
    once.

    Args:
        runs: by the names that the parts of the cost get.
        dataset: what the runs were trained on; by default it is loaded from its default folder.
        device: where the members are measured.

    Raises:
        UsageError: fewer than two runs, runs of other data, or a run that adds no member.
        DataError: the dataset is missing, or not what the runs were trained on.
    """
    _check(runs)
    parts = list(_parts(runs))
    stacked = [_stack(group) for group in _groups(parts)]
    manifests = [run.manifest for run in runs.values()]
    first, architectures = manifests[0], list(dict.fromkeys(part.manifest.architecture for part in stacked))
    methods = dict.fromkeys(manifest.method for manifest in manifests)
    independent = all(manifest.independent for manifest in manifests)
    spec = combination(runs)
    manifest = first.model_copy(
        update={
            "method": "deep-ensemble" if independent else " + ".join(methods),
            "command": spec.command,
            "independent": independent,
            "architecture": " + ".join(architectures),
            "vertices": sum(part.manifest.vertices for part in stacked),
            "members": sum(part.manifest.members for part in stacked),
            "parameters": sum(part.manifest.parameters for part in stacked),
            "parts": len(stacked) if len(stacked) > 1 else 0,
            "sampling": None,
            "options": spec.options,
            "settings": spec.settings,
            "fingerprint": spec.fingerprint,
            "cost": _cost(runs),
            "metrics": {},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "files": {},
        }
    )
    history = [dict(line) | {"part": f"{name}, {line['part']}"} for name, run in runs.items() for line in run.history]
    run = replace(stacked[0], manifest=manifest, history=history, sha256="", path=None)
    if len(stacked) > 1:
        run = Run(manifest, {}, torch.empty(0, 0), {}, history=history, parts=stacked)
    manifest.metrics = measure(run, first.dataset.load() if dataset is None else first.dataset.adopt(dataset), device)
    return run


def combination(runs: Mapping[str, Run]) -> Spec:
    """What decides a combination, with its fingerprint: the runs, in their order."""
    manifests = [run.manifest for run in runs.values()]
    first = manifests[0]
    return Spec(
        command="combine",
        options={"runs": list(runs)},
        settings={
            name: value
            for name, value in first.settings.items()
            if all(name in manifest.settings and manifest.settings[name] == value for manifest in manifests)
        },
        dataset=first.dataset,
        task=first.task,
        starts={name: run.sha256 for name, run in runs.items()},
    ).fingerprinted({"runs"})


def _check(runs: Mapping[str, Run]) -> None:
    """Refuse runs whose members cannot be asked the same images.

    Raises:
        UsageError: fewer than two, or two of different data.
    """
    if len(runs) < 2:
        raise UsageError("name at least two runs to combine")
    (name, first), *others = runs.items()
    ours = first.manifest.dataset
    for other, run in others:
        theirs = run.manifest.dataset
        if run.manifest.task != first.manifest.task or theirs.kind != ours.kind:
            raise UsageError(
                f"{other} is a {run.manifest.task} of {theirs.kind}, {name} a {first.manifest.task} of {ours.kind}: "
                "combine runs of one task"
            )
        if (theirs.train_sha256, theirs.test_sha256, theirs.shape) != (ours.train_sha256, ours.test_sha256, ours.shape):
            raise UsageError(
                f"{other} was trained on {theirs.title} ({_size(theirs.shape)}) and {name} on {ours.title} "
                f"({_size(ours.shape)}), or on another split of it: combine runs of the same images"
            )
        if theirs.classes != ours.classes:
            raise UsageError(f"the classes of {other} are not those of {name}, or in another order: combine equal ones")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _parts(runs: Mapping[str, Run]) -> Iterator[Run]:
    """Yield each run of one network, without the members that an earlier one has.

    Raises:
        UsageError: a run has no member of its own.
    """
    seen: set[str] = set()
    for name, run in runs.items():
        before = len(seen)
        for part in run.networks:
            kept = []
            for member in range(len(part.coefficients)):
                digest = _digest(part, member)
                if digest not in seen:
                    kept.append(member)
                    seen.add(digest)
            if kept:
                buffers = {name: rows[kept] for name, rows in part.buffers.items()}
                yield replace(part, coefficients=part.coefficients[kept], buffers=buffers)
        if len(seen) == before:
            raise UsageError(f"every member of {name} has the weights of one before: leave {name} out")


def _digest(run: Run, member: int) -> str:
    """Hash what makes a member: its network, normalisation, weights and buffers."""
    record, row = run.manifest.dataset, run.coefficients[member]
    digest = hashlib.sha256(repr([run.manifest.architecture, record.mean, record.std]).encode())
    weights = {name: torch.tensordot(row.to(rows), rows, 1) for name, rows in run.vertices.items()}
    buffers = {f"buffer.{name}": rows[member] for name, rows in run.buffers.items()}
    for name, tensor in sorted((weights | buffers | dict(run.frozen)).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _groups(parts: Sequence[Run]) -> list[list[Run]]:
    """Group runs whose vertices can be stacked: of one network, its frozen parameters and its normalisation."""
    groups: list[list[Run]] = []
    for part in parts:
        group = next((group for group in groups if _alike(group[0], part)), None)
        if group is None:
            groups.append([part])
        else:
            group.append(part)
    return groups


def _alike(one: Run, other: Run) -> bool:
    ours, theirs = one.manifest, other.manifest
    return (
        (ours.architecture, ours.dataset.mean, ours.dataset.std)
        == (theirs.architecture, theirs.dataset.mean, theirs.dataset.std)
        and one.network is other.network
        and {name: rows.shape[1:] for name, rows in one.vertices.items()}
        == {name: rows.shape[1:] for name, rows in other.vertices.items()}
        and {name: rows.shape[1:] for name, rows in one.buffers.items()}
        == {name: rows.shape[1:] for name, rows in other.buffers.items()}
        and one.frozen.keys() == other.frozen.keys()
        and all(torch.equal(tensor, other.frozen[name]) for name, tensor in one.frozen.items())
    )


def _stack(group: Sequence[Run]) -> Run:
    """Stack runs of one network: their vertices, and their coefficients as blocks."""
    first = group[0]
    coefficients = torch.block_diag(*(run.coefficients for run in group))  # type: ignore[no-untyped-call]
    manifest = first.manifest.model_copy(
        update={
            "vertices": coefficients.shape[1],
            "members": len(coefficients),
            "parts": 0,
            "sampling": None,
            "files": {},
        }
    )
    return Run(
        manifest,
        {name: torch.cat([run.vertices[name] for run in group]) for name in first.vertices},
        coefficients,
        {name: torch.cat([run.buffers[name] for run in group]) for name in first.buffers},
        first.frozen,
        network=first.network,
    )


def _cost(runs: Mapping[str, Run]) -> Cost:
    """Add up the costs; a training that several runs hold counts once."""
    costs = [run.manifest.cost for run in runs.values()]
    entries: dict[str, CostEntry] = {}
    shared: list[CostEntry] = []
    counted: set[str] = set()
    for name, run in runs.items():
        for part, entry in run.manifest.cost.entries.items():
            if entry.ids and counted.issuperset(entry.ids):
                shared.append(entry)
            else:
                entries[f"{name}, {part}"] = entry
            counted.update(entry.ids)
    passes = [cost.example_passes for cost in costs if cost.example_passes is not None]
    seconds = [cost.seconds for cost in costs if cost.seconds is not None]
    peaks = [cost.peak_memory for cost in costs if cost.peak_memory is not None]
    return Cost(
        example_passes=sum(passes) - sum(entry.example_passes for entry in shared) if passes else None,
        forward_passes=sum(cost.forward_passes for cost in costs) - sum(entry.forward_passes for entry in shared),
        seconds=round(sum(seconds) - sum(entry.seconds or 0.0 for entry in shared), 3) if seconds else None,
        peak_memory=max(peaks, default=None),
        device=", ".join(dict.fromkeys(cost.device for cost in costs if cost.device != "unknown")) or "unknown",
        entries=entries,
    )
