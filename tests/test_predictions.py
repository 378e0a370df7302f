"""Predictions: reduced right in any batches, made once, kept whole, made again where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ensembler import artefact
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError
from ensembler.eval import predictions as module
from ensembler.eval.predictions import Predictor, Slice, default_folder, predictions
from ensembler.trainers import Session, Settings, train_deep_ensemble
from ensembler.uncertainty import uncertainty
from tests._small import SETTINGS, dataset


@pytest.fixture
def predictor(tmp_path):
    path = train_deep_ensemble(Session(dataset(), Settings(**SETTINGS)), members=3).save(tmp_path / "runs" / "deep")
    return Predictor(Ensemble.load(path, device="cpu"), artefact.sha256(path / "manifest.json"), tmp_path / "cache")


class Images:
    """A slice that counts how often its images are made."""

    def __init__(self, size: int = 4, *, members: bool = True, labelled: bool = True) -> None:
        test = dataset().test
        self.made = 0
        self.images, labels = test.images, test.labels.numpy() if labelled else None
        self.slice = Slice("test", f"{test.sha256}/{labelled}", lambda: self.batches(size), labels, members=members)

    def batches(self, size):
        self.made += 1
        yield from self.images.split(size)


def get(predictor, *images, watch=lambda label, done, total: None):
    return [found[0] for _, found in predictions([predictor], [one.slice for one in images], watch)]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_scores_need_is_that_of_all_members_at_once(predictor, size, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5 * 3 * 64)
    images = Images(size)
    (found,) = get(predictor, images)
    members = predictor.ensemble.predict_members(images.images).numpy()
    doubt = uncertainty(members)
    np.testing.assert_allclose(found.members, members, atol=1e-6)
    np.testing.assert_allclose(found.mean, members.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.expected_entropy, doubt.expected_entropy, atol=1e-6)
    np.testing.assert_allclose(found.mutual_information, doubt.mutual_information, atol=1e-6)
    np.testing.assert_allclose(found.disagreement, doubt.disagreement, atol=1e-12)
    np.testing.assert_array_equal(found.classes, members.argmax(axis=2))
    labels = dataset().test.labels.numpy()
    np.testing.assert_allclose(found.label_probabilities, members[:, np.arange(len(labels)), labels], atol=1e-6)


def test_nothing_is_predicted_twice(predictor, monkeypatch):
    images, told = Images(), []
    (first,) = get(predictor, images, watch=lambda *progress: told.append(progress))
    monkeypatch.setattr(Ensemble, "predict_members", None)
    (again,) = get(predictor, images)
    assert images.made == 1
    assert told == [("test", 1, 1)]
    assert again.mean.tobytes() == first.mean.tobytes()
    assert np.array_equal(again.members, first.members)
    assert not [path for path in predictor.folder.rglob("*") if path.name.startswith(".partial")]


def test_other_members_other_images_and_other_labels_are_other_predictions(predictor, tmp_path):
    one, unlabelled = Images(), Images(members=False, labelled=False)
    get(predictor, one, unlabelled)
    assert (one.made, unlabelled.made) == (1, 1)
    other = Predictor(predictor.ensemble, "0" * 64, predictor.folder)
    get(other, one)
    assert one.made == 2
    (found,) = get(predictor, unlabelled)
    assert found.label_probabilities.shape == (3, 0)


@pytest.mark.parametrize("harm", ["flip", "truncate", "members missing", "members truncated"])
def test_a_prediction_that_is_not_whole_is_made_again(predictor, harm):
    images = Images()
    (first,) = get(predictor, images)
    path = predictor.path(images.slice)
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-5] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-5])
    elif harm == "members missing":
        path.with_suffix(".npy").unlink()
    else:
        path.with_suffix(".npy").write_bytes(path.with_suffix(".npy").read_bytes()[:-7])
    (again,) = get(predictor, images)
    assert images.made == 2
    assert again.mean.tobytes() == first.mean.tobytes()


def test_runs_that_have_seen_a_slice_are_not_shown_it(predictor, monkeypatch):
    images = Images()
    get(predictor, images)
    other = Predictor(predictor.ensemble, "0" * 64, predictor.folder)
    seen = []
    predict = Ensemble.predict_members
    monkeypatch.setattr(Ensemble, "predict_members", lambda self, x: seen.append(len(x)) or predict(self, x))
    ((_, found),) = predictions([predictor, other], [images.slice])
    assert sum(seen) == len(images.images)
    assert found[0].mean.tobytes() == found[1].mean.tobytes()


def test_a_run_named_twice_is_shown_a_slice_twice(predictor):
    twin = Predictor(predictor.ensemble, predictor.run, predictor.folder)
    ((_, found),) = predictions([predictor, twin], [Images().slice])
    assert found[0].mean.tobytes() == found[1].mean.tobytes()


def test_a_full_disk_is_said_and_nothing_half_written_stays(predictor, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ensembler.eval.predictions.np.lib.format.write_array_header_1_0", full)
    with pytest.raises(ArtefactError, match=r"cannot keep predictions in .*No space left"):
        get(predictor, Images())
    assert not [path for path in predictor.folder.rglob("*") if path.is_file()]


def test_a_slice_that_cannot_be_made_leaves_nothing(predictor):
    def broken():
        yield dataset().test.images[:2]
        raise RuntimeError("a broken file")

    labels = dataset().test.labels.numpy()
    with pytest.raises(RuntimeError, match="a broken file"):
        list(predictions([predictor], [Slice("test", "key", broken, labels, members=True)]))
    assert not [path for path in predictor.folder.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_to_is_named(predictor, tmp_path):
    (tmp_path / "file").write_text("")
    there = Predictor(predictor.ensemble, predictor.run, tmp_path / "file")
    with pytest.raises(ArtefactError, match=r"cannot keep predictions in .*file.*choose another --cache"):
        get(there, Images())


def test_where_predictions_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "ensembler" / "predictions"


def test_memory_does_not_grow_with_the_members(predictor):
    """25 members on 50,000 images: what is held is one mean, not 25 predictions."""
    ensemble = predictor.ensemble
    held = []
    labels = np.zeros(3000, dtype=np.int64)
    images = Slice("many", "many", lambda: torch.zeros(3000, 8, 8, 3, dtype=torch.uint8).split(500), labels)
    for _, (found,) in predictions([predictor], [images]):
        held = [found.mean, found.expected_entropy, found.classes, found.label_probabilities]
        assert found.members is None
    assert sum(array.nbytes for array in held) == 3000 * 4 * (len(ensemble.classes) + 1 + 2 * ensemble.members)
