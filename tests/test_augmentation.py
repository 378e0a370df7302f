"""Policies of torchvision and transforms of one's own: by hand, repeatable, and refused in one sentence."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from ensembler import load_dataset
from ensembler.data.images import augment, draw
from ensembler.data.record import DatasetRecord
from ensembler.errors import UsageError
from ensembler.run import Run
from ensembler.seeds import generator
from ensembler.trainers import DeepEnsemble, Settings, Simplex, train
from tests._small import SETTINGS, dataset
from tests._training import call, make, same
from tests.test_batches import batches_of, load, make_photos, same_batches, some

ONE = DeepEnsemble(members=1)
POLICIES = {
    "trivialaugment": v2.TrivialAugmentWide(),
    "randaugment": v2.RandAugment(),
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
}
jitter = v2.Compose([v2.RandomInvert(0.5), v2.ColorJitter(0.3, 0.3)])


def noisy(image):
    """Draws from all three generators."""
    noise = torch.randint(0, 9, image.shape, dtype=torch.uint8) + np.random.randint(9) + random.randint(0, 9)
    return (image // 2 + noise).to(torch.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_torchvisions_after_the_crop(name):
    images = dataset(train=24, size=32).train.images
    choices = draw(f"crop-flip+{name}", 24, generator(0, "x"))
    assert torch.equal(choices[:, :3], draw("crop-flip", 24, generator(0, "x"))), "the crops are those without it"
    cropped = augment(images, "crop-flip", choices[:, :3])
    expected = []
    for image, seed in zip(cropped, choices[:, 3].tolist(), strict=True):
        torch.manual_seed(seed)
        expected.append(POLICIES[name](image.permute(2, 0, 1)).permute(1, 2, 0))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), images.clone()
    found = augment(images, f"crop-flip+{name}", choices)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, cropped)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1]) and torch.equal(before[3], images)


def test_autoaugment_of_large_images_is_that_of_imagenet():
    images = torch.randint(0, 256, (6, 80, 72, 3), dtype=torch.uint8, generator=generator(0, "large"))
    choices = draw("autoaugment", 6, generator(0, "x"))
    expected = []
    for image, seed in zip(images, choices[:, 0].tolist(), strict=True):
        torch.manual_seed(seed)
        policy = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
        expected.append(policy(image.permute(2, 0, 1)).permute(1, 2, 0))
    assert torch.equal(augment(images, "autoaugment", choices), torch.stack(expected))


@pytest.mark.parametrize(
    ("asked", "default", "resolved"),
    [
        (None, "crop-flip", "crop-flip"),
        ("trivialaugment", "crop-flip", "crop-flip+trivialaugment"),
        ("randaugment", "resized-crop-flip", "resized-crop-flip+randaugment"),
        ("autoaugment", "none", "autoaugment"),
        ("crop+trivialaugment", "crop-flip", "crop+trivialaugment"),
        ("crop-flip+trivialaugment", "crop", "crop-flip+trivialaugment"),
        ("none", "crop-flip", "none"),
        (noisy, "crop-flip", "tests.test_augmentation:noisy"),
    ],
)
def test_a_policy_follows_the_datasets_crop_and_ones_own_transform_replaces_it(asked, default, resolved):
    data = replace(dataset(), augmentation=default)
    settings = Settings(augmentation=asked).resolved(data)
    assert settings.augmentation == resolved == settings.resolved(data).augmentation
    assert DatasetRecord.of(data, resolved).augmentation == resolved


@pytest.mark.parametrize("augmentation", ["crop-flip+trivialaugment", "tests.test_augmentation:noisy"])
def test_files_give_the_batches_that_images_in_memory_give(photos, augmentation):
    held, files = load(photos, True), load(photos, False)
    expected = some(batches_of(held, augmentation), 9)
    assert same_batches(expected, some(batches_of(files, augmentation), 9))
    assert not same_batches(expected, some(batches_of(held, augmentation, seed=1), 9))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_stream_begun_at_a_step_is_the_rest_of_the_whole(photos, in_memory):
    batches = batches_of(load(photos, in_memory), "resized-crop-flip+randaugment")
    whole = some(batches, 9)
    for step in (1, 4):
        assert same_batches(whole[step:], some(batches, 9 - step, step))


def test_an_object_from_python_goes_to_the_processes_that_read_files(photos):
    data = load(photos, False)
    name = Settings(augmentation=jitter).augmentation
    assert name.startswith("__main__:Compose#")
    assert same_batches(some(batches_of(data, name), 3), some(batches_of(data, name, workers=1), 3))
    local = Settings(augmentation=lambda image: image.flip(-1)).augmentation
    plain, flipped = some(batches_of(data, "none"), 1)[0], some(batches_of(data, local), 1)[0]
    assert torch.equal(flipped.x, plain.x.flip(-1))
    with pytest.raises(UsageError, match="cannot be sent to the processes that read images"):
        some(batches_of(data, local, workers=1), 1)


def test_a_run_is_trained_measured_and_made_again_of_the_same_draws():
    own = {"augmentation": noisy, "architecture": "tests._small:batchnorm"}
    method = Simplex(vertices=2, vertex_epochs=1, members=2)
    runs = [make(method, **own) for _ in range(2)]
    assert same(*runs)
    assert not same(runs[0], make(method, architecture="tests._small:batchnorm"))
    assert runs[0].manifest.settings["augmentation"] == "tests.test_augmentation:noisy"
    assert runs[0].manifest.dataset.augmentation == "tests.test_augmentation:noisy"


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return (image + self.calls % 7).to(torch.uint8)


def failing(image):
    raise KeyError("strength")


FAULTS = {
    "float": (v2.ToDtype(torch.float32, scale=True), "returns float32: leave out ToDtype and Normalize"),
    "smaller": (v2.CenterCrop(6), "returns (3, 6, 6): end it with a Resize or crop to (8, 8)"),
    "grey": (v2.Grayscale(), "returns (1, 8, 8): end it"),
    "an array": (lambda image: image.numpy(), "returns a ndarray, expected a tensor"),
    "nothing": (lambda image: None, "returns a NoneType, expected a tensor"),
    "raises": (failing, "fails on an image (3, 8, 8) uint8: KeyError: 'strength' (test_augmentation.py, line"),
    "counter": (Counting(), "makes another image of the same one with the same seed"),
    "generator": (
        lambda image, rng=np.random.default_rng(0): image.roll(int(rng.integers(8)), -1),  # noqa: B008
        "makes another image of the same one with the same seed",
    ),
    "class": (v2.RandAugment, "is the class RandAugment, expected a function of an image, or an instance"),
    "unknown": ("cutout", "unknown augmentation 'cutout': use one of crop-flip, crop, resized-crop-flip, none, trivi"),
    "unknown after": ("crop+cutout", "unknown augmentation 'crop+cutout'"),
    "absent": ("tests.test_augmentation:absent", "cannot import the augmentation 'tests.test_augmentation:absent'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_transform_that_training_cannot_use_is_one_sentence(fault, monkeypatch):
    monkeypatch.setattr("ensembler.trainers.loop.fit", lambda *_, **__: pytest.fail("trained"))
    transform, sentence = FAULTS[fault]
    with pytest.raises(UsageError) as caught:
        make(ONE, augmentation=transform)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def rarely_failing(image):
    if torch.rand(()) < 0.05:
        raise ValueError("seldom")
    return image


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 1)])
def test_a_transform_that_fails_later_is_one_sentence_too(photos, in_memory, workers):
    settings = SETTINGS | {"augmentation": rarely_failing, "epochs": 20, "workers": workers}
    with pytest.raises(UsageError, match=r"rarely_failing fails on an image .*: ValueError: seldom"):
        train(load(photos, in_memory), ONE, Settings(**settings))


def test_commands_take_a_policy_and_keep_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--arch", "tests._small:network", "--epochs", 0.1, "--members", 1, "--image-size", 8, "--quiet"]
    for arguments, name in (([*given, "--augmentation", "trivialaugment"], "one"), (["--config", "one"], "two")):
        result = call("train-deep-ensemble", *arguments, "--out", name)
        assert result.exit_code == 0, result.output
    one, two = (Run.load(tmp_path / name) for name in ("one", "two"))
    assert one.manifest.settings["augmentation"] == f"{load_dataset('digits').augmentation}+trivialaugment"
    assert same(one, two) and one.manifest.fingerprint == two.manifest.fingerprint
