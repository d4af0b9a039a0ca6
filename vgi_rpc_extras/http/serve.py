# Needs: waitress; granian only when it is asked for. Install: pip install 'vgi-rpc-onefile[http]'.
"""Serve over HTTP until a signal ends it (http.md section 14).

first SIGTERM or SIGINT   new requests get 503 and `Connection: close`, health says "draining"; what runs may finish
                          (drain_grace_seconds), and so may open sticky sessions, but none are opened; then the port
                          closes, and no call is lost by that (RFC 9112 section 9.6)
a second one              the end at once, status 1

_waitress.py   the usual server, in this process
_granian.py    the other one, in a process of its own
_listener.py   the port: opened here, closed without resetting a caller
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Literal

from ..auth.proxies import check_server
from ..auth.unauthorized import proxy_headers_of
from ..common.urls import LOOPBACK_NAMES, is_loopback
from ._listener import listen
from ._waitress import Waitress, waitress_arrow_tuning
from .server import make_wsgi_app

if TYPE_CHECKING:
    import vgi_rpc as core

__all__ = ["serve_http", "waitress_arrow_tuning"]


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
    allowed_hosts: Collection[str] | None = None,
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
        allowed_hosts: names by which requests may call this server (their Host header), besides those of this
            machine; "*": any. None reads VGI_HTTP_ALLOWED_HOSTS, else: any, but on a loopback address without
            `authenticate` those of this machine only, since any web page could give 127.0.0.1 a name of its own and
            call the service through its reader's browser.
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
    if allowed_hosts is None:
        allowed_hosts = [name for name in os.environ.get("VGI_HTTP_ALLOWED_HOSTS", "").split(",") if name.strip()]
    if allowed_hosts or (is_loopback(host) and not app.door.guards):
        app.door.allow_hosts([host, *LOOPBACK_NAMES, *allowed_hosts])
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
        contextlib.closing(Waitress(app, listener, count)) as served,
        served.signals(install_signal_handlers),
    ):
        announce(listener.getsockname())
        served.run(drain_grace_seconds)


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
