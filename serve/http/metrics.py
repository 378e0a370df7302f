"""Prometheus metrics: where the time of requests goes, and whether images still look like those of validation.

The histograms of entropy and mutual information have their edges at the quantiles of the validation images: as long as
nothing drifts, every bucket gets the share of images between its quantiles. Only images of which all members were asked
are counted in them, as fewer members give other entropies.

Every worker counts in memory. Where a server has several, each writes what it counted to a file once a second, and
``/metrics`` adds the files up. Memory-mapped files, Prometheus' own way, end a process on a full disk (SIGBUS).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ensembler.serve.http.batcher import Columns
from ensembler.serve.http.routes import route_of
from ensembler.serve.runtime.drift import Window
from ensembler.serve.runtime.manifest import Validation

__all__ = ["STAGES", "Exposition", "Metrics", "Requests"]

STAGES = ("read", "queue", "predict", "write")

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_EVEN = 20  # buckets without validation images
_QUANTILES = "ensembler_validation_nats"
_DRIFT = "ensembler_drift_index"
_BOUND = "ensembler_drift_bound"
_GREATEST = (_QUANTILES, _DRIFT, _BOUND)  # gauges of which the greatest worker's counts, not their sum

_logger = logging.getLogger("ensembler.serve")

Owner = TypeVar("Owner")
P = ParamSpec("P")


def _harmless(method: Callable[Concatenate[Owner, P], None]) -> Callable[Concatenate[Owner, P], None]:
    """Log what a metric raises: it must not fail a request."""

    @functools.wraps(method)
    def observe(self: Owner, /, *arguments: P.args, **named: P.kwargs) -> None:
        try:
            method(self, *arguments, **named)
        except Exception:
            _logger.exception("a metric could not be written")

    return observe


class Exposition:
    """What ``/metrics`` answers: the metrics of one worker, or the sum of all workers'.

    Args:
        registry: this worker's metrics.
        folder: where the workers of one server write theirs; ``None`` for one worker.
    """

    def __init__(self, registry: CollectorRegistry, folder: Path | None = None) -> None:
        self._registry = registry
        self._folder = folder
        self._failed = False

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        if self._folder is None:
            return generate_latest(self._registry)
        self.write()
        texts = {_file(self._folder, os.getpid()): generate_latest(self._registry).decode()}
        for file in self._folder.glob(_file(self._folder, "*").name):
            try:
                texts.setdefault(file, file.read_text())
            except OSError:
                self._degrade()
        alive = {file for file in texts if _is_alive(int(file.stem.removeprefix("metrics-")))}
        return generate_latest(_Sum([(text, file in alive) for file, text in texts.items()]))  # type: ignore[arg-type]

    def write(self) -> None:
        """Write this worker's metrics where the others find them; on a full disk they are left out."""
        if self._folder is None:
            return
        target = _file(self._folder, os.getpid())
        scratch = target.with_suffix(".tmp")
        try:
            scratch.write_bytes(generate_latest(self._registry))
            scratch.replace(target)
        except OSError:
            self._degrade()

    async def keep_written(self) -> None:
        """Write once a second until cancelled."""
        while self._folder is not None:
            await asyncio.to_thread(self.write)
            await asyncio.sleep(1)

    def _degrade(self) -> None:
        if not self._failed:
            self._failed = True
            _logger.warning("metrics cannot be written (%s): /metrics leaves workers out or is late", self._folder)


class _Sum(Collector):
    """Metrics of several workers, added up; of a gauge, those of workers that still run.

    Args:
        texts: each worker's metrics, and whether it runs.
    """

    def __init__(self, texts: Iterable[tuple[str, bool]]) -> None:
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for text, runs in self._texts:
            for family in text_string_to_metric_families(text):
                if family.type == "gauge" and not runs:
                    continue
                families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                found = values.setdefault(family.name, {})
                for sample in family.samples:
                    key = (sample.name, tuple(sample.labels.items()))
                    greatest = family.name in _GREATEST or sample.name.endswith("_created")
                    known = found.get(key)
                    both = (known or 0.0) + sample.value
                    found[key] = both if known is None or not greatest else max(known, sample.value)
        for name, family in families.items():
            for (sample_name, labels), value in values[name].items():
                family.add_sample(sample_name, dict(labels), value)
            yield family


def _file(folder: Path, process: int | str) -> Path:
    return folder / f"metrics-{process}.txt"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class Requests:
    """Counts responses by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["route", "status"]
        self._count = Counter("ensembler_requests", "Responses, by route and status", labels, registry=registry)

    @_harmless
    def count(self, path: str, status: int) -> None:
        """Count a response; routes that do not exist are counted as ``other``."""
        self._count.labels(route_of(path) or "other", str(status)).inc()


class Metrics:
    """One worker's metrics of its predictions.

    Args:
        validation: scores of held-out images; ``None`` gives even buckets.
        members: M.
        classes: C.
        registry: where they are registered.
        window: images over which drift is measured.
    """

    def __init__(
        self,
        validation: Validation | None,
        members: int,
        classes: int,
        registry: CollectorRegistry,
        window: int = 1000,
    ) -> None:
        def histogram(name: str, text: str, edges: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"ensembler_{name}", text, labels, buckets=edges, registry=registry)

        stage = histogram("stage_seconds", f"Time of a request by stage: {', '.join(STAGES)}", _SECONDS, "stage")
        self._stages = {name: stage.labels(name) for name in STAGES}
        self._batch = histogram(
            "batch_images", "Images of a forward pass, of one request or several", [2**power for power in range(11)]
        )
        self._members = histogram(
            "members_used",
            "Members asked for an image",
            sorted({math.ceil(members * part / 16) for part in range(1, 17)}),
        )
        self._entropy = histogram(
            "predictive_entropy_nats",
            "Predictive entropy of an image, of all members; buckets at validation quantiles",
            _edges(validation.predictive_entropy if validation else None, classes),
        )
        self._information = histogram(
            "mutual_information_nats",
            "Mutual information of an image, of all members; buckets at validation quantiles",
            _edges(validation.mutual_information if validation else None, min(members, classes)),
        )
        self._abstentions = Counter(
            "ensembler_abstentions", "Images, by whether the ensemble abstains", ["abstained"], registry=registry
        )
        self._waiting = Gauge("ensembler_waiting_images", "Images in the queue", registry=registry)
        quantile = Gauge(
            _QUANTILES, "Quantiles of a measure on the validation images", ["measure", "level"], registry=registry
        )
        if validation is not None:
            for measure in ("predictive_entropy", "mutual_information"):
                for level, nats in zip(validation.levels, getattr(validation, measure) or [], strict=False):
                    quantile.labels(measure, f"{level:g}").set(nats)

        self._told = False
        self._window = Window(validation.drift if validation else [], window)
        self._drift = Gauge(
            _DRIFT,
            "Population stability index of the last images against the validation images, by measure",
            ["measure"],
            registry=registry,
        )
        limit = Gauge(
            _BOUND, "What it stays below in 999 of 1,000 windows without drift", ["measure"], registry=registry
        )
        for measure, value in self._window.bounds.items():
            limit.labels(measure).set(value)

    @_harmless
    def stages(self, seconds: dict[str, float]) -> None:
        """Record a request's time in each of :data:`STAGES`."""
        for name, value in seconds.items():
            self._stages[name].observe(value)

    @_harmless
    def batch(self, images: int, waiting: int) -> None:
        """Record a forward pass, and the length of the queue after it."""
        self._batch.observe(images)
        self._waiting.set(waiting)

    @_harmless
    def answer(self, columns: Columns, whole: bool) -> None:
        """Record the predictions of some images.

        Args:
            columns: as answered, with ``abstain`` where it was asked for.
            whole: whether all members were to be asked.
        """
        _observe(self._members, columns["members_used"])
        if whole:
            _observe(self._entropy, columns["predictive_entropy"])
            _observe(self._information, columns.get("mutual_information", ()))
            self._window.add(columns)
            if not self._told and self._window.full:
                self._told = True
                for measure in self._window.bounds:  # computed when it is asked for, not at every answer
                    self._drift.labels(measure).set_function(partial(self._window.index, measure))
        if "abstain" in columns:
            abstained = int(columns["abstain"].sum())
            self._abstentions.labels("true").inc(abstained)
            self._abstentions.labels("false").inc(len(columns["abstain"]) - abstained)


def _observe(histogram: Histogram, values: ArrayLike) -> None:
    for value in np.asarray(values).tolist():
        if math.isfinite(value):  # one NaN would make the sum NaN until the server restarts
            histogram.observe(value)


def _edges(quantiles: Sequence[float] | None, outcomes: int) -> list[float]:
    """Rising bucket edges; equal quantiles, such as many zeros, share one."""
    if quantiles:
        return sorted(set(quantiles))
    top = math.log(max(2, outcomes))
    return [top * step / _EVEN for step in range(1, _EVEN + 1)]
