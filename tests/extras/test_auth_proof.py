"""Proxy proof: minting, verifying, replay, rotation, and what a gate makes of it."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import threading
from typing import Any

import pytest

pytest.importorskip("falcon")

from hypothesis import given
from hypothesis import strategies as st

from tests.core import core
from tests.extras.auth_app import bearer, client, request
from vgi_rpc_extras.auth import (
    NonceCache,
    ProofError,
    ProxyProofConfig,
    bearer_authenticate_static,
    canonical_string,
    derive_secret,
    mint_proof,
    parse_secrets,
    proxy_headers_of,
    proxy_proof_gate,
    require_all,
    verify_proof,
)

KEY, OTHER = b"k" * 32, b"o" * 32
SECRETS = {"k1": (KEY, "edge"), "k2": (OTHER, "edge")}
NONCE = "A" * 22
NOW = 1_700_000_000


def check(token: str, *, now: int = NOW, cache: NonceCache | None = None, origin: str = "w1") -> dict[str, str]:
    return verify_proof(token, secrets=SECRETS, origin_id=origin, nonce_cache=cache, now=now)


def mint(*, now: int = NOW, kid: str = "k1", nonce: str | None = None, key: bytes = KEY) -> str:
    return mint_proof(key, kid, "w1", now=now, nonce=nonce)


def reason(token: str, **options: Any) -> str:
    with pytest.raises(ProofError) as caught:
        check(token, **options)
    assert token not in str(caught.value) or not token
    return str(caught.value.reason)


def test_canonical_bytes() -> None:
    assert canonical_string("k1", "17", NONCE, "w1") == b"vgi.proxy.proof.v1\0k1\x0017\0" + b"A" * 22 + b"\0w1"
    mac = hmac.new(KEY, b"vgi.proxy.proof.v1\0k1\x001700000000\0" + b"A" * 22 + b"\0w1", hashlib.sha256).digest()
    import base64

    assert mint(nonce=NONCE) == f"v1.k1.1700000000.{NONCE}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
    assert derive_secret(KEY, "p1", "w1") == hmac.new(KEY, b"vgi.proxy.proof.v1/p1\0w1", hashlib.sha256).digest()


def test_a_proof_that_holds() -> None:
    expected = {"verified": "true", "proxy": "edge", "kid": "k1", "origin_id": "w1", "reason": ""}
    assert check(mint()) == expected
    assert check(mint(kid="k2", key=OTHER))["kid"] == "k2"  # rotation: both keys, one label


def test_refusals_in_order() -> None:
    good = mint()
    assert reason("") == "malformed"
    assert reason(f"{good},{good}") == "malformed"
    assert reason(f"{good}\n") == "malformed"
    assert reason(good + "x" * 512) == "malformed"
    assert reason(good.replace("v1.", "v2.")) == "malformed"
    assert reason(good[:-1]) == "malformed"
    assert reason(good.replace(".k1.", ".k9.")) == "unknown_kid"
    assert reason(mint(now=NOW - 31)) == "expired"
    assert reason(mint(now=NOW + 31)) == "not_yet_valid"
    assert reason(mint(key=OTHER)) == "bad_mac"
    assert reason(good, origin="w2") == "bad_mac"
    assert check(mint(now=NOW - 30)) and check(mint(now=NOW + 30))


@given(st.text(max_size=80) | st.from_regex(r"v1\.k1\.[0-9]{1,21}\.[A-Za-z0-9_-]{21,23}\.[A-Za-z0-9_-]{42,44}"))
def test_nothing_else_verifies(token: str) -> None:
    with pytest.raises(ProofError):
        check(token)


@given(st.integers(0, 120), st.characters())
def test_any_change_breaks_it(index: int, char: str) -> None:
    token = mint(nonce=NONCE)
    changed = token[: index % len(token)] + char + token[index % len(token) + 1 :]
    if changed != token:
        with pytest.raises(ProofError):
            check(changed)


def test_a_proof_from_a_clock_ahead_cannot_be_used_twice() -> None:
    """The nonce outlives the proof: a cache of one skew would forget it at t+30, the proof holds until t+59."""
    clock = [0.0]
    cache = NonceCache(ttl_seconds=30, clock=lambda: clock[0])
    token = mint(now=NOW + 29)
    assert check(token, cache=cache)
    for after in (0, 29, 31, 45, 59):
        clock[0] = after
        assert reason(token, now=NOW + after, cache=cache) == "replayed"
    clock[0] = 60
    assert reason(token, now=NOW + 60, cache=cache) == "expired"


def test_only_verified_proofs_are_remembered() -> None:
    cache = NonceCache(ttl_seconds=30)
    for _ in range(10):
        with pytest.raises(ProofError, match="bad_mac"):
            check(mint(key=OTHER), cache=cache)
    assert len(cache) == 0


def test_cache_is_bounded_and_forgets() -> None:
    clock = [0.0]
    cache = NonceCache(ttl_seconds=10, capacity=3, clock=lambda: clock[0])
    assert [cache.check_and_add(nonce) for nonce in "abca"] == [True, True, True, False]
    assert cache.check_and_add("d") and len(cache) == 3
    assert cache.stats() == {"added": 4, "replayed": 1, "evicted": 1, "size": 3}
    clock[0] = 10.0
    assert cache.check_and_add("b") and len(cache) == 1


def test_one_of_many_threads_wins() -> None:
    cache, token, wins = NonceCache(ttl_seconds=61), mint(), []
    start = threading.Barrier(8)

    def use() -> None:
        start.wait()
        with contextlib.suppress(ProofError):
            wins.append(check(token, cache=cache))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1


def gate(mode: str, **options: Any) -> Any:
    return proxy_proof_gate(ProxyProofConfig(mode, "w1", SECRETS, **options), now=lambda: NOW)  # type: ignore[arg-type]


def test_require_mode_refuses_uniformly() -> None:
    static = bearer_authenticate_static(tokens={"t": core.AuthContext("key", True, "alice")})
    http = client(require_all(gate("require"), static))
    proof = {"VGI-Proxy-Proof": mint()}
    assert http.simulate_get("/x", headers={**bearer("t"), **proof}).json["principal"] == "alice"
    bad = [proof, {"VGI-Proxy-Proof": "x"}, {}, {"VGI-Proxy-Proof": mint(key=OTHER)}]
    answers = [http.simulate_get("/x", headers={**bearer("t"), **headers}) for headers in bad]
    assert {(a.status_code, a.text, a.headers["VGI-Auth-Reason"]) for a in answers} == {
        (401, answers[0].text, "proxy_required")
    }
    assert "VGI-Proxy-Proof" in answers[0].json["proxy_hint"]


def test_allow_mode_never_refuses_and_never_authenticates() -> None:
    authenticate = require_all(gate("allow"))
    for headers in ({}, {"VGI-Proxy-Proof": "junk"}, {"VGI-Proxy-Proof": mint(key=OTHER)}):
        auth = authenticate(request(headers))
        assert not auth.authenticated and auth.principal is None
        claims = auth.claims["vgi_proxy_proof"]
        assert claims["verified"] == "false" and claims["proxy"] == "" and claims["reason"]
    auth = authenticate(request({"VGI-Proxy-Proof": mint()}))
    assert (auth.authenticated, auth.principal) == (True, "edge")
    assert all(isinstance(value, str) for value in auth.claims["vgi_proxy_proof"].values())
    assert proxy_headers_of(gate("allow")) == () and proxy_headers_of(gate("require")) == ("VGI-Proxy-Proof",)


def test_replay_cache_can_be_off() -> None:
    authenticate = require_all(gate("require", enable_replay_cache=False))
    token = mint()
    assert [authenticate(request({"VGI-Proxy-Proof": token})).principal for _ in range(2)] == ["edge", "edge"]


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="install no gate"):
        proxy_proof_gate(ProxyProofConfig())
    bad: list[dict[str, Any]] = [
        {"mode": "maybe"},
        {"origin_id": ""},
        {"origin_id": "w1\n"},
        {"secrets": {}},
        {"secrets": {"k": (b"short", "x")}},
        {"secrets": {"k\n": (KEY, "x")}},
        {"secrets": {"k": (KEY, "")}},
        {"skew_seconds": 0},
    ]
    for change in bad:
        with pytest.raises(ValueError):
            ProxyProofConfig(**{"mode": "allow", "origin_id": "w1", "secrets": SECRETS, **change})
    for raw in (
        "",
        "k1",
        "k1:zz",
        "k1:" + "a" * 63,
        f"k1:{'a' * 64},",
        f"k1:{'a' * 64},k1:{'b' * 64}",
        f"k1:{'a' * 64}\n",
    ):
        with pytest.raises(ValueError) as caught:
            parse_secrets(raw)
        assert "aaa" not in str(caught.value)
    assert parse_secrets(f"k1:{'ab' * 32},k2:{'CD' * 32}") == {"k1": (b"\xab" * 32, "k1"), "k2": (b"\xcd" * 32, "k2")}


def test_secrets_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = ProxyProofConfig("require", "w1", SECRETS)
    token = mint(key=OTHER)
    client(require_all(proxy_proof_gate(config))).simulate_get("/x", headers={"VGI-Proxy-Proof": token})
    assert "kkkk" not in repr(config) and token not in caplog.text
