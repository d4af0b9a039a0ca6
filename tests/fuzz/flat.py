"""The flatbuffers of Arrow IPC as trees: read one, change it, write it in any layout that the format allows.

A tree may also say what no honest writer would say (a required slot that is absent, a vector of the wrong length): it
is written as it is. `Written.places` tells where the numbers of the layout are, for changes below the tree.
"""

from __future__ import annotations

import random
import struct
from typing import Any, NamedTuple

# Table -> what is in each slot: a struct code; "s" string; "T:Name" table; "V:Name" vector of tables; "U" union whose
# type is in the slot before; "S" vector of two int64 each; "Vi", "Vq" vectors of numbers.
SPEC: dict[str, tuple[str, ...]] = {
    "Message": ("h", "B", "U", "q", "V:KeyValue"),
    "Schema": ("h", "V:Field", "V:KeyValue", "Vq"),
    "Field": ("s", "?", "B", "U", "T:DictionaryEncoding", "V:Field", "V:KeyValue"),
    "DictionaryEncoding": ("q", "T:Int", "?", "h"),
    "KeyValue": ("s", "s"),
    "DictionaryBatch": ("q", "T:RecordBatch", "?"),
    "RecordBatch": ("q", "S", "S", "T:BodyCompression", "Vq"),
    "BodyCompression": ("b", "b"),
    "Int": ("i", "?"),
    "FloatingPoint": ("h",),
    "Decimal": ("i", "i", "i"),
    "Date": ("h",),
    "Time": ("h", "i"),
    "Timestamp": ("h", "s"),
    "Interval": ("h",),
    "Duration": ("h",),
    "Union": ("h", "Vi"),
    "FixedSizeBinary": ("i",),
    "FixedSizeList": ("i",),
    "Map": ("?",),
}
DEFAULTS = {("Date", 0): 1, ("Time", 0): 1, ("Time", 1): 32, ("Duration", 0): 1, ("Decimal", 2): 128}  # others: 0
HEADERS = {1: "Schema", 2: "DictionaryBatch", 3: "RecordBatch"}
TYPES = [
    "-",
    "Null",
    "Int",
    "FloatingPoint",
    "Binary",
    "Utf8",
    "Bool",
    "Decimal",
    "Date",
    "Time",
    "Timestamp",
    "Interval",
    "List",
    "Struct",
    "Union",
    "FixedSizeBinary",
    "FixedSizeList",
    "Map",
    "Duration",
    "LargeBinary",
    "LargeUtf8",
    "LargeList",
    "RunEndEncoded",
    "BinaryView",
    "Utf8View",
    "ListView",
    "LargeListView",
]


class Table:
    """One table: the values of its slots by number. Absent slots are not in `slots`."""

    __slots__ = ("kind", "slots")

    def __init__(self, kind: str, slots: dict[int, Any] | None = None) -> None:
        self.kind = kind
        self.slots = slots if slots is not None else {}

    def __getitem__(self, slot: int) -> Any:
        """The value of a slot, or what an absent one means."""
        code = self.codes[slot] if slot < len(self.codes) else "h"  # of a field that lies about its type
        if slot not in self.slots and code in "hBqib?":
            return DEFAULTS.get((self.kind, slot), 0)
        return self.slots.get(slot, [] if code[0] in "VS" else None)

    def __setitem__(self, slot: int, value: Any) -> None:
        self.slots[slot] = value

    @property
    def codes(self) -> tuple[str, ...]:
        """What is in each slot."""
        return SPEC.get(self.kind, ())

    def __repr__(self) -> str:
        return f"{self.kind}{self.slots}"


# ---- reading


_Known = dict[tuple[int, str], "Table"]


def parse(meta: bytes, kind: str = "Message") -> Table:
    """The tree of a flatbuffer; struct.error, IndexError or ValueError when it is malformed.

    A table that several offsets lead to is one object in the tree.
    """
    return _table(meta, _unsigned(meta, 0), kind, 0, {})


def _unsigned(meta: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", meta, at)[0]) + at


def _table(meta: bytes, at: int, kind: str, depth: int, known: _Known) -> Table:
    if (at, kind) in known:
        return known[at, kind]
    if depth > 200:
        raise ValueError("too deep")
    vtable = at - struct.unpack_from("<i", meta, at)[0]
    if vtable < 0:
        raise ValueError("a vtable before the buffer")
    slots = (struct.unpack_from("<H", meta, vtable)[0] - 4) // 2
    table = Table(kind)
    for slot, code in enumerate(table.codes[:slots]):
        offset = struct.unpack_from("<H", meta, vtable + 4 + 2 * slot)[0]
        if offset:
            table.slots[slot] = _value(meta, at + offset, code, table, slot, depth + 1, known)
    known[at, kind] = table
    return table


def _value(meta: bytes, at: int, code: str, table: Table, slot: int, depth: int, known: _Known) -> Any:
    if code in "hBqib?":
        return struct.unpack_from("<" + code, meta, at)[0]
    place = _unsigned(meta, at)
    if code == "U":
        number = table[slot - 1]
        names = HEADERS if table.kind == "Message" else dict(enumerate(TYPES))
        return _table(meta, place, names.get(number, "?"), depth, known)
    if code[0] == "T":
        return _table(meta, place, code[2:], depth, known)
    count = struct.unpack_from("<I", meta, place)[0]
    if count > len(meta):
        raise ValueError("a vector beyond the buffer")
    if code == "s":
        return meta[place + 4 : place + 4 + count]
    if code == "S":
        numbers = struct.unpack_from(f"<{2 * count}q", meta, place + 4)
        return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    if code in ("Vi", "Vq"):
        return list(struct.unpack_from(f"<{count}{code[1]}", meta, place + 4))
    entries = range(place + 4, place + 4 + 4 * count, 4)
    return [_table(meta, _unsigned(meta, entry), code[2:], depth, known) for entry in entries]


# ---- writing


class Style(NamedTuple):
    """How a writer lays a flatbuffer out."""

    order: str = "ascending"  # of the slots within a table: ascending, descending, shuffled
    shared: bool = True  # equal vtables once
    behind: bool = False  # a vtable after its table (where the format permits it: the offset is signed)
    defaults: bool = False  # slots that say what absence says are written
    padding: int = 0  # bytes between objects
    reverse: bool = False  # children in reverse order


PLAIN = Style()


def random_style(rng: random.Random) -> Style:
    """A writer that is not pyarrow."""
    return Style(
        rng.choice(("ascending", "descending", "shuffled")),
        rng.random() < 0.5,
        rng.random() < 0.3,
        rng.random() < 0.5,
        rng.choice((0, 0, 8, 24)),
        rng.random() < 0.5,
    )


class Place(NamedTuple):
    """Where a number of the layout is: of which kind, and its struct code."""

    kind: str
    at: int
    code: str


class Written(NamedTuple):
    """A flatbuffer and the places of the numbers that hold it together."""

    data: bytes
    places: list[Place]


def build(tree: Table, style: Style = PLAIN, rng: random.Random | None = None) -> Written:
    """Write a tree; its size is a multiple of 8."""
    return _Writer(style, rng or random.Random(0)).write(tree)


class _Writer:
    def __init__(self, style: Style, rng: random.Random) -> None:
        self.buf = bytearray(4)
        self.places: list[Place] = [Place("offset", 0, "I")]
        self.style, self.rng = style, rng
        self.vtables: dict[bytes, int] = {}
        self.known: dict[int, int] = {}
        self.todo: list[tuple[int, Any, str]] = [(0, None, "")]

    def write(self, tree: Table) -> Written:
        self.todo = [(0, tree, "T")]
        while self.todo:
            at, value, code = self.todo.pop(0)
            place = self.known.get(id(value), 0)
            if place <= at:  # one object of the tree stands in the buffer once, if an offset can reach it
                place = self.known[id(value)] = self.put(value, code)
            struct.pack_into("<I", self.buf, at, place - at)
        self.align(8)
        return Written(bytes(self.buf), self.places)

    def align(self, to: int, ahead: int = 0) -> None:
        self.buf += bytes(-(len(self.buf) + ahead) % to)

    def put(self, value: Any, code: str) -> int:
        self.buf += bytes(self.style.padding)
        if isinstance(value, Table):
            return self.table(value)
        if code == "s":
            self.align(4)
            at = self.vector(len(value))
            self.buf += value + b"\0"
            return at
        if code == "S":
            self.align(8, 4)
            at = self.vector(len(value))
            for pair in value:
                self.places += [Place("number", len(self.buf), "q"), Place("number", len(self.buf) + 8, "q")]
                self.buf += struct.pack("<2q", *map(_int64, pair))
            return at
        if code in ("Vi", "Vq"):
            self.align(8, 4)
            at = self.vector(len(value))
            size = 4 if code == "Vi" else 8
            for number in value:
                self.places.append(Place("number", len(self.buf), code[1]))
                self.buf += (number & (1 << 8 * size) - 1).to_bytes(size, "little")
            return at
        self.align(4)
        at = self.vector(len(value))
        entries = range(at + 4, at + 4 + 4 * len(value), 4)
        self.buf += bytes(4 * len(value))
        self.children([(entry, each, "T") for entry, each in zip(entries, value, strict=True)])
        return at

    def vector(self, count: int) -> int:
        at = len(self.buf)
        self.places.append(Place("count", at, "I"))
        self.buf += struct.pack("<I", count)
        return at

    def children(self, found: list[tuple[int, Any, str]]) -> None:
        self.places += [Place("offset", at, "I") for at, _, _ in found]
        self.todo += reversed(found) if self.style.reverse else found

    def table(self, table: Table) -> int:
        slots = {s: value for s, value in table.slots.items() if value is not None and s < len(table.codes)}
        for slot, code in enumerate(table.codes):
            default = DEFAULTS.get((table.kind, slot), 0)
            if code in "hBqib?" and self.style.defaults:
                slots.setdefault(slot, default)
            elif code in "hBqib?" and slots.get(slot) == default:
                slots.pop(slot)
        order = sorted(slots, reverse=self.style.order == "descending")
        if self.style.order == "shuffled":
            self.rng.shuffle(order)
        offsets, end = {}, 4
        for slot in order:
            size = struct.calcsize("<" + table.codes[slot]) if table.codes[slot] in "hBqib?" else 4
            end += -end % size
            offsets[slot] = end
            end += size
        count = max(slots, default=-1) + 1
        vtable = struct.pack(f"<{2 + count}H", 4 + 2 * count, end, *(offsets.get(slot, 0) for slot in range(count)))
        known = self.vtables.get(vtable) if self.style.shared else None
        if known is None and not self.style.behind:
            self.align(2)
            known = self.add_vtable(vtable)
        self.align(8)
        at = len(self.buf)
        self.buf += bytes(end)
        if known is None:
            self.align(2)
            known = self.add_vtable(vtable)
        struct.pack_into("<i", self.buf, at, at - known)
        self.places.append(Place("vtable", at, "i"))
        found = []
        for slot in order:
            code = table.codes[slot]
            if code in "hBqib?":
                self.scalar(at + offsets[slot], code, slots[slot])
            else:
                found.append((at + offsets[slot], slots[slot], code))
        self.children(found)
        return at

    def add_vtable(self, vtable: bytes) -> int:
        at = self.vtables[vtable] = len(self.buf)
        self.places += [Place("slot", at + i, "H") for i in range(0, len(vtable), 2)]
        self.buf += vtable
        return at

    def scalar(self, at: int, code: str, value: int) -> None:
        self.places.append(Place("number", at, "B" if code == "?" else code))
        size = struct.calcsize("<" + code)
        self.buf[at : at + size] = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


def _int64(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
