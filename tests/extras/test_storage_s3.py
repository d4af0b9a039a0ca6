# ruff: noqa: E402 (what may be missing is looked for first)
"""S3Storage against moto's S3 server over HTTP, GCSStorage against its own signatures."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa
import pytest

from tests.core import core
from tests.extras.storage_server import anything

for package in ("httpx", "boto3", "moto.server"):
    pytest.importorskip(package)

import boto3
import httpx
from moto.server import ThreadedMotoServer

from vgi_rpc_extras.storage import (
    Compression,
    FetchConfig,
    S3Storage,
    ServerExternalConfig,
    UploadUrlProvider,
    fetch_url,
)

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def storage(endpoint: str) -> S3Storage:
    found = S3Storage("bucket", endpoint_url=endpoint, region_name="us-east-1")
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="bucket")
    return found


class Blobs(Protocol):
    def blob(self, size: int) -> bytes: ...


class BlobsImpl:
    def blob(self, size: int) -> bytes:
        return bytes(size)


@pytest.mark.parametrize("codec", [None, "zstd", "gzip"])
def test_results_through_s3(storage: S3Storage, codec: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = ServerExternalConfig(
        storage, 10_000, compression=Compression(codec) if codec else None, url_validator=anything
    )
    with (
        caplog.at_level(logging.DEBUG, "vgi_rpc"),
        config.fetch_config,
        core.serve_pipe(Blobs, BlobsImpl(), external_location=config) as blobs,
    ):
        assert blobs.blob(2_000_000) == bytes(2_000_000)
        assert blobs.blob(10) == bytes(10)
    assert "put s3://bucket/vgi-rpc/" in caplog.text
    assert "X-Amz" not in caplog.text and "hunter2" not in caplog.text


def test_ranges_from_s3(storage: S3Storage) -> None:
    data = bytes(range(256)) * 4000
    url = storage.upload(data, SCHEMA)
    with FetchConfig(parallel_threshold_bytes=1, chunk_size_bytes=300_000) as config:
        assert fetch_url(url, config, url_validator=anything) == data
        missing = url.replace("/vgi-rpc/", "/elsewhere/")
        with pytest.raises(core.ExternalLocationError, match="HTTP 404") as caught:
            fetch_url(missing, config, url_validator=anything)
        assert "Signature" not in str(caught.value)


def test_what_is_stored(storage: S3Storage, endpoint: str) -> None:
    urls = [storage.upload(b"abc", SCHEMA, content_encoding=coding) for coding in (None, "zstd", "gzip")]
    assert [urlsplit(url).path.partition(".")[2] for url in urls] == ["arrow", "arrow.zst", "arrow"]
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    key = urlsplit(urls[1]).path.removeprefix("/bucket/")
    head = client.head_object(Bucket="bucket", Key=key)
    assert (head["ContentType"], head["ContentEncoding"]) == ("application/octet-stream", "zstd")
    assert "hunter2" not in repr(storage) and "127.0.0.1" not in repr(storage)


def test_upload_urls(storage: S3Storage) -> None:
    assert isinstance(storage, UploadUrlProvider)
    place = storage.generate_upload_url(SCHEMA)
    assert 3590 < place.expires_at.timestamp() - time.time() <= 3600
    kind = {"Content-Type": "application/vnd.apache.arrow.stream"}
    with httpx.Client() as client:
        assert client.put(place.upload_url, content=b"abc", headers=kind).status_code == 200
        assert client.get(place.download_url).content == b"abc"
    assert parse_qs(urlsplit(place.upload_url).query)["X-Amz-SignedHeaders"] == ["host"]
    assert place.upload_url != place.download_url


@pytest.mark.parametrize("region", ["eu-west-1", "us-east-1", "cn-north-1"])
def test_signatures_are_v4_and_regional(region: str) -> None:
    url = urlsplit(S3Storage("bkt", region_name=region).generate_upload_url(SCHEMA).download_url)
    suffix = ".cn" if region.startswith("cn-") else ""
    assert url.scheme == "https" and url.hostname == f"bkt.s3.{region}.amazonaws.com{suffix}"
    dotted = urlsplit(S3Storage("b.kt", region_name=region).generate_upload_url(SCHEMA).download_url)
    assert dotted.hostname == f"s3.{region}.amazonaws.com{suffix}" and dotted.path.startswith("/b.kt/")
    query = parse_qs(url.query)
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"] and f"/{region}/s3/" in query["X-Amz-Credential"][0]


def test_a_fork_has_a_client_of_its_own(storage: S3Storage, endpoint: str) -> None:
    first = storage._client()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            url = storage.upload(b"from the child", pa.schema([]))
            other = b"other" if storage._client() is not first else b"same"
            os.write(tell, other + url.encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    assert said.startswith(b"otherhttp")
    assert storage._client() is first
    assert storage.upload(b"from the parent", pa.schema([]))


def test_one_client_for_all_threads(storage: S3Storage) -> None:
    urls: list[str] = []
    threads = [threading.Thread(target=lambda: urls.append(storage.upload(b"x", SCHEMA))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(urls)) == 8 and len(storage._clients) == 1


# ---- GCS: no server here speaks it; what is signed can be read from the URL


@pytest.fixture(scope="module")
def signer() -> Any:
    pytest.importorskip("google.cloud.storage")
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from google.oauth2 import service_account

    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    info = {"client_email": "a@b.example", "token_uri": "https://t.example", "private_key": pem, "type": "x"}
    credentials: Any = service_account.Credentials
    return credentials.from_service_account_info(info)


def gcs(signer: Any, endpoint: str | None = None) -> Any:
    import google.cloud.storage

    from vgi_rpc_extras.storage import GCSStorage

    storage = GCSStorage("bkt", project="p")
    options = {"api_endpoint": endpoint} if endpoint else None
    storage._clients[os.getpid()] = google.cloud.storage.Client("p", credentials=signer, client_options=options)
    return storage


def test_gcs_upload_urls_do_not_sign_a_content_type(signer: Any) -> None:
    storage = gcs(signer)
    assert isinstance(storage, UploadUrlProvider)
    place = storage.generate_upload_url(SCHEMA)
    for url in (place.upload_url, place.download_url):
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        assert parts.hostname == "storage.googleapis.com" and parts.path.startswith("/bkt/vgi-rpc/")
        assert query["X-Goog-Algorithm"] == ["GOOG4-RSA-SHA256"] and query["X-Goog-SignedHeaders"] == ["host"]
        assert query["X-Goog-Expires"] == ["3600"]
    assert urlsplit(place.upload_url).path == urlsplit(place.download_url).path
    assert place.upload_url != place.download_url


def test_gcs_uploads(signer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.cloud.storage import Blob

    sent: list[tuple[Any, ...]] = []

    def upload(blob: Any, data: bytes, content_type: str) -> None:
        sent.append((blob.name.partition(".")[2], data, content_type, blob.content_encoding))

    monkeypatch.setattr(Blob, "upload_from_string", upload)
    storage = gcs(signer)
    url = storage.upload(b"abc", SCHEMA, content_encoding="zstd")
    storage.upload(b"abc", SCHEMA)
    assert sent == [
        ("arrow.zst", b"abc", "application/octet-stream", "zstd"),
        ("arrow", b"abc", "application/octet-stream", None),
    ]
    assert urlsplit(url).path.endswith(".arrow.zst")
