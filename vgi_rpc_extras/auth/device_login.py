# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: none; VgiOAuthAuth calls it.
"""Login with a code that the user types into a browser on any device (auth.md section 7, RFC 8628)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from ..common.urls import check_url
from .oauth import OAuthResourceMetadataResponse, OAuthServerMetadata
from .oauth_tokens import (
    OAuthChallenge,
    OAuthRefreshContext,
    OAuthTokenError,
    OAuthTokenSet,
    client_form,
    login_context,
    positive,
    post_form,
    print_prompt,
    read_tokens,
    refusal,
)

__all__ = ["perform_device_code_flow", "select_device_code_client"]

_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
_MAX_FAILURES = 3  # consecutive, while polling
_sleep = time.sleep


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
    context = device_context(challenge, resource_meta, server_meta)
    form = {**client_form(context), "scope": context.scope}
    status, code = post_form(http_client, server_meta.device_authorization_endpoint, form)
    if status != 200 or not isinstance(code.get("device_code"), str):
        raise refusal("the provider gave no device code", status, code)
    (on_prompt or print_prompt)(_prompt(code))
    return _poll(http_client, context, code, timeout_seconds), context


def device_context(
    challenge: OAuthChallenge, resource: OAuthResourceMetadataResponse, server: OAuthServerMetadata
) -> OAuthRefreshContext:
    """Return client and token endpoint of a device login; OAuthTokenError when the service offers none."""
    client = select_device_code_client(
        device_client_id=resource.device_code_client_id or "",
        device_client_secret=resource.device_code_client_secret or "",
        client_id=resource.client_id or "",
        client_secret=resource.client_secret or "",
        challenge_client_id=challenge.client_id,
    )
    if not client[0] or not server.device_authorization_endpoint:
        raise OAuthTokenError("the service offers no device-code login: it needs a client id and a device endpoint")
    return login_context(challenge, resource, client, server.token_endpoint)


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


def _poll(
    client: httpx.Client, context: OAuthRefreshContext, code: Mapping[str, Any], timeout_seconds: float
) -> OAuthTokenSet:
    """RFC 8628 section 3.5, at the provider itself: a token endpoint of the service would see the tokens."""
    deadline = time.monotonic() + min(timeout_seconds, positive(code.get("expires_in"), 300.0))
    interval = positive(code.get("interval"), 5.0)
    form = {"grant_type": _GRANT, "device_code": str(code["device_code"]), **client_form(context)}
    failures = 0
    while time.monotonic() + interval <= deadline:
        _sleep(interval)
        try:
            status, answer = post_form(client, context.token_endpoint, form)
        except OAuthTokenError:
            status, answer = 503, {}
        if status == 200:
            return read_tokens(answer, context)
        error = answer.get("error")
        if error == "slow_down" or status == 429:
            interval += 5.0
        elif status >= 500:
            failures += 1
            if failures > _MAX_FAILURES:
                raise OAuthTokenError("the provider cannot be reached; the login was given up")
            continue
        elif error != "authorization_pending":
            raise refusal("the login was refused", status, answer)
        failures = 0
    raise OAuthTokenError("the login was not confirmed in time; try again", error_code="expired_token")
