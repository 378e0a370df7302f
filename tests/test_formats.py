"""Old files stay readable: one of each kind in its first format, kept for ever; later formats are refused clearly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ensembler import artefact, calibration
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError
from ensembler.eval.predictions import predictions
from ensembler.run import Run
from ensembler.serve.runtime.manifest import read_bundle
from ensembler.serve.runtime.verify import verify_bundle
from ensembler.trainers import train_deep_ensemble
from ensembler.trainers.checkpoints import Checkpoints
from tests._formats import RUN, images, predictor, session
from tests._small import dataset

DATA = Path(__file__).parent / "data"


@pytest.fixture
def probabilities():
    """(M, B, C) of the kept run's members on the small dataset's test images, computed by hand."""
    run, members = Run.load(RUN), []
    x = (dataset().test.images.permute(0, 3, 1, 2) / 255 - 0.4) / 0.25
    for m, row in enumerate(run.coefficients):
        w = {name: torch.einsum("k,k...->...", row, tensor) for name, tensor in run.vertices.items()}
        b = {name: rows[m] for name, rows in run.buffers.items()}
        z = torch.conv2d(x, w["body.0.weight"], w["body.0.bias"], stride=2)
        z = torch.batch_norm(
            *(z, w["body.1.weight"], w["body.1.bias"], b["body.1.running_mean"], b["body.1.running_var"]),
            *(False, 0.0, 1e-5, False),
        )
        members.append(torch.softmax(z.relu().flatten(1) @ w["head.weight"].T + w["head.bias"], dim=1).numpy())
    return np.stack(members)


def test_a_run_of_the_first_format(probabilities):
    run = Run.load(RUN)
    assert run.manifest.format == 1
    found = Ensemble(run, "cpu").predict_members(dataset().test.images).numpy()
    np.testing.assert_allclose(found, probabilities, atol=1e-5)


def test_a_bundle_of_the_first_format():
    assert read_bundle(DATA / "bundle-format-1").format == 1
    assert max(verify_bundle(DATA / "bundle-format-1").differences) < 1e-5


def test_predictions_of_the_first_format(probabilities, monkeypatch):
    """They are found where they are, and believed: what was paid for is not paid for again."""
    kept = predictor(DATA / "predictions-format-1")
    with safe_open(kept.path(images()), "numpy") as file:
        assert "format" not in file.metadata()
    monkeypatch.setattr(Ensemble, "predict_members", None)
    ((_, (found,)),) = predictions([kept], [images()])
    labels = dataset().test.labels.numpy()
    np.testing.assert_allclose(found.members, probabilities, atol=1e-5)
    np.testing.assert_allclose(found.mean, probabilities.mean(axis=0), atol=1e-5)
    np.testing.assert_array_equal(found.classes, probabilities.argmax(axis=2))
    np.testing.assert_allclose(found.label_probabilities, probabilities[:, np.arange(15), labels], atol=1e-5)


def test_a_calibration_of_the_first_format(probabilities):
    found = calibration.read(DATA / "calibration-format-1" / calibration.FILE, artefact.sha256(RUN / artefact.MANIFEST))
    assert found.format == 1
    p = probabilities.mean(axis=0, dtype=np.float64)
    by_hand = p ** (1 / found.map.temperature)
    by_hand /= by_hand.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(calibration.apply(found, p), by_hand, atol=1e-9)
    scores = sorted(found.conformal.lac)
    threshold = scores[int(np.ceil((len(scores) + 1) * 0.7)) - 1]
    np.testing.assert_array_equal(calibration.prediction_sets(found, p, method="lac"), 1 - by_hand <= threshold)


def test_an_unfinished_run_of_the_first_format(tmp_path):
    folder = shutil.copytree(DATA / "unfinished-format-1", tmp_path / "x.unfinished")
    checkpoints, (begun,) = Checkpoints(folder, every=1e9), folder.glob("0*")
    manifest = json.loads((begun / artefact.MANIFEST).read_text())
    assert (manifest["format"], manifest["iteration"]) == (1, 5)
    going_on = session(checkpoints)
    saved = checkpoints.load(0, manifest["part"])
    resumed, whole = (train_deep_ensemble(one, members=1) for one in (going_on, session()))
    assert saved.state.iteration == 5
    for name, tensor in whole.vertices.items():
        torch.testing.assert_close(resumed.vertices[name], tensor, atol=1e-4, rtol=1e-4)


# --- formats of later versions ---


def later(folder: Path, kind: str) -> Path:
    """The kept file of a kind, its format number 99 and its hashes right."""
    source = RUN if kind == "run" else DATA / f"{kind}-format-1"
    copy = Path(shutil.copytree(source, folder / kind))
    for file in [*copy.rglob(artefact.MANIFEST)]:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
        file.with_suffix(".sha256").write_text(f"{artefact.sha256(file)}  {artefact.MANIFEST}\n")
    return copy


@pytest.mark.parametrize("kind", ["run", "bundle", "unfinished"])
def test_a_later_format_is_refused_in_one_sentence(tmp_path, kind):
    copy = later(tmp_path, kind)
    read = {"run": Run.load, "bundle": read_bundle, "unfinished": lambda path: Checkpoints(path).load(0, "")}[kind]
    name = {"unfinished": "checkpoint"}.get(kind, kind)
    with pytest.raises(ArtefactError, match=f"has {name} format 99; this version of ensembler reads .*: update it$"):
        read(copy)
    assert (copy / artefact.MANIFEST).exists() or any(copy.glob(f"0*/{artefact.MANIFEST}"))


def test_a_later_calibration_is_refused_in_one_sentence(tmp_path):
    found = calibration.read(DATA / "calibration-format-1" / calibration.FILE, artefact.sha256(RUN / artefact.MANIFEST))
    run = Path(shutil.copytree(RUN, tmp_path / "run"))
    calibration.save(found.model_copy(update={"format": 99}), run)
    with pytest.raises(ArtefactError, match=r"has calibration format 99; .* reads 1: update it$"):
        calibration.load(run)


def test_later_predictions_are_made_again(tmp_path, probabilities):
    """A cache refuses nothing: what it cannot read is as if it were not there."""
    kept = predictor(Path(shutil.copytree(DATA / "predictions-format-1", tmp_path / "cache")))
    path = kept.path(images())
    with safe_open(path, "numpy") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(arrays | {"mean": arrays["mean"] * 0}, path, metadata | {"format": "99"})
    assert kept.kept(images()) is None
    ((_, (found,)),) = predictions([kept], [images()])
    np.testing.assert_allclose(found.mean, probabilities.mean(axis=0), atol=1e-5)
    assert kept.kept(images()) is not None


def test_what_members_said_is_verified_too(tmp_path, probabilities):
    """Since format 2 the file of all members' probabilities has a hash."""
    kept = predictor(tmp_path)
    list(predictions([kept], [images()]))
    with safe_open(kept.path(images()), "numpy") as file:
        assert file.metadata()["format"] == "2"
    file = kept.path(images()).with_suffix(".npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert kept.kept(images()) is None
    ((_, (found,)),) = predictions([kept], [images()])
    np.testing.assert_allclose(found.members, probabilities, atol=1e-5)
