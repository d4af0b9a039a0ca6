# Needs: the standard library only, and `fcntl`. Seam: the files `<id>.lock/.sock/.meta` of wire.md section 13.1.
"""One shared worker per command, found or started (wire.md section 13.1, runtime.md section 13 item 10).

    with resolve_and_connect(Calculator, LaunchConfig(("python", "calc.py"))) as calc:
        calc.add(1, 2)

    vgi-rpc launch -- python calc.py        # prints UNIX:<path>

Launchers of the same command, directory and VGI_RPC_* environment, in whatever language, agree on a lock file and a
socket. The worker outlives whoever started it, and ends by its own idle timeout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import selectors
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import core as _bound_core

if TYPE_CHECKING:
    from typing_extensions import TypeForm

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "GcResult",
    "LaunchConfig",
    "StatusRow",
    "compute_hash",
    "default_state_dir",
    "gc_shared_memory",
    "gc_state_dir",
    "launch",
    "main",
    "resolve_and_connect",
    "split_command",
    "status_rows",
]

_P = TypeVar("_P")
_LOGGER = logging.getLogger("vgi_rpc.launcher")

_PROBE_TIMEOUT = 2.0
_REPROBE_AFTER = (0.05, 0.1, 0.2)  # a full backlog refuses on some systems
_TERM_GRACE = 2.0
_MAX_LINE = 65_536
_MAX_PATH = 103 if sys.platform == "darwin" else 107  # of a Unix socket, in bytes
_FILES = re.compile(r"([0-9a-f]{16})\.(lock|sock|meta)")
_SEGMENT = re.compile(r"vgi_rpc_([1-9][0-9]*)_[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """What to run, and how long to wait for it.

    Args:
        worker_argv: the command; `--unix PATH --idle-timeout S` is added.
        socket_path: instead of `<id>.sock` in the state directory.
        idle_timeout: seconds without clients after which the worker ends; 0 never.
        connect_timeout: seconds to wait for another launcher of the same worker.
        worker_startup_timeout: seconds until the worker must have said that it is ready.
        worker_stderr: file to which the worker's stderr is appended; discarded by default.
        state_dir: instead of `default_state_dir()`.
    """

    worker_argv: tuple[str, ...]
    socket_path: str | None = None
    idle_timeout: float = 300.0
    connect_timeout: float = 30.0
    worker_startup_timeout: float = 60.0
    worker_stderr: str | None = None
    state_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class GcResult:
    """The ids whose files were removed, and those of running workers or launchers."""

    cleaned: list[str]
    skipped_in_use: list[str]


@dataclasses.dataclass(frozen=True)
class StatusRow:
    """One worker of a state directory; `cmd`, `cwd` and `started_at` are empty if nothing was recorded."""

    hash_id: str
    cmd: list[str]
    cwd: str
    socket: str
    started_at: float | None
    alive: bool


# ---- names and places


def compute_hash(worker_argv: Iterable[str], cwd: str | None = None) -> str:
    """The id of a worker: 16 hex digits over the command, the directory and the VGI_RPC_* environment."""
    env = {name: value for name, value in os.environ.items() if name.startswith("VGI_RPC_")}
    what = {"cmd": list(worker_argv), "cwd": os.getcwd() if cwd is None else cwd, "env": env}
    text = json.dumps(what, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def default_state_dir() -> Path:
    """`$XDG_RUNTIME_DIR/vgi-rpc`, else `<tmp>/vgi-rpc-<euid>`; made if missing, mode 0700.

    Raises RuntimeError if it belongs to someone else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime, "vgi-rpc") if runtime else Path(tempfile.gettempdir(), f"vgi-rpc-{os.geteuid()}")
    if _own_dir(path) & 0o077:
        os.chmod(path, 0o700)
    return path


def _state_dir(given: str | None) -> Path:
    if given is None:
        return default_state_dir()
    path = Path(os.path.abspath(given))
    if _own_dir(path) & 0o022:  # not narrowed: it may be any directory of the user
        raise RuntimeError(f"state directory {path} is writable by others: chmod 700, or name another one")
    return path


def _own_dir(path: Path) -> int:
    """Make the directory unless it is there, and return its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise RuntimeError(f"state directory {path} is not a directory")
    if found.st_uid != os.geteuid():
        raise RuntimeError(f"state directory {path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    return found.st_mode


def split_command(cmd: str, *, platform: str | None = None) -> list[str]:
    """Split a command line as a POSIX shell would, or as Windows programs do when `platform` is "win32".

    `platform` is `sys.platform` by default. Raises ValueError for an open quote (POSIX).
    """
    if (platform or sys.platform) not in ("win32", "windows", "nt"):
        return shlex.split(cmd)
    return _split_windows(cmd)


def _split_windows(cmd: str) -> list[str]:
    """Backslashes are ordinary, except before a quote: there two are one, and an odd one makes the quote ordinary."""
    words: list[str] = []
    word: str | None = None
    quoted = False
    for slashes, char in re.findall(r"(\\*)(\Z|[^\\])", cmd, re.DOTALL):
        if slashes:
            word = (word or "") + (slashes[: len(slashes) // 2] if char == '"' else slashes)
        if char == '"' and len(slashes) % 2 == 0:
            quoted = not quoted
            word = word or ""
        elif char in (" ", "\t", "\n", "") and not quoted:
            if word is not None:
                words.append(word)
            word = None
        else:
            word = (word or "") + char
    if word is not None:
        words.append(word)
    return words


# ---- finding or starting a worker


def launch(config: LaunchConfig) -> str:
    """Return the socket path of the running worker for this command, starting one if there is none.

    Raises:
        ValueError: no command, or a negative time.
        OSError: the command cannot be executed.
        RuntimeError: another launcher holds the lock for too long, the socket's path is taken by something else, or
            the worker ends, is not ready in time or listens elsewhere. It has been ended then.
    """
    _check(config)
    state = _state_dir(config.state_dir)
    hash_id = compute_hash(config.worker_argv)
    path = os.path.abspath(config.socket_path or state / f"{hash_id}.sock")
    if len(os.fsencode(path)) > _MAX_PATH:
        raise RuntimeError(f"socket path is longer than {_MAX_PATH} bytes: {path}; choose a shorter state directory")
    with _locked(state / f"{hash_id}.lock", config.connect_timeout):
        if _alive(path):
            _LOGGER.debug("found worker %s on %s", hash_id, path)
            return path
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        pid = _start(config, path)
        _LOGGER.info("started worker %s on %s, pid %d", hash_id, path, pid)
        _write_meta(state / f"{hash_id}.meta", config, path)
    return path


@contextlib.contextmanager
def resolve_and_connect(
    protocol: TypeForm[_P],
    config: LaunchConfig,
    *,
    on_log: Callable[[core.Message], None] | None = None,
    ipc_validation: core.IpcValidation = core.IpcValidation.FULL,
    timeout: float | None = None,
) -> Iterator[_P]:
    """Launch, connect and yield the proxy; other arguments as in `unix_connect`.

    A worker may end between being found and being connected to: it is launched once more then.
    """

    def connect() -> contextlib.AbstractContextManager[_P]:
        return core.unix_connect(protocol, path, on_log=on_log, ipc_validation=ipc_validation, timeout=timeout)

    with contextlib.ExitStack() as stack:
        path = launch(config)
        try:
            proxy = stack.enter_context(connect())
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
            path = launch(config)
            proxy = stack.enter_context(connect())
        yield proxy


def _check(config: LaunchConfig) -> None:
    if isinstance(config.worker_argv, str) or not config.worker_argv:
        raise ValueError(f"worker_argv must be a non-empty sequence of words, got {config.worker_argv!r}")
    for name in ("idle_timeout", "connect_timeout", "worker_startup_timeout"):
        value = getattr(config, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of seconds, got {value}")


def _alive(path: str, reprobe: Sequence[float] = _REPROBE_AFTER) -> bool:
    """Whether somebody listens there. RuntimeError if that cannot be found out, it is no socket, or another user's."""
    waits = iter(reprobe)
    while True:
        try:
            found = os.stat(path)
            if not stat.S_ISSOCK(found.st_mode):
                raise RuntimeError(f"refusing to replace pre-existing non-socket path: {path}")
            _check_owner(path, found.st_uid)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(_PROBE_TIMEOUT)
                sock.connect(path)
                _check_owner(path, _peer_of(sock, found.st_uid))
            return True
        except (BlockingIOError, TimeoutError):  # nobody accepts at the moment, but somebody listens
            return True
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            wait = next(waits, None)
            if wait is None:
                return False
            time.sleep(wait)
        except OSError as exc:
            raise RuntimeError(f"cannot find out who listens on {path}: {exc}") from exc


def _check_owner(path: str, uid: int) -> None:
    """A worker gets what its callers have: one of another user, in a folder that both may write to, is none of ours."""
    if uid != os.geteuid():
        raise RuntimeError(
            f"the socket {path} is that of user {uid}, not of {os.geteuid()}: choose a path in a folder of your own"
        )


def _peer_of(sock: socket.socket, unknown: int) -> int:
    """The user who listens; `unknown` where the system does not say."""
    if not hasattr(socket, "SO_PEERCRED"):
        return unknown
    size = struct.calcsize("3i")
    return int(struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[1])


def _start(config: LaunchConfig, path: str) -> int:
    """Start the worker and wait until it is ready; ended again if that fails. Returns its process id."""
    idle = int(config.idle_timeout) if config.idle_timeout == int(config.idle_timeout) else config.idle_timeout
    argv = [*config.worker_argv, "--unix", path, "--idle-timeout", str(idle)]
    with contextlib.ExitStack() as stack:
        stderr: Any = subprocess.DEVNULL
        if config.worker_stderr is not None:
            stderr = stack.enter_context(open(config.worker_stderr, "ab"))
        # A session of its own: Ctrl-C of the launcher's terminal is not meant for it.
        worker = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
        )
        assert worker.stdout is not None
        stack.enter_context(worker.stdout)
        try:
            _await_ready(worker, path, config)
            drain = _drain(worker.stdout.fileno())
        except BaseException:
            _end(worker)
            raise
    threading.Thread(target=_reap, args=(worker, drain), name="vgi-rpc-launch-reaper", daemon=True).start()
    return worker.pid


def _await_ready(worker: subprocess.Popen[bytes], path: str, config: LaunchConfig) -> None:
    """Read lines until `UNIX:<path>`. Never blocks in a read: a silent worker must not outlast the deadline."""
    assert worker.stdout is not None
    command = shlex.join(config.worker_argv)
    deadline = time.monotonic() + config.worker_startup_timeout
    wanted = b"UNIX:" + os.fsencode(path)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(min(left, 0.2)):
                data = os.read(worker.stdout.fileno(), _MAX_LINE)
                if not data:
                    raise RuntimeError(_ended(worker, command, config))
                *lines, rest = (rest + data).split(b"\n")
                rest = rest[-_MAX_LINE:]  # still no readiness line, and remembered no longer than one
                for line in lines:
                    if line.rstrip() == wanted:
                        return
                    if line.startswith(b"UNIX:"):
                        other = os.fsdecode(line.rstrip()[5:])
                        raise RuntimeError(f"worker listens on {other}, not on {path}: {command}")
            elif worker.poll() is not None:  # and a child of it keeps the pipe open
                raise RuntimeError(_ended(worker, command, config))
    raise RuntimeError(
        f"worker did not print UNIX:{path} within {config.worker_startup_timeout:g} s: {command}{_advice(config)}"
    )


def _ended(worker: subprocess.Popen[bytes], command: str, config: LaunchConfig) -> str:
    try:
        status = f"exited with status {worker.wait(1.0)}"
    except subprocess.TimeoutExpired:
        status = "closed its stdout"
    return f"worker {status} before it was ready: {command}{_advice(config)}"


def _advice(config: LaunchConfig) -> str:
    if config.worker_stderr is None:
        return " (its stderr was discarded: worker_stderr / --worker-stderr FILE keeps it)"
    return f" (its stderr is in {config.worker_stderr})"


def _drain(fd: int) -> subprocess.Popen[bytes]:
    """Start a process that reads the worker's stdout until the worker closes it.

    A worker that prints must neither block on a full pipe nor die of a broken one, after the launcher is gone as
    well. So the reading end is handed to a `cat >/dev/null`, which ends with the worker. A file instead of the pipe
    would do without a process, but grow for as long as the worker prints.
    """
    read_all = [sys.executable, "-I", "-S", "-c", "import os\nwhile os.read(0, 65536): pass"]
    for argv in (["cat"], read_all):  # a minimal container may have no cat
        with contextlib.suppress(FileNotFoundError):
            return subprocess.Popen(
                argv, stdin=fd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/", start_new_session=True
            )
    raise RuntimeError("cannot start a process that reads the worker's stdout: neither cat nor Python is there")


def _reap(*processes: subprocess.Popen[bytes]) -> None:
    """Leave no zombies behind while this process lives; it need not live."""
    for process in processes:
        process.wait()


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and what it has started: the command may be a wrapper."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(_TERM_GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


# ---- lock and record


@contextlib.contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    deadline = time.monotonic() + timeout
    while (fd := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise RuntimeError(f"another launcher has held {path} for {timeout:g} s")
        time.sleep(0.02)
    with _held(fd):
        yield


@contextlib.contextmanager
def _held(fd: int) -> Iterator[None]:
    import fcntl

    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough if a fork has a copy
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    import fcntl

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.stat(path)):  # else it was removed meanwhile, and guards nothing
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _write_meta(path: Path, config: LaunchConfig, socket_path: str) -> None:
    meta = {
        "cmd": list(config.worker_argv),
        "cwd": os.getcwd(),
        "socket": socket_path,
        "started_at": time.time(),
        "launcher_pid": os.getpid(),
    }
    new = path.with_suffix(".meta.new")
    new.write_text(json.dumps(meta), encoding="utf-8")
    os.replace(new, path)


# ---- looking at a state directory


def status_rows(state_dir: Path) -> list[StatusRow]:
    """The workers that were started with this state directory, ordered by id."""
    rows = []
    for hash_id in _ids(state_dir, ("meta", "sock")):
        row = _read_meta(state_dir, hash_id)
        try:
            alive = _alive(row.socket, ())
        except RuntimeError:
            alive = False
        rows.append(dataclasses.replace(row, alive=alive))
    return rows


def gc_state_dir(state_dir: Path, *, limit: int | None = None, exclude_hash: str | None = None) -> GcResult:
    """Remove the files of workers that are gone, of at most `limit` of them, and leave `exclude_hash` alone."""
    result = GcResult([], [])
    for hash_id in _ids(state_dir, ("lock", "sock", "meta")):
        if limit is not None and len(result.cleaned) >= limit:
            break
        if hash_id != exclude_hash:
            (result.cleaned if _clean(state_dir, hash_id) else result.skipped_in_use).append(hash_id)
    return result


def gc_shared_memory(folder: Path = Path("/dev/shm")) -> list[str]:
    """Remove the shared memory segments whose owner is dead; return their names. Only a killed process leaves any."""
    found = []
    for path in sorted(folder.glob("vgi_rpc_*")):
        match = _SEGMENT.fullmatch(path.name)
        if match is None or _lives(int(match[1])):
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            path.unlink()
            found.append(path.name)
    return found


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _clean(state_dir: Path, hash_id: str) -> bool:
    lock = state_dir / f"{hash_id}.lock"
    fd = _try_lock(lock)
    if fd is None:
        return False
    with _held(fd):
        path = _read_meta(state_dir, hash_id).socket
        own = str(state_dir / f"{hash_id}.sock")
        try:
            if any(_alive(place) for place in {path, own}):
                return False
        except RuntimeError:  # not a socket, or not ours
            return False
        for place in (path, own, state_dir / f"{hash_id}.meta", state_dir / f"{hash_id}.meta.new", lock):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(place)
    _LOGGER.debug("removed the files of %s", hash_id)
    return True


def _ids(state_dir: Path, kinds: Sequence[str]) -> list[str]:
    try:
        names = os.listdir(state_dir)
    except FileNotFoundError:
        return []
    found = (_FILES.fullmatch(name) for name in names)
    return sorted({match[1] for match in found if match and match[2] in kinds})


def _read_meta(state_dir: Path, hash_id: str) -> StatusRow:
    meta: Any = None
    with contextlib.suppress(OSError, ValueError):
        meta = json.loads((state_dir / f"{hash_id}.meta").read_text(encoding="utf-8"))
    if not isinstance(meta, dict):
        meta = {}
    cmd, cwd, place, started = (meta.get(name) for name in ("cmd", "cwd", "socket", "started_at"))
    return StatusRow(
        hash_id=hash_id,
        cmd=[str(word) for word in cmd] if isinstance(cmd, list) else [],
        cwd=cwd if isinstance(cwd, str) else "",
        socket=place if isinstance(place, str) and place else str(state_dir / f"{hash_id}.sock"),
        started_at=float(started) if isinstance(started, int | float) else None,
        alive=False,
    )


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """`vgi-rpc launch`: status 0, 1 with a line on stderr, or 2 for a misuse."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 2
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.status and options.gc:
        return _complain("--status and --gc exclude each other", 2)
    if not (command or options.status or options.gc):
        return _complain("missing command: vgi-rpc launch [options] -- CMD...", 2)
    try:
        if options.status or options.gc:
            state = Path(os.path.abspath(options.state_dir)) if options.state_dir else default_state_dir()
            (_print_status if options.status else _print_gc)(state)
        else:
            print(f"UNIX:{launch(_config(options, command))}", flush=True)
    except (RuntimeError, OSError, ValueError) as exc:
        return _complain(str(exc), 1)
    return 0


def _complain(text: str, status: int) -> int:
    print(f"vgi-rpc launch: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    default = LaunchConfig(())
    parser = argparse.ArgumentParser(
        prog="vgi-rpc launch", description="Start a shared worker, or find the running one.", allow_abbrev=False
    )

    def seconds(name: str, text: str) -> None:
        value = getattr(default, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, metavar="S", default=value, help=f"{text} (default {value:g})")

    parser.add_argument("--socket", metavar="PATH", help="where the worker listens, instead of the state directory")
    seconds("idle_timeout", "the worker ends after so long without clients; 0 never")
    seconds("connect_timeout", "how long to wait for another launcher of this worker")
    seconds("worker_startup_timeout", "how long the worker may take until it is ready")
    parser.add_argument("--worker-stderr", metavar="FILE", help="append the worker's stderr there")
    parser.add_argument("--state-dir", metavar="DIR", help="where locks and sockets are kept")
    parser.add_argument("--status", action="store_true", help="list the workers")
    parser.add_argument("--gc", action="store_true", help="remove what is left of workers that are gone")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- CMD ...", help="the worker's command")
    return parser


def _config(options: argparse.Namespace, command: list[str]) -> LaunchConfig:
    return LaunchConfig(
        worker_argv=tuple(command),
        socket_path=options.socket,
        idle_timeout=options.idle_timeout,
        connect_timeout=options.connect_timeout,
        worker_startup_timeout=options.worker_startup_timeout,
        worker_stderr=options.worker_stderr,
        state_dir=options.state_dir,
    )


def _print_status(state: Path) -> None:
    rows = status_rows(state)
    for row in rows:
        age = "?" if row.started_at is None else f"{max(0.0, time.time() - row.started_at) / 60:.1f}m ago"
        print(f"{row.hash_id}  {'alive' if row.alive else 'dead'}  started {age}  {shlex.join(row.cmd)}")
    if not rows:
        print(f"(no workers tracked in {state})")


def _print_gc(state: Path) -> None:
    result = gc_state_dir(state)
    if result.cleaned:
        print(f"cleaned {len(result.cleaned)}: {', '.join(result.cleaned)}")
    if result.skipped_in_use:
        print(f"skipped {len(result.skipped_in_use)} in use: {', '.join(result.skipped_in_use)}")
    segments = gc_shared_memory()
    if segments:
        print(f"removed {len(segments)} shared memory segments: {', '.join(segments)}")
    if not (result.cleaned or result.skipped_in_use or segments):
        print("(nothing to clean)")
