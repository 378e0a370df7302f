"""Write docs/cli.md, the reference of the command line, from the commands themselves: python .ci/cli_reference.py

Names, help, types, defaults and panels are read where Typer reads them. An option that every training command has alike
stands once, above them all, as one that every command has does. A test fails where the page is not what this makes.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import typer

from ensembler.cli import COMMANDS, app
from ensembler.config import commands

__all__ = ["commands", "reference"]

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
TITLES = {
    "trainers": "Make runs",
    "eval": "Score runs",
    "study": "Compare methods",
    "serve": "Ship runs",
    "storage": "Move runs and bundles",
}


class Row(NamedTuple):
    """One argument or option of a command, as the page shows it."""

    panel: str
    name: str
    takes: str
    default: str
    help: str


def reference() -> str:
    """The page."""
    found = dict(commands(typer.main.get_command(app)))
    rows = {name: list(_rows(command)) for name, command in found.items()}
    always = _common(rows.values())
    training = _common(own for name, own in rows.items() if name.startswith("train-"))
    shared = [row for row in training if row not in always]
    lines = [
        "# The command line",
        "",
        "Made from the commands' own help by `make docs`; `ensembler COMMAND --help` says the same. A dash stands for",
        "no default: the option is not needed, or its text says what holds without it.",
        "",
    ]
    for layer in (module.rpartition(".")[0] for module in COMMANDS):
        own = [name for name, command in found.items() if _layer(command) == layer]
        lines += [f"**{TITLES[layer]}**", "", "| command | |", "|---|---|"]
        lines += [f"| [`{name}`](#{_anchor(name)}) | {_cell(found[name].help)} |" for name in own] + [""]
    lines += ["## Options of every command", "", *_tables(always)]
    lines += ["## Options of every training command", "", "What all methods share, beside each method's own below.", ""]
    lines += _tables(shared)
    for name, command in found.items():
        here = [row for row in rows[name] if row not in always and not (name.startswith("train-") and row in shared)]
        words = [_usage(row) for row in here if row.panel == "Arguments"]
        lines += [f"## {name}", "", _sentence(command.help), ""]
        lines += ["```text", " ".join(["ensembler", name, *words, "[OPTIONS]"]), "```", "", *_tables(here)]
        if name.startswith("train-"):
            lines += ["And [those of every training command](#options-of-every-training-command).", ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(command: Any) -> Iterator[Row]:
    signature = inspect.signature(command.callback)
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        kind, info = _annotation(signature.parameters[parameter.name].annotation)
        flag = kind is bool
        if isinstance(info, typer.models.ArgumentInfo):
            several = typing.get_origin(kind) is list and " " not in info.metavar
            name, panel = info.metavar + "..." * several, "Arguments"
        else:
            name = " / ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
            panel = info.rich_help_panel or "Options"
        yield Row(
            panel, name, "" if flag else _takes(kind, info), _default(parameter, info, flag), _sentence(info.help or "")
        )


def _annotation(annotation: Any) -> tuple[Any, Any]:
    """The type without ``None``, and what Typer was told of it."""
    kind, *told = typing.get_args(annotation)
    info = next(each for each in told if isinstance(each, typer.models.ParameterInfo))
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    return kind, info


def _takes(kind: Any, info: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"{_takes(typing.get_args(kind)[0], info)}, several"
    named = isinstance(info, typer.models.OptionInfo) and not (info.metavar or "<").startswith("<")
    own = info.metavar if named else None  # else it is an argument's name, or stands for the type in --help
    name = own or {int: "whole number", float: "number", Path: "path", str: "path" if info.parser else "text"}[kind]
    bounds = [f"from {info.min:g}"] if info.min is not None else []
    bounds += [f"to {info.max:g}"] if info.max is not None else []
    return " ".join([name, *bounds])


def _default(parameter: Any, info: Any, flag: bool) -> str:
    if parameter.required:
        return "required"
    if flag and not parameter.secondary_opts:
        return "off"
    if parameter.default is None:
        return f"`${info.envvar}`" if info.envvar else "–"
    if flag:
        return f"`{(parameter.opts if parameter.default else parameter.secondary_opts)[0]}`"
    return f"`{parameter.default}`"


def _usage(row: Row) -> str:
    return row.name if row.default == "required" else f"[{row.name}]"


def _common(groups: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows that all groups have, in the order of the first."""
    first, *others = groups
    return [row for row in first if all(row in other for other in others)]


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    panels: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        panels[row.panel].append(row)
    for panel, own in panels.items():
        yield from (f"| {panel} | takes | default | |", "|---|---|---|---|")
        for row in own:
            name = _code(row.name) if panel == "Arguments" else row.name
            yield f"| {name} | {_cell(row.takes)} | {row.default} | {_cell(row.help)} |"
        yield ""


def _layer(command: Any) -> str:
    return ".".join(str(command.callback.__module__).split(".")[1:-1])


def _sentence(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


def _cell(text: str) -> str:
    return _sentence(text).replace("|", "\\|").replace("<", "&lt;")


def _code(name: str) -> str:
    """A name as code; GitHub ends a cell at a bar between backticks, and Markdown shows an escape as it is."""
    return f"<code>{name.replace('|', '&#124;')}</code>" if "|" in name else f"`{name}`"


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
