"""A real OpenID provider on loopback, built with Authlib: discovery, keys with rotation, authorize, token, device."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import falcon
from authlib.oauth2.rfc6749 import AuthorizationServer, ClientMixin, OAuth2Request
from authlib.oauth2.rfc6749 import grants as oauth_grants
from authlib.oauth2.rfc6749.requests import BasicOAuth2Payload
from authlib.oauth2.rfc7636 import CodeChallenge
from authlib.oauth2.rfc8628 import DeviceAuthorizationEndpoint, DeviceCodeGrant, DeviceCredentialDict
from authlib.oidc.core.grants import OpenIDCode
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey

SECRET = "confidential-client-secret"
KINDS: dict[str, Callable[[], Any]] = {
    "RSA": lambda: RSAKey.generate_key(2048, auto_kid=True),
    "EC": lambda: ECKey.generate_key("P-256", auto_kid=True),
    "OKP": lambda: OKPKey.generate_key("Ed25519", auto_kid=True),
}


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(WSGIServer):
    daemon_threads = True
    request_queue_size = 64


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve a WSGI app on loopback; yields its URL."""
    server = make_server("127.0.0.1", 0, app, server_class=_Server, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def served_at(build: Callable[[str], Any]) -> Iterator[str]:
    """Serve the WSGI app that `build` makes for the URL it will have; yields that URL."""
    holder: list[Any] = []
    with served(lambda environ, start: holder[0](environ, start)) as url:
        holder.append(build(url))
        yield url


class _Request(OAuth2Request):  # type: ignore[misc]
    @property
    def form(self) -> Any:
        return self.payload.data


class Client(ClientMixin):  # type: ignore[misc]
    def __init__(self, client_id: str, secret: str = "") -> None:
        self.client_id, self.secret = client_id, secret

    def get_client_id(self) -> str:
        return self.client_id

    def get_default_redirect_uri(self) -> str:
        return ""

    def get_allowed_scope(self, scope: str) -> str:
        return scope

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        """The service's own, and those of programs on any port of this machine (RFC 8252 section 7.3)."""
        loopback = re.fullmatch(r"http://127\.0\.0\.1:[0-9]+/callback", redirect_uri)
        return redirect_uri.endswith("/_oauth/callback") or loopback is not None

    def check_client_secret(self, client_secret: str) -> bool:
        return secrets.compare_digest(client_secret, self.secret)

    def check_endpoint_auth_method(self, method: str, endpoint: str) -> bool:
        return (method == "none") is not bool(self.secret)

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return True


class Code(SimpleNamespace):
    def get_redirect_uri(self) -> Any:
        return self.redirect_uri

    def get_scope(self) -> Any:
        return self.scope

    def get_nonce(self) -> Any:
        return self.nonce

    def get_auth_time(self) -> int:
        return int(self.auth_time)

    def get_acr(self) -> None: ...

    def get_amr(self) -> None: ...


class Provider(AuthorizationServer):  # type: ignore[misc]
    """The provider; `url` is its issuer once it is served. `requests` counts calls by path."""

    def __init__(self, kind: str = "RSA") -> None:
        super().__init__()
        self.url = ""
        self.kind = kind
        self.clients = {one.client_id: one for one in (Client("browser", SECRET), Client("public"), Client("cli"))}
        self.codes: dict[str, Code] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.approved: dict[str, bool] = {}
        self.refresh_tokens: dict[str, Any] = {}
        self.requests: dict[str, int] = {}
        self.forms: list[dict[str, str]] = []
        self.broken: set[str] = set()
        self.issuer_says: str | None = None
        self.extra: dict[str, Any] = {}
        self.id_claims: dict[str, Any] = {}
        self.published: list[Any] = []
        self.rotate(keep=False)
        self.register_token_generator("default", self._token)
        self.register_grant(_code_grant(self), [CodeChallenge(required=True), _openid(self)])
        self.register_grant(_refresh_grant(self))
        self.register_grant(_device_grant(self))
        self.register_endpoint(_device_endpoint(self))

    def rotate(self, *, keep: bool = True) -> None:
        """Sign with a new key; the others stay published if kept."""
        self.key = KINDS[self.kind]()
        self.published = [*(self.published if keep else []), self.key]

    @property
    def alg(self) -> str:
        return {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[self.kind]

    def sign(self, *, key: Any = None, alg: str | None = None, header: Any = None, **claims: Any) -> str:
        """A token of this provider; claims set to None are left out."""
        now = int(time.time())
        base = {"iss": self.url, "aud": "calc", "sub": "alice", "iat": now, "exp": now + 300, **claims}
        found = {name: value for name, value in base.items() if value is not None}
        key = key or self.key
        alg = alg or self.alg
        merged = {"alg": alg, "kid": key.kid, **(header or {})}
        merged = {name: value for name, value in merged.items() if value is not None}
        return jwt.encode(merged, found, key, registry=Everything([alg]))

    # What Authlib leaves to its integrations.

    def query_client(self, client_id: str) -> Client | None:
        return self.clients.get(client_id)

    def save_token(self, token: dict[str, Any], request: Any) -> None:
        if token.get("refresh_token"):
            user, client = request.user, request.client
            self.refresh_tokens[token["refresh_token"]] = SimpleNamespace(
                user=user,
                check_client=lambda other: other is client,
                get_scope=lambda: token["scope"],
            )

    def send_signal(self, name: str, *args: Any, **kwargs: Any) -> None: ...

    def create_oauth2_request(self, request: Any) -> Any:
        if isinstance(request, OAuth2Request):
            return request
        data = dict(request.params) if request.method == "GET" else self.forms[-1]
        headers = {name.title(): value for name, value in request.headers.items()}
        found = _Request(request.method, "https://loopback" + request.relative_uri, headers=headers)
        found.payload = BasicOAuth2Payload(data)
        return found

    def handle_response(self, status: int, body: Any, headers: Any) -> Any:
        return status, body, headers

    def _token(self, grant_type: str, client: Any, user: Any = None, scope: Any = None, **_: Any) -> dict[str, Any]:
        access = self.sign(sub=str(user), aud="calc", jti=secrets.token_hex(4))
        token = {"token_type": "Bearer", "access_token": access, "expires_in": 300, "scope": scope or "openid"}
        return {**token, "refresh_token": secrets.token_urlsafe(16)}

    # Routes.

    def __call__(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.requests[req.path] = self.requests.get(req.path, 0) + 1
        if req.path in self.broken:
            resp.status = 503
            return
        if req.method == "POST":
            self.forms.append(dict(req.get_media()))
        routes: dict[str, Callable[[Any], Any]] = {
            "/.well-known/openid-configuration": self._configuration,
            "/jwks": lambda _: (200, {"keys": [key.as_dict(private=False, use="sig") for key in self.published]}, []),
            "/authorize": self._authorize,
            "/token": self.create_token_response,
            "/device_authorization": lambda r: self.create_endpoint_response("device_authorization", r),
        }
        status, body, headers = routes.get(req.path, lambda _: (404, "", []))(req)  # type: ignore[no-untyped-call]
        resp.status = status
        for name, value in dict(headers).items():
            resp.set_header(name, value)
        if isinstance(body, dict):
            resp.content_type, body = "application/json", json.dumps(body)
        resp.text = body or ""

    def _configuration(self, _: Any) -> Any:
        found = {
            "issuer": self.issuer_says or self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "device_authorization_endpoint": f"{self.url}/device_authorization",
            "jwks_uri": f"{self.url}/jwks",
            **self.extra,
        }
        return 200, found, []

    def _authorize(self, req: falcon.Request) -> Any:
        """The login page; `user=` answers it."""
        if "user" not in req.params:
            page = (
                f'<form action="/authorize?">{_hidden(req.params)}<input name="user"><button id="go">Go</button></form>'
            )
            return 200, f"<!doctype html><title>Provider</title>{page}", [("Content-Type", "text/html")]
        user = req.params["user"]
        grant = self.get_consent_grant(req, end_user=user)
        return self.create_authorization_response(req, grant_user=user, grant=grant)


def Everything(algorithms: list[str]) -> Any:
    """A registry that signs with anything, without joserfc's warnings and bounds."""
    from joserfc.jws import JWSRegistry

    class Registry(JWSRegistry):
        max_header_length = 100_000

        def get_alg(self, name: str) -> Any:
            return self.algorithms[name]

    return Registry(algorithms=algorithms, strict_check_header=False)


def _hidden(params: Any) -> str:
    return "".join(f'<input type="hidden" name="{name}" value="{value}">' for name, value in params.items())


def _code_grant(provider: Provider) -> type:
    class Grant(oauth_grants.AuthorizationCodeGrant):  # type: ignore[misc]
        TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_basic", "client_secret_post", "none")

        def save_authorization_code(self, code: str, request: Any) -> None:
            data = request.payload.data
            provider.codes[code] = Code(
                code=code,
                client_id=request.client.client_id,
                redirect_uri=data["redirect_uri"],
                scope=data["scope"],
                nonce=data.get("nonce"),
                user=request.user,
                auth_time=time.time(),
                code_challenge=data.get("code_challenge"),
                code_challenge_method=data.get("code_challenge_method"),
            )

        def query_authorization_code(self, code: str, client: Any) -> Any:
            return provider.codes.get(code)

        def delete_authorization_code(self, authorization_code: Any) -> None:
            del provider.codes[authorization_code.code]

        def authenticate_user(self, authorization_code: Any) -> Any:
            return authorization_code.user

    return Grant


def _refresh_grant(provider: Provider) -> type:
    class Grant(oauth_grants.RefreshTokenGrant):  # type: ignore[misc]
        TOKEN_ENDPOINT_AUTH_METHODS = ("client_secret_basic", "client_secret_post", "none")
        INCLUDE_NEW_REFRESH_TOKEN = True

        def authenticate_refresh_token(self, refresh_token: str) -> Any:
            return provider.refresh_tokens.get(refresh_token)

        def authenticate_user(self, refresh_token: Any) -> Any:
            return refresh_token.user

        def revoke_old_credential(self, refresh_token: Any) -> None: ...

    return Grant


def _openid(provider: Provider) -> Any:
    class OpenID(OpenIDCode):  # type: ignore[misc]
        def exists_nonce(self, nonce: str, request: Any) -> bool:
            return False

        def process_token(self, grant: Any, response: Any) -> Any:
            _, token, _ = response
            if "openid" in token["scope"].split():
                code = grant.request.authorization_code
                claims = {"aud": code.client_id, "nonce": code.nonce, "name": "<b>Alice</b>", "email": "a@example.com"}
                token["id_token"] = provider.sign(sub=code.user, **{**claims, **provider.id_claims})
            return token

    return OpenID()


def _device_grant(provider: Provider) -> type:
    class Grant(DeviceCodeGrant):  # type: ignore[misc]
        def query_device_credential(self, device_code: str) -> Any:
            found = provider.devices.get(device_code)
            return found and DeviceCredentialDict(found)

        def query_user_grant(self, user_code: str) -> Any:
            return ("alice", provider.approved[user_code]) if user_code in provider.approved else None

        def should_slow_down(self, credential: Any) -> bool:
            return False

    return Grant


def _device_endpoint(provider: Provider) -> type:
    class Endpoint(DeviceAuthorizationEndpoint):  # type: ignore[misc]
        CLIENT_AUTH_METHODS = ("none",)
        INTERVAL = 1

        def get_verification_uri(self) -> str:
            return f"{provider.url}/device"

        def save_device_credential(self, client_id: str, scope: str, data: dict[str, Any]) -> None:
            kept = {**data, "client_id": client_id, "scope": scope, "expires_at": time.time() + 300}
            provider.devices[data["device_code"]] = kept

    return Endpoint


@contextlib.contextmanager
def running(kind: str = "RSA") -> Iterator[Provider]:
    """A provider that answers."""
    provider = Provider(kind)
    app = falcon.App()
    app.add_sink(provider)
    logging.getLogger("wsgiref").disabled = True
    with served(app) as url:
        provider.url = url
        yield provider
