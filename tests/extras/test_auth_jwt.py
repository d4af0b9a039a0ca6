"""JSON Web Tokens from a real provider: what is accepted, what is not, key rotation, and outages."""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("joserfc")
pytest.importorskip("authlib")
pytest.importorskip("falcon")

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joserfc.errors import SecurityWarning
from joserfc.jwk import ECKey, OctKey, RSAKey

from tests.core import core
from tests.extras.auth_app import bearer, client, refused, request
from tests.extras.auth_provider import Provider, running
from vgi_rpc_extras.auth import bearer_authenticate_static, chain_authenticate, jwt_authenticate
from vgi_rpc_extras.auth import jwt as jwt_module
from vgi_rpc_extras.auth import provider as asked
from vgi_rpc_extras.auth.provider import FetchError


@pytest.fixture(scope="module")
def shared() -> Iterator[Provider]:
    with running() as provider:
        yield provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with running("EC") as provider:
        yield provider


@pytest.fixture(scope="module")
def accept(shared: Provider) -> Any:
    return jwt_authenticate(issuer=shared.url, audience=("calc", "calc2"))


def segment(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def jwks_calls(provider: Provider) -> int:
    return provider.requests.get("/jwks", 0)


@pytest.mark.parametrize("kind", ["RSA", "EC", "OKP"])
def test_key_kinds(kind: str) -> None:
    with running(kind) as provider:
        auth = jwt_authenticate(issuer=provider.url, audience="calc")(request(bearer(provider.sign(role="admin"))))
        assert (auth.domain, auth.authenticated, auth.principal) == ("jwt", True, "alice")
        assert auth.claims["role"] == "admin"
        assert "admin" not in repr(auth)


def test_several_audiences(shared: Provider, accept: Any) -> None:
    assert accept(request(bearer(shared.sign(aud=["x", "calc2"])))).principal == "alice"


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": None},
        {"iss": "https://evil.example"},
        {"iss": ["https://evil.example"]},
        {"aud": None},
        {"aud": "other"},
        {"aud": []},
        {"aud": {"calc": 1}},
        {"exp": None},
        {"exp": "9999999999"},
        {"exp": True},
        {"nbf": time.time() + 3600},
        {"iat": time.time() + 3600},
        {"sub": None},
        {"sub": ""},
        {"sub": "  "},
        {"sub": ["alice"]},
        {"sub": 0.5},
    ],
)
def test_claims_that_are_refused(shared: Provider, accept: Any, claims: dict[str, Any]) -> None:
    with refused("invalid_credential"):
        accept(request(bearer(shared.sign(**claims))))


def test_time_has_leeway(shared: Provider, accept: Any) -> None:
    now = int(time.time())
    assert accept(request(bearer(shared.sign(exp=now - 30, nbf=now + 30)))).principal == "alice"
    with refused("expired_credential"):
        accept(request(bearer(shared.sign(exp=now - 61))))
    strict = jwt_authenticate(issuer=shared.url, audience="calc", leeway=0)
    with refused("expired_credential"):
        strict(request(bearer(shared.sign(exp=now - 1))))


@pytest.mark.parametrize("name", ["exp", "nbf", "iat"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "1", [1], {}])
def test_what_is_no_time_is_refused(shared: Provider, accept: Any, name: str, value: Any) -> None:
    with refused("invalid_credential"):
        accept(request(bearer(shared.sign(**{name: value}))))


def test_algorithm_confusion(shared: Provider, accept: Any) -> None:
    key: RSAKey = shared.key
    _, body, _ = shared.sign().split(".")
    pem = key.as_pem(private=False)
    for secret in (pem, pem.strip(), base64.urlsafe_b64decode(f"{key.as_dict(private=False)['n']}==")):
        signed = f"{segment({'alg': 'HS256', 'kid': key.kid})}.{body}"
        mac = base64.urlsafe_b64encode(hmac.digest(secret, signed.encode(), "sha256")).decode().rstrip("=")
        with refused("invalid_credential"):
            accept(request(bearer(f"{signed}.{mac}")))
    for header in ({"alg": "none"}, {"alg": "None", "kid": key.kid}, {"alg": ["RS256"]}, {"alg": None}, {}):
        text = segment(header)
        for token in (f"{text}.{body}.", f"{text}.{body}.AA", f"{text}.{body}"):
            with refused("invalid_credential"):
                accept(request(bearer(token)))


def test_keys_that_a_token_brings_along_are_not_used(shared: Provider, accept: Any) -> None:
    before = dict(shared.requests)
    mine = RSAKey.generate_key(2048, auto_kid=True)
    public = mine.as_dict(private=False)
    headers: list[dict[str, Any]] = [
        {"jwk": public},
        {"jwk": public, "kid": shared.key.kid},
        {"jku": f"{shared.url}/evil", "kid": shared.key.kid},
        {"x5u": f"{shared.url}/evil", "kid": shared.key.kid},
        {"x5c": ["AAAA"], "kid": shared.key.kid},
    ]
    for header in headers:
        with refused("invalid_credential"):
            accept(request(bearer(shared.sign(key=mine, header=header))))
    assert "/evil" not in shared.requests
    assert shared.requests.get("/token") == before.get("/token")


@pytest.mark.parametrize("kid", ["../../etc/passwd", "https://evil.example/k", "' or 1=1 --", "", "\u0000", "x" * 2000])
def test_kid_is_only_compared(shared: Provider, accept: Any, kid: str) -> None:
    with refused("invalid_credential"):
        accept(request(bearer(shared.sign(header={"kid": kid}))))


def test_algorithms_are_an_allow_list(shared: Provider) -> None:
    only = jwt_authenticate(issuer=shared.url, audience="calc", algorithms=["PS256"])
    assert only(request(bearer(shared.sign(alg="PS256")))).principal == "alice"
    with refused("invalid_credential"):
        only(request(bearer(shared.sign(alg="RS256"))))
    for bad in (["HS256"], ["none"], ["RS256", "HS512"], []):
        with pytest.raises(ValueError, match="algorithms"):
            jwt_authenticate(issuer=shared.url, audience="calc", algorithms=bad)


def test_keys_and_algorithms_must_fit(provider: Provider) -> None:
    """A curve for another algorithm, an encryption key, a symmetric key, a small RSA key: none verifies."""
    accept = jwt_authenticate(issuer=provider.url, audience="calc")
    wrong = ECKey.generate_key("P-384", auto_kid=True)
    with pytest.warns(SecurityWarning):
        small = RSAKey.generate_key(1024, auto_kid=True)
    secret = OctKey.generate_key(256, auto_kid=True)
    provider.published += [wrong, small, secret]
    assert accept(request(bearer(provider.sign()))).principal == "alice"
    for key, alg in ((small, "RS256"), (secret, "HS256")):
        with refused("invalid_credential"):
            accept(request(bearer(provider.sign(key=key, alg=alg))))
    with refused("invalid_credential"):
        accept(request(bearer(provider.sign(header={"kid": wrong.kid}))))


def test_key_set_entries_are_checked_one_by_one() -> None:
    good = ECKey.generate_key("P-256", auto_kid=True).as_dict(private=False)
    bad: list[Any] = [
        None,
        7,
        {},
        {"kty": "EC"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "oct", "k": "c2VjcmV0"},
        {**good, "use": "enc"},
        {**good, "key_ops": ["sign"]},
        {**good, "kid": 7},
        {**good, "x": "!!"},
    ]
    assert len(jwt_module._usable_keys({"keys": [*bad, good]})) == 1
    for document in ({}, {"keys": None}, {"keys": [good] * 513}):
        with pytest.raises(FetchError):
            jwt_module._usable_keys(document)


def test_no_kid(provider: Provider) -> None:
    accept = jwt_authenticate(issuer=provider.url, audience="calc")
    token = provider.sign(header={"kid": None})
    assert accept(request(bearer(token))).principal == "alice"
    provider.rotate()
    again = jwt_authenticate(issuer=provider.url, audience="calc")
    with refused("invalid_credential"):
        again(request(bearer(provider.sign(header={"kid": None}))))
    assert jwks_calls(provider) == 2


# Rotation, refresh limits, outages


def store_of(monkeypatch: pytest.MonkeyPatch, provider: Provider, **options: Any) -> tuple[Any, list[float]]:
    """An authenticator whose key store has a clock of its own."""
    clock = [1000.0]
    real = jwt_module._KeyStore

    def make(*args: Any) -> Any:
        store = real(*args)
        store._clock = lambda: clock[0]
        return store

    monkeypatch.setattr(jwt_module, "_KeyStore", make)
    return jwt_authenticate(issuer=provider.url, audience="calc", **options), clock


def test_rotation(monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
    accept, clock = store_of(monkeypatch, provider)
    old = provider.sign()
    accept(request(bearer(old)))
    clock[0] += 31
    provider.rotate()
    assert accept(request(bearer(provider.sign()))).principal == "alice"
    assert accept(request(bearer(old))).principal == "alice"
    assert jwks_calls(provider) == 2
    provider.rotate(keep=False)  # the old key is withdrawn
    clock[0] += 601
    with refused("invalid_credential"):
        accept(request(bearer(old)))


def test_unknown_kids_do_not_storm_the_provider(monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
    accept, clock = store_of(monkeypatch, provider)
    accept(request(bearer(provider.sign())))
    for number in range(50):
        with refused("invalid_credential"):
            accept(request(bearer(provider.sign(header={"kid": f"k{number}"}))))
    assert jwks_calls(provider) == 1
    clock[0] += 31
    for number in range(50):
        with refused("invalid_credential"):
            accept(request(bearer(provider.sign(header={"kid": f"k{number}"}))))
    assert jwks_calls(provider) == 2


def test_unreadable_tokens_never_reach_the_provider(provider: Provider) -> None:
    accept = jwt_authenticate(issuer=provider.url, audience="calc")
    for token in ("x", "a.b.c", "." * 5, provider.sign() + "=" * 3, provider.sign(pad="x" * 9000), "\u00e9.b.c"):
        with refused("invalid_credential"):
            accept(request(bearer(token)))
    assert provider.requests == {}


def test_many_threads_fetch_once(provider: Provider) -> None:
    accept = jwt_authenticate(issuer=provider.url, audience="calc")
    token, results, start = provider.sign(), [], threading.Barrier(8)

    def use() -> None:
        start.wait()
        results.append(accept(request(bearer(token))).principal)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["alice"] * 8
    assert jwks_calls(provider) == 1


@pytest.mark.parametrize("path", ["/jwks", "/.well-known/openid-configuration"])
def test_outage_is_503(monkeypatch: pytest.MonkeyPatch, provider: Provider, path: str) -> None:
    accept, clock = store_of(monkeypatch, provider)
    provider.broken.add(path)
    http = client(accept)
    token = provider.sign()
    for _ in range(3):
        answer = http.simulate_get("/x", headers=bearer(token))
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert provider.requests[path] == 1  # a pause after a failure
    provider.broken.clear()
    clock[0] += 6
    assert http.simulate_get("/x", headers=bearer(token)).status_code == 200


def test_stale_keys_serve_through_an_outage(monkeypatch: pytest.MonkeyPatch, provider: Provider) -> None:
    accept, clock = store_of(monkeypatch, provider)
    token = provider.sign()
    accept(request(bearer(token)))
    provider.broken.add("/jwks")
    clock[0] += 10_000
    assert accept(request(bearer(token))).principal == "alice"
    provider.rotate()
    with pytest.raises(core.AuthUnavailableError):  # it may be a new key: not a reason to log out
        accept(request(bearer(provider.sign())))


def test_nothing_listens(provider: Provider) -> None:
    accept = jwt_authenticate(issuer="http://127.0.0.1:9", audience="calc")
    with pytest.raises(core.AuthUnavailableError):
        accept(request(bearer(provider.sign(iss="http://127.0.0.1:9"))))


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": "https://evil.example"},
        {"jwks_uri": "http://192.0.2.1/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"jwks_uri": 7},
    ],
    ids=str,
)
def test_discovery_is_checked(provider: Provider, change: dict[str, Any]) -> None:
    provider.extra = change
    accept = jwt_authenticate(issuer=provider.url, audience="calc")
    with pytest.raises(core.AuthUnavailableError):
        accept(request(bearer(provider.sign())))
    assert jwks_calls(provider) == 0


def answering(**options: Any) -> Any:
    def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(**options)

    return jwt_authenticate(
        issuer="https://id.example",
        audience="calc",
        jwks_uri="https://id.example/j",
        transport=httpx.MockTransport(handle),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"status_code": 200, "content": b'{"keys": [], "x": "' + b"x" * 2_000_000 + b'"}'},
        {"status_code": 200, "content": b"[" * 100_000},
        {"status_code": 200, "content": b"[]"},
        {"status_code": 302, "headers": {"Location": "https://evil.example/j"}},
        {"status_code": 200, "headers": {"Content-Encoding": "gzip"}, "stream": httpx.ByteStream(b"bomb")},
    ],
    ids=["large", "deep", "no-object", "redirect", "encoded"],
)
def test_hostile_answers_mean_unavailable(provider: Provider, options: dict[str, Any]) -> None:
    with pytest.raises(core.AuthUnavailableError):
        answering(**options)(request(bearer(provider.sign())))


class Dripping(httpx.SyncByteStream):
    """A long answer that comes in pieces; counts those taken."""

    def __init__(self, piece: bytes, pause: float) -> None:
        self.piece, self.pause, self.taken = piece, pause, 0

    def __iter__(self) -> Iterator[bytes]:
        for _ in range(200):
            time.sleep(self.pause)
            self.taken += 1
            yield self.piece


@pytest.mark.parametrize(("piece", "pause", "most"), [(b" " * 65536, 0.0, 17), (b" ", 0.005, 30)])
def test_answers_are_bounded_while_they_come(
    provider: Provider, monkeypatch: pytest.MonkeyPatch, piece: bytes, pause: float, most: int
) -> None:
    monkeypatch.setattr(asked, "SECONDS", 0.1)
    stream = Dripping(piece, pause)
    with pytest.raises(core.AuthUnavailableError):
        answering(status_code=200, stream=stream)(request(bearer(provider.sign())))
    assert stream.taken <= most


def test_bad_settings() -> None:
    changes: tuple[dict[str, Any], ...] = ({"issuer": ()}, {"issuer": ""}, {"audience": ()}, {"audience": ("", "x")})
    for change in changes:
        with pytest.raises(ValueError, match="must not be empty"):
            jwt_authenticate(**{"issuer": "https://id.example", "audience": "calc", **change})
    for url in ("http://id.example", "ftp://id.example", "id.example", "https://u:p@id.example"):
        with pytest.raises(ValueError):
            jwt_authenticate(issuer=url, audience="calc")


def test_claims_options_and_principal_claim(shared: Provider) -> None:
    accept = jwt_authenticate(
        issuer=shared.url,
        audience="calc",
        claims_options={"scope": {"essential": True, "value": "calc"}, "exp": {"essential": False}},
        principal_claim="email",
        domain="corp",
    )
    auth = accept(request(bearer(shared.sign(scope="calc", email="a@example.com"))))
    assert (auth.domain, auth.principal) == ("corp", "a@example.com")
    bad: list[dict[str, Any]] = [{"email": "a"}, {"scope": "x", "email": "a"}, {"scope": "calc"}]
    for claims in [*bad, {"scope": "calc", "email": "a", "exp": None}]:
        with refused("invalid_credential"):
            accept(request(bearer(shared.sign(**claims))))


def test_in_a_chain_with_api_keys(shared: Provider, accept: Any) -> None:
    static = bearer_authenticate_static(tokens={"key": core.AuthContext("key", True, "bob")})
    chain = chain_authenticate(accept, static)
    assert chain(request(bearer("key"))).principal == "bob"
    assert chain(request(bearer(shared.sign()))).principal == "alice"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_tokens(shared: Provider, accept: Any, data: st.DataObject) -> None:
    token = list(shared.sign())
    for _ in range(data.draw(st.integers(1, 3))):
        kind, at = data.draw(st.sampled_from("idc")), data.draw(st.integers(0, len(token) - 2))
        if kind == "d":
            del token[at]
        else:
            char = data.draw(st.sampled_from("ABab01-_.=,{}\x00\u00ff "))
            token[at : at + (kind == "c")] = char
    changed = "".join(token)
    try:
        accept(request({"Authorization": f"Bearer {changed}"}))
    except ValueError:
        return
    assert changed.rpartition(".")[0] in _signed(shared)  # only the unused bits of the last character may differ


def _signed(shared: Provider) -> Any:
    class Anything:
        def __contains__(self, text: str) -> bool:
            head, _, body = text.partition(".")
            return bool(json.loads(base64.urlsafe_b64decode(head + "==")) and base64.urlsafe_b64decode(body + "=="))

    return Anything()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(
        st.sampled_from(["alg", "kid", "typ", "cty", "b64", "crit", "x5c"]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.text(max_size=5)
            | st.sampled_from(["RS256", "ES256", "EdDSA"]),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=4,
        ),
    )
)
def test_broken_headers(accept: Any, header: dict[str, Any]) -> None:
    with refused("invalid_credential"):
        accept(request(bearer(f"{segment(header)}.e30.AAAA")))


def test_no_token_in_logs_or_errors(shared: Provider, accept: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    token = shared.sign(aud="other", secret_claim="hush-hush")
    answer = client(accept).simulate_get("/x", headers=bearer(token))
    assert answer.status_code == 401
    for part in (token, token.split(".")[2], "hush-hush"):
        assert part not in caplog.text and part not in answer.text
    with pytest.raises(ValueError) as caught:
        accept(request(bearer(token)))
    assert token not in repr(caught.value) and caught.value.__cause__ is None


def test_a_dripped_header_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "SECONDS", 0.3)
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            with contextlib.suppress(OSError):
                link = listener.accept()[0]
                with link:
                    link.sendall(b"HTTP/1.1 200 OK\r\n")
                    while not over.wait(0.02):
                        link.sendall(b"X: y\r\n")

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with asked.bounded_client() as client, pytest.raises(FetchError, match="could not be reached"):
            asked.get_json(client, f"{url}/jwks")
        took = time.monotonic() - began
        over.set()
        thread.join(5)
    assert took < 1.0


def test_an_issuer_signs_with_its_own_keys_only() -> None:
    with running("EC") as one, running("EC") as two:
        accept = jwt_authenticate(issuer=(one.url, two.url), audience="calc")
        for provider in (one, two):
            assert accept(request(bearer(provider.sign()))).claims["iss"] == provider.url
        for forged in (one.sign(iss=two.url), two.sign(iss=one.url), one.sign(iss="https://third.example")):
            with pytest.raises(ValueError):
                accept(request(bearer(forged)))
        places = {one.url: f"{one.url}/jwks", two.url: f"{two.url}/jwks"}
        placed = jwt_authenticate(issuer=(one.url, two.url), audience="calc", jwks_uri=places)
        assert placed(request(bearer(two.sign()))).claims["iss"] == two.url
        with pytest.raises(ValueError):
            placed(request(bearer(one.sign(iss=two.url))))


def test_one_key_set_is_of_one_issuer() -> None:
    issuers = ("https://a.example", "https://b.example")
    with pytest.raises(ValueError, match="each could sign for the others"):
        jwt_authenticate(issuer=issuers, audience="calc", jwks_uri="https://a.example/jwks")
    with pytest.raises(ValueError, match="none of the issuers"):
        jwt_authenticate(issuer=issuers, audience="calc", jwks_uri={"https://c.example": "https://c.example/jwks"})
