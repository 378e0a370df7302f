"""Folders as people bring them: layouts, files that are no images, few images, duplicates, names in any script."""

from __future__ import annotations

import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ensembler.data import datasets, decoding, folders
from ensembler.data.datasets import Dataset
from ensembler.data.decoding import decode
from ensembler.data.splits import hold_out
from ensembler.errors import DataError
from ensembler.run import DatasetRecord, Run
from ensembler.trainers.methods.deep_ensemble import DeepEnsemble
from ensembler.trainers.settings import Settings
from ensembler.trainers.training import train
from tests._training import call

COUNTS = {"cat": 20, "dog": 20}
SPLITS = {"train": 9, "test": 9}


def fill(folder: Path, counts: dict[str, int] = COUNTS, seed: int = 0) -> Path:
    """Write a folder of 8 x 8 images, all different, for each class."""
    rng = np.random.default_rng([seed, *folder.name.encode()])
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder


def load(folder: Path, **options) -> Dataset:
    return datasets.load(f"folder:{folder}", **options)


def sizes(dataset: Dataset) -> tuple[int, int, int]:
    return len(dataset.train), len(dataset.validation), len(dataset.test)


# --- layouts ---


@pytest.mark.parametrize(
    ("names", "expected", "said"),
    [
        (
            ("train", "test"),
            (36, 4, 40),
            "36 to train on (train/), 4 for validation (held out of train/), 40 for testing",
        ),
        (("Train", "TEST"), (36, 4, 40), "(TEST/)"),
        (("training", "testing"), (36, 4, 40), "(testing/)"),
        (
            ("train", "val"),
            (32, 40, 8),
            "(val/), 8 for testing (a fifth of train/, as there is no test/)",
        ),
        (("TRAIN", "Valid"), (32, 40, 8), "(Valid/)"),
        (("train", "validation", "test"), (40, 40, 40), "40 for validation (validation/), 40 for testing (test/)"),
        (("train",), (28, 4, 8), "28 to train on (train/)"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_splits_are_never_classes(tmp_path, names, expected, said, in_memory):
    for name in names:
        fill(tmp_path / name)
    (tmp_path / "README.md").write_text("hello")
    dataset = load(tmp_path, in_memory=in_memory, image_size=8)
    assert dataset.classes == ("cat", "dog")
    assert sizes(dataset) == expected
    (line,) = dataset.notes
    assert line.startswith(f"{tmp_path}: {sum(expected)} images of 2 classes, ")
    assert said in line
    assert line.endswith("; left out: 1 .md (README.md)")


def test_the_validation_split_is_val(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "val" / "cat" / "000.png").unlink()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "val" / "cat" / "mine.png")
    validation = load(tmp_path).validation
    assert validation.images[0, 0, 0].tolist() == [1, 2, 3]
    before = DatasetRecord.of(load(tmp_path))
    Image.new("RGB", (8, 8), (1, 2, 4)).save(tmp_path / "val" / "cat" / "mine.png")
    with pytest.raises(DataError, match="its validation images differ"):
        before.check(load(tmp_path))


def test_a_class_may_have_a_splits_name(tmp_path):
    fill(tmp_path, {"bus": 20, "train": 20, "valid": 20})
    with pytest.raises(DataError, match="train must hold one folder of images for each class, at least two; found 0"):
        load(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    assert load(tmp_path).classes == ("bus", "train")


@pytest.mark.parametrize(
    ("filled", "message"),
    [
        ({"val": COUNTS, "test": COUNTS}, "has val/ and test/ but no train/"),
        ({"train": COUNTS, "Training": COUNTS, "test": COUNTS}, "has Training/ and train/: keep one of them"),
        ({"train": COUNTS, "extra": COUNTS}, "holds train/, which holds folders, beside extra/: if it is a split"),
        ({"photos": COUNTS}, r"at least two; found 1; is .*photos meant\?"),
        (
            {"cat": SPLITS, "dog": SPLITS},
            "cat holds test/ and train/: put the splits first, test/cat instead of cat/test",
        ),
        (
            {"train": COUNTS, "test": COUNTS | {"cow": 1, "ant": 1}},
            "test has the classes 'ant', 'cow', which .*train has",
        ),
        ({"train": COUNTS, "val": {"Cat": 1}}, "val has the class 'Cat', which .*train has not"),
        (
            {"training_set": COUNTS, "test_set": COUNTS},
            "holds test_set/ and training_set/, which hold folders: if they",
        ),
        ({"train2017": COUNTS, "val2017": COUNTS, "cow": COUNTS}, "holds train2017/ and val2017/, which hold folders"),
        ({"TrainData/a": COUNTS, "seg-test/b": COUNTS}, "if they are splits, call them train/, val/ and test/"),
        ({"": {"photos": 20}}, r"found 1: sort the images into folders, or .* from Python \(ensembler.as_dataset\)$"),
        ({"": COUNTS | {"emu": 0}}, "emu holds no image that is read .*: add some, or remove the folder$"),
    ],
)
def test_layouts_that_mean_nothing_are_refused_in_one_line(tmp_path, filled, message):
    for name, counts in filled.items():
        fill(tmp_path / name, counts)
    with pytest.raises(DataError, match=message) as refused:
        load(tmp_path)
    assert "\n" not in str(refused.value)


def test_classes_may_be_called_like_parts_of_a_split(tmp_path):
    assert load(fill(tmp_path, {"bullet_train": 20, "test_tube": 20})).classes == ("bullet_train", "test_tube")


def test_folders_of_the_same_names_in_all_classes_are_said(tmp_path):
    for name in ("photo", "sketch"):
        fill(tmp_path / name)
    (note,) = load(tmp_path).notes[1:]
    assert note.startswith("all classes hold folders of the same names (cat, dog): if those are the classes, name a")
    assert note.endswith(f"such as {tmp_path / 'photo'}")
    fill(tmp_path / "sketch", {"emu": 1})
    assert len(load(tmp_path).notes) == 1


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"photos.zip is a file: name a folder of images; unpack an archive first"):
        load(tmp_path / "photos.zip")


def test_splits_without_folders_of_classes_are_left_out_and_said(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path, {"test": 3})
    dataset = load(tmp_path)
    assert sizes(dataset) == (28, 4, 8)
    assert "3 in a split without a folder for each class (test/000.png, test/001.png, test/002.png)" in dataset.notes[0]
    (tmp_path / "val").mkdir()
    assert "without a folder for each class (val/, test/000.png, " in load(tmp_path).notes[0]


def test_a_class_that_a_split_lacks_is_said(tmp_path):
    fill(tmp_path / "train", COUNTS | {"emu": 20})
    fill(tmp_path / "test")
    assert "classes without an image: 1 in the test images (emu)" in load(tmp_path).notes


# --- files ---


def test_hidden_files_and_what_systems_leave_behind_are_passed_over(tmp_path):
    right = DatasetRecord.of(load(fill(tmp_path / "plain")))
    folder = fill(tmp_path / "photos")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "plain", folder)
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails"):
        shutil.copytree(folder / "cat", folder / "dog" / name)
    shutil.copytree(tmp_path / "plain", folder / "__MACOSX")
    (folder / "lost+found").mkdir()
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "cat" / name).write_bytes(b"\0\5\26\7")
        (folder / name).write_bytes(b"")
    (folder / "dog" / "scan.tif").mkdir()
    (folder / "cat" / "labels.csv").write_text("")
    (folder / "cat" / "live.HEIC").write_bytes(b"")
    (folder / "loose.png").write_bytes(b"")
    (folder / "cat" / "gone.png").symlink_to("nowhere")
    dataset = load(folder)
    right.check(dataset)
    (line,) = dataset.notes
    assert "14 hidden or of the system (" in line
    for said in ("1 .csv (cat/labels.csv)", "1 .heic (cat/live.HEIC)", "1 in no folder of a class (loose.png)"):
        assert said in line
    assert "1 linked to nothing (cat/gone.png)" in line


def test_links_are_followed_once(tmp_path):
    fill(tmp_path / "store", {"all": 5})
    folder = fill(tmp_path / "photos", {"dog": 5})
    (folder / "cat").symlink_to(tmp_path / "store" / "all")
    (tmp_path / "store" / "all" / "again").symlink_to(folder)  # a loop
    (folder / "dog" / "self").symlink_to(".")
    dog, _ = folders.find_images(folder / "dog")
    assert len(dog) == 5
    cat, _ = folders.find_images(folder / "cat")
    assert len(cat) == 10


def test_every_format_that_pillow_decodes_is_taken(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number, suffix in enumerate(("png", "JFIF", "jpe", "tif", "webp", "gif", "bmp", "ppm", "avif")):
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir(exist_ok=True)
            kind = {"JFIF": "JPEG", "jpe": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
            if f".{suffix.lower()}" in folders.suffixes():
                Image.fromarray(pixels + number).save(tmp_path / name / f"a.{suffix}", kind)
    assert sum(sizes(load(tmp_path))) >= 14


def test_images_in_training_and_test_are_counted(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", {"cat": 3, "dog": 3}, seed=1)
    shutil.copy(tmp_path / "train" / "cat" / "007.png", tmp_path / "test" / "cat" / "copy.png")
    Image.open(tmp_path / "train" / "dog" / "003.png").save(tmp_path / "test" / "dog" / "other bytes.bmp")
    held = load(tmp_path, validation=0.01).notes[-1]
    assert held.startswith(
        "2 of 8 test images are training images, too (such as test/cat/copy.png, which is train/cat/007.png)"
    )
    files = load(tmp_path, validation=0.01, in_memory=False, image_size=8).notes[-1]
    assert files.startswith("1 of 8 test images")


# --- few images ---


@pytest.mark.parametrize("counts", [{"a": 5, "b": 5}, {"a": 1, "b": 9}, {"a": 2, "b": 2}, dict.fromkeys("abcdefgh", 2)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_few_images_are_split_as_far_as_they_go(tmp_path, counts, in_memory):
    dataset = load(fill(tmp_path, counts), in_memory=in_memory, image_size=8)
    assert sum(sizes(dataset)) == sum(counts.values())
    assert min(sizes(dataset)) >= 1
    assert set(dataset.train.labels.tolist()) == set(range(len(counts)))
    assert dataset.notes[1].startswith("classes without an image: ")


def test_as_many_images_as_are_needed_and_one_fewer(tmp_path):
    assert sizes(load(fill(tmp_path / "enough", {"a": 1, "b": 3}))) == (2, 1, 1)
    with pytest.raises(DataError, match=r"too few images to hold any out: 3 of 2 classes, and at least 4 are needed$"):
        load(fill(tmp_path / "few", {"a": 1, "b": 2}))


def test_large_classes_are_held_out_by_their_share_where_small_ones_cannot_be():
    labels = np.repeat(np.arange(12), [100, 50] + [1] * 10)
    rest, held = hold_out(labels, 0.2, "these")
    assert np.bincount(labels[held], minlength=12).tolist()[2:] == [0] * 10
    assert len(held) == 32
    assert np.bincount(labels[held])[:2] == pytest.approx([20, 10], abs=2)
    assert np.array_equal(np.sort(np.concatenate([rest, held])), np.arange(160))
    assert np.array_equal(held, hold_out(labels, 0.2, "these")[1])


def test_long_tails_are_trained_and_scored(tmp_path):
    said = []
    run = train(
        load(fill(tmp_path, {"a": 1, "b": 2, "c": 9})),
        DeepEnsemble(members=2),
        Settings(architecture="tests._small:network", epochs=1),
        on_event=lambda event: said.append(getattr(event, "text", "")),
    )
    assert np.isfinite(run.manifest.metrics["test"]["nll"])
    assert any(line.startswith(f"{tmp_path}: 12 images of 3 classes") for line in said)


# --- names ---

NAMES = ("[bold]x", "[red]", "Kätzchen", "猫", "a, b", "<b>&")


def test_names_in_any_script_are_shown_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    fill(tmp_path / "[red]photos", dict.fromkeys(NAMES, 9))
    command = ["train-deep-ensemble", "--dataset", "folder:[red]photos", "--members", 1, "--epochs", 0.2]
    done = call(*command, "--arch", "tests._small:network", "--out", "runs/[x]")
    assert done.exit_code == 0, done.output
    assert "on [red]photos" in done.output
    shown = call("show", "runs/[x]").output
    for name in NAMES:
        assert f"{name} (" in shown
    assert call("eval", "runs/[x]", "--out", "r", "--quiet").exit_code == 0
    code = "from ensembler.cli import main; import sys; sys.argv = ['ensembler', 'show', 'runs/[x]']; main()"
    environment = {"PYTHONIOENCODING": "ascii", "COLUMNS": "500", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert b"\\u732b (" in found.stdout
    assert b"K\\xe4tzchen (" in found.stdout


def test_names_that_differ_by_their_composition_only_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Kätzchen") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", {composed: 9, "dog": 9})
    fill(tmp_path / "test", {decomposed: 9, "dog": 9})
    assert load(tmp_path).classes == (composed, "dog")
    fill(tmp_path / "train", {decomposed: 9})
    with pytest.raises(DataError, match="two folders that both read 'Kätzchen'"):
        load(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    fill(tmp_path)
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "\udce9.png")
    with pytest.raises(DataError, match=r"the name of b'\\xe9\.png' in .*cat is not UTF-8: rename it"):
        load(tmp_path)


# --- moved ---


@pytest.fixture
def moved(tmp_path, monkeypatch) -> Path:
    """A run in ``run`` of the folder ``here/photos``, which is now ``there/photos``."""
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "here" / "photos")
    run = train(load(folder), DeepEnsemble(members=3), Settings(architecture="tests._small:network", epochs=1))
    run.save("run")
    (tmp_path / "there").mkdir()
    folder.rename(tmp_path / "there" / "photos")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "run", "--out", "x"),
        ("calibrate", "run"),
        ("collapse", "run", "--out", "x"),
        ("surface", "run", "--grid", 2, "--examples", 8, "--batchnorm-examples", 8, "--out", "x"),
        ("train-simplex", "--init", "run", "--vertices", 2, "--members", 2, "--epochs", 1, "--out", "x"),
        ("train-deep-ensemble", "--config", "run", "--out", "x"),
    ],
    ids=lambda command: command[0],
)
def test_images_that_have_moved_are_found(moved, command):
    lost = call(*command)
    assert lost.exit_code == 1
    assert lost.stderr.splitlines()[-1].endswith("if the images of a run have moved, give --data PATH")
    done = call(*command, "--data", "there/photos")
    assert done.exit_code == 0, done.output


def test_the_hash_proves_that_the_images_are_the_same(moved, monkeypatch):
    record = Run.load("run").manifest.dataset
    right = record.load(Path("there"))  # the folder that holds it under its own name
    assert right.name == f"folder:{moved / 'there' / 'photos'}"
    Path("corruptions").mkdir()
    Path("there/photos").rename("here/photos")
    assert record.load(Path("corruptions")).name == f"folder:{moved / 'here' / 'photos'}"  # no images are meant
    with pytest.raises(DataError, match=r"no folder of images at .*nowhere"):
        record.load(Path("nowhere"))
    fill(moved / "other" / "photos", seed=9)
    with pytest.raises(DataError, match=r"photos has changed since the run .*: point --data at the original files, or"):
        record.load(Path("other"))
    monkeypatch.setattr(decoding, "decode", lambda file, shape=None: decode(file, shape) // 2 * 2)
    with pytest.raises(
        DataError, match=r"training images of .* differ from the run's although their files are the same"
    ):
        record.load()
