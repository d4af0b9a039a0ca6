"""A server that runs for long: nothing leaks, and nothing that is sent to it stops it. Run with `-m long`.

VGI_RPC_SOAK_SCALE scales the number of calls and mutants (default 1.0; 0.01 is a quick look).
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors and memory through /proc"),
]

SCALE = float(os.environ.get("VGI_RPC_SOAK_SCALE", "1"))
N = pa.schema([("n", pa.int64())])
CALLS = max(100, int(10_000 * SCALE))
CONNECTIONS = max(10, int(200 * min(SCALE, 1.0)))
MUTANTS = max(500, int(100_000 * SCALE))
CONTROL_EVERY = 1000 if MUTANTS >= 10_000 else 100
MAX_GROWTH = 32 << 20  # bytes of resident memory after the warm-up
PATIENCE = 30.0  # seconds for one answer, on a loaded machine


@dataclass
class Count(core.ProducerState):
    left: int
    fail_at: int = -1
    at: int = 0

    def produce(self, out: Any, ctx: Any) -> None:
        if self.at == self.fail_at:
            raise ValueError(f"stopped at {self.at}")
        if self.at == self.left:
            out.finish()
            return
        out.emit_pydict({"n": [self.at]})
        self.at += 1


@dataclass
class Double(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit_pydict({"n": [2 * v for v in input.batch.column("n").to_pylist()]})


class Soak(Protocol):
    def add(self, a: int, b: int) -> int: ...
    def text(self, value: str, tags: list[str]) -> str: ...
    def blob(self, size: int) -> bytes: ...
    def fail(self, text: str) -> None: ...
    def count(self, n: int, fail_at: int = -1) -> core.Stream[Count]: ...
    def double(self) -> core.Stream[Double]: ...


class Impl:
    def add(self, a: int, b: int) -> int:
        return a + b

    def text(self, value: str, tags: list[str], ctx: Any) -> str:
        ctx.client_log(core.Level.INFO, "text")
        return value + ",".join(tags)

    def blob(self, size: int) -> bytes:
        return bytes(size)

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def count(self, n: int, fail_at: int) -> Any:
        return core.Stream(N, Count(n, fail_at))

    def double(self) -> Any:
        return core.Stream(N, Double(), input_schema=N)


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """Or the records that pytest keeps of the errors are what grows."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


# ---- what a process holds


@dataclass
class Holding:
    descriptors: int
    threads: int
    memory: int

    @classmethod
    def now(cls) -> Holding:
        gc.collect()
        pa.default_memory_pool().release_unused()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        fds = len(os.listdir("/proc/self/fd"))
        return cls(fds, threading.active_count(), pages * resource.getpagesize())


def back_where_it_was(before: Holding, what: str) -> None:
    """Compare with now; connections of a server end a moment after their clients."""
    end = time.monotonic() + PATIENCE
    while (now := Holding.now()) and (now.descriptors, now.threads) != (before.descriptors, before.threads):
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    growth = now.memory - before.memory
    print(f"{what}: descriptors {before.descriptors} -> {now.descriptors}, threads {before.threads} -> {now.threads}")
    if before.memory < sys.maxsize // 2:
        print(f"{what}: memory {before.memory / 2**20:.1f} -> {now.memory / 2**20:.1f} MiB")
    assert (now.descriptors, now.threads) == (before.descriptors, before.threads)
    assert growth < MAX_GROWTH, f"memory grew by {growth / 2**20:.1f} MiB"


def warmed_up(before: Holding) -> Holding:
    """Check descriptors and threads only: what memory was taken so far may be kept."""
    back_where_it_was(Holding(before.descriptors, before.threads, sys.maxsize // 2), "warm-up")
    return Holding.now()


@contextlib.contextmanager
def unix_server(path: str) -> Iterator[None]:
    """Run a threaded Unix server in this process, until its last connection ends."""
    bound = threading.Event()
    server = core.RpcServer(Soak, Impl())
    thread = threading.Thread(
        target=core.serve_unix,
        args=(server, path),
        kwargs={"threaded": True, "idle_timeout": 2.0, "on_bound": lambda _: bound.set()},
        daemon=True,
    )
    thread.start()
    assert bound.wait(PATIENCE)
    try:
        yield
    finally:
        thread.join(PATIENCE)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("s") / "s")


# ---- mixed calls


def one_call(proxy: Any, rng: random.Random) -> None:
    kind = rng.randrange(11)
    n = rng.randrange(6)
    if kind == 0:
        assert proxy.add(a=n, b=7) == n + 7
    elif kind == 1:
        assert proxy.text("é" * n, ["t"] * n) == "é" * n + ",".join(["t"] * n)
    elif kind == 2:
        size = rng.choice([0, 1, 4096, 300_000])
        assert len(proxy.blob(size)) == size
    elif kind == 3:
        with pytest.raises(core.RpcError, match="no luck"):
            proxy.fail("no luck")
    elif kind == 4:
        with pytest.raises(TypeError):
            proxy.add(a=n, b="seven")
    elif kind == 5:
        assert [b.batch.column("n")[0].as_py() for b in proxy.count(n)] == list(range(n))
    elif kind == 6:
        with pytest.raises(core.RpcError, match=f"stopped at {n}"):
            list(proxy.count(9, n))
    elif kind == 7:
        session = proxy.count(1000)
        for _ in range(n):
            session.tick()
        session.cancel()
    elif kind == 8:
        with proxy.count(1000) as session:
            for _ in range(n + 1):
                session.tick()
    elif kind == 9:
        assert proxy.count(n).read_all().num_rows == n
    else:
        with proxy.double() as session:
            for value in range(n):
                answer = session.exchange(core.AnnotatedBatch.from_pydict({"n": [value]}, N))
                assert answer.batch.column("n").to_pylist() == [2 * value]
            if n % 2:
                session.cancel()


@pytest.mark.parametrize("serve", ["serve_pipe", "serve_unix_pipe", "serve_tcp_pipe"])
def test_mixed_calls_on_one_connection(serve: str) -> None:
    rng = random.Random(20)
    outside = Holding.now()
    with getattr(core, serve)(Soak, Impl(), on_log=lambda m: None, timeout=PATIENCE) as proxy:
        for _ in range(max(200, CALLS // 10)):  # warm-up
            one_call(proxy, rng)
        before = Holding.now()
        start = time.perf_counter()
        for _ in range(CALLS):
            one_call(proxy, rng)
        print(f"{serve}: {CALLS} calls, {(time.perf_counter() - start) / CALLS * 1e6:.0f} us each")
        back_where_it_was(before, serve)
    now = Holding.now()
    assert (now.descriptors, now.threads) == (outside.descriptors, outside.threads)


# ---- many connections: connected without a timeout, so that a full backlog is waited for


def connections_at_once(path: str, count: int, seed: int) -> None:
    """Open `count` connections, use all of them while all are open, then drop some with a stream under way."""
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(core.unix_connect(Soak, path)) for _ in range(count)]
        for turn in range(3):
            for at, proxy in enumerate(proxies):
                assert proxy.add(a=at, b=turn) == at + turn
                one_call(proxy, rng)
        abandoned = [proxy.count(10) for proxy in proxies[::3]]
        for session in abandoned:
            session.tick()
            session.close() if rng.random() < 0.5 else session.cancel()


def connections_from_threads(path: str, count: int) -> None:
    failures: list[BaseException] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        try:
            with core.unix_connect(Soak, path) as proxy:
                for _ in range(10):
                    one_call(proxy, rng)
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_many_connections_on_one_server(path: str) -> None:
    outside = Holding.now()
    with unix_server(path), core.unix_connect(Soak, path, timeout=PATIENCE) as control:
        assert control.add(a=1, b=2) == 3
        before = Holding.now()
        connections_at_once(path, CONNECTIONS, 1)  # warm-up: thread stacks, allocator arenas
        connections_from_threads(path, CONNECTIONS)
        before = warmed_up(before)
        start = time.perf_counter()
        connections_at_once(path, CONNECTIONS, 2)
        connections_from_threads(path, CONNECTIONS)
        print(f"2 x {CONNECTIONS} connections: {time.perf_counter() - start:.1f} s")
        back_where_it_was(before, "connections")
        assert control.add(a=1, b=2) == 3
    now = Holding.now()
    assert (now.descriptors, now.threads) == (outside.descriptors, outside.threads)


def test_clients_that_vanish(path: str) -> None:
    """A client that closes its socket in the middle of a message leaves nothing behind."""
    samples = requests()
    rng = random.Random(3)
    with unix_server(path), core.unix_connect(Soak, path, timeout=PATIENCE) as control:
        assert control.add(a=1, b=2) == 3
        before = Holding.now()
        for _ in range(CONNECTIONS):
            data = rng.choice(samples)
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                sock.sendall(data[: rng.randrange(len(data))])
        back_where_it_was(before, "vanished clients")
        assert control.add(a=1, b=2) == 3


# ---- mutated messages


def stream(batches: list[pa.RecordBatch], metadata: dict[bytes, bytes] | None = None) -> bytes:
    sink = io.BytesIO()
    with core.new_ipc_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch, pa.KeyValueMetadata(metadata) if metadata else None)
    return sink.getvalue()


def request(method: str, **cells: Any) -> bytes:
    metadata = {
        core.RPC_METHOD_KEY: method.encode(),
        core.REQUEST_VERSION_KEY: core.REQUEST_VERSION,
        core.PROTOCOL_KEY: b"Soak",
    }
    schema = core.rpc_methods(Soak)[method].params_schema
    return stream([pa.RecordBatch.from_pylist([cells], schema=schema)], metadata)


def requests() -> list[bytes]:
    """Return what clients send: unary requests, several in a row, streams with their inputs, a cancel."""
    tick = core.empty_batch(core.EMPTY_SCHEMA)
    numbers = pa.RecordBatch.from_pydict({"n": [1, 2, 3]}, schema=N)
    add, text = request("add", a=1, b=2), request("text", value="abc", tags=["x", "", "yy"])
    return [
        add,
        text,
        add + text + add,
        request("count", n=3, fail_at=-1) + stream([tick] * 4),
        request("count", n=3, fail_at=-1) + stream([tick], {core.CANCEL_KEY: b"1"}),
        request("double") + stream([numbers, numbers]) + add,
    ]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Damage a few places: bits, bytes, 32-bit numbers, pieces removed, repeated or inserted, the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = rng.randrange(len(out))
        how = rng.randrange(8)
        if how <= 1:
            out[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif how == 3:
            at &= ~3
            value = rng.choice((0, 1, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
            out[at : at + 4] = value.to_bytes(4, "little")
        elif how == 4:
            del out[at : at + rng.choice((1, 4, 8, 64))]
        elif how == 5:
            piece = out[at : at + rng.choice((4, 8, 64, 512))]
            to = rng.randrange(len(out))
            out[to:to] = piece
        elif how == 6:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        else:
            del out[at:]
    return bytes(out)


def send(path: str, data: bytes) -> bytes:
    """Send all, end the input, read to the end. A server that neither answers nor hangs up is a TimeoutError."""
    got = bytearray()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(1 << 16):
                got += piece
    return bytes(got)


def test_mutated_messages_against_a_live_server(path: str) -> None:
    rng = random.Random(7)
    samples = requests()
    answered = refused = 0
    with unix_server(path), core.unix_connect(Soak, path, timeout=PATIENCE) as control:
        assert control.add(a=1, b=2) == 3
        for sample in samples:
            answer = send(path, sample)
            assert answer and b"EXCEPTION" not in answer, answer  # undamaged, they are what clients send
        before = Holding.now()
        for _ in range(500):
            send(path, mutated(rng.choice(samples), rng))
        before = warmed_up(before)
        start = time.perf_counter()
        for at in range(MUTANTS):
            data = mutated(rng.choice(samples), rng)
            try:
                answer = send(path, data)
            except TimeoutError:
                pytest.fail(f"no answer to mutant {at}: {data.hex()}")
            answered += bool(answer)
            refused += b"EXCEPTION" in answer
            if at % CONTROL_EVERY == CONTROL_EVERY - 1:
                assert control.add(a=at, b=1) == at + 1
                with core.unix_connect(Soak, path, timeout=PATIENCE) as fresh:
                    assert [b.batch.column("n")[0].as_py() for b in fresh.count(3)] == [0, 1, 2]
        took = time.perf_counter() - start
        print(f"{MUTANTS} mutants in {took:.1f} s: {answered} answered, {refused} of them with an error")
        back_where_it_was(before, "mutants")
        assert refused > MUTANTS // 20
        assert control.add(a=1, b=2) == 3
