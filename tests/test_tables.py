"""Tables: the same figures as the report's, whole and whatever a run is called."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from rich.console import Console

from ensembler.eval.comparison import compare_runs
from ensembler.eval.metrics.comparison import Difference
from ensembler.eval.metrics.groups import GROUPED
from ensembler.eval.report.notation import NOTHING, SCORES, Score, compact, verdict
from ensembler.eval.report.schema import CellScores, Report
from ensembler.eval.report.sentences import findings
from ensembler.eval.report.table import Table
from ensembler.eval.report.tables import report_tables
from ensembler.eval.report.text import csv as as_csv
from ensembler.eval.report.text import markdown, tables, terminal_table
from tests._reports import OUTSIDE, comparison, evaluation, named, part

DIFFERENCES = "differences from 1: single in error and NLL"
HOSTILE = ["[red]a[/red]", "a|b`c*_#<b>&$x", 'quote " comma, line\nnext', "=1+1"]


def rendered(report: Report, width: int, full: bool = True) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None, highlight=False)
    console.print(tables(report, width, full, bold=False))
    return console.file.getvalue()


def markdown_tables(text: str) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Title, then headings and rows; a pipe after a backslash is text."""
    found = {}
    for block in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, rest = block.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        cells = [
            [re.sub(r"\\(.)", r"\1", cell.strip().strip("*")) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in lines
        ]
        assert len({len(row) for row in cells}) == 1
        assert all(re.fullmatch("---:?", cell) for cell in cells[1])
        found[re.sub(r"\\(.)", r"\1", title)] = cells[0], cells[2:]
    return found


def test_markdown_holds_the_reports_figures():
    report = comparison()
    found = markdown_tables(markdown(report))
    assert sum("differences from 1: single" in title for title in found) == 2
    headings, rows = found["Clean: 15 test images of small"]
    titles = {"error %": "error", "NLL": "nll", "calibrated NLL": "calibrated_nll", "Brier": "brier", "AURC %": "aurc"}
    for row, run in zip(rows, report.runs, strict=True):
        cells = dict(zip(headings, row, strict=True))
        assert cells["M"] == str(run.members)
        for title, name in titles.items():
            scale, digits = (100 if title.endswith("%") else 1), len(cells[title].split(".")[1])
            assert digits >= 2
            assert float(cells[title]) == pytest.approx(scale * getattr(run.clean, name), abs=0.50001 * 10**-digits)
    headings, rows = found["Mean corruption error (unnormalised), %, generated shift"]
    for row, run in zip(rows, report.runs, strict=True):
        expected = [run.clean, *run.by_severity.values(), run.shifted]
        assert [float(cell) for cell in row[3:]] == pytest.approx([100 * one.error for one in expected], abs=0.0051)
    headings, rows = found[f"Under generated shift: means over 15 corruptions x 5 severities: {DIFFERENCES}"]
    expected = [(one, name) for one in report.comparison.differences for name in ("error", "nll")]
    for row, (one, name) in zip(rows, expected, strict=True):
        found_difference, scale = one.shifted[name], 100 if name == "error" else 1
        assert row[0].endswith(one.run)
        figures = [found_difference.difference, found_difference.low, found_difference.high]
        assert [float(cell) for cell in row[5:8]] == pytest.approx([scale * value for value in figures], abs=0.0051)
        assert float(row[8]) == pytest.approx(found_difference.probability_better, abs=0.00051)
    headings, rows = found["How many members, and which"]
    for row, curve in zip(rows, report.comparison.curves, strict=True):
        assert [int(number) - 1 for number in row[-1].split()] == curve.order
        assert row[-2] == (NOTHING if curve.recommended is None else str(curve.recommended))


def test_what_every_table_must_say_is_said():
    text = markdown(comparison()).replace("\\", "")
    for words in (
        "Mean corruption error (unnormalised)",
        "15 test images of small",
        "not the official files, so not comparable with published figures",
        "Means are over: gaussian_noise, shot_noise",
        "which no other mean includes",
        "where there are two members or logits are known",
        "generated, seed 3",
        "not for that of the training seed",
        "Mean and sample standard deviation",
    ):
        assert words in text, words


def test_csv_holds_every_score():
    report = comparison()
    text = as_csv(report)
    assert text.count("\r\n") == len(text.splitlines())
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    found = {
        (int(row["number"]), row["set"], row["corruption"], row["severity"], row["score"]): row["value"] for row in rows
    }
    assert len(found) == len(rows)
    expected = {}
    for number, run in enumerate(report.runs, start=1):
        sets = {("clean", "", ""): run.clean, ("shifted", "", ""): run.shifted}
        sets |= {("severity", "", str(level)): scores for level, scores in run.by_severity.items()}
        sets |= {("family", family, ""): scores for family, scores in run.by_family.items()}
        sets |= {("cell", c, str(s)): scores for c, levels in run.cells.items() for s, scores in levels.items()}
        sets |= {(f"member {m}", "", ""): scores for m, scores in enumerate(run.single_members, start=1)}
        for where, scores in sets.items():
            expected |= {(number, *where, name): value for name, value in scores.model_dump().items()}
        for images in OUTSIDE:
            for detector, scores in run.ood[images].items():
                names = [name for name in found if name[:2] == (number, f"ood {images}") and detector in name[4]]
                values = (
                    dict.fromkeys(names)
                    if scores is None
                    else {
                        (number, f"ood {images}", "", "", f"{detector} {name}"): value
                        for name, value in scores.model_dump().items()
                    }
                )
                assert len(values) == 7
                expected |= values
        for by, grouped in run.groups.items():
            for group, scores in grouped.groups.items():
                expected[number, f"group {by}", group, "", "examples"] = scores.examples
                expected[number, f"group {by}", group, "", "ece"] = scores.ece
            each = [(group, name, getattr(s, name)) for group, s in grouped.groups.items() for name in GROUPED]
            each += [("", f"worst {name}", one) for name, one in grouped.worst.items()]
            each += [("", f"gap {name}", one) for name, one in grouped.gap.items()]
            for group, name, one in each:
                ends = {name: one.value, f"{name} low": one.low, f"{name} high": one.high}
                expected |= {(number, f"group {by}", group, "", title): value for title, value in ends.items()}
        expected[number, "validation", "", "", "temperature"] = run.temperature
        for name in ("example_passes", "forward_passes", "seconds", "peak_memory"):
            expected[number, "cost", "", "", f"training_{name}"] = getattr(run, f"training_{name}")
        expected[number, "cost", "", "", "forward_passes_per_prediction"] = run.members
    assert {key: float(value) if value else None for key, value in found.items()} == expected
    sources = {row["set"]: row["source"] for row in rows}
    assert sources["clean"] == "dataset"
    assert {sources[name] for name in ("cell", "severity", "family", "shifted", "ood noise:uniform")} == {"generated"}
    beside = {(row["run"], row["method"], int(row["members"]), int(row["training_example_passes"])) for row in rows}
    assert beside == {(run.name, run.method, run.members, run.training_example_passes) for run in report.runs}


def test_names_of_any_kind_stand_whole():
    found = named(HOSTILE)
    report = compare_runs(found)
    rows = csv.DictReader(io.StringIO(as_csv(report), newline=""))
    assert list(dict.fromkeys(row["run"] for row in rows)) == HOSTILE
    _, rows = markdown_tables(markdown(report))["Training cost"]
    plain = [name.replace("\n", "\N{REPLACEMENT CHARACTER}") for name in HOSTILE]
    assert [row[0] for row in rows] == [f"{number}: {name}" for number, name in enumerate(plain, start=1)]
    text = rendered(report, 120)
    assert all(name in text for name in plain)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminal_shows_every_figure_whole(width):
    report = compare_runs(named([f"rather-a-long-name-for-a-run-with-seed-{n}" for n in range(4)]), curves=True)
    for run in report.runs:
        run.clean.nll = run.shifted.nll = 12.3456  # as long as figures get
    lines = rendered(report, width).splitlines()
    assert max(map(len, lines)) <= width
    words = set(" ".join(lines).split())
    for table in report_tables(report):
        cells = {part for row in table.rows for cell in row[table.words :] for part in cell.split()}
        assert cells <= words, table.title


@pytest.mark.parametrize("width", [60, 120])  # in several parts, and in one
def test_a_terminal_shows_the_best_figures_in_bold_and_a_pipe_says_nothing_of_bold(width):
    report = comparison()
    console = Console(width=width, file=io.StringIO(), color_system="standard", force_terminal=True, highlight=False)
    console.print(tables(report, width, full=True))
    found = re.findall(r"\x1b\[1m *([\d.]+)\x1b", console.file.getvalue())
    best = [table.rows[row][column] for table in report_tables(report) for row, column in sorted(table.best)]
    assert sorted(found) == sorted(best) and best
    assert "Bold: the lowest" in console.file.getvalue()
    assert "Bold" not in rendered(report, width)


def test_the_terminal_has_the_findings_first_and_long_tables_only_if_asked():
    short, full = rendered(comparison(), 80, full=False), rendered(comparison(), 80)
    assert short.index("In short") < short.index("Clean: ") < short.index("--full")
    assert "Training cost" in full and "Training cost" not in short
    assert "every cell" in full and "every cell" not in short


def test_parts_without_data_have_no_table():
    sections = list(dict.fromkeys(table.section for table in report_tables(part().report)))
    assert sections == ["summary", "costs", "clean", "calibration", "classes", "members", "rejection", "groups"]
    assert "shift" not in rendered(part().report, 80)
    assert NOTHING in markdown_rows(part().report, "members")[0]
    only_validation = part(2, shift=True).report
    only_validation.shift.headline = []
    for run in only_validation.runs:
        run.shifted, run.by_severity = None, {}
        run.by_family = {"validation": run.by_family["validation"]}
    found = [table for table in report_tables(only_validation) if table.section == "shift"]
    assert {table.columns[3:] for table in found} == {("validation",)}
    assert "Means are over: no corruption" in rendered(only_validation, 80)


def markdown_rows(report: Report, section: str) -> list[tuple[str, ...]]:
    return next(table.rows for table in report_tables(report) if table.section == section)


def test_weights_of_unknown_cost_are_said():
    report = comparison().model_copy(deep=True)
    report.runs[1].training_unknown = ["weights.safetensors"]
    text = markdown(report).replace("\\", "")
    assert "2: deep-a: the training cost of weights.safetensors is unknown and not counted" in text
    assert "+?" in markdown_rows(report, "clean")[1][2]
    assert "training cost: partly unknown" in " ".join(findings(report))


def test_every_score_has_a_name_and_a_meaning():
    assert set(SCORES) == set(CellScores.model_fields)
    assert all(score.meaning for score in SCORES.values())


@given(st.floats(-1, 1), st.sampled_from(sorted(SCORES)), st.booleans())
def test_a_figure_is_the_number_rounded(value, name, sign):
    score = SCORES[name]
    text = score.write(value, sign=sign)
    assert float(text) == pytest.approx(score.scale * value, abs=0.50001 * 10**-score.digits)
    assert not re.fullmatch(r"[+-]0\.?0*", text)
    assert len(text.split(".")[1]) == score.digits
    assert Score("", 1, 2, "").write(None) == NOTHING


@given(st.integers(0, 10**12))
def test_compact_passes(passes):
    text = compact(passes).replace(",", "")
    scale = {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1], 1)
    assert float(text.rstrip("kMG")) * scale == pytest.approx(passes, abs=0.0501 * scale)


numbers = st.floats(-0.2, 0.2)


@pytest.fixture(scope="module")
def made_up() -> Report:
    return comparison().model_copy(deep=True)


@given(ends=st.lists(numbers, min_size=3, max_size=3).map(sorted))
def test_nothing_is_called_lower_or_higher_where_the_interval_holds_0(made_up, ends):
    low, difference, high = ends
    one = Difference(difference=difference, low=low, high=high, probability_better=0.5)
    for run in made_up.comparison.differences:
        run.clean = dict.fromkeys(run.clean, one)
        run.shifted = None
    said = [line for line in findings(made_up) if ": clean, NLL" in line]
    assert len(said) == len(made_up.runs) - 1
    for line in said:
        assert "better" not in line
        assert (low <= 0 <= high) == ("not significant" in line)
        assert (high < 0) == ("lower by" in line)
        assert (low > 0) == ("higher by" in line)
    assert verdict(one) == ("lower" if high < 0 else "higher" if low > 0 else "not significant")


def test_sentences_state_the_costs_and_the_intervals():
    report = comparison()
    text = "\n".join(findings(report))
    one = report.comparison.differences[0].clean["nll"]
    assert "2: deep-a, at 3 times the training passes and 3 times the forward passes: clean, NLL " in text
    ends = sorted(f"{abs(end):.4f}" for end in (one.low, one.high))
    assert all(end in text for end in ends)
    assert "The runs differ in training cost" in text
    assert re.search(
        r"Over 2 seeds of deep-ensemble \(2, 3\), clean: NLL [\d.]+ ± [\d.]+, error [\d.]+ ± [\d.]+ % \(", text
    )
    assert "95 % intervals" in text and "95%" not in text
    alone = "\n".join(findings(part().report))
    assert "a prediction takes 1 forward pass." in alone
    assert "differ in training cost" not in alone
    assert "ensembler compare" not in alone
    assert "ensembler compare" in "\n".join(findings(evaluation().report))


def fields(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[str]:
    """The names of a model's fields, and of those of the models in them."""
    found = set(model.model_fields)
    seen.add(model)
    for definition in (model.model_json_schema().get("$defs") or {}).values():
        found |= set(definition.get("properties", {}))
    return found


def test_every_field_of_the_report_is_documented():
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9_]+)`", text))
    assert fields(Report, set()) - named == set()
    rows = next(csv.reader(io.StringIO(as_csv(part().report))))
    assert set(rows) - named == set()


def test_no_figure_is_broken_on_a_terminal():
    columns = ("run", *("one standard deviation either way",) * 4, "in this order")
    table = Table("members", "figures", columns, (("1 simplex", *("1.0 to 1.7", "> 2") * 2, "1 2 3 4 5 6 7 8 9"),))
    console = Console(width=80, file=io.StringIO())
    for each in terminal_table(table, [], 80):
        console.print(each)
    assert console.file.getvalue().count("1.0 to 1.7") == 2
