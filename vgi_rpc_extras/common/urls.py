# Needs: the standard library only.
"""Which URLs and addresses may be called, and how a URL is shown (storage.md sections 6 and 11, auth.md section 3)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from urllib.parse import urlsplit

__all__ = [
    "UrlValidator",
    "check_url",
    "https_only_validator",
    "is_loopback_url",
    "is_public_address",
    "origin_of",
    "redact_url",
    "same_origin",
]

UrlValidator = Callable[[str], None]

_HIDDEN = "<url>"
# Of the IANA's special-purpose registries, and what clouds keep for themselves: a list of our own, because that of the
# ipaddress module changes with the patch release of the interpreter.
_NOT_PUBLIC_4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/3"),  # multicast and what is above it
        "168.63.129.16/32",  # Azure's own, in every network of it
    )
)
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # all that has been given to the internet (RFC 4291 section 2.4)
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(text)
    for text in ("2001::/23", "2001:db8::/32", "3fff::/20")  # 2001::/32 is Teredo
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def https_only_validator(url: str) -> None:
    """Raise ValueError for a URL whose scheme is not https."""
    scheme = url.partition(":")[0].lower()
    if scheme != "https" or ":" not in url:
        shown = scheme if re.fullmatch(r"[a-z][a-z0-9+.-]{0,30}", scheme) else "none"
        raise ValueError(f"only https URLs are fetched, not those of scheme {shown!r}")


def is_public_address(address: str) -> bool:
    """Whether an IP address is one of the public internet.

    Not so: loopback, private, link-local (the metadata services of clouds), site-local, shared, multicast, reserved,
    unspecified, and the IPv6 addresses that stand for such an IPv4 address.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return not any(ip in network for network in _NOT_PUBLIC_4)
    inner = ip.ipv4_mapped or ip.sixtofour
    if ip in _NAT64:
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if inner is not None:
        return is_public_address(str(inner))
    return ip in _PUBLIC_6 and not any(ip in network for network in _NOT_PUBLIC_6)


def redact_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, for messages; a placeholder if it is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return _HIDDEN
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", parts.scheme) or not re.fullmatch(r"[0-9A-Za-z._:%-]+", host):
        return _HIDDEN
    if "@" in parts.path or not parts.path.isprintable():
        return _HIDDEN
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{parts.path}"


LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine: localhost or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_loopback_url(url: str) -> bool:
    """Whether the host of a URL is this machine."""
    return is_loopback(urlsplit(url).hostname or "")


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
