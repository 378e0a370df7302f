"""A bundle as a model of NVIDIA's Triton Inference Server: one ONNX graph and its configuration, no Python.

https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from ensembler.errors import UsageError
from ensembler.serve.export.graphs import save
from ensembler.serve.export.single import single_graph
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.storage import artefact
from ensembler.text import printable

__all__ = ["write_triton"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TYPES: dict[int, str] = {onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.FLOAT: "TYPE_FP32"}


def write_triton(bundle: str | Path, repository: str | Path, name: str | None = None, max_batch: int = 64) -> Path:
    """Write a bundle into a model repository, whole or not at all, after running its members as ``verify`` does.

    Args:
        bundle: its folder.
        repository: folder of models, made where it is missing.
        name: of the model; by default the name of the bundle's run.
        max_batch: images of a forward pass, at most; Triton collects requests up to it.

    Returns:
        The model's folder.

    Raises:
        ArtefactError: no bundle there, members that answer otherwise than it says, or the repository cannot be
            written; CorruptError: the bundle has changed.
        UsageError: no name of a model, or the repository has one of that name.
    """
    bundle, repository = Path(bundle), Path(repository)
    manifest = verify_bundle(bundle).manifest
    name = manifest.run.name if name is None else name
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name of a model: give a --name of letters, digits, '.', '_' and '-'")
    model = single_graph(bundle, manifest)
    with artefact.appear(repository / name) as folder:
        (folder / "1").mkdir()
        save(model, folder / "1" / "model.onnx")
        labels = "".join(f"{printable(label)}\n" for label in manifest.classes)
        (folder / "labels.txt").write_text(labels, encoding="utf-8")
        (folder / "config.pbtxt").write_text(_configuration(model, name, max_batch), encoding="utf-8")
    return repository / name


def _configuration(model: onnx.ModelProto, name: str, max_batch: int) -> str:
    inputs = ",\n".join(map(_put, model.graph.input))
    outputs = ",\n".join(map(_put, model.graph.output))
    return (
        f'name: "{name}"\n'
        'backend: "onnxruntime"\n'
        f"max_batch_size: {max_batch}\n"
        f"input [\n{inputs}\n]\n"
        f"output [\n{outputs}\n]\n"
        "dynamic_batching {\n  max_queue_delay_microseconds: 1000\n}\n"
    )


def _put(value: onnx.ValueInfoProto) -> str:
    """An input or output; Triton has no shape without any axis, but reshapes to one."""
    kind = _TYPES[value.type.tensor_type.elem_type]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
    more = "" if shape else "\n    reshape { shape: [ ] }"
    more += '\n    label_filename: "labels.txt"' if value.name in ("probabilities", "calibrated") else ""
    dims = ", ".join(map(str, shape or [1]))
    return f'  {{\n    name: "{value.name}"\n    data_type: {kind}\n    dims: [ {dims} ]{more}\n  }}'
