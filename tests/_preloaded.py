"""A Python that has everything imported, and is forked for each command of a page.

Importing torch and its friends takes longer than most commands of the pages do. :func:`start` begins the process that
has imported them, and puts ``ensembler`` and ``python`` into a folder for ``PATH``: each hands its arguments, folder,
environment and open files to that process, whose fork does the work as a fresh interpreter would.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

LATE = (  # what is imported by the first run, evaluation or export: half of what these take, if each does it again
    "netcal.metrics",
    "networkx",
    "sklearn.model_selection",
    "torch._dynamo",
    "torch._export.non_strict_utils",
    "torch._functorch.aot_autograd",
)
IMPORTS = (  # not ensembler.cli: a page's own command is added before that is imported
    "ensembler.eval.calibrate",
    "ensembler.eval.comparison",
    "ensembler.eval.shift.writer",
    "ensembler.eval.evaluation",
    "ensembler.eval.report.figures",
    "ensembler.eval.report.page",
    "ensembler.eval.surface",
    "ensembler.serve.client",
    "ensembler.serve.export.bundle",
    "ensembler.serve.runtime.verify",
    "ensembler.trainers.progress",
    "ensembler.trainers.training",
    "onnxscript",
    "pytest",
    "rich.console",
    "sklearn.datasets",
    "torchvision.models",
    *LATE,
)

_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    message = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(message)
    sys.exit(int(server.recv(8) or b"1"))
"""

_SERVE = """#!/bin/sh
# As the user starts it, but in the background, and ready when this returns.
if [ "$1" != serve ]; then exec {folder}/forked-ensembler "$@"; fi
{python} -m ensembler.cli "$@" --port "$DOCS_PORT" >service.log 2>&1 &
for _ in $(seq 3000); do
  if curl -sf "http://127.0.0.1:$DOCS_PORT/readyz" >/dev/null; then head -n 1 service.log; exit; fi
  kill -0 $! 2>/dev/null || break
  sleep 0.2
done
cat service.log
exit 1
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    """Start the process; ``folder`` gets the commands, and goes to the front of ``PATH``."""
    address = str(folder / "socket")
    client = _CLIENT.format(python=sys.executable, address=address)
    for name, text in {
        "forked-ensembler": client,
        "python": client,
        "ensembler": _SERVE.format(python=sys.executable, folder=folder),
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_WAIT_POLICY": "passive"}  # others want the CPUs, too
    command = [sys.executable, "-m", "tests._preloaded", address]
    server = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return server


def fewer_images() -> None:
    """Train the pages' networks on a third of the digits, and draw 100 images of noise: the numbers shown are any."""
    from ensembler.data import datasets
    from ensembler.eval.shift import ood

    whole, ood._EXAMPLES = datasets.digits, 100

    def third() -> tuple[Any, ...]:
        *about, train, test = whole()
        return *about, train.part(slice(None, None, 3)), test

    datasets.digits = third


def main(address: str) -> None:
    for name in IMPORTS:
        import_module(name)
    fewer_images()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        listener.settimeout(5)
        parent = os.getppid()
        print("ready", flush=True)
        while os.getppid() == parent:  # it ends with the tests, however these end
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                serve(connection)
            connection.close()


def serve(connection: socket.socket) -> None:
    """Do one command, in a process of its own; never returns."""
    head, files, _, _ = socket.recv_fds(connection, 8, 3)
    size = int.from_bytes(head, "big")
    message = b""
    while len(message) < size:
        message += connection.recv(size - len(message))
    arguments, folder, environment = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = run(arguments)
    connection.sendall(str(status).encode())
    os._exit(status)


def run(arguments: list[str]) -> int:
    """What the interpreter does with its arguments; the exit status."""
    called, *rest = arguments
    try:
        if not called.endswith("python"):
            sys.argv = ["ensembler", *rest]
            import_module("ensembler.cli").main()
        elif rest[0] == "-m":
            sys.argv, sys.path[0] = rest[1:], str(Path.cwd())
            runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = rest, str(Path(rest[0]).resolve().parent)
            runpy.run_path(rest[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main(sys.argv[1])
