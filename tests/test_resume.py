"""A run that was broken off and resumed is the uninterrupted run, bit for bit."""

from __future__ import annotations

import fcntl
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.trainers import (
    Session,
    Settings,
    train_complex,
    train_curve,
    train_deep_ensemble,
    train_fge,
    train_simplex,
    train_snapshots,
    train_subspace,
)
from ensembler.trainers.checkpoints import Checkpoints
from tests._interrupt import BreakingOff
from tests._small import SETTINGS, dataset
from tests.test_cli import SMALL, call

ENDS: list[Run] = []


def session(checkpoints=None, init=None, **changes):
    settings = {"architecture": "tests._small:noisy", "epochs": 3, "augmentation": "crop"}
    return Session(dataset(), Settings(**(SETTINGS | settings | changes)), init, checkpoints=checkpoints)


def ends():
    if not ENDS:
        ENDS.extend(train_deep_ensemble(session(seed=seed), members=1) for seed in (1, 2))
    return ENDS


METHODS = {
    "deep ensemble": lambda checkpoints: train_deep_ensemble(session(checkpoints), members=2),
    "fge": lambda checkpoints: train_fge(session(checkpoints), members=3, cycle=1, start=0.5),
    "snapshots": lambda checkpoints: train_snapshots(session(checkpoints), members=3),
    "simplex": lambda checkpoints: train_simplex(session(checkpoints), 3, vertex_epochs=2, samples_per_step=2),
    "auto": lambda checkpoints: train_simplex(session(checkpoints), 2, vertex_epochs=1, regularisation="auto"),
    "function": lambda checkpoints: train_simplex(session(checkpoints), 2, vertex_epochs=2, regulariser="function"),
    "subspace": lambda checkpoints: train_subspace(session(checkpoints), vertices=2),
    "curve": lambda checkpoints: train_curve(session(checkpoints, ends()[0]), *ends(), points=3),
    "complex": lambda checkpoints: train_complex(session(checkpoints, ends()[0]), ends(), connectors=2, points=3),
}


def broken_off_and_resumed(method, folder, steps: list[int]):
    for left in steps:
        checkpoints = BreakingOff(folder, every=0.0)
        checkpoints.left = left
        with pytest.raises(KeyboardInterrupt):
            method(checkpoints)
        parts = [path.name.partition("-")[0] for path in folder.glob("[0-9]*")]
        assert len(parts) == len(set(parts)), "one checkpoint a part is kept"
    return method(Checkpoints(folder, every=0.0))


def assert_the_same(one: Run, other: Run) -> None:
    for kind in ("vertices", "buffers"):
        left, right = getattr(one, kind), getattr(other, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert torch.equal(one.coefficients, other.coefficients)
    untimed = [[{k: v for k, v in record.items() if k != "seconds"} for record in run.history] for run in (one, other)]
    assert untimed[0] == untimed[1]
    costs = [
        {name: (p.example_passes, p.forward_passes) for name, p in run.manifest.cost.parts.items()}
        for run in (one, other)
    ]
    assert costs[0] == costs[1]
    assert one.manifest.metrics == other.manifest.metrics


@pytest.mark.parametrize("name", METHODS)
def test_a_run_broken_off_at_any_step_goes_on_as_if_nothing_had_happened(name, tmp_path):
    method = METHODS[name]
    random.seed(name)
    steps = [random.randint(1, 6) for _ in range(3)]
    assert_the_same(method(None), broken_off_and_resumed(method, tmp_path / "x.unfinished", steps))


def test_a_damaged_checkpoint_costs_its_part_and_no_more(tmp_path):
    method, folder = METHODS["simplex"], tmp_path / "x.unfinished"
    checkpoints = BreakingOff(folder, every=0.0)
    checkpoints.left = 15
    with pytest.raises(KeyboardInterrupt):
        method(checkpoints)
    newest = max(folder.glob("[0-9]*")) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert_the_same(method(None), method(Checkpoints(folder, every=0.0)))


@pytest.mark.parametrize("harm", ["truncated", "half removed"])
def test_a_damaged_checkpoint_of_a_finished_part(tmp_path, harm):
    """Its part is trained anew, and ends under the very name of what was damaged."""
    method, folder = METHODS["simplex"], tmp_path / "x.unfinished"
    checkpoints = BreakingOff(folder, every=1e9)
    checkpoints.left = 2
    with pytest.raises(KeyboardInterrupt):
        method(checkpoints)
    first = min(folder.glob("[0-9]*"))
    if harm == "truncated":
        (first / "state.safetensors").write_bytes((first / "state.safetensors").read_bytes()[:-10])
    else:
        (first / "manifest.json").unlink()
    assert_the_same(method(None), method(Checkpoints(folder, every=1e9)))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    checkpoints = BreakingOff(tmp_path / "x.unfinished", every=0.0)
    checkpoints.left = 3
    with pytest.raises(KeyboardInterrupt):
        train_deep_ensemble(session(checkpoints), members=1)
    for changes in ({"seed": 5}, {"epochs": 2}, {"batch_size": 4}):
        with pytest.raises(UsageError, match="is of a run with other options or other images"):
            train_deep_ensemble(session(Checkpoints(tmp_path / "x.unfinished"), **changes), members=1)


class RemovedByHalf(Checkpoints):
    """Lose the files of these names after the third checkpoint, as a removal that comes while the fourth is written."""

    gone: tuple[str, ...] = ()
    left = 3

    def save(self, number, part, saved):
        super().save(number, part, saved)
        self.left -= 1
        for name in self.gone if self.left == 0 else ():
            (self.folder / name).unlink()


@pytest.mark.parametrize("gone", [("options.json",), ("options.json", ".lock")])
def test_a_folder_removed_by_half_is_begun_again_and_nothing_of_it_stays(tmp_path, gone):
    checkpoints = RemovedByHalf(tmp_path / "x.unfinished", every=0.0)
    checkpoints.gone = gone
    run = METHODS["simplex"](checkpoints)
    assert checkpoints.left < 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.unfinished"]
    assert (tmp_path / "x.unfinished" / "options.json").is_file()
    assert_the_same(METHODS["simplex"](None), run)
    checkpoints.remove()
    assert not [*tmp_path.iterdir()]


def test_checkpoints_are_written_when_due_and_at_the_end_of_a_part(tmp_path):
    checkpoints = Checkpoints(tmp_path / "x.unfinished", every=1e9)
    train_snapshots(session(checkpoints), members=2)
    assert [path.name for path in (tmp_path / "x.unfinished").glob("[0-9]*")] == ["0000-000000012"]
    checkpoints.remove()
    assert not (tmp_path / "x.unfinished").exists()


_TEN_KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ensembler.trainers import Session, Settings, train_simplex
from ensembler.trainers.checkpoints import Checkpoints
from tests._small import SETTINGS, dataset
from tests.test_cli import SMALL, call

folder, kills, made, random_moments = Path(sys.argv[1]), 0, 0, random.Random(0)

def train(checkpoints):
    settings = Settings(**(SETTINGS | {"architecture": "tests._small:noisy", "epochs": 100, "augmentation": "crop"}))
    return train_simplex(Session(dataset(), settings, checkpoints=checkpoints), 3)

train(None).save(folder / "whole")
while kills < 10 or not (folder / f"killed-{made}").exists():
    made += (folder / f"killed-{made}").exists()  # quicker than ten kills: another one
    child = os.fork()
    if child == 0:
        train(Checkpoints(folder / f"killed-{made}.unfinished", every=0.0)).save(folder / f"killed-{made}")
        os._exit(0)
    if kills < 10:
        time.sleep(random_moments.uniform(0.02, 0.3))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    else:
        os.waitpid(child, 0)
"""


def test_ten_kills_at_random_moments_change_nothing(tmp_path):
    command = [sys.executable, "-c", _TEN_KILLS, str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], timeout=1200, check=True)
    killed = list(tmp_path.glob("killed-?"))
    assert killed
    for path in killed:
        assert_the_same(Run.load(tmp_path / "whole"), Run.load(path))
        for name in ("vertices.safetensors", "members.safetensors"):
            assert (tmp_path / "whole" / name).read_bytes() == (path / name).read_bytes()


def test_the_command_says_how_to_go_on_and_goes_on(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-simplex", "--vertices", 2, "--lr", 0.05, *SMALL, *images]
    assert call(*command, "--out", "whole").exit_code == 0
    save, left = Checkpoints.save, 2

    def save_and_break_off(self, number, part, saved):
        nonlocal left
        save(self, number, part, saved)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_break_off)
    result = call(*command, "--out", "here/x", "--checkpoint-every", 0)
    assert result.exit_code == 130
    assert "to go on: ensembler train-simplex --resume here/x" in result.stderr
    assert not Path("here/x").exists()
    for arguments, message in (
        ([*command, "--out", "here/x"], "here/x.unfinished holds a run that was broken off"),
        (["train-fge", "--resume", "here/x"], "begun by another command"),
        (["train-fge", "--resume", "nowhere"], "there is no nowhere.unfinished"),
        (["train-simplex", "--resume", "whole"], "it is finished"),
        (["train-simplex", "--resume", "here/x", "--lr", 0.1], "leave out rate"),
    ):
        result = call(*arguments)
        assert result.exit_code in (1, 2)
        assert message in " ".join(result.stderr.replace("│", " ").split())
    with (Path("here/x.unfinished") / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process is working on here/x.unfinished" in call("train-simplex", "--resume", "here/x").stderr
    result = call("train-simplex", "--resume", "here/x")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("here").iterdir()) == ["latest", "x"]
    assert_the_same(Run.load(Path("whole")), Run.load(Path("here/x")))


def test_what_cannot_end_well_leaves_no_checkpoints(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(
        *["train-deep-ensemble", "--members", 2, "--lr", 1e30, "--clip", 0, "--checkpoint-every", 0, *SMALL, *images],
        *["--out", "x"],
    )
    assert result.exit_code == 1
    assert "the training loss is" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
