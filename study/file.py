"""What a study compares: its options, declared once for the command line and for a TOML file, and its methods.

A file's keys are the command's options without their dashes; ``[methods.NAME]`` holds a method's own options and what
it changes of the shared ones, and ``[[published]]`` the figures of a paper::

    dataset = "cifar10"
    arch = "vgg16"
    budget = 200
    budgets = [1, 2, 3]

    [methods.snapshots]
    members = 5

    [methods.fge-short]
    method = "fge"
    cycle = 1
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_origin

from ensembler.errors import UsageError
from ensembler.options import Options, option
from ensembler.study.options import StudyOptions
from ensembler.trainers.budget import one_network
from ensembler.trainers.launch import Data
from ensembler.trainers.method import Method, methods
from ensembler.trainers.recipes import published
from ensembler.trainers.settings import Settings

__all__ = ["DECIDED", "Entry", "Grid", "Published", "Study", "known_methods", "read", "study_of"]

DECIDED = {"init", "weights", "epochs"}  # settings that the plan decides
_SHARED = DECIDED | {"architecture", "seed"} | Settings.marked("computing")  # settings that all methods have in common


_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


class Grid(Options):
    """Which methods are compared, at which budgets, with how many seeds, on which test sets."""

    budget: float | None = option(
        None, gt=0, metavar="EPOCHS", help="B, epochs of one network. (default: the recipe's, or 20)"
    )
    budgets: str = option("1,2,3", metavar="N,N,...", help="Budgets, in multiples of B.")
    seeds: int = option(3, ge=1, le=1000, help="N, independent repetitions: seeds --seed, --seed + 1, ...")
    methods: str | None = option(
        None, metavar="NAME,NAME,...", help="Methods. (default: those of FILE, or all that fit a budget)"
    )
    recipe: Literal["paper"] | None = option(
        None, help="Other defaults: each method's options as published for the network and dataset."
    )
    shift: list[str] | None = option(None, help="Shifted test images, as of ensembler eval. Repeatable.")
    ood: list[str] | None = option(None, help="Out-of-distribution images, as of ensembler eval. Repeatable.")
    examples: int | None = option(None, ge=1, help="Number of test images. (default: all)")
    views: int | None = option(
        None, ge=1, help="N: also predict N seeded variations of each test image (test-time augmentation)."
    )

    @cached_property
    def multiples(self) -> list[float]:
        """The budgets, ascending.

        Raises:
            UsageError: one is no positive number, or given twice.
        """
        try:
            found = [float(text) for text in self.budgets.split(",")]
        except ValueError:
            found = []
        if not found or not all(0 < each < 1e6 for each in found):
            raise UsageError(f"budgets must be positive numbers such as 1,2,3, not {self.budgets!r}")
        if len(set(found)) < len(found):
            raise UsageError(f"budgets are each given once, not as in {self.budgets!r}")
        return sorted(found)


class Published(Options):
    """Published figures, to be shown beside ours where the network and the dataset are the same."""

    source: str = option(help="The paper, and its table.")
    dataset: str = option(help="As --dataset.")
    architecture: str = option(flag="arch", help="As --arch.")
    score: Literal["error", "nll", "calibrated_nll", "ece"] = option(help="Error and ECE are in percent.")
    values: dict[str, dict[float, float]] = option(help="A figure of each method, by the budget.")


@dataclass(frozen=True)
class Entry:
    """A method of a study.

    Attributes:
        label: in tables.
        method: with its options; those that name runs are empty.
        settings: what it changes of the shared settings, by field name.
    """

    label: str
    method: Method
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """A study, before the data are loaded.

    Attributes:
        grid, data: their options.
        settings: what all methods share; ``epochs`` is B's.
        entries: the methods.
        published: figures of papers for this dataset and network.
    """

    grid: Grid
    data: Data
    settings: Settings
    entries: list[Entry]
    published: list[Published]

    @property
    def seeds(self) -> range:
        """The seed of each repetition."""
        return range(self.settings.seed, self.settings.seed + self.grid.seeds)


def known_methods() -> dict[str, tuple[type[Method], Mapping[str, Any]]]:
    """Every method of the package by its name, with the options that make that name."""
    return {
        kind(**_unplaced(kind) | dict(options)).name: (kind, options) for kind in methods() for options in kind.compared
    }


def read(path: Path) -> dict[str, Any]:
    """The content of a study's file, its keys as field names.

    Raises:
        UsageError: the file cannot be read, or is not TOML; the message names it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def study_of(content: Mapping[str, Any], typed: Mapping[str, Any], name: str = "the study") -> Study:
    """A study from a file's content and what was typed, which takes precedence.

    Args:
        content: of the file; empty without one.
        typed: options by field name, as of :meth:`ensembler.options.Options.typed`.
        name: of the file, for messages.

    Raises:
        UsageError: an unknown key, or a value of another type or out of its range; the message says where.
    """
    tables = {key: value for key, value in content.items() if key == "published" or isinstance(value, dict)}
    if unknown := tables.keys() - {"methods", "published"}:
        raise UsageError(f"{name}: there is no table [{min(unknown)}]: there are [methods.NAME] and [[published]]")
    values = {key: value for key, value in content.items() if key not in tables}
    fields = _fields(name, values, [Grid, Data, Settings], DECIDED)
    for key in ("budgets", "methods"):
        if isinstance(fields.get(key), list):
            fields[key] = ",".join(map(str, fields[key]))
    fields |= {key: [fields[key]] for key in ("shift", "ood") if isinstance(fields.get(key), str)}
    if isinstance(fields.get("budgets"), int | float):
        fields["budgets"] = str(fields["budgets"])
    grid, data, settings = (
        _record(name, kind, {key: value for key, value in fields.items() if key in kind.model_fields}, typed)
        for kind in (Grid, Data, Settings)
    )
    try:
        grid.multiples  # noqa: B018  refused before anything is loaded
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    chosen = fields.keys() | typed.keys()
    dataset, architecture = data.name, settings.architecture
    if grid.recipe:
        base = published(type(one_network()), architecture, dataset)
        if not base:
            raise UsageError(
                f"{name}: no recipe was published for {architecture} on {dataset}: give the options instead of recipe"
            )
        settings = settings.model_copy(
            update={key: value for key, value in base.items() if key in Settings.model_fields and key not in chosen}
        )
    settings = settings.model_copy(update={"epochs": float(grid.budget or settings.epochs)})
    return Study(
        grid,
        data,
        settings,
        list(_entries(name, tables.get("methods", {}), grid, settings, dataset)),
        _figures(
            name, tables.get("published", []), {*tables.get("methods", {}), *known_methods()}, dataset, architecture
        ),
    )


def _record(name: str, kind: type[Options], written: Mapping[str, Any], typed: Mapping[str, Any]) -> Any:
    """One record of what a file and the command line say."""
    try:
        found = kind.written(written)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    return kind.typed(dict(found) | {key: value for key, value in typed.items() if key in kind.model_fields})


def _fields(place: str, values: Mapping[str, Any], kinds: list[type[Options]], without: set[str]) -> dict[str, Any]:
    """A table's keys as field names.

    Raises:
        UsageError: no record has a field of that name.
    """
    known = {
        key: field
        for kind in kinds
        for field, flag in kind.flags().items()
        if field not in without
        for key in (field.replace("_", "-"), flag.lstrip("-"))
    }
    found: dict[str, Any] = {}
    for key, value in values.items():
        plain = key.replace("_", "-")
        if plain not in known:
            if plain in {name.replace("_", "-") for name in without}:
                raise UsageError(f"{place}: {key} is not an option of a study: the plan decides it")
            if plain in {flag.lstrip("-") for flag in StudyOptions.flags().values()}:
                raise UsageError(f"{place}: {key} says how a study is run, not what it is: type --{plain}")
            near = " or ".join(get_close_matches(plain.lower(), known))
            hint = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known))}"
            raise UsageError(f"{place}: there is no option {key!r}: {hint}")
        if known[plain] in found:
            raise UsageError(f"{place}: {key} is given twice: keep one of the two")
        found[known[plain]] = value
    return found


def _entries(name: str, tables: Mapping[str, Any], grid: Grid, settings: Settings, dataset: str) -> Iterator[Entry]:
    """The methods of a study: those that were asked for, of the file, or all."""
    known = known_methods()
    ruled = [label for label, (kind, _) in known.items() if kind.at_budget is not Method.at_budget]
    asked = list(tables) or ruled if grid.methods is None else [label.strip() for label in grid.methods.split(",")]
    if len(set(asked)) < len(asked):
        raise UsageError(f"{name}: methods are each named once, not as in {grid.methods!r}")
    for label in asked:
        place = f"{name}, methods.{label}"
        if not _LABEL.fullmatch(label):  # it is part of a folder's name
            raise UsageError(f"{name}: a method's name has letters, digits, - and _, 40 at most, not {label!r}")
        table = tables.get(label, {})
        if not isinstance(table, dict):
            raise UsageError(f"{place} must hold options, not {table!r}: write [methods.{label}]")
        table = dict(table)
        kind_name = table.pop("method", label)
        if not isinstance(kind_name, str) or kind_name not in known:
            raise UsageError(f"{place}: there is no method {kind_name!r}: there are {', '.join(known)}")
        yield _entry(place, label, table, known[kind_name], settings, dataset if grid.recipe else None)


def _entry(
    place: str,
    label: str,
    table: Mapping[str, Any],
    method: tuple[type[Method], Mapping[str, Any]],
    settings: Settings,
    recipe: str | None,
) -> Entry:
    kind, options = method
    paths = kind.marked("path")
    given = _fields(place, table, [kind, Settings], _SHARED | paths | kind.by_budget)
    base = published(kind, settings.architecture, recipe) if recipe else {}
    own = dict(base) | dict(options) | given
    try:
        made = kind.written(_unplaced(kind) | {key: value for key, value in own.items() if key in kind.model_fields})
        changed = {key: value for key, value in own.items() if key in Settings.model_fields and key not in _SHARED}
        Settings.written(changed)
    except UsageError as error:
        raise UsageError(f"{place}: {error}") from error
    if label in known_methods() and made.name != label:
        raise UsageError(
            f"{place}: these options make it {made.name}: give the table another name, and method = {label!r}"
        )
    return Entry(label, made, {key: value for key, value in changed.items() if value != getattr(settings, key)})


def _unplaced(kind: type[Method]) -> dict[str, Any]:
    """Empty values of the options that name runs, which are known only when those runs are trained."""
    return {name: [] if get_origin(kind.model_fields[name].annotation) is list else "" for name in kind.marked("path")}


def _figures(name: str, tables: Any, labels: set[str], dataset: str, architecture: str) -> list[Published]:
    """The published figures for a dataset and a network."""
    if not isinstance(tables, list):
        raise UsageError(f"{name}: published must be a list of tables: write [[published]]")
    found = []
    for number, table in enumerate(tables, start=1):
        place = f"{name}, published {number}"
        if not isinstance(table, dict):
            raise UsageError(f"{place} must be a table: write [[published]]")
        try:
            found.append(Published.written(_fields(place, table, [Published], set())))
        except UsageError as error:
            raise error if str(error).startswith(place) else UsageError(f"{place}: {error}") from error
        for label, figures in found[-1].values.items():
            if len(figures) < len(table["values"][label]) or not all(budget > 0 for budget in figures):
                said = f"values of {label} must be at budgets, each given once, not {table['values'][label]}"
                raise UsageError(f"{place}: {said}")
        if unknown := found[-1].values.keys() - labels:
            raise UsageError(f"{place}: no method is called {min(unknown)!r}: there are {', '.join(sorted(labels))}")
    return [one for one in found if (one.dataset, one.architecture) == (dataset, architecture)]
