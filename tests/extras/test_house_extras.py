"""The imports of vgi_rpc_extras: downward only, without circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "vgi_rpc_extras"
# What may import what; a package may always import its own modules, and `common` and the root.
BELOW = {
    "common": set(),
    "auth": {"common"},
    "storage": {"common"},
    "http": {"auth", "storage", "common", "otel", "sentry"},
    "tools": {"common"},
    "access_log": {"common"},
    "otel": {"common"},
    "sentry": {"common"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """The modules of ours that a module imports, anywhere in it, but for what only type checkers see."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part]
    tree = ast.parse(path.read_text())
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in unseen:
            continue
        base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
        for alias in node.names:
            inner = ".".join([*base, alias.name])
            yield inner if inner in known else ".".join(base)


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: {one for one in imports(name, path, set(known)) if one != name} for name, path in known.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every module that reaches itself, with a way on which it does."""
    found = []
    for start in sorted(edges):
        ways = [[start, one] for one in sorted(edges[start])]
        seen: set[str] = set()
        while ways:
            way = ways.pop()
            if way[-1] == start:
                found.append(way)
                break
            if way[-1] not in seen:
                seen.add(way[-1])
                ways += [[*way, one] for one in sorted(edges.get(way[-1], ()))]
    return found


def test_no_circles() -> None:
    edges = graph()
    assert len(edges) > 30
    edges.pop("")  # `core`, `bind` and `load`: it imports nothing of ours
    found = circles({name: {one for one in ones if one} for name, ones in edges.items()})
    assert found == []


def test_what_is_looked_for_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [
        ["a", "b", "c", "a"],
        ["b", "c", "a", "b"],
        ["c", "a", "b", "c"],
    ]
    assert "common.names" in graph()["http.client"]


def test_packages_import_downward() -> None:
    wrong = [
        f"{name} imports {one}"
        for name, ones in graph().items()
        for one in sorted(ones)
        if name
        and one
        and (top := one.split(".")[0]) != (own := name.split(".")[0])
        and top not in BELOW.get(own, {top})
    ]
    assert wrong == []
