"""The networks of the papers: their published sizes, their forward passes by hand, and the names that are refused."""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from ensembler.errors import UsageError
from ensembler.networks.architectures import build, preresnet
from ensembler.weights import FlatWeights

OWN = (
    *("cnn", "resnet20", "preresnet20", "preresnet56", "preresnet110", "preresnet164"),
    *("vgg16", "vgg16bn", "wrn28x10"),
)


def on_paper(name, classes=10):
    """The network without memory for its weights: enough to count and to see shapes."""
    with torch.device("meta"):
        return build(name, classes).eval()


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # osmr/imgclsmob, pytorch/README.md, "CIFAR-10": PreResNet-20, -56, -110, -164(BN) and WRN-28-10. To the
        # precision of Zagoruyko & Komodakis 2016, Table 5: 110 layers 1.7M, 164 layers 1.7M, WRN-28-10 36.5M.
        ("preresnet20", 272_282),
        ("preresnet56", 855_578),
        ("preresnet110", 1_730_522),
        ("preresnet164", 1_703_258),
        ("wrn28x10", 36_479_194),
        # Keras says 14,714,688 of VGG16(include_top=False); the head is 512-512-512-10. With BatchNorm torchvision
        # publishes 138,365,992 in place of 138,357,544.
        ("vgg16", 14_714_688 + 2 * (512 * 512 + 512) + (512 * 10 + 10)),
        ("vgg16bn", 15_245_130 + 138_365_992 - 138_357_544),
    ],
)
def test_sizes_are_the_published_ones(name, parameters):
    assert size(on_paper(name)) == parameters


@pytest.mark.parametrize(
    ("name", "depth"), [("preresnet20", 20), ("preresnet56", 56), ("preresnet110", 110), ("preresnet164", 164)]
)
def test_depth_counts_convolutions_and_the_head_but_no_shortcuts(name, depth):
    layers = [n for n, m in on_paper(name).named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len([n for n in layers if not n.endswith("shortcut")]) == depth


def test_depth_of_a_wide_resnet_counts_convolutions_with_shortcuts():
    assert sum(isinstance(m, nn.Conv2d) for m in on_paper("wrn28x10").modules()) == 28


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("pixels", [32, 64])
def test_any_size_from_32_up(name, pixels):
    assert on_paper(name, 7)(torch.empty(2, 3, pixels, pixels, device="meta")).shape == (2, 7)


def by_hand(w, x, blocks, convolutions):
    """Zagoruyko & Komodakis's own pass (pytorch/resnet.py), with as many convolutions in a block as asked for."""

    def normalised(x, name):
        return F.relu(F.batch_norm(x, None, None, w[f"{name}.weight"], w[f"{name}.bias"], training=True))

    x = F.conv2d(x, w["0.weight"], padding=1)
    for index in range(1, 3 * blocks + 1):
        stride = 2 if index in (blocks + 1, 2 * blocks + 1) else 1
        activated = normalised(x, f"{index}.bn1")
        y = activated
        for n in range(1, convolutions + 1):
            weight = w[f"{index}.conv{n}.weight"]
            if n > 1:
                y = normalised(y, f"{index}.bn{n}")
            y = F.conv2d(y, weight, stride=stride if n == 1 else 1, padding=weight.shape[-1] // 2)
        if f"{index}.shortcut.weight" in w:
            x = F.conv2d(activated, w[f"{index}.shortcut.weight"], stride=stride)
        x = x + y
    x = normalised(x, str(3 * blocks + 1)).mean((2, 3))
    return x @ w[f"{3 * blocks + 5}.weight"].T + w[f"{3 * blocks + 5}.bias"]


@pytest.mark.parametrize(
    ("options", "convolutions", "kernels"),
    [
        ({"blocks": 2}, 2, [3, 3]),
        ({"blocks": 1, "width": 40}, 2, [3, 3]),
        ({"blocks": 2, "width": 64, "bottleneck": True}, 3, [1, 3, 1]),
    ],
)
def test_a_forward_pass_by_hand(options, convolutions, kernels):
    torch.manual_seed(0)
    network = preresnet(5, **options)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
        x = torch.randn(4, 3, 32, 32)
        weights = dict(network.named_parameters())
        assert [weights[f"1.conv{n}.weight"].shape[-1] for n in range(1, convolutions + 1)] == kernels
        expected = by_hand(weights, x, options["blocks"], convolutions)
        torch.testing.assert_close(network.train()(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "preresnet20"])
def test_resnet20_is_what_it_was(name):
    """Runs on disk have these names and shapes; the values were noted before the builder took other depths."""
    state = build(name, 10, seed=0).state_dict()
    layout = repr([(key, tuple(tensor.shape)) for key, tensor in state.items()])
    assert hashlib.sha256(layout.encode()).hexdigest().startswith("103ad4a395676092e9c87d6d47df4ab5")
    for key, start, norm in (
        ("0.weight", [0.33498088, -0.23582518, -0.29585928], 5.4565096),
        ("4.shortcut.weight", [-0.51061559, -0.35855365, -0.12314745], 8.1346350),
        ("9.conv2.weight", [-0.036990758, -0.038418442, 0.046337966], 11.339030),
        ("14.weight", [-0.13146850, -0.13720314, 0.014042303], 2.5596321),
    ):
        torch.testing.assert_close(state[key].flatten()[:3], torch.tensor(start), rtol=1e-4, atol=1e-6)
        assert state[key].norm().item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", ["preresnet164", "cnn"])
def test_initial_weights_are_a_function_of_the_seed(name):
    torch.manual_seed(1)
    one = FlatWeights(build(name, 10, seed=3))
    following = torch.rand(3)
    assert len(one) == size(on_paper(name))
    torch.manual_seed(1)
    assert torch.equal(following, torch.rand(3))  # building drew nothing from the global generator
    network = build(name, 10, seed=3)
    assert torch.equal(one.vector, FlatWeights(network).vector)
    assert not torch.equal(one.vector, FlatWeights(build(name, 10, seed=4)).vector)
    convolution = next(p for p in network.parameters() if p.dim() == 4)
    assert convolution.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["preresnet164", "vgg16bn"])
def test_flat_weights_train_it(name):
    weights = FlatWeights(build(name, 10))
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    loss = F.cross_entropy(weights.module.train()(x), y)
    loss.backward()
    assert torch.isfinite(weights.grad).all()
    assert all(torch.any(p.grad != 0) for p in weights.module.parameters() if p.dim() > 1)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError) as caught:
        build("resnet", 10)
    known = f"use {', '.join(OWN)}, torchvision:NAME, timm:NAME or package.module:factory"
    assert str(caught.value) == f"unknown architecture 'resnet': {known}"


def test_torchvision_unknown():
    with pytest.raises(UsageError, match=r"^torchvision has no classifier 'fcn_resnet50': see torchvision\.models"):
        build("torchvision:fcn_resnet50", 10)  # it has that, but it is no classifier


def test_timm_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"^timm:convnext_tiny needs timm: pip install timm$"):
        build("timm:convnext_tiny", 10)


def test_timm_present(monkeypatch):
    calls = []

    def create_model(name, **options):
        calls.append((name, options))
        if name.endswith(".wrong"):
            raise RuntimeError("Invalid pretrained tag (wrong) for small.\nMore of it.")
        return nn.Conv2d(3, options["num_classes"], 3)

    known = SimpleNamespace(is_model=lambda name: name.startswith("small"), create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", known)
    network = build("timm:small", 4)
    assert network.weight.shape == (4, 3, 3, 3)
    assert network.weight.is_contiguous(memory_format=torch.channels_last)
    assert calls == [("small", {"num_classes": 4})]  # timm's pretrained is False unless asked for
    with pytest.raises(UsageError, match=r"^timm has no model 'large': see timm\.list_models\(\)$"):
        build("timm:large", 4)
    with pytest.raises(
        UsageError, match=r"^timm cannot build 'small\.wrong': Invalid pretrained tag \(wrong\) for small"
    ):
        build("timm:small.wrong", 4)
