"""What a bundle, or a service at an address, says of image files: behind ``ensembler predict``. No torch."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensembler.errors import ArtefactError, EnsemblerError, ShapeError, UsageError

if TYPE_CHECKING:
    import httpx
    from rich.table import Table

__all__ = ["SUFFIXES", "ServiceError", "find_images", "is_url", "predict_files", "table_of"]

SUFFIXES = (".png", ".jpg", ".jpeg")
"""Of the files that are taken from a folder."""

_TRIES = 5  # of one image that a busy service puts off
_MOST_WAIT = 30.0  # seconds between two of them
_TIMEOUT = 60.0  # seconds for one answer


class ServiceError(EnsemblerError):
    """A service that cannot be reached, is none of ours, or does not answer."""


def is_url(target: str) -> bool:
    """Whether a target is a service's address rather than a bundle's folder."""
    return target.lower().startswith(("http://", "https://"))


def find_images(given: Sequence[str]) -> list[Path]:
    """Image files, in order, each once.

    Args:
        given: files; folders, which give all their PNG and JPEG files, also those deeper; patterns such as ``*.png``.

    Raises:
        UsageError: nothing there, or a folder or pattern without an image.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        elif glob.has_magic(name):
            files = [Path(file) for file in sorted(glob.glob(name, recursive=True)) if Path(file).is_file()]  # noqa: PTH207  pathlib's cannot be absolute
        else:
            raise UsageError(f"no image at {name}: give PNG or JPEG files, folders of them, or patterns")
        if not files:
            raise UsageError(f"{name} holds no image: give PNG or JPEG files, folders of them, or patterns")
        found += files
    if not found:
        raise UsageError("no image was given: give PNG or JPEG files, folders of them, or patterns")
    return list(dict.fromkeys(found))


def predict_files(
    target: str,
    images: Sequence[Path],
    *,
    mode: str = "full",
    members: int | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """What an ensemble says of image files: the service's own answer, from it or from a bundle on this machine.

    Args:
        target: a bundle's folder, or a service's address such as ``http://localhost:3000``.
        images: PNG or JPEG files.
        mode, members: see :class:`ensembler.serve.http.options.Options`.
        token: what the service wants; of no meaning for a bundle.

    Returns:
        :class:`ensembler.serve.runtime.manifest.Answer` as a dictionary, each prediction with its file as ``"image"``.

    Raises:
        ServiceError: nobody answers at the address, somebody else does, or the token is not the one.
        ShapeError: a file that is no image; it is named.
        UsageError: a mode or a number of members that cannot be had, or an unreadable file.
        ArtefactError: no bundle there; CorruptError: it has changed.
    """
    chosen = {"mode": mode} | ({} if members is None else {"members": members})
    answers = _from_service(target, images, chosen, token) if is_url(target) else _from_bundle(target, images, chosen)
    whole: dict[str, Any] = {}
    predictions = []
    for image, answer in zip(images, answers, strict=True):
        predictions += [{"image": str(image), **prediction} for prediction in answer.pop("predictions")]
        if whole and answer["model"] != whole["model"]:
            raise ServiceError(f"{target} changed its ensemble between two images: ask again")
        whole = answer
    return {**whole, "predictions": predictions}


def table_of(answer: dict[str, Any]) -> Table:
    """What :func:`predict_files` returned, a row for each image; columns that say nothing are left out."""
    from rich.table import Table
    from rich.text import Text

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
    said = [place for place in range(len(columns)) if any(row[place] is not None for row in rows)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    words = {"image", "class", "set", "answers"}
    for place, name in enumerate(columns):
        if place in said:
            figures = name not in words
            table.add_column(name, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for row in rows:
        table.add_row(*(Text(row[place] or "") for place in said))
    return table


def _figure(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _from_bundle(bundle: str, images: Sequence[Path], chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from ensembler.serve.http import answers
    from ensembler.serve.http.options import read_options
    from ensembler.serve.http.readers import image_from_file
    from ensembler.serve.runtime.runtime import Runtime

    if not Path(bundle).is_dir():
        looks = ": an address begins with http:// or https://" if ":" in bundle else ""
        raise ArtefactError(f"no bundle at {bundle}{looks or ': export a run first, or give the address of a service'}")
    runtime = Runtime.load(bundle)
    try:
        options = read_options(chosen, runtime.members, runtime.calibration)
        for image in images:
            with _named(image):
                picture = image_from_file(_bytes(image), runtime.manifest.image_shape)
            prediction = runtime.predict(picture[None], options.mode, members=options.members, level=options.level)
            columns = answers.with_outputs(answers.as_columns(prediction), options, runtime)
            yield answers.content(columns, options, runtime)
    finally:
        runtime.close()


def _from_service(
    url: str, images: Sequence[Path], chosen: dict[str, Any], token: str | None
) -> Iterator[dict[str, Any]]:
    import httpx

    from ensembler.serve.http.gate import IMAGE

    if token and not all("!" <= character <= "~" for character in token):
        raise UsageError("the token must consist of visible ASCII characters: a header carries no others")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = url.rstrip("/") + IMAGE
    with httpx.Client(headers=headers, timeout=_TIMEOUT) as client:
        for image in images:
            response = _sent(client, url, image, address, chosen, token)
            yield _read(response, url, image)


def _sent(
    client: httpx.Client, url: str, image: Path, address: str, chosen: dict[str, Any], token: str | None
) -> httpx.Response:
    """The response to an image, sent again as late as a busy service wants it.

    Raises:
        ServiceError: nobody answers, or not within reason, or the token is not the one.
    """
    import httpx

    content, kind = _bytes(image), {"Content-Type": "application/octet-stream"}
    for tries in range(1, _TRIES + 1):
        try:
            response = client.post(address, params=chosen, content=content, headers=kind)
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
                if token
                else f"{url} wants a token: give it as ENSEMBLER_TOKEN, or with --token"
            )
        if response.status_code != 503:
            return response
        if tries < _TRIES:
            time.sleep(_patience(response))
    raise ServiceError(f"{url} is too busy ({_TRIES} tries): ask again later")


def _patience(response: httpx.Response) -> float:
    """Seconds until another try, as the service would have it."""
    text = response.headers.get("Retry-After", "")
    return min(_MOST_WAIT, float(text)) if text.isascii() and text.isdecimal() else 1.0


def _read(response: httpx.Response, url: str, image: Path) -> dict[str, Any]:
    """A response's content.

    Raises:
        ServiceError: none of ours answered, or it failed.
        ShapeError, UsageError: it refused the image, or what was asked.
    """
    try:
        content = response.json()
        if response.is_success and isinstance(content["predictions"], list) and isinstance(content["model"], dict):
            return dict(content)
        sentence = str(content["error"])
    except (ValueError, KeyError, TypeError) as error:
        raise ServiceError(
            f"what answers at {url} (status {response.status_code}) is no ensembler service: check the address"
        ) from error
    if response.status_code == 404:
        raise ServiceError(f"{url} has no route for images: give the service's own address, without a path")
    kind = ServiceError if response.status_code >= 500 else ShapeError
    raise kind(f"{image}: {sentence}")


def _bytes(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {image}: {error.strerror or error}") from error


@contextmanager
def _named(image: Path) -> Iterator[None]:
    """Say of which file an error is."""
    try:
        yield
    except ShapeError as error:
        raise ShapeError(f"{image}: {error}") from error
