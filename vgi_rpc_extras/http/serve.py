# Needs: waitress (or granian). Install: pip install 'vgi-rpc-onefile[http]'.
"""Serve over HTTP until a signal ends it (http.md section 14).

first SIGTERM or SIGINT     new requests get 503 and `Connection: close`, health says "draining"; what runs may finish
                            (drain_grace_seconds), and so may open sticky sessions, but none are opened; then the port
                            closes, and no call is lost by that
a second one                the end at once, status 1
"""

from __future__ import annotations

import array
import contextlib
import logging
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from .server import MAX_REQUEST_BYTES, HttpApp, make_wsgi_app

if TYPE_CHECKING:
    import vgi_rpc as core

__all__ = ["serve_http", "waitress_arrow_tuning"]

_LOG = logging.getLogger("vgi_rpc.http")
_App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
_FLUSH_SECONDS = 5.0  # for what has been answered to reach its caller, and for half a request to be completed
_HANDSHAKE_SECONDS = 0.1  # for a connection that has begun to be made
_LINGER_SECONDS = 0.5  # for the request that a connection was made, or kept, for
_CLOSE = ("Connection", "close")
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h


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
    with _listen(host, port) as listener:
        cap = app.door.max_request
        waitress = _Waitress(app, listener, count, None if cap == MAX_REQUEST_BYTES else cap, drain_grace_seconds)
        try:
            with waitress.signals() if install_signal_handlers else contextlib.nullcontext():
                _announce(listener.getsockname(), on_bound)
                waitress.run()
        finally:
            waitress.close()
            if app.sessions is not None:
                app.sessions.shutdown()


class _Waitress:
    """waitress, and its end: in an order that loses no request (RFC 9112 section 9.6).

    a signal                  new requests get 503, health too, and every answer ends its connection
    when nothing is running   no new connections; those that were made get their answer
    then                      the port closes; connections that stay silent are closed a moment later
    """

    def __init__(
        self, app: HttpApp, listener: socket.socket, threads: int, max_request_bytes: int | None, grace: float
    ) -> None:
        try:
            import waitress.channel
            import waitress.server
            import waitress.task
            import waitress.wasyncore
        except ImportError:
            raise SystemExit("serving over HTTP needs waitress: pip install 'vgi-rpc-onefile[http]'") from None
        if os.environ.get("VGI_RPC_WAITRESS_QUEUE_LOG", "").lower() not in ("1", "true", "yes", "on"):
            logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        door = app.door

        class Task(waitress.task.WSGITask):  # type: ignore[misc]
            def build_response_header(self) -> bytes:
                if door.draining:
                    self.set_close_on_finish()
                header: bytes = super().build_response_header()
                return header

        class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
            task_class = Task

        self._door = door
        self._sessions = app.sessions
        self._listener = listener
        self._grace = grace
        self._wasyncore: Any = waitress.wasyncore
        self._sockets: dict[int, Any] = {}
        tuning: dict[str, Any] = dict(waitress_arrow_tuning(max_request_bytes))
        self._bound: Any = waitress.server.create_server(
            app,
            self._sockets,
            sockets=[listener],
            threads=threads,
            ident="",
            clear_untrusted_proxy_headers=False,
            **tuning,
        )
        self._bound.channel_class = Channel

    def run(self) -> None:
        """Serve until a signal, and to the end of what it began."""
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            for seconds in self._steps():
                self._wasyncore.loop(seconds, True, self._sockets, 1)
        self._bound.task_dispatcher.shutdown()

    def close(self) -> None:
        """Close what is open."""
        self._wasyncore.close_all(self._sockets)

    def _steps(self) -> Iterator[float]:
        """What is waited for, one after the other: how long the next look at the sockets may take."""
        while not self._door.draining:
            yield 1.0
        self._bound.adj.connection_limit = 1 << 20  # what waits to be let in gets its 503, too
        yield from self._until(self._grace, lambda: not self._running() and not self._sessions_open())
        if running := self._running():
            _LOG.warning("%d request(s) did not finish within %s seconds", running, self._grace)
        _refuse_connections(self._listener)
        yield from self._until(_HANDSHAKE_SECONDS, lambda: False)
        yield from self._until(_FLUSH_SECONDS, lambda: not _readable(self._listener))
        self._wasyncore.dispatcher.close(self._bound)  # its own close() ends more than the port
        channels = self._bound.active_channels
        yield from self._until(_LINGER_SECONDS, lambda: not channels)
        yield from self._until(_FLUSH_SECONDS, lambda: not any(c.request for c in channels.values()))
        yield from self._until(_FLUSH_SECONDS, lambda: not self._running())

    def _until(self, seconds: float, done: Callable[[], bool]) -> Iterator[float]:
        deadline = time.monotonic() + seconds
        while not done() and time.monotonic() < deadline:
            yield 0.01

    def _running(self) -> int:
        """How many connections have a request that is not answered, to its last byte."""
        return sum(1 for c in self._bound.active_channels.values() if c.requests or c.total_outbufs_len)

    def _sessions_open(self) -> bool:
        return self._sessions is not None and self._sessions.count > 0

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
        if self._door.draining:
            os._exit(1)
        if self._sessions is not None:
            self._sessions.drain()
        self._door.draining = True
        self._bound.pull_trigger()


def _readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _refuse_connections(listener: socket.socket) -> None:
    """Let no new connection begin; those that have begun can still be accepted. Linux only.

    Closing a listening socket resets what waits in its backlog, whose requests may be there already, and more may come
    after the last look at it. So the kernel is told to ignore SYN segments: callers send theirs again after a
    second, to a port that refuses them, or to the next process. The filter (socket(7), SO_ATTACH_FILTER) sees the
    segment from the TCP header on.
    """
    if sys.platform != "linux":
        return
    load_flags, keep_syn, is_syn = (0x30, 0, 0, 13), (0x54, 0, 0, 0x02), (0x15, 0, 1, 0x02)
    drop, accept = (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF)
    code = array.array(
        "B", b"".join(struct.pack("HBBI", *step) for step in (load_flags, keep_syn, is_syn, drop, accept))
    )
    with contextlib.suppress(OSError):  # a kernel that has none: a few microseconds are not covered
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 5, code.buffer_info()[0]))


def _serve_granian(
    app: HttpApp,
    host: str,
    port: int,
    threads: int,
    grace: float,
    on_bound: Callable[[str, int], None] | None,
) -> None:
    """One worker process, forked from this one.

    granian lets accepted requests finish, too, but refuses connections from the signal on, and cuts those whose request
    is on its way. So the signal stays in the parent until the worker has drained.
    """
    try:
        from granian.constants import HTTPModes, Interfaces
        from granian.server import Server
    except ImportError:
        raise SystemExit("wsgi_server='granian' needs granian: pip install granian") from None
    with _reserve(host, port) as reserved:
        if port:
            reserved.close()  # nobody else has it
        else:
            host, port = reserved.getsockname()[:2]
        drain = _GranianDrain(app, port, grace)
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
        interrupt = granian.signal_handler_interrupt
        granian.signal_handler_interrupt = lambda *_: drain.signalled(interrupt, granian.wrks)
        try:
            granian.serve(target_loader=drain.load, wrap_loader=False)
        finally:
            drain.close()


class _GranianDrain:
    """The application in granian's worker process, and the drain: the parent passes the signal on, and waits."""

    def __init__(self, app: HttpApp, port: int, grace: float) -> None:
        self._app: _App = app
        self._door = app.door
        self._port = port
        self._grace = grace
        self._parent, self._worker = socket.socketpair()
        self._lock = threading.Lock()
        self._running = 0
        self._latest = 0.0  # when a request was refused
        self._signalled = False

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._door.draining:
            self._latest = time.monotonic()
            return self._app(environ, lambda status, headers: start_response(status, [*headers, _CLOSE]))
        with self._lock:
            self._running += 1
        try:
            return self._app(environ, start_response)  # complete: no body of ours is a generator
        finally:
            with self._lock:
                self._running -= 1

    def load(self) -> _GranianDrain:
        """In the worker, before it serves."""
        self._parent.close()  # the end of the parent is seen, then
        threading.Thread(target=self._drain, name="vgi_rpc-http-drain", daemon=True).start()
        return self

    def _drain(self) -> None:
        self._worker.recv(1)
        self._door.draining = True
        deadline = time.monotonic() + self._grace
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        for listener in _listening(self._port):
            _refuse_connections(listener)
        self._latest = now = time.monotonic()
        deadline = now + _FLUSH_SECONDS
        while now < deadline and now - self._latest < _LINGER_SECONDS:
            time.sleep(0.05)
            now = time.monotonic()
        try:
            self._worker.send(b"x")
        except OSError:  # the parent was killed
            os._exit(1)

    def signalled(self, interrupt: Callable[[], None], workers: Sequence[Any]) -> None:
        """In the parent: the first signal begins the drain, the second is the end at once."""
        if self._signalled:
            for worker in workers:
                worker.kill()
            os._exit(1)
        self._signalled = True
        self._worker.close()  # the end of the worker is seen, then
        threading.Thread(target=self._wait, args=(interrupt,), name="vgi_rpc-http-drain", daemon=True).start()

    def _wait(self, interrupt: Callable[[], None]) -> None:
        self._parent.settimeout(self._grace + 2 * _FLUSH_SECONDS)
        with contextlib.suppress(OSError):
            self._parent.send(b"x")
            self._parent.recv(1)
        interrupt()

    def close(self) -> None:
        """Close both ends."""
        self._parent.close()
        self._worker.close()


def _listening(port: int) -> Iterator[socket.socket]:
    """The listening sockets of this process, which granian keeps to itself."""
    if not os.path.isdir("/proc/self/fd"):
        return
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.getsockname()[1] == port:
                yield sock


def _reserve(host: str, port: int) -> socket.socket:
    """Keep a free port for granian, which takes no socket, and does not say where it has bound one; or try a given one.

    What is bound but does not listen gets no connections, and SO_REUSEPORT lets granian bind the same port.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if port else socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
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
