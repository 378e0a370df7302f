"""Whatever breaks, no finished work is lost and no partial output is kept: each fault, done to real processes.

Quick ones run always, a few of each; ``-m long`` has many. `docs/guarantees.md` tells what was found.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import count, cycle
from pathlib import Path

import numpy as np
import pytest

from ensembler import calibration
from ensembler.run import Run, latest
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.storage import artefact
from tests._faults import Process, small_disk, until
from tests._small import make_images

# BatchNorm and dropout: all that a checkpoint must hold.
SMALL = ["--arch", "tests._small:noisy", "--epochs", "6", "--device", "cpu"]
TRAIN = ["train-simplex", "--vertices", "3", "--vertex-epochs", "2", "--checkpoint-every", "0", *SMALL]
LONG = pytest.mark.long
KILLS = pytest.mark.parametrize("kills", [pytest.param(2, id="quick"), pytest.param(20, id="long", marks=LONG)])
EVAL = ["--ood", "noise:uniform", "--ood", "noise:gaussian", "--examples", "18", "--device", "cpu"]
# Where to stop a process: before it makes a checkpoint, while it writes one, and while it writes a bundle.
BEFORE_CHECKPOINT = ("os.mkdir", "*x.unfinished/*", 1)
IN_CHECKPOINT = ("open", "*x.unfinished/*.partial-*/*", 1)
IN_BUNDLE = ("open", "*/.partial-*/*", 1)


def quick(values, *chosen):
    """Parameters of which only the chosen ones are tried always."""
    names = [getattr(value, "__name__", value) for value in values]
    return [
        pytest.param(value, id=name, marks=() if name in chosen else LONG)
        for name, value in zip(names, values, strict=True)
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory, nursery):
    """Images, a run of them, and what the commands made of it undisturbed, with how often each changed a file."""
    world, changes = tmp_path_factory.mktemp("world"), {}
    images = make_images(world / "images")
    for command in (
        [*TRAIN, *images, "--out", "run"],
        ["eval", "run", *EVAL, "--cache", "cache", "--out", "report"],
        ["export", "run", "--out", "bundle"],
        ["calibrate", "run", "--risk", "0.4"],
    ):
        process = nursery.start(world, *command)
        assert process.wait() == 0, process.err
        changes[command[0]] = process.changes
    return world, changes


@pytest.fixture(scope="module")
def world(made):
    return made[0]


@pytest.fixture(scope="module")
def changes(made):
    return made[1]


@pytest.fixture
def images(world):
    return ["--dataset", f"folder:{world / 'images'}"]


@pytest.fixture
def run(world, tmp_path):
    """A copy of the run, as training left it."""
    return uncalibrated(world / "run", tmp_path / "run")


def uncalibrated(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to, ignore=shutil.ignore_patterns(calibration.FILE)))


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".partial-*"))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def weights(run: Path) -> list[str]:
    return [sha256((run / f"{name}.safetensors").read_bytes()).hexdigest() for name in ("vertices", "members")]


def assert_one_line(process: tuple[int, str, str], message: str) -> None:
    """It failed with one line, which says this; what stands before it is progress."""
    code, _, errors = process
    assert code == 1, (code, errors)
    assert "Traceback" not in errors, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()[-1:], errors
    assert message in errors.splitlines()[-1], errors


def moments(kills: int, changes: int) -> list[tuple[int, int]]:
    """Kills spread over a command's changes, the last one first; every second one is in the middle of a file."""
    places = [changes * place // kills for place in range(kills, 0, -1)]
    return [*zip(cycle((signal.SIGKILL, signal.SIGXFSZ)), places, strict=False)]


# --- killed at moments that are counted in changes of files ---


@KILLS
def test_killed_while_training(nursery, world, changes, images, tmp_path, kills):
    whole, killed, number = weights(world / "run"), 0, count()
    name = f"runs/{next(number)}"

    def begin(ends: tuple[int, int] | None = None) -> Process:
        begun = (tmp_path / f"{name}.unfinished" / "spec.json").exists()
        command = ["train-simplex", "--resume", name] if begun else [*TRAIN, *images, "--out", name]
        return nursery.start(tmp_path, *command, ends=ends)

    for ends in moments(kills, changes["train-simplex"]):
        process = begin(ends)
        assert process.wait() in (0, -ends[0]), process.err
        killed += process.code < 0
        for path in (tmp_path / "runs").glob("[!.]*"):
            if path.suffix == ".unfinished":
                json.loads((path / "spec.json").read_text())
            else:
                assert weights(path) == whole and Run.load(path)
        if (tmp_path / name).exists():
            assert latest(tmp_path / "runs").exists()
            shutil.rmtree(tmp_path / f"{name}.unfinished", ignore_errors=True)  # killed between the two
            name = f"runs/{next(number)}"
    assert killed > kills // 2
    process = begin()
    assert process.wait() == 0, process.err
    assert weights(tmp_path / name) == whole
    assert not (tmp_path / f"{name}.unfinished").exists()
    assert nursery.run(tmp_path, "show", name)[0] == 0


@KILLS
def test_killed_while_evaluating(nursery, world, changes, tmp_path, kills):
    whole = (world / "report" / "report.json").read_bytes()
    kept = {path.name for path in (world / "cache").rglob("*.*")}

    def evaluate(ends: tuple[int, int] | None = None) -> int:
        command = ["eval", world / "run", *EVAL, "--cache", "cache", "--out", "report"]
        return nursery.start(tmp_path, *command, ends=ends).wait()

    for ends in moments(kills, changes["eval"]):
        assert evaluate(ends) == -ends[0]
        assert {path.name for path in (tmp_path / "cache").rglob("[!.]*.*")} <= kept
        report = tmp_path / "report" / "report.json"
        assert not report.exists() or report.read_bytes() == whole
        assert evaluate() == 0
        assert report.read_bytes() == whole
        assert {path.name for path in (tmp_path / "cache").rglob("[!.]*.*")} == kept
        for folder in ("cache", "report"):
            shutil.rmtree(tmp_path / folder)


@KILLS
def test_killed_while_calibrating(nursery, world, changes, run, tmp_path, kills):
    whole = fitted(world / "run")

    def calibrate(ends: tuple[int, int] | None = None) -> int:
        return nursery.start(run, "calibrate", ".", "--risk", "0.4", ends=ends).wait()

    for ends in moments(kills, changes["calibrate"]):
        assert calibrate(ends) in (0, -ends[0])
        assert calibration.load(run) is None or fitted(run) == whole
        Run.load(run)
        assert calibrate() == 0
        assert fitted(run) == whole
        (run / calibration.FILE).unlink()


def fitted(run: Path) -> calibration.Calibration:
    found = calibration.load(run)
    assert found is not None
    return found.model_copy(update={"created": ""})


@KILLS
def test_killed_while_exporting(nursery, world, changes, tmp_path, kills):
    whole, run = files(world / "bundle"), uncalibrated(world / "run", tmp_path / "run")
    bundle = tmp_path / "bundles" / "bundle"

    def export(ends: tuple[int, int] | None = None) -> int:
        return nursery.start(tmp_path, "export", run, "--out", bundle, ends=ends).wait()

    def assert_whole() -> None:
        assert files(bundle) == whole
        verify_bundle(bundle)

    for ends in moments(kills, changes["export"]):
        assert export(ends) in (0, -ends[0])
        if bundle.exists():
            assert_whole()
            shutil.rmtree(bundle)
    assert export() == 0
    assert_whole()


def files(bundle: Path) -> dict[str, str]:
    return dict(json.loads((bundle / "manifest.json").read_text())["files"])


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(nursery, run, tmp_path):
    def writing(folder: str) -> tuple[Process, Path]:
        command = ["export", run, "--out", f"{folder}/bundle", "--no-data"]
        process = nursery.start(tmp_path, *command, stops=IN_BUNDLE)
        process.wait_until_stopped()
        return process, hidden(tmp_path / folder)[0]

    def write_beside(folder: str, name: str) -> None:
        with artefact.write(tmp_path / folder / name, {"kind": "something"}):
            pass

    process, left = writing("killed")
    assert process.kill() == -signal.SIGKILL
    write_beside("killed", "now")
    assert hidden(tmp_path / "killed") == [left]
    age(left)
    write_beside("killed", "later")
    assert hidden(tmp_path / "killed") == []

    process, alive = writing("alive")
    age(alive)
    write_beside("alive", "later")
    assert alive.exists()
    process.send(signal.SIGCONT)
    assert process.wait() == 0, process.err
    verify_bundle(tmp_path / "alive" / "bundle")


def age(path: Path) -> None:
    os.utime(path, (time.time() - 7200,) * 2)


def test_a_kill_between_the_end_and_the_tidying_up_is_said(nursery, images, tmp_path):
    command = [*TRAIN, *images, "--out", "x"]
    process = nursery.start(tmp_path, *command, stops=BEFORE_CHECKPOINT)
    process.wait_until_stopped()
    begun = shutil.copytree(tmp_path / "x.unfinished", tmp_path / "copy", ignore=lambda *_: {".lock"})
    process.send(signal.SIGCONT)
    assert process.wait() == 0
    shutil.copytree(begun, tmp_path / "x.unfinished")  # as if it had been killed just after saving
    result = nursery.run(tmp_path, "train-simplex", "--resume", "x")
    assert_one_line(result, "x already exists. If it is this run, remove x.unfinished")


# --- a full disk ---

COMMANDS = ["train", "eval", "report", "calibrate", "export"]


def on(disk: Path, what: str, world: Path, images: list[str]) -> list[str]:
    """A command that fills this disk."""
    return {
        "train": [*TRAIN, *images, "--out", f"{disk}/x"],
        "eval": ["eval", f"{world}/run", *EVAL, "--cache", f"{disk}/cache", "--out", "elsewhere"],
        "report": ["eval", f"{world}/run", *EVAL, "--cache", f"{world}/cache", "--out", f"{disk}/x"],
        "calibrate": ["calibrate", f"{disk}/run", "--risk", "0.4"],
        "export": ["export", f"{world}/run", "--out", f"{disk}/x"],
    }[what]


def takes(world: Path, what: str) -> int:
    """Bytes that a command's files take in the end."""
    folder = {"train": "run", "eval": "cache", "report": "report", "export": "bundle"}.get(what)
    if folder is None:
        return (world / "run" / calibration.FILE).stat().st_size
    return sum(path.stat().st_size for path in (world / folder).rglob("*") if path.is_file())


@contextmanager
def filled(disk: Path, free: int) -> Iterator[None]:
    """Leave so many bytes of a disk."""
    ballast = disk / ".ballast"
    stat = os.statvfs(disk)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - free)
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.parametrize(
    "shares", [pytest.param((0.5,), id="quick"), pytest.param((*np.linspace(0, 0.95, 8),), id="long", marks=LONG)]
)
@pytest.mark.parametrize("what", quick(COMMANDS, "train"))
def test_a_full_disk(nursery, world, images, tmp_path, what, shares):
    with small_disk(tmp_path / "disk", "8m") as disk:
        for share in shares:
            for path in [*disk.iterdir()]:
                path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
            if what == "calibrate":
                uncalibrated(world / "run", disk / "run")
            before, command = visible(disk), on(disk, what, world, images)
            with filled(disk, round(share * takes(world, what)) // 4096 * 4096):
                result = nursery.run(tmp_path, *command)
                assert_one_line(result, "No space left on device")
                begun = (disk / "x.unfinished").exists()
                assert hidden(disk) == []
                kept = {"x.unfinished"} if begun else {"cache"} if (disk / "cache").exists() else set()
                assert set(visible(disk)) - kept == set(before)
            if begun:
                assert f"to resume: ensembler train-simplex --resume {disk}/x" in result[2]
                command = ["train-simplex", "--resume", f"{disk}/x"]
            again = nursery.run(tmp_path, *command)
            assert again[0] == 0, again[2]
            assert_as_undisturbed(what, world, disk, tmp_path)


def assert_as_undisturbed(what: str, world: Path, disk: Path, folder: Path) -> None:
    if what == "train":
        assert weights(disk / "x") == weights(world / "run")
        assert visible(disk) == ["latest", "x"]
    elif what == "calibrate":
        assert fitted(disk / "run") == fitted(world / "run")
    elif what == "export":
        verify_bundle(disk / "x")
    else:
        report = (folder / "elsewhere" if what == "eval" else disk / "x") / "report.json"
        assert report.read_bytes() == (world / "report" / "report.json").read_bytes()


@pytest.mark.parametrize("what", quick(COMMANDS, "train"))
def test_files_that_may_not_grow(nursery, world, images, tmp_path, what):
    """RLIMIT_FSIZE: a full disk where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if what == "calibrate":
        uncalibrated(world / "run", disk / "run")
    limit = {"calibrate": 500, "report": 20_000}.get(what, 2000)
    result = nursery.run(tmp_path, *on(disk, what, world, images), largest=limit)
    assert_one_line(result, "File too large")
    assert hidden(disk) == []
    assert [name for name in visible(disk) if name not in ("x.unfinished", "cache", "run")] == []
    begun = (disk / "x.unfinished").exists()
    command = ["train-simplex", "--resume", f"{disk}/x"] if begun else on(disk, what, world, images)
    again = nursery.run(tmp_path, *command)
    assert again[0] == 0, again[2]
    assert_as_undisturbed(what, world, disk, tmp_path)


def test_a_curve_that_was_interrupted_is_resumed_by_the_line_that_says_how(nursery, images, tmp_path):
    """Its command has arguments, which are not typed again."""
    short = [*SMALL[:2], "--device", "cpu", "--epochs", "1", *images]
    for seed in "12":
        train = ["train-deep-ensemble", "--members", "1", "--seed", seed, *short, "--out", seed]
        assert nursery.run(tmp_path, *train)[0] == 0
    command = ["train-curve", "1", "2", "--epochs", "1", "--points", "3", "--checkpoint-every", "0", "--out", "x"]
    result = nursery.run(tmp_path, *command, largest=6000)
    assert_one_line(result, "File too large")
    (line,) = [line for line in result[2].splitlines() if line.startswith("to resume: ensembler ")]
    again = nursery.run(tmp_path, *line.removeprefix("to resume: ensembler ").split())
    assert again[0] == 0, again[2]
    assert (tmp_path / "x" / "manifest.json").exists()
    without = nursery.run(tmp_path, "train-curve")
    assert (without[0], without[2]) == (2, "error: FIRST is missing: see ensembler train-curve --help\n")


def test_a_log_on_a_full_disk(nursery, images, tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    result = nursery.run(tmp_path, *TRAIN, *images, "--out", "x", "--log", "log")
    assert_one_line(result, "cannot write log: No space left on device: choose another path")
    assert not (tmp_path / "x").exists()
    with small_disk(tmp_path / "disk", "16k") as disk, filled(disk, 0):
        result = nursery.run(tmp_path, *TRAIN, *images, "--out", "y", "--tensorboard", disk / "events")
        assert_one_line(result, f"cannot write {disk / 'events'}: No space left on device: choose another path")


# --- a folder that cannot be written ---


def test_a_read_only_place_is_said_before_the_work(nursery, world, images, tmp_path):
    from subprocess import run as call

    with small_disk(tmp_path / "disk", "8m") as disk:
        uncalibrated(world / "run", disk / "run")
        call(["mount", "-o", "remount,ro", disk], check=True)
        for command in (
            [*TRAIN, *images, "--out", disk / "x"],
            ["collapse", world / "run", "--out", disk / "x"],
            ["eval", world / "run", "--out", disk / "report"],
            ["eval", world / "run", "--cache", disk / "cache"],
            ["eval", world / "run", "--json", disk / "report.json"],
            ["surface", world / "run", "--out", disk / "surface"],
            ["calibrate", disk / "run"],
            ["export", world / "run", "--out", disk / "x"],
            ["data", "corrupt", "digits", "--out", disk / "made"],
        ):
            result = nursery.run(tmp_path, *command)
            assert_one_line(result, "Read-only file system")
            assert len(result[2].splitlines()) == 1, result[2]  # no progress before it
        assert visible(disk) == ["run"]
        assert nursery.run(tmp_path, "eval", disk / "run", "--cache", "cache", "--out", "report")[0] == 0
        assert nursery.run(tmp_path, "show", disk / "run")[0] == 0


# --- a run that changes under our feet ---


def removed(run: Path) -> None:
    shutil.rmtree(run)


def renamed(run: Path) -> None:
    run.rename(run.with_name("renamed"))


def flipped(run: Path) -> None:
    for file in filter(Path.is_file, run.rglob("*")):
        content = bytearray(file.read_bytes())
        if content:
            content[len(content) // 2] ^= 1
            with file.open("r+b") as opened:  # in place: a memory map would see it
                opened.write(content)


def truncated(run: Path) -> None:
    for file in filter(Path.is_file, run.rglob("*")):
        os.truncate(file, file.stat().st_size // 3)


HARMS = [removed, renamed, flipped, truncated]


@pytest.mark.parametrize("harm", HARMS)
def test_a_run_harmed_before_it_is_used(nursery, run, tmp_path, harm):
    harm(run)
    message = {"flipped": "has changed since it was written", "truncated": "has changed since it was written"}
    for command in (["show"], ["eval"], ["calibrate"], ["export", "--out", "bundle"], ["collapse", "--out", "x"]):
        name, *options = command
        result = nursery.run(tmp_path, name, "run", *options)
        assert_one_line(result, message.get(harm.__name__, "there is no such folder"))
    if harm is renamed:
        assert nursery.run(tmp_path, "eval", "renamed")[0] == 0  # a run does not know its own name
    assert not (tmp_path / "bundle").exists() and not (tmp_path / "x").exists()


@LONG
@pytest.mark.parametrize("harm", HARMS)
def test_a_run_harmed_while_it_is_evaluated(nursery, world, run, tmp_path, harm):
    process = nursery.start(tmp_path, "eval", "run", *EVAL, "--cache", "cache", "--out", "report")
    until(lambda: "validation" in process.err, process)
    harm(run)
    assert process.wait() == 0, process.err
    assert (tmp_path / "report" / "report.json").read_bytes() == (world / "report" / "report.json").read_bytes()


@pytest.mark.parametrize("harm", quick(HARMS, "truncated"))
def test_a_run_harmed_while_it_is_exported(nursery, world, run, tmp_path, harm):
    process = nursery.start(tmp_path, "export", "run", "--out", "bundles/x", stops=IN_BUNDLE)
    process.wait_until_stopped()
    harm(run)
    process.send(signal.SIGCONT)
    assert process.wait() == 0, process.err
    assert files(tmp_path / "bundles" / "x") == files(world / "bundle")
    assert verify_bundle(tmp_path / "bundles" / "x").manifest.run.sha256 == artefact.sha256(
        world / "run" / artefact.MANIFEST
    )


def test_a_run_replaced_while_latest_is_calibrated(nursery, world, images, tmp_path):
    """The calibration belongs to the run that was latest when it began, not to the one that is at its end."""
    runs = tmp_path / "runs"
    runs.mkdir()
    first, second = (uncalibrated(world / "run", runs / name) for name in ("first", "second"))
    manifest = json.loads((second / "manifest.json").read_text()) | {"created": "2026-01-01T00:00:00+00:00"}
    (second / "manifest.json").write_text(json.dumps(manifest))
    (second / "manifest.sha256").write_text(f"{artefact.sha256(second / 'manifest.json')}  manifest.json\n")
    (runs / "latest").symlink_to("first")
    process = nursery.start(tmp_path, "calibrate", "runs/latest", stops=("open", "*/.partial-*", 1))
    process.wait_until_stopped()
    (runs / "latest").unlink()
    (runs / "latest").symlink_to("second")
    process.send(signal.SIGCONT)
    assert process.wait() == 0, process.err
    assert calibration.load(first) is not None
    assert calibration.load(second) is None


SERVED = """
import os, sys
import numpy as np
from pathlib import Path
from ensembler.serve import Runtime
bundle, harm = Path(sys.argv[1]), sys.argv[2]
runtime = Runtime.load(bundle)
images = np.random.default_rng(0).integers(0, 256, (3, *runtime.manifest.image_shape), dtype=np.uint8)
before = runtime.predict(images).members
sys.path.insert(0, sys.argv[3])
from tests import test_faults
getattr(test_faults, harm)(bundle)
assert np.array_equal(runtime.predict(images).members, before)
"""


@pytest.mark.parametrize("layout", ["vertices", "members"])
@LONG
def test_a_bundle_harmed_while_it_is_served(nursery, world, tmp_path, layout):
    import subprocess
    import sys

    from tests._faults import ROOT

    for harm in HARMS:
        bundle = tmp_path / harm.__name__
        done = nursery.run(tmp_path, "export", world / "run", "--out", bundle, "--layout", layout, "--members", "5")
        assert done[0] == 0, done[2]
        command = [sys.executable, "-c", SERVED, bundle, harm.__name__, ROOT]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if harm is not renamed:
            assert_one_line(nursery.run(tmp_path, "serve", bundle), str(bundle))


@pytest.mark.parametrize("moment", [BEFORE_CHECKPOINT, IN_CHECKPOINT], ids=["between", "while one is written"])
def test_checkpoints_removed_while_the_run_is_trained(nursery, images, world, tmp_path, moment):
    process = nursery.start(tmp_path, *TRAIN, *images, "--out", "x", stops=moment)
    process.wait_until_stopped()
    shutil.rmtree(tmp_path / "x.unfinished")
    process.send(signal.SIGCONT)
    assert process.wait() == (moment is IN_CHECKPOINT), process.err
    if process.code:
        assert_one_line((1, process.out, process.err), "cannot write x.unfinished/")
        assert nursery.run(tmp_path, *TRAIN, *images, "--out", "x")[0] == 0
    assert weights(tmp_path / "x") == weights(world / "run")
    assert visible(tmp_path) == ["latest", "x"]


# --- two processes ---


def test_two_processes_on_one_unfinished_run(nursery, world, images, tmp_path):
    command = [*TRAIN, *images, "--out", "x"]
    process = nursery.start(tmp_path, *command, stops=BEFORE_CHECKPOINT)
    process.wait_until_stopped()
    for other in (["train-simplex", "--resume", "x"], command):
        assert_one_line(nursery.run(tmp_path, *other), "another process is working on x.unfinished: let it finish")
    process.send(signal.SIGCONT)
    assert process.wait() == 0, process.err
    assert weights(tmp_path / "x") == weights(world / "run")


@LONG
def test_two_evaluations_share_a_cache(nursery, world, tmp_path):
    both = [nursery.start(tmp_path, "eval", world / "run", *EVAL, "--cache", "cache", "--out", name) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0], [process.err for process in both]
    for name in "ab":
        assert (tmp_path / name / "report.json").read_bytes() == (world / "report" / "report.json").read_bytes()
    assert hidden(tmp_path) == []


@LONG
def test_two_exports_to_one_folder(nursery, world, tmp_path):
    both = [nursery.start(tmp_path, "export", world / "run", "--out", "bundles/x") for _ in range(2)]
    codes = [process.wait() for process in both]
    assert sorted(codes) == [0, 1], [process.err for process in both]
    assert "bundles/x already exists" in both[codes.index(1)].err
    verify_bundle(tmp_path / "bundles" / "x")
    assert hidden(tmp_path) == [] and visible(tmp_path / "bundles") == ["x"]


@LONG
def test_two_calibrations_of_one_run(nursery, world, run, tmp_path):
    both = [nursery.start(tmp_path, "calibrate", run, "--risk", "0.4") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.err for process in both]
    assert fitted(run) == fitted(world / "run")
    assert hidden(run) == []


def test_a_name_taken_during_training_loses_nothing(nursery, images, tmp_path):
    command = ["train-deep-ensemble", "--members", "1", *SMALL, *images, "--out", "same"]
    both = [nursery.start(tmp_path, *command, stops=("os.mkdir", ".partial-same-*", 1)) for _ in range(2)]
    for process in both:
        process.wait_until_stopped()  # before it keeps anything
    for process in both:
        process.send(signal.SIGCONT)
    assert [process.wait() for process in both] == [0, 0], [process.err for process in both]
    assert sum("was taken while this run was trained" in process.err for process in both) == 1
    saved = [path for path in tmp_path.glob("same*") if path.is_dir()]
    assert len(saved) == 2
    assert [weights(path) for path in saved] == [weights(saved[0])] * 2


# --- a clock that jumps ---


def test_a_clock_that_jumps_while_a_run_is_trained(nursery, world, images, tmp_path):
    clock, began = tmp_path / "clock", time.monotonic()
    clock.write_text("0")
    moments = (*BEFORE_CHECKPOINT[:2], 4)
    process = nursery.start(tmp_path, *TRAIN, *images, "--out", "runs/x", clock=clock, stops=moments)
    for jump in (365 * 86400, -86400, 0):
        process.wait_until_stopped()
        clock.write_text(str(jump))
        process.send(signal.SIGCONT)
    process.wait_until_stopped()
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.wait() == 130, process.err
    clock.write_text("-1e7")
    assert nursery.run(tmp_path, "train-simplex", "--resume", "runs/x", clock=clock)[0] == 0
    elapsed, run = time.monotonic() - began, Run.load(tmp_path / "runs" / "x")
    assert weights(tmp_path / "runs" / "x") == weights(world / "run")
    times = [record["seconds"] for record in run.history]
    assert all(0 <= record <= elapsed for record in times) and times == sorted(times)
    assert 0 < run.manifest.cost.seconds <= elapsed
    assert all(0 <= entry.seconds <= elapsed for entry in run.manifest.cost.entries.values())


def test_names_of_a_clock_that_stands_still_or_goes_back(nursery, world, images, tmp_path):
    clock = tmp_path / "clock"
    train = ["train-deep-ensemble", "--members", "1", "--arch", "tests._small:network", "--epochs", "1", *images]
    runs = []
    for told in ("stands 2e9", "stands 2e9", "stands 1e9", "-86400"):
        clock.write_text(told)
        result = nursery.run(tmp_path, *train, clock=clock)
        assert result[0] == 0, result[2]
        runs.append(latest(tmp_path / "runs"))
    assert len(set(runs)) == 4
    assert runs[2].name.endswith("20010909-014640")


@LONG
def test_two_reports_named_in_one_second(nursery, world, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("stands 2e9")
    evaluate = ["eval", world / "run", "--device", "cpu", "--cache", world / "cache"]
    both = [nursery.start(tmp_path, *evaluate, clock=clock) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.err for process in both]
    assert len({*(tmp_path / "reports").iterdir()}) == 2


# --- Ctrl-C, SIGTERM and a terminal that is closed ---

ENDINGS = ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129))


def interruptible(world: Path, images: list[str]) -> dict[str, list]:
    return {
        "train-simplex": [*TRAIN, *images, "--out", "x"],
        "train-deep-ensemble": ["train-deep-ensemble", *SMALL, *images, "--out", "x"],
        "eval": ["eval", world / "run", *EVAL, "--cache", "cache", "--out", "x"],
        "compare": ["compare", world / "run", "run", *EVAL, "--cache", "cache", "--out", "x"],
        "calibrate": ["calibrate", "run"],
        "surface": ["surface", world / "run", "--out", "x"],
        "export": ["export", world / "run", "--out", "x"],
        "data corrupt": ["data", "corrupt", f"folder:{world / 'images'}", "--out", "x"],
    }


@pytest.mark.parametrize("tries", [pytest.param(1, id="quick"), pytest.param(5, id="long", marks=LONG)])
@pytest.mark.parametrize("name", quick(list(interruptible(Path(), [])), "train-simplex", "calibrate"))
def test_sigterm_ctrl_c_and_a_closed_terminal(nursery, world, images, run, tmp_path, name, tries):
    command = interruptible(world, images)[name]
    if name == "compare":
        shutil.copytree(world / "run", tmp_path / "other")
        command[2] = "other"
    process = nursery.start(tmp_path, *command)
    assert process.wait() == 0, process.err
    changes, made = process.changes, visible(tmp_path / "x") if (tmp_path / "x").exists() else None
    whole = fitted(run) if name == "calibrate" else None
    for interrupted in range(2 * tries):
        for path in ("x", "cache", "x.unfinished"):
            shutil.rmtree(tmp_path / path, ignore_errors=True)
        (run / calibration.FILE).unlink(missing_ok=True)
        number, code = ENDINGS[(interrupted + len(name)) % 3]
        process = nursery.start(tmp_path, *command, ends=(number, changes * (interrupted + 1) // (2 * tries)))
        process.wait()
        assert_interrupted(process, code)
        assert hidden(tmp_path) == []
        left = {path.name for path in tmp_path.iterdir()} - {"run", "other", "cache", "latest", "x.unfinished"}
        if name == "data corrupt":  # whole files are kept, to go on with
            assert not left or set(visible(tmp_path / "x")) <= set(made)
        else:  # unless it came after the last file had been written
            assert not left or visible(tmp_path / "x") == made
        assert calibration.load(run) is None or fitted(run) == whole
        begun = (tmp_path / "x.unfinished").exists() and not left  # else it came while that was removed
        assert (f"to resume: ensembler {name} --resume x" in process.err) == begun


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(nursery, images, tmp_path):
    process = nursery.start(tmp_path, "train-simplex", *SMALL[:2], "--epochs", 10_000, *images)
    until(lambda: "epoch 1 of" in process.err, process)
    process.send(signal.SIGINT)
    process.wait()
    assert_interrupted(process, 130)
    assert "90 images of 3 classes" in process.err
    assert visible(tmp_path) == []


def assert_interrupted(process: Process, code: int) -> None:
    assert "Traceback" not in process.err, process.err
    assert process.err.splitlines()[-1] == "interrupted"
    assert process.code == code
