"""Published weights of torchvision and timm, from their cache or by download. Nothing is unpickled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, UsageError
from ensembler.networks import architectures
from ensembler.networks.checkpoints import Checkpoint

__all__ = ["pretrained"]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def pretrained(architecture: str, weights: str = "DEFAULT") -> Checkpoint:
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
    if library not in ("torchvision", "timm"):
        raise UsageError(
            f"{architecture} has no published weights: use torchvision:NAME, timm:NAME or a file of weights"
        )
    state = _torchvision(name, weights) if library == "torchvision" else _timm(name, weights)
    return Checkpoint(f"{architecture} {weights}", {"": state})


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
        hub = getattr(origin, "hf_hub_id", None)
        url = f"https://huggingface.co/{hub}" if hub else getattr(origin, "url", name)
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
