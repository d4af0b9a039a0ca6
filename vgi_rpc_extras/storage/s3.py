# Needs: boto3. Install: pip install 'vgi-rpc-onefile[s3]'. Seam: `storage=` of ServerExternalConfig.
"""Objects in Amazon S3 and what speaks like it: MinIO, R2 (storage.md section 7)."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import botocore.config
import pyarrow as pa

from ._clients import client_of_this_process
from .store import UploadUrl

__all__ = ["S3Storage"]

_LOG = logging.getLogger("vgi_rpc.s3")


@dataclasses.dataclass(frozen=True)
class S3Storage:
    """Keeps objects in an S3 bucket; URLs are signed (SigV4) by the credentials that boto3 finds.

    Objects are never deleted: give the bucket a lifecycle rule for `prefix`.

    Args:
        presign_expiry_seconds: how long URLs are good for; temporary credentials may end them earlier.
        endpoint_url: of a service that is not Amazon's.
        put_kwargs: further arguments of PutObject, such as `{"ServerSideEncryption": "aws:kms"}`.
    """

    bucket: str
    prefix: str = "vgi-rpc/"
    presign_expiry_seconds: int = 3600
    region_name: str | None = None
    endpoint_url: str | None = dataclasses.field(default=None, repr=False)
    put_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    _clients: dict[int, Any] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        """Put an object and return a signed URL to GET it."""
        key = self._key(".arrow.zst" if content_encoding == "zstd" else ".arrow")
        coding = {} if content_encoding is None else {"ContentEncoding": content_encoding}
        self._client().put_object(
            Bucket=self.bucket, Key=key, Body=data, ContentType="application/octet-stream", **coding, **self.put_kwargs
        )
        _LOG.debug("put s3://%s/%s, %d bytes", self.bucket, key, len(data))
        return self._signed("get_object", key)

    def generate_upload_url(self, schema: pa.Schema) -> UploadUrl:
        """Return a signed URL to PUT an object of any type, and one to GET it."""
        key = self._key(".arrow")
        expires_at = datetime.now(UTC) + timedelta(seconds=self.presign_expiry_seconds)
        return UploadUrl(self._signed("put_object", key), self._signed("get_object", key), expires_at)

    def _key(self, suffix: str) -> str:
        return f"{self.prefix}{uuid.uuid4().hex}{suffix}"

    def _signed(self, operation: str, key: str) -> str:
        url: str = self._client().generate_presigned_url(
            operation, Params={"Bucket": self.bucket, "Key": key}, ExpiresIn=self.presign_expiry_seconds
        )
        return url

    def _client(self) -> Any:
        return client_of_this_process(self._clients, self._make_client)

    def _make_client(self) -> Any:
        """SigV4 and the region's own endpoint; boto3's default URLs are of the old form (storage.md section 7).

        For `virtual` addresses alone boto3 does not sign the global endpoint. A bucket with dots cannot have one: its
        name would not match the certificate.
        """
        region = self.region_name or boto3.Session().region_name or "us-east-1"
        endpoint, style = self.endpoint_url, "path"
        if endpoint is None and "." in self.bucket:
            endpoint = f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
        elif endpoint is None:
            style = "virtual"
        s3 = {"addressing_style": style, "us_east_1_regional_endpoint": "regional"}
        config = botocore.config.Config(signature_version="s3v4", s3=s3)
        return boto3.client("s3", region_name=region, endpoint_url=endpoint, config=config)
