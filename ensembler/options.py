"""Options declared once: a field of a record is an option of a command, its range, its help and its place in a run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Generic, Protocol, Self, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ensembler.errors import UsageError
from ensembler.storage.urls import place
from ensembler.text import brief
from ensembler.typed import wanted

__all__ = ["Device", "Given", "Options", "chosen", "option", "parameters", "with_parameters"]


In = TypeVar("In")
Out = TypeVar("Out")

if TYPE_CHECKING:

    class Given(Generic[In, Out]):
        """The type of a field that is given as one type and held as another: ``Given[str | Path, str]``."""

        def __get__(self, record: object, owner: Any = None) -> Out: ...
        def __set__(self, record: object, value: In) -> None: ...

else:

    class Given:
        """The type of a field that is given as one type and held as another: ``Given[str | Path, str]``."""

        def __class_getitem__(cls, kinds: tuple[Any, Any]) -> Any:
            return kinds[1]


class Device(Protocol):
    """A ``torch.device``, without its import."""

    @property
    def type(self) -> str: ...


def option(
    default: Any = ...,
    *,
    help: str,  # noqa: A002  as Typer calls it
    flag: str | None = None,
    panel: str | None = None,
    metavar: str | None = None,
    argument: bool = False,
    path: bool = False,
    computing: bool = False,
    **ranges: float,
) -> Any:
    """A field of :class:`Options`.

    Args:
        default: of the field; none makes it required.
        help: what the command's ``--help`` says.
        flag: as typed, where it is not the field's name; ``"--a/--b"`` for a switch.
        panel: of ``--help``; by default the record's.
        metavar: what ``--help`` shows as its value.
        argument: whether it is given by its place, not by a flag.
        path: whether it names a run or file, which may lie at a URL.
        computing: whether it says how something is computed, not what: such options may differ in equal runs.
        **ranges: ``ge``, ``gt``, ``le`` and ``lt``, as of :func:`pydantic.Field`.
    """
    extra: dict[str, Any] = {"flag": flag, "panel": panel, "metavar": metavar, "argument": argument, "path": path}
    extra["computing"] = computing
    return Field(default, description=help, json_schema_extra=extra, **ranges)  # type: ignore[call-overload]


class Options(BaseModel):
    """A frozen record of options, valid as soon as it exists.

    Raises:
        UsageError: a value that is out of its range, or an unknown name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        _fill(self, values, {})

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Yield the options that are not the defaults, as a call of the record would give them."""
        for name, field in type(self).model_fields.items():
            if (value := getattr(self, name)) != field.get_default(call_default_factory=True):
                yield name, value

    @classmethod
    def typed(cls, values: Mapping[str, Any]) -> Self:
        """The record of what a command was given, of which it takes its own fields; errors name the flags."""
        own = cls.__new__(cls)
        _fill(own, {name: values[name] for name in cls.model_fields if name in values}, cls.flags())
        return own

    @classmethod
    def written(cls, values: Mapping[str, Any]) -> Self:
        """The record of what a file holds, by field name: a number is not written as text, nor a switch as a number.

        Raises:
            UsageError: a value of another type, out of its range, or an unknown name; the message names the option.
        """
        own = cls.__new__(cls)
        _fill(own, values, {name: flag.lstrip("-") for name, flag in cls.flags().items()}, strict=True)
        return own

    @classmethod
    def flags(cls) -> dict[str, str]:
        """Each field's option as it is typed, or its argument as ``--help`` shows it."""
        return {
            name: (_extra(field)["metavar"] or name.upper()).rstrip(".")
            if _extra(field)["argument"]
            else _flag(name, field).partition("/")[0]
            for name, field in cls.model_fields.items()
        }

    @classmethod
    def required(cls) -> list[str]:
        """The fields without a default; a command needs them unless it resumes."""
        return [name for name, field in cls.model_fields.items() if field.is_required()]

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """The fields whose option has a mark: ``"path"`` or ``"computing"``."""
        return {name for name, field in cls.model_fields.items() if _extra(field)[mark]}


def _fill(record: Options, values: Mapping[str, Any], flags: Mapping[str, str], strict: bool = False) -> None:
    if not strict:
        values = {name: _as_field(type(record), name, value) for name, value in values.items()}
    try:
        if strict:  # as JSON, in which a path is text and a whole number also a float
            text = json.dumps(values, default=str)
            record.__pydantic_validator__.validate_json(text, strict=True, self_instance=record)
        else:
            record.__pydantic_validator__.validate_python(dict(values), self_instance=record)
    except ValidationError as error:
        raise UsageError(_explained(error.errors()[0], type(record), flags)) from None


def _as_field(record: type[Options], name: str, value: Any) -> Any:
    """A value from Python as its field holds it: a device by its name, a path as text, one of a list as a list."""
    if (field := record.model_fields.get(name)) is None:
        return value
    kinds = [field.annotation, *get_args(field.annotation)]
    if name == "device" and type(value).__name__ == "device":  # torch's, which is not imported here
        return str(value)
    if isinstance(value, str | Path) and any(get_origin(kind) is list for kind in kinds):
        value = [value]
    if not _extra(field)["path"]:
        return value
    if isinstance(value, list | tuple):
        return [str(one) if isinstance(one, Path) else one for one in value]
    return str(value) if isinstance(value, Path) else value


def parameters(options: type[Options], panel: str) -> Iterator[inspect.Parameter]:
    """The parameters that Typer makes a command's options of, one a field.

    Args:
        options: the record.
        panel: of ``--help``, for the fields that name none.
    """
    for name, field in options.model_fields.items():
        extra = _extra(field)
        common: dict[str, Any] = {"help": field.description, "metavar": extra["metavar"]}
        if extra["path"]:
            common["parser"] = place
        info = (
            typer.Argument(**common)
            if extra["argument"]
            else typer.Option(_flag(name, field), rich_help_panel=extra["panel"] or panel, **common)
        )
        annotation = Annotated[_typed(field.annotation, extra["path"]), info]  # type: ignore[valid-type]
        default = inspect.Parameter.empty if field.is_required() else field.default
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def with_parameters(command: Callable[..., None], every: Iterable[inspect.Parameter]) -> Callable[..., None]:
    """Give a command these parameters, as Typer reads them."""
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in every]
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in own}
    return command


def chosen(context: typer.Context) -> set[str]:
    """The options of a command that were typed, or given by a file: the others have their defaults."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name != "DEFAULT"}


def _extra(field: FieldInfo) -> dict[str, Any]:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"declare {field} by option()"  # noqa: S101  a mistake of ours
    return extra


def _flag(name: str, field: FieldInfo) -> str:
    return str(_extra(field)["flag"] or "--" + name.replace("_", "-"))


def _typed(annotation: Any, path: bool) -> Any:
    """A field's type as Typer reads it: paths are parsed as such, and a choice of types is text."""
    if path:
        many, optional = get_origin(annotation) is list, NoneType in get_args(annotation)
        return list[Path] if many else Path | None if optional else Path
    if get_origin(annotation) in (Union, UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
        if len(kinds) > 1:
            return str
    return annotation


def _explained(error: ErrorDetails, options: type[Options], flags: Mapping[str, str]) -> str:
    """One sentence for pydantic's first complaint."""
    name, found, context = str(error["loc"][0]), error["input"], error.get("ctx", {})
    shown = flags.get(name, name)
    if error["type"] == "extra_forbidden":
        return f"{options.__name__} has no option {shown}: it has {', '.join(options.model_fields)}"
    if error["type"] == "missing":
        return f"{shown} is required"
    bound = next((f"{context[key]:g}" for key in ("gt", "ge", "lt", "le") if key in context), "")
    extent = {
        "greater_than": "positive" if bound == "0" else f"above {bound}",
        "greater_than_equal": f"at least {bound}",
        "less_than": f"below {bound}",
        "less_than_equal": f"at most {bound}",
        "finite_number": "finite",
    }.get(error["type"])
    if extent:
        return f"{shown} must be {extent}, not {brief(found)}"
    each = "each " if any(isinstance(place, int) for place in error["loc"]) else ""
    return f"{each}{shown} must be {wanted(options.model_fields[name].annotation)}, not {brief(found)}"
