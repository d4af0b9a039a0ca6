"""A service that keeps a tally in a sticky session; `python -m tests.extras.sticky_service ID [LOG]` serves it."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

KEY = b"k" * 32
NUMBERS = pa.schema([pa.field("n", pa.int64())])


class Tally:
    """What a session keeps. It notices when two calls use it at once, and when it is closed under a call."""

    made: list[Tally] = []  # noqa: RUF012 (of the class)
    log = ""  # a file, for processes

    def __init__(self, total: int) -> None:
        self.total = total
        self.closed = 0
        self.faults: list[str] = []
        self.closed_by = ""
        self._using = threading.Lock()
        Tally.made.append(self)

    def use(self, seconds: float = 0.0) -> Tally:
        if self.closed:
            self.faults.append("used after close")
        if not self._using.acquire(blocking=False):
            self.faults.append("used by two calls at once")
            return self
        try:
            time.sleep(seconds)
        finally:
            self._using.release()
        return self

    def close(self) -> None:
        if not self._using.acquire(blocking=False):
            self.faults.append("closed under a call")
        else:
            self._using.release()
        self.closed += 1
        self.closed_by = threading.current_thread().name
        if Tally.log:
            with open(Tally.log, "a") as file:
                file.write(f"closed {self.total} in {os.getpid()}\n")


class Refusing:
    def close(self) -> None:
        raise RuntimeError("will not close")


class Sticky(Protocol):
    def open(self, start: int, ttl: float = 0.0) -> int: ...
    def open_refusing(self) -> None: ...
    def open_and_fail(self, start: int) -> int: ...
    def open_from_thread(self, start: int) -> int: ...
    def open_and_close(self, start: int) -> int: ...
    def reopen(self, start: int) -> int: ...
    def add(self, n: int) -> int: ...
    def hold(self, seconds: float) -> int: ...
    def close(self) -> int: ...
    def hold_and_close(self, seconds: float) -> int: ...
    def keep_context(self) -> None: ...
    def look(self) -> str: ...
    def plain(self) -> int: ...
    def pid(self) -> int: ...
    def blob(self, size: int) -> bytes: ...
    def take(self, data: bytes) -> int: ...
    def count(self, end: int) -> core.Stream[core.ProducerState]: ...
    def feed(self, start: int) -> core.Stream[core.ExchangeState]: ...


def tally_of(ctx: Any) -> Tally:
    if not isinstance(ctx.session, Tally):
        raise LookupError("no session")
    return ctx.session


@dataclass
class CountState(core.ProducerState):
    end: int

    def produce(self, out: Any, ctx: Any) -> None:
        tally = tally_of(ctx).use()
        if tally.total >= self.end:
            out.finish()
            return
        tally.total += 1
        out.emit_pydict({"n": [tally.total]})


@dataclass
class FeedState(core.ExchangeState):
    done: bool = False

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        tally = tally_of(ctx).use()
        tally.total += sum(input.batch.column("n").to_pylist())
        out.emit_pydict({"n": [tally.total]})

    def on_cancel(self, ctx: Any) -> None:
        ctx.close_session()


class StickyImpl:
    def __init__(self) -> None:
        self.calls = 0
        self.kept: Any = None

    def open(self, start: int, ctx: Any, ttl: float = 0.0) -> int:
        self.calls += 1
        ctx.open_session(Tally(start), ttl or None)
        return tally_of(ctx).total

    def open_refusing(self, ctx: Any) -> None:
        ctx.open_session(Refusing())

    def open_and_fail(self, start: int, ctx: Any) -> int:
        ctx.open_session(Tally(start))
        raise ValueError("no luck")

    def open_from_thread(self, start: int, ctx: Any) -> int:
        thread = threading.Thread(target=lambda: ctx.open_session(Tally(start)))
        thread.start()
        thread.join()
        return tally_of(ctx).total

    def open_and_close(self, start: int, ctx: Any) -> int:
        ctx.open_session(Tally(start))
        ctx.close_session()
        assert ctx.session is None and ctx.session_id is None
        return start

    def reopen(self, start: int, ctx: Any) -> int:
        ctx.close_session()
        ctx.open_session(Tally(start))
        return start

    def add(self, n: int, ctx: Any) -> int:
        self.calls += 1
        tally = tally_of(ctx).use()
        tally.total += n
        return tally.total

    def hold(self, seconds: float, ctx: Any) -> int:
        return tally_of(ctx).use(seconds).total

    def close(self, ctx: Any) -> int:
        total = ctx.session.total if ctx.session is not None else -1
        ctx.close_session()
        ctx.close_session()
        return total

    def hold_and_close(self, seconds: float, ctx: Any) -> int:
        total = tally_of(ctx).use(seconds).total
        ctx.close_session()
        return total

    def keep_context(self, ctx: Any) -> None:
        self.kept = ctx

    def look(self, ctx: Any) -> str:
        return f"{ctx.session_id} {ctx.auth.principal}"

    def plain(self) -> int:
        self.calls += 1
        return self.calls

    def pid(self) -> int:
        return os.getpid()

    def blob(self, size: int) -> bytes:
        return b"x" * size

    def take(self, data: bytes) -> int:
        return len(data)

    def count(self, end: int, ctx: Any) -> core.Stream[CountState]:
        return core.Stream(NUMBERS, CountState(end))

    def feed(self, start: int, ctx: Any) -> core.Stream[FeedState]:
        if ctx.session is None:
            ctx.open_session(Tally(start))
        return core.Stream(NUMBERS, FeedState(), NUMBERS)


def principals(req: Any) -> Any:
    """Who calls is what X-Conformance-Principal says; nobody without it."""
    name = req.get_header("X-Conformance-Principal")
    if name is None:
        return core.AuthContext.anonymous()
    if name == "nobody":
        raise ValueError("not let in")
    return core.AuthContext("conformance", True, name, {"jti": os.urandom(4).hex()})


def make_sticky(server_id: str = "one", **options: Any) -> Any:
    return core.RpcServer(Sticky, StickyImpl(), server_id=server_id, **options)


def main() -> None:
    server_id = sys.argv[1]
    Tally.log = sys.argv[2] if len(sys.argv) > 2 else ""
    serve: Any = getattr(core, "serve_http")  # noqa: B009 (a lazy name)
    serve(
        make_sticky(server_id),
        token_key=KEY,
        enable_sticky=True,
        sticky_default_ttl=5.0,
        sticky_echo_headers={"X-VGI-Worker-Affinity": server_id},
        drain_grace_seconds=float(os.environ.get("GRACE", "20")),
    )


if __name__ == "__main__":
    main()
