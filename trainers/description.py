"""A run in words: the rows of ``ensembler show``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ensembler.options import Options
from ensembler.run import Cost, CostEntry, DatasetRecord, Manifest
from ensembler.text import counted
from ensembler.trainers.method import methods
from ensembler.trainers.settings import Settings

__all__ = ["Row", "costs", "rows"]

_PATHS = ("path", "paths")  # metrics with a sentence each
_LONG = ("growth", "trials")  # metrics that are too long for a line


class Row(NamedTuple):
    """A line of the table; ``aside``: of little interest, such as an option's default."""

    name: str
    text: str
    aside: bool = False


def rows(manifest: Manifest) -> Iterator[Row]:
    """Yield what a manifest holds: what was made, its scores and barriers, the options that differ from defaults."""
    yield Row("method", manifest.method)
    yield Row("network", f"{manifest.architecture}, {manifest.parameters:,} parameters")
    yield Row("dataset", f"{manifest.dataset.title}, {manifest.dataset.train_examples:,} training images")
    yield Row("classes", _classes(manifest.dataset))
    yield Row("sizes", f"{counted(manifest.vertices, 'vertex', 'vertices')}, {counted(manifest.members, 'member')}")
    yield Row("cost", costs(manifest.cost))
    for name, part in manifest.cost.entries.items():
        yield Row(f"  {name}", costs(part))
    for name, value in manifest.metrics.items():
        if name not in (*_PATHS, *_LONG):
            yield from _metric(_words(name), value)
    yield from _barriers(manifest.metrics)
    yield from _options(manifest)
    yield Row("seed", str(manifest.seed))
    yield Row("created", manifest.created)
    yield Row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()), aside=True)
    yield Row("files", ", ".join(manifest.files), aside=True)


def _classes(record: DatasetRecord) -> str:
    pairs = zip(record.classes, record.class_counts, strict=True)
    return ", ".join(f"{name} ({count:,})" for name, count in pairs)


def _metric(name: str, value: Any) -> Iterator[Row]:
    """Yield a metric: records of a list in a row each, and a record's own records in a row each below it."""
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        for number, one in enumerate(value, start=1):
            rest = {key: part for key, part in one.items() if key != "name"}
            yield from _metric(str(one.get("name", f"{name} {number}")), rest)
    elif isinstance(value, Mapping):
        flat = {key: part for key, part in value.items() if part is not None and not isinstance(part, Mapping)}
        yield Row(name, ", ".join(f"{_words(key)} {_value(part)}" for key, part in flat.items()))
        for key, part in value.items():
            if isinstance(part, Mapping):
                yield from _metric(f"  {_words(key)}", part)
    else:
        yield Row(name, _value(value))


def _barriers(metrics: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the barriers of a curve's or complex's paths: the highest point, beside the higher of the two ends."""
    paths = {f"barrier, {way}": path for way, path in metrics.get("path", {}).items()}
    for pair in metrics.get("paths", ()):
        paths |= {f"barrier, {pair['name']}, {way}": path for way, path in pair.items() if way != "name"}
    for name, path in paths.items():
        losses, errors = path["train_loss"], path["test_error"]
        worst = max(range(len(losses)), key=losses.__getitem__)
        loss, error = (max(values[0], values[-1]) for values in (losses, errors))
        yield Row(
            name,
            f"train loss {losses[worst]:.4f} at t = {path['t'][worst]:.2f}, at the ends at most {loss:.4f}; "
            f"test error {100 * max(errors):.2f} %, at the ends at most {100 * error:.2f} %",
        )


def _options(manifest: Manifest) -> Iterator[Row]:
    """Yield the options that differ from their defaults, then the others in a row of the method and one of settings."""
    record = next((one for one in methods() if one.command == manifest.command), None)
    others = []
    for title, values, kind in (("options", manifest.options, record), ("settings", manifest.settings, Settings)):
        same = [name for name, value in values.items() if kind is not None and _is_default(kind, name, value)]
        own = {_name(kind, name): value for name, value in values.items() if name not in same}
        if own:
            yield Row(title, "")
            for name, value in own.items():
                yield Row(f"  {name}", _value(value))
        if same:
            known = (name for name in same if values[name] is not None)
            written = ", ".join(f"{_name(kind, name)} {_value(values[name])}" for name in known)
            others.append(Row(f"default {title}", written, aside=True))
    yield from others


def _is_default(kind: type[Options], name: str, value: Any) -> bool:
    field = kind.model_fields.get(name)
    return field is not None and not field.is_required() and field.default == value


def _name(kind: type[Options] | None, name: str) -> str:
    """Return an option's name as it is typed."""
    return name if kind is None else kind.flags().get(name, name).removeprefix("--")


def _words(name: str) -> str:
    return name.replace("held_out", "held-out").replace("_", " ").replace("nll", "NLL")


def _value(value: Any) -> str:
    """Write a value in words; of many numbers, their range."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if value else "0"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(str(key))} {_value(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        numbers = len(value) > 2 and all(isinstance(one, float) for one in value)
        return f"{_value(min(value))} to {_value(max(value))}" if numbers else ", ".join(map(_value, value)) or "none"
    return "unknown" if value is None else str(value)


def costs(cost: Cost | CostEntry) -> str:
    """Describe a cost in words; what is unknown is not counted, and named."""
    unknown = cost.unknown if isinstance(cost, Cost) else [cost.origin] if cost.origin else []
    texts = [f"the unknown cost of {', '.join(unknown)}"] if unknown else []
    if cost.example_passes or not (unknown or cost.forward_passes):
        texts.insert(0, f"{cost.example_passes or 0:,} example passes")
    if cost.forward_passes:
        texts.append(f"{cost.forward_passes:,} forward passes")
    if cost.seconds is not None:
        texts.append(f"{cost.seconds:,.0f} s")
    if cost.peak_memory is not None:
        texts.append(f"{cost.peak_memory / 2**30:.2f} GiB at most")
    return f"{', '.join(texts)}" + (f" on {cost.device}" if cost.example_passes or not unknown else "")
