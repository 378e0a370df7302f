"""What this process may use of the machine: CPUs, a GPU, memory, a cache on disk. Standard library only."""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

from ensembler.errors import ArtefactError

__all__ = [
    "available_cpus",
    "gpu_count",
    "gpu_memory",
    "home",
    "in_threads",
    "kept_folder",
    "remove_temporary_folder",
    "resident_memory",
    "settle_matplotlib",
    "temporary_folder",
    "under_torchrun",
    "user_cache",
]

T = TypeVar("T")

_WAITING = 4  # threads more than CPUs: some wait for the disk
_SMALL = 2**14  # bytes of a file that Python takes longer for than the disk or a decoder
_FEW = 2  # threads for such files
_AT_ONCE = 64  # files that a thread takes at once, at most: a task of its own costs as much as a small one


def available_cpus(root: Path = Path("/")) -> int:
    """Return how many CPUs this process may keep busy, at least 1.

    The minimum of its affinity (all CPUs where the system does not tell) and of a container's CPU limits, of cgroups
    v2 (``cpu.max``) and v1 (``cpu.cfs_quota_us``), rounded down: with one thread too many, the kernel stops all of
    them for the rest of every period.

    Args:
        root: folder of ``proc/`` and ``sys/``.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([cpus, *_limits(root)])))


def in_threads(work: Callable[[int], T], files: Sequence[Path], threads: int | None = None) -> Iterator[T]:
    """Yield ``work(i)`` of each file ``i``, in order.

    Args:
        work: reads the file, and what it calls lets other threads work meanwhile.
        files: what is read; the first one's size tells whether they are small.
        threads: by default a few more than CPUs, and few for small files.
    """
    from concurrent.futures import ThreadPoolExecutor

    try:
        small = bool(files) and files[0].stat().st_size < _SMALL
    except OSError:  # work says what is wrong with it
        small = False
    threads = threads or (_FEW if small else available_cpus() + _WAITING)
    size = max(1, min(_AT_ONCE, len(files) // (4 * threads)))
    parts = [range(begin, min(begin + size, len(files))) for begin in range(0, len(files), size)]
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda part: [work(i) for i in part], parts):
            yield from found


def resident_memory() -> int | None:
    """Return the bytes of main memory that this process holds; ``None`` where unknown (all systems but Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def under_torchrun() -> bool:
    """Return whether torchrun, or a launcher that sets the same variables, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def gpu_count() -> int:
    """Return how many GPUs NVIDIA's driver finds: packages list CUDA on machines without one, too."""
    driver, count = _driver(), ctypes.c_int(0)
    return count.value if driver and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpu_memory(device_id: int = 0) -> tuple[int, int] | None:
    """Return the free and the total bytes of a GPU's memory, whoever uses it; ``None`` where unknown."""
    driver = _driver()
    device, context, none = ctypes.c_int(0), ctypes.c_void_p(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    if not driver or driver.cuDeviceGet(ctypes.byref(device), device_id):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):  # the one that all libraries share
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(none))
        return None if failed else (free.value, total.value)
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, started; ``None`` without one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return driver if driver.cuInit(0) == 0 else None
    except (OSError, AttributeError):
        return None


def user_cache() -> Path:
    """Return the folder of what can be made again: ``$XDG_CACHE_HOME/ensembler``, or ``~/.cache/ensembler``.

    Raises:
        ArtefactError: this user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ensembler"
    except RuntimeError as error:
        raise ArtefactError("this user has no home for a cache: set XDG_CACHE_HOME to a folder") from error


def home() -> Path:
    """Return this user's home; for a user without one, the name that systems give it, where nothing is."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def kept_folder(name: str, what: str) -> Path:
    """Return a folder of the user's cache, or a temporary one where that cannot be written, which one line says.

    Args:
        name: of the folder.
        what: is kept in it, for that line.
    """
    from ensembler.storage.artefact import check_writable
    from ensembler.text import echo_once

    try:
        folder = user_cache() / name
        check_writable(folder, "set XDG_CACHE_HOME to a folder that can be written to keep them")
    except ArtefactError as error:
        echo_once(f"{what} are not kept: {error}")
        return temporary_folder() / name
    return folder


@cache
def temporary_folder() -> Path:
    """Return a folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix="ensembler-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def remove_temporary_folder() -> None:
    """Remove it, if there is one: before this process becomes another program, which runs no cleanup of Python's."""
    if temporary_folder.cache_info().currsize:
        shutil.rmtree(temporary_folder(), ignore_errors=True)


def settle_matplotlib() -> None:
    """Before Matplotlib is imported, give it a temporary folder where it cannot write to its own."""
    if "MPLCONFIGDIR" in os.environ or "matplotlib" in sys.modules:
        return
    folders = [Path(os.environ.get(f"XDG_{kind}_HOME") or home() / f".{kind.lower()}") for kind in ("CONFIG", "CACHE")]
    for folder in folders:
        existing = next((each for each in (folder / "matplotlib", folder, *folder.parents) if each.exists()), folder)
        if not os.access(existing, os.W_OK | os.X_OK):
            os.environ["MPLCONFIGDIR"] = str(temporary_folder())
            return


def _limits(root: Path) -> Iterator[float]:
    """CPU limits of this process's control groups and of their parents."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        unified = not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        mount = mounts if unified else next((m for m in (mounts / controllers, mounts / "cpu") if m.is_dir()), mounts)
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not mounted: then the mount itself is the group.
        for folder in (group, *group.parents[: len(group.parts) - len(mount.parts)], mount):
            if unified:
                quota, period = [*_read(folder / "cpu.max").split(), "", ""][:2]
            else:
                quota, period = (_read(folder / name).strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
            if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):  # else "max", or -1
                yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
