"""Sealed stream tokens: whatever is not exactly what was issued, to whom and for what, is a 400."""

from __future__ import annotations

import base64
import dataclasses
import sys
import time
from typing import Any

import pyarrow as pa
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


@dataclasses.dataclass
class Text(core.ArrowSerializableDataclass):
    text: str


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


# ---- what one process keeps of the streams of others


def test_the_cache_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = extra("tokens")
    monkeypatch.setattr(module, "_CACHE_BYTES", 10_000)
    monkeypatch.setattr(module, "_CACHE_ENTRY_BYTES", 4_000)
    cache = module._Cache(4096)
    call_of = [module.StreamCall(bytes([n]), "", pa.schema([]), pa.schema([]), None, None) for n in range(9)]
    for n, cost in enumerate((3_000, 3_000, 3_000, 5_000, 3_000, 3_000)):
        cache.put((bytes([n]), b""), call_of[n], cost, 10.0)
        assert cache._bytes <= 10_000
    assert [n for n in range(6) if cache.get((bytes([n]), b""))] == [2, 4, 5]  # the oldest gone, the large one never in
    cache.put((bytes([2]), b""), call_of[2], 1_000, 10.0)
    assert cache._bytes == 7_000
    cache.put((bytes([2]), b""), call_of[2], 1_000, -1.0)
    assert cache.get((bytes([2]), b"")) is None
    assert cache._bytes == 6_000


def test_a_large_call_state_is_opened_every_time() -> None:
    tokens = extra("tokens").StreamTokens(KEY, 0, 4096, 1 << 26)
    types = extra("tokens").StateTypes((SumState,), (Text,))
    scope = tokens.scope(core.AuthContext("a", True, "b"), "P", "m", types)
    for number, size in ((0, 2 << 20), (1, 2 << 10)):
        stream = core.Stream(pa.schema([]), SumState(), call_state=Text("x" * size))
        known = tokens.begin(scope, stream, "00" * 16, None)
        sealed = {**tokens.seal_call(scope, known), **tokens.seal_state(scope, known, stream.state)[0]}
        assert len(tokens._cache._entries) == number
        assert tokens.open(scope, sealed)[0].call_state == stream.call_state


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("open_to_all", [True, False])
def test_a_token_of_another_process_says_which_option_is_missing(
    own: bool, open_to_all: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other: dict[str, Any] = {} if open_to_all else {"authenticate": core.bearer_authenticate_static(tokens=TOKENS)}
    app = core.make_wsgi_app(make_server(), token_key=None if own else b"another key of 16+", **other)
    client = extra("testing").TestClient(app)
    tokens = init(make_client(**({"authenticate": None} if open_to_all else {})))
    caplog.clear()
    for _ in range(3):
        found = exchange(client, tokens)
        refused(found, "State token verification failed")
        assert ("token_key=" in found.error) is open_to_all
    said = [record.getMessage() for record in caplog.records if "token_key=" in record.getMessage()]
    assert len(said) == 1
    assert ("a key of its own" in said[0]) is own


def test_process_managers_show_that_the_key_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gunicorn.arbiter", sys)
    with pytest.warns(RuntimeWarning, match="token_key="):
        core.make_wsgi_app(make_server())
    core.make_wsgi_app(make_server(), token_key=KEY)


def test_a_process_with_its_own_key_says_so_to_who_asks() -> None:
    with_key = make_client(authenticate=None)
    ids = set()
    for _ in range(2):
        client = extra("testing").TestClient(core.make_wsgi_app(make_server()))
        ids.add(core.http_capabilities(client=client).own_token_key)
    assert len(ids) == 2
    assert core.http_capabilities(client=with_key).own_token_key is None
