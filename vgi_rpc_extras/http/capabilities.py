# Needs: nothing but the core. Used by client.py.
"""What a server says about itself in the headers of `OPTIONS {prefix}/health` (http.md section 10)."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping

from ..common import coding, names
from ..common.texts import printable

__all__ = ["HttpServerCapabilities"]

_SUPPORT = names.ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER.lower()


@dataclasses.dataclass(frozen=True)
class HttpServerCapabilities:
    """What the headers of `OPTIONS {prefix}/health` say (http.md section 10); None is "not said"."""

    max_request_bytes: int | None = None
    max_response_bytes: int | None = None
    max_externalized_response_bytes: int | None = None
    externalization_enabled: bool = False
    upload_url_support: bool = False
    max_upload_bytes: int | None = None
    supported_encodings: tuple[coding.Encoding, ...] = (coding.Encoding.ZSTD,)
    cache_expires_at: float | None = None
    sticky_enabled: bool = False
    sticky_default_ttl: int | None = None
    sticky_echo_headers: tuple[str, ...] = ()
    accept_max_response_bytes_support: bool = False
    own_token_key: str | None = None  # names the key that the process has made for itself, for want of a token_key=


def capabilities_of(headers: Mapping[str, str]) -> HttpServerCapabilities:
    def text(name: str) -> str:
        return headers.get(name.lower(), "")

    def integer(name: str) -> int | None:
        value = text(name)
        return int(value) if re.fullmatch(r"[0-9]{1,16}", value) else None

    def flag(name: str) -> bool:
        return text(name).lower() == "true"

    age = re.search(r"max-age=([0-9]{1,9})", text("Cache-Control"))
    echo = [name.strip() for name in text(names.STICKY_ECHO_HEADERS_HEADER).split(",")]
    return HttpServerCapabilities(
        max_request_bytes=integer(names.MAX_REQUEST_BYTES_HEADER),
        max_response_bytes=integer(names.MAX_RESPONSE_BYTES_HEADER),
        max_externalized_response_bytes=integer(names.MAX_EXTERNALIZED_RESPONSE_BYTES_HEADER),
        externalization_enabled=flag(names.EXTERNALIZATION_ENABLED_HEADER),
        upload_url_support=flag(names.UPLOAD_URL_HEADER),
        max_upload_bytes=integer(names.MAX_UPLOAD_BYTES_HEADER),
        supported_encodings=_supported(headers.get(names.SUPPORTED_ENCODINGS_HEADER.lower())),
        cache_expires_at=time.monotonic() + int(age[1]) if age else None,
        sticky_enabled=flag(names.STICKY_ENABLED_HEADER),
        sticky_default_ttl=integer(names.STICKY_DEFAULT_TTL_HEADER),
        sticky_echo_headers=tuple(name for name in echo if name),
        accept_max_response_bytes_support=accepts_limit(headers),
        own_token_key=printable(text(names.OWN_KEY_HEADER), 64) or None,
    )


def _supported(value: str | None) -> tuple[coding.Encoding, ...]:
    """Absent: an old server, which knows zstd; empty: none; only unknown ones: as if absent."""
    if value is None:
        return (coding.Encoding.ZSTD,)
    known = tuple(coding.parse_encoding_list(value))
    return known if known or not value.strip() else (coding.Encoding.ZSTD,)


def accepts_limit(headers: Mapping[str, str]) -> bool:
    return headers.get(_SUPPORT) == "true"  # exactly once: a repeated header is "true, true" here
