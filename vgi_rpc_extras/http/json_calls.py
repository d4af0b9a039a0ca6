# Needs: falcon. Used by server.py.
"""Calls whose arguments and answers are JSON: for curl, for browsers, for what reads OpenAPI (ours; no peer has them).

POST {prefix}/__call__/{protocol}/{method}      the body is the arguments; `?rows=` for a stream
POST {prefix}/__call__                          {"protocol", "method", "args", "rows", "input"}, the last two of streams

{"result": ...}                                 of a unary method
{"header", "columns", "rows", "more"}           of a stream: its first rows; what is left is cancelled
{"error": {"code", "message"}}                  with the status of the code; what a stream has sent stands beside it
"logs": [{"level", "message"}]                  beside each of these, if there are any
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import falcon
import pyarrow as pa

from .. import core as _bound_core
from ..common.texts import escaped
from . import json_values

if TYPE_CHECKING:
    import vgi_rpc as core

    from .server import RpcResource
else:
    core = _bound_core()

MAX_ROWS = 1000
DEFAULT_ROWS = 100
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # of a pair, it may be; JSON can say one half alone, and UTF-8 cannot
_STREAM_SECONDS = 10.0  # after which no further turn of a producer begins: this thread serves others, too
# What gateways of gRPC and Connect answer for a code; CANCELLED is nginx's 499.
STATUS_OF_CODE: Mapping[core.Code, int] = {
    core.Code.CANCELLED: 499,
    core.Code.UNKNOWN: 500,
    core.Code.INVALID_ARGUMENT: 400,
    core.Code.DEADLINE_EXCEEDED: 504,
    core.Code.NOT_FOUND: 404,
    core.Code.ALREADY_EXISTS: 409,
    core.Code.PERMISSION_DENIED: 403,
    core.Code.RESOURCE_EXHAUSTED: 429,
    core.Code.FAILED_PRECONDITION: 400,
    core.Code.ABORTED: 409,
    core.Code.OUT_OF_RANGE: 400,
    core.Code.UNIMPLEMENTED: 501,
    core.Code.INTERNAL: 500,
    core.Code.UNAVAILABLE: 503,
    core.Code.DATA_LOSS: 500,
    core.Code.UNAUTHENTICATED: 401,
}


# JSON has no parameters (RFC 8259 section 11); clients say its charset all the same.
_JSON = re.compile(r"\s*application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)


class JsonCalls:
    """The routes of calls with JSON.

    Bodies and answers have the bounds of other calls. The content type keeps other origins out: a browser asks before
    it sends that.
    """

    def __init__(self, rpc: RpcResource, challenge: str) -> None:
        self._rpc = rpc
        self._challenge = challenge  # of a method that answers UNAUTHENTICATED (RFC 9110 section 15.5.2)

    def on_post(self, req: falcon.Request, resp: falcon.Response, protocol: str = "", method: str = "") -> None:
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.content_type = "application/json"
        if not _JSON.fullmatch(req.env.get("CONTENT_TYPE") or ""):
            return self._refuse(resp, 415, TypeError("Content-Type must be application/json"))
        body = self._rpc.body(req)
        try:
            asked = _asked_by_path(req, body, protocol, method) if protocol else _asked_by_body(body)
            call = _Call(asked)
            self._rpc.json_call(req, resp, asked.protocol, asked.method, call.answer)
        except (core.MethodNotImplementedError, core.ProtocolNotSupportedError) as exc:
            return self._refuse(resp, 404, exc)
        except Exception as exc:  # what is wrong with the request; a method's own failure is in its answer
            code = core.error_code_of(exc)
            return self._refuse(resp, 400 if code is core.Code.UNKNOWN else STATUS_OF_CODE[code], exc)
        resp.status = call.status
        if call.status == 401:
            resp.set_header("WWW-Authenticate", self._challenge)

    def _refuse(self, resp: falcon.Response, status: int, exc: Exception) -> None:
        code = core.error_code_of(exc)
        code = core.Code.INVALID_ARGUMENT if code is core.Code.UNKNOWN else code
        resp.status = status
        message = escaped(f"{type(exc).__name__}: {core.exception_str(exc)}")
        resp.data = _dumps({"error": {"code": code, "message": message}})


class _Asked(NamedTuple):
    """What a caller wants."""

    protocol: str
    method: str
    args: dict[str, Any]
    rows: int
    input: list[dict[str, Any]] | None


def _asked_by_path(req: falcon.Request, body: bytes, protocol: str, method: str) -> _Asked:
    args = _object(body or b"{}", '{"parameter": value, ...}')
    text = req.get_param("rows") or str(DEFAULT_ROWS)
    return _Asked(protocol, method, args, _row_count(int(text) if text.isascii() and text.isdigit() else text), None)


def _asked_by_body(body: bytes) -> _Asked:
    shape = '{"protocol": "...", "method": "...", "args": {...}}'
    asked = _object(body, shape)
    protocol, method, args = asked.get("protocol"), asked.get("method"), asked.get("args", {})
    if not (isinstance(protocol, str) and isinstance(method, str) and isinstance(args, dict)):
        raise ValueError(f"expected {shape}")
    rows = asked.get("input")
    if rows is not None and not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise ValueError('"input" must be a list of objects, one a row')
    return _Asked(protocol, method, args, _row_count(asked.get("rows", DEFAULT_ROWS)), rows)


def _object(body: bytes, shape: str) -> dict[str, Any]:
    try:
        text = body.decode()  # json.loads would let pass what is not UTF-8 (RFC 8259 section 8.1)
        found = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"the body is not JSON; expected {shape}") from exc
    if _HALF.search(text) and re.search("[\ud800-\udfff]", json.dumps(found, ensure_ascii=False)):
        raise ValueError(
            "a text in the body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        )
    if not isinstance(found, dict):
        raise ValueError(f"expected {shape}, got a JSON {type(found).__name__}")
    return found


def _row_count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ROWS:
        raise ValueError(f'"rows" must be a whole number within 1..{MAX_ROWS}, got {str(value)[:40]!r}')
    return value


class _Call:
    """One call: what is asked, and what has been found so far."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._found: dict[str, Any] = {}
        self._logs: list[dict[str, str]] = []
        self._open: core.Stream[Any, Any] | None = None  # the stream, unless it has come to its end
        self.status = 200

    def answer(
        self,
        call: core.ServerRequest,
        limited: Callable[[bytes], bytes],
        record: Callable[[bytes, bytes, int], None],
    ) -> bytes:
        """Make the call; returns the body of the answer.

        `limited` replaces a reply or an answer that is too long; `record` is told of each turn: request, reply, status.
        """
        body = _request(call, self._asked.args)
        if call.info.method_type is core.MethodType.UNARY:
            self._read(call, limited(call.unary(body)))
        else:
            self._stream(call, body, limited, record)
        answer = self._json()
        checked = limited(answer)
        if checked is not answer:
            self._found, self._logs = {}, []
            self._read(call, checked)
            answer = self._json()
        record(body, answer, self.status)
        return answer

    def _json(self) -> bytes:
        return _dumps({**self._found, "logs": self._logs} if self._logs else self._found)

    def _stream(
        self,
        call: core.ServerRequest,
        body: bytes,
        limited: Callable[[bytes], bytes],
        record: Callable[[bytes, bytes, int], None],
    ) -> None:
        """The first rows of a producer, or what an exchange answers to one input. What is left is cancelled."""
        ends = time.monotonic() + _STREAM_SECONDS
        reply = limited(call.init(body, self._keep))
        self._read(call, reply, with_header=call.info.header_type is not None)
        try:
            while (sent := self._next_input(ends)) is not None and self._open is not None:
                record(body, reply, self.status)
                stream, self._open = self._open, None
                reply = limited(call.turn(stream, sent, {}, self._keep))
                self._read(call, reply)
        finally:
            if self._open is not None:
                record(body, reply, self.status)
                call.cancel(self._open, core.empty_batch(core.EMPTY_SCHEMA), {core.CANCEL_KEY: b"1"})

    def _keep(self, stream: core.Stream[Any, Any]) -> dict[bytes, bytes]:
        """Takes the place of sealing: a stream that goes on does so as this very object."""
        self._open = stream
        return {}

    def _next_input(self, ends: float) -> pa.RecordBatch | None:
        """What the next turn gets; None when no turn is wanted."""
        if self._open is None or self.status != 200:
            return None
        schema = self._open.input_schema
        if len(schema):
            again = "input_columns" in self._found
            self._found["input_columns"] = json_values.columns(schema)
            return None if again or not self._asked.input else _rows(self._asked.input, schema)
        if len(self._found["rows"]) < self._asked.rows and time.monotonic() < ends:
            return core.empty_batch(core.EMPTY_SCHEMA)
        self._found["more"] = True
        return None

    def _read(self, call: core.ServerRequest, reply: bytes, with_header: bool = False) -> None:
        """Add a reply to what has been found: Arrow IPC streams, the first one the header if there are two."""
        data = pa.BufferReader(reply)
        while data.tell() < len(reply):
            with pa.ipc.open_stream(data) as reader:
                batches = [
                    self._fetched(call, *item)
                    for item in reader.iter_batches_with_custom_metadata()
                    if not self._heard(item[1])
                ]
                schema = reader.schema
            if with_header and data.tell() < len(reply):
                self._found["header"] = core.batch_to_json(batches[0])[0]
            elif call.info.method_type is core.MethodType.STREAM:
                if "error" not in self._found:
                    self._found.setdefault("columns", json_values.columns(schema))
                    self._found.setdefault("rows", [])
                for batch in batches:
                    self._add_rows(batch)
            elif batches:
                self._found["result"] = json_values.result(batches[-1], call.info)
            with_header = False

    def _fetched(
        self, call: core.ServerRequest, batch: pa.RecordBatch, metadata: pa.KeyValueMetadata | None
    ) -> pa.RecordBatch:
        """The batch, from where the server keeps it: a pointer to it says nothing to these callers."""
        store = call.server.external_location
        if store is None and core.is_external_location_batch(batch, metadata):
            raise core.ExternalLocationError("the answer is kept elsewhere, and this server has no external_location")
        return core.resolve_external_location(batch, metadata, store, self._add_log)[0]

    def _add_log(self, message: core.Message) -> None:
        self._logs.append({"level": str(message.level), "message": message.message})

    def _add_rows(self, batch: pa.RecordBatch) -> None:
        rows = self._found.setdefault("rows", [])
        room = self._asked.rows - len(rows)
        rows += core.batch_to_json(batch.slice(0, room))
        if batch.num_rows > room:
            self._found["more"] = True

    def _heard(self, metadata: Mapping[bytes, bytes] | None) -> bool:
        """Whether a batch is a message or an error, which is kept."""
        found = dict(metadata or {})
        level = found.get(core.LOG_LEVEL_KEY)
        if level is None:
            return False
        message = found.get(core.LOG_MESSAGE_KEY, b"").decode("utf-8", "replace")
        if level != b"EXCEPTION":
            self._logs.append({"level": level.decode("utf-8", "replace"), "message": message})
            return True
        code = core.Code.parse(found.get(core.ERROR_CODE_KEY, b"").decode("utf-8", "replace"))
        self.status = STATUS_OF_CODE[code]
        self._found["error"] = {"code": code, "message": message}
        if core.ERROR_DETAILS_KEY in found:
            self._found["error"]["details"] = json.loads(found[core.ERROR_DETAILS_KEY])
        return True


def _request(call: core.ServerRequest, args: Mapping[str, Any]) -> bytes:
    """A request as a client of this version would send it."""
    metadata = {
        core.RPC_METHOD_KEY: call.info.name.encode(),
        core.REQUEST_VERSION_KEY: core.REQUEST_VERSION,
        core.PROTOCOL_KEY: call.binding.name.encode(),
    }
    if call.binding.version is not None:
        metadata[core.PROTOCOL_VERSION_KEY] = call.binding.version.encode()
    batch = json_values.arguments(args, call.info)
    return core.serialize_record_batch_bytes(batch, pa.KeyValueMetadata(metadata))


def _rows(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """The input of an exchange; ValueError names what does not fit."""
    table = pa.Table.from_batches([core.batch_from_json(row, schema) for row in rows], schema)
    return table.combine_chunks().to_batches()[0]


def _dumps(value: Any) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:  # numbers that JSON has not
        text = json.dumps(json_values.finite(value))
    return f"{text}\n".encode()  # it ends on terminals
