"""What is typed: values of options read by their types, and every mistake as one sentence in the option's own name.

Typer's wordings differ from version to version, and name types rather than what is meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from ensembler.storage.stores import is_url

__all__ = ["missing", "reader", "sentence", "shown", "wanted"]


def wanted(annotation: Any) -> str:
    """Return in words what a value of a type is, such as "a whole number" or "full or exact or confidence"."""
    kinds = _kinds(annotation)
    choices = [str(value) for kind in kinds if get_origin(kind) is Literal for value in get_args(kind)]
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    words |= {dict: "a table of numbers"}
    named = [next((words[kind] for kind in words if kind in (each, get_origin(each))), "") for each in kinds]
    return " or ".join([*dict.fromkeys(name for name in named if name), *choices])


def reader(kind: Any, least: float | None = None, most: float | None = None) -> Callable[[Any], Any] | None:
    """Return what reads one value of an option, for Typer's ``parser=``; ``None`` for a switch and for text.

    A path is one on this machine: an option that takes a URL, too, has a parser of its own.

    Args:
        kind: the option's type: int, float, Path or Literal; or a list of it, or it or ``None``.
        least, most: the range of a number.
    """
    kinds = _kinds(kind)
    if len(kinds) != 1 or (kinds[0] not in (int, float, Path) and get_origin(kinds[0]) is not Literal):
        return None
    own = kinds[0]

    def read(value: Any) -> Any:
        if not isinstance(value, str):  # a default
            return value
        if own is Path:
            if is_url(value):
                raise typer.BadParameter(f"takes a path on this machine, not a URL ({value}): copy it there afterwards")
            if not value:
                raise typer.BadParameter("takes a path, and it is empty")
            return Path(value)
        if get_origin(own) is Literal:
            found = next((choice for choice in get_args(own) if str(choice) == value), None)
        else:
            found = _number(own, value)
        if found is None:
            raise typer.BadParameter(f"must be {wanted(own)}, not {value!r}")
        if (least is not None and found < least) or (most is not None and found > most):
            raise typer.BadParameter(f"must be {_range(least, most)}, not {value}")
        return found

    return read


def shown(kind: Any) -> str | None:
    """Return what ``--help`` shows as an option's value: choices that break between words, nothing for a switch."""
    kinds = _kinds(kind)
    if bool in kinds:
        return ""
    if choices := next((get_args(each) for each in kinds if get_origin(each) is Literal), ()):
        return " | ".join(map(str, choices))
    names = {int: "int", float: "float", Path: "path"}
    own = next((names[each] for each in kinds if each in names), None)
    return None if own is None else f"<{own}>"


def sentence(error: Any) -> str:
    """Return what is wrong with what was typed: one of Click's usage errors, as one sentence."""
    context = error.ctx
    command = _typed(context)
    kind, name = type(error).__name__, _name(error)
    if kind == "MissingParameter":
        return missing(context, error.param.name, name)
    if kind == "NoSuchOption":
        near = [each for each in error.possibilities or () if each.startswith("--")]
        hint = f"did you mean {' or '.join(near)}?" if near else f"see {command} --help"
        return f"{command} has no option {error.option_name}: {hint}"
    if kind == "BadOptionUsage":
        return f"{error.option_name} takes {'no value' if 'not take' in error.message else 'a value'}"
    if "extra argument" in error.message:
        extra = error.message.rpartition("(")[2].rstrip(").")
        return f"{command} takes fewer arguments: leave out {extra}, or see {command} --help"
    message = error.message.rstrip(".").replace("No such command", "there is no command").replace(". Did", ": did")
    return f"{name} {message}" if name else message


def missing(context: Any, name: str, shown: str) -> str:
    """Return what is said of an argument that is missing; where a file gives options, it has the name of its key."""
    if context.default_map is None:
        return f"{shown} is missing: see {_typed(context)} --help"
    return f"{name.replace('_', '-')} is missing: write it in the file of --config, or see {_typed(context)} --help"


def _typed(context: Any) -> str:
    """Return a command as it is typed, also where it runs as ``python -m ensembler``."""
    if context is None:
        return "ensembler"
    return f"ensembler{context.command_path.removeprefix(context.find_root().command_path)}"


def _name(error: Any) -> str:
    """Return the option as it is typed, or the argument as ``--help`` shows it."""
    parameter = getattr(error, "param", None)
    if parameter is None:
        return getattr(error, "param_hint", None) or ""
    if parameter.param_type_name == "option":
        return str(max(parameter.opts, key=len))
    return str(parameter.metavar.split()[-1].strip("."))


def _kinds(annotation: Any) -> list[Any]:
    """Return the types of a value's choice of types, or of a list's elements, without ``None``."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType, list):
        return [each for kind in get_args(annotation) for each in _kinds(kind)]
    return [] if annotation is NoneType else [annotation]


def _number(kind: type[int] | type[float], text: str) -> float | None:
    try:
        found = kind(text)
    except ValueError:
        return None
    return found if isinstance(found, int) or math.isfinite(found) else None


def _range(least: float | None, most: float | None) -> str:
    if most is None:
        return f"at least {least:g}"
    return f"at most {most:g}" if least is None else f"{least:g} to {most:g}"
