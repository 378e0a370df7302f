"""``ensembler predict``: asks a bundle, or a service at an address, about image files. No torch."""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.errors import ArtefactError, EnsemblerError, ShapeError, UsageError
from ensembler.serve.http.routes import PREDICT
from ensembler.storage.urls import as_paths
from ensembler.text import printable

if TYPE_CHECKING:
    import httpx

__all__ = [
    "COLUMNS",
    "ServiceError",
    "as_csv",
    "as_json_lines",
    "as_lines",
    "find_images",
    "is_url",
    "predict_files",
]

COLUMNS = ("image", "class", "probability", "uncertainty", "abstains")
"""Of a prediction's line: its path, its label and that label's probability, the entropy in nats, yes, no or -."""


_BATCH = 32  # files of one request or pass
_BATCH_BYTES = 8 * 2**20  # of the files of one request
_TRIES = 5  # of one request that a busy service refuses
_LONGEST_WAIT = 30.0  # seconds between two of them
_TIMEOUT = 60.0  # seconds for one answer


_Outcome = tuple[list[Path], dict[str, Any] | ShapeError]
"""Images, and the answer to them; or one image, and why it has none."""


class ServiceError(EnsemblerError):
    """A service that cannot be reached, is not ensembler's, or does not answer."""


def is_url(target: str) -> bool:
    """Whether a target is a service's address rather than a bundle's folder."""
    return target.lower().startswith(("http://", "https://"))


def find_images(given: Sequence[str]) -> list[Path]:
    """Return image files, in order, each once.

    Args:
        given: files; folders, searched at any depth as training searches them; patterns such as ``*.png``.

    Raises:
        UsageError: no such file, or a folder or pattern without an image.
    """
    from ensembler.data import folders

    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files, _ = folders.find_images(path)
        elif glob.has_magic(name):
            files = [Path(file) for file in sorted(glob.glob(name, recursive=True)) if Path(file).is_file()]  # noqa: PTH207  pathlib's cannot be absolute
        else:
            raise UsageError(f"no image at {name}: give image files, folders of them, or patterns")
        if not files:
            raise UsageError(f"{name} holds no image: give image files, folders of them, or patterns")
        found += files
    if not found:
        raise UsageError("no image was given: give image files, folders of them, or patterns")
    return list(dict.fromkeys(found))


def predict_files(
    target: str | Path,
    images: str | Path | Sequence[str | Path],
    *,
    mode: str = "full",
    members: int | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Return what an ensemble predicts for image files, asked in batches of a bundle on this machine or of a service.

    Args:
        target: a bundle's folder, or a service's address such as ``http://localhost:3000``.
        images: image files, one or several.
        mode, members: see :class:`ensembler.serve.http.options.Options`.
        token: sent to the service; ignored for a bundle.

    Returns:
        :class:`ensembler.serve.http.schemas.Answer` as a dictionary, each prediction with its file as ``"image"``. The
        files that are no images, or cannot be read, are in its ``"errors"``: ``{"image": ..., "error": ...}``.

    Raises:
        ServiceError: no service answers at the address, or it refuses the token.
        ShapeError: none of the files is an image; the first is named.
        UsageError: a mode or number of members that the ensemble does not have.
        ArtefactError: no bundle there; CorruptError: it has changed.
    """
    target, files = str(target), as_paths(images)
    chosen = {"mode": mode} | ({} if members is None else {"members": members})
    outcomes = _from_service(target, files, chosen, token) if is_url(target) else _from_bundle(target, files, chosen)
    answer: dict[str, Any] = {}
    predictions: list[dict[str, Any]] = []
    errors: list[tuple[Path, ShapeError]] = []
    for asked, outcome in outcomes:
        if isinstance(outcome, ShapeError):
            errors.append((asked[0], outcome))
            if not answer and len(errors) == _BATCH:
                break  # more likely the options than the images
            continue
        if answer and outcome["model"] != answer["model"]:
            raise ServiceError(f"{target} changed its ensemble between two images: ask again")
        pairs = zip(asked, outcome.pop("predictions"), strict=True)
        predictions += [{"image": str(image), **prediction} for image, prediction in pairs]
        answer = outcome
    named = [{"image": str(image), "error": str(error)} for image, error in errors]
    if not answer:
        raise ShapeError(f"{named[0]['image']}: {named[0]['error']}") from errors[0][1]
    return {**answer, "predictions": predictions, "errors": named}


def as_lines(answer: dict[str, Any], width: int | None = None) -> list[str]:
    """Return an answer of :func:`predict_files` as aligned lines, one an image, below one with :data:`COLUMNS`.

    Args:
        answer: the predictions.
        width: of the terminal, at which long paths lose their beginning and long classes their end; ``None`` keeps
            everything whole.
    """
    from rich.cells import cell_len

    rows = [[printable(text) for text in _row(one)] for one in answer["predictions"]]
    widths = [max(cell_len(row[column]) for row in [list(COLUMNS), *rows]) for column in range(len(COLUMNS))]
    if width is not None:
        room = max(16, width - sum(widths[2:]) - 2 * (len(COLUMNS) - 1))  # of path and class
        widths[1] = min(widths[1], max(room // 2, room - widths[0]))
        widths[0] = min(widths[0], room - widths[1])
    lines = []
    for row in [list(COLUMNS), *rows]:
        texts = [_shortened(row[0], widths[0], end=True), _shortened(row[1], widths[1]), *row[2:]]
        blanks = [" " * (size - cell_len(text)) for text, size in zip(texts, widths, strict=True)]
        image, label, probability, uncertainty, abstains = zip(texts, blanks, strict=True)
        cells = ["".join(image), "".join(label), "".join(probability[::-1]), "".join(uncertainty[::-1]), abstains[0]]
        lines.append("  ".join(cells))
    return lines


def as_csv(answer: dict[str, Any]) -> str:
    """Return an answer of :func:`predict_files` as CSV, a row an image; at its end, the images without an answer."""
    import csv
    import io

    more = ("mutual_information", "disagreement", "members_used", "prediction_set")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *more, "error"])
    for one in answer["predictions"]:
        whole = [one["image"], one["label"], one["probabilities"][one["class"]], one["predictive_entropy"]]
        values = [one.get(name) for name in more]
        texts = [json.dumps(each) if isinstance(each, list) else each for each in values]
        writer.writerow([*whole, _abstains(one), *texts, None])
    for one in answer["errors"]:
        writer.writerow([one["image"], *[None] * (len(COLUMNS) - 1 + len(more)), one["error"]])
    return text.getvalue()


def as_json_lines(answer: dict[str, Any]) -> str:
    """Return an answer of :func:`predict_files` as JSON, a line an image; at its end, those without an answer."""
    return "".join(f"{json.dumps(one)}\n" for one in (*answer["predictions"], *answer["errors"]))


def _row(one: dict[str, Any]) -> list[str]:
    figures = f"{one['probabilities'][one['class']]:.3f}", f"{one['predictive_entropy']:.3f}"
    return [one["image"], one["label"], *figures, _abstains(one) or "-"]


def _abstains(one: dict[str, Any]) -> str | None:
    """Whether the ensemble abstains, in a word; ``None`` where it has no threshold to."""
    return None if one.get("abstain") is None else "yes" if one["abstain"] else "no"


def _shortened(text: str, width: int, *, end: bool = False) -> str:
    """Return a text of at most so many columns, which keeps its beginning, or its end."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    while cell_len(text) > width - 1:
        text = text[1:] if end else text[:-1]
    return f"…{text}" if end else f"{text}…"


def _from_bundle(bundle: str, images: Sequence[Path], chosen: dict[str, Any]) -> Iterator[_Outcome]:
    import numpy as np

    from ensembler.serve.http import answers
    from ensembler.serve.http.options import Options
    from ensembler.serve.http.readers import image_from_file
    from ensembler.serve.runtime.runtime import Runtime

    if not Path(bundle).is_dir():
        looks = ": an address begins with http:// or https://" if ":" in bundle else ""
        raise ArtefactError(f"no bundle at {bundle}{looks or ': export a run first, or give the address of a service'}")
    runtime = Runtime.load(bundle)
    try:
        options = Options.read(chosen).resolve(runtime.members, runtime.calibration)
        for start in range(0, len(images), _BATCH):
            decoded = {}
            for image in images[start : start + _BATCH]:
                try:
                    decoded[image] = image_from_file(_bytes(image), runtime.manifest.image_shape)
                except ShapeError as error:
                    yield [image], error
            if decoded:
                batch = np.stack(list(decoded.values()))
                prediction = runtime.predict(batch, options.mode, members=options.members, level=options.level)
                columns = answers.with_outputs(answers.as_columns(prediction), options, runtime)
                yield list(decoded), answers.content(columns, options, runtime)
    finally:
        runtime.close()


def _from_service(url: str, images: Sequence[Path], chosen: dict[str, Any], token: str | None) -> Iterator[_Outcome]:
    import httpx

    if token and not all("!" <= character <= "~" for character in token):
        raise UsageError("the token must consist of visible ASCII characters: a header carries no others")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with httpx.Client(headers=headers, params=chosen, timeout=_TIMEOUT) as client:
        for batch in _batches(images):
            if isinstance(batch, tuple):
                yield batch
            else:
                yield from _ask(client, url, batch)


def _batches(images: Sequence[Path]) -> Iterator[list[tuple[Path, bytes]] | _Outcome]:
    """Files and their contents, as many as go into one request; a file that cannot be read is an outcome."""
    batch: list[tuple[Path, bytes]] = []
    size = 0
    for image in images:
        try:
            content = _bytes(image)
        except ShapeError as error:
            yield [image], error
            continue
        if batch and (len(batch) == _BATCH or size + len(content) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append((image, content))
        size += len(content)
    if batch:
        yield batch


def _ask(client: httpx.Client, url: str, batch: list[tuple[Path, bytes]]) -> Iterator[_Outcome]:
    """The answers to a batch; one that is refused is halved, which finds the image that is wrong, or a batch small
    enough for this service."""
    response = _send(client, url, [content for _, content in batch])
    if len(batch) > 1 and response.status_code in (400, 413, 415):
        middle = len(batch) // 2
        yield from _ask(client, url, batch[:middle])
        yield from _ask(client, url, batch[middle:])
        return
    images = [image for image, _ in batch]
    try:
        yield images, _read(response, url, images)
    except ShapeError as error:
        if len(images) > 1:
            raise
        yield images, error


def _send(client: httpx.Client, url: str, contents: list[bytes]) -> httpx.Response:
    """The response to one request, sent again while the service is busy.

    Raises:
        ServiceError: no service answers, or not in time, or it refuses the token.
    """
    import httpx

    body: dict[str, Any] = {"files": [("images", ("image", content)) for content in contents]}
    if len(contents) == 1:
        body = {"content": contents[0], "headers": {"Content-Type": "image/*"}}  # whatever it holds
    for tries in range(1, _TRIES + 1):
        try:
            response = client.post(url.rstrip("/") + PREDICT, **body)
        except httpx.TimeoutException as error:
            raise ServiceError(f"{url} did not answer within {_TIMEOUT:.0f} s: ask again later") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServiceError(
                f"no service answers at {url} ({error or type(error).__name__}): check the address, or start one with "
                "ensembler serve BUNDLE"
            ) from error
        if response.status_code == 401:
            raise ServiceError(
                f"{url} refuses the token given"
                if "authorization" in client.headers
                else f"{url} needs a token: give it as ENSEMBLER_TOKEN, or with --token"
            )
        if response.status_code != 503:
            return response
        if tries < _TRIES:
            time.sleep(_retry_after(response))
    raise ServiceError(f"{url} is too busy ({_TRIES} tries): ask again later")


def _retry_after(response: httpx.Response) -> float:
    """Seconds until another try, as the service asks."""
    text = response.headers.get("Retry-After", "")
    return min(_LONGEST_WAIT, float(text)) if text.isascii() and text.isdecimal() else 1.0


def _read(response: httpx.Response, url: str, images: list[Path]) -> dict[str, Any]:
    """A response's content.

    Raises:
        ServiceError: it is not an answer of ensembler's, or the service failed.
        ShapeError: the service refused the image or the options.
    """
    try:
        content = response.json()
        if response.is_success and isinstance(content["model"], dict) and len(content["predictions"]) == len(images):
            return dict(content)
        sentence = str(content["error"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"what answers at {url} (status {response.status_code}) is no ensembler service: check the address"
        ) from error
    if response.status_code == 404:
        raise ServiceError(f"{url} has no {PREDICT}: give the service's own address, without a path")
    if response.status_code >= 500:
        raise ServiceError(f"{images[0]}{' and others' * (len(images) > 1)}: {sentence}")
    raise ShapeError(sentence)


def _bytes(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise ShapeError(f"cannot read the file: {error.strerror or error}") from error
