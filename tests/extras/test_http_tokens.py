"""Sealed stream tokens: whatever is not exactly what was issued, to whom and for what, is a 400."""

from __future__ import annotations

import base64
import time
from typing import Any

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras.http_service import (
    KEY,
    NUMBERS,
    CountState,
    Read,
    SumState,
    call,
    extra,
    make_server,
    request,
    tampered,
    turn,
)

CUR, CALL = core.STATE_KEY, core.CALL_STATE_KEY
TOKENS = {"a": core.AuthContext("bearer", True, "alice"), "b": core.AuthContext("bearer", True, "bob")}


def make_client(**options: Any) -> Any:
    options = {"token_key": KEY, "authenticate": core.bearer_authenticate_static(tokens=TOKENS), **options}
    return core.make_sync_client(make_server(), **options)


def init(client: Any, method: str = "running_sum", who: str = "a") -> dict[bytes, bytes]:
    found = call(client, f"/Service/{method}/init", request(method), Authorization=f"Bearer {who}")
    return dict(found.tokens)


def exchange(client: Any, tokens: dict[bytes, bytes], path: str = "/Service/running_sum", who: str = "a") -> Read:
    return call(client, f"{path}/exchange", turn(tokens, 1), Authorization=f"Bearer {who}")


def refused(found: Read, text: str) -> None:
    assert (found.status, found.failed, found.error_code) == (400, False, "UNKNOWN")
    assert found.error.startswith("RuntimeError: ")
    assert text in found.error


@pytest.mark.parametrize("cached", [True, False])
def test_only_for_the_same_caller_method_and_protocol(cached: bool) -> None:
    client = make_client()
    tokens = init(client)
    other = client if cached else make_client()  # with a warm cache, and with none
    failed = "verification failed"
    refused(exchange(other, tokens, who="b"), failed)
    refused(exchange(other, tokens, "/Service/other_sum"), failed)
    refused(exchange(other, tokens, "/Second/running_sum"), failed)
    refused(exchange(make_client(token_key=b"another key of 16+"), tokens), failed)
    refused(exchange(other, {CUR: tokens[CALL], CALL: tokens[CUR]}), failed)
    assert exchange(other, tokens).numbers == [1]


def test_random_keys_differ(caplog: pytest.LogCaptureFixture) -> None:
    def app_client() -> Any:
        return extra("testing").TestClient(core.make_wsgi_app(make_server()))

    first = app_client()
    assert "no token_key" in caplog.text
    tokens = init(first)
    assert exchange(first, tokens).numbers == [1]
    refused(exchange(app_client(), tokens), "verification failed")


def test_every_part_counts() -> None:
    client = make_client(call_state_cache_entries=0)
    tokens = init(client)
    for key in (CUR, CALL):
        for at in {0, *range(1, len(base64.b64decode(tokens[key])), 5)}:
            found = exchange(client, {**tokens, key: tampered(tokens[key], at)})
            refused(found, "Malformed" if at == 0 else "verification failed")


@pytest.mark.parametrize(
    "token", [b"", b"AA==", b"!" * 40, b"A" * 41, b"\xff" * 40, base64.b64encode(b"\x01" * 29), b"A" * 9999]
)
def test_malformed(token: bytes) -> None:
    client = make_client(call_state_cache_entries=0)
    tokens = init(client)
    for key in (CUR, CALL):
        found = exchange(client, {**tokens, key: token})
        assert found.status == 400
        assert found.error.startswith(("RuntimeError: Malformed", "RuntimeError: State token verification failed"))


def test_pairs() -> None:
    cold, warm = make_client(call_state_cache_entries=0), make_client()
    one, two = init(cold), init(cold)
    refused(exchange(cold, {CUR: one[CUR], CALL: two[CALL]}), "do not belong together")
    refused(exchange(cold, {CUR: one[CUR]}), "Missing call token")
    refused(exchange(cold, {CALL: one[CALL]}), "Missing state token")
    refused(exchange(cold, {}), "Missing state token")
    assert exchange(warm, one).numbers == [1]
    assert exchange(warm, {CUR: one[CUR], CALL: two[CALL]}).numbers == [1]  # known already: not looked at


def test_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    client, forever = make_client(token_ttl=10), make_client(token_ttl=0)
    tokens, kept = init(client), init(forever)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 9)
    assert exchange(client, tokens).numbers == [1]
    monkeypatch.setattr(time, "time", lambda: now + 11)
    refused(exchange(client, tokens), "expired")
    monkeypatch.setattr(time, "time", lambda: now + 10**6)
    assert exchange(forever, kept).numbers == [1]


def test_the_cache_is_bounded() -> None:
    client = make_client(call_state_cache_entries=2)
    streams = [init(client) for _ in range(4)]
    for tokens in streams:  # the older two are opened from their own call tokens
        assert exchange(client, tokens).numbers == [1]
    refused(exchange(client, {CUR: streams[0][CUR]}), "Missing call token")
    assert exchange(client, {CUR: streams[3][CUR]}).numbers == [1]


def scope_of(tokens: Any, auth: Any, protocol: str = "P", method: str = "m") -> Any:
    return tokens.scope(auth, protocol, method, extra("tokens").StateTypes((SumState, CountState), ()))


def test_parts_of_the_binding_cannot_be_confused() -> None:
    tokens = extra("tokens").StreamTokens(KEY, 0, 0, 1 << 20)
    auths = [
        core.AuthContext("a", True, "bc"),
        core.AuthContext("ab", True, "c"),
        core.AuthContext("a\0b", True, "c"),
        core.AuthContext("a", True, "b\0c"),
        core.AuthContext("a", False, "bc"),
        core.AuthContext(None, True, "bc"),
        core.AuthContext("", True, "bc"),
        core.AuthContext("a", True, None),
        core.AuthContext("a", True, ""),
        core.AuthContext("a", True, "\udcff"),
    ]
    scopes = [scope_of(tokens, auth) for auth in auths]
    scopes += [scope_of(tokens, auths[0], "Pm", ""), scope_of(tokens, auths[0], "P", "n")]
    assert len({scope.binding for scope in scopes}) == len(scopes)


def test_states_of_any_size() -> None:
    tokens = extra("tokens").StreamTokens(KEY, 0, 0, 1 << 20)
    scope = scope_of(tokens, TOKENS["a"])
    for padding in (b"", b"x" * 5_000_000, bytes(range(256)) * 100):
        stream = core.Stream(NUMBERS, SumState(7, padding), NUMBERS)
        known = tokens.begin(scope, stream, "0" * 32, 99)
        sealed, size = tokens.seal_state(scope, known, stream.state)
        found, state, opened = tokens.open(scope, {**sealed, **tokens.seal_call(scope, known)})
        assert (state, opened, found) == (stream.state, size, known)
    import random

    noise = random.Random(1).randbytes(1 << 20)
    with pytest.raises(ValueError, match="max_metadata_entry_bytes"):
        tokens.seal_state(scope, known, SumState(0, noise))


def test_states_of_another_release() -> None:
    StateTypes = extra("tokens").StateTypes
    tokens = extra("tokens").StreamTokens(KEY, 0, 0, 1 << 20)
    stream = core.Stream(NUMBERS, CountState(0, 1))

    def sealed(states: tuple[type, ...]) -> Any:
        scope = tokens.scope(TOKENS["a"], "P", "m", StateTypes(states, ()))
        known = tokens.begin(scope, stream, "0" * 32, None)
        return {**tokens.seal_state(scope, known, stream.state)[0], **tokens.seal_call(scope, known)}

    reordered = tokens.scope(TOKENS["a"], "P", "m", StateTypes((SumState, CountState), ()))
    with pytest.raises(RuntimeError, match="verification failed"):
        tokens.open(reordered, sealed((CountState, SumState)))
    changed = tokens.scope(TOKENS["a"], "P", "m", StateTypes((CountState,), ()))._replace(types=StateTypes((), ()))
    with pytest.raises(RuntimeError, match="does not fit"):
        tokens.open(changed, sealed((CountState,)))
