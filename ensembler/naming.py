"""Importing what a manifest or a user names as ``package.module:attribute`` or ``file.py:attribute``."""

from __future__ import annotations

import hashlib
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ensembler.errors import UsageError

__all__ = ["given", "import_object", "is_importable", "name_of", "reason", "remember"]

_BY_PYTHON = " given by Python, "
_GIVEN: dict[str, Any] = {}  # what this process was given and cannot import, by its name

_LIBRARIES = {"ensembler", "torch", "torchvision", "importlib", "inspect"}


def is_importable(name: str) -> bool:
    """Return whether :func:`import_object` takes a name: ``package.module:attribute``, ``file.py:attribute``, or what
    :func:`name_of` made of something that only this process has."""
    if _BY_PYTHON in name:
        return True
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
    if name in _GIVEN:
        return _GIVEN[name]
    if _BY_PYTHON in name:
        raise UsageError(f"the {kind} {name!r} is none of this process: name one that can be imported, module:name")
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


def name_of(function: Callable[..., Any]) -> str:
    """Return the name under which :func:`import_object` finds a function or callable object that Python code passes.

    It is ``package.module:attribute`` if importing gives that very object in any process. Otherwise it is the object's
    class or name and a hash of what it computes with, and only this process finds it.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module and module != "__main__" and name and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    digest = hashlib.sha256(repr(_content(function)).encode()).hexdigest()
    found = f"{(name or type(function).__qualname__).rpartition('.')[2]}{_BY_PYTHON}{digest[:12]}"
    _GIVEN[found] = function
    return found


def given(name: str) -> Any:
    """Return what this process was given under a name of :func:`name_of`, or ``None``: it is to be imported."""
    return _GIVEN.get(name)


def remember(name: str, function: Any) -> None:
    """Let this process find what another one was given."""
    _GIVEN[name] = function


def _content(value: Any) -> Any:
    """Return what an object computes with: its code and what it holds, or its identity where that cannot be seen."""
    if isinstance(value, CodeType):
        parts: Sequence[Any] = (value.co_code, value.co_names, value.co_consts)
    elif isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        defaults = value.__defaults__, [*(value.__kwdefaults__ or {}).items()]
        parts = (value.__module__, value.__code__, *defaults, *cells)
    elif isinstance(value, MethodType):
        parts = (value.__func__, value.__self__)
    elif isinstance(value, partial):
        parts = (value.func, value.args, [*value.keywords.items()])
    elif isinstance(value, tuple | list):
        parts = value
    else:
        try:
            return pickle.dumps(value)
        except Exception:  # whatever an object that cannot be pickled raises
            return id(value)
    return [_content(part) for part in parts]


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
