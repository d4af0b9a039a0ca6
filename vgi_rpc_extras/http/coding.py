# Needs: pyarrow only.
"""Where programs import the content codings from; they are in `common.coding`, because storage reads bodies as well."""

from ..common.coding import (
    MAX_DECODED_BYTES,
    DecompressionError,
    DecompressionLimitExceeded,
    Encoding,
    available_encodings,
    compress,
    decode_content_encoding,
    decompress,
    negotiate,
    parse_encoding_list,
)

__all__ = [
    "MAX_DECODED_BYTES",
    "DecompressionError",
    "DecompressionLimitExceeded",
    "Encoding",
    "available_encodings",
    "compress",
    "decode_content_encoding",
    "decompress",
    "negotiate",
    "parse_encoding_list",
]
