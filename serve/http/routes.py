"""The service's routes, and the kinds of bodies that they read. Standard library only."""

from __future__ import annotations

__all__ = ["BINARY", "EXAMPLES", "IMAGE", "JSON", "KINDS", "METRICS", "PAGE", "PROBES", "PUBLIC"]

JSON = "/predictive-uncertainty"
BINARY = "/predictive-uncertainty/binary"
IMAGE = "/predictive-uncertainty/image"
PAGE = "/ui"
EXAMPLES = "/examples"
METRICS = "/metrics"

KINDS = {
    # The second and third are what curl and others call a body whose type nobody gave.
    JSON: ("application/json", "application/x-www-form-urlencoded", "text/plain"),
    BINARY: ("application/octet-stream", "application/x-npy", "application/x-www-form-urlencoded"),
    IMAGE: ("image/png", "image/jpeg", "multipart/form-data", "application/octet-stream"),
}
"""Media types that each prediction route reads; a body without a type is read, too."""

PROBES = ("/livez", "/healthz", "/readyz")
PUBLIC = (*PROBES, "/", PAGE)
"""Routes that need no token: health checks, and the page, which contains nothing of the bundle."""
