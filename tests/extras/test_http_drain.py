"""SIGTERM under load: every call is answered or refused, none is dropped; what load balancers see meanwhile."""

from __future__ import annotations

import collections
import http.client
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("waitress")

from tests.extras.http_service import Read, request, until
from tests.extras.test_http_serve import SERVE, Held, Link, drain, get_health, process, until_open

CALLERS = 200


@pytest.fixture(params=["waitress", "granian"])
def served(request: Any) -> Iterator[tuple[Any, int]]:
    pytest.importorskip(request.param)
    with process("-c", SERVE, request.param) as (found, port):
        until_open(port)
        yield found, port


def test_health_says_draining_while_accepted_calls_finish(served: tuple[Any, int], tmp_path: Path) -> None:
    found, port = served
    add = request("add", a=1.0, b=2.0)
    with Link(port, 60) as slow, Link(port) as kept:
        assert json.loads(get_health(port).content)["status"] == "ok"
        assert Read(kept.post("/Service/add", add)).result == 3.0
        held = Held(slow, tmp_path)
        drain(found, port)
        for verb in ("GET", "HEAD", "OPTIONS"):
            health = get_health(port, verb)
            assert (health.status_code, health.headers["Retry-After"]) == (503, "1"), verb
            assert health.headers["Connection"] == "close"
            assert health.headers["VGI-Supported-Encodings"] == "zstd, gzip"  # http.md section 10: on every answer
            if verb == "GET":
                assert json.loads(health.content)["status"] == "draining"
                assert json.loads(health.content)["protocol"] == "Service"
        refused = kept.post("/Service/add", add)  # on the connection of an earlier call
        assert (refused.status_code, refused.headers["Connection"]) == (503, "close")
        assert Read(held.result()).result == "held"
    assert found.wait(10) == 0


def caller(port: int, keep: bool, go: threading.Event, seen: collections.Counter[str]) -> None:
    """Call until refused, and count how each call ended."""
    body, link, refused = request("wait", seconds=0.002), Link(port), ("refused", "503")
    go.wait()
    end = ""
    while end not in (*refused, "dropped"):
        try:
            answer = link.post("/Service/wait", body)
            end = "503" if answer.status_code == 503 else "answered" if Read(answer).result == 0.002 else "wrong"
        except ConnectionRefusedError:
            end = "refused"
        except (OSError, http.client.HTTPException):
            end = "dropped"
        seen[end] += 1
        if not keep or end != "answered":
            link.__exit__()
            link = Link(port)


def test_two_hundred_callers_lose_nothing(served: tuple[Any, int]) -> None:
    found, port = served
    go, counts = threading.Event(), [collections.Counter[str]() for _ in range(CALLERS)]
    # Few keep their connection: waitress serves 100 at a time, and the others are to have a turn.
    threads = [threading.Thread(target=caller, args=(port, k % 4 == 0, go, counts[k])) for k in range(CALLERS)]
    for thread in threads:
        thread.start()
    go.set()
    until(lambda: sum(seen["answered"] for seen in counts) >= CALLERS)
    found.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    total = sum(counts, collections.Counter[str]())
    assert set(total) <= {"answered", "503", "refused"}, total
    assert total["503"] + total["refused"] == CALLERS
    assert total["answered"] >= CALLERS
    assert found.wait(10) == 0
