"""Curves between solutions, and the centroid: bases, the update, what is measured along the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.run import Run
from ensembler.subspace import bezier, chain
from ensembler.trainers import FGE, Curve, DeepEnsemble, Simplex, collapse_run
from ensembler.trainers.summary import lines
from tests._small import dataset
from tests._training import call, make, saved


def test_bases_are_the_papers_formulas_for_one_bend():
    w1, theta, w2 = torch.randn(3, 5, dtype=torch.float64)
    V = torch.stack([w1, theta, w2])
    for t in np.linspace(0, 1, 13):
        at = torch.tensor([t])
        expected = (1 - t) ** 2 * w1 + 2 * t * (1 - t) * theta + t**2 * w2
        torch.testing.assert_close((bezier(at, 3) @ V)[0], expected)
        polygon = 2 * (t * theta + (0.5 - t) * w1) if t <= 0.5 else 2 * ((t - 0.5) * w2 + (1 - t) * theta)
        torch.testing.assert_close((chain(at, 3) @ V)[0], polygon)


@pytest.mark.parametrize("basis", [bezier, chain])
@pytest.mark.parametrize("K", [2, 3, 4, 6])
def test_bases_sum_to_one_and_reach_both_ends(basis, K):
    rows = basis(torch.linspace(0, 1, 21), K)
    assert rows.shape == (21, K)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(1), torch.ones(21))
    torch.testing.assert_close(rows[[0, -1]], torch.eye(K)[[0, -1]])


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    return [saved(make(DeepEnsemble(members=1), seed=seed, epochs=6), folder / str(seed)) for seed in (0, 1)]


@pytest.mark.parametrize("curve", ["bezier", "chain"])
def test_a_curve_joins_the_ends_and_lies_lower_than_the_straight_line(ends, curve):
    run = make(Curve(first=ends[0], second=ends[1], curve=curve, members=3, points=11), epochs=20)
    runs = [Run.load(end) for end in ends]
    assert run.manifest.method == f"curve-{curve}"
    for name, rows in run.vertices.items():
        assert torch.equal(rows[[0, 2]], torch.cat([end.vertices[name] for end in runs]))
    line, path = run.manifest.metrics["path"]["line"], run.manifest.metrics["path"]["curve"]
    assert path["highest_train_loss"] == max(path["train_loss"]) < line["highest_train_loss"]
    assert path["t"][5] == 0.5
    for measured in (line, path):
        images = dataset()
        for place, end in ((0, runs[0]), (-1, runs[1])):
            probabilities = Ensemble(end, "cpu").predict_proba(images.test.images)
            error = (probabilities.argmax(1) != images.test.labels).double().mean().item()
            assert measured["test_error"][place] == pytest.approx(error)
    assert path["ensemble_error"][0] == path["test_error"][0]
    found = {name: entry.example_passes for name, entry in run.manifest.cost.entries.items()}
    assert found == {"end 1": 180, "end 2": 180, "curve": 600, "measurements": 0, "members": 0}


def test_the_two_member_ensemble_is_the_mean_of_probabilities(ends):
    run = make(Curve(first=ends[0], second=ends[1], members=3, points=3))
    members = Ensemble(run, "cpu").predict_members(dataset().test.images)
    for place in range(3):
        mean = (members[0] + members[place]) / 2
        error = (mean.argmax(1) != dataset().test.labels).double().mean().item()
        assert run.manifest.metrics["path"]["curve"]["ensemble_error"][place] == pytest.approx(error)


def test_a_batchnorm_curve_reproduces_its_ends(tmp_path):
    images, network = dataset(train=32), "tests._small:batchnorm"
    both = [make(DeepEnsemble(members=1), images, architecture=network, seed=seed, epochs=6) for seed in (0, 1)]
    first, second = (saved(run, tmp_path / str(seed)) for seed, run in enumerate(both))
    run = make(Curve(first=first, second=second, members=3, points=3), images, architecture=network)
    for place, end in ((0, both[0]), (2, both[1])):
        found = Ensemble(run, "cpu").predict_members(images.train.images)[place]
        expected = Ensemble(end, "cpu").predict_members(images.train.images)[0]
        assert (found - expected).abs().mean() < 0.05
        assert (found.argmax(1) == expected.argmax(1)).double().mean() > 0.9


def test_what_cannot_be_joined_is_refused(ends, tmp_path):
    first, second = ends
    for arguments, message in (
        ({"curve": "spline"}, "curve must be bezier or chain, not 'spline'"),
        ({"bends": 0}, "bends must be at least 1, not 0"),
        ({"points": 2}, "points must be at least 3, not 2"),
    ):
        with pytest.raises(UsageError, match=message):
            Curve(first=first, second=second, **arguments)
    with pytest.raises(UsageError, match="both ends are the same solution: train the second with another --seed"):
        make(Curve(first=first, second=first))
    other = saved(make(DeepEnsemble(members=1), architecture="tests._small:batchnorm"), tmp_path / "other")
    refusal = r"other is a run of tests\._small:batchnorm, and tests\._small:network is to be trained"
    with pytest.raises(UsageError, match=refusal):
        make(Curve(first=first, second=other), architecture="tests._small:network")
    with pytest.raises(UsageError, match=r"a run of tests\._small:batchnorm and .* have no weights in common"):
        make(Curve(first=first, second=other))
    with pytest.raises(DataError, match="training images differ"):
        make(Curve(first=first, second=second), dataset(train=33))


# --- the centroid ---


@pytest.mark.parametrize("architecture", ["tests._small:network", "tests._small:batchnorm"])
def test_the_centroid_is_the_mean_of_the_vertices_with_statistics_of_its_own(architecture, tmp_path):
    images = dataset(train=32)
    run = make(FGE(members=3, cycle=1), images, architecture=architecture)
    swa = collapse_run(run, images, "cpu")
    assert swa.manifest.method == "fge-centroid"
    assert (swa.manifest.vertices, swa.manifest.members) == (1, 1)
    assert not swa.manifest.independent
    assert torch.equal(swa.coefficients, torch.ones(1, 1))
    network = Ensemble(swa, "cpu").network(0)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), run.vertices[name].mean(0))
    if architecture.endswith("batchnorm"):
        assert not torch.equal(swa.buffers["body.1.running_mean"][0], run.buffers["body.1.running_mean"][-1])
    for name, entry in run.manifest.cost.entries.items():
        assert swa.manifest.cost.entries[name] == entry
    again = collapse_run(Run.load(run.save(tmp_path / "run")), images, "cpu")
    assert all(torch.equal(rows, again.buffers[name]) for name, rows in swa.buffers.items())
    assert all(torch.equal(rows, again.vertices[name]) for name, rows in swa.vertices.items())


def test_a_collapsed_run_keeps_one_network_on_disk_and_predicts_as_the_centroid(images, tmp_path, monkeypatch):
    """``--collapse centroid`` and ``ensembler collapse`` alike: what is "all that is kept" is no K vertices."""
    monkeypatch.chdir(tmp_path)
    given = ["train-fge", "--members", 3, "--cycle", 1, "--epochs", 2, "--arch", "tests._small:batchnorm", *images]
    given += ["--device", "cpu", "--quiet"]
    for more in (["--out", "whole"], ["--out", "at-once", "--collapse", "centroid"]):
        result = call(*given, *more)
        assert result.exit_code == 0, result.output
    result = call("collapse", "whole", "--out", "later", "--device", "cpu")
    assert result.exit_code == 0, result.output
    whole, *collapsed = (Run.load(name) for name in ("whole", "at-once", "later"))
    x = whole.manifest.dataset.load().test.images
    expected = Ensemble(whole, "cpu").at(torch.full((1, 3), 1 / 3)).predict_members(x)
    sizes = [Path(name, "vertices.safetensors").stat().st_size for name in ("whole", "at-once", "later")]
    for run, size in zip(collapsed, sizes[1:], strict=True):
        assert all(len(rows) == 1 for rows in run.vertices.values())
        assert torch.equal(run.coefficients, torch.ones(1, 1))
        assert (run.manifest.vertices, run.manifest.members) == (1, 1)
        assert run.manifest.method == "fge-centroid"
        assert run.manifest.options["collapse"] == "centroid"
        assert size < 0.75 * sizes[0]
        torch.testing.assert_close(Ensemble(run, "cpu").predict_members(x), expected, rtol=1e-4, atol=1e-6)


def test_a_centroid_of_a_simplex_has_no_members_to_sample_from():
    run = collapse_run(make(Simplex(vertices=2)), dataset(), "cpu")
    with pytest.raises(UsageError, match="members of a run by simplex-centroid are fixed"):
        Ensemble(run, "cpu").sample(3)


def in_two_valleys(run: Run, places: Sequence[int]) -> Run:
    """The run with copies of its first network in the given order of channels (0: as they are, 1: in reverse)."""
    orders = [torch.arange(4).roll(2 * place) for place in places]
    first = {name: rows[0] for name, rows in run.vertices.items()}

    def permuted(order: torch.Tensor) -> dict[str, torch.Tensor]:
        head = first["3.weight"].reshape(3, 4, 9)[:, order].flatten(1)
        return {"0.weight": first["0.weight"][order], "0.bias": first["0.bias"][order], "3.weight": head}

    own = [first | permuted(order) for order in orders]
    run.vertices = {name: torch.stack([each[name] for each in own]) for name in first}
    run.coefficients = torch.eye(len(places))
    return run


def test_collapse_warns_of_vertices_in_different_valleys_by_the_barrier_between_them():
    images = dataset(train=90)
    run = in_two_valleys(make(DeepEnsemble(members=1), images, epochs=20), [0, 0, 1])
    swa = collapse_run(run, images, "cpu").manifest
    pairs = {tuple(pair["of"]): pair for pair in swa.metrics["averages"]}
    assert pairs.keys() == {(1, 2), (1, 3), (2, 3)}
    # Equal networks, up to the order of their channels: one loss, which the average has too where the order is one.
    own = -Ensemble(run, "cpu").predict_members(images.validation.images)[0].log()
    own = own[torch.arange(12), images.validation.labels].mean().item()
    for pair in pairs.values():
        assert pair["ends"] == pytest.approx([own, own], abs=1e-5)
    assert pairs[1, 2]["average"] == pytest.approx(own, abs=1e-5)
    halves = Ensemble(run, "cpu").at(torch.tensor([[0.5, 0, 0.5]]))
    between = -halves.predict_members(images.validation.images)[0].log()
    assert pairs[1, 3]["average"] == pytest.approx(
        between[torch.arange(12), images.validation.labels].mean().item(), abs=1e-5
    )
    assert [pairs[pair]["worse"] for pair in ((1, 2), (1, 3), (2, 3))] == [False, True, True]
    (warning,) = [line for line in lines(swa) if line.startswith("warning")]
    assert f"NLL of {pairs[1, 3]['average']:.2f}, against {own:.2f} and {own:.2f} of their own" in warning
    assert "vertices 1 and 3" in warning and "(2 of 3 pairs are so)" in warning
    assert not any(
        "warning" in line for line in lines(collapse_run(make(FGE(members=2, cycle=1)), dataset(), "cpu").manifest)
    )


def test_a_bounded_number_of_averages_is_measured_with_the_first_and_the_last_vertex():
    images = dataset(train=90)
    run = in_two_valleys(make(DeepEnsemble(members=1), images), [0] * 9 + [1])
    found = collapse_run(run, images, "cpu").manifest
    assert len(found.metrics["averages"]) == 6
    assert [1, 10] in [pair["of"] for pair in found.metrics["averages"]]
    assert found.cost.entries["measurements"].forward_passes == 10 * (90 + 12)
    assert "averages" not in collapse_run(make(DeepEnsemble(members=1)), dataset(), "cpu").manifest.metrics
