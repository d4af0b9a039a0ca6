# Needs: cryptography. Install: pip install 'vgi-rpc-onefile[http]'. Seam: `seal` of ServerRequest.
"""A stream's state as two sealed tokens, so that any replica with the key continues any stream (http.md section 7.3).

    CALL  what never changes: call id, stream id, schemas, call state, response limit. Issued once by `init`.
    CUR   what changes every turn: the call id it belongs to, and the state.

    plaintext = codec (0 raw, 1 zstd), payload           CALL = created f64, call id 16, stream id 16, limit u64,
    sealed    = version u8, nonce 12, AES-256-GCM-SIV            call state kind u8, 3 x (u32 size, bytes)
    value     = base64 of that                           CUR  = created f64, call id 16, state kind u8, state

The associated data names kind, caller, protocol, method and state classes, each with its length. The state's class is
one of those that the method declares, given by its place in the annotation: a token never names a class.
"""

from __future__ import annotations

import base64
import binascii
import collections
import hashlib
import hmac
import inspect
import logging
import os
import struct
import threading
import time
import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from .. import core as _bound_core
from ..common.coding import DecompressionError, Encoding, compress, decompress

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

_LOG = logging.getLogger("vgi_rpc.http")
_VERSION = b"\x01"
_NONCE = 12
_RAW, _ZSTD = b"\x00", b"\x01"
_COMPRESS_FROM = 1024  # below, packing costs more than sending
_MAX_PAYLOAD = 64 << 20
_CALL = struct.Struct("<d16s16sQB")
_CUR = struct.Struct("<d16sB")
_SIZE = struct.Struct("<I")
_NO_KIND = 255
_UNVERIFIED = "State token verification failed"
_OWN_KEY = (
    ": this process made a key of its own, so it continues only streams that it began itself; give all processes of the"
    " service the same token_key= (worker --http: VGI_RPC_TOKEN_KEY)"
)
_OTHER_KEY = ": do all processes of the service have the same token_key= (worker --http: VGI_RPC_TOKEN_KEY)?"
_CACHE_SECONDS = 3600.0
_CACHE_BYTES = 64 << 20  # of all calls that are remembered
_CACHE_ENTRY_BYTES = 1 << 20  # of one; the token of a larger one is opened every time
_HAS_ZSTD = pa.Codec.is_available("zstd")


class StreamCall(NamedTuple):
    """What stays the same in all turns of a stream; shared between threads, so nothing in it may be changed."""

    call_id: bytes
    stream_id: str
    output_schema: pa.Schema
    input_schema: pa.Schema
    call_state: Any
    response_limit: int | None


class StateTypes(NamedTuple):
    """The classes that a method declares for its stream's state, in the order of the annotation."""

    states: tuple[type[core.StreamState], ...]
    call_states: tuple[type, ...]


class TokenScope(NamedTuple):
    """What a token is bound to, and what it may become."""

    binding: bytes
    types: StateTypes
    method: str


def declared_states(implementation: object, info: core.RpcMethodInfo) -> StateTypes:
    """Read the state classes from the implementation's annotation, else from the Protocol's; unions included.

    TypeError, with the field, for a class that cannot travel.
    """
    try:
        hint = typing.get_type_hints(getattr(implementation, info.name)).get("return")
    except (NameError, TypeError, AttributeError):  # a hint of a local class, say
        hint = None
    states = _concrete(hint) or _concrete(info.result_type)
    found = StateTypes(states, tuple(s.CALL_STATE_TYPE for s in states if s.CALL_STATE_TYPE is not None))
    for kind in (*found.states, *found.call_states):
        try:
            core.check_state_class(kind)
        except TypeError as exc:
            raise TypeError(f"the state of {info.name}() cannot travel over HTTP: {exc}") from exc
    return found


def _concrete(hint: Any) -> tuple[type[core.StreamState], ...]:
    while typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    state = next(iter(typing.get_args(hint)), None) if typing.get_origin(hint) is core.Stream else None
    union = typing.get_origin(state) in (typing.Union, types.UnionType)
    members = typing.get_args(state) if union else (state,)
    return tuple(
        m for m in members if isinstance(m, type) and issubclass(m, core.StreamState) and not inspect.isabstract(m)
    )


class TokenCipher:
    """AES-256-GCM-SIV under the key of a service (http.md section 7.4): version u8, nonce 12, ciphertext, tag 16.

    Args:
        key: shared by all replicas; 16 bytes or more, hashed unless it has 32.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < 16:
            raise ValueError(f"token_key has {len(key)} bytes; use at least 16, better 32 random ones")
        self._cipher = AESGCMSIV(key if len(key) == 32 else hashlib.sha256(key).digest())

    def seal(self, plain: bytes, bound_to: bytes) -> bytes:
        """Seal `plain`, which is opened only with the same `bound_to`."""
        nonce = os.urandom(_NONCE)
        return _VERSION + nonce + self._cipher.encrypt(nonce, plain, bound_to)

    def open(self, sealed: bytes, bound_to: bytes) -> bytes | None:
        """What was sealed; None for anything else, whatever is wrong with it."""
        if len(sealed) < 1 + _NONCE + 16 or sealed[:1] != _VERSION:
            return None
        try:
            return self._cipher.decrypt(sealed[1 : 1 + _NONCE], sealed[1 + _NONCE :], bound_to)
        except InvalidTag:
            return None


def bound_parts(*parts: str | None) -> bytes:
    """Join what a token is bound to, each part with its length, so that no two lists of parts look alike."""
    return b"".join(
        b"\xff\xff\xff\xff" if part is None else _sized(part.encode("utf-8", "surrogatepass")) for part in parts
    )


def caller_parts(auth: core.AuthContext) -> tuple[str | None, ...]:
    """Who a token is for. Not the claims: a credential that is renewed leaves its caller's tokens good."""
    return auth.domain, "1" if auth.authenticated else "0", auth.principal


class StreamTokens:
    """Seals and opens the state of streams.

    Args:
        key: shared by all replicas, as for TokenCipher.
        ttl: seconds a token is good for; 0: for ever.
        cache_entries: how many calls are remembered, so that their CALL need not be opened; 0: none.
        max_bytes: the longest token value that this server would read back.
        own_key: the key was made by this process.
        open_to_all: whoever calls may know how the service is set up; else only its log says so.
    """

    def __init__(
        self,
        key: bytes,
        ttl: int,
        cache_entries: int,
        max_bytes: int,
        *,
        own_key: bool = False,
        open_to_all: bool = False,
    ) -> None:
        self._unverified = _UNVERIFIED + (_OWN_KEY if own_key else _OTHER_KEY)
        self._open_to_all = open_to_all
        self._said = False
        self._cipher = TokenCipher(key)
        if ttl < 0:
            raise ValueError(f"token_ttl must be 0 (no expiry) or more seconds, got {ttl}")
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._cache = _Cache(cache_entries)

    def scope(self, auth: core.AuthContext, protocol: str, method: str, types: StateTypes) -> TokenScope:
        """What tokens of this caller and method are bound to."""
        kinds = ",".join(kind.__name__ for kind in types.states)  # a release that orders them anew opens none of these
        return TokenScope(bound_parts(*caller_parts(auth), protocol, method, kinds), types, method)

    def begin(self, scope: TokenScope, stream: core.Stream[Any, Any], stream_id: str, limit: int | None) -> StreamCall:
        """Give a new stream its call id."""
        return StreamCall(
            os.urandom(16), stream_id, stream.output_schema, stream.input_schema, stream.call_state, limit
        )

    def seal_call(self, scope: TokenScope, call: StreamCall) -> dict[bytes, bytes]:
        """The CALL entry of the metadata."""
        kind, state = _NO_KIND, b""
        if call.call_state is not None:
            kind = _kind(scope, call.call_state, scope.types.call_states, "call_state")
            state = core.seal_state(call.call_state)
        limit = call.response_limit or 0
        head = _CALL.pack(time.time(), call.call_id, bytes.fromhex(call.stream_id), limit, kind)
        schemas = (call.output_schema.serialize().to_pybytes(), call.input_schema.serialize().to_pybytes())
        payload = head + b"".join(map(_sized, (*schemas, state)))
        sealed = self._seal(b"call", scope, payload)
        cost = len(payload) + len(sealed)
        self._cache.put((call.call_id, scope.binding), call, cost, self._ttl or _CACHE_SECONDS)
        return {core.CALL_STATE_KEY: sealed}

    def seal_state(
        self, scope: TokenScope, call: StreamCall, state: core.StreamState, *, first: bool = False
    ) -> tuple[dict[bytes, bytes], int]:
        """The CUR entry of the metadata, and the plain size of the state in it; the first time, TypeError for a state
        that would come back as another one."""
        packed = core.seal_state(state) if first else state.serialize_to_bytes()
        kind = _kind(scope, state, scope.types.states, "state")
        sealed = self._seal(b"cur", scope, _CUR.pack(time.time(), call.call_id, kind) + packed)
        return {core.STATE_KEY: sealed}, len(packed)

    def open(self, scope: TokenScope, metadata: Mapping[bytes, bytes]) -> tuple[StreamCall, core.StreamState, int]:
        """The call, the state, and its plain size; RuntimeError, always of the same few kinds, for anything wrong."""
        cursor = metadata.get(core.STATE_KEY)
        if cursor is None:
            raise RuntimeError("Missing state token: send back the 'vgi_rpc.stream_state#b64' of the last response")
        payload = self._open(b"cur", scope, cursor)
        if len(payload) < _CUR.size:
            raise RuntimeError("Malformed state token")
        created, call_id, kind = _CUR.unpack_from(payload)
        self._check_age(created)
        call = self._cache.get((call_id, scope.binding))
        if call is None:
            call, age, cost = self._open_call(scope, metadata, call_id)
            # No longer than its token is good for: a replica that has it may not go on where others refuse.
            self._cache.put((call_id, scope.binding), call, cost, self._ttl - age if self._ttl else _CACHE_SECONDS)
        packed = payload[_CUR.size :]
        return call, _unpack(scope.types.states, kind, packed), len(packed)

    def _open_call(
        self, scope: TokenScope, metadata: Mapping[bytes, bytes], call_id: bytes
    ) -> tuple[StreamCall, float, int]:
        """The call, the seconds since its token was made, and the bytes that the cache counts for it."""
        token = metadata.get(core.CALL_STATE_KEY)
        if token is None:
            raise RuntimeError("Missing call token: send back the 'vgi_rpc.call_state#b64' of the init response")
        payload = self._open(b"call", scope, token)
        try:
            created, own_id, stream_id, limit, kind = _CALL.unpack_from(payload)
            output, inputs, state = _sized_parts(payload, _CALL.size, 3)
            schemas = [pa.ipc.read_schema(pa.py_buffer(item)) for item in (output, inputs)]
        except (struct.error, pa.ArrowException, OSError, ValueError) as exc:
            raise RuntimeError("Malformed call token") from exc
        age = self._check_age(created)
        if not hmac.compare_digest(own_id, call_id):
            raise RuntimeError("State token and call token do not belong together")
        call_state = None if kind == _NO_KIND else _unpack(scope.types.call_states, kind, state)
        call = StreamCall(call_id, stream_id.hex(), schemas[0], schemas[1], call_state, limit or None)
        return call, age, len(payload) + len(token)

    def _check_age(self, created: float) -> float:
        age = max(time.time() - created, 0.0)
        if self._ttl and age > self._ttl:
            raise RuntimeError(f"State token expired: it is good for {self._ttl} seconds (token_ttl)")
        return age

    def _not_verified(self) -> str:
        """The text of a token that does not verify; what is likely to be missing goes to the log, once."""
        if not self._said:
            self._said = True
            _LOG.warning("%s", self._unverified)
        return self._unverified if self._open_to_all else _UNVERIFIED

    def _seal(self, kind: bytes, scope: TokenScope, payload: bytes) -> bytes:
        plain = _RAW + payload
        if len(payload) >= _COMPRESS_FROM:
            packed = compress(Encoding.ZSTD, payload, level=3) if _HAS_ZSTD else payload
            if len(packed) < len(payload):
                plain = _ZSTD + packed
        sealed = base64.b64encode(self._cipher.seal(plain, _sized(kind) + scope.binding))
        if len(sealed) > self._max_bytes or len(payload) > _MAX_PAYLOAD:
            raise ValueError(
                f"the state of a stream of {scope.method}() takes {len(sealed)} bytes as a token; at most"
                f" {self._max_bytes} travel (IpcLimits.max_metadata_entry_bytes): keep large data outside the state"
            )
        return sealed

    def _open(self, kind: bytes, scope: TokenScope, token: bytes) -> bytes:
        try:
            sealed = binascii.a2b_base64(token, strict_mode=True)
        except (binascii.Error, ValueError) as exc:
            raise RuntimeError("Malformed state token") from exc
        if sealed[:1] != _VERSION:
            raise RuntimeError("Malformed state token")
        plain = self._cipher.open(sealed, _sized(kind) + scope.binding)
        if plain is None:
            raise RuntimeError(self._not_verified())
        if plain[:1] == _RAW:
            return plain[1:]
        try:
            if plain[:1] == _ZSTD and _HAS_ZSTD:
                return decompress(Encoding.ZSTD, plain[1:], max_output_size=_MAX_PAYLOAD)
        except DecompressionError as exc:
            raise RuntimeError("Malformed state token") from exc
        raise RuntimeError("Malformed state token")


class _Cache:
    """Least recently used first out; an entry has a time to live of its own. Nothing depends on what is in it.

    Bounded in bytes, too: a caller sends a few kilobytes, and what they unfold into stays for as long as its token is
    good for.
    """

    def __init__(self, size: int) -> None:
        if size < 0:
            raise ValueError(f"call_state_cache_entries must be 0 (off) or more, got {size}")
        self._size = size
        self._lock = threading.Lock()
        self._bytes = 0
        self._entries: collections.OrderedDict[tuple[bytes, bytes], tuple[float, StreamCall, int]] = (
            collections.OrderedDict()
        )

    def get(self, key: tuple[bytes, bytes]) -> StreamCall | None:
        with self._lock:
            found = self._entries.get(key)
            if found is None:
                return None
            if found[0] < time.monotonic():
                self._forget(key)
                return None
            self._entries.move_to_end(key)
            return found[1]

    def put(self, key: tuple[bytes, bytes], call: StreamCall, cost: int, seconds: float) -> None:
        """Keep a call that is not too large; `cost` is what it takes, in bytes, sealed and plain."""
        if cost > _CACHE_ENTRY_BYTES:
            return
        with self._lock:
            if key in self._entries:
                self._forget(key)
            self._entries[key] = (time.monotonic() + seconds, call, cost)
            self._bytes += cost
            while len(self._entries) > self._size or self._bytes > _CACHE_BYTES:
                self._forget(next(iter(self._entries)))

    def _forget(self, key: tuple[bytes, bytes]) -> None:
        self._bytes -= self._entries.pop(key)[2]


def _kind(scope: TokenScope, value: object, declared: Sequence[type], what: str) -> int:
    """The place of the value's class among the declared ones."""
    if type(value) not in declared or declared.index(type(value)) >= _NO_KIND:
        names = ", ".join(t.__name__ for t in declared) or "no concrete class"
        raise TypeError(
            f"{scope.method}() has a {what} of class {type(value).__name__}, but declares {names}: over HTTP the"
            " annotation of the implementation must name it, as in `def count(self) -> Stream[CountState]`"
            " (and a call_state's class is the CALL_STATE_TYPE of the state's)"
        )
    return declared.index(type(value))


def _unpack(declared: Sequence[type[core.ArrowSerializableDataclass]], kind: int, packed: bytes) -> Any:
    try:
        return declared[kind].deserialize_from_bytes(packed)
    except Exception as exc:  # whatever a class raises: another release of the service wrote it
        raise RuntimeError("The state in the token does not fit this server's class of it") from exc


def _sized(data: bytes) -> bytes:
    return _SIZE.pack(len(data)) + data


def _sized_parts(data: bytes, at: int, count: int) -> list[bytes]:
    parts = []
    for _ in range(count):
        (size,) = _SIZE.unpack_from(data, at)
        at += _SIZE.size
        if at + size > len(data):
            raise ValueError("truncated")
        parts.append(data[at : at + size])
        at += size
    return parts
