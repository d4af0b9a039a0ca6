"""Room 6: shared memory. The table, what may be read from it, and that nothing is lost, overwritten or left behind."""

from __future__ import annotations

import logging
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core import core

pytestmark = pytest.mark.skipif(not core.shm_available(), reason="no /dev/shm on this machine")
ROOT = Path(__file__).resolve().parents[1]
VALUES = pa.schema([("v", pa.float64())])
ROWS = 20_000  # 160 kB: more than the threshold
SIZE = 4 << 20


def batch(k: float, rows: int = ROWS) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([k] * rows)], schema=VALUES)


def value_of(found: pa.RecordBatch) -> float:
    column = found.column(0)
    assert column.null_count == 0 and column[0].as_py() == column[len(column) - 1].as_py()
    return float(column[0].as_py())


@dataclass
class Echo(core.ExchangeState):
    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit(input.batch)


@dataclass
class Keep(core.ExchangeState):
    """Keeps what it gets, and answers with the sum of the first values of everything so far."""

    kept: Any = field(default_factory=list)

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        self.kept.append(input.batch)
        out.emit(batch(sum(value_of(each) for each in self.kept)))


@dataclass
class Count(core.ProducerState):
    left: int

    def produce(self, out: Any, ctx: Any) -> None:
        if self.left == 0:
            out.finish()
            return
        self.left -= 1
        out.emit(batch(float(self.left)), {"n": str(self.left)})


class Svc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def blob(self, n: int) -> bytes: ...
    def pid(self) -> int: ...
    def sleep(self, seconds: float) -> int: ...
    def count(self, n: int) -> core.Stream[Count]: ...
    def echo(self) -> core.Stream[Echo]: ...
    def keep(self) -> core.Stream[Keep]: ...


class Impl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def blob(self, n: int) -> bytes:
        return b"x" * n

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> int:
        time.sleep(seconds)
        return 0

    def count(self, n: int) -> Any:
        return core.Stream(VALUES, Count(n))

    def echo(self) -> Any:
        return core.Stream(VALUES, Echo(), input_schema=VALUES)

    def keep(self) -> Any:
        return core.Stream(VALUES, Keep(), input_schema=VALUES)


def names() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob(f"vgi_rpc_{os.getpid()}_*")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    assert names() == set()


@pytest.fixture
def segment() -> Iterator[Any]:
    made = core.ShmSegment.create(SIZE)
    yield made
    made.unlink()
    made.close()


@pytest.fixture(params=["pipe", "unix"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A proxy over shared memory to a server in a thread."""
    server = core.RpcServer(Svc, Impl())
    if request.param == "unix":
        client, served = core.make_unix_pair()
    else:
        client, served = core.make_pipe_pair()
    thread = threading.Thread(target=server.serve, args=(served,))
    thread.start()
    core._client_share(client.channel, SIZE, 10.0)
    assert client.channel.shm is not None
    yield core._client_proxy(Svc, core._ClientLink(client), core._ClientOptions())
    client.close()
    thread.join(10)
    served.close()
    assert not thread.is_alive()


def segment_of(proxy: Any) -> Any:
    return proxy._link.channel.shm


WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.core import core
from tests.test_06_elsewhere import Impl, Svc
core.run_server(Svc, Impl())
"""


@pytest.fixture
def worker(tmp_path: Path) -> list[str]:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(root=str(ROOT)))
    return [sys.executable, str(path)]


# ---- the table


def test_the_header_of_the_specification() -> None:
    segment = core.ShmSegment.create(8_000_000)
    assert bytes(segment.buf[:24]).hex(" ") == (
        "56 47 49 53 01 00 00 00 00 12 79 00 00 00 00 00 00 00 00 00 00 00 00 00"
    )
    assert Path("/dev/shm", segment.name).stat().st_mode & 0o777 == 0o600
    segment.unlink()
    segment.close()
    segment.unlink()
    segment.close()


def test_first_fit(segment: Any) -> None:
    allocator = segment.allocator
    assert [allocator.allocate(100) for _ in range(3)] == [65536, 65664, 65792]
    allocator.free(65664)
    assert allocator.table() == [(65536, 100), (65792, 100)]
    assert allocator.allocate(200) == 65920  # does not fit the gap
    assert allocator.allocate(128) == 65664
    assert allocator.num_allocs == 4
    with pytest.raises(ValueError, match="No allocation at offset 1"):
        allocator.free(1)
    with pytest.raises(ValueError, match="must be positive"):
        allocator.allocate(0)
    assert allocator.allocate(SIZE) is None
    allocator.reset()
    assert allocator.num_allocs == 0 and allocator.allocate(SIZE - core.HEADER_SIZE) == core.HEADER_SIZE


def test_the_table_has_4094_entries(segment: Any, caplog: pytest.LogCaptureFixture) -> None:
    places = [segment.allocator.allocate(1) for _ in range(core.MAX_ALLOCS)]
    assert None not in places and segment.allocator.allocate(1) is None
    assert [record.name for record in caplog.records] == ["vgi_rpc.shm"]  # once, at four fifths
    segment.allocator.free(places[7])
    assert segment.allocator.allocate(1) == places[7]


@settings(deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.one_of(st.integers(1, 9000), st.integers(-12, -1)), max_size=60))
def test_regions_never_overlap(steps: list[int]) -> None:
    buf = memoryview(bytearray(core.HEADER_SIZE + 40_000))
    core.ShmAllocator.initialize(buf, len(buf))
    allocator = core.ShmAllocator(buf, len(buf))
    live: dict[int, int] = {}
    for step in steps:
        if step > 0:
            at = allocator.allocate(step)
            if at is not None:
                assert at % 64 == 0
                live[at] = step
        elif live:
            at = sorted(live)[step % len(live)]
            allocator.free(at)
            del live[at]
        assert allocator.table() == sorted(live.items())  # table() itself refuses overlaps


@pytest.mark.parametrize(
    ("at", "bytes_", "text"),
    [
        (0, b"XXXX", "Bad SHM magic"),
        (4, struct.pack("<I", 2), "Unsupported SHM version: 2"),
        (8, struct.pack("<Q", 5), "data_size mismatch: header says 5"),
    ],
)
def test_attaching_checks_the_header(segment: Any, at: int, bytes_: bytes, text: str) -> None:
    other = core.ShmSegment.attach(segment.name, SIZE)
    assert (other.size, other.name) == (SIZE, segment.name)
    other.close()
    segment.buf[at : at + len(bytes_)] = bytes_
    with pytest.raises(ValueError, match=text):
        core.ShmSegment.attach(segment.name, SIZE)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../etc/passwd", "x" * 300, "\0"])
def test_a_name_is_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a shared memory segment"):
        core.ShmSegment.attach(name, SIZE)


def test_a_segment_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        core.ShmSegment.attach("vgi_rpc_nobody", SIZE)
    with pytest.raises(ValueError, match="larger than the header"):
        core.ShmSegment.create(core.HEADER_SIZE)


def test_public_helpers(segment: Any) -> None:
    data = batch(3.0)
    pointer, metadata = core.maybe_write_to_shm(data, {b"k": b"v"}, segment)
    assert core.is_shm_pointer_batch(pointer, pa.KeyValueMetadata(metadata)) and metadata[b"k"] == b"v"
    offset, length = int(metadata[core.SHM_OFFSET_KEY]), int(metadata[core.SHM_LENGTH_KEY])
    with pa.ipc.open_stream(segment.read_buffer(offset, length)) as reader:
        assert reader.read_all().to_batches()[0].equals(data)
    found, about, free = core.resolve_shm_batch(pointer, pa.KeyValueMetadata(metadata), segment)
    assert found.equals(data) and dict(about) == {b"k": b"v", core.SHM_SOURCE_KEY: segment.name.encode()}
    free()
    assert segment.allocator.num_allocs == 1  # it is still looked at
    del found
    free()
    assert segment.allocator.num_allocs == 0
    assert core.maybe_write_to_shm(batch(1.0, 10), None, segment) == (batch(1.0, 10), None)
    assert core.resolve_shm_batch(data, None, segment) == (data, None, None)


# ---- calls


def test_streams_and_results(shared: Any) -> None:
    assert [value_of(item.batch) for item in shared.count(30)] == [float(k) for k in range(30)][::-1]
    assert shared.blob(1_000_000) == b"x" * 1_000_000
    assert shared.add(1.0, 2.0) == 3.0
    with shared.echo() as session:
        for k in range(30):
            assert value_of(session.exchange(core.AnnotatedBatch(batch(k))).batch) == k
    assert shared.add(1.0, 2.0) == 3.0
    segment = segment_of(shared)
    assert segment.batches_shared >= 30 and segment.allocator.num_allocs == 0


def test_own_metadata_is_kept(shared: Any) -> None:
    item = next(iter(stream := shared.count(3)))
    assert dict(item.custom_metadata)[b"n"] == b"2" and core.SHM_SOURCE_KEY in dict(item.custom_metadata)
    assert core.SHM_OFFSET_KEY not in dict(item.custom_metadata)
    stream.close()


def test_what_is_kept_keeps_its_values(shared: Any) -> None:
    """Every second of 200 batches, of 32 MB altogether, in a segment of 4 MB."""
    kept: list[tuple[float, Any]] = []
    with shared.echo() as session:
        for k in range(200):
            answer = session.exchange(core.AnnotatedBatch(batch(float(k))))
            if k % 2:
                kept.append((float(k), answer.batch if k % 4 == 1 else answer.batch.column(0).slice(7, 3)))
    for k, found in kept:
        assert value_of(found if isinstance(found, pa.RecordBatch) else pa.record_batch([found], ["v"])) == k
    segment = segment_of(shared)
    assert 0 < segment.allocator.num_allocs < 40 and segment.batches_inline > 0  # full: the others went inline
    kept.clear()
    del answer, found
    assert shared.add(1.0, 2.0) == 3.0
    assert segment.allocator.num_allocs == 0


def test_a_state_that_keeps_its_inputs(shared: Any) -> None:
    with shared.keep() as session:
        total = 0.0
        for k in range(20):
            total += k
            assert value_of(session.exchange(core.AnnotatedBatch(batch(float(k)))).batch) == total
    assert shared.add(1.0, 2.0) == 3.0


def test_released_batches_are_an_error_and_their_slices_are_not(shared: Any) -> None:
    with shared.count(5) as stream:
        items = [stream.tick() for _ in range(3)]
        kept = items[0].batch.column(0).slice(0, 2)
        for item in items:
            item.release()
            item.release()
            with pytest.raises(ValueError, match="has been released"):
                _ = item.batch
        stream.tick()
        assert segment_of(shared).allocator.num_allocs == 2  # the kept slice's, and the present one
        assert kept.to_pylist() == [4.0, 4.0]


def test_leaving_a_producer_early_frees_what_it_made(shared: Any) -> None:
    for _ in range(60):  # 60 x 2 x 160 kB do not fit at once
        with shared.count(100) as stream:
            assert value_of(stream.tick().batch) == 99.0
    assert shared.add(1.0, 2.0) == 3.0
    assert segment_of(shared).allocator.num_allocs <= 1 and segment_of(shared).batches_inline == 0


def test_a_full_segment_says_so_once(shared: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "vgi_rpc.shm")
    taken = segment_of(shared).allocator.allocate(SIZE - core.HEADER_SIZE)
    with shared.echo() as session:
        for k in range(5):
            assert value_of(session.exchange(core.AnnotatedBatch(batch(k))).batch) == k
    assert segment_of(shared).batches_inline == 5
    said = [record.getMessage() for record in caplog.records if "no room" in record.getMessage()]
    assert len(said) == 2  # one for each side
    segment_of(shared).free(taken)


def test_nothing_is_sent_ahead(shared: Any) -> None:
    assert list(core.map_calls(shared.add, ({"a": 1.0, "b": float(k)} for k in range(50)))) == [
        1.0 + k for k in range(50)
    ]
    assert [f.result(10) for f in [core.submit(shared.add, 1.0, float(k)) for k in range(50)]] == [
        1.0 + k for k in range(50)
    ]
    eager = core.with_options(shared, read_ahead=16)
    assert [value_of(item.batch) for item in eager.count(40)] == [float(k) for k in range(40)][::-1]


def test_results_of_calls_sent_ahead(shared: Any) -> None:
    assert len(core.submit(shared.blob, 200_000).result(10)) == 200_000
    sizes = [200_000, 5, 300_000]
    assert [len(data) for data in core.map_calls(shared.blob, ({"n": n} for n in sizes))] == sizes
    assert segment_of(shared).batches_inline == 0


def test_threads_take_turns(shared: Any) -> None:
    wrong: list[Any] = []

    def calls(number: int) -> None:
        for k in range(25):
            with shared.echo() as session:
                if (
                    value_of(session.exchange(core.AnnotatedBatch(batch(100.0 * number + k))).batch)
                    != 100.0 * number + k
                ):
                    wrong.append((number, k))
            if shared.blob(200_000 + k) != b"x" * (200_000 + k):
                wrong.append(k)

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# ---- who cannot, and who lies


def test_without_shared_memory_batches_are_inline(worker: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_SHM_FOLDER", "/nowhere")
    with core.connect(Svc, worker, shm_size=SIZE) as proxy:
        assert segment_of(proxy) is None
        assert [value_of(item.batch) for item in proxy.count(2)] == [1.0, 0.0]


def test_reconnecting_would_lose_it(worker: list[str]) -> None:
    with (
        pytest.raises(ValueError, match="exclude each other"),
        core.connect(Svc, worker, shm_size=SIZE, reconnect=True),
    ):
        pass


@pytest.mark.skipif(not core._ipc_learning, reason="the learned layouts are switched off")
def test_small_calls_go_by_what_was_learned(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = []
    serve_one = core._ServerConnection._serve_one
    monkeypatch.setattr(core._ServerConnection, "_serve_one", lambda self: slow.append(1) or serve_one(self))
    for n in range(1, 20):
        assert shared.add(n, 1.0) == n + 1
        assert len(shared.blob(200_000 + n)) == 200_000 + n
    assert len(slow) == 2  # the first of each
    assert segment_of(shared).allocator.num_allocs <= 1  # the answers were in there, and each call freed the last one


def test_a_connection_that_changes_its_segment(shared: Any, segment: Any) -> None:
    channel = shared._link.channel
    first = channel.shm
    try:
        for n in range(6):
            channel.shm = (first, segment)[n % 2]
            proxy = core.RpcProxy(Svc, shared._link.transport)
            before = channel.shm.allocator.num_allocs
            for _ in range(3):
                assert proxy.add(1.0, 2.0) == 3.0
            data = proxy.blob(200_000)
            assert data == b"x" * 200_000 and channel.shm.allocator.num_allocs >= max(before, 1)
    finally:
        channel.shm = first


def request(metadata: dict[bytes, bytes], kind: Any) -> tuple[Any, dict[bytes, bytes]]:
    """One hand-made request to a real server; afterwards a good call on the same connection must be answered."""
    client, served = kind()
    thread = threading.Thread(target=core.RpcServer(Svc, Impl()).serve, args=(served,))
    thread.start()
    schema = core.rpc_methods(Svc)["add"].params_schema
    writer = core._IpcWriter(schema)
    about = {b"vgi_rpc.method": b"add", b"vgi_rpc.request_version": b"1", b"vgi_rpc.protocol": b"Svc"}
    writer.write(core.empty_batch(schema), {**about, **metadata})
    writer.close()
    client.channel.send(writer.take())
    reader = core._IpcReader(client.channel, core.IpcValidation.FULL)
    found = reader.read()
    reader.drain()
    assert core.RpcProxy(Svc, client).add(1.0, 2.0) == 3.0
    client.close()
    thread.join(5)
    served.close()
    return found


def test_a_request_by_pointer_is_read(segment: Any) -> None:
    schema = core.rpc_methods(Svc)["add"].params_schema
    place = segment.allocate_and_write(pa.RecordBatch.from_pydict({"a": [40.0], "b": [2.0]}, schema=schema))
    pointer = {core.SHM_OFFSET_KEY: b"%d" % place[0], core.SHM_LENGTH_KEY: b"%d" % place[1]}
    name = {core.SHM_SEGMENT_NAME_KEY: segment.name.encode(), core.SHM_SEGMENT_SIZE_KEY: b"%d" % SIZE}
    found, about = request({**name, **pointer}, core.make_pipe_pair)
    assert not about and found.to_pydict() == {"result": [42.0]}
    found, about = request(pointer, core.make_pipe_pair)  # no segment: loud, not empty
    assert b"Expected 1 row in request batch, got 0" in about[b"vgi_rpc.log_message"]
    found, about = request({**name, **pointer}, core.make_tcp_pair)  # not on this machine, as far as TCP knows
    assert b"Expected 1 row in request batch, got 0" in about[b"vgi_rpc.log_message"]


BAD_POINTERS = [
    (b"65536", b"99999999"),
    (b"65536", b"0"),
    (b"0", b"100"),
    (b"65537", b"8"),
    (b"-1", b"8"),
    (b"x", b"8"),
    (b"9" * 30, b"8"),
    (b"18446744073709551615", b"1"),
    (b"", b""),
]


@pytest.mark.parametrize(("offset", "length"), BAD_POINTERS)
def test_a_server_answers_bad_pointers(segment: Any, offset: bytes, length: bytes) -> None:
    segment.allocator.allocate(64)
    named = {core.SHM_SEGMENT_NAME_KEY: segment.name.encode()}
    _, about = request({**named, core.SHM_OFFSET_KEY: offset, core.SHM_LENGTH_KEY: length}, core.make_pipe_pair)
    assert about[b"vgi_rpc.log_level"] == b"EXCEPTION" and b"IPCError" in about[b"vgi_rpc.log_message"]


@pytest.mark.parametrize("name", [b"vgi_rpc_nobody", b"../../etc/passwd", b"\xff\xfe"])
def test_a_server_answers_names_that_cannot_be_attached(name: bytes) -> None:
    _, about = request({core.SHM_SEGMENT_NAME_KEY: name}, core.make_pipe_pair)
    assert b"cannot attach the shared memory segment" in about[b"vgi_rpc.log_message"]


@pytest.mark.parametrize("seed", range(8))
def test_damaged_tables_and_contents_are_errors(shared: Any, seed: int) -> None:
    """A peer that writes nonsense into the segment: typed errors, no crash, and the next call is answered."""
    rng = random.Random(seed)
    segment = segment_of(shared)
    failed = 0
    for _ in range(60):
        with shared.echo() as session:
            item = session.exchange(core.AnnotatedBatch(batch(1.0)))
            item.release()
            for _ in range(rng.randint(1, 4)):
                at = rng.choice([16, 17, 24, 28, 32, 36, 40, rng.randrange(65536, 66500)])
                segment.buf[at] = rng.randrange(256)
            try:
                found = session.exchange(core.AnnotatedBatch(batch(2.0)))
                assert value_of(found.batch) == 2.0
                found.release()
            except (core.RpcError, core.IPCError):
                failed += 1
            segment.allocator.reset()
            if shared._link.channel.broken is not None:
                break
    assert shared._link.channel.broken is not None or shared.add(1.0, 2.0) == 3.0
    assert failed or seed


def test_a_truncated_segment_is_an_error_and_no_signal(shared: Any) -> None:
    segment = segment_of(shared)
    os.truncate(f"/dev/shm/{segment.name}", core.HEADER_SIZE)
    with pytest.raises((core.RpcError, core.IPCError), match="has become shorter"), shared.echo() as session:
        session.exchange(core.AnnotatedBatch(batch(1.0)))


# ---- violence


def test_a_killed_worker(worker: list[str]) -> None:
    with core.connect(Svc, worker, shm_size=SIZE) as proxy:
        pid = proxy.pid()
        stream = proxy.count(100)
        item = stream.tick()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(core.WorkerDiedError):
            for _ in range(100):
                stream.tick()
        assert value_of(item.batch) == 99.0  # what was read stays
        assert names() == set()
        with pytest.raises(core.ConnectionLostError):
            proxy.add(1.0, 2.0)


def test_deadline_interrupt_and_fork(worker: list[str]) -> None:
    with core.connect(Svc, worker, shm_size=SIZE) as proxy:
        assert len(proxy.blob(500_000)) == 500_000
        child = os.fork()
        if child == 0:
            try:
                proxy.add(1.0, 2.0)
            except core.WrongProcessError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert proxy.add(1.0, 2.0) == 3.0 and len(names()) == 1
        with pytest.raises(core.DeadlineExceededError):
            core.with_options(proxy, timeout=0.2).sleep(5.0)
        assert names() == set()
    with core.connect(Svc, worker, shm_size=SIZE) as proxy:
        proxy.add(1.0, 2.0)
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            proxy.sleep(5.0)
        timer.join()
        with pytest.raises(core.ConnectionLostError, match="KeyboardInterrupt"):
            proxy.add(1.0, 2.0)


def test_a_pool_keeps_the_segment_with_the_worker(worker: list[str]) -> None:
    with core.WorkerPool(shm_size=SIZE) as pool:
        for _ in range(3):
            with pool.connect(Svc, worker) as proxy:
                assert [value_of(item.batch) for item in proxy.count(3)] == [2.0, 1.0, 0.0]
                first = segment_of(proxy).name
        assert names() == {first} and pool.metrics.reuses == 2


CLIENT = """
import os, sys
sys.path.insert(0, {root!r})
from tests.core import core
from tests.test_06_elsewhere import Svc, value_of
manager = core.connect(Svc, [sys.executable, {worker!r}], shm_size=1 << 20)
proxy = manager.__enter__()
kept = [item.batch for item in proxy.count(3)]
print(os.getpid(), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["manager.__exit__(None, None, None)", ""])
def test_a_client_leaves_nothing_behind(worker: list[str], end: str) -> None:
    code = CLIENT.format(root=str(ROOT), worker=worker[1], end=end)
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert list(Path("/dev/shm").glob(f"vgi_rpc_{ran.stdout.strip()}_*")) == []
    assert ran.stderr == ""  # no resource tracker either


def test_what_a_killed_client_leaves_is_removed_by_gc(worker: list[str], tmp_path: Path) -> None:
    code = CLIENT.format(root=str(ROOT), worker=worker[1], end="os.kill(os.getpid(), 9)")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    orphan = Path("/dev/shm") / f"vgi_rpc_{ran.stdout.strip()}_00000000"
    alive, foreign = (Path("/dev/shm") / name for name in (f"vgi_rpc_{os.getpid()}_00000000", "vgi_rpc_elsewhere"))
    for path in (orphan, alive, foreign):  # its own segment may be gone: another test collects garbage too
        path.touch()
    launch = core._extras_load("tools.launch", "the launch command")
    try:
        launch.gc_shared_memory()
        assert not list(Path("/dev/shm").glob(f"vgi_rpc_{ran.stdout.strip()}_*"))
        assert alive.exists() and foreign.exists()
    finally:
        alive.unlink()
        foreign.unlink()


def test_what_fails_half_way_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def left() -> tuple[set[str], set[str]]:
        mine = {name for name in os.listdir("/dev/shm") if name.startswith(f"vgi_rpc_{os.getpid()}_")}
        return set(os.listdir("/proc/self/fd")), mine

    segment = core.ShmSegment.create(SIZE)
    before = left()
    monkeypatch.setenv("VGI_RPC_SHM_MIN_BATCH_BYTES", "128k")
    for attempt in (lambda: core.ShmSegment.create(SIZE), lambda: core.ShmSegment.attach(segment.name, 0)):
        with pytest.raises(ValueError, match="VGI_RPC_SHM_MIN_BATCH_BYTES='128k'"):
            attempt()
        assert left() == before
    monkeypatch.delenv("VGI_RPC_SHM_MIN_BATCH_BYTES")
    with pytest.raises(OSError) as caught:
        core.ShmSegment.create(1 << 60)
    assert "shm_size" in caught.value.__notes__[0] and left() == before
    segment.unlink()
    segment.close()
