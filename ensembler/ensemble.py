"""The ensemble: a network, vertices, and the coefficients of its members."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensembler import gaussian, task
from ensembler.arguments import checked
from ensembler.data import examples
from ensembler.data.examples import Examples
from ensembler.data.inputs import as_tensor, batches
from ensembler.device import choose_device, default_modes, limit_threads
from ensembler.errors import ShapeError, UsageError
from ensembler.networks.architectures import Factory
from ensembler.networks.batchnorm import has_batchnorm
from ensembler.networks.buffers import Start, member_buffers
from ensembler.networks.capture import on_stream
from ensembler.networks.members import MemberNetworks
from ensembler.prediction import Prediction, predict
from ensembler.progress import interactive, watching
from ensembler.run import Gaussians, Run
from ensembler.sampling import sample_coefficients
from ensembler.task import Classification, check_finite
from ensembler.text import echo

if TYPE_CHECKING:
    from ensembler.calibration import Calibration
    from ensembler.eval.evaluation import Evaluation
    from ensembler.uncertainty import Uncertainty

__all__ = ["Ensemble"]

# Numbers in a batch, 341 images of CIFAR's size, below which a forward pass takes longer to launch than to compute.
_CAPTURED = 2**20

_ROUNDING = 1e-3  # of the sum of a point's coefficients

_scratch = partial(TemporaryDirectory, prefix="ensembler-")


class Ensemble:
    """Members ``coefficients @ vertices`` of one network, ready to predict.

    All members of one network share one copy of it: each member's weights are written into it before its forward pass.
    A combination of different networks has one copy of each. Threads that predict with one ensemble take turns; a copy
    (``copy.deepcopy``, ``pickle``) has networks of its own.

    :meth:`predict` takes images of any kind, and all that it returns is NumPy; so are the uncertainties of
    :meth:`uncertainty`. For further work in PyTorch, :meth:`predict_outputs`, :meth:`predict_members` and
    :meth:`predict_proba` take and return tensors.

    Args:
        run: the trained run.
        device: ``"cpu"``, ``"cuda"``, ...; by default CUDA if available.
        batch_size: examples per forward pass; by default what suits the device and the image size.

    Attributes:
        run: the trained run.
        device: the device of the network.
        task: what the network's outputs mean.

    Raises:
        UsageError: there is no such device, ``batch_size < 1``, or the architecture computes with what no run holds.
    """

    @default_modes()
    @checked
    def __init__(self, run: Run, device: str | torch.device | None = None, batch_size: int | None = None) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self.run = run
        limit_threads()
        self.device = choose_device(device)
        record = run.manifest.dataset
        self.task = task.find(run.manifest.task)
        budget = (2048 if self.device.type == "cuda" else 64) * 3 * 32 * 32  # on a CPU, what fits into its cache
        self.batch_size = batch_size or max(1, budget // math.prod(record.shape))
        outputs = self.task.outputs(len(record.classes))
        self._kind = examples.find(record.kind)
        self._parts = [MemberNetworks(part, self.task, outputs, self.device) for part in run.networks]
        self._places = [(part, row) for part in self._parts for row in range(len(part.run.coefficients))]
        self._turn = RLock()  # a thread's, in which it writes members' weights into the networks

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy by what it is made of: its networks compute on views of one vector, which a copy would tear apart."""
        return type(self), (self.run, self.device, self.batch_size)

    @classmethod
    @checked
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        network: Factory | None = None,
    ) -> Ensemble:
        """Load an ensemble from a run's folder, and verify every byte.

        Args:
            path: the run's folder.
            device: as of the class.
            batch_size: likewise.
            network: what the run was trained with, where that was defined in a notebook or script; see
                :func:`ensembler.trainers.train`.

        Raises:
            ArtefactError: there is no run. CorruptError: a file of the run has changed. UsageError: the network cannot
                be imported and is not passed, or another one is, or it computes otherwise than when the run was made.
        """
        found = cls(Run.load(path, network), device, batch_size)
        found.check_networks()
        return found

    def __repr__(self) -> str:
        from ensembler.describe import lines

        return "\n".join([f"Ensemble on {self.device}", *(f"  {line}" for line in lines(self.run))])

    def _repr_html_(self) -> str:
        from ensembler.describe import run_html

        return run_html(self.run, f"Ensemble on {self.device}")

    @property
    def members(self) -> int:
        """Number of members, M."""
        return len(self._places)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in label order."""
        return tuple(self.run.manifest.dataset.classes)

    @checked
    def network(self, member: int) -> nn.Module:
        """Return the network with one member's weights and buffers, in evaluation mode.

        Members of one network are the same module every time: the next call, and every prediction, overwrites its
        weights.

        Raises:
            UsageError: there is no such member; they count from 0.
        """
        part, row = self._place(member)
        return part.network(row)

    @checked
    def run_of(self, member: int) -> Run:
        """Return the run of a member's network: one of the parts of a combination, else :attr:`run`.

        Raises:
            UsageError: as of :meth:`network`.
        """
        return self._place(member)[0].run

    @default_modes()
    def check_networks(self) -> None:
        """Refuse a network that computes otherwise than when the run was made.

        Raises:
            UsageError: its code or its arguments have changed.
        """
        with self._turn:
            for part in self._parts:
                part.check()

    @default_modes()
    def record_probes(self) -> None:
        """Note in the run's manifests what its networks compute, for :meth:`check_networks`."""
        with self._turn:
            for part in self._parts:
                part.run.manifest.probe = part.probe()

    def _place(self, member: int) -> tuple[MemberNetworks, int]:
        if not 0 <= member < self.members:
            raise UsageError(f"there is no member {member}: the {self.members} count from 0")
        return self._places[member]

    def predict(self, images: Any) -> Prediction:
        """Predict classes, probabilities and uncertainties, as NumPy arrays.

        Args:
            images: one image or several: a path or an image of Pillow, which are resized to the size of the training
                images; an array or tensor (H, W, 3) or (N, H, W, 3) uint8, of that size; a list of these; examples of
                a dataset, such as ``dataset.test``. Of another kind of data, its examples as one array or tensor.

        Returns:
            The ensemble's prediction for N images: their ``labels``, ``probabilities`` (N, C), ``predictive_entropy``
            (N,) and so on; see :class:`ensembler.prediction.Prediction`.

        Raises:
            UsageError: something else, or the ensemble is no classifier. ShapeError: no image, or an array of another
                shape or type. DataError: a file that cannot be read, or an array some of whose numbers are missing.
        """
        if not isinstance(self.task, Classification):
            raise UsageError(f"classes are predicted by classifiers, not by {self.task.name}: use predict_proba")
        shape, size = self.run.manifest.dataset.shape, 16 * self.batch_size
        parts = [self.predict_members(part).numpy() for part in batches(images, shape, size)]
        found = np.concatenate(parts, axis=1)
        used = np.full(found.shape[1], self.members)
        return predict(found, used, self.members, self.classes)

    def predict_outputs(
        self, x: Tensor | NDArray[np.generic], vary: Callable[[int, Tensor], Tensor] | None = None
    ) -> Tensor:
        """Predict each member's raw outputs; for a classifier, its logits.

        Args:
            x: stored examples: images (B, H, W, 3) uint8, or rows of features (B, F) float. For images also normalised
                inputs (B, 3, H, W) float.
            vary: from a member and ``x`` to what this member sees instead, of the same shape and type.

        Returns:
            (M, B, O) float32 on the CPU.

        Raises:
            ShapeError: ``x``, or what ``vary`` makes of it, has another shape or type, or floats that are pixels rather
                than normalised inputs. UsageError, DataError: as of :func:`ensembler.data.inputs.as_tensor`.
            DivergedError: a member answers with NaN or infinity.
        """
        x = as_tensor(x)
        record = self.run.manifest.dataset
        stored = self._kind.check(x, record.shape, record.mean, record.std)
        x, result = x.to(self.device), torch.empty(0)  # once for all members
        captured = self._captures and x[: self.batch_size].numel() <= _CAPTURED
        with self._turn, torch.no_grad(), on_stream(self.device) if captured else nullcontext():
            for member in range(self.members):
                self.network(member)
                predict = self._places[member][0].outputs
                seen = x if vary is None else vary(member, x)
                if not isinstance(seen, Tensor) or (seen.shape, seen.dtype) != (x.shape, x.dtype):
                    raise ShapeError(f"vary must return a tensor of {tuple(x.shape)} {x.dtype}, as it is given")
                for start in range(0, max(1, len(x)), self.batch_size):
                    part = slice(start, start + self.batch_size)
                    outputs = predict(seen[part], stored, captured)
                    if not start and not member:
                        result = torch.empty(
                            self.members, len(x), *outputs.shape[1:], dtype=torch.float32, device=self.device
                        )
                    result[member, part] = outputs
            result = result.cpu()
        for member, outputs in enumerate(result):
            check_finite(outputs, f"member {member + 1}")
        return result

    @property
    def _captures(self) -> bool:
        """Whether the forward pass of a small batch is captured as a CUDA graph: on a GPU, outside autocast."""
        return self.device.type == "cuda" and not torch.is_autocast_enabled("cuda")

    def predict_members(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Predict each member's distribution; for a classifier, its probabilities.

        Takes the same arguments as :meth:`predict_outputs`, and raises the same errors.

        Returns:
            (M, B, C) float32 on the CPU, rows with sum 1.
        """
        return self.task.distribution(self.predict_outputs(x))

    def predict_proba(self, x: Tensor | NDArray[np.generic]) -> Tensor:
        """Predict the ensemble's distribution; for classifiers, the mean (B, C) of the members' probabilities.

        Takes the same arguments as :meth:`predict_members`.
        """
        return self.task.combine(self.predict_members(x))

    def uncertainty(self, x: Tensor | NDArray[np.generic]) -> Uncertainty:
        """Compute each example's entropies, mutual information and disagreement; see :mod:`ensembler.uncertainty`."""
        from ensembler.uncertainty import uncertainty

        return uncertainty(self.predict_members(x).numpy())

    @checked
    def evaluate(
        self,
        shift: str | Sequence[str] | None = None,
        ood: str | Sequence[str] | None = None,
        examples: int | None = None,
        *,
        dataset: Any = None,
        quiet: bool = False,
        **options: Any,
    ) -> Evaluation:
        """Score the ensemble on its test images, under shift and out of distribution, as ``ensembler eval`` does.

        Args:
            shift: other test images of the same classes, such as ``"cifar10c"``.
            ood: out-of-distribution images, such as ``"noise:gaussian"``.
            examples: number of test images; all by default.
            dataset: what the run was trained on, or its name now, where it has no name to load it by; see
                :func:`ensembler.as_dataset`.
            quiet: show no progress; see :func:`ensembler.progress.interactive`.
            **options: of :class:`ensembler.eval.options.EvaluationOptions`.

        Returns:
            The scores, as ``report``; a notebook shows its tables and figures.

        Raises:
            EnsemblerError: as of :func:`ensembler.eval.evaluation.evaluate_paths`.
        """
        from ensembler.eval.evaluation import evaluate_paths
        from ensembler.eval.options import EvaluationOptions

        given = {"shift": shift, "ood": ood, "examples": examples, **self._computed, **options}
        with _scratch() as scratch, watching(quiet or not interactive(), unit="images") as watch:
            found = EvaluationOptions(**given | self._kept(scratch))
            return evaluate_paths(self._folder(scratch), found, dataset=dataset, watch=watch, network=self._network)

    @checked
    def calibrate(self, *, dataset: Any = None, quiet: bool = False, **options: Any) -> Calibration:
        """Fit and store the run's calibration, prediction sets and abstention, as ``ensembler calibrate`` does.

        Args:
            dataset: as of :meth:`evaluate`.
            quiet: show no progress.
            **options: of :class:`ensembler.eval.options.CalibrationOptions`, such as ``alpha=0.05``.

        Returns:
            What was fitted, which :mod:`ensembler.calibration` applies, and an export takes along.

        Raises:
            UsageError: the run is not saved, as its calibration is kept beside it.
            EnsemblerError: as of :func:`ensembler.eval.calibrate.calibrate`.
        """
        from ensembler import calibration
        from ensembler.eval.calibrate import calibrate
        from ensembler.eval.options import CalibrationOptions

        path = self.run.path
        if path is None or not self.run.is_at(path):
            raise UsageError("a calibration is kept beside its run: save this one first, run.save('runs/NAME')")
        with _scratch() as scratch, watching(quiet or not interactive(), unit="images") as watch:
            given = CalibrationOptions(**self._computed | options | self._kept(scratch))
            found = calibrate(path, given, dataset=dataset, watch=watch, network=self._network)
        calibration.save(found, path)
        return found

    @checked
    def export(self, out: str | Path, *, quiet: bool = False, **options: Any) -> Path:
        """Export the members to ONNX, each compared with PyTorch, as ``ensembler export`` does.

        Args:
            out: the bundle's folder; must not exist.
            quiet: do not say which steps were left out, and why.
            **options: of :func:`ensembler.serve.export_run`, such as ``layout="single"`` or ``dataset=data``.

        Returns:
            ``out``, for :meth:`ensembler.serve.Runtime.load` and ``ensembler serve``.

        Raises:
            EnsemblerError: as of :func:`ensembler.serve.export_run`.
        """
        from ensembler.serve import export_run

        given: dict[str, Any] = {"say": lambda text: None if quiet else echo(text, err=True), "network": self._network}
        with _scratch() as scratch:
            return export_run(self._folder(scratch), out, **given | options)

    @property
    def _computed(self) -> dict[str, Any]:
        """How predictions are made, as options."""
        return {"device": str(self.device), "batch_size": self.batch_size}

    @property
    def _network(self) -> Factory | None:
        """What builds the networks that cannot be imported.

        Raises:
            UsageError: several, which a combination cannot be given.
        """
        found = {part.network for part in self.run.networks if part.network is not None}
        if len(found) > 1:
            raise UsageError("this run combines several networks that cannot be imported: define them in a module")
        return next(iter(found), None)

    def _folder(self, scratch: str) -> Path:
        """Return the run's folder; of members that are not saved, one in a temporary folder."""
        run = self.run
        if run.path is not None and run.is_at(run.path):
            return run.path
        return replace(run, manifest=run.manifest.model_copy()).save(Path(scratch, run.manifest.method))

    def _kept(self, scratch: str) -> dict[str, Any]:
        """Where predictions are kept, as an option: temporarily, if the network's code cannot be read."""
        return {} if self._network is None else {"cache": Path(scratch, "predictions")}

    @default_modes()
    @checked
    def sample(self, members: int, seed: int = 0, train: Examples | None = None) -> Ensemble:
        """Draw an ensemble of new members from the same simplexes or Gaussians.

        With the run's own seed, the members drawn from Gaussians are the run's.

        Args:
            members: M >= 1.
            seed: of the draw.
            train: the training examples, from which BatchNorm statistics are recomputed for every new member; by
                default the run's dataset is loaded from its default folder.

        Raises:
            UsageError: the run's members are fixed (a deep ensemble, snapshots), or ``members < 1``.
        """
        sampling = self.run.manifest.sampling
        if sampling is None:
            raise UsageError(f"the members of a run by {self.run.manifest.method} are fixed: nothing to sample from")
        if isinstance(sampling, Gaussians):
            return self._drawn(sampling.scale, members, seed, train)
        return self.at(sample_coefficients(sampling, self.run.coefficients.shape[1], members, seed), train)

    @default_modes()
    @checked
    def at(self, coefficients: Tensor | NDArray[np.floating[Any]], train: Examples | None = None) -> Ensemble:
        """Return an ensemble with other coefficients of the same vertices: any points of their affine span.

        Each point takes over the buffers of the member whose coefficients are nearest; where they are the same, to the
        bit, else as in :mod:`ensembler.networks.buffers`.

        Args:
            coefficients: (M, K), M >= 1; rows with sum 1, to a thousandth.
            train: the training examples, from which BatchNorm statistics are recomputed for every member; by default
                the run's dataset is loaded from its default folder.

        Raises:
            ShapeError: the coefficients have another shape, or rows with another sum.
        """
        self.run.check_one_network("for a point between them")
        count, coefficients = self.run.coefficients.shape[1], as_tensor(coefficients).float()
        if coefficients.dim() != 2 or not len(coefficients) or coefficients.shape[1] != count:
            shape = tuple(coefficients.shape)
            raise ShapeError(f"expected coefficients (M, {count}) with M >= 1, found {shape}")
        for number, row in enumerate(coefficients.double()):
            if not (row.sum() - 1).abs() <= _ROUNDING * row.abs().max().clamp_min(1):  # NaN is refused, too
                raise ShapeError(f"the coefficients of point {number} have the sum {row.sum():g}, and must have 1")
        return self._moved(self.run, self._parts[0].vertices, coefficients, self._starts(coefficients), train)

    def _drawn(self, scale: float, members: int, seed: int, train: Examples | None) -> Ensemble:
        """Return an ensemble of members drawn from the run's Gaussians, with the buffers of their own members."""
        run, weights = self.run, self._parts[0].weights
        drawn = replace(run, vertices=gaussian.draw(run.gaussians, scale, members, seed))
        S = len(next(iter(run.gaussians.values())))
        places = [m % S % len(run.coefficients) for m in range(members)]
        starts: list[Start] = [({name: rows[place] for name, rows in run.buffers.items()}, False) for place in places]
        return self._moved(drawn, weights.flatten(drawn.vertices), torch.eye(members), starts, train)

    def _moved(
        self, run: Run, vertices: Tensor, coefficients: Tensor, starts: Sequence[Start], train: Examples | None
    ) -> Ensemble:
        """Return an ensemble of other members of the same network; arguments as of :func:`member_buffers`.

        ``run`` holds the vertices.
        """
        record, (part,) = run.manifest.dataset, self._parts
        if train is None and not all(own for _, own in starts) and has_batchnorm(part.weights.module):
            train = record.load().train
        with self._turn:
            found = member_buffers(part.weights, vertices, coefficients, train, record, starts)
        buffers = {name: rows.cpu() for name, rows in found.items()}
        sizes = {"vertices": len(vertices), "members": len(coefficients), "files": {}, "probe": []}
        manifest = run.manifest.model_copy(update=sizes)
        moved = replace(run, manifest=manifest, coefficients=coefficients, buffers=buffers, path=None)
        return Ensemble(moved, self.device, self.batch_size)

    def _starts(self, coefficients: Tensor) -> list[Start]:
        """Return what the buffers of each point (M, K) start from: those of the nearest member."""
        members, starts = self.run.coefficients, list[Start]()
        for row in coefficients.cpu():
            nearest = int((members.double() - row.double()).square().sum(dim=1).argmin())
            buffers = {name: rows[nearest] for name, rows in self.run.buffers.items()}
            starts.append((buffers, torch.equal(members[nearest], row)))
        return starts
