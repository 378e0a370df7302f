"""Members in fewer bits: how, and the bounds within which their answers may differ from float32's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from ensembler.errors import ExportError
from ensembler.serve.export.graphs import save, silence
from ensembler.serve.runtime.manifest import PrecisionCheck
from ensembler.uncertainty import mean_probabilities, mutual_information

__all__ = ["BOUNDS", "Precision", "check_precision", "rank_correlation", "to_float16", "to_int8"]

Precision = Literal["float32", "float16", "int8"]

BOUNDS = {"float16": (0.99, 0.002), "int8": (0.95, 0.01)}
"""Of each precision: the least rank correlation of the mutual information, the largest drop of the accuracy."""

_BATCH = 32
_QUANTISED = ["Conv", "Gemm", "MatMul"]


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with weights and activations in float16, but for its ends; the weights keep their names."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with silence():
        converted: onnx.ModelProto = convert_float_to_float16(copy, keep_io_types=True)
    del converted.graph.value_info[:]
    return converted


def to_int8(model: onnx.ModelProto, images: NDArray[np.generic]) -> onnx.ModelProto:
    """The graph with convolutions and matrix products in 8-bit integers (QDQ, static, a scale for each channel).

    Args:
        model: in float32.
        images: (B, H, W, 3) as the graph takes them: the range of every activation is taken from them. From training
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
    precision: Precision, reference: NDArray[np.floating], found: NDArray[np.floating], labels: NDArray[np.integer]
) -> PrecisionCheck:
    """What a precision changed; it must stay within :data:`BOUNDS`.

    Args:
        precision: not float32.
        reference: (M, B, C) the members' probabilities in float32.
        found: (M, B, C) likewise in this precision.
        labels: (B,) of images held out from training.

    Raises:
        ExportError: the doubt of the images is ranked otherwise, or too many answers are worse.
    """
    least, most = BOUNDS[precision]
    before, after = (float((mean_probabilities(m).argmax(-1) == labels).mean()) for m in (reference, found))
    doubts = mutual_information(reference), mutual_information(found)
    correlation = None if doubts[0] is None or doubts[1] is None else rank_correlation(doubts[0], doubts[1])
    check = PrecisionCheck(
        examples=len(labels),
        rank_correlation=correlation,
        least_rank_correlation=least,
        accuracy_drop=before - after,
        most_accuracy_drop=most,
    )
    if not (correlation is None or correlation >= least) or check.accuracy_drop > most + 1e-12:
        ranks = "" if correlation is None else f"rank correlation {correlation:.4f} (at least {least} is asked for), "
        raise ExportError(
            f"{precision} changes this ensemble too much on {len(labels)} validation images: mutual information's "
            f"{ranks}accuracy from {before:.4f} to {after:.4f} (a drop of at most {most} is allowed): export in float32"
        )
    return check


def rank_correlation(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing theirs; 0 where all values of one are equal."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(a), rankdata(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=1)).prod()
    return float((ranks[0] * ranks[1]).sum() / scale) if scale > 0 else 0.0
