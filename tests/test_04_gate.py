"""Room 4: the gate. What a peer sends is measured and checked before it is believed (DESIGN.md law 9)."""

from __future__ import annotations

import contextlib
import struct
import time
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc

from tests.core import core

FULL = core.IpcValidation.FULL
EOS = b"\xff\xff\xff\xff\0\0\0\0"
ONE_MIB = core.IpcLimits(max_message_bytes=1 << 20)
NUMBERS = pa.schema([("n", pa.int64())])


def written(schema: pa.Schema, *batches: pa.RecordBatch, options: Any = None, metadata: Any = None) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema, options=options or core.IPC_WRITE_OPTIONS) as writer:
        for batch in batches:
            writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata) if metadata else None)
    return sink.getvalue().to_pybytes()


def messages(data: bytes) -> list[bytes]:
    found, at = [], 0
    while size := struct.unpack_from("<i", data, at + 4)[0]:
        message = ipc.read_message(pa.BufferReader(data[at:]))
        end = at + 8 + size + (message.body.size if message.body is not None else 0)
        found.append(data[at:end])
        at = end
    return found


def reader_of(data: bytes, limits: Any = ONE_MIB) -> Any:
    return core._IpcReader(core._IpcSource(data, limits), FULL)


def numbers(*values: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"n": list(values)}, schema=NUMBERS)


def refused_and_in_step(data: bytes, match: str, limits: Any = ONE_MIB) -> None:
    """The stream is refused, and what follows it is read: the frames were in order."""
    source = core._IpcSource(data + written(NUMBERS, numbers(7)), limits)
    with pytest.raises(core.IPCError, match=match):
        reader = core._IpcReader(source, FULL)
        while reader.read() is not None:
            pass
    core._ipc_drain(source)
    assert core._IpcReader(source, FULL).read()[0].equals(numbers(7))


# ---- messages


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_buffers_are_refused(codec: str) -> None:
    options = ipc.IpcWriteOptions(compression=codec)
    refused_and_in_step(written(NUMBERS, numbers(*range(999)), options=options), "compressed")
    words = pa.RecordBatch.from_arrays([pa.array(["x" * 999] * 9).dictionary_encode()], names=["w"])
    refused_and_in_step(written(words.schema, words, options=options), "compressed")


def test_compressed_buffers_are_refused_where_a_plain_batch_was_learned() -> None:
    plain = written(NUMBERS, numbers(*range(64)), numbers(*range(64)))
    packed = written(NUMBERS, numbers(*[0] * 64), options=ipc.IpcWriteOptions(compression="zstd"))
    reader = reader_of(plain[:-8] + messages(packed)[1] + EOS)
    assert reader.read()[0].equals(reader.read()[0])
    with pytest.raises(core.IPCError, match="compressed"):
        reader.read()


def patched(message: bytes, at: int, code: str, *values: int) -> bytes:
    changed = bytearray(message)
    struct.pack_into(code, changed, at, *values)
    return bytes(changed)


@pytest.mark.parametrize("rows", [1, 5])
def test_buffers_that_overlap_are_refused_on_both_paths(rows: int) -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.int64())])
    batch = pa.RecordBatch.from_pydict({"a": list(range(rows)), "b": list(range(rows))}, schema=schema)
    stream = written(schema, batch, batch)
    opening, first, second = messages(stream)
    shape = core._ipc_shape(first)
    shared = patched(second, shape.buffers, "<8q", 0, 0, 0, 8 * rows, 0, 0, 0, 16 * rows)
    for before in (b"", first, first * 2):
        refused_and_in_step(opening + before + shared + EOS, "overlap")
    with pytest.raises(core.IPCError):  # within the body as a sum, and yet beyond its end: pyarrow's own check
        reader_of(opening + patched(second, shape.buffers, "<8q", *(0, 0, 8 * rows, 8 * rows + 8, 0, 0, 0, 0))).read()
    negative = patched(second, shape.buffers, "<8q", 0, 0, 0, -8, 0, 0, 0, 24)
    refused_and_in_step(opening + first + negative + EOS, "overlap")


def test_a_metadata_key_that_is_there_twice_is_refused() -> None:
    stream = written(NUMBERS, numbers(1), metadata={b"key_a": b"1", b"key_b": b"2"})
    refused_and_in_step(stream.replace(b"key_b", b"key_a"), "twice")
    assert reader_of(stream).read()[1] == {b"key_a": b"1", b"key_b": b"2"}


def test_metadata_longer_than_a_packet_is_collected_once() -> None:
    class Drip(core._IpcSource):
        """A peer that sends few bytes at a time; `joined` counts what is copied to keep them together."""

        joined = 0

        def more(self, missing: int) -> None:
            Drip.joined += len(self.buf) - self.pos
            self.buf = self.buf[self.pos :] + rest.pop(0)
            self.pos = 0

        def take_large(self, size: int, head: int) -> pa.Buffer:
            view = memoryview(bytearray(size))
            at = len(self.buf) - self.pos
            view[:at] = self.buf[self.pos :]
            self.buf, self.pos = b"", 0
            while at < size:
                piece = rest.pop(0)
                got = min(len(piece), size - at)
                view[at : at + got] = piece[:got]
                at += got
                self.buf = piece[got:]
            return pa.py_buffer(view)

    metadata = {b"k%d" % i: b"v" * 1_000_000 for i in range(8)}
    data = written(NUMBERS, numbers(1), numbers(2), metadata=metadata)
    rest = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    reader = core._IpcReader(Drip(b""), FULL)
    assert reader.read()[1] == metadata
    assert reader.read()[0].equals(numbers(2))
    assert reader.read() is None
    assert Drip.joined < 1_000_000


# ---- schemas


def test_a_big_endian_schema_is_refused() -> None:
    schema = bytearray(messages(written(NUMBERS))[0])
    table = 8 + struct.unpack_from("<I", schema, 8)[0]
    header = core._ipc_slot(bytes(schema), table, 2)
    header += struct.unpack_from("<I", schema, header)[0]
    vtable = header - struct.unpack_from("<i", schema, header)[0]
    size = struct.unpack_from("<H", schema, vtable + 2)[0]
    ones = [at for at in range(4, size + 60, 2) if struct.unpack_from("<H", schema, header + at)[0] == 1]
    struct.pack_into("<H", schema, vtable + 4, ones[0])  # slot 0, endianness, now points at a 1
    with pytest.raises(core.IPCError, match="big-endian"):
        reader_of(bytes(schema) + EOS)


def test_fields_that_share_their_parts_are_refused_before_they_are_read() -> None:
    """In a flatbuffer ten thousand fields may be one, with a name of a megabyte."""
    names = [f"column_with_a_name_{i}" for i in range(2000)]
    message = bytearray(messages(written(pa.schema([pa.field(n, pa.int8(), metadata={"k": "v"}) for n in names])))[0])
    meta = bytes(message[8:])
    header = core._ipc_slot(meta, struct.unpack_from("<I", meta, 0)[0], 2)
    at = core._ipc_slot(meta, header + struct.unpack_from("<I", meta, header)[0], 1)
    vector = at + struct.unpack_from("<I", meta, at)[0]
    entries = range(vector + 4, vector + 4 + 4 * len(names), 4)
    tables = [entry + struct.unpack_from("<I", meta, entry)[0] for entry in entries]
    long = pa.schema([pa.field("x" * 900_000, pa.int8()), *[pa.field(f"y{i}", pa.int8()) for i in range(500)]])
    assert core._ipc_schema(messages(written(pa.schema([long.field(0)])))[0], core.IpcLimits()).schema.names
    target = max(tables)
    for entry in entries:
        struct.pack_into("<I", message, 8 + entry, target - entry)
    assert len(core._ipc_schema(bytes(message), core.IpcLimits()).schema) == 2000  # small ones may share
    big = bytearray(messages(written(long))[0])
    meta = bytes(big[8:])
    header = core._ipc_slot(meta, struct.unpack_from("<I", meta, 0)[0], 2)
    at = core._ipc_slot(meta, header + struct.unpack_from("<I", meta, header)[0], 1)
    vector = at + struct.unpack_from("<I", meta, at)[0]
    first = vector + 4 + struct.unpack_from("<I", meta, vector + 4)[0]
    for entry in range(vector + 8, vector + 4 + 4 * 501, 4):
        if first > entry:
            struct.pack_into("<I", big, 8 + entry, first - entry)
    with pytest.raises(core.IPCError, match="unfolds"):
        core._ipc_schema(bytes(big), core.IpcLimits())


def test_types_of_which_pyarrow_makes_no_python_arrays_are_refused() -> None:
    schema = pa.schema([("x", pa.month_day_nano_interval()), ("y", pa.list_(pa.month_day_nano_interval()))])
    message = bytearray(messages(written(schema))[0])
    units = [at for at in range(0, len(message) - 1) if message[at : at + 2] == b"\x02\0"]
    changed = []
    for at in units:  # one of them is the unit of an interval: 0 is YEAR_MONTH, 1 DAY_TIME
        for unit in (0, 1):
            other = bytes(message[:at]) + bytes([unit]) + bytes(message[at + 1 :])
            with contextlib.suppress(core.IPCError, pa.ArrowInvalid):
                found = core._ipc_schema(other, core.IpcLimits()).schema
                changed += [
                    dtype for dtype in found.types if "month_interval" in str(dtype) or "day_time" in str(dtype)
                ]
    assert units and changed == []


# ---- dictionaries


def words(*texts: str) -> pa.RecordBatch:
    indices = pa.array(list(range(len(texts))), pa.int32())
    return pa.RecordBatch.from_arrays([pa.DictionaryArray.from_arrays(indices, pa.array(list(texts)))], names=["w"])


def test_dictionaries_without_a_batch_count_together() -> None:
    opening, dictionary, _ = messages(written(words("x").schema, words("x" * 300_000)))
    refused_and_in_step(opening + dictionary * 9 + EOS, "max_message_bytes=1048576")
    reader = reader_of(written(words("x").schema, *[words(letter * 300_000) for letter in "abcdefghij"]))
    for letter in "abcdefghij":  # one after the other is not together
        assert reader.read()[0].column(0)[0].as_py() == letter * 300_000


def test_deltas_count_with_what_they_are_added_to() -> None:
    options = ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    grown = ["a" * 400_000, "b" * 400_000, "c" * 400_000]
    stream = written(words("x").schema, *[words(*grown[:n]) for n in (1, 2, 3)], options=options)
    refused_and_in_step(stream, "dictionaries of")
    assert len(list(iter(reader_of(stream, core.IpcLimits()).read, None))) == 3


# ---- what rows unfold into

MANY = 1 << 27
HOLLOW = [
    pa.nulls(MANY),
    pa.ListArray.from_arrays(pa.array([0, MANY], pa.int32()), pa.nulls(MANY)),
    pa.StructArray.from_buffers(pa.struct([]), MANY, [None]),
    pa.Array.from_buffers(pa.binary(0), MANY, [None, pa.py_buffer(b"")]),
    pa.StructArray.from_arrays([pa.nulls(MANY)], names=["x"]),
]


@pytest.mark.parametrize("array", HOLLOW, ids=lambda array: str(array.type))
@pytest.mark.parametrize("limits", [ONE_MIB, core.IpcLimits()], ids=["limit", "default"])
def test_rows_that_take_no_bytes_count(array: pa.Array, limits: Any) -> None:
    batch = pa.RecordBatch.from_arrays([array], names=["x"])
    refused_and_in_step(written(batch.schema, batch), "unfold into .* max_message_bytes", limits)


def repeated(text: str, rows: int) -> pa.Array:
    """Views that all look at the same bytes."""
    _, views, data = pa.array([text], pa.string_view()).buffers()
    return pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(views.to_pybytes()[:16] * rows), data])


def folded() -> list[pa.Array]:
    long = "x" * 4000
    indices = pa.array([0] * 20_000, pa.int8())
    views = pa.ListViewArray.from_arrays(
        pa.array([0] * 9000, pa.int32()), pa.array([900] * 9000, pa.int32()), pa.array(range(900))
    )
    offsets = pa.array([0] * 300_000, pa.int32())
    return [
        pa.DictionaryArray.from_arrays(indices, pa.array([long])),
        pa.DictionaryArray.from_arrays(indices, pa.array([[1] * 1000])),
        pa.RunEndEncodedArray.from_arrays(pa.array([MANY], pa.int32()), pa.array([7])),
        pa.RunEndEncodedArray.from_arrays(pa.array([20_000], pa.int32()), pa.array([long])),
        repeated(long, 20_000),
        views,
        pa.UnionArray.from_dense(pa.array([0] * 300_000, pa.int8()), offsets, [pa.array([long])]),
    ]


@pytest.mark.parametrize("array", folded(), ids=lambda array: str(array.type)[:40])
def test_what_a_column_becomes_is_counted_before_it_becomes_python_values(array: pa.Array) -> None:
    with pytest.raises(core.IPCError, match="max_message_bytes=1048576"):
        core._ipc_unfold(array, ONE_MIB)
    assert core._ipc_unfold(array.slice(0, 3), ONE_MIB) is not None


def test_a_slice_counts_for_its_rows_only() -> None:
    views = pa.array(["a" * 100, "b" * 200, "c" * 300], pa.string_view())
    assert core._ipc_unfolded(views.slice(1, 1)) == 8 + 200
    assert core._ipc_unfolded(views) == 24 + 600


def test_plain_columns_are_not_estimated() -> None:
    for array in (pa.array(range(300_000)), pa.array(["x" * 3_000_000])):
        assert core._ipc_unfold(array, ONE_MIB) is array


SMALL = [
    pa.array([[True] * 4_000_000]),
    pa.array([[{"on": True}] * 200_000]),
    pa.array([[[]] * 500_000], pa.list_(pa.list_(pa.int64()))),
    pa.array([[(n % 2 == 0, False) for n in range(200_000)]], pa.map_(pa.bool_(), pa.bool_())),
]


@pytest.mark.parametrize("array", SMALL, ids=lambda array: str(array.type))
def test_small_values_count_as_the_objects_that_they_become(array: pa.Array) -> None:
    with pytest.raises(core.IPCError, match="max_message_bytes=1048576"):
        core._ipc_unfold(array, ONE_MIB)


ORDINARY = [
    pa.array([[1.5] * 130_000]),
    pa.array([["word"] * 130_000]),
    pa.array([[{"x": 1.5, "y": 2.5}] * 65_000]),
    pa.array([[(f"key{n}", 1.5) for n in range(52_000)]], pa.map_(pa.utf8(), pa.float64())),
]


@pytest.mark.parametrize("array", ORDINARY, ids=lambda array: str(array.type))
def test_ordinary_values_become_objects_up_to_the_limit(array: pa.Array) -> None:
    assert 900_000 < array.nbytes <= 1 << 20
    assert core._ipc_unfold(array, ONE_MIB) is array
    assert core._ipc_unfold(array, core.IpcLimits()) is array


def test_a_stream_inside_a_value_has_the_limits_of_its_connection() -> None:
    batch = pa.RecordBatch.from_arrays([pa.nulls(1 << 22)], names=["x"])
    data = written(batch.schema, batch)
    assert core.deserialize_record_batch(data)[0].num_rows == 1 << 22
    with pytest.raises(core.IPCError, match="max_message_bytes=1048576"):
        core._wire_nested(core.deserialize_record_batch, data, ONE_MIB)
    assert core._ipc_limits.get() == core.IpcLimits()


# ---- casts

WIDE = pa.struct([(f"f{i}", pa.int64()) for i in range(500)])
ALLOWED = [
    (pa.array([1], pa.int8()), pa.int64(), [1]),
    (pa.array([1], pa.int64()), pa.int8(), [1]),
    (pa.array([1], pa.uint32()), pa.int64(), [1]),
    (pa.array([1]), pa.float64(), [1.0]),
    (pa.array([1.5], pa.float32()), pa.float64(), [1.5]),
    (pa.array(["a"], pa.large_utf8()), pa.utf8(), ["a"]),
    (pa.array(["a" * 20], pa.string_view()), pa.utf8(), ["a" * 20]),
    (pa.array([b"a"]), pa.large_binary(), [b"a"]),
    (pa.array(["a"]).dictionary_encode(), pa.utf8(), ["a"]),
    (pa.array([3]).dictionary_encode(), pa.float64(), [3.0]),
    (pa.array(["a"]), pa.dictionary(pa.int16(), pa.utf8()), ["a"]),
    (pa.array(["a"], pa.string_view()), pa.dictionary(pa.int16(), pa.utf8()), ["a"]),
    (pa.DictionaryArray.from_arrays([0, None], pa.array(["a"], pa.string_view())), pa.large_utf8(), ["a", None]),
    (
        pa.DictionaryArray.from_arrays([0], pa.array(["a"], pa.string_view())),
        pa.dictionary(pa.int16(), pa.utf8()),
        ["a"],
    ),
    (pa.array(["a"]).dictionary_encode(), pa.dictionary(pa.int16(), pa.utf8()), ["a"]),
    (pa.array([[1]], pa.list_(pa.int8())), pa.large_list(pa.int64()), [[1]]),
    (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), pa.list_(pa.int64()), [[1, 2]]),
    (pa.array([[]], pa.list_(pa.null())), pa.list_(pa.int64()), [[]]),
    (pa.array([{"x": 1}]), pa.struct([("x", pa.float64())]), [{"x": 1.0}]),
    (pa.array([[("k", 1)]], pa.map_(pa.utf8(), pa.int8())), pa.map_(pa.utf8(), pa.int64()), [[("k", 1)]]),
    (pa.array([1000], pa.timestamp("ms")), pa.timestamp("s"), None),
    (pa.array([5], pa.time32("s")), pa.time64("us"), None),
    (pa.array([5], pa.duration("s")), pa.duration("us"), None),
    (pa.array([5], pa.decimal128(5, 2)), pa.decimal128(38, 2), None),
    (pa.nulls(2), pa.utf8(), [None, None]),
]
REFUSED = [
    (pa.array(["1e-999999999"]), pa.decimal128(38, 2)),
    (pa.array(["1"]), pa.int64()),
    (pa.array(["1.5"]), pa.float64()),
    (pa.array([1]), pa.utf8()),
    (pa.array([b"\xff"]), pa.utf8()),
    (pa.array(["a"]), pa.binary()),
    (pa.array([1]), pa.time64("us")),
    (pa.array([1]), pa.timestamp("us")),
    (pa.array([1.0]), pa.int64()),
    (pa.array([True]), pa.int64()),
    (pa.array(["2024-01-01"]), pa.date32()),
    (pa.array([1], pa.timestamp("us")), pa.timestamp("us", "UTC")),
    (pa.array([[1]], pa.list_view(pa.int64())), pa.list_(pa.int64())),
    (pa.array([[1]]), pa.list_view(pa.int64())),
    (pa.array(["a"]), pa.string_view()),
    (pa.array([{"x": 1}]), pa.struct([("y", pa.int64())])),
    (pa.array([{"x": "1"}]), pa.struct([("x", pa.int64())])),
    (pa.RunEndEncodedArray.from_arrays(pa.array([3], pa.int32()), pa.array([7])), pa.int64()),
    (pa.array(["1"]).dictionary_encode(), pa.int64()),
    (pa.array([300]), pa.int8()),
    (pa.array([True]).cast(pa.bool8()), pa.uuid()),
    (pa.array([b"x" * 16], pa.binary(16)), pa.uuid()),
    (pa.array([-1]), pa.uint8()),
    (pa.array([2**60 + 1]), pa.float64()),
    (pa.array([1001], pa.timestamp("ms")), pa.timestamp("s")),
]


def fit(array: pa.Array, dtype: pa.DataType, limits: Any = ONE_MIB, nullable: bool = True) -> pa.Array:
    batch = pa.RecordBatch.from_arrays([array], names=["x"])
    return core._ipc_fit(batch, pa.schema([pa.field("x", dtype, nullable)]), limits).column(0)


@pytest.mark.parametrize(("array", "dtype", "values"), ALLOWED, ids=[f"{a.type} to {t}" for a, t, _ in ALLOWED])
def test_the_table_of_casts(array: pa.Array, dtype: pa.DataType, values: list[Any] | None) -> None:
    found = fit(array, dtype)
    assert found.type == dtype
    assert found.to_pylist() == values if values is not None else found.cast(array.type).equals(array)


@pytest.mark.parametrize(("array", "dtype"), REFUSED, ids=[f"{a.type} to {t}" for a, t in REFUSED])
def test_what_the_table_does_not_have_is_refused(array: pa.Array, dtype: pa.DataType) -> None:
    with pytest.raises(TypeError, match=r"'x' is .* not cast to|does not fit"):
        fit(array, dtype)


def test_a_column_that_fits_is_left_as_it_is() -> None:
    nothing = pa.array([[None, None]], pa.list_(pa.null()))  # pyarrow makes an invalid array of it when it casts
    batch = pa.RecordBatch.from_arrays([nothing, pa.array([1], pa.int8())], names=["x", "y"])
    found = core._ipc_fit(batch, pa.schema([("x", nothing.type), ("y", pa.int64())]), ONE_MIB)
    assert found.to_pydict() == {"x": [[None, None]], "y": [1]}


def test_nulls_are_refused_where_none_are_allowed() -> None:
    with pytest.raises(TypeError, match="'x' has nulls"):
        fit(pa.array([1, None], pa.int8()), pa.int64(), nullable=False)
    assert fit(pa.array([1], pa.int8()), pa.int64(), nullable=False).to_pylist() == [1]


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (pa.nulls(MANY), pa.int64()),
        (pa.nulls(9000), WIDE),
        (pa.nulls(9000), pa.list_(pa.int64(), 500)),
        (pa.array([0] * 500_000, pa.int8()), pa.int64()),
        (pa.DictionaryArray.from_arrays(pa.array([0] * 9000, pa.int8()), pa.array(["x" * 4000])), pa.utf8()),
        (repeated("x" * 4000, 9000), pa.utf8()),
        (pa.ListArray.from_arrays(pa.array([0, MANY], pa.int32()), pa.nulls(MANY)), pa.list_(pa.int64())),
        (pa.StructArray.from_arrays([pa.nulls(MANY)], names=["a"]), pa.struct([("a", pa.int64())])),
    ],
    ids=lambda value: str(getattr(value, "type", value))[:30],
)
def test_the_size_of_a_cast_is_estimated_before(array: pa.Array, dtype: pa.DataType) -> None:
    allocated = pa.total_allocated_bytes()
    with pytest.raises(core.IPCError, match="max_message_bytes=1048576"):
        fit(array, dtype)
    assert pa.total_allocated_bytes() - allocated < 2 << 20


def test_honest_casts_count_what_they_make() -> None:
    codes = pa.DictionaryArray.from_arrays(pa.array([0, 1] * 90_000, pa.int8()), pa.array(["x" * 20, "y" * 20]))
    assert (
        fit(codes, pa.dictionary(pa.int16(), pa.utf8())).type.index_type == pa.int16()
    )  # the texts stay where they are
    rows = pa.array([{"x": n, "y": "z"} for n in range(40_000)], pa.struct([("x", pa.int64()), ("y", pa.large_utf8())]))
    assert fit(rows, pa.struct([("x", pa.int64()), ("y", pa.utf8())])).nbytes < 1 << 20


def test_views_that_all_name_the_same_text_are_refused_before_each_is_looked_at() -> None:
    views = repeated("\u00e4" * 200_000, 20_000)
    unused = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), views)
    for array in (views, pa.ListArray.from_arrays(pa.array([0, 20_000], pa.int32()), views), unused):
        batch = pa.RecordBatch.from_arrays([array], names=["x"])
        began = time.process_time()
        refused_and_in_step(written(batch.schema, batch), "unfold into")
        assert time.process_time() - began < 1.5  # validating them takes 2 s and more


def test_a_column_without_values_beside_others_is_read() -> None:
    batch = pa.RecordBatch.from_arrays([pa.nulls(200_000), pa.array([1] * 200_000, pa.int8())], names=["x", "y"])
    assert reader_of(written(batch.schema, batch)).read()[0].num_rows == 200_000


def test_invalid_data_is_not_cast() -> None:
    offsets = pa.py_buffer(struct.pack("<3i", 0, 5, 2))
    broken = pa.Array.from_buffers(pa.utf8(), 2, [None, offsets, pa.py_buffer(b"hello")])
    with pytest.raises(core.IPCError, match="validation"):
        fit(broken, pa.large_utf8())


# ---- learned layouts


def test_nothing_is_learned_from_schemas_with_metadata() -> None:
    plain = pa.field("n", pa.int64())
    assert core._ipc_learn(written(NUMBERS, numbers(1)), numbers(1)) is not None
    for schema in (pa.schema([plain], metadata={"k": "v"}), pa.schema([plain.with_metadata({"k": "v"})])):
        batch = pa.RecordBatch.from_arrays([pa.array([1])], schema=schema)
        assert core._ipc_learn(written(schema, batch), batch) is None


def test_a_traceback_shows_the_lines_of_a_compiled_layout() -> None:
    import linecache

    code = core._ipc_compile(NUMBERS).encode.__code__
    assert linecache.getline(code.co_filename, code.co_firstlineno).startswith("def encode(self, values")


def test_a_stream_without_columns_has_a_template_and_is_learned() -> None:
    template = core._ipc_template(pa.schema([]), {b"k": b"v"})
    data = template.encode(())
    assert data == written(pa.schema([]), core.empty_batch(pa.schema([])), metadata={b"k": b"v"})
    assert core._ipc_learn(data, core.empty_batch(pa.schema([]))).match(data, 0) == ((), len(data))


@pytest.mark.parametrize("dtype", [pa.list_(pa.uuid()), pa.map_(pa.utf8(), pa.date32()), pa.decimal128(5, 2)], ids=str)
def test_a_schema_that_has_no_layout_has_no_template(dtype: pa.DataType) -> None:
    assert core._ipc_template(pa.schema([("x", dtype)]), None) is None
