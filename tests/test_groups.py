"""Scores of groups: against scipy and loops, intervals that hold, and files of groups that are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ensembler.errors import DataError, ShapeError
from ensembler.eval import compare, evaluate
from ensembler.eval.group_file import read_groups
from ensembler.eval.metrics.classification import ece, nll
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.metrics.groups import GROUPED, compare_groups, reduce_groups
from ensembler.eval.report.text import markdown
from tests._evaluate import evaluate as evaluate_paths


def sample(count: int, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), count), rng.integers(0, classes, count)


@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_groups_equal_loops(count: int, groups: int, seed: int) -> None:
    probs, labels = sample(count, seed=seed)
    if seed % 3 == 0:
        labels = probs.argmax(axis=1)  # all right
    places = np.random.default_rng(seed).integers(0, groups, count)
    names = [f"g{n}" for n in range(groups)]
    found = compare_groups(reduce_groups(Losses.of(probs, labels), places, names))
    assert set(found.groups) == {names[place] for place in places}  # groups without examples are left out
    errors = {}
    for name, one in found.groups.items():
        mine = places == names.index(name)
        right = probs[mine].argmax(axis=1) == labels[mine]
        errors[name] = 1 - right.mean()
        assert one.examples == mine.sum()
        assert one.error.value == pytest.approx(errors[name])
        assert one.nll.value == pytest.approx(nll(probs[mine], labels[mine]))
        assert one.ece == pytest.approx(ece(probs[mine], labels[mine]), abs=1e-9)
        exact = stats.binomtest(int((~right).sum()), len(right)).proportion_ci(0.95, method="exact")
        assert (one.error.low, one.error.high) == pytest.approx((exact.low, exact.high), abs=1e-9)
        if one.examples < 30:
            assert one.nll.low is one.nll.high is one.brier.low is None
        else:
            each = -np.log(probs[mine][np.arange(mine.sum()), labels[mine]])
            interval = stats.t.interval(0.95, len(each) - 1, each.mean(), stats.sem(each))
            assert (one.nll.low, one.nll.high) == pytest.approx((max(0, interval[0]), interval[1]))
    assert found.worst["error"].value == pytest.approx(max(errors.values()))
    assert errors[found.worst["error"].group] == pytest.approx(max(errors.values()))
    assert found.gap["error"].value == pytest.approx(max(errors.values()) - min(errors.values()))
    for name in GROUPED:
        for one in (found.worst[name], found.gap[name]):
            assert one.low is None or one.low - 1e-12 <= one.value <= one.high + 1e-12
    if len(errors) == 1:
        assert (found.gap["error"].low, found.gap["error"].high) == (0, 0)
    else:  # an interval of one of several groups is wider than its own
        assert found.worst["error"].high >= max(one.error.high for one in found.groups.values())


def test_the_intervals_of_the_worst_and_of_the_gap_hold_in_small_groups() -> None:
    """Twelve groups of nine examples, all with the same error of 20 %: the worst is at about 50 % by chance."""
    rng = np.random.default_rng(0)
    held, looked = 0, []
    for _ in range(200):
        wrong = rng.random(108) < 0.2
        probs = np.where(wrong[:, None], [0.1, 0.9], [0.9, 0.1])
        losses = Losses.of(probs, np.zeros(108, int))
        found = compare_groups(reduce_groups(losses, np.arange(108) % 12, [str(n) for n in range(12)]))
        worst, gap = found.worst["error"], found.gap["error"]
        held += worst.low <= 0.2 <= worst.high and gap.low <= 0
        looked.append(worst.value)
    assert np.mean(looked) > 0.4
    assert held >= 190


def test_the_worst_of_some_groups_without_intervals_has_none() -> None:
    probs, labels = sample(60)
    places = (np.arange(60) < 5).astype(int)
    found = compare_groups(reduce_groups(Losses.of(probs, labels), places, ["many", "few"]))
    assert found.groups["many"].nll.low is not None
    assert found.worst["nll"].low is found.gap["nll"].high is None
    assert found.worst["error"].high is not None


def test_a_report_has_them_by_class_by_test_set_and_by_ones_own(tmp_path) -> None:
    probs, labels = sample(40)
    groups = np.where(np.arange(40) < 10, "night", "day")
    arrays = {"probabilities": probs, "labels": labels, "classes": np.array(["cat", "dog", "eel"])}
    arrays |= {"shift/fog/2/probabilities": probs[::-1]}
    report = evaluate(arrays, groups=groups)
    found = report.runs[0].groups
    assert set(found) == {"class", "test set", "group"}
    assert set(found["class"].groups) == {"cat", "dog", "eel"}
    assert {name: one.examples for name, one in found["test set"].groups.items()} == {"clean": 40, "fog 2": 40}
    assert {name: one.examples for name, one in found["group"].groups.items()} == {"night": 10, "day": 30}
    assert "Worst groups" in markdown(report)

    np.savez(tmp_path / "a.npz", **arrays)
    rows = [f"{n},{group}" for n, group in enumerate(groups)]
    (tmp_path / "groups.csv").write_text("\n".join(["image,group", *reversed(rows)]))
    of_file = evaluate_paths([tmp_path / "a.npz"], group=tmp_path / "groups.csv").report.runs[0].groups
    assert of_file == found
    assert compare({"a": arrays, "b": arrays}, groups=groups).runs[1].groups == found
    some = evaluate_paths([tmp_path / "a.npz"], group=tmp_path / "groups.csv", examples=20).report.runs[0].groups
    assert sum(one.examples for one in some["group"].groups.values()) == 20


def test_a_class_that_is_no_label_is_left_out() -> None:
    probs, _ = sample(10)
    found = evaluate(probs, np.zeros(10, int)).runs[0].groups
    assert list(found) == ["class"]
    assert list(found["class"].groups) == ["0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the columns image,group in its first line, found None"),
        ("image,kind\n0,a\n", r"found \['image', 'kind'\]"),
        ("image,group\n0,a\n1,b\n", "1 of 3 test images have no group, first image 2: add them"),
        ("image,group\n0,a\n0,b\n", "line 3: image 0 is there twice"),
        ("image,group\n3,a\n", "line 2: no test image '3': give 0 to 2, or a file such as x/a.png"),
        ("image,group\n-1,a\n", "no test image '-1'"),
        ("image,group\n0.0,a\n", "no test image '0.0'"),
        ("image,group\n0, \n", "line 2: image 0 has an empty group"),
        ("image,group\n0\n", "line 2: image 0 has an empty group"),
        ("image,group\n0,a,b\n", "line 2: more than two values"),
        ('image,group\n0,"a\n', "is no CSV"),
        ("image,group\n0,\xe9\n", "is no text in UTF-8"),
    ],
)
def test_bad_files_of_groups_are_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "groups.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message):
        read_groups(path, 3, ["x/a.png", "x/b.png", "y/a.png"])
    with pytest.raises(DataError, match="cannot read"):
        read_groups(tmp_path / "nowhere.csv", 3)


def test_images_are_named_by_place_or_file(tmp_path) -> None:
    path = tmp_path / "groups.csv"
    path.write_text('group , image\n"a, b",x/b.png\nc,0\n\na,2\n', encoding="utf-8-sig")
    assert read_groups(path, 3, ["x/a.png", "x/b.png", "y/a.png"]).tolist() == ["c", "a, b", "a"]


@pytest.mark.parametrize("groups", [["a", "b"], [0.5, 1.5, 2.5], [["a"], ["b"], ["c"]], [None, "a", "b"]])
def test_bad_groups_are_refused(groups) -> None:
    with pytest.raises(ShapeError, match="groups must be 3 names or integers, one an image, found"):
        evaluate(*sample(3), groups=groups)
