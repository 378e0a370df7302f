"""Reading of checkpoints: files of weights that were trained elsewhere.

Nothing is unpickled: a file is safetensors, or is read by ``torch.load(..., weights_only=True)``. Which of a file's
state dicts a network takes, :mod:`ensembler.networks.matching` decides by names and shapes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ensembler.errors import ArtefactError, CorruptError
from ensembler.run import load_tensors

__all__ = ["Checkpoint", "read"]

_OF_SEVERAL = re.compile(r"-\d+-of-\d+\.|\.index\.json$")  # as Hugging Face names them
_DEPTH = 5  # of nested state dicts: an untrusted file may nest them without end


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state dicts of a file, and its name.

    Attributes:
        origin: name of the file or of the published weights.
        states: tensors by name, of each place in the file that has some: ``""`` is the file itself, ``"a.b"`` what it
            has as ``["a"]["b"]``.
    """

    origin: str
    states: Mapping[str, Mapping[str, Tensor]]


def read(path: Path) -> Checkpoint:
    """Read the tensors of a checkpoint, on the CPU.

    Files of safetensors and of PyTorch (``.pt``, ``.pth``, ``.bin``, ``.ckpt``) are told apart by their content. What
    is neither a tensor nor a container of them (epochs, options, scores) is ignored.

    Raises:
        ArtefactError: there is no such file, it holds pickled objects, or it holds no tensors by name.
        CorruptError: the file is damaged, or PyTorch cannot read its format.
    """
    content = _read_file(path)
    states = dict(_states(content))
    if not states:
        raise ArtefactError(f"{path} holds {_described(content)}: save the network's state_dict()")
    return Checkpoint(path.name, states)


def _read_file(path: Path) -> Any:
    if _OF_SEVERAL.search(path.name) and path.is_file():
        raise ArtefactError(
            f"{path} is one of several files that hold the weights of one network: load them with what wrote them, and "
            "save them as one, torch.save(network.state_dict(), FILE)"
        )
    try:
        if path.is_dir():
            raise IsADirectoryError
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise ArtefactError(f"no weights at {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ArtefactError(f"{path} is a folder: name the file of weights in it") from error
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        if start[8:] == b"{":  # of safetensors: 8 bytes of length, then JSON
            return load_tensors(path)
        with warnings.catch_warnings(), path.open("rb") as file:  # by a name, PyTorch would go by its suffix
            warnings.simplefilter("ignore")  # what it warns about, it also refuses or reads
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # any exception: the file is untrusted
        if pickled := re.search(r"GLOBAL ([\w.]+)|(TorchScript|legacy \.tar)", str(error)):
            raise ArtefactError(
                f"{path} holds more than tensors ({pickled[1] or pickled[2]}), and reading that could run code: "
                "save only the state dict, torch.save(network.state_dict(), FILE), or where you trust it, "
                "torch.save(torch.load(FILE, weights_only=False)[KEY], NEW)"
            ) from error
        raise CorruptError(f"{path} is damaged, or not a file of weights: copy or download it again") from error


def _states(content: object) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield each place of a file's content that has tensors by name, the outermost first."""
    level, seen = [((), content)], {id(content)}
    for _ in range(_DEPTH):
        below: list[tuple[tuple[str, ...], object]] = []
        for place, found in level:
            if isinstance(found, Mapping):
                tensors = {name: value.detach() for name, value in found.items() if _is_weight(name, value)}
                if tensors:
                    yield ".".join(place), tensors
            for name, value in _items(found):
                if isinstance(value, Mapping | list | tuple) and id(value) not in seen:
                    seen.add(id(value))
                    below.append(((*place, str(name)), value))
        level = below  # type: ignore[assignment]


def _items(container: object) -> Iterator[tuple[object, object]]:
    if isinstance(container, Mapping):
        yield from container.items()
    elif isinstance(container, list | tuple):
        yield from enumerate(container)


def _is_weight(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _described(content: object) -> str:
    """Describe the content of a file that has no weights."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}, not weights by name"
    keys = ", ".join(map(repr, list(content)[:5])) or "nothing"
    return f"no weights by name ({keys})"
