# Needs: pyarrow only. Used by client.py.
"""HTTP/1.1 as the client needs it: whole requests and whole responses, over three kinds of clients.

    PooledSender   kept-alive sockets of our own to one origin: the default, because an RPC call is mostly HTTP library
    HttpxSender    an httpx client of the user's (or one that looks like it), streamed so that responses stay bounded
    SimpleSender   anything with post(url, content=, headers=), such as the test client

A sender raises ConnectionLostError and DeadlineExceededError only, with `.sent` as far as it is known; what the
status means is the caller's business.
"""

from __future__ import annotations

import base64
import contextlib
import math
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from .. import core as _bound_core
from ..common import net
from ..common.names import TOKEN

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

Piece: TypeAlias = "bytes | pa.Buffer"
Sent = Literal["no", "maybe", "answered"]

_MAX_HEAD = 65_536  # bytes of status line and headers
_MAX_INTERIM = 8  # 1xx responses before the real one
_MAX_CHUNK_LINE = 256
_MAX_IDLE = 32  # connections kept for later
_JOIN = 65_536  # bodies up to here travel in the same write as the head
_READ = 65_536  # bytes of one read when the size is not known
_READ_BODY = 1 << 20
_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n\0]*)?")
_DIGITS = re.compile(r"[0-9]{1,18}")
_HEX = re.compile(rb"[0-9A-Fa-f]{1,16}")


class Response(NamedTuple):
    """A response as it was on the wire; header names in lower case, repeated ones joined with ", "."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    too_large: bool = False  # the body is longer than the caller allows; it was not read


class Request(NamedTuple):
    """What to send. `limit` bounds the response's body as it travels; `deadline` is monotonic."""

    verb: str
    path: str
    headers: Mapping[str, str]
    pieces: Sequence[Piece]
    limit: int
    deadline: float | None
    doing: str
    replay_safe: bool = False


class Sender(Protocol):
    """One request, one response; safe to be used by several threads."""

    def send(self, request: Request) -> Response:
        """Send it and read the response to its end."""
        ...

    def close(self) -> None:
        """Let go of what this sender owns; idempotent."""
        ...


def deadline_of(timeout: float | None) -> float | None:
    """The monotonic time at which `timeout` seconds from now have passed; None: never."""
    return None if timeout is None else time.monotonic() + timeout


def closed() -> core.ConnectionLostError:
    """The error of a request after `close()`."""
    return core.ConnectionLostError("this connection is closed; connect again", sent="no")


def lost(exc: BaseException, doing: str, sent: Sent) -> core.RpcError:
    """The error of an exception that ended a request: a deadline, or a lost connection."""
    if isinstance(exc, core.RpcError):
        return exc
    text = core.exception_str(exc) or type(exc).__name__
    if isinstance(exc, TimeoutError):
        found: core.RpcError = core.DeadlineExceededError(f"{doing} did not finish in time: {text}", sent=sent)
    else:
        found = core.ConnectionLostError(f"Transport failed during {doing}: {text}", sent=sent)
    found.__cause__ = exc
    return found


class _Malformed(ValueError):
    """The peer does not speak HTTP/1.1, or not to its end."""


class _Stale(Exception):
    """A kept-alive connection turned out to be closed; `safe`: not a byte of the request was taken."""

    def __init__(self, cause: BaseException, safe: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.safe = safe


# ---- our own connections


class Origin:
    """Where a URL points: scheme, host, port, and the credentials it carries, which no text shows."""

    def __init__(self, url: str) -> None:
        """ValueError for anything but http(s)://[user:password@]host[:port][/path]."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as exc:
            raise ValueError(f"not a usable URL: {exc}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the URL must begin with http:// or https:// and name a host")
        if parts.query or parts.fragment or re.search(r"[^\x21-\x7e]", url):
            raise ValueError("the URL must have no query, no fragment, and no characters outside of printable ASCII")
        self.tls = parts.scheme == "https"
        self.host = parts.hostname
        self.port = port or (443 if self.tls else 80)
        self.path = parts.path.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.authority = host if port is None else f"{host}:{port}"
        self.authorization = ""
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self.authorization = "Basic " + base64.b64encode(secret.encode()).decode()

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}"


class PooledSender:
    """Kept-alive connections to one origin. Each request has one for itself, so threads do not queue."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._context = net.tls_context() if origin.tls else None
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._live: set[_Connection] = set()
        self._closed = False
        self._head = f"Host: {origin.authority}\r\n"
        if origin.authorization:
            self._head += f"Authorization: {origin.authorization}\r\n"

    def leave_authorization(self) -> None:
        """Send no credentials of the URL: the requests have others."""
        self._head = f"Host: {self.origin.authority}\r\n"

    def send(self, request: Request) -> Response:
        """Send on an idle connection or a new one. What never left is sent again, once; nothing else is."""
        connection = self._borrow()
        if connection is not None:
            try:
                return self._converse(connection, request, fresh=False)
            except _Stale as exc:
                if not exc.safe and not request.replay_safe:
                    raise lost(exc.cause, request.doing, "maybe") from exc.cause
        return self._converse(self._connect(request), request, fresh=True)

    def close(self) -> None:
        """Close what is idle and wake what is under way."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = self._live.difference(idle)
            self._live.clear()
        for connection in idle:
            connection.close()
        for connection in busy:
            connection.wake()

    def abandon(self) -> None:
        """In the child of a fork: close the copies of the descriptors and say nothing to the peer."""
        self._closed = True
        live, self._idle, self._live = self._live, [], set()
        for connection in live:
            connection.close()

    def _converse(self, connection: _Connection, request: Request, *, fresh: bool) -> Response:
        try:
            response = connection.exchange(request, self._head, fresh)
        except BaseException as exc:
            self._drop(connection)
            if isinstance(exc, _Stale) or not isinstance(exc, Exception):
                raise
            if self._closed:
                exc = core.ConnectionLostError(f"{request.doing}: the connection was closed", sent=connection.sent)
            raise lost(exc, request.doing, connection.sent) from exc
        self._give_back(connection)
        return response

    def _borrow(self) -> _Connection | None:
        while True:
            with self._lock:
                if self._closed:
                    raise closed()
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if connection.quiet():
                return connection
            self._drop(connection)

    def _connect(self, request: Request) -> _Connection:
        try:
            connection = _Connection(self.origin, self._context, request.deadline)
        except (OSError, ValueError) as exc:
            doing = f"{request.doing}: connecting to {self.origin}"
            if isinstance(exc, ConnectionRefusedError):
                doing += f" (is the server running? start it with --http --port {self.origin.port})"
            if "WRONG_VERSION_NUMBER" in str(exc):
                doing += " (it does not speak TLS: is it http://?)"
            raise lost(exc, doing, "no") from exc
        with self._lock:
            if not self._closed:
                self._live.add(connection)
                return connection
        connection.close()
        raise closed()

    def _give_back(self, connection: _Connection) -> None:
        with self._lock:
            if connection.reusable and not self._closed and len(self._idle) < _MAX_IDLE:
                self._idle.append(connection)
                return
        self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        with self._lock:
            self._live.discard(connection)
        connection.close()


class _Connection:
    """One socket, used by one request at a time."""

    def __init__(self, origin: Origin, context: ssl.SSLContext | None, deadline: float | None) -> None:
        # A call without a timeout has no other bound than life, once it is connected.
        until = min(time.monotonic() + net.CONNECT_SECONDS, math.inf if deadline is None else deadline)
        sock = net.connect(origin.host, origin.port, until)
        _tune(sock)
        self._sock = sock if context is None else net.start_tls(sock, context, origin.host, until)
        self._buf = b""
        self._deadline: float | None = None
        self._poll = select.poll()
        self._poll.register(self._sock, select.POLLIN)
        self.sent: Sent = "no"
        self.reusable = False

    def quiet(self) -> bool:
        """Whether an idle connection is still open: all that can arrive now is its end."""
        return not self._poll.poll(0)

    def wake(self) -> None:
        """End a request of another thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not SSLSocket's own, which forgets its state

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def exchange(self, request: Request, head: str, fresh: bool) -> Response:
        """Send and receive. Afterwards `reusable` says whether the connection can be kept."""
        self.reusable = False
        self.sent = "no"
        self._deadline = request.deadline
        if request.deadline is None:
            self._sock.settimeout(None)
        early = self._write(request, head, fresh)
        try:
            self._more()
        except (EOFError, ConnectionError) as exc:
            if early is not None:
                raise early from None
            raise exc if fresh else _Stale(exc, safe=False) from exc
        response, keep = self._read(request.verb, request.limit)
        self.reusable = keep and early is None and not self._buf
        return response

    def _write(self, request: Request, head: str, fresh: bool) -> OSError | None:
        """Send it. Returns the error of a peer that stopped reading, which may have answered before it did."""
        size = sum(map(len, request.pieces))
        lines = [f"{request.verb} {request.path} HTTP/1.1\r\n{head}"]
        lines += [f"{name}: {value}\r\n" for name, value in request.headers.items()]
        lines.append(f"Content-Length: {size}\r\n\r\n")
        first = "".join(lines).encode("latin-1")
        rest: Sequence[Piece] = request.pieces
        if size <= _JOIN:
            first, rest = b"".join((first, *request.pieces)), ()
        self._arm()
        try:
            done = self._sock.send(first)
        except (BrokenPipeError, ConnectionResetError) as exc:  # not a byte of it was taken
            raise exc if fresh else _Stale(exc, safe=True) from exc
        self.sent = "maybe"
        try:
            for piece in (memoryview(first)[done:], *rest):
                if len(piece):
                    self._arm()
                    self._sock.sendall(piece)
        except (BrokenPipeError, ConnectionResetError) as exc:
            return exc
        return None

    def _read(self, verb: str, limit: int) -> tuple[Response, bool]:
        for _ in range(_MAX_INTERIM):
            version, status, headers = self._read_head()
            if status >= 200:
                break
        else:
            raise _Malformed(f"more than {_MAX_INTERIM} interim responses")
        keep = version == 1 and "close" not in headers.get("connection", "").lower()
        coding, length = headers.get("transfer-encoding"), headers.get("content-length")
        if verb == "HEAD" or status in (204, 304):
            return Response(status, headers, b""), keep
        if coding is not None:
            if coding.lower() != "chunked" or length is not None:
                raise _Malformed("Transfer-Encoding is not chunked alone, or comes with a Content-Length")
            body = self._read_chunks(limit)
        elif length is not None:
            if _DIGITS.fullmatch(length) is None:
                raise _Malformed(f"Content-Length is {length[:40]!r}")
            body = self._take(int(length)) if int(length) <= limit else None
        else:
            keep, body = False, self._read_to_end(limit)
        if body is None:
            return Response(status, headers, b"", too_large=True), False
        return Response(status, headers, body), keep

    def _read_head(self) -> tuple[int, int, dict[str, str]]:
        while (end := self._buf.find(b"\r\n\r\n")) < 0 and len(self._buf) <= _MAX_HEAD:
            if not b"HTTP/1.".startswith(self._buf[:7]):
                arrow = self._buf.startswith(b"\xff\xff\xff\xff"[: len(self._buf)])
                hint = " (bytes of a --tcp worker, whose client is tcp_connect)" * arrow
                raise _Malformed(f"not an HTTP/1.1 response: {self._buf[:16]!r}{hint}")
            self._more()
        if not 0 <= end <= _MAX_HEAD:
            raise _Malformed(f"the response's headers have more than {_MAX_HEAD} bytes")
        first, *lines = self._buf[:end].split(b"\r\n")
        self._buf = self._buf[end + 4 :]
        match = _STATUS.fullmatch(first)
        if match is None:
            raise _Malformed(f"not an HTTP/1.1 response: {first[:16]!r}")
        return int(match[1]), int(match[2]), _join_headers(map(_parse_header, lines))

    def _read_chunks(self, limit: int) -> bytes | None:
        body = bytearray()  # a list of tiny chunks would take many times the limit
        while True:
            line = self._line()
            digits = line.partition(b";")[0].rstrip(b" \t")
            if _HEX.fullmatch(digits) is None:
                raise _Malformed(f"a chunk begins with {line[:20]!r}")
            size = int(digits, 16)
            if size == 0:
                break
            if len(body) + size > limit:
                return None
            body += self._take(size)
            if self._take(2) != b"\r\n":
                raise _Malformed("a chunk does not end where it says")
        for _ in range(100):  # trailers, which nobody needs
            if not self._line():
                return bytes(body)
        raise _Malformed("too many trailers")

    def _read_to_end(self, limit: int) -> bytes | None:
        chunks, total = [self._buf], len(self._buf)
        self._buf = b""
        while total <= limit:
            self._arm()
            data = self._sock.recv(_READ)
            if not data:
                return b"".join(chunks)
            chunks.append(data)
            total += len(data)
        return None

    def _line(self) -> bytes:
        while (end := self._buf.find(b"\r\n")) < 0:
            if len(self._buf) > _MAX_CHUNK_LINE:
                raise _Malformed("a chunk's first line is too long")
            self._more()
        line, self._buf = self._buf[:end], self._buf[end + 2 :]
        return line

    def _take(self, size: int) -> bytes:
        """Consume `size` bytes; memory grows as they arrive."""
        buf = self._buf
        if len(buf) >= size:
            self._buf = buf[size:]
            return buf if len(buf) == size else buf[:size]
        self._buf = b""
        chunks, left = [buf], size - len(buf)
        while left:
            self._arm()
            data = self._sock.recv(min(left, _READ_BODY))
            if not data:
                raise EOFError(f"the response's body ends {left} bytes early")
            chunks.append(data)
            left -= len(data)
        return b"".join(chunks)

    def _more(self) -> None:
        self._arm()
        data = self._sock.recv(_READ)
        if not data:
            raise EOFError("the server closed the connection" + (" in the middle of a response" if self._buf else ""))
        self._buf = self._buf + data if self._buf else data

    def _arm(self) -> None:
        if self._deadline is not None:
            self._sock.settimeout(_left(self._deadline))


def _tune(sock: socket.socket) -> None:
    """No delay for small requests, and a bound on waiting for a host that is gone: it answers probes or it is dead."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("its timeout has passed")
    return left


def _parse_header(line: bytes) -> tuple[str, str]:
    name, colon, value = line.decode("latin-1").partition(":")
    if not colon or TOKEN.fullmatch(name) is None:
        raise _Malformed(f"not a header line: {line[:40]!r}")
    return name, value.strip(" \t")


def _join_headers(items: Iterable[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in items:
        key = name.lower()
        found[key] = f"{found[key]}, {value}" if key in found else value
    return found


# ---- clients of the user's


class _LentSender:
    """A client that its owner closes; the URLs of its requests begin with `base`."""

    def __init__(self, client: Any, base: str) -> None:
        self._client = client
        self._base = base

    def close(self) -> None:
        """Leave the client to its owner."""


class SimpleSender(_LentSender):
    """A client with `post` and `options` whose responses have `status_code`, `headers` and a decoded `content`."""

    def send(self, request: Request) -> Response:
        """Send it; a deadline is not kept, since the client runs the server in this very thread."""
        url = self._base + request.path
        try:
            if request.verb == "POST":
                got = self._client.post(url, content=b"".join(request.pieces), headers=dict(request.headers))
            else:
                got = getattr(self._client, request.verb.lower())(url, headers=dict(request.headers))
        except Exception as exc:
            raise lost(exc, request.doing, "maybe") from exc
        headers = {name.lower(): value for name, value in got.headers.items()}
        headers.pop("content-encoding", None)
        return Response(got.status_code, headers, got.content, too_large=len(got.content) > request.limit)


class HttpxSender(_LentSender):
    """An httpx client, with its own pool, proxies, authentication and default timeouts."""

    def send(self, request: Request) -> Response:
        """Send it. Without a deadline the client's own timeouts apply; with one, each of its waits is bounded by it."""
        settings: dict[str, Any] = {"headers": dict(request.headers), "follow_redirects": False}
        if request.pieces:
            settings["content"] = b"".join(request.pieces)
        sent: Sent = "no"
        try:
            if request.deadline is not None:
                settings["timeout"] = _left(request.deadline)
            sent = "maybe"
            with self._client.stream(request.verb, self._base + request.path, **settings) as got:
                headers = _join_headers(got.headers.multi_items())
                body = _bounded(got.iter_raw, request.limit, request.deadline)
                return Response(got.status_code, headers, body or b"", too_large=body is None)
        except Exception as exc:
            raise _httpx_lost(exc, request.doing, sent) from exc


def _bounded(iterate: Callable[[], Any], limit: int, deadline: float | None) -> bytes | None:
    body = bytearray()
    for chunk in iterate():
        if len(body) + len(chunk) > limit:
            return None
        body += chunk
        if deadline is not None:
            _left(deadline)
    return bytes(body)


# By name, so that httpx and its forks are treated alike without importing any of them.
_HTTPX_UNSENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError", "InvalidURL"}


def _httpx_lost(exc: Exception, doing: str, sent: Sent) -> core.RpcError:
    names = {cls.__name__ for cls in type(exc).__mro__}
    if names & _HTTPX_UNSENT:
        sent = "no"
    if "TimeoutException" in names:
        return core.DeadlineExceededError(f"{doing} did not finish in time: {type(exc).__name__}", sent=sent)
    return lost(exc, doing, sent)
