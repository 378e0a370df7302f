"""Prometheus metrics: where the time of requests goes, and whether images still look like those of validation.

The histograms of entropy and mutual information have their edges at the quantiles of the validation images: as long as
nothing drifts, every bucket gets the share of images between its quantiles. Only images of which all members were asked
are counted in them, as fewer members give other entropies.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import ArrayLike
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ensembler.serve.http.batcher import Columns
from ensembler.serve.http.routes import ROUTES
from ensembler.serve.runtime.manifest import Validation

__all__ = ["STAGES", "Metrics", "Requests"]

STAGES = ("read", "queue", "predict", "write")

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_EVEN = 20  # buckets without validation images

_logger = logging.getLogger("ensembler.serve")

Owner = TypeVar("Owner")
P = ParamSpec("P")


def _harmless(method: Callable[Concatenate[Owner, P], None]) -> Callable[Concatenate[Owner, P], None]:
    """Log what a metric raises: a full disk, which holds the counts of all workers, must not fail a request."""

    @functools.wraps(method)
    def observe(self: Owner, /, *arguments: P.args, **named: P.kwargs) -> None:
        try:
            method(self, *arguments, **named)
        except Exception:
            _logger.exception("a metric could not be written")

    return observe


class Requests:
    """Counts responses by route and status."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["route", "status"]
        self._count = Counter("ensembler_requests", "Responses, by route and status", labels, registry=registry)

    @_harmless
    def count(self, path: str, status: int) -> None:
        """Count a response; routes that do not exist are counted as ``other``."""
        self._count.labels(path if path in ROUTES else "other", str(status)).inc()


class Metrics:
    """One worker's metrics of its predictions.

    Args:
        validation: scores of held-out images; ``None`` gives even buckets.
        members: M.
        classes: C.
        registry: where they are registered.
    """

    def __init__(self, validation: Validation | None, members: int, classes: int, registry: CollectorRegistry) -> None:
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
        self._waiting = Gauge(
            "ensembler_waiting_images", "Images in the queue", registry=registry, multiprocess_mode="livesum"
        )
        quantile = Gauge(
            "ensembler_validation_nats",
            "Quantiles of a measure on the validation images",
            ["measure", "level"],
            registry=registry,
            multiprocess_mode="max",
        )
        if validation is not None:
            for measure in ("predictive_entropy", "mutual_information"):
                for level, nats in zip(validation.levels, getattr(validation, measure) or [], strict=False):
                    quantile.labels(measure, f"{level:g}").set(nats)

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
