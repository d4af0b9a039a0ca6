"""Shared pytest configuration."""

from __future__ import annotations

from tests.core import core


def pytest_report_header() -> str:
    """Name the file under test, so that a wrong one is noticed."""
    return f"core: {core.__file__} ({core.__version__})"
