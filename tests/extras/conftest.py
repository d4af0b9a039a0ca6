"""Fixtures that several files use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.extras.storage_server import Store, running_store

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real browser."""
    if not os.path.exists(CHROMIUM):
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    """A store on loopback."""
    with running_store() as store:
        yield store


@pytest.fixture
def store(running: Store) -> Store:
    """The store, empty."""
    running.asked.clear()
    running.things.clear()
    running.query = "?k=hunter2"
    return running
