"""KServe's Open Inference Protocol, version 2: requests and answers as named tensors, as JSON or bytes.

The protocol: https://github.com/kserve/open-inference-protocol. Its binary tensor extension: the header
``Inference-Header-Content-Length`` gives the length of the JSON, after which the tensors' bytes follow, in order.

The one input is ``images``: whole numbers of shape (B, H, W, 3), or ``BYTES`` of shape (B,), an image file each. The
outputs are those of :mod:`ensembler.serve.http.options`; what they depend on is in the request's ``parameters``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler import __version__
from ensembler.errors import ShapeError, UsageError
from ensembler.serve.http.batcher import Columns
from ensembler.serve.http.json_body import Limits, file_of, parse
from ensembler.serve.http.options import CALIBRATED, OUTPUTS, Options, Output, calibrated_outputs
from ensembler.serve.runtime.images import kind_of, pixels_of, shown
from ensembler.serve.runtime.runtime import Runtime

__all__ = ["HEAD_LENGTH", "INTEGERS", "Question", "answer", "check", "model", "read", "server"]

HEAD_LENGTH = "Inference-Header-Content-Length"

INTEGERS = {f"{sign}INT{8 * size}": f"<{sign.lower() or 'i'}{size}" for sign in ("", "U") for size in (1, 2, 4, 8)}
_DATATYPES = {"i": "INT64", "b": "BOOL", "O": "BYTES"}
_INPUT = 'send one input {"name": "images", "shape": [...], "datatype": "UINT8", "data": [...]}'
_MOST_DIMENSIONS = 6


@dataclass(frozen=True)
class Question:
    """A request for inference.

    Attributes:
        images: (B, H, W, 3), unchecked; ``None`` where files were sent.
        files: contents of image files; ``None`` where pixels were sent.
        options: the fields of :class:`~ensembler.serve.http.options.Options`.
        id: the caller's, which the answer repeats.
        binary: of each output that is named, whether it is wanted as bytes.
        all_binary: the same for outputs that are not.
    """

    images: NDArray[Any] | None
    files: list[bytes] | None
    options: dict[str, Any]
    id: str | None
    binary: dict[str, bool]
    all_binary: bool


def server() -> dict[str, Any]:
    """Return what ``/v2`` answers."""
    return {"name": "ensembler", "version": __version__, "extensions": ["binary_tensor_data"]}


def model(runtime: Runtime) -> dict[str, Any]:
    """Return what ``/v2/models/NAME`` answers; sizes that vary are -1."""
    manifest, fitted = runtime.manifest, runtime.calibration
    classes, members = len(manifest.classes), runtime.members
    wide = {"probabilities": [classes], "mean": [classes], "calibrated": [classes], "prediction_set": [classes]}
    wide["members"] = [-1, classes]
    kinds = {"class": "INT64", "members_used": "INT64", "label": "BYTES", "members": "FP32"}
    kinds |= {"prediction_set": "BOOL", "abstain": "BOOL"}
    outputs = [output for output in OUTPUTS if output not in CALIBRATED or output in calibrated_outputs(fitted)]
    return {
        "name": manifest.run.name,
        "versions": ["1"],
        "platform": "ensembler_onnxruntime",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, *manifest.image_shape]}],
        "outputs": [
            {"name": output, "datatype": kinds.get(output, "FP64"), "shape": [-1, *wide.get(output, [])]}
            for output in outputs
            if members > 1 or output not in ("mutual_information", "disagreement")
        ],
    }


def read(body: bytes, head_length: str | None, limits: Limits) -> Question:
    """Read the body of a request for inference.

    Args:
        body: whole.
        head_length: of the header :data:`HEAD_LENGTH`; ``None`` without one.
        limits: of the JSON.

    Raises:
        ShapeError: not such a request, or tensors of other sizes than it says.
        UsageError: an output that does not exist.
        TooLargeError: more JSON than the limits allow.
    """
    head = len(body)
    if head_length is not None:
        if not (head_length.isascii() and head_length.isdecimal() and int(head_length[:18]) <= len(body)):
            raise ShapeError(f"{HEAD_LENGTH} is {shown(head_length)} of {len(body)} bytes: send the JSON's length")
        head = int(head_length[:18])
    content = _object(parse(body[:head], limits), "the body")
    inputs = content.get("inputs")
    if not (isinstance(inputs, list) and len(inputs) == 1):
        raise ShapeError(f"the body has not one input: {_INPUT}")
    tensor = _object(inputs[0], "inputs[0]")
    if tensor.get("name") != "images":
        raise ShapeError(f"the input is called {shown(tensor.get('name'))}, not images: {_INPUT}")
    images, files = _tensor(tensor, memoryview(body)[head:])
    parameters = dict(_object(content.get("parameters") or {}, "parameters"))
    all_binary = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    binary = _outputs(content.get("outputs"), all_binary)
    if "outputs" in parameters:
        raise UsageError("outputs is no parameter: send it beside inputs")
    name = content.get("id")
    if name is not None and not isinstance(name, str):
        raise ShapeError(f"id is {kind_of(name)}, not a string: send a string, or none")
    options = parameters | ({"outputs": list(binary)} if binary else {})
    return Question(images, files, options, name, binary, all_binary)


def check(question: Question, options: Options) -> None:
    """Check that the outputs of a request, whose options are resolved, are tensors.

    Raises:
        UsageError: one is not.
    """
    if "members" in question.binary and options.mode != "full":
        raise UsageError("members is a tensor only where all images ask the same ones: leave out mode, or members")
    if options.members == 1 and (missing := {"mutual_information", "disagreement"} & question.binary.keys()):
        raise UsageError(f"{min(missing)} of one member is not defined: leave it out of outputs")


def answer(columns: Columns, options: Options, question: Question, runtime: Runtime) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON where bytes follow."""
    tensors, parts = [], []
    for output in options.outputs or []:
        values = _values(output, columns, runtime)
        if values is None:
            continue
        tensor: dict[str, Any] = {"name": output, "shape": list(values.shape)}
        tensor["datatype"] = _DATATYPES.get(values.dtype.kind) or f"FP{8 * values.dtype.itemsize}"
        if question.binary.get(output, question.all_binary):
            parts.append(_bytes(values))
            tensor["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            tensor["data"] = values.ravel().tolist()
        tensors.append(tensor)
    content: dict[str, Any] = {"model_name": runtime.manifest.run.name, "model_version": "1", "outputs": tensors}
    if question.id is not None:
        content["id"] = question.id
    head = json.dumps(content, allow_nan=False).encode()
    return b"".join([head, *parts]), len(head) if parts else None


def _values(output: Output, columns: Columns, runtime: Runtime) -> NDArray[Any] | None:
    """An output as an array; ``None`` for what one member alone does not have."""
    if output == "label":
        return np.array([runtime.manifest.classes[index] for index in columns["class"]], dtype=object)
    return columns.get("probabilities" if output == "mean" else output)


def _bytes(values: NDArray[Any]) -> bytes:
    if values.dtype.kind != "O":
        return np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).tobytes()
    texts = [str(text).encode() for text in values.ravel()]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _outputs(wanted: Any, all_binary: bool) -> dict[str, bool]:
    """The outputs that a request names, and whether each is wanted as bytes."""
    if wanted is not None and not isinstance(wanted, list):
        raise ShapeError(f"outputs is {kind_of(wanted)}, not a list: send a list of objects with a name")
    binary: dict[str, bool] = {}
    for place, one in enumerate(wanted or []):
        name = _object(one, f"outputs[{place}]").get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            raise UsageError(f"outputs[{place}] is {shown(name)}: use one of {', '.join(OUTPUTS)}")
        if name in binary:
            raise UsageError(f"outputs[{place}] is {shown(name)} again: name each output once")
        parameters = dict(_object(one.get("parameters") or {}, f"outputs[{place}].parameters"))
        binary[name] = _flag(parameters.pop("binary_data", all_binary), "binary_data")
        if parameters:
            unknown = shown(min(parameters))
            raise UsageError(f"outputs[{place}] has the parameter {unknown}: binary_data is the only one")
    return binary


def _tensor(tensor: Mapping[str, Any], rest: memoryview) -> tuple[NDArray[Any] | None, list[bytes] | None]:
    """The input as pixels, or as files."""
    shape, datatype = tensor.get("shape"), tensor.get("datatype")
    whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**31 for size in shape)
    if not (isinstance(shape, list) and whole and 0 < len(shape) <= _MOST_DIMENSIONS):
        raise ShapeError("the input has no shape of whole numbers from 1 up: send its shape, such as [1, 32, 32, 3]")
    if datatype not in (*INTEGERS, "BYTES"):
        raise ShapeError(f"the input's datatype is {shown(datatype)}: send UINT8 pixels, or BYTES of image files")
    count = math.prod(shape)
    size = _object(tensor.get("parameters") or {}, "the input's parameters").get("binary_data_size")
    if ("data" in tensor) == (size is not None):
        raise ShapeError("the input has not one of data and binary_data_size: send its values as JSON, or as bytes")
    if size is None and rest:
        raise ShapeError(f"{len(rest)} bytes follow the JSON, but no binary_data_size: send their number")
    if size is not None and (type(size) is not int or size != len(rest)):
        raise ShapeError(f"binary_data_size is {shown(size)}, but {len(rest)} bytes follow the JSON: send their number")
    if datatype == "BYTES":
        if len(shape) != 1:
            raise ShapeError(f"BYTES of shape {shape}: send image files as a tensor of one dimension")
        data = tensor.get("data")
        files = list(_elements(rest)) if size is not None else _files(data)
        if len(files) != count:
            raise ShapeError(f"the shape {shape} is not that of {len(files)} image files: send their number")
        return None, files
    if size is None:
        return pixels_of(tensor["data"], tuple(shape)), None
    dtype = np.dtype(INTEGERS[str(datatype)])
    if size != count * dtype.itemsize:
        raise ShapeError(f"{size} bytes are not a tensor {shape} of {datatype}: send all of its values")
    return np.frombuffer(rest, dtype=dtype).reshape(shape), None


def _files(data: Any) -> list[bytes]:
    if not isinstance(data, list):
        raise ShapeError(f"data is {kind_of(data)}, not a list: send image files in base64")
    return [file_of(one, f"data[{place}]") for place, one in enumerate(data)]


def _elements(rest: memoryview) -> Iterator[bytes]:
    """The elements of a tensor of ``BYTES``, each after its length."""
    start = 0
    while start < len(rest):
        end = start + 4 + (struct.unpack_from("<I", rest, start)[0] if start + 4 <= len(rest) else len(rest))
        if end > len(rest):
            raise ShapeError("the bytes end within an element: send 4 bytes of length before each image file")
        yield bytes(rest[start + 4 : end])
        start = end


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ShapeError(f"{where} is {kind_of(value)}, not an object: {_INPUT}")
    return value


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}: send true or false")
    return value
