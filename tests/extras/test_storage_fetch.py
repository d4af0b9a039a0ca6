"""Fetching: what is asked, and what servers get wrong."""

from __future__ import annotations

import contextlib
import gzip
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
import pytest

from tests.extras.storage_server import Store, Thing, anything

pytest.importorskip("httpx")

from vgi_rpc_extras.storage import FetchConfig, fetch, fetch_url, https_only_validator, is_public_address, redact_url

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

DATA = os.urandom(300_000)


def ranged(**options: Any) -> FetchConfig:
    return FetchConfig(parallel_threshold_bytes=100_000, chunk_size_bytes=32_768, **options)


def refusal(url: str, config: FetchConfig, validator: Any = anything, **options: Any) -> core.ExternalLocationError:
    """The one typed error; no secret shows, and no thread is left."""
    with config, pytest.raises(core.ExternalLocationError) as caught:
        fetch_url(url, config, url_validator=validator, **options)
    error = caught.value
    assert isinstance(error, RuntimeError) and isinstance(error, ValueError)
    chain: BaseException | None = error
    while chain is not None:
        assert "hunter2" not in str(chain) and "hunter2" not in repr(chain)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("vgi_rpc-fetch")]
    return error


def test_one_get_after_a_head(store: Store) -> None:
    with FetchConfig() as config:
        url = store.add("a", DATA)
        assert fetch_url(url, config, url_validator=anything) == DATA
        assert fetch_url(url, config, url_validator=anything) == DATA
    assert store.verbs() == ["HEAD", "GET", "HEAD", "GET"]
    sent = store.asked[1].headers
    assert sent["accept-encoding"] == "zstd, gzip, identity"
    assert not {"cookie", "authorization", "referer"} & set(sent)


@pytest.mark.parametrize(
    "query",
    [
        "?X-Amz-Credential=c&X-Amz-Signature=s",
        "?X-Goog-Credential=c&X-Goog-Signature=s",
        "?AWSAccessKeyId=a&Signature=s",
        "?GoogleAccessId=a&Signature=s",
    ],
)
def test_a_signed_url_is_probed_with_its_first_byte(store: Store, query: str) -> None:
    store.query = query
    with FetchConfig() as config:
        assert fetch_url(store.add("a", Thing(DATA, head_status=403)), config, url_validator=anything) == DATA
    assert [(a.verb, a.headers.get("range")) for a in store.asked] == [("GET", "bytes=0-0"), ("GET", None)]


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_probe_that_is_not_allowed_says_nothing(store: Store, status: int) -> None:
    with ranged() as config:
        assert fetch_url(store.add("a", Thing(DATA, head_status=status)), config, url_validator=anything) == DATA
    assert store.verbs() == ["HEAD", "GET"]


@pytest.mark.parametrize("query", ["", "?X-Amz-Credential=c&X-Amz-Signature=s"])
def test_large_objects_come_in_ranges(store: Store, query: str) -> None:
    store.query = query
    seen: list[tuple[int, int | None]] = []
    with ranged(progress=lambda done, total: seen.append((done, total))) as config:
        assert fetch_url(store.add("a", DATA), config, url_validator=anything) == DATA
    ranges = sorted(int(a.headers["range"][6:].split("-")[0]) for a in store.asked[1:])
    assert ranges == list(range(0, 300_000, 32_768))
    assert all(a.headers["if-range"] == '"one"' for a in store.asked[1:])
    assert seen[-1] == (300_000, 300_000) and seen == sorted(seen)


def test_without_ranges_one_get(store: Store) -> None:
    seen: list[int] = []
    with ranged(progress=lambda done, total: seen.append(done)) as config:
        assert fetch_url(store.add("a", Thing(DATA, ranges=False)), config, url_validator=anything) == DATA
    assert store.verbs() == ["HEAD", "GET"] and seen[-1] == len(DATA)


def test_a_straggler_is_asked_for_twice(store: Store) -> None:
    before = time.monotonic()
    with ranged() as config:
        url = store.add("a", Thing(DATA, slow_range="bytes=65536-98303"))
        assert fetch_url(url, config, url_validator=anything) == DATA
    assert time.monotonic() - before < 5
    assert sum(a.headers.get("range") == "bytes=65536-98303" for a in store.asked) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("vgi_rpc-fetch")]


def test_without_hedging_a_straggler_is_waited_for(store: Store) -> None:
    url = store.add("a", Thing(DATA, slow_range="bytes=65536-98303"))
    config = ranged(speculative_retry_multiplier=0, timeout_seconds=0.6)
    before = time.monotonic()
    assert "timeout_seconds=0.6" in str(refusal(url, config))
    assert time.monotonic() - before < 3
    assert sum(a.headers.get("range") == "bytes=65536-98303" for a in store.asked) == 1


@pytest.mark.parametrize("coding", ["zstd", "gzip", "ZSTD", "br", ""])
def test_codings(store: Store, coding: str) -> None:
    packed = {"zstd": pa.Codec("zstd").compress(DATA, asbytes=True), "gzip": gzip.compress(DATA)}
    thing = Thing(packed.get(coding.lower(), DATA), coding)
    with FetchConfig() as config, ranged() as parallel:
        assert fetch_url(store.add("a", thing), config, url_validator=anything) == DATA
        assert fetch_url(store.add("a", thing), parallel, url_validator=anything) == DATA


BOMB = gzip.compress(b"\0" * 50_000_000)
BAD: dict[str, tuple[Thing, FetchConfig, str]] = {
    "not found": (Thing(DATA, status=404), FetchConfig(), "HTTP 404"),
    "forbidden": (Thing(DATA, status=403), FetchConfig(), "HTTP 403"),
    "no such range": (Thing(DATA, status=416), FetchConfig(), "HTTP 416"),
    "server error": (Thing(DATA, status=500), FetchConfig(), "HTTP 500"),
    "vanished": (Thing(DATA, status=404, head_status=200), FetchConfig(), "HTTP 404"),
    "vanished between ranges": (Thing(DATA, get_only=2), ranged(max_parallel_requests=1), "HTTP 404"),
    "truncated": (Thing(DATA, claim=400_000), FetchConfig(), "RemoteProtocolError"),
    "too large, says its head": (Thing(DATA), FetchConfig(max_fetch_bytes=1000), "max_fetch_bytes=1000"),
    "larger than its head says": (
        Thing(DATA, head_claim=10, ranges=False),
        FetchConfig(max_fetch_bytes=1000),
        "max_fetch_bytes=1000",
    ),
    "large, and nobody said so": (Thing(DATA, head_status=405), FetchConfig(max_fetch_bytes=1000), "max_fetch_bytes"),
    "shorter than its head says": (Thing(DATA, head_claim=400_000), ranged(), "range mismatch|HTTP"),
    "zip bomb": (Thing(BOMB, "gzip"), FetchConfig(max_decompressed_bytes=1 << 20), "max_decompressed_bytes=1048576"),
    "plain and larger than decoded may be": (Thing(DATA), FetchConfig(max_decompressed_bytes=9), "max_decompressed"),
    "not its coding": (Thing(DATA, "zstd"), FetchConfig(), "cannot be decoded"),
    "cut in its coding": (Thing(gzip.compress(DATA)[:-40], "gzip"), FetchConfig(), "cannot be decoded"),
    "redirect to itself": (Thing(b"", status=302, location="/a?k=hunter2"), FetchConfig(), "redirect limit"),
    "no redirects": (Thing(b"", status=307, location="/b"), FetchConfig(max_redirects=0), "redirect limit"),
    "redirect to nowhere": (Thing(b"", status=301), FetchConfig(), "without saying where"),
    "redirect inside": (Thing(b"", status=308, location="http://localhost:1/x?k=hunter2"), FetchConfig(), "rejected"),
    "redirect to a file": (Thing(b"", status=303, location="file:///etc/passwd"), FetchConfig(), "rejected"),
    "redirect to nonsense": (Thing(b"", status=303, location="http://[::nope/x?k=hunter2"), FetchConfig(), "rejected"),
    "silent": (Thing(DATA, pause=3), FetchConfig(timeout_seconds=0.3), "timeout_seconds=0.3"),
    "dripping": (Thing(b"x" * 500, drip=0.02), FetchConfig(timeout_seconds=0.3), "timeout_seconds=0.3"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_servers_get_wrong(store: Store, name: str) -> None:
    thing, config, text = BAD[name]
    before = time.monotonic()
    error = refusal(store.add("a", thing), config)
    assert any(part in str(error) for part in text.split("|")), str(error)
    assert time.monotonic() - before < 2
    if name == "redirect to itself":
        assert len(store.asked) == 6
    if name == "too large, says its head":
        assert store.verbs() == ["HEAD"]


def test_a_changed_object_is_not_put_together_of_two(store: Store) -> None:
    url = store.add("a", Thing(DATA))
    thing = store.things["a"]

    def change(done: int, total: int | None) -> None:
        thing.ranges = False  # what a server does with If-Range of another version: it sends the whole

    assert "changed while it was read" in str(refusal(url, ranged(max_parallel_requests=1, progress=change)))


def test_the_callers_own_patience(store: Store) -> None:
    url = store.add("a", Thing(DATA, pause=3))
    with FetchConfig() as config, pytest.raises(core.DeadlineExceededError, match=r"within 0\.3 s"):
        fetch_url(url, config, url_validator=anything, timeout=0.3)


def test_a_kept_connection_that_was_closed(store: Store) -> None:
    with FetchConfig() as config:
        url = store.add("a", Thing(b"x" * 10))
        for _ in range(2):
            assert fetch_url(url, config, url_validator=anything) == b"x" * 10
            store.add("b", Thing(b"y" * 5, claim=9))
            with pytest.raises(core.ExternalLocationError):
                fetch_url(f"{store.url}/b", config, url_validator=anything)
        config.close()
        assert fetch_url(url, config, url_validator=anything) == b"x" * 10


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http:///x",
        "http://127.0.0.1:99999/x",
        "http://user:hunter2@127.0.0.1:1/x",
        "http://hunter2@127.0.0.1:1/x",
        "http://127.0.0.1:1\\@elsewhere/hunter2 x\x00",
        "http://127.0.0.1.:1/?k=hunter2",
        "https://10.0.0.1/?k=hunter2",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    assert "ExternalLocation URL rejected" in str(refusal(url, FetchConfig()))


def test_what_a_validator_says_is_cleaned() -> None:
    def quotes(url: str) -> None:
        raise ValueError(f"no: {url}")

    def quotes_part(url: str) -> None:
        raise ValueError(f"no: {url.partition('=')[2]}")

    def breaks(url: str) -> None:
        raise KeyError(url)

    url = "https://a.example/x?k=hunter2"
    assert "no: https://a.example/x" in str(refusal(url, FetchConfig(), quotes))
    assert "by the validator" in str(refusal(url, FetchConfig(), quotes_part))
    assert "KeyError" in str(refusal(url, FetchConfig(), breaks))


def test_private_addresses_are_refused_after_resolution(store: Store) -> None:
    url = store.add("a", DATA)
    for spelled in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0177.0.0.1", "2130706433", "0.0.0.0"):
        hidden = url.replace("127.0.0.1", spelled)
        error = refusal(hidden, FetchConfig(timeout_seconds=5), None, private_addresses=False)
        assert "URL rejected" in str(error) or "ConnectError" in str(error)
    assert store.asked == []


def test_a_name_is_resolved_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: what was checked is what is connected to."""
    import socket

    port = int(store.url.rpartition(":")[2])
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))]]
    real, dialled = socket.create_connection, []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: answers.pop())

    def dial(address: Any, *args: Any, **options: Any) -> Any:
        dialled.append(address[0])
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", dial)
    refusal(f"http://rebind.example:{port}/a", FetchConfig(timeout_seconds=2), None, private_addresses=False)
    assert dialled == ["8.8.8.8"] and real is not dial


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fd00:ec2::254", False),
        ("ff02::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2001:0:1::1", False),
        ("192.0.0.192", False),
        ("192.88.99.1", False),
        ("168.63.129.16", False),
        ("240.0.0.1", False),
        ("fec0::1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("100::1", False),
        ("2001:db8::1", False),
        ("::ffff:0:a9fe:a9fe", False),
        ("::8.8.8.8", False),
        ("64:ff9b:1::808:808", False),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("2620:4f:8000::1", True),
        ("223.255.255.255", True),
        ("nonsense", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public_address(address) is public


def test_https_only() -> None:
    https_only_validator("https://a.example/x")
    https_only_validator("HTTPS://a.example/x")
    for url in ("http://a.example/x?k=hunter2", "", "https", "//a.example", "hunter2 is://x"):
        with pytest.raises(ValueError, match="only https") as caught:
            https_only_validator(url)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@h.example:8443/a/b?q=1#f", "https://h.example:8443/a/b"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("https://h.example", "https://h.example"),
        ("nonsense", "<url>"),
        ("http://[bad", "<url>"),
        ("http://h:99999/x", "<url>"),
        ("https:u:secret@h/x", "<url>"),
    ],
)
def test_redaction(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_settings_that_make_no_sense() -> None:
    for options in ({"chunk_size_bytes": 0}, {"max_redirects": -1}, {"timeout_seconds": 0}, {"max_fetch_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            FetchConfig(**options)  # type: ignore[arg-type]
    assert FetchConfig().decoded_cap == 1 << 30 and FetchConfig(max_fetch_bytes=1000).decoded_cap == 16_000
    assert FetchConfig(max_decompressed_bytes=5).decoded_cap == 5


def test_a_part_in_tiny_chunks_costs_its_bytes() -> None:
    count = 300_000

    class Fetcher:
        """Answers every range with chunks of two bytes, which no server of this suite does."""

        @contextlib.contextmanager
        def open(self, *args: Any) -> Iterator[SimpleNamespace]:
            body = (bytes((48 + n % 10, 120)) for n in range(count))
            yield SimpleNamespace(status=206, headers={}, body=body)

    job = fetch.Job(30.0, None)
    config = FetchConfig(chunk_size_bytes=2 * count)
    ranges = fetch._Ranges(cast(Any, Fetcher()), config, "https://x/y", None, job, 2 * count, '"e"')
    tracemalloc.start()
    try:
        part = ranges._part(0, job)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert b"".join(part) == b"".join(bytes((48 + n % 10, 120)) for n in range(count))
    assert peak < 4 * count  # a list of the chunks: 40 bytes each, and more
