"""Every fenced code block of README.md runs, in order, in one directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

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


def run(command: list[str], where: Path, bin_dir: Path, block: Block) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    ran = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"README.md:{block.line}\n{block.text}\n{ran.stdout}\n{ran.stderr}"


def test_blocks_are_found() -> None:
    text = "a\n```sh setup\npip\n```\n````python\n```\nx = 1\n````\n"
    assert blocks_of(text) == [Block(2, "sh setup", "pip\n"), Block(5, "python", "```\nx = 1\n")]


@pytest.mark.timeout(300)
def test_readme_blocks_run(tmp_path: Path) -> None:
    where, bin_dir = tmp_path / "work", tmp_path / "bin"
    where.mkdir()
    bin_dir.mkdir()
    for name in ("python", "python3"):
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bin_dir / name).chmod(0o755)
    blocks = blocks_of(README.read_text(encoding="utf-8"))
    assert any(block.info == "python" for block in blocks)
    for block in blocks:
        name = re.match(r"# ([\w/]+\.py)\n", block.text)
        if block.info == "python" and name:
            (where / name[1]).parent.mkdir(parents=True, exist_ok=True)
            (where / name[1]).write_text(block.text, encoding="utf-8")
        elif block.info == "python":
            run([sys.executable, "-c", block.text], where, bin_dir, block)
        elif block.info == "sh":
            run(["sh", "-e", "-c", block.text], where, bin_dir, block)
