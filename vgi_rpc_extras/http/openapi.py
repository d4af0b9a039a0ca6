# Needs: falcon. Used by server.py.
"""The calls with JSON as an OpenAPI 3.1 document, for tools that make clients, forms and tests of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import falcon

from .. import core as _bound_core
from ..common import names
from . import json_calls, json_values
from .describe_page import kind_of

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

_DESCRIPTION = (
    "Unary methods, and the first rows of streams. Bytes are base64, times ISO 8601; numbers that JSON has not are"
    ' "NaN", "Infinity" and "-Infinity". Other clients of this service send Apache Arrow.'
)
_LOGS = {
    "type": "array",
    "items": {"type": "object", "properties": {"level": {"type": "string"}, "message": {"type": "string"}}},
    "description": "what the method told its caller meanwhile",
}
_COLUMNS = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": {"type": "string"}, "type": {"type": "string"}}},
}
_ROW_COUNT = {
    "type": "integer",
    "minimum": 1,
    "maximum": json_calls.MAX_ROWS,
    "default": json_calls.DEFAULT_ROWS,
}
_ROWS = {"type": "array", "items": {"type": "object"}}


class OpenApi:
    """`GET {prefix}/openapi.json`."""

    def __init__(self, server: core.RpcServer, prefix: str, key_headers: Sequence[str] | None) -> None:
        self._about = (server, prefix, key_headers)

    @functools.cached_property
    def _body(self) -> bytes:
        return json.dumps(document(*self._about)).encode()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "application/json"
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.data = self._body


def document(server: core.RpcServer, prefix: str, key_headers: Sequence[str] | None) -> dict[str, Any]:
    """The document, as JSON has it.

    Args:
        key_headers: that carry a caller's key; empty: not known, so that bearer tokens are assumed; None: none does.
    """
    shown = [b for name, b in server.bindings.items() if not name.startswith(core.RESERVED_PROTOCOL_PREFIX)]
    schemas = json_values.Schemas()
    schemas.components["Error"] = _error_schema()
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": server.protocol_name,
            "version": server.protocol_version or server.server_version or "0",
            "description": "\n\n".join(text for text in (*_docs(shown), _DESCRIPTION) if text),
        },
        "tags": [{"name": binding.name} for binding in shown],
        "paths": {
            f"/{names.CALL_NAME}": {"post": _any_operation()},
            **{
                f"/{names.CALL_NAME}/{binding.name}/{info.name}": {"post": _operation(binding.name, info, schemas)}
                for binding in shown
                for _, info in sorted(binding.methods.items())
            },
        },
        "components": {"schemas": schemas.components},
    }
    if prefix:
        found["servers"] = [{"url": prefix}]
    if key_headers is not None:
        schemes = _security(key_headers)
        found["components"]["securitySchemes"] = schemes
        found["security"] = [{name: []} for name in schemes]
    return found


def _docs(shown: Sequence[core.ProtocolBinding]) -> list[str]:
    return [json_values.docstring(binding.protocol) for binding in shown]


def _security(key_headers: Sequence[str]) -> dict[str, Any]:
    schemes: dict[str, Any] = {}
    for header in key_headers or ("Authorization",):
        if header.lower() == "authorization":
            schemes["bearer"] = {"type": "http", "scheme": "bearer"}
        else:
            schemes[header] = {"type": "apiKey", "in": "header", "name": header}
    return schemes


def _operation(protocol: str, info: core.RpcMethodInfo, schemas: json_values.Schemas) -> dict[str, Any]:
    args = schemas.fields(info.params_schema, info.param_types, info.param_defaults, info.param_docs)
    kind = kind_of(info)
    found: dict[str, Any] = {
        "operationId": f"{protocol}.{info.name}",
        "tags": [protocol],
        "requestBody": {"required": "required" in args, "content": {"application/json": {"schema": args}}},
        "responses": _responses(_answer(info, kind, schemas)),
    }
    if info.doc:
        found["summary"], found["description"] = info.doc.strip().splitlines()[0], info.doc.strip()
    if kind != "unary":
        about = "the most rows to send"
        found["parameters"] = [{"name": "rows", "in": "query", "schema": _ROW_COUNT, "description": about}]
    return found


def _any_operation() -> dict[str, Any]:
    """The path that takes a call of any method; only there an exchange can be given its input."""
    properties = {
        "protocol": {"type": "string"},
        "method": {"type": "string"},
        "args": {"type": "object", "default": {}},
        "rows": {**_ROW_COUNT, "description": "of a stream: the most rows to send"},
        "input": {**_ROWS, "description": "of an exchange: the rows of its one input"},
    }
    asked = {"type": "object", "properties": properties, "required": ["protocol", "method"]}
    return {
        "operationId": names.CALL_NAME,
        "summary": "Call any method; an exchange with its input.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
        "responses": _responses({"type": "object"}),
    }


def _responses(answer: dict[str, Any]) -> dict[str, Any]:
    error = {"$ref": "#/components/schemas/Error"}
    return {
        "200": _content("the answer", answer),
        "default": _content("a failure, with the HTTP status of its code", error),
    }


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _answer(info: core.RpcMethodInfo, kind: str, schemas: json_values.Schemas) -> dict[str, Any]:
    if kind == "unary":
        result = {"type": "null"}
        if info.has_return:
            result = schemas.field(info.result_schema.field("result"), info.result_type)
        return {"type": "object", "properties": {"result": result, "logs": _LOGS}, "required": ["result"]}
    properties: dict[str, Any] = {"columns": _COLUMNS, "rows": _ROWS, "logs": _LOGS}
    if info.header_type is not None:
        properties["header"] = schemas.record(info.header_type)
    if kind != "exchange":
        properties["more"] = {"const": True, "description": "the stream has not come to its end"}
    if kind != "producer":
        properties["input_columns"] = _COLUMNS
    return {"type": "object", "properties": properties, "required": ["columns", "rows"]}


def _error_schema() -> dict[str, Any]:
    error = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "enum": [str(code) for code in core.Code]},
            "message": {"type": "string"},
            "details": {"type": "array", "items": {"type": "object"}},
        },
        "required": ["code", "message"],
    }
    return {"type": "object", "properties": {"error": error, "logs": _LOGS}}
