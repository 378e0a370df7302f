from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ensembler import artefact
from ensembler.errors import ArtefactError, CorruptError, ShapeError
from ensembler.serve import Runtime, runtime
from ensembler.serve.images import check_images, images_from_json
from tests._runs import CLASSES, TINY, make_bundle, tiny_weights


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("runtime") / "bundle")


@pytest.fixture
def loaded(bundle: Path) -> Iterator[Runtime]:
    loaded = Runtime.load(bundle)
    yield loaded
    loaded.close()


def tiny_images(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).integers(0, 256, (batch, *TINY), dtype=np.uint8)


def by_hand(images: np.ndarray, members: int) -> np.ndarray:
    """Each member's probabilities (M, B, C), in float64."""
    logits = images.astype(np.float64).mean(axis=(1, 2)) @ tiny_weights(members).astype(np.float64)
    odds = np.exp(logits)
    return odds / odds.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("batch", [1, 2, 7, 50])
def test_members_are_what_they_are_by_hand(loaded: Runtime, batch: int) -> None:
    images = tiny_images(batch)
    found = loaded.predict_members(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(images, 3), atol=1e-6)


def test_a_prediction_is_what_it_is_by_hand(loaded: Runtime) -> None:
    images = tiny_images(9)
    members = by_hand(images, 3)
    mean = members.mean(axis=0)
    prediction = loaded.predict(images)
    entropy, expected = -(mean * np.log(mean)).sum(-1), -(members * np.log(members)).sum(-1).mean(0)
    a, b, c = members.argmax(-1)
    assert prediction.classes.tolist() == mean.argmax(-1).tolist()
    assert prediction.labels == [CLASSES[index] for index in mean.argmax(-1)]
    assert prediction.members_used == 3
    np.testing.assert_allclose(prediction.probabilities, mean, atol=1e-6)
    np.testing.assert_allclose(prediction.predictive_entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(prediction.expected_entropy, expected, atol=1e-5)
    np.testing.assert_allclose(prediction.mutual_information, entropy - expected, atol=1e-5)
    np.testing.assert_allclose(prediction.disagreement, np.mean([a != b, a != c, b != c], axis=0), atol=1e-12)
    assert len(set(prediction.disagreement)) > 1


def test_one_member_knows_no_disagreement(tmp_path: Path) -> None:
    prediction = Runtime.load(make_bundle(tmp_path / "single", members=1)).predict(tiny_images(2))
    assert prediction.mutual_information is None
    assert prediction.disagreement is None
    assert prediction.members_used == 1
    np.testing.assert_allclose(prediction.predictive_entropy, prediction.expected_entropy)


def test_large_batches_go_in_bounded_chunks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Runtime.load(bundle)
    images = tiny_images(23)
    whole = loaded.predict_members(images)
    batches = []

    class Session:
        def __init__(self, session: object) -> None:
            self.run = lambda names, feed: batches.append(len(feed["images"])) or session.run(names, feed)

    loaded._sessions = [Session(session) for session in loaded._sessions]
    monkeypatch.setattr(runtime, "_CHUNK_PIXELS", 5 * TINY[0] * TINY[1])
    np.testing.assert_array_equal(loaded.predict_members(images), whole)
    assert sorted(batches) == sorted(3 * [5, 5, 5, 5, 3])


def test_callers_in_several_threads_get_their_own_answers(loaded: Runtime) -> None:
    batches = [tiny_images(batch) for batch in range(1, 41)]
    with ThreadPoolExecutor(8) as pool:
        for images, found in zip(batches, pool.map(loaded.predict_members, batches), strict=True):
            np.testing.assert_allclose(found, by_hand(images, 3), atol=1e-6)


def test_ready_once_every_session_has_run(loaded: Runtime) -> None:
    assert not loaded.ready
    loaded.warm_up()
    assert loaded.ready
    loaded.close()
    assert not loaded.ready


def test_sessions_compute_where_they_can(loaded: Runtime) -> None:
    assert loaded.device == {"CUDAExecutionProvider": "cuda"}.get(loaded._sessions[0].get_providers()[0], "cpu")
    assert loaded.threads == runtime.available_cpus() >= 1


def test_softmax_does_not_overflow() -> None:
    found = runtime.softmax(np.array([[1e4, 1e4, -1e4], [0, 0, 0]], dtype=np.float32))
    np.testing.assert_allclose(found, [[0.5, 0.5, 0], [1 / 3] * 3], atol=1e-7)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", *(f"member-00{m}.onnx" for m in range(3))])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_is_found_and_named(bundle: Path, tmp_path: Path, name: str, damage: str) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    content = bytearray((damaged / name).read_bytes())
    if damage == "flipped":
        content[-3] ^= 4
    if damage == "missing":
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(content[:-1] if damage == "truncated" else content)
    named = "manifest.json" if name == "manifest.sha256" and damage != "missing" else name
    with pytest.raises(ArtefactError, match=named) as caught:
        Runtime.load(damaged)
    assert isinstance(caught.value, CorruptError) or (name, damage) == ("manifest.json", "missing")


def test_a_graph_that_is_none_is_named(bundle: Path, tmp_path: Path) -> None:
    manifest = Runtime.load(bundle).manifest.model_dump()
    with artefact.write(tmp_path / "nonsense", manifest) as folder:
        for graph in manifest["graphs"]:
            (folder / graph).write_bytes(b"not a graph")
    with pytest.raises(ArtefactError, match=r"cannot open .*member-000.onnx: .*export the run again"):
        Runtime.load(tmp_path / "nonsense")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"members": 2}, "one graph for each"), ({"opset": None}, "opset"), ({"format": 9}, "format 9")],
)
def test_a_manifest_of_another_shape_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    manifest = Runtime.load(bundle).manifest.model_dump() | change
    with artefact.write(tmp_path / "other", manifest) as folder:
        for graph in manifest["graphs"]:
            shutil.copy(bundle / graph, folder / graph)
    with pytest.raises(ArtefactError, match=message):
        Runtime.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 6, 4, 3), np.uint8), r"expected images of shape \(batch, 4, 6, 3\), found \(2, 6, 4, 3\): send"),
        (np.zeros((4, 6, 3), np.uint8), "found a single image: put it in a list"),
        (np.zeros((0, 4, 6, 3), np.uint8), "send at least one image"),
        (np.zeros((1, 4, 6, 3)), "images are of type float64: send whole numbers from 0 to 255"),
        (np.zeros((1, 4, 6, 3), bool), "images are of type bool"),
        (np.full((1, 4, 6, 3), 256), "images hold values from 256 to 256: send whole numbers"),
        (np.full((1, 4, 6, 3), -1), "images hold values from -1 to -1"),
        ([np.zeros((4, 6, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "images differ in shape"),
        (np.zeros((3, 4, 6, 3), np.uint8), "3 images are more than 2 at a time"),
        (None, r"found \(\)"),
        ("images", r"found \(\)"),
    ],
)
def test_other_images_are_refused_in_one_sentence(images: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message) as caught:
        check_images(images, TINY, max_batch=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int64, np.uint64])
def test_integers_of_any_type_are_taken(kind: type) -> None:
    images = np.arange(72).reshape(1, *TINY).astype(kind)
    for given in (images, images.tolist(), list(images)):
        found = check_images(given, TINY)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, images)


def test_a_wrong_value_in_lists_is_shown_with_its_place() -> None:
    images = np.zeros((2, *TINY), int).tolist()
    images[1][3][5][2] = 0.5
    with pytest.raises(ShapeError, match=r"^images\[1\]\[3\]\[5\]\[2\] is 0.5: send whole numbers from 0 to 255$"):
        check_images(images, TINY)


def test_json_is_read_once_it_is_an_object_of_images() -> None:
    assert images_from_json(b'{"images": [[1], [2]]}') == [[1], [2]]
    with pytest.raises(ShapeError, match="line 1, column 2"):
        images_from_json(b"{")


def test_serving_imports_neither_torch_nor_bentoml() -> None:
    code = (
        "import sys, ensembler.serve.runtime, ensembler.serve.schemas, ensembler.serve.commands;"
        "print([name for name in ('torch', 'torchvision', 'bentoml', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_service_imports_no_torch() -> None:
    code = "import sys, ensembler.serve.service; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
