"""Each method's update against one written out by hand, and the promises of the loop around it."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from ensembler.architectures import build
from ensembler.checkpoint import Checkpoint
from ensembler.datasets import Split, normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, DivergedError, ShapeError, UsageError
from ensembler.run import Run
from ensembler.subspace import log_volume
from ensembler.trainers import Session, Settings, train_deep_ensemble, train_fge, train_simplex, train_snapshots
from ensembler.trainers.batches import Batches
from ensembler.trainers.loop import train
from ensembler.trainers.schedules import after, constant, cosine, cyclic, cyclic_middles, one_cycle, repeated
from ensembler.trainers.simplex import towards_volume
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, dataset


def session(**changes):
    init = changes.pop("init", None)
    return Session(changes.pop("dataset", dataset()), Settings(**(SETTINGS | changes)), init)


def passes(run):
    """Example passes by part, of those that trained something."""
    return {name: part.example_passes for name, part in run.manifest.cost.parts.items() if part.example_passes}


def same(one: Run, other: Run) -> bool:
    return all(torch.equal(tensor, other.vertices[name]) for name, tensor in one.vertices.items())


class Repeated:
    """The same batches again and again, as the loop asks for them."""

    def __init__(self, *batches):
        self.batches, self.per_epoch, self.at = batches, len(batches), 0

    def __next__(self):
        self.at += 1
        batch = self.batches[(self.at - 1) % len(self.batches)]
        self.whole = len(batch[1])
        return batch


def random_batches(count, size=6):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def sgd(moving):
    return torch.optim.SGD(moving, lr=1.0, momentum=0.9, weight_decay=1e-3, nesterov=True)


def test_one_vertex_with_coefficient_one_is_plain_training():
    module = build("tests._small:batchnorm", 3)
    plain = copy.deepcopy(module)
    batches = random_batches(4)
    optimiser = torch.optim.SGD(plain.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, nesterov=True)
    for i, (x, y) in enumerate(batches * 2, start=1):
        optimiser.param_groups[0]["lr"] = 0.1 / i
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(plain(x), y).backward()
        optimiser.step()
    weights = FlatWeights(module)
    vertices = weights.vector[None].clone()
    train(weights, vertices, Repeated(*batches), sgd, lambda i: 0.1 / i, 8)
    expected = weights.flatten({name: p.detach()[None] for name, p in plain.named_parameters()})
    torch.testing.assert_close(vertices, expected, rtol=1e-5, atol=1e-6)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(weights.buffers()[name], buffer)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("trainable", [[2], [0, 2], [0, 1, 2]])
def test_the_step_is_autograd_through_the_explicit_sum(samples, trainable):
    """Every trainable vertex: ``d/dV[k]`` of ``sum_s share_s * loss(c_s @ V)``, by autograd through ``c @ V``."""
    weights = FlatWeights(build("tests._small:network", 3))
    generator = torch.Generator().manual_seed(1)
    start = weights.vector + 0.3 * torch.randn(3, len(weights), generator=generator)
    batches = random_batches(2, size=7)
    coefficients = [torch.softmax(torch.randn(samples, 3, generator=generator), dim=1) for _ in range(4)]

    explicit = [
        {name: rows[k].clone().requires_grad_() for name, rows in weights.unflatten(start).items()} for k in range(3)
    ]
    leaves = [leaf for k in trainable for leaf in explicit[k].values()]
    optimiser = torch.optim.SGD(leaves, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)
    module = build("tests._small:network", 3)
    for (x, y), drawn in zip(batches * 2, coefficients, strict=True):
        optimiser.zero_grad()
        loss = torch.zeros(())
        for c, x_part, y_part in zip(drawn, x.chunk(samples), y.chunk(samples), strict=True):
            member = {name: sum(c[k] * explicit[k][name] for k in range(3)) for name in explicit[0]}
            logits = torch.func.functional_call(module, member, x_part)
            loss = loss + torch.nn.functional.cross_entropy(logits, y_part, reduction="sum") / len(y)
        loss.backward()
        optimiser.step()

    vertices, drawn = start.clone(), iter(coefficients)
    train(
        weights,
        vertices,
        Repeated(*batches),
        sgd,
        constant(0.05),
        4,
        trainable=trainable,
        draw=lambda S: next(drawn),
        samples=samples,
    )
    for name, rows in weights.unflatten(vertices).items():
        expected = torch.stack([vertex[name].detach() for vertex in explicit])
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)


def test_the_volume_regulariser_is_autograd_of_minus_lambda_log_volume():
    generator = torch.Generator().manual_seed(0)
    simplex = torch.randn(4, 50, generator=generator, dtype=torch.float64)
    simplex[3] += 100  # so far out that the softening does not count
    gradients = torch.ones(1, 50, dtype=torch.float64)
    towards_volume(simplex[:3], simplex[3], 0.3, torch.empty(50, dtype=torch.float64))(gradients)
    vertex = simplex[3].clone().requires_grad_()
    edges = torch.stack([*simplex[1:3], vertex]) - simplex[0]
    (-0.3 * torch.logdet(edges @ edges.T) / 2).backward()
    torch.testing.assert_close(gradients[0], 1 + vertex.grad, rtol=1e-4, atol=1e-9)


def test_clipping_shortens_the_gradient_to_the_limit():
    weights = FlatWeights(build("tests._small:network", 3))
    start = weights.vector[None].clone()
    vertices = start.clone()
    plain = lambda moving: torch.optim.SGD(moving, lr=1.0)  # noqa: E731
    train(weights, vertices, Repeated(*random_batches(1)), plain, constant(1.0), 1, clip=1e-3)
    assert (vertices - start).norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_fge_rate_at_every_iteration_of_three_cycles():
    c, a1, a2 = 8, 0.05, 0.0005
    schedule = cyclic(a1, a2, c)
    for i in range(1, 3 * c + 1):
        t = (((i - 1) % c) + 1) / c
        expected = (1 - 2 * t) * a1 + 2 * t * a2 if t <= 0.5 else (2 - 2 * t) * a2 + (2 * t - 1) * a1
        assert schedule(i) == pytest.approx(expected, rel=1e-12)
    assert [schedule(i) for i in cyclic_middles(c, 3)] == [pytest.approx(a2)] * 3
    assert cyclic_middles(c, 3) == [4, 12, 20]


def test_other_schedules():
    assert one_cycle(0.1, 10, 0.2)(2) == 0.1
    assert one_cycle(0.1, 10, 0.2)(1) == 0.05
    assert 0 < one_cycle(0.1, 10, 0.2)(10) < 0.02
    assert cosine(0.1, 10)(1) == 0.1
    assert cosine(0.1, 10)(6) == pytest.approx(0.05)
    assert [after(2, constant(1.0), lambda i: i * 10.0)(i) for i in (1, 2, 3, 4)] == [1.0, 1.0, 10.0, 20.0]
    for wrong in ((0.1, 0.2, 4), (0.1, 0.0, 4), (0.1, 0.01, 1)):
        with pytest.raises(UsageError):
            cyclic(*wrong)


def test_fge_snapshots_are_the_weights_in_mid_cycle_of_one_uninterrupted_training():
    run = train_fge(session(), members=3, cycle=1, start=0.5)
    # 30 images in batches of 8: 4 iterations an epoch; the cycles begin after 0.5 * 2 epochs.
    reference = session()
    vertices, seen = reference.fresh().vector[None].clone(), []
    schedule = after(4, one_cycle(0.1, 8), cyclic(5e-2, 5e-4, 4))
    snapshots = reference.train("fge", vertices, schedule, 14, collect=range(1, 15))
    seen = [snapshots[i - 1].vertices[0] for i in (6, 10, 14)]
    expected = reference.weights.unflatten(torch.stack(seen))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.vertices.items())
    assert torch.equal(run.coefficients, torch.eye(3))
    assert run.manifest.cost.example_passes == 30 + 30 + 30 + 8 + 8


def test_snapshot_rate_restarts_and_each_cycle_ends_in_a_snapshot():
    T, M, rate = 12, 3, 0.1
    schedule = repeated(cosine(rate, T // M), T // M)
    for t in range(1, T + 1):  # Huang et al. 2017, equation 2
        expected = rate / 2 * (math.cos(math.pi * ((t - 1) % math.ceil(T / M)) / math.ceil(T / M)) + 1)
        assert schedule(t) == pytest.approx(expected, rel=1e-12)
    run = train_snapshots(session(epochs=3), members=3)
    assert run.manifest.cost.example_passes == 3 * 30
    reference = session(epochs=3)
    snapshots = reference.train(
        "snapshots", reference.fresh().vector[None].clone(), repeated(cosine(0.1, 4), 4), 12, collect=(4, 8, 12)
    )
    expected = reference.weights.unflatten(torch.cat([snapshot.vertices for snapshot in snapshots]))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.vertices.items())


@pytest.mark.parametrize("network", ["network", "batchnorm"])
@pytest.mark.parametrize("regulariser", ["volume", "function"])
def test_the_cost_counts_every_example_that_passed(network, regulariser):
    counted = {"backward": 0, "forward": 0}
    module = build(f"tests._small:{network}", 3)

    def count(module, inputs):
        counted["backward" if torch.is_grad_enabled() else "forward"] += len(inputs[0])

    module.register_forward_pre_hook(count)
    work = session(epochs=1.6, architecture=f"tests._small:{network}")
    work.weights = FlatWeights(module)
    run = train_simplex(work, vertices=3, vertex_epochs=0.7, samples_per_step=2, regulariser=regulariser, members=4)
    cost = run.manifest.cost
    assert counted == {"backward": cost.example_passes, "forward": cost.forward_passes}
    assert passes(run) == {"solution 1": 30 + 16, "vertex 2": 24, "vertex 3": 24}
    assert cost.parts["vertex 2"].forward_passes == (24 if regulariser == "function" else 0)
    assert cost.parts["members"].forward_passes == (4 * 30 if network == "batchnorm" else 0)
    assert sum(record["examples"] for record in run.history) == counted["backward"]
    assert sum(part.forward_passes for part in cost.parts.values()) == cost.forward_passes
    assert all(part.seconds >= 0 and part.peak_memory > 2**20 for part in cost.parts.values())


def test_a_simplex_grows_around_its_solution_and_spans_a_volume():
    single = train_deep_ensemble(session(), members=1)
    run = train_simplex(session(), vertices=4, members=6)
    for name, tensor in single.vertices.items():
        assert torch.equal(run.vertices[name][0], tensor[0])
    V = torch.cat([tensor.flatten(1) for tensor in run.vertices.values()], dim=1)
    (geometry,) = run.manifest.metrics["simplexes"]
    assert geometry["log_volume"] == pytest.approx(log_volume(V).item(), abs=1e-6)
    assert math.isfinite(geometry["log_volume"])
    assert run.coefficients.shape == (6, 4)
    assert run.manifest.metrics["test"]["disagreement"] is not None


def test_several_simplexes_stand_on_independent_solutions_and_share_the_members():
    run = train_simplex(session(), vertices=3, members=5, simplexes=2, corners=False)
    deep = train_deep_ensemble(session(), members=2)
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
    with pytest.raises(UsageError, match="too few for 3 simplexes"):
        train_simplex(session(), members=2, simplexes=3)
    with pytest.raises(UsageError, match="never from one run"):
        train_simplex(session(init=deep), simplexes=2)


def test_more_lambda_more_volume():
    volumes = [
        train_simplex(session(), vertices=3, regularisation=strength).manifest.metrics["simplexes"][0]["log_volume"]
        for strength in (0.0, 0.05, 0.5)
    ]
    assert volumes == sorted(volumes)
    assert volumes[2] > volumes[0] + 1


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    assert same(train_simplex(session(), vertices=2), train_simplex(session(), vertices=2))
    assert not same(train_simplex(session(), vertices=2), train_simplex(session(seed=1), vertices=2))


def test_the_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    train_simplex(session(), vertices=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_deep_ensemble_members_are_independent_and_of_equal_cost():
    run = train_deep_ensemble(session(), members=3)
    kernels = run.vertices["0.weight"]
    assert not torch.equal(kernels[0], kernels[1])
    assert list(passes(run).values()) == [60] * 3
    assert run.manifest.method == "deep-ensemble"


def test_a_simplex_from_a_run_takes_over_its_weights_and_cost(tmp_path):
    first = train_deep_ensemble(session(), members=2)
    first.save(tmp_path / "first")
    run = train_simplex(session(init=Run.load(tmp_path / "first")), vertices=2, vertex_epochs=1)
    for name, tensor in first.vertices.items():
        torch.testing.assert_close(run.vertices[name][0], tensor[0], rtol=0, atol=0)
    assert passes(run) == {"solution 1": 60, "vertex 2": 30}
    with pytest.raises(DataError, match="training images differ"):
        train_simplex(session(init=first, dataset=dataset(train=33)), vertices=2)
    with pytest.raises(UsageError, match="independent weights"):
        train_deep_ensemble(session(init=first), members=2)


def test_batchnorm_statistics_of_every_sampled_member_are_recomputed():
    images = dataset(train=32)  # batches of one size, so that the mean over batches is the mean over images
    work = session(dataset=images, architecture="tests._small:batchnorm", epochs=4)
    run = train_simplex(work, vertices=3, members=4)
    means = run.buffers["body.1.running_mean"]
    assert means.shape == (4, 4)
    ensemble = Ensemble(run, "cpu")
    x = normalise(images.train.images, images.mean, images.std)
    for member in range(4):
        activations = ensemble.network(member).body[0](x)
        torch.testing.assert_close(means[member], activations.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert run.manifest.cost.parts["members"].forward_passes == 4 * 32


def test_divergence_is_said_and_nothing_comes_of_it():
    with pytest.raises(DivergedError, match="lower the learning rate"):
        train_deep_ensemble(session(rate=1e30, clip=None, epochs=6), members=1)


def test_options_out_of_range_are_refused():
    for arguments, message in (
        ({"vertices": 1}, "at least 2 vertices"),
        ({"members": 0}, "at least one member"),
        ({"vertex_epochs": 0}, "vertex_epochs must be positive"),
        ({"regularisation": -1.0}, "must be 'auto' or not negative, as -1.0 is"),
        ({"regularisation": math.nan}, "must be 'auto' or not negative"),
        ({"regularisation": "much"}, "must be 'auto' or not negative, as much is"),
        ({"regulariser": "size"}, "unknown regulariser 'size': use volume or function"),
        ({"tolerance": 0}, "tolerance must be positive"),
        ({"concentration": 0.0}, "concentration"),
        ({"samples_per_step": 0}, "samples_per_step"),
    ):
        with pytest.raises(UsageError, match=message):
            train_simplex(session(), **({"vertices": 2} | arguments))
    for name, wrong in (
        ("epochs", (0, math.nan, math.inf)),
        ("rate", (-1, math.nan)),
        ("batch_size", (0, -4)),
        ("augmentation", ("x",)),
        ("momentum", (-0.1, 1.0)),
        ("weight_decay", (-1e-9,)),
        ("clip", (0, -1)),
    ):
        for value in wrong:
            with pytest.raises(UsageError, match=name):
                session(**{name: value})
    with pytest.raises(UsageError, match="share of the budget"):
        train_fge(session(), start=1.5)
    with pytest.raises(UsageError, match="cannot compute on the device 'tpu9'"):
        session(device="tpu9")


def batches_of(split, augmentation, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batches(split, size, augmentation, (0.0,) * 3, (1 / 255,) * 3, generator)


def test_an_epoch_holds_every_example_once_and_orders_differ():
    images = (torch.arange(10, dtype=torch.uint8)[:, None, None, None] + 1).expand(10, 8, 8, 3).contiguous()
    batches = batches_of(Split(images, torch.arange(10)), "none")
    epochs = []
    for _ in range(2):
        taken = [next(batches) for _ in range(batches.per_epoch)]
        assert [len(y) for _, y in taken] == [4, 4, 2]
        for x, y in taken:
            assert torch.equal(x[:, 0, 0, 0].round().long(), y + 1)
        epochs.append(torch.cat([y for _, y in taken]))
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_augmentation_is_a_crop_of_the_padded_image_or_of_its_mirror_image():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 255, (64, 8, 8, 3), dtype=np.uint8))
    split = Split(images, torch.arange(64))
    padded = np.pad(images.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)))
    for augmentation in ("crop", "crop-flip"):
        x, y = next(batches_of(split, augmentation, size=64))
        mirrored = 0
        for picture, label in zip(x.permute(0, 2, 3, 1).round().numpy(), y, strict=True):
            crops = [padded[label][r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
            straight = any(np.array_equal(picture, crop) for crop in crops)
            mirrored += not straight
            assert straight or any(np.array_equal(picture, crop[:, ::-1]) for crop in crops)
        assert (10 < mirrored < 54) if augmentation == "crop-flip" else mirrored == 0


# --- starting from weights that the user has ---


def weights_of(classes: int, architecture="tests._small:network") -> Checkpoint:
    return Checkpoint("mine.pt", build(architecture, classes, seed=7).state_dict())


def test_a_checkpoint_that_fits_is_the_solution_at_a_cost_that_is_not_known():
    given = weights_of(3)
    for run, first in (
        (train_simplex(session(init=given), vertices=2, vertex_epochs=1), 0),
        (train_fge(session(init=given, rate=1e-9, weight_decay=0.0), members=1, cycle=1, high=2e-9, low=1e-9), 0),
    ):
        for name, rows in run.vertices.items():
            torch.testing.assert_close(rows[first], given.tensors[name], atol=1e-5, rtol=0)
        assert run.manifest.cost.unknown == ["mine.pt"]
        assert run.manifest.options["init"] == "mine.pt"
        assert "solution 1" not in run.manifest.cost.parts
    with pytest.raises(UsageError, match="independent weights"):
        train_deep_ensemble(session(init=given), members=2)


def test_a_checkpoint_of_other_classes_is_where_training_begins():
    given = weights_of(10)
    still = {"init": given, "rate": 1e-30, "weight_decay": 0.0}
    run = train_deep_ensemble(session(**still), members=2)
    body, head = run.vertices["0.weight"], run.vertices["3.weight"]
    for rows in body:
        torch.testing.assert_close(rows, given.tensors["0.weight"])
    assert not torch.equal(head[0], head[1]), "each member has a fresh head of its own"
    assert passes(run) == {"solution 1": 60, "solution 2": 60}
    simplex = train_simplex(session(init=given), vertices=2, vertex_epochs=1)
    assert passes(simplex) == {"solution 1": 60, "vertex 2": 30}
    assert simplex.manifest.cost.unknown == ["mine.pt"]
    with pytest.raises(ShapeError, match=r"no tensor|no weights|expected"):
        session(init=weights_of(3, "tests._small:batchnorm"))


def test_half_precision_trains_to_about_the_same_weights():
    full, half = (train_deep_ensemble(session(precision=precision), members=1) for precision in ("float32", "bfloat16"))
    for name, rows in full.vertices.items():
        assert half.vertices[name].dtype == torch.float32
        assert not torch.equal(rows, half.vertices[name])
        torch.testing.assert_close(rows, half.vertices[name], rtol=0.05, atol=0.02)
    with pytest.raises(UsageError, match="float16 needs a GPU"):
        session(precision="float16")
    with pytest.raises(UsageError, match="unknown precision 'float8': use one of float32, bfloat16, float16"):
        session(precision="float8")
