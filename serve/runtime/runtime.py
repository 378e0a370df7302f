"""A bundle's members in ONNX Runtime and NumPy: images to probabilities and their uncertainty. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler import artefact, calibration
from ensembler.errors import ShapeError, UsageError
from ensembler.serve.runtime import early_exit
from ensembler.serve.runtime.early_exit import LEVEL, Mode
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.machine import available_cpus, resident_memory
from ensembler.serve.runtime.manifest import MERGED, BundleManifest, Strategy, Tuning, read_bundle
from ensembler.serve.runtime.sessions import open_bundle, open_merged
from ensembler.serve.runtime.strategies import Members
from ensembler.uncertainty import mean_probabilities, uncertainty

__all__ = ["Prediction", "Runtime"]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the ensemble says of a batch.

    Every number of an image is of the members that were asked for it.

    Attributes:
        classes: (B,) int64, the most probable class of the mean.
        labels: its name, B of them.
        probabilities: (B, C) float64, the mean of the members'.
        members: (M, B, C) float32, each member's own; not a number where it was not asked.
        predictive_entropy: (B,) nats, in [0, log C].
        expected_entropy: (B,) nats, in [0, log C].
        mutual_information: (B,) nats, in [0, log min(M, C)]; ``None`` where M = 1.
        disagreement: (B,) share of the pairs of members whose classes differ; ``None`` where M = 1.
        members_used: (B,) int64, how many members were asked.
        complete: (B,) whether these were all that the runtime holds: mutual information and disagreement of fewer are
            not comparable with those of all.
    """

    classes: NDArray[np.int64]
    labels: list[str]
    probabilities: NDArray[np.float64]
    members: NDArray[np.float32]
    predictive_entropy: NDArray[np.float64]
    expected_entropy: NDArray[np.float64]
    mutual_information: NDArray[np.float64] | None
    disagreement: NDArray[np.float64] | None
    members_used: NDArray[np.int64]
    complete: NDArray[np.bool_]


class Runtime:
    """A bundle's members, ready to answer. Safe to call from several threads at once.

    Attributes:
        manifest: the bundle's.
        sha256: of the bundle's manifest, which holds the hash of every file.
        calibration: of exactly these members; ``None`` where the bundle has none, or where they are not its own.
        threads: how many CPUs are kept busy.
        device: ``"cuda"`` or ``"cpu"``: where the sessions really compute.
        memory: bytes that the members took, from before they were opened to after they were warmed; until then, and
            where the system does not tell, the size of their weights.
        ready: whether every session has run once.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        sha256: str,
        members: Members,
        threads: int,
        fitted: calibration.Calibration | None = None,
        before: int | None = None,
    ) -> None:
        self.manifest = manifest
        self.sha256 = sha256
        self.calibration = fitted
        self.threads = threads
        self.device = members.device
        self.ready = False
        self._members = members
        self._before = before
        copies = 2 if "merged" in members.strategies else 1
        self.memory = manifest.parameters * {"float32": 4, "float16": 2, "int8": 1}[manifest.precision]
        self.memory *= copies * len(members)

    @classmethod
    def load(
        cls, bundle: str | Path, threads: int | None = None, *, members: int | None = None, seed: int = 0
    ) -> Runtime:
        """Verify a bundle and open its members.

        Args:
            bundle: its folder.
            threads: forward passes at a time; by default one for each CPU that this process may use.
            members: how many to open: by default all of the bundle's. Fewer are the first ones in its order. More are
                made of its vertices, where it has the layout "vertices" and its networks have no BatchNorm.
            seed: of these further members.

        Raises:
            UsageError: members that the bundle neither holds nor can make.
            ArtefactError: no bundle there, of an unknown format, or a graph that ONNX Runtime cannot open.
            CorruptError: a file of it is missing or has changed; it is named.
        """
        bundle = Path(bundle)
        manifest = read_bundle(bundle)
        before = resident_memory()
        threads = threads or available_cpus()
        sessions = open_bundle(bundle, manifest, members, seed)
        whole = len(sessions) == manifest.members
        merged = None
        if whole and "merged" in _winners(manifest.tuning, threads).values() and MERGED in manifest.files:
            merged = open_merged(bundle, manifest.layout, manifest.order, threads)
        opened = Members(
            sessions, threads, manifest.image_shape, len(manifest.classes), manifest.input == "float", merged
        )
        fitted = None
        if whole and manifest.calibration:
            fitted = calibration.read(bundle / manifest.calibration, manifest.run.sha256)
        return cls(manifest, artefact.sha256(bundle / artefact.MANIFEST), opened, threads, fitted, before)

    @property
    def members(self) -> int:
        """M."""
        return len(self._members)

    def warm_up(self) -> None:
        """Run every session once, so that no caller pays for it; from then on ``ready``.

        On CUDA, at every batch size that batches are padded to.
        """
        for batch in self._members.batches if self.device == "cuda" else [1]:
            images = np.zeros((batch, *self.manifest.image_shape), dtype=np.uint8)
            for strategy in set(self._members.strategies) - {"loop"}:
                self._members.ask(images, strategy)
        after = resident_memory()
        if after is not None and self._before is not None:
            self.memory = max(self.memory, after - self._before)  # less, where memory of before was used again
        self.ready = True

    def strategy(self, batch: int) -> Strategy:
        """How a batch of so many images is asked of all members.

        What was the fastest at the nearest batch size (by ratio) where the bundle was tuned on a machine with as many
        CPUs, for as many members; else ``"sessions"``.
        """
        tuning = self.manifest.tuning
        winners = _winners(tuning, self.threads)
        if tuning is None or not winners or (tuning.members, tuning.device) != (self.members, self.device):
            return "sessions"
        winner = winners[min(winners, key=lambda measured: abs(np.log(measured / batch)))]
        return winner if winner in self._members.strategies else "sessions"

    def predict_members(self, images: object) -> NDArray[np.float32]:
        """Each member's probabilities.

        Args:
            images: (B, H, W, 3), integers from 0 to 255; or floats from 0 to 1, where the bundle's input is float.

        Returns:
            (M, B, C) float32, rows with sum 1, in the order in which members are asked.

        Raises:
            ShapeError: other images than that.
        """
        checked = self._check(images)
        return self._members.ask(checked, self.strategy(len(checked)))

    def predict(
        self, images: object, mode: Mode = "full", *, members: int | None = None, level: float = LEVEL
    ) -> Prediction:
        """The ensemble's prediction and its uncertainty, computed in float64.

        Args:
            images: what :meth:`predict_members` takes.
            mode: ``"full"`` asks every member; ``"exact"`` stops where the class can no longer change, so that the
                classes are those of all members; ``"confidence"`` stops where the members' spread makes the class
                probable enough. See :mod:`ensembler.serve.runtime.early_exit`. Images that are done leave the batch.
            members: ask no more than these first ones; by default all.
            level: of ``"confidence"``, in (0, 1).

        Raises:
            ShapeError: not images (B, H, W, 3) of integers from 0 to 255.
            UsageError: an unknown mode, a level out of range, or a number of members that the runtime does not hold.
        """
        checked = self._check(images)
        members = self.members if members is None else members
        if not 1 <= members <= self.members:
            raise UsageError(f"this ensemble has {self.members} members: ask from 1 to {self.members}, not {members}")
        if mode == "full":
            asked = self._ask(checked, 0, members)
            return self._prediction(asked, np.full(len(checked), members))
        return self._prediction(*self._in_waves(checked, mode, members, level))

    def close(self) -> None:
        """Let the threads go; the runtime cannot predict any more."""
        self.ready = False
        self._members.close()

    def _ask(self, images: NDArray[np.generic], first: int, last: int) -> NDArray[np.float32]:
        strategy = self.strategy(len(images))
        if strategy == "merged" and (first, last) != (0, self.members):
            strategy = "sessions"
        return self._members.ask(images, strategy, first, last)

    def _in_waves(
        self, images: NDArray[np.generic], mode: Mode, members: int, level: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Each member's probabilities (members, B, C), as far as asked, and how many were asked for each image."""
        settled = early_exit.rule(mode, level)
        probabilities = np.full((members, len(images), len(self.manifest.classes)), np.nan, dtype=np.float32)
        used = np.zeros(len(images), dtype=np.int64)
        left = np.arange(len(images))
        for first, last in early_exit.waves(mode, members):
            probabilities[first:last, left] = self._ask(images[left], first, last)
            used[left] = last
            left = left[~settled(probabilities[:last, left], members)]
            if not len(left):
                break
        return probabilities, used

    def _prediction(self, members: NDArray[np.float32], used: NDArray[np.int64]) -> Prediction:
        """Score each group of images of which equally many members were asked."""
        B, M = len(used), len(members)
        mean = np.empty(members.shape[1:])
        predictive, expected, information, disagreement = np.empty((4, B))
        for count in np.unique(used):
            rows = used == count
            asked = members[:count] if rows.all() else members[:count, rows]
            doubt = uncertainty(asked)
            mean[rows] = mean_probabilities(asked)
            predictive[rows], expected[rows] = doubt.predictive_entropy, doubt.expected_entropy
            if doubt.mutual_information is not None and doubt.disagreement is not None:
                information[rows], disagreement[rows] = doubt.mutual_information, doubt.disagreement
        classes = mean.argmax(axis=-1)
        return Prediction(
            classes=classes,
            labels=[self.manifest.classes[index] for index in classes],
            probabilities=mean,
            members=members,
            predictive_entropy=predictive,
            expected_entropy=expected,
            mutual_information=None if M == 1 else information,
            disagreement=None if M == 1 else disagreement,
            members_used=used,
            complete=used == self.members,
        )

    def _check(self, images: object) -> NDArray[np.generic]:
        if self.manifest.input == "float" and isinstance(images, np.ndarray) and images.dtype.kind == "f":
            return _check_floats(images, self.manifest.image_shape)
        return check_images(images, self.manifest.image_shape)


def _winners(tuning: Tuning | None, threads: int) -> dict[int, Strategy]:
    """Batch size to strategy, where this machine lends as many CPUs as the one that was measured."""
    return tuning.winners if tuning is not None and tuning.cpus == threads else {}


def _check_floats(images: NDArray[np.floating], image_shape: list[int]) -> NDArray[np.float32]:
    if images.ndim != 4 or list(images.shape[1:]) != image_shape or not len(images):
        expected = f"(batch, {', '.join(map(str, image_shape))})"
        raise ShapeError(f"expected images of shape {expected}, found {images.shape}")
    if not (images.min() >= 0 and images.max() <= 1):  # not a number is refused too
        raise ShapeError("images hold floats outside 0 to 1: divide pixels by 255, or send whole numbers from 0 to 255")
    return images.astype(np.float32, copy=False)
