# Needs: pyarrow only. Seam: ServiceDescription, the description that a service gives of itself (API.md section 12.3).
"""A typed Protocol for a service of which there is no source, from what the service says about itself.

    python -m vgi_rpc stub --url https://example.com/rpc -o ledger.py

    Ledger = protocol_from_description(introspect(transport))    # the same at run time: for connect() and the like

Types are chosen so that the Protocol has the schemas, and with them the `protocol_hash`, of the service. Whatever a
peer says ends in the file as a checked identifier or inside a quoted literal, never as code.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import inspect
import keyword
import os
import types
import typing
import unicodedata
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import pyarrow as pa

from .. import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["generate_stub", "protocol_from_description"]

_WIDTH = 100  # of a line, before a signature takes a line per parameter
_SHOWN = 200  # characters of a peer's text in a comment


def generate_stub(desc: core.ServiceDescription) -> str:
    """Return the source of a module with one Protocol, ready for `connect`, mypy --strict and pyright.

    A method whose name or types cannot be written in Python is left out, and a comment says so. ValueError if the
    protocol's own name or version is not valid (wire.md section 7.1).
    """
    return _Writer(_Draft(desc)).module()


def protocol_from_description(desc: core.ServiceDescription) -> type:
    """Return a Protocol class for `connect` and the like; methods and errors as for `generate_stub`."""
    return _Draft(desc).protocol


class _Unwritable(Exception):
    """Why a method cannot be written in Python."""


# ---- Arrow types -> annotations (types.md section 1, read backwards)

_INFERRED = {  # a plain annotation means this type
    pa.utf8(): str,
    pa.binary(): bytes,
    pa.int64(): int,
    pa.float64(): float,
    pa.bool_(): bool,
    pa.timestamp("us"): datetime.datetime,
    pa.date32(): datetime.date,
    pa.time64("us"): datetime.time,
    pa.duration("us"): datetime.timedelta,
}
_SCALARS: tuple[tuple[Callable[[pa.DataType], bool], Any], ...] = (
    (pa.types.is_boolean, bool),
    (pa.types.is_integer, int),
    (pa.types.is_floating, float),
    (pa.types.is_string, str),
    (pa.types.is_large_string, str),
    (pa.types.is_string_view, str),
    (pa.types.is_binary, bytes),
    (pa.types.is_large_binary, bytes),
    (pa.types.is_binary_view, bytes),
    (pa.types.is_fixed_size_binary, bytes),
    (pa.types.is_timestamp, datetime.datetime),
    (pa.types.is_date, datetime.date),
    (pa.types.is_time, datetime.time),
    (pa.types.is_duration, datetime.timedelta),
    (pa.types.is_decimal, decimal.Decimal),
)


def _is_list(dtype: pa.DataType) -> bool:
    is_ = pa.types
    tests = (is_.is_list, is_.is_large_list, is_.is_fixed_size_list, is_.is_list_view, is_.is_large_list_view)
    return any(test(dtype) for test in tests)


def _is_item(field: pa.Field[Any], name: str, nullable: bool = True) -> bool:
    """Whether a child of a list or map is the one that list[T] and dict[K, V] mean."""
    return bool(field.name == name and field.nullable == nullable)


def _python(dtype: pa.DataType) -> Any:
    """The annotation for values of a type when an ArrowType beside it says the type."""
    if isinstance(dtype, pa.BaseExtensionType):
        return uuid.UUID if dtype.extension_name == "arrow.uuid" else Any
    if _is_list(dtype):
        return list[_python(dtype.value_type)]  # type: ignore[misc]
    if pa.types.is_map(dtype):
        return dict[_python(dtype.key_type), _python(dtype.item_type)]  # type: ignore[misc]
    if pa.types.is_struct(dtype):
        return Mapping[str, Any]
    if pa.types.is_dictionary(dtype):
        return _python(dtype.value_type)
    return next((found for test, found in _SCALARS if test(dtype)), Any)


class _Draft:
    """One service as a Protocol: `protocol` and its `methods`, the `classes` they need, and what was `left_out`."""

    def __init__(self, desc: core.ServiceDescription) -> None:
        core.validate_protocol_name(desc.protocol_name, allow_reserved=True)
        if desc.protocol_version:
            core.parse_version(desc.protocol_version)
        self.desc = desc
        self.classes: dict[str, type] = {}  # by the spelling of their struct type
        self.methods: dict[str, Callable[..., Any]] = {}
        self.left_out: list[tuple[str, str]] = []
        self.name = _class_name(desc.protocol_name)
        self.constants = {} if self.name == desc.protocol_name else {"protocol_name": desc.protocol_name}
        if desc.protocol_version:
            self.constants["protocol_version"] = desc.protocol_version
        # No generated name may hide another inside a class body, where type checkers look first.
        self.taken = {self.name, *desc.methods, *_field_names(desc)}
        for name, method in desc.methods.items():
            try:
                self.methods[name] = self._method(name, method)
            except _Unwritable as exc:
                self.left_out.append((name, str(exc)))
        self.protocol = self._protocol()

    def _protocol(self) -> type:
        space = {**self.constants, **self.methods, "__module__": __name__}
        return types.new_class(self.name, (Protocol,), exec_body=lambda body: body.update(space))

    def _method(self, name: str, method: core.MethodDescription) -> Callable[..., Any]:
        _check_name(name, "method")
        if name.startswith("_") or name in ("protocol_name", "protocol_version"):
            raise _Unwritable("the name means something else in a Protocol")
        names = method.params_schema.names
        if len(set(names)) < len(names):
            raise _Unwritable("two of its parameters have the same name")
        hints: dict[str, Any] = {}
        for field in method.params_schema:
            _check_name(field.name, "parameter")
            if field.name in ("self", "ctx") or field.name.startswith("__"):  # which a class body renames
                raise _Unwritable(f"a parameter is called '{field.name}'")
            hints[field.name] = self._hint(field, f"{name}_{field.name}")
        return _function(name, hints, self._returned(name, method))

    def _returned(self, name: str, method: core.MethodDescription) -> Any:
        if method.method_type is core.MethodType.STREAM:
            kinds = {True: core.ExchangeState, False: core.ProducerState, None: core.StreamState}
            state: Any = kinds[method.is_exchange]
            if method.header_schema is None:
                return core.Stream[state]
            header = self._dataclass(list(method.header_schema), f"{name}_header")
            return core.Stream[state, header]  # type: ignore[valid-type]
        if not method.has_return:
            return None
        if len(method.result_schema) != 1:
            raise _Unwritable(f"its result has {len(method.result_schema)} columns")
        return self._hint(method.result_schema.field(0), f"{name}_result")

    def _hint(self, field: pa.Field[Any], name: str, *, top: bool = True) -> Any:
        hint = self._exact(field.type, name, top=top)
        return hint | None if field.nullable else hint

    def _exact(self, dtype: pa.DataType, name: str, *, top: bool) -> Any:
        """The annotation that means exactly this type; a parameter or result (`top`) cannot be a plain struct."""
        plain = None if isinstance(dtype, pa.BaseExtensionType) else _INFERRED.get(dtype)
        if plain is not None:
            return plain
        if pa.types.is_list(dtype) and _is_item(dtype.value_field, "item"):
            return list[self._exact(dtype.value_type, name, top=False)]  # type: ignore[misc]
        if pa.types.is_map(dtype) and not dtype.keys_sorted:
            key, item = dtype.key_field, dtype.item_field
            if _is_item(key, "key", nullable=False) and _is_item(item, "value"):
                return dict[  # type: ignore[misc]
                    self._exact(key.type, f"{name}_key", top=False), self._exact(item.type, name, top=False)
                ]
        if pa.types.is_struct(dtype) and not top:
            try:
                return self._dataclass(list(dtype), name)
            except _Unwritable:  # as dict, then
                _spell(dtype)
        else:
            _spell(dtype)
        return Annotated[_python(dtype), core.ArrowType(dtype)]

    def _dataclass(self, fields: list[pa.Field[Any]], name: str) -> type:
        """A dataclass with these columns; the same columns share one."""
        names = [field.name for field in fields]
        if len(set(names)) < len(names):
            raise _Unwritable("two columns of a record have the same name")
        for column in names:
            _check_name(column, "column")
            if column.startswith("_") or hasattr(core.ArrowSerializableDataclass, column):
                raise _Unwritable(f"a column is called {_text(column)}")
        key = _spell(pa.struct(fields))
        if key not in self.classes:
            hints = [(field.name, self._hint(field, f"{name}_{field.name}", top=False)) for field in fields]
            made = _free(_camel(name), self.taken)
            self.taken.add(made)
            bases = (core.ArrowSerializableDataclass,)
            self.classes[key] = dataclasses.make_dataclass(made, hints, bases=bases, frozen=True)
            self.classes[key].__module__ = __name__
        return self.classes[key]


def _function(name: str, hints: Mapping[str, Any], returned: Any) -> Callable[..., Any]:
    """A method of a Protocol; its signature and annotations are all that is ever looked at."""

    def method(self: object, *args: object, **kwargs: object) -> None:
        raise NotImplementedError("a Protocol has no implementation; connect() gives one")

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    parameters += [inspect.Parameter(key, kind, annotation=hint) for key, hint in hints.items()]
    method.__name__ = name
    method.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    method.__annotations__ = {**hints, "return": returned}
    return method


# ---- names


def _check_name(name: str, what: str) -> None:
    """Refuse what is no identifier, or is another one to Python, which normalises them (PEP 3131)."""
    if not name.isidentifier() or keyword.iskeyword(name):
        raise _Unwritable(f"the {what} name {_text(name)} is not a Python identifier")
    if unicodedata.normalize("NFKC", name) != name:
        raise _Unwritable(f"the {what} name {_text(name)} reads as another name in Python")


def _class_name(protocol_name: str) -> str:
    """`Calc` for `demo.Calc.v1`."""
    parts = [part for part in protocol_name.split(".") if part.isidentifier() and not part.startswith("__")]
    versions = [part for part in parts if part[0] in "vV" and part[1:].isdecimal()]
    return next((part for part in reversed(parts) if part not in versions and not keyword.iskeyword(part)), "Service")


def _camel(name: str) -> str:
    return unicodedata.normalize("NFKC", "".join(part[:1].upper() + part[1:] for part in name.split("_")))


def _free(name: str, taken: Iterable[str]) -> str:
    while name in taken or keyword.iskeyword(name):
        name += "_"
    return name


def _field_names(desc: core.ServiceDescription) -> Iterator[str]:
    """The names of what may become a field of a dataclass."""
    for method in desc.methods.values():
        for field in (*method.params_schema, *method.result_schema):
            yield from _names_within(field.type)
        for field in method.header_schema or ():
            yield field.name
            yield from _names_within(field.type)


def _names_within(dtype: pa.DataType) -> Iterator[str]:
    for i in range(dtype.num_fields):
        yield dtype.field(i).name
        yield from _names_within(dtype.field(i).type)


# ---- source text


def _text(value: str) -> str:
    """A peer's text as a literal: in a comment it stays on its line."""
    shown = value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
    return _literal(shown)


def _literal(value: str) -> str:
    """repr(), which escapes whatever is not printable, with the quotes of this project where that is safe."""
    plain = repr(value)
    return plain if '"' in value or "'" in value else f'"{plain[1:-1]}"'


_PLAIN_TYPES = {
    "null": "null", "bool": "bool_", "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64", "halffloat": "float16",
    "float": "float32", "double": "float64", "string": "utf8", "large_string": "large_utf8",
    "string_view": "string_view", "binary": "binary", "large_binary": "large_binary", "binary_view": "binary_view",
    "date32[day]": "date32", "date64[ms]": "date64", "month_day_nano_interval": "month_day_nano_interval",
}  # fmt: skip
_EXTENSIONS = {"arrow.uuid": "uuid", "arrow.json": "json_", "arrow.bool8": "bool8"}


def _spell(dtype: pa.DataType, module: str = "pa") -> str:
    """The expression that makes a type. _Unwritable if there is none, or no `type_token`."""

    def of(other: pa.DataType) -> str:
        return _spell(other, module)

    is_ = pa.types
    if isinstance(dtype, pa.BaseExtensionType):
        return _spell_extension(dtype, module)
    plain = _PLAIN_TYPES.get(str(dtype))
    if plain is not None:
        return f"{module}.{plain}()"
    if is_.is_fixed_size_binary(dtype):
        return f"{module}.binary({dtype.byte_width})"
    if is_.is_decimal128(dtype) or is_.is_decimal256(dtype):  # others have no token either (wire.md section 9.4)
        return f"{module}.decimal{dtype.bit_width}({dtype.precision}, {dtype.scale})"
    if is_.is_timestamp(dtype):
        return f'{module}.timestamp("{dtype.unit}"{f", tz={_literal(dtype.tz)}" if dtype.tz else ""})'
    if is_.is_duration(dtype) or is_.is_time(dtype):
        return f'{module}.{"duration" if is_.is_duration(dtype) else f"time{dtype.bit_width}"}("{dtype.unit}")'
    if is_.is_dictionary(dtype):
        ordered = ", ordered=True" if dtype.ordered else ""
        return f"{module}.dictionary({of(dtype.index_type)}, {of(dtype.value_type)}{ordered})"
    if is_.is_run_end_encoded(dtype):
        return f"{module}.run_end_encoded({of(dtype.run_end_type)}, {of(dtype.value_type)})"
    return _spell_nested(dtype, module)


def _spell_nested(dtype: pa.DataType, module: str) -> str:
    def child(field: pa.Field[Any]) -> str:
        nullable = "" if field.nullable else ", nullable=False"
        return f"{module}.field({_literal(field.name)}, {_spell(field.type, module)}{nullable})"

    def item(field: pa.Field[Any], name: str, nullable: bool = True) -> str:
        return _spell(field.type, module) if _is_item(field, name, nullable) else child(field)

    is_ = pa.types
    for name in ("list", "large_list", "list_view", "large_list_view"):
        if getattr(is_, f"is_{name}")(dtype):
            maker = "list_" if name == "list" else name
            return f"{module}.{maker}({item(dtype.value_field, 'item')})"
    if is_.is_fixed_size_list(dtype):
        return f"{module}.list_({item(dtype.value_field, 'item')}, {dtype.list_size})"
    if is_.is_map(dtype):
        key, value = item(dtype.key_field, "key", False), item(dtype.item_field, "value")
        return f"{module}.map_({key}, {value}{', keys_sorted=True' if dtype.keys_sorted else ''})"
    children = f"[{', '.join(child(dtype.field(i)) for i in range(dtype.num_fields))}]"
    if is_.is_struct(dtype):
        return f"{module}.struct({children})"
    if is_.is_union(dtype):
        return f"{module}.{dtype.mode}_union({children}, {dtype.type_codes!r})"
    raise _Unwritable(f"the type {_text(str(dtype))} has no name here")


def _spell_extension(dtype: pa.BaseExtensionType, module: str) -> str:
    maker = _EXTENSIONS.get(dtype.extension_name)
    if maker is None:
        raise _Unwritable(f"the extension type {_text(dtype.extension_name)} has no name here")
    return f"{module}.{maker}()"


_BEFORE = '''"""Protocol of a service, as the service described itself to `vgi-rpc stub`."""

# What is not on the wire is not in this file:
#   defaults and docstrings: every argument has to be given
#   Python types: an enum is `str` and a set is `list`; a dataclass, RecordBatch or Schema as parameter or result is
#     `bytes`, an Arrow IPC stream of it; dataclasses inside lists, maps and headers have made-up names
#   whether items of lists and values of maps may be None: always expect it
#   columns of streams: a batch brings its schema
'''
_WHERE = {
    **dict.fromkeys(("Annotated", "Any", "ClassVar", "Protocol"), "typing"),
    **dict.fromkeys(("int", "str", "bytes", "bool", "float", "list", "dict"), "builtins"),
    "Mapping": "collections.abc",
    "dataclass": "dataclasses",
}
_MODULES = {"pa": "pyarrow", "datetime": "datetime", "decimal": "decimal", "uuid": "uuid"}


class _Writer:
    """The text of a draft; what the text uses is imported, under another name if the service takes the usual one."""

    def __init__(self, draft: _Draft) -> None:
        self._draft = draft
        self._core = core.__name__
        if self._core == "__main__":  # run as a plain file
            self._core = os.path.splitext(os.path.basename(str(core.__file__)))[0]
        self._used: dict[str, str] = {}
        self._classes: dict[type, str] = {}

    def module(self) -> str:
        """The whole file."""
        draft = self._draft
        lines = [f"class {draft.name}({self._use('Protocol')}):"]
        if draft.constants:
            of = f"{self._use('ClassVar')}[{self._use('str')}]"
            lines += [f"    {name}: {of} = {_literal(value)}" for name, value in draft.constants.items()]
        for method in draft.methods.values():
            lines += ["", *self._signature(method)] if len(lines) > 1 else self._signature(method)
        if len(lines) == 1:
            lines.append("    pass")
        body = "\n\n\n".join([*self._classes.values(), "\n".join(lines)])
        return f"{_BEFORE}#\n{self._about()}\n{self._imports()}\n\n\n{body}\n"

    def _about(self) -> str:
        desc, left_out = self._draft.desc, self._draft.left_out
        version = f", version {_text(desc.protocol_version)}" if desc.protocol_version else ""
        lines = [f"The service: {_text(desc.protocol_name)}{version}, hash {_text(desc.protocol_hash)}"]
        own = core.compute_protocol_hash(desc.protocol_name, core.rpc_methods(self._draft.protocol))
        if own == desc.protocol_hash:
            lines.append("  The Protocol below has the same hash.")
        else:
            why = "methods are left out" if left_out else "the service has types that arrive here as others"
            lines.append(f"  The Protocol below has another hash, because {why}: {own}")
        if left_out:
            lines.append("Left out:")
            lines += [f"  {_text(name)}: {why}" for name, why in left_out]
        return "".join(f"# {line}\n" for line in lines)

    def _signature(self, method: Callable[..., Any]) -> list[str]:
        hints = dict(method.__annotations__)
        returned = self._hint(hints.pop("return"))
        parameters = ["self", *(f"{name}: {self._hint(hint)}" for name, hint in hints.items())]
        line = f"    def {method.__name__}({', '.join(parameters)}) -> {returned}: ..."
        if len(line) <= _WIDTH:
            return [line]
        return [
            f"    def {method.__name__}(",
            *(f"        {text}," for text in parameters),
            f"    ) -> {returned}: ...",
        ]

    def _hint(self, hint: Any) -> str:
        if hint is None or hint is type(None):
            return "None"
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            spelled = _spell(args[1].arrow_type, self._use("pa"))
            return f"{self._use('Annotated')}[{self._hint(args[0])}, {self._use('ArrowType')}({spelled})]"
        if origin in (typing.Union, types.UnionType):
            return " | ".join(map(self._hint, args))
        if origin is core.Stream and args[1] is None:
            args = args[:1]
        if origin is not None:
            return f"{self._use(origin.__name__)}[{', '.join(map(self._hint, args))}]"
        if hint in self._draft.classes.values():
            return self._dataclass(hint)
        if hint is Any:
            return self._use("Any")
        if hint.__module__ in _MODULES:
            return f"{self._use(hint.__module__)}.{hint.__name__}"
        return self._use(hint.__name__)

    def _dataclass(self, made: type) -> str:
        """Write a dataclass before whatever uses it."""
        if made not in self._classes:
            fields = [f"    {f.name}: {self._hint(f.type)}" for f in dataclasses.fields(made)]
            head = f"@{self._use('dataclass')}(frozen=True)\nclass {made.__name__}"
            base = self._use("ArrowSerializableDataclass")
            self._classes[made] = "\n".join([f"{head}({base}):", *(fields or ["    pass"])])
        return made.__name__

    def _use(self, name: str) -> str:
        if name not in self._used:
            taken = self._draft.taken
            self._used[name] = _free(f"_{name}", taken) if name in taken else name
        return self._used[name]

    def _imports(self) -> str:
        whole: dict[bool, list[str]] = {True: [], False: []}
        parts: dict[str, list[str]] = {}
        for name, local in sorted(self._used.items()):
            if name in _MODULES:
                renamed = "" if local == _MODULES[name] else f" as {local}"
                whole[name != "pa"].append(f"import {_MODULES[name]}{renamed}")
            else:
                module = _WHERE.get(name, self._core)
                if module != "builtins" or local != name:
                    parts.setdefault(module, []).append(name if local == name else f"{name} as {local}")
        ours = parts.pop(self._core, [])
        standard = [*whole[True], *(_import(module, names) for module, names in sorted(parts.items()))]
        foreign = [*whole[False], *([_import(self._core, ours)] if ours else [])]
        blocks = ["from __future__ import annotations", "\n".join(standard), "\n".join(foreign)]
        return "\n\n".join(block for block in blocks if block)


def _import(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
