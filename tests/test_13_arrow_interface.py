"""Room 13: streams through the Arrow PyCapsule interface, with the real polars, pandas and DuckDB (API.md 12.6)."""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import pyarrow as pa
import pytest

from tests.core import core

WHY = "one of the libraries that the Arrow PyCapsule interface is for; in the dependency group `heavy`"
ROWS, BATCH = 9, 3  # the 9 rows of which DuckDB once counted 3
SCHEMA = pa.schema([("n", pa.int64()), ("word", pa.string())])
CONSUMED = "has been consumed"


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"n": n, "word": None if n % 4 == 3 else f"w{n}"} for n in range(first, first + count)]


class Batches(core.ProducerState):
    def __init__(self, total: int, fail_at: int = -1) -> None:
        self.total, self.fail_at, self.at = total, fail_at, 0

    def produce(self, out: Any, ctx: Any) -> None:
        if self.at == self.fail_at:
            raise ValueError(f"stopped at {self.at}")
        if self.at >= self.total:
            out.finish()
            return
        count = min(BATCH, self.total - self.at)
        out.emit(pa.RecordBatch.from_pylist(rows(self.at, count), schema=SCHEMA))
        self.at += count


class Echo(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit(input.batch)


class Svc(Protocol):
    def batches(self, total: int, fail_at: int = -1) -> core.Stream[core.ProducerState]: ...
    def source(self) -> core.Stream[core.ProducerState]: ...
    def echo(self) -> core.Stream[Echo]: ...
    def alive(self) -> str: ...


class Impl:
    def __init__(self) -> None:
        self.make: Any = None

    def batches(self, total: int, fail_at: int) -> Any:
        return core.Stream(SCHEMA, Batches(total, fail_at))

    def source(self) -> Any:
        return core.Stream.from_arrow(self.make())

    def echo(self) -> Any:
        return core.Stream(SCHEMA, Echo(), input_schema=SCHEMA)

    def alive(self) -> str:
        return "alive"


@pytest.fixture
def impl() -> Impl:
    return Impl()


@pytest.fixture
def proxy(impl: Impl) -> Any:
    with core.serve_pipe(Svc, impl, timeout=60.0) as found:
        yield found
        assert found.alive() == "alive"  # whatever a test did, the connection is in step


# ---- reading a session


def into_pyarrow(session: Any) -> list[dict[str, Any]]:
    return pa.table(session).to_pylist()


def into_polars(session: Any) -> list[dict[str, Any]]:
    return pytest.importorskip("polars", reason=WHY).DataFrame(session).to_dicts()


def into_polars_from_arrow(session: Any) -> list[dict[str, Any]]:
    found = pytest.importorskip("polars", reason=WHY).from_arrow(session)
    # of any stream that is not pyarrow's own, polars 2 makes a Series of structs
    return found.to_list() if type(found).__name__ == "Series" else found.to_dicts()


def into_pandas(session: Any) -> list[dict[str, Any]]:
    pandas = pytest.importorskip("pandas", reason=WHY)
    if hasattr(pandas.DataFrame, "from_arrow"):  # pandas 3
        frame = pandas.DataFrame.from_arrow(session)
    else:
        frame = pa.table(session).to_pandas()
    return [
        {"n": int(n), "word": None if pandas.isna(word) else word}
        for n, word in zip(frame["n"], frame["word"], strict=True)
    ]


def into_duckdb(session: Any) -> list[dict[str, Any]]:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with duckdb.connect() as db:
        found = db.sql("select n, word from session order by n").fetchall()
    return [{"n": n, "word": word} for n, word in found]


def reader(read: Any, library: str) -> Any:
    """A case of a test; skipped here, for inside `pytest.raises` a skip would be one more exception."""
    absent = importlib.util.find_spec(library) is None
    return pytest.param(read, id=read.__name__, marks=pytest.mark.skipif(absent, reason=WHY))


READERS = [
    reader(into_pyarrow, "pyarrow"),
    reader(into_polars, "polars"),
    reader(into_polars_from_arrow, "polars"),
    reader(into_pandas, "pandas"),
    reader(into_duckdb, "duckdb"),
]


@pytest.mark.parametrize("total", [0, 1, BATCH, ROWS, 100])
@pytest.mark.parametrize("read", READERS)
def test_every_row_arrives_in_order(proxy: Any, read: Any, total: int) -> None:
    with proxy.batches(total) as session:
        assert read(session) == rows(0, total)


@pytest.mark.parametrize("read", READERS)
def test_the_rest_of_a_session_that_was_begun_by_hand(proxy: Any, read: Any) -> None:
    with proxy.batches(ROWS) as session:
        assert session.tick().batch.to_pylist() == rows(0, BATCH)
        assert read(session) == rows(BATCH, ROWS - BATCH)


@pytest.mark.parametrize("read", READERS)
def test_a_second_scan_raises(proxy: Any, read: Any) -> None:
    with proxy.batches(ROWS) as session:
        assert len(read(session)) == ROWS
        with pytest.raises(Exception, match=CONSUMED):
            read(session)


@pytest.mark.parametrize("read", READERS)
def test_an_error_in_the_middle_is_no_short_answer(proxy: Any, read: Any) -> None:
    with proxy.batches(ROWS, fail_at=2 * BATCH) as session, pytest.raises(BaseException, match="stopped at 6"):
        read(session)  # polars panics with an exception that is no Exception


@pytest.mark.parametrize("read", READERS)
def test_an_exchange_raises(proxy: Any, read: Any) -> None:
    with proxy.echo() as session, pytest.raises(BaseException, match="is an exchange"):
        read(session)


def test_duckdb_counts_all_rows(proxy: Any) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with proxy.batches(ROWS) as session:
        assert session is not None  # DuckDB finds it by its name
        assert duckdb.sql("select count(*) from session").fetchall() == [(ROWS,)]


def test_duckdb_projects_and_filters(proxy: Any) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with proxy.batches(ROWS) as session, duckdb.connect() as db:
        db.register("remote", session)
        found = db.sql("select word from remote where n >= 4 and word is not null order by n").fetchall()
        assert found == [("w4",), ("w5",), ("w6",), ("w8",)]


def test_duckdb_stops_early(proxy: Any) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with proxy.batches(300) as session, duckdb.connect() as db:
        db.register("remote", session)
        assert db.sql("select n from remote limit 2").fetchall() == [(0,), (1,)]


def test_an_empty_producer_has_its_schema(proxy: Any) -> None:
    with proxy.batches(0) as session:
        assert pa.schema(session) == SCHEMA
        assert pa.table(session).schema == SCHEMA


def test_an_empty_producer_has_its_schema_in_polars(proxy: Any) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    with proxy.batches(0) as session:
        frame = polars.DataFrame(session)
    assert frame.schema == {"n": polars.Int64, "word": polars.String} and frame.height == 0


def test_an_empty_producer_has_its_schema_in_pandas(proxy: Any) -> None:
    pandas = pytest.importorskip("pandas", reason=WHY)
    with proxy.batches(0) as session:
        read = getattr(pandas.DataFrame, "from_arrow", lambda source: pa.table(source).to_pandas())
        frame = read(session)
    assert list(frame.columns) == ["n", "word"] and len(frame) == 0 and frame["n"].dtype == "int64"


def test_an_empty_producer_has_its_schema_in_duckdb(proxy: Any) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with proxy.batches(0) as session, duckdb.connect() as db:
        db.register("remote", session)
        relation = db.sql("select * from remote")
        assert relation.columns == ["n", "word"] and [str(t) for t in relation.types] == ["BIGINT", "VARCHAR"]
        assert relation.fetchall() == []


def test_asking_for_the_schema_reads_nothing_away(proxy: Any) -> None:
    with proxy.batches(ROWS) as session:
        assert pa.schema(session) == session.schema == SCHEMA
        assert pa.schema(session) == SCHEMA
        assert session.read_all().to_pylist() == rows(0, ROWS)


def test_a_batch_alone(proxy: Any) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    with proxy.batches(ROWS) as session:
        batch = session.tick()
        assert pa.record_batch(batch).to_pylist() == polars.DataFrame(batch).to_dicts() == rows(0, BATCH)
        assert pa.schema(batch) == SCHEMA


# ---- serving what others have


def test_serving_a_polars_frame(proxy: Any, impl: Impl) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    frame = polars.DataFrame(rows(0, ROWS), schema={"n": polars.Int64, "word": polars.String})
    impl.make = lambda: frame
    for _ in range(2):  # a frame, unlike a session, can be read again
        with proxy.source() as session:
            assert polars.DataFrame(session).equals(frame)


def test_serving_polars_columns_of_many_types(proxy: Any, impl: Impl) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    frame = polars.DataFrame(
        {"f": [1.5, None], "b": [True, False], "l": [[1, 2], []], "s": [{"x": 1}, {"x": None}], "raw": [b"a", b""]}
    ).with_columns(c=polars.Series(["a", "b"], dtype=polars.Categorical))
    impl.make = lambda: frame
    with proxy.source() as session:
        assert polars.DataFrame(session).to_dicts() == frame.to_dicts()


def test_serving_a_frame_of_several_chunks(proxy: Any, impl: Impl) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    piece = polars.DataFrame({"n": [1, 2, 3]})
    frame = polars.concat([piece, piece, piece], rechunk=False)
    impl.make = lambda: frame
    exported = [batch.num_rows for batch in pa.RecordBatchReader.from_stream(frame)]  # polars may join the chunks
    with proxy.source() as session:
        batches = [item.batch for item in session]
    assert [batch.num_rows for batch in batches] == exported
    assert pa.Table.from_batches(batches).column("n").to_pylist() == [1, 2, 3] * 3


def test_serving_an_empty_polars_frame(proxy: Any, impl: Impl) -> None:
    polars = pytest.importorskip("polars", reason=WHY)
    impl.make = lambda: polars.DataFrame(schema={"n": polars.Int64})
    with proxy.source() as session:
        assert polars.DataFrame(session).schema == {"n": polars.Int64}


def test_serving_a_pandas_frame(proxy: Any, impl: Impl) -> None:
    pandas = pytest.importorskip("pandas", reason=WHY)
    frame = pandas.DataFrame({"n": [1, 2, 3]})
    impl.make = lambda: frame
    with proxy.source() as session:
        table = session.read_all()
    assert table.to_pandas().equals(frame)


def test_a_pandas_index_a_foreign_extension_and_an_enum_come_back(proxy: Any, impl: Impl) -> None:
    pandas = pytest.importorskip("pandas", reason=WHY)
    polars = pytest.importorskip("polars", reason=WHY)
    frame = pandas.DataFrame({"n": [1, 2]}, index=[10, 20])
    impl.make = lambda: pa.Table.from_pandas(frame)
    with proxy.source() as session:
        assert session.read_all().to_pandas().equals(frame)
    about = {b"ARROW:extension:name": b"geoarrow.wkb", b"ARROW:extension:metadata": b"{}"}
    impl.make = lambda: pa.table([[b"wkb"]], schema=pa.schema([pa.field("n", pa.binary(), metadata=about)]))
    with proxy.source() as session:
        assert session.read_all().schema.field("n").metadata == about
    enums = polars.DataFrame({"n": polars.Series(["a"], dtype=polars.Enum(["a", "b"]))})
    impl.make = lambda: enums
    with proxy.source() as session:
        assert polars.DataFrame(session).schema == enums.schema


def test_empty_chunks_with_an_offset_are_read(proxy: Any, impl: Impl) -> None:
    batch = pa.RecordBatch.from_pydict({"n": [1, 2, 3], "s": ["a", "b", "c"]})
    chunks = pa.Table.from_batches([batch.slice(0, 1), batch.slice(2, 0), batch.slice(1, 1)])
    for source in (chunks, pa.RecordBatchReader.from_stream(chunks)):  # the latter goes through the C interface
        impl.make = lambda source=source: source
        with proxy.source() as session:
            assert session.read_all().to_pydict() == {"n": [1, 2], "s": ["a", "b"]}


def test_serving_a_duckdb_relation(proxy: Any, impl: Impl) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with duckdb.connect() as db:
        impl.make = lambda: db.sql("select i as n, 'w' || i as word from range(5000) t(i)")
        with proxy.source() as session:
            table = session.read_all()
    assert table.num_rows == 5000
    assert table.column("n").to_pylist() == list(range(5000)) and table.column("word")[4999].as_py() == "w4999"


def test_from_duckdb_to_duckdb(proxy: Any, impl: Impl) -> None:
    """Two databases that run at the same time, one in the server's thread."""
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with duckdb.connect() as there, duckdb.connect() as here:
        impl.make = lambda: there.sql("select i as n from range(100000) t(i)")
        with proxy.source() as session:
            here.register("remote", session)
            assert here.sql("select count(*), sum(n) from remote").fetchall() == [(100_000, 4_999_950_000)]


def test_cancelling_a_duckdb_relation(proxy: Any, impl: Impl) -> None:
    duckdb = pytest.importorskip("duckdb", reason=WHY)
    with duckdb.connect() as db:
        impl.make = lambda: db.sql("select i as n from range(1000000) t(i)")
        session = proxy.source()
        session.tick()
        session.cancel()
        assert proxy.alive() == "alive"
        assert db.sql("select 1").fetchall() == [(1,)]


def test_what_is_no_arrow_stream(proxy: Any, impl: Impl) -> None:
    impl.make = lambda: [1, 2]
    with pytest.raises(core.RpcError) as caught, proxy.source() as session:
        session.tick()
    assert caught.value.error_type == "TypeError"
