"""Inputs of streams: what a method is given has the declared schema, is valid, and is what pyarrow reads or casts."""

from __future__ import annotations

import contextlib
import random

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import core, same_array, tolerate
from tests.fuzz.messages import Corpus, random_array, random_type, write_stream
from tests.fuzz.service import Connection, Impl, Server, replies, request

GROUPS = [
    [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()],
    [pa.float16(), pa.float32(), pa.float64(), pa.int32(), pa.uint8(), pa.int64()],
    [pa.utf8(), pa.large_utf8(), pa.string_view(), pa.dictionary(pa.int8(), pa.utf8())],
    [pa.utf8(), pa.dictionary(pa.int64(), pa.utf8()), pa.dictionary(pa.int16(), pa.large_utf8()), pa.binary()],
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(3), pa.utf8()],
    [
        pa.timestamp("s"),
        pa.timestamp("ms"),
        pa.timestamp("us"),
        pa.timestamp("ns"),
        pa.timestamp("us", "UTC"),
        pa.date32(),
    ],
    [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"), pa.int64()],
    [pa.duration("s"), pa.duration("ms"), pa.duration("us"), pa.duration("ns"), pa.int64()],
    [pa.date32(), pa.date64(), pa.int32(), pa.int64(), pa.timestamp("ms")],
    [pa.decimal128(5, 2), pa.decimal128(38, 2), pa.decimal256(50, 2), pa.decimal128(5, 0), pa.utf8(), pa.int64()],
    [pa.null(), pa.int64(), pa.utf8(), pa.bool_(), pa.list_(pa.int8()), pa.struct([("a", pa.int8())])],
    [pa.run_end_encoded(pa.int32(), pa.int64()), pa.int64(), pa.run_end_encoded(pa.int16(), pa.int64()), pa.utf8()],
]
LISTS = (pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda dtype: pa.list_(dtype, 2))


def related(rng: random.Random) -> tuple[pa.DataType, pa.DataType]:
    """Two types of which one may be cast to the other."""
    group = rng.choice(GROUPS)
    have, want = rng.choice(group), rng.choice(group)
    how = rng.random()
    if how < 0.2:
        return rng.choice(LISTS)(have), rng.choice(LISTS)(want)
    if how < 0.3:
        return pa.struct([("a", have), ("b", pa.int8())]), pa.struct([("a", want), ("b", pa.int64())])
    if how < 0.36 and not pa.types.is_null(have):
        return pa.map_(pa.utf8(), have), pa.map_(pa.large_utf8(), want)
    if how < 0.42:
        return rng.choice(LISTS)(rng.choice(LISTS)(have)), rng.choice(LISTS)(rng.choice(LISTS)(want))
    return have, want


def in_steps(column: pa.Array, dtype: pa.DataType) -> pa.Array:
    """pyarrow's cast; in two steps where it has no kernel, as for dictionaries of views."""
    with contextlib.suppress(pa.ArrowException, ValueError):
        return column.cast(dtype)
    plain = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, column.dictionary.cast(plain)).cast(dtype)
    return column.cast(plain).cast(dtype)


class Target:
    """One stream a case."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.server = Server()
        self.corpus = Corpus.of(f"inputs {seed}", 100, depth=2)
        self.schemas = [ipc.open_stream(stream).schema for stream in self.corpus.streams]
        self.connection: Connection = self.server.prove()

    def stream(self, rng: random.Random) -> tuple[pa.Schema, bytes]:
        """What is declared, and what is sent."""
        how = rng.random()
        if how < 0.35:  # of the declared schema, mutated
            i = rng.randrange(len(self.schemas))
            return self.schemas[i], self.corpus.mutant(rng, i) if rng.random() < 0.8 else self.corpus.streams[i]
        if how < 0.45:
            return rng.choice(self.schemas), rng.choice(self.corpus.streams)
        while True:
            have, want = related(rng) if how < 0.9 else (random_type(rng, 2), random_type(rng, 2))
            try:
                arrays = [random_array(rng, have, rng.choice((1, 1, 3, 20)), rng.random() < 0.7) for _ in range(2)]
                schema = pa.schema([("n", have)])
                batches = [pa.RecordBatch.from_arrays([array], schema=schema) for array in arrays]
                sent = write_stream(schema, [(batch, None) for batch in batches])
                break
            except (pa.ArrowException, ValueError, OSError, IndexError):
                continue
        data = sent if rng.random() < 0.6 else Corpus([sent]).mutant(rng)
        return pa.schema([pa.field("n", want, nullable=pa.types.is_null(want) or rng.random() < 0.8)]), data

    def case(self, rng: random.Random) -> str:
        """Open a stream, send its input, call something else."""
        Impl.declared, data = self.stream(rng)
        asked, answer = self.server.control()
        if self.connection.ended:
            self.connection = self.server.prove()
        Impl.inputs.clear()
        with self.box.ours(data):
            same = self.connection.ask(request("go", []) + data, asked, answer)
        got = self.lastgot = bytes(self.connection.got)
        if self.connection.ended:
            self.connection = self.server.prove()
        if Impl.inputs:
            self.judge(list(Impl.inputs), Impl.declared, data + asked)
        streams = replies(got[: -len(answer)] if same else got)
        if not same:
            return "ended"
        errors = [m for items in streams for _, m in items if m.get(b"vgi_rpc.log_level") == b"EXCEPTION"]
        return "refused" if errors or not Impl.inputs else "accepted"

    def judge(self, batches: list[pa.RecordBatch], declared: pa.Schema, data: bytes) -> None:
        """What the method was given, against what pyarrow makes of the same bytes."""
        for batch in batches:
            batch.validate(full=True)
            if not batch.schema.equals(declared):
                raise Finding(f"a method was given {batch.schema} for {declared}")
        if "month_interval" in str(declared):
            return
        wanted = []
        try:
            with ipc.open_stream(pa.py_buffer(data)) as reader:
                while len(wanted) < len(batches):
                    wanted.append(reader.read_next_batch())
                    wanted[-1].validate(full=True)
        except (pa.ArrowException, OSError, ValueError, StopIteration) as exc:
            tolerate(exc, data)
            raise Finding(f"a method was given {len(batches)} batches of what pyarrow refuses: {exc}") from exc
        for batch, other in zip(batches, wanted, strict=True):
            for field, column in zip(declared, batch.columns, strict=True):
                have = other.column(field.name)
                if have.type != field.type:
                    try:
                        have = in_steps(have, field.type)
                    except (pa.ArrowException, ValueError) as exc:
                        raise Finding(f"cast {have.type} to {field.type}, which pyarrow refuses: {exc}") from exc
                if column.null_count and not field.nullable and not other.schema.equals(declared):
                    raise Finding(f"a method was given nulls in {field}")
                if not same_array(column, have):
                    raise Finding(f"{field}: {column} for {have}"[:400])

    def close(self) -> None:
        """End the last connection."""
        if not self.connection.ended:
            self.connection.close()


assert core
