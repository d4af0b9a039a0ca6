# Needs: httpx (and its httpcore). Install: pip install 'vgi-rpc-onefile[external]' or [oauth].
"""Requests to servers that are not ours, bounded in time and reach: what the storage and the logins fetch with.

    a job      until when, and whether anyone still wants it; every wait of its thread obeys: name, connection, TLS,
               each byte of the headers and of the body
    a pool     connections of httpcore, whose names are resolved once, and connected to as they were checked

httpcore, not an httpx.Client: no cookies, default headers, environment proxies or redirects have to be kept out.
`JobTransport` is for who needs such a client all the same.
"""

from __future__ import annotations

import contextlib
import copy
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import httpcore
import httpx

from . import net

STEP_SECONDS = 0.2  # after which a thread that waits for bytes looks whether it still has to
_READ = 1 << 20  # httpcore asks for 64 KiB; measured: that costs a quarter of the speed


class Job:
    """What is under way: until when, and whether anyone still wants it."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.over = threading.Event()

    def left(self) -> float:
        """Seconds left; raises when there are none, or when the job is over."""
        left = self.deadline - time.monotonic()
        if self.over.is_set():
            raise self.abandoned()
        if left > 0:
            return left
        raise self.expired()

    def expired(self) -> Exception:
        """The error of a job whose time has passed."""
        return TimeoutError(f"it took longer than {self.seconds:g} s")

    def abandoned(self) -> Exception:
        """The error of a job that nobody wants any more."""
        return TimeoutError("no longer wanted")

    def child(self) -> Self:
        """A part of this job, which can be over before it."""
        found = copy.copy(self)
        found.over = threading.Event()
        return found

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Make it the job of this thread, which the connections in use will obey."""
        before = getattr(_thread, "job", None)
        _thread.job = self
        try:
            yield
        finally:
            _thread.job = before


_thread = threading.local()


def pool(
    keep: int, *, allows: Callable[[str], bool] | None = None, refused: Callable[[], Exception] | None = None
) -> httpcore.ConnectionPool:
    """Connections that obey the job of the thread that uses them.

    Args:
        keep: how many are kept for later.
        allows: says which addresses may be connected to; `refused` is the error when a name has no such address.
    """
    return httpcore.ConnectionPool(
        ssl_context=net.tls_context(),
        max_connections=None,
        max_keepalive_connections=keep,
        keepalive_expiry=15.0,
        network_backend=_Backend(allows, refused),
    )


class _Stream(httpcore.NetworkStream):
    """A connection whose waiting ends with the job of the thread that waits."""

    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        while True:
            with contextlib.suppress(httpcore.ReadTimeout):
                return self._inner.read(max(max_bytes, _READ), min(_thread.job.left(), STEP_SECONDS))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _thread.job.left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(
            self._inner.start_tls(ssl_context, server_hostname, min(_thread.job.left(), net.CONNECT_SECONDS))
        )

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Resolves a name once, and connects to what it has checked: no second lookup can bring another address."""

    def __init__(self, allows: Callable[[str], bool] | None, refused: Callable[[], Exception] | None) -> None:
        self._allows = allows
        self._refused = refused
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        deadline = time.monotonic() + min(_thread.job.left(), net.CONNECT_SECONDS)
        try:
            addresses = net.addresses(host, port, deadline, self._allows)
        except PermissionError as exc:
            raise (self._refused() if self._refused else httpcore.ConnectError(str(exc))) from None
        except OSError as exc:
            _thread.job.left()
            raise httpcore.ConnectError(f"the host name does not resolve: {exc}") from exc
        failure: Exception = httpcore.ConnectError("no address")
        for at, address in enumerate(addresses):
            try:
                left = min(_thread.job.left(), max(deadline - time.monotonic(), 0.001)) / (len(addresses) - at)
                return _Stream(self._inner.connect_tcp(address, port, left, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                failure = exc
        raise failure


class JobTransport(httpx.BaseTransport):
    """For an httpx.Client: every request is a job of `seconds`, and its answer has at most `max_bytes`.

    It asks for bodies as they are, so no bomb can unfold.

    Args:
        inner: a transport of the user's, when a proxy or other authorities are needed. The waits of its own are then
            bounded one by one only, and the whole by a look at the clock after each.
    """

    def __init__(self, seconds: float, max_bytes: int, inner: httpx.BaseTransport | None = None) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._inner = inner
        self._pool = None if inner is not None else pool(4)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        job = Job(self._seconds)
        try:
            with job.entered():
                response = self._send(request)
                try:
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise httpx.DecodingError("an encoded body was not asked for", request=request)
                    content = self._read(response, job, request)
                finally:
                    response.close()
        except (TimeoutError, httpcore.TimeoutException) as exc:
            raise httpx.ReadTimeout(f"the answer took longer than {self._seconds:g} s", request=request) from exc
        except (httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise httpx.TransportError(str(exc), request=request) from exc
        return httpx.Response(response.status_code, headers=response.headers, content=content, request=request)

    def _send(self, request: httpx.Request) -> httpx.Response:
        if self._pool is None:
            assert self._inner is not None
            return self._inner.handle_request(request)
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        found = self._pool.handle_request(
            httpcore.Request(request.method, target, headers=request.headers.raw, content=request.read())
        )
        assert isinstance(found.stream, Iterable)
        return httpx.Response(found.status, headers=found.headers, stream=_Body(found))

    def _read(self, response: httpx.Response, job: Job, request: httpx.Request) -> bytes:
        assert isinstance(response.stream, httpx.SyncByteStream)
        body = bytearray()
        for chunk in response.stream:
            body += chunk
            job.left()
            if len(body) > self._max_bytes:
                raise httpx.ReadError(f"the answer is larger than {self._max_bytes} bytes", request=request)
        return bytes(body)

    def close(self) -> None:
        """Close what is kept, and the user's transport."""
        if self._inner is not None:
            self._inner.close()
        if self._pool is not None:
            self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        return self._response.iter_stream()

    def close(self) -> None:
        self._response.close()
