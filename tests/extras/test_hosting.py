"""The hosting chapter of the README, by its own words: nginx, systemd's sockets, the container; replicas under load."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("waitress")

from tests.extras.http_service import Read, request, until
from tests.extras.test_http_serve import SERVE, Held, Link, drain, process, until_open
from tests.test_readme import free_port, health, readme

ROOT = Path(__file__).resolve().parents[2]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
ANALYZE = shutil.which("systemd-analyze")
ACTIVATE = shutil.which("systemd-socket-activate")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
plain = pytest.mark.skipif(core.__name__ != "vgi_rpc", reason="the README shows the module under its own name")


class Calc(Protocol):
    """As in the README."""

    def add(self, a: float, b: float) -> float: ...


def files() -> dict[str, str]:
    """The files of the README: those of `conf` blocks, and the Python ones."""
    text = "".join(block.text for block in readme() if block.info == "conf")
    parts = re.split(r"^# ((?:[\w@-]+\.(?:conf|socket|service))|Dockerfile)\n", text, flags=re.MULTILINE)
    found = dict(zip(parts[1::2], parts[2::2], strict=True))
    for block in readme():
        if block.info == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)):
            found[name[1]] = block.text
    return found


def command_of(unit: str) -> list[str]:
    """The ExecStart of a unit, with this Python; systemd's quoting is that of the shell as far as it goes here."""
    found = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert found is not None
    program, *rest = shlex.split(found[1].replace("(", r"\(").replace(")", r"\)"))
    assert program.endswith("/bin/python")
    return [sys.executable, *rest]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("calc.py", "web.py", "worker.py"):
        (tmp_path / name).write_text(files()[name])
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


@contextlib.contextmanager
def running(argv: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process group, killed at the end."""
    with open(folder / "log", "ab") as log:
        options.setdefault("env", environment(folder))
        found = subprocess.Popen(argv, cwd=folder, stdout=log, stderr=log, start_new_session=True, **options)
    try:
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(found.pid, signal.SIGKILL)
        found.wait(10)


# ---- nginx


@contextlib.contextmanager
def nginx(folder: Path, one: int, two: int) -> Iterator[int]:
    assert NGINX is not None
    port = free_port()
    text = files()["nginx.conf"]
    for written, meant in (("listen 8000", f"listen 127.0.0.1:{port}"), (":8001", f":{one}"), (":8002", f":{two}")):
        assert written in text
        text = text.replace(written, meant)
    temporary = "".join(f"{name}_temp_path {folder}/{name}; " for name in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "conf").write_text(
        f"daemon off; pid {folder}/pid; worker_processes 1; events {{ worker_connections 64; }}\n"
        f"http {{ log_format upstream '$upstream_status'; access_log {folder}/access.log upstream;\n"
        f"client_body_temp_path {folder}/body; {temporary}\n{text}\n}}\n"
    )
    argv = [NGINX, "-p", str(folder), "-c", str(folder / "conf"), "-e", str(folder / "error.log")]
    with running(argv, folder) as found:
        until_open(port)
        yield port
        found.terminate()
        found.wait(10)


@needs_nginx
def test_nginx_asks_another_replica_when_one_goes_down(tmp_path: Path) -> None:
    add = request("add", a=1.0, b=2.0)
    with process("-c", SERVE, "waitress") as (first, one), process("-c", SERVE, "waitress") as (_, two):
        with nginx(tmp_path, one, two) as port, Link(one, 60) as slow, Link(port) as link:
            held = Held(slow, tmp_path)
            drain(first, one)
            for _ in range(6):
                assert Read(link.post("/Service/add", add)).result == 3.0
            assert Read(held.result()).result == "held"
            assert first.wait(10) == 0
            for _ in range(4):
                assert Read(link.post("/Service/add", add)).result == 3.0
        lines = (tmp_path / "access.log").read_text().split("\n")
        assert "503 : 200" in lines and "502, 200" in lines, lines


@needs_nginx
@plain
def test_replicas_are_restarted_under_load() -> None:
    script = ROOT / "tests" / "bench" / "replicas.py"
    argv = [sys.executable, str(script), "--json", "--clients", "2", "--seconds", "6"]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert (found["failed"], found["wrong"], found["errors"]) == (0, 0, [])
    assert found["restarts"] >= 1
    assert min(found["unary"], found["producer turns"], found["exchange turns"]) > 0


# ---- systemd


@pytest.mark.skipif(ANALYZE is None, reason="systemd is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    assert ANALYZE is not None
    (tmp_path / "env").write_text("")
    for name, text in files().items():
        if name.endswith((".socket", ".service")):
            text = text.replace("/srv/calc/bin/python", sys.executable).replace("/srv/calc", str(tmp_path))
            (tmp_path / name).write_text(text)
    units = [str(tmp_path / name) for name in ("calc.socket", "calc.service", "calc-raw.socket", "calc-raw@x.service")]
    (tmp_path / "calc-raw@x.service").write_text((tmp_path / "calc-raw@.service").read_text())
    ran = subprocess.run([ANALYZE, "verify", *units], capture_output=True, text=True, timeout=60)
    complaints = [line for line in ran.stderr.splitlines() if str(tmp_path) in line or "calc" in line]
    assert complaints == []


# What systemd does for a socket unit: the socket becomes descriptor 3, and two variables say so (sd_listen_fds(3)).
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def keep_calling(port: int, end: threading.Event, seen: Counter[str]) -> None:
    while not end.is_set():
        try:
            with core_http_connect(f"http://127.0.0.1:{port}") as calc:
                seen["right" if calc.add(1.0, 2.0) == 3.0 else "wrong"] += 1
        except Exception as exc:
            seen[f"{type(exc).__name__}: {exc}"] += 1


def right_of(counts: list[Counter[str]]) -> int:
    return sum(seen["right"] for seen in counts)


def core_http_connect(url: str) -> Any:
    connect: Any = getattr(core, "http_connect")  # noqa: B009 (a lazy name)
    return connect(Calc, url, timeout=60)


@plain
def test_a_restart_behind_a_socket_of_systemd_refuses_nobody(folder: Path) -> None:
    pytest.importorskip("gunicorn")
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        argv = [sys.executable, "-c", HAND_OVER, str(listener.fileno()), *command_of(files()["calc.service"])]
        handed = {"pass_fds": [listener.fileno()]}
        end, counts = threading.Event(), [Counter[str]() for _ in range(8)]
        threads = [threading.Thread(target=keep_calling, args=(port, end, seen)) for seen in counts]
        with running(argv, folder, **handed) as first:
            assert health(port, first) == 200
            for thread in threads:
                thread.start()
            until(lambda: right_of(counts) >= 20)
            first.terminate()
            assert first.wait(20) == 0
        before = right_of(counts)
        with running(argv, folder, **handed) as second:
            assert health(port, second) == 200
            until(lambda: right_of(counts) > before)
            end.set()
            for thread in threads:
                thread.join(60)
        total = sum(counts, Counter[str]())
        assert set(total) == {"right"}, total


@plain
@pytest.mark.skipif(ACTIVATE is None, reason="systemd is not installed")
def test_gunicorn_takes_the_socket_of_systemd(folder: Path) -> None:
    pytest.importorskip("gunicorn")
    port = free_port()
    argv = [str(ACTIVATE), "-l", f"127.0.0.1:{port}", "-E", "PYTHONPATH", *command_of(files()["calc.service"])]
    with running(argv, folder) as found:
        until_open(port)
        assert health(port, found) == 200
        with core_http_connect(f"http://127.0.0.1:{port}") as calc:
            assert calc.add(1.0, 2.0) == 3.0
        found.terminate()
        assert found.wait(20) == 0


@plain
@pytest.mark.skipif(ACTIVATE is None, reason="systemd is not installed")
def test_a_worker_for_each_connection_to_a_socket_of_systemd(folder: Path) -> None:
    path = folder / "raw.sock"
    argv = [str(ACTIVATE), "-l", str(path), "-a", "--inetd", "-E", "PYTHONPATH"]
    with running([*argv, *command_of(files()["calc-raw@.service"])], folder):
        until(path.exists)
        with core.unix_connect(Calc, str(path), timeout=30) as one, core.unix_connect(Calc, str(path)) as two:
            assert (one.add(1.0, 2.0), two.add(3.0, 4.0), one.add(5.0, 6.0)) == (3.0, 7.0, 11.0)


# ---- the container


@plain
def test_the_command_of_the_container(folder: Path) -> None:
    text = files()["Dockerfile"]
    found = re.search(r"^CMD (.*)$", text, re.MULTILINE)
    assert found is not None and "COPY calc.py worker.py ./" in text
    port = free_port()
    address = {"0.0.0.0": "127.0.0.1", "8000": str(port)}
    program, *words = json.loads(found[1])
    assert program == "python" and set(address) < set(words)
    (folder / "web.py").unlink()  # not in the image
    with running([sys.executable, *(address.get(word, word) for word in words)], folder) as process:
        assert health(port, process) == 200
        process.terminate()  # what `docker stop` sends to process 1
        assert process.wait(20) == 0
