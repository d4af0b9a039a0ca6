# Needs: pyarrow only.
"""Where programs import the content codings from; they are in `common.coding`, because storage reads bodies as well."""

from ..common.coding import MAX_DECODED_BYTES as MAX_DECODED_BYTES
from ..common.coding import DecompressionError as DecompressionError
from ..common.coding import DecompressionLimitExceeded as DecompressionLimitExceeded
from ..common.coding import Encoding as Encoding
from ..common.coding import available_encodings as available_encodings
from ..common.coding import compress as compress
from ..common.coding import decode_content_encoding as decode_content_encoding
from ..common.coding import decompress as decompress
from ..common.coding import negotiate as negotiate
from ..common.coding import parse_encoding_list as parse_encoding_list
