"""The service's description of itself at ``/docs.json``, in OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from ensembler import __version__
from ensembler.serve.http.options import Options
from ensembler.serve.http.routes import BINARY, IMAGE, JSON
from ensembler.serve.http.schemas import Answer
from ensembler.serve.runtime.manifest import BundleManifest

__all__ = ["document"]

_ERRORS = {
    "400": "The images or options cannot be honoured; the sentence says why, and what to do.",
    "401": "The token is missing or wrong.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "This route does not read bodies of this type.",
    "503": "Too much is waiting: try again after `Retry-After` seconds.",
    "504": "The deadline passed before the answer was ready.",
}

Schema = dict[str, Any]


def document(manifest: BundleManifest, token: bool) -> Schema:
    """Return the document.

    Args:
        manifest: the bundle's, whose shapes and classes it names.
        token: whether callers need one.
    """
    height, width, channels = manifest.image_shape
    form = {"images": {"type": "array", "minItems": 1, "items": {"contentMediaType": "application/octet-stream"}}}
    bodies: dict[str, Schema] = {
        JSON: {"application/json": {"schema": _batch(manifest.image_shape)}},
        BINARY: {"application/x-npy": {}, "application/octet-stream": {}},
        IMAGE: {
            "image/png": {},
            "image/jpeg": {},
            "multipart/form-data": {"schema": {"type": "object", "properties": form}},
        },
    }
    summaries = {
        JSON: f"Predict images of {height} x {width} pixels, sent as JSON.",
        BINARY: "Predict the images of a `.npy` file of whole numbers from 0 to 255, (batch, "
        f"{height}, {width}, {channels}), or of raw bytes whose shape `X-Shape` gives.",
        IMAGE: "Predict an image file (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF), or several as a form. They are "
        "decoded as in training: turned as their EXIF data say, transparent parts on white, 16 bits brought to 8, and "
        f"resized bilinearly to {height} x {width}.",
    }
    answer = Answer.model_json_schema(ref_template="#/components/schemas/{model}")
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    components: Schema = {"schemas": {**answer.pop("$defs"), "Answer": answer, "Error": error}}
    result: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": f"{manifest.method} of {manifest.members} x {manifest.architecture}, {manifest.dataset}",
            "description": "Predicts images with an ensemble, with the uncertainty of each prediction.",
            "version": __version__,
        },
        "servers": [{"url": "."}],
        "paths": {
            **{path: {"post": _prediction(summaries[path], body, _parameters(path))} for path, body in bodies.items()},
            "/metadata": _get("The bundle's manifest, and this server's limits.", "application/json"),
            "/livez": _get("200 while the server runs.", "text/plain"),
            "/healthz": _get("200 while the server runs.", "text/plain"),
            "/readyz": _get("200 once every member has run.", "text/plain"),
            "/metrics": _get("Metrics for Prometheus.", "text/plain"),
        },
        "components": components,
    }
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"token": []}]
    return result


def _batch(image_shape: list[int]) -> Schema:
    nested: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
    for size in reversed(image_shape):
        nested = {"type": "array", "minItems": size, "maxItems": size, "items": nested}
    options = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in Options.schemas().items()}
    return {
        "type": "object",
        "required": ["images"],
        "additionalProperties": False,
        "properties": {"images": {"type": "array", "minItems": 1, "items": nested}, **options},
    }


def _parameters(path: str) -> list[Schema]:
    parameters: list[Schema] = [
        {
            "name": "X-Deadline-Ms",
            "in": "header",
            "schema": {"type": "integer", "minimum": 0},
            "description": "How long the caller will wait.",
        }
    ]
    if path == BINARY:
        shape = "Shape of raw bytes, such as 2,32,32,3."
        parameters.append({"name": "X-Shape", "in": "header", "schema": {"type": "string"}, "description": shape})
    if path != JSON:
        parameters += [
            {"name": name, "in": "query", "style": "form", "explode": False, "schema": schema}
            for name, schema in Options.schemas().items()
        ]
    return parameters


def _prediction(summary: str, body: Schema, parameters: list[Schema]) -> Schema:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}, "application/x-npy": {}}
    headers = {
        "X-Batch-Size": {"schema": {"type": "integer"}, "description": "Images of the forward pass, others' included."},
        "Server-Timing": {"schema": {"type": "string"}, "description": "Milliseconds of each stage."},
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


def _get(summary: str, media_type: str) -> Schema:
    return {"get": {"summary": summary, "responses": {"200": {"description": "OK", "content": {media_type: {}}}}}}
