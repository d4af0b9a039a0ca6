"""The doctor: healthy services on every transport, and peers that fail in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest

from tests.core import core

tool: Any = getattr(core, "_extras_load")("tools.doctor", "the doctor command")  # noqa: B009


SERVICE = f"""
from __future__ import annotations
import dataclasses, importlib
from typing import ClassVar, Protocol

core = importlib.import_module({core.__name__!r})

class Calc(Protocol):
    protocol_version: ClassVar[str] = "1.2.3"
    def add(self, a: float, b: float) -> float: ...
    def count(self) -> core.Stream[core.ProducerState]: ...

@dataclasses.dataclass
class Count(core.ProducerState):
    def produce(self, out, ctx): out.finish()

class CalcImpl:
    def add(self, a, b): return a + b
    def count(self) -> core.Stream[Count]: raise NotImplementedError

if __name__ == "__main__":
    core.run_server(Calc, CalcImpl())
"""


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Workers import the core under test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield


@pytest.fixture
def service() -> Iterator[Any]:
    """The module of the service, in this process."""
    module = types.ModuleType("service_of_the_doctor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        exec(SERVICE, module.__dict__)
        yield module


def worker(*flags: str) -> list[str]:
    return [sys.executable, "-c", SERVICE, *flags]


def examined(kind: str, dial: Callable[[], Any], **options: Any) -> Any:
    return tool.examine(dial, kind, **{"timeout": 10.0, **options})


def examined_worker(*command: str, **options: Any) -> Any:
    return examined("cmd", lambda: core.SubprocessTransport(command), **options)


def check(report: Any, name: str) -> Any:
    (found,) = (item for item in report.checks if item.name == name)
    return found


def problem(report: Any) -> Any:
    """The only check that failed."""
    (found,) = (item for item in report.checks if item.status == "fail")
    assert not report.healthy
    return found


# ---- what is well


def test_a_worker(service: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["doctor", "--cmd", shlex.join(worker("--describe")), "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["healthy"] is True
    names = ["here", "extras", "start", "answer", "python", "ping", "describe", "stdout", "end"]
    assert [(item["name"], item["status"]) for item in found["checks"]] == [(name, "ok") for name in names]
    assert found["versions"]["vgi_rpc"] == core.__version__
    assert found["worker"]["python"] == found["versions"]["python"]
    assert found["worker"]["pyarrow"] == found["versions"]["pyarrow"]
    assert isinstance(found["transport"]["shared_memory"], bool)
    assert 0 < found["ping"]["median_seconds"] <= found["ping"]["max_seconds"] and found["ping"]["count"] > 1
    assert found["server"]["protocols"] == ["Calc", "vgi_rpc.Reflection.v1"]
    about = found["service"]
    assert about["protocol_hash"] == core.compute_protocol_hash("Calc", core.rpc_methods(service.Calc))
    assert (about["protocol_version"], about["methods"], about["streams"]) == ("1.2.3", 2, 1)
    assert about["schema_bytes"] > 100


@contextlib.contextmanager
def served(kind: str, tmp_path: Path) -> Iterator[str]:
    """A service on a socket; yields where."""
    flags = {"unix": ("--unix", str(tmp_path / "s")), "tcp": ("--tcp", "0"), "url": ("--http",)}[kind]
    with subprocess.Popen(worker(*flags, "--describe"), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            said = server.stdout.readline().strip()
            port = said.rpartition(":")[2]
            yield {"unix": flags[-1], "tcp": f"127.0.0.1:{port}", "url": f"http://127.0.0.1:{port}"}[kind]
        finally:
            server.terminate()


@pytest.mark.parametrize("kind", ["unix", "tcp", "url"])
def test_a_service_on_a_socket(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if kind == "url":
        pytest.importorskip("falcon")
        pytest.importorskip("waitress")
    with served(kind, tmp_path) as where:
        assert core.main(["doctor", f"--{kind}", where, "--format", "table"]) == 0
        out = capfd.readouterr().out
        assert out.endswith("\nhealthy\n")
        assert "ok    describe   Calc 1.2.3, hash " in out and "2 methods, 1 of them streams" in out
        assert "ok    ping       median " in out
        assert ("HTTP; " if kind == "url" else "shared memory: ") in out
        if kind == "url":
            assert core.main(["doctor", "--url", f"{where}/wrong", "--format", "table"]) == 1
            assert "-> no service under this path: is it mounted under a prefix?" in capfd.readouterr().out
            assert (
                core.main(["doctor", "--tcp", where.removeprefix("http://"), "--format", "table", "--timeout", "1"])
                == 1
            )
            assert "-> this is an HTTP server: --url http://HOST:PORT" in capfd.readouterr().out


def test_a_worker_that_does_not_describe_itself() -> None:
    report = examined_worker(*worker())
    assert report.healthy
    found = check(report, "describe")
    assert found.status == "note" and "--describe" in found.advice
    assert check(report, "stdout").status == "ok"


def test_a_protocol_class_is_compared_with_the_service(service: Any, tmp_path: Path) -> None:
    assert check(examined_worker(*worker("--describe"), against=service.Calc), "protocol").status == "ok"
    (tmp_path / "older_caller.py").write_text(
        "from typing import Protocol\nclass Calc(Protocol):\n"
        "    def add(self, a: float, b: int) -> float: ...\n    def minus(self) -> None: ...\n"
    )
    command = [sys.executable, "-m", core.__name__, "doctor", "--protocol", "older_caller:Calc", "--format", "json"]
    where = ["--unix", str(tmp_path / "s")]
    with subprocess.Popen(worker("--describe", *where), stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline()
        ran = subprocess.run([*command, *where], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        server.terminate()
    assert ran.returncode == 1, ran.stderr
    assert json.loads(ran.stdout)["differences"] == [
        "the protocol_version is not declared here and 1.2.3 at the service",
        "add(): parameter 'b' is int64 here and double at the service",
        "count(): only the service has it",
        "minus(): the service has no such method",
    ]


def test_a_protocol_that_is_not_there() -> None:
    found = problem(examined_worker(*worker("--describe"), protocol="Other"))
    assert found.text == "the server hosts no protocol 'Other'"
    assert found.advice == "it hosts Calc, vgi_rpc.Reflection.v1"


# ---- workers that fail


def test_a_worker_that_prints_first(capfd: pytest.CaptureFixture[str]) -> None:
    command = f"echo '\x1b[31mhello'; exec {shlex.join(worker())}"
    assert core.main(["doctor", "--cmd", shlex.join(["sh", "-c", command]), "-f", "table"]) == 1
    out = capfd.readouterr().out
    assert "fail  stdout     instead of Arrow came b'\\x1b[31mhello\\n'" in out
    assert "-> something prints to the worker's stdout: run_server() first" in out
    assert "\x1b" not in out


def test_a_worker_that_prints_a_lot_is_cut_short() -> None:
    found = problem(examined_worker("sh", "-c", "yes 'not Arrow'"))
    assert found.text.startswith("instead of Arrow came b'not Arrow\\nnot Arrow") and found.text.endswith("...")
    assert len(found.text) < 200


def test_a_worker_that_prints_last() -> None:
    found = problem(examined_worker("sh", "-c", f"{shlex.join(worker())}; echo bye"))
    assert (found.name, found.text) == ("stdout", "after the last answer came b'bye\\n'")


def test_a_worker_that_serves_elsewhere() -> None:
    found = problem(examined_worker("sh", "-c", "echo TCP:127.0.0.1:99"))
    assert found.advice.startswith("this command serves on a socket")


def test_a_worker_that_says_nothing() -> None:
    began = time.monotonic()
    found = problem(examined_worker("sleep", "60", timeout=0.3))
    assert time.monotonic() - began < 5
    assert "did not finish within its timeout of 0.3 s" in found.text
    assert "does it call run_server()?" in found.advice


def test_a_worker_that_lacks_a_module() -> None:
    found = problem(examined_worker(sys.executable, "-c", "import not_installed"))
    assert "exited with status 1" in found.text
    assert "its last words: ModuleNotFoundError: No module named 'not_installed'" in found.text
    assert "lacks the module not_installed" in found.advice


def test_a_worker_that_ends_at_once() -> None:
    found = problem(examined_worker("true"))
    assert "exited with status 0" in found.text
    assert "the worker ended before it answered" in found.advice


def test_a_worker_that_stays() -> None:
    command = f"{shlex.join(worker())}; exec >&-; exec sleep 60"
    report = examined_worker("sh", "-c", command, timeout=2.0)
    found = check(report, "end")
    assert report.healthy and found.status == "note"
    assert "still ran 2 s after its input had ended, and was killed" in found.text


def test_a_worker_that_keeps_its_stdout_open() -> None:
    began = time.monotonic()
    report = examined_worker("sh", "-c", f"{shlex.join(worker())}; exec sleep 60", timeout=2.0)
    assert time.monotonic() - began < 15
    found = check(report, "end")
    assert report.healthy and found.status == "note" and "timeout of 2.0 s" in found.text


def test_the_pyarrow_of_the_workers_python(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text('#!/bin/sh\necho 3.9.2\necho "No module named pyarrow" >&2\nexit 1\n')
    fake.chmod(0o755)
    found = check(examined_worker(str(fake), "worker.py"), "python")
    assert (found.status, found.advice) == ("note", f"{fake} -m pip install pyarrow")
    fake.write_text("#!/bin/sh\necho 3.9.2\necho 20.0\n")
    assert "needs Python 3.11" in check(examined_worker(str(fake), "worker.py"), "python").advice


@pytest.mark.parametrize(
    ("command", "advice"),
    [("/no/such/program", "there is no such program"), ("/etc/passwd", "the program may not be executed")],
)
def test_a_command_that_does_not_start(command: str, advice: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["doctor", "--cmd", command, "-f", "table"]) == 1
    out = capfd.readouterr().out
    assert f"-> {advice}" in out and out.endswith("not healthy\n")


# ---- places where there is something else, or nothing


def test_nobody_listens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(stale))
    cases = {
        f"--tcp 127.0.0.1:{port}": "nobody listens: is the server running",
        f"--url http://127.0.0.1:{port}": "nobody listens: is the server running",
        f"--unix {tmp_path}/none": "there is no such socket",
        f"--unix {stale}": "nobody listens: the server is gone and has left its socket",
        "--tcp no.such.invalid:1": "this host name is not known here",
    }
    for arguments, advice in cases.items():
        assert core.main(["doctor", *arguments.split(), "-f", "table", "--timeout", "5"]) == 1
        assert f"-> {advice}" in capfd.readouterr().out, arguments


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may connect to everything")
def test_a_socket_of_somebody_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
        path.chmod(0)
        assert core.main(["doctor", "--unix", str(path), "-f", "table"]) == 1
    assert "-> this user may not connect" in capfd.readouterr().out


def test_permission_advice() -> None:
    assert "modes of the socket" in tool._advice(PermissionError(13, "denied"), "unix")


@contextlib.contextmanager
def peer(*answers: bytes | None) -> Iterator[Callable[[], Any]]:
    """Somebody on a TCP port who says this, one answer per connection, and hangs up; None: who stays silent."""
    stop = threading.Event()

    def serve() -> None:
        for answer in answers:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(5)
                with contextlib.suppress(OSError):
                    client.recv(65_536)
                    if answer is None:
                        stop.wait(10)
                    else:
                        client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield lambda: core.TcpTransport(socket.create_connection(listener.getsockname(), timeout=5))
        finally:
            stop.set()
            listener.close()
            thread.join()


@pytest.mark.parametrize(
    ("answers", "advice"),
    [
        ((b"SSH-2.0-OpenSSH\r\n", b""), "another protocol is spoken there"),
        ((b"\x15\x03\x01\x00\x02\x02\x46", b""), "this port speaks TLS"),
        ((b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"), "this is an HTTP server"),
        ((b"<html>", b"HTTP/1.1 400 Bad Request\r\n\r\n"), "this is an HTTP server"),
        ((b"", b""), "the far side hung up"),
        ((b"\xff\xff\xff", b""), "the far side hung up"),
    ],
)
def test_another_protocol(answers: tuple[bytes, ...], advice: str) -> None:
    with peer(*answers) as dial:
        assert problem(examined("tcp", dial)).advice.startswith(advice)


def test_a_silent_peer() -> None:
    with peer(None, b"") as dial:
        assert problem(examined("tcp", dial, timeout=0.3)).advice.startswith("no answer: a firewall")


def test_a_peer_that_claims_too_much() -> None:
    with peer(b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"") as dial:
        assert "a message claims 2147483647 bytes" in problem(examined("tcp", dial)).text


def test_a_silent_http_server() -> None:
    transport = getattr(core, "_extras_load")("http.client", "--url").HttpTransport  # noqa: B009
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        report = examined("url", lambda: transport(url), timeout=0.3)
    assert problem(report).advice.startswith("no answer: a firewall")


class Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_service_that_wants_credentials(service: Any) -> None:
    pytest.importorskip("falcon")
    transport = getattr(core, "_extras_load")("http.client", "--url").HttpTransport  # noqa: B009
    server = core.RpcServer(service.Calc, service.CalcImpl(), enable_describe=True)
    app = core.make_wsgi_app(
        server, authenticate=core.bearer_authenticate_static(tokens={"secret": core.AuthContext("d", True)})
    )
    with make_server("127.0.0.1", 0, app, handler_class=Quiet) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        report = examined("url", lambda: transport(f"http://127.0.0.1:{http.server_port}"))
        http.shutdown()
        thread.join()
    found = check(report, "describe")
    assert (found.status, report.healthy) == ("note", True)
    assert "wants credentials: VGI_RPC_TOKEN" in found.advice


@pytest.mark.parametrize(
    ("keys", "status", "text"),
    [
        ((None,), "note", "no other one continues its streams"),
        ((None, None), "fail", "several processes, each with a key of its own"),
        ((b"k" * 32, b"k" * 32), "", ""),
    ],
)
def test_processes_without_a_common_key(service: Any, keys: tuple[Any, ...], status: str, text: str) -> None:
    pytest.importorskip("falcon")
    load = getattr(core, "_extras_load")  # noqa: B009
    transport = load("http.client", "--url").HttpTransport
    server = core.RpcServer(service.Calc, service.CalcImpl(), enable_describe=True)
    apps = [load("http.testing", "").TestClient(core.make_wsgi_app(server, token_key=key)) for key in keys]
    turn = iter(range(1000))
    report = examined("url", lambda: transport(client=apps[next(turn) % len(apps)]))  # as a balancer would
    if not status:
        assert "token key" not in [one.name for one in report.checks]
        return
    found = check(report, "token key")
    assert (found.status, report.healthy) == (status, status == "note")
    assert text in found.text
    assert "VGI_RPC_TOKEN_KEY" in found.advice


# ---- misuse


def test_no_place_is_a_misuse(capfd: pytest.CaptureFixture[str]) -> None:
    assert core.main(["doctor"]) == 1
    assert "--cmd" in capfd.readouterr().err
    assert core.main(["doctor", "--cmd", "'"]) == 2


def test_what_a_peer_says_is_one_printable_line() -> None:
    report = tool.Report()
    report.add("x", "ok", "a\x1b[2J\nb" + "c" * 5000, "\x07")
    assert "\\x1b[2J\\nb" in str(report) and "\x1b" not in str(report)
    assert len(str(report).splitlines()) == 3 and len(str(report)) < 1200
