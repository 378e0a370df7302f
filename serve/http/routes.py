"""The service's routes. Standard library only."""

from __future__ import annotations

import json
import re

__all__ = [
    "ALIVE",
    "DOCS",
    "EXAMPLES",
    "METADATA",
    "METRICS",
    "PAGE",
    "PREDICT",
    "PROBES",
    "PUBLIC",
    "READY",
    "SCHEMA",
    "V2",
    "V2_INFER",
    "V2_MODEL",
    "V2_READY",
    "V2_VERSION",
    "answer_of_probe",
    "reads_a_body",
    "route_of",
]

PREDICT = "/predictive-uncertainty"
PAGE = "/ui"
EXAMPLES = "/examples"
METADATA = "/metadata"
DOCS = "/docs.json"
METRICS = "/metrics"
SCHEMA = "/schema.json"  # BentoML's

V2 = "/v2"
V2_MODEL = "/v2/models/{name}"
V2_READY = f"{V2_MODEL}/ready"
V2_INFER = f"{V2_MODEL}/infer"
V2_VERSION = "/versions/1"
"""What may follow the name in the three: the version that the model says it has."""

ALIVE = ("/livez", "/healthz", "/v2/health/live")
READY = ("/readyz", "/v2/health/ready")
PROBES = (*ALIVE, *READY)
PUBLIC = (*PROBES, "/", PAGE)
"""Routes that need no token: health checks, and the page, which contains nothing of the bundle."""

_FIXED = (PREDICT, *PUBLIC, EXAMPLES, METADATA, DOCS, METRICS, SCHEMA, V2)
_OF_A_MODEL = {
    route: re.compile(route.replace("{name}", f"[^/]+({V2_VERSION})?")) for route in (V2_MODEL, V2_READY, V2_INFER)
}


def answer_of_probe(path: str, healthy: bool) -> tuple[bytes, str]:
    """Return what a health check answers, and its media type; KServe's protocol wants JSON."""
    if not path.startswith(V2):
        return b"\n", "text/plain"
    return json.dumps({"ready" if path in READY else "live": healthy}).encode(), "application/json"


def reads_a_body(path: str) -> bool:
    """Whether the route at a path reads request bodies."""
    return route_of(path) in (PREDICT, V2_INFER)


def route_of(path: str) -> str | None:
    """Return the route of a path; ``None`` where there is none."""
    if path in _FIXED:
        return path
    return next((route for route, pattern in _OF_A_MODEL.items() if pattern.fullmatch(path)), None)
