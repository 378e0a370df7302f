"""The options of the evaluation commands and of their functions in Python, each declared once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ensembler.options import Device, Given, Options, option

__all__ = ["CalibrationOptions", "EvaluationOptions", "ReportOptions", "SurfaceOptions"]


class _Predicting(Options):
    """Where the data are, and how predictions are made."""

    data: Given[str | Path | None, Path | None] = option(
        None,
        panel="Prediction",
        help="Folder of the datasets, and of CIFAR-10-C/; or of the run's images, where they have moved. (default: "
        "$ENSEMBLER_DATA, or a cache folder)",
    )
    dataset: str | None = option(
        None, panel="Prediction", help="Name of the runs' dataset, if it is another now: package.module:NAME."
    )
    download: bool = option(False, panel="Prediction", flag="--download", help="Download the dataset if it is missing.")
    cache: Given[str | Path | None, Path | None] = option(
        None, panel="Prediction", help="Folder of kept predictions. (default: a cache folder)"
    )
    device: Given[str | Device | None, str | None] = option(
        None, panel="Prediction", help="Device, such as cpu or cuda. (default: CUDA where available)"
    )
    batch_size: int | None = option(
        None, ge=1, panel="Prediction", help="Images per forward pass. (default: what suits the device)"
    )


class EvaluationOptions(_Predicting):
    """The test sets of an evaluation, and how they are predicted."""

    shift: Given[str | Sequence[str] | None, list[str] | None] = option(
        None,
        help="Other test images of the same classes: cifar10c or cifar100c (official files where they exist, else "
        "generated), corruptions (generated), some of them (gaussian_noise,fog), a folder or its name in --data, or "
        "hf:NAME. Repeatable.",
    )
    ood: Given[str | Sequence[str] | None, list[str] | None] = option(
        None, help="Out-of-distribution images: a dataset, folder:PATH, or noise:gaussian|uniform|constant. Repeatable."
    )
    corrupt: Literal["refuse", "skip"] = option(
        "refuse", help="Images of an --ood folder that cannot be read: stop, or leave them out and count them."
    )
    examples: int | None = option(None, ge=1, help="Number of test images. (default: all)")
    group: Given[str | Path | None, Path | None] = option(
        None, help="CSV file with the columns image and group, to score groups of test images. (default: by class)"
    )
    views: list[int] = option(
        [0],
        help="Test-time augmentation: random variations of each image, as in training, over which a prediction is "
        "averaged; each member sees its own. 0: the image itself. Repeatable: --views 0 --views 8 scores both.",
    )
    save_predictions: Given[str | Path | None, Path | None] = option(
        None, help="Also write the run's predictions to this .npz file, which eval and compare read as they do runs."
    )
    threads: int | None = option(None, ge=1, panel="Prediction", help="CPU threads. (default: all)")
    seed: int = option(0, help="Random seed of generated images, the choice of examples, and bootstrap intervals.")


class ReportOptions(Options):
    """Where the work is done, and where its report goes."""

    out: Path | None = option(None, help="Folder of the report. (default: a new one in reports/)")
    json_file: Path | None = option(None, flag="--json", help="Also write the report's JSON to this file.")
    engine: Literal["local", "ray"] = option(
        "local", panel="Prediction", help="Where shifted images are predicted: in this process, or by Ray."
    )
    address: str | None = option(
        None, panel="Prediction", help="Address of a Ray cluster. (default: $RAY_ADDRESS, or a new Ray on this machine)"
    )
    full: bool = option(False, flag="--full", help="Print every table; otherwise, some are on the report's page only.")
    quiet: bool = option(False, flag="--quiet", help="Print only the final result.")


class CalibrationOptions(_Predicting):
    """What a calibration fits, and how its predictions are made."""

    method: Literal["temperature", "isotonic", "beta", "histogram", "identity"] = option(
        "temperature", help="Map from the pooled prediction to calibrated probabilities; identity changes none."
    )
    alpha: float = option(0.1, gt=0, lt=1, help="Largest share of prediction sets that miss the true class.")
    conformal: Literal["lac", "aps"] = option("lac", help="Kind of prediction sets.")
    risk: float | None = option(
        None,
        gt=0,
        lt=1,
        help="Largest share of wrong answers, of those not abstained from. (default: no abstention)",
    )
    confidence: float = option(0.95, gt=0, lt=1, help="Probability with which --risk holds.")
    seed: int = option(0, help="Random seed of the choice of images that fit the map.")


class SurfaceOptions(Options):
    """The points of a plane, and the images to measure on."""

    grid: int = option(21, ge=2, help="Points per side.")
    margin: float = option(0.2, ge=0, help="Reach beyond the three points, as a share of their extent.")
    examples: int = option(500, ge=1, help="Largest number of training and of test images to measure on.")
    batchnorm_examples: int = option(
        512, ge=2, help="Largest number of training images for BatchNorm statistics at each point."
    )
    data: Given[str | Path | None, Path | None] = option(
        None,
        help="Folder of the datasets, or of the run's images, where they have moved. (default: $ENSEMBLER_DATA, or a "
        "cache folder)",
    )
    dataset: str | None = option(None, help="Name of the runs' dataset, if it is another now: package.module:NAME.")
    device: Given[str | Device | None, str | None] = option(
        None, help="Device, such as cpu or cuda. (default: CUDA where available)"
    )
    seed: int = option(0, help="Random seed of the choice of images.")
