"""Is each room of the one file covered by its own test file?

For every banner "N. NAME" this runs tests/test_NN_*.py alone under coverage.py and lists the lines of that room that
they miss. A room that only other rooms' tests reach is a room without tests of its own.

    python -m tests.room_cov vgi_rpc.py tests --fail-under 90
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.rooms import rooms_of


def measure(file: Path, tests: list[str]) -> tuple[str, dict[str, Any] | None]:
    """Run `tests` under coverage: (tail of pytest's output, coverage data of `file` or None if they failed)."""
    with tempfile.TemporaryDirectory() as work:
        env = {**os.environ, "COVERAGE_FILE": os.path.join(work, "data")}
        run = [sys.executable, "-m", "coverage", "run", "--include", str(file.resolve()), "-m", "pytest", "-q", *tests]
        ran = subprocess.run(run, env=env, capture_output=True, text=True)
        out = Path(work, "cov.json")
        subprocess.run([sys.executable, "-m", "coverage", "json", "-q", "-o", str(out)], env=env, check=False)
        if ran.returncode or not out.exists():
            return ran.stdout[-800:], None
        files: dict[str, dict[str, Any]] = json.loads(out.read_text())["files"]
        return "", next(iter(files.values()), None)


def main() -> int:
    """Print one line per room; 1 if a room has no tests, failing tests or too little coverage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--fail-under", type=float, default=0.0)
    args = parser.parse_args()
    source = args.file.read_text(encoding="utf-8")
    rooms = rooms_of(source)[1:]
    ends = [start - 1 for start, _ in rooms[1:]] + [source.count("\n") + 1]
    bad = False
    for (start, title), end in zip(rooms, ends, strict=True):
        number = int(title.split(".")[0])
        files = sorted(str(path) for path in args.tests.glob(f"test_{number:02d}_*.py"))
        if not files:
            print(f"{title:40s} no test file test_{number:02d}_*.py")
            bad = True
            continue
        tail, data = measure(args.file, files)
        if data is None:
            print(f"{title:40s} tests failed\n{tail}")
            bad = True
            continue
        hit = [n for n in data["executed_lines"] if start <= n <= end]
        missed = [n for n in data["missing_lines"] if start <= n <= end]
        share = 100 * len(hit) / max(1, len(hit) + len(missed))
        bad |= share < args.fail_under
        print(f"{title:40s} {share:5.1f}%  missed {missed[:12]}{'...' if len(missed) > 12 else ''}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
