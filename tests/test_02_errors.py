"""Room 2: the error tree, the three-layer error model, pickling, and the table of foreign errors."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core import core

CODES = [
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
]


# ---- codes


def test_codes_are_the_closed_set_by_name() -> None:
    assert [(code.name, code.value) for code in core.Code] == [(name, name) for name in CODES]
    assert core.Code.INTERNAL == "INTERNAL"


@pytest.mark.parametrize("name", CODES)
def test_code_parse_knows_every_name(name: str) -> None:
    assert core.Code.parse(name) is core.Code[name]
    assert core.Code.parse(core.Code[name]) is core.Code[name]


@pytest.mark.parametrize("value", ["", "internal", "NOPE", None, 13, b"INTERNAL", object(), ["INTERNAL"]])
def test_code_parse_of_anything_else_is_unknown(value: object) -> None:
    assert core.Code.parse(value) is core.Code.UNKNOWN


@pytest.mark.parametrize(
    ("name", "members"),
    [
        (
            "CLIENT_ERROR_CODES",
            "INVALID_ARGUMENT NOT_FOUND ALREADY_EXISTS OUT_OF_RANGE FAILED_PRECONDITION PERMISSION_DENIED"
            " UNAUTHENTICATED UNIMPLEMENTED CANCELLED",
        ),
        ("TRANSIENT_ERROR_CODES", "UNAVAILABLE ABORTED DEADLINE_EXCEEDED RESOURCE_EXHAUSTED"),
        ("OTEL_SERVER_ERROR_CODES", "UNKNOWN DEADLINE_EXCEEDED UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS"),
    ],
)
def test_code_sets(name: str, members: str) -> None:
    found = getattr(core, name)
    assert isinstance(found, frozenset)
    assert found == set(members.split())


# ---- details

DETAILS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("ErrorInfo", (), {"metadata": {}}),
    ("ErrorInfo", ({"a": "1", "key with \u00e9": ""},), {"metadata": {"a": "1", "key with \u00e9": ""}}),
    ("RetryInfo", (3,), {"retry_delay_seconds": 3}),
    ("RetryInfo", (1.5,), {"retry_delay_seconds": 1.5}),
    ("RetryInfo", (0,), {"retry_delay_seconds": 0}),
    ("BadRequest", (), {"field_violations": []}),
    (
        "BadRequest",
        ([core.FieldViolation("a", "too big"), core.FieldViolation("b")],),
        {"field_violations": [{"field": "a", "description": "too big"}, {"field": "b", "description": ""}]},
    ),
    (
        "PreconditionFailure",
        ([core.PreconditionViolation("TOS", "me", "read it"), core.PreconditionViolation("X")],),
        {
            "violations": [
                {"type": "TOS", "subject": "me", "description": "read it"},
                {"type": "X", "subject": "", "description": ""},
            ]
        },
    ),
    (
        "QuotaFailure",
        ([core.QuotaViolation("disk", "full")],),
        {"violations": [{"subject": "disk", "description": "full"}]},
    ),
    ("ResourceInfo", (), {"resource_type": "", "resource_name": "", "owner": "", "description": ""}),
    (
        "ResourceInfo",
        ("table", "t", "me", "gone"),
        {"resource_type": "table", "resource_name": "t", "owner": "me", "description": "gone"},
    ),
    (
        "Help",
        ([core.HelpLink("docs", "https://x.test/")],),
        {"links": [{"description": "docs", "url": "https://x.test/"}]},
    ),
    ("LocalizedMessage", ("de", "kaputt"), {"locale": "de", "message": "kaputt"}),
]


@pytest.mark.parametrize(("name", "args", "body"), DETAILS)
def test_detail_to_json_and_back(name: str, args: tuple[Any, ...], body: dict[str, Any]) -> None:
    cls = getattr(core, name)
    detail = cls(*args)
    assert f"vgi_rpc.{name}" == cls.TYPE
    assert detail.to_json() == {"@type": cls.TYPE, **body}
    assert next(iter(detail.to_json())) == "@type"
    assert cls.from_json(detail.to_json()) == detail
    assert core.parse_error_detail(json.loads(json.dumps(detail.to_json()))) == detail
    assert name in repr(detail)


@pytest.mark.parametrize(("name", "args", "body"), DETAILS)
def test_detail_is_frozen_hashable_copyable(name: str, args: tuple[Any, ...], body: dict[str, Any]) -> None:
    detail = getattr(core, name)(*args)
    for field in body:
        with pytest.raises(AttributeError):
            setattr(detail, field, "other")
    assert detail == getattr(core, name)(*args)
    assert hash(detail) == hash(getattr(core, name)(*args))
    for twin in (pickle.loads(pickle.dumps(detail)), copy.copy(detail), copy.deepcopy(detail)):
        assert type(twin) is type(detail)
        assert twin == detail


def test_details_of_different_classes_or_values_differ() -> None:
    assert core.RetryInfo(1) != core.RetryInfo(2)
    assert core.BadRequest() != core.QuotaFailure()
    assert core.RetryInfo(1) != "RetryInfo"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (core.RetryInfo(2), core.RetryInfo(2.0)),
        (core.ErrorInfo({"a": "1", "b": "2"}), core.ErrorInfo({"b": "2", "a": "1"})),
        (core.BadRequest([core.FieldViolation("a")]), core.BadRequest((core.FieldViolation("a", ""),))),
    ],
    ids=["number", "order", "sequence"],
)
def test_equal_details_hash_alike(one: Any, other: Any) -> None:
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1


def test_error_info_keys_are_text() -> None:
    with pytest.raises(ValueError):
        core.ErrorInfo({1: "a"})


def test_whole_seconds_travel_as_an_integer() -> None:
    assert json.dumps(core.RetryInfo(2.0).to_json()) == '{"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 2}'


def test_parts_are_built_from_objects() -> None:
    parsed = core.parse_error_detail({"@type": "vgi_rpc.BadRequest", "field_violations": [{"field": "a", "more": 1}]})
    assert parsed == core.BadRequest([core.FieldViolation("a")])
    assert parsed.field_violations[0].description == ""


def test_error_info_keeps_its_own_copy_of_the_mapping() -> None:
    source = {"a": "1"}
    detail = core.ErrorInfo(source)
    source["a"] = "2"
    assert detail.metadata["a"] == "1"
    with pytest.raises(TypeError):
        detail.metadata["a"] = "3"


MALFORMED: list[dict[str, Any]] = [
    {"@type": "vgi_rpc.ErrorInfo", "metadata": {"a": 1}},
    {"@type": "vgi_rpc.ErrorInfo", "metadata": [1]},
    {"@type": "vgi_rpc.ErrorInfo", "metadata": None},
    {"@type": "vgi_rpc.RetryInfo"},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": -1},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": math.nan},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": math.inf},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": "1"},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": True},
    {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": None},
    {"@type": "vgi_rpc.BadRequest", "field_violations": "abc"},
    {"@type": "vgi_rpc.BadRequest", "field_violations": {"field": "a"}},
    {"@type": "vgi_rpc.BadRequest", "field_violations": 3},
    {"@type": "vgi_rpc.BadRequest", "field_violations": None},
    {"@type": "vgi_rpc.BadRequest", "field_violations": ["a"]},
    {"@type": "vgi_rpc.BadRequest", "field_violations": [1]},
    {"@type": "vgi_rpc.BadRequest", "field_violations": [None]},
    {"@type": "vgi_rpc.BadRequest", "field_violations": [["field"]]},
    {"@type": "vgi_rpc.BadRequest", "field_violations": [{}]},
    {"@type": "vgi_rpc.BadRequest", "field_violations": [{"field": 1}]},
    {"@type": "vgi_rpc.PreconditionFailure", "violations": [{"subject": "x"}]},
    {"@type": "vgi_rpc.QuotaFailure", "violations": [{"subject": None}]},
    {"@type": "vgi_rpc.ResourceInfo", "owner": 5},
    {"@type": "vgi_rpc.Help", "links": [{"url": "u"}]},
    {"@type": "vgi_rpc.LocalizedMessage", "locale": "de"},
    {"@type": "vgi_rpc.LocalizedMessage", "locale": "de", "message": 1},
]


@pytest.mark.parametrize("obj", MALFORMED, ids=str)
def test_malformed_known_details(obj: dict[str, Any]) -> None:
    cls = getattr(core, obj["@type"].removeprefix("vgi_rpc."))
    with pytest.raises(ValueError):
        cls.from_json(obj)
    assert core.parse_error_detail(obj) is None
    assert core.encode_error_details([obj]) is None
    with pytest.raises(ValueError):
        core.StatusError("m", code="INTERNAL", details=[obj])
    assert core.RpcError("E", "m", error_details=[obj]).details() == []


@pytest.mark.parametrize("obj", [None, 1, "x", [], {}, {"@type": 1}, {"@type": "app.Mine"}, {"@type": "vgi_rpc.No"}])
def test_parse_of_unknown_objects_is_none(obj: object) -> None:
    assert core.parse_error_detail(obj) is None


@pytest.mark.parametrize("obj", [None, 1, [], {}, {"@type": "vgi_rpc.Help"}])
def test_from_json_refuses_other_types(obj: object) -> None:
    with pytest.raises(ValueError):
        core.RetryInfo.from_json(obj)


RULE_BREAKERS: list[tuple[list[Any], str]] = [
    ([{}], "@type"),
    ([{"a": 1}], "@type"),
    ([{"@type": 3}], "@type"),
    ([{"@type": ""}], "@type"),
    ([{"@type": "Unqualified"}], "@type"),
    ([{"@type": ".x"}], "@type"),
    ([{"@type": "x."}], "@type"),
    ([{"@type": "a..b"}], "@type"),
    ([{"@type": "a.1"}], "@type"),
    ([{"@type": "a b.c"}], "@type"),
    ([{"@type": "app.Mine"}, {"@type": "app.Mine"}], "two"),
    ([core.RetryInfo(1), core.RetryInfo(2)], "two"),
    ([core.RetryInfo(1), {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 1}], "two"),
    ([{"@type": "vgi_rpc.Mine"}], "reserved"),
]


@pytest.mark.parametrize(("details", "text"), RULE_BREAKERS, ids=str)
def test_details_that_break_a_rule(details: list[Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        core.StatusError("m", code=core.Code.INTERNAL, details=details)
    assert core.encode_error_details(details) is None


def test_encode_is_compact_utf8_and_ordered() -> None:
    text = core.encode_error_details([core.LocalizedMessage("de", "\u00fc"), {"@type": "app.Mine", "n": [1, None]}])
    assert text == (
        '[{"@type":"vgi_rpc.LocalizedMessage","locale":"de","message":"\u00fc"},{"@type":"app.Mine","n":[1,null]}]'
    )


@pytest.mark.parametrize("details", [[], (), iter(())])
def test_encode_of_nothing_is_none(details: Any) -> None:
    assert core.encode_error_details(details) is None


@pytest.mark.parametrize(
    "details", [[{"@type": "app.X", "v": math.nan}], [{"@type": "app.X", "v": object()}], [3], [None], 5, ["abc"]]
)
def test_encode_of_what_is_not_json_is_none(details: Any) -> None:
    assert core.encode_error_details(details) is None


@pytest.mark.parametrize(("letter", "size"), [("x", 1), ("\u00fc", 2), ("\U0001f600", 4)])
def test_encode_limit_counts_utf8_bytes(letter: str, size: int) -> None:
    frame = len('[{"@type":"app.X","v":""}]')
    fits = letter * ((4096 - frame) // size) + "x" * ((4096 - frame) % size)
    exact = core.encode_error_details([{"@type": "app.X", "v": fits}])
    assert exact is not None
    assert len(exact.encode()) == 4096
    assert core.encode_error_details([{"@type": "app.X", "v": fits + "x"}]) is None


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, []),
        ("", []),
        (b"", []),
        ("nonsense", []),
        (b"\xff\xfe\xfd", []),
        ("{}", []),
        ('"x"', []),
        ("null", []),
        ("[1, null, [], {}]", []),
        ('[{"@type": 1}]', []),
        ("[" * 100_000, []),
        ('[{"@type": "app.X", "v": 1}, 7]', [{"@type": "app.X", "v": 1}]),
        (b'[{"@type":"vgi_rpc.Future"}]', [{"@type": "vgi_rpc.Future"}]),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_decode_is_tolerant(raw: Any, expected: list[Any]) -> None:
    assert core.decode_error_details(raw) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["metadata", "retry_delay_seconds", "field_violations", "violations", "links", "field", "url", "type"]
            )
            | st.text(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
TYPES = [f"vgi_rpc.{name}" for name in dict.fromkeys(row[0] for row in DETAILS)]


@settings(database=None, deadline=None)
@given(JSON, st.sampled_from([*TYPES, "vgi_rpc.Future", "app.X"]))
def test_parse_and_encode_take_any_json(obj: Any, name: str) -> None:
    if isinstance(obj, dict):
        obj["@type"] = name
    parsed = core.parse_error_detail(obj)
    assert parsed is None or name == parsed.TYPE
    text = core.encode_error_details([obj])
    assert text is None or [found["@type"] for found in core.decode_error_details(text)] == [name]
    assert core.RpcError("E", "m", error_details=[{"@type": name, "v": obj}]).error_details


@settings(database=None, deadline=None)
@given(st.binary() | st.text() | JSON.map(json.dumps))
def test_decode_takes_any_bytes(raw: Any) -> None:
    assert all(isinstance(obj["@type"], str) for obj in core.decode_error_details(raw))


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32"])
def test_details_are_utf8_only(coding: str) -> None:
    assert core.decode_error_details('[{"@type":"app.X"}]'.encode(coding)) == []


def test_encode_then_decode() -> None:
    details = [core.RetryInfo(5), {"@type": "app.Mine", "deep": {"a": [1, 2.5, "x"]}}]
    assert core.decode_error_details(core.encode_error_details(details)) == [details[0].to_json(), details[1]]


RETRY = {"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 1}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("details", [[], [RETRY], [{"@type": "app.X"}]])
def test_retry_rule(name: str, details: list[dict[str, Any]]) -> None:
    expected = name == "UNAVAILABLE" or (name == "RESOURCE_EXHAUSTED" and details == [RETRY])
    assert core.is_retryable(name, details) is expected
    assert core.is_retryable(core.Code[name], details) is expected
    assert core.RpcError("E", "m", error_code=name, error_details=details).is_retryable() is expected


# ---- reading exceptions


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Hostile(Exception):
    @property
    def error_code(self) -> Any:
        raise RuntimeError("code")

    @property
    def error_kind(self) -> Any:
        raise RuntimeError("kind")

    @property
    def error_details(self) -> Any:
        raise RuntimeError("details")


class UnprintableCode(Exception):
    error_code = Unprintable()
    error_kind = Unprintable()
    error_details = Unprintable()


class Declaring(Exception):
    error_code = core.Code.NOT_FOUND
    error_kind = "gone"
    error_details = (core.RetryInfo(1), {"@type": "app.X"})


class Odd(Exception):
    error_code = 5
    error_kind = 7
    error_details = 9


@pytest.mark.parametrize(
    ("exc", "code", "kind", "details"),
    [
        (ValueError("x"), "UNKNOWN", None, []),
        (Declaring(), "NOT_FOUND", "gone", [RETRY, {"@type": "app.X"}]),
        (Hostile(), "UNKNOWN", None, []),
        (Odd(), "UNKNOWN", None, []),
        (UnprintableCode(), "UNKNOWN", None, []),
        (KeyboardInterrupt(), "UNKNOWN", None, []),
        (core.StatusError("m", code="ABORTED", kind="k", details=[RETRY]), "ABORTED", "k", [RETRY]),
        (core.StatusError("m", code=core.Code.ABORTED, kind=""), "ABORTED", None, []),
    ],
)
def test_what_an_exception_declares(exc: BaseException, code: str, kind: str | None, details: list[Any]) -> None:
    assert core.error_code_of(exc) is core.Code[code]
    assert core.error_kind_of(exc) == kind
    assert core.error_details_of(exc) == details


@pytest.mark.parametrize("details", [[{"@type": "bad"}], [RETRY, RETRY], [3], "text"])
def test_declared_details_that_break_a_rule_are_dropped_whole(details: Any) -> None:
    exc = ValueError("x")
    exc.error_details = details  # type: ignore[attr-defined]
    assert core.error_details_of(exc) == []


def test_code_parse_never_asks_a_foreign_object_for_its_text() -> None:
    assert core.Code.parse(Unprintable()) is core.Code.UNKNOWN


def test_exception_str() -> None:
    assert core.exception_str(ValueError("text")) == "text"
    assert core.exception_str(ValueError()) == ""
    assert core.exception_str(Unprintable()) == "<exception str() failed>"


@pytest.mark.parametrize("code", ["", "unknown", "NOPE", None, 3])
def test_status_error_refuses_unknown_codes(code: Any) -> None:
    with pytest.raises(ValueError):
        core.StatusError("m", code=code)


@pytest.mark.parametrize(
    ("make", "base", "code", "kind"),
    [
        (lambda: core.MethodNotImplementedError("m"), AttributeError, "UNIMPLEMENTED", "method_not_implemented"),
        (lambda: core.ProtocolError("m"), ValueError, "UNKNOWN", None),
        (
            lambda: core.ProtocolNotSpecifiedError("m"),
            core.ProtocolError,
            "INVALID_ARGUMENT",
            "protocol_not_specified",
        ),
        (lambda: core.ProtocolNotSupportedError("m"), core.ProtocolError, "UNIMPLEMENTED", "protocol_not_supported"),
        (lambda: core.VersionError("m"), Exception, "UNKNOWN", None),
        (
            lambda: core.ProtocolVersionError("m"),
            core.VersionError,
            "FAILED_PRECONDITION",
            "protocol_version_mismatch",
        ),
        (lambda: core.SessionLostError("m"), Exception, "ABORTED", "session_lost"),
        (lambda: core.ServerDrainingError("m"), Exception, "UNAVAILABLE", "server_draining"),
        (lambda: core.AuthUnavailableError("m"), Exception, "UNAVAILABLE", None),
        (lambda: core.IPCError("m"), Exception, "UNKNOWN", None),
    ],
)
def test_error_table_of_the_wire(make: Any, base: type, code: str, kind: str | None) -> None:
    error = make()
    assert isinstance(error, base)
    assert str(error) == "m"
    assert core.error_code_of(error) is core.Code[code]
    assert core.error_kind_of(error) == kind


def test_auth_unavailable_is_not_a_value_error() -> None:
    assert not issubclass(core.AuthUnavailableError, ValueError)
    assert core.error_details_of(core.AuthUnavailableError()) == [core.RetryInfo(5).to_json()]
    assert core.error_details_of(core.AuthUnavailableError(retry_after=9)) == [core.RetryInfo(9).to_json()]


def test_draining_carries_a_retry_hint() -> None:
    error = core.ServerDrainingError(retry_after=2.5)
    assert error.retry_after == 2.5
    assert core.error_details_of(error) == [core.RetryInfo(2.5).to_json()]
    assert core.error_details_of(core.ServerDrainingError()) == [core.RetryInfo(1).to_json()]


def test_protocol_version_error_says_what_is_required() -> None:
    error = core.ProtocolVersionError("m", protocol="app.P", client_version="1.0.0", server_version="2.1.0")
    assert (error.protocol, error.client_version, error.server_version) == ("app.P", "1.0.0", "2.1.0")
    [detail] = core.error_details_of(error)
    assert detail["@type"] == "vgi_rpc.PreconditionFailure"
    [violation] = detail["violations"]
    assert violation["subject"] == "app.P"
    assert "1.0.0" in violation["description"]
    assert "2.1.0" in violation["description"]


# ---- the family a caller sees


FAMILY: list[tuple[Any, type, str, str, str]] = [
    (lambda: core.RpcError("ValueError", "boom"), Exception, "ValueError", "boom", "answered"),
    (lambda: core.RpcArgumentError("boom"), TypeError, "TypeError", "boom", "no"),
    (lambda: core.DeadlineExceededError("boom"), TimeoutError, "DeadlineExceededError", "boom", "maybe"),
    (lambda: core.ConnectionLostError("boom"), ConnectionError, "TransportError", "boom", "maybe"),
    (lambda: core.ConnectionLostError("boom", sent="no"), ConnectionError, "TransportError", "boom", "no"),
    (lambda: core.WorkerDiedError("boom"), core.ConnectionLostError, "TransportError", "boom", "maybe"),
    (lambda: core.WrongProcessError("boom"), RuntimeError, "WrongProcessError", "boom", "no"),
]


@pytest.mark.parametrize(("make", "base", "error_type", "message", "sent"), FAMILY)
def test_family(make: Any, base: type, error_type: str, message: str, sent: str) -> None:
    error = make()
    assert isinstance(error, core.RpcError)
    assert isinstance(error, base)
    assert (error.error_type, error.error_message, error.sent) == (error_type, message, sent)
    assert str(error) == (message if type(error).__name__ == error_type else f"{error_type}: {message}")
    assert (error.request_id, error.error_kind, error.error_details, error.remote_traceback) == ("", "", [], "")


def test_deadline_has_its_code() -> None:
    assert core.DeadlineExceededError("x").code is core.Code.DEADLINE_EXCEEDED
    assert core.ConnectionLostError("x").code is core.Code.UNKNOWN


def test_unknown_code_text_is_kept_and_parsed_as_unknown() -> None:
    error = core.RpcError("E", "m", error_code="FUTURE")
    assert error.error_code == "FUTURE"
    assert error.code is core.Code.UNKNOWN


def test_remote_traceback_is_a_note() -> None:
    error = core.RpcError("E", "m", "Traceback ...\nE: m\n\n")
    assert error.remote_traceback == "Traceback ...\nE: m\n\n"
    assert error.__notes__ == ["Remote traceback:\nTraceback ...\nE: m"]
    assert not hasattr(core.RpcError("E", "m"), "__notes__")


def test_remote_traceback_may_be_left_out() -> None:
    assert core.RpcError("E", "m").remote_traceback == ""


ACCESSORS = {
    "error_info": core.ErrorInfo({"a": "b"}),
    "retry_info": core.RetryInfo(1),
    "bad_request": core.BadRequest([core.FieldViolation("f")]),
    "precondition_failure": core.PreconditionFailure([core.PreconditionViolation("t")]),
    "quota_failure": core.QuotaFailure([core.QuotaViolation("s")]),
    "resource_info": core.ResourceInfo("t", "n"),
    "help": core.Help([core.HelpLink("d", "u")]),
    "localized_message": core.LocalizedMessage("en", "m"),
}


@pytest.mark.parametrize("name", ACCESSORS)
def test_detail_accessors(name: str) -> None:
    mixed = [{"@type": "app.X"}, *(detail.to_json() for detail in ACCESSORS.values())]
    error = core.RpcError("E", "m", error_details=mixed)
    assert getattr(error, name)() == ACCESSORS[name]
    assert error.details() == list(ACCESSORS.values())
    assert getattr(core.RpcError("E", "m"), name)() is None


def test_death_certificate_is_a_note() -> None:
    error = core.WorkerDiedError(
        "worker died", command=("python", "w.py"), pid=42, returncode=-9, lifetime=1.25, stderr_tail=("one", "two")
    )
    assert error.command == ("python", "w.py")
    assert (error.pid, error.returncode, error.lifetime, error.stderr_tail) == (42, -9, 1.25, ("one", "two"))
    [note] = error.__notes__
    for part in ("python w.py", "42", "1.25 s", "\n  | one\n  | two"):
        assert part in note
    assert "(nothing)" in core.WorkerDiedError("x").__notes__[0]


# ---- pickling


PICKLED: list[Any] = [
    lambda: core.IPCError("m"),
    lambda: core.RpcError("E", "m"),
    lambda: core.RpcError(
        "E",
        "m",
        "tb",
        request_id="r",
        error_code="ABORTED",
        error_kind="k",
        error_details=[RETRY],
        sent="maybe",
    ),
    lambda: core.RpcArgumentError("m"),
    lambda: core.DeadlineExceededError("m", sent="no"),
    lambda: core.ConnectionLostError("m", sent="answered"),
    lambda: core.WorkerDiedError("m", command=("a", "b"), pid=3, returncode=1, lifetime=2.0, stderr_tail=("x",)),
    lambda: core.WrongProcessError("m"),
    lambda: core.ExternalLocationError("m", error_type="X", error_code=core.Code.NOT_FOUND, sent="no"),
    lambda: core.StatusError("m", code="ABORTED", kind="k", details=[core.RetryInfo(1), {"@type": "app.X"}]),
    lambda: core.VersionError("m"),
    lambda: core.ProtocolVersionError("m", protocol="p", client_version="1", server_version="2"),
    lambda: core.MethodNotImplementedError("m"),
    lambda: core.ProtocolError("m"),
    lambda: core.ProtocolNotSpecifiedError("m"),
    lambda: core.ProtocolNotSupportedError("m"),
    lambda: core.SessionLostError("m"),
    lambda: core.ServerDrainingError("m", retry_after=7.5),
    lambda: core.AuthUnavailableError("m", retry_after=8),
    lambda: core.UnsupportedArrowTypeError("m"),
    lambda: core.ReflectionNotSupportedError("E", "m"),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("make", PICKLED, ids=lambda make: type(make()).__name__)
def test_errors_pickle_with_all_they_carry(make: Any, protocol: int) -> None:
    error = make()
    error.add_note("another note")
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.args == error.args
    assert vars(twin) == vars(error)
    assert twin.__notes__ == error.__notes__
    assert twin.__notes__[-1] == "another note"
    assert core.error_details_of(twin) == core.error_details_of(error)


@pytest.mark.parametrize("make", PICKLED, ids=lambda make: type(make()).__name__)
def test_errors_copy_and_can_be_raised_again(make: Any) -> None:
    twin = copy.copy(make())
    with pytest.raises(type(twin)) as caught:
        raise twin
    assert str(caught.value) == str(make())


def test_pickled_table_is_complete() -> None:
    classes = {
        value
        for value in vars(core).values()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == core.__name__
    }
    public = {cls for cls in classes if not cls.__name__.startswith("_")}
    assert public - {type(make()) for make in PICKLED} == set()


# ---- foreign errors


@pytest.mark.parametrize(
    ("exc", "cls", "text"),
    [
        (TimeoutError("slow"), "DeadlineExceededError", "add() did not finish in time: slow"),
        (BrokenPipeError(32, "Broken pipe"), "ConnectionLostError", "Transport failed during add(): "),
        (EOFError(), "ConnectionLostError", "Transport failed during add(): EOFError"),
        (core.pa.ArrowInvalid("bad"), "ConnectionLostError", "Transport failed during add(): bad"),
        (core.IPCError("broken"), "ConnectionLostError", "Transport failed during add(): broken"),
        (ValueError("v"), "ConnectionLostError", "Transport failed during add(): v"),
        (KeyboardInterrupt(), "ConnectionLostError", "Transport failed during add(): KeyboardInterrupt"),
        (Unprintable(), "ConnectionLostError", "Transport failed during add(): <exception str() failed>"),
    ],
)
@pytest.mark.parametrize("sent", ["no", "maybe", "answered"])
def test_foreign_errors_are_translated(exc: Exception, cls: str, text: str, sent: str) -> None:
    found = core._errors_translate(exc, "add()", sent)
    assert type(found) is getattr(core, cls)
    assert text in str(found)
    assert found.sent == sent
    assert found.__cause__ is exc


@pytest.mark.parametrize("make", [row[0] for row in FAMILY])
def test_our_own_errors_pass_untouched(make: Any) -> None:
    error = make()
    assert core._errors_translate(error, "add()", "maybe") is error
    assert error.__cause__ is None
