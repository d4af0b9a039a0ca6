"""Calls and ticks sent ahead: `submit`, `map_calls`, `read_ahead` (API.md 12.4, 12.5)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

ROWS = pa.schema([("n", pa.int64())])


class Count(core.ProducerState):
    def __init__(self, left: int, made: list[int], fail_at: int = -1) -> None:
        self.left, self.made, self.fail_at = left, made, fail_at

    def produce(self, out: Any, ctx: Any) -> None:
        if len(self.made) == self.fail_at:
            raise ValueError("no more")
        if self.left == 0:
            out.finish()
            return
        self.left -= 1
        self.made.append(self.left)
        ctx.client_log(core.Level.INFO, f"made {self.left}")
        out.emit_pydict({"n": [self.left]})


class Svc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def big(self, n: int) -> bytes: ...
    def fail(self, at: int) -> int: ...
    def slow(self, seconds: float) -> int: ...
    def talk(self, n: int) -> int: ...
    def pid(self) -> int: ...
    def count(self, n: int, fail_at: int = -1) -> core.Stream[Count]: ...


class Impl:
    def __init__(self) -> None:
        self.made: list[int] = []
        self.threads: set[int] = set()

    def add(self, a: float, b: float) -> float:
        return a + b

    def big(self, n: int) -> bytes:
        return b"x" * n

    def fail(self, at: int) -> int:
        if at == 3:
            raise KeyError("three")
        return at

    def slow(self, seconds: float) -> int:
        time.sleep(seconds)
        return 1

    def talk(self, n: int, ctx: Any) -> int:
        ctx.client_log(core.Level.INFO, f"call {n}")
        return n

    def pid(self) -> int:
        return os.getpid()

    def count(self, n: int, fail_at: int = -1) -> Any:
        return core.Stream(ROWS, Count(n, self.made, fail_at))


KINDS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "pipe": core.serve_pipe,
    "unix": core.serve_unix_pipe,
    "tcp": core.serve_tcp_pipe,
}


@pytest.fixture(params=KINDS)
def svc(request: pytest.FixtureRequest) -> Iterator[Any]:
    with KINDS[request.param](Svc, Impl()) as proxy:
        yield proxy


def test_map_calls_yields_in_order(svc: Any) -> None:
    for depth in (1, 2, 32, 64):
        found = core.map_calls(svc.add, ({"a": 1.0, "b": float(k)} for k in range(500)), depth=depth)
        assert list(found) == [1.0 + k for k in range(500)]
        assert svc.add(1.0, 2.0) == 3.0  # the connection is free again


def test_large_replies_and_requests_do_not_block(svc: Any) -> None:
    sizes = [200_000 if k % 3 else 5 for k in range(60)]
    assert [len(x) for x in core.map_calls(svc.big, ({"n": n} for n in sizes))] == sizes


def test_an_error_is_raised_in_its_place(svc: Any) -> None:
    found = []
    with pytest.raises(core.RpcError, match="three"):
        for value in core.map_calls(svc.fail, ({"at": k} for k in range(50))):
            found.append(value)
    assert found == [0, 1, 2]
    assert svc.fail(1) == 1


def test_a_wrong_argument_is_raised_in_its_place(svc: Any) -> None:
    found = []
    with pytest.raises(core.RpcArgumentError, match="missing required argument"):
        for value in core.map_calls(svc.add, [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"c": 1.0}]):
            found.append(value)
    assert found == [2.0, 3.0]
    assert svc.add(1.0, 2.0) == 3.0


def test_leaving_early_reads_what_was_sent(svc: Any) -> None:
    calls = core.map_calls(svc.add, ({"a": 1.0, "b": float(k)} for k in range(1000)))
    assert [next(calls), next(calls)] == [1.0, 2.0]
    with pytest.raises(core.RpcError, match="a stream is open"):
        svc.add(1.0, 1.0)
    calls.close()  # type: ignore[attr-defined]
    assert svc.add(40.0, 2.0) == 42.0


def test_logs_belong_to_their_calls() -> None:
    seen: list[str] = []
    with core.serve_pipe(Svc, Impl(), on_log=lambda message: seen.append(message.message)) as proxy:
        assert list(core.map_calls(proxy.talk, ({"n": k} for k in range(40)))) == list(range(40))
    assert seen == [f"call {k}" for k in range(40)]


@pytest.mark.parametrize("depth", [0, 65])
def test_depth_is_bounded(svc: Any, depth: int) -> None:
    with pytest.raises(ValueError, match=r"depth must be within 1\.\.64"):
        core.map_calls(svc.add, [], depth=depth)


def test_only_unary_methods_of_a_proxy(svc: Any) -> None:
    with pytest.raises(TypeError, match=r"count\(\) is a stream"):
        core.map_calls(svc.count, [])
    with pytest.raises(TypeError, match="expected a method of a proxy"):
        core.submit(len, "x")


def test_submit_gives_futures(svc: Any) -> None:
    futures = [core.submit(svc.add, 1.0, b=float(k)) for k in range(300)]
    assert [future.result(10) for future in futures] == [1.0 + k for k in range(300)]
    failing = [core.submit(svc.fail, k) for k in range(6)]
    assert isinstance(failing[3].exception(10), core.RpcError)
    assert [failing[k].result(10) for k in (0, 1, 2, 4, 5)] == [0, 1, 2, 4, 5]
    with pytest.raises(core.RpcArgumentError):
        core.submit(svc.add, "x", 1.0)


def test_submitted_calls_and_plain_calls_mix(svc: Any) -> None:
    wrong: list[Any] = []

    def plain(k: int) -> None:
        for i in range(50):
            if svc.add(float(k), float(i)) != k + i:
                wrong.append((k, i))

    threads = [threading.Thread(target=plain, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    futures = [core.submit(svc.add, 0.5, float(k)) for k in range(200)]
    assert [future.result(30) for future in futures] == [0.5 + k for k in range(200)]
    for thread in threads:
        thread.join(30)
    assert not wrong


def test_the_thread_of_submit_ends(svc: Any) -> None:
    assert core.submit(svc.add, 1.0, 2.0).result(10) == 3.0
    end = time.monotonic() + 10
    while any(thread.name == "vgi-rpc-submit" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert core.submit(svc.add, 1.0, 2.0).result(10) == 3.0


def test_a_cancelled_future_is_never_sent(svc: Any) -> None:
    first = core.submit(svc.slow, 0.3)
    time.sleep(0.1)
    later = [core.submit(svc.add, 1.0, float(k)) for k in range(40)]  # more than fit the window
    assert later[-1].cancel()
    assert first.result(10) == 1 and later[0].result(10) == 1.0 and later[-1].cancelled()


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.core import core
from tests.test_13_pipeline import Impl, Svc
core.run_server(Svc, Impl())
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(root=str(Path(__file__).resolve().parents[1])))
    return [sys.executable, str(path)]


def test_a_killed_worker_fails_every_future(worker: list[str]) -> None:
    with core.connect(Svc, worker) as proxy:
        pid = proxy.pid()
        futures = [core.submit(proxy.slow, 5.0) for _ in range(5)]
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        assert isinstance(futures[0].exception(10), core.WorkerDiedError)
        assert all(isinstance(future.exception(10), core.ConnectionLostError) for future in futures)
        with pytest.raises(core.ConnectionLostError):
            proxy.add(1.0, 2.0)


def test_a_deadline_fails_what_is_in_flight(worker: list[str]) -> None:
    with core.connect(Svc, worker) as proxy:
        proxy.add(1.0, 1.0)
        hasty = core.with_options(proxy, timeout=0.5)
        futures = [core.submit(hasty.slow, 3.0) for _ in range(3)]
        assert isinstance(futures[0].exception(10), core.DeadlineExceededError)
        assert all(isinstance(future.exception(10), core.RpcError) for future in futures)


def test_an_interrupt_poisons(worker: list[str]) -> None:
    with core.connect(Svc, worker) as proxy:
        proxy.add(1.0, 1.0)
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(core.map_calls(proxy.slow, ({"seconds": 2.0} for _ in range(3))))
        timer.join()
        with pytest.raises(core.ConnectionLostError, match="KeyboardInterrupt"):
            proxy.add(1.0, 2.0)


# ---- producers


@pytest.mark.parametrize("ahead", [0, 1, 4, 63])
def test_read_ahead_changes_no_result(svc: Any, ahead: int) -> None:
    fast = core.with_options(svc, read_ahead=ahead)
    for n in (0, 1, 5, 200):
        assert [item.batch.column(0)[0].as_py() for item in fast.count(n)] == list(range(n))[::-1]
        assert svc.add(1.0, 2.0) == 3.0


def test_leaving_early_waits_for_what_was_asked() -> None:
    impl = Impl()
    with core.serve_pipe(Svc, impl) as proxy:
        with core.with_options(proxy, read_ahead=8).count(1000) as stream:
            assert next(iter(stream)).batch.num_rows == 1
        assert 1 < len(impl.made) <= 9
        assert proxy.add(1.0, 2.0) == 3.0


def test_an_error_ahead_ends_the_stream(svc: Any) -> None:
    found = []
    with pytest.raises(core.RpcError, match="no more"):
        for item in core.with_options(svc, read_ahead=16).count(100, 5):
            found.append(item)
    assert len(found) == 5 and svc.add(1.0, 2.0) == 3.0


def test_a_tick_behind_others_carries_no_metadata(svc: Any) -> None:
    with core.with_options(svc, read_ahead=4).count(20) as stream:
        stream.tick()
        with pytest.raises(core.RpcArgumentError, match="cannot carry metadata"):
            stream.tick(core.encode_metadata({"k": "v"}))
        assert stream.tick().batch.num_rows == 1  # nothing was lost
    assert svc.add(1.0, 2.0) == 3.0


def test_messages_stay_in_front_of_their_batch() -> None:
    seen: list[str] = []
    with core.serve_pipe(Svc, Impl(), on_log=lambda message: seen.append(message.message)) as proxy:
        for item in core.with_options(proxy, read_ahead=8).count(30):
            assert f"made {item.batch.column(0)[0].as_py()}" in seen
    assert seen == [f"made {k}" for k in range(30)][::-1]


@pytest.mark.parametrize("ahead", [-1, 64])
def test_the_window_is_bounded(svc: Any, ahead: int) -> None:
    with pytest.raises(ValueError, match=r"read_ahead must be within 0\.\.63"):
        core.with_options(svc, read_ahead=ahead)


# ---- whoever waits for a Future, or for the connection, gets it


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_a_callback_that_wants_to_exit_settles_every_future(error: BaseException) -> None:
    def log(message: core.Message) -> None:
        raise error

    with core.serve_pipe(Svc, Impl()) as proxy:
        talking = core.with_options(proxy, on_log=log)
        first, *others = [core.submit(talking.talk, 1) for _ in range(5)]
        with pytest.raises(type(error)):
            first.result(timeout=10)
        for future in others:
            with pytest.raises((core.ConnectionLostError, type(error))):
                future.result(timeout=10)
        with pytest.raises(core.ConnectionLostError):
            core.submit(proxy.add, 1.0, 2.0).result(timeout=10)


def test_a_thread_that_cannot_start_settles_the_future(monkeypatch: pytest.MonkeyPatch) -> None:
    with core.serve_pipe(Svc, Impl()) as proxy:
        with monkeypatch.context() as patch:

            def start(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", start)
            future = core.submit(proxy.add, 1.0, 2.0)
            with pytest.raises(core.RpcError, match="can't start new thread") as caught:
                future.result(timeout=10)
            assert caught.value.sent == "no"
        assert core.submit(proxy.add, 1.0, 2.0).result(timeout=10) == 3.0


def test_a_direct_call_does_not_starve_behind_steady_submission() -> None:
    with core.serve_pipe(Svc, Impl()) as proxy:
        stop, futures = threading.Event(), []

        def pour() -> None:
            while not stop.is_set():
                futures.append(core.submit(proxy.add, 1.0, float(len(futures))))
                if len(futures) > 400:  # always some hundreds ahead of the answers
                    futures[-400].result(timeout=20)

        thread = threading.Thread(target=pour)
        thread.start()
        while len(futures) < 500:
            time.sleep(0.001)
        longest = 0.0
        for n in range(20):
            began = time.monotonic()
            assert core.with_options(proxy, timeout=20.0).add(float(n), 1.0) == n + 1.0
            longest = max(longest, time.monotonic() - began)
        stop.set()
        thread.join(20)
        assert [f.result(timeout=20) for f in futures] == [n + 1.0 for n in range(len(futures))]
        assert longest < 2.0
        assert not proxy._link.channel.wanted
