"""SIGTERM under load: every call is answered or refused, none is dropped; what load balancers see meanwhile."""

from __future__ import annotations

import collections
import http.client
import json
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("waitress")

from tests.extras.http_service import Read, request
from tests.extras.test_http_serve import SERVE, Answer, Link, process, until_open

CALLERS = 200


def get_health(port: int, verb: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(verb, "/health")
        return Answer(connection.getresponse())
    finally:
        connection.close()


@pytest.fixture(params=["waitress", "granian"])
def served(request: Any) -> Iterator[tuple[Any, int]]:
    pytest.importorskip(request.param)
    with process("-c", SERVE, request.param) as (found, port):
        until_open(port)
        yield found, port


def test_health_says_draining_while_accepted_calls_finish(served: tuple[Any, int]) -> None:
    found, port = served
    body, add = request("wait", seconds=1.5), request("add", a=1.0, b=2.0)
    answers: list[Answer] = []
    with Link(port) as slow, Link(port) as kept:
        assert json.loads(get_health(port).content)["status"] == "ok"
        assert Read(kept.post("/Service/add", add)).result == 3.0
        thread = threading.Thread(target=lambda: answers.append(slow.post("/Service/wait", body)))
        thread.start()
        time.sleep(0.3)
        found.send_signal(signal.SIGTERM)
        time.sleep(0.2)
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
        thread.join(10)
        assert Read(answers[0]).result == 1.5
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
    deadline = time.monotonic() + 20
    while sum(seen["answered"] for seen in counts) < CALLERS and time.monotonic() < deadline:
        time.sleep(0.02)
    found.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(20)
    total = sum(counts, collections.Counter[str]())
    assert set(total) <= {"answered", "503", "refused"}, total
    assert total["503"] + total["refused"] == CALLERS
    assert total["answered"] >= CALLERS
    assert found.wait(10) == 0
