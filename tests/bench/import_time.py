"""What `import vgi_rpc` costs on top of `import pyarrow`: fresh interpreters, measured in turn.

python -m tests.bench.import_time [rounds]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
BASE = "import pyarrow, pyarrow.ipc"
FULL = "import vgi_rpc"
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def seconds(statement: str, cache: str) -> float:
    """Run `statement` in a fresh interpreter that keeps bytecode in `cache`; returns how long it took inside."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = cache
    command = [sys.executable, "-c", TIMED.format(statement)]
    return float(subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print the medians in milliseconds; interleaving lets drift of the machine hit both alike."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    with tempfile.TemporaryDirectory() as cache:
        for statement in (BASE, FULL):
            seconds(statement, cache)
        pairs = [(seconds(BASE, cache), seconds(FULL, cache)) for _ in range(rounds)]
    base = 1000 * statistics.median(pair[0] for pair in pairs)
    full = 1000 * statistics.median(pair[1] for pair in pairs)
    over = 1000 * statistics.median(pair[1] - pair[0] for pair in pairs)
    ratio = f"ratio {full / base:.2f}"
    print(f"pyarrow {base:.1f} ms   vgi_rpc {full:.1f} ms   over pyarrow {over:.1f} ms   {ratio}   ({rounds} rounds)")


if __name__ == "__main__":
    main()
