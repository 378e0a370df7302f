"""Decoded images are kept: what finds them again, what makes them anew, and what goes wrong with a cache on disk."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ensembler.data import datasets, decoded, decoding, image_cache, images
from ensembler.data.datasets import Dataset
from ensembler.data.decoded import DecodedSplit
from ensembler.data.image_cache import LIMIT, listed
from ensembler.errors import DataError, UsageError
from ensembler.eval.calibrate import calibrate
from ensembler.run import Run
from ensembler.serve.export.bundle import export_run
from ensembler.trainers import DeepEnsemble
from tests._evaluate import evaluate
from tests._faults import small_disk
from tests._training import call, make
from tests.test_folders import fill

SPLITS = ("train", "validation", "test")


@pytest.fixture
def photos(tmp_path) -> Path:
    return fill(tmp_path / "photos")


@pytest.fixture
def read(monkeypatch) -> list[Path]:
    """The files that are decoded."""
    found: list[Path] = []

    def spy(file, *arguments, **options):
        found.append(Path(file))
        return decode(file, *arguments, **options)

    decode = decoding.decode
    spy.__wrapped__ = decode  # what inspect takes the source of
    monkeypatch.setattr(decoding, "decode", spy)
    return found


@pytest.fixture(autouse=True)
def _nothing_said():
    """Each sentence is said once a process."""
    image_cache.echo_once.cache_clear()


def load(folder: Path, **options) -> Dataset:
    return datasets.load(f"folder:{folder}", **options)


def pixels(dataset: Dataset) -> list[torch.Tensor]:
    return [getattr(dataset, split).images.clone() for split in SPLITS]


def same(one: Dataset, other: Dataset) -> bool:
    return all(map(torch.equal, pixels(one), pixels(other)))


def train(folder: Path, path: Path) -> Path:
    return make(DeepEnsemble(members=2), load(folder), epochs=1).save(path)


# --- found again ---


def test_images_are_decoded_once(photos, read):
    first = load(photos)
    assert len(set(read)) == 40
    assert sorted(entry.what.split()[0] for entry in listed()) == sorted(SPLITS)
    read.clear()
    again = load(photos)
    assert [file for file in read if file != again.train.source.paths[0]] == [], "but for the first, for the size"
    assert same(first, again)
    assert [getattr(first, split).sha256 for split in SPLITS] == [getattr(again, split).sha256 for split in SPLITS]
    assert (first.mean, first.std, list(first.notes)) == (again.mean, again.std, list(again.notes))


def test_the_images_are_those_of_the_files(photos):
    load(photos)
    again = load(photos)
    for split in (again.train, again.validation, again.test):
        expected = np.stack([np.asarray(Image.open(path)) for path in split.source.paths])
        assert np.array_equal(split.images.numpy(), expected)


def test_a_mapped_split_may_be_written_to_and_the_file_stays(photos):
    load(photos)
    again = load(photos)
    expected = again.test.images.clone()
    again.test.images.zero_()
    assert torch.equal(load(photos).test.images, expected)


def test_a_changed_file_is_noticed_though_its_size_and_time_are_the_same(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(9):
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / name / f"{number}.bmp")
    file = load(tmp_path).test.source.paths[0]
    before = file.stat()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load(tmp_path).test.images[0].unique().tolist() == [200]


@pytest.mark.parametrize("how", ["touched", "added", "removed", "renamed"])
def test_a_file_that_is_not_the_same_is_noticed(photos, read, how):
    file = load(photos).train.source.paths[3]
    read.clear()
    if how == "touched":
        os.utime(file, (1, 1))
    elif how == "added":
        shutil.copy(file, file.with_name("999.png"))
    elif how == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("999.png"))
    again = load(photos)
    names = [path for split in SPLITS for path in getattr(again, split).source.paths]
    assert len(again.train.source) <= len(set(read))
    expected = [np.asarray(Image.open(path)) for path in names]
    assert np.array_equal(torch.cat(pixels(again)).numpy(), expected)


def test_another_folder_of_equal_names_sizes_and_times_is_another(tmp_path):
    for place, value in (("one", 10), ("other", 200)):
        for name in ("cat", "dog"):
            (tmp_path / place / name).mkdir(parents=True)
            for number in range(9):
                Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(tmp_path / place / name / f"{number}.bmp")
                os.utime(tmp_path / place / name / f"{number}.bmp", (0, 0))
    assert load(tmp_path / "one").test.images.unique().tolist() == [10]
    assert load(tmp_path / "other").test.images.unique().tolist() == [200]


def test_another_size_and_another_decoder_are_others(photos, monkeypatch):
    assert load(photos).test.images.shape[1:3] == (8, 8)
    assert load(photos, image_size=5).test.images.shape[1:3] == (5, 5)
    before = load(photos).test.images.clone()
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda file, shape=None: 255 - decode(file, shape))
    assert torch.equal(load(photos).test.images, 255 - before)


def test_sizes_that_differ_are_refused_after_they_were_kept_resized(photos):
    Image.new("RGB", (16, 8)).save(photos / "dog" / "wide.png")
    load(photos, image_size=8)
    with pytest.raises(DataError, match=r"wide\.png is 16 x 8 pixels but .*000\.png is 8 x 8: add --image-size"):
        load(photos)


def test_files_that_cannot_be_read_are_found_once(photos, read):
    (photos / "cat" / "003.png").write_bytes(b"no image")
    first = load(photos, corrupt="skip")
    read.clear()
    assert load(photos, corrupt="skip").skipped == first.skipped == ("cat/003.png",)
    assert {*read} <= {photos / "cat" / "000.png", photos / "cat" / "003.png"}, "the first, and the unreadable one"
    (photos / "cat" / "005.png").write_bytes(b"no image")
    assert load(photos, corrupt="skip").skipped == ("cat/003.png", "cat/005.png")


def test_an_error_of_the_disk_that_passes_leaves_no_file_out(photos, monkeypatch):
    decode = decoding.decode

    @functools.wraps(decode)
    def fail_once(file, *arguments, **options):
        if file.name == "003.png":
            raise OSError(errno.EIO, "Input/output error")
        return decode(file, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode", fail_once)
        assert load(photos, corrupt="skip").skipped == ("cat/003.png", "dog/003.png")
    assert load(photos, corrupt="skip").skipped == ()


def test_the_sample_of_files_is_decoded_once(photos, read):
    first = load(photos, in_memory=False, image_size=8)
    read.clear()
    again = load(photos, in_memory=False, image_size=8)
    assert (first.mean, first.std, list(first.notes)) == (again.mean, again.std, list(again.notes))
    assert not read


# --- scoring ---


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
@pytest.mark.parametrize("cold", [True, False])
def test_scoring_reads_no_training_image(tmp_path, monkeypatch, read, size, cold):
    photos = fill(tmp_path / "photos")
    for file in photos.rglob("*.png"):
        Image.open(file).resize(size).save(file)
    run = make(DeepEnsemble(members=2), load(photos), epochs=1, architecture="tests.test_image_cache:pooled")
    path = run.save(tmp_path / "run")
    training = {*load(photos).train.source.paths}
    if cold:
        assert call("data", "cache", "--clear").exit_code == 0
    for score in (evaluate, calibrate, export_run):
        read.clear()
        if score is evaluate:
            score([path], device="cpu")
        elif score is calibrate:
            score(path)
        else:
            score(path, tmp_path / "bundle", tune=False)
        assert not training.intersection(read)
        assert bool(read) == (cold and score is evaluate), "and each other image once"


def pooled(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, num_classes))


def test_scoring_needs_the_training_images_names_only(photos, tmp_path):
    path = train(photos, tmp_path / "run")
    expected = evaluate([path], device="cpu").report.runs[0].clean
    call("data", "cache", "--clear")
    for file in load(photos).train.source.paths:
        file.write_bytes(bytes(file.stat().st_size))  # no images any more
    call("data", "cache", "--clear")
    assert evaluate([path], device="cpu").report.runs[0].clean == expected


@pytest.mark.parametrize("cleared", [True, False])
def test_training_images_that_changed_are_noticed_when_they_are_used(photos, tmp_path, cleared):
    path = train(photos, tmp_path / "run")
    dataset = load(photos)
    file = dataset.train.source.paths[0]
    content = file.read_bytes()
    Image.fromarray(dataset.train.images[1].numpy()).save(file)
    file.write_bytes(file.read_bytes().ljust(len(content), b"\0"))
    if cleared:
        call("data", "cache", "--clear")
    record = Run.load(path).manifest.dataset
    with pytest.raises(DataError, match=r"has changed since the run was trained \(its training images differ\)"):
        _ = record.load().train.images


def test_a_changed_or_missing_test_image_is_refused(photos, tmp_path):
    path = train(photos, tmp_path / "run")
    test = load(photos).test.source.paths
    Image.new("RGB", (8, 8), (1, 2, 3)).save(test[0])
    with pytest.raises(DataError, match=r"its test images differ"):
        evaluate([path], device="cpu")
    test[1].unlink()
    with pytest.raises(DataError, match=r"images differ"):
        evaluate([path], device="cpu")


def test_a_training_image_that_is_gone_is_refused(photos, tmp_path):
    path = train(photos, tmp_path / "run")
    load(photos).train.source.paths[0].unlink()
    with pytest.raises(DataError, match=r"its training images differ"):
        evaluate([path], device="cpu")


def test_labels_and_shape_are_known_without_the_images(photos, read):
    dataset = load(photos)
    known = datasets.Known((8, 8), dataset.mean, dataset.std, same_size=True)
    call("data", "cache", "--clear")
    read.clear()
    again = datasets.load(f"folder:{photos}", known=known)
    for split in SPLITS:
        assert isinstance(getattr(again, split), DecodedSplit)
        assert len(getattr(again, split)) == len(getattr(dataset, split))
        assert getattr(again, split).example_shape == (8, 8, 3)
    assert again.class_counts == dataset.class_counts
    assert not read
    assert list(again.notes) == list(dataset.notes)
    assert len(read) == 40


# --- what goes wrong ---


def damage_header(file: Path) -> None:
    file.write_bytes(b"\xff" + file.read_bytes()[1:])


def damage_pixel(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def damage_type(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"dtype":"U8"', b'"dtype":"I8"'))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [damage_header, damage_pixel, damage_type, truncate, empty])
def test_a_damaged_file_is_said_and_made_again(photos, capsys, read, damage):
    first = load(photos)
    expected = pixels(first)
    damaged = [entry.path for entry in listed()]
    for file in damaged:
        content = file.read_bytes()
        file.unlink()  # what is mapped by now stays as it is
        file.write_bytes(content)
        damage(file)
        assert file.read_bytes() != content
    capsys.readouterr()
    read.clear()
    again = load(photos)
    assert len(set(read)) == 40
    assert all(map(torch.equal, pixels(again), expected))
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == sorted(f"{file} is damaged: the images are decoded again" for file in damaged)
    read.clear()
    assert same(load(photos), again)
    assert len(read) <= 1
    assert capsys.readouterr().err == ""


def test_a_damaged_header_refuses_no_scoring(photos, tmp_path):
    path = train(photos, tmp_path / "run")
    (entry,) = (entry.path for entry in listed() if entry.what.startswith("train"))
    content = entry.read_bytes()
    sha256 = load(photos).train.sha256.encode()
    entry.unlink()
    entry.write_bytes(content.replace(sha256, b"0" * 64))
    assert evaluate([path], device="cpu").report.test_examples == 8


SCRIPT = """
import os, pathlib, sys
from ensembler.data import datasets
datasets.load(sys.argv[1])  # as root, who may read what is imported
del os.environ["XDG_CACHE_HOME"]
if sys.argv[2] == "none":
    def none():
        raise RuntimeError("no home")
    pathlib.Path.home = none
os.setgid(65534)
os.setuid(65534)
print(datasets.load(sys.argv[1]).test.images.sum().item())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("home", ["read-only", "none"])
def test_nobody_works_without_a_cache_and_is_told_once(home):
    with tempfile.TemporaryDirectory() as folder:  # which nobody can enter, unlike pytest's
        Path(folder).chmod(0o755)
        photos = fill(Path(folder) / "photos")
        environment = {**os.environ, "HOME": folder, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", SCRIPT, f"folder:{photos}", home]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == load(photos).test.images.sum().item()
    (line,) = done.stderr.splitlines()
    assert line.startswith("decoded images are not kept")
    assert ("set XDG_CACHE_HOME" in line) == (home == "none")


def test_a_cache_that_is_a_file_is_said(photos, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(photos).test.images) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"decoded images are not kept in {tmp_path / 'file'}/ensembler/images: Not a directory")


def test_a_full_disk_is_said_and_holds_nothing_half_written(photos, tmp_path, monkeypatch, capsys):
    with small_disk(tmp_path / "disk", "8k") as disk:
        monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
        first = load(photos)
        assert "more than half of the" in capsys.readouterr().err
        assert [path for path in disk.rglob("*") if path.is_file() and path.suffix != ".safetensors"] == []
        monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2**40})())
        image_cache.clear()
        (disk / "filler").write_bytes(bytes(8000))
        assert same(load(photos), first)
        assert "No space left" in capsys.readouterr().err
        assert not list(disk.rglob(".partial-*"))
        assert same(load(photos), first)


def test_an_interrupt_leaves_nothing_half_written(photos, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(photos)
    assert not image_cache.default_folder().exists()


def test_a_file_that_changes_while_it_is_decoded_is_not_kept(photos, monkeypatch):
    read_images = images.read_images

    def then_change(files, *arguments, **options):
        found = read_images(files, *arguments, **options)
        Image.new("RGB", (8, 8), (7, 7, 7)).save(files[0])
        return found

    monkeypatch.setattr(decoded, "read_images", then_change)
    load(photos)
    monkeypatch.undo()
    for split in SPLITS:
        again = getattr(load(photos), split)
        assert again.images[0].unique().tolist() == [7]


# --- bounded ---


def test_the_least_recently_used_goes_first(tmp_path, monkeypatch):
    folders = [fill(tmp_path / name) for name in "abc"]
    for folder in folders[:2]:
        load(folder)
    size = sum(entry.bytes for entry in listed()) // 2
    for number, entry in enumerate(listed()):
        os.utime(entry.path, (number, number))
    load(folders[0])  # used again
    monkeypatch.setenv(LIMIT, str(2.5 * size / 2**30))
    load(folders[2])
    whose = [entry.what.split(" of ")[1] for entry in listed()]
    assert {*map(str, folders[::2])} <= {*whose}
    assert whose.count(str(folders[0])) == whose.count(str(folders[2])) == 3
    assert whose.count(str(folders[1])) < 3
    assert sum(entry.bytes for entry in listed()) <= 2.5 * size


def test_what_is_larger_than_the_limit_is_not_kept_and_evicts_nothing(tmp_path, monkeypatch, capsys):
    load(fill(tmp_path / "a"))
    before = {entry.path for entry in listed()}
    monkeypatch.setenv(LIMIT, "1e-7")
    load(fill(tmp_path / "b"))
    assert {entry.path for entry in listed()} == before
    (line,) = capsys.readouterr().err.splitlines()
    assert f"and {LIMIT} allows 0.0 MB" in line


def test_zero_keeps_nothing_and_says_nothing(photos, monkeypatch, capsys):
    monkeypatch.setenv(LIMIT, "0")
    load(photos)
    assert not listed()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text", ["many", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(photos, monkeypatch, text):
    monkeypatch.setenv(LIMIT, text)
    with pytest.raises(UsageError, match=rf"^{LIMIT} must be a number of GiB, 0 or more, not '{text}': 0 keeps no"):
        load(photos)


# --- several at once ---


def test_two_at_once_do_no_harm(photos):
    found: list[Dataset] = []
    threads = [threading.Thread(target=lambda: found.append(load(photos))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(found[0], other) for other in found[1:])
    assert len(found) == 4
    assert len(listed()) == 3
    assert not list(image_cache.default_folder().glob(".partial-*"))


HOLD = """
import sys
from ensembler.data import datasets
dataset = datasets.load(sys.argv[1])
print(dataset.test.images.sum().item(), flush=True)
sys.stdin.readline()
print(dataset.test.images.sum().item(), flush=True)
"""


def test_what_another_process_uses_stays(photos):
    expected = load(photos).test.images.sum().item()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, f"folder:{photos}"], env=environment, stdin=-1, stdout=-1, text=True
    ) as process:
        assert int(process.stdout.readline()) == expected
        cleared = call("data", "cache", "--clear")
        assert "removed 0 of 3 files, 0.0 MB; 3 are used by other processes and stay" in cleared.output
        out, _ = process.communicate("\n")
        assert int(out) == expected
    assert "removed 3 of 3 files" in call("data", "cache", "--clear").output


# --- the command ---


def test_the_command_lists_and_clears(photos):
    empty = call("data", "cache")
    assert empty.output.endswith(f"images: 0 files, 0.0 MB (at most 20 GiB, {LIMIT}), by the time of their last use\n")
    load(photos)
    lines = call("data", "cache").output.splitlines()
    assert len(lines) == 4
    assert any(f"28 images  train images of {photos}" in line for line in lines)
    assert any(f"8 images  test images of {photos}" in line for line in lines)
    assert "removed 3 of 3 files" in call("data", "cache", "--clear").output
    assert not listed()
    assert "removed 0 of 0 files" in call("data", "cache", "--clear").output


def test_a_damaged_file_is_listed_and_cleared(photos):
    load(photos)
    file = listed()[0].path
    file.unlink()
    file.write_bytes(b"no such format")
    assert "damaged" in call("data", "cache").output
    assert "removed 3 of 3 files" in call("data", "cache", "--clear").output
