"""Structural fuzzing against pyarrow: 5,000 cases of each target here, 10^6 with `-m long` (figures are printed, -s).

A finding is a crash, a hang, an exception that is not documented, memory beyond the limits, a value that pyarrow reads
otherwise, or something accepted that pyarrow refuses. Each is shown with its bytes and with how to repeat it. Another
seed: VGI_RPC_FUZZ_SEED; the number of long cases: VGI_RPC_FUZZ_CASES.
"""

from __future__ import annotations

import os
import sys

import pytest

from tests.core import core
from tests.fuzz import pool

SEED = os.environ.get("VGI_RPC_FUZZ_SEED", "2026")
CASES = 5_000
LONG_CASES = int(os.environ.get("VGI_RPC_FUZZ_CASES", "1000000"))
# Target -> which outcomes must be how frequent: mutants of which nothing is accepted, or nothing refused, are useless.
TARGETS = {
    "reader": {"accepted": 0.15, "valid": 0.1, "refused": 0.3},
    "layouts": {"accepted": 0.15, "written": 0.08, "refused": 0.3, "learned": 0.001},
    "nested": {"accepted": 0.2, "refused": 0.2},
    "values": {"accepted": 0.1, "refused": 0.3},
    "requests": {"answered": 0.08, "refused": 0.2, "ended": 0.03},
    "replies": {"answered": 0.15, "refused": 0.3},
    "inputs": {"accepted": 0.1, "refused": 0.3, "ended": 0.01},
    "shm": {"accepted": 0.1, "refused": 0.3},
    "http": {"answered": 0.1, "refused": 0.3},
}
LIMITED = 64 << 20  # bytes that any case may cost, with limits of 1 MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what a process costs from Linux's /proc")


def fuzz(name: str, seed: str, count: int, jobs: int) -> None:
    if name == "http":
        pytest.importorskip("falcon")
    if name == "layouts" and not core._ipc_learning:
        pytest.skip("VGI_RPC_FAST_PATH=0")
    result = pool.run(name, seed, count, jobs=jobs)
    shown = pool.show(name, seed, result)
    print(shown)
    assert not result.findings, shown
    assert result.cases == count, shown
    assert result.growth < LIMITED, shown
    for outcome, share in TARGETS[name].items():
        assert result.share(outcome) > share, f"only {result.share(outcome):.1%} {outcome}\n{shown}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", TARGETS)
def test_mutants_do_what_pyarrow_does(name: str) -> None:
    fuzz(name, SEED, CASES, 1)


@pytest.mark.long
@pytest.mark.timeout(36_000)
@pytest.mark.parametrize("name", TARGETS)
def test_a_million_mutants(name: str) -> None:
    fuzz(name, f"{SEED} long", LONG_CASES, 2)
