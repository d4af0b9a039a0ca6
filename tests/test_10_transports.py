"""The connection laws of DESIGN.md section 4, proven by violence: real processes, signals, forks and silent peers."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest

from tests.core import core

pytestmark = pytest.mark.timeout(60)

KINDS = ("pipe", "subprocess", "unix", "tcp")
if os.environ.get("VGI_RPC_ALL_KINDS"):  # the same sockets with the server in this process: two minutes more
    KINDS += ("unix_pipe", "tcp_pipe")
SERVED = ("subprocess", "unix", "tcp")  # the server is another process

SERVICE = '''
from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import os
import signal
import subprocess
import sys
import time
from typing import Protocol

import pyarrow as pa

core = importlib.import_module(os.environ["VGI_RPC_CORE"])
SCHEMA = pa.schema([("i", pa.int64())])


def die(how):
    for i in range(30):
        print("last words", i, file=sys.stderr, flush=True)
    if how == "SIGSEGV":
        ctypes.string_at(0)
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))


def touch(path):
    with open(path, "a") as file:
        file.write("x")


@dataclasses.dataclass
class Counter(core.ProducerState):
    n: int
    at: int = -1
    how: str = ""
    mark: str = ""
    i: int = 0

    def produce(self, out, ctx):
        if self.i == self.at:
            if self.how == "sleep":
                touch(self.mark)
                time.sleep(60)
            elif self.how == "deadline":
                while True:
                    ctx.check_deadline()
                    time.sleep(0.005)
            elif self.how == "SystemExit":
                raise SystemExit(3)
            elif self.how == "KeyboardInterrupt":
                raise KeyboardInterrupt
            elif self.how == "log":
                out.client_log(core.Level.INFO, "in the stream")
            else:
                die(self.how)
        if self.i >= self.n:
            out.finish()
            return
        out.emit_pydict({"i": [self.i]})
        self.i += 1


@dataclasses.dataclass
class Adder(core.ExchangeState):
    total: int = 0

    def exchange(self, input, out, ctx):
        value = input.batch.column(0)[0].as_py()
        if value < 0:
            touch(os.environ.get("VGI_TEST_MARK", os.devnull))
            time.sleep(60)
        self.total += value
        out.emit_pydict({"i": [self.total]})


class Service(Protocol):
    def echo(self, n: int) -> int: ...
    def add(self, a: float, b: float) -> float: ...
    def text(self, s: str) -> str: ...
    def items(self, n: int) -> list[int]: ...
    def blob(self, data: bytes) -> int: ...
    def big(self, n: int) -> bytes: ...
    def pid(self) -> int: ...
    def sleep(self, mark: str, seconds: float) -> str: ...
    def mark(self, path: str, how: str) -> int: ...
    def die(self, how: str) -> int: ...
    def left(self) -> float | None: ...
    def until_deadline(self, mark: str) -> int: ...
    def noisy(self, n: int) -> int: ...
    def exits(self, what: str) -> int: ...
    def logs(self, n: int) -> int: ...
    def counter(self, n: int, at: int = -1, how: str = "", mark: str = "") -> core.Stream[Counter]: ...
    def adder(self) -> core.Stream[Adder]: ...


class Impl:
    def echo(self, n):
        return n

    def add(self, a, b):
        return a + b

    def text(self, s):
        return s[::-1]

    def items(self, n):
        return list(range(n))

    def blob(self, data):
        return len(data)

    def big(self, n):
        return bytes(n)

    def pid(self):
        return os.getpid()

    def sleep(self, mark, seconds):
        touch(mark)
        time.sleep(seconds)
        return "the answer of sleep"

    def mark(self, path, how):
        touch(path)
        if how:
            die(how)
        return os.path.getsize(path)

    def die(self, how):
        die(how)

    def left(self, ctx):
        return ctx.time_left()

    def until_deadline(self, mark, ctx):
        try:
            while True:
                ctx.check_deadline()
                time.sleep(0.005)
        except core.DeadlineExceededError:
            touch(mark)
            raise

    def noisy(self, n):
        print("print", n)
        sys.stdout.write("write %d\\n" % n)
        sys.stdout.flush()
        os.write(1, b"os.write\\n")
        libc = ctypes.CDLL(None)
        libc.printf(b"printf %d\\n", n)
        libc.puts(b"puts")
        libc.fflush(None)
        with contextlib.suppress(AttributeError, ValueError):
            sys.__stdout__.buffer.write(b"\\xff\\xff\\xff\\xff")
            sys.__stdout__.flush()
        subprocess.run([sys.executable, "-S", "-c", "print('child', input() if 0 else '')"], check=True)
        assert os.read(0, 10) == b""
        return n

    def exits(self, what):
        raise {"SystemExit": SystemExit(3), "KeyboardInterrupt": KeyboardInterrupt()}[what]

    def logs(self, n, ctx):
        for i in range(n):
            ctx.client_log(core.Level.INFO, f"message {i}")
        return n

    def counter(self, n, at=-1, how="", mark=""):
        return core.Stream(output_schema=SCHEMA, state=Counter(n, at, how, mark))

    def adder(self):
        return core.Stream(output_schema=SCHEMA, state=Adder(), input_schema=SCHEMA)


def batch(i):
    return core.AnnotatedBatch(pa.record_batch({"i": pa.array([i], pa.int64())}))


@contextlib.contextmanager
def proxy(kind, address, **options):
    """Open a client of any kind; `address` is a command, a path or a port."""
    inside = {"pipe": "serve_pipe", "unix_pipe": "serve_unix_pipe", "tcp_pipe": "serve_tcp_pipe"}
    if kind in inside:
        opened = getattr(core, inside[kind])(Service, Impl(), **options)
    elif kind == "subprocess":
        opened = core.connect(Service, address, **options)
    elif kind == "unix":
        opened = core.unix_connect(Service, address, **options)
    else:
        opened = core.tcp_connect(Service, "127.0.0.1", address, **options)
    with opened as found:
        yield found


if __name__ == "__main__":
    core.run_server(Service, Impl())
'''


class Lab:
    """A directory with the service in it, and the processes that were started there."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.script = directory / "rpc_lab_service.py"
        self.script.write_text(SERVICE, encoding="utf-8")
        path = os.pathsep.join([str(directory), *(entry for entry in sys.path if entry)])
        self.env = {**os.environ, "PYTHONPATH": path, "VGI_RPC_CORE": core.__name__}
        self.cmd = [sys.executable, str(self.script)]
        self._started: list[subprocess.Popen[bytes]] = []

    def address(self, kind: str) -> Any:
        """Start what a client of this kind needs; returns its address."""
        if kind == "subprocess":
            return self.cmd
        if kind == "unix":
            return self.serve("--unix", str(self.dir / "sock"))[1].removeprefix("UNIX:")
        if kind == "tcp":
            return int(self.serve("--tcp", "127.0.0.1:0")[1].rpartition(":")[2])
        return None

    def serve(self, *flags: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start a threaded server; returns the process and the line in which it says where it listens."""
        process = subprocess.Popen(
            [*self.cmd, "--threaded", "--idle-timeout", "0", "--max-connections", "0", *flags],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._started.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().decode().strip()

    @property
    def server(self) -> subprocess.Popen[bytes]:
        """The server started last."""
        return self._started[-1]

    def run(self, source: str, *args: object, timeout: float = 30.0) -> Any:
        """Run a script beside the service; returns what it wrote into `report`, decoded."""
        report = self.dir / "report.json"
        report.unlink(missing_ok=True)
        script = self.dir / "script.py"
        script.write_text(SCRIPT_HEAD + source, encoding="utf-8")
        command = [sys.executable, str(script), str(report), *(json.dumps(arg) for arg in args)]
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self._started.append(process)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output.decode()
        return json.loads(report.read_text(encoding="utf-8"))

    def start(self, source: str, *args: object) -> subprocess.Popen[bytes]:
        """Start a script without waiting for it."""
        script = self.dir / f"script{len(self._started)}.py"
        script.write_text(SCRIPT_HEAD + source, encoding="utf-8")
        command = [sys.executable, str(script), os.devnull, *(json.dumps(arg) for arg in args)]
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._started.append(process)
        return process

    def close(self) -> None:
        """End what is still running."""
        for process in self._started:
            process.kill()
            process.wait(10)
            if process.stdout is not None:
                process.stdout.close()


SCRIPT_HEAD = """
import json, os, random, signal, sys, threading, time
import rpc_lab_service as lab
from rpc_lab_service import core

class Alarm(Exception):
    pass

def ring(*_):
    raise Alarm("the alarm rang")

def outcome(call):
    try:
        return ["value", call()]
    except core.RpcError as exc:
        return [type(exc).__name__, str(exc), exc.sent]

def when(path, action):
    def watch():
        while not os.path.exists(path):
            time.sleep(0.002)
        time.sleep(0.02)  # let the caller reach its system call; what counts is checked whenever it arrives
        action()
    threading.Thread(target=watch, daemon=True).start()

def report(value):
    with open(sys.argv[1], "w") as file:
        json.dump(value, file)

ARGS = [json.loads(arg) for arg in sys.argv[2:]]
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """A fresh lab; workers that the tests start inherit its environment."""
    made = Lab(tmp_path)
    monkeypatch.setenv("PYTHONPATH", made.env["PYTHONPATH"])
    monkeypatch.setenv("VGI_RPC_CORE", core.__name__)
    try:
        yield made
    finally:
        made.close()


def _load_service(directory: Path) -> ModuleType:
    os.environ.setdefault("VGI_RPC_CORE", core.__name__)
    path = directory / "rpc_lab_service.py"
    path.write_text(SERVICE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rpc_lab_service", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def svc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The service as a module of this process."""
    module = _load_service(tmp_path_factory.mktemp("service"))
    try:
        yield module
    finally:
        del sys.modules["rpc_lab_service"]


def until(true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that another process or thread does."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@contextlib.contextmanager
def background(run: Callable[[], object]) -> Iterator[list[Any]]:
    """Run in a thread; the list receives the result, or the exception."""
    got: list[Any] = []

    def body() -> None:
        try:
            got.append(run())
        except BaseException as exc:
            got.append(exc)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield got
    thread.join(30)
    assert not thread.is_alive(), "the call hangs"


def numbers(session: Any) -> list[int]:
    """The values of a counter."""
    return [item.batch.column(0)[0].as_py() for item in session]


def alive(pid: int) -> bool:
    """Whether a process exists, zombies included."""
    return os.path.exists(f"/proc/{pid}")


# ---- law 1: interrupted calls


INTERRUPT = """
kind, address, where, name, mark = ARGS
os.environ["VGI_TEST_MARK"] = mark
signal.signal(signal.SIGALRM, ring)
with lab.proxy(kind, address) as p:
    assert p.echo(1) == 1
    open_session = None
    if where == "turn":
        open_session = p.counter(5, 2, "sleep", mark)
        assert next(iter(open_session)).batch.to_pydict() == {"i": [0]}
        open_session.tick()
        call = open_session.tick
    else:
        call = lambda: p.sleep(mark, 0.3)
    when(mark, lambda: os.kill(os.getpid(), getattr(signal, name)))
    try:
        call()
        caught = "nothing"
    except BaseException as exc:  # it is the caller's own, and leaves as itself
        caught = [type(exc).__name__, type(exc.__cause__).__name__]
    time.sleep(0.4)  # the late answer, if any, has arrived
    later = [outcome(lambda: p.echo(7)), outcome(lambda: p.text("x")), outcome(lambda: core.ping(p) > 0)]
    later.append(outcome(lambda: bool(p.counter(1))))
    if open_session is not None:
        later.append(outcome(open_session.tick))
        open_session.close()
    threads = []
    thread = threading.Thread(target=lambda: threads.append(outcome(lambda: p.echo(8))))
    thread.start()
    thread.join(5)
    later += threads or [["hangs"]]
    report([caught, later])
    os._exit(0)  # a sleeping server thread of this process need not be waited for
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["call", "turn"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGALRM"])
def test_an_interrupted_conversation_poisons_the_connection(lab: Lab, kind: str, where: str, name: str) -> None:
    caught, later = lab.run(INTERRUPT, kind, lab.address(kind), where, name, str(lab.dir / "mark"))
    struck = "KeyboardInterrupt" if name == "SIGINT" else "Alarm"
    assert caught == [struck, "NoneType"]
    assert len(later) == (6 if where == "turn" else 5)
    for number, (cls, text, *sent) in enumerate(later):
        if where == "turn" and number == 4:  # the session itself is over
            assert cls in ("RpcError", "ConnectionLostError"), text
            continue
        assert cls == "ConnectionLostError", text
        assert sent == ["no"]
        assert f"interrupted by {struck}" in text


# ---- law 2: threads


def _mixed(svc: ModuleType, p: Any, thread: int, calls: int) -> list[str]:
    """Call in turns whatever the service has; returns what came out wrong."""
    wrong = []

    def check(what: str, got: object, expected: object) -> None:
        if got != expected:
            wrong.append(f"{what}: got {got!r}, expected {expected!r}")

    for i in range(calls):
        n = thread * 1_000_000 + i
        match i % 7:
            case 0 | 1:
                check("echo", p.echo(n), n)
            case 2:
                check("add", p.add(float(n), b=0.5), n + 0.5)
            case 3:
                check("text", p.text(f"thread {thread} call {i}"), f"thread {thread} call {i}"[::-1])
            case 4:
                check("items", p.items(thread * 50 + i), list(range(thread * 50 + i)))
            case 5:
                with p.counter(thread + 1) as session:
                    check("counter", numbers(session), list(range(thread + 1)))
            case _:
                with p.adder() as session:
                    sums = [session.exchange(svc.batch(k)).batch.column(0)[0].as_py() for k in (thread, i, 1)]
                    check("adder", sums, [thread, thread + i, thread + i + 1])
    return wrong


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_proxy_and_every_answer_is_right(lab: Lab, svc: ModuleType, kind: str) -> None:
    outcomes: list[Any] = []
    with svc.proxy(kind, lab.address(kind)) as p:

        def work(thread: int) -> None:
            try:
                outcomes.append(_mixed(svc, p, thread, 100))
            except Exception as exc:
                outcomes.append(exc)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 40
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        assert outcomes == [[]] * 8


def test_a_thread_that_holds_a_stream_is_refused_and_others_wait(lab: Lab, svc: ModuleType) -> None:
    with svc.proxy("pipe", None) as p:
        session = p.counter(3)
        session.tick()
        with pytest.raises(core.RpcError, match="a stream is open on this connection") as refused:
            p.echo(1)
        assert refused.value.sent == "no"
        with background(lambda: p.echo(2)) as got:
            assert numbers(session) == [1, 2]
        assert got == [2]
        assert p.echo(3) == 3


def test_a_waiting_call_keeps_its_deadline(svc: ModuleType) -> None:
    with svc.proxy("pipe", None) as p:
        session = p.counter(3)
        began = time.monotonic()
        with background(lambda: core.with_options(p, timeout=0.2).echo(2)) as got:
            until(lambda: got)
        assert isinstance(got[0], core.DeadlineExceededError)
        assert got[0].sent == "no"
        assert time.monotonic() - began < 1.2
        assert numbers(session) == [0, 1, 2]
        assert p.echo(3) == 3  # nothing was sent, so nothing was lost


# ---- law 3: forks


FORK = """
kind, address, mark = ARGS
with lab.proxy(kind, address) as p:
    assert core.submit(p.echo, 1).result(10) == 1
    session = p.counter(4) if mark == "stream" else None
    if session is not None:
        session.tick()
    parent = os.getpid()
    inp, out = os.pipe()
    child = os.fork()
    if child == 0:
        found = [outcome(lambda: p.echo(2)), outcome(lambda: bool(p.counter(1))), outcome(lambda: core.ping(p))]
        found.append(outcome(lambda: core.submit(p.echo, 2).result(10)))
        found.append(outcome(lambda: list(core.map_calls(p.echo, [{"n": 2}]))))
        if session is not None:
            found.append(outcome(session.tick))
            session = None
        with lab.proxy("pipe", None) as own:  # connect again
            found.append(outcome(lambda: own.echo(3)))
        os.write(out, json.dumps(found).encode())
        os.close(out)
    else:
        if session is not None:
            rest = [item.batch.to_pydict()["i"] for item in session]
            assert rest == [[1], [2], [3]], rest
        right = [p.echo(i) == i for i in range(200)]
        os.close(out)
        with os.fdopen(inp) as file:
            found = json.loads(file.read())
if child == 0:
    os._exit(0)  # it has left the block: the parent must not notice
os.waitpid(child, 0)
report([parent, found, all(right)])
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["idle", "stream"])
def test_a_forked_child_is_refused_and_the_parent_goes_on(lab: Lab, kind: str, state: str) -> None:
    parent, found, right = lab.run(FORK, kind, lab.address(kind), state)
    assert right
    assert found.pop() == ["value", 3]
    assert len(found) == (6 if state == "stream" else 5)
    for cls, text, sent in found:
        assert cls == "WrongProcessError"
        assert f"made in process {parent}; connect again" in text
        assert sent == "no"


FORK_IN_CALL = """
kind, address, mark = ARGS
with lab.proxy(kind, address) as p:
    answers = []
    thread = threading.Thread(target=lambda: answers.append(outcome(lambda: p.sleep(mark, 1.0))))
    thread.start()
    while not os.path.exists(mark):
        time.sleep(0.002)
    child = os.fork()
    if child == 0:
        wrong = outcome(lambda: p.echo(2))
        os.write(2, b"")
    else:
        thread.join(10)
        _, status = os.waitpid(child, 0)
        answers.append(outcome(lambda: p.echo(9)))
if child == 0:  # it has left the block, while its copy of the lock belongs to a thread that does not exist here
    os._exit(0 if wrong[0] == "WrongProcessError" else 1)
report([answers, status])
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_fork_during_another_threads_call_does_not_disturb_it(lab: Lab, kind: str) -> None:
    answers, status = lab.run(FORK_IN_CALL, kind, lab.address(kind), str(lab.dir / "mark"))
    assert answers == [["value", "the answer of sleep"], ["value", 9]]
    assert status == 0


# ---- law 4: a worker's stdout


def test_a_worker_may_print_in_every_way(lab: Lab, svc: ModuleType) -> None:
    with svc.proxy("subprocess", lab.cmd, stderr=core.StderrMode.DEVNULL) as p:
        assert [p.noisy(n) for n in range(5)] == list(range(5))
        assert p.echo(42) == 42


# ---- law 5: death certificates


def assert_certificate(error: core.WorkerDiedError, lab: Lab, pid: int, how: str, last: list[str]) -> None:
    code = {"exit": 7}.get(how) or -getattr(signal, how)
    words = "exited with status 7" if how == "exit" else f"was killed by {how}"
    assert error.command == tuple(lab.cmd)
    assert error.pid == pid
    assert error.returncode == code
    assert f"worker {pid} {words} after" in str(error)
    assert 0 < error.lifetime < 60
    assert error.sent == "maybe"
    assert error.error_type == "TransportError"
    assert list(error.stderr_tail) == last
    note = "\n".join(error.__notes__)
    for shown in (lab.cmd[1], f"pid: {pid}", *last):
        assert shown in note
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.__notes__) == (type(error), str(error), error.__notes__)
    assert not alive(pid), "it was not reaped"


LAST_WORDS = [f"last words {i}" for i in range(10, 30)]


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSEGV", "SIGTERM", "exit"])
@pytest.mark.parametrize("where", ["call", "turn"])
@pytest.mark.parametrize("stderr", ["INHERIT", "PIPE"])
def test_a_dead_worker_leaves_a_certificate(lab: Lab, svc: ModuleType, how: str, where: str, stderr: str) -> None:
    with svc.proxy("subprocess", lab.cmd, stderr=core.StderrMode[stderr]) as p:
        pid = p.pid()
        session = p.counter(9, 2, how) if where == "turn" else None
        with pytest.raises(core.WorkerDiedError) as died:
            numbers(session) if session is not None else p.die(how)
        assert_certificate(died.value, lab, pid, how, LAST_WORDS)
        with pytest.raises(core.ConnectionLostError, match=f"worker {pid} ") as after:
            p.echo(1)
        assert after.value.sent == "no"


@pytest.mark.parametrize("where", ["call", "turn"])
def test_a_worker_killed_from_outside(lab: Lab, svc: ModuleType, where: str) -> None:
    mark = lab.dir / "mark"
    with svc.proxy("subprocess", lab.cmd) as p:
        pid = p.pid()

        def call() -> object:
            return p.sleep(str(mark), 60.0) if where == "call" else numbers(p.counter(9, 1, "sleep", str(mark)))

        with background(call) as got:
            until(mark.exists)
            os.kill(pid, signal.SIGKILL)
        assert isinstance(got[0], core.WorkerDiedError)
        assert_certificate(got[0], lab, pid, "SIGKILL", [])


def test_a_worker_that_never_starts_to_serve(lab: Lab, svc: ModuleType) -> None:
    cmd = [sys.executable, "-c", "raise SystemExit('no such luck')"]
    with svc.proxy("subprocess", cmd) as p, pytest.raises(core.WorkerDiedError, match="exited with status 1") as died:
        p.echo(1)
    assert died.value.stderr_tail == ("no such luck",)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("where", ["call", "turn"])
def test_a_killed_server_is_a_lost_connection(lab: Lab, svc: ModuleType, kind: str, where: str) -> None:
    with svc.proxy(kind, lab.address(kind)) as p:
        assert p.echo(1) == 1
        with pytest.raises(core.ConnectionLostError) as lost:
            p.die("SIGKILL") if where == "call" else numbers(p.counter(9, 3, "SIGKILL"))
        assert lost.value.sent == "maybe"
        with pytest.raises(core.ConnectionLostError, match="Reason") as after:
            p.echo(1)
        assert after.value.sent == "no"


# ---- law 6: deadlines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["call", "turn", "exchange"])
def test_a_deadline_ends_a_method_that_sleeps(
    lab: Lab, svc: ModuleType, kind: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svc.time, "sleep", _short_sleep(svc.time.sleep))
    with svc.proxy(kind, lab.address(kind)) as p:
        pid = p.pid()
        timed = core.with_options(p, timeout=0.4)
        began = time.monotonic()
        with pytest.raises(core.DeadlineExceededError, match=r"timeout of 0\.4 s") as late:
            if where == "call":
                timed.sleep(str(lab.dir / "mark"), 60.0)
            elif where == "turn":
                numbers(timed.counter(9, 1, "sleep", str(lab.dir / "mark")))
            else:
                timed.adder().exchange(svc.batch(-1))
        assert 0.35 < time.monotonic() - began < 1.4
        assert late.value.sent == "maybe"
        assert isinstance(late.value, TimeoutError)
        with pytest.raises(core.ConnectionLostError, match="did not finish within its timeout"):
            p.echo(1)
        assert kind != "subprocess" or not alive(pid), "the worker was not killed and reaped"


def _short_sleep(sleep: Callable[[float], None]) -> Callable[[float], None]:
    """In this process a server thread shall not outlive the test by a minute."""

    def short(seconds: float) -> None:
        sleep(min(seconds, 2.0))

    return short


@pytest.mark.parametrize("kind", KINDS)
def test_a_turns_own_timeout(lab: Lab, svc: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svc.time, "sleep", _short_sleep(svc.time.sleep))
    with svc.proxy(kind, lab.address(kind)) as p:
        session = p.counter(9, 1, "sleep", str(lab.dir / "mark"))
        assert session.tick(timeout=20.0).batch.to_pydict() == {"i": [0]}
        began = time.monotonic()
        with pytest.raises(core.DeadlineExceededError):
            session.tick(timeout=0.3)
        assert time.monotonic() - began < 1.3
        session.close()
        with pytest.raises(core.ConnectionLostError):
            p.echo(1)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    """Peers that take a connection and then neither read nor answer."""
    with contextlib.ExitStack() as stack:

        def make(kind: str) -> Any:
            if kind == "subprocess":
                return [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
            if kind == "tcp":
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                return listener.getsockname()[1]
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / "silent"))
            listener.listen()
            return str(tmp_path / "silent")

        yield make


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("what", ["call", "large", "stream", "ping"])
def test_a_deadline_ends_a_call_to_a_silent_peer(
    svc: ModuleType, silent: Callable[[str], Any], kind: str, what: str
) -> None:
    large = bytes(32 << 20)
    with svc.proxy(kind, silent(kind), timeout=0.4) as p:
        calls = {
            "call": lambda: p.echo(1),
            "large": lambda: p.blob(large),
            "stream": lambda: numbers(p.counter(3)),
            "ping": lambda: core.ping(p, timeout=0.4),
        }
        pid = p._transport.proc.pid if kind == "subprocess" else None
        began = time.monotonic()
        with pytest.raises(core.DeadlineExceededError) as late:
            calls[what]()
        assert 0.35 < time.monotonic() - began < 1.4
        assert late.value.sent == "maybe"
        with pytest.raises(core.ConnectionLostError):
            calls[what]()
        assert pid is None or not alive(pid)


@pytest.mark.parametrize("kind", KINDS)
def test_a_method_sees_its_deadline(lab: Lab, svc: ModuleType, kind: str) -> None:
    with svc.proxy(kind, lab.address(kind)) as p:
        assert p.left() is None
        for timeout in (5.0, 20.0, 1000.0):
            left = core.with_options(p, timeout=timeout).left()
            assert left is not None and timeout - 3 < left <= timeout
        assert p.left() is None


@pytest.mark.parametrize("kind", SERVED)
@pytest.mark.parametrize("where", ["call", "turn"])
def test_a_method_can_stop_at_its_deadline(lab: Lab, svc: ModuleType, kind: str, where: str) -> None:
    mark = lab.dir / "stopped"
    address = lab.address(kind)
    with svc.proxy(kind, address, timeout=0.5) as p, pytest.raises(core.DeadlineExceededError):
        p.until_deadline(str(mark)) if where == "call" else numbers(p.counter(9, 1, "deadline"))
    if where == "call" and kind != "subprocess":  # a subprocess was killed
        until(mark.exists)
    with svc.proxy(kind, address) as p:
        assert p.echo(5) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_deadlines_that_are_met_change_nothing(lab: Lab, svc: ModuleType, kind: str) -> None:
    with svc.proxy(kind, lab.address(kind), timeout=20.0) as p:
        assert _mixed(svc, p, 3, 60) == []
        assert p.blob(bytes(32 << 20)) == 32 << 20
        assert p.big(32 << 20) == bytes(32 << 20)
        assert 0 < core.ping(p) < 5
        assert p.echo(1) == 1


# ---- reconnecting


def test_reconnect_after_the_worker_was_killed(lab: Lab, svc: ModuleType) -> None:
    marks = lab.dir / "marks"
    with svc.proxy("subprocess", lab.cmd, reconnect=True) as p:
        assert p.mark(str(marks), "") == 1
        first = p.pid()
        os.kill(first, signal.SIGKILL)
        until(lambda: p._transport.proc.poll() is not None)  # until then what is written may still be taken
        assert p.mark(str(marks), "") == 2  # executed once, by a new worker
        assert p.pid() != first
        with pytest.raises(core.WorkerDiedError) as died:  # it was sent: not repeated
            p.mark(str(marks), "SIGKILL")
        assert died.value.sent == "maybe"
        assert marks.stat().st_size == 3
        assert p.mark(str(marks), "") == 4
        with p.counter(3) as session:
            assert numbers(session) == [0, 1, 2]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_reconnect_to_a_restarted_server(lab: Lab, svc: ModuleType, kind: str) -> None:
    marks = lab.dir / "marks"
    address = lab.address(kind)
    flags = ["--unix", address] if kind == "unix" else ["--tcp", f"127.0.0.1:{address}"]
    with svc.proxy(kind, address, reconnect=True) as p:
        for done in range(1, 8, 2):
            assert p.mark(str(marks), "") == done
            lab.server.kill()
            lab.server.wait(10)
            lab.serve(*flags)
            assert p.mark(str(marks), "") == done + 1
        with pytest.raises(core.ConnectionLostError) as lost:
            p.mark(str(marks), "SIGKILL")
        assert lost.value.sent == "maybe"
        assert marks.stat().st_size == 9
        lab.server.wait(10)
        with pytest.raises((core.ConnectionLostError, ConnectionRefusedError)):  # nobody is there
            p.mark(str(marks), "")
        lab.serve(*flags)
        assert p.mark(str(marks), "") == 10


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_failed_reconnect_is_an_rpc_error(lab: Lab, svc: ModuleType, kind: str) -> None:
    with svc.proxy(kind, lab.address(kind), reconnect=True) as p:
        assert p.echo(1) == 1
        lab.server.kill()
        lab.server.wait(10)
        with pytest.raises(core.ConnectionLostError) as lost:
            p.echo(2)
        assert lost.value.sent == "no"


def test_without_reconnect_a_restarted_server_is_not_used(lab: Lab, svc: ModuleType) -> None:
    address = lab.address("unix")
    with svc.proxy("unix", address) as p:
        assert p.echo(1) == 1
        lab.server.kill()
        lab.server.wait(10)
        lab.serve("--unix", address)
        for _ in range(3):
            with pytest.raises(core.ConnectionLostError):
                p.echo(2)


@pytest.mark.parametrize("kind", ["subprocess", "unix"])
def test_threads_on_a_reconnecting_proxy_keep_their_connection(lab: Lab, svc: ModuleType, kind: str) -> None:
    """An answer that waits for its own thread must not be taken for a dead connection by another thread."""
    outcomes: list[Any] = []
    with svc.proxy(kind, lab.address(kind), reconnect=True) as p:
        transport = p._transport
        pid = p.pid()

        def work(thread: int) -> None:
            try:
                outcomes.append(_mixed(svc, p, thread, 100))
            except Exception as exc:
                outcomes.append(exc)

        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(8)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 40
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0))
        assert outcomes == [[]] * 8
        assert p.pid() == pid
        assert p._transport is transport


# ---- callbacks and implementations that raise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["SystemExit", "KeyboardInterrupt"])
@pytest.mark.parametrize("where", ["call", "turn"])
def test_an_implementation_that_wants_to_exit_is_answered(
    lab: Lab, svc: ModuleType, kind: str, what: str, where: str
) -> None:
    address = lab.address(kind)
    with svc.proxy(kind, address) as p:
        with pytest.raises(core.RpcError) as raised:
            p.exits(what) if where == "call" else numbers(p.counter(5, 2, what))
        assert (raised.value.error_type, raised.value.sent) == (what, "answered")
        for n in range(3):
            with contextlib.suppress(core.ConnectionLostError):  # the server may obey after answering
                assert p.echo(n) == n
    if kind in ("unix", "tcp"):  # only that connection may end
        with svc.proxy(kind, address) as p:
            assert p.echo(9) == 9
        assert lab.server.poll() is None


class Boom(Exception):
    """What a test's callback raises."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_that_raises_costs_nothing(lab: Lab, svc: ModuleType, kind: str) -> None:
    seen: list[str] = []

    def on_log(message: Any) -> None:
        seen.append(message.message)
        raise Boom("not today")

    with svc.proxy(kind, lab.address(kind), on_log=on_log) as p:
        for n in range(1, 4):
            with pytest.raises(Boom, match="not today"):
                p.logs(n)
            assert seen == ["message 0"] * n
            assert p.echo(n) == n
        with pytest.raises(Boom):
            numbers(p.counter(5, 2, "log"))
        assert p.echo(4) == 4


def test_a_callback_that_is_interrupted_poisons(svc: ModuleType) -> None:
    def on_log(message: Any) -> None:
        raise KeyboardInterrupt

    with svc.proxy("pipe", None, on_log=on_log) as p:
        with pytest.raises(KeyboardInterrupt):
            p.logs(2)
        with pytest.raises(core.ConnectionLostError, match="interrupted by KeyboardInterrupt"):
            p.echo(1)


def test_a_callback_may_not_call_on_the_same_connection(svc: ModuleType) -> None:
    refused: list[core.RpcError] = []

    def on_log(message: Any) -> None:
        try:
            p.echo(1)
        except core.RpcError as exc:
            refused.append(exc)

    with svc.proxy("pipe", None, on_log=on_log) as p:
        assert p.logs(1) == 1
        assert "callback" in str(refused[0]) or "from inside" in str(refused[0])
        assert refused[0].sent == "no"
        assert p.echo(2) == 2


# ---- closing


def _dial(lab: Lab, svc: ModuleType, kind: str) -> tuple[Any, Callable[[], None]]:
    """A client transport of any kind, and what ends its server."""
    if kind == "subprocess":
        return core.SubprocessTransport(lab.cmd), lambda: None
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(lab.address(kind))
        return core.UnixTransport(sock), lambda: None
    if kind == "tcp":
        return core.TcpTransport(socket.create_connection(("127.0.0.1", lab.address(kind)))), lambda: None
    pairs = {"pipe": core.make_pipe_pair, "unix_pipe": core.make_unix_pair, "tcp_pipe": core.make_tcp_pair}
    client, served = pairs[kind]()
    server = core.RpcServer(svc.Service, svc.Impl())

    def serve() -> None:
        with contextlib.suppress(Exception):
            server.serve(served)
        served.close()

    thread = threading.Thread(target=serve)
    thread.start()
    return client, thread.join


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pipe"])  # nothing wakes a read of a pipe
def test_closing_from_another_thread_wakes_a_call(
    lab: Lab, svc: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svc.time, "sleep", _short_sleep(svc.time.sleep))
    mark = lab.dir / "mark"
    transport, end = _dial(lab, svc, kind)
    with core.RpcConnection(svc.Service, transport) as p, background(lambda: p.sleep(str(mark), 60.0)) as got:
        until(mark.exists)
        began = time.monotonic()
        transport.close()
        until(lambda: got)
        assert time.monotonic() - began < 1.2
        assert isinstance(got[0], core.ConnectionLostError)
        with pytest.raises(core.ConnectionLostError):
            p.echo(1)
    end()


@pytest.mark.parametrize("kind", KINDS)
def test_closing_wakes_a_call_that_waits_for_a_stream(lab: Lab, svc: ModuleType, kind: str) -> None:
    transport, end = _dial(lab, svc, kind)
    with core.RpcConnection(svc.Service, transport) as p:
        session = p.counter(3)
        session.tick()
        got: list[Any] = []

        def call() -> None:
            try:
                got.append(p.echo(1))
            except Exception as exc:
                got.append(exc)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        until(lambda: transport.channel.idle._waiters)  # it queues behind the stream
        transport.close()
        thread.join(5)
        assert got, "it still waits for a connection that is closed"
        assert isinstance(got[0], core.ConnectionLostError)
        session.cancel()
    end()


def _footprint() -> tuple[set[tuple[str, str]], set[str], set[str]]:
    """Descriptors, threads and children of this process."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    found = {(fd, at) for fd, at in found if not at.startswith("/proc/")}
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
    return found, set(children)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["clean", "in a stream", "poisoned"])
def test_connections_leave_nothing_behind(lab: Lab, svc: ModuleType, kind: str, how: str) -> None:
    others = set(threading.enumerate())  # of tests before this one, in the same process
    address = lab.address(kind)
    rounds = 50 if kind != "subprocess" else (20 if how == "clean" else 5)  # a worker takes 0.3 s of a processor
    before: Any = None
    for n in range(rounds + 1):
        with svc.proxy(kind, address) as p:
            assert p.echo(n) == n
            if how == "in a stream":
                session = p.counter(10)
                session.tick()
            elif how == "poisoned":
                with pytest.raises(core.DeadlineExceededError):
                    core.with_options(p, timeout=0.001).until_deadline(os.devnull)
        if how == "in a stream":
            del session
        if before is None:  # the first one may fill caches
            until(lambda: others.issuperset(threading.enumerate()))
            before = _footprint()
    until(lambda: others.issuperset(threading.enumerate()))
    assert _footprint() == before


# ---- clients that vanish


VANISH = """
kind, address, where, mark = ARGS
with lab.proxy(kind, address) as p:
    if where == "call":
        p.sleep(mark, 1.0)
    else:
        session = p.counter(1 << 40)
        session.tick()
        open(mark, "w").close()
        for item in session:
            pass
"""


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("where", ["call", "stream"])
def test_clients_that_vanish_do_not_disturb_the_server(lab: Lab, svc: ModuleType, kind: str, where: str) -> None:
    address = lab.address(kind)
    server = lab.server
    descriptors = f"/proc/{server.pid}/fd"
    with svc.proxy(kind, address) as p:
        assert p.pid() == server.pid
        before = len(os.listdir(descriptors))
        for n in range(3):
            mark = lab.dir / f"mark{n}"
            client = lab.start(VANISH, kind, address, where, str(mark))
            until(mark.exists)
            client.kill()
            client.wait(10)
            assert _mixed(svc, p, n, 14) == []
        until(lambda: len(os.listdir(descriptors)) == before)
        assert server.poll() is None
        with svc.proxy(kind, address) as other:
            assert other.echo(5) == 5
    until(lambda: len(os.listdir(descriptors)) == before - 1)


# ---- signals at any moment


STORM = """
kind, address, seed = ARGS
signal.signal(signal.SIGALRM, ring)
random.seed(seed)
rounds = alarms = right = 0
wrong = []
end = time.monotonic() + 4.0
while time.monotonic() < end:
    rounds += 1
    with lab.proxy(kind, address) as p:
        lost = False
        n = rounds * 1000
        turn_end = time.monotonic() + 0.2  # Python drops what is raised within a finalizer
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.004))
            while time.monotonic() < turn_end:
                n += 1
                got = p.echo(n) if n % 3 else [b.batch.to_pydict()["i"] for b in p.counter(3)]
                if got != (n if n % 3 else [[0], [1], [2]]):
                    wrong.append([n, str(got)])
                    break
                right += 1
        except (Alarm, core.RpcError) as exc:
            alarms += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        for n in range(n + 1, n + 4):  # an answer of its own, or none
            try:
                if p.echo(n) != n:
                    wrong.append([n, "another's answer"])
            except core.ConnectionLostError:
                lost = True
            except core.RpcError as exc:
                if "a stream is open" not in str(exc):  # the alarm rang between two turns: nothing was lost
                    wrong.append([n, repr(exc)])
            else:
                if lost:
                    wrong.append([n, "a lost connection came back"])
report([rounds, alarms, right, wrong])
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["unix_pipe", "unix", "tcp"])
def test_alarms_at_random_moments_never_mix_answers(lab: Lab, kind: str) -> None:
    rounds, alarms, right, wrong = lab.run(STORM, kind, lab.address(kind), 7)
    assert wrong == []
    assert rounds > 20 and alarms > 20 and right > 20


@pytest.mark.parametrize(
    "make", [core.make_pipe_pair, core.make_unix_pair, core.make_tcp_pair], ids=lambda m: m.__name__
)
def test_a_pair_that_cannot_be_made_leaves_no_descriptor(make: Callable[[], tuple[Any, Any]]) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for transport in make():  # imports and the like
        transport.close()
    before = os.listdir("/proc/self/fd")
    outcomes = set()
    for free in range(6):
        held = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(before) + 40, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.dup(2))
            for _ in range(free):
                os.close(held.pop())
            with contextlib.suppress(OSError):
                for transport in make():
                    transport.close()
                outcomes.add(free)
        finally:
            for number in held:
                os.close(number)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert os.listdir("/proc/self/fd") == before, free
    assert outcomes and 0 not in outcomes


def test_listening_leaves_the_umask_of_other_threads_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def umask(mask: int) -> int:
        raise AssertionError("the umask is the whole process's")

    monkeypatch.setattr(os, "umask", umask)
    path = tmp_path / "s"
    with core._transport_listen_unix(str(path), 1):
        assert path.stat().st_mode & 0o777 == 0o600


# ---- law 10, and descriptors that others have a hand in


class Small(Protocol):
    def echo(self, n: int) -> int: ...


class SmallImpl:
    def echo(self, n: int) -> int:
        return n


def _answer(n: int) -> bytes:
    """A whole reply, as a server writes it."""
    plan = core._WirePlan(core.rpc_methods(Small)["echo"], "Small", None)
    reply = plan.encode_reply(n)
    assert isinstance(reply, bytes)
    return reply


@contextlib.contextmanager
def _served(transport: Any) -> Iterator[None]:
    thread = threading.Thread(target=core.RpcServer(Small, SmallImpl()).serve, args=(transport,), daemon=True)
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive()
    transport.close()


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("learned", [False, True])
def test_a_reply_that_comes_twice_is_never_the_next_answer(times: int, learned: bool) -> None:
    client, far = core.make_unix_pair()
    with core.RpcConnection(Small, client, timeout=10.0) as p:
        for n in range(3 if learned else 0):
            far.channel.send(_answer(n))
            assert p.echo(n) == n
        far.channel.send(_answer(7) * times)
        with pytest.raises(core.RpcError, match=r"expected one answer to one request, and \d+ more bytes") as caught:
            p.echo(7)
        assert caught.value.sent == "answered"
        assert client.channel.gone()
        with pytest.raises(core.ConnectionLostError) as later:
            p.echo(8)
        assert later.value.sent == "no"
    far.close()


def test_bytes_that_nobody_asked_for_poison_the_next_call() -> None:
    client, far = core.make_unix_pair()
    with core.RpcConnection(Small, client, timeout=10.0) as p:
        client.channel.buf = _answer(1)
        assert client.channel.gone()
        with pytest.raises(core.ConnectionLostError, match="more bytes came before") as caught:
            p.echo(2)
        assert caught.value.sent == "no"
    far.close()


def test_the_first_write_of_a_call_keeps_the_deadline() -> None:
    """A peer that answers and does not read: the pipe is full before the call begins."""
    client_in, server_out = os.pipe()
    server_in, client_out = os.pipe()
    os.set_blocking(client_out, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(client_out, bytes(4096))
    os.set_blocking(client_out, True)
    transport = core.PipeTransport(os.fdopen(client_in, "rb"), os.fdopen(client_out, "wb", buffering=0))
    with core.RpcConnection(Small, transport, timeout=0.2) as p:
        with pytest.raises(core.DeadlineExceededError) as caught:
            p.echo(1)
        assert caught.value.sent == "no"
    os.close(server_in)
    os.close(server_out)


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize("side", ["client", "server"])
def test_descriptors_that_are_not_blocking(side: str, timeout: float | None) -> None:
    class Blob(Protocol):
        def twice(self, data: bytes) -> bytes: ...

    class BlobImpl:
        def twice(self, data: bytes) -> bytes:
            return data * 2

    client, server = core.make_unix_pair()
    os.set_blocking((client if side == "client" else server).channel.inp, False)
    thread = threading.Thread(target=core.RpcServer(Blob, BlobImpl()).serve, args=(server,), daemon=True)
    thread.start()
    with core.RpcConnection(Blob, client, timeout=timeout) as p:
        for size in (1, 10_000, 3_000_000):
            assert len(p.twice(bytes(size))) == 2 * size
        assert os.get_blocking(client.channel.out) == (side == "server")  # left as it was
    thread.join(10)
    server.close()


def test_what_a_stream_has_read_ahead_belongs_to_the_channel() -> None:
    server_in, client_out = os.pipe()
    client_in, server_out = os.pipe()
    client = core.PipeTransport(os.fdopen(client_in, "rb"), os.fdopen(client_out, "wb", buffering=0))
    os.write(client_out, b"HELLO\n")
    found: list[int] = []
    with core.RpcConnection(Small, client, timeout=10.0) as p:
        thread = threading.Thread(target=lambda: found.append(p.echo(5)))
        thread.start()
        reader = os.fdopen(server_in, "rb")
        assert reader.readline() == b"HELLO\n"
        while not reader.peek():  # the request is in the reader's own buffer, or soon will be
            pass
        with _served(core.PipeTransport(reader, os.fdopen(server_out, "wb"))):
            thread.join(10)
            assert found == [5]
            assert p.echo(6) == 6
            client.close()


class _Scrambled(io.RawIOBase):
    """A stream with a descriptor that carries other bytes than the stream, as TLS has."""

    def __init__(self, sock: socket.socket) -> None:
        self._file = sock.makefile("rwb", buffering=0)

    def fileno(self) -> int:
        return self._file.fileno()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = self._file.read(len(target))
        target[: len(data)] = bytes(b ^ 255 for b in data)
        return len(data)

    def write(self, data: Any) -> int | None:
        return self._file.write(bytes(b ^ 255 for b in bytes(data)))

    def close(self) -> None:
        self._file.close()
        super().close()


@pytest.mark.parametrize("buffered", [False, True])
def test_a_stream_that_changes_its_bytes_is_never_written_below(buffered: bool) -> None:
    near, far = socket.socketpair()
    with near, far:
        one, two = _Scrambled(near), _Scrambled(far)
        reader = io.BufferedReader(one) if buffered else one
        writer = io.BufferedWriter(one) if buffered else one
        client, server = core.PipeTransport(reader, writer), core.PipeTransport(two, two)
        with _served(server):
            with core.RpcConnection(Small, client) as p:
                assert p.echo(3) == 3
            near.shutdown(socket.SHUT_WR)
        for stream in (one, two):
            stream.close()


FORK_HOLDS = """
kind, address = ARGS
import warnings
warnings.simplefilter("ignore")
door = lab.proxy(kind, address)
p = door.__enter__()
p.echo(1)
go, wait = os.pipe()
child = os.fork()
if child == 0:
    os.close(wait)
    os.read(go, 1)  # until the parent ends
    os._exit(0)
began = time.monotonic()
proc = getattr(p._link.transport, "proc", None)
door.__exit__(None, None, None)
report([time.monotonic() - began, proc and proc.returncode])
os.close(wait)
os.waitpid(child, 0)
os._exit(0)
"""


@pytest.mark.parametrize("kind", ["pipe", "subprocess"])
def test_a_forked_child_does_not_hold_the_connection(lab: Lab, kind: str) -> None:
    seconds, status = lab.run(FORK_HOLDS, kind, lab.address(kind))
    assert seconds < 4.0  # and not the 5 or 10 of a peer that does not see the end
    assert status in (0, None)


def test_a_fork_leaves_alone_what_has_no_caller() -> None:
    """A pair whose halves are given to the two processes."""
    client, server = core.make_unix_pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of other tests
        child = os.fork()
    if child == 0:
        try:
            core.RpcServer(Small, SmallImpl()).serve(server)
        finally:
            os._exit(0)
    server._sock.close()  # and no shutdown(), which would be the child's end too
    with core.RpcConnection(Small, client, timeout=10.0) as p:
        assert p.echo(4) == 4
    os.waitpid(child, 0)


def test_foreign_transports_are_freed() -> None:
    class Foreign:
        def __init__(self) -> None:
            self.reader, self.writer = io.BytesIO(), io.BytesIO()

        def close(self) -> None:
            pass

    transport = Foreign()
    assert core._transport_channel(transport) is core._transport_channel(transport)
    gone = weakref.ref(transport)
    del transport
    gc.collect()
    assert gone() is None


def test_the_reader_of_a_worker_gives_whole_reads() -> None:
    code = (
        "import sys, time\nfor k in range(6): sys.stdout.buffer.write(bytes([k]) * 50); sys.stdout.flush();"
        " time.sleep(0.01)"
    )
    transport = core.SubprocessTransport([sys.executable, "-c", code])
    try:
        assert transport.reader is transport.reader
        assert transport.reader.read(120) == b"\0" * 50 + b"\1" * 50 + b"\2" * 20  # type: ignore[attr-defined]
        assert transport.reader.read(500) == b"\2" * 30 + b"\3" * 50 + b"\4" * 50 + b"\5" * 50  # type: ignore[attr-defined]
    finally:
        transport.close()


def test_tcp_connections_notice_a_host_that_is_gone() -> None:
    for transport in core.make_tcp_pair():
        with socket.socket(fileno=os.dup(transport.channel.inp)) as sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            if hasattr(socket, "TCP_KEEPIDLE"):
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        transport.close()


STATUS_TAKEN = """
how, address = ARGS
if how == "ignored":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
with lab.proxy("subprocess", address) as p:
    p.echo(1)
    proc = p._link.transport.proc
    proc.kill()
    if how == "reaped":
        os.waitpid(proc.pid, 0)
    try:
        p.echo(2)
    except core.WorkerDiedError as exc:
        report([str(exc), exc.returncode])
"""


@pytest.mark.parametrize("how, text", [("", "SIGKILL"), ("ignored", "status unknown"), ("reaped", "status unknown")])
def test_an_exit_status_that_somebody_else_has_taken_is_unknown(lab: Lab, how: str, text: str) -> None:
    said, returncode = lab.run(STATUS_TAKEN, how, lab.address("subprocess"))
    assert text in said and "status 0" not in said
    assert returncode == (None if how else -9)


def test_a_command_may_hold_paths(lab: Lab, svc: ModuleType) -> None:
    code = "import sys; sys.exit(3)"
    with (
        pytest.raises(core.WorkerDiedError) as caught,
        core.connect(Small, [Path(sys.executable), b"-c", code]) as p,
    ):
        p.echo(1)
    assert caught.value.command == (sys.executable, "-c", code)


@pytest.mark.parametrize("error", [TimeoutError("mine"), ValueError("mine"), LookupError("mine"), Exception("mine")])
def test_what_a_signal_handler_raises_is_the_callers(error: Exception) -> None:
    def ring(*_: object) -> None:
        raise error

    class Slow(Protocol):
        def sleep(self) -> None: ...

    class SlowImpl:
        def sleep(self) -> None:
            time.sleep(0.5)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        with core.serve_pipe(Slow, SlowImpl()) as p:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(type(error), match="mine") as caught:
                p.sleep()
            assert caught.value is error
            with pytest.raises(core.ConnectionLostError, match=f"interrupted by {type(error).__name__}"):
                p.sleep()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_exception_that_another_thread_sets_is_the_callers() -> None:
    import ctypes

    class Stop(Exception):
        pass

    class Slow(Protocol):
        def sleep(self, log: int) -> None: ...

    class SlowImpl:
        def sleep(self, log: int, ctx: Any) -> None:
            for _ in range(100):
                ctx.client_log(core.Level.INFO, "on")
                time.sleep(0.01)

    caller = threading.get_ident()

    def arm(message: object) -> None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller), ctypes.py_object(Stop))

    client, server = core.make_unix_pair()
    thread = threading.Thread(target=core.RpcServer(Slow, SlowImpl()).serve, args=(server,), daemon=True)
    thread.start()
    timer = threading.Timer(0.1, arm, [None])
    timer.start()
    with core.RpcConnection(Slow, client) as p:
        with pytest.raises(Stop):
            p.sleep(1)
        with pytest.raises(core.ConnectionLostError, match="interrupted by Stop"):
            p.sleep(1)
    thread.join(10)
    server.close()
