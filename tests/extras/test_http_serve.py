"""serve_http for real: ports, signals, broken clients, and replicas behind nginx with one of them killed."""

from __future__ import annotations

import contextlib
import gc
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("waitress")

from tests.extras.http_service import ARROW, Read, make_server, request, turn, until

ROOT = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if os.path.exists("/usr/sbin/nginx") else None)


class Answer:
    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.content = response.read()
        self.status_code = response.status
        self.headers = response.headers


class Link:
    """One connection."""

    def __init__(self, port: int, timeout: float = 10.0) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def post(self, path: str, body: bytes, **headers: str) -> Answer:
        self._connection.request("POST", path, body, {"Content-Type": ARROW, **headers})
        return Answer(self._connection.getresponse())

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()


def post(port: int, path: str, body: bytes, **headers: str) -> Answer:
    with Link(port) as link:
        return link.post(path, body, **headers)


SERVE = (
    "import sys; from tests.core import core; from tests.extras.http_service import KEY, make_server;"
    "core.serve_http(make_server(), wsgi_server=sys.argv[1], token_key=KEY, max_request_bytes=1_000_000)"
)


@contextlib.contextmanager
def process(*argv: str, **env: str) -> Iterator[tuple[Any, int]]:
    """A server process and its port; killed at the end, whatever happened."""
    found = subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), **env},
        text=True,
        start_new_session=True,
    )
    assert found.stdout is not None
    try:
        line = found.stdout.readline()
        assert line.startswith("PORT:"), line
        yield found, int(line[5:])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(found.pid, signal.SIGKILL)
        found.wait(10)
        found.stdout.close()


def until_open(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def get_health(port: int, verb: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(verb, "/health")
        return Answer(connection.getresponse())
    finally:
        connection.close()


class Held:
    """A call of a thread that is under way until it is let go."""

    def __init__(self, link: Link, folder: Path) -> None:
        self._folder = folder
        self._answers: list[Answer] = []
        body = request("hold", folder=str(folder))
        self._thread = threading.Thread(target=lambda: self._answers.append(link.post("/Service/hold", body)))
        self._thread.start()
        until((folder / "begun").exists)

    def result(self) -> Answer:
        """Let it go; its answer."""
        (self._folder / "go").touch()
        self._thread.join(20)
        return self._answers[0]


def drain(found: Any, port: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send the signal, and wait until the server has taken notice."""
    found.send_signal(number)
    until(lambda: get_health(port).status_code == 503)


@pytest.mark.parametrize(
    ("number", "server"), [(signal.SIGTERM, "waitress"), (signal.SIGINT, "waitress"), (signal.SIGTERM, "granian")]
)
def test_accepted_requests_finish(number: signal.Signals, server: str, tmp_path: Path) -> None:
    if server == "granian":
        pytest.importorskip("granian")
    with process("-c", SERVE, server) as (found, port):
        until_open(port)
        with Link(port, 60) as link:
            held = Held(link, tmp_path)
            drain(found, port, number)
            refused = post(port, "/Service/add", request("add", a=1.0, b=1.0))
            answer = held.result()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.headers["VGI-Supported-Encodings"] == "zstd, gzip"
        assert Read(answer).result == "held"
        assert found.wait(10) == 0
        assert found.stdout.read() == ""  # PORT was all


@pytest.mark.parametrize("server", ["waitress", "granian"])
def test_a_second_signal_ends_it_at_once(server: str, tmp_path: Path) -> None:
    pytest.importorskip(server)
    with process("-c", SERVE, server) as (found, port):
        until_open(port)
        slow = socket.create_connection(("127.0.0.1", port), 5)
        body = request("hold", folder=str(tmp_path))
        head = f"POST /Service/hold HTTP/1.1\r\nHost: x\r\nContent-Type: {ARROW}\r\nContent-Length: {len(body)}\r\n\r\n"
        slow.sendall(head.encode() + body)
        until((tmp_path / "begun").exists)
        drain(found, port)
        assert found.poll() is None
        found.send_signal(signal.SIGTERM)
        assert found.wait(5) == 1
        slow.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) == b""  # nobody is left that would answer
        slow.close()


def test_granian_does_not_share_a_port_that_somebody_has() -> None:
    pytest.importorskip("granian")
    with process("-c", SERVE, "granian") as (_, port):
        until_open(port)
        with pytest.raises(OSError, match="in use"):
            core.serve_http(make_server(), port=port, wsgi_server="granian", token_key=bytes(32))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks /proc for the worker")
def test_the_worker_of_granian_does_not_outlive_its_parent() -> None:
    pytest.importorskip("granian")
    with process("-c", SERVE, "granian") as (found, port):
        until_open(port)
        found.kill()
        found.wait(5)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                return
            time.sleep(0.1)
        raise AssertionError("somebody still listens")


def test_clients_that_break_off_or_send_in_chunks() -> None:
    body = request("add", a=1.0, b=2.0)
    head = f"POST /Service/add HTTP/1.1\r\nHost: x\r\nContent-Type: {ARROW}\r\n"
    with process("-c", SERVE, "waitress") as (_, port):
        for data in (
            head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:50],
            head.encode() + b"Transfer-Encoding: chunked\r\n\r\n10\r\nabc",
            b"\x00\x01\x02",
            b"",
        ):
            with socket.create_connection(("127.0.0.1", port), 5) as sock:
                sock.sendall(data)
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            chunks = b"".join(
                b"%x\r\n%s\r\n" % (len(body[i : i + 100]), body[i : i + 100]) for i in range(0, len(body), 100)
            )
            sock.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            response = http.client.HTTPResponse(sock)
            response.begin()
            assert Read(Answer(response)).result == 3.0
        assert post(port, "/%53ervice/add", body).status_code == 404  # waitress shows the raw target
        assert post(port, "/Service/add", bytes(1_000_001)).status_code == 413
        with Link(port) as link:
            for i in range(20):
                assert Read(link.post("/Service/add", request("add", a=1.0, b=float(i)))).result == 1.0 + i


def test_run_server_http(tmp_path: Path) -> None:
    code = "from tests.core import core; from tests.extras.http_service import *; core.run_server(Second, SecondImpl())"
    key = "ab" * 16
    caps = ("--max-response-bytes", "70000", "--max-externalized-response-bytes", "90000")
    argv = ("-c", code, "--http", "--port", "0", *caps, "--access-log", str(tmp_path / "log"))
    with process(*argv, VGI_RPC_TOKEN_KEY=key) as (_, port), process(*argv, VGI_RPC_TOKEN_KEY=key) as (_, other):
        with Link(port) as link:
            answer = link.post("/Second/nope", b"")
            assert (answer.status_code, answer.headers["VGI-Max-Response-Bytes"]) == (404, "70000")
            assert answer.headers["VGI-Max-Externalized-Response-Bytes"] == "90000"
        from tests.extras.http_service import stream

        batch = core.empty_batch(core.EMPTY_SCHEMA)
        first = Read(
            post(
                port,
                "/Second/running_sum/init",
                stream(batch, {"vgi_rpc.method": "running_sum", "vgi_rpc.request_version": "1"}),
            )
        )
        assert Read(post(other, "/Second/running_sum/exchange", turn(first.tokens, 5))).numbers == [5]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--http", "--max-response-bytes", "5"], "max_response_bytes must be an int within 65536"),
        (
            ["--http", "--max-externalized-response-bytes", "0"],
            "max_externalized_response_bytes must be an int within 1",
        ),
        (["--http", "--port", "99999"], "--port must be within 0..65535, got 99999"),
        (["--tcp", "0", "--max-response-bytes", "70000"], "give --http"),
        (["--http", "--unix", "x"], "not allowed with"),
    ],
)
def test_flags_that_do_not_fit(argv: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["worker", *argv])
    with pytest.raises(SystemExit) as refused:
        core.run_server(make_server())
    assert text in f"{refused.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("threads", ["0", "x", "-1", "\u0664"])
def test_threads_from_the_environment(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGI_HTTP_THREADS", threads)
    with pytest.raises(ValueError, match="VGI_HTTP_THREADS"):
        core.serve_http(make_server())


@pytest.mark.parametrize("server", ["waitress", "granian"])
@pytest.mark.parametrize("port", [99_999, -1])
def test_a_port_that_is_none(server: str, port: int) -> None:
    pytest.importorskip(server)
    with warnings.catch_warnings(record=True) as caught:  # a socket that is left open says so when it is collected
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=rf"port must be within 0\.\.65535, got {port}"):
            core.serve_http(make_server(), port=port, wsgi_server=server, token_key=bytes(32))
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


# ---- behind a proxy

NGINX_CONF = """
daemon off; pid {dir}/pid; error_log {dir}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s;
  {http}
}}
"""

REPLICAS = """
  upstream replicas {{ server 127.0.0.1:{one}; server 127.0.0.1:{two}; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_connect_timeout 2s;
      # A turn may be repeated on another replica: its state travels with it.
      proxy_next_upstream error timeout non_idempotent;
    }}
  }}
"""


@contextlib.contextmanager
def nginx(folder: Path, http: str, one: int, two: int) -> Iterator[int]:
    """Run nginx before two ports; `http` is what its http section holds. Its own port."""
    assert NGINX is not None
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (folder / "conf").write_text(NGINX_CONF.format(dir=folder, http=http.format(one=one, two=two, port=port)))
    found = subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "conf"), "-e", str(folder / "error.log")])
    try:
        until_open(port)
        yield port
    finally:
        found.terminate()
        found.wait(10)


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
@pytest.mark.parametrize("server", ["waitress", "granian"])
def test_streams_survive_a_killed_replica(tmp_path: Path, server: str) -> None:
    if server == "granian":
        pytest.importorskip("granian")
    with process("-c", SERVE, server) as (first, one), process("-c", SERVE, server) as (_, two):
        until_open(one)
        until_open(two)
        with nginx(tmp_path, REPLICAS, one, two) as port, Link(port) as link:
            made = Read(link.post("/Service/count/init", request("count", end=20)))
            summed = Read(link.post("/Service/running_sum/init", request("running_sum")))
            cursor, sums = dict(made.tokens), dict(summed.tokens)
            seen, pids, total = made.numbers, set(), 0
            for i in range(1, 20):
                if i == 8:
                    os.killpg(first.pid, signal.SIGKILL)
                # A third call each time round, so that nginx hands each stream to either replica in turn.
                assert Read(link.post("/Service/add", request("add", a=1.0, b=1.0))).result == 2.0
                found = Read(link.post("/Service/count/exchange", turn(cursor)))
                cursor.update(found.tokens)
                seen += found.numbers
                answered = Read(link.post("/Service/running_sum/exchange", turn(sums, i)))
                sums.update(answered.tokens)
                total += i
                assert answered.numbers == [total]
                pids.add((i < 8, found.metadata[0][b"pid"]))
            assert seen == list(range(20))
            assert len([pid for before, pid in pids if before]) == 2  # both took part
            assert len([pid for before, pid in pids if not before]) == 1
