# Needs: pyarrow only. Used by client.py.
"""A stream over HTTP as its caller sees it: each turn is a request that carries the server's state (http.md 15.1)."""

from __future__ import annotations

import collections
import contextlib
import struct
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import core as _bound_core
from ._connection import deadline_of
from .refusals import HttpTransientError

if TYPE_CHECKING:
    import vgi_rpc as core

    from .client import HttpTransport
else:
    core = _bound_core()

__all__ = ["HttpStreamSession"]

_UNSET: Any = object()


def _untouched(exc: BaseException) -> bool:
    """Whether a turn that failed did not take place: nothing was sent, or it was refused at the door (429, 503)."""
    if not isinstance(exc, core.RpcError):
        return False
    return exc.sent == "no" or (exc.sent == "answered" and isinstance(exc, HttpTransientError))


class HttpStreamSession(core.StreamSession):
    """A stream over HTTP: each turn is a request that carries the server's state back to it (http.md section 7).

    It holds no connection, so any number may be open at once; closing one costs nothing. Not for several threads. A
    turn that was refused before it began (429, 503) or never left can be asked for again; other errors are the end.
    """

    def __init__(
        self,
        transport: HttpTransport,
        call: core.StreamCall,
        opening: core.StreamReply | None,
        output_schema: pa.Schema | None = None,
    ) -> None:
        """`opening` is the answer to `/init`; None for a session that a resume token will place."""
        super().__init__()
        self._transport = transport
        self._call = call
        self._schema = output_schema
        self._state: bytes | None = None  # where the stream is; a new one every turn
        self._call_state: bytes | None = None  # what never changes; issued once
        self._pending: collections.deque[core.AnnotatedBatch] = collections.deque()
        self._error: Exception | None = None  # what came after the pending batches
        self._over = False
        self._closed = False  # by the caller
        if opening is not None:
            self.header = opening.header
            self._absorb(opening)
            if self._error is not None and self.header is None and not self._pending:
                self._raise_error()

    def tick(
        self, custom_metadata: pa.KeyValueMetadata | None = None, *, timeout: float | None = _UNSET
    ) -> core.AnnotatedBatch:
        """Ask a producer for its next batch; StopIteration at its end.

        ValueError for metadata when the batch is here already, made without it.
        """
        if self._pending and custom_metadata is not None:
            raise ValueError("a batch that was produced without this metadata is waiting; take it first")
        self._check_open()
        if not self._advance(custom_metadata, timeout):
            raise StopIteration
        return self._pending.popleft()

    def exchange(self, input: core.AnnotatedBatch, *, timeout: float | None = _UNSET) -> core.AnnotatedBatch:
        """Send one batch and return the one that answers it."""
        self._check_open()
        if self._error is not None:
            self._raise_error()
        if self._pending and input.custom_metadata is None and not input.batch.num_rows:
            return self._pending.popleft()  # an exchange without input columns: its first turn came with the opening
        self._pending.clear()
        name = self._call.info.name
        if self._state is None:
            raise core.RpcError("ProtocolError", f"{name}(): the server has given no state to go on from", sent="no")
        self._turn("stream exchange", input.batch, input.custom_metadata, timeout, answers=True)
        if self._error is not None:
            self._raise_error()
        if len(self._pending) != 1:
            self._over = True
            raise core.RpcError(
                "ProtocolError", f"{name}(): the server answered with {len(self._pending)} batches, not one"
            )
        return self._pending.popleft()

    def to_reader(self) -> pa.RecordBatchReader:
        """Return the rest of a producer as a reader; a session can be exported once, and not when it is closed."""
        if self._closed:
            self._check_open()
        return super().to_reader()

    def __iter__(self) -> Iterator[core.AnnotatedBatch]:
        if self._closed:
            self._check_open()
        while not self._over:
            try:
                item = self.tick()
            except StopIteration:
                return
            yield item

    def next_with_token(
        self, custom_metadata: pa.KeyValueMetadata | None = None
    ) -> tuple[core.AnnotatedBatch | None, bytes | None]:
        """Return a producer's next batch, and a token from which the stream goes on after it; (None, None) at its end.

        The token is opaque, good for any replica of the server, and None after the last batch.
        """
        if self._over:
            return None, None
        try:
            item = self.tick(custom_metadata)
        except StopIteration:
            return None, None
        if self._pending:
            self._over = True
            raise core.RpcError("ProtocolError", "several batches in one response: there is no token between them")
        return item, self._token()

    def seek_to_token(self, token: bytes) -> None:
        """Go on from a token that `next_with_token` gave; ValueError for anything else."""
        size = struct.unpack_from("<I", token)[0] if len(token) > 4 else 0
        if not 0 < size < len(token) - 4:
            raise ValueError("not a resume token")
        self._state, self._call_state = bytes(token[4 : 4 + size]), bytes(token[4 + size :])
        self._pending.clear()
        self._error = None
        self._over = self._closed = False

    def close(self) -> None:
        """Forget the stream; the server holds nothing of it. Raises an error of a stream that was never read."""
        self._over = self._closed = True
        self._pending.clear()
        if self._error is not None:
            self._raise_error()

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        if kind is not None:
            self._error = None
        self.close()

    def cancel(self) -> None:
        """Tell the server that nobody will go on (its `on_cancel` runs); never raises what the far side does."""
        state, over = self._state, self._over
        self._over = self._closed = True
        self._pending.clear()
        self._error = None
        if state is None or over:
            return
        with contextlib.suppress(core.RpcError):
            self._post("stream cancel", core.empty_batch(core.EMPTY_SCHEMA), {core.CANCEL_KEY: b"1"}, _UNSET)

    @property
    def schema(self) -> pa.Schema:
        """The stream's output schema; a resumed session may have to read, and keep for later, the first batch."""
        if self._schema is None:
            self._advance(None, _UNSET)
        return self._schema

    # -- below here: turns

    def _check_open(self) -> None:
        if self._over:
            raise core.RpcError("ProtocolError", "Stream has been closed or cancelled", sent="no")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        self._over = True
        assert error is not None
        raise error

    def _advance(self, metadata: pa.KeyValueMetadata | None, timeout: float | None) -> bool:
        """Tick until a batch is pending; False at the end."""
        seconds = self._call.timeout if timeout is _UNSET else self._call.check_timeout(timeout)
        deadline = deadline_of(seconds)
        while not self._pending:
            if self._error is not None:
                self._raise_error()
            if self._state is None:
                self._over = True
                return False
            left = None if deadline is None else max(deadline - time.monotonic(), 1e-6)
            self._turn("stream tick", core.empty_batch(core.EMPTY_SCHEMA), metadata, left)
        return True

    def _turn(
        self,
        doing: str,
        batch: pa.RecordBatch,
        metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None,
        timeout: float | None,
        *,
        answers: bool = False,
    ) -> None:
        try:
            reply = self._call.read_turn(self._post(doing, batch, self._call.encoded(batch, metadata), timeout))
            self._absorb(reply, answers=answers)
        except BaseException as exc:
            self._over = not _untouched(exc)
            raise

    def _post(self, doing: str, batch: pa.RecordBatch, metadata: dict[bytes, bytes], timeout: float | None) -> bytes:
        assert self._state is not None
        metadata[core.STATE_KEY] = self._state
        if self._call_state is not None:
            metadata[core.CALL_STATE_KEY] = self._call_state
        seconds = self._call.timeout if timeout is _UNSET else self._call.check_timeout(timeout)
        if seconds is not None:
            metadata[core.DEADLINE_KEY] = b"%016d" % max(int(seconds * 1e6), 0)
        return self._transport.turn(self._call, self._call.write(batch, metadata), seconds, doing)

    def _absorb(self, reply: core.StreamReply, *, answers: bool = False) -> None:
        """Keep what a turn brought. Tokens are known by their keys, not by rows; an exchange has them on its answer."""
        state = None
        for batch, metadata in reply.batches:
            if metadata and core.STATE_KEY in metadata:
                state = metadata.pop(core.STATE_KEY)
                self._call_state = metadata.pop(core.CALL_STATE_KEY, self._call_state)
                if batch.num_rows == 0 and not (answers and len(reply.batches) == 1):
                    continue
            self._pending.append(core.AnnotatedBatch(batch, pa.KeyValueMetadata(metadata) if metadata else None))
        self._state = state or (self._state if answers else None)
        self._schema = reply.schema if self._schema is None else self._schema
        self._error = reply.error
        if reply.error is not None and not isinstance(reply.error, core.RpcError):  # on_log raised: it goes first
            self._pending.clear()

    def _token(self) -> bytes | None:
        if self._state is None:
            return None
        return struct.pack("<I", len(self._state)) + self._state + (self._call_state or b"")
