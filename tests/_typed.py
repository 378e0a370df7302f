"""A user's script, which ``make types`` checks with ``mypy --strict`` against the wheel, and nobody runs.

What must be an error has an ignore, which is one itself where there is no error (``--warn-unused-ignores``).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ensembler import Ensemble, Run, as_dataset
from ensembler.eval import scores
from ensembler.eval.options import CalibrationOptions, EvaluationOptions
from ensembler.options import option
from ensembler.serve import Runtime
from ensembler.trainers import FGE, Complex, Curve, Members, Method, Settings, Trainer, combine, train
from ensembler.trainers.events import Event


def network(num_classes: int) -> nn.Module:
    return nn.Linear(3, num_classes)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def tell(event: Event) -> None:
    print(event)


class Mine(Method):
    """Make two members."""

    command = "train-mine"

    members: int = option(2, ge=1, help="M.")

    def train(self, trainer: Trainer) -> Members:
        raise NotImplementedError


data = as_dataset((np.zeros((9, 3)), np.arange(9)), classes=np.array(["cat", "dog"]), name="pets")
settings = Settings(
    epochs=1,
    loss=loss,
    optimiser=torch.optim.Adam,
    augmentation=nn.Identity(),
    class_weights=torch.ones(2),
    init=Path("a.pt"),
    device=torch.device("cpu"),
)
name: str = settings.loss
run: Run = train(data, FGE(members=5), settings, network=network, on_event=tell)
train((np.zeros((9, 3)), np.arange(9)), Mine(members=3), Settings(loss="task", class_weights=[1, 2]))
Curve(first="runs/a", second=run.save(Path("runs/b")))
Complex(modes=["runs/a", Path("runs/b")])
both: Run = combine({"a": run, "b": run}, data)
ensemble: Ensemble = Ensemble.load("runs/b", torch.device("cpu"), network=network)
labels: list[str] = ensemble.predict(data.test).labels
accuracy: float = ensemble.evaluate(shift="cifar10c", dataset=data).report.runs[0].clean.accuracy
EvaluationOptions(shift="cifar10c", ood=("noise:gaussian",), cache="kept", device=torch.device("cpu"))
CalibrationOptions(alpha=0.1, data=Path("data"))
bundle: Path = ensemble.export("bundle", layout="single")
found = Runtime.load(bundle).predict(np.zeros((1, 32, 32, 3), np.uint8))
score: float | None = scores(found.probabilities, [1])["nll"]

Settings(epohs=3)  # type: ignore[call-arg]
FGE(members="many")  # type: ignore[arg-type]
Settings(loss=3)  # type: ignore[arg-type]
train(data, FGE)  # type: ignore[arg-type]
