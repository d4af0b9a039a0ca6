# Needs: waitress. Install: pip install 'vgi-rpc-onefile[http]'. Used by serve.py.
"""waitress as the server of serve_http: what it keeps of callers that nobody knows, and its end.

waitress collects a request before anybody sees it. So what a stranger sends has a bound and an end:

    the head complete, and more to come than 64 KiB    a thread asks who calls, while nothing more is read; without a
                                                       good answer the rest is read and thrown away, then refused
    1 MiB of a body                                    what is above goes to a temporary file
    20 s, 60 s (and a second for each 16 KiB)          for a head and a body to arrive
    more than three quarters of all connections        those that have been silent for 5 s are closed
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import waitress.channel
import waitress.parser
import waitress.server
import waitress.task
import waitress.wasyncore

from ..auth.guard import ASKED
from ._listener import FLUSH_SECONDS, LINGER_SECONDS, readable, refuse_connections
from .server import MAX_REQUEST_BYTES

if TYPE_CHECKING:
    from .server import HttpApp

_LOG = logging.getLogger("vgi_rpc.http")
# Any: the stubs know neither what these have nor that they are made to be extended.
_HTTPRequestParser: Any = waitress.parser.HTTPRequestParser
_HTTPChannel: Any = waitress.channel.HTTPChannel
_WSGITask: Any = waitress.task.WSGITask
_HANDSHAKE_SECONDS = 0.1  # for a connection that has begun to be made
_UNASKED = 65_536  # bytes of a body that are kept of anybody
_HEAD_SECONDS = 20.0
_BODY_SECONDS = 60.0
_BODY_RATE = 16_384  # bytes a second, after that
_SILENT_SECONDS = 5.0
_CONNECTIONS = 1000
_SWEEP_SECONDS = 1.0


def waitress_arrow_tuning(max_request_bytes: int | None = None) -> dict[str, int]:
    """Waitress settings for Arrow bodies: fewer, larger steps; of each body 1 MiB stays in memory."""
    limit = MAX_REQUEST_BYTES if max_request_bytes is None else max_request_bytes
    return {
        "inbuf_overflow": 1 << 20,
        "outbuf_overflow": max(16 << 20, max_request_bytes or 64 << 20),
        "recv_bytes": 1 << 20,
        # Somewhat above the application's own, which refuses with the answer that callers expect.
        "max_request_body_size": 2 * limit + (16 << 20),
    }


class _Nothing:
    """A buffer that keeps nothing."""

    def append(self, data: bytes) -> None:
        """Forget it."""

    def getfile(self) -> io.BytesIO:
        """No bytes."""
        return io.BytesIO()

    def __len__(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing to close."""


class _Parser(_HTTPRequestParser):  # type: ignore[misc]
    """A request as it comes in; it says when its caller has to be asked for."""

    def __init__(self, adj: Any, channel: _Channel) -> None:
        super().__init__(adj)
        self._channel = channel
        self._began = time.monotonic()
        self.asked = False
        self.answer: Any = None

    def received(self, data: bytes) -> int:
        """As the class above."""
        used: int = super().received(data)
        if self.asked or self.completed or max(self.content_length, self.body_bytes_received) <= _UNASKED:
            return used
        self.asked = True
        self._channel.ask(self)
        return used

    def forget_body(self) -> None:
        """Keep nothing of the body from now on."""
        self.body_rcv.buf.close()
        self.body_rcv.buf = _Nothing()

    def is_late(self, now: float) -> bool:
        """Whether it has taken longer to arrive than any honest caller needs."""
        if not self.headers_finished:
            return now - self._began > _HEAD_SECONDS
        late: bool = now - self._began > _BODY_SECONDS + self.body_bytes_received / _BODY_RATE
        return late


class _Question:
    """Who calls? Asked in a worker thread, since the answer may be in another house."""

    def __init__(self, channel: _Channel, request: _Parser) -> None:
        self._channel = channel
        self._request = request

    def service(self) -> None:
        """Ask, and let the channel go on."""
        channel, request = self._channel, self._request
        try:
            request.answer = channel.server.application.door.ask(_Task(channel, request).get_environment())
        except Exception as exc:
            request.answer = exc
        with channel.requests_lock:
            if isinstance(request.answer, Exception):
                request.forget_body()
        channel.asking = False
        channel.server.pull_trigger()

    def cancel(self) -> None:
        """The server ends."""


class _Task(_WSGITask):  # type: ignore[misc]
    """A request; while draining, its answer ends the connection."""

    def build_response_header(self) -> bytes:
        app: Any = self.channel.server.application
        if app.door.draining:
            self.set_close_on_finish()
        header: bytes = super().build_response_header()
        return header

    def get_environment(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environment()
        if self.request.answer is not None:
            environ[ASKED] = self.request.answer
        return environ


class _Channel(_HTTPChannel):  # type: ignore[misc]
    task_class = _Task
    asking = False  # a thread asks who calls; until then nothing more is read

    def parser_class(self, adj: Any) -> _Parser:
        return _Parser(adj, self)

    def recv(self, size: int) -> bytes:
        request = self.request
        data: bytes = super().recv(size if request is not None and request.asked else min(size, _UNASKED))
        return data

    def readable(self) -> bool:
        return not self.asking and bool(super().readable())

    def ask(self, request: _Parser) -> None:
        """Find out whether the body of a request is worth to be kept."""
        door = self.server.application.door
        if request.content_length > door.max_request:
            request.forget_body()
        elif door.guards:
            self.asking = True
            self.server.task_dispatcher.add_task(_Question(self, request))


class Waitress:
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
            connection_limit=_connection_limit(),
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
        swept = time.monotonic()
        while not self._app.door.draining:
            yield _SWEEP_SECONDS
            if (now := time.monotonic()) - swept > _SWEEP_SECONDS:
                swept = now
                self._sweep(now)
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

    def _sweep(self, now: float) -> None:
        """Close the connections whose request does not come to its end, and in a crowd those that are silent."""
        channels = list(self._server.active_channels.values())
        crowded = len(channels) > self._server.adj.connection_limit * 3 // 4
        silent = time.time() - _SILENT_SECONDS  # last_activity is of that clock
        for channel in channels:
            request = channel.request
            if request is not None and request.is_late(now) and not channel.asking:
                _LOG.info("a request of %s did not arrive in time; its connection is closed", channel.addr[0])
                channel.will_close = True
            elif crowded and request is None and not channel.requests and channel.last_activity < silent:
                channel.will_close = not channel.total_outbufs_len

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


def _connection_limit() -> int:
    """How many connections may be open: half of the descriptors that this process may have, at most."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(_CONNECTIONS, soft // 2))
