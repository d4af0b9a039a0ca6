"""Access log files: sampling, dropping, rotation."""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

ROOT = Path(__file__).resolve().parent.parent.parent


class Service(Protocol):
    def add(self, a: int) -> int: ...


class Impl:
    def add(self, a: int) -> int:
        return a + 1


def record(status: str = "ok", request_id: str = "r", **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("vgi_rpc.access", logging.INFO, "", 0, "call", (), None)
    made.__dict__.update({"status": status, "request_id": request_id, **extra})
    return made


def test_sampler() -> None:
    sampler = core.AccessLogSampler(0.25)
    kept = [i for i in range(4000) if sampler.filter(record(request_id=f"{i:016x}"))]
    assert 850 < len(kept) < 1150
    assert kept == [i for i in range(4000) if core.AccessLogSampler(0.25).filter(record(request_id=f"{i:016x}"))]
    failed = record("error")
    assert sampler.filter(failed)
    assert failed.__dict__["sample_rate"] == 0.25
    assert not core.AccessLogSampler(0.0).filter(record())
    assert core.AccessLogSampler(1.0).filter(record())
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"within 0\.\.1"):
            core.AccessLogSampler(rate)


def test_full_queue_drops_and_says_so() -> None:
    waiting: queue.Queue[Any] = queue.Queue(1)
    handler = core.DroppingQueueHandler(waiting)
    for _ in range(3):
        handler.handle(record())
    assert handler.dropped == 2
    assert "dropped_records" not in waiting.get().__dict__
    handler.handle(record())
    assert waiting.get().__dict__["dropped_records"] == 2
    handler.handle(record())
    assert "dropped_records" not in waiting.get().__dict__
    assert handler.dropped == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_access_log_file(tmp_path: Path, asynchronous: bool) -> None:
    logger = logging.getLogger("vgi_rpc.access")
    before = (logger.level, list(logger.handlers))
    close = core.configure_access_log(
        tmp_path / "new" / "{server_id}-{pid}.jsonl", server_id="srv", asynchronous=asynchronous, queue_size=2000
    )
    with core.serve_pipe(Service, Impl()) as proxy:
        for i in range(500):
            proxy.add(i)
    close()
    close()
    lines = (tmp_path / "new" / f"srv-{os.getpid()}.jsonl").read_text().splitlines()
    assert len(lines) == 500
    first = json.loads(lines[0])
    assert (first["message"], first["status"], first["level"]) == ("Service.add ok", "ok", "INFO")
    assert (logger.level, logger.handlers) == before


def test_access_log_rotates(tmp_path: Path) -> None:
    close = core.configure_access_log(tmp_path / "log", max_bytes=2000, backup_count=2)
    for i in range(100):
        logging.getLogger("vgi_rpc.access").info("x" * 100, extra={"number": i})
    close()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["log", "log.1", "log.2"]
    assert all(0 < file.stat().st_size <= 2000 for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"max_bytes": 1, "when": "D"},
        {"sample": 2.0},
        {"max_record_bytes": 0},
        {"asynchronous": True, "queue_size": 0},
        {"when": "X"},
    ],
)
def test_access_log_refuses(tmp_path: Path, options: dict[str, Any]) -> None:
    before = list(logging.getLogger("vgi_rpc.access").handlers)
    with pytest.raises(ValueError):
        core.configure_access_log(tmp_path / "log", **options)
    assert logging.getLogger("vgi_rpc.access").handlers == before


def test_access_log_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]))
    code = f"import {__name__} as t; t.core.run_server(t.Service, t.Impl())"
    flags = ["--access-log", str(tmp_path / "log-{pid}"), "--access-log-async"]
    with core.connect(Service, [sys.executable, "-c", code, *flags]) as proxy:
        assert proxy.add(1) == 2
    (file,) = tmp_path.iterdir()
    assert [json.loads(line)["message"] for line in file.read_text().splitlines()] == ["Service.add ok"]
