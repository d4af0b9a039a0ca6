# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: none; VgiOAuthAuth calls it.
"""Login in the browser of this machine (auth.md section 7): authorization code with PKCE.

The provider sends the browser back to a listener on 127.0.0.1 that lives as long as the login (RFC 8252 section 7.3).
What arrives there may come from any page or program of this machine: only a request with this login's `state` ends the
wait, and its code is of use only with the verifier (RFC 7636), which has not left this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Mapping
from typing import Literal
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx

from ..common.texts import base64url
from ..common.urls import same_origin
from .oauth import OAuthResourceMetadataResponse, OAuthServerMetadata
from .oauth_tokens import (
    OAuthChallenge,
    OAuthRefreshContext,
    OAuthTokenError,
    OAuthTokenSet,
    client_form,
    login_context,
    post_form,
    print_prompt,
    read_tokens,
    refusal,
)

__all__ = ["OAuthPrompt", "is_colab_environment", "is_headless_environment", "perform_pkce_flow"]

OAuthPrompt = Literal["none", "login", "consent", "select_account"]
_PATH = "/callback"
_MAX_HEAD = 16384  # bytes; browsers keep URLs below 8 KiB
_HEAD_SECONDS = 1.0


def _page(status: str, text: str) -> bytes:
    body = f"<!doctype html><meta charset=utf-8><title>Login</title><p>{text}".encode()
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\nContent-Security-Policy: default-src 'none'\r\n"
        "Connection: close\r\n\r\n"
    ).encode() + body


_DONE = _page("200 OK", "The answer has arrived. You may close this page and go back to the program that asked.")
_NOT_THIS = _page("404 Not Found", "No login of this program.")


def is_headless_environment() -> bool:
    """Whether no browser can be expected here: over ssh, or on Linux without a display."""
    if os.environ.get("SSH_CONNECTION"):
        return True
    return sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def is_colab_environment() -> bool:
    """Whether this is a Google Colab notebook, whose browser runs on another machine."""
    return "google.colab" in sys.modules or bool(os.environ.get("COLAB_RELEASE_TAG"))


def pkce_context(
    challenge: OAuthChallenge, resource: OAuthResourceMetadataResponse, server: OAuthServerMetadata
) -> OAuthRefreshContext:
    """Return client and token endpoint of a browser login; OAuthTokenError when the service names none.

    A service that keeps its client's secret has a token endpoint of its own, which adds the secret (auth.md section 8).
    """
    client = (resource.client_id, resource.client_secret or "") if resource.client_id else (challenge.client_id, "")
    if not client[0] or not server.authorization_endpoint:
        raise OAuthTokenError("the service offers no browser login: it needs a client id and an authorization endpoint")
    endpoint = server.token_endpoint
    if resource.token_endpoint and not client[1]:
        endpoint = resource.token_endpoint
        if not same_origin(endpoint, resource.resource):
            raise OAuthTokenError("the service's token endpoint has another origin than the service")
    return login_context(challenge, resource, client, endpoint)


def perform_pkce_flow(
    challenge: OAuthChallenge,
    resource_meta: OAuthResourceMetadataResponse,
    server_meta: OAuthServerMetadata,
    *,
    http_client: httpx.Client,
    timeout_seconds: float,
    prompt: OAuthPrompt = "none",
    on_prompt: Callable[[str], None] | None = None,
) -> tuple[OAuthTokenSet, OAuthRefreshContext]:
    """Send the user's browser to the provider and wait until it comes back with a code; exchange the code for tokens.

    Args:
        http_client: calls the provider; it should send no credentials of its own.
        timeout_seconds: how long the user may take.
        prompt: what the provider must ask again (OpenID Connect Core section 3.1.2.1); "none" leaves that to it.
        on_prompt: gets the text with the URL; by default it is written to stderr. Where there is a display the URL is
            opened as well.

    Raises OAuthTokenError when the provider refuses, answers another login, or time runs out. The provider must allow
    http://127.0.0.1:<any port>/callback as the client's redirect URI (RFC 8252 section 7.3).
    """
    context = pkce_context(challenge, resource_meta, server_meta)
    verifier, state, nonce = (secrets.token_urlsafe(32) for _ in range(3))  # 43 characters (RFC 7636 section 4.1)
    with _Callback(state) as callback:
        question = _question(context, callback.url, verifier, state, nonce, prompt)
        joint = "&" if urlsplit(server_meta.authorization_endpoint).query else "?"
        _show(f"{server_meta.authorization_endpoint}{joint}{urlencode(question)}", on_prompt)
        answer = callback.wait(timeout_seconds)
        code = _code(answer, resource_meta.authorization_servers[0])
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": callback.url, "code_verifier": verifier}
    status, found = post_form(http_client, context.token_endpoint, {**form, **client_form(context)})
    if status != 200:
        raise refusal("the login's code was refused", status, found)
    tokens = read_tokens(found, context)
    if tokens.identity.present and "nonce" in question and tokens.identity.claims.get("nonce") != nonce:
        raise OAuthTokenError("the provider's id token belongs to another login")
    return tokens, context


def _question(
    context: OAuthRefreshContext, redirect_uri: str, verifier: str, state: str, nonce: str, prompt: OAuthPrompt
) -> dict[str, str]:
    """RFC 7636 section 4.3; a nonce as well when an id token is asked for."""
    digest = hashlib.sha256(verifier.encode()).digest()
    return {
        "response_type": "code",
        "client_id": context.client_id,
        "redirect_uri": redirect_uri,
        "code_challenge": base64url(digest),
        "code_challenge_method": "S256",
        "state": state,
        "scope": context.scope,
        **({"nonce": nonce} if "openid" in context.scope.split() else {}),
        **({"prompt": prompt} if prompt != "none" else {}),
    }


def _show(url: str, on_prompt: Callable[[str], None] | None) -> None:
    (on_prompt or print_prompt)(f"To log in, open {url}")
    if not is_headless_environment() and not is_colab_environment():
        threading.Thread(target=_open_browser, args=(url,), daemon=True).start()


def _open_browser(url: str) -> None:
    """In a thread of its own: some browsers block until they are closed. Without any, the user has the URL."""
    with contextlib.suppress(webbrowser.Error, OSError):
        webbrowser.open(url)


def _code(answer: Mapping[str, str], issuer: str) -> str:
    """The code of an answer. RFC 9207: an answer of another provider than the one asked is refused."""
    if answer.get("iss", issuer).rstrip("/") != issuer.rstrip("/"):
        raise OAuthTokenError("the answer came from another provider than the one asked")
    if "error" in answer or not answer.get("code"):
        raise refusal("the login was refused", 302, answer)
    return answer["code"]


class _Callback:
    """The listener for one login. `url` is its redirect URI."""

    def __init__(self, state: str) -> None:
        self._state = state
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{_PATH}"

    def __enter__(self) -> _Callback:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.close()

    def wait(self, seconds: float) -> Mapping[str, str]:
        """Return the parameters that came with the login's state; OAuthTokenError after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._listener.settimeout(left)
            with contextlib.suppress(TimeoutError, ConnectionError), self._listener.accept()[0] as conn:
                answer = self._answered(_head(conn))
                # The browser may be gone already; its answer counts all the same.
                with contextlib.suppress(OSError):
                    conn.sendall(_NOT_THIS if answer is None else _DONE)
                if answer is not None:
                    return answer
        raise OAuthTokenError("the login was not finished in time; try again", error_code="expired_token")

    def _answered(self, head: bytes) -> Mapping[str, str] | None:
        """The parameters of a request, each there once (RFC 6749 section 3.1); None if it is not this login's."""
        with contextlib.suppress(ValueError):
            method, target, _ = head.decode("ascii").split(" ", 2)
            path, _, query = target.partition("?")
            pairs = parse_qsl(query, max_num_fields=20, strict_parsing=True)
            found = dict(pairs)
            ours = hmac.compare_digest(found.get("state", "").encode(), self._state.encode())
            if ours and method == "GET" and path == _PATH and len(found) == len(pairs):
                return found
        return None


def _head(conn: socket.socket) -> bytes:
    """A request up to its blank line, or as much as came within a second: browsers open connections they never use."""
    deadline = time.monotonic() + _HEAD_SECONDS
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD and (left := deadline - time.monotonic()) > 0:
        conn.settimeout(left)
        chunk = conn.recv(_MAX_HEAD)
        if not chunk:
            break
        head += chunk
    return head
