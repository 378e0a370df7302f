"""A run that was interrupted and resumed is the uninterrupted run, bit for bit, whatever interrupted it."""

from __future__ import annotations

import fcntl
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from ensembler.engine import Local
from ensembler.errors import EngineError, UsageError
from ensembler.run import Run
from ensembler.trainers import (
    FGE,
    SWAG,
    Complex,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
    Trainer,
    train,
)
from ensembler.trainers.ledger import Ledger
from ensembler.trainers.spec import SPEC
from tests._interrupt import after, make
from tests._small import SETTINGS, dataset
from tests.test_cli import ROOT, SMALL, call

FILES = ("vertices.safetensors", "members.safetensors")


def settings(**changes) -> Settings:
    """BatchNorm and dropout: all that a checkpoint must hold."""
    return Settings(
        **(SETTINGS | {"architecture": "tests._small:noisy", "epochs": 3, "augmentation": "crop"} | changes)
    )


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Two solutions, by their paths."""
    folder = tmp_path_factory.mktemp("ends")
    return [str(train(dataset(), DeepEnsemble(members=1), settings(seed=s)).save(folder / f"{s}")) for s in (1, 2)]


METHODS = {
    "deep ensemble": lambda ends: DeepEnsemble(members=2),
    "fge": lambda ends: FGE(members=3, cycle=1, start=0.5),
    "snapshots": lambda ends: Snapshots(members=3),
    "swag": lambda ends: SWAG(members=3, start=0.5, collect_every=0.25, rank=3),
    "multi-swag": lambda ends: SWAG(members=3, start=0.4, collect_every=0.5, rank=0, swags=2),
    "cyclical sg-mcmc": lambda ends: CyclicalSGMCMC(members=4, samples_per_cycle=2, exploration=0.4),
    "simplex": lambda ends: Simplex(vertices=3, vertex_epochs=2, samples_per_step=2),
    "auto": lambda ends: Simplex(vertices=2, vertex_epochs=1, regularisation="auto"),
    "function": lambda ends: Simplex(vertices=2, vertex_epochs=2, regulariser="function"),
    "simplexes": lambda ends: Simplex(vertices=2, vertex_epochs=1, simplexes=2),
    "subspace": lambda ends: Subspace(vertices=2),
    "curve": lambda ends: Curve(first=ends[0], second=ends[1], points=3),
    "complex": lambda ends: Complex(modes=ends, connectors=2, points=3),
}
SIMPLEX = METHODS["simplex"]([])


def interrupted(path: Path, method, steps: int, **given) -> Path:
    """Where the checkpoints of a training lie that was interrupted after so many of them."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(patch, steps)
        make(path, method, settings(), **given)
    return path.with_name(f"{path.name}.unfinished")


def checkpoints(folder: Path) -> list[Path]:
    """Those of parts, in their order."""
    return sorted(folder.rglob("*.[0-9]*[0-9]"))


def assert_the_same(one: Run, other: Run) -> None:
    for kind in ("vertices", "buffers", "gaussians"):
        left, right = getattr(one, kind), getattr(other, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert torch.equal(one.coefficients, other.coefficients)
    untimed = [[{k: v for k, v in record.items() if k != "seconds"} for record in run.history] for run in (one, other)]
    assert untimed[0] == untimed[1]
    costs = [
        {name: (entry.example_passes, entry.forward_passes) for name, entry in run.manifest.cost.entries.items()}
        for run in (one, other)
    ]
    assert costs[0] == costs[1]
    assert one.manifest.metrics == other.manifest.metrics
    assert one.manifest.fingerprint == other.manifest.fingerprint


def same_bytes(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("stop", [1, 5, 9, 12])
def test_early_stopping_goes_on_as_if_nothing_had_happened(stop, tmp_path):
    """Interrupted before and after the best epoch, and when a solution had stopped already; by AdamW, in two groups."""
    given = settings(optimiser="adamw", lr=0.1, early_stopping=1, epochs=9, warmup=0.5, accumulate=2)
    whole = make(None, METHODS["simplex"]([]), given)
    solution = [line for line in whole.history if line["part"] == "solution 1"]
    assert 1 < len(solution) < 9, "or else nothing would be stopped"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(patch, stop)
        make(tmp_path / "x", METHODS["simplex"]([]), given)
    assert_the_same(whole, make(tmp_path / "x", METHODS["simplex"]([]), given))


@pytest.mark.parametrize("name", METHODS)
def test_a_run_interrupted_at_any_step_goes_on_as_if_nothing_had_happened(name, tmp_path, ends):
    method = METHODS[name](ends)
    random.seed(name)
    for _ in range(3):
        folder = interrupted(tmp_path / "x", method, random.randint(1, 6))
        parts = [path.relative_to(folder).as_posix().rpartition(".")[0] for path in checkpoints(folder)]
        assert parts and len(parts) == len(set(parts)), "one checkpoint a part is kept"
    assert_the_same(make(None, method, settings()), make(tmp_path / "x", method, settings()))


def test_mixed_examples_and_a_policy_are_drawn_again_as_they_were(tmp_path):
    own = settings(mixup=0.4, cutmix=1.0, label_smoothing=0.1, augmentation="crop+trivialaugment")
    method = METHODS["fge"]([])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        after(patch, 6)  # of four steps an epoch
        make(tmp_path / "x", method, own)
    assert_the_same(make(None, method, own), make(tmp_path / "x", method, own))


def test_a_damaged_checkpoint_costs_its_part_and_no_more(tmp_path):
    newest = checkpoints(interrupted(tmp_path / "x", SIMPLEX, 15))[-1]
    assert newest.name == "vertex-2.000000003"
    state = newest / "state.pt"
    state.write_bytes(state.read_bytes()[:-10])
    again = []
    resumed = make(tmp_path / "x", SIMPLEX, settings(), on_event=lambda e: again.append(getattr(e, "part", None)))
    assert "vertex 2" in again and "solution 1" not in again
    assert_the_same(make(None, SIMPLEX, settings()), resumed)


@pytest.mark.parametrize("harm", ["truncated", "half removed"])
def test_a_damaged_checkpoint_of_a_finished_part(tmp_path, harm):
    """Its part is trained anew, and ends under the very name of what was damaged."""
    first = checkpoints(interrupted(tmp_path / "x", SIMPLEX, 2, every=1e9))[0]
    if harm == "truncated":
        (first / "state.pt").write_bytes((first / "state.pt").read_bytes()[:-10])
    else:
        (first / "manifest.json").unlink()
    resumed = make(tmp_path / "x", SIMPLEX, settings(), every=1e9)
    assert_the_same(make(None, SIMPLEX, settings()), resumed)


def test_checkpoints_of_another_run_are_refused_and_stay(tmp_path):
    method = DeepEnsemble(members=1)
    folder = interrupted(tmp_path / "x", method, 3)
    before = sorted(folder.rglob("*"))
    for other, changes in ((method, {"seed": 5}), (method, {"epochs": 2}), (method, {"batch_size": 4}), (FGE(), {})):
        with pytest.raises(UsageError, match=r"x\.unfinished was started with other options, data or code"):
            make(tmp_path / "x", other, settings(**changes))
    with pytest.raises(UsageError, match="was started with other options, data or code"):
        make(tmp_path / "x", method, settings(), data=dataset(train=33))
    assert sorted(folder.rglob("*")) == before
    assert_the_same(make(tmp_path / "x", method, settings(threads=1)), make(None, method, settings()))


@pytest.mark.parametrize("gone", [(SPEC,), (SPEC, ".lock")])
def test_a_folder_removed_by_half_is_begun_again_and_nothing_of_it_stays(tmp_path, monkeypatch, gone):
    """The files go after the third checkpoint, as by a removal that comes while the fourth is written."""
    folder, removed = tmp_path / "x.unfinished", []

    def remove() -> None:
        for name in gone:
            (folder / name).unlink()
            removed.append(name)

    after(monkeypatch, 3, do=remove)
    run = make(tmp_path / "x", SIMPLEX, settings())
    assert removed == [*gone]
    assert [path.name for path in tmp_path.iterdir()] == ["x.unfinished"]
    assert (folder / SPEC).is_file()
    assert_the_same(make(None, SIMPLEX, settings()), run)


def test_checkpoints_are_written_when_due_and_at_the_end_of_a_part_and_of_a_job(tmp_path):
    make(tmp_path / "x", Snapshots(members=2), settings(), every=1e9)
    assert [path.name for path in checkpoints(tmp_path / "x.unfinished")] == ["snapshots.000000012"]
    make(tmp_path / "y", DeepEnsemble(members=2), settings(), every=1e9)
    found = sorted(path.name for path in (tmp_path / "y.unfinished").iterdir() if path.is_dir())
    assert found == ["solution-1.done", "solution-2.done"]


_TEN_KILLS = """
import os, random, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ensembler.trainers import DeepEnsemble, Settings, Simplex
from tests._interrupt import make
from tests._kills import Changes, kill, kill_in_the_next_file
from tests._small import SETTINGS

options, moments = {"architecture": "tests._small:noisy", "epochs": 4, "augmentation": "crop"}, random.Random(0)
for method in (DeepEnsemble(members=3), Simplex(vertices=3, vertex_epochs=4)):
    folder, kills, made = Path(sys.argv[1]) / method.command, 0, 0

    def train(path):
        return make(path, method, Settings(**SETTINGS | options))

    train(None).save(folder / "whole")
    while kills < 10 or not (folder / f"killed-{made}").exists():
        made += (folder / f"killed-{made}").exists()  # finished before ten kills: another one
        moment = moments.randint(1, 40)
        if (child := os.fork()) == 0:
            if kills < 10:
                Changes(folder, moment, (kill, kill_in_the_next_file)[kills % 2])
            train(folder / f"killed-{made}").save(folder / f"killed-{made}")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or not status
        kills += bool(status)
    print(kills)
"""


def test_ten_kills_at_any_change_of_files_change_nothing(tmp_path):
    command = [sys.executable, "-c", _TEN_KILLS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=True)
    assert done.stdout.split() == ["10", "10"]
    for folder in (tmp_path / DeepEnsemble.command, tmp_path / Simplex.command):
        killed = list(folder.glob("killed-?"))
        assert killed
        for path in killed:
            assert_the_same(Run.load(folder / "whole"), Run.load(path))
            assert same_bytes(folder / "whole", path)


# --- the command line ---


def refusal(*arguments) -> str:
    """What is said on the one line that a command fails with."""
    result = call(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_says_how_to_resume_and_resumes(here, images, monkeypatch):
    command = ["train-simplex", "--vertices", 2, "--lr", 0.05, *SMALL, *images]
    assert call(*command, "--out", "whole").exit_code == 0
    after(monkeypatch, 2)
    result = call(*command, "--out", "here/x", "--checkpoint-every", 0)
    assert result.exit_code == 130
    assert "to resume: ensembler train-simplex --resume here/x" in result.stderr
    assert not Path("here/x").exists()
    for arguments, message in (
        ([*command, "--out", "here/x"], "here/x.unfinished holds an interrupted run: resume it with --resume here/x"),
        (["train-fge", "--resume", "here/x"], "begun by another command: ensembler train-simplex --resume here/x"),
        (["train-fge", "--resume", "nowhere"], "nothing to resume at nowhere: there is no nowhere.unfinished"),
        (["train-simplex", "--resume", "whole"], "nothing to resume at whole: it is finished"),
    ):
        assert message in refusal(*arguments)
    with (Path("here/x.unfinished") / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process is working on here/x.unfinished" in refusal("train-simplex", "--resume", "here/x")
    result = call("train-simplex", "--resume", "here/x")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("here").iterdir()) == ["latest", "x"]
    assert_the_same(Run.load(Path("whole")), Run.load(Path("here/x")))


@pytest.mark.parametrize(
    ("typed", "flag"),
    [
        (["--lr", 0.1], "--lr"),
        (["--lr", 0.05], "--lr"),  # even the same: there is one place that says it
        (["--vertices", 2], "--vertices"),
        (["--no-corners"], "--corners"),
        (["--arch", "cnn"], "--arch"),
        (["--seed", 1], "--seed"),
        (["--seeds", 2], "--seeds"),
        (["--recipe", "fast"], "--recipe"),
        (["--collapse", "centroid"], "--collapse"),
        (["--out", "y"], "--out"),
        (["--from-files"], "--in-memory"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_resume_refuses_other_options_and_keeps_what_was_reached(here, images, monkeypatch, typed, flag):
    after(monkeypatch, 2)
    command = ["train-simplex", "--vertices", 2, "--lr", 0.05, *SMALL, *images, "--checkpoint-every", 0, "--out", "x"]
    assert call(*command).exit_code == 130
    before = sorted(Path("x.unfinished").rglob("*"))
    said = refusal("train-simplex", "--resume", "x", *typed)
    assert said.endswith(f"--resume keeps the options that the run was begun with: leave out {flag}")
    assert sorted(Path("x.unfinished").rglob("*")) == before


def test_resume_takes_what_only_says_where_and_how(here, images, monkeypatch):
    command = ["train-deep-ensemble", "--members", 2, *SMALL, *images]
    assert call(*command, "--out", "whole").exit_code == 0
    after(monkeypatch, 2)
    assert call(*command, "--out", "x", "--checkpoint-every", 0, "--workers", 3).exit_code == 130
    begun = json.loads(Path("x.unfinished", SPEC).read_text())
    result = call(
        *["train-deep-ensemble", "--resume", "x", "--threads", torch.get_num_threads(), "--workers", 0, "--quiet"],
        *["--device", "cpu", "--data", here, "--log", "log", "--checkpoint-every", 5, "--engine", "local"],
    )
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert same_bytes(Path("whole"), Path("x"))
    made = Run.load(Path("x")).manifest
    assert (made.settings["threads"], made.settings["workers"]) == (torch.get_num_threads(), 0)
    assert made.fingerprint == Run.load(Path("whole")).manifest.fingerprint == begun["fingerprint"]
    assert Path("log").read_text().count('"part"') == 3


def test_a_recipe_is_resumed_with_its_options(here, images, monkeypatch):
    """They are kept resolved: neither the recipe nor a default is asked again."""
    command = ["train-simplex", "--recipe", "fast", "--vertex-epochs", 1, *SMALL[:2], "--device", "cpu", *images]
    assert call(*command, "--out", "whole").exit_code == 0
    whole = Run.load(Path("whole")).manifest
    assert (whole.options["vertices"], whole.options["vertex_epochs"], whole.settings["epochs"]) == (3, 1, 10)
    after(monkeypatch, 3)
    assert call(*command, "--out", "x", "--checkpoint-every", 0).exit_code == 130
    monkeypatch.setitem(sys.modules, "ensembler.trainers.recipes", None)
    result = call("train-simplex", "--resume", "x")
    assert result.exit_code == 0, result.output
    assert same_bytes(Path("whole"), Path("x"))
    assert_the_same(Run.load(Path("whole")), Run.load(Path("x")))


# --- no work is lost to an error ---


@contextmanager
def diverges(images: Path) -> Iterator[None]:
    """The third member's weights are no numbers."""
    fit = Trainer.fit

    def broken(self, part, vertices, *given, **named):
        return fit(self, part, vertices.fill_(torch.nan) if part == "solution 3" else vertices, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", broken)
        yield


@contextmanager
def unreadable(images: Path) -> Iterator[None]:
    """Once two members are finished, an image can no longer be read; its size is as before."""
    file = images / "top" / "7.png"
    content = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        after(patch, 2, "save", lambda: file.write_bytes(bytes(len(content))))
        yield
    file.write_bytes(content)


@contextmanager
def killed(images: Path) -> Iterator[None]:
    """The processes that read images are killed while the third member is trained."""
    add = Ledger.epoch

    def kill(self, end, **named):
        add(self, end, **named)
        for child in psutil.Process().children() if end.part == "solution 3" else ():
            for worker in child.children() if "forkserver" in " ".join(child.cmdline()) else ():
                worker.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "epoch", kill)
        yield


@contextmanager
def lost(images: Path) -> Iterator[None]:
    """The engine loses the third job."""
    run = Local.run

    def losing(self, function, shared, arguments, on_event):
        for place, result in run(self, function, shared, arguments, on_event):
            yield place, result
            if place == 1:
                raise EngineError("job 3 of 4 was lost 4 times")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "run", losing)
        yield


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (diverges, "the training loss is nan in epoch 1: lower the learning rate"),
        (unreadable, "cannot read the image"),
        (killed, "a process that reads images died"),
        (lost, "job 3 of 4 was lost 4 times"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_error_costs_no_finished_member(here, images, harm, message):
    command = ["train-deep-ensemble", "--members", 4, *SMALL, *images, "--epochs", 4]
    if harm in (unreadable, killed):
        command += ["--from-files", "--image-size", 8, "--workers", 1]
    assert call(*command, "--out", "whole").exit_code == 0
    with harm(here / "images"):
        result = call(*command, "--out", "x")
    assert result.exit_code == 1, result.output
    assert message in result.stderr.splitlines()[-1]
    assert "to resume: ensembler train-deep-ensemble --resume x" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("x").exists()
    assert sorted(path.name for path in Path("x.unfinished").glob("*.done")) == ["solution-1.done", "solution-2.done"]
    result = call("train-deep-ensemble", "--resume", "x")
    assert result.exit_code == 0, result.output
    found, *epochs = result.stderr.splitlines()
    assert found.startswith(f"{here / 'images'}: 90 images of 3 classes")
    assert {line.partition(":")[0] for line in epochs} == {"solution 3", "solution 4"}
    assert same_bytes(Path("whole"), Path("x"))
    assert_the_same(Run.load(Path("whole")), Run.load(Path("x")))
    assert not Path("x.unfinished").exists()


def test_an_error_that_comes_again_deletes_nothing(here, images):
    command = ["train-deep-ensemble", "--members", 2, "--lr", 1e30, "--clip", 0, "--checkpoint-every", 0]
    result = call(*command, *SMALL, *images, "--out", "x")
    assert result.exit_code == 1
    assert "the training loss is" in result.stderr
    assert "to resume: ensembler train-deep-ensemble --resume x" in result.stderr
    kept = checkpoints(Path("x.unfinished"))
    assert kept
    assert "the training loss is" in refusal("train-deep-ensemble", "--resume", "x")
    assert checkpoints(Path("x.unfinished")) == kept


def test_another_start_is_refused_and_what_was_reached_stays(here, images, monkeypatch):
    train_one = ["train-deep-ensemble", "--members", 1, *SMALL, *images]
    for name, seed in (("start", 0), ("other", 1)):
        assert call(*train_one, "--seed", seed, "--out", name).exit_code == 0
    command = ["train-simplex", "--init", "start", "--vertices", 2, "--epochs", 8, "--checkpoint-every", 0]
    assert call(*command, "--out", "whole").exit_code == 0
    after(monkeypatch, 3)
    assert call(*command, "--out", "x").exit_code == 130
    before = sorted(Path("x.unfinished").rglob("*"))
    Path("start").rename("kept")
    Path("other").rename("start")
    said = refusal("train-simplex", "--resume", "x")
    assert "x.unfinished was started with other options, data or code: resume it with those, or remove it" in said
    assert sorted(Path("x.unfinished").rglob("*")) == before
    shutil.rmtree("start")
    Path("kept").rename("start")
    result = call("train-simplex", "--resume", "x")
    assert result.exit_code == 0, result.output
    assert same_bytes(Path("whole"), Path("x"))


def test_other_images_are_refused_and_what_was_reached_stays(here, images, monkeypatch):
    after(monkeypatch, 3)
    command = ["train-deep-ensemble", "--members", 1, *SMALL, *images, "--checkpoint-every", 0, "--out", "x"]
    assert call(*command).exit_code == 130
    before = sorted(Path("x.unfinished").rglob("*"))
    more = here / "images" / "top" / "more.png"
    shutil.copy(here / "images" / "middle" / "1.png", more)
    assert "has changed since the run was trained" in refusal("train-deep-ensemble", "--resume", "x")
    assert sorted(Path("x.unfinished").rglob("*")) == before
    more.unlink()
    assert call("train-deep-ensemble", "--resume", "x").exit_code == 0
