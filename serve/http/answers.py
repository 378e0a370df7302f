"""From what the runtime knows of some images to what a caller asked for: JSON, or one array as ``.npy``."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.errors import UsageError
from ensembler.serve.http.batcher import Columns
from ensembler.serve.http.options import CALIBRATED, OUTPUTS, STANDARD, Options
from ensembler.serve.http.schemas import ModelCard
from ensembler.serve.runtime.runtime import Prediction, Runtime

__all__ = ["as_columns", "as_json", "as_npy", "calibration_id", "content", "metadata", "model_card", "with_outputs"]

Array = NDArray[np.generic]


def as_columns(prediction: Prediction) -> Columns:
    """A prediction of B images as arrays (B, ...); what one member cannot say is left out."""
    columns: dict[str, Array | None] = {
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
    """The columns, and those of the calibrated outputs that were asked for."""
    result = dict(columns)
    fitted = runtime.calibration
    if fitted is not None:
        pooled = columns["probabilities"]
        if "calibrated" in options.outputs:
            result["calibrated"] = calibration.apply(fitted, pooled)
        if "prediction_set" in options.outputs:
            result["prediction_set"] = calibration.prediction_sets(fitted, pooled, options.alpha)
        if "abstain" in options.outputs:
            result["abstain"] = calibration.abstain(fitted, pooled)
    return result


def content(columns: Columns, options: Options, runtime: Runtime) -> dict[str, Any]:
    """The answer as :class:`ensembler.serve.runtime.manifest.Answer` has it, ready for JSON."""
    classes = runtime.manifest.classes
    fields = {output: _values(output, columns, classes) for output in options.outputs}
    if options.mode != "full" or options.members not in (None, runtime.members):
        fields["partial"] = (~columns["complete"].astype(bool)).tolist()
    answer: dict[str, Any] = {
        "model": model_card(runtime).model_dump(),
        "predictions": [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)],
    }
    if set(options.outputs) & set(CALIBRATED):
        answer["calibration_id"] = calibration_id(runtime)
    if options.alpha is not None:
        answer["alpha"] = options.alpha
    return answer


def as_json(columns: Columns, options: Options, runtime: Runtime) -> bytes:
    """:func:`content` as UTF-8."""
    return json.dumps(content(columns, options, runtime), allow_nan=False).encode()


def as_npy(columns: Columns, options: Options) -> bytes:
    """The one output that was asked for, or the probabilities, as a ``.npy`` file.

    Raises:
        UsageError: several outputs, or one that is no array of numbers or not known.
    """
    outputs = ("probabilities",) if set(STANDARD) <= set(options.outputs) else options.outputs
    name = "probabilities" if outputs[0] == "mean" else outputs[0]
    if len(outputs) > 1:
        raise UsageError(f"a .npy holds one array: ask for one of the outputs ({', '.join(OUTPUTS)}), or for JSON")
    if name not in columns:
        raise UsageError(f"{name} is not an array of numbers here: ask for JSON, or for another output")
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(columns[name]), allow_pickle=False)
    return file.getvalue()


def model_card(runtime: Runtime) -> ModelCard:
    """Which ensemble answers."""
    manifest = runtime.manifest
    return ModelCard(
        method=manifest.method,
        architecture=manifest.architecture,
        dataset=manifest.dataset,
        members=runtime.members,
        bundle=runtime.sha256,
    )


def metadata(runtime: Runtime, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The model card at length: the bundle's manifest, what it costs to ask, its calibration, this server's limits."""
    manifest, fitted = runtime.manifest, runtime.calibration
    return {
        "bundle": runtime.sha256,
        "manifest": manifest.model_dump(mode="json"),
        "inference": {
            "members": runtime.members,
            "forward_passes_per_image": runtime.members,
            "threads": runtime.threads,
            "device": runtime.device,
            "memory_bytes": runtime.memory,
        },
        "calibration": None
        if fitted is None
        else {
            "id": calibration_id(runtime),
            "dataset": fitted.dataset,
            "fitted": fitted.fitted,
            "held_out": fitted.held_out,
            "map": fitted.map.method,
            "conformal": fitted.conformal.method,
            "alpha": fitted.conformal.alpha,
            "abstention": None if fitted.abstention is None else fitted.abstention.model_dump(),
            "before": fitted.before,
            "after": fitted.after,
        },
        "outputs": [
            output
            for output in OUTPUTS
            if output not in CALIBRATED
            or (fitted is not None and (output != "abstain" or fitted.abstention is not None))
        ],
        "settings": dict(settings),
    }


def calibration_id(runtime: Runtime) -> str | None:
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
