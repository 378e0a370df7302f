"""What runs independent jobs: this process, one after another, or Ray, many at once on many machines.

A job is ``function(shared, argument, emit)``. All jobs have ``shared`` in common, which is sent to each machine
once, and each has an argument of its own; what it reports meanwhile, ``emit(...)``, arrives at ``on_event(...)`` in the
caller's process. Function, arguments and results are such as one process can send to another, and a job depends on
nothing else: so it does not matter where it runs, nor whether it had to be run twice.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal, Protocol, Self, TypeVar

from ensembler.errors import EngineError, EnsemblerError, UsageError

__all__ = ["Engine", "Local", "Ray", "choose", "resources"]

Emit = Callable[..., None]
S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

_POLL = 0.5  # seconds between two looks at what the jobs have emitted
_GRACE = 30.0  # seconds in which what was emitted arrives, or is given up
_PROBE = 2.0  # seconds between two looks whether Ray is alive
_HEAD_LIMIT = 30.0  # seconds of silence after which Ray's head is taken for lost: after 60, Ray would end this process
_LOCAL_LIMIT = 5.0  # likewise its part on this machine: after some 15


class Engine(Protocol):
    """Runs jobs. As a context, it ends what it started.

    Attributes:
        here: whether jobs run in this very process.
    """

    here: ClassVar[bool]

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """The jobs' places among the arguments and their results, each as soon as it is finished.

        An error that a job raises on purpose (:class:`~ensembler.errors.EnsemblerError`) is raised here, and ends
        the others; so does closing the generator.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True)
class Local:
    """Runs the jobs here, in their order; ``emit`` is ``on_event``, and nothing is copied."""

    here: ClassVar[bool] = True

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """See :class:`Engine`."""
        for place, argument in enumerate(arguments):
            yield place, function(shared, argument, on_event)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(eq=False)
class Ray:
    """Runs the jobs as tasks of Ray, each on a worker with CPUs, and if need be a GPU, of its own.

    A job whose worker is lost (killed, out of memory, its machine gone) is run again elsewhere. Where Ray has been
    initialised in this process already, that one is used, and left as it is.

    Args:
        address: of a cluster; by default ``RAY_ADDRESS``, or else a Ray of this machine's own, for as long as needed.
        device: that the jobs compute on; see :func:`resources`.
        threads: CPU threads that compute one job, and CPUs that it asks for; by default those of this process, or 1
            beside a GPU.
        retries: how often a job is run again, at most.

    Raises:
        UsageError: Ray is not installed.
        EngineError: Ray does not answer, no machine has as many CPUs as a job needs, or a job was lost too often.
    """

    address: str | None = None
    device: str | None = None
    threads: int | None = None
    retries: int = 3
    here: ClassVar[bool] = False
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.device is not None and self.device.startswith("cuda:"):
            raise UsageError(f"{self.device} is a GPU of one machine: with Ray, cuda is whichever a job is given")

    def run(
        self, function: Callable[[S, A, Emit], R], shared: S, arguments: Sequence[A], on_event: Emit
    ) -> Generator[tuple[int, R], None, None]:
        """See :class:`Engine`."""
        if not arguments:
            return
        ray = self._begin()
        needs = self._needs(ray)
        inbox = ray.remote(_Inbox).options(num_cpus=0, max_restarts=-1).remote()
        task = ray.remote(_work).options(**needs, max_retries=self.retries, retry_exceptions=False)
        held = ray.put((function, shared))
        places = {task.remote([held], one, inbox, needs["num_cpus"]): place for place, one in enumerate(arguments)}
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

    def _begin(self) -> ModuleType:
        try:
            import ray
        except ImportError as error:
            raise UsageError("the engine ray needs Ray: pip install 'ensembler[ray]'") from error
        if not ray.is_initialized():
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            host, _, port = address.rpartition(":")
            try:
                if host and port.isdecimal() and "/" not in host:
                    # Ray itself would go on trying for many minutes.
                    socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE).close()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it announces what will change in later versions
                    ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise EngineError(f"cannot reach Ray at {address}: {reason}: is it running there?") from error
            self._begun = True
        return ray

    def _needs(self, ray: ModuleType) -> dict[str, int]:
        import torch

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs = resources(self.device, self.threads, nodes, torch.get_num_threads())
        most = max(int(node.get("CPU", 0)) for node in nodes)
        if 0 < most < needs["num_cpus"]:  # with none at all, it is a cluster that has yet to grow
            raise EngineError(
                f"a job takes {needs['num_cpus']} CPUs and no machine of the cluster has more than {most}: "
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
                    f"a worker cannot read what it was sent ({reason}): install the same ensembler, and whatever "
                    "module --arch names, on every machine of the cluster"
                ) from error
            raise
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"{job} was lost {self.retries + 1} times ({type(error).__name__}): look for machines that went "
                "away or ran out of memory, then run the rest again"
            ) from error
        if error is not None:
            raise error
        return result

    def __enter__(self) -> Self:
        self._needs(self._begin())  # said before hours of other work
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun:
            import ray

            self._begun = False
            ray.shutdown()


def choose(
    name: Literal["local", "ray"], address: str | None = None, device: str | None = None, threads: int | None = None
) -> Engine:
    """The engine of that name; the rest as of :class:`Ray`.

    Raises:
        UsageError: an address of the local one.
    """
    if name == "ray":
        return Ray(address, device, threads)
    if address is not None:
        raise UsageError("--address is of a Ray cluster: add --engine ray")
    return Local()


def resources(
    device: str | None, threads: int | None, nodes: Sequence[Mapping[str, float]], own_threads: int
) -> dict[str, int]:
    """What one job asks Ray for: CPUs, and a GPU where a machine has any, unless it is to compute on the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"``, ..., or ``None`` for a GPU where there is one.
        threads: as of :class:`Ray`.
        nodes: what each machine has, by Ray's names.
        own_threads: of this process.
    """
    gpu = (device is None or device.startswith("cuda")) and any(node.get("GPU", 0) >= 1 for node in nodes)
    return {"num_cpus": threads or (1 if gpu else own_threads), "num_gpus": int(gpu)}


@contextmanager
def _ray_alive(ray: ModuleType) -> Iterator[None]:
    try:
        yield
    except (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError) as error:
        raise EngineError("Ray has died on this machine: start it again, then run the rest") from error


class _Inbox:
    """An actor: where jobs leave what they emit."""

    def __init__(self) -> None:
        self._messages: list[tuple[Any, ...]] = []

    def put(self, message: tuple[Any, ...]) -> None:
        self._messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        messages, self._messages = self._messages, []
        return messages


class _Events:
    """Fetches what lies in the inbox. A lost one is set up anew by Ray, and only progress is lost with it."""

    def __init__(self, ray: ModuleType, inbox: Any, on_event: Emit) -> None:
        self._ray, self._inbox, self._on_event = ray, inbox, on_event
        self._coming = inbox.take.remote()

    def deliver(self, patience: float = 0.0) -> None:
        """Deliver what has come; with patience, what was emitted until now."""
        for _ in range(2 if patience else 1):
            if not self._ray.wait([self._coming], timeout=patience)[0]:
                return
            coming, self._coming = self._coming, self._inbox.take.remote()
            with suppress(self._ray.exceptions.RayError):
                for message in self._ray.get(coming):
                    self._on_event(*message)


def _work(held: list[Any], argument: Any, inbox: Any, threads: int) -> tuple[Any, EnsemblerError | None]:
    """A task: the job's result, or the error that it raised on purpose, which Ray would wrap in one of its own."""
    import ray
    import torch

    torch.set_num_threads(threads)
    last: list[Any] = []

    def emit(*message: Any) -> None:
        last[:] = [inbox.put.remote(message)]

    function, shared = ray.get(held[0])
    result: Any = None
    refusal: EnsemblerError | None = None
    try:
        result = function(shared, argument, emit)
    except EnsemblerError as error:
        refusal = error
    if last:
        ray.wait(last, timeout=_GRACE)  # so that all of it is delivered before the result is
    return result, refusal


class _Heartbeat:
    """Knows when a process of Ray's no longer answers, before Ray ends this one without another word."""

    def __init__(self, name: str, host: str, port: int, patience: float) -> None:
        self._name, self._place, self._patience = name, (host, port), patience
        self._on_eventd = time.monotonic()

    @classmethod
    def all(cls, ray: ModuleType) -> list[Self]:
        """The head's, and that of what runs the tasks of this machine."""
        context = ray.get_runtime_context()
        own = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        host, _, port = context.gcs_address.rpartition(":")
        return [
            cls("Ray's head", host, int(port), _HEAD_LIMIT),
            cls("Ray on this machine", own["NodeManagerAddress"], own["NodeManagerPort"], _LOCAL_LIMIT),
        ]

    def answers(self) -> bool:
        with suppress(OSError):
            socket.create_connection(self._place, timeout=_PROBE).close()
            return True
        return False

    def check(self) -> None:
        silent = time.monotonic() - self._on_eventd
        if silent < _PROBE:
            return
        if self.answers():
            self._on_eventd = time.monotonic()
        elif silent > self._patience:
            raise EngineError(
                f"{self._name} has not answered for {self._patience:.0f} seconds: start it again, then run the rest"
            )
