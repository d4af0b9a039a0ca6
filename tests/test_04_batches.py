"""Room 4: batches that are values: validation, whole streams in memory, empty batches (types.md section 5)."""

from __future__ import annotations

import dataclasses
import gc
import io
import subprocess
import sys
import warnings
import weakref

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

Base = core.ArrowSerializableDataclass
BATCH = pa.record_batch({"a": [1, 2], "b": ["x", None]})
POINT = pa.struct([pa.field("x", pa.int64(), nullable=False), pa.field("y", pa.float64(), nullable=False)])
ENUM = pa.dictionary(pa.int16(), pa.utf8())


def stream(schema: pa.Schema, *batches: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


# ---- validation


def invalid_utf8() -> pa.RecordBatch:
    good = pa.array([b"\xff\xfe"], pa.binary())
    return pa.RecordBatch.from_arrays([pa.Array.from_buffers(pa.utf8(), 1, good.buffers())], names=["b"])


def test_validation_levels() -> None:
    assert [(level.name, level.value) for level in core.IpcValidation] == [
        ("NONE", "none"),
        ("STANDARD", "standard"),
        ("FULL", "full"),
    ]
    batch = invalid_utf8()
    core.validate_batch(batch, core.IpcValidation.NONE)
    core.validate_batch(batch, core.IpcValidation.STANDARD)
    with pytest.raises(core.IPCError, match=r"^IPC batch validation failed: "):
        core.validate_batch(batch, core.IpcValidation.FULL)
    core.validate_batch(BATCH, core.IpcValidation.FULL)


def bad_stream() -> bytes:
    return core.serialize_record_batch_bytes(invalid_utf8())


def test_every_reader_validates_fully_by_default() -> None:
    cls = dataclasses.make_dataclass("Made", [("b", str)], bases=(Base,))
    none = core.IpcValidation.NONE
    for read in (
        lambda: cls.deserialize_from_bytes(bad_stream()),
        lambda: cls.deserialize_from_batch(invalid_utf8()),
        lambda: core.deserialize_record_batch(bad_stream()),
        lambda: core.read_single_record_batch(io.BytesIO(bad_stream())),
        lambda: core._types_codec(pa.RecordBatch, top=True).decode(bad_stream()),
    ):
        with pytest.raises(core.IPCError, match="IPC batch validation failed"):
            read()
    assert core.deserialize_record_batch(bad_stream(), none)[0].num_rows == 1
    assert core.read_single_record_batch(io.BytesIO(bad_stream()), "x", none)[0].num_rows == 1


ENV = "VGI_RPC_IPC_VALIDATION"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("none", "NONE"), ("STANDARD", "STANDARD"), ("Full", "FULL"), (" none ", "NONE"), ("", "FULL"), (None, "FULL")],
)
def test_validation_from_env(monkeypatch: pytest.MonkeyPatch, text: str | None, expected: str) -> None:
    monkeypatch.delenv(ENV, raising=False)
    if text is not None:
        monkeypatch.setenv(ENV, text)
    assert core.IpcValidation.from_env() is core.IpcValidation[expected]


def test_validation_from_env_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV, raising=False)
    assert core.IpcValidation.from_env(core.IpcValidation.NONE) is core.IpcValidation.NONE
    monkeypatch.setenv(ENV, "full")
    assert core.IpcValidation.from_env(core.IpcValidation.NONE) is core.IpcValidation.FULL


def test_validation_from_env_unknown_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "no")
    with pytest.warns(RuntimeWarning, match=ENV) as caught:
        assert core.IpcValidation.from_env(core.IpcValidation.NONE) is core.IpcValidation.FULL
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            core.IpcValidation.from_env()


# ---- batches as values


def test_batches_and_metadata_round_trip() -> None:
    metadata = pa.KeyValueMetadata({"a": "b"})
    data = core.serialize_record_batch_bytes(BATCH, metadata)
    batch, found = core.deserialize_record_batch(data)
    assert batch.equals(BATCH)
    assert found.equals(metadata)
    sink = io.BytesIO()
    core.serialize_record_batch(sink, BATCH, metadata)
    assert sink.getvalue() == data
    batch, found = core.read_single_record_batch(io.BytesIO(data), "x")
    assert (batch.equals(BATCH), found.equals(metadata)) == (True, True)


def test_deserialize_of_nothing() -> None:
    assert core.deserialize_record_batch(b"")[0].num_columns == 0
    batch, metadata = core.deserialize_record_batch(stream(BATCH.schema))
    assert (batch.num_rows, batch.schema, metadata) == (0, BATCH.schema, None)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (stream(BATCH.schema), "No record batch found in state stream"),
        (
            stream(BATCH.schema, BATCH, BATCH),
            "Expected single record batch in state stream, but found multiple batches",
        ),
        (b"garbage, garbage", "Error reading record batch from state stream: "),
        (b"", "Error reading record batch from state stream: "),
        (core.serialize_record_batch_bytes(BATCH)[:-60], "Error reading record batch from state stream: "),
    ],
)
def test_read_single_record_batch_errors(data: bytes, text: str) -> None:
    with pytest.raises(core.IPCError) as caught:
        core.read_single_record_batch(io.BytesIO(data), "state")
    assert str(caught.value).startswith(text)


UNION = pa.union([pa.field("i", pa.int64()), pa.field("s", pa.utf8())], mode="sparse")
EMPTY_TYPES = [
    pa.int64(),
    pa.utf8(),
    ENUM,
    POINT,
    pa.list_(pa.int64()),
    pa.map_(pa.utf8(), pa.int64()),
    UNION,
    pa.dense_union([pa.field("i", pa.int64())]),
    pa.uuid(),
    pa.null(),
    pa.run_end_encoded(pa.int32(), pa.utf8()),
    pa.string_view(),
    pa.decimal128(5, 2),
]


@pytest.mark.parametrize("dtype", EMPTY_TYPES, ids=str)
@pytest.mark.parametrize("nullable", [True, False])
def test_empty_batch_of_any_type(dtype: pa.DataType, nullable: bool) -> None:
    schema = pa.schema([pa.field("f", dtype, nullable=nullable or dtype == pa.null())], metadata={"k": "v"})
    batch = core.empty_batch(schema)
    assert batch.num_rows == 0
    assert batch.schema.equals(schema, check_metadata=True)
    assert core.empty_batch(schema) is batch
    batch.validate(full=True)


def test_empty_batch_cache_is_bounded_and_never_confuses_schemas() -> None:
    def count() -> int:
        gc.collect()
        return sum(isinstance(found, pa.Schema) for found in gc.get_objects()) + len(alive)

    alive: weakref.WeakSet[pa.Schema] = weakref.WeakSet()
    for number in range(600):
        schema = pa.schema([(f"f{number}", pa.int64())])
        alive.add(schema)
        assert core.empty_batch(schema).schema.names == [f"f{number}"]
    del schema
    assert count() <= 257


def test_validated_reader() -> None:
    with core.ValidatedReader(ipc.open_stream(stream(BATCH.schema, BATCH)), core.IpcValidation.FULL) as reader:
        assert reader.schema.equals(BATCH.schema)
        assert reader.ipc_validation is core.IpcValidation.FULL
        assert reader.read_next_batch().equals(BATCH)
        with pytest.raises(StopIteration):
            reader.read_next_batch_with_custom_metadata()
    bad = core.ValidatedReader(ipc.open_stream(bad_stream()), core.IpcValidation.FULL)
    with pytest.raises(core.IPCError):
        bad.read_next_batch()


def test_streams_are_never_compressed() -> None:
    assert core.IPC_WRITE_OPTIONS.compression is None
    assert core.IPC_WRITE_OPTIONS.emit_dictionary_deltas is False
    assert isinstance(core.IPC_READ_OPTIONS, ipc.IpcReadOptions)


EVERY_TYPE = """
import sys
import pyarrow as pa
from tests.core import core

class Ext(pa.ExtensionType):
    def __init__(self, storage):
        super().__init__(storage, "tests.ext")
    def __arrow_ext_serialize__(self):
        return b""
    @classmethod
    def __arrow_ext_deserialize__(cls, storage, data):
        return cls(storage)

leaves = [pa.null(), pa.bool_(), pa.int8(), pa.float64(), pa.utf8(), pa.large_binary(), pa.binary(3), pa.string_view(),
          pa.timestamp("us", "UTC"), pa.month_day_nano_interval(), pa.decimal128(10, 2), pa.dense_union([]),
          pa.sparse_union([]), pa.struct([]), pa.dictionary(pa.int8(), pa.utf8()), Ext(pa.int8())]
wraps = [pa.list_, pa.large_list, pa.list_view, lambda t: pa.list_(t, 2), lambda t: pa.list_(t, 0),
         lambda t: pa.map_(pa.utf8(), t), lambda t: pa.map_(t, pa.int8()),
         lambda t: pa.struct([pa.field("a", t, nullable=False), ("b", pa.int8())]),
         lambda t: pa.sparse_union([pa.field("a", t), pa.field("b", pa.int8())]),
         lambda t: pa.dense_union([pa.field("a", t), pa.field("b", pa.utf8())], [5, 7]),
         lambda t: pa.run_end_encoded(pa.int32(), t), lambda t: pa.dictionary(pa.int8(), t), Ext]

# A key cannot be null; pyarrow aborts on extensions of extensions, and cannot read dictionaries of these.
def no(outer, inner):
    if inner == pa.null():
        return outer in wraps[6:8]
    return isinstance(inner, (pa.BaseExtensionType, pa.DictionaryType)) and outer in (Ext, wraps[-2])

def deeper(types):
    return [wrap(t) for t in types for wrap in wraps if not no(wrap, t)]

once = deeper(leaves)
seen = 0
for dtype in [*leaves, *once, *deeper(once)]:
    schema = pa.schema([("x", dtype)])
    batch = core.empty_batch(schema)
    batch.validate(full=True)
    assert batch.num_rows == 0 and batch.schema.equals(schema), dtype
    found, _ = core.deserialize_record_batch(core.serialize_record_batch_bytes(batch))
    assert found.num_rows == 0, dtype
    seen += 1
print(seen)
"""


def test_empty_batches_of_every_type() -> None:
    """In a process of its own: where pyarrow cannot build an array it aborts."""
    done = subprocess.run([sys.executable, "-c", EVERY_TYPE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 2000
