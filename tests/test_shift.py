"""Corrupted test sets: files in the official layout read and checked, others generated, folders of them made."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ensembler.cli import app
from ensembler.data.datasets import Dataset, load
from ensembler.data.images import FileSplit, Split
from ensembler.errors import ArtefactError, DataError, UsageError
from ensembler.eval.shift import generated as generated_module
from ensembler.eval.shift import writer as module
from ensembler.eval.shift.cifar_c import check_official
from ensembler.eval.shift.corruptions import AVAILABLE, HEADLINE, SEVERITIES, VALIDATION, corrupt
from ensembler.eval.shift.layout import Rows, StoredFolder
from ensembler.eval.shift.readers import load_shift, load_shifts
from ensembler.eval.shift.writer import write_corruptions
from ensembler.storage.artefact import lock

ROOT = Path(__file__).parents[1]
N = 60
SOME = ("gaussian_noise", "snow", "contrast", "saturate")  # enough where they are all treated alike
EVERYTHING = torch.arange(N)


def everything(examples):
    """All images, whatever the batches."""
    return torch.cat([batch.images for batch in examples.batches(2)])


def cell(shift, corruption, severity):
    """The examples of one corruption at one severity."""
    (found,) = (one.examples for one in shift.sets if (one.name, one.severity) == (corruption, severity))
    return found


def stored(shift):
    """The corruptions that are read from files."""
    return tuple(dict.fromkeys(one.name for one in shift.sets if isinstance(one.examples, Rows)))


def dataset(count=N, size=32, name="cifar10", seed=0):
    """Photographs' stand-ins: random colours at 4 x 4 points, smooth between them."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(points, size=(size, size), mode="bicubic", align_corners=False)
    images = smooth.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    test = Split(images, torch.randint(0, 10, (count,), generator=generator))
    names = tuple("abcdefghij")
    return Dataset(name, name, names, "none", test[:20], test[:20], test, (0.5,) * 3, (0.2,) * 3)


def official(root, images, corruptions=SOME, title="CIFAR-10-C"):
    """A folder that says nothing of having been made here, as the official ones do not."""
    folder = root / title
    write_corruptions(images, folder, corruptions)
    (folder / "generated.json").unlink()
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every corruption of 60 images in the official layout; read-only."""
    return official(tmp_path_factory.mktemp("made"), dataset(), AVAILABLE)


def rewrite(path, change):
    np.save(path, change(np.load(path)))


# --- the official files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", [True, False])
@pytest.mark.parametrize(
    ("name", "which", "title"), [("cifar10c", "cifar10", "CIFAR-10-C"), ("cifar100c", "cifar100", "CIFAR-100-C")]
)
def test_every_cell_of_the_official_layout(tmp_path, made, name, which, title, below):
    images, indices = dataset(name=which), torch.tensor([3, 50, 7])
    folder = tmp_path / title
    folder.symlink_to(made)
    shift = load_shift(name, images, indices, tmp_path if below else folder)
    assert shift.source == "official"
    assert shift.note == f"Shift: the official {title} files, {len(AVAILABLE)} corruptions at 5 severities."
    assert shift.corruptions == AVAILABLE
    assert [(one.name, one.severity) for one in shift.sets] == [(name, s) for name in AVAILABLE for s in SEVERITIES]
    for one in shift.sets:
        assert (one.group, one.source) == ("shift", "official")
        assert torch.equal(everything(one.examples), corrupt(images.test.images, one.name, one.severity)[indices])
        assert one.labels.tolist() == images.test.labels[indices].tolist()
    assert [len(batch) for batch in one.examples.batches(2)] == [2, 1]


def test_the_official_files_serve_their_own_dataset_lock(tmp_path, made):
    (tmp_path / "CIFAR-10-C").symlink_to(made)
    for name, which, source in (
        ("cifar10c", "cifar10", "official"),
        ("cifar10c", "cifar100", "generated"),
        ("cifar10c", "digits", "generated"),
        ("cifar100c", "cifar10", "generated"),
        ("cifar100c", "cifar100", "generated"),
        ("corruptions", "cifar10", "generated"),
    ):
        for root in (tmp_path, made)[: 1 if (name, which) == ("cifar100c", "cifar100") else 2]:
            assert load_shift(name, dataset(name=which), EVERYTHING, root).source == source, (name, which)
    with pytest.raises(
        UsageError, match="--shift imagenet-c is none of cifar10c, cifar100c, corruptions, no folder here, and no"
    ):
        load_shift("imagenet-c", dataset(), EVERYTHING, tmp_path)


def test_a_part_of_the_files_is_used_and_what_is_missing_is_named(tmp_path):
    folder = official(tmp_path, dataset(), ("contrast", "saturate"))
    shift = load_shift("cifar10c", dataset(), EVERYTHING, tmp_path)
    assert (shift.source, shift.corruptions, shift.headline) == ("official", ("contrast", "saturate"), ("contrast",))
    assert {*shift.not_covered} == {*HEADLINE, *VALIDATION} - {"contrast", "saturate"}
    for path in folder.glob("*[et].npy"):
        path.unlink()
    with pytest.raises(DataError, match=r"has labels\.npy but no corruption: fetch it again with ensembler data downl"):
        load_shift("cifar10c", dataset(), EVERYTHING, tmp_path)


def object_array(rows):
    return np.array([{"a": "pickle"}] * len(rows), dtype=object)


def other(rows):
    changed = rows.copy()
    changed[17] += 1
    return changed


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "contrast",
            lambda rows: rows[:-1],
            r"contrast\.npy holds \(299, 32, 32, 3\) of uint8, not \(300, 32, 32, 3\)",
        ),
        ("contrast", lambda rows: rows.transpose(0, 3, 1, 2), r"contrast\.npy holds \(300, 3, 32, 32\) of uint8"),
        (
            "contrast",
            lambda rows: rows.astype(np.float32),
            r"contrast\.npy holds .* of float32, not .* of uint8: remove",
        ),
        ("contrast", lambda rows: rows.astype(np.int8), "of int8, not"),
        ("contrast", lambda rows: rows[:, ::2, ::2], "not .* use --shift corruptions, or the test images in their own"),
        ("contrast", object_array, r"cannot read .*contrast\.npy: .*[Pp]ython objects"),
        ("labels", object_array, r"cannot read .*labels\.npy: "),
        ("labels", lambda rows: rows[:-1], r"labels\.npy holds \(299,\) labels, not \(300,\): remove the folder"),
        ("labels", lambda rows: rows[:, None], r"labels\.npy holds \(300, 1\) labels"),
        ("labels", other, r"labels\.npy is not the test set's labels five times: row 17 is (\d), not \d: remove"),
        ("labels", np.sort, r"labels\.npy is not the test set's labels five times: row 1 is 0"),
        ("labels", lambda rows: np.repeat(rows[:N], 5), r"labels\.npy is not the test set's labels five times"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, file, change, message):
    folder = official(tmp_path, dataset(), ("contrast",))
    rewrite(folder / f"{file}.npy", change)
    with pytest.raises(DataError, match=message):
        load_shift("cifar10c", dataset(), EVERYTHING, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "cannot read .*mmap length is greater than file size"),
        (lambda content: content[:100], "cannot read"),
        (lambda content: b"", "cannot read"),
        (lambda content: content + b"123", "is 3 bytes longer than its header says"),
        (lambda content: b"PK\3\4" + content, "cannot read .*magic string"),
        (lambda content: b"\x80\x04N.", "cannot read .*magic string"),  # a pickle
        (lambda content: content.replace(b"'shape'", b"'shapf'"), "cannot read"),
        (lambda content: content.replace(b"'|u1'", b"__imp"), "cannot read"),
    ],
)
def test_bytes_that_are_no_array_are_refused(tmp_path, change, message):
    path = official(tmp_path, dataset(), ("contrast",)) / "contrast.npy"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{message}.*remove the folder, and fetch it again") as caught:
        load_shift("cifar10c", dataset(), EVERYTHING, tmp_path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("corruption", AVAILABLE)
def test_images_in_another_order_are_noticed(tmp_path, made, corruption):
    """The labels are right and so is the shape: only the images can tell."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    (folder / "labels.npy").symlink_to(made / "labels.npy")
    rows = np.load(made / f"{corruption}.npy").reshape(5, N, 32, 32, 3)
    last = rows.copy()
    last[4] = np.roll(last[4], -1, axis=0)
    for wrong in (np.roll(rows, 1, axis=1), rows[:, rng.permutation(N)], rows[:, ::-1], rows.swapaxes(0, 1), last):
        np.save(folder / f"{corruption}.npy", wrong.reshape(-1, 32, 32, 3))
        with pytest.raises(DataError, match=rf"{corruption}\.npy is not in the test set's order: of 60 .* only \d+%"):
            check_official(StoredFolder(folder, dataset().test, "mend"))


@pytest.mark.parametrize("corruption", ["gaussian_noise", "defocus_blur", "brightness", "contrast", "pixelate"])
@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [1, 2, 3, 4, 0], [0, 2, 1, 3, 4], [0, 4, 1, 2, 3]])
def test_severities_in_another_order_are_noticed(tmp_path, made, corruption, order):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    (folder / "labels.npy").symlink_to(made / "labels.npy")
    rows = np.load(made / f"{corruption}.npy").reshape(5, N, 32, 32, 3)
    np.save(folder / f"{corruption}.npy", rows[order].reshape(-1, 32, 32, 3))
    with pytest.raises(DataError, match=rf"{corruption}\.npy does not hold severities 1 to 5 one after the other"):
        check_official(StoredFolder(folder, dataset().test, "mend"))


def test_nothing_right_is_refused(tmp_path):
    """On real images, whatever was drawn; nor where images are blank, alike or few, and nothing can be told."""
    digits = load("digits")
    digits = dataclasses.replace(digits, test=digits.test[:100])
    folder = tmp_path / "real"
    write_corruptions(digits, folder, AVAILABLE, seed=1)
    check_official(StoredFolder(folder, digits.test, "mend"))
    for number, change in enumerate((lambda test: test[:3], lambda test: Split(test.images * 0, test.labels))):
        images = dataclasses.replace(dataset(), test=change(dataset().test))
        check_official(StoredFolder(official(tmp_path / str(number), images), images.test, "mend"))


def test_nineteen_files_of_the_official_size_are_not_read_whole(tmp_path):
    """50,000 rows of 32 x 32 each, sparse: 2.9 GB that the disk does not hold, and that memory must not either."""
    folder, peak = tmp_path / "CIFAR-10-C", Path("/proc/self/clear_refs")
    folder.mkdir()
    test = Split(torch.zeros(10_000, 32, 32, 3, dtype=torch.uint8), torch.arange(10_000) % 10)
    np.save(folder / "labels.npy", np.tile(test.labels.numpy(), 5).astype(np.uint8))
    for number, name in enumerate(HEADLINE + VALIDATION):
        with (folder / f"{name}.npy").open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (50_000, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            begin = file.tell()
            for severity in SEVERITIES:
                file.seek(begin + ((severity - 1) * 10_000 + 1234) * 3072)
                file.write(bytes([10 * number + severity]) * 3072)
            file.truncate(begin + 50_000 * 3072)
    images = dataclasses.replace(dataset(), test=test)
    if peak.exists():
        peak.write_text("5")  # the highest so far is now
    before, read = status("VmRSS"), status("rchar")
    shift = load_shift("cifar10c", images, torch.tensor([1233, 1234]), tmp_path)
    assert (shift.source, len(shift.corruptions), shift.not_covered) == ("official", 19, ())
    for number, name in enumerate(HEADLINE + VALIDATION):
        for severity in SEVERITIES:
            found = everything(cell(shift, name, severity))
            assert found[0].unique().tolist() == [0]
            assert found[1].unique().tolist() == [10 * number + severity]
    if peak.exists():
        assert status("VmHWM") - before < 60 * 2**20  # a single file is 154 MB
    assert status("rchar") - read < 60 * 2**20


def status(key):
    """Bytes, as Linux counts them of this process; 0 elsewhere."""
    for path, unit in ((Path("/proc/self/status"), 1024), (Path("/proc/self/io"), 1)):
        for line in path.read_text().splitlines() if path.exists() else ():
            if line.startswith(f"{key}:"):
                return unit * int(line.split()[1])
    return 0


# --- generated --------------------------------------------------------------------------------------------------------


def test_a_generated_folder_is_never_official(tmp_path):
    images, indices = dataset(), torch.tensor([5, 2])
    folder = tmp_path / "CIFAR-10-C"
    write_corruptions(images, folder, SOME, seed=3)
    shift = load_shift("cifar10c", images, indices, tmp_path, seed=3)
    assert (shift.source, stored(shift)) == ("generated", SOME_IN_ORDER)
    assert shift.corruptions == AVAILABLE  # what has no file is made
    assert "not the official files" in shift.note and "seed 3" in shift.note
    plain = load_shift("corruptions", images, indices, tmp_path / "empty", seed=3)
    assert stored(plain) == ()
    for one, other in zip(shift.sets, plain.sets, strict=True):
        assert torch.equal(everything(one.examples), everything(other.examples))
        assert one.examples.sha256 == other.examples.sha256
        assert one.source == other.source == "generated"
    for name, which in (("cifar10c", "cifar10"), ("corruptions", "cifar10"), ("cifar100c", "digits")):
        found = load_shift(name, dataset(name=which), indices, folder, seed=3)
        assert (found.source, stored(found)) == ("generated", SOME_IN_ORDER)
    # A folder of another seed or of other images is no help: they are made.
    for other_one in (
        load_shift("cifar10c", images, indices, tmp_path, seed=4),
        load_shift("cifar10c", dataset(seed=1), indices, tmp_path, seed=3),
    ):
        assert (other_one.source, stored(other_one)) == ("generated", ())


SOME_IN_ORDER = tuple(name for name in HEADLINE + VALIDATION if name in SOME)


@pytest.mark.parametrize(("name", "source"), [("cifar10", "official"), ("folder:/photos", "generated")])
def test_some_corruptions_are_those_of_the_whole_shift(tmp_path, made, name, source):
    images, indices = dataset(name=name), torch.tensor([3, 50])
    whole = load_shift("cifar10c" if source == "official" else "corruptions", images, indices, made.parent)
    some = load_shift("fog, gaussian_noise,fog", images, indices, made.parent)
    assert (some.name, some.source, some.corruptions) == ("gaussian_noise,fog", source, ("gaussian_noise", "fog"))
    assert some.headline == some.corruptions
    assert some.note == f"{whole.note} Chosen of them: gaussian_noise, fog."
    for severity in SEVERITIES:
        assert torch.equal(everything(cell(some, "fog", severity)), everything(cell(whole, "fog", severity)))
    (joined,) = load_shifts(["fog", "gaussian_noise"], images, indices, made.parent)
    assert joined.name == some.name
    assert load_shift("spatter", images, indices, made.parent).headline == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gaussian_noise,fogg", "lists 'fogg', which is no corruption: choose among gaussian_noise, shot_noise, .*fog"),
        ("fog,", "lists '', which is no corruption"),
        ("gaussian-noise,Fog", "lists 'gaussian-noise' and 'Fog', which are no corruptions: choose among"),
        ("fog,CIFAR-10.1", "other test sets take a --shift each"),
        ("fogg", r"--shift fogg is none of cifar10c, .* corruptions such as fog,snow \(of gaussian_noise, "),
    ],
)
def test_unknown_corruptions_are_named_beside_the_right_ones(tmp_path, name, message):
    with pytest.raises(UsageError, match=message):
        load_shift(name, dataset(), EVERYTHING, tmp_path)


def test_official_files_must_have_the_chosen_corruptions(tmp_path):
    official(tmp_path, images := dataset())
    assert load_shift("snow", images, EVERYTHING, tmp_path).source == "official"
    with pytest.raises(DataError, match="the files of cifar10c lack fog: fetch them, or leave these out"):
        load_shift("snow,fog", images, EVERYTHING, tmp_path)
    with pytest.raises(UsageError, match="corruptions and fog each have corruptions"):
        load_shifts(["corruptions", "fog"], dataset(name="digits"), EVERYTHING[:2], tmp_path / "none")


@pytest.mark.parametrize(("size", "kind"), [(64, "cifar"), (65, "imagenet")])
def test_it_is_said_whose_constants_were_taken(tmp_path, size, kind):
    images = dataset(count=2, size=size)
    shift = load_shift("corruptions", images, torch.arange(2), tmp_path)
    expected = corrupt(images.test.images, "contrast", 3, constants=kind)
    assert torch.equal(everything(cell(shift, "contrast", 3)), expected)
    assert {"cifar": "CIFAR-10-C's 32 x 32 constants", "imagenet": "with ImageNet-C's constants"}[kind] in shift.note
    write_corruptions(images, tmp_path / "made", ("contrast",))
    assert json.loads((tmp_path / "made" / "generated.json").read_text())["constants"] == kind


def test_a_generated_folder_must_hold_what_is_generated(tmp_path):
    images = dataset()
    find = lambda: load_shift("corruptions", images, EVERYTHING, tmp_path / "made")  # noqa: E731
    write_corruptions(images, tmp_path / "made", SOME)
    path = tmp_path / "made" / "contrast.npy"
    good = path.read_bytes()
    rewrite(path, lambda rows: np.roll(rows, 1, axis=0))
    with pytest.raises(
        DataError, match=r"contrast\.npy is not what this version of ensembler generates .* severity 1: rem"
    ):
        find()
    path.write_bytes(good[:-10])
    with pytest.raises(DataError, match=r"cannot read .*contrast\.npy: .*make it again with ensembler data corrupt"):
        find()
    path.write_bytes(good)
    rewrite(tmp_path / "made" / "labels.npy", np.sort)
    with pytest.raises(DataError, match=r"labels\.npy is not the test set's labels"):
        find()
    for text in ("", "{}", '{"note": 3}', "\xff"):
        (tmp_path / "made" / "generated.json").write_text(text)
        with pytest.raises(DataError, match=r"cannot read .*generated\.json"):
            find()


def test_hashes_tell_images_apart_and_make_none(tmp_path, monkeypatch):
    images, indices = dataset(), torch.tensor([5, 2])

    def sha256(corruption=SOME[0], severity=2, of=images, indices=indices, seed=0):
        return cell(load_shift("corruptions", of, indices, tmp_path, seed), corruption, severity).sha256

    monkeypatch.setattr(generated_module, "corrupt", None)
    different = {
        sha256(),
        sha256(SOME[1]),
        sha256(severity=3),
        sha256(of=dataset(seed=1)),
        sha256(indices=torch.tensor([5, 3])),
        sha256(indices=torch.tensor([2, 5])),
        sha256(seed=1),
    }
    assert len(different) == 7
    assert sha256() in different
    monkeypatch.setattr(generated_module, "fingerprint", lambda *_: "of another version")
    assert sha256() not in different


def test_hashes_of_official_files_are_of_the_bytes_used(tmp_path):
    images, indices = dataset(), torch.tensor([5, 2])
    folder = official(tmp_path, images, ("contrast",))

    def sha256(severity=2):
        return cell(load_shift("cifar10c", images, indices, tmp_path), "contrast", severity).sha256

    first = sha256()
    rows = np.load(folder / "contrast.npy")
    labels = images.test.labels[indices].numpy().tobytes()
    assert first == hashlib.sha256(repr((2, 32, 32)).encode() + labels + rows[[N + 5, N + 2]].tobytes()).hexdigest()
    assert sha256(3) != first
    for row, same in ((N + 4, True), (N + 5, False)):
        rows[row] ^= 1
        np.save(folder / "contrast.npy", rows)
        assert (sha256() == first) == same


def test_images_in_their_files(tmp_path, images):
    name = images[1]
    held, lazy = (load(name, image_size=8, in_memory=in_memory) for in_memory in (True, False))
    indices = torch.tensor([9, 0, 4])
    shifts = [load_shift("corruptions", each, indices, tmp_path) for each in (held, lazy)]
    one, other = (cell(each, SOME[0], 5) for each in shifts)
    assert isinstance(other.clean, FileSplit)
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.images(slice(None)), everything(other))
    for number, each in enumerate((held, lazy)):
        write_corruptions(each, tmp_path / str(number), SOME)
    assert files(tmp_path / "0") == files(tmp_path / "1")
    assert stored(load_shift("corruptions", lazy, indices, tmp_path / "1")) == SOME_IN_ORDER


META = torch.device("meta")  # stands in for a GPU: shapes, and no data


def test_corruptions_are_made_where_the_networks_are_and_the_clean_images_go_there_once(tmp_path, monkeypatch):
    made, ups = [], []

    def spy(images, corruption, severity, *, indices, seed):
        made.append((corruption, severity, images.device, len(images), indices.tolist()))
        return images

    monkeypatch.setattr(generated_module.Corrupted, "_made_alike", lambda self, device: True)
    monkeypatch.setattr(generated_module, "corrupt", spy)
    monkeypatch.setattr(Split, "to", lambda self, device, to=Split.to: ups.append(device) or to(self, device))
    shift = load_shift("corruptions", dataset(), EVERYTHING[:5], tmp_path)
    batches = [batch for one in shift.sets for batch in one.batches(META)]
    assert {batch.device for batch in batches} == {META}
    assert made == [(name, severity, META, 5, [0, 1, 2, 3, 4]) for name in AVAILABLE for severity in SEVERITIES]
    assert ups == [META]
    monkeypatch.setattr(generated_module, "_UPLOADED", 0)
    again = next(load_shift("corruptions", dataset(), EVERYTHING[:5], tmp_path).sets[0].batches(META))
    assert again.device == META
    assert ups == [META], "too many to stay there: they go batch by batch"


def test_a_device_that_makes_other_bytes_makes_none(tmp_path, monkeypatch):
    examples = cell(load_shift("corruptions", dataset(), EVERYTHING[:5], tmp_path), "contrast", 3)
    expected = everything(examples)
    own = generated_module.corrupt

    def otherwise(images, *given, **named):
        black = torch.zeros(images.shape, dtype=torch.uint8)
        return black if images.device == META else own(images, *given, **named)

    monkeypatch.setattr(generated_module, "corrupt", otherwise)
    assert torch.equal(examples.images(slice(None), META), expected)


# --- ensembler data corrupt -------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


def call(*arguments):
    return CliRunner().invoke(app, ["data", "corrupt", *map(str, arguments)])


def test_a_folder_is_made_in_the_official_layout(tmp_path):
    out = tmp_path / "made"
    result = call("digits", "--out", out, "--image-size", 8, "--seed", 7)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{out}: generated {len(AVAILABLE)} corruptions of 360 images, marked as generated"
    assert f"{AVAILABLE[0]}: 0 of 7 MB" in result.stderr  # 19 corruptions x 5 severities x 360 images x 192 bytes
    test = load("digits", image_size=8).test
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.npy" for name in AVAILABLE),
        *("labels.npy", "generated.json", ".lock"),
    }
    labels = np.load(out / "labels.npy")
    assert labels.dtype == np.uint8
    assert labels.tolist() == test.labels.tolist() * 5
    for name in AVAILABLE:
        rows = np.load(out / f"{name}.npy", allow_pickle=False)
        assert (rows.shape, rows.dtype, rows.flags.c_contiguous) == ((1800, 8, 8, 3), np.uint8, True)
        for severity in (1, 4):
            expected = corrupt(test.images[100:120], name, severity, indices=range(100, 120), seed=7)
            assert np.array_equal(rows[(severity - 1) * 360 :][100:120], expected.numpy())
    record = json.loads((out / "generated.json").read_text())
    assert "not the official files" in record["note"]
    assert (record["seed"], record["dataset"], record["test_examples"]) == (7, "digits", 360)
    assert record["test_sha256"] == test.sha256
    assert torch.__version__.startswith(record["versions"]["torch"])
    result = call("digits", "--out", out, "--image-size", 8, "--seed", 7, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "generated 0 corruptions of 360 images" in result.stdout


@pytest.mark.parametrize("batch", [1, 7 * 32 * 32 * 3, 2**25])
def test_the_bytes_do_not_depend_on_the_batches(tmp_path, monkeypatch, made, batch):
    monkeypatch.setattr(module, "_BATCH", batch)
    told = []
    write_corruptions(dataset(), tmp_path, SOME, watch=lambda *now: told.append(now))
    for name in SOME:
        assert (tmp_path / f"{name}.npy").read_bytes() == (made / f"{name}.npy").read_bytes()
    done = [now[1] for now in told]
    assert done == sorted(done) and {now[2] for now in told} == {done[-1]} == {4 * 5 * N * 32 * 32 * 3}


def test_a_kill_in_the_middle_loses_one_file_at_most(tmp_path, made):
    code = (
        "import sys; from tests.test_shift import AVAILABLE, Path, dataset, write_corruptions;"
        "write_corruptions(dataset(), Path(sys.argv[1]), AVAILABLE, watch=lambda *now: (print(*now, flush=True),"
        "sys.stdin.readline()))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    for _ in range(8):
        assert process.stdout.readline()
        process.stdin.write("go on\n")
        process.stdin.flush()
    assert process.stdout.readline()
    with pytest.raises(UsageError, match="another process is working on"):
        write_corruptions(dataset(), tmp_path, AVAILABLE)
    process.kill()
    process.communicate()
    assert len(list(tmp_path.glob(".partial-*"))) == 1
    assert_begun(tmp_path, made, 1)

    def interrupt(label, done, total):
        if label == AVAILABLE[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corruptions(dataset(), tmp_path, AVAILABLE, watch=interrupt)
    assert_begun(tmp_path, made, 2)
    assert not list(tmp_path.glob(".partial-*"))
    assert write_corruptions(dataset(), tmp_path, AVAILABLE) == [*AVAILABLE[2:]]
    assert files(tmp_path) == files(made)
    assert not list(tmp_path.glob(".partial-*"))


def assert_begun(folder, made, count):
    """The first files are there, whole, and are used; nobody takes them for official ones."""
    expected = {f"{name}.npy" for name in ("labels", *AVAILABLE[:count])}
    found = files(folder)
    assert {name for name in found if not name.startswith(".")} == expected
    assert all(found[name] == (made / name).read_bytes() for name in expected)
    shift = load_shift("cifar10c", dataset(), EVERYTHING, folder)
    assert (shift.source, stored(shift), shift.corruptions) == ("generated", AVAILABLE[:count], AVAILABLE)


def test_a_folder_of_something_else_is_left_lock(tmp_path):
    write_corruptions(dataset(), tmp_path, SOME[:1])
    before = files(tmp_path)
    for images, seed, message in (
        (dataset(), 1, "was begun with seed 0, not 1: choose another --out"),
        (dataclasses.replace(dataset(seed=1), title="others"), 0, r"was begun with other images \(cifar10\)"),
        (dataset(size=8), 0, "was begun with other images"),
    ):
        with pytest.raises(UsageError, match=message):
            write_corruptions(images, tmp_path, SOME, seed=seed)
    path = tmp_path / f"{SOME[0]}.npy"
    rewrite(path, lambda rows: rows[::-1])  # of an older version, say
    with pytest.raises(DataError, match="is not what this version of ensembler generates"):
        write_corruptions(dataset(), tmp_path, SOME)
    path.write_bytes(before[path.name])
    (tmp_path / "generated.json").unlink()
    with pytest.raises(UsageError, match="holds arrays that were not generated here: choose another --out"):
        write_corruptions(dataset(), tmp_path, SOME)
    assert files(tmp_path) == before


def test_bad_input_gets_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for arguments, message in (
        (
            ["digits", "--out", tmp_path / "x", "--corruptions", "fogg,rain"],
            "there is no corruption fogg, rain: choose",
        ),
        (["digits", "--out", tmp_path / "x", "--corruptions", ""], "there is no corruption"),
        (["nothing", "--out", tmp_path / "x"], "unknown dataset 'nothing'"),
        (["digits", "--out", tmp_path / "file" / "x"], "cannot write to"),
        (["cifar10", "--out", tmp_path / "x", "--data", tmp_path], "CIFAR-10 is not in"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ") and message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(ArtefactError, match=r"has 0\.0 MB free, and 4 corruptions take \d\.\d MB: make room"):
            write_corruptions(dataset(), tmp_path, SOME)
    opened = Path.open

    def full_disk(path, mode="r", *rest, **options):
        file = opened(path, mode, *rest, **options)
        if path.name != ".partial-contrast.npy":
            return file
        file.close()
        return FullDisk()

    monkeypatch.setattr(Path, "open", full_disk)
    with pytest.raises(
        ArtefactError, match=r"cannot write to .*: No space left on device: .* complete files were kept"
    ):
        write_corruptions(dataset(), tmp_path, ("gaussian_noise", "contrast"))
    assert {path.name for path in tmp_path.glob("*.npy")} == {"labels.npy", "gaussian_noise.npy"}
    assert not list(tmp_path.glob(".partial-*"))


class FullDisk(io.BytesIO):
    def write(self, content):
        if self.tell() > 5000:
            raise OSError(28, "No space left on device")
        return super().write(content)


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with lock(tmp_path / ".lock", tmp_path), pytest.raises(UsageError, match="another process is working on"):
            lock(tmp_path / ".lock", tmp_path)


def test_where_a_file_system_has_no_locks_the_work_goes_on(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", without)
    with lock(tmp_path / ".lock", tmp_path) as held:
        assert not held.closed
