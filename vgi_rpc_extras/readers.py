# Needs: nothing. Seam: none.
"""Readers of Arrow IPC streams that are not a connection's: files, objects, tests."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pyarrow import ipc

from . import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()


def read_single_record_batch(
    stream: Any, context: str = "batch", ipc_validation: core.IpcValidation = core.IpcValidation.FULL
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None]:
    """Read a stream of exactly one batch; core.IPCError when it holds none or several."""
    try:
        reader = ValidatedReader(ipc.open_stream(stream), ipc_validation)
        try:
            found = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            raise core.IPCError(f"No record batch found in {context} stream") from None
        with contextlib.suppress(StopIteration):
            reader.read_next_batch()
            raise core.IPCError(f"Expected single record batch in {context} stream, but found multiple batches")
        return found
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise core.IPCError(f"Error reading record batch from {context} stream: {exc}") from exc


class ValidatedReader:
    """A stream reader whose batches are validated."""

    def __init__(self, reader: ipc.RecordBatchStreamReader, ipc_validation: core.IpcValidation) -> None:
        self._reader = reader
        self.ipc_validation = ipc_validation

    @property
    def schema(self) -> pa.Schema:
        """The stream's schema."""
        return self._reader.schema

    def read_next_batch(self) -> pa.RecordBatch:
        """Return the next batch; StopIteration at the end, core.IPCError for an invalid one."""
        return self.read_next_batch_with_custom_metadata()[0]

    def read_next_batch_with_custom_metadata(self) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None]:
        """Return the next batch and its metadata."""
        batch, metadata = self._reader.read_next_batch_with_custom_metadata()
        core.validate_batch(batch, self.ipc_validation)
        return batch, metadata

    def __enter__(self) -> ValidatedReader:
        self._reader.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.__exit__(*exc)
