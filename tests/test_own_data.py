"""Data of one's own: the same pixels however they are given, one sentence for each fault, and runs that find them."""

from __future__ import annotations

import random
import shutil
import sys
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    random_split,
)
from torchvision.transforms import v2

from ensembler import as_dataset, calibration
from ensembler.data import datasets
from ensembler.data.decoding import read_image
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.eval.calibrate import calibrate
from ensembler.eval.evaluation import evaluate_paths
from ensembler.eval.options import CalibrationOptions, EvaluationOptions, SurfaceOptions
from ensembler.eval.shift.ood import load_ood
from ensembler.eval.shift.writer import write_corruptions
from ensembler.eval.surface import measure_surface
from ensembler.naming import import_object
from ensembler.run import Run
from ensembler.serve.export.bundle import export_run
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.runtime import Runtime
from ensembler.trainers import DeepEnsemble, Settings, collapse_run, train
from tests._small import SETTINGS
from tests.test_cli import call

SIZE = 8


def pixels(count=30, seed=0, size=SIZE, channels=3):
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bars(count=60, size=SIZE, seed=0):
    """Noise, of which the third that is brighter is the class."""
    images = np.random.default_rng(seed).integers(0, 120, (count, size, size, 3), dtype=np.uint8)
    labels = np.arange(count) % 3
    for image, label in zip(images, labels, strict=True):
        image[label * size // 3 : (label + 1) * size // 3] += 100
    return images, labels


class Own(Dataset):
    """A map-style dataset as PyTorch's tutorials write one."""

    def __init__(self, images, labels, transform=lambda image: image):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


class Named(Own):
    classes = ("cat", "dog", "emu")


def hashes(dataset):
    return [part.sha256 for part in (dataset.train, dataset.validation, dataset.test)]


# --- the same pixels, however they are given --------------------------------------------------------------------------

FORMS = {
    "channels first": lambda x, y: (x.transpose(0, 3, 1, 2), y),
    "tensors": lambda x, y: (torch.tensor(x), torch.tensor(y)),
    "a list of labels": lambda x, y: (x, y.tolist()),
    "a list of both": lambda x, y: [x, y],
    "labels in a column": lambda x, y: (x, y[:, None]),
    "int64 pixels": lambda x, y: (x.astype(np.int64), y),
    "floats": lambda x, y: (x / np.float32(255), y),
    "float64": lambda x, y: (x / 255, y),
    "float16 tensors, channels first": lambda x, y: (torch.tensor(x / 255).half().permute(0, 3, 1, 2), y),
    "PIL images": lambda x, y: ([Image.fromarray(one) for one in x], y),
    "pairs": lambda x, y: list(zip(x, y.tolist(), strict=True)),
    "a dataset": Own,
    "a dataset of PIL images": lambda x, y: Own([Image.fromarray(one) for one in x], y.tolist()),
    "ToTensor": lambda x, y: Own(x, torch.tensor(y), v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])),
    "a Subset": lambda x, y: Subset(Own(np.concatenate([x, x]), np.concatenate([y, y])), range(len(x))),
    "a DataLoader": lambda x, y: DataLoader(Own(x, y), batch_size=7, shuffle=True),
    "a DataLoader of a part": lambda x, y: DataLoader(
        Own(np.concatenate([x, 255 - x]), np.concatenate([y, y])), sampler=SubsetRandomSampler(range(len(x)))
    ),
    "an array of objects": lambda x, y: (np.array([*x, None], dtype=object)[:-1], y),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_dataset_whatever_it_is_made_of(form):
    x, y = bars()
    expected, found = as_dataset((x, y)), as_dataset(FORMS[form](x, y))
    assert hashes(found) == hashes(expected)
    assert (found.mean, found.std, found.classes) == (expected.mean, expected.std, expected.classes)


def test_pixels_labels_and_moments_by_hand():
    x, y = bars()
    dataset = as_dataset((x, y), (x[:9], y[:9]), (x[9:15], y[9:15]), classes=["a", "b", "c"], name="bars")
    assert torch.equal(dataset.train.images, torch.tensor(x))
    assert dataset.train.labels.dtype == torch.int64
    assert (dataset.name, dataset.title, dataset.classes) == ("bars", "bars", ("a", "b", "c"))
    assert np.allclose(dataset.mean, (x / 255).mean((0, 1, 2)))
    assert np.allclose(dataset.std, (x / 255).std((0, 1, 2)))
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [60, 6, 9]
    assert list(dataset.notes) == [
        "bars: 75 images of 3 classes, 60 to train on, 6 for validation, 9 for testing",
        "6 of 6 validation images are training images, too (such as number 0, which is 9): scores on them are too good",
        "9 of 9 test images are training images, too (such as number 0, which is 0): scores on them are too good",
    ]
    x[:] = 0  # the user's array is not the dataset's
    assert dataset.train.images.max() > 0
    half = as_dataset((pixels(), np.arange(30) % 2), normalisation="half")
    assert (half.mean, half.std) == ((0.5,) * 3, (0.5,) * 3)


def test_what_is_not_given_is_held_out_stratified_and_alike_every_time():
    x, y = bars(100)
    dataset = as_dataset((x, y))
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [72, 8, 20]
    assert sorted(torch.bincount(dataset.test.labels).tolist()) == [6, 7, 7]
    held = {image.tobytes() for part in (dataset.validation, dataset.test) for image in part.images.numpy()}
    assert len(held) == 28
    assert not held & {image.tobytes() for image in dataset.train.images.numpy()}
    assert "(a fifth of train, as there is no test)" in dataset.notes[0]
    assert hashes(as_dataset((x, y))) == hashes(dataset)
    assert len(as_dataset((x, y), (x, y), validation_share=0.3).validation) == 30


def test_grey_and_transparent_images_and_files_as_files_are_read(tmp_path):
    grey, y = pixels(channels=1), np.arange(30) % 3
    three = hashes(as_dataset((grey.repeat(3, axis=3), y)))
    for given in (grey, grey[..., 0], grey.transpose(0, 3, 1, 2), [Image.fromarray(one[..., 0]) for one in grey]):
        assert hashes(as_dataset((given, y))) == three
    rgba = pixels(channels=4)
    opaque = rgba[..., 3:] / 255
    white = np.rint(rgba[..., :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    for given in (rgba, rgba.transpose(0, 3, 1, 2), [Image.fromarray(one) for one in rgba]):
        assert hashes(as_dataset((given, y))) == hashes(as_dataset((white, y)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    Image.fromarray(pixels(1, size=9)[0][:6]).save(tmp_path / "a.png", exif=exif)
    turned = [Image.open(tmp_path / "a.png")] * 6
    found = as_dataset((turned, [0, 1] * 3))
    assert np.array_equal(found.train.images[0], read_image(tmp_path / "a.png"))
    assert found.train.shape == (9, 6)


def test_image_size_resizes_as_files_are(tmp_path):
    images = [Image.fromarray(pixels(1, index, 8 + index % 3)[0]) for index in range(12)]
    dataset = as_dataset((images, np.arange(12) % 2), (images, np.arange(12) % 2), image_size=10)
    for index, image in enumerate(images):
        image.save(tmp_path / "a.png")
        assert np.array_equal(dataset.test.images[index], read_image(tmp_path / "a.png", (10, 10)))
    x = pixels(12)
    one_by_one, at_once = (as_dataset((form(x), np.arange(12) % 2), image_size=5) for form in (list, np.asarray))
    assert hashes(one_by_one) == hashes(at_once)
    assert one_by_one.train.shape == (5, 5)


def test_names_of_classes_are_taken_from_the_dataset():
    parts = random_split(Named(X, Y), [30, 30])
    assert as_dataset(ConcatDataset(parts)).classes == as_dataset(parts[0]).classes == as_dataset(Named(X, Y)).classes
    assert as_dataset((X, Y), classes=np.array(["a", "b", "c"])).classes == ("a", "b", "c")
    x, y = bars()
    assert as_dataset(Named(x, y)).classes == ("cat", "dog", "emu")
    assert as_dataset(Subset(Named(x, y), range(0, 60, 2))).classes == ("cat", "dog", "emu")
    assert as_dataset(Named(x, y), classes=["a", "b", "c"]).classes == ("a", "b", "c")
    few = as_dataset(Subset(Named(x, y), [index for index in range(60) if index % 3 < 2]))
    assert few.classes == ("cat", "dog", "emu")
    assert any(note.startswith("classes without an image: 1 in the train images (emu)") for note in few.notes)


def test_rows_of_features():
    rng, y = np.random.default_rng(0), np.arange(30) % 3
    x = rng.normal(3, 2, (30, 4))
    x[:, 3] = 7  # constant
    dataset = as_dataset((x, y), (x, y), (x, y))
    assert (dataset.train.kind, dataset.augmentation) == ("arrays", "none")
    assert torch.equal(dataset.train.data, torch.tensor(x, dtype=torch.float32))
    assert np.allclose(dataset.mean, x.mean(axis=0), atol=1e-6)
    assert np.allclose(dataset.std, [*x[:, :3].std(axis=0), 1], atol=1e-6)
    assert hashes(as_dataset(Own(torch.tensor(x), y), (x, y), (x, y))) == hashes(dataset)
    assert hashes(as_dataset((torch.tensor(x).bfloat16(), y)))[0] != hashes(dataset)[0]
    assert dataset.notes[0].startswith("own data: 90 rows of 3 classes")


# --- one sentence for each fault --------------------------------------------------------------------------------------

X, Y = bars()
FLOAT = X.astype(np.float32) / 255


def at(array, index, value):
    array = array.copy()
    array[index] = value
    return array


class Failing(Own):
    def __getitem__(self, index):
        if index == 17:
            raise KeyError("lost")
        return super().__getitem__(index)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Triples(Own):
    def __getitem__(self, index):
        return (*super().__getitem__(index), index)


class Dicts(Own):
    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.labels[index]}


class Nameless(Own):
    @property
    def classes(self):
        raise NotImplementedError("later")


def shaky(image):
    return image if random.random() < 0.5 else image[::-1].copy()


normalise = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
flips = v2.Compose([v2.ToImage(), v2.RandomHorizontalFlip()])
sizes = [image if index else image[:5] for index, image in enumerate(X)]

FAULTS = {
    "labels from 1": ((X, Y + 1), "no image of train has the label 0, and classes count from 0 to 3: renumber"),
    "a gap": ((X, Y * 2), "no image of train has the label 1, 3, and classes count from 0 to 4"),
    "float labels": ((X, Y.astype(float)), r"labels that are floats, such as 0.0, .*give labels.astype\('int64'\)"),
    "NaN labels": ((X, Y * np.nan), "labels that are floats, such as nan"),
    "truths": ((X, Y > 1), r"labels that are true or false, .*give labels.astype\('int64'\)"),
    "text": ((X, ["cat"] * 60), r"labels that are text, such as cat, .*: give classes.index\(label\)"),
    "text one by one": (Own(X, ["cat"] * 60), "image 0 of train: labels that are text, such as cat"),
    "one-hot": (
        (X, np.eye(3)[Y]),
        "the labels of train: labels of 3 numbers, .*if they are one-hot, give their argmax",
    ),
    "one-hot one by one": (Own(X, np.eye(3)[Y]), "image 0 of train: labels of 3 numbers, .*argmax"),
    "None": (Own(X, [None] * 60), "image 0 of train: labels that are no numbers"),
    "unlabelled": ((X, at(Y, 5, -1)), "the label -1, and classes count from 0: leave out images without a class"),
    "unlabelled one by one": (Own(X, at(Y, 5, -1)), "image 5 of train: the label -1"),
    "unlabelled, unsigned": ((X, at(Y, 5, -1).astype(np.uint64)), "the label 18446744073709551615, and classes count"),
    "numbers of something": ((X, at(Y, 5, 10**9)), "the label 1000000000, and classes count from 0"),
    "masked labels": ((X, np.ma.masked_equal(Y, 2)), "the labels of train: 20 masked entries, which have no value"),
    "masked images": ((np.ma.masked_equal(X, X[0, 0, 0, 0]), Y), r"the images of train: [\d,]+ masked entries"),
    "masked one by one": (Own(np.ma.masked_equal(X, X[0, 0, 0, 0]), Y), "image 0 of train: 1 masked"),
    "sparse": ((torch.tensor(X).to_sparse(), Y), "the images of train: a sparse, nested or quantized tensor"),
    "meta": ((torch.empty(60, 8, 8, 3, device="meta"), Y), "the images of train: a tensor on the device meta"),
    "nothing": (None, "train is a NoneType, expected"),
    "no pixels": ((X[:, :0], Y), "the images of train: 0 x 8 x 3, which holds no pixel"),
    "no features": ((np.ones((60, 0)), Y), "the rows of train hold no feature"),
    "rows beyond float32": ((np.full((60, 4), 1e300), Y), "row 0 of train has a number that is not finite in float32"),
    "joined names": (
        ConcatDataset([Named(X, Y), type("Other", (Own,), {"classes": ("cat", "emu", "dog")})(X, Y)]),
        r"train joins datasets of different classes \(.*\), so that a label means two things",
    ),
    "joined with no names": (ConcatDataset([Named(X, Y), Own(X, Y)]), "train joins datasets of different classes"),
    "classes that fail": (Nameless(X, Y), "cannot read the classes of train: NotImplementedError: later"),
    "one class": ((X, Y * 0), "all images have the same label: at least two classes"),
    "length": ((X, Y[:50]), "train has 60 images and 50 labels: give one label an image"),
    "empty": ((X[:0], Y[:0]), "train has no image"),
    "no list": ([], "train has no image"),
    "few": ((X[:3], Y[:3]), "own data: too few images to hold any out: 3 of 3 classes"),
    "iterable": (Stream(), "train is a Stream, .*only iterated over, give list"),
    "a loader of an iterable": (DataLoader(Stream()), "train is a Stream, "),
    "a generator": (iter([]), "train is a list_iterator, "),
    "no labels": (X, r"train is a ndarray without labels: give \(images, labels\)"),
    "a dict": ({"x": X, "y": Y}, "train is a dict without labels"),
    "a pair of datasets": ((Own(X, Y), Own(X, Y)), r"pair of datasets: give as_dataset\(train, test\)"),
    "three values": (Triples(X, Y), r"image 0 of train is 3 values, expected a pair \(image, label\)"),
    "dicts": (Dicts(X, Y), r"image 0 of train is a dict of 'image', 'label', expected a pair"),
    "an error": (Failing(X, Y), r"cannot read image 17 of train: KeyError: 'lost' \(test_own_data.py, line \d+\)"),
    "paths": ((["a.png"] * 60, Y), "image 0 of train is a str, expected a PIL image, an array or a tensor"),
    "sizes": ((sizes, Y), r"image 1 of train is 8 x 8 pixels and the first 8 x 5: give image_size \(--image-size\)"),
    "Normalize": (Own(X, Y, normalise), "image 0 of train: numbers from -1 .*: leave out Normalize, as the package"),
    "normalised": (
        (FLOAT * 2 - 1, Y),
        "the images of train: numbers from -1 .* not pixels from 0 to 1: leave out Norm",
    ),
    "floats to 255": ((X.astype(float), Y), "numbers from 0 to 219, not pixels from 0 to 1: .*give them as uint8"),
    "16 bits": ((X.astype(np.uint16) * 257, Y), "numbers from 0 to 56283, not pixels from 0 to 255: scale them"),
    "negative": ((X.astype(int) - 128, Y), "numbers from -128 to 91, not pixels from 0 to 255"),
    "NaN": ((at(FLOAT, 3, np.nan), Y), "the images of train: numbers that are not finite"),
    "NaN one by one": (Own(at(FLOAT, 3, np.nan), Y), "image 3 of train: numbers that are not finite"),
    "a mask": ((X > 99, Y), r"the images of train: bool, not pixels: give \(images \* 255\).astype\('uint8'\)"),
    "complex": ((X.astype(complex), Y), "complex128, not pixels"),
    "five channels": (
        (np.concatenate([X, X[..., :2]], 3), Y),
        "8 x 8 x 5, where neither the first nor the last number",
    ),
    "either": ((pixels(60, size=3), Y), "3 x 3 x 3, of which the first or the last number could be the channels"),
    "five dimensions": ((X[:, None], Y), r"1 x 8 x 8 x 3, expected \(H, W\), \(H, W, C\) or \(C, H, W\)"),
    "random": (
        Own(X, Y, shaky),
        r"image \d+ of train is another one each time that it is read: leave random transforms",
    ),
    "random flips": (Own(X, Y, flips), r"image \d+ of train is another one each time"),
    "rows with NaN": ((at(np.ones((60, 4)), (7, 2), np.nan), Y), "row 7 of train has a number that is not finite"),
    "rows of text": ((np.full((60, 4), "a"), Y), "the rows of train: <U1, expected numbers"),
    "a sampler": (DataLoader(Own(X, Y), sampler=WeightedRandomSampler([1.0] * 60, 60)), "by a WeightedRandomSampler"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_examples(fault):
    given, message = FAULTS[fault]
    with pytest.raises((DataError, UsageError), match=message) as caught:
        as_dataset(given)
    assert "\n" not in str(caught.value)


class RandomLabels(Own):
    def __getitem__(self, index):
        return self.images[index], random.randrange(3)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (RandomLabels(X, Y), {}, r"image \d+ of train is another one each time"),
        ((X, Y), {"test": (X, Y + 3)}, "test has the label 5, and the 3 classes .* count from 0 to 2"),
        ((X, Y), {"test": (X[:, :5], Y)}, "examples of train are 8 x 8 x 3 and those of test 5 x 8 x 3: .*image_size"),
        ((X, Y), {"test": (np.ones((60, 4)), Y)}, "examples of train are 8 x 8 x 3 and those of test 4"),
        ((X, Y), {"test": (X, Y[:3])}, "test has 60 images and 3 labels"),
        ((X, Y), {"validation": ([], [])}, "validation has no image"),
        ((X, Y), {"classes": ["a", "b"]}, r"train has the label 2, and the 2 classes \(a, ...\) count from 0 to 1"),
        ((X, Y), {"classes": ["a", "b", "a"]}, "two classes are called 'a'"),
        ((X, Y), {"classes": "abc"}, "classes must be a list of text or an? ndarray, not 'abc'"),
        ((X, Y), {"classes": {"a", "b", "c"}}, "classes must be a list of text .* type set"),  # in no order
        ((X, Y), {"classes": {"a": 1, "b": 0, "c": 2}}, "classes must be a list of text"),
        ((X, Y), {"classes": [1, 2, 3]}, r"classes must be a list of text or a ndarray, not \[1, 2, 3\]"),
        ((X, Y), {"classes": np.array([1, 2, 3])}, "classes are names in label order"),
        ((X, Y), {"name": "cifar10"}, "'cifar10' is no name for data of your own"),
        ((X, Y), {"name": "folder:x"}, "'folder:x' is no name for data of your own"),
        ((X, Y), {"image_size": 0}, "image_size must be at least 1 pixel"),
        ((X, Y), {"image_size": 10**7}, r"60 images of 10000000 x 10000000 pixels take .* GiB in memory"),
        ((list(X), Y), {"image_size": 10**7}, r"60 images of 10000000 x 10000000 pixels take .* GiB in memory"),
        ((X, Y), {"validation_share": 1}, "validation_share must be between 0 and 1"),
        ((X, Y), {"normalisation": "no"}, "--normalisation must be"),
        ((np.ones((60, 4)), Y), {"image_size": 4}, "train holds rows of features, not images: leave out image_size"),
        (
            Named(X, Y),
            {"test": type("Other", (Own,), {"classes": ("cat", "emu", "dog")})(X, Y)},
            "train and test have different classes .'dog' and 'emu' in one place.",
        ),
    ],
)
def test_faults_of_options_and_of_splits_beside_each_other(given, options, message):
    with pytest.raises((DataError, UsageError), match=message):
        as_dataset(given, **options)


def test_data_larger_than_memory_are_refused_before_they_are_read(monkeypatch):
    read = []

    class Large(Own):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("ensembler.data.own_data.MEMORY_LIMIT", 3 * SIZE * SIZE * 70)
    as_dataset(Large(X, Y))
    read.clear()
    with pytest.raises(
        UsageError, match=r"120 images of 8 x 8 pixels take 0.0 GiB in memory, and the limit is .*in_mem"
    ):
        as_dataset(Large(X, Y), Own(X, Y))
    assert set(read) == {0}
    assert len(as_dataset(Large(X, Y), Own(X, Y), in_memory=True).test) == 60


def test_dark_images_are_said():
    assert any("brighter than 1 of 255" in note for note in as_dataset((X // 200, Y)).notes)


# --- data modules of Lightning ----------------------------------------------------------------------------------------


class Bars:
    """A ``LightningDataModule`` by its methods."""

    def __init__(self):
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        if stage == "fit":
            self.train, self.held = Subset(Named(X, Y), range(40)), Subset(Named(X, Y), range(40, 50))
        else:
            self.tested = Subset(Named(X, Y), range(50, 60))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=8, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return [DataLoader(self.held, batch_size=8)]

    def test_dataloader(self):
        return DataLoader(self.tested, batch_size=8)


def test_a_data_module_gives_its_three_splits():
    module = Bars()
    dataset = as_dataset(module)
    assert module.calls == ["prepare_data", "fit", "test"]
    for part, rows in ((dataset.train, X[:40]), (dataset.validation, X[40:50]), (dataset.test, X[50:])):
        assert torch.equal(part.images, torch.tensor(rows))
    assert dataset.classes == ("cat", "dog", "emu")


def test_what_a_data_module_lacks_is_held_out(monkeypatch):
    for method in ("val_dataloader", "test_dataloader"):
        monkeypatch.setattr(Bars, method, lambda self: None)
    dataset = as_dataset(Bars())
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [28, 4, 8]

    def not_overridden(self):
        raise NotImplementedError("`val_dataloader` must be implemented")

    not_overridden.__module__ = "lightning.pytorch.core.hooks"
    monkeypatch.setattr(Bars, "val_dataloader", not_overridden)
    assert hashes(as_dataset(Bars())) == hashes(dataset)
    module = Bars()  # as LightningDataModule.from_datasets sets methods of the instance
    module.test_dataloader = lambda: DataLoader(Own(X, Y))
    module.test_dataloader.__module__ = not_overridden.__module__
    assert len(as_dataset(module).test) == 60


def test_faults_of_data_modules_and_loaders(monkeypatch):
    with pytest.raises(UsageError, match="Bars has its own validation and test images"):
        as_dataset(Bars(), (X, Y))
    mixing = DataLoader(Own(X, Y), collate_fn=lambda batch: batch)
    assert any("lambda>) is not used in train" in note for note in as_dataset(mixing).notes)
    monkeypatch.setattr(Bars, "val_dataloader", lambda self: [1, 2])
    with pytest.raises(UsageError, match=r"Bars.val_dataloader\(\) returns 2 loaders: return one"):
        as_dataset(Bars())
    monkeypatch.setattr(Bars, "train_dataloader", lambda self: None)
    monkeypatch.setattr(Bars, "val_dataloader", lambda self: None)
    with pytest.raises(UsageError, match=r"Bars.train_dataloader\(\) returns no loader"):
        as_dataset(Bars())
    monkeypatch.setattr(Bars, "setup", lambda self, stage: 1 / 0)
    with pytest.raises(DataError, match=r"Bars\.<lambda>\(\) failed: ZeroDivisionError: .*test_own_data.py"):
        as_dataset(Bars())


# --- by name ----------------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np
from torch import nn
from torch.utils.data import Dataset
from ensembler import as_dataset

class Bars(Dataset):
    classes = ["top", "middle", "bottom"]

    def __init__(self, count=90, seed=0):
        self.images = np.random.default_rng(seed).integers(0, 120, (count, 32, 32, 3), dtype=np.uint8)
        self.labels = np.arange(count) % 3
        for image, label in zip(self.images, self.labels):
            image[10 * label : 10 * label + 10] += 100

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], int(self.labels[index])

def bars():
    return as_dataset(Bars(), Bars(30, 1), name="bars")

pairs = Bars()
whole = bars()
rng = np.random.default_rng(0)
rows = lambda: ((x := np.random.default_rng(0).normal(size=(200, 4))), x[:, :3].argmax(axis=1))

def drawn():
    return as_dataset((np.random.randint(0, 256, (30, 8, 8, 3)), np.arange(30) % 3))

def broken():
    return {}["lost"]

def net(num_classes):
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, num_classes))

def linear(num_classes):
    return nn.Linear(4, num_classes)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with ``bars_data.py``, where commands run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bars_data.py").write_text(MODULE)
    yield tmp_path / "bars_data.py"
    sys.modules.pop("bars_data", None)


def test_names_of_modules_and_files(module):
    named = datasets.load("bars_data:bars")
    assert (named.name, named.title, named.classes) == ("bars_data:bars", "bars", ("top", "middle", "bottom"))
    for name in ("bars_data.py:bars", "./bars_data.py:bars", f"{module}:bars", "bars_data:whole"):
        found = datasets.load(name)
        assert (found.name, hashes(found)) == (name, hashes(named))
    bare = datasets.load("bars_data:pairs")
    assert (bare.title, len(bare.test)) == ("bars_data:pairs", 18)
    assert hashes(datasets.load("bars_data:Bars")) == hashes(bare)
    small = datasets.load("bars_data:bars", image_size=16)
    assert small.test.shape == (16, 16)
    assert small.mean == datasets.moments(small.train)[0]
    assert len(datasets.load("bars_data:pairs", validation=0.5).validation) == 36
    for name, options, message in (
        ("bars_data:broken", {}, r"'bars_data:broken' cannot be made: KeyError: 'lost' \(bars_data.py, line \d+\)"),
        ("bars_data:np", {}, "train is a module, expected"),
        ("bars_data:nothing", {}, "has no attribute 'nothing'"),
        ("bars_data:bars", {"in_memory": False}, "bars_data:bars is always in memory and whole"),
        ("bars_data:rows", {"image_size": 4}, "holds rows of features, not images"),
        ("elsewhere.py:bars", {}, "there is no file"),
        ("../bars_data.py:bars", {}, "there is no file"),
    ):
        with pytest.raises((DataError, UsageError), match=message):
            datasets.load(name, **options)


def test_a_file_is_never_taken_for_another_module(module, monkeypatch):
    shutil.copy(module, "json.py")  # the standard library's is imported
    with pytest.raises(UsageError, match=r"another module is called json, .*: rename the file"):
        import_object("json.py:bars", "dataset")
    shutil.copy(module, "my-data.py")
    with pytest.raises(UsageError, match="'my-data' is no name of a module: rename it"):
        import_object("my-data.py:bars", "dataset")
    (module.parent / "below").mkdir()
    shutil.copy(module, "below/data.py")
    assert len(import_object("below/data.py:bars", "dataset")().test) == 30
    monkeypatch.chdir("below")
    with pytest.raises(UsageError, match="is not in this folder or below it: run the command in its folder"):
        import_object("../bars_data.py:bars", "dataset")


SHORT = ["--epochs", "1", "--device", "cpu", "--members", "2", "--arch", "bars_data.py:net"]


def test_a_dataset_by_name_is_trained_evaluated_under_shift_calibrated_exported_and_predicted(module):
    """Every command finds the data by the name that the run has."""

    def done(*arguments):
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        return result.output

    said = done("train-deep-ensemble", "--dataset", "bars_data.py:bars", *SHORT, "--out", "run")
    assert "deep-ensemble of 2 members on bars" in said
    record = Run.load("run").manifest.dataset
    expected = datasets.load("bars_data:bars")
    assert record.name == "bars_data.py:bars"
    assert [record.train_sha256, record.validation_sha256, record.test_sha256] == hashes(expected)
    done("calibrate", "run")
    assert "6 test images of bars" in done("eval", "run", "--shift", "cifar10c", "--examples", "6", "--out", "report")
    done("collapse", "run", "--out", "mean")
    done("train-fge", "--init", "run", "--members", "1", "--cycle", "1", "--epochs", "1", "--out", "fge")
    assert Run.load("fge").manifest.dataset.name == "bars_data.py:bars"
    done("export", "run", "--out", "bundle")
    assert read_bundle(module.parent / "bundle").validation is not None  # the images were found
    images = expected.test.images[:4].numpy()
    with closing(Runtime.load(module.parent / "bundle")) as runtime:
        served = runtime.predict_members(images).mean(axis=0)
    assert np.allclose(served, Ensemble.load("run", device="cpu").predict_proba(images), atol=1e-4)
    Image.fromarray(images[1]).save("image.png")
    assert "middle" in done("predict", "bundle", "image.png")

    # The data have changed, or are elsewhere.
    sys.modules.pop("bars_data")
    module.write_text(MODULE.replace("+= 100", "+= 90"))
    for command in (["eval", "run"], ["calibrate", "run"], ["collapse", "run", "--out", "other"]):
        result = call(*command)
        assert result.exit_code == 1
        assert (
            "bars is not what the run was trained on, or has changed since (its training images differ)"
            in result.output
        )
    sys.modules.pop("bars_data")
    module.rename("moved.py")
    moved = module.with_name("moved.py")
    moved.write_text(MODULE)
    result = call("eval", "run")
    assert result.exit_code == 1
    assert "there is no file" in result.output
    assert "run the command in the module's folder, or name the dataset anew (--dataset" in result.output
    module.write_text(MODULE.replace("+= 100", "+= 90"))  # the network is where it was, and the data are not
    assert "calibration: " in done("calibrate", "run", "--dataset", "moved:bars")
    sys.modules.pop("moved")


def test_rows_of_features_by_name_are_evaluated_and_calibrated(module):
    settings = Settings(architecture="bars_data:linear", epochs=1, device="cpu")
    run = train("bars_data:rows", DeepEnsemble(members=3), settings)
    run.save("rows")
    report = evaluate_paths([module.parent / "rows"], EvaluationOptions(device="cpu")).report
    assert report.test_examples == 40
    (scored,) = report.runs
    test = datasets.load("bars_data:rows").test
    wrong = Ensemble(run, "cpu").predict_proba(test.data).argmax(dim=1) != test.labels
    assert scored.clean.error == pytest.approx(wrong.float().mean().item())
    assert calibrate(module.parent / "rows", CalibrationOptions(device="cpu")).fitted == 8
    surface = measure_surface([module.parent / "rows"], options=SurfaceOptions(grid=2, device="cpu"))
    assert surface.dataset == "bars_data:rows"
    for given in ({"shift": ["cifar10c"]}, {"ood": ["noise:uniform"]}):
        with pytest.raises(UsageError, match=r"bars_data:rows holds no images but rows \(arrays\), which --"):
            evaluate_paths([module.parent / "rows"], EvaluationOptions(device="cpu", **given))
    with pytest.raises(UsageError, match="bars_data:rows holds no images"):
        load_ood("bars_data:rows", (8, 8))
    with pytest.raises(UsageError, match="bars_data:rows holds no images"):
        write_corruptions(datasets.load("bars_data:rows"), module.parent / "corrupted")
    assert load_ood("bars_data:bars", (8, 8)).title == "bars, test images"


def test_what_is_drawn_anew_is_found_by_its_hash(module):
    settings = Settings(**SETTINGS | {"epochs": 1})
    train("bars_data:drawn", DeepEnsemble(members=1), settings).save("drawn")
    with pytest.raises(
        DataError, match=r"or has changed since .*: seed whatever is drawn in it, such as a random split"
    ):
        calibrate(module.parent / "drawn", CalibrationOptions(device="cpu"))


def test_a_run_of_data_without_a_name_takes_them_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = Own(X, Y)
    run = train(data, DeepEnsemble(members=3), Settings(**SETTINGS | {"epochs": 1}))
    path = run.save("run").resolve()
    for command in ("eval", "calibrate", "surface", "collapse"):
        result = call(command, "run")
        assert result.exit_code == 1
        assert "error: own data was given from Python and cannot be loaded by name" in result.output.replace("\n", " ")
        assert "(--dataset)" in result.output
    ensemble = Ensemble(run, "cpu")
    assert ensemble.evaluate(dataset=data).report == evaluate_paths(path, dataset=data).report
    assert ensemble.calibrate(dataset=data).fitted == calibrate(path, dataset=data).fitted
    (path / "calibration.json").unlink()
    said = []
    with pytest.raises(UsageError, match="int8 is accepted only after a comparison on validation images"):
        export_run(path, tmp_path / "without", precision="int8", say=said.append)
    assert any("own data was given from Python and cannot be loaded by name" in line for line in said)
    assert evaluate_paths([path], EvaluationOptions(device="cpu"), dataset=data).report.test_examples == 12
    assert calibration.save(calibrate(path, CalibrationOptions(device="cpu"), dataset=data), path)
    assert measure_surface([path], options=SurfaceOptions(grid=2, device="cpu"), dataset=data).dataset == "own data"
    export_run(path, tmp_path / "bundle", dataset=data)
    assert read_bundle(tmp_path / "bundle").validation is not None
    assert collapse_run(run, as_dataset(data), "cpu").manifest.dataset.name == "own data"
    other = Own(X, Y[::-1].copy())
    renamed = as_dataset(data, classes=["c", "b", "a"])
    for wrong, message in ((other, "is not what the run was trained on"), (renamed, "has the classes c, b, a")):
        for use in (
            partial(evaluate_paths, [path], EvaluationOptions(device="cpu")),
            partial(calibrate, path, CalibrationOptions(device="cpu")),
            partial(export_run, path, tmp_path / "wrong"),
        ):
            with pytest.raises(DataError, match=message):
                use(dataset=wrong)
    assert not (tmp_path / "wrong").exists()
