"""Users' strict mypy and pyright see typed proxies: plain file, installed wheel, vendored copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.core import core

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "tests" / "typing" / "check_typing.py"
MISUSE = ROOT / "tests" / "typing" / "misuse.py"
CONFIG = "[mypy]\nstrict = True\n[mypy-pyarrow.*]\nignore_missing_imports = True\n"
OFFLINE = ("Could not find a version", "Temporary failure", "ConnectionError", "Failed to establish", "Max retries")

pytestmark = pytest.mark.timeout(600)


def run(where: Path, *command: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, timeout=500)


def tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed; pip install -e . --group dev")
    return found


def plain_type(text: str) -> str:
    """A revealed type without module names and marks of one checker."""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("def ", "").strip()


def expected() -> dict[int, str]:
    lines = enumerate(CHECK.read_text(encoding="utf-8").splitlines(), 1)
    return {number: match[1] for number, line in lines if (match := re.search(r"# reveals: (.+)$", line))}


def mistakes() -> set[int]:
    lines = enumerate(MISUSE.read_text(encoding="utf-8").splitlines(), 1)
    return {number for number, line in lines if line.endswith("  # wrong")}


def project(where: Path, module: str) -> Path:
    """Write the checked files for a user whose core is called `module`."""
    where.mkdir(parents=True, exist_ok=True)
    for file in (CHECK, MISUSE):
        text = file.read_text(encoding="utf-8")
        assert text.count("\nfrom vgi_rpc import (") == 1
        (where / file.name).write_text(text.replace("from vgi_rpc import", f"from {module} import"))
    (where / "mypy.ini").write_text(CONFIG)
    return where


def check_mypy(where: Path, python: str) -> None:
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    ran = run(where, *mypy, "check_typing.py")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = re.findall(r'check_typing\.py:(\d+): note: Revealed type is "(.*)"', ran.stdout)
    assert {int(number): plain_type(text) for number, text in found} == expected()
    ran = run(where, *mypy, "misuse.py")
    assert {int(number) for number in re.findall(r"misuse\.py:(\d+): error", ran.stdout)} == mistakes(), ran.stdout


def check_pyright(where: Path, python: str) -> None:
    pyright = (tool("pyright"), "--pythonpath", python)
    ran = run(where, *pyright, "check_typing.py")
    if any(text in ran.stdout + ran.stderr for text in ("npm ERR", "getaddrinfo", "URLError")):
        pytest.skip("pyright cannot fetch its Node program without a network")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = re.findall(r'check_typing\.py:(\d+):\d+ - information: Type of ".*" is "(.*)"', ran.stdout)
    assert {int(number): plain_type(text) for number, text in found} == expected()
    ran = run(where, *pyright, "misuse.py")
    assert {int(number) for number in re.findall(r"misuse\.py:(\d+):\d+ - error", ran.stdout)} == mistakes(), ran.stdout


CHECKERS = pytest.mark.parametrize("check", [check_mypy, check_pyright], ids=["mypy", "pyright"])


def test_expectations_are_found() -> None:
    assert len(expected()) == CHECK.read_text(encoding="utf-8").count(" reveal_type(") >= 10
    assert len(mistakes()) >= 10


@CHECKERS
def test_plain_file(check, tmp_path: Path) -> None:
    where = project(tmp_path, "vgi_rpc")
    shutil.copyfile(core.__file__, where / "vgi_rpc.py")
    check(where, sys.executable)


@CHECKERS
def test_vendored_copy(check, tmp_path: Path) -> None:
    where = project(tmp_path, "app._vendor.rpc_core")
    vendor = where / "app" / "_vendor"
    vendor.mkdir(parents=True)
    for package in (vendor.parent, vendor):
        (package / "__init__.py").write_text("")
    shutil.copyfile(core.__file__, vendor / "rpc_core.py")
    check(where, sys.executable)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built with the installed hatchling (no network)."""
    pytest.importorskip("hatchling", reason="hatchling is not installed; pip install -e . --group dev")
    out = tmp_path_factory.mktemp("dist")
    ran = run(ROOT, sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_has_the_module_and_its_markers(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("vgi_rpc.py") == (ROOT / "vgi_rpc.py").read_bytes()
        assert {"vgi_rpc/py.typed", "vgi_rpc_extras/py.typed", "vgi_rpc_extras/__init__.py"} <= set(archive.namelist())
        assert not [name for name in archive.namelist() if name.startswith(("tests/", ".ci/"))]


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of a fresh environment that has the wheel and pyarrow."""
    env = tmp_path_factory.mktemp("env") / "venv"
    made = run(ROOT, sys.executable, "-m", "venv", str(env))
    assert made.returncode == 0, made.stdout + made.stderr
    python = str(env / "bin" / "python")
    ran = run(env, python, "-m", "pip", "install", "-q", "--disable-pip-version-check", str(wheel))
    if ran.returncode and any(text in ran.stderr for text in OFFLINE):
        pytest.skip("pip cannot fetch pyarrow without a network")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return python


@CHECKERS
def test_installed_wheel(check, installed: str, tmp_path: Path) -> None:
    check(project(tmp_path, "vgi_rpc"), installed)


def test_typing_wheel_has_the_command(installed: str, tmp_path: Path) -> None:
    ran = run(tmp_path, str(Path(installed).parent / "vgi-rpc"), "--version")
    assert ran.returncode == 0, ran.stderr
    assert core.__version__ in ran.stdout
