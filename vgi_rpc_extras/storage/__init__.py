# Needs: httpx (fetching), boto3 (S3Storage), google-cloud-storage (GCSStorage).
# Install: pip install 'vgi-rpc-onefile[external,s3,gcs]'. Seam: BatchStore of the core, `external_location=`.
# ruff: noqa: F403 (the star imports are for type checkers; every module has __all__)
"""Large batches through S3, GCS or any other store (storage.md).

    storage = S3Storage("my-bucket")
    server = RpcServer(Service, impl, external_location=ServerExternalConfig(storage))
    http_connect(Service, url, external_location=ClientExternalConfig())

Names are found at first use: a server that only stores does not load what fetches, nor the other way round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import load

if TYPE_CHECKING:
    from ..common.urls import *
    from .fetch import *
    from .gcs import *
    from .s3 import *
    from .store import *

_NAMES = {
    "store": "ClientExternalConfig Compression ExternalLocationConfig ExternalStorage FetchConfig ServerExternalConfig"
    " UploadUrl UploadUrlProvider maybe_externalize_batch maybe_externalize_collector"
    " predict_externalize_bytes_for_batch predict_externalize_bytes_for_collector publish_external",
    "..common.urls": "https_only_validator is_public_address redact_url",
    "fetch": "fetch_url",
    "s3": "S3Storage",
    "gcs": "GCSStorage",
}
_EXTRA = {"fetch": "external"}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a checker would take any name for existing

    def __getattr__(name: str) -> Any:
        module = _WHERE.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = load(__name__, module, name, _EXTRA.get(module, module))
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
