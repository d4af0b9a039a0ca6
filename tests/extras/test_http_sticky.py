# ruff: noqa: E402 (what may be missing is looked for first)
"""Sticky sessions: whose they are, who closes them and when, and what goes over the wire (sticky.md)."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

for package in ("falcon", "cryptography", "waitress", "httpx"):
    pytest.importorskip(package)

import httpx

from tests.extras.http_service import ARROW, Read, extra, numbers, stream, turn
from tests.extras.sticky_service import KEY, Sticky, StickyImpl, Tally, make_sticky, principals
from tests.extras.test_http_serve import NGINX, nginx, process

if TYPE_CHECKING:
    import vgi_rpc as core
    from vgi_rpc_extras import http as door
else:
    from tests.core import core

    door = importlib.import_module(extra("client").__package__)

ACCEPT = {"VGI-Session-Accept": "true"}
PRINCIPAL = "X-Conformance-Principal"
DELETE = "/__session__"


@pytest.fixture(autouse=True)
def no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test is about: no state is used by two calls, closed twice, or closed under a call."""
    monkeypatch.setattr(extra("sessions"), "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(extra("sessions"), "_SHUTDOWN_SECONDS", 0.1)
    Tally.made.clear()
    yield
    assert [tally.faults for tally in Tally.made if tally.faults] == []
    assert [tally for tally in Tally.made if tally.closed > 1] == []


def make_client(server_id: str = "one", **options: Any) -> Any:
    options = {"token_key": KEY, "enable_sticky": True, "sticky_default_ttl": 60.0, **options}
    return door.make_sync_client(make_sticky(server_id), **options)


def sessions_of(client: Any) -> Any:
    return client._app.sessions


def body_of(method: str, **values: Any) -> bytes:
    schema = core.rpc_methods(Sticky)[method].params_schema
    given = [pa.array([values[field.name]], field.type) for field in schema]
    batch = pa.RecordBatch.from_arrays(given, schema=schema) if given else core.empty_batch(schema)
    return stream(batch, {"vgi_rpc.method": method, "vgi_rpc.request_version": "1", "vgi_rpc.protocol": "Sticky"})


def post(client: Any, method: str, headers: Mapping[str, str] | None = None, suffix: str = "", **values: Any) -> Read:
    path = f"/Sticky/{method}{suffix}"
    return Read(
        client.post(path, content=body_of(method, **values), headers={"Content-Type": ARROW, **(headers or {})})
    )


def opened(client: Any, start: int = 10, who: str | None = None, ttl: float = 0.0) -> dict[str, str]:
    """Open a session; the headers with which its later requests are sent."""
    caller = {} if who is None else {PRINCIPAL: who}
    found = post(client, "open", {**ACCEPT, **caller}, start=start, ttl=ttl)
    assert (found.error, found.result) == ("", start)
    return {"VGI-Session": found.headers["VGI-Session"], **caller}


def lost(found: Read) -> None:
    assert (found.status, found.failed, found.error_kind, found.error_code) == (200, True, "session_lost", "ABORTED")
    assert found.error.startswith("SessionLostError: ")
    assert found.schemas == [core.EMPTY_SCHEMA]


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_used(number: int = 0) -> None:
    """Wait until a call uses the state that was made as the `number`-th."""
    wait_until(lambda: Tally.made[number]._using.locked())


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start `work` now; what is returned waits for its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def join() -> Any:
        thread.join(20)
        return results[0]

    return join


# ---- the wire


def test_headers() -> None:
    client = make_client(sticky_echo_headers={"X-VGI-Worker-Affinity": "one", "X-B": "2"})
    said = {
        "VGI-Sticky-Enabled": "true",
        "VGI-Sticky-Default-TTL": "60",
        "VGI-Sticky-Echo-Headers": "X-VGI-Worker-Affinity, X-B",
    }
    for answer in (client.get("/health"), client.get("/nowhere"), client.options("/health"), client.delete(DELETE)):
        assert {name: answer.headers.get(name) for name in said} == said
    known = door.http_capabilities(client=client)
    assert (known.sticky_enabled, known.sticky_default_ttl) == (True, 60)
    assert known.sticky_echo_headers == ("X-VGI-Worker-Affinity", "X-B")
    first = post(client, "open", {"VGI-Session-Accept": "TRUE"}, start=10, ttl=0.0)
    assert first.result == 10
    token = first.headers["VGI-Session"]
    assert set(token) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
    assert first.headers["VGI-Echo-X-VGI-Worker-Affinity"] == "one" and first.headers["VGI-Echo-X-B"] == "2"
    assert first.headers["Cache-Control"] == "no-store"
    added = post(client, "add", {"VGI-Session": token}, n=5)  # resumes without the accept header, too
    assert added.result == 15
    special = ("VGI-Session", "VGI-Session-Close", "VGI-Echo-X-B", "Cache-Control")
    assert [name for name in special if name in added.headers] == []
    closed = post(client, "close", {"VGI-Session": token})
    assert (closed.result, closed.headers["VGI-Session-Close"]) == (15, "true")
    lost(post(client, "add", {"VGI-Session": token}, n=1))
    assert [tally.closed for tally in Tally.made] == [1]
    without = post(client, "close")
    assert (without.result, without.headers["VGI-Session-Close"]) == (-1, "true")


def test_off() -> None:
    client = make_client(enable_sticky=False)
    token = opened(make_client())
    found = post(client, "open", {**ACCEPT, **token}, start=1, ttl=0.0)
    assert found.error == "RuntimeError: sticky sessions not available on this transport"
    assert post(client, "close", token).error == "RuntimeError: sticky sessions not available on this transport"
    assert post(client, "look", {"VGI-Session": "garbage"}).result == "None None"
    assert client.delete(DELETE, headers=token).status_code == 405
    reserved = Read(client.post(DELETE, headers={"Content-Type": ARROW}))
    assert (reserved.status, reserved.error_kind) == (404, "method_not_implemented")
    assert "VGI-Sticky-Enabled" not in client.get("/health").headers
    assert door.drain_handle(client._app) is None


def test_what_opening_asks_for() -> None:
    client = make_client()
    refused = post(client, "open", {"VGI-Session-Accept": "yes"}, start=1, ttl=0.0)
    assert "VGI-Session-Accept: true" in refused.error and refused.error.startswith("RuntimeError")
    token = opened(client)
    assert "open already" in post(client, "open", {**ACCEPT, **token}, start=1, ttl=0.0).error
    # Without the accept header that is what is missing, whatever else is wrong.
    assert "VGI-Session-Accept" in post(client, "open", token, start=1, ttl=0.0).error
    assert post(client, "add", token, n=1).result == 11


def test_the_last_word_counts() -> None:
    client = make_client(sticky_echo_headers={"X-A": "1"})
    failed = post(client, "open_and_fail", ACCEPT, start=3)
    assert failed.failed and failed.error == "ValueError: no luck"
    assert post(client, "add", {"VGI-Session": failed.headers["VGI-Session"]}, n=1).result == 4
    both = post(client, "open_and_close", ACCEPT, start=1)
    assert both.headers["VGI-Session-Close"] == "true"
    assert "VGI-Session" not in both.headers and "VGI-Echo-X-A" not in both.headers
    first = opened(client, 1)
    again = post(client, "reopen", {**ACCEPT, **first}, start=7)
    assert "VGI-Session-Close" not in again.headers and again.headers["VGI-Echo-X-A"] == "1"
    assert post(client, "add", {"VGI-Session": again.headers["VGI-Session"]}, n=1).result == 8
    lost(post(client, "add", first, n=1))
    threaded = post(client, "open_from_thread", ACCEPT, start=20)
    assert post(client, "add", {"VGI-Session": threaded.headers["VGI-Session"]}, n=1).result == 21
    refusing = post(client, "open_refusing", ACCEPT)
    assert post(client, "close", {"VGI-Session": refusing.headers["VGI-Session"]}).failed  # has no total
    assert client.delete(DELETE, headers={"VGI-Session": refusing.headers["VGI-Session"]}).status_code == 204


def test_a_context_is_good_for_its_call_only() -> None:
    impl = StickyImpl()
    client = door.make_sync_client(core.RpcServer(Sticky, impl), enable_sticky=True)
    token = opened(client)
    assert post(client, "keep_context", {**ACCEPT, **token}).error == ""
    assert (impl.kept.session, impl.kept.session_id) == (None, None)
    for act in (impl.kept.close_session, lambda: impl.kept.open_session(Tally(1))):
        with pytest.raises(RuntimeError, match="has ended"):
            act()
    assert post(client, "add", token, n=1).result == 11


GARBAGE = ["", "x", "A" * 60, "A" * 61, "%00", "a b", "A" * 5000, "\xff" * 40, "AQ==", "../..", "A,A"]


@pytest.mark.parametrize("token", GARBAGE)
def test_garbage_tokens(token: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vgi_rpc")
    client = make_client()
    fixed = {"X-Request-ID": "r", "VGI-Session": token}
    answer = client.post("/Sticky/plain", content=body_of("plain"), headers={"Content-Type": ARROW, **fixed})
    found = Read(answer)
    lost(found)
    with pa.ipc.open_stream(answer.content) as reader:
        _, metadata = reader.read_next_batch_with_custom_metadata()
    assert metadata[b"vgi_rpc.request_id"] == b"r"
    assert b"vgi_rpc.server_id" not in metadata
    assert "traceback" not in json.loads(metadata[b"vgi_rpc.log_extra"])
    assert client.get("/", headers=fixed).status_code == 200  # only the routes of methods look at it
    assert post(client, "plain").result == 1  # it did not run
    assert [r.__dict__["session_action"] for r in caplog.records if r.name == "vgi_rpc.access"] == ["none"]
    assert len(token) < 30 or token not in caplog.text


def test_tampered_tokens_and_those_of_others_are_garbage() -> None:
    client = make_client(authenticate=principals)
    mine = opened(client, who="alice")["VGI-Session"]
    other_key = opened(make_client(token_key=b"another key of 16", authenticate=principals), who="alice")
    tampered = [mine[:at] + ("A" if mine[at] != "A" else "B") + mine[at + 1 :] for at in range(0, len(mine), 7)]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    assert len(mine) % 4 == 2  # so that four bits of the last character mean nothing
    tampered.append(mine[:-1] + alphabet[alphabet.index(mine[-1]) ^ 1])
    padded = [mine + "=", mine + "A", mine[:-1], mine + "\t"]
    tokens_of_streams = post(client, "feed", {**ACCEPT, PRINCIPAL: "alice"}, "/init", start=1).tokens
    stream_tokens = [t.decode().rstrip("=").replace("+", "-").replace("/", "_") for t in tokens_of_streams.values()]
    cases = [{PRINCIPAL: "alice", "VGI-Session": token} for token in [*tampered, *padded, *stream_tokens, "x"]]
    cases += [{PRINCIPAL: "bob", "VGI-Session": mine}, {"VGI-Session": mine}, other_key]
    answers = set()
    for headers in cases:
        answer = client.post(
            "/Sticky/add", content=body_of("add", n=1), headers={"Content-Type": ARROW, "X-Request-ID": "r", **headers}
        )
        lost(Read(answer))
        answers.add((answer.content, tuple(sorted(answer.raw_headers))))
    assert len(answers) == 1
    # The claims are new in each request, as with a credential that was renewed.
    assert post(client, "add", {PRINCIPAL: "alice", "VGI-Session": mine}, n=1).result == 11
    gone = {PRINCIPAL: "nobody", "VGI-Session": mine}
    assert client.post("/Sticky/plain", content=b"", headers=gone).status_code == 401  # first who, then which session


def test_errors_in_order() -> None:
    client = make_client()
    lost(Read(client.post("/Sticky/none", headers={"Content-Type": "x", "VGI-Session": "x"})))
    found = client.post("/Nope/none", headers={"Content-Type": ARROW, **opened(client)})
    assert found.status_code == 404
    assert client.get("/Sticky/plain", headers={"VGI-Session": "x"}).status_code == 405
    assert client.post("/Sticky/plain", content=b"x", headers={"Content-Encoding": "br"}).status_code == 415


def test_peers_with_one_key() -> None:
    one, two = make_client("one"), make_client("two")
    token = opened(one)
    there = post(two, "add", token, n=1)
    lost(there)
    assert "another process" in there.error
    assert two.delete(DELETE, headers=token).status_code == 200
    assert post(one, "add", token, n=1).result == 11

    class Other(Protocol):
        def plain(self) -> int: ...

    renamed = core.RpcServer(Other, StickyImpl(), server_id="one", extra_protocols=[(Sticky, StickyImpl())])
    other = door.make_sync_client(renamed, token_key=KEY, enable_sticky=True)
    foreign = post(other, "add", token, n=1)
    lost(foreign)
    assert "not valid" in foreign.error  # a service that shares the key, but is another


# ---- DELETE


def test_delete_tells_nothing_but_to_the_owner() -> None:
    client = make_client(authenticate=principals)
    two = make_client("two", authenticate=principals)
    mine, gone = opened(client, who="alice"), opened(client, who="alice")
    assert post(client, "close", gone).error == ""
    tries: list[tuple[Any, dict[str, str]]] = [
        (client, {}),
        (client, {"VGI-Session": "garbage"}),
        (client, {**mine, PRINCIPAL: "bob"}),
        (client, {"VGI-Session": mine["VGI-Session"]}),
        (client, opened(two, who="alice")),
        (client, gone),
    ]
    fixed = {"X-Request-ID": "r"}
    answers = [asked.delete(DELETE, headers={**headers, **fixed}) for asked, headers in tries]
    found = client.delete(DELETE, headers=mine)
    assert (found.status_code, found.headers["VGI-Session-Close"], found.raw) == (204, "true", b"")
    answers.append(client.delete(DELETE, headers={**mine, **fixed}))  # repeated
    assert {(a.status_code, a.raw, tuple(sorted(a.raw_headers))) for a in answers} == {
        (200, b"", tuple(sorted(answers[0].raw_headers)))
    }
    lost(post(client, "add", mine, n=1))
    assert client.delete(DELETE, headers={PRINCIPAL: "nobody"}).status_code == 401
    for verb in ("GET", "POST", "PUT", "PATCH", "HEAD"):
        assert client.request(verb, DELETE, headers=mine).status_code == 405
    assert make_client(prefix="/api").delete(f"/api{DELETE}").status_code == 200


def test_delete_waits_for_the_call() -> None:
    client = make_client()
    token = opened(client)
    held = in_thread(lambda: post(client, "hold", token, seconds=0.4))
    until_used()
    assert client.delete(DELETE, headers=token).status_code == 204  # in use, it could not be closed: see no_faults
    assert Tally.made[0].closed == 1 and held().result == 10


def held_for_long() -> tuple[Any, dict[str, str], Callable[[], Any]]:
    """A client, a session of its whose state a call uses for longer than others wait, and that call's result."""
    client = make_client()
    sessions_of(client).lock_seconds = 0.1
    token = opened(client)
    held = in_thread(lambda: post(client, "hold", token, seconds=0.8))
    until_used()
    return client, token, held


def test_delete_of_what_is_long_in_use() -> None:
    client, token, held = held_for_long()
    assert client.delete(DELETE, headers=token).status_code == 204
    assert Tally.made[0].closed == 0
    lost(post(client, "add", token, n=1))  # over for everybody else
    assert held().result == 10
    assert Tally.made[0].closed == 1
    assert sessions_of(client).count == 0


# ---- time


def test_what_has_expired_is_closed_without_a_request() -> None:
    client = make_client(sticky_default_ttl=3000.0)
    token = opened(client)
    kept = opened(client, ttl=4000.0)
    ending, staying = sessions_of(client)._all()
    assert 2900 < ending.ends - time.monotonic() <= 3000 < 3900 < staying.ends - time.monotonic()
    ending.ends = time.monotonic()
    wait_until(lambda: Tally.made[0].closed == 1, 20)
    assert Tally.made[0].closed_by == "vgi_rpc-sessions"
    found = post(client, "add", token, n=1)
    lost(found)
    assert "expired" in found.error
    assert post(client, "add", kept, n=1).result == 11 and Tally.made[1].closed == 0
    assert client.delete(DELETE, headers=kept).status_code == 204
    wait_until(lambda: sessions_of(client)._reaper is None)  # nothing to look after: the thread has ended
    assert client.delete(DELETE, headers=opened(client)).status_code == 204  # and begins anew


def test_time_runs_out_in_the_middle_of_a_method() -> None:
    client = make_client()
    token = opened(client, ttl=3000.0)
    (session,) = sessions_of(client)._all()

    def hold() -> tuple[Read, str]:
        return post(client, "hold", token, seconds=0.4), threading.current_thread().name

    holding = in_thread(hold)
    until_used()
    waiting = in_thread(lambda: post(client, "add", token, n=1))
    session.ends = time.monotonic()  # the thread that closes looks several times
    held, name = holding()
    assert held.result == 10
    lost(waiting())
    tally = Tally.made[0]
    assert tally.closed == 1 and tally.closed_by == name


def test_sessions_are_not_prolonged() -> None:
    client = make_client()
    token = opened(client, ttl=3000.0)
    (session,) = sessions_of(client)._all()
    ends = session.ends
    for _ in range(10):
        assert post(client, "add", token, n=1).error == ""
    assert session.ends == ends
    session.ends = time.monotonic()
    lost(post(client, "add", token, n=1))


def test_the_token_says_when_it_ends() -> None:
    client = make_client()
    token = opened(client, ttl=0.2)
    (session,) = sessions_of(client)._all()
    session.ends += 60
    time.sleep(0.25)
    lost(post(client, "add", token, n=1))


# ---- one at a time


def test_calls_of_one_session_queue_and_those_of_two_do_not() -> None:
    client = make_client()
    one, two = opened(client, 1), opened(client, 2)
    began = time.monotonic()
    calls = [in_thread(lambda: post(client, "hold", one, seconds=0.2)) for _ in range(2)]
    assert [call().result for call in calls] == [1, 1]
    assert time.monotonic() - began > 0.39
    held = in_thread(lambda: post(client, "hold", one, seconds=0.8))
    until_used()
    assert post(client, "add", two, n=1).result == 3
    assert Tally.made[0]._using.locked()  # the other one goes on all the while
    assert held().result == 1
    adds = [in_thread(lambda: [post(client, "add", one, n=1).error for _ in range(40)]) for _ in range(2)]
    assert all(add() == [""] * 40 for add in adds)
    assert Tally.made[0].total == 81


def test_what_waits_for_a_session_that_is_closed_does_not_run() -> None:
    client = make_client()
    token = opened(client)
    closing = in_thread(lambda: post(client, "hold_and_close", token, seconds=0.8))
    until_used()
    waiting = in_thread(lambda: post(client, "add", token, n=1))
    assert closing().result == 10
    found = waiting()
    lost(found)
    assert "while this call waited" in found.error
    assert Tally.made[0].total == 10


def test_one_call_waits_for_a_session_and_no_more() -> None:
    client = make_client()
    token, other = opened(client, 1), opened(client, 2)
    running = in_thread(lambda: post(client, "hold", token, seconds=1.5))
    until_used()
    session = next(one for one in sessions_of(client)._all() if one.lock.locked())
    waiting = in_thread(lambda: post(client, "add", token, n=1))
    deadline = time.monotonic() + 5
    while not session.waiting.locked() and time.monotonic() < deadline:
        time.sleep(0.005)
    began = time.monotonic()
    for _ in range(5):
        found = post(client, "add", token, n=1)
        assert (found.failed, found.error_code) == (True, "UNAVAILABLE")
        assert "another one waits for it" in found.error
    assert post(client, "add", other, n=1).result == 3
    assert time.monotonic() - began < 1
    assert (running().result, waiting().result) == (1, 2)
    assert post(client, "add", token, n=1).result == 3


def test_waiting_has_an_end() -> None:
    client, token, held = held_for_long()
    found = post(client, "add", token, n=1)
    assert (found.status, found.error_kind, found.error_code) == (200, "session_lost", "UNAVAILABLE")
    assert "in use" in found.error
    assert held().result == 10
    assert post(client, "add", token, n=1).result == 11  # it is not lost for good


def test_a_method_that_calls_its_own_session() -> None:
    class Calling(StickyImpl):
        token: dict[str, str]

        def hold(self, seconds: float, ctx: Any) -> int:
            inner.append(post(client, "add", self.token, n=1))
            return 1

    inner: list[Read] = []
    impl = Calling()
    client = door.make_sync_client(core.RpcServer(Sticky, impl), enable_sticky=True)
    sessions_of(client).lock_seconds = 0.1
    impl.token = opened(client)
    assert post(client, "hold", impl.token, seconds=0.0).result == 1
    assert inner[0].error_code == "UNAVAILABLE"
    assert post(client, "add", impl.token, n=1).result == 11


def test_the_lock_is_given_back_whatever_happens() -> None:
    client = make_client(max_response_bytes=65_536)
    token = opened(client)
    sessions_of(client).lock_seconds = 0.2
    for path, content, headers in (
        ("/Sticky/none", b"", {}),
        ("/Sticky/add", b"garbage", {}),
        ("/Sticky/add", body_of("add", n=1), {"Content-Type": "text/plain"}),
        ("/Sticky/add", body_of("add", n=1), {"VGI-Accept-Max-Response-Bytes": "no"}),
        ("/Sticky/feed/exchange", turn({}, 1), {}),
        ("/Sticky/add/init", body_of("add", n=1), {}),
        ("/Sticky/blob", body_of("blob", size=100_000), {}),
        ("/__call__", b"{}", {"Content-Type": "application/json"}),
    ):
        client.post(path, content=content, headers={"Content-Type": ARROW, **token, **headers})
    assert post(client, "add", token, n=1).result == 11


# ---- streams, JSON


def test_streams() -> None:
    client = make_client()
    first = post(client, "feed", ACCEPT, "/init", start=100)
    token = {"VGI-Session": first.headers["VGI-Session"]}
    sent = {"Content-Type": ARROW, **token}
    found = Read(client.post("/Sticky/feed/exchange", content=turn(first.tokens, 5), headers=sent))
    assert found.numbers == [105]
    counted = post(client, "count", token, "/init", end=107)
    assert counted.numbers == [106]
    counted = Read(client.post("/Sticky/count/exchange", content=turn(counted.tokens), headers=sent))
    assert counted.numbers == [107]
    alone = Read(client.post("/Sticky/feed/exchange", content=turn(first.tokens, 5), headers={"Content-Type": ARROW}))
    assert alone.error == "LookupError: no session"
    cancel = client.post("/Sticky/feed/exchange", content=turn(first.tokens, **{"vgi_rpc.cancel": "1"}), headers=sent)
    assert (cancel.status_code, cancel.headers["VGI-Session-Close"]) == (200, "true")
    assert Tally.made[0].closed == 1
    lost(Read(client.post("/Sticky/feed/exchange", content=turn(first.tokens, 5), headers=sent)))


def test_json_calls() -> None:
    server = core.RpcServer(Sticky, StickyImpl(), enable_describe=True)
    client = door.make_sync_client(server, enable_sticky=True)

    def ask(method: str, headers: Mapping[str, str], **args: Any) -> Any:
        content = json.dumps({"protocol": "Sticky", "method": method, "args": args}).encode()
        return client.post("/__call__", content=content, headers={"Content-Type": "application/json", **headers})

    first = ask("open", ACCEPT, start=3, ttl=0.0)
    token = {"VGI-Session": first.headers["VGI-Session"]}
    assert json.loads(ask("add", token, n=1).content) == {"result": 4}
    refused = ask("add", {"VGI-Session": "x"}, n=1)
    assert (refused.status_code, json.loads(refused.content)["error"]["code"]) == (409, "ABORTED")


# ---- bounds


def test_how_many_may_be_open() -> None:
    client = make_client(authenticate=principals, sticky_max_sessions=4, sticky_max_per_principal=2)
    anonymous, alice = opened(client), opened(client, who="alice")
    opened(client, who="alice")
    found = post(client, "open", {**ACCEPT, PRINCIPAL: "alice"}, start=1, ttl=0.0)
    assert found.error_code == "RESOURCE_EXHAUSTED" and "sticky_max_per_principal" in found.error
    assert "VGI-Session" not in found.headers
    opened(client, who="bob")
    found = post(client, "open", {**ACCEPT, PRINCIPAL: "carol"}, start=1, ttl=0.0)
    assert found.error_code == "RESOURCE_EXHAUSTED" and "sticky_max_sessions" in found.error
    assert post(client, "close", alice).result == 10
    assert client.delete(DELETE, headers=anonymous).status_code == 204
    opened(client, who="alice")
    assert sessions_of(client).count == 3
    assert sum(sessions_of(client)._owned.values()) == 3 and len(sessions_of(client)._owned) == 2


@pytest.mark.parametrize("ttl", [-1.0, 11.0, float("nan"), float("inf"), 1e300])
def test_how_long_a_session_may_last(ttl: float) -> None:
    client = make_client(sticky_default_ttl=5.0, sticky_max_ttl=10.0)
    found = post(client, "open", ACCEPT, start=1, ttl=ttl)
    assert found.error.startswith("ValueError: ttl must be a number of seconds above 0 and at most 10")
    assert sessions_of(client).count == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sticky_default_ttl": 0}, "sticky_default_ttl"),
        ({"sticky_default_ttl": True}, "sticky_default_ttl"),
        ({"sticky_default_ttl": 90_000.0}, "at most 86400"),
        ({"sticky_max_ttl": float("inf")}, "sticky_max_ttl"),
        ({"sticky_max_sessions": 0}, "sticky_max_sessions"),
        ({"sticky_max_per_principal": 1.5}, "sticky_max_per_principal"),
        ({"sticky_echo_headers": {"X-A": "1\r\nX-B: 2"}}, "X-A"),
        ({"sticky_echo_headers": {"X A": "1"}}, "X A"),
        ({"sticky_echo_headers": {"Authorization": "1"}}, "Authorization"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_client(**options)


def test_server_ids_have_a_length() -> None:
    with pytest.raises(ValueError, match="255"):
        make_client("x" * 256)
    client = make_client("\xe4" * 127)
    assert post(client, "add", opened(client), n=1).result == 11


def test_scripts_may_see_the_headers() -> None:
    app = door.make_wsgi_app(
        make_sticky(), token_key=KEY, cors_origins="*", enable_sticky=True, sticky_echo_headers={"X-A": "1"}
    )
    shown = (
        door.TestClient(app).get("/health", headers={"Origin": "https://x"}).headers["Access-Control-Expose-Headers"]
    )
    for name in ("VGI-Session", "VGI-Session-Close", "VGI-Echo-X-A", "VGI-Sticky-Enabled"):
        assert name in shown.split(", ")


# ---- records


def test_access_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vgi_rpc.access")
    client = make_client()
    token = opened(client)
    post(client, "add", token, n=1)
    name = post(client, "look", token).result.split()[0]
    post(client, "close", token)
    post(client, "close")
    post(client, "plain")
    post(client, "open_and_fail", ACCEPT, start=1)
    records = [r.__dict__ for r in caplog.records if r.name == "vgi_rpc.access"]
    found = [(r["session_action"], r.get("session_id")) for r in records]
    assert len(name) == 24 and set(name) <= set("0123456789abcdef")
    assert found[:6] == [
        ("open", name),
        ("resume", name),
        ("resume", name),
        ("close", name),
        ("close", None),
        ("none", None),
    ]
    assert found[6][0] == "open" and found[6][1] != name and records[6]["http_status"] == 500
    assert token["VGI-Session"] not in str(records)
    caplog.clear()
    post(make_client(enable_sticky=False), "plain")
    assert "session_action" not in caplog.records[-1].__dict__


def test_close_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    client = make_client()
    token = {"VGI-Session": post(client, "open_refusing", ACCEPT).headers["VGI-Session"]}
    assert client.delete(DELETE, headers=token).status_code == 204
    assert "will not close" in caplog.text and token["VGI-Session"] not in caplog.text


# ---- the end


def test_drain_and_shutdown() -> None:
    client = make_client()
    handle = door.drain_handle(client._app)
    assert handle is not None and not handle.is_draining()
    token, busy = opened(client), opened(client)
    handle.drain()
    assert handle.is_draining()
    refused = post(client, "open", ACCEPT, start=1, ttl=0.0)
    assert (refused.error_kind, refused.error_code) == ("server_draining", "UNAVAILABLE")
    assert post(client, "add", token, n=1).result == 11 and post(client, "plain").error == ""
    held = in_thread(lambda: post(client, "hold", busy, seconds=0.8))
    until_used(1)
    handle.shutdown()
    assert [tally.closed for tally in Tally.made[:2]] == [1, 0]
    lost(post(client, "add", token, n=1))
    assert held().result == 10
    assert [tally.closed for tally in Tally.made[:2]] == [1, 1]
    with http(client) as proxy, proxy.with_session_token() as view:
        with pytest.raises(core.RpcError, match="shutting down") as caught:
            view.open(1)
        assert (caught.value.error_kind, caught.value.error_code) == ("server_draining", "UNAVAILABLE")
        assert caught.value.error_details == [{"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 1}]


FORK = """
import os, sys, time
from tests.extras.test_http_sticky import *
extra("sessions")._TICK_SECONDS = 0.1
client = make_client()
token = opened(client)
sessions = sessions_of(client)
read, write = os.pipe()
sessions._guard.acquire()  # as if another thread had been in the middle of something
pid = os.fork()
if pid:
    sessions._guard.release()
else:
    try:
        lost(post(client, "add", token, n=1))
        assert sessions.count == 0 and sessions._reaper is None
        mine = opened(client, 50, ttl=0.8)
        assert post(client, "add", mine, n=1).result == 51
        wait_until(lambda: Tally.made[1].closed == 1)  # it has a thread of its own
        handle = door.drain_handle(client._app)
        handle.shutdown()
        assert Tally.made[0].closed == 0
        os.write(write, b"good")
    finally:
        os._exit(0)
os.close(write)
assert os.read(read, 9) == b"good"
os.waitpid(pid, 0)
assert post(client, "add", token, n=1).result == 11
print("done")
"""


def test_fork() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FORK],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.stdout == "done\n", ran.stderr


def test_fly(monkeypatch: pytest.MonkeyPatch) -> None:
    module = extra("sessions")
    monkeypatch.setattr(module, "FLY_MACHINE_ID", None)
    assert (module.auto_server_id(), module.fly_sticky_echo_headers()) == (None, None)
    monkeypatch.setattr(module, "FLY_MACHINE_ID", "m1")
    assert module.auto_server_id() == "m1"
    assert module.fly_sticky_echo_headers() == {"fly-force-instance-id": "m1"}
    make_client(sticky_echo_headers=module.fly_sticky_echo_headers())


# ---- the client


@dataclasses.dataclass
class Recorder:
    """A test client that remembers what it was asked, and may add headers to the answers."""

    inner: Any
    sent: list[tuple[str, str, dict[str, str]]] = dataclasses.field(default_factory=list)
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix = ""

    def _ask(self, verb: str, url: str, headers: Mapping[str, str], content: bytes = b"") -> Any:
        self.sent.append((verb, url, dict(headers)))
        answer = self.inner.request(verb, url, content=content, headers=headers)
        answer.headers = {**answer.headers, **self.extra}
        return answer

    def post(self, url: str, *, content: bytes, headers: Mapping[str, str]) -> Any:
        return self._ask("POST", url, headers, content)

    def options(self, url: str, *, headers: Mapping[str, str]) -> Any:
        return self._ask("OPTIONS", url, headers)

    def delete(self, url: str, *, headers: Mapping[str, str]) -> Any:
        return self._ask("DELETE", url, headers)

    def last(self, name: str) -> str | None:
        return self.sent[-1][2].get(name)


def http(client: Any, **options: Any) -> Any:
    return door.http_connect(Sticky, client=client, **options)


def test_lane() -> None:
    client = make_client(sticky_echo_headers={"X-VGI-Worker-Affinity": "one"})
    with http(client) as proxy, proxy.with_session_token() as view:
        assert view.current_session_token() is None and dict(view.current_echo_headers()) == {}
        assert view.open(10) == 10
        stale = view.current_session_token()
        assert stale and dict(view.current_echo_headers()) == {"x-vgi-worker-affinity": "one"}
        with pytest.raises(TypeError):
            view.current_echo_headers()["x"] = "y"
        assert view.add(5) == 15
        assert view.add(n=-2) == 13
        assert view.close() == 13
        assert view.current_session_token() is None and dict(view.current_echo_headers()) == {}
        with proxy.with_session_token(stale) as old, pytest.raises(core.RpcError) as caught:
            old.add(1)
        assert (caught.value.error_type, caught.value.error_kind) == ("SessionLostError", "session_lost")
        assert view.open(1) == 1  # a view may have one session after the other
    assert [tally.closed for tally in Tally.made] == [1, 1]


def test_views_are_apart() -> None:
    recorder = Recorder(make_client())
    with http(recorder) as proxy:
        one, two = door.with_session_token(proxy), door.with_session_token(proxy)
        with one as first, two as second:
            first.open(1)
            second.open(2)
            assert (first.add(1), second.add(1), first.add(1)) == (2, 3, 3)
            assert one.current_session_token() != two.current_session_token()
            with pytest.raises(core.RpcError, match="no session"):
                proxy.add(1)
            assert not {name for name in recorder.sent[-1][2] if "session" in name.lower()}
            with first.with_session_token() as inner:  # of a view: a session of its own
                assert inner.look() == "None None"
            slow = core.with_options(first, timeout=5)
            assert slow.add(1) == 4
            assert slow.current_session_token() == one.current_session_token()
        for ended in (first, second, slow):
            with pytest.raises(core.RpcError, match="has ended") as caught:
                ended.plain()
            assert caught.value.sent == "no"
        assert proxy.plain() > 0
        with pytest.raises(RuntimeError, match="once"), one:
            pass
    assert [tally.closed for tally in Tally.made] == [1, 1]
    assert all("VGI-Session" not in headers for verb, _, headers in recorder.sent if verb == "OPTIONS")


def test_every_request_of_a_view_has_its_headers() -> None:
    recorder = Recorder(make_client(sticky_echo_headers={"X-Route": "one", "X-Mine": "theirs"}))
    with http(recorder, headers={"x-mine": "mine"}, accepted_max_response_bytes=70_000) as proxy:
        with proxy.with_session_token() as view:
            view.open(10)
            token = view.current_session_token()
            assert dict(view.current_echo_headers()) == {"x-route": "one"}  # the caller's own headers win
            assert [batch.batch["n"].to_pylist() for batch in view.count(12)] == [[11], [12]]
            with view.feed(0) as session:
                assert session.exchange(core.AnnotatedBatch(numbers(1))).batch["n"].to_pylist() == [13]
            with pytest.raises(core.RpcError, match="max_response_bytes"):
                view.blob(80_000)
        after = recorder.sent[2:]
        assert [entry[0] for entry in recorder.sent[:2]] == ["OPTIONS", "POST"]
        assert all(entry[2]["VGI-Session-Accept"] == "true" for entry in recorder.sent)
        assert "VGI-Session" not in recorder.sent[1][2]
        assert len(after) >= 6 and after[-1][:2] == ("DELETE", "/__session__")
        for _, _, headers in after:
            assert headers["VGI-Session"] == token and headers["x-route"] == "one" and headers["x-mine"] == "mine"
            assert headers["VGI-Accept-Max-Response-Bytes"] == "70000" and "X-Mine" not in headers
        proxy.plain()
        assert not {"VGI-Session", "VGI-Session-Accept", "x-route"} & recorder.sent[-1][2].keys()
    assert Tally.made[0].closed == 1


def test_a_session_is_handed_over() -> None:
    client = make_client()
    with http(client) as proxy:
        manager = door.with_session_token(proxy)
        with manager as view:
            view.open(10)
            token = manager.detach()
        with proxy.with_session_token() as nothing:
            assert nothing.detach() is None
    assert Tally.made[0].closed == 0
    with http(client) as elsewhere:
        with pytest.raises(ZeroDivisionError), elsewhere.with_session_token(token) as view:
            assert view.add(5) == 15
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="not a session token"):
            elsewhere.with_session_token("x\r\nCookie: y")
    assert Tally.made[0].closed == 1  # the block ends it, whatever has happened in it


def test_leaving_swallows_what_goes_wrong() -> None:
    recorder = Recorder(make_client())
    with http(recorder) as proxy:
        with proxy.with_session_token() as view:
            view.open(1)
            recorder.delete = None  # type: ignore[assignment, method-assign]
        with proxy.with_session_token() as view:
            view.open(2)
            proxy._transport.close()


def test_a_server_may_not_have_everything_sent() -> None:
    recorder = Recorder(make_client())
    banned = (
        "Host|Authorization|Cookie|Content-Type|Content-Length|VGI-Session|VGI-Accept-Max-Response-Bytes|Connection"
    )
    banned += "|Transfer-Encoding|TE|Upgrade|Proxy-Authorization|Keep-Alive|Accept-Encoding|X-VGI-Accept-Encoding"
    recorder.extra = {f"vgi-echo-{name.lower()}": "evil" for name in banned.split("|")}
    recorder.extra |= {
        "vgi-echo-": "x",
        "vgi-echo-a b": "x",
        "vgi-echo-x-inject": "1\r\nCookie: y",
        "vgi-echo-x-null": "\0",
        "vgi-echo-x-long": "x" * 2000,
        "vgi-echo-x-umlaut": "\xe4",
        "vgi-echo-x-good": "1",
    }
    with http(recorder, headers={"Authorization": "Bearer mine"}) as proxy, proxy.with_session_token() as view:
        view.open(1)
        assert dict(view.current_echo_headers()) == {"x-good": "1"}
        view.add(1)
        sent = recorder.sent[-1][2]
        assert "evil" not in sent.values() and sent["Authorization"] == "Bearer mine"
        recorder.extra = {f"vgi-echo-x-{number}": "1" for number in range(100)} | {"vgi-session": "other"}
        view.plain()
        assert len(view.current_echo_headers()) == 16
        recorder.extra = {"vgi-session": "a b"}
        view_token = view.current_session_token()
        assert view_token == "other"
        with pytest.raises(core.RpcError, match="not valid"):
            view.plain()
        assert view.current_session_token() == "other"


def test_headers_of_an_httpx_client_stay_its_own() -> None:
    app = make_client(sticky_echo_headers={"X-Api-Key": "theirs", "X-Route": "one"})._app
    seen: list[dict[str, str]] = []

    def watch(request: httpx.Request) -> None:
        seen.append(dict(request.headers))

    with (
        httpx.Client(
            transport=httpx.WSGITransport(app=app),
            base_url="http://test",
            headers={"X-Api-Key": "mine"},
            event_hooks={"request": [watch]},
        ) as client,
        http(client) as proxy,
    ):
        with proxy.with_session_token() as view:
            view.open(1)
            assert view.add(1) == 2
        assert seen[-1]["x-route"] == "one" and {headers["x-api-key"] for headers in seen} == {"mine"}
    assert Tally.made[0].closed == 1


def test_a_late_answer_says_nothing_of_a_newer_session() -> None:
    session = door.with_session_token(object(), "new")
    session.learn("old", {"vgi-session-close": "true"})
    assert session.current_session_token() == "new"
    session.learn("new", {"vgi-session-close": "true"})
    assert session.current_session_token() is None
    session.learn(None, {"vgi-session": "next", "vgi-session-close": "true"})
    assert session.current_session_token() is None


def test_only_over_http() -> None:
    class Plain:
        def plain(self) -> int:
            return 1

    with core.serve_pipe(Sticky, StickyImpl()) as proxy:
        with pytest.raises(AttributeError, match="with_session_token"):
            _ = proxy.with_session_token  # type: ignore[attr-defined]
        with pytest.raises(TypeError, match="HTTP"), door.with_session_token(proxy):
            pass
        with pytest.raises(core.RpcError, match="not available on this transport"):
            proxy.open(1)
    with pytest.raises(TypeError, match="expected a proxy"), door.with_session_token(Plain()):
        pass
    with http(make_client()) as proxy, pytest.raises(AttributeError, match="detach"):
        _ = proxy.detach


def test_uploads_carry_no_session() -> None:
    from tests.extras.storage_server import anything, running_store
    from tests.extras.test_storage_store import config_of

    storage = importlib.import_module(f"{door.__name__.rpartition('.')[0]}.storage")
    server = core.RpcServer(Sticky, StickyImpl(), external_location=config_of(None))
    with running_store() as store:
        inner = door.make_sync_client(
            server,
            enable_sticky=True,
            sticky_echo_headers={"X-Route": "route-one"},
            max_request_bytes=50_000,
            upload_url_provider=store,
        )
        recorder = Recorder(inner)
        config = storage.ClientExternalConfig(url_validator=anything)
        with (
            http(recorder, external_location=config, compression_level=None) as proxy,
            proxy.with_session_token() as view,
        ):
            view.open(1)
            assert view.take(b"x" * 200_000) == 200_000
            token = view.current_session_token()
        assert any(url.endswith("/__upload_url__/init") for _, url, _ in recorder.sent)
        assert "PUT" in store.verbs() and token
        assert [asked for asked in store.asked if token in str(asked) or "route-one" in str(asked)] == []
        assert [asked for asked in store.asked if "vgi-session" in str(asked).lower()] == []


# ---- real servers

SERVE = ("-m", "tests.extras.sticky_service")


def connect(port: int) -> Any:
    return door.http_connect(Sticky, f"http://127.0.0.1:{port}", timeout=10)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """Two processes with one key: their ports, and the file where they note what is closed."""
    log = tmp_path_factory.mktemp("sticky") / "log"
    log.touch()
    with process(*SERVE, "one", str(log)) as (_, one), process(*SERVE, "two", str(log)) as (_, two):
        yield one, two, log


def test_real_sockets_and_two_peers(peers: tuple[int, int, Path]) -> None:
    one, two, log = peers
    with connect(one) as proxy, proxy.with_session_token() as view:
        assert view.open(10) == 10 and view.add(5) == 15
        token = view.current_session_token()
        with (
            connect(two) as other,
            other.with_session_token(token) as wrong,
            pytest.raises(core.RpcError, match="another process"),
        ):
            wrong.add(1)
        assert view.add(1) == 16  # the wrong peer's DELETE ended nothing
        with connect(one) as again, again.with_session_token(token) as same:
            assert same.add(1) == 17
    assert "closed 17 in " in log.read_text()
    with connect(one) as proxy, proxy.with_session_token() as view:
        view.open(99, ttl=0.2)
        wait_until(lambda: "closed 99" in log.read_text(), 4)
        with pytest.raises(core.RpcError) as caught:
            view.add(1)
        assert caught.value.error_kind == "session_lost"


def test_sessions_go_on_while_the_server_drains(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(*SERVE, "one", str(log)) as (found, port), connect(port) as proxy:
        with proxy.with_session_token() as view:
            view.open(10)
            found.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert view.add(1) == 11
            with connect(port) as late, late.with_session_token() as other:
                with pytest.raises(core.RpcError) as caught:
                    other.open(1)
                assert caught.value.error_kind == "server_draining"
            with pytest.raises(core.RpcError) as refused:
                proxy.plain()
            assert refused.value.status_code == 503  # type: ignore[attr-defined]
            assert found.poll() is None
        assert found.wait(10) == 0  # the last session has ended
    assert log.read_text().startswith("closed 11 in ")


def test_a_drain_has_an_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process(*SERVE, "one", str(log), GRACE="0.5") as (found, port), connect(port) as proxy:
        manager = door.with_session_token(proxy)
        with manager as view:
            view.open(10)
            manager.detach()
        found.send_signal(signal.SIGTERM)
        assert found.wait(10) == 0
    assert log.read_text() == f"closed 10 in {found.pid}\n"


STEERED = """
  upstream any {{ server 127.0.0.1:{one}; server 127.0.0.1:{two}; }}
  map $http_x_vgi_worker_affinity $replica {{
    default any;
    one 127.0.0.1:{one};
    two 127.0.0.1:{two};
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://$replica; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
"""


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_echo_headers_steer_a_proxy(tmp_path: Path, peers: tuple[int, int, Path]) -> None:
    one, two, log = peers
    with nginx(tmp_path, STEERED, one, two) as port, connect(port) as proxy:
        assert len({proxy.pid() for _ in range(8)}) == 2
        homes = set()
        for start in range(6):
            with proxy.with_session_token() as view:
                view.open(1000 + 100 * start)
                homes.add(view.current_echo_headers()["x-vgi-worker-affinity"])
                assert len({view.pid() for _ in range(4)}) == 1
                assert [view.add(1) for _ in range(4)] == [1000 + 100 * start + n for n in range(1, 5)]
        assert homes == {"one", "two"}
    found = log.read_text()
    assert [start for start in range(6) if f"closed {1004 + 100 * start} in" not in found] == []  # DELETE found its way
