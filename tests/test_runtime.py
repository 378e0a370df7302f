from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensembler.errors import ArtefactError, CorruptError, ShapeError, UsageError
from ensembler.machine import available_cpus
from ensembler.serve import Runtime
from ensembler.serve.runtime.images import check_images
from ensembler.serve.runtime.manifest import PROBE, Tuning
from ensembler.storage import artefact
from tests._runs import CLASSES, TINY, agreeing_weights, make_bundle, tiny_weights


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


def counted(loaded: Runtime) -> list[tuple[int, int]]:
    """From now on, the member and the batch of every forward pass that it runs."""
    calls: list[tuple[int, int]] = []

    class Session:
        def __init__(self, member: int, session: Any) -> None:
            self.run = lambda names, feed, options: (
                calls.append((member, len(feed["images"]))) or session.run(names, feed, options)
            )

    loaded._members._sessions = [Session(*pair) for pair in enumerate(loaded._members._sessions)]
    return calls


def by_hand(images: np.ndarray, members: int) -> np.ndarray:
    """Each member's probabilities (M, B, C), in float64; 8 are those that mostly agree."""
    weights = agreeing_weights(8) if members == 8 else tiny_weights(members)
    logits = images.astype(np.float64).mean(axis=(1, 2)) @ weights.astype(np.float64)
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
    assert prediction.members_used.tolist() == [3] * 9
    assert prediction.complete.all()
    np.testing.assert_array_equal(prediction.members, loaded.predict_members(images))
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
    assert prediction.members_used.tolist() == [1, 1]
    np.testing.assert_allclose(prediction.predictive_entropy, prediction.expected_entropy)


def test_large_batches_go_in_bounded_chunks(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = Runtime.load(bundle)
    images = tiny_images(23)
    whole = loaded.predict_members(images)
    batches = counted(loaded)
    monkeypatch.setattr(loaded._members, "largest", 5)
    np.testing.assert_allclose(loaded.predict_members(images), whole, atol=1e-7)
    assert sorted(size for _, size in batches) == sorted(3 * [4, 5, 4, 5, 5])


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
    provider = loaded._members._sessions[0].get_providers()[0]
    assert loaded.device == {"CUDAExecutionProvider": "cuda"}.get(provider, "cpu")
    assert loaded.threads == available_cpus() >= 1


def test_large_logits_do_not_overflow(tmp_path: Path) -> None:
    weights = np.zeros((1, 3, 5), np.float32)
    weights[..., :2] = 1e36
    loaded = Runtime.load(make_bundle(tmp_path / "large", members=1, weights=weights))
    found = loaded.predict_members(np.ones((2, *TINY), np.uint8))
    np.testing.assert_allclose(found, [[[0.5, 0.5, 0, 0, 0]] * 2], atol=1e-7)


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
        shutil.copy(bundle / PROBE, folder)
        for graph in manifest["graphs"]:
            (folder / graph).write_bytes(b"not a graph")
    with pytest.raises(ArtefactError, match=r"cannot open .*member-000.onnx: .*export the run again"):
        Runtime.load(tmp_path / "nonsense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": 2, "order": [0, 1]}, "one graph for each"),
        ({"order": [0, 1, 1]}, "each of its members once"),
        ({"layout": "vertices"}, "does not hold its weights.npz"),
        ({"calibration": "calibration.json"}, "does not hold its calibration.json"),
        ({"opset": None}, "opset"),
        ({"format": 9}, "format 9"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(
    bundle: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    manifest = Runtime.load(bundle).manifest.model_dump() | change
    with artefact.write(tmp_path / "other", manifest) as folder:
        for file in manifest["files"]:
            shutil.copy(bundle / file, folder)
    with pytest.raises(ArtefactError, match=message):
        Runtime.load(tmp_path / "other")


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads must be at least 1, not {threads}"):
        Runtime.load(bundle, threads)


def test_a_bundle_without_its_probe_is_refused(bundle: Path, tmp_path: Path) -> None:
    manifest = Runtime.load(bundle).manifest
    with artefact.write(tmp_path / "other", manifest.model_dump()) as folder:
        for graph in manifest.graphs:
            shutil.copy(bundle / graph, folder)
    with pytest.raises(ArtefactError, match=r"does not hold its probe.npz: export it again"):
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
        (np.ma.masked_less(np.ones((1, 4, 6, 3), np.uint8), 2), "images have masked entries, which have no value"),
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


# --- stopping early --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("eight") / "bundle", 8, agreeing_weights(8))


def varied_images(batch: int) -> np.ndarray:
    """Of all brightnesses and hues: of some the members are sure, of others not."""
    rng = np.random.default_rng(batch)
    colours = rng.integers(0, 256, (batch, 1, 1, 3)) * rng.random((batch, 1, 1, 1))
    return np.broadcast_to(colours, (batch, *TINY)).astype(np.uint8)


def test_exact_gives_the_classes_of_all_members_and_asks_fewer(eight: Path) -> None:
    loaded = Runtime.load(eight)
    images = varied_images(300)
    full, exact = loaded.predict(images), loaded.predict(images, "exact")
    np.testing.assert_array_equal(exact.classes, full.classes)
    assert set(exact.members_used) == {5, 6, 7, 8}
    members = by_hand(images, 8)
    for used in range(5, 9):  # stopped exactly where the rule, by hand, stops
        total = np.sort(members[:used].sum(axis=0))
        may_stop = total[:, -1] - total[:, -2] > 8 - used
        assert not may_stop[exact.members_used > used].any()
        assert used == 8 or may_stop[exact.members_used == used].all()
    np.testing.assert_array_equal(exact.complete, exact.members_used == 8)


def test_every_number_is_of_the_members_that_were_asked(eight: Path) -> None:
    loaded = Runtime.load(eight)
    images = varied_images(120)
    members = by_hand(images, 8)
    found = loaded.predict(images, "confidence")
    assert set(found.members_used) >= {3, 8}
    for i, used in enumerate(found.members_used):
        own = members[:used, i]
        mean = own.mean(axis=0)
        entropy, expected = -(mean * np.log(mean)).sum(), -(own * np.log(own)).sum(-1).mean()
        np.testing.assert_allclose(found.probabilities[i], mean, atol=1e-6)
        np.testing.assert_allclose(found.members[:used, i], own, atol=1e-6)
        assert np.isnan(found.members[used:, i]).all()
        np.testing.assert_allclose(found.predictive_entropy[i], entropy, atol=1e-5)
        np.testing.assert_allclose(found.mutual_information[i], entropy - expected, atol=1e-5)
        votes = own.argmax(-1)
        pairs = [a != b for k, a in enumerate(votes) for b in votes[:k]]
        assert found.disagreement[i] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("mode", ["exact", "confidence"])
def test_images_that_are_done_leave_the_batch(eight: Path, mode: str) -> None:
    loaded = Runtime.load(eight, threads=1)
    calls = counted(loaded)
    used = loaded.predict(varied_images(50), mode).members_used
    asked = [sum(size for member, size in calls if member == m) for m in range(8)]
    assert asked == [int((used > m).sum()) for m in range(8)]
    assert asked[-1] < 50


def test_first_members_alone_are_an_ensemble_too(eight: Path) -> None:
    loaded = Runtime.load(eight)
    images = varied_images(40)
    three = by_hand(images, 8)[:3]
    for mode in ("full", "exact", "confidence"):
        found = loaded.predict(images, mode, members=3)
        np.testing.assert_array_equal(found.classes, three.mean(axis=0).argmax(-1))
        assert found.members_used.max() == 3
        assert not found.complete.any()
    one = loaded.predict(images, members=1)
    assert one.mutual_information is None
    np.testing.assert_allclose(Runtime.load(eight, members=3).predict_members(images), three, atol=1e-6)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"mode": "quick"}, "unknown mode 'quick'"),
        ({"members": 0}, "ask from 1 to 8, not 0"),
        ({"members": 9}, "ask from 1 to 8, not 9"),
        ({"mode": "confidence", "level": 1.0}, "level of confidence"),
    ],
)
def test_choices_that_do_not_exist_are_refused(eight: Path, choice: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Runtime.load(eight).predict(varied_images(2), **choice)


# --- strategies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 17, 70])
def test_every_strategy_gives_the_same(eight: Path, threads: int, batch: int) -> None:
    loaded = Runtime.load(eight, threads=threads)
    images, expected = tiny_images(batch), by_hand(tiny_images(batch), 8)
    for strategy in ("sessions", "loop"):
        np.testing.assert_allclose(loaded._members.ask(images, strategy), expected, atol=1e-6)
        np.testing.assert_allclose(loaded._members.ask(images, strategy, 2, 5), expected[2:5], atol=1e-6)
    with pytest.raises(UsageError, match="cannot be asked in one graph"):
        loaded._members.ask(images, "merged")


def test_work_comes_out_even_on_the_threads(eight: Path) -> None:
    """5 members on 2 threads: 64 images are halved, 8 are not."""
    loaded = Runtime.load(eight, threads=2)
    calls = counted(loaded)
    loaded._members.ask(tiny_images(64), first=0, last=5)
    loaded._members.ask(tiny_images(8), first=0, last=5)
    loaded._members.ask(tiny_images(64), first=0, last=4)
    assert [size for _, size in calls] == 10 * [32] + 5 * [8] + 4 * [64]


def tuned(path: Path, bundle: Path, **changes: Any) -> Path:
    tuning = Tuning(
        machine="", cpus=2, load=None, device="cpu", members=8, winners={1: "loop", 64: "sessions"}, table=[]
    )
    manifest = Runtime.load(bundle).manifest
    manifest.tuning = tuning.model_copy(update=changes)
    with artefact.write(path, manifest.model_dump()) as folder:
        for file in manifest.files:
            shutil.copy(bundle / file, folder)
    return path


def test_a_tuned_bundle_is_run_as_was_fastest_at_the_nearest_batch(eight: Path, tmp_path: Path) -> None:
    loaded = Runtime.load(tuned(tmp_path / "tuned", eight), threads=2)
    assert [loaded.strategy(batch) for batch in (1, 7, 9, 64, 1000)] == [
        "loop",
        "loop",
        "sessions",
        "sessions",
        "sessions",
    ]
    np.testing.assert_allclose(loaded.predict_members(tiny_images(3)), by_hand(tiny_images(3), 8), atol=1e-6)


def test_what_was_fastest_elsewhere_means_nothing_here(eight: Path, tmp_path: Path) -> None:
    bundle = tuned(tmp_path / "tuned", eight)
    assert Runtime.load(bundle, threads=3).strategy(1) == "sessions"
    assert Runtime.load(bundle, threads=2, members=7).strategy(1) == "sessions"
    assert Runtime.load(tuned(tmp_path / "gpu", eight, device="cuda"), threads=2).strategy(1) == "sessions"


def test_memory_is_at_least_that_of_the_weights(eight: Path) -> None:
    loaded = Runtime.load(eight)
    assert loaded.memory == 8 * 15 * 4
    loaded.warm_up()
    assert loaded.memory >= 8 * 15 * 4


# --- imports ---------------------------------------------------------------------------------------------------------


def test_serving_imports_neither_torch_nor_bentoml() -> None:
    code = (
        "import sys, ensembler.serve.runtime.runtime, ensembler.serve.runtime.manifest, ensembler.serve.commands;"
        "print([name for name in ('torch', 'torchvision', 'bentoml', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_service_imports_no_torch() -> None:
    code = "import sys, ensembler.serve.service; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "wrong",
    [
        np.random.default_rng(0).random((2, *TINY), dtype=np.float32),  # as torchvision's ToTensor, but for the order
        np.zeros((2, *TINY), dtype=np.float16),
        np.full((2, *TINY), np.nan),
        np.full((2, *TINY), 128.0),
        np.full((2, *TINY), -1),
        np.full((2, *TINY), 256),
        np.zeros((2, TINY[2], *TINY[:2]), dtype=np.uint8),
        np.zeros((2, TINY[0] + 1, *TINY[1:]), dtype=np.uint8),
        np.ones((2, *TINY), dtype=bool),
    ],
)
def test_pixels_that_would_be_answered_wrongly_are_refused(tmp_path: Path, wrong: np.ndarray) -> None:
    runtime = Runtime.load(make_bundle(tmp_path / "bundle"))
    for predict in (runtime.predict, runtime.predict_members):
        with pytest.raises(ShapeError, match=r"send whole numbers from 0 to 255|expected images of shape"):
            predict(wrong)


def test_nothing_is_written_beside_the_bundle(tmp_path):
    """ONNX Runtime's telemetry would keep a database in the home, and a file beside the temporary ones."""
    bundle, home = make_bundle(tmp_path / "bundle"), tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))}
    code = f"from ensembler.serve import Runtime; Runtime.load({str(bundle)!r})"
    command = [sys.executable, "-c", code]
    subprocess.run(command, env=environment | {"HOME": str(home), "TMPDIR": str(home)}, check=True)
    assert list(home.iterdir()) == []
