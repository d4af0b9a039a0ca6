"""The launcher: one worker per command, whatever it prints, however it fails."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

tool: Any = getattr(core, "_extras_load")("tools.launch", "the launch command")  # noqa: B009
LaunchConfig = tool.LaunchConfig

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
from __future__ import annotations
import importlib, os, sys, threading
from typing import Protocol

core = importlib.import_module(os.environ["CORE_OF_THE_TEST"])
with open(os.environ["STARTS_OF_THE_TEST"], "a") as starts:
    starts.write(f"{os.getpid()}\\n")

class Service(Protocol):
    def pid(self) -> int: ...
    def argv(self) -> list[str]: ...
    def write(self, size: int) -> int: ...
    def leave(self) -> None: ...

class Impl:
    def pid(self) -> int:
        return os.getpid()
    def argv(self) -> list[str]:
        return sys.argv[1:]
    def write(self, size: int) -> int:
        return sum(os.write(1, b"x" * 1000 + b"\\n") for _ in range(size // 1001))
    def leave(self) -> None:
        threading.Timer(0.05, os._exit, [0]).start()

print("hello", flush=True)
print("UNIX", flush=True)
core.run_server(Service, Impl())
"""


class Service(Protocol):
    def pid(self) -> int: ...
    def argv(self) -> list[str]: ...
    def write(self, size: int) -> int: ...
    def leave(self) -> None: ...


class Box:
    """A script, a state directory, and the process ids of what was started."""

    def __init__(self, tmp_path: Path, short: Path) -> None:
        self.short = short  # the path of a socket has at most 103 bytes
        self.state = short / "s"
        self.starts = tmp_path / "starts"
        self.script = tmp_path / "worker.py"
        self.script.write_text(WORKER, encoding="utf-8")

    def config(self, *flags: str, **options: Any) -> Any:
        return LaunchConfig((sys.executable, str(self.script), *flags), state_dir=str(self.state), **options)

    def command(self) -> list[str]:
        """What launches the worker from another process."""
        load = f"import sys, {core.__name__} as core; tool = core._extras_load('tools.launch', 'x')"
        code = f"{load}; sys.exit(tool.main(sys.argv[1:]))"
        return [sys.executable, "-c", code, "--state-dir", str(self.state), "--", sys.executable, str(self.script)]

    def code(self, text: str, **options: Any) -> Any:
        text = f"import os, sys, time\nprint(os.getpid(), file=open({str(self.starts)!r}, 'a'), flush=True)\n{text}"
        self.script.write_text(text, encoding="utf-8")
        return self.config(**options)

    def pids(self) -> list[int]:
        return [int(line) for line in self.starts.read_text().split()] if self.starts.exists() else []

    def pid(self, path: str) -> int:
        with core.unix_connect(Service, path, timeout=20) as proxy:
            return int(proxy.pid())


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_gone(pid: int) -> None:
    end = time.monotonic() + 20
    while exists(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    short = Path(os.path.realpath(tempfile.mkdtemp(prefix="launch-", dir="/tmp")))
    made = Box(tmp_path, short)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    monkeypatch.setenv("CORE_OF_THE_TEST", core.__name__)
    monkeypatch.setenv("STARTS_OF_THE_TEST", str(made.starts))
    yield made
    for pid in made.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(short)


# ---- names and places


def test_hash_is_the_one_of_every_language(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("VGI_RPC_")]:
        monkeypatch.delenv(name)
    assert tool.compute_hash(["a", "b"], "/x") == "d39daaa9356745f8"
    assert tool.compute_hash(iter(("a", "b")), cwd="/x") == "d39daaa9356745f8"
    monkeypatch.setenv("VGI_RPC_X", "1")
    assert tool.compute_hash(["a", "b"], "/x") == "1ef1db1753d8159d"
    assert tool.compute_hash(["a"]) == tool.compute_hash(["a"], os.getcwd())


def test_default_state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert tool.default_state_dir() == tmp_path / "vgi-rpc"
    assert stat.S_IMODE(os.stat(tmp_path / "vgi-rpc").st_mode) == 0o700
    os.chmod(tmp_path / "vgi-rpc", 0o755)
    tool.default_state_dir()
    assert stat.S_IMODE(os.stat(tmp_path / "vgi-rpc").st_mode) == 0o700
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert tool.default_state_dir() == tmp_path / f"vgi-rpc-{os.geteuid()}"
    monkeypatch.setattr(os, "geteuid", lambda: 123_456)
    (tmp_path / "vgi-rpc-123456").mkdir()
    with pytest.raises(RuntimeError, match="belongs to user"):
        tool.default_state_dir()


def test_state_dir_must_be_safe(box: Box) -> None:
    box.state.mkdir()
    os.chmod(box.state, 0o777)
    with pytest.raises(RuntimeError, match="writable by others"):
        tool.launch(box.config())
    box.state.rmdir()
    box.state.write_text("")
    with pytest.raises(RuntimeError, match="not a directory"):
        tool.launch(box.config())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  a  b ", ["a", "b"]),
        (r'"C:\Program Files\x.exe" -c', [r"C:\Program Files\x.exe", "-c"]),
        (r'a\b c\\"d e"', [r"a\b", "c\\d e"]),
        (r'a\"b ""', ['a"b', ""]),
        (r'"a\\" b\\', ["a\\", "b\\\\"]),
        ('"open quote', ["open quote"]),
        (r"it's \' ok", ["it's", r"\'", "ok"]),
    ],
)
def test_split_command_of_windows(text: str, words: list[str]) -> None:
    assert tool.split_command(text, platform="win32") == words


def test_split_command() -> None:
    assert tool.split_command("a 'b c' d\\ e", platform="linux") == ["a", "b c", "d e"]
    assert tool.split_command("a 'b c'") == ["a", "b c"]
    with pytest.raises(ValueError, match="quot"):
        tool.split_command("'a", platform="linux")


# ---- launching


def test_one_worker_for_two_launches(box: Box) -> None:
    path = tool.launch(box.config(idle_timeout=120))
    pid = box.pid(path)
    assert tool.launch(box.config()) == path
    assert box.pid(path) == pid
    hash_id = tool.compute_hash(box.config().worker_argv)
    assert path == str(box.state / f"{hash_id}.sock")
    assert stat.S_IMODE(os.stat(box.state).st_mode) == 0o700
    meta = json.loads((box.state / f"{hash_id}.meta").read_text())
    assert meta.pop("started_at") == pytest.approx(time.time(), abs=60)
    assert meta == {
        "cmd": [sys.executable, str(box.script)],
        "cwd": os.getcwd(),
        "socket": path,
        "launcher_pid": os.getpid(),
    }
    with core.unix_connect(Service, path, timeout=20) as proxy:
        assert proxy.argv() == ["--unix", path, "--idle-timeout", "120"]
    assert tool.launch(box.config("--describe")) != path
    assert len(box.pids()) == 2


def test_concurrent_launches_start_one_worker(box: Box) -> None:
    command = box.command()
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(tool.launch, [box.config()] * 4))
    texts = [other.communicate(timeout=60)[0] for other in others]
    assert [other.returncode for other in others] == [0, 0]
    assert set(texts) == {f"UNIX:{paths[0]}\n"}
    assert len(set(paths)) == 1
    assert len(box.pids()) == 1


def test_stale_socket_is_replaced(box: Box) -> None:
    path = tool.launch(box.config())
    first = box.pid(path)
    os.kill(first, signal.SIGKILL)
    wait_gone(first)  # not even a zombie
    assert os.path.exists(path)
    assert tool.launch(box.config()) == path
    assert box.pid(path) != first


def test_full_backlog_is_alive(box: Box) -> None:
    path = str(box.short / "full.sock")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(0)
        for _ in range(8):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                sock.connect(path)
        assert tool.launch(box.config(socket_path=path)) == path
    assert box.pids() == []


def test_other_socket_path(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(box.short)
    path = tool.launch(box.config(socket_path="own.sock"))
    assert path == str(box.short / "own.sock")
    assert [row.socket for row in tool.status_rows(box.state)] == [path]
    pid = box.pid(path)
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert len(tool.gc_state_dir(box.state).cleaned) == 1
    assert not os.path.exists(path)


def test_stdout_is_read_without_the_launcher(box: Box) -> None:
    ran = subprocess.run(box.command(), capture_output=True, text=True, timeout=60, check=True)
    path = ran.stdout.removeprefix("UNIX:").rstrip("\n")
    with core.unix_connect(Service, path, timeout=30) as proxy:
        assert proxy.write(1_000_000) > 990_000
        pid = proxy.pid()
    assert tool.launch(box.config()) == path
    assert box.pid(path) == pid


def test_stdout_is_read_without_cat(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with tool.resolve_and_connect(Service, box.config(), timeout=30) as proxy:
        assert proxy.write(500_000) > 490_000


def test_stderr_is_appended(box: Box, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with pytest.raises(RuntimeError, match=f"exited with status 3 before it was ready.*its stderr is in {log}"):
        tool.launch(box.code("print('why', file=sys.stderr); sys.exit(3)", worker_stderr=str(log)))
    assert log.read_text() == "before\nwhy\n"


# ---- workers that fail


def within(seconds: float, config: Any, match: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=match):
        tool.launch(config)
    assert time.monotonic() - start < seconds


def test_silent_worker_does_not_outlast_the_deadline(box: Box) -> None:
    within(10, box.code("time.sleep(60)", worker_startup_timeout=1), r"did not print UNIX:\S+ within 1 s")
    (pid,) = box.pids()
    assert not exists(pid)


def test_babbling_worker_does_not_outlast_the_deadline(box: Box) -> None:
    code = "while True:\n    print('x' * 1000, end='')\n    time.sleep(0.001)"
    within(10, box.code(code, worker_startup_timeout=1), "within 1 s")
    assert [exists(pid) for pid in box.pids()] == [False]


def test_stubborn_worker_and_its_child_are_killed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "_TERM_GRACE", 0.2)
    code = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nif (child := os.fork()):\n"
    code += f"    print(child, file=open({str(box.starts)!r}, 'a'), flush=True)\ntime.sleep(60)"
    within(20, box.code(code, worker_startup_timeout=1.5), "within 1.5 s")
    pids = box.pids()
    assert len(pids) == 2
    for pid in pids:
        wait_gone(pid)


def test_early_exit(box: Box) -> None:
    within(20, box.code("sys.exit(3)"), "exited with status 3 before it was ready.*--worker-stderr")
    code = "if os.fork(): os._exit(4)\ntime.sleep(60)"
    within(20, box.code(code), "exited with status 4")
    within(20, box.code("os.close(1)\ntime.sleep(60)"), "closed its stdout")
    assert [exists(pid) for pid in box.pids()] == [False] * 3


def test_wrong_path(box: Box) -> None:
    within(20, box.code("print('UNIX:/elsewhere', flush=True)\ntime.sleep(60)"), "listens on /elsewhere, not on")
    assert [exists(pid) for pid in box.pids()] == [False]


def test_command_that_does_not_exist(box: Box) -> None:
    with pytest.raises(FileNotFoundError):
        tool.launch(LaunchConfig(("/nonexistent/command",), state_dir=str(box.state)))


def test_bad_configurations(box: Box, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="non-empty"):
        tool.launch(LaunchConfig(()))
    with pytest.raises(ValueError, match="idle_timeout"):
        tool.launch(box.config(idle_timeout=-1))
    with pytest.raises(ValueError, match="worker_startup_timeout"):
        tool.launch(box.config(worker_startup_timeout=float("nan")))
    with pytest.raises(RuntimeError, match="longer than"):
        tool.launch(box.config(socket_path="/tmp/" + "x" * 120))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(RuntimeError, match="refusing to replace pre-existing non-socket path"):
        tool.launch(box.config(socket_path=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "precious"


def test_lock_that_is_held(box: Box) -> None:
    box.state.mkdir(mode=0o700)
    hash_id = tool.compute_hash(box.config().worker_argv)
    with tool._locked(box.state / f"{hash_id}.lock", 1):
        with pytest.raises(RuntimeError, match=r"another launcher has held .* for 0.1 s"):
            tool.launch(box.config(connect_timeout=0.1))
        assert tool.gc_state_dir(box.state) == tool.GcResult([], [hash_id])
    assert box.pids() == []


# ---- connecting


def test_resolve_and_connect(box: Box) -> None:
    with tool.resolve_and_connect(Service, box.config(), timeout=20) as proxy:
        pid = proxy.pid()
    with tool.resolve_and_connect(Service, box.config(), timeout=20) as proxy:
        assert proxy.pid() == pid


@pytest.mark.parametrize("unlinked", [True, False])
def test_worker_that_dies_before_connecting(box: Box, monkeypatch: pytest.MonkeyPatch, unlinked: bool) -> None:
    launch = tool.launch
    launched: list[int] = []

    def launch_and_kill(config: Any) -> str:
        path = str(launch(config))
        launched.append(box.pid(path))
        if len(launched) == 1:
            os.kill(launched[0], signal.SIGKILL)
            wait_gone(launched[0])
            if unlinked:
                os.unlink(path)
        return path

    monkeypatch.setattr(tool, "launch", launch_and_kill)
    with tool.resolve_and_connect(Service, box.config(), timeout=20) as proxy:
        assert proxy.pid() == launched[1]
    assert len(launched) == 2


def test_relaunch_is_not_repeated(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def launch(config: Any) -> str:
        calls.append(config)
        return "/nonexistent/socket"

    monkeypatch.setattr(tool, "launch", launch)
    with pytest.raises(FileNotFoundError), tool.resolve_and_connect(Service, box.config()):
        pass
    assert len(calls) == 2


# ---- the command line


def test_command_line(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    state = ["--state-dir", str(box.state)]
    assert tool.main([*state, "--status"]) == 0
    assert capsys.readouterr().out == f"(no workers tracked in {box.state})\n"
    assert tool.main([*state, "--gc"]) == 0
    printed = capsys.readouterr().out
    assert printed == "(nothing to clean)\n" or printed.startswith("removed ")  # of another test that kills
    assert not box.state.exists()
    command = [sys.executable, str(box.script)]
    assert tool.main([*state, "--idle-timeout", "90", "--", *command]) == 0
    out = capsys.readouterr().out
    hash_id = tool.compute_hash(command)
    assert out == f"UNIX:{box.state}/{hash_id}.sock\n"
    assert tool.main([*state, *command]) == 0  # argparse of the caller may have taken the dashes
    assert capsys.readouterr().out == out
    assert tool.main([*state, "--status"]) == 0
    assert capsys.readouterr().out == f"{hash_id}  alive  started 0.0m ago  {shlex.join(command)}\n"
    assert tool.main([*state, "--gc"]) == 0
    assert capsys.readouterr().out == f"skipped 1 in use: {hash_id}\n"
    pid = box.pid(out[5:-1])
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert tool.main([*state, "--status"]) == 0
    assert f"{hash_id}  dead  started " in capsys.readouterr().out
    assert tool.main([*state, "--gc"]) == 0
    assert capsys.readouterr().out == f"cleaned 1: {hash_id}\n"
    assert list(box.state.iterdir()) == []


def test_command_line_failures(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--status", "--gc"]) == 2
    assert "--status and --gc" in capsys.readouterr().err
    assert tool.main([]) == 2
    assert capsys.readouterr().err.startswith("vgi-rpc launch: missing command")
    assert tool.main(["--idle-timeout", "x"]) == 2
    assert tool.main(["--help"]) == 0
    capsys.readouterr()
    assert tool.main(["--state-dir", str(box.state), "--", "/nonexistent/command"]) == 1
    assert capsys.readouterr().err.startswith("vgi-rpc launch: [Errno 2]")


def test_gc_keeps_to_its_limits(tmp_path: Path) -> None:
    ids = [f"{number:016x}" for number in range(4)]
    for hash_id in ids:
        (tmp_path / f"{hash_id}.meta").write_text("no json")
    (tmp_path / f"{ids[3]}.sock").write_text("not a socket")
    (tmp_path / "other.meta").write_text("")
    assert [(row.hash_id, row.cmd, row.started_at) for row in tool.status_rows(tmp_path)] == [
        (hash_id, [], None) for hash_id in ids
    ]
    assert tool.gc_state_dir(tmp_path, limit=1, exclude_hash=ids[0]).cleaned == [ids[1]]
    assert tool.gc_state_dir(tmp_path) == tool.GcResult([ids[0], ids[2]], [ids[3]])
    assert (tmp_path / "other.meta").exists()


def test_idle_worker_ends_and_leaves_nothing(box: Box) -> None:
    with tool.resolve_and_connect(Service, box.config(idle_timeout=0.5), timeout=20) as proxy:
        pid = proxy.pid()
    wait_gone(pid)
    end = time.monotonic() + 20
    while any(thread.name == "vgi-rpc-launch-reaper" for thread in threading.enumerate()):
        assert time.monotonic() < end  # the reader of its stdout has ended with it
        time.sleep(0.01)


def test_names_of_the_module() -> None:
    module = importlib.import_module(tool.__name__)
    assert sorted(module.__all__) == list(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


OTHER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
owner = os.geteuid()
if sys.argv[2] == "file":
    os.setuid(65534)
listener.bind(sys.argv[1])
if sys.argv[2] == "listener":
    os.setuid(65534)
listener.listen(5)  # the kernel notes who listens now
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
@pytest.mark.parametrize("whose", ["file", "listener"])
def test_a_listener_of_another_user_is_none_of_ours(whose: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        path = f"{folder}/calc.sock"
        other = subprocess.Popen(
            [sys.executable, "-c", OTHER, path, whose], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert other.stdin is not None and other.stdout is not None
        try:
            assert other.stdout.readline() == b"up\n"
            with pytest.raises(RuntimeError, match="is that of user 65534, not of 0"):
                tool._alive(path, ())
        finally:
            other.communicate()


def test_a_socket_that_is_not_ours_by_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()
        assert tool._alive(f"{folder}/s", ())
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(RuntimeError, match="folder of your own"):
            tool._alive(f"{folder}/s", ())
