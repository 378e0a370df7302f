"""What all methods share: the network, the optimiser, the seed, and how it is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ensembler.errors import UsageError
from ensembler.options import Options, option

if TYPE_CHECKING:
    import torch

    from ensembler.datasets import Dataset

__all__ = ["Settings"]


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
    init: str | None = option(
        None, path=True, help="Start from a run (its first member) or from a .safetensors or .pt file."
    )
    weights: str | None = option(None, help="Start from published weights of torchvision or timm: DEFAULT, or a name.")
    epochs: float = option(20, gt=0, help="Passes over the training images for one solution.")
    batch_size: int | None = option(
        None, ge=1, help="Images a step, all processes together. (default: 128, or 32 under 10,000 images)"
    )
    lr: float = option(0.1, gt=0, help="Highest learning rate of a solution.")
    schedule: Literal["one-cycle", "cosine", "piecewise"] = option(
        "one-cycle", help="Learning-rate schedule of a solution."
    )
    momentum: float = option(0.9, ge=0, lt=1, help="Nesterov momentum of SGD.")
    weight_decay: float = option(5e-4, ge=0, help="Weight decay of SGD.")
    clip: float = option(1.0, ge=0, help="Largest norm of the gradient; 0 for no limit.")
    augmentation: str | None = option(
        None,
        panel="Images",
        help="crop-flip, crop, resized-crop-flip or none. (default: what suits the dataset)",
    )
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = option(
        "float32", help="Precision of the forward and backward pass; tf32, float16: GPU only."
    )
    sync_batchnorm: bool = option(
        False,
        flag="--sync-batchnorm",
        help="Under torchrun, normalise over the images of all GPUs, not of each.",
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
        help="Whether a simplex's vertices and inside and a curve's points are measured, which takes forward passes.",
    )
    seed: int = option(0, help="Random seed.")
    device: str | None = option(None, computing=True, help="cpu, cuda, ... (default: CUDA where there is one)")
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
        help="Processes that read images from files. (default: one a CPU, at most 8)",
    )

    def resolved(self, dataset: Dataset, architecture: str | None = None) -> Settings:
        """These settings with everything filled in that the data decide.

        Args:
            dataset: what is trained on.
            architecture: of the run that training starts from, if it starts from one.
        """
        return self.model_copy(
            update={
                "architecture": architecture or self.architecture,
                "batch_size": self.batch_size or (128 if len(dataset.train) >= 10_000 else 32),
                "augmentation": self.augmentation or dataset.augmentation,
            }
        )

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
