"""Optimisers of flat vectors: SGD, AdamW, or any class of ``torch.optim``, in parameter groups.

The loop trains vertices (P,), whose gradients are rows of one tensor. An optimiser gets views of both, so that nothing
is copied at a step. For SGD and AdamW, which treat all elements alike, neighbouring parameters of a group are one view.
Any other optimiser gets each parameter in its own shape, as it would without this package: it may look at rows, at
matrices or at norms (Adafactor, Muon).

SGD decays all weights, as in the papers of the methods. Every other optimiser leaves out biases, the parameters of
normalisation layers, embeddings and class tokens, unless ``--parameter-groups`` says otherwise.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ensembler.errors import UsageError
from ensembler.naming import import_object, reason
from ensembler.weights import FlatWeights

if TYPE_CHECKING:
    from ensembler.trainers.settings import Settings

__all__ = ["default_rates", "make", "restore", "state", "try_step", "undecayed"]

_OWN: dict[str, Callable[..., Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
_FUSED = ("cpu", "cuda")  # types of device on which both have a kernel that takes one pass over memory
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_SET = {"params", "lr", "capturable", "fused", "foreach"}  # of a parameter group
_PLAIN = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True)
class _Group:
    """A parameter group: the names of its parameters, and what it changes of the optimiser's options."""

    names: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)


def default_rates(name: str) -> tuple[float | None, float | None]:
    """Return an optimiser's default learning rate and weight decay; ``None`` if it has no default, or no such option.

    Those of ``sgd`` are this package's, all others the class's own. Weight decay is 0 where it has no default.

    Raises:
        UsageError: there is no such optimiser, or it takes no learning rate.
    """
    if name == "sgd":
        return 0.1, 5e-4
    build = _find(name)
    try:
        known = inspect.signature(build).parameters
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimiser {name} is not an optimiser: {reason(error)}") from error
    anything = any(each.kind is each.VAR_KEYWORD for each in known.values())
    if not anything and "lr" not in known:
        raise UsageError(f"--optimiser {name} takes no lr, and the learning rate is set at every step: name another")
    rates = [known[each].default if each in known else None for each in ("lr", "weight_decay")]
    lr, decay = (float(rate) if isinstance(rate, int | float) else None for rate in rates)
    return lr, 0.0 if decay is None and (anything or "weight_decay" in known) else decay


def make(settings: Settings, weights: FlatWeights, moving: Sequence[Tensor]) -> Optimizer:
    """Make the optimiser of some vertices.

    Args:
        settings: resolved.
        weights: the network, for the names, places and shapes of its parameters.
        moving: vertices (P,) with their gradients in ``.grad``.

    Raises:
        UsageError: the optimiser refuses its arguments, or the parameter groups are not a division of the parameters.
    """
    name, build = settings.optimiser, _find(settings.optimiser)
    groups = _groups(settings, weights.module)
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if name in _OWN:
        options["fused"] = moving[0].device.type in _FUSED
    if name == "sgd":
        options |= {"momentum": settings.momentum, "nesterov": (settings.momentum or 0) > 0}
    given = [{**group.options, "params": [*_views(weights, group.names, moving, name in _OWN)]} for group in groups]
    try:
        optimiser = build(given, **{key: value for key, value in options.items() if value is not None})
    except Exception as error:  # whatever another library's code raises
        raise UsageError(f"--optimiser {name} cannot train this network: {reason(error)}") from error
    if not isinstance(optimiser, Optimizer):
        raise UsageError(f"--optimiser {name} makes a {type(optimiser).__name__}: it must make a torch.optim.Optimizer")
    for number, group in enumerate(groups, start=1):
        if unknown := sorted(group.options.keys() - optimiser.defaults.keys()):
            raise UsageError(
                f"parameter group {number} has an option {unknown[0]!r}, which {type(optimiser).__name__} does not "
                f"have: it has {', '.join(sorted(optimiser.defaults))}"
            )
    for own in optimiser.param_groups:
        if "capturable" in own:  # its steps can then be part of a CUDA graph
            own["capturable"] = moving[0].device.type == "cuda"
    return optimiser


def try_step(settings: Settings, network: nn.Module) -> None:
    """Try an optimiser on a network, whose weights it changes.

    Raises:
        UsageError: it cannot be made, does no step by itself, or keeps what a checkpoint cannot hold.
    """
    weights = FlatWeights(network)
    vertex = weights.vector.detach().requires_grad_()
    vertex.grad = weights.grad.fill_(1e-3)
    optimiser = make(settings, weights, [vertex])
    try:
        for group in optimiser.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=vertex.device)
        optimiser.step()
    except Exception as error:  # whatever another library's code raises
        raise UsageError(f"--optimiser {settings.optimiser} cannot do a step: {reason(error)}") from error
    for kept in _leaves(optimiser.state_dict()):
        if not isinstance(kept, _PLAIN):
            raise UsageError(
                f"--optimiser {settings.optimiser} keeps a {type(kept).__name__} in its state, and a checkpoint holds "
                "tensors, numbers and text only: choose another optimiser"
            )


def state(optimiser: Optimizer) -> dict[str, Any]:
    """Copy an optimiser's state, and what its groups hold beside what the step or the device sets."""
    own = optimiser.state_dict()
    groups = [{key: value for key, value in group.items() if key not in _SET} for group in own["param_groups"]]
    return copy.deepcopy({"state": own["state"], "param_groups": groups})


def restore(optimiser: Optimizer, kept: Mapping[str, Any]) -> None:
    """Give an optimiser the :func:`state` of another one of its kind, to the bit."""
    own = optimiser.state_dict()["param_groups"]
    groups = [mine | theirs for mine, theirs in zip(own, kept["param_groups"], strict=True)]
    optimiser.load_state_dict({"state": kept["state"], "param_groups": groups})
    views = [view for group in optimiser.param_groups for view in group["params"]]
    for number, values in kept["state"].items():
        found = optimiser.state[views[number]]
        for name, value in values.items():  # PyTorch converts them to the type of the weights
            if isinstance(value, Tensor) and found[name].dtype != value.dtype:
                found[name] = value.to(found[name].device)


def undecayed(network: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay leaves out by default.

    They are biases, the parameters of normalisation layers, embeddings (of tokens and positions), class tokens, other
    vectors such as the scale of a layer, and what the network's own ``no_weight_decay()`` names, as timm's have it.
    """
    named = getattr(network, "no_weight_decay", None)
    found = set(named()) if callable(named) else set[str]()
    for prefix, module in network.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}".lstrip(".")
            if isinstance(module, _WEIGHTS) and own == "weight":
                continue
            vector = sum(size > 1 for size in parameter.shape) <= 1
            told = any(word in own for word in ("bias", "embed", "token"))
            if vector or told or isinstance(module, (*_NORMS, nn.Embedding, nn.EmbeddingBag)):
                found.add(name)
    return found


def _find(name: str) -> Callable[..., Optimizer]:
    if name in _OWN:
        return _OWN[name]
    if ":" not in name:
        raise UsageError(f"--optimiser must be {', '.join(_OWN)} or package.module:Class, not {name!r}")
    found = import_object(name, "optimiser")
    if not callable(found):
        raise UsageError(f"--optimiser {name} is a {type(found).__name__}: name a class, or a function that makes one")
    build: Callable[..., Optimizer] = found
    return build


def _groups(settings: Settings, network: nn.Module) -> list[_Group]:
    """Divide the trainable parameters into groups."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if settings.parameter_groups:
        return _own_groups(settings.parameter_groups, network, names)
    left_out = undecayed(network) if settings.optimiser != "sgd" and settings.weight_decay else set[str]()
    decayed = _Group([name for name in names if name not in left_out])
    others = _Group([name for name in names if name in left_out], {"weight_decay": 0.0})
    return [group for group in (decayed, others) if group.names]


def _own_groups(function: str, network: nn.Module, names: Sequence[str]) -> list[_Group]:
    """Divide the parameters as a user's function does."""
    divide, of = import_object(function, "function of parameter groups"), f"--parameter-groups {function}"
    try:
        dicts = [dict(each) for each in divide(network)]
        lists = [[*_parameters(each.pop("params"))] for each in dicts]
    except Exception as error:  # whatever a user's code raises
        wanted = "it must return a list of dicts as torch.optim takes them, of a network's parameters"
        raise UsageError(f"{of} fails: {reason(error)}: {wanted}") from error
    known = {id(parameter): name for name, parameter in network.named_parameters()}
    if any(id(parameter) not in known for own in lists for parameter in own):
        raise UsageError(f"{of} returns a parameter that is not the network's: take them from the network it is given")
    found = [[known[id(parameter)] for parameter in own if parameter.requires_grad] for own in lists]
    every = [name for own in found for name in own]
    if missing := sorted(set(names) - set(every)):
        raise UsageError(
            f"{of} leaves out {missing[0]}: give every parameter a group, and freeze with requires_grad_(False) what "
            "is not to be trained"
        )
    if len(every) > len(names):
        twice = next(name for name in every if every.count(name) > 1)
        raise UsageError(f"{of} has {twice} twice: give every parameter one group")
    return [_Group(own, options) for own, options in zip(found, dicts, strict=True) if own]


def _parameters(params: Any) -> Iterator[Any]:
    """Yield what ``"params"`` may be: a parameter, parameters, or pairs of a name and a parameter."""
    for each in [params] if isinstance(params, Tensor) else params:
        yield each[1] if isinstance(each, tuple) else each


def _views(weights: FlatWeights, names: Sequence[str], moving: Sequence[Tensor], flat: bool) -> Iterator[Tensor]:
    """Yield views of some parameters of each vertex, with their gradients; flat, those next to each other as one."""
    chosen = {name: part for name, part in weights.slices().items() if name in set(names)}
    runs = list[slice]()
    for part in chosen.values():
        if runs and runs[-1].stop == part.start:
            runs[-1] = slice(runs[-1].start, part.stop)
        else:
            runs.append(part)
    for vertex in moving:
        assert vertex.grad is not None  # noqa: S101  for the type checker
        if flat:
            pairs = [(vertex.detach()[part], vertex.grad[part]) for part in runs]
        else:
            shaped, gradients = weights.views(vertex.detach()), weights.views(vertex.grad)
            pairs = [(shaped[name], gradients[name]) for name in chosen]
        for view, gradient in pairs:
            view.requires_grad_().grad = gradient
            yield view


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from (*_leaves(key), *_leaves(value))
    elif isinstance(tree, Iterable) and not isinstance(tree, Tensor | str):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree
