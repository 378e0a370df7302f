"""The page: whole, by itself, the same bytes, and whatever a run is called."""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from ensembler.eval.comparison import compare_runs
from ensembler.eval.metrics.classification import accuracy, ece
from ensembler.eval.metrics.comparison import Losses
from ensembler.eval.report import figures as drawing
from ensembler.eval.report.class_plots import plot_confusion
from ensembler.eval.report.figures import figures
from ensembler.eval.report.page import page
from ensembler.eval.report.plots import plot_entropy, plot_map, plot_reliability, settle, to_png, to_svg
from ensembler.eval.report.schema import Group
from ensembler.eval.report.styles import styles
from ensembler.eval.report.tables import report_tables
from tests._reports import comparison, evaluation, named, part

SVG = "data:image/svg+xml;base64"
VOID = {"meta", "img", "br", "wbr", "hr", "link", "input"}
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    r"$\frac{1$ _ & \"quoted\" 'single'",
    "</td></table><script>alert(1)</script>",
    "模型 \x1b[31m\n line two \ud800 🙂" + "x" * 60,
]


class Page(HTMLParser):
    """What a page is made of; unbalanced tags fail."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.of("section")]


def drawn(found: Page) -> list[dict[str, str | None]]:
    """The figures, not the test images."""
    return [image for image in found.of("img") if image["src"].startswith(SVG)]


def made(found, report, **options) -> bytes:
    return page(
        found, report, figures(found, report), **({"seconds": 4.2, "command": "ensembler compare a b"} | options)
    )


@pytest.fixture(scope="module")
def whole() -> bytes:
    return made(evaluation(), comparison())


def test_it_needs_nothing_else(whole):
    found = Page(whole)
    assert {one["src"].partition(",")[0] for one in found.of("img")} == {SVG, "data:image/png;base64"}
    assert {href["href"][0] for href in found.of("a")} == {"#"}
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in found.elements}
    assert not any(name.startswith("on") or name == "style" for _, given in found.elements for name in given)
    assert b"url(" not in whole
    assert b"@import" not in whole
    for image in drawn(found):
        svg = b64decode(image["src"].partition(",")[2]).decode()
        assert {link[0] for link in re.findall(r'href="([^"]*)"', svg)} <= {"#"}
        assert "<script" not in svg
        assert {one[0] for one in re.findall(r"url\((.)", svg)} <= {"#"}


def test_it_is_made_to_be_read(whole):
    found = Page(whole)
    report = comparison()
    assert found.of("html")[0]["lang"] == "en"
    assert len(found.of("h1")) == 1
    assert [href["href"] for href in found.of("a")] == [f"#{name}" for name in found.ids()]
    assert len(set(found.ids())) == len(found.ids())
    tables = report_tables(report)
    assert len(found.of("table")) == len(found.of("caption")) == len(tables)
    assert all(cell["scope"] in ("col", "row") for cell in found.of("th"))
    rows = sum(len(table.rows) for table in tables)
    assert len([cell for cell in found.of("th") if cell["scope"] == "row"]) == rows
    pictures = figures(evaluation(), report)
    order = ("summary", "calibration", "classes", "members", "shift", "rejection", "ood", "comparison", "number")
    assert [image["alt"] for image in drawn(found)] == [
        picture.alt for name in order for picture in pictures.values() if picture.section == name
    ]
    assert all(len(image["alt"]) > 20 for image in drawn(found))
    assert "@media print" in whole.decode()
    assert "prefers-color-scheme" in whole.decode()
    text = "".join(found.text)
    for table in tables:
        for row in table.rows:
            assert all(cell in text for cell in row)
    for words in (
        "ensembler compare a b",
        "4.2 s",
        report.test_sha256,
        report.runs[0].validation_sha256,
        evaluation().runs[0].manifest.dataset.train_sha256,
        "not the official files",
        "uniform noise (generated, seed 3)",
        f"torch {report.versions['torch']}",
        "not defined for one member",
        "Mean corruption error (unnormalised)",
    ):
        assert words in text, words


def test_the_same_evaluation_gives_the_same_bytes(whole):
    again = made(evaluation(), compare_runs(evaluation(), curves=True), seconds=61.0, command=None)
    assert again != whole
    without = re.compile(rb"<dt>(command|took)</dt><dd>.*?</dd>\n")
    assert without.sub(b"", again) == without.sub(b"", whole)
    for name, picture in figures(evaluation(), comparison()).items():
        if name in ("boxes", "differences"):  # whichever file is written first
            first, png = to_svg(picture.figure), to_png(picture.figure)
            assert (to_svg(picture.figure), to_png(picture.figure)) == (first, png)
            assert png.startswith(b"\x89PNG")
            assert b64encode(first) in whole


def test_names_of_any_kind_are_text(whole):
    found = named(HOSTILE)
    report = compare_runs(found, curves=True)
    result = Page(made(found, report, command=f"ensembler compare {HOSTILE[2]}"))
    assert [tag for tag, _ in result.elements] == [tag for tag, _ in Page(whole).elements]
    text = "".join(result.text)
    assert f"1: {HOSTILE[0]}" in text
    assert f"2: {HOSTILE[1]}" in text
    assert f"ensembler compare {HOSTILE[2]}" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("runs", "shift", "ood", "more"),
    [(1, False, False, set()), (1, True, False, {"shift", "cells"}), (2, False, True, {"ood"})],
)
def test_parts_without_data_do_not_appear(runs, shift, ood, more):
    found = part(runs, shift=shift, ood=ood)
    always = {"summary", "costs", "clean", "calibration", "classes", "images", "members", "rejection", "groups"}
    always |= {"terms", "made"}
    result = Page(made(found, found.report))
    assert set(result.ids()) == always | more
    assert len(drawn(result)) == 3 + 4 * shift + ood
    assert "–" in result.text  # the first run has one member


def test_too_many_runs_for_the_colours_are_shown_by_one_of_each_group():
    report = comparison().model_copy(deep=True)
    groups = report.comparison.groups
    assert [group.runs for group in groups] == [[0], [1, 2], [3]]
    report.runs = [*report.runs, *report.runs]
    report.comparison.groups = [Group(runs=[*g.runs, *(n + 4 for n in g.runs)], seeds=[], scores={}) for g in groups]
    found = evaluation()
    twice = type(found)(report, [*found.runs, *found.runs], found.labels)
    pictures = figures(twice, report)
    assert "One run of each group of seeds is shown: 1, 2, 4." in pictures["boxes"].caption
    assert titles(pictures["reliability"].figure) == ["1: single", "2: deep-a", "4: simplex"]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


LONG = "a-run-with-a-name-that-goes-on-for-quite-a-while-lr0.1-wd5e-4-"


def cut(figure: Figure) -> list[str]:
    """The names in a figure that are not whole."""
    figure.draw_without_rendering()
    whole = figure.bbox.padded(1)
    names = [one for one in figure.findobj(Text) if one.get_visible() and "a" in one.get_text()]
    boxes = [(one.get_text(), one.get_window_extent()) for one in names]
    return [text for text, box in boxes if not (whole.contains(*box.min) and whole.contains(*box.max))]


@pytest.mark.parametrize(("runs", "more"), [(1, False), (4, True)])
def test_long_names_are_whole_in_every_figure(runs, more):
    found = part(runs, shift=more, ood=more)
    report = found.report
    for number, run in enumerate(report.runs):
        run.name = f"{LONG}{number}"
    long = {name: f"a class whose name is rather long, number {n}" for n, name in enumerate(report.classes)}
    report.classes = list(long.values())
    for run in report.runs:
        run.class_errors = {
            one: {long[name]: error for name, error in own.items()} for one, own in run.class_errors.items()
        }
    pictures = figures(found, report)
    assert {name: cut(picture.figure) for name, picture in pictures.items()} == {name: [] for name in pictures}


def test_every_panel_can_be_read():
    rng = np.random.default_rng(0)
    losses = Losses.of(rng.dirichlet(np.ones(3), 50).astype(np.float32), rng.integers(0, 3, 50))
    names, own = [f"{n}: run" for n in range(6)], styles([("swag", str(n)) for n in range(6)])
    entropies = [rng.random(50) for _ in names]
    drawn = (
        (plot_reliability(names, own, [drawing._reliability(losses)] * 6), {2, 3, 4, 5}),  # the lowest of 4 columns
        (plot_entropy(names[:5], own, entropies, {"noise": entropies}, 3), {2, 3, 4}),
    )
    for figure, lowest in drawn:
        figure.draw_without_rendering()
        labelled = {n for n, axes in enumerate(figure.axes) if any(t.get_visible() for t in axes.get_xticklabels())}
        assert labelled == lowest
    confusion = plot_confusion([LONG, LONG], own[:2], [np.eye(12, dtype=int).tolist()] * 2, [str(n) for n in range(12)])
    settle(confusion)
    assert cut(confusion) == []
    points = [rng.normal(size=(3, 2)) * (1, 9), rng.normal(size=(2, 2))]
    (axes,) = plot_map(names[:2], own[:2], points, np.array([0.5, 0.4])).axes
    places = axes.transAxes.inverted().transform(axes.transData.transform(np.concatenate(points)))
    assert places.min() > 0.05 and places.max() < 0.95


def test_classes_whose_names_cannot_be_drawn_are_numbered():
    classes = ["cat", "猫", "犬", "قطة", "lady’s slipper", "what?", "кошка", "x" * 50, "x" * 51, "a $b$"]
    expected = ["cat", "#2", "#3", "#4", "lady’s slipper", "what?", "кошка", "#8", "#9", r"a \$b\$"]
    assert drawing._class_names(classes) == dict(zip(classes, expected, strict=True))
    found = part()
    found.report.classes = ["猫", "b", "c"]
    confusion = figures(found, found.report)["confusion"]
    assert [text.get_text() for text in confusion.figure.axes[0].get_xticklabels()] == ["#1", "b", "c"]
    assert "#N" in confusion.caption
    assert "#N" not in figures(part(), part().report)["confusion"].caption


@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.integers(1, 40))
def test_pictures_are_of_the_predictions(seed, classes, examples):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(classes, 0.3), examples).astype(np.float32)
    probs[rng.random(examples) < 0.2] = np.eye(classes, dtype=np.float32)[0]  # sure, and tied
    labels = rng.integers(0, classes, examples)
    losses = Losses.of(probs, labels)
    diagram, curve = drawing._reliability(losses), drawing._risk_coverage(losses)
    gaps = np.nansum(diagram.count * np.abs(diagram.accuracy - diagram.confidence)) / examples
    assert gaps == pytest.approx(ece(probs, labels), abs=1e-9)
    assert diagram.count.sum() == examples
    assert (curve.coverage[-1], curve.risk[-1]) == (1, pytest.approx(1 - accuracy(probs, labels)))
    pooled = Losses.over_cells([losses, losses])
    np.testing.assert_array_equal(drawing._reliability(pooled).count, 2 * diagram.count)
