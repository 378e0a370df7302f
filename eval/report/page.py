"""The report as one self-contained HTML page: no network, no scripts, embedded figures.

The same evaluation gives the same bytes, except for the duration and the command.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from ensembler.eval.evaluation import Evaluation
from ensembler.eval.report.figures import Picture
from ensembler.eval.report.notation import SCORES, count_runs, plain
from ensembler.eval.report.plots import to_svg
from ensembler.eval.report.schema import Report
from ensembler.eval.report.sentences import compared, findings
from ensembler.eval.report.tables import Table, about, report_tables
from ensembler.eval.report.thumbnails import shown_images

__all__ = ["bullets", "definitions", "document", "html_figure", "html_table", "page"]

_SECTIONS = {
    "costs": "Costs",
    "clean": "Clean test images",
    "calibration": "Calibration",
    "classes": "Classes",
    "images": "Single images",
    "members": "Members",
    "shift": "Shift",
    "others": "Other test sets",
    "rejection": "Selective prediction",
    "groups": "Groups",
    "ood": "Out of distribution",
    "comparison": "Comparison",
    "number": "Number of members",
    "cells": "Every cell of the shift",
}
"""The sections of tables and pictures, in reading order."""

_FOLDED = "cells"  # long: folded on screen, omitted in print


def page(
    found: Evaluation,
    report: Report,
    pictures: Mapping[str, Picture],
    *,
    seconds: float | None = None,
    command: str | None = None,
) -> bytes:
    """Render the report as HTML, in UTF-8.

    Args:
        found: the evaluation.
        report: its report, or the one with a comparison.
        pictures: :func:`ensembler.eval.report.figures.figures` of both.
        seconds: the duration, if known.
        command: as typed.
    """
    tables = report_tables(report)
    sections = {
        key: body
        for key in _SECTIONS
        if (body := "\n".join(_section(key, [one for one in tables if one.section == key], pictures)))
    }
    sections["images"] = shown_images(found, report)
    sections = {key: sections[key] for key in _SECTIONS if sections.get(key)}
    titles = {"summary": "Summary", **_SECTIONS, "terms": "Terms", "made": "How this was made"}
    terms = definitions({score.title.removesuffix(" %"): escape(score.meaning) for score in SCORES.values()})
    bodies = {
        "summary": "\n".join([bullets(findings(report)), *_section("summary", tables[:1], pictures)]),
        **sections,
        "terms": terms,
        "made": _made(found, report, seconds, command),
    }
    title = f"{'Comparison' if report.comparison else 'Evaluation'} of {count_runs(len(report.runs))} on "
    return document(
        title + plain(report.dataset), compared(report), {key: (titles[key], body) for key, body in bodies.items()}
    )


def document(title: str, introduction: Iterable[str], sections: Mapping[str, tuple[str, str]]) -> bytes:
    """Render a page, in UTF-8.

    Args:
        title: of the page.
        introduction: its first paragraphs.
        sections: each one's heading and its body as HTML, by its anchor, in order.
    """
    first, *others = (
        f'<section id="{key}">\n<h2>{escape(heading)}</h2>\n{body}\n</section>'
        for key, (heading, body) in sections.items()
    )
    template = resources.files("ensembler.eval.report").joinpath("page.html").read_text(encoding="utf-8")
    return (
        Template(template)
        .substitute(
            title=escape(title),
            introduction="\n".join(f"<p>{escape(line)}</p>" for line in introduction),
            contents="\n".join(
                f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, (heading, _) in sections.items()
            ),
            first=first,
            sections="\n".join(others),
        )
        .encode()
    )


def _section(key: str, tables: list[Table], pictures: Mapping[str, Picture]) -> Iterator[str]:
    said: set[str] = set()
    for table in tables:
        text = html_table(table, [note for note in table.notes if note not in said])
        said |= set(table.notes)
        yield f"<details>\n<summary>{escape(table.title)}</summary>\n{text}\n</details>" if key == _FOLDED else text
    for picture in pictures.values():
        if picture.section == key:
            yield html_figure(picture)
    if key == _FOLDED and tables:
        yield '<p class="note">Folded here and omitted in print; report.csv has them all.</p>'


def bullets(lines: Iterable[str]) -> str:
    """Render sentences as a list."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def html_table(table: Table, notes: Sequence[str]) -> str:
    """Render a table, with its notes below it."""
    kinds = ["" if place < table.words else ' class="figure"' for place in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{kind}>{_heading(heading)}</th>' for heading, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "\n".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(
            f"<td{kind}>{f'<b>{_cell(cell)}</b>' if (number, place) in table.best else _cell(cell)}</td>"
            for place, (cell, kind) in enumerate(zip(row[1:], kinds[1:], strict=True), start=1)
        )
        + "</tr>"
        for number, row in enumerate(table.rows)
    )
    below = "".join(f'\n<p class="note">{escape(note)}</p>' for note in notes)
    return (
        f'<div class="table">\n<table>\n<caption>{escape(table.title)}</caption>\n<thead>\n<tr>{head}</tr>\n</thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>{below}\n</div>"
    )


def _cell(text: str) -> str:
    """Escape a cell, which may be broken before an interval."""
    return re.sub(r" (?=[(\[][^)\]]*[)\]]$)", " <wbr>", escape(text))


def _heading(text: str) -> str:
    """Escape a heading, and keep its unit on the same line."""
    return escape(text).replace(" %", "&nbsp;%")


def html_figure(picture: Picture) -> str:
    """Render a picture, embedded as SVG, with its caption."""
    width = round(96 * picture.figure.get_figwidth())
    source = f"data:image/svg+xml;base64,{b64encode(to_svg(picture.figure)).decode()}"
    return (
        f'<figure>\n<img src="{source}" width="{width}" alt="{escape(picture.alt)}">\n'
        f"<figcaption>{escape(picture.caption)}</figcaption>\n</figure>"
    )


def _made(found: Evaluation, report: Report, seconds: float | None, command: str | None) -> str:
    manifests = {n: run.manifest for n, run in enumerate(found.runs, 1) if run.manifest is not None}
    validation = {n: run.validation_examples for n, run in enumerate(report.runs, 1) if run.validation_examples}
    trained = dict.fromkeys(manifest.dataset.train_sha256 for manifest in manifests.values())
    hashes = dict.fromkeys(run.validation_sha256 for run in report.runs if run.validation_sha256)
    facts = {
        "command": f"<code>{escape(plain(command))}</code>" if command else "",
        "took": "" if seconds is None else f"{seconds:,.1f} s",
        "predicted on": escape(plain(report.device or "elsewhere")),
        "seed": str(report.seed),
        "images": escape(f"{plain(report.dataset)}: {report.test_examples:,} test images to score"),
        "validation images": escape(
            "; ".join(f"{n}: {count:,}" for n, count in validation.items())
            + (" to fit temperatures and choose members on" if validation else "")
        ),
        "test sha256": _codes(filter(None, [report.test_sha256])),
        "validation sha256": _codes(hashes),
        "training sha256": _codes(trained),
        "runs' sha256": "<br>".join(
            f"{n}: <code>{escape(run.sha256)}</code>" for n, run in enumerate(report.runs, 1) if run.sha256
        ),
        "shift": " ".join(map(escape, about(report)[1:])),
        "generated": escape(_generated(report)),
        "out of distribution": escape(
            "; ".join(f"{plain(one.title)}: {one.images:,} images ({one.source})" for one in report.ood)
        ),
        "bootstrap": ""
        if report.comparison is None
        else f"{report.comparison.resamples:,} resamples of the test images, seed {report.seed}",
        "versions": escape(", ".join(f"{name} {version}" for name, version in report.versions.items())),
        "runs made": escape("; ".join(f"{n}: {plain(manifest.created)}" for n, manifest in manifests.items())),
    }
    return definitions({term: meaning for term, meaning in facts.items() if meaning})


def _codes(hashes: Iterable[str]) -> str:
    return "<br>".join(f"<code>{escape(one)}</code>" for one in hashes)


def _generated(report: Report) -> str:
    """List the generated images."""
    made = ["the corrupted test images"] if report.shift is not None and report.shift.source == "generated" else []
    made += [plain(images.title) for images in report.ood if images.source == "generated"]
    return ", ".join(made) or "nothing"


def definitions(facts: Mapping[str, str]) -> str:
    """Render a list of terms, whose meanings are HTML already."""
    return "<dl>\n" + "\n".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in facts.items()) + "\n</dl>"
