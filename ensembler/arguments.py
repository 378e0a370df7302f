"""Arguments of public functions, checked by their annotations: every mistake is one sentence, before any work."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

from numpy.typing import ArrayLike

from ensembler.errors import UsageError
from ensembler.text import brief
from ensembler.typed import wanted

__all__ = ["checked"]

F = TypeVar("F", bound=Callable[..., Any])

_ARRAY = get_args(ArrayLike)
_NUMBERS: Mapping[Any, type] = {int: Integral, float: Real}


def checked(function: F) -> F:
    """Have a function refuse arguments of other types than its annotations name; NumPy's numbers are numbers.

    What an annotation names for type checkers alone is not checked.

    Raises:
        UsageError: by the function, of an argument of another type.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        own = _signature(function)
        try:
            given = own.bind(*args, **kwargs).arguments
        except TypeError:  # which the function raises in its own name
            given = {}
        for name, value in given.items():
            parameter = own.parameters[name]
            if parameter.kind is parameter.VAR_KEYWORD or _is(value, kind := parameter.annotation):
                continue
            raise UsageError(f"{name} must be {_words(kind)}, not {brief(value)}")
        return function(*args, **kwargs)

    return cast(F, call)


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function, eval_str=True, locals=_Names(getattr(function, "__globals__", {})))


class _Names(dict[str, Any]):
    """The names of a module, where those that it has for type checkers alone may be anything."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, Any)


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type, as an annotation names it."""
    own = get_origin(kind) or kind
    if own in (Union, UnionType):
        return any(_is(value, each) for each in get_args(kind))
    if own is Literal:
        return value in get_args(kind)
    if own is bool:
        return type(value).__name__ in ("bool", "bool_")  # Python's or NumPy's
    if own in (int, float, Sequence) and isinstance(value, bool | str | bytes):
        return False
    try:
        anything = own in (Any, inspect.Parameter.empty)
        return anything or (isinstance(value, _NUMBERS.get(own, own)) and _holds(value, kind))
    except TypeError:  # a protocol or a type variable, of which nothing can be told
        return True


def _holds(value: Any, kind: Any) -> bool:
    """Return whether each of a list's or a mapping's values is what it must be; arrays are not looked at."""
    own, each = get_origin(kind), get_args(kind)[-1:]
    if own not in (Sequence, Mapping) or _ARRAY[0] in get_args(each[0]):
        return True
    return all(_is(part, each[0]) for part in (value.values() if own is Mapping else value))


def _words(kind: Any) -> str:
    """Return in words what a value of a type is: "text or a path", "a list of text"."""
    own = get_origin(kind) or kind
    if own in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        if _ARRAY[0] in kinds:
            return " or ".join(["an array", *(_words(each) for each in kinds if each not in _ARRAY)])
        return " or ".join(dict.fromkeys(map(_words, kinds)))
    if own is Sequence:
        return f"a list of {_words(get_args(kind)[0])}"
    if own is Mapping:
        return f"a mapping of {' to '.join(map(_words, get_args(kind)))}"
    if own is Callable:
        return "a function"
    name = getattr(own, "__name__", str(own))
    return wanted(kind) or f"{'an' if name[0] in 'AEIOUaeio' else 'a'} {name}"
