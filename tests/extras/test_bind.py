"""How extras and core find each other: a core binds the extras to itself, once."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import vgi_rpc_extras
from tests.core import core

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def extras(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A fresh, unbound copy of the package; the bound one comes back afterwards."""
    monkeypatch.delitem(sys.modules, "vgi_rpc_extras")
    fresh = importlib.import_module("vgi_rpc_extras")
    monkeypatch.setitem(sys.modules, "vgi_rpc_extras", vgi_rpc_extras)
    assert fresh is not vgi_rpc_extras
    return fresh


def module(name: str, version: str) -> types.ModuleType:
    made = types.ModuleType(name)
    made.__dict__["__version__"] = version
    return made


def test_versions_agree() -> None:
    assert vgi_rpc_extras.__version__ == core.__version__


def test_first_core_is_kept(extras: types.ModuleType) -> None:
    extras.bind(core)
    extras.bind(core)
    assert extras.core() is core


def test_second_core_is_refused(extras: types.ModuleType) -> None:
    extras.bind(core)
    with pytest.raises(ImportError, match=r"a second core \(app\.other .* copy the folder .* beside app\.other"):
        extras.bind(module("app.other", core.__version__))
    assert extras.core() is core


def test_other_version_is_refused(extras: types.ModuleType) -> None:
    with pytest.raises(ImportError, match=r"other \(None\) is 9\.9\.9: copy or install both from one release"):
        extras.bind(module("other", "9.9.9"))
    extras.bind(core)
    assert extras.core() is core


def test_import_needs_no_third_party() -> None:
    code = (
        "import sys, vgi_rpc_extras; print(sorted(m for m in sys.modules if m.split('.')[0] in ('pyarrow', 'vgi_rpc')))"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory for modules: `lay` copies a core or the extras into it."""
    for package in ("app", "app/_vendor"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    return tmp_path


def lay(place: Path, *names: str) -> None:
    for name in names:
        if name.endswith("vgi_rpc_extras"):
            shutil.copytree(ROOT / "vgi_rpc_extras", place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(str(core.__file__), place / f"{name}.py")


def outcome(place: Path, code: str) -> tuple[int, str]:
    """Run `code` with only what was laid on the path: (exit status, last line printed)."""
    env = {**os.environ, "PYTHONPATH": str(place)}
    path = (
        "import sys; sys.path[:] = [p for p in sys.path if not p or not __import__('os').path.exists(p + '/vgi_rpc.py')"
    )
    path += f" or p == {str(place)!r}]\n"
    command = [sys.executable, "-W", "error", "-c", path + code]
    ran = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=60)
    return ran.returncode, (ran.stdout + ran.stderr).strip().splitlines()[-1]


THROUGH = (
    "import {0} as core; f = core.configure_access_log; print(f.__module__, sys.modules[f.__module__].core.__name__)"
)


@pytest.mark.parametrize(
    ("laid", "core_name", "expected"),
    [
        (("vgi_rpc", "vgi_rpc_extras"), "vgi_rpc", "vgi_rpc_extras.access_log vgi_rpc"),
        (
            ("app/_vendor/vgi_rpc", "vgi_rpc_extras"),
            "app._vendor.vgi_rpc",
            "vgi_rpc_extras.access_log app._vendor.vgi_rpc",
        ),
        (("app/_vendor/rpc", "vgi_rpc_extras"), "app._vendor.rpc", "vgi_rpc_extras.access_log app._vendor.rpc"),
        (
            ("app/_vendor/rpc", "app/_vendor/vgi_rpc_extras", "vgi_rpc_extras"),
            "app._vendor.rpc",
            "app._vendor.vgi_rpc_extras.access_log app._vendor.rpc",
        ),
    ],
    ids=["installed pair", "vendored core", "renamed core", "vendored pair"],
)
def test_core_finds_extras(place: Path, laid: tuple[str, ...], core_name: str, expected: str) -> None:
    lay(place, *laid)
    assert outcome(place, THROUGH.format(core_name)) == (0, expected)


def test_two_pairs_stay_apart(place: Path) -> None:
    lay(place, "vgi_rpc", "vgi_rpc_extras", "app/_vendor/vgi_rpc", "app/_vendor/vgi_rpc_extras")
    code = (
        "import vgi_rpc, app._vendor.vgi_rpc as own\n"
        "print(vgi_rpc.configure_access_log is own.configure_access_log, vgi_rpc.RpcError is own.RpcError)"
    )
    assert outcome(place, code) == (0, "False False")


def test_two_cores_cannot_share_one_copy(place: Path) -> None:
    lay(place, "vgi_rpc", "app/_vendor/rpc", "vgi_rpc_extras")
    code = "import vgi_rpc, app._vendor.rpc as own\nvgi_rpc.configure_access_log; own.configure_access_log"
    status, last = outcome(place, code)
    assert status == 1
    assert last.startswith("ImportError: vgi_rpc_extras is bound to vgi_rpc (")
    assert last.endswith("copy the folder vgi_rpc_extras beside app._vendor.rpc")


@pytest.mark.parametrize(
    ("laid", "package", "expected"),
    [
        (("vgi_rpc", "vgi_rpc_extras"), "vgi_rpc_extras", "vgi_rpc"),
        (
            ("vgi_rpc", "app/_vendor/vgi_rpc", "app/_vendor/vgi_rpc_extras"),
            "app._vendor.vgi_rpc_extras",
            "app._vendor.vgi_rpc",
        ),
    ],
    ids=["installed", "vendored"],
)
def test_extra_imported_directly(place: Path, laid: tuple[str, ...], package: str, expected: str) -> None:
    lay(place, *laid)
    assert outcome(place, f"from {package}.access_log import core; print(core.__name__)") == (0, expected)


def test_extra_without_a_core(place: Path) -> None:
    lay(place, "vgi_rpc_extras")
    status, last = outcome(place, "import vgi_rpc_extras.access_log")
    assert status == 1
    assert last.startswith("ImportError: vgi_rpc_extras is not bound to a core, and there is no module vgi_rpc:")
