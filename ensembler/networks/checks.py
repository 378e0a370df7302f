"""What a network must do to be trained, stored and evaluated here; whatever it does not is said in one sentence.

The checks run a network on a few examples: before the first epoch (:mod:`ensembler.trainers.dry_pass`), and when an
ensemble of a user's own network is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ensembler.device import restored_generators, seed_generators
from ensembler.errors import ShapeError, UsageError
from ensembler.naming import reason
from ensembler.networks import architectures
from ensembler.networks.architectures import Factory, MemoryFormat
from ensembler.networks.unheld import differences, unheld
from ensembler.task import Classification, Task, not_finite
from ensembler.weights import FlatWeights

__all__ = ["NetworkChecks"]

_NOISE = 0.02  # added to the weights: a head that starts at zero would give one answer to everything
_SAME, _SAME_ON_GPU = 1e-5, 1e-3  # relative differences that rounding explains in the same computation,
_SIMILAR = 2e-2  # and in one of another batch or memory format, which may multiply with 8 bits
_SIZES = ("size", "height", "width", "shape", "small", "dimension")


@dataclass(frozen=True)
class NetworkChecks:
    """Checks of one architecture. Each raises :class:`UsageError` with one sentence.

    Attributes:
        name: the architecture's.
        task: what its outputs mean.
        outputs: O, the number of outputs that the task needs.
        factory: what builds the network, where its name does not; see :func:`ensembler.networks.architectures.build`.
    """

    name: str
    task: Task
    outputs: int
    factory: Factory | None = None

    def build(self, seed: int, memory_format: MemoryFormat) -> nn.Module:
        """Build the network; see :func:`ensembler.networks.architectures.build`."""
        return architectures.build(self.name, self.outputs, seed, memory_format, self.factory)

    def ownership(self, network: nn.Module) -> None:
        """Refuse weights that PyTorch does not find: layers in a plain list, tensors with gradients as attributes."""
        for path, value in unheld(network).items():
            if isinstance(value, Tensor) and value.requires_grad and value.is_leaf:
                raise UsageError(
                    f"{self.name} holds the weights {path!r} {tuple(value.shape)} where PyTorch does not find them, so "
                    "they would be neither trained nor stored: use nn.Parameter, nn.ModuleList or nn.ParameterList"
                )

    def run(self, network: nn.Module, x: Tensor, mode: str = "") -> Tensor:
        """Return the outputs (B, O) of a network for inputs (B, ...).

        Refuses a network that fails, changes its inputs, calls layers that it does not own, or returns anything else.

        Args:
            network: in the mode that is to be checked.
            x: the inputs.
            mode: ``" in training mode"``, or nothing, for the message.
        """
        with _watched(network, x) as watch:
            try:
                found = network(x)
            except Exception as error:  # whatever a user's code raises
                raise UsageError(self._failure(network, x, mode, watch, error)) from error
            watch.look()
        if watch.foreign is not None:
            raise UsageError(
                f"{self.name} calls a layer in forward that is none of its own, {_short(watch.foreign)}, which would "
                "be neither trained nor stored: make it in __init__, as an attribute or in an nn.ModuleList"
            )
        if watch.changed is not None:
            where = f"in its layer {watch.changed!r}" if watch.changed else "in its forward"
            raise UsageError(
                f"{self.name} changes the tensor that it is given ({where}), so that the next member would be given "
                "another one: use no operation in place there (inplace=False), or begin with x = x.clone()"
            )
        self._check_outputs(network, found, len(x), mode)
        result: Tensor = found
        return result

    def finite(self, outputs: Tensor, mode: str) -> None:
        """Refuse outputs (B, O) of the network's own first weights that are not finite; ``-inf`` is a logit.

        Args:
            outputs: of :meth:`run`.
            mode: ``" in training mode"`` or ``" in evaluation mode"``, for the message.
        """
        if not_finite(outputs):
            raise UsageError(
                f"{self.name} returns numbers that are not finite (NaN or infinity){mode}, before it is trained: look "
                "in its forward for a division by zero, a logarithm or root of what is not positive, or a row of "
                "attention that is masked whole"
            )

    def answers(self, network: nn.Module, x: Tensor, memory_format: MemoryFormat) -> None:
        """Check that answers in evaluation mode depend on the weights and on the image alone.

        Refuses dropout that is always on, statistics of the batch, and whatever no run holds: the network is built
        again with another seed, and given the same weights and buffers. Small random numbers are added to its weights.

        Args:
            network: with weights of its own; it is brought into evaluation mode.
            x: inputs (B, ...).
            memory_format: the network's.
        """
        network.eval()
        same = _SAME if x.device.type == "cpu" else _SAME_ON_GPU
        weights = FlatWeights(network)
        with restored_generators(), torch.no_grad():
            self.finite(self.run(network, x), " in evaluation mode")
            seed_generators(1)
            weights.vector += _NOISE * torch.randn(len(weights)).to(weights.vector)
            seed_generators(2)
            answers, buffers = self.run(network, x).float(), weights.buffers()
            seed_generators(3)
            if _differ(answers, self.run(network, x).float(), same):
                raise UsageError(
                    f"{self.name} answers the same images differently each time in evaluation mode"
                    f"{_each_time(network, _changed(buffers, weights.buffers()))}"
                )
            if len(x) > 1 and _differ(answers[:1], self.run(network, x[:1]).float(), _SIMILAR):
                raise UsageError(
                    f"{self.name} answers an image differently alone than beside another one in evaluation mode"
                    f"{_batch_statistics(network)}"
                )
            builds: list[tuple[int, MemoryFormat, float]] = [(1, memory_format, same)]
            if self._users_own:
                builds.append((2, "contiguous", same if memory_format == "contiguous" else _SIMILAR))
            for seed, own_format, tolerance in builds:
                other = self._rebuilt(weights, seed, own_format).to(x.device)
                other.eval()
                if _differ(answers, self.run(other, x).float(), tolerance):
                    raise UsageError(self._not_held(network, other))

    def built(self, memory_format: MemoryFormat | None, x: Tensor | None, device: torch.device) -> nn.Module:
        """Build the network in evaluation mode on a device, and check it where it is a user's own.

        Args:
            memory_format: of the network; by default channels-last where the network can.
            x: inputs (B, ...) to try it on, if there are any.
            device: of the network.
        """
        chosen = memory_format or "channels-last"
        network = self.build(0, chosen).to(device)
        network.eval()
        if x is None or not (self._users_own or memory_format is None):
            return network
        try:
            with torch.no_grad():
                self.answers(network, x, chosen) if self._users_own else self.run(network, x)
        except UsageError:
            if memory_format:
                raise
            return self.built("contiguous", x, device)
        return network

    @property
    def _users_own(self) -> bool:
        """Whether the network is none of this package, torchvision or timm."""
        return self.name.partition(":")[0] not in ("torchvision", "timm", self.name)

    def _rebuilt(self, weights: FlatWeights, seed: int, memory_format: MemoryFormat) -> nn.Module:
        """Return the network as a run gives it back: built again, with the same weights and buffers."""
        other = self.build(seed, memory_format)
        if {id(each) for each in other.parameters()} & {id(each) for each in weights.module.parameters()}:
            raise UsageError(
                f"{self.name} returns the same network at every call, but every member needs its own: build a new one"
            )
        try:
            own = FlatWeights(other)
            own.vector.copy_(own.flatten(weights.unflatten(weights.vector[None]))[0])
            own.load_frozen(weights.frozen())
            own.load_buffers(weights.buffers())
        except (ShapeError, RuntimeError) as error:
            said = str(error).removesuffix(": these weights are another architecture's")
            raise UsageError(
                f"{self.name} builds another network each time, or changes its layers as it runs ({said}): every call "
                "must make the same parameters and buffers in __init__"
            ) from error
        return other

    def _not_held(self, network: nn.Module, other: nn.Module) -> str:
        """The sentence for a network whose state dict does not decide its answers."""
        found = differences(network, other)
        if not found:
            return (
                f"{self.name} answers differently when it is built again and given the same weights and buffers: "
                "whatever decides its answers must be a parameter or a buffer, or the same in every process"
            )
        path, value = next(iter(found.items()))
        size = f" {tuple(value.shape)}" if getattr(value, "shape", ()) else ""
        names = {name for name, _ in network.named_buffers()}
        own = path.rpartition(".")[2]
        call = f'self.register_buffer("{own}", ...)' if own.isidentifier() else "self.register_buffer"
        mend = "persistent=True" if path in names else call
        return (
            f"{self.name} computes with {path!r}{size}, which no run would hold, and which is another one each time "
            f"that the network is built or run: make it part of the state dict, with {mend}"
        )

    def _failure(self, network: nn.Module, x: Tensor, mode: str, watch: _Watch, error: Exception) -> str:
        """The sentence for a network that raises an error."""
        names, text = {id(module): name for name, module in network.named_modules()}, str(error)
        layer = next((each for each in reversed(watch.stack) if names.get(id(each))), None)
        where = f" in its layer {names[id(layer)]!r}, {_short(layer)}" if layer is not None else ""
        if "view size is not compatible" in text:
            mend = "use reshape instead of view, or --memory-format contiguous"
        elif "more than 1 value per channel" in text:
            many = "its BatchNorm needs two images or more at a time: choose a larger --batch-size"
            mend = many if mode else "an answer must depend on its image alone, so leave out track_running_stats=False"
        elif not mode and len(x) == 1:  # it took two
            mend = "it must take a batch of any size, also of one"
        elif isinstance(layer, _ConvNd) and "channels" in text:
            mend = f"give its first layer {x.shape[1]} input channels"
        elif x.dim() == 4 and ("multiplied" in text or any(word in text.lower() for word in _SIZES)):
            size = f"{x.shape[2]} x {x.shape[3]}"
            mend = f"it may be made for another size: give that by --image-size, or build it for {size}"
        else:
            mend = f"it must take a float32 tensor of this shape, {tuple(x.shape)}"
        return f"{self.name} cannot take inputs {_batch(x.shape, len(x))}{mode}{where}: {reason(error)}: {mend}"

    def _check_outputs(self, network: nn.Module, found: Any, examples: int, mode: str) -> None:
        """Refuse whatever is no tensor (B, O) of logits."""
        wanted = f"expected {_batch((examples, self.outputs), examples)}"
        if not isinstance(found, Tensor):
            aux = getattr(network, "aux_logits", False) is True
            mend = "build it with aux_logits=False" if aux else f"return the logits alone{_which(found, self.outputs)}"
            raise UsageError(f"{self.name} returns {_described(found, examples)}{mode}, {wanted}: {mend}")
        if not found.is_floating_point():
            kind = str(found.dtype).removeprefix("torch.")
            raise UsageError(f"{self.name} returns numbers of type {kind}{mode}, expected float32: return the logits")
        shape = tuple(found.shape)
        if shape != (examples, self.outputs):
            raise UsageError(
                f"{self.name} returns {_batch(shape, examples)}{mode * (examples == 1)}, {wanted}: "
                + _mend_shape(shape, examples, self.outputs)
            )
        if isinstance(self.task, Classification) and _are_probabilities(found):
            raise UsageError(
                f"{self.name} returns probabilities{mode}, expected logits: leave out the softmax at its end, which "
                "the loss and the predictions apply themselves"
            )
        if isinstance(self.task, Classification) and type(found.grad_fn).__name__ == "SigmoidBackward0":
            raise UsageError(
                f"{self.name} returns what a sigmoid gives, numbers from 0 to 1, expected logits: leave out the "
                "sigmoid at its end, for the loss and the predictions apply softmax themselves"
            )


@dataclass
class _Watch:
    """What happens in a forward pass.

    Attributes:
        network: whose.
        x: its inputs.
        stack: the layers that were entered and not left.
        foreign: the first layer with weights that is not the network's.
        changed: name of the layer that changed ``x`` in place, empty for the network itself.
    """

    network: nn.Module
    x: Tensor
    stack: list[nn.Module] = field(default_factory=list)
    foreign: nn.Module | None = None
    changed: str | None = None

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.network.named_modules()}
        self._version, self._thread = self.x._version, get_ident()

    def _is_other_thread(self) -> bool:
        """Whether another network computes: PyTorch calls these hooks for all modules of the process."""
        return get_ident() != self._thread

    def enter(self, module: nn.Module, inputs: Any) -> None:
        if self._is_other_thread():
            return
        self.look()
        self.stack.append(module)
        if self.foreign is None and id(module) not in self._names and module.state_dict():
            self.foreign = module

    def leave(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._is_other_thread():
            return
        self.look()
        while self.stack and self.stack.pop() is not module:
            pass

    def look(self) -> None:
        """Note who has changed the inputs."""
        if self.changed is None and self.x._version != self._version:
            self.changed = self._names.get(id(self.stack[-1]), "") if self.stack else ""


@contextmanager
def _watched(network: nn.Module, x: Tensor) -> Iterator[_Watch]:
    watch = _Watch(network, x)
    hooks = register_module_forward_pre_hook(watch.enter), register_module_forward_hook(watch.leave)
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _differ(one: Tensor, other: Tensor, tolerance: float) -> bool:
    scale = one.abs().nan_to_num(0, 0, 0).max().item()
    return not torch.allclose(one, other, rtol=0, atol=tolerance * scale, equal_nan=True)


def _are_probabilities(outputs: Tensor) -> bool:
    """Whether all rows of outputs (B, C) are probabilities of several classes."""
    rows = outputs.detach().float()
    positive = rows.shape[1] > 1 and bool((rows >= 0).all())
    return positive and bool((rows.sum(dim=1) - 1).abs().max() < 1e-3)


def _mend_shape(shape: tuple[int, ...], examples: int, outputs: int) -> str:
    if len(shape) == 2 and shape[0] == examples:
        return f"give its last layer {outputs} outputs, num_classes"
    if len(shape) > 2 and shape[:2] == (examples, outputs):
        return "add nn.Flatten()" if max(shape[2:]) == 1 else "add nn.AdaptiveAvgPool2d(1) and nn.Flatten()"
    if len(shape) == 1 and shape[0] in (examples, outputs):
        return "squeeze() also removes the dimension of a batch of one: use flatten(1)"
    return "return one row of logits for each image"


def _described(found: Any, examples: int) -> str:
    """Name outputs that are no tensor: their class and what they hold."""
    kind = type(found).__name__
    if isinstance(found, Mapping):
        parts = [f"{key!r} {_of(each, examples)}" for key, each in found.items()]
    elif isinstance(found, list | tuple):
        parts = [_of(each, examples) for each in found]
    else:
        return f"an object of class {kind}" if found is not None else "nothing (None)"
    return f"a {kind} of {', '.join(parts)}" if parts else f"an empty {kind}"


def _of(each: Any, examples: int) -> str:
    return _batch(each.shape, examples) if isinstance(each, Tensor) else type(each).__name__


def _which(found: Any, outputs: int) -> str:
    """Name the part of outputs that seems to be the logits."""
    indexed = isinstance(found, Mapping | list | tuple)
    parts = dict(enumerate(found)) if isinstance(found, list | tuple) else found if indexed else _attributes(found)
    keys = [key for key, each in parts.items() if isinstance(each, Tensor) and each.shape[1:] == (outputs,)]
    if not keys:
        return ""
    return f", outputs[{keys[0]!r}]" if indexed else f", outputs.{keys[0]}"


def _attributes(found: Any) -> dict[str, Any]:
    return getattr(found, "__dict__", {})


def _changed(buffers: Mapping[str, Tensor], later: Mapping[str, Tensor]) -> str | None:
    """Name a buffer that is another one later."""
    return next((name for name, tensor in buffers.items() if not torch.equal(tensor, later[name])), None)


def _each_time(network: nn.Module, changed: str | None) -> str:
    """End the sentence for answers that vary: a buffer that evaluation changes, or a layer that draws masks."""
    if changed is not None:
        return f", for it changes its buffer {changed!r} there: change it only where self.training is true"
    on = [name for name, module in network.named_modules() if isinstance(module, _DropoutNd) and module.training]
    return (
        f"{f' (its layer {on[0]!r} stays in training mode)' if on else ''}: draw random numbers in training mode only "
        "(F.dropout needs training=self.training), let eval() reach every layer, and keep nothing from call to call"
    )


def _batch_statistics(network: nn.Module) -> str:
    """End the sentence for answers that depend on the batch: a layer that normalises by the batch's own statistics."""
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            mend = "let eval() reach it" if module.running_mean is not None else "leave out track_running_stats=False"
            return f" (its layer {name!r} normalises by the batch's own statistics): {mend}, or use GroupNorm"
    return ": an answer must depend on its image alone, so compute nothing over the first dimension, the batch's"


def _short(module: nn.Module) -> str:
    text = " ".join(repr(module).split())
    return text if len(text) <= 80 else type(module).__name__


def _batch(shape: Any, examples: int) -> str:
    """Write a shape with B for the number of examples."""
    first = "B" if len(shape) and examples > 1 and shape[0] == examples else None
    parts = [str(size) for size in shape]
    if first:
        parts[0] = first
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
