"""Batches: what an epoch holds, how images are varied; and images in their files, read by processes that end."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ensembler.data import datasets
from ensembler.data import images as pictures
from ensembler.data.images import FileSplit, Split
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.networks.architectures import build
from ensembler.run import Run
from ensembler.trainers import DeepEnsemble, Settings, Simplex
from ensembler.trainers.batches import Batches
from ensembler.trainers.events import Message
from tests._evaluate import evaluate
from tests._host import on_meta
from tests._small import dataset as small
from tests._training import make

CLASSES = ("bottom", "middle", "top")


def make_photos(folder: Path, count: int = 17, size: tuple[int, int] = (15, 12)) -> str:
    """JPEG files of three classes, whose brightest third gives the class; the name to load them by."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
            pixels[label * size[1] // 3 : (label + 1) * size[1] // 3] += 100
            Image.fromarray(pixels).save(folder / name / f"{i:02}.jpg", quality=95)
    return f"folder:{folder}"


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path / "photos")


def load(name, in_memory=False, size=8, **options):
    return datasets.load(name, image_size=size, in_memory=in_memory, **options)


def batches_of(dataset, augmentation, workers=0, seed=0, size=8, device="cpu"):
    stream, device = (seed, "test"), torch.device(device)
    return Batches(dataset.train, size, augmentation, dataset.mean, dataset.std, stream, device, workers)


def children():
    """Processes that read images: the server that starts them has no other children."""
    return [child for own in psutil.Process().children() for child in own.children()]


def same_batches(one, other):
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.size == b.size for a, b in pairs)


def some(batches, count, step=0):
    """``count`` batches from a step on, and the stream closed."""
    with closing(batches.begin(step)) as stream:
        return list(islice(stream, count))


# --- in memory ---


def of(images):
    """Images as they are, but for the normalisation's division by 255 being undone."""
    split = Split(images, torch.arange(len(images)))
    return replace(small(), train=split, mean=(0.0,) * 3, std=(1 / 255,) * 3)


def test_an_epoch_holds_every_example_once_and_orders_differ():
    images = (torch.arange(10, dtype=torch.uint8)[:, None, None, None] + 1).expand(10, 8, 8, 3).contiguous()
    batches, epochs = batches_of(of(images), "none", size=4), []
    assert (batches.per_epoch, batches.sizes()) == (3, [4, 4, 2])
    taken = some(batches, 6)
    for epoch in (taken[:3], taken[3:]):
        assert [(len(batch.y), batch.size) for batch in epoch] == [(4, 4), (4, 4), (2, 2)]
        for batch in epoch:
            assert torch.equal(batch.x[:, 0, 0, 0].round().long(), batch.y + 1)
        epochs.append(torch.cat([batch.y for batch in epoch]))
    assert all(epoch.sort().values.tolist() == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)
    with pytest.raises(UsageError, match="the batch size must be at least 1, not 0"):
        batches_of(of(images), "none", size=0)


@pytest.mark.parametrize(
    ("examples", "size", "sizes"),
    [
        (9, 4, [4, 5]),
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
        (3, 2, [3]),
        (2, 2, [2]),
    ],
)
def test_a_single_last_example_joins_the_batch_before_it(examples, size, sizes):
    images = (torch.arange(examples, dtype=torch.uint8)[:, None, None, None] + 1).expand(-1, 8, 8, 3).contiguous()
    batches = batches_of(of(images), "none", size=size)
    assert (batches.sizes(), batches.per_epoch) == (sizes, len(sizes))
    taken = some(batches, 2 * len(sizes))
    assert [(len(batch.y), batch.size) for batch in taken] == [(count, count) for count in sizes] * 2
    assert torch.cat([batch.y for batch in taken]).bincount().tolist() == [2] * examples
    for step in range(len(sizes)):  # a stream that starts in mid-epoch
        assert same_batches(some(batches, len(sizes), step), taken[step : step + len(sizes)])


def test_augmentation_is_a_crop_of_the_padded_image_or_of_its_mirror_image():
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(1, 255, (64, 8, 8, 3), dtype=np.uint8))
    padded = np.pad(images.numpy(), ((0, 0), (4, 4), (4, 4), (0, 0)))
    for augmentation in ("crop", "crop-flip"):
        (batch,) = some(batches_of(of(images), augmentation, size=64), 1)
        mirrored = 0
        for picture, label in zip(batch.x.permute(0, 2, 3, 1).round().numpy(), batch.y, strict=True):
            crops = [padded[label][r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
            straight = any(np.array_equal(picture, crop) for crop in crops)
            mirrored += not straight
            assert straight or any(np.array_equal(picture, crop[:, ::-1]) for crop in crops)
        assert (10 < mirrored < 54) if augmentation == "crop-flip" else mirrored == 0


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip"])
def test_batches_within_an_epoch_need_nothing_of_the_host(augmentation):
    """What an epoch draws goes to the device at its begin; "meta" is a device of which nothing can be read."""
    with on_meta() as needs:
        data = small()
        stream = batches_of(replace(data, train=data.train.to("meta")), augmentation, device="meta").begin()
        next(stream)
        assert needs.places, "the order and the choices are brought to the device"
        needs.places.clear()
        for batch in islice(stream, 2):
            assert batch.x.device.type == "meta"
    assert not needs.places, needs.places


# --- from files ---


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip"])
def test_files_give_the_batches_that_images_in_memory_give(photos, augmentation):
    held, files = load(photos, in_memory=True), load(photos)
    assert isinstance(held.train, Split)
    assert isinstance(files.train, FileSplit)
    expected = some(batches_of(held, augmentation), 9)
    for workers in (0, 2):
        assert same_batches(expected, some(batches_of(files, augmentation, workers), 9))


def test_resized_crops_do_not_depend_on_the_workers(photos):
    files = load(photos)
    before = torch.random.get_rng_state()
    one, other = (batches_of(files, files.augmentation, workers) for workers in (0, 2))
    assert one.per_epoch == 5
    first = some(one, 10)
    assert same_batches(first, some(other, 10))
    assert torch.equal(before, torch.random.get_rng_state())
    for epoch in (first[:5], first[5:]):
        assert [len(batch.y) for batch in epoch] == [8, 8, 8, 8, 4]
        assert torch.cat([batch.y for batch in epoch]).bincount().tolist() == list(files.class_counts.values())
    assert not same_batches(first[:5], first[5:])
    assert not same_batches(first, some(batches_of(files, files.augmentation, seed=1), 10))


@pytest.mark.parametrize("augmentation", ["none", "crop-flip", "resized-crop-flip"])
@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_a_stream_begun_at_a_step_is_the_rest_of_the_whole(photos, augmentation, in_memory, workers):
    batches = batches_of(load(photos, in_memory), augmentation, workers)
    expected = some(batches, 12)
    for step in (3, 5, 10):
        assert same_batches(expected[step:], some(batches, 12 - step, step))


def test_a_stream_begun_later_reads_no_file_of_the_steps_before(photos):
    files = load(photos)
    batches = batches_of(files, "resized-crop-flip")
    order, _ = next(batches._epochs(0))
    for index in order[:16]:
        files.train.paths[index].unlink()
    assert [len(batch.y) for batch in some(batches, 3, step=2)] == [8, 8, 4]
    with pytest.raises(DataError, match="cannot read the image"):
        some(batches, 1, step=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_ends_the_training_in_one_line_that_names_it(photos, workers):
    files = load(photos)
    bad = files.train.paths[5]
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"^cannot read the image {bad}: [^\n]*--corrupt skip\)$"):
        make(DeepEnsemble(members=1), files, workers=workers)
    assert not children()


def test_the_processes_end_with_the_training_or_the_stream(photos):
    files = load(photos)
    stream = batches_of(files, "none", workers=2).begin()
    assert not children(), "none is started before the first batch is asked for"
    next(stream)
    assert len(children()) == 2
    stream.close()
    assert not children()
    make(DeepEnsemble(members=1), files, workers=2)
    assert not children()
    with pytest.raises(UsageError, match="workers must be at least 0, not -1"):
        Settings(workers=-1)


def test_the_processes_end_when_the_training_is_interrupted(photos):
    def interrupt(event):
        if isinstance(event, Message):  # what the folder holds, before training
            return
        assert len(children()) == 2
        for child in children():
            child.send_signal(signal.SIGINT)  # a terminal's Ctrl-C goes to them too
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(DeepEnsemble(members=1), load(photos), on_event=interrupt, workers=2)
    assert not children()


SCRIPT = """
import sys
import torch
from ensembler.data import datasets
from ensembler.trainers.batches import Batches

if __name__ == "__main__":
    files = datasets.load(sys.argv[1], image_size=8, in_memory=False)
    for batch in Batches(files.train, 8, "none", files.mean, files.std, (0,), torch.device("cpu"), workers=2).begin():
        print("training", flush=True)
"""


def test_the_processes_end_when_the_one_that_trains_is_killed(tmp_path, photos):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, script, photos], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == b"training\n"
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) == 4, "two workers, the server they come from, Python's resource tracker"
        process.kill()
        _, alive = psutil.wait_procs(started, timeout=300)
        assert not alive


def test_a_worker_that_dies_is_said_with_the_mend(photos):
    stream = batches_of(load(photos), "none", workers=1).begin()
    next(stream)
    for child in children():
        child.kill()
    with pytest.raises(UsageError, match=r"died .* fewer --workers, or 0"):
        for _ in range(20):
            next(stream)


def test_a_run_on_files_is_the_run_on_the_same_images_in_memory(photos, tmp_path):
    """Trained, its BatchNorm statistics recomputed, and measured; bit for bit, whatever the number of workers."""

    def train(in_memory, workers):
        settings = {"architecture": "tests._small:batchnorm", "augmentation": "none", "workers": workers}
        return make(Simplex(vertices=2, members=3), load(photos, in_memory), **settings)

    expected, *found = [train(*how) for how in ((True, None), (False, 0), (False, 2))]
    for run in found:
        for kind in ("vertices", "buffers"):
            assert all(
                torch.equal(tensor, getattr(run, kind)[name]) for name, tensor in getattr(expected, kind).items()
            )
        assert run.manifest.metrics == expected.manifest.metrics
        assert run.manifest.dataset.lazy
    assert not expected.manifest.dataset.lazy

    paths = [run.save(tmp_path / "runs" / str(i)) for i, run in enumerate([expected, *found])]
    record = Run.load(paths[1]).manifest.dataset
    assert isinstance(record.load().train, FileSplit)
    assert isinstance(Run.load(paths[0]).manifest.dataset.load().train, Split)


def test_files_are_evaluated_like_images_in_memory(photos, tmp_path, monkeypatch):
    bad = tmp_path / "photos" / "top" / "00.jpg"
    bad.write_bytes(b"")
    settings = {"architecture": "tests._small:batchnorm", "augmentation": "none", "workers": 0}
    paths = [
        make(Simplex(vertices=2), load(photos, kind, corrupt="skip"), **settings).save(tmp_path / "runs" / str(kind))
        for kind in (True, False)
    ]
    assert Run.load(paths[1]).manifest.dataset.skipped == ["top/00.jpg"]
    held, files = (evaluate([path], "cifar10c", device="cpu", examples=6).report.runs[0] for path in paths)
    assert (held.clean, held.cells) == (files.clean, files.cells)
    x = load(photos, in_memory=True, corrupt="skip").test.images
    one, other = (Ensemble.load(path, "cpu").sample(3, seed=1).predict_members(x) for path in paths)
    assert torch.equal(one, other)
    monkeypatch.setattr(pictures, "MEMORY_LIMIT", 6 * 3 * 8 * 8)
    assert evaluate([paths[1]], device="cpu").report.test_examples > 6  # more than may be held: read as they are needed
    with load(photos, corrupt="skip").train.paths[0].open("ab") as file:
        file.write(b"!")
    with pytest.raises(DataError, match=r"has changed since the run was trained \(its training images differ\)"):
        evaluate([paths[1]], device="cpu", examples=6)


def test_a_resnet18_from_a_checkpoint_file_is_fine_tuned_on_a_folder_of_photos(tmp_path):
    architecture = "torchvision:resnet18"
    given = build(architecture, 10, seed=7).state_dict()
    torch.save(given, tmp_path / "resnet18.pt")
    files = load(make_photos(tmp_path / "photos", count=10, size=(96, 80)), size=64)
    assert files.augmentation == "resized-crop-flip"
    settings = {"epochs": 1, "lr": 1e-3, "workers": 2, "init": str(tmp_path / "resnet18.pt")}
    method = Simplex(vertices=2, vertex_epochs=0.5, members=2)
    run = make(method, files, architecture=architecture, **settings)
    assert run.vertices["fc.weight"].shape == (2, 3, 512)
    kept = run.vertices["conv1.weight"]
    assert not torch.equal(kept[0], given["conv1.weight"])
    torch.testing.assert_close(kept[0], given["conv1.weight"], atol=0.02, rtol=0)
    assert run.manifest.cost.unknown == ["resnet18.pt"]
    assert run.manifest.dataset.shape == [64, 64, 3]
    path = run.save(tmp_path / "run")
    report = evaluate([path], device="cpu").report
    assert report.runs[0].clean.accuracy == pytest.approx(run.manifest.metrics["test"]["accuracy"])
