"""From a prediction to the answer that a request asked for: JSON, or one array as ``.npy``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.errors import UsageError
from ensembler.prediction import Prediction
from ensembler.serve.http.batcher import Columns
from ensembler.serve.http.options import CALIBRATED, OUTPUTS, STANDARD, Options, calibrated_outputs
from ensembler.serve.http.schemas import ModelCard
from ensembler.serve.runtime.runtime import Runtime

__all__ = ["array_output", "as_columns", "as_json", "as_npy", "content", "metadata", "with_outputs"]

_PAIRWISE = ("mutual_information", "disagreement")  # one member alone has none
_TEXT = ("label",)


def as_columns(prediction: Prediction) -> Columns:
    """Return a prediction of B images as arrays (B, ...), without what one member alone does not have."""
    columns: dict[str, NDArray[np.generic] | None] = {
        "class": prediction.classes,
        "probabilities": prediction.probabilities,
        "members": prediction.members.swapaxes(0, 1),
        "predictive_entropy": prediction.predictive_entropy,
        "expected_entropy": prediction.expected_entropy,
        "mutual_information": prediction.mutual_information,
        "disagreement": prediction.disagreement,
        "members_used": prediction.members_used,
        "complete": prediction.complete,
    }
    return {name: column for name, column in columns.items() if column is not None}


def with_outputs(columns: Columns, options: Options, runtime: Runtime) -> Columns:
    """Return the columns with the calibrated ones that the options, resolved, ask for."""
    result = dict(columns)
    fitted, outputs = runtime.calibration, options.outputs or ()
    if fitted is not None and set(outputs) & set(CALIBRATED):
        p = calibration.apply(fitted, columns["probabilities"])
        if "calibrated" in outputs:
            result["calibrated"] = p
        if "prediction_set" in outputs:
            result["prediction_set"] = calibration.sets_of(fitted, p, options.alpha)
        if "abstain" in outputs:
            result["abstain"] = calibration.abstentions_of(fitted, p)
    return result


def content(columns: Columns, options: Options, runtime: Runtime) -> dict[str, Any]:
    """Return the answer as :class:`ensembler.serve.http.schemas.Answer` defines it, ready for JSON."""
    classes, outputs = runtime.manifest.classes, options.outputs or ()
    fields: dict[str, list[Any]] = {output: _values(output, columns, classes) for output in outputs}
    if not options.asks_all(runtime.members):
        fields["partial"] = (~columns["complete"].astype(bool)).tolist()
    answer: dict[str, Any] = {
        "model": _model_card(runtime).model_dump(),
        "predictions": [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)],
    }
    if set(outputs) & set(CALIBRATED):
        answer["calibration_id"] = _calibration_id(runtime)
    if options.alpha is not None:
        answer["alpha"] = options.alpha
    return answer


def as_json(columns: Columns, options: Options, runtime: Runtime) -> bytes:
    """Return :func:`content` as UTF-8.

    Raises:
        ValueError: a number is not finite, as JSON has none such.
    """
    return json.dumps(content(columns, options, runtime), allow_nan=False).encode()


def array_output(options: Options) -> str:
    """Return the column that a ``.npy`` answer consists of: the one output, or by default the probabilities.

    Raises:
        UsageError: several outputs, or one that is no array of numbers.
    """
    outputs = ["probabilities"] if set(STANDARD) <= set(options.outputs or STANDARD) else options.outputs or []
    if len(outputs) > 1:
        raise UsageError(f"a .npy holds one array: ask for one of the outputs ({', '.join(OUTPUTS)}), or for JSON")
    name = "probabilities" if outputs[0] == "mean" else outputs[0]
    if name in _TEXT or (name in _PAIRWISE and options.members == 1):
        raise UsageError(f"{name} is not an array of numbers here: ask for JSON, or for another output")
    return name


def as_npy(column: NDArray[np.generic]) -> bytes:
    """Return an array as the content of a ``.npy`` file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(column), allow_pickle=False)
    return file.getvalue()


def metadata(runtime: Runtime, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bundle's manifest, what a prediction costs, the calibration, and this server's limits."""
    fitted = runtime.calibration
    return {
        "bundle": runtime.sha256,
        "manifest": runtime.manifest.model_dump(mode="json"),
        "inference": {
            "members": runtime.members,
            "forward_passes_per_image": runtime.members,
            "threads": runtime.threads,
            "device": runtime.device,
            "memory_bytes": runtime.memory,
            "gpu_memory_bytes": runtime.gpu_memory,
        },
        "calibration": None
        if fitted is None
        else {
            "id": _calibration_id(runtime),
            "map": fitted.map.method,
            "conformal": fitted.conformal.method,
            "alpha": fitted.conformal.alpha,
            "abstention": None if fitted.abstention is None else fitted.abstention.model_dump(),
            **fitted.model_dump(include={"dataset", "fitted", "held_out", "before", "after"}),
        },
        "outputs": [output for output in OUTPUTS if output not in CALIBRATED or output in calibrated_outputs(fitted)],
        "settings": dict(settings),
    }


def _model_card(runtime: Runtime) -> ModelCard:
    manifest = runtime.manifest
    return ModelCard(
        method=manifest.method,
        architecture=manifest.architecture,
        dataset=manifest.dataset,
        members=runtime.members,
        bundle=runtime.sha256,
    )


def _calibration_id(runtime: Runtime) -> str | None:
    """SHA-256 of the bundle's calibration."""
    manifest = runtime.manifest
    return manifest.files[manifest.calibration] if manifest.calibration and runtime.calibration else None


def _values(output: str, columns: Columns, classes: list[str]) -> list[Any]:
    """One field's value for each image."""
    if output == "label":
        return [classes[index] for index in columns["class"]]
    if output == "prediction_set":
        return [[classes[index] for index in np.flatnonzero(row)] for row in columns[output]]
    if output == "members":
        pairs = zip(columns["members"], columns["members_used"], strict=True)
        return [members[: int(used)].tolist() for members, used in pairs]
    name = "probabilities" if output == "mean" else output
    if name not in columns:
        return [None] * len(columns["class"])
    values: list[Any] = columns[name].tolist()
    return values
