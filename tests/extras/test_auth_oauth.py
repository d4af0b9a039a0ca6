"""Protected-resource metadata served and read, and logging in from a command line with a device code."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("authlib")
pytest.importorskip("httpx")
pytest.importorskip("falcon")

import falcon
import httpx
from hypothesis import given
from hypothesis import strategies as st

from tests.core import core
from tests.extras.auth_app import make_app
from tests.extras.auth_provider import Provider, running, served, served_at
from vgi_rpc_extras.auth import (
    OAuthChallenge,
    OAuthIdentity,
    OAuthResourceMetadata,
    OAuthResourceMetadataResponse,
    OAuthServerMetadata,
    OAuthTokenError,
    OAuthTokenSet,
    VgiOAuthAuth,
    bearer_authenticate_static,
    build_www_authenticate,
    fetch_auth_server_metadata,
    fetch_oauth_metadata,
    http_oauth_metadata,
    jwt_authenticate,
    oauth_tokens,
    parse_client_id,
    parse_client_secret,
    parse_device_code_client_id,
    parse_device_code_client_secret,
    parse_oauth_challenge,
    parse_resource_metadata_url,
    parse_use_id_token_as_bearer,
    parse_www_authenticate_params,
    perform_device_code_flow,
    pkce_login,
    select_device_code_client,
)

SECRETS: dict[str, Any] = {"client_secret": "cs-hush", "device_code_client_secret": "ds-hush"}
FULL = OAuthResourceMetadata(
    "https://calc.example/vgi",
    ("https://id.example",),
    ("openid", "calc"),
    resource_name="Calc",
    client_id="cid",
    use_id_token_as_bearer=True,
    device_code_client_id="did",
    **SECRETS,
)


def test_document_holds_no_secret() -> None:
    assert FULL.to_json_dict() == {
        "resource": "https://calc.example/vgi",
        "authorization_servers": ["https://id.example"],
        "scopes_supported": ["openid", "calc"],
        "resource_name": "Calc",
        "client_id": "cid",
        "use_id_token_as_bearer": True,
        "device_code_client_id": "did",
    }
    assert build_www_authenticate(FULL, prefix="/vgi") == (
        'Bearer resource_metadata="https://calc.example/.well-known/oauth-protected-resource/vgi", client_id="cid",'
        ' use_id_token_as_bearer="true", device_code_client_id="did"'
    )
    shown = json.dumps(FULL.to_json_dict()) + build_www_authenticate(FULL) + repr(FULL)
    assert "hush" not in shown


def test_only_secrets_declared_public_are_published() -> None:
    public = OAuthResourceMetadata(
        "https://calc.example",
        ("https://id.example",),
        client_id="cid",
        device_code_client_id="did",
        public_secrets=("device_code_client_secret",),
        **SECRETS,
    )
    assert "client_secret" not in public.to_json_dict()
    assert public.to_json_dict()["device_code_client_secret"] == "ds-hush"
    challenge = build_www_authenticate(public)
    assert parse_client_secret(challenge) is None
    assert parse_device_code_client_secret(challenge) == "ds-hush"
    assert "public_secrets" not in public.to_json_dict()


def test_bad_metadata() -> None:
    good: dict[str, Any] = {"resource": "https://calc.example", "authorization_servers": ("https://id.example",)}
    bad: list[dict[str, Any]] = [
        {"resource": ""},
        {"authorization_servers": ()},
        {"resource": 'https://x"'},
        {"resource": "https://x\r\nSet-Cookie: a"},
        {"resource": "calc"},
        {"client_id": "a b"},
        {"client_id": "a\n"},
        {"client_secret": 'a"'},
        {"device_code_client_id": ""},
        {"device_code_client_secret": "\u00e9"},
        {"public_secrets": ("resource",)},
    ]
    for change in bad:
        with pytest.raises(ValueError) as caught:
            OAuthResourceMetadata(**{**good, **change})
        assert str(change.get("client_secret", "--")) not in str(caught.value)


def app(metadata: OAuthResourceMetadata, authenticate: Any, prefix: str = "/vgi") -> falcon.App[Any, Any]:
    return make_app(authenticate, prefix=prefix, oauth_resource_metadata=metadata)


def test_served_and_read() -> None:
    static = bearer_authenticate_static(tokens={"t": core.AuthContext("key", True, "alice")})
    with served(app(FULL, static)) as url:
        found = http_oauth_metadata(url, prefix="/vgi")
        assert isinstance(found, OAuthResourceMetadataResponse)
        assert (found.client_id, found.client_secret, found.scopes_supported) == ("cid", None, ("openid", "calc"))
        assert found.token_endpoint == "https://calc.example/vgi/_oauth/token"
        answer = httpx.get(f"{url}/.well-known/oauth-protected-resource")
        assert answer.headers["Cache-Control"] == "public, max-age=60"
        challenge = httpx.get(f"{url}/vgi/x").headers["WWW-Authenticate"]
        assert parse_resource_metadata_url(challenge) == (
            "https://calc.example/.well-known/oauth-protected-resource/vgi"
        )
        with httpx.Client(base_url=url) as http:
            assert http_oauth_metadata(client=http, prefix="/vgi") == found
    with (
        served(make_app(None, prefix="")) as url,
        httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(404))) as none,
    ):
        assert http_oauth_metadata(url, client=none) is None
        with pytest.raises(ValueError, match="404"):
            fetch_oauth_metadata(f"{url}/x", client=none)
    with pytest.raises(core.ConnectionLostError):
        http_oauth_metadata(url)
    with pytest.raises(ValueError, match="https"):
        http_oauth_metadata("http://calc.example")
    with pytest.raises(ValueError, match="base_url or client"):
        http_oauth_metadata()


@pytest.mark.parametrize(
    "document",
    [
        "",
        "[]",
        "{}",
        '{"resource":"x"}',
        '{"resource":1,"authorization_servers":["x"]}',
        '{"resource":"x","authorization_servers":"x"}',
        '{"resource":"x","authorization_servers":[1]}',
        '{"resource":"x","authorization_servers":["y"],"use_id_token_as_bearer":"yes"}',
    ],
)
def test_documents_that_are_none(document: str) -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=document))
    with httpx.Client(transport=transport) as http, pytest.raises(ValueError) as caught:
        fetch_oauth_metadata("https://x/y?token=hush", client=http)
    assert "hush" not in str(caught.value)


def test_challenge_is_read_token_by_token() -> None:
    text = 'Bearer realm="a, client_id=\\"evil\\"", Device_Code_Client_ID="did", resource_metadata="https://x/y" , flag'
    assert parse_client_id(text) is None
    assert parse_device_code_client_id(text) == "did"
    assert parse_www_authenticate_params(text)["realm"] == 'a, client_id="evil"'
    assert parse_www_authenticate_params("Bearer a=1, A=2, b = c") == {"a": "2", "b": "c"}
    assert parse_use_id_token_as_bearer('Bearer use_id_token_as_bearer="true"')
    assert not parse_use_id_token_as_bearer('Bearer use_id_token_as_bearer="TRUE"')
    assert parse_oauth_challenge(text) == OAuthChallenge("https://x/y")
    assert parse_oauth_challenge(text.replace("Bearer", "Basic")) is None
    assert parse_oauth_challenge("Bearer") is None


@given(st.text(st.sampled_from('Bearer a="\\, ,;\u00e9'), max_size=200))
def test_any_challenge_is_read(text: str) -> None:
    assert isinstance(parse_www_authenticate_params(text), dict)


def test_long_challenges_take_no_time() -> None:
    for piece in ('a="', "a", "\\", '"\\', "a=", ' a="b'):
        assert len(parse_www_authenticate_params(piece * 100_000)) <= 2


def test_server_metadata(provider: Provider) -> None:
    found = fetch_auth_server_metadata(provider.url)
    assert found.token_endpoint == f"{provider.url}/token" and found.supports_grant_type("anything")
    provider.extra = {"grant_types_supported": ["authorization_code"]}
    assert not fetch_auth_server_metadata(provider.url).supports_grant_type("refresh_token")
    bad: list[dict[str, Any]] = [
        {"issuer": "https://evil.example"},
        {"token_endpoint": None},
        {"token_endpoint": "http://192.0.2.1/t"},
        {"authorization_endpoint": None, "device_authorization_endpoint": None},
    ]
    for provider.extra in bad:
        with pytest.raises(ValueError):
            fetch_auth_server_metadata(provider.url)


# Device code


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running("EC") as provider:
        yield provider


@pytest.fixture
def service(provider: Provider) -> Iterator[str]:
    """A service whose logins are the provider's; yields its URL."""

    def build(url: str) -> Any:
        metadata = OAuthResourceMetadata(url, (provider.url,), ("openid",), device_code_client_id="cli")
        return app(metadata, jwt_authenticate(issuer=provider.url, audience="calc"), prefix="")

    with served_at(build) as url:
        yield url


@pytest.fixture
def no_sleep(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(device_login_module, "_sleep", slept.append)
    return slept


device_login_module: Any = __import__("vgi_rpc_extras.auth.device_login", fromlist=["_sleep"])


def approving(provider: Provider, allow: bool = True) -> tuple[Any, list[str]]:
    """What a user does who reads the prompt: confirm the code."""
    shown: list[str] = []

    def on_prompt(text: str) -> None:
        shown.append(text)
        provider.approved[text.rsplit(" ", 1)[1]] = allow

    return on_prompt, shown


def test_device_login(
    provider: Provider, service: str, no_sleep: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="vgi_rpc")
    on_prompt, shown = approving(provider)
    auth = VgiOAuthAuth(base_url=service, on_prompt=on_prompt)
    assert auth.identity() is None
    with httpx.Client(base_url=service, auth=auth) as http:
        for _ in range(3):
            answer = http.post("/x", content=b"body")
            assert (answer.status_code, answer.json()["principal"]) == (200, "alice")
    assert len(shown) == 1 and shown[0].startswith(f"To log in, open {provider.url}/device and enter the code ")
    assert auth.was_interactive() and no_sleep == [1.0]
    tokens = auth._tokens
    assert tokens is not None and tokens.is_valid()
    for secret in (tokens.access_token, tokens.refresh_token):
        assert secret not in repr(auth) + repr(tokens) + caplog.text
    auth.clear_tokens()
    assert auth.identity() is None
    auth.close()


def test_refresh_comes_first(provider: Provider, service: str, no_sleep: list[float]) -> None:
    on_prompt, shown = approving(provider)
    first = VgiOAuthAuth(base_url=service, on_prompt=on_prompt)
    with httpx.Client(base_url=service, auth=first) as http:
        http.get("/x")
    assert first._tokens is not None
    again = VgiOAuthAuth(base_url=service, refresh_token=first._tokens.refresh_token, on_prompt=on_prompt)
    with httpx.Client(base_url=service, auth=again) as http:
        assert http.get("/x").json()["principal"] == "alice"
    assert len(shown) == 1 and not again.was_interactive()
    stale = VgiOAuthAuth(base_url=service, refresh_token="gone", on_prompt=on_prompt)
    with httpx.Client(base_url=service, auth=stale) as http:
        assert http.get("/x").status_code == 200
    assert len(shown) == 2 and stale.was_interactive()
    for auth in (first, again, stale):
        auth.close()


def test_threads_share_one_login(provider: Provider, service: str, no_sleep: list[float]) -> None:
    on_prompt, shown = approving(provider)
    auth = VgiOAuthAuth(base_url=service, on_prompt=on_prompt)
    results: list[int] = []
    with httpx.Client(base_url=service, auth=auth) as http:
        threads = [threading.Thread(target=lambda: results.append(http.get("/x").status_code)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    auth.close()
    assert results == [200] * 6 and len(shown) == 1


def test_denied(provider: Provider, service: str, no_sleep: list[float]) -> None:
    auth = VgiOAuthAuth(base_url=service, on_prompt=approving(provider, False)[0])
    with httpx.Client(base_url=service, auth=auth) as http, pytest.raises(OAuthTokenError) as caught:
        http.get("/x")
    assert caught.value.error_code == "access_denied" and isinstance(caught.value, core.RpcError)
    auth.close()


def test_never_confirmed(provider: Provider, service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_login_module, "_sleep", lambda seconds: time.sleep(seconds / 20))
    auth = VgiOAuthAuth(base_url=service, on_prompt=lambda _: None, timeout_seconds=1.2)
    with httpx.Client(base_url=service, auth=auth) as http, pytest.raises(OAuthTokenError, match="in time"):
        http.get("/x")
    auth.close()


def poll(no_sleep: list[float], answers: list[tuple[int, Any]], **code: Any) -> Any:
    left = iter(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/device":
            found = {"device_code": "d", "user_code": "U", "verification_uri": "https://id.example/d", **code}
            return httpx.Response(200, json=found)
        status, body = next(left)
        return httpx.Response(status, json=body) if isinstance(body, dict) else httpx.Response(status, text=body)

    server = OAuthServerMetadata("", "https://id.example/token", "https://id.example/device")
    resource = OAuthResourceMetadataResponse("https://x", ("https://id.example",), device_code_client_id="cli")
    with httpx.Client(transport=httpx.MockTransport(handle)) as http:
        return perform_device_code_flow(
            OAuthChallenge("https://x"),
            resource,
            server,
            http_client=http,
            timeout_seconds=60,
            on_prompt=lambda _: None,
        )


PENDING = (400, {"error": "authorization_pending"})
DONE = (200, {"access_token": "at", "expires_in": 60})


def test_polling_rules(no_sleep: list[float]) -> None:
    tokens, context = poll(no_sleep, [PENDING, (400, {"error": "slow_down"}), (429, "later"), (500, "x"), DONE])
    assert tokens.access_token == "at" and context.client_id == "cli"
    assert no_sleep == [5.0, 5.0, 10.0, 15.0, 15.0]
    with pytest.raises(OAuthTokenError, match="cannot be reached"):
        poll(no_sleep, [(503, "x")] * 4)
    with pytest.raises(OAuthTokenError, match="access token"):
        poll(no_sleep, [(200, {"token_type": "Bearer"})])
    with pytest.raises(OAuthTokenError, match="access token"):
        poll(no_sleep, [(200, {"access_token": "a\r\nX: y"})])


def test_hostile_prompts(no_sleep: list[float]) -> None:
    bad: list[dict[str, Any]] = [
        {"verification_uri": "http://evil.example"},
        {"verification_uri": "javascript:x"},
        {"verification_uri": None},
        {"verification_uri": "https://x/\x1b[2J"},
        {"user_code": "\x1b[2J"},
        {"user_code": 7},
        {"user_code": "x" * 99},
        {"device_code": None},
    ]
    for code in bad:
        with pytest.raises(OAuthTokenError):
            poll(no_sleep, [DONE], **code)
    with pytest.raises(OAuthTokenError) as caught:
        poll(no_sleep, [(400, {"error": "x\x1b[2J", "error_description": "y\r\nz"})])
    assert str(caught.value).isprintable()


def hostile(base: str, metadata: str, document: dict[str, Any]) -> tuple[list[str], Any]:
    """A service at `base` whose challenge names `metadata`; every call is recorded."""
    calls: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        calls.append(str(request.url))
        if request.url.path == "/x":
            return httpx.Response(401, headers={"WWW-Authenticate": f'Bearer resource_metadata="{metadata}"'})
        return httpx.Response(200, json=document)

    return calls, httpx.MockTransport(handle)


@pytest.mark.parametrize(
    ("metadata", "document"),
    [
        ("https://evil.example/m", {}),
        ("https://calc.example:8443/m", {}),
        ("http://calc.example/m", {}),
        ("http://127.0.0.1:9/m", {}),
        (
            "https://calc.example/m",
            {"resource": "https://other.example", "authorization_servers": ["https://id.example"]},
        ),
        (
            "https://calc.example/m",
            {"resource": "https://calc.example/y", "authorization_servers": ["https://id.example"]},
        ),
        (
            "https://calc.example/m",
            {"resource": "https://calc.example", "authorization_servers": ["http://id.example"]},
        ),
        (
            "https://calc.example/m",
            {"resource": "https://calc.example", "authorization_servers": ["https://127.0.0.1"]},
        ),
    ],
)
def test_a_service_cannot_choose_where_tokens_go(metadata: str, document: dict[str, Any]) -> None:
    calls, transport = hostile("https://calc.example", metadata, document)
    auth = VgiOAuthAuth(base_url="https://calc.example", refresh_token="hush", transport=transport)
    with httpx.Client(auth=auth, transport=transport) as http, pytest.raises(OAuthTokenError):
        http.get("https://calc.example/x")
    auth.close()
    assert set(calls) <= {"https://calc.example/x", "https://calc.example/m"}


def test_several_challenges_and_none() -> None:
    bearer = 'Bearer resource_metadata="https://evil.example/m"'
    auth = VgiOAuthAuth(base_url="https://calc.example")

    def answering(status: int, *values: str) -> httpx.Client:
        answer = httpx.Response(status, headers=[("WWW-Authenticate", value) for value in values])
        return httpx.Client(auth=auth, transport=httpx.MockTransport(lambda _: answer))

    with answering(401, 'Basic realm="x"', bearer) as http, pytest.raises(OAuthTokenError, match="another origin"):
        http.get("https://calc.example/x")
    for status, values in ((401, ()), (401, ('Basic realm="x"',)), (403, (bearer,))):
        with answering(status, *values) as http:
            assert http.get("https://calc.example/x").status_code == status
    auth.close()


def test_the_body_of_a_401_is_not_read() -> None:
    class Endless(httpx.SyncByteStream):
        closed = False

        def __iter__(self) -> Iterator[bytes]:
            raise AssertionError("it has no end")

        def close(self) -> None:
            self.closed = True

    endless = Endless()
    headers = {"WWW-Authenticate": 'Bearer resource_metadata="https://calc.example/m"', "Content-Encoding": "gzip"}
    answers = [httpx.Response(401, headers=headers, stream=endless), httpx.Response(200, text="in")]
    auth = VgiOAuthAuth(base_url="https://calc.example")
    auth._log_in = lambda *args, **options: OAuthTokenSet("at")  # type: ignore[method-assign]
    with httpx.Client(auth=auth, transport=httpx.MockTransport(lambda _: answers.pop(0))) as http:
        assert http.get("https://calc.example/x").text == "in"
    auth.close()
    assert endless.closed


def test_tokens_stay_with_their_origin() -> None:
    seen: list[str | None] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("Authorization"))
        return httpx.Response(200)

    auth = VgiOAuthAuth(base_url="https://calc.example")
    auth._tokens = OAuthTokenSet("at")
    with httpx.Client(auth=auth, transport=httpx.MockTransport(handle)) as http:
        http.get("https://calc.example/x")
        http.get("https://calc.example:444/x")
        http.get("http://calc.example/x")
        http.get("https://storage.example/x")
    auth.close()
    assert seen == ["Bearer at", None, None, None]


def test_small_things() -> None:
    ids = {"device_client_id": "", "device_client_secret": "ds", "client_id": "c", "client_secret": "cs"}
    assert select_device_code_client(**ids, challenge_client_id="h") == ("c", "cs")
    assert select_device_code_client(**{**ids, "device_client_id": "d"}, challenge_client_id="h") == ("d", "ds")
    assert select_device_code_client(**{**ids, "client_id": ""}, challenge_client_id="h") == ("h", "")
    assert OAuthTokenSet("a", expires_at=100.0).is_valid(now=54.0)
    assert not OAuthTokenSet("a", expires_at=100.0).is_valid(now=56.0)
    assert not OAuthTokenSet("a", use_id_token=True).is_valid()
    claims = base64.urlsafe_b64encode(b'{"sub":"s","iss":"i"}').decode().rstrip("=")
    assert oauth_tokens._identity(f"h.{claims}.s").sub == "s"
    assert oauth_tokens._identity("junk") == OAuthIdentity()
    assert pkce_login.is_headless_environment() in (True, False)
    assert not pkce_login.is_colab_environment()
