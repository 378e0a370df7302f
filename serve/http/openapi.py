"""The service's description of itself at ``/docs.json``, in OpenAPI 3.0."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

from ensembler.serve.http.gate import BINARY, IMAGE, JSON
from ensembler.serve.http.options import OUTPUTS
from ensembler.serve.http.schemas import Answer
from ensembler.serve.runtime.early_exit import LEVEL, Mode
from ensembler.serve.runtime.manifest import BundleManifest

__all__ = ["document"]

_ERRORS = {
    "400": "The request cannot be honoured; the sentence says why, and how to mend it.",
    "401": "The token is missing or another.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is of a kind that this route does not read.",
    "503": "Too much is waiting: ask again after `Retry-After` seconds.",
    "504": "The deadline passed before the answer was ready.",
}


def document(manifest: BundleManifest, token: bool) -> dict[str, Any]:
    """The document.

    Args:
        manifest: the bundle's, whose shapes and classes it names.
        token: whether callers need one.
    """
    height, width, channels = manifest.image_shape
    bodies: dict[str, dict[str, Any]] = {
        JSON: {"application/json": {"schema": _batch(height, width, channels)}},
        BINARY: {
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
        IMAGE: {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"images": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
    descriptions = {
        JSON: f"Predict images of {height} x {width} pixels, sent as JSON.",
        BINARY: "Predict the images of a `.npy` file of whole numbers from 0 to 255, (batch, "
        f"{height}, {width}, {channels}), or of raw bytes whose shape `X-Shape` gives.",
        IMAGE: "Predict a PNG or JPEG file, or several as a form. They are decoded as in training: to RGB, by a "
        f"bilinear resize to {height} x {width}; grey becomes RGB, transparency, CMYK and 16-bit grey are refused.",
    }
    paths: dict[str, Any] = {
        path: {"post": _operation(descriptions[path], bodies[path], _parameters(path))} for path in bodies
    }
    paths["/metadata"] = {"get": {"summary": "The model card, and this server's limits.", "responses": _ok("object")}}
    for probe, what in (("/livez", "is alive"), ("/healthz", "is alive"), ("/readyz", "has run every member once")):
        paths[probe] = {
            "get": {"summary": f"200 where the server {what}.", "responses": {"200": {"description": "yes"}}}
        }
    paths["/metrics"] = {"get": {"summary": "Metrics for Prometheus.", "responses": {"200": {"description": "text"}}}}
    schemas = Answer.model_json_schema(ref_template="#/components/schemas/{model}")
    components: dict[str, Any] = {
        "schemas": {
            **schemas.pop("$defs"),
            "Answer": schemas,
            "Error": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
        }
    }
    result: dict[str, Any] = {
        "openapi": "3.0.3",
        "info": {
            "title": f"{manifest.method} of {manifest.members} x {manifest.architecture}, {manifest.dataset}",
            "description": "Predicts images with an ensemble, and says how sure it is of each.",
            "version": _version(),
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": components,
    }
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"token": []}]
    return result


def _batch(height: int, width: int, channels: int) -> dict[str, Any]:
    pixel = {"type": "integer", "minimum": 0, "maximum": 255}
    nested: dict[str, Any] = pixel
    for size in (channels, width, height):
        nested = {"type": "array", "minItems": size, "maxItems": size, "items": nested}
    return {
        "type": "object",
        "required": ["images"],
        "additionalProperties": False,
        "properties": {
            "images": {"type": "array", "minItems": 1, "items": nested},
            **{name: schema | {"nullable": True} for name, schema in _options().items()},
        },
    }


def _options() -> dict[str, dict[str, Any]]:
    share = {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": True}
    return {
        "outputs": {"type": "array", "minItems": 1, "items": {"type": "string", "enum": list(OUTPUTS)}},
        "mode": {"type": "string", "enum": list(get_args(Mode)), "default": "full"},
        "members": {"type": "integer", "minimum": 1, "description": "ask no more than these first ones"},
        "level": share | {"default": LEVEL, "description": "of the mode confidence"},
        "alpha": share | {"description": "1 - alpha is the coverage that prediction_set promises"},
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    headers = {"X-Deadline-Ms": {"type": "integer", "minimum": 0, "description": "how long the caller will wait"}}
    if path == BINARY:
        headers["X-Shape"] = {"type": "string", "description": "of raw bytes, such as 2,32,32,3"}
    parameters = [{"name": name, "in": "header", "required": False, "schema": of} for name, of in headers.items()]
    if path != JSON:
        parameters += [
            {"name": name, "in": "query", "required": False, "style": "form", "explode": False, "schema": schema}
            for name, schema in _options().items()
        ]
    return parameters


def _operation(summary: str, body: dict[str, Any], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    content = {
        "application/json": {"schema": {"$ref": "#/components/schemas/Answer"}},
        "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
    }
    headers = {
        "X-Batch-Size": {"schema": {"type": "integer"}, "description": "images of the forward pass, others' too"},
        "Server-Timing": {"schema": {"type": "string"}, "description": "milliseconds of each stage"},
    }
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": summary,
        "parameters": parameters,
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": "A prediction for each image.", "headers": headers, "content": content},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }


def _ok(kind: str) -> dict[str, Any]:
    return {"200": {"description": "OK", "content": {"application/json": {"schema": {"type": kind}}}}}


def _version() -> str:
    try:
        return version("ensembler")
    except PackageNotFoundError:
        return "unknown"
