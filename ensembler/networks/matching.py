"""Matching of checkpoints with networks: which of a file's tensors are a network's weights.

Wrappers change the names: Lightning's ``model.``, ``DataParallel``'s ``module.``, ``torch.compile``'s ``_orig_mod.``,
``ema.`` and others. Files nest the state dict under any key. So every state dict of a file is tried, with every prefix
that its names have before a name of the network. It fits if all names and shapes do. Where several fit, it is the plain
model before its moving average (a key or prefix with ``ema``, ``swa`` or ``average``); where that leaves several with
different values, the file is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from ensembler.errors import ShapeError
from ensembler.networks.checkpoints import Checkpoint

__all__ = ["Fit", "fit", "load"]

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts of names
_SCALARS = {"total_ops", "total_params", "n_averaged", "num_batches_tracked"}  # of thop, AveragedModel, BatchNorm
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|average)")
_SHOWN = 3


@dataclass(frozen=True, eq=False)
class Fit:
    """How one state dict of a checkpoint goes into a network.

    Attributes:
        place: where the state dict lies in the checkpoint.
        prefix: what its names have before the network's, without wrappers.
        given: its names, by the network's names of the same tensors.
        tensors: its tensors, likewise.
        others: its names under the prefix that are not the network's.
        fresh: names of the network's head that it has not, or with another number of outputs.
        problems: why it does not fit.
        said: what was taken, in one line; empty for a whole state dict that was taken as it is.
        head: why the head is fresh, in words.
    """

    place: str
    prefix: str
    given: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    others: Sequence[str]
    fresh: Sequence[str]
    problems: Sequence[str]
    said: str = ""
    head: str = ""

    @property
    def where(self) -> str:
        """The place and the prefix, in words."""
        prefixes = sorted({given.removesuffix(own) for own, given in self.given.items() if given.endswith(own)})
        texts = [f"'{self.place}'"] if self.place else []
        if prefixes not in ([""], []):
            texts.append(f"names without {' or '.join(repr(one) for one in prefixes if one)}")
        if not all(given.endswith(own) for own, given in self.given.items()):
            texts.append("names without wrappers")
        return ", ".join(texts) or "the file itself"

    @property
    def is_average(self) -> bool:
        """Whether it is a moving average of the trained weights."""
        counter = any(_bare(name) == f"{self.prefix}n_averaged" for name in self.others)
        return counter or bool(_AVERAGED.search(f"{self.place}.{self.prefix}".lower()))


class _Network:
    """The tensors that a network takes.

    Attributes:
        module: the network.
        tensors: those of its state dict, by name.
        names: their names by the names that a file may give them: without wrappers, and without what all have in front.
        tied: all names of the same tensor, by each of its names.
        finite: the names of weights and statistics, which must be finite.
    """

    def __init__(self, module: nn.Module) -> None:
        state = module.state_dict(keep_vars=True)
        kept = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        self.module = module
        self.tensors = {name: tensor.detach() for name, tensor in kept.items()}
        bare = {_bare(name): name for name in kept}
        names = bare if len(bare) == len(kept) else {name: name for name in kept}
        first = next(iter(names), "").partition(".")[0] + "."
        self.names = [names]
        if all(name.startswith(first) for name in names):
            self.names.append({name.removeprefix(first): own for name, own in names.items()})
        together: dict[int, list[str]] = {}
        for name, tensor in kept.items():
            together.setdefault(id(tensor), []).append(name)
        self.tied = {name: names for names in together.values() for name in names}
        statistics = {name for name in kept if name.endswith(("running_mean", "running_var"))}
        self.finite = {name for name, tensor in kept.items() if isinstance(tensor, nn.Parameter)} | statistics


def load(network: nn.Module, checkpoint: Checkpoint) -> Fit:
    """Load a checkpoint into a network, in place, except for a head with another number of classes; see :func:`fit`."""
    found = fit(network, checkpoint)
    state = network.state_dict()
    for name, tensor in found.tensors.items():
        if name not in found.fresh:
            state[name].copy_(tensor)
    return found


def fit(network: nn.Module, checkpoint: Checkpoint) -> Fit:
    """Find the one state dict of a checkpoint that fits a network.

    The head is the last linear layer (or the last convolution of a network without one). If there are no tensors for
    it, or they differ only in the number of outputs, it is to keep its own weights. Of tied tensors one is enough, and
    ``num_batches_tracked`` may be missing. All other names and shapes must match. Floating-point types may differ.

    An auxiliary head is a layer like any other: torchvision's weights of ``inception_v3`` and ``googlenet`` are refused
    for another number of classes.

    Raises:
        ShapeError: none fits, or several do; the message names the tensors. Or a weight is not finite.
    """
    own = _Network(network)
    tried = [
        _try(own, names, place, state, prefix)
        for place, state in checkpoint.states.items()
        for names in own.names
        for prefix in _prefixes(names, state)
    ]
    fits = [one for one in tried if not one.problems]
    copies = {(one.place, name) for one in fits for name in one.given.values()}  # a model beside its average

    def unknown(one: Fit) -> list[str]:
        state = checkpoint.states[one.place]
        return [name for name in one.others if (one.place, name) not in copies and not _is_counter(name, state[name])]

    fits = [one for one in fits if not unknown(one)]
    distinct = _distinct([one for one in fits if not one.fresh] or fits)
    chosen = [one for one in distinct if not one.is_average] or distinct
    if not chosen:
        raise ShapeError(_explained(own, checkpoint, tried, unknown))
    if len(chosen) > 1:
        places = _listed([one.where for one in chosen], " and ")
        raise ShapeError(
            f"{checkpoint.origin} holds several weights that fit the network: {places}: "
            "save those that are meant to a file of their own"
        )
    found, others = chosen[0], [one for one in distinct if one is not chosen[0]]
    for name in own.finite & found.tensors.keys() - set(found.fresh):
        if not found.tensors[name].to(own.tensors[name].dtype).isfinite().all():
            raise ShapeError(f"{checkpoint.origin}: '{found.given[name]}' is not finite: use an earlier checkpoint")
    head = next((_difference(n, found.tensors[n], own.tensors[n]) for n in found.fresh if n in found.tensors), None)
    if found.fresh and head is None:
        head = f"'{found.fresh[0]}' is not in the file"
    return replace(found, head=head or "", said=_said(own, checkpoint, found, others, copies, head))


def _prefixes(names: Mapping[str, str], state: Mapping[str, Tensor]) -> list[str]:
    """Return the prefixes that a state dict's names have before one of ``names``, without wrappers."""
    found = {"": None}
    for name in state:
        parts = _bare(name).split(".")
        for count in range(1, len(parts)):
            if ".".join(parts[count:]) in names:
                found[".".join(parts[:count]) + "."] = None
    return list(found)


def _try(own: _Network, names: Mapping[str, str], place: str, state: Mapping[str, Tensor], prefix: str) -> Fit:
    """Match a state dict's names under a prefix with the network's."""
    given: dict[str, str] = {}
    others, problems = list[str](), list[str]()
    for name in state:
        bare = _bare(name)
        if not bare.startswith(prefix):
            continue
        found = names.get(bare.removeprefix(prefix)) or names.get(name)
        if found is None:
            others.append(name)
        elif found in given:
            problems.append(f"'{given[found]}' and '{name}' are one tensor of the network")
        else:
            given[found] = name
    tensors = {name: state[in_file] for name, in_file in given.items()}
    head = _mismatched_head(own.module, tensors)
    fresh = [name for name in own.tensors if head is not None and name.startswith(head)]
    problems += _differences(own, tensors, fresh)
    missing = [
        name
        for name in own.tensors
        if not any(one in given for one in own.tied[name])
        and name not in fresh
        and not name.endswith("num_batches_tracked")
    ]
    problems += [f"'{name}' {_shape(own.tensors[name])} is not in the file{_near(name, others)}" for name in missing]
    if not tensors.keys() - set(fresh):
        problems.append("no tensor in the file has a name of the network's")
    return Fit(place, prefix, given, tensors, others, fresh, problems)


def _differences(own: _Network, tensors: Mapping[str, Tensor], fresh: Sequence[str]) -> Iterator[str]:
    """Describe each tensor of another shape or type than the network's, and tied tensors that differ."""
    for name, tensor in tensors.items():
        expected = own.tensors[name]
        alike = tensor.is_floating_point() == expected.is_floating_point()
        alike = alike and tensor.is_complex() == expected.is_complex() and tensor.shape == expected.shape
        if not alike and name not in fresh:
            yield _difference(name, tensor, expected)
        first = next(one for one in own.tied[name] if one in tensors)
        if first != name and not torch.equal(tensor, tensors[first]):
            yield f"'{first}' and '{name}' are one tensor in the network, and differ in the file"


def _mismatched_head(network: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Return the prefix of the head's tensors if ``state`` has no matching head, else ``None``."""
    layers = {f"{name}." if name else "": module for name, module in network.named_modules()}
    for prefix, layer in reversed(layers.items()):
        given = state.get(f"{prefix}weight")
        if isinstance(layer, nn.Linear | nn.Conv2d) and given is not None:
            expected = layer.weight.shape
            if given.shape[1:] == expected[1:] and given.shape[:1] != expected[:1]:
                return prefix
    linear = [prefix for prefix, layer in layers.items() if isinstance(layer, nn.Linear)]
    last = linear or [prefix for prefix, layer in layers.items() if isinstance(layer, nn.Conv2d)]
    return last[-1] if last and not any(name.startswith(last[-1]) for name in state) else None


def _said(
    own: _Network,
    checkpoint: Checkpoint,
    found: Fit,
    others: Sequence[Fit],
    copies: set[tuple[str, str]],
    head: str | None,
) -> str:
    """Say what was taken and what was not, in one line."""
    places = {one.where for one in others}
    left_out = [n for n in checkpoint.states[found.place] if (found.place, n) not in copies]
    kinds = {
        f"{_type(tensor)} converted to {_type(own.tensors[name])}"
        for name, tensor in found.tensors.items()
        if tensor.is_floating_point() and tensor.dtype != own.tensors[name].dtype
    }
    texts = [
        *([f"taken from {found.where}"] if found.where != "the file itself" else []),
        *([f"not taken: {_listed(sorted(places))}, which fits, too"] if places else []),
        *sorted(kinds),
        *([f"left out: {_listed(left_out)}"] if left_out else []),
        *([f"the head is fresh ({head})"] if head else []),
    ]
    return f"{checkpoint.origin}: {'; '.join(texts)}" if texts else ""


def _explained(own: _Network, checkpoint: Checkpoint, tried: Sequence[Fit], unknown: Callable[[Fit], list[str]]) -> str:
    """Return why the state dict that comes closest does not fit."""

    def closeness(one: Fit) -> tuple[int, int]:
        same = sum(tensor.shape == own.tensors[name].shape for name, tensor in one.tensors.items())
        return same, -len(one.problems)

    nearest = max(tried, key=closeness)
    state = checkpoint.states[nearest.place]
    free = [name for name in own.tensors if name not in nearest.given]
    extra = [f"'{name}' {_shape(state[name])} is not in the network{_near(name, free)}" for name in unknown(nearest)]
    problems = [*nearest.problems[: _SHOWN - bool(extra)], *extra][:_SHOWN]
    more = len(nearest.problems) + len(extra) - len(problems)
    place = f" (in '{nearest.place}')" if nearest.place else ""
    rest = f"; and {more} more" if more else ""
    return (
        f"{checkpoint.origin}{place} does not fit the network: {'; '.join(problems)}{rest}: "
        "choose the network that it was saved from, or rename its tensors"
    )


def _is_counter(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is a counter or a score beside the weights."""
    number = tensor.numel() == 1 and (not tensor.is_floating_point() or tensor.dtype == torch.float64)
    return number or name.rpartition(".")[2] in _SCALARS


def _distinct(fits: Iterable[Fit]) -> list[Fit]:
    """Leave out those that have the same values as one before."""
    result: list[Fit] = []
    for one in fits:
        if not any(_equal(one.tensors, other.tensors) for other in result):
            result.append(one)
    return result


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _bare(name: str) -> str:
    """Return a name without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _near(name: str, others: Sequence[str]) -> str:
    found = get_close_matches(name, others, 1, 0.75)
    return f" (nearest: '{found[0]}')" if found else ""


def _difference(name: str, given: Tensor, own: Tensor) -> str:
    write = _shape if given.shape != own.shape else _type
    return f"'{name}' is {write(given)} in the file, {write(own)} in the network"


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: Sequence[str], between: str = ", ") -> str:
    shown = between.join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
