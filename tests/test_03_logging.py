"""Room 3: messages to the caller, formatters of the server's records, redaction, wire-debug text."""

from __future__ import annotations

import json
import logging
import math
import sys
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import core

LEVELS = ["EXCEPTION", "ERROR", "WARN", "INFO", "DEBUG", "TRACE"]


def wire(**values: bytes) -> dict[bytes, bytes]:
    return {b"vgi_rpc." + key.encode(): value for key, value in values.items()}


# ---- messages


def test_levels() -> None:
    assert [(level.name, level.value) for level in core.Level] == [(name, name) for name in LEVELS]


@pytest.mark.parametrize("name", LEVELS)
def test_message_factories(name: str) -> None:
    message = getattr(core.Message, name.lower())("text", a=1, b="x")
    assert (message.level, message.message, message.extra) == (core.Level[name], "text", {"a": 1, "b": "x"})
    assert message == core.Message(core.Level[name], "text", a=1, b="x")
    assert getattr(core.Message, name.lower())("text").extra is None


def test_message_equality_and_repr() -> None:
    message = core.Message.info("t", a=1)
    assert message != core.Message.info("t")
    assert message != core.Message.info("t", a=2)
    assert message != core.Message.warn("t", a=1)
    assert message != core.Message.info("u", a=1)
    assert message != "t"
    assert repr(message) == "Message(Level.INFO, 't', a=1)"
    assert repr(core.Message.info("t")) == "Message(Level.INFO, 't')"
    with pytest.raises(TypeError):
        hash(message)


@pytest.mark.parametrize("name", ["server_id", "request_id", "exception_type", "traceback", "error_kind"])
def test_extras_may_have_any_name(name: str) -> None:
    assert core.Message.info("t", **{name: "x"}).extra == {name: "x"}


def test_metadata_of_a_plain_message() -> None:
    assert core.Message.info("hi").add_to_metadata() == {"vgi_rpc.log_level": "INFO", "vgi_rpc.log_message": "hi"}


def test_metadata_of_extras_is_json_with_default_separators_and_escapes() -> None:
    found = core.Message.info("hi", a=1, b="\u00e9").add_to_metadata()
    assert found["vgi_rpc.log_extra"] == '{"a": 1, "b": "\\u00e9"}'


def test_metadata_is_a_new_dict() -> None:
    given_ = {"other": "1"}
    assert core.Message.info("hi").add_to_metadata(given_)["other"] == "1"
    assert given_ == {"other": "1"}


def test_error_kind_is_hoisted_from_any_level() -> None:
    assert core.Message.warn("m", error_kind="k").add_to_metadata()["vgi_rpc.error_kind"] == "k"
    assert "vgi_rpc.error_kind" not in core.Message.warn("m", error_kind=3).add_to_metadata()


def test_code_and_details_are_hoisted_from_exceptions_only() -> None:
    extra = {"error_code": "ABORTED", "error_details": [{"@type": "app.X", "v": "\u00e9"}]}
    found = core.Message.exception("m", **extra).add_to_metadata()
    assert found["vgi_rpc.error_code"] == "ABORTED"
    assert found["vgi_rpc.error_details"] == '[{"@type":"app.X","v":"\u00e9"}]'
    plain = core.Message.error("m", **extra).add_to_metadata()
    assert set(plain) == {"vgi_rpc.log_level", "vgi_rpc.log_message", "vgi_rpc.log_extra"}


@pytest.mark.parametrize("details", [5, "text", [3], [{"@type": "bad"}], {"a": 1}])
def test_bad_details_of_a_message_are_not_hoisted(details: Any) -> None:
    found = core.Message.exception("m", error_details=details).add_to_metadata()
    assert "vgi_rpc.error_details" not in found


def test_extra_that_is_not_json() -> None:
    with pytest.raises(TypeError):
        core.Message.info("m", a=object()).add_to_metadata()


# ---- from_exception


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:
        return caught


def chained(*, suppress: bool, cause: bool) -> BaseException:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            if cause:
                raise ValueError("outer") from inner
            if suppress:
                raise ValueError("outer") from None
            raise ValueError("outer")  # noqa: B904
    except ValueError as caught:
        return caught


def deep(levels: int) -> BaseException:
    def down(level: int) -> None:
        if level == 0:
            raise ValueError("deep")
        down(level - 1)

    try:
        down(levels)
    except ValueError as caught:
        return caught
    raise AssertionError


TRACE_KEYS = ["traceback", "frames"]


def test_from_exception_keys_in_emission_order() -> None:
    message = core.Message.from_exception(raised(ValueError("boom")))
    assert message.level is core.Level.EXCEPTION
    assert message.message == "ValueError: boom"
    assert list(message.extra) == ["exception_type", "exception_message", "error_code", *TRACE_KEYS]
    assert message.extra["exception_type"] == "ValueError"
    assert message.extra["exception_message"] == "boom"
    assert message.extra["error_code"] == "UNKNOWN"
    assert message.extra["traceback"].startswith("Traceback (most recent call last):\n")
    assert message.extra["traceback"].endswith("ValueError: boom\n")


def test_from_exception_all_keys_in_emission_order() -> None:
    exc = core.StatusError("m", code="ABORTED", kind="k", details=[core.RetryInfo(1)])
    exc.__cause__ = raised(KeyError("inner"))
    message = core.Message.from_exception(raised(exc))
    assert list(message.extra) == [
        "exception_type",
        "exception_message",
        "error_code",
        "error_kind",
        "error_details",
        "traceback",
        "cause",
        "frames",
    ]
    assert message.extra["error_details"] == [core.RetryInfo(1).to_json()]
    found = message.add_to_metadata()
    assert found["vgi_rpc.error_code"] == "ABORTED"
    assert found["vgi_rpc.error_kind"] == "k"
    assert found["vgi_rpc.error_details"] == '[{"@type":"vgi_rpc.RetryInfo","retry_delay_seconds":1}]'
    assert json.loads(found["vgi_rpc.log_extra"]) == message.extra


def test_from_exception_without_traceback() -> None:
    exc = chained(suppress=False, cause=True)
    message = core.Message.from_exception(exc, include_traceback=False)
    assert list(message.extra) == ["exception_type", "exception_message", "error_code"]


@pytest.mark.parametrize(
    ("suppress", "cause", "key"), [(False, True, "cause"), (False, False, "context"), (True, False, None)]
)
def test_cause_and_context(suppress: bool, cause: bool, key: str | None) -> None:
    extra = core.Message.from_exception(chained(suppress=suppress, cause=cause)).extra
    assert {"cause", "context"} & set(extra) == ({key} if key else set())
    assert "KeyError" not in extra["traceback"]
    if key:
        assert extra[key].endswith("KeyError: 'inner'\n")


def test_oversized_details_are_dropped_in_both_places() -> None:
    class Big(Exception):
        error_details: Any = ({"@type": "app.X", "v": "x" * 5000},)

    message = core.Message.from_exception(Big())
    assert "error_details" not in message.extra
    assert "vgi_rpc.error_details" not in message.add_to_metadata()


def test_details_that_json_refuses_are_dropped_in_both_places() -> None:
    class Bad(Exception):
        error_details: Any = ({"@type": "app.X", "v": math.nan},)

    message = core.Message.from_exception(Bad())
    assert "error_details" not in message.extra
    assert "vgi_rpc.error_details" not in message.add_to_metadata()


def test_traceback_is_cut_at_16000_characters() -> None:
    extra = core.Message.from_exception(raised(ValueError("x" * 20_000))).extra
    suffix = "\n\u2026 <traceback truncated>"
    assert extra["traceback"].endswith("x" + suffix)
    assert len(extra["traceback"]) == 16_000 + len(suffix)
    assert extra["exception_message"] == "x" * 20_000


def test_cause_is_cut_too() -> None:
    exc = ValueError("outer")
    exc.__cause__ = ValueError("y" * 20_000)
    extra = core.Message.from_exception(raised(exc)).extra
    assert extra["cause"].endswith("y\n\u2026 <traceback truncated>")
    assert not extra["traceback"].endswith("truncated>")


def test_traceback_of_exactly_the_limit_is_whole() -> None:
    exc = ValueError("x" * (16_000 - len("ValueError: \n")))  # never raised: no frames
    assert len(core.Message.from_exception(exc).extra["traceback"]) == 16_000


def test_frames_are_the_last_five_oldest_first() -> None:
    frames = core.Message.from_exception(deep(20)).extra["frames"]
    assert len(frames) == 5
    for frame in frames:
        assert list(frame) == ["file", "line", "function", "code"]
        assert frame["file"] == __file__
        assert frame["function"] == "down"
        assert isinstance(frame["line"], int)
    assert frames[-1]["code"] == 'raise ValueError("deep")'
    assert frames[-2]["code"] == "down(level - 1)"


def test_frame_without_source_has_null_code() -> None:
    try:
        exec(compile("raise ValueError('x')", "<generated>", "exec"), {})
    except ValueError as exc:
        frames = core.Message.from_exception(exc).extra["frames"]
    assert frames[-1] == {"file": "<generated>", "line": 1, "function": "<module>", "code": None}


def test_unprintable_exception() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    message = core.Message.from_exception(raised(Bad()))
    assert message.message == "Bad: <exception str() failed>"
    assert message.extra["exception_message"] == "<exception str() failed>"


# ---- the wire and back


def test_metadata_bytes() -> None:
    found = core._log_metadata_bytes(core.Message.info("hi"), server_id="s", request_id="r")
    assert found == wire(log_level=b"INFO", log_message=b"hi", server_id=b"s", request_id=b"r")
    assert core._log_metadata_bytes(core.Message.info("hi")) == wire(log_level=b"INFO", log_message=b"hi")


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\u00e9\U0001f600"])
def test_metadata_bytes_are_always_utf8(text: str) -> None:
    for message in (core.Message.info(text, a=text), core.Message.from_exception(raised(ValueError(text)))):
        for key, value in core._log_metadata_bytes(message).items():
            key.decode()
            value.decode()


@pytest.mark.parametrize("text", ["\ud800", "\udcff"])
def test_surrogates_in_keys_of_kind_and_details(text: str) -> None:
    exc = core.StatusError(text, code="INTERNAL", kind=text, details=[{"@type": "app.X", "v": text}])
    for value in core._log_metadata_bytes(core.Message.from_exception(exc), server_id=text, request_id=text).values():
        value.decode()


def test_lone_surrogates_in_extras_become_question_marks_and_pairs_stay() -> None:
    found = core.Message.info("m", a="\ud800x", b="\U0001f600", c="\\ud800").add_to_metadata()
    assert json.loads(found["vgi_rpc.log_extra"]) == {"a": "?x", "b": "\U0001f600", "c": "\\ud800"}
    assert found["vgi_rpc.log_extra"].isascii()


READER_LIMIT = 1_048_576


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600"])
def test_overlong_errors_are_cut_and_keep_what_programs_branch_on(letter: str) -> None:
    exc = core.StatusError(letter * 1_200_000, code="ABORTED", kind="k", details=[core.RetryInfo(1)])
    exc.__cause__ = raised(ValueError(letter * 20_000))
    found = core._log_metadata_bytes(core.Message.from_exception(raised(exc)), "s", "r")
    assert max(map(len, found.values())) <= READER_LIMIT
    error = core._log_from_wire(found)
    assert error.error_message == f"StatusError: {letter * 1_200_000}"[:16_000] + "\n\u2026 <text truncated>"
    assert (error.error_type, error.error_code, error.error_kind) == ("StatusError", "ABORTED", "k")
    assert (error.error_details, error.request_id) == ([core.RetryInfo(1).to_json()], "r")
    assert error.remote_traceback.count("truncated>") == 1


def test_long_errors_that_fit_are_whole() -> None:
    found = core._log_metadata_bytes(core.Message.from_exception(ValueError("x" * 500_000)))
    assert found[core.LOG_MESSAGE_KEY] == b"ValueError: " + b"x" * 500_000


def test_overlong_extras_are_left_out() -> None:
    one = core._log_from_wire(core._log_metadata_bytes(core.Message.info("m", a=[0] * 1_000_000, b="kept")))
    assert one == core.Message.info("m", b="kept")
    many = core.Message.info("m", **{f"k{i}": "x" * 16_000 for i in range(100)})
    assert core._log_from_wire(core._log_metadata_bytes(many)) == core.Message.info("m")


@pytest.mark.parametrize("name", LEVELS[1:])
def test_message_survives_the_wire_with_text_extras(name: str) -> None:
    sent = core.Message(core.Level[name], "text \u00e9", a=1, b=[1, None], c="x")
    found = core._log_from_wire(core._log_metadata_bytes(sent, server_id="s", request_id="r"))
    assert found == core.Message(
        core.Level[name], "text \u00e9", a="1", b="[1, None]", c="x", server_id="s", request_id="r"
    )


def test_top_level_ids_win_over_extras_and_are_only_added_when_present() -> None:
    sent = core.Message.info("m", server_id="mine")
    assert core._log_from_wire(core._log_metadata_bytes(sent)).extra == {"server_id": "mine"}
    assert core._log_from_wire(core._log_metadata_bytes(sent, server_id="s")).extra == {"server_id": "s"}
    assert core._log_from_wire(core._log_metadata_bytes(core.Message.info("m"))).extra is None


@pytest.mark.parametrize("level", [b"", b"info", b"NOTICE", b"\xff"])
def test_unknown_levels_are_info(level: bytes) -> None:
    found = core._log_from_wire(wire(log_level=level, log_message=b"m"))
    assert found == core.Message.info("m")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000]
)
def test_extra_that_is_no_object_is_no_extra(raw: bytes) -> None:
    assert core._log_from_wire(wire(log_level=b"INFO", log_message=b"m", log_extra=raw)) == core.Message.info("m")
    error = core._log_from_wire(wire(log_level=b"EXCEPTION", log_message=b"m", log_extra=raw))
    assert type(error) is core.RpcError
    assert (error.error_type, error.error_message, error.remote_traceback) == ("EXCEPTION", "m", "")


def test_exception_from_the_wire() -> None:
    exc = core.StatusError("m", code="ABORTED", kind="k", details=[core.RetryInfo(1)])
    sent = core.Message.from_exception(raised(exc))
    error = core._log_from_wire(core._log_metadata_bytes(sent, server_id="s", request_id="r"))
    assert type(error) is core.RpcError
    assert error.error_type == "StatusError"
    assert error.error_message == "StatusError: m"
    assert str(error) == "StatusError: m"
    assert error.remote_traceback == sent.extra["traceback"]
    assert (error.request_id, error.error_code, error.error_kind, error.sent) == ("r", "ABORTED", "k", "answered")
    assert error.error_details == [core.RetryInfo(1).to_json()]
    assert error.retry_info() == core.RetryInfo(1)


def test_bare_exception_of_a_method_has_the_level_as_type() -> None:
    error = core._log_from_wire(core._log_metadata_bytes(core.Message.exception("stop", n=1)))
    assert (error.error_type, error.error_message, error.error_code) == ("EXCEPTION", "stop", "")


def test_code_kind_and_details_are_mirrored_from_extra() -> None:
    extra = {"error_code": "ABORTED", "error_kind": "k", "error_details": [{"@type": "app.X"}, 3, {"a": 1}]}
    raw = json.dumps(extra).encode()
    error = core._log_from_wire(wire(log_level=b"EXCEPTION", log_message=b"m", log_extra=raw))
    assert (error.error_code, error.error_kind, error.error_details) == ("ABORTED", "k", [{"@type": "app.X"}])
    top = core._log_from_wire(
        wire(
            log_level=b"EXCEPTION",
            log_message=b"m",
            log_extra=raw,
            error_code=b"INTERNAL",
            error_kind=b"top",
            error_details=b'[{"@type":"app.Top"}]',
        )
    )
    assert (top.error_code, top.error_kind, top.error_details) == ("INTERNAL", "top", [{"@type": "app.Top"}])


def test_undecodable_bytes_inside_extra_do_not_lose_the_rest() -> None:
    raw = b'{"exception_type": "Val\xff", "traceback": "tb\xfe"}'
    error = core._log_from_wire(wire(log_level=b"EXCEPTION", log_message=b"m", log_extra=raw))
    assert (error.error_type, error.remote_traceback) == ("Val\ufffd", "tb\ufffd")


def test_deadline_of_the_far_side_has_its_class_and_all_fields() -> None:
    sent = core.Message.from_exception(raised(core.DeadlineExceededError("too late", sent="no")))
    error = core._log_from_wire(core._log_metadata_bytes(sent, "s", "r"))
    assert type(error) is core.DeadlineExceededError
    assert str(error) == error.error_message
    assert (error.request_id, error.code, error.sent) == ("r", core.Code.DEADLINE_EXCEEDED, "answered")
    assert error.remote_traceback == sent.extra["traceback"]
    assert len(error.__notes__) == 1
    bare = core._log_from_wire(
        wire(log_level=b"EXCEPTION", log_message=b"m", log_extra=b'{"exception_type": "DeadlineExceededError"}')
    )
    assert (bare.error_message, bare.code) == ("m", core.Code.DEADLINE_EXCEEDED)


def test_undecodable_bytes_are_replaced() -> None:
    error = core._log_from_wire(
        wire(log_level=b"EXCEPTION", log_message=b"a\xff", error_code=b"\xff", error_details=b"\xff")
    )
    assert error.error_message == "a\ufffd"
    assert error.code is core.Code.UNKNOWN
    assert error.error_details == []


@pytest.mark.parametrize("level", [b"INFO", b"EXCEPTION"])
@pytest.mark.parametrize("key", [b"a", b"traceback", b"exception_type", b"error_code", b"error_details"])
def test_deep_json_of_any_depth_is_read(level: bytes, key: bytes) -> None:
    for depth in range(900, 1005, 3):  # json gives up near the recursion limit
        for raw in (b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth):
            core._log_from_wire(wire(log_level=level, log_message=b"m", log_extra=b'{"' + key + b'":' + raw + b"}"))


LOG_KEYS = [
    core.LOG_LEVEL_KEY,
    core.LOG_MESSAGE_KEY,
    core.LOG_EXTRA_KEY,
    core.ERROR_CODE_KEY,
    core.ERROR_KIND_KEY,
    core.ERROR_DETAILS_KEY,
    core.SERVER_ID_KEY,
    core.REQUEST_ID_KEY,
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["exception_type", "traceback", "error_code", "error_kind", "error_details", "@type"])
            | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
BYTES = st.binary() | st.sampled_from([level.encode() for level in LEVELS]) | JSON.map(lambda v: json.dumps(v).encode())


@settings(database=None, deadline=None)
@given(st.dictionaries(st.sampled_from(LOG_KEYS) | st.binary(max_size=8), BYTES))
def test_any_bytes_are_read(metadata: dict[bytes, bytes]) -> None:
    found = core._log_from_wire(metadata)
    if metadata.get(core.LOG_LEVEL_KEY) == b"EXCEPTION":
        assert type(found) is core.RpcError
        assert isinstance(found.code, core.Code)
        assert all(isinstance(obj["@type"], str) for obj in found.error_details)
        assert len(found.details()) <= len(found.error_details)
        str(found)
    else:
        assert isinstance(found, core.Message)
        assert all(isinstance(value, str) for value in (found.extra or {}).values())
        assert isinstance(found.message, str)


@settings(database=None, deadline=None)
@given(
    st.sampled_from(LEVELS[1:]),
    st.text(),
    st.dictionaries(st.text().filter(lambda name: name not in ("self", "level", "message")), st.text()),
)
def test_messages_of_text_round_trip(level: str, text: str, extra: dict[str, str]) -> None:
    message = core.Message(core.Level[level], text, **extra)
    assert core._log_from_wire(core._log_metadata_bytes(message)) == message


@settings(database=None, deadline=None)
@given(JSON, st.text(), st.text())
def test_any_declared_details_and_text_can_be_sent(details: Any, text: str, kind: str) -> None:
    exc = ValueError(text)
    exc.error_details, exc.error_kind = details, kind  # type: ignore[attr-defined]
    sent = core.Message.from_exception(exc)
    error = core._log_from_wire(core._log_metadata_bytes(sent))
    assert error.error_message == f"ValueError: {text}"
    assert error.error_kind == kind
    assert error.error_details == core.error_details_of(exc) or error.error_details == []


# ---- how a server logs


@pytest.mark.parametrize("code", list(core.Code))
def test_level_of_a_failed_method(code: Any) -> None:
    expected = (logging.ERROR, True)
    if code in core.CLIENT_ERROR_CODES:
        expected = (logging.INFO, False)
    elif code in core.TRANSIENT_ERROR_CODES:
        expected = (logging.WARNING, False)
    assert core._log_level_of(core.StatusError("m", code=code)) == expected


def test_level_of_an_ordinary_exception() -> None:
    assert core._log_level_of(ValueError("x")) == (logging.ERROR, True)


def test_library_is_silent_unless_configured() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("vgi_rpc").handlers)


# ---- formatters


def record(message: str = "hello %s", args: tuple[Any, ...] = ("you",), **extra: Any) -> logging.LogRecord:
    made = logging.getLogger("vgi_rpc.access").makeRecord(
        "vgi_rpc.access", logging.INFO, __file__, 1, message, args, None, extra={}
    )
    made.created = 1_700_000_000.0625
    made.__dict__.update(extra)
    return made


def test_json_line() -> None:
    line = core.VgiJsonFormatter().format(record(method="add", n=1, nothing=None))
    assert "\n" not in line
    assert json.loads(line) == {
        "timestamp": "2023-11-14T22:13:20.062Z",
        "level": "INFO",
        "logger": "vgi_rpc.access",
        "message": "hello you",
        "method": "add",
        "n": 1,
        "nothing": None,
    }


def test_json_standard_fields_cannot_be_overridden() -> None:
    found = json.loads(core.VgiJsonFormatter().format(record(timestamp="t", level="l", logger="g")))
    assert (found["timestamp"][:4], found["level"], found["logger"]) == ("2023", "INFO", "vgi_rpc.access")


def test_json_of_what_json_cannot_do_is_its_text() -> None:
    assert (
        json.loads(core.VgiJsonFormatter().format(record(schema=pa.schema([("a", pa.int8())]))))["schema"] == "a: int8"
    )


def test_json_exception_and_stack() -> None:
    made = record()
    try:
        raise ValueError("boom")
    except ValueError:
        made.exc_info = sys.exc_info()
    made.stack_info = "Stack ..."
    found = json.loads(core.VgiJsonFormatter().format(made))
    assert found["exception"].endswith("ValueError: boom")
    assert found["stack_info"] == "Stack ..."


@pytest.mark.parametrize(
    ("created", "shown"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_700_000_000.5, "2023-11-14T22:13:20.500Z"),
        (1_700_000_000.9996, "2023-11-14T22:13:20.999Z"),
    ],
)
def test_timestamps(created: float, shown: str) -> None:
    made = record()
    made.created = created
    assert core.VgiJsonFormatter().fields(made)["timestamp"] == shown


def test_json_formatter_takes_the_arguments_of_a_formatter() -> None:
    made = core.VgiJsonFormatter(None, None, "%", True, defaults={"a": 1})
    assert json.loads(made.format(record()))["message"] == "hello you"


@pytest.mark.parametrize("size", [0, -1])
def test_access_formatter_wants_a_positive_size(size: int) -> None:
    with pytest.raises(ValueError, match="max_record_bytes"):
        core.VgiAccessLogFormatter(max_record_bytes=size)


def test_access_record_that_fits_is_whole() -> None:
    made = record(claims={"a": 1}, method="add")
    assert core.VgiAccessLogFormatter().format(made) == core.VgiJsonFormatter().format(made)
    exact = len(core.VgiJsonFormatter().format(made))
    assert "truncated" not in json.loads(core.VgiAccessLogFormatter(max_record_bytes=exact).format(made))
    assert json.loads(core.VgiAccessLogFormatter(max_record_bytes=exact - 1).format(made))["truncated"]


def test_access_claims_go_first() -> None:
    made = record(claims={"a": "x" * 1000}, method="add", other="kept")
    found = json.loads(core.VgiAccessLogFormatter(max_record_bytes=400).format(made))
    assert found["claims"] == {}
    assert found["truncated"] is True
    assert (found["method"], found["other"]) == ("add", "kept")


def test_access_optional_fields_go_next() -> None:
    made = record(claims={"a": 1}, method="add", status="ok", other="x" * 1000)
    line = core.VgiAccessLogFormatter(max_record_bytes=400).format(made)
    found = json.loads(line)
    assert found == {
        "timestamp": "2023-11-14T22:13:20.062Z",
        "level": "INFO",
        "logger": "vgi_rpc.access",
        "message": "hello you",
        "method": "add",
        "status": "ok",
        "truncated": "record_too_large",
    }
    assert len(line) <= 400


def test_access_error_message_is_kept_whole() -> None:
    made = record(error_message="e" * 1000, error_code="INTERNAL", request_id="r", claims={"a": 1})
    found = json.loads(core.VgiAccessLogFormatter(max_record_bytes=300).format(made))
    assert found["error_message"] == "e" * 1000
    assert (found["error_code"], found["truncated"]) == ("INTERNAL", "record_too_large")
    assert not {"request_id", "claims"} & set(found)


def test_access_size_counts_bytes() -> None:
    made = record(message="%s", args=("\u00e9" * 100,))
    line = core.VgiAccessLogFormatter().format(made)
    assert line.isascii()


# ---- redaction

PRIVATE = [
    "password",
    "token",
    "secret",
    "key",
    "authorization",
    "email",
    "phone",
    "address",
    "birthdate",
    "gender",
    "given_name",
    "family_name",
    "middle_name",
    "nickname",
    "preferred_username",
    "picture",
    "profile",
    "website",
    "name",
]


@pytest.mark.parametrize("name", [*PRIVATE, "NAME", "Email", "access_token", "X-API-KEY", "phone_number_verified"])
def test_private_claims_are_redacted(name: str) -> None:
    assert core.redact_claims({name: "v"}) == {name: "[redacted]"}


@pytest.mark.parametrize("name", ["sub", "iss", "aud", "exp", "groups", "tenant", "roles", "hostname"])
def test_other_claims_stay(name: str) -> None:
    assert core.redact_claims({name: ["v"]}) == {name: ["v"]}


def test_redaction_leaves_the_source_alone() -> None:
    claims = {"email": "a@b.test", "sub": "me"}
    assert core.redact_claims(claims) == {"email": "[redacted]", "sub": "me"}
    assert claims["email"] == "a@b.test"
    kept = core.no_redaction(claims)
    assert kept == claims
    assert kept is not claims


def test_claim_redactor_can_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    def broken(claims: Any) -> Any:
        raise ValueError(f"cannot redact {claims}")

    try:
        assert core.apply_claim_redaction({"email": "x"}) == {"email": "[redacted]"}
        core.set_claim_redactor(core.no_redaction)
        assert core.apply_claim_redaction({"email": "x"}) == {"email": "x"}
        core.set_claim_redactor(broken)
        assert core.apply_claim_redaction({"email": "s3cret"}) == {}
        assert "the claim redactor failed with ValueError" in caplog.text
        assert "s3cret" not in caplog.text  # neither in the text nor in a traceback
        core.set_claim_redactor(lambda claims: None)
        assert core.apply_claim_redaction({"email": "x"}) == {}
    finally:
        core.set_claim_redactor(core.redact_claims)


# ---- wire-debug text


def test_debug_text_of_schemas_and_batches() -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.utf8())])
    assert core._log_schema(schema) == "(a: int64, b: string)"
    assert core._log_schema(core.EMPTY_SCHEMA) == "(empty)"
    batch = pa.record_batch({"a": [1, 2]})
    assert core._log_batch(batch) == "RecordBatch(rows=2, cols=1, schema=(a: int64), bytes=16)"


def test_debug_text_of_metadata_hides_tokens_and_locations() -> None:
    hidden = [core.STATE_KEY, core.CALL_STATE_KEY, core.LOCATION_KEY, core.LOCATION_SOURCE_KEY]
    text = core._log_metadata({key: b"s3cret-value" for key in hidden})
    assert "s3cret" not in text
    assert text.count("<12 bytes>") == 4


def test_debug_text_of_metadata() -> None:
    assert core._log_metadata(None) == "None"
    assert core._log_metadata({}) == "{}"
    assert core._log_metadata({b"a": b"1", b"\xff": b"\xff"}) == "{a='1', \ufffd='\ufffd'}"
    assert core._log_metadata({b"a": b"x" * 81}) == "{a='" + "x" * 80 + "...'}"
    assert core._log_metadata({b"a": b"x" * 80}) == "{a='" + "x" * 80 + "'}"


def test_debug_text_of_arguments_never_shows_values() -> None:
    assert core._log_kwargs({"password": "hunter2", "n": 3, "x": None}) == "password: str, n: int, x: NoneType"
