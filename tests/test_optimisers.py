"""Optimisers over views of the flat vector, against the same class on the module's own parameters; parameter groups."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models import VisionTransformer

from ensembler import Ensemble
from ensembler.errors import UsageError
from ensembler.networks.architectures import build
from ensembler.run import Run
from ensembler.trainers import (
    FGE,
    SWAG,
    Curve,
    CyclicalSGMCMC,
    DeepEnsemble,
    Settings,
    Simplex,
    Snapshots,
    optimisers,
)
from ensembler.trainers.events import EpochEnd, Progress
from ensembler.trainers.plan import Plan
from ensembler.trainers.schedules import constant
from ensembler.weights import FlatWeights
from tests._small import SETTINGS, dataset
from tests._training import call, fit, flat, make, random_batches, same, saved


def vit(num_classes: int) -> nn.Module:
    return VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=num_classes
    )


class WithNorm(nn.Module):
    """A convolution, LayerNorm, and a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(36))
        self.head = nn.Linear(36, num_classes)

    def forward(self, x):
        return self.head(self.body(x))


def small(num_classes: int) -> nn.Module:
    return build("tests.test_optimisers:WithNorm", num_classes)


def halves(network: nn.Module) -> list[dict]:
    """The head at ten times the rate, the rest without decay."""
    head = {id(parameter) for parameter in network.head.parameters()}
    body = [parameter for parameter in network.parameters() if id(parameter) not in head]
    return [{"params": network.head.parameters(), "lr": 0.05}, {"params": body, "weight_decay": 0.0}]


def without_head(network: nn.Module) -> list[dict]:
    return [{"params": network.body.parameters()}]


def head_twice(network: nn.Module) -> list[dict]:
    return [{"params": network.parameters()}, {"params": network.head.parameters()}]


def of_another(network: nn.Module) -> list[dict]:
    return [{"params": copy.deepcopy(network).parameters()}]


def misspelt(network: nn.Module) -> list[dict]:
    return [{"params": network.parameters(), "learning_rate": 0.1}]


def raising(network: nn.Module) -> list[dict]:
    raise KeyError("body")


def betas(params, lr, weight_decay):
    return torch.optim.AdamW(params, lr, betas=(0.8, 0.9), weight_decay=weight_decay)


class Odd(torch.optim.SGD):
    """Keeps in its state what no checkpoint holds."""

    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["odd"] = pickle


class Counting(torch.optim.Optimizer):
    """Its rate falls by a count that it keeps in its group, and its memory is of twice the precision."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                memory = self.state[p].setdefault("memory", torch.zeros_like(p, dtype=torch.float64))
                memory.mul_(0.9).add_(p.grad / 3)
                p.sub_((group["lr"] / group["count"] * memory).to(p.dtype))


def settings(**given) -> Settings:
    return Settings(**SETTINGS | given).resolved(dataset())


def trained(module: nn.Module, given: Settings, steps: int = 5, **options) -> dict[str, torch.Tensor]:
    """The parameters by name, after steps of the package's loop at the settings' rate."""
    weights = FlatWeights(module)
    plan = Plan(constant(given.lr), steps)
    own = lambda moving: optimisers.make(given, weights, moving)  # noqa: E731
    fitted = fit(weights, weights.vector[None].clone(), random_batches(2), plan, own, **options)
    return {name: rows[0] for name, rows in weights.unflatten(fitted.vertices).items()}


def by_hand(module: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 5) -> dict[str, torch.Tensor]:
    for _, (x, y) in zip(range(steps), random_batches(2) * steps, strict=False):
        optimiser.zero_grad()
        cross_entropy(module(x), y).backward()
        optimiser.step()
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def assert_close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Rprop"])
def test_any_class_of_torch_optim_does_what_it_does_on_the_network_itself(name):
    """Adafactor looks at the rows and columns of matrices: it is given each parameter in its own shape."""
    cls, ours, theirs = getattr(torch.optim, name), small(3), small(3)
    theirs.load_state_dict(ours.state_dict())
    assert_close(trained(ours, settings(optimiser=cls)), by_hand(theirs, cls(theirs.parameters())))


@pytest.mark.parametrize("name", ["adamw", "torch.optim:AdamW"])
def test_adamw_decays_matrices_and_kernels_only(name):
    ours, theirs = vit(3), vit(3)
    theirs.load_state_dict(ours.state_dict())
    kept = {"class_token", "encoder.pos_embedding"}
    kept |= {name for name, parameter in theirs.named_parameters() if parameter.dim() == 1}
    named = dict(theirs.named_parameters())
    groups = [{"params": [named[name] for name in named if name not in kept], "weight_decay": 0.5}]
    groups += [{"params": [named[name] for name in kept], "weight_decay": 0.0}]
    given = settings(optimiser=name, weight_decay=0.5, lr=0.01)
    found, expected = trained(ours, given), by_hand(theirs, torch.optim.AdamW(groups, lr=0.01))
    for layer in (0, 1):  # a key's bias changes nothing: its gradient is noise
        bias = f"encoder.layers.encoder_layer_{layer}.self_attention.in_proj_bias"
        del found[bias], expected[bias]
    assert_close(found, expected)


def test_what_is_not_decayed():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.norm = nn.Embedding(5, 4), nn.LayerNorm((3, 4))
            self.one, self.scale = nn.Linear(4, 1), nn.Parameter(torch.ones(4, 1, 1))
            self.mix, self.named = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
            self.attention, self.recurrent = nn.MultiheadAttention(4, 1), nn.GRU(4, 4)

        def no_weight_decay(self):
            return {"named"}

    network = Table()
    decayed = {name for name, _ in network.named_parameters()} - optimisers.undecayed(network)
    assert decayed == {
        *("one.weight", "mix", "attention.in_proj_weight", "attention.out_proj.weight"),
        *("recurrent.weight_ih_l0", "recurrent.weight_hh_l0"),
    }


def test_sgd_is_one_view_of_the_vector():
    weights = FlatWeights(small(3))
    vertex = weights.vector.detach().requires_grad_()
    vertex.grad = weights.grad
    (group,) = optimisers.make(settings(), weights, [vertex]).param_groups
    (view,) = group["params"]
    assert view.data_ptr() == vertex.data_ptr() and view.numel() == len(weights)
    assert view.grad.data_ptr() == weights.grad.data_ptr()
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (5e-4, 0.9, True)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch.optim:Adam"])
def test_groups_of_ones_own_keep_the_proportions_of_their_rates(optimiser):
    ours, theirs = small(3), small(3)
    theirs.load_state_dict(ours.state_dict())
    given = settings(optimiser=optimiser, lr=0.005, weight_decay=0.1, parameter_groups=halves)
    assert given.parameter_groups == "tests.test_optimisers:halves"
    groups = halves(theirs)
    if optimiser == "sgd":
        own = torch.optim.SGD(groups, lr=0.005, momentum=0.9, nesterov=True, weight_decay=0.1)
    else:
        cls = torch.optim.AdamW if optimiser == "adamw" else torch.optim.Adam
        own = cls(groups, lr=0.005, weight_decay=0.1)
    assert_close(trained(ours, given), by_hand(theirs, own))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimiser": "adamm"}, "--optimiser must be sgd, adamw or package.module:Class, not 'adamm'"),
        ({"optimiser": "torch.optim:Foo"}, "cannot import the optimiser 'torch.optim:Foo'"),
        ({"optimiser": "math:pi"}, "--optimiser math:pi is a float: name a class"),
        ({"optimiser": "math:sqrt"}, "--optimiser math:sqrt takes no lr"),
        ({"optimiser": torch.optim.LBFGS}, "--optimiser torch.optim:LBFGS cannot do a step: .*closure"),
        ({"optimiser": torch.optim.SparseAdam}, "cannot do a step: .*dense gradients"),
        ({"optimiser": "tests.test_optimisers:small"}, "takes no lr"),
        ({"optimiser": betas}, "--optimiser tests.test_optimisers:betas has no learning rate by default: give --lr"),
        ({"optimiser": Odd}, "keeps a module in its state, and a checkpoint holds tensors"),
        ({"optimiser": "torch.optim:Rprop", "weight_decay": 0.1}, "takes no weight decay: leave out --weight-decay"),
        ({"optimiser": "adamw", "momentum": 0.9}, "--momentum is sgd's, and --optimiser is adamw: leave out one"),
        ({"parameter_groups": without_head}, "leaves out head.bias: give every parameter a group"),
        ({"parameter_groups": head_twice}, "has head.weight twice: give every parameter one group|more than one"),
        ({"parameter_groups": of_another}, "a parameter that is not the network's"),
        ({"parameter_groups": misspelt}, "parameter group 1 has an option 'learning_rate', which SGD does not have"),
        ({"parameter_groups": raising}, "fails: KeyError: 'body'.*must return a list of dicts"),
        ({"warmup": 2.0}, "--warmup 2 leaves nothing of --epochs 2: lower it"),
        ({"accumulate": 5}, "--accumulate 5 leaves fewer than two of a batch of 8 for each part"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_training(given, said):
    said_before = []
    with pytest.raises(UsageError, match=said) as caught:
        make(
            DeepEnsemble(members=1),
            architecture="tests._small:batchnorm",
            on_event=said_before.append,
            **given,
        )
    assert "\n" not in str(caught.value)
    assert not said_before


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (
            CyclicalSGMCMC(members=3),
            {"optimiser": "adamw"},
            "samples by SGD at one learning rate: leave out --optimiser",
        ),
        (
            CyclicalSGMCMC(members=3),
            {"parameter_groups": "tests.test_optimisers:halves"},
            "leave out --parameter-groups",
        ),
        (CyclicalSGMCMC(members=3), {"warmup": 1.9}, "--warmup 1.9 is longer than the 1.6 epochs of a cycle"),
        (Snapshots(members=2), {"warmup": 1.0}, "--warmup 1 leaves nothing of a cycle of 1 epochs"),
        (FGE(members=2), {"warmup": 1.8}, "--warmup 1.8 leaves nothing of the 1.6 epochs before the cycles"),
        (SWAG(members=2), {"warmup": 1.8}, "--warmup 1.8 leaves nothing of the 1.5 epochs before iterates"),
        (Simplex(), {"warmup": 0.5}, "--warmup 0.5 leaves nothing of a vertex's 0.5 epochs"),
    ],
    ids=str,
)
def test_what_a_method_cannot_do_is_refused(method, given, said):
    with pytest.raises(UsageError, match=said):
        make(method, **given)


def test_rates_follow_the_optimiser_and_the_highest_one():
    assert (settings().lr, settings().weight_decay, settings().momentum) == (0.1, 5e-4, 0.9)
    adamw = settings(optimiser="adamw")
    assert (adamw.lr, adamw.weight_decay, adamw.momentum) == (1e-3, 1e-2, None)
    assert settings(optimiser=betas, lr=0.1).weight_decay == 0
    for lr in (0.1, 1e-3):
        given = settings(lr=lr)
        fge = FGE().resolved(given)
        assert (fge.high, fge.low) == pytest.approx((lr / 2, lr / 200))
        assert SWAG().resolved(given).swa_lr == pytest.approx(lr / 5)
        assert Simplex().resolved(given).vertex_lr == lr
    assert FGE(high=0.5, low=0.1).resolved(adamw).high == 0.5


@pytest.mark.parametrize("optimiser", ["adamw", Counting, torch.optim.NAdam], ids=str)
def test_a_training_goes_on_from_its_state_to_the_same_bytes(optimiser):
    given, states = settings(optimiser=optimiser, lr=0.01), {}

    def note(iteration, state):
        states[iteration] = state()

    start = small(3).state_dict()

    def run(**options):
        module = small(3)
        module.load_state_dict(start)
        return trained(module, given, 7, **options)

    whole, rest = run(after_step=note), run(resume=states[3])
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


# --- decay of sampled weights ---


@pytest.mark.parametrize("name", ["sgd", "adamw", "torch.optim:Adam"])
def test_decay_of_one_sampled_vertex_is_the_optimisers_own_whatever_the_optimiser(name):
    """At ``c = [1]`` the sampled point is the vertex; groups differ in their decay and their rate."""
    given = settings(optimiser=name, lr=0.01, weight_decay=0.5, parameter_groups=halves)
    start, found = small(3).state_dict(), []
    for decay_sampled in (False, True):
        module = small(3)
        module.load_state_dict(start)
        weights = FlatWeights(module)
        plan = Plan(constant(0.01), 4, draw=lambda rng, count: torch.ones(count, 1), decay_sampled=decay_sampled)
        make_own = lambda moving: optimisers.make(given, weights, moving)  # noqa: B023, E731
        found.append(fit(weights, weights.vector[None].clone(), random_batches(2), plan, make_own).vertices)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_an_unknown_way_of_decaying_stays_the_optimisers_and_is_said(tmp_path):
    ends = [saved(make(DeepEnsemble(members=1), seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    said = []
    make(
        Curve(first=ends[0], second=ends[1], points=3),
        said=said,
        optimiser="torch.optim:RMSprop",
        weight_decay=0.1,
        epochs=1,
    )
    assert "the weight decay of RMSprop acts on the vertices, not on the points drawn" in said


# --- accumulation and warm-up ---


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("size", [8, 9, 13])
def test_parts_of_a_batch_are_the_batch(size, samples):
    """Without BatchNorm; also for several points a step, with an uneven batch."""
    found = []
    for accumulate in (1, 2, 3):
        weights = FlatWeights(build("tests._small:network", 3, seed=0))
        noise = torch.randn(3, len(weights), generator=torch.Generator().manual_seed(0))
        draw = lambda rng, count: torch.from_numpy(rng.dirichlet([1.0] * 3, count)).float()  # noqa: E731
        plan = Plan(constant(0.1), 6, trainable=[1, 2], draw=draw, samples=samples)
        vertices = weights.vector + 0.1 * noise
        batches = random_batches(2, size)
        found.append(fit(weights, vertices, batches, plan, accumulate=accumulate).vertices)
    for other in found[1:]:
        assert not torch.equal(other, found[0])
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)


def test_batchnorm_sees_parts_of_two_examples_at_least():
    seen = []
    module = build("tests._small:batchnorm", 3)
    module.body[1].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    weights = FlatWeights(module)
    batches = [*random_batches(1, 8), *random_batches(1, 3)]
    fit(weights, weights.vector[None].clone(), batches, Plan(constant(0.1), 2), accumulate=4)
    assert seen == [2, 2, 2, 2, 3]


def test_accumulation_counts_every_example_once():
    plain, parts = (make(DeepEnsemble(members=1), accumulate=n, clip=0.0) for n in (1, 4))
    assert plain.manifest.cost.example_passes == parts.manifest.cost.example_passes == 60
    torch.testing.assert_close(flat(parts), flat(plain), rtol=1e-3, atol=1e-4)
    assert plain.manifest.fingerprint != parts.manifest.fingerprint


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "piecewise"])
def test_warm_up_is_linear_to_the_schedule(schedule):
    from tests._training import trainer

    plain, warm = trainer(schedule=schedule, epochs=4), trainer(schedule=schedule, epochs=4, warmup=1.5)
    expected, found = plain.schedule(16), warm.schedule(16)
    assert [found(i) / expected(i) for i in range(1, 17)] == pytest.approx([i / 6 for i in range(1, 7)] + [1] * 10)


# --- held-out examples, early stopping ---


@pytest.mark.parametrize("network", ["noisy", "counting", "frozen"])
def test_measuring_held_out_examples_changes_nothing_of_the_training(network):
    """BatchNorm, dropout, a buffer that counts, and a layer that is frozen."""
    on, off = (
        make(FGE(members=2, cycle=1), architecture=f"tests._small:{network}", measure=m) for m in ("all", "none")
    )
    assert same(on, off)
    assert all(torch.equal(rows, off.buffers[name]) for name, rows in on.buffers.items())
    assert on.manifest.fingerprint == off.manifest.fingerprint
    assert all("held_out_loss" in line for line in on.history)
    assert not any("held_out_loss" in line for line in off.history)


def test_the_held_out_loss_is_that_of_the_network_after_the_epoch_and_its_cost_is_counted():
    run = make(DeepEnsemble(members=1), architecture="tests._small:batchnorm")
    data, last = dataset(), run.history[-1]
    assert last["held_out_loss"] == pytest.approx(run.manifest.metrics["validation"]["nll"], rel=1e-5)
    assert last["held_out_accuracy"] == pytest.approx(run.manifest.metrics["validation"]["accuracy"])
    assert run.manifest.cost.entries["solution 1"].forward_passes == 2 * len(data.validation)
    assert make(DeepEnsemble(members=1), measure="none").manifest.cost.forward_passes == 0


def test_a_curve_is_measured_in_its_middle(tmp_path):
    ends = [saved(make(DeepEnsemble(members=1), seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    run = make(Curve(first=ends[0], second=ends[1], members=3, points=3))
    middle = Ensemble(run).predict_members(dataset().validation.images)[1]
    loss = -middle.gather(1, dataset().validation.labels[:, None]).log().mean()
    assert run.history[-1]["held_out_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_early_stopping_keeps_the_best_weights_and_says_so():
    said, events = [], []
    given = {"lr": 1.0, "clip": 0.0, "epochs": 30, "schedule": "cosine"}
    run = make(DeepEnsemble(members=1), early_stopping=3, said=said, on_event=events.append, **given)
    losses = [line["held_out_loss"] for line in run.history]
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    assert len(losses) == best + 3 < 30, "or else nothing would be stopped"
    assert (
        f"solution 1: {best + 3} of 30 epochs; the lowest held-out loss, {min(losses):.4f}, was after epoch {best}"
        in (said[-1])
    )
    *_, (place, last) = ((i, event) for i, event in enumerate(events) if isinstance(event, EpochEnd))
    assert last.epochs == last.epoch.number == len(losses), "which ends its bar"
    assert not any(isinstance(event, Progress) for event in events[place:])
    assert run.manifest.metrics["validation"]["nll"] == pytest.approx(min(losses), rel=1e-5)
    assert run.manifest.cost.example_passes == 30 * len(losses)
    assert run.manifest.cost.forward_passes == 12 * len(losses)
    unmeasured = make(DeepEnsemble(members=1), early_stopping=3, measure="none", **given)
    assert same(run, unmeasured)


@pytest.mark.parametrize("method", [FGE(), Snapshots(), SWAG(), CyclicalSGMCMC()], ids=lambda method: method.name)
def test_cycles_do_not_stop_early(method):
    with pytest.raises(UsageError, match=f"^{method.command} trains no solution that could stop early: leave out"):
        make(method, early_stopping=2)


def test_a_given_solution_does_not_stop_early(tmp_path):
    start = saved(make(DeepEnsemble(members=1)), tmp_path / "start")
    with pytest.raises(UsageError, match="--early-stopping has no solution to stop where one is given"):
        make(Simplex(vertices=2), init=start, early_stopping=2)


# --- whole runs ---


def test_a_vision_transformer_is_trained_by_adamw_saved_and_evaluated(tmp_path):
    given = {"architecture": "tests.test_optimisers:vit", "optimiser": "adamw", "lr": 3e-3, "epochs": 12}
    run = make(Simplex(vertices=2, vertex_epochs=2, members=3), **given, warmup=1, accumulate=2)
    assert run.manifest.metrics["validation"]["accuracy"] > 0.9
    assert run.manifest.options["vertex_lr"] == 3e-3
    run.save(tmp_path / "run")
    manifest = Run.load(tmp_path / "run").manifest
    assert {**manifest.settings} == {**run.manifest.settings}
    assert (manifest.settings["optimiser"], manifest.settings["warmup"]) == ("adamw", 1)
    images = dataset().test.images
    assert Ensemble.load(tmp_path / "run").predict_proba(images).argmax(1).eq(dataset().test.labels).all()


def test_the_command_takes_them_and_a_run_is_made_again_by_its_own_settings(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--arch", "tests._small:batchnorm", "--image-size", 8, "--device", "cpu", *images, "--quiet"]
    options += ["--members", 1, "--epochs", 4, "--optimiser", "adamw", "--warmup", 1, "--accumulate", 2]
    options += ["--early-stopping", 1, "--parameter-groups", "tests.test_optimisers:halves", "--lr", 0.02]
    assert call("train-deep-ensemble", *options, "--out", "one").exit_code == 0
    again = call("train-deep-ensemble", "--config", "one", "--out", "two", "--quiet")
    assert again.exit_code == 0, again.output
    one, two = Run.load(tmp_path / "one"), Run.load(tmp_path / "two")
    assert same(one, two) and one.manifest.fingerprint == two.manifest.fingerprint
    refused = call("train-deep-ensemble", *options[:-2], "--optimiser", "sgdd", "--out", "three")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        "error: --optimiser must be sgd, adamw or package.module:Class, not 'sgdd'"
    )
