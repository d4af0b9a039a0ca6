"""Small calls beside a raw pipe and pickle, all in one run on one core: `python tests/bench/calls.py [rounds]`.

Medians in microseconds, interleaved, as ratios to the raw ping-pong of the same bytes (../shared/perf/FINDINGS.md
section 0 says why one core). CPU is the client's own time per call.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vgi_rpc

TEXT = "x" * 1024
SMALL = pa.RecordBatch.from_pydict({"k": list(range(10)), "v": [k * 1.5 for k in range(10)]})


class Counter(vgi_rpc.ProducerState):
    """Emits one small batch n times."""

    def __init__(self, n: int) -> None:
        self.n = n

    def produce(self, out: vgi_rpc.OutputCollector, ctx: vgi_rpc.CallContext) -> None:
        if self.n == 0:
            out.finish()
            return
        self.n -= 1
        out.emit(SMALL)


class Echo(vgi_rpc.ExchangeState):
    """Returns what it gets."""

    def exchange(self, input: vgi_rpc.AnnotatedBatch, out: vgi_rpc.OutputCollector, ctx: vgi_rpc.CallContext) -> None:
        out.emit(input.batch)


class Svc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def echo(self, text: str) -> str: ...
    def blob(self, data: bytes) -> bytes: ...
    def noop(self) -> None: ...
    def count(self, n: int) -> vgi_rpc.Stream[Counter]: ...
    def turns(self) -> vgi_rpc.Stream[Echo]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def echo(self, text: str) -> str:
        return text

    def blob(self, data: bytes) -> bytes:
        return data

    def noop(self) -> None:
        return None

    def count(self, n: int) -> vgi_rpc.Stream[Counter]:
        return vgi_rpc.Stream(SMALL.schema, Counter(n))

    def turns(self) -> vgi_rpc.Stream[Echo]:
        return vgi_rpc.Stream(SMALL.schema, Echo(), input_schema=SMALL.schema)


def serve_floor() -> None:
    """A raw ping-pong on stdio."""
    while data := os.read(0, 65536):
        os.write(1, data)


def serve_pickle(address: str) -> None:
    """The same add with multiprocessing.connection and pickle."""
    with Listener(address, family="AF_UNIX") as listener:
        print("ready", flush=True)
        with listener.accept() as peer:
            while True:
                try:
                    _, (a, b) = peer.recv()
                except EOFError:
                    return
                peer.send(a + b)


def worker(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, *arguments], **options)


def per_call(call: Callable[[], object], n: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(n):
        call()
    return (time.perf_counter() - wall) / n * 1e6, (time.process_time() - cpu) / n * 1e6


def main(rounds: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pipes = worker("floor", stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert pipes.stdin is not None and pipes.stdout is not None
    out, inp, raw = pipes.stdin.fileno(), pipes.stdout.fileno(), b"x" * 552
    path = tempfile.mktemp(suffix=".sock")
    pickler = worker("pickle", path, stdout=subprocess.PIPE)
    assert pickler.stdout is not None and pickler.stdout.readline()
    unix_path = tempfile.mktemp(suffix=".sock")
    unix = worker("unix", unix_path, stdout=subprocess.PIPE)
    assert unix.stdout is not None and unix.stdout.readline()
    mine, theirs = socket.socketpair()
    echo = worker("floor", stdin=theirs, stdout=theirs)
    command = [sys.executable, __file__, "serve"]
    with (
        vgi_rpc.connect(Svc, command) as svc,
        vgi_rpc.connect(Svc, command, timeout=60.0) as timed,
        vgi_rpc.unix_connect(Svc, unix_path) as over_unix,
        Client(path, family="AF_UNIX") as peer,
    ):

        def floor() -> None:
            os.write(out, raw)
            os.read(inp, 65536)

        def floor_unix() -> None:
            mine.send(raw)
            mine.recv(65536)

        def pickled() -> None:
            peer.send(("add", (1.5, 2.25)))
            peer.recv()

        def ticks() -> None:
            for _ in svc.count(500):
                pass

        def turns() -> None:
            batch = vgi_rpc.AnnotatedBatch(SMALL)
            with svc.turns() as session:
                for _ in range(500):
                    session.exchange(batch)

        cases: dict[str, tuple[Callable[[], object], int, int]] = {
            "raw pipe, 552 bytes": (floor, 1000, 1),
            "raw unix socket": (floor_unix, 1000, 1),
            "pickle, mp.connection": (pickled, 1000, 1),
            "add(float, float)": (lambda: svc.add(1.5, 2.25), 1000, 1),
            "add with a timeout": (lambda: timed.add(1.5, 2.25), 1000, 1),
            "add over a unix socket": (lambda: over_unix.add(1.5, 2.25), 1000, 1),
            "noop()": (svc.noop, 1000, 1),
            "echo(1 KiB str)": (lambda: svc.echo(TEXT), 1000, 1),
            "producer tick": (ticks, 1, 500),
            "exchange turn": (turns, 1, 500),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for _ in range(rounds):
            for name, (call, n, per) in cases.items():
                call()
                wall, cpu = per_call(call, n)
                found[name].append((wall / per, cpu / per))
    floor_us = statistics.median(wall for wall, _ in found["raw pipe, 552 bytes"])
    print(f"{'':24s}{'us':>8s}{'/raw':>7s}{'cpu us':>8s}")
    for name, samples in found.items():
        wall = statistics.median(s[0] for s in samples)
        print(f"{name:24s}{wall:8.1f}{wall / floor_us:7.2f}{statistics.median(s[1] for s in samples):8.1f}")
    for process in (pipes, echo, pickler, unix):
        process.kill()
        process.wait()
    mine.close()
    theirs.close()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["floor"]:
            serve_floor()
        case ["pickle", address]:
            serve_pickle(address)
        case ["unix", address]:
            vgi_rpc.serve_unix(vgi_rpc.RpcServer(Svc, Impl()), address, on_bound=lambda p: print(p, flush=True))
        case ["serve"]:
            vgi_rpc.serve_stdio(vgi_rpc.RpcServer(Svc, Impl()))
        case rest:
            main(int(rest[0]) if rest else 15)
