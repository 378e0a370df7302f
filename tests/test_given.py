"""Predictions made elsewhere: scored as a run's are, whatever holds them, or refused in one sentence."""

from __future__ import annotations

import builtins
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ensembler import load_dataset
from ensembler.cli import app
from ensembler.ensemble import Ensemble
from ensembler.errors import DataError, EnsemblerError, ShapeError, UsageError
from ensembler.eval import compare, evaluate, prediction_files, scores
from ensembler.eval.given import Predictions
from ensembler.eval.metrics.recalibration import fit_temperature
from ensembler.eval.report.tables import report_tables
from ensembler.trainers import DeepEnsemble, Settings, train
from tests._evaluate import evaluate as evaluate_paths
from tests._small import SETTINGS, dataset

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 15)
MEMBERS = RNG.dirichlet(np.ones(3), (4, 15))
ARRAYS: dict[str, Any] = {"probabilities": MEMBERS, "labels": LABELS}
ONE = MEMBERS[0]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("ensembler.data.datasets.load", lambda name, root=None, **_: dataset())
    return train(dataset(), DeepEnsemble(members=2), Settings(**SETTINGS)).save(tmp_path / "runs" / "deep")


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def command(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


# --- scores ---------------------------------------------------------------------------------------------------------


def test_arrays_are_scored_as_their_mean() -> None:
    (found,) = evaluate(MEMBERS, LABELS).runs
    expected = scores(MEMBERS.mean(axis=0), LABELS)
    assert {name: getattr(found.clean, name) for name in expected} == pytest.approx(expected, abs=1e-12)
    assert found.members == found.forward_passes_per_prediction == 4
    unknown = ("training_example_passes", "training_seconds", "training_device", "architecture", "seed", "sha256")
    assert {getattr(found, name) for name in unknown} == {None}
    assert (found.temperature, found.clean.calibrated_nll, found.validation_examples) == (None, None, None)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_logits_are_the_probabilities_that_they_mean(kind: type) -> None:
    logits = RNG.normal(0, 2, (2, 15, 3)).astype(kind)
    odds = np.exp(logits.astype(np.float64))
    found = evaluate({"logits": logits, "labels": LABELS}).runs[0].clean
    expected = evaluate(odds / odds.sum(axis=2, keepdims=True), LABELS).runs[0].clean
    assert found.model_dump() == pytest.approx(expected.model_dump(), abs=2e-6)


def test_one_member_needs_no_axis_of_members() -> None:
    assert evaluate(ONE, LABELS).model_dump() == evaluate(ONE[None], LABELS).model_dump()
    assert evaluate(ONE, LABELS.tolist()).runs[0].clean.disagreement is None


def test_every_test_set_is_scored() -> None:
    cells = {f"shift/fog/{level}/probabilities": MEMBERS[::-1] for level in range(1, 6)}
    more = {
        **{"validation_probabilities": MEMBERS[:, :9], "validation_labels": LABELS[:9]},
        **{"ood_logits": RNG.normal(0, 1, (4, 7, 3)), "ood/noise:a/b/probabilities": MEMBERS[:, :5]},
        **{"shift/cifar10.1/probabilities": MEMBERS[:, :6], "shift/cifar10.1/labels": LABELS[:6]},
        **{"shift/rain/2/probabilities": MEMBERS, "classes": np.array(["a", "b", "c"])},
    }
    report = evaluate(ARRAYS | cells | more)
    (found,) = report.runs
    temperature = fit_temperature(MEMBERS[:, :9].mean(axis=0), LABELS[:9])
    assert (found.temperature, found.validation_examples) == (temperature, 9)
    assert found.clean.calibrated_nll is not None
    assert report.shift.headline == ["fog"]
    assert found.shifted.error == pytest.approx(found.clean.error)
    assert found.cells["fog"][3].error == found.clean.error
    assert set(found.cells) == {"fog", "cifar10.1", "rain"}
    expected = scores(MEMBERS[:, :6].mean(axis=0), LABELS[:6])
    assert found.cells["cifar10.1"][0].nll == pytest.approx(expected["nll"], abs=1e-12)
    assert {(one.name, one.images) for one in report.ood} == {("ood", 7), ("noise:a/b", 5)}
    assert found.ood["ood"]["predictive_entropy"].examples_out == 7
    assert found.ood["noise:a/b"]["energy"] is None  # of probabilities alone it is unknown


def test_a_family_is_a_mean_over_what_is_scored_at_every_severity() -> None:
    """Neither a single severity nor images of one's own under a corruption's name weigh in it."""
    cells = {f"shift/fog/{level}/probabilities": RNG.dirichlet(np.ones(3), (4, 15)) for level in range(1, 6)}
    more = {"shift/snow/5/probabilities": MEMBERS, "shift/saturate/1/probabilities": MEMBERS}
    more |= {"shift/brightness/probabilities": MEMBERS[:, :6], "shift/brightness/labels": LABELS[:6]}
    report = evaluate(ARRAYS | cells | more)
    (found,) = report.runs
    each = [scores(array.mean(axis=0), LABELS)["nll"] for array in cells.values()]
    assert list(found.by_family) == ["weather"]
    assert found.by_family["weather"].nll == pytest.approx(np.mean(each), abs=1e-12)
    families = [table for table in report_tables(report) if "weather" in table.columns]
    assert families and all("weather: fog." in table.notes[0] for table in families)


def test_a_comparison_is_paired_and_names_its_baseline() -> None:
    found = compare({"a": MEMBERS, "b": ONE, "c": {"logits": np.log(ONE)}}, LABELS, baseline="b")
    assert found.comparison.baseline == "b"
    a, c = found.comparison.differences
    assert a.clean["nll"].difference == pytest.approx(found.runs[0].clean.nll - found.runs[1].clean.nll)
    assert a.clean["nll"].low < a.clean["nll"].difference < a.clean["nll"].high
    assert [round(abs(c.clean[name].difference), 9) for name in c.clean] == [0, 0, 0, 0]
    with pytest.raises(UsageError, match="the baseline 'd' is none of 'a', 'b'"):
        compare({"a": ONE, "b": ONE}, LABELS, baseline="d")
    with pytest.raises(UsageError, match="at least two"):
        compare({"a": ONE}, LABELS)


def test_curves_need_validation_predictions() -> None:
    more = {"validation_probabilities": MEMBERS[:, 1:], "validation_labels": LABELS[1:]}
    found = compare({"a": ARRAYS | more, "b": ARRAYS}, curves=True)
    assert [curve.run for curve in found.comparison.curves] == ["a"]
    assert found.comparison.equivalents == {}


def test_only_shared_test_sets_are_scored_and_the_others_are_named() -> None:
    found = compare({"a": ARRAYS | {"ood_probabilities": MEMBERS, "shift/fog/1/probabilities": MEMBERS}, "b": ARRAYS})
    assert found.omitted == ["ood/ood", "shift/fog/1"]
    assert (found.ood, found.shift) == ([], None)


# --- files and runs -------------------------------------------------------------------------------------------------


def test_a_saved_run_scores_as_the_run(run, tmp_path) -> None:
    file = tmp_path / "saved" / "deep.npz"
    options: dict[str, Any] = {"ood": ["noise:uniform"], "examples": 15, "device": "cpu", "seed": 3}
    of_run = evaluate_paths([run], "corruptions", save_predictions=file, **options)
    of_file = evaluate_paths([file])
    (expected,), (found,) = of_run.report.runs, of_file.report.runs
    made = ("method", "architecture", "vertices", "parameters", "seed", "training", "sha256", "name", "validation_sha")

    def scored(report: Any) -> dict[str, Any]:
        return {name: value for name, value in report.model_dump().items() if not name.startswith(made)}

    assert scored(found) == scored(expected)
    assert of_file.report.test_sha256 == of_run.report.test_sha256
    with np.load(file) as arrays:
        members = Ensemble.load(run, "cpu").predict_members(dataset().test.images).numpy()
        np.testing.assert_array_equal(arrays["probabilities"], members)
    both = evaluate_paths([file, run], "corruptions", **options).report
    assert [scored(report) for report in both.runs] == [scored(expected)] * 2


def test_files_and_a_run_in_one_report(run, tmp_path) -> None:
    labels = dataset().test.labels.numpy()
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), (4, 15))
    file = save(tmp_path / "forest.npz", probabilities=probabilities, labels=labels, ood_probabilities=probabilities)
    result = command(
        *("compare", file, run, "--curve", "--device", "cpu", "--out", tmp_path / "report"),
        *("--json", tmp_path / "report.json", "--baseline", run, "--quiet"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in report["runs"]] == ["forest.npz", "deep"]
    expected = evaluate(probabilities, labels).runs[0].clean.model_dump()
    assert {name: report["runs"][0]["clean"][name] for name in expected} == pytest.approx(expected, abs=1e-12)
    (difference,) = report["comparison"]["differences"]
    assert difference["run"] == "forest.npz"
    assert report["omitted"] == ["ood/ood"]
    page = (tmp_path / "report" / "report.html").read_text()
    for words in ("training cost of predictions made elsewhere is unknown", "Not scored, as not all have"):
        assert words in page or words in (tmp_path / "report" / "report.md").read_text()
    examples = evaluate_paths([file, run], device="cpu", examples=9, seed=5).report
    assert {one.clean.accuracy * 9 % 1 for one in examples.runs} == {0.0}
    alone = evaluate_paths([file], examples=9, seed=5).report
    assert alone.runs[0].clean == examples.runs[0].clean
    saved = tmp_path / "saved.npz"
    evaluate_paths([run], device="cpu", examples=9, seed=5, save_predictions=saved)
    twice = evaluate_paths([saved, run], device="cpu", examples=9, seed=5).report
    assert twice.runs[0].clean == twice.runs[1].clean == examples.runs[1].clean
    with pytest.raises(UsageError, match=r"9 labels and the test images .* 15|labels differ"):
        evaluate_paths([saved, run], device="cpu", examples=8, seed=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (dataset().test.labels.numpy() + 1) % 3}, "15 labels differ between a.npz and the test images of"),
        ({"probabilities": ONE[:9], "labels": dataset().test.labels.numpy()[:9]}, "has 9 labels and the test images"),
        ({"classes": np.array(["class 0", "class 2", "class 1"])}, "class 1 is 'class 2' in a.npz and 'class 1' in"),
        ({"test_sha256": np.array("0" * 64)}, "have equal labels, but are for other test images"),
        ({"probabilities": np.eye(4)[dataset().test.labels.numpy()]}, "a.npz has 4 classes and the test images of"),
    ],
)
def test_predictions_for_other_images_than_the_runs_are_refused(run, tmp_path, change, message) -> None:
    file = save(tmp_path / "a.npz", **({"probabilities": ONE, "labels": dataset().test.labels.numpy()} | change))
    with pytest.raises(UsageError, match=message):
        evaluate_paths([run, file], device="cpu")


def test_what_the_options_ask_of_files_must_be_there(run, tmp_path) -> None:
    file = save(tmp_path / "a.npz", probabilities=ONE, labels=dataset().test.labels.numpy(), ood_probabilities=ONE)
    ood = {"ood": ["noise:uniform"], "examples": 9, "device": "cpu"}
    with pytest.raises(UsageError, match=r"a\.npz has no predictions for ood/noise:uniform: add them, or leave"):
        evaluate_paths([run, file], **ood)
    with pytest.raises(UsageError, match="--shift and --ood predict images by a run, and only files"):
        evaluate_paths([file], ood=["noise:uniform"])
    for paths in ([run, file], [file]):
        with pytest.raises(UsageError, match="--save-predictions takes one run at a time"):
            evaluate_paths(paths, save_predictions=tmp_path / "b.npz")
    with pytest.raises(UsageError, match=r"writes \.npz files, not b\.csv"):
        evaluate_paths([run], save_predictions=tmp_path / "b.csv")


def test_a_save_that_fails_leaves_no_file(run, tmp_path, monkeypatch) -> None:
    file = save(tmp_path / "old.npz", kept=np.ones(1))
    before = file.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prediction_files.npy, "write_array", full)
    with pytest.raises(EnsemblerError, match=r"cannot write .*old\.npz: No space left on device: make room"):
        evaluate_paths([run], device="cpu", save_predictions=file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.npz", "runs"]


# --- columns --------------------------------------------------------------------------------------------------------


def table(labels: list[Any], headings: str = "cat,dog,label") -> str:
    lines = [f"{p},{1 - p},{label}" for p, label in zip((0.75, 0.5, 0.25), labels, strict=True)]
    return "\n".join([headings, *lines, ""])


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (table(["cat", "dog", "dog"]), [0, 1, 1]),
        (table([0, 1, 1]), [0, 1, 1]),
        (table(["cat", "dog", "dog"], "dog,cat,label"), [1, 0, 0]),
        ("\ufefflabel,0,1\n1,0.75,0.25\n\n0,0.5,0.5\n0,.25,75e-2\n", [1, 0, 0]),
    ],
)
def test_a_table_is_one_member(tmp_path, text: str, labels: list[int]) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    found = evaluate_paths([tmp_path / "a.csv"]).report.runs[0]
    expected = evaluate(np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]), labels).runs[0]
    assert found.clean == expected.clean


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs one column 'label' .* found no columns"),
        ("a,b\n0.5,0.5\n", "needs one column 'label'"),
        ("label\n1\n", "needs one column 'label'"),
        ("label,labels,a\n1,1,1\n", "needs one column 'label'"),
        ("a,b,label\n", "has no rows"),
        ("a,a,label\n1,0,0\n", "has the column 'a' twice"),
        ("a,b,label\n0.5,0.5\n", "row 1: 2 values, not 3"),
        ("a,b,label\n0.5,half,0\n", "row 1, column 'b': 'half' is no number"),
        ("a,b,label\n0.5,,0\n", "row 1, column 'b': '' is no number"),
        ("a,b,label\n0.5,nan,0\n", "NaN or infinity for image 0"),
        ("a,b,label\n0.5,0.5,2\n", "the label '2' is no class: give a column's name, or its place from 0 to 1"),
        ("a,b,label\n0.5,0.5,a\n0.5,0.5,1\n", "row 2: the label '1' is no class"),
        ("1,2,label\n0.5,0.5,1\n", "have numbers as names that are not their places from 0"),
        ("1,0,label\n0.5,0.5,1\n", "have numbers as names that are not their places from 0"),
        ("a,b,label\n3,-1,0\n", "is no distribution: its smallest entry is -1"),
        ('a,b,label\n"0.5,0.5,0\n', "is no CSV"),
        ("a,b,label\n0.5,0.5,\xe9\n", "is no text in UTF-8"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    result = command("eval", tmp_path / "a.csv", "--out", tmp_path / "report")
    assert (result.exit_code, (tmp_path / "report").exists()) == (1, False)
    with pytest.raises(EnsemblerError, match=message):
        evaluate_paths([tmp_path / "a.csv"])


def test_parquet_needs_a_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UsageError, match=r"Parquet needs pyarrow: pip install .ensembler\[parquet\]., or give a \.npz or \.csv"
    ):
        evaluate_paths([tmp_path / "a.parquet"])


def test_parquet_is_read_as_csv_is(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"cat": [0.75, 0.5], "dog": [0.25, 0.5], "label": ["dog", "cat"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    found = evaluate_paths([tmp_path / "a.parquet"]).report.runs[0]
    assert found.clean == evaluate([[0.75, 0.25], [0.5, 0.5]], [1, 0]).runs[0].clean
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="is damaged or no Parquet"):
        evaluate_paths([tmp_path / "b.parquet"])


# --- what is refused ------------------------------------------------------------------------------------------------

NAN = np.where(np.arange(3) == 1, np.nan, ONE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "there are no 'labels'"),
        ({"probabilities": None}, "neither of probabilities and logits are there"),
        ({"logits": np.log(MEMBERS)}, "both of probabilities and logits are there"),
        ({"probs": ONE}, "unknown array 'probs': give probabilities, logits, labels"),
        ({"shift/\x1b[31m/1/probabilities": MEMBERS}, r"unknown array 'shift/\\x1b\[31m/1/probabilities'"),
        ({"validation_probs": ONE}, "unknown array 'validation_probs'"),
        ({"probabilities": ONE[:, 0]}, r"found float64 \(15,\); of two classes, give both"),
        ({"probabilities": ONE[:9]}, r"is of 9 images, \(M, N, C\) = \(1, 9, 3\), but the labels, .* int64 \(15,\)"),
        ({"probabilities": MEMBERS.transpose(1, 0, 2)}, r"is of 4 images, \(M, N, C\) = \(15, 4, 3\)"),
        ({"probabilities": np.empty((0, 15, 3))}, r"none empty, found float64 \(0, 15, 3\)"),
        ({"probabilities": ONE.astype(str)}, "must be numbers"),
        ({"probabilities": ONE.astype(complex)}, "must be numbers"),
        ({"probabilities": NAN}, "probabilities: member 0 has NaN or infinity for image 0"),
        ({"probabilities": np.where(np.arange(15)[:, None] == 7, 0.5, MEMBERS)}, "member 0 for image 7 is no distr"),
        ({"probabilities": np.log(ONE)}, "give probabilities that sum to 1, or name the array logits"),
        ({"probabilities": None, "logits": ONE}, "logits: every row is a distribution already: name the array prob"),
        ({"probabilities": None, "logits": np.log(NAN)}, "logits: member 0 has NaN"),
        ({"labels": LABELS + 1}, "labels: image . has the class 3, but probabilities has the classes 0 to 2; count"),
        ({"labels": LABELS - 1}, "labels: image . has the class -1"),
        ({"labels": LABELS.astype(float)}, r"the labels, which must be one integer an image, are float64 \(15,\)"),
        ({"labels": np.eye(3)[LABELS]}, r"are float64 \(15, 3\)"),
        ({"validation_probabilities": ONE}, "there are no 'validation_labels'"),
        ({"validation_labels": LABELS}, "neither of validation_probabilities and validation_logits"),
        (
            {"validation_probabilities": MEMBERS[:2], "validation_labels": LABELS},
            "validation_... is of 2 members and 3 classes, but the test images' predictions are of 4 and 3",
        ),
        ({"ood_probabilities": MEMBERS, "ood_labels": LABELS}, "ood_labels: out-of-distribution images have no labels"),
        ({"ood_probabilities": MEMBERS, "ood/ood/probabilities": MEMBERS}, "there are two sets ood/ood"),
        ({"ood_probabilities": MEMBERS[..., :2] + MEMBERS[..., 2:] / 2}, "ood_... is of 4 members and 2 classes"),
        ({"shift/fog/6/probabilities": MEMBERS}, "shift/fog/6/...: a severity is 1 to 5, not '6'"),
        ({"shift/fog/one/probabilities": MEMBERS}, "a severity is 1 to 5, not 'one'"),
        ({"shift/fog/1/probabilities": MEMBERS[:, :9]}, "shift/fog/1/probabilities is of 9 images"),
        ({"shift/fog/1/probabilities": MEMBERS, "shift/fog/1/labels": LABELS}, "have the test images' labels"),
        (
            {"shift/fog/probabilities": MEMBERS, "shift/fog/3/probabilities": MEMBERS},
            "shift/fog is there with severities and without",
        ),
        (
            {"shift/fog 3/probabilities": MEMBERS, "shift/fog/3/probabilities": MEMBERS},
            "shift/fog 3 has the name that another test set has in a report",
        ),
        ({"shift/clean/probabilities": MEMBERS}, "shift/clean has the name that another test set has in a report"),
        ({"ood/clean/probabilities": MEMBERS}, "ood/clean has the name that another test set has in a report"),
        (
            {"validation_probabilities": MEMBERS, "validation_labels": LABELS},
            "the validation predictions and labels are those of the test images: give those of other",
        ),
        ({"energy": ONE}, r"energy must be 15 finite numbers, one an image, found float64 \(15, 3\)"),
        ({"energy": np.full(15, np.inf)}, "energy must be 15 finite numbers"),
        ({"probabilities": None, "logits": np.log(MEMBERS), "energy": LABELS}, "energy follows from the logits"),
        ({"classes": np.array(["a", "a", "b"])}, "classes must all differ"),
        ({"classes": np.array(["a", "b"])}, r"classes must be text, 3 of it, found <U1 \(2,\)"),
        ({"classes": np.arange(3)}, "classes must be text"),
    ],
)
def test_arrays_that_are_no_predictions_are_refused(tmp_path, change: dict[str, Any], message: str) -> None:
    arrays = {name: array for name, array in (ARRAYS | change).items() if array is not None}
    with pytest.raises(ShapeError, match=f"^mine: .*{message}"):
        Predictions.of("mine", arrays)
    file = save(tmp_path / "a.npz", **arrays)
    result = command("eval", file, "--out", tmp_path / "report")
    assert (result.exit_code, (tmp_path / "report").exists()) == (1, False), result.output
    assert "a.npz: " in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_masked_entries_are_refused() -> None:
    """An array made of a masked one has what was masked: it would be scored."""
    labels = np.ma.masked_array(LABELS, LABELS == 1)
    with pytest.raises(ShapeError, match="labels has masked entries: leave these images out of every array"):
        evaluate(ONE, labels)
    with pytest.raises(ShapeError, match="has masked entries"):
        scores(ONE, labels)
    assert scores(ONE, np.ma.masked_array(LABELS)) == scores(ONE, LABELS)


class Silent:
    """Fails as no array does, without a word."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError


def test_what_is_no_array_is_refused() -> None:
    for wrong in ([[0.5, 0.5], [1.0]], torch.tensor([[0.5, 0.5]], requires_grad=True), Silent()):
        with pytest.raises(ShapeError, match=r"^predictions: probabilities is no array \(.*give one of NumPy's"):
            evaluate(wrong, [0])
    assert evaluate(torch.tensor([[0.75, 0.25]]), torch.tensor([0])).runs[0].clean.accuracy == 1


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    content = io.BytesIO()
    if shape is None:
        np.save(content, array, allow_pickle=True)
    else:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(content, header)
        content.write(array.tobytes())
    return content.getvalue()


def archive(path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_bad_files_are_refused(tmp_path, monkeypatch) -> None:
    whole = save(tmp_path / "whole.npz", **ARRAYS).read_bytes()

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").touch, ())

    damaged = bytearray(whole)
    damaged[400] ^= 0xFF
    probabilities, labels = ("probabilities.npy", npy(MEMBERS)), ("labels.npy", npy(LABELS))
    long = np.lib.format.magic(1, 0) + (60_000).to_bytes(2, "little") + b" " * 60_000
    cases = {
        "is damaged or not of numpy.savez": [b"", b"no zip at all", whole[:-30], bytes(damaged)],
        "'labels' is Python objects, which are never unpickled": [
            [probabilities, ("labels.npy", npy(np.array([Trap()], dtype=object)))]
        ],
        "'labels' is of type datetime64": [
            [probabilities, ("labels.npy", npy(np.array(["2026-01-01"], "datetime64[D]")))]
        ],
        r"\(Header info length": [[labels, ("probabilities.npy", long)]],
        "holds 'labels' twice": [[probabilities, labels, labels]],
        "holds 'readme.txt', which is no array": [[probabilities, labels, ("readme.txt", b"hello")]],
        "is cut short or too long for its shape": [
            [labels, ("probabilities.npy", npy(MEMBERS, (4, 10**9, 3)))],
            [labels, ("probabilities.npy", npy(MEMBERS, (4, 5, 3)))],
        ],
    }
    for message, contents in cases.items():
        for content in contents:
            path = tmp_path / "a.npz"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                archive(path, content)
            with pytest.raises(DataError, match=f"{path}.*{message}") as caught:
                evaluate_paths([path])
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()
    archive(tmp_path / "bomb.npz", [labels, ("probabilities.npy", npy(np.zeros(3 * 10**6)))], zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.npz").stat().st_size < 10**5
    monkeypatch.setattr(prediction_files, "_memory", lambda: 2**23)
    with pytest.raises(DataError, match=r"takes 0\.0 GiB unpacked, more than half of this machine's memory"):
        evaluate_paths([tmp_path / "bomb.npz"])


def test_paths_that_are_no_predictions_are_refused(tmp_path) -> None:
    (tmp_path / "a.npy").write_bytes(npy(ONE))
    with pytest.raises(UsageError, match=r"a\.npy is neither a run's folder nor a file of predictions \(\.npz, "):
        evaluate_paths([tmp_path / "a.npy"])
    with pytest.raises(DataError, match=r"no file of predictions at .*nowhere\.npz"):
        evaluate_paths([tmp_path / "nowhere.npz"])
    save(tmp_path / "b.npz", **ARRAYS)
    result = command("calibrate", tmp_path / "b.npz")
    assert result.exit_code == 1
    assert "ensembler eval fits a temperature" in result.stderr.replace("\n", " ")
    (tmp_path / "other").mkdir()
    save(tmp_path / "other" / "b.npz", **ARRAYS)
    result = command("compare", tmp_path / "b.npz", tmp_path / "other" / "b.npz")
    assert "two runs are called b.npz" in result.stderr
    with pytest.raises(UsageError, match="the labels are given twice"):
        evaluate(ARRAYS, LABELS)


# --- all of it ------------------------------------------------------------------------------------------------------


def linear(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))


def test_models_of_scikit_learn_and_a_deep_ensemble_in_one_report(tmp_path) -> None:
    """A random forest's trees, a logistic regression and a run on the digits: files and arrays, the same numbers."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression

    digits = load_dataset("digits")
    (x, y), (x_validation, y_validation), (x_test, y_test) = (
        (part.images[:, ::4, ::4, 0].flatten(1).numpy() / 255, part.labels.numpy())
        for part in (digits.train, digits.validation, digits.test)
    )
    forest = RandomForestClassifier(5, random_state=0).fit(x, y)
    logistic = LogisticRegression(max_iter=200).fit(x, y)
    arrays = {
        "forest.npz": {
            "probabilities": np.stack([tree.predict_proba(x_test) for tree in forest.estimators_]),
            "labels": y_test,
            "validation_probabilities": np.stack([tree.predict_proba(x_validation) for tree in forest.estimators_]),
            "validation_labels": y_validation,
        },
        "logistic.npz": {"logits": logistic.decision_function(x_test), "labels": y_test},
    }
    settings = Settings(architecture="tests.test_given:linear", epochs=1, device="cpu")
    deep = train(digits, DeepEnsemble(members=2), settings).save(tmp_path / "deep")
    files = [save(tmp_path / name, **one) for name, one in arrays.items()]
    words = [
        *files,
        deep,
        "--device",
        "cpu",
        "--json",
        tmp_path / "report.json",
        "--out",
        tmp_path / "report",
        "--quiet",
    ]
    result = command("compare", *words)
    assert result.exit_code == 0, result.output
    of_files = json.loads((tmp_path / "report.json").read_text())
    of_arrays = json.loads(compare(arrays).model_dump_json())
    assert [run["name"] for run in of_files["runs"]] == ["forest.npz", "logistic.npz", "deep"]
    for one, other in zip(of_files["runs"], of_arrays["runs"], strict=False):
        assert one | {"sha256": None} == other
    assert of_files["comparison"]["differences"][0] == of_arrays["comparison"]["differences"][0]
    assert of_files["comparison"]["differences"][1]["run"] == "deep"
    assert of_files["runs"][0]["clean"]["error"] < 0.2
    assert (tmp_path / "report" / "report.html").is_file()
