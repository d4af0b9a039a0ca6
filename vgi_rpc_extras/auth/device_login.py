# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: `auth=` of the httpx client given to http_connect.
"""Login of command-line clients with a device code (auth.md section 7, RFC 8628).

    client = httpx.Client(base_url=url, auth=VgiOAuthAuth(base_url=url))
    with http_connect(Calc, client=client) as calc:
        calc.add(1, 2)          # the first 401 prints where to confirm the login, and waits for it

The service names its provider. Therefore its metadata is read only from its own origin and only over https (or on this
machine), and a token is attached only to requests to that origin.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import httpx

from .. import core as _bound_core
from .fetch import FetchError, bounded_client, check_url, json_object, origin_of
from .oauth import (
    OAuthResourceMetadataResponse,
    OAuthServerMetadata,
    fetch_auth_server_metadata,
    fetch_oauth_metadata,
    parse_www_authenticate_params,
)

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "OAuthChallenge",
    "OAuthFlow",
    "OAuthIdentity",
    "OAuthPrompt",
    "OAuthRefreshContext",
    "OAuthTokenError",
    "OAuthTokenSet",
    "VgiOAuthAuth",
    "attempt_token_refresh",
    "is_colab_environment",
    "is_headless_environment",
    "parse_oauth_challenge",
    "perform_device_code_flow",
    "select_device_code_client",
]

OAuthFlow = Literal["auto", "device_code", "pkce"]
OAuthPrompt = Literal["none", "login", "consent", "select_account"]
_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_MAX_FAILURES = 3  # consecutive, while polling
_SKEW = 45.0
_sleep = time.sleep


class OAuthTokenError(core.RpcError):
    """No token could be obtained. `error_code` is OAuth's word, such as access_denied; secrets are never included."""

    def __init__(self, message: str, *, error_code: str = "", error_description: str = "") -> None:
        super().__init__("OAuthTokenError", message, error_code=error_code, sent="no")
        self.error_description = error_description


@dataclass(frozen=True)
class OAuthChallenge:
    """What a 401 says about logging in."""

    resource_metadata_url: str
    client_id: str = ""


@dataclass(frozen=True)
class OAuthIdentity:
    """Who an id token says the user is; for display, it has not been verified."""

    present: bool = False
    sub: str = ""
    email: str = ""
    name: str = ""
    issuer: str = ""
    claims: dict[str, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class OAuthTokenSet:
    """The tokens of one login; `expires_at` is in unix seconds, None when unknown."""

    access_token: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)
    id_token: str = field(default="", repr=False)
    scope: str = ""
    expires_at: float | None = None
    use_id_token: bool = False
    identity: OAuthIdentity = field(default_factory=OAuthIdentity)

    def bearer_token(self) -> str:
        """Return the token to send."""
        return self.id_token if self.use_id_token else self.access_token

    def is_valid(self, *, skew: float = _SKEW, now: float | None = None) -> bool:
        """Whether there is a token that lives `skew` seconds longer."""
        current = time.time() if now is None else now
        return bool(self.bearer_token()) and (self.expires_at is None or current + skew < self.expires_at)


@dataclass(frozen=True)
class OAuthRefreshContext:
    """What a later refresh needs besides the refresh token."""

    token_endpoint: str = ""
    client_id: str = ""
    client_secret: str = field(default="", repr=False)
    scope: str = ""
    use_id_token: bool = False
    resource_metadata_url: str = ""


def parse_oauth_challenge(www_authenticate: str) -> OAuthChallenge | None:
    """Return the login of a Bearer challenge; None when it names no metadata document."""
    params = parse_www_authenticate_params(www_authenticate)
    if not www_authenticate.lower().lstrip().startswith("bearer ") or not params.get("resource_metadata"):
        return None
    return OAuthChallenge(params["resource_metadata"], params.get("client_id", ""))


def select_device_code_client(
    *,
    device_client_id: str,
    device_client_secret: str,
    client_id: str,
    client_secret: str,
    challenge_client_id: str,
) -> tuple[str, str]:
    """Return id and secret: those for device codes, else the ordinary ones, else the challenge's id without secret."""
    if device_client_id:
        return device_client_id, device_client_secret
    if client_id:
        return client_id, client_secret
    return challenge_client_id, ""


def is_headless_environment() -> bool:
    """Whether no browser can be expected here: over ssh, or on Linux without a display."""
    if os.environ.get("SSH_CONNECTION"):
        return True
    return sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def is_colab_environment() -> bool:
    """Whether this is a Google Colab notebook."""
    return "google.colab" in sys.modules or bool(os.environ.get("COLAB_RELEASE_TAG"))


def perform_device_code_flow(
    challenge: OAuthChallenge,
    resource_meta: OAuthResourceMetadataResponse,
    server_meta: OAuthServerMetadata,
    *,
    http_client: httpx.Client,
    timeout_seconds: float,
    on_prompt: Callable[[str], None] | None = None,
) -> tuple[OAuthTokenSet, OAuthRefreshContext]:
    """Ask for a device code, show it, and wait until the user has confirmed it.

    Args:
        http_client: calls the provider; it should send no credentials of its own.
        timeout_seconds: the longest wait, shortened to the code's own life.
        on_prompt: gets the text for the user; by default it is written to stderr.

    Raises OAuthTokenError when the provider refuses or time runs out.
    """
    context = _context(challenge, resource_meta, server_meta)
    if not context.client_id or not server_meta.device_authorization_endpoint:
        raise OAuthTokenError("the service offers no device-code login: it needs a client id and a device endpoint")
    form = {**_client_form(context), "scope": context.scope}
    status, code = _post(http_client, server_meta.device_authorization_endpoint, form)
    if status != 200 or not isinstance(code.get("device_code"), str):
        raise _refusal("the provider gave no device code", status, code)
    (on_prompt or _print_prompt)(_prompt(code))
    return _poll(http_client, context, code, timeout_seconds), context


def _context(
    challenge: OAuthChallenge, resource: OAuthResourceMetadataResponse, server: OAuthServerMetadata
) -> OAuthRefreshContext:
    client_id, secret = select_device_code_client(
        device_client_id=resource.device_code_client_id or "",
        device_client_secret=resource.device_code_client_secret or "",
        client_id=resource.client_id or "",
        client_secret=resource.client_secret or "",
        challenge_client_id=challenge.client_id,
    )
    return OAuthRefreshContext(
        token_endpoint=server.token_endpoint,
        client_id=client_id,
        client_secret=secret,
        scope=" ".join(resource.scopes_supported) or "openid",
        use_id_token=resource.use_id_token_as_bearer,
        resource_metadata_url=challenge.resource_metadata_url,
    )


def _print_prompt(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _prompt(code: Mapping[str, Any]) -> str:
    """Text for a terminal: only URLs that may be called, only printable characters."""
    url = code.get("verification_uri", code.get("verification_url"))
    try:
        shown, user_code = check_url(url), code.get("user_code")
    except ValueError:
        raise OAuthTokenError("the provider's verification_uri is not an https URL") from None
    if not isinstance(user_code, str) or not user_code.isprintable() or len(user_code) > 64:
        raise OAuthTokenError("the provider gave no usable user code")
    return f"To log in, open {shown} and enter the code {user_code}"


def _number(value: object, default: float) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
    return float(value) if usable else default  # type: ignore[arg-type]


def _poll(
    client: httpx.Client, context: OAuthRefreshContext, code: Mapping[str, Any], timeout_seconds: float
) -> OAuthTokenSet:
    """RFC 8628 section 3.5, at the provider itself: a token endpoint of the service would see the tokens."""
    deadline = time.monotonic() + min(timeout_seconds, _number(code.get("expires_in"), 300.0))
    interval = _number(code.get("interval"), 5.0)
    form = {"grant_type": _GRANT, "device_code": str(code["device_code"]), **_client_form(context)}
    failures = 0
    while time.monotonic() + interval <= deadline:
        _sleep(interval)
        try:
            status, answer = _post(client, context.token_endpoint, form)
        except OAuthTokenError:
            status, answer = 503, {}
        if status == 200:
            return _token_set(answer, context)
        error = answer.get("error")
        if error == "slow_down" or status == 429:
            interval += 5.0
        elif status >= 500:
            failures += 1
            if failures > _MAX_FAILURES:
                raise OAuthTokenError("the provider cannot be reached; the login was given up")
            continue
        elif error != "authorization_pending":
            raise _refusal("the login was refused", status, answer)
        failures = 0
    raise OAuthTokenError("the login was not confirmed in time; try again", error_code="expired_token")


def _client_form(context: OAuthRefreshContext) -> dict[str, str]:
    secret = {"client_secret": context.client_secret} if context.client_secret else {}
    return {"client_id": context.client_id, **secret}


def attempt_token_refresh(ctx: OAuthRefreshContext, refresh_token: str, *, http_client: httpx.Client) -> OAuthTokenSet:
    """Return new tokens; the old refresh token stays when the provider gives no other. OAuthTokenError."""
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token, **_client_form(ctx)}
    status, answer = _post(http_client, ctx.token_endpoint, form)
    if status != 200:
        raise _refusal("the login could not be renewed", status, answer)
    return _token_set({"refresh_token": refresh_token, **answer}, ctx)


def _post(client: httpx.Client, url: str, form: Mapping[str, str]) -> tuple[int, Mapping[str, Any]]:
    """Status and JSON object ({} for another body) of a form post."""
    try:
        response = client.post(check_url(url), data=dict(form), headers={"Accept": "application/json"})
    except (httpx.HTTPError, OSError) as exc:
        raise OAuthTokenError(f"{origin_of(url)} could not be reached: {type(exc).__name__}") from None
    except ValueError as exc:
        raise OAuthTokenError(str(exc)) from None
    try:
        return response.status_code, json_object(response.content, url)
    except FetchError:
        return response.status_code if response.status_code != 200 else 502, {}


def _refusal(what: str, status: int, answer: Mapping[str, Any]) -> OAuthTokenError:
    """OAuth's error word and its description, without anything that could steer a terminal."""
    code, description = (
        "".join(char for char in str(answer.get(name, ""))[:200] if char.isprintable())
        for name in ("error", "error_description")
    )
    shown = ": ".join(part for part in (code, description) if part) or f"status {status}"
    return OAuthTokenError(f"{what}: {shown}", error_code=code, error_description=description)


def _token_set(answer: Mapping[str, Any], context: OAuthRefreshContext) -> OAuthTokenSet:
    texts = {
        name: value
        for name in ("access_token", "refresh_token", "id_token", "scope")
        if isinstance(value := answer.get(name), str)
    }
    lifetime = _number(answer.get("expires_in"), 0.0)
    tokens = OAuthTokenSet(
        **texts,
        expires_at=time.time() + lifetime if lifetime else None,
        use_id_token=context.use_id_token,
        identity=_identity(texts.get("id_token", "")),
    )
    bearer = tokens.bearer_token()
    if not bearer or not bearer.isascii() or not bearer.isprintable():
        raise OAuthTokenError(f"the provider gave no {'id' if context.use_id_token else 'access'} token")
    return tokens


def _identity(id_token: str) -> OAuthIdentity:
    """Who the id token names. It came from the provider over TLS (OpenID Connect Core section 3.1.3.7, 6)."""
    segment = f"{id_token}..".split(".")[1]
    try:
        claims = json.loads(base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4)))
    except (ValueError, RecursionError):
        return OAuthIdentity()
    if not isinstance(claims, dict):
        return OAuthIdentity()
    sub, email, name, issuer = (str(claims.get(key, "")) for key in ("sub", "email", "name", "iss"))
    return OAuthIdentity(True, sub, email, name, issuer, claims)


class VgiOAuthAuth(httpx.Auth):
    """Logs an httpx client in when the service answers 401 with a challenge; one login for all threads.

    Args:
        base_url: of the service; only requests to its origin get a token.
        flow: "auto" and "device_code" use a device code; "pkce" is not built and raises NotImplementedError.
        refresh_token: of an earlier login, tried before the user is asked.
        timeout_seconds: how long the user may take.
        prompt: for the browser flow; a device code has no use for it.
        on_prompt: gets the text for the user; by default it is written to stderr.
        transport: for calls to service metadata and provider.

    Raises OAuthTokenError, in every waiting thread, when no login comes about.
    """

    requires_request_body = True  # a request is sent again after the login

    def __init__(
        self,
        *,
        base_url: str,
        flow: OAuthFlow = "auto",
        refresh_token: str | None = None,
        timeout_seconds: float = 120.0,
        prompt: OAuthPrompt = "none",
        on_prompt: Callable[[str], None] | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if flow == "pkce":
            raise NotImplementedError("flow='pkce' is not built for clients: use flow='device_code'")
        self._base_url = base_url
        self._origin = origin_of(base_url)
        self._refresh_token = refresh_token
        self._timeout = timeout_seconds
        self._on_prompt = on_prompt
        self._client = bounded_client(transport)
        self._lock = threading.Lock()
        self._tokens: OAuthTokenSet | None = None
        self._context: OAuthRefreshContext | None = None
        self._interactive = False

    def __repr__(self) -> str:
        return f"VgiOAuthAuth(base_url={self._origin!r})"

    def close(self) -> None:
        """Close the client for the provider; the object can log in no more."""
        self._client.close()

    def clear_tokens(self) -> None:
        """Forget the login and the refresh token."""
        with self._lock:
            self._tokens = self._refresh_token = self._context = None

    def identity(self) -> OAuthIdentity | None:
        """Return who is logged in; None before."""
        tokens = self._tokens
        return tokens.identity if tokens is not None else None

    def was_interactive(self) -> bool:
        """Whether the latest login asked the user."""
        return self._interactive

    def sync_auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Attach the token; on a 401 with a challenge log in and send the request once more."""
        if origin_of(str(request.url)) != self._origin:
            yield request
            return
        if self.requires_request_body:
            request.read()
        tokens = self._tokens
        if tokens is not None and tokens.is_valid():
            request.headers["Authorization"] = f"Bearer {tokens.bearer_token()}"
        response = yield request
        offered = map(parse_oauth_challenge, response.headers.get_list("WWW-Authenticate"))
        challenge = next((one for one in offered if one is not None), None)
        if response.status_code != 401 or challenge is None:
            return
        response.read()
        tokens = self._log_in(challenge, str(request.url), rejected=tokens)
        request.headers["Authorization"] = f"Bearer {tokens.bearer_token()}"
        yield request

    def _log_in(self, challenge: OAuthChallenge, url: str, rejected: OAuthTokenSet | None) -> OAuthTokenSet:
        """New tokens, or those that another thread got meanwhile."""
        if not self._lock.acquire(timeout=self._timeout + 30.0):
            raise OAuthTokenError("another thread's login has not come to an end")
        try:
            if self._tokens is None or self._tokens is rejected or not self._tokens.is_valid():
                self._tokens = self._obtain(challenge, url)
                self._refresh_token = self._tokens.refresh_token or self._refresh_token
            return self._tokens
        finally:
            self._lock.release()

    def _obtain(self, challenge: OAuthChallenge, url: str) -> OAuthTokenSet:
        resource, server = self._discover(challenge, url)
        if self._refresh_token:
            context = self._context or _context(challenge, resource, server)
            try:
                self._interactive = False
                return attempt_token_refresh(context, self._refresh_token, http_client=self._client)
            except OAuthTokenError as exc:
                if exc.error_code == "invalid_grant":
                    self._refresh_token = None
        self._interactive = True
        tokens, self._context = perform_device_code_flow(
            challenge,
            resource,
            server,
            http_client=self._client,
            timeout_seconds=self._timeout,
            on_prompt=self._on_prompt,
        )
        return tokens

    def _discover(
        self, challenge: OAuthChallenge, url: str
    ) -> tuple[OAuthResourceMetadataResponse, OAuthServerMetadata]:
        """Metadata of the service and its provider; OAuthTokenError when they are not what was called."""
        place = challenge.resource_metadata_url
        try:
            check_url(place, configured=self._base_url)
            if origin_of(place) != self._origin:
                raise ValueError("the challenge points to another origin than the service's")
            resource = fetch_oauth_metadata(place, client=self._client)
            if not _covers(resource.resource, url):  # RFC 9728 section 3.3
                raise ValueError("the metadata describe another resource than the one called")
            issuer = check_url(resource.authorization_servers[0], configured=self._base_url)
            return resource, fetch_auth_server_metadata(issuer, client=self._client)
        except (ValueError, core.ConnectionLostError) as exc:
            raise OAuthTokenError(f"no login at {self._origin}: {exc}") from None


def _covers(resource: str, url: str) -> bool:
    with contextlib.suppress(ValueError):
        base, path = urlsplit(resource).path.rstrip("/"), urlsplit(url).path
        return origin_of(resource) == origin_of(url) and (path == base or path.startswith(f"{base}/"))
    return False
