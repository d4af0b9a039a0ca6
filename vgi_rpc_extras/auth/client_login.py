# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: `auth=` of the httpx client given to http_connect.
"""Login of command-line clients (auth.md section 7), with a device code or in the browser of this machine.

    client = httpx.Client(base_url=url, auth=VgiOAuthAuth(base_url=url))
    with http_connect(Calc, client=client) as calc:
        calc.add(1, 2)          # the first 401 prints where to log in, and waits for it

The service names its provider. Therefore its metadata is read only from its own origin and only over https (or on this
machine), and a token is attached only to requests to that origin.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import httpx

from .. import core as _bound_core
from ..common.urls import check_url, origin_of, same_origin
from .device_login import device_context, perform_device_code_flow
from .oauth import (
    OAuthResourceMetadataResponse,
    OAuthServerMetadata,
    fetch_auth_server_metadata,
    fetch_oauth_metadata,
)
from .oauth_tokens import (
    OAuthChallenge,
    OAuthIdentity,
    OAuthRefreshContext,
    OAuthTokenError,
    OAuthTokenSet,
    attempt_token_refresh,
    parse_oauth_challenge,
)
from .pkce_login import OAuthPrompt, is_colab_environment, is_headless_environment, perform_pkce_flow, pkce_context
from .provider import bounded_client

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["OAuthFlow", "VgiOAuthAuth"]

OAuthFlow = Literal["auto", "device_code", "pkce"]
_Flow = Callable[..., tuple[OAuthTokenSet, OAuthRefreshContext]]


class VgiOAuthAuth(httpx.Auth):
    """Logs an httpx client in when the service answers 401 with a challenge; one login for all threads.

    Args:
        base_url: of the service; only requests to its origin get a token.
        flow: "device_code" (RFC 8628), "pkce" for the browser of this machine (RFC 8252), or "auto": a device code
            where the provider has them, because that needs no redirect URI, else the browser if there is one.
        refresh_token: of an earlier login, tried before the user is asked.
        timeout_seconds: how long the user may take.
        prompt: for the browser ("none" sends no prompt parameter); a device code has no use for it.
        on_prompt: gets the text for the user; by default it is written to stderr.
        transport: for calls to service metadata and provider.

    Raises OAuthTokenError, in every waiting thread, when no login comes about.
    """

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
        self._base_url = base_url
        self._origin = origin_of(base_url)
        self._refresh_token = refresh_token
        self._flow = flow
        self._timeout = timeout_seconds
        self._prompt: OAuthPrompt = prompt
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
        request.read()  # it is sent again after a login
        tokens = self._tokens
        if tokens is not None and tokens.is_valid():
            request.headers["Authorization"] = f"Bearer {tokens.bearer_token()}"
        response = yield request
        offered = map(parse_oauth_challenge, response.headers.get_list("WWW-Authenticate"))
        challenge = next((one for one in offered if one is not None), None)
        if response.status_code != 401 or challenge is None:
            return
        _leave_unread(response)
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
        """Tokens by the refresh token if there is one that still works, else by asking the user."""
        resource, server = self._discover(challenge, url)
        in_browser = self._flow == "pkce" or (self._flow == "auto" and not server.device_authorization_endpoint)
        if self._refresh_token:
            choose = pkce_context if in_browser else device_context
            context = self._context or choose(challenge, resource, server)
            try:
                self._interactive = False
                return attempt_token_refresh(context, self._refresh_token, http_client=self._client)
            except OAuthTokenError as exc:
                if exc.error_code == "invalid_grant":
                    self._refresh_token = None
        if in_browser and self._flow == "auto" and (is_headless_environment() or is_colab_environment()):
            raise OAuthTokenError(
                "the provider has no device-code login, and there is no browser here: flow='pkce' shows the URL to open"
            )
        self._interactive = True
        in_this_browser = functools.partial(perform_pkce_flow, prompt=self._prompt)
        perform: _Flow = in_this_browser if in_browser else perform_device_code_flow
        tokens, self._context = perform(
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


def _leave_unread(response: httpx.Response) -> None:
    """End a response before its body: httpx would read all of it, however long, before it sends the next request."""
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream.close()
    response.stream = httpx.ByteStream(b"")
    response.headers.pop("Content-Encoding", None)


def _covers(resource: str, url: str) -> bool:
    if not same_origin(resource, url):
        return False
    base, path = urlsplit(resource).path.rstrip("/"), urlsplit(url).path
    return path == base or path.startswith(f"{base}/")
