"""What code of a user's own computes, as a hash of its source: a run is not that of code that has changed since."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ensembler.naming import import_object, is_given, is_importable

__all__ = ["hash_sources"]

_LIBRARIES = {"timm", "torch", "torchvision"}  # whose version a run records
_LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def hash_sources(options: Mapping[str, Any]) -> list[str]:
    """Hash the source of what options name as ``package.module:attribute``; other values are passed over.

    With it counts what it uses of its own package: functions, classes and constants. Comments and layout do not count.

    Raises:
        UsageError: a name that cannot be imported.
    """
    return [
        _hash(import_object(name, option.replace("_", " ")))
        for option, name in options.items()
        if isinstance(name, str) and is_importable(name) and not is_given(name)
        if name.split(":")[0].split(".")[0] not in _LIBRARIES
    ]


def _hash(value: Any) -> str:
    found: dict[str, str] = {}
    waiting = [value if isinstance(value, FunctionType | type) else type(value)]
    while waiting:
        each = waiting.pop()
        name = f"{each.__module__}.{each.__qualname__}"
        if name not in found and (module := sys.modules.get(each.__module__)):
            found[name] = _tokens(_source(each))
            for place, used in _used(each, module):
                if isinstance(used_value := vars(place)[used], FunctionType | type):
                    waiting.append(used_value)
                else:
                    found[f"{place.__name__}.{used}"] = _assigned(place, used)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _source(value: Any) -> str:
    """Its source; empty where there is none, as of a prompt."""
    try:
        return inspect.cleandoc(f"\n{inspect.getsource(value)}")
    except (OSError, TypeError):
        return ""


def _tokens(source: str) -> str:
    """Source without comments and layout."""
    try:
        tokens = [*tokenize.generate_tokens(io.StringIO(source).readline)]
    except (SyntaxError, tokenize.TokenError):
        return source
    return " ".join(token.string for token in tokens if token.type not in _LAYOUT)


def _assigned(module: ModuleType, name: str) -> str:
    """What a module assigns to a constant: its value may change as the code runs."""
    source = _source(module)
    found = [
        ast.get_source_segment(source, each) or ""
        for each in ast.parse(source).body
        if isinstance(each, ast.Assign | ast.AnnAssign)
        for target in (each.targets if isinstance(each, ast.Assign) else [each.target])
        if isinstance(target, ast.Name) and target.id == name
    ]
    return _tokens("\n".join(found))


def _used(value: Any, module: ModuleType) -> Iterator[tuple[ModuleType, str]]:
    """What a function or class uses of its own package, by module and name."""
    package = module.__name__.split(".")[0]
    names = {name for code in _codes(value) for name in code.co_names}
    names |= {base.__name__ for base in getattr(value, "__bases__", ())}
    places = [module, *(one for name in names if isinstance(one := vars(module).get(name), ModuleType))]
    for place in (each for each in places if each.__name__.split(".")[0] == package):
        for name in sorted(names & vars(place).keys()):
            each = vars(place)[name]
            if not isinstance(each, ModuleType) and getattr(each, "__module__", package).split(".")[0] == package:
                yield place, name


def _codes(value: Any) -> Iterator[CodeType]:
    """The code of a function, of a class's methods, and of what is defined in them."""
    if isinstance(value, type):
        for each in vars(value).values():
            method = getattr(each, "fget", None) or getattr(each, "__func__", each)
            if isinstance(method, FunctionType):
                yield from _codes(method.__code__)
        return
    code = value if isinstance(value, CodeType) else value.__code__
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
