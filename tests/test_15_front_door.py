"""Room 15: the ways in, over real sockets and processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

import pytest

from tests.core import core

WORKER = """
import importlib, os, sys
from typing import Protocol

core = importlib.import_module({core!r})


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def pid(self) -> int: ...


class Impl:
    def add(self, a, b):
        return a + b

    def pid(self):
        print("noise", flush=True)
        return os.getpid()


if os.environ.get("READY"):
    core.run_server(core.RpcServer(Calc, Impl()))
else:
    core.run_server(Calc, Impl())
"""


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def pid(self) -> int: ...


class Impl:
    def add(self, a, b, ctx):
        ctx.client_log(core.Level.INFO, "adding")
        return a + b

    def pid(self):
        return os.getpid()


class Stop(BaseException):
    """Ends an accept loop from the outside of it."""


class Worker:
    """A script that calls run_server, and its processes."""

    def __init__(self, directory: Path) -> None:
        self.script = directory / "worker.py"
        self.script.write_text(WORKER.format(core=core.__name__), encoding="utf-8")
        self.cmd = [sys.executable, str(self.script)]
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
        """To its end, with an empty stdin."""
        return subprocess.run(
            [*self.cmd, *flags],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def start(self, *flags: str, **env: str) -> tuple[subprocess.Popen[str], str]:
        """A server and its readiness line."""
        proc = subprocess.Popen(
            [*self.cmd, *flags],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(proc)
        assert proc.stdout is not None
        return proc, proc.stdout.readline()

    def close(self) -> None:
        for proc in self.started:
            if proc.poll() is None:
                proc.kill()
            proc.wait()
            assert proc.stdout is not None
            proc.stdout.close()


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    for name in [name for name in os.environ if name.startswith("VGI_RPC_")]:
        monkeypatch.delenv(name)
    made = Worker(tmp_path)
    yield made
    made.close()


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch):
    """Run serve_unix or serve_tcp in a thread; yields what starts one, which returns its address and thread."""
    acceptor = core._TransportAcceptor
    monkeypatch.setattr(acceptor, "POLL", 0.05)
    monkeypatch.setattr(acceptor, "FIRST_CLIENT", 0.3)
    started: list[threading.Thread] = []

    def start(serve, *args, **options):
        bound: queue.Queue = queue.Queue()

        def run() -> None:
            try:
                serve(core.RpcServer(Calc, Impl()), *args, on_bound=lambda *at: bound.put(at), **options)
            except BaseException as exc:
                bound.put(exc)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        at = bound.get(timeout=20)
        if isinstance(at, BaseException):
            raise at
        started.append(thread)
        return at, thread

    yield start
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s.sock")


def wait_for(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


# ---- client and server in one process


def in_process():
    return [core.serve_pipe, core.serve_unix_pipe, core.serve_tcp_pipe, core.serve_unix]


@pytest.mark.parametrize("serve", in_process(), ids=lambda f: f.__name__)
def test_serving_in_this_process(serve) -> None:
    seen = []
    with serve(Calc, Impl(), on_log=seen.append, timeout=20) as calc:
        assert calc.add(a=1, b=2.5) == 3.5
        assert calc.pid() == os.getpid()
    assert [m.message for m in seen] == ["adding"]
    assert not [t for t in threading.enumerate() if t.name == "vgi_rpc-server"]
    with pytest.raises(core.RpcError):
        calc.pid()


@pytest.mark.parametrize("serve", in_process(), ids=lambda f: f.__name__)
def test_a_misfit_or_a_bad_timeout_leaves_nothing_open(serve) -> None:
    fds = len(os.listdir("/dev/fd"))
    with pytest.raises(TypeError, match="does not implement"), serve(Calc, object()):
        pass
    with pytest.raises(ValueError, match="timeout must be a positive number"), serve(Calc, Impl(), timeout=0):
        pass
    assert len(os.listdir("/dev/fd")) == fds


# ---- Unix sockets


@pytest.mark.parametrize("serve", [core.serve_unix, core.serve_unix_pipe], ids=lambda f: f.__name__)
def test_a_unix_server_from_bind_to_end(serving, path: str, serve) -> None:
    (bound,), thread = serving(serve, path, threaded=True, idle_timeout=0.1)
    assert bound == path
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    seen = []
    with core.unix_connect(Calc, path, on_log=seen.append) as one, core.unix_connect(Calc, path, timeout=20) as two:
        assert one.add(a=1, b=2) == 3
        time.sleep(0.4)  # connected but idle clients keep it alive
        assert two.add(a=3, b=4) == 7
    assert len(seen) == 1
    thread.join(20)
    assert not thread.is_alive()
    assert not os.path.lexists(path)


def test_without_a_client_the_idle_timeout_is_the_grace_for_the_first_one(serving, path: str) -> None:
    start = time.monotonic()
    _, thread = serving(core.serve_unix, path, threaded=True, idle_timeout=0.01)
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - start >= 0.3
    assert not os.path.lexists(path)


def test_a_stale_socket_is_replaced(serving, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    before = os.stat(path).st_ino, os.stat(path).st_mtime_ns
    serving(core.serve_unix, path, threaded=True, idle_timeout=0.1)
    assert (os.stat(path).st_ino, os.stat(path).st_mtime_ns) != before
    with core.unix_connect(Calc, path) as calc:
        assert calc.add(a=1, b=2) == 3


def test_another_kind_of_file_is_not_replaced(tmp_path: Path) -> None:
    server = core.RpcServer(Calc, Impl())
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("kept")
    link.symlink_to(file)
    for path in (file, link, tmp_path):
        with pytest.raises(RuntimeError) as caught:
            core.serve_unix(server, str(path))
        assert str(caught.value) == f"refusing to replace pre-existing non-socket path: {path}"
    assert file.read_text() == "kept"


def test_a_live_listener_is_not_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(path)
        live.listen(5)
        with pytest.raises(RuntimeError) as caught:
            core.serve_unix(core.RpcServer(Calc, Impl()), path)
        assert str(caught.value) == f"another process is already listening on {path}"
        assert os.path.lexists(path)


def test_a_socket_file_that_is_no_longer_ours_stays(serving, path: str) -> None:
    _, thread = serving(core.serve_unix, path, threaded=True, idle_timeout=0.1)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path + ".new")
        os.rename(path + ".new", path)
        thread.join(20)
        assert not thread.is_alive()
        assert os.path.lexists(path)


def test_an_on_bound_that_raises_takes_the_socket_file_with_it(path: str) -> None:
    def fail(at: str) -> None:
        raise Stop(at)

    with pytest.raises(Stop, match=path):
        core.serve_unix(core.RpcServer(Calc, Impl()), path, on_bound=fail)
    assert not os.path.lexists(path)


@pytest.mark.parametrize("serve", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"idle_timeout": 1.0}, "idle_timeout requires threaded=True"),
        ({"threaded": True, "max_connections": 0}, "max_connections must be at least 1, got 0"),
        ({"threaded": True, "max_connections": -3}, "max_connections must be at least 1, got -3"),
    ],
)
def test_bad_options_of_a_socket_server(path: str, serve: str, options, text: str) -> None:
    server = core.RpcServer(Calc, Impl())
    with pytest.raises(ValueError) as caught:
        core.serve_unix(server, path, **options) if serve == "unix" else core.serve_tcp(server, **options)
    assert str(caught.value) == text
    assert not os.path.lexists(path)


def test_clients_beyond_max_connections_wait_for_a_slot(serving, path: str) -> None:
    serving(core.serve_unix, path, threaded=True, max_connections=1, idle_timeout=0.5)
    answers: queue.Queue = queue.Queue()

    def late() -> None:
        with core.unix_connect(Calc, path) as calc:
            answers.put(calc.add(a=1, b=1))

    with core.unix_connect(Calc, path) as calc:
        assert calc.add(a=1, b=2) == 3
        thread = threading.Thread(target=late)
        thread.start()
        with pytest.raises(queue.Empty):
            answers.get(timeout=0.3)
        assert calc.add(a=2, b=2) == 4
    assert answers.get(timeout=20) == 2
    thread.join(20)


def test_a_sequential_server_takes_one_connection_after_the_other(path: str, monkeypatch) -> None:
    monkeypatch.setattr(core._TransportAcceptor, "POLL", 0.05)
    ends = threading.Event()
    expired = core._TransportAcceptor._expired
    monkeypatch.setattr(core._TransportAcceptor, "_expired", lambda self: ends.is_set() or expired(self))
    bound = threading.Event()
    server = core.RpcServer(Calc, Impl())
    thread = threading.Thread(target=lambda: core.serve_unix(server, path, on_bound=lambda _: bound.set()))
    thread.start()
    try:
        assert bound.wait(20)
        for _ in range(2):
            with core.unix_connect(Calc, path) as calc:
                assert calc.add(a=1, b=2) == 3
    finally:
        ends.set()
        thread.join(20)
    assert not os.path.lexists(path)


def test_nobody_on_a_unix_socket(path: str) -> None:
    note = f"no server answers on {path}; start one with --unix {path}"
    with pytest.raises(FileNotFoundError) as missing, core.unix_connect(Calc, path):
        pass
    assert missing.value.__notes__ == [note]
    with pytest.raises(FileNotFoundError) as printed, core.unix_connect(Calc, f"UNIX:{path}"):
        pass
    assert printed.value.__notes__ == [f"the prefix UNIX: is not part of the path {path}"]
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with pytest.raises(ConnectionRefusedError) as refused, core.unix_connect(Calc, path):
        pass
    assert refused.value.__notes__ == [f"{note} (the socket is there: its server is gone, or belongs to another user)"]


# ---- TCP


def test_a_tcp_server(serving) -> None:
    (host, port), thread = serving(core.serve_tcp, threaded=True, idle_timeout=0.1)
    assert host == "127.0.0.1"
    with core.tcp_connect(Calc, host, port) as one, core.tcp_connect(Calc, "localhost", port, timeout=20) as two:
        assert one.add(a=1, b=2) == 3
        assert two.add(a=3, b=4) == 7
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(ConnectionRefusedError), core.tcp_connect(Calc, host, port):
        pass


def test_a_tcp_server_on_ipv6(serving) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as exc:
        pytest.skip(f"no IPv6 loopback here: {exc}")
    (host, port), _ = serving(core.serve_tcp, "::1", 0, threaded=True, idle_timeout=0.1)
    assert host == "::1"
    with core.tcp_connect(Calc, host, port) as calc:
        assert calc.add(a=1, b=2) == 3


def test_nobody_on_a_tcp_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError) as caught, core.tcp_connect(Calc, "127.0.0.1", port):
        pass
    assert caught.value.__notes__ == [f"no server answers on 127.0.0.1:{port}"]


@pytest.mark.parametrize("seconds", [0, -1.5])
def test_a_bad_connect_timeout(seconds: float) -> None:
    with (
        pytest.raises(ValueError) as caught,
        core.tcp_connect(Calc, "127.0.0.1", 1, connect_timeout=seconds),
    ):
        pass
    assert str(caught.value) == f"connect_timeout must be positive or None, got {seconds}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-made certificate for localhost and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    cert, key = str(directory / "cert.pem"), str(directory / "key.pem")
    command = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [openssl, *command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return cert, key


def test_tls(serving, certificate: tuple[str, str], caplog) -> None:
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(*certificate)
    (host, port), _ = serving(core.serve_tcp, threaded=True, idle_timeout=0.5, tls_context=inside)
    trusting = ssl.create_default_context(cafile=certificate[0])
    for options in ({"host": "localhost"}, {"host": host, "server_hostname": "localhost"}):
        with core.tcp_connect(Calc, port=port, tls_context=trusting, timeout=20, **options) as calc:
            assert calc.add(a=1, b=2) == 3
            assert calc.add(a=3, b=4) == 7
    with pytest.raises(ssl.SSLCertVerificationError), core.tcp_connect(Calc, host, port, tls_context=trusting):
        pass  # the certificate does not carry the address
    strange = ssl.create_default_context()
    with pytest.raises(ssl.SSLCertVerificationError), core.tcp_connect(Calc, "localhost", port, tls_context=strange):
        pass
    with pytest.raises(core.ConnectionLostError), core.tcp_connect(Calc, host, port) as calc:
        calc.add(a=1, b=2)  # plain bytes to a TLS server
    with core.tcp_connect(Calc, "localhost", port, tls_context=trusting) as calc:
        assert calc.add(a=5, b=6) == 11


def test_a_client_that_never_shakes_hands_is_dropped(serving, certificate: tuple[str, str]) -> None:
    inside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inside.load_cert_chain(*certificate)
    options = {"threaded": True, "idle_timeout": 0.1, "tls_context": inside, "tls_handshake_timeout": 0.3}
    at, _ = serving(core.serve_tcp, **options)
    with socket.create_connection(at, timeout=20) as silent:
        assert silent.recv(1) == b""


def test_a_server_that_never_shakes_hands_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        options = {"tls_context": ssl.create_default_context(), "connect_timeout": 0.3}
        with pytest.raises(TimeoutError), core.tcp_connect(Calc, host, port, **options):
            pass


# ---- processes


def test_connect_starts_a_worker_and_ends_it(worker: Worker) -> None:
    with core.connect(Calc, worker.cmd, stderr=core.StderrMode.DEVNULL) as calc:
        assert calc.add(a=1, b=2) == 3
        pid = calc.pid()  # prints, too
        assert pid != os.getpid()
        assert calc.add(a=3, b=4) == 7
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_ready_server_on_stdio(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("READY", "1")
    with core.connect(Calc, tuple(worker.cmd)) as calc:
        assert calc.add(a=1, b=2) == 3


def test_a_worker_that_cannot_be_started(tmp_path: Path) -> None:
    cmd = [str(tmp_path / "missing"), "flag"]
    with pytest.raises(FileNotFoundError) as caught, core.connect(Calc, cmd):
        pass
    (note,) = caught.value.__notes__
    assert repr(cmd) in note
    assert "cmd is a list" in note


def test_a_command_is_a_list_not_a_string() -> None:
    with pytest.raises(TypeError) as caught, core.connect(Calc, "python worker.py"):
        pass
    assert str(caught.value) == "cmd must be a list of arguments such as ['python', 'worker.py'], got a str"


def test_a_unix_worker(worker: Worker, path: str) -> None:
    proc, line = worker.start("--unix", os.path.relpath(path), "--idle-timeout", "0.2")
    assert line == f"UNIX:{path}\n"
    with core.unix_connect(Calc, path) as calc:
        assert calc.add(a=1, b=2) == 3
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert proc.wait(30) == 0
    assert not os.path.lexists(path)


def test_a_tcp_worker(worker: Worker) -> None:
    proc, line = worker.start("--tcp", "0", VGI_RPC_IDLE_TIMEOUT="0.2", VGI_RPC_MAX_CONNECTIONS="2")
    kind, host, port = line.rstrip("\n").split(":")
    assert (kind, host) == ("TCP", "127.0.0.1")
    with core.tcp_connect(Calc, host, int(port)) as calc:
        assert calc.add(a=1, b=2) == 3
    assert proc.wait(30) == 0


def test_an_interrupt_removes_the_socket(worker: Worker, path: str) -> None:
    proc, line = worker.start("--unix", path, "--no-threaded", "--idle-timeout", "0")
    assert line == f"UNIX:{path}\n"
    with core.unix_connect(Calc, path) as calc:
        assert calc.add(a=1, b=2) == 3
    proc.send_signal(signal.SIGINT)
    assert proc.wait(30) == 130
    assert not os.path.lexists(path)


@pytest.mark.parametrize("transport", ["stdio", "unix"])
def test_the_access_log_of_a_worker(worker: Worker, tmp_path: Path, path: str, monkeypatch, transport: str) -> None:
    log = tmp_path / "logs" / "deep" / "access-{pid}.jsonl"
    if transport == "stdio":
        monkeypatch.setenv("VGI_RPC_ACCESS_LOG", str(log))
        with core.connect(Calc, worker.cmd) as calc:
            calc.add(a=1, b=2)
            pid = calc.pid()
    else:
        proc, _ = worker.start("--unix", path, "--idle-timeout", "0.2", "--access-log", str(log))
        with core.unix_connect(Calc, path) as calc:
            calc.add(a=1, b=2)
            pid = calc.pid()
        assert proc.wait(30) == 0
    (file,) = log.parent.iterdir()
    assert file.name == f"access-{pid}.jsonl"
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(r["method"], r["status"]) for r in records] == [("add", "ok"), ("pid", "ok")]


@pytest.mark.parametrize(
    ("flags", "env", "code", "text"),
    [
        ("", {}, 0, ""),
        ("--nonsense", {}, 2, "unrecognized arguments: --nonsense"),
        ("--unix s --tcp 0", {}, 2, "not allowed with argument"),
        ("--idle-timeout soon", {}, 2, "invalid float value: 'soon'"),
        ("--tcp abc", {}, 1, "--tcp expects [HOST:]PORT, got 'abc'\n"),
        ("--tcp localhost:", {}, 1, "--tcp expects [HOST:]PORT, got 'localhost:'\n"),
        ("--tcp 70000", {}, 1, "--tcp expects [HOST:]PORT, got '70000'\n"),
        ("--tcp 0 --no-threaded", {}, 1, "idle_timeout requires threaded=True"),
        ("", {"VGI_RPC_IDLE_TIMEOUT": "soon"}, 1, "VGI_RPC_IDLE_TIMEOUT='soon' is not a valid float\n"),
        ("--access-log a --access-log-max-bytes 9 --access-log-when D", {}, 1, "exclude each other"),
        ("--access-log a --access-log-sample 1.5", {}, 1, "--access-log-sample must be within 0..1, got 1.5"),
    ],
)
def test_exit_codes(worker: Worker, flags: str, env: dict[str, str], code: int, text: str) -> None:
    ran = worker.run(*flags.split(), **env)
    assert ran.returncode == code, ran.stderr
    assert text in ran.stderr
    assert ran.stdout == ""


def run_server_flags(monkeypatch: pytest.MonkeyPatch, *flags: str, **env: str) -> dict:
    """What run_server passes to serve_unix or serve_tcp, without serving."""
    for name in [name for name in os.environ if name.startswith("VGI_RPC_")]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    seen: dict = {}
    monkeypatch.setattr(core, "serve_unix", lambda server, path, **o: seen.update(o, at=(path,), server=server))
    monkeypatch.setattr(core, "serve_tcp", lambda server, *at, **o: seen.update(o, at=at, server=server))
    monkeypatch.setattr(sys, "argv", ["worker", *flags])
    core.run_server(Calc, Impl())
    return seen


@pytest.mark.parametrize(
    ("flags", "env", "expected"),
    [
        ("", {}, (True, 64, 300.0)),
        ("", {"VGI_RPC_IDLE_TIMEOUT": "7", "VGI_RPC_MAX_CONNECTIONS": "5"}, (True, 5, 7.0)),
        ("", {"VGI_RPC_IDLE_TIMEOUT": "0", "VGI_RPC_MAX_CONNECTIONS": "0"}, (True, None, None)),
        ("", {"VGI_RPC_IDLE_TIMEOUT": "", "VGI_RPC_MAX_CONNECTIONS": ""}, (True, 64, 300.0)),
        ("--idle-timeout 2 --max-connections 3", {"VGI_RPC_IDLE_TIMEOUT": "7"}, (True, 3, 2.0)),
        ("--no-threaded --idle-timeout 0", {}, (False, 64, None)),
    ],
)
def test_flags_and_the_environment(monkeypatch: pytest.MonkeyPatch, flags: str, env, expected) -> None:
    seen = run_server_flags(monkeypatch, "--tcp", "0", *flags.split(), **env)
    assert (seen["threaded"], seen["max_connections"], seen["idle_timeout"]) == expected


@pytest.mark.parametrize(
    ("flags", "env", "text"),
    [
        ("--tcp 0 --idle-timeout -1", {}, "--idle-timeout must not be negative, got -1.0"),
        ("--tcp 0 --idle-timeout nan", {}, "--idle-timeout must not be negative, got nan"),
        ("--tcp 0 --max-connections -1", {}, "--max-connections must not be negative, got -1"),
        (
            "--unix s --max-response-bytes 70000",
            {},
            "--max-response-bytes (VGI_RPC_MAX_RESPONSE_BYTES) is about HTTP",
        ),
        ("--tcp 0 --max-externalized-response-bytes 7", {}, "--max-externalized-response-bytes (VGI_RPC_MAX_EXT"),
        (
            "--tcp 0",
            {"VGI_RPC_MAX_EXTERNALIZED_RESPONSE_BYTES": "7"},
            "--max-externalized-response-bytes (VGI_RPC_MAX_EXTERNALIZED_RESPONSE_BYTES) is about HTTP",
        ),
        ("--access-log a --access-log-when X", {}, "--access-log: when must be S, M, H, D"),
        ("--access-log a --access-log-max-record-bytes 0", {}, "--access-log: max_record_bytes must be positive"),
        ("--access-log a --access-log-async --access-log-queue-size 0", {}, "--access-log: queue_size must be"),
        ("--access-log /dev/null/a", {}, "--access-log: [Errno 17] File exists: '/dev/null'"),
        (
            "",
            {"VGI_RPC_ACCESS_LOG": "a", "VGI_RPC_ACCESS_LOG_SAMPLE": "2"},
            "--access-log-sample must be within 0..1",
        ),
        ("--access-log a --access-log-max-bytes 0", {}, "--access-log: max_bytes must be positive"),
        ("--http --port 99999", {}, "--port must be within 0..65535, got 99999"),
    ],
)
def test_flags_that_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, env, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_server_flags(monkeypatch, *flags.split(), **env)
    assert str(caught.value).startswith(text)  # a text is exit status 1


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("80", ("127.0.0.1", 80)),
        (":80", ("127.0.0.1", 80)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:8080", ("::1", 8080)),
    ],
)
def test_the_address_of_a_tcp_worker(monkeypatch: pytest.MonkeyPatch, text: str, at) -> None:
    assert run_server_flags(monkeypatch, "--tcp", text)["at"] == at


def test_describe_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not run_server_flags(monkeypatch, "--tcp", "0")["server"].describe_enabled
    assert run_server_flags(monkeypatch, "--tcp", "0", "--describe")["server"].describe_enabled


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: (Calc,), "implementation is required when passing a Protocol class"),
        (
            lambda: (core.RpcServer(Calc, Impl()), Impl()),
            "implementation must be None when passing an RpcServer",
        ),
        (lambda: (Impl(), Impl()), "Expected a Protocol class or RpcServer, got Impl"),
        (lambda: (None,), "Expected a Protocol class or RpcServer, got NoneType"),
    ],
)
def test_bad_arguments_of_run_server(make, text: str) -> None:
    with pytest.raises(TypeError) as caught:
        core.run_server(*make())
    assert str(caught.value) == text


# ---- places for guests


class Adder(Protocol):
    def add(self, a: float, b: float) -> float: ...


class AdderImpl:
    def add(self, a, b):
        return a + b


def test_who_has_asked_nothing_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(core._TransportAcceptor, "SILENT", 0.2)
    path, bound = str(tmp_path / "s"), threading.Event()
    server = core.RpcServer(Adder, AdderImpl())
    options = {"threaded": True, "max_connections": 3, "idle_timeout": 0.1, "on_bound": lambda _: bound.set()}
    thread = threading.Thread(target=core.serve_unix, args=(server, path), kwargs=options)
    thread.start()
    assert bound.wait(10)
    with core.unix_connect(Adder, path, timeout=20.0) as known:
        assert known.add(1.0, 2.0) == 3.0
        silent = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for sock, said in zip(silent, (b"", b"\xff\xff"), strict=True):
            sock.connect(path)
            sock.sendall(said)
        with core.unix_connect(Adder, path, timeout=20.0) as late:
            assert late.add(2.0, 2.0) == 4.0
        assert known.add(3.0, 2.0) == 5.0
        for sock in silent:
            sock.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
            sock.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "no room for new connections; closed 2 that had asked nothing" in caplog.messages


def test_no_descriptors_are_one_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    class Full:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

    acceptor = core._TransportAcceptor(Full(), lambda sock: None, threaded=True)
    began = time.monotonic()
    while time.monotonic() - began < 0.5:
        assert acceptor._accept() is None
    assert len(caplog.messages) == 1
    assert "Too many open files" in caplog.messages[0]


def test_keep_alive_on_both_ends_of_tcp() -> None:
    client, served = core.make_tcp_pair()
    for transport in (client, served):
        assert transport._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        transport.close()
