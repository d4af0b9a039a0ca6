# Needs: httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: none; the HTTP calls of jwt, oauth and login.
"""Bounded calls to identity providers: https only, a size, a time, no redirects (auth.md section 3)."""

from __future__ import annotations

import functools
import ipaddress
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

__all__ = ["FetchError", "bounded_client", "check_url", "get_json", "is_loopback_url", "origin_of", "same_origin"]

MAX_BYTES = 1 << 20  # a JWKS of 300 RSA keys is 150 KB
SECONDS = 5.0


class FetchError(Exception):
    """An identity provider could not be asked, or its answer is of no use. Names host and cause, never a query."""


def is_loopback_url(url: str) -> bool:
    """Whether the host of a URL is this machine: localhost or a loopback address."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def origin_of(url: str) -> str:
    """Return scheme, host and port of a URL, lower-case, without the default port. ValueError for a bad port."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    default = {"https": 443, "http": 80}.get(parts.scheme)
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")


def same_origin(url: str, other: str) -> bool:
    """Whether two URLs have one origin; False for what is no URL."""
    try:
        return origin_of(url) == origin_of(other)
    except ValueError:
        return False


def check_url(url: object, *, configured: str | None = None) -> str:
    """Return a URL that may be called: https, or http on this machine when the configured URL is on it too.

    A public provider can thus not send calls to services of this machine. ValueError otherwise.
    """
    if not isinstance(url, str) or not url.isascii() or any(char <= " " or char in '"<>\\\x7f' for char in url):
        raise ValueError("not a URL")
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0 or parts.username is not None or parts.fragment:
        raise ValueError("a URL needs a host and a good port, and neither user information nor a fragment")
    if parts.scheme == "https" and not (is_loopback_url(url) and not is_loopback_url(configured or url)):
        return url
    if parts.scheme == "http" and is_loopback_url(url) and is_loopback_url(configured or url):
        return url
    raise ValueError(f"{origin_of(url)} may not be called: https is required (http only on this machine)")


class _Bounded(httpx.BaseTransport):
    """Ends a call after `SECONDS` and an answer at `MAX_BYTES`; asks for bodies as they are, so no bomb can unfold."""

    def __init__(self, inner: httpx.BaseTransport) -> None:
        self._inner = inner

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        deadline = time.monotonic() + SECONDS
        response = self._inner.handle_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise httpx.DecodingError("an encoded body was not asked for", request=request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = _BoundedStream(response.stream, deadline)
        return response

    def close(self) -> None:
        self._inner.close()


class _BoundedStream(httpx.SyncByteStream):
    def __init__(self, inner: httpx.SyncByteStream, deadline: float) -> None:
        self._inner = inner
        self._deadline = deadline

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for chunk in self._inner:
            size += len(chunk)
            if size > MAX_BYTES:
                raise httpx.ReadError(f"the answer is larger than {MAX_BYTES} bytes")
            if time.monotonic() > self._deadline:
                raise httpx.ReadTimeout(f"the answer took longer than {SECONDS:g} s")
            yield chunk

    def close(self) -> None:
        self._inner.close()


@functools.cache
def _tls() -> ssl.SSLContext:
    """Reading the authorities takes 20 ms: once per process."""
    return ssl.create_default_context()


def bounded_client(transport: httpx.BaseTransport | None = None) -> httpx.Client:
    """Return a client for calls to identity providers; the caller closes it."""
    inner = transport or httpx.HTTPTransport(verify=_tls())
    return httpx.Client(transport=_Bounded(inner), timeout=SECONDS, follow_redirects=False)


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
