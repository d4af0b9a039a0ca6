"""Two replicas behind nginx, under load, restarted in turn: `python tests/bench/replicas.py [--seconds 60] [--json]`.

Every caller is a process. It makes unary calls, reads producers and feeds exchanges, and checks each answer. What may
be repeated without harm is repeated, by two parties:

    nginx         a replica that refuses the connection (nothing was sent); and, once, a 503: the replica is going down
                  and has not begun the call. `proxy_next_upstream` cannot tell these from a POST that broke off later
                  (`non_idempotent` is for all or nothing), so the 503 takes the way of `error_page`.
    the caller    errors whose `sent` is "no", and a second 503. Never what may have run: `sent` is "maybe".

A call is a unary call, the opening of a stream, or one turn of it. `failed`: it ended in an error that may not be
repeated. `wrong`: an answer that is not the right one. Both must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import vgi_rpc
from vgi_rpc import AnnotatedBatch, ExchangeState, ProducerState, RpcError, RpcServer, Stream
from vgi_rpc_extras.http import http_connect, serve_http

NUMBERS = pa.schema([("n", pa.int64())])
TOKEN_KEY = "ab" * 32
_T = TypeVar("_T")

NGINX_CONF = """
daemon off; pid {dir}/pid; error_log {dir}/error.log; worker_processes 2;
events {{ worker_connections 512; }}
http {{
  log_format upstream '$upstream_status';
  access_log {dir}/access.log upstream;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s;
  upstream replicas {{
    server 127.0.0.1:{one} max_fails=0;  # else a replica is out for fail_timeout after a refusal, and both are at times
    server 127.0.0.1:{two} max_fails=0;
  }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 20m;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_connect_timeout 2s;
    proxy_read_timeout 75s;
    proxy_next_upstream error timeout;  # a POST: only while nothing of it was sent
    location / {{
      proxy_pass http://replicas;
      proxy_intercept_errors on;
      error_page 503 = @again;  # refused before it began, by a replica that is going down
    }}
    location @again {{ proxy_pass http://replicas; }}
  }}
}}
"""


# ---- the service


@dataclass
class Counting(ProducerState):
    """Emits start, start + 1, ... up to end."""

    at: int
    end: int

    def produce(self, out: vgi_rpc.OutputCollector, ctx: vgi_rpc.CallContext) -> None:
        if self.at == self.end:
            out.finish()
            return
        out.emit_pydict({"n": [self.at]})
        self.at += 1


@dataclass
class Summing(ExchangeState):
    """Answers each number with the sum so far."""

    total: int = 0

    def exchange(self, input: AnnotatedBatch, out: vgi_rpc.OutputCollector, ctx: vgi_rpc.CallContext) -> None:
        self.total += input.batch.column("n")[0].as_py()
        out.emit_pydict({"n": [self.total]})


class Svc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def count(self, start: int, end: int) -> Stream[ProducerState]: ...
    def sums(self) -> Stream[ExchangeState]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        time.sleep(0.002)  # so that calls are under way when the signal comes
        return a + b

    def count(self, start: int, end: int) -> Stream[Counting]:
        return Stream(NUMBERS, Counting(start, end))

    def sums(self) -> Stream[Summing]:
        return Stream(NUMBERS, Summing(), input_schema=NUMBERS)


def serve(port: int, wsgi_server: Any) -> None:
    """One replica."""
    serve_http(RpcServer(Svc, Impl()), port=port, wsgi_server=wsgi_server, token_key=bytes.fromhex(TOKEN_KEY))


# ---- a caller


class Caller:
    """Calls until the time is over, and counts."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.counts = {"unary": 0, "producer turns": 0, "exchange turns": 0, "repeated": 0, "failed": 0, "wrong": 0}
        self.slowest = 0.0
        self.errors: list[str] = []

    def run(self, url: str, seconds: float) -> None:
        """Call `url` for that long."""
        end = time.monotonic() + seconds
        with http_connect(Svc, url, timeout=30) as svc:
            for kind in itertools.cycle((self.unary, self.producer, self.exchange)):
                with contextlib.suppress(RpcError):  # counted; the stream is lost
                    kind(svc)
                if time.monotonic() >= end:
                    break

    def attempt(self, kind: str, call: Callable[[], _T]) -> _T:
        """Make a call, again as long as it has not run."""
        begun = time.monotonic()
        while True:
            try:
                result = call()
            except RpcError as error:
                if error.sent == "no" or (error.sent == "answered" and error.is_retryable()):
                    self.counts["repeated"] += 1
                    time.sleep(0.05)
                    continue
                self.counts["failed"] += 1
                self.errors.append(f"{kind}: {str(error)[:60]}")
                raise
            self.counts[kind] += 1
            self.slowest = max(self.slowest, time.monotonic() - begun)
            return result

    def check(self, found: object, right: object) -> None:
        """Count what is not right."""
        if found != right:
            self.counts["wrong"] += 1
            self.errors.append(f"{found!r} instead of {right!r}")

    def unary(self, svc: Svc) -> None:
        """One call."""
        a, b = self.random.random(), self.random.random()
        self.check(self.attempt("unary", lambda: svc.add(a, b)), a + b)

    def producer(self, svc: Svc) -> None:
        """A stream that is read to its end."""
        start = self.random.randrange(1000)
        wanted = list(range(start, start + self.random.randrange(1, 10)))
        stream = self.attempt("producer turns", lambda: svc.count(start, wanted[-1] + 1))
        found: list[int] = []
        while (item := self.attempt("producer turns", lambda: next(stream_items(stream), None))) is not None:
            found += item.batch.column("n").to_pylist()
        self.check(found, wanted)

    def exchange(self, svc: Svc) -> None:
        """A stream of several turns."""
        stream, total = self.attempt("exchange turns", svc.sums), 0
        with contextlib.closing(stream):
            for _ in range(self.random.randrange(1, 10)):
                number = self.random.randrange(1000)
                total += number
                batch = AnnotatedBatch.from_pydict({"n": [number]}, NUMBERS)
                answer = self.attempt("exchange turns", lambda batch=batch: stream.exchange(batch))  # type: ignore[misc]
                self.check(answer.batch.column("n").to_pylist(), [total])


def stream_items(stream: Any) -> Iterator[AnnotatedBatch]:
    """The rest of a producer: an iterator that an error has ended is made anew, the stream goes on where it was."""
    return iter(stream)


# ---- the measurement


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


class Replica:
    """A server process on a port of its own."""

    def __init__(self, port: int, wsgi_server: str) -> None:
        self._argv = [sys.executable, __file__, "serve", str(port), wsgi_server]
        self._port = port
        self.start()

    def start(self) -> None:
        """Return when it accepts connections."""
        self._process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until_open(self._port, self._process)

    def stop(self) -> float:
        """SIGTERM; how many seconds it took to end."""
        begun = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)
        return time.monotonic() - begun

    def kill(self) -> None:
        """End it at once: the second signal ends a worker of its own, too."""
        for _ in range(2):
            self._process.terminate()
            time.sleep(0.1)
        self._process.kill()
        self._process.wait()


def until_open(port: int, process: subprocess.Popen[Any]) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port}; exit status {process.poll()}")


@contextlib.contextmanager
def nginx(folder: Path, port: int, one: int, two: int) -> Iterator[None]:
    """The proxy, with its files in `folder`."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise SystemExit("nginx is not installed")
    conf = folder / "conf"
    conf.write_text(NGINX_CONF.format(dir=folder, port=port, one=one, two=two))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(conf), "-e", str(folder / "error.log")])
    try:
        until_open(port, process)
        yield
    finally:
        process.terminate()
        process.wait(10)


def measure(folder: Path, clients: int, seconds: float, wsgi_server: str) -> dict[str, Any]:
    """Run it all; the sums of what the callers counted, and of what was done to the replicas."""
    port, *ports = free_ports(3)
    found: dict[str, Any] = {"restarts": 0, "slowest stop (s)": 0.0}
    with contextlib.ExitStack() as stack:
        replicas = [Replica(port, wsgi_server) for port in ports]
        for replica in replicas:
            stack.callback(replica.kill)
        stack.enter_context(nginx(folder, port, *ports))
        argv = [sys.executable, __file__, "call", f"http://127.0.0.1:{port}", str(seconds)]
        callers = [subprocess.Popen([*argv, str(seed)], stdout=subprocess.PIPE, text=True) for seed in range(clients)]
        for caller in callers:
            stack.callback(caller.kill)
        end = time.monotonic() + seconds
        for turn in range(sys.maxsize):
            time.sleep(min(1.0, max(0.0, end - time.monotonic())))
            if time.monotonic() >= end:
                break
            found["slowest stop (s)"] = max(found["slowest stop (s)"], replicas[turn % 2].stop())
            replicas[turn % 2].start()
            found["restarts"] += 1
        for caller in callers:
            add_up(found, json.loads(caller.communicate(timeout=60)[0]))
    lines = (folder / "access.log").read_text().splitlines()
    found["repeated by nginx"] = sum(1 for line in lines if "," in line or ":" in line)
    return found


def add_up(found: dict[str, Any], counted: dict[str, Any]) -> None:
    """Sums, except for the slowest; a few errors."""
    found["slowest call (s)"] = max(found.get("slowest call (s)", 0.0), counted.pop("slowest"))
    found["errors"] = (found.get("errors", []) + counted.pop("errors"))[:5]
    for name, count in counted.items():
        found[name] = found.get(name, 0) + count


def main() -> None:
    """One table, or one line of JSON; status 1 when a call failed or an answer was wrong."""
    if sys.argv[1:2] == ["serve"]:
        return serve(int(sys.argv[2]), sys.argv[3])
    if sys.argv[1:2] == ["call"]:
        caller = Caller(int(sys.argv[4]))
        caller.run(sys.argv[2], float(sys.argv[3]))
        print(json.dumps({**caller.counts, "slowest": caller.slowest, "errors": caller.errors}))
        return None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--server", choices=["waitress", "granian"], default="waitress")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vgi-replicas-") as folder:
        found = measure(Path(folder), options.clients, options.seconds, options.server)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20} {value:.2f}" if isinstance(value, float) else f"{name:20} {value}")
    sys.exit(1 if found["failed"] or found["wrong"] else 0)


if __name__ == "__main__":
    main()
