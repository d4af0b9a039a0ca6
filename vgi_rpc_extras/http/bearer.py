# Needs: falcon (the request it is given). Seam: the authenticate callback of make_wsgi_app.
"""Static bearer tokens, and how an authenticator says no (auth.md sections 1, 2 and 5)."""

from __future__ import annotations

import enum
import hashlib
import hmac
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core

__all__ = ["AuthFailure", "AuthReason", "bearer_authenticate_static", "bearer_token", "classify"]


class AuthReason(enum.StrEnum):
    """Why a request was not let in; the closed set that travels."""

    MISSING_CREDENTIAL = "missing_credential"
    INVALID_CREDENTIAL = "invalid_credential"
    EXPIRED_CREDENTIAL = "expired_credential"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    PROXY_REQUIRED = "proxy_required"
    UNAUTHORIZED = "unauthorized"


class AuthFailure(ValueError):
    """A credential is missing or bad; a chain of authenticators asks the next one."""

    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.vgi_auth_reason = reason


def classify(exc: BaseException) -> AuthReason:
    """The reason that a refusal declares, else one by its class; never by its text."""
    declared = getattr(exc, "vgi_auth_reason", None)
    if isinstance(declared, AuthReason):
        return declared
    return AuthReason.INSUFFICIENT_SCOPE if isinstance(exc, PermissionError) else AuthReason.UNAUTHORIZED


def bearer_token(request: falcon.Request) -> str:
    """The token of `Authorization: Bearer ...`, the scheme in any case (RFC 9110); AuthFailure without one."""
    value = request.get_header("Authorization")
    if not value:
        raise AuthFailure(AuthReason.MISSING_CREDENTIAL)
    if value[:7].lower() != "bearer " or len(value) == 7:
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL)
    return value[7:]


def bearer_authenticate_static(
    *, tokens: Mapping[str, core.AuthContext]
) -> Callable[[falcon.Request], core.AuthContext]:
    """Let in who presents one of `tokens`. Every one is compared, by digest: time tells neither length nor place."""
    known = [(hashlib.sha256(token.encode()).digest(), auth) for token, auth in tokens.items()]

    def authenticate(request: falcon.Request) -> core.AuthContext:
        digest = hashlib.sha256(bearer_token(request).encode("utf-8", "surrogatepass")).digest()
        found = None
        for expected, auth in known:
            if hmac.compare_digest(expected, digest):
                found = auth
        if found is None:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL)
        return found

    return authenticate
