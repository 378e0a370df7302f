"""Checkpoints from elsewhere: every usual form is read, none that could run code; they fit a network or are refused."""

from __future__ import annotations

import os
import random
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ensembler.errors import ArtefactError, CorruptError, EnsemblerError, ShapeError
from ensembler.networks import checkpoints, matching
from ensembler.networks.architectures import build
from ensembler.networks.checkpoints import Checkpoint
from ensembler.weights import FlatWeights
from tests._checkpoints import Makes, Small, noted, same

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
    network = Small()
    assert matching.load(network, checkpoints.read(path)).fresh == []
    assert same(network.state_dict(), STATE)


def test_read_safetensors(tmp_path):
    for name in ("weights.safetensors", "WEIGHTS.SAFETENSORS", "weights.pt", "pytorch_model.bin"):
        save_file({f"module.{key}": tensor for key, tensor in STATE.items()}, tmp_path / name)
        network = Small()
        matching.load(network, checkpoints.read(tmp_path / name))
        assert same(network.state_dict(), STATE)


def test_a_file_of_pytorch_may_be_called_safetensors(tmp_path):
    torch.save(STATE, tmp_path / "weights.safetensors")
    network = Small()
    matching.load(network, checkpoints.read(tmp_path / "weights.safetensors"))
    assert same(network.state_dict(), STATE)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00002.safetensors"])
def test_one_of_several_files_is_refused(tmp_path, name):
    save_file(STATE, tmp_path / name)
    kind, message = refusal(tmp_path / name)
    assert kind is ArtefactError
    assert message.startswith("FILE is one of several files that hold the weights of one network: load them with what ")


def test_a_large_file_cut_short_is_damaged(tmp_path):
    """PyTorch says of it: Invalid argument."""
    torch.save({str(number): torch.zeros(300) for number in range(40)}, tmp_path / "whole.pt")
    path = tmp_path / "weights.pt"
    path.write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    assert refusal(path) == (CorruptError, DAMAGED)


DAMAGED = "FILE is damaged, or not a file of weights: copy or download it again"


def refusal(path):
    with pytest.raises(ArtefactError) as caught:
        checkpoints.read(path)
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
            checkpoints.read(path)  # PyTorch does not notice every change
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
            r"save only the state dict, torch\.save\(network\.state_dict\(\), FILE\), or where you trust it, "
            r"torch\.save\(torch\.load\(FILE, weights_only=False\)\[KEY\], NEW\)",
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
        ({}, "FILE holds no weights by name (nothing): save the network's state_dict()"),
        ({"state_dict": {}}, "FILE holds no weights by name ('state_dict'): save the network's state_dict()"),
        ({"epoch": 3, "acc": 0.9}, "FILE holds no weights by name ('epoch', 'acc'): save the network's state_dict()"),
        ({3: torch.zeros(3)}, "FILE holds no weights by name (3): save the network's state_dict()"),
    ],
)
def test_refused_when_it_is_no_state_dict(tmp_path, content, message):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    assert refusal(path) == (ArtefactError, message)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoints.Path, "open", denied)
    with pytest.raises(ArtefactError, match=r"^cannot read .*weights\.pt: Permission denied$"):
        checkpoints.read(tmp_path / "weights.pt")


def checkpoint(*states, **nested):
    return Checkpoint("FILE", {"": states[0]} if states else nested)


def load(network, state):
    return matching.load(network, checkpoint(state))


def test_fits_whole():
    network = Small()
    found = load(network, STATE)
    assert (found.fresh, found.said) == ([], "")
    assert same(network.state_dict(), STATE)


@pytest.mark.parametrize("name", ["cnn", "preresnet20"])
def test_fits_in_place_whatever_the_memory_order(name):
    weights = FlatWeights(build(name, 3, seed=0))
    vector = weights.vector
    given = {key: tensor.contiguous() for key, tensor in build(name, 3, seed=1).state_dict().items()}
    assert load(weights.module, given).fresh == []
    assert same(weights.module.state_dict(), given)
    assert weights.vector is vector
    assert torch.equal(vector, FlatWeights(build(name, 3, seed=1)).vector)


def test_another_number_of_classes_keeps_the_head():
    network = Small(classes=5)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = load(network, STATE)
    assert found.fresh == ["head.weight", "head.bias"]
    assert found.said == "FILE: the head is fresh ('head.weight' is (3, 4) in the file, (5, 4) in the network)"
    expected = {name: before[name] if name.startswith("head.") else STATE[name] for name in before}
    assert same(network.state_dict(), expected)


def test_a_missing_head_is_kept():
    network = Small()
    before = network.head.weight.clone()
    found = load(network, {n: t for n, t in STATE.items() if "head" not in n})
    assert (found.fresh, found.head) == (["head.weight", "head.bias"], "'head.weight' is not in the file")
    assert torch.equal(network.head.weight, before)
    assert torch.equal(network.conv.weight, STATE["conv.weight"])


def test_a_head_alone_is_no_fit():
    """Of a network that is a head, a file with other classes gives nothing: it would all be fresh."""
    with pytest.raises(ShapeError, match=r"does not fit the network: no tensor in the file has a name"):
        load(nn.Linear(4, 3), nn.Linear(4, 5).state_dict())


def test_checkpoints_older_than_num_batches_tracked_fit():
    network = Small()
    assert load(network, {n: t for n, t in STATE.items() if n != "bn.num_batches_tracked"}).fresh == []
    assert torch.equal(network.bn.running_mean, STATE["bn.running_mean"])
    assert network.bn.num_batches_tracked == 0


@pytest.mark.parametrize(("kind", "name"), [(torch.half, "float16"), (torch.bfloat16, "bfloat16")])
def test_half_precision_is_converted_and_said(kind, name):
    network = Small()
    half = {name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}
    assert load(network, half).said == f"FILE: {name} converted to float32"
    assert network.conv.weight.dtype == torch.float32
    torch.testing.assert_close(network.conv.weight.detach(), STATE["conv.weight"], rtol=1e-2, atol=1e-2)


def prefixed(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


AVERAGE = {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in STATE.items()}


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ({"state_dict": prefixed("model.")}, "taken from 'state_dict', names without 'model.'"),
        ({"": prefixed("net.")}, "taken from names without 'net.'"),
        ({"": prefixed("model._orig_mod.")}, "taken from names without 'model._orig_mod.'"),
        ({"": prefixed("ema_model.module.") | {"ema_model.n_averaged": torch.tensor(3)}}, "ema_model.module."),
        ({"any.thing": STATE}, "taken from 'any.thing'"),
        ({"": {"conv._orig_mod.weight": STATE["conv.weight"]} | {n: t for n, t in STATE.items() if n != "conv.weight"}},
         "names without"),
        ({"": STATE | {"total_ops": torch.zeros(1, dtype=torch.float64), "conv.total_ops": torch.zeros(1)}},
         "left out: total_ops, conv.total_ops"),
        ({"": STATE | {"epoch": torch.tensor(3), "head.num_batches_tracked": torch.tensor(0)}}, "left out: epoch"),
        ({"": prefixed("model.") | {"criterion.weight": torch.ones(9)}}, "left out: criterion.weight"),
        ({"model": STATE, "ema": AVERAGE}, "taken from 'model'; not taken: 'ema', which fits, too"),
        ({"model_ema": AVERAGE, "state_dict": STATE}, "not taken: 'model_ema', which fits, too"),
        ({"": STATE | prefixed("ema.", AVERAGE)}, "not taken: names without 'ema.', which fits, too"),
        ({"": prefixed("model.") | prefixed("ema_model.module.", AVERAGE) | {"ema_model.n_averaged": torch.tensor(1)}},
         "not taken: names without 'ema_model.module.', which fits, too"),
        ({"model": STATE, "best": dict(STATE)}, "taken from 'model'"),
        ({"model": STATE, "momentum": {"conv.weight": torch.ones(4, 3, 3, 3)}}, "taken from 'model'"),
    ],
)  # fmt: skip
def test_the_one_that_fits_is_taken_and_said(states, said):
    network = Small()
    found = matching.load(network, checkpoint(**states))
    assert found.fresh == []
    assert said in found.said
    assert same(network.state_dict(), STATE)


def test_an_average_alone_is_taken():
    network = Small()
    assert "taken from 'ema'" in matching.load(network, checkpoint(ema=AVERAGE)).said
    assert same(network.state_dict(), AVERAGE)


def test_a_network_in_a_wrapper_of_its_own_takes_bare_names():
    network = nn.ModuleDict({"model": Small()})
    assert matching.load(network, checkpoint(STATE)).fresh == []
    assert same(network["model"].state_dict(), STATE)


def test_several_that_fit_are_refused():
    with pytest.raises(ShapeError) as caught:
        matching.load(Small(), checkpoint(student=STATE, teacher=AVERAGE))
    assert str(caught.value) == (
        "FILE holds several weights that fit the network: 'student' and 'teacher': "
        "save those that are meant to a file of their own"
    )


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


def test_of_tied_weights_one_is_enough():
    """safetensors keeps one of them."""
    given = Tied().state_dict()
    for name in ("first.weight", "second.weight"):
        network = Tied()
        assert load(network, {key: tensor for key, tensor in given.items() if key != name}).fresh == []
        assert same(network.state_dict(), given)
    with pytest.raises(ShapeError, match=r"'second\.weight' are one tensor in the network, and differ"):
        load(Tied(), given | {"first.weight": torch.ones(4, 4)})


@pytest.mark.parametrize("name", ["conv.weight", "bn.running_var"])
def test_weights_that_are_not_finite_are_refused(name):
    network = Small()
    with pytest.raises(ShapeError, match=f"^FILE: '{name}' is not finite: use an earlier checkpoint$"):
        load(network, STATE | {name: STATE[name].double() * 1e300})
    assert torch.isfinite(network.conv.weight).all()


FITS_NOT = "FILE does not fit the network: {}: choose the network that it was saved from, or rename its tensors"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"conv.weight": torch.ones(9)}, "'conv.weight' is (9,) in the file, (4, 3, 3, 3) in the network"),
        ({"head.weight": torch.zeros(3, 9)}, "'head.weight' is (3, 9) in the file, (3, 4) in the network"),
        ({"bn.weight": torch.zeros(4, dtype=torch.int8)}, "'bn.weight' is int8 in the file, float32 in the network"),
        ({"conv.bias": None}, "'conv.bias' (4,) is not in the file"),
        ({"head.bias": None}, "'head.bias' (3,) is not in the file"),
        ({"bn.running_var": None}, "'bn.running_var' (4,) is not in the file"),
        ({"extra": torch.zeros(2)}, "'extra' (2,) is not in the network"),
        ({"conv.weight": None, "conv1.weight": STATE["conv.weight"]},
         "'conv.weight' (4, 3, 3, 3) is not in the file (nearest: 'conv1.weight'); "
         "'conv1.weight' (4, 3, 3, 3) is not in the network (nearest: 'conv.weight')"),
    ],
)  # fmt: skip
def test_anything_else_is_named_and_nothing_is_written(changed, message):
    network = Small()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    given = {name: tensor for name, tensor in {**STATE, **changed}.items() if tensor is not None}
    with pytest.raises(ShapeError) as caught:
        load(network, given)
    assert str(caught.value) == FITS_NOT.format(message)
    assert same(network.state_dict(), before)


def test_a_wider_network_s_weights_are_refused():
    """One of its layers differs in its outputs alone, as a head would; what follows that layer gives it away."""
    for state in (noted(width=6).state_dict(), build("cnn", 3).state_dict()):
        with pytest.raises(ShapeError, match=r"^FILE does not fit the network: .* and \d+ more: choose the network"):
            load(Small(), state)


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
            network = build(f"torchvision:{name}", classes).to_empty(device="cpu")
        for tensor in network.state_dict().values():
            tensor.zero_()
        return network

    given, network = made(1000).state_dict(), made(7)
    differing = [key for key, tensor in network.state_dict().items() if tensor.shape != given[key].shape]
    assert len(differing) == 2
    assert load(network, given).fresh == differing
    assert load(network, {key: given[key] for key in given if key not in differing}).fresh == differing
