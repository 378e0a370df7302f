"""Kills at every moment that makes a difference, however busy the machine is.

What a killed process leaves depends only on which of its changes to the disk were made. So moments are counted in
these: just before a change, or in the middle of what is written after it.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
TORN = 10  # bytes of a file that are written before a kill in the middle of it


class Changes:
    """The changes that this process makes in a folder from now on.

    Args:
        folder: where they count.
        before: the one just before which ``act`` is called; the first is 1.
        act: what to do then.
    """

    def __init__(self, folder: Path, before: int = 0, act: Callable[[], object] = lambda: None) -> None:
        self.count = 0
        self._root, self._before, self._act = folder.absolute(), before, act
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (opened or event in CHANGES) and _place(event, arguments).is_relative_to(self._root):
            self.count += 1
            if self.count == self._before:
                self._act()


def _place(event: str, arguments: tuple[Any, ...]) -> Path:
    """The absolute path of what an event is about; ``rmtree`` names files by the descriptor of their folder."""
    if isinstance(arguments[0], int):  # a file that is open already
        return Path()
    descriptor = arguments[1] if event in ("os.remove", "os.rmdir") else -1
    folder = Path.cwd() if descriptor < 0 else Path(f"/proc/self/fd/{descriptor}").readlink()
    return folder / os.fsdecode(arguments[0])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_next_file() -> None:
    """Let this process be killed once it writes more than :data:`TORN` bytes to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (TORN, resource.RLIM_INFINITY))


def killed_everywhere(work: Callable[[Path], object], folder: Path) -> int:
    """Let forks of this process do some work in new folders in a folder, and kill each at another moment.

    Returns:
        How many were killed; one more for each of the two ways was not, and has finished.
    """
    kills = 0
    for way in (kill, kill_in_the_next_file):
        number, status = 0, 1
        while status:
            number += 1
            place = folder / f"{way.__name__}-{number}"
            place.mkdir(parents=True)
            if (child := os.fork()) == 0:
                Changes(place, number, way)
                try:
                    work(place)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            if status:
                assert os.WIFSIGNALED(status), "it failed before it was killed"
            kills += bool(status)
    return kills
