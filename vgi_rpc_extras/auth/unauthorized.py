# Needs: nothing but the core (Falcon's objects are passed in). Seam: the authentication step of the HTTP server.
"""Why a request may not pass, as both sides say it: the reasons of a 401, and what a client makes of one."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from .. import core as _bound_core
from ..common.names import AUTH_REASON_HEADER
from ..common.texts import printable

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "AuthFailure",
    "AuthReason",
    "AuthenticationError",
    "build_proxy_hint",
    "classify_auth_failure",
    "declare_key_headers",
    "declare_proxy_headers",
    "key_headers_of",
    "merge_proxy_headers",
    "proxy_headers_of",
    "read_unauthorized",
]

_F = TypeVar("_F")
_MAX_TEXT = 500  # what a client keeps of a refusal's text (auth.md section 5)


class AuthReason(enum.StrEnum):
    """The closed set of reasons that a 401 carries (auth.md section 5)."""

    MISSING_CREDENTIAL = "missing_credential"
    INVALID_CREDENTIAL = "invalid_credential"
    EXPIRED_CREDENTIAL = "expired_credential"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    PROXY_REQUIRED = "proxy_required"
    UNAUTHORIZED = "unauthorized"


class AuthFailure(ValueError):
    """A credential is missing or bad: a chain tries its next member, else 401 with this reason.

    `detail` is for the developer's eyes; it reaches neither the client nor the log.
    """

    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason = reason
        self.detail = detail
        self.vgi_auth_reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class AuthenticationError(core.RpcError):
    """Client side: the service answered 401."""

    def __init__(self, reason: AuthReason, detail: str, proxy_hint: str = "", *, request_id: str = "") -> None:
        message = f"{detail} ({reason.value})" + (f"\n\n{proxy_hint}" if proxy_hint else "")
        super().__init__(
            "AuthenticationError", message, request_id=request_id, error_code=core.Code.UNAUTHENTICATED.value
        )
        self.reason = reason
        self.detail = detail
        self.proxy_hint = proxy_hint


def classify_auth_failure(exc: BaseException) -> AuthReason:
    """Return the reason an exception declares, else the one its class stands for; its text is never read."""
    declared = getattr(exc, "vgi_auth_reason", None)
    if isinstance(declared, AuthReason):
        return declared
    return AuthReason.INSUFFICIENT_SCOPE if isinstance(exc, PermissionError) else AuthReason.UNAUTHORIZED


def declare_proxy_headers(fn: _F, *headers: str) -> _F:
    """Record on an authenticator which headers a proxy must put into requests; returns it."""
    fn.vgi_proxy_headers = tuple(dict.fromkeys((*proxy_headers_of(fn), *headers)))  # type: ignore[attr-defined]
    return fn


def proxy_headers_of(fn: object) -> tuple[str, ...]:
    """Return the header names recorded by `declare_proxy_headers`, in order."""
    return tuple(getattr(fn, "vgi_proxy_headers", ()))


def merge_proxy_headers(*sources: object) -> tuple[str, ...]:
    """Return the header names of several authenticators, each once, first seen first."""
    return tuple(dict.fromkeys(name for source in sources for name in proxy_headers_of(source)))


def declare_key_headers(fn: _F, *headers: str) -> _F:
    """Record on an authenticator which request headers carry a caller's key ("X-API-Key"); returns it.

    The describe page then has a place for the key, and 401 and OpenAPI say what is wanted. Bearer authenticators have
    declared theirs, Authorization.
    """
    fn.vgi_key_headers = tuple(dict.fromkeys((*key_headers_of(fn), *headers)))  # type: ignore[attr-defined]
    return fn


def key_headers_of(*fns: object) -> tuple[str, ...]:
    """Return the header names recorded by `declare_key_headers`, of all `fns`, each once."""
    return tuple(dict.fromkeys(name for fn in fns for name in getattr(fn, "vgi_key_headers", ())))


def build_proxy_hint(headers: Iterable[str]) -> str:
    """Return the note of a service behind a proxy; empty when it needs no header of one."""
    names = ", ".join(headers)
    if not names:
        return ""
    return (
        "This service is reachable only through its authenticating proxy, which must set these request headers:"
        f" {names}. When they are missing or wrong, the proxy's configuration is as likely at fault as the credential:"
        " check that the request went through the proxy."
    )


def read_unauthorized(body: bytes, headers: Mapping[str, str], *, request_id: str = "") -> AuthenticationError:
    """Return the exception for a 401 answer; any body and any headers will do.

    Args:
        body: the decoded body; no more than 64 KiB of it is read.
        headers: of the response; names in any case.
        request_id: its X-Request-ID.
    """
    names = {name.lower(): value for name, value in headers.items()}
    found = _json_object(body[:65536])
    text = body[: 4 * _MAX_TEXT].decode("utf-8", "replace").strip()
    if found is not None:
        detail = printable(found.get("detail"), _MAX_TEXT)
    elif "html" in names.get("content-type", "") or text.startswith("<"):
        detail = "the answer is a web page: a proxy or login page, not the service itself"
    else:
        detail = printable(text, _MAX_TEXT)
    reason = _reason((found or {}).get("reason", names.get(AUTH_REASON_HEADER.lower())))
    hint = printable((found or {}).get("proxy_hint"), 4 * _MAX_TEXT)
    return AuthenticationError(reason, detail or "unauthorized", hint, request_id=request_id)


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _reason(value: object) -> AuthReason:
    try:
        return AuthReason(str(value))
    except ValueError:
        return AuthReason.UNAUTHORIZED
