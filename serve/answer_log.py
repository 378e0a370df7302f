"""A log of answers, one JSON object a line, without their images; and whether it shows drift.

The first line, and the first after a start of the service, says what the ensemble answered on the validation images, so
that a log can be judged alone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError

from ensembler.errors import DataError, UsageError
from ensembler.record import Record
from ensembler.serve.runtime.drift import FEWEST, Window
from ensembler.serve.runtime.manifest import Binned, BundleManifest

__all__ = ["AnswerLog", "Drift", "Head", "Line", "WindowDrift", "check_appendable", "drift_of"]

_logger = logging.getLogger("ensembler.serve")


class Head(Record):
    """The reference of the lines of one bundle; ``bundle`` is the SHA-256 of its manifest."""

    bundle: str
    members: int
    reference: list[Binned]


class Line(Record):
    """One image's answer.

    Attributes:
        bundle: that answered, by its SHA-256.
        time: UTC, to the second.
        mode: how members were asked.
        members_used: how many.
        class_index: the predicted class.
        label: its name.
        probability: of that class.
        predictive_entropy, mutual_information, disagreement: nats, nats, and a share; the last two are null for one
            member.
    """

    bundle: str
    time: str
    mode: str
    members_used: int
    class_index: int
    label: str
    probability: float
    predictive_entropy: float
    mutual_information: float | None
    disagreement: float | None


class WindowDrift(Record):
    """One window of a log: its first and last time, and the index of each measure."""

    first: str
    last: str
    index: dict[str, float]


class Drift(Record):
    """What a log shows.

    Attributes:
        bundle: the last one of the log, which it is about.
        answers: of it, with all members asked.
        left_out: other answers: of fewer members, or of earlier bundles.
        window: images of each window.
        bound: what the index of each measure stays below in 999 of 1,000 windows without drift.
        windows: in order; images that do not fill one are left out at the start.
        drifted: the measures whose index is above its bound in the last window.
    """

    bundle: str
    answers: int
    left_out: int
    window: int
    bound: dict[str, float]
    windows: list[WindowDrift]
    drifted: list[str]


class AnswerLog:
    """Appends answers to a file, opened anew each time, so that it may be moved away meanwhile.

    Args:
        file: exists or not.
        sample: the share of images that are logged, drawn at random.
        manifest: of the bundle that answers.
        bundle: its SHA-256.
    """

    def __init__(self, file: Path, sample: float, manifest: BundleManifest, bundle: str) -> None:
        self._file = file
        self._sample = sample
        self._classes = manifest.classes
        reference = manifest.validation.drift if manifest.validation else []
        self._head = Head(bundle=bundle, members=manifest.members, reference=reference)
        self._generator = np.random.default_rng()
        self._begun = False
        self._failed = False

    def add(self, columns: Mapping[str, NDArray[np.generic]], mode: str) -> None:
        """Log the answers to some images. A file that cannot be written is said once; it stops no answer."""
        drawn = self._generator.random(len(columns["class"])) < self._sample
        chosen = np.flatnonzero(drawn & np.isfinite(columns["predictive_entropy"]))
        if not len(chosen):
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        text = "".join(f"{self._line(columns, int(image), mode, now)}\n" for image in chosen)
        try:
            with self._file.open("a", encoding="utf-8") as file:
                if not self._begun or not file.tell():
                    text = f"{self._head.model_dump_json()}\n{text}"
                file.write(text)  # at once: other workers append, too
            self._begun, self._failed = True, False
        except OSError as error:
            if not self._failed:
                _logger.warning("answers cannot be logged (%s): %s", self._file, error.strerror or error)
            self._failed = True

    def _line(self, columns: Mapping[str, NDArray[np.generic]], image: int, mode: str, now: str) -> str:
        def of(name: str) -> Any:
            return columns[name][image].item() if name in columns else None

        return Line(
            bundle=self._head.bundle,
            time=now,
            mode=mode,
            members_used=of("members_used"),
            class_index=of("class"),
            label=self._classes[of("class")],
            probability=columns["probabilities"][image].max().item(),
            predictive_entropy=of("predictive_entropy"),
            mutual_information=of("mutual_information"),
            disagreement=of("disagreement"),
        ).model_dump_json()


def check_appendable(file: Path) -> None:
    """Check that a log can be written; a new one is begun with the first answer.

    Raises:
        UsageError: it cannot.
    """
    try:
        is_new = not file.exists()
        with file.open("a"):
            pass
        if is_new:
            file.unlink()
    except OSError as error:
        raise UsageError(
            f"answers cannot be logged to {file}: {error.strerror or error}: choose another --log-answers"
        ) from error


def drift_of(file: Path, window: int) -> Drift:
    """Return what a log shows of the last bundle in it, window by window.

    Args:
        file: written by :class:`AnswerLog`.
        window: images of each; fewer where the log holds fewer.

    Raises:
        DataError: no such log, a line that is none, or too few answers.
    """
    head, lines = None, list[Line]()
    count = 0
    for entry in _entries(file):
        if isinstance(entry, Head):
            head = entry
        else:
            count += 1
            lines.append(entry)
    if head is None:
        raise DataError(f"{file} holds no answers of a service: give the file of its --log-answers")
    if not head.reference:
        raise DataError(f"{file}: its bundle has no reference for drift: export it with validation images")
    lines = [one for one in lines if (one.bundle, one.mode, one.members_used) == (head.bundle, "full", head.members)]
    if len(lines) < FEWEST:
        raise DataError(
            f"{file} holds {len(lines)} answers of all members of its last bundle: at least {FEWEST} are needed"
        )
    classes = max((len(binned.counts) for binned in head.reference if binned.measure == "class"), default=0)
    if classes and not all(0 <= one.class_index < classes for one in lines):
        raise DataError(f"{file} holds classes beyond the {classes} of its bundle: give an unchanged log")
    size = min(window, len(lines))
    columns: dict[str, ArrayLike] = {
        "class": np.array([one.class_index for one in lines]),
        "predictive_entropy": np.array([one.predictive_entropy for one in lines]),
        "mutual_information": np.array([one.mutual_information for one in lines], np.float64),
    }
    taken, windows = Window(head.reference, size), []
    for start in range(len(lines) % size, len(lines), size):
        taken.add({name: np.asarray(values)[start : start + size] for name, values in columns.items()})
        first, last = lines[start].time, lines[start + size - 1].time
        windows.append(WindowDrift(first=first, last=last, index=taken.indices()))
    bounds = taken.bounds
    return Drift(
        bundle=head.bundle,
        answers=len(lines),
        left_out=count - len(lines),
        window=size,
        bound=bounds,
        windows=windows,
        drifted=[measure for measure, index in windows[-1].index.items() if index > bounds[measure]],
    )


def _entries(file: Path) -> Iterator[Head | Line]:
    try:
        texts = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}: give a log of answers") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no log of answers, which is text: give the file of --log-answers") from error
    for number, text in enumerate(
        texts[:-1], start=1
    ):  # what follows the last newline was cut off while it was written
        try:
            content = json.loads(text)
            yield Head.model_validate(content) if "reference" in content else Line.model_validate(content)
        except (ValidationError, ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{file}, line {number} is no answer of a service: remove the line") from error
