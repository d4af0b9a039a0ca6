# Needs: falcon for the server's half only. Install: pip install 'vgi-rpc-onefile[http]'.
"""Upload URLs: a server gives clients places for requests that are too large to send to it (http.md section 12)."""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import core as _bound_core
from ..common import names

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core

    from ..storage.store import UploadUrl, UploadUrlProvider
    from .client import HttpRetryConfig
else:
    core = _bound_core()

__all__ = ["request_upload_urls"]

_LOG = logging.getLogger("vgi_rpc.http")
_LOG_ACCESS = logging.getLogger("vgi_rpc.access")
_MAX_CONTROL_BYTES = 65_536  # a request for URLs is one integer


# ---- the client's half


def request_upload_urls(
    base_url: str | None = None,
    *,
    count: int = 1,
    prefix: str | None = None,
    client: Any = None,
    retry: HttpRetryConfig | None = None,
    accepted_max_response_bytes: int | None = names.DEFAULT_MAX_RESPONSE_BYTES,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 30.0,
) -> list[UploadUrl]:
    """Ask a server for places to upload to; `count` is cut to 1..100. The other parameters are `http_connect`'s.

    Raises RpcError with the error type NotSupported when the server has none to give.
    """
    from ..storage.store import vend_upload_urls  # here, so that a server need not load the client's half
    from .client import HttpTransport

    transport = HttpTransport(
        base_url,
        prefix=prefix,
        client=client,
        headers=headers,
        retry=retry,
        accepted_max_response_bytes=accepted_max_response_bytes,
    )
    with contextlib.closing(transport):
        return vend_upload_urls(transport, count, timeout)


# ---- the server's half


def stores_results(server: core.RpcServer) -> bool:
    """Whether results may be kept elsewhere: there is a store, and it has a storage."""
    return getattr(server.external_location, "storage", None) is not None


def storage_capabilities(
    server: core.RpcServer, max_externalized: int | None, vends: bool, max_upload: int | None
) -> list[tuple[str, str]]:
    """What every response says about storage (http.md section 10)."""
    names.check_size("max_externalized_response_bytes", max_externalized)
    names.check_size("max_upload_bytes", max_upload)
    found = [(names.EXTERNALIZATION_ENABLED_HEADER, "true" if stores_results(server) else "false")]
    if max_externalized is not None:
        found.append((names.MAX_EXTERNALIZED_RESPONSE_BYTES_HEADER, str(max_externalized)))
    if vends:
        found.append((names.UPLOAD_URL_HEADER, "true"))
        if max_upload is not None:
            found.append((names.MAX_UPLOAD_BYTES_HEADER, str(max_upload)))
    return found


class UploadUrls:
    """The route `__upload_url__/init`; `builtin` reads the request and sends the reply."""

    def __init__(self, server: core.RpcServer, provider: UploadUrlProvider, builtin: Callable[..., None]) -> None:
        self._server = server
        self._provider = provider
        self._builtin = builtin

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        began = time.monotonic()
        outcome: list[BaseException | None] = []

        def work(body: bytes) -> tuple[bytes, bool]:
            count = _count(body)
            try:
                reply, failure = self._make(count), None
            except Exception as exc:  # of a library: its text may hold a signed URL
                _LOG.error("the upload URL provider failed: %s", type(exc).__name__)
                failure = RuntimeError(f"the upload URL provider failed: {type(exc).__name__}")
                reply = self._server.error_body(failure, req.context.request_id, names.UPLOAD_URL_RESPONSE_SCHEMA)
            outcome.append(failure)
            return reply, failure is not None

        self._builtin(req, resp, names.UPLOAD_URL_METHOD, work)
        if outcome and _LOG_ACCESS.isEnabledFor(logging.INFO):
            self._record(req, began, outcome[0], len(resp.data or b""))

    def _make(self, count: int) -> bytes:
        places = [self._provider.generate_upload_url(core.EMPTY_SCHEMA) for _ in range(count)]
        for place in places:
            if place.expires_at.tzinfo is None:
                raise ValueError("expires_at has no time zone")
        columns = [
            [place.upload_url for place in places],
            [place.download_url for place in places],
            [place.expires_at.astimezone(datetime.UTC) for place in places],
        ]
        schema = names.UPLOAD_URL_RESPONSE_SCHEMA
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        return core.serialize_record_batch_bytes(pa.RecordBatch.from_arrays(arrays, schema=schema))

    def _record(self, req: falcon.Request, began: float, error: BaseException | None, size: int) -> None:
        """The access record (http.md section 12): a unary method of the primary protocol."""
        server = self._server
        extra = core.access_fields(
            server,
            names.UPLOAD_URL_METHOD,
            protocol=server.protocol_name,
            protocol_hash=server.protocol_hash,
            method_type="unary",
            auth=req.context.auth,
            remote_addr=req.env.get("REMOTE_ADDR", ""),
            began=began,
            request_id=req.context.request_id,
            error=error,
        )
        extra["http_status"] = 200 if error is None else 500
        extra["request_bytes"], extra["response_bytes"] = req.content_length or 0, size
        _LOG_ACCESS.info("%s.%s %s", server.protocol_name, names.UPLOAD_URL_METHOD, extra["status"], extra=extra)


def _count(body: bytes) -> int:
    """How many places a request asks for: 1 unless it says so, 100 at most. ValueError for what is no such request."""
    if len(body) > _MAX_CONTROL_BYTES:
        raise ValueError(f"a request for upload URLs has at most {_MAX_CONTROL_BYTES} bytes")
    batch, metadata = core.deserialize_record_batch(body)
    said = metadata or {}
    if said.get(core.RPC_METHOD_KEY) != names.UPLOAD_URL_METHOD.encode():
        raise ValueError(f"Method name mismatch: the path has '{names.UPLOAD_URL_METHOD}', the batch another one")
    if said.get(core.REQUEST_VERSION_KEY) != core.REQUEST_VERSION:
        raise core.VersionError(f"Unsupported request version, expected {core.REQUEST_VERSION!r}")
    # The type first, then one row of it: a column of another type may unfold into anything.
    at = batch.schema.get_field_index("count")
    counted = at >= 0 and batch.num_rows > 0 and pa.types.is_integer(batch.schema.field(at).type)
    asked = batch.column(at)[0].as_py() if counted else None
    return min(max(asked or 1, 1), names.MAX_UPLOAD_URL_COUNT)
