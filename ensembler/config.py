"""Options from a TOML, YAML or JSON file, or from a run's manifest.

A file's keys are options as typed, ``vertex-lr``, or parameters by name, ``vertex_lr``; arguments go by name. The top
level may hold options of any command, and each command takes its own; a table named after a command holds options of
that command only (``[data-corrupt]`` for ``ensembler data corrupt``)::

    device = "cpu"

    [train-simplex]
    vertices = 4
    arch = "resnet20"

From a run (its folder or its ``manifest.json``) all options are taken, so that the same command reproduces the run.
The folder of the images (``--data``) is not one of them.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from ensembler.data import normalisation
from ensembler.errors import UsageError
from ensembler.storage.artefact import MANIFEST

__all__ = ["commands", "read"]


def read(path: Path, context: typer.Context) -> dict[str, Any]:
    """Read a file's defaults for the options of the current command, in the form of Click's ``default_map``.

    Raises:
        UsageError: the file cannot be read, a key is unknown, a value has the wrong type, or the run was made by
            another command.
    """
    root = context.find_root()
    known = {words.replace(" ", "-"): _parameters(each) for words, each in commands(root.command)}
    command = context.command_path.removeprefix(root.command_path).strip().replace(" ", "-")
    path = path / MANIFEST if path.is_dir() else path
    content = _parse(path)
    if "kind" in content:
        chosen = {key: value for key, value in _from_run(path, content, command).items() if key in known[command]}
    else:
        chosen = _from_file(path, content, command, known)
    own = known[command]
    return {own[key].name: _value(path, key, value, own[key], context) for key, value in chosen.items()}


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command below a group, by the words that are typed, such as ``data corrupt``."""
    for name, each in group.commands.items():
        if hasattr(each, "commands"):
            yield from commands(each, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", each


def _parameters(command: Any) -> dict[str, Any]:
    """Return a command's parameters under all their names, with ``_`` for ``-``."""
    known = [parameter for parameter in command.params if parameter.name not in ("config", "help")]
    return {_plain(name): parameter for parameter in known for name in (*parameter.opts, parameter.name)}


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _parse(path: Path) -> dict[str, Any]:
    parse: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".json": json.loads}
    parse |= {".yaml": _parse_yaml, ".yml": _parse_yaml}
    if not path.exists():
        raise UsageError(f"--config: {path} does not exist: check the path")
    if path.suffix not in parse:
        raise UsageError(f"--config takes a {', '.join(parse)} file or a run's folder, not {path}")
    try:
        content = parse[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold options by name, not a {type(content).__name__}")
    return content


def _parse_yaml(text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _from_file(
    path: Path, content: Mapping[str, Any], command: str, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    def check(key: Any, known: Mapping[str, str], problem: str) -> str:
        name = _plain(str(key))
        if name not in known:
            near = " or ".join(dict.fromkeys(known[one] for one in get_close_matches(name.lower(), known)))
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted({*known.values()}))}"
            raise UsageError(f"{path}: {problem} {key!r}: {hint}")
        return name

    typed = {
        name: {key: parameter.opts[0].lstrip("-") for key, parameter in own.items()} for name, own in options.items()
    }
    everywhere = {key: name for names in typed.values() for key, name in names.items()}
    chosen, own = {}, {}
    for key, value in content.items():
        if not isinstance(value, dict):
            chosen[check(key, everywhere, "no command has an option")] = value
        elif check(key, {_plain(name): name for name in options}, "there is no command") == _plain(command):
            own = value
    chosen = {key: value for key, value in chosen.items() if key in options[command]}
    return chosen | {check(key, typed[command], f"{command} has no option"): value for key, value in own.items()}


def _from_run(path: Path, manifest: Mapping[str, Any], command: str) -> dict[str, Any]:
    try:
        record = manifest["dataset"]
        height, width, _ = record["shape"]
        options = manifest["settings"] | manifest["options"]
        options |= {"dataset": record["name"], "image_size": height if height == width else None}
        options |= {"normalisation": normalisation.text(record["mean"], record["std"])}
        if record["name"].startswith("folder:"):
            options |= {"in_memory": not record["lazy"], "corrupt": "skip" if record["skipped"] else "refuse"}
        method, own_command = manifest["method"], manifest["command"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not the manifest of a run: only a run can be reproduced") from error
    if own_command != command:
        raise UsageError(f"{path} is a run of {method}, made by {own_command or 'no command'}, not by {command}")
    return {key: value for key, value in options.items() if value is not None}


def _value(path: Path, key: str, value: Any, parameter: Any, context: typer.Context) -> Any:
    """Return the value as it would be typed on the command line, if the parameter accepts it."""
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    values = value if many and isinstance(value, list) else [value]
    try:
        if getattr(parameter, "is_flag", False):
            if not isinstance(value, bool):
                raise typer.BadParameter("it must be true or false")
            return value
        if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
            raise typer.BadParameter("it must be text or a number" + ", or a list of them" * many)
        typed = [str(one) for one in values] if many else str(value)
        parameter.process_value(context, typed)
    except typer.BadParameter as error:
        said = error.message if error.message.startswith("it ") else f"it {error.message}"
        raise UsageError(f"{path}: {key.replace('_', '-')} = {value!r}: {said}") from None
    return typed
