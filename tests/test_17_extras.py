"""Room 17: the door to vgi_rpc_extras."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core import core

ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_lazy_names_of_the_core() -> None:
    assert core.ProtocolList is core._describe_wire().ProtocolList
    assert {"ProtocolList", "configure_access_log", "connect"} <= set(dir(core))


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = core.nonsense


def test_missing_extra_says_what_to_install(tmp_path: Path) -> None:
    copy = tmp_path / "alone.py"
    copy.write_bytes(Path(core.__file__).read_bytes())
    code = (  # an editable install puts the project, and with it the folder, on the path
        "import os, sys\n"
        "sys.path[:] = [p for p in sys.path if not p or not os.path.exists(os.path.join(p, 'vgi_rpc.py'))]\n"
        "import alone\ntry: alone.http_connect\nexcept ImportError as exc: print(exc.name, exc)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert re.match(r"vgi_rpc_extras http_connect needs .*'vgi_rpc_extras'", ran.stdout), ran.stderr
    assert "a lone copied file" in ran.stdout
    assert "pip install 'vgi-rpc-onefile[http]'" in ran.stdout


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import falcon_not_there", "ImportError http_connect needs the package 'falcon_not_there'"),
        ("1 / 0", "ZeroDivisionError"),
        ("from vgi_rpc_extras import not_here", "ImportError cannot import name 'not_here'"),
        ("http_connect = 5", "5"),
    ],
)
def test_extra_that_fails(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "alone.py").write_bytes(Path(core.__file__).read_bytes())
    folder = tmp_path / "vgi_rpc_extras"
    folder.mkdir()
    (folder / "__init__.py").write_text("def bind(core): pass\n")
    (folder / "http.py").write_text(source)
    code = "import alone\ntry: print(alone.http_connect)\nexcept Exception as exc: print(type(exc).__name__, exc)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert ran.stdout.startswith(expected), ran.stdout + ran.stderr
