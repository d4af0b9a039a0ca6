"""Shared pytest configuration."""

from __future__ import annotations

import os
import signal
import tempfile

from tests.core import core

# Hundreds of workers start in these tests: without compiled files each of them compiles the core anew, a second apiece.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), f"vgi-rpc-tests-{os.getuid()}"))

# A shell that runs the tests in the background (nohup, a job of a script) ignores SIGINT, and so would every worker.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Name the file under test, so that a wrong one is noticed."""
    return f"core: {core.__file__} ({core.__version__})"
