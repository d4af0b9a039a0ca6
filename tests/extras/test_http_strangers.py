"""What callers that nobody knows can make a server do: keep their bodies, wait for them, believe their headers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("waitress")

import falcon.testing

from tests.extras.http_service import ARROW, KEY, extra, make_server, request
from tests.extras.test_http_serve import Link, post, process, until_open

MIB = 1 << 20
BEARER = {"Authorization": "Bearer good"}


def key_authenticate() -> Any:
    return core.bearer_authenticate_static(tokens={"good": core.AuthContext("key", True, "batch")})


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    bound: list[int] = []
    opened = threading.Event()
    engine = extra("_waitress")
    made: list[Any] = []

    class Kept(engine.Waitress):  # type: ignore[misc, name-defined]
        def __init__(self, app: Any, *args: Any) -> None:
            super().__init__(app, *args)
            made.append((app, self))

    def announce(host: str, port: int) -> None:
        bound.append(port)
        opened.set()

    serve = extra("serve")
    own, serve.Waitress = serve.Waitress, Kept
    try:
        thread = threading.Thread(
            target=lambda: serve.serve_http(
                make_server(), token_key=KEY, on_bound=announce, drain_grace_seconds=0.2, **options
            )
        )
        thread.start()
        assert opened.wait(10)
    finally:
        serve.Waitress = own
    try:
        yield bound[0]
    finally:
        app, served = made[0]
        app.drain()
        served._server.pull_trigger()
        thread.join(20)
        assert not thread.is_alive()


def rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def head(size: int, **headers: str) -> bytes:
    lines = {"Host": "localhost", "Content-Type": ARROW, "Content-Length": str(size), **headers}
    return ("POST /Service/add HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items()) + "\r\n").encode()


# ---- bodies

GUARDED = (
    "from tests.core import core; from tests.extras.http_service import KEY, make_server;"
    "from tests.extras.test_http_strangers import key_authenticate;"
    "core.serve_http(make_server(), token_key=KEY, authenticate=key_authenticate())"
)


def test_a_stranger_s_body_is_not_kept() -> None:
    size = 24 * MIB
    with process("-c", GUARDED) as (found, port):
        post(port, "/Service/add", request("add", a=1.0, b=1.0), **BEARER)
        before = rss(found.pid)
        with contextlib.ExitStack() as stack:
            links = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 20)) for _ in range(6)]
            for link in links:
                link.sendall(head(size))
                link.sendall(bytes(size - MIB))
            assert rss(found.pid) - before < 32 * MIB
            for link in links:  # told at the end of the body, as everybody can read it
                link.sendall(bytes(MIB))
                assert link.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert post(port, "/Service/add", bytes(size), **BEARER).status_code == 400  # read, and no call


def test_a_body_in_chunks_is_not_kept_either() -> None:
    with process("-c", GUARDED) as (found, port):
        before = rss(found.pid)
        with socket.create_connection(("127.0.0.1", port), 20) as link:
            link.sendall(head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
            for _ in range(40):
                link.sendall(b"%x\r\n%s\r\n" % (MIB, bytes(MIB)))
            assert rss(found.pid) - before < 16 * MIB
            link.sendall(b"0\r\n\r\n")
            assert link.recv(65536).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("size", [10, 65_000, 66_000, 3 * MIB])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_caller_is_asked_once(size: int, chunked: bool) -> None:
    asked: list[str] = []

    def authenticate(req: Any) -> Any:
        asked.append(req.path)
        return key_authenticate()(req)

    body = request("fail", kind="x" * size)
    with serving(authenticate=authenticate) as port:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        pieces = [body[at : at + 40_000] for at in range(0, len(body), 40_000)]
        link.request("POST", "/Service/fail", pieces if chunked else body, {"Content-Type": ARROW, **BEARER})
        answer = link.getresponse()
        assert answer.status == 200
        answer.read()
        link.close()
    assert asked == ["/Service/fail"]  # a proof of a proxy, say, is good for one question


def test_a_body_that_will_be_refused_is_not_kept() -> None:
    with serving(max_request_bytes=MIB) as port, Link(port) as link:
        assert link.post("/Service/add", bytes(2 * MIB)).status_code == 413
        assert link.post("/Service/add", request("add", a=1.0, b=2.0)).status_code == 200


# ---- time


def ended(link: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        return link.recv(1) == b""
    return True


@pytest.mark.parametrize("begun", [b"POST /Service/add HTTP/1.1\r\nHo", head(1000), head(1000) + b"x"])
def test_a_request_that_does_not_arrive_ends(begun: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = extra("_waitress")
    for name in ("_HEAD_SECONDS", "_BODY_SECONDS", "_SWEEP_SECONDS"):
        monkeypatch.setattr(engine, name, 0.1)
    with serving() as port, socket.create_connection(("127.0.0.1", port), 10) as link:
        link.sendall(begun)
        assert ended(link)
        assert post(port, "/Service/add", request("add", a=1.0, b=2.0)).status_code == 200


def test_silent_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = extra("_waitress")
    monkeypatch.setattr(engine, "_CONNECTIONS", 16)
    monkeypatch.setattr(engine, "_SILENT_SECONDS", 0.2)
    monkeypatch.setattr(engine, "_SWEEP_SECONDS", 0.1)
    with serving() as port, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(16)]
        began = time.monotonic()
        assert post(port, "/Service/add", request("add", a=1.0, b=2.0)).status_code == 200
        assert time.monotonic() - began < 5
        assert ended(silent[0])


# ---- names


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("app.localhost:3000", 200),
        ("upstream", 200),  # as nginx writes it
        ("attacker.example", 421),
        ("attacker.example:8000", 421),
        ("attacker:8000", 421),
        ("127.0.0.1.attacker.example", 421),
        ("localhost.attacker.example:80", 421),
        ("localhost@attacker.example", 421),
        ("[::2]", 421),
        ("169.254.169.254", 421),
    ],
)
def test_a_loopback_service_goes_by_its_machine_s_names(host: str, status: int) -> None:
    with serving() as port:
        for verb, path in (("GET", "/health"), ("GET", "/describe"), ("POST", "/__call__")):
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            body = json.dumps({"protocol": "Service", "method": "add", "args": {"a": 1, "b": 2}})
            link.request(
                verb, path, body if verb == "POST" else None, {"Host": host, "Content-Type": "application/json"}
            )
            assert link.getresponse().status == status, path
            link.close()


@pytest.mark.parametrize(
    "options", [{"authenticate": key_authenticate()}, {"allowed_hosts": ["svc.example"]}, {"allowed_hosts": "*"}]
)
def test_other_names_where_they_do_no_harm(options: dict[str, Any]) -> None:
    with serving(**options) as port:
        body = request("add", a=1.0, b=2.0)
        assert post(port, "/Service/add", body, Host="svc.example:443", **BEARER).status_code == 200
        other = post(port, "/Service/add", body, Host="other.example", **BEARER).status_code
        assert other == (421 if options.get("allowed_hosts") == ["svc.example"] else 200)


def test_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGI_HTTP_ALLOWED_HOSTS", "svc.example, svc2.example")
    with serving() as port:
        for host, status in (("svc2.example", 200), ("other.example", 421)):
            assert post(port, "/Service/add", request("add", a=1.0, b=2.0), Host=host).status_code == status


# ---- headers of proxies under a server that cannot tell them from forged ones

FORGEABLE = (
    "import sys; from tests.core import core; from tests.extras.http_service import KEY, make_server;"
    "core.serve_http(make_server(), wsgi_server='granian', token_key=KEY,"
    " authenticate=lambda req: core.AuthContext('proxy', True, req.get_header('X-User') or 'nobody'))"
)


def test_granian_s_headers_name_nobody() -> None:
    pytest.importorskip("granian")
    with process("-c", FORGEABLE) as (_, port):
        until_open(port)
        for headers in ({"X-User": "alice"}, {"X_User": "root"}, {}):
            assert post(port, "/Service/add", request("add", a=1.0, b=2.0), **headers).status_code == 500


def test_an_authenticator_sees_only_what_a_caller_may_write() -> None:
    guard = extra("..auth.guard")
    environ = falcon.testing.create_environ(
        headers={"Authorization": "Bearer good", "X-User": "root", "VGI-Proxy-Proof": "p", "Sec-Fetch-Site": "none"}
    )
    environ["SERVER_SOFTWARE"] = "Granian"
    seen: dict[str, Any] = {}

    def authenticate(req: Any) -> Any:
        seen.update(req.headers)
        return core.AuthContext("key", True, req.get_header("Authorization"))

    req, resp = falcon.Request(environ), falcon.Response()
    guard.AuthGuard(authenticate).process_request(req, resp)
    assert (req.context.auth.principal, resp.complete) == ("Bearer good", False)
    assert {"AUTHORIZATION", "VGI-PROXY-PROOF", "SEC-FETCH-SITE"} <= seen.keys()
    assert "X-USER" not in seen


@pytest.mark.parametrize("ask", ["get_header", "env", "get", "forwarded"])
def test_who_reads_a_forgeable_header_is_told(ask: str, caplog: pytest.LogCaptureFixture) -> None:
    guard = extra("..auth.guard")
    reads: dict[str, Any] = {
        "get_header": lambda req: req.get_header("x-user"),
        "env": lambda req: req.env["HTTP_X_USER"],
        "get": lambda req: req.env.get("HTTP_X_USER", ""),
        "forwarded": lambda req: req.forwarded_host,
    }
    environ = falcon.testing.create_environ(headers={"X-User": "root", "X-Forwarded-Host": "x"})
    environ["SERVER_SOFTWARE"] = "Granian"
    req, resp = falcon.Request(environ), falcon.Response()
    guard.AuthGuard(lambda req: core.AuthContext("proxy", True, reads[ask](req))).process_request(req, resp)
    assert (req.context.auth.authenticated, resp.status) == (False, "500 Internal Server Error")
    assert "serve with waitress or gunicorn" in caplog.text


def test_a_known_mistake_is_refused_before_serving() -> None:
    pytest.importorskip("granian")
    from vgi_rpc_extras.auth import chain_authenticate, mtls_authenticate_xfcc

    xfcc = mtls_authenticate_xfcc(trusted_proxies=["127.0.0.1"])
    with pytest.raises(ValueError, match="could be forged"):
        core.serve_http(
            make_server(),
            wsgi_server="granian",
            token_key=KEY,
            authenticate=chain_authenticate(key_authenticate(), xfcc),
        )


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_cannot_be_read_is_the_caller_s_fault(chunked: bool) -> None:
    class Broken:
        def read(self, size: int = -1) -> bytes:
            raise RuntimeError("InvalidChunkSize")  # each server has a class of its own

    environ = falcon.testing.create_environ(path="/Service/add", method="POST", headers={"Content-Type": ARROW})
    environ["wsgi.input"] = Broken()
    environ.update({"wsgi.input_terminated": True} if chunked else {"CONTENT_LENGTH": "10"})
    started: list[str] = []
    app = core.make_wsgi_app(make_server(), token_key=KEY)
    body = b"".join(app(environ, lambda status, headers, exc=None: started.append(status)))
    assert started[0].startswith("400 ")
    assert b"cannot be read" in body
