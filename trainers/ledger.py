"""What a training did and what it cost, entry by entry; ledgers of work done elsewhere are merged into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ensembler.device import forget_peak, peak_memory
from ensembler.run import Cost, CostEntry
from ensembler.side_by_side import own_time
from ensembler.trainers.events import EpochEnd

__all__ = ["Ledger"]


@dataclass(eq=False)
class Ledger:
    """Costs and history of a training, or of a job of it.

    Attributes:
        device: the name of what it runs on.
        entries: what each part cost.
        history: one mapping for each epoch, with the ``seconds`` that had passed by then.
        before: seconds spent elsewhere: on what it starts from, on jobs, before it was interrupted.
    """

    device: str
    entries: dict[str, CostEntry] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    before: float = 0.0
    _start: float = field(default_factory=own_time)

    @property
    def seconds(self) -> float:
        """Seconds spent in all."""
        return self.before + own_time() - self._start

    @contextmanager
    def entry(self, name: str, device: torch.device) -> Iterator[CostEntry]:
        """The entry of that name; the block's time and memory are added to it."""
        entry = self.entries.setdefault(name, CostEntry(device=self.device))
        entry.ids = []  # what goes on, of a run that this one starts from, is no longer that run's own
        start = own_time()
        forget_peak(device)
        try:
            yield entry
        finally:  # what diverged has cost something, too
            entry.seconds = round((entry.seconds or 0.0) + own_time() - start, 3)
            entry.peak_memory = _largest(entry.peak_memory, peak_memory(device))

    def epoch(self, end: EpochEnd, forward_passes: int = 0) -> None:
        """Count an epoch's passes and add it to the history."""
        entry = self.entries[end.part]
        entry.example_passes += end.epoch.examples
        entry.forward_passes += forward_passes
        self.history.append(end.record() | {"seconds": round(self.seconds, 3)})

    def fork(self) -> Ledger:
        """An empty ledger, for a job; see :meth:`merging`."""
        return Ledger(self.device)

    def resume(self, part: str, record: Mapping[str, Any]) -> None:
        """Go on from the :meth:`record` that was taken in the midst of a part."""
        self._merge(record)
        self.entries[part].seconds = self.before = record["seconds"]

    @contextmanager
    def merging(self) -> Iterator[list[Mapping[str, Any]]]:
        """Merge the :meth:`record` of each fork that the block collects, as if they had run one after another."""
        found: list[Mapping[str, Any]] = []
        seconds = self.seconds
        try:
            yield found
        finally:
            self.before = seconds
            for record in found:
                self._merge(record)
                self.before += record["seconds"]
            self._start = own_time()

    @contextmanager
    def forked(self) -> Iterator[Ledger]:
        """A fork that is merged when the block ends, by an error or not."""
        fork = self.fork()
        with self.merging() as ledgers:
            try:
                yield fork
            finally:
                ledgers.append(fork.record())

    def record(self) -> dict[str, Any]:
        """Entries, history and seconds, as JSON values."""
        entries = {name: entry.model_dump() for name, entry in self.entries.items()}
        return {"entries": entries, "history": self.history, "seconds": self.seconds}

    def cost(self) -> Cost:
        """The sum of all entries; unknown where everything was trained elsewhere."""
        entries = self.entries.values()
        passes = sum(entry.example_passes for entry in entries)
        elsewhere = [entry.origin for entry in entries if entry.origin]
        timed = [entry for entry in entries if entry.seconds is not None]
        peaks = [entry.peak_memory for entry in entries if entry.peak_memory is not None]
        return Cost(
            example_passes=None if elsewhere and not passes else passes,
            forward_passes=sum(entry.forward_passes for entry in entries),
            seconds=None if elsewhere and not timed else round(self.seconds, 3),
            peak_memory=max(peaks, default=None),
            device=self.device,
            entries=self.entries,
        )

    def _merge(self, record: Mapping[str, Any]) -> None:
        for name, content in record["entries"].items():
            new = CostEntry.model_validate(content)
            old = self.entries.setdefault(name, CostEntry(device=new.device, ids=new.ids))
            old.example_passes += new.example_passes
            old.forward_passes += new.forward_passes
            old.seconds = None if new.seconds is None else round((old.seconds or 0.0) + new.seconds, 3)
            old.peak_memory = _largest(old.peak_memory, new.peak_memory)
            old.origin = old.origin or new.origin
        for line in record["history"]:
            self.history.append(line | {"seconds": round(self.before + line["seconds"], 3)})


def _largest(*sizes: int | None) -> int | None:
    return max((size for size in sizes if size is not None), default=None)
