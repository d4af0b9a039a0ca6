# Needs: the standard library only (Falcon's request is passed in). Seam: `authenticate=` of the HTTP server.
"""Bearer tokens, and how authenticators are combined (auth.md section 2).

    authenticate = chain_authenticate(
        bearer_authenticate_static(tokens={os.environ["API_KEY"]: AuthContext("key", True, "batch")}),
        jwt_authenticate(issuer="https://login.example.com", audience="calc"),
    )

A gate (`PreconditionGate`) proves something about the way a request came, not who sent it. Put it outermost,
`require_all(gate, chain_authenticate(...))`: inside a chain it would be an alternative to a credential.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from .. import core as _bound_core
from .unauthorized import (
    AuthFailure,
    AuthReason,
    classify_auth_failure,
    declare_key_headers,
    declare_proxy_headers,
    key_headers_of,
    merge_proxy_headers,
)

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "Authenticate",
    "PreconditionGate",
    "bearer_authenticate",
    "bearer_authenticate_static",
    "chain_authenticate",
    "make_cookie_authenticate",
    "require_all",
]

Authenticate = Callable[["falcon.Request"], "core.AuthContext"]
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def bearer_authenticate(*, validate: Callable[[str], core.AuthContext]) -> Authenticate:
    """Return an authenticator that gives the token of `Authorization: Bearer` to `validate`.

    `validate` raises ValueError (or AuthFailure, with a reason) to reject it.
    """

    def authenticate(req: falcon.Request) -> core.AuthContext:
        return validate(_bearer_token(req))

    return declare_key_headers(authenticate, "Authorization")


def _bearer_token(req: falcon.Request) -> str:
    header = req.get_header("Authorization")
    if header is None:
        raise AuthFailure(AuthReason.MISSING_CREDENTIAL)
    if header[:7].lower() != "bearer ":  # the scheme is case-insensitive: RFC 9110 section 11.1
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL)
    return header[7:]


def bearer_authenticate_static(*, tokens: Mapping[str, core.AuthContext]) -> Authenticate:
    """Return an authenticator for a fixed set of tokens.

    How long it takes depends neither on the tokens nor on which one matches: digests of equal length are compared,
    always all of them. Raises ValueError for an empty token.
    """
    if "" in tokens:
        raise ValueError("an empty bearer token would let everybody in: remove it")
    known = [(hashlib.sha256(token.encode()).digest(), auth) for token, auth in tokens.items()]

    def validate(token: str) -> core.AuthContext:
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        found = None
        for expected, auth in known:
            if hmac.compare_digest(digest, expected):
                found = auth
        if found is None:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL)
        return found

    return bearer_authenticate(validate=validate)


def chain_authenticate(*authenticators: Authenticate) -> Authenticate:
    """Return an authenticator that tries several in order and takes the first that accepts.

    Only ValueError leads to the next one. When all refuse, the reason is that of the first that saw a credential.
    Raises ValueError without members, TypeError for a PreconditionGate (it would let in whoever passes it).
    """
    if not authenticators:
        raise ValueError("chain_authenticate needs at least one authenticator")
    if any(isinstance(member, PreconditionGate) for member in authenticators):
        raise TypeError("a PreconditionGate is no alternative to a credential: use require_all(gate, chain)")

    def authenticate(req: falcon.Request) -> core.AuthContext:
        reasons: list[AuthReason] = []
        for member in authenticators:
            try:
                return member(req)
            except ValueError as exc:
                reasons.append(classify_auth_failure(exc))
        missing = AuthReason.MISSING_CREDENTIAL
        raise AuthFailure(next((reason for reason in reasons if reason is not missing), missing))

    declare_key_headers(authenticate, *key_headers_of(*authenticators))
    return declare_proxy_headers(authenticate, *merge_proxy_headers(*authenticators))


class PreconditionGate:
    """Proves something about how a request came; on its own it names nobody.

    Args:
        fn: returns claims (str to str) or raises PermissionError.
        name: of the gate; the domain of contexts that it makes alone.
        claims_key: where its claims go among those of the caller.
        proxy_headers: that a proxy must set.
    """

    def __init__(
        self,
        fn: Callable[[falcon.Request], Mapping[str, str]],
        *,
        name: str,
        claims_key: str,
        proxy_headers: Sequence[str] = (),
    ) -> None:
        self._fn = fn
        self.name = name
        self.claims_key = claims_key
        declare_proxy_headers(self, *proxy_headers)

    def __call__(self, req: falcon.Request) -> Mapping[str, str]:
        return self._fn(req)


def require_all(gate: PreconditionGate, inner: Authenticate | None = None) -> Authenticate:
    """Return an authenticator that asks the gate first and then `inner`, whose context gains the gate's claims.

    Without `inner` the gate's claim "proxy" becomes the principal. A gate that let a request pass unproven (claim
    "verified" other than "true") or names no proxy makes an anonymous context: it never authenticates anybody.
    Raises TypeError unless `gate` is a PreconditionGate.
    """
    if not isinstance(gate, PreconditionGate):
        raise TypeError(f"require_all needs a PreconditionGate first, got {type(gate).__name__}")
    if isinstance(inner, PreconditionGate):
        raise TypeError("require_all needs an authenticator second, not another gate")

    def authenticate(req: falcon.Request) -> core.AuthContext:
        claims = dict(gate(req))
        auth = _gate_context(gate, claims) if inner is None else inner(req)
        merged = {**auth.claims, gate.claims_key: claims}
        return core.AuthContext(auth.domain, auth.authenticated, auth.principal, merged)

    declare_key_headers(authenticate, *key_headers_of(inner))
    return declare_proxy_headers(authenticate, *merge_proxy_headers(gate, inner))


def _gate_context(gate: PreconditionGate, claims: Mapping[str, str]) -> core.AuthContext:
    proxy = claims.get("proxy", "")
    if claims.get("verified", "true") != "true" or not proxy:
        return core.AuthContext.anonymous()
    return core.AuthContext(gate.name, True, proxy)


def make_cookie_authenticate(inner: Authenticate, cookie_name: str = "_vgi_auth") -> Authenticate:
    """Return an authenticator that shows the cookie to `inner` as `Authorization: Bearer`.

    Browsers send cookies along with requests that other sites make: a request that may change something is refused
    when the browser says that it comes from another site (Sec-Fetch-Site, else Origin).
    """

    def authenticate(req: falcon.Request) -> core.AuthContext:
        values = req.get_cookie_values(cookie_name)
        if not values:
            raise AuthFailure(AuthReason.MISSING_CREDENTIAL)
        if len(values) > 1 or (req.method not in _SAFE_METHODS and _is_foreign(req)):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL)
        return inner(_with_bearer(req, values[0]))

    return declare_proxy_headers(authenticate, *merge_proxy_headers(inner))


def _is_foreign(req: falcon.Request) -> bool:
    site = req.get_header("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = req.get_header("Origin")
    return origin is not None and urlsplit(origin).netloc.lower() != (req.get_header("Host") or "").lower()


def _with_bearer(req: falcon.Request, token: str) -> falcon.Request:
    """A twin of the request with another Authorization header: nothing to restore, no stale header cache."""
    twin = type(req)({**req.env, "HTTP_AUTHORIZATION": f"Bearer {token}"}, options=req.options)
    twin.context = req.context
    return twin
