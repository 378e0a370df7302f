"""Trainings in this process that keep what they have reached, as those of a command do; and what interrupts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensembler.run import Run
from ensembler.trainers.method import Method
from ensembler.trainers.resume import Store, UnfinishedRun
from ensembler.trainers.settings import Settings
from ensembler.trainers.starts import load_starts
from ensembler.trainers.training import Training
from tests._small import dataset


def make(path: Path | None, method: Method, settings: Settings, *, data=None, every=0.0, writer=True, **given) -> Run:
    """The run that is to be at ``path``, which may have been begun before; with ``None``, nothing is kept."""
    training = Training.of(data or dataset(), method, settings, load_starts(method, settings))
    unfinished = UnfinishedRun(path, training.spec, every, writer) if path else None
    try:
        return training.make(store=unfinished.store if unfinished else None, **given)
    finally:
        if unfinished:
            unfinished.close()  # as the end of a process does


def ctrl_c() -> None:
    raise KeyboardInterrupt


def after(patch: pytest.MonkeyPatch, calls: int, name: str = "save_state", do: Callable[[], Any] = ctrl_c) -> None:
    """Do something after so many calls of a store's ``save_state``, of parts, or ``save``, of jobs."""
    original, left = getattr(Store, name), calls

    def counted(self, *arguments):
        nonlocal left
        original(self, *arguments)
        left -= 1
        if left == 0:
            do()

    patch.setattr(Store, name, counted)
