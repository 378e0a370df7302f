"""Predictions: reduced right in any batches, made once, kept whole, made again where they are not."""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from ensembler.data.images import Split
from ensembler.ensemble import Ensemble
from ensembler.errors import ArtefactError
from ensembler.eval import prediction_cache
from ensembler.eval import predictions as module
from ensembler.eval.prediction_cache import PREDICTING, Entry, folder_of
from ensembler.eval.predictions import Predictor, predictions
from ensembler.eval.shift.test_set import TestSet
from ensembler.trainers import DeepEnsemble, Settings, train
from ensembler.uncertainty import uncertainty
from tests._evaluate import calibrate, evaluate
from tests._small import SETTINGS, dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    return train(dataset(), DeepEnsemble(members=3), Settings(**SETTINGS)).save(tmp_path / "runs" / "deep")


@pytest.fixture
def predictor(run, tmp_path):
    return Predictor(Ensemble.load(run, device="cpu"), tmp_path / "cache")


def other_run(predictor: Predictor) -> Predictor:
    """The same members under another hash."""
    ensemble = predictor.ensemble
    return Predictor(Ensemble(dataclasses.replace(ensemble.run, sha256="0" * 64), "cpu"), predictor.folder)


class Counted:
    """Examples that count how often they are gone through."""

    def __init__(self, examples: Split, size: int | None = None, broken: bool = False) -> None:
        self.examples, self.size, self.broken, self.made = examples, size, broken, 0
        self.labels, self.shape, self.sha256 = examples.labels, examples.shape, examples.sha256
        self.example_shape = examples.example_shape

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, size: int) -> Iterator[Split]:
        self.made += 1
        for batch in self.examples.batches(self.size or size):
            yield batch
            if self.broken:
                raise RuntimeError("a broken file")


def counted(size: int = 4, group: str = "clean", **options) -> TestSet:
    test = dataset().test
    examples = test if group != "ood" else Split(test.images, torch.full_like(test.labels, -1))
    return TestSet("test", "test images", Counted(examples, size, **options), group)


def get(predictor, *test_sets, watch=lambda label, done, total: None):
    return [found[0] for _, found in predictions([predictor], test_sets, watch)]


def test_images_go_to_the_networks_device_once_for_all_runs(predictor, monkeypatch):
    asked, batches = [], TestSet.batches
    monkeypatch.setattr(TestSet, "batches", lambda self, device: asked.append(device) or batches(self, device))
    both = [predictor, other_run(predictor)]
    ((_, found),) = predictions(both, [counted()])
    assert np.array_equal(found[0].mean, found[1].mean)
    assert asked == [torch.device("cpu")]
    on_meta = list(batches(counted(), torch.device("meta")))
    assert {batch.device.type for batch in on_meta} == {"meta"}


@pytest.mark.parametrize("size", [1, 4, 100])
def test_what_scores_need_is_that_of_all_members_at_once(predictor, size, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 5 * 3 * 64)
    (found,) = get(predictor, counted(size))
    members = predictor.ensemble.predict_members(dataset().test.images).numpy()
    expected = uncertainty(members)
    np.testing.assert_allclose(found.members, members, atol=1e-6)
    np.testing.assert_allclose(found.mean, members.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.expected_entropy, expected.expected_entropy, atol=1e-6)
    np.testing.assert_allclose(found.mutual_information, expected.mutual_information, atol=1e-6)
    np.testing.assert_allclose(found.disagreement, expected.disagreement, atol=1e-12)
    np.testing.assert_array_equal(found.classes, members.argmax(axis=2))
    labels = dataset().test.labels.numpy()
    np.testing.assert_allclose(found.label_probabilities, members[:, np.arange(len(labels)), labels], atol=1e-6)


def test_nothing_is_predicted_twice(predictor, monkeypatch):
    images, told = counted(), []
    (first,) = get(predictor, images, watch=lambda *progress: told.append(progress))
    monkeypatch.setattr(Ensemble, "predict_outputs", None)
    (again,) = get(predictor, images)
    assert images.examples.made == 1
    assert told == [("test images", done, 15) for done in (0, 4, 8, 12, 15)]
    assert again.mean.tobytes() == first.mean.tobytes()
    assert np.array_equal(again.members, first.members)
    assert not [path for path in predictor.folder.rglob("*") if path.name.startswith(".partial")]


def test_a_kept_prediction_is_read_once(predictor, monkeypatch):
    """Every test set's files are read and hashed a single time, however many there are."""
    sets = [counted(), counted(group="ood")]
    get(predictor, *sets)
    read, load = [], Entry.load
    monkeypatch.setattr(Entry, "load", lambda self, **options: read.append(self.path) or load(self, **options))
    get(predictor, *sets)
    assert read == [predictor.entry(one).path for one in sets]


def test_other_members_other_images_and_other_labels_are_other_predictions(predictor):
    one, unlabelled = counted(), counted(group="ood")
    get(predictor, one, unlabelled)
    assert (one.examples.made, unlabelled.examples.made) == (1, 1)
    get(other_run(predictor), one)
    assert one.examples.made == 2
    (found,) = get(predictor, unlabelled)
    assert found.label_probabilities.shape == (3, 0)


# --- the code that predicts -----------------------------------------------------------------------------------------


def test_other_code_is_another_prediction(predictor, monkeypatch):
    """What an older version of the network, of the loop over members, of ensembler or of torch made is not taken."""
    ensemble = predictor.ensemble
    entry = Predictor(ensemble, predictor.folder).entry(counted())
    assert entry == predictor.entry(counted())
    source = prediction_cache.inspect.getsource
    found = {entry.path}
    for changed in ("tests._small", *PREDICTING):
        with monkeypatch.context() as patch:
            patch.setattr(
                prediction_cache.inspect,
                "getsource",
                lambda it, changed=changed: source(it) + "# changed" * (it.__name__ == changed),
            )
            found.add(Predictor(ensemble, predictor.folder).entry(counted()).path)
    for name, value in (("__version__", "99"), ("torch", type("Other", (), {"__version__": "99"}))):
        with monkeypatch.context() as patch:
            patch.setattr(prediction_cache, name, value)
            found.add(Predictor(ensemble, predictor.folder).entry(counted()).path)
    assert len(found) == 1 + 1 + len(PREDICTING) + 2


def test_the_code_of_a_networks_own_classes_counts(tmp_path, monkeypatch):
    """The network is built by one module of the user's and made of classes of another: each is looked at."""
    for name, text in (
        ("parts", "from torch import nn\nclass Part(nn.Linear):\n    scale = 1.0\n"),
        ("builder", "from parts import Part\ndef build(num_classes):\n    return Part(3, num_classes)\n"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import builder  # type: ignore[import-not-found]

    network, seen = builder.build(3), set()
    for changed in (None, "parts", "builder"):
        if changed is not None:
            file = tmp_path / f"{changed}.py"
            file.write_text(file.read_text() + "# changed\n")
            prediction_cache.inspect.linecache.checkcache(str(file))
        seen.add(prediction_cache.code_sha256("builder:build", network))
    assert len(seen) == 3
    for name in ("parts", "builder"):
        del sys.modules[name]


def test_the_modules_that_predict_are_all_looked_at():
    """Whatever of the package they import is either among them, or changes no prediction."""
    harmless = {"arguments", "errors", "naming", "seeds", "run", "subspace", "engine", "jobs", "machine"}
    harmless |= {
        *("data.folders", "data.inputs", "data.loading", "data.record"),
        *("networks.batchnorm", "networks.buffers", "networks.unheld"),
        *("eval.prediction_cache", "eval.shift.test_set"),
        *("prediction", "progress", "sampling", "text", "describe"),
        *("calibration", "eval.evaluation", "eval.options", "eval.calibrate", "serve"),  # the commands, called by it
    }
    for name in PREDICTING:
        path = ROOT / (name.removeprefix("ensembler.").replace(".", "/") + ".py")
        path = path if path.exists() else ROOT / (name.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ensembler":
                package = node.module in ("ensembler", "ensembler.data", "ensembler.networks")
                names = [f"{node.module}.{a.name}" for a in node.names] if package else [node.module]
            for imported in names:
                assert imported in PREDICTING or imported.removeprefix("ensembler.") in harmless, f"{name}: {imported}"


# --- files that are not whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["flip", "truncate", "format", "members missing", "members truncated", "members flip"])
def test_a_prediction_that_is_not_whole_is_made_again(predictor, harm):
    images = counted()
    (first,) = get(predictor, images)
    expected = np.array(first.members)  # what is mapped is about to be harmed
    entry = predictor.entry(images)
    content, members = bytearray(entry.path.read_bytes()), bytearray(entry.members_path.read_bytes())
    if harm == "flip":
        content[-5] ^= 1
        entry.path.write_bytes(content)
    elif harm == "truncate":
        entry.path.write_bytes(content[:-5])
    elif harm == "format":
        with safe_open(entry.path, "numpy") as file:
            arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        assert metadata["format"] == "1"
        save_file(arrays, entry.path, metadata | {"format": "99"})
    elif harm == "members missing":
        entry.members_path.unlink()
    elif harm == "members truncated":
        entry.members_path.write_bytes(members[:-7])
    else:
        members[-1] ^= 1
        entry.members_path.write_bytes(members)
    assert predictor.kept(images) is None
    (again,) = get(predictor, images)
    assert images.examples.made == 2
    assert again.mean.tobytes() == first.mean.tobytes()
    np.testing.assert_array_equal(again.members, expected)
    assert predictor.kept(images) is not None


def test_runs_that_have_seen_a_set_are_not_shown_it(predictor, monkeypatch):
    images = counted()
    get(predictor, images)
    seen = []
    predict = Ensemble.predict_outputs
    monkeypatch.setattr(Ensemble, "predict_outputs", lambda self, x, vary=None: seen.append(len(x)) or predict(self, x))
    ((_, found),) = predictions([predictor, other_run(predictor)], [images])
    assert sum(seen) == len(images.examples)
    assert found[0].mean.tobytes() == found[1].mean.tobytes()


def test_two_copies_of_a_run_predict_alike(predictor):
    ((_, found),) = predictions([predictor, Predictor(predictor.ensemble, predictor.folder)], [counted()])
    assert found[0].mean.tobytes() == found[1].mean.tobytes()


def test_a_full_disk_is_said_and_nothing_half_written_stays(predictor, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ensembler.eval.prediction_cache.np.lib.format.write_array_header_1_0", full)
    with pytest.raises(ArtefactError, match=r"cannot keep predictions in .*cache: No space left .* another --cache"):
        get(predictor, counted())
    assert not [path for path in predictor.folder.rglob("*") if path.is_file()]


def test_images_that_cannot_be_read_leave_nothing(predictor):
    with pytest.raises(RuntimeError, match="a broken file"):
        get(predictor, counted(broken=True))
    assert not [path for path in predictor.folder.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_to_is_named(predictor, tmp_path):
    (tmp_path / "file").write_text("")
    there = Predictor(predictor.ensemble, tmp_path / "file")
    with pytest.raises(ArtefactError, match=r"cannot keep predictions in .*file.*choose another --cache"):
        get(there, counted())


def test_where_predictions_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder_of(None) == tmp_path / "ensembler" / "predictions"


def test_without_a_cache_that_can_be_written_the_work_goes_on_and_one_line_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    found = evaluate([run], device="cpu")
    assert calibrate(run, device="cpu").fitted > 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"predictions are not kept: cannot write to {file}/ensembler/predictions: ")
    assert line.endswith("set XDG_CACHE_HOME to a folder that can be written to keep them")
    there = evaluate([run], device="cpu", cache=tmp_path / "cache")
    assert np.array_equal(found.runs[0].clean.mean, there.runs[0].clean.mean)
    with pytest.raises(ArtefactError, match="choose another --cache"):
        evaluate([run], device="cpu", cache=file / "cache")


def test_calibrate_and_eval_share_the_validation_prediction(run, tmp_path, monkeypatch):
    """Whichever comes first makes it; the other asks no member again."""
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    calibrate(run, device="cpu", cache=tmp_path / "one")
    evaluate([run], device="cpu", cache=tmp_path / "two")
    seen, predict = [], Ensemble.predict_outputs
    monkeypatch.setattr(Ensemble, "predict_outputs", lambda self, x, vary=None: seen.append(len(x)) or predict(self, x))
    evaluate([run], device="cpu", cache=tmp_path / "one")
    assert seen == [15]  # the test images alone
    calibrate(run, device="cpu", cache=tmp_path / "two")
    assert seen == [15]


def test_memory_does_not_grow_with_the_members(predictor):
    """Many members on 50,000 images: what is held is one mean, not 25 predictions."""
    images = torch.zeros(3000, 8, 8, 3, dtype=torch.uint8)
    many = TestSet("many", "many", Counted(Split(images, torch.zeros(3000, dtype=torch.int64)), 500), "shift", 1)
    for _, (found,) in predictions([predictor], [many]):
        held = [found.mean, found.expected_entropy, found.classes, found.label_probabilities]
        assert found.members is None
    ensemble = predictor.ensemble
    assert sum(array.nbytes for array in held) == 3000 * 4 * (len(ensemble.classes) + 1 + 2 * ensemble.members)


def test_energy_and_max_logit_are_of_the_members_mean_logits(predictor):
    images = TestSet("test", "test images", dataset().test, "clean")
    ((_, (found,)),) = predictions([predictor], [images])
    logits = predictor.ensemble.predict_outputs(dataset().test.images).double().mean(dim=0)
    np.testing.assert_allclose(found.energy, -logits.logsumexp(dim=1), rtol=1e-5)
    np.testing.assert_allclose(found.max_logit, -logits.amax(dim=1), rtol=1e-5)
    members = predictor.ensemble.predict_outputs(dataset().test.images).softmax(dim=2)
    np.testing.assert_array_equal(found.members, members)
    some = found.part(np.array([3, 0]))
    np.testing.assert_array_equal(some.energy, found.energy[[3, 0]])
    np.testing.assert_array_equal(some.classes, found.classes[:, [3, 0]])
    np.testing.assert_array_equal(some.members, found.members[:, [3, 0]])
