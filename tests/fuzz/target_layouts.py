"""Learned layouts: what one of them matches, pyarrow reads as the same row; what one writes is what pyarrow writes."""

from __future__ import annotations

import random
import struct
from typing import Any

import pyarrow as pa

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import FULL, LIMITS, REFUSED, by_pyarrow, core
from tests.fuzz.messages import PLAIN, Message, Stream, mutate, odd_number, parts_of, split, write_stream

NUMBERS = [
    pa.type_for_alias(name)
    for name in ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float", "double"]
]
TEXTS = [pa.utf8(), pa.binary()]
WORD = pa.dictionary(pa.int16(), pa.utf8())
METADATA = {b"vgi_rpc.method": b"add", b"vgi_rpc.request_version": b"1"}
FAMILIES = 60
LAYOUTS_MAX = 40


def random_column(rng: random.Random) -> pa.DataType:
    """A type that layouts know."""
    how = rng.random()
    if how < 0.35:
        return rng.choice(NUMBERS)
    if how < 0.6:
        return rng.choice(TEXTS)
    if how < 0.68:
        return pa.bool_()
    if how < 0.76:
        return WORD
    element = random_element(rng, 2)
    return pa.list_(element) if how < 0.9 else pa.map_(rng.choice(NUMBERS + TEXTS), element)


def random_element(rng: random.Random, depth: int) -> pa.DataType:
    """What a list or map holds."""
    if depth and rng.random() < 0.3:
        return pa.list_(random_element(rng, depth - 1))
    return rng.choice(NUMBERS + TEXTS)


def random_value(rng: random.Random, dtype: pa.DataType) -> Any:
    """A Python value of exactly the type that a template takes."""
    of = pa.types
    if of.is_dictionary(dtype) or of.is_string(dtype):
        return rng.choice(("", "x", "RED", "grün", "eight by", "a longer text\0"))
    if of.is_binary(dtype):
        return rng.randbytes(rng.choice((0, 1, 7, 8, 9)))
    if of.is_boolean(dtype):
        return rng.random() < 0.5
    if of.is_floating(dtype):
        return rng.choice((0.0, -0.0, 1.5, float("inf"), float("nan"), 0.1 if dtype == pa.float64() else 0.5))
    if of.is_integer(dtype):
        signed = of.is_signed_integer(dtype)
        return rng.getrandbits(dtype.bit_width) - (1 << dtype.bit_width - 1 if signed else 0)
    count = rng.choice((0, 1, 2, 5))
    if of.is_map(dtype):
        return [(random_value(rng, dtype.key_type), random_value(rng, dtype.item_type)) for _ in range(count)]
    return [random_value(rng, dtype.value_type) for _ in range(count)]


class Family:
    """A schema, its template, and the layouts that were learned from streams of it."""

    def __init__(self, rng: random.Random) -> None:
        names = [f"c{i}" for i in range(rng.choice((0, 1, 1, 2, 2, 3, 5)))]
        self.schema = pa.schema([pa.field(name, random_column(rng), nullable=rng.random() < 0.5) for name in names])
        self.metadata = METADATA if rng.random() < 0.5 else None
        self.template = core._ipc_template(self.schema, self.metadata)
        self.layouts: list[Any] = []
        self.seen: list[bytes] = []
        for _ in range(4):
            data = self.by_pyarrow(self.row(rng))
            self.seen.append(data)
            self.learn(data)

    def row(self, rng: random.Random) -> list[Any]:
        """Values of a row; nulls where they may be."""
        return [
            None if field.nullable and rng.random() < 0.2 else random_value(rng, field.type) for field in self.schema
        ]

    def by_pyarrow(self, row: list[Any]) -> bytes:
        """What pyarrow writes."""
        arrays = [pa.array([value], field.type) for value, field in zip(row, self.schema, strict=True)]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema) if arrays else core.empty_batch(self.schema)
        return write_stream(self.schema, [(batch, self.metadata)])

    def learn(self, data: bytes) -> bool:
        """Learn a layout, as a server or client does."""
        source = core._IpcSource(data, LIMITS)
        reader = core._IpcReader(source, FULL)
        item = reader.read()
        reader.drain()
        if item is None:
            return False
        layout = core._ipc_learn(data[: source.pos], item[0])
        if layout is not None and len(self.layouts) < LAYOUTS_MAX:
            self.layouts.append(layout)
        return layout is not None


class Target:
    """One stream a case, against all layouts of its family."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.families = [Family(random.Random(f"layouts {seed} {i}")) for i in range(FAMILIES)]

    def case(self, rng: random.Random) -> str:
        """A row, or a mutant of a stream."""
        family = self.families[rng.randrange(FAMILIES)]
        if rng.random() < 0.15:
            return self.written(rng, family)
        data = self.mutant(rng, family)
        matched = False
        with self.box.ours(data):
            found = [layout.match(data, 0) for layout in family.layouts]
        for each in found:
            if each is not None:
                self.compare(each, data)
                matched = True
        if matched:
            return "accepted"
        if rng.random() < 0.1:
            return self.learned(rng, family, data)
        return "refused"

    def written(self, rng: random.Random, family: Family) -> str:
        """A template writes a stream of a row."""
        row = family.row(rng)
        data = family.by_pyarrow(row)
        with self.box.ours(data):
            pieces = None if family.template is None else family.template.encode(row)
        words = any(value is None for value, field in zip(row, family.schema, strict=True) if field.type == WORD)
        if pieces is None and (words or not row):  # left to pyarrow
            return "refused"
        if pieces is None:
            raise Finding(f"no template wrote {row!r} of {family.schema}")
        got = b"".join(map(bytes, [pieces] if isinstance(pieces, bytes) else pieces))
        if None not in row and got != data:
            raise Finding(f"a template wrote {got.hex()} for {row!r}")
        self.compare((row, len(got)), got)
        found = [each for each in (layout.match(got, 0) for layout in family.layouts) if each is not None]
        if not found and family.layouts:
            raise Finding(f"no layout matches what the template writes for {row!r} of {family.schema}")
        for each in found:
            self.compare(each, got)
        return "written"

    def learned(self, rng: random.Random, family: Family, data: bytes) -> str:
        """A mutant that the reader accepts may be learned; what that layout then matches must be right too."""
        with self.box.ours(data):
            try:
                if not family.learn(data):
                    return "refused"
            except REFUSED:
                return "refused"
        layout = family.layouts[-1]
        for _ in range(3):
            other = family.by_pyarrow(family.row(rng))
            found = layout.match(other, 0)
            if found is not None:
                self.compare(found, other)
        return "learned"

    def mutant(self, rng: random.Random, family: Family) -> bytes:
        """Mostly small changes that a layout has to notice."""
        messages = split(rng.choice(family.seen))
        how = rng.random()
        if how < 0.15:
            return mutate(rng, Stream(messages, [], PLAIN))
        message = messages[-1]
        if how < 0.5:
            self.change_head(rng, message)
        if how > 0.4:
            self.change_body(rng, messages, rng.choice(messages[1:]) if rng.random() < 0.3 else message)
        data = b"".join(each.encode() for each in messages) + b"\xff\xff\xff\xff\0\0\0\0"
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + rng.choice((b"x", data, bytes(8)))
        return data

    def change_head(self, rng: random.Random, message: Message) -> None:
        """A number of the metadata, in its place."""
        assert message.raw is not None
        meta = bytearray(message.raw)
        at = rng.randrange(len(meta) // 8) * 8
        old = struct.unpack_from("<q", meta, at)[0]
        meta[at : at + 8] = (odd_number(rng, old) & (1 << 64) - 1).to_bytes(8, "little")
        message.raw = bytes(meta)

    def change_body(self, rng: random.Random, messages: list[Message], message: Message) -> None:
        """An item of a buffer, or a byte of the padding."""
        body, batch = message.body, message.batch
        if not body or batch is None:
            return
        if rng.random() < 0.3:
            body[rng.randrange(len(body))] = rng.choice((0, 1, 2, 8, 127, 128, 255))
            return
        parts = parts_of(messages, message)
        i = rng.randrange(len(batch[2]))
        at, size = batch[2][i]
        if not size or i >= len(parts):
            return
        width = parts[i].width
        place = at + rng.randrange(max(size // width, 1)) * width
        old = int.from_bytes(body[place : place + width], "little", signed=True)
        body[place : place + width] = (odd_number(rng, old) & (1 << 8 * width) - 1).to_bytes(width, "little")

    def compare(self, found: tuple[Any, int], data: bytes) -> None:
        """A row that was read from the beginning of `data`."""
        row, end = found
        theirs = by_pyarrow(data[:end])
        if len(theirs) != 1 or not data[:end].endswith(b"\xff\xff\xff\xff\0\0\0\0"):
            raise Finding(f"matched a stream of {len(theirs)} batches")
        wanted = [column[0].as_py() for column in theirs[0][0].columns]
        if repr(wanted) != repr(list(row)):
            raise Finding(f"matched {row!r}; pyarrow reads {wanted!r}")
