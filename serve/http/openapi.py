"""The service's description of itself at ``/docs.json``, in OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from ensembler import __version__
from ensembler.serve.http.kserve import HEAD_LENGTH, INTEGERS
from ensembler.serve.http.options import OUTPUTS, Options
from ensembler.serve.http.routes import (
    ALIVE,
    DOCS,
    EXAMPLES,
    METADATA,
    METRICS,
    PAGE,
    PREDICT,
    PUBLIC,
    READY,
    V2,
    V2_INFER,
    V2_MODEL,
    V2_READY,
)
from ensembler.serve.http.schemas import Answer
from ensembler.serve.runtime.manifest import BundleManifest

__all__ = ["document"]

Schema = dict[str, Any]

_PREDICTION_ERRORS = {
    "400": "The images or options cannot be honoured; the sentence says why, and what to do.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "Bodies of this type are not read.",
    "503": "Too much is waiting: try again after `Retry-After` seconds.",
    "504": "The deadline passed before the answer was ready.",
}
_ERRORS = {
    "405": "Not with this method: `Allow` says with which.",
    "431": "The head of the request is too large.",
    "500": "The server failed; its log says why.",
}
_UNAUTHORISED = {"401": "The token is missing or wrong."}
_OPEN: list[Schema] = []  # no security scheme

_PIXELS = {
    "application/x-npy": {"contentMediaType": "application/x-npy"},
    "application/octet-stream": {"contentMediaType": "application/octet-stream"},
    "image/*": {"contentMediaType": "image/*"},
}
_BASE64: Schema = {
    "type": "string",
    "contentEncoding": "base64",
    "minLength": 4,
    "description": "An image file in base64; whitespace, a missing padding, the URL-safe alphabet and a data URL, too.",
}


def document(manifest: BundleManifest, token: bool) -> Schema:
    """Return the document.

    Args:
        manifest: the bundle's, whose shapes and classes it names.
        token: whether callers need one.
    """
    answer = Answer.model_json_schema(ref_template="#/components/schemas/{model}")
    error = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
    components: Schema = {"schemas": {**answer.pop("$defs"), "Answer": answer, "Error": error}}
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    probe = "200 while the server runs."
    paths: dict[str, Schema] = {
        PREDICT: {"post": _prediction(manifest)},
        METADATA: {"get": _get("The bundle's manifest, and this server's limits.", "application/json")},
        DOCS: {"get": _get("This description.", "application/json")},
        EXAMPLES: {"get": _get("Images to try, for the page.", "application/json")},
        METRICS: {"get": _get("Metrics for Prometheus.", "text/plain")},
        PAGE: {"get": _get("A page to try images on.", "text/html")},
        **{path: {"get": _get(probe, _kind_of(path))} for path in ALIVE},
        **{path: {"get": _ready(_kind_of(path))} for path in READY},
        V2: {"get": _get("This server, in KServe's Open Inference Protocol.", "application/json")},
        V2_MODEL: {"get": _get("The model's inputs and outputs, in the same.", "application/json")},
        V2_READY: {"get": _ready("application/json")},
        V2_INFER: {"post": _inference()},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": [manifest.run.name]}}
    for path in (V2_MODEL, V2_READY, V2_INFER):
        for operation in paths[path].values():
            operation["parameters"] = [name, *operation.get("parameters", [])]
            operation["responses"]["404"] = _error("This server has another model.")
    for path, operations in paths.items():
        for operation in operations.values():
            _secure(operation, token and path not in PUBLIC)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{manifest.method} of {manifest.members} x {manifest.architecture}, {manifest.dataset}",
            "description": "Predicts images with an ensemble, with the uncertainty of each prediction.",
            "version": __version__,
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": components,
    }


def _secure(operation: Schema, token: bool) -> None:
    """Add what every operation may answer, and whether it needs the token."""
    operation["security"] = [{"token": []}] if token else _OPEN
    for status, text in (_ERRORS | (_UNAUTHORISED if token else {})).items():
        operation["responses"][status] = _error(text)


def _error(text: str) -> Schema:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}


def _question(image_shape: list[int]) -> Schema:
    """The schema of a JSON body."""
    pixels: Schema = {"type": "integer", "minimum": 0, "maximum": 255}
    for size in reversed(image_shape):
        pixels = {"type": "array", "minItems": size, "maxItems": size, "items": pixels}
    named = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": _BASE64}
    images = {
        "oneOf": [
            {"type": "array", "minItems": 1, "items": pixels},
            {"type": "array", "minItems": 1, "items": {"oneOf": [_BASE64, named]}},
        ],
        "description": 'All as rows of pixels, or all as image files in base64, such as {"b64": ...}.',
    }
    options = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in Options.schemas().items()}
    parameters = {"type": ["object", "null"], "additionalProperties": False, "properties": options}
    return {
        "type": "object",
        "oneOf": [{"required": ["images"]}, {"required": ["instances"]}],
        "additionalProperties": False,
        "properties": {
            "images": images,
            "instances": images | {"description": "Another name of images, with the options in parameters."},
            "parameters": parameters | {"description": "The options, where they are not beside the images."},
            **options,
        },
    }


def _parameters() -> list[Schema]:
    headers = {
        "X-Deadline-Ms": ({"type": "integer", "minimum": 0}, "How long the caller will wait."),
        "X-Shape": ({"type": "string"}, "Shape of raw bytes, such as 2,32,32,3."),
    }
    return [
        *(
            {"name": name, "in": "header", "schema": schema, "description": text}
            for name, (schema, text) in headers.items()
        ),
        *(
            {"name": name, "in": "query", "style": "form", "explode": False, "schema": schema}
            for name, schema in Options.schemas().items()
        ),
    ]


def _prediction(manifest: BundleManifest) -> Schema:
    height, width, channels = manifest.image_shape
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form = {
        "type": "object",
        "required": ["images"],
        "additionalProperties": False,
        "properties": {"images": {"type": "array", "minItems": 1, "items": file}, **Options.schemas()},
    }
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Answer"}}, "application/x-npy": {}}
    headers = {
        "X-Batch-Size": {"schema": {"type": "integer"}, "description": "Images of the forward pass, others' included."},
        "Server-Timing": {"schema": {"type": "string"}, "description": "Milliseconds of each stage."},
    }
    return {
        "summary": "Predict images.",
        "description": f"""Images of {height} x {width} pixels, sent as any of:

- JSON: rows of pixels, or image files in base64;
- a `.npy` file of whole numbers from 0 to 255, (batch, {height}, {width}, {channels});
- raw bytes, whose shape `X-Shape` gives;
- an image file (PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF), or several as a form.

Where the `Content-Type` does not say which, the first bytes do. Image files are decoded as in training: turned as their
EXIF data say, transparent parts on white, 16 bits brought to 8, and resized bilinearly to {height} x {width}.

Options are read from the query, from a form's text fields, and from JSON beside the images.""",
        "parameters": _parameters(),
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _question(manifest.image_shape)},
                **{kind: {"schema": schema} for kind, schema in _PIXELS.items()},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": {
            "200": {"description": "A prediction for each image.", "headers": headers, "content": content},
            **{status: _error(text) for status, text in _PREDICTION_ERRORS.items()},
        },
    }


def _inference() -> Schema:
    text: Schema = {"type": "string"}
    shape = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 1}}
    images = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": "images"},
            "shape": shape,
            "datatype": {"enum": [*INTEGERS, "BYTES"]},
            "parameters": {"type": "object", "properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
            "data": {"type": "array"},
        },
    }
    output = {
        "type": "object",
        "required": ["name"],
        "properties": {
            "name": {"enum": list(OUTPUTS)},
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"binary_data": {"type": "boolean"}},
            },
        },
    }
    options = {name: schema for name, schema in Options.schemas().items() if name != "outputs"}
    parameters = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"binary_data_output": {"type": "boolean"}, **options},
    }
    question = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": text,
            "parameters": parameters,
            "inputs": {"type": "array", "minItems": 1, "maxItems": 1, "items": images},
            "outputs": {"type": "array", "items": output},
        },
    }
    tensor = {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {"name": {"enum": list(OUTPUTS)}, "shape": shape, "datatype": text, "data": {"type": "array"}},
    }
    tensors = {"type": "array", "items": tensor}
    answer = {
        "type": "object",
        "required": ["model_name", "outputs"],
        "properties": {"model_name": text, "model_version": text, "id": text, "outputs": tensors},
    }
    octets: Schema = {"application/octet-stream": {}}
    length = {"name": HEAD_LENGTH, "in": "header", "schema": {"type": "integer", "minimum": 0}}
    return {
        "summary": "Predict images, in KServe's Open Inference Protocol, version 2.",
        "parameters": [_parameters()[0], length | {"description": "Bytes of JSON, after which tensors follow."}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": question}, **octets}},
        "responses": {
            "200": {"description": "Tensors.", "content": {"application/json": {"schema": answer}, **octets}},
            **{status: _error(text) for status, text in _PREDICTION_ERRORS.items()},
        },
    }


def _ready(media_type: str) -> Schema:
    operation = _get("200 once every member has run, 503 before.", media_type)
    operation["responses"]["503"] = {"description": "Not ready.", "content": {media_type: {}}}
    return operation


def _kind_of(probe: str) -> str:
    return "application/json" if probe.startswith(V2) else "text/plain"


def _get(summary: str, media_type: str) -> Schema:
    return {"summary": summary, "responses": {"200": {"description": "OK", "content": {media_type: {}}}}}
