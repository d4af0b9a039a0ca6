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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fetch import *
    from .gcs import *
    from .policy import *
    from .s3 import *
    from .store import *

_NAMES = {
    "store": "ClientExternalConfig Compression ExternalLocationConfig ExternalStorage FetchConfig ServerExternalConfig"
    " UploadUrl UploadUrlProvider maybe_externalize_batch maybe_externalize_collector"
    " predict_externalize_bytes_for_batch predict_externalize_bytes_for_collector publish_external",
    "policy": "https_only_validator is_public_address redact_url",
    "fetch": "fetch_url",
    "s3": "S3Storage",
    "gcs": "GCSStorage",
}
_EXTRA = {"fetch": "external"}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def _load(name: str) -> Any:
    """The object behind a lazy name. ImportError says which package is missing and how to get it."""
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as exc:
        if not exc.name or exc.name.startswith(__name__):
            raise
        extra = _EXTRA.get(module, module)
        raise ImportError(
            f"{name} needs the package {exc.name!r}, which is not installed: pip install 'vgi-rpc-onefile[{extra}]'",
            name=exc.name,
        ) from exc
    globals()[name] = found
    return found


if not TYPE_CHECKING:  # a checker would take any name for existing

    def __getattr__(name: str) -> Any:
        return _load(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
