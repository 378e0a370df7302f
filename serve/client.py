"""``ensembler predict``: asks a bundle, or a service at an address, about image files. No torch."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.errors import ArtefactError, EnsemblerError, ShapeError, UsageError
from ensembler.serve.http.routes import PREDICT
from ensembler.storage import as_paths
from ensembler.text import cell

if TYPE_CHECKING:
    import httpx
    from rich.table import Table

__all__ = ["ServiceError", "find_images", "is_url", "predict_files", "table_of"]

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
    from ensembler import folders

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


def table_of(answer: dict[str, Any]) -> Table:
    """Return an answer of :func:`predict_files` as a table with a row for each image; empty columns are left out."""
    from rich.table import Table

    columns: dict[str, Callable[[dict[str, Any]], str | None]] = {
        "image": lambda one: one["image"],
        "class": lambda one: one["label"],
        "prob.": lambda one: f"{one['probabilities'][one['class']]:.3f}",
        "entropy": lambda one: f"{one['predictive_entropy']:.3f}",
        "mutual": lambda one: _figure(one["mutual_information"]),
        "disagr.": lambda one: _figure(one["disagreement"]),
        "members": lambda one: f"{one['members_used']} of {answer['model']['members']}",
        "set": lambda one: ", ".join(one["prediction_set"]) or "none" if "prediction_set" in one else None,
        "answers": lambda one: ("no" if one["abstain"] else "yes") if "abstain" in one else None,
    }
    rows = [[value(one) for value in columns.values()] for one in answer["predictions"]]
    filled = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    words = {"image", "class", "set", "answers"}
    for place, name in enumerate(columns):
        if place in filled:
            figures = name not in words
            table.add_column(name, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for row in rows:
        table.add_row(*(cell(row[place] or "") for place in filled))
    return table


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


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
