"""Weights from elsewhere: every usual form is read, none that could run code, and they fit a network or are refused."""

from __future__ import annotations

import io
import os
import random
import re
import sys
import urllib.error
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models

from ensembler import pretrained
from ensembler.architectures import build
from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, ShapeError, UsageError
from ensembler.weights import FlatWeights


class Makes:
    """Leaves a file or folder behind when it is unpickled."""

    def __init__(self, path: Path, how=Path.touch) -> None:
        self.path, self.how = path, how

    def __reduce__(self):
        return self.how, (self.path.as_posix() if self.how is os.mkdir else self.path,)


class Small(nn.Module):
    def __init__(self, classes=3, width=4) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)  # made first: it is the last linear layer all the same
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.head(self.bn(self.conv(x)).mean((2, 3)))


def noted(seed=0, **options):
    torch.manual_seed(seed)
    network = Small(**options)
    network(torch.randn(5, 3, 8, 8))  # moves the BatchNorm statistics
    return network


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


STATE = noted().state_dict()


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        dict(STATE),
        {"epoch": 3, "state_dict": STATE, "optimizer": {"lr": 0.1}},
        {"epoch": 3, "model_state": STATE, "optimizer_state": {}},  # timgaripov/dnn-mode-connectivity
        {"model_state_dict": STATE},
        {"model": {"state_dict": STATE}, "model_ema": {}, "args": None},
        {"state_dict": {"net": {"model": STATE}}},
        {"net": STATE, "acc": 95.1, "epoch": 3},  # kuangliu/pytorch-cifar
        {f"module.{name}": tensor for name, tensor in STATE.items()},
        {f"_orig_mod.module.{name}": tensor for name, tensor in STATE.items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()},
        nn.DataParallel(noted()).state_dict(),
        AveragedModel(noted()).state_dict(),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_what_pytorch_saved(tmp_path, content, zipped):
    path = tmp_path / "weights.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(pretrained.read(path), STATE)


def test_read_safetensors(tmp_path):
    for name in ("weights.safetensors", "WEIGHTS.SAFETENSORS"):
        save_file({f"module.{key}": tensor for key, tensor in STATE.items()}, tmp_path / name)
        assert same(pretrained.read(tmp_path / name), STATE)


def test_names_that_only_begin_like_a_wrapper_s_stay(tmp_path):
    content = {"module.weight": torch.ones(2), "modules.bias": torch.ones(2), "n_averaged": torch.tensor(3)}
    torch.save(content, tmp_path / "weights.pt")
    assert same(pretrained.read(tmp_path / "weights.pt"), content)


DAMAGED = "FILE is damaged, or not a file of weights: copy or download it again"


def refusal(path):
    with pytest.raises(ArtefactError) as caught:
        pretrained.read(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, and no colours"
    assert message.count(str(path)) == 1
    return type(caught.value), message.replace(str(path), "FILE")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_refused_where_there_is_no_file_of_weights(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    assert refusal(path) == (ArtefactError, "no weights at FILE: there is no such file")
    path.mkdir()
    assert refusal(path) == (ArtefactError, "FILE is a folder: name the file of weights in it")
    path.rmdir()
    for content in (b"", b"<!doctype html><title>404</title>", b"hello\nworld", bytes(range(256))):
        path.write_bytes(content)
        assert refusal(path) == (CorruptError, DAMAGED)


@pytest.mark.parametrize(("suffix", "zipped"), [(".pt", True), (".pt", False), (".safetensors", None)])
def test_refused_when_truncated_or_changed(tmp_path, suffix, zipped):
    path = tmp_path / f"weights{suffix}"
    if zipped is None:
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        kind, message = refusal(path)
        cut = zipped is False and message.startswith("FILE holds more than tensors (")  # in the middle of a known name
        assert cut or (kind, message) == (CorruptError, DAMAGED)
    chance = random.Random(0)
    for _ in range(150):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 5)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        path.write_bytes(changed)
        try:
            pretrained.read(path)  # PyTorch does not notice every change
        except EnsemblerError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_named_and_not_run(tmp_path, zipped):
    path, ran = tmp_path / "weights.pt", tmp_path / "ran"
    for held, name in ((Makes(ran), "getattr"), (Makes(ran, os.mkdir), "mkdir"), (noted(), "Small")):
        torch.save({"state_dict": STATE, "extra": held}, path, _use_new_zipfile_serialization=zipped)
        kind, message = refusal(path)
        assert kind is ArtefactError
        assert re.fullmatch(
            rf"FILE holds more than tensors \(([\w.]+\.)?{name}\), and reading that could run code: "
            r"save only the state dict, torch\.save\(network\.state_dict\(\), FILE\)",
            message,
        )
    assert not ran.exists()


def test_a_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.jit.ScriptModule().save(path)
    assert refusal(path)[1].startswith("FILE holds more than tensors (TorchScript), and reading that could run code: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "FILE holds a Tensor, not weights by name: save the network's state_dict()"),
        ([torch.zeros(3)], "FILE holds a list, not weights by name: save the network's state_dict()"),
        ({}, "FILE holds no weights (nothing): save the network's state_dict()"),
        ({"state_dict": {}}, "FILE holds no weights (nothing): save the network's state_dict()"),
        ({"epoch": 3, "acc": 0.9}, "FILE holds no weights ('epoch', 'acc'): save the network's state_dict()"),
        (
            {"w": torch.zeros(3), "epoch": 3},
            "FILE holds more than weights (a int as 'epoch'): save the network's state_dict()",
        ),
        ({3: torch.zeros(3)}, "FILE holds more than weights (a Tensor as 3): save the network's state_dict()"),
    ],
)
def test_refused_when_it_is_no_state_dict(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert refusal(path) == (ArtefactError, message)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    with pytest.raises(ArtefactError, match=r"^cannot read .*weights\.pt: Permission denied$"):
        pretrained.read(tmp_path / "weights.pt")


def test_fits_whole():
    network = Small()
    assert pretrained.fit(network, STATE) == []
    assert same(network.state_dict(), STATE)


@pytest.mark.parametrize("name", ["cnn", "preresnet20"])
def test_fits_in_place_whatever_the_memory_order(name):
    weights = FlatWeights(build(name, 3, seed=0))
    vector = weights.vector
    given = {key: tensor.contiguous() for key, tensor in build(name, 3, seed=1).state_dict().items()}
    assert pretrained.fit(weights.module, given) == []
    assert same(weights.module.state_dict(), given)
    assert weights.vector is vector
    assert torch.equal(vector, FlatWeights(build(name, 3, seed=1)).vector)


def test_another_number_of_classes_keeps_the_head():
    network = Small(classes=5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert pretrained.fit(network, STATE) == ["head.weight", "head.bias"]
    expected = {name: before[name] if name.startswith("head.") else STATE[name] for name in before}
    assert same(network.state_dict(), expected)


def test_a_missing_head_is_kept():
    network = Small()
    before = network.head.weight.clone()
    assert pretrained.fit(network, {n: t for n, t in STATE.items() if "head" not in n}) == ["head.weight", "head.bias"]
    assert torch.equal(network.head.weight, before)
    assert torch.equal(network.conv.weight, STATE["conv.weight"])


def test_checkpoints_older_than_num_batches_tracked_fit():
    network = Small()
    assert pretrained.fit(network, {n: t for n, t in STATE.items() if n != "bn.num_batches_tracked"}) == []
    assert torch.equal(network.bn.running_mean, STATE["bn.running_mean"])
    assert network.bn.num_batches_tracked == 0


def test_half_precision_fits():
    network = Small()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    assert pretrained.fit(network, half) == []
    assert network.conv.weight.dtype == torch.float32
    torch.testing.assert_close(network.conv.weight.detach(), STATE["conv.weight"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv.weight": torch.ones(9)}, "tensor 'conv.weight': expected float32 (4, 3, 3, 3), found float32 (9,)"),
        ({"head.weight": torch.zeros(3, 9)}, "tensor 'head.weight': expected float32 (3, 4), found float32 (3, 9)"),
        ({"bn.weight": torch.zeros(4, dtype=torch.int8)}, "tensor 'bn.weight': expected float32 (4,), found int8 (4,)"),
        ({"conv.bias": None}, "no weights for tensor 'conv.bias', of float32 (4,)"),
        ({"head.bias": None}, "no weights for tensor 'head.bias', of float32 (3,)"),
        ({"bn.running_var": None}, "no weights for tensor 'bn.running_var', of float32 (4,)"),
        ({"extra": torch.zeros(2)}, "the network has no tensor 'extra', of float32 (2,)"),
    ],
)  # fmt: skip
def test_anything_else_is_named_and_nothing_is_written(changed, message):
    network = Small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    given = {name: tensor for name, tensor in {**STATE, **changed}.items() if tensor is not None}
    with pytest.raises(ShapeError) as caught:
        pretrained.fit(network, given)
    assert str(caught.value) == f"{message}: these weights are another architecture's"
    assert same(network.state_dict(), before)


def test_a_wider_network_s_weights_are_refused():
    """One of its layers differs in its outputs alone, as a head would; what follows that layer gives it away."""
    with pytest.raises(ShapeError, match=r"^tensor '.*': expected .*, found .*: these weights are another"):
        pretrained.fit(Small(), noted(width=6).state_dict())
    with pytest.raises(ShapeError, match=r"another architecture's$"):
        pretrained.fit(Small(), build("cnn", 3).state_dict())


@pytest.mark.parametrize(
    "name",
    [
        *("alexnet", "densenet121", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5"),
        *("squeezenet1_1", "convnext_tiny", "vit_b_32"),
    ],
)
def test_heads_of_torchvision(name):
    def made(classes):
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            return build(f"torchvision:{name}", classes)

    given, network = made(1000).state_dict(), made(7)
    differing = [key for key, tensor in network.state_dict().items() if tensor.shape != given[key].shape]
    assert len(differing) == 2
    assert pretrained.fit(network, given) == differing
    assert pretrained.fit(network, {key: given[key] for key in given if key not in differing}) == differing


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch.hub's, and a network that is down."""

    def down(request):
        raise urllib.error.URLError(OSError(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", down)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


URL = models.ShuffleNet_V2_X0_5_Weights.IMAGENET1K_V1.url
SHUFFLENET = "torchvision:shufflenet_v2_x0_5"


def test_published_weights_from_the_cache(hub):
    published = build(SHUFFLENET, 1000, seed=5).state_dict()
    torch.save(published, hub / Path(URL).name)
    torch.manual_seed(0)
    following = torch.rand(3)
    torch.manual_seed(0)
    for weights in ("DEFAULT", "IMAGENET1K_V1"):
        state = pretrained.pretrained(SHUFFLENET, weights)
        assert same(state, published)
    assert torch.equal(torch.rand(3), following)
    network = build(SHUFFLENET, 7)
    assert pretrained.fit(network, state) == ["fc.weight", "fc.bias"]
    assert torch.equal(network.conv1[0].weight, published["conv1.0.weight"])


def test_published_files_with_older_names(hub):
    """DenseNet's are of 2017: ``norm.1`` for what is ``norm1`` today, and no ``num_batches_tracked``."""
    published = build("torchvision:densenet121", 1000).state_dict()
    older = {}
    for name, tensor in published.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            if "denselayer" in name:
                name = name.replace(f".{part}.", f".{part[:4]}.{part[4]}.")  # noqa: PLW2901
        if not name.endswith("num_batches_tracked"):
            older[name] = tensor
    assert older.keys() != published.keys()
    torch.save(older, hub / Path(models.DenseNet121_Weights.DEFAULT.url).name)
    assert same(pretrained.pretrained("torchvision:densenet121"), published)


def test_published_weights_without_a_network(hub):
    with pytest.raises(ArtefactError) as caught:
        pretrained.pretrained(SHUFFLENET)
    where = hub / "shufflenetv2_x0.5-f707e7126e.pth"
    assert str(caught.value) == (
        f"cannot fetch {URL} ([Errno -3] Temporary failure in name resolution): put that file at {where}"
    )


class Response(io.BytesIO):
    def info(self):
        return Message()


def test_a_download_that_is_not_the_published_file(hub, monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(b"<html>"))
    with pytest.raises(CorruptError, match=r"^.*\.pth is damaged \(invalid hash value .*\): remove it, then https://"):
        pretrained.pretrained(SHUFFLENET)
    assert not list(hub.iterdir())


def test_a_cached_file_is_damaged_or_holds_objects_that_are_not_run(hub, tmp_path):
    file = hub / Path(URL).name
    file.write_bytes(b"half a file")
    with pytest.raises(CorruptError, match=r"^.*\.pth is damaged \(.*\): remove it, then https://.* is fetched again$"):
        pretrained.pretrained(SHUFFLENET)
    torch.save({"weight": Makes(tmp_path / "ran")}, file)
    with pytest.raises(CorruptError, match=r"is damaged \(Weights only load failed\)"):
        pretrained.pretrained(SHUFFLENET)
    assert not (tmp_path / "ran").exists()


def test_no_such_published_weights(hub):
    for architecture, weights, message in (
        (
            "resnet20",
            "DEFAULT",
            "resnet20 has no published weights: use torchvision:NAME, timm:NAME or a file of",
        ),
        ("a.module:make", "DEFAULT", "a.module:make has no published weights: use torchvision:NAME"),
        (SHUFFLENET, "V9", "torchvision has no weights 'V9' of shufflenet_v2_x0_5: use IMAGENET1K_V1 or DEFAULT"),
        ("torchvision:nothing", "DEFAULT", "torchvision has no network 'nothing': see torchvision.models.list_models"),
        ("torchvision:fcn_resnet50", "DEFAULT", "torchvision has no classifier 'fcn_resnet50': see"),
        ("timm:small", "V9", "timm:small has no weights 'V9': use DEFAULT, or timm:NAME.TAG for others"),
    ):
        with pytest.raises(UsageError) as caught:
            pretrained.pretrained(architecture, weights)
        assert str(caught.value).startswith(message)


def test_timm_weights(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"^timm:small needs timm: pip install timm$"):
        pretrained.pretrained("timm:small")

    def create_model(name, pretrained=False):
        if name == "offline":
            raise FileNotFoundError("We cannot find it. Check your connection.")
        network = noted(seed=3)
        return network if pretrained else network.requires_grad_(False).zero_()

    timm = SimpleNamespace(
        is_model=lambda name: True,
        is_model_pretrained=lambda name: name != "untrained",
        create_model=create_model,
        get_pretrained_cfg=lambda name: SimpleNamespace(hf_hub_id=f"timm/{name}.a1", url=None),
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert same(pretrained.pretrained("timm:small"), noted(seed=3).state_dict())
    with pytest.raises(UsageError, match=r"^timm has no weights of 'untrained': see timm\.list_pretrained\(\)$"):
        pretrained.pretrained("timm:untrained")
    with pytest.raises(ArtefactError) as caught:
        pretrained.pretrained("timm:offline")
    assert str(caught.value) == (
        "cannot fetch https://huggingface.co/timm/offline.a1 (We cannot find it): "
        "fetch it on a machine with a network, and copy that machine's cache (HF_HOME, TORCH_HOME) here"
    )
