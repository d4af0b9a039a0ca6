# Needs: the standard library only.
"""Connecting within one budget of time: the name, every address and TLS (DESIGN.md section 4, law 6)."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

CONNECT_SECONDS = 10.0  # for name, connection and TLS, when the caller's own time is longer
_MAX_LOOKUPS = 64  # that may hang at a time: each is a thread, which nothing can end before the resolver gives up
_lookups = threading.BoundedSemaphore(_MAX_LOOKUPS)


def tls_context() -> ssl.SSLContext:
    """The verifying context of this process: reading the system's authorities takes 20 to 185 ms."""
    return _tls_context(*map(os.environ.get, ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")))


@functools.lru_cache(8)
def _tls_context(*settings: str | None) -> ssl.SSLContext:
    return ssl.create_default_context()  # which reads these settings


def resolve(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    """`socket.getaddrinfo` for TCP, until a monotonic time. OSError, and TimeoutError when it is over."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)  # asks nobody, so it needs no thread
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not _lookups.acquire(blocking=False):
        raise OSError(f"{_MAX_LOOKUPS} lookups of host names are waiting for the resolver")
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_look_up, args=(host, port, found), name="vgi_rpc-resolve", daemon=True).start()
    try:
        answer = found.get(timeout=max(deadline - time.monotonic(), 0.0))
    except queue.Empty:
        raise TimeoutError("the host name was not resolved in time") from None
    if isinstance(answer, BaseException):
        raise answer
    return list(answer)


def _look_up(host: str, port: int, found: queue.SimpleQueue[Any]) -> None:
    try:
        found.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as exc:
        found.put(OSError(f"the host name is none: {exc}") if isinstance(exc, UnicodeError) else exc)
    except BaseException as exc:
        found.put(OSError(f"the host name was not resolved: {type(exc).__name__}"))
    finally:
        _lookups.release()


def addresses(host: str, port: int, deadline: float, allows: Callable[[str], bool] | None) -> list[str]:
    """The addresses of a host, each once, that may be connected to; PermissionError when there are none such."""
    found = dict.fromkeys(str(one[4][0]) for one in resolve(host, port, deadline))
    usable = [address for address in found if allows is None or allows(address)]
    if not usable:
        raise PermissionError("no address of the host may be connected to")
    return usable


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Open a TCP connection until a monotonic time. Each address has an equal share of the time that is left.

    Raises OSError, and TimeoutError when the time is over.
    """
    usable = list(dict.fromkeys(resolve(host, port, deadline)))
    failure: OSError = OSError("no address")
    for at, (family, kind, proto, _, address) in enumerate(usable):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left to connect") from failure
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(left / (len(usable) - at))
            sock.connect(address)
        except OSError as exc:
            sock.close()
            failure = exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure


def start_tls(sock: socket.socket, context: ssl.SSLContext, host: str, deadline: float) -> ssl.SSLSocket:
    """Make a connection one of TLS until a monotonic time; closes it when that fails. OSError."""
    try:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time is left for TLS")
        sock.settimeout(left)  # of the whole handshake, as the ssl module counts it
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise
