"""Engines and jobs: the same work gives the same results here and with Ray, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from ensembler import jobs
from ensembler.engine import Local, Ray, choose, resources
from ensembler.errors import ArtefactError, DataError, EngineError, UsageError
from ensembler.jobs import Job
from ensembler.run import Run
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from ensembler.trainers.events import EpochEnd
from ensembler.trainers.ledger import Ledger
from ensembler.trainers.plan import Epoch
from tests._evaluate import evaluate
from tests._interrupt import after, make
from tests._small import SETTINGS, dataset
from tests.test_cli import ROOT, call, start
from tests.test_resume import assert_the_same
from tests.test_study import REPORT
from tests.test_study import WHOLE as STUDY

FILES = ("vertices.safetensors", "members.safetensors")
SMALL = ["--arch", "tests._small:noisy", "--epochs", 3, "--threads", 1, "--device", "cpu"]


@pytest.fixture(scope="module")
def ray():
    """A Ray of two CPUs, for all tests of this file."""
    module = pytest.importorskip("ray")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{before or ''}"  # the workers find the tests' networks
    for left in range(9, -1, -1):  # Ray gives its own processes seconds to start; a loaded machine needs more
        try:
            module.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
            break
        except Exception:
            module.shutdown()
            if not left:
                raise
    yield module
    module.shutdown()
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def run(engine, function, shared, arguments, on_event=lambda *event: None):
    with closing(engine.run(function, shared, arguments, on_event)) as found:
        return sorted(found)


# --- engines ---


def add(shared, argument, emit):
    emit("sum", shared, argument)
    return shared + argument


def refuse(shared, argument, emit):
    raise DataError(f"nothing for {argument}")


def stumble(shared, argument, emit):
    """Emits which process it is, and the first time waits there for its end."""
    marker = Path(shared) / str(argument)
    first = not marker.exists()
    marker.touch()
    emit(os.getpid(), argument)
    if first:
        time.sleep(1200)
    return argument


def die(shared, argument, emit):
    os.kill(os.getpid(), signal.SIGKILL)


def wait(shared, argument, emit):
    emit("began")
    time.sleep(3600)


def threads(shared, argument, emit):
    return torch.get_num_threads()


def test_both_engines_run_every_job_and_deliver_all_that_is_emitted(ray):
    for engine in (Local(), Ray(threads=1)):
        events = []
        assert run(engine, add, 10, [1, 2, 3], lambda *e, seen=events: seen.append(e)) == [(0, 11), (1, 12), (2, 13)]
        assert sorted(events) == [("sum", 10, 1), ("sum", 10, 2), ("sum", 10, 3)]
        assert run(engine, add, 10, []) == []


def test_an_error_raised_on_purpose_comes_out_as_itself_and_ends_the_rest(ray):
    for engine in (Local(), Ray(threads=1)):
        with pytest.raises(DataError, match=r"^nothing for [123]$"):
            run(engine, refuse, None, [1, 2, 3])


def test_a_killed_worker_costs_its_job_and_no_result(ray, tmp_path):
    begun = []

    def kill(pid, argument):
        begun.append(argument)
        if begun.count(argument) == 1:
            os.kill(pid, signal.SIGKILL)

    assert run(Ray(threads=1), stumble, str(tmp_path), [1, 2], kill) == [(0, 1), (1, 2)]
    assert sorted(begun) == [1, 1, 2, 2]


def test_a_job_that_is_lost_too_often_is_named(ray):
    with pytest.raises(EngineError, match=r"job 1 of 1 was lost 2 times \(WorkerCrashedError\): look for machines"):
        run(Ray(threads=1, retries=1), die, None, [1])


def test_what_is_pending_is_cancelled(ray):
    def interrupt(*event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Ray(threads=1), wait, None, [1, 2, 3], interrupt)
    # The two CPUs are free again, long before the jobs would have ended.
    start = time.monotonic()
    assert run(Ray(threads=2), threads, None, [1]) == [(0, 2)]
    assert time.monotonic() - start < 3600


def test_what_a_job_asks_for():
    small, large, gpus = {"CPU": 2.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}
    assert resources(None, None, [small, large], 6) == {"num_cpus": 6, "num_gpus": 0}
    assert resources(None, 3, [small, large], 6) == {"num_cpus": 3, "num_gpus": 0}
    assert resources(None, None, [small, gpus], 6) == {"num_cpus": 1, "num_gpus": 1}
    assert resources("cuda", 3, [small, gpus], 6) == {"num_cpus": 3, "num_gpus": 1}
    assert resources("cpu", None, [small, gpus], 6) == {"num_cpus": 6, "num_gpus": 0}


def test_what_cannot_be_had_is_said(ray, monkeypatch):
    with pytest.raises(EngineError, match="a job needs 9 CPUs, and no machine of the cluster has more than 2"):
        Ray(threads=9).__enter__()
    with pytest.raises(UsageError, match="with Ray, give cuda, and each job gets a GPU"):
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


# --- jobs ---


def power(shared, emit, base, exponent=1):
    emit(f"{base} to the {exponent}")
    if base < 0:
        raise DataError(f"{base} is negative")
    return shared * base**exponent


class Kept:
    """A store in memory; of ``full``, no more results can be saved."""

    def __init__(self, full: bool = False, **results: int) -> None:
        self.results, self.full = results, full

    def load(self, job: Job) -> int | None:
        return self.results.get(job.name)

    def save(self, job: Job, result: int) -> None:
        if self.full:
            raise ArtefactError(f"no space for {job.name}")
        self.results[job.name] = result


ENGINES = pytest.mark.parametrize("engine", [Local(), Ray(threads=1)], ids=["local", "ray"])


def job(name: str, **arguments: int) -> Job:
    return Job(name, power, arguments)


@ENGINES
def test_jobs_that_are_kept_come_first_and_are_not_done_again(ray, engine):
    store, events = Kept(b=7), []
    todo = [job("a", base=2), job("b", base=-1), job("c", base=3, exponent=2)]
    found = list(jobs.run(todo, 10, engine, store, events.append))
    assert found[0] == (todo[1], 7)
    assert {each.name: result for each, result in found} == {"a": 20, "b": 7, "c": 90}
    assert store.results == {"a": 20, "b": 7, "c": 90}
    assert sorted(events) == ["2 to the 1", "3 to the 2"]
    events.clear()
    assert {each.name: result for each, result in jobs.run(todo, 10, engine, store, events.append)} == store.results
    assert events == []
    assert [result for _, result in jobs.run(todo[:1], 10, engine)] == [20]  # kept nowhere


@ENGINES
def test_a_job_that_fails_ends_the_others_and_what_is_finished_is_kept(ray, engine):
    store = Kept()
    with pytest.raises(DataError, match="-1 is negative"):
        for _ in jobs.run([job("a", base=2), job("b", base=-1)], 1, engine, store):
            pass
    assert set(store.results) <= {"a"}
    if engine.here:
        assert store.results == {"a": 2}
    assert [result for _, result in jobs.run([job("a", base=2)], 1, engine, store)] == [2]


@ENGINES
def test_a_job_is_saved_before_it_is_handed_on(ray, engine):
    store = Kept()
    with closing(jobs.run([job("a", base=2), job("b", base=3)], 1, engine, store)) as results:
        first, result = next(results)
        assert store.results[first.name] == result
    with pytest.raises(ArtefactError, match="no space for c"):
        list(jobs.run([job("c", base=2)], 1, engine, Kept(full=True)))


# --- training ---


def same_bytes(one: Path, other: Path) -> None:
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize(
    ("command", "count"),
    [
        (["train-deep-ensemble", "--members", 4], 4),
        (["train-simplex", "--simplexes", 2, "--vertices", 2, "--members", 4, "--arch", "tests._small:counting"], 2),
        (["train-simplex", "--simplexes", 2, "--vertices", 2, "--members", 3, "--regularisation", "auto"], 2),
        (["train-fge", "--members", 2, "--cycle", 1], 1),  # the run as a whole
    ],
    ids=["deep ensemble", "simplexes", "auto", "fge"],
)
def test_ray_makes_the_run_that_this_process_makes(ray, tmp_path, images, monkeypatch, command, count):
    monkeypatch.chdir(tmp_path)
    work, done = Ray.run, []
    monkeypatch.setattr(Ray, "run", lambda self, *given: done.extend(given[2]) or work(self, *given))
    name, *own = command
    for engine in ("local", "ray"):
        result = call(name, *SMALL, *own, *images, "--engine", engine, "--out", engine)
        assert result.exit_code == 0, result.output
        parts = {record["part"] for record in Run.load(Path(engine)).history}
        assert all(f"{part}: epoch" in result.stderr for part in parts)
    assert len(done) == count
    same_bytes(Path("local"), Path("ray"))
    one, other = Run.load(Path("local")), Run.load(Path("ray"))
    assert_the_same(one, other)
    assert one.manifest.options == other.manifest.options
    seconds = [record["seconds"] for record in other.history]
    assert seconds == sorted(seconds)
    parts = sum(entry.seconds for entry in other.manifest.cost.entries.values())
    assert parts <= other.manifest.cost.seconds + 0.1


def test_a_study_on_ray_reports_what_this_process_reports(ray, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work, done = Ray.run, []
    monkeypatch.setattr(Ray, "run", lambda self, *given: done.extend(given[2]) or work(self, *given))
    command = [*STUDY, *images]
    for engine in ("local", "ray"):
        result = call(*command, "--engine", engine, "--out", engine)
        assert result.exit_code == 0, result.output
    names = {path.name for path in Path("local/runs").glob("[!.]*-s*-*")}
    assert names and names == {path.name for path in Path("ray/runs").glob("[!.]*-s*-*")}
    assert done
    for name in REPORT:
        assert Path("local", name).read_bytes() == Path("ray", name).read_bytes()


def test_digits_by_the_cnn(ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for engine in ("local", "ray"):
        result = call(
            *["train-deep-ensemble", "--members", 2, "--epochs", 0.1, "--threads", 1, "--device", "cpu"],
            *["--engine", engine, "--out", engine],
        )
        assert result.exit_code == 0, result.output
    same_bytes(Path("local"), Path("ray"))


def settings(**changes) -> Settings:
    return Settings(**(SETTINGS | {"architecture": "tests._small:noisy", "threads": 1} | changes))


def title(process):
    with suppress(psutil.Error, IndexError):  # it has ended meanwhile
        return process.cmdline()[0]
    return ""


def test_a_worker_killed_in_the_middle_of_training_costs_one_job(ray):
    begun, killed = [], []

    def on_event(event):
        begun.extend([event.part] if isinstance(event, EpochEnd) and event.epoch.number == 1 else [])
        if not killed:
            workers = [one for one in psutil.Process().children(recursive=True) if title(one).startswith("ray::")]
            killed.append(max(workers, key=lambda one: "_work" in title(one)))  # one that works, unless all have ended
            killed[0].kill()

    method, long = DeepEnsemble(members=3), settings(epochs=150)
    found = train(dataset(), method, long, on_event=on_event, engine=Ray(threads=1))
    assert sorted(set(begun)) == ["solution 1", "solution 2", "solution 3"]
    assert len(begun) <= 4  # that of the killed worker was begun again, if it had emitted its first epoch already
    assert_the_same(found, train(dataset(), method, long))


def test_an_error_of_one_job_is_one_line(ray, tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = ["train-deep-ensemble", "--members", 2, "--lr", 1e30, "--clip", 0]
    result = call(*broken, *SMALL, *images, "--engine", "ray", "--out", "x")
    assert result.exit_code == 1
    assert "error: the training loss is" in result.stderr
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("engines", [("ray", "local"), ("local", "ray")])
def test_finished_jobs_are_not_done_again_whichever_engine_goes_on(ray, tmp_path, images, monkeypatch, engines):
    monkeypatch.chdir(tmp_path)
    command = ["train-deep-ensemble", "--members", 4, *SMALL, *images]
    assert call(*command, "--out", "whole").exit_code == 0
    after(monkeypatch, 2, "save")
    result = call(*command, "--engine", engines[0], "--out", "x")
    assert result.exit_code == 130
    assert "to resume: ensembler train-deep-ensemble --resume x" in result.stderr
    assert len(list(Path("x.unfinished").glob("*"))) == 4  # two finished jobs, spec.json and the lock
    assert len(list(Path("x.unfinished").glob("solution-*.done"))) == 2
    result = call("train-deep-ensemble", "--resume", "x", "--engine", engines[1])
    assert result.exit_code == 0, result.output
    assert result.stderr.count("epoch 1 of 3") == 2
    same_bytes(Path("whole"), Path("x"))
    assert_the_same(Run.load(Path("whole")), Run.load(Path("x")))
    assert not Path("x.unfinished").exists()


def test_a_damaged_job_is_done_again_and_the_result_of_another_run_refused(tmp_path):
    path, method, again = tmp_path / "x", DeepEnsemble(members=2), []
    make(path, method, settings())
    state = tmp_path / "x.unfinished" / "solution-2.done" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    ends = lambda event: again.append(event.part) if isinstance(event, EpochEnd) else None  # noqa: E731
    resumed = make(path, method, settings(), on_event=ends)
    assert again == ["solution 2", "solution 2"]
    assert_the_same(resumed, train(dataset(), method, settings()))
    for other, changed in ((method, settings(seed=5)), (method, settings(epochs=3)), (DeepEnsemble(), settings())):
        with pytest.raises(UsageError, match="was started with other options, data or code"):
            make(path, other, changed)


def test_ledgers_of_jobs_add_up():
    ledger, one, other = Ledger("cpu"), Ledger("cpu"), Ledger("a GPU")
    for own, part, examples, forward in ((one, "a", 3, 0), (other, "a", 4, 2), (other, "b", 1, 0)):
        with own.entry(part, torch.device("cpu")):
            own.epoch(EpochEnd(part, Epoch(1, 0.1, 0.5, 0.5, examples), 1, "accuracy"), forward)
    records = one.record() | {"seconds": 2.0}, other.record() | {"seconds": 3.0}
    for record, own in zip(records, ((1.5, 7), (0.25, 5), (None, None)), strict=False):
        record["entries"]["a"] |= {"seconds": own[0], "peak_memory": own[1]}
        record["history"][0]["seconds"] = own[0]
    records[1]["entries"]["b"] |= {"seconds": None, "peak_memory": None, "origin": "x.pt"}
    with ledger.merging() as found:
        found.extend(records)
    a, b = ledger.entries["a"], ledger.entries["b"]
    assert (a.example_passes, a.forward_passes, a.seconds, a.peak_memory, a.device) == (7, 2, 1.75, 7, "cpu")
    assert (b.seconds, b.origin, b.device) == (None, "x.pt", "a GPU")
    assert [record["seconds"] for record in ledger.history[:2]] == pytest.approx([1.5, 2.25], abs=0.1)
    assert ledger.seconds == pytest.approx(5, abs=0.1)
    cost = ledger.cost()
    assert (cost.example_passes, cost.forward_passes, cost.peak_memory, cost.unknown) == (8, 2, 7, ["x.pt"])


def test_a_network_keeps_nothing_from_job_to_job():
    """Each simplex alone, in a training of its own, is the one that it is among others."""
    counting = settings(architecture="tests._small:counting")
    both = train(dataset(), Simplex(vertices=2, simplexes=2, members=4), counting)
    alone = train(dataset(), Simplex(vertices=2, members=2), counting)
    for name, rows in alone.vertices.items():
        assert torch.equal(rows[0], both.vertices[name][0])  # the solution; vertices are named by their simplex


# --- seeds ---


def test_seeds_are_runs_and_those_that_exist_are_skipped(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images]
    assert call(*command, "--seed", 1, "--out", "one").exit_code == 0
    result = call(*command, "--seeds", 2, "--out", "many")
    assert result.exit_code == 0, result.output
    assert "seed 1, fge: epoch 1 of" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("many*")) == ["many-s0", "many-s1"]
    same_bytes(Path("one"), Path("many-s1"))
    one, other = Run.load(Path("one")).manifest, Run.load(Path("many-s1")).manifest
    assert (one.options, one.settings, one.fingerprint) == (other.options, other.settings, other.fingerprint)
    result = call(*command, "--seeds", 3, "--out", "many")
    assert result.exit_code == 0, result.output
    assert "many-s0 already exists, skipped" in result.stderr
    assert "seed 1," not in result.stderr
    assert "seed 2, fge: epoch 1 of" in result.stderr
    assert "--seeds must be at least 1, not 0" in call(*command, "--seeds", 0, "--out", "none").stderr


def test_seeds_that_were_computed_otherwise_are_skipped_and_others_refused(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images, "--seeds", 2, "--out", "many"]
    assert call(*command).exit_code == 0
    before = [(tmp_path / f"many-s{seed}" / "manifest.json").read_bytes() for seed in (0, 1)]
    for changes in (["--threads", 2], ["--workers", 1], ["--device", torch.device("cpu", 0)], ["--compile"]):
        result = call(*command, *changes)
        assert result.exit_code == 0, result.output
        assert result.stderr.splitlines() == [f"many-s{seed} already exists, skipped" for seed in (0, 1)]
    for changes in (
        *(["--lr", 0.01], ["--high", 0.04], ["--epochs", 2], ["--collapse", "centroid"], ["--augmentation", "none"]),
        ["--arch", "tests._small:network"],
    ):
        result = call(*command, *changes)
        assert result.exit_code == 1
        assert result.stderr.splitlines() == [
            "error: many-s0 already exists, made with other options or of other data: choose another --out, "
            "or remove it"
        ]
    assert [(tmp_path / f"many-s{seed}" / "manifest.json").read_bytes() for seed in (0, 1)] == before
    torch.set_num_threads(1)


def test_seeds_that_were_interrupted_go_on_by_the_same_command(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images, "--seeds", 2]
    assert call(*command, "--out", "whole").exit_code == 0
    after(monkeypatch, 2)
    result = call(*command, "--checkpoint-every", 0, "--out", "x")
    assert result.exit_code == 130
    assert "to resume: the same command with --out x" in result.stderr
    result = call(*command, "--lr", 0.02, "--out", "x")
    assert result.exit_code == 1
    assert "x-s0.unfinished was started with other options, data or code: resume it with those" in result.stderr
    assert call(*command, "--out", "x", "--quiet").exit_code == 0
    for seed in (0, 1):
        same_bytes(Path(f"whole-s{seed}"), Path(f"x-s{seed}"))
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("every", [0, 1e9])
def test_an_error_of_one_seed_costs_no_other(tmp_path, images, monkeypatch, every):
    """The second seed fails: the first is a run already, and of the second what it reached is kept."""
    monkeypatch.chdir(tmp_path)
    command = ["train-fge", "--members", 2, "--cycle", 1, *SMALL, *images, "--seeds", 2, "--checkpoint-every", every]
    assert call(*command, "--out", "whole").exit_code == 0
    epochs, epoch = len(Path("whole-s0/history.jsonl").read_text().splitlines()), Ledger.epoch
    told = []

    def fail(self, *given, **named):
        epoch(self, *given, **named)
        told.append(given)
        if len(told) == epochs + 2:
            raise DataError("an image cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "epoch", fail)
        result = call(*command, "--out", "x")
    assert result.exit_code == 1
    assert "to resume: the same command with --out x" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("x-*")) == ["x-s0", *(["x-s1.unfinished"] if every == 0 else [])]
    result = call(*command, "--out", "x")
    assert result.exit_code == 0, result.output
    assert "x-s0 already exists, skipped" in result.stderr
    assert ("seed 1, fge: epoch 1 of" in result.stderr) == (every > 0)
    for seed in (0, 1):
        same_bytes(Path(f"whole-s{seed}"), Path(f"x-s{seed}"))


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
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    runs = [train(dataset(), DeepEnsemble(members=2), settings(seed=s)).save(tmp_path / f"run{s}") for s in (0, 1)]
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
        options = ["--ood", "noise:uniform", "--examples", 18, "--threads", 1]
        result = call("eval", "run", *options, "--engine", engine, "--json", engine)
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
    while not (finished := list(tmp_path.glob("x.unfinished/*.done"))):
        assert process.poll() is None
        time.sleep(0.05)
    for child in psutil.Process(process.pid).children(recursive=True):
        if victim in child.name():
            child.kill()
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1, errors[-3000:]
    assert "error: Ray" in errors
    assert "to resume: ensembler train-deep-ensemble --resume x" in errors
    assert "Traceback" not in errors
    process = start(tmp_path, "train-deep-ensemble", "--resume", "x", "--log", "log.jsonl", "--quiet")
    assert process.communicate(timeout=600)[1] == ""
    made = {json.loads(line)["part"] for line in (tmp_path / "log.jsonl").read_text().splitlines()}
    assert len(made) <= 6 - len(finished)
    assert Run.load(tmp_path / "x").manifest.members == 6
