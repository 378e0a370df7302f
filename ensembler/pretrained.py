"""Pretrained weights: reading a file, or downloading published ones, and loading them into a network.

Nothing is unpickled: a file is safetensors, or is read by ``torch.load(..., weights_only=True)``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ensembler import architectures
from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, ShapeError, UsageError
from ensembler.run import load_tensors

__all__ = ["Checkpoint", "fit", "pretrained", "read"]

_NESTED = ("state_dict", "model_state_dict", "model_state", "model", "net", "model_ema")
_ANOTHER = "these weights are another architecture's"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights by name, and a description of their origin."""

    origin: str
    tensors: Mapping[str, Tensor]


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU.

    ``.safetensors`` is read as such, any other file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) as PyTorch's. It is a
    state dict, or has one under a key: the first of ``state_dict``, ``model_state_dict``, ``model_state``, ``model``,
    ``net`` and ``model_ema``. Prefixes of wrappers are removed from the names: ``module.`` of ``DataParallel`` and
    ``AveragedModel`` (and the latter's ``n_averaged``), ``_orig_mod.`` of ``torch.compile``.

    Raises:
        ArtefactError: there is no such file, it holds pickled objects, or it holds no state dict.
        CorruptError: the file is damaged, or PyTorch cannot read its format.
    """
    content: Any
    try:
        if path.is_dir():
            raise IsADirectoryError
        if path.suffix.lower() == ".safetensors":
            content = load_tensors(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it warns about, it also refuses or reads
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ArtefactError(f"no weights at {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ArtefactError(f"{path} is a folder: name the file of weights in it") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # any exception: the file is untrusted
        if pickled := re.search(r"GLOBAL ([\w.]+)|(TorchScript|legacy \.tar)", str(error)):
            raise ArtefactError(
                f"{path} holds more than tensors ({pickled[1] or pickled[2]}), and reading that could run code: "
                "save only the state dict, torch.save(network.state_dict(), FILE)"
            ) from error
        raise CorruptError(f"{path} is damaged, or not a file of weights: copy or download it again") from error
    for _ in range(3):  # state dicts may be nested, but an untrusted file may nest them without end
        if isinstance(content, Mapping):
            content = next((content[key] for key in _NESTED if isinstance(content.get(key), Mapping)), content)
    return _strip_prefixes(_check_state_dict(content, path))


def fit(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """Load a state dict into a network, in place, except for a head with another number of classes.

    The head is the last linear layer (or the last convolution of a network without one). If ``state`` has no tensors
    for it, or they differ only in the number of outputs, the head keeps its current weights. Checkpoints older than
    BatchNorm's ``num_batches_tracked`` load, too. All other names and shapes must match; otherwise nothing is written.

    An auxiliary head is a layer like any other: torchvision's weights of ``inception_v3`` and ``googlenet`` are refused
    for another number of classes.

    Returns:
        The names of the head's tensors if it kept its current weights, else an empty list.

    Raises:
        ShapeError: a tensor is missing, unknown, or of another shape or type; the message names it.
    """
    own = _tensors(network)
    head = _mismatched_head(network, state)
    fresh = [name for name in own if head is not None and name.startswith(head)]
    for name, given in state.items():
        if head is not None and name.startswith(head):
            continue
        if name not in own:
            raise ShapeError(f"the network has no tensor {name!r}, of {_kind(given)}: {_ANOTHER}")
        if given.shape != own[name].shape or given.is_floating_point() != own[name].is_floating_point():
            raise ShapeError(f"tensor {name!r}: expected {_kind(own[name])}, found {_kind(given)}: {_ANOTHER}")
    for name in own:
        if name not in state and name not in fresh and not name.endswith("num_batches_tracked"):
            raise ShapeError(f"no weights for tensor {name!r}, of {_kind(own[name])}: {_ANOTHER}")
    for name, tensor in own.items():
        if name in state and name not in fresh:
            tensor.copy_(state[name])
    return fresh


def pretrained(architecture: str, weights: str = "DEFAULT") -> dict[str, Tensor]:
    """Load the published weights of a network of torchvision or timm, from its cache or by download.

    Args:
        architecture: ``torchvision:NAME`` or ``timm:NAME``.
        weights: for torchvision, a name of ``torchvision.models.get_model_weights(NAME)``, e.g. ``IMAGENET1K_V1``; for
            timm, whose model names include the weights (``NAME.TAG``), ``DEFAULT``.

    Raises:
        UsageError: the architecture has no published weights, or none of that name.
        ArtefactError: the download failed; the message says from where, and where to put the file by hand.
        CorruptError: the file is not the published one.
    """
    library, _, name = architecture.partition(":")
    if library == "torchvision":
        return _torchvision(name, weights)
    if library == "timm":
        return _timm(name, weights)
    raise UsageError(f"{architecture} has no published weights: use torchvision:NAME, timm:NAME or a file of weights")


def _check_state_dict(content: object, path: Path) -> dict[str, Tensor]:
    """Return ``content`` if it is a state dict, else raise ArtefactError."""
    remedy = "save the network's state_dict()"
    if not isinstance(content, Mapping):
        raise ArtefactError(f"{path} holds a {type(content).__name__}, not weights by name: {remedy}")
    if not any(isinstance(value, Tensor) for value in content.values()):
        keys = ", ".join(map(repr, list(content)[:5])) or "nothing"
        raise ArtefactError(f"{path} holds no weights ({keys}): {remedy}")
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise ArtefactError(f"{path} holds more than weights (a {type(value).__name__} as {name!r}): {remedy}")
    return {name: value.detach() for name, value in content.items()}


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while (names := state.keys() - {"n_averaged"}) and all(name.startswith("module.") for name in names):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items() if name in names}
    return state


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


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _torchvision(name: str, weights: str) -> dict[str, Tensor]:
    from torchvision import models

    try:
        published = models.get_model_weights(name).__members__
    except ValueError as error:
        raise UsageError(f"torchvision has no network {name!r}: see torchvision.models.list_models()") from error
    if weights not in published:
        raise UsageError(f"torchvision has no weights {weights!r} of {name}: use {' or '.join(published)}")
    url = published[weights].url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name)
    try:
        with _weights_only(), torch.random.fork_rng(devices=[]):
            # Load through the network, because torchvision translates the old names in some files.
            return _tensors(architectures.from_torchvision(name, weights=published[weights]))
    except EnsemblerError:
        raise
    except (OSError, HTTPException) as error:
        raise ArtefactError(f"cannot fetch {url} ({_reason(error)}): put that file at {file}") from error
    except Exception as error:  # any exception: the file is untrusted
        raise CorruptError(f"{file} is damaged ({_reason(error)}): remove it, then {url} is fetched again") from error


def _timm(name: str, weights: str) -> dict[str, Tensor]:
    if weights != "DEFAULT":
        raise UsageError(f"timm:{name} has no weights {weights!r}: use DEFAULT, or timm:NAME.TAG for others")
    try:
        with _weights_only(), torch.random.fork_rng(devices=[]):
            return _tensors(architectures.from_timm(name, pretrained=True))
    except EnsemblerError:
        raise
    except Exception as error:  # any exception: timm and the client of its hub raise many
        import timm  # type: ignore[import-not-found]

        origin = timm.get_pretrained_cfg(name)
        url = f"https://huggingface.co/{origin.hf_hub_id}" if origin.hf_hub_id else origin.url
        raise ArtefactError(
            f"cannot fetch {url} ({_reason(error)}): "
            "fetch it on a machine with a network, and copy that machine's cache (HF_HOME, TORCH_HOME) here"
        ) from error


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}


@contextmanager
def _weights_only() -> Iterator[None]:
    """Make every ``torch.load`` inside refuse pickled objects, including those of other libraries."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _reason(error: Exception) -> str:
    """Return the first sentence of another library's error message."""
    sentence = str(getattr(error, "reason", error)).partition("\n")[0].partition(". ")[0]
    return sentence.rstrip(".:") or type(error).__name__
