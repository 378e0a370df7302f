"""The service's routes. Standard library only."""

from __future__ import annotations

__all__ = [
    "DOCS",
    "EXAMPLES",
    "METADATA",
    "METRICS",
    "PAGE",
    "PREDICT",
    "PROBES",
    "PUBLIC",
    "ROUTES",
    "SCHEMA",
    "reads_a_body",
]

PREDICT = "/predictive-uncertainty"
PAGE = "/ui"
EXAMPLES = "/examples"
METADATA = "/metadata"
DOCS = "/docs.json"
METRICS = "/metrics"
SCHEMA = "/schema.json"  # BentoML's

PROBES = ("/livez", "/healthz", "/readyz")
PUBLIC = (*PROBES, "/", PAGE)
"""Routes that need no token: health checks, and the page, which contains nothing of the bundle."""

ROUTES = (PREDICT, *PUBLIC, EXAMPLES, METADATA, DOCS, METRICS, SCHEMA)
"""All routes."""


def reads_a_body(path: str) -> bool:
    """Whether the route at a path reads request bodies."""
    return path == PREDICT
