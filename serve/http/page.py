"""The page at ``/ui``: one file, ``page.html``, whose script asks the service's routes.

The page contains nothing of the bundle and needs no token; what it shows, it fetches like any caller. Its
Content-Security-Policy allows only its own script and style, by their hashes, and no other address.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ensembler.errors import CorruptError
from ensembler.serve.runtime.arrays import read_array, read_arrays
from ensembler.serve.runtime.manifest import EXAMPLES, PROBE, BundleManifest

__all__ = ["examples", "headers", "html"]


@cache
def html() -> str:
    """Return the page."""
    return files("ensembler.serve.http").joinpath("page.html").read_text(encoding="utf-8")


@cache
def headers() -> dict[str, str]:
    """Return the page's response headers."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # the script never makes HTML of text
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def examples(bundle: Path, manifest: BundleManifest) -> dict[str, Any]:
    """Return images to try: the bundle's test images, if it has any, and a random pattern of its probe.

    Args:
        bundle: its folder, verified.
        manifest: its manifest.

    Returns:
        ``{"examples": [{"name": ..., "pixels": ...}, ...]}``, pixels being the base64 of (H, W, 3) bytes.

    Raises:
        CorruptError: their file is not the one of the bundle's seal.
    """
    found: list[dict[str, str]] = []
    try:
        if EXAMPLES in manifest.files:
            file = _sealed(bundle, manifest, EXAMPLES)
            images = read_array(file, len(file.getbuffer()))
            found += [_example(f"test image {number}", image) for number, image in enumerate(images, start=1)]
        _sealed(bundle, manifest, PROBE)
        found.append(_example("a random pattern, of no class", read_arrays(bundle / PROBE)["images"][0]))
    except (OSError, ValueError, KeyError, IndexError):
        pass  # the page does without them
    return {"examples": found}


def _sealed(bundle: Path, manifest: BundleManifest, name: str) -> io.BytesIO:
    """The content of a bundle's file, which is what its manifest seals: nothing else is shown."""
    try:
        content = (bundle / name).read_bytes()
    except OSError as error:
        raise CorruptError(f"cannot read {name} of the bundle: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != manifest.files[name]:
        raise CorruptError(f"{name} of the bundle has changed: put the original back, or export it again")
    return io.BytesIO(content)


def _example(name: str, image: np.ndarray[Any, np.dtype[Any]]) -> dict[str, str]:
    return {"name": name, "pixels": base64.b64encode(image.astype(np.uint8).tobytes()).decode()}


def _hashes(tag: str) -> str:
    parts = re.findall(rf"<{tag}>(.*?)</{tag}>", html(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)
