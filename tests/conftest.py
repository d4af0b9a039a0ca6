"""Shared pytest configuration."""

from __future__ import annotations

import os
import tempfile

from tests.core import core

# Hundreds of workers start in these tests: without compiled files each of them compiles the core anew, a second apiece.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", os.path.join(tempfile.gettempdir(), f"vgi-rpc-tests-{os.getuid()}"))


def pytest_report_header() -> str:
    """Name the file under test, so that a wrong one is noticed."""
    return f"core: {core.__file__} ({core.__version__})"
