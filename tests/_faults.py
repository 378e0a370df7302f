"""Real processes to do harm to: each runs the command line, forked from one that has the heavy imports behind it.

Run as a script, this file is that one: it reads requests, a line of JSON each, and answers with a line.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests._kills import Changes, kill, kill_in_the_next_file
from tests._preloaded import LATE

ROOT = Path(__file__).parents[1]
HEAVY = (  # but ONNX Runtime, which starts a thread that no fork would inherit
    "ensembler.trainers.launch",
    "ensembler.trainers.trainer",
    "ensembler.trainers.summary",
    "ensembler.trainers.methods.simplex",
    "ensembler.eval.comparison",
    "ensembler.eval.report.page",
    "ensembler.eval.report.comparison_plots",
    "ensembler.eval.surface",
    "ensembler.eval.calibrate",
    "torch.onnx._internal.exporter._compat",
    "onnxscript",
    "sklearn.metrics",
    "rich.progress",
    "rich.table",
    "ensembler.cli",
    *LATE,
)


class Process:
    """A command that runs, or has ended.

    Attributes:
        pid: its number, nobody else's until :meth:`wait` has said how it ended.
        code: how it ended: its exit code, or the signal that ended it, negative.
    """

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery, self.pid, self._log = nursery, pid, log
        self.code: int | None = None

    @property
    def out(self) -> str:
        return self._read(".out")

    @property
    def err(self) -> str:
        return self._read(".err")

    @property
    def changes(self) -> int:
        """How many changes of files in its folder it made, now that it has ended by itself."""
        return int(self._read(".changes"))

    def _read(self, suffix: str) -> str:
        file = self._log.with_suffix(suffix)
        return file.read_text() if file.exists() else ""  # not yet

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        """SIGKILL; returns its ``code``: -9, or another where it was quicker."""
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = 600) -> int:
        """Wait for its end, and return its ``code``."""
        code = self._nursery.ask(wait=self.pid, seconds=seconds)
        assert code is not None, f"still running after {seconds} s:\n{self.err}"
        self.code = code
        return code

    def ended(self) -> bool:
        return self._state() == "Z"

    def wait_until_stopped(self) -> None:
        """Wait until it has come to where :meth:`Nursery.start` was told to stop it; SIGCONT lets it go on."""
        until(lambda: self._state() == "T", self)

    def _state(self) -> str:
        return self._status("State")[0]

    def _status(self, name: str) -> str:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{name}:"))


class Nursery:
    """Starts commands."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests._faults"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(
        self,
        folder: Path,
        *arguments: Any,
        largest: int | None = None,
        clock: Path | None = None,
        stops: tuple[str, str, int] | None = None,
        ends: tuple[int, int] | None = None,
        module: str = "ensembler.cli",
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Process:
        """Start ``ensembler ARGUMENTS`` in a folder.

        Args:
            folder: where.
            arguments: of the command line.
            largest: bytes that no file may exceed (RLIMIT_FSIZE).
            clock: a file of the seconds that the process's clock is wrong by, or of the word ``stands`` and the time
                at which it stands still; it may change meanwhile.
            stops: an event of Python's, a pattern of the path that it is about, and a number: SIGSTOP comes just before
                each of the first so many.
            ends: a signal, and the number of the change of files in the folder just before which it comes; SIGXFSZ
                comes in the middle of a file that is written later.
            module: whose ``main`` is called.
            environment: further variables.
        """
        self._count += 1
        log = self._folder / f"{self._count}"
        pid = self.ask(
            folder=str(folder),
            arguments=[*map(str, arguments)],
            log=str(log),
            largest=largest,
            clock=None if clock is None else str(clock),
            stops=stops,
            ends=ends,
            module=module,
            environment=dict(environment),
        )
        return Process(self, pid, log)

    def run(self, folder: Path, *arguments: Any, **faults: Any) -> tuple[int, str, str]:
        """Run a command to its end: its exit code, and what it wrote to stdout and to stderr."""
        process = self.start(folder, *arguments, **faults)
        return process.wait(), process.out, process.err

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of so many bytes in memory; skips the test where it cannot be mounted."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def until(condition: Any, process: Process, seconds: float = 300) -> None:
    """Wait for something that a running process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert not process.ended(), process.err
        assert time.monotonic() < deadline, process.err
        time.sleep(0.002)


def _serve() -> None:
    for name in HEAVY:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert len([*Path("/proc/self/task").iterdir()]) == 1  # a fork has one thread, whatever its parent had
    gc.freeze()  # a fork's collector need not copy all this
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if answer == 0:
                _become(request)
        print(json.dumps(answer), flush=True)


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become(request: dict[str, Any]) -> None:
    os.chdir(request["folder"])
    for number, name in enumerate(("/dev/null", f"{request['log']}.out", f"{request['log']}.err")):
        opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests
    if request["largest"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"], resource.RLIM_INFINITY))
    if request["clock"]:
        _wrong_clock(Path(request["clock"]))
    if request["stops"]:
        _stop_before(*request["stops"])
    number, before = request["ends"] or (0, 0)
    acts = {signal.SIGKILL: kill, signal.SIGXFSZ: kill_in_the_next_file}
    changes = Changes(Path.cwd(), before, acts.get(number, lambda: os.kill(os.getpid(), number)))
    sys.argv, code = ["ensembler", *request["arguments"]], 0
    os.environ.update(request["environment"])
    try:
        importlib.import_module(request["module"]).main()
    except SystemExit as error:
        code = error.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(KeyboardInterrupt):  # the command had ended
        sys.stdout.flush()
    Path(f"{request['log']}.changes").write_text(str(changes.count))
    os._exit(code)  # an interpreter's own end takes longer than some commands


def _stop_before(event: str, pattern: str, times: int) -> None:
    left = times

    def stop(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name == event and left and fnmatch(str(arguments[0]), pattern):
            left -= 1
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(stop)


def _wrong_clock(file: Path) -> None:
    """Let ``time.time`` and ``datetime.now`` tell the time that ``file`` says; the monotonic clock goes right."""
    import datetime

    right, real = time.time, datetime.datetime

    def wrong() -> float:
        text = file.read_text()
        return float(text.removeprefix("stands ")) if text.startswith("stands ") else right() + float(text)

    class Wrong(real):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.fromtimestamp(wrong(), tz)

    time.time = wrong
    datetime.datetime = Wrong  # type: ignore[misc]
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("ensembler") and vars(module).get("datetime") is real:
            module.datetime = Wrong  # type: ignore[attr-defined]


if __name__ == "__main__":
    _serve()
