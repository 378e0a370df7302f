"""A bundle's members in ONNX Runtime and NumPy: images to probabilities and their uncertainty. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.arguments import checked
from ensembler.calibration import Calibration
from ensembler.errors import ArtefactError, UsageError
from ensembler.machine import available_cpus, gpu_memory, resident_memory
from ensembler.prediction import Prediction, predict
from ensembler.serve.runtime import early_exit
from ensembler.serve.runtime.early_exit import LEVEL, Mode
from ensembler.serve.runtime.gpu import GpuOptions
from ensembler.serve.runtime.images import check_floats, check_images
from ensembler.serve.runtime.manifest import MERGED, BundleManifest, Strategy, Tuning, read_bundle
from ensembler.serve.runtime.sessions import open_bundle, open_merged, providers
from ensembler.serve.runtime.strategies import Members
from ensembler.serve.runtime.tune import keep_faster_graphs
from ensembler.serve.runtime.vertices import check_members
from ensembler.storage import artefact
from ensembler.text import counted, printable

__all__ = ["Runtime"]

_BYTES = {"float32": 4, "tf32": 4, "float16": 2, "int8": 1}
_CAPTURING = 0.2  # seconds, at least five passes, in which a CUDA graph must show that it is faster


class Runtime:
    """A bundle's members, ready to predict. Safe to call from several threads at once.

    Attributes:
        manifest: the bundle's.
        sha256: of the bundle's manifest, which holds the hash of every file.
        calibration: of exactly these members; ``None`` where the bundle has none, or where they are not its own.
        threads: how many CPUs are kept busy.
        gpu: options of the GPU.
        device: ``"cuda"`` or ``"cpu"``: where the sessions run.
        memory: bytes of main memory that the members took, from before they were opened to after the warm-up; until
            then, and where the system does not tell, the size of their weights.
        gpu_memory: bytes of the GPU's memory that went while they were opened and warmed up, to whichever process;
            ``None`` on a CPU, and where the driver does not tell.
        ready: whether every session has run once.
    """

    def __init__(
        self,
        manifest: BundleManifest,
        sha256: str,
        members: Members,
        threads: int,
        fitted: Calibration | None = None,
        before: tuple[int | None, int | None] = (None, None),
        gpu: GpuOptions | None = None,
    ) -> None:
        self.manifest = manifest
        self.sha256 = sha256
        self.calibration = fitted
        self.threads = threads
        self.device = members.device
        self.ready = False
        self._members = members
        self.gpu = gpu or GpuOptions()
        self.gpu_memory: int | None = None
        self._before = before
        copies = 2 if "merged" in members.strategies else 1
        self.memory = manifest.parameters * _BYTES[manifest.precision] * copies * len(members)

    @classmethod
    @checked
    def load(
        cls,
        bundle: str | Path,
        threads: int | None = None,
        *,
        members: int | None = None,
        seed: int = 0,
        gpu: GpuOptions | None = None,
        key: str | Path | None = None,
    ) -> Runtime:
        """Verify a bundle and open its members.

        Args:
            bundle: its folder.
            threads: forward passes at a time; by default one for each CPU that this process may use.
            members: how many to open: by default all of the bundle's. Fewer are the first ones in its order. More are
                made of its vertices, where it has the layout "vertices" and its networks have no BatchNorm.
            seed: of these further members.
            gpu: options of the GPU, where there is one.
            key: PEM file of the public key that the bundle must be signed with.

        Raises:
            UsageError: no thread, members that the bundle neither holds nor can make, a GPU that does not exist, or
                TF32 for a bundle that was not compared in it.
            ArtefactError: no bundle there, of an unknown format, or a graph that ONNX Runtime cannot open.
            CorruptError: a file is missing or has changed; it is named.
        """
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, not {threads}")
        bundle = Path(bundle)
        manifest = read_bundle(bundle, key)
        gpu = gpu or GpuOptions()
        threads, wanted = threads or available_cpus(), members or manifest.members
        whole = wanted == manifest.members
        together = whole and "merged" in _winners(manifest.tuning, threads).values() and MERGED in manifest.files
        ways = providers(gpu, _tf32(manifest, gpu), wanted + together)
        before = resident_memory(), _free(gpu)
        sessions = open_bundle(bundle, manifest, members, seed, ways)
        merged, fitted = None, None
        if together:
            merged = open_merged(bundle, manifest.layout, manifest.order, threads, ways)
        if whole and manifest.calibration:
            fitted = calibration.read(bundle / manifest.calibration, manifest.run.sha256, len(manifest.classes))
        scaled, device_id = manifest.input == "float", gpu.device_id or 0
        opened = Members(sessions, threads, manifest.image_shape, len(manifest.classes), scaled, merged, device_id)
        if gpu.device_id is not None and opened.device == "cpu":
            raise ArtefactError(
                f"ONNX Runtime cannot compute on GPU {gpu.device_id}; the log says why: install the CUDA libraries of "
                "its version (pip install 'onnxruntime-gpu[cuda,cudnn]'), free some of the GPU's memory, or leave out "
                "device_id to use the CPU"
            )
        return cls(manifest, artefact.sha256(bundle / artefact.MANIFEST), opened, threads, fitted, before, gpu)

    @staticmethod
    def check(bundle: Path, manifest: BundleManifest, members: int | None, gpu: GpuOptions) -> None:
        """Refuse options that a bundle cannot be opened with, before anything is opened.

        Raises:
            UsageError: as :meth:`load`.
        """
        check_members(bundle, manifest, manifest.members if members is None else members)
        tf32 = _tf32(manifest, gpu)
        if gpu.device_id is not None:
            providers(gpu, tf32, 1)

    @property
    def members(self) -> int:
        """M."""
        return len(self._members)

    def warm_up(self, largest: int | None = None) -> None:
        """Run every session once, so that no caller waits for it; then the runtime is ``ready``.

        On a GPU, at every batch size that batches are padded to, captured as a CUDA graph where that is faster.

        Args:
            largest: images of a batch, at most; by default, of a forward pass.
        """
        sizes = self._members.batches if self.device == "cuda" else [1]
        for size in [size for size in sizes if size < 2 * (largest or size)]:
            images = np.zeros((size, *self.manifest.image_shape), dtype=np.uint8)
            for strategy in set(self._members.strategies) - ({"loop"} if self.device == "cpu" else set()):
                self._members.ask(images, strategy)
            if self.device == "cuda":
                keep_faster_graphs(self._members, images, _CAPTURING)
        memory, free = self._before
        if (after := resident_memory()) is not None and memory is not None:
            self.memory = max(self.memory, after - memory)  # less, where freed memory was used again
        if self.device == "cuda" and free is not None and (left := _free(self.gpu)) is not None:
            self.gpu_memory = max(0, free - left)
        self.ready = True

    def __repr__(self) -> str:
        own = self.manifest
        size = " x ".join(map(str, own.image_shape))
        lines = [
            f"Runtime of {counted(self.members, 'member')} on {self.device}: {printable(own.method)} of "
            f"{printable(own.architecture)}, {own.precision}",
            f"  {printable(own.dataset)}: images {size}, {counted(len(own.classes), 'class', 'classes')}",
            f"  run {printable(own.run.name)}, exported {own.created}",
            "  calibrated" if self.calibration is not None else "  not calibrated",
        ]
        return "\n".join(lines)

    def strategy(self, batch: int) -> Strategy:
        """Return how a batch of this size is run through all members.

        The fastest at the nearest batch size (by ratio) where the bundle was tuned on a machine with as many CPUs, for
        as many members; else the first one: ``"sessions"`` on a CPU, ``"loop"`` on a GPU.
        """
        tuning, strategies = self.manifest.tuning, self._members.strategies
        winners = _winners(tuning, self.threads)
        if tuning is None or not winners or (tuning.members, tuning.device) != (self.members, self.device):
            return strategies[0]
        winner = winners[min(winners, key=lambda measured: abs(np.log(measured / batch)))]
        return winner if winner in strategies else strategies[0]

    def predict_members(self, images: object) -> NDArray[np.float32]:
        """Return each member's probabilities.

        Args:
            images: (B, H, W, 3), integers from 0 to 255; or floats from 0 to 1, where the bundle's input is float.

        Returns:
            (M, B, C) float32, rows with sum 1, in the order in which members are asked.

        Raises:
            ShapeError: other images.
        """
        checked = self._check(images)
        return self._ask(checked, 0, self.members)

    def predict(
        self, images: object, mode: Mode = "full", *, members: int | None = None, level: float = LEVEL
    ) -> Prediction:
        """Return the ensemble's prediction and its uncertainty.

        Args:
            images: see :meth:`predict_members`.
            mode: ``"full"`` asks every member; ``"exact"`` stops where the class can no longer change, so that the
                classes are those of all members; ``"confidence"`` stops where the members' spread makes the class
                probable enough. See :mod:`ensembler.serve.runtime.early_exit`.
            members: ask at most this many, in order; by default all.
            level: of ``"confidence"``, in (0, 1).

        Raises:
            ShapeError: other images.
            UsageError: an unknown mode, a level out of range, or a number of members that the runtime does not hold.
        """
        checked = self._check(images)
        members = self.members if members is None else members
        if not 1 <= members <= self.members:
            raise UsageError(
                f"this ensemble has {counted(self.members, 'member')}: ask from 1 to {self.members}, not {members}"
            )
        if mode == "full":
            asked, used = self._ask(checked, 0, members), np.full(len(checked), members)
        else:
            asked, used = self._until_settled(checked, mode, members, level)
        return predict(asked, used, self.members, self.manifest.classes)

    def close(self) -> None:
        """Stop the threads; the runtime cannot predict any more."""
        self.ready = False
        self._members.close()

    def _ask(self, images: NDArray[np.generic], first: int, last: int) -> NDArray[np.float32]:
        strategy = self.strategy(len(images))
        if strategy == "merged" and (first, last) != (0, self.members):
            strategy = self._members.strategies[0]
        found = self._members.ask(images, strategy, first, last)
        if not np.isfinite(found).all():  # no fault of the images, whose values are bounded
            raise ArtefactError("a member of this bundle answers with no number (NaN): train and export it again")
        return found

    def _until_settled(
        self, images: NDArray[np.generic], mode: Mode, members: int, level: float
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Probabilities (members, B, C), NaN where not asked, and how many members were asked for each image."""
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

    def _check(self, images: object) -> NDArray[np.generic]:
        if self.manifest.input == "float" and isinstance(images, np.ndarray) and images.dtype.kind == "f":
            return check_floats(images, self.manifest.image_shape)
        return check_images(images, self.manifest.image_shape)


def _winners(tuning: Tuning | None, threads: int) -> dict[int, Strategy]:
    """Batch size to strategy, where as many CPUs are available as on the machine that was measured."""
    return tuning.winners if tuning is not None and tuning.cpus == threads else {}


def _tf32(manifest: BundleManifest, gpu: GpuOptions) -> bool:
    """Whether a GPU computes products in TF32.

    Raises:
        UsageError: it is asked for, and the bundle was not compared in it.
    """
    if gpu.use_tf32 and manifest.precision != "tf32":
        raise UsageError(
            f"this bundle was exported in {manifest.precision} and not compared in TF32, whose products have 10 bits: "
            "leave out use_tf32, or export the run with --precision tf32 on a machine with a GPU"
        )
    return manifest.precision == "tf32" and gpu.use_tf32 is not False


def _free(gpu: GpuOptions) -> int | None:
    """Bytes of the GPU's memory that nobody uses."""
    memory = gpu_memory(gpu.device_id or 0)
    return None if memory is None else memory[0]
