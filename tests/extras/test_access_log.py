"""Access log files: what is written, rotated, sampled, dropped, and what a full disk does."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

LOGGER = logging.getLogger("vgi_rpc.access")


class Service(Protocol):
    def add(self, a: int, b: int) -> int: ...
    def fail(self) -> int: ...


class Impl:
    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self) -> int:
        raise ValueError("boom")


def record(**fields: Any) -> logging.LogRecord:
    return LOGGER.makeRecord(LOGGER.name, logging.INFO, "f", 1, "S.m ok", (), None, extra={"status": "ok", **fields})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def calls(good: int, bad: int = 0) -> None:
    with core.serve_pipe(Service, Impl()) as proxy:
        for i in range(good):
            assert proxy.add(i, 1) == i + 1
        for _ in range(bad):
            with pytest.raises(core.RpcError, match="boom"):
                proxy.fail()


Configure = Callable[..., Callable[[], None]]


@pytest.fixture
def configure() -> Iterator[Configure]:
    """configure_access_log, with every log closed and the logger left as it was found."""
    before = (LOGGER.level, list(LOGGER.handlers))
    closers: list[Callable[[], None]] = []

    def start(*args: Any, **options: Any) -> Callable[[], None]:
        close: Callable[[], None] = core.configure_access_log(*args, **options)
        closers.append(close)
        return close

    yield start
    for close in closers:
        close()
    assert (LOGGER.level, LOGGER.handlers) == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_line_per_call(configure: Configure, tmp_path: Path, asynchronous: bool) -> None:
    close = configure(tmp_path / "log", asynchronous=asynchronous)
    calls(3, 1)
    close()
    found = lines(tmp_path / "log")
    assert [(line["method"], line["status"], line["error_type"]) for line in found] == [
        ("add", "ok", ""),
        ("add", "ok", ""),
        ("add", "ok", ""),
        ("fail", "error", "ValueError"),
    ]
    assert {line["logger"] for line in found} == {"vgi_rpc.access"}
    assert all("sample_rate" not in line for line in found)


def test_path_is_filled_in_and_made(configure: Configure, tmp_path: Path) -> None:
    close = configure(str(tmp_path / "a" / "b" / "{server_id}-{pid}.log"), server_id="s1")
    calls(1)
    close()
    assert len(lines(tmp_path / "a" / "b" / f"s1-{os.getpid()}.log")) == 1


def test_files_are_appended_to(configure: Configure, tmp_path: Path) -> None:
    for _ in range(2):
        close = configure(tmp_path / "log")
        calls(1)
        close()
        close()
    calls(1)
    assert len(lines(tmp_path / "log")) == 2


def test_rotation_by_size_keeps_the_newest(configure: Configure, tmp_path: Path) -> None:
    close = configure(tmp_path / "log", max_bytes=3000, backup_count=2)
    calls(30)
    close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(file.stat().st_size <= 3000 for file in tmp_path.iterdir())
    assert all(lines(file) for file in tmp_path.iterdir())


def test_rotation_by_time(configure: Configure, tmp_path: Path) -> None:
    close = configure(tmp_path / "log", when="h", backup_count=3)
    calls(1)
    (handler,) = [found for found in LOGGER.handlers if isinstance(found, logging.handlers.TimedRotatingFileHandler)]
    handler.rolloverAt -= 3610  # an hour later
    calls(1)
    close()
    assert len(list(tmp_path.iterdir())) == 2


def test_long_records_are_cut(configure: Configure, tmp_path: Path) -> None:
    close = configure(tmp_path / "log", max_record_bytes=900)
    LOGGER.handle(record(request_id="r", claims={"sub": "x" * 1000}))
    close()
    (found,) = lines(tmp_path / "log")
    assert (found["claims"], found["truncated"]) == ({}, True)


def test_sampling_keeps_errors_and_says_its_rate(configure: Configure, tmp_path: Path) -> None:
    close = configure(tmp_path / "log", sample=0.0)
    calls(20, 2)
    close()
    assert [(line["status"], line["sample_rate"]) for line in lines(tmp_path / "log")] == [("error", 0.0)] * 2


def test_sampling_hangs_on_the_call() -> None:
    sampler = core.AccessLogSampler(0.3)
    kept = [i for i in range(2000) if sampler.filter(record(request_id=f"{i:016x}"))]
    assert 480 < len(kept) < 720
    assert kept == [i for i in range(2000) if sampler.filter(record(request_id=f"{i:016x}"))]
    assert len({sampler.filter(record(stream_id="s", request_id=str(i))) for i in range(50)}) == 1
    assert all(core.AccessLogSampler(1.0).filter(record(request_id=str(i))) for i in range(50))


def test_a_full_queue_drops_and_counts() -> None:
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(2)
    handler = core.DroppingQueueHandler(waiting)
    for i in range(5):
        handler.handle(record(request_id=str(i)))
    assert handler.dropped == 3
    assert [waiting.get().request_id for _ in range(2)] == ["0", "1"]  # type: ignore[attr-defined]
    handler.handle(record(request_id="5"))
    handler.handle(record(request_id="6"))
    assert waiting.get().dropped_records == 3  # type: ignore[attr-defined]
    assert not hasattr(waiting.get(), "dropped_records")


def test_closing_a_full_queue_writes_what_waits(configure: Configure, tmp_path: Path) -> None:
    close = configure(tmp_path / "log", asynchronous=True, queue_size=1)
    (handler,) = [found for found in LOGGER.handlers if isinstance(found, core.DroppingQueueHandler)]
    for i in range(200):
        LOGGER.handle(record(request_id=str(i)))
    close()
    found = lines(tmp_path / "log")
    dropped = sum(line.get("dropped_records", 0) for line in found)
    assert len(found) + dropped + handler._unreported == 200
    assert dropped + handler._unreported == handler.dropped


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_closing_writes_what_waits_for_a_slow_disk(configure: Configure, tmp_path: Path) -> None:
    """A pipe that nobody reads is the disk: it takes some records, and the others wait in the queue."""
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    close = configure(tmp_path / "log", asynchronous=True, queue_size=1000)
    for i in range(500):
        LOGGER.handle(record(request_id=str(i), claims={"padding": "x" * 1000}))
    handlers = list(LOGGER.handlers)
    closing = threading.Thread(target=close)
    closing.start()
    while handlers == LOGGER.handlers:  # until it is being closed
        pass
    os.set_blocking(reader, True)
    with open(reader, encoding="utf-8") as pipe:
        found = [json.loads(line) for line in pipe]
    closing.join(20)
    assert [line["request_id"] for line in found] == [str(i) for i in range(500)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_breaks_no_call(
    configure: Configure, capsys: pytest.CaptureFixture[str], asynchronous: bool
) -> None:
    close = configure("/dev/full", asynchronous=asynchronous)
    calls(5)
    close()
    shown = capsys.readouterr().err
    assert shown.count("No space left on device") == 1
    assert "5 record(s) lost" in shown
    assert "Traceback" not in shown


FULL = """
import json, logging, resource, sys
from tests.core import core
log = logging.getLogger("vgi_rpc.access")
close = core.configure_access_log(sys.argv[1])
record = lambda i: log.info("x", extra={"request_id": str(i), "status": "ok"})
record(0)
for _ in range(2):
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    for i in range(3): record(i)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    record(4); record(5)
close()
"""


def test_the_next_record_says_how_many_could_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", FULL, str(path)], check=True, timeout=30, stderr=subprocess.DEVNULL)
    found = [(line["request_id"], line.get("dropped_records")) for line in lines(path)]
    assert found == [("0", None), ("4", 3), ("5", None), ("4", 3), ("5", None)]


def test_a_cut_record_still_says_how_many_are_lost() -> None:
    lost = record(dropped_records=7, request_id="x" * 5000)
    found = json.loads(core.VgiAccessLogFormatter(max_record_bytes=1000).format(lost))
    assert (found["dropped_records"], found["truncated"]) == (7, "record_too_large")


@pytest.mark.parametrize("first", [0, 1])
def test_each_log_ends_by_itself(configure: Configure, tmp_path: Path, first: int) -> None:
    before = LOGGER.level
    closes = [configure(tmp_path / str(number)) for number in range(2)]
    calls(1)
    closes[first]()
    calls(2)
    closes[first]()  # again: nothing
    closes[1 - first]()
    calls(3)
    assert [len(lines(tmp_path / str(number))) for number in (first, 1 - first)] == [1, 3]
    assert LOGGER.level == before


def test_logging_config_does_not_silence_it(configure: Configure, tmp_path: Path) -> None:
    LOGGER.disabled = True  # as dictConfig leaves what existed before it
    close = configure(tmp_path / "log")
    calls(2)
    close()
    assert len(lines(tmp_path / "log")) == 2


@pytest.mark.parametrize("exc_info", [(None, None, None), None])
def test_no_exception_is_none(exc_info: Any) -> None:
    made = record()
    made.exc_info = exc_info
    for formatter in (core.VgiJsonFormatter(), core.VgiAccessLogFormatter()):
        assert "exception" not in json.loads(formatter.format(made))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_bytes": 1, "when": "D"}, "max_bytes"),
        ({"when": "never"}, "when"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_bytes": 1, "backup_count": -1}, "backup_count"),
        ({"sample": 1.5}, "rate"),
        ({"sample": -0.1}, "rate"),
        ({"max_record_bytes": 0}, "max_record_bytes"),
        ({"asynchronous": True, "queue_size": 0}, "queue_size"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    before = list(LOGGER.handlers)
    with pytest.raises(ValueError, match=text):
        core.configure_access_log(tmp_path / "log", **options)
    assert before == LOGGER.handlers
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        core.configure_access_log(tmp_path)
