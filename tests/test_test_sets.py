"""Test sets of the same classes, each on small files of its published layout: whole, wrong, missing and extra."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.eval.options import EvaluationOptions
from ensembler.eval.shift import cifar_new
from ensembler.eval.shift.classes import CIFAR10, match
from ensembler.eval.shift.readers import load_shift, load_shifts
from ensembler.trainers import DeepEnsemble, Settings, train
from tests import _small
from tests._evaluate import evaluation
from tests._small import SETTINGS
from tests.test_shift import dataset as smooth
from tests.test_shift import official

WNIDS = (Path(__file__).parents[1] / "eval" / "shift" / "imagenet_wnids.txt").read_text().split()
ALL = torch.arange(60)


def dataset(classes=CIFAR10, count=60, size=8):
    """Test images of some classes; only their names, number and size matter."""
    found = smooth(count, size, name="folder:/somewhere")
    return dataclasses.replace(found, classes=tuple(classes))


def folder(root, sets, images=2, suffix=".png"):
    """One folder for each class of each set: ``{"noise/fog/1": ("cat", "dog")}``. Each image is of one colour."""
    for number, (place, classes) in enumerate(sets.items()):
        for label, name in enumerate(classes):
            path = root / place / name
            path.mkdir(parents=True)
            for one in range(images):
                Image.new("RGB", (9, 7), (number, label, one)).save(path / f"{one}{suffix}")
    return root


def colours(examples):
    return [tuple(image[0, 0].tolist()) for batch in examples.batches(100) for image in batch.images]


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_matched_by_name_whatever_their_order():
    found = match(("dog", "Polar Bear", "cat"), ("cat", "dog", "polar_bear"), "here")
    assert (found.outputs, found.labels, found.left_out) == (None, {"dog": 1, "Polar Bear": 2, "cat": 0}, ())
    found = match(("dog", "cat"), ("ant", "cat", "bee", "dog"), "here")
    assert (found.outputs, found.labels) == ((1, 3), {"cat": 0, "dog": 1})
    assert found.note.startswith("Scored among the 2 of the runs' 4 classes that it has")


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (("cat", "wolf"), ("cat", "dog"), r"do not|does not know \(wolf\): it has cat, wolf, and the run has cat, dog"),
        (("0", "1"), ("cat", "dog"), r"it has 0, 1, and the run has cat, dog"),
        (("Cat", "cat", "dog"), ("cat", "dog"), "several names of one class of the run: Cat, cat"),
        (("cat",), ("cat", "dog"), "shares 1 of its classes with the run"),
        ((WNIDS[0], "cat"), WNIDS, "does not know .cat.: it has n01440764, cat"),
        (WNIDS[:2], WNIDS[2:5], "shares 0 of its classes"),
        (("a b", "x"), ("a_b", "a-b", "x"), r"does not know \(a b\)"),  # reads like two
    ],
)
def test_classes_that_do_not_match_are_refused_with_both_lists(theirs, ours, message):
    with pytest.raises(DataError, match=message):
        match(theirs, ours, "here")


def test_classes_of_imagenet_match_by_id_name_and_number():
    from torchvision.models import ResNet18_Weights

    titles = ResNet18_Weights.DEFAULT.meta["categories"]
    assert len(WNIDS) == 1000 and sorted(WNIDS) == WNIDS
    some = [WNIDS[5], WNIDS[900], WNIDS[2]]
    for ours in (WNIDS, titles):
        assert match(some, ours, "R").outputs == (2, 5, 900)
    named = [titles[2], titles[5], titles[7]]
    found = match(some, named, "R")  # a run of three classes
    assert (found.outputs, found.labels, found.left_out) == ((0, 1), {WNIDS[2]: 0, WNIDS[5]: 1}, (WNIDS[900],))
    assert "Images of 1 classes that the runs do not know are left out." in found.note
    numbers = [str(number) for number in range(1000)]
    found = match(numbers, WNIDS[5:8], "V2")
    assert (found.outputs, found.labels) == (None, {"5": 0, "6": 1, "7": 2})


# --- CIFAR-10.1 and CIFAR-10.2 ----------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(cifar_new, "_CIFAR101", {"v4": 21, "v6": 20})
    monkeypatch.setattr(cifar_new, "_CIFAR102", 20)


def arrays(count, dtype=np.int64):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, count).astype(dtype)


def cifar101(root, versions=("v4", "v6")):
    root.mkdir(parents=True)
    for version in versions:
        images, labels = arrays({"v4": 21, "v6": 20}[version], np.int32)
        np.save(root / f"cifar10.1_{version}_data.npy", images)
        np.save(root / f"cifar10.1_{version}_labels.npy", labels)
    return root


@pytest.mark.parametrize("inside", ["", "datasets"])
def test_cifar_10_1(tmp_path, short, inside):
    place = cifar101(tmp_path / "CIFAR-10.1" / inside)
    (place / "README.md").write_text("extra")
    turned = tuple(reversed(CIFAR10))
    for name in ("cifar-10.1", str(tmp_path / "CIFAR-10.1")):
        shift = load_shift(name, dataset(turned, size=32), ALL, tmp_path)
        assert [(one.name, one.group, one.classes) for one in shift.sets] == [
            ("CIFAR-10.1 v4", "other", None),
            ("CIFAR-10.1 v6", "other", None),
        ]
        assert (shift.corruptions, shift.note) == ((), "")
        images, labels = arrays(20)
        assert np.array_equal(shift.sets[1].examples.images, images)
        assert shift.sets[1].labels.tolist() == (9 - labels).tolist()
    few = load_shift(name, dataset(size=32), torch.arange(7), tmp_path, seed=1).sets[0].examples
    assert len(few) == 7
    assert load_shift(name, dataset(size=16), ALL, tmp_path).sets[0].examples.shape == (16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "cifar10.1_v6_labels.npy").unlink(), "cannot read .*cifar10.1_v6_labels.npy: .*No such"),
        (lambda root: (root / "cifar10.1_v4_data.npy").unlink(), "cannot read .*cifar10.1_v4_data.npy: .*No such"),
        (lambda root: np.save(root / "cifar10.1_v6_data.npy", arrays(19)[0]), r"holds \(19, 32, 32, 3\) of uint8, not"),
        (lambda root: np.save(root / "cifar10.1_v6_data.npy", arrays(20)[0] / 255), "of float64, not the published"),
        (
            lambda root: np.save(root / "cifar10.1_v6_labels.npy", np.full(20, 10)),
            "label of image 0 .* is 10, not 0 to",
        ),
        (lambda root: np.save(root / "cifar10.1_v6_labels.npy", np.full(20, 1.0)), "of float64, not 20 integers"),
        (lambda root: np.save(root / "cifar10.1_v6_labels.npy", arrays(21)[1]), r"are \(21,\) of int64, not 20"),
        (
            lambda root: np.save(root / "cifar10.1_v6_labels.npy", np.array([{}] * 20, object), allow_pickle=True),
            "cannot read .*cifar10.1_v6_labels.npy: .*ython objects.*: fetch it again",
        ),
    ],
)
def test_cifar_10_1_that_is_not_the_published_one(tmp_path, short, change, message):
    change(cifar101(tmp_path / "CIFAR-10.1"))
    with pytest.raises(DataError, match=message):
        load_shift("CIFAR-10.1", dataset(size=32), ALL, tmp_path)


def test_cifar_10_1_of_a_run_with_other_classes(tmp_path, short):
    cifar101(tmp_path / "CIFAR-10.1")
    with pytest.raises(DataError, match=r"it has airplane, .*, truck, and the run has 0, 1, 2"):
        load_shift("CIFAR-10.1", dataset("0123456789", size=32), ALL, tmp_path)


def test_cifar_10_2(tmp_path, short):
    images, labels = arrays(20)
    np.savez(tmp_path / "cifar102_test.npz", images=images, labels=labels)
    np.savez(tmp_path / "cifar102_train.npz", images=images[:3], labels=labels[:3])
    (only,) = load_shift(str(tmp_path), dataset(size=32), ALL).sets
    assert (only.name, only.labels.tolist()) == ("CIFAR-10.2", labels.tolist())
    for change, message in (
        (lambda path: np.savez(path, images=images), "labels is not a file in the archive"),
        (lambda path: np.savez(path, images=images, labels=np.array([{}] * 20, object)), "cannot read .*ject arrays"),
        (lambda path: np.savez(path, images=np.zeros((90, 32, 32, 3), np.uint8), labels=labels), "more than 20 images"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "cannot read .*cifar102_test.npz: .*: fetch it again"),
        (lambda path: path.unlink(), "has no cifar102_test.npz: fetch it"),
        (lambda path: (tmp_path / "cifar102_test.npy").write_bytes(b"\x80"), "cifar102_test.npy is a pickle, which is"),
    ):
        change(tmp_path / "cifar102_test.npz")
        with pytest.raises(DataError, match=message):
            load_shift(str(tmp_path), dataset(size=32), ALL)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_cinic_10(tmp_path):
    place = folder(tmp_path / "CINIC-10", dict.fromkeys(("train", "valid", "test"), CIFAR10))
    (only,) = load_shift("cinic-10", dataset(), ALL, tmp_path).sets
    assert (only.name, only.group, only.source, len(only.examples)) == ("CINIC-10", "other", "folder", 20)
    assert [colour[0] for colour in colours(only.examples)] == [2] * 20
    assert only.labels.tolist() == [label for label in range(10) for _ in range(2)]
    for image in (place / "test" / "frog").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"test/frog holds no image: unpack the test set again, or remove the folder"):
        load_shift("cinic-10", dataset(), ALL, tmp_path)


CORRUPTED = {f"noise/gaussian_noise/{s}": WNIDS[:3] for s in range(1, 6)} | {
    f"blur/glass_blur/{s}": WNIDS[:3] for s in range(1, 6)
}


@pytest.mark.parametrize("grouped", [True, False])
def test_imagenet_c(tmp_path, grouped):
    sets = CORRUPTED if grouped else {place.partition("/")[2]: names for place, names in CORRUPTED.items()}
    folder(tmp_path / "imagenet-c", sets, suffix=".JPEG")
    (tmp_path / "imagenet-c" / "README.txt").write_text("extra")
    (tmp_path / "imagenet-c" / "noise.tar").write_text("extra")
    shift = load_shift("imagenet-c", dataset(WNIDS[1:4]), ALL, tmp_path)
    assert shift.source == "folder"
    assert {*shift.corruptions} == {"glass_blur", "gaussian_noise"}
    assert shift.headline == ("gaussian_noise", "glass_blur")
    assert len(shift.not_covered) == 17
    assert "2 corruptions at 5 severities. Scored among the 2 of the runs' 3 classes" in shift.note
    assert "Images of 1 classes that the runs do not know are left out." in shift.note
    for one in shift.sets:
        assert (one.group, one.classes, one.labels.tolist()) == ("shift", (0, 1), [0, 0, 1, 1])
    assert {one.severity for one in shift.sets if one.name == "glass_blur"} == {1, 2, 3, 4, 5}
    part = load_shift("imagenet-c", dataset(WNIDS[1:4]), torch.arange(3), tmp_path).sets
    assert len({tuple(one.labels.tolist()) for one in part}) == 1  # the same images in every cell


def test_imagenet_c_that_is_not_whole(tmp_path):
    root = folder(tmp_path / "imagenet-c", CORRUPTED)
    (missing := root / "noise" / "gaussian_noise" / "4").rename(tmp_path / "away")
    with pytest.raises(DataError, match="noise/gaussian_noise has no severity 4: unpack it again"):
        load_shift(str(root), dataset(WNIDS[:3]), ALL)
    (tmp_path / "away").rename(missing)
    image = missing / WNIDS[2] / "1.png"
    image.rename(image.with_name("7.png"))
    with pytest.raises(DataError, match=r"gaussian_noise/4 holds 6 images and .*/1 6, not the same ones"):
        load_shift(str(root), dataset(WNIDS[:3]), ALL)
    image.with_name("7.png").unlink()
    with pytest.raises(DataError, match=r"gaussian_noise/4 holds 5 images and .*/1 6, not the same ones"):
        load_shift(str(root), dataset(WNIDS[:3]), ALL)
    Image.new("RGB", (9, 7)).save(image)
    folder(root / "again", {f"glass_blur/{s}": WNIDS[:3] for s in range(1, 6)})
    with pytest.raises(DataError, match=r"glass_blur/1 and .*glass_blur/1 are the same corruption: remove one"):
        load_shift(str(root), dataset(WNIDS[:3]), ALL)


def test_severities_are_not_taken_for_classes(tmp_path):
    """Of digits, whose classes are called as severities are."""
    root = folder(tmp_path / "digits-c", {f"fog/{s}": "0123456789" for s in range(1, 6)})
    shift = load_shift(str(root), dataset("0123456789"), ALL)
    assert [(one.name, one.severity, len(one.examples)) for one in shift.sets] == [("fog", s, 20) for s in range(1, 6)]


@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a", "sketch"])
def test_parts_of_imagenet(tmp_path, name):
    place = tmp_path / name / "sketch" if name == "sketch" else tmp_path / name
    folder(place, {"": WNIDS[3:6]}, suffix=".jpg")
    (place / "README.txt").write_text("extra")
    (place / ".DS_Store").write_text("extra")
    (only,) = load_shift(name, dataset(WNIDS[:5]), ALL, tmp_path).sets
    assert (only.name, only.classes, only.labels.tolist()) == (name, (3, 4), [0, 0, 1, 1])
    assert [colour[1] for colour in colours(only.examples)] == [0, 0, 1, 1] or only.examples.files[0].endswith(".jpg")


def test_imagenet_v2(tmp_path):
    folder(tmp_path / "v2", {"": [str(number) for number in range(1000)]}, images=1)
    (only,) = load_shift("v2", dataset(WNIDS[9:12]), ALL, tmp_path).sets
    assert (only.classes, only.labels.tolist()) == (None, [1, 2, 0])  # 10, 11, 9: sorted as text
    assert [Path(file).parent.name for file in only.examples.files] == ["10", "11", "9"]


def test_a_folder_of_ones_own_is_named_by_its_path(tmp_path):
    sets = {"a/day": ("cat", "dog"), "a/night": ("cat",), "b/1/x": ("dog",)}
    root = folder(tmp_path / "mine", sets)
    shift = load_shift(str(root), dataset(("ant", "dog", "cat")), ALL)
    assert [one.name for one in shift.sets] == ["a/day", "a/night", "b/1/x"]
    assert [one.labels.tolist() for one in shift.sets] == [[1, 1, 0, 0], [1, 1], [0, 0]]
    assert {one.classes for one in shift.sets} == {(1, 2)}  # those of the whole folder
    assert [colours(one.examples)[0][0] for one in shift.sets] == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: folder(root, {"a": ["wolf"]}),
            r"has classes that the run does not know \(wolf\): it has cat, dog,",
        ),
        (lambda root: Image.new("RGB", (5, 5)).save(root / "x.png"), r"x\.png lies in no folder of a class"),
        (lambda root: folder(root, {"a/cat": ["old"]}), r"a/cat holds images and the folder old/ of images"),
        (lambda root: (root / "a" / "ant").mkdir(), "a/ant holds no image: unpack"),
    ],
)
def test_a_folder_that_cannot_be_told_is_refused(tmp_path, change, message):
    root = folder(tmp_path / "mine", {"a": ("cat", "dog")})
    change(root)
    with pytest.raises(DataError, match=message):
        load_shift(str(root), dataset(("ant", "cat", "dog")), ALL)


def test_what_is_no_test_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no image: name a folder of test images"):
        load_shift(str(tmp_path), dataset(), ALL)
    np.save(tmp_path / "fog.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"has fog\.npy but no labels\.npy"):
        load_shift(str(tmp_path), dataset(), ALL)
    with pytest.raises(UsageError, match=f"--shift nothing is none of cifar10c, .* and no folder in {tmp_path}"):
        load_shift("nothing", dataset(), ALL, tmp_path)


def test_two_test_sets_of_one_name_are_refused(tmp_path, short):
    images = smooth()
    one, other = official(tmp_path, images, ("fog",), "one"), official(tmp_path, images, ("fog",), "other")
    with pytest.raises(UsageError, match="each have corruptions: evaluate one of them at a time"):
        load_shifts([str(one), str(other)], images, ALL)
    for place in ("x/mine", "y/mine"):
        folder(tmp_path / place, {"": CIFAR10})
    with pytest.raises(UsageError, match="two test sets that are called mine"):
        load_shifts([str(tmp_path / "x/mine"), str(tmp_path / "y/mine")], dataset(), ALL)
    assert len(load_shifts([str(tmp_path / "x/mine")] * 2, dataset(), ALL)) == 1


def test_a_path_to_the_layout_of_cifar_10_c(tmp_path):
    images = smooth()
    place = official(tmp_path, images, ("fog",), "my-corruptions")
    shift = load_shift(str(place), images, ALL)
    assert (shift.source, shift.corruptions) == ("folder", ("fog",))
    assert shift.note == "Shift: the files of my-corruptions, 1 corruptions at 5 severities."
    (place / "labels.npy").unlink()
    with pytest.raises(DataError, match=r"has fog\.npy but no labels\.npy: fetch or generate it again"):
        load_shift(str(place), images, ALL)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class ClassLabel:
    def __init__(self, names):
        self.names = names


class FakeImage:
    def __init__(self, decode=True):
        self.decode = decode


FakeImage.__name__ = "Image"


class Rows:
    def __init__(self, images, labels, names, columns=("image", "label")):
        self.rows = [dict(zip(columns, pair, strict=True)) for pair in zip(images, labels, strict=True)]
        self.features = dict(zip(columns, (FakeImage(), ClassLabel(names)), strict=True))

    def __getitem__(self, column):
        return [row[column] for row in self.rows]

    def __iter__(self):
        return iter(self.rows)

    def select(self, places):
        self.rows = [self.rows[place] for place in places]
        return self

    def cast_column(self, column, feature):
        assert column == "image" and feature.decode is False
        return self


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The package ``datasets``, with one data set of four images."""
    place = folder(tmp_path / "hub", {"": ("cat", "dog")})
    found = {"labels": [1, 0, 0, 1], "names": ["cat", "dog"], "asked": [], "splits": ["train", "test"]}

    def load(name, configuration, *, split):
        found["asked"].append((name, configuration, split))
        if name == "nothing":
            raise FileNotFoundError("Dataset 'nothing' doesn't exist on the Hub\nor cannot be accessed")
        names = ("dog/0", "cat/1", "cat/0", "dog/1")
        images = [{"bytes": (place / f"{one}.png").read_bytes(), "path": None} for one in names]
        return Rows(images, found["labels"], found["names"])

    module = types.SimpleNamespace(
        load_dataset=load, get_dataset_split_names=lambda *_: found["splits"], Image=FakeImage
    )
    monkeypatch.setitem(sys.modules, "datasets", module)
    return found


def test_a_data_set_of_the_hub(hub):
    shift = load_shift("hf:someone/pets", dataset(("dog", "ant", "cat")), ALL)
    (only,) = shift.sets
    assert (only.name, only.source, only.classes) == ("hf:someone/pets", "hub", (0, 2))
    assert only.labels.tolist() == [0, 1, 1, 0]
    assert colours(only.examples) == [(0, 1, 0), (0, 0, 1), (0, 0, 0), (0, 1, 1)]
    load_shift("hf:pets@small:validation", dataset(("dog", "cat")), ALL)
    assert hub["asked"] == [("someone/pets", None, "test"), ("pets", "small", "validation")]


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (
            {},
            "hf:nothing",
            "cannot load hf:nothing: Dataset 'nothing' doesn't exist on the Hub or cannot be accessed: check",
        ),
        ({"splits": ["train"]}, "hf:pets", "hf:pets has the splits train: name one, as in hf:pets:train"),
        ({"labels": [1, 0, -1, 1]}, "hf:pets", "image 2 of hf:pets has no class"),
        ({"names": ["cat", "wolf"]}, "hf:pets", r"does not know \(wolf\): it has cat, wolf, and the run has dog, cat"),
    ],
)
def test_a_data_set_of_the_hub_that_does_not_fit(hub, change, name, message):
    hub |= change
    with pytest.raises(DataError, match=message):
        load_shift(name, dataset(("dog", "cat")), ALL)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"hf:pets is read with the package datasets: pip install 'ensembler\[datas"):
        load_shift("hf:pets", dataset(), ALL)


# --- in a report ------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: _small.dataset())
    return train(_small.dataset(), DeepEnsemble(members=2), Settings(**SETTINGS)).save(tmp_path / "runs" / "deep")


def test_scores_are_of_the_restricted_logits(run, tmp_path):
    """By hand: the logits of the two classes that the folder has, their softmax, the mean of the members."""
    first, *_, last = _small.dataset().classes
    root = folder(tmp_path / "mine", {"": (last, first)}, images=5)
    found = evaluation.evaluate_paths(
        [run], EvaluationOptions(shift=[str(root)], device="cpu", cache=tmp_path / "kept")
    )
    (one,), scores = found.report.others, found.report.runs[0].others["mine"]
    ensemble = Ensemble.load(run, device="cpu")
    ours = ensemble.classes
    assert (one.name, one.images, one.classes) == ("mine", 10, [0, len(ours) - 1])
    (test_set,) = load_shift(str(root), _small.dataset(), ALL).sets
    images = torch.cat([batch.images for batch in test_set.examples.batches(100)])
    mean = ensemble.predict_outputs(images)[..., [0, -1]].double().softmax(-1).mean(0)
    nll = -mean[torch.arange(10), torch.tensor(test_set.labels)].log().mean().item()
    assert scores.nll == pytest.approx(nll, rel=1e-5)
    assert test_set.labels.tolist() == [0] * 5 + [1] * 5
    # The same images among other outputs are another prediction, and none is taken from the cache.
    everything = dataclasses.replace(test_set, classes=None)
    predictor = evaluation.Predictor(ensemble, tmp_path / "kept")
    assert predictor.entry(everything).path != predictor.entry(test_set).path
    assert predictor.entry(test_set).path.exists()


def test_the_command_shows_every_test_set(run, tmp_path):
    names = _small.dataset().classes
    root = folder(tmp_path / "mine", {"day": names, "night": names}, images=1)
    out = tmp_path / "report"
    arguments = ["eval", str(run), "--shift", str(root), "--shift", "corruptions", "--out", str(out), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert [one["name"] for one in report["others"]] == ["day", "night"]
    assert report["shift"]["source"] == "generated"
    text = (out / "report.md").read_text()
    assert f"day: {len(names)} images (folder)" in text
    assert "other night" in (out / "report.csv").read_text()
    assert "Other test sets" in (out / "report.html").read_text()
    result = CliRunner().invoke(
        app, [*arguments[:2], "--shift", str(root), "--save-predictions", str(tmp_path / "p.npz")]
    )
    assert result.exit_code == 1
    assert "--save-predictions saves no other test sets: leave out --shift" in result.stderr
    assert not (tmp_path / "p.npz").exists()
