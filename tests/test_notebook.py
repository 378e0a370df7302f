"""What a user of Python or of a notebook meets: networks that are passed, images of any kind, results that show."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn

from ensembler import Ensemble
from ensembler.errors import UsageError
from ensembler.serve import export_run
from ensembler.trainers import FGE, DeepEnsemble, Settings, Simplex, collapse_run, combine, import_checkpoints, train
from tests import _small
from tests._small import dataset
from tests._training import saved

SMALL = {name: value for name, value in _small.SETTINGS.items() if name != "architecture"}
SETTINGS = Settings(**SMALL)
ONE = DeepEnsemble(members=1)


def own(num_classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(width * 9, num_classes))


class Net(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = own(num_classes)

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def notebooks(monkeypatch):
    """A factory that a notebook defines, in ``__main__``."""

    def notebooks(num_classes: int) -> nn.Module:
        return own(num_classes)

    notebooks.__module__, notebooks.__qualname__ = "__main__", "notebooks"
    monkeypatch.setattr(sys.modules["__main__"], "notebooks", notebooks, raising=False)
    return notebooks


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("network", "name"), [(_small.network, "network"), (_small.WithBatchNorm, "WithBatchNorm")])
def test_a_network_that_can_be_imported_is_recorded_by_its_name(network, name, tmp_path):
    run = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=network)
    assert run.manifest.architecture == run.manifest.settings["architecture"] == f"tests._small:{name}"
    named = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=f"tests._small:{name}")
    assert run.manifest.fingerprint == named.manifest.fingerprint
    found = Ensemble.load(saved(run, tmp_path / "run"), "cpu").predict_members(dataset().test.images)
    assert torch.equal(found, Ensemble(named, "cpu").predict_members(dataset().test.images))


@pytest.mark.parametrize("kind", ["notebook", "lambda", "partial", "class"])
def test_a_network_that_cannot_be_imported_trains_and_is_passed_again(kind, notebooks, tmp_path):
    network = {
        "notebook": notebooks,
        "lambda": lambda num_classes: nn.Sequential(own(num_classes)),
        "partial": partial(own, width=6),
        "class": type("Local", (Net,), {"__module__": "__main__"}),
    }[kind]
    run = train(dataset(), Simplex(vertices=2, members=3), SETTINGS, network=network)
    assert run.manifest.architecture.startswith("__main__:")
    images = dataset().test.images
    expected = Ensemble(run, "cpu").predict_members(images)
    path = saved(run, tmp_path / "run")
    assert torch.equal(Ensemble.load(path, "cpu", network=network).predict_members(images), expected)
    sampled = Ensemble(run, "cpu").sample(4, train=dataset().train)
    assert torch.equal(sampled.sample(3, train=dataset().train).predict_members(images), expected)
    assert Ensemble(collapse_run(run, dataset(), "cpu"), "cpu").members == 1
    fge = train(dataset(), FGE(members=1, cycle=1), Settings(**SMALL, init=path), network=network)
    assert fge.manifest.architecture == run.manifest.architecture
    for load in (Ensemble.load, partial(export_run, out=tmp_path / "bundle")):
        with pytest.raises(UsageError, match=r"defined in a notebook or script, .*: pass it from Python \(network="):
            load(path)
    assert not (tmp_path / "bundle").exists()


def test_the_name_of_another_notebooks_network_is_not_taken(notebooks, tmp_path):
    """By its name, the function of today's notebook would be found."""
    run = train(dataset(), ONE, SETTINGS, network=notebooks)
    path = saved(run, tmp_path / "run")
    with pytest.raises(UsageError, match="pass it from Python"):
        Ensemble.load(path)
    with pytest.raises(UsageError, match=r"trained with the network __main__:notebooks, not tests.test_notebook:own"):
        Ensemble.load(path, network=own)
    with pytest.raises(UsageError, match="pass it from Python"):
        train(dataset(), ONE, Settings(**SMALL, architecture="__main__:notebooks"))


def test_two_networks_of_one_name_stay_apart():
    """A cell that was run again: the first run keeps its own network."""
    runs = []
    for activation in (nn.Tanh, nn.ReLU):

        def cell(num_classes: int, activation=activation) -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), activation(), nn.Flatten(), nn.Linear(36, num_classes))

        runs.append(train(dataset(), ONE, SETTINGS, network=cell))
    first = Ensemble(runs[0], "cpu").network(0)
    assert isinstance(first[1], nn.Tanh)
    assert combine({"a": runs[0], "b": runs[1]}, dataset(), "cpu").manifest.parts == 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (own(3), "given as a Sequential, but every member needs one of its own: give the function or class"),
        (7, "given as a int, but"),
        (lambda: own(3), r"cannot be called as <lambda>\(num_classes=3\)"),
        (lambda num_classes: 3, "returned int, not a torch.nn.Module"),
        ("tests._small:nothing", "cannot import the architecture 'tests._small:nothing'"),
    ],
)
def test_what_builds_no_network_is_refused(network, message):
    with pytest.raises(UsageError, match=message):
        train(dataset(), ONE, SETTINGS, network=network)


def test_two_answers_to_which_network_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"the network is tests._small:network, and the settings name cnn: give one"):
        train(dataset(), ONE, Settings(**SMALL, architecture="cnn"), network=_small.network)
    path = saved(train(dataset(), ONE, SETTINGS, network=_small.network), tmp_path / "run")
    with pytest.raises(UsageError, match=r"is a run of tests._small:network, and tests._small:batchnorm is to be"):
        train(dataset(), ONE, Settings(**SMALL, init=path), network=_small.batchnorm)


def test_checkpoints_of_a_network_that_is_passed(notebooks, tmp_path):
    torch.manual_seed(0)
    weights = own(3)
    torch.save(weights.state_dict(), tmp_path / "a.pt")
    run = import_checkpoints([str(tmp_path / "a.pt")], notebooks, dataset(), device="cpu")
    x = torch.randn(2, 3, 8, 8).clamp(-1, 1)
    torch.testing.assert_close(Ensemble(run, "cpu").predict_outputs(x)[0], weights.eval()(x).detach())
