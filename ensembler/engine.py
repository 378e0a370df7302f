"""Engines run independent jobs: in this process one after another or side by side
(:mod:`ensembler.side_by_side`), or with Ray in parallel on many machines.

A job is ``function(shared, argument, emit)``. All jobs have ``shared`` in common, which is sent to each machine once,
and each has its own argument; calls of ``emit(...)`` arrive at ``on_event(...)`` in the caller's process. Functions,
arguments and results must be picklable, and a job must depend on nothing else, so that it can run anywhere, and again.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Self, TypeVar

from ensembler.errors import EngineError, EnsemblerError, UsageError, first_line

__all__ = ["Engine", "Local", "Ray", "choose", "resources"]

Emit = Callable[..., None]
S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

_POLL = 0.5  # seconds between two polls of the jobs' events
_GRACE = 120.0  # seconds after which late events are dropped: a busy machine takes long to start the inbox
_PROBE = 2.0  # seconds between two checks that Ray is alive
_HEAD_LIMIT = 30.0  # seconds without an answer after which Ray's head counts as lost; after 60, Ray ends this process
_LOCAL_LIMIT = 5.0  # the same for Ray's process on this machine, where Ray gives up after about 15


class Engine(ABC):
    """Runs jobs. As a context manager, it stops what it started.

    Attributes:
        here: whether jobs run in this process.
    """

    here: ClassVar[bool] = True

    @abstractmethod
    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """Yield the index of each job among the arguments, and its result, as soon as it is finished.

        An :class:`~ensembler.errors.EnsemblerError` of a job is raised here, and stops the others. Closing the
        generator stops them, too.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return


@dataclass(frozen=True)
class Local(Engine):
    """Runs the jobs in this process, in order; ``emit`` is ``on_event``, and nothing is copied."""

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """Yield each job's index and result; see :class:`Engine`."""
        for place, argument in enumerate(arguments):
            yield place, function(shared, argument, on_event)


@dataclass(eq=False)
class Ray(Engine):
    """Runs the jobs as Ray tasks, each on a worker with its own CPUs and, if needed, its own GPU.

    A job whose worker is lost (killed, out of memory, machine gone) is run again on another. If Ray is already
    initialised in this process, that instance is used and not shut down.

    Args:
        address: of a cluster; by default ``RAY_ADDRESS``, or else a temporary local instance.
        device: of the jobs; see :func:`resources`.
        threads: CPU threads of one job, and the CPUs that it requests; by default this process's number of threads, or
            1 with a GPU.
        retries: how often a lost job is run again, at most.

    Raises:
        UsageError: Ray is not installed.
        EngineError: Ray does not answer, no machine has the CPUs that a job needs, or a job was lost too often.
    """

    address: str | None = None
    device: str | None = None
    threads: int | None = None
    retries: int = 3
    here: ClassVar[bool] = False
    _started: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.device is not None and self.device.startswith("cuda:"):
            raise UsageError(f"{self.device} names one GPU: with Ray, give cuda, and each job gets a GPU")

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """Yield each job's index and result; see :class:`Engine`."""
        if not arguments:
            return
        ray = self._start()
        needs = self._needs(ray)
        inbox = ray.remote(_Inbox).options(num_cpus=0, max_restarts=-1).remote()
        task = ray.remote(_work).options(**needs, max_retries=self.retries, retry_exceptions=False)
        common = ray.put((function, shared))
        places = {task.remote([common], one, inbox, needs["num_cpus"]): place for place, one in enumerate(arguments)}
        heartbeats, events = _Heartbeat.all(ray), _Events(ray, inbox, on_event)
        try:
            while places:
                with _ray_alive(ray):
                    done, _ = ray.wait(list(places), timeout=_POLL)
                    for heartbeat in heartbeats:
                        heartbeat.check()
                    events.deliver(_GRACE if done else 0.0)
                for reference in done:
                    place = places.pop(reference)
                    yield place, self._result(ray, reference, f"job {place + 1} of {len(arguments)}")
        finally:
            if all(heartbeat.answers() for heartbeat in heartbeats):
                with suppress(ray.exceptions.RayError):
                    for reference in places:
                        ray.cancel(reference, force=True)
                    ray.kill(inbox)

    def _start(self) -> ModuleType:
        try:
            import ray
        except ImportError as error:
            raise UsageError("the engine ray needs Ray: pip install 'ensembler[ray]'") from error
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            host, _, port = address.rpartition(":")
            try:
                if host and port.isdecimal() and "/" not in host:
                    # Ray itself would retry for many minutes.
                    socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE).close()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it warns about changes in later versions
                    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                raise EngineError(
                    f"cannot reach Ray at {address}: {first_line(error)}: is it running there?"
                ) from error
            self._started = True
        return ray

    def _needs(self, ray: ModuleType) -> dict[str, int]:
        import torch

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = resources(self.device, self.threads, nodes, torch.get_num_threads())
        most = max(int(node.get("CPU", 0)) for node in nodes)
        if 0 < most < needs["num_cpus"]:  # a cluster that autoscales from nothing has no CPU yet
            raise EngineError(
                f"a job needs {needs['num_cpus']} CPUs, and no machine of the cluster has more than {most}: "
                f"give --threads {most} or fewer"
            )
        return needs

    def _result(self, ray: ModuleType, reference: Any, job: str) -> Any:
        try:
            with _ray_alive(ray):
                result, error = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ImportError | ray.exceptions.RaySystemError):
                reason = str(error.cause).strip().splitlines()[-1]
                raise EngineError(
                    f"a worker cannot read what it was sent ({reason}): install the same version of ensembler, and the "
                    "module that --arch names, on every machine of the cluster"
                ) from error
            raise
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"{job} was lost {self.retries + 1} times ({type(error).__name__}): look for machines that "
                "disappeared or ran out of memory, then run the rest again"
            ) from error
        if error is not None:
            raise error
        return result

    def __enter__(self) -> Self:
        self._needs(self._start())  # raises before hours of other work
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            import ray

            self._started = False
            ray.shutdown()


def choose(
    name: Literal["local", "ray"],
    address: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    parallel: int = 1,
) -> Engine:
    """Return the engine of that name.

    Args:
        name: of the engine.
        address, device, threads: those of :class:`Ray`.
        parallel: jobs of this process at once; see :class:`ensembler.side_by_side.SideBySide`.

    Raises:
        UsageError: an address is given for the local engine, or several jobs at once for Ray.
    """
    from ensembler.side_by_side import SideBySide

    if name == "ray":
        if parallel > 1:
            raise UsageError("Ray gives each job its own GPU: leave out --parallel-members or --engine ray")
        return Ray(address, device, threads)
    if address is not None:
        raise UsageError("--address is for a Ray cluster: add --engine ray")
    return SideBySide(parallel) if parallel > 1 else Local()


def resources(
    device: str | None, threads: int | None, nodes: Sequence[Mapping[str, float]], own_threads: int
) -> dict[str, int]:
    """Compute what one job requests from Ray: CPUs, and a GPU if a machine has one and the device is not the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, ..., or ``None`` for a GPU if available.
        threads: see :class:`Ray`.
        nodes: each machine's resources, with Ray's names.
        own_threads: this process's number of threads.
    """
    gpu = (device is None or device.startswith("cuda")) and any(node.get("GPU", 0) >= 1 for node in nodes)
    return {"num_cpus": threads or (1 if gpu else own_threads), "num_gpus": int(gpu)}


@contextmanager
def _ray_alive(ray: ModuleType) -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError) as error:
        raise EngineError("Ray has stopped on this machine: start it again, then run the rest") from error


class _Inbox:
    """A Ray actor that collects the jobs' events."""

    def __init__(self) -> None:
        self._messages: list[tuple[Any, ...]] = []

    def put(self, message: tuple[Any, ...]) -> None:
        self._messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        messages, self._messages = self._messages, []
        return messages


class _Events:
    """Delivers events from the inbox. Ray restarts a lost inbox, and only events of progress are lost with it."""

    def __init__(self, ray: ModuleType, inbox: Any, on_event: Emit) -> None:
        self._ray, self._inbox, self._on_event = ray, inbox, on_event
        self._pending = inbox.take.remote()

    def deliver(self, timeout: float = 0.0) -> None:
        """Deliver the events that have arrived; with a timeout, wait for all that were emitted until now."""
        for _ in range(2 if timeout else 1):
            if not self._ray.wait([self._pending], timeout=timeout)[0]:
                return
            ready, self._pending = self._pending, self._inbox.take.remote()
            with suppress(self._ray.exceptions.RayError):
                for message in self._ray.get(ready):
                    self._on_event(*message)


def _work(common: list[Any], argument: Any, inbox: Any, threads: int) -> tuple[Any, EnsemblerError | None]:
    """Run a job as a Ray task; return its result, or its EnsemblerError, which Ray would wrap if it were raised."""
    import ray
    import torch

    torch.set_num_threads(threads)
    last: list[Any] = []

    def emit(*message: Any) -> None:
        last[:] = [inbox.put.remote(message)]

    function, shared = ray.get(common[0])
    result: Any = None
    failure: EnsemblerError | None = None
    try:
        result = function(shared, argument, emit)
    except EnsemblerError as error:
        failure = error
    if last:
        ray.wait(last, timeout=_GRACE)  # so that events arrive before the result
    return result, failure


class _Heartbeat:
    """Detects that a Ray process no longer answers, before Ray ends this process without a message."""

    def __init__(self, name: str, host: str, port: int, timeout: float) -> None:
        self._name, self._address, self._timeout = name, (host, port), timeout
        self._last_answer = time.monotonic()

    @classmethod
    def all(cls, ray: ModuleType) -> list[Self]:
        """Return the heartbeats of Ray's head and of its process on this machine."""
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        host, _, port = context.gcs_address.rpartition(":")
        return [
            cls("Ray's head", host, int(port), _HEAD_LIMIT),
            cls("Ray on this machine", own["NodeManagerAddress"], own["NodeManagerPort"], _LOCAL_LIMIT),
        ]

    def answers(self) -> bool:
        """Return whether the process accepts a connection."""
        with suppress(OSError):
            socket.create_connection(self._address, timeout=_PROBE).close()
            return True
        return False

    def check(self) -> None:
        """Raise EngineError if the process has not answered for too long."""
        silence = time.monotonic() - self._last_answer
        if silence < _PROBE:
            return
        if self.answers():
            self._last_answer = time.monotonic()
        elif silence > self._timeout:
            raise EngineError(
                f"{self._name} has not answered for {self._timeout:.0f} seconds: start it again, then run the rest"
            )
