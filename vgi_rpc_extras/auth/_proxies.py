# Needs: the standard library only. Seam: none; what the authenticators behind a proxy share.
"""Which socket peers may set identity headers (auth.md section 4)."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import TYPE_CHECKING

from .unauthorized import AuthFailure, AuthReason

if TYPE_CHECKING:
    import falcon

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TrustedProxies = Collection[str] | None
_MAX_HEADER = 65536


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
