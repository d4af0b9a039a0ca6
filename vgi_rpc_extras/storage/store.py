# Needs: pyarrow only; httpx when something is fetched. Install: pip install 'vgi-rpc-onefile[external]'.
# Seam: BatchStore of the core, `external_location=`; and `upload_request` of the HTTP client.
"""The big-batch store (storage.md): decide, compress, upload; fetch, verify.

A configuration is the store: `RpcServer(..., external_location=ServerExternalConfig(storage))`. The core writes and
reads the objects; this module handles bytes and URLs. No URL is shown with its query: it is a credential.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
import time
import types
import weakref
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.ipc as ipc

from .. import core as _bound_core
from ..common import names
from ..common.urls import UrlValidator, https_only_validator, redact_url

if TYPE_CHECKING:
    import vgi_rpc as core

    from .fetch import Fetcher, Job
else:
    core = _bound_core()

__all__ = [
    "ClientExternalConfig",
    "Compression",
    "ExternalLocationConfig",
    "ExternalStorage",
    "FetchConfig",
    "ServerExternalConfig",
    "UploadUrl",
    "UploadUrlProvider",
    "maybe_externalize_batch",
    "maybe_externalize_collector",
    "predict_externalize_bytes_for_batch",
    "predict_externalize_bytes_for_collector",
    "publish_external",
]

_LOG = logging.getLogger("vgi_rpc.external")
_NOT_SUPPORTED = ("protocol_not_supported", "method_not_implemented")
_LOG_FETCH = logging.getLogger("vgi_rpc.external_fetch")
_MAX_ATTEMPTS = 3  # storage.md section 5: more would multiply with redirects, ranges and hedges
_DECODED_FACTOR = 16
_DECODED_DEFAULT = 1 << 30  # storage.md section 11: 16 times the encoded cap is too much by default


@runtime_checkable
class ExternalStorage(Protocol):
    """Where objects are put. Several threads use it at the same time."""

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        """Put an object and return a URL from which it can be fetched, with `content_encoding` as its header."""
        ...


@dataclasses.dataclass(frozen=True)
class UploadUrl:
    """A place for one object: one URL to PUT it, another to GET it, until when. Both are credentials."""

    upload_url: str = dataclasses.field(repr=False)
    download_url: str = dataclasses.field(repr=False)
    expires_at: datetime


@runtime_checkable
class UploadUrlProvider(Protocol):
    """Makes places for the objects of clients. Several threads use it at the same time."""

    def generate_upload_url(self, schema: pa.Schema) -> UploadUrl:
        """Return a new place; each of its URLs is good for one method only."""
        ...


@dataclasses.dataclass(frozen=True)
class Compression:
    """How objects are compressed as a whole; `level` is that of the algorithm. ValueError for what does not exist."""

    algorithm: Literal["zstd", "gzip"] = "zstd"
    level: int = 3

    def __post_init__(self) -> None:
        """Refuse what pyarrow cannot do."""
        if self.algorithm not in ("zstd", "gzip"):
            raise ValueError(f"algorithm must be 'zstd' or 'gzip', got {self.algorithm!r}")
        pa.Codec(self.algorithm, compression_level=self.level)  # ValueError: no such level

    def compress(self, data: bytes) -> bytes:
        """Return `data` compressed."""
        packed: bytes = pa.Codec(self.algorithm, compression_level=self.level).compress(data, asbytes=True)
        return packed


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Bounds of fetching. It owns the connections: `close()` or a `with` block ends them, and it can be used again.

    Args:
        parallel_threshold_bytes: objects of this size are fetched in ranges, if their server has them.
        chunk_size_bytes, max_parallel_requests: of one range, and how many at a time.
        timeout_seconds: for all of one fetch or upload, with its retries.
        max_fetch_bytes: of an object as it is stored.
        max_decompressed_bytes: of an object decoded; None: 16 times that, at most 1 GiB (or `max_fetch_bytes`).
        max_redirects: 0 follows none.
        speculative_retry_multiplier: a range that takes so many times the median is asked for once more; 0: never.
        max_speculative_hedges: how many ranges of one object may be asked for twice; 0: any number.
        progress: called with the bytes fetched so far and, if known, their total.

    Raises ValueError for numbers that make no sense.
    """

    parallel_threshold_bytes: int = 64 << 20
    chunk_size_bytes: int = 8 << 20
    max_parallel_requests: int = 8
    timeout_seconds: float = 60.0
    max_fetch_bytes: int = 256 << 20
    max_decompressed_bytes: int | None = None
    max_redirects: int = 5
    speculative_retry_multiplier: float = 2.0
    max_speculative_hedges: int = 4
    progress: Callable[[int, int | None], None] | None = None
    _open: _Open = dataclasses.field(default_factory=lambda: _Open(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("chunk_size_bytes", "max_parallel_requests", "timeout_seconds", "max_fetch_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("parallel_threshold_bytes", "max_redirects", "speculative_retry_multiplier"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_speculative_hedges < 0 or (self.max_decompressed_bytes or 0) < 0:
            raise ValueError("max_speculative_hedges and max_decompressed_bytes must not be negative")

    @property
    def decoded_cap(self) -> int:
        """The bound on decoded bytes."""
        if self.max_decompressed_bytes is not None:
            return self.max_decompressed_bytes
        return min(_DECODED_FACTOR * self.max_fetch_bytes, max(_DECODED_DEFAULT, self.max_fetch_bytes))

    def fetcher(self, private_addresses: bool) -> Fetcher:
        """Return what holds the connections; those that may reach private addresses are kept apart."""
        return self._open.get(self, private_addresses)

    def close(self) -> None:
        """Close the kept connections."""
        self._open.close()

    def __enter__(self) -> FetchConfig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _fetch_config, ({f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init},)


def _fetch_config(values: dict[str, Any]) -> FetchConfig:
    return FetchConfig(**values)


def _fetching() -> types.ModuleType:
    """The module that needs httpx; an ExternalLocationError says how to get that."""
    try:
        from . import fetch
    except ModuleNotFoundError as exc:
        raise core.ExternalLocationError(
            f"fetching needs the package {exc.name!r}, which is not installed: pip install 'vgi-rpc-onefile[external]'",
            error_code=core.Code.FAILED_PRECONDITION,
        ) from None
    return fetch


class _Open:
    """The connections of a FetchConfig, of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetchers: dict[tuple[int, bool], Fetcher] = {}

    def get(self, config: FetchConfig, private_addresses: bool) -> Fetcher:
        key = (os.getpid(), private_addresses)
        with self._lock:
            found = self._fetchers.get(key)
            if found is None:
                # A copy without this: the connections must not keep the configuration alive that ends them.
                found = self._fetchers[key] = _fetching().Fetcher(dataclasses.replace(config), private_addresses)
                weakref.finalize(self, found.pool.close)
            return found

    def close(self) -> None:
        with self._lock:
            fetchers, self._fetchers = self._fetchers, {}
        for fetcher in fetchers.values():
            fetcher.pool.close()


# ---- the two configurations


@dataclasses.dataclass(frozen=True)
class ClientExternalConfig:
    """Fetches what a server keeps elsewhere, and uploads requests that are too large for it.

    Args:
        max_retries: further attempts at a fetch, 2 at most; refusals (HTTP 4xx, checksum, size) are not repeated.
        retry_delay_seconds: between attempts.
        url_validator: raises ValueError for a URL that is refused, also for each redirect's target; None: any.
    """

    max_retries: int = 2
    retry_delay_seconds: float = 0.5
    fetch_config: FetchConfig = dataclasses.field(default_factory=FetchConfig)
    url_validator: UrlValidator | None = https_only_validator

    def wants(self, batch: pa.RecordBatch) -> bool:
        """Never: a client stores nothing of its own accord."""
        return False

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        """Refuse: there is no storage here."""
        raise core.ExternalLocationError("no storage is configured", error_code=core.Code.FAILED_PRECONDITION)

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        """Fetch an object and check its digest; returns its decoded bytes and the seconds it took.

        Raises ExternalLocationError, DeadlineExceededError when `timeout` seconds have passed.
        """
        began = time.monotonic()
        if sha256 is not None:
            sha256 = _check_digest(sha256)
        data = self._attempts(url, _fetching().Job(self.fetch_config.timeout_seconds, timeout))
        if sha256 is not None and (got := hashlib.sha256(data).hexdigest()) != sha256:
            raise core.ExternalLocationError(
                f"SHA-256 checksum mismatch for {redact_url(url)}: expected {sha256}, got {got}"
            )
        seconds = time.monotonic() - began
        _LOG_FETCH.debug("fetched %d bytes from %s in %.1f ms", len(data), redact_url(url), seconds * 1000)
        return data, seconds

    def upload_request(self, transport: Any, body: bytes) -> bytes:
        """Put a complete request where the server says, and return the small one that points to it (http.md 15.2).

        Raises ExternalLocationError, and what the HTTP client's requests raise.
        """
        return self.upload_to(vend_upload_urls(transport, 1)[0], body)

    def upload_to(self, place: UploadUrl, body: bytes) -> bytes:
        """Put a complete request there, and return the small one that points to it. ExternalLocationError.

        Nothing of the caller's credentials goes with it.
        """
        fetch = _fetching()
        fetch.check_url(place.download_url, self.url_validator)
        try:
            self._fetcher().put(
                place.upload_url,
                self.url_validator,
                fetch.Job(self.fetch_config.timeout_seconds, None),
                body,
                "application/vnd.apache.arrow.stream",
            )
        except fetch.TransientError as exc:
            raise _upload_failed(str(exc)) from None
        except core.ExternalLocationError as exc:
            raise _upload_failed(exc.error_message) from None
        _LOG.debug("uploaded a request of %d bytes to %s", len(body), redact_url(place.upload_url))
        return _pointer_request(body, place.download_url)

    def _fetcher(self) -> Fetcher:
        return self.fetch_config.fetcher(self._allows_private())

    def _allows_private(self) -> bool:
        return True

    def _attempts(self, url: str, job: Job) -> bytes:
        fetch = _fetching()
        count = min(max(self.max_retries, 0), _MAX_ATTEMPTS - 1) + 1
        reason = ""
        for attempt in range(count):
            if attempt:
                time.sleep(min(self.retry_delay_seconds, job.left()))
            try:
                data: bytes = fetch.decode(*self._fetcher().fetch(url, self.url_validator, job), self.fetch_config)
                return data
            except fetch.TransientError as exc:
                reason = str(exc)
                _LOG_FETCH.debug("attempt %d failed: %s", attempt + 1, reason)
        raise fetch.failed(
            f"Failed to resolve ExternalLocation after {count} attempts: {redact_url(url)}: {reason}",
            code=core.Code.UNAVAILABLE,
        )


@dataclasses.dataclass(frozen=True)
class ServerExternalConfig(ClientExternalConfig):
    """Keeps results that are too large to travel in a storage, and fetches arguments that are kept elsewhere.

    Without a storage it only fetches. What it fetches is named by clients, so by default it reaches https URLs on
    public addresses alone, checked after the name has been resolved, on every redirect.

    Args:
        storage: where results go; objects are never deleted, so give the bucket a lifecycle rule.
        externalize_threshold_bytes: a batch of this size or more is stored (`nbytes`: what is in it, not its parents).
        compression: of objects, None: none.
        private_addresses: whether to reach loopback, private and link-local addresses. None: only if a `url_validator`
            of your own decides what is fetched.

    Raises ValueError for a negative threshold.
    """

    storage: ExternalStorage | None = None
    externalize_threshold_bytes: int = 1_048_576
    compression: Compression | None = None
    private_addresses: bool | None = None

    def __init__(
        self,
        storage: ExternalStorage | None = None,
        externalize_threshold_bytes: int = 1_048_576,
        max_retries: int = 2,
        retry_delay_seconds: float = 0.5,
        fetch_config: FetchConfig | None = None,
        compression: Compression | None = None,
        url_validator: UrlValidator | None = https_only_validator,
        *,
        private_addresses: bool | None = None,
    ) -> None:
        if externalize_threshold_bytes < 0:
            raise ValueError(f"externalize_threshold_bytes must not be negative, got {externalize_threshold_bytes}")
        super().__init__(max_retries, retry_delay_seconds, fetch_config or FetchConfig(), url_validator)
        values = {
            "storage": storage,
            "externalize_threshold_bytes": externalize_threshold_bytes,
            "compression": compression,
            "private_addresses": private_addresses,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def wants(self, batch: pa.RecordBatch) -> bool:
        """Whether a batch is so large that it goes to the storage."""
        return self.storage is not None and batch.nbytes >= self.externalize_threshold_bytes

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        """Compress and upload an object; returns its URL, the digest of the raw bytes, and the bytes stored.

        Raises ExternalLocationError.
        """
        if self.storage is None:
            return super().save(schema, data)
        url, stored = _upload(self.storage, self.compression, schema, data)
        return url, hashlib.sha256(data).hexdigest(), stored

    def _allows_private(self) -> bool:
        if self.private_addresses is None:
            return self.url_validator not in (None, https_only_validator)
        return self.private_addresses


ExternalLocationConfig = ServerExternalConfig


def _upload(
    storage: ExternalStorage, compression: Compression | None, schema: pa.Schema, data: bytes
) -> tuple[str, int]:
    packed = data if compression is None else compression.compress(data)
    coding = None if compression is None else compression.algorithm
    try:
        url = storage.upload(packed, schema, content_encoding=coding)
    except Exception as exc:  # of a library: it may show a signed URL
        _LOG.warning("an upload of %d bytes failed: %s", len(packed), type(exc).__name__)
        raise core.ExternalLocationError(
            f"The upload of {len(packed)} bytes to the storage failed: {type(exc).__name__}",
            error_code=core.Code.UNAVAILABLE,
        ) from None
    _LOG.debug("stored %d bytes (%d before compression) at %s", len(packed), len(data), redact_url(url))
    return url, len(packed)


def _check_digest(sha256: str) -> str:
    sha256 = sha256.lower()
    if len(sha256) != 64 or sha256.strip("0123456789abcdef"):
        raise core.ExternalLocationError("The pointer's SHA-256 checksum is not 64 hex digits")
    return sha256


def _upload_failed(why: str) -> core.ExternalLocationError:
    return core.ExternalLocationError(
        f"The request could not be uploaded: {why}",
        error_type="ExternalUploadFailed",
        error_code=core.Code.UNAVAILABLE,
        sent="no",
    )


def _pointer_request(body: bytes, url: str) -> bytes:
    """The request of `body` as a pointer: its schema and what it says, without the row (wire.md section 12)."""
    reader = ipc.open_stream(pa.py_buffer(body))
    _, metadata = reader.read_next_batch_with_custom_metadata()
    _, pointer = core.make_external_location_batch(reader.schema, url, hashlib.sha256(body).hexdigest())
    return core.serialize_record_batch_bytes(core.empty_batch(reader.schema), core.merge_metadata(metadata, pointer))


# ---- places to upload to


def vend_upload_urls(transport: Any, count: int, timeout: float | None = 30.0) -> list[UploadUrl]:
    """`request_upload_urls` over an existing connection."""
    request = pa.RecordBatch.from_pydict({"count": [count]}, schema=names.UPLOAD_URL_PARAMS_SCHEMA)
    metadata = pa.KeyValueMetadata(
        {core.RPC_METHOD_KEY: names.UPLOAD_URL_METHOD.encode(), core.REQUEST_VERSION_KEY: core.REQUEST_VERSION}
    )
    body = core.serialize_record_batch_bytes(request, metadata)
    doing = "request for upload URLs"
    try:
        reply = core.read_reply(transport.builtin(names.UPLOAD_URL_METHOD, body, timeout=timeout, doing=doing))
    except core.RpcError as exc:
        if exc.error_kind not in _NOT_SUPPORTED:
            raise
        raise core.RpcError(
            "NotSupported",
            "this server vends no upload URLs (make_wsgi_app needs upload_url_provider=)",
            error_code=core.Code.UNIMPLEMENTED,
        ) from None
    if not reply.schema.equals(names.UPLOAD_URL_RESPONSE_SCHEMA) or not reply.num_rows:
        raise core.RpcError("ProtocolError", f"{doing}: the answer holds no upload URLs")
    if reply.num_rows > names.MAX_UPLOAD_URL_COUNT:
        raise core.RpcError("ProtocolError", f"{doing}: the answer holds {reply.num_rows} upload URLs")
    if any(column.null_count for column in reply.columns):
        raise core.RpcError("ProtocolError", f"{doing}: the answer has a null where a URL or a time should be")
    try:
        columns: list[list[Any]] = [column.to_pylist() for column in reply.columns]
    except (ValueError, OverflowError):  # a time that datetime does not have
        raise core.RpcError("ProtocolError", f"{doing}: the answer has an expires_at that is no time") from None
    return [UploadUrl(*row) for row in zip(*columns, strict=True)]


# ---- by hand


def publish_external(
    batch: pa.RecordBatch,
    storage: ExternalStorage,
    compression: Compression | None = None,
    *,
    include_sha256: bool = True,
) -> core.ExternalRef:
    """Upload a result once; methods may return the reference as often as they like. ValueError unless it has one row.

    Raises ExternalLocationError when the upload fails.
    """
    if batch.num_rows != 1:
        raise ValueError(f"a result batch has one row, got {batch.num_rows}")
    data = core.serialize_record_batch_bytes(batch)
    url, _ = _upload(storage, compression, batch.schema, data)
    return core.ExternalRef(url, hashlib.sha256(data).hexdigest() if include_sha256 else None)


def maybe_externalize_batch(
    batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None, config: ServerExternalConfig
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None, int]:
    """Return a pointer to the batch if `config` stores it, else itself; and the raw bytes that were stored."""
    found = core.externalize(config, batch, [(batch, custom_metadata)])
    return (batch, custom_metadata, 0) if found is None else (found.batch, found.metadata, found.raw_bytes)


def maybe_externalize_collector(
    out: core.OutputCollector, config: ServerExternalConfig
) -> tuple[list[tuple[pa.RecordBatch, pa.KeyValueMetadata | None]], int]:
    """Return what a turn has collected, or the one pointer that stands for it; and the raw bytes that were stored."""
    items = [(item.batch, item.custom_metadata) for item in out.batches]
    data = _data_of(out)
    found = None if data is None else core.externalize(config, data, items)
    return (items, 0) if found is None else ([(found.batch, found.metadata)], found.raw_bytes)


def predict_externalize_bytes_for_batch(batch: pa.RecordBatch, config: ServerExternalConfig) -> int:
    """Return the size of the batch if `config` would store it, else 0."""
    return batch.nbytes if batch.num_rows and config.wants(batch) else 0


def predict_externalize_bytes_for_collector(out: core.OutputCollector, config: ServerExternalConfig) -> int:
    """Return the size of the turn's data batch if `config` would store it, else 0."""
    data = _data_of(out)
    return 0 if data is None else predict_externalize_bytes_for_batch(data, config)


def _data_of(out: core.OutputCollector) -> pa.RecordBatch | None:
    try:
        return out.data_batch.batch
    except RuntimeError:
        return None
