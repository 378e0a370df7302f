"""Text from outside, such as labels, paths and other libraries' messages, made safe for terminals and logs."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.text import Text

__all__ = [
    "Printable",
    "brief",
    "cell",
    "counted",
    "echo",
    "echo_once",
    "print_prose",
    "print_rows",
    "printable",
    "some",
]


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: ``1 member``, ``2,000 images``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def some(names: Sequence[str], shown: int) -> str:
    """Return the first few of many names: ``a, b, c, ...``."""
    return ", ".join(names[:shown]) + ", ..." * (len(names) > shown)


def brief(value: object) -> str:
    """Return in a few words what a value is: numbers, text and lists of them as written, anything else by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or type(value) in (list, tuple, dict) or isinstance(value, str | bytes | int | float | PurePath):
        written = _BRIEF.repr(value)
        if written.isprintable() and len(written) <= 100:
            return written
    return f"an object of type {type(value).__name__}"


def printable(text: object) -> str:
    """Return a text in which what moves a cursor, sets a colour or ends a line is escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def echo(text: object, *, err: bool = False) -> None:
    """Print one line, :func:`printable`."""
    typer.echo(printable(text), err=err)


@cache
def echo_once(text: str) -> None:
    """Print one line on standard error, the first time that this process has it to say."""
    echo(text, err=True)


def print_prose(text: object, *, label: str = "", err: bool = False) -> None:
    """Print lines, :func:`printable`, on a terminal wrapped between words: paths stay whole, however long.

    Args:
        text: the lines.
        label: before them, in colour.
        err: whether they go to standard error.
    """
    import textwrap

    from rich.console import Console

    console = Console(stderr=err)
    lines = [printable(line) for line in f"{label}{text}".split("\n")]
    if console.is_terminal:
        lines = [textwrap.fill(each, console.width, break_long_words=False, break_on_hyphens=False) for each in lines]
    written = "\n".join(lines).removeprefix(label)
    typer.echo(typer.style(label, fg=typer.colors.RED, bold=True) * bool(label) + written, err=err)


def print_rows(rows: Sequence[tuple[str, object]]) -> None:
    """Print rows of a name and a text, :func:`printable`, in two columns.

    On a terminal, texts are wrapped between words: a path stays whole, however long. In a pipe, a row is a line.
    """
    import textwrap

    from rich.console import Console

    console, indent = Console(), max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        line = f"{name:{indent}}{printable(text)}"
        if console.is_terminal:
            below = " " * indent
            line = textwrap.fill(
                line, console.width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
            )
        typer.echo(line)


def cell(text: object) -> Text:
    """Return a cell of a table: :func:`printable`, and neither ``[bold]`` nor ``:cat:`` means anything in it."""
    from rich.text import Text

    return Text(printable(text))


class Printable(logging.Filter):
    """Makes the messages of a logger :func:`printable`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record."""
        record.msg, record.args = printable(record.getMessage()), None
        return True
