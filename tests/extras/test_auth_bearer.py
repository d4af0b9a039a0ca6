"""Bearer tokens, chains, gates, cookies, and the 401, 503 and 500 answers."""

from __future__ import annotations

import hmac
import json
import logging
import pickle
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("falcon")

import falcon
from hypothesis import given
from hypothesis import strategies as st

from tests.core import core
from tests.extras.auth_app import bearer, client, refused, request
from vgi_rpc_extras import auth as auth_package
from vgi_rpc_extras.auth import (
    AuthenticationError,
    AuthFailure,
    AuthGuard,
    AuthReason,
    PreconditionGate,
    bearer_authenticate,
    bearer_authenticate_static,
    build_proxy_hint,
    chain_authenticate,
    classify_auth_failure,
    declare_proxy_headers,
    make_cookie_authenticate,
    merge_proxy_headers,
    proxy_headers_of,
    read_unauthorized,
    require_all,
)

AuthContext = core.AuthContext
ALICE = AuthContext("key", True, "alice")
BOB = AuthContext("key", True, "bob")
TOKENS = {"secret-alice": ALICE, "geheim-\u00e4\u00f6\u00fc": BOB}
static = bearer_authenticate_static(tokens=TOKENS)


def gate(claims: dict[str, str] | None = None, refuse: bool = False) -> PreconditionGate:
    def prove(_: falcon.Request) -> dict[str, str]:
        if refuse:
            raise PermissionError("not through the proxy")
        return claims or {"proxy": "edge", "verified": "true"}

    return PreconditionGate(prove, name="hop", claims_key="hop_claims", proxy_headers=("X-Hop",))


def test_static_tokens() -> None:
    assert static(request(bearer("secret-alice"))) is ALICE
    for bad in ("secret-alic", "secret-alicee", "", " secret-alice", "SECRET-ALICE"):
        with refused("invalid_credential"):
            static(request(bearer(bad)))
    with pytest.raises(ValueError, match="empty"):
        bearer_authenticate_static(tokens={"": ALICE})


def test_every_token_is_compared_at_equal_length(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    static(request(bearer("secret-alice")))
    assert compared == [(32, 32), (32, 32)]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_scheme_is_case_insensitive(scheme: str) -> None:
    assert static(request({"Authorization": f"{scheme} secret-alice"})) is ALICE


@pytest.mark.parametrize("value", ["Basic c2VjcmV0", "Bearer", "Bearersecret-alice", "", "Token x"])
def test_other_schemes_are_invalid_and_none_is_missing(value: str) -> None:
    with refused("invalid_credential"):
        static(request({"Authorization": value}))
    with refused("missing_credential"):
        static(request())


@given(st.text(max_size=60))
def test_no_header_gets_in_or_breaks(text: str) -> None:
    with refused("invalid_credential"):
        static(request({"Authorization": "Bearer " + text.encode().decode("latin-1")}))


def test_validators_see_the_token_as_it_came() -> None:
    seen: list[str] = []

    def validate(token: str) -> Any:
        seen.append(token)
        return ALICE

    bearer_authenticate(validate=validate)(request({"Authorization": "Bearer  two words"}))
    assert seen == [" two words"]


def test_chain_takes_the_first_that_accepts() -> None:
    other = bearer_authenticate_static(tokens={"other": BOB})
    assert chain_authenticate(static, other)(request(bearer("other"))) is BOB


def test_chain_reasons() -> None:
    def fails(exc: Exception) -> Any:
        def authenticate(_: falcon.Request) -> Any:
            raise exc

        return authenticate

    missing = fails(AuthFailure(AuthReason.MISSING_CREDENTIAL))
    with refused("missing_credential"):
        chain_authenticate(missing, missing)(request())
    with refused("expired_credential"):
        chain_authenticate(missing, fails(AuthFailure(AuthReason.EXPIRED_CREDENTIAL)), static)(request(bearer("x")))
    with refused("unauthorized"):
        chain_authenticate(missing, fails(ValueError("missing_credential")))(request())


def test_chain_stops_at_refusals_outages_and_bugs() -> None:
    for stop in (PermissionError("x"), core.AuthUnavailableError(), KeyError("x")):

        def first(_: falcon.Request, stop: Exception = stop) -> Any:
            raise stop

        with pytest.raises(type(stop)):
            chain_authenticate(first, static)(request(bearer("secret-alice")))


def test_a_gate_is_no_alternative() -> None:
    with pytest.raises(TypeError, match="require_all"):
        chain_authenticate(static, gate())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        chain_authenticate()
    with pytest.raises(TypeError, match="PreconditionGate"):
        require_all(static)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="another gate"):
        require_all(gate(), gate())  # type: ignore[arg-type]


def test_require_all_asks_the_gate_first() -> None:
    called = []

    def inner(_: falcon.Request) -> Any:
        called.append(1)
        return AuthContext("jwt", True, "carol", {"a": 1, "hop_claims": {"verified": "true", "proxy": "forged"}})

    with pytest.raises(PermissionError):
        require_all(gate(refuse=True), inner)(request())
    assert called == []
    auth = require_all(gate({"verified": "false", "proxy": ""}), inner)(request())
    assert (auth.principal, auth.claims["a"]) == ("carol", 1)
    assert auth.claims["hop_claims"] == {"verified": "false", "proxy": ""}


def test_a_gate_alone_authenticates_only_what_it_proved() -> None:
    auth = require_all(gate())(request())
    assert (auth.authenticated, auth.domain, auth.principal) == (True, "hop", "edge")
    for claims in ({"verified": "false", "proxy": ""}, {"verified": "false", "proxy": "edge"}, {"verified": "true"}):
        auth = require_all(gate(claims))(request())
        assert (auth.authenticated, auth.domain, auth.principal) == (False, None, None)
        assert auth.claims["hop_claims"] == claims


def test_proxy_headers_are_merged_in_order() -> None:
    one, two = (declare_proxy_headers(lambda _: ALICE, name, "X-Both") for name in ("X-A", "X-B"))
    assert merge_proxy_headers(one, two, None) == ("X-A", "X-Both", "X-B")
    assert proxy_headers_of(require_all(gate(), chain_authenticate(two, one))) == ("X-Hop", "X-B", "X-Both", "X-A")
    assert proxy_headers_of(make_cookie_authenticate(one)) == ("X-A", "X-Both")
    assert build_proxy_hint(()) == ""
    assert "X-A, X-B" in build_proxy_hint(("X-A", "X-B"))


def test_classification_reads_no_text() -> None:
    assert classify_auth_failure(ValueError("expired_credential")) is AuthReason.UNAUTHORIZED
    assert classify_auth_failure(PermissionError("missing")) is AuthReason.INSUFFICIENT_SCOPE
    declared = RuntimeError()
    declared.vgi_auth_reason = AuthReason.PROXY_REQUIRED  # type: ignore[attr-defined]
    assert classify_auth_failure(declared) is AuthReason.PROXY_REQUIRED


# Cookies


def test_cookie_is_shown_as_a_bearer() -> None:
    by_cookie = make_cookie_authenticate(static)
    req = request({"Cookie": "_vgi_auth=secret-alice", "Authorization": "Bearer other"})
    assert req.headers["AUTHORIZATION"] == "Bearer other"
    assert by_cookie(req) is ALICE
    assert req.get_header("Authorization") == "Bearer other"
    with refused("missing_credential"):
        by_cookie(request())
    with refused("invalid_credential"):
        by_cookie(request({"Cookie": "_vgi_auth=secret-alice; _vgi_auth=x"}))


def test_cookie_does_not_authenticate_other_sites() -> None:
    by_cookie = make_cookie_authenticate(static)

    def post(**headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return by_cookie(request({"Cookie": "_vgi_auth=secret-alice", "Host": "calc.example", **named}, method="POST"))

    assert post(Sec_Fetch_Site="same-origin") is ALICE
    assert post(Origin="https://calc.example") is ALICE
    assert post() is ALICE
    bad = (
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "https://evil"},
        {"Origin": "null"},
    )
    for headers in bad:
        with refused("invalid_credential"):
            post(**headers)


# The answers


def failing(exc: Exception) -> Any:
    def authenticate(_: falcon.Request) -> Any:
        raise exc

    return authenticate


def test_401_envelope() -> None:
    answer = client(static).simulate_get("/x")
    assert answer.status_code == 401
    assert answer.headers["VGI-Auth-Reason"] == "missing_credential"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "VGI-Auth-Proxy-Required" not in answer.headers
    assert answer.text == '{"error":"unauthorized","reason":"missing_credential","detail":"authentication rejected"}'


def test_refusals_differ_in_the_reason_only() -> None:
    excs = [AuthFailure(AuthReason.INVALID_CREDENTIAL, "user alice exists"), AuthFailure(AuthReason.INVALID_CREDENTIAL)]
    headers = {**bearer("tok"), "X-Request-ID": "1"}
    answers = [client(failing(exc)).simulate_get("/x", headers=headers) for exc in excs]
    assert answers[0].content == answers[1].content
    assert dict(answers[0].headers) == dict(answers[1].headers)
    assert "tok" not in answers[0].text and "alice" not in answers[0].text


def test_proxy_hint_depends_on_the_configuration_only() -> None:
    behind = declare_proxy_headers(static, "X-SSL-Client-Cert")
    http = client(behind, proxy_auth_headers=["X-Extra"], proxy_proof_required=True)
    texts = set()
    for headers in ({}, bearer("wrong"), {"Authorization": "Basic x"}):
        answer = http.simulate_get("/x", headers=headers)
        assert answer.headers["VGI-Auth-Proxy-Required"] == "true"
        texts.add(answer.json["proxy_hint"])
    (hint,) = texts
    assert "X-Extra, X-SSL-Client-Cert, VGI-Proxy-Proof" in hint and "proxy" in hint
    del behind.vgi_proxy_headers  # type: ignore[attr-defined]


def test_html_for_people() -> None:
    http = client(static, proxy_auth_headers=["X-<b>"])
    answer = http.simulate_get("/x", headers={"Accept": "text/html,*/*;q=0.8"})
    assert answer.headers["Content-Type"].startswith("text/html")
    assert "missing_credential" in answer.text and "X-&lt;b&gt;" in answer.text
    assert http.simulate_get("/x", headers={"Accept": "*/*"}).headers["Content-Type"] == "application/json"


def test_outage_is_503_and_a_bug_is_500() -> None:
    answer = client(failing(core.AuthUnavailableError("ldap down: s3cret", retry_after=7))).simulate_get("/x")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "7")
    assert answer.json == {"title": "503 Service Unavailable", "description": "authentication authority unavailable"}
    answer = client(failing(KeyError("s3cret"))).simulate_get("/x")
    assert (answer.status_code, answer.json) == (500, {"title": "500 Internal Server Error"})
    assert client(lambda _: None).simulate_get("/x").status_code == 500
    for header in ("VGI-Auth-Reason", "VGI-Auth-Proxy-Required", "WWW-Authenticate"):
        assert header not in answer.headers


def test_no_credential_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vgi_rpc.http")
    excs: list[Exception] = [ValueError("tok-s3cret"), PermissionError("tok-s3cret"), KeyError("tok-s3cret")]
    for exc in [*excs, core.AuthUnavailableError("tok-s3cret")]:
        client(failing(exc)).simulate_get("/x?key=tok-s3cret", headers=bearer("tok-s3cret"))
    logged = "\n".join(logging.Formatter().format(record) + repr(vars(record)) for record in caplog.records)
    assert len(caplog.records) == 4
    assert "s3cret" not in logged
    assert "ValueError" in logged and "insufficient_scope" in logged


def test_failures_are_counted() -> None:
    seen: list[str] = []
    guard = AuthGuard(static, on_failure=lambda exc: seen.append(type(exc).__name__))
    for headers in ({}, bearer("secret-alice")):
        guard.process_request(request(headers), falcon.Response())
    assert seen == ["AuthFailure"]


@pytest.mark.parametrize(
    ("method", "path", "exempt"),
    [
        ("OPTIONS", "/vgi/calc/add", True),
        ("GET", "/.well-known/oauth-protected-resource", True),
        ("GET", "/vgi/health", True),
        ("GET", "/vgi/health/x", True),
        ("GET", "/vgi/healthz", False),
        ("GET", "/health", False),
        ("GET", "/.well-knownx", False),
        ("GET", "/vgi/_oauth/callback", False),
        ("GET", "/vgi", False),
        ("GET", "/", False),
    ],
)
def test_exemptions_are_whole_segments(method: str, path: str, exempt: bool) -> None:
    assert AuthGuard(static, prefix="/vgi").is_exempt(method, path) is exempt


def test_exempt_and_open_requests_are_anonymous() -> None:
    http = client(static)
    answer = http.simulate_get("/.well-known/a/b", headers=bearer("secret-alice"))
    assert (answer.status_code, answer.json["principal"]) == (200, None)
    for path in ("/health/add", "/_oauth/add", "/health/add/init"):  # no call gets in below an open path
        answer = http.simulate_post(path)
        assert answer.status_code in (401, 404) and "Calc" not in answer.text
    assert client(None).simulate_get("/x").json["principal"] is None


# The client's side


def test_client_reads_its_own_servers_401() -> None:
    answer = client(static, proxy_auth_headers=["X-Hop"]).simulate_get("/x", headers=bearer("no"))
    error = read_unauthorized(answer.content, dict(answer.headers), request_id="r1")
    assert isinstance(error, core.RpcError)
    assert (error.reason, error.detail) == (AuthReason.INVALID_CREDENTIAL, "authentication rejected")
    assert error.error_type == "AuthenticationError" and error.request_id == "r1"
    assert str(error).endswith("\n\n" + error.proxy_hint) and "X-Hop" in error.proxy_hint
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.reason, copy.proxy_hint, str(copy)) == (error.reason, error.proxy_hint, str(error))
    assert pickle.loads(pickle.dumps(AuthFailure(AuthReason.UNAUTHORIZED, "x"))).reason == "unauthorized"


def test_client_reads_foreign_401s() -> None:
    header = {"vgi-auth-reason": "expired_credential"}
    assert read_unauthorized(b"<html>sso</html>", header).reason == "expired_credential"
    assert "web page" in read_unauthorized(b"<html>sso</html>", {}).detail
    assert read_unauthorized(b"", {}).detail == "unauthorized"
    assert read_unauthorized(b'{"reason":"made_up"}', {}).reason == "unauthorized"
    assert len(read_unauthorized(b"x" * 9000, {}).detail) == 500
    assert "\x1b" not in str(read_unauthorized(b'{"detail":"\\u001b[2J","proxy_hint":"\\u001b]0;"}', {}))


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode()))
def test_client_survives_any_body(body: bytes) -> None:
    assert isinstance(read_unauthorized(body, {"VGI-Auth-Reason": "x"}), AuthenticationError)


# The package


def test_names_are_lazy_and_complete() -> None:
    for package in ("joserfc", "authlib", "httpx", "cryptography"):
        pytest.importorskip(package)
    for name in auth_package.__all__:
        assert getattr(auth_package, name).__class__ is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        getattr(auth_package, "nothing_such")  # noqa: B009
    code = (
        "import sys; sys.modules['joserfc'] = None; sys.modules['cryptography'] = None\n"
        f"import {core.__name__} as core; core.bearer_authenticate\n"
        "assert 'httpx' not in sys.modules\n"
        "from vgi_rpc_extras.auth import proxy_proof_gate, mtls_authenticate_xfcc\n"
        "try:\n    core.jwt_authenticate\n"
        "except ImportError as exc:\n    print(exc)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jwt_authenticate" in ran.stdout and "pip install 'vgi-rpc-onefile[oauth]'" in ran.stdout
