"""What training starts from: fresh weights, a run, or weights that the user has, whose cost is not known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ensembler.errors import ShapeError, UsageError
from ensembler.networks.architectures import build
from ensembler.trainers import FGE, DeepEnsemble, Simplex
from tests._training import call, make, passes


def weights_of(path: Path, classes: int, architecture: str = "tests._small:network") -> tuple[str, dict]:
    """A file of weights, and what is in it."""
    tensors = build(architecture, classes, seed=7).state_dict()
    torch.save(tensors, path)
    return str(path), tensors


def test_a_checkpoint_that_fits_is_the_solution_at_a_cost_that_is_not_known(tmp_path):
    path, given = weights_of(tmp_path / "mine.pt", classes=3)
    still = {"lr": 1e-9, "weight_decay": 0.0}
    for run in (
        make(Simplex(vertices=2, vertex_epochs=1), init=path),
        make(FGE(members=1, cycle=1, high=2e-9, low=1e-9), init=path, **still),
    ):
        for name, rows in run.vertices.items():
            torch.testing.assert_close(rows[0], given[name], atol=1e-5, rtol=0)
        assert run.manifest.cost.unknown == ["mine.pt"]
        assert run.manifest.settings["init"] == path
        assert "solution 1" not in run.manifest.cost.entries
    with pytest.raises(UsageError, match="starts from fresh weights: leave out --init, or give one of other classes"):
        make(DeepEnsemble(members=2), init=path)


def test_a_checkpoint_of_other_classes_is_where_training_begins(tmp_path):
    path, given = weights_of(tmp_path / "mine.pt", classes=10)
    run = make(DeepEnsemble(members=2), init=path, lr=1e-30, weight_decay=0.0)
    body, head = run.vertices["0.weight"], run.vertices["3.weight"]
    for rows in body:
        torch.testing.assert_close(rows, given["0.weight"])
    assert not torch.equal(head[0], head[1]), "each member has a fresh head of its own"
    assert passes(run) == {"solution 1": 60, "solution 2": 60}
    simplex = make(Simplex(vertices=2, vertex_epochs=1), init=path)
    assert passes(simplex) == {"solution 1": 60, "vertex 2": 30}
    assert simplex.manifest.cost.unknown == ["mine.pt"]
    other, _ = weights_of(tmp_path / "other.pt", 3, "tests._small:batchnorm")
    with pytest.raises(ShapeError, match=r"^other\.pt does not fit the network: "):
        make(DeepEnsemble(), init=other)


def test_two_answers_to_what_to_start_from_are_refused(tmp_path):
    path, _ = weights_of(tmp_path / "mine.pt", classes=3)
    with pytest.raises(UsageError, match="--init and --weights both name a start: give one of them"):
        make(Simplex(), init=path, weights="DEFAULT")


def test_a_start_of_another_network_is_refused(tmp_path):
    make(DeepEnsemble(members=1)).save(tmp_path / "run")
    result = call("train-fge", "--init", tmp_path / "run", "--arch", "vgg16")
    assert result.exit_code == 1
    assert "the run that training starts from is of --arch tests._small:network: leave out --arch" in result.stderr
