# Needs: granian. Install: pip install granian. Used by serve.py when it is asked for.
"""granian as the server of serve_http: one worker process, forked from this one, and its drain.

granian lets accepted requests finish, too, but refuses connections from the signal on, and cuts those whose request is
on its way. So the signal stays in the parent until the worker has drained:

    parent   a signal: a byte to the worker; when one comes back, granian's own handling of the signal
    worker   a byte: new requests get 503; when nothing is running no new connections; when none is refused any more,
             a byte back

Each side closes the other's end of their socket pair, and so sees when the other is gone.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from granian.constants import HTTPModes, Interfaces
from granian.server import Server

from ._listener import FLUSH_SECONDS, LINGER_SECONDS, listeners, refuse_connections, reserve

if TYPE_CHECKING:
    from .server import HttpApp

_CLOSE = ("Connection", "close")


def serve_granian(
    app: HttpApp, host: str, port: int, threads: int, grace: float, announce: Callable[[tuple[str, int]], None]
) -> None:
    """Serve until a signal, and to the end of what was begun. OSError: the address cannot be bound."""
    with reserve(host, port) as reserved:
        if port:
            reserved.close()  # nobody else has it
        else:
            host, port = reserved.getsockname()[:2]
        drain = _Drain(app, port, grace)
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
        granian.on_startup(lambda: announce((host, port)))
        interrupt = granian.signal_handler_interrupt
        granian.signal_handler_interrupt = lambda *_: drain.signalled(interrupt, granian.wrks)
        try:
            granian.serve(target_loader=drain.load, wrap_loader=False)
        finally:
            drain.close()


class _Drain:
    """The application in the worker, and what passes between it and the parent."""

    def __init__(self, app: HttpApp, port: int, grace: float) -> None:
        self._app = app
        self._port = port
        self._grace = grace
        self._parent, self._worker = socket.socketpair()
        self._lock = threading.Lock()
        self._running = 0
        self._refused = 0.0  # when a request was, the last time
        self._signalled = False

    # ---- in the worker

    def load(self) -> _Drain:
        """Give granian the application."""
        self._parent.close()
        threading.Thread(target=self._drain, name="vgi_rpc-http-drain", daemon=True).start()
        return self

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if self._app.door.draining:
            self._refused = time.monotonic()
            return self._app(environ, lambda status, headers, exc=None: start_response(status, [*headers, _CLOSE]))
        with self._lock:
            self._running += 1
        try:
            return self._app(environ, start_response)  # complete: no body of ours is a generator
        finally:
            with self._lock:
                self._running -= 1

    def _drain(self) -> None:
        self._worker.recv(1)
        self._app.drain()
        deadline = time.monotonic() + self._grace
        while self._running and time.monotonic() < deadline:
            time.sleep(0.01)
        for listener in listeners(self._port):
            refuse_connections(listener)
        self._refused = now = time.monotonic()
        deadline = now + FLUSH_SECONDS
        while now < deadline and now - self._refused < LINGER_SECONDS:
            time.sleep(0.05)
            now = time.monotonic()
        try:
            self._worker.send(b"x")
        except OSError:  # the parent was killed
            os._exit(1)

    # ---- in the parent

    def signalled(self, interrupt: Callable[[], None], workers: Sequence[Any]) -> None:
        """The first signal begins the drain, the second is the end at once."""
        if self._signalled:
            for worker in workers:
                worker.kill()
            os._exit(1)
        self._signalled = True
        self._worker.close()
        threading.Thread(target=self._wait, args=(interrupt,), name="vgi_rpc-http-drain", daemon=True).start()

    def _wait(self, interrupt: Callable[[], None]) -> None:
        self._parent.settimeout(self._grace + 2 * FLUSH_SECONDS)
        with contextlib.suppress(OSError):
            self._parent.send(b"x")
            self._parent.recv(1)
        interrupt()

    def close(self) -> None:
        """Close both ends."""
        self._parent.close()
        self._worker.close()
