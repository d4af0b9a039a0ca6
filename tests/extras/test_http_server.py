"""The WSGI application, in process: routes, order of checks, codings, limits, calls and streams, hostile input."""

from __future__ import annotations

import io
import json
import logging
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras.http_service import ARROW, KEY, Read, SumState, call, make_server, request, stream, turn

ALICE = core.AuthContext("bearer", True, "alice")
BOB = core.AuthContext("bearer", True, "bob")
CAPABILITIES = ("VGI-Accept-Max-Response-Bytes-Support", "VGI-Externalization-Enabled", "VGI-Supported-Encodings")


def make_client(server: Any = None, **options: Any) -> Any:
    return core.make_sync_client(server or make_server(), token_key=KEY, **options)


@pytest.fixture(scope="module")
def client() -> Any:
    return make_client()


@pytest.fixture(scope="module")
def guarded() -> Any:
    authenticate = core.bearer_authenticate_static(tokens={"a": ALICE, "b": BOB})
    return make_client(authenticate=authenticate, max_request_bytes=1_000_000)


def as_(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def packed(coding: str, data: bytes) -> bytes:
    found: bytes = pa.Codec(coding).compress(data, asbytes=True)
    return found


# ---- routes


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/Service/add", 405, "json"),
        ("PUT", "/Service/add", 405, "json"),
        ("GET", "/Service/add/init", 405, "json"),
        ("GET", "/NotHosted/x", 404, "json"),
        ("GET", "/.well-known/x", 404, "json"),
        ("POST", "/plainname", 404, "json"),
        ("POST", "/__describe__", 404, "arrow"),
        ("POST", "/", 405, "json"),
        ("POST", "/health", 405, "json"),
        ("HEAD", "/", 405, "any"),
        ("HEAD", "/describe", 405, "any"),
        ("GET", "/health/", 404, "json"),
        ("GET", "/a/b/c/d", 404, "html"),
        ("GET", "/nothing", 404, "html"),
        ("GET", "/", 200, "html"),
        ("GET", "/describe", 200, "html"),
        ("POST", "/__upload_url__/init", 404, "arrow"),
        ("DELETE", "/x/__session__", 404, "json"),
    ],
)
def test_routes(method: str, path: str, status: int, kind: str) -> None:
    for prefix in ("", "/api/v1"):
        client = make_client(prefix=prefix)
        answer = client.request(method, (prefix + path).removesuffix("/") if path == "/" and prefix else prefix + path)
        assert answer.status_code == status
        types = {"json": "application/json", "html": "text/html; charset=utf-8", "arrow": ARROW}
        assert kind == "any" or answer.headers["Content-Type"] == types[kind]
        if status == 405 and path.startswith("/Service"):
            assert answer.headers["Allow"] == "POST"
        for name in CAPABILITIES:
            assert [n.lower() for n, _ in answer.raw_headers].count(name.lower()) == 1
        assert answer.headers["X-Request-ID"]


def test_pages_can_be_switched_off() -> None:
    client = make_client(
        enable_not_found_page=False,
        enable_landing_page=False,
        enable_describe_page=False,
        enable_health_endpoint=False,
    )
    for path in ("/", "/describe", "/health", "/a/b/c/d"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/json")


def test_health(guarded: Any) -> None:
    answer = guarded.get("/health")
    assert json.loads(answer.content).keys() == {"status", "server_id", "protocol"}
    assert b" " not in answer.content
    head = guarded.request("HEAD", "/health")
    assert head.content == b""
    assert head.headers["Content-Length"] == str(len(answer.content))
    options = guarded.options("/health")
    assert (options.status_code, options.content) == (200, b"")
    assert options.headers["Cache-Control"] == "public, max-age=300"
    assert options.headers["VGI-Max-Request-Bytes"] == "1000000"
    assert "GET" in options.headers["Allow"]
    assert guarded.get("/healthz").status_code == 401  # exempt is only the segment


@pytest.mark.parametrize("wanted", ["a b", "x" * 129, "tab\there", "\u00e9", "crlf\r\nX-Evil: 1"])
def test_request_ids_are_echoed_only_when_harmless(client: Any, wanted: str) -> None:
    answer = client.get("/health", headers={"X-Request-ID": wanted})
    assert answer.headers["X-Request-ID"] != wanted
    assert len(answer.headers["X-Request-ID"]) == 16
    assert client.get("/health", headers={"X-Request-ID": "mine-1"}).headers["X-Request-ID"] == "mine-1"
    failed = client.post("/Nope/x", headers={"X-Request-ID": "mine-2"})
    assert b"mine-2" in failed.content


# ---- who is let in


def test_authentication_comes_first(guarded: Any) -> None:
    bomb = packed("zstd", bytes(300_000_000))
    before = time.monotonic()
    for path, headers in [
        ("/Service/add", {"Content-Encoding": "zstd"}),
        ("/Service/add", {"Content-Encoding": "br"}),
        ("/Nope/x", {}),
        ("/", {}),
    ]:
        answer = guarded.post(path, content=bomb, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["VGI-Auth-Reason"] == "missing_credential"
        assert answer.headers["Cache-Control"] == "no-store"
        assert json.loads(answer.content) == {
            "error": "unauthorized",
            "reason": "missing_credential",
            "detail": "authentication rejected",
        }
    assert time.monotonic() - before < 1
    assert guarded.post("/Service/add", content=bytes(1_000_001)).status_code == 413  # size is known without reading


@pytest.mark.parametrize("value", ["Basic x", "Bearer", "Bearer ", "Bearer wrong", "Bearer \udcff"])
def test_bad_credentials(guarded: Any, value: str) -> None:
    answer = guarded.get("/", headers={"Authorization": value})
    assert (answer.status_code, answer.headers["VGI-Auth-Reason"]) == (401, "invalid_credential")


def test_refusals_for_people_and_proxies(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(request: Any) -> Any:
        raise PermissionError("secret <b>")

    client = make_client(authenticate=refuse, proxy_auth_headers=["X-Cert"], proxy_proof_required=True)
    with caplog.at_level(logging.DEBUG):
        page = client.get("/", headers={"Accept": "text/html,*/*"})
        answer = json.loads(client.get("/").content)
    assert page.headers["Content-Type"].startswith("text/html")
    assert b"insufficient_scope" in page.content
    assert page.headers["VGI-Auth-Proxy-Required"] == "true"
    assert page.headers["VGI-Proxy-Proof-Required"] == "true"
    assert "X-Cert, VGI-Proxy-Proof" in answer["proxy_hint"]
    assert "secret" not in caplog.text + page.text + str(answer)


def test_authenticators_that_fail() -> None:
    def unavailable(request: Any) -> Any:
        raise core.AuthUnavailableError("the directory", retry_after=7)

    def broken(request: Any) -> Any:
        raise ZeroDivisionError("secret")

    answer = make_client(authenticate=unavailable).get("/")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    for authenticate in (broken, lambda request: None):
        answer = make_client(authenticate=authenticate).get("/")
        assert (answer.status_code, json.loads(answer.content)) == (500, {"title": "500 Internal Server Error"})
        assert "VGI-Supported-Encodings" in answer.headers


# ---- bodies


@pytest.mark.parametrize("coding", ["zstd", "gzip", "identity", "ZSTD", ""])
def test_requests_are_decoded(coding: str) -> None:
    for level in (1, None):
        client = make_client(compression_level=level)
        body = request("add", a=1.0, b=2.0)
        if coding.lower() in ("zstd", "gzip"):
            body = packed(coding.lower(), body)
        assert call(client, "/Service/add", body, Content_Encoding=coding).result == 3.0


@pytest.mark.parametrize("coding", ["zstd", "gzip"])
def test_bombs_stay_small(guarded: Any, coding: str) -> None:
    bomb = packed(coding, bytes(200_000_000))
    assert len(bomb) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer = guarded.post("/Service/add", content=bomb, headers={**as_("a"), "Content-Encoding": coding})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert answer.status_code == 413
    assert json.loads(answer.content).keys() == {"title", "description"}
    assert "max_request_bytes=1000000" in answer.text


@pytest.mark.parametrize("coding", ["zstd", "gzip"])
def test_bodies_that_do_not_unpack(client: Any, coding: str) -> None:
    whole = packed(coding, request("add", a=1.0, b=2.0))
    for body in (b"", whole[:-4], whole[:3], whole + b"trailing", b"\x00" * 40, whole[::-1]):
        answer = client.post("/Service/add", content=body, headers={"Content-Type": ARROW, "Content-Encoding": coding})
        assert (answer.status_code, json.loads(answer.content)["title"]) == (400, "Decompression Error")
    twice = whole + packed(coding, b"")  # a second, empty frame belongs to the same body
    assert call(client, "/Service/add", twice, Content_Encoding=coding).result == 3.0


@pytest.mark.parametrize("coding", ["br", "zstd, gzip", "deflate", "zstd;q=1"])
def test_codings_that_are_not_accepted(client: Any, coding: str) -> None:
    answer = client.post("/Service/add", headers={"Content-Encoding": coding, "Content-Type": ARROW})
    assert (answer.status_code, answer.headers["Content-Type"]) == (415, "application/json")


def test_zstd_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGI_HTTP_DISABLE_ZSTD", "1")
    client = make_client()
    assert client.get("/health").headers["VGI-Supported-Encodings"] == "gzip"
    assert client.post("/Service/add", headers={"Content-Encoding": "zstd"}).status_code == 415


@pytest.mark.parametrize(
    ("custom", "standard", "header", "coding"),
    [
        (None, None, None, None),
        (None, "gzip, zstd", "Content-Encoding", "gzip"),
        (None, "ZSTD;q=0.1, gzip", "Content-Encoding", "zstd"),
        (None, "zstd;q=0, gzip;q=0.5", "Content-Encoding", "gzip"),
        (None, "identity, zstd", None, None),
        (None, "br, *", None, None),
        ("zstd", "gzip", "X-VGI-Content-Encoding", "zstd"),
        ("zstd", "gzip, zstd", "Content-Encoding", "zstd"),
        ("br", "gzip", "Content-Encoding", "gzip"),
        ("identity", "gzip", None, None),
    ],
)
def test_response_coding(
    client: Any, custom: str | None, standard: str | None, header: str | None, coding: str | None
) -> None:
    headers = {"Content-Type": ARROW}
    headers |= {"X-VGI-Accept-Encoding": custom} if custom else {}
    headers |= {"Accept-Encoding": standard} if standard else {}
    answer = client.post("/Service/add", content=request("add", a=1.0, b=2.0), headers=headers)
    found = {
        name: answer.headers[name] for name in ("Content-Encoding", "X-VGI-Content-Encoding") if name in answer.headers
    }
    assert found == ({header: coding} if header else {})
    assert "Accept-Encoding" in answer.headers["Vary"]
    plain = answer.content
    if header == "X-VGI-Content-Encoding" and coding:
        plain = pa.CompressedInputStream(pa.BufferReader(plain), coding).read()
    assert plain.startswith(b"\xff\xff\xff\xff")
    assert answer.headers["Content-Length"] == str(len(answer.raw))
    assert "Content-Encoding" not in client.get("/", headers=headers).headers  # only Arrow bodies are coded


def test_no_response_coding() -> None:
    client = make_client(compression_level=None)
    answer = client.post("/Service/add", content=request("add", a=1.0, b=2.0), headers={"Accept-Encoding": "zstd"})
    assert "Content-Encoding" not in answer.headers
    assert answer.headers["VGI-Supported-Encodings"] == ""


def raw_call(app: Any, environ: dict[str, Any]) -> tuple[int, bytes]:
    status = ""

    def start(line: str, headers: Any, exc_info: Any = None) -> None:
        nonlocal status
        status = line

    found = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/Service/add",
        "SERVER_NAME": "x",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.url_scheme": "http",
        "wsgi.errors": io.StringIO(),
        "CONTENT_TYPE": ARROW,
        **environ,
    }
    body = b"".join(app(found, start))
    return int(status[:3]), body


def test_bodies_without_a_length_and_truncated_ones() -> None:
    app = core.make_wsgi_app(make_server(), token_key=KEY, max_request_bytes=2000)
    body = request("add", a=1.0, b=2.0)
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked"}
    assert raw_call(app, {"wsgi.input": io.BytesIO(body), **chunked})[0] == 200
    assert raw_call(app, {"wsgi.input": io.BytesIO(body), "wsgi.input_terminated": True})[0] == 200
    assert raw_call(app, {"wsgi.input": io.BytesIO(bytes(2001)), **chunked})[0] == 413
    assert raw_call(app, {"wsgi.input": io.BytesIO(body)})[0] == 400  # no length, not chunked: no body
    assert raw_call(app, {"wsgi.input": io.BytesIO(body[:100]), "CONTENT_LENGTH": str(len(body))})[0] == 400
    for length in ("-1", "x", "1e3"):
        assert raw_call(app, {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": length})[0] == 400
    assert raw_call(app, {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(10**18)})[0] == 413


# ---- refused before dispatch


@pytest.mark.parametrize(
    ("path", "body", "status", "error", "kind"),
    [
        ("/Nope/add", b"", 404, "ProtocolNotSupportedError", "protocol_not_supported"),
        ("/9bad/add", b"", 404, "ProtocolNotSupportedError", "protocol_not_supported"),
        (f"/{'x' * 300}/add", b"", 404, "ProtocolNotSupportedError", "protocol_not_supported"),
        ("/%53ervice/add", b"", 404, "ProtocolNotSpecifiedError", "protocol_not_specified"),
        ("/Ser%25vice/add", b"", 404, "ProtocolNotSpecifiedError", "protocol_not_specified"),
        ("/Service/nope", b"", 404, "MethodNotImplementedError", "method_not_implemented"),
        ("/Service/__init__", b"", 404, "MethodNotImplementedError", "method_not_implemented"),
        ("/Service/count", b"", 400, "TypeError", ""),
        ("/Service/add/init", b"", 400, "TypeError", ""),
        ("/Service/add/exchange", b"", 400, "TypeError", ""),
        ("/Service/add", b"", 400, "EOFError", ""),
        ("/Service/add", b"not arrow at all", 400, "ArrowInvalid", ""),
        ("/Service/add", request("fail", kind=""), 400, "TypeError", ""),
        (
            "/Service/add",
            request("add", a=1.0, b=1.0, metadata={b"vgi_rpc.protocol": b"Second"}),
            400,
            "ProtocolNotSupportedError",
            "protocol_not_supported",
        ),
        (
            "/Service/add",
            request("add", a=1.0, b=1.0, metadata={b"vgi_rpc.protocol_version": b"1.3.0"}),
            400,
            "ProtocolVersionError",
            "protocol_version_mismatch",
        ),
        ("/Service/add", request("add", a=1.0, b=1.0, metadata={b"vgi_rpc.method": None}), 400, "RpcError", ""),
        (
            "/Service/add",
            request("add", a=1.0, b=1.0, metadata={b"vgi_rpc.request_version": b"2"}),
            400,
            "VersionError",
            "",
        ),
        ("/Service/add", request("add", a=None, b=1.0), 400, "TypeError", ""),
        (
            "/Service/nothing",
            stream(pa.record_batch({"x": [1]}), {"vgi_rpc.method": "nothing"}),
            400,
            "VersionError",
            "",
        ),
    ],
)
def test_refused(client: Any, path: str, body: bytes, status: int, error: str, kind: str) -> None:
    found = call(client, path, body)
    assert (found.status, found.error.partition(":")[0], found.error_kind) == (status, error, kind)
    assert not found.failed  # 4xx never carry the header
    assert found.schemas == [pa.schema([])]
    if "count" not in path:
        wrong = client.post(path, content=body, headers={"Content-Type": f"{ARROW}; charset=utf-8"})
        assert wrong.status_code == (404 if status == 404 else 415)  # routing comes before the content type
        assert wrong.headers["Content-Type"] == ARROW


def test_a_request_without_routing_key_is_accepted(client: Any) -> None:
    body = request("add", a=1.0, b=4.0, metadata={b"vgi_rpc.protocol": None})
    assert call(client, "/Service/add", body).result == 5.0


def test_learned_requests_do_not_cross_paths(client: Any) -> None:
    for _ in range(3):
        assert call(client, "/Service/add", request("add", a=1.0, b=2.0)).result == 3.0
        assert call(client, "/Service/wait", request("add", a=1.0, b=2.0)).status == 400
        assert call(client, "/Second/running_sum", request("add", a=1.0, b=2.0)).status == 400


BUDGETS = ["", "0", "1", "65535", "01", "+1", "-1", "1.0", "1, 2", "9007199254740992", "\u0661", "65536 7", "9" * 500]


@pytest.mark.parametrize("value", BUDGETS)
def test_bad_budgets(client: Any, value: str) -> None:
    found = call(client, "/Nope/x", b"", VGI_Accept_Max_Response_Bytes=value)
    assert (found.status, found.error.partition(":")[0]) == (400, "ValueError")


@pytest.mark.parametrize("value", ["65536", " 268435456\t", "9007199254740991"])
def test_good_budgets(client: Any, value: str) -> None:
    assert call(client, "/Service/add", request("add", a=1.0, b=2.0), VGI_Accept_Max_Response_Bytes=value).result == 3.0


def test_options_are_checked() -> None:
    for name, value in [
        ("max_request_bytes", 0),
        ("hosting_max_request_bytes", True),
        ("max_response_bytes", 65_535),
        ("preferred_response_bytes", 2**53),
        ("token_key", b"short"),
        ("token_ttl", -1),
        ("call_state_cache_entries", -1),
        ("prefix", "no-slash"),
        ("prefix", "/{x}"),
    ]:
        with pytest.raises(ValueError, match=name):
            core.make_wsgi_app(make_server(), **{"token_key": KEY, name: value})


def test_limits_reach_the_method_and_the_wire() -> None:
    client = make_client(
        max_response_bytes=200_000, hosting_max_response_bytes=100_000, preferred_response_bytes=150_000
    )
    assert client.get("/health").headers["VGI-Max-Response-Bytes"] == "100000"
    assert call(client, "/Service/who", request("who")).result.endswith(" 100000 100000")
    budget = {"VGI_Accept_Max_Response_Bytes": "70000"}
    assert call(client, "/Service/who", request("who"), **budget).result.endswith(" 70000 70000")
    assert len(call(client, "/Service/blob", request("blob", size=90_000)).result) == 90_000
    found = call(client, "/Service/blob", request("blob", size=90_000), **budget)
    assert (found.status, found.failed, found.error_code) == (200, True, "RESOURCE_EXHAUSTED")
    assert "ResponseTooLargeError" in found.error
    assert "max_response_bytes (90" in found.error
    assert "> 70000)" in found.error
    assert "'blob'" in found.error


# ---- calls


def test_unary(client: Any) -> None:
    assert call(client, "/Service/nothing", request("nothing")).rows == [[]]
    who = call(client, "/Service/who", request("who"), User_Agent="me")
    assert who.logs == ["asked"]
    assert who.result.startswith("None None http {'remote_addr': '127.0.0.1', 'user_agent': 'me'}")
    assert call(client, "/Service/wait", request("wait", seconds=0.0)).result == 0.0


@pytest.mark.parametrize(
    ("kind", "error"), [("x", "ValueError: no luck"), ("exit", "SystemExit: 3"), ("none", "TypeError")]
)
def test_methods_that_fail(client: Any, kind: str, error: str) -> None:
    found = call(client, "/Service/fail", request("fail", kind=kind), X_Request_ID="the-id")
    assert (found.status, found.failed) == (200, True)
    assert found.error.startswith(error)
    assert found.schemas[0].names == ["result"]


def test_cookies(client: Any) -> None:
    answer = client.post(
        "/Service/cookie", content=request("cookie", name="c"), headers={"Content-Type": ARROW, "Cookie": "a=1; b=2"}
    )
    assert Read(answer).result == "1,2"
    cookies = [value for name, value in answer.raw_headers if name.lower() == "set-cookie"]
    assert any(value.startswith("c=v; HttpOnly; Max-Age=5; SameSite=Lax") for value in cookies), cookies
    assert any(value.startswith('old="";') or value.startswith("old=;") for value in cookies), cookies
    for name in ("bad name", "a\r\nSet-Cookie: x", ""):
        found = call(client, "/Service/cookie", request("cookie", name=name))
        assert found.error.startswith("ValueError")


def test_the_caller_is_known(guarded: Any) -> None:
    found = call(guarded, "/Service/who", request("who"), **as_("b"))
    assert found.result.startswith("bob bob http")
    assert core.current_auth().principal is None


def test_serve_start_is_told_once() -> None:
    server = make_server()
    client = make_client(server)
    assert server.implementation.started == []
    for _ in range(3):
        call(client, "/Service/nothing", request("nothing"))
    assert server.implementation.started == ["http"]


# ---- streams


def follow(client: Any, path: str, found: Read, **headers: str) -> Iterator[Read]:
    """The turns of a producer after init."""
    tokens = dict(found.tokens)
    while found.tokens:
        yield (found := call(client, f"{path}/exchange", turn(tokens), **headers))
        tokens.update(found.tokens)


def test_producer(client: Any) -> None:
    first = call(client, "/Service/count/init", request("count", end=3))
    assert (first.numbers, first.logs, len(first.tokens)) == ([0], ["at 0"], 2)
    turns = list(follow(client, "/Service/count", first))
    assert [t.numbers for t in turns] == [[1], [2], []]
    assert [len(t.tokens) for t in turns] == [1, 1, 0]  # the call token is not issued again
    empty = call(client, "/Service/count/init", request("count", end=0))
    assert (empty.numbers, empty.tokens) == ([], {})


@pytest.mark.parametrize(("step", "expected"), [(2, [0, 2, 4]), (0, [5, 4, 3, 2, 1])])
def test_header_union_and_call_state(step: int, expected: list[int]) -> None:
    replicas = [make_client(call_state_cache_entries=n) for n in (4096, 0, 1)]
    first = call(replicas[0], "/Service/down/init", request("down", end=5, step=step))
    assert first.rows[0] == [{"title": "up" if step else "down"}]
    assert first.logs[0] == "init"
    seen, found, tokens = first.numbers, first, dict(first.tokens)
    while found.tokens:  # every turn by another replica
        replicas.append(replicas.pop(0))
        found = call(replicas[0], "/Service/down/exchange", turn(tokens, x="y"))
        tokens.update(found.tokens)
        seen += found.numbers
        assert len(found.schemas) == 1  # headers are not repeated
        if not step and found.metadata:
            assert found.metadata[0][b"seen"] == b"x"  # the tokens are not the application's business
    assert seen == expected


def test_exchange(client: Any) -> None:
    first = call(client, "/Service/running_sum/init", request("running_sum"))
    assert (first.rows, len(first.tokens)) == ([[]], 2)
    tokens = dict(first.tokens)
    for expected in (6, 12):
        found = call(client, "/Service/running_sum/exchange", turn(tokens, 1, 2, 3))
        assert (found.numbers, list(found.tokens)) == ([expected], [b"vgi_rpc.stream_state#b64"])
        tokens.update(found.tokens)
    again = call(client, "/Service/running_sum/exchange", turn(first.tokens, 1))
    assert again.numbers == [1]  # an old cursor is served again
    wrong = stream(pa.record_batch({"m": [1]}), tokens)
    found = call(client, "/Service/running_sum/exchange", wrong)
    assert (found.status, found.failed, found.tokens) == (200, True, {})
    assert found.error.startswith("TypeError: Input schema mismatch")
    small = stream(pa.record_batch({"n": pa.array([5], pa.int32())}), tokens)
    assert call(client, "/Service/running_sum/exchange", small).numbers == [17]  # castable
    failed = call(client, "/Service/running_sum/exchange", turn(tokens, -100))
    assert (failed.status, failed.failed, failed.error, failed.tokens) == (200, True, "ValueError: negative", {})


def test_cancel(client: Any) -> None:
    first = call(client, "/Service/running_sum/init", request("running_sum"))
    found = call(client, "/Service/running_sum/exchange", turn(first.tokens, 4))
    SumState.cancelled.clear()
    body = stream(core.empty_batch(pa.schema([])), {**first.tokens, **found.tokens, b"vgi_rpc.cancel": b""})
    ended = call(client, "/Service/running_sum/exchange", body)
    assert (ended.status, ended.rows, ended.failed, SumState.cancelled) == (200, [[]], False, [4])


def test_a_state_that_is_not_declared(client: Any) -> None:
    found = call(client, "/Service/undeclared/init", request("undeclared"))
    assert (found.status, found.failed, found.schemas) == (200, True, [pa.schema([])])
    assert "declares SumState" in found.error


def test_the_budget_of_init_stays() -> None:
    client = make_client()
    first = call(client, "/Service/other_sum/init", request("other_sum"), VGI_Accept_Max_Response_Bytes="65536")
    big = list(range(20_000))
    assert call(client, "/Service/other_sum/exchange", turn(first.tokens, *big)).numbers == [sum(big) + 100]
    assert len(first.tokens[b"vgi_rpc.stream_state#b64"]) < 2000  # compressed inside the seal


# ---- who else is told


def test_records_and_hooks(caplog: pytest.LogCaptureFixture) -> None:
    class Hook:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_dispatch_start(self, info: Any, auth: Any, metadata: Any, kwargs: Any) -> str:
            return str(info.name)

        def on_dispatch_end(self, token: Any, info: Any, error: Any, *, stats: Any = None) -> None:
            self.seen.append(f"{token} {type(error).__name__} {stats.input_rows}")

    server, hook = make_server(), Hook()
    server.add_dispatch_hook(hook)
    client = make_client(server)
    with caplog.at_level(logging.INFO, "vgi_rpc.access"):
        call(client, "/Service/add", request("add", a=1.0, b=2.0), X_Request_ID="r1", Accept_Encoding="gzip")
        call(client, "/Service/fail", request("fail", kind="x"))
        call(client, "/Service/nope", b"")
        first = call(client, "/Service/running_sum/init", request("running_sum"))
        call(client, "/Service/running_sum/exchange", turn(first.tokens, 1, 2))
        cancel = stream(core.empty_batch(pa.schema([])), {**first.tokens, b"vgi_rpc.cancel": b"1"})
        call(client, "/Service/running_sum/exchange", cancel)
    records: list[Any] = [r for r in caplog.records if r.name == "vgi_rpc.access"]
    assert [r.method for r in records] == ["add", "fail", "running_sum", "running_sum", "running_sum"]
    assert [r.http_status for r in records] == [200, 500, 200, 200, 200]
    assert records[0].request_id == "r1"
    assert 0 < records[0].response_bytes < 300  # coded
    assert records[0].request_rows == 1
    assert not hasattr(records[3], "request_rows")
    assert records[3].request_state_bytes > 0
    assert records[3].response_state_bytes > 0
    assert len({r.stream_id for r in records[2:]}) == 1
    assert len(records[2].stream_id) == 32
    assert records[4].cancelled
    assert hook.seen == ["add NoneType 1", "fail ValueError 1", "running_sum NoneType 0", "running_sum NoneType 2"]
    assert not any(token.decode() in caplog.text for token in first.tokens.values())


def test_cors() -> None:
    client = make_client(cors_origins=["https://a.example", "https://b.example"])
    preflight = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, x-custom",
    }
    answer = client.options("/Service/add", headers=preflight)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://a.example"
    assert answer.headers["Access-Control-Allow-Methods"] == "POST"
    assert answer.headers["Access-Control-Allow-Headers"] == "content-type, x-custom"
    assert answer.headers["Access-Control-Max-Age"] == "7200"
    assert "Origin" in answer.headers["Vary"]
    refused = client.options("/Service/add", headers={**preflight, "Origin": "https://evil.example"})
    assert refused.status_code == 200
    assert not any(name.lower().startswith("access-control") for name, _ in refused.raw_headers)
    evil = client.options("/Service/add", headers={**preflight, "Access-Control-Request-Headers": "a\r\nb: c"})
    assert "Access-Control-Allow-Headers" not in evil.headers
    plain = client.get("/health", headers={"Origin": "https://b.example"})
    assert "VGI-Supported-Encodings" in plain.headers["Access-Control-Expose-Headers"]
    assert plain.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    anywhere = make_client(cors_origins="*", cors_resource_policy=None, cors_max_age=None)
    answer = anywhere.options("/Service/add", headers=preflight)
    assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert "Cross-Origin-Resource-Policy" not in answer.headers
    assert "Access-Control-Max-Age" not in answer.headers
    assert not any(
        "access-control" in n.lower() for n, _ in make_client().options("/health", headers=preflight).raw_headers
    )


# ---- anything at all


@pytest.mark.parametrize(("seed", "count"), [(5, 3000), pytest.param(6, 10_000, marks=pytest.mark.long)])
def test_random_requests_never_break_it(seed: int, count: int) -> None:
    rng = random.Random(seed)
    client = make_client(max_request_bytes=200_000)
    first = call(client, "/Service/running_sum/init", request("running_sum"))
    good = [
        ("/Service/add", request("add", a=1.0, b=2.0)),
        ("/Service/who", request("who")),
        ("/Service/down/init", request("down", end=2, step=1)),
        ("/Service/running_sum/exchange", turn(first.tokens, 1, 2)),
        ("/__call__", b'{"protocol":"Service","method":"add","args":{"a":1,"b":[2]}}'),
    ]
    pieces = [
        "/",
        "Service",
        "add",
        "init",
        "exchange",
        "%",
        "..",
        "__",
        "é",
        "health",
        "_oauth",
        "\x00",
        "?",
        "describe",
        "\r\n",
    ]
    codings = ["zstd", "gzip", "identity", "br", "", "zstd,gzip", "\x00"]
    for i in range(count):
        path, body = rng.choice(good)
        data = bytearray(body)
        for _ in range(rng.choice((0, 1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        if rng.random() < 0.3:
            path = "/" + "".join(rng.choice(pieces) for _ in range(rng.randrange(6)))
        headers = {"Content-Type": "application/json" if path == "/__call__" else ARROW}
        if rng.random() < 0.2:
            headers["Content-Encoding"] = rng.choice(codings)
            if rng.random() < 0.5 and headers["Content-Encoding"] in ("zstd", "gzip"):
                data = bytearray(packed(headers["Content-Encoding"], bytes(data)))
        if rng.random() < 0.1:
            headers["VGI-Accept-Max-Response-Bytes"] = rng.choice(BUDGETS)
        if rng.random() < 0.1:
            headers["Accept-Encoding"] = rng.choice(codings) + ";q=" + rng.choice(["0", "x", "1", ""])
        method = rng.choice(["POST"] * 8 + ["GET", "OPTIONS", "DELETE", "HEAD"])
        answer = client.request(method, path, content=bytes(data), headers=headers)
        assert answer.status_code < 500, (i, method, path, headers)
        assert "VGI-Supported-Encodings" in answer.headers
