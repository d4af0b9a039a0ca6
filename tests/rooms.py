"""The rooms (banner sections) of the one file, and every reference that points upward.

A room starts at a banner: a full-line comment that matches BANNER, and runs to the next one.
A reference is *upward* when code in one room loads a module-level name that a LATER room defines.

    python -m tests.rooms vgi_rpc.py     # rooms + upward references; status 1 if there are any
"""

from __future__ import annotations

import ast
import bisect
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# "# ==== 3. TYPES ... ====" : number, capitals title, anything after.
BANNER = r"^# =+ (?P<title>\d+\. .+?) =*$"


class Upward(NamedTuple):
    """One reference to a name that a later room defines."""

    line: int
    where: str
    name: str
    target: str


def rooms_of(source: str) -> list[tuple[int, str]]:
    """(first line, "N. TITLE") of each room; the first one is what stands above all banners."""
    found = [(1, "0. (head)")]
    for number, line in enumerate(source.splitlines(), 1):
        if match := re.match(BANNER, line):
            found.append((number, match.group("title").strip()))
    return found


def definitions(tree: ast.Module) -> dict[str, int]:
    """Module-level name -> line of its first binding (type-checking-only blocks left out)."""
    names: dict[str, int] = {}

    def bind(name: str, line: int) -> None:
        names.setdefault(name, line)

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bind(node.name, node.lineno)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    for leaf in ast.walk(target):
                        if isinstance(leaf, ast.Name):
                            bind(leaf.id, node.lineno)
            elif isinstance(node, ast.If | ast.Try | ast.With):
                walk(node.body)
                walk(getattr(node, "orelse", []))
                for handler in getattr(node, "handlers", []):
                    walk(handler.body)

    walk(tree.body)
    return names


def own_names(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    """Parameters and names that the function binds itself, so that they hide module-level ones."""
    args = function.args
    names = {a.arg for a in [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg] if a}
    shared: set[str] = set()
    todo: list[ast.AST] = list(function.body) if isinstance(function.body, list) else []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Global):
            shared.update(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((a.asname or a.name).split(".")[0] for a in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        todo.extend(ast.iter_child_nodes(node))
    return names - shared


class Loads(ast.NodeVisitor):
    """Names loaded by run-time code: annotations are skipped, they are not dependencies."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int, str]] = []
        self.where: list[str] = []
        self.local: list[set[str]] = []

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and not any(node.id in names for names in self.local):
            self.found.append((node.id, node.lineno, ".".join(self.where) or "<module>"))

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        for item in [*getattr(node, "decorator_list", []), *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            self.visit(item)
        self.where.append(getattr(node, "name", "<lambda>"))
        self.local.append(own_names(node))
        for item in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(item)
        self.local.pop()
        self.where.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        self.local.append(
            {leaf.id for part in node.generators for leaf in ast.walk(part.target) if isinstance(leaf, ast.Name)}
        )
        self.generic_visit(node)
        self.local.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.where.append(node.name)
        self.generic_visit(node)
        self.where.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)


def room_at(rooms: list[tuple[int, str]], line: int) -> int:
    """Index in `rooms` of the room that `line` is in."""
    return bisect.bisect_right([start for start, _ in rooms], line) - 1


def upward_references(source: str) -> list[Upward]:
    """All references from a room to a later one, by line."""
    tree = ast.parse(source)
    rooms = rooms_of(source)
    names = definitions(tree)
    loads = Loads()
    loads.visit(tree)
    return sorted(
        {
            Upward(line, where, name, rooms[room_at(rooms, names[name])][1])
            for name, line, where in loads.found
            if name in names and room_at(rooms, names[name]) > room_at(rooms, line)
        }
    )


def index_of(source: str) -> list[str]:
    """The docstring's list of rooms as "N. TITLE"."""
    doc = ast.get_docstring(ast.parse(source)) or ""
    return [re.split(r"\s{2,}", line)[0] for line in re.findall(r"^\s*(\d+\. [A-Z].*?)\s*$", doc, re.M)]


def main() -> int:
    """Print the rooms and the upward references of the file named on the command line."""
    file = Path(sys.argv[1])
    source = file.read_text(encoding="utf-8")
    rooms = rooms_of(source)
    ends = [start - 1 for start, _ in rooms[1:]] + [source.count("\n") + 1]
    count = Counter(room_at(rooms, line) for line in definitions(ast.parse(source)).values())
    for i, ((start, title), end) in enumerate(zip(rooms, ends, strict=True)):
        print(f"{start:6d}-{end:<6d} {end - start + 1:5d} lines {count[i]:4d} names   {title}")
    upward = upward_references(source)
    print(f"{file}: {len(rooms) - 1} banners, {len(upward)} upward references")
    for ref in upward:
        print(f"   line {ref.line}: {ref.where} uses {ref.name}, defined below in '{ref.target}'")
    return int(bool(upward))


if __name__ == "__main__":
    sys.exit(main())
