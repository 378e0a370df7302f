"""Importing what a manifest or a user names as ``package.module:attribute``."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ensembler.errors import UsageError

__all__ = ["import_object"]


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
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot import the {kind} {name!r}: {error}") from error
    finally:
        sys.path.remove(here)
