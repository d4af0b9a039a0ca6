# Needs: pyarrow only. Used by json_calls.py, describe_page.py and openapi.py.
"""What a method's values are in JSON, by annotation and Arrow type: in a request, in an answer, as JSON Schema.

A record is an object, a table a list of rows (the wire has both as Arrow IPC in a binary column); an enum is its
member's name; bytes are base64; times are ISO 8601. Everything else is as `batch_from_json` of the core has it.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from .. import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

_ABSENT = dataclasses.MISSING


def bare(annotation: Any) -> Any:
    """The annotation without `Annotated` and `| None`."""
    while True:
        args = typing.get_args(annotation)
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = args[0]
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            members = [arg for arg in args if arg is not types.NoneType]
            if len(members) != 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def record_of(annotation: Any) -> type[core.ArrowSerializableDataclass] | None:
    """The record class that the annotation names, if it does."""
    kind = bare(annotation)
    return kind if isinstance(kind, type) and issubclass(kind, core.ArrowSerializableDataclass) else None


def members_of(annotation: Any) -> list[str]:
    """The names of the enum's members, if the annotation is an enum."""
    kind = bare(annotation)
    return list(kind.__members__) if isinstance(kind, type) and issubclass(kind, enum.Enum) else []


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The annotations of a container's values: item; key and value; nothing where it is none."""
    found = bare(annotation)
    return typing.get_args(found) if typing.get_origin(found) is not None else ()


def hints_of(record: type) -> dict[str, Any]:
    """The annotations of a record's fields; nothing where they cannot be read."""
    try:
        return typing.get_type_hints(record, include_extras=True)
    except (NameError, TypeError):  # a class that is local to a function
        return {}


def defaults_of(record: type[core.ArrowSerializableDataclass]) -> dict[str, Any]:
    """The fields of a record that may be left out, with what they are then."""
    found = {}
    for field in dataclasses.fields(cast(Any, record)):
        if field.default is not _ABSENT:
            found[field.name] = field.default
        elif field.default_factory is not _ABSENT:
            found[field.name] = field.default_factory()
    return found


def _is_binary(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_binary(dtype) or pa.types.is_large_binary(dtype))


def holds_table(dtype: pa.DataType, annotation: Any) -> bool:
    """Whether it is a table: binary on the wire, and neither bytes nor a record nor a schema."""
    kind = bare(annotation)
    return (
        _is_binary(dtype)
        and isinstance(kind, type)
        and kind not in (bytes, bytearray, pa.Schema)
        and record_of(kind) is None
    )


# ---- a request


def arguments(args: Mapping[str, Any], info: core.RpcMethodInfo) -> pa.RecordBatch:
    """The arguments of a call as its one row; ValueError names what does not fit."""
    given = {
        field.name: _packed(field, args[field.name], info.param_types.get(field.name))
        for field in info.params_schema
        if field.name in args
    }
    return core.batch_from_json({**args, **given}, info.params_schema)


def _packed(field: pa.Field[Any], value: Any, annotation: Any) -> Any:
    try:
        value = _filled(value, annotation)
        if not _is_binary(field.type) or not isinstance(value, dict | list):
            return value
        if isinstance(value, dict) and (record := record_of(annotation)) is not None:
            batch = core.batch_from_json(value, record.ARROW_SCHEMA)
        elif isinstance(value, list) and holds_table(field.type, annotation):
            batch = pa.RecordBatch.from_pylist(value)
        else:
            raise ValueError("a JSON object is none" if isinstance(value, dict) else "a JSON array is none")
    except (ValueError, TypeError, AttributeError, ArithmeticError, pa.ArrowException) as exc:
        raise ValueError(f"{field.name!r} is not a valid {_noun(annotation)}: {exc}") from exc
    return base64.b64encode(core.serialize_record_batch_bytes(batch)).decode()


def _noun(annotation: Any) -> str:
    return str(getattr(bare(annotation), "__name__", annotation))


def _filled(value: Any, annotation: Any) -> Any:
    """The value with the fields that its records leave out, at any depth."""
    parts = parts_of(annotation)
    if isinstance(value, dict) and (record := record_of(annotation)) is not None:
        return _filled_record(value, record)
    if isinstance(value, list) and parts:
        return [_filled(item, parts[0]) for item in value]
    if isinstance(value, dict) and len(parts) == 2:
        return {key: _filled(item, parts[1]) for key, item in value.items()}
    return value


def _filled_record(value: Mapping[str, Any], record: type[core.ArrowSerializableDataclass]) -> dict[str, Any]:
    schema, defaults, hints = record.ARROW_SCHEMA, defaults_of(record), hints_of(record)
    if unknown := value.keys() - set(schema.names):
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}; it has {', '.join(schema.names)}")
    found = {}
    for field in schema:
        if field.name in value:
            found[field.name] = _filled(value[field.name], hints.get(field.name))
        elif field.name in defaults:
            found[field.name] = plain(defaults[field.name], field.type)
        elif field.nullable:
            found[field.name] = None
        else:
            raise ValueError(f"missing field {field.name}")
    return found


# ---- a reply


def result(batch: pa.RecordBatch, info: core.RpcMethodInfo) -> Any:
    """The result of a call, of its one row."""
    if not batch.num_rows or "result" not in batch.schema.names:
        return None
    column = batch.column(batch.schema.get_field_index("result"))
    if _is_binary(column.type) and column[0].is_valid and (found := _unpacked(column[0], info.result_type)) is not None:
        return found
    return core.batch_to_json(batch.select(["result"]))[0]["result"]


def _unpacked(cell: Any, annotation: Any) -> Any:
    """The object or the rows in a binary cell; None when it holds something else."""
    if bare(annotation) is pa.Schema:
        return columns(pa.ipc.read_schema(cell.as_buffer()))
    record = record_of(annotation)
    if record is None and not holds_table(cell.type, annotation):
        return None
    with pa.ipc.open_stream(cell.as_buffer()) as reader:
        found = [row for batch in reader for row in core.batch_to_json(batch)]
    return found if record is None else found[0]


def columns(schema: pa.Schema) -> list[dict[str, str]]:
    """The columns of a schema, for people."""
    return [{"name": field.name, "type": str(field.type)} for field in schema]


def finite(value: Any) -> Any:
    """The value with the numbers that JSON has not as texts: "NaN", "Infinity", "-Infinity" (as in protobuf's JSON)."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def plain(value: Any, dtype: pa.DataType | None = None) -> Any:
    """A default as JSON has it: what a caller would write to say the same."""
    if isinstance(value, enum.Enum):
        return value.name if dtype is None or pa.types.is_dictionary(dtype) else plain(value.value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, datetime.timedelta):
        return core.batch_to_json(pa.RecordBatch.from_pydict({"x": pa.array([value], pa.duration("us"))}))[0]["x"]
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


# ---- JSON Schema


class Schemas:
    """JSON Schemas of types (2020-12, which OpenAPI 3.1 uses); `components` are the records that they refer to."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {}
        self._records: dict[type, str] = {}

    def field(self, field: pa.Field[Any], annotation: Any) -> dict[str, Any]:
        """The schema of a field; of a nullable one it allows null."""
        found = self.value(field.type, annotation)
        return {"anyOf": [found, {"type": "null"}]} if field.nullable else found

    def fields(
        self, schema: pa.Schema, hints: Mapping[str, Any], defaults: Mapping[str, Any], docs: Mapping[str, str]
    ) -> dict[str, Any]:
        """The schema of an object with the fields of an Arrow schema."""
        properties: dict[str, Any] = {}
        for field in schema:
            found = properties[field.name] = self.field(field, hints.get(field.name))
            if field.name in docs:
                found["description"] = docs[field.name]
            if field.name in defaults:
                found["default"] = plain(defaults[field.name], field.type)
        required = [field.name for field in schema if field.name not in defaults and not field.nullable]
        found = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**found, "required": required} if required else found

    def value(self, dtype: pa.DataType, annotation: Any = None) -> dict[str, Any]:
        """The schema of a value of a type."""
        of = pa.types
        if (record := record_of(annotation)) is not None and (of.is_struct(dtype) or _is_binary(dtype)):
            return self.record(record)
        if members := members_of(annotation):
            return {"type": "string", "enum": members}
        if _is_binary(dtype) and bare(annotation) is pa.Schema:
            return {"type": "array", "items": {"type": "object"}}
        if holds_table(dtype, annotation):
            return {"type": "array", "items": {"type": "object"}, "description": "the rows of a table"}
        if of.is_list(dtype) or of.is_large_list(dtype) or of.is_fixed_size_list(dtype):
            items = self.field(dtype.value_field, next(iter(parts_of(annotation)), None))
            return {"type": "array", "items": items}
        if of.is_map(dtype):
            values = self.field(dtype.item_field, next(iter(parts_of(annotation)[1:]), None))
            return {"type": "object", "additionalProperties": values}
        if of.is_struct(dtype):
            return self.fields(pa.schema(list(dtype)), {}, {}, {})
        return self.value(dtype.value_type) if of.is_dictionary(dtype) else _scalar(dtype)

    def record(self, record: type[core.ArrowSerializableDataclass]) -> dict[str, Any]:
        """A reference to the schema of a record, which is then among the components."""
        name = self._records.get(record)
        if name is None:
            name, count = record.__name__, 1
            while name in self.components:  # another class of the same name
                count += 1
                name = f"{record.__name__}{count}"
            self._records[record] = name
            self.components[name] = {}  # its place, while its fields are looked at
            found = self.fields(record.ARROW_SCHEMA, hints_of(record), defaults_of(record), {})
            if text := docstring(record):
                found["description"] = text
            self.components[name] = found
        return {"$ref": f"#/components/schemas/{name}"}


def _scalar(dtype: pa.DataType) -> dict[str, Any]:
    of = pa.types
    if of.is_boolean(dtype):
        return {"type": "boolean"}
    if of.is_integer(dtype):
        return {"type": "integer", "format": str(dtype)}
    if of.is_floating(dtype):
        name = "double" if dtype.bit_width == 64 else "float"
        return {"type": "number", "format": name}
    if of.is_null(dtype):
        return {"type": "null"}
    if _is_binary(dtype) or of.is_fixed_size_binary(dtype):
        return {"type": "string", "contentEncoding": "base64"}
    if of.is_timestamp(dtype):
        return {"type": "string", "description": "ISO 8601"} | ({"format": "date-time"} if dtype.tz else {})
    if of.is_date(dtype):
        return {"type": "string", "format": "date"}
    if of.is_time(dtype):
        return {"type": "string", "description": "ISO 8601 time of day"}
    if of.is_duration(dtype):
        return {"type": "string", "description": "ISO 8601 duration"}
    return {"type": "string"}


def docstring(described: type) -> str:
    """The docstring that a class has itself; not the one that dataclasses makes."""
    text = described.__dict__.get("__doc__") or ""
    return "" if text.startswith(f"{described.__name__}(") else inspect.cleandoc(text)
