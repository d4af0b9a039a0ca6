"""Streams and schemas that are values: dataclasses, RecordBatch and Schema cells, replies in one piece."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import random
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import FULL, LIMITS, REFUSED, by_pyarrow, core, same_batch
from tests.fuzz.messages import Corpus, split


class Color(enum.Enum):
    """An enum."""

    RED = 1
    GREEN = 2


@dataclasses.dataclass
class Inner(core.ArrowSerializableDataclass):
    """A struct."""

    x: int
    words: list[str]


@dataclasses.dataclass
class Record(core.ArrowSerializableDataclass):
    """All that a dataclass may have."""

    number: int
    share: float
    text: str | None
    raw: bytes
    yes: bool
    many: list[int]
    table: dict[str, int]
    color: Color
    inner: Inner | None
    late: str = "default"


@dataclasses.dataclass
class Small(core.ArrowSerializableDataclass):
    """One that layouts know."""

    number: int
    text: str


PLAIN_FIELDS = ("number", "share", "text", "raw", "yes", "many", "late")
VALUE_ERRORS = (*REFUSED, ValueError, KeyError, TypeError)  # of `deserialize_from_bytes`, as its docstring has them


def random_record(rng: random.Random) -> Any:
    """An instance."""
    text = rng.choice(("", "x", "häß", "long " * 9))
    if rng.random() < 0.4:
        return Small(rng.getrandbits(40), text)
    return Record(
        rng.getrandbits(62),
        rng.choice((0.5, -1.0)),
        rng.choice((None, text)),
        rng.randbytes(rng.randrange(9)),
        rng.random() < 0.5,
        [rng.getrandbits(9) for _ in range(rng.randrange(4))],
        {str(i): i for i in range(rng.randrange(3))},
        rng.choice(list(Color)),
        rng.choice((None, Inner(1, ["a", text]))),
    )


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Values are decoded with the limits of a connection."""
    token = core._ipc_limits.set(LIMITS)
    try:
        yield
    finally:
        core._ipc_limits.reset(token)


class Target:
    """One value a case."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.any = Corpus.of(f"nested {seed}", 100)
        records = [random_record(random.Random(f"nested {seed} {i}")) for i in range(60)]
        self.records = Corpus([record.serialize_to_bytes() for record in records])
        self.classes = [type(record) for record in records]

    def case(self, rng: random.Random) -> str:
        """A dataclass, a batch or a schema."""
        how = rng.random()
        if how < 0.5:
            return self.dataclass(rng)
        if how < 0.85:
            return self.batch(rng)
        return self.schema(rng)

    def dataclass(self, rng: random.Random) -> str:
        """An instance of the class that was written, or of another."""
        i = rng.randrange(len(self.classes))
        cls = self.classes[i] if rng.random() < 0.95 else rng.choice((Small, Record, Inner))
        data = self.records.streams[i] if rng.random() < 0.1 else self.records.mutant(rng, i)
        with self.box.ours(data), limited():
            try:
                value = cls.deserialize_from_bytes(data)
            except VALUE_ERRORS:
                return "refused"
        if not data:
            raise Finding("a dataclass of no bytes")
        batch = self.first(data)
        if batch.num_columns == 0:
            return "accepted"
        if batch.num_rows != 1:
            raise Finding(f"a dataclass of {batch.num_rows} rows")
        row = batch.to_pylist()[0]
        for name in PLAIN_FIELDS:
            if name in row and hasattr(value, name) and repr(getattr(value, name)) != repr(row[name]):
                raise Finding(f"{name} is {getattr(value, name)!r}; pyarrow reads {row[name]!r}")
        return "accepted"

    def batch(self, rng: random.Random) -> str:
        """The first batch of any stream."""
        data = self.any.valid(rng) if rng.random() < 0.1 else self.any.mutant(rng)
        with self.box.ours(data), limited():
            try:
                found, _ = core.deserialize_record_batch(data)
            except REFUSED:
                return "refused"
        if data and found.num_columns:
            same_batch(found, self.first(data))
        return "accepted"

    def schema(self, rng: random.Random) -> str:
        """A schema message alone."""
        mutant = self.any.mutant(rng)
        try:
            data = split(mutant)[0].encode()
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, ArithmeticError):
            data = mutant
        except Exception:  # struct.error
            data = mutant
        with self.box.ours(data), limited():
            try:
                found = core._types_decode_schema(data)
            except VALUE_ERRORS:
                return "refused"
        try:
            wanted = ipc.read_schema(pa.py_buffer(data))
        except (pa.ArrowException, OSError, ValueError) as exc:
            raise Finding(f"accepted a schema that pyarrow refuses: {exc}") from exc
        if found is None or not found.equals(wanted, check_metadata=True):
            raise Finding(f"schema {found} for {wanted}")
        return "accepted"

    def first(self, data: bytes) -> pa.RecordBatch:
        """What pyarrow reads; one batch may be followed by anything that is not read."""
        at = 0
        for message in split_all(data):
            at += message
            try:
                found = by_pyarrow(data[:at] + b"\xff\xff\xff\xff\0\0\0\0")
            except Finding:
                continue
            if found:
                return found[0][0]
        found = by_pyarrow(data)
        return found[0][0] if found else core.empty_batch(ipc.open_stream(data).schema)


def split_all(data: bytes) -> list[int]:
    """The size of each message."""
    sizes, at = [], 0
    while at + 8 <= len(data):
        source = core._IpcSource(data[at:])
        try:
            message = core._ipc_message(source)
        except Exception:
            break
        if message is None:
            break
        sizes.append(source.pos)
        at += source.pos
    return sizes


assert FULL
