# Needs: falcon. Used by server.py.
"""Unary calls whose arguments and answers are JSON: what the describe page sends (http.md section 13)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import falcon
import pyarrow as pa

from .. import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core

    from .server import RpcResource
else:
    core = _bound_core()


class JsonCalls:
    """`POST {prefix}/__call__` with {"protocol", "method", "args"}: a unary call for people and their browsers.

    Bodies and answers have the bounds of other calls. Its exact content type keeps other origins out: a browser asks
    before it sends that.
    """

    def __init__(self, rpc: RpcResource) -> None:
        self._rpc = rpc

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        try:
            asked = json.loads(self._rpc.body(req))
            protocol, method, args = asked["protocol"], asked["method"], asked.get("args", {})
            if not (isinstance(protocol, str) and isinstance(method, str) and isinstance(args, dict)):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise falcon.HTTPBadRequest(
                title="Bad call", description='expected {"protocol": "...", "method": "...", "args": {...}}'
            ) from exc
        try:
            self._rpc.json_call(
                req, resp, protocol, method, lambda binding, info: _request(binding, info, args), _answer
            )
        except falcon.HTTPError:
            raise
        except Exception as exc:
            raise falcon.HTTPBadRequest(title=type(exc).__name__, description=core.exception_str(exc)) from exc


def _request(binding: core.ProtocolBinding, info: core.RpcMethodInfo, args: dict[str, Any]) -> bytes:
    batch = core.batch_from_json(args, info.params_schema)
    metadata = {
        core.RPC_METHOD_KEY: info.name.encode(),
        core.REQUEST_VERSION_KEY: core.REQUEST_VERSION,
        core.PROTOCOL_KEY: binding.name.encode(),
    }
    if binding.version is not None:
        metadata[core.PROTOCOL_VERSION_KEY] = binding.version.encode()
    return core.serialize_record_batch_bytes(batch, pa.KeyValueMetadata(metadata))


def _answer(reply: bytes) -> bytes:
    """The reply as JSON: `result`, or `error`; and `logs`, if there are any."""
    logs: list[dict[str, str]] = []
    found: dict[str, Any] = {}
    with pa.ipc.open_stream(reply) as reader:
        for batch, metadata in reader.iter_batches_with_custom_metadata():
            level = (metadata or {}).get(core.LOG_LEVEL_KEY)
            if level is None:
                rows = core.batch_to_json(batch)
                found["result"] = rows[0].get("result") if rows else None
                continue
            message = metadata.get(core.LOG_MESSAGE_KEY, b"").decode("utf-8", "replace")
            if level == b"EXCEPTION":
                code = metadata.get(core.ERROR_CODE_KEY, b"").decode("utf-8", "replace")
                found["error"] = {"message": message, "code": code}
            else:
                logs.append({"level": level.decode("utf-8", "replace"), "message": message})
    return json.dumps({**found, "logs": logs} if logs else found).encode()
