"""Coverage-guided fuzzing by hand: `pip install atheris && python -m tests.fuzz.atheris_ipc [corpus] [-runs=N]`.

Feeds bytes to the reader of connection streams and to a learned layout. What may come out: a batch that pyarrow
validates, or one of the exceptions that end a connection with a typed error. Anything else is a finding.
"""

from __future__ import annotations

import sys

import pyarrow as pa

from tests.core import core

EXPECTED = (pa.ArrowException, core.IPCError, EOFError, OSError, ValueError, KeyError, TypeError)
SCHEMA = pa.schema([pa.field("a", pa.float64(), nullable=False), pa.field("s", pa.utf8())])
SAMPLE = core._ipc_template(SCHEMA, {b"k": b"v"}).encode([1.0, "text"])
BATCH = pa.RecordBatch.from_pydict({"a": [1.0], "s": ["text"]}, schema=SCHEMA)
LAYOUT = core._ipc_learn(SAMPLE, BATCH)


def read_all(data: bytes) -> list[pa.RecordBatch]:
    """Read one stream as a server does, with small limits."""
    limits = core.IpcLimits(max_columns=100, max_nesting=8, max_message_bytes=1 << 20)
    reader = core._IpcReader(core._IpcSource(data, limits), core.IpcValidation.FULL)
    found = []
    while (item := reader.read()) is not None:
        found.append(item[0])
    return found


def one_input(data: bytes) -> None:
    """One test case; what a layout accepts, pyarrow must accept with the same values."""
    rows = [] if (found := LAYOUT.match(data, 0)) is None else [found]
    try:
        batches = read_all(data)
    except EXPECTED:
        assert not rows, data
        return
    for row, _ in rows:
        assert [column[0].as_py() for column in batches[0].columns] == list(row), data


def main() -> None:
    import atheris

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
