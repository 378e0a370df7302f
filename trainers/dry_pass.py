"""A dry pass before the first epoch: whatever is wrong with a network is said before anything is trained or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ensembler import task
from ensembler.data.augmentations import check_augmentation, check_repeatable
from ensembler.data.datasets import Dataset
from ensembler.data.examples import Examples, InMemory
from ensembler.device import choose_device, restored_generators, seed_generators
from ensembler.errors import UsageError
from ensembler.naming import reason
from ensembler.networks import architectures
from ensembler.networks.architectures import Factory, MemoryFormat
from ensembler.networks.checks import NetworkChecks
from ensembler.seeds import generator
from ensembler.trainers.losses import Losses, check_loss, training_loss
from ensembler.trainers.method import Method
from ensembler.trainers.optimisers import try_step
from ensembler.trainers.settings import Settings

__all__ = ["dry_pass", "refusal"]

_OTHERWISE = "it does not compute the same in channels-last"


def dry_pass(
    dataset: Dataset,
    settings: Settings,
    say: Callable[[str], None],
    processes: int = 1,
    check: Callable[[str, nn.Module, Tensor], None] | None = None,
    factory: Factory | None = None,
) -> MemoryFormat:
    """Try a network on two training images: in training mode with gradients, then in evaluation mode.

    The network is one of its own, and the global random generators are restored.

    Args:
        dataset: what it is to be trained on.
        settings: resolved; the memory format may be ``None``.
        say: told what was chosen that the user did not ask for.
        processes: how many share a batch.
        check: the method's own, see :meth:`ensembler.trainers.method.Method.check`.
        factory: what builds the network, where its name does not say so.

    Returns:
        The memory format to train and evaluate in: the settings', or channels-last where the network can.

    Raises:
        UsageError: the network cannot be trained, stored or evaluated; the message says why.
    """
    name, asked = settings.architecture, settings.memory_format
    family, _, own = name.partition(":")
    if family == "torchvision" and own in architectures.AUXILIARY:
        say(f"{name} is built without its auxiliary heads: its main output is trained")
    trial = _Trial.of(dataset, settings, processes, factory)
    with restored_generators():
        network, memory_format = _fitting(trial, asked, say)
        if check:
            check(name, network, trial.x)
        if settings.optimiser != "sgd" or settings.parameter_groups:
            try_step(settings, network)
    if trial.x.dim() == 4 and architectures.takes_one_channel(network):
        say(f"{name} takes one channel: it is given the mean of an image's three")
    return memory_format


def refusal(method: Method, dataset: Dataset, settings: Settings) -> str | None:
    """Why a method cannot use the settings' network, if it says so (:meth:`ensembler.trainers.method.Method.check`)."""
    if type(method).check is Method.check:
        return None
    trial = _Trial.of(dataset, settings, 1)
    try:
        method.check(trial.checks.name, trial.build("channels-last").eval(), trial.x)
    except UsageError as error:
        return str(error)
    return None


def _fitting(trial: _Trial, asked: MemoryFormat | None, say: Callable[[str], None]) -> tuple[nn.Module, MemoryFormat]:
    """Return an examined network, in the memory format that is asked for, or else in the faster one that it can."""
    name = trial.checks.name
    if asked:
        return trial.examined(trial.build(asked), asked), asked
    try:
        network = trial.build("channels-last")
        layer = architectures.strided_pointwise(network) if trial.x.device.type == "cpu" else None
        if layer is None:
            return trial.examined(network, "channels-last"), "channels-last"
        cause = (
            f"with channels-last, PyTorch's backward pass of its layer {layer!r} on a CPU writes outside of its memory"
        )
    except UsageError as fault:
        viewed = "view size" in str(fault)
        cause = "view() in its forward needs it, reshape() would not" if viewed else _OTHERWISE
    network = trial.examined(trial.build("contiguous"), "contiguous")  # raises what is the network's own fault
    say(f"{name} is trained in contiguous memory: {cause}; --memory-format says otherwise")
    return network, "contiguous"


@dataclass(frozen=True)
class _Trial:
    """The inputs (B, ...) and targets (B,) of the dry pass, on the device, and its checks."""

    checks: NetworkChecks
    x: Tensor
    y: Tensor
    settings: Settings
    losses: Losses

    @classmethod
    def of(cls, dataset: Dataset, settings: Settings, processes: int, factory: Factory | None = None) -> _Trial:
        device = choose_device(settings.device)
        settings.check_device(device.type)
        meaning, train = task.find(dataset.task), dataset.train
        count = min(2, max(1, min(settings.batch_size or 1, len(train)) // processes))
        (examples,) = train.part(torch.arange(count) * (len(train) // count)).batches(count)
        x = train.inputs(dataset.mean, dataset.std, device)(examples.data.to(device))
        _check_mixing(settings, examples, x)
        _check_augmentation(train, settings.augmentation or dataset.augmentation)
        checks = NetworkChecks(settings.architecture, meaning, meaning.outputs(len(dataset.classes)), factory)
        return cls(checks, x, examples.labels.to(device), settings, training_loss(settings, dataset, device))

    def build(self, memory_format: MemoryFormat) -> nn.Module:
        """Build a network of the trial's own.

        Raises:
            UsageError: it cannot be built, or moved to the device.
        """
        try:
            network = self.checks.build(0, memory_format).to(self.x.device)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{self.checks.name} cannot be moved to {self.x.device}: {reason(error)}") from error
        return network

    def examined(self, network: nn.Module, memory_format: MemoryFormat) -> nn.Module:
        """Run every check; return the network.

        Raises:
            UsageError: one fails.
        """
        self.checks.ownership(network)
        x = self.x.contiguous() if memory_format == "contiguous" else self.x
        network.train()
        seed_generators(0)
        precision = self.settings.dtype
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            outputs = self.checks.run(network, x, " in training mode")
        self.checks.finite(outputs, " in training mode")
        self._backward(network, outputs.float())
        self.checks.answers(network, x, memory_format)
        return network

    def _backward(self, network: nn.Module, outputs: Tensor) -> None:
        name = self.checks.name
        if not outputs.requires_grad:
            raise UsageError(
                f"{name} returns outputs without gradients, so that nothing would be trained: leave out no_grad() and "
                "detach() in its forward, or requires_grad_(False) of all its weights"
            )
        if self.settings.loss != "task":
            check_loss(self.settings.loss, outputs, self.y)
        try:
            self.losses(outputs, self.y).mean().backward()  # type: ignore[no-untyped-call]
        except Exception as error:  # whatever a user's code raises
            raise UsageError(f"{name} has no gradients: {reason(error)}") from error
        if all(parameter.grad is None for parameter in network.parameters()):
            raise UsageError(f"no gradient reaches a weight of {name}: leave out detach() in its forward")


def _check_mixing(settings: Settings, examples: InMemory, x: Tensor) -> None:
    """Refuse mixing that the inputs ``x`` (B, ...) of examples cannot have, or that would do nothing.

    Raises:
        UsageError: the message says why.
    """
    flag = "--cutmix" if settings.cutmix else "--mixup"
    if not (settings.mixup or settings.cutmix):
        return
    if settings.batch_size == 1:
        raise UsageError(f"{flag} mixes the images of a batch, which has one: choose a larger --batch-size")
    if settings.cutmix and not (x.dim() == 4 and x.shape[2:] == examples.example_shape[:2]):
        raise UsageError(f"--cutmix takes images, and these examples are {examples.kind}: use --mixup")
    if not x.is_floating_point():
        raise UsageError(f"--mixup needs inputs of floating point, and these are {x.dtype}: leave it out")


def _check_augmentation(train: Examples, augmentation: str) -> None:
    """Refuse a transform of one's own that fails on some training images, or does not repeat what it does.

    Raises:
        UsageError: the message says why.
    """
    if train.kind != "images":
        return
    check_augmentation(augmentation)
    index = torch.arange(min(8, len(train))) * (len(train) // min(8, len(train)))
    choices = train.draw(augmentation, len(index), generator(0, "dry pass"))
    check_repeatable(lambda: train.augmented(index, augmentation, choices).data, augmentation)
