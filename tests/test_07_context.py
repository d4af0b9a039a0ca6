"""Room 7: who calls, with what rights, at what cost."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
import random
import re
import threading
import time
from typing import Any

import pyarrow as pa
import pytest

from tests.core import core

ALICE = core.AuthContext("jwt", True, "alice", {"sub": "alice", "secret": "hunter2"})


def context(**options: Any) -> Any:
    return core.CallContext(core.AuthContext.anonymous(), lambda message: None, **options)


# ---- AuthContext


def test_auth_fields_and_defaults() -> None:
    auth = core.AuthContext("bearer", True)
    assert (auth.domain, auth.authenticated, auth.principal, dict(auth.claims)) == ("bearer", True, None, {})
    assert (ALICE.domain, ALICE.principal, ALICE.claims["sub"]) == ("jwt", "alice", "alice")


def test_anonymous_is_one_shared_instance() -> None:
    anonymous = core.AuthContext.anonymous()
    assert anonymous is core.AuthContext.anonymous()
    assert (anonymous.domain, anonymous.authenticated, anonymous.principal, dict(anonymous.claims)) == (
        None,
        False,
        None,
        {},
    )


@pytest.mark.parametrize("name", ["domain", "authenticated", "principal", "claims", "other"])
def test_auth_is_frozen(name: str) -> None:
    with pytest.raises(AttributeError, match="frozen"):
        setattr(ALICE, name, "mallory")
    with pytest.raises(AttributeError, match="frozen"):
        delattr(ALICE, name)
    assert ALICE.principal == "alice"


def test_claims_are_a_read_only_copy() -> None:
    given = {"sub": "bob"}
    auth = core.AuthContext("jwt", True, "bob", given)
    given["sub"] = "mallory"
    assert auth.claims["sub"] == "bob"
    with pytest.raises(TypeError):
        auth.claims["sub"] = "mallory"
    with pytest.raises(TypeError):
        core.AuthContext.anonymous().claims["sub"] = "mallory"


def test_claims_never_show() -> None:
    assert repr(ALICE) == "AuthContext(domain='jwt', authenticated=True, principal='alice')"
    assert "hunter2" not in f"{ALICE} {ALICE!r}"


def test_auth_compares_by_value() -> None:
    same = core.AuthContext("jwt", True, "alice", {"sub": "alice", "secret": "hunter2"})
    assert same == ALICE and hash(ALICE) == hash(same)
    assert core.AuthContext("jwt", True, "alice") != ALICE
    assert core.AuthContext("bearer", True, "alice", ALICE.claims) != ALICE
    assert ALICE != "alice"


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda auth: pickle.loads(pickle.dumps(auth))])
def test_auth_can_be_copied_and_pickled(clone: Any) -> None:
    assert clone(ALICE) == ALICE
    assert dict(clone(ALICE).claims) == dict(ALICE.claims)


def test_require_authenticated() -> None:
    assert ALICE.require_authenticated() is None
    with pytest.raises(PermissionError, match=r"^Authentication required$"):
        core.AuthContext.anonymous().require_authenticated()


def test_current_auth_is_a_context_variable() -> None:
    assert core.current_auth() is core.AuthContext.anonymous()
    seen = []
    token = core._ctx_auth.set(ALICE)
    try:
        assert core.current_auth() is ALICE
        thread = threading.Thread(target=lambda: seen.append(core.current_auth()))
        thread.start()
        thread.join()
    finally:
        core._ctx_auth.reset(token)
    assert seen == [core.AuthContext.anonymous()]
    assert core.current_auth() is core.AuthContext.anonymous()


class Pair(core._Record):
    """A record of two fields."""

    __slots__ = ("left", "right")
    __match_args__ = ("left", "right")

    def __init__(self, left: int, right: int) -> None:
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)


def test_records_are_values() -> None:
    pair = Pair(1, 2)
    assert pair == Pair(1, 2) and pair != Pair(2, 1) and pair != (1, 2)
    assert pickle.loads(pickle.dumps(pair)) == pair
    match pair:
        case Pair(left, 2):
            assert left == 1
        case _:
            raise AssertionError("a record can be matched")
    with pytest.raises(AttributeError, match="Pair is frozen"):
        pair.left = 3
    assert len({pair, Pair(1, 2), Pair(2, 1)}) == 2


# ---- TransportKind, CallStatistics


def test_transport_kinds() -> None:
    assert {kind.name: kind.value for kind in core.TransportKind} == {
        "PIPE": "pipe",
        "HTTP": "http",
        "UNIX": "unix",
        "TCP": "tcp",
    }
    assert str(core.TransportKind.PIPE) == "pipe" == core.TransportKind.PIPE


def test_statistics_count_batches_rows_and_bytes() -> None:
    stats = core.CallStatistics()
    numbers = pa.RecordBatch.from_pydict({"a": [1.0], "b": [2.0]})
    words = pa.RecordBatch.from_pydict({"result": ["boom"]})
    stats.record_input(numbers)
    stats.record_input(numbers)
    stats.record_output(words)
    assert (stats.input_batches, stats.input_rows, stats.input_bytes) == (2, 2, 32)
    assert (stats.output_batches, stats.output_rows, stats.output_bytes) == (1, 1, 12)


def test_statistics_arguments_equality_and_repr() -> None:
    stats = core.CallStatistics(1, 2, 3, 4, 5, 6)
    names = ["input_batches", "output_batches", "input_rows", "output_rows", "input_bytes", "output_bytes"]
    assert [getattr(stats, name) for name in names] == [1, 2, 3, 4, 5, 6]
    assert stats == core.CallStatistics(1, 2, 3, 4, 5, 6)
    assert stats != core.CallStatistics(1, 2, 3, 4, 5, 7)
    assert stats != 1
    assert all(f"{name}={getattr(stats, name)}" in repr(stats) for name in names)
    with pytest.raises(TypeError):
        hash(stats)


# ---- CallContext


def test_context_defaults() -> None:
    ctx = context()
    assert ctx.auth is core.AuthContext.anonymous()
    assert dict(ctx.transport_metadata) == {} and dict(ctx.cookies) == {}
    for name in ("kind", "implementation", "response_limit_bytes", "preferred_response_bytes", "deadline"):
        assert getattr(ctx, name) is None
    assert ctx.session is None and ctx.session_id is None
    assert ctx.time_left() is None
    assert ctx.check_deadline() is None


def test_context_keeps_what_it_is_given() -> None:
    emit, impl, metadata = print, object(), {"remote_addr": "10.0.0.1", "cookies": {"a": "b"}}
    ctx = core.CallContext(
        ALICE,
        emit,
        metadata,
        server_id="s1",
        method_name="add",
        protocol_name="Calc",
        kind=core.TransportKind.TCP,
        implementation=impl,
        response_limit_bytes=10,
        preferred_response_bytes=5,
        deadline=7.5,
        request_id="00112233aabbccdd",
    )
    assert (ctx.auth, ctx.emit_client_log, ctx.implementation) == (ALICE, emit, impl)
    assert (ctx.transport_metadata, ctx.cookies) == (metadata, {"a": "b"})
    assert (ctx.kind, ctx.response_limit_bytes, ctx.preferred_response_bytes) == ("tcp", 10, 5)
    assert (ctx.deadline, ctx.request_id) == (7.5, "00112233aabbccdd")


def test_constructor_signature() -> None:
    names = list(inspect.signature(core.CallContext).parameters)
    assert names[:8] == [
        "auth",
        "emit_client_log",
        "transport_metadata",
        "server_id",
        "method_name",
        "protocol_name",
        "kind",
        "implementation",
    ]
    assert "peer_evidence" not in names and "identity" not in names


def test_context_has_slots() -> None:
    with pytest.raises(AttributeError):
        context().invented = 1


def test_request_id_is_minted_once() -> None:
    ctx = context()
    assert re.fullmatch("[0-9a-f]{16}", ctx.request_id)
    assert ctx.request_id == ctx.request_id
    assert len({context().request_id for _ in range(1000)}) == 1000


def test_request_ids_do_not_depend_on_the_seed_of_random() -> None:
    random.seed(42)
    first, state = context().request_id, random.getstate()
    random.seed(42)
    assert context().request_id != first
    assert random.getstate() == state


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_request_ids_differ_in_a_forked_child() -> None:
    context().request_id  # noqa: B018 (whatever is prepared lazily is prepared now)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writer, core._ctx_request_id().encode())
        os._exit(0)
    mine = core._ctx_request_id()
    os.waitpid(pid, 0)
    assert os.read(reader, 16).decode() != mine
    os.close(reader)
    os.close(writer)


def test_client_log_emits_a_message() -> None:
    seen: list[Any] = []
    ctx = core.CallContext(ALICE, seen.append)
    ctx.client_log(core.Level.WARN, "slow", seconds=3)
    ctx.client_log(core.Level.INFO, "done")
    assert seen == [core.Message(core.Level.WARN, "slow", seconds=3), core.Message(core.Level.INFO, "done")]
    assert seen[1].extra is None


def test_deadline() -> None:
    now = time.monotonic()
    ahead = context(deadline=now + 100.0)
    assert 99.0 < ahead.time_left() <= 100.0
    assert ahead.check_deadline() is None
    passed = context(deadline=now - 1.0, method_name="slow")
    assert passed.time_left() <= 0
    with pytest.raises(core.DeadlineExceededError, match=r"slow\(\)") as caught:
        passed.check_deadline()
    assert isinstance(caught.value, TimeoutError) and caught.value.error_code == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda ctx: ctx.set_cookie("a", "b", max_age=1),
            "set_cookie() is only supported inside unary RPC methods served over HTTP",
        ),
        (
            lambda ctx: ctx.delete_cookie("a", path="/"),
            "delete_cookie() is only supported inside unary RPC methods served over HTTP",
        ),
        (lambda ctx: ctx.open_session(object(), ttl=1.0), "sticky sessions not available on this transport"),
        (lambda ctx: ctx.close_session(), "sticky sessions not available on this transport"),
    ],
    ids=["set_cookie", "delete_cookie", "open_session", "close_session"],
)
def test_http_only_calls(call: Any, text: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        call(context())
    assert str(caught.value) == text


def test_cookie_signatures() -> None:
    names = ["name", "value", "expires", "max_age", "domain", "path", "secure", "http_only", "same_site", "partitioned"]
    assert list(inspect.signature(context().set_cookie).parameters) == names
    assert list(inspect.signature(context().delete_cookie).parameters) == ["name", "path", "domain"]


# ---- the context's logger


def records_of(ctx: Any, caplog: pytest.LogCaptureFixture, **options: Any) -> logging.LogRecord:
    with caplog.at_level(logging.INFO, logger="vgi_rpc.service"):
        ctx.logger.info("hello %s", "world", **options)
    return caplog.records[-1]


def test_logger_binds_what_is_known(caplog: pytest.LogCaptureFixture) -> None:
    ctx = core.CallContext(
        ALICE,
        print,
        {"remote_addr": "10.0.0.1"},
        server_id="s1",
        method_name="add",
        protocol_name="demo.Calc",
        request_id="00112233aabbccdd",
    )
    record = records_of(ctx, caplog)
    assert record.name == "vgi_rpc.service.demo.Calc"
    assert record.getMessage() == "hello world"
    bound = {name: getattr(record, name) for name in ("server_id", "method", "request_id", "principal", "auth_domain")}
    assert bound == {
        "server_id": "s1",
        "method": "add",
        "request_id": "00112233aabbccdd",
        "principal": "alice",
        "auth_domain": "jwt",
    }
    assert record.remote_addr == "10.0.0.1"
    assert "hunter2" not in str(vars(record))


def test_logger_leaves_out_what_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    record = records_of(context(server_id="s1", method_name="add", protocol_name="Calc"), caplog)
    assert record.request_id
    for name in ("principal", "auth_domain", "remote_addr"):
        assert not hasattr(record, name)


def test_framework_fields_win_over_the_users(caplog: pytest.LogCaptureFixture) -> None:
    ctx = context(server_id="s1", method_name="add", protocol_name="Calc")
    record = records_of(ctx, caplog, extra={"method": "forged", "order": 7})
    assert (record.method, record.order) == ("add", 7)


def test_logger_is_made_once_and_is_an_adapter() -> None:
    ctx = context(protocol_name="Calc")
    assert ctx.logger is ctx.logger
    assert isinstance(ctx.logger, logging.LoggerAdapter)


# ---- dispatch hooks


class Hook:
    """Writes down what it is told."""

    def __init__(self, name: str, log: list[Any], fail: str = "") -> None:
        self.name, self.log, self.fail = name, log, fail

    def on_dispatch_start(self, info: Any, auth: Any, transport_metadata: Any, kwargs: Any) -> str:
        self.log.append((f"start {self.name}", info, auth, transport_metadata, kwargs))
        if self.fail == "start":
            raise ValueError("no start")
        return f"token of {self.name}"

    def on_dispatch_end(self, token: Any, info: Any, error: Any, *, stats: Any = None) -> None:
        self.log.append((f"end {self.name}", token, info, error, stats))
        if self.fail == "end":
            raise ValueError("no end")


def dispatch(*hooks: Hook) -> None:
    composed = core._CtxHooks(hooks)
    token = composed.on_dispatch_start("info", ALICE, {"a": 1}, {"x": 2})
    composed.on_dispatch_end(token, "info", "error", stats="stats")


def test_hooks_start_in_order_and_end_reversed() -> None:
    log: list[Any] = []
    dispatch(Hook("a", log), Hook("b", log))
    assert log == [
        ("start a", "info", ALICE, {"a": 1}, {"x": 2}),
        ("start b", "info", ALICE, {"a": 1}, {"x": 2}),
        ("end b", "token of b", "info", "error", "stats"),
        ("end a", "token of a", "info", "error", "stats"),
    ]


def test_a_hook_that_does_not_start_is_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    log: list[Any] = []
    with caplog.at_level(logging.DEBUG, logger="vgi_rpc.rpc"):
        dispatch(Hook("a", log, "start"), Hook("b", log))
    assert [entry[0] for entry in log] == ["start a", "start b", "end b"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("vgi_rpc.rpc", "DEBUG")]


def test_a_hook_that_fails_at_its_end_does_not_disturb_the_others(caplog: pytest.LogCaptureFixture) -> None:
    log: list[Any] = []
    with caplog.at_level(logging.DEBUG, logger="vgi_rpc.rpc"):
        dispatch(Hook("a", log), Hook("b", log, "end"))
    assert [entry[0] for entry in log] == ["start a", "start b", "end b", "end a"]
    assert [(record.name, record.levelname) for record in caplog.records] == [("vgi_rpc.rpc", "DEBUG")]


def test_the_hook_is_a_protocol_of_two_methods() -> None:
    assert {name for name in vars(core.DispatchHook) if name.startswith("on_")} == {
        "on_dispatch_start",
        "on_dispatch_end",
    }
    stats = inspect.signature(core.DispatchHook.on_dispatch_end).parameters["stats"]
    assert stats.kind is inspect.Parameter.KEYWORD_ONLY and stats.default is None
