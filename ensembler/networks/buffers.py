"""The buffers of members that were not trained themselves: which are carried, and which are recomputed.

A member is everything in the network's state dict. Parameters are points of weight space; buffers are not, and no
average of them has a meaning. So:

- A point that is a trained network (a solution, a snapshot, a curve's end) keeps all buffers that it was trained with.
- At any other point, what training would have updated by itself is recomputed for the point's own weights: the running
  statistics of BatchNorm and InstanceNorm from training images, the vectors of spectral norm by power iteration.
- All other buffers (pruning masks, frozen statistics, the network's own) are carried from the trained network that the
  point was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ensembler.data.examples import Examples
from ensembler.device import restored_generators, upload
from ensembler.errors import UsageError
from ensembler.networks import batchnorm
from ensembler.networks.batchnorm import has_batchnorm, keeping_modes
from ensembler.run import DatasetRecord
from ensembler.seeds import generator
from ensembler.weights import FlatWeights

__all__ = ["BATCHNORM_EXAMPLES", "Start", "member_buffers", "own_statistics", "recomputed"]

BATCHNORM_EXAMPLES = 8192  # enough for a channel's mean and variance; all images could cost more than the training

_BATCHNORM_BATCH = 128  # on any device: it decides by which means and variances the layers before are normalised
_POWER_ITERATIONS = 15  # as torch's own when it makes the vectors

Start = tuple[Mapping[str, Tensor], bool]
"""A point's buffers before anything is recomputed, and whether they are its own, so that nothing is."""


def member_buffers(
    weights: FlatWeights,
    vertices: Tensor,
    coefficients: Tensor,
    train: Examples | None,
    record: DatasetRecord,
    starts: Sequence[Start],
) -> dict[str, Tensor]:
    """Compute the buffers of members.

    A point between two solutions has activations that the statistics of neither describe (Izmailov et al. 2018, sec.
    3.2; Garipov et al. 2018). So each member's statistics are averaged over :data:`BATCHNORM_EXAMPLES` training
    examples, augmented as in training: without augmentation, a ResNet-20 lost 5 points of accuracy. The network's
    weights and buffers are overwritten.

    Args:
        weights: the network.
        vertices: (K, P).
        coefficients: (M, K).
        train: the training examples; ``None`` is enough where no BatchNorm statistics are recomputed.
        record: their normalisation and augmentation.
        starts: M, see :data:`Start`.

    Returns:
        Buffer name to (M, ...), on the network's device; empty for a network without buffers.

    Raises:
        UsageError: BatchNorm statistics are to be recomputed, and ``train`` is ``None``.
    """
    if train is not None:
        # Shuffled, because files are often sorted by class, and the variance within one class is too small.
        train = train.part(torch.randperm(len(train), generator=generator(0, "batchnorm"))[:BATCHNORM_EXAMPLES])
    rows: list[dict[str, Tensor]] = []
    for row, (buffers, own) in zip(coefficients.to(vertices.device), starts, strict=True):
        torch.mv(vertices.T, row, out=weights.vector)
        weights.load_buffers(buffers)
        if not own:
            _iterate(weights.module)
            if has_batchnorm(weights.module):
                if train is None:
                    raise UsageError(
                        "new members of a network with BatchNorm need its training images: give the dataset"
                    )
                batchnorm.recompute(weights.module, _inputs(train, record, vertices.device))
        rows.append(weights.buffers())
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}


def recomputed(network: nn.Module) -> set[str]:
    """Return the names of the buffers that are recomputed at points that were not trained."""
    found = {name for names, _ in _spectral_norms(network) for name in names}
    for name, layer in batchnorm.layers(network).items():
        found |= {f"{name}.{own}".lstrip(".") for own, _ in layer.named_buffers(recurse=False)}
    return found


def own_statistics(weights: FlatWeights, train: Examples, record: DatasetRecord) -> list[str]:
    """Return the names of buffers that look like a network's own running statistics, which are carried.

    They are of floating point, have a dimension, change in a forward pass in training mode, and are not recomputed. The
    network's weights and buffers stay as they are.

    Args:
        weights: the network.
        train: training examples, of which some are used.
        record: their normalisation and augmentation.
    """
    network, before = weights.module, weights.buffers()
    names = {name for name, tensor in before.items() if tensor.is_floating_point() and tensor.dim()}
    if not (names := names - recomputed(network)):
        return []
    with keeping_modes(network), restored_generators(), torch.no_grad():
        network.train()
        few = train.part(torch.arange(min(8, len(train))))
        network._call_impl(next(_inputs(few, record, weights.vector.device)))  # type: ignore[no-untyped-call]
    after = weights.buffers()
    weights.load_buffers(before)
    return sorted(name for name in names if not torch.equal(before[name], after[name]))


def _iterate(network: nn.Module) -> None:
    """Bring the vectors of spectral norm, by power iteration, to those of the network's present weights."""
    norms = _spectral_norms(network)
    with keeping_modes(network), torch.no_grad():
        network.train()
        for _, step in norms:
            for _ in range(_POWER_ITERATIONS):
                step()


def _spectral_norms(network: nn.Module) -> list[tuple[list[str], Callable[[], object]]]:
    """Return, for each spectral norm that training updates, its vectors' names and one power iteration in training."""
    found: list[tuple[list[str], Callable[[], object]]] = []
    with keeping_modes(network):
        network.train()
        for name, module in network.named_modules():
            prefix = f"{name}." if name else ""
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, SpectralNorm) and module.training:
                    step = partial(hook.compute_weight, module, do_power_iteration=True)
                    found.append(([f"{prefix}{hook.name}_u", f"{prefix}{hook.name}_v"], step))
            chains = module.parametrizations if parametrize.is_parametrized(module) else {}
            for tensor, chain in chains.items():
                for place, norm in enumerate(chain):
                    if isinstance(norm, _SpectralNorm) and norm.training:
                        own = [f"{prefix}parametrizations.{tensor}.{place}.{each}" for each, _ in norm.named_buffers()]
                        found.append((own, partial(getattr, module, tensor)))
    return found


def _inputs(train: Examples, record: DatasetRecord, device: torch.device) -> Iterator[Tensor]:
    """Return training inputs in batches of nearly equal size, because all batches have equal weight.

    What is drawn goes to the device once, so that no batch waits for the host.
    """
    stream = generator(0, "batchnorm augmentation")
    prepare, home = train.inputs(record.mean, record.std, device), train.labels.device
    order, batches = torch.arange(len(train)), -(-len(train) // _BATCHNORM_BATCH)
    drawn = [train.draw(record.augmentation, len(index), stream) for index in order.tensor_split(batches)]
    choices = upload(torch.cat(drawn), home).tensor_split(batches)
    pairs = zip(upload(order, home).tensor_split(batches), choices, strict=True)
    return (prepare(upload(train.augmented(i, record.augmentation, own).data, device)) for i, own in pairs)
