# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: none; what jwt, oauth and the logins ask providers.
"""Questions to identity providers: https only, a size, a time, no redirects (auth.md section 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

from ..common.fetch import JobTransport
from ..common.urls import check_url, origin_of

__all__ = ["FetchError", "bounded_client", "get", "get_json", "json_object", "read_provider"]

MAX_BYTES = 1 << 20  # a JWKS of 300 RSA keys is 150 KB
SECONDS = 5.0
_ENDPOINTS = ("authorization_endpoint", "token_endpoint", "device_authorization_endpoint", "jwks_uri")


class FetchError(Exception):
    """An identity provider could not be asked, or its answer is of no use. Names host and cause, never a query."""


def bounded_client(transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """Return a client for calls to identity providers; the caller closes it."""
    return httpx.Client(transport=JobTransport(SECONDS, MAX_BYTES, transport), timeout=SECONDS, follow_redirects=False)


def read_provider(client: Any, issuer: str, *required: str) -> Mapping[str, Any]:
    """Return the openid-configuration of an issuer, whose endpoints may all be called.

    It must name this issuer, to the letter (OpenID Connect Discovery 1.0 section 4.3). FetchError for any other
    document, and for one that lacks what is `required`.
    """
    found = get_json(client, f"{issuer.removesuffix('/')}/.well-known/openid-configuration")
    if found.get("issuer") != issuer:
        raise FetchError(f"the document of {origin_of(issuer)} describes another issuer than the one that was asked")
    for name in _ENDPOINTS:
        if found.get(name) is None and name not in required:
            continue
        try:
            check_url(found.get(name), configured=issuer)
        except ValueError:
            raise FetchError(f"{origin_of(issuer)} lacks {name}, or names one that may not be called") from None
    return found


def get_json(client: Any, url: str) -> Mapping[str, Any]:
    """Return the JSON object at a URL; FetchError for anything but 200 with an object."""
    status, found = get(client, url)
    if status != 200:
        raise FetchError(f"{origin_of(url)} answered {status}")
    return found


def get(client: Any, url: str) -> tuple[int, Mapping[str, Any]]:
    """Return status and JSON object of a GET; an empty object unless the status is 200. FetchError."""
    try:
        response = client.get(url, headers={"Accept": "application/json"})
        content: bytes = response.content
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
        raise FetchError(f"{origin_of(url)} could not be reached: {type(exc).__name__}") from None
    if response.status_code != 200:
        return int(response.status_code), {}
    return 200, json_object(content, url)


def json_object(content: bytes, url: str) -> Mapping[str, Any]:
    """Return the JSON object in an answer; FetchError when there is none."""
    try:
        found = json.loads(content) if len(content) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FetchError(f"{origin_of(url)} did not answer with a JSON object")
    return found
