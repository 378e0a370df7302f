"""Things that a manifest names: ``package.module:attribute``, imported."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ensembler.errors import UsageError

__all__ = ["imported"]


def imported(name: str, kind: str) -> Any:
    """What ``package.module:attribute`` names; modules of the current folder are found, too.

    A run that names code is as trustworthy as the module that it names.

    Args:
        name: as a user or a manifest gives it.
        kind: what it should be, for the message.

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
