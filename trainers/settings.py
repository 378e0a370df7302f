"""What all methods share: the network, the optimiser, the seed, and how it is computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import field_validator

from ensembler.errors import UsageError
from ensembler.naming import reason, register
from ensembler.options import Device, Given, Options, option

if TYPE_CHECKING:
    import torch

    from ensembler.data.datasets import Dataset

__all__ = ["Settings"]


class Numbers(Protocol):
    """An array of NumPy or a tensor."""

    def tolist(self) -> Any: ...


class Settings(Options):
    """Options that every method has. All of them are kept in the run's manifest.

    What is ``None`` depends on the data or the machine; :meth:`resolved` fills it in.
    """

    architecture: str = option(
        "cnn",
        flag="--arch",
        help="cnn, preresnet20/56/110/164, vgg16, vgg16bn, wrn28x10, torchvision:NAME, timm:NAME or "
        "package.module:factory.",
    )
    init: Given[str | Path | None, str | None] = option(
        None, path=True, help="Start from a run (its first member) or from a .safetensors or .pt file."
    )
    weights: str | None = option(None, help="Start from published weights of torchvision or timm: DEFAULT, or a name.")
    epochs: float = option(20, gt=0, help="Passes over the training images for one solution.")
    batch_size: int | None = option(
        None, ge=1, help="Images per step, all processes together. (default: 128, or 32 under 10,000 images)"
    )
    accumulate: int = option(
        1, ge=1, help="N, parts of each batch that go forward and backward one after another: less memory, same step."
    )
    optimiser: Given[str | Callable[..., Any], str] = option(
        "sgd",
        metavar="sgd | adamw | MODULE:CLASS",
        help="sgd, adamw, or any class such as torch.optim:RAdam.",
    )
    parameter_groups: Given[str | Callable[..., Any] | None, str | None] = option(
        None,
        metavar="MODULE:FUNCTION",
        help="Function from the network to parameter groups, as torch.optim takes them. (default: all weights decay "
        "with sgd; otherwise no biases, normalisation layers and embeddings)",
    )
    lr: float | None = option(
        None, gt=0, help="Highest learning rate of a solution. (default: 0.1 with sgd, else the class's: 1e-3 of adamw)"
    )
    schedule: Literal["one-cycle", "cosine", "piecewise"] = option(
        "one-cycle", help="Learning-rate schedule of a solution."
    )
    warmup: float = option(
        0.0,
        ge=0,
        metavar="EPOCHS",
        help="Epochs in which the learning rate of each part rises linearly to its schedule's.",
    )
    momentum: float | None = option(None, ge=0, lt=1, help="Nesterov momentum of sgd. (default: 0.9)")
    weight_decay: float | None = option(
        None, ge=0, help="Weight decay. (default: 5e-4 with sgd, else the class's: 1e-2 of adamw)"
    )
    early_stopping: int = option(
        0,
        ge=0,
        metavar="EPOCHS",
        help="Stop a solution after this many epochs without a lower held-out loss; keep its best weights. 0: never.",
    )
    clip: float = option(1.0, ge=0, help="Largest norm of the gradient; 0 for no limit.")
    loss: Given[str | Callable[..., Any], str] = option(
        "task",
        metavar="task | MODULE:FUNCTION",
        help="Training loss: the task's, cross entropy, or your own, package.module:function of outputs (B, C) and "
        "targets (B,).",
    )
    label_smoothing: float = option(
        0.0, ge=0, lt=1, metavar="E", help="Share of a label's probability that is spread evenly over all classes."
    )
    class_weights: Given[str | Path | Sequence[float] | Numbers, str] = option(
        "none",
        metavar="balanced | none | NUMBERS",
        help="Weight of each class in the loss: balanced, none, numbers as in 1,2.5,1, or a file of numbers.",
    )
    mixup: float = option(
        0.0, ge=0, metavar="ALPHA", help="Mix pairs of images and their losses by a share from Beta(ALPHA, ALPHA)."
    )
    cutmix: float = option(
        0.0, ge=0, metavar="ALPHA", help="Paste a box of another image, whose area is drawn from Beta(ALPHA, ALPHA)."
    )
    augmentation: Given[str | Callable[..., Any] | None, str | None] = option(
        None,
        panel="Images",
        help="crop-flip, crop, resized-crop-flip or none; trivialaugment, randaugment or autoaugment, after the crop "
        "and flip; or package.module:transform of your own. (default: the crop and flip that suit the dataset)",
    )
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = option(
        "float32", help="Precision of the forward and backward pass; tf32, float16: GPU only."
    )
    sync_batchnorm: bool = option(
        False,
        flag="--sync-batchnorm",
        help="Under torchrun, normalise over the images of all GPUs, not of each alone.",
    )
    compile: bool = option(
        False,
        flag="--compile",
        computing=True,
        help="Compile the network with torch.compile: takes a minute, meant for GPUs.",
    )
    eager: bool = option(
        False,
        flag="--eager",
        computing=True,
        help="Launch each step anew on a GPU, instead of capturing it once as a CUDA graph.",
    )
    memory_format: Literal["channels-last", "contiguous"] | None = option(
        None,
        computing=True,
        help="Memory format of images and convolutions. (default: channels-last where the network can)",
    )
    measure: Literal["all", "none"] = option(
        "all",
        computing=True,
        help="all: score held-out images after every epoch, and points of a simplex or curve at the end, which takes "
        "forward passes; none: neither.",
    )
    seed: int = option(0, help="Random seed.")
    device: Given[str | Device | None, str | None] = option(
        None, computing=True, help="Device, such as cpu or cuda. (default: CUDA where available)"
    )
    threads: int | None = option(
        None,
        ge=1,
        computing=True,
        help="CPU threads of one job; the last bits depend on it. (default: all)",
    )
    workers: int | None = option(
        None,
        ge=0,
        computing=True,
        panel="Images",
        help="Processes that read images from files. (default: one per CPU, at most 8)",
    )

    @field_validator("loss", "augmentation", "optimiser", "parameter_groups", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        """A function or class from Python goes by its name."""
        return register(value) if callable(value) else value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Numbers from Python, in a list, array or tensor, or from a file, as they are typed."""
        numbers = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(numbers, Sequence) and not isinstance(numbers, str):
            return ",".join(repr(float(each)) if isinstance(each, int | float) else repr(each) for each in numbers)
        return _read_numbers(Path(value)) if isinstance(value, str | Path) and _names_file(value) else value

    def resolved(self, dataset: Dataset, architecture: str | None = None) -> Settings:
        """These settings with everything filled in that the data or the optimiser decide.

        Args:
            dataset: what is trained on.
            architecture: of the run that training starts from, if it starts from one.

        Raises:
            UsageError: options that do not go together, or no such optimiser.
        """
        from ensembler.data.augmentations import resolve

        batch_size = self.batch_size or (128 if len(dataset.train) >= 10_000 else 32)
        if self.accumulate > 1 and 2 * self.accumulate > batch_size:
            raise UsageError(
                f"--accumulate {self.accumulate} leaves fewer than two of a batch of {batch_size} for each part: lower "
                "it, or raise --batch-size"
            )
        self.check_warmup(self.epochs, f"--epochs {self.epochs:g}")
        if self.early_stopping and not len(dataset.validation):
            raise UsageError("--early-stopping needs held-out examples, and the dataset has none: leave it out")
        return self.model_copy(
            update={
                "architecture": architecture or self.architecture,
                "batch_size": batch_size,
                "augmentation": resolve(self.augmentation, dataset.augmentation),
                **self._resolved_optimiser(),
            }
        )

    def _resolved_optimiser(self) -> dict[str, float | None]:
        from ensembler.trainers.optimisers import default_rates

        name = self.optimiser
        lr, decay = default_rates(name)
        if self.lr is None and lr is None:
            raise UsageError(f"--optimiser {name} has no learning rate by default: give --lr")
        if self.weight_decay and decay is None:
            raise UsageError(f"--optimiser {name} takes no weight decay: leave out --weight-decay")
        if self.momentum is not None and name != "sgd":
            raise UsageError(
                f"--momentum is sgd's, and --optimiser is {name}: leave out one of them (a paper's recipe sets it)"
            )
        return {
            "lr": lr if self.lr is None else self.lr,
            "weight_decay": decay if self.weight_decay is None or decay is None else self.weight_decay,
            "momentum": (0.9 if self.momentum is None else self.momentum) if name == "sgd" else None,
        }

    def check_warmup(self, epochs: float, what: str) -> None:
        """Refuse a warm-up that is no shorter than so many epochs, which ``what`` names."""
        if self.warmup >= epochs:
            raise UsageError(f"--warmup {self.warmup:g} leaves nothing of {what}: lower it")

    @property
    def dtype(self) -> torch.dtype:
        """Of autocast; float32 for none."""
        import torch

        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.precision, torch.float32)

    def check_device(self, device: str) -> None:
        """Refuse what a type of device cannot do.

        Raises:
            UsageError: a GPU's precision, or synchronised BatchNorm, on a CPU.
        """
        if device == "cpu" and self.precision in ("tf32", "float16"):
            raise UsageError(f"{self.precision} needs a GPU: use bfloat16 or float32 on the CPU")
        if device == "cpu" and self.sync_batchnorm:
            raise UsageError("BatchNorm is synchronised on GPUs only: leave out --sync-batchnorm on the CPU")


def _names_file(text: str | Path) -> bool:
    """Return whether class weights are the name of a file: neither a word that stands for some, nor numbers."""
    try:
        float(str(text).partition(",")[0])
    except ValueError:
        return text not in ("balanced", "none") and Path(text).is_file()
    return False


def _read_numbers(path: Path) -> str:
    """Return the numbers of a file, separated by commas: one a line, or a list in JSON."""
    try:
        content = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the class weights of {path}: {reason(error)}") from error
    return ",".join(number for number in re.split(r"[\s,;\[\]]+", content) if number)
