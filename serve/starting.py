"""From an address to BentoML's processes, which take the place of this one."""

from __future__ import annotations

import errno
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import typer

from ensembler.errors import UsageError
from ensembler.machine import remove_temporary_folder
from ensembler.text import echo

__all__ = ["listen", "shared_folder", "start"]


def listen(host: str, port: int) -> socket.socket:
    """Listen at an address, before BentoML starts, whose workers would end with a stack trace.

    Raises:
        UsageError: not an IP address of this machine, or a port that is in use.
    """
    from ensembler.serve.http import front

    try:
        ipaddress.ip_address(host)
    except ValueError as error:
        raise UsageError(f"--host must be an IP address such as 127.0.0.1 or 0.0.0.0, not {host!r}") from error
    try:
        return front.listen(host, port)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # Python adds the address
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}: choose another {other}") from error


def start(public: socket.socket, environment: Mapping[str, str], what: str) -> None:
    """Replace this process by BentoML's, whose front takes over the open socket. It does not return.

    Args:
        public: listens.
        environment: of those processes: the service's settings.
        what: is served, for the line that says where.
    """
    host, port, *_ = public.getsockname()
    with public:
        shared = shared_folder()
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        echo(f"{what} at {address}/predictive-uncertainty; Ctrl-C stops it")
        sys.stdout.flush()
        command = [sys.executable, "-m", "bentoml", "serve", "ensembler.serve.service:PredictiveUncertainty", "--host"]
        own = {**environment, "BENTOML_HOME": shared}  # BentoML makes folders in it
        if os.name == "nt":
            public.close()
            raise typer.Exit(subprocess.call([*command, host, "--port", str(port)], env=own))  # noqa: S603  our own arguments
        # BentoML itself listens at an address that nobody asks.
        public.set_inheritable(True)
        own |= {
            "ENSEMBLER_LISTEN": str(public.fileno()),
            "ENSEMBLER_SHARED": shared,
            "TMPDIR": str(Path(shared).parent),
        }
        remove_temporary_folder()
        os.execve(sys.executable, [*command, "127.0.0.1", "--port", "0"], own)  # noqa: S606  BentoML takes signals


def shared_folder() -> str:
    """Make the folder of one server's processes, for files and for sockets, whose paths have at most 100 bytes or so.

    Raises:
        UsageError: there is no place for it.
    """
    for place_of in (None, "/tmp", "/dev/shm"):  # noqa: S108  where the root file system is read-only
        try:
            folder = Path(tempfile.mkdtemp(prefix="ensembler-serve-", dir=place_of))
        except OSError:
            continue
        try:
            (folder / "probe").write_bytes(b"x")  # a full disk makes folders, but no files
            if os.name != "nt":
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.bind(str(folder / "probe.sock"))
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return str(folder)
    raise UsageError("serving needs a folder for temporary files: set TMPDIR to a short path that can be written")
