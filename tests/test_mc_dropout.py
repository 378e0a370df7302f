"""MC dropout: fixed masks as members, against a forward pass by hand, and against dropout that is drawn each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.networks import architectures
from ensembler.networks.dropout import FixedDropout, draw_masks, fix_masks, mask_shapes
from ensembler.run import Run
from ensembler.serve import Runtime, export_run
from ensembler.trainers import FGE, DeepEnsemble, MCDropout, combine
from ensembler.trainers.training import collapse_run
from tests._small import dataset
from tests._training import call, make, same, saved

DROPOUT = "tests.test_mc_dropout:both"
MASKS = "mc_dropout_mask"
LAYERS = {
    nn.Dropout: (4, 3, 3),
    nn.AlphaDropout: (4, 3, 3),
    nn.Dropout2d: (4, 1, 1),
    nn.FeatureAlphaDropout: (4, 1, 1),
}


def both(num_classes: int) -> nn.Module:
    """Channel dropout after a convolution with BatchNorm, and unit dropout before the head."""
    body = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout2d(0.25), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(36, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, num_classes))


@pytest.fixture(scope="module")
def run() -> Run:
    return make(MCDropout(members=5), architecture=DROPOUT)


def by_hand(run: Run, member: int, x: torch.Tensor) -> torch.Tensor:
    """The logits of a member: every layer written out."""
    w = {name: rows[0] for name, rows in run.vertices.items()}
    b = {name: rows[member] for name, rows in run.buffers.items()}
    x = functional.conv2d(x, w["0.weight"], w["0.bias"], stride=2)
    x = functional.batch_norm(x, b["1.running_mean"], b["1.running_var"], w["1.weight"], w["1.bias"])
    x = torch.where(b[f"3.{MASKS}"], x.tanh() / 0.75, 0).flatten(1)
    x = functional.linear(x, w["5.weight"], w["5.bias"]).relu()
    return functional.linear(torch.where(b[f"7.{MASKS}"], x / 0.5, 0), w["8.weight"], w["8.bias"])


def test_members_are_a_forward_pass_by_hand_with_their_masks(run):
    images = dataset().test.images
    record = run.manifest.dataset
    found = Ensemble(run, "cpu").predict_outputs(images)
    for member in range(5):
        expected = by_hand(run, member, normalise(images, record.mean, record.std))
        torch.testing.assert_close(found[member], expected, rtol=1e-5, atol=1e-5)
    assert run.buffers[f"3.{MASKS}"].shape == (5, 4, 1, 1)
    assert run.buffers[f"7.{MASKS}"].shape == (5, 8)
    assert len({tuple(row.tolist()) for row in run.buffers[f"7.{MASKS}"]}) == 5
    assert run.manifest.members == 5
    assert run.manifest.vertices == 1


def test_the_network_is_the_single_network_and_masks_depend_on_seed_and_member_alone(run):
    single = make(DeepEnsemble(members=1), architecture=DROPOUT)
    assert same(run, single)
    assert run.manifest.cost.example_passes == single.manifest.cost.example_passes
    fewer = make(MCDropout(members=2), architecture=DROPOUT)
    masks = f"7.{MASKS}"
    assert torch.equal(fewer.buffers[masks], run.buffers[masks][:2])
    other = make(MCDropout(members=5), architecture=DROPOUT, seed=1)
    assert not torch.equal(other.buffers[masks], run.buffers[masks])


def test_the_mean_over_masks_is_the_mean_of_dropout_drawn_for_each_image():
    torch.manual_seed(0)
    network, x = both(3).eval(), torch.randn(4, 3, 8, 8)
    expected = torch.zeros(4, 3)
    with torch.no_grad():
        network[8].weight *= 8
        for layer in (network[3], network[7]):
            layer.train()
        for _ in range(4000):
            expected += network(x).softmax(1) / 4000
        network.eval()
        without = network(x).softmax(1)
        masks = draw_masks(network, mask_shapes("both", network, x), 4000, seed=0)
        fix_masks(network, masks)
        mean = torch.zeros(4, 3)
        for member in range(4000):
            network.load_state_dict({name: rows[member] for name, rows in masks.items()}, strict=False)
            mean += network(x).softmax(1) / 4000
    assert (mean - expected).abs().max() < 0.025  # about three standard errors of both
    assert (without - expected).abs().max() > 0.05  # so that the bound tells them apart


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_every_kind_of_dropout_is_pytorchs_own_with_that_mask(layer, p):
    """One image repeated: its outputs in training mode show the masks that PyTorch drew."""
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), layer(p), nn.Conv2d(4, 2, 3)).eval()
    assert mask_shapes("net", network, torch.randn(2, 3, 8, 8)) == {"1": LAYERS[layer]}
    x = torch.rand(1, 4, 3, 3) + 0.5
    drawn = layer(p).train()(x)
    fixed = FixedDropout(layer(p), LAYERS[layer], torch.device("cpu"))
    kept = (drawn[0] != drawn.min()) & (p < 1)
    getattr(fixed, MASKS).copy_(kept.float().amax(dim=(1, 2), keepdim=True) if LAYERS[layer][1] == 1 else kept.float())
    torch.testing.assert_close(fixed(x), drawn)


def test_masks_act_within_a_transformer():
    """Its fast path would leave out whatever takes the place of a dropout layer."""
    run = make(MCDropout(members=3), architecture="tests._networks:booleans", epochs=0.5)
    found = Ensemble(run, "cpu").predict_outputs(dataset().test.images)
    assert {"body.layers.0.dropout1.mc_dropout_mask", "body.layers.0.dropout.mc_dropout_mask"} < run.buffers.keys()
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_what_has_no_dropout_or_none_that_can_be_fixed_is_refused_before_training(tmp_path):
    out = tmp_path / "run"
    command = ["train-mc-dropout", "--dataset", "digits", "--epochs", "0.1", "--device", "cpu", "--out", out, "--arch"]
    result = call(*command, "cnn")
    assert result.exit_code == 1
    assert "cnn has no dropout that it uses (an nn.Dropout layer with p > 0)" in result.stderr
    assert not list(tmp_path.iterdir())
    for name, said in {
        "functional_dropout": "draws random numbers in its layer 'body.1' that are no nn.Dropout layer's",
        "drops_a_layer": "draws random numbers in its forward that are no nn.Dropout layer's",
        "twice": "calls its dropout layer 'drop' 2 times in one pass",
        "only_in_training": "calls its dropout layer 'drop' in training mode otherwise than in evaluation",
        "tokens_first": r"gives its dropout layer 'drop', Dropout, a tensor \(36, 2\) for 2 images, expected",
        "no_channels": r"'drop', Dropout1d, a tensor \(2, 36\) for 2 images, expected .*, then channels",
        "unused": "has no dropout that it uses",
        "never": "has no dropout that it uses",
    }.items():
        with pytest.raises(UsageError, match=said):
            make(MCDropout(members=2), architecture=f"tests.test_mc_dropout:{name}")


class Dropping(nn.Module):
    """A linear classifier that uses its dropout layer in one way or another."""

    def __init__(self, num_classes: int, use: str, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), Functional(0.2 * (use == "functional")), nn.Flatten())
        self.drop, self.head, self.use = layer or nn.Dropout(0.5), nn.Linear(36, num_classes), use

    def forward(self, x):
        x = self.body(x)
        if self.use == "twice":
            x = self.drop(self.drop(x))
        elif self.use == "tokens_first":
            x = self.drop(x.T).T
        elif self.use == "only_in_training":
            x = self.drop(x) if self.training else x
        elif self.use != "unused":
            x = self.drop(x)
        return self.head(x)


class Functional(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x):
        return functional.dropout(x, self.p, self.training) if self.p else x


def functional_dropout(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "functional")


def drops_a_layer(num_classes: int) -> nn.Module:
    from tests._small import DroppingALayer

    return DroppingALayer(num_classes)


def twice(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "twice")


def only_in_training(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "only_in_training")


def tokens_first(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "tokens_first")


def no_channels(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "as it is", nn.Dropout1d(0.5))


def unused(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "unused")


def never(num_classes: int) -> nn.Module:
    return Dropping(num_classes, "as it is", nn.Dropout(0.0))


def test_a_run_is_kept_combined_and_started_from(run, tmp_path):
    one = Run.load(saved(run, tmp_path / "one"))
    images = dataset().test.images
    expected = Ensemble(run, "cpu").predict_members(images)
    assert torch.equal(Ensemble(one, "cpu").predict_members(images), expected)
    # From its solution: other masks of the same network, at no further cost.
    again = make(MCDropout(members=3), architecture=DROPOUT, init=str(tmp_path / "one"), seed=3)
    assert same(again, run)
    assert again.manifest.cost.example_passes == run.manifest.cost.example_passes
    # With another run of masks, one network; with a run without masks, another network.
    assert combine({"one": one, "again": again}, dataset(), "cpu").parts == ()
    single = make(DeepEnsemble(members=1), architecture=DROPOUT, seed=5)
    both_kinds = combine({"single": single, "one": one}, dataset(), "cpu")
    assert len(both_kinds.parts) == 2
    found = Ensemble(Run.load(saved(both_kinds, tmp_path / "both")), "cpu").predict_members(images)
    assert torch.equal(found, torch.cat([Ensemble(single, "cpu").predict_members(images), expected]))
    # Other methods go on from it as from any solution, without masks.
    fge = make(FGE(members=2, cycle=0.5), architecture=DROPOUT, init=str(tmp_path / "one"))
    assert not any(MASKS in name for name in fge.buffers)


def test_collapsed_it_is_the_network_without_dropout(run):
    images, record = dataset().test.images, run.manifest.dataset
    network = architectures.build(DROPOUT, 3).eval()
    state = {name: rows[0] for name, rows in (dict(run.vertices) | dict(run.buffers)).items() if MASKS not in name}
    network.load_state_dict(state)
    with torch.no_grad():
        expected = network(normalise(images, record.mean, record.std))
    found = Ensemble(collapse_run(run, dataset(), "cpu"), "cpu").predict_outputs(images)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("layout", ["vertices", "members"])
def test_exported_members_answer_as_in_pytorch(run, tmp_path: Path, layout):
    saved(run, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "bundle", layout=layout)
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    expected = Ensemble(run, "cpu").predict_members(images).numpy()
    np.testing.assert_allclose(Runtime.load(tmp_path / "bundle").predict_members(images), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
