"""What is bounded over HTTP: JSON calls, the life of tokens, bodies in waitress, the time of a turn; two workers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras.http_service import KEY, NUMBERS, Read, call, extra, make_server, request, turn
from tests.extras.test_http_serve import ROOT, SERVE, post, process, until_open

lazy: Any = core

# ---- JSON calls


def ask(client: Any, method: str, args: dict[str, Any], **headers: str) -> Any:
    body = json.dumps({"protocol": "Service", "method": method, "args": args}).encode()
    if coding := headers.get("Content_Encoding"):
        body = pa.compress(body, codec=coding, asbytes=True)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post("/__call__", content=body, headers={"Content-Type": "application/json", **named})
    return answer.status_code, json.loads(answer.content)


@pytest.mark.parametrize("size", [70_000, 60_000])  # too long as Arrow; only as JSON, because of base64
def test_json_answers_have_the_bound_of_others(size: int) -> None:
    client = lazy.make_sync_client(make_server(), max_response_bytes=65_536)
    status, answer = ask(client, "blob", {"size": size})
    assert status == 429 and "result" not in answer
    assert re.search(r"max_response_bytes \(\d+ > 65536\) for method 'blob'", answer["error"]["message"])
    assert answer["error"]["code"] == "RESOURCE_EXHAUSTED"
    assert ask(client, "blob", {"size": 3}) == (200, {"result": "eHh4"})


def test_a_caller_of_json_may_ask_for_less() -> None:
    client = lazy.make_sync_client(make_server())
    assert "error" in ask(client, "blob", {"size": 70_000}, VGI_Accept_Max_Response_Bytes="65536")[1]
    assert ask(client, "blob", {"size": 70_000}, VGI_Accept_Max_Response_Bytes="5")[0] == 400
    assert len(ask(client, "blob", {"size": 70_000})[1]["result"]) == 93_336


@pytest.mark.parametrize("coding", ["zstd", "gzip"])
def test_json_bodies_are_decoded_within_the_bound(coding: str) -> None:
    client = lazy.make_sync_client(make_server(), max_request_bytes=100_000)
    assert ask(client, "add", {"a": 1}, Content_Encoding=coding) == (200, {"result": 2.0})
    assert ask(client, "add", {"a": 1, "b": [0] * 50_000}, Content_Encoding=coding)[0] == 413
    assert ask(client, "add", {"a": 1, "b": [0] * 50_000})[0] == 413


def test_json_calls_set_cookies() -> None:
    client = lazy.make_sync_client(make_server())
    body = json.dumps({"protocol": "Service", "method": "cookie", "args": {"name": "n"}}).encode()
    answer = client.post("/__call__", content=body, headers={"Content-Type": "application/json"})
    assert "n=v" in answer.headers["Set-Cookie"] or any("n=v" in value for _, value in answer.raw_headers)


# ---- codings


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65_791, 65_792, 1 << 20, (1 << 20) + 1])
def test_every_form_of_a_declared_size(size: int) -> None:
    coding = extra("..common.coding")
    raw = os.urandom(size // 2 + 1) * 2
    raw = raw[:size]
    packed = coding.compress(coding.Encoding.ZSTD, raw)
    assert coding._declared_size(packed) in (0, size)
    streamed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(streamed, "zstd") as out:
        out.write(raw)
    for body in (packed, streamed.getvalue().to_pybytes(), packed + coding.compress(coding.Encoding.ZSTD, b"")):
        assert coding.decompress(coding.Encoding.ZSTD, body, max_output_size=size) == raw
        with pytest.raises(coding.DecompressionLimitExceeded):
            coding.decompress(coding.Encoding.ZSTD, body, max_output_size=size - 1)


def test_a_false_size_is_noticed() -> None:
    coding = extra("..common.coding")
    packed = bytearray(coding.compress(coding.Encoding.ZSTD, bytes(range(256)) * 40))
    assert coding._declared_size(bytes(packed)) == 10_240
    for at in range(4, 9):
        for value in (0, 1, 255):
            if packed[at] == value:
                continue
            damaged = bytes(packed[:at]) + bytes([value]) + bytes(packed[at + 1 :])
            with suppress(coding.DecompressionError):
                assert coding.decompress(coding.Encoding.ZSTD, damaged) == bytes(range(256)) * 40


# ---- tokens


def test_no_replica_goes_on_when_a_call_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call token is as old as the stream; one that was opened late is forgotten when it expires."""
    wall, mono = time.time(), time.monotonic()
    clock = [0.0]
    monkeypatch.setattr(time, "time", lambda: wall + clock[0])
    monkeypatch.setattr(time, "monotonic", lambda: mono + clock[0])
    first, late = (lazy.make_sync_client(make_server(), token_key=KEY, token_ttl=10) for _ in range(2))
    found = call(first, "/Service/running_sum/init", request("running_sum"))
    tokens = dict(found.tokens)
    for second, client in ((4.0, late), (8.0, first), (9.5, late)):
        clock[0] = second
        answer = call(client, "/Service/running_sum/exchange", turn(tokens, 1))
        tokens.update(answer.tokens)
    clock[0] = 11.0  # the cursor is 1.5 s old, the call 11 s
    for client in (first, late):
        answer = call(client, "/Service/running_sum/exchange", turn(tokens, 1))
        assert (answer.status, "expired" in answer.error) == (400, True)


# ---- waitress


def test_waitress_takes_little_more_than_the_application() -> None:
    pytest.importorskip("waitress")
    tuning = extra("serve").waitress_arrow_tuning
    assert tuning(1_000_000)["max_request_body_size"] == 2_000_000 + (16 << 20)
    assert tuning()["max_request_body_size"] < 1 << 30
    with process("-c", SERVE, "waitress") as (_, port):  # max_request_bytes=1_000_000
        head = "POST /Service/add HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\nContent-Type: text/plain\r\n\r\n"
        for size in (20_000_000, 1 << 40):
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                sock.sendall(head.format(size).encode())
                assert sock.recv(100).startswith(b"HTTP/1.1 413")
        polite = post(port, "/Service/add", bytes(1_000_001))
        assert (polite.status_code, polite.headers["VGI-Max-Request-Bytes"]) == (413, "1000000")


def test_granian_keeps_its_port() -> None:
    reserved = extra("_listener").reserve("127.0.0.1", 0)
    with reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError):
            socket.create_server(("127.0.0.1", port)).close()
        with socket.socket() as granian:  # as granian binds
            granian.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            granian.bind(("127.0.0.1", port))
            granian.listen()
            for _ in range(20):
                socket.create_connection(("127.0.0.1", port), 2).close()
                granian.accept()[0].close()


# ---- the time of a turn


@dataclass
class Patience(core.ProducerState):
    def process(self, input: Any, out: Any, ctx: Any) -> None:
        keys = ",".join(sorted(key.decode() for key in (input.custom_metadata or {})))
        left = -1 if ctx.time_left() is None else int(ctx.time_left() * 1000)
        out.emit_pydict({"n": [left]}, {"keys": keys})

    def produce(self, out: Any, ctx: Any) -> None:
        raise AssertionError


@dataclass
class Slow(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        while True:
            time.sleep(0.01)
            ctx.check_deadline()


class Timed(Protocol):
    def patience(self) -> core.Stream[Patience]: ...
    def slow(self) -> core.Stream[Slow]: ...


class TimedImpl:
    def patience(self) -> core.Stream[Patience]:
        return core.Stream(NUMBERS, Patience())

    def slow(self) -> core.Stream[Slow]:
        return core.Stream(NUMBERS, Slow(), NUMBERS)


def test_every_turn_has_its_own_deadline() -> None:
    client = lazy.make_sync_client(core.RpcServer(Timed, TimedImpl()))
    with lazy.http_connect(Timed, client=client, timeout=20.0) as timed:
        session: Any = timed.patience()
        for timeout, least, most in ((None, -1, -1), (5.0, 4000, 5000), (30.0, 29_000, 30_000)):
            session.tick(timeout=timeout)  # the first is what init has brought
            item = session.tick(timeout=timeout)
            assert least <= item.batch["n"][0].as_py() <= most
            assert "timeout" not in item.custom_metadata[b"keys"].decode()
        with pytest.raises(core.RpcError, match="deadline"):
            timed.slow().exchange(core.AnnotatedBatch.from_pydict({"n": [1]}, NUMBERS), timeout=0.1)


# ---- two workers of gunicorn


@contextmanager
def gunicorn(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    pytest.importorskip("gunicorn")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = listener.getsockname()[1]
        application = "tests.extras.test_http_limits:application()"
        options = ["--workers", "2", "--bind", f"fd://{listener.fileno()}", "--log-level", "warning"]
        found = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options, "--preload", "--no-control-socket", application],
            pass_fds=[listener.fileno()],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
                "HOME": str(folder),
            },
            start_new_session=True,
        )
    try:
        until_open(port)
        yield found, port
    finally:
        os.killpg(found.pid, signal.SIGKILL)
        found.wait(10)


def application() -> Any:
    pa.array([0])  # pyarrow looks for pandas, which takes a while, once: here before gunicorn forks
    return lazy.make_wsgi_app(make_server(), token_key=KEY)


def test_two_workers_of_gunicorn(tmp_path: Path) -> None:
    with gunicorn(tmp_path) as (_, port):
        tokens = dict(Read(post(port, "/Service/running_sum/init", request("running_sum"))).tokens)

        def step(total: int) -> bytes:
            answer = Read(post(port, "/Service/running_sum/exchange", turn(tokens, 1)))
            assert answer.numbers == [total]
            tokens.update(answer.tokens)
            return answer.metadata[0][b"pid"]

        total, pids = 0, set[bytes]()
        while len(pids) < 2:
            assert total < 100
            total += 1
            pids.add(step(total))  # the kernel may prefer one worker, whether it is idle or not ...
            with ThreadPoolExecutor(1) as busy:  # ... so one is held up, and the other must answer
                held = busy.submit(post, port, "/Service/wait", request("wait", seconds=0.2))
                time.sleep(0.05)
                total += 1
                pids.add(step(total))
                assert held.result(10).status_code == 200
        killed = pids.pop()
        os.kill(int(killed), signal.SIGKILL)
        time.sleep(0.1)
        for _ in range(5):
            total += 1
            assert step(total) != killed
