"""Room 14: what the pool lends, takes back, counts and throws away."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tests.core import core

WORKER = """
import importlib, os, sys
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

core = importlib.import_module({core!r})


@dataclass
class Count(core.ProducerState):
    left: int
    at: int = 0

    def produce(self, out, ctx):
        if self.at == self.left:
            return out.finish()
        out.emit_pydict({{"n": [self.at]}})
        self.at += 1


class Svc(Protocol):
    def pid(self) -> int: ...
    def fail(self) -> int: ...
    def die(self) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...


class Impl:
    def pid(self):
        return os.getpid()

    def fail(self):
        raise KeyError("refused")

    def die(self):
        os._exit(3)

    def count(self, n):
        return core.Stream(output_schema=pa.schema([("n", pa.int64())]), state=Count(n))


core.run_server(Svc, Impl())
"""
ZERO = core.PoolMetrics(0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass
class Count(core.ProducerState):
    left: int


class Svc(Protocol):
    def pid(self) -> int: ...
    def fail(self) -> int: ...
    def die(self) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of a worker; one with a further argument is another command."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(core=core.__name__), encoding="utf-8")
    return [sys.executable, str(script)]


@pytest.fixture
def other(worker: list[str]) -> list[str]:
    return [worker[0], "-u", worker[1]]


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def kill(pid: int) -> None:
    """End a worker of ours and wait until it is a zombie: the pool collects it."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def change(pool, before):
    """What has changed in the metrics."""
    now = pool.metrics
    return {k: getattr(now, k) - getattr(before, k) for k in now._fields if getattr(now, k) != getattr(before, k)}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_idle": -1}, "max_idle must be non-negative, got -1"),
        ({"idle_timeout": 0}, "idle_timeout must be positive, got 0"),
        ({"idle_timeout": -2.5}, "idle_timeout must be positive, got -2.5"),
    ],
)
def test_bad_options(options, text: str) -> None:
    with pytest.raises(ValueError) as caught:
        core.WorkerPool(**options)
    assert str(caught.value) == text


def test_the_measured_sequence_of_borrow_return_reuse_and_close(worker) -> None:
    with core.WorkerPool() as pool:
        assert pool.metrics == ZERO
        with pool.connect(Svc, worker) as svc:
            assert pool.metrics == ZERO._replace(borrows=1, spawns=1, active=1)
            assert (pool.idle_count, pool.active_count) == (0, 1)
            first = svc.pid()
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, returns=1, idle=1)
        assert (pool.idle_count, pool.active_count) == (1, 0)
        with pool.connect(Svc, tuple(worker)) as svc:
            assert pool.metrics == ZERO._replace(borrows=2, spawns=1, reuses=1, returns=1, active=1)
            assert svc.pid() == first
        assert not ended(first)
    assert pool.metrics == ZERO._replace(borrows=2, spawns=1, reuses=1, returns=2, discards=1)
    assert ended(first)


def test_the_last_one_returned_is_the_first_one_lent(worker) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as a, pool.connect(Svc, worker) as b:
            pids = [a.pid(), b.pid()]
            assert pool.active_count == 2
        assert pids[0] != pids[1]  # b came back first, a last
        with pool.connect(Svc, worker) as one, pool.connect(Svc, worker) as two:
            assert [one.pid(), two.pid()] == pids


def test_workers_are_kept_by_command_and_the_oldest_of_all_is_evicted(worker, other) -> None:
    with core.WorkerPool(max_idle=1) as pool:
        with pool.connect(Svc, worker) as svc:
            first = svc.pid()
        before = pool.metrics
        with pool.connect(Svc, other) as svc:
            second = svc.pid()
            assert change(pool, before) == {"borrows": 1, "spawns": 1, "active": 1}
        assert change(pool, before) == {"borrows": 1, "spawns": 1, "returns": 1, "evictions_max": 1}
        assert second != first
        assert ended(first)
        assert not ended(second)
        with pool.connect(Svc, other) as svc:
            assert svc.pid() == second


def test_no_idle_worker_is_kept_when_none_may_be(worker) -> None:
    with core.WorkerPool(max_idle=0) as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, returns=1, evictions_max=1)
        assert ended(pid)


def test_errors_of_methods_and_of_the_block_keep_the_worker(worker) -> None:
    with core.WorkerPool() as pool:
        with pytest.raises(ZeroDivisionError), pool.connect(Svc, worker) as svc:
            first = svc.pid()
            with pytest.raises(core.RpcError) as caught:
                svc.fail()
            assert caught.value.error_type == "KeyError"
            raise ZeroDivisionError
        assert pool.metrics.returns == 1
        with pool.connect(Svc, worker) as svc:
            assert svc.pid() == first


def test_a_finished_or_closed_stream_keeps_the_worker(worker) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
            assert sum(b.batch.num_rows for b in svc.count(n=3)) == 3
        with pool.connect(Svc, worker) as svc, svc.count(n=10**6) as stream:
            next(iter(stream))
        assert pool.metrics == ZERO._replace(borrows=2, spawns=1, reuses=1, returns=2, idle=1)
        with pool.connect(Svc, worker) as svc:
            assert svc.pid() == pid


def test_an_abandoned_stream_discards_the_worker(worker, caplog) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
            stream = svc.count(n=10**6)
            next(iter(stream))
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, discards=1)
        assert ended(pid)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "Discarding worker with abandoned stream" in record.getMessage()
        with pool.connect(Svc, worker) as svc:
            assert svc.pid() != pid


def test_a_worker_that_dies_during_a_call_is_discarded(worker, caplog) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc, pytest.raises(core.ConnectionLostError):
            svc.die()
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, discards=1)
        (text,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert text.startswith("Worker died during use: pid=")
        assert "exit_code=3" in text
        with pool.connect(Svc, worker) as svc:
            assert svc.pid()
        assert pool.metrics.spawns == 2


def test_a_worker_that_dies_unseen_during_use_is_discarded(worker, caplog) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc:
            kill(svc.pid())
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, discards=1)
        assert "Worker died during use: pid=" in caplog.text


def test_a_worker_that_dies_while_idle_is_replaced(worker, caplog) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
        before = pool.metrics
        kill(pid)
        with pool.connect(Svc, worker) as svc:
            assert svc.pid() != pid
            assert change(pool, before) == {"borrows": 1, "spawns": 1, "discards": 1, "idle": -1, "active": 1}
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert str(pid) in caplog.text
        assert "exit_code=-9" in caplog.text


def test_idle_workers_end_after_the_timeout(worker) -> None:
    with core.WorkerPool(idle_timeout=0.2) as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
            time.sleep(0.5)  # one that is lent out is left alone
            assert svc.pid() == pid
        wait_for(lambda: pool.metrics.evictions_idle == 1)
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, returns=1, evictions_idle=1)
        wait_for(lambda: ended(pid))


def test_close_leaves_borrowed_workers_alone_until_they_come_back(worker, other, caplog) -> None:
    pool = core.WorkerPool(idle_timeout=0.2)
    with pool.connect(Svc, worker) as svc:
        pid = svc.pid()
        pool.close()
        assert caplog.records[-1].levelno == logging.WARNING
        assert svc.pid() == pid
        assert pool.metrics == ZERO._replace(borrows=1, spawns=1, active=1)
    assert pool.metrics == ZERO._replace(borrows=1, spawns=1, discards=1)
    assert ended(pid)
    pool.close()
    assert pool.metrics.discards == 1
    assert not [t for t in threading.enumerate() if t.name == "vgi_rpc-pool"]


def test_a_closed_pool_lends_nothing(worker) -> None:
    pool = core.WorkerPool()
    pool.close()
    with pytest.raises(RuntimeError, match=r"^WorkerPool is closed$"), pool.connect(Svc, worker):
        pass
    assert pool.metrics == ZERO


def test_a_worker_that_cannot_be_started_leaves_nothing_behind(tmp_path: Path, worker) -> None:
    with core.WorkerPool() as pool:
        with pytest.raises(FileNotFoundError) as caught, pool.connect(Svc, [str(tmp_path / "missing")]):
            pass
        assert "could not start the worker" in caught.value.__notes__[0]
        assert (pool.idle_count, pool.active_count) == (0, 0)
        assert pool.metrics == ZERO._replace(borrows=1)
        with pool.connect(Svc, worker) as svc:
            assert svc.pid()


def test_a_command_is_a_list_not_a_string() -> None:
    with core.WorkerPool() as pool:
        with pytest.raises(TypeError, match="cmd must be a list"), pool.connect(Svc, "missing worker.py"):
            pass
        assert pool.active_count == 0


def test_a_bad_timeout_is_refused_before_anything_is_borrowed(worker) -> None:
    with core.WorkerPool() as pool:
        with pytest.raises(ValueError, match="timeout"), pool.connect(Svc, worker, timeout=-1):
            pass
        assert pool.metrics == ZERO


def test_threads_share_a_pool(worker) -> None:
    pids, errors = [], []
    with core.WorkerPool(max_idle=2) as pool:

        def use() -> None:
            try:
                for _ in range(3):
                    with pool.connect(Svc, worker) as svc:
                        pids.append(svc.pid())
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=use) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert errors == []
        assert len(pids) == 9
        seen = pool.metrics
        assert (seen.borrows, seen.returns, seen.active) == (9, 9, 0)
        assert seen.spawns + seen.reuses == 9
        assert seen.idle == seen.spawns - seen.evictions_max <= 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_not_borrow(worker) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as svc:
            pid = svc.pid()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                pool.close()  # not its workers
                with pool.connect(Svc, worker):
                    pass
            except core.WrongProcessError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pool.connect(Svc, worker) as svc:
            assert svc.pid() == pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_block_of_its_parent(worker) -> None:
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as proxy:
            pid = proxy.pid()
            pool._lock.acquire()  # as if another thread of the parent were inside
            child = os.fork()
            if child:
                pool._lock.release()
                assert proxy.pid() == pid
        if not child:
            os._exit(0 if pool.idle_count == 0 else 1)
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
        if ended == (0, 0):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert ended == (child, 0)
        with pool.connect(Svc, worker) as proxy:
            assert proxy.pid() == pid


def test_a_proxy_ends_with_the_block_that_borrowed_its_worker(worker):
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as first:
            pid = first.pid()
            method, other = first.pid, core.with_options(first, timeout=5.0)
        with pool.connect(Svc, worker) as second:
            assert second.pid() == pid
            for call in (first.pid, method, other.pid, lambda: first.count(1), lambda: core.ping(first)):
                with pytest.raises(core.ConnectionLostError, match="block that borrowed") as caught:
                    call()
                assert caught.value.sent == "no"
            with pytest.raises(core.ConnectionLostError, match="block that borrowed"):
                core.submit(other.pid).result(timeout=10)
            assert second.pid() == pid
        assert pool.metrics.reuses == 1


def test_a_worker_that_said_too_much_is_not_lent_again(worker):
    with core.WorkerPool() as pool:
        with pool.connect(Svc, worker) as first:
            pid = first.pid()
            first._link.channel.buf += b"more"
        with pool.connect(Svc, worker) as second:
            assert second.pid() != pid
        assert pool.metrics.discards == 1
