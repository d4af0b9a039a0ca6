# Needs: the standard library only. Used by serve.py and _granian.py.
"""The port of a server: how it is opened, and how it closes without resetting a caller.

Closing a listening socket resets what waits in its backlog, whose requests may be there already, and more may come
after the last look at it. So first the kernel is told to ignore SYN segments (`refuse_connections`), then what has
begun is accepted, and then the socket is closed. Callers send their SYN again after a second, to a port that refuses
them, or to the next process.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import sys
from collections.abc import Iterator

FLUSH_SECONDS = 5.0  # for what has been answered to reach its caller, and for half a request to be completed
LINGER_SECONDS = 0.5  # for the request that a connection was made, or kept, for

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# struct sock_filter of linux/filter.h: code, steps to jump if true, if false, operand. It sees the TCP header first.
_DROP_SYN = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x02),  # SYN of them
    (0x15, 0, 1, 0x02),  # is it set?
    (0x06, 0, 0, 0),  # yes: drop the segment
    (0x06, 0, 0, 0xFFFFFFFF),  # no: take all of it
)


def listen(host: str, port: int) -> socket.socket:
    """Open a port; OSError when it cannot be bound."""
    return socket.create_server((host, port), family=_family(host), backlog=1024)


def reserve(host: str, port: int) -> socket.socket:
    """Keep a free port for who takes no socket and does not say which port it got; or try whether a given one is free.

    What is bound but does not listen gets no connections, and SO_REUSEPORT lets others bind the same port.
    """
    sock = socket.socket(_family(host))
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if port else socket.SO_REUSEPORT, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def readable(listener: socket.socket) -> bool:
    """Whether a connection waits to be accepted."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return bool(poll.poll(0))


def refuse_connections(listener: socket.socket) -> None:
    """Let no new connection begin; those that have begun can still be accepted (socket(7), SO_ATTACH_FILTER).

    Linux only: elsewhere, and for a kernel without it, a few microseconds are not covered.
    """
    if sys.platform != "linux":
        return
    program = array.array("B", b"".join(struct.pack("HBBI", *step) for step in _DROP_SYN))
    with contextlib.suppress(OSError):
        where = struct.pack("HP", len(_DROP_SYN), program.buffer_info()[0])
        listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, where)


def listeners(port: int) -> Iterator[socket.socket]:
    """The listening sockets of this process on a port, for who cannot ask their owner; none where there is no /proc."""
    if not os.path.isdir("/proc/self/fd"):
        return
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and sock.getsockname()[1] == port:
                yield sock
