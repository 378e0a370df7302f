"""Lines and simplexes trained jointly: the start, the cosine by autograd, and what both leave alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.networks.architectures import build
from ensembler.subspace import dirichlet
from ensembler.trainers import Subspace
from ensembler.trainers.methods.subspace import cosine_regulariser, spread
from ensembler.trainers.starts import fresh
from ensembler.weights import FlatWeights
from tests._training import flat, make, passes, saved, trainer

BATCHNORM = "tests._small:batchnorm"


def random_vertices(weights: FlatWeights, K: int) -> torch.Tensor:
    return torch.randn(K, len(weights), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_cosine_is_autograds_over_weights_of_two_dimensions_or_more():
    """Neither biases nor BatchNorm's gains enter it, nor does it move them."""
    weights, beta = FlatWeights(build(BATCHNORM, 3)), 0.7
    vertices = random_vertices(weights, 3)
    add = cosine_regulariser(vertices, beta, weights)
    for j, k in ((0, 1), (2, 0), (1, 2)):
        gradients = torch.ones_like(vertices)
        add(gradients, torch.tensor([j, k]))
        leaves = {name: rows.clone().requires_grad_() for name, rows in weights.unflatten(vertices).items()}
        directions = torch.cat([rows.flatten(1) for rows in leaves.values() if rows[0].dim() >= 2], dim=1)
        (beta * torch.cosine_similarity(directions[j], directions[k], dim=0) ** 2).backward()
        found = weights.unflatten(gradients - 1)
        for name, leaf in leaves.items():
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(found[name], expected)
        assert not found["body.1.weight"].any()
        assert not found["head.bias"].any()
        assert found["head.weight"][j].any()


def test_what_is_alike_in_all_vertices_is_not_scaled_at_the_start():
    """BatchNorm's gains, whose product over a network's layers a factor would raise, and pretrained weights."""
    networks = [FlatWeights(build(BATCHNORM, 3, seed)) for seed in range(3)]
    convolution = networks[0].slices()["body.0.weight"]
    for other in networks[1:]:
        other.vector[convolution] = networks[0].vector[convolution]  # as pretrained
    begin = torch.stack([weights.vector for weights in networks])
    found, before = (networks[0].unflatten(vertices) for vertices in (spread(begin, networks[0]), begin))
    assert torch.equal(found["body.1.weight"], torch.ones(3, 4))
    assert torch.equal(found["body.0.weight"], before["body.0.weight"])
    assert torch.equal(found["head.weight"], before["head.weight"] * math.sqrt(2))


def test_points_inside_start_with_the_variance_of_an_initialisation():
    weights, K = FlatWeights(torch.nn.Linear(60, 50, bias=False)), 4
    vertices = spread(random_vertices(weights, K), weights)
    points = dirichlet(5_000, K, np.random.default_rng(0)).double() @ vertices
    assert points.var().item() == pytest.approx(1.0, rel=0.05)


def test_a_joint_subspace_costs_one_network_and_starts_from_independent_weights(tmp_path):
    run = make(Subspace(vertices=3, members=5))
    assert passes(run) == {"subspace": 60}
    assert run.manifest.method == "subspace"
    assert torch.equal(run.coefficients[:3], torch.eye(3))
    work = trainer()
    beginnings = torch.stack([fresh(work, k).vector for k in range(3)])
    still = make(Subspace(vertices=3, beta=0.0), lr=1e-30, weight_decay=0.0)
    torch.testing.assert_close(work.weights.flatten(still.vertices), beginnings * math.sqrt(2))
    assert Ensemble(run, "cpu").sample(4).members == 4
    with pytest.raises(UsageError, match="train-subspace starts from fresh weights: leave out --init"):
        make(Subspace(), init=saved(run, tmp_path / "run"))


def test_a_pretrained_body_is_the_start_of_every_vertex_as_it_is(tmp_path):
    given = build(BATCHNORM, 10, seed=7).state_dict()
    torch.save(given, tmp_path / "mine.pt")
    run = make(
        Subspace(vertices=3, beta=1.0),
        architecture=BATCHNORM,
        init=str(tmp_path / "mine.pt"),
        lr=1e-30,
        weight_decay=0.0,
    )
    for name in ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"):
        for rows in run.vertices[name]:
            torch.testing.assert_close(rows, given[name])


def test_beta_keeps_the_vertices_of_a_subspace_at_right_angles():
    cosines = []
    for beta in (0.0, 10.0):
        V = flat(make(Subspace(vertices=2, beta=beta), epochs=10))
        cosines.append(torch.cosine_similarity(V[0], V[1], dim=0).abs().item())
    assert cosines[1] < 0.5 * cosines[0]
