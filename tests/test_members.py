"""What a member is: everything in a state dict, in every method, and in both layouts of a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.networks.architectures import build
from ensembler.networks.buffers import recomputed
from ensembler.run import Run
from ensembler.serve import Runtime, export_run
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.trainers import FGE, Complex, Curve, DeepEnsemble, Method, Simplex, Subspace, collapse_run
from ensembler.weights import FlatWeights, tie
from tests._small import NEWER, dataset
from tests._training import make, saved

FAMILIES = (
    *("frozen_alike", "instance_norm", "still_batchnorm", "spectral_hook", "spectral", "weight_normed", "pruned"),
    *("scaled", "tied", "tied_by_memory", "masked"),
)
EXPORTED = ("scaled", "spectral_hook", "pruned", "booleans", "projected", "distances", "bag")
IMAGES = dataset()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return f"tests._networks:{request.param}"


@pytest.fixture(scope="module")
def solutions(family: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("solutions")
    return [saved(make(DeepEnsemble(members=1), architecture=family, seed=seed), folder / str(seed)) for seed in (0, 1)]


def by_torch(run: Run, member: int = 0) -> torch.Tensor:
    """A member's probabilities, from its tensors in the network's own class."""
    network = build(run.manifest.architecture, 3, seed=7)
    state = {name: torch.tensordot(run.coefficients[member], rows, 1) for name, rows in run.vertices.items()}
    state |= dict(run.frozen) | {name: rows[member] for name, rows in run.buffers.items()}
    missing = network.load_state_dict(state, strict=False).missing_keys
    parameters = dict(network.named_parameters(remove_duplicate=False))
    assert all(any(parameters[name] is parameters[other] for other in state if other in parameters) for name in missing)
    with torch.no_grad():
        return network.eval()(normalise(IMAGES.test.images, IMAGES.mean, IMAGES.std)).softmax(1)


def says(run: Run, member: int = 0) -> torch.Tensor:
    return Ensemble(run, "cpu").predict_members(IMAGES.test.images)[member]


def whole(run: Run, member: int = 0) -> dict[str, torch.Tensor]:
    """A member's state dict."""
    return {name: tensor.clone() for name, tensor in Ensemble(run, "cpu").network(member).state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_member_is_its_state_dict(solutions: list[str]) -> None:
    run = Run.load(solutions[0])
    torch.testing.assert_close(says(run), by_torch(run))


def test_one_solution_comes_back_to_the_bit(solutions: list[str]) -> None:
    """Collapsed, as a curve's ends, a complex's modes and a simplex's corner, and where FGE starts."""
    first, second = map(Run.load, solutions)
    assert same(whole(collapse_run(first, IMAGES, "cpu")), whole(first))
    curve = make(Curve(first=solutions[0], second=solutions[1], members=3, points=3, examples=20))
    assert same(whole(curve, 0), whole(first))
    assert same(whole(curve, 2), whole(second))
    joined = make(Complex(modes=solutions, members=4, points=3, examples=20))
    assert same(whole(joined, 0), whole(first))
    assert same(whole(joined, 1), whole(second))
    simplex = make(Simplex(vertices=2, members=3, vertex_epochs=1), init=solutions[0])
    assert same(whole(simplex), whole(first))
    assert same(whole(Ensemble(simplex, "cpu").sample(4, 3, IMAGES.train).run), whole(first))


def test_every_member_of_every_method_is_right(family: str, tmp_path: Path) -> None:
    for number, method in enumerate(
        (FGE(members=2, cycle=1), Subspace(vertices=2, members=3), Simplex(vertices=2, members=4, simplexes=2))
    ):
        run = make(method, architecture=family)
        again = Run.load(run.save(tmp_path / str(number)))
        for member in range(again.manifest.members):
            torch.testing.assert_close(says(again, member), by_torch(again, member))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("scaled", "members"),
        ("projected", "single"),
        *((name, "vertices") for name in EXPORTED),
        pytest.param("attention", "vertices", marks=NEWER),
    ],
)
def test_exported_members_answer_as_pytorch(name: str, layout: str, tmp_path: Path) -> None:
    """Also parameters and buffers without dimensions, in both layouts, and functions that PyTorch's exporter lacks."""
    run = make(Simplex(vertices=2, members=3, vertex_epochs=1), architecture=f"tests._networks:{name}")
    run.save(tmp_path / "run")
    bundle = export_run(tmp_path / "run", tmp_path / "bundle", layout=layout, use_data=False)
    assert verify_bundle(bundle).differences
    found = Runtime.load(bundle).predict_members(IMAGES.test.images.numpy())
    for member in range(3):
        np.testing.assert_allclose(found[member], by_torch(run, member), atol=1e-5)


@pytest.mark.parametrize(("name", "further"), [("frozen_alike", True), ("instance_norm", False)])
def test_a_bundle_makes_new_members_where_no_statistics_are_recomputed(
    name: str, further: bool, tmp_path: Path
) -> None:
    run = make(Simplex(vertices=2, members=3, vertex_epochs=1), architecture=f"tests._networks:{name}")
    run.save(tmp_path / "run")
    bundle = export_run(tmp_path / "run", tmp_path / "bundle", use_data=False)
    if further:
        assert Runtime.load(bundle, members=5).members == 5
    else:
        with pytest.raises(UsageError, match="cannot make new members: their BatchNorm statistics"):
            Runtime.load(bundle, members=5)


@pytest.mark.parametrize("name", ["numbers", "booleans", "padding"])
def test_a_transformer_answers_with_the_layers_that_were_trained(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's fast path takes a mask of numbers for one of booleans, and gives zeros at padded places."""
    run = make(DeepEnsemble(members=1), architecture=f"tests._networks:{name}", epochs=0.5)
    found = says(run)
    assert torch.backends.mha.get_fastpath_enabled()  # it is the user's
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    torch.testing.assert_close(found, by_torch(run))


def test_a_forward_that_differentiates_is_evaluated() -> None:
    run = make(Simplex(vertices=2, members=3, vertex_epochs=1), architecture="tests._networks:energy")
    for member in range(3):
        torch.testing.assert_close(says(run, member), by_torch(run, member))


def test_what_is_recomputed_is_what_training_updates_by_itself() -> None:
    def names(name: str) -> set[str]:
        return recomputed(build(f"tests._networks:{name}", 3))

    statistics = {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked"}
    assert names("instance_norm") == names("pruned") == statistics
    assert names("spectral_hook") == {"0.0.weight_u", "0.0.weight_v"}
    assert names("spectral") == {f"1.parametrizations.weight.0._{vector}" for vector in "uv"}
    assert names("frozen") == names("still_batchnorm") == names("scaled") == names("masked") == set()


def test_own_running_statistics_that_members_take_over_are_named() -> None:
    def said(name: str, method: Method = Simplex(vertices=2, members=3, vertex_epochs=1)) -> list[str]:  # noqa: B008
        found: list[str] = []
        make(method, architecture=f"tests._networks:{name}", epochs=1, said=found)
        return [text for text in found if "changes buffers of its own" in text]

    (sentence,) = said("scaled")
    assert "tests._networks:scaled changes buffers of its own in training (average): members that were not" in sentence
    assert said("scaled", DeepEnsemble(members=1)) == said("spectral") == said("pruned") == said("masked") == []


@pytest.mark.parametrize("name", ["spectral_hook", "spectral"])
def test_spectral_norm_is_that_of_a_points_own_weights(name: str) -> None:
    run = make(Simplex(vertices=2, members=3, vertex_epochs=1), architecture=f"tests._networks:{name}")
    network = Ensemble(run, "cpu").network(2)
    layer = network[0][0] if name == "spectral_hook" else network[1]
    network(torch.zeros(1, 3, 8, 8))
    assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-2)


def test_tied_weights_are_one_coordinate() -> None:
    untied = sum(p.numel() for p in (torch.nn.Conv2d(3, 3, 3), torch.nn.Linear(192, 3)) for p in p.parameters()) + 3
    for name in ("tied", "tied_by_memory"):
        weights = FlatWeights(build(f"tests._networks:{name}", 3))
        assert len(weights) == untied
        weights.vector.zero_()
        assert not weights.module.second.weight.any()


def test_weights_that_share_a_part_of_their_memory_are_refused() -> None:
    layer = torch.nn.Linear(4, 4)
    layer.part = torch.nn.Parameter(layer.weight.data[1:])
    with pytest.raises(UsageError, match="the parameters weight and part share a part of their memory"):
        tie(layer)


def test_state_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the state dict of Extra holds a dict \(_extra_state\)"):
        make(DeepEnsemble(members=1), architecture="tests._networks:extra")


def test_runs_whose_frozen_weights_differ_are_not_joined(tmp_path: Path) -> None:
    ends = [
        saved(make(DeepEnsemble(members=1), architecture="tests._networks:frozen", seed=s), tmp_path / str(s))
        for s in (0, 1)
    ]
    for method in (Curve(first=ends[0], second=ends[1]), Complex(modes=ends)):
        with pytest.raises(UsageError, match=r"the runs differ in backbone\.0\.bias, which is frozen"):
            make(method)
