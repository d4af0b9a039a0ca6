# Needs: falcon, httpx, cryptography (and waitress to serve). Install: pip install 'vgi-rpc-onefile[http]'.
"""HTTP for vgi_rpc: server, client, in-process test client; the names of authentication are found here, too.

Names are found at first use, so that a client does not load the server, nor a server the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import auth, load

if TYPE_CHECKING:
    from ..auth import *  # noqa: F403
    from ..common.coding import *  # noqa: F403
    from ..common.names import *  # noqa: F403
    from .client import *  # noqa: F403
    from .serve import *  # noqa: F403
    from .server import *  # noqa: F403
    from .sessions import *  # noqa: F403
    from .testing import *  # noqa: F403
    from .uploads import *  # noqa: F403

_WHERE = {
    name: module
    for module, listed in {
        "client": (
            "http_connect http_introspect http_capabilities HttpRetryConfig HttpServerCapabilities"
            " HttpStreamSession HttpTransientError HttpTransport RequestUploader SessionView with_session_token"
        ),
        "..common.coding": (
            "DecompressionError DecompressionLimitExceeded Encoding available_encodings compress"
            " decode_content_encoding decompress parse_encoding_list"
        ),
        "..common.names": (
            "ACCEPT_MAX_RESPONSE_BYTES_HEADER ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER ARROW_CONTENT_TYPE"
            " AUTH_PROXY_REQUIRED_HEADER AUTH_REASON_HEADER ECHO_HEADER_PREFIX EXTERNALIZATION_ENABLED_HEADER"
            " MAX_EXTERNALIZED_RESPONSE_BYTES_HEADER MAX_REQUEST_BYTES_HEADER MAX_RESPONSE_BYTES_HEADER"
            " MAX_UPLOAD_BYTES_HEADER MAX_UPLOAD_URL_COUNT PROOF_HEADER PROOF_REQUIRED_HEADER RPC_ERROR_HEADER"
            " SESSION_ACCEPT_HEADER SESSION_CLOSE_HEADER SESSION_HEADER STICKY_DEFAULT_TTL_HEADER"
            " STICKY_ECHO_HEADERS_HEADER STICKY_ENABLED_HEADER SUPPORTED_ENCODINGS_HEADER UPLOAD_URL_HEADER"
            " UPLOAD_URL_METHOD UPLOAD_URL_PARAMS_SCHEMA UPLOAD_URL_RESPONSE_SCHEMA reserved_path rpc_path"
            " rpc_path_from_prefix"
        ),
        "serve": "serve_http waitress_arrow_tuning",
        "server": "ResponseTooLargeError make_wsgi_app",
        "sessions": "DrainHandle FLY_MACHINE_ID auto_server_id drain_handle fly_sticky_echo_headers",
        "testing": "TestClient TestResponse make_sync_client",
        "uploads": "request_upload_urls",
    }.items()
    for name in listed.split()
}
_ALIASES = {
    "_ARROW_CONTENT_TYPE": "ARROW_CONTENT_TYPE",
    "_SyncTestClient": "TestClient",
    "_SyncTestResponse": "TestResponse",
}

__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a checker would take any name for existing

    def __getattr__(name: str) -> Any:
        wanted = _ALIASES.get(name, name)
        if wanted in auth.__all__:
            return getattr(auth, wanted)
        if wanted not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = load(__name__, _WHERE[wanted], wanted, "http")
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
