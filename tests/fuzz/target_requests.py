"""Requests to a server in this process: an answer or an end, then an honest call; no method sees what nobody sent."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import core, same_batch, tolerate
from tests.fuzz.messages import Corpus
from tests.fuzz.service import Connection, Impl, Server, replies, request
from tests.fuzz.target_nested import Color, Record, random_record

EXTRA = [b"x-timeout-us", b"vgi_rpc.shm_offset", b"vgi_rpc.shm_length", b"vgi_rpc.location", b"vgi_rpc.log_level"]
EXTRA += [core.SHM_OFFSET_KEY, core.SHM_LENGTH_KEY, core.LOCATION_KEY, core.LOG_LEVEL_KEY, core.LOG_MESSAGE_KEY]
ODD = [b"", b"0", b"-1", b"0000000000000000", b"9999999999999999", b"EXCEPTION", b"\xff", b"http://127.0.0.1:1/x"]


def arguments(rng: random.Random, method: str, nested: Corpus) -> list[Any]:
    """Honest values; streams in them are mutants."""
    number = rng.choice((0, -1, 7, 1 << 40))
    text = rng.choice(("", "x", "häß", "long " * 20))
    raw = rng.randbytes(rng.choice((0, 3, 8)))
    if method == "record":
        record = random_record(rng)
        while not isinstance(record, Record):
            record = random_record(rng)
        return [record.serialize_to_bytes()]
    if method in ("batch", "schema"):
        return [nested.mutant(rng) if rng.random() < 0.8 else nested.valid(rng)]
    return {
        "add": [number, 1],
        "scale": [0.5, -1.5],
        "text": [text, raw],
        "mixed": [
            number,
            0.5,
            rng.choice((None, text)),
            raw,
            [text, "y"],
            rng.choice((None, 3)),
            True,
            [("k", number)],
        ],
        "many": [[[1, 2], [], [number]], [raw, b"x"]],
        "color": [rng.choice(("RED", "GREEN", "BLUE"))],
        "nothing": [],
        "table": [[(text, number), ("b", 2)]],
        "count": [2],
    }[method]


NAMES = ("add", "scale", "text", "mixed", "many", "color", "record", "batch", "schema", "nothing", "table", "count")


class Target:
    """One request a case, and an honest one behind it."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.server = Server()
        self.nested = Corpus.of(f"requests {seed}", 60, depth=2)
        rng = random.Random(f"requests {seed}")
        self.names = [rng.choice(NAMES) for _ in range(120)]
        self.corpus = Corpus([self.honest(rng, name) for name in self.names])
        self.connection: Connection = self.server.prove()

    def honest(self, rng: random.Random, name: str) -> bytes:
        """A request whose values may be anything."""
        extra = {rng.choice(EXTRA): rng.choice(ODD)} if rng.random() < 0.15 else None
        return request(name, arguments(rng, name, self.nested), extra)

    def case(self, rng: random.Random) -> str:
        """A mutant, or an honest frame around a mutant."""
        how = rng.random()
        if how < 0.7:
            data = self.corpus.mutant(rng)
        else:
            data = self.honest(rng, rng.choice(("batch", "schema") if how < 0.9 else NAMES))
        asked, answer = self.server.control()
        if self.connection.ended:
            self.connection = self.server.prove()
        Impl.calls.clear()
        with self.box.ours(data):
            same = self.connection.ask(data, asked, answer)
        got = self.lastgot = bytes(self.connection.got)
        if not same:
            self.connection = self.server.prove()
        streams = replies(got[: -len(answer)] if same else got)
        calls = [call for call in Impl.calls if call[1].get("a", 0) != self.server.number]
        calls = [call for call in calls if call[1].get("a", 0) != self.server.number - 1 or call[0] != "add"]
        if len(calls) == 1:
            self.judge(calls[0], data + asked)
        if not same:
            return "ended"
        errors = [m for items in streams for _, m in items if m.get(b"vgi_rpc.log_level") == b"EXCEPTION"]
        return "refused" if errors or not streams else "answered"

    def judge(self, call: tuple[str, dict[str, Any]], data: bytes) -> None:
        """What a method was called with is what pyarrow reads from the request."""
        name, kwargs = call
        try:
            with ipc.open_stream(pa.py_buffer(data)) as reader:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
        except (pa.ArrowException, OSError, ValueError, StopIteration) as exc:
            tolerate(exc, data)
            raise Finding(f"{name}{kwargs!r:.300} was called from what pyarrow refuses: {exc}") from exc
        if dict(metadata or {}).get(b"vgi_rpc.method") != name.encode():
            raise Finding(f"{name} was called for {metadata}")
        for key, value in kwargs.items():
            self.judge_value(name, key, value, batch.column(key)[0].as_py())

    def judge_value(self, name: str, key: str, value: Any, cell: Any) -> None:
        """One argument."""
        if isinstance(value, Record):
            return
        if isinstance(value, pa.RecordBatch):
            with ipc.open_stream(pa.py_buffer(cell)) as reader:
                first = next(iter(reader), None)
            if first is not None:
                same_batch(value, first)
            return
        if isinstance(value, pa.Schema):
            if not value.equals(ipc.read_schema(pa.py_buffer(cell)), check_metadata=True):
                raise Finding(f"{name}({key}) got {value}")
            return
        if isinstance(value, Color):
            value = value.name
        if isinstance(value, dict):
            value, cell = repr(value), dict(cell)
            cell = repr(cell)
        if repr(value) != repr(cell):
            raise Finding(f"{name}({key}={value!r:.200}) for {cell!r:.200}")

    def close(self) -> None:
        """End the last connection."""
        if not self.connection.ended:
            self.connection.close()
