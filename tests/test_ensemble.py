"""Loading and predicting: each member is ``c @ V``, and the ensemble is the mean of probabilities."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn

from ensembler import Ensemble, as_dataset
from ensembler.data.datasets import normalise
from ensembler.device import choose_device
from ensembler.errors import DataError, ShapeError, UsageError
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.options import EvaluationOptions
from ensembler.networks.architectures import build
from ensembler.run import Run
from ensembler.trainers import DeepEnsemble, Settings, Simplex, collapse_run, combine, train
from tests._host import CpuGraph
from tests._runs import make_run
from tests._small import dataset
from tests._training import make


def images(count=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def by_hand(run: Run, x: torch.Tensor) -> torch.Tensor:
    """Each member in a network of its own, its weights summed name by name."""
    result = []
    for member, row in enumerate(run.coefficients):
        network = build(run.manifest.architecture, len(run.manifest.dataset.classes))
        state = {name: sum(c * v for c, v in zip(row, rows, strict=True)) for name, rows in run.vertices.items()}
        network.load_state_dict(state | {name: rows[member] for name, rows in run.buffers.items()})
        result.append(torch.softmax(network.eval()(x), dim=1))
    return torch.stack(result).detach()


@pytest.mark.parametrize("architecture", ["cnn", "resnet20"])
def test_members_and_their_mean(tmp_path, architecture):
    ensemble = Ensemble.load(make_run(tmp_path / "run", architecture), device="cpu", batch_size=2)
    x = images()
    record = ensemble.run.manifest.dataset
    expected = by_hand(ensemble.run, normalise(torch.from_numpy(x), tuple(record.mean), tuple(record.std)))
    members = ensemble.predict_members(x)
    torch.testing.assert_close(members, expected, rtol=1e-4, atol=1e-6)
    mean = ensemble.predict_proba(x)
    torch.testing.assert_close(mean, expected.mean(0), rtol=1e-4, atol=1e-6)
    of_logits = torch.softmax(expected.log().mean(0), dim=1)
    assert (mean - of_logits).abs().max() > 1e-3, "the members must differ for this test to mean anything"


def test_normalised_input_is_taken_as_it_is(tmp_path):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), device="cpu")
    record = ensemble.run.manifest.dataset
    x = images()
    inputs = normalise(torch.from_numpy(x), tuple(record.mean), tuple(record.std))
    torch.testing.assert_close(ensemble.predict_members(x), ensemble.predict_members(inputs), rtol=1e-4, atol=1e-6)


def test_other_input_is_refused(tmp_path):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), device="cpu")
    for wrong in (images()[0], images().astype(np.int32), images()[..., :1], np.zeros((3, 3072), dtype=np.float32)):
        with pytest.raises(ShapeError, match="expected images"):
            ensemble.predict_members(wrong)
    assert ensemble.predict_members(images(0)).shape == (3, 0, 5)


TOTENSOR = np.random.default_rng(0).random((4, 3, 32, 32), dtype=np.float32)
HWC = TOTENSOR.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        (TOTENSOR, r"floats from 0 to 1, as torchvision's ToTensor .* \(images \* 255\)\.round\(\)"),
        (np.zeros_like(TOTENSOR), "floats from 0 to 1"),
        (TOTENSOR * 255, r"hold floats from .* to 25\d.*, and no image of this run, normalised, has any outside"),
        (TOTENSOR * 255 - 128, "no image of this run, normalised, has any outside"),
        (np.where(TOTENSOR < 0.5, np.nan, TOTENSOR - 1), "no image of this run, normalised"),
        (HWC, r"give \(images \* 255\)\.round\(\)\.to\(torch\.uint8\)$"),
        (HWC * 255, "give whole numbers from 0 to 255 as uint8"),
        (images().astype(np.int64), "give whole numbers from 0 to 255 as uint8"),
        (images().transpose(0, 3, 1, 2), r"the channels are first, give images\.permute\(0, 2, 3, 1\)"),
        (images()[:, :28], "resize them to 32 x 32 pixels"),
        (TOTENSOR[..., :28] - 1, "resize them to 32 x 32 pixels"),
        (images()[..., :1], "their channels must be 3"),
        (images()[0], r"give a batch, images\[None\]"),
        (TOTENSOR[0], r"give a batch, images\[None\]"),
        (images()[..., 0], "give a batch of images"),
    ],
)
def test_pixels_that_would_be_answered_wrongly_are_refused(tmp_path, wrong, mend):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), device="cpu")
    for predict in (ensemble.predict_members, ensemble.predict_proba, ensemble.uncertainty):
        with pytest.raises(ShapeError, match=mend):
            predict(wrong)


@pytest.fixture
def on_graphs(monkeypatch):
    """Has predictions captured by a CUDA graph's rules; how many forward passes were replayed since."""
    monkeypatch.setattr(Ensemble, "_captures", True)
    monkeypatch.setattr("ensembler.networks.members.CudaGraph", CpuGraph)
    before = CpuGraph.replays
    return lambda: CpuGraph.replays - before


@pytest.mark.parametrize("network", ["batchnorm", "layernorm", "channels_last"])
def test_captured_predictions_are_the_eager_ones_bit_for_bit(network, on_graphs, monkeypatch):
    """Every member's, with other images each time, in batches of two sizes and as images and as normalised inputs."""
    run = make(DeepEnsemble(members=3), architecture=f"tests._small:{network}")
    record, x = run.manifest.dataset, dataset().test.images
    inputs = normalise(x, tuple(record.mean), tuple(record.std))
    asked = [x, x.flip(0), inputs, x[:3], x.flip(1), inputs]
    ensemble = Ensemble(run, "cpu", batch_size=6)
    found = [ensemble.predict_outputs(each) for each in asked]
    # 15 are two batches of 6 and one of 3: of a shape, all but the first three passes are replayed.
    assert on_graphs() == (3 * 2 * 3 - 3) + (3 * 4 - 3) + (3 * 2 * 2 - 3) + (3 * 2 - 3)
    monkeypatch.setattr(Ensemble, "_captures", False)
    eager = Ensemble(run, "cpu", batch_size=6)
    assert all(torch.equal(eager.predict_outputs(x), one) for x, one in zip(asked, found, strict=True))
    assert not torch.equal(found[0], found[1])


def test_what_is_not_captured_is_predicted_as_it_is(on_graphs, monkeypatch):
    """Networks that read a value, large batches, and more shapes than have a graph."""
    x = dataset().test.images
    reading = Ensemble(make(DeepEnsemble(members=2), architecture="tests._small:reads_a_value"), "cpu")
    first = [reading.predict_outputs(x) for _ in range(4)]
    run = make(DeepEnsemble(members=2))
    many = Ensemble(run, "cpu")
    shapes = [many.predict_outputs(x[:count]) for count in range(1, 12)]
    assert not on_graphs()
    monkeypatch.setattr("ensembler.ensemble._CAPTURED", x.numel() - 1)
    large = [Ensemble(run, "cpu").predict_outputs(x) for _ in range(4)]
    assert not on_graphs()
    shapes += [many.predict_outputs(x[:11]) for _ in range(4)]
    assert not on_graphs(), "the ninth shape and later ones"
    monkeypatch.setattr(Ensemble, "_captures", False)
    assert all(torch.equal(one, reading.predict_outputs(x)) for one in first)
    assert all(torch.equal(one, many.predict_outputs(x[: one.shape[1]])) for one in [*shapes, *large])


def test_a_layer_that_is_switched_to_training_is_not_predicted_from_an_old_graph(on_graphs):
    """As dropout that stays on for predictions."""
    ensemble = Ensemble(make(DeepEnsemble(members=1), architecture="tests._small:dropout"), "cpu")
    x = dataset().test.images
    still = [ensemble.predict_outputs(x) for _ in range(5)]
    assert on_graphs()
    assert torch.equal(still[0], still[4])
    ensemble.network(0)[1].train()
    moving = [ensemble.predict_outputs(x) for _ in range(5)]
    assert not torch.equal(moving[0], still[0])
    assert not torch.equal(moving[3], moving[4])
    ensemble.network(0)[1].eval()
    assert torch.equal(ensemble.predict_outputs(x), still[0])


def test_uncertainty_of_a_batch(tmp_path):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), device="cpu")
    found = ensemble.uncertainty(images())
    assert found.mutual_information.shape == (5,)
    single = Ensemble.load(make_run(tmp_path / "single", members=1), device="cpu")
    assert single.uncertainty(images()).mutual_information is None


def unwritable(array):
    array.setflags(write=False)
    return array


@pytest.mark.parametrize(
    "given",
    [
        images()[:, :, ::-1][:, :, ::-1],
        images()[:, ::-1].copy()[:, ::-1],
        np.asfortranarray(images()),
        unwritable(images()),
        torch.from_numpy(images()),
        list(images()),
        np.ma.masked_array(images(), mask=False),
    ],
)
def test_the_same_images_in_any_memory(tmp_path, given, recwarn):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), "cpu")
    expected = ensemble.predict_outputs(images())
    assert torch.equal(ensemble.predict_outputs(given), expected)
    np.testing.assert_array_equal(ensemble.predict(given).members, expected.softmax(-1).numpy())
    assert not recwarn.list


def test_inputs_of_another_byte_order(tmp_path):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), "cpu")
    x = TOTENSOR * 2 - 1
    assert torch.equal(ensemble.predict_outputs(x.astype(">f4")), ensemble.predict_outputs(x))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (np.array(["a", "b"]), ShapeError, "this is no array of numbers .*: give uint8 or float32"),
        (np.array([None, 1]), ShapeError, "this is no array of numbers"),
        (np.zeros(3, "M8[s]"), ShapeError, "this is no array of numbers"),
        (np.ma.masked_greater(images(), 3), DataError, "masked entries, which have no value"),
        (torch.from_numpy(images()).to_sparse(), DataError, "a sparse, nested or quantized tensor: give a dense one"),
        (torch.empty(4, 32, 32, 3, dtype=torch.uint8, device="meta"), DataError, "a tensor on the device meta"),
    ],
)
def test_arrays_of_no_numbers_are_refused(tmp_path, wrong, error, message):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), "cpu")
    for predict in (ensemble.predict, ensemble.predict_outputs, ensemble.uncertainty):
        with pytest.raises(error, match=message):
            predict(wrong)


def test_what_only_predict_takes_is_said(tmp_path):
    ensemble = Ensemble.load(make_run(tmp_path / "run"), "cpu")
    for wrong in (None, "digit.png", dataset().test):
        with pytest.raises(UsageError, match=r"an array or a tensor is expected here, not a \w+: predict takes a path"):
            ensemble.predict_proba(wrong)


def test_threads_that_predict_with_one_ensemble_take_turns():
    """Another thread comes when the first one has written a member's weights, and has not yet used them."""
    ensemble, x = Ensemble(trained(), "cpu"), dataset().test.images
    expected = ensemble.predict_outputs(x)
    threads = []

    def vary(member, images):
        threads.append(Thread(target=ensemble.predict, args=(images,)))
        threads[-1].start()
        threads[-1].join(0.2)
        return images

    found = ensemble.predict_outputs(x, vary)
    for thread in threads:
        thread.join()
    assert len(threads) == ensemble.members and torch.equal(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_predicts_the_same(copied):
    ensemble, x = Ensemble(trained("tests._small:batchnorm"), "cpu", batch_size=4), dataset().test.images
    expected = ensemble.predict_outputs(x)
    other = copied(ensemble)
    assert torch.equal(other.predict_outputs(x), expected) and other.batch_size == 4
    assert torch.equal(ensemble.predict_outputs(x), expected)
    assert other.network(0) is not ensemble.network(0)


def test_points_without_the_sum_1_are_refused():
    ensemble, x = Ensemble(trained(), "cpu"), dataset().test.images
    expected = ensemble.at(torch.tensor([[0.5, 0.5, 0.0]])).predict_outputs(x)
    for same in (np.array([[0.5, 0.5, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]]).double()):
        assert torch.equal(ensemble.at(same).predict_outputs(x), expected)
    assert ensemble.at(torch.tensor([[1, 0, 0]])).members == 1
    ensemble.at(torch.tensor([[3000.5, -1999.5, -1000.0]]))
    for wrong, shown in (([[0.5, 0.5, 0.5]], "1.5"), ([[0.5, float("nan"), 0.5]], "nan")):
        with pytest.raises(ShapeError, match=f"coefficients of point 0 have the sum {shown}, and must have 1"):
            ensemble.at(torch.tensor(wrong))


def activated(activation, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), activation(), nn.Linear(8, num_classes))


def test_a_network_that_computes_otherwise_than_in_training_is_refused(tmp_path):
    """With the same weights and the same name, by another argument or changed code."""
    relu, tanh = partial(activated, nn.ReLU), partial(activated, nn.Tanh)
    settings, data = Settings(epochs=1, device="cpu"), dataset()
    runs = {"single": train(data, DeepEnsemble(members=1), settings, network=relu)}
    runs["simplex"] = train(data, Simplex(vertices=2), settings, network=relu)
    runs["others"] = Ensemble(runs["simplex"], "cpu").sample(3, seed=1).run
    runs["both"] = combine({"a": runs["single"], "b": runs["simplex"]}, data)
    runs["centroid"] = collapse_run(runs["simplex"], data)
    for name, run in runs.items():
        path = run.save(tmp_path / name)
        assert Ensemble.load(path, "cpu", network=relu).members == run.manifest.members
        if name == "others":  # were not measured: nothing is known of them
            continue
        with pytest.raises(UsageError, match="the network __main__:partial computes otherwise than when the run was"):
            Ensemble.load(path, "cpu", network=tanh)
    with pytest.raises(UsageError, match="computes otherwise"):
        evaluate_paths(tmp_path / "both", EvaluationOptions(device="cpu"), dataset=data, network=tanh)


class Absent(nn.Sequential):
    """A class that no example has is left out: its logit is minus infinity."""

    def forward(self, x):
        logits = super().forward(x)
        return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)], 1)


def test_a_logit_of_minus_infinity_is_saved_and_loaded(tmp_path):
    def absent(num_classes):
        return Absent(nn.Flatten(), nn.Linear(192, num_classes))

    images, labels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
    data = as_dataset((images, labels), classes=["a", "b", "none"])
    run = train(data, DeepEnsemble(members=1), Settings(epochs=1, device="cpu"), network=absent)
    found = Ensemble.load(run.save(tmp_path / "run"), "cpu", network=absent).predict(images[:2])
    assert found.probabilities[:, 2].tolist() == [0, 0]


def test_members_and_variations_that_are_not_there():
    ensemble, x = Ensemble(trained(), "cpu"), dataset().test.images
    for wrong in (2, -1):
        for ask in (ensemble.network, ensemble.run_of):
            with pytest.raises(UsageError, match=f"there is no member {wrong}: the 2 count from 0"):
                ask(wrong)
    for vary in (lambda member, images: None, lambda member, images: images[:, :4]):
        with pytest.raises(ShapeError, match=r"vary must return a tensor of \(15, 8, 8, 3\) torch.uint8"):
            ensemble.predict_outputs(x, vary)


def trained(architecture="tests._small:network"):
    return make(Simplex(vertices=3, members=2), architecture=architecture)


def test_fresh_members_come_from_the_same_simplex():
    ensemble = Ensemble(trained(), "cpu")
    one, same, other = ensemble.sample(7, seed=1), ensemble.sample(7, seed=1), ensemble.sample(7, seed=2)
    assert one.members == 7
    assert torch.equal(one.run.coefficients, same.run.coefficients)
    assert not torch.equal(one.run.coefficients, other.run.coefficients)
    torch.testing.assert_close(one.run.coefficients.sum(1), torch.ones(7))
    assert ensemble.members == 2
    x = dataset().test.images
    assert one.predict_members(x).shape == (7, 15, 3)
    with pytest.raises(UsageError, match="at least one member"):
        ensemble.sample(0)


def test_fresh_members_of_a_batchnorm_network_need_its_images(monkeypatch):
    ensemble = Ensemble(trained("tests._small:batchnorm"), "cpu")
    sampled = ensemble.sample(3, train=dataset().train)
    assert sampled.run.buffers["body.1.running_mean"].shape == (3, 4)
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    again = ensemble.sample(3)
    assert torch.equal(again.run.buffers["body.1.running_mean"], sampled.run.buffers["body.1.running_mean"])


def test_fixed_members_cannot_be_drawn_again():
    with pytest.raises(UsageError, match="members of a run by deep-ensemble are fixed"):
        Ensemble(make(DeepEnsemble(members=2)), "cpu").sample(3)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    for wrong in ("nonsense", "cuda:99"):
        with pytest.raises(UsageError, match="cannot compute on the device"):
            choose_device(wrong)


def test_architectures_by_name(tmp_path, monkeypatch):
    sizes = {"cnn": 288_298, "resnet20": 272_282, "vgg16": 15_245_130}
    for name, size in sizes.items():
        assert sum(p.numel() for p in build(name, 10).parameters()) == size
    assert isinstance(build("torchvision:resnet18", 7).fc, nn.Linear)
    assert build("torchvision:resnet18", 7).fc.out_features == 7
    (tmp_path / "mine.py").write_text("from torch import nn\ndef make(num_classes): return nn.Linear(2, num_classes)\n")
    monkeypatch.chdir(tmp_path)
    assert build("mine:make", 4).out_features == 4
    for name, message in (
        ("nothing", "unknown architecture 'nothing': use cnn"),
        ("torchvision:nothing", "torchvision has no classifier"),
        ("mine:absent", "cannot import the architecture 'mine:absent'"),
        ("absent:make", "cannot import the architecture 'absent:make'"),
        ("math:sqrt", "cannot be called as sqrt"),
        ("builtins:dict", "returned dict, not a torch"),
    ):
        with pytest.raises(UsageError, match=message):
            build(name, 4)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    one = build("cnn", 10, seed=3)[0].weight
    torch.manual_seed(2)
    assert torch.equal(one, build("cnn", 10, seed=3)[0].weight)
    assert not torch.equal(one, build("cnn", 10, seed=4)[0].weight)
