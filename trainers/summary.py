"""The summary of a run: the last lines of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ensembler.run import Cost, Manifest
from ensembler.text import counted

__all__ = ["lines"]


def lines(manifest: Manifest) -> list[str]:
    """Describe a run's method, scores, geometry and cost, in lines."""
    cost, test = manifest.cost, manifest.metrics["test"]
    scores = [
        f"{name.replace('_', ' ').replace('nll', 'NLL')} {value:.4f}"
        for name, value in test.items()
        if name != "examples" and value is not None
    ]
    result = [
        f"{manifest.method} of {counted(manifest.members, 'member')} on {manifest.dataset.title}",
        f"test: {', '.join(scores)}",
    ]
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


def _total(cost: Cost) -> str:
    """Describe a run's cost in short: what is unknown is named, not counted."""
    elsewhere = ", ".join(cost.unknown)
    if cost.example_passes is None:
        return f"unknown, {elsewhere} {'was' if len(cost.unknown) == 1 else 'were'} trained elsewhere"
    seconds = "" if cost.seconds is None else f", {cost.seconds:.0f} s"
    known = f"{cost.example_passes:,} example passes{seconds} on {cost.device}"
    return f"{known}, and the unknown cost of {elsewhere}" if elsewhere else known
