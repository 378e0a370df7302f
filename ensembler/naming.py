"""Importing what a manifest or a user names as ``package.module:attribute``."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from ensembler.errors import UsageError

__all__ = ["import_object", "reason"]

_LIBRARIES = {"ensembler", "torch", "torchvision", "importlib", "inspect"}


def import_object(name: str, kind: str) -> Any:
    """Import ``package.module:attribute``; modules in the current folder are found, too.

    A run that names code is as trustworthy as the module that it names.

    Args:
        name: ``package.module:attribute``.
        kind: what it should be, for the error message.

    Raises:
        UsageError: it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        dotted = module.removesuffix(".py").strip("./").replace("/", ".")
        advice = f"give the {kind} as module:name, from the file's folder: {dotted}:{attribute or 'NAME'}"
        raise UsageError(f"{name!r} names a file: {advice}")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the {kind} {name!r}: {error}") from error
    except Exception as error:  # whatever the module raises as it is imported
        raise UsageError(f"cannot import the {kind} {name!r}: {reason(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def reason(error: BaseException) -> str:
    """Return an error of a user's code in one line: its class, its first line, its file and line."""
    text = next(iter(str(error).strip().splitlines()), "").rstrip(" .:")
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = ""
    for frame, line in traceback.walk_tb(None if isinstance(error, SyntaxError) else error.__traceback__):
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            place = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return said + place
