"""Sentry: a real SDK whose events arrive at a server on loopback."""

# ruff: noqa: E402 (what may be missing is looked for first)
from __future__ import annotations

import contextlib
import gzip
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pytest

sentry_sdk: Any = pytest.importorskip("sentry_sdk")
pytest.importorskip("falcon")
from sentry_sdk.integrations.logging import LoggingIntegration

from tests.extras.served import served_proxy

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

from tests.extras.http_service import Impl as HttpImpl
from tests.extras.http_service import Service as HttpService

NUMBERS = pa.schema([pa.field("n", pa.int64())])


class Teapot(Exception):
    error_code = "NOT_FOUND"


class Unlucky(core.ProducerState):
    def produce(self, out: Any, ctx: Any) -> None:
        raise ValueError("unlucky")


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def fail(self, kind: str, api_key: str, sizes: list[int]) -> float: ...
    def count(self) -> core.Stream[core.ProducerState]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def fail(self, kind: str, api_key: str, sizes: list[int]) -> float:
        if kind == "exit":
            raise SystemExit(3)
        if kind == "client":
            raise Teapot("short and stout")
        if kind == "late":
            raise core.DeadlineExceededError("too slow")
        raise ValueError("no luck")

    def count(self) -> core.Stream[Unlucky]:
        return core.Stream(NUMBERS, Unlucky())


class Inbox:
    """What has arrived, item by item of the envelopes."""

    def __init__(self) -> None:
        self.items: list[tuple[str, dict[str, Any]]] = []
        self.text = ""

    def receive(self, body: bytes) -> None:
        self.text += body.decode()
        lines = body.split(b"\n")
        for head, payload in zip(lines[1::2], lines[2::2], strict=False):
            self.items.append((json.loads(head)["type"], json.loads(payload)))

    def found(self, kind: str = "event") -> list[dict[str, Any]]:
        sentry_sdk.flush(10)
        return [item for of, item in self.items if of == kind]


class Receiver(BaseHTTPRequestHandler):
    inbox: Inbox

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.inbox.receive(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        pass


Start = Callable[..., Inbox]


@pytest.fixture
def start() -> Iterator[Start]:
    """Initialises the SDK with options; gives what its server receives."""
    with contextlib.ExitStack() as ends:

        def begin(**options: Any) -> Inbox:
            inbox = Inbox()
            listener = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Receiver,), {"inbox": inbox}))
            listener.daemon_threads = True
            thread = threading.Thread(target=listener.serve_forever, args=(0.05,))
            thread.start()
            options = {"dsn": f"http://public@127.0.0.1:{listener.server_port}/1", **options}
            sentry_sdk.init(default_integrations=False, auto_enabling_integrations=False, **options)

            def end() -> None:
                sentry_sdk.get_client().close(5)
                sentry_sdk.get_global_scope().set_client(None)
                listener.shutdown()
                thread.join(10)
                listener.server_close()

            ends.callback(end)
            return inbox

        yield begin


def sentry() -> Any:
    loaded: Any = core
    return sys.modules[loaded.SentryConfig.__module__]


def serving(server: core.RpcServer, auth: Any = None) -> Any:
    """A proxy of the server over a pipe."""
    return served_proxy(Calc, server, auth=auth)


def connected(kind: str, server: core.RpcServer) -> Any:
    """A proxy of the server over a pipe or HTTP."""
    door: Any = core
    if kind == "pipe":
        return serving(server)
    testing = sys.modules[door.make_wsgi_app.__module__.rpartition(".")[0]]
    return door.http_connect(Calc, client=testing.make_sync_client(server))


def fail(proxy: Any, kind: str = "server") -> None:
    with pytest.raises(core.RpcError):
        proxy.fail(kind, "hunter2", [1, 2])


def make(**options: Any) -> core.RpcServer:
    server: core.RpcServer = sentry().instrument_server_sentry(
        core.RpcServer(Calc, Impl(), server_id="s1"), sentry().SentryConfig(**options)
    )
    return server


def test_attached_by_itself_when_the_sdk_is_initialised(start: Start) -> None:
    assert core.RpcServer(Calc, Impl()).dispatch_hooks == ()
    inbox = start()
    server = core.RpcServer(Calc, Impl(), server_id="s1")
    assert len(server.dispatch_hooks) == 1
    with serving(server) as proxy:
        proxy.add(1.0, 2.0)
        for kind in ("client", "late", "server"):
            fail(proxy, kind)
    (event,) = inbox.found()
    assert event["exception"]["values"][0]["value"] == "no luck"
    assert event["transaction"] == "rpc fail"
    assert event["tags"] == {
        "rpc.method": "fail",
        "rpc.method_type": "unary",
        "auth.domain": "",
        "auth.authenticated": "false",
    }
    assert event["contexts"]["rpc"] == {
        "method": "fail",
        "method_type": "unary",
        "service": "Calc",
        "server_id": "s1",
    }
    assert "user" not in event
    assert inbox.found("transaction") == [], "performance is off by default"


def test_an_explicit_configuration_wins(start: Start) -> None:
    inbox = start()
    server = core.RpcServer(Calc, Impl())
    (by_default,) = server.dispatch_hooks
    sentry().instrument_server_sentry(server, sentry().SentryConfig(enable_error_capture=False))
    (explicit,) = server.dispatch_hooks
    assert explicit is not by_default
    sentry().attach_by_default(server)
    assert server.dispatch_hooks == (explicit,)
    with serving(server) as proxy:
        fail(proxy)
    assert inbox.found() == []
    with pytest.raises(TypeError, match="expected a SentryConfig, got dict"):
        sentry().instrument_server_sentry(server, {})


def test_without_an_initialised_sdk_nothing_happens() -> None:
    assert not sentry_sdk.is_initialized()
    with serving(make()) as proxy:
        assert proxy.add(1.0, 2.0) == 3.0
        fail(proxy)


def test_who_called_and_what_is_tagged(start: Start) -> None:
    inbox = start()
    claims = {"preferred_username": "ann", "email": 5, "tenant": "acme", "roles": ["a"], "long": "x" * 500}
    auth = core.AuthContext("jwt", True, "user-1", claims)
    server = make(custom_tags={"team": "blue"}, claim_tags={"tenant": "app.tenant", "roles": "no", "long": "app.long"})
    with serving(server, auth) as proxy:
        fail(proxy)
    (event,) = inbox.found()
    assert event["user"] == {"id": "user-1", "username": "ann"}
    tags = event["tags"]
    assert (tags["team"], tags["app.tenant"], "no" in tags) == ("blue", "acme", False)
    assert (tags["auth.domain"], tags["auth.authenticated"], len(tags["app.long"])) == ("jwt", "true", 200)


def test_request_context_can_be_left_out(start: Start) -> None:
    inbox = start()
    auth = core.AuthContext("jwt", True, "user-1", {"email": "ann@example.com"})
    with serving(make(record_request_context=False, set_transaction_name=False), auth) as proxy:
        fail(proxy)
    (event,) = inbox.found()
    assert set(event["tags"]) == {"rpc.method", "rpc.method_type"}
    assert "user" not in event and "rpc" not in event["contexts"] and event.get("transaction") != "rpc fail"
    assert "user-1" not in inbox.text and "ann@example.com" not in inbox.text


def test_what_is_ignored(start: Start) -> None:
    inbox = start()
    with serving(make(ignored_exceptions=(ValueError,))) as proxy:
        fail(proxy)
    with serving(make(ignored_error_codes=frozenset())) as proxy:
        fail(proxy, "client")
    with serving(make()) as proxy:
        fail(proxy, "exit")  # ends the process, as it was asked to
    assert [event["exception"]["values"][0]["type"] for event in inbox.found()] == ["Teapot"]


def test_the_log_line_of_a_failure_is_not_a_second_event(start: Start) -> None:
    inbox = start(integrations=[LoggingIntegration()])
    with serving(make()) as proxy:
        fail(proxy)
    with serving(make(ignored_exceptions=(ValueError,))) as proxy:
        fail(proxy)
    logging.getLogger("app").error("something else")
    assert [event.get("logger") for event in inbox.found()] == [None, "app"]


def test_performance(start: Start) -> None:
    inbox = start(traces_sample_rate=1.0)
    with serving(make(enable_performance=True, record_params=True)) as proxy:
        proxy.add(1.0, 2.0)
        fail(proxy, "client")
        fail(proxy)
    added, excused, failed = inbox.found("transaction")
    assert [t["transaction"] for t in (added, excused, failed)] == ["vgi_rpc/add", "vgi_rpc/fail", "vgi_rpc/fail"]
    traces = [t["contexts"]["trace"] for t in (added, excused, failed)]
    assert [(t["op"], t["status"]) for t in traces] == [
        ("rpc.server", "ok"),
        ("rpc.server", "not_found"),
        ("rpc.server", "internal_error"),
    ]
    assert {k: v for k, v in traces[0]["data"].items() if k.startswith("rpc.")} == {
        "rpc.system": "vgi_rpc",
        "rpc.service": "Calc",
        "rpc.method": "add",
        "rpc.method_type": "unary",
        "rpc.param.a": 1.0,
        "rpc.param.b": 2.0,
    }
    assert traces[1]["data"]["rpc.param.sizes"] == [1, 2]
    (event,) = inbox.found()
    assert event["contexts"]["trace"]["trace_id"] == traces[2]["trace_id"]


@pytest.mark.parametrize("kind", ["pipe", "http"])
def test_spans_of_a_stream_have_its_id(kind: str, start: Start) -> None:
    inbox = start(traces_sample_rate=1.0)
    with connected(kind, make(enable_performance=True)) as proxy, pytest.raises(core.RpcError, match="unlucky"):
        proxy.count().read_all()
    found = {span["contexts"]["trace"]["data"]["rpc.stream_id"] for span in inbox.found("transaction")}
    assert len(found) == 1 and re.fullmatch("[0-9a-f]{32}", found.pop())


def test_a_span_of_the_ambient_one(start: Start) -> None:
    inbox = start(traces_sample_rate=1.0)
    server = make(enable_performance=True, op_name="rpc")
    door: Any = core
    testing = sys.modules[door.make_wsgi_app.__module__.rpartition(".")[0]]
    client = testing.make_sync_client(server)
    # What a web framework's integration does, in the thread that serves.
    with sentry_sdk.isolation_scope(), sentry_sdk.start_transaction(name="POST /", op="http.server"):
        with door.http_connect(Calc, client=client) as proxy:
            fail(proxy)
        assert sentry_sdk.get_isolation_scope()._tags["rpc.method"] == "fail"
    (outer,) = inbox.found("transaction")
    (span,) = outer["spans"]
    assert (span["op"], span["description"], span["status"]) == ("rpc", "vgi_rpc/fail", "internal_error")
    assert span["data"]["rpc.method"] == "fail"
    assert outer["transaction"] == "rpc fail"


def test_a_span_around_a_worker_is_not_a_scope_for_its_calls(start: Start) -> None:
    inbox = start(traces_sample_rate=1.0)
    server = make(tag_params=["kind"])
    client, far = core.make_pipe_pair()
    thread = threading.Thread(target=lambda: fail(core.RpcProxy(Calc, client)))
    with sentry_sdk.isolation_scope(), sentry_sdk.start_transaction(name="worker"):
        thread.start()
        server.serve_one(far)
        assert sentry_sdk.get_isolation_scope()._tags == {}
    thread.join(10)
    client.close()
    far.close()
    (event,) = inbox.found()
    assert event["tags"]["rpc.param.kind"] == "server"


def test_parameters(start: Start) -> None:
    inbox = start(include_local_variables=False)
    with serving(make(tag_params=["kind", "api_key", "sizes"], hashed_tags=["kind"])) as proxy:
        fail(proxy)
    with serving(make(tag_params=["api_key"], param_redactor=sentry().noop_redactor)) as proxy:
        fail(proxy)
    by_default, unredacted = inbox.found()
    shown = {name: value for name, value in by_default["tags"].items() if name.startswith("rpc.param")}
    assert shown == {"rpc.param.kind": "server", "rpc.param_hash.kind": sentry().short_hash("server")}
    assert unredacted["tags"]["rpc.param.api_key"] == "hunter2"


def test_arguments_are_nowhere_by_default(start: Start) -> None:
    inbox = start(traces_sample_rate=1.0, include_local_variables=False)
    with serving(make(enable_performance=True)) as proxy:
        fail(proxy)
    assert inbox.found() and inbox.found("transaction")
    assert "hunter2" not in inbox.text


def test_strings_are_cut_between_characters() -> None:
    assert sentry()._clip("äöü", 5) == "äö"
    assert sentry()._clip(["äöü", "a"], 3) == ["ä", "a"]
    assert sentry()._clip(7, 1) == 7


def test_short_hash() -> None:
    assert sentry().short_hash("abc") == sentry().short_hash(b"abc") == "ba7816bf8f01"
    assert sentry().short_hash("abc", length=4) == "ba78"
    assert sentry().short_hash(None) is None


def test_a_redactor_that_fails_costs_the_report_and_not_the_call(start: Start) -> None:
    inbox = start()

    def broken(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        raise RuntimeError

    before = sentry_sdk.get_isolation_scope()
    with serving(make(record_params=True, param_redactor=broken)) as proxy:
        assert proxy.add(1.0, 2.0) == 3.0
        fail(proxy)
    assert inbox.found() == [] and sentry_sdk.get_isolation_scope() is before


@pytest.mark.parametrize("kind", ["pipe", "http"])
def test_an_error_inside_a_stream_is_reported(kind: str, start: Start) -> None:
    inbox = start()
    with connected(kind, make()) as proxy, pytest.raises(core.RpcError, match="unlucky"):
        proxy.count().read_all()
    (event,) = inbox.found()
    assert event["exception"]["values"][0]["value"] == "unlucky"
    assert event["tags"]["rpc.method_type"] == "stream"


def test_nothing_of_one_call_is_in_the_event_of_another(start: Start) -> None:
    """Threads of a server are reused, and calls run side by side."""
    inbox = start()
    door: Any = core
    testing = sys.modules[door.make_wsgi_app.__module__.rpartition(".")[0]]

    def authenticate(req: Any) -> Any:
        who = req.get_header("X-Who")
        return core.AuthContext("test", True, who) if who else core.AuthContext.anonymous()

    server = core.RpcServer(HttpService, HttpImpl())
    config = sentry().SentryConfig(custom_tags={"from": "config"}, tag_params=["kind"])
    client = testing.make_sync_client(server, authenticate=authenticate, sentry_config=config)

    def work(who: str) -> None:
        headers = {"X-Who": who} if who else None
        with door.http_connect(HttpService, client=client, headers=headers) as proxy:
            for _ in range(5):
                proxy.wait(0.002)
                with contextlib.suppress(core.RpcError):
                    proxy.fail(f"of {who}")

    threads = [threading.Thread(target=work, args=(who,)) for who in ("ann", "bob", "")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    work("")  # in this thread, which has served nobody before
    found = [(e.get("user", {}).get("id", ""), e["tags"]["rpc.param.kind"], e["tags"]["from"]) for e in inbox.found()]
    assert sorted(found) == sorted(5 * [(who, f"of {who}", "config") for who in ("ann", "bob", "", "")])
    assert sentry_sdk.get_isolation_scope()._tags == {}


def test_a_silent_sentry_does_not_delay_calls(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start(dsn=f"http://public@127.0.0.1:{silent.getsockname()[1]}/1", shutdown_timeout=0)
        began = time.monotonic()
        with serving(make()) as proxy:
            for _ in range(20):
                fail(proxy)
        assert time.monotonic() - began < 3
        silent.settimeout(5)
        silent.accept()[0].close()  # the SDK has tried
        sentry_sdk.get_client().close(0)


def test_the_core_imports_no_sdk() -> None:
    code = (
        f"import sys, {core.__name__} as core\n"
        "class P(__import__('typing').Protocol):\n    def f(self) -> int: ...\n"
        "class I:\n    def f(self): return 1\n"
        "assert core.RpcServer(P, I()).dispatch_hooks == () and 'sentry_sdk' not in sys.modules\n"
        "sys.modules['sentry_sdk'] = __import__('types').ModuleType('sentry_sdk')\n"
        "assert core.RpcServer(P, I()).dispatch_hooks == (); print('fine')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout == "fine\n", ran.stderr
