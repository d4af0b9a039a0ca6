"""Fixtures that several files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.extras.storage_server import Store, running_store


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
