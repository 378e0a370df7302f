"""What outputs mean and what data is: a task and a kind of data of one's own, from training to scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ensembler import Ensemble, Run, task
from ensembler.data import examples
from ensembler.data.datasets import Dataset
from ensembler.data.examples import Arrays, Examples, stream
from ensembler.errors import DataError, ShapeError, UsageError
from ensembler.task import Classification, Task
from ensembler.trainers import (
    FGE,
    SWAG,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    Settings,
    Simplex,
    Snapshots,
    Subspace,
    collapse_run,
    train,
)
from tests._interrupt import after, make
from tests.test_cli import call
from tests.test_resume import assert_the_same

FEATURES = 4


class Toy(Task):
    """A Gaussian's mean, its variance being 1; the loss is half the squared error."""

    name = "tests.test_task:Toy"
    metric = "absolute_error"

    def outputs(self, classes):
        return 1

    def losses(self, outputs, targets):
        return (outputs[:, 0] - targets).square() / 2

    def metrics(self, outputs, targets):
        return (outputs[:, 0] - targets).abs()

    def distances(self, outputs, others):
        return (outputs - others).square().sum(dim=1)

    def distribution(self, outputs):
        return outputs.float()

    def combine(self, members):
        return members.mean(dim=0)

    def nll(self, predicted, targets):
        return (self.losses(predicted, targets) + math.log(2 * math.pi) / 2).double().mean().item()

    def error(self, predicted, targets):
        return math.sqrt((predicted[:, 0] - targets).double().square().mean().item())

    def scores(self, members, targets):
        mean = self.combine(members)
        return {"rmse": self.error(mean, targets), "nll": self.nll(mean, targets)}

    def disagreement(self, members):
        return members.std(dim=0).mean().item() if len(members) > 1 else 0.0


class Robust(Toy):
    """Likewise, trained by the absolute error."""

    name = "tests.test_task:Robust"

    def losses(self, outputs, targets):
        return self.metrics(outputs, targets)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of features in hundredths, as integers; training may move each by one."""

    kind = "tests.test_task:Rows"
    augmentations = ("rounding", "none")

    data: Tensor  # (N, F) int16
    labels: Tensor  # (N,) float32

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def example_shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape[1:])

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()

    def to(self, device) -> Rows:
        return Rows(self.data.to(device), self.labels.to(device))

    def part(self, index) -> Rows:
        return Rows(self.data[index], self.labels[index])

    def batches(self, size) -> Iterator[Rows]:
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))

    def augmented(self, index, augmentation, choices) -> Rows:
        part = self.part(index)
        return part if augmentation == "none" else Rows(part.data + choices.to(torch.int16), part.labels)

    def stream(self, epochs, cut, augmentation, device, workers):
        return stream(self, epochs, cut, augmentation, device)

    @staticmethod
    def draw(augmentation, count, generator):
        return torch.randint(-1, 2, (count, FEATURES if augmentation == "rounding" else 0), generator=generator)

    @staticmethod
    def inputs(mean, std, device):
        return lambda rows: (rows / 100 - torch.tensor(mean, device=device)) / torch.tensor(std, device=device)

    @staticmethod
    def check(x, shape, mean, std):
        if x.dim() != 2 or x.shape[1:] != tuple(shape):
            raise ShapeError(f"expected rows of {shape[0]}, found {tuple(x.shape)}")
        return not x.is_floating_point()


def mlp(num_classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, num_classes))
    )


def linear(num_classes: int) -> nn.Module:
    return nn.Linear(FEATURES, num_classes)


WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 0.0])


def rows(noise: float = 0.1) -> Dataset:
    """Rows of features, and a linear function of them, 3 more, and noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Rows:
        data = torch.randint(-200, 200, (count, FEATURES), generator=generator).to(torch.int16)
        labels = data / 100 @ WEIGHTS + 3 + noise * torch.randn(count, generator=generator)
        return Rows(data, labels)

    mean, std = (0.1,) * FEATURES, (1.2,) * FEATURES
    return Dataset("rows", "rows", (), "rounding", split(64), split(20), split(30), mean, std, task=Toy.name)


def arrays() -> Dataset:
    """Features of three classes, told apart by which of the first three is largest."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Arrays:
        data = torch.randn(count, FEATURES, generator=generator)
        return Arrays(data, data[:, :3].argmax(dim=1))

    mean, std = (0.0,) * FEATURES, (1.0,) * FEATURES
    return Dataset("arrays", "arrays", ("a", "b", "c"), "none", split(64), split(20), split(30), mean, std)


DATASETS = {"rows": rows, "arrays": arrays}
METHODS = {
    "deep ensemble": DeepEnsemble(members=2),
    "simplex": Simplex(vertices=3, vertex_epochs=1, members=4),
    "function": Simplex(vertices=2, vertex_epochs=1, members=3, regulariser="function"),
    "auto": Simplex(vertices=2, vertex_epochs=1, members=3, regularisation="auto"),
    "fge": FGE(members=2, cycle=1, high=0.05, low=0.005),
    "snapshots": Snapshots(members=2),
    "swag": SWAG(members=3, start=0.5, collect_every=0.5),
    "cyclical sg-mcmc": CyclicalSGMCMC(members=4, samples_per_cycle=2, temperature=0.01),
    "subspace": Subspace(vertices=2, members=3),
}


def settings(**changes) -> Settings:
    own = {"architecture": "tests.test_task:mlp", "epochs": 4, "batch_size": 10, "lr": 0.05, "device": "cpu"}
    return Settings(**own | changes)


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_saves_loads_predicts_and_scores(name, data, tmp_path):
    dataset, method = DATASETS[data](), METHODS[name]
    run = train(dataset, method, settings())
    run.save(tmp_path / "run")
    manifest = Run.load(tmp_path / "run").manifest
    assert (manifest.task, manifest.dataset.kind) == (dataset.task, type(dataset.train).kind)
    assert manifest.dataset.shape == [FEATURES]
    ensemble = Ensemble.load(tmp_path / "run", device="cpu")
    assert type(ensemble.task) is type(task.find(dataset.task))

    # What the members say, by hand: the network at each, on standardised rows.
    stored = dataset.test.data
    scale = 100 if data == "rows" else 1
    inputs = (stored / scale - torch.tensor(dataset.mean)) / torch.tensor(dataset.std)
    with torch.no_grad():
        outputs = torch.stack([ensemble.network(member)(inputs) for member in range(ensemble.members)])
    expected = outputs.softmax(dim=2) if data == "arrays" else outputs
    members = ensemble.predict_members(stored)
    assert members.shape == (method.members, 30, 3 if data == "arrays" else 1)
    torch.testing.assert_close(members, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ensemble.predict_proba(stored), expected.mean(dim=0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ensemble.predict_proba(stored.numpy()), expected.mean(dim=0), rtol=1e-5, atol=1e-6)

    # Its scores, by hand.
    mean, targets = expected.mean(dim=0).double().numpy(), dataset.test.labels.numpy()
    found = manifest.metrics["test"]
    if data == "arrays":
        assert found["accuracy"] == pytest.approx((mean.argmax(axis=1) == targets).mean())
        assert found["nll"] == pytest.approx(-np.log(mean[np.arange(30), targets]).mean(), rel=1e-5)
    else:
        errors = mean[:, 0] - targets
        assert found == {
            "rmse": pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5),
            "nll": pytest.approx((errors**2 / 2 + np.log(2 * np.pi) / 2).mean(), rel=1e-5),
            "examples": 30,
        }
    assert run.history[0].keys() >= {"loss", "accuracy" if data == "arrays" else "absolute_error"}


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("name", ["deep ensemble", "simplex", "fge"])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(name, data, tmp_path):
    dataset, method = DATASETS[data](), METHODS[name]
    for steps in (3, 9, 5):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            after(patch, steps)
            make(tmp_path / "x", method, settings(), data=dataset)
    assert_the_same(make(tmp_path / "x", method, settings(), data=dataset), train(dataset, method, settings()))
    spec = json.loads((tmp_path / "x.unfinished" / "spec.json").read_text())
    assert (spec["task"], spec["dataset"]["kind"]) == (dataset.task, type(dataset.train).kind)


def test_the_loss_is_the_tasks_a_linear_network_becomes_the_least_squares_solution():
    dataset = rows(noise=0.0)
    exact = settings(
        **{"architecture": "tests.test_task:linear", "epochs": 40, "weight_decay": 0.0, "clip": 0.0},
        augmentation="none",
    )
    ensemble = Ensemble(train(dataset, DeepEnsemble(members=2), exact))
    for member in range(2):
        network = ensemble.network(member)
        slope = network.weight.detach()[0] / torch.tensor(dataset.std)
        torch.testing.assert_close(slope, WEIGHTS, rtol=0, atol=1e-3)
        intercept = network.bias.detach()[0] - slope @ torch.tensor(dataset.mean)
        assert intercept.item() == pytest.approx(3, abs=1e-3)
    assert ensemble.run.manifest.metrics["test"]["rmse"] == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("data", DATASETS)
def test_training_starts_from_runs_and_members_are_sampled_and_averaged(data, tmp_path):
    dataset = DATASETS[data]()
    ends = [str(train(dataset, DeepEnsemble(members=1), settings(seed=s)).save(tmp_path / f"{s}")) for s in (1, 2)]
    curve = train(dataset, Curve(first=ends[0], second=ends[1], points=3), settings(epochs=1))
    path = curve.manifest.metrics["path"]
    for end, place in zip(ends, (0, -1), strict=True):
        ensemble = Ensemble.load(end, device="cpu").at(torch.ones(1, 1), dataset.train)  # BatchNorm as along the path
        error = ensemble.task.error(ensemble.predict_proba(dataset.test.data), dataset.test.labels)
        for way in ("line", "curve"):
            assert path[way]["test_error"][place] == pytest.approx(error, rel=1e-2)
    simplex = train(dataset, Simplex(vertices=2, vertex_epochs=1), settings(init=ends[0], epochs=1))
    assert simplex.manifest.cost.entries["solution 1"].example_passes == 4 * 64

    sampled = Ensemble(simplex).sample(5, seed=1, train=dataset.train)
    assert sampled.predict_members(dataset.test.data).shape[:2] == (5, 30)
    with pytest.raises(DataError, match="loaded by name"):
        Ensemble(simplex).sample(5, seed=1)
    centroid = collapse_run(simplex, dataset, "cpu")
    assert centroid.manifest.members == 1
    assert math.isfinite(centroid.manifest.metrics["test"]["nll"])


def test_a_kind_of_data_decides_what_is_an_example():
    assert isinstance(rows().train, Examples)
    assert isinstance(arrays().train, Examples)
    ensemble = Ensemble(train(rows(), DeepEnsemble(members=1), settings(epochs=1)))
    stored = rows().test.data
    prepared = (stored / 100 - 0.1) / 1.2
    torch.testing.assert_close(ensemble.predict_members(stored), ensemble.predict_members(prepared))
    with pytest.raises(ShapeError, match="expected rows of 4, found"):
        ensemble.predict_members(stored[:, :3])
    ensemble = Ensemble(train(arrays(), DeepEnsemble(members=1), settings(epochs=1)))
    for x in (torch.zeros(2, 3), torch.zeros(2, 4, 1), torch.zeros(2, 4, dtype=torch.int64)):
        with pytest.raises(ShapeError, match=r"expected rows of 4 features, \(B, 4\) float"):
            ensemble.predict_members(x)


def test_what_a_manifest_names_must_be_there(tmp_path):
    assert isinstance(task.find("classification"), Classification)
    assert isinstance(task.find(Toy.name), Toy)
    assert (examples.find("arrays"), examples.find(Rows.kind)) == (Arrays, Rows)
    for find, kind in ((task.find, "task"), (examples.find, "kind of data")):
        with pytest.raises(UsageError, match=f"cannot import the {kind} 'tests.nowhere:Toy'"):
            find("tests.nowhere:Toy")
    with pytest.raises(UsageError, match=r"tests\.test_task:Rows is not a task: name a subclass of"):
        task.find(Rows.kind)
    with pytest.raises(UsageError, match=r"tests\.test_task:WEIGHTS is not a kind of data"):
        examples.find("tests.test_task:WEIGHTS")
    with pytest.raises(UsageError, match="unknown augmentation 'crop': use one of rounding, none"):
        train(rows(), DeepEnsemble(members=1), settings(augmentation="crop"))
    run = train(rows(), DeepEnsemble(members=1), settings(epochs=1)).save(tmp_path / "run")
    with pytest.raises(DataError, match="is not what the run was trained on, or has changed since"):
        train(rows(noise=1.0), Simplex(), settings(init=str(run)))


def test_the_task_and_the_data_are_of_the_fingerprint_and_show_names_their_scores(tmp_path):
    found = {}
    for number, data in enumerate((rows(), replace(rows(), task=Robust.name), rows(noise=0.2), arrays())):
        run = train(data, DeepEnsemble(members=1), settings(epochs=1))
        found[run.manifest.fingerprint] = run.save(tmp_path / str(number))
    assert len(found) == 4
    for path, score in zip(found.values(), ("rmse", "rmse", "rmse", "accuracy"), strict=True):
        shown = call("show", path)
        assert shown.exit_code == 0, shown.output
        assert f"{score} " in shown.stdout
