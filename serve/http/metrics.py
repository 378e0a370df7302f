"""What Prometheus is told, at ``/metrics``: where the time goes, and whether the images still look like those known.

The histograms of entropy and mutual information have their edges at the quantiles of the validation images, so that as
long as nothing drifts every bucket gets the share of images that its quantiles say. Only images of which all members
were asked are counted in them: fewer members give other entropies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ensembler.serve.http.batcher import Columns
from ensembler.serve.runtime.manifest import Validation

__all__ = ["Metrics", "Refusals", "refusals"]

_STAGES = ("read", "queue", "predict", "write")
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_EVEN = 20  # buckets where there was no validation


class Refusals:
    """Requests that were not answered, by status; the middleware knows them before there is a bundle."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count = Counter(
            "ensembler_refusals", "Requests answered with an error, by status", ["status"], registry=registry
        )

    def count(self, status: int) -> None:
        self._count.labels(str(status)).inc()


@cache
def refusals() -> Refusals:
    """This process's. Its registry is never read: BentoML's ``/metrics`` reads the files of all workers."""
    return Refusals(CollectorRegistry())


class Metrics:
    """One worker's.

    Args:
        validation: what the ensemble said of held-out images; ``None`` gives even buckets.
        members: M.
        classes: C.
        registry: whose they are; by default one of their own, as BentoML reads all workers' files.
    """

    def __init__(
        self, validation: Validation | None, members: int, classes: int, registry: CollectorRegistry | None = None
    ) -> None:
        registry = registry or CollectorRegistry()
        stage = Histogram(
            "ensembler_stage_seconds",
            f"Time of a request by stage: {', '.join(_STAGES)}",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = {name: stage.labels(name) for name in _STAGES}
        self._batch = Histogram(
            "ensembler_batch_images",
            "Images of a forward pass, of one request or of several",
            buckets=[2**power for power in range(11)],
            registry=registry,
        )
        self._members = Histogram(
            "ensembler_members_used",
            "Members asked for an image",
            buckets=sorted({math.ceil(members * part / 16) for part in range(1, 17)}),
            registry=registry,
        )
        self._entropy = Histogram(
            "ensembler_predictive_entropy_nats",
            "Predictive entropy of an image, of all members; buckets at validation quantiles",
            buckets=_edges(validation.predictive_entropy if validation else None, classes),
            registry=registry,
        )
        self._information = Histogram(
            "ensembler_mutual_information_nats",
            "Mutual information of an image, of all members; buckets at validation quantiles",
            buckets=_edges(validation.mutual_information if validation else None, min(members, classes)),
            registry=registry,
        )
        self._abstentions = Counter(
            "ensembler_abstentions", "Images by whether to abstain from them", ["abstained"], registry=registry
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

    def stage(self, name: str, seconds: float) -> None:
        """A request's time in ``"read"``, ``"queue"``, ``"predict"`` or ``"write"``."""
        self._stages[name].observe(seconds)

    def batch(self, images: int) -> None:
        """A forward pass."""
        self._batch.observe(images)

    def waiting(self, images: int) -> None:
        """The queue's length now."""
        self._waiting.set(images)

    def answer(self, columns: Columns, whole: bool) -> None:
        """What was answered of some images.

        Args:
            columns: as answered, with ``abstain`` where it was asked for.
            whole: whether all members were to be asked.
        """
        for used in columns["members_used"].tolist():
            self._members.observe(used)
        if whole:
            _observe(self._entropy, columns["predictive_entropy"].tolist())
            if "mutual_information" in columns:
                _observe(self._information, columns["mutual_information"].tolist())
        if "abstain" in columns:
            abstained = int(columns["abstain"].sum())
            self._abstentions.labels("true").inc(abstained)
            self._abstentions.labels("false").inc(len(columns["abstain"]) - abstained)


def _observe(histogram: Histogram, values: Iterable[float]) -> None:
    for value in values:
        histogram.observe(value)


def _edges(quantiles: Sequence[float] | None, outcomes: int) -> list[float]:
    """Rising bucket edges; equal quantiles, such as many zeros, share one."""
    if quantiles:
        return sorted(set(quantiles))
    top = math.log(max(2, outcomes))
    return [top * step / _EVEN for step in range(1, _EVEN + 1)]
