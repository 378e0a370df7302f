"""Classes and single images in a report: against counts by hand, bounded, and in one colour for each run."""

from __future__ import annotations

import io
import json
from base64 import b64decode
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from ensembler.eval.comparison import compare_runs
from ensembler.eval.evaluation import evaluate
from ensembler.eval.metrics.classes import (
    CLASSES,
    IMAGES,
    Places,
    class_scores,
    confusion,
    shown_images,
    surest_mistakes,
    wrong_by_class,
)
from ensembler.eval.report.figures import figures, run_styles
from ensembler.eval.report.page import page
from ensembler.eval.report.styles import PALETTE, styles
from ensembler.eval.report.tables import report_tables
from ensembler.eval.report.text import markdown
from ensembler.eval.report.thumbnails import SIDE, thumbnails
from ensembler.eval.report.thumbnails import shown_images as card_html
from tests._reports import comparison, evaluation


def guesses(N, C, M=3, seed=0):
    """Members' probabilities (M, N, C) and labels (N,), right in about half."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N)
    logits = rng.normal(size=(M, N, C)) + 1.5 * np.eye(C)[labels]
    probs = np.exp(logits)
    return (probs / probs.sum(axis=2, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("C", [2, 20, 21])
def test_the_confusion_is_that_of_a_loop(C):
    members, labels = guesses(400, C)
    predicted, names = members.mean(axis=0).argmax(axis=1), [f"class {k}" for k in range(C)]
    found = confusion(predicted, labels, names)
    pairs = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    if C <= CLASSES:
        assert found.counts == [[pairs[row, column] for column in range(C)] for row in range(C)]
    else:
        assert found.counts is None
    wrong = {(names[a], names[b]): count for (a, b), count in pairs.items() if a != b}
    assert [one.examples for one in found.pairs] == sorted(wrong.values(), reverse=True)[:CLASSES]
    assert all(wrong[one.label, one.predicted] == one.examples for one in found.pairs)
    first = found.pairs[0]
    assert first.share == first.examples / (labels == names.index(first.label)).sum()


def test_answers_are_scored_by_the_class_they_name():
    members, labels = guesses(60, 4)
    mean = members.mean(axis=0)
    mean[mean.argmax(axis=1) == 3] = [0.7, 0.1, 0.1, 0.1]  # nothing is answered with the last class
    for k, (name, found) in enumerate(class_scores(mean, labels, "abcd").items()):
        rows = [n for n in range(60) if mean[n].argmax() == k]
        assert (name, found.answered) == ("abcd"[k], len(rows))
        if rows:
            assert found.precision == pytest.approx(np.mean([labels[n] == k for n in rows]))
            assert found.confidence == pytest.approx(np.mean([mean[n, k] for n in rows]), rel=1e-6)
    assert (found.precision, found.confidence) == (None, None)
    wrong = (mean.argmax(axis=1) != labels).astype(float)
    errors = wrong_by_class(wrong, np.minimum(labels, 2), 4)
    assert errors[2] == pytest.approx(wrong[labels >= 2].mean())
    assert np.isnan(errors[3])


def test_the_surest_mistakes_are_wrong_and_say_who_voted_for_what():
    members, labels = guesses(90, 3)
    mean, votes = members.mean(axis=0), members.argmax(axis=2)
    chosen = surest_mistakes(mean, labels)
    wrong = [n for n in range(90) if mean[n].argmax() != labels[n]]
    assert chosen.tolist() == sorted(wrong, key=lambda n: -mean[n].max())[:IMAGES]
    places = Places(np.arange(100, 190), [f"{n}.png" for n in range(189)] + ["\udcff.png"])
    entropy = np.zeros(90)
    found = shown_images(np.array([chosen[0], 89]), mean, entropy, votes, labels, "abc", places)
    assert (found[0].image, found[0].file) == (100 + chosen[0], f"{100 + chosen[0]}.png")
    assert found[0].votes == {"abc"[k]: n for k, n in Counter(votes[:, chosen[0]].tolist()).items()}
    assert list(found[0].votes.values()) == sorted(found[0].votes.values(), reverse=True)
    assert found[0].predicted == "abc"[mean[chosen[0]].argmax()] != found[0].label
    assert found[1].model_dump_json()  # a file's name that is no UTF-8


def test_a_report_of_many_classes_and_images_is_bounded():
    members, labels = guesses(1500, 300, M=2)
    given = {"probabilities": members, "labels": labels}
    given |= {f"shift/{name}/{s}/probabilities": members for name in ("fog", "snow") for s in (1, 2)}
    report = evaluate(given)
    (run,) = report.runs
    assert run.confusion.counts is None
    assert (len(run.confusion.pairs), len(run.surest_mistakes), len(run.most_uncertain)) == (CLASSES, IMAGES, IMAGES)
    assert {name: len(errors) for name, errors in run.class_errors.items()} == {"fog": CLASSES, "snow": CLASSES}
    worst = sorted((one.error.value for one in run.groups["class"].groups.values()), reverse=True)[:CLASSES]
    assert sorted(run.class_errors["fog"].values(), reverse=True) == pytest.approx(worst)
    assert run.class_errors["fog"] == pytest.approx(run.class_errors["snow"])
    tables = [table for table in report_tables(report) if table.section == "classes"]
    assert [len(table.rows) for table in tables] == [10, CLASSES, CLASSES]
    assert "The 20 of " in tables[1].notes[-1]
    assert len(markdown(report)) < 20_000
    assert json.loads(report.model_dump_json())["classes"] == [str(k) for k in range(300)]


def test_thumbnails_are_the_images_that_are_named():
    found = evaluation()
    pngs = thumbnails(found, found.report.runs)
    named = {one.image for run in found.report.runs for one in (*run.surest_mistakes, *run.most_uncertain)}
    assert set(pngs) == named
    for number, png in pngs.items():
        image = np.asarray(Image.open(io.BytesIO(b64decode(png.partition(",")[2]))))
        assert max(image.shape[:2]) <= SIDE
        np.testing.assert_array_equal(image, found.images.images[number].numpy())  # they are smaller than the bound
    html = card_html(found, found.report)
    assert html.count("<li>") == sum(len(run.surest_mistakes) + len(run.most_uncertain) for run in found.report.runs)
    assert "votes: " in html


def test_predictions_made_elsewhere_have_no_pictures_and_the_same_words():
    members, labels = guesses(40, 3)
    report = evaluate(members, labels)
    found = type(evaluation())(report, evaluation().runs, labels)
    html = card_html(found, report)
    assert "<img" not in html
    assert f"image {report.runs[0].most_uncertain[0].image}" in html
    one = report.runs[0].surest_mistakes[0]
    count, votes = next(iter(one.votes.items()))[::-1]
    assert f"{one.predicted}, {100 * one.confidence:.2f} %; is {one.label}<br>votes: {count} for {votes}" in html
    right = evaluate(np.eye(3)[labels][None], labels)
    assert "None: every answer is right." in card_html(found, right)


def test_the_best_values_are_bold_where_the_comparison_says_so():
    report = comparison()
    table = next(one for one in report_tables(report) if one.section == "summary")
    columns = {"error %": ("clean", "error"), "NLL": ("clean", "nll"), "shifted ECE %": ("shifted", "ece")}
    for heading, (where, score) in columns.items():
        column = table.columns.index(heading)
        best = report.comparison.best[where][score]
        assert {row for row, place in table.best if place == column} == set(best)
        values = [getattr(getattr(run, where), score) for run in report.runs]
        assert values[best[0]] == min(values)
    assert "Bold: the lowest" in " ".join(table.notes)
    row, column = min(table.best)
    assert f"**{table.rows[row][column]}**" in markdown(report)
    found = page(evaluation(), report, figures(evaluation(), report), seconds=1.0).decode()
    summary = found[found.index('id="summary"') : found.index("<nav")]
    assert summary.count("<table>") == summary.count("<figure>") == 1
    assert summary.count("<b>") == len(table.best)
    assert "On clean images, lowest NLL: " in summary
    alone = next(one for one in report_tables(evaluation().report) if one.section == "summary")
    assert not alone.best  # nothing is compared


def colours(figure, names):
    """The colours of a figure's lines and markers, by the run that its legend names."""
    lines = [line for axes in figure.axes for line in axes.lines]
    return {name: {line.get_color() for line in lines if line.get_label().startswith(name)} for name in names}


def test_a_run_has_one_colour_in_all_figures():
    report = comparison()
    names = [f"{place}: {run.name}" for place, run in enumerate(report.runs, start=1)]
    expected = {name: {own.colour} for name, own in zip(names, run_styles(report), strict=True)}
    pictures = figures(evaluation(), report)
    assert pictures["severity"].section == "summary"
    for figure in ("severity", "boxes", "rejection"):
        assert colours(pictures[figure].figure, names) == expected, figure
    several = colours(pictures["members"].figure, names)
    assert {name: found for name, found in several.items() if found}.items() <= expected.items()
    forest = [line.get_color() for line in pictures["differences"].figure.axes[0].lines]
    assert forest[::2][:3] == [next(iter(expected[name])) for name in names[1:]]
    for name, axes in zip(names, pictures["reliability"].figure.axes, strict=False):
        assert axes.patches[0].get_facecolor()[:3] == pytest.approx(_rgb(next(iter(expected[name]))))


def _rgb(colour):
    return [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]


def test_colours_are_the_methods_whatever_the_order_and_the_company():
    runs = [("single", "a"), ("deep-ensemble", "b"), ("deep-ensemble", "c"), ("simplex", "d"), ("elsewhere", "x.npz")]
    found = dict(zip(runs, styles(runs), strict=True))
    assert len({own.colour for own in found.values()}) == len(runs)
    turned = runs[::-1]
    assert dict(zip(turned, styles(turned), strict=True)) == found
    for alone in (runs[:1], runs[1:2], runs[3:4]):
        assert styles(alone) == [found[alone[0]]]
    assert styles([("curve-bezier", "e")]) == styles([("curve-chain", "f")])
    study = styles([("simplex", "simplex"), ("single", "single")])  # a study's methods are their own names
    assert study == [found["simplex", "d"], found["single", "a"]]
    many = styles([("swag", str(n)) for n in range(30)], first=[20, 21])
    assert many[20] == styles([("swag", "z")])[0]
    assert len(set(many)) == 28  # 7 colours with 4 lines
    assert {own.colour for own in many} == {own.colour for own in PALETTE}


def test_the_best_do_not_depend_on_the_baseline():
    again = compare_runs(evaluation(), baseline=1)
    assert again.comparison.best == comparison().comparison.best
