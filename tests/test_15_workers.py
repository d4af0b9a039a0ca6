"""Room 15: `--workers N`, several processes on one socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.test_15_workers import Impl, Svc
from tests.core import core
core.run_server(Svc, Impl())
"""


class Svc(Protocol):
    def pid(self) -> int: ...
    def add(self, a: float, b: float) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class Impl:
    def pid(self) -> int:
        return os.getpid()

    def add(self, a: float, b: float) -> float:
        return a + b

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class Family:
    """A parent with its workers, and what reaches them."""

    def __init__(self, process: subprocess.Popen[str], connect: Callable[[], Any]) -> None:
        self.process = process
        self.connect = connect

    def pids(self, wanted: int) -> set[int]:
        """Pids that answer, until there are `wanted` of them."""
        found: set[int] = set()
        end = time.monotonic() + 30
        while len(found) < wanted and time.monotonic() < end:
            with self.connect() as first, self.connect() as second:
                found |= {first.pid(), second.pid()}
        return found


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(root=str(ROOT)))
    return subprocess.Popen([sys.executable, str(path), *flags], stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["unix", "tcp"])
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Family]:
    unix = str(tmp_path / "s")
    where = ["--unix", unix] if request.param == "unix" else ["--tcp", "127.0.0.1:0"]
    process = start(tmp_path, *where, "--workers", "2", "--access-log", str(tmp_path / "log.{pid}"))
    assert process.stdout is not None
    line = process.stdout.readline().strip()

    def connect() -> Any:
        if request.param == "unix":
            return core.unix_connect(Svc, unix)
        return core.tcp_connect(Svc, "127.0.0.1", int(line.rpartition(":")[2]))

    yield Family(process, connect)
    process.terminate()
    process.wait(20)
    process.stdout.close()


def gone(pids: set[int]) -> bool:
    end = time.monotonic() + 15
    while time.monotonic() < end:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_two_processes_answer_and_the_dead_are_replaced(family: Family, tmp_path: Path) -> None:
    pids = family.pids(2)
    assert len(pids) == 2 and family.process.pid not in pids
    logged = [json.loads(line) for pid in pids for line in (tmp_path / f"log.{pid}").read_text().splitlines()]
    assert logged and {record["method"] for record in logged} == {"pid"}
    victim = pids.pop()
    os.kill(victim, signal.SIGKILL)
    assert gone({victim})
    again = family.pids(2)
    assert len(again) == 2 and victim not in again and pids <= again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(family: Family, number: signal.Signals, tmp_path: Path) -> None:
    pids = family.pids(2)
    family.process.send_signal(number)
    assert family.process.wait(20) == 128 + number
    assert gone(pids)
    assert not (tmp_path / "s").exists()


def test_sigterm_cuts_the_calls_of_a_socket(family: Family, tmp_path: Path) -> None:
    """Draining is for HTTP (DESIGN.md section 7): here callers are told at once that a call may have run."""
    ended: list[BaseException] = []

    def call(proxy: Any) -> None:
        try:
            proxy.sleep(30.0)
        except core.RpcError as exc:
            ended.append(exc)

    with family.connect() as busy, family.connect() as other:
        assert busy.add(1.0, 1.0) == other.add(1.0, 1.0) == 2.0
        threads = [threading.Thread(target=call, args=(proxy,)) for proxy in (busy, other)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        begun = time.monotonic()
        family.process.terminate()
        for thread in threads:
            thread.join(20)
        assert time.monotonic() - begun < 10
    assert [(type(exc), getattr(exc, "sent", None)) for exc in ended] == [(core.ConnectionLostError, "maybe")] * 2
    assert family.process.wait(20) == 128 + signal.SIGTERM


def test_sigterm_ends_a_single_process_which_removes_its_socket(tmp_path: Path) -> None:
    for _ in range(2):
        process = start(tmp_path, "--unix", str(tmp_path / "s"))
        assert process.stdout is not None and process.stdout.readline() == f"UNIX:{tmp_path / 's'}\n"
        with core.unix_connect(Svc, str(tmp_path / "s")) as proxy:
            assert proxy.add(1.0, 2.0) == 3.0
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
        process.stdout.close()
        assert not (tmp_path / "s").exists()


def test_workers_do_not_outlive_a_killed_parent(family: Family) -> None:
    pids = family.pids(2)
    family.process.kill()
    family.process.wait(20)
    assert gone(pids)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--workers", "2"], "--workers is about sockets"),
        (["--workers", "0", "--tcp", "0"], "--workers must be at least 1"),
        (["--workers", "2", "--tcp", "0", "--access-log", "x.log"], "needs {pid} in its path"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], text: str) -> None:
    with pytest.raises(SystemExit, match=text.replace("{", r"\{")):
        core._door_run(Svc, Impl(), flags)


def test_idle_workers_end_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unix = str(tmp_path / "s")
    process = start(tmp_path, "--unix", unix, "--workers", "2", "--idle-timeout", "0.2")
    assert process.stdout is not None
    process.stdout.readline()
    with (
        core.unix_connect(Svc, unix) as one,
        core.unix_connect(Svc, unix) as two,
        core.unix_connect(Svc, unix) as three,
    ):
        used = {one.pid(), two.pid(), three.pid()}
    assert gone(used)  # those that had a client; others wait for their first one
    process.terminate()
    process.stdout.close()
    assert process.wait(20) in (0, 128 + signal.SIGTERM, -signal.SIGTERM)  # it may have been on its way out


# ---- how a worker ends


LIFE = """
import sys
sys.path.insert(0, {root!r})
import time
from tests.test_15_workers import Svc, Impl
from tests.core import core
mode = sys.argv.pop(1)

class Stubborn(Impl):
    def sleep(self, seconds):
        open(__file__ + str(self.pid()), "x").close()
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                time.sleep(left)
            except BaseException:
                if mode != "deaf":
                    raise

if mode == "client":
    with core.connect(Svc, [sys.executable, __file__, "worker", *sys.argv[1:]]) as proxy:
        print(proxy.pid(), flush=True)
        proxy.sleep(60.0)
core.run_server(Svc, Stubborn())
"""


@pytest.fixture
def life(tmp_path: Path) -> str:
    path = tmp_path / "life.py"
    path.write_text(LIFE.format(root=str(ROOT)))
    return str(path)


def orphaned(life: str, *flags: str) -> int:
    """The pid of a worker whose caller has been killed while a method runs."""
    with subprocess.Popen([sys.executable, life, "client", *flags], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        worker = int(client.stdout.readline())
        asleep(life, worker)
        client.kill()
        client.wait(20)
    return worker


def asleep(life: str, worker: int) -> None:
    end = time.monotonic() + 20
    while not os.path.exists(f"{life}{worker}"):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_worker_whose_caller_has_died_ends_while_a_method_runs(life: str) -> None:
    kept = orphaned(life, "--orphan-grace", "-1")
    assert gone({orphaned(life, "--orphan-grace", "0.2")})
    os.kill(kept, 0)  # it was told to stay
    os.kill(kept, signal.SIGKILL)


def test_a_caller_that_has_only_ended_its_input_gets_its_answer(life: str) -> None:
    plan = core._WirePlan(core.rpc_methods(Svc)["sleep"], "Svc", None)
    request = b"".join(core._ipc_pieces(core._wire_request(plan, [0.7])))
    command = [sys.executable, life, "worker", "--orphan-grace", "0"]
    ran = subprocess.run(command, input=request, capture_output=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert core.read_reply(ran.stdout).num_columns == 0


def test_a_method_that_does_not_hear_ends_with_its_process(life: str) -> None:
    transport = core.SubprocessTransport([sys.executable, life, "deaf"])
    with core.RpcConnection(Svc, transport, timeout=30.0) as proxy:
        assert proxy.add(1.0, 2.0) == 3.0
        future = core.submit(proxy.sleep, 25.0)
        asleep(life, transport.proc.pid)
        transport.proc.send_signal(signal.SIGINT)
        with pytest.raises(core.WorkerDiedError, match="exited with status 130"):
            future.result(20)


def test_only_workers_are_waited_for() -> None:
    ours, theirs = (subprocess.Popen([sys.executable, "-c", f"raise SystemExit({n})"]) for n in (7, 3))
    family = core._DoorWorkers(2)
    family._born[ours.pid] = 0.0
    assert family._wait() == (ours.pid, 7)
    assert theirs.wait(20) == 3
    family._born = {theirs.pid: 0.0}
    assert family._wait() == (theirs.pid, None)  # somebody has been faster
    ours.wait(20)
    os.close(family._alive)
    os.close(family._parent)
