# Needs: pyarrow only; httpx when a client of it is passed in. Install: pip install 'vgi-rpc-onefile[http]'.
# Seam: RequestTransport.
"""Calls over HTTP (http.md section 15).

    with http_connect(Calculator, "https://example.com/rpc") as calc:
        calc.add(1.0, 2.0)

    _connection.py    bytes: one request, one response
    capabilities.py   what the server says about itself
    refusals.py       responses that hold no Arrow body, and when a request is repeated
    session_view.py   what requests of a sticky session carry besides, and what their responses say of it
    HttpTransport     what the status, the headers and the coding of a response mean
    stream.py         how a stream goes on from request to request: the server's state travels in tokens

Binding, encoding, reading and every error of the far side are the core's, as on all other transports. RPC calls are
sent once: only what is safe to repeat (the capability probe, reflection) follows an HttpRetryConfig.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import re
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow as pa

from .. import core as _bound_core
from ..auth.unauthorized import AuthenticationError
from ..common import coding, names
from ._connection import (
    HttpxSender,
    Origin,
    Piece,
    PooledSender,
    Request,
    Response,
    Sender,
    SimpleSender,
    closed,
    deadline_of,
)
from .capabilities import HttpServerCapabilities, accepts_limit, capabilities_of
from .refusals import (
    HttpRetryConfig,
    HttpTransientError,
    is_arrow,
    no_support,
    refusal,
    repeated,
    request_too_large,
)
from .session_view import SessionView, with_session_token
from .stream import HttpStreamSession

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "AuthenticationError",
    "HttpRetryConfig",
    "HttpServerCapabilities",
    "HttpStreamSession",
    "HttpTransientError",
    "HttpTransport",
    "RequestUploader",
    "SessionView",
    "http_capabilities",
    "http_connect",
    "http_introspect",
    "with_session_token",
]

_P = TypeVar("_P")
_T = TypeVar("_T")
_UNSET: Any = object()
_NOTHING: Mapping[bytes, bytes] = types.MappingProxyType({})
_LOG_HTTP = logging.getLogger("vgi_rpc.wire.http")
_LOG_RETRY = logging.getLogger("vgi_rpc.http.retry")

_COMPRESS_FROM = 4096  # bytes; measured: below, packing costs more than the two packets it may save
_SAMPLE = 65_536  # bytes tried first; random doubles, say, would cost time on both sides for nothing
_MAX_REDIRECTS = 3
_PREVIEW = 200
_MAX_PROBE_BYTES = 65_536
_END_SECONDS = 10.0  # for the DELETE of a session, which waits for a call that uses it
_GATEWAY_STATUS = frozenset({429, 502, 503, 504})
_CALL_HEADERS = ("Content-Encoding", "traceparent", "tracestate")  # of some requests only
# What says where a message ends, or which server it is for (RFC 9110 sections 7.2 and 7.6, RFC 9112 section 6).
_FRAMING = re.compile(
    "content-length|transfer-encoding|content-encoding|(proxy-)?connection|keep-alive|te|trailer|upgrade|expect|host",
    re.IGNORECASE,
)
_SUPPORT = names.ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER.lower()


# ---- the transport


class RequestUploader(Protocol):
    """What `external_location` has to offer so that requests over the server's limit can travel through storage."""

    def upload_request(self, transport: HttpTransport, body: bytes) -> bytes:
        """Store `body`, a complete request, and return the small request that points to it (http.md section 15.2)."""
        ...


class HttpTransport(core.RequestTransport):
    """Requests to one server over HTTP; what `http_connect` puts behind its proxies. Safe to share between threads."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        prefix: str | None = None,
        client: Any = None,
        headers: Mapping[str, str] | None = None,
        retry: HttpRetryConfig | None = None,
        compression_level: int | None = 1,
        accepted_max_response_bytes: int | None = names.DEFAULT_MAX_RESPONSE_BYTES,
        external_location: object = None,
    ) -> None:
        """As `http_connect`; ValueError for what cannot be meant."""
        self._sender, self.url = _make_sender(base_url, client)
        self._prefix = _clean_prefix(getattr(client, "prefix", "") if prefix is None else prefix)
        if isinstance(self._sender, PooledSender):
            self._prefix = self._sender.origin.path + self._prefix
        names.check_size("accepted_max_response_bytes", accepted_max_response_bytes, names.MIN_RESPONSE_BYTES)
        self._limit = accepted_max_response_bytes
        given = _check_headers(headers)
        self._own_headers = _merged(given, {"User-Agent": f"vgi-rpc/{core.__version__}"})
        if self._limit is not None:
            limit = {names.ACCEPT_MAX_RESPONSE_BYTES_HEADER: str(self._limit)}
            self._own_headers = _merged(self._own_headers, limit)
        codings = "identity" if compression_level is None else ", ".join(coding.available_encodings())
        sent = {"Content-Type": names.ARROW_CONTENT_TYPE, "Accept-Encoding": codings}
        self._headers = _merged(self._own_headers, sent)
        if isinstance(self._sender, PooledSender) and any(name.lower() == "authorization" for name in given):
            self._sender.leave_authorization()
        self._level = compression_level
        self._retry = retry or HttpRetryConfig(max_retries=0)
        self._uploader = external_location if hasattr(external_location, "upload_request") else None
        self._known: HttpServerCapabilities | None = None
        self._paths: dict[tuple[str, str, str], str] = {}
        self._explicit = frozenset(
            name.lower() for name in (*self._headers, *_CALL_HEADERS, *(getattr(client, "headers", None) or ()))
        )
        self._session: SessionView[Any] | None = None
        self._pid = os.getpid()
        self._closed = False

    def __repr__(self) -> str:
        return f"<HttpTransport to {self.url}{self._prefix}>"

    def request(
        self,
        protocol: str,
        method: str,
        pieces: Sequence[Piece],
        *,
        timeout: float | None,
        doing: str,
        metadata: Mapping[bytes, bytes],
    ) -> bytes:
        """POST a unary call; reflection is safe to repeat and follows the HttpRetryConfig."""
        deadline = deadline_of(timeout)
        path = self._path(protocol, method, "")
        if protocol != core.REFLECTION_PROTOCOL_NAME or not self._retry.max_retries:
            return self._post(path, pieces, deadline, doing, metadata)
        return repeated(self._retry, deadline, lambda: self._post(path, pieces, deadline, doing, replay_safe=True))

    def open_stream(self, call: core.StreamCall) -> HttpStreamSession:
        """POST the request of a stream; what comes back is its first turn."""
        deadline = deadline_of(call.timeout)
        path = self._path(call.protocol, call.info.name, "init")
        body = self._post(path, call.request, deadline, call.doing, call.metadata)
        return HttpStreamSession(self, call, call.read_opening(body))

    def turn(self, call: core.StreamCall, pieces: Sequence[Piece], timeout: float | None, doing: str) -> bytes:
        """POST a later turn of a stream; no part of it is ever repeated."""
        deadline = deadline_of(timeout)
        path = self._path(call.protocol, call.info.name, "exchange")
        return self._post(path, pieces, deadline, doing, call.metadata)

    def builtin(self, name: str, body: bytes, *, timeout: float | None, doing: str) -> bytes:
        """POST to a name that belongs to the server, `{prefix}/{name}/init`; such calls are safe to repeat."""
        deadline = deadline_of(timeout)
        path = f"{names.reserved_path(name, prefix=self._prefix)}/init"
        return repeated(self._retry, deadline, lambda: self._post(path, (body,), deadline, doing, replay_safe=True))

    def ping(self, timeout: float | None) -> None:
        """Ask for the server's health."""
        self.capabilities(timeout)

    def capabilities(self, timeout: float | None = None) -> HttpServerCapabilities:
        """Ask the server what it can do; the answer also serves later requests."""
        deadline = deadline_of(timeout)
        self._check()
        return self._probe(deadline)

    def close(self) -> None:
        """Close own connections; those of a client that was passed in stay open."""
        self._closed = True
        if self._pid != os.getpid() and isinstance(self._sender, PooledSender):
            self._sender.abandon()
        else:
            self._sender.close()

    def proxy_attribute(self, proxy: core.RpcProxy, name: str) -> Any:
        """What proxies over HTTP have besides their Protocol's methods.

        `with_session_token(token=None)`, and on a view what SessionView has; `resume_stream(method_name, token)`: go on
        with a stream from a resume token, without `/init`.
        """
        if name == "with_session_token":
            return functools.partial(with_session_token, proxy)
        if self._session is not None and name in ("current_session_token", "current_echo_headers", "detach"):
            return getattr(self._session, name)
        if name != "resume_stream":
            raise AttributeError(name)

        def resume_stream(
            method_name: str, token: bytes, *, output_schema: pa.Schema | None = None
        ) -> HttpStreamSession:
            session = HttpStreamSession(self, core.StreamCall.resumed(proxy, method_name), None, output_schema)
            session.seek_to_token(token)
            return session

        return resume_stream

    def in_session(self, session: SessionView[Any]) -> tuple[HttpTransport, frozenset[str]]:
        """A transport over the same connections whose requests are the session's, and the headers that are its own."""
        found = copy.copy(self)
        found._session = session
        return found, self._explicit

    def end_session(self) -> None:
        """Tell the server that the session is over; whether it hears that does not matter (sticky.md section 5)."""
        path = names.reserved_path(names.SESSION_NAME, prefix=self._prefix)
        deadline = time.monotonic() + _END_SECONDS
        request = Request("DELETE", path, self._own_headers, (), _MAX_PROBE_BYTES, deadline, "session end")
        with contextlib.suppress(core.RpcError):
            self._check()
            self._exchange(request)

    # -- below here: one request

    def _exchange(self, request: Request) -> Response:
        session = self._session
        if session is None:
            return self._sender.send(request)
        token, headers = session.stamp(request.headers)
        response = self._sender.send(request._replace(headers=headers))
        session.learn(token, response.headers)
        return response

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise core.WrongProcessError(f"this connection was made in process {self._pid}; connect again")
        if self._closed:
            raise closed()

    def _path(self, protocol: str, method: str, suffix: str) -> str:
        key = (protocol, method, suffix)
        path = self._paths.get(key)
        if path is None:
            path = self._prefix + names.rpc_path(quote(protocol), quote(method), suffix=suffix)
            self._paths[key] = path
        return path

    def _probe(self, deadline: float | None) -> HttpServerCapabilities:
        return repeated(self._retry, deadline, lambda: self._probe_once(deadline))

    def _probe_once(self, deadline: float | None) -> HttpServerCapabilities:
        doing = "capability probe"
        request = Request(
            "OPTIONS", f"{self._prefix}/health", self._own_headers, (), _MAX_PROBE_BYTES, deadline, doing, True
        )
        response = self._exchange(request)
        if not 200 <= response.status < 300 or "html" in response.headers.get("content-type", ""):
            raise refusal(response, doing, "ProtocolError")
        self._known = found = capabilities_of(response.headers)
        return found

    def _post(
        self,
        path: str,
        pieces: Sequence[Piece],
        deadline: float | None,
        doing: str,
        metadata: Mapping[bytes, bytes] = _NOTHING,
        *,
        replay_safe: bool = False,
    ) -> bytes:
        """POST an Arrow body and return that of the answer. Whatever has no Arrow body is raised."""
        self._check()
        if (
            self._known is None
            and self._limit is not None
            and not self._probe(deadline).accept_max_response_bytes_support
        ):
            self._known = None
            raise no_support(doing, "no")
        pieces, shrunk = self._fit(pieces, doing)
        response, packed = self._send(path, pieces, deadline, doing, metadata, replay_safe)
        if response.status == 415 and packed and not is_arrow(response):
            self._known = capabilities_of(response.headers)
            response, _ = self._send(path, pieces, deadline, doing, metadata, replay_safe, refused=packed)
        elif response.status == 413 and not shrunk:
            self._known = capabilities_of(response.headers)
            if self._can_upload():
                response, _ = self._send(path, self._upload(pieces), deadline, doing, metadata, replay_safe)
        return self._body(response, doing)

    def _fit(self, pieces: Sequence[Piece], doing: str) -> tuple[Sequence[Piece], bool]:
        """Send by way of storage what is known to be too large, or refuse it before it travels."""
        known = self._known
        if known is None or known.max_request_bytes is None:
            return pieces, False
        size = sum(map(len, pieces))
        if size <= known.max_request_bytes:
            return pieces, False
        if self._can_upload():
            return self._upload(pieces), True
        if known.cache_expires_at is None or time.monotonic() < known.cache_expires_at:
            raise request_too_large(f"{doing}: the request has {size} bytes", known.max_request_bytes, "no")
        return pieces, False

    def _can_upload(self) -> bool:
        return self._uploader is not None and self._known is not None and self._known.upload_url_support

    def _upload(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        uploader: Any = self._uploader
        return (uploader.upload_request(self, b"".join(pieces)),)

    def _send(
        self,
        path: str,
        pieces: Sequence[Piece],
        deadline: float | None,
        doing: str,
        metadata: Mapping[bytes, bytes],
        replay_safe: bool,
        refused: coding.Encoding | None = None,
    ) -> tuple[Response, coding.Encoding | None]:
        """Pack, send, and follow redirects. Returns the coding that was used, too."""
        pieces, encoding = self._pack(pieces, refused)
        headers = self._headers if encoding is None else {**self._headers, "Content-Encoding": encoding.value}
        if metadata:
            headers = {**headers, **_trace_headers(metadata)}
        limit = coding.MAX_DECODED_BYTES if self._limit is None else self._limit
        request = Request("POST", path, headers, pieces, limit, deadline, doing, replay_safe)
        response = self._exchange(request)
        for _ in range(_MAX_REDIRECTS):
            if response.status not in (307, 308):
                break
            request = request._replace(path=self._redirected(response, doing))
            response = self._exchange(request)
        if _LOG_HTTP.isEnabledFor(logging.DEBUG):
            _LOG_HTTP.debug("POST %s: HTTP %d, %d bytes back", request.path, response.status, len(response.body))
        return response, encoding

    def _pack(
        self, pieces: Sequence[Piece], refused: coding.Encoding | None
    ) -> tuple[Sequence[Piece], coding.Encoding | None]:
        """Compress a body of some size, unless its beginning shows that it does not get smaller."""
        if self._level is None or sum(map(len, pieces)) < _COMPRESS_FROM:
            return pieces, None
        encoding = self._choose(refused)
        if encoding is None:
            return pieces, None
        size = sum(map(len, pieces))
        if size > 2 * _SAMPLE:
            sample = _part(pieces, _SAMPLE, 2 * _SAMPLE)
            if len(coding.compress(encoding, sample, level=self._level)) > 0.9 * _SAMPLE:
                return pieces, None
        packed = coding.compress(encoding, b"".join(pieces), level=self._level)
        return ((packed,), encoding) if len(packed) < size else (pieces, None)

    def _choose(self, refused: coding.Encoding | None) -> coding.Encoding | None:
        """The first coding of ours that the server advertises; without a word from it, zstd."""
        offered = self._known.supported_encodings if self._known is not None else (coding.Encoding.ZSTD,)
        mine = coding.available_encodings()
        return next((encoding for encoding in mine if encoding in offered and encoding is not refused), None)

    def _redirected(self, response: Response, doing: str) -> str:
        """The path that a redirect names, on the same server; the body goes nowhere else (http.md section 18.6)."""
        target = urlsplit(response.headers.get("location", ""))
        origin = f"{target.scheme}://{target.netloc}"
        same = not target.netloc or origin == self.url
        if not same or target.scheme not in ("", "http", "https") or not target.path.startswith("/"):
            raise refusal(response, doing, "HttpError")
        return quote(target.path, safe="/%._~!$&'()*+,;=:@-")

    def _body(self, response: Response, doing: str) -> bytes:
        if response.status == 401:
            raise refusal(response, doing, "HttpError")
        if response.too_large:
            raise self._response_too_large(doing)
        if not is_arrow(response):
            raise refusal(response, doing, "HttpError")
        if self._limit is not None and not accepts_limit(response.headers):
            raise no_support(doing, "answered")
        headers = response.headers
        packed = headers.get("content-encoding") or headers.get("x-vgi-content-encoding")
        if packed is None:
            return response.body
        try:
            return coding.decode_content_encoding(response.body, packed, max_output_size=self._limit)
        except coding.DecompressionLimitExceeded:
            raise self._response_too_large(doing) from None
        except ValueError as exc:
            raise core.ConnectionLostError(f"{doing}: the response cannot be unpacked: {exc}", sent="answered") from exc

    def _response_too_large(self, doing: str) -> core.RpcError:
        allowed = f"accepted_max_response_bytes={self._limit}"
        if self._limit is None:
            allowed = f"{coding.MAX_DECODED_BYTES} bytes, the most that is read; accepted_max_response_bytes=N allows N"
        return core.RpcError(
            "ResponseTooLargeError",
            f"{doing}: the response is larger than {allowed}",
            error_code=core.Code.RESOURCE_EXHAUSTED,
        )


def _part(pieces: Sequence[Piece], start: int, end: int) -> bytes:
    """The bytes from `start` to `end` of what the pieces make together."""
    found = []
    for piece in pieces:
        found.append(bytes(memoryview(piece)[max(start, 0) : max(end, 0)]))
        start, end = start - len(piece), end - len(piece)
        if end <= 0:
            break
    return b"".join(found)


def _merged(headers: Mapping[str, str], more: Mapping[str, str]) -> dict[str, str]:
    """Both; what is in both, in whatever case, is that of `more`."""
    taken = {name.lower() for name in more}
    return {**{name: value for name, value in headers.items() if name.lower() not in taken}, **more}


def _trace_headers(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """W3C trace context as headers (observability.md section 2), where proxies on the way see it too."""
    keys = (core.TRACEPARENT_KEY, core.TRACESTATE_KEY)
    return {key.decode(): metadata[key].decode("latin-1") for key in keys if key in metadata}


def _make_sender(base_url: str | None, client: Any) -> tuple[Sender, str]:
    """The sender, and the origin that it talks to as far as it is known."""
    if client is None:
        if base_url is None:
            raise ValueError("http_connect needs a base_url or a client")
        sender = PooledSender(Origin(base_url))
        return sender, str(sender.origin)
    base = (base_url or "").rstrip("/")
    origin = str(Origin(base)) if base else _own_origin(client)
    if hasattr(client, "stream"):
        return HttpxSender(client, base), origin
    if hasattr(client, "post"):
        return SimpleSender(client, base), origin
    raise ValueError(f"client must be an httpx.Client or a test client, got {type(client).__name__}")


def _own_origin(client: Any) -> str:
    with contextlib.suppress(ValueError):
        return str(Origin(str(getattr(client, "base_url", ""))))
    return ""


def _clean_prefix(prefix: str) -> str:
    prefix = prefix.rstrip("/")
    if prefix and (not prefix.startswith("/") or re.search(r"[^!-~]|[?#]", prefix)):
        raise ValueError(f"prefix must be a path such as '/rpc', got {prefix!r}")
    return prefix


def _check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    for name, value in (headers or {}).items():
        if not names.TOKEN.fullmatch(name) or not re.fullmatch(r"[\t -~\x80-\xff]*", value):
            raise ValueError(f"header {name!r}: not a legal name, or its value has control characters")
        if _FRAMING.fullmatch(name):
            raise ValueError(f"header {name!r}: how a request is framed, and where it goes, is not for headers= to say")
    last = {name.lower(): name for name in headers or {}}  # of two spellings
    return {name: value for name, value in (headers or {}).items() if last[name.lower()] == name}


# ---- doors


def http_connect(
    protocol: TypeForm[_P],
    base_url: str | None = None,
    *,
    prefix: str | None = None,
    on_log: Callable[[core.Message], None] | None = None,
    client: Any = None,
    external_location: core.BatchStore | None = None,
    ipc_validation: core.IpcValidation = core.IpcValidation.FULL,
    retry: HttpRetryConfig | None = None,
    compression_level: int | None = 1,
    accepted_max_response_bytes: int | None = names.DEFAULT_MAX_RESPONSE_BYTES,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> contextlib.AbstractContextManager[_P]:
    """Call a service over HTTP; a context manager that gives the typed proxy. Nothing is sent before the first call.

    Args:
        protocol: the service's Protocol class.
        base_url: `http[s]://host[:port][/path]`; certificates are verified as the system does.
        prefix: where the service is mounted; that of the test client by default.
        on_log: receives the Messages that methods send.
        client: an `httpx.Client` (proxies, authentication, other TLS settings) or a test client, used instead of own
            connections and left open at the end.
        external_location: a store for batches and requests that are too large to travel.
        retry: for requests that are safe to repeat: the capability probe and reflection. RPC calls are sent once.
        compression_level: zstd's, for requests of some size; None sends and asks for plain bodies.
        accepted_max_response_bytes: bound on a decoded response, also told to the server, which must confirm it;
            None: no bound is asked for, and what has more than 1 GiB is not read.
        headers: sent with every request, such as `{"Authorization": "Bearer ..."}`.
        timeout: seconds for a whole call, and for each turn of a stream. None waits for as long as the server's host is
            alive (TCP keep-alive; connecting takes 10 s at most), or as long as the timeouts of `client` say.

    Raises:
        ValueError: neither `base_url` nor `client`, or a value that cannot be meant.
    """
    transport = HttpTransport(
        base_url,
        prefix=prefix,
        client=client,
        headers=headers,
        retry=retry,
        compression_level=compression_level,
        accepted_max_response_bytes=accepted_max_response_bytes,
        external_location=external_location,
    )
    return core.RpcConnection(
        protocol,
        transport,
        on_log,
        ipc_validation=ipc_validation,
        timeout=timeout,
        external_location=external_location,
    )


def http_introspect(
    base_url: str | None = None,
    *,
    prefix: str | None = None,
    client: Any = None,
    ipc_validation: core.IpcValidation = core.IpcValidation.FULL,
    retry: HttpRetryConfig | None = None,
    accepted_max_response_bytes: int | None = names.DEFAULT_MAX_RESPONSE_BYTES,
    external_location: core.BatchStore | None = None,
    headers: Mapping[str, str] | None = None,
) -> core.ServiceDescription:
    """Describe the first application protocol of a server; the parameters are those of `http_connect`.

    Raises ReflectionNotSupportedError when the server does not describe itself, ValueError when it hosts none.
    """
    transport = HttpTransport(
        base_url,
        prefix=prefix,
        client=client,
        headers=headers,
        retry=retry,
        accepted_max_response_bytes=accepted_max_response_bytes,
        external_location=external_location,
    )
    with contextlib.closing(transport):
        return core.introspect(transport, ipc_validation, external_location=external_location)


def http_capabilities(
    base_url: str | None = None,
    *,
    prefix: str | None = None,
    client: Any = None,
    retry: HttpRetryConfig | None = None,
    accepted_max_response_bytes: int | None = None,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 30.0,
) -> HttpServerCapabilities:
    """Ask a server what it can do: the headers of `OPTIONS {prefix}/health`. The parameters are `http_connect`'s."""
    transport = HttpTransport(
        base_url,
        prefix=prefix,
        client=client,
        headers=headers,
        retry=retry,
        accepted_max_response_bytes=accepted_max_response_bytes,
    )
    with contextlib.closing(transport):
        return transport.capabilities(timeout)
