# Needs: pyarrow only. Used by the server and the client.
"""Content codings of HTTP bodies: zstd, gzip, identity, through pyarrow's codecs (http.md section 4).

Whatever is unpacked has a bound. The bound is kept by reading at most so much, never from a size that the body
declares; a zstd window is only as large in memory as what has been unpacked into it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import os

import pyarrow as pa

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

MAX_DECODED_BYTES = 1 << 30  # of one body whose reader names no bound of its own
_MAX_CODINGS = 2
_GZIP_LEVEL = 6
_CHUNK = 1 << 16
_CHUNK_MAX = 1 << 24
_AT_ONCE = 1 << 20  # a size up to here is believed: what is allocated for it is no danger
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # RFC 8878 section 3.1.1


class Encoding(enum.StrEnum):
    """A content coding token; `identity` changes nothing and is never advertised."""

    ZSTD = "zstd"
    GZIP = "gzip"
    IDENTITY = "identity"


class DecompressionError(ValueError):
    """A body is not what its content coding says."""


class DecompressionLimitExceeded(DecompressionError):
    """A body unpacks to more than its reader accepts."""


def available_encodings() -> tuple[Encoding, ...]:
    """Codings this process can pack and unpack, best first; VGI_HTTP_DISABLE_ZSTD=1 leaves zstd out."""
    refused = {Encoding.ZSTD} if os.environ.get("VGI_HTTP_DISABLE_ZSTD") == "1" else set()
    return tuple(e for e in _BUILT_IN if e not in refused)


_BUILT_IN = tuple(e for e in (Encoding.ZSTD, Encoding.GZIP) if pa.Codec.is_available(e.value))


def parse_encoding_list(header_value: str) -> list[Encoding]:
    """Known codings of an Accept-Encoding value, in its order, without those of `q=0` (RFC 9110 section 12.5.3)."""
    found = []
    for item in header_value.split(","):
        token, *parameters = (part.strip().lower() for part in item.split(";"))
        if token in _TOKENS and not any(_is_zero_weight(p) for p in parameters):
            found.append(_TOKENS[token])
    return found


def _is_zero_weight(parameter: str) -> bool:
    name, _, weight = parameter.partition("=")
    return name.strip() == "q" and weight.strip().rstrip("0") in ("", "0.", ".") and weight.strip() != ""


_TOKENS = {encoding.value: encoding for encoding in Encoding}


@functools.lru_cache(maxsize=256)
def negotiate(custom: str, standard: str, produced: tuple[Encoding, ...]) -> tuple[Encoding, str] | None:
    """Choose how to pack a response (http.md section 4): the coding and the header that names it; None is plain.

    Args:
        custom: the value of X-VGI-Accept-Encoding, which is asked first.
        standard: the value of Accept-Encoding.
        produced: what the server packs, which is all it may choose.
    """
    first, rest = parse_encoding_list(custom), parse_encoding_list(standard)
    for encoding in [*first, *rest]:
        if encoding is Encoding.IDENTITY:
            return None
        if encoding in produced:
            only_custom = encoding in first and encoding not in rest
            return encoding, "X-VGI-Content-Encoding" if only_custom else "Content-Encoding"
    return None


def compress(encoding: Encoding, data: bytes, *, level: int | None = None) -> bytes:
    """Pack `data`; `level` is zstd's (default 1), gzip always uses 6. ValueError: not available here."""
    if encoding is Encoding.IDENTITY:
        return data
    _check_available(encoding)
    if encoding is Encoding.GZIP:
        level = _GZIP_LEVEL
    # A codec of its own for each use: gzip's keeps state, so that threads cannot share one.
    codec = pa.Codec(encoding.value, compression_level=1 if level is None else level)
    packed: bytes = codec.compress(data, asbytes=True)
    return packed


def decompress(encoding: Encoding, data: bytes, *, max_output_size: int | None = None) -> bytes:
    """Unpack `data` to at most `max_output_size` bytes (MAX_DECODED_BYTES when None).

    Several zstd frames or gzip members are joined, as RFC 8878 and RFC 1952 say.

    Raises:
        ValueError: the coding is not available here.
        DecompressionLimitExceeded: there is more.
        DecompressionError: empty, truncated, or not of this coding.
    """
    limit = MAX_DECODED_BYTES if max_output_size is None else max_output_size
    chunks = [data] if encoding is Encoding.IDENTITY else _unpack(encoding, data, limit)
    if sum(map(len, chunks)) > limit:
        raise DecompressionLimitExceeded(f"the {encoding.value} body unpacks to more than {limit} bytes")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _unpack(encoding: Encoding, data: bytes, limit: int) -> list[bytes]:
    """Chunks of the unpacked body, one byte more than `limit` at most; each chunk is allocated when it is read."""
    _check_available(encoding)
    if not data:
        raise DecompressionError(f"the {encoding.value} body is empty")
    size = _declared_size(data) if encoding is Encoding.ZSTD else 0
    if 0 < size <= min(limit, _AT_ONCE):
        with contextlib.suppress(
            OSError, pa.ArrowException
        ):  # another frame follows, or it is no such frame: read on below
            return [pa.decompress(data, decompressed_size=size, codec="zstd", asbytes=True)]
    chunks: list[bytes] = []
    room, size = limit + 1, _CHUNK
    try:
        with pa.CompressedInputStream(pa.BufferReader(data), encoding.value) as stream:
            while room > 0:
                chunk: bytes = stream.read(min(room, size))
                if not chunk:
                    break
                chunks.append(chunk)
                room -= len(chunk)
                size = min(size * 2, _CHUNK_MAX)
    except (OSError, pa.ArrowException, ValueError) as exc:
        raise DecompressionError(f"the body does not unpack as {encoding.value}") from exc
    return chunks


def _declared_size(data: bytes) -> int:
    """What a zstd frame says it unpacks to; 0 when it does not (RFC 8878 section 3.1.1.1)."""
    if data[:4] != _ZSTD_MAGIC or len(data) < 18:
        return 0
    descriptor = data[4]
    single, width = descriptor >> 5 & 1, (0, 2, 4, 8)[descriptor >> 6]
    if single and not width:
        width = 1
    at = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    return int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0)


def _check_available(encoding: Encoding) -> None:
    if encoding not in available_encodings():
        raise ValueError(f"content coding {encoding.value} is not available here")


def decode_content_encoding(data: bytes, content_encoding: str | None, *, max_output_size: int | None = None) -> bytes:
    """Undo a Content-Encoding value: a comma list is undone last to first, unknown codings are left alone.

    Raises what `decompress` raises, and DecompressionError for more than two codings: nobody needs them, and each
    costs the work of unpacking up to the bound.
    """
    found = [_TOKENS.get(token.strip().lower()) for token in (content_encoding or "").split(",")]
    codings = [encoding for encoding in found if encoding is not None and encoding is not Encoding.IDENTITY]
    if len(codings) > _MAX_CODINGS:
        raise DecompressionError(f"the body has {len(codings)} codings; at most {_MAX_CODINGS} are undone")
    for encoding in reversed(codings):
        data = decompress(encoding, data, max_output_size=max_output_size)
    return data
