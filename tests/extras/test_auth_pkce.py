"""Logging in from a command line through the browser of the same machine, against a real provider."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

pytest.importorskip("authlib")
pytest.importorskip("httpx")
pytest.importorskip("falcon")

import httpx
from hypothesis import given
from hypothesis import strategies as st

from tests.extras.auth_app import make_app
from tests.extras.auth_provider import SECRET, Provider, running, served_at
from vgi_rpc_extras.auth import (
    OAuthChallenge,
    OAuthRefreshContext,
    OAuthResourceMetadata,
    OAuthResourceMetadataResponse,
    OAuthServerMetadata,
    OAuthTokenError,
    VgiOAuthAuth,
    attempt_token_refresh,
    jwt_authenticate,
    perform_pkce_flow,
    pkce_login,
)

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


@pytest.fixture(scope="module")
def shared() -> Iterator[Provider]:
    with running("EC") as provider:
        yield provider


@pytest.fixture
def provider(shared: Provider) -> Iterator[Provider]:
    """The provider as it is by itself; without device codes."""
    shared.extra = {"device_authorization_endpoint": None}
    shared.forms.clear()
    yield shared
    shared.extra, shared.id_claims = {}, {}


@contextlib.contextmanager
def service(provider: Provider, *, prefix: str = "", **fields: Any) -> Iterator[str]:
    def build(url: str) -> Any:
        metadata = OAuthResourceMetadata(url, (provider.url,), ("openid",), **{"client_id": "cli", **fields})
        accept = jwt_authenticate(issuer=provider.url, audience="calc")
        return make_app(accept, prefix=prefix, oauth_resource_metadata=metadata)

    with served_at(build) as url:
        yield url


@pytest.fixture
def url(provider: Provider) -> Iterator[str]:
    with service(provider) as found:
        yield found


@pytest.fixture(autouse=True)
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test opens the browser of whoever runs the tests."""
    monkeypatch.setenv("SSH_CONNECTION", "somewhere")
    monkeypatch.setattr(pkce_login, "_HEAD_SECONDS", 0.1)


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A desk with a display and a person who says yes: `visits` are the pages her browser saw, `asked` the URLs."""
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("SSH_CONNECTION", "")
    desk = SimpleNamespace(asked=[], visits=[], threads=[])

    def visit(url: str) -> None:
        with httpx.Client(follow_redirects=True, transport=httpx.HTTPTransport(verify=False)) as browser:
            desk.visits.append(browser.get(f"{url}&user=alice"))

    def open_url(url: str) -> bool:
        desk.asked.append(url)
        desk.threads.append(threading.Thread(target=visit, args=(url,)))
        desk.threads[-1].start()
        return True

    monkeypatch.setattr(webbrowser, "open", open_url)
    yield desk
    for thread in desk.threads:
        thread.join()


def log_in(url: str, **options: Any) -> tuple[httpx.Response, VgiOAuthAuth]:
    auth = VgiOAuthAuth(base_url=url, **{"flow": "pkce", "on_prompt": lambda _: None, "timeout_seconds": 10, **options})
    with contextlib.closing(auth), httpx.Client(base_url=url, auth=auth) as http:
        return http.post("/x", content=b"body"), auth


def test_login(provider: Provider, url: str, desk: SimpleNamespace) -> None:
    shown: list[str] = []
    answer, auth = log_in(url, on_prompt=shown.append, prompt="consent")
    assert answer.json()["principal"] == "alice"
    assert shown == [f"To log in, open {desk.asked[0]}"] and auth.was_interactive()
    identity = auth.identity()
    assert identity is not None and identity.email == "a@example.com"
    query = dict(parse_qsl(urlsplit(desk.asked[0]).query))
    assert (query["response_type"], query["client_id"], query["prompt"]) == ("code", "cli", "consent")
    assert (query["scope"], query["code_challenge_method"]) == ("openid", "S256")
    form = provider.forms[-1]
    digest = hashlib.sha256(form["code_verifier"].encode()).digest()
    assert query["code_challenge"] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    assert len(form["code_verifier"]) >= 43 and form["redirect_uri"] == query["redirect_uri"]
    assert len({form["code_verifier"], query["state"], query["nonce"]}) == 3
    for thread in desk.threads:
        thread.join()
    page = desk.visits[0]
    assert page.status_code == 200 and str(page.url).startswith(f"{query['redirect_uri']}?")
    assert (page.headers["Referrer-Policy"], page.headers["Cache-Control"]) == ("no-referrer", "no-store")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", urlsplit(query["redirect_uri"]).port or 0)):
        pass  # the listener is gone


def test_refresh_comes_first(url: str, desk: SimpleNamespace) -> None:
    _, first = log_in(url)
    assert first._tokens is not None and len(desk.asked) == 1
    answer, again = log_in(url, refresh_token=first._tokens.refresh_token)
    assert answer.json()["principal"] == "alice" and len(desk.asked) == 1 and not again.was_interactive()


def test_without_a_display_the_url_is_shown_only(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda url: pytest.fail("a browser was opened"))
    with pytest.raises(OAuthTokenError, match="in time"):
        log_in(url, on_prompt=None, timeout_seconds=0.1)
    assert "To log in, open http://127.0.0.1:" in capsys.readouterr().err


def test_auto(provider: Provider, url: str, desk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, first = log_in(url, flow="auto")
    assert answer.status_code == 200 and len(desk.asked) == 1
    monkeypatch.setenv("SSH_CONNECTION", "somewhere")
    with pytest.raises(OAuthTokenError, match="no device-code login, and there is no browser here"):
        log_in(url, flow="auto")
    assert first._tokens is not None  # a refresh needs no browser
    assert log_in(url, flow="auto", refresh_token=first._tokens.refresh_token)[0].status_code == 200
    monkeypatch.setenv("SSH_CONNECTION", "")
    provider.extra = {}
    shown: list[str] = []
    with pytest.raises(OAuthTokenError):  # a device code where there is one: the prompt names it
        log_in(url, flow="auto", on_prompt=shown.append, timeout_seconds=0.1)
    assert "enter the code" in shown[0]


def test_the_service_keeps_its_secret(provider: Provider, desk: SimpleNamespace) -> None:
    with service(provider, client_id="browser", client_secret=SECRET) as url:
        answer, auth = log_in(url)
    assert answer.json()["principal"] == "alice"
    assert provider.forms[-1]["client_secret"] == SECRET  # added by the service's token endpoint
    assert auth._context is not None and auth._context.token_endpoint == f"{url}/_oauth/token"
    assert auth._context.client_secret == ""


def test_refused_by_the_person() -> None:
    with pytest.raises(OAuthTokenError, match="access_denied: no thanks") as caught:
        perform(answering(error="access_denied", error_description="no thanks\x1b[2J"))
    assert caught.value.error_code == "access_denied" and str(caught.value).isprintable()


# What arrives at the listener. The provider of these is a mock: the answers are those of an attacker.


def redirect_of(shown: str) -> tuple[str, dict[str, str]]:
    query = dict(parse_qsl(urlsplit(shown.rpartition(" ")[2]).query))
    return query["redirect_uri"], query


def answering(**answer: str) -> Callable[[str], None]:
    """A person whose browser comes back with these parameters, the right state and a code unless given."""

    def on_prompt(shown: str) -> None:
        target, query = redirect_of(shown)
        params = {"state": query["state"], **({} if "error" in answer else {"code": "c"}), **answer}
        threading.Thread(target=lambda: httpx.get(target, params=params)).start()

    return on_prompt


def perform(on_prompt: Callable[[str], None], token: Any = None, *, seconds: float = 5.0, **server: str) -> Any:
    given = token or (200, {"access_token": "at"})
    answer = httpx.MockTransport(lambda _: httpx.Response(given[0], json=given[1]))
    ends: dict[str, Any] = {
        "authorization_endpoint": "https://id.example/a",
        "token_endpoint": "https://id.example/t",
        **server,
    }
    resource = OAuthResourceMetadataResponse("https://x", ("https://id.example",), ("calc",), client_id="cli")
    with httpx.Client(transport=answer) as http:
        return perform_pkce_flow(
            OAuthChallenge("https://x/m"),
            resource,
            OAuthServerMetadata(**ends),
            http_client=http,
            timeout_seconds=seconds,
            on_prompt=on_prompt,
        )


def test_only_this_login_ends_the_wait() -> None:
    """Requests of other pages and programs of this machine are answered 404, and the login goes on."""
    seen: list[int] = []

    def on_prompt(shown: str) -> None:
        target, query = redirect_of(shown)
        good = {"state": query["state"], "code": "c"}

        def visit() -> None:
            with httpx.Client() as browser:
                for params in ({}, {"state": "guess", "code": "evil"}, {"code": "evil"}, {"error": "access_denied"}):
                    seen.append(browser.get(target, params=params).status_code)
                seen.append(browser.get(target.replace("/callback", "/favicon.ico"), params=good).status_code)
                seen.append(browser.post(target, params=good).status_code)
                seen.append(browser.get(f"{target}?state={good['state']}&code=a&code=b").status_code)
                seen.append(browser.get(target, params=good).status_code)

        threading.Thread(target=visit).start()

    tokens, context = perform(on_prompt)
    assert (tokens.access_token, context.client_id, seen[:7]) == ("at", "cli", [404] * 7)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\r\n\r\n", b"\xff\x00\r\n\r\n", b"GET /callback", b"GET " + b"a" * 40_000, b"GET /?a HTTP/1.1\r\n\r\n"],
)
def test_garbage_and_idle_connections(sent: bytes) -> None:
    def on_prompt(shown: str) -> None:
        target, query = redirect_of(shown)
        port = urlsplit(target).port
        idle = socket.create_connection(("127.0.0.1", port or 0))
        with contextlib.suppress(OSError):
            idle.sendall(sent)

        def visit() -> None:
            httpx.get(target, params={"state": query["state"], "code": "c"})
            idle.close()

        threading.Thread(target=visit).start()

    assert perform(on_prompt)[0].access_token == "at"


@given(st.binary(max_size=200) | st.text().map(lambda text: f"GET /callback?{text} HTTP/1.1\r\n\r\n".encode()))
def test_no_request_without_the_state_is_an_answer(head: bytes) -> None:
    with pkce_login._Callback("state of this login") as callback:
        assert callback._answered(head) is None


JSON = st.sampled_from(["", "token"]) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=5
)
NAMES = ("access_token", "refresh_token", "id_token", "expires_in", "scope", "error", "error_description", "token_type")


@given(st.just(200) | st.integers(200, 599), st.binary(max_size=50) | st.dictionaries(st.sampled_from(NAMES), JSON))
def test_any_answer_of_a_token_endpoint(status: int, body: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.MockTransport(lambda _: httpx.Response(status, content=content))
    with httpx.Client(transport=transport) as http:
        try:
            tokens = attempt_token_refresh(OAuthRefreshContext("https://id.example/t", "cli"), "old", http_client=http)
        except OAuthTokenError as exc:
            assert str(exc).isprintable()
        else:
            assert status == 200 and tokens.bearer_token().isprintable() and tokens.refresh_token


def test_another_provider_s_answer() -> None:
    """RFC 9207: a hostile provider that sent the browser on to an honest one must not get its code."""
    with pytest.raises(OAuthTokenError, match="another provider"):
        perform(answering(iss="https://honest.example"))
    assert perform(answering(iss="https://id.example"))[0].access_token == "at"


def test_bad_ends() -> None:
    with pytest.raises(OAuthTokenError, match="invalid_grant"):
        perform(answering(), (400, {"error": "invalid_grant"}))
    with pytest.raises(OAuthTokenError, match="access token"):
        perform(answering(), (200, {}))
    with pytest.raises(OAuthTokenError, match="refused"):
        perform(answering(code=""))
    with pytest.raises(OAuthTokenError, match="no browser login"):
        perform(answering(), authorization_endpoint="")
    began = time.monotonic()
    with pytest.raises(OAuthTokenError, match="in time"):
        perform(lambda _: None, seconds=0.1)
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize(
    "endpoint",
    ["https://id.example:99999/t", "https://id.example:0/t", "https://xn--\u0300/t", "https://xn--a-ecp.ru/t"],
)
def test_a_token_endpoint_that_is_no_url(endpoint: str) -> None:
    transport = httpx.MockTransport(lambda request: pytest.fail(f"{request.url} was called"))
    with httpx.Client(transport=transport) as http, pytest.raises(OAuthTokenError):
        attempt_token_refresh(OAuthRefreshContext(endpoint, "cli"), "old", http_client=http)


def test_an_endpoint_with_a_query_keeps_it() -> None:
    shown: list[str] = []
    with pytest.raises(OAuthTokenError):
        perform(shown.append, seconds=0.01, authorization_endpoint="https://id.example/a?tenant=1")
    assert shown[0].startswith("To log in, open https://id.example/a?tenant=1&response_type=code&")


def test_an_id_token_of_another_login(provider: Provider, url: str, desk: SimpleNamespace) -> None:
    provider.id_claims = {"nonce": "another"}
    with pytest.raises(OAuthTokenError, match="another login"):
        log_in(url)


@pytest.mark.parametrize("endpoint", ["https://evil.example/t", "https://x:444/t", "http://x/t", "https://x:99999/t"])
def test_a_token_endpoint_elsewhere(endpoint: str) -> None:
    resource = OAuthResourceMetadataResponse(
        "https://x", ("https://id.example",), client_id="cli", token_endpoint=endpoint
    )
    server = OAuthServerMetadata("https://id.example/a", "https://id.example/t")
    with httpx.Client() as http, pytest.raises(OAuthTokenError, match="another origin"):
        perform_pkce_flow(OAuthChallenge("https://x/m"), resource, server, http_client=http, timeout_seconds=1)


# Real browsers


def test_with_the_browser_of_the_environment(url: str, desk: SimpleNamespace, tmp_path: Any) -> None:
    """The module webbrowser starts what BROWSER names; here a program that says yes."""
    browser = tmp_path / "browser"
    visit = "import sys, urllib.request as r; r.urlopen(sys.argv[1] + '&user=alice').read()"
    browser.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{visit}" "$1"\n')
    browser.chmod(0o755)
    client = (
        "import httpx, sys; from vgi_rpc_extras.auth import VgiOAuthAuth\n"
        "auth = VgiOAuthAuth(base_url=sys.argv[1], flow='pkce', timeout_seconds=20)\n"
        "print(httpx.get(sys.argv[1] + '/x', auth=auth).json()['principal'])"
    )
    env = {**os.environ, "BROWSER": f"{browser} %s", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", client, url], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "alice\n", done.stderr
    assert done.stderr.startswith("To log in, open http://127.0.0.1:") and done.stderr.count("\n") == 1


def test_in_chromium(url: str, tmp_path: Any) -> None:
    if not os.path.exists(CHROMIUM):
        pytest.skip("chromium is not installed")
    pages: list[subprocess.Popen[str]] = []

    def on_prompt(shown: str) -> None:
        command = [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            f"{shown.rpartition(' ')[2]}&user=alice",
        ]
        pages.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))

    answer, _ = log_in(url, on_prompt=on_prompt, timeout_seconds=30)
    assert answer.json()["principal"] == "alice"
    assert "go back to the program" in pages[0].communicate(timeout=30)[0]
