"""The test images that a page shows: each run's surest mistakes and most uncertain images, with its members' votes."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
import torch

from ensembler.eval.evaluation import Evaluation
from ensembler.eval.metrics.classes import ShownImage
from ensembler.eval.report.notation import SCORES, label, plain, representatives
from ensembler.eval.report.schema import Report, RunReport
from ensembler.eval.report.styles import PALETTE

__all__ = ["SIDE", "shown_images", "thumbnails"]

SIDE = 96  # pixels of the longer side, at most
_VOTES = 4  # classes whose votes are written


def thumbnails(found: Evaluation, runs: Iterable[RunReport]) -> dict[int, str]:
    """Return the images that the runs' reports show as data URLs, by position; none of given predictions.

    Raises:
        DataError: an image cannot be read any more.
    """
    if found.images is None:
        return {}
    shown = sorted({one.image for run in runs for one in (*run.surest_mistakes, *run.most_uncertain)})
    pixels = found.images[torch.tensor(shown, dtype=torch.int64)].images.numpy()
    return {number: _png(image) for number, image in zip(shown, pixels, strict=True)}


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    image, content = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"


def shown_images(found: Evaluation, report: Report) -> str:
    """Render the images of each run as HTML; of more runs than colours, of one of each group of seeds."""
    places, said = representatives(report, most=len(PALETTE))
    pngs = thumbnails(found, [report.runs[place] for place in places])
    note = (
        "Of the clean test images. Mistakes: wrong answers, those of the highest confidence first. Uncertain: the "
        f"highest predictive entropy first, right or wrong. Votes: each member's own answer. {said}"
    )
    html = [f'<p class="note">{escape(note.rstrip())}</p>']
    for place in places:
        run = report.runs[place]
        for title, images in (("surest mistakes", run.surest_mistakes), ("most uncertain", run.most_uncertain)):
            html.append(f"<h3>{escape(label(report, place))}: {title}</h3>")
            html.append(_cards(images, pngs) if images else '<p class="note">None: every answer is right.</p>')
    return "\n".join(html)


def _cards(images: Sequence[ShownImage], pngs: dict[int, str]) -> str:
    cards = "\n".join(f"<li>{_card(one, pngs.get(one.image))}</li>" for one in images)
    return f'<ul class="images">\n{cards}\n</ul>'


def _card(one: ShownImage, png: str | None) -> str:
    name = plain(one.file) if one.file is not None else f"image {one.image}"
    picture = "" if png is None else f'<img src="{png}" alt="{escape(f"{name}, of class {plain(one.label)}")}">'
    right = one.label == one.predicted
    answer = f"{plain(one.predicted)}, {SCORES['accuracy'].write(one.confidence)} %"
    lines = [f"{answer}: right" if right else f"{answer}; is {plain(one.label)}"]
    if sum(one.votes.values()) > 1:
        votes = list(one.votes.items())
        others = sum(count for _, count in votes[_VOTES:])
        written = [f"{count} for {plain(name)}" for name, count in votes[:_VOTES]]
        written += [f"{others} for others"] * bool(others)
        lines.append(f"votes: {', '.join(written)}")
    lines.append(f"entropy {one.entropy:.2f} nats; {name}")
    return picture + "<br>".join(map(escape, lines))
