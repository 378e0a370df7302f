"""The ``ensembler`` command: collects all commands, adds ``--config`` to each, and prints errors on one line.

Neither this module nor any ``commands.py`` imports heavy packages: a command imports what it needs when it runs.
"""

from __future__ import annotations

import functools
import inspect
import io
import operator
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import OptionInfo, ParameterInfo

from ensembler import __version__, config
from ensembler.errors import EnsemblerError
from ensembler.storage.transfers import fetch_urls
from ensembler.text import print_prose, printable
from ensembler.typed import reader, sentence, shown

__all__ = ["app", "main"]

COMMANDS = ("trainers.commands", "eval.commands", "study.commands", "serve.commands", "storage.commands")


_MISTAKE: Any = typer.BadParameter.__base__  # Click's UsageError, wherever this Typer has it


class _Help:
    """A command whose ``--help`` names no type of a switch."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
        return option


class _Command(_Help, TyperCommand):
    """One command."""


class _Group(_Help, TyperGroup):
    """The commands of a group."""


class _Commands(_Group):
    """All commands; a mistake in what was typed gets one line on standard error, and the exit code 2."""

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = super().main(*args, **extra | {"standalone_mode": False})
        except _MISTAKE as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                _print_error(sentence(error))
            code = 2
        if extra.get("standalone_mode", True):
            sys.exit(code if isinstance(code, int) else 0)
        return code


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ensembles of neural networks and their uncertainty: train, evaluate and serve them.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ensembler {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


class _Terminate(KeyboardInterrupt):
    """SIGTERM, as schedulers send it; code that cleans up after Ctrl-C cleans up after it, too."""


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second SIGTERM must not interrupt the cleanup
    raise _Terminate


def _print_error(sentence: object) -> None:
    print_prose(printable(sentence), label="error: ", err=True)


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """Print ensembler's errors, Ctrl-C and SIGTERM as one line on standard error, without a traceback, and exit."""
    is_main = threading.current_thread() is threading.main_thread()  # only that one may set handlers
    before = signal.signal(signal.SIGTERM, _terminate) if is_main else None
    try:
        yield
    except EnsemblerError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        typer.echo("interrupted", err=True)
        raise typer.Exit(143 if isinstance(error, _Terminate) else 130) from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _read_config(context: typer.Context, path: Path | None) -> None:
    if path is not None:
        with _errors_on_one_line():
            context.default_map = config.read(path, context)


_Config = Annotated[
    Path | None,
    typer.Option(
        callback=_read_config,
        is_eager=True,  # before the options whose defaults it sets
        help="TOML, YAML or JSON file of options, or a run to reproduce. Options on the command line take precedence.",
    ),
]


def _wrap(command: Callable[..., None]) -> Callable[..., None]:
    """Wrap a command: adds ``--config``, fetches runs and bundles from URLs, prints errors on one line."""
    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Config)
    parameters = [_as_parsed(parameter) for parameter in [*signature.parameters.values(), option]]

    @functools.wraps(command)
    def run(config: None, **parameters: Any) -> None:
        with _errors_on_one_line():
            command(**fetch_urls(parameters))

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _as_parsed(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter whose values are read, and whose ``--help`` is written, as :mod:`ensembler.typed` does.

    It has no ``Path``: Typer before 0.29 converts what a parser returns, and a URL that becomes a path loses a slash.
    """
    kind, *infos = get_args(parameter.annotation) or (None,)
    for info in (info for info in infos if isinstance(info, ParameterInfo)):
        info.parser = info.parser or reader(kind, info.min, info.max)
        if info.metavar is None and (isinstance(info, OptionInfo) or "|" in (shown(kind) or "")):
            info.metavar = shown(kind)
    if not any(getattr(info, "parser", None) for info in infos):
        return parameter
    return parameter.replace(annotation=Annotated[_without_path(kind), *infos])


def _without_path(kind: Any) -> Any:
    if kind is Path:
        return str
    arguments = tuple(map(_without_path, get_args(kind)))
    if isinstance(kind, UnionType):
        return functools.reduce(operator.or_, arguments)
    return get_origin(kind)[arguments] if arguments else kind  # type: ignore[index]


def _wrap_all(commands: typer.Typer) -> None:
    for command in commands.registered_commands:
        if command.callback:
            command.callback, command.cls = _wrap(command.callback), _Command
    for group in commands.registered_groups:
        if group.typer_instance:
            group.cls = _Group
            _wrap_all(group.typer_instance)


for _module in COMMANDS:
    _commands = import_module(f"ensembler.{_module}").app
    _wrap_all(_commands)
    app.registered_commands += _commands.registered_commands
    app.registered_groups += _commands.registered_groups


def main() -> None:
    """Run the command line (the console script); what the terminal cannot show of a name is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
