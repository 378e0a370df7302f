"""``ensembler export`` and ``ensembler serve``."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ensembler.errors import UsageError

__all__ = ["app"]

app = typer.Typer()


@app.command()
def export(
    run: Annotated[Path | None, typer.Argument(help="The run's folder; by default the newest in runs/.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The bundle's folder; by default bundles/ and the run's name.")
    ] = None,
) -> None:
    """Export a run's members to ONNX, each compared with PyTorch."""
    from rich.console import Console
    from rich.table import Table

    from ensembler.run import latest
    from ensembler.serve.export import TOLERANCE, export_run
    from ensembler.serve.schemas import read_bundle

    run = (run or latest(Path("runs"))).resolve()
    out = out or Path("bundles") / run.name
    started = time.perf_counter()
    export_run(run, out)
    seconds = time.perf_counter() - started
    bundle = read_bundle(out)
    megabytes = sum((out / graph).stat().st_size for graph in bundle.graphs) / 1e6
    table = Table(show_header=False, box=None)
    table.add_row("bundle", str(out))
    table.add_row("members", f"{bundle.members} x {bundle.architecture} ({bundle.method}, {bundle.dataset})")
    table.add_row("size", f"{megabytes:.1f} MB, ONNX opset {bundle.opset}")
    table.add_row(
        "agreement", f"within {bundle.max_difference:.1e} of PyTorch's probabilities ({TOLERANCE:.0e} allowed)"
    )
    table.add_row("time", f"{seconds:.1f} s")
    table.add_row("next", f"ensembler serve {out}")
    Console().print(table)


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="The bundle's folder.")],
    host: Annotated[str, typer.Option(help="The IP address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 3000,
    workers: Annotated[int, typer.Option(min=1, help="Processes; they share the cores.")] = 1,
) -> None:
    """Serve a bundle over HTTP with BentoML, until Ctrl-C."""
    from ensembler.serve.schemas import read_bundle

    manifest = read_bundle(bundle)
    host = "127.0.0.1" if host == "localhost" else host
    _check_free(host, port)
    environment = os.environ | {
        "BENTOML_DO_NOT_TRACK": "True",
        "ENSEMBLER_BUNDLE": str(bundle.resolve()),
        "ENSEMBLER_WORKERS": str(workers),
    }
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    typer.echo(f"{manifest.members} members of {bundle} at {address}/predictive-uncertainty; Ctrl-C stops it")
    target = "ensembler.serve.service:PredictiveUncertainty"
    command = [sys.executable, "-m", "bentoml", "serve", target, "--host", host, "--port", str(port)]
    if os.name == "nt":
        raise typer.Exit(subprocess.call(command, env=environment))  # noqa: S603  our own arguments
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606  BentoML itself takes Ctrl-C and SIGTERM


def _check_free(host: str, port: int) -> None:
    """Say it before BentoML starts, whose workers would die with a stack trace.

    Raises:
        UsageError: not an IP address, or not one of this machine's, or the port is taken.
    """
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise UsageError(f"--host must be an IP address such as 127.0.0.1 or 0.0.0.0, not {host!r}") from error
    with socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}, port {port}: {error.strerror}: choose another --port"
            ) from error
