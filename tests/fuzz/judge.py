"""What pyarrow says about the same bytes."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from pyarrow import ipc

from tests.core import core
from tests.fuzz.child import Finding, Tolerated
from tests.fuzz.messages import split, tables

LIMITS = core.IpcLimits(max_message_bytes=1 << 20)
FULL = core.IpcValidation.FULL
REFUSED = (pa.ArrowException, core.IPCError, EOFError)
Items = list[tuple[pa.RecordBatch, "dict[bytes, bytes] | None"]]


def by_pyarrow(data: bytes) -> Items:
    """All batches of the first stream in `data`, validated; Finding when pyarrow does not accept them."""
    try:
        with ipc.open_stream(pa.py_buffer(data)) as reader:
            found = []
            for batch, metadata in reader.iter_batches_with_custom_metadata():
                batch.validate(full=True)
                pairs = [] if metadata is None else list(metadata.items())
                if len(dict(pairs)) != len(pairs):
                    raise Finding("accepted metadata with the same key twice")
                found.append((batch, dict(pairs) if metadata is not None else None))
            return found
    except (pa.ArrowException, OSError, ValueError, EOFError) as exc:
        tolerate(exc, data)
        raise Finding(f"accepted what pyarrow refuses: {type(exc).__name__}: {exc}") from exc


def tolerate(exc: Exception, data: bytes) -> None:
    """A field that is a dictionary and a registered extension: of the two, the type that pyarrow makes has only one."""
    if "dictionaries at the start" in str(exc) and b"fuzz.money" in data:
        raise Tolerated(str(exc)) from exc


def compare(ours: Items, data: bytes) -> None:
    """What was read from `data` (one whole stream) must be what pyarrow reads."""
    theirs = by_pyarrow(data)
    if len(ours) != len(theirs):
        raise Finding(f"read {len(ours)} batches; pyarrow reads {len(theirs)}")
    for (batch, metadata), (other, wanted) in zip(ours, theirs, strict=True):
        if (metadata or {}) != (wanted or {}):
            raise Finding(f"metadata {metadata} for {wanted}")
        same_batch(batch, other)
    for message in split(data):
        if any(True for _ in tables(message.tree, "BodyCompression")):
            raise Finding("accepted a compressed batch")
        if any(table[0] for table in tables(message.tree, "Schema")):
            raise Finding("accepted a big-endian schema")


def same_batch(batch: pa.RecordBatch, other: pa.RecordBatch) -> None:
    """Finding when two batches differ, or ours is not valid."""
    batch.validate(full=True)
    exact = bool(len(batch.schema))  # ticks are all alike: a schema without fields keeps no metadata
    if not batch.schema.equals(other.schema, check_metadata=exact):
        raise Finding(f"schema {batch.schema} for {other.schema}")
    if batch.num_rows != other.num_rows:
        raise Finding(f"{batch.num_rows} rows for {other.num_rows}")
    if "month_interval" in str(batch.schema):  # of which pyarrow cannot make Python arrays
        return
    for ours, theirs in zip(batch.columns, other.columns, strict=True):
        if not same_array(ours, theirs):
            raise Finding(f"{ours.type}: {str(ours)[:200]} for {str(theirs)[:200]}")


def same_array(ours: Any, theirs: Any) -> bool:
    """Equal buffers, or equal values."""
    if ours.type != theirs.type or len(ours) != len(theirs):
        return False
    if ours.offset == theirs.offset and ours.buffers() == theirs.buffers():
        return all(same_array(a, b) for a, b in zip(_dictionaries(ours), _dictionaries(theirs), strict=True))
    return bool(ours.equals(theirs)) or (len(ours) < 10_000 and repr(ours.to_pylist()) == repr(theirs.to_pylist()))


def _dictionaries(array: Any) -> list[Any]:
    """The dictionaries of an array and of what it holds: its buffers do not have them."""
    if isinstance(array.type, pa.BaseExtensionType):
        return _dictionaries(array.storage)
    if pa.types.is_dictionary(array.type):
        return [array.dictionary]
    if pa.types.is_map(array.type):
        return _dictionaries(array.keys) + _dictionaries(array.items)
    if pa.types.is_struct(array.type) or pa.types.is_union(array.type):
        return [each for i in range(array.type.num_fields) for each in _dictionaries(array.field(i))]
    return _dictionaries(array.values) if array.type.num_fields and hasattr(array, "values") else []
