# Needs: waitress (or granian). Install: pip install 'vgi-rpc-onefile[http]'.
"""Serve over HTTP until a signal ends it (http.md section 14).

first SIGTERM or SIGINT     new requests get 503, accepted ones finish (drain_grace_seconds at most), then the end;
                            open sticky sessions go on for as long, and no new ones are opened
a second one                the end at once, status 1
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from .server import MAX_REQUEST_BYTES, HttpApp, make_wsgi_app

if TYPE_CHECKING:
    import vgi_rpc as core

__all__ = ["serve_http", "waitress_arrow_tuning"]

_LOG = logging.getLogger("vgi_rpc.http")
_App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_FLUSH_SECONDS = 5.0  # for what has been answered to reach its caller


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
        ValueError: an option out of range.
        OSError: the address cannot be bound.
    """
    count = _threads(threads)
    app = make_wsgi_app(server, **options)
    if wsgi_server == "granian":
        return _serve_granian(app, host, port, count, drain_grace_seconds, on_bound)
    if wsgi_server != "waitress":
        raise ValueError(f"wsgi_server must be 'waitress' or 'granian', got {wsgi_server!r}")
    drain = _Drain(app, drain_grace_seconds)
    with _listen(host, port) as listener:
        cap = app.door.max_request
        bound = _waitress(drain, listener, count, None if cap == MAX_REQUEST_BYTES else cap)
        drain.busy = lambda: any(channel.total_outbufs_len for channel in list(bound.active_channels.values()))
        try:
            with drain.signals() if install_signal_handlers else contextlib.nullcontext():
                _announce(listener.getsockname(), on_bound)
                bound.run()
        finally:
            bound.close()
            if app.sessions is not None:
                app.sessions.shutdown()


def _waitress(app: _App, listener: socket.socket, threads: int, max_request_bytes: int | None) -> Any:
    try:
        import waitress.server
    except ImportError:
        raise SystemExit("serving over HTTP needs waitress: pip install 'vgi-rpc-onefile[http]'") from None
    if os.environ.get("VGI_RPC_WAITRESS_QUEUE_LOG", "").lower() not in ("1", "true", "yes", "on"):
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    tuning: dict[str, Any] = dict(waitress_arrow_tuning(max_request_bytes))
    return waitress.server.create_server(
        app, sockets=[listener], threads=threads, ident="", clear_untrusted_proxy_headers=False, **tuning
    )


def _serve_granian(
    app: _App,
    host: str,
    port: int,
    threads: int,
    grace: float,
    on_bound: Callable[[str, int], None] | None,
) -> None:
    """One worker process, forked from this one; granian itself lets accepted requests finish on SIGTERM."""
    try:
        from granian.constants import HTTPModes, Interfaces
        from granian.server import Server
    except ImportError:
        raise SystemExit("wsgi_server='granian' needs granian: pip install granian") from None
    with _listen(host, port) if port else _reserve(host) as reserved:
        if port:
            reserved.close()  # nobody else has it
        else:
            host, port = reserved.getsockname()[:2]
        granian: Any = Server(
            "vgi_rpc",
            address=host,
            port=port,
            interface=Interfaces.WSGI,
            http=HTTPModes.http1,
            blocking_threads=threads,
            workers_kill_timeout=max(1, int(grace)),
            log_enabled=False,
        )
        granian.on_startup(lambda: _announce((host, port), on_bound))
        granian.serve(target_loader=lambda: app, wrap_loader=False)


def _reserve(host: str) -> socket.socket:
    """Keep a free port for granian, which takes no socket, and does not say where it has bound one.

    What is bound but does not listen gets no connections, and SO_REUSEPORT lets granian bind the same port.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def _threads(threads: int | None) -> int:
    text = os.environ.get("VGI_HTTP_THREADS") if threads is None else str(threads)
    if not text:
        return 4
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 10_000):
        raise SystemExit(f"the number of threads (VGI_HTTP_THREADS) must be 1 to 10000, got {text!r}")
    return int(text)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def _announce(address: Any, on_bound: Callable[[str, int], None] | None) -> None:
    host, port = address[:2]
    if on_bound is not None:
        return on_bound(host, port)
    print(f"PORT:{port}", flush=True)
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port}", file=sys.stderr, flush=True)


class _Drain:
    """Wraps the application: counts what is being answered; after a signal the application answers 503."""

    def __init__(self, app: HttpApp, grace: float) -> None:
        self._app = app
        self._grace = grace
        self._lock = threading.Lock()
        self._running = 0
        self._ended = False
        self.busy: Callable[[], bool] = lambda: False  # whether answers still wait to be sent

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self._running += 1
        try:
            return self._app(environ, start_response)  # complete: no body of ours is a generator
        finally:
            with self._lock:
                self._running -= 1

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT until the block ends; nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._ended:
            raise SystemExit(0)  # ends the loop of the server, in the main thread
        if self._app.door.draining:
            os._exit(1)
        if self._app.sessions is not None:
            self._app.sessions.drain()
        self._app.door.draining = True
        threading.Thread(target=self._finish, args=(number,), name="vgi_rpc-http-drain", daemon=True).start()

    def _finish(self, number: int) -> None:
        deadline = time.monotonic() + self._grace
        while (self._running or self._sessions_open()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._running:
            _LOG.warning("%d request(s) did not finish within %s seconds", self._running, self._grace)
        deadline = time.monotonic() + _FLUSH_SECONDS
        while self.busy() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._ended = True
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, number)

    def _sessions_open(self) -> bool:
        return self._app.sessions is not None and self._app.sessions.count > 0
