"""The OpenAPI document, made from the same table as the routes."""

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from pydantic.json_schema import models_json_schema

from orchestrator import errors
from orchestrator.server.http.forms import ErrorReply
from orchestrator.server.http.refusals import BY_ERROR
from orchestrator.server.http.routes import Route

_EVERY_ROUTE: tuple[type[errors.OrchestratorError], ...] = (
    errors.InvalidRequestError,
    errors.UnauthenticatedError,
    errors.NotAllowedError,
    errors.NotFoundError,
    errors.UnavailableError,
    errors.InvariantError,
)
_IN_PATH = re.compile(r"\{(\w+)\}")

Schema = dict[str, Any]
_ByModel = Mapping[Any, Schema]
"""By pydantic model."""


def document(routes: Sequence[Route], version: str) -> Schema:
    """The document of these routes."""
    models = {model for route in routes for model in (route.body, route.reply, route.query) if model}
    schemas, definitions = models_json_schema(
        [(model, "validation") for model in sorted(models | {ErrorReply}, key=lambda one: one.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    by_model: _ByModel = {model: schema for (model, _), schema in schemas.items()}
    paths: dict[str, Schema] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_model, definitions)
    return {
        "openapi": "3.1.0",
        "info": {"title": "rlm-orchestrator", "version": version},
        "security": [{"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(route: Route, by_model: _ByModel, definitions: Schema) -> Schema:
    operation: Schema = {
        "operationId": route.name,
        "summary": route.summary,
        "description": route.needs,
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _IN_PATH.findall(route.path)
        ],
        "responses": {str(route.status): _success(route, by_model), **_refusals(route, by_model)},
    }
    form = _resolved(by_model[route.query], definitions)
    for name, schema in form.get("properties", {}).items():
        operation["parameters"].append(
            {"name": name, "in": "query", "required": name in form.get("required", ()), "schema": schema}
        )
    if route.body is not None:
        operation["requestBody"] = _body("application/json", by_model[route.body])
    elif route.takes_bytes:
        operation["requestBody"] = _body("application/octet-stream", {"type": "string", "format": "binary"})
    return operation


def _resolved(schema: Schema, definitions: Schema) -> Schema:
    name = schema["$ref"].rpartition("/")[2]
    resolved: Schema = definitions["$defs"][name]
    return resolved


def _body(media_type: str, schema: Schema) -> Schema:
    return {"required": True, "content": {media_type: {"schema": schema}}}


def _success(route: Route, by_model: _ByModel) -> Schema:
    answer: Schema = {"description": HTTPStatus(route.status).phrase}
    if route.reply is not None:
        answer["content"] = {route.media_type: {"schema": by_model[route.reply]}}
    elif route.status != HTTPStatus.NO_CONTENT:
        answer["content"] = {route.media_type: {"schema": {"type": "string"}}}
    return answer


def _refusals(route: Route, by_model: _ByModel) -> Schema:
    kinds: dict[int, set[str]] = {413: {"request_too_large"}} if route.body else {}
    for error in (*_EVERY_ROUTE, *route.refusals):
        refusal = BY_ERROR[error]
        status = route.unavailable if error is errors.UnavailableError else refusal.status
        kinds.setdefault(status, set()).add(refusal.kind)
    content = {"application/json": {"schema": by_model[ErrorReply]}}
    return {
        str(status): {"description": ", ".join(sorted(names)), "content": content}
        for status, names in sorted(kinds.items())
    }
