"""One network on its device, into which the weights and buffers of each member are written before its forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ensembler.data import examples
from ensembler.errors import UsageError
from ensembler.networks.capture import Captured, CudaGraph
from ensembler.networks.checks import NetworkChecks
from ensembler.networks.dropout import fix_masks
from ensembler.run import Run
from ensembler.seeds import generator
from ensembler.task import Task
from ensembler.weights import FlatWeights

__all__ = ["MemberNetworks"]

_PROBED = 8  # outputs that a run records
_SAME = 5e-2  # of the largest of them: far more than what rounding changes, on a GPU also in TF32
_GRAPHS = 8  # shapes of batches that have one; each holds memory


class MemberNetworks:
    """The members of one network.

    Attributes:
        run: theirs.
        weights: the network, in evaluation mode.
        vertices: (K, P) on its device.
        inputs: from stored examples to the network's inputs.
    """

    def __init__(self, run: Run, kind: Task, outputs: int, device: torch.device) -> None:
        record = run.manifest.dataset
        self.run = run
        self.inputs = examples.find(record.kind).inputs(record.mean, record.std, device)
        network = self._build(kind, outputs, device)
        fix_masks(network, run.buffers)
        self.weights = FlatWeights(network)
        self.weights.load_frozen(run.frozen)
        self.vertices = self.weights.flatten(run.vertices)
        self._coefficients = run.coefficients.to(device)
        self._buffers = {name: rows.to(device) for name, rows in run.buffers.items()}
        self._forget([])

    def network(self, row: int) -> nn.Module:
        """Return the network with one member's weights and buffers."""
        torch.mv(self.vertices.T, self._coefficients[row], out=self.weights.vector)
        self.weights.load_buffers({name: rows[row] for name, rows in self._buffers.items()})
        return self.weights.module

    def outputs(self, x: Tensor, stored: bool, captured: bool) -> Tensor:
        """Compute the outputs (B, O) of the network as it is, valid until the next call.

        Args:
            x: stored examples, or inputs of the network.
            stored: which of them.
            captured: whether a CUDA graph may be captured and replayed for this shape.
        """
        modes = [module.training for module in self.weights.module.modules()]
        if modes != self._modes:  # a graph has those of its capture
            self._forget(modes)
        key = stored, x.shape, x.dtype, x.stride()
        if not captured or (key not in self._outputs and len(self._outputs) == _GRAPHS):
            return self._forward(x, stored)
        self._graphs(stored, x)
        return self._outputs[key]

    def probe(self) -> list[float]:
        """Return what the first member answers to noise: the first outputs for each of two images."""
        if (x := self._noise(self.vertices.device)) is None:
            return []
        self.network(0)
        with torch.no_grad():
            outputs = self._forward(x, stored=False)[:, :_PROBED].float()
        found: list[float] = outputs.nan_to_num(0, 0, 0).flatten().tolist()  # JSON has no infinite logits
        return found

    def check(self) -> None:
        """Refuse a network that computes otherwise than when the run was made: its weights alone do not say so.

        Raises:
            UsageError: the first member's :meth:`probe` is not the manifest's.
        """
        manifest = self.run.manifest
        expected = torch.tensor(manifest.probe)
        if not len(expected):
            return
        found = torch.tensor(self.probe())
        if not torch.allclose(found, expected, rtol=0, atol=_SAME * max(1e-3, expected.abs().max().item())):
            raise UsageError(
                f"the network {manifest.architecture} computes otherwise than when the run was made, with the same "
                "weights: give it the code and the arguments of then, or train again"
            )

    def _forget(self, modes: list[bool]) -> None:
        """Begin without graphs, for a network in these modes."""
        self._modes, self._outputs = modes, dict[object, Tensor]()
        self._graphs = Captured(self._store, _unsaid, CudaGraph)

    def _store(self, stored: int, x: Tensor) -> None:
        """Leave the outputs where :meth:`outputs` finds them; a graph leaves them at the same address every time."""
        self._outputs[stored, x.shape, x.dtype, x.stride()] = self._forward(x, bool(stored))

    def _forward(self, x: Tensor, stored: bool) -> Tensor:
        outputs: Tensor = self.weights.module(self.inputs(x) if stored else x.float())
        return outputs

    def _build(self, kind: Task, outputs: int, device: torch.device) -> nn.Module:
        """Build the network in evaluation mode and in the run's memory format, or in the one that it can.

        A user's own network is checked: its module may have changed, or the run may come from elsewhere.
        """
        manifest = self.run.manifest
        checks = NetworkChecks(manifest.architecture, kind, outputs, self.run.network)
        return checks.built(manifest.settings.get("memory_format"), self._noise(device), device)

    def _noise(self, device: torch.device) -> Tensor | None:
        """Return inputs made of two images of noise; ``None`` for data of a user's own kind."""
        record = self.run.manifest.dataset
        pixels = torch.randint(0, 256, (2, *record.shape), dtype=torch.uint8, generator=generator(0, "probe"))
        return self.inputs(pixels.to(device)) if record.kind in ("images", "arrays") else None


def _unsaid(reason: str) -> None:
    """Say nothing: what cannot be captured gives the same predictions."""
