"""One process of a fuzzing run: `python -m tests.fuzz.child TARGET SEED FIRST COUNT [BOX]`; figures on stdout as JSON.

Each case has a random generator of its own, so that `... TARGET SEED CASE 1` repeats one of them. Before anything is
done with a message it is written to the box, a small file that the parent reads when this process dies.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import json
import mmap
import random
import resource
import struct
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

HEAD = struct.Struct("<qcI")  # case, stage, size of the data
BOX_BYTES = 1 << 20
OURS, ORACLE, IDLE = b"o", b"p", b"i"
GROWTH = 64 << 20  # bytes that one case may cost, with limits of 1 MiB
PATIENCE = 5.0  # seconds for one case; a bound, not a speed
FINDINGS_MAX = 40


class Finding(AssertionError):
    """Something that must not be."""


class Tolerated(Finding):
    """Something that differs from pyarrow and is known; it is counted."""


class Box:
    """What this process is at, for whoever asks after its death; and what it has cost."""

    def __init__(self, path: str | None) -> None:
        self._map: Any = bytearray(BOX_BYTES)
        if path is not None:
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), BOX_BYTES)
        self._reset: Any = None
        with contextlib.suppress(OSError):
            self._reset = open("/proc/self/clear_refs", "wb", buffering=0)  # noqa: SIM115 (kept for the process's life)
        self.case = 0
        self.data = b""
        self.growth = 0
        self.slowest = 0.0

    def write(self, stage: bytes, data: bytes | None = None) -> None:
        """Enter a stage; with the bytes that it is about."""
        if data is not None:
            self.data = data
        kept = self.data[: BOX_BYTES - HEAD.size]
        if data is not None:
            self._map[HEAD.size : HEAD.size + len(kept)] = kept
        HEAD.pack_into(self._map, 0, self.case, stage, len(kept))

    @contextlib.contextmanager
    def ours(self, data: bytes, *, growth: int = GROWTH) -> Iterator[None]:
        """What is done in here is the project's: its memory and time are watched."""
        self.write(OURS, data)
        before = 0
        if self._reset is not None:
            self._reset.write(b"5")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 if self._reset else 0
            self.growth = max(self.growth, grown)
            self.slowest = max(self.slowest, spent)
            self.write(ORACLE)
        if grown > growth:
            raise Finding(f"{len(data)} bytes cost {grown >> 20} MiB of memory")
        if spent > PATIENCE:
            raise Finding(f"{len(data)} bytes took {spent:.1f} s")


class Report(NamedTuple):
    """Figures of a run."""

    cases: int
    outcomes: dict[str, int]
    findings: list[dict[str, Any]]
    growth: int
    slowest: float


def load(name: str, seed: str, box: Box) -> Any:
    """The target: an object with `case(rng) -> outcome`."""
    from tests.fuzz import messages

    messages.register()
    module = importlib.import_module(f"tests.fuzz.target_{name}")
    return module.Target(seed, box)


def run(name: str, seed: str, first: int, count: int, box: Box) -> Report:
    """The cases `first` to `first + count - 1` of a target."""
    target = load(name, seed, box)
    outcomes: collections.Counter[str] = collections.Counter()
    findings: list[dict[str, Any]] = []
    for case in range(first, first + count):
        box.case = case
        box.data = b""
        try:
            outcome = target.case(random.Random(f"{name} {seed} {case}"))
        except Tolerated:
            outcome = "tolerated"
        except Exception as exc:
            outcome = "finding"
            if len(findings) < FINDINGS_MAX:
                found = "" if isinstance(exc, Finding) else _places(exc)
                what = f"{type(exc).__name__}: {exc}"[:600]
                findings.append({"case": case, "what": what, "trace": found, "data": box.data[:4096].hex()})
        outcomes[outcome] += 1
    box.write(IDLE, b"")
    close = getattr(target, "close", None)
    if close is not None:
        close()
    return Report(count, dict(outcomes), findings, box.growth, box.slowest)


def _places(exc: Exception) -> str:
    """Where an exception came from, innermost last."""
    frames = traceback.extract_tb(exc.__traceback__)[-8:]
    return "\n".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames)


def main() -> None:
    """Run and print."""
    name, seed, first, count, *path = sys.argv[1:]
    report = run(name, seed, int(first), int(count), Box(path[0] if path else None))
    print(json.dumps(report._asdict()), flush=True)


if __name__ == "__main__":
    importlib.import_module("tests.fuzz.child").main()  # the targets raise that module's Finding
