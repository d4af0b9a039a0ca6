"""Calls with JSON: records, enums, tables and streams; the status of a failure; the OpenAPI document."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import Enum
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol

import pyarrow as pa
import pytest

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras.http_service import extra

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core

lazy: Any = core


class Unit(Enum):
    CELSIUS = "c"
    KELVIN = "k"


@dataclass
class Place(core.ArrowSerializableDataclass):
    """Where it is."""

    name: str
    unit: Unit = Unit.CELSIUS
    height: float | None = None


@dataclass
class Station(core.ArrowSerializableDataclass):
    place: Place
    built: date
    others: list[Place] = field(default_factory=list)
    note: str = "none"


READINGS = pa.schema([pa.field("n", pa.int64()), pa.field("at", pa.timestamp("us", "UTC"))])


@dataclass
class Reading(core.ProducerState):
    n: int
    end: int
    cancelled: ClassVar[list[int]] = []

    def produce(self, out: Any, ctx: Any) -> None:
        if self.n >= self.end:
            out.finish()
            return
        if self.n == 13:
            raise core.StatusError("bad luck", code=core.Code.DATA_LOSS)
        out.client_log(core.Level.INFO, f"at {self.n}")
        out.emit_pydict({"n": [self.n, self.n], "at": [datetime(2026, 1, 1, tzinfo=UTC)] * 2})
        self.n += 1

    def on_cancel(self, ctx: Any) -> None:
        Reading.cancelled.append(self.n)


@dataclass
class Scale(core.ExchangeState):
    by: int
    cancelled: ClassVar[list[int]] = []

    def exchange(self, input: Any, out: Any, ctx: Any) -> None:
        out.emit_pydict({"x": [self.by * n for n in input.batch.column("n").to_pylist()]})

    def on_cancel(self, ctx: Any) -> None:
        Scale.cancelled.append(self.by)


class Weather(Protocol):
    """Stations & what they <b>measure</b>.

    Two paragraphs.
    """

    def echo(self, station: Station) -> Station: ...
    def all(self, stations: list[Station], by_name: dict[str, Place]) -> list[Station]: ...
    def maybe(self, place: Place | None = None, unit: Unit = Unit.KELVIN) -> Place | None: ...
    def rows(self, table: pa.RecordBatch) -> pa.RecordBatch: ...
    def shape(self) -> pa.Schema: ...
    def raw(self, data: bytes) -> bytes: ...
    def odd(self, since: timedelta = timedelta(hours=1)) -> list[float]: ...
    def sum(self, values: Annotated[list[int], core.ArrowType(pa.list_(pa.int32()))]) -> int: ...
    def fail(self, code: str) -> None: ...
    def readings(self, end: int) -> core.Stream[core.ProducerState, Place]: ...
    def broken(self) -> core.Stream[core.ProducerState]: ...
    def scale(self, by: int) -> core.Stream[core.ExchangeState]: ...


class WeatherImpl:
    def echo(self, station: Station) -> Station:
        assert isinstance(station.place.unit, Unit)
        return station

    def all(self, stations: list[Station], by_name: dict[str, Place]) -> list[Station]:
        assert all(isinstance(place.unit, Unit) for place in by_name.values())
        return stations

    def maybe(self, place: Place | None = None, unit: Unit = Unit.KELVIN) -> Place | None:
        return place and Place(place.name, unit)

    def rows(self, table: pa.RecordBatch) -> pa.RecordBatch:
        return table

    def shape(self) -> pa.Schema:
        return READINGS

    def raw(self, data: bytes) -> bytes:
        return data

    def odd(self, since: timedelta = timedelta(hours=1)) -> list[float]:
        return [math.nan, math.inf, -math.inf, since.total_seconds()]

    def sum(self, values: list[int]) -> int:
        return sum(values)

    def fail(self, code: str, ctx: Any) -> None:
        ctx.client_log(core.Level.WARN, "it will fail")
        details = [core.RetryInfo(3)] if code == "UNAVAILABLE" else []
        raise core.StatusError("on purpose", code=core.Code(code), details=details)

    def readings(self, end: int) -> core.Stream[Reading, Place]:
        return core.Stream(READINGS, Reading(0, end), header=Place("Bonn"))

    def broken(self) -> core.Stream[Reading]:
        raise core.StatusError("not yet", code=core.Code.FAILED_PRECONDITION)

    def scale(self, by: int) -> core.Stream[Scale]:
        return core.Stream(pa.schema([("x", pa.int64())]), Scale(by), pa.schema([("n", pa.int64())]))


def make_server() -> Any:
    return core.RpcServer(Weather, WeatherImpl(), enable_describe=True)


@pytest.fixture(scope="module")
def client() -> Any:
    return lazy.make_sync_client(make_server())


def ask(client: Any, method: str, /, **args: Any) -> Any:
    """The answer of a call that names its method in the path."""
    path = f"{client.prefix}/__call__/Weather/{method}"
    answer = client.post(path, content=json.dumps(args).encode(), headers={"Content-Type": "application/json"})
    return SimpleNamespace(status=answer.status_code, headers=answer.headers, found=json.loads(answer.content))


def ask_stream(client: Any, method: str, args: dict[str, Any], **more: Any) -> Any:
    asked = {"protocol": "Weather", "method": method, "args": args, **more}
    headers = {"Content-Type": "application/json"}
    answer = client.post(f"{client.prefix}/__call__", content=json.dumps(asked).encode(), headers=headers)
    return SimpleNamespace(status=answer.status_code, headers=answer.headers, found=json.loads(answer.content))


# ---- values

BONN = {"name": "Bonn", "unit": "CELSIUS", "height": 60.0}
STATION = {"place": BONN, "built": "2001-02-03", "others": [{**BONN, "unit": "KELVIN"}], "note": "x"}


def test_records_are_objects(client: Any) -> None:
    assert ask(client, "echo", station=STATION).found == {"result": STATION}
    short = {"place": {"name": "Ulm"}, "built": "2001-02-03"}
    ulm = {"name": "Ulm", "unit": "CELSIUS", "height": None}
    full = {"place": ulm, "built": "2001-02-03", "others": [], "note": "none"}
    assert ask(client, "echo", station=short).found == {"result": full}
    deep = ask(client, "all", stations=[{**short, "others": [{"name": "Ulm"}]}], by_name={"u": {"name": "Ulm"}})
    assert deep.found == {"result": [{**full, "others": [ulm]}]}
    assert ask(client, "maybe").found == {"result": None}
    assert ask(client, "maybe", place={"name": "Rom"}).found == {"result": {**ulm, "name": "Rom", "unit": "KELVIN"}}
    assert ask(client, "maybe", place=BONN, unit="CELSIUS").found == {"result": {**BONN, "height": None}}


@pytest.mark.parametrize(
    ("method", "args", "text"),
    [
        ("echo", {"station": {"place": BONN}}, "'station' is not a valid Station: missing field built"),
        ("echo", {"station": {**STATION, "colour": 1}}, "unknown field colour; it has place, built, others, note"),
        (
            "echo",
            {"station": {**STATION, "place": {"name": "x", "z": 1}}},
            "unknown field z; it has name, unit, height",
        ),
        ("echo", {"station": {**STATION, "built": "soon"}}, "'station' is not a valid Station: 'built'"),
        ("echo", {"station": [1]}, "'station' is not a valid Station: a JSON array is none"),
        ("echo", {"station": "no base64!"}, "'station'"),
        ("echo", {}, "station"),
        ("raw", {"data": {"a": 1}}, "'data' is not a valid bytes: a JSON object is none"),
        ("rows", {"table": {"a": 1}}, "'table' is not a valid RecordBatch"),
        ("rows", {"table": [1, 2]}, "'table' is not a valid RecordBatch"),
        ("maybe", {"unit": "BOILING"}, "BOILING"),
        ("maybe", {"place": {"name": "x", "unit": "BOILING"}}, "BOILING"),
        ("sum", {"values": [1, "x"]}, "'values'"),
        ("sum", {"values": [1 << 40]}, "'values'"),
    ],
)
def test_what_does_not_fit_is_named(client: Any, method: str, args: dict[str, Any], text: str) -> None:
    answer = ask(client, method, **args)
    assert (answer.status, answer.found["error"]["code"]) == (400, "INVALID_ARGUMENT")
    assert text in answer.found["error"]["message"]


def test_tables_are_rows_and_odd_numbers_are_texts(client: Any) -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    assert ask(client, "rows", table=rows).found == {"result": rows}
    assert ask(client, "shape").found["result"][1] == {"name": "at", "type": "timestamp[us, tz=UTC]"}
    assert ask(client, "raw", data="eHg=").found == {"result": "eHg="}
    assert ask(client, "odd").found == {"result": ["NaN", "Infinity", "-Infinity", 3600.0]}
    assert ask(client, "odd", since="PT2S").found["result"][3] == 2.0
    assert ask(client, "sum", values=[1, 2]).found == {"result": 3}


# ---- failures

STATUS = {
    **{"CANCELLED": 499, "UNKNOWN": 500, "INVALID_ARGUMENT": 400, "DEADLINE_EXCEEDED": 504, "NOT_FOUND": 404},
    **{"ALREADY_EXISTS": 409, "PERMISSION_DENIED": 403, "UNAUTHENTICATED": 401, "RESOURCE_EXHAUSTED": 429},
    **{"FAILED_PRECONDITION": 400, "ABORTED": 409, "OUT_OF_RANGE": 400, "UNIMPLEMENTED": 501, "INTERNAL": 500},
    **{"UNAVAILABLE": 503, "DATA_LOSS": 500},
}


def test_a_failure_has_the_status_of_its_code(client: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert set(STATUS) == set(core.Code.__members__)
    caplog.set_level(logging.INFO, "vgi_rpc.access")
    for code, status in STATUS.items():
        caplog.clear()
        answer = ask(client, "fail", code=code)
        assert (answer.status, answer.found["error"]["code"]) == (status, code)
        assert answer.found["error"]["message"] == "StatusError: on purpose"
        assert answer.found["logs"] == [{"level": "WARN", "message": "it will fail"}]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert ("WWW-Authenticate" in answer.headers) is (status == 401)
        [record] = [r for r in caplog.records if r.name == "vgi_rpc.access"]
        assert record.__dict__["http_status"] == status
    details = ask(client, "fail", code="UNAVAILABLE").found["error"]["details"]
    assert details == [{"@type": "vgi_rpc.RetryInfo", "retry_delay_seconds": 3}]


def test_what_is_no_call(client: Any) -> None:
    for path, status in (("/Weather/nope", 404), ("/Other/echo", 404), ("/vgi_rpc.%52eflection/x", 400)):
        answer = client.post(f"/__call__{path}", content=b"{}", headers={"Content-Type": "application/json"})
        assert answer.status_code == status and "message" in json.loads(answer.content)["error"], path
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/__call__/Weather/echo").status_code == 405
    for body in (b"[1]", b"null", b"{", b"\xff", b"[" * 100_000):
        answer = client.post("/__call__/Weather/sum", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (400, "INVALID_ARGUMENT")
    for body in (b'\xef\xbb\xbf{"values": [1]}', '{"values": [1]}'.encode("utf-16")):  # RFC 8259 section 8.1
        answer = client.post("/__call__/Weather/sum", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, json.loads(answer.content)["error"]["code"]) == (400, "INVALID_ARGUMENT")
    kind = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert client.post("/__call__/Weather/odd", content=b"", headers=kind).status_code == 200


HALF = "\ud800"
CALL = {"protocol": "Weather", "method": "maybe", "args": {"place": {"name": "x"}}}


@pytest.mark.parametrize(
    "asked",
    [
        {**CALL, "protocol": HALF},
        {**CALL, "method": f"may{HALF}be"},
        {**CALL, "args": {"\udfff": 1}},
        {**CALL, "args": {"place": {"name": f"x{HALF}"}}},
        {**CALL, "args": {"place": {HALF: 1}}},
        {**CALL, "args": {"place": {"name": "\udc00\ud800"}}},
        {**CALL, "method": "readings", "args": {"end": 1}, "rows": HALF},
        {**CALL, "method": "scale", "args": {"by": 1}, "input": [{HALF: 1}]},
        {**CALL, HALF: 1},
    ],
)
@pytest.mark.parametrize("in_bytes", [False, True])
def test_half_of_a_surrogate_pair_is_no_text(client: Any, asked: dict[str, Any], in_bytes: bool) -> None:
    body = json.dumps(asked, ensure_ascii=not in_bytes).encode("utf-8", "surrogatepass")
    answer = client.post("/__call__", content=body, headers={"Content-Type": "application/json"})
    error = json.loads(answer.content)["error"]
    assert (answer.status_code, error["code"]) == (400, "INVALID_ARGUMENT")
    assert error["message"].isprintable()
    assert ("not JSON" if in_bytes else "half of a surrogate pair") in error["message"]
    if not in_bytes:  # nor where the path names the method
        body = json.dumps(asked["args"] if asked == {**CALL, "args": asked["args"]} else {"x": HALF}).encode()
        answer = client.post("/__call__/Weather/maybe", content=body, headers={"Content-Type": "application/json"})
        assert "half of a surrogate pair" in json.loads(answer.content)["error"]["message"]


def test_pairs_and_what_only_looks_like_a_half_are_texts(client: Any) -> None:
    for name in ("\U0001f600", "\\ud800", "\ud7ff\ue000"):
        found = ask(client, "maybe", place={"name": name}).found
        assert found["result"]["name"] == name


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\u202eright", "\x00"])
def test_refusals_are_printable(client: Any, name: str) -> None:
    for asked in ({**CALL, "protocol": name}, {**CALL, "method": name}, {**CALL, "args": {name: 1}}, {"rows": name}):
        body = json.dumps(asked).encode()
        answer = client.post("/__call__", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 404) and json.loads(answer.content)["error"]["message"].isprintable()


def key_of_header(req: Any) -> Any:
    if req.get_header("X-API-Key") != "s3cret":
        raise ValueError("no key")
    return core.AuthContext("key", True, "alice")


# ---- streams


def test_the_first_rows_of_a_producer(client: Any) -> None:
    Reading.cancelled.clear()
    at = "2026-01-01T00:00:00+00:00"
    found = ask_stream(client, "readings", {"end": 2}).found
    assert found["rows"] == [{"n": n, "at": at} for n in (0, 0, 1, 1)]
    assert found["columns"] == [{"name": "n", "type": "int64"}, {"name": "at", "type": "timestamp[us, tz=UTC]"}]
    assert found["header"] == {"name": "Bonn", "unit": "CELSIUS", "height": None}
    assert "more" not in found and len(found["logs"]) == 2 and not Reading.cancelled
    for rows, turns in ((1, 1), (2, 1), (3, 2)):
        found = ask_stream(client, "readings", {"end": 9}, rows=rows).found
        assert (len(found["rows"]), found["more"]) == (rows, True)
        assert Reading.cancelled == [turns]
        Reading.cancelled.clear()
    answer = client.post(
        "/__call__/Weather/readings?rows=2", content=b'{"end": 9}', headers={"Content-Type": "application/json"}
    )
    assert len(json.loads(answer.content)["rows"]) == 2
    assert ask(client, "readings", end=0).found["rows"] == []


def test_a_producer_that_fails_shows_what_came_before(client: Any) -> None:
    answer = ask(client, "readings", end=20)
    assert (answer.status, answer.found["error"]["code"]) == (500, "DATA_LOSS")
    assert len(answer.found["rows"]) == 26 and "more" not in answer.found
    answer = ask(client, "broken")
    assert (answer.status, answer.found) == (
        400,
        {"error": {"code": "FAILED_PRECONDITION", "message": "StatusError: not yet"}},
    )


def test_a_producer_without_end_or_rows_is_left(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra("json_calls"), "_STREAM_SECONDS", 0.0)
    Reading.cancelled.clear()
    found = ask_stream(client, "readings", {"end": 1 << 40}, rows=1000).found
    assert (len(found["rows"]), found["more"], Reading.cancelled) == (2, True, [1])


def test_an_exchange_answers_one_input(client: Any) -> None:
    Scale.cancelled.clear()
    found = ask_stream(client, "scale", {"by": 3}, input=[{"n": 1}, {"n": 2}]).found
    assert found["rows"] == [{"x": 3}, {"x": 6}]
    assert found["input_columns"] == [{"name": "n", "type": "int64"}]
    found = ask_stream(client, "scale", {"by": 4}).found
    assert (found["rows"], found["columns"]) == ([], [{"name": "x", "type": "int64"}])
    for wrong, text in (({"m": 1}, "unknown: m"), ({"n": "x"}, "'n' is not a valid int64")):
        answer = ask_stream(client, "scale", {"by": 5}, input=[wrong])
        assert answer.status == 400 and text in answer.found["error"]["message"]
    assert Scale.cancelled == [3, 4, 5, 5]  # nobody can go on with it
    assert ask_stream(client, "scale", {"by": 5}, input=[{"n": None}]).status == 500


@pytest.mark.parametrize("rows", [0, -1, 1001, True, "7", 1.5, None, [1]])
def test_how_many_rows_may_be_asked_for(client: Any, rows: Any) -> None:
    answer = ask_stream(client, "readings", {"end": 1}, rows=rows)
    assert answer.status == 400 and '"rows" must be a whole number within 1..1000' in answer.found["error"]["message"]


@pytest.mark.parametrize("given", [1, "x", {"n": 1}, [1], [[1]]])
def test_what_is_no_input(client: Any, given: Any) -> None:
    assert ask_stream(client, "scale", {"by": 1}, input=given).status == 400


def test_the_rows_of_a_stream_are_bounded() -> None:
    client = lazy.make_sync_client(make_server(), max_response_bytes=65_536)
    answer = ask_stream(client, "readings", {"end": 13}, rows=1000)
    assert answer.status == 200
    answer = ask_stream(client, "scale", {"by": 1}, input=[{"n": 10**15}] * 10_000)
    assert (answer.status, answer.found["error"]["code"]) == (429, "RESOURCE_EXHAUSTED")


def test_what_is_kept_elsewhere_is_fetched(store: Any) -> None:
    storage = pytest.importorskip("vgi_rpc_extras.storage")
    config = storage.ServerExternalConfig(store, externalize_threshold_bytes=1000, url_validator=lambda url: None)
    server = core.RpcServer(Weather, WeatherImpl(), enable_describe=True, external_location=config)
    client = lazy.make_sync_client(server)
    data = "A" * 4000
    assert ask(client, "raw", data=data).found == {"result": data}
    assert len(store.things) == 1
    rows = [{"n": n} for n in range(600)]
    assert ask_stream(client, "scale", {"by": 2}, input=rows, rows=600).found["rows"][-1] == {"x": 1198}
    assert len(store.things) == 2
    store.things.clear()
    config = storage.ServerExternalConfig(
        Forgetful(store), externalize_threshold_bytes=1000, url_validator=lambda u: None
    )
    server = core.RpcServer(Weather, WeatherImpl(), enable_describe=True, external_location=config)
    answer = ask(lazy.make_sync_client(server), "raw", data=data)
    assert answer.found["error"]["code"] == "NOT_FOUND" and answer.status == 404
    assert "hunter2" not in json.dumps(answer.found)


class Forgetful:
    """A storage that keeps nothing."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def upload(self, data: bytes, schema: pa.Schema, *, content_encoding: str | None = None) -> str:
        url = str(self._store.upload(data, schema, content_encoding=content_encoding))
        self._store.things.clear()
        return url


# ---- OpenAPI


def resolved(schema: Any, components: Any) -> Any:
    """The schema with its references replaced."""
    if isinstance(schema, list):
        return [resolved(item, components) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return resolved(components[schema["$ref"].removeprefix("#/components/schemas/")], components)
    return {name: resolved(item, components) for name, item in schema.items()}


@pytest.fixture(scope="module")
def document() -> Any:
    client = lazy.make_sync_client(make_server(), prefix="/weather")
    answer = client.get("/weather/openapi.json")
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    return json.loads(answer.content)


def test_openapi_describes_every_method(document: Any) -> None:
    assert document["openapi"] == "3.1.0"
    assert document["info"]["description"].startswith("Stations & what they <b>measure</b>.\n\nTwo paragraphs.")
    assert document["servers"] == [{"url": "/weather"}]
    assert "security" not in document
    named = {f"/__call__/Weather/{name}" for name in core.rpc_methods(Weather)}
    assert set(document["paths"]) == {"/__call__", *named}
    components = document["components"]["schemas"]
    assert set(components) == {"Error", "Place", "Station"}
    place = components["Place"]
    assert place["description"] == "Where it is." and place["required"] == ["name"]
    assert place["properties"]["unit"] == {"type": "string", "enum": ["CELSIUS", "KELVIN"], "default": "CELSIUS"}
    maybe = document["paths"]["/__call__/Weather/maybe"]["post"]
    args = maybe["requestBody"]["content"]["application/json"]["schema"]
    assert args["properties"]["unit"]["default"] == "KELVIN" and "required" not in args
    assert args["properties"]["place"]["anyOf"] == [{"$ref": "#/components/schemas/Place"}, {"type": "null"}]
    assert maybe["requestBody"]["required"] is False
    readings = document["paths"]["/__call__/Weather/readings"]["post"]
    assert readings["parameters"][0]["name"] == "rows"
    for operation in (path["post"] for path in document["paths"].values()):
        assert set(operation) >= {"operationId", "requestBody", "responses"}
        for answer in operation["responses"].values():
            assert answer["description"] and "schema" in answer["content"]["application/json"]
    assert "$ref" not in json.dumps(resolved(document["paths"], components))


def test_openapi_is_valid(document: Any) -> None:
    validator = pytest.importorskip("openapi_spec_validator", reason="openapi-spec-validator is not installed")
    validator.validate(document)
    for headers in ([], ["Authorization"], ["Authorization", "X-API-Key"]):
        found = extra("openapi").document(make_server(), "", headers)
        validator.validate(found)
        assert len(found["security"]) == max(1, len(headers))


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("echo", {"station": STATION}),
        ("all", {"stations": [STATION], "by_name": {"a": BONN}}),
        ("maybe", {}),
        ("maybe", {"place": {"name": "x"}, "unit": "KELVIN"}),
        ("rows", {"table": [{"a": 1}]}),
        ("shape", {}),
        ("sum", {"values": [1]}),
        ("readings", {"end": 1}),
        ("scale", {"by": 1}),
        ("fail", {"code": "ABORTED"}),
    ],
)
def test_calls_keep_to_the_document(client: Any, document: Any, method: str, args: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    operation = document["paths"][f"/__call__/Weather/{method}"]["post"]
    components = document["components"]["schemas"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    checked = jsonschema.Draft202012Validator(resolved(schema, components))
    checked.validate(args)
    assert not checked.is_valid({**args, "surplus": 1})
    answer = ask(client, method, **args)
    responses = operation["responses"]
    schema = responses.get(str(answer.status), responses["default"])["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(resolved(schema, components)).validate(answer.found)


def test_openapi_only_where_the_service_describes_itself() -> None:
    hidden = lazy.make_sync_client(core.RpcServer(Weather, WeatherImpl()))
    assert hidden.get("/openapi.json").status_code == 404
    off = lazy.make_sync_client(make_server(), enable_describe_calls=False)
    assert off.get("/openapi.json").status_code == 404
    guarded = lazy.make_sync_client(make_server(), authenticate=key_of_header)
    assert guarded.get("/openapi.json").status_code == 401
    answer = guarded.get("/openapi.json", headers={"X-API-Key": "s3cret"})
    assert json.loads(answer.content)["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"}
    }


def test_records_of_one_name_stay_apart() -> None:
    def made(*fields: Any) -> Any:
        return dataclass(type("Twin", (core.ArrowSerializableDataclass,), {"__annotations__": dict(fields)}))

    schemas = extra("json_values").Schemas()
    one, two = made(("a", int)), made(("b", str))
    assert schemas.record(one) == schemas.record(one) == {"$ref": "#/components/schemas/Twin"}
    assert schemas.record(two) == {"$ref": "#/components/schemas/Twin2"}
    assert list(schemas.components["Twin2"]["properties"]) == ["b"]


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/json; x=y"])
def test_only_json_is_a_call(client: Any, kind: str) -> None:
    """A form or a page of another site can send the others without being asked first."""
    answer = client.post("/__call__/Weather/sum", content=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == 415
