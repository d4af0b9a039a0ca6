# Needs: httpx (URLs, and its httpcore for the transfer). Install: pip install 'vgi-rpc-onefile[external]'.
"""Fetching and storing objects over HTTP, bounded in size, time and reach (storage.md section 6).

    probe          HEAD; of a URL signed for GET alone, the first byte
    then           one GET, or ranges in parallel: each must be 206, of the same object, and as long as was asked
    every hop      parsed once; refused with user information; passed to the validator; then its addresses are checked
    every read     bounded by the deadline of the whole job, and ended when the job is over

common/fetch.py has the connections.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import httpcore
import httpx

from .. import core as _bound_core
from ..common import fetch
from ..common.coding import DecompressionError, DecompressionLimitExceeded, Encoding, decompress
from ..common.urls import UrlValidator, is_public_address, redact_url

if TYPE_CHECKING:
    import vgi_rpc as core

    from .store import FetchConfig
else:
    core = _bound_core()

__all__ = ["fetch_url"]

_REDIRECTS = (301, 302, 303, 307, 308)
_PROBE_UNKNOWN = (403, 405, 501)  # the probe is not allowed, which says nothing about the object
_RETRYABLE = (408, 425, 429)
_CHUNK = 1 << 20
_STEP_BYTES = 4096
_SIGNATURES = (
    {"x-amz-signature", "x-amz-credential"},
    {"x-goog-signature", "x-goog-credential"},
    {"signature", "awsaccesskeyid"},
    {"signature", "googleaccessid"},
)


class TransientError(Exception):
    """Trying again may help. The text holds no more of a URL than may be shown."""


def fetch_url(
    url: str,
    config: FetchConfig,
    *,
    url_validator: UrlValidator | None = None,
    private_addresses: bool = True,
    timeout: float | None = None,
) -> bytes:
    """Download a URL, large bodies in parallel ranges, and undo its zstd or gzip coding.

    Args:
        url_validator: raises ValueError for a URL that is refused; asked for the URL and for each redirect's target.
        private_addresses: False refuses every address that is not of the public internet.
        timeout: seconds, if less than `config.timeout_seconds`.

    Raises:
        ExternalLocationError (also a ValueError and a RuntimeError): refused, too large, or not to be had.
        DeadlineExceededError: `timeout` has passed.
    """
    job = Job(config.timeout_seconds, timeout)
    try:
        return decode(*config.fetcher(private_addresses).fetch(url, url_validator, job), config)
    except TransientError as exc:
        raise failed(str(exc), code=core.Code.UNAVAILABLE) from None


def failed(text: str, *, code: core.Code = core.Code.DATA_LOSS) -> core.ExternalLocationError:
    """The error of a fetch."""
    return core.ExternalLocationError(text, error_code=code)


def decode(data: bytes, coding: str, config: FetchConfig) -> bytes:
    """Undo a Content-Encoding, never to more than the decoded cap."""
    limit = config.decoded_cap
    encoding = {"zstd": Encoding.ZSTD, "gzip": Encoding.GZIP}.get(coding, Encoding.IDENTITY)
    try:
        return decompress(encoding, data, max_output_size=limit)
    except DecompressionLimitExceeded:
        text = f"the object has more than max_decompressed_bytes={limit} bytes when decoded"
        raise failed(text, code=core.Code.RESOURCE_EXHAUSTED) from None
    except (DecompressionError, ValueError) as exc:
        raise failed(f"the object cannot be decoded: {exc}") from None


# ---- one job


class Job(fetch.Job):
    """A fetch or an upload: as long as its config allows, or as the caller has patience, if that is less."""

    def __init__(self, config_seconds: float, timeout: float | None) -> None:
        self._own = timeout is not None and timeout < config_seconds  # the caller's own patience ends first
        super().__init__(timeout if timeout is not None and self._own else config_seconds)

    def expired(self) -> Exception:
        if self._own:
            text = f"the transfer did not end within {self.seconds:g} s"
            return core.DeadlineExceededError(text, sent="answered")
        text = f"the transfer did not end within timeout_seconds={self.seconds:g}"
        return failed(text, code=core.Code.DEADLINE_EXCEEDED)

    def abandoned(self) -> Exception:
        return TransientError("no longer wanted")


def rejected(why: str) -> core.ExternalLocationError:
    """The error of a URL that is refused."""
    return failed(f"ExternalLocation URL rejected: {why}", code=core.Code.INVALID_ARGUMENT)


def check_url(url: str, validator: UrlValidator | None) -> httpx.URL:
    """Parse and judge a URL; what is returned is what is connected to, not the text."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError, TypeError):
        raise rejected("it cannot be parsed") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise rejected("it is not an http or https URL with a host")
    if parsed.port is not None and not 0 < parsed.port < 65_536:
        raise rejected("its port is not one")
    if parsed.userinfo:
        raise rejected("it holds a user name or password")
    if validator is None:
        return parsed
    text = str(parsed)
    try:
        validator(text)
    except ValueError as exc:
        raise rejected(_without_secrets(str(exc), url, text, parsed)) from None
    except Exception as exc:
        raise rejected(f"the validator raised {type(exc).__name__}") from None
    return parsed


def _without_secrets(reason: str, *texts: Any) -> str:
    for text in texts[:2]:
        reason = reason.replace(text, redact_url(text))
    query = texts[2].query.decode("ascii", "replace")
    parts = [query, *query.split("&"), *(value for _, value in texts[2].params.multi_items())]
    return "by the validator" if any(len(part) > 3 and part in reason for part in parts) else reason


# ---- the transfer


class _Found(NamedTuple):
    size: int | None
    ranges: bool
    etag: str
    coding: str


class Response(NamedTuple):
    """The head of a response, and its body as it arrives."""

    status: int
    headers: Mapping[str, str]
    body: Iterable[bytes]


class Fetcher:
    """The connections of one FetchConfig. Safe to share between threads."""

    def __init__(self, config: FetchConfig, private_addresses: bool) -> None:
        self._config = config
        self.pool = fetch.pool(
            config.max_parallel_requests + 2,
            allows=None if private_addresses else is_public_address,
            refused=lambda: rejected("its host has no public address; private_addresses=True allows others"),
        )

    def fetch(self, url: str, validator: UrlValidator | None, job: Job) -> tuple[bytes, str]:
        """Return the encoded bytes of an object and their coding.

        Raises TransientError, ExternalLocationError, DeadlineExceededError.
        """
        config = self._config
        with job.entered():
            found = self._probe(url, validator, job)
            if found.size is not None and found.size > config.max_fetch_bytes:
                raise self._too_large(found.size)
            if found.ranges and found.size is not None and found.size >= max(config.parallel_threshold_bytes, 1):
                return _Ranges(self, config, url, validator, job, found.size, found.etag).fetch(), found.coding
            return self._single(url, validator, job, found)

    def put(self, url: str, validator: UrlValidator | None, job: Job, body: bytes, content_type: str) -> None:
        """Store an object under a URL that was made for that; nothing but the URL itself entitles to it."""
        headers = {"Content-Type": content_type, "Content-Length": str(len(body))}
        with job.entered(), self._request("PUT", check_url(url, validator), headers, body) as response:
            if not 200 <= response.status < 300:
                raise _status_error(response.status, url)
            _read_little(response.body)

    @contextlib.contextmanager
    def open(
        self, method: str, url: str, validator: UrlValidator | None, headers: Mapping[str, str]
    ) -> Iterator[Response]:
        """Send a request and follow redirects, each judged before anything is sent to it."""
        for _ in range(self._config.max_redirects + 1):
            target = check_url(url, validator)
            with self._request(method, target, headers) as response:
                if response.status not in _REDIRECTS:
                    yield response
                    return
                location = response.headers.get("location", "")
            if not location:
                raise failed(f"{redact_url(url)} redirects without saying where")
            try:
                url = str(target.join(location))
            except (httpx.InvalidURL, ValueError):
                raise rejected("a redirect's target cannot be parsed") from None
        raise failed(f"redirect limit: more than max_redirects={self._config.max_redirects}")

    @contextlib.contextmanager
    def _request(
        self, method: str, target: httpx.URL, headers: Mapping[str, str], body: bytes | None = None
    ) -> Iterator[Response]:
        sent = {"Host": target.netloc.decode("ascii"), "User-Agent": f"vgi-rpc/{core.__version__}", **headers}
        address = httpcore.URL(scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path)
        try:
            found = self._started(method, address, list(sent.items()), body)
            try:
                got = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in found.headers}
                yield Response(found.status, got, found.iter_stream())
            finally:
                found.close()
        except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as exc:
            raise TransientError(f"{method} {redact_url(str(target))}: {type(exc).__name__}") from None

    def _started(self, method: str, url: httpcore.URL, headers: Any, body: bytes | None) -> httpcore.Response:
        """A response whose head has arrived. A kept connection may have been closed meanwhile: once more then."""
        for last in (False, True):
            content = None if body is None else _cut(body)
            try:
                return self.pool.handle_request(httpcore.Request(method, url, headers=headers, content=content))
            except (httpcore.RemoteProtocolError, httpcore.ReadError, httpcore.WriteError):
                if last:
                    raise
        raise AssertionError

    def _probe(self, url: str, validator: UrlValidator | None, job: Job) -> _Found:
        signed = is_presigned(url)
        headers = {"Accept-Encoding": "zstd, gzip, identity", **({"Range": "bytes=0-0"} if signed else {})}
        with self.open("GET" if signed else "HEAD", url, validator, headers) as response:
            status, got = response.status, response.headers
            if status == 206 and signed:
                _read_little(response.body)
                size = _number(got.get("content-range", "").rpartition("/")[2])
                return _Found(size, size is not None, got.get("etag", ""), _coding(got))
            if status in _PROBE_UNKNOWN or (signed and status in (200, 416)):
                return _Found(None, False, "", _coding(got))
            if not 200 <= status < 300:
                raise _status_error(status, url)
            ranges = "bytes" in got.get("accept-ranges", "").lower()
            return _Found(_number(got.get("content-length", "")), ranges, got.get("etag", ""), _coding(got))

    def _single(self, url: str, validator: UrlValidator | None, job: Job, probe: _Found) -> tuple[bytes, str]:
        limit, progress = self._config.max_fetch_bytes, self._config.progress
        with self.open("GET", url, validator, {"Accept-Encoding": "zstd, gzip, identity"}) as response:
            if response.status != 200:
                raise _status_error(response.status, url)
            size = _number(response.headers.get("content-length", ""))
            if size is not None and size > limit:
                raise self._too_large(size)
            body = bytearray()  # a list of tiny chunks would take many times the limit
            for chunk in response.body:
                if len(body) + len(chunk) > limit:
                    raise self._too_large(None)
                body += chunk
                if progress is not None:
                    progress(len(body), size)
            return bytes(body), _coding(response.headers) or probe.coding

    def _too_large(self, size: int | None) -> core.ExternalLocationError:
        has = "more bytes" if size is None else f"{size} bytes, more"
        text = f"the object has {has} than max_fetch_bytes={self._config.max_fetch_bytes}"
        return failed(text, code=core.Code.RESOURCE_EXHAUSTED)


_CHUNKS = 4096  # that are kept as they came; tiny ones would take many times their bytes


class _Ranges:
    """One object in parallel ranges; the slowest may be asked for a second time, and the first answer counts."""

    def __init__(
        self,
        fetcher: Fetcher,
        config: FetchConfig,
        url: str,
        validator: UrlValidator | None,
        job: Job,
        size: int,
        etag: str,
    ) -> None:
        self._fetcher, self._config, self._url, self._validator = fetcher, config, url, validator
        self._job, self._size, self._etag = job, size, etag
        self._starts = range(0, size, config.chunk_size_bytes)
        self._parts: dict[int, list[bytes]] = {}
        self._running: dict[concurrent.futures.Future[list[bytes]], tuple[int, float, Job]] = {}
        self._took: list[float] = []
        self._hedges = 0

    def fetch(self) -> bytes:
        """Return the whole, or raise the first failure; no thread is left behind."""
        waiting = collections.deque(range(len(self._starts)))
        workers = self._config.max_parallel_requests + max(self._config.max_speculative_hedges, 4)
        with concurrent.futures.ThreadPoolExecutor(workers, "vgi_rpc-fetch") as pool:
            try:
                while len(self._parts) < len(self._starts):
                    while waiting and len(self._running) < self._config.max_parallel_requests:
                        self._start(pool, waiting.popleft())
                    done, _ = concurrent.futures.wait(
                        self._running, min(self._job.left(), fetch.STEP_SECONDS), concurrent.futures.FIRST_COMPLETED
                    )
                    for future in done:
                        self._take(future)
                    self._hedge(pool)
            finally:
                for _, _, job in self._running.values():
                    job.over.set()
        return b"".join(chunk for index in range(len(self._starts)) for chunk in self._parts[index])

    def _start(self, pool: concurrent.futures.Executor, index: int) -> None:
        job = self._job.child()
        self._running[pool.submit(self._part, index, job)] = (index, time.monotonic(), job)

    def _take(self, future: concurrent.futures.Future[list[bytes]]) -> None:
        index, began, _ = self._running.pop(future)
        if index in self._parts:
            return
        twin = any(other == index for other, _, _ in self._running.values())
        if future.exception() is not None and twin:
            return
        self._parts[index] = future.result()
        self._took.append(time.monotonic() - began)
        for other, _, job in self._running.values():
            if other == index:
                job.over.set()
        if self._config.progress is not None:
            done = sum(len(chunk) for chunks in self._parts.values() for chunk in chunks)
            self._config.progress(done, self._size)

    def _hedge(self, pool: concurrent.futures.Executor) -> None:
        """Ask again for a part that takes much longer than the others did."""
        config = self._config
        if len(self._took) < 2 or not config.speculative_retry_multiplier:
            return
        late = time.monotonic() - max(
            config.speculative_retry_multiplier * statistics.median(self._took), fetch.STEP_SECONDS
        )
        counts = collections.Counter(index for index, _, _ in self._running.values())
        for index, began, _ in list(self._running.values()):
            if config.max_speculative_hedges and self._hedges >= config.max_speculative_hedges:
                return
            if began < late and counts[index] == 1 and index not in self._parts:
                self._hedges += 1
                self._start(pool, index)

    def _part(self, index: int, job: Job) -> list[bytes]:
        first = self._starts[index]
        last = min(first + self._config.chunk_size_bytes, self._size) - 1
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "zstd, gzip, identity"}
        if self._etag.startswith('"'):  # a weak one cannot say that bytes are equal
            headers["If-Range"] = self._etag
        with job.entered(), self._fetcher.open("GET", self._url, self._validator, headers) as response:
            if response.status == 200:
                raise TransientError(f"{redact_url(self._url)} changed while it was read, or has no ranges after all")
            if response.status != 206:
                raise _status_error(response.status, self._url)
            blocks: list[bytes] = []
            chunks: list[bytes] = []
            want = last - first + 1
            span = response.headers.get("content-range", f"bytes {first}-{last}/{self._size}")
            for chunk in response.body:
                chunks.append(chunk)
                want -= len(chunk)
                if want < 0:
                    break
                if len(chunks) == _CHUNKS:
                    blocks.append(b"".join(chunks))
                    chunks.clear()
        if want or span.lower().replace("/*", f"/{self._size}") != f"bytes {first}-{last}/{self._size}":
            raise TransientError(f"{redact_url(self._url)}: range mismatch: asked for {first}-{last}, got {span}")
        return [*blocks, *chunks]


def is_presigned(url: str) -> bool:
    """Whether a URL is signed for one method, so that HEAD is refused (S3, GCS, old and new forms)."""
    with contextlib.suppress(httpx.InvalidURL, ValueError, TypeError):
        keys = {key.lower() for key in httpx.URL(url).params}
        return any(names <= keys for names in _SIGNATURES)
    return False


def _status_error(status: int, url: str) -> Exception:
    text = f"{redact_url(url)} answered HTTP {status}"
    if status in _RETRYABLE or status >= 500:
        return TransientError(text)
    codes = {403: core.Code.PERMISSION_DENIED, 401: core.Code.PERMISSION_DENIED, 404: core.Code.NOT_FOUND}
    return failed(text, code=codes.get(status, core.Code.DATA_LOSS))


def _read_little(body: Iterable[bytes]) -> None:
    """Read a body that ought to be short, so that its connection can be kept."""
    total = 0
    for chunk in body:
        total += len(chunk)
        if total > _STEP_BYTES:
            break


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 16 else None


def _coding(headers: Mapping[str, str]) -> str:
    return headers.get("content-encoding", "").strip().lower()


def _cut(body: bytes) -> Iterator[bytes]:
    view = memoryview(body)
    for at in range(0, len(body), _CHUNK):
        yield bytes(view[at : at + _CHUNK])
