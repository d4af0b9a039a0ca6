"""Random Arrow streams, valid ones and mutants of them, each the same again for the same seed.

`random_stream` makes a valid stream of any schema; `Stream.parse` takes it apart into messages whose metadata are trees
(flat.py); `mutate` changes the structure of one or several of them. A mutant may happen to be valid.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.flat import PLAIN, TYPES, Style, Table, build, parse, random_style

EOS = b"\xff\xff\xff\xff\0\0\0\0"
KINDS = {"Schema": 1, "DictionaryBatch": 2, "RecordBatch": 3}
BOUNDARIES = (
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    12,
    15,
    16,
    24,
    32,
    63,
    64,
    127,
    128,
    255,
    256,
    1 << 15,
    1 << 16,
    1 << 20,
    1 << 27,
)
EXTREMES = (-1, -2, -8, -(1 << 31), 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 60)


class Money(pa.ExtensionType):
    """An extension type that this process knows."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "fuzz.money")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Money:
        return cls()


def register() -> None:
    """Make the extension type known, once a process."""
    with contextlib.suppress(pa.ArrowKeyError):
        pa.register_extension_type(Money())


# ---- types

SCALARS: list[Callable[[random.Random], pa.DataType]] = [
    *[lambda _, t=t: t for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32())],
    *[lambda _, t=t: t for t in (pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.null())],
    *[lambda _, t=t: t for t in (pa.utf8(), pa.binary(), pa.large_utf8(), pa.large_binary())] * 2,
    *[lambda _, t=t: t for t in (pa.string_view(), pa.binary_view(), pa.date32(), pa.date64())],
    *[lambda _, t=t: t for t in (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"))],
    lambda rng: pa.timestamp(rng.choice(("s", "ms", "us", "ns")), rng.choice((None, "UTC", "+01:00"))),
    lambda rng: pa.duration(rng.choice(("s", "ms", "us", "ns"))),
    lambda _: pa.month_day_nano_interval(),
    lambda rng: pa.decimal128(rng.randint(1, 38), rng.randint(-3, 5)),
    lambda rng: pa.decimal256(rng.randint(1, 76), rng.randint(-3, 5)),
    lambda rng: pa.binary(rng.choice((0, 1, 3, 16))),
]
INDICES = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16())
RUN_ENDS = (pa.int16(), pa.int32(), pa.int64())


def random_type(rng: random.Random, depth: int = 3) -> pa.DataType:
    """Any type that Arrow IPC can say."""
    if depth == 0 or rng.random() < 0.5:
        return rng.choice(SCALARS)(rng)

    def field(name: str) -> pa.Field[Any]:
        metadata = {b"m": b"n"} if rng.random() < 0.1 else None
        dtype = random_type(rng, depth - 1)
        return pa.field(name, dtype, nullable=pa.types.is_null(dtype) or rng.random() < 0.8, metadata=metadata)

    def union() -> pa.DataType:
        fields = [field(f"u{i}") for i in range(rng.randint(1, 3))]
        codes = rng.sample(range(10), len(fields)) if rng.random() < 0.3 else None
        return (pa.dense_union if rng.random() < 0.5 else pa.sparse_union)(fields, codes)

    makers: list[Callable[[], pa.DataType]] = [
        lambda: pa.list_(field("item")),
        lambda: pa.large_list(field("item")),
        lambda: pa.list_view(field("item")),
        lambda: pa.large_list_view(field("item")),
        lambda: pa.list_(field("item"), rng.choice((0, 1, 2, 5))),
        lambda: pa.struct([field(f"s{i}") for i in range(rng.randint(0, 3))]),
        lambda: pa.map_(pa.field("key", random_type(rng, depth - 1), nullable=False), field("value")),
        union,
        lambda: pa.run_end_encoded(rng.choice(RUN_ENDS), rng.choice(SCALARS)(rng)),
        lambda: pa.dictionary(rng.choice(INDICES), random_dictionary_values(rng, depth), ordered=rng.random() < 0.2),
        lambda: pa.dictionary(rng.choice(INDICES), random_dictionary_values(rng, depth)),
        Money,
    ]
    while True:
        try:
            return rng.choice(makers)()
        except ValueError:  # a null type that may not be null
            continue


def random_dictionary_values(rng: random.Random, depth: int) -> pa.DataType:
    """What a dictionary holds: mostly texts, sometimes nested."""
    return pa.utf8() if rng.random() < 0.5 else random_type(rng, depth - 1)


def random_schema(rng: random.Random, depth: int = 3) -> pa.Schema:
    """Up to five columns."""
    fields = []
    for i in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 5))):
        metadata = {b"f": b"\xff", b"": b"x"} if rng.random() < 0.1 else None
        fields.append(pa.field(f"c{i}", random_type(rng, depth), nullable=rng.random() < 0.7, metadata=metadata))
    return pa.schema(fields, metadata={b"k": b"v"} if rng.random() < 0.2 else None)


# ---- values


def random_array(rng: random.Random, dtype: pa.DataType, size: int, nullable: bool = True) -> pa.Array[Any]:
    """A valid array; built from buffers where pyarrow has no other way for every type."""
    of = pa.types
    if isinstance(dtype, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(dtype, random_array(rng, dtype.storage_type, size, nullable))
    if of.is_null(dtype):
        return pa.nulls(size)
    if of.is_dictionary(dtype):
        values = random_array(rng, dtype.value_type, rng.randint(1, 4), False)
        indices = [rng.randrange(len(values)) if not nullable or rng.random() < 0.8 else None for _ in range(size)]
        return pa.DictionaryArray.from_arrays(pa.array(indices, dtype.index_type), values, ordered=dtype.ordered)
    if of.is_run_end_encoded(dtype):
        ends = sorted(rng.sample(range(1, size), min(size - 1, rng.randint(0, 3)))) if size > 1 else []
        ends += [size] if size else []
        values = random_array(rng, dtype.value_type, len(ends))
        return pa.RunEndEncodedArray.from_arrays(pa.array(ends, dtype.run_end_type), values)
    if of.is_nested(dtype):
        return _nested_array(rng, dtype, size, nullable)
    values = [_scalar(rng, dtype) if not nullable or rng.random() < 0.8 else None for _ in range(size)]
    if of.is_float16(dtype):
        return _packed(dtype, size, [None, pa.py_buffer(rng.randbytes(2 * size))])
    if of.is_interval(dtype):
        return _packed(dtype, size, [None, pa.py_buffer(rng.randbytes(16 * size))])
    return pa.array(values, dtype)


def _packed(dtype: pa.DataType, size: int, buffers: list[Any], children: list[Any] | None = None) -> pa.Array[Any]:
    return pa.Array.from_buffers(dtype, size, buffers, children=children)


def _scalar(rng: random.Random, dtype: pa.DataType) -> Any:
    of = pa.types
    if of.is_boolean(dtype):
        return rng.random() < 0.5
    if of.is_integer(dtype):
        bits = dtype.bit_width - (0 if of.is_unsigned_integer(dtype) else 1)
        return rng.choice((0, 1, (1 << bits) - 1, rng.getrandbits(bits)))
    if of.is_floating(dtype):
        return rng.choice((0.0, -1.5, float("inf"), float(rng.randint(-99, 99)), 0.25))
    if of.is_decimal(dtype):
        import decimal

        digits = min(dtype.precision, 9)
        return decimal.Decimal(rng.randint(0, 10**digits - 1)).scaleb(-dtype.scale, decimal.Context(prec=100))
    if of.is_fixed_size_binary(dtype):
        return rng.randbytes(dtype.byte_width)
    if of.is_binary(dtype) or of.is_large_binary(dtype) or str(dtype) == "binary_view":
        return rng.randbytes(rng.choice((0, 1, 3, 13, 40)))
    if of.is_string(dtype) or of.is_large_string(dtype) or str(dtype) == "string_view":
        return rng.choice(("", "a", "ä", "hello", "thirteen char", "a text that is longer than a view", "\0"))
    return rng.randrange(86_400) if not of.is_date64(dtype) else rng.randrange(1000) * 86_400_000


def _validity(rng: random.Random, size: int, nullable: bool) -> pa.Buffer | None:
    if not nullable or rng.random() < 0.4:
        return None
    return pa.py_buffer(rng.randbytes((size + 7) // 8))


def _nested_array(rng: random.Random, dtype: pa.DataType, size: int, nullable: bool) -> pa.Array[Any]:
    of = pa.types
    validity = _validity(rng, size, nullable)
    if of.is_union(dtype):
        return _union_array(rng, dtype, size)
    if of.is_struct(dtype):
        children = [random_array(rng, field.type, size, field.nullable) for field in dtype]
        return _packed(dtype, size, [validity], children)
    if of.is_fixed_size_list(dtype):
        child = random_array(rng, dtype.value_type, size * dtype.list_size, dtype.value_field.nullable)
        return _packed(dtype, size, [validity], [child])
    sizes = [rng.choice((0, 0, 1, 2, 4)) for _ in range(size)]
    begin = rng.choice((0, 0, 0, 1))  # a slice of something larger
    offsets = [begin]
    for each in sizes:
        offsets.append(offsets[-1] + each)
    if of.is_map(dtype):
        key = random_array(rng, dtype.key_type, offsets[-1], False)
        item = random_array(rng, dtype.item_type, offsets[-1], dtype.item_field.nullable)
        entries = _packed(pa.struct([dtype.key_field, dtype.item_field]), offsets[-1], [None], [key, item])
        return _packed(dtype, size, [validity, _numbers("i", offsets)], [entries])
    child = random_array(rng, dtype.value_type, offsets[-1], dtype.value_field.nullable)
    code = "q" if str(dtype).startswith("large") else "i"
    if "view" in str(dtype).split("<")[0]:
        places = list(zip(offsets[:-1], sizes, strict=True))
        rng.shuffle(places)
        buffers = [validity, _numbers(code, [at for at, _ in places]), _numbers(code, [n for _, n in places])]
        return _packed(dtype, size, buffers, [child])
    return _packed(dtype, size, [validity, _numbers(code, offsets)], [child])


def _union_array(rng: random.Random, dtype: pa.DataType, size: int) -> pa.Array[Any]:
    chosen = [rng.randrange(dtype.num_fields) for _ in range(size)]
    codes = _numbers("b", [dtype.type_codes[i] for i in chosen])
    fields = [dtype.field(i) for i in range(dtype.num_fields)]
    if dtype.mode == "sparse":
        return _packed(dtype, size, [None, codes], [random_array(rng, f.type, size, f.nullable) for f in fields])
    counts = [0] * len(fields)
    offsets = []
    for i in chosen:
        offsets.append(counts[i])
        counts[i] += 1
    children = [random_array(rng, f.type, n, f.nullable) for f, n in zip(fields, counts, strict=True)]
    return _packed(dtype, size, [None, codes, _numbers("i", offsets)], children)


def _numbers(code: str, numbers: list[int]) -> pa.Buffer:
    return pa.py_buffer(struct.pack(f"<{len(numbers)}{code}", *numbers))


def random_batch(rng: random.Random, schema: pa.Schema, rows: int | None = None) -> pa.RecordBatch:
    """A valid batch: what pyarrow does not accept in full is not given out."""
    rows = rng.choice((0, 1, 1, 1, 2, 3, 9, 40)) if rows is None else rows
    arrays = [random_array(rng, field.type, rows, field.nullable) for field in schema]
    if not arrays:
        return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))
    batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
    batch.validate(full=True)
    return batch


def write_stream(
    schema: pa.Schema,
    items: list[tuple[pa.RecordBatch, dict[bytes, bytes] | None]],
    options: ipc.IpcWriteOptions | None = None,
) -> bytes:
    """What pyarrow writes."""
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, schema, options=options) as writer:
        for batch, metadata in items:
            writer.write_batch(batch, custom_metadata=pa.KeyValueMetadata(metadata) if metadata else None)
    return bytes(sink.getvalue().to_pybytes())


def random_metadata(rng: random.Random) -> dict[bytes, bytes] | None:
    """Custom metadata of a batch, or none."""
    if rng.random() < 0.6:
        return None
    return {b"k%d" % i: rng.randbytes(rng.choice((0, 1, 9))) for i in range(rng.randint(1, 3))}


def random_stream(rng: random.Random, depth: int = 3) -> bytes:
    """A valid stream of a few batches; dictionaries are replaced between them, or grow."""
    for _ in range(99):
        try:
            schema = random_schema(rng, depth)
            items = [(random_batch(rng, schema), random_metadata(rng)) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
            options = ipc.IpcWriteOptions(emit_dictionary_deltas=rng.random() < 0.3)
            data = write_stream(schema, items, options)
            with ipc.open_stream(data) as reader:
                for batch in reader:
                    batch.validate(full=True)
            return data
        except (pa.ArrowException, ValueError, OSError, IndexError):  # pyarrow cannot write, or read, all that is valid
            continue
    raise AssertionError("no valid stream in 99 attempts")


# ---- messages as trees


class Message:
    """One message: the tree of its metadata, and its body."""

    __slots__ = ("body", "raw", "tree")

    def __init__(self, tree: Table, body: bytes, raw: bytes | None = None) -> None:
        self.tree = tree
        self.body = bytearray(body)
        self.raw = raw  # the metadata as they were read, until the tree is changed

    def copy(self) -> Message:
        """A message that can be changed alone."""
        return Message(_copied(self.tree), bytes(self.body), self.raw)

    def changed(self) -> Message:
        """The tree is about to change."""
        self.raw = None
        return self

    @property
    def batch(self) -> Table | None:
        """The record batch table of a batch or dictionary, if it has one."""
        header = self.tree[2]
        if isinstance(header, Table) and header.kind == "DictionaryBatch":
            header = header[1]
        return header if isinstance(header, Table) and header.kind == "RecordBatch" else None

    def encode(self, style: Style = PLAIN, rng: random.Random | None = None) -> bytes:
        """The bytes of the message."""
        meta = self.raw if self.raw is not None else build(self.tree, style, rng).data
        return b"\xff\xff\xff\xff" + struct.pack("<i", len(meta)) + meta + self.body


def _copied(value: Any, known: dict[int, Any] | None = None) -> Any:
    """A deep copy that shares what the original shares."""
    known = {} if known is None else known
    if not isinstance(value, Table | list):
        return value
    if id(value) not in known:
        if isinstance(value, list):
            known[id(value)] = [_copied(each, known) for each in value]
        else:
            known[id(value)] = Table(value.kind, {slot: _copied(each, known) for slot, each in value.slots.items()})
    return known[id(value)]


def split(stream: bytes) -> list[Message]:
    """Take a well-framed stream apart, up to its end marker."""
    found, at = [], 0
    while at + 8 <= len(stream):
        size = struct.unpack_from("<i", stream, at + 4)[0]
        if size == 0:
            break
        meta = stream[at + 8 : at + 8 + size]
        tree = parse(meta)
        end = at + 8 + size + tree[3]
        found.append(Message(tree, stream[at + 8 + size : end], meta))
        at = end
    return found


def join(messages: list[Message], style: Style = PLAIN, rng: random.Random | None = None) -> bytes:
    """The stream of these messages."""
    return b"".join([*[message.encode(style, rng) for message in messages], EOS])


# ---- what the buffers of a batch are


class Part(NamedTuple):
    """One buffer of a batch: what it holds, the size of one item, and its node."""

    kind: str  # validity, values, bits, offsets, sizes, types, bytes, text, views, run_ends, indices, data
    width: int
    node: int


_WIDTHS = {"Date": 8, "Duration": 8, "Timestamp": 8}


def plan(fields: list[Table]) -> list[Part]:
    """The buffers of a batch of these Field tables, in order."""
    parts: list[Part] = []
    node = -1

    def visit(field: Table, plain: bool = False) -> None:
        nonlocal node
        node += 1
        mine = node
        if node > 1000:  # of fields that share parts
            return
        dtype = field[3]
        kind = TYPES[field[2]] if 0 <= field[2] < len(TYPES) else "-"
        if not isinstance(dtype, Table) or dtype.kind != kind:
            return
        if isinstance(field[4], Table) and not plain:
            index = field[4][1]
            width = index[0] // 8 if isinstance(index, Table) else 4
            parts.extend((Part("validity", 1, mine), Part("indices", max(width, 1), mine)))
            return
        wide = 8 if kind.startswith("Large") else 4
        if kind not in ("Null", "Union", "RunEndEncoded"):
            parts.append(Part("validity", 1, mine))
        if kind == "Union":
            parts.append(Part("types", 1, mine))
            if dtype[0] == 1:
                parts.append(Part("offsets", 4, mine))
        elif kind in ("List", "LargeList", "Map"):
            parts.append(Part("offsets", wide, mine))
        elif kind in ("ListView", "LargeListView"):
            parts.extend((Part("offsets", wide, mine), Part("sizes", wide, mine)))
        elif kind in ("Utf8", "LargeUtf8", "Binary", "LargeBinary"):
            parts.extend((Part("offsets", wide, mine), Part("text" if "Utf8" in kind else "bytes", 1, mine)))
        elif kind in ("Utf8View", "BinaryView"):
            parts.append(Part("views", 16, mine))
        elif kind not in ("Null", "Struct", "FixedSizeList", "RunEndEncoded"):
            parts.append(Part("values", _width(kind, dtype), mine))
        for i, child in enumerate(field[5]):
            if kind == "RunEndEncoded" and i == 0:
                node += 1
                width = child[3][0] // 8 if isinstance(child[3], Table) else 4
                parts.extend((Part("validity", 1, node), Part("run_ends", max(width, 1), node)))
            else:
                visit(child)

    for each in fields:
        visit(each)
    return parts


def _width(kind: str, dtype: Table) -> int:
    if kind in ("Int", "Time"):
        return max(int(dtype[1 if kind == "Time" else 0]) // 8, 1)
    if kind == "FixedSizeBinary":
        return max(int(dtype[0]), 1)
    if kind == "Decimal":
        return max(int(dtype[2] or 128) // 8, 1)
    if kind in ("Interval", "FloatingPoint"):
        return 4
    return _WIDTHS.get(kind, 1)


def dictionaries(fields: list[Table]) -> dict[int, Table]:
    """The fields that are dictionaries, by id."""
    found: dict[int, Table] = {}
    todo, seen = list(fields), set()
    while todo:
        field = todo.pop()
        if id(field) in seen:
            continue
        seen.add(id(field))
        if isinstance(field[4], Table):
            found[field[4][0]] = field
        todo += field[5]
    return found


def parts_of(messages: list[Message], message: Message) -> list[Part]:
    """The buffers of one message of a stream that begins with its schema."""
    schema = messages[0].tree[2]
    if not isinstance(schema, Table) or schema.kind != "Schema":
        return []
    header = message.tree[2]
    if isinstance(header, Table) and header.kind == "DictionaryBatch":
        field = dictionaries(schema[1]).get(header[0])
        if field is None:
            return []
        plain = Table("Field", {slot: each for slot, each in field.slots.items() if slot != 4})
        return plan([plain])
    return plan(schema[1])


# ---- other writers


def relaid(rng: random.Random, messages: list[Message], *, shared: bool = False) -> list[Message]:
    """The same stream as another writer lays its bodies out: still valid. `shared`: equal buffers stand there once."""
    found = [messages[0].copy()]
    for message in messages[1:]:
        message = message.copy()
        found.append(message)
        batch = message.batch
        if batch is None or rng.random() < 0.2:
            continue
        message.changed()
        align = rng.choice((8, 8, 64))
        bitmaps, shares, gap = rng.random() < 0.4, shared and rng.random() < 0.3, rng.choice((0, 0, 8, 64))
        body, known, places = bytearray(), {}, []
        parts = parts_of(messages, message)
        for i, (at, size) in enumerate(batch[2]):
            piece = bytes(message.body[at : at + size])
            if bitmaps and not size and i < len(parts) and parts[i].kind == "validity" and len(parts) == len(batch[2]):
                piece = b"\xff" * ((batch[1][parts[i].node][0] + 7) // 8)
            if shares and piece in known:
                places.append([known[piece], len(piece)])
                continue
            body += bytes(gap) + bytes(-(len(body) + gap) % align)
            known[piece] = len(body)
            places.append([len(body), len(piece)])
            body += piece
        body += rng.randbytes(-len(body) % 8)
        batch[2] = places
        message.body = body
        message.tree[3] = len(body)
    return found


# ---- mutants of the metadata


def tables(value: Any, kind: str | None = None) -> Iterator[Table]:
    """All tables of a tree, or those of one kind."""
    todo, seen = [value], set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, list):
            todo += each
        elif isinstance(each, Table):
            if kind is None or each.kind == kind:
                yield each
            todo += each.slots.values()


def odd_number(rng: random.Random, old: int) -> int:
    """A number that is near the old one, or near a border."""
    how = rng.random()
    if how < 0.45:
        return old + rng.choice((-64, -16, -8, -4, -2, -1, 1, 2, 4, 8, 16, 64))
    if how < 0.55:
        return old * 2
    return rng.choice(BOUNDARIES if how < 0.85 else EXTREMES)


def m_numbers(rng: random.Random, stream: Stream) -> None:
    """A number in any table."""
    message = stream.pick(rng)
    found = [(t, s) for t in tables(message.tree) for s, code in enumerate(t.codes) if s in t.slots and code in "hBqib"]
    if found:
        table, slot = rng.choice(found)
        message.changed()
        table[slot] = odd_number(rng, int(table[slot]))


def m_flags(rng: random.Random, stream: Stream) -> None:
    """A boolean: nullable, signed, sorted, delta."""
    message = stream.pick(rng)
    found = [(t, s) for t in tables(message.tree) for s, code in enumerate(t.codes) if code == "?"]
    if found:
        table, slot = rng.choice(found)
        message.changed()
        table[slot] = 0 if table[slot] else 1


def m_holes(rng: random.Random, stream: Stream) -> None:
    """Rows, nodes, buffers, variadic counts and the size of the body."""
    message = stream.pick(rng, "batch")
    batch = message.batch
    if batch is None:
        return
    message.changed()
    how = rng.randrange(9)
    pairs = batch[rng.choice((1, 2))]
    if how == 0:
        batch[0] = odd_number(rng, batch[0])
    elif how == 1 and batch[1]:  # all lengths alike: a batch of another number of rows
        rows = odd_number(rng, batch[0])
        for node in batch[1]:
            if node[0] == batch[0]:
                node[0] = rows
        batch[0] = rows
    elif how == 2 and pairs:
        pairs.append(list(rng.choice(pairs)))
    elif how == 3 and pairs:
        pairs.pop(rng.randrange(len(pairs)))
    elif how == 4 and len(pairs) > 1:
        i, k = rng.sample(range(len(pairs)), 2)
        pairs[i], pairs[k] = pairs[k], pairs[i]
    elif how == 5:
        counts = batch[4]
        counts = (
            [odd_number(rng, n) for n in counts] if counts and rng.random() < 0.7 else [*counts, rng.choice((0, 1, 9))]
        )
        batch[4] = counts
    elif how == 6:
        message.tree[3] = odd_number(rng, message.tree[3])
    elif pairs:
        pair = rng.choice(pairs)
        pair[rng.randrange(2)] = odd_number(rng, pair[rng.randrange(2)])


def m_null_counts(rng: random.Random, stream: Stream) -> None:
    """Null counts that are wrong but possible."""
    message = stream.pick(rng, "batch")
    if message.batch is not None and message.batch[1]:
        node = rng.choice(message.batch[1])
        message.changed()
        node[1] = rng.choice((-1, 0, 1, node[0], node[0] + 1))


def m_compression(rng: random.Random, stream: Stream) -> None:
    """A compression slot: with buffers that are compressed, that say they are not, or left as they are."""
    message = stream.pick(rng, "batch")
    batch = message.batch
    if batch is None:
        return
    message.changed()
    codec = rng.choice((0, 1, 1, 2, -1))
    batch[3] = Table("BodyCompression", {0: codec, 1: rng.choice((0, 0, 0, 1))})
    how = rng.randrange(3)
    if how == 0:
        return
    body, places = bytearray(), []
    for at, size in batch[2]:
        piece = bytes(message.body[max(at, 0) : max(at + size, 0)])
        if how == 1 and piece:
            packed = pa.compress(piece, codec="lz4" if codec == 0 else "zstd", asbytes=True)
            claimed = len(piece) if rng.random() < 0.7 else rng.choice((0, 1 << 20, 1 << 33, -1))
            piece = struct.pack("<q", claimed) + packed
        elif piece:
            piece = struct.pack("<q", -1) + piece
        places.append([len(body), len(piece)])
        body += piece + bytes(-len(piece) % 8)
    batch[2] = places
    message.body = body
    message.tree[3] = len(body)


def m_envelope(rng: random.Random, stream: Stream) -> None:
    """Version, kind, endianness, features."""
    how = rng.randrange(4)
    message = stream.pick(rng)
    message.changed()
    if how == 0:
        message.tree[0] = rng.choice((0, 1, 2, 3, 5, -1))
    elif how == 1:
        message.tree[1] = rng.choice((0, 1, 2, 3, 4, 5, 6, 255))
    else:
        schema = stream.messages[0].changed().tree[2]
        if isinstance(schema, Table) and schema.kind == "Schema":
            schema[0 if how == 2 else 3] = rng.choice((1, 1, 2)) if how == 2 else [rng.choice((0, 1, 2, 99))]


def m_metadata(rng: random.Random, stream: Stream) -> None:
    """Custom metadata: twice the same key, absent and long and odd keys and values; extension names."""
    message = stream.pick(rng)
    holders = [(message.tree, 4), *[(t, 2) for t in tables(message.tree, "Schema")]]
    holders += [(t, 6) for t in tables(message.tree, "Field")]
    table, slot = rng.choice(holders)
    message.changed()
    entries = list(table[slot])
    how = rng.randrange(7)
    if how == 0 and entries:
        entries.append(rng.choice(entries))
    elif how == 1:
        entries += [Table("KeyValue", {0: b"twice", 1: b"1"}), Table("KeyValue", {0: b"twice", 1: b"2"})]
    elif how == 2:
        entries.append(Table("KeyValue", {rng.randrange(2): b"alone"}))
    elif how == 3:
        entries.append(Table("KeyValue", {0: b"long", 1: b"v" * rng.choice((1000, 70_000))}))
    elif how == 4:
        entries.append(Table("KeyValue", {0: b"\xff\xfe", 1: b"\xff\0"}))
    else:
        name = rng.choice((b"arrow.uuid", b"fuzz.money", b"unknown", b"arrow.json", b"arrow.bool8", b"\xff"))
        name = rng.choice((name, b"arrow.fixed_shape_tensor", b"arrow.opaque"))
        about = rng.choice((b"", b"{", b'{"shape":[2]}', b'{"type_name":"a","vendor_name":"b"}'))
        entries += [
            Table("KeyValue", {0: b"ARROW:extension:name", 1: name}),
            Table("KeyValue", {0: b"ARROW:extension:metadata", 1: about}),
        ]
    table[slot] = entries


def m_type(rng: random.Random, stream: Stream) -> None:
    """Another type for a field: of the same stream, or any other with few or many of its slots."""
    schema = stream.messages[0].changed().tree
    fields = list(tables(schema, "Field"))
    if not fields:
        return
    field = rng.choice(fields)
    how = rng.randrange(4)
    if how == 0:
        other = rng.choice(fields)
        field[2], field[3] = other[2], other[3]
    elif how == 1:
        number = rng.randrange(0, 29)
        kind = TYPES[number] if number < len(TYPES) else "Null"
        codes = Table(kind).codes
        slots = {i: rng.choice((0, 1, 2, 8, 16, 32, 64, 128)) for i, code in enumerate(codes) if code in "hqib?"}
        field[2], field[3] = number, Table(kind, slots)
    elif how == 2 and isinstance(field[3], Table):
        for slot, code in enumerate(field[3].codes):
            if code in "hqib?":
                field[3][slot] = rng.choice((0, 1, 2, 3, 8, 16, 32, 64, 128, 256, -1))
            elif code == "Vi":
                field[3][slot] = [rng.choice((0, 1, 5, 127, 128, -1)) for _ in range(rng.randrange(4))]
    elif isinstance(field[3], Table):  # same width, other meaning
        swaps = {2: 3, 3: 2, 4: 5, 5: 4, 19: 20, 20: 19, 12: 25, 25: 12, 21: 26, 26: 21, 23: 24, 24: 23, 17: 12, 10: 18}
        number = swaps.get(field[2], 1)
        field[2], field[3] = number, Table(TYPES[number], dict(field[3].slots) if number != 17 else {})


def m_fields(rng: random.Random, stream: Stream) -> None:
    """Fields and their children: one more, one fewer, in another order, with odd names, deep."""
    schema = stream.messages[0].changed().tree[2]
    if not isinstance(schema, Table):
        return
    fields = list(tables(schema, "Field"))
    holders = [(schema, 1), *[(f, 5) for f in fields]] if schema.kind == "Schema" else []
    how = rng.randrange(7)
    if not fields or not holders:
        return
    table, slot = rng.choice([h for h in holders if h[0][h[1]]] or holders)
    children = list(table[slot])
    if how == 0:
        children.append(_copied(rng.choice(fields)))
    elif how == 1 and children:
        children.pop(rng.randrange(len(children)))
    elif how == 2:
        rng.shuffle(children)
    elif how == 3:
        rng.choice(fields)[0] = rng.choice((b"", b"\xff", b"a\0b", b"c0", None, b"n" * 300))
    elif how == 4:
        deep = _copied(rng.choice(fields))
        for _ in range(rng.choice((3, 40, 70, 130))):
            deep = Table("Field", {0: b"d", 1: 1, 2: 12, 3: Table("List"), 5: [deep]})
        children.append(deep)
    elif how == 5:
        index = Table("Int", {0: rng.choice((8, 16, 32, 64, 7)), 1: 1})
        coding = Table("DictionaryEncoding", {0: rng.choice((0, 1, 7)), 1: rng.choice((index, None)), 2: 0})
        field = rng.choice(fields)
        if isinstance(field[4], Table) and rng.random() < 0.5:
            field.slots.pop(4)
        else:
            field[4] = coding
    else:
        for field in fields:
            if isinstance(field[4], Table):
                field[4][0] = rng.choice((0, 1, 2, -1, 1 << 40))
    table[slot] = children


def m_shared(rng: random.Random, stream: Stream) -> None:
    """Parts that stand in the buffer once and are used a thousand times: few bytes that unfold into many."""
    message = stream.pick(rng)
    size, count = rng.choice(((20_000, 3000), (60_000, 1000), (300, 9000), (10, 12_000)))
    how = rng.randrange(3)
    entry = Table("KeyValue", {0: b"k" * size, 1: b"v" * size})
    if how == 0:
        message.changed().tree[4] = [entry] * count
        return
    schema = stream.messages[0].changed().tree[2]
    if not isinstance(schema, Table) or schema.kind != "Schema":
        return
    field = Table("Field", {0: b"n" * size, 1: 1, 2: 1, 3: Table("Null")})
    if how == 1:
        schema[1] = [field] * count
        return
    for _ in range(rng.choice((2, 12))):  # two children each, which are one: 2 to the power of the depth
        field = Table(
            "Field", {0: b"n", 1: 1, 2: 13, 3: Table("Struct"), 5: [field] * rng.choice((2, 2, 40)), 6: [entry]}
        )
    schema[1] = [field]


def m_absent(rng: random.Random, stream: Stream) -> None:
    """A slot that is not there."""
    message = stream.pick(rng)
    found = [(t, s) for t in tables(message.tree) for s in t.slots]
    if found:
        table, slot = rng.choice(found)
        message.changed()
        table.slots.pop(slot)


def m_dictionary(rng: random.Random, stream: Stream) -> None:
    """Dictionary messages: other ids, deltas, twice, later, or none."""
    found = [m for m in stream.messages if isinstance(m.tree[2], Table) and m.tree[2].kind == "DictionaryBatch"]
    if not found:
        return
    message = rng.choice(found)
    header = message.changed().tree[2]
    how = rng.randrange(5)
    if how == 0:
        header[0] = odd_number(rng, header[0])
    elif how == 1:
        header[2] = 0 if header[2] else 1
    elif how == 2:
        stream.messages.remove(message)
    elif how == 3:
        stream.messages.insert(rng.randrange(1, len(stream.messages) + 1), message.copy())
    else:
        stream.messages.remove(message)
        stream.messages.insert(rng.randrange(1, len(stream.messages) + 1), message)


# ---- mutants of the body


def m_body(rng: random.Random, stream: Stream) -> None:
    """One item of one buffer, knowing what it is."""
    message = stream.pick(rng, "batch")
    batch = message.batch
    parts = parts_of(stream.messages, message)
    if batch is None or not batch[2] or not message.body:
        return
    i = rng.randrange(len(batch[2]))
    at, size = batch[2][i]
    if size <= 0 or at < 0 or at + size > len(message.body):
        return m_bytes(rng, stream)
    # Variadic buffers shift what follows them; a wrong guess is a mutant as well.
    part = parts[i] if i < len(parts) else Part("data", 1, 0)
    width = min(part.width, size)
    place = at + rng.randrange(size // width) * width
    if part.kind in ("offsets", "sizes", "run_ends", "indices", "types"):
        old = int.from_bytes(message.body[place : place + width], "little", signed=True)
        new = odd_number(rng, old)
        message.body[place : place + width] = (new & (1 << 8 * width) - 1).to_bytes(width, "little")
    elif part.kind == "views":
        field = rng.randrange(4)
        old = int.from_bytes(message.body[place + 4 * field : place + 4 * field + 4], "little", signed=True)
        new = odd_number(rng, old) & 0xFFFFFFFF
        message.body[place + 4 * field : place + 4 * field + 4] = new.to_bytes(4, "little")
    elif part.kind == "text":
        message.body[place] = rng.choice((0x80, 0xFF, 0xC0, 0xED, 0xF5, 0x41))
    elif part.kind == "validity":
        message.body[place] ^= 1 << rng.randrange(8)
    else:
        message.body[place : place + width] = rng.choice((bytes(width), b"\xff" * width, rng.randbytes(width)))


def m_bytes(rng: random.Random, stream: Stream) -> None:
    """Any byte of a body; or a body that is shorter or longer than it says."""
    message = stream.pick(rng, "batch")
    if not message.body:
        return
    how = rng.randrange(6)
    if how < 4:
        message.body[rng.randrange(len(message.body))] = rng.choice((0, 1, 2, 4, 8, 127, 128, 255))
    elif how == 4:
        del message.body[rng.randrange(len(message.body)) :]
    else:
        message.body += rng.randbytes(rng.choice((1, 8, 64)))


# ---- mutants of the order


def m_order(rng: random.Random, stream: Stream) -> None:
    """Messages twice, missing, swapped, or of another stream."""
    messages = stream.messages
    how = rng.randrange(7)
    i = rng.randrange(len(messages))
    if how == 0:
        messages.insert(rng.randrange(len(messages) + 1), messages[i].copy())
    elif how == 1:
        messages.pop(i)
    elif how == 2:
        k = rng.randrange(len(messages))
        messages[i], messages[k] = messages[k], messages[i]
    elif stream.others:
        other = [message.copy() for message in rng.choice(stream.others)]
        if how == 3:
            messages[0] = other[0]
        elif how == 4:
            messages[1:] = other[1:]
        elif how == 5:
            messages.insert(rng.randrange(len(messages) + 1), rng.choice(other))
        else:
            messages += other
    if not messages:
        messages.append(split(EMPTY)[0])


def m_repeat(rng: random.Random, stream: Stream) -> None:
    """Batches that look alike, as a reader knows them from the first, and one of them that is a little different."""
    message = stream.pick(rng, "batch")
    if message.raw is None:
        message.raw = build(message.tree, stream.style, rng).data
    if message not in stream.messages:
        return
    for _ in range(rng.choice((1, 2, 3))):
        stream.messages.insert(stream.messages.index(message) + 1, message.copy())
    other = rng.choice([m for m in stream.messages if m.raw == message.raw])
    if rng.random() < 0.6 and other.raw is not None:
        meta = bytearray(other.raw)
        at = rng.randrange(len(meta) // 8) * 8
        old = int.from_bytes(meta[at : at + 8], "little", signed=True)
        meta[at : at + 8] = (odd_number(rng, old) & (1 << 64) - 1).to_bytes(8, "little")
        other.raw = bytes(meta)
    else:
        m_body(rng, Stream([stream.messages[0], other], []))


EMPTY = write_stream(pa.schema([]), [])


# ---- mutants of the bytes


def raw_layout(rng: random.Random, stream: Stream) -> bytes:
    """Offsets, vtables, counts and numbers of the flatbuffer itself, below the tree."""
    target = rng.randrange(len(stream.messages))
    out = []
    for i, message in enumerate(stream.messages):
        if i != target:
            out.append(message.encode())
            continue
        written = build(message.tree, stream.style, rng)
        meta = bytearray(written.data)
        for _ in range(rng.randint(1, 2)):
            place = rng.choice(written.places)
            size = struct.calcsize("<" + place.code)
            old = int.from_bytes(meta[place.at : place.at + size], "little", signed=True)
            new = odd_number(rng, old)
            meta[place.at : place.at + size] = (new & (1 << 8 * size) - 1).to_bytes(size, "little")
        out.append(b"\xff\xff\xff\xff" + struct.pack("<i", len(meta)) + meta + message.body)
    return b"".join(out) + EOS


def raw_bytes(rng: random.Random, data: bytes) -> bytes:
    """The frames: sizes and markers, truncation, more after the end, bits anywhere."""
    how = rng.randrange(8)
    mutant = bytearray(data)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        return data + rng.choice((data, EOS, b"rest", EMPTY, EOS + data))
    if how == 2:
        return data[: -len(EOS)]
    if how == 3:
        at = data.find(b"\xff\xff\xff\xff", rng.randrange(len(data)))
        if at >= 0:
            size = struct.unpack_from("<i", data + bytes(8), at + 4)[0]
            struct.pack_into("<i", mutant, min(at + 4, len(mutant) - 4), odd_number(rng, size) % (1 << 31) - 0)
        return bytes(mutant)
    if how == 4:
        at = rng.choice((0, data.rfind(b"\xff\xff\xff\xff")))
        return data[:at] + rng.choice((b"", b"\xff", b"GET ", b"\0\0\0\0", EOS)) + data[at + rng.choice((0, 4)) :]
    for _ in range(rng.randint(1, 3)):
        mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    return bytes(mutant)


MUTATORS: list[tuple[Callable[[random.Random, Stream], None], int]] = [
    (m_numbers, 3),
    (m_flags, 2),
    (m_holes, 5),
    (m_null_counts, 2),
    (m_compression, 2),
    (m_envelope, 2),
    (m_metadata, 2),
    (m_type, 4),
    (m_fields, 4),
    (m_absent, 2),
    (m_shared, 1),
    (m_dictionary, 3),
    (m_body, 9),
    (m_bytes, 3),
    (m_order, 4),
    (m_repeat, 5),
]
_CHOICES = [mutator for mutator, weight in MUTATORS for _ in range(weight)]


class Stream:
    """Messages that are about to be mutated, and streams from which to take others."""

    def __init__(self, messages: list[Message], others: list[list[Message]], style: Style = PLAIN) -> None:
        self.messages = messages
        self.others = others
        self.style = style

    def pick(self, rng: random.Random, kind: str = "") -> Message:
        """A message; of those with a batch, if there are any."""
        found = [m for m in self.messages if m.batch is not None] if kind == "batch" else self.messages
        return rng.choice(found or self.messages)


class Corpus:
    """Valid streams of one seed, and mutants of them."""

    def __init__(self, streams: list[bytes]) -> None:
        self.streams = streams
        self.parsed = [split(stream) for stream in streams]

    @classmethod
    def of(cls, seed: str, count: int = 150, depth: int = 3) -> Corpus:
        """Random streams; the same for the same seed."""
        return cls([random_stream(random.Random(f"{seed} {i}"), depth) for i in range(count)])

    def valid(self, rng: random.Random) -> bytes:
        """A valid stream, perhaps of another writer."""
        i = rng.randrange(len(self.streams))
        if rng.random() < 0.4:
            return self.streams[i]
        messages = relaid(rng, self.parsed[i])
        for message in messages:
            message.changed()
        return join(messages, random_style(rng), rng)

    def mutant(self, rng: random.Random, base: int | None = None) -> bytes:
        """A mutant of a valid stream."""
        i = rng.randrange(len(self.streams)) if base is None else base
        messages = (
            relaid(rng, self.parsed[i], shared=True) if rng.random() < 0.3 else [m.copy() for m in self.parsed[i]]
        )
        style = random_style(rng) if rng.random() < 0.3 else PLAIN
        return mutate(rng, Stream(messages, self.parsed, style))


def mutate(rng: random.Random, stream: Stream) -> bytes:
    """One to three changes of structure, or one of the bytes."""
    how = rng.random()
    if how < 0.08:
        return raw_bytes(rng, join(stream.messages))
    if how > 0.2 or not stream.messages:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(_CHOICES)(rng, stream)
    if how < 0.25:
        return raw_layout(rng, stream)
    data = join(stream.messages, stream.style, rng)
    return raw_bytes(rng, data) if how > 0.97 else data
