# Needs: the standard library only. Seam: none; what the authenticators behind a proxy share.
"""Which socket peers may set identity headers (auth.md section 4), and which servers tell headers apart.

WSGI servers give headers as HTTP_X_USER, whether a proxy wrote X-User or a caller X_User. waitress, gunicorn and
mod_wsgi drop names with an underscore; granian does not, and nothing in what it hands over tells the two apart. So no
name with a dash is believed there, unless it is one that callers write themselves.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from .unauthorized import AuthFailure, AuthReason

if TYPE_CHECKING:
    import falcon

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TrustedProxies = Collection[str] | None
_MAX_HEADER = 65536
_MERGING = ("granian",)  # as SERVER_SOFTWARE begins, in lower case
# What callers, and their browsers, write: a forged one only says what they may say anyway.
_OWN = re.compile(
    r"HTTP_([A-Z0-9]+|(VGI|SEC|ACCEPT|CONTENT|IF|ACCESS_CONTROL)_[A-Z0-9_]+|USER_AGENT|X_REQUEST_ID|X_API_KEY)"
)


class MixedHeadersError(Exception):
    """The WSGI server gives a proxy's header and a caller's forgery of it under one name."""

    def __init__(self, name: str, software: str) -> None:
        super().__init__(
            f"the authenticator reads the header {name}, and {software} gives a caller's {name.replace('-', '_')} as"
            " the same one, so it could be forged: serve with waitress or gunicorn, or authenticate by Authorization"
        )


def merging_server(env: Mapping[str, Any]) -> str:
    """The name of the server of a request, if it gives `X_User` as `X-User`; else nothing."""
    software = str(env.get("SERVER_SOFTWARE", ""))
    return software if software.lower().startswith(_MERGING) else ""


class _Unforgeable(dict[str, Any]):
    """An environ without the headers that could be forged; MixedHeadersError for who asks for one of them."""

    def __init__(self, env: Mapping[str, Any], software: str) -> None:
        super().__init__((key, value) for key, value in env.items() if not _forgeable(key))
        self._software = software

    def __missing__(self, key: str) -> NoReturn:
        if _forgeable(key):
            raise MixedHeadersError(key[5:].title().replace("_", "-"), self._software)
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self or _forgeable(key) else default


def check_server(software: str, headers: Iterable[str]) -> None:
    """Refuse a server that cannot tell these headers from forged ones; ValueError."""
    for name in headers:
        if merging_server({"SERVER_SOFTWARE": software}) and _forgeable("HTTP_" + name.upper().replace("-", "_")):
            raise ValueError(str(MixedHeadersError(name, software)))


def _forgeable(key: str) -> bool:
    return key.startswith("HTTP_") and _OWN.fullmatch(key) is None


def unforgeable(req: falcon.Request) -> falcon.Request:
    """The request as an authenticator may see it: itself, but where the server merges names a twin without those."""
    software = merging_server(req.env)
    if not software:
        return req
    twin = type(req)(_Unforgeable(req.env, software), options=req.options)
    twin.context = req.context
    return twin


class ProxyHeader:
    """Reads one header that only a proxy may set. ValueError for an ill-formed or empty list of networks."""

    def __init__(self, name: str, trusted_proxies: TrustedProxies) -> None:
        if isinstance(trusted_proxies, str):
            raise ValueError("trusted_proxies is a collection of addresses and networks, not one string")
        if trusted_proxies is not None and not trusted_proxies:
            raise ValueError("trusted_proxies is empty: nobody could reach the service; None trusts every peer")
        self.name = name
        self._networks = None if trusted_proxies is None else [ipaddress.ip_network(one) for one in trusted_proxies]

    @property
    def restricted(self) -> bool:
        """Whether only listed peers are believed."""
        return self._networks is not None

    def read(self, req: falcon.Request) -> str:
        """Return the header's value; AuthFailure when the peer is not a proxy or has not set it."""
        if self._networks is not None and not _is_among(req.env.get("REMOTE_ADDR", ""), self._networks):
            raise AuthFailure(AuthReason.PROXY_REQUIRED, "the peer is not a trusted proxy")
        value = req.get_header(self.name)
        if not value:
            raise AuthFailure(AuthReason.PROXY_REQUIRED, "the proxy's header is missing")
        if len(value) > _MAX_HEADER:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the proxy's header is too long")
        return value


def _is_among(peer: str, networks: list[_Network]) -> bool:
    """The socket's own peer counts: X-Forwarded-For is written by whoever sends it."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return any((mapped or address) in network for network in networks)
