# Needs: pyarrow only; httpx when a client of it is passed in. Install: pip install 'vgi-rpc-onefile[http]'.
# Seam: RequestTransport.
"""Calls over HTTP (http.md section 15).

    with http_connect(Calculator, "https://example.com/rpc") as calc:
        calc.add(1.0, 2.0)

    _connection.py    bytes: one request, one response
    session_view.py   what requests of a sticky session carry besides, and what their responses say of it
    HttpTransport     what the status, the headers and the coding of a response mean
    HttpStreamSession how a stream goes on from request to request: the server's state travels in tokens

Binding, encoding, reading and every error of the far side are the core's, as on all other transports. RPC calls are
sent once: only what is safe to repeat (the capability probe, reflection) follows an HttpRetryConfig.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import email.utils
import functools
import logging
import os
import random
import re
import struct
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import pyarrow as pa

from .. import core as _bound_core
from ..auth.unauthorized import AuthenticationError, printable, read_unauthorized
from . import coding, names
from ._connection import (
    HttpxSender,
    Origin,
    Piece,
    PooledSender,
    Request,
    Response,
    Sender,
    Sent,
    SimpleSender,
    closed,
    deadline_of,
)
from .session_view import SessionView, with_session_token

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
_SUPPORT = names.ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER.lower()


# ---- errors


class HttpTransientError(core.RpcError):
    """The server, or something in front of it, says that trying again later may help.

    Attributes:
        status_code: 429, 502, 503 or 504.
        retry_after: seconds to wait, if it said so.
    """

    def __init__(self, status_code: int, body_preview: str, retry_after: float | None = None) -> None:
        details = [] if retry_after is None else [core.RetryInfo(retry_after).to_json()]
        shown = f": {body_preview}" if body_preview else ""
        later = "" if retry_after is None else f"; try again in {retry_after:g} s"
        sent: Sent = "maybe" if status_code in (502, 504) else "answered"  # a gateway knows less than a server
        super().__init__(
            "HttpTransientError",
            f"HTTP {status_code}{shown}{later}",
            error_code=core.Code.RESOURCE_EXHAUSTED if status_code == 429 else core.Code.UNAVAILABLE,
            error_details=details,
            sent=sent,
        )
        self.status_code = status_code
        self.body_preview = body_preview
        self.retry_after = retry_after


def _unauthorized(response: Response) -> AuthenticationError:
    headers = response.headers
    request_id = printable(headers.get(names.REQUEST_ID_HEADER.lower(), ""), 128)
    body = b"" if "content-encoding" in headers else response.body
    return read_unauthorized(body, headers, request_id=request_id)


# ---- retries


@dataclasses.dataclass(frozen=True)
class HttpRetryConfig:
    """How often, and how patiently, requests that are safe to repeat are repeated; RPC calls never are.

    Args:
        max_retries: attempts after the first.
        backoff_base: seconds; the n-th pause is a random part of `backoff_base * 2**n`.
        backoff_max: no pause is longer.
        retryable_status_codes: HTTP statuses that are worth another attempt.
        retry_on_connection_error: also repeat what found no server, or got no answer.
        respect_retry_after: wait at least as long as the server asks for, up to `backoff_max`.
    """

    max_retries: int = 3
    backoff_base: float = 0.5
    backoff_max: float = 30.0
    retryable_status_codes: frozenset[int] = _GATEWAY_STATUS
    retry_on_connection_error: bool = True
    respect_retry_after: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("max_retries", "backoff_base", "backoff_max"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait before the attempt that follows attempt number `attempt` (0 is the first)."""
        pause = min(random.uniform(0, self.backoff_base * 2.0 ** min(attempt, 60)), self.backoff_max)
        if retry_after is not None and self.respect_retry_after:
            pause = max(pause, min(retry_after, self.backoff_max))
        return pause

    def worth_another(self, exc: core.RpcError) -> bool:
        """Whether this failure may go away by itself."""
        if isinstance(exc, HttpTransientError):
            return exc.status_code in self.retryable_status_codes
        lost = isinstance(exc, core.ConnectionLostError | core.DeadlineExceededError)
        return lost and self.retry_on_connection_error and exc.sent != "answered"


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header: a number, or a date (RFC 9110 section 10.2.3)."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _repeated(config: HttpRetryConfig, deadline: float | None, attempt_once: Callable[[], _T]) -> _T:
    attempt = 0
    while True:
        try:
            return attempt_once()
        except core.RpcError as exc:
            if attempt >= config.max_retries or not config.worth_another(exc):
                raise
            pause = config.delay(attempt, getattr(exc, "retry_after", None))
            if deadline is not None and time.monotonic() + pause >= deadline:
                raise
            _LOG_RETRY.debug("attempt %d failed (%s); the next in %.2f s", attempt + 1, exc.error_type, pause)
        time.sleep(pause)
        attempt += 1


# ---- what a server says about itself


@dataclasses.dataclass(frozen=True)
class HttpServerCapabilities:
    """What the headers of `OPTIONS {prefix}/health` say (http.md section 10); None is "not said"."""

    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    max_externalized_response_bytes: int | None = None
    externalization_enabled: bool = False
    upload_url_support: bool = False
    max_upload_bytes: int | None = None
    supported_encodings: tuple[coding.Encoding, ...] = (coding.Encoding.ZSTD,)
    cache_expires_at: float | None = None
    sticky_enabled: bool = False
    sticky_default_ttl: int | None = None
    sticky_echo_headers: tuple[str, ...] = ()
    accept_max_response_bytes_support: bool = False


def _capabilities(headers: Mapping[str, str]) -> HttpServerCapabilities:
    def text(name: str) -> str:
        return headers.get(name.lower(), "")

    def integer(name: str) -> int | None:
        value = text(name)
        return int(value) if re.fullmatch(r"[0-9]{1,16}", value) else None

    def flag(name: str) -> bool:
        return text(name).lower() == "true"

    age = re.search(r"max-age=([0-9]{1,9})", text("Cache-Control"))
    echo = [name.strip() for name in text(names.STICKY_ECHO_HEADERS_HEADER).split(",")]
    return HttpServerCapabilities(
        max_request_bytes=integer(names.MAX_REQUEST_BYTES_HEADER),
        max_response_bytes=integer(names.MAX_RESPONSE_BYTES_HEADER),
        max_externalized_response_bytes=integer(names.MAX_EXTERNALIZED_RESPONSE_BYTES_HEADER),
        externalization_enabled=flag(names.EXTERNALIZATION_ENABLED_HEADER),
        upload_url_support=flag(names.UPLOAD_URL_HEADER),
        max_upload_bytes=integer(names.MAX_UPLOAD_BYTES_HEADER),
        supported_encodings=_supported(headers.get(names.SUPPORTED_ENCODINGS_HEADER.lower())),
        cache_expires_at=time.monotonic() + int(age[1]) if age else None,
        sticky_enabled=flag(names.STICKY_ENABLED_HEADER),
        sticky_default_ttl=integer(names.STICKY_DEFAULT_TTL_HEADER),
        sticky_echo_headers=tuple(name for name in echo if name),
        accept_max_response_bytes_support=_accepts_limit(headers),
    )


def _supported(value: str | None) -> tuple[coding.Encoding, ...]:
    """Absent: an old server, which knows zstd; empty: none; only unknown ones: as if absent."""
    if value is None:
        return (coding.Encoding.ZSTD,)
    known = tuple(coding.parse_encoding_list(value))
    return known if known or not value.strip() else (coding.Encoding.ZSTD,)


def _accepts_limit(headers: Mapping[str, str]) -> bool:
    return headers.get(_SUPPORT) == "true"  # exactly once: a repeated header is "true, true" here


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
        self._own_headers = {**_check_headers(headers), "User-Agent": f"vgi-rpc/{core.__version__}"}
        if self._limit is not None:
            self._own_headers[names.ACCEPT_MAX_RESPONSE_BYTES_HEADER] = str(self._limit)
        packs = compression_level is not None
        self._headers = {"Content-Type": names.ARROW_CONTENT_TYPE, **self._own_headers}
        self._headers["Accept-Encoding"] = ", ".join(coding.available_encodings()) if packs else "identity"
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
        return _repeated(self._retry, deadline, lambda: self._post(path, pieces, deadline, doing, replay_safe=True))

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
        return _repeated(self._retry, deadline, lambda: self._post(path, (body,), deadline, doing, replay_safe=True))

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
        return _repeated(self._retry, deadline, lambda: self._probe_once(deadline))

    def _probe_once(self, deadline: float | None) -> HttpServerCapabilities:
        doing = "capability probe"
        request = Request(
            "OPTIONS", f"{self._prefix}/health", self._own_headers, (), _MAX_PROBE_BYTES, deadline, doing, True
        )
        response = self._exchange(request)
        if not 200 <= response.status < 300:
            raise _refusal(response, doing, "ProtocolError")
        self._known = found = _capabilities(response.headers)
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
            raise _no_support(doing, "no")
        pieces, shrunk = self._fit(pieces, doing)
        response, packed = self._send(path, pieces, deadline, doing, metadata, replay_safe)
        if response.status == 415 and packed and not _is_arrow(response):
            self._known = _capabilities(response.headers)
            response, _ = self._send(path, pieces, deadline, doing, metadata, replay_safe, refused=packed)
        elif response.status == 413 and not shrunk:
            self._known = _capabilities(response.headers)
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
            raise _too_large(f"{doing}: the request has {size} bytes", known.max_request_bytes, "no")
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
        body = b"".join(pieces)
        if len(body) > 2 * _SAMPLE:
            sample = body[_SAMPLE : 2 * _SAMPLE]
            if len(coding.compress(encoding, sample, level=self._level)) > 0.9 * _SAMPLE:
                return (body,), None
        packed = coding.compress(encoding, body, level=self._level)
        return ((packed,), encoding) if len(packed) < len(body) else ((body,), None)

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
            raise core.RpcError(
                "HttpError", f"{doing}: HTTP {response.status} redirects to another server; connect to that one"
            )
        return quote(target.path, safe="/%._~!$&'()*+,;=:@-")

    def _body(self, response: Response, doing: str) -> bytes:
        if response.status == 401:
            raise _refusal(response, doing, "HttpError")
        if response.too_large:
            raise self._response_too_large(doing)
        if not _is_arrow(response):
            raise _refusal(response, doing, "HttpError")
        if self._limit is not None and not _accepts_limit(response.headers):
            raise _no_support(doing, "answered")
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
        return core.RpcError(
            "ResponseTooLargeError",
            f"{doing}: the response is larger than accepted_max_response_bytes={self._limit}",
            error_code=core.Code.RESOURCE_EXHAUSTED,
        )


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
    return dict(headers or {})


def _is_arrow(response: Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() == names.ARROW_CONTENT_TYPE


def _refusal(response: Response, doing: str, error_type: str) -> core.RpcError:
    """The error of a response that holds no Arrow body: a gateway's, a login page, a JSON error."""
    status = response.status
    if status == 401:
        return _unauthorized(response)
    if status == 413:
        return _too_large(f"{doing}: HTTP 413", _capabilities(response.headers).max_request_bytes, "answered")
    preview = ""
    if status != 403 and "content-encoding" not in response.headers:
        preview = printable(response.body[: 4 * _PREVIEW].decode("utf-8", "replace"), _PREVIEW)
    if status in _GATEWAY_STATUS:
        return HttpTransientError(status, preview, _retry_after(response.headers))
    sent: Sent = "maybe" if status >= 500 else "answered"
    kind = printable(response.headers.get("content-type", "no content type"), 80)
    if "html" in kind:
        preview = f"{preview[:40]} (a web page, not a service: check the URL and its prefix, prefix= or --prefix)"
    return core.RpcError(error_type, f"{doing}: HTTP {status} ({kind}): {preview or '(no text)'}", sent=sent)


def _too_large(what: str, limit: int | None, sent: Sent) -> core.RpcError:
    return core.RpcError(
        "RequestTooLarge",
        f"{what}; the server takes {'less' if limit is None else limit} and the request was not uploaded"
        " (external_location= and a server that vends upload URLs allow more)",
        error_code=core.Code.RESOURCE_EXHAUSTED,
        sent=sent,
    )


def _no_support(doing: str, sent: Sent) -> core.RpcError:
    return core.RpcError(
        "ProtocolError",
        f"{doing}: the server does not confirm {names.ACCEPT_MAX_RESPONSE_BYTES_HEADER}, so its responses are"
        " unbounded; accepted_max_response_bytes=None talks to it nevertheless",
        sent=sent,
    )


# ---- streams


def _untouched(exc: BaseException) -> bool:
    """Whether a turn that failed did not take place: nothing was sent, or it was refused at the door (429, 503)."""
    if not isinstance(exc, core.RpcError):
        return False
    return exc.sent == "no" or (exc.sent == "answered" and isinstance(exc, HttpTransientError))


class HttpStreamSession(core.StreamSession):
    """A stream over HTTP: each turn is a request that carries the server's state back to it (http.md section 7).

    It holds no connection, so any number may be open at once; closing one costs nothing. Not for several threads. A
    turn that was refused before it began (429, 503) or never left can be asked for again; other errors are the end.
    """

    def __init__(
        self,
        transport: HttpTransport,
        call: core.StreamCall,
        opening: core.StreamReply | None,
        output_schema: pa.Schema | None = None,
    ) -> None:
        """`opening` is the answer to `/init`; None for a session that a resume token will place."""
        super().__init__()
        self._transport = transport
        self._call = call
        self._schema = output_schema
        self._state: bytes | None = None  # where the stream is; a new one every turn
        self._call_state: bytes | None = None  # what never changes; issued once
        self._pending: collections.deque[core.AnnotatedBatch] = collections.deque()
        self._error: Exception | None = None  # what came after the pending batches
        self._over = False
        self._closed = False  # by the caller
        if opening is not None:
            self.header = opening.header
            self._absorb(opening)
            if self._error is not None and self.header is None and not self._pending:
                self._raise_error()

    def tick(
        self, custom_metadata: pa.KeyValueMetadata | None = None, *, timeout: float | None = _UNSET
    ) -> core.AnnotatedBatch:
        """Ask a producer for its next batch; StopIteration at its end.

        ValueError for metadata when the batch is here already, made without it.
        """
        if self._pending and custom_metadata is not None:
            raise ValueError("a batch that was produced without this metadata is waiting; take it first")
        self._check_open()
        if not self._advance(custom_metadata, timeout):
            raise StopIteration
        return self._pending.popleft()

    def exchange(self, input: core.AnnotatedBatch, *, timeout: float | None = _UNSET) -> core.AnnotatedBatch:
        """Send one batch and return the one that answers it."""
        self._check_open()
        if self._error is not None:
            self._raise_error()
        name = self._call.info.name
        if self._state is None:
            raise core.RpcError("ProtocolError", f"{name}(): the server has given no state to go on from", sent="no")
        self._turn("stream exchange", input.batch, input.custom_metadata, timeout, answers=True)
        if self._error is not None:
            self._raise_error()
        if len(self._pending) != 1:
            self._over = True
            raise core.RpcError(
                "ProtocolError", f"{name}(): the server answered with {len(self._pending)} batches, not one"
            )
        return self._pending.popleft()

    def to_reader(self) -> pa.RecordBatchReader:
        """Return the rest of a producer as a reader; a session can be exported once, and not when it is closed."""
        if self._closed:
            self._check_open()
        return super().to_reader()

    def __iter__(self) -> Iterator[core.AnnotatedBatch]:
        if self._closed:
            self._check_open()
        while not self._over:
            try:
                item = self.tick()
            except StopIteration:
                return
            yield item

    def next_with_token(
        self, custom_metadata: pa.KeyValueMetadata | None = None
    ) -> tuple[core.AnnotatedBatch | None, bytes | None]:
        """Return a producer's next batch, and a token from which the stream goes on after it; (None, None) at its end.

        The token is opaque, good for any replica of the server, and None after the last batch.
        """
        if self._over:
            return None, None
        try:
            item = self.tick(custom_metadata)
        except StopIteration:
            return None, None
        if self._pending:
            self._over = True
            raise core.RpcError("ProtocolError", "several batches in one response: there is no token between them")
        return item, self._token()

    def seek_to_token(self, token: bytes) -> None:
        """Go on from a token that `next_with_token` gave; ValueError for anything else."""
        size = struct.unpack_from("<I", token)[0] if len(token) > 4 else 0
        if not 0 < size < len(token) - 4:
            raise ValueError("not a resume token")
        self._state, self._call_state = bytes(token[4 : 4 + size]), bytes(token[4 + size :])
        self._pending.clear()
        self._error = None
        self._over = self._closed = False

    def close(self) -> None:
        """Forget the stream; the server holds nothing of it. Raises an error of a stream that was never read."""
        self._over = self._closed = True
        self._pending.clear()
        if self._error is not None:
            self._raise_error()

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        if kind is not None:
            self._error = None
        self.close()

    def cancel(self) -> None:
        """Tell the server that nobody will go on (its `on_cancel` runs); never raises what the far side does."""
        state, over = self._state, self._over
        self._over = self._closed = True
        self._pending.clear()
        self._error = None
        if state is None or over:
            return
        with contextlib.suppress(core.RpcError):
            self._post("stream cancel", core.empty_batch(core.EMPTY_SCHEMA), {core.CANCEL_KEY: b"1"}, _UNSET)

    @property
    def schema(self) -> pa.Schema:
        """The stream's output schema; a resumed session may have to read, and keep for later, the first batch."""
        if self._schema is None:
            self._advance(None, _UNSET)
        return self._schema

    # -- below here: turns

    def _check_open(self) -> None:
        if self._over:
            raise core.RpcError("ProtocolError", "Stream has been closed or cancelled", sent="no")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        self._over = True
        assert error is not None
        raise error

    def _advance(self, metadata: pa.KeyValueMetadata | None, timeout: float | None) -> bool:
        """Tick until a batch is pending; False at the end."""
        seconds = self._call.timeout if timeout is _UNSET else self._call.check_timeout(timeout)
        deadline = deadline_of(seconds)
        while not self._pending:
            if self._error is not None:
                self._raise_error()
            if self._state is None:
                self._over = True
                return False
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-6)
            self._turn("stream tick", core.empty_batch(core.EMPTY_SCHEMA), metadata, left)
        return True

    def _turn(
        self,
        doing: str,
        batch: pa.RecordBatch,
        metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None,
        timeout: float | None,
        *,
        answers: bool = False,
    ) -> None:
        try:
            reply = self._call.read_turn(self._post(doing, batch, self._call.encoded(batch, metadata), timeout))
            self._absorb(reply, answers=answers)
        except BaseException as exc:
            self._over = not _untouched(exc)
            raise

    def _post(self, doing: str, batch: pa.RecordBatch, metadata: dict[bytes, bytes], timeout: float | None) -> bytes:
        assert self._state is not None
        metadata[core.STATE_KEY] = self._state
        if self._call_state is not None:
            metadata[core.CALL_STATE_KEY] = self._call_state
        seconds = self._call.timeout if timeout is _UNSET else self._call.check_timeout(timeout)
        if seconds is not None:
            metadata[core.DEADLINE_KEY] = b"%016d" % max(int(seconds * 1e6), 0)
        return self._transport.turn(self._call, self._call.write(batch, metadata), seconds, doing)

    def _absorb(self, reply: core.StreamReply, *, answers: bool = False) -> None:
        """Keep what a turn brought. Tokens are known by their keys, not by rows; an exchange has them on its answer."""
        state = None
        for batch, metadata in reply.batches:
            if metadata and core.STATE_KEY in metadata:
                state = metadata.pop(core.STATE_KEY)
                self._call_state = metadata.pop(core.CALL_STATE_KEY, self._call_state)
                if not answers and batch.num_rows == 0:
                    continue
            self._pending.append(core.AnnotatedBatch(batch, pa.KeyValueMetadata(metadata) if metadata else None))
        self._state = state or (self._state if answers else None)
        self._schema = reply.schema if self._schema is None else self._schema
        self._error = reply.error
        if reply.error is not None and not isinstance(reply.error, core.RpcError):  # on_log raised: it goes first
            self._pending.clear()

    def _token(self) -> bytes | None:
        if self._state is None:
            return None
        return struct.pack("<I", len(self._state)) + self._state + (self._call_state or b"")


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
            None: no bound is asked for.
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
