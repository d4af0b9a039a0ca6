"""Every fenced code block of README.md is executed, in order, in one directory.

```python     `# name.py` on the first line: written to that file; otherwise run as a file
```sh         run by sh; `python` is this interpreter
```text       what the block before it prints
```sh serve   servers, one a line: each is started, asked for its health, and ended with SIGTERM
```conf       files for other programs: tests/extras/test_hosting.py uses them
```sh setup   installs things: .ci/run must run exactly this command
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.core import core

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


class Block(NamedTuple):
    """One fenced block: the line of its fence, the info string, the text."""

    line: int
    info: str
    text: str


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks of a Markdown text."""
    blocks: list[Block] = []
    start, info, fence, text = 0, "", "", list[str]()
    for number, line in enumerate(markdown.splitlines(), 1):
        opening = re.fullmatch(r"(`{3,})([^`]*)", line)
        if not fence and opening:
            start, fence, info, text = number, opening[1], opening[2].strip(), []
        elif fence and line.strip() == fence:
            blocks.append(Block(start, info, "\n".join(text) + "\n"))
            fence = ""
        elif fence:
            text.append(line)
    assert not fence, f"README.md:{start}: the block is never closed"
    return blocks


def readme() -> list[Block]:
    return blocks_of(README.read_text(encoding="utf-8"))


def environment(where: Path, bin_dir: Path) -> dict[str, str]:
    """The module under test is found first, as `vgi_rpc`."""
    path = os.pathsep.join((str(where), str(ROOT)))
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}


def run(command: list[str], where: Path, bin_dir: Path, block: Block) -> str:
    """What a block prints."""
    env = environment(where, bin_dir)
    ran = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"README.md:{block.line}\n{block.text}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def health(port: int, process: subprocess.Popen[bytes]) -> int:
    """The status of GET /health, once somebody listens."""
    deadline = time.monotonic() + 30
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "it does not listen"
            time.sleep(0.05)
        finally:
            connection.close()


def wait_for_workers(log: Path, count: int) -> None:
    """Granian 2.8 never ends when SIGTERM comes while one of its workers is still starting."""
    deadline = time.monotonic() + 30
    while log.read_text().count("Started worker-") < count:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def serve(command: str, where: Path, bin_dir: Path) -> None:
    """Start a server on another port than the one it names; it must be healthy, and end well."""
    port = free_port()
    assert "8001" in command, command
    command = f"exec {command.replace('8001', str(port))}"
    with open(where / "serve.log", "wb") as log:
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=where,
            env=environment(where, bin_dir),
            stdout=log,
            stderr=log,
            start_new_session=True,  # so that its workers can be ended too
        )
    try:
        assert health(port, process) == 200, command
        if "granian" in command:
            wait_for_workers(where / "serve.log", 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, f"{command}\n{(where / 'serve.log').read_text()}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def execute(block: Block, where: Path, bin_dir: Path) -> str:
    """Write or run one block; returns what it printed."""
    if block.info == "sh serve":
        for command in block.text.splitlines():
            serve(command, where, bin_dir)
        return ""
    if block.info == "sh":
        return run(["sh", "-e", "-c", block.text], where, bin_dir, block)
    assert block.info == "python", f"README.md:{block.line}: nothing executes a block of kind {block.info!r}"
    name = re.match(r"# ([\w/]+\.py)\n", block.text)
    file = where / (name[1] if name else f"block_{block.line}.py")
    file.write_text(block.text, encoding="utf-8")
    return "" if name else run([sys.executable, "-W", "error", str(file)], where, bin_dir, block)


def test_blocks_are_found() -> None:
    text = "a\n```sh setup\npip\n```\n````python\n```\nx = 1\n````\n"
    assert blocks_of(text) == [Block(2, "sh setup", "pip\n"), Block(5, "python", "```\nx = 1\n")]


@pytest.mark.timeout(300)
@pytest.mark.skipif(core.__name__ != "vgi_rpc", reason="the README shows the module under its own name")
def test_readme_blocks_run(tmp_path: Path) -> None:
    where, bin_dir = tmp_path / "work", tmp_path / "bin"
    where.mkdir()
    bin_dir.mkdir()
    for name in ("python", "python3"):
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bin_dir / name).chmod(0o755)
    printed: str | None = ""  # None: could not be run here
    for block in readme():
        if block.info == "text":
            assert printed is None or printed.endswith(block.text), (
                f"README.md:{block.line}: printed instead:\n{printed}"
            )
        elif block.info == "sh" and "curl" in block.text and shutil.which("curl") is None:
            printed = None
        elif block.info not in ("sh setup", "conf"):
            printed = execute(block, where, bin_dir)


def test_setup_is_what_ci_runs() -> None:
    setup = [block.text.strip() for block in readme() if block.info == "sh setup"]
    assert len(setup) == 2
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()]
    for command in setup:
        assert any(line.endswith(f'bash -c "{command}"') for line in lines), command
