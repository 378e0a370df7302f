"""Jobs at once in one process end where they would have ended alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from ensembler.engine import Local
from ensembler.errors import DivergedError, UsageError
from ensembler.side_by_side import SideBySide, own_time, turn
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from ensembler.trainers.events import EpochEnd
from tests._small import SETTINGS, dataset
from tests._training import call, same


@pytest.mark.parametrize(
    ("network", "options"), [("noisy", {}), ("counting", {"optimiser": "adamw", "early_stopping": 5})], ids=str
)
@pytest.mark.parametrize(
    "method",
    [DeepEnsemble(members=3), Simplex(vertices=2, simplexes=3, vertex_epochs=4, members=6)],
    ids=["members", "simplexes"],
)
def test_members_side_by_side_are_those_trained_alone(method, network, options):
    own = {"architecture": f"tests._small:{network}", "epochs": 6}
    settings, order = Settings(**SETTINGS | own | options), []

    def note(event):
        if isinstance(event, EpochEnd):
            order.append(event.part)

    before = torch.random.get_rng_state()
    found = train(dataset(), method, settings, engine=SideBySide(2), on_event=note)
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second = method_parts = list(dict.fromkeys(order))[:2]
    assert order.index(second) < len(order) - 1 - order[::-1].index(first), f"{method_parts} were trained at once"
    alone = train(dataset(), method, settings)
    assert same(found, alone)
    assert all(torch.equal(rows, alone.buffers[name]) for name, rows in found.buffers.items())
    assert found.manifest.cost.example_passes == alone.manifest.cost.example_passes
    assert found.manifest.fingerprint == alone.manifest.fingerprint


def count(shared, argument, emit):
    """A job of ``argument`` turns."""
    for step in range(argument):
        emit(threading.get_ident(), step)
        turn()
    return argument


def test_jobs_take_turns_and_only_one_works_at_a_time():
    at_work, seen = [0], []

    def emit(thread, step):
        at_work[0] += 1
        time.sleep(0.001)
        seen.append(thread)
        assert at_work[0] == 1
        at_work[0] -= 1

    results = dict(SideBySide(3).run(count, None, [20] * 3, emit))
    assert results == {0: 20, 1: 20, 2: 20}
    assert len(seen) == 60


def test_as_many_jobs_as_copies_of_what_they_share():
    class Shared:
        copies = 0

        def __copy__(self):
            Shared.copies += 1
            return Shared()

    def job(shared, argument, emit):
        used.append(id(shared))
        while len(used) < 2:  # until the second has begun
            turn()
        for _ in range(12):
            turn()
        return argument

    used: list[int] = []
    kept = Shared()
    assert sorted(SideBySide(2).run(job, kept, list(range(5)), print)) == [(n, n) for n in range(5)]
    assert Shared.copies == 1
    assert len(set(used)) == 2
    assert list(SideBySide(2).run(job, kept, [], print)) == []


def test_an_error_of_one_stops_the_others():
    def job(shared, argument, emit):
        for step in range(10**9):
            if argument == 1 and step == 3:
                raise DivergedError("the loss is nan")
            turn()

    before = threading.active_count()
    with pytest.raises(DivergedError, match="the loss is nan"):
        list(SideBySide(3).run(job, None, [0, 1, 2], print))
    assert threading.active_count() == before


def test_closing_it_stops_all():
    def job(shared, argument, emit):
        while argument:
            turn()
        return argument

    before, results = threading.active_count(), SideBySide(3).run(job, None, [1, 0, 1], print)
    assert next(results) == (1, 0)
    results.close()
    assert threading.active_count() == before


def test_what_does_not_fit_into_memory_is_said_with_the_number_that_does():
    class Room:
        def most(self):
            return 2

    def job(shared, argument, emit):
        while True:
            turn()

    with pytest.raises(UsageError, match=r"4 networks do not fit .*: give --parallel-members 2"):
        list(SideBySide(4, Room).run(job, None, [50] * 4, print))
    assert len(list(SideBySide(2, Room).run(count, None, [50] * 4, lambda *event: None))) == 4


def test_the_time_of_a_job_is_that_of_its_turns():
    """So that the seconds of jobs side by side add up to those that passed."""

    def job(shared, argument, emit):
        began = own_time()
        for _ in range(argument):
            time.sleep(0.002)
            turn()
        return own_time() - began

    began = time.monotonic()
    seconds = dict(SideBySide(3).run(job, None, [15] * 3, print))
    assert sum(seconds.values()) <= time.monotonic() - began
    assert min(seconds.values()) >= 0.03
    assert Local().here


def test_seeds_side_by_side(tmp_path):
    """As a command: each seed's run is the one that it is alone."""
    options = ("train-deep-ensemble", "--members", 1, "--epochs", 0.1, "--device", "cpu", "--quiet")
    found = call(*options, "--seeds", 2, "--parallel-members", 2, "--out", tmp_path / "both")
    assert found.exit_code == 0, found.output
    alone = call(*options, "--seed", 1, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    files = [tmp_path / name / "vertices.safetensors" for name in ("both-s1", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ray_and_side_by_side_exclude_each_other(tmp_path):
    found = call("train-fge", "--engine", "ray", "--parallel-members", 2, "--out", tmp_path / "run")
    assert found.exit_code == 1
    assert "leave out --parallel-members or --engine ray" in found.output
