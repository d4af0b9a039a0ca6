# Needs: the standard library only. Seam: the logger `vgi_rpc.access`.
"""Access log files: rotation, sampling and asynchronous writing (runtime.md section 6).

    close = configure_access_log("/var/log/calc-{pid}.jsonl", max_bytes=100_000_000, sample=0.1)
    ...
    close()

The records and their format come from the core; this module decides which of them are written, where, and by whom.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import logging.handlers
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

_LOGGER = logging.getLogger("vgi_rpc.access")


class AccessLogSampler(logging.Filter):
    """Keeps a fixed fraction of the successful calls, and every failed one; belongs on a handler.

    The decision hangs on the stream or request id, so all records of one call share it, in every process. Kept
    records carry `sample_rate`. ValueError for a rate outside 0..1.
    """

    def __init__(self, rate: float) -> None:
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must be within 0..1, got {rate}")
        super().__init__()
        self.rate = rate
        self._limit = int(rate * 0xFFFFFFFF)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        if self.rate < 1.0 and getattr(record, "status", "ok") == "ok" and not self._keeps(record):
            return False
        record.sample_rate = self.rate
        return True

    def _keeps(self, record: logging.LogRecord) -> bool:
        if self._limit == 0:
            return False
        key = str(getattr(record, "stream_id", "") or getattr(record, "request_id", ""))
        digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") <= self._limit


class DroppingQueueHandler(logging.handlers.QueueHandler):
    """Puts records on a bounded queue and never waits: when it is full the record is dropped and counted.

    The next record that finds room carries `dropped_records`, the number lost since the one before.
    """

    def __init__(self, queue: Any) -> None:
        super().__init__(queue)
        self._dropped = 0
        self._unreported = 0

    @property
    def dropped(self) -> int:
        """How many records have been dropped so far."""
        return self._dropped

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return a copy: every other handler sees the record as it was."""
        return copy.copy(record)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put the record on the queue, or count it as dropped."""
        if self._unreported:
            record.dropped_records = self._unreported
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1
            self._unreported += 1
        else:
            self._unreported = 0


def configure_access_log(
    path: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
    backup_count: int = 5,
    when: str | None = None,
    max_record_bytes: int = 1_048_576,
    asynchronous: bool = False,
    queue_size: int = 10_000,
    sample: float = 1.0,
    server_id: str = "",
) -> Callable[[], None]:
    """Append one JSON line per call to a file; returns what ends that, after writing what still waits.

    Args:
        path: `{pid}` and `{server_id}` are filled in; missing directories are made. Several processes need `{pid}`.
        max_bytes: rotate before the file grows above this size; excludes `when`.
        backup_count: rotated files to keep.
        when: rotate by time: S, M, H, D, MIDNIGHT or W0 to W6.
        max_record_bytes: longer records lose their claims, then their optional fields.
        asynchronous: a thread of its own writes; calls never wait for the disk, and records are dropped (and
            counted in the next one) when more than `queue_size` wait.
        sample: the fraction of successful calls to record; failed calls always are.

    Raises:
        ValueError: `max_bytes` with `when`, or a number out of range.
        OSError: the file cannot be opened.
    """
    if max_bytes is not None and when is not None:
        raise ValueError("max_bytes and when exclude each other")
    if when is not None and not re.fullmatch("[SMHD]|MIDNIGHT|W[0-6]", when.upper()):
        raise ValueError(f"when must be S, M, H, D, MIDNIGHT or W0 to W6, got {when!r}")
    if backup_count < 0 or (max_bytes is not None and max_bytes < 1):
        raise ValueError(
            f"max_bytes must be positive and backup_count not negative, got {max_bytes} and {backup_count}"
        )
    if asynchronous and queue_size < 1:
        raise ValueError(f"queue_size must be at least 1, got {queue_size}")
    sampler = AccessLogSampler(sample)
    formatter = core.VgiAccessLogFormatter(max_record_bytes=max_record_bytes)
    writer = _open(_place(path, server_id), max_bytes, backup_count, when)
    writer.setFormatter(formatter)
    handler, stop = _queued(writer, queue_size) if asynchronous else (writer, writer.close)
    if sample < 1.0:
        handler.addFilter(sampler)
    return _attach(handler, stop)


class _Counting(logging.FileHandler):
    """Counts the records that cannot be written (a full disk, say): calls and stderr go on.

    It says so once, and at the end; the next record that is written carries `dropped_records`.
    """

    lost = 0
    _unreported = 0

    def emit(self, record: logging.LogRecord) -> None:
        unreported = self._unreported
        if unreported:
            record = copy.copy(record)
            record.dropped_records = unreported + getattr(record, "dropped_records", 0)
        super().emit(record)
        if self._unreported == unreported:  # written
            self._unreported = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self.lost += 1
        self._unreported += 1
        stream: Any = self.stream
        self.stream = None  # else what could not be written would come later, counted as lost
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.buffer.raw.close()
        if self.lost == 1 and sys.stderr is not None:
            reason = sys.exc_info()[1]
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"access log {self.baseFilename}: {reason}; lost records are counted from now on\n")

    def close(self) -> None:
        try:
            super().close()
        finally:
            if self.lost and sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(f"access log {self.baseFilename}: {self.lost} record(s) lost\n")
                self.lost = 0


class _BySize(_Counting, logging.handlers.RotatingFileHandler):
    pass


class _ByTime(_Counting, logging.handlers.TimedRotatingFileHandler):
    pass


def _place(path: str | os.PathLike[str], server_id: str) -> str:
    place = os.path.abspath(os.fspath(path).replace("{pid}", str(os.getpid())).replace("{server_id}", server_id))
    os.makedirs(os.path.dirname(place), exist_ok=True)
    return place


def _open(place: str, max_bytes: int | None, backup_count: int, when: str | None) -> logging.Handler:
    if when is not None:
        return _ByTime(place, when=when, backupCount=backup_count, encoding="utf-8", utc=True)
    return _BySize(place, maxBytes=max_bytes or 0, backupCount=backup_count, encoding="utf-8")


def _queued(writer: logging.Handler, queue_size: int) -> tuple[logging.Handler, Callable[[], None]]:
    waiting: queue.Queue[Any] = queue.Queue(queue_size)
    handler = DroppingQueueHandler(waiting)
    listener = logging.handlers.QueueListener(waiting, writer)
    # stop() must find room for its mark: wait for it, where QueueListener would raise queue.Full.
    listener.enqueue_sentinel = lambda: waiting.put(None)  # type: ignore[method-assign]
    listener.start()

    def stop() -> None:
        listener.stop()
        writer.close()
        handler.close()

    return handler, stop


class _Attached:
    """The files that are open; the level of the logger is ours from the first to the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handlers: list[logging.Handler] = []
        self._before = logging.NOTSET

    def add(self, handler: logging.Handler) -> None:
        with self._lock:
            if not self._handlers:
                self._before = _LOGGER.level
            self._handlers.append(handler)
            _LOGGER.disabled = False  # logging.config silences what existed before it (disable_existing_loggers)
            _LOGGER.addHandler(handler)
            if not _LOGGER.isEnabledFor(logging.INFO):
                _LOGGER.setLevel(logging.INFO)

    def remove(self, handler: logging.Handler) -> bool:
        with self._lock:
            if handler not in self._handlers:
                return False
            self._handlers.remove(handler)
            _LOGGER.removeHandler(handler)
            if not self._handlers:
                _LOGGER.setLevel(self._before)
            return True


_attached = _Attached()


def _attach(handler: logging.Handler, stop: Callable[[], None]) -> Callable[[], None]:
    _attached.add(handler)

    def close() -> None:
        if not _attached.remove(handler):
            return
        with contextlib.suppress(OSError):
            stop()

    return close
