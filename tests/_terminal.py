"""A real terminal: a command on a pseudo-terminal, and what its screen shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence
from pathlib import Path

import pyte

__all__ = ["screen"]


def screen(command: Sequence[str], columns: int, cwd: Path, lines: int = 500, **environment: str) -> list[str]:
    """Run a command on a terminal of so many columns.

    Returns:
        The lines of the screen that are not empty, without trailing blanks.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR", "TERM")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=cwd, env=own | {"TERM": "xterm-256color"} | environment
    )
    os.close(theirs)
    terminal = pyte.Screen(columns, lines)
    stream = pyte.ByteStream(terminal)
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # Linux's end of a terminal whose last process has ended
            break
        if not read:
            break
        stream.feed(read)
    os.close(ours)
    process.wait()
    return [line.rstrip() for line in terminal.display if line.strip()]
