"""The browser login against a real provider, by hand and in a headless Chromium."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import pytest

pytest.importorskip("authlib")
pytest.importorskip("httpx")
pytest.importorskip("falcon")

import falcon.testing
import httpx
from hypothesis import given
from hypothesis import strategies as st

from tests.core import core
from tests.extras.auth_app import make_app, refused, request
from tests.extras.auth_provider import SECRET, Provider, running, served_at
from vgi_rpc_extras.auth import (
    BrowserLogin,
    OAuthResourceMetadata,
    ProxyProofConfig,
    bearer_authenticate_static,
    jwt_authenticate,
    mint_proof,
    proxy_proof_gate,
    require_all,
)

KEY = b"t" * 32
HTML = {"Accept": "text/html"}


@contextlib.contextmanager
def service(provider: Provider, *, prefix: str = "/vgi", **options: Any) -> Iterator[Any]:
    """A service with a login; `metadata` fields and BrowserLogin options by name."""
    known = OAuthResourceMetadata.__dataclass_fields__
    fields: dict[str, Any] = {"client_id": "browser", "client_secret": SECRET, "scopes_supported": ("openid", "email")}
    fields |= {name: options.pop(name) for name in list(options) if name in known}
    audience = fields["client_id"] if fields.get("use_id_token_as_bearer") else "calc"
    found = SimpleNamespace(provider=provider)

    def build(url: str) -> Any:
        resource = str(fields.pop("resource", url + prefix))
        found.metadata = OAuthResourceMetadata(resource, (provider.url,), **fields)
        found.login = BrowserLogin(found.metadata, prefix=prefix, token_key=KEY, **options)
        accept = jwt_authenticate(issuer=provider.url, audience=audience)
        return make_app(accept, prefix=prefix, oauth_resource_metadata=found.metadata, browser_login=found.login)

    with served_at(build) as found.url, httpx.Client(base_url=found.url, verify=False) as found.http:
        yield found


@pytest.fixture(scope="module")
def shared() -> Iterator[Provider]:
    with running("EC") as provider:
        yield provider


@pytest.fixture(scope="module")
def site(shared: Provider) -> Iterator[Any]:
    with service(shared) as found:
        yield found


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> None:
    if "site" in request.fixturenames:
        request.getfixturevalue("site").http.cookies.clear()


def start(site: Any, path: str = "/vgi/page?a=1&b=%C3%A9") -> str:
    """Ask for a page; returns where the provider would be."""
    answer = site.http.get(path, headers=HTML)
    assert answer.status_code == 302, answer.text
    return str(answer.headers["Location"])


def consent(location: str) -> str:
    """Log in at the provider; returns the callback URL with code and state."""
    with httpx.Client(transport=httpx.HTTPTransport(verify=False)) as http:  # no TLS here: no authorities to read
        answer = http.get(f"{location}&user=alice")
    assert answer.status_code == 302, answer.text
    return str(answer.headers["Location"])


def cookies(answer: httpx.Response) -> dict[str, str]:
    return {line.partition("=")[0]: line for line in answer.headers.get_list("Set-Cookie")}


# The way through


def test_login(site: Any, shared: Provider) -> None:
    answer = site.http.get("/vgi/page?a=1", headers=HTML)
    assert (answer.status_code, answer.content) == (302, b"")
    assert "WWW-Authenticate" not in answer.headers and "VGI-Auth-Reason" not in answer.headers
    query = parse_qs(urlsplit(answer.headers["Location"]).query)
    assert query["redirect_uri"] == [f"{site.url}/vgi/_oauth/callback"]
    assert query["response_type"] == ["code"] and query["code_challenge_method"] == ["S256"]
    assert query["scope"] == ["openid email"] and query["client_id"] == ["browser"]
    assert {"state", "nonce", "code_challenge"} <= set(query) and "access_type" not in query
    session = cookies(answer)["_vgi_oauth_session"]
    for part in ("Path=/vgi/_oauth/", "Max-Age=600", "HttpOnly", "SameSite=Lax"):
        assert part in session
    done = site.http.get(consent(answer.headers["Location"]))
    assert (done.status_code, done.headers["Location"]) == (302, "/vgi/page?a=1")
    assert done.headers["Referrer-Policy"] == "no-referrer" and "no-store" in done.headers["Cache-Control"]
    auth = cookies(done)["_vgi_auth"]
    for part in ("Path=/vgi", "Max-Age=300", "HttpOnly", "SameSite=Lax"):
        assert part in auth
    assert "HttpOnly" not in cookies(done)["_vgi_identity"]
    assert "_vgi_oauth_session" not in site.http.cookies
    shown = cookies(done)["_vgi_identity"].split("=", 1)[1].split(";")[0]
    identity = json.loads(base64.urlsafe_b64decode(shown + "=="))
    assert identity == {"sub": "alice", "email": "a@example.com", "name": "<b>Alice</b>"}
    assert site.http.get("/vgi/page", headers=HTML).json()["principal"] == "alice"
    assert site.http.post("/vgi/page").json()["principal"] == "alice"
    assert site.http.post("/vgi/page", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 401
    out = site.http.get("/vgi/_oauth/logout")
    assert (out.status_code, out.headers["Location"]) == (302, "/vgi")
    assert not {"_vgi_auth", "_vgi_identity"} & set(site.http.cookies)
    assert site.http.get("/vgi/page").status_code == 401


def test_secure_cookies_where_the_resource_is_https(shared: Provider) -> None:
    with service(shared, resource="https://calc.example/vgi") as site:
        answer = site.http.get("/vgi/page", headers=HTML)
        assert "Secure" in cookies(answer)["_vgi_oauth_session"]
        query = parse_qs(urlsplit(answer.headers["Location"]).query)
        assert query["redirect_uri"] == ["https://calc.example/vgi/_oauth/callback"]


def test_public_client_id_token_and_readable_cookie(shared: Provider) -> None:
    options: dict[str, Any] = {"client_id": "public", "client_secret": None}
    with service(shared, use_id_token_as_bearer=True, javascript_cookie=True, prefix="", **options) as site:
        done = site.http.get(consent(start(site, "/page")))
        assert "HttpOnly" not in cookies(done)["_vgi_auth"] and "Path=/;" in cookies(done)["_vgi_auth"]
        assert site.http.get("/page").json()["claims"]["aud"] == "public"
        assert site.http.post("/_oauth/token").status_code == 404


def test_machines_get_the_401(site: Any) -> None:
    for method, headers in (("GET", {}), ("GET", {"Accept": "*/*"}), ("POST", HTML), ("HEAD", HTML)):
        answer = site.http.request(method, "/vgi/page", headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"].startswith("Bearer resource_metadata=")
        assert SECRET not in answer.headers["WWW-Authenticate"]


def test_no_login_where_none_helps(shared: Provider) -> None:
    with service(shared) as site:
        for exc, status in ((PermissionError("x"), 401), (ValueError("x"), 302)):

            def refuse(_: Any, exc: Exception = exc) -> Any:
                raise exc

            app = make_app(refuse, prefix="/vgi", oauth_resource_metadata=site.metadata)  # with a login of its own
            http = falcon.testing.TestClient(app)
            assert http.simulate_get("/vgi/page", headers=HTML).status_code == status


# What must not work


def test_a_login_works_once(site: Any) -> None:
    location = start(site)
    session = site.http.cookies["_vgi_oauth_session"]
    callback = consent(location)
    assert site.http.get(callback).status_code == 302
    again = httpx.get(callback, headers={"Cookie": f"_vgi_oauth_session={session}"})
    assert again.status_code == 400 and "_vgi_auth" not in cookies(again)


def test_state_must_match(site: Any) -> None:
    callback = consent(start(site))
    site.http.cookies.clear()
    assert site.http.get(callback).status_code == 400  # another browser: a login forced upon its user
    start(site)
    assert site.http.get(callback).status_code == 400
    parts = urlsplit(callback)
    for change in ({"state": "x"}, {"state": "\u00e9"}, {"state": ""}, {"code": ""}):
        query = {**dict(parse_qsl(parts.query)), **change}
        start(site)
        assert site.http.get(f"{parts.path}?{urlencode(query)}").status_code == 400


def test_state_is_compared_in_constant_time(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    seen: list[bytes] = []
    real = hmac.compare_digest

    def spy(a: Any, b: Any) -> bool:
        seen.append(a)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    start(site)
    site.http.get("/vgi/_oauth/callback?code=c&state=guess")
    assert b"guess" in seen


@given(st.binary(max_size=80) | st.just(b"\x05" + b"\0" * 60))
def test_forged_sessions_are_none(raw: bytes) -> None:
    login = plain()
    assert login._open(base64.urlsafe_b64encode(raw).decode().rstrip("=")) is None
    assert login._open(raw.decode("latin-1")) is None


def plain(**options: Any) -> BrowserLogin:
    metadata = OAuthResourceMetadata("https://calc.example/vgi", ("https://id.example",), client_id="cid")
    return BrowserLogin(metadata, prefix="/vgi", token_key=KEY, **options)


def test_sessions_age(monkeypatch: pytest.MonkeyPatch) -> None:
    from vgi_rpc_extras.auth.login import _Session

    login, session = plain(), _Session("v", "s", "/vgi", "", "n")
    cookie = login._seal(session)
    assert login._open(cookie) == session
    assert "s" not in repr(session).split()
    real = time.time()
    for offset in (601, -5):
        monkeypatch.setattr(time, "time", lambda offset=offset: real + offset)
        assert login._open(cookie) is None


BAD_LOCAL = [
    "//evil.example",
    "/\\evil.example",
    "/vgi/..\\x",
    "https://evil.example/vgi",
    "/vgi-evil",
    "/vgiX/y",
    "vgi",
    "",
    "/",
    "/vgi/\r\nSet-Cookie: a=b",
    "/vgi/\x00",
    "/vgi/" + "x" * 3000,
    "javascript:alert(1)",
    "\t/vgi",
]


@pytest.mark.parametrize("url", BAD_LOCAL)
def test_no_open_redirect(url: str) -> None:
    assert plain()._local(url) == "/vgi"


def test_own_pages_are_returned_to() -> None:
    for url in ("/vgi", "/vgi/", "/vgi/page?x=//evil", "/vgi?x=1"):
        assert plain()._local(url) == url


@pytest.mark.parametrize("path", ["//evil.example/vgi", "/%5Cevil.example", "/vgi-evil", "/vgi/%0d%0aX: y"])
def test_no_open_redirect_through_the_request_line(site: Any, path: str) -> None:
    answer = httpx.get(f"{site.url}{path}", headers=HTML)
    assert answer.status_code == 302
    session = site.login._open(answer.cookies["_vgi_oauth_session"])
    assert session.original == "/vgi" or session.original.startswith("/vgi/%0D%0A")


def test_external_return_is_off_by_default(site: Any) -> None:
    for target in ("http://localhost:9999/", "http://127.0.0.1/", "https://evil.example/"):
        location = start(site, f"/vgi/page?_vgi_return_to={quote(target)}")
        assert "access_type" not in location
        done = site.http.get(consent(location))
        assert done.headers["Location"] == "/vgi/page"
        again = site.http.get("/vgi/page", params={"_vgi_return_to": target}, headers=HTML)
        assert again.status_code == 200
        site.http.cookies.clear()


def test_external_return_to_listed_origins(shared: Provider) -> None:
    with service(shared, return_origins=["https://app.example"]) as site:
        target = "https://app.example/cb?x=1"
        location = start(site, f"/vgi/page?{urlencode({'_vgi_return_to': target, 'k': 'v'})}")
        assert "access_type=offline" in location and "prompt=consent" in location
        done = site.http.get(consent(location))
        url, _, fragment = done.headers["Location"].partition("#")
        assert url == target
        handed = dict(parse_qsl(fragment))
        assert set(handed) == {"token", "client_id", "token_endpoint"}
        assert SECRET not in done.headers["Location"]
        again = site.http.get("/vgi/page", params={"_vgi_return_to": target}, headers=HTML)
        assert again.headers["Location"].startswith(f"{target}#token=") and "Referrer-Policy" in again.headers
        other = site.http.get("/vgi/page", params={"_vgi_return_to": "https://app.example:444/"}, headers=HTML)
        assert other.status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        "https://app.example.evil/",
        "https://app.example@evil/",
        "https://app.example:444/",
        "http://app.example/",
        "https://app.example\\@evil/",
        "https://app.example/#token=x",
        "https://app.example/ x",
        "javascript://app.example/%0aalert(1)",
        "//app.example/",
        "http://localhost:1/",
        "https://app.example/" + "x" * 3000,
        "https://app.example:x/",
    ],
)
def test_lookalikes_of_listed_origins(url: str) -> None:
    assert not plain(return_origins=["https://app.example"])._may_return(url)


def test_loopback_return_when_enabled() -> None:
    login = plain(allow_loopback_return=True)
    assert login._may_return("http://localhost:9999/") and login._may_return("http://127.0.0.1/x")
    for url in ("http://localhost.evil:1/", "http://127.0.0.1.evil/", "https://evil/", "http://0.0.0.0/"):
        assert not login._may_return(url)


def test_provider_errors_are_escaped(site: Any) -> None:
    said = "error=x&error_description=%3Cscript%3Ealert(1)%3C/script%3E"
    for made_up in ("", "&state=x", "&state="):  # a link that somebody sent
        site.http.get("/vgi/page", headers=HTML)
        answer = site.http.get(f"/vgi/_oauth/callback?{said}{made_up}")
        assert answer.status_code == 400 and "alert" not in answer.text
    state = parse_qs(urlsplit(site.http.get("/vgi/page", headers=HTML).headers["Location"]).query)["state"][0]
    answer = site.http.get(f"/vgi/_oauth/callback?{said}&state={state}")
    assert answer.status_code == 400
    assert "<script>" not in answer.text and "&lt;script&gt;" in answer.text
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "script-src" not in answer.headers["Content-Security-Policy"]


def broken_login(provider: Provider, **options: Any) -> httpx.Response:
    with service(provider, **options) as site:
        answer: httpx.Response = site.http.get(consent(start(site)))
        return answer


@pytest.mark.parametrize(
    "claims",
    [
        {"nonce": "other"},
        {"nonce": None},
        {"aud": "someone"},
        {"iss": "https://evil"},
        {"exp": 1},
        {"aud": ["browser", "x"]},
    ],
    ids=str,
)
def test_id_token_is_verified(claims: dict[str, Any]) -> None:
    with running("EC") as provider:
        provider.id_claims = claims
        answer = broken_login(provider)
        assert answer.status_code == 502 and "_vgi_auth" not in cookies(answer)


def test_id_token_signed_by_another_key() -> None:
    with running("EC") as provider:
        provider.published = []
        assert broken_login(provider).status_code == 502


def test_mix_up_is_refused() -> None:
    with running("EC") as provider:
        provider.extra = {"authorization_response_iss_parameter_supported": True}
        with service(provider) as site:
            callback = consent(start(site))
            assert site.http.get(callback).status_code == 400
            callback = consent(start(site))
            assert site.http.get(f"{callback}&iss=https%3A%2F%2Fevil.example").status_code == 400
            callback = consent(start(site))
            assert site.http.get(f"{callback}&iss={quote(provider.url, safe='')}").status_code == 302


def test_wrong_code_or_secret() -> None:
    with running("EC") as provider:
        assert broken_login(provider, client_secret="wrong").status_code == 502
        with service(provider) as site:
            callback = consent(start(site))
            broken = callback.replace("code=", "code=x")
            answer = site.http.get(broken)
            assert answer.status_code == 502 and "_vgi_auth" not in cookies(answer)


def test_provider_down() -> None:
    with running("EC") as provider, service(provider) as site:
        provider.broken.add("/.well-known/openid-configuration")
        for _ in range(3):
            answer = site.http.get("/vgi/page", headers=HTML)
            assert answer.status_code == 401 and answer.headers["Content-Type"].startswith("text/html")
        assert provider.requests["/.well-known/openid-configuration"] == 1
        provider.broken.clear()
        site.login._provider._not_before = 0.0  # the pause is over
        assert site.http.get("/vgi/page", headers=HTML).status_code == 302
        callback = consent(start(site))
        provider.broken.add("/token")
        assert site.http.get(callback).status_code == 502


def test_no_secret_in_pages_or_logs(shared: Provider, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="vgi_rpc")
    with service(shared) as site:
        location = start(site)
        session = site.http.cookies["_vgi_oauth_session"]
        callback = consent(location)
        code = parse_qs(urlsplit(callback).query)["code"][0]
        done = site.http.get(callback)
        token = site.http.cookies["_vgi_auth"]
        assert token not in done.text
        page = site.http.get(callback)
        for secret in (SECRET, session, code, token):
            assert secret not in caplog.text + page.text + repr(site.login)


# The proof of a proxy inside a login


def test_a_proof_is_used_once_per_request() -> None:
    static = bearer_authenticate_static(tokens={"t": core.AuthContext("key", True, "alice")})
    gate = proxy_proof_gate(ProxyProofConfig("require", "w1", {"k": (b"k" * 32, "edge")}))
    authenticate = plain().authenticator(require_all(gate, static))
    proof = {"VGI-Proxy-Proof": mint_proof(b"k" * 32, "k", "w1")}
    assert authenticate(request({"Cookie": "_vgi_auth=t", **proof})).principal == "alice"
    with pytest.raises(PermissionError):
        authenticate(request({"Cookie": "_vgi_auth=t"}))
    with refused("invalid_credential"):
        authenticate(
            request({"Cookie": "_vgi_auth=t", **bearer_header(), "VGI-Proxy-Proof": mint_proof(b"k" * 32, "k", "w1")})
        )


def bearer_header() -> dict[str, str]:
    return {"Authorization": "Bearer wrong"}


# The token endpoint for public clients


def test_token_endpoint(site: Any, shared: Provider) -> None:
    login = httpx.get(start(site) + "&user=alice")
    code = parse_qs(urlsplit(login.headers["Location"]).query)["code"][0]
    verifier = site.login._open(site.http.cookies["_vgi_oauth_session"]).verifier
    form = {"grant_type": "authorization_code", "code": code, "code_verifier": verifier, "evil": "x"}
    form["redirect_uri"] = f"{site.url}/vgi/_oauth/callback"
    answer = site.http.post("/vgi/_oauth/token", data=form)
    assert answer.status_code == 200 and answer.headers["Cache-Control"] == "no-store"
    assert "evil" not in shared.forms[-1] and "Access-Control-Allow-Origin" not in answer.headers
    refreshed = site.http.post(
        "/vgi/_oauth/token", data={"grant_type": "refresh_token", "refresh_token": answer.json()["refresh_token"]}
    )
    assert refreshed.status_code == 200 and refreshed.json()["access_token"]
    assert site.http.post("/vgi/_oauth/token", data=form).json()["error"] == "invalid_grant"


@pytest.mark.parametrize(
    ("form", "status", "error"),
    [
        ({"grant_type": "client_credentials"}, 400, "unsupported_grant_type"),
        ({"grant_type": "password", "username": "x"}, 400, "unsupported_grant_type"),
        ({"a": "b"}, 400, "unsupported_grant_type"),
        ({"grant_type": "refresh_token", "client_id": "other"}, 400, "invalid_client"),
        ({"grant_type": ["refresh_token", "password"]}, 400, "invalid_request"),
        ({"grant_type": "refresh_token", "scope": "x" * 20_000}, 413, "invalid_request"),
    ],
)
def test_token_endpoint_refuses(site: Any, form: dict[str, Any], status: int, error: str) -> None:
    answer = site.http.post("/vgi/_oauth/token", data=form)
    assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert site.http.post("/vgi/_oauth/token", json=form).status_code == 415


def test_token_endpoint_cors(shared: Provider) -> None:
    with service(shared, return_origins=["https://app.example"]) as site:
        for origin, allowed in (("https://app.example", True), ("https://evil", False), ("http://localhost:1", False)):
            answer = site.http.options("/vgi/_oauth/token", headers={"Origin": origin})
            assert (answer.headers.get("Access-Control-Allow-Origin") == origin) is allowed


def test_bad_settings() -> None:
    metadata = OAuthResourceMetadata("https://calc.example", ("https://id.example",))
    with pytest.raises(ValueError, match="client_id"):
        BrowserLogin(metadata, token_key=KEY)
    with pytest.raises(ValueError, match="return_origins"):
        plain(return_origins=["https://app.example/"])
    good = OAuthResourceMetadata("https://calc.example", ("https://id.example",), client_id="c")
    with pytest.raises(ValueError, match="token_key"):
        BrowserLogin(good, token_key=b"short")


def test_plain_http_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    metadata = OAuthResourceMetadata("http://calc.example", ("https://id.example",), client_id="c")
    BrowserLogin(metadata, token_key=KEY)
    assert "https" in caplog.text


# A real browser


def test_in_chromium(browser: Any, site: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{site.url}/vgi/page?a=1")
    assert page.title() == "Provider"
    page.fill("input[name=user]", "alice")
    page.click("#go")
    page.wait_for_url(f"{site.url}/vgi/page?a=1")
    assert json.loads(page.inner_text("body"))["principal"] == "alice"
    stored = {cookie["name"]: cookie for cookie in context.cookies()}
    assert stored["_vgi_auth"]["httpOnly"] and stored["_vgi_auth"]["sameSite"] == "Lax"
    assert "_vgi_oauth_session" not in stored
    assert "_vgi_auth=" not in page.evaluate("document.cookie")
    status = "async url => (await fetch(url, {method: 'POST', credentials: 'include', mode: 'no-cors'})).status"
    assert page.evaluate(status, f"{site.url}/vgi/page") == 200
    page.goto(f"{site.url}/vgi/describe")  # its calls are made by who is logged in
    form = page.locator("section", has_text="Calc/who").locator("details")
    form.locator("summary").click()
    form.locator("button").click()
    form.locator("pre:not([hidden])").wait_for()
    assert json.loads(form.locator("pre").inner_text()) == {"result": "alice"}
    page.goto(f"{site.url}/vgi/_oauth/logout")
    assert page.title() == "Provider"
    assert "_vgi_auth" not in {cookie["name"] for cookie in context.cookies()}
    context.close()


def test_chromium_sends_no_cookie_across_sites(browser: Any, site: Any, shared: Provider) -> None:
    """A page of another site posts a form here: the request arrives unauthenticated."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{site.url}/vgi/page")
    page.fill("input[name=user]", "alice")
    page.click("#go")
    page.wait_for_url(f"{site.url}/vgi/page")
    evil = shared.url.replace("127.0.0.1", "localhost")
    page.goto(f"{evil}/authorize")
    with page.expect_navigation() as navigation:
        page.evaluate(
            "url => { const form = document.createElement('form'); form.method = 'POST'; form.action = url;"
            " document.body.append(form); form.submit(); }",
            f"{site.url}/vgi/page",
        )
    assert navigation.value.status == 401
    context.close()
