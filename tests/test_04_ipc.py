"""Room 4: framing, limits, truncation, malformed bytes; templates and layouts against pyarrow (wire.md section 1)."""

from __future__ import annotations

import collections
import random
import struct
import threading
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from tests.core import core

FULL = core.IpcValidation.FULL
EOS = b"\xff\xff\xff\xff\0\0\0\0"
EMPTY_SCHEMA_MESSAGE = bytes.fromhex(
    "ffffffff30000000100000000000 0a000c000600050008000a0000000001 0400"
    "0c00000008000800000004000800000004000000 00000000".replace(" ", "")
)
TICK = bytes.fromhex(
    "ffffffff40000000100000000000 0a000e000600050008000a0000000003 0400"
    "1000000000000a000c0000000400 08000a0000000c000000040000000000 0000"
    "0000000000000000".replace(" ", "")
)
NUMBERS = pa.schema([pa.field("a", pa.float64(), nullable=False), pa.field("b", pa.float64(), nullable=False)])
METADATA = {b"vgi_rpc.method": b"add", b"vgi_rpc.request_version": b"1", b"vgi_rpc.protocol": b"Calc"}
# Whatever bytes arrive, these are the ways in which reading them may fail.
REFUSED = (pa.ArrowException, core.IPCError, EOFError, OSError)

Items = list[tuple[pa.RecordBatch, "dict[bytes, bytes] | None"]]


class Trickle(core._IpcSource):
    """A source that gives one byte at a time and counts them."""

    def __init__(self, data: bytes, limits=core.IpcLimits()) -> None:  # noqa: B008
        super().__init__(b"", limits)
        self.rest = data
        self.given = 0

    def more(self, missing: int) -> None:
        if self.given == len(self.rest):
            raise EOFError("the end")
        self.buf += self.rest[self.given : self.given + 1]
        self.given += 1

    def take_large(self, size: int, head: int) -> pa.Buffer:
        while len(self.buf) - self.pos < size:
            self.more(1)
        return pa.py_buffer(self.take(size, head))


def batch_of(schema: pa.Schema, **columns: list) -> pa.RecordBatch:
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def by_pyarrow(schema: pa.Schema, *batches: pa.RecordBatch, metadata: dict[bytes, bytes] | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata) if metadata else None)
    return sink.getvalue().to_pybytes()


def by_core(schema: pa.Schema, *batches: pa.RecordBatch, metadata: dict[bytes, bytes] | None = None) -> bytes:
    writer = core._IpcWriter(schema)
    for batch in batches:
        writer.write(batch, metadata)
    writer.close()
    return b"".join(map(bytes, writer.take()))


def read_all(source) -> Items:
    reader = core._IpcReader(source, FULL)
    items = []
    while (item := reader.read()) is not None:
        items.append(item)
    assert reader.ended
    return items


def read_bytes(data: bytes, limits=core.IpcLimits()) -> Items:  # noqa: B008
    return read_all(core._IpcSource(data, limits))


REQUEST = by_pyarrow(NUMBERS, batch_of(NUMBERS, a=[1.0], b=[2.0]), metadata=METADATA)


# ---- framing


def test_the_fixed_byte_strings_of_the_specification() -> None:
    assert core._ipc_schema_message(pa.schema([])) == EMPTY_SCHEMA_MESSAGE
    void = by_core(pa.schema([]), core.empty_batch(pa.schema([])))
    assert void == EMPTY_SCHEMA_MESSAGE + TICK + EOS
    assert len(void) == 136
    assert by_core(pa.schema([])) == EMPTY_SCHEMA_MESSAGE + EOS
    assert len(REQUEST) == 552


@pytest.mark.parametrize("metadata", [None, METADATA])
def test_written_streams_are_what_pyarrow_writes(metadata) -> None:
    batches = [batch_of(NUMBERS, a=[float(i)] * i, b=[0.5] * i) for i in range(4)]
    assert by_core(NUMBERS, *batches, metadata=metadata) == by_pyarrow(NUMBERS, *batches, metadata=metadata)


def test_streams_back_to_back_are_read_one_at_a_time() -> None:
    first = by_core(NUMBERS, batch_of(NUMBERS, a=[1.0], b=[2.0]), metadata={b"k": b"v"})
    second = by_core(pa.schema([]), core.empty_batch(pa.schema([])))
    source = core._IpcSource(first + second + b"rest")
    assert [(b.to_pylist(), m) for b, m in read_all(source)] == [([{"a": 1.0, "b": 2.0}], {b"k": b"v"})]
    assert source.pos == len(first)
    assert [(b.num_columns, b.num_rows, m) for b, m in read_all(source)] == [(0, 0, None)]
    assert source.pos == len(first) + len(second)


def test_bytes_may_arrive_one_by_one_and_none_is_read_beyond_the_end() -> None:
    source = Trickle(REQUEST + b"next")
    [(batch, metadata)] = read_all(source)
    assert batch.to_pylist() == [{"a": 1.0, "b": 2.0}]
    assert metadata == METADATA
    assert source.given == len(REQUEST)


def test_drain_consumes_the_rest_of_the_stream_and_no_more() -> None:
    stream = by_core(NUMBERS, *[batch_of(NUMBERS, a=[1.0], b=[2.0])] * 3)
    for source in (core._IpcSource(stream + REQUEST), Trickle(stream + REQUEST)):
        reader = core._IpcReader(source, FULL)
        assert reader.read() is not None
        reader.drain()
        reader.drain()
        assert reader.ended
        assert read_all(source)[0][1] == METADATA


def test_a_stream_must_begin_with_a_schema() -> None:
    batch = batch_of(NUMBERS, a=[1.0], b=[2.0])
    with pytest.raises(pa.ArrowInvalid, match="got a record batch"):
        read_bytes(bytes(batch.serialize()) + EOS)
    with pytest.raises(pa.ArrowInvalid, match="got an end of stream"):
        read_bytes(EOS)


def test_a_schema_or_dictionary_inside_a_plain_stream_is_refused() -> None:
    schema_message = core._ipc_schema_message(NUMBERS)
    with pytest.raises(pa.ArrowInvalid, match="unexpected a schema inside"):
        read_bytes(schema_message * 2 + EOS)
    words = pa.schema([("w", pa.dictionary(pa.int16(), pa.utf8()))])
    dictionary = core._ipc_split(by_core(words, batch_of(words, w=["x"])))[1]
    with pytest.raises(pa.ArrowInvalid, match="unexpected a dictionary inside"):
        read_bytes(schema_message + dictionary + EOS)


@pytest.mark.parametrize("first", [b"G", b"\xfe", b"\xff\0", b"\xff\xff\xff\xfe", b"GET / HTTP/1.1\r\n", b"\0\0\0\0"])
def test_wrong_first_bytes_fail_without_more(first: bytes) -> None:
    source = Trickle(first)
    with pytest.raises(pa.ArrowInvalid, match="not an Arrow IPC stream: expected ff ff ff ff"):
        read_all(source)
    wrong = next(i for i in range(4) if first[i] != 0xFF)
    assert source.given == wrong + 1  # the first byte that cannot be right, and nothing after it


@pytest.mark.parametrize("begin", [b"", b"\xff", b"\xff\xff\xff", b"\xff\xff\xff\xff\x10"])
def test_a_right_beginning_needs_more(begin: bytes) -> None:
    with pytest.raises(EOFError):
        read_all(Trickle(begin))


def test_garbage_between_messages_fails_too() -> None:
    with pytest.raises(pa.ArrowInvalid, match="print"):
        read_all(Trickle(core._ipc_schema_message(NUMBERS) + b"hello"))


# ---- limits: each refusal names its option


def nested(depth: int) -> pa.Schema:
    dtype = pa.int8()
    for _ in range(depth - 1):
        dtype = pa.list_(dtype)
    return pa.schema([("deep", dtype)])


def wide(count: int) -> pa.Schema:
    return pa.schema([(f"wide{i}", pa.int8()) for i in range(count)])


LIMITS = [
    ("max_metadata_bytes", 160, REQUEST, 352),
    ("max_columns", 10, by_pyarrow(wide(11)), 11),
    ("max_nesting", 5, by_pyarrow(nested(6)), 6),
    ("max_metadata_entry_bytes", 22, REQUEST, 23),  # vgi_rpc.request_version
    ("max_message_bytes", 15, REQUEST, 16),
]


@pytest.mark.parametrize(("option", "refused", "data", "allowed"), LIMITS, ids=[row[0] for row in LIMITS])
def test_a_refusal_names_its_option(option: str, refused: int, data: bytes, allowed: int) -> None:
    core._ipc_read_schema.cache_clear()
    with pytest.raises((pa.ArrowInvalid, core.IPCError), match=f"{option}={refused}"):
        read_bytes(data, core.IpcLimits(**{option: refused}))
    read_bytes(data, core.IpcLimits(**{option: allowed}))


@pytest.mark.parametrize(("option", "refused", "data"), [row[:3] for row in LIMITS], ids=[row[0] for row in LIMITS])
def test_a_limit_holds_also_for_what_a_laxer_reader_has_seen(option: str, refused: int, data: bytes) -> None:
    read_bytes(data)
    with pytest.raises((pa.ArrowInvalid, core.IPCError), match=f"{option}={refused}"):
        read_bytes(data, core.IpcLimits(**{option: refused}))


def test_the_default_limits_of_the_design() -> None:
    assert core.IpcLimits() == (16 << 20, 10_000, 64, 1 << 20, None)
    with pytest.raises(core.IPCError, match="max_columns=10000"):
        read_bytes(by_pyarrow(wide(10_001)))
    read_bytes(by_pyarrow(wide(10_000)))
    read_bytes(by_pyarrow(nested(64)))
    with pytest.raises(core.IPCError, match="max_nesting=64"):
        read_bytes(by_pyarrow(nested(65)))


def test_the_body_limit_holds_for_batches_that_look_like_earlier_ones() -> None:
    small, big = batch_of(NUMBERS, a=[1.0], b=[2.0]), batch_of(NUMBERS, a=[1.0] * 9, b=[2.0] * 9)
    reader = core._IpcReader(
        core._IpcSource(by_core(NUMBERS, small, small, big), core.IpcLimits(max_message_bytes=16)), FULL
    )
    assert reader.read()[0].equals(small)
    assert reader.read()[0].equals(small)
    with pytest.raises(pa.ArrowInvalid, match="max_message_bytes=16"):
        reader.read()


def test_the_limits_hold_for_what_is_drained() -> None:
    reader = core._IpcReader(core._IpcSource(REQUEST, core.IpcLimits(max_message_bytes=15)), FULL)
    with pytest.raises(pa.ArrowInvalid, match="max_message_bytes=15"):
        reader.drain()


@pytest.mark.parametrize("size", [-1, -(2**31), 1, 7, 2**31 - 1, (16 << 20) + 1])
def test_an_impossible_metadata_size_is_refused_at_once(size: int) -> None:
    source = Trickle(b"\xff\xff\xff\xff" + struct.pack("<i", size) + b"x" * 100)
    with pytest.raises(pa.ArrowInvalid, match=f"claims {size} bytes of metadata; the limit is max_metadata_bytes="):
        read_all(source)
    assert source.given == 8


# ---- truncated, absent, malformed


def test_every_truncation_is_an_end_of_file() -> None:
    for end in range(len(REQUEST)):
        with pytest.raises(EOFError):
            read_bytes(REQUEST[:end])


def with_body_size(stream: bytes, size: int) -> bytes:
    """Let the last batch of a stream claim another body."""
    messages = core._ipc_split(stream)
    at = sum(map(len, messages[:-1])) + core._ipc_shape(messages[-1]).body_size
    return stream[:at] + struct.pack("<q", size) + stream[at + 8 :]


@pytest.mark.parametrize("size", [25, 32, 1 << 16, 1 << 30, 1 << 40, (1 << 63) - 1])
def test_a_body_that_does_not_come_is_an_end_of_file(size: int) -> None:
    with pytest.raises((EOFError, pa.ArrowInvalid)):  # 16 bytes and the end marker are there
        read_bytes(with_body_size(REQUEST, size))
    reader = core._IpcReader(core._IpcSource(with_body_size(REQUEST, size)), FULL)
    with pytest.raises((EOFError, pa.ArrowInvalid)):
        reader.drain()


@pytest.mark.parametrize("size", [-1, -(1 << 63)])
def test_a_negative_body_is_refused(size: int) -> None:
    with pytest.raises(pa.ArrowInvalid, match=f"claims a body of {size} bytes"):
        read_bytes(with_body_size(REQUEST, size))


def test_only_version_five_is_read() -> None:
    options = ipc.IpcWriteOptions(metadata_version=ipc.MetadataVersion.V4)
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, NUMBERS, options=options) as writer:
        writer.write_batch(batch_of(NUMBERS, a=[1.0], b=[2.0]))
    with pytest.raises(pa.ArrowInvalid, match="only metadata version V5"):
        read_bytes(sink.getvalue().to_pybytes())


def outcome(data: bytes) -> list | None:
    """What reading gives, None when it is refused; anything else that is raised is a fault."""
    try:
        return [(batch.schema.names, batch.to_pydict()) for batch, _ in read_bytes(data)]
    except REFUSED:
        return None
    except UnicodeDecodeError:  # of a column's name: raised by this test's own look at it
        return None


TEXTS = pa.schema([("t", pa.utf8()), ("n", pa.list_(pa.int32())), ("w", pa.dictionary(pa.int16(), pa.utf8()))])
SAMPLES = {
    "request": REQUEST,
    "void": by_core(pa.schema([]), core.empty_batch(pa.schema([]))),
    "texts": by_pyarrow(TEXTS, batch_of(TEXTS, t=["ab", None], n=[[1], []], w=["x", "y"])),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_mutated_byte_is_read_or_refused(name: str) -> None:
    data = SAMPLES[name]
    refused = 0
    for at in range(len(data)):
        for flip in (0xFF, 0x80, 0x01):
            mutant = bytearray(data)
            mutant[at] ^= flip
            refused += outcome(bytes(mutant)) is None
    assert refused > len(data) // 2


def test_metadata_entries_that_share_bytes_are_refused() -> None:
    metadata = {b"k%d" % i: b"v" * (24_000 if i == 3 else 1) for i in range(8)}
    stream = by_pyarrow(NUMBERS, batch_of(NUMBERS, a=[1.0], b=[2.0]), metadata=metadata)
    assert read_bytes(stream)[0][1] == metadata
    schema_message, batch = core._ipc_split(stream)
    message = bytearray(batch)
    slot = core._ipc_slot(batch, 8 + struct.unpack_from("<I", batch, 8)[0], 4)
    vector = slot + struct.unpack_from("<I", batch, slot)[0]
    entries = [vector + 4 + 4 * i for i in range(8)]
    tables = [at + struct.unpack_from("<I", batch, at)[0] for at in entries]
    target = next(table for table in tables if len(core._ipc_string(batch, table, 1)) == 24_000)
    for at in entries:
        if at < target:
            struct.pack_into("<I", message, at, target - at)  # all of them are the large one
    with pytest.raises(core.IPCError, match="overlap"):
        read_bytes(schema_message + bytes(message) + EOS)


def test_metadata_is_bytes_and_need_not_be_utf8() -> None:
    metadata = {b"bad": b"\xff\xfe\x80", b"\xc3": b"", b"zero": b"a\0b"}
    [(batch, got)] = read_bytes(by_core(NUMBERS, batch_of(NUMBERS, a=[1.0], b=[2.0]), metadata=metadata))
    assert got == metadata
    assert batch.num_rows == 1


def test_text_that_is_not_utf8_is_refused() -> None:
    schema = pa.schema([("t", pa.utf8())])
    good = by_pyarrow(schema, batch_of(schema, t=["abcdefgh"]))
    with pytest.raises((pa.ArrowInvalid, core.IPCError)):
        read_bytes(good.replace(b"abcdefgh", b"abc\xffefgh"))


def test_offsets_beyond_their_data_are_refused() -> None:
    schema = pa.schema([("t", pa.utf8())])
    good = by_pyarrow(schema, batch_of(schema, t=["abcdefgh"]))
    for offsets in ((0, 9), (0, -1), (5, 2)):
        bad = good.replace(struct.pack("<ii", 0, 8) + b"abcdefgh", struct.pack("<ii", *offsets) + b"abcdefgh")
        assert bad != good
        with pytest.raises((pa.ArrowInvalid, core.IPCError)):
            read_bytes(bad)


# ---- dictionaries, null columns, large batches


WORDS = pa.schema([("w", pa.dictionary(pa.int16(), pa.utf8()))])


def test_dictionaries_are_replaced_between_batches() -> None:
    batches = [batch_of(WORDS, w=words) for words in (["a", "b"], ["c"], ["c", "c"], [None], ["a", "d", None])]
    for data in (by_core(WORDS, *batches), by_pyarrow(WORDS, *batches)):
        got = [batch.to_pydict()["w"] for batch, _ in read_all(Trickle(data))]
        assert got == [["a", "b"], ["c"], ["c", "c"], [None], ["a", "d", None]]


@pytest.mark.parametrize("rows", [[[]], [[], ["a"]], [["a"], [], ["b"]]])
def test_dictionary_batches_without_rows(rows: list[list[str]]) -> None:
    data = by_core(WORDS, *[batch_of(WORDS, w=words) for words in rows], metadata={b"k": b"v"})
    assert [(batch.to_pydict()["w"], metadata) for batch, metadata in read_bytes(data)] == [
        (words, {b"k": b"v"}) for words in rows
    ]


def test_a_dictionary_schema_without_batches() -> None:
    assert read_bytes(by_core(WORDS)) == []


def test_dictionaries_inside_lists_and_structs() -> None:
    inner = pa.dictionary(pa.int32(), pa.utf8())
    schema = pa.schema([("l", pa.list_(inner)), ("s", pa.struct([("d", inner)]))])
    batches = [batch_of(schema, l=[["x", "y"]], s=[{"d": word}]) for word in ("p", "q")]
    got = [batch.to_pylist() for batch, _ in read_bytes(by_core(schema, *batches))]
    assert got == [[{"l": ["x", "y"], "s": {"d": word}}] for word in ("p", "q")]


def test_a_dictionary_delta_is_appended() -> None:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, WORDS, options=ipc.IpcWriteOptions(emit_dictionary_deltas=True)) as writer:
        for words in (["a"], ["a", "b"]):
            writer.write_batch(batch_of(WORDS, w=words))
    got = [batch.to_pydict()["w"] for batch, _ in read_bytes(sink.getvalue().to_pybytes())]
    assert got == [["a"], ["a", "b"]]


def test_batches_of_null_columns_keep_their_own_row_counts() -> None:
    schema = pa.schema([("n", pa.null()), ("m", pa.null())])
    batches = [batch_of(schema, n=[None] * rows, m=[None] * rows) for rows in (2, 0, 5, 2)]
    got = read_bytes(by_core(schema, *batches))
    assert [batch.num_rows for batch, _ in got] == [2, 0, 5, 2]
    assert all(batch.schema.equals(schema) for batch, _ in got)


def test_batches_without_columns_keep_their_own_row_counts() -> None:
    def rows(count: int) -> pa.RecordBatch:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * count, type=pa.struct([])))

    got = read_bytes(by_core(pa.schema([]), *[rows(count) for count in (0, 0, 3, 0, 7)]))
    assert [batch.num_rows for batch, _ in got] == [0, 0, 3, 0, 7]


@pytest.mark.parametrize("split", [False, True], ids=["all there", "byte by byte"])
def test_plain_batches_like_earlier_ones_are_read_as_they_are(split: bool) -> None:
    schema = pa.schema([("i", pa.int64()), ("t", pa.utf8()), ("n", pa.null())])
    batches = [
        batch_of(schema, i=list(range(rows)), t=["x" * rows] * rows, n=[None] * rows) for rows in (1, 1, 3, 0, 2)
    ]
    messages = [core._ipc_schema_message(schema), *[bytes(batch.serialize()) for batch in batches]]
    odd = core._ipc_split(by_pyarrow(schema, batches[2], metadata={b"k": b"v"}))[1]
    data = b"".join([*messages[:3], odd, *messages[3:], EOS])
    got = read_all(Trickle(data) if split else core._IpcSource(data))
    want = [*batches[:2], batches[2], *batches[2:]]
    assert [batch.to_pylist() for batch, _ in got] == [batch.to_pylist() for batch in want]
    assert [metadata for _, metadata in got] == [None, None, {b"k": b"v"}, None, None, None]


def test_a_bad_batch_after_good_ones_of_the_same_kind_is_refused() -> None:
    schema = pa.schema([("t", pa.utf8())])
    good = bytes(batch_of(schema, t=["abcdefgh"]).serialize())
    source = core._IpcSource(
        core._ipc_schema_message(schema) + good * 2 + good.replace(b"abcdefgh", b"abc\xffefgh") + EOS
    )
    reader = core._IpcReader(source, FULL)
    assert reader.read()[0].to_pydict() == {"t": ["abcdefgh"]}
    assert reader.read()[0].to_pydict() == {"t": ["abcdefgh"]}
    with pytest.raises((pa.ArrowInvalid, core.IPCError)):
        reader.read()


@pytest.mark.parametrize("rows", [1, 8_000, 9_000, 300_000])
def test_large_batches_through_a_pipe(rows: int) -> None:
    batch = batch_of(NUMBERS, a=[0.5] * rows, b=[1.5] * rows)
    client, server = core.make_pipe_pair()
    writer = core._IpcWriter(NUMBERS)
    writer.write(batch)
    writer.write(batch, {b"k": b"v"})
    writer.close()
    thread = threading.Thread(target=lambda: client.channel.send(writer.take()))
    thread.start()
    got = read_all(server.channel)
    thread.join(10)
    client.close()
    server.close()
    assert not thread.is_alive()
    assert [item.equals(batch) for item, _ in got] == [True, True]
    assert [metadata for _, metadata in got] == [None, {b"k": b"v"}]


# ---- templates and layouts


WORD = pa.dictionary(pa.int16(), pa.utf8())
HANDLED = [
    *[(pa.type_for_alias(f"int{bits}"), 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)],
    *[(pa.type_for_alias(f"uint{bits}"), 0, 1, 2**bits - 1) for bits in (8, 16, 32, 64)],
    (pa.float32(), 0.0, 1.5, float("-inf")),
    (pa.float64(), 0.0, -0.1, 1e308),
    (pa.bool_(), True, False, True),
    (pa.utf8(), "", "häß\0", "x" * 9),
    (pa.binary(), b"", b"\xff\0", b"12345678"),
    (pa.list_(pa.int16()), [], [1, -2, 3], [7] * 8),
    (pa.list_(pa.float64()), [], [0.5], [1.0, 2.0]),
    (pa.list_(pa.utf8()), [], ["", "ä"], ["abc"] * 5),
    (pa.list_(pa.binary()), [], [b""], [b"abc", b"\xff"]),
    (pa.list_(pa.list_(pa.int64())), [], [[1], [], [2, 3]], [[]]),
    (pa.map_(pa.utf8(), pa.int64()), [], [("a", 1)], [("b", -1), ("", 2)]),
    (pa.map_(pa.utf8(), pa.list_(pa.utf8())), [], [("a", ["x"]), ("b", [])], [("c", ["y", "z"])]),
    (WORD, "x", "", "RED"),
]
IDS = [str(row[0]) for row in HANDLED]
needs_learning = pytest.mark.skipif(not core._ipc_learning, reason="VGI_RPC_FAST_PATH=0")


@needs_learning
@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(("dtype", "values"), [(row[0], row[1:]) for row in HANDLED], ids=IDS)
def test_a_template_writes_what_pyarrow_writes(dtype: pa.DataType, values: tuple, nullable: bool) -> None:
    schema = pa.schema([pa.field("v", dtype, nullable=nullable), pa.field("i", pa.int32(), nullable=False)])
    template = core._ipc_template(schema, METADATA)
    for value in values:
        written = by_pyarrow(schema, batch_of(schema, v=[value], i=[5]), metadata=METADATA)
        assert template.encode((value, 5)) == written
        if pa.types.is_map(dtype):
            assert template.encode((dict(value), 5)) == written


@needs_learning
@pytest.mark.parametrize("dtype", [row[0] for row in HANDLED], ids=IDS)
def test_a_null_by_a_template_is_valid_or_left_to_pyarrow(dtype: pa.DataType) -> None:
    schema = pa.schema([("v", dtype), ("t", pa.utf8())])
    data = core._ipc_template(schema, None).encode((None, "after"))
    assert data is None or read_bytes(data)[0][0].to_pylist() == [{"v": None, "t": "after"}]
    required = pa.schema([pa.field("v", dtype, nullable=False)])
    assert core._ipc_template(required, None).encode((None,)) is None


@needs_learning
@pytest.mark.parametrize("nullable", [False, True])
@pytest.mark.parametrize(("dtype", "values"), [(row[0], row[1:]) for row in HANDLED], ids=IDS)
def test_a_layout_reads_what_pyarrow_writes(dtype: pa.DataType, values: tuple, nullable: bool) -> None:
    schema = pa.schema([pa.field("v", dtype, nullable=nullable), pa.field("t", pa.utf8(), nullable=False)])
    streams = [by_pyarrow(schema, batch_of(schema, v=[value], t=["x"]), metadata=METADATA) for value in values]
    for sample in streams:
        layout = core._ipc_learn(sample, read_bytes(sample)[0][0])
        assert layout is not None
        for value, data in zip(values, streams, strict=True):
            found = layout.match(b"before" + data + b"after", 6)
            assert found is not None, value
            assert (list(found[0]), found[1]) == ([value, "x"], 6 + len(data))
            for end in range(len(data)):
                assert layout.match(data[:end], 0) is None


@needs_learning
def test_a_null_of_a_layout() -> None:
    schema = pa.schema([("v", pa.int64()), ("t", pa.utf8())])
    sample = by_pyarrow(schema, batch_of(schema, v=[1], t=["x"]))
    layout = core._ipc_learn(sample, read_bytes(sample)[0][0])
    for row in ([None, None], [None, "y"], [5, None]):
        data = by_pyarrow(schema, batch_of(schema, v=row[:1], t=row[1:]))
        found = layout.match(data, 0)
        assert found is None or list(found[0]) == row


@needs_learning
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (pa.int64(), True),
        (pa.int64(), 1.0),
        (pa.int8(), 128),
        (pa.uint8(), -1),
        (pa.float64(), 1),
        (pa.float32(), 1e300),
        (pa.bool_(), 1),
        (pa.utf8(), b"x"),
        (pa.utf8(), "\ud800"),
        (pa.binary(), "x"),
        (pa.binary(), bytearray(b"x")),
        (pa.list_(pa.int64()), (1,)),
        (pa.list_(pa.int64()), [1, None]),
        (pa.list_(pa.int64()), [True]),
        (pa.list_(pa.utf8()), ["a", 1]),
        (pa.map_(pa.utf8(), pa.int64()), {"a": None}),
        (pa.map_(pa.utf8(), pa.int64()), collections.OrderedDict(a=1)),
        (pa.map_(pa.utf8(), pa.int64()), [["a", 1]]),
        (pa.map_(pa.utf8(), pa.int64()), [(None, 1)]),
        (WORD, 3),
    ],
)
def test_unfamiliar_values_are_left_to_pyarrow(dtype: pa.DataType, value: object) -> None:
    template = core._ipc_template(pa.schema([pa.field("v", dtype, nullable=False)]), None)
    assert template.encode((value,)) is None


@pytest.mark.parametrize("dtype", [pa.null(), pa.large_utf8(), pa.date32(), pa.list_(pa.bool_()), pa.struct([])])
def test_unfamiliar_types_have_no_template(dtype: pa.DataType) -> None:
    assert core._ipc_template(pa.schema([("v", dtype)]), None) is None
    schema = pa.schema([("v", dtype)])
    sample = by_pyarrow(schema, batch_of(schema, v=[None]))
    assert core._ipc_learn(sample, read_bytes(sample)[0][0]) is None


def shapes() -> st.SearchStrategy[tuple[pa.DataType, st.SearchStrategy[Any]]]:
    """Types that layouts handle, each with its values."""
    plain = [
        (pa.int8(), st.integers(-128, 127)),
        (pa.uint64(), st.integers(0, 2**64 - 1)),
        (pa.float64(), st.floats(allow_nan=False)),
        (pa.utf8(), st.text(max_size=9)),
        (pa.binary(), st.binary(max_size=9)),
    ]

    def listed(shape: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
        return pa.list_(shape[0]), st.lists(shape[1], max_size=4)

    def mapped(key: tuple[pa.DataType, Any], item: tuple[pa.DataType, Any]) -> tuple[pa.DataType, Any]:
        return pa.map_(key[0], item[0]), st.lists(st.tuples(key[1], item[1]), max_size=4)

    lists = st.recursive(st.sampled_from(plain), lambda inner: inner.map(listed), max_leaves=3)
    maps = st.builds(mapped, st.sampled_from(plain), lists)
    return st.one_of(st.just((pa.bool_(), st.booleans())), lists, maps)


@needs_learning
@settings(max_examples=150, deadline=None)
@given(st.data(), st.lists(st.tuples(shapes(), st.booleans()), min_size=1, max_size=6))
def test_rows_of_any_shape_come_back(data: st.DataObject, columns: list[tuple[Any, bool]]) -> None:
    fields = [pa.field(f"c{i}", dtype, nullable=nullable) for i, ((dtype, _), nullable) in enumerate(columns)]
    schema = pa.schema(fields)
    rows = [
        [data.draw(st.one_of(st.none(), values) if nullable else values) for (_, values), nullable in columns]
        for _ in range(3)
    ]
    template = core._ipc_template(schema, METADATA)
    streams = [template.encode(row) for row in rows]
    layout = core._ipc_learn(streams[0], read_bytes(streams[0])[0][0])
    assert isinstance(layout, core._IpcCanonical)
    for row, stream in zip(rows, streams, strict=True):
        assert [column[0].as_py() for column in read_bytes(stream)[0][0].columns] == row
        found, end = layout.match(stream, 0)
        assert list(found) == row and end == len(stream)
        if None not in row:
            batch = batch_of(schema, **{f"c{i}": [v] for i, v in enumerate(row)})
            assert stream == by_pyarrow(schema, batch, metadata=METADATA)


@needs_learning
@pytest.mark.parametrize("dtype", [pa.float64(), pa.utf8()])
def test_the_deadline_is_one_hole_more(dtype: pa.DataType) -> None:
    schema = pa.schema([pa.field("v", dtype, nullable=False)])
    values = (1.5, 2.5) if dtype == pa.float64() else ("a", "bc")
    template = core._ipc_template(schema, {**METADATA, core.DEADLINE_KEY: core._IPC_DEADLINE})
    streams = []
    for value, digits in zip(values, (b"0000000000000001", b"0000000012345678"), strict=True):
        data = template.encode((value,), digits)
        metadata = {**METADATA, core.DEADLINE_KEY: digits}
        assert data == by_pyarrow(schema, batch_of(schema, v=[value]), metadata=metadata)
        streams.append((data, digits, value))
    layout = core._ipc_learn(streams[0][0], read_bytes(streams[0][0])[0][0], streams[0][1])
    for data, digits, value in streams:
        row, end = layout.match(data, 0)
        assert (list(row), end) == ([value], len(data))
        assert data[layout.deadline_at : layout.deadline_at + 16] == digits
    assert core._ipc_learn(streams[0][0], read_bytes(streams[0][0])[0][0], b"absent_absent_ab") is None


# ---- differential fuzz (FINDINGS.md section 3)

FUZZED = [
    (pa.schema([pa.field("a", pa.float64(), nullable=False), pa.field("b", pa.int32(), nullable=False)]), [[1.5], [3]]),
    (pa.schema([("t", pa.utf8()), ("i", pa.int64()), ("y", pa.bool_())]), [["hello"], [7], [True]]),
    (pa.schema([("t", pa.utf8()), ("i", pa.int64())]), [[None], [None]]),
    (pa.schema([pa.field("l", pa.list_(pa.int16()), nullable=False)]), [[[1, 2, 3]]]),
    (pa.schema([("l", pa.list_(pa.utf8())), ("b", pa.binary())]), [[["a", "", "cde"]], [b"\0\xff"]]),
    (pa.schema([("l", pa.list_(pa.list_(pa.int64())))]), [[[[1], [], [2, 3]]]]),
    (pa.schema([("m", pa.map_(pa.utf8(), pa.int64()))]), [[[("a", 1), ("b", 2)]]]),
    (pa.schema([("l", pa.list_(pa.utf8())), ("m", pa.map_(pa.int8(), pa.binary())), ("i", pa.int64())]), [[None]] * 3),
    (pa.schema([pa.field("w", WORD, nullable=False), pa.field("i", pa.int8())]), [["GREEN"], [1]]),
]


def mutated(data: bytes, holes: list[int], rng: random.Random) -> bytes:
    """One to three changes: a number in a hole, a byte of a body, or any byte at all."""
    mutant = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        how = rng.random()
        if how < 0.5:
            at = rng.choice(holes)
            value = rng.choice((0, 1, 2, 3, 4, 7, 8, 12, 16, 24, 32, 40, 64, -1, -8, 1 << 31, (1 << 63) - 1))
            if rng.random() < 0.5:
                value = struct.unpack_from("<q", mutant, at)[0] + rng.choice((-8, -4, -1, 1, 4, 8))
            mutant[at : at + 8] = struct.pack("<Q", value & (1 << 64) - 1)
        elif how < 0.9:
            mutant[rng.randrange(max(holes), len(mutant))] = rng.choice((0, 1, 2, 3, 4, 8, 127, 128, 255))
        else:
            mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


def hole_positions(data: bytes) -> list[int]:
    found, at = [], 0
    for message in core._ipc_split(data):
        if at:
            shape = core._ipc_shape(message)
            found.append(at + shape.body_size)
            found += [at + shape.nodes + 8 * i for i in range(2 * shape.node_count)]
            found += [at + shape.buffers + 8 * i for i in range(2 * shape.buffer_count)]
        at += len(message)
    return found


def relaid(data: bytes) -> bytes:
    """The same one-row stream as another writer lays it out: validity bitmaps, every buffer on 64 bytes."""
    schema_message, batch = core._ipc_split(data)
    shape = core._ipc_shape(batch)
    head, body = bytearray(batch[: shape.head]), bytearray()
    places = struct.unpack_from(f"<{2 * shape.buffer_count}q", head, shape.buffers)
    moved: list[int] = []
    for at, size in zip(places[::2], places[1::2], strict=True):
        piece = batch[shape.head + at : shape.head + at + size] or b"\1"
        moved += (len(body), len(piece))
        body += piece + bytes(-len(piece) % 64)
    struct.pack_into(f"<{len(moved)}q", head, shape.buffers, *moved)
    struct.pack_into("<q", head, shape.body_size, len(body))
    return schema_message + head + body + data[-8:]


def fuzz(schema: pa.Schema, values: list, seed: int, count: int) -> None:
    rng = random.Random(seed)
    arrays = [pa.array(value, type=field.type) for value, field in zip(values, schema, strict=True)]
    sample = by_pyarrow(schema, pa.RecordBatch.from_arrays(arrays, schema=schema), metadata={b"k": b"v"})
    layout = core._ipc_learn(sample, read_bytes(sample)[0][0])
    assert layout is not None
    holes = hole_positions(sample)
    accepted = 0
    for _ in range(count):
        data = mutated(sample, holes, rng)
        found = layout.match(data, 0)
        if found is None:
            continue
        accepted += 1
        row, end = found
        with ipc.open_stream(pa.py_buffer(data[:end])) as reader:
            batches = list(reader)  # raises when pyarrow refuses
        assert len(batches) == 1, data.hex()
        batches[0].validate(full=True)
        assert repr([column[0].as_py() for column in batches[0].columns]) == repr(list(row)), data.hex()
    assert accepted > 20


FUZZ = pytest.mark.parametrize(("schema", "values"), FUZZED, ids=[" ".join(map(str, s.types)) for s, _ in FUZZED])


@needs_learning
@FUZZ
def test_a_layout_accepts_nothing_that_pyarrow_refuses(schema: pa.Schema, values: list) -> None:
    fuzz(schema, values, seed=5, count=1500)


@needs_learning
@pytest.mark.long
@pytest.mark.timeout(900)
@FUZZ
def test_a_hundred_thousand_mutants(schema: pa.Schema, values: list) -> None:
    fuzz(schema, values, seed=77, count=100_000 // len(FUZZED))


@needs_learning
@pytest.mark.parametrize(("dtype", "values"), [(row[0], row[1:]) for row in HANDLED[:-1]], ids=IDS[:-1])
def test_layouts_of_a_writer_that_is_not_pyarrow(dtype: pa.DataType, values: tuple) -> None:
    schema = pa.schema([("v", dtype), ("t", pa.utf8())])
    for value in values:
        data = relaid(by_pyarrow(schema, batch_of(schema, v=[value], t=["x"])))
        batch = read_bytes(data)[0][0]
        assert [column[0].as_py() for column in batch.columns] == [value, "x"]
        assert core._ipc_learn(data, batch) is None  # the pyarrow path reads it, each time


@needs_learning
def test_the_caches_of_layouts_are_bounded() -> None:
    schema = pa.schema([pa.field("t", pa.utf8(), nullable=False), pa.field("b", pa.binary(), nullable=False)])
    template = core._ipc_template(schema, None)
    sample = template.encode(("", b""))
    layout = core._ipc_learn(sample, read_bytes(sample)[0][0])
    for size in range(3000):
        data = template.encode(("x" * size, b"y" * (size // 2)))
        assert layout.match(data, 0)[0] == ("x" * size, b"y" * (size // 2))
        assert sum(len(first) for first, _ in layout.heads.values()) <= 2 * core._IPC_HEADS_BYTES
    for k in range(1000):
        core._ipc_schema(bytes(pa.schema([(f"column{k}", pa.int64())]).serialize()), core.IpcLimits())
    assert core._ipc_read_schema.cache_info().currsize <= 128
