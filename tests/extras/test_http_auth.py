"""Authentication in the real HTTP application: refusals, calls, metadata, and what may not be combined."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")
pytest.importorskip("httpx")

import httpx

from tests.extras.auth_app import KEY, Calc, CalcImpl, bearer, make_app
from tests.extras.auth_provider import served
from tests.extras.http_service import ARROW, Service, make_server
from vgi_rpc_extras.auth import (
    AuthReason,
    OAuthResourceMetadata,
    ProxyProofConfig,
    bearer_authenticate_static,
    chain_authenticate,
    declare_key_headers,
    declare_proxy_headers,
    mint_proof,
    proxy_proof_gate,
    require_all,
)

SECRET = b"s" * 32
ALICE = core.AuthContext("key", True, "alice")
TOKENS = bearer_authenticate_static(tokens={"good": ALICE, "other": core.AuthContext("key", True, "bob")})
METADATA = OAuthResourceMetadata("https://calc.example/api", ("https://login.example",), scopes_supported=("calc",))


def test_a_refusal_reaches_the_caller() -> None:
    client = core.make_sync_client(core.RpcServer(Calc, CalcImpl()), authenticate=TOKENS, proxy_auth_headers=["X-Hop"])
    with core.http_connect(Calc, client=client) as calc, pytest.raises(core.AuthenticationError) as caught:
        calc.add(1.0, 2.0)
    assert type(caught.value) is core.AuthenticationError
    assert caught.value.reason is AuthReason.MISSING_CREDENTIAL
    assert caught.value.detail == "authentication rejected" and "X-Hop" in caught.value.proxy_hint
    assert caught.value.code is core.Code.UNAUTHENTICATED and caught.value.request_id
    with core.http_connect(Calc, client=client, headers=bearer("good")) as calc:
        assert (calc.who(), calc.add(1.0, 2.0)) == ("alice", 3.0)


def test_streams_belong_to_their_caller() -> None:
    client = core.make_sync_client(make_server(), authenticate=TOKENS)
    with core.http_connect(Service, client=client, headers=bearer("good")) as mine:
        session = mine.count(end=3)
        _, token = session.next_with_token()
    theirs = core.http_connect(Service, client=client, headers=bearer("other"))
    with theirs as service, pytest.raises(core.RpcError, match="verification failed"):
        service.resume_stream("count", token).next_with_token()
    with core.http_connect(Service, client=client, headers=bearer("good")) as mine:
        assert mine.resume_stream("count", token).tick().batch["n"].to_pylist() == [1]


def test_metadata_and_challenge() -> None:
    client = core.make_sync_client(
        core.RpcServer(Calc, CalcImpl()), prefix="/api", authenticate=TOKENS, oauth_resource_metadata=METADATA
    )
    where = "https://calc.example/.well-known/oauth-protected-resource/api"
    for answer in (client.get("/api/describe"), client.post("/api/Calc/add", headers={"Content-Type": ARROW})):
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{where}"'
        assert answer.headers["VGI-Supported-Encodings"] and answer.headers["X-Request-ID"]
    for path in ("/.well-known/oauth-protected-resource", "/.well-known/oauth-protected-resource/api"):
        assert json.loads(client.get(path).content)["scopes_supported"] == ["calc"]
    assert client.get("/.well-known/other").status_code == 404
    # Without a client_id there is nothing to log in with.
    assert client.get("/api", headers={"Accept": "text/html"}).status_code == 401


def header_key(req: Any) -> core.AuthContext:
    if req.get_header("X-API-Key") != "good":
        raise ValueError("no key")
    return ALICE


@pytest.mark.parametrize(
    ("authenticate", "challenge", "asked_for"),
    [
        (TOKENS, "Bearer", ['type="hidden" value="Authorization"']),
        (header_key, "Bearer", ['name="header" value="Authorization"']),  # which header it reads is not known
        (declare_key_headers(lambda req: header_key(req), "X-API-Key"), 'ApiKey header="X-API-Key"', ["X-API-Key"]),
        (
            chain_authenticate(TOKENS, declare_key_headers(lambda req: header_key(req), "X-API-Key")),
            'Bearer, ApiKey header="X-API-Key"',
            ["<option>Authorization</option><option>X-API-Key</option>"],
        ),
        (declare_proxy_headers(lambda req: header_key(req), "X-Client-Cert"), "Proxy", []),
    ],
)
def test_401_says_what_is_wanted(authenticate: Any, challenge: str, asked_for: list[str]) -> None:
    client = core.make_sync_client(make_server(), authenticate=authenticate)
    called = client.post("/__call__", content=b"{}", headers={"Content-Type": "application/json"})
    seen = client.get("/describe", headers={"Accept": "text/html"})
    for answer in (called, seen):
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, challenge)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "no-store" in answer.headers["Cache-Control"]
    assert ('name="key" type="password"' in seen.text) is ("<script>" in seen.text) is bool(asked_for)
    assert all(text in seen.text for text in asked_for)


def test_what_does_not_fit_together() -> None:
    class health(Protocol):
        def add(self, a: float, b: float) -> float: ...

    pytest.importorskip("authlib")
    from vgi_rpc_extras.auth import BrowserLogin

    metadata = OAuthResourceMetadata("https://c/x", ("https://l",), client_id="c")
    browser = BrowserLogin(metadata, prefix="/x", token_key=KEY)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "OAuthResourceMetadata, got dict", {"oauth_resource_metadata": {"resource": "x"}}),
        (ValueError, "needs oauth_resource_metadata", {"browser_login": browser}),
        (ValueError, "prefix '/x'", {"browser_login": browser, "oauth_resource_metadata": metadata}),
    ]
    for kind, text, options in wrong:
        with pytest.raises(kind, match=text):
            make_app(TOKENS, **options)
    with pytest.raises(ValueError, match="cannot be named 'health'"):
        core.make_wsgi_app(core.RpcServer(health, CalcImpl()), token_key=KEY)


class Proven(httpx.Auth):
    """Adds a new proof to every request, as a proxy does."""

    def auth_flow(self, request: Any) -> Any:
        request.headers["VGI-Proxy-Proof"] = mint_proof(SECRET, "k1", "origin")
        yield request


def test_every_request_of_a_stream_is_proven() -> None:
    gate = proxy_proof_gate(ProxyProofConfig("require", "origin", {"k1": (SECRET, "edge")}))
    app = core.make_wsgi_app(
        make_server(), token_key=KEY, authenticate=require_all(gate, TOKENS), proxy_proof_required=True
    )
    with served(app) as url:
        proxied = httpx.Client(auth=Proven(), headers=bearer("good"), trust_env=False)
        with proxied as http, core.http_connect(Service, url, client=http) as service:
            assert [b.batch["n"][0].as_py() for b in service.count(end=3)] == [0, 1, 2]
            assert service.who().startswith("alice alice")
        once = {**bearer("good"), "VGI-Proxy-Proof": mint_proof(SECRET, "k1", "origin")}
        with core.http_connect(Service, url, headers=once) as service:
            assert service.add(a=1.0) == 2.0
            with pytest.raises(core.AuthenticationError) as caught:
                service.add(a=1.0)  # replayed
        assert caught.value.reason is AuthReason.PROXY_REQUIRED
        assert core.http_capabilities(url).accept_max_response_bytes_support  # health is open


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(make_app(TOKENS)) as where:
        yield where


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(url: str, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The command line in this process, against `url`: the exit status, stdout and stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        status = core.main(["--url", url, *args])
        return status, *capfd.readouterr()

    return run


def test_credentials_on_the_command_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    good, other = "Authorization: Bearer good", "authorization:Bearer other "
    assert cli("call", "who", "--header", good) == (0, '{"result": "alice"}\n', "")
    assert cli("--header", good, "call", "who", "--header", "X-Other: 1") == (0, '{"result": "alice"}\n', "")
    monkeypatch.setenv("VGI_RPC_TOKEN", "good")
    assert cli("call", "who") == (0, '{"result": "alice"}\n', "")
    assert cli("call", "who", "--header", other) == (0, '{"result": "bob"}\n', "")
    status, out, _ = cli("doctor")
    assert (status, json.loads(out)["service"]["protocol"]) == (0, "Calc")
    status, out, _ = cli("stub")
    assert status == 0 and "class Calc(Protocol):" in out


def test_a_command_without_credentials(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = cli("describe")
    assert (status, out) == (1, "")
    assert json.loads(err)["error"]["message"] == "authentication rejected (missing_credential)"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "VGI_RPC_TOKEN in the environment, or --header 'NAME: VALUE'" in cli("describe")[2]


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["describe", "--debug", "--header", "Authorization: Bearer hunter2"], 1),
        (["doctor", "--debug", "--header", "Authorization: Bearer hunter2"], 0),
        (["describe", "--header", "hunter2"], 2),
        (["describe", "--header", "Bearer hunter2: x"], 2),
        (["describe", "--header", "X-Key: hunter2\nX: y"], 2),
        (["describe", "--header", "X-Key: hunter2\x01"], 2),
        (["describe", "--header", "X-Key:", "hunter2"], 2),
        (["--header", "X-Key:", "hunter2", "describe"], 2),
        (["call", "add", "--header", "X-Key:", "hunter2"], 2),
    ],
)
def test_a_header_is_not_repeated(cli: Cli, args: list[str], status: int) -> None:
    found, out, err = cli(*args)
    assert found == status
    assert "hunter2" not in out + err
    assert status != 2 or "'NAME: VALUE', in quotes" in err or "control characters" in err


@pytest.mark.parametrize(
    ("token", "args", "status"),
    [
        ("hunter2", ["describe", "--debug"], 1),
        ("hunter2\x01", ["describe"], 2),
        ("hunter2", ["describe", "--help"], 0),
    ],
)
def test_the_token_is_not_repeated(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, token: str, args: list[str], status: int
) -> None:
    monkeypatch.setenv("VGI_RPC_TOKEN", token)
    found, out, err = cli(*args)
    assert found == status
    assert "hunter2" not in out + err and out + err


def test_what_each_name_loads() -> None:
    code = (
        "import sys; from tests.core import core; core.http_connect; core.bearer_authenticate_static;"
        "core.AuthenticationError; http = sys.modules[core.http_connect.__module__.rpartition('.')[0]];"
        "assert http.AuthenticationError is core.AuthenticationError and http.ProxyProofConfig;"
        "print(*{'falcon', 'httpx', 'joserfc', 'authlib', 'cryptography', 'waitress'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "package", "pip"),
    [("make_wsgi_app", "falcon", "http"), ("serve_http", "falcon", "http"), ("jwt_authenticate", "joserfc", "oauth")],
)
def test_a_missing_package_is_named(name: str, package: str, pip: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from tests.core import core\n"
        f"assert not core._extras_can_import('auth.jwt', 'not_there') and 'http_connect' in dir(core)\n"
        f"try: core.{name}\nexcept ImportError as exc: print(exc.name, exc)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.startswith(f"{package} {name} needs the package '{package}'"), ran.stdout + ran.stderr
    assert f"vgi-rpc-onefile[{pip}]" in ran.stdout
