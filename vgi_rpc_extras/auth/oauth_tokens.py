# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: none; what the logins of clients have in common.
"""Tokens of a client: what a challenge says, what a provider gives, and how it is renewed (auth.md section 7)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import httpx

from .. import core as _bound_core
from ..common.texts import from_base64url, printable
from ..common.urls import check_url, origin_of
from .oauth import OAuthResourceMetadataResponse, parse_www_authenticate_params
from .provider import FetchError, json_object

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "OAuthChallenge",
    "OAuthIdentity",
    "OAuthRefreshContext",
    "OAuthTokenError",
    "OAuthTokenSet",
    "attempt_token_refresh",
    "parse_oauth_challenge",
]

_SKEW = 45.0


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


def attempt_token_refresh(ctx: OAuthRefreshContext, refresh_token: str, *, http_client: httpx.Client) -> OAuthTokenSet:
    """Return new tokens; the old refresh token stays when the provider gives no other. OAuthTokenError."""
    form = {"grant_type": "refresh_token", "refresh_token": refresh_token, **client_form(ctx)}
    status, answer = post_form(http_client, ctx.token_endpoint, form)
    if status != 200:
        raise refusal("the login could not be renewed", status, answer)
    tokens = read_tokens(answer, ctx)
    return tokens if tokens.refresh_token else replace(tokens, refresh_token=refresh_token)


def login_context(
    challenge: OAuthChallenge, resource: OAuthResourceMetadataResponse, client: tuple[str, str], token_endpoint: str
) -> OAuthRefreshContext:
    """Return what a login needs to ask for tokens; `client` is id and secret ("" for a client without)."""
    return OAuthRefreshContext(
        token_endpoint=token_endpoint,
        client_id=client[0],
        client_secret=client[1],
        scope=" ".join(resource.scopes_supported) or "openid",
        use_id_token=resource.use_id_token_as_bearer,
        resource_metadata_url=challenge.resource_metadata_url,
    )


def print_prompt(text: str) -> None:
    """Show the user what to do."""
    print(text, file=sys.stderr, flush=True)


def client_form(context: OAuthRefreshContext) -> dict[str, str]:
    """Return the form fields that say which client is asking (RFC 6749 section 2.3.1)."""
    secret = {"client_secret": context.client_secret} if context.client_secret else {}
    return {"client_id": context.client_id, **secret}


def post_form(client: httpx.Client, url: str, form: Mapping[str, str]) -> tuple[int, Mapping[str, Any]]:
    """Return status and JSON object ({} for another body) of a form post. OAuthTokenError when it cannot be sent."""
    try:
        response = client.post(check_url(url), data=dict(form), headers={"Accept": "application/json"})
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
        raise OAuthTokenError(f"{origin_of(url)} could not be reached: {type(exc).__name__}") from None
    except ValueError as exc:
        raise OAuthTokenError(str(exc)) from None
    try:
        return response.status_code, json_object(response.content, url)
    except FetchError:
        return response.status_code if response.status_code != 200 else 502, {}


def refusal(what: str, status: int, answer: Mapping[str, Any]) -> OAuthTokenError:
    """Return an error with OAuth's word and its description, without anything that could steer a terminal."""
    code, description = (printable(str(answer.get(name, "")), 200) for name in ("error", "error_description"))
    shown = ": ".join(part for part in (code, description) if part) or f"status {status}"
    return OAuthTokenError(f"{what}: {shown}", error_code=code, error_description=description)


def positive(value: object, default: float) -> float:
    """Return a number of seconds from a provider, or the default for anything that is none."""
    usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e6
    return float(value) if usable else default  # type: ignore[arg-type]


def read_tokens(answer: Mapping[str, Any], context: OAuthRefreshContext) -> OAuthTokenSet:
    """Return the tokens of a token endpoint's answer (RFC 6749 section 5.1). OAuthTokenError without a usable one."""
    texts = {
        name: value
        for name in ("access_token", "refresh_token", "id_token", "scope")
        if isinstance(value := answer.get(name), str)
    }
    lifetime = positive(answer.get("expires_in"), 0.0)
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
        claims = json.loads(from_base64url(segment))
    except (ValueError, RecursionError):
        return OAuthIdentity()
    if not isinstance(claims, dict):
        return OAuthIdentity()
    sub, email, name, issuer = (str(claims.get(key, "")) for key in ("sub", "email", "name", "iss"))
    return OAuthIdentity(True, sub, email, name, issuer, claims)
