# Needs: pyarrow only. Used by server.py.
"""The describe page: what a service offers, and a way to try it (http.md section 13)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from .. import core as _bound_core
from ..common import html
from ..common.html import escaped
from . import json_values

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

_SHOWN_ROWS = 20
_NO_NAMES: Mapping[str, Any] = {}


def describe(server: core.RpcServer, prefix: str, calls: bool, key_headers: Sequence[str] | None) -> html.Page:
    """What the service offers, and, with `calls`, a way to try its methods."""
    shown = [b for name, b in server.bindings.items() if not name.startswith(core.RESERVED_PROTOCOL_PREFIX)]
    content = f'<h1>{escaped(server.protocol_name)}</h1><p class="dim">Server {escaped(server.server_id)}</p>'
    if calls:
        content += f'<p class="dim">OpenAPI: <code>GET {escaped(prefix)}/openapi.json</code></p>'
        content += html.key_form(key_headers)
    for binding in shown:
        version = f" {binding.version}" if binding.version else ""
        content += f"<h2>{escaped(binding.name + version)}</h2>"
        if doc := json_values.docstring(binding.protocol):
            content += f'<p class="doc">{escaped(doc)}</p>'
        content += f'<p class="dim">Contract <code>{escaped(binding.protocol_hash[:16])}</code></p>'
        content += "".join(_method(binding.name, info, prefix, calls) for _, info in sorted(binding.methods.items()))
    return html.page_of(f"{server.protocol_name}: methods", content, with_script=calls)


def kind_of(info: core.RpcMethodInfo) -> str:
    """One word for what a method is; a "stream" is a producer or an exchange, the Protocol does not say."""
    if info.method_type is core.MethodType.UNARY:
        return "unary"
    return {True: "exchange", False: "producer", None: "stream"}[info.is_exchange]


def _method(protocol: str, info: core.RpcMethodInfo, prefix: str, calls: bool) -> str:
    kind = kind_of(info)
    path = f"{prefix}/{protocol}/{info.name}{'' if kind == 'unary' else '/init'}"
    parts = [f'<div class="head"><h3>{escaped(info.name)}</h3><span class="kind">{kind}</span></div>']
    if info.doc:
        parts.append(f"<p>{escaped(info.doc.strip().splitlines()[0])}</p>")
    parts.append(f'<p class="dim"><code>POST {escaped(path)}</code></p>')
    parts.append(_fields("Parameters", info.params_schema, info.param_types, info.param_docs, info.param_defaults))
    if info.has_return:
        parts.append(_fields("Result", info.result_schema, {"result": info.result_type}))
    if info.header_type is not None:
        parts.append(_record("Header", info.header_type))
    named = [*info.param_types.values(), *([info.result_type] if info.has_return else [])]
    records: dict[type[core.ArrowSerializableDataclass], None] = {}
    _find_records(named, records)
    parts += [_record(record.__name__, record) for record in records]
    if calls:
        parts.append(_form(protocol, info, kind))
    return f"<section>{''.join(parts)}</section>"


def _find_records(annotations: Iterable[Any], found: dict[type[core.ArrowSerializableDataclass], None]) -> None:
    """Add the records that annotations name, and those in their fields."""
    for annotation in annotations:
        record = json_values.record_of(annotation)
        if record is None:
            _find_records(json_values.parts_of(annotation), found)
        elif record not in found:
            found[record] = None
            _find_records(json_values.hints_of(record).values(), found)


def _record(title: str, record: type[core.ArrowSerializableDataclass]) -> str:
    hints, defaults = json_values.hints_of(record), json_values.defaults_of(record)
    return _fields(title, record.ARROW_SCHEMA, hints, _NO_NAMES, defaults)


def _fields(
    title: str,
    schema: pa.Schema,
    hints: Mapping[str, Any],
    docs: Mapping[str, str] = _NO_NAMES,
    defaults: Mapping[str, object] = _NO_NAMES,
) -> str:
    if not len(schema):
        return ""
    rows = ""
    for field in schema:
        hint = hints.get(field.name)
        notes = ["may be null"] if field.nullable else []
        if members := json_values.members_of(hint):
            notes.append(f"one of {', '.join(members)}")
        if field.name in defaults:
            notes.append(f"default {json.dumps(json_values.plain(defaults[field.name], field.type))}")
        if field.name in docs:
            notes.append(docs[field.name])
        rows += f"<tr><td><code>{escaped(field.name)}</code></td><td>{escaped(_type(field.type, hint))}</td>"
        rows += f"<td>{escaped('; '.join(notes))}</td></tr>"
    head = "<tr><th>Name</th><th>Type</th><th>Notes</th></tr>"
    return f'<div class="scroll"><table><caption>{escaped(title)}</caption>{head}{rows}</table></div>'


def _type(dtype: pa.DataType, hint: Any) -> str:
    """The Arrow type; a record, an enum or a table by its name, for its Arrow type says nothing to a reader."""
    kind, of = json_values.bare(hint), pa.types
    if json_values.members_of(hint) or (of.is_binary(dtype) and isinstance(kind, type) and kind is not bytes):
        return str(kind.__name__)
    parts = json_values.parts_of(hint)
    if parts and of.is_map(dtype):
        return f"map<{_type(dtype.key_type, parts[0])}, {_type(dtype.item_type, parts[-1])}>"
    if parts and (of.is_list(dtype) or of.is_large_list(dtype)):
        return f"list<{_type(dtype.value_type, parts[0])}>"
    if (record := json_values.record_of(hint)) is not None:
        return record.__name__
    return str(dtype)


def _form(protocol: str, info: core.RpcMethodInfo, kind: str) -> str:
    needed = [field for field in info.params_schema if field.name not in info.param_defaults]
    template = {field.name: _example(field.type, info.param_types.get(field.name)) for field in needed}
    parts = [_area(f"Arguments of {info.name} as JSON", "args", json.dumps(template, indent=2))]
    if kind in ("exchange", "stream"):
        hint = "Input rows of an exchange, such as [{...}]; a first call without them shows the columns"
        parts.append(f'<p class="dim">{hint}</p>' + _area(f"Input rows of {info.name} as JSON", "input", ""))
    if kind in ("producer", "stream"):
        parts.append(
            '<p class="dim"><label>The first <input name="rows" type="number" min="1" max="1000"'
            f' value="{_SHOWN_ROWS}"> rows, with their columns</label></p>'
        )
    return (
        f'<details><summary>Try it</summary><form data-protocol="{escaped(protocol)}"'
        f' data-method="{escaped(info.name)}">{"".join(parts)}<button type="submit">Call</button>'
        '<div class="scroll rows"></div><pre hidden aria-live="polite"></pre></form></details>'
    )


def _area(label: str, name: str, text: str) -> str:
    return f'<textarea aria-label="{escaped(label)}" name="{name}" spellcheck="false">{escaped(text)}</textarea>'


def _example(dtype: pa.DataType, hint: Any) -> Any:
    of = pa.types
    if members := json_values.members_of(hint):
        return members[0]
    if (record := json_values.record_of(hint)) is not None:
        hints, optional = json_values.hints_of(record), json_values.defaults_of(record)
        needed = [field for field in record.ARROW_SCHEMA if field.name not in optional]
        return {field.name: _example(field.type, hints.get(field.name)) for field in needed}
    if of.is_integer(dtype) or of.is_floating(dtype):
        return 0
    if of.is_boolean(dtype):
        return False
    if of.is_list(dtype) or json_values.holds_table(dtype, hint):
        return []
    if of.is_temporal(dtype):
        return _example_time(dtype)
    return {} if of.is_map(dtype) or of.is_struct(dtype) else ""


def _example_time(dtype: pa.DataType) -> str:
    of = pa.types
    if of.is_date(dtype):
        return "2026-01-31"
    if of.is_time(dtype):
        return "12:00:00"
    if of.is_duration(dtype):
        return "PT1S"
    return "2026-01-31T12:00:00" + ("Z" if getattr(dtype, "tz", None) else "")
