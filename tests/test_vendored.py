"""The file works as a copy under another name inside another package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core import core

ROOT = Path(__file__).resolve().parent.parent
NAME = "app._vendor.rpc_core"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A directory with package `app` that holds the file as app/_vendor/rpc_core.py, and the tests beside it."""
    vendor = tmp_path / "app" / "_vendor"
    vendor.mkdir(parents=True)
    for package in (vendor.parent, vendor):
        (package / "__init__.py").write_text("")
    shutil.copyfile(core.__file__, vendor / "rpc_core.py")
    return tmp_path


def run(app: Path, *args: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(app), "VGI_RPC_CORE": NAME}
    return subprocess.run([sys.executable, *args], cwd=app, env=env, capture_output=True, text=True, timeout=timeout)


def test_command_line(app: Path) -> None:
    ran = run(app, "-m", NAME, "--version")
    assert ran.returncode == 0, ran.stderr
    assert core.__version__ in ran.stdout


def test_import_leaves_vgi_rpc_alone(app: Path) -> None:
    ran = run(app, "-W", "error", "-c", f"import sys, {NAME}; print(sorted(n for n in sys.modules if 'vgi_rpc' in n))")
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


@pytest.mark.timeout(900)
def test_whole_suite(app: Path) -> None:
    for name in ("tests", "vgi_rpc_extras"):
        shutil.copytree(ROOT / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copyfile(ROOT / name, app / name)
    # What starts many processes takes minutes and does not depend on the module's name; `.ci/run` must stay short.
    choice = "test_0 or test_11 or test_12 or test_13 or test_17"
    ran = run(app, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests", "-k", choice, timeout=880)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
