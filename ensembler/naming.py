"""Names of what users write in Python, ``package.module:attribute`` or ``file.py:attribute``, and its import by them.

What no other process could import, such as a notebook's function or a lambda, is called ``__main__:NAME``, and must be
passed from Python. Of functions that decide a training, a hash follows: ``__main__:NAME#HASH``.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from ensembler.errors import UsageError

__all__ = ["given", "import_object", "is_given", "is_importable", "name_of", "reason", "register", "remember"]

_MAIN = "__main__:"  # of a notebook, a prompt or a script: in another process, another module
_GIVEN: dict[str, Any] = {}  # what this process was given and cannot import, by its name

_LIBRARIES = {"ensembler", "torch", "torchvision", "importlib", "inspect"}


def is_given(name: str) -> bool:
    """Return whether a name is of what cannot be imported, and so must be passed from Python."""
    return name.startswith(_MAIN)


def is_importable(name: str) -> bool:
    """Return whether :func:`import_object` takes a name: ``package.module:attribute``, ``file.py:attribute``, or what
    :func:`register` made of something that only this process has."""
    if is_given(name):
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
    if is_given(name):
        raise UsageError(
            f"the {kind} {name.removeprefix(_MAIN)} was defined in a notebook or script, from which it cannot be "
            "imported: pass it from Python, or define it in a module and train again"
        )
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


def name_of(value: Callable[..., Any]) -> str:
    """Return the name of a function, class or callable object that Python code passes.

    It is ``package.module:attribute``, of the shortest package that has it, if importing that gives the very object in
    any process: ``torch.optim:AdamW``. Otherwise it is ``__main__:NAME``.
    """
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    modules = accumulate((getattr(value, "__module__", None) or "__main__").split("."), "{}.{}".format)
    for module in modules:
        if module != "__main__" and getattr(sys.modules.get(module), "__dict__", {}).get(name) is value:
            return f"{module}:{name}"
    return f"{_MAIN}{name}"


def register(function: Callable[..., Any]) -> str:
    """Return the name under which :func:`import_object` finds a function or callable object that Python code passes.

    It is that of :func:`name_of`. To what cannot be imported, a hash of what it computes with is added: another
    function of the same name is another one, and only this process finds it.
    """
    name = name_of(function)
    if is_given(name):
        name += f"#{hashlib.sha256(repr(_content(function)).encode()).hexdigest()[:12]}"
        remember(name, function)
    return name


def given(name: str) -> Any:
    """Return what this process was given under a name of :func:`register`, or ``None``: it is to be imported."""
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
