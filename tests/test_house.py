"""The form of the one file: rooms, imports, public names, lengths."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.core import core
from tests.rooms import BANNER, definitions, index_of, rooms_of, upward_references

ROOT = Path(__file__).resolve().parent.parent
FILE = Path(core.__file__)
SOURCE = FILE.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
EXPENSIVE = ("asyncio", "multiprocessing", "argparse", "http", "subprocess", "ssl", "dataclasses", "inspect", "json")


def test_index_is_the_list_of_banners() -> None:
    titles = [title for _, title in rooms_of(SOURCE)[1:]]
    assert titles == index_of(SOURCE)
    assert [int(title.split(".")[0]) for title in titles] == list(range(1, len(titles) + 1))


def test_names_to_begin_with_exist() -> None:
    begin = (core.__doc__ or "").split("Where to begin:")[1].split("Names with http")[0]
    names = re.findall(r"\b\w+_\w+\b|\b[A-Z]\w+[a-z][A-Z]\w+|\bStream\b", begin)
    assert len(names) > 20
    assert [name for name in names if name not in dir(core) and name != "vgi_rpc"] == []


def test_banners_are_full_width() -> None:
    banners = [line for line in LINES if re.match(BANNER, line)]
    assert banners
    assert [line for line in banners if len(line) != 120] == []


def test_every_room_names_the_rooms_it_uses() -> None:
    for number, title in rooms_of(SOURCE)[1:]:
        own = int(title.split(".")[0])
        match = re.fullmatch(r"# Uses: (nothing|[\d, ]+)\.(?: .*)?", LINES[number])
        assert match, f"{title}: {LINES[number]!r}"
        used = [int(text) for text in re.findall(r"\d+", match[1])]
        assert used == sorted(set(used)) and all(room < own for room in used), title


def test_no_upward_references() -> None:
    assert upward_references(SOURCE) == []


def test_upward_references_are_noticed() -> None:
    lines = ["# = 1. A =", "def f():", "    return g()", "# = 2. B =", "def g():", "    return f()"]
    assert [(ref.line, ref.name, ref.target) for ref in upward_references("\n".join(lines))] == [(3, "g", "2. B")]


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(ran.stdout.split())


def test_import_loads_nothing_expensive() -> None:
    extra = loaded_by(f"import {core.__name__}") - loaded_by("import pyarrow, pyarrow.ipc")
    assert extra.isdisjoint(EXPENSIVE), sorted(extra.intersection(EXPENSIVE))
    assert "vgi_rpc_extras" not in extra


def test_all_is_sorted_and_complete() -> None:
    names = list(core.__all__)
    assert names == sorted(set(names))
    public = {name for name in definitions(TREE) if not name.startswith("_")}
    lazy = {name for name in names if name in core._EXTRAS_WHERE or name in core._EXTRAS_LAZY_CORE}
    assert set(names) - lazy == public
    assert [name for name in sorted(lazy) if not hasattr(core, name)] == []


def test_no_absolute_self_import() -> None:
    found = []
    for node in ast.walk(TREE):
        names: list[str | None] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        found += [(node.lineno, name) for name in names if name and name.split(".")[0] == "vgi_rpc"]
    assert found == []


def test_version_is_one_literal() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pattern: str = project["tool"]["hatch"]["version"]["pattern"]
    assert [match["version"] for match in re.finditer(pattern, SOURCE)] == [core.__version__]
    assert f"\n## {core.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f'__version__ = "{core.__version__}"' in (ROOT / "vgi_rpc_extras" / "__init__.py").read_text(
        encoding="utf-8"
    )


def test_licence_is_in_the_file() -> None:
    comment = SOURCE[: SOURCE.index('"""')]
    assert "# SPDX-License-Identifier: MIT" in comment
    words = " ".join(comment.replace("#", " ").split())
    assert "Permission is hereby granted, free of charge" in words
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in words


def functions() -> list[Any]:
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_functions_are_short() -> None:
    lengths = [((node.end_lineno or 0) - node.lineno + 1, node.name, node.lineno) for node in functions()]
    assert sorted(entry for entry in lengths if entry[0] > 60) == []


def test_lines_fit() -> None:
    assert [number for number, line in enumerate(LINES, 1) if len(line) > 120] == []
    assert [number for number, line in enumerate(LINES, 1) if line != line.rstrip()] == []


def test_every_room_has_a_test_file() -> None:
    numbers = [int(title.split(".")[0]) for _, title in rooms_of(SOURCE)[1:]]
    missing = [number for number in numbers if not list(Path(__file__).parent.glob(f"test_{number:02d}_*.py"))]
    assert missing == []
