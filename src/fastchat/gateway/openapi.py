"""GET /openapi.json: the API server's routes and the bodies that workers obey, for tools that generate clients.

There is no page to look at it: the usual ones load their code from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fastchat import __version__

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One route as the document shows it. `body` is None where nothing is posted; `query` names what a URL may add."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    is_open: bool = False
    can_stream: bool = False
    query: tuple[str, ...] = ()
    answer_type: str = "application/json"


def openapi_document(operations: Iterable[Operation], *, needs_key: bool) -> dict[str, Any]:  # Any: JSON
    """The OpenAPI 3.1 document of `operations`."""
    operations = tuple(operations)
    bodies = list({operation.body for operation in operations if operation.body is not None})
    bodies.sort(key=lambda body: body.__name__)
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, path, needs_key=needs_key)
    components: dict[str, Any] = {"schemas": {**definitions.get("$defs", {}), "Error": _ERROR_SCHEMA}}
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "FastChat", "version": __version__},
        "paths": paths,
        "components": components,
    }


def _operation(operation: Operation, path: str, *, needs_key: bool) -> dict[str, Any]:  # Any: JSON
    content: dict[str, Any] = {operation.answer_type: {}}
    if operation.can_stream:
        content["text/event-stream"] = {}
    shown: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "The answer", "content": content},
            "default": {
                "description": "An error",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    in_path, in_query = re.findall(r"\{(\w+)\}", path), operation.query
    if in_path or in_query:
        named = [(name, "path") for name in in_path] + [(name, "query") for name in in_query]
        shown["parameters"] = [
            {"name": name, "in": where, "required": where == "path", "schema": {"type": "string"}}
            for name, where in named
        ]
    if operation.body is not None:
        schema = {"$ref": f"#/components/schemas/{operation.body.__name__}"}
        shown["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if needs_key and not operation.is_open:
        shown["security"] = [{"key": []}]
    return shown
