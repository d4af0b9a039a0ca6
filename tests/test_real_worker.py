"""A worker that answers questions about a CSV and a Parquet file, asked from the command line."""

from __future__ import annotations

import base64
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tests.core import core

WORKER = """
from __future__ import annotations

import dataclasses
import datetime
import enum
import importlib
import os
import subprocess
import sys
from typing import Annotated, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

core = importlib.import_module(os.environ["VGI_RPC_CORE"])


class Op(enum.Enum):
    LT = "<"
    GE = ">="


@dataclasses.dataclass(frozen=True)
class Sale(core.ArrowSerializableDataclass):
    id: int
    region: str
    amount: float
    at: Annotated[datetime.datetime, core.ArrowType(pa.timestamp("us"))]


class Sales(Protocol):
    def row_count(self, source: str) -> int: ...
    def columns(self) -> list[str]: ...
    def schema(self) -> pa.Schema: ...
    def head(self, n: int) -> pa.RecordBatch: ...
    def mean(self, column: str) -> float: ...
    def filter_count(self, column: str, op: Op, value: float) -> int: ...
    def group_sums(self, by: str, column: str) -> dict[str, float]: ...
    def top(self, n: int) -> list[Sale]: ...
    def date_range(self, since: datetime.datetime) -> list[datetime.datetime]: ...
    def lookup(self, id: int) -> Sale | None: ...
    def last_day(self, region: str) -> datetime.date | None: ...


class SalesImpl:
    def __init__(self, csv: str, parquet: str) -> None:
        self._sources = {"csv": pyarrow.csv.read_csv(csv), "parquet": pyarrow.parquet.read_table(parquet)}
        self._table = self._sources["parquet"]

    def row_count(self, source):
        print("counting", source)
        subprocess.run([sys.executable, "-c", "print('a child prints')"], check=True)
        return self._sources[source].num_rows

    def columns(self):
        return self._table.column_names

    def schema(self):
        return self._table.schema

    def head(self, n):
        return self._table.slice(0, n).combine_chunks().to_batches()[0]

    def mean(self, column):
        return pc.mean(self._table[column]).as_py()

    def filter_count(self, column, op, value):
        compare = {Op.LT: pc.less, Op.GE: pc.greater_equal}[op]
        return pc.sum(compare(self._table[column], value)).as_py() or 0

    def group_sums(self, by, column):
        found = self._table.group_by(by).aggregate([(column, "sum")]).to_pylist()
        return {row[by]: row[column + "_sum"] for row in found}

    def top(self, n):
        rows = self._table.sort_by([("amount", "descending")]).slice(0, n)
        return [Sale(**row) for row in rows.to_pylist()]

    def date_range(self, since):
        found = self._table.filter(pc.greater_equal(self._table["at"], pa.scalar(since, pa.timestamp("us"))))
        return [pc.min(found["at"]).as_py(), pc.max(found["at"]).as_py()]

    def lookup(self, id):
        found = self._table.filter(pc.equal(self._table["id"], id)).to_pylist()
        return Sale(**found[0]) if found else None

    def last_day(self, region):
        found = pc.max(self._table.filter(pc.equal(self._table["region"], region))["at"]).as_py()
        return found and found.date()


if __name__ == "__main__":  # files first; the flags are for run_server
    files = sys.argv[1:3]
    del sys.argv[1:3]
    core.run_server(Sales, SalesImpl(*files))
"""
START = datetime.datetime(2026, 1, 1, 12)
ROWS = [
    {
        "id": i,
        "region": ("north", "süd", "east, far")[i % 3],
        "amount": (i * 37 % 101) / 4,
        "at": START + datetime.timedelta(hours=5 * i, microseconds=i),
    }
    for i in range(200)
]
SCHEMA = pa.schema([("id", pa.int64()), ("region", pa.utf8()), ("amount", pa.float64()), ("at", pa.timestamp("us"))])


class Shell:
    """Runs the command line against the worker."""

    def __init__(self, directory: Path) -> None:
        table = pa.Table.from_pylist(ROWS, schema=SCHEMA)
        pyarrow.csv.write_csv(table, directory / "sales.csv")
        pyarrow.parquet.write_table(table, directory / "sales.parquet")
        (directory / "worker.py").write_text(WORKER, encoding="utf-8")
        worker = [sys.executable, "worker.py", "sales.csv", "sales.parquet", "--describe"]
        self.cmd = shlex.join(worker)
        self._cwd = directory
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._env = {**os.environ, "PYTHONPATH": path, "VGI_RPC_CORE": core.__name__, "PYTHONIOENCODING": "utf-8"}

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", core.__name__, "--cmd", self.cmd, *args]
        return subprocess.run(
            command, cwd=self._cwd, env=self._env, capture_output=True, encoding="utf-8", timeout=60, check=False
        )

    def call(self, *args: str) -> Any:
        ran = self.run("call", *args)
        assert ran.returncode == 0, ran.stderr
        (line,) = ran.stdout.splitlines()
        return json.loads(line)["result"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("sales"))


def by_amount() -> list[dict[str, Any]]:
    return sorted(ROWS, key=lambda row: -row["amount"])


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "at": row["at"].isoformat()}


@pytest.mark.parametrize("source", ["csv", "parquet"])
def test_row_count_of_a_worker_that_prints(shell: Shell, source: str) -> None:
    ran = shell.run("call", "row_count", f"source={source}")
    assert (ran.returncode, ran.stdout) == (0, '{"result": 200}\n')
    assert sorted(ran.stderr.splitlines()) == ["a child prints", f"counting {source}"]


def test_columns(shell: Shell) -> None:
    assert shell.call("columns") == SCHEMA.names


def test_schema_is_an_ipc_message(shell: Shell) -> None:
    assert pa.ipc.read_schema(pa.py_buffer(base64.b64decode(shell.call("schema")))).equals(SCHEMA)


def test_head_is_an_ipc_stream(shell: Shell) -> None:
    batch = pa.ipc.open_stream(base64.b64decode(shell.call("head", "n=7"))).read_next_batch()
    assert batch.to_pylist() == ROWS[:7]


def test_mean(shell: Shell) -> None:
    assert shell.call("mean", "column=amount") == pytest.approx(statistics.mean(row["amount"] for row in ROWS))


@pytest.mark.parametrize(("op", "value"), [("LT", "10"), ("GE", "10.25"), ("LT", "-1e3")])
def test_filter_count(shell: Shell, op: str, value: str) -> None:
    want = sum((row["amount"] < float(value)) == (op == "LT") for row in ROWS)
    assert shell.call("filter_count", "column=amount", f"op={op}", f"value={value}") == want


def test_group_sums(shell: Shell) -> None:
    regions = sorted({row["region"] for row in ROWS})
    want = {region: sum(row["amount"] for row in ROWS if row["region"] == region) for region in regions}
    assert shell.call("group_sums", "by=region", "column=amount") == pytest.approx(want)


def test_top(shell: Shell) -> None:
    found = shell.call("--json", '{"n": 5}', "top")
    assert [row["amount"] for row in found] == [row["amount"] for row in by_amount()[:5]]
    assert all(row == plain(ROWS[row["id"]]) for row in found)


def test_date_range(shell: Shell) -> None:
    since = START + datetime.timedelta(hours=11)
    want = [row["at"].isoformat() for row in ROWS if row["at"] >= since]
    assert shell.call("date_range", f"since={since.isoformat()}") == [want[0], want[-1]]


def test_lookup_finds_a_record_or_null(shell: Shell) -> None:
    found = pa.ipc.open_stream(base64.b64decode(shell.call("lookup", "id=123"))).read_next_batch().to_pylist()
    assert found == [ROWS[123]]
    assert shell.call("lookup", "id=-1") is None


def test_last_day(shell: Shell) -> None:
    want = max(row["at"] for row in ROWS if row["region"] == "east, far")
    assert shell.call("last_day", "region=east, far") == want.date().isoformat()
    assert shell.call("last_day", "region=nowhere") is None


def test_describe(shell: Shell) -> None:
    ran = shell.run("describe")
    assert (ran.returncode, ran.stderr) == (0, "")
    found = json.loads(ran.stdout)
    assert found["protocol_name"] == "Sales"
    assert len(found["methods"]) == 11
    assert found["methods"]["mean"]["params_schema"] == "column: string not null"


def test_an_unknown_column_is_the_worker_s_error(shell: Shell) -> None:
    ran = shell.run("call", "mean", "column=nope")
    assert (ran.returncode, ran.stdout) == (1, "")
    error = json.loads(ran.stderr)["error"]
    assert error["type"] == "KeyError"
    assert "nope" in error["message"]
    assert "worker.py" in error["traceback"]


def test_a_missing_file_is_told_with_the_worker_s_last_words(shell: Shell) -> None:
    broken = shell.cmd.replace("sales.csv", "absent.csv")
    ran = shell.run("--cmd", broken, "call", "columns")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "absent.csv" in ran.stderr
    assert "exited with status 1" in ran.stderr
