"""Runs fuzzing targets in child processes: a child that dies or hangs is a finding, and the run goes on behind it."""

from __future__ import annotations

import collections
import concurrent.futures
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.fuzz.child import BOX_BYTES, HEAD, IDLE, ORACLE

HANG = 60.0  # seconds without a next case
DEATHS_MAX = 20
ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    """Figures of all children together."""

    cases: int
    outcomes: dict[str, int]
    findings: list[dict[str, Any]]
    growth: int
    slowest: float

    def share(self, outcome: str) -> float:
        """The share of the cases that ended in a certain way."""
        return self.outcomes.get(outcome, 0) / max(self.cases, 1)


def run(name: str, seed: str, count: int, *, jobs: int = 1, chunk: int = 20_000) -> Result:
    """`count` cases of a target, in `jobs` processes at a time, each of at most `chunk` cases."""
    total = collections.Counter[str]()
    findings: list[dict[str, Any]] = []
    growth, slowest, cases = 0, 0.0, 0
    todo = collections.deque((at, min(chunk, count - at)) for at in range(0, count, chunk))
    deaths = 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal growth, slowest, cases, deaths
        while True:
            with lock:
                if not todo or deaths > DEATHS_MAX:
                    return
                first, size = todo.popleft()
            report, death = _child(name, seed, first, size)
            with lock:
                if report is not None:
                    total.update(report["outcomes"])
                    findings.extend(report["findings"])
                    growth, slowest = max(growth, report["growth"]), max(slowest, report["slowest"])
                    cases += report["cases"]
                if death is not None:
                    case = death["case"]
                    if death.pop("oracle"):
                        total["pyarrow died"] += 1  # while judging: what it cannot read we must not either, and did not
                    else:
                        deaths += 1
                        findings.append(death)
                        total["died"] += 1
                    cases += 1
                    # What went before it is run again: a dead process reports nothing.
                    if case > first:
                        todo.appendleft((first, case - first))
                    if case + 1 < first + size:
                        todo.append((case + 1, first + size - case - 1))

    with concurrent.futures.ThreadPoolExecutor(jobs) as threads:
        for future in [threads.submit(work) for _ in range(jobs)]:
            future.result()
    return Result(cases, dict(total), findings, growth, slowest)


def _child(name: str, seed: str, first: int, size: int) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    with (
        tempfile.NamedTemporaryFile(prefix="vgi_rpc_fuzz_") as box,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        box.truncate(BOX_BYTES)
        command = [sys.executable, "-m", "tests.fuzz.child", name, seed, str(first), str(size), box.name]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"}
        child = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
        hung = _watch(child, box.name)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        if child.returncode == 0:
            return json.loads(texts[0]), None
        case, stage, data = _look(box.name)
        if hung:
            how = f"hung for {HANG:.0f} s"
        elif child.returncode < 0:
            how = f"died of {signal.Signals(-child.returncode).name}"
        else:
            how = f"exited with {child.returncode}"
        if (stage == IDLE and not hung) or (child.returncode > 0 and not hung):
            raise AssertionError(f"{name}: a child {how} outside its cases\n{texts[1][-2000:]}")
        what = f"{how} ({'pyarrow alone' if stage == ORACLE else 'ours'}) {texts[1][-300:]}"
        return None, {"case": case, "what": what, "trace": "", "data": data.hex(), "oracle": stage == ORACLE}


def _watch(child: subprocess.Popen[bytes], path: str) -> bool:
    """Wait for the end; True when it had to be killed because it stood still."""
    seen, since = -2, time.monotonic()
    while True:
        try:
            child.wait(0.1)
            return False
        except subprocess.TimeoutExpired:
            case = _look(path)[0]
            if case != seen:
                seen, since = case, time.monotonic()
            elif time.monotonic() - since > HANG:
                child.kill()
                child.wait()
                return True


def _look(path: str) -> tuple[int, bytes, bytes]:
    with open(path, "rb") as file:
        case, stage, size = HEAD.unpack(file.read(HEAD.size))
        return case, stage, file.read(size)


def show(name: str, seed: str, result: Result) -> str:
    """Figures, and the first findings with how to repeat them."""
    outcomes = ", ".join(f"{key} {value}" for key, value in sorted(result.outcomes.items()))
    lines = [
        f"{name}, seed {seed}: {result.cases} cases; {outcomes};"
        f" at most {result.growth >> 20} MiB and {result.slowest:.2f} s for one"
    ]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for found in result.findings:
        kinds.setdefault(re.sub(r"[^a-zA-Z ]+", "", found["what"])[:60], []).append(found)
    for alike in list(kinds.values())[:12]:
        found = min(alike, key=lambda each: len(each["data"]) or 1 << 20)
        lines.append(f"  {len(alike)} like case {found['case']}: {found['what']}")
        lines += [f"    {line}" for line in found["trace"].splitlines()]
        lines.append(f"    {found['data'][:600]}")
        lines.append(f"    python -m tests.fuzz.child {name} {seed} {found['case']} 1")
    return "\n".join(lines)
