"""A network is tried before it is trained: every fault is one sentence, and nothing is trained or written."""

from __future__ import annotations

import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from ensembler.data.images import normalise
from ensembler.ensemble import Ensemble
from ensembler.errors import UsageError
from ensembler.networks.architectures import build, strided_pointwise
from ensembler.run import Run
from ensembler.trainers import FGE, DeepEnsemble, Settings, Simplex, train
from ensembler.trainers.dry_pass import dry_pass
from tests._small import SETTINGS, dataset
from tests._training import call, make, same, saved

THERE = "where PyTorch does not find them, so they would be neither trained nor stored"
LATE = "which would be neither trained nor stored: make it in __init__, as an attribute or in an nn.ModuleList"
UNHELD = "which no run would hold, and which is another one each time that the network is built or run: "
EACH_TIME = "answers the same images differently each time in evaluation mode"
ALONE = "answers an image differently alone than beside another one in evaluation mode"
IN_PLACE = "so that the next member would be given another one: use no operation in place there (inplace=False)"


def tried(name, data=None, **settings):
    """The memory format chosen, and what was said."""
    data, said = data or dataset(), []
    own = Settings(**SETTINGS | {"architecture": f"tests._odd_networks:{name}"} | settings).resolved(data)
    return dry_pass(data, own, said.append), said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("thousand", "returns (B, 1000), expected (B, 3): give its last layer 3 outputs, num_classes"),
        ("one", "returns (B, 1), expected (B, 3): give its last layer 3 outputs"),
        ("unflattened", "returns (B, 3, 1, 1), expected (B, 3): add nn.Flatten()"),
        ("maps", "returns (B, 3, 6, 6), expected (B, 3): add nn.AdaptiveAvgPool2d(1) and nn.Flatten()"),
        ("squeezed", "returns (3,), expected (1, 3): squeeze() also removes the dimension of a batch of one"),
        ("as_dict", "returns a dict of 'logits' (B, 3) in training mode, expected (B, 3): return the logits alone"),
        ("as_tuple", "returns a tuple of (B, 3), (B, 4) in training mode, expected (B, 3): return the logits alone"),
        ("auxiliary", "in training mode, expected (B, 3): return the logits alone, outputs[0]"),
        ("auxiliary_by_option", "in training mode, expected (B, 3): build it with aux_logits=False"),
        (
            "as_object",
            "returns an object of class Output in training mode, expected (B, 3): return the logits alone, out",
        ),
        ("as_object", "return the logits alone, outputs.logits"),
        ("nothing", "returns nothing (None) in training mode, expected (B, 3)"),
        ("classes", "returns numbers of type int64 in training mode, expected float32: return the logits"),
        ("probabilities", "returns probabilities in training mode, expected logits: leave out the softmax"),
        ("probabilities_at_last", "returns probabilities, expected logits: leave out the softmax"),
        ("sigmoid", "returns what a sigmoid gives, numbers from 0 to 1, expected logits: leave out the sigmoid"),
        (
            "not_a_number",
            "returns numbers that are not finite (NaN or infinity) in training mode, before it is trained",
        ),
        ("not_a_number_at_last", "not finite (NaN or infinity) in evaluation mode, before it is trained: look in its"),
        ("five_channels", "in its layer '0.0', Conv2d(5, 4, kernel_size=(3, 3)"),
        ("five_channels", "give its first layer 3 input channels"),
        ("other_size", "it may be made for another size: give that by --image-size, or build it for 8 x 8"),
        ("large_kernel", "in its layer '0', Conv2d(3, 4, kernel_size=(11, 11)"),
        ("double", "has weights of type float64 ('body.0.weight'), expected float32: return network.float()"),
        ("complex_", "has weights of type complex64 ('scale'), expected float32: hold real and imaginary parts apart"),
        ("lazy", "leaves the shape of its layer '1' (LazyLinear) open until it sees its first batch"),
        ("on_meta", "cannot be moved to cpu"),
        ("frozen", "returns outputs without gradients, so that nothing would be trained"),
        ("detached", "returns outputs without gradients, so that nothing would be trained"),
        ("raises", "cannot build a network for 3 classes: KeyError: 'hidden' (_odd_networks.py, line"),
        ("raises_in_forward", "AttributeError: 'Net' object has no attribute 'absent' (_odd_networks.py, line"),
        ("scripted", "returns a RecursiveScriptModule: return the network itself, without torch.jit"),
        ("no_network", "returned list, not a torch.nn.Module"),
        ("without_argument", "cannot be called as without_argument(num_classes=3)"),
        ("NOT_CALLABLE", "is a int, expected a function that builds a network"),
        ("shared", "returns the same network at every call, but every member needs its own: build a new one"),
        ("late", f"calls a layer in forward that is none of its own, Linear(in_features=4, {'out_features=4'}"),
        ("late", LATE),
        ("made_each_time", LATE),
        ("listed", f"holds the weights 'layers[0].weight' (4, 4) {THERE}"),
        ("no_parameter", f"holds the weights 'gain' (1,) {THERE}"),
        ("attribute", f"computes with 'turn' (3, 3), {UNHELD}make it part of the state dict"),
        ("attribute", 'with self.register_buffer("turn", ...)'),
        ("by_numpy", "computes with 'turn' (3, 3), which no run would hold"),
        ("by_python", "computes with 'gain', which no run would hold"),
        ("permuted", "computes with 'order[0]' (3,), which no run would hold"),
        ("buffer", f"computes with 'turn' (3, 3), {UNHELD}make it part of the state dict, with persistent=True"),
        ("behind_zeros", "computes with 'gain' (4,), which no run would hold"),
        ("own_statistics", "computes with 'mean' (4,), which no run would hold"),
        ("random_width", "builds another network each time, or changes its layers as it runs"),
        ("dropout_always", f"{EACH_TIME}: draw random numbers in training mode only (F.dropout needs training="),
        ("noise_always", f"{EACH_TIME}: draw random numbers in training mode only"),
        ("deaf", f"{EACH_TIME} (its layer '1' stays in training mode)"),
        (
            "counted",
            f"{EACH_TIME}, for it changes its buffer 'calls' there: change it only where self.training is true",
        ),
        ("remembered", "and keep nothing from call to call"),
        ("batch_mean", f"{ALONE}: an answer must depend on its image alone"),
        ("batch_statistics", f"{ALONE} (its layer '1' normalises by the batch's own statistics): leave out track_run"),
        ("fixed_batch", "it must take a batch of any size, also of one"),
        ("in_place", f"changes the tensor that it is given (in its layer '0'), {IN_PLACE}"),
        ("in_place_in_forward", f"changes the tensor that it is given (in its forward), {IN_PLACE}"),
    ],
)
def test_a_fault_is_one_sentence(name, sentence):
    with pytest.raises(UsageError) as caught:
        tried(name)
    said = str(caught.value)
    assert sentence in said
    assert said.startswith(f"tests._odd_networks:{name} ")
    assert "\n" not in said


@pytest.mark.parametrize(
    "name", ["plain", "silent", "layerdrop", "seeded_attribute", "normalised", "beside_another_thread", "left_out"]
)
def test_what_is_taken_as_it_is(name):
    assert tried(name) == ("channels-last", [])


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("viewed", "view() in its forward needs it, reshape() would not"),
        ("strided_in_memory", "it does not compute the same in channels-last"),
        ("three_dimensions", "it does not compute the same in channels-last"),
        ("strided_pointwise", "PyTorch's backward pass of its layer '0' on a CPU writes outside of its memory"),
    ],
)
def test_networks_that_need_contiguous_memory_are_given_it(name, cause):
    chosen, (said,) = tried(name)
    assert chosen == "contiguous"
    assert said.startswith(f"tests._odd_networks:{name} is trained in contiguous memory: ")
    assert cause in said
    assert said.endswith("; --memory-format says otherwise")
    assert tried(name, memory_format="contiguous") == ("contiguous", [])


def test_a_memory_format_that_was_asked_for_and_does_not_work():
    with pytest.raises(UsageError, match=r"use reshape instead of view, or --memory-format contiguous$"):
        tried("viewed", memory_format="channels-last")
    assert tried("strided_pointwise", memory_format="channels-last") == ("channels-last", [])


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "named"),
    [
        *((channels, 1, 2, True) for channels in (1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 15, 24)),
        *((channels, 1, 2, False) for channels in (16, 32, 64)),
        (3, 1, 1, False),
        (3, 3, 2, False),
        (3, 1, (1, 2), True),
        (3, (1, 3), 2, False),
    ],
)
def test_which_convolutions_stay_contiguous_on_a_cpu(channels, kernel, stride, named):
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Sequential(nn.Conv2d(channels, 48, kernel, stride)))
    assert strided_pointwise(network) == ("1.0" if named else None)


def test_a_contiguous_network_computes_in_contiguous_memory_whatever_it_is_given():
    seen = []
    network = build("tests._odd_networks:plain", 3, memory_format="contiguous")
    network.body[0].register_forward_hook(lambda module, inputs, outputs: seen.append((inputs[0], outputs)))
    network(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    assert all(tensor.is_contiguous() for tensor in (*seen[0], network.body[0].weight))


def test_the_chosen_memory_format_holds_in_evaluation(tmp_path):
    said = []
    run = make(DeepEnsemble(members=2), architecture="tests._odd_networks:viewed", said=said)
    assert sum("contiguous" in text for text in said) == 1
    assert run.manifest.settings["memory_format"] == "contiguous"
    images = dataset().test.images
    expected = Ensemble(run).predict_proba(images)
    path = run.save(tmp_path / "run")
    assert torch.equal(Ensemble.load(path).predict_proba(images), expected)
    floats = torch.randn(2, 3, 8, 8).clamp(-1, 1).to(memory_format=torch.channels_last)
    assert Ensemble.load(path).predict_proba(floats).shape == (2, 3)
    bare = run.manifest.model_copy(update={"settings": {}})  # of a run that was made elsewhere
    assert torch.equal(Ensemble(replace(run, manifest=bare)).predict_proba(images), expected)


def test_a_network_of_one_channel_is_given_one(tmp_path):
    """The mean of the three, which is what each is where images are grey; in training, evaluation and serving."""
    from ensembler.serve import Runtime, export_run

    said = []
    run = make(DeepEnsemble(members=2), architecture="tests._odd_networks:grey", said=said)
    assert "tests._odd_networks:grey takes one channel: it is given the mean of an image's three" in said
    path, images = run.save(tmp_path / "run"), dataset().test.images
    ensemble = Ensemble.load(path)
    found = ensemble.predict_members(images)
    network, record = ensemble.network(1), run.manifest.dataset
    inputs = normalise(images, record.mean, record.std).mean(dim=1, keepdim=True)
    with torch.no_grad():
        assert torch.equal(found[1], network(inputs).softmax(1))
    export_run(path, tmp_path / "bundle", use_data=False)
    served = Runtime.load(tmp_path / "bundle").predict_members(images.numpy())
    assert abs(torch.as_tensor(served) - found).max() < 1e-5


def test_torchvisions_auxiliary_heads_are_left_out_and_that_is_said(monkeypatch):
    for name, size in (("googlenet", 32), ("inception_v3", 75)):
        network = build(f"torchvision:{name}", 3)
        network.train()
        assert network(torch.randn(2, 3, size, size)).shape == (2, 3)
        assert not [key for key in network.state_dict() if key.startswith(("aux", "Aux"))]
    chosen, said = tried("", architecture="torchvision:googlenet", data=dataset(size=32))
    assert (chosen, said) == (
        "channels-last",
        ["torchvision:googlenet is built without its auxiliary heads: its main output is trained"],
    )


def test_it_leaves_no_trace():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    data = dataset()
    images = data.train.images.clone()
    tried("silent", data)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert torch.equal(images, data.train.images)


@pytest.mark.parametrize("method", [DeepEnsemble(members=1), FGE(members=1), Simplex(vertices=2, members=2)])
def test_every_method_tries_first(method, monkeypatch):
    monkeypatch.setattr("ensembler.trainers.loop.fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UsageError, match="returns \\(B, 1000\\)"):
        make(method, architecture="tests._odd_networks:thousand")


def test_a_command_tries_once_before_anything_is_written(tmp_path, monkeypatch):
    from ensembler.trainers import training

    calls = []
    monkeypatch.setattr(training, "dry_pass", lambda *given: calls.append(given) or dry_pass(*given))
    monkeypatch.chdir(tmp_path)
    result = call("train-fge", "--arch", "tests._odd_networks:thousand", "--seeds", 2, "--out", "runs/a")
    assert result.exit_code == 1
    assert "tests._odd_networks:thousand returns (B, 1000), expected (B, 10)" in result.stderr
    assert len(calls) == 1
    assert not [path for path in tmp_path.rglob("*") if "a" in path.name and path.name != "runs"]


def test_a_start_does_not_hide_a_fault(tmp_path):
    """The architecture of a run may have changed since."""
    path = saved(make(DeepEnsemble(members=1), architecture="tests._odd_networks:plain"), tmp_path / "run")
    run = Run.load(path)
    run.manifest.architecture = "tests._odd_networks:dropout_always"
    changed = saved(replace(run), tmp_path / "changed")
    with pytest.raises(UsageError, match=EACH_TIME):
        make(Simplex(vertices=2, members=2), init=changed)


@pytest.mark.parametrize("name", ["attribute", "by_numpy", "buffer", "thousand", "dropout_always", "in_place"])
def test_an_ensemble_is_not_loaded_of_what_no_run_holds(name):
    run = make(DeepEnsemble(members=1), architecture="tests._odd_networks:plain")
    run.manifest.architecture = f"tests._odd_networks:{name}"
    with pytest.raises(UsageError, match=f"^tests._odd_networks:{name} "):
        Ensemble(run)


def test_layers_dropped_by_python_and_numpy_are_a_function_of_the_seed():
    runs = []
    for _ in range(2):
        random.seed()
        np.random.seed()
        runs.append(make(DeepEnsemble(members=1), architecture="tests._odd_networks:layerdrop"))
    assert same(*runs)
    assert not same(runs[0], make(DeepEnsemble(members=1), architecture="tests._odd_networks:layerdrop", seed=1))


@pytest.mark.parametrize("name", ["normalised", "silent"])
def test_a_last_batch_of_one_image_joins_the_one_before(name):
    run = make(DeepEnsemble(members=1), dataset(train=25), architecture=f"tests._odd_networks:{name}", epochs=2)
    assert run.manifest.cost.example_passes == 50


def test_batches_of_one_image_are_refused_where_they_cannot_be_normalised():
    with pytest.raises(
        UsageError, match="its BatchNorm needs two images or more at a time: choose a larger --batch-size"
    ):
        tried("normalised", batch_size=1)
    assert tried("plain", batch_size=1) == ("channels-last", [])


def test_points_of_a_step_have_two_images_each():
    method = Simplex(vertices=2, members=2, vertex_epochs=1, samples_per_step=3)
    run = make(method, dataset(train=24 + 5), architecture="tests._odd_networks:normalised")
    assert run.manifest.members == 2


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("import nowhere_at_all", "No module named 'nowhere_at_all'"),
        ("def net(num_classes)", "SyntaxError"),
        ("open('absent.csv')", "FileNotFoundError"),
        ("1 / 0", "ZeroDivisionError: division by zero (broken.py, line 1)"),
    ],
)
def test_a_module_that_cannot_be_imported(source, sentence, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UsageError) as caught:
        train(dataset(), DeepEnsemble(members=1), Settings(architecture="broken:net"))
    assert str(caught.value).startswith("cannot import the architecture 'broken:net': ")
    assert sentence in str(caught.value)
