"""Engines: the same pieces give the same results here and with Ray, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ensembler.engine import Local, Ray, choose, resources
from ensembler.errors import DataError, EngineError, UsageError
from ensembler.eval.evaluation import evaluate
from ensembler.run import Part, Run
from ensembler.trainers import Session, Settings, train_deep_ensemble, train_simplex
from ensembler.trainers.books import Books
from ensembler.trainers.checkpoints import Checkpoints
from tests._small import SETTINGS, dataset
from tests.test_cli import ROOT, call, start
from tests.test_resume import assert_the_same

FILES = ("vertices.safetensors", "members.safetensors")
SMALL = ["--arch", "tests._small:noisy", "--epochs", 3, "--threads", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def ray():
    """A Ray of two CPUs, for all tests of this file."""
    module = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{before or ''}"  # the workers find the tests' networks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def run(engine, function, shared, arguments, hear=lambda *told: None):
    with closing(engine.run(function, shared, arguments, hear)) as found:
        return sorted(found)


# --- pieces ---


def add(shared, argument, tell):
    tell("sum", shared, argument)
    return shared + argument


def refuse(shared, argument, tell):
    raise DataError(f"nothing for {argument}")


def stumble(shared, argument, tell):
    """Says which process it is, and the first time waits there for its end."""
    marker = Path(shared) / str(argument)
    first = not marker.exists()
    marker.touch()
    tell(os.getpid(), argument)
    if first:
        time.sleep(1200)
    return argument


def die(shared, argument, tell):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(shared, argument, tell):
    tell("began")
    time.sleep(1200)


def threads(shared, argument, tell):
    return torch.get_num_threads()


def test_both_engines_run_every_piece_and_hear_all_that_is_told(ray):
    heard = []
    for engine in (Local(), Ray(threads=1)):
        heard.clear()
        assert run(engine, add, 10, [1, 2, 3], lambda *told: heard.append(told)) == [(0, 11), (1, 12), (2, 13)]
        assert sorted(heard) == [("sum", 10, 1), ("sum", 10, 2), ("sum", 10, 3)]
        assert run(engine, add, 10, []) == []


def test_an_error_raised_on_purpose_comes_out_as_itself_and_ends_the_rest(ray):
    for engine in (Local(), Ray(threads=1)):
        with pytest.raises(DataError, match=r"^nothing for [123]$"):
            run(engine, refuse, None, [1, 2, 3])


def test_a_killed_worker_costs_its_piece_and_no_result(ray, tmp_path):
    told = []

    def hear(pid, argument):
        told.append(argument)
        if told.count(argument) == 1:
            os.kill(pid, signal.SIGKILL)

    assert run(Ray(threads=1), stumble, str(tmp_path), [1, 2], hear) == [(0, 1), (1, 2)]
    assert sorted(told) == [1, 1, 2, 2]


def test_a_piece_that_is_lost_too_often_is_named(ray):
    with pytest.raises(EngineError, match=r"piece 1 of 1 was lost 2 times \(WorkerCrashedError\): look for machines"):
        run(Ray(threads=1, retries=1), die, None, [1])


def test_what_is_pending_is_cancelled(ray):
    def interrupt(*told):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Ray(threads=1), wait, None, [1, 2, 3], interrupt)
    # The two CPUs are free again at once.
    start = time.monotonic()
    assert run(Ray(threads=2), threads, None, [1]) == [(0, 2)]
    assert time.monotonic() - start < 600


def test_what_a_piece_asks_for():
    small, large, gpus = {"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}
    assert resources(None, None, [small, large], 6) == {"num_cpus": 6, "num_gpus": 0}
    assert resources(None, 3, [small, large], 6) == {"num_cpus": 3, "num_gpus": 0}
    assert resources(None, None, [small, gpus], 6) == {"num_cpus": 1, "num_gpus": 1}
    assert resources("cuda", 3, [small, gpus], 6) == {"num_cpus": 3, "num_gpus": 1}
    assert resources("cpu", None, [small, gpus], 6) == {"num_cpus": 6, "num_gpus": 0}


def test_what_cannot_be_had_is_said(ray, monkeypatch):
    with pytest.raises(EngineError, match="a piece takes 9 CPUs and no machine of the cluster has more than 2"):
        Ray(threads=9).__enter__()
    with pytest.raises(UsageError, match="cuda is whichever a piece is given"):
        Ray(device="cuda:1")
    with pytest.raises(UsageError, match="add --engine ray"):
        choose("local", "here:6379")

    def init(address, **_):
        raise ConnectionError(f"no answer\nfrom {address}")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(EngineError, match="cannot reach Ray at ray://here:6379: no answer: is it running there"):
        choose("ray", "ray://here:6379").__enter__()
    with pytest.raises(EngineError, match=r"cannot reach Ray at 127.0.0.1:1: .*refused.*: is it running there"):
        choose("ray", "127.0.0.1:1").__enter__()  # Ray itself would try for many minutes
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'ensembler\[ray\]'"):
        choose("ray").__enter__()


# --- training ---


def same_bytes(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ["train-deep-ensemble", "--members", 4],
        ["train-simplex", "--simplexes", 2, "--vertices", 2, "--members", 4, "--arch", "tests._small:counting"],
        ["train-simplex", "--simplexes", 2, "--vertices", 2, "--members", 3, "--regularisation", "auto"],
    ],
    ids=["deep ensemble", "simplexes", "auto"],
)
def test_ray_makes_the_run_that_this_process_makes(ray, tmp_path, images, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    name, *own = command
    for engine in ("local", "ray"):
        result = call(name, *SMALL, *own, *images, "--engine", engine, "--out", engine)
        assert result.exit_code == 0, result.output
        parts = {record["part"] for record in Run.load(Path(engine)).history}
        assert all(f"{part}: epoch" in result.stderr for part in parts)
    same_bytes(Path("local"), Path("ray"))
    one, other = Run.load(Path("local")), Run.load(Path("ray"))
    assert_the_same(one, other)
    assert one.manifest.options == other.manifest.options
    seconds = [record["seconds"] for record in other.history]
    assert seconds == sorted(seconds)
    parts = sum(part.seconds for part in other.manifest.cost.parts.values())
    assert parts <= other.manifest.cost.seconds + 0.1


def test_digits_by_the_cnn(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for engine in ("local", "ray"):
        result = call(
            *["train-deep-ensemble", "--members", 2, "--epochs", 0.3, "--threads", 1, "--device", "cpu"],
            *["--engine", engine, "--out", engine],
        )
        assert result.exit_code == 0, result.output
    same_bytes(Path("local"), Path("ray"))


def session(watch=lambda part, epoch, epochs: None, engine=None, checkpoints=None, **changes):
    settings = Settings(**(SETTINGS | {"architecture": "tests._small:noisy", "threads": 1} | changes))
    return Session(dataset(), settings, watch=watch, checkpoints=checkpoints, engine=engine or Local())


def test_a_worker_killed_in_the_middle_of_training_costs_one_piece(ray):
    begun, killed = [], []

    def watch(part, epoch, epochs):
        begun.extend([part] if epoch.number == 1 else [])
        if not killed:
            workers = psutil.Process().children(recursive=True)
            killed.append(next(one for one in workers if "_work" in one.cmdline()[0]))
            killed[0].kill()

    found = train_deep_ensemble(session(watch, Ray(threads=1), epochs=150), members=3)
    assert sorted(set(begun)) == ["solution 1", "solution 2", "solution 3"]
    assert len(begun) <= 4  # that of the killed worker was begun again, if it had told of its first epoch already
    assert_the_same(found, train_deep_ensemble(session(epochs=150), members=3))


def test_an_error_of_one_piece_is_one_line(ray, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = ["train-deep-ensemble", "--members", 2, "--lr", 1e30, "--clip", 0]
    result = call(*broken, *SMALL, *images, "--engine", "ray", "--out", "x")
    assert result.exit_code == 1
    assert "error: the training loss is" in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("engines", [("ray", "local"), ("local", "ray")])
def test_finished_pieces_are_not_made_again_whichever_engine_goes_on(ray, tmp_path, images, monkeypatch, engines):
    monkeypatch.chdir(tmp_path)
    command = ["train-deep-ensemble", "--members", 4, *SMALL, *images]
    assert call(*command, "--out", "whole").exit_code == 0
    keep, left = Checkpoints.keep, 2

    def keep_and_break_off(self, *piece):
        nonlocal left
        keep(self, *piece)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "keep", keep_and_break_off)
    result = call(*command, "--engine", engines[0], "--out", "x")
    assert result.exit_code == 130
    assert "to go on: ensembler train-deep-ensemble --resume x" in result.stderr
    assert len(list(Path("x.unfinished").glob("piece-*"))) == 2
    assert not list(Path("x.unfinished").glob("[0-9]*"))
    assert "engine" not in json.loads(Path("x.unfinished/options.json").read_text())["train-deep-ensemble"]
    result = call("train-deep-ensemble", "--resume", "x", "--engine", engines[1])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("epoch 1 of 3") == 2
    same_bytes(Path("whole"), Path("x"))
    assert_the_same(Run.load(Path("whole")), Run.load(Path("x")))
    assert not Path("x.unfinished").exists()


def test_a_damaged_piece_is_made_again_and_another_runs_refused(tmp_path):
    folder, made = tmp_path / "x.unfinished", []
    train_deep_ensemble(session(checkpoints=Checkpoints(folder)), members=2)
    for number in range(2):
        state = folder / f"piece-{number:04}" / "piece.safetensors"
        if number:
            state.write_bytes(state.read_bytes()[:-1])
    watch = lambda part, epoch, epochs: made.append(part)  # noqa: E731
    again = train_deep_ensemble(session(watch, checkpoints=Checkpoints(folder)), members=2)
    assert made == ["solution 2", "solution 2"]
    assert_the_same(again, train_deep_ensemble(session(), members=2))
    for changes in ({"seed": 5}, {"epochs": 3}):
        with pytest.raises(UsageError, match="is of a run with other options"):
            train_deep_ensemble(session(checkpoints=Checkpoints(folder), **changes), members=2)
    with pytest.raises(UsageError, match="is of a run with other options"):
        train_deep_ensemble(session(checkpoints=Checkpoints(folder)), members=2, parallel=2)


def test_books_of_pieces_add_up():
    one = Books({"a": Part(example_passes=3, seconds=1.5, peak_memory=7, device="cpu")}, [{"seconds": 1.0}], 2.0)
    other = Books(
        {
            "a": Part(example_passes=4, forward_passes=2, seconds=0.25, peak_memory=5, device="cpu"),
            "b": Part(seconds=None, origin="x.pt", device="cpu"),
        },
        [{"seconds": 0.5}],
        3.0,
    )
    one.add(other)
    a, b = one.parts["a"], one.parts["b"]
    assert (a.example_passes, a.forward_passes, a.seconds, a.peak_memory) == (7, 2, 1.75, 7)
    assert (b.seconds, b.origin) == (None, "x.pt")
    assert [record["seconds"] for record in one.history] == [1.0, 2.5]
    assert one.seconds == 5.0


def test_a_network_keeps_nothing_from_piece_to_piece():
    """Each simplex alone, in a session of its own, is the one that it is among others."""
    both = train_simplex(session(architecture="tests._small:counting"), 2, simplexes=2, members=4)
    alone = train_simplex(session(architecture="tests._small:counting"), 2, members=2)
    for name, rows in alone.vertices.items():
        assert torch.equal(rows[0], both.vertices[name][0])  # the solution; vertices are named by their simplex


# --- seeds ---


def test_seeds_are_runs_and_those_that_are_there_are_not_made_again(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images]
    assert call(*command, "--seed", 1, "--out", "one").exit_code == 0
    result = call(*command, "--seeds", 2, "--out", "many")
    assert result.exit_code == 0, result.output
    assert "seed 1, fge: epoch 1 of" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("many*")) == ["many-s0", "many-s1"]
    same_bytes(Path("one"), Path("many-s1"))
    assert Run.load(Path("one")).manifest.options == Run.load(Path("many-s1")).manifest.options
    result = call(*command, "--seeds", 3, "--out", "many")
    assert result.exit_code == 0, result.output
    assert "many-s0 is there already" in result.stderr
    assert "seed 1," not in result.stderr
    assert "seed 2, fge: epoch 1 of" in result.stderr
    result = call(*command, "--lr", 0.01, "--seeds", 2, "--out", "many")
    assert result.exit_code == 1
    assert "many-s0 is there already, made with rate 0.1, not 0.01: choose another --out" in result.stderr
    assert call(*command, "--seeds", 0, "--out", "none").exit_code == 1


def test_seeds_that_were_broken_off_go_on_by_the_same_command(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images, "--seeds", 2]
    assert call(*command, "--out", "whole").exit_code == 0
    save, left = Checkpoints.save, 2

    def save_and_break_off(self, *checkpoint):
        nonlocal left
        save(self, *checkpoint)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_break_off)
    result = call(*command, "--checkpoint-every", 0, "--out", "x")
    assert result.exit_code == 130
    assert "to go on: the same command with --out x" in result.stderr
    result = call(*command, "--lr", 0.02, "--out", "x")
    assert result.exit_code == 1
    assert "begun with other options" in result.stderr
    assert call(*command, "--out", "x", "--quiet").exit_code == 0
    for seed in (0, 1):
        same_bytes(Path(f"whole-s{seed}"), Path(f"x-s{seed}"))
    assert not list(tmp_path.glob("*.unfinished"))


def test_seeds_by_ray(ray, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-snapshots", "--members", 2, "--collapse", "centroid", *SMALL, *images, "--seeds", 2]
    for engine in ("local", "ray"):
        result = call(*command, "--engine", engine, "--out", engine)
        assert result.exit_code == 0, result.output
        assert "seed 1, snapshots: epoch 1 of 3" in result.stderr
    for seed in (0, 1):
        same_bytes(Path(f"local-s{seed}"), Path(f"ray-s{seed}"))
        assert_the_same(*(Run.load(Path(f"{engine}-s{seed}")) for engine in ("local", "ray")))


# --- evaluation ---


def test_an_evaluation_by_ray_says_the_same(ray, tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.datasets.load", lambda name, root=None, **_: dataset())
    runs = [train_deep_ensemble(session(seed=seed), members=2).save(tmp_path / f"run{seed}") for seed in (0, 1)]
    images = {"shift": "corruptions", "ood": ["noise:uniform"], "examples": 9, "device": "cpu", "threads": 1}
    asked, told = [], []
    work = Ray.run
    monkeypatch.setattr(Ray, "run", lambda self, *given: asked.append(len(given[2])) or work(self, *given))

    def report(engine, name, **changes):
        watch = lambda label, done, total: told.append((label, done, total))  # noqa: E731
        given = images | {"engine": engine, "cache": tmp_path / name, "watch": watch} | changes
        return evaluate(runs, **given).report.model_dump_json()

    here = report(Local(), "here")
    told.clear()
    assert report(Ray(device="cpu", threads=1), "there") == here
    assert asked == [96]  # 19 corruptions at 5 severities, and the noise
    assert told[-1] == ("uniform noise (generated, seed 0)", 12 + 9 + 96 * 9, 12 + 9 + 96 * 9)
    assert {(done, total) for _, done, total in told} >= {(9 * done, 9 * 96) for done in range(1, 97)}
    kept = [
        sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.*")) for name in ("here", "there")
    ]
    assert kept[0] == kept[1]
    assert report(Ray(device="cpu", threads=1), "there") == here
    report(Ray(device="cpu", threads=1), "there", ood=["noise:uniform", "noise:constant"])
    assert asked == [96, 0, 1]


def test_the_evaluation_commands_take_an_engine(ray, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("train-deep-ensemble", "--members", 2, *SMALL, *images, "--out", "run").exit_code == 0
    for engine in ("local", "ray"):
        result = call("eval", "run", "--ood", "noise:uniform", "--engine", engine, "--threads", 1, "--json", engine)
        assert result.exit_code == 0, result.output
    assert Path("local").read_bytes() == Path("ray").read_bytes()
    assert "add --engine ray" in call("eval", "run", "--address", "here:6379").stderr
    assert "threads must be at least 1" in call("eval", "run", "--threads", 0).stderr


# --- Ray's own death ---


@pytest.mark.long
@pytest.mark.parametrize("victim", ["gcs_server", "raylet"])
def test_what_was_finished_outlives_ray(tmp_path, images, victim):
    """Half a minute each: Ray's head is given so long to come back."""
    pytest.importorskip("ray")
    command = ["train-deep-ensemble", "--members", 6, *SMALL, "--epochs", 600, *images, "--engine", "ray"]
    process = start(tmp_path, *command, "--quiet", "--out", "x")
    while not (finished := list(tmp_path.glob("x.unfinished/piece-*"))):
        assert process.poll() is None
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if victim in child.name():
            child.kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors[-3000:]
    assert "error: Ray" in errors
    assert "to go on: ensembler train-deep-ensemble --resume x" in errors
    assert "Traceback" not in errors
    process = start(tmp_path, "train-deep-ensemble", "--resume", "x", "--log", "log.jsonl", "--quiet")
    assert process.communicate(timeout=120)[1] == ""
    made = {json.loads(line)["part"] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert len(made) <= 6 - len(finished)
    assert Run.load(tmp_path / "x").manifest.members == 6
