"""Every source of images against files of its layout, made here."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as published

from ensembler.data import datasets
from ensembler.data import images as pictures
from ensembler.data.datasets import Split, normalise
from ensembler.data.images import FileSplit, augment, draw, read_images
from ensembler.errors import DataError, UsageError
from ensembler.trainers.launch import Data


def disjoint(dataset):
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (dataset.train, dataset.validation)]
    return not pictures[0] & pictures[1]


def test_digits_are_embedded_and_split_the_same_way_every_time():
    one, other = datasets.load("digits"), datasets.load("digits")
    assert (len(one.train), len(one.validation), len(one.test)) == (1293, 144, 360)
    assert one.train.images.shape[1:] == (32, 32, 3)
    assert one.train.images.dtype == torch.uint8
    assert one.test.sha256 == other.test.sha256
    assert disjoint(one)
    x = normalise(one.train.images, one.mean, one.std)
    assert x.shape == (1293, 3, 32, 32)
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def images(count, seed=0, shape=(32, 32, 3)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def make_cifar(folder, monkeypatch, kind, classes, coarse=()):
    """Files of the published layout, and a class that expects these files' MD5 sums."""
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    key = "labels" if kind is published.CIFAR10 else "fine_labels"

    def write(name, count, seed):
        pixels = images(count, seed).transpose(0, 3, 1, 2).reshape(count, -1)
        content = pickle.dumps({"data": pixels, key: [i % len(classes) for i in range(count)]})
        (base / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    names = [name for name, _ in kind.train_list]
    monkeypatch.setattr(kind, "train_list", [write(name, 40, i) for i, name in enumerate(names)])
    monkeypatch.setattr(kind, "test_list", [write(name, 20, 99) for name, _ in kind.test_list])
    meta = pickle.dumps({kind.meta["key"]: classes})
    (base / kind.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(meta).hexdigest()})
    return base


def test_cifar10_in_the_published_layout(tmp_path, monkeypatch):
    names = [f"thing {i}" for i in range(4)]
    base = make_cifar(tmp_path, monkeypatch, published.CIFAR10, names)
    dataset = datasets.load("cifar10", tmp_path)
    assert dataset.classes == tuple(names)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (180, 20, 20)
    np.testing.assert_array_equal(dataset.test.images.numpy(), images(20, 99))
    assert dataset.test.labels.tolist() == [i % 4 for i in range(20)]
    (base / "test_batch").write_bytes(b"not the published file")
    with pytest.raises(DataError, match="its files are not the published ones"):
        datasets.load("cifar10", tmp_path)


def test_cifar100_in_the_published_layout(tmp_path, monkeypatch):
    make_cifar(tmp_path, monkeypatch, published.CIFAR100, ["a", "b"])
    assert datasets.load("cifar100", tmp_path).title == "CIFAR-100"


def test_what_is_not_there_is_said_with_the_mend(tmp_path):
    for name in ("cifar10", "cifar100", "fashion-mnist"):
        with pytest.raises(DataError, match="add --download"):
            datasets.load(name, tmp_path)
    with pytest.raises(DataError, match="no folder of images"):
        datasets.load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(UsageError, match="unknown dataset 'imagenet': use one of digits"):
        datasets.load("imagenet")
    with pytest.raises(UsageError, match="unknown dataset ''"):  # an empty variable of a shell: it was the digits
        Data(dataset="").load()
    with pytest.raises(UsageError, match="validation share"):
        datasets.load("digits", validation=1.5)


def write_idx(folder, name, array, pack=False):
    content = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()
    path = folder / (f"{name}.gz" if pack else name)
    path.write_bytes(gzip.compress(content) if pack else content)
    return path


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_idx_files(tmp_path, pack, below):
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(folder, f"{part}-images-idx3-ubyte", images(count, shape=(28, 28)), pack)
        labels = write_idx(folder, f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10, pack)
    dataset = datasets.load("fashion-mnist", tmp_path, validation=0.2)
    assert dataset.test.images.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(dataset.test.images[:, 2:30, 2:30, 1].numpy(), images(20, shape=(28, 28)))
    assert dataset.classes[9] == "Ankle boot"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(DataError, match="t10k-labels"):
        datasets.load("fashion-mnist", tmp_path)


def make_folder(folder, classes=("cat", "dog"), count=20, size=(16, 16)):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((*size[::-1], 3), 100 * label + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


def test_a_folder_of_images_split_by_us(tmp_path):
    dataset = datasets.load(f"folder:{make_folder(tmp_path)}", validation=0.25)
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (24, 8, 8)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.labels.bincount().tolist() == [len(part) // 2] * 2
        assert torch.equal((part.images[:, 0, 0, 0] >= 100).long(), part.labels)


def test_a_folder_with_train_and_test(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "test", count=5)
    dataset = datasets.load(f"folder:{tmp_path}")
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (40, 10)
    make_folder(tmp_path / "test" / "cow", classes=("x",))
    with pytest.raises(DataError, match="has the class 'cow'"):
        datasets.load(f"folder:{tmp_path}")


def test_images_of_several_sizes_need_an_image_size(tmp_path):
    make_folder(tmp_path)
    Image.new("L", (30, 20), 7).save(tmp_path / "dog" / "wide.jpg")
    with pytest.raises(DataError, match=r"wide\.jpg is 30 x 20 pixels .* add --image-size"):
        datasets.load(f"folder:{tmp_path}")
    assert datasets.load(f"folder:{tmp_path}", image_size=24).train.images.shape[1:] == (24, 24, 3)


def test_bad_images_and_empty_classes_are_named(tmp_path):
    make_folder(tmp_path)
    bad = tmp_path / "cat" / "bad.png"
    bad.write_bytes((tmp_path / "cat" / "000.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"cannot read the image .*bad\.png"):
        datasets.load(f"folder:{tmp_path}")
    bad.unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        datasets.load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="at least two; found 0"):
        datasets.load(f"folder:{tmp_path / 'cat'}")


def test_too_few_images_to_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="too few images"):
        datasets.load(f"folder:{make_folder(tmp_path, count=1)}")


def test_a_split_is_known_by_its_content():
    split = Split(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    assert split.sha256 == split[torch.tensor([0, 1])].sha256
    assert split.sha256 != split[torch.tensor([1, 0])].sha256


def test_embedded_images_take_another_size_on_request():
    assert datasets.load("digits", image_size=16).test.images.shape == (360, 16, 16, 3)


# --- images that stay in their files ---


def test_a_folder_is_the_same_dataset_in_its_files_and_in_memory(tmp_path):
    name = f"folder:{make_folder(tmp_path, size=(20, 16))}"
    held, files = (datasets.load(name, image_size=8, in_memory=kind) for kind in (True, False))
    assert (held.augmentation, files.augmentation) == ("crop-flip", "resized-crop-flip")
    assert (held.mean, held.std, held.class_counts) == (files.mean, files.std, files.class_counts)
    assert files.class_counts == {"cat": 14, "dog": 14}
    for part in ("train", "validation", "test"):
        one, other = getattr(held, part), getattr(files, part)
        assert isinstance(other, FileSplit)
        assert (len(other), other.shape) == (len(one), (8, 8))
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, torch.cat([batch.images for batch in other.batches(4)]))
        index = torch.tensor([3, 0])
        assert torch.equal(one[index].images, other[index].images)
        assert torch.equal(one.part(index).labels, other.part(index).labels)


def test_files_are_known_by_their_names_and_sizes(tmp_path):
    make_folder(tmp_path / "here", count=12)
    first = datasets.load(f"folder:{tmp_path / 'here'}", image_size=8, in_memory=False)
    assert first.train.sha256 != first.test.sha256
    (tmp_path / "here").rename(tmp_path / "there")
    there = datasets.load(f"folder:{tmp_path / 'there'}", image_size=8, in_memory=False)
    assert first.train.sha256 == there.train.sha256
    assert (
        datasets.load(f"folder:{tmp_path / 'there'}", image_size=9, in_memory=False).train.sha256 != first.train.sha256
    )
    with there.train.paths[0].open("ab") as file:
        file.write(b"!")
    again = datasets.load(f"folder:{tmp_path / 'there'}", image_size=8, in_memory=False)
    assert first.train.sha256 != again.train.sha256
    assert first.test.sha256 == again.test.sha256
    again.train.paths[0].unlink()
    with pytest.raises(DataError, match=r"cannot read the image .*there"):
        _ = again.train.part(slice(None)).sha256


def test_what_would_not_fit_in_memory_stays_in_its_files(tmp_path, monkeypatch):
    name = f"folder:{make_folder(tmp_path)}"
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 40 * 3 * 16 * 16)
    assert isinstance(datasets.load(name).train, Split)
    monkeypatch.setattr(datasets, "MEMORY_LIMIT", 40 * 3 * 16 * 16 - 1)
    assert isinstance(datasets.load(name, image_size=16).train, FileSplit)
    assert isinstance(datasets.load(name, in_memory=True).train, Split)
    for options in ({}, {"in_memory": False}):
        with pytest.raises(UsageError, match=r"give the size .* --image-size 16"):
            datasets.load(name, **options)
    test = datasets.load(name, image_size=16).test
    monkeypatch.setattr(pictures, "MEMORY_LIMIT", 7 * 3 * 16 * 16)
    assert len(test[:7]) == 7
    with pytest.raises(DataError, match=r"8 images of 16 x 16 pixels .* use fewer \(--examples\)"):
        _ = test[:8]
    with pytest.raises(UsageError, match="digits is always in memory and whole: only folder:PATH"):
        datasets.load("digits", in_memory=False)


def truncate(path):
    path.write_bytes(path.read_bytes()[:40])
    return path


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_cannot_be_read_are_skipped_and_named(tmp_path, in_memory):
    make_folder(tmp_path / "train", count=10)
    make_folder(tmp_path / "test", count=3)
    bad = ["train/cat/000.png", "train/dog/004.png", "test/dog/002.png"]
    for name in bad:
        truncate(tmp_path / name)
    (tmp_path / bad[1]).write_bytes(b"not an image")
    name, options = f"folder:{tmp_path}", {"image_size": 8, "in_memory": in_memory}
    dataset = datasets.load(name, corrupt="skip", **options)
    assert dataset.skipped == tuple(bad)
    assert (len(dataset.train) + len(dataset.validation), len(dataset.test)) == (18, 5)
    assert dataset.class_counts == {"cat": 8, "dog": 8}
    again = datasets.load(name, without=dataset.skipped, **options)
    assert (again.skipped, again.train.sha256) == (dataset.skipped, dataset.train.sha256)
    with pytest.raises(UsageError, match="one of refuse, skip, not 'mend'"):
        datasets.load(name, corrupt="mend")
    for i in (0, 1):
        truncate(tmp_path / "test" / "dog" / f"00{i}.png")
    with pytest.raises(DataError, match=r"none of the 3 images in .*dog can be read"):
        datasets.load(name, corrupt="skip", **options)


def test_a_corrupt_file_is_refused_by_name_when_it_is_met(tmp_path):
    dataset = datasets.load(f"folder:{make_folder(tmp_path)}", image_size=8, in_memory=False)
    bad = truncate(dataset.test.paths[5])
    assert len(dataset.test[:5]) == 5
    with pytest.raises(DataError, match=rf"cannot read the image {bad}: .*: repair it, or put the original back$"):
        _ = dataset.test[:6]


def test_the_moments_of_files_are_those_of_a_sample(tmp_path, monkeypatch):
    name = f"folder:{make_folder(tmp_path)}"
    monkeypatch.setattr(datasets, "_SAMPLE", 5)
    one, other = (datasets.load(name, image_size=8, in_memory=False) for _ in range(2))
    assert one.mean == other.mean
    assert one.mean != datasets.load(name, image_size=8).mean


def test_a_resized_crop_is_a_window_of_the_image_or_of_its_mirror_image(tmp_path):
    """An image that says of each pixel where it lies: row in red, column in green."""
    row, column = torch.meshgrid(torch.arange(200), torch.arange(250), indexing="ij")
    image = torch.stack([row, column, torch.zeros_like(row)], dim=2).to(torch.uint8)
    Image.fromarray(image.numpy()).save(tmp_path / "a.png")
    before = torch.random.get_rng_state()
    choices = draw("resized-crop-flip", 400, torch.Generator().manual_seed(0))
    files, kind = [tmp_path / "a.png"] * 400, "resized-crop-flip"
    varied = read_images(files, (40, 50), kind, choices)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(varied, read_images(files, (40, 50), kind, choices, threads=1))
    in_memory = augment(image.expand(3, -1, -1, -1), kind, choices[:3])
    assert torch.equal(in_memory, read_images(files[:3], (200, 250), kind, choices[:3]))
    red, green = varied[:, :, 25, 0].double(), varied[:, 20, :, 1].double()
    mirrored = green[:, -1] < green[:, 0]
    assert 150 < mirrored.sum() < 250
    green[mirrored] = green[mirrored].flip(1)
    assert (red.diff(dim=1) >= 0).all()
    assert (green.diff(dim=1) >= 0).all()
    height, width = (red[:, -1] - red[:, 0]) * 40 / 39, (green[:, -1] - green[:, 0]) * 50 / 49
    share, ratio = height * width / (200 * 250), width / height
    assert 0.06 < share.min() < 0.15
    assert 0.85 < share.max() < 1.05
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.42
    assert (varied[..., 2] == 0).all()
