"""The report as one HTML page that needs nothing else: no network, no script, its pictures inside.

The same evaluation gives the same bytes, but for how long it took and the command, which the page names too.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from html import escape

from ensembler.eval.evaluation import Evaluation
from ensembler.eval.report.figures import Picture
from ensembler.eval.report.notation import SCORES, plain
from ensembler.eval.report.plots import to_svg
from ensembler.eval.report.schema import Report
from ensembler.eval.report.sentences import compared, findings
from ensembler.eval.report.tables import Table, about, report_tables

__all__ = ["page"]

_SECTIONS = {
    "costs": "Costs",
    "clean": "Clean test images",
    "calibration": "Calibration",
    "members": "Members",
    "shift": "Shift",
    "rejection": "Answering only when confident",
    "ood": "Out of distribution",
    "comparison": "Comparison",
    "number": "Number of members",
    "cells": "Every cell of the shift",
}
"""In reading order: the sections of tables and of pictures."""

_FOLDED = "cells"  # long: folded on a screen, left out in print

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --rule: #c8c8c8; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --soft: #a8a8a8; --rule: #484848; --paper: #161616; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--rule); }
p, li, dd { max-width: 46rem; overflow-wrap: anywhere; }
a { color: inherit; }
nav ol { margin: 0; padding-left: 1.5rem; columns: 3 12rem; font-size: .9rem; }
.soft, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .85rem; margin: .3rem 0 0; }
.table { overflow-x: auto; margin: 1.2rem 0 0; }
table { border-collapse: collapse; font-size: .85rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; font-weight: 600; font-size: .95rem; padding-bottom: .35rem; }
thead th { vertical-align: bottom; border-top: 1.5px solid var(--ink); border-bottom: 1px solid var(--ink); }
tbody tr:last-child > * { border-bottom: 1.5px solid var(--ink); }
tbody tr:not(:last-child) > * { border-bottom: 1px solid var(--rule); }
th, td { padding: .2rem .6rem .2rem 0; text-align: left; font-weight: 400; overflow-wrap: anywhere; min-width: 2.5em; }
thead th { font-weight: 600; overflow-wrap: normal; }
tbody th { min-width: 9em; }
td.figure, th.figure { text-align: right; padding: .2rem 0 .2rem .9rem; white-space: nowrap; }
th.figure { white-space: normal; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; }
summary { cursor: pointer; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media (max-width: 40rem) { body { padding: 1rem .8rem 3rem; } dl { display: block; } dd { margin: 0 0 .5rem; } }
@page { margin: 16mm 14mm; }
@media print {
  :root { font-size: 9.5pt; color-scheme: light; --ink: #000; --soft: #333; --rule: #bbb; --paper: #fff; }
  body { max-width: none; padding: 0; }
  nav, details { display: none; }
  h2 { break-after: avoid; margin-top: 1.4rem; }
  table, figure, li, dt { break-inside: avoid; }
  thead { display: table-header-group; }
  .table { overflow: visible; }
  table { font-size: .8rem; }
  td.figure, th.figure { padding-left: .5rem; }
  p, li, dd { orphans: 3; widows: 3; }
}
"""


def page(
    found: Evaluation, report: Report, pictures: Mapping[str, Picture], *, seconds: float, command: str | None = None
) -> bytes:
    """The whole report as HTML, UTF-8.

    Args:
        found: what was evaluated.
        report: its report, or the one with the comparison in it.
        pictures: :func:`ensembler.eval.report.figures.figures` of both.
        seconds: how long it took.
        command: what made it, as typed.
    """
    title = f"{'Comparison' if report.comparison else 'Evaluation'} of {_runs(report)} on {plain(report.dataset)}"
    tables = report_tables(report)
    parts = {
        key: body
        for key in _SECTIONS
        if (body := "\n".join(_section(key, [one for one in tables if one.section == key], pictures)))
    }
    titles = {"summary": "In short", **_SECTIONS, "terms": "Terms", "made": "How this was made"}
    parts = {"summary": _summary(report), **parts, "terms": _terms(), "made": _made(found, report, seconds, command)}
    contents = "\n".join(f'<li><a href="#{key}">{escape(titles[key])}</a></li>' for key in parts)
    sections = "\n".join(
        f'<section id="{key}">\n<h2>{escape(titles[key])}</h2>\n{body}\n</section>' for key, body in parts.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_paragraphs(compared(report))}
</header>
<nav aria-label="Contents">
<ol>
{contents}
</ol>
</nav>
<main>
{sections}
</main>
</body>
</html>
""".encode()


def _summary(report: Report) -> str:
    return _list(findings(report))


def _section(key: str, tables: list[Table], pictures: Mapping[str, Picture]) -> Iterator[str]:
    said: set[str] = set()
    for table in tables:
        text = _table(table, [note for note in table.notes if note not in said])
        said |= set(table.notes)
        yield f"<details>\n<summary>{escape(table.title)}</summary>\n{text}\n</details>" if key == _FOLDED else text
    for picture in pictures.values():
        if picture.section == key:
            yield _figure(picture)
    if key == _FOLDED and tables:
        yield '<p class="note">Folded here, and left out in print; report.csv holds them all.</p>'


def _table(table: Table, notes: list[str]) -> str:
    kinds = ["" if place < table.words else ' class="figure"' for place in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{kind}>{_heading(heading)}</th>' for heading, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in table.rows
    )
    below = "".join(f'\n<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<div class="table">\n<table>\n<caption>{escape(table.title)}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>{below}\n</div>"
    )


def _heading(text: str) -> str:
    """A unit stays beside what it is of."""
    return escape(text).replace(" %", "&nbsp;%")


def _figure(picture: Picture) -> str:
    width = round(96 * picture.figure.get_figwidth())
    source = f"data:image/svg+xml;base64,{b64encode(to_svg(picture.figure)).decode()}"
    return (
        f'<figure>\n<img src="{source}" width="{width}" alt="{escape(picture.alt)}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _terms() -> str:
    return _definitions({score.title.removesuffix(" %"): escape(score.meaning) for score in SCORES.values()})


def _made(found: Evaluation, report: Report, seconds: float, command: str | None) -> str:
    images = found.runs[0].manifest.dataset
    facts = {
        "command": f"<code>{escape(plain(command))}</code>" if command else "",
        "took": f"{seconds:,.1f} s",
        "predicted on": escape(plain(report.device)),
        "seed": str(report.seed),
        "images": escape(
            f"{plain(report.dataset)}: {report.test_examples:,} test images to score, "
            f"{report.validation_examples:,} validation images to fit temperatures and choose members on"
        ),
        "test sha256": f"<code>{escape(report.test_sha256)}</code>",
        "validation sha256": f"<code>{escape(report.validation_sha256)}</code>",
        "training sha256": f"<code>{escape(images.train_sha256)}</code>",
        "runs' sha256": "<br>".join(f"{n}: <code>{escape(run.sha256)}</code>" for n, run in enumerate(report.runs, 1)),
        "shift": " ".join(map(escape, about(report)[1:])),
        "generated": escape(_generated(report)),
        "out of distribution": escape(
            "; ".join(f"{plain(one.title)}: {one.images:,} images ({one.source})" for one in report.ood)
        ),
        "bootstrap": ""
        if report.comparison is None
        else f"{report.comparison.resamples:,} resamples of the test images, seed {report.seed}",
        "versions": escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        "runs made": escape("; ".join(f"{n}: {plain(run.manifest.created)}" for n, run in enumerate(found.runs, 1))),
    }
    return _definitions({term: meaning for term, meaning in facts.items() if meaning})


def _generated(report: Report) -> str:
    """What is no published set of images."""
    made = ["the corrupted test images"] if report.shift is not None and report.shift.source == "generated" else []
    made += [plain(images.title) for images in report.ood if images.source == "generated"]
    return ", ".join(made) or "nothing"


def _definitions(facts: Mapping[str, str]) -> str:
    """A list of terms; what they mean is HTML already."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in facts.items()) + "\n</dl>"


def _list(lines: list[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def _paragraphs(lines: list[str]) -> str:
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _runs(report: Report) -> str:
    return "1 run" if len(report.runs) == 1 else f"{len(report.runs)} runs"
