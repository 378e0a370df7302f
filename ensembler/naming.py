"""Importing what a manifest or a user names as ``package.module:attribute`` or ``file.py:attribute``."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ensembler.errors import UsageError

__all__ = ["import_object", "is_importable", "reason"]

_LIBRARIES = {"ensembler", "torch", "torchvision", "importlib", "inspect"}


def is_importable(name: str) -> bool:
    """Return whether a name has the form ``package.module:attribute`` or ``file.py:attribute``."""
    module, colon, attribute = name.rpartition(":")
    dotted = module.endswith(".py") or all(part.isidentifier() for part in module.split("."))
    return bool(colon) and dotted and attribute.isidentifier()


def import_object(name: str, kind: str) -> Any:
    """Import ``package.module:attribute``, or ``file.py:attribute`` of a file in the current folder or below it.

    Modules in the current folder are found, too. A run that names code is as trustworthy as the module that it names.

    Args:
        name: of the module or file, and of what it holds.
        kind: what it should be, for the error message.

    Raises:
        UsageError: it cannot be imported.
    """
    given, _, attribute = name.partition(":")
    module = _module_of(given, name, kind) if given.endswith(".py") else given
    if not attribute:
        raise UsageError(f"cannot import the {kind} {name!r}: name what the module holds, {given}:NAME")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = import_module(module)
        if module != given:
            _check_file(found, Path(given), name, kind)
        return getattr(found, attribute)
    except UsageError:
        raise
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the {kind} {name!r}: {error}") from error
    except Exception as error:  # whatever the module raises as it is imported
        raise UsageError(f"cannot import the {kind} {name!r}: {reason(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _module_of(file: str, name: str, kind: str) -> str:
    """Return the dotted name of a file in the current folder or below it, as runs elsewhere can import it, too."""
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise UsageError(f"cannot import the {kind} {name!r}: there is no file {path}")
    if not path.is_relative_to(Path.cwd()):
        raise UsageError(
            f"cannot import the {kind} {name!r}: the file is not in this folder or below it: run the command in its "
            "folder, or install its package and give package.module:NAME"
        )
    parts = path.relative_to(Path.cwd()).with_suffix("").parts
    if wrong := [part for part in parts if not part.isidentifier()]:
        raise UsageError(f"cannot import the {kind} {name!r}: {wrong[0]!r} is no name of a module: rename it")
    return ".".join(parts)


def _check_file(module: ModuleType, file: Path, name: str, kind: str) -> None:
    """Refuse another module of the file's name, which was imported before or comes first."""
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != file.expanduser().resolve():
        raise UsageError(
            f"cannot import the {kind} {name!r}: another module is called {module.__name__}, {found or 'built in'}: "
            "rename the file"
        )


def reason(error: BaseException) -> str:
    """Return an error of a user's code in one line: its class, its first line, its file and line."""
    text = next(iter(str(error).strip().splitlines()), "").rstrip(" .:")
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = ""
    for frame, line in traceback.walk_tb(None if isinstance(error, SyntaxError) else error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            place = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return said + place
