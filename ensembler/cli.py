"""The ``ensembler`` command: finds each room's commands, and turns errors into one clear line.

Nothing heavy is imported here or by the rooms' ``commands.py``: a command imports what it needs when it runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any

import typer

from ensembler import __version__
from ensembler.errors import EnsemblerError

__all__ = ["app", "main"]

ROOMS = ("trainers", "eval", "serve")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ensembles of neural networks and how sure they are: train them, score them, serve them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ensembler {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Errors raised on purpose become one line on standard error, Ctrl-C a short farewell; no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except EnsemblerError as error:
            typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("interrupted: nothing half-done was left behind", err=True)
            raise typer.Exit(130) from None

    return run


for _room in ROOMS:
    for _command in import_module(f"ensembler.{_room}.commands").app.registered_commands:
        _command.callback = _guarded(_command.callback)
        app.registered_commands.append(_command)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
