"""What each method makes: from Python in three lines, its snapshots, its members, and what it says that it cost."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

import ensembler
import ensembler.trainers
from ensembler import as_dataset
from ensembler.data.datasets import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, DivergedError, UsageError
from ensembler.run import Run
from ensembler.subspace import log_volume
from ensembler.trainers import FGE, DeepEnsemble, Settings, Simplex, Snapshots, collapse_run, train
from ensembler.trainers.methods.fge import cyclic, cyclic_middles
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import after, constant, cosine, one_cycle, repeated
from ensembler.trainers.starts import fresh
from ensembler.trainers.work import each
from tests._small import dataset
from tests._training import flat, make, passes, same, saved, trainer


def test_three_lines_of_python_make_a_run(tmp_path):
    run = train("digits", FGE(members=2, cycle=0.1), Settings(epochs=0.1, device="cpu"))
    run.save(tmp_path / "fge")
    assert Ensemble.load(tmp_path / "fge", device="cpu").members == 2
    assert run.manifest.dataset.name == "digits"
    assert run.manifest.method == "fge"


@pytest.mark.parametrize("package", [ensembler, ensembler.trainers])
def test_no_module_hides_a_public_name(package):
    """Importing a submodule makes it an attribute of its package, in the place of what has its name."""
    for name in package.__all__:
        assert name.startswith("__") or not importlib.util.find_spec(f"{package.__name__}.{name}"), name
    code = "import ensembler.trainers.training; from ensembler.trainers import train; assert callable(train)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fge_rate_at_every_iteration_of_three_cycles():
    c, a1, a2 = 8, 0.05, 0.0005
    schedule = cyclic(a1, a2, c)
    for i in range(1, 3 * c + 1):
        t = (((i - 1) % c) + 1) / c
        expected = (1 - 2 * t) * a1 + 2 * t * a2 if t <= 0.5 else (2 - 2 * t) * a2 + (2 * t - 1) * a1
        assert schedule(i) == pytest.approx(expected, rel=1e-12)
    assert [schedule(i) for i in cyclic_middles(c, 3)] == [pytest.approx(a2)] * 3
    assert cyclic_middles(c, 3) == [4, 12, 20]
    for wrong in ((0.1, 0.2, 4), (0.1, 0.0, 4), (0.1, 0.01, 1)):
        with pytest.raises(UsageError):
            cyclic(*wrong)


def test_other_schedules():
    assert one_cycle(0.1, 10, 0.2)(2) == 0.1
    assert one_cycle(0.1, 10, 0.2)(1) == 0.05
    assert 0 < one_cycle(0.1, 10, 0.2)(10) < 0.02
    assert cosine(0.1, 10)(1) == 0.1
    assert cosine(0.1, 10)(6) == pytest.approx(0.05)
    assert [after(2, constant(1.0), lambda i: i * 10.0)(i) for i in (1, 2, 3, 4)] == [1.0, 1.0, 10.0, 20.0]


def snapshots_of(part, plan, **settings):
    """The vertices that one uninterrupted training collects, by parameter."""
    work = trainer(**settings)
    begin = fresh(work)
    fitted = work.fit(part, begin.vector[None].clone(), begin.buffers, plan)
    return work.weights.unflatten(torch.cat([snapshot.vertices for snapshot in fitted.snapshots]))


def test_fge_snapshots_are_the_weights_in_mid_cycle_of_one_uninterrupted_training():
    run = make(FGE(members=3, cycle=1, start=0.5))
    # 30 images in batches of 8: 4 iterations an epoch; the cycles begin after 0.5 * 2 epochs.
    schedule = after(4, one_cycle(0.1, 8), cyclic(5e-2, 5e-4, 4))
    expected = snapshots_of("fge", Plan(schedule, 14, collect=(6, 10, 14)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.vertices.items())
    assert torch.equal(run.coefficients, torch.eye(3))
    assert run.manifest.cost.example_passes == 30 + 30 + 30 + 8 + 8


def test_snapshot_rate_restarts_and_each_cycle_ends_in_a_snapshot():
    T, M, rate = 12, 3, 0.1
    schedule = repeated(cosine(rate, T // M), T // M)
    for t in range(1, T + 1):  # Huang et al. 2017, equation 2
        expected = rate / 2 * (math.cos(math.pi * ((t - 1) % math.ceil(T / M)) / math.ceil(T / M)) + 1)
        assert schedule(t) == pytest.approx(expected, rel=1e-12)
    run = make(Snapshots(members=3), epochs=3)
    assert run.manifest.cost.example_passes == 3 * 30
    expected = snapshots_of("snapshots", Plan(schedule, 12, collect=(4, 8, 12)), epochs=3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.vertices.items())


@pytest.mark.parametrize("network", ["network", "batchnorm"])
@pytest.mark.parametrize("regulariser", ["volume", "function"])
def test_the_cost_counts_every_example_that_passed(network, regulariser):
    counted = {"backward": 0, "forward": 0}

    def count(module, inputs):
        counted["backward" if torch.is_grad_enabled() else "forward"] += len(inputs[0])

    work = trainer(epochs=1.6, architecture=f"tests._small:{network}")
    work.weights.module.register_forward_pre_hook(count)
    method = Simplex(vertices=3, vertex_epochs=0.7, samples_per_step=2, regulariser=regulariser, members=4)
    method.train(work)
    cost = work.ledger.cost()
    assert counted == {"backward": cost.example_passes, "forward": cost.forward_passes}
    found = {name: entry.example_passes for name, entry in cost.entries.items() if entry.example_passes}
    assert found == {"solution 1": 30 + 16, "vertex 2": 24, "vertex 3": 24}
    held_out = len(dataset().validation)  # once for each epoch, whole or not
    assert cost.entries["solution 1"].forward_passes == 2 * held_out
    assert cost.entries["vertex 2"].forward_passes == held_out + (24 if regulariser == "function" else 0)
    assert cost.entries["members"].forward_passes == (3 * 30 if network == "batchnorm" else 0)  # not the solution
    assert sum(line["examples"] for line in work.ledger.history) == counted["backward"]
    assert sum(entry.forward_passes for entry in cost.entries.values()) == cost.forward_passes
    assert all(entry.seconds >= 0 and entry.peak_memory > 2**20 for entry in cost.entries.values())


def test_what_diverged_is_counted_up_to_its_last_whole_epoch():
    work = trainer(clip=0.0)
    begin = fresh(work)
    with pytest.raises(DivergedError, match="in epoch 3: lower the learning rate"):
        work.fit("x", begin.vector[None].clone(), {}, Plan(lambda i: 0.1 if i <= 8 else 1e30, 16))
    entry = work.ledger.cost().entries["x"]
    assert entry.example_passes == 60
    assert entry.seconds > 0
    assert [line["number"] for line in work.ledger.history] == [1, 2]


def look(work):
    return {}, {"weights": id(work.weights), "data": id(work.train_examples), "group": id(work.group)}


def test_a_job_here_has_the_network_the_data_and_the_group_of_its_trainer():
    work = trainer()
    ((_, found),) = each(work, look, {"job": {}})
    assert found == look(work)[1]


def test_a_simplex_grows_around_its_solution_and_spans_a_volume():
    single = make(DeepEnsemble(members=1))
    run = make(Simplex(vertices=4, members=6))
    for name, tensor in single.vertices.items():
        assert torch.equal(run.vertices[name][0], tensor[0])
    (geometry,) = run.manifest.metrics["simplexes"]
    assert geometry["log_volume"] == pytest.approx(log_volume(flat(run)).item(), abs=1e-6)
    assert math.isfinite(geometry["log_volume"])
    assert run.coefficients.shape == (6, 4)
    assert run.manifest.metrics["test"]["disagreement"] is not None


def test_several_simplexes_stand_on_independent_solutions_and_share_the_members(tmp_path):
    run = make(Simplex(vertices=3, members=5, simplexes=2, corners=False))
    deep = make(DeepEnsemble(members=2))
    for name, tensor in deep.vertices.items():
        assert torch.equal(run.vertices[name][[0, 3]], tensor)
    lies_in = [(row[:3] > 0).all().item() for row in run.coefficients]
    assert lies_in == [True, False, True, False, True]
    for row, first in zip(run.coefficients, lies_in, strict=True):
        assert torch.equal(row[3:] if first else row[:3], torch.zeros(3))
        assert row.sum().item() == pytest.approx(1)
    assert len(run.manifest.metrics["simplexes"]) == 2
    assert run.manifest.cost.example_passes == 2 * (60 + 2 * 16)
    assert Ensemble(run, "cpu").sample(9).members == 9
    with pytest.raises(UsageError, match="2 members are too few for 3 simplexes"):
        make(Simplex(members=2, simplexes=3))
    with pytest.raises(UsageError, match="several simplexes start from independent solutions: leave out --init"):
        make(Simplex(simplexes=2), init=saved(deep, tmp_path / "deep"))


def test_more_lambda_more_volume():
    volumes = [
        make(Simplex(vertices=3, regularisation=strength)).manifest.metrics["simplexes"][0]["log_volume"]
        for strength in (0.0, 0.05, 0.5)
    ]
    assert volumes == sorted(volumes)
    assert volumes[2] > volumes[0] + 1


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    assert same(make(Simplex(vertices=2)), make(Simplex(vertices=2)))
    assert not same(make(Simplex(vertices=2)), make(Simplex(vertices=2), seed=1))


def test_members_are_a_function_of_the_seed_and_the_callers_random_numbers_are_left_alone():
    """Dropout draws its masks in training from the seed, and none where BatchNorm statistics are recomputed."""
    runs = []
    for callers in (5, 6):
        torch.manual_seed(callers)
        before = torch.random.get_rng_state()
        runs.append(make(Simplex(vertices=2, members=4), architecture="tests._small:noisy"))
        assert torch.equal(before, torch.random.get_rng_state())
    assert same(*runs)
    assert all(torch.equal(rows, runs[1].buffers[name]) for name, rows in runs[0].buffers.items())


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "mode",
    [
        float64,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
        lambda: np.errstate(all="raise"),
    ],
)
def test_the_callers_modes_of_torch_and_numpy_change_nothing(mode, tmp_path):
    """What autocast had changed would also have been kept, as a prediction in float32."""
    data, rows = dataset(), (np.arange(60.0).reshape(20, 3), np.arange(20) % 2)
    plain, moments = make(DeepEnsemble(members=2), data, architecture="tests._small:noisy"), as_dataset(rows).mean
    report = Ensemble(plain, "cpu").evaluate(dataset=data, cache=tmp_path / "plain").report
    with mode():
        run = make(DeepEnsemble(members=2), data, architecture="tests._small:noisy")
        again = Ensemble(plain, "cpu").evaluate(dataset=data, cache=tmp_path / "again").report
        collapsed = collapse_run(run, data)
        assert as_dataset(rows).mean == moments
    assert run.manifest.metrics == plain.manifest.metrics and again == report
    assert same(run, plain) and same(collapsed, collapse_run(plain, data))


def test_threads_that_train_take_turns():
    """PyTorch's random generators, and its hooks of all modules, are those of the process."""
    train_one = partial(make, DeepEnsemble(members=2), architecture="tests._small:noisy")
    expected = [train_one(seed=seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: train_one(seed=seed), range(3)))
    assert all(map(same, found, expected))


def test_deep_ensemble_members_are_independent_and_of_equal_cost():
    run = make(DeepEnsemble(members=3))
    kernels = run.vertices["0.weight"]
    assert not torch.equal(kernels[0], kernels[1])
    assert list(passes(run).values()) == [60] * 3
    assert run.manifest.method == "deep-ensemble"
    assert run.manifest.independent


def test_a_simplex_from_a_run_takes_over_its_weights_and_cost(tmp_path):
    path = saved(make(DeepEnsemble(members=2)), tmp_path / "first")
    run = make(Simplex(vertices=2, vertex_epochs=1), init=path)
    for name, tensor in Run.load(path).vertices.items():
        torch.testing.assert_close(run.vertices[name][0], tensor[0], rtol=0, atol=0)
    assert passes(run) == {"solution 1": 60, "vertex 2": 30}
    with pytest.raises(DataError, match="training images differ"):
        make(Simplex(vertices=2), dataset(train=33), init=path)
    with pytest.raises(UsageError, match="train-deep-ensemble starts from fresh weights: leave out --init"):
        make(DeepEnsemble(members=2), init=path)


def test_batchnorm_statistics_of_every_sampled_member_are_recomputed():
    images = dataset(train=32)  # batches of one size, so that the mean over batches is the mean over images
    run = make(Simplex(vertices=3, members=4), images, architecture="tests._small:batchnorm", epochs=4)
    means = run.buffers["body.1.running_mean"]
    assert means.shape == (4, 4)
    ensemble = Ensemble(run, "cpu")
    x = normalise(images.train.images, images.mean, images.std)
    for member in range(1, 4):  # the first is the solution, which keeps its own
        activations = ensemble.network(member).body[0](x)
        torch.testing.assert_close(means[member], activations.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert run.manifest.cost.entries["members"].forward_passes == 3 * 32


def test_divergence_is_said_and_nothing_comes_of_it():
    with pytest.raises(DivergedError, match="lower the learning rate"):
        make(DeepEnsemble(members=1), lr=1e30, clip=0.0, epochs=6)


def test_half_precision_trains_to_about_the_same_weights():
    full, half = (make(DeepEnsemble(members=1), precision=precision) for precision in ("float32", "bfloat16"))
    for name, rows in full.vertices.items():
        assert half.vertices[name].dtype == torch.float32
        assert not torch.equal(rows, half.vertices[name])
        torch.testing.assert_close(rows, half.vertices[name], rtol=0.05, atol=0.02)
    with pytest.raises(UsageError, match="float16 needs a GPU"):
        make(DeepEnsemble(), precision="float16")


@pytest.mark.parametrize("method", [DeepEnsemble(members=1), DeepEnsemble(members=2), Simplex(vertices=2)])
def test_answers_that_are_not_finite_are_named_after_training(method):
    with pytest.raises(DivergedError, match=r"^(member 1|the network) answers with numbers that are not finite"):
        make(method, architecture="tests._networks:cooling", epochs=3)
