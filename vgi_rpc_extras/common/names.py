# Needs: pyarrow only. Used by the server, the client and authentication.
"""Headers and paths of the HTTP transport (http.md sections 1 and 2)."""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa

ARROW_CONTENT_TYPE: Final = "application/vnd.apache.arrow.stream"

MAX_REQUEST_BYTES_HEADER: Final = "VGI-Max-Request-Bytes"
MAX_RESPONSE_BYTES_HEADER: Final = "VGI-Max-Response-Bytes"
ACCEPT_MAX_RESPONSE_BYTES_HEADER: Final = "VGI-Accept-Max-Response-Bytes"
ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER: Final = "VGI-Accept-Max-Response-Bytes-Support"
MAX_EXTERNALIZED_RESPONSE_BYTES_HEADER: Final = "VGI-Max-Externalized-Response-Bytes"
EXTERNALIZATION_ENABLED_HEADER: Final = "VGI-Externalization-Enabled"
RPC_ERROR_HEADER: Final = "X-VGI-RPC-Error"
UPLOAD_URL_HEADER: Final = "VGI-Upload-URL-Support"
MAX_UPLOAD_BYTES_HEADER: Final = "VGI-Max-Upload-Bytes"
SUPPORTED_ENCODINGS_HEADER: Final = "VGI-Supported-Encodings"
CUSTOM_CONTENT_ENCODING_HEADER: Final = "X-VGI-Content-Encoding"
REQUEST_ID_HEADER: Final = "X-Request-ID"
AUTH_REASON_HEADER: Final = "VGI-Auth-Reason"
AUTH_PROXY_REQUIRED_HEADER: Final = "VGI-Auth-Proxy-Required"
OWN_KEY_HEADER: Final = "VGI-Own-Token-Key"  # ours: names a key that a process made for itself; doctor reads it
SESSION_HEADER: Final = "VGI-Session"
SESSION_ACCEPT_HEADER: Final = "VGI-Session-Accept"
SESSION_CLOSE_HEADER: Final = "VGI-Session-Close"
PROOF_HEADER: Final = "VGI-Proxy-Proof"
PROOF_REQUIRED_HEADER: Final = "VGI-Proxy-Proof-Required"
STICKY_ENABLED_HEADER: Final = "VGI-Sticky-Enabled"
STICKY_DEFAULT_TTL_HEADER: Final = "VGI-Sticky-Default-TTL"
STICKY_ECHO_HEADERS_HEADER: Final = "VGI-Sticky-Echo-Headers"
ECHO_HEADER_PREFIX: Final = "VGI-Echo-"

TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # what a header may be called (RFC 9110 section 5.6.2)

SESSION_NAME: Final = "__session__"  # DELETE {prefix}/__session__
CALL_NAME: Final = "__call__"  # POST {prefix}/__call__: calls with JSON (ours)
# What a server may not make its clients send: who they are, how the message is framed, and what this protocol says
# itself (sticky.md section 5; hop-by-hop: RFC 9110 section 7.6.1).
_NO_ECHO = re.compile(
    r"(content-|vgi-|proxy-|accept|sec-).*|x-vgi-(accept|content)-encoding|host|authorization|cookie|connection"
    r"|keep-alive|te|trailer|transfer-encoding|upgrade|expect|user-agent|x-request-id|traceparent|tracestate",
    re.IGNORECASE,
)

MIN_RESPONSE_BYTES: Final = 65_536
DEFAULT_MAX_RESPONSE_BYTES: Final = 268_435_456  # what clients accept unless they are told otherwise
MAX_SAFE_INTEGER: Final = 2**53 - 1  # what every language's JSON numbers hold


def check_size(name: str, value: int | None, low: int = 1) -> None:
    """ValueError unless `value` is a number of bytes that a header can carry, or None."""
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_SAFE_INTEGER
    ):
        raise ValueError(f"{name} must be an int within {low}..{MAX_SAFE_INTEGER}, got {value!r}")


MAX_UPLOAD_URL_COUNT: Final = 100
UPLOAD_URL_METHOD: Final = "__upload_url__"
UPLOAD_URL_PARAMS_SCHEMA: Final = pa.schema([("count", pa.int64())])
UPLOAD_URL_RESPONSE_SCHEMA: Final = pa.schema(
    [("upload_url", pa.string()), ("download_url", pa.string()), ("expires_at", pa.timestamp("us", "UTC"))]
)


def rpc_path(protocol: str, method: str, *, prefix: str = "", suffix: str = "") -> str:
    """The path of a method; `suffix` is "init" or "exchange" for a stream's."""
    return rpc_path_from_prefix(f"{prefix}/{protocol}", method, suffix=suffix)


def rpc_path_from_prefix(namespaced_prefix: str, method: str, *, suffix: str = "") -> str:
    """The path of a method below `{prefix}/{protocol}`."""
    return f"{namespaced_prefix}/{method}" + (f"/{suffix.lstrip('/')}" if suffix else "")


def reserved_path(method: str, *, prefix: str = "") -> str:
    """The path of a name that belongs to the server, not to a protocol."""
    return f"{prefix}/{method}"


def may_echo(name: str, value: str) -> bool:
    """Whether a client sends this header because a server asks for it: `VGI-Echo-<name>: <value>`."""
    return (
        len(name) <= 128
        and TOKEN.fullmatch(name) is not None
        and re.fullmatch(r"[\t -~]{0,1024}", value) is not None
        and _NO_ECHO.fullmatch(name) is None
    )
