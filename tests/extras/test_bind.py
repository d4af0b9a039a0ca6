"""The extras keep the first core and refuse any other."""

from __future__ import annotations

import importlib
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


def test_unbound(extras: types.ModuleType) -> None:
    with pytest.raises(ImportError, match="not bound to a core"):
        extras.core()


def test_first_core_is_kept(extras: types.ModuleType) -> None:
    extras.bind(core)
    extras.bind(core)
    assert extras.core() is core


def test_second_core_is_refused(extras: types.ModuleType) -> None:
    extras.bind(core)
    with pytest.raises(ImportError, match=r"a second core \(other"):
        extras.bind(module("other", core.__version__))
    assert extras.core() is core


def test_other_version_is_refused(extras: types.ModuleType) -> None:
    with pytest.raises(ImportError, match=r"other \(None\) is 9\.9\.9"):
        extras.bind(module("other", "9.9.9"))
    with pytest.raises(ImportError, match="not bound"):
        extras.core()


def test_import_needs_no_third_party() -> None:
    code = (
        "import sys, vgi_rpc_extras; print(sorted(m for m in sys.modules if m.split('.')[0] in ('pyarrow', 'vgi_rpc')))"
    )
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
