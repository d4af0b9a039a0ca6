# Needs: google-cloud-storage. Install: pip install 'vgi-rpc-onefile[gcs]'. Seam: `storage=` of ServerExternalConfig.
"""Objects in Google Cloud Storage (storage.md section 8)."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import google.cloud.storage
import pyarrow as pa

from ._clients import client_of_this_process
from .store import UploadUrl

__all__ = ["GCSStorage"]

_LOG = logging.getLogger("vgi_rpc.gcs")


@dataclasses.dataclass(frozen=True)
class GCSStorage:
    """Keeps objects in a bucket of Google Cloud Storage; URLs are signed (V4), so the credentials must be able to sign.

    Objects are never deleted: give the bucket a lifecycle rule for `prefix`.

    Args:
        presign_expiry_seconds: how long URLs are good for, 7 days at most.
        project: of the bucket; None: that of the credentials.
    """

    bucket: str
    prefix: str = "vgi-rpc/"
    presign_expiry_seconds: int = 3600
    project: str | None = None
    _clients: dict[int, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        """Put an object and return a signed URL to GET it."""
        blob = self._blob(".arrow.zst" if content_encoding == "zstd" else ".arrow")
        if content_encoding is not None:
            blob.content_encoding = content_encoding
        blob.upload_from_string(data, content_type="application/octet-stream")
        _LOG.debug("put gs://%s/%s, %d bytes", self.bucket, blob.name, len(data))
        return self._signed(blob, "GET")

    def generate_upload_url(self, schema: pa.Schema) -> UploadUrl:
        """Return a signed URL to PUT an object, and one to GET it.

        No content type is signed: a bucket refuses one that differs from what the client sends (storage.md section 8).
        """
        blob = self._blob(".arrow")
        expires_at = datetime.now(UTC) + timedelta(seconds=self.presign_expiry_seconds)
        return UploadUrl(self._signed(blob, "PUT"), self._signed(blob, "GET"), expires_at)

    def _blob(self, suffix: str) -> Any:
        return self._client().bucket(self.bucket).blob(f"{self.prefix}{uuid.uuid4().hex}{suffix}")

    def _signed(self, blob: Any, method: str) -> str:
        expiration = timedelta(seconds=self.presign_expiry_seconds)
        url: str = blob.generate_signed_url(version="v4", expiration=expiration, method=method)
        return url

    def _client(self) -> Any:
        return client_of_this_process(self._clients, lambda: google.cloud.storage.Client(project=self.project))
