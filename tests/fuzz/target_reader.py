"""Streams through the reader of connections: what it accepts, pyarrow accepts, with the same values."""

from __future__ import annotations

import random

from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import FULL, LIMITS, REFUSED, Items, compare, core
from tests.fuzz.messages import Corpus


class Chunks(core._IpcSource):
    """A source whose bytes come in pieces."""

    def __init__(self, data: bytes, sizes: random.Random) -> None:
        super().__init__(b"", LIMITS)
        self.rest, self.at, self.sizes = data, 0, sizes

    def more(self, missing: int) -> None:
        """The next piece."""
        if self.at == len(self.rest):
            raise EOFError("the end")
        size = self.sizes.choice((1, 8, missing, missing, 500))
        self.buf = self.buf[self.pos :] + self.rest[self.at : self.at + size]
        self.at += len(self.rest[self.at : self.at + size])
        self.pos = 0

    def take_large(self, size: int, head: int) -> bytes:
        """No piece is too large here."""
        while len(self.buf) - self.pos < size:
            self.more(size - len(self.buf) + self.pos)
        return bytes(self.take(size, head))


class Target:
    """One stream a case."""

    def __init__(self, seed: str, box: Box) -> None:
        self.box = box
        self.corpus = Corpus.of(seed)

    def case(self, rng: random.Random) -> str:
        """Read a valid stream or a mutant."""
        valid = rng.random() < 0.15
        data = self.corpus.valid(rng) if valid else self.corpus.mutant(rng)
        split = rng.random() < 0.25
        items: Items = []
        with self.box.ours(data):
            try:
                source = Chunks(data, rng) if split else core._IpcSource(data, LIMITS)
                reader = core._IpcReader(source, FULL)
                while (item := reader.read()) is not None:
                    items.append(item)
            except REFUSED as exc:
                if valid:
                    raise Finding(f"refused a valid stream: {exc}") from exc
                return "refused"
        end = source.at - (len(source.buf) - source.pos) if isinstance(source, Chunks) else source.pos
        compare(items, data[:end])
        return "valid" if valid else "accepted"
