# Needs: the standard library only. Seam: a PreconditionGate for `require_all`.
"""Proof that a request came through a known proxy (auth.md section 10).

    secrets = parse_secrets(os.environ["VGI_PROXY_PROOF_SECRETS"])
    gate = proxy_proof_gate(ProxyProofConfig("require", "worker-1", secrets))
    authenticate = require_all(gate, jwt_authenticate(...))

The header `VGI-Proxy-Proof: v1.<kid>.<ts>.<nonce>.<mac>` proves the hop, not the user, and is bound neither to method
nor to body. A proof can be used once per process: with N worker processes, up to N times within its lifetime.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets as _secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..common.names import PROOF_HEADER
from ..common.texts import base64url
from .bearer import PreconditionGate
from .unauthorized import AuthReason

if TYPE_CHECKING:
    import falcon

__all__ = [
    "NonceCache",
    "ProofError",
    "ProxyProofConfig",
    "canonical_string",
    "derive_secret",
    "mint_proof",
    "parse_secrets",
    "proxy_proof_gate",
    "verify_proof",
]

Mode = Literal["off", "allow", "require"]
Secrets = Mapping[str, tuple[bytes, str]]
_LABEL = b"vgi.proxy.proof.v1"
_MAX_TOKEN = 512
# fullmatch throughout: `$` would accept a trailing newline.
_KID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TS = re.compile(r"[0-9]{1,20}")
_NONCE = re.compile(r"[A-Za-z0-9_-]{22}")
_MAC = re.compile(r"[A-Za-z0-9_-]{43}")
_ORIGIN = re.compile(r"[A-Za-z0-9._:/-]{1,255}")


class ProofError(PermissionError):
    """A proof does not hold. `reason` is for the log; callers see `proxy_required`, whatever the cause.

    Reasons: no_proof malformed unknown_kid expired not_yet_valid bad_mac replayed.
    """

    vgi_auth_reason = AuthReason.PROXY_REQUIRED

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"proxy proof refused: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class NonceCache:
    """Remembers nonces until they cannot verify any more; bounded, safe to share between threads.

    When more than `capacity` are alive the oldest is forgotten and counted in `stats()["evicted"]`: a proof could then
    be used again, so an eviction is a reason to raise the capacity.
    """

    def __init__(
        self, *, ttl_seconds: float, capacity: int = 100_000, clock: Callable[[], float] | None = None
    ) -> None:
        if ttl_seconds <= 0 or capacity < 1:
            raise ValueError("ttl_seconds and capacity must be positive")
        self._ttl = ttl_seconds
        self._capacity = capacity
        self._clock = clock or time.monotonic
        self._expiry: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()
        self._counts = {"added": 0, "replayed": 0, "evicted": 0}

    def check_and_add(self, nonce: str, *, ttl_seconds: float | None = None) -> bool:
        """Return True and remember a new nonce (for `ttl_seconds`, else the cache's); False when it was seen."""
        now = self._clock()
        with self._lock:
            self._purge(now)
            if self._expiry.get(nonce, now) > now:
                self._counts["replayed"] += 1
                return False
            self._expiry.pop(nonce, None)
            if len(self._expiry) >= self._capacity:
                self._expiry.popitem(last=False)
                self._counts["evicted"] += 1
            self._expiry[nonce] = now + (self._ttl if ttl_seconds is None else ttl_seconds)
            self._counts["added"] += 1
            return True

    def _purge(self, now: float) -> None:
        """Drop expired entries from the old end: what lives longer shields younger ones for at most one lifetime."""
        while self._expiry:
            nonce, expiry = next(iter(self._expiry.items()))
            if expiry > now:
                return
            del self._expiry[nonce]

    def stats(self) -> dict[str, int]:
        """Return the counters added, replayed and evicted, and the present size."""
        with self._lock:
            return {**self._counts, "size": len(self._expiry)}

    def __len__(self) -> int:
        return len(self._expiry)


@dataclass(frozen=True)
class ProxyProofConfig:
    """How a worker checks proofs.

    Attributes:
        mode: "off", "allow" (never refuses, records whether the proof held) or "require".
        origin_id: this worker's name, agreed with the proxy and never transmitted.
        secrets: key id to (32 bytes, label of the proxy); several at once during a rotation.
        skew_seconds: how far clocks may differ, both ways.
        replay_capacity: nonces remembered at once.
        enable_replay_cache: False accepts a proof any number of times within its lifetime.

    Raises ValueError when "allow" or "require" lack a valid origin or secrets.
    """

    mode: Mode = "off"
    origin_id: str = ""
    secrets: Secrets = field(default_factory=dict, repr=False)
    skew_seconds: int = 30
    replay_capacity: int = 100_000
    enable_replay_cache: bool = True

    def __post_init__(self) -> None:
        if self.mode not in ("off", "allow", "require"):
            raise ValueError(f"mode must be off, allow or require, got {self.mode!r}")
        if self.skew_seconds < 1 or self.replay_capacity < 1:
            raise ValueError("skew_seconds and replay_capacity must be at least 1")
        if self.mode == "off":
            return
        _check_origin(self.origin_id)
        if not self.secrets:
            raise ValueError(f"proxy proof mode {self.mode} needs at least one secret")
        for kid, (secret, label) in self.secrets.items():
            _check_kid(kid)
            _check_secret(secret)
            if not label:
                raise ValueError(f"the secret of key id {kid} has no label")


def _check_kid(kid: str) -> None:
    if not _KID.fullmatch(kid):
        raise ValueError("a key id is 1 to 64 characters of A-Z a-z 0-9 _ -")


def _check_origin(origin_id: str) -> None:
    if not _ORIGIN.fullmatch(origin_id):
        raise ValueError("origin_id is 1 to 255 characters of A-Z a-z 0-9 . _ : / -")


def _check_secret(secret: bytes) -> None:
    if len(secret) != 32:
        raise ValueError("a proxy proof secret is exactly 32 bytes")


def parse_secrets(raw: str) -> dict[str, tuple[bytes, str]]:
    """Parse "kid:hex64,kid:hex64"; the key id is the label too. ValueError for anything else, without quoting it."""
    found: dict[str, tuple[bytes, str]] = {}
    for number, entry in enumerate(raw.split(","), 1):
        kid, _, text = entry.partition(":")
        if not _KID.fullmatch(kid) or not re.fullmatch(r"[0-9a-fA-F]{64}", text) or kid in found:
            raise ValueError(f"entry {number} of the proxy proof secrets is not a new kid:64-hex-digits pair")
        found[kid] = (bytes.fromhex(text), kid)
    return found


def derive_secret(base_key: bytes, proxy_id: str, origin_id: str) -> bytes:
    """Return the 32-byte secret between one proxy and one worker; workers need not hold the base key."""
    _check_secret(base_key)
    _check_kid(proxy_id)
    _check_origin(origin_id)
    message = _LABEL + b"/" + proxy_id.encode() + b"\0" + origin_id.encode()
    return hmac.digest(base_key, message, hashlib.sha256)


def canonical_string(kid: str, ts: str, nonce: str, origin_id: str) -> bytes:
    """Return the bytes that the MAC covers: the label and four fields, separated by NUL, which none can contain."""
    return b"\0".join([_LABEL, kid.encode(), ts.encode(), nonce.encode(), origin_id.encode()])


def _mac(secret: bytes, kid: str, ts: str, nonce: str, origin_id: str) -> str:
    return base64url(hmac.digest(secret, canonical_string(kid, ts, nonce, origin_id), hashlib.sha256))


def mint_proof(secret: bytes, kid: str, origin_id: str, *, now: int | None = None, nonce: str | None = None) -> str:
    """Return a header value for one request; `now` is in unix seconds. ValueError for ill-formed parts."""
    _check_secret(secret)
    _check_kid(kid)
    _check_origin(origin_id)
    ts = str(int(time.time()) if now is None else now)
    nonce = base64url(_secrets.token_bytes(16)) if nonce is None else nonce
    if not _NONCE.fullmatch(nonce) or not _TS.fullmatch(ts):
        raise ValueError("nonce is 22 characters of base64url, now an unsigned number of seconds")
    return f"v1.{kid}.{ts}.{nonce}.{_mac(secret, kid, ts, nonce, origin_id)}"


def verify_proof(
    token: str,
    *,
    secrets: Secrets,
    origin_id: str,
    skew_seconds: int = 30,
    nonce_cache: NonceCache | None = None,
    now: int | None = None,
) -> dict[str, str]:
    """Return the claims of a proof that holds; ProofError otherwise.

    The label of the proxy is looked up only after its MAC has been verified, and only then is the nonce remembered:
    strangers can neither name a proxy nor fill the cache.
    """
    kid, ts, nonce, mac = _split(token)
    if kid not in secrets:
        raise ProofError("unknown_kid")
    current = int(time.time()) if now is None else now
    if current - int(ts) > skew_seconds:
        raise ProofError("expired")
    if int(ts) - current > skew_seconds:
        raise ProofError("not_yet_valid")
    if not hmac.compare_digest(mac, _mac(secrets[kid][0], kid, ts, nonce, origin_id)):
        raise ProofError("bad_mac")
    # A proof dated ahead verifies until ts + skew, up to twice the skew from now: remember it that long.
    lifetime = int(ts) + skew_seconds - current + 1
    if nonce_cache is not None and not nonce_cache.check_and_add(f"{kid}.{nonce}", ttl_seconds=lifetime):
        raise ProofError("replayed")
    return {"verified": "true", "proxy": secrets[kid][1], "kid": kid, "origin_id": origin_id, "reason": ""}


def _split(token: str) -> tuple[str, str, str, str]:
    """The four fields after the version; several headers, joined by commas, have more."""
    if not token or len(token) > _MAX_TOKEN:
        raise ProofError("malformed")
    fields = token.split(".")
    if len(fields) != 5 or fields[0] != "v1":
        raise ProofError("malformed")
    _, kid, ts, nonce, mac = fields
    if not (_KID.fullmatch(kid) and _TS.fullmatch(ts) and _NONCE.fullmatch(nonce) and _MAC.fullmatch(mac)):
        raise ProofError("malformed")
    return kid, ts, nonce, mac


def proxy_proof_gate(config: ProxyProofConfig, *, now: Callable[[], int] | None = None) -> PreconditionGate:
    """Return the gate of a worker; its claims appear under "vgi_proxy_proof". ValueError in mode "off".

    In mode "allow" every request passes, and `verified` in the claims says whether its proof held.
    """
    if config.mode == "off":
        raise ValueError("proxy proof is off: install no gate")
    cache = None
    if config.enable_replay_cache:
        cache = NonceCache(ttl_seconds=2 * config.skew_seconds + 1, capacity=config.replay_capacity)

    def prove(req: falcon.Request) -> Mapping[str, str]:
        try:
            return _prove(req.get_header(PROOF_HEADER), config, cache, now() if now else None)
        except ProofError as exc:
            if config.mode == "require":
                raise
            unproven = {"verified": "false", "proxy": "", "kid": "", "origin_id": config.origin_id}
            return {**unproven, "reason": exc.reason}

    names = (PROOF_HEADER,) if config.mode == "require" else ()
    return PreconditionGate(prove, name="proxy_proof", claims_key="vgi_proxy_proof", proxy_headers=names)


def _prove(value: str | None, config: ProxyProofConfig, cache: NonceCache | None, now: int | None) -> dict[str, str]:
    if value is None:
        raise ProofError("no_proof")
    return verify_proof(
        value,
        secrets=config.secrets,
        origin_id=config.origin_id,
        skew_seconds=config.skew_seconds,
        nonce_cache=cache,
        now=now,
    )
