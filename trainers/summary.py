"""Summaries of a run: the last lines of its training, and the rows of ``ensembler show``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.run import Cost, CostEntry, DatasetRecord, Manifest

__all__ = ["lines", "rows"]

_LONG = ("path", "paths", "growth", "trials", "averages")  # metrics that are too long for one line


def lines(manifest: Manifest) -> list[str]:
    """Describe a run's method, scores, geometry and cost, in lines."""
    cost, test = manifest.cost, manifest.metrics["test"]
    members = "1 member" if manifest.members == 1 else f"{manifest.members} members"
    scores = [
        f"{name.replace('_', ' ').replace('nll', 'NLL')} " + ("unknown" if value is None else f"{value:.4f}")
        for name, value in test.items()
        if name != "examples"
    ]
    result = [f"{manifest.method} of {members} on {manifest.dataset.title}", f"test: {', '.join(scores)}"]
    for simplex in manifest.metrics.get("simplexes", ()):
        lengths = simplex["edge_lengths"]
        result.append(
            f"{simplex['name']}: log volume {simplex['log_volume']:.2f}, "
            f"edges {min(lengths):.2f} to {max(lengths):.2f} long"
        )
    if "lambda" in manifest.metrics:
        result.append(f"lambda: {manifest.metrics['lambda']:g}, chosen in {len(manifest.metrics['trials'])} trials")
    result += _barrier(manifest.metrics.get("averages", ()))
    pairs = {"": manifest.metrics["path"]} if "path" in manifest.metrics else {}
    for pair in manifest.metrics.get("paths", ()):
        pairs[f"{pair['name']}, "] = {name: path for name, path in pair.items() if name != "name"}
    for prefix, paths in pairs.items():
        for name, path in paths.items():
            result.append(
                f"{prefix}{name}: highest train loss {path['highest_train_loss']:.4f}, highest test error "
                f"{path['highest_test_error']:.4f}; ensemble of an end with t = 1/2: error "
                f"{path['ensemble_error'][len(path['t']) // 2]:.4f}"
            )
    result.append(f"cost: {_total(cost)}")
    return result


def _barrier(averages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warn of an average whose vertices lie in different valleys of the loss, with the highest barrier measured."""
    worse = [pair for pair in averages if pair["worse"]]
    if not worse:
        return []
    highest = max(worse, key=lambda pair: pair["average"] - max(pair["ends"]))
    (a, b), (first, second) = highest["of"], highest["ends"]
    count = f" ({len(worse)} of {len(averages)} pairs are so)" if len(averages) > 1 else ""
    return [
        f"warning: the average of vertices {a} and {b} has a held-out NLL of {highest['average']:.2f}, against "
        f"{first:.2f} and {second:.2f} of their own{count}: they are not in one valley of the loss, so evaluate the "
        "ensemble itself rather than its average"
    ]


def rows(manifest: Manifest) -> dict[str, str]:
    """Return everything in a manifest that fits on a line, by name."""
    cost = manifest.cost
    return {
        "method": manifest.method,
        "network": f"{manifest.architecture}, {manifest.parameters:,} parameters",
        "dataset": f"{manifest.dataset.title}, {manifest.dataset.train_examples:,} training images",
        "classes": _classes(manifest.dataset),
        "sizes": f"{manifest.vertices} vertices, {manifest.members} members",
        "cost": _costs(cost),
        **{f"  {name}": _costs(part) for name, part in cost.entries.items()},
        **{name: json.dumps(value) for name, value in manifest.metrics.items() if name not in _LONG},
        "options": json.dumps(manifest.options),
        "settings": json.dumps(manifest.settings),
        "seed": str(manifest.seed),
        "created": manifest.created,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "files": ", ".join(manifest.files),
    }


def _classes(record: DatasetRecord) -> str:
    pairs = zip(record.classes, record.class_counts, strict=True)
    return ", ".join(f"{name} ({count:,})" for name, count in pairs)


def _total(cost: Cost) -> str:
    """Describe a run's cost in short: what is unknown is named, not counted."""
    elsewhere = ", ".join(cost.unknown)
    if cost.example_passes is None:
        return f"unknown, {elsewhere} {'was' if len(cost.unknown) == 1 else 'were'} trained elsewhere"
    seconds = "" if cost.seconds is None else f", {cost.seconds:.0f} s"
    known = f"{cost.example_passes:,} example passes{seconds} on {cost.device}"
    return f"{known}, and the unknown cost of {elsewhere}" if elsewhere else known


def _costs(cost: Cost | CostEntry) -> str:
    """Describe a cost in words; what is unknown is not counted, and named."""
    unknown = cost.unknown if isinstance(cost, Cost) else [cost.origin] if cost.origin else []
    texts = [f"the unknown cost of {', '.join(unknown)}"] if unknown else []
    if cost.example_passes or not unknown:
        texts.insert(0, f"{cost.example_passes or 0:,} example passes")
    if cost.forward_passes:
        texts.append(f"{cost.forward_passes:,} forward passes")
    if cost.seconds is not None:
        texts.append(f"{cost.seconds:,.0f} s")
    if cost.peak_memory is not None:
        texts.append(f"{cost.peak_memory / 2**30:.2f} GiB at most")
    return f"{', '.join(texts)}" + (f" on {cost.device}" if cost.example_passes or not unknown else "")
