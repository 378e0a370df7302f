"""Members at a lower precision, and the bounds on what that may change."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from ensembler import calibration
from ensembler.calibration import Calibration
from ensembler.errors import ExportError
from ensembler.serve.export.graphs import save, silence
from ensembler.serve.runtime.manifest import Precision, PrecisionCheck
from ensembler.uncertainty import mean_probabilities, mutual_information

__all__ = [
    "BOUNDS",
    "CALIBRATED_DISTANCE",
    "calibration_lost",
    "check_precision",
    "rank_correlation",
    "to_float16",
    "to_int8",
]

BOUNDS = {"tf32": (0.99, 0.002), "float16": (0.99, 0.002), "int8": (0.95, 0.01)}
"""Of each precision: the lower bound of the mutual information's rank correlation with float32's, and the upper bound
of the accuracy's drop."""

CALIBRATED_DISTANCE = 0.01
"""The largest mean total variation between calibrated predictions and float32's at which a calibration still holds."""

_BATCH = 32
_QUANTISED = ["Conv", "Gemm", "MatMul"]


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with weights and activations in float16, except its ends; weights keep their names."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with silence():
        converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    del converted.graph.value_info[:]
    return converted


def to_int8(model: onnx.ModelProto, images: NDArray[np.generic]) -> onnx.ModelProto:
    """Return the graph with convolutions and matrix products in 8-bit integers (QDQ, static, a scale a channel).

    Args:
        model: in float32.
        images: (B, H, W, 3) as the graph takes them, from which the range of every activation is taken. Training
            images, so that the bounds are checked on others.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            starts = range(0, len(images), _BATCH)
            self._batches: Iterator[dict[str, NDArray[np.generic]]] = iter(
                [{"images": images[start : start + _BATCH]} for start in starts]
            )

        def get_next(self) -> dict[str, NDArray[np.generic]] | None:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as scratch, silence():
        whole, folded, quantised = (Path(scratch) / f"{name}.onnx" for name in ("whole", "folded", "int8"))
        save(model, whole)
        quant_pre_process(str(whole), str(folded), skip_symbolic_shape=True)
        quantize_static(
            str(folded),
            str(quantised),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_QUANTISED,
        )
        found = onnx.load(quantised)
    del found.graph.value_info[:]
    return found


def check_precision(
    precision: Precision,
    reference: NDArray[np.floating],
    found: NDArray[np.floating],
    labels: NDArray[np.integer],
    fitted: Calibration | None = None,
) -> PrecisionCheck:
    """Return what a precision changes, which must lie within :data:`BOUNDS`.

    Args:
        precision: not float32.
        reference: (M, B, C) the members' probabilities in float32.
        found: (M, B, C) likewise at this precision.
        labels: (B,) of images held out from training.
        fitted: the calibration of the ensemble in float32.

    Raises:
        ExportError: it ranks images by their uncertainty too differently, or loses too much accuracy.
    """
    least, most = BOUNDS[precision]
    means = mean_probabilities(reference), mean_probabilities(found)
    before, after = (float((mean.argmax(-1) == labels).mean()) for mean in means)
    information = mutual_information(reference), mutual_information(found)
    correlation = None
    if information[0] is not None and information[1] is not None:
        correlation = rank_correlation(information[0], information[1])
    distance = None
    if fitted is not None:
        calibrated = [calibration.apply(fitted, mean) for mean in means]
        distance = float(np.abs(calibrated[0] - calibrated[1]).sum(axis=-1).mean() / 2)
    check = PrecisionCheck(
        examples=len(labels),
        rank_correlation=correlation,
        least_rank_correlation=least,
        accuracy_drop=before - after,
        most_accuracy_drop=most,
        calibrated_distance=distance,
        most_calibrated_distance=CALIBRATED_DISTANCE,
    )
    if not (correlation is None or correlation >= least) or check.accuracy_drop > most + 1e-12:
        ranks = "" if correlation is None else f"rank correlation {correlation:.4f} (at least {least} is asked for), "
        raise ExportError(
            f"{precision} changes this ensemble too much on {len(labels)} validation images: mutual information's "
            f"{ranks}accuracy from {before:.4f} to {after:.4f} (a drop of at most {most} is allowed): export in float32"
        )
    return check


def calibration_lost(check: PrecisionCheck | None) -> str | None:
    """Return why a calibration fitted in float32 does not hold for the exported members; ``None`` where it does."""
    distance = None if check is None else check.calibrated_distance
    if distance is None or distance <= CALIBRATED_DISTANCE:
        return None
    return (
        f"it was fitted in float32, and these members' calibrated predictions differ by {distance:.4f} on average (at "
        f"most {CALIBRATED_DISTANCE} is allowed): export in float32 to keep it"
    )


def rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return Spearman's rank correlation, equal values sharing a rank; 0 where all values of one are equal."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if np.ptp(a) and np.ptp(b) else 0.0
