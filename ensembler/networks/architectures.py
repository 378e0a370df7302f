"""Networks by name: those of the papers, torchvision's, timm's, and the user's own.

==========================  ===========================================================================
``cnn``                     six 3x3 convolutions (32-64-128 channels), no BatchNorm; 0.29 M parameters
``resnet20``                another name of ``preresnet20``
``preresnet20``             pre-activation ResNet (He et al. 2016), basic blocks; 0.27 M
``preresnet56``             the same, deeper; 0.86 M
``preresnet110``            the same, deeper; 1.73 M
``preresnet164``            the same with bottleneck blocks; 1.70 M
``vgg16``                   VGG16 without BatchNorm, as in SPRO's paper (Benton et al. 2021); 15.2 M
``vgg16bn``                 VGG16 with BatchNorm after each convolution; 15.3 M
``wrn28x10``                wide ResNet 28-10 (Zagoruyko & Komodakis 2016); 36.5 M
``torchvision:NAME``        any classifier of torchvision, e.g. ``torchvision:resnet18``; without auxiliary heads
``timm:NAME``               any model of timm, where that is installed, e.g. ``timm:convnext_tiny``
``package.module:factory``  the user's own: called as ``factory(num_classes=C)``, returns an ``nn.Module``
``__main__:factory``        the same of a notebook or a script: it cannot be imported, and is passed from Python
==========================  ===========================================================================

A network takes normalised float images (B, 3, H, W) and returns logits (B, C). Those of this package take any size
from 32 x 32 up. Numbers of parameters are for 10 classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ensembler.device import restored_generators, seed_generators
from ensembler.errors import UsageError, first_line
from ensembler.naming import import_object, is_given, name_of, reason
from ensembler.networks.attention import without_fast_path
from ensembler.seeds import derive
from ensembler.weights import tie

__all__ = [
    "AUXILIARY",
    "Factory",
    "MemoryFormat",
    "build",
    "cnn",
    "factory_name",
    "from_timm",
    "from_torchvision",
    "preresnet",
    "strided_pointwise",
    "takes_one_channel",
    "to_channels_last",
    "vgg16",
]

MemoryFormat = Literal["channels-last", "contiguous"]
Factory = Callable[..., nn.Module]
"""A function or class that builds a network, called as ``factory(num_classes=C)``."""


def factory_name(factory: Factory) -> str:
    """Return a factory's name; see :func:`ensembler.naming.name_of`.

    Raises:
        UsageError: it is not a function or class, but for example a network.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise UsageError(
            f"the network is given as a {type(factory).__name__}, but every member needs one of its own: give the "
            "function or class that builds it, called as network(num_classes=C)"
        )
    return name_of(factory)


def build(
    name: str,
    classes: int,
    seed: int = 0,
    memory_format: MemoryFormat = "channels-last",
    factory: Factory | None = None,
) -> nn.Module:
    """Build the named network with freshly initialised weights, which depend on ``seed`` alone.

    Whatever the factory draws comes from the generators of PyTorch, NumPy and Python, which are seeded and then
    restored.

    A name of the form ``package.module:factory`` imports that module, also from the current folder: a run that names
    one is as trustworthy as the module.

    Args:
        name: see above.
        classes: number of outputs, C.
        seed: of the weights.
        memory_format: ``"channels-last"`` is 1.3 to 2 times as fast on CPUs, and no slower on GPUs. A network in
            ``"contiguous"`` memory also makes its inputs so.
        factory: what builds the network, where the name does not say so (:func:`ensembler.naming.is_given`).

    Raises:
        UsageError: an unknown name, a library that is not installed, or a factory that fails or does not return a
            network for ``classes`` classes.
    """
    with restored_generators():
        seed_generators(derive(seed, "initial weights"))
        if factory is not None:
            network = _built(name, factory, classes)
        elif name in _OWN:
            network = _OWN[name](classes)
        elif name.startswith("torchvision:"):
            network = from_torchvision(name.removeprefix("torchvision:"), num_classes=classes)
        elif name.startswith("timm:"):
            network = from_timm(name.removeprefix("timm:"), num_classes=classes)
        elif ":" in name:
            network = _built(name, _imported(name), classes)
        else:
            known = ", ".join((*_OWN, "torchvision:NAME", "timm:NAME"))
            raise UsageError(f"unknown architecture {name!r}: use {known} or package.module:factory")
    _check_weights(name, network)
    tie(network)
    without_fast_path(network)
    if takes_one_channel(network):
        network.register_forward_pre_hook(_one_channel)
    if memory_format == "contiguous":
        network.register_forward_pre_hook(_contiguous)
        return network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload, no-any-return]
    return to_channels_last(network)


def to_channels_last(network: nn.Module) -> nn.Module:
    """Return the network, its convolutions' weights in channels-last memory."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def takes_one_channel(network: nn.Module) -> bool:
    """Return whether the network's first layer of weights is a convolution of one channel, as of MNIST's networks."""
    first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)), None)
    return isinstance(first, nn.Conv2d) and first.in_channels == 1


def strided_pointwise(network: nn.Module) -> str | None:
    """Return the name of a layer whose backward pass, channels-last on a CPU, writes outside of its memory, if any.

    PyTorch 2.14 does so for strided 1x1 convolutions of few channels: with AVX-512, 1, 2, 3, 4, 6, 8 and 12 channels
    ended the process or corrupted its memory at 224 pixels, 16 and more did not. Multiples of 16 fill every vector.
    """
    for name, layer in network.named_modules():
        strided = isinstance(layer, nn.Conv2d) and max(layer.kernel_size) == 1 and max(layer.stride) > 1
        if strided and layer.in_channels % 16:
            return name or type(layer).__name__
    return None


def _one_channel(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give a network of one channel the mean of an image's three, which are equal where the image is grey."""
    x, *others = inputs
    return (x.mean(dim=1, keepdim=True) if x.dim() == 4 and x.shape[1] == 3 else x, *others)


def _contiguous(network: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let convolutions compute in contiguous memory: they follow their inputs as well as their weights."""
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in inputs)


def _check_weights(name: str, network: nn.Module) -> None:
    """Refuse weights that cannot be written into a flat vector of float32."""
    for layer_name, layer in network.named_modules():
        if any(is_lazy(tensor) for tensor in (*layer._parameters.values(), *layer._buffers.values())):
            raise UsageError(
                f"{name} leaves the shape of its layer {layer_name!r} ({type(layer).__name__}) open until it sees its "
                "first batch: give the layer its sizes, or call the network on a batch before you return it"
            )
    for own, parameter in network.named_parameters():
        if parameter.is_complex() or (parameter.requires_grad and parameter.dtype != torch.float32):
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UsageError(
                f"{name} has weights of type {kind} ({own!r}), expected float32: "
                + ("hold real and imaginary parts apart" if parameter.is_complex() else "return network.float()")
            )


def cnn(classes: int) -> nn.Sequential:
    """Build six convolutions in three stages and a linear layer, without BatchNorm."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for stride in (1, 2):
            layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return _initialise(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)))


def vgg16(classes: int, *, batchnorm: bool = False) -> nn.Sequential:
    """Build VGG16 for 32 x 32 images, with dropout in its three-layer head of 512 units.

    As in Garipov et al. 2018 and Benton et al. 2021 (code: timgaripov/swa and g-benton/loss-surface-simplexes).
    ``VGG16BN`` of timgaripov/dnn-mode-connectivity is another network: its forward pass skips a convolution of each
    stage.
    """
    layers: list[nn.Module] = []
    channels = 3
    for repeats, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if batchnorm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU(inplace=True))
            channels = width
        layers.append(nn.MaxPool2d(2))
    head: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(2):
        head += [nn.Dropout(), nn.Linear(channels, 512), nn.ReLU(inplace=True)]
        channels = 512
    return _initialise(nn.Sequential(*layers, *head, nn.Linear(channels, classes)))


def preresnet(classes: int, *, blocks: int, width: int = 16, bottleneck: bool = False) -> nn.Sequential:
    """Build a pre-activation ResNet for 32 x 32 images: three stages of ``blocks`` blocks.

    The stages have ``width``, ``2 width`` and ``4 width`` channels; the second and third halve the resolution. A basic
    block has two 3x3 convolutions, so the network has ``6 blocks + 2`` layers; a bottleneck block has 1x1, 3x3 and 1x1
    convolutions with a quarter of the channels in between, so it has ``9 blocks + 2``. The block is that of He et al.
    2016, "Identity mappings in deep residual networks" (Fig. 4e; code: KaimingHe/resnet-1k-layers). With basic blocks
    and ten times the width, it is the wide ResNet of Zagoruyko & Komodakis 2016 (Table 1, no dropout), who also count
    the convolutions of shortcuts: ``6 blocks + 4``.

    Depth 110 has basic blocks and 164 has bottlenecks, as in He et al.'s experiments; both have 1.7 M parameters. The
    code of Garipov et al. 2018 (timgaripov/dnn-mode-connectivity) uses bottlenecks from depth 44 on: its
    ``PreResNet164`` has the same parameters, its ``PreResNet110`` is another network, with 1.15 M. It also strides in a
    bottleneck's 3x3 convolution, feeds shortcuts without activation and gives a wide ResNet's convolutions biases. Here
    these follow He et al.'s and Zagoruyko & Komodakis's own code.
    """
    layers: list[nn.Module] = [_convolution(3, 16, 3)]
    channels = 16
    for stage in range(3):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_PreActivationBlock(channels, width << stage, stride, bottleneck))
            channels = width << stage
    tail = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _initialise(nn.Sequential(*layers, *tail, nn.Linear(channels, classes)))


class _PreActivationBlock(nn.Module):
    """Two or three times BatchNorm, ReLU and convolution, with a shortcut around them.

    The first convolution strides. If the shape changes, the shortcut is a 1x1 convolution of the activated input.
    """

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        inner = width // 4 if bottleneck else width
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _convolution(channels, inner, 1 if bottleneck else 3, stride)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = _convolution(inner, inner, 3)
        if bottleneck:
            self.bn3 = nn.BatchNorm2d(inner)
            self.conv3 = _convolution(inner, width, 1)
        self.bottleneck = bottleneck
        same = stride == 1 and channels == width
        self.shortcut = None if same else _convolution(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = torch.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        if self.bottleneck:
            residual = self.conv3(torch.relu(self.bn3(residual)))
        return residual + shortcut


def _convolution(channels: int, width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, kernel, stride=stride, padding=kernel // 2, bias=False)


def _initialise(network: nn.Sequential) -> nn.Sequential:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    head = network[-1]
    if isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.1)  # so that the first loss is near log C
    return network


_OWN: dict[str, Callable[[int], nn.Module]] = {
    "cnn": cnn,
    "resnet20": partial(preresnet, blocks=3),
    "preresnet20": partial(preresnet, blocks=3),
    "preresnet56": partial(preresnet, blocks=9),
    "preresnet110": partial(preresnet, blocks=18),
    "preresnet164": partial(preresnet, blocks=18, width=64, bottleneck=True),
    "vgg16": vgg16,
    "vgg16bn": partial(vgg16, batchnorm=True),
    "wrn28x10": partial(preresnet, blocks=4, width=160),
}


AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""torchvision's networks with heads that only help training: they are left out, so outputs are logits in any mode."""


def from_torchvision(name: str, **options: Any) -> nn.Module:
    """Build a classifier of torchvision with ``options`` (``num_classes``, ``weights``).

    Raises:
        UsageError: torchvision has no classifier of that name.
    """
    from torchvision import models

    if name not in models.list_models(module=models):
        raise UsageError(f"torchvision has no classifier {name!r}: see torchvision.models.list_models()")
    if name in AUXILIARY and not options.get("weights"):
        options["init_weights"] = True  # its default, of which torchvision warns
    network: nn.Module = models.get_model(name, **options)
    if name in AUXILIARY:
        network.aux_logits = False  # type: ignore[assignment]
        for head in AUXILIARY[name]:
            setattr(network, head, None)
    return network


def from_timm(name: str, **options: Any) -> nn.Module:
    """Build a model of timm with ``options`` (``num_classes``, ``pretrained``).

    Raises:
        UsageError: timm is not installed, has no model of that name, or no pretrained weights for it.
    """
    try:
        import timm  # type: ignore[import-not-found]
    except ImportError as error:
        raise UsageError(f"timm:{name} needs timm: pip install timm") from error
    if not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}: see timm.list_models()")
    if options.get("pretrained") and not timm.is_model_pretrained(name):
        raise UsageError(f"timm has no weights of {name!r}: see timm.list_pretrained()")
    try:
        network: nn.Module = timm.create_model(name, **options)
    except RuntimeError as error:  # an unknown tag, or a missing library
        raise UsageError(f"timm cannot build {name!r}: {first_line(error)}") from error
    return network


def _imported(name: str) -> Factory:
    if is_given(name):
        own = name.partition(":")[2]
        raise UsageError(
            f"the network {own} was defined in a notebook or script, from which it cannot be imported: pass it from "
            f"Python (network={own if own.isidentifier() else '...'}), or define it in a module and train again"
        )
    factory: Factory = import_object(name, "architecture")
    if not callable(factory):
        raise UsageError(f"{name} is a {type(factory).__name__}, expected a function that builds a network")
    return factory


def _built(name: str, factory: Factory, classes: int) -> nn.Module:
    attribute = name.partition(":")[2]
    try:
        inspect.signature(factory).bind(num_classes=classes)
    except TypeError as error:
        raise UsageError(f"{name} cannot be called as {attribute}(num_classes={classes}): {error}") from error
    except ValueError:  # a builtin without a signature
        pass
    try:
        network = factory(num_classes=classes)
    except Exception as error:  # whatever a user's code raises
        raise UsageError(f"{name} cannot build a network for {classes} classes: {reason(error)}") from error
    if isinstance(network, torch.jit.ScriptModule):
        raise UsageError(f"{name} returns a {type(network).__name__}: return the network itself, without torch.jit")
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name} returned {type(network).__name__}, not a torch.nn.Module")
    return network
