"""Images in their files, through a DataLoader: the same stream, the same run, and processes that end."""

from __future__ import annotations

import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ensembler import checkpoint, datasets
from ensembler import images as pictures
from ensembler.architectures import build
from ensembler.checkpoint import Checkpoint
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, UsageError
from ensembler.eval.evaluation import evaluate
from ensembler.images import FileSplit, Split
from ensembler.run import Run
from ensembler.seeds import generator
from ensembler.trainers import Session, Settings, train_deep_ensemble, train_simplex
from ensembler.trainers.batches import Batches
from tests._small import SETTINGS

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


def batches_of(dataset, augmentation, workers=0, seed=0):
    stream = generator(seed, "test")
    return Batches(dataset.train, 8, augmentation, dataset.mean, dataset.std, stream, workers=workers)


def children():
    """Processes that read images: the server that starts them has no other children."""
    return [child for own in psutil.Process().children() for child in own.children()]


def same_batches(one, other):
    return all(torch.equal(*pair) for batch in zip(one, other, strict=True) for pair in zip(*batch, strict=True))


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop-flip"])
def test_files_give_the_batches_that_images_in_memory_give(photos, augmentation):
    held, files = load(photos, in_memory=True), load(photos)
    assert isinstance(held.train, Split)
    assert isinstance(files.train, FileSplit)
    expected = list(islice(batches_of(held, augmentation), 9))
    for workers in (0, 2):
        assert same_batches(expected, islice(batches_of(files, augmentation, workers), 9))


def test_resized_crops_do_not_depend_on_the_workers(photos):
    files = load(photos)
    before = torch.random.get_rng_state()
    one, other = (batches_of(files, files.augmentation, workers) for workers in (0, 2))
    assert one.per_epoch == 5
    first = list(islice(one, 10))
    assert same_batches(first, islice(other, 10))
    assert torch.equal(before, torch.random.get_rng_state())
    for epoch in (first[:5], first[5:]):
        assert [len(y) for _, y in epoch] == [8, 8, 8, 8, 4]
        assert torch.cat([y for _, y in epoch]).bincount().tolist() == list(files.class_counts.values())
    assert not same_batches(first[:5], first[5:])
    assert not same_batches(first, islice(batches_of(files, files.augmentation, seed=1), 10))


@pytest.mark.parametrize("augmentation", ["none", "crop-flip", "resized-crop-flip"])
@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_skipping_comes_to_the_same_place_as_taking(photos, augmentation, in_memory, workers):
    dataset = load(photos, in_memory)
    taken, skipped = (batches_of(dataset, augmentation, workers) for _ in range(2))
    expected = list(islice(taken, 12))
    skipped.skip(3)
    assert same_batches(expected[3:6], islice(skipped, 3))
    skipped.skip(4)
    assert same_batches(expected[10:], islice(skipped, 2))


def test_skipping_reads_no_file(photos):
    files = load(photos)
    for path in files.train.paths:
        path.unlink()
    batches_of(files, "resized-crop-flip").skip(100)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_ends_the_training_in_one_line_that_names_it(photos, workers):
    files = load(photos)
    bad = files.train.paths[5]
    bad.write_bytes(bad.read_bytes()[:300])
    with pytest.raises(DataError, match=rf"^cannot read the image {bad}: [^\n]*--corrupt skip\)$"):
        train_deep_ensemble(Session(files, Settings(**SETTINGS, workers=workers)), members=1)
    assert not children()


def test_the_processes_end_with_the_training_or_the_stream(photos):
    files = load(photos)
    batches = batches_of(files, "none", workers=2)
    assert not children(), "none is started before the first batch is asked for"
    next(batches)
    assert len(children()) == 2
    batches.close()
    assert not children()
    train_deep_ensemble(Session(files, Settings(**SETTINGS, workers=2)), members=1)
    assert not children()
    with pytest.raises(UsageError, match="workers must be at least 0, not -1"):
        Session(files, Settings(**SETTINGS, workers=-1))


def test_the_processes_end_when_the_training_is_interrupted(photos):
    def interrupt(part, epoch, epochs):
        assert len(children()) == 2
        for child in children():
            child.send_signal(signal.SIGINT)  # a terminal's Ctrl-C goes to them too
        raise KeyboardInterrupt

    session = Session(load(photos), Settings(**SETTINGS, workers=2), watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_deep_ensemble(session, members=1)
    assert not children()


SCRIPT = """
import sys
import torch
from ensembler import datasets
from ensembler.trainers.batches import Batches

if __name__ == "__main__":
    files = datasets.load(sys.argv[1], image_size=8, in_memory=False)
    for batch in Batches(files.train, 8, "none", files.mean, files.std, torch.Generator(), workers=2):
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
    batches = batches_of(load(photos), "none", workers=1)
    next(batches)
    for child in children():
        child.kill()
    with pytest.raises(UsageError, match=r"died .* fewer --workers, or 0"):
        for _ in range(20):
            next(batches)


def test_a_run_on_files_is_the_run_on_the_same_images_in_memory(photos, tmp_path):
    """Trained, its BatchNorm statistics recomputed, and measured; bit for bit, whatever the number of workers."""

    def train(in_memory, workers):
        settings = Settings(
            **SETTINGS | {"architecture": "tests._small:batchnorm"}, augmentation="none", workers=workers
        )
        return train_simplex(Session(load(photos, in_memory), settings), vertices=2, members=3)

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
    settings = Settings(**SETTINGS | {"architecture": "tests._small:batchnorm"}, augmentation="none", workers=0)
    paths = [
        train_simplex(Session(load(photos, kind, corrupt="skip"), settings), vertices=2).save(
            tmp_path / "runs" / str(kind)
        )
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
    with pytest.raises(DataError, match=r"has changed since the run was trained: its training images differ"):
        evaluate([paths[1]], device="cpu", examples=6)


def test_a_resnet18_from_a_checkpoint_file_is_fine_tuned_on_a_folder_of_photos(tmp_path):
    architecture = "torchvision:resnet18"
    given = build(architecture, 10, seed=7).state_dict()
    torch.save(given, tmp_path / "resnet18.pt")
    files = load(make_photos(tmp_path / "photos", count=10, size=(96, 80)), size=64)
    assert files.augmentation == "resized-crop-flip"
    settings = Settings(architecture, epochs=1, batch_size=8, rate=1e-3, device="cpu", workers=2)
    start = Checkpoint("resnet18.pt", checkpoint.read(tmp_path / "resnet18.pt"))
    run = train_simplex(Session(files, settings, start), vertices=2, vertex_epochs=0.5, members=2)
    assert run.vertices["fc.weight"].shape == (2, 3, 512)
    kept = run.vertices["conv1.weight"]
    assert not torch.equal(kept[0], given["conv1.weight"])
    torch.testing.assert_close(kept[0], given["conv1.weight"], atol=0.02, rtol=0)
    assert run.manifest.cost.unknown == ["resnet18.pt"]
    assert run.manifest.dataset.image_shape == [64, 64, 3]
    path = run.save(tmp_path / "run")
    report = evaluate([path], device="cpu").report
    assert report.runs[0].clean.accuracy == pytest.approx(run.manifest.metrics["test"]["accuracy"])
