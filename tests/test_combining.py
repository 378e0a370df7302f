"""The members of several runs as one run: of one network a matrix, of several networks a run with parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ensembler import Ensemble, Run
from ensembler.data.normalisation import normalised
from ensembler.errors import CorruptError, UsageError
from ensembler.serve.export.bundle import export_run
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.runtime import Runtime
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.trainers import FGE, DeepEnsemble, Simplex, collapse_run, combine
from tests._small import dataset
from tests._training import call, make

IMAGES = dataset().test.images


@pytest.fixture(scope="module")
def deep():
    return make(DeepEnsemble(members=2), architecture="tests._small:batchnorm")


@pytest.fixture(scope="module")
def simplex():
    return make(Simplex(vertices=2, members=3), architecture="tests._small:batchnorm", seed=1)


@pytest.fixture(scope="module")
def other():
    return make(DeepEnsemble(members=2), architecture="tests._small:network", seed=2)


def together(**runs):
    return combine(runs, dataset(), "cpu")


def members(run):
    return Ensemble(run, "cpu").predict_members(IMAGES)


def test_members_of_one_network_are_those_of_the_runs(deep, simplex, tmp_path):
    run = together(deep=deep, simplex=simplex)
    assert (run.manifest.vertices, run.manifest.members, run.manifest.parts) == (4, 5, 0)
    assert (run.manifest.method, run.manifest.independent) == ("deep-ensemble + simplex", False)
    expected = torch.cat([members(deep), members(simplex)])
    torch.testing.assert_close(members(run), expected, rtol=0, atol=1e-6)
    run.save(tmp_path / "run")
    assert torch.equal(members(Run.load(tmp_path / "run")), members(run))
    assert run.manifest.settings["architecture"] == "tests._small:batchnorm"
    assert "seed" not in run.manifest.settings
    average = collapse_run(run, dataset(), "cpu")
    assert average.manifest.members == 1


def test_two_deep_ensembles_are_one(deep):
    run = together(a=deep, b=make(DeepEnsemble(members=2), architecture="tests._small:batchnorm", seed=1))
    assert (run.manifest.method, run.manifest.independent, run.manifest.members) == ("deep-ensemble", True, 4)
    assert torch.equal(run.coefficients, torch.eye(4))


def equally_long(one, other):
    """The other run, as if each of its parts had taken to the millisecond what the same part of the one took."""
    entries = {
        name: entry.model_copy(update={"seconds": one.manifest.cost.entries[name].seconds})
        for name, entry in other.manifest.cost.entries.items()
    }
    cost = other.manifest.cost.model_copy(update={"entries": entries, "seconds": one.manifest.cost.seconds})
    return replace(other, manifest=other.manifest.model_copy(update={"cost": cost}))


def test_costs_are_added_and_shared_ones_count_once(tmp_path):
    """An FGE run that starts from a run holds what that one cost; another training of equal length is another."""
    single = make(DeepEnsemble(members=1))
    fge = make(FGE(members=2, cycle=1), init=str(single.save(tmp_path / "single")))
    cost = together(single=single, fge=fge).manifest.cost
    assert cost.example_passes == fge.manifest.cost.example_passes
    assert cost.seconds == pytest.approx(
        single.manifest.cost.seconds + fge.manifest.cost.seconds - single.manifest.cost.entries["solution 1"].seconds
    )
    assert set(cost.entries) == {
        "single, solution 1",
        *(f"fge, {n}" for n in fge.manifest.cost.entries if n != "solution 1"),
    }
    apart = together(a=single, b=equally_long(single, make(DeepEnsemble(members=1), seed=5))).manifest.cost
    assert apart.example_passes == 2 * single.manifest.cost.example_passes
    deep = make(DeepEnsemble(members=2))
    whole = make(FGE(members=2, cycle=1), init=str(fge.save(tmp_path / "fge")))  # from all that the FGE run cost
    for runs in ({"fge": fge, "whole": whole, "deep": deep}, {"whole": whole, "deep": deep, "fge": fge}):
        cost = together(**runs).manifest.cost
        assert cost.example_passes == sum(run.manifest.cost.example_passes for run in (whole, deep)), list(runs)


def test_equal_members_are_kept_once(deep):
    half = replace(
        deep,
        manifest=deep.manifest.model_copy(update={"members": 1}),
        coefficients=deep.coefficients[:1],
        buffers={name: rows[:1] for name, rows in deep.buffers.items()},
    )
    run = together(half=half, deep=deep)
    assert run.manifest.members == 2
    assert torch.equal(members(run), members(deep))


def test_different_networks_are_parts(deep, other, tmp_path):
    run = together(deep=deep, other=other)
    assert (run.manifest.parts, run.manifest.members, run.manifest.method) == (2, 4, "deep-ensemble")
    assert run.manifest.architecture == "tests._small:batchnorm + tests._small:network"
    assert torch.equal(members(run), torch.cat([members(deep), members(other)]))
    path = run.save(tmp_path / "run")
    loaded = Run.load(path)
    assert torch.equal(members(loaded), members(run))
    assert (path.parent / "latest").resolve() == path.resolve()
    assert not (path / "parts" / "latest").exists()
    more = combine({"all": loaded, "simplex": make(Simplex(vertices=2, members=2), seed=1)}, dataset(), "cpu")
    assert (more.manifest.parts, more.manifest.members) == (2, 6)
    file = path / "parts" / "1" / "vertices.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError, match=r"parts/1/vertices\.safetensors has changed"):
        Run.load(path)


def test_what_needs_one_network_says_so(deep, other, tmp_path):
    run = together(deep=deep, other=other)
    sentence = r"combines different networks \(tests._small:batchnorm \+ tests._small:network\), .* name a run of one"
    with pytest.raises(UsageError, match=sentence):
        collapse_run(run, dataset(), "cpu")
    with pytest.raises(UsageError, match=sentence):
        Ensemble(run, "cpu").at(torch.eye(2))
    with pytest.raises(UsageError, match="are fixed: nothing to sample from"):
        Ensemble(run, "cpu").sample(3)
    path = str(run.save(tmp_path / "run"))
    with pytest.raises(UsageError, match=sentence):
        make(FGE(members=1, cycle=1), init=path)
    assert "combines different networks" in call("surface", path).stderr
    with pytest.raises(UsageError, match=sentence):
        export_run(path, tmp_path / "bundle", layout="vertices", use_data=False)


def test_networks_of_other_normalisations_each_see_their_own(deep):
    data = normalised(dataset(), "half")
    same = make(DeepEnsemble(members=1), data, architecture="tests._small:batchnorm", seed=7)
    run = together(deep=deep, same=same)
    assert run.manifest.parts == 2
    assert torch.equal(members(run), torch.cat([members(deep), members(same)]))


@pytest.mark.parametrize("tune", [False, True])
def test_different_networks_are_exported_and_served(deep, other, tmp_path, tune):
    run = together(deep=deep, other=other)
    path = run.save(tmp_path / "run")
    bundle = export_run(path, tmp_path / "bundle", use_data=False, tune=tune)
    verify_bundle(bundle)
    found = Runtime.load(bundle).predict_members(IMAGES.numpy())
    np.testing.assert_allclose(found, members(run).numpy(), atol=1e-5)


def test_what_float32_rounds_is_measured_by_each_members_own_network(tmp_path):
    data = dataset(size=32)
    one, other = (make(DeepEnsemble(members=1), data, architecture=a) for a in ("cnn", "tests._networks:rounded"))
    path = combine({"one": one, "other": other}, data).save(tmp_path / "run")
    bundle = export_run(path, tmp_path / "bundle", use_data=False)
    assert read_bundle(bundle).tolerance > 1e-4


def test_a_file_and_a_run_are_told_apart(deep, tmp_path):
    path = deep.save(tmp_path / "run")
    result = call("import", path, "--arch", "cnn", "--dataset", "digits", "--out", tmp_path / "new")
    assert "is a run, not a file of weights: join runs with ensembler combine" in result.stderr
    result = call("combine", path, path / "vertices.safetensors", "--out", tmp_path / "new")
    assert "is a file, not a run: make a run of checkpoints with ensembler import" in result.stderr
    assert not (tmp_path / "new").exists()


def test_runs_that_cannot_be_combined(deep):
    with pytest.raises(UsageError, match="every member of again has the weights of one before: leave again out"):
        together(deep=deep, again=deep)
    with pytest.raises(UsageError, match="name at least two runs to combine"):
        together(deep=deep)
    more = make(DeepEnsemble(members=1), dataset(train=40), architecture="tests._small:batchnorm")
    with pytest.raises(UsageError, match=r"^more was trained on small \(8 x 8 x 3\) and deep on small .*another split"):
        together(deep=deep, more=more)
    record = deep.manifest.dataset.model_copy(update={"classes": ["b", "a", "c"]})
    renamed = replace(deep, manifest=deep.manifest.model_copy(update={"dataset": record}))
    with pytest.raises(UsageError, match="the classes of renamed are not those of deep, or in another order"):
        together(deep=deep, renamed=renamed)
