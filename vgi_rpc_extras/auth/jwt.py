# Needs: joserfc, httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: `authenticate=` of the HTTP server.
"""JSON Web Tokens of an OpenID provider (auth.md section 3).

    authenticate = jwt_authenticate(issuer="https://login.example.com", audience="calc")

What a token says about its own verification (alg beyond the allow-list, jku, x5u, jwk) is not followed: the key comes
from the provider's key set, the algorithm from the allow-list, and both must fit each other. A provider that cannot
be reached means 503: a fleet must not be logged out by an outage.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import httpx
from joserfc import errors as jose_errors
from joserfc import jws
from joserfc.jwk import ECKey, JWKRegistry, Key, OctKey, OKPKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry

from .. import core as _bound_core
from ..common.texts import from_base64url
from ..common.urls import check_url
from .bearer import Authenticate, bearer_authenticate
from .provider import FetchError, bounded_client, get_json, read_provider
from .unauthorized import AuthFailure, AuthReason

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["DEFAULT_ALGORITHMS", "jwt_authenticate"]

# RFC 9864 calls EdDSA on that curve Ed25519; providers still send the older name.
DEFAULT_ALGORITHMS: Final[tuple[str, ...]] = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
_CURVES: Final = {"ES256": "P-256", "ES384": "P-384", "ES512": "P-521"}
_MIN_RSA_BITS = 2048  # RFC 7518 section 3.3
_MAX_KEYS = 512
_REFRESH_SECONDS = 30.0  # an unknown kid asks the provider at most this often (auth.md: 30 to 60 s)
_RETRY_SECONDS = 5.0  # after a failure; the Retry-After of the 503
_MAX_AGE_SECONDS = 600.0  # so that a withdrawn key stops being accepted
_WAIT_SECONDS = 15.0  # for another thread's refresh: discovery and key set, 5 s each, and some
_SEGMENTS: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")


def jwt_authenticate(
    *,
    issuer: str | tuple[str, ...],
    audience: str | tuple[str, ...],
    jwks_uri: str | Mapping[str, str] | None = None,
    claims_options: Mapping[str, Any] | None = None,
    principal_claim: str = "sub",
    domain: str = "jwt",
    algorithms: Sequence[str] = DEFAULT_ALGORITHMS,
    leeway: int = 60,
    max_token_bytes: int = 8192,
    transport: httpx.BaseTransport | None = None,
) -> Authenticate:
    """Return an authenticator for bearer tokens signed by an OpenID provider.

    Args:
        issuer, audience: one or several; a token must name one of each.
        jwks_uri: where the keys are, of several issuers as {issuer: URL}; found through the issuer's
            openid-configuration when absent. Every issuer signs with its own keys only.
        claims_options: further demands, as joserfc's JWTClaimsRegistry takes them: {"scope": {"essential": True}}.
        principal_claim: the claim that names the caller; a token without it is refused.
        domain: of the contexts.
        algorithms: allowed ones, out of DEFAULT_ALGORITHMS.
        leeway: seconds that clocks may differ.
        max_token_bytes: longer tokens are refused unread.
        transport: for calls to the provider, when they need a proxy or a private CA.

    Raises ValueError for an empty issuer or audience, a URL that is not https, or an algorithm that is not asymmetric.
    """
    verifier = JwtVerifier(
        issuer=issuer,
        audience=audience,
        jwks_uri=jwks_uri,
        claims_options=claims_options,
        algorithms=algorithms,
        leeway=leeway,
        max_token_bytes=max_token_bytes,
        transport=transport,
    )

    def validate(token: str) -> core.AuthContext:
        claims = verifier.verify(token)
        principal = claims.get(principal_claim)
        if isinstance(principal, bool) or not isinstance(principal, str | int) or not str(principal).strip():
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, f"no {principal_claim} claim to name the caller")
        return core.AuthContext(domain, True, str(principal), claims)

    return bearer_authenticate(validate=validate)


class JwtVerifier:
    """Verifies tokens of one provider; see `jwt_authenticate` for the arguments. Safe to share between threads."""

    def __init__(
        self,
        *,
        issuer: str | tuple[str, ...],
        audience: str | tuple[str, ...],
        jwks_uri: str | Mapping[str, str] | None = None,
        claims_options: Mapping[str, Any] | None = None,
        algorithms: Sequence[str] = DEFAULT_ALGORITHMS,
        leeway: int = 60,
        max_token_bytes: int = 8192,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        issuers, audiences = _several("issuer", issuer), _several("audience", audience)
        if leeway < 0:
            raise ValueError(f"leeway must not be negative, got {leeway}")
        self._registry = _Algorithms(algorithms)
        options: dict[str, Any] = {
            **(claims_options or {}),
            "iss": {"essential": True, "values": issuers},
            "aud": {"essential": True, "values": audiences},
            "exp": {"essential": True},
        }
        self._claims = JWTClaimsRegistry(leeway=leeway, **options)
        self._max_bytes = max_token_bytes
        places = _key_sets(issuers, jwks_uri)
        self._keys = {one: _KeyStore(one, places.get(one), transport) for one in issuers}

    def verify(self, token: str) -> dict[str, Any]:
        """Return the claims of a good token; AuthFailure for another one, AuthUnavailableError without keys."""
        header = self._header(token)
        key = self._store(token).find(header.get("kid"), header["alg"])
        if key is None:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "no key of the provider fits the token")
        try:
            payload = jws.deserialize_compact(token, key, registry=self._registry).payload
            claims = json.loads(payload)
            if not isinstance(claims, dict):
                raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the claims are not an object")
            _check_times(claims)
            self._claims.validate(claims)
        except jose_errors.ExpiredTokenError:
            raise AuthFailure(AuthReason.EXPIRED_CREDENTIAL, "the token has expired") from None
        except AuthFailure:
            raise
        except Exception as exc:  # joserfc and json raise many kinds on hostile input; none may become a 500
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, type(exc).__name__) from None
        return claims

    def _store(self, token: str) -> _KeyStore:
        """The keys of the issuer that the token names: those of another one must not sign for it."""
        if len(self._keys) == 1:
            return next(iter(self._keys.values()))
        try:
            found = json.loads(from_base64url(token.split(".")[1]))
            return self._keys[found["iss"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "another issuer") from None

    def _header(self, token: str) -> dict[str, Any]:
        """The parsed header: whatever is wrong with it must not make us ask the provider."""
        if len(token) > self._max_bytes or not _SEGMENTS.fullmatch(token):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "not a signed token")
        try:
            header = json.loads(from_base64url(token.partition(".")[0]))
        except (ValueError, RecursionError):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the header is not JSON") from None
        if not isinstance(header, dict) or "crit" in header:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "a header that asks for extensions, or none")
        if not isinstance(header.get("alg"), str) or not isinstance(header.get("kid", ""), str):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the header has fields of a wrong type")
        if header["alg"] not in self._registry.names:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "algorithm not allowed")
        return header


def _check_times(claims: Mapping[str, Any]) -> None:
    """Times are finite numbers (RFC 7519 section 2): joserfc 1.7 lets an end of NaN pass, which is none."""
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, f"{name} is not a time")


def _several(name: str, value: str | tuple[str, ...]) -> list[str]:
    values = [value] if isinstance(value, str) else list(value)
    if not values or not all(isinstance(one, str) and one for one in values):
        raise ValueError(f"{name} must not be empty")
    return values


def _key_sets(issuers: list[str], jwks_uri: str | Mapping[str, str] | None) -> Mapping[str, str]:
    """Where the keys of each issuer are, as far as that is configured."""
    if jwks_uri is None:
        return {}
    if isinstance(jwks_uri, str):
        if len(issuers) > 1:
            raise ValueError(
                "several issuers, and one jwks_uri: each could sign for the others; give {issuer: jwks_uri}"
            )
        return {issuers[0]: jwks_uri}
    if strangers := set(jwks_uri).difference(issuers):
        raise ValueError(f"jwks_uri names {min(strangers)!r}, which is none of the issuers")
    return jwks_uri


class _Algorithms(jws.JWSRegistry):
    """An allow-list; without joserfc's warning about EdDSA's name, and with room for a certificate thumbprint."""

    max_header_length = 4096

    def __init__(self, algorithms: Iterable[str]) -> None:
        self.names = frozenset(algorithms)
        bad = sorted(self.names.difference(DEFAULT_ALGORITHMS))
        if bad or not self.names:
            raise ValueError(f"algorithms must be some of {' '.join(DEFAULT_ALGORITHMS)}; not allowed: {bad}")
        super().__init__(algorithms=sorted(self.names), strict_check_header=False)

    def get_alg(self, name: str) -> Any:
        if name not in self.names:
            raise jose_errors.UnsupportedAlgorithmError("algorithm not allowed")
        return self.algorithms[name]


class _KeyStore:
    """The provider's keys: fetched when first needed, renewed in time, never more often than the limits above."""

    def __init__(self, issuer: str, jwks_uri: str | None, transport: httpx.BaseTransport | None) -> None:
        check_url(issuer) if jwks_uri is None else check_url(jwks_uri)
        self._issuer = issuer
        self._jwks_uri = jwks_uri
        self._transport = transport
        self._clock: Callable[[], float] = time.monotonic
        self._lock = threading.Lock()
        self._keys: list[Key] | None = None
        self._fetched = 0.0
        self._not_before = 0.0
        self._failed = False

    def find(self, kid: str | None, alg: str) -> Key | None:
        """Return the key of that id which fits the algorithm; without an id, the only one that fits.

        Raises AuthUnavailableError when the provider has to be asked and cannot be.
        """
        keys = self._keys
        if keys is None or self._clock() - self._fetched > _MAX_AGE_SECONDS:
            keys = self._refresh(keys, wait=keys is None)
        found = _select(keys, kid, alg)
        if found is None and kid is not None:
            keys = self._refresh(keys)
            found = _select(keys, kid, alg)
            if found is None and self._failed:
                raise core.AuthUnavailableError("the provider's keys cannot be renewed")  # the key may be a new one
        return found

    def _refresh(self, seen: list[Key] | None, *, wait: bool = True) -> list[Key]:
        """Ask the provider, unless another thread just did or the limits forbid it; then what is there must do."""
        if self._keys is not None and self._clock() < self._not_before:
            return self._keys
        if not self._lock.acquire(timeout=_WAIT_SECONDS if wait else 0):
            if seen is None or wait:
                raise core.AuthUnavailableError("the provider's keys are being fetched")
            return seen
        try:
            if self._keys is seen and self._clock() >= self._not_before:
                self._fetch()
            if self._keys is None:
                raise core.AuthUnavailableError("the provider's keys cannot be fetched")
            return self._keys
        finally:
            self._lock.release()

    def _fetch(self) -> None:
        try:
            with bounded_client(self._transport) as client:
                self._keys = _usable_keys(get_json(client, self._discover(client)))
        except (FetchError, ValueError):
            self._failed = True
            self._not_before = self._clock() + _RETRY_SECONDS
        else:
            self._failed = False
            self._fetched = self._clock()
            self._not_before = self._fetched + _REFRESH_SECONDS

    def _discover(self, client: httpx.Client) -> str:
        if self._jwks_uri is not None:
            return self._jwks_uri
        return str(read_provider(client, self._issuer, "jwks_uri")["jwks_uri"])


def _usable_keys(document: Mapping[str, Any]) -> list[Key]:
    """The public signature keys of a JWKS document; entries that are something else are skipped."""
    entries = document.get("keys")
    if not isinstance(entries, list) or len(entries) > _MAX_KEYS:
        raise FetchError(f"the key set has no list of at most {_MAX_KEYS} keys")
    return [key for entry in entries if (key := _usable_key(entry)) is not None]


def _usable_key(entry: Any) -> Key | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or entry.get("kty") not in ("RSA", "EC", "OKP"):
        return None
    if "verify" not in entry.get("key_ops", ["verify"]) or not isinstance(entry.get("kid", ""), str):
        return None
    try:
        key = JWKRegistry.import_key(entry)
        if isinstance(key, OctKey):
            return None
        small = isinstance(key, RSAKey) and key.public_key.key_size < _MIN_RSA_BITS
    except Exception:  # one broken entry must not take the other keys away
        return None
    return None if small else key


def _select(keys: Iterable[Key], kid: str | None, alg: str) -> Key | None:
    found = [key for key in keys if (kid is None or key.kid == kid) and _fits(key, alg)]
    return found[0] if len(found) == 1 or (found and kid is not None) else None


def _fits(key: Key, alg: str) -> bool:
    if key.get("alg") not in (None, alg):
        return False
    if alg in _CURVES:
        return isinstance(key, ECKey) and key.curve_name == _CURVES[alg]
    if alg in ("EdDSA", "Ed25519"):
        return isinstance(key, OKPKey) and key.curve_name == "Ed25519"
    return isinstance(key, RSAKey)
