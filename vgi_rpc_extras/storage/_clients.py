# Needs: the standard library only. Used by s3.py and gcs.py.
"""The client of a storage service in this process: a fork's two processes must not read each other's answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

_locks: dict[int, threading.Lock] = {}  # by process: one that was held at the fork stays held in the child


def client_of_this_process(clients: dict[int, Any], make: Callable[[], Any]) -> Any:
    """The client of this process, made at first use, by one thread at a time. A parent's is left alone, and open."""
    pid = os.getpid()
    with _locks.setdefault(pid, threading.Lock()):
        if pid not in clients:
            clients[pid] = make()
        return clients[pid]
