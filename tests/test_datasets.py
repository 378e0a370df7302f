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

from ensembler import datasets
from ensembler.datasets import Split, normalise
from ensembler.errors import DataError, UsageError


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
