# Needs: waitress; granian only when it is asked for. Install: pip install 'vgi-rpc-onefile[http]'.
"""Serve over HTTP until a signal ends it (http.md section 14).

first SIGTERM or SIGINT   new requests get 503 and `Connection: close`, health says "draining"; what runs may finish
                          (drain_grace_seconds), and so may open sticky sessions, but none are opened; then the port
                          closes, and no call is lost by that (RFC 9112 section 9.6)
a second one              the end at once, status 1

_Waitress      the usual server, in this process
_granian.py    the other one, in a process of its own
_listener.py   the port: opened here, closed without resetting a caller
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import waitress.channel
import waitress.server
import waitress.task
import waitress.wasyncore

from ..auth.proxies import check_server
from ..auth.unauthorized import proxy_headers_of
from ._listener import FLUSH_SECONDS, LINGER_SECONDS, listen, readable, refuse_connections
from .server import MAX_REQUEST_BYTES, HttpApp, make_wsgi_app

if TYPE_CHECKING:
    import vgi_rpc as core

__all__ = ["serve_http", "waitress_arrow_tuning"]

_LOG = logging.getLogger("vgi_rpc.http")
_HANDSHAKE_SECONDS = 0.1  # for a connection that has begun to be made


def waitress_arrow_tuning(max_request_bytes: int | None = None) -> dict[str, int]:
    """Waitress settings for Arrow bodies: fewer, larger steps; bodies stay in memory up to the request cap."""
    limit = MAX_REQUEST_BYTES if max_request_bytes is None else max_request_bytes
    overflow = max(16 << 20, max_request_bytes or 64 << 20)
    return {
        "inbuf_overflow": overflow,
        "outbuf_overflow": overflow,
        "recv_bytes": 1 << 20,
        "send_bytes": 1,
        # Somewhat above the application's own, which refuses with the answer that callers expect.
        "max_request_body_size": 2 * limit + (16 << 20),
    }


def serve_http(
    server: core.RpcServer,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    threads: int | None = None,
    wsgi_server: Literal["waitress", "granian"] = "waitress",
    drain_grace_seconds: float = 30.0,
    install_signal_handlers: bool = True,
    on_bound: Callable[[str, int], None] | None = None,
    **options: Any,
) -> None:
    """Serve until SIGTERM or SIGINT; prints `PORT:<n>` when the port is open.

    Args:
        port: 0 takes any free one.
        threads: how many requests at a time; None reads VGI_HTTP_THREADS, else 4.
        wsgi_server: granian runs one worker process of its own, and needs the package granian. It does not wait for
            open sticky sessions, and their states are not closed.
        drain_grace_seconds: how long accepted requests may take after the first signal.
        install_signal_handlers: False leaves signals alone; so does a thread other than the main one.
        on_bound: called instead of printing.
        options: those of make_wsgi_app.

    Raises:
        ValueError: an option out of range; granian, with an authenticator that reads a proxy's header (granian cannot
            tell it from a caller's forgery).
        OSError: the address cannot be bound.
        ImportError: granian is asked for, and not installed.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port must be within 0..65535, got {port}")
    if wsgi_server not in ("waitress", "granian"):
        raise ValueError(f"wsgi_server must be 'waitress' or 'granian', got {wsgi_server!r}")
    count = _threads(threads)
    app = make_wsgi_app(server, **options)
    announce = functools.partial(_announce, on_bound=on_bound)
    if wsgi_server == "granian":
        check_server("granian", proxy_headers_of(options.get("authenticate")))
        try:
            from ._granian import serve_granian
        except ModuleNotFoundError as exc:
            if exc.name != "granian":
                raise
            text = "wsgi_server='granian' needs granian, which is not installed: pip install granian"
            raise ImportError(text, name="granian") from None
        return serve_granian(app, host, port, count, drain_grace_seconds, announce)
    with (
        listen(host, port) as listener,
        contextlib.closing(_Waitress(app, listener, count)) as served,
        served.signals(install_signal_handlers),
    ):
        announce(listener.getsockname())
        served.run(drain_grace_seconds)


class _Task(waitress.task.WSGITask):  # type: ignore[misc]
    """A request; while draining, its answer ends the connection."""

    def build_response_header(self) -> bytes:
        app: Any = self.channel.server.application
        if app.door.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header


class _Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    task_class = _Task


class _Waitress:
    """waitress, and its end: in an order that loses no request.

    a signal                  new requests get 503, health too, and every answer ends its connection
    when nothing is running   no new connections; those that were made get their answer
    then                      the port closes; connections that stay silent are closed a moment later
    """

    def __init__(self, app: HttpApp, listener: socket.socket, threads: int) -> None:
        if os.environ.get("VGI_RPC_WAITRESS_QUEUE_LOG", "").lower() not in ("1", "true", "yes", "on"):
            logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._app = app
        self._listener = listener
        self._sockets: dict[int, Any] = {}
        limit = app.door.max_request
        tuning: dict[str, Any] = dict(waitress_arrow_tuning(None if limit == MAX_REQUEST_BYTES else limit))
        self._server: Any = waitress.server.create_server(
            app,
            self._sockets,
            sockets=[listener],
            threads=threads,
            ident="",
            clear_untrusted_proxy_headers=False,
            **tuning,
        )
        self._server.channel_class = _Channel

    def run(self, grace: float) -> None:
        """Serve until a signal, and to the end of what was begun, which may take `grace` seconds."""
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            for seconds in self._steps(grace):
                waitress.wasyncore.loop(seconds, True, self._sockets, 1)

    def close(self) -> None:
        """End the threads, close what is open, and end the sessions."""
        self._server.task_dispatcher.shutdown()
        waitress.wasyncore.close_all(self._sockets)
        if self._app.sessions is not None:
            self._app.sessions.shutdown()

    def _steps(self, grace: float) -> Iterator[float]:
        """What is waited for, one after the other: how long the next look at the sockets may take."""
        while not self._app.door.draining:
            yield 1.0
        self._server.adj.connection_limit = 1 << 20  # what waits to be let in gets its 503, too
        yield from _until(grace, lambda: not self._running() and not self._sessions())
        if running := self._running():
            _LOG.warning("%d request(s) did not finish within %s seconds", running, grace)
        refuse_connections(self._listener)
        yield from _until(_HANDSHAKE_SECONDS, lambda: False)
        yield from _until(FLUSH_SECONDS, lambda: not readable(self._listener))
        waitress.wasyncore.dispatcher.close(self._server)  # its own close() ends more than the port
        yield from _until(LINGER_SECONDS, lambda: not self._server.active_channels)
        yield from _until(FLUSH_SECONDS, lambda: not self._arriving() and not self._running())

    def _running(self) -> int:
        """How many connections have a request that is not answered, to its last byte."""
        return sum(1 for c in self._server.active_channels.values() if c.requests or c.total_outbufs_len)

    def _arriving(self) -> bool:
        """Whether a connection has half a request."""
        return any(c.request for c in self._server.active_channels.values())

    def _sessions(self) -> int:
        return 0 if self._app.sessions is None else self._app.sessions.count

    @contextlib.contextmanager
    def signals(self, wanted: bool) -> Iterator[None]:
        """Handle SIGTERM and SIGINT until the block ends; not outside the main thread."""
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._app.door.draining:
            os._exit(1)
        self._app.drain()
        self._server.pull_trigger()


def _until(seconds: float, done: Callable[[], bool]) -> Iterator[float]:
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        yield 0.01


def _threads(threads: int | None) -> int:
    text = os.environ.get("VGI_HTTP_THREADS") if threads is None else str(threads)
    if not text:
        return 4
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10_000):
        raise ValueError(f"the number of threads (VGI_HTTP_THREADS) must be 1 to 10000, got {text!r}")
    return int(text)


def _announce(address: tuple[Any, ...], on_bound: Callable[[str, int], None] | None) -> None:
    host, port = address[:2]
    if on_bound is not None:
        return on_bound(host, port)
    print(f"PORT:{port}", flush=True)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port}", file=sys.stderr, flush=True)
