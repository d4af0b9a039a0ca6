"""Pointers into shared memory, its table and its regions: a batch that pyarrow reads there too, or a refusal."""

from __future__ import annotations

import contextlib
import random
import struct

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import FULL, LIMITS, REFUSED, core, same_batch, tolerate
from tests.fuzz.messages import EOS, Corpus, odd_number

SIZE = core.HEADER_SIZE + (1 << 20)


class Target:
    """One pointer a case; the segment is made new when its table has been damaged."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.corpus = Corpus.of(f"shm {seed}", 100, depth=2)
        self.schemas = [ipc.open_stream(stream).schema for stream in self.corpus.streams]
        self.segment = core.ShmSegment.create(SIZE)
        self.reader = core.ShmSegment.attach(self.segment.name, SIZE)

    def case(self, rng: random.Random) -> str:
        """Write a region, point to it, read it."""
        core.ShmAllocator.initialize(self.segment.buf, SIZE)
        i = rng.randrange(len(self.schemas))
        schema = self.schemas[i] if rng.random() < 0.9 else rng.choice(self.schemas)
        data = self.corpus.mutant(rng, i) if rng.random() < 0.7 else self.corpus.streams[i]
        headless = rng.random() < 0.2
        if headless:  # the form of other implementations
            data = data[8 + max(struct.unpack_from("<i", data + bytes(8), 4)[0], 0) :]
            data = data[: -len(EOS)] if data.endswith(EOS) else data
        data = data[: 1 << 19] or b"\0"
        at = core.HEADER_SIZE + 64 * rng.choice((0, 1, 100, 1000))
        self.segment.buf[at : at + len(data)] = data
        table = [(at, len(data))]
        if rng.random() < 0.2:
            table.insert(rng.randrange(2), (at + rng.choice((0, 8, 1 << 19)), 64))
        numbers = [number for entry in table for number in entry]
        count = len(table)
        if rng.random() < 0.15:
            k = rng.randrange(len(numbers))
            numbers[k] = odd_number(rng, numbers[k]) & (1 << 64) - 1
        if rng.random() < 0.05:
            count = odd_number(rng, count) & 0xFFFFFFFF
        struct.pack_into(f"<{len(numbers)}Q", self.segment.buf, 24, *numbers)
        struct.pack_into("<I", self.segment.buf, 16, count)
        metadata = self.pointer(rng, at, len(data))
        about = repr((metadata, numbers, count)).encode() + data
        with self.box.ours(about):
            try:
                batch, found = core._shm_read(self.reader, schema, metadata, FULL, LIMITS)
            except REFUSED:
                self.sweep()
                return "refused"
        offset, length = (int(metadata[key]) for key in (core.SHM_OFFSET_KEY, core.SHM_LENGTH_KEY))
        if not (offset >= core.HEADER_SIZE and offset + length <= SIZE):
            raise Finding(f"read {length} bytes at {offset}")
        self.judge(batch, schema, bytes(self.segment.buf[offset : offset + length]))
        if found.get(core.SHM_SOURCE_KEY) != self.segment.name.encode():
            raise Finding(f"metadata {found}")
        del batch
        self.sweep()
        return "accepted"

    def sweep(self) -> None:
        """What our next turn does; it may say that the table is damaged."""
        with contextlib.suppress(core.IPCError):
            self.reader.sweep()

    def pointer(self, rng: random.Random, at: int, length: int) -> dict[bytes, bytes]:
        """What a message says about the place."""
        where, size = str(at).encode(), str(length).encode()
        if rng.random() < 0.12:
            where = rng.choice((b"", b"-1", b"0", b" 1", b"1e3", b"\xb2", b"9" * 20, str(odd_number(rng, at)).encode()))
        if rng.random() < 0.12:
            size = rng.choice(
                (b"0", b"-8", b"9" * 19, str(length // 2).encode(), str(odd_number(rng, length)).encode())
            )
        return {core.SHM_OFFSET_KEY: where, core.SHM_LENGTH_KEY: size, b"own": b"1"}

    def judge(self, batch: pa.RecordBatch, schema: pa.Schema, region: bytes) -> None:
        """What pyarrow reads there."""
        if not batch.schema.equals(schema):
            raise Finding(f"{batch.schema} for {schema}")
        try:
            with ipc.open_stream(pa.py_buffer(region)) as reader:
                other = reader.read_next_batch()
        except (pa.ArrowException, OSError, ValueError, StopIteration) as exc:
            try:
                with ipc.open_stream(pa.py_buffer(bytes(schema.serialize()) + region)) as reader:
                    other = reader.read_next_batch()
            except (pa.ArrowException, OSError, ValueError, StopIteration):
                tolerate(exc, region)
                raise Finding(f"accepted what pyarrow refuses: {exc}") from exc
        other.validate(full=True)
        if other.schema.equals(batch.schema):
            same_batch(batch.replace_schema_metadata(None), other.replace_schema_metadata(None))

    def close(self) -> None:
        """Remove the segment."""
        self.reader.close()
        self.segment.close()
        self.segment.unlink()
