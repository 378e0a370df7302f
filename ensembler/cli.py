"""The ``ensembler`` command: collects all commands, adds ``--config`` to each, and prints errors on one line.

Neither this module nor any ``commands.py`` imports heavy packages: a command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import functools
import inspect
import io
import operator
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # a terminal that was closed gives the last


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
    """All commands; a mistake in what was typed gets one line on standard error, and the exit code 2.

    So does output that cannot be written, with the exit code 1; where nobody reads it any more, as after ``| head``, a
    command ends silently with it, as Click has it.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        try:
            code = self._run(*args, **extra)
            for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed
                stream.flush()
        except OSError as error:
            code = _without_output(error)
        if extra.get("standalone_mode", True):
            sys.exit(code if isinstance(code, int) else 0)
        return code

    def _run(self, *args: Any, **extra: Any) -> Any:
        try:
            return super().main(*args, **extra | {"standalone_mode": False})
        except _MISTAKE as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                _print_error(sentence(error))
            return 2


def _without_output(error: OSError) -> int:
    """Say that output cannot be written, and return the exit code; raise again what is another error."""
    if not isinstance(error, BrokenPipeError):
        if error.errno not in _UNWRITABLE or error.filename is not None:
            raise error
        with suppress(OSError):
            _print_error(f"cannot write the output: {error.strerror}: make room, or send it to another place")
    with Path(os.devnull).open("wb") as nowhere:
        for number in (1, 2):  # the interpreter writes what they still hold at its end
            os.dup2(nowhere.fileno(), number)
    return 1


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
    """SIGTERM, as schedulers send it, or a terminal's SIGHUP; what cleans up after Ctrl-C cleans up after it, too."""


def _endings() -> list[signal.Signals]:
    """SIGTERM, and SIGHUP unless it is ignored, as nohup makes it."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    return [*([hangup] if hangup and signal.getsignal(hangup) != signal.SIG_IGN else []), signal.SIGTERM]


def _terminate(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt the cleanup
    raise _Terminate(number)


def _print_error(sentence: object) -> None:
    print_prose(printable(sentence), label="error: ", err=True)


@contextmanager
def _errors_on_one_line() -> Iterator[None]:
    """Print ensembler's errors and interruptions as one line on standard error, without a traceback, and exit."""
    is_main = threading.current_thread() is threading.main_thread()  # only that one may set handlers
    before = {number: signal.signal(number, _terminate) for number in _endings() if is_main}
    try:
        yield
    except EnsemblerError as error:
        _print_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as error:
        with suppress(OSError):  # a closed terminal
            typer.echo("interrupted", err=True)
        raise typer.Exit(128 + (error.args[0] if isinstance(error, _Terminate) else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


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
        if info.metavar is None:  # an argument is called the same in --help, in errors and in the documentation
            info.metavar = shown(kind) if isinstance(info, OptionInfo) else parameter.name.upper()
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
