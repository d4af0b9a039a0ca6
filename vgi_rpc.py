# vgi_rpc.py - typed RPC over Apache Arrow in one file: copy it into a project or pip-install it.
# Copyright (c) 2026 The vgi_rpc authors
# SPDX-License-Identifier: MIT
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
# documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
# rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright
# notice and this permission notice shall be included in all copies or substantial portions of the Software. THE
# SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
# WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS
# OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
# OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
#
# /// script
# requires-python = ">=3.11"
# dependencies = ["pyarrow>=19"]
# ///
"""Call Python services across a process or machine boundary; arguments and results travel as Apache Arrow batches.

    class Calc(Protocol):
        def add(self, a: float, b: float) -> float: ...

    with connect(Calc, ["python", "worker.py"]) as calc:
        calc.add(1.0, 2.0)

Where to begin:

    to call a service    connect, unix_connect, tcp_connect, http_connect, WorkerPool, with_options, map_calls, submit
    to offer one         run_server, RpcServer, serve_pipe, serve_unix, serve_tcp, serve_http, make_wsgi_app
    what travels         ArrowSerializableDataclass, ArrowType, Stream, ProducerState, ExchangeState, AnnotatedBatch
    when it fails        RpcError and its subclasses; StatusError to raise in a method
    who offers what      introspect, list_protocols, describe_protocol; python -m vgi_rpc --help

Names with http or wsgi come from vgi_rpc_extras: help(vgi_rpc.http_connect).

The file is a house of numbered rooms. Code in a room uses its own names and those of the rooms above it, never one
from below; tests/test_NN_*.py covers room NN. Search for "= N. " to jump.

    1. CONSTANTS        every key, number and name that goes on the wire
    2. ERRORS           what can be raised, as one tree; the one table that translates foreign errors
    3. LOGGING          messages to the caller, formatters, wire-debug text
    4. IPC              Arrow messages in and out of byte streams, bounded and validated
    5. TYPES            Python annotations <-> Arrow types, values <-> cells, dataclasses
    6. ELSEWHERE        batches that are not in the message: shared memory and stores
    7. CONTEXT          who calls, with what rights, at what cost
    8. METHODS          a Protocol class -> a table of methods; streams and their state; the contract hash
    9. WIRE             the shape of a call, without any transport
   10. TRANSPORTS       pipe, subprocess, Unix socket, TCP; the laws of a connection
   11. DESCRIBE         a service tells what it offers
   12. SERVER           requests -> methods -> replies
   13. CLIENT           the typed proxy
   14. POOL             idle workers kept warm
   15. FRONT DOOR       connect, serve, run_server
   16. COMMAND LINE     python -m vgi_rpc
   17. EXTRAS           the way to vgi_rpc_extras
"""

from __future__ import annotations

import abc
import collections
import contextlib
import contextvars
import datetime
import decimal
import enum
import functools
import importlib
import io
import itertools
import logging
import os
import re
import select
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import typing
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

if sys.version_info < (3, 11):  # noqa: UP036 (a copied file has no installer that checks it)
    raise ImportError(f"vgi_rpc needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})")

from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Final,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

import pyarrow as pa
from pyarrow import ipc

if TYPE_CHECKING:
    import concurrent.futures
    import inspect
    import ssl
    import subprocess
    from typing import NamedTuple as _NamedTuple

    from typing_extensions import TypeForm
else:

    class _NamedTupleMeta(type):
        """typing.NamedTuple compiles every annotation at import: 8 of our 24 ms (measured). This one does not."""

        def __new__(mcs, name, bases, space):
            if not bases:
                return super().__new__(mcs, name, bases, space)
            fields = space.get("__annotations__", {})
            defaults = [space.pop(field) for field in fields if field in space]
            base = collections.namedtuple(name, fields, defaults=defaults, module=space["__module__"])
            return type(name, (base,), {**space, "__slots__": ()})

    class _NamedTuple(metaclass=_NamedTupleMeta):
        """A tuple with named fields."""


class _Record:
    """Base of immutable records: equal by value, picklable. `__match_args__` names the constructor's arguments."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__reduce__() == other.__reduce__()

    def __hash__(self) -> int:
        return hash(self.__reduce__())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, name) for name in self.__match_args__)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__match_args__)
        return f"{type(self).__name__}({shown})"


__version__ = "0.1.0"

_P = TypeVar("_P")  # a user's Protocol
_T = TypeVar("_T")
_Q = ParamSpec("_Q")


# ==== 1. CONSTANTS ====================================================================================================
# Uses: nothing. Another implementation of the wire agrees with every line here (wire.md section 2); each byte string of
# the protocol is spelled once in this file, here. Limits whose meaning is private sit beside their use instead.

REQUEST_VERSION: Final = b"1"  # compared bytewise by every server

# Request batch: what is called.
RPC_METHOD_KEY: Final = b"vgi_rpc.method"
REQUEST_VERSION_KEY: Final = b"vgi_rpc.request_version"
PROTOCOL_KEY: Final = b"vgi_rpc.protocol"  # routing key; required on byte transports except for __dunder__ built-ins
PROTOCOL_VERSION_KEY: Final = b"vgi_rpc.protocol_version"  # sent when the client's Protocol declares a version
REQUEST_ID_KEY: Final = b"vgi_rpc.request_id"  # minted by the server; ignored on the way in
SERVER_ID_KEY: Final = b"vgi_rpc.server_id"  # on log and error batches, never on data
DEADLINE_KEY: Final = b"x-timeout-us"  # ours: remaining budget, microseconds, 16 decimal digits (DESIGN.md section 7)

# Log and error batches (zero rows): read by the caller.
LOG_LEVEL_KEY: Final = b"vgi_rpc.log_level"
LOG_MESSAGE_KEY: Final = b"vgi_rpc.log_message"
LOG_EXTRA_KEY: Final = b"vgi_rpc.log_extra"  # JSON object
ERROR_CODE_KEY: Final = b"vgi_rpc.error_code"
ERROR_KIND_KEY: Final = b"vgi_rpc.error_kind"
ERROR_DETAILS_KEY: Final = b"vgi_rpc.error_details"  # compact JSON array, at most 4096 bytes
ERROR_KIND_METHOD_NOT_IMPLEMENTED: Final = b"method_not_implemented"

# Stream input: its presence, with any value, is the signal.
CANCEL_KEY: Final = b"vgi_rpc.cancel"

# HTTP only: the two sealed halves of a stream's state.
STATE_KEY: Final = b"vgi_rpc.stream_state#b64"
CALL_STATE_KEY: Final = b"vgi_rpc.call_state#b64"

# Pointer batches (zero rows, the data is elsewhere).
LOCATION_KEY: Final = b"vgi_rpc.location"
LOCATION_SHA256_KEY: Final = b"vgi_rpc.location.sha256"
LOCATION_FETCH_MS_KEY: Final = b"vgi_rpc.location.fetch_ms"
LOCATION_SOURCE_KEY: Final = b"vgi_rpc.location.source"
SHM_OFFSET_KEY: Final = b"vgi_rpc.shm_offset"
SHM_LENGTH_KEY: Final = b"vgi_rpc.shm_length"
SHM_SOURCE_KEY: Final = b"vgi_rpc.shm_source"
SHM_SEGMENT_NAME_KEY: Final = b"vgi_rpc.shm_segment_name"
SHM_SEGMENT_SIZE_KEY: Final = b"vgi_rpc.shm_segment_size"

# __transport_options__ and the older __describe__ (v4 table, wire.md appendix B).
TRANSPORT_OPTIONS_METHOD_NAME: Final = "__transport_options__"
TRANSPORT_SHM_KEY: Final = b"vgi_rpc.transport.shm"
HEADER_SIZE: Final = 65_536  # of a shared memory segment: where its data begins
MAX_ALLOCS: Final = 4_094  # regions that fit the header
LEGACY_DESCRIBE_METHOD_NAME: Final = "__describe__"
LEGACY_PROTOCOL_NAME_KEY: Final = b"vgi_rpc.protocol_name"
LEGACY_DESCRIBE_VERSION_KEY: Final = b"vgi_rpc.describe_version"
LEGACY_PROTOCOL_HASH_KEY: Final = b"vgi_rpc.protocol_hash"

# W3C trace context, present when a tracing integration is active.
TRACEPARENT_KEY: Final = b"traceparent"
TRACESTATE_KEY: Final = b"tracestate"

REFLECTION_PROTOCOL_NAME: Final = "vgi_rpc.Reflection.v1"
EMPTY_SCHEMA: Final[pa.Schema] = pa.schema([])
_EMPTY_SCHEMA: Final = EMPTY_SCHEMA  # the reference's spelling, imported by programs written for it
_EOS: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # ends every IPC stream


# ==== 2. ERRORS =======================================================================================================
# Uses: nothing. What can go wrong, in three branches; a caller catches RpcError and looks at the class:
#
#   RpcError                       the far side answered with an error; `error_type` is its exception class
#   |-- RpcArgumentError           my call was wrong; nothing was sent                         (also a TypeError)
#   |-- ReflectionNotSupportedError  (room 11)
#   |-- DeadlineExceededError      it took too long                                            (also a TimeoutError)
#   |-- ConnectionLostError        the connection is gone                                      (also a ConnectionError)
#   |   `-- WorkerDiedError        ... because the worker died; carries its death certificate
#   `-- WrongProcessError          the connection belongs to the parent of a fork              (also a RuntimeError)
#
# `.sent` says whether the request reached the far side: "no", "maybe" or "answered". The other classes here are raised
# by servers and travel by their `error_code`, `error_kind` and `error_details`, which any exception may declare
# (wire.md section 6). `_errors_translate` is the only place that turns foreign exceptions into ours.

_Sent = Literal["no", "maybe", "answered"]
MAX_ERROR_DETAILS_BYTES: Final = 4096


class Code(enum.StrEnum):
    """The closed set of error codes, by name (gRPC's)."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"

    @classmethod
    def parse(cls, value: object) -> Code:
        """Return the code of that name; anything unknown is UNKNOWN."""
        return cls.__members__.get(value, cls.UNKNOWN) if isinstance(value, str) else cls.UNKNOWN


CLIENT_ERROR_CODES: Final = frozenset(
    {
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.OUT_OF_RANGE,
        Code.FAILED_PRECONDITION,
        Code.PERMISSION_DENIED,
        Code.UNAUTHENTICATED,
        Code.UNIMPLEMENTED,
        Code.CANCELLED,
    }
)
TRANSIENT_ERROR_CODES: Final = frozenset(
    {Code.UNAVAILABLE, Code.ABORTED, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}
)
OTEL_SERVER_ERROR_CODES: Final = frozenset(
    {Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE, Code.DATA_LOSS}
)


class _ErrorsRecord(_Record):
    """Base of the detail records, which travel as JSON objects."""

    __slots__ = ()

    def _set_texts(self, **values: object) -> None:
        _errors_texts(**values)
        self._set(**values)

    @classmethod
    def _build(cls, obj: Any) -> Self:
        try:
            return cls(**{name: obj[name] for name in cls.__match_args__ if name in obj})
        except (TypeError, KeyError) as exc:
            raise ValueError(f"malformed {cls.__name__}: {exc}") from exc

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that travels; a detail carries its `@type`."""
        found: dict[str, Any] = {"@type": self.TYPE} if isinstance(self, _ErrorsDetail) else {}
        for name in self.__match_args__:
            value = getattr(self, name)
            if isinstance(value, tuple):
                value = [item.to_json() for item in value]
            found[name] = dict(value) if isinstance(value, Mapping) else value
        return found


class _ErrorsDetail(_ErrorsRecord):
    """A detail of the catalogue (wire.md section 6)."""

    __slots__ = ()
    TYPE: ClassVar[str] = ""

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Self:
        """Build from the wire's object; ValueError on another shape."""
        if not isinstance(obj, Mapping) or obj.get("@type") != cls.TYPE:
            raise ValueError(f"not a {cls.TYPE} object")
        return cls._build(obj)


def _errors_texts(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a str, got {type(value).__name__}")


def _errors_parts(kind: type[Any], values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"expected a list of {kind.__name__}")
    return tuple(item if isinstance(item, kind) else kind._build(item) for item in values)


class FieldViolation(_ErrorsRecord):
    """One bad field of a request."""

    __slots__ = __match_args__ = ("field", "description")
    field: str
    description: str

    def __init__(self, field: str, description: str = "") -> None:
        self._set_texts(field=field, description=description)


class PreconditionViolation(_ErrorsRecord):
    """One precondition that does not hold."""

    __slots__ = __match_args__ = ("type", "subject", "description")
    type: str
    subject: str
    description: str

    def __init__(self, type: str, subject: str = "", description: str = "") -> None:
        self._set_texts(type=type, subject=subject, description=description)


class QuotaViolation(_ErrorsRecord):
    """One quota that is used up."""

    __slots__ = __match_args__ = ("subject", "description")
    subject: str
    description: str

    def __init__(self, subject: str, description: str = "") -> None:
        self._set_texts(subject=subject, description=description)


class HelpLink(_ErrorsRecord):
    """Where to read on."""

    __slots__ = __match_args__ = ("description", "url")
    description: str
    url: str

    def __init__(self, description: str, url: str) -> None:
        self._set_texts(description=description, url=url)


class ErrorInfo(_ErrorsDetail):
    """Free key/value context."""

    __slots__ = __match_args__ = ("metadata",)
    TYPE = "vgi_rpc.ErrorInfo"
    metadata: Mapping[str, str]

    def __init__(self, metadata: Mapping[str, str] = types.MappingProxyType({})) -> None:
        if not isinstance(metadata, Mapping):
            raise ValueError("metadata must be a mapping of str to str")
        for key, value in metadata.items():
            _errors_texts(**{f"key {key!r} of metadata": key, f"metadata[{key!r}]": value})
        self._set(metadata=types.MappingProxyType(dict(metadata)))

    def __hash__(self) -> int:
        return hash(frozenset(self.metadata.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self.metadata),)


class RetryInfo(_ErrorsDetail):
    """When to try again; a whole number of seconds travels as an integer."""

    __slots__ = __match_args__ = ("retry_delay_seconds",)
    TYPE = "vgi_rpc.RetryInfo"
    retry_delay_seconds: float

    def __init__(self, retry_delay_seconds: float) -> None:
        if isinstance(retry_delay_seconds, bool) or not isinstance(retry_delay_seconds, int | float):
            raise ValueError("retry_delay_seconds must be a number")
        if not 0 <= retry_delay_seconds < float("inf"):
            raise ValueError(f"retry_delay_seconds must be finite and not negative, got {retry_delay_seconds}")
        self._set(retry_delay_seconds=retry_delay_seconds)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that travels."""
        delay = self.retry_delay_seconds
        return {"@type": self.TYPE, "retry_delay_seconds": int(delay) if delay == int(delay) else delay}


class BadRequest(_ErrorsDetail):
    """Which fields of the request are bad."""

    __slots__ = __match_args__ = ("field_violations",)
    TYPE = "vgi_rpc.BadRequest"
    field_violations: tuple[FieldViolation, ...]

    def __init__(self, field_violations: Iterable[FieldViolation] = ()) -> None:
        self._set(field_violations=_errors_parts(FieldViolation, field_violations))


class PreconditionFailure(_ErrorsDetail):
    """Which preconditions do not hold."""

    __slots__ = __match_args__ = ("violations",)
    TYPE = "vgi_rpc.PreconditionFailure"
    violations: tuple[PreconditionViolation, ...]

    def __init__(self, violations: Iterable[PreconditionViolation] = ()) -> None:
        self._set(violations=_errors_parts(PreconditionViolation, violations))


class QuotaFailure(_ErrorsDetail):
    """Which quotas are used up."""

    __slots__ = __match_args__ = ("violations",)
    TYPE = "vgi_rpc.QuotaFailure"
    violations: tuple[QuotaViolation, ...]

    def __init__(self, violations: Iterable[QuotaViolation] = ()) -> None:
        self._set(violations=_errors_parts(QuotaViolation, violations))


class ResourceInfo(_ErrorsDetail):
    """Which resource the error is about."""

    __slots__ = __match_args__ = ("resource_type", "resource_name", "owner", "description")
    TYPE = "vgi_rpc.ResourceInfo"
    resource_type: str
    resource_name: str
    owner: str
    description: str

    def __init__(
        self, resource_type: str = "", resource_name: str = "", owner: str = "", description: str = ""
    ) -> None:
        self._set_texts(resource_type=resource_type, resource_name=resource_name, owner=owner, description=description)


class Help(_ErrorsDetail):
    """Where to read on."""

    __slots__ = __match_args__ = ("links",)
    TYPE = "vgi_rpc.Help"
    links: tuple[HelpLink, ...]

    def __init__(self, links: Iterable[HelpLink] = ()) -> None:
        self._set(links=_errors_parts(HelpLink, links))


class LocalizedMessage(_ErrorsDetail):
    """A text for the user, in one language."""

    __slots__ = __match_args__ = ("locale", "message")
    TYPE = "vgi_rpc.LocalizedMessage"
    locale: str
    message: str

    def __init__(self, locale: str, message: str) -> None:
        self._set_texts(locale=locale, message=message)


ErrorDetail = (
    ErrorInfo | RetryInfo | BadRequest | PreconditionFailure | QuotaFailure | ResourceInfo | Help | LocalizedMessage
)
_ERRORS_CATALOGUE: dict[str, type[_ErrorsDetail]] = {cls.TYPE: cls for cls in typing.get_args(ErrorDetail)}
_ERRORS_TYPE_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def parse_error_detail(obj: object) -> ErrorDetail | None:
    """Return the typed detail of one object from the wire; None for unknown types and malformed ones."""
    if not isinstance(obj, Mapping):
        return None
    cls = _ERRORS_CATALOGUE.get(str(obj.get("@type")))
    try:
        return None if cls is None else cast(ErrorDetail, cls.from_json(obj))
    except ValueError:
        return None


def _errors_check_details(details: Iterable[ErrorDetail | Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the objects that travel; ValueError when one breaks a rule."""
    found: dict[str, dict[str, Any]] = {}
    for detail in details:
        obj = detail.to_json() if isinstance(detail, _ErrorsDetail) else dict(detail)
        name = obj.get("@type")
        if not isinstance(name, str) or not _ERRORS_TYPE_NAME.fullmatch(name):
            raise ValueError(f"an error detail needs a dotted '@type', got {name!r}")
        if name in found:
            raise ValueError(f"two error details of type {name}")
        if name.startswith("vgi_rpc."):
            cls = _ERRORS_CATALOGUE.get(name)
            if cls is None:
                raise ValueError(f"{name}: the prefix vgi_rpc. is reserved to the catalogue")
            obj = cls.from_json(obj).to_json()
        found[name] = obj
    return list(found.values())


def encode_error_details(details: Iterable[ErrorDetail | Mapping[str, Any]]) -> str | None:
    """Return compact JSON; None when there is nothing, a rule is broken or it is over 4096 bytes (never trimmed)."""
    import json

    try:
        objects = _errors_check_details(details)
        text = json.dumps(objects, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text if objects and len(text.encode()) <= MAX_ERROR_DETAILS_BYTES else None
    except (TypeError, ValueError, RecursionError):
        return None


def decode_error_details(raw: str | bytes | None) -> list[dict[str, Any]]:
    """Return the objects with an `@type`; [] for anything that is not a JSON array of objects."""
    import json

    if not raw:
        return []
    try:
        found = json.loads(raw if isinstance(raw, str) else raw.decode())  # bytes alone would be guessed as UTF-16
    except (ValueError, RecursionError):
        return []
    return _errors_with_type(found)


def _errors_with_type(found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        return []
    return [obj for obj in found if isinstance(obj, dict) and isinstance(obj.get("@type"), str)]


def is_retryable(code: Code | str, details: Iterable[Mapping[str, Any]] = ()) -> bool:
    """UNAVAILABLE always, RESOURCE_EXHAUSTED with a RetryInfo, nothing else."""
    if code == Code.UNAVAILABLE:
        return True
    return code == Code.RESOURCE_EXHAUSTED and any(obj.get("@type") == RetryInfo.TYPE for obj in details)


def exception_str(exc: BaseException) -> str:
    """Return str(exc), or a placeholder when that fails itself."""
    try:
        return str(exc)
    except Exception:
        return "<exception str() failed>"


def _errors_declared(exc: BaseException, name: str) -> Any:
    try:
        return getattr(exc, name, None)
    except Exception:
        return None


def error_code_of(exc: BaseException) -> Code:
    """Return the code an exception declares, else UNKNOWN; never raises."""
    return Code.parse(_errors_declared(exc, "error_code"))


def error_kind_of(exc: BaseException) -> str | None:
    """Return the kind an exception declares; never raises."""
    kind = _errors_declared(exc, "error_kind")
    return kind if isinstance(kind, str) and kind else None


def error_details_of(exc: BaseException) -> list[dict[str, Any]]:
    """Return the details an exception declares, [] when they break a rule; never raises."""
    details = _errors_declared(exc, "error_details")
    try:
        return _errors_check_details(details) if details else []
    except Exception:
        return []


class IPCError(Exception):
    """A batch or IPC stream is broken or invalid."""


class RpcError(Exception):
    """The far side answered with an error; base of all that a call can raise (API.md section 2.7).

    Attributes:
        error_type: exception class on the far side, or a framework word such as "TransportError".
        error_message: its text.
        remote_traceback: its traceback; printed with this exception as a note.
        error_code, error_kind, error_details: the three layers of the error model; `code` is the typed code.
        sent: "no", "maybe" or "answered".
    """

    def __init__(
        self,
        error_type: str,
        error_message: str,
        remote_traceback: str = "",
        *,
        request_id: str = "",
        error_code: str = "",
        error_kind: str = "",
        error_details: list[dict[str, Any]] | None = None,
        sent: _Sent = "answered",
    ) -> None:
        prefix = f"{error_type}: "
        # A server puts the class before its text (wire.md section 6), and Python prints ours: once is enough.
        said = error_message.startswith(prefix) or type(self).__name__ == error_type
        super().__init__(error_message if said else prefix + error_message)
        self.error_type = error_type
        self.error_message = error_message
        self.remote_traceback = remote_traceback
        self.request_id = request_id
        self.error_code = error_code
        self.error_kind = error_kind
        self.error_details = error_details or []
        self.sent: _Sent = sent
        if remote_traceback:
            self.add_note(f"Remote traceback:\n{remote_traceback.rstrip()}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _errors_restore, (type(self), self.args, self.__dict__)

    @property
    def code(self) -> Code:
        """The error code; UNKNOWN when there is none."""
        return Code.parse(self.error_code)

    def is_retryable(self) -> bool:
        """Whether the far side says that trying again may help."""
        return is_retryable(self.code, self.error_details)

    def details(self) -> list[ErrorDetail]:
        """Return the typed details; unknown and malformed ones are skipped."""
        return [found for obj in self.error_details if (found := parse_error_detail(obj)) is not None]

    def _detail(self, cls: type[_T]) -> _T | None:
        return next((detail for detail in self.details() if isinstance(detail, cls)), None)

    def error_info(self) -> ErrorInfo | None:
        """Return the ErrorInfo detail, if any."""
        return self._detail(ErrorInfo)

    def retry_info(self) -> RetryInfo | None:
        """Return the RetryInfo detail, if any."""
        return self._detail(RetryInfo)

    def bad_request(self) -> BadRequest | None:
        """Return the BadRequest detail, if any."""
        return self._detail(BadRequest)

    def precondition_failure(self) -> PreconditionFailure | None:
        """Return the PreconditionFailure detail, if any."""
        return self._detail(PreconditionFailure)

    def quota_failure(self) -> QuotaFailure | None:
        """Return the QuotaFailure detail, if any."""
        return self._detail(QuotaFailure)

    def resource_info(self) -> ResourceInfo | None:
        """Return the ResourceInfo detail, if any."""
        return self._detail(ResourceInfo)

    def help(self) -> Help | None:
        """Return the Help detail, if any."""
        return self._detail(Help)

    def localized_message(self) -> LocalizedMessage | None:
        """Return the LocalizedMessage detail, if any."""
        return self._detail(LocalizedMessage)


def _errors_restore(cls: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    """Unpickle without the constructors: they differ from class to class, what an instance holds does not."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class RpcArgumentError(RpcError, TypeError):
    """My call was wrong: an unknown, missing or ill-typed argument. Nothing was sent."""

    def __init__(self, message: str) -> None:
        super().__init__("TypeError", message, sent="no")


class DeadlineExceededError(RpcError, TimeoutError):
    """A call took longer than its timeout; its connection is closed."""

    def __init__(self, message: str, *, sent: _Sent = "maybe") -> None:
        super().__init__("DeadlineExceededError", message, error_code=Code.DEADLINE_EXCEEDED, sent=sent)


class ConnectionLostError(RpcError, ConnectionError):
    """The connection is gone, or was given up because it is out of step; connect again."""

    def __init__(self, message: str, *, sent: _Sent = "maybe") -> None:
        super().__init__("TransportError", message, sent=sent)


class WorkerDiedError(ConnectionLostError):
    """The connection is gone because the worker process died; the death certificate is printed as a note."""

    def __init__(
        self,
        message: str,
        *,
        sent: _Sent = "maybe",
        command: tuple[str, ...] = (),
        pid: int = 0,
        returncode: int | None = None,
        lifetime: float = 0.0,
        stderr_tail: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, sent=sent)
        self.command = command
        self.pid = pid
        self.returncode = returncode
        self.lifetime = lifetime
        self.stderr_tail = stderr_tail
        words = "".join(f"\n  | {line}" for line in stderr_tail) or " (nothing)"
        self.add_note(f"command: {' '.join(command)}\npid: {pid}, lived {lifetime:.2f} s\nlast lines of stderr:{words}")


class WrongProcessError(RpcError, RuntimeError):
    """The connection was made in another process, before a fork; connect again here. Nothing was sent."""

    def __init__(self, message: str) -> None:
        super().__init__("WrongProcessError", message, sent="no")


class ExternalLocationError(RpcError, RuntimeError, ValueError):
    """A batch that is kept elsewhere could not be stored, or fetched and verified; the connection is in step.

    No text of it holds more of a URL than scheme, host, port and path (storage.md section 6).
    """

    def __init__(
        self,
        message: str,
        *,
        error_type: str = "ExternalLocationError",
        error_code: Code = Code.DATA_LOSS,
        sent: _Sent = "answered",
    ) -> None:
        super().__init__(error_type, message, error_code=error_code, sent=sent)


class StatusError(Exception):
    """Raise it in a method to choose code, kind and details; ValueError for an unknown code or a bad detail."""

    def __init__(
        self,
        message: str,
        *,
        code: Code | str,
        kind: str | None = None,
        details: Iterable[ErrorDetail | Mapping[str, Any]] = (),
    ) -> None:
        super().__init__(message)
        self.error_code = Code(code)
        self.error_kind = kind
        self.error_details = _errors_check_details(details)

    def __reduce__(self) -> tuple[Any, ...]:
        return _errors_restore, (type(self), self.args, self.__dict__)


class VersionError(Exception):
    """A request version is missing or unsupported."""


class ProtocolVersionError(VersionError):
    """Client and server declare protocol versions that do not match (wire.md section 7.3)."""

    error_code = Code.FAILED_PRECONDITION
    error_kind = "protocol_version_mismatch"

    def __init__(
        self, message: str = "", *, protocol: str = "", client_version: str = "", server_version: str = ""
    ) -> None:
        super().__init__(message)
        self.protocol = protocol
        self.client_version = client_version
        self.server_version = server_version

    @property
    def error_details(self) -> list[ErrorDetail]:
        """What the server requires."""
        description = (
            f"client declares {self.client_version or '<none>'}, server requires {self.server_version};"
            " major and minor must match"
        )
        return [PreconditionFailure([PreconditionViolation("protocol_version", self.protocol, description)])]


class MethodNotImplementedError(AttributeError):
    """The protocol has no such method."""

    error_code = Code.UNIMPLEMENTED
    error_kind = "method_not_implemented"


class ProtocolError(ValueError):
    """A request names its protocol badly."""


class ProtocolNotSpecifiedError(ProtocolError):
    """A request names no protocol."""

    error_code = Code.INVALID_ARGUMENT
    error_kind = "protocol_not_specified"


class ProtocolNotSupportedError(ProtocolError):
    """The protocol is not hosted here."""

    error_code = Code.UNIMPLEMENTED
    error_kind = "protocol_not_supported"


class SessionLostError(Exception):
    """A sticky session is not here any more (HTTP)."""

    error_code = Code.ABORTED
    error_kind = "session_lost"


class ServerDrainingError(Exception):
    """The server is going down and takes no new sessions (HTTP)."""

    error_code = Code.UNAVAILABLE
    error_kind = "server_draining"

    def __init__(self, message: str = "", *, retry_after: float = 1.0) -> None:
        super().__init__(message or "the server is draining")
        self.retry_after = retry_after
        self.error_details = [RetryInfo(retry_after)]


class AuthUnavailableError(Exception):
    """An authenticator could not decide (HTTP 503, not 401); deliberately not a ValueError."""

    error_code = Code.UNAVAILABLE

    def __init__(self, detail: str = "", *, retry_after: int = 5) -> None:
        super().__init__(detail or "authentication is unavailable")
        self.retry_after = retry_after
        self.error_details = [RetryInfo(retry_after)]


def _errors_translate(exc: BaseException, doing: str, sent: _Sent) -> RpcError:
    """The one table for what is raised between sending a request and reading its answer; RpcErrors pass."""
    if isinstance(exc, RpcError):
        return exc
    text = exception_str(exc) or type(exc).__name__
    if isinstance(exc, TimeoutError):
        found: RpcError = DeadlineExceededError(f"{doing} did not finish in time: {text}", sent=sent)
    else:
        found = ConnectionLostError(f"Transport failed during {doing}: {text}", sent=sent)
    found.__cause__ = exc
    return found


# ==== 3. LOGGING ======================================================================================================
# Uses: 1, 2. Three kinds of messages. Messages to the caller travel as zero-row batches (wire.md sections 5 and 6);
# an EXCEPTION among them is an error. Records of the server go through the logging module, under fixed names that are
# API. Wire-debug text describes what passes by without ever showing a parameter's value, a token or a location.

_LOG = logging.getLogger("vgi_rpc")
_LOG.addHandler(logging.NullHandler())
_LOG_RPC = logging.getLogger("vgi_rpc.rpc")
_LOG_ACCESS = logging.getLogger("vgi_rpc.access")
_LOG_POOL = logging.getLogger("vgi_rpc.pool")
_LOG_SHM = logging.getLogger("vgi_rpc.shm")
_LOG_WIRE_REQUEST = logging.getLogger("vgi_rpc.wire.request")
_LOG_WIRE_RESPONSE = logging.getLogger("vgi_rpc.wire.response")
_LOG_WIRE_BATCH = logging.getLogger("vgi_rpc.wire.batch")
_LOG_WIRE_STREAM = logging.getLogger("vgi_rpc.wire.stream")
_LOG_WIRE_TRANSPORT = logging.getLogger("vgi_rpc.wire.transport")

MAX_TRACEBACK_CHARS: Final = 16_000
MAX_TRACEBACK_FRAMES: Final = 5
_LOG_ENTRY_BYTES: Final = 1_000_000  # readers refuse a metadata entry over 1 MiB (room 5), and the connection with it
REDACTED: Final = "[redacted]"


class Level(enum.Enum):
    """How serious a message to the caller is; EXCEPTION raises there."""

    EXCEPTION = "EXCEPTION"
    ERROR = "ERROR"
    WARN = "WARN"
    INFO = "INFO"
    DEBUG = "DEBUG"
    TRACE = "TRACE"


class Message:
    """A message to the caller: level, text, and free extra values (API.md section 2.8)."""

    __slots__ = ("extra", "level", "message")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, level: Level, message: str, **kwargs: object) -> None:
        self.level = level
        self.message = message
        self.extra: dict[str, Any] | None = kwargs or None

    @classmethod
    def exception(cls, message: str, **kwargs: object) -> Message:
        """Return an EXCEPTION message; it raises at the caller."""
        return cls(Level.EXCEPTION, message, **kwargs)

    @classmethod
    def error(cls, message: str, **kwargs: object) -> Message:
        """Return an ERROR message."""
        return cls(Level.ERROR, message, **kwargs)

    @classmethod
    def warn(cls, message: str, **kwargs: object) -> Message:
        """Return a WARN message."""
        return cls(Level.WARN, message, **kwargs)

    @classmethod
    def info(cls, message: str, **kwargs: object) -> Message:
        """Return an INFO message."""
        return cls(Level.INFO, message, **kwargs)

    @classmethod
    def debug(cls, message: str, **kwargs: object) -> Message:
        """Return a DEBUG message."""
        return cls(Level.DEBUG, message, **kwargs)

    @classmethod
    def trace(cls, message: str, **kwargs: object) -> Message:
        """Return a TRACE message."""
        return cls(Level.TRACE, message, **kwargs)

    @classmethod
    def from_exception(cls, exc: BaseException, *, include_traceback: bool = True) -> Message:
        """Return the EXCEPTION message of an exception: type, text, code, kind, details and traceback."""
        text = exception_str(exc)
        kind, details = error_kind_of(exc), error_details_of(exc)
        extra: dict[str, Any] = {
            "exception_type": type(exc).__name__,
            "exception_message": text,
            "error_code": str(error_code_of(exc)),
        }
        if kind:
            extra["error_kind"] = kind
        if details and encode_error_details(details) is not None:
            extra["error_details"] = details
        if include_traceback:
            extra |= _log_traceback(exc)
        return cls(Level.EXCEPTION, f"{type(exc).__name__}: {text}", **extra)

    def add_to_metadata(self, metadata: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return a copy of `metadata` with the keys of this message; TypeError when an extra is not JSON."""
        found = dict(metadata or {})
        found[LOG_LEVEL_KEY.decode()] = self.level.value
        found[LOG_MESSAGE_KEY.decode()] = self.message
        if not self.extra:
            return found
        found[LOG_EXTRA_KEY.decode()] = _log_json(self.extra)
        if isinstance(self.extra.get("error_kind"), str):
            found[ERROR_KIND_KEY.decode()] = self.extra["error_kind"]
        if self.level is Level.EXCEPTION:
            if isinstance(self.extra.get("error_code"), str):
                found[ERROR_CODE_KEY.decode()] = self.extra["error_code"]
            details = encode_error_details(self.extra.get("error_details") or ())
            if details is not None:
                found[ERROR_DETAILS_KEY.decode()] = details
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Message):
            return NotImplemented
        return (self.level, self.message, self.extra) == (other.level, other.message, other.extra)

    def __repr__(self) -> str:
        extra = "".join(f", {key}={value!r}" for key, value in (self.extra or {}).items())
        return f"Message({self.level}, {self.message!r}{extra})"


def _log_json(extra: dict[str, Any]) -> str:
    """The ASCII JSON of the extras; a lone surrogate becomes "?", since most JSON readers refuse its escape."""
    import json

    text = json.dumps(extra)
    if "\\ud" not in text:
        return text
    return json.dumps(json.loads(json.dumps(extra, ensure_ascii=False).encode(errors="replace")))


def _log_cut(text: str, what: str) -> str:
    return text if len(text) <= MAX_TRACEBACK_CHARS else f"{text[:MAX_TRACEBACK_CHARS]}\n… <{what} truncated>"


def _log_traceback(exc: BaseException) -> dict[str, Any]:
    """The traceback keys of an error, cut to a size that fits into metadata."""
    import traceback

    def text(of: BaseException) -> str:
        return _log_cut("".join(traceback.format_exception(type(of), of, of.__traceback__, chain=False)), "traceback")

    found: dict[str, Any] = {"traceback": text(exc)}
    if exc.__cause__ is not None:
        found["cause"] = text(exc.__cause__)
    elif exc.__context__ is not None and not exc.__suppress_context__:
        found["context"] = text(exc.__context__)
    frames = traceback.extract_tb(exc.__traceback__, limit=-MAX_TRACEBACK_FRAMES)
    found["frames"] = [
        {"file": frame.filename, "line": frame.lineno, "function": frame.name, "code": frame.line or None}
        for frame in frames
    ]
    return found


def _log_metadata_bytes(message: Message, server_id: str = "", request_id: str = "") -> dict[bytes, bytes]:
    """The complete metadata of a log or error batch; valid UTF-8, and short enough for every reader."""
    found = _log_encoded(message)
    if max(map(len, found.values())) > _LOG_ENTRY_BYTES:
        found = _log_encoded(_log_shortened(message))
    if server_id:
        found[SERVER_ID_KEY] = server_id.encode(errors="replace")
    if request_id:
        found[REQUEST_ID_KEY] = request_id.encode(errors="replace")
    return found


def _log_encoded(message: Message) -> dict[bytes, bytes]:
    return {key.encode(): value.encode(errors="replace") for key, value in message.add_to_metadata().items()}


def _log_shortened(message: Message) -> Message:
    """The same message with its texts cut; extras that are no text, or still too many, are left out."""
    extra: dict[str, Any] = {}
    for key, value in (message.extra or {}).items():
        if isinstance(value, str):
            extra[key] = _log_cut(value, "traceback" if key in ("traceback", "cause", "context") else "text")
        elif key == "error_details" and encode_error_details(value) is not None:
            extra[key] = value
    short = Message(message.level, _log_cut(message.message, "text"))
    short.extra = extra if extra and len(_log_json(extra)) <= _LOG_ENTRY_BYTES else None
    return short


def _log_from_wire(metadata: Mapping[bytes, bytes]) -> Message | RpcError:
    """What a log batch says: a Message, or for EXCEPTION the error to raise. Any bytes are read (wire.md section 5)."""
    level, extra = _log_text(metadata, LOG_LEVEL_KEY), _log_extra(metadata.get(LOG_EXTRA_KEY))
    if level == Level.EXCEPTION.value:
        return _log_error(metadata, extra)
    found = Message(Level.__members__.get(level, Level.INFO), _log_text(metadata, LOG_MESSAGE_KEY))
    shown = {str(key): str(value) for key, value in extra.items()}
    for name, key in (("server_id", SERVER_ID_KEY), ("request_id", REQUEST_ID_KEY)):
        if key in metadata:
            shown[name] = _log_text(metadata, key)
    found.extra = shown or None
    return found


def _log_text(metadata: Mapping[bytes, bytes], key: bytes) -> str:
    return metadata.get(key, b"").decode(errors="replace")


def _log_error(metadata: Mapping[bytes, bytes], extra: dict[str, Any]) -> RpcError:
    """The error of an EXCEPTION batch; a key of its own goes before its mirror in the extras."""
    message = _log_text(metadata, LOG_MESSAGE_KEY)
    error = RpcError(
        str(extra.get("exception_type") or Level.EXCEPTION.value),
        message,
        str(extra.get("traceback") or ""),
        request_id=_log_text(metadata, REQUEST_ID_KEY),
        error_code=_log_text(metadata, ERROR_CODE_KEY) or str(extra.get("error_code") or ""),
        error_kind=_log_text(metadata, ERROR_KIND_KEY) or str(extra.get("error_kind") or ""),
        error_details=decode_error_details(metadata.get(ERROR_DETAILS_KEY))
        or _errors_with_type(extra.get("error_details")),
    )
    if error.error_type != DeadlineExceededError.__name__:
        return error
    late = DeadlineExceededError(str(extra.get("exception_message") or message))  # the method looked at its own clock
    late.__dict__ |= vars(error) | {"error_message": late.error_message, "error_code": late.error_code}
    return late


def _log_extra(raw: bytes | None) -> dict[str, Any]:
    """The JSON object of a log batch; {} for anything else."""
    if not raw:
        return {}
    import json

    try:
        found = json.loads(raw.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _log_level_of(exc: BaseException) -> tuple[int, bool]:
    """How a server logs a failed method -> (level, with traceback): by its code (runtime.md section 1.3)."""
    code = error_code_of(exc)
    if code in CLIENT_ERROR_CODES:
        return logging.INFO, False
    if code in TRANSIENT_ERROR_CODES:
        return logging.WARNING, False
    return logging.ERROR, True


# ---- formatters of the server's records

_LOG_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


class VgiJsonFormatter(logging.Formatter):
    """One JSON object per record: timestamp (UTC, milliseconds), level, logger, message, and every `extra` field."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        import json

        return json.dumps(self.fields(record), default=str)

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return what the line holds; the four standard fields cannot be overridden."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        found: dict[str, Any] = {
            "timestamp": f"{seconds}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in record.__dict__.items():
            if key not in _LOG_STANDARD and key not in found:
                found[key] = value
        if record.exc_info and record.exc_info[0] is not None:
            found["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            found["stack_info"] = record.stack_info
        return found


_LOG_ACCESS_ALWAYS = re.split(
    r"\s+",
    "timestamp level logger message server_id protocol protocol_hash method method_type principal auth_domain"
    " authenticated remote_addr duration_ms status error_type error_message error_code dropped_records",
)


class VgiAccessLogFormatter(VgiJsonFormatter):
    """Access records of bounded size: first the claims go, then every optional field; both say `truncated`."""

    def __init__(self, *, max_record_bytes: int = 1_048_576) -> None:
        super().__init__()
        if max_record_bytes <= 0:
            raise ValueError(f"max_record_bytes must be positive, got {max_record_bytes}")
        self._max_record_bytes = max_record_bytes

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        import json

        found = self.fields(record)
        line = json.dumps(found, default=str)
        if len(line) > self._max_record_bytes and found.get("claims"):  # json.dumps escapes: one character, one byte
            line = json.dumps({**found, "claims": {}, "truncated": True}, default=str)
        if len(line) <= self._max_record_bytes:
            return line
        kept = {key: found[key] for key in _LOG_ACCESS_ALWAYS if key in found}
        return json.dumps({**kept, "truncated": "record_too_large"}, default=str)


_LOG_PRIVATE = re.split(
    r"\s+",
    "password token secret key authorization email phone address birthdate gender given_name family_name middle_name"
    " nickname preferred_username picture profile website",
)


def redact_claims(claims: Mapping[str, object]) -> dict[str, object]:
    """Replace the values of private claims by "[redacted]", by name."""

    def private(name: str) -> bool:
        lower = name.lower()
        return lower == "name" or any(word in lower for word in _LOG_PRIVATE)

    return {name: REDACTED if private(str(name)) else value for name, value in claims.items()}


def no_redaction(claims: Mapping[str, object]) -> dict[str, object]:
    """Keep all claims as they are."""
    return dict(claims)


_log_redactor: Callable[[Mapping[str, object]], dict[str, object]] = redact_claims


def set_claim_redactor(redactor: Callable[[Mapping[str, object]], dict[str, object]]) -> None:
    """Choose what happens to claims before they reach a log; `redact_claims` by default."""
    global _log_redactor
    _log_redactor = redactor


def apply_claim_redaction(claims: Mapping[str, object]) -> dict[str, object]:
    """Return the claims as logs may show them; none when the redactor fails."""
    try:
        return dict(_log_redactor(claims))
    except Exception as exc:  # without its text or traceback: they may quote the claims
        _LOG_RPC.warning("the claim redactor failed with %s; claims are left out of the log", type(exc).__name__)
        return {}


# ---- wire-debug text

_LOG_SIZES_ONLY = frozenset({STATE_KEY, CALL_STATE_KEY, LOCATION_KEY, LOCATION_SOURCE_KEY})


def _log_line(text: str) -> str:
    """A foreign text for a line of a log: what could begin another line, or steer a terminal, is escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _log_schema(schema: pa.Schema) -> str:
    names = ", ".join(f"{field.name}: {field.type}"[:200] for field in schema)[:4000]
    return f"({_log_line(names)})" if len(schema) else "(empty)"


def _log_metadata(metadata: Mapping[bytes, bytes] | None) -> str:
    if metadata is None:
        return "None"
    shown = []
    for key, value in metadata.items():
        text = f"<{len(value)} bytes>" if key in _LOG_SIZES_ONLY else value.decode(errors="replace")
        shown.append(f"{key.decode(errors='replace')}={text[:80] + '...' if len(text) > 80 else text!r}")
    return f"{{{', '.join(shown)}}}"


def _log_batch(batch: pa.RecordBatch) -> str:
    size = batch.get_total_buffer_size()
    shape = f"rows={batch.num_rows}, cols={batch.num_columns}, schema={_log_schema(batch.schema)}"
    return f"RecordBatch({shape}, bytes={size})"


def _log_kwargs(kwargs: Mapping[str, Any]) -> str:
    """Names and types; never values."""
    return ", ".join(f"{name}: {type(value).__name__}" for name, value in kwargs.items())


# ==== 4. IPC ==========================================================================================================
# Uses: 1, 2. The bytes of a connection (wire.md section 1). A direction is IPC streams back to back:
#
#   stream  = schema message, (dictionary message | batch message)*, ff ff ff ff 00 00 00 00
#   message = ff ff ff ff, int32 size of the metadata, metadata = a flatbuffer `Message`, body
#   Message = slots: 0 version (4 = V5), 1 kind (1 schema, 2 dictionary, 3 batch), 2 header, 3 body size, 4 metadata
#
# Message boundaries are found by hand, so that one read may hold half a message or ten, nothing is consumed beyond a
# stream's end, and every size is checked before memory is allocated for it. Batches are decoded by pyarrow and
# validated before anyone sees them. A reader reads to the end of its stream; whoever leaves earlier must poison the
# connection, because the next reader would take the rest for its own answer.
#
# The gate. All that a peer sends passes `_IpcReader`, in both directions, also streams inside values, shared memory
# and stored objects. What is refused, and where:
#
#   _ipc_metadata_size    not Arrow; metadata over the limit                         the connection ends
#   _ipc_parse            no V5, no size, a body over the limit                      the connection ends
#   _ipc_parse            compressed, overlapping buffers; a key twice, or too long  IPCError: this stream only
#   _ipc_read_schema      big-endian; too wide, too deep; parts that are shared      IPCError
#   _IpcDictionaries      dictionaries over the limit, all of a stream together      IPCError
#   _IpcReader._batch     what pyarrow refuses, or its validation; hollow rows       IPCError
#   _ipc_fit              a cast that is not in the table, or too large              TypeError, IPCError
#   _ipc_unfold           a column that becomes too large as Python values           IPCError
#
# A schema is compared before a value is read: by room 9 for requests and results, by room 5 for records, by room 12
# for the inputs of streams.
#
# What is remembered, all of it bounded: `_ipc_read_schema` (128 small schemas of peers), `_ipc_per_schema` (256 of our
# own), `_ipc_compile` (256 schemas), heads of an _IpcCanonical (32 KiB each), layouts of requests (a server's, 8 MiB)
# and of replies (16 for a method). The first three and a server's layouts are shared between threads.


class IpcValidation(enum.Enum):
    """How thoroughly batches of a peer are checked; FULL finds invalid UTF-8 and wrong offsets."""

    NONE = "none"
    STANDARD = "standard"
    FULL = "full"

    @classmethod
    def from_env(cls, default: IpcValidation | None = None) -> IpcValidation:
        """Read VGI_RPC_IPC_VALIDATION; an unknown word warns and means FULL."""
        raw = os.environ.get("VGI_RPC_IPC_VALIDATION", "").strip().lower()
        if not raw:
            return default or cls.FULL
        try:
            return cls(raw)
        except ValueError:
            import warnings

            warnings.warn(
                f"VGI_RPC_IPC_VALIDATION={raw!r} is none of none, standard, full; using full",
                RuntimeWarning,
                stacklevel=2,
            )
            return cls.FULL


def validate_batch(batch: pa.RecordBatch, ipc_validation: IpcValidation) -> None:
    """Check a batch of a peer; IPCError when it is invalid."""
    if ipc_validation is IpcValidation.NONE:
        return
    try:
        batch.validate(full=ipc_validation is IpcValidation.FULL)
    except (pa.ArrowException, ValueError) as exc:
        raise IPCError(f"IPC batch validation failed: {exc}") from exc


_IPC_SCHEMA, _IPC_DICTIONARY, _IPC_BATCH = 1, 2, 3
_IPC_V5 = 4
_IPC_LARGE = 65_536  # above: read into one buffer of the final size; below: whatever one read brought
_IPC_EAGER = 64 << 20  # above: address space that is committed only as bytes arrive
_IPC_U16 = struct.Struct("<H").unpack_from
_IPC_I32 = struct.Struct("<i").unpack_from
_IPC_U32 = struct.Struct("<I").unpack_from
_IPC_I64 = struct.Struct("<q").unpack_from
_IPC_MARKER = b"\xff\xff\xff\xff"

_IpcMetadata = dict[bytes, bytes]
_IpcPiece: TypeAlias = "bytes | pa.Buffer"
_IpcMessages: TypeAlias = "bytes | list[_IpcPiece]"  # whole messages, in one piece or in several


class IpcLimits(_NamedTuple):
    """What a peer may send, and what that may unfold into; each refusal names the field that would allow it.

    `max_message_bytes` bounds the body of one message, all dictionaries that a stream holds, and what a batch becomes
    when it is cast; as Python values it may be 24 times larger. None: whatever arrives, and 64 times that (64 MiB at
    least) unfolded.
    """

    max_metadata_bytes: int = 16 << 20  # flatbuffer of one message
    max_columns: int = 10_000
    max_nesting: int = 64
    max_metadata_entry_bytes: int = 1 << 20  # one custom metadata key or value
    max_message_bytes: int | None = None


class _IpcMessage(_NamedTuple):
    kind: int
    data: _IpcPiece  # the whole message, contiguous
    metadata: _IpcMetadata | None


class _IpcAbout(_NamedTuple):
    """What the metadata of a message says."""

    kind: int
    body: int  # its size
    metadata: _IpcMetadata | None
    flaw: str  # why its content is refused


class _IpcSource:
    """Bytes from a peer; what has arrived and is not consumed yet is `buf[pos:]`. This one holds a complete body."""

    __slots__ = ("buf", "limits", "pos")

    def __init__(self, data: bytes = b"", limits: IpcLimits = IpcLimits()) -> None:  # noqa: B008 (immutable)
        self.buf = data
        self.pos = 0
        self.limits = limits

    def more(self, missing: int) -> None:
        """Append what the peer sends next to `buf`, of which `missing` bytes are needed; EOFError at its end."""
        raise EOFError(f"the data ends {missing} bytes before the end of an IPC message")

    def take(self, size: int, head: int) -> _IpcPiece:
        """Consume `size` bytes as one contiguous buffer whose body starts after `head` bytes."""
        while len(self.buf) - self.pos < size:
            if size > _IPC_LARGE:
                return self.take_large(size, head)
            self.more(size - len(self.buf) + self.pos)
        start, self.pos = self.pos, self.pos + size
        return self.buf if size == len(self.buf) else self.buf[start : self.pos]

    def take_large(self, size: int, head: int) -> pa.Buffer:
        """Consume more bytes than are buffered; a connection reads them straight into their final place."""
        raise EOFError(f"the data ends before the end of an IPC message of {size} bytes")

    def skip(self, size: int) -> None:
        """Consume `size` bytes and forget them."""
        while size:
            if self.pos == len(self.buf):
                self.more(size)
            step = min(size, len(self.buf) - self.pos)
            self.pos += step
            size -= step


class _IpcReader:
    """One IPC stream of a source. Create it where the stream begins; call `read` or `drain` until it has ended.

    IPCError: what a message says is refused, and the next message begins where it should (`drain` goes on from there).
    Everything else that is raised means that the source is no longer in step.
    """

    __slots__ = ("_decode", "_hollow", "_learned", "_source", "_validation", "ended", "schema")

    def __init__(self, source: _IpcSource, validation: IpcValidation) -> None:
        message = _ipc_message(source)
        if message is None or message.kind != _IPC_SCHEMA:
            raise pa.ArrowInvalid(f"expected the schema message of an IPC stream, got {_ipc_kind_name(message)}")
        known = _ipc_schema(message.data, source.limits)
        self.schema, self._hollow = known.schema, known.hollow
        self._source = source
        self._validation = validation
        self._decode = _IpcDictionaries(message.data, source.limits) if known.dictionaries else None
        self._learned: _IpcHead | None = None  # how a batch without metadata begins
        self.ended = False

    def read(self) -> tuple[pa.RecordBatch, _IpcMetadata | None] | None:
        """Return the next batch and its custom metadata, or None at the end of the stream."""
        if self._learned is not None and (batch := self._read_learned(self._learned)) is not None:
            return batch, None
        while True:
            message = _ipc_message(self._source)
            if message is None:
                self.ended = True
                return None
            if message.kind == _IPC_DICTIONARY and self._decode is not None:
                self._decode.push(message.data)
                continue
            if message.kind != _IPC_BATCH:
                raise pa.ArrowInvalid(f"unexpected {_ipc_kind_name(message)} inside an IPC stream")
            batch = self._batch(message.data)
            if self._learned is None and self._decode is None and message.metadata is None and _ipc_learning:
                self._learned = _ipc_head(message.data, batch)
            return batch, message.metadata

    def _batch(self, message: _IpcPiece) -> pa.RecordBatch:
        """The gate's last door: what pyarrow reads from a message that has been measured, validated."""
        try:
            if self._decode is not None:
                batch = self._decode.batch(message)
            else:
                batch = ipc.read_record_batch(pa.py_buffer(message), self.schema)
        except (pa.ArrowException, OSError, ValueError) as exc:
            raise IPCError(f"a record batch is malformed: {exc}") from exc
        if self._hollow:  # before what looks at each row
            self._measure(batch)
        validate_batch(batch, self._validation)
        return batch

    def _measure(self, batch: pa.RecordBatch) -> None:
        validate_batch(batch, IpcValidation.STANDARD)  # buffers are as large as they must be
        try:
            size = sum(_ipc_unfolded(batch.column(at)) for at in self._hollow)
        except (pa.ArrowException, LookupError, ValueError) as exc:
            raise IPCError(f"a record batch is malformed: {exc}") from exc
        _ipc_check_unfolded(size, batch.get_total_buffer_size(), self._source.limits, _IPC_OBJECTS)

    def _read_learned(self, learned: _IpcHead) -> pa.RecordBatch | None:
        """Read a batch that begins like an earlier one without metadata, if it is all there."""
        source = self._source
        if source.pos == len(source.buf):
            source.more(8)
        data, pos = source.buf, source.pos
        size = learned.match(data, pos, source.limits.max_message_bytes)
        if not size or len(data) - pos < size:
            return None
        source.pos += size
        if learned.tick:
            return empty_batch(EMPTY_SCHEMA)
        return self._batch(data if len(data) == size else data[pos : pos + size])

    def tick_waits(self) -> bool:
        """Whether the next message is a tick that has arrived already."""
        learned = self._learned
        return learned is not None and learned.tick and self._source.buf.startswith(learned.first, self._source.pos)

    def drain(self) -> None:
        """Consume the rest of the stream without decoding it."""
        if not self.ended:
            _ipc_drain(self._source)
            self.ended = True


class _IpcHead:
    """The metadata of a batch message without custom metadata: fixed bytes, and the holes between them."""

    __slots__ = ("_fixed", "_size", "_unpack", "first", "tick")

    def __init__(self, meta: bytes, shape: _IpcShape | None) -> None:
        """`meta` with the prefix; no shape: a tick, which has no holes."""
        self.first, self.tick, self._size = meta, shape is None, len(meta)
        if shape is None:
            return
        form, at, fixed = "<", 0, []
        for start, size, hole in (
            (shape.body_size, 8, "Q"),
            (shape.rows, 8, "8x"),
            (shape.buffers, 16 * shape.buffer_count, "8xQ" * shape.buffer_count),
            (shape.nodes, 16 * shape.node_count, f"{16 * shape.node_count}x"),
            (len(meta), 0, ""),
        ):
            if start < at:
                raise _IpcUnfamiliar("another order than Arrow C++ has")
            fixed.append(meta[at:start])
            form += f"{start - at}s{hole}"
            at = start + size
        self.first, self._fixed, self._unpack = fixed[0], tuple(fixed[1:]), struct.Struct(form).unpack_from

    def match(self, data: bytes, pos: int, limit: int | None) -> int:
        """Return the size of the message that begins at `pos`; 0 when it is another, or its head is not all there."""
        if not data.startswith(self.first, pos):
            return 0
        if self.tick:
            return self._size
        if len(data) - pos < self._size:
            return 0
        _, body, before_rows, before_buffers, *sizes, before_nodes, tail = self._unpack(data, pos)
        if (before_rows, before_buffers, before_nodes, tail) != self._fixed or sum(sizes) > body:
            return 0
        return self._size + int(body) if body <= (1 << 62 if limit is None else limit) else 0


class _IpcDictionaries:
    """Batches of a schema with dictionaries: pyarrow's stream reader keeps them between batches (wire.md trap 13).

    All that a stream holds count together: those that wait for a batch, and the last of each with its deltas.
    """

    __slots__ = ("_feed", "_held", "_limit", "_reader", "_waiting")

    def __init__(self, schema_message: _IpcPiece, limits: IpcLimits) -> None:
        self._feed = _IpcFeed()
        self._feed.push(schema_message)
        self._reader: Any = None
        self._held: dict[int, int] = {}  # bytes of each dictionary, by its id
        self._waiting = 0  # bytes of those that no batch has used yet
        self._limit = limits.max_message_bytes

    def push(self, message: _IpcPiece) -> None:
        number, delta = _ipc_dictionary(message)
        self._waiting += len(message)
        self._held[number] = len(message) + delta * self._held.get(number, 0)
        total = max(self._waiting, sum(self._held.values()))
        if self._limit is not None and total > self._limit:
            raise IPCError(f"a stream's dictionaries of {total} bytes; the limit is max_message_bytes={self._limit}")
        self._feed.push(message)

    def batch(self, message: _IpcPiece) -> pa.RecordBatch:
        self._feed.push(message)
        self._waiting = 0
        if self._reader is None:
            self._reader = ipc.open_stream(self._feed)
        return self._reader.read_next_batch()


class _IpcFeed(io.RawIOBase):
    """A file of whole messages, served without copying; pyarrow never reads beyond what it was given."""

    def __init__(self) -> None:
        self._queue: collections.deque[memoryview] = collections.deque()

    def push(self, message: _IpcPiece) -> None:
        self._queue.append(memoryview(message))

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> Any:
        if not self._queue:
            return b""
        view = self._queue.popleft()
        if len(view) > size >= 0:
            self._queue.appendleft(view[size:])
        return view[:size] if size >= 0 else view


class _IpcWriter:
    """One IPC stream on its way out: `write` collects pieces of messages, `take` hands them over to be sent."""

    __slots__ = ("_dictionaries", "_pieces", "_schema_message", "_sink", "_stream", "schema")

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._schema_message = _ipc_schema_message(schema)
        self._dictionaries = _ipc_has_dictionaries(schema)
        self._pieces: list[_IpcPiece] = [self._schema_message]
        self._sink: list[_IpcPiece] = []
        self._stream: Any = None

    def write(self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None = None) -> None:
        """Append a batch. A small plain one is one serialize(); all else goes through pyarrow's stream writer."""
        if metadata or self._dictionaries or batch.get_total_buffer_size() > _IPC_LARGE:  # nbytes costs 10 us
            self._pieces += self._gather(batch, metadata)
        else:
            self._pieces.append(batch.serialize())

    def write_ticks(self, count: int) -> None:
        """Append batches without columns, rows or metadata."""
        self._pieces.append(_ipc_tick() * count)

    def close(self) -> None:
        """Append the end-of-stream marker."""
        self._pieces.append(_EOS)

    @property
    def size(self) -> int:
        """Bytes that have not been handed over yet."""
        return sum(map(len, self._pieces))

    def take(self) -> list[_IpcPiece]:
        """Return what has not been handed over yet."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def _gather(
        self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None
    ) -> list[_IpcPiece]:
        key_values = _ipc_key_values(metadata)
        first = self._stream is None
        if first:
            self._stream = new_ipc_stream(_IpcSink(self._sink), self.schema)
        try:
            self._stream.write_batch(batch, custom_metadata=key_values)
        except BaseException:  # half a message, or a schema: begin again with the next batch
            self._stream = None
            self._sink.clear()
            raise
        pieces, self._sink[:] = self._sink[:], []
        return pieces if not first else _ipc_without(pieces, len(self._schema_message))


@functools.cache
def _ipc_tick() -> bytes:
    return bytes(empty_batch(EMPTY_SCHEMA).serialize())


class _IpcSink(io.RawIOBase):
    """Keeps the buffers that pyarrow writes, without copying the large ones."""

    def __init__(self, pieces: list[_IpcPiece]) -> None:
        self._pieces = pieces

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._pieces.append(data)
        return len(data)


def _ipc_message(source: _IpcSource) -> _IpcMessage | None:
    """Read one message; None for the end-of-stream marker."""
    size = _ipc_metadata_size(source)
    if size == 0:
        return None
    if size <= _IPC_LARGE:
        about = _ipc_parse(source.buf[source.pos + 8 : source.pos + 8 + size], source.limits)
        data = source.take(8 + size + about.body, 8 + size)
    else:  # a long head is read into its final place, however slowly it comes
        head = bytes(source.take(8 + size, 8 + size))
        about = _ipc_parse(head[8:], source.limits)
        data = b"".join((head, memoryview(source.take(about.body, 0)))) if about.body else head
    if about.flaw:
        raise IPCError(about.flaw)
    return _IpcMessage(about.kind, data, about.metadata)


def _ipc_head(message: _IpcPiece, batch: pa.RecordBatch) -> _IpcHead | None:
    """How a batch message without custom metadata begins; None when it has parts that a head does not know."""
    meta = bytes(memoryview(message)[: 8 + _IPC_I32(message, 4)[0]])
    if batch.num_columns == 0:
        return _IpcHead(meta, None) if batch.num_rows == 0 and len(meta) == len(message) else None
    try:
        return _IpcHead(meta, _ipc_shape(meta))
    except _IpcUnfamiliar:
        return None


def _ipc_dictionary(message: _IpcPiece) -> tuple[int, bool]:
    """Return (id, whether it is a delta) of a dictionary message."""
    meta = bytes(memoryview(message)[: 8 + _IPC_I32(message, 4)[0]])
    try:
        header = _ipc_ref(meta, 8 + _IPC_U32(meta, 8)[0], 2)
        number, delta = _ipc_slot(meta, header, 0), _ipc_slot(meta, header, 2)
        return (_IPC_I64(meta, number)[0] if number else 0), bool(delta and meta[delta])
    except (struct.error, IndexError) as exc:
        raise pa.ArrowInvalid("malformed flatbuffer in a dictionary message") from exc


def _ipc_drain(source: _IpcSource, most: int | None = None) -> None:
    """Consume messages without keeping them, up to and with the end-of-stream marker; EOFError after `most` of them."""
    for count in itertools.count():
        size = _ipc_metadata_size(source)
        if size == 0:
            return
        if count == most:
            raise EOFError(f"gave up after {most} messages that nobody wanted")
        meta = bytes(source.take(8 + size, 8 + size))[8:]
        source.skip(_ipc_parse(meta, source.limits).body)


def _ipc_metadata_size(source: _IpcSource) -> int:
    """Return the size of a message's metadata, which is in the buffer if it is small; 0 consumes the end marker."""
    while len(source.buf) - source.pos < 8:
        _ipc_check_marker(source)
        source.more(8 - len(source.buf) + source.pos)
    _ipc_check_marker(source)
    size = int(_IPC_I32(source.buf, source.pos + 4)[0])
    if size == 0:
        source.pos += 8
        return 0
    limit = source.limits.max_metadata_bytes
    if not 8 <= size <= limit:
        raise pa.ArrowInvalid(f"a message claims {size} bytes of metadata; the limit is max_metadata_bytes={limit}")
    while size <= _IPC_LARGE and len(source.buf) - source.pos < 8 + size:
        source.more(8 + size - len(source.buf) + source.pos)
    return size


def _ipc_check_marker(source: _IpcSource) -> None:
    """Fail on the first byte that cannot begin a message, instead of waiting for more of what is not Arrow."""
    begin = source.buf[source.pos : source.pos + 4]
    if not _IPC_MARKER.startswith(begin):
        shown = source.buf[source.pos : source.pos + 16]
        http = shown.startswith((b"HTTP/", b"<", b"GET ", b"POST "))
        raise pa.ArrowInvalid(
            f"not an Arrow IPC stream: expected ff ff ff ff, got {shown!r} "
            + (
                "(this is HTTP, whose client is http_connect, or --url)"
                if http
                else "(another protocol, or a print() to stdout: nothing may print before run_server())"
            )
        )


def _ipc_parse(meta: bytes, limits: IpcLimits) -> _IpcAbout:
    """Read a Message flatbuffer. ArrowInvalid: nobody can say where the next message begins; else content has flaws."""
    metadata, flaw = None, ""
    try:
        table = _IPC_U32(meta, 0)[0]
        version = _ipc_slot(meta, table, 0)
        if (_IPC_U16(meta, version)[0] if version else 0) != _IPC_V5:
            raise pa.ArrowInvalid("only metadata version V5 of Arrow IPC is read")
        at = _ipc_slot(meta, table, 1)
        kind = meta[at] if at else 0
        at = _ipc_slot(meta, table, 3)
        body = _IPC_I64(meta, at)[0] if at else 0
        if body < 0 or (kind == _IPC_SCHEMA and body):
            raise pa.ArrowInvalid(f"a message claims a body of {body} bytes")
        limit = limits.max_message_bytes
        if limit is not None and body > limit:
            raise pa.ArrowInvalid(f"a message claims a body of {body} bytes; the limit is max_message_bytes={limit}")
        at = _ipc_ref(meta, table, 4)
        try:
            metadata = _ipc_custom_metadata(meta, at, limits) if at else None
            if kind != _IPC_SCHEMA:
                _ipc_check_buffers(meta, table, kind, body)
        except IPCError as exc:
            flaw = str(exc)
    except (struct.error, IndexError) as exc:
        raise pa.ArrowInvalid("malformed flatbuffer in an IPC message") from exc
    return _IpcAbout(kind, body, metadata, flaw)


def _ipc_check_buffers(meta: bytes, table: int, kind: int, body: int) -> None:
    """Refuse a batch or dictionary whose buffers are compressed, or have more bytes than its body."""
    header = _ipc_ref(meta, table, 2)
    if header and kind == _IPC_DICTIONARY:
        header = _ipc_ref(meta, header, 1)
    if not header:
        raise IPCError("a message without its header")
    if _ipc_slot(meta, header, 3):
        raise IPCError("compressed Arrow buffers are not read; write without IpcWriteOptions(compression=...)")
    if at := _ipc_ref(meta, header, 2):
        sizes = struct.unpack_from(f"<{2 * _IPC_U32(meta, at)[0]}q", meta, at + 4)[1::2]
        if sum(sizes) > body or min(sizes, default=0) < 0:
            raise IPCError(f"buffers of {sum(sizes)} bytes in a body of {body}: they overlap, or leave it")


def _ipc_slot(meta: bytes, table: int, slot: int) -> int:
    """Position of a table's slot, 0 when absent. Negative positions are refused: unpack_from would wrap around."""
    vtable = table - _IPC_I32(meta, table)[0]
    if vtable < 0:
        raise pa.ArrowInvalid("malformed flatbuffer in an IPC message")
    entry = 4 + 2 * slot
    if entry >= _IPC_U16(meta, vtable)[0]:
        return 0
    offset: int = _IPC_U16(meta, vtable + entry)[0]
    return table + offset if offset else 0


def _ipc_ref(meta: bytes, table: int, slot: int) -> int:
    """Position of the table, vector or string that a slot refers to, 0 when it is absent."""
    at = _ipc_slot(meta, table, slot)
    return at + int(_IPC_U32(meta, at)[0]) if at else 0


def _ipc_custom_metadata(meta: bytes, vector: int, limits: IpcLimits) -> _IpcMetadata:
    """Read the key/value vector. Entries may share bytes, so their sum is bounded and not only each of them."""
    found: _IpcMetadata = {}
    total = 0
    count = _IPC_U32(meta, vector)[0]
    for entry in range(vector + 4, vector + 4 + 4 * count, 4):
        table = entry + _IPC_U32(meta, entry)[0]
        key, value = _ipc_string(meta, table, 0), _ipc_string(meta, table, 1)
        if max(len(key), len(value)) > limits.max_metadata_entry_bytes:
            raise IPCError(
                f"a custom metadata entry of {max(len(key), len(value))} bytes; the limit is"
                f" max_metadata_entry_bytes={limits.max_metadata_entry_bytes}"
            )
        total += len(key) + len(value) + 8
        if total > len(meta):
            raise IPCError("custom metadata entries overlap in an IPC message")
        if key in found:  # readers differ in which of them counts
            raise IPCError(f"the custom metadata key {key[:80]!r} is there twice")
        found[key] = value
    return found


def _ipc_string(meta: bytes, table: int, slot: int) -> bytes:
    at = _ipc_ref(meta, table, slot)
    if not at:
        return b""
    end = at + 4 + _IPC_U32(meta, at)[0]
    if end > len(meta):
        raise pa.ArrowInvalid("malformed flatbuffer in an IPC message")
    return meta[at + 4 : end]


class _IpcSchema(_NamedTuple):
    """A schema of a peer, and what its batches need."""

    schema: pa.Schema
    dictionaries: bool  # any column or nested field is one
    hollow: tuple[int, ...]  # columns of which rows may take no bytes of a message, or all name the same ones


_IPC_SCHEMA_BYTES = 8192  # larger schema messages are read each time: with the 128 that are kept, at most 1 MiB
_IPC_FIELD_BYTES = 32  # the least that a field takes in a schema message


def _ipc_schema(message: _IpcPiece, limits: IpcLimits) -> _IpcSchema:
    """Decode a schema message; IPCError for one that is too large, too deep or not little-endian."""
    key = bytes(message)
    read = _ipc_read_schema if len(key) <= _IPC_SCHEMA_BYTES else _ipc_read_schema.__wrapped__
    return read(key, limits.max_columns, limits.max_nesting)


@functools.lru_cache(128)  # schemas repeat on every call
def _ipc_read_schema(message: bytes, max_columns: int, max_nesting: int) -> _IpcSchema:
    try:
        _ipc_measure_schema(message[8:], max_columns, max_nesting)
        schema = ipc.read_schema(pa.py_buffer(message))
        if any([_ipc_holds(dtype, _ipc_is_unknown) for dtype in schema.types]):
            raise IPCError(f"pyarrow has no Python class for a type of the schema {schema}"[:500])
        hollow = tuple(i for i, dtype in enumerate(schema.types) if _ipc_holds(dtype, _ipc_is_loose))
        return _IpcSchema(schema, _ipc_has_dictionaries(schema), hollow)
    except (struct.error, IndexError) as exc:
        raise IPCError("malformed flatbuffer in a schema message") from exc
    except (pa.ArrowException, OSError, ValueError) as exc:
        raise IPCError(f"a schema message is malformed: {exc}") from exc


def _ipc_measure_schema(meta: bytes, max_columns: int, max_nesting: int) -> None:
    """Count columns, nesting and texts before pyarrow recurses into them: in a flatbuffer, tables may share parts.

    Schema: slots 0 endianness, 1 fields. Field: 0 name, 2 and 3 type, 5 children, 6 metadata. Type: 1 the time zone
    of a timestamp (10), the codes of a union (14).
    """
    header = _ipc_ref(meta, _IPC_U32(meta, 0)[0], 2)
    if not header:
        raise IPCError("a schema message without a schema")
    if (endianness := _ipc_slot(meta, header, 0)) and _IPC_U16(meta, endianness)[0]:
        raise IPCError("big-endian Arrow data is not read")
    fields = _ipc_ref(meta, header, 1)
    todo = [(fields, 1)] if fields else []
    total = texts = 0
    while todo:
        vector, depth = todo.pop()
        count = _IPC_U32(meta, vector)[0]
        total += count
        if count > max_columns or total > 16 * max_columns:
            raise IPCError(
                f"a schema of {max(count, total)} columns and nested fields; the limit is"
                f" max_columns={max_columns}, with 16 nested fields each"
            )
        if count and depth > max_nesting:
            raise IPCError(f"a schema nested deeper than max_nesting={max_nesting}")
        for entry in range(vector + 4, vector + 4 + 4 * count, 4):
            field = entry + _IPC_U32(meta, entry)[0]
            texts += _ipc_field_texts(meta, field)
            if children := _ipc_ref(meta, field, 5):
                todo.append((children, depth + 1))
        if total * _IPC_FIELD_BYTES + texts > len(meta) + _IPC_LARGE:
            raise IPCError(f"a schema message of {len(meta)} bytes unfolds into more: its fields share parts")


def _ipc_field_texts(meta: bytes, field: int) -> int:
    """Bytes of a field's texts: its name, its metadata, and what its type has."""
    size = len(_ipc_string(meta, field, 0))
    at = _ipc_slot(meta, field, 2)
    if at and meta[at] in (10, 14) and (table := _ipc_ref(meta, field, 3)):
        size += len(_ipc_string(meta, table, 1))
    if vector := _ipc_ref(meta, field, 6):
        for entry in range(vector + 4, vector + 4 + 4 * min(_IPC_U32(meta, vector)[0], len(meta)), 4):
            table = entry + _IPC_U32(meta, entry)[0]
            size += 32 + len(_ipc_string(meta, table, 0)) + len(_ipc_string(meta, table, 1))
            if size > len(meta) + _IPC_LARGE:
                break
    return size


# ---- what a batch unfolds into
#
# Rows of some types take less of a message than of anything that is made of them: null, struct<>, dictionary, run-end
# encoded, unions, views. What such a column becomes is counted before it is cast or turned into Python values.
#
#   declared                     also accepted, if every value fits             never
#   intN, uintN                  integers of another size or sign               text, bool, float
#   float, double                smaller floats, integers                       text, decimal
#   utf8, large_utf8             each other, utf8_view                          binary, numbers
#   binary, large_binary         each other, binary_view                        utf8
#   list, large_list             each other, fixed_size_list; elements          list views
#   struct, map                  children by this table, of the same names
#   timestamp, time, duration    another unit, the same zone                    integers, text
#   decimal128(p, s)             another precision, the same scale              text, integers
#   T                            dictionary<i, T>; null, where T is nullable
#   dictionary<i, T>             T, dictionary<j, T>

_IPC_INTEGERS = frozenset(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
_IPC_CASTS: dict[str, frozenset[str]] = {
    **dict.fromkeys(_IPC_INTEGERS, _IPC_INTEGERS),
    "float": _IPC_INTEGERS | {"halffloat"},
    "double": _IPC_INTEGERS | {"halffloat", "float"},
    "string": frozenset(("large_string", "string_view")),
    "large_string": frozenset(("string", "string_view")),
    "binary": frozenset(("large_binary", "binary_view")),
    "large_binary": frozenset(("binary", "binary_view")),
    "list": frozenset(("list", "large_list", "fixed_size_list")),
    "large_list": frozenset(("list", "large_list", "fixed_size_list")),
    "struct": frozenset(("struct",)),
    "map": frozenset(("map",)),
}
# What a cast may change in a name.
_IPC_UNIT = re.compile(r"(?<=^time)\d\d\[\w+|\[(s|ms|us|ns)\b|(?<=^decimal128)\(\d+")
_IPC_TEXTS = frozenset(("string", "large_string", "string_view", "binary", "large_binary", "binary_view"))


def _ipc_fit(batch: pa.RecordBatch, schema: pa.Schema, limits: IpcLimits) -> pa.RecordBatch:
    """Cast the columns of a peer to a schema of the same names; TypeError for what the table or a value forbids.

    The size of the result is estimated before (IPCError), and it is validated after.
    """
    if batch.schema.equals(schema):
        return batch
    validate_batch(batch, IpcValidation.FULL)  # kernels trust their input
    size = 0
    for field, column in zip(schema, batch.columns, strict=True):
        if not _ipc_castable(column.type, field.type):
            raise TypeError(f"column '{field.name}' is {column.type}, which is not cast to {field.type}")
        if column.null_count and not field.nullable:
            raise TypeError(f"column '{field.name}' has nulls, and its declaration allows none")
        size += _ipc_cast_size(column, field.type)
    _ipc_check_unfolded(size, batch.get_total_buffer_size(), limits)
    try:
        columns = [_ipc_cast(column, dtype) for dtype, column in zip(schema.types, batch.columns, strict=True)]
        found = pa.RecordBatch.from_arrays(columns, schema=schema)
    except (pa.ArrowException, ValueError) as exc:
        raise TypeError(f"a value does not fit: {exc}") from exc
    validate_batch(found, IpcValidation.FULL)
    return found


def _ipc_cast(column: Any, dtype: pa.DataType) -> Any:
    """Cast in two steps where pyarrow has no kernel for one: views in dictionaries, or to them (polars writes both)."""
    if column.type.equals(dtype):  # casting to the same type is not always the same
        return column
    if pa.types.is_dictionary(column.type):
        values = _ipc_cast(column.dictionary, dtype.value_type if pa.types.is_dictionary(dtype) else dtype)
        column = pa.DictionaryArray.from_arrays(column.indices, values)
    elif pa.types.is_dictionary(dtype):
        column = _ipc_cast(column, dtype.value_type)
    return column.cast(dtype)


_IPC_NESTED = {  # the text of a nested type holds that of all within it: asked at every level, it costs the square
    dtype.id: str(dtype).partition("<")[0]
    for dtype in (
        pa.list_(pa.null()),
        pa.large_list(pa.null()),
        pa.list_(pa.null(), 1),
        pa.list_view(pa.null()),
        pa.large_list_view(pa.null()),
        pa.struct([]),
        pa.map_(pa.int8(), pa.null()),
        pa.dictionary(pa.int8(), pa.null()),
        pa.run_end_encoded(pa.int16(), pa.null()),
        pa.sparse_union([]),
        pa.dense_union([]),
    )
}


def _ipc_name(dtype: pa.DataType) -> str:
    """The name of a type without what is nested in it."""
    return _IPC_NESTED.get(dtype.id) or ("extension" if isinstance(dtype, pa.BaseExtensionType) else str(dtype))


def _ipc_castable(have: pa.DataType, want: pa.DataType) -> bool:
    """Whether the table above has this cast."""
    if have.equals(want) or pa.types.is_null(have):
        return True
    if pa.types.is_dictionary(have) or pa.types.is_dictionary(want):
        plain = [dtype.value_type if pa.types.is_dictionary(dtype) else dtype for dtype in (have, want)]
        return _ipc_castable(*plain)
    old, new = _ipc_name(have), _ipc_name(want)
    if "extension" in (old, new):
        return False
    if old not in _IPC_CASTS.get(new, ()):
        return not want.num_fields and _IPC_UNIT.sub("", old) == _IPC_UNIT.sub("", new)
    if have.num_fields != want.num_fields:
        return False
    pairs = [(have.field(i), want.field(i)) for i in range(want.num_fields)]
    named = new == "struct"  # the names of elements and entries say nothing
    return all((h.name == w.name or not named) and _ipc_castable(h.type, w.type) for h, w in pairs)


def _ipc_cast_size(array: Any, want: pa.DataType) -> int:
    """Bytes that a cast makes, estimated."""
    rows = len(array)
    if pa.types.is_dictionary(want):  # the codes change, or are made
        values = array.dictionary if pa.types.is_dictionary(array.type) else array
        return rows * _ipc_row_bytes(want.index_type) + _ipc_unfolded(values)
    if pa.types.is_dictionary(array.type):
        return _ipc_unfolded(array)
    children = _ipc_children(array)
    if not children:
        return max(rows * _ipc_row_bytes(want), _ipc_unfolded(array))
    own = rows if pa.types.is_struct(want) else 8 * rows
    return own + sum(_ipc_cast_size(child, want.field(i).type) for i, child in enumerate(children))


def _ipc_row_bytes(dtype: pa.DataType) -> int:
    """Bytes of a row without its texts and elements."""
    if pa.types.is_fixed_size_list(dtype):
        return 1 + int(dtype.list_size) * _ipc_row_bytes(dtype.value_type)
    if pa.types.is_struct(dtype):
        return 1 + sum(_ipc_row_bytes(dtype.field(i).type) for i in range(dtype.num_fields))
    if pa.types.is_primitive(dtype) or pa.types.is_decimal(dtype) or pa.types.is_fixed_size_binary(dtype):
        return max(int(dtype.bit_width) // 8, 1)
    return 8


def _ipc_unfold(array: pa.Array[Any], limits: IpcLimits) -> pa.Array[Any]:
    """The array, if the limits allow what it becomes as Python values; else IPCError."""
    if array.type.num_fields or _ipc_holds(array.type, _ipc_is_folded):
        size = _ipc_unfolded(array) + _ipc_objects(array)
        _ipc_check_unfolded(size, array.get_total_buffer_size(), limits, _IPC_OBJECTS)
    return array


# How much larger Python values may be than the data: a list of small records takes 23 times its bytes.
_IPC_OBJECTS = 24


def _ipc_check_unfolded(size: int, arrived: int, limits: IpcLimits, factor: int = 1) -> None:
    limit = limits.max_message_bytes
    if size <= (max(_IPC_EAGER, 64 * arrived) if limit is None else factor * limit):
        return
    hint = "" if limit is not None else "; a larger one allows more"
    raise IPCError(f"{arrived} bytes unfold into {size}; the limit is max_message_bytes={limit}{hint}")


def _ipc_objects(array: Any) -> int:
    """Bytes of the Python objects that as_py() makes, without the data in them; measured, and rounded up."""
    dtype, rows = array.type, len(array)
    if isinstance(dtype, pa.BaseExtensionType):
        return _ipc_objects(array.storage)
    name = _ipc_name(dtype)
    if name.endswith("list_view"):
        return 64 * rows + 300 * _ipc_sum(array.sizes)
    if name in ("dictionary", "run_end_encoded") or name.endswith("_union"):
        return 300 * rows
    if name == "map":
        return 64 * rows + 160 * len(array.items) + _ipc_objects(array.keys) + _ipc_objects(array.items)
    each = {"null": 8, "bool": 8, "struct": 280}.get(name, 64 if dtype.num_fields or name in _IPC_TEXTS else 36)
    return each * rows + sum(map(_ipc_objects, _ipc_children(array)))


def _ipc_is_folded(dtype: pa.DataType) -> bool:
    kinds = "_view", "dictionary", "run_end", "_union"
    return _ipc_is_hollow(dtype) or any(kind in _ipc_name(dtype) for kind in kinds)


def _ipc_is_unknown(dtype: pa.DataType) -> bool:
    """Whether pyarrow reads arrays of the type and raises KeyError when one is looked at."""
    return _ipc_name(dtype) in ("month_interval", "day_time_interval")


def _ipc_is_loose(dtype: pa.DataType) -> bool:
    return _ipc_is_hollow(dtype) or _ipc_name(dtype).endswith("_view")


def _ipc_is_hollow(dtype: pa.DataType) -> bool:
    """Whether rows take no bytes at all."""
    if pa.types.is_fixed_size_binary(dtype):
        return bool(dtype.byte_width == 0)
    if pa.types.is_fixed_size_list(dtype):
        return bool(dtype.list_size == 0)
    return bool(pa.types.is_null(dtype) or (pa.types.is_struct(dtype) and dtype.num_fields == 0))


def _ipc_holds(dtype: pa.DataType, test: Callable[[pa.DataType], bool]) -> bool:
    """Whether a type or one nested in it passes; UnicodeDecodeError for a field's name that is not UTF-8."""
    if test(dtype):
        return True
    if isinstance(dtype, pa.BaseExtensionType):
        return _ipc_holds(dtype.storage_type, test)
    if pa.types.is_dictionary(dtype):
        return _ipc_holds(dtype.value_type, test)
    children = [dtype.field(i) for i in range(dtype.num_fields)]
    return any([child.name is None or _ipc_holds(child.type, test) for child in children])


def _ipc_children(array: Any) -> list[Any]:
    if pa.types.is_struct(array.type) or pa.types.is_union(array.type):
        return [array.field(i) for i in range(array.type.num_fields)]
    return [array.values] if array.type.num_fields else []


def _ipc_unfolded(array: Any) -> int:
    """Bytes when each row has a value of its own; a bound from above where exact numbers cost more."""
    dtype, rows = array.type, len(array)
    if isinstance(dtype, pa.BaseExtensionType):
        return _ipc_unfolded(array.storage)
    name = _ipc_name(dtype)
    children = [array.dictionary] if name == "dictionary" else _ipc_children(array)
    if name in ("string_view", "binary_view"):
        return 8 * rows + _ipc_sum(_ipc_lengths(array))
    if name == "dictionary" and str(dtype.value_type) in _IPC_TEXTS:
        picked = _ipc_sum(_ipc_lengths(array.dictionary).take(array.indices))
        return 8 * rows + picked + _ipc_unfolded(array.dictionary)
    if name.endswith("_view"):
        return 8 * rows + _ipc_sum(array.sizes) * _ipc_widest(children[0])
    if name == "dictionary" or name == "run_end_encoded" or name.endswith("_union"):
        return 8 * rows + rows * max(map(_ipc_widest, children), default=0)
    if children or _ipc_is_hollow(dtype):
        return sum(map(_ipc_unfolded, children), 8 * rows)
    return int(array.nbytes)


def _ipc_widest(array: Any) -> int:
    """Bytes of the longest text, or all bytes of nested values."""
    if str(array.type) not in _IPC_TEXTS:
        return _ipc_row_bytes(array.type) if array.type.num_fields == 0 else _ipc_unfolded(array)
    return max(_ipc_lengths(array).drop_null().to_pylist(), default=0)


def _ipc_lengths(array: Any) -> Any:
    """The length of each text or binary value."""
    import pyarrow.compute as pc

    if "view" not in str(array.type):
        return pc.call_function("binary_length", [array])
    views = pa.Array.from_buffers(pa.int32(), 4 * len(array), [None, array.buffers()[1]], offset=4 * array.offset)
    lists = pa.FixedSizeListArray.from_arrays(views, 4)
    return pc.call_function("abs", [pc.call_function("list_element", [lists, pa.scalar(0)])])  # a view begins with it


def _ipc_sum(numbers: Any) -> int:
    return int(numbers.cast(pa.int64()).sum().as_py() or 0)


def _ipc_schema_message(schema: pa.Schema) -> bytes:
    return bytes(schema.serialize())


def _ipc_has_dictionaries(schema: pa.Schema) -> bool:
    """Look at every field; UnicodeDecodeError for a name that is not UTF-8."""
    return any([field.name is None or _ipc_holds(field.type, pa.types.is_dictionary) for field in schema])


def _ipc_key_values(metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None) -> pa.KeyValueMetadata | None:
    if not metadata:
        return None
    return metadata if isinstance(metadata, pa.KeyValueMetadata) else pa.KeyValueMetadata(metadata)


def _ipc_pieces(messages: _IpcMessages) -> list[_IpcPiece]:
    return [messages] if isinstance(messages, bytes) else messages


def _ipc_without(pieces: list[_IpcPiece], size: int) -> list[_IpcPiece]:
    """Drop the first `size` bytes, which are whole pieces: the schema message that pyarrow wrote once more."""
    at = 0
    while size > 0:
        size -= len(memoryview(pieces[at]))
        at += 1
    if size:
        raise AssertionError("pyarrow wrote a schema message of another size")
    return pieces[at:]


def _ipc_kind_name(message: _IpcMessage | None) -> str:
    if message is None:
        return "an end of stream"
    return {_IPC_SCHEMA: "a schema", _IPC_DICTIONARY: "a dictionary", _IPC_BATCH: "a record batch"}.get(
        message.kind, f"a message of kind {message.kind}"
    )


# ---- batches as values

IPC_WRITE_OPTIONS: Final = ipc.IpcWriteOptions(compression=None, emit_dictionary_deltas=False)
IPC_READ_OPTIONS: Final = ipc.IpcReadOptions()


def new_ipc_stream(sink: Any, schema: pa.Schema) -> ipc.RecordBatchStreamWriter:
    """Return a stream writer with the only options every implementation reads (PORTABILITY.md section 1)."""
    return ipc.new_stream(sink, schema, options=IPC_WRITE_OPTIONS)


def _ipc_per_schema(make: Callable[[pa.Schema], _T]) -> Callable[[pa.Schema], _T]:
    """Remember what is made of our own schemas, by identity: hashing one costs more than asking pyarrow again."""
    known: dict[int, tuple[pa.Schema, _T]] = {}

    @functools.wraps(make)
    def cached(schema: pa.Schema) -> _T:
        found = known.get(id(schema))
        if found is not None:
            return found[1]
        if len(known) >= 256:
            known.clear()
        made = make(schema)
        known[id(schema)] = schema, made  # the schema stays alive, so its id is not reused
        return made

    return cached


@_ipc_per_schema
def empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    """Return the zero-row batch of a schema, any type; cached."""
    return _ipc_empty(schema)


def _ipc_empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([_ipc_empty_array(field.type) for field in schema], schema=schema)


def _ipc_empty_array(dtype: pa.DataType) -> pa.Array[Any]:
    """Build an array without values. pa.nulls() is wrong for run ends inside others, and aborts for some unions."""
    if isinstance(dtype, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(dtype, _ipc_empty_array(dtype.storage_type))
    if not _ipc_holds(dtype, _ipc_is_odd):
        return pa.nulls(0, dtype)
    if isinstance(dtype, pa.DictionaryType):
        index, values = _ipc_empty_array(dtype.index_type), _ipc_empty_array(dtype.value_type)
        return pa.DictionaryArray.from_arrays(index, values, ordered=dtype.ordered)
    children = [_ipc_empty_array(dtype.field(i).type) for i in range(dtype.num_fields)]
    return pa.Array.from_buffers(dtype, 0, [None, *[pa.py_buffer(_IPC_ZERO)] * (dtype.num_buffers - 1)], 0, 0, children)


def _ipc_is_odd(dtype: pa.DataType) -> bool:
    return bool(
        isinstance(dtype, pa.BaseExtensionType) or pa.types.is_union(dtype) or pa.types.is_run_end_encoded(dtype)
    )


def _ipc_without_rows(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A user's batch as it can be written: pyarrow gives negative sizes to empty slices that another library made."""
    return batch if batch.num_rows or not batch.num_columns else _ipc_empty(batch.schema)


def serialize_record_batch(
    destination: Any, batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None = None
) -> None:
    """Write a batch as a complete IPC stream."""
    with new_ipc_stream(destination, batch.schema) as writer:
        writer.write_batch(_ipc_without_rows(batch), custom_metadata=custom_metadata)


def serialize_record_batch_bytes(batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None = None) -> bytes:
    """Return a batch as a complete IPC stream."""
    sink = pa.BufferOutputStream()
    serialize_record_batch(sink, batch, custom_metadata)
    return bytes(sink.getvalue())


# What a stream inside a value may unfold into: the limits of the connection that brought it.
_ipc_limits = contextvars.ContextVar("vgi_rpc_limits", default=IpcLimits())  # noqa: B039 (immutable)


def deserialize_record_batch(
    data: bytes, ipc_validation: IpcValidation = IpcValidation.FULL
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None]:
    """Read the first batch of an IPC stream; no data and no batch give an empty one.

    Raises pa.ArrowInvalid (not a stream) or IPCError (what the stream says is refused).
    """
    if not data:
        return empty_batch(EMPTY_SCHEMA), None
    try:
        reader = _IpcReader(_IpcSource(data, _ipc_limits.get()), ipc_validation)
        item = reader.read()
    except EOFError as exc:
        raise pa.ArrowInvalid(f"an IPC stream is cut short: {exc}") from exc
    return (_ipc_empty(reader.schema), None) if item is None else (item[0], _ipc_key_values(item[1]))


def _ipc_schema_value(data: bytes) -> pa.Schema:
    """The schema that a value holds as its message; pa.ArrowInvalid or IPCError when it holds none."""
    source = _IpcSource(data, _ipc_limits.get())
    try:
        message = _ipc_message(source)
    except EOFError as exc:
        raise pa.ArrowInvalid(f"a schema message is cut short: {exc}") from exc
    if message is None or message.kind != _IPC_SCHEMA or data[source.pos :] not in (b"", _EOS):
        raise pa.ArrowInvalid(f"expected one schema message, got {_ipc_kind_name(message)} in {len(data)} bytes")
    return _ipc_schema(message.data, source.limits).schema


# ---- learned layouts (hot-path law 3; FINDINGS.md section 3)
#
# A one-row stream of one schema is always the same bytes, except for the body and three holes in front of it: the
# body's size, the nodes (length and null count of each array) and the buffers (offset and size of each).
#
#   _IpcCanonical   the layout that pyarrow writes. What is in the holes follows from the sizes of the values, so both
#                   directions compute it: writing puts it there, reading demands it. Columns become compiled code.
#
# Whatever is unfamiliar (a value of another type, a null in an element, more than one row) is "no match", and the one
# pyarrow path decides.
#
#   type                          buffers of an array                          handled
#   integer, float                validity, values                             yes
#   bool                          validity, bits                               not as an element
#   utf8, binary                  validity, offsets, bytes                     yes (large_*: no)
#   list<T>                       validity, offsets, then T                    T integer, float, utf8, binary, list
#   map<K, V>                     validity, offsets, (entries) validity, K, V  likewise
#   dictionary<int16, utf8>       validity, indices; dictionary message        one entry, top level; read by _IpcLayout

_IPC_FIXED = {
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "float": "f",
    "double": "d",
}
_IPC_PAD = tuple(b"\0" * (-i % 8) for i in range(8))
_IPC_ZERO = b"\0" * 8
_IPC_PACK_I64 = struct.Struct("<q").pack_into
_IPC_LAYOUTS_MAX = 16  # per schema or method; what does not fit stays on the pyarrow path
_IPC_DEADLINE = b"%016d" % 9_876_543_210_123_456  # a value to find again where the deadline will be
_ipc_learning = os.environ.get("VGI_RPC_FAST_PATH", "1") != "0"  # the tests run once with and once without


class _IpcUnfamiliar(Exception):
    """Not what the layout or template knows; the pyarrow path decides."""


class _IpcShape(_NamedTuple):
    """Where the holes of a batch or dictionary message are, relative to its start."""

    head: int
    body_size: int
    rows: int
    nodes: int
    node_count: int
    buffers: int
    buffer_count: int


def _ipc_shape(message: bytes) -> _IpcShape:
    """Find the holes of one batch or dictionary message; refuses what a layout cannot describe."""
    head = 8 + _IPC_I32(message, 4)[0]
    meta = message[:head]
    table = 8 + _IPC_U32(meta, 8)[0]
    header = _ipc_ref(meta, table, 2)
    if meta[_ipc_slot(meta, table, 1)] == _IPC_DICTIONARY:
        if _ipc_slot(meta, header, 2):
            raise _IpcUnfamiliar("a delta")
        header = _ipc_ref(meta, header, 1)
    rows, nodes, buffers = _ipc_slot(meta, header, 0), _ipc_ref(meta, header, 1), _ipc_ref(meta, header, 2)
    body_size = _ipc_slot(meta, table, 3)
    compressed, variadic = (_ipc_slot(meta, header, slot) for slot in (3, 4))
    if not (nodes and buffers) or compressed or variadic:
        raise _IpcUnfamiliar("no plain rows")
    if _IPC_U32(meta, nodes)[0] and not (rows and body_size):
        raise _IpcUnfamiliar("no rows")
    return _IpcShape(
        head, body_size, rows, nodes + 4, _IPC_U32(meta, nodes)[0], buffers + 4, _IPC_U32(meta, buffers)[0]
    )


def _ipc_split(stream: bytes) -> list[bytes]:
    """Cut one complete stream into its messages, without the end-of-stream marker."""
    source = _IpcSource(stream)
    messages = []
    while (message := _ipc_message(source)) is not None:
        messages.append(bytes(memoryview(message.data)))
    if source.pos != len(stream):
        raise _IpcUnfamiliar("more than one stream")
    return messages


# -- the usual layout


class _IpcCanonical:
    """One-row streams of a schema as pyarrow writes them: numbers, bool, utf8, binary, lists, maps, and their nulls.

    Everything in front of the body follows from the sizes of the values. Writing computes it; reading computes what
    it would have to be for the sizes found, and demands equal bytes: what is accepted is what we would have written.

        encode(values, deadline=b"") -> the complete stream, or None when pyarrow has to look at the values
        match(data, pos) -> (the row, the position after the stream), or None: another layout, or not all there
    """

    def __init__(self, code: _IpcCode, messages: list[bytes], deadline: bytes | None) -> None:
        """`messages` are what pyarrow wrote; `deadline` is a metadata value that differs from message to message."""
        schema, *dictionaries, batch = messages
        shape = self._shape = _ipc_shape(batch)
        self._code = code
        self.words = [_IpcWord(message) for message in dictionaries]
        self.schema = schema if dictionaries else b""  # else part of the head
        self._template = (b"" if dictionaries else schema) + batch[: shape.head]
        self.body = len(self._template)
        self.nulls = self.body - shape.head + shape.nodes + 8
        self._buffers = struct.Struct("<" + "8xq" * shape.buffer_count).unpack_from
        self.deadline_at = -1 if deadline is None else self._template.find(deadline)
        self.heads: dict[tuple[int, ...], tuple[bytes, bytes]] = {}
        self.head = self.place((0,) * code.sizes)
        self.encode: Callable[..., _IpcMessages | None] = functools.partial(code.encode, self)
        self.match: Callable[[bytes, int], tuple[Sequence[Any], int] | None] = functools.partial(code.match, self)

    def deadline(self, data: bytes, pos: int) -> bytes:
        """Return the 16 digits of a stream that matches."""
        at = self._begin(data, pos) + self.deadline_at
        return data[at : at + 16]

    def buffer_bytes(self, data: bytes, pos: int, end: int) -> int:
        """`get_total_buffer_size()` of the batch in a stream that matches, or that this one wrote."""
        if self.words:
            return int(ipc.open_stream(data[pos:end]).read_next_batch().get_total_buffer_size())
        return sum(self._buffers(data, pos + self.body - self._shape.head + self._shape.buffers))

    def _begin(self, data: bytes, pos: int) -> int:
        """Where the head of the batch begins."""
        pos += len(self.schema)
        for word in self.words:
            pos = cast("tuple[str, int]", word.read(data, pos))[1]
        return pos

    def place(self, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
        """Return what is in front of the body for values of these sizes, before and after the deadline."""
        shape, head, hole = self._shape, bytearray(self._template), self.deadline_at
        nodes, buffers, size = self._code.place(*sizes)
        if len(nodes) != 2 * shape.node_count or len(buffers) != 2 * shape.buffer_count:
            raise _IpcUnfamiliar("other arrays than pyarrow has")
        at = self.body - shape.head
        if nodes:
            _IPC_PACK_I64(head, at + shape.body_size, size)
            struct.pack_into(f"<{len(nodes)}q", head, at + shape.nodes, *nodes)
            struct.pack_into(f"<{len(buffers)}q", head, at + shape.buffers, *buffers)
        if len(self.heads) * len(head) > _IPC_HEADS_BYTES:
            self.heads.clear()
        found = (bytes(head), b"") if hole < 0 else (bytes(head[:hole]), bytes(head[hole + 16 :]))
        self.heads[sizes] = found
        return found


_IPC_HEADS_BYTES = 32_768  # of computed heads, which a layout remembers by their sizes


class _IpcCode(_NamedTuple):
    """What is compiled for the columns of a schema."""

    encode: Callable[..., _IpcMessages | None]
    match: Callable[[_IpcCanonical, bytes, int], tuple[Sequence[Any], int] | None]
    place: Callable[..., tuple[tuple[int, ...], tuple[int, ...], int]]  # sizes -> nodes, buffers, size of the body
    sizes: int  # how many numbers `place` takes


class _IpcCompiler:
    """Writes the source of `_IpcCode` column by column: straight lines are twice as fast as calls through closures.

    The three functions meet the same sizes in the same order: the bytes of a text, the elements of a list, whether a
    column is null. `self` in them is an _IpcCanonical. Nothing of a peer becomes source text: not even the names of
    columns are looked at.
    """

    _NAMES: ClassVar[dict[str, Any]] = {
        "accumulate": itertools.accumulate,
        "pack": struct.pack,
        "unpack": struct.unpack_from,
        "ends": struct.Struct("<ii").pack,
        "ends_of": struct.Struct("<ii").unpack_from,
        "PAD": _IPC_PAD,
        "NULL": (b"", _IPC_ZERO),
        "EOS": _EOS,
        "join": b"".join,
        "error": struct.error,
        **{f"{kind.__name__}s": {kind} for kind in (int, float, str, bytes, list, tuple)},
    }

    def __init__(self, schema: pa.Schema) -> None:
        self._names = dict(self._NAMES)
        self._sizes: list[str] = []
        self._write: list[str] = []
        self._pieces: list[str] = []
        self._read: list[str] = []
        self._place: list[str] = []
        self._nodes: list[str] = []
        self._buffers: list[str] = []
        self._run: list[tuple[str, str]] = []  # neighbours of fixed width: one struct
        self._words: list[str] = []
        self._unique = 0
        self._nullable = False
        self._row = "".join(f"v{i}, " for i in range(len(schema)))
        for i, field in enumerate(schema):
            self._column(f"v{i}", field)
        self._flush()

    def compile(self) -> _IpcCode:
        """Return the functions; linecache knows their source, so that a traceback shows it."""
        import linecache

        sizes = "".join(f"{name}, " for name in self._sizes)
        nodes, buffers = ("".join(f"{each}, " for each in part) for part in (self._nodes, self._buffers))
        source = [
            *self._function("encode(self, values, deadline=b'')", self._encode_lines(sizes)),
            *self._function("match(self, data, pos)", self._match_lines(sizes)),
            *self._function(f"place({sizes})", ["at = 0", *self._place, f"return ({nodes}), ({buffers}), at"]),
        ]
        text = "\n".join(source)
        name = f"<vgi_rpc layout {hash(text) & 0xFFFFFFFF:08x}>"
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        exec(compile(text, name, "exec"), self._names)
        names = self._names
        return _IpcCode(names["encode"], names["match"], names["place"], len(self._sizes))

    def _function(self, head: str, lines: list[str]) -> list[str]:
        wrong = ["except (error, OverflowError, ValueError, IndexError):", "    return None"]
        return [f"def {head}:", "    try:", *(f"        {line}" for line in lines), *(f"    {line}" for line in wrong)]

    def _head(self, sizes: str) -> str:
        return f"self.heads.get(({sizes})) or self.place(({sizes}))" if sizes else "self.head"

    def _encode_lines(self, sizes: str) -> list[str]:
        before = "".join(f"self.words[{i}].write({name}), " for i, name in enumerate(self._words))
        before = f"self.schema, {before}first, deadline, rest" if before else "first, deadline, rest"
        pieces = "".join(f"{piece}, " for piece in self._pieces)
        lines = [f"{self._row}= values" if self._row else "() = values", *self._write]
        lines.append(f"first, rest = {self._head(sizes)}")
        if sizes:  # large ones are left in pieces: joining would copy
            lines.append(f"if {' + '.join(self._sizes)} > {_IPC_LARGE}: return [join(({before})), {pieces}EOS]")
        return [*lines, f"return join(({before}, {pieces}EOS))"]

    def _match_lines(self, sizes: str) -> list[str]:
        lines = []
        if self._words:
            lines = ["if not data.startswith(self.schema, pos): return None", "pos += len(self.schema)"]
        for i, name in enumerate(self._words):
            lines += [f"word = self.words[{i}].read(data, pos)", "if word is None: return None", f"{name}, pos = word"]
        checked = "if not data.startswith(first, pos): return None"
        if not sizes:
            lines += [f"first, rest = {self._head(sizes)}", checked]
        lines += ["at = pos + self.body", *["nulls = pos + self.nulls"] * self._nullable, *self._read]
        if sizes:
            lines += [f"first, rest = {self._head(sizes)}", checked]
        return [
            *lines,
            "if not data.startswith(EOS, at): return None",
            "if rest and not data.startswith(rest, pos + self.deadline_at + 16): return None",
            f"return ({self._row}), at + 8",
        ]

    def _new(self, prefix: str) -> str:
        self._unique += 1
        return f"{prefix}{self._unique}"

    def _size(self) -> str:
        name = self._new("n")
        self._sizes.append(name)
        return name

    def _buffer(self, size: str) -> None:
        """A buffer of `size` bytes, padded to 8."""
        name = self._new("b")
        self._place += [f"{name} = at", f"at += {_ipc_padding(size)}"]
        self._buffers.append(f"{name}, {size}")

    def _refuse(self, condition: str) -> None:
        self._write.append(f"if {condition}: return None")

    def _column(self, name: str, field: pa.Field[Any]) -> None:
        """One value, with its null: a validity bitmap that is there only when it is needed."""
        kind = _ipc_kind(field.type)
        other = f"type({name}) is not {kind}" + f" and type({name}) is not dict" * pa.types.is_map(field.type)
        if not field.nullable or pa.types.is_dictionary(field.type):
            self._refuse(other)
            self._nodes.append("1, 0")
            self._buffer("0")
            return self._value(name, field.type)
        self._flush()
        self._nullable = True
        null = self._size()
        self._write += [f"{null} = {name} is None", f"if {null}: {name} = {kind}()"]
        self._refuse(other)
        self._pieces.append(f"NULL[{null}]")
        self._read += [
            f"{null} = data[nulls + {16 * len(self._nodes)}]",
            f"if {null}:",
            f"    if {null} > 1 or data[at] & 1: return None",
            "    at += 8",
        ]
        self._nodes.append(f"1, {null}")
        self._buffer(null)
        self._value(name, field.type)
        self._flush()
        self._read.append(f"if {null}: {name} = None")

    def _value(self, name: str, dtype: pa.DataType) -> None:
        code = "?" if pa.types.is_boolean(dtype) else _IPC_FIXED.get(str(dtype))
        if code is not None:
            self._run.append((name, code))
            self._buffer(str(struct.calcsize(code)))
            return
        self._flush()
        if pa.types.is_dictionary(dtype):  # one entry, which stands in a message of its own
            self._pieces.append("NULL[1]")
            self._read += ["if data[at] or data[at + 1]: return None", "at += 8"]
            self._words.append(name)
            self._buffer("2")
        elif pa.types.is_list(dtype) or pa.types.is_map(dtype):
            self._container(name, dtype)
        else:
            self._text(name, pa.types.is_string(dtype))

    def _flush(self) -> None:
        """End a run of columns of fixed width."""
        run, self._run = self._run, []
        if not run:
            return
        row = self._new("s")
        self._names[row] = struct.Struct("<" + "".join(_ipc_padded(code.replace("?", "B")) for _, code in run))
        names = ", ".join(name for name, _ in run)
        self._pieces.append(f"{row}.pack({names})")
        self._read += [f"{names}, = {row}.unpack_from(data, at)", f"at += {8 * len(run)}"]
        self._read += [f"{name} = {name} & 1 == 1" for name, code in run if code == "?"]  # the other bits are padding

    def _text(self, name: str, text: bool) -> None:
        """One utf8 or binary value: two offsets, then its bytes."""
        size = self._size()
        if text:
            self._write.append(f"{name} = {name}.encode()")
        self._write.append(f"{size} = len({name})")
        self._pieces += [f"ends(0, {size})", name, f"PAD[{size} & 7]"]
        self._read += [
            f"begin, {size} = ends_of(data, at)",
            f"if begin or {size} < 0: return None",
            f"{name} = data[at + 8 : at + 8 + {size}]{'.decode()' if text else ''}",
            f"at += 8 + {_ipc_padding(size)}",
        ]
        self._buffer("8")
        self._buffer(size)

    def _container(self, name: str, dtype: pa.DataType) -> None:
        """One list or map: two offsets, then its elements."""
        size = self._size()
        self._write.append(f"{size} = len({name})")
        self._pieces.append(f"ends(0, {size})")
        self._read += [f"begin, {size} = ends_of(data, at)", f"if begin or {size} < 0: return None", "at += 8"]
        self._buffer("8")
        if pa.types.is_list(dtype):
            self._elements(name, dtype.value_type, size)
            self._read.append(f"{name} = list({name})")
            return
        keys, items = self._new("k"), self._new("k")
        self._write += [
            f"if type({name}) is dict: {keys}, {items} = list({name}), list({name}.values())",
            f"elif set(map(type, {name})) - tuples: return None",
            f"else: {keys}, {items} = [key for key, _ in {name}], [item for _, item in {name}]",
        ]
        self._nodes.append(f"{size}, 0")
        self._buffer("0")
        self._elements(keys, dtype.key_type, size)
        self._elements(items, dtype.item_type, size)
        self._read.append(f"{name} = list(zip({keys}, {items}))")

    def _elements(self, name: str, dtype: pa.DataType, count: str) -> None:
        """Any number of values of one exact Python type, none of them None."""
        self._nodes.append(f"{count}, 0")
        self._buffer("0")
        self._refuse(f"set(map(type, {name})) - {_ipc_kind(dtype)}s")
        code = _IPC_FIXED.get(str(dtype))
        if code is not None:
            size = f"{count} * {struct.calcsize(code)}"
            self._pieces += [f"pack(f'<{{{count}}}{code}', *{name})", f"PAD[{size} & 7]"]
            self._read += [f"{name} = unpack(f'<{{{count}}}{code}', data, at)", f"at += {_ipc_padding(size)}"]
            self._buffer(size)
        elif pa.types.is_string(dtype) or pa.types.is_binary(dtype):
            self._texts(name, pa.types.is_string(dtype), count)
        elif pa.types.is_list(dtype):
            self._lists(name, dtype, count)
        else:
            raise _IpcUnfamiliar(str(dtype))

    def _offsets(self, name: str, count: str) -> tuple[str, str]:
        """The offsets of the elements in `name` -> (name of the offsets, name of the last of them)."""
        offsets, last = self._new("o"), self._size()
        self._write += [f"{offsets} = [0, *accumulate(map(len, {name}))]", f"{last} = {offsets}[-1]"]
        size = f"({count} + 1) * 4"
        self._pieces += [f"pack(f'<{{{count} + 1}}i', *{offsets})", f"PAD[{size} & 7]"]
        self._read += [
            f"{offsets} = unpack(f'<{{{count} + 1}}i', data, at)",
            f"at += {_ipc_padding(size)}",
            f"{last} = {offsets}[-1]",
            f"if {offsets}[0] or sorted({offsets}) != list({offsets}): return None",
        ]
        self._buffer(size)
        return offsets, last

    def _texts(self, name: str, text: bool, count: str) -> None:
        if text:
            self._write.append(f"{name} = [value.encode() for value in {name}]")
        offsets, last = self._offsets(name, count)
        self._pieces += [f"b''.join({name})", f"PAD[{last} & 7]"]
        decode = ".decode()" if text else ""
        self._read += [
            f"{name} = [data[at + x : at + y]{decode} for x, y in zip({offsets}, {offsets}[1:])]",
            f"at += {_ipc_padding(last)}",
        ]
        self._buffer(last)

    def _lists(self, name: str, dtype: pa.DataType, count: str) -> None:
        offsets, last = self._offsets(name, count)
        inner = self._new("k")
        self._write.append(f"{inner} = [item for value in {name} for item in value]")
        self._elements(inner, dtype.value_type, last)
        self._read.append(f"{name} = [list({inner}[x:y]) for x, y in zip({offsets}, {offsets}[1:])]")


def _ipc_kind(dtype: pa.DataType) -> str:
    """The one Python type whose values a column takes as they are; _IpcUnfamiliar: pyarrow has to look at them."""
    code = _IPC_FIXED.get(str(dtype))
    if code is not None:
        return "float" if code in "fd" else "int"
    if pa.types.is_boolean(dtype):
        return "bool"
    if pa.types.is_string(dtype) or dtype == pa.dictionary(pa.int16(), pa.utf8()):
        return "str"
    if pa.types.is_binary(dtype):
        return "bytes"
    if pa.types.is_list(dtype) or pa.types.is_map(dtype):
        return "list"
    raise _IpcUnfamiliar(str(dtype))


def _ipc_padding(size: str) -> str:
    """Source of a size together with what fills it up to 8 bytes."""
    return f"{size} + (-({size}) & 7)"


def _ipc_padded(code: str) -> str:
    """A value of fixed width and its padding, as struct spells it."""
    return f"{code}{8 - struct.calcsize(code)}x"


@functools.lru_cache(256)
def _ipc_compile(schema: pa.Schema) -> _IpcCode:
    return _IpcCompiler(schema).compile()


def _ipc_template(schema: pa.Schema, metadata: _IpcMetadata | None) -> _IpcCanonical | None:
    """What writes one-row streams of a schema with constant metadata, or None when pyarrow has to write them."""
    if not _ipc_learning:
        return None
    deadline = _IPC_DEADLINE if metadata and DEADLINE_KEY in metadata else None
    try:
        return _IpcCanonical(_ipc_compile(schema), _ipc_split(_ipc_sample_stream(schema, metadata)), deadline)
    except (_IpcUnfamiliar, TypeError):  # TypeError: an extension type without a hash
        return None


def _ipc_learn(sample: bytes, batch: pa.RecordBatch, deadline: bytes | None = None) -> _IpcCanonical | None:
    """Learn how a stream looks that pyarrow has read; it must read the same from it, or it is not learned."""
    if not _ipc_learning or len(sample) > _IPC_LARGE or (deadline is not None and sample.count(deadline) != 1):
        return None
    if batch.num_rows > 1 or batch.schema.metadata or any([field.metadata for field in batch.schema]):
        return None  # with metadata, a peer could make any number of schemas that mean the same
    try:
        validate_batch(batch, IpcValidation.FULL)
        messages = _ipc_split(sample)
        layout = _IpcCanonical(_ipc_compile(batch.schema), messages, deadline)
        row = [column[0].as_py() for column in batch.columns]
        found = layout.match(sample, 0)
        return layout if found is not None and list(found[0]) == row and found[1] == len(sample) else None
    except (_IpcUnfamiliar, IPCError, pa.ArrowException, EOFError, struct.error, LookupError, ValueError, TypeError):
        return None


def _ipc_sample_stream(schema: pa.Schema, metadata: _IpcMetadata | None) -> bytes:
    """What pyarrow writes for a row of simple values."""
    arrays = [pa.array([_IPC_SAMPLES[_ipc_kind(field.type)]], type=field.type) for field in schema]
    writer = _IpcWriter(schema)
    writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else empty_batch(schema), metadata)
    writer.close()
    return b"".join(writer.take())


_IPC_SAMPLES = {"int": 0, "float": 0.0, "bool": False, "str": "x", "bytes": b"", "list": []}


class _IpcWord:
    """The dictionary message in front of a batch for one column of an enum: one entry, its text."""

    __slots__ = ("_head", "_known", "_shape")

    def __init__(self, message: bytes) -> None:
        self._shape = _ipc_shape(message)
        self._head = message[: self._shape.head]
        self._known: dict[str, bytes] = {}  # enum members; bounded, because the type also carries any other string

    def write(self, text: str) -> bytes:
        """Return the message of a text."""
        found = self._known.get(text)
        if found is not None:
            return found
        shape, encoded = self._shape, text.encode()
        size, pad = len(encoded), _IPC_PAD[len(encoded) & 7]
        head = bytearray(self._head)
        _IPC_PACK_I64(head, shape.body_size, 8 + size + len(pad))
        struct.pack_into("<2q", head, shape.nodes, 1, 0)
        struct.pack_into("<6q", head, shape.buffers, 0, 0, 0, 8, 8, size)
        data = b"".join((head, struct.pack("<ii", 0, size), encoded, pad))
        if len(self._known) < 64 and len(data) < 1024:
            self._known[text] = data
        return data

    def read(self, data: bytes, pos: int) -> tuple[str, int] | None:
        """Return (the text, the position after it) when the message is what `write` makes of its text."""
        at = pos + self._shape.head
        text = data[at + 8 : at + 8 + max(_IPC_I32(data, at + 4)[0], 0)].decode()
        message = self.write(text)
        return (text, pos + len(message)) if data.startswith(message, pos) else None


# ==== 5. TYPES ========================================================================================================
# Uses: 1, 2, 4. Python annotations <-> Arrow types, values <-> cells (types.md). An annotation is walked once and
# compiled into a codec; per value there is no introspection left. Nothing here reads or writes a connection: a nested
# batch is a value, a complete IPC stream in memory.
#
#   annotation                        parameter or result     dataclass field or element
#   str bytes int float bool          utf8 binary int64 float64 bool
#   datetime date time timedelta      timestamp[us] date32 time64[us] duration[us]
#   list[T] set[T] frozenset[T]       list<item: T>
#   dict[K, V]                        map<K, V>
#   Enum                              dictionary<int16, utf8>, by member name
#   ArrowSerializableDataclass        binary (its IPC stream) struct
#   pa.RecordBatch, pa.Schema         binary
#   Annotated[T, ArrowType(t)]        t
#   T | None                          T, nullable
#
# Sending is strict, because pyarrow is not: it takes "ab" for ["a", "b"], 5 for a date, b"x" for a str, and a null
# among the entries of a map or Decimal("1e-999999999") end the process. So every value is looked at by a codec, of
# its annotation or of its Arrow type alone, and pyarrow is given nothing but what the codec made.
#
#   for              also taken                                          refused
#   int              whole floats and Decimals, IntEnum (its value)      bool, text, fractions
#   float            bool, ints up to 2**53                              text, Decimal, larger ints
#   str, bytes       StrEnum (its value); bytearray, memoryview          each other
#   list, set        any iterable                                        text, bytes, mappings
#   dict             an iterable of pairs                                None as a key
#   datetime, time   NumPy's                                             a zone exactly where the type has one
#   date             NumPy's                                             datetime
#   Enum             its names and values, as text                       members of other enums
#   T                a scalar of Arrow                                   None
#
# Reading believes the schema that was compared (law 9), and takes a null that a peer sends where none should be.


class ArrowType(_Record):
    """Annotated marker: use this Arrow type; `nullable` overrides what the annotation says."""

    __slots__ = __match_args__ = ("arrow_type", "nullable")
    arrow_type: pa.DataType
    nullable: bool | None

    def __init__(self, arrow_type: pa.DataType, nullable: bool | None = None) -> None:
        self._set(arrow_type=arrow_type, nullable=nullable)

    def __repr__(self) -> str:
        return f"ArrowType({self.arrow_type!r}, nullable={self.nullable})"


class Transient(_Record):
    """Annotated marker: this field is not serialised and takes its default when read."""

    __slots__ = ()


# ---- annotations -> codecs

_TypesConvert = Callable[[Any], Any]
_TYPES_ENUM = pa.dictionary(pa.int16(), pa.utf8())
_TYPES_SCALARS: dict[Any, pa.DataType] = {
    str: pa.utf8(),
    bytes: pa.binary(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime.datetime: pa.timestamp("us"),
    datetime.date: pa.date32(),
    datetime.time: pa.time64("us"),
    datetime.timedelta: pa.duration("us"),
    pa.RecordBatch: pa.binary(),
    pa.Schema: pa.binary(),
}
_TYPES_TEXTS = (str, bytes, bytearray, memoryview)


class _TypesCodec(_NamedTuple):
    """An annotation, or an Arrow type alone, compiled."""

    dtype: pa.DataType
    nullable: bool
    encode: _TypesConvert  # a value, not None -> what pa.array and layouts take, made of plain Python types
    decode: _TypesConvert | None = None  # what as_py() gives, not None -> the value; None: as it is
    exact: frozenset[type] = frozenset()  # the types of values that `encode` gives back as they are
    plain: bool = False  # whether values of exactly the annotated types go into a layout as they are

    def cell(self, value: Any) -> Any:
        """Encode a value that may be None."""
        if type(value) in self.exact:
            return value
        if value is None and not self.nullable:
            raise TypeError("got None; annotate T | None to allow it")
        return None if value is None else self.encode(value)

    def value(self, cell: Any) -> Any:
        """Decode a cell that may be None; nothing is said about it: another language may have sent it."""
        return cell if cell is None or self.decode is None else self.decode(cell)

    def takes(self, values: Iterable[Any]) -> bool:
        """Whether these need no conversion."""
        return bool(self.exact) and self.exact.issuperset(map(type, values))


def _types_strip(annotation: Any) -> tuple[Any, bool, ArrowType | None, bool]:
    """Take Annotated, Optional, NewType and `type X = ...` off -> core, nullable, first ArrowType, transient."""
    nullable, explicit, marker, transient = False, None, None, False
    for _ in range(64):  # an alias may stand for itself
        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            for extra in args[1:]:
                transient = transient or isinstance(extra, Transient)
                if isinstance(extra, ArrowType):
                    marker = marker or extra
                    explicit = extra.nullable if explicit is None else explicit
            annotation = args[0]
        elif origin in (typing.Union, types.UnionType):
            members = [arg for arg in args if arg is not type(None)]
            if len(members) != 1:
                break
            annotation, nullable = members[0], True
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif hasattr(origin, "__value__"):  # X[int]
            given = dict(zip(origin.__type_params__, args, strict=False))
            wanted = getattr(origin.__value__, "__parameters__", ())
            annotation = origin.__value__[tuple(map(given.get, wanted))] if wanted else origin.__value__
        elif hasattr(annotation, "__type_params__") and hasattr(annotation, "__value__"):
            annotation = annotation.__value__
        else:
            break
    return annotation, nullable if explicit is None else explicit, marker, transient


def _types_hints(owner: Any, where: str) -> dict[str, Any]:
    """The annotations of a class or function."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except Exception as exc:
        text = f"Failed to resolve type hints for {where}: {exc}"
        if isinstance(exc, NameError) and "<locals>" in getattr(owner, "__qualname__", ""):
            text += ". `from __future__ import annotations` hides classes of a function: move them to module level"
        raise TypeError(text) from exc


def _types_field(name: str, annotation: Any, *, top: bool) -> pa.Field[Any]:
    """The Arrow field of a parameter or result (`top`), or of a dataclass field or element."""
    codec = _types_codec(annotation, top=top)
    return pa.field(name, codec.dtype, nullable=codec.nullable)


def _types_codec(annotation: Any, dtype: pa.DataType | None = None, *, top: bool = False) -> _TypesCodec:
    """Compile the annotation of a parameter or result (`top`), or of a dataclass field or element.

    `dtype` is what an override of the field or the marker of its container demands. TypeError: say it with a marker.
    """
    core, nullable, marker, _ = _types_strip(annotation)
    if dtype is None and marker is not None:
        dtype = marker.arrow_type
    origin, args = typing.get_origin(core), typing.get_args(core)
    try:
        if origin in (list, set, frozenset) and args and (dtype is None or _types_is_list(dtype)):
            item = _types_codec(args[0], None if dtype is None else dtype.value_type)
            return _types_sequence(pa.list_(item.dtype) if dtype is None else dtype, nullable, item, origin)
        if origin is dict and args and (dtype is None or pa.types.is_map(dtype)):
            inner = (None, None) if dtype is None else (dtype.key_type, dtype.item_type)
            key, item = map(_types_codec, args, inner)
            return _types_mapping(pa.map_(key.dtype, item.dtype) if dtype is None else dtype, nullable, key, item)
    except RecursionError:
        raise TypeError(f"{annotation} contains itself; Arrow schemas cannot be recursive") from None
    if _types_is_dataclass(core):
        own, encode, decode = _types_record(core, dtype, top)
    else:
        own, (encode, decode) = _types_infer(core) if dtype is None else dtype, _types_converters(core)
    raw = _types_raw(own)
    if encode is None:
        return raw._replace(dtype=own, nullable=nullable, decode=decode, plain=core in raw.exact)
    if dtype is None:
        return _TypesCodec(own, nullable, encode, decode)
    return _TypesCodec(own, nullable, lambda value: raw.encode(encode(value)), decode)


def _types_infer(core: Any) -> pa.DataType:
    if isinstance(core, type) and (core in _TYPES_SCALARS or issubclass(core, enum.Enum)):
        return _TYPES_SCALARS.get(core, _TYPES_ENUM)
    text = f"Cannot infer Arrow type for: {core}. "
    if core is tuple or typing.get_origin(core) is tuple:
        raise TypeError(
            text + "Arrow has no native heterogeneous-tuple type. Use a nested ArrowSerializableDataclass for fixed"
            " named fields, or list[T] for homogeneous sequences."
        )
    refusal = TypeError(text + "Use Annotated[T, ArrowType(...)] to specify the Arrow type explicitly.")
    if hint := _types_hint(core):
        refusal.add_note(hint)
    raise refusal


def _types_hint(core: Any) -> str:
    """What people usually mean by an annotation that says too little."""
    origin = typing.get_origin(core) or core
    if origin in (list, set, frozenset, dict):
        return f"Say what it holds, as in {origin.__name__}[{'str, ' * (origin is dict)}float]"
    if origin in (typing.Union, types.UnionType):
        return "A value has one type, and perhaps None: T | None"
    if not isinstance(origin, type):
        return ""
    if hasattr(origin, "__dataclass_fields__"):
        return f"A dataclass that travels is a class {origin.__name__}(ArrowSerializableDataclass)"
    if origin.__name__ in ("Table", "DataFrame"):
        return "A table is a pa.RecordBatch (RecordBatch.from_pandas(df)), or a Stream of them (Stream.from_arrow)"
    return "A method that gives many values returns a Stream" if issubclass(origin, Iterator) else ""


def _types_is_dataclass(core: Any) -> bool:
    return isinstance(core, type) and issubclass(core, ArrowSerializableDataclass)


def _types_is_list(dtype: pa.DataType) -> bool:
    return re.match("(large_|fixed_size_)?list", str(dtype)) is not None  # and views


def _types_converters(core: Any) -> tuple[_TypesConvert | None, _TypesConvert | None]:
    """Encode and decode of types that Arrow does not have."""
    partial = functools.partial
    if core is pa.Schema:
        return partial(_types_made, core, _ipc_schema_message), _types_decode_schema
    if core is pa.RecordBatch:
        return partial(_types_made, core, serialize_record_batch_bytes), _types_decode_batch
    if isinstance(core, type) and issubclass(core, enum.Enum):
        return partial(_types_encode_enum, core), partial(_types_decode_enum, core)
    if isinstance(core, type) and hasattr(core, "deserialize_from_bytes"):
        return None, partial(_types_decode_bytes, core, IpcValidation.FULL)
    return None, None


# ---- containers: the same for annotations and for Arrow types


def _types_sequence(dtype: pa.DataType, nullable: bool, item: _TypesCodec, origin: Any = list) -> _TypesCodec:
    def encode(value: Any) -> list[Any]:
        if type(value) is list and item.takes(value):
            return value
        if isinstance(value, (*_TYPES_TEXTS, Mapping)) or not hasattr(value, "__iter__"):
            raise _types_wrong("a list", value)
        return _types_each(item.cell, "element ", enumerate(value))

    def decode(value: Any) -> Any:
        return origin(value if item.decode is None else map(item.value, value))

    same = origin is list and item.decode is None
    return _TypesCodec(dtype, nullable, encode, None if same else decode, plain=item.plain)


def _types_mapping(dtype: pa.DataType, nullable: bool, key: _TypesCodec, item: _TypesCodec) -> _TypesCodec:
    def entry(pair: Any) -> tuple[Any, Any]:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[0] is None:
            raise _types_wrong("a pair of key and value", pair)
        return key.cell(pair[0]), item.cell(pair[1])

    def encode(value: Any) -> list[tuple[Any, Any]]:
        if type(value) is dict and key.takes(value) and item.takes(value.values()):
            return list(value.items())
        if isinstance(value, _TYPES_TEXTS) or not hasattr(value, "__iter__"):
            raise _types_wrong("a dict", value)
        return _types_each(entry, "entry ", enumerate(value.items() if isinstance(value, Mapping) else value))

    def decode(value: Any) -> dict[Any, Any]:
        if key.decode is None and item.decode is None:
            return dict(value)
        return {key.value(name): item.value(each) for name, each in value}

    return _TypesCodec(dtype, nullable, encode, decode, plain=key.plain and item.plain)


def _types_each(convert: _TypesConvert, where: str, values: Iterable[tuple[Any, Any]]) -> list[Any]:
    """Convert values that have a place each, which an error notes."""
    found: list[Any] = []
    for place, value in values:
        try:
            found.append(convert(value))
        except Exception as exc:
            exc.add_note(f"in {where}{place}")
            raise
    return found


# ---- an Arrow type alone -> codec


def _types_cached(make: Callable[[pa.DataType], _T]) -> Callable[[pa.DataType], _T]:
    """lru_cache, which a user's extension types pass by: pa.ExtensionType has no hash."""
    cached = functools.lru_cache(1024)(make)

    @functools.wraps(make)
    def asked(dtype: pa.DataType) -> _T:
        try:
            hash(dtype)
        except TypeError:
            return make(dtype)
        return cached(dtype)

    return asked


@_types_cached
def _types_raw(dtype: pa.DataType) -> _TypesCodec:
    """The codec of values of which only the Arrow type is known; they are read as pyarrow gives them."""
    of = pa.types
    if isinstance(dtype, pa.BaseExtensionType):
        return _types_raw(dtype.storage_type)._replace(dtype=dtype)
    if of.is_dictionary(dtype) or of.is_run_end_encoded(dtype):
        return _types_raw(dtype.value_type)._replace(dtype=dtype)
    if of.is_map(dtype):
        return _types_mapping(dtype, True, _types_child(dtype.key_field), _types_child(dtype.item_field))
    if _types_is_list(dtype):
        return _types_sequence(dtype, True, _types_child(dtype.value_field))
    if of.is_struct(dtype):
        fields = {field.name: _types_child(field) for field in dtype}
        return _TypesCodec(dtype, True, functools.partial(_types_struct, dict, "", fields))
    name = re.sub(r"large_|fixed_size_|_view|[<\d\[].*|^u", "", str(dtype))
    exact, encode = _TYPES_ENCODE.get(name, (None, _types_odd))
    if name in ("decimal", "timestamp"):
        encode = functools.partial(encode, dtype)
    return _TypesCodec(dtype, True, encode, None, frozenset((exact,) if exact else ()), exact is not None)


def _types_child(field: pa.Field[Any]) -> _TypesCodec:
    return _types_raw(field.type)._replace(nullable=field.nullable)


def _types_struct(kind: type, where: str, fields: Mapping[str, _TypesCodec], value: Any) -> dict[str, Any]:
    """Encode the fields of a dict, or of an instance of the kind."""
    value = _types_odd(value)
    get = value.get if isinstance(value, Mapping) else functools.partial(getattr, _types_made(kind, _types_odd, value))
    cells = _types_each(lambda name: fields[name].cell(get(name)), f"field {where}", zip(fields, fields, strict=True))
    return dict(zip(fields, cells, strict=True))


def _types_wrong(wanted: str, value: Any) -> TypeError:
    got = f"{value!r:.40}" if isinstance(value, str | float | decimal.Decimal) else type(value).__name__
    return TypeError(f"expected {wanted}, got {got}")


def _types_odd(value: Any) -> Any:
    """What a member of StrEnum or IntEnum and a scalar of Arrow or NumPy stand for."""
    module = type(value).__module__
    if module == "builtins":
        return value
    if module == "numpy" and getattr(value, "shape", None) == () and value.dtype.kind not in "mM":
        return value.item()
    if isinstance(value, pa.Scalar):
        return value.as_py()
    return value.value if isinstance(value, enum.Enum) and isinstance(value, str | bytes | int | float) else value


def _types_made(kind: type | tuple[type, ...], make: _TypesConvert, value: Any) -> Any:
    """What `make` makes of a value of the kind."""
    value = _types_odd(value)
    if not isinstance(value, kind):
        raise _types_wrong(kind.__name__ if isinstance(kind, type) else kind[0].__name__, value)
    return make(value)


def _types_bytes(value: Any) -> bytes:
    if type(value).__name__ == "UUID":
        return cast(bytes, value.bytes)
    return bytes(value.serialize_to_bytes()) if hasattr(value, "serialize_to_bytes") else _TYPES_BYTES(value)


def _types_int(value: Any) -> int:
    value = _types_odd(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float | decimal.Decimal) and abs(float(value)) < 2**64 and value == int(value):
        return int(value)
    raise _types_wrong("int", value)


def _types_float(limit: int, value: Any) -> float:
    """Ints up to `limit` are exact."""
    value = _types_odd(value)
    if not isinstance(value, (float, int)):
        raise _types_wrong("float", value)
    if isinstance(value, int) and abs(value) > limit:
        raise ValueError(f"expected float, got an int beyond {limit}, which it may not hold exactly")
    return float(value)


def _types_decimal(dtype: Any, value: Any) -> decimal.Decimal:
    """The value with the scale of the type: with exponents that are far from it, pyarrow reads beyond its tables."""
    context = decimal.Context(dtype.precision, traps=[decimal.Inexact, decimal.InvalidOperation])
    unit = decimal.Decimal((0, (1,), -dtype.scale))
    with contextlib.suppress(ArithmeticError):
        found = _types_made((decimal.Decimal, int), decimal.Decimal, value).quantize(unit, context=context)
        if found.is_finite() and not isinstance(value, bool):
            return cast(decimal.Decimal, found)
    raise ValueError(f"expected a number that fits {dtype}")


def _types_temporal(kind: type, zoned: bool, value: Any) -> Any:
    value = _types_odd(value)
    if type(value).__name__ in ("datetime64", "timedelta64") and value == value:  # of NumPy, and not NaT
        return value
    lossy = kind is datetime.date and isinstance(value, datetime.datetime)
    if not isinstance(value, kind) or value != value or lossy:
        raise _types_wrong(kind.__name__, value)
    if (getattr(value, "tzinfo", None) is None) is zoned:
        has = (
            "has a zone; give it a tzinfo" if zoned else "has no zone, but tzinfo is set; pa.timestamp('us', 'UTC') has"
        )
        raise TypeError(f"the type of this {kind.__name__} {has}")
    return value


_TYPES_BYTES = functools.partial(_types_made, _TYPES_TEXTS[1:], bytes)
_TYPES_ENCODE: dict[str, tuple[type | None, Callable[..., Any]]] = {
    "string": (str, functools.partial(_types_made, str, str.__str__)),
    "binary": (bytes, _types_bytes),
    "int": (int, _types_int),
    "halffloat": (float, functools.partial(_types_float, 2**11)),
    "float": (float, functools.partial(_types_float, 2**24)),
    "double": (float, functools.partial(_types_float, 2**53)),
    "bool": (bool, functools.partial(_types_made, bool, bool)),
    "decimal": (None, _types_decimal),
    "timestamp": (None, lambda dtype, value: _types_temporal(datetime.datetime, dtype.tz is not None, value)),
    "date": (None, functools.partial(_types_temporal, datetime.date, False)),
    "time": (None, functools.partial(_types_temporal, datetime.time, False)),
    "duration": (None, functools.partial(_types_temporal, datetime.timedelta, False)),
    "month_day_nano_interval": (None, lambda value: tuple(map(_types_int, value)) if type(value) is list else value),
}  # pyarrow makes no unions of Python values


def _types_checked(data: Mapping[str, Any], schema: pa.Schema) -> Mapping[str, Any]:
    """Columns of Python values as pyarrow may have them: some would end the process."""
    if not (risky := _types_risky(schema)):
        return data
    found = dict(data)
    for name, encode in risky:
        if not isinstance(found.get(name), pa.Array | pa.ChunkedArray | None):
            found[name] = encode(found[name])
    return found


@_ipc_per_schema
def _types_risky(schema: pa.Schema) -> list[tuple[str, _TypesConvert]]:
    fields = [field for field in schema if _ipc_holds(field.type, _types_is_risky)]
    return [(field.name, _types_raw(pa.list_(field)).encode) for field in fields]


def _types_is_risky(dtype: pa.DataType) -> bool:
    return bool(pa.types.is_map(dtype) or pa.types.is_decimal(dtype) or pa.types.is_dictionary(dtype))


# ---- converters of what Arrow does not have


def _types_encode_enum(cls: type[enum.Enum], value: Any) -> str:
    if isinstance(value, enum.Enum):
        if not isinstance(value, cls):
            raise _types_wrong(cls.__name__, value)
        if value.name is None or value.name not in cls.__members__:  # a combination of flags has no name of its own
            raise KeyError(f"{value.name!r} is not a valid {cls.__name__} name or value")
        return value.name
    if not isinstance(value, str):
        raise _types_wrong(cls.__name__, value)
    return str.__str__(value)


def _types_decode_enum(cls: type[enum.Enum], value: Any) -> enum.Enum:
    if not isinstance(value, str):
        raise TypeError(f"Expected str for {cls.__name__}, got {type(value).__name__}")
    member = cls.__members__.get(value)
    if member is not None:
        return member
    try:
        return cls(value)
    except ValueError:
        raise KeyError(f"{value!r} is not a valid {cls.__name__} name or value") from None


def _types_decode_bytes(cls: Any, *validation_and_value: Any) -> Any:
    """Of a dataclass, or of another class that reads itself."""
    *validation, value = validation_and_value
    if not isinstance(value, bytes):
        raise TypeError(f"Expected bytes for {cls.__name__} deserialization, got {type(value).__name__}")
    return cls.deserialize_from_bytes(value, *validation)


def _types_decode_schema(value: Any) -> pa.Schema | None:
    return _ipc_schema_value(value) if value else None  # no bytes: absent (lenient peers)


def _types_decode_batch(value: Any) -> pa.RecordBatch | None:
    return _types_read(value, IpcValidation.FULL) if value else None


def _types_read(data: bytes, validation: IpcValidation) -> pa.RecordBatch:
    """Read a value that is a stream of one batch: nothing may follow."""
    source = _IpcSource(data, _ipc_limits.get())
    try:
        reader = _IpcReader(source, validation)
        item = reader.read()
        if item is not None and source.pos < len(data) and reader.read() is not None:
            raise ValueError("Expected a stream of one batch, but it holds more")
    except EOFError as exc:
        raise pa.ArrowInvalid(f"an IPC stream is cut short: {exc}") from exc
    if source.pos < len(data):
        raise pa.ArrowInvalid(f"{len(data) - source.pos} bytes after the end of an IPC stream")
    return _ipc_empty(reader.schema) if item is None else item[0]


# ---- cells


def _types_cell(value: Any, codec: _TypesCodec) -> pa.Array[Any]:
    """The one-value array of a value."""
    return _types_array(None if value is None else codec.encode(value), codec.dtype)


def _types_array(cell: Any, dtype: pa.DataType) -> pa.Array[Any]:
    """The one-value array of what a codec has encoded."""
    plain = _types_plain(dtype)
    array = pa.array([cell], type=plain)
    if not plain.equals(dtype):
        array = array.cast(dtype)
    return array if isinstance(array, pa.Array) else array.combine_chunks()


@_types_cached
def _types_plain(dtype: pa.DataType) -> pa.DataType:
    """The type with which to build cells.

    pyarrow makes invalid arrays for an absent struct with a dictionary in it, and no nested extension types.
    """

    def plain(field: pa.Field[Any]) -> pa.Field[Any]:
        return field.with_type(_types_plain(field.type))

    if isinstance(dtype, pa.BaseExtensionType):
        return _types_plain(dtype.storage_type)
    if pa.types.is_dictionary(dtype):
        return dtype.value_type
    if pa.types.is_map(dtype):
        return pa.map_(plain(dtype.key_field), plain(dtype.item_field))
    if pa.types.is_list(dtype):
        return pa.list_(plain(dtype.value_field))
    return pa.struct(list(map(plain, dtype))) if pa.types.is_struct(dtype) else dtype


# ---- dataclasses


class _TypesSpec(_NamedTuple):
    """A dataclass, compiled."""

    schema: pa.Schema
    codecs: dict[str, _TypesCodec]  # of the columns
    defaults: dict[str, Callable[[], Any]]  # of fields that may be absent
    encode: Callable[[Any], dict[str, Any]]  # an instance -> its cells
    template: _IpcCanonical | None  # None: pyarrow has to write it, and to read it
    plain: _IpcCanonical | None  # the same, if it takes values as they are


class _TypesSchema:
    """`Cls.ARROW_SCHEMA`, computed at first use and for each class of its own."""

    def __get__(self, instance: object, owner: type[ArrowSerializableDataclass]) -> pa.Schema:
        if owner is ArrowSerializableDataclass:  # help() asks
            raise AttributeError("ARROW_SCHEMA belongs to the dataclasses that are derived from this class")
        return _types_spec(owner).schema


class ArrowSerializableDataclass:
    """Mixin for dataclasses whose fields are Arrow columns; an instance is a one-row IPC stream (types.md section 5).

    `ARROW_SCHEMA` is the class's schema. `_ARROW_FIELD_OVERRIDES` may force Arrow types by field name. Reading
    tolerates unknown columns, another order, and missing columns whose fields have defaults. It puts fields back as
    they were sent: neither `__init__` nor `__post_init__` runs again, and an InitVar is not needed.
    """

    ARROW_SCHEMA: ClassVar[pa.Schema] = cast(pa.Schema, _TypesSchema())
    _ARROW_FIELD_OVERRIDES: ClassVar[dict[str, pa.DataType]] = {}

    def serialize(self, dest: Any) -> None:
        """Write this instance as an IPC stream of one row."""
        dest.write(self.serialize_to_bytes())

    def serialize_to_bytes(self) -> bytes:
        """Return this instance as an IPC stream of one row.

        Raises TypeError, ValueError and the like for a value that is not what its field is annotated with.
        """
        spec = _types_spec(type(self))
        data = None if spec.plain is None else spec.plain.encode([getattr(self, name) for name in spec.codecs])
        if data is None:
            cells = spec.encode(self)
            data = None if spec.template is None else spec.template.encode(list(cells.values()))
            if data is None:
                return serialize_record_batch_bytes(_types_row_batch(self, cells))
        return b"".join(_ipc_pieces(data))

    @classmethod
    def deserialize_from_bytes(cls, data: bytes, ipc_validation: IpcValidation = IpcValidation.FULL) -> Self:
        """Read an instance from an IPC stream of one row.

        Raises ValueError (no row, several rows, missing fields), IPCError or pa.ArrowInvalid (not a valid stream),
        KeyError (unknown enum name), TypeError (a column of another type).
        """
        spec, data = _types_spec(cls), bytes(data)
        found = None if spec.template is None else spec.template.match(data, 0)
        if found is not None and found[1] == len(data):
            row = dict(zip(spec.codecs, found[0], strict=True))
            return _types_restore(cls, row, row.__getitem__)
        return _types_from_batch(cls, _types_read(data, ipc_validation) if data else empty_batch(EMPTY_SCHEMA))

    @classmethod
    def deserialize_from_batch(
        cls,
        batch: pa.RecordBatch,
        custom_metadata: pa.KeyValueMetadata | None = None,
        *,
        ipc_validation: IpcValidation = IpcValidation.FULL,
    ) -> Self:
        """Read an instance from a one-row batch; errors as in `deserialize_from_bytes`."""
        validate_batch(batch, ipc_validation)
        return _types_from_batch(cls, batch)


_types_building = threading.local()  # the classes whose schema is being computed: finds direct recursion


def _types_spec(cls: type) -> _TypesSpec:
    """Compile a dataclass once; kept in the class itself."""
    known = cls.__dict__.get("_vgi_rpc_spec")
    if known is not None:
        return cast(_TypesSpec, known)
    busy: list[type] = _types_building.__dict__.setdefault("classes", [])
    if cls in busy:
        raise TypeError(f"{cls.__name__} contains itself; Arrow schemas cannot be recursive")
    busy.append(cls)
    try:
        spec = _types_compile(cast("type[ArrowSerializableDataclass]", cls))
    finally:
        busy.pop()
    cls._vgi_rpc_spec = spec  # type: ignore[attr-defined]
    return spec


def _types_compile(cls: type[ArrowSerializableDataclass]) -> _TypesSpec:
    import dataclasses

    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__}: must be called with a dataclass type or instance; add @dataclass")
    hints = _types_hints(cls, cls.__name__)
    _types_check_decorated(cls, hints)
    codecs: dict[str, _TypesCodec] = {}
    defaults: dict[str, Callable[[], Any]] = {}
    for field in dataclasses.fields(cls):
        where, hint = f"{cls.__name__}.{field.name}", hints[field.name]
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory
        elif field.default is not dataclasses.MISSING:
            defaults[field.name] = functools.partial(getattr, field, "default")
        if not _types_strip(hint)[3]:
            try:
                codecs[field.name] = _types_codec(hint, cls._ARROW_FIELD_OVERRIDES.get(field.name))
            except TypeError as exc:
                raise TypeError(f"Cannot generate Arrow schema for {where}: {exc}") from exc
        elif field.name not in defaults:
            raise TypeError(f"Transient field {where} must have a default value or default_factory")
    schema = pa.schema([pa.field(name, codec.dtype, nullable=codec.nullable) for name, codec in codecs.items()])
    encode = functools.partial(_types_struct, cls, f"{cls.__name__}.", codecs)
    template = _ipc_template(schema, None)
    plain = all(codec.plain for codec in codecs.values())
    return _TypesSpec(schema, codecs, defaults, encode, template, template if plain else None)


def _types_check_decorated(cls: type, hints: Mapping[str, Any]) -> None:
    """A subclass without a @dataclass of its own has no fields of its own: they would not travel."""
    for base in itertools.takewhile(lambda base: "__dataclass_fields__" not in base.__dict__, cls.__mro__):
        for name in base.__annotations__:
            if hints[name] is not ClassVar and typing.get_origin(hints[name]) is not ClassVar:
                raise TypeError(f"{base.__name__}.{name} would not be sent: {base.__name__} is no @dataclass; add it")


def _types_record(
    cls: type[ArrowSerializableDataclass], dtype: pa.DataType | None, top: bool
) -> tuple[pa.DataType, _TypesConvert | None, _TypesConvert | None]:
    """The type and the converters of a dataclass."""
    decode = functools.partial(_types_decode_record, cls)
    if top and cls.serialize_to_bytes is ArrowSerializableDataclass.serialize_to_bytes:
        _types_spec(cls)  # says now what is wrong with it
    if top or (dtype is not None and _types_raw(dtype).exact == {bytes}):
        encode = functools.partial(_types_made, cls, lambda value: bytes(value.serialize_to_bytes()))
        return pa.binary() if top or dtype is None else dtype, encode, decode
    spec = _types_spec(cls)
    return pa.struct(list(spec.schema)) if dtype is None else dtype, spec.encode, decode


def _types_row_batch(obj: ArrowSerializableDataclass, encoded: Mapping[str, Any] | None = None) -> pa.RecordBatch:
    """The one-row batch of an instance."""
    spec = _types_spec(type(obj))
    cells = spec.encode(obj) if encoded is None else encoded
    arrays = _types_each(
        lambda name: _types_array(cells[name], spec.codecs[name].dtype),
        f"field {type(obj).__name__}.",
        zip(cells, cells, strict=True),
    )
    return pa.RecordBatch.from_arrays(arrays, schema=spec.schema)


def _types_decode_record(cls: type[ArrowSerializableDataclass], value: Any) -> Any:
    if isinstance(value, dict):
        return _types_restore(cls, value, value.__getitem__)
    if value == b"":
        raise pa.ArrowInvalid(f"no bytes where an IPC stream of {cls.__name__} is expected")
    return _types_decode_bytes(cls, value)


def _types_from_batch(cls: type[_T], batch: pa.RecordBatch) -> _T:
    names = batch.schema.names
    if names and batch.num_rows != 1:
        few, many = (
            f"Cannot deserialize {cls.__name__} from empty",
            f"Expected single-row RecordBatch for {cls.__name__}",
        )
        raise ValueError(
            f"{many} deserialization, got {batch.num_rows} rows" if batch.num_rows else f"{few} RecordBatch"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"Repeated columns in {cls.__name__} RecordBatch: {names}")
    return _types_restore(cls, names, functools.partial(_types_value, cls, batch))


def _types_value(cls: type, batch: pa.RecordBatch, name: str) -> Any:
    """The value of a peer's column: its type is compared, and what it unfolds into counted, before it is read."""
    declared, limits = _types_spec(cls).codecs[name].dtype, _ipc_limits.get()
    column = batch.select([name])
    try:
        if not _types_alike(declared, column.schema.field(0).type):
            column = _ipc_fit(column, pa.schema([pa.field(name, declared)]), limits)
        return _ipc_unfold(column.column(0), limits)[0].as_py()
    except TypeError as exc:
        raise TypeError(f"{cls.__name__}.{name}: {exc}") from exc
    except OverflowError as exc:  # a date that Python cannot say
        raise ValueError(f"{cls.__name__}.{name}: {exc}") from exc


def _types_alike(declared: Any, got: Any) -> bool:
    """Whether values need no cast: structs may have other members, an enum may be text."""
    of = pa.types
    if of.is_dictionary(declared):
        return _types_alike(declared.value_type, got.value_type if of.is_dictionary(got) else got)
    if of.is_struct(declared) and of.is_struct(got):
        known = {field.name: field.type for field in declared}
        return all(_types_alike(known.get(field.name, field.type), field.type) for field in got)
    if of.is_list(declared) and of.is_list(got):
        return _types_alike(declared.value_type, got.value_type)
    if of.is_map(declared) and of.is_map(got):
        return _types_alike(declared.key_type, got.key_type) and _types_alike(declared.item_type, got.item_type)
    return bool(declared.equals(got))


def _types_restore(cls: type[_T], names: Collection[str], get: Callable[[str], Any]) -> _T:
    """Put an instance together from raw values, without `__init__`; a missing one takes the field's default."""
    spec, found = _types_spec(cls), cls.__new__(cls)
    if missing := [name for name in spec.codecs if name not in names and name not in spec.defaults]:
        raise ValueError(f"Missing fields in {cls.__name__} RecordBatch: {missing}. Found: {list(names)}")
    values = {name: codec.value(get(name)) for name, codec in spec.codecs.items() if name in names}
    values.update((name, default()) for name, default in spec.defaults.items() if name not in values)
    for name, value in values.items():
        object.__setattr__(found, name, value)  # frozen or not
    return found


# ==== 6. ELSEWHERE ====================================================================================================
# Uses: 1, 2, 3, 4. Batches that are not in the message: in shared memory that both processes map (wire.md 11), or in a
# store that both reach (storage.md). What travels is a pointer: a batch without rows, of the schema of what it means.
#
#                        who frees it                          what is verified
#   shared memory        who has read it, in its own turn      name, table, place and length; the stream by the gate
#   store                nobody; its URL expires               digest, one batch of the pointer's schema; by the gate
#
# A segment:
#
#   offset     0  magic "VGIS"     4  u32 version     8  u64 size of the data     16  u32 entries
#             24  (u64 offset, u64 length) of each region, by offset
#          65536  the regions
#
# The caller makes the segment and names it in its requests; a batch in it is sent as a pointer, which has no rows.
# The table has no lock: only the side whose turn it is may touch it, so nothing is sent ahead on such a connection.
#
# Who reads a region frees it. A batch that was read stays where it is, and Arrow keeps the memory alive through every
# column and slice of it; when the last of them is gone, a finaliser notes the region, in whatever thread that happens,
# and `sweep` frees it in our own next turn. A peer's numbers are checked before anything is read: table and pointer
# must lie within the segment, and the file must still be as long as it was.
#
# Whoever shares memory can change it after it has been checked, or truncate the file under a reader (SIGBUS). Such a
# peer could as well trace us, if it is a process of the same user: memory is shared with those only
# (`Channel.same_user`), all others are answered inline. With `shm_copy=True` or VGI_RPC_SHM_COPY=1 nothing is read
# where it lies: table and regions are copied by pread, and only private copies are looked at.

SHM_MIN_BATCH_BYTES: Final = 131_072  # below, a pipe is as fast; VGI_RPC_SHM_MIN_BATCH_BYTES sets another value
_SHM_FOLDER = "/dev/shm"
_SHM_HEAD = struct.Struct("<4sIQI")
_SHM_MAGIC, _SHM_VERSION = b"VGIS", 1
_SHM_CROWDED = MAX_ALLOCS * 8 // 10
_SHM_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


def shm_available() -> bool:
    """Whether this machine has shared memory that we can map (Linux)."""
    return os.path.isdir(_SHM_FOLDER)


def worker_transport_metadata() -> dict[bytes, bytes]:
    """Return what a worker says about itself in `__transport_options__` (wire.md section 10)."""
    return {TRANSPORT_SHM_KEY: b"true" if shm_available() else b"false"}


class ShmAllocator:
    """The table of a segment: first fit over the gaps between its entries.

    Args:
        buf: the whole segment, writable.
        total_size: its size in bytes.
    """

    max_allocs: ClassVar[int] = MAX_ALLOCS

    def __init__(self, buf: memoryview, total_size: int) -> None:
        self._buf = buf
        self._total = total_size

    @staticmethod
    def initialize(buf: memoryview, total_size: int) -> None:
        """Write the header of an empty segment."""
        _SHM_HEAD.pack_into(buf, 0, _SHM_MAGIC, _SHM_VERSION, total_size - HEADER_SIZE, 0)

    @property
    def num_allocs(self) -> int:
        """The number of regions in use."""
        return len(self.table())

    def table(self) -> list[tuple[int, int]]:
        """Return (offset, length) of each region; IPCError when the table makes no sense."""
        count = _IPC_U32(self._buf, 16)[0]
        if count > MAX_ALLOCS:
            raise IPCError(f"the shared memory's table claims {count} regions; {MAX_ALLOCS} are possible")
        numbers = struct.unpack_from(f"<{2 * count}Q", self._buf, 24)
        found = list(zip(numbers[::2], numbers[1::2], strict=True))
        end = HEADER_SIZE
        for offset, length in found:
            if offset < end or offset + length > self._total:
                raise IPCError("the shared memory's table is damaged: its regions overlap or leave the segment")
            end = offset + length
        return found

    def allocate(self, size: int) -> int | None:
        """Reserve `size` bytes; the offset, on 64 bytes, or None when there is no room. ValueError unless positive."""
        if size <= 0:
            raise ValueError(f"size must be positive, got {size}")
        table = self.table()
        if len(table) >= MAX_ALLOCS:
            return None
        at = HEADER_SIZE
        for index, (offset, length) in enumerate([*table, (self._total, 0)]):
            if offset - at >= size:
                table.insert(index, (at, size))
                self._store(table, index)
                if len(table) == _SHM_CROWDED:
                    _LOG_SHM.warning("%d of %d regions of a segment are in use", len(table), MAX_ALLOCS)
                return at
            at = offset + length + (-(offset + length) & 63)
        return None

    def free(self, offset: int) -> None:
        """Give a region back; ValueError when there is none at `offset`."""
        if self.discard({offset}) != 1:
            raise ValueError(f"No allocation at offset {offset}")

    def discard(self, offsets: set[int]) -> int:
        """Give these regions back, if they are there; returns how many were."""
        table = self.table()
        kept = [entry for entry in table if entry[0] not in offsets]
        if len(kept) != len(table):
            self._store(kept, 0)
        return len(table) - len(kept)

    def reset(self) -> None:
        """Give everything back."""
        self._store([], 0)

    def _store(self, table: list[tuple[int, int]], first: int) -> None:
        numbers = [number for entry in table[first:] for number in entry]
        struct.pack_into(f"<{len(numbers)}Q", self._buf, 24 + 16 * first, *numbers)
        struct.pack_into("<I", self._buf, 16, len(table))


class _ShmFileTable(ShmAllocator):
    """The table, read and written through the file: nothing happens to us when the peer truncates it."""

    def __init__(self, fd: int, total_size: int) -> None:
        super().__init__(memoryview(bytearray(HEADER_SIZE)), total_size)
        self._fd = fd

    def table(self) -> list[tuple[int, int]]:
        header = os.pread(self._fd, HEADER_SIZE, 0)
        if len(header) < HEADER_SIZE:
            raise IPCError("the shared memory segment has become shorter than its header")
        self._buf[:] = header
        return super().table()

    def _store(self, table: list[tuple[int, int]], first: int) -> None:
        super()._store(table, first)
        os.pwrite(self._fd, self._buf, 0)


class ShmSegment:
    """A named segment of shared memory; use `create` or `attach`. Closing is up to whoever made the object.

    Attributes: `name`, `size` in bytes, `buf`, `allocator`, `threshold` (bytes; smaller batches travel inline), and the
    counters `batches_shared` and `batches_inline` (large enough, but there was no room). The creator's process removes
    the name when the object or the process ends, unless it is killed: `vgi_rpc launch --gc` removes what the dead have
    left.
    """

    def __init__(self, name: str, fd: int, size: int) -> None:
        """`fd` is the segment's from here on, whatever happens."""
        import mmap

        try:
            self.threshold = _shm_threshold()
            self._map = mmap.mmap(fd, size)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self.name = name
        self.size = size
        self.buf = memoryview(self._map)
        self.allocator = ShmAllocator(self.buf, size)
        self.batches_shared = 0
        self.batches_inline = 0
        self._noted: collections.deque[int] = collections.deque()  # regions that nobody looks at any more
        self._remove: Callable[[], object] | None = None
        self.copies = False
        if os.environ.get("VGI_RPC_SHM_COPY", "") not in ("", "0"):
            self.copy_only()

    @classmethod
    def create(cls, size: int) -> ShmSegment:
        """Make a segment of `size` bytes, all of them reserved: memory that is short is an OSError here, not a crash.

        Raises:
            ValueError: not larger than the header.
        """
        if size <= HEADER_SIZE:
            raise ValueError(f"size must be larger than the header of {HEADER_SIZE} bytes, got {size}")
        name = f"vgi_rpc_{os.getpid()}_{os.urandom(4).hex()}"
        path = f"{_SHM_FOLDER}/{name}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        remove = functools.partial(_shm_remove, path, os.getpid())
        try:
            try:
                os.posix_fallocate(fd, 0, size)
            except BaseException as exc:
                os.close(fd)
                exc.add_note(f"a segment of {size} bytes (shm_size) in {_SHM_FOLDER}")
                raise
            segment = cls(name, fd, size)
        except BaseException:
            remove()
            raise
        ShmAllocator.initialize(segment.buf, size)
        segment._remove = weakref.finalize(segment, remove)
        return segment

    @classmethod
    def attach(cls, name: str, size: int, *, track: bool = True) -> ShmSegment:
        """Map a segment that another process has made; it stays that process's. `size` and `track` are not needed.

        Raises:
            ValueError: no such name, bad magic, another version, or a size that is not the header's.
            OSError: there is no such segment.
        """
        if not _SHM_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(f"not the name of a shared memory segment: {name!r}")
        fd = os.open(f"{_SHM_FOLDER}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        about = os.fstat(fd)
        actual = about.st_size
        if about.st_uid != os.geteuid():
            os.close(fd)
            raise ValueError(f"the shared memory segment {name} belongs to another user")
        if actual <= HEADER_SIZE:
            os.close(fd)
            raise ValueError(f"data_size mismatch: the segment has {actual} bytes, which is no more than a header")
        segment = cls(name, fd, actual)
        magic, version, data_size, _ = _SHM_HEAD.unpack(os.pread(fd, _SHM_HEAD.size, 0).ljust(_SHM_HEAD.size))
        problem = ""
        if magic != _SHM_MAGIC:
            problem = f"Bad SHM magic: {magic!r}"
        elif version != _SHM_VERSION:
            problem = f"Unsupported SHM version: {version}"
        elif data_size != actual - HEADER_SIZE:
            problem = f"data_size mismatch: header says {data_size}, expected {actual - HEADER_SIZE}"
        if problem:
            segment.close()
            raise ValueError(problem)
        return segment

    def copy_only(self) -> None:
        """Touch the memory no more: read and write through the file, into and out of private copies."""
        self.copies = True
        self.allocator = _ShmFileTable(self._fd, self.size)

    def allocate_and_write(self, batch: pa.RecordBatch) -> tuple[int, int] | None:
        """Store a batch as a complete IPC stream -> (offset, length); None when it does not fit."""
        writer = _IpcWriter(batch.schema)
        writer.write(batch)
        writer.close()
        views = [memoryview(piece).cast("B") for piece in writer.take()]
        length = sum(map(len, views))
        self._check_file()
        offset = self.allocator.allocate(length)
        if offset is None:
            return None
        at = offset
        for view in views:
            if self.copies:
                os.pwrite(self._fd, view, at)
            else:
                self.buf[at : at + len(view)] = view
            at += len(view)
        return offset, length

    def read_buffer(self, offset: int, length: int) -> pa.Buffer:
        """Return a region, or its beginning, without copying; IPCError when the table does not have it."""
        return pa.py_buffer(self._view(offset, length))

    def free(self, offset: int) -> None:
        """Give a region back; ValueError when there is none at `offset`."""
        self.allocator.free(offset)

    def reset(self) -> None:
        """Give everything back, read or not."""
        self.allocator.reset()

    def sweep(self) -> None:
        """Free what is no longer referenced; to be called in our own turn only."""
        if self._noted:
            offsets = set()
            while self._noted:
                offsets.add(self._noted.popleft())
            self.allocator.discard(offsets)

    def note(self, offset: int) -> None:
        """Have a region freed in our next turn; from any thread."""
        self._noted.append(offset)

    def close(self) -> None:
        """Unmap, unless batches are still looked at; those stay valid, and the last of them unmaps. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        os.close(fd)
        with contextlib.suppress(BufferError):
            self.buf.release()
            self._map.close()

    def unlink(self) -> None:
        """Remove the name; who has mapped the segment keeps it. Idempotent."""
        if self._remove is not None:
            self._remove()
        else:
            _shm_remove(f"{_SHM_FOLDER}/{self.name}", os.getpid())

    def wants(self, batch: pa.RecordBatch) -> bool:
        """Whether a batch is large enough, and of a kind that every peer reads (PORTABILITY.md section 5)."""
        if batch.get_total_buffer_size() < self.threshold or batch.num_rows == 0 or batch.nbytes < self.threshold:
            return False
        return not any(pa.types.is_dictionary(field.type) for field in batch.schema)

    def _view(self, offset: int, length: int) -> memoryview:
        self._check_file()
        if length <= 0 or not any(at == offset and length <= size for at, size in self.allocator.table()):
            raise IPCError(f"a pointer to {length} bytes at {offset}, where the shared memory has no such region")
        if not self.copies:
            return self.buf[offset : offset + length]
        copy = pa.allocate_buffer(length)
        view = memoryview(copy).cast("B")
        at = 0
        while at < length and (got := os.preadv(self._fd, [view[at:]], offset + at)):
            at += got
        self._check_file()
        return view

    def _check_file(self) -> None:
        """A segment that has been truncated kills whoever touches the missing pages."""
        if self._fd < 0:
            raise IPCError(f"the shared memory segment {self.name} is closed")
        if os.fstat(self._fd).st_size < self.size:
            raise IPCError(f"the shared memory segment {self.name} has become shorter than its {self.size} bytes")


def _shm_threshold() -> int:
    raw = os.environ.get("VGI_RPC_SHM_MIN_BATCH_BYTES") or str(SHM_MIN_BATCH_BYTES)
    if not raw.isascii() or not raw.isdigit():
        raise ValueError(f"VGI_RPC_SHM_MIN_BATCH_BYTES={raw!r} is not a number of bytes")
    return int(raw)


def _shm_remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in the child of a fork
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def is_shm_pointer_batch(batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None) -> bool:
    """Whether a batch says where in shared memory the real one is."""
    return _elsewhere_pointer(batch, custom_metadata) is _KIND_SHM


def make_shm_pointer_batch(schema: pa.Schema, offset: int, length: int) -> tuple[pa.RecordBatch, pa.KeyValueMetadata]:
    """Return a batch without rows that points to `length` bytes at `offset`, and its metadata."""
    metadata = {SHM_OFFSET_KEY: str(offset).encode(), SHM_LENGTH_KEY: str(length).encode()}
    return empty_batch(schema), pa.KeyValueMetadata(metadata)


def maybe_write_to_shm(
    batch: pa.RecordBatch,
    custom_metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None,
    shm: ShmSegment | None,
) -> tuple[pa.RecordBatch, Mapping[bytes, bytes] | pa.KeyValueMetadata | None]:
    """Store a batch that is large enough and return a pointer to it; one that is not, or does not fit, as it is."""
    if shm is None or not shm.wants(batch):
        return batch, custom_metadata
    place = shm.allocate_and_write(batch)
    if place is None:
        if not shm.batches_inline:
            _LOG_SHM.debug("no room for %d bytes in the segment %s; sending inline", batch.nbytes, shm.name)
        shm.batches_inline += 1
        return batch, custom_metadata
    shm.batches_shared += 1
    pointer, metadata = make_shm_pointer_batch(batch.schema, *place)
    return pointer, {**dict(custom_metadata or {}), **dict(metadata)}


def resolve_shm_batch(
    batch: pa.RecordBatch, custom_metadata: pa.KeyValueMetadata | None, shm: ShmSegment | None
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None, Callable[[], None] | None]:
    """Return the batch that a pointer means, its metadata, and what frees its region; others as they are, and None.

    Nothing needs to be called: the region is freed when nobody refers to the batch any more.
    """
    if shm is None or custom_metadata is None or not is_shm_pointer_batch(batch, custom_metadata):
        return batch, custom_metadata, None
    found, metadata = _shm_read(shm, batch.schema, dict(custom_metadata), IpcValidation.FULL, IpcLimits())
    return found, _ipc_key_values(metadata), shm.sweep


def _shm_read(
    segment: ShmSegment, schema: pa.Schema, metadata: _IpcMetadata, validation: IpcValidation, limits: IpcLimits
) -> tuple[pa.RecordBatch, _IpcMetadata]:
    """Read the batch that a pointer means, where it is; IPCError when there is none."""
    offset, length = (_shm_number(metadata.get(key, b"")) for key in (SHM_OFFSET_KEY, SHM_LENGTH_KEY))
    view = segment._view(offset, length)
    weakref.finalize(view, segment.note, offset).atexit = False
    region = pa.py_buffer(view)
    del view
    try:
        source = _ShmSource(region, schema, limits)
        reader = _IpcReader(source, validation)
        item = reader.read() if reader.schema.equals(schema) else None
    except (EOFError, struct.error) as exc:
        raise IPCError(f"the batch at {offset} in shared memory ends before its {length} bytes do") from exc
    if item is None:
        raise IPCError(f"the batch at {offset} in shared memory is not of the schema that was announced")
    own = {key: value for key, value in metadata.items() if key not in (SHM_OFFSET_KEY, SHM_LENGTH_KEY)}
    return item[0], {**(item[1] or {}), **own, SHM_SOURCE_KEY: segment.name.encode()}


def _shm_number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise IPCError(f"a pointer into shared memory with the number {text[:40]!r}")
    return int(text)


class _ShmSource(_IpcSource):
    """A region as a source of messages: small ones are copied, large ones stay where they are."""

    __slots__ = ("_at", "_region")

    def __init__(self, region: pa.Buffer, schema: pa.Schema, limits: IpcLimits) -> None:
        super().__init__(b"", limits)
        self._region = region
        self._at = 0
        self.more(16)
        size = _ipc_metadata_size(self)
        if len(self.buf) < 8 + size:
            self.more(8 + size - len(self.buf))
        if _ipc_parse(self.buf[8 : 8 + size], limits)[0] != _IPC_SCHEMA:  # with dictionaries: no schema, no end
            self.buf = _ipc_schema_message(schema) + self.buf

    def more(self, missing: int) -> None:
        left = len(self._region) - self._at
        if not left:
            super().more(missing)
        chunk = self._region.slice(self._at, min(left, max(missing, 4096)))
        self._at += len(chunk)
        self.buf = self.buf[self.pos :] + chunk.to_pybytes()
        self.pos = 0

    def take_large(self, size: int, head: int) -> pa.Buffer:
        start = self._at - (len(self.buf) - self.pos)
        if start < 0 or start + size > len(self._region):
            return super().take_large(size, head)
        self.buf, self.pos, self._at = b"", 0, start + size
        return self._region.slice(start, size)


# ---- what a batch is
#
# A batch in a reply is (first line that applies):
#   rows > 0 or no metadata          data
#   log_level and log_message        error (EXCEPTION) or log
#   location / shm_offset            pointer to a batch that is elsewhere
#   anything else                    data (void result, zero-row output)

_KIND_DATA, _KIND_LOG, _KIND_ERROR, _KIND_EXTERNAL, _KIND_SHM = "data", "log", "error", "external", "shm"


def _elsewhere_kind(batch: pa.RecordBatch, metadata: _IpcMetadata | None) -> str:
    kind = _elsewhere_pointer(batch, metadata) or _KIND_DATA
    if metadata and batch.num_rows == 0 and LOG_LEVEL_KEY in metadata and LOG_MESSAGE_KEY in metadata:
        kind = _KIND_ERROR if metadata[LOG_LEVEL_KEY] == b"EXCEPTION" else _KIND_LOG
    if _LOG_WIRE_BATCH.isEnabledFor(logging.DEBUG):
        shown = "no metadata" if not metadata else ("zero-row" if batch.num_rows == 0 else "rows with metadata")
        _LOG_WIRE_BATCH.debug("Classify batch: rows=%d, %s -> %s", batch.num_rows, shown, kind)
    return kind


def _elsewhere_pointer(batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None) -> str:
    """Where the batch is that this one points to; "" when it is no pointer. A log batch never is."""
    if not metadata or batch.num_rows or LOG_LEVEL_KEY in metadata:
        return ""
    return _KIND_EXTERNAL if LOCATION_KEY in metadata else _KIND_SHM if SHM_OFFSET_KEY in metadata else ""


def _elsewhere_error(metadata: _IpcMetadata) -> RpcError:
    error = _log_from_wire(metadata)
    return error if isinstance(error, RpcError) else RpcError("EXCEPTION", error.message)


class _ElsewhereLogs:
    """Delivers log batches to `on_log`. If that raises, reading goes on, and the exception waits in `failure`."""

    __slots__ = ("failure", "on_log")

    def __init__(self, on_log: Callable[[Message], None] | None) -> None:
        self.on_log = on_log
        self.failure: Exception | None = None

    def deliver(self, metadata: _IpcMetadata) -> None:
        if self.on_log is None or self.failure is not None:
            return
        message = _log_from_wire(metadata)
        if isinstance(message, RpcError):
            return
        try:
            self.on_log(message)
        except Exception as exc:
            self.failure = exc


# ---- stores (storage.md)


class BatchStore(Protocol):
    """Where batches are kept that are too large to travel; `external_location=` takes one (storage.md).

    It sees bytes and URLs: the core writes and reads the objects. Several threads use it at the same time. What it
    raises is an ExternalLocationError, or DeadlineExceededError. vgi_rpc_extras.storage has S3, GCS and the fetching.
    """

    def wants(self, batch: pa.RecordBatch) -> bool:
        """Whether a batch shall be kept here instead of travelling."""
        ...

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        """Keep an IPC stream of `schema`; returns its URL, the SHA-256 of `data`, and the bytes stored (compressed)."""
        ...

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        """Fetch and verify an object; returns its decoded bytes and the seconds it took.

        Args:
            sha256: what its digest must be, as the pointer has it.
            timeout: seconds that the caller is willing to wait; the store may have a bound of its own.
        """
        ...


class ExternalRef(_Record):
    """A result that has been published already; a unary method declared `-> T | ExternalRef` may return it.

    ValueError for an empty URL, or a digest that is not 64 hex digits. The URL may be a credential: it is not in the
    repr. Whoever gets the reference can read the object for as long as its URL lives.
    """

    __slots__ = ("sha256", "url")
    __match_args__ = ("url", "sha256")
    url: str
    sha256: str | None

    def __init__(self, url: str, sha256: str | None = None) -> None:
        if not url:
            raise ValueError("an ExternalRef needs a URL")
        if sha256 is not None and not re.fullmatch("[0-9A-Fa-f]{64}", sha256):
            raise ValueError("sha256 must be 64 hex digits")
        self._set(url=url, sha256=None if sha256 is None else sha256.lower())

    def pointer_batch(self, schema: pa.Schema) -> tuple[pa.RecordBatch, pa.KeyValueMetadata]:
        """Return what travels in place of the result."""
        return make_external_location_batch(schema, self.url, self.sha256)

    def __repr__(self) -> str:
        return f"ExternalRef(sha256={self.sha256!r})"


def make_external_location_batch(
    schema: pa.Schema, url: str, sha256: str | None = None
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata]:
    """Return a pointer: no rows, the schema of what it replaces, and where that is (wire.md section 12)."""
    metadata = {LOCATION_KEY: url.encode()}
    if sha256 is not None:
        metadata[LOCATION_SHA256_KEY] = sha256.encode()
    return empty_batch(schema), pa.KeyValueMetadata(metadata)


def is_external_location_batch(
    batch: pa.RecordBatch, custom_metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None
) -> bool:
    """Whether a batch says where in a store the real one is."""
    return _elsewhere_pointer(batch, custom_metadata) is _KIND_EXTERNAL


class ExternalBatch(_NamedTuple):
    """What travels in place of a batch, and what it has cost."""

    batch: pa.RecordBatch
    metadata: pa.KeyValueMetadata
    raw_bytes: int
    stored_bytes: int


def externalize(
    store: BatchStore | None,
    data: pa.RecordBatch,
    items: Sequence[tuple[pa.RecordBatch, Mapping[bytes, bytes] | pa.KeyValueMetadata | None]],
    limit: int | None = None,
) -> ExternalBatch | None:
    """Keep `items`, the batch `data` and the messages around it, as one object if the store wants it; None: it travels.

    A batch without rows always travels. What the store raises is raised as an ExternalLocationError; RuntimeError
    when more than `limit` bytes would be stored.
    """
    if store is None or not data.num_rows or not store.wants(data):
        return None
    writer = _IpcWriter(data.schema)
    for batch, metadata in items:
        writer.write(batch, metadata)
    writer.close()
    whole = b"".join(writer.take())
    if limit is not None and len(whole) > limit:
        raise RuntimeError(f"{len(whole)} bytes to store exceed what max_externalized_response_bytes leaves: {limit}")
    try:
        url, sha256, stored = store.save(data.schema, whole)
    except RpcError:
        raise
    except Exception as exc:  # its text may hold a signed URL
        raise ExternalLocationError(
            f"The batch could not be stored: {type(exc).__name__}", error_code=Code.UNAVAILABLE, sent="no"
        ) from None
    return ExternalBatch(*make_external_location_batch(data.schema, url, sha256), len(whole), stored)


def resolve_external_location(
    batch: pa.RecordBatch,
    custom_metadata: pa.KeyValueMetadata | None,
    config: BatchStore | None,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None]:
    """Return the batch that a pointer stands for; anything else comes back as it is.

    Raises ExternalLocationError, and whatever `on_log` raises; the error that the object holds, if it holds one.
    """
    if config is None or not is_external_location_batch(batch, custom_metadata):
        return batch, custom_metadata
    logs = _ElsewhereLogs(on_log)
    about = dict(custom_metadata or {})
    found, metadata = _elsewhere_load(config, batch, about, logs, ipc_validation, IpcLimits(), None)
    if logs.failure is not None:
        raise logs.failure
    return found, pa.KeyValueMetadata(metadata)


def _elsewhere_load(
    store: BatchStore,
    batch: pa.RecordBatch,
    metadata: _IpcMetadata,
    logs: _ElsewhereLogs,
    validation: IpcValidation,
    limits: IpcLimits,
    timeout: float | None,
) -> tuple[pa.RecordBatch, _IpcMetadata]:
    """Follow a pointer. Messages are delivered once the whole object has been read and is what it must be."""
    location, digest = metadata[LOCATION_KEY], metadata.get(LOCATION_SHA256_KEY)
    try:
        sha256 = None if digest is None else digest.decode()
        data, seconds = store.load(location.decode(), sha256, timeout)
    except RpcError:
        raise
    except Exception as exc:  # its text may hold a signed URL
        raise ExternalLocationError(f"Failed to resolve ExternalLocation: {type(exc).__name__}") from None
    found, inner, messages = _elsewhere_read_object(_IpcSource(data, limits), batch.schema, validation)
    for message in messages:
        logs.deliver(message)
    timing = {LOCATION_FETCH_MS_KEY: b"%.1f" % (seconds * 1000), LOCATION_SOURCE_KEY: location}
    return found, {**(inner or {}), **timing}


def _elsewhere_read_object(
    source: _IpcSource, schema: pa.Schema, validation: IpcValidation
) -> tuple[pa.RecordBatch, _IpcMetadata | None, list[_IpcMetadata]]:
    """Read a stored object: exactly one data batch of that schema, with the messages around it; nothing nested."""
    found: tuple[pa.RecordBatch, _IpcMetadata | None] | None = None
    messages = []
    try:
        reader = _IpcReader(source, validation)
        while (item := reader.read()) is not None:
            kind = _elsewhere_kind(*item)
            if kind is _KIND_ERROR:
                raise _elsewhere_error(item[1] or {})
            if kind in (_KIND_EXTERNAL, _KIND_SHM) or LOCATION_KEY in (item[1] or {}):
                raise ExternalLocationError("Redirect loop detected: the stored object holds a pointer")
            if kind is _KIND_LOG:
                messages.append(item[1] or {})
            elif found is not None:
                raise ExternalLocationError("Multiple data batches (2) found in the stored object; it must hold one")
            else:
                found = item
    except (EOFError, pa.ArrowException, IPCError, OSError, UnicodeDecodeError) as exc:
        raise ExternalLocationError(f"The stored object is not a complete Arrow IPC stream: {exc}") from exc
    if not reader.schema.equals(schema):
        raise ExternalLocationError(
            f"Schema mismatch in ExternalLocation: the pointer has {_log_schema(schema)},"
            f" the object {_log_schema(reader.schema)}"
        )
    if found is None:
        raise ExternalLocationError("No data batch found in the stored object")
    return *found, messages


def _elsewhere_local(
    shm: ShmSegment | None,
    batch: pa.RecordBatch,
    metadata: _IpcMetadata | None,
    validation: IpcValidation,
    limits: IpcLimits,
) -> tuple[pa.RecordBatch, _IpcMetadata | None]:
    """A batch that a pointer into shared memory means; others as they are."""
    if shm is None or metadata is None or _elsewhere_pointer(batch, metadata) is not _KIND_SHM:
        return batch, metadata
    return _shm_read(shm, batch.schema, metadata, validation, limits)


def _elsewhere_refuse(name: str, batch: pa.RecordBatch, metadata: _IpcMetadata | None) -> None:
    """A batch that is elsewhere must fail loudly, never be taken for an empty one."""
    kind = _elsewhere_pointer(batch, metadata)
    if kind is _KIND_EXTERNAL:
        raise RpcError(
            "ProtocolError",
            f"{name}(): the batch is in external storage and no store is configured here; pass external_location=",
        )
    if kind is _KIND_SHM:
        raise RpcError(
            "ProtocolError", f"{name}(): the batch is in a shared memory segment that this connection does not have"
        )


# ==== 7. CONTEXT ======================================================================================================
# Uses: 1, 2, 3, 4. What a method may know about its call (runtime.md sections 2, 5 and 8): who calls, until when, how
# to talk back, what it cost. A context is made for each call, so its constructor only assigns; the rest is lazy.
# Then the seams where extras plug in: dispatch hooks, and the store for batches that are too large to travel.

ClientLog = Callable[[Message], None]


class TransportKind(enum.StrEnum):
    """How a call came in."""

    PIPE = "pipe"
    HTTP = "http"
    UNIX = "unix"
    TCP = "tcp"


class AuthContext(_Record):
    """Who calls; immutable. Claims never show in the repr."""

    __slots__ = ("authenticated", "claims", "domain", "principal")
    __match_args__ = ("domain", "authenticated", "principal", "claims")
    domain: str | None
    authenticated: bool
    principal: str | None
    claims: Mapping[str, Any]

    def __init__(
        self,
        domain: str | None,
        authenticated: bool,
        principal: str | None = None,
        claims: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        own = types.MappingProxyType(dict(claims))  # `anonymous()` is shared, and nobody may give it claims
        self._set(domain=domain, authenticated=authenticated, principal=principal, claims=own)

    @classmethod
    def anonymous(cls) -> AuthContext:
        """Return the shared context of a caller that has not said who it is."""
        return _CTX_ANONYMOUS

    def require_authenticated(self) -> None:
        """Raise PermissionError for an anonymous caller."""
        if not self.authenticated:
            raise PermissionError("Authentication required")

    def __hash__(self) -> int:
        return hash((self.domain, self.authenticated, self.principal))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.domain, self.authenticated, self.principal, dict(self.claims))

    def __repr__(self) -> str:
        return f"AuthContext(domain={self.domain!r}, authenticated={self.authenticated}, principal={self.principal!r})"


_CTX_ANONYMOUS = AuthContext(None, False)
_ctx_auth: contextvars.ContextVar[AuthContext] = contextvars.ContextVar("vgi_rpc_auth", default=_CTX_ANONYMOUS)


def current_auth() -> AuthContext:
    """Return who makes the current call; anonymous outside one and on plain pipes."""
    return _ctx_auth.get()


def _ctx_request_id() -> str:
    """16 hex digits that tell calls apart: no uuid (2 us), and not `random`, which a service may seed for itself."""
    return os.urandom(8).hex()


class CallStatistics:
    """Batches, rows and bytes of one call; bytes are `get_total_buffer_size()`."""

    __slots__ = ("input_batches", "input_bytes", "input_rows", "output_batches", "output_bytes", "output_rows")

    def __init__(
        self,
        input_batches: int = 0,
        output_batches: int = 0,
        input_rows: int = 0,
        output_rows: int = 0,
        input_bytes: int = 0,
        output_bytes: int = 0,
    ) -> None:
        self.input_batches = input_batches
        self.output_batches = output_batches
        self.input_rows = input_rows
        self.output_rows = output_rows
        self.input_bytes = input_bytes
        self.output_bytes = output_bytes

    def record_input(self, batch: pa.RecordBatch) -> None:
        """Count a batch from the caller."""
        self.count_input(batch.num_rows, batch.get_total_buffer_size())

    def record_output(self, batch: pa.RecordBatch) -> None:
        """Count a batch to the caller."""
        self.count_output(batch.num_rows, batch.get_total_buffer_size())

    def count_input(self, rows: int, size: int) -> None:
        """Count a batch from the caller, of which only this is known."""
        self.input_batches += 1
        self.input_rows += rows
        self.input_bytes += size

    def count_output(self, rows: int, size: int) -> None:
        """Count a batch to the caller, of which only this is known."""
        self.output_batches += 1
        self.output_rows += rows
        self.output_bytes += size

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CallStatistics):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CallStatistics({', '.join(f'{name}={getattr(self, name)}' for name in self.__slots__)})"


class CallContext:
    """What a method sees when its implementation takes a parameter `ctx` (API.md section 2.6).

    Attributes: `auth`, `kind`, `transport_metadata`, `implementation`, `request_id`, `deadline` (monotonic seconds, or
    None), and on HTTP `response_limit_bytes` and `preferred_response_bytes`.
    """

    __slots__ = (
        "_logger",
        "_method_name",
        "_protocol_name",
        "_request_id",
        "_server_id",
        "auth",
        "deadline",
        "emit_client_log",
        "implementation",
        "kind",
        "preferred_response_bytes",
        "response_limit_bytes",
        "transport_metadata",
    )

    def __init__(
        self,
        auth: AuthContext,
        emit_client_log: ClientLog,
        transport_metadata: Mapping[str, Any] | None = None,
        *,
        server_id: str = "",
        method_name: str = "",
        protocol_name: str = "",
        kind: TransportKind | None = None,
        implementation: Any = None,
        response_limit_bytes: int | None = None,
        preferred_response_bytes: int | None = None,
        deadline: float | None = None,
        request_id: str = "",
    ) -> None:
        self.auth = auth
        self.emit_client_log = emit_client_log
        self.transport_metadata: Mapping[str, Any] = transport_metadata or {}
        self._server_id = server_id
        self._method_name = method_name
        self._protocol_name = protocol_name
        self.kind = kind
        self.implementation = implementation
        self.response_limit_bytes = response_limit_bytes
        self.preferred_response_bytes = preferred_response_bytes
        self.deadline = deadline
        self._request_id = request_id
        self._logger: logging.LoggerAdapter[logging.Logger] | None = None

    @property
    def request_id(self) -> str:
        """16 hex digits that name this call in logs and errors."""
        if not self._request_id:
            self._request_id = _ctx_request_id()
        return self._request_id

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger `vgi_rpc.service.<protocol>` whose records name the server, method, call and caller."""
        if self._logger is None:
            bound = {
                "server_id": self._server_id,
                "method": self._method_name,
                "request_id": self.request_id,
                "principal": self.auth.principal,
                "auth_domain": self.auth.domain,
                "remote_addr": self.transport_metadata.get("remote_addr"),
            }
            fields = {key: value for key, value in bound.items() if value or key in ("server_id", "method")}
            self._logger = _CtxLogger(logging.getLogger(f"vgi_rpc.service.{self._protocol_name}"), fields)
        return self._logger

    def client_log(self, level: Level, message: str, **extra: object) -> None:
        """Send a message to the caller's `on_log`; at EXCEPTION it raises there."""
        self.emit_client_log(Message(level, message, **extra))

    def time_left(self) -> float | None:
        """Return the seconds the caller is still willing to wait; None: no limit. Negative when it has given up."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    def check_deadline(self) -> None:
        """Raise DeadlineExceededError when the caller has given up."""
        left = self.time_left()
        if left is not None and left <= 0:
            raise DeadlineExceededError(f"{self._method_name}() ran past its caller's deadline")

    @property
    def cookies(self) -> Mapping[str, str]:
        """Cookies of the request; empty off HTTP."""
        return cast(Mapping[str, str], self.transport_metadata.get("cookies", {}))

    @property
    def session(self) -> object | None:
        """The sticky session's state; None off HTTP."""
        return None

    @property
    def session_id(self) -> str | None:
        """The sticky session's id; None off HTTP."""
        return None

    def set_cookie(
        self,
        name: str,
        value: str,
        *,
        expires: Any = None,
        max_age: int | None = None,
        domain: str | None = None,
        path: str | None = None,
        secure: bool | None = None,
        http_only: bool = True,
        same_site: str | None = None,
        partitioned: bool = False,
    ) -> None:
        """Set a cookie on the response, `expires` a datetime, `max_age` in seconds; RuntimeError off HTTP."""
        raise RuntimeError("set_cookie() is only supported inside unary RPC methods served over HTTP")

    def delete_cookie(self, name: str, *, path: str | None = None, domain: str | None = None) -> None:
        """Delete a cookie at the client; RuntimeError off HTTP."""
        raise RuntimeError("delete_cookie() is only supported inside unary RPC methods served over HTTP")

    def open_session(self, state: object, ttl: float | None = None) -> None:
        """Open a sticky session; RuntimeError off HTTP."""
        raise RuntimeError("sticky sessions not available on this transport")

    def close_session(self) -> None:
        """Close the sticky session; RuntimeError off HTTP."""
        raise RuntimeError("sticky sessions not available on this transport")


class _CtxLogger(logging.LoggerAdapter[logging.Logger]):
    """Merges `extra`; what the framework knows wins."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs["extra"] = {**(kwargs.get("extra") or {}), **(self.extra or {})}
        return msg, kwargs


class DispatchHook(Protocol):
    """Told of every dispatched call; tracing plugs in here. What it raises is swallowed."""

    def on_dispatch_start(
        self,
        info: RpcMethodInfo,
        auth: AuthContext,
        transport_metadata: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """Before the method, in its thread; returns a token for the end. When it raises, the end is not called.

        `transport_metadata` also has the strings `traceparent` and `tracestate` if the request came with a W3C trace
        context; that of its batch goes before that of an HTTP header. For a stream it has `stream_id`, 32 hex digits.
        """
        ...

    def on_dispatch_end(
        self, token: Any, info: RpcMethodInfo, error: BaseException | None, *, stats: CallStatistics | None = None
    ) -> None:
        """After the method, or after the whole stream, in the same thread; the access record has been written."""
        ...


class CallHook(Protocol):
    """Told of every call that a proxy makes (`with_options(proxy, call_hook=...)`); client spans plug in here.

    Called from any thread, and what it raises is swallowed.
    """

    def on_call_start(self, info: RpcMethodInfo, metadata: dict[bytes, bytes]) -> Any:
        """Before the request is made; returns a token for the end.

        What is put into `metadata` goes along with the request: over a byte stream as metadata of its batch, over a
        RequestTransport as that sees fit (HTTP: `traceparent` and `tracestate` are headers of all requests of the
        call).
        """
        ...

    def on_call_end(self, token: Any, info: RpcMethodInfo, error: BaseException | None) -> None:
        """After the answer, or after the whole stream."""
        ...


class _CtxHooks:
    """Several hooks in one slot: starts in order, ends reversed; one that fails does not disturb the others."""

    __slots__ = ("_hooks",)

    def __init__(self, hooks: tuple[DispatchHook, ...]) -> None:
        self._hooks = hooks

    def on_dispatch_start(
        self,
        info: RpcMethodInfo,
        auth: AuthContext,
        transport_metadata: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> list[tuple[DispatchHook, Any]]:
        """Start all; the token is the list of those that did."""
        started = []
        for hook in self._hooks:
            try:
                started.append((hook, hook.on_dispatch_start(info, auth, transport_metadata, kwargs)))
            except Exception:
                _LOG_RPC.debug("a dispatch hook failed at start", exc_info=True)
        return started

    def on_dispatch_end(
        self, token: Any, info: RpcMethodInfo, error: BaseException | None, *, stats: CallStatistics | None = None
    ) -> None:
        """End those that started."""
        for hook, own in reversed(token):
            try:
                hook.on_dispatch_end(own, info, error, stats=stats)
            except Exception:
                _LOG_RPC.debug("a dispatch hook failed at end", exc_info=True)


# ==== 8. METHODS ======================================================================================================
# Uses: 1, 3, 4, 5, 7. A Protocol class becomes a table of methods; what a stream method returns and works with; the
# hash that tells two contracts apart (types.md section 2, runtime.md section 3, wire.md sections 7.1 and 9.4).
#
# A stream method returns a Stream: an output schema and a state. Each input batch is one turn: the state's `process`
# sees the batch and an OutputCollector, and emits any number of messages and exactly one data batch. A producer
# (no input schema) may finish instead; an exchange may not.

RESERVED_PROTOCOL_PREFIX: Final = "vgi_rpc."
MAX_PROTOCOL_NAME_BYTES: Final = 255
PROTOCOL_NAME_RE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
SEMVER_REGEX: Final = re.compile(r"(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\Z")
HASH_DOMAIN: Final = b"vgi_rpc.protocol_hash.v1|"
TYPE_TOKEN_VERSION: Final = 1


class MethodType(enum.Enum):
    """One reply, or a stream of batches."""

    UNARY = "unary"
    STREAM = "stream"


class RpcMethodInfo:
    """One method of a Protocol, as the wire sees it (API.md section 2.1)."""

    __slots__ = (
        "doc",
        "has_return",
        "header_type",
        "is_exchange",
        "method_type",
        "name",
        "param_defaults",
        "param_docs",
        "param_names",
        "param_types",
        "params_schema",
        "protocol_name",
        "result_schema",
        "result_type",
        "returns_ref",
        "returns_undeclared",
    )

    def __init__(
        self,
        name: str,
        params_schema: pa.Schema,
        result_schema: pa.Schema,
        result_type: object,
        method_type: MethodType,
        has_return: bool,
        doc: str | None,
        param_defaults: Mapping[str, object] = types.MappingProxyType({}),
        param_types: Mapping[str, object] = types.MappingProxyType({}),
        param_docs: Mapping[str, str] = types.MappingProxyType({}),
        header_type: type[ArrowSerializableDataclass] | None = None,
        is_exchange: bool | None = None,
        protocol_name: str = "",
        returns_ref: bool = False,
        returns_undeclared: bool = False,
    ) -> None:
        self.name = name
        self.params_schema = params_schema
        self.param_names: tuple[str, ...] = tuple(params_schema.names)
        self.result_schema = result_schema
        self.result_type = result_type
        self.method_type = method_type
        self.has_return = has_return
        self.doc = doc
        self.param_defaults = dict(param_defaults)
        self.param_types = dict(param_types)
        self.param_docs = dict(param_docs)
        self.header_type = header_type
        self.is_exchange = is_exchange
        self.protocol_name = protocol_name
        self.returns_ref = returns_ref  # declared `T | ExternalRef`; `result_type` is T
        self.returns_undeclared = returns_undeclared  # no return annotation: void, perhaps by oversight

    @property
    def header_schema(self) -> pa.Schema | None:
        """Schema of the header a stream sends first; None when it sends none."""
        return None if self.header_type is None else self.header_type.ARROW_SCHEMA

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RpcMethodInfo):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RpcMethodInfo({self.method_type.value} {_methods_signature(self)})"


def validate_protocol_name(name: str, *, allow_reserved: bool = False) -> str:
    """Return the name, or raise ValueError: identifiers and dots, at most 255 bytes, prefix `vgi_rpc.` reserved."""
    if not name:
        raise ValueError("Protocol name is empty")
    if len(name.encode(errors="replace")) > MAX_PROTOCOL_NAME_BYTES:
        raise ValueError(f"Protocol name {name[:40]!r}... is longer than {MAX_PROTOCOL_NAME_BYTES} bytes")
    if not PROTOCOL_NAME_RE.match(name):
        raise ValueError(f"Protocol name {name!r} does not match [A-Za-z_][A-Za-z0-9_.]*")
    if not allow_reserved and name.startswith(RESERVED_PROTOCOL_PREFIX):
        raise ValueError(f"Protocol name {name!r} uses the reserved prefix '{RESERVED_PROTOCOL_PREFIX}'")
    return name


def parse_version(value: str) -> tuple[int, int, int]:
    """Return (major, minor, patch) of a canonical semantic version; ValueError otherwise."""
    match = SEMVER_REGEX.match(value)
    if match is None:
        raise ValueError(
            f"Invalid protocol version {value!r}: expected canonical semver MAJOR.MINOR.PATCH without leading zeros"
        )
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def _methods_protocol_name(protocol: type) -> str:
    """A Protocol's own `protocol_name`, never an inherited one, else its class name."""
    name = protocol.__dict__.get("protocol_name")
    return name if isinstance(name, str) and name else protocol.__name__


def _methods_protocol_version(protocol: type) -> str | None:
    """A Protocol's own `protocol_version`, checked; None when it declares none."""
    version = protocol.__dict__.get("protocol_version")
    if version is None:
        return None
    if not isinstance(version, str):
        raise TypeError(f"{protocol.__name__}.protocol_version must be a str, got {type(version).__name__}")
    parse_version(version)
    return version


# ---- a Protocol class -> its methods

_METHODS: weakref.WeakKeyDictionary[type, Mapping[str, RpcMethodInfo]] = weakref.WeakKeyDictionary()


def rpc_methods(protocol: type) -> Mapping[str, RpcMethodInfo]:
    """Return the public methods of a Protocol class, inherited ones included; read-only, cached.

    Raises TypeError for hints that cannot be resolved or mapped, unannotated parameters, and parameters that cannot
    be passed by keyword.
    """
    if not isinstance(protocol, type):
        raise TypeError(f"expected a Protocol class, got a {type(protocol).__name__} object")
    known = _METHODS.get(protocol)
    if known is None:
        found = {}
        for name in dir(protocol):
            member = None if name.startswith("_") else getattr(protocol, name, None)
            if callable(member) and not isinstance(member, type):
                found[name] = _methods_info(protocol, name, member)
        known = _METHODS[protocol] = types.MappingProxyType(found)
    return known


def describe_rpc(protocol: type, *, methods: Mapping[str, RpcMethodInfo] | None = None) -> str:
    """Return a readable summary of a Protocol, methods sorted by name."""
    lines = [f"RPC Service: {_methods_protocol_name(protocol)}"]
    for _, info in sorted((rpc_methods(protocol) if methods is None else methods).items()):
        lines += ["", f"  {info.method_type.value} {_methods_signature(info)}"]
        if info.doc:
            lines.append(f"    {info.doc.strip().splitlines()[0]}")
    return "\n".join(lines)


def _methods_signature(method: Any) -> str:
    """`add(a: double) -> double`, of an RpcMethodInfo or of what a client knows about a method."""
    parameters = _log_schema(method.params_schema) if len(method.params_schema) else "()"
    if method.method_type is MethodType.STREAM:
        returned = {True: "exchange", False: "producer", None: "stream"}[method.is_exchange]
        if method.header_schema is not None:
            returned += f", header {_log_schema(method.header_schema)}"
    else:
        returned = str(method.result_schema.field(0).type) if method.has_return else "None"
    return f"{method.name}{parameters} -> {returned}"


def _methods_info(protocol: type, name: str, member: Callable[..., Any]) -> RpcMethodInfo:
    import inspect

    where = f"{protocol.__name__}.{name}()"
    hints = _types_hints(member, where)
    if waits := _methods_not_called(member):
        raise TypeError(f"{where} is {waits}")
    is_method = isinstance(inspect.getattr_static(protocol, name), types.FunctionType)
    parameters = _methods_parameters(where, inspect.signature(member), is_method)
    fields = []
    for parameter in parameters:
        if parameter.name not in hints:
            order = "" if _methods_is_protocol(protocol) else " (the Protocol class comes first, then the object)"
            raise TypeError(f"{where} parameter '{parameter.name}' has no annotation; it would never be sent{order}")
        fields.append(_methods_field(parameter.name, hints[parameter.name], f"{where} parameter '{parameter.name}'"))
    returned, returns_ref = _methods_without_ref(hints.get("return", type(None)), where)
    core = _types_strip(returned)[0]
    stream = core is Stream or typing.get_origin(core) is Stream
    has_return = not stream and core is not type(None) and core is not None
    result = pa.schema([_methods_field("result", returned, f"{where} result")]) if has_return else EMPTY_SCHEMA
    doc = inspect.getdoc(member)
    state, header = (*typing.get_args(core), None, None)[:2] if stream else (None, None)
    return RpcMethodInfo(
        name=name,
        params_schema=pa.schema(fields),
        result_schema=result,
        result_type=returned,
        method_type=MethodType.STREAM if stream else MethodType.UNARY,
        has_return=has_return,
        doc=doc,
        param_defaults={p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty},
        param_types={p.name: hints[p.name] for p in parameters},
        param_docs=_methods_param_docs(doc or "", {p.name for p in parameters}),
        header_type=header if _types_is_dataclass(header) else None,
        is_exchange=_methods_is_exchange(state),
        protocol_name=_methods_protocol_name(protocol),
        returns_ref=returns_ref,
        returns_undeclared="return" not in hints,
    )


def _methods_is_protocol(cls: object) -> bool:
    return bool(getattr(cls, "_is_protocol", False))  # what typing.is_protocol() reads, from 3.13


def _methods_not_called(function: object) -> str:
    """Why calling a function does not run it, if it does not; such a method could never answer."""
    import inspect

    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "async def; methods run in a thread of the server: write def"
    if inspect.isgeneratorfunction(function):
        return "a generator; return a list, or a Stream whose state produces the batches"
    return ""


def _methods_hint_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _methods_without_ref(returned: Any, where: str) -> tuple[Any, bool]:
    """Take ExternalRef off a return annotation; what is left has the schema (storage.md section 4)."""
    is_union = typing.get_origin(returned) in (typing.Union, types.UnionType)
    members = typing.get_args(returned) if is_union else (returned,)
    if ExternalRef not in members:
        return returned, False
    rest: Any = tuple(member for member in members if member is not ExternalRef and member is not type(None))
    if not rest or any(member is Stream or typing.get_origin(member) is Stream for member in rest):
        raise TypeError(f"{where} result: ExternalRef stands for a unary result; annotate `T | ExternalRef`")
    return typing.Union[tuple(member for member in members if member is not ExternalRef)], True  # noqa: UP007


def _methods_field(name: str, hint: Any, where: str) -> pa.Field[Any]:
    try:
        return _types_field(name, hint, top=True)
    except TypeError as exc:
        exc.add_note(where)
        raise


def _methods_param_docs(doc: str, names: set[str]) -> dict[str, str]:
    """The lines `name: text` and `name (type): text` of a docstring, with the deeper lines that continue them."""
    found: dict[str, str] = {}
    name, indent = "", 0
    for line in doc.splitlines():
        match = re.match(r"( *)(\w+)(?: \([^)]*\))?: +(\S.*)", line)
        if match and match[2] in names and match[2] not in found:
            name, indent = match[2], len(match[1])
            found[name] = match[3].strip()
        elif name and line.strip() and len(line) - len(line.lstrip()) > indent:
            found[name] += f" {line.strip()}"
        else:
            name = ""
    return found


def _methods_parameters(where: str, signature: inspect.Signature, is_method: bool) -> list[inspect.Parameter]:
    """The parameters after `self`; every one must be passable by keyword."""
    import inspect

    kinds = {
        inspect.Parameter.POSITIONAL_ONLY: "'{}' is positional-only (before '/')",
        inspect.Parameter.VAR_POSITIONAL: "'{}' is *args",
        inspect.Parameter.VAR_KEYWORD: "'{}' is **kwargs",
    }
    parameters = list(signature.parameters.values())
    if is_method and not (parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL):
        if not parameters or (parameters[0].name != "self" and parameters[0].annotation is not inspect.Parameter.empty):
            raise TypeError(f"{where} has no 'self': write it before the first parameter")
        parameters = parameters[1:]
    problems = [kinds[p.kind].format(p.name) for p in parameters if p.kind in kinds]
    if problems:
        raise TypeError(
            f"{where} has parameters incompatible with the RPC wire protocol (all parameters must be"
            " keyword-passable):\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
    if any(p.name == "ctx" for p in parameters):
        raise TypeError(f"{where} has a parameter 'ctx'; that name is the call context of implementations")
    return parameters


def _methods_is_exchange(state: Any) -> bool | None:
    if not isinstance(state, type):
        return None
    if issubclass(state, ExchangeState):
        return True
    return False if issubclass(state, ProducerState) else None


# ---- streams


class AnnotatedBatch(_Record):
    """A batch with its custom metadata; immutable. Speaks the Arrow PyCapsule interface."""

    __slots__ = ("_shared", "batch", "custom_metadata")
    __match_args__ = ("batch", "custom_metadata")
    batch: pa.RecordBatch
    custom_metadata: pa.KeyValueMetadata | None
    _shared: bool  # its contents are in shared memory

    def __init__(
        self,
        batch: pa.RecordBatch,
        custom_metadata: pa.KeyValueMetadata | None = None,
        *,
        _shared: bool = False,
    ) -> None:
        _ANNOTATED_BATCH(self, batch)
        _ANNOTATED_METADATA(self, custom_metadata)
        _ANNOTATED_SHARED(self, _shared)

    @classmethod
    def from_pydict(cls, data: dict[str, Any], schema: pa.Schema | None = None) -> AnnotatedBatch:
        """Build from columns of Python values."""
        return cls(pa.RecordBatch.from_pydict(data if schema is None else _types_checked(data, schema), schema=schema))

    def release(self) -> None:
        """Let go of a batch in shared memory; afterwards `batch` is an error. Idempotent; does nothing to others.

        Its region is used again when columns and slices of it that are kept elsewhere are gone too.
        """
        if self._shared:
            _ANNOTATED_SHARED(self, False)
            _ANNOTATED_DROP(self)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            if name == "batch":
                raise ValueError("this batch has been released; what is needed for longer must be copied before")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]:
        return cast("tuple[object, object]", self.batch.__arrow_c_array__(requested_schema))

    def __arrow_c_schema__(self) -> object:
        return self.batch.schema.__arrow_c_schema__()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AnnotatedBatch):
            return NotImplemented
        # KeyValueMetadata cannot be compared with None
        mine, theirs = dict(self.custom_metadata or {}), dict(other.custom_metadata or {})
        return self.batch.equals(other.batch) and mine == theirs

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AnnotatedBatch({_log_batch(self.batch)}, custom_metadata={_log_metadata(self.custom_metadata)})"


# The slots' own setters: one of these is made per turn on each side, and object.__setattr__ costs twice as much.
_ANNOTATED_BATCH, _ANNOTATED_METADATA, _ANNOTATED_SHARED = (
    getattr(AnnotatedBatch, name).__set__ for name in ("batch", "custom_metadata", "_shared")
)
_ANNOTATED_DROP: Callable[[AnnotatedBatch], None] = getattr(AnnotatedBatch, "batch").__delete__  # noqa: B009


class StreamState(ArrowSerializableDataclass, abc.ABC):
    """What a stream remembers between turns; subclasses are dataclasses. One thread uses it at a time."""

    CALL_STATE_TYPE: ClassVar[type | None] = None

    @abc.abstractmethod
    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Answer one input batch."""

    def bind_call_state(self, call_state: ArrowSerializableDataclass | None) -> None:
        """Receive `Stream.call_state`, the immutable half: when the stream begins, and over HTTP in every turn."""

    def rehydrate(self, implementation: object) -> None:
        """Restore transient fields after the state has travelled (HTTP)."""

    def on_cancel(self, ctx: CallContext) -> None:
        """The caller does not want more; release resources. May log, may not emit."""


def _methods_travels_by_fields(cls: type) -> bool:
    """Whether a class leaves its coding to us."""
    own = ArrowSerializableDataclass
    return (
        getattr(cls, "serialize_to_bytes", None) is own.serialize_to_bytes
        and getattr(getattr(cls, "deserialize_from_bytes", None), "__func__", None)
        is own.deserialize_from_bytes.__func__  # type: ignore[attr-defined]
    )


def check_state_class(cls: type) -> None:
    """Raise TypeError, which names the field, for a class of stream states that cannot travel (HTTP)."""
    import inspect

    if not _methods_travels_by_fields(cls):
        return
    own = [name for name, hint in inspect.get_annotations(cls).items() if "ClassVar" not in str(hint)]
    if own or getattr(cls, "__dataclass_fields__", None):
        _types_spec(cls)


def seal_state(state: ArrowSerializableDataclass) -> bytes:
    """A stream's state as bytes, from which the same state is made again; TypeError, with the field, when it is not.

    Over HTTP a state travels so between its turns; what would come back as something else is refused the first time.
    """
    import dataclasses

    packed = state.serialize_to_bytes()
    cls = type(state)
    if not _methods_travels_by_fields(cls):
        return packed
    twin = cls.deserialize_from_bytes(packed)
    names = {field.name for field in dataclasses.fields(cast(Any, state))}
    hooks = (StreamState.rehydrate, StreamState.bind_call_state)  # who has one of these sets more in every turn
    extra = [
        name
        for name in getattr(state, "__dict__", ())
        if name not in names and not isinstance(getattr(cls, name, None), functools.cached_property)
    ]
    if extra and (getattr(cls, "rehydrate", hooks[0]), getattr(cls, "bind_call_state", hooks[1])) == hooks:
        raise TypeError(
            f"{type(state).__name__}.{extra[0]} is no field, so it does not travel: declare it, or make it"
            " Annotated[T, Transient()] with a default and set it in rehydrate()"
        )
    for name in _types_spec(cls).codecs:
        value, back = getattr(state, name), getattr(twin, name, None)
        if not _methods_same(value, back):
            raise TypeError(
                f"{type(state).__name__}.{name} is a {type(value).__name__} that comes back as a {type(back).__name__}"
                f" ({_log_line(repr(back))[:80]}): give the field a value of its declared type"
            )
    return packed


def _methods_same(one: Any, other: Any) -> bool:
    """Whether two values are the same data, of the same types all the way down; a number may change its kind only."""
    if type(one).__module__ == "numpy" and hasattr(one, "item") and not getattr(one, "ndim", 0):
        one = one.item()
    if type(one) in (int, float) and type(other) in (int, float):
        return bool(one == other or (one != one and other != other))
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_methods_same, one, other))
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(_methods_same, one.items(), other.items()))
    if isinstance(one, set | frozenset):
        return one == other and sorted(map(str, map(type, one))) == sorted(map(str, map(type, other)))
    if isinstance(one, ArrowSerializableDataclass):
        return all(_methods_same(getattr(one, n), getattr(other, n, None)) for n in _types_spec(type(one)).codecs)
    if getattr(one, "tzinfo", None) is not None and one.utcoffset() != other.utcoffset():
        return False
    try:
        return bool(one == other)
    except ValueError:  # of an array: as good as can be said
        return True


def _methods_settle(state: Any) -> None:
    """Make members of enums and the like that a field of a plain type holds values of that type, on all transports."""
    for name, kind in _methods_plain_fields(type(state)):
        value: Any = getattr(state, name, None)
        if type(value) is not kind and isinstance(value, (kind, int) if kind is float else kind):
            object.__setattr__(state, name, kind(value.value if isinstance(value, enum.Enum) else value))


def _methods_plain_fields(cls: type) -> tuple[tuple[str, type], ...]:
    """The fields of a state that are declared as str, int, float or bytes, or as one of these or None."""
    known = cls.__dict__.get("_vgi_rpc_plain")
    if known is None:
        try:
            hints = {name: _types_strip(hint)[0] for name, hint in typing.get_type_hints(cls).items()}
        except (NameError, TypeError, AttributeError):  # of a local class: nothing is known
            hints = {}
        fields = getattr(cls, "__dataclass_fields__", {})
        known = tuple(
            (name, hint) for name, hint in hints.items() if hint in (str, int, float, bytes) and name in fields
        )
        cls._vgi_rpc_plain = known  # type: ignore[attr-defined]
    return cast("tuple[tuple[str, type], ...]", known)


class ProducerState(StreamState):
    """State of a producer: one batch per turn, until `out.finish()`."""

    @abc.abstractmethod
    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit one batch, or finish, or both."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Ignore the tick and produce."""
        self.produce(out, ctx)


class ExchangeState(StreamState):
    """State of an exchange: one output batch for each input batch."""

    @abc.abstractmethod
    def exchange(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Emit exactly one batch."""

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        """Answer the input."""
        self.exchange(input, out, ctx)


_S = TypeVar("_S", covariant=True)
if TYPE_CHECKING:  # `Stream[S]` alone is fine for type checkers
    from typing_extensions import TypeVar as _TypeVarDefault

    _H = _TypeVarDefault("_H", covariant=True, default=None)
else:
    _H = TypeVar("_H", covariant=True)


class Stream(_Record, Generic[_S, _H]):
    """What a stream method returns: `Stream[State]`, or `Stream[State, Header]`; immutable (API.md section 2.5).

    Args:
        output_schema: schema of every batch the stream emits.
        state: answers the turns.
        input_schema: schema of the inputs of an exchange; left empty, the stream is a producer.
        header: sent once, before the data.
        call_state: the immutable half of the state; HTTP seals it once.
    """

    __slots__ = ("call_state", "header", "input_schema", "output_schema", "state")
    __match_args__ = ("output_schema", "state", "input_schema", "header", "call_state")
    output_schema: pa.Schema
    state: _S
    input_schema: pa.Schema
    header: _H | None
    call_state: ArrowSerializableDataclass | None

    def __init__(
        self,
        output_schema: pa.Schema,
        state: _S,
        input_schema: pa.Schema = EMPTY_SCHEMA,
        header: _H | None = None,
        call_state: ArrowSerializableDataclass | None = None,
    ) -> None:
        self._set(
            output_schema=output_schema, state=state, input_schema=input_schema, header=header, call_state=call_state
        )

    @classmethod
    def from_arrow(cls, obj: Any, *, header: Any = None) -> Stream[Any, Any]:
        """Serve anything with `__arrow_c_stream__` (table, reader, polars frame, DuckDB relation), batch by batch.

        The source is read while the caller reads, in this process only. Metadata of its schema travels: a pandas index
        and extension types are in there. TypeError when it is no Arrow stream.
        """
        if isinstance(obj, pa.RecordBatch):
            obj = pa.Table.from_batches([obj])
        if isinstance(obj, pa.Table):
            reader = obj.to_reader()
        else:
            reader = obj if isinstance(obj, pa.RecordBatchReader) else pa.RecordBatchReader.from_stream(obj)
        return Stream(reader.schema, _MethodsReaderState(reader), header=header)

    if TYPE_CHECKING:  # a stream as its caller sees it: a StreamSession

        def tick(self, custom_metadata: pa.KeyValueMetadata | None = None) -> AnnotatedBatch: ...
        def exchange(self, input: AnnotatedBatch) -> AnnotatedBatch: ...
        def typed_header(self, header_type: type[_T]) -> _T: ...
        def to_reader(self) -> pa.RecordBatchReader: ...
        def read_all(self) -> pa.Table: ...
        @property
        def schema(self) -> pa.Schema: ...
        def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...
        def close(self) -> None: ...
        def cancel(self) -> None: ...
        def __iter__(self) -> Iterator[AnnotatedBatch]: ...
        def __enter__(self) -> Self: ...
        def __exit__(self, *exc: object) -> None: ...
    else:

        def __class_getitem__(cls, item):
            """`Stream[S]` is `Stream[S, None]`: before 3.13 a TypeVar has no default, and typing makes None a type."""
            return types.GenericAlias(cls, item if isinstance(item, tuple) else (item, None))

        def _client_only(self, *args, **kwargs):
            """What a caller does with its session; on the server's Stream it has no meaning."""
            raise NotImplementedError("a Stream is what a server returns; its caller gets a StreamSession")

        tick = exchange = close = cancel = __iter__ = __enter__ = __exit__ = _client_only

    def __repr__(self) -> str:
        return f"Stream(output_schema={_log_schema(self.output_schema)}, state={type(self.state).__name__})"


class _MethodsReaderState(ProducerState):
    """Produces what an Arrow reader yields; lives in one process, so it cannot travel (HTTP)."""

    def __init__(self, reader: pa.RecordBatchReader) -> None:
        self._reader = reader

    def produce(self, out: OutputCollector, ctx: CallContext) -> None:
        """Emit the next batch, or finish."""
        try:
            batch = self._reader.read_next_batch()
        except StopIteration:
            out.finish()
            return
        out.emit(batch)

    def serialize_to_bytes(self) -> bytes:
        """Refuse: a reader cannot travel."""
        raise TypeError(
            "a stream of Stream.from_arrow() reads its source in one process and cannot go on in another, as streams"
            " over HTTP do: return a Stream whose ProducerState finds its place again, or one pa.RecordBatch"
        )

    def on_cancel(self, ctx: CallContext) -> None:
        """Let the source go."""
        self._reader.close()


class OutputCollector:
    """Collects what one turn emits, in order: messages, and one data batch (runtime.md section 3)."""

    __slots__ = (
        "_data",
        "_prior_data_bytes",
        "_producer_mode",
        "_server_id",
        "batches",
        "externalization_enabled",
        "finished",
        "output_schema",
        "preferred_response_bytes",
        "remaining_externalized_response_bytes",
        "remaining_response_bytes",
        "response_limit_bytes",
    )

    def __init__(
        self,
        output_schema: pa.Schema,
        *,
        prior_data_bytes: int = 0,
        server_id: str | None = None,
        producer_mode: bool = True,
        remaining_response_bytes: int | None = None,
        response_limit_bytes: int | None = None,
        preferred_response_bytes: int | None = None,
        remaining_externalized_response_bytes: int | None = None,
        externalization_enabled: bool = False,
    ) -> None:
        self.output_schema = output_schema
        self.batches: list[AnnotatedBatch] = []
        self.finished = False
        self.remaining_response_bytes = remaining_response_bytes
        self.response_limit_bytes = response_limit_bytes
        self.preferred_response_bytes = preferred_response_bytes
        self.remaining_externalized_response_bytes = remaining_externalized_response_bytes
        self.externalization_enabled = externalization_enabled
        self._data: AnnotatedBatch | None = None
        self._prior_data_bytes = prior_data_bytes
        self._producer_mode = producer_mode
        self._server_id = server_id or ""

    def emit(self, batch: pa.RecordBatch, metadata: dict[str, str] | None = None) -> None:
        """Emit the turn's data batch; columns are selected by name and cast to the output schema.

        Raises RuntimeError for a second one, ValueError for a missing column, Arrow's error for an impossible cast,
        and what `encode_metadata` does.
        """
        if self._data is not None:
            raise RuntimeError("Only one data batch may be emitted per call")
        if not isinstance(batch, pa.RecordBatch):
            raise TypeError(
                f"emit() takes a pa.RecordBatch, got {type(batch).__name__};"
                " there are emit_pydict(), and Stream.from_arrow() for whole tables"
            )
        schema = self.output_schema
        if batch.schema is not schema and not batch.schema.equals(schema):
            batch = _methods_project(batch, schema)
        if not batch.num_rows:  # see _ipc_without_rows
            batch = empty_batch(schema)
        self._data = AnnotatedBatch(batch, encode_metadata(metadata) if metadata else None)
        self.batches.append(self._data)

    def emit_arrays(self, arrays: Sequence[pa.Array[Any]], metadata: dict[str, str] | None = None) -> None:
        """Emit a batch of these arrays, in the order of the output schema."""
        self.emit(pa.RecordBatch.from_arrays(list(arrays), schema=self.output_schema), metadata)

    def emit_pydict(self, data: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
        """Emit a batch of columns of Python values."""
        columns = _types_checked(data, self.output_schema)
        self.emit(pa.RecordBatch.from_pydict(columns, schema=self.output_schema), metadata)

    def finish(self) -> None:
        """End a producer's stream after this turn; RuntimeError on an exchange."""
        if not self._producer_mode:
            raise RuntimeError(
                "finish() is not allowed on exchange streams;"
                " exchange streams must emit exactly one data batch per call"
            )
        self.finished = True

    def client_log(self, level: Level, message: str, **extra: object) -> None:
        """Send a message to the caller's `on_log`, in order with the data."""
        self.emit_client_log_message(Message(level, message, **extra))

    def emit_client_log_message(self, msg: Message) -> None:
        """Send a ready message."""
        metadata = _log_metadata_bytes(msg, server_id=self._server_id)
        self.batches.append(AnnotatedBatch(empty_batch(self.output_schema), pa.KeyValueMetadata(metadata)))

    def validate(self) -> None:
        """Raise RuntimeError when no data batch was emitted."""
        if self._data is None:
            do = "emit one, or call finish()" if self._producer_mode else "an exchange answers each input with one"
            raise RuntimeError(f"No data batch was emitted; {do}")

    def merge_data_metadata(self, metadata: pa.KeyValueMetadata) -> None:
        """Add metadata to the emitted batch; RuntimeError when there is none, and what `encode_metadata` raises."""
        self._merge(encode_metadata(metadata))

    def _merge(self, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata) -> None:
        old = self.data_batch
        self._data = AnnotatedBatch(old.batch, merge_metadata(old.custom_metadata, metadata))
        self.batches = [self._data if item is old else item for item in self.batches]

    @property
    def data_batch(self) -> AnnotatedBatch:
        """The emitted data batch; RuntimeError when there is none."""
        if self._data is None:
            raise RuntimeError("No data batch was emitted")
        return self._data

    @property
    def total_data_bytes(self) -> int:
        """Bytes of data of this turn and of earlier ones of the same response."""
        return self._prior_data_bytes + (0 if self._data is None else self._data.batch.get_total_buffer_size())


_METHODS_OWN = IpcLimits(max_message_bytes=1 << 62)  # of an application's own batches; what is in them may be a peer's


def _methods_project(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    missing = [name for name in schema.names if name not in batch.schema.names]
    if missing:
        raise ValueError(
            "emitted batch is missing column(s) required by output_schema: "
            f"batch has {batch.schema.names}, output_schema needs {schema.names}"
        )
    return _ipc_fit(batch.select(schema.names), schema, _METHODS_OWN)


# ---- metadata helpers


_METHODS_LOCAL_KEYS = {SHM_SOURCE_KEY, LOCATION_FETCH_MS_KEY, LOCATION_SOURCE_KEY}  # say how a batch came to be here


def encode_metadata(
    metadata: Mapping[str, str] | Mapping[bytes, bytes] | pa.KeyValueMetadata,
) -> pa.KeyValueMetadata:
    """Return what users say about a batch as it travels; what the framework noted about one that came is left out.

    Raises TypeError for what is neither str nor bytes, ValueError for a key that begins with `vgi_rpc.`, which would
    steer the connection, for a key that is there twice, and for entries over the limits of `IpcLimits`.
    """
    found: dict[bytes, bytes] = {}
    for entry in metadata.items():
        key, value = (_methods_text(text, entry[0]) for text in entry)
        if key in _METHODS_LOCAL_KEYS:
            continue
        if key.startswith(b"vgi_rpc."):
            raise ValueError(f"metadata key {entry[0]!r}: keys that begin with 'vgi_rpc.' are reserved; take another")
        if key in found:
            raise ValueError(f"metadata key {entry[0]!r} is there twice")
        found[key] = value
    limit = IpcLimits().max_metadata_bytes // 2  # the other half is for what describes the columns
    if sum(len(key) + len(value) + 64 for key, value in found.items()) > limit:
        raise ValueError(f"more than {limit} bytes of metadata on one batch; send them as a column")
    return pa.KeyValueMetadata(found)


def _methods_text(text: object, key: object) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    if not isinstance(data, bytes):
        raise TypeError(f"metadata key {key!r}: keys and values are str or bytes, got {type(text).__name__}")
    limit = IpcLimits().max_metadata_entry_bytes
    if len(data) > limit:
        raise ValueError(
            f"metadata key {str(key)[:80]!r}: an entry of {len(data)} bytes;"
            f" the limit is max_metadata_entry_bytes={limit}"
        )
    return data


def merge_metadata(
    *metadata_dicts: pa.KeyValueMetadata | Mapping[bytes, bytes] | Mapping[str, str] | None,
) -> pa.KeyValueMetadata | None:
    """Merge metadata, later ones win; None when nothing is left."""
    found: dict[bytes, bytes] = {}
    for metadata in metadata_dicts:
        for key, value in (metadata or {}).items():
            name = key if isinstance(key, bytes) else key.encode()
            found[name] = value if isinstance(value, bytes) else value.encode()
    return pa.KeyValueMetadata(found) if found else None


def strip_keys(metadata: pa.KeyValueMetadata | None, *keys: bytes) -> pa.KeyValueMetadata | None:
    """Return the metadata without these keys; None when nothing is left."""
    return merge_metadata({key: value for key, value in (metadata or {}).items() if key not in keys})


# ---- the contract's hash: sha256 over canonical JSON of names and type tokens


class UnsupportedArrowTypeError(TypeError):
    """An Arrow type without a portable token."""


_METHODS_SAME_TOKENS = "null bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 binary large_binary binary_view"
_METHODS_PLAIN_TOKENS = {name: name for name in _METHODS_SAME_TOKENS.split()} | {
    "halffloat": "float16",
    "float": "float32",
    "double": "float64",
    "string": "utf8",
    "large_string": "large_utf8",
    "string_view": "utf8_view",
    "date32[day]": "date32",
    "date64[ms]": "date64",
    "month_day_nano_interval": "interval_month_day_nano",
    "month_interval": "interval_months",
    "day_time_interval": "interval_day_time",
}


def type_token(dtype: pa.DataType) -> str:
    """Return the canonical text of an Arrow type, the same in every language (wire.md section 9.4)."""
    if isinstance(dtype, pa.BaseExtensionType):
        return f"extension({dtype.extension_name})<{type_token(dtype.storage_type)}>"
    plain = _METHODS_PLAIN_TOKENS.get(str(dtype))
    if plain is not None:
        return plain
    is_ = pa.types
    if is_.is_dictionary(dtype):
        ordered = ",ordered" if dtype.ordered else ""
        return f"dictionary<index:{type_token(dtype.index_type)},value:{type_token(dtype.value_type)}>{ordered}"
    if is_.is_fixed_size_binary(dtype):
        return f"fixed_size_binary({dtype.byte_width})"
    if is_.is_decimal(dtype):
        return f"decimal{dtype.bit_width}({dtype.precision},{dtype.scale})"
    if is_.is_time(dtype) or is_.is_duration(dtype):
        name = "duration" if is_.is_duration(dtype) else f"time{dtype.bit_width}"
        return f"{name}({dtype.unit})"
    if is_.is_timestamp(dtype):
        return f"timestamp({dtype.unit}{f',tz={dtype.tz}' if dtype.tz else ''})"
    return _methods_nested_token(dtype)


def _methods_nested_token(dtype: pa.DataType) -> str:
    is_ = pa.types
    lists = {
        "list": is_.is_list,
        "large_list": is_.is_large_list,
        "list_view": is_.is_list_view,
        "large_list_view": is_.is_large_list_view,
    }
    for name, test in lists.items():
        if test(dtype):
            return f"{name}<{_methods_child('item', dtype.value_field)}>"
    if is_.is_fixed_size_list(dtype):
        return f"fixed_size_list({dtype.list_size})<{_methods_child('item', dtype.value_field)}>"
    if is_.is_map(dtype):
        key, item = _methods_child("key", dtype.key_field), _methods_child("value", dtype.item_field)
        return f"map<{key},{item}>{',keys_sorted' if dtype.keys_sorted else ''}"
    children = [dtype.field(i) for i in range(dtype.num_fields)]
    if is_.is_struct(dtype):
        return f"struct<{','.join(_methods_child(field.name, field) for field in children)}>"
    if is_.is_union(dtype):
        codes = zip(dtype.type_codes, children, strict=True)
        members = ",".join(f"{code}={_methods_child(field.name, field)}" for code, field in codes)
        return f"{dtype.mode}_union<{members}>"
    if is_.is_run_end_encoded(dtype):
        return f"run_end_encoded<run_ends:{type_token(dtype.run_end_type)},values:{type_token(dtype.value_type)}>"
    raise UnsupportedArrowTypeError(f"Arrow type {dtype} has no portable token")


def _methods_child(name: str, field: pa.Field[Any]) -> str:
    return f"{name}{'?' if field.nullable else ''}:{type_token(field.type)}"


def field_token(field: pa.Field[Any]) -> dict[str, object]:
    """Return the canonical object of a field."""
    return {"name": field.name, "nullable": field.nullable, "type": type_token(field.type)}


def schema_tokens(schema: pa.Schema) -> list[dict[str, object]]:
    """Return the canonical objects of a schema, in order."""
    return [field_token(field) for field in schema]


def canonical_json(value: Any) -> bytes:
    """Return RFC 8785 JSON of strings, booleans, None, integers below 2**53, lists and objects; TypeError otherwise."""
    import json

    return json.dumps(_methods_canonical(value), ensure_ascii=False, separators=(",", ":")).encode()


def _methods_canonical(value: Any) -> Any:
    """The same value with its keys in RFC 8785's order, which is by UTF-16 code units."""
    if isinstance(value, Mapping):
        return {key: _methods_canonical(value[key]) for key in sorted(value, key=lambda key: key.encode("utf-16-be"))}
    if isinstance(value, list | tuple):
        return [_methods_canonical(item) for item in value]
    if value is None or isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**53):
        return value
    raise TypeError(f"canonical JSON of {type(value).__name__} {value!r} is not defined here")


def protocol_description(protocol_name: str, methods: Mapping[str, RpcMethodInfo]) -> dict[str, Any]:
    """Return what the hash is computed over."""
    described = []
    for name, info in sorted(methods.items()):
        method: dict[str, Any] = {
            "name": name,
            "type": info.method_type.value,
            "has_return": info.has_return,
            "has_header": info.header_type is not None,
        }
        try:
            method["params"] = schema_tokens(info.params_schema)
            if info.has_return:
                method["result"] = schema_tokens(info.result_schema)
            if info.header_schema is not None:
                method["header"] = schema_tokens(info.header_schema)
        except UnsupportedArrowTypeError as exc:
            raise UnsupportedArrowTypeError(f"{name}(): {exc}") from exc
        described.append(method)
    return {"protocol": protocol_name, "methods": described}


def compute_protocol_hash(protocol_name: str, methods: Mapping[str, RpcMethodInfo]) -> str:
    """Return the SHA-256 of a contract as 64 hex digits; equal in every language and for every copy of this file."""
    import hashlib

    return hashlib.sha256(HASH_DOMAIN + canonical_json(protocol_description(protocol_name, methods))).hexdigest()


# ==== 9. WIRE =========================================================================================================
# Uses: 1, 2, 3, 4, 5, 7, 8. A call becomes bytes and bytes become a call (wire.md sections 3 to 7); no socket, thread
# or clock in here. What never changes about a method is compiled once into its plan.
#
#   request   one stream, one batch: a column per parameter, one row; metadata says which method of which protocol
#   reply     one stream: log batches, then one result or error batch
#   stream    request; then [header stream]; then an input and an output stream, turn by turn (wire.md section 8)
#

_WIRE_BYTES = (pa.binary(), pa.utf8())
_WIRE_NOTHING: Mapping[bytes, bytes] = types.MappingProxyType({})


class _WirePlan:
    """One method, compiled at first use: converters, constants and the learned layouts of its messages."""

    def __init__(self, info: RpcMethodInfo, protocol: str, version: str | None, *, raw: bool = False) -> None:
        """`raw` leaves values as pyarrow takes and gives them, for callers that know only the schema."""
        self.info = info
        self.name = info.name
        self.protocol = protocol
        self.version = version
        self.names = info.param_names
        self.types = tuple(field.type for field in info.params_schema)
        self.nullable = tuple(field.nullable for field in info.params_schema)
        # What is raw has no annotations; the Arrow type alone says what pyarrow may be given.
        codecs = [
            _types_raw(dtype) if raw else _types_codec(info.param_types[name], top=True)
            for name, dtype in zip(self.names, self.types, strict=True)
        ]
        self.encoders = tuple(codec.cell for codec in codecs)
        self.decoders = [
            (name, codec.decode) for name, codec in zip(self.names, codecs, strict=True) if codec.decode is not None
        ]
        # Templates take values of exactly these types as they are; others are converted first.
        self.plain = all(codec.plain for codec in codecs)
        result = _types_codec(info.result_type, top=True) if info.has_return and not raw else None
        self.plain_result = result is not None and result.plain
        self.encode_result = None if result is None else result.cell
        self.decode_result = None if result is None else result.decode
        self.result_nullable = info.has_return and info.result_schema.field(0).nullable
        self.metadata = _wire_request_metadata(info.name, protocol, version)
        self.replies: list[_IpcCanonical] = []  # how replies of peers have looked
        if info.returns_ref:
            self.send_by_pyarrow()
        self.is_stream = info.method_type is MethodType.STREAM
        self.doing = f"{'stream init for' if self.is_stream else 'unary call to'} '{info.name}'"
        self.quick = 0  # runs in a row that took next to no time, at a server whose caller sends ahead

    @functools.cached_property
    def _request_template(self) -> _IpcCanonical | None:
        return _ipc_template(self.info.params_schema, self.metadata)

    @functools.cached_property
    def _deadline_template(self) -> _IpcCanonical | None:
        return _ipc_template(self.info.params_schema, {**self.metadata, DEADLINE_KEY: _IPC_DEADLINE})

    @functools.cached_property
    def _result_template(self) -> _IpcCanonical | None:
        return _ipc_template(self.info.result_schema, None)

    def template(self, budget: bytes, extra: Mapping[bytes, bytes] = _WIRE_NOTHING) -> _IpcCanonical | None:
        """What writes requests, with or without a deadline and what a connection adds; None: only pyarrow does."""
        if not extra:
            return self._deadline_template if budget else self._request_template
        deadline = {DEADLINE_KEY: _IPC_DEADLINE} if budget else {}
        return _ipc_template(self.info.params_schema, {**self.metadata, **extra, **deadline})

    def send_by_pyarrow(self) -> None:
        """Make `encode_reply` leave every result to those who may put something else in its place."""
        self._result_template = None

    def encode_reply(self, value: Any) -> _IpcMessages | None:
        """The reply by a template, or None: pyarrow has to look at the value."""
        template = self._result_template
        if template is None:
            return None
        if not self.info.has_return:
            return None if value is not None and self.info.returns_undeclared else template.encode(())
        if self.plain_result and (data := template.encode((value,))) is not None:
            return data
        if value is not None and self.encode_result is not None and not hasattr(value, "__next__"):  # iterate once
            try:
                value = self.encode_result(value)
            except Exception:  # the other path says what is wrong
                return None
        return template.encode((value,))

    def reply_bytes(self, reply: _IpcMessages) -> int:
        """`get_total_buffer_size()` of the result in what `encode_reply` made."""
        assert isinstance(self._result_template, _IpcCanonical)
        head = _ipc_pieces(reply)[0]
        return self._result_template.buffer_bytes(head, 0, len(head))

    def learn_reply(self, sample: bytes, batch: pa.RecordBatch) -> None:
        """Remember how a reply looks that is what the method declares; bounded, and never twice the same."""
        declared = self.info.result_schema  # whose nullability peers may differ about
        if batch.schema.names != declared.names or batch.schema.types != declared.types:
            return
        if any(layout.match(sample, 0) for layout in self.replies):
            return
        layout = _ipc_learn(sample, batch)
        if layout is not None:
            self.replies = [layout, *self.replies][:_IPC_LAYOUTS_MAX]


def _wire_request_metadata(method: str, protocol: str | None, version: str | None) -> _IpcMetadata:
    metadata = {RPC_METHOD_KEY: method.encode(), REQUEST_VERSION_KEY: REQUEST_VERSION}
    if protocol is not None:
        metadata[PROTOCOL_KEY] = protocol.encode()
    if version is not None:
        metadata[PROTOCOL_VERSION_KEY] = version.encode()
    return metadata


# ---- a call becomes bytes


def _wire_bind(plan: _WirePlan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Arguments in declaration order, defaults filled in; RpcArgumentError before any byte is written (API.md 9)."""
    names = plan.names
    if len(args) > len(names):
        raise RpcArgumentError(f"{plan.name}() takes {len(names)} argument(s) but {len(args)} were given")
    values = list(args)
    used = 0
    for name in names[len(args) :]:
        if name in kwargs:
            values.append(kwargs[name])
            used += 1
        elif name in plan.info.param_defaults:
            values.append(plan.info.param_defaults[name])
        else:
            raise RpcArgumentError(f"{plan.name}() missing required argument: '{name}'")
    if used != len(kwargs):
        raise _wire_unknown_argument(plan, args, kwargs)
    for i, value in enumerate(values):
        if value is None and not plan.nullable[i]:
            text = f"{plan.name}() parameter '{names[i]}' is not optional but got None"
            if plan.info.param_defaults.get(names[i], "") is None:
                text += f", its default; annotate {_methods_hint_name(plan.info.param_types[names[i]])} | None"
            raise RpcArgumentError(text)
    return values


def _wire_unknown_argument(plan: _WirePlan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> RpcArgumentError:
    twice = [name for name in plan.names[: len(args)] if name in kwargs]
    if twice:
        return RpcArgumentError(f"{plan.name}() got multiple values for argument '{twice[0]}'")
    unknown = next(name for name in kwargs if name not in plan.names)
    return RpcArgumentError(
        f"{plan.name}() got an unexpected argument '{unknown}'. Parameters: {', '.join(plan.names) or '(none)'}"
    )


def _wire_cells(plan: _WirePlan, values: Sequence[Any]) -> list[Any]:
    """Convert arguments to what a template or pa.array takes."""
    cells = []
    for i, value in enumerate(values):
        try:
            cells.append(plan.encoders[i](value))
        except Exception as exc:
            raise _wire_bad_argument(plan, i, exc) from exc
    return cells


def _wire_bad_argument(plan: _WirePlan, at: int, exc: Exception) -> RpcArgumentError:
    name = plan.names[at]
    wanted = _methods_hint_name(plan.info.param_types.get(name, plan.types[at]))
    return RpcArgumentError(f"{plan.name}() parameter '{name}': {_wire_noted(exc)} (declared {wanted})")


def _wire_noted(exc: Exception) -> str:
    """The text of a converter's error, with the places it has noted."""
    return exception_str(exc) + "".join(f", {note}" for note in getattr(exc, "__notes__", ()))


def _wire_request_batch(plan: _WirePlan, cells: list[Any]) -> pa.RecordBatch:
    if not cells:
        return empty_batch(EMPTY_SCHEMA)
    arrays = []
    for i, cell in enumerate(cells):
        try:
            arrays.append(_types_array(cell, plan.types[i]))
        except Exception as exc:
            raise _wire_bad_argument(plan, i, exc) from exc
    return pa.RecordBatch.from_arrays(arrays, schema=plan.info.params_schema)


def _wire_request(
    plan: _WirePlan,
    values: Sequence[Any],
    timeout: float | None = None,
    extra: Mapping[bytes, bytes] = _WIRE_NOTHING,
) -> _IpcMessages:
    """The complete request stream; with a timeout it carries the remaining time (DESIGN.md section 7).

    `extra` is further metadata, which no template of the plan knows.
    """
    cells = _wire_cells(plan, values)
    budget = _wire_budget(timeout)
    if _LOG_WIRE_REQUEST.isEnabledFor(logging.DEBUG):
        if not plan.is_stream:
            _LOG_WIRE_REQUEST.debug("Unary call: method=%s", plan.name)
        _LOG_WIRE_REQUEST.debug(
            "Write request: method=%s, schema=%s, kwargs={%s}, metadata=%s",
            plan.name,
            _log_schema(plan.info.params_schema),
            _log_kwargs(dict(zip(plan.names, values, strict=True))),
            _log_metadata(plan.metadata),
        )
    template = None if extra else plan.template(budget)
    data = None if template is None else template.encode(cells, budget)
    if data is not None:
        return data
    deadline = {DEADLINE_KEY: budget} if budget else {}
    return _wire_write_request(plan, _wire_request_batch(plan, cells), {**extra, **deadline})


def _wire_budget(timeout: float | None) -> bytes:
    return b"" if timeout is None else b"%016d" % max(int(timeout * 1e6), 0)


def _wire_write_request(plan: _WirePlan, batch: pa.RecordBatch, extra: Mapping[bytes, bytes] | None) -> list[_IpcPiece]:
    writer = _IpcWriter(batch.schema)
    writer.write(batch, {**extra, **plan.metadata} if extra else plan.metadata)
    writer.close()
    return writer.take()


def _wire_result_batch(plan: _WirePlan, value: Any) -> pa.RecordBatch:
    """The result batch of a unary method; a value that does not fit raises what the caller shall see."""
    if value is not None and plan.info.returns_undeclared:
        got = type(value).__name__
        raise TypeError(f"{plan.name}() returned a {got}, but the Protocol has no return annotation: write -> {got}")
    if not plan.info.has_return:
        return empty_batch(EMPTY_SCHEMA)
    if value is None and not plan.result_nullable:
        raise TypeError(
            f"{plan.name}() expected a non-None return value but got None;"
            f" its annotation is {_methods_hint_name(plan.info.result_type)}"
        )
    schema = plan.info.result_schema
    try:
        cell = value if value is None or plan.encode_result is None else plan.encode_result(value)
        column = _types_array(cell, schema.field(0).type)
    except Exception as exc:  # its class stays: it is the error's name on the wire
        wanted, got = _methods_hint_name(plan.info.result_type), type(value).__name__
        exc.args = (f"{plan.name}() must return {wanted}, got {got}: {_wire_noted(exc)}",)
        raise
    return pa.RecordBatch.from_arrays([column], schema=schema)


def _wire_error(exc: BaseException, server_id: str, request_id: str, tracebacks: bool) -> _IpcMetadata:
    """Metadata of the zero-row batch that carries an exception (wire.md section 6)."""
    message = Message.from_exception(exc, include_traceback=tracebacks)
    return _log_metadata_bytes(message, server_id=server_id, request_id=request_id)


# ---- bytes become a call: the checks of wire.md section 7, in its order


class _WireRequest(_NamedTuple):
    batch: pa.RecordBatch
    metadata: _IpcMetadata
    flaw: str = ""  # why its number of batches is refused


def _wire_read_request(source: _IpcSource, validation: IpcValidation) -> _WireRequest:
    """Steps 1 and 2: read the first batch, drain to the end."""
    reader = _IpcReader(source, validation)
    item = reader.read()
    if item is None:
        return _WireRequest(empty_batch(EMPTY_SCHEMA), {}, "Expected one batch in a request, got a stream without any")
    flaw = ""
    if _ipc_message(source) is not None:
        flaw = "Expected one batch in a request, got more: one row of arguments, then the end of the stream"
        reader.drain()
    return _WireRequest(item[0], item[1] or {}, flaw)


def _wire_method_name(metadata: _IpcMetadata) -> str:
    """Steps 3 to 6."""
    method = metadata.get(RPC_METHOD_KEY)
    if method is None:
        raise RpcError(
            "ProtocolError",
            "Missing 'vgi_rpc.method' in the request batch's custom metadata. Each request names its method there."
            " The input of a stream comes here when the method called is a unary one in this server's Protocol.",
        )
    version = metadata.get(REQUEST_VERSION_KEY)
    if version is None:
        raise VersionError(
            "Missing 'vgi_rpc.request_version' in the request batch's custom metadata. "
            f"This server speaks version {REQUEST_VERSION!r}."
        )
    if version != REQUEST_VERSION:
        raise VersionError(
            f"Unsupported request version {version!r}, expected {REQUEST_VERSION!r}. "
            "Use a client and a server of the same wire generation."
        )
    try:
        return method.decode()
    except UnicodeDecodeError as exc:
        raise RpcError("ProtocolError", f"Invalid 'vgi_rpc.method' {method!r}: not UTF-8") from exc


def _wire_check_rows(batch: pa.RecordBatch) -> None:
    """Step 8. A request that points elsewhere has no row of its own and says so here."""
    if batch.num_columns and batch.num_rows != 1:
        raise RpcError(
            "ProtocolError", f"Expected 1 row in request batch, got {batch.num_rows}. Each parameter is one column."
        )


def _wire_protocol_name(metadata: _IpcMetadata) -> str | None:
    """Step 11, first half: the routing key; None when it is absent."""
    key = metadata.get(PROTOCOL_KEY)
    if key is None:
        return None
    try:
        name = key.decode()
    except UnicodeDecodeError as exc:
        raise ProtocolNotSpecifiedError(f"'vgi_rpc.protocol' {key!r} is not UTF-8") from exc
    if not name:
        raise ProtocolNotSpecifiedError("'vgi_rpc.protocol' is empty; each request names the protocol it calls")
    try:
        return validate_protocol_name(name, allow_reserved=True)
    except ValueError as exc:
        raise ProtocolNotSupportedError(str(exc)) from exc


def _wire_check_version(protocol: str, required: str | None, metadata: _IpcMetadata) -> None:
    """Step 13 (wire.md section 7.3): major and minor must match when the protocol declares a version."""
    if required is None:
        return
    raw = metadata.get(PROTOCOL_VERSION_KEY)
    declared, direction = "<not declared>", None
    want = parse_version(required)
    if raw is not None:
        try:
            declared = raw.decode()
            got = parse_version(declared)
        except UnicodeDecodeError:
            declared = "<undecodable bytes>"
        except ValueError:
            pass
        else:
            if got[:2] == want[:2]:
                return
            if got > want:
                direction = (
                    f"server is too old; upgrade the VGI worker to a version supporting protocol_version {declared}."
                )
    direction = direction or (
        f"client is too old; upgrade the VGI extension/client to a version supporting protocol_version {required}."
    )
    raise ProtocolVersionError(
        f"VGI client/worker protocol_version mismatch for protocol '{protocol}'.\n"
        f"  Client: {declared}\n  Server: {required}\n  Direction: {direction}",
        protocol=protocol,
        client_version="" if raw is None else declared,
        server_version=required,
    )


def _wire_arguments(plan: _WirePlan, batch: pa.RecordBatch, limits: IpcLimits) -> dict[str, Any]:
    """Steps 14 to 18: the request row as keyword arguments. No value is read before the schema has been compared."""
    if not batch.schema.equals(plan.info.params_schema):
        _wire_check_schema(plan, batch.schema)
    cells = {name: _wire_cell(column, limits) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    kwargs = _wire_filled(plan, _wire_decode(plan, cells, limits))
    for name, nullable in zip(plan.names, plan.nullable, strict=True):
        if kwargs[name] is None and not nullable:
            # Some clients send null for what the caller left out. Where None is a value of its own, it stays None.
            if name not in plan.info.param_defaults:
                raise TypeError(f"{plan.name}() parameter '{name}' is not optional but got None")
            kwargs[name] = plan.info.param_defaults[name]
    return kwargs


def _wire_filled(plan: _WirePlan, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the defaults of those that the caller's older Protocol does not know."""
    return kwargs if len(kwargs) == len(plan.names) else {**plan.info.param_defaults, **kwargs}


def _wire_cell(column: pa.Array[Any], limits: IpcLimits) -> Any:
    """The first value of a column. as_py() copies megabytes three times, through pages that are new each time."""
    if column.type not in _WIRE_BYTES or column.null_count or column.get_total_buffer_size() <= _IPC_LARGE:
        return _ipc_unfold(column, limits)[0].as_py()
    _, offsets, data = column.buffers()
    begin, end = struct.unpack_from("<ii", offsets, 4 * column.offset)
    view = memoryview(data)[begin:end]
    return bytes(view) if column.type == pa.binary() else str(view, "utf-8")


def _wire_row_arguments(
    plan: _WirePlan, names: Sequence[str], row: Sequence[Any], limits: IpcLimits
) -> dict[str, Any] | None:
    """A row that a layout has read, as keyword arguments; None: let the pyarrow path decide."""
    kwargs = dict(zip(names, row, strict=True))
    if plan.decoders:
        try:
            kwargs = _wire_decode(plan, kwargs, limits)
        except Exception:
            return None
    return kwargs if names is plan.names else _wire_filled(plan, kwargs)


def _wire_decode(plan: _WirePlan, kwargs: dict[str, Any], limits: IpcLimits) -> dict[str, Any]:
    for name, decode in plan.decoders:
        if kwargs.get(name) is not None:
            kwargs[name] = _wire_nested(decode, kwargs[name], limits)
    return kwargs


def _wire_nested(decode: _TypesConvert, value: Any, limits: IpcLimits) -> Any:
    """Decode a value; streams inside it have the limits of the connection."""
    token = _ipc_limits.set(limits)
    try:
        return decode(value)
    finally:
        _ipc_limits.reset(token)


def _wire_check_schema(plan: _WirePlan, got: pa.Schema) -> None:
    """Steps 14, 16 and 17. Field and schema metadata do not count."""
    undeclared = [name for name in got.names if name not in plan.names]
    if undeclared:
        raise TypeError(
            f"Request carries parameter(s) this protocol does not declare: {', '.join(undeclared)[:500]}. "
            f"{plan.name}() declares: {', '.join(plan.names) or '(none)'}"
        )
    missing = [n for n in plan.names if n not in got.names and n not in plan.info.param_defaults]
    if missing:
        raise TypeError(f"{plan.name}() missing required argument(s): {', '.join(map(repr, missing))}")
    want = [
        field for field in plan.info.params_schema if field.name in got.names
    ]  # step 17, but for what has a default
    if len(got) != len(want):
        raise TypeError(f"{plan.name}() parameter schema expected {len(want)} fields, got {len(got)}")
    for i, (w, g) in enumerate(zip(want, got, strict=True)):
        if w.name != g.name:
            raise TypeError(f"{plan.name}() parameter schema field {i} expected name '{w.name}', got '{g.name}'")
        if w.type != g.type:
            raise TypeError(
                f"{plan.name}() parameter '{w.name}' expected Arrow type {w.type}"
                f" but the request batch carried {str(g.type)[:500]}"
            )
        if w.nullable != g.nullable:
            raise TypeError(
                f"{plan.name}() parameter '{w.name}' expected nullable={w.nullable},"
                f" but the request batch carried nullable={g.nullable}"
            )


# ---- a reply, read by the caller


class _WireReply(_NamedTuple):
    """How a unary call ended: a batch, or what to raise once the connection is in step again."""

    batch: pa.RecordBatch | None
    metadata: _IpcMetadata | None
    error: Exception | None
    limits: IpcLimits = IpcLimits()


def _wire_read_reply(
    plan: _WirePlan, source: _IpcSource, validation: IpcValidation, on_log: Callable[[Message], None] | None
) -> _WireReply:
    """Read a reply to its end; the first result or error counts, what follows it is dropped (wire.md section 4)."""
    begin, data = source.pos, source.buf
    reader = _IpcReader(source, validation)
    names = reader.schema.names
    if names and names != plan.info.result_schema.names:  # errors may come on the empty schema
        declared = _log_schema(plan.info.result_schema)
        raise RpcError(
            "ProtocolError",
            f"{plan.name}() is declared as a unary method that returns {declared}, and was answered with"
            f" {_log_schema(reader.schema)}; the server's Protocol is of another version",
        )
    logs = _ElsewhereLogs(on_log)
    item = _wire_read_data(reader, logs)
    reader.drain()
    if isinstance(item, RpcError):
        return _WireReply(None, None, logs.failure or item)
    batch, metadata = item or (None, None)
    if batch is not None and metadata is None and source.buf is data:
        plan.learn_reply(data[begin : source.pos], batch)
    return _WireReply(batch, metadata, logs.failure, source.limits)


def _wire_read_learned(plan: _WirePlan, source: _IpcSource) -> Sequence[Any] | None:
    """Read a reply that looks like an earlier one; None: it does not, is not all here, or each batch is logged."""
    if _LOG_WIRE_BATCH.isEnabledFor(logging.DEBUG):
        return None
    if source.pos == len(source.buf):
        source.more(8)
    data, pos = source.buf, source.pos
    for layout in plan.replies:
        found = layout.match(data, pos)
        if found is not None:
            row, end = found
            limit = source.limits.max_message_bytes
            if limit is not None and end - pos > limit:
                return None
            source.pos = end
            return row
    return None


def _wire_read_data(
    reader: _IpcReader, logs: _ElsewhereLogs
) -> tuple[pa.RecordBatch, _IpcMetadata | None] | RpcError | None:
    """Deliver logs until a data batch, an error or the end of the stream."""
    while (item := reader.read()) is not None:
        kind = _elsewhere_kind(*item)
        if kind is _KIND_LOG:
            logs.deliver(item[1] or {})
        elif kind is _KIND_ERROR:
            return _elsewhere_error(item[1] or {})
        else:
            return item
    return None


def _wire_value(plan: _WirePlan, reply: _WireReply) -> Any:
    """The Python value of a reply; raises what the far side raised."""
    batch = _wire_reply_batch(plan, reply)
    if not plan.info.has_return:
        return None
    _elsewhere_refuse(plan.name, batch, reply.metadata)
    if batch.num_rows != 1 or batch.schema.names != ["result"]:
        raise RpcError(
            "ProtocolError",
            f"{plan.name}() was answered with {batch.num_rows} row(s) of {_log_schema(batch.schema)};"
            " expected one row with a column 'result'",
        )
    try:
        declared = plan.info.result_schema.field(0).with_nullable(True)  # whether it may be None is asked last
        column = _ipc_fit(batch, pa.schema([declared]), reply.limits)
        value = _wire_cell(column.column(0), reply.limits)
    except (TypeError, ValueError, OverflowError, IPCError) as exc:  # also of values that Python cannot say
        raise RpcError("ProtocolError", f"{plan.name}() result: {exc}") from exc
    return _wire_decode_result(plan, value, reply.limits)


def _wire_reply_batch(plan: _WirePlan, reply: _WireReply) -> pa.RecordBatch:
    """The batch of a reply; raises what the far side raised."""
    if reply.error is not None:
        raise reply.error
    if reply.batch is None:
        raise RpcError(
            "ProtocolError",
            f"{plan.name}() response stream ended without a result batch. "
            "The method was interrupted on the server, or the server speaks another protocol.",
        )
    return reply.batch


def _wire_row_value(plan: _WirePlan, row: Sequence[Any], limits: IpcLimits) -> Any:
    """The Python value of a reply that a layout has read."""
    if not row:
        return None
    value = row[0]
    return _wire_decode_result(plan, value, limits) if value is None or plan.decode_result is not None else value


def _wire_decode_result(plan: _WirePlan, value: Any, limits: IpcLimits) -> Any:
    if value is not None and plan.decode_result is not None:
        try:
            value = _wire_nested(plan.decode_result, value, limits)
        except Exception as exc:
            raise RpcError(type(exc).__name__, f"{plan.name}() result: {exception_str(exc)}") from exc
    if value is None and not plan.result_nullable:
        raise RpcError("TypeError", f"{plan.name}() expected a non-None return value but got None")
    return value


def read_reply(
    body: bytes,
    ipc_validation: IpcValidation = IpcValidation.FULL,
    limits: IpcLimits = IpcLimits(),  # noqa: B008 (immutable)
) -> pa.RecordBatch:
    """Return the result batch of a complete reply; raises what the far side raised. For calls of a transport's own."""
    try:
        return read_answer(_IpcSource(body, limits), ipc_validation)[0]
    except (EOFError, pa.ArrowException, IPCError) as exc:
        raise RpcError("ProtocolError", f"the reply is not readable: {exc}") from exc


def read_answer(
    source: _IpcSource, ipc_validation: IpcValidation = IpcValidation.FULL
) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    """Read the reply that comes next on a Channel; returns its result batch and metadata, or raises what it says.

    The limits are the channel's; what the reader of the channel raises means that it is out of step.
    """
    reader = _IpcReader(source, ipc_validation)
    item = _wire_read_data(reader, _ElsewhereLogs(None))
    reader.drain()
    if isinstance(item, RpcError):
        raise item
    if item is None:
        raise RpcError("ProtocolError", "the reply holds no result")
    return item[0], item[1] or {}


# ==== 10. TRANSPORTS ==================================================================================================
# Uses: 1, 2, 3, 5. Moving the bytes, and the laws of a connection (DESIGN.md section 4); no method names in here.
#
#   1 ends cleanly or is poisoned   `busy` is set when a conversation begins and cleared only by `leave`, after the last
#                                   byte of the answer. Whatever else happens ends in `fail`, which poisons.
#   2 one conversation at a time    an RLock; a thread inside a callback, or with its own stream open, is refused
#   3 one process                   the pid at connect is remembered
#   4 stdio is private              the protocol has its own descriptors; 0 reads nothing, 1 is stderr
#   5 a death certificate           a transport may `explain` a loss: who died, how, its last words
#   6 one deadline                  checked before each system call that may block, from `enter` to `leave`
#
# A channel's descriptors are closed only by a thread that holds its lock, so that no one reads a recycled number.
#
#   word        who says it                          what is left of the connection
#   leave       a conversation, at its last byte     all; but unread bytes outside a stream raise (law 10)
#   fail        a conversation's `except`            nothing; all, if the conversation had not begun
#   abandon     a session that will not go on        nothing, if the channel is still kept for that session
#   poison      the three above; owner of the lock   nothing: `broken` is why
#   shut        `close` of a transport, any thread   nothing; a call under way is woken and poisons
#   abort       poison, shut; a fork's child         the transport's own end: kill, shutdown, close
#
# `enter` stands inside the `try` that ends in `fail`, and is no context manager: an interrupt may strike at any line,
# also between a lock that has been taken and a `with` that would know of it. Callbacks (on_log) run under the lock;
# a call from inside one is refused by `check`. No other lock is taken while a channel's is held, but a pipeline's
# threads wait for the channel's lock without holding theirs. `explain` and `abort` may take seconds under it.
#
# What is raised inside a conversation is translated, unless it struck from outside: out of a frame that is neither
# ours nor pyarrow's (a signal handler), or of a class that nothing here raises (an asynchronous exception).

_TRANSPORT_CHUNK = 65_536
_TRANSPORT_MAX_IO = 1 << 30  # sockets fail above 2^31, macOS pipes lose the tail (wire.md section 13)
_TRANSPORT_MAX_PIECES = 1024  # IOV_MAX
_TRANSPORT_ATOMIC = 4096  # a pipe or socket that polls writable takes this much without blocking
_TRANSPORT_LINGER = 1.0  # seconds a refused peer has to read why
_TRANSPORT_MAX_WAIT = 1e6  # seconds; poll() takes milliseconds in 31 bits
_TRANSPORT_GIVE_WAY = 0.02  # seconds in which a thread that waits for the connection gets hold of it
_TRANSPORT_CLOSE_WAIT = 5.0  # seconds close() waits for a call of another thread to notice


# Where the classes of what a conversation itself raises come from; exceptions of other modules are the caller's.
_TRANSPORT_RAISES = frozenset({"builtins", "pyarrow.lib", "struct", "decimal", __name__})

_transport_pid = os.getpid()  # kept here, because asking the kernel in every call costs as much as a lock


# Callers' channels of our own transports. A child that kept their descriptors would keep the peer from seeing the end.
_transport_callers: weakref.WeakSet[Channel] = weakref.WeakSet()


def _transport_forked() -> None:
    global _transport_pid
    _transport_pid = os.getpid()
    for channel in list(_transport_callers):
        channel.abort()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_transport_forked)


class RpcTransport(Protocol):
    """Anything with a reader, a writer and close(); those with `fileno()` run on their descriptors."""

    @property
    def reader(self) -> io.IOBase:
        """Bytes from the peer."""
        ...

    @property
    def writer(self) -> io.IOBase:
        """Bytes to the peer."""
        ...

    def close(self) -> None:
        """End the connection; idempotent."""
        ...


class Channel(_IpcSource):
    """One connection: two descriptors, what has been read ahead, and the state that keeps it in step."""

    __slots__ = (
        "__weakref__",
        "_owned",
        "_poll_in",
        "_poll_out",
        "_room",
        "abort",
        "broken",
        "busy",
        "deadline",
        "explain",
        "idle",
        "inp",
        "lock",
        "out",
        "owns_shm",
        "pid",
        "proven",
        "sent",
        "server",
        "shm",
        "silence",
        "stream",
        "stream_thread",
        "timeout",
        "wanted",
    )

    def __init__(self, inp: int, out: int, abort: Callable[[], None], limits: IpcLimits | None = None) -> None:
        super().__init__(b"", limits or IpcLimits())
        self.inp = inp
        self.out = out
        self.abort = abort  # ends the transport at once: kills, shuts down, closes the descriptors
        self.explain: Callable[[ConnectionLostError], ConnectionLostError] | None = None
        self.lock = threading.RLock()
        self.idle = threading.Condition(self.lock)
        self._owned: Callable[[], bool] = getattr(self.lock, "_is_owned")  # noqa: B009 (missing from typeshed)
        self.pid = _transport_pid
        self.broken: str | None = None
        self.busy: str | None = None
        self.sent: _Sent = "no"
        self.deadline: float | None = None
        self.timeout: float | None = None
        self.stream: object | None = None
        self.stream_thread = 0
        self.proven = False  # whether the peer has sent a whole request
        self.silence: float | None = None  # seconds the peer may say nothing, in a message that it has begun
        self.server: object | None = None  # who answers here, and what it has to remember between two calls
        self.shm: ShmSegment | None = None  # for batches that need not be sent
        self.owns_shm: bool | None = None  # None: the peer has not been asked
        self._poll_in: select.poll | None = None
        self._poll_out: select.poll | None = None
        self._room = 0  # bytes that can be written without blocking, known since the last poll
        self.wanted: dict[int, None] = {}  # threads that wait for the connection; a pipeline gives way to them

    _foreign: frozenset[types.CodeType] = frozenset()  # functions that call what is not ours

    # -- conversations

    def check(self, stream: object | None = None) -> None:
        """Refuse a call that can never succeed here; to be called before `enter`, outside its try block."""
        if self.pid != _transport_pid:
            raise WrongProcessError(f"this connection was made in process {self.pid}; connect again")
        if self._owned():
            inside = self.busy or "a callback"
            raise RpcError("ProtocolError", f"a call from inside {inside}, on the same connection", sent="no")
        if self.stream is not None and self.stream is not stream and self.stream_thread == threading.get_ident():
            raise RpcError(
                "ProtocolError",
                "a stream is open on this connection; close it first, or use another connection",
                sent="no",
            )

    def enter(self, doing: str, timeout: float | None = None, stream: object | None = None) -> None:
        """Begin a conversation: wait for other threads, then own the channel until `leave` or `fail`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.lock.acquire(False) or self.stream is not stream:
            self._queue(doing, deadline, stream)
        if self.pos != len(self.buf) and self.stream is None:
            self.poison(self._unread(doing, "before"))
        if self.busy is not None:  # an exception struck between a conversation's end and its bookkeeping
            self.poison(f"{self.busy} did not end cleanly")
        if self.broken is not None:
            raise self.lost()
        if stream is not None:
            self.stream_thread = threading.get_ident()
        if self.shm is not None:
            self.shm.sweep()
        self.deadline = deadline
        self.timeout = timeout
        self.sent = "no"
        self.busy = doing

    def leave(self) -> None:
        """End a conversation whose last byte has been read; what is left would be taken for the next answer."""
        if self.pos != len(self.buf) and self.stream is None:
            raise RpcError("ProtocolError", self._unread(self.busy, "after"), sent="answered")
        self.busy = None
        if self.broken is not None:  # closed meanwhile by a thread that could not wait for this call
            self._let_go()
            self.abort()
        self.lock.release()

    def fail(self, exc: BaseException) -> BaseException:
        """Account for an exception between `enter` and `leave`; returns what to raise."""
        if not self._owned():
            return exc
        try:
            if self.busy is None:
                return exc
            doing = self.busy  # cleared by poison(), so that an interrupt in between is noticed by the next `enter`
            if isinstance(exc, Exception) and not self._struck(exc):
                exc = self._explained(_errors_translate(exc, doing, self.sent))
                self.poison(str(exc))
            else:
                self.poison(f"{doing} was interrupted by {type(exc).__name__}")
            return exc
        finally:
            self.lock.release()

    def _unread(self, doing: str | None, when: str) -> str:
        size = len(self.buf) - self.pos
        return f"{doing}: expected one answer to one request, and {size} more bytes came {when} it; connection closed"

    def lost(self) -> ConnectionLostError:
        """Return the error of a connection that is no longer usable."""
        return ConnectionLostError(f"this connection is closed; connect again. Reason: {self.broken}", sent="no")

    def poison(self, reason: str) -> None:
        """Law 1: nobody may use this connection any more. The first reason stays. The caller owns the lock."""
        if self.broken is None:
            self.broken = reason
        self.busy = None
        self.end_stream()
        self._let_go()
        self.abort()

    def _struck(self, exc: Exception) -> bool:
        """Whether it is the caller's own: a signal handler raised it, or another thread set it in this one."""
        if isinstance(exc, RpcError | MemoryError) or (isinstance(exc, OSError) and exc.errno is not None):
            return False
        trace, inside = exc.__traceback__, False
        talks = None if trace is None else trace.tb_frame  # the conversation, which may be another module's
        while trace is not None and trace.tb_next is not None:
            inside = inside or trace.tb_frame.f_code in self._foreign
            trace = trace.tb_next
        if talks is None or trace is None or inside:
            return False
        file = trace.tb_frame.f_code.co_filename
        ours = file in (__file__, talks.f_code.co_filename) or "pyarrow" in file or file.startswith("<vgi_rpc")
        if not ours:
            return True
        source = type(exc).__module__
        return not exc.args or (source not in _TRANSPORT_RAISES and source != talks.f_globals.get("__name__"))

    def _let_go(self) -> None:
        """Forget the descriptors: their numbers may soon mean something else."""
        self.buf, self.pos = b"", 0
        self.inp = self.out = -1
        shm, self.shm = self.shm, None
        if shm is not None and self.owns_shm:
            shm.unlink()
            shm.close()
        self._poll_in = self._poll_out = None

    def abandon(self, stream: object, reason: str) -> None:
        """Poison a channel whose stream nobody can close any more, so that no one waits for it."""
        if self.stream is stream and self.lock.acquire(timeout=_TRANSPORT_CLOSE_WAIT):
            try:
                self.poison(reason)
            finally:
                self.lock.release()

    def begin_stream(self, stream: object) -> None:
        """Keep the channel for `stream` between its turns; to be called within a conversation."""
        self.stream = stream
        self.stream_thread = threading.get_ident()

    def end_stream(self) -> None:
        """Let other calls in again; to be called by the owner of the lock."""
        self.stream = None
        self.idle.notify_all()

    def shut(self, wake: Callable[[], None]) -> bool:
        """Mark the channel closed and take its lock, waking calls of other threads.

        False: a call did not yield, and its `leave` will close; or this is the child of a fork, which only lets go.
        """
        if self.pid != os.getpid():
            self.abort()
            return False
        if self.broken is None:
            self.broken = "it was closed"
        if not self.lock.acquire(blocking=False):
            wake()
            if not self.lock.acquire(timeout=_TRANSPORT_CLOSE_WAIT):
                return False
        self.end_stream()
        self._let_go()
        return True

    def same_user(self) -> bool:
        """Whether the peer is a process of our user on this machine; that of a pipe is our parent or our child."""
        if self.inp < 0:
            return False
        if not stat.S_ISSOCK(os.fstat(self.inp).st_mode):
            return True
        with socket.socket(fileno=os.dup(self.inp)) as sock:
            if sock.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
                return False
            _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return bool(uid == os.geteuid())

    def linger(self) -> None:
        """Let the last words arrive: a socket that is closed with unread input takes them back (TCP reset)."""
        if self.inp != self.out or self.inp < 0:
            return
        end = time.monotonic() + _TRANSPORT_LINGER
        with socket.socket(fileno=os.dup(self.inp)) as sock:
            sock.shutdown(socket.SHUT_WR)
            while (left := end - time.monotonic()) > 0:
                sock.settimeout(left)
                if not sock.recv(_TRANSPORT_CHUNK):
                    break

    # -- bytes

    def at_end(self) -> bool:
        """Wait until the peer sends something; True when it has gone instead."""
        if self.pos < len(self.buf):
            return False
        try:
            self.more(1)
        except EOFError:
            return True
        return False

    def arrives(self, seconds: float) -> bool:
        """Whether the peer says something, or goes, within this time; True where only a read can tell."""
        if self.pos < len(self.buf) or self.inp < 0:
            return True
        poll = select.poll()
        poll.register(self.inp, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def gone(self) -> bool:
        """Whether the connection is idle and has lost its peer: nothing may arrive now but the end."""
        if self.broken is not None:
            return True
        if not self.lock.acquire(blocking=False):
            return False  # in use
        try:
            if self.busy is not None or self.stream is not None:  # of this very thread, inside a callback
                return False
            if self.pos != len(self.buf):  # what nobody has asked for
                return True
            if self.inp < 0:
                return False
            poll = select.poll()
            poll.register(self.inp, select.POLLIN)
            return bool(poll.poll(0))
        finally:
            self.lock.release()

    def more(self, missing: int) -> None:
        """Read once."""
        if self.deadline is not None or self.silence is not None:
            self._wait_in()
        while True:
            try:
                data = os.read(self.inp, _TRANSPORT_CHUNK)
                break
            except BlockingIOError:  # somebody who shares the descriptor has made it so
                self._wait_in()
        if not data:
            raise EOFError("the peer closed the connection")
        self.buf = data if self.pos == len(self.buf) else self.buf[self.pos :] + data
        self.pos = 0

    def take_large(self, size: int, head: int) -> pa.Buffer:
        """Read straight into one buffer whose body is 64-byte aligned."""
        shift = -head % 64
        target = _transport_allocate(shift + size)
        view = memoryview(target).cast("B")
        at = shift + len(self.buf) - self.pos
        view[shift:at] = memoryview(self.buf)[self.pos :]
        self.buf, self.pos = b"", 0
        while at < len(view):
            at += self.read_into(view[at : at + _TRANSPORT_MAX_IO])
        return target.slice(shift)

    def read_into(self, view: memoryview) -> int:
        """Read once into `view`."""
        if self.deadline is not None or self.silence is not None:
            self._wait_in()
        while True:
            try:
                got = os.readv(self.inp, [view])
                break
            except BlockingIOError:
                self._wait_in()
        if not got:
            raise EOFError("the peer closed the connection in the middle of a message")
        return got

    def send(self, pieces: _IpcMessages) -> None:
        """Write whole messages: small ones in one piece, large ones without joining them."""
        if isinstance(pieces, bytes):
            self.write(pieces)
        elif len(pieces) == 1 and len(pieces[0]) <= _IPC_LARGE:
            self.write(pieces[0])
        elif sum(map(len, pieces)) <= _IPC_LARGE:
            self.write(b"".join(pieces))
        else:
            self.write_views([memoryview(piece).cast("B") for piece in pieces if len(piece)])

    def write(self, data: _IpcPiece) -> None:
        """Write once; the rest, if any, the long way."""
        room = 0
        if self.deadline is not None:
            room = self._room - len(data)
            if room < 0:
                room = _TRANSPORT_ATOMIC - len(data)
                if room < 0:
                    return self.write_views([memoryview(data).cast("B")])
                self._wait_out()
        self._room = room
        before, self.sent = self.sent, "maybe"
        try:
            done = os.write(self.out, data)
        except BlockingIOError:
            done = 0
        except BrokenPipeError:  # not a byte of it was taken
            self.sent = before
            raise
        if done != len(data):
            self.write_views([memoryview(data).cast("B")[done:]])
        return None

    def write_views(self, views: list[memoryview]) -> None:
        """Gathered write of any size. With a deadline the descriptor is non-blocking for as long as this takes."""
        self.sent = "maybe"
        self._room = 0
        if self.deadline is None:
            return self._write_views(views)
        before = os.get_blocking(self.out)
        os.set_blocking(self.out, False)
        try:
            self._write_views(views)
        finally:
            os.set_blocking(self.out, before)

    def _write_views(self, views: list[memoryview]) -> None:
        at = 0
        while at < len(views):
            some, size = [], 0
            for view in views[at : at + _TRANSPORT_MAX_PIECES]:
                some.append(view[: _TRANSPORT_MAX_IO - size])
                size += len(some[-1])
                if size >= _TRANSPORT_MAX_IO:
                    break
            if self.deadline is not None:
                self._wait_out()
            try:
                done = os.writev(self.out, some)
            except BlockingIOError:
                self._wait_out()
                continue
            while done and done >= len(views[at]):
                done -= len(views[at])
                at += 1
            if done:
                views[at] = views[at][done:]

    def _wait_in(self) -> None:
        """Wait for the peer's bytes until the deadline, or for as long as the peer may be silent."""
        if self._poll_in is None:
            self._poll_in = select.poll()
            self._poll_in.register(self.inp, select.POLLIN)
        self._wait(self._poll_in)

    def _wait_out(self) -> None:
        """Wait for room until the deadline."""
        if self._poll_out is None:
            self._poll_out = select.poll()
            self._poll_out.register(self.out, select.POLLOUT)
        self._wait(self._poll_out)

    def _wait(self, poll: select.poll) -> None:
        if self.deadline is None and self.silence is None:
            poll.poll()
            return
        end = time.monotonic() + (self.silence or 0.0) if self.deadline is None else self.deadline
        while (left := end - time.monotonic()) > 0:
            if poll.poll(min(left, _TRANSPORT_MAX_WAIT) * 1000 + 1):
                return
        raise self._late()

    def _late(self) -> DeadlineExceededError:
        if self.deadline is None:
            text = f"the peer has begun a message and was silent for {self.silence} s (idle_message_timeout)"
            return DeadlineExceededError(text, sent="no")
        return DeadlineExceededError(
            f"{self.busy} did not finish within its timeout of {self.timeout} s;"
            " the connection is closed, because the answer may still come",
            sent=self.sent,
        )

    def _queue(self, doing: str, deadline: float | None, stream: object | None) -> None:
        """Queue behind other threads' calls and streams; a session whose stream is over never waits for another."""
        me = threading.get_ident()
        self.wanted[me] = None
        try:
            if not self._owned():
                left = -1 if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not self.lock.acquire(timeout=left):
                    raise DeadlineExceededError(f"{doing}: another call held the connection to the deadline", sent="no")
            while self.stream is not None and self.stream is not stream and self.broken is None:
                rest = None if deadline is None else deadline - time.monotonic()
                if (rest is not None and rest <= 0) or not self.idle.wait(rest):
                    raise DeadlineExceededError(f"{doing}: a stream held the connection to the deadline", sent="no")
        finally:
            self.wanted.pop(me, None)

    def give_way(self) -> None:
        """Let threads that wait have the connection; to be called by who would take it again at once."""
        end = time.monotonic() + _TRANSPORT_GIVE_WAY
        while self.wanted and time.monotonic() < end:
            time.sleep(0.0002)

    def _explained(self, error: RpcError) -> RpcError:
        if self.explain is None or not isinstance(error, ConnectionLostError):
            return error
        explained = self.explain(error)
        explained.__cause__ = error.__cause__
        return explained


class _FileChannel(Channel):
    """The slower path for objects without usable descriptors: TLS sockets and the user's own streams."""

    __slots__ = ("_read", "_settimeout", "_writer")

    def __init__(
        self,
        reader: Any,
        writer: Any,
        abort: Callable[[], None],
        settimeout: Callable[[float | None], None] | None = None,
    ) -> None:
        super().__init__(-1, -1, abort)
        read1 = getattr(reader, "read1", None)
        self._read: Callable[[int], bytes] = reader.read if read1 is None else lambda _: read1(_TRANSPORT_CHUNK)
        self._writer = writer
        self._settimeout = settimeout

    def more(self, missing: int) -> None:
        self._arm()
        data = self._read(missing)
        if not data:
            raise EOFError("the peer closed the connection")
        self.buf = self.buf[self.pos :] + bytes(data)
        self.pos = 0

    def read_into(self, view: memoryview) -> int:
        self.more(min(len(view), _TRANSPORT_CHUNK))
        got = min(len(self.buf), len(view))
        view[:got] = self.buf[:got]
        self.pos = got
        return got

    def take_large(self, size: int, head: int) -> pa.Buffer:
        while len(self.buf) - self.pos < 1:
            self.more(1)
        return super().take_large(size, head)

    def write(self, data: _IpcPiece) -> None:
        self.write_views([memoryview(data).cast("B")])

    def write_views(self, views: list[memoryview]) -> None:
        self.sent = "maybe"
        for view in views:
            while view:
                self._arm()
                done = self._writer.write(view[:_TRANSPORT_MAX_IO])
                view = view[done if isinstance(done, int) else len(view) :]
        flush = getattr(self._writer, "flush", None)
        if flush is not None:
            flush()

    def _arm(self) -> None:
        if self._settimeout is not None:
            left = self.silence if self.deadline is None else self.deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._late()
            self._settimeout(left)


_FileChannel._foreign = frozenset({_FileChannel.more.__code__, _FileChannel.write_views.__code__})


def _transport_allocate(size: int) -> pa.Buffer:
    """Memory for one message. Above 64 MiB it is only reserved, and becomes real as bytes arrive."""
    if size <= _IPC_EAGER:
        return pa.allocate_buffer(size)
    import mmap

    try:
        return pa.py_buffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (OSError, OverflowError) as exc:
        raise pa.ArrowInvalid(f"a message of {size} bytes has no room here; max_message_bytes= can bound it") from exc


# -- pipes


class PipeTransport:
    """A transport over two streams; with `fileno()` on both it runs on the descriptors (DESIGN.md section 7)."""

    def __init__(self, reader: io.IOBase, writer: io.IOBase) -> None:
        self._reader = reader
        self._writer = writer
        self.channel = _transport_over(reader, writer, self._abort)

    @property
    def reader(self) -> io.IOBase:
        """Bytes from the peer."""
        return self._reader

    @property
    def writer(self) -> io.IOBase:
        """Bytes to the peer."""
        return self._writer

    def close(self) -> None:
        """Close both ends; the peer sees the end of its input. Idempotent."""
        if self.channel.shut(lambda: None):
            try:
                self._abort()
            finally:
                self.channel.lock.release()

    def _abort(self) -> None:
        for stream in (self._writer, self._reader):
            with contextlib.suppress(OSError, ValueError):
                stream.close()


class ShmPipeTransport:
    """A pipe with a segment of shared memory beside it; closing the transport leaves the segment to its owner.

    Nobody asks the far side whether it can: `connect(..., shm_size=...)` does.
    """

    def __init__(self, pipe: PipeTransport, shm: ShmSegment) -> None:
        self._pipe = pipe
        self.shm = shm
        self.channel = pipe.channel
        self.channel.shm = shm
        self.channel.owns_shm = False

    @property
    def reader(self) -> io.IOBase:
        """Bytes from the peer."""
        return self._pipe.reader

    @property
    def writer(self) -> io.IOBase:
        """Bytes to the peer."""
        return self._pipe.writer

    def close(self) -> None:
        """Close both ends of the pipe; idempotent."""
        self._pipe.close()


def make_pipe_pair() -> tuple[PipeTransport, PipeTransport]:
    """Return two connected transports, (client, server), over a pair of pipes."""
    server_in, client_out = os.pipe()
    try:
        client_in, server_out = os.pipe()
    except OSError:
        os.close(server_in)
        os.close(client_out)
        raise
    if _LOG_WIRE_TRANSPORT.isEnabledFor(logging.DEBUG):
        _LOG_WIRE_TRANSPORT.debug(
            "make_pipe_pair: c2s=(%d,%d), s2c=(%d,%d)", server_in, client_out, client_in, server_out
        )
    client = PipeTransport(os.fdopen(client_in, "rb"), os.fdopen(client_out, "wb", buffering=0))
    server = PipeTransport(os.fdopen(server_in, "rb"), os.fdopen(server_out, "wb", buffering=0))
    return client, server


def _transport_over(reader: Any, writer: Any, abort: Callable[[], None]) -> Channel:
    """A channel on the descriptors below two streams, if these are all that there is between us and the peer."""
    inp, out = _transport_descriptor(reader, "read"), _transport_descriptor(writer, "write")
    if inp < 0 or out < 0:
        return _FileChannel(reader, writer, abort)
    if isinstance(writer, io.BufferedWriter):
        writer.flush()
    channel = Channel(inp, out, abort)
    if isinstance(reader, io.BufferedReader):  # what it has read ahead is ours
        before = os.get_blocking(inp)
        os.set_blocking(inp, False)
        try:
            channel.buf = reader.read(len(reader.peek()))
        finally:
            os.set_blocking(inp, before)
    return channel


def _transport_descriptor(stream: Any, does: str) -> int:
    """The descriptor whose bytes a stream's bytes are; -1: the stream may change them, as TLS does."""
    raw = getattr(stream, "raw", stream) if isinstance(stream, io.BufferedReader | io.BufferedWriter) else stream
    plain = isinstance(raw, io.FileIO) or type(getattr(raw, "_sock", None)) is socket.socket
    if not plain and hasattr(stream, does):
        return -1
    try:
        return int(raw.fileno())
    except (AttributeError, OSError, ValueError):  # io.UnsupportedOperation is an OSError and a ValueError
        return -1


# Channels of foreign transport objects: the state that keeps a connection in step must outlive one RpcConnection.
_TRANSPORT_CHANNELS: weakref.WeakKeyDictionary[Any, Channel] = weakref.WeakKeyDictionary()


def _transport_channel(transport: Any) -> Channel:
    """Return the channel of a transport, ours or anyone's."""
    channel = getattr(transport, "channel", None)
    if isinstance(channel, Channel):
        return channel
    try:
        known = _TRANSPORT_CHANNELS.get(transport)
    except TypeError:
        known = None
    if known is not None:
        return known
    if not all(hasattr(transport, name) for name in ("reader", "writer", "close")):
        raise TypeError(f"expected a transport (reader, writer, close), got {type(transport).__name__}")
    abort = transport.close
    with contextlib.suppress(TypeError):  # the channel must not keep the transport that it is remembered for
        reference = weakref.ref(transport)
        abort = lambda: (found := reference()) and found.close()  # noqa: E731
    channel = _transport_over(transport.reader, transport.writer, abort)
    with contextlib.suppress(TypeError):
        _TRANSPORT_CHANNELS[transport] = channel
    return channel


def _transport_stdio() -> PipeTransport:
    """Law 4: private duplicates for the protocol; descriptor 0 reads nothing, descriptor 1 becomes stderr."""
    for stream, name in ((0, "stdin"), (1, "stdout")):
        try:
            os.fstat(stream)
        except OSError as exc:
            exc.add_note(f"{name} is closed; a worker needs it, or --unix or --tcp")
            raise
        if os.isatty(stream):
            print(
                f"warning: {name} is a terminal; a worker speaks Arrow IPC there, started by connect() or --cmd",
                file=sys.stderr,
            )
    inp, out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # started without a stderr
        os.dup2(null, 1)
    os.close(null)
    transport = PipeTransport(os.fdopen(inp, "rb"), os.fdopen(out, "wb", buffering=0))
    # A forked child of a method must not keep the protocol open after its parent has died.
    os.register_at_fork(after_in_child=transport.close)
    return transport


# -- subprocess


class StderrMode(enum.Enum):
    """Where a worker's stderr goes."""

    INHERIT = "inherit"  # to our stderr
    PIPE = "pipe"  # line by line to a logger, at INFO
    DEVNULL = "devnull"


def _transport_command(cmd: Sequence[str]) -> list[str]:
    if isinstance(cmd, str):
        raise TypeError(f"cmd must be a list of arguments such as {cmd.split()!r}, got a str")
    if not cmd:
        raise ValueError("cmd is empty; it is a list: the program, then its arguments")
    return [os.fsdecode(part) for part in cmd]


class SubprocessTransport:
    """Starts `cmd` and talks over its stdin and stdout. Raises the operating system's own error if it cannot start."""

    def __init__(
        self,
        cmd: Sequence[str],
        *,
        stderr: StderrMode = StderrMode.INHERIT,
        stderr_logger: logging.Logger | None = None,
    ) -> None:
        import subprocess

        self._cmd = _transport_command(cmd)
        self._started = time.monotonic()
        try:
            self.proc: subprocess.Popen[bytes] = subprocess.Popen(
                self._cmd,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL if stderr is StderrMode.DEVNULL else subprocess.PIPE,
                bufsize=0,
            )
        except OSError as exc:
            program = self._cmd[0]
            python = f"; run it by Python: [sys.executable, {program!r}]" if program.endswith(".py") else ""
            note = f"could not start the worker {self._cmd!r}; cmd is a list: the program, then its arguments{python}"
            exc.add_note(note)
            raise
        assert self.proc.stdin is not None and self.proc.stdout is not None
        self._expired = subprocess.TimeoutExpired  # nothing can be imported when the interpreter shuts down
        self._unknown = False  # whether something else has taken the exit status
        self._reader: io.IOBase | None = None
        self._tee = _TransportTee(self.proc.stderr, stderr, stderr_logger) if self.proc.stderr is not None else None
        _transport_widen(self.proc.stdin.fileno())
        _transport_widen(self.proc.stdout.fileno())
        self.channel = Channel(self.proc.stdout.fileno(), self.proc.stdin.fileno(), self._abort)
        self.channel.explain = self._explain
        _transport_callers.add(self.channel)
        if _LOG_WIRE_TRANSPORT.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_TRANSPORT.debug("SubprocessTransport spawned: pid=%d, cmd=%r", self.proc.pid, self._cmd)

    @property
    def reader(self) -> io.IOBase:
        """The worker's stdout; `read(n)` gives less than n bytes only at its end, and takes no more."""
        if self._reader is None:
            assert isinstance(self.proc.stdout, io.FileIO)
            self._reader = io.BufferedReader(self.proc.stdout, 1)
        return self._reader

    @property
    def writer(self) -> io.IOBase:
        """The worker's stdin."""
        return cast(io.IOBase, self.proc.stdin)

    def close(self) -> None:
        """End the worker's input, wait up to 10 s for it to finish, then kill it. Idempotent."""
        busy = self.channel.stream is not None
        if not self.channel.shut(self.proc.kill):
            return
        try:
            self._close_pipe(self.proc.stdin)
            if busy:  # nobody reads the rest of the stream; do not let the worker wait for that
                self._close_pipe(self.proc.stdout)
            self._reap(10.0)
            self._close_pipe(self.proc.stdout)
        finally:
            self.channel.lock.release()
        if _LOG_WIRE_TRANSPORT.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_TRANSPORT.debug("SubprocessTransport closed: pid=%d, rc=%s", self.proc.pid, self.proc.returncode)

    def _abort(self) -> None:
        """Kill the worker and let go of it; the child of a fork only lets go."""
        self._close_pipe(self.proc.stdin)
        self._close_pipe(self.proc.stdout)
        if self.channel.pid != os.getpid():
            return
        if self.proc.poll() is None:
            self.proc.kill()
        self._reap(5.0)

    def _reap(self, timeout: float) -> None:
        try:
            self.proc.wait(timeout)
        except self._expired:
            self.proc.kill()
            with contextlib.suppress(self._expired):  # unkillable: in uninterruptible I/O
                self.proc.wait(5.0)
        if self._tee is not None:
            self._tee.close()

    @staticmethod
    def _close_pipe(pipe: Any) -> None:
        with contextlib.suppress(OSError):
            pipe.close()

    def _explain(self, error: ConnectionLostError) -> ConnectionLostError:
        """Law 5. A worker that has closed its output is given a second to finish dying."""
        end = time.monotonic() + 1.0
        while not self._dead():
            if time.monotonic() >= end:
                return error
            time.sleep(0.002)
        returncode = None if self._unknown else self.proc.returncode
        if self._tee is not None:
            self._tee.close()
        lifetime = time.monotonic() - self._started
        status = _transport_exit_text(returncode)
        hint = ""
        if returncode == 0:  # it was content: the commonest reason is a script that serves nothing
            hint = "; a worker calls run_server(), which ends only with its input"
        return WorkerDiedError(
            f"{error.error_message}: worker {self.proc.pid} {status} after {lifetime:.1f} s{hint}",
            sent=error.sent,
            command=tuple(self._cmd),
            pid=self.proc.pid,
            returncode=returncode,
            lifetime=lifetime,
            stderr_tail=tuple(self._tee.tail) if self._tee is not None else (),
        )

    def _dead(self) -> bool:
        """Whether the worker has ended. Popen takes a status that somebody else has reaped for 0, so look before it."""
        if self.proc.returncode is None and hasattr(os, "waitid"):
            try:
                os.waitid(os.P_PID, self.proc.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._unknown = True
        return self.proc.poll() is not None


class _TransportTee:
    """Passes a worker's stderr on from a thread of its own and keeps the last lines for the death certificate."""

    LINES, LINE_BYTES = 20, 2000

    def __init__(self, pipe: Any, mode: StderrMode, logger: logging.Logger | None) -> None:
        self.tail: collections.deque[str] = collections.deque(maxlen=self.LINES)
        self._pipe = pipe
        self._logger = None
        if mode is StderrMode.PIPE:
            self._logger = logger or logging.getLogger("vgi_rpc.subprocess.stderr")
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="vgi_rpc-stderr", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what is left and end the thread; a grandchild may still hold the pipe, so do not wait for its end."""
        wake, self._wake = self._wake, -1
        if wake >= 0:
            os.close(wake)
        self._thread.join(5.0)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        rest = b""
        stopping = False
        left = 1 << 20  # bytes to read once stopping: a grandchild may go on writing for ever
        while left > 0:
            ready = dict(poll.poll(0 if stopping else None))
            data = os.read(self._pipe.fileno(), _TRANSPORT_CHUNK) if self._pipe.fileno() in ready else b""
            if not data and (stopping or self._pipe.fileno() in ready):
                break
            stopping = stopping or self._stop in ready
            left -= len(data) if stopping else 0
            if self._logger is None:
                with contextlib.suppress(OSError):
                    os.write(2, data)
            *lines, rest = (rest + data).split(b"\n")
            self._keep(lines)
            rest = rest[-self.LINE_BYTES :]
        self._keep([rest])
        self._pipe.close()
        os.close(self._stop)

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines:
            text = line[: self.LINE_BYTES].decode(errors="replace").rstrip()
            if text:
                self.tail.append(text)
                if self._logger is not None:
                    self._logger.info("%s", text)


def _transport_exit_text(returncode: int | None) -> str:
    if returncode is None:
        return "ended (exit status unknown: something else in this process has waited for it)"
    if returncode >= 0:
        return f"exited with status {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"


def _transport_widen(fd: int) -> None:
    """A wider pipe needs fewer wake-ups for large batches (+15 %); the kernel may refuse (pages per user)."""
    import fcntl

    with contextlib.suppress(OSError, AttributeError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)


# -- sockets


class _SocketTransport:
    """A transport over a connected stream socket, with or without TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader: io.IOBase | None = None
        self._writer: io.IOBase | None = None
        if type(sock) is socket.socket:
            sock.settimeout(None)
            self.channel = Channel(sock.fileno(), sock.fileno(), self._abort)
        else:
            self.channel = _FileChannel(self.reader, self.writer, self._abort, sock.settimeout)

    @property
    def reader(self) -> io.IOBase:
        """Bytes from the peer."""
        if self._reader is None:
            self._reader = self._sock.makefile("rb")
        return self._reader

    @property
    def writer(self) -> io.IOBase:
        """Bytes to the peer."""
        if self._writer is None:
            self._writer = self._sock.makefile("wb", buffering=0)
        return self._writer

    def close(self) -> None:
        """Close the socket; a call of another thread fails. Idempotent."""
        if self.channel.shut(self._wake):
            try:
                self._abort()
            finally:
                self.channel.lock.release()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _abort(self) -> None:
        if self.channel.pid == os.getpid():  # the peer must not lose the parent's connection because a child ended
            self._wake()
        for stream in (self._reader, self._writer, self._sock):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class UnixTransport(_SocketTransport):
    """A transport over a connected Unix socket."""


class TcpTransport(_SocketTransport):
    """A transport over a connected TCP socket; sets TCP_NODELAY, and looks for a silent peer after a minute."""

    KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in self.KEEPALIVE:
            if hasattr(socket, name):  # not everywhere
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        super().__init__(sock)


def make_unix_pair() -> tuple[UnixTransport, UnixTransport]:
    """Return two connected transports, (client, server), over a pair of Unix sockets."""
    client, server = socket.socketpair()
    return UnixTransport(client), UnixTransport(server)


def make_tcp_pair() -> tuple[TcpTransport, TcpTransport]:
    """Return two connected transports, (client, server), over the loopback interface."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=5.0)
        try:
            server, _ = listener.accept()
        except OSError:
            client.close()
            raise
    return TcpTransport(client), TcpTransport(server)


class _TransportAcceptor:
    """Accepts connections and hands each to `handle`, in turn or in threads of their own (wire.md section 13)."""

    POLL = 0.5  # seconds; closing a socket does not wake accept() on Linux
    FIRST_CLIENT = 60.0  # seconds of grace before the first client
    SILENT = 2.0  # seconds in which a guest must have asked something when others wait for its place

    def __init__(
        self,
        listener: socket.socket,
        handle: Callable[[socket.socket], None],
        *,
        threaded: bool = False,
        max_connections: int | None = None,
        idle_timeout: float | None = None,
    ) -> None:
        self._listener = listener
        self._handle = handle
        self._threaded = threaded
        self._slots = threading.BoundedSemaphore(max_connections) if max_connections is not None else None
        self._idle_timeout = idle_timeout
        self._lock = threading.Lock()
        self._guests: dict[_SocketTransport, float] = {}
        self._quiet_until = 0.0
        self._active = 0
        self._expires = None if idle_timeout is None else time.monotonic() + max(idle_timeout, self.FIRST_CLIENT)

    def run(self) -> None:
        """Serve until the idle timeout; KeyboardInterrupt and the like pass through."""
        self._listener.setblocking(False)
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._expired():
            if self._slots is not None and not self._slots.acquire(timeout=self.POLL):
                if poll.poll(0):
                    self._make_room()
                continue
            sock = self._accept() if poll.poll(self.POLL * 1000) else None
            if sock is None:
                self._free_slot()
            elif self._threaded:
                self._start(sock)
            else:
                self._serve(sock)

    def _accept(self) -> socket.socket | None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as exc:  # EMFILE, ENFILE, ENOBUFS, ENOMEM: no room now
            if time.monotonic() >= self._quiet_until:
                self._quiet_until = time.monotonic() + 1.0
                _LOG_RPC.warning("accept failed: %s; trying again", exc)
            self._make_room()
            time.sleep(0.1)
            return None
        sock.setblocking(True)
        return sock

    @contextlib.contextmanager
    def guest(self, transport: _SocketTransport) -> Iterator[None]:
        """Know a connection for as long as it is served."""
        with self._lock:
            self._guests[transport] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._guests[transport]

    def _make_room(self) -> None:
        """Send those away who have taken a place and asked nothing; who has once sent a whole request stays."""
        before = time.monotonic() - self.SILENT
        with self._lock:
            silent = [guest for guest, since in self._guests.items() if since < before and not guest.channel.proven]
            for guest in silent:
                guest._wake()
        if silent:
            _LOG_RPC.warning("no room for new connections; closed %d that had asked nothing", len(silent))

    def _start(self, sock: socket.socket) -> None:
        with self._lock:
            self._active += 1
        try:
            threading.Thread(target=self._serve, args=(sock,), name="vgi_rpc-connection", daemon=True).start()
        except RuntimeError:  # no more threads
            _LOG_RPC.warning("no thread for a new connection; closing it", exc_info=True)
            sock.close()
            self._done()

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._handle(sock)
        except Exception:
            _LOG_RPC.warning("a connection ended with an error", exc_info=True)
        finally:
            sock.close()
            if self._threaded:
                self._done()
            else:
                self._free_slot()

    def _done(self) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0 and self._idle_timeout is not None:
                self._expires = time.monotonic() + self._idle_timeout
        self._free_slot()

    def _free_slot(self) -> None:
        if self._slots is not None:
            self._slots.release()

    def _expired(self) -> bool:
        with self._lock:
            return self._active == 0 and self._expires is not None and time.monotonic() >= self._expires


def _transport_listen_unix(path: str, backlog: int) -> socket.socket:
    """Bind a Unix socket with mode 0600, replacing a stale one but never a live one or another kind of file."""
    import stat

    if os.path.lexists(path):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise RuntimeError(f"refusing to replace pre-existing non-socket path: {path}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                pass
            except BlockingIOError as exc:  # its backlog is full: alive
                raise RuntimeError(f"another process is already listening on {path}") from exc
            else:
                raise RuntimeError(f"another process is already listening on {path}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)  # nobody can connect before listen(); a umask would be all threads' and their files'
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def _transport_unlink_unix(path: str, inode: int) -> None:
    """Remove our socket file, unless another process has replaced it."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


# ==== 11. DESCRIBE ====================================================================================================
# Uses: 1, 2, 4, 5, 8. A service tells what it offers (wire.md section 9): the protocol `vgi_rpc.Reflection.v1`,
# hosted like any other, and the table of the older `__describe__` (appendix B). Types and nullability travel as
# schemas; defaults, docstrings and Python types do not. The classes of the wire are dataclasses and made at first use,
# because importing `dataclasses` would double the import time of this file.

DESCRIBE_VERSION: Final = "5"
IDEMPOTENCY_LEVELS: Final = ("unknown", "no_side_effects", "idempotent")
STREAM_KINDS: Final = ("unknown", "producer", "exchange")


@functools.cache
def _describe_wire() -> types.SimpleNamespace:
    """Make the Reflection Protocol and its dataclasses (wire.md section 9.2)."""
    common = {
        "protocol": str,
        "protocol_version": str,
        "protocol_hash": str,
        "deprecated": bool,
        "deprecation_message": str,
        "features": list[str],
    }
    summary = _describe_record("ProtocolSummary", common)
    server = {"server_id": str, "server_version": str, "request_version": str}
    hosted = _describe_record("ProtocolList", {**server, "protocols": list[summary]})  # type: ignore[valid-type]
    method = {"name": str, "method_type": str, "has_return": bool, "has_header": bool, "stream_kind": str}
    method |= {"params_schema_ipc": bytes, "result_schema_ipc": bytes, "header_schema_ipc": bytes}
    info = _describe_record("MethodInfo", method, idempotency="unknown", deprecated=False, deprecation_message="")
    service = _describe_record("WireServiceDescription", {**common, "methods": list[info]})  # type: ignore[valid-type]
    return types.SimpleNamespace(
        ProtocolSummary=summary,
        ProtocolList=hosted,
        MethodInfo=info,
        WireServiceDescription=service,
        Reflection=_describe_protocol_class(hosted, service),
    )


def _describe_record(name: str, fields: Mapping[str, Any], **optional: object) -> Any:
    """A dataclass of the wire: fields with their types, then those that have a default."""
    import dataclasses

    every: list[Any] = [*fields.items(), *((field, type(value), value) for field, value in optional.items())]
    made = dataclasses.make_dataclass(name, every, bases=(ArrowSerializableDataclass,), frozen=True)
    made.__module__ = __name__
    return made


def _describe_protocol_class(hosted: type, service: type) -> type:
    class Reflection(Protocol):
        """What a server hosts (wire.md section 9.1)."""

        protocol_name: ClassVar[str] = REFLECTION_PROTOCOL_NAME

        def list_protocols(self) -> Any:
            """List the hosted protocols, application protocols first."""
            ...

        def describe(self, protocol: str) -> Any:
            """Describe one of them."""
            ...

    Reflection.list_protocols.__annotations__["return"] = hosted
    Reflection.describe.__annotations__["return"] = service
    return Reflection


class ReflectionImpl:
    """Answers Reflection for a server: anything with `bindings`, `server_id` and `server_version`."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def list_protocols(self) -> Any:
        """List the hosted protocols, application protocols in the order of their registration."""
        wire = _describe_wire()
        bindings = self._server.bindings.values()
        ordered = sorted(bindings, key=lambda binding: binding.name.startswith(RESERVED_PROTOCOL_PREFIX))
        return wire.ProtocolList(
            server_id=self._server.server_id,
            server_version=self._server.server_version,
            request_version=REQUEST_VERSION.decode(),
            protocols=[
                wire.ProtocolSummary(binding.name, binding.version or "", binding.protocol_hash, False, "", [])
                for binding in ordered
            ],
        )

    def describe(self, protocol: str) -> Any:
        """Describe one protocol; ProtocolNotSupportedError for an unknown name."""
        wire = _describe_wire()
        binding = self._server.bindings.get(protocol)
        if binding is None:
            raise ProtocolNotSupportedError(
                f"This server does not host protocol '{protocol}'. Hosted: {list(self._server.bindings)}."
            )
        methods = [_describe_method(info) for _, info in sorted(binding.methods.items())]
        return wire.WireServiceDescription(
            binding.name, binding.version or "", binding.protocol_hash, False, "", [], methods
        )


def _describe_method(info: RpcMethodInfo) -> Any:
    kind = "unknown" if info.is_exchange is None else ("exchange" if info.is_exchange else "producer")
    return _describe_wire().MethodInfo(
        name=info.name,
        method_type=info.method_type.value,
        has_return=info.has_return,
        has_header=info.header_schema is not None,
        stream_kind=kind if info.method_type is MethodType.STREAM else "",
        params_schema_ipc=_ipc_schema_message(info.params_schema),
        result_schema_ipc=_ipc_schema_message(info.result_schema) if info.has_return else b"",
        header_schema_ipc=b"" if info.header_schema is None else _ipc_schema_message(info.header_schema),
    )


_DESCRIBE_LEGACY_SCHEMA = pa.schema(
    [
        ("name", pa.utf8()),
        ("method_type", pa.utf8()),
        ("has_return", pa.bool_()),
        ("params_schema_ipc", pa.binary()),
        ("result_schema_ipc", pa.binary()),
        ("has_header", pa.bool_()),
        ("header_schema_ipc", pa.binary()),
        ("is_exchange", pa.bool_()),
    ]
)


def _describe_legacy_batch(server: Any) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
    """The v4 table of the primary protocol and its metadata (wire.md appendix B)."""
    rows = [
        {
            "name": name,
            "method_type": info.method_type.value,
            "has_return": info.has_return,
            "params_schema_ipc": _ipc_schema_message(info.params_schema),
            "result_schema_ipc": _ipc_schema_message(info.result_schema),
            "has_header": info.header_schema is not None,
            "header_schema_ipc": None if info.header_schema is None else _ipc_schema_message(info.header_schema),
            "is_exchange": info.is_exchange,
        }
        for name, info in sorted(server.methods.items())
    ]
    metadata = {
        LEGACY_PROTOCOL_NAME_KEY: server.protocol_name.encode(),
        REQUEST_VERSION_KEY: REQUEST_VERSION,
        LEGACY_DESCRIBE_VERSION_KEY: b"4",
        LEGACY_PROTOCOL_HASH_KEY: server.protocol_hash.encode(),
        SERVER_ID_KEY: server.server_id.encode(),
    }
    if server.protocol_version is not None:
        metadata[PROTOCOL_VERSION_KEY] = server.protocol_version.encode()
    return pa.RecordBatch.from_pylist(rows, schema=_DESCRIBE_LEGACY_SCHEMA), metadata


# ---- what a client sees


class HostedProtocol(_NamedTuple):
    """One protocol that a server hosts."""

    name: str
    version: str
    hash: str
    deprecated: bool = False
    deprecation_message: str = ""
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        deprecated = f" (deprecated: {self.deprecation_message})" if self.deprecated else ""
        return " ".join(filter(None, (self.name, self.version, self.hash[:12]))) + deprecated


class MethodDescription(_NamedTuple):
    """One method as the wire describes it: no docstring, defaults or Python types."""

    name: str
    method_type: MethodType
    has_return: bool
    params_schema: pa.Schema
    result_schema: pa.Schema
    has_header: bool = False
    header_schema: pa.Schema | None = None
    is_exchange: bool | None = None

    def __str__(self) -> str:
        return _methods_signature(self)


class ServiceDescription(_NamedTuple):
    """A protocol as the wire describes it; str() is a readable summary."""

    protocol_name: str
    request_version: str
    describe_version: str
    protocol_hash: str
    server_id: str
    methods: Mapping[str, MethodDescription]
    protocol_version: str = ""

    def __str__(self) -> str:
        version = f" {self.protocol_version}" if self.protocol_version else ""
        lines = [f"RPC Service: {self.protocol_name}{version}", f"  server: {self.server_id}"]
        return "\n".join([*lines, *(f"  {method}" for method in self.methods.values())])


_DESCRIBE_HINT = " (the server does not describe itself; it needs --describe, or enable_describe=True)"


class ReflectionNotSupportedError(RpcError):
    """The server does not describe itself; it needs `enable_describe=True` (`--describe`)."""

    @classmethod
    def from_rpc_error(cls, error: RpcError) -> ReflectionNotSupportedError:
        """Return the error with all its fields kept."""
        return cls(
            error.error_type,
            error.error_message if "enable_describe" in error.error_message else error.error_message + _DESCRIBE_HINT,
            error.remote_traceback,
            request_id=error.request_id,
            error_code=error.error_code,
            error_kind=error.error_kind,
            error_details=error.error_details,
        )


@contextlib.contextmanager
def _describe_reading(what: str) -> Iterator[None]:
    """A service may say anything of itself, and leave out what its records declare."""
    try:
        yield
    except (IPCError, pa.ArrowException, OSError, ValueError, TypeError, AttributeError, LookupError) as exc:
        raise RpcError("ProtocolError", f"the description of {what} cannot be read: {exc}") from exc


@_describe_reading("the service")
def _describe_hosted(hosted: Any) -> list[HostedProtocol]:
    return [
        HostedProtocol(
            p.protocol, p.protocol_version, p.protocol_hash, p.deprecated, p.deprecation_message, tuple(p.features)
        )
        for p in hosted.protocols
    ]


def _describe_view(service: Any, hosted: Any) -> ServiceDescription:
    with _describe_reading(f"'{service.protocol}'"):
        return ServiceDescription(
            protocol_name=service.protocol,
            request_version=hosted.request_version,
            describe_version=DESCRIBE_VERSION,
            protocol_hash=service.protocol_hash,
            server_id=hosted.server_id,
            methods=types.MappingProxyType({method.name: _describe_method_view(method) for method in service.methods}),
            protocol_version=service.protocol_version,
        )


def _describe_method_view(method: Any) -> MethodDescription:
    return MethodDescription(
        name=method.name,
        method_type=MethodType(method.method_type),
        has_return=bool(method.has_return and method.result_schema_ipc),
        params_schema=_describe_schema(method.params_schema_ipc),
        result_schema=_describe_schema(method.result_schema_ipc),
        has_header=method.has_header,
        header_schema=_describe_schema(method.header_schema_ipc) if method.has_header else None,
        is_exchange={"exchange": True, "producer": False}.get(method.stream_kind),
    )


def _describe_schema(message: bytes) -> pa.Schema:
    return _ipc_schema_value(message) if message else EMPTY_SCHEMA


# ---- whether caller and server mean the same


def compare_protocols(protocol: type, description: ServiceDescription) -> list[str]:
    """Say where a caller's Protocol and what a service says of itself differ, one line each; empty: they agree.

    >>> with connect(Calc, [sys.executable, "worker.py", "--describe"]) as calc:
    ...     compare_protocols(Calc, describe_protocol(calc, "Calc"))
    []
    """
    ours, theirs = rpc_methods(protocol), description.methods
    found = []
    name, version = _methods_protocol_name(protocol), _methods_protocol_version(protocol) or ""
    if name != description.protocol_name:
        found.append(f"the protocol is '{name}' here and '{description.protocol_name}' at the service")
    if version != description.protocol_version:
        said = [text or "not declared" for text in (version, description.protocol_version)]
        found.append(f"the protocol_version is {said[0]} here and {said[1]} at the service")
    for method in sorted({*ours, *theirs}):
        if method not in theirs:
            found.append(f"{method}(): the service has no such method")
        elif method not in ours:
            found.append(f"{method}(): only the service has it")
        else:
            found += [f"{method}(): {text}" for text in _describe_differences(ours[method], theirs[method])]
    return found


def _describe_differences(ours: RpcMethodInfo, theirs: MethodDescription) -> list[str]:
    kinds = [_describe_kind(method) for method in (ours, theirs)]
    if ours.method_type is not theirs.method_type or (
        None not in (ours.is_exchange, theirs.is_exchange) and kinds[0] != kinds[1]
    ):
        return [f"{kinds[0]} here and {kinds[1]} at the service"]
    found = _describe_fields("parameter", ours.params_schema, theirs.params_schema)
    common = [name for name in theirs.params_schema.names if name in ours.param_names]
    if (mine := [name for name in ours.param_names if name in common]) != common:
        found.append(f"the parameters are in another order: {', '.join(mine)} here, {', '.join(common)} at the service")
    headers = ours.header_schema, theirs.header_schema
    if None not in headers:
        found += _describe_fields("header field", *headers)
    elif headers != (None, None):
        found.append(
            "it has a header here and none at the service" if headers[1] is None else "the service sends a header"
        )
    results = [method.result_schema if method.has_return else EMPTY_SCHEMA for method in (ours, theirs)]
    return found + _describe_fields("the", *results)


def _describe_kind(method: RpcMethodInfo | MethodDescription) -> str:
    if method.method_type is MethodType.UNARY:
        return "a unary method"
    return {True: "an exchange", False: "a producer", None: "a stream"}[method.is_exchange]


def _describe_fields(noun: str, ours: pa.Schema, theirs: pa.Schema) -> list[str]:
    """The differences between fields of the same name, and what only one side has."""
    found = []
    for name in dict.fromkeys((*ours.names, *theirs.names)):
        what = f"{noun} {name!r}" if noun != "the" else "the result"
        if name not in theirs.names:
            found.append(f"{what} ({ours.field(name).type}) is unknown to the service")
            continue
        if name not in ours.names:
            optional = "; old callers can leave it out if it has a default" if noun == "parameter" else ""
            found.append(f"{what} ({theirs.field(name).type}) is unknown here{optional}")
            continue
        mine, other = ours.field(name), theirs.field(name)
        if mine.type != other.type:
            found.append(f"{what} is {mine.type} here and {other.type} at the service")
        if mine.nullable != other.nullable:
            may = "may be None here and not" if mine.nullable else "may not be None here, but it may"
            found.append(f"{what} {may} at the service")
    return found


# ==== 12. SERVER ======================================================================================================
# Uses: 1, 2, 3, 4, 5, 7, 8, 9, 10, 11. Requests become method calls (runtime.md sections 1, 3, 5, 6).
#
#   RpcServer           what is hosted; shared by all connections and threads, sealed after construction
#   _ServerConnection   one peer: reads a request, resolves it, dispatches it, answers; one call at a time
#   _ServerCall         one dispatched call: identity, counters, outcome; what the access record is made of
#   ServerRequest       one whole message of a peer without a connection (HTTP), through the same pipeline
#
# A request that is refused before dispatch is answered, and the connection stays in step: the input stream of a known
# stream method is drained, that of an unknown one is swallowed when it comes (wire.md section 8.6). Bytes that are
# not Arrow are answered once, and end the connection; so does a request that names no method where none may come: it
# is the input of a stream that the caller believes in, and every answer after it would go to another call (law 10).


class ProtocolBinding:
    """One hosted protocol and the object that implements it."""

    __slots__ = ("_hash", "_plans", "ctx_methods", "impl", "methods", "name", "protocol", "stores", "version")

    def __init__(self, protocol: type, impl: object, *, allow_reserved: bool = False) -> None:
        self.stores = False  # whether results may be kept elsewhere
        self.version = _methods_protocol_version(protocol)
        self.methods = rpc_methods(protocol)
        self.ctx_methods = _server_check_implementation(protocol, self.methods, impl)
        try:
            self.name = validate_protocol_name(_methods_protocol_name(protocol), allow_reserved=allow_reserved)
        except ValueError as exc:
            raise ValueError(f"{protocol.__name__}: {exc}") from exc
        self.protocol = protocol
        self.impl = impl
        self._hash: str | None = None
        self._plans: dict[str, _WirePlan] = {}

    @property
    def protocol_hash(self) -> str:
        """SHA-256 of the contract, as 64 hex digits (wire.md section 9.4); computed at first use.

        Empty when a type has no portable token: one method must not hide all others from who asks for a description.
        """
        if self._hash is None:  # json and hashlib are 5 ms of a worker's start
            try:
                self._hash = compute_protocol_hash(self.name, self.methods)
            except UnsupportedArrowTypeError as exc:
                _LOG_RPC.warning("Protocol %s has no hash: %s", self.name, exc)
                self._hash = ""
        return self._hash

    def plan(self, method: str) -> _WirePlan:
        """Return the compiled method; MethodNotImplementedError when the protocol has none of that name."""
        plan = self._plans.get(method)
        if plan is None:
            info = self.methods.get(method)
            if info is None:
                raise MethodNotImplementedError(
                    f"Protocol '{self.name}' has no method '{method}'. Available: {sorted(self.methods)}"
                )
            plan = _WirePlan(info, self.name, self.version)
            if self.stores:
                plan.send_by_pyarrow()
            self._plans[method] = plan
        return plan


class RpcServer:
    """Hosts one or more Protocols (API.md section 2.2).

    Args:
        protocol: the primary Protocol class; `implementation` is the object whose methods are called.
        extra_protocols: further (Protocol, implementation) pairs, each reached by its own name.
        server_id: goes into log and error batches; 12 random hex digits by default.
        server_version: free text for the access log and for reflection.
        enable_describe: host `vgi_rpc.Reflection.v1` and answer the older `__describe__`.
        ipc_validation: how thoroughly incoming batches are checked; None reads VGI_RPC_IPC_VALIDATION.
        include_tracebacks: False leaves remote tracebacks out of every error.
        accept_unrouted: let old clients that send no routing key reach the only application protocol.
        limits: what a peer may claim before memory is allocated for it.
        external_location: keeps results that are too large to travel, and fetches arguments that are kept elsewhere.
        idle_message_timeout: seconds that a peer on a socket may be silent within a request; None: for ever.
        shm_copy: copy batches out of shared memory before they are checked, so that a peer cannot change them later.
            Memory is shared with processes of the same user only. VGI_RPC_SHM_COPY=1 does it on both sides.

    Raises:
        TypeError: the implementation does not fit; one error lists every problem.
        ValueError: a malformed or duplicate protocol name, or a malformed version.
    """

    def __init__(
        self,
        protocol: type,
        implementation: object,
        *,
        extra_protocols: Sequence[tuple[type, object]] = (),
        server_id: str | None = None,
        server_version: str = "",
        enable_describe: bool = False,
        ipc_validation: IpcValidation | None = None,
        include_tracebacks: bool = True,
        accept_unrouted: bool = False,
        limits: IpcLimits = IpcLimits(),  # noqa: B008 (immutable)
        external_location: BatchStore | None = None,
        shm_copy: bool = False,
        idle_message_timeout: float | None = 60.0,
    ) -> None:
        if idle_message_timeout is not None and not idle_message_timeout > 0:
            raise ValueError(f"idle_message_timeout must be positive or None, got {idle_message_timeout}")
        self.idle_message_timeout = idle_message_timeout
        self.external_location = external_location
        self.shm_copy = shm_copy
        self.server_id = server_id or f"{int.from_bytes(os.urandom(6), 'big'):012x}"
        self.server_version = server_version
        self.describe_enabled = enable_describe
        self.ipc_validation = ipc_validation or IpcValidation.from_env()
        self.include_tracebacks = include_tracebacks
        self.accept_unrouted = accept_unrouted
        self.limits = limits
        self._hooks: tuple[DispatchHook, ...] = ()
        self.dispatch_hook: DispatchHook | None = None
        self.transport_kind: TransportKind | None = None
        self.transport_capabilities: frozenset[str] = frozenset()
        self._bindings: dict[str, ProtocolBinding] = {}
        for proto, impl in ((protocol, implementation), *extra_protocols):
            self._bind(ProtocolBinding(proto, impl))
        self._application = tuple(self._bindings.values())
        self._primary = self._application[0]
        if enable_describe:
            self._bind(ProtocolBinding(_describe_wire().Reflection, ReflectionImpl(self), allow_reserved=True))
        self.bindings: Mapping[str, ProtocolBinding] = types.MappingProxyType(self._bindings)
        self._start_lock = threading.Lock()
        self._layouts = _ServerLayouts()
        self._started: set[tuple[TransportKind, frozenset[str]]] = set()
        _LOG_RPC.info(
            "RpcServer created for %s (server_id=%s, methods=%d)",
            protocol.__name__,
            self.server_id,
            len(self.methods),
            extra={"server_id": self.server_id, "protocol": self.protocol_name, "method_count": len(self.methods)},
        )
        for created in _server_created:
            created(self)

    @property
    def methods(self) -> Mapping[str, RpcMethodInfo]:
        """The primary protocol's methods."""
        return self._primary.methods

    @property
    def implementation(self) -> object:
        """The primary protocol's implementation."""
        return self._primary.impl

    @property
    def protocol_name(self) -> str:
        """The primary protocol's name on the wire."""
        return self._primary.name

    @property
    def protocol_version(self) -> str | None:
        """The primary protocol's declared version."""
        return self._primary.version

    @property
    def protocol_hash(self) -> str:
        """SHA-256 of the primary protocol's contract, as 64 hex digits (wire.md section 9.4)."""
        return self._primary.protocol_hash

    @property
    def ctx_methods(self) -> frozenset[str]:
        """Methods of the primary protocol whose implementation takes `ctx`."""
        return self._primary.ctx_methods

    @property
    def dispatch_hooks(self) -> tuple[DispatchHook, ...]:
        """What is told of every dispatched call, in the order of starting."""
        return self._hooks

    def add_dispatch_hook(self, hook: DispatchHook) -> None:
        """Tell `hook` of every dispatched call; hooks added later start later and end earlier."""
        self._hooks = (*self._hooks, hook)
        self.dispatch_hook = _CtxHooks(self._hooks)

    def remove_dispatch_hook(self, hook: DispatchHook) -> None:
        """Tell `hook` no more, from the next call on; ValueError when it was not added."""
        if hook not in self._hooks:
            raise ValueError(f"{type(hook).__name__} is not a dispatch hook of this server")
        self._hooks = tuple(known for known in self._hooks if known is not hook)
        self.dispatch_hook = _CtxHooks(self._hooks) if self._hooks else None

    def serve(
        self,
        transport: RpcTransport,
        *,
        auth: AuthContext | None = None,
        transport_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer calls until the peer has gone; `auth` and `transport_metadata` apply to every call of this peer."""
        connection = self._connection(transport, auth, transport_metadata)
        token = _ctx_auth.set(connection.auth)
        try:
            connection.run()
        finally:
            _ctx_auth.reset(token)

    def serve_one(self, transport: RpcTransport) -> None:
        """Answer exactly one call; EOFError when the peer has gone instead."""
        connection = self._connection(transport, None, None)
        channel = connection.channel
        try:
            if channel.broken is not None or channel.at_end():
                raise EOFError(channel.broken or "the peer closed the connection")
            connection.serve_one()
        except _ServerHangUp as exc:
            connection.end(exc)
            raise EOFError(channel.broken) from exc.__cause__
        except EOFError:
            connection.detach()
            raise

    def _bind(self, binding: ProtocolBinding) -> None:
        other = self._bindings.get(binding.name)
        if other is not None:
            raise ValueError(
                f"Two protocols are hosted under the same name '{binding.name}': {other.protocol.__name__} and "
                f"{binding.protocol.__name__}. Give one of them another protocol_name."
            )
        for name, known in self._bindings.items():
            shared = sorted(set(known.methods) & set(binding.methods))
            if shared:
                _LOG_RPC.warning("protocols %s and %s both have method(s) %s", name, binding.name, shared)
        binding.stores = self.external_location is not None
        self._bindings[binding.name] = binding

    def _connection(
        self, transport: RpcTransport, auth: AuthContext | None, metadata: Mapping[str, Any] | None
    ) -> _ServerConnection:
        kind = TransportKind.PIPE
        if isinstance(transport, UnixTransport):
            kind = TransportKind.UNIX
        elif isinstance(transport, TcpTransport):
            kind = TransportKind.TCP
        channel = _transport_channel(transport)
        self._start(kind, frozenset() if channel.shm is None else frozenset({"shm"}))
        channel.limits = self.limits
        known = channel.server
        if not isinstance(known, _ServerConnection) or known.server is not self:
            known = channel.server = _ServerConnection(self, channel, kind, _CTX_ANONYMOUS, {})
        known.auth, known.transport_metadata = auth or AuthContext.anonymous(), metadata or {}
        return known

    def _start(self, kind: TransportKind, capabilities: frozenset[str]) -> None:
        """Call `on_serve_start` of each distinct implementation, once per kind and capabilities (runtime.md 1.1)."""
        if (kind, capabilities) in self._started:
            return
        with self._start_lock:
            if (kind, capabilities) in self._started:
                return
            self.transport_kind = kind
            self.transport_capabilities = capabilities
            for impl in {id(b.impl): b.impl for b in self._bindings.values()}.values():
                hook = getattr(impl, "on_serve_start", None)
                if callable(hook):
                    try:
                        hook(kind)
                    except BaseException:
                        _LOG_RPC.exception("on_serve_start hook raised; aborting serve")
                        raise
            self._started.add((kind, capabilities))

    def _route(self, metadata: _IpcMetadata) -> ProtocolBinding:
        """Step 11 of wire.md section 7."""
        name = _wire_protocol_name(metadata)
        if name is None:
            if self.accept_unrouted and len(self._application) == 1:
                return self._primary
            raise ProtocolNotSpecifiedError(
                "Missing 'vgi_rpc.protocol' in the request batch's custom metadata. "
                f"Each request names the protocol it calls; hosted here: {sorted(self._bindings)}"
            )
        return self._binding(name)

    def _binding(self, name: str) -> ProtocolBinding:
        binding = self._bindings.get(name)
        if binding is None:
            raise ProtocolNotSupportedError(
                f"This server does not host protocol '{name}'. Hosted: {list(self._bindings)}"
                + ("" if self.describe_enabled or name != REFLECTION_PROTOCOL_NAME else _SERVER_DESCRIBE_HINT)
            )
        return binding

    def error_body(self, exc: BaseException, request_id: str = "", schema: pa.Schema = EMPTY_SCHEMA) -> bytes:
        """Return a complete reply that carries an error; for transports that send whole messages (HTTP)."""
        writer = _IpcWriter(schema)
        writer.write(empty_batch(schema), _wire_error(exc, self.server_id, request_id, self.include_tracebacks))
        writer.close()
        return b"".join(writer.take())


_server_created: list[Callable[[RpcServer], None]] = []  # told of every new server; rooms below add to it
_SERVER_LAYOUTS_BYTES = 8 << 20
_SERVER_LAYOUT_BYTES = 8192  # of one, beside what the request has, four times at most
_SERVER_LAYOUTS_PER_SCHEMA = 64  # methods with the same parameters share a schema message
_SERVER_LEARNED_KEYS = {RPC_METHOD_KEY, REQUEST_VERSION_KEY, PROTOCOL_KEY, PROTOCOL_VERSION_KEY, DEADLINE_KEY}
_SERVER_SHARED_KEYS = _SERVER_LEARNED_KEYS | {SHM_SEGMENT_NAME_KEY, SHM_SEGMENT_SIZE_KEY}


class _ServerLayout(_NamedTuple):
    layout: _IpcCanonical
    schema: pa.Schema
    binding: ProtocolBinding
    plan: _WirePlan
    names: Sequence[str]  # of the arguments; an older caller may not have all of them
    size: int  # bytes it may hold


class _ServerLayouts:
    """How requests have looked, by their schema message; filled only after every check has passed.

    Bounded in bytes: when there is no more room, those that have not been used for longest are forgotten.
    """

    __slots__ = ("_known", "_lock")

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[_ServerLayout, ...]] = {}  # the least recently used first
        self._lock = threading.Lock()

    def candidates(self, data: bytes, pos: int) -> tuple[_ServerLayout, ...]:
        """Return what has begun with the schema message at `pos`."""
        key = data[pos : pos + 8 + _IPC_I32(data, pos + 4)[0]]
        found = self._known.pop(key, ())
        if found:
            self._known[key] = found
        return found

    def learn(
        self, sample: bytes, batch: pa.RecordBatch, deadline: bytes | None, binding: ProtocolBinding, plan: _WirePlan
    ) -> None:
        """Remember a request and where it goes."""
        layout = _ipc_learn(sample, batch, deadline)
        if layout is None:
            return
        with self._lock:
            known = self.candidates(sample, 0)
            if any(entry.layout.match(sample, 0) for entry in known):
                return
            size = _SERVER_LAYOUT_BYTES + 4 * len(sample)
            key = sample[: 8 + _IPC_I32(sample, 4)[0]]
            names = plan.names if batch.num_columns == len(plan.names) else batch.schema.names
            self._known[key] = (_ServerLayout(layout, batch.schema, binding, plan, names, size), *known)
            self._known[key] = self._known[key][:_SERVER_LAYOUTS_PER_SCHEMA]
            oldest = list(self._known.items())
            total = sum(entry.size for _, entries in oldest for entry in entries)
            for key, entries in oldest[:-1]:
                if total <= _SERVER_LAYOUTS_BYTES:
                    break
                total -= sum(entry.size for entry in entries)
                self._known.pop(key, None)

    def __len__(self) -> int:
        return len(self._known)


_SERVER_DESCRIBE_HINT = ". To describe itself the server needs enable_describe=True (--describe)"


class _ServerHangUp(Exception):
    """The peer's bytes make no sense; it has been told, and the connection ends."""


class _ServerInput(_NamedTuple):
    """What is said of a request to those who observe calls."""

    schema: pa.Schema
    rows: int
    size: int  # get_total_buffer_size()
    metadata: _IpcMetadata


class _ServerCall:
    """One dispatched call, from its validated request to its access record (runtime.md sections 5 and 6)."""

    __slots__ = (
        "_hook",
        "_request_id",
        "_token",
        "binding",
        "cancelled",
        "connection",
        "error",
        "externalized_bytes",
        "is_turn",
        "notes",
        "observed",
        "plan",
        "request",
        "started",
        "stats",
        "stream_id",
    )

    def __init__(
        self,
        connection: _ServerConnection,
        binding: ProtocolBinding,
        plan: _WirePlan,
        request: _ServerInput | None,
    ) -> None:
        """`request` is None when nobody counts."""
        self.connection = connection
        self.binding = binding
        self.plan = plan
        self.request = request
        self.error: BaseException | None = None
        self.cancelled = False
        self.stream_id = ""
        self.is_turn = False  # of a stream whose state travels; then a call of its own
        self.notes: Mapping[str, Any] = {}  # what a transport adds to the access record
        self.externalized_bytes = 0  # what has been kept elsewhere, as it is stored
        self._request_id = connection.request_id
        self._hook = connection.server.dispatch_hook
        self._token: Any = None
        # Nothing is counted, timed or formatted when nobody listens.
        self.observed = request is not None
        self.stats = CallStatistics()
        self.started = 0.0

    @property
    def request_id(self) -> str:
        if not self._request_id:
            self._request_id = _ctx_request_id()
        return self._request_id

    def start(self, kwargs: dict[str, Any]) -> None:
        """Begin counting and tell the hook."""
        self.begin()
        if self.request is not None and self._hook is not None:
            connection = self.connection
            known = _server_traced(connection.transport_metadata, self.request.metadata)
            if self.stream_id:
                known = {**known, "stream_id": self.stream_id}
            self._token = self._hook.on_dispatch_start(self.plan.info, connection.auth, known, kwargs)

    def begin(self) -> None:
        """Begin counting."""
        if self.request is not None:
            self.started = time.monotonic()
            self.stats.count_input(self.request.rows, self.request.size)
            if self.plan.is_stream and not self.stream_id:
                import uuid

                self.stream_id = uuid.uuid4().hex

    def sent(self, batch: pa.RecordBatch) -> None:
        if self.observed:
            self.stats.record_output(batch)

    def sent_encoded(self, reply: _IpcMessages) -> None:
        if self.observed:
            self.stats.count_output(int(self.plan.info.has_return), self.plan.reply_bytes(reply))

    def received(self, batch: pa.RecordBatch) -> None:
        if self.observed:
            self.stats.record_input(batch)

    def externalize(
        self,
        data: pa.RecordBatch,
        items: Sequence[tuple[pa.RecordBatch, Mapping[bytes, bytes] | pa.KeyValueMetadata | None]],
    ) -> tuple[pa.RecordBatch, pa.KeyValueMetadata] | None:
        """Keep a batch elsewhere if the server's store wants it; returns the pointer to it.

        Never when the caller shares memory with us: that goes before the store (wire.md section 12).
        """
        if self.connection.shm is not None:
            return None
        found = externalize(self.connection.server.external_location, data, items, self.externalized_room())
        if found is None:
            return None
        self.externalized_bytes += found.stored_bytes
        return found.batch, found.metadata

    def externalized_room(self) -> int | None:
        """How many bytes this response may still keep elsewhere; None: any number."""
        limit = self.connection.max_externalized_response_bytes
        return None if limit is None else max(limit - self.externalized_bytes, 0)

    def fail(self, exc: BaseException) -> _IpcMetadata:
        """Note and log the failure; returns the metadata of the batch that tells the caller."""
        self.error = exc
        server = self.connection.server
        _server_log_failure(self, exc)
        return _wire_error(exc, server.server_id, self.request_id, server.include_tracebacks)

    def finish(self) -> None:
        """Write the access record and tell the hook, in this order: what the hook has made current is in the record.

        Never fails; a second time it does nothing.
        """
        observed, self.observed = self.observed, False
        if not observed:
            return
        if _LOG_ACCESS.isEnabledFor(logging.INFO):
            try:
                _server_access_record(self)
            except Exception:
                _LOG_RPC.debug("could not write an access record", exc_info=True)
        if self._hook is not None and self._token is not None:
            self._hook.on_dispatch_end(self._token, self.plan.info, self.error, stats=self.stats)


class _ServerConnection:
    """One peer of a server: reads a request, answers it, again."""

    __slots__ = (
        "_held",
        "_last",
        "_segment",
        "_shared",
        "_swallow",
        "auth",
        "channel",
        "externalization_enabled",
        "kind",
        "make_context",
        "max_externalized_response_bytes",
        "preferred_response_bytes",
        "request_id",
        "response_limit_bytes",
        "server",
        "shm",
        "stream_id",
        "transport_metadata",
    )

    def __init__(
        self,
        server: RpcServer,
        channel: Any,
        kind: TransportKind,
        auth: AuthContext,
        transport_metadata: Mapping[str, Any],
    ) -> None:
        self.server = server
        self.channel = channel
        self.kind = kind
        self.auth = auth
        self.transport_metadata = transport_metadata
        self.stream_id = ""  # of a stream whose state travels
        self.request_id = ""  # the peer's own, if it names its requests
        self.make_context: Callable[..., CallContext] = CallContext
        self.response_limit_bytes: int | None = None
        self.preferred_response_bytes: int | None = None
        self.shm: ShmSegment | None = None  # where this call's batches may be
        self._segment: ShmSegment | None = None  # that the peer has named and we have attached
        self.max_externalized_response_bytes: int | None = None
        self.externalization_enabled = False
        self._swallow = False  # an unknown method may have been a stream, whose input comes next
        self._shared: _ServerLayouts | None = None  # requests that name the segment; the server's do not
        self._last: _ServerLayout | None = None  # most calls look like the one before
        self._held: list[bytes] = []  # replies to calls sent ahead, which share a write (FINDINGS.md section 4)

    def run(self) -> None:
        """Answer calls until the peer has gone or has sent something that makes no sense."""
        channel = self.channel
        try:
            while channel.pos < len(channel.buf) or not channel.at_end():
                if not self._serve_learned():
                    self._flush()
                    self._serve_one()
        except _ServerHangUp as exc:
            self.end(exc)
        except (EOFError, ConnectionError):
            _LOG_RPC.debug("the peer went away", exc_info=True)
        finally:
            self.detach()

    def end(self, exc: _ServerHangUp) -> None:
        """Close the connection of a peer that has been told why: nobody may wait for more, nothing more is read."""
        self.detach()
        with self.channel.lock:
            self.channel.poison(f"the server ended the connection: {exception_str(exc.__cause__ or exc)}")

    def observed(self) -> bool:
        """Whether anyone wants to know about calls; if not, nothing is counted, timed or formatted."""
        return self.server.dispatch_hook is not None or _LOG_ACCESS.isEnabledFor(logging.INFO)

    def serve_one(self) -> None:
        """Read one request and answer it."""
        if not self._serve_learned():
            self._serve_one()
        self._flush()

    def _serve_one(self) -> None:
        channel = self.channel
        begin, data = channel.pos, channel.buf
        if self.kind is not TransportKind.PIPE:
            channel.silence = self.server.idle_message_timeout
        try:
            request = _wire_read_request(channel, self.server.ipc_validation)
        except (EOFError, ConnectionError):
            raise
        except IPCError as exc:
            return self._refuse_unreadable(exc, data, begin)
        except Exception as exc:
            self._hang_up(exc)
        finally:
            channel.silence = None
        channel.proven = True
        batch, metadata, flaw = request
        swallow, self._swallow = self._swallow, False
        if RPC_METHOD_KEY not in metadata and swallow:
            return
        if _LOG_WIRE_REQUEST.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_REQUEST.debug("Read request batch: %s, metadata=%s", _log_batch(batch), _log_metadata(metadata))
        if flaw and RPC_METHOD_KEY in metadata:
            return self._refuse(RpcError("ProtocolError", flaw), None)
        sample = data[begin : channel.pos] if channel.buf is data else b""
        self._answer(batch, metadata, sample)

    def _serve_learned(self) -> bool:
        """Answer a request that looks like an earlier one. Bytes that match have passed steps 1 to 18 before."""
        channel, last = self.channel, self._last
        data, pos = channel.buf, channel.pos
        if len(data) - pos < 16 or self._swallow or _LOG_WIRE_REQUEST.isEnabledFor(logging.DEBUG):
            return False
        found = None if last is None else last.layout.match(data, pos)
        if found is None:
            known = self.server._layouts if self._shared is None else self._shared
            for last in known.candidates(data, pos):
                found = last.layout.match(data, pos)
                if found is not None:
                    self._last = last
                    break
        if found is None or last is None:
            return False
        row, end = found
        limit = channel.limits.max_message_bytes
        if limit is not None and end - pos > limit:
            return False
        layout, schema, binding, plan, names, _ = last
        kwargs = _wire_row_arguments(plan, names, row, channel.limits)
        if kwargs is None:
            return False
        channel.pos = end
        channel.proven = True
        self._enter_shared(None if self._shared is None else channel.shm or self._segment)
        request = None
        if self.observed():
            request = _ServerInput(schema, 1 if row else 0, layout.buffer_bytes(data, pos, end), {})
        elif not plan.is_stream and plan.name not in binding.ctx_methods:
            self._unary_plain(binding, plan, kwargs)
            return True
        self._flush()
        budget = layout.deadline(data, pos) if layout.deadline_at >= 0 else None
        self._dispatch(binding, plan, kwargs, _server_budget(budget), request)
        return True

    def _answer(self, batch: pa.RecordBatch, metadata: _IpcMetadata, sample: bytes) -> None:
        """The pipeline of wire.md section 7, steps 3 to 19."""
        plan = None
        try:
            name = _wire_method_name(metadata)
            batch, metadata = self._share(batch, metadata)
            batch, _ = self.fetched(batch, metadata)
            _wire_check_rows(batch)
            if name.startswith("__") and name.endswith("__"):
                return self._answer_builtin(name)
            binding = self._route(name, metadata)
            plan = binding.plan(name)
            _wire_check_version(binding.name, binding.version, metadata)
            kwargs = _wire_arguments(plan, batch, self.channel.limits)
        except Exception as exc:
            if RPC_METHOD_KEY not in metadata:
                self._hang_up(exc)
            return self._refuse(exc, plan)
        if _LOG_WIRE_REQUEST.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_REQUEST.debug("Parsed request: method=%s, kwargs={%s}", name, _log_kwargs(kwargs))
        if sample:
            self._learn(sample, batch, metadata, binding, plan)
        budget = _server_budget(metadata.get(DEADLINE_KEY))
        self._dispatch(binding, plan, kwargs, budget, self._input(batch, metadata))

    def _input(self, batch: pa.RecordBatch, metadata: _IpcMetadata) -> _ServerInput | None:
        if not self.observed():
            return None
        return _ServerInput(batch.schema, batch.num_rows, batch.get_total_buffer_size(), metadata)

    def _share(self, batch: pa.RecordBatch, metadata: _IpcMetadata) -> tuple[pa.RecordBatch, _IpcMetadata]:
        """Find the segment that a request names, and the request itself if it is in there (wire.md section 11.3)."""
        self.shm = None
        named = metadata.get(SHM_SEGMENT_NAME_KEY)
        if named is None and SHM_OFFSET_KEY not in metadata:
            return batch, metadata
        if self._segment is None and not self._shares():  # asked once: who peers are does not change
            return batch, metadata
        self._enter_shared(self.channel.shm or self._attached(named))
        found, about = _elsewhere_local(self.shm, batch, metadata, self.server.ipc_validation, self.server.limits)
        return found, about or {}

    def _shares(self) -> bool:
        """Whether this peer may share memory with us."""
        return shm_available() and self.kind in _SERVER_SHM_KINDS and self.channel.same_user()

    def _enter_shared(self, segment: ShmSegment | None) -> None:
        """It is our turn to touch the segment, if the call has one."""
        self.shm = segment
        if segment is not None:
            segment.sweep()

    def _learn(
        self, sample: bytes, batch: pa.RecordBatch, metadata: _IpcMetadata, binding: ProtocolBinding, plan: _WirePlan
    ) -> None:
        """Remember how a request looks. One that names a segment means something on this connection only."""
        budget = metadata.get(DEADLINE_KEY)
        shared = self.shm is not None and SHM_SEGMENT_NAME_KEY in metadata
        if metadata.keys() - (_SERVER_SHARED_KEYS if shared else _SERVER_LEARNED_KEYS):
            return
        if budget is not None and _server_budget(budget) is None:
            return
        known = self.server._layouts
        if shared:
            if self._shared is None:
                self._shared, self._last = _ServerLayouts(), None
            known = self._shared
        known.learn(sample, batch, budget, binding, plan)

    def _attached(self, named: bytes | None) -> ShmSegment | None:
        name = None if named is None else named.decode(errors="replace")
        if name is not None and (self._segment is None or self._segment.name != name):
            self.detach()
            try:
                self._segment = ShmSegment.attach(name, 0)
            except (OSError, ValueError) as exc:
                raise RpcError("ProtocolError", f"cannot attach the shared memory segment {name!r}: {exc}") from exc
            if self.server.shm_copy:
                self._segment.copy_only()
        return self._segment

    def detach(self) -> None:
        """Let go of the memory that the peer shares."""
        segment, self._segment, self.shm = self._segment, None, None
        self._shared = self._last = None
        if segment is not None:
            segment.close()

    def fetched(self, batch: pa.RecordBatch, metadata: _IpcMetadata) -> tuple[pa.RecordBatch, _IpcMetadata]:
        """Step 7: a batch that is kept elsewhere, with its own metadata; what else a request says, its pointer says."""
        store = self.server.external_location
        if store is None or not is_external_location_batch(batch, metadata):
            return batch, metadata
        server = self.server
        batch, found = _elsewhere_load(
            store, batch, metadata, _ElsewhereLogs(None), server.ipc_validation, server.limits, None
        )
        return batch, {key: value for key, value in found.items() if key not in (STATE_KEY, CALL_STATE_KEY)}

    def _route(self, name: str, metadata: _IpcMetadata) -> ProtocolBinding:
        """Step 11."""
        return self.server._route(metadata)

    def _dispatch(
        self,
        binding: ProtocolBinding,
        plan: _WirePlan,
        kwargs: dict[str, Any],
        budget: float | None,
        request: _ServerInput | None,
    ) -> None:
        """Step 19: call the method and answer."""
        if not plan.is_stream and plan.name not in binding.ctx_methods and request is None:
            return self._unary_plain(binding, plan, kwargs)
        call = _ServerCall(self, binding, plan, request)
        call.stream_id = self.stream_id
        call.start(kwargs)
        try:
            if plan.is_stream:
                self._stream(_ServerStream(call, budget), kwargs)
            else:
                self._unary(call, kwargs, budget)
        finally:
            self._finish(call)

    def _stream(self, stream: _ServerStream, kwargs: dict[str, Any]) -> None:
        stream.run(kwargs)

    def _finish(self, call: _ServerCall) -> None:
        call.finish()

    def _unary_plain(self, binding: ProtocolBinding, plan: _WirePlan, kwargs: dict[str, Any]) -> None:
        """A method without a context that nobody observes: one call, one write."""
        channel = self.channel
        if self._held and plan.quick < _SERVER_STEADY:  # a ready answer does not wait for a method that may take long
            self._flush()
        ahead = channel.pos < len(channel.buf)  # the caller has sent more than this request
        began = time.monotonic() if ahead else 0.0
        try:
            value = getattr(binding.impl, plan.name)(**kwargs)
            data = self._encoded(plan, value)
            result = _server_result(_ServerCall(self, binding, plan, None), value) if data is None else None
        except BaseException as exc:
            self._flush()
            call = _ServerCall(self, binding, plan, None)
            reply = _ServerReply(call)
            reply.end(empty_batch(reply.schema), call.fail(exc))
            return self._obey(exc)
        if type(data) is bytes:
            if not ahead and not self._held:
                channel.write(data)
                return None
            self._held.append(data)
            if ahead:
                plan.quick = plan.quick + 1 if time.monotonic() - began < _SERVER_QUICK else 0
                if plan.quick >= _SERVER_STEADY and sum(map(len, self._held)) < _SERVER_COALESCE:
                    return None
            return self._flush()
        self._flush()
        if data is not None:
            channel.send(data)
        elif result is not None:
            _ServerReply(_ServerCall(self, binding, plan, None)).end(*result)
        return None

    def _encoded(self, plan: _WirePlan, value: Any) -> _IpcMessages | None:
        """The reply by a template; None: pyarrow has to look at the value, or someone else wants to."""
        if _LOG_WIRE_RESPONSE.isEnabledFor(logging.DEBUG):
            return None
        data = plan.encode_reply(value)
        if data is None or self.shm is None:
            return data
        return data if sum(map(len, _ipc_pieces(data))) < self.shm.threshold else None

    def _flush(self) -> None:
        """Send what has been held back; called before anything else is sent, and before waiting for input."""
        if self._held:
            held, self._held = self._held, []
            self.channel.send(held)

    def _unary(self, call: _ServerCall, kwargs: dict[str, Any], budget: float | None) -> None:
        """A method with a context, or one that is observed."""
        reply = _ServerReply(call)
        if call.plan.name in call.binding.ctx_methods:
            kwargs["ctx"] = self.context(call, reply.log, budget)
        data = result = None
        try:
            value = getattr(call.binding.impl, call.plan.name)(**kwargs)
            data = self._encoded(call.plan, value)
            result = _server_result(call, value) if data is None else None
        except BaseException as exc:
            result = empty_batch(reply.schema), call.fail(exc)
        if result is not None:
            reply.end(*result)
        elif data is not None:
            reply.end_encoded(data)
        self._obey(call.error)

    def _obey(self, exc: BaseException | None) -> None:
        """SystemExit, KeyboardInterrupt: answered and recorded, and still obeyed."""
        if isinstance(exc, _SERVER_OBEYED):
            raise exc

    def context(
        self, call: _ServerCall, emit: Callable[[Message], None], budget: float | None, *, request_id: bool = True
    ) -> CallContext:
        """Build what a method sees as `ctx`."""
        return self.make_context(
            self.auth,
            emit,
            self.transport_metadata,
            server_id=self.server.server_id,
            method_name=call.plan.name,
            protocol_name=call.binding.name,
            kind=self.kind,
            implementation=call.binding.impl,
            response_limit_bytes=self.response_limit_bytes,
            preferred_response_bytes=self.preferred_response_bytes,
            deadline=None if budget is None else time.monotonic() + budget,
            request_id=call.request_id if request_id else "",
        )

    def _answer_builtin(self, name: str) -> None:
        """Steps 9 and 10, and the older `__describe__` (DESIGN.md section 7)."""
        server = self.server
        if name == TRANSPORT_OPTIONS_METHOD_NAME:
            metadata = {
                TRANSPORT_SHM_KEY: b"true" if self._shares() else b"false",
                REQUEST_VERSION_KEY: REQUEST_VERSION,
                SERVER_ID_KEY: server.server_id.encode(),
            }
            return self._send_stream(empty_batch(EMPTY_SCHEMA), metadata)
        if name == LEGACY_DESCRIBE_METHOD_NAME and server.describe_enabled:
            return self._send_stream(*_describe_legacy_batch(server))
        hint = ""
        if name == LEGACY_DESCRIBE_METHOD_NAME:
            hint = f" Describing is the protocol '{REFLECTION_PROTOCOL_NAME}'{_SERVER_DESCRIBE_HINT}."
        raise MethodNotImplementedError(f"No built-in method '{name}'.{hint}")

    def _refuse_unreadable(self, exc: IPCError, data: bytes, begin: int) -> None:
        """Answer a request whose frames are in order and whose content is not; an input stream may come after it.

        Where one may come, this is one if it does not name a method; when only its first bytes are here, who knows.
        """
        self.drain()
        whole = self.channel.buf is data
        if RPC_METHOD_KEY in data[begin : self.channel.pos if whole else None] or not (whole or self._swallow):
            return self._refuse(exc, None)
        if not (whole and self._swallow):
            self._hang_up(exc)
        self._swallow = False

    def _refuse(self, exc: Exception, plan: _WirePlan | None) -> None:
        """Answer a request that was not dispatched, and keep the connection in step."""
        server = self.server
        stream = plan is not None and plan.is_stream
        schema = plan.info.result_schema if plan is not None and not stream else EMPTY_SCHEMA
        _LOG_RPC.info("Refused a request: %s: %s", type(exc).__name__, _log_line(exception_str(exc)))
        metadata = _wire_error(exc, server.server_id, _ctx_request_id(), server.include_tracebacks)
        self._send_stream(empty_batch(schema), metadata)
        if stream:
            self.drain()
        self._swallow = plan is None

    def drain(self) -> None:
        """Read an input stream that nobody wants to its end, wherever in it we are."""
        try:
            _ipc_drain(self.channel)
        except (EOFError, ConnectionError):
            raise
        except Exception as exc:
            raise _ServerHangUp from exc

    def _hang_up(self, exc: Exception) -> typing.NoReturn:
        """Tell the peer that its bytes make no sense (best effort), and end the connection."""
        server = self.server
        _LOG_RPC.warning("Ending a connection: %s: %s", type(exc).__name__, _log_line(exception_str(exc)))
        metadata = _wire_error(exc, server.server_id, _ctx_request_id(), server.include_tracebacks)
        with contextlib.suppress(OSError):
            self._send_stream(empty_batch(EMPTY_SCHEMA), metadata)
            self.channel.linger()
        raise _ServerHangUp from exc

    def _send_stream(self, batch: pa.RecordBatch, metadata: _IpcMetadata) -> None:
        writer = _IpcWriter(batch.schema)
        writer.write(batch, metadata)
        writer.close()
        self.channel.send(writer.take())


class _ServerReply:
    """The reply stream of a unary call. Logs are written while the method runs, from any of its threads."""

    __slots__ = ("_call", "_ended", "_lock", "_writer", "schema")

    def __init__(self, call: _ServerCall) -> None:
        self.schema = call.plan.info.result_schema
        self._call = call
        self._writer: _IpcWriter | None = None  # begins with the first message, or with the end
        self._lock = threading.Lock()
        self._ended = False

    def _write(self, batch: pa.RecordBatch, about: Mapping[bytes, bytes] | pa.KeyValueMetadata | None) -> _IpcWriter:
        if self._writer is None:
            self._writer = _IpcWriter(self.schema)
        self._writer.write(batch, about)
        return self._writer

    def log(self, message: Message) -> None:
        call = self._call
        batch = empty_batch(self.schema)
        metadata = _log_metadata_bytes(message, server_id=call.connection.server.server_id, request_id=call.request_id)
        with self._lock:
            if self._ended:
                raise RuntimeError(f"{call.plan.name}() has ended; its caller can no longer be sent messages")
            call.sent(batch)
            call.connection.channel.send(self._write(batch, metadata).take())

    def end_encoded(self, data: _IpcMessages) -> None:
        """End with a complete reply, of which the schema message has gone out if there were messages."""
        self._call.sent_encoded(data)
        with self._lock:
            self._ended = True
            if self._writer is not None:
                first, *rest = _ipc_pieces(data)
                data = [first[len(_ipc_schema_message(self.schema)) :], *rest]
        self._call.connection.channel.send(data)

    def end(self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None) -> None:
        call = self._call
        call.sent(batch)
        sent, about = maybe_write_to_shm(batch, metadata, call.connection.shm)
        with self._lock:
            self._ended = True
            writer = self._write(sent, about)
            writer.close()
        if _LOG_WIRE_RESPONSE.isEnabledFor(logging.DEBUG):
            what = "error" if metadata and LOG_LEVEL_KEY in metadata else "result"
            route = "external" if metadata and LOCATION_KEY in metadata else "inline" if sent is batch else "shm"
            _LOG_WIRE_RESPONSE.debug("Write %s batch: %s, route=%s", what, _log_batch(batch), route)
        call.connection.channel.send(writer.take())


_SERVER_SHM_KINDS = (TransportKind.PIPE, TransportKind.UNIX)  # peers on this machine
_SERVER_COALESCE = 32_768  # bytes of answers that may wait for the next one
_SERVER_QUICK = 1e-4  # seconds; an answer that took longer is sent at once
_SERVER_STEADY = 16  # quick runs in a row before answers wait for the next one of a method
_SERVER_SILENT = 0.25  # seconds until who opened a stream is shown that it is one
_SERVER_OBEYED = (SystemExit, KeyboardInterrupt)  # what ends a process; all else that a method raises ends its call


class _ServerStream:
    """One stream call: init, header, turns, end (wire.md section 8)."""

    __slots__ = (
        "_budget",
        "_call",
        "_channel",
        "_collector",
        "_connection",
        "_ended",
        "_lock",
        "_logs",
        "_out",
        "_stores",
        "_stream",
    )

    def __init__(self, call: _ServerCall, budget: float | None) -> None:
        self._call = call
        self._budget = budget
        self._connection = call.connection
        self._channel = call.connection.channel
        self._stores = call.connection.server.external_location is not None
        self._collector: OutputCollector | None = None
        self._logs: list[_IpcMetadata] = []  # of init: they travel in the header stream, else in front of the output
        self._ended = False
        self._lock = threading.Lock()  # of the three above: where a message goes that another thread sends
        self._stream: Stream[Any, Any]
        self._out: _IpcWriter

    def run(self, kwargs: dict[str, Any]) -> None:
        """Serve the whole stream; afterwards the connection is in step."""
        if self.start(kwargs):
            self._turns()

    def start(self, kwargs: dict[str, Any]) -> Stream[Any, Any] | None:
        """Call the method and send the header, if there is one; None when that failed, which has been answered."""
        call = self._call
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_STREAM.debug("Stream init: method=%s", call.plan.name)
        if call.plan.name in call.binding.ctx_methods:
            kwargs["ctx"] = self._connection.context(call, self._log, self._budget)
        try:
            self._stream = _server_check_stream(call.plan, getattr(call.binding.impl, call.plan.name)(**kwargs))
            self._out = _IpcWriter(self._stream.output_schema)
            if self._stream.call_state is not None:
                self._stream.state.bind_call_state(self._stream.call_state)
            header = None if self._stream.header is None else _types_row_batch(self._stream.header)
            pointer = None if header is None else call.externalize(header, [(header, None)])
        except BaseException as exc:
            self._send_whole(EMPTY_SCHEMA, empty_batch(EMPTY_SCHEMA), call.fail(exc))
            self._connection.drain()
            self._connection._obey(exc)
            return None
        if header is not None:
            self._send_whole(header.schema, *(pointer or (header, None)))
        return self._stream

    def answer(
        self,
        stream: Stream[Any, Any],
        turn: tuple[pa.RecordBatch, _IpcMetadata] | None,
        seal: Callable[[Stream[Any, Any]], Mapping[bytes, bytes]],
    ) -> None:
        """At most one turn of a stream whose state travels, as one reply (http.md section 7).

        `seal` packs the state for the caller to bring along next time; a stream that has ended is not packed.
        """
        self._stream = stream
        self._out = _IpcWriter(stream.output_schema)
        failure: BaseException | None = None
        try:
            if turn is None:
                self._last_words()
                self._out.write(empty_batch(stream.output_schema), seal(stream))
            else:
                self._answer_turn(*turn, seal)
        except BaseException as exc:
            failure = exc
            self._fail(exc)
        self._out.close()
        self._channel.send(self._out.take())
        self._connection._obey(failure)

    def _answer_turn(
        self,
        batch: pa.RecordBatch,
        metadata: _IpcMetadata,
        seal: Callable[[Stream[Any, Any]], Mapping[bytes, bytes]],
    ) -> None:
        ctx = self._connection.context(self._call, self._log, self._budget)
        self._write_logs(self._out)
        out = self._process(batch, metadata, ctx)
        sealed = None if out.finished else seal(self._stream)
        if sealed is not None and len(self._stream.input_schema):
            out._merge(sealed)
            sealed = None
        self._last_words()
        self._write(out)
        if sealed is not None:
            self._out.write(empty_batch(self._stream.output_schema), sealed)

    def cancel(self, stream: Stream[Any, Any]) -> None:
        """The caller of a stream whose state travels does not want more."""
        self._stream = stream
        self._out = _IpcWriter(stream.output_schema)
        self._cancel()
        self._out.close()
        self._channel.send(self._out.take())

    def _turns(self) -> None:
        """Answer to the end of both streams. What cannot be answered ends the connection, never the server."""
        channel, failure, ended = self._channel, None, False
        try:
            self._write_logs(self._out)
            if not channel.arrives(
                _SERVER_SILENT
            ):  # who believes in a unary method waits for its reply: not this schema
                channel.send(self._out.take())
            try:
                reader = _IpcReader(channel, self._connection.server.ipc_validation)
                failure = self._loop(reader)
            except IPCError as exc:  # an input that makes no sense, in frames that do
                self._fail(exc)
                ended = True
                self._end()
                _ipc_drain(channel)
                return
            ended = True
            self._end()
            reader.drain()
        except (EOFError, ConnectionError):
            raise  # the caller vanished: the record says ok, the connection ends quietly
        except Exception as exc:  # the caller's bytes, or what cannot be written: _loop has caught the application's
            _LOG_RPC.warning("Ending a connection: %s: %s", type(exc).__name__, exception_str(exc))
            with contextlib.suppress(Exception):
                if not ended:  # else the peer would read the rest as its next answer
                    self._fail(exc)
                    self._end()
            raise _ServerHangUp from exc
        self._connection._obey(failure)

    def _end(self) -> None:
        """Send the rest of the output."""
        self._last_words()
        if self._connection.shm is not None:  # the last input's region is free before the output ends (wire.md 11.4)
            self._connection.shm.sweep()
        self._out.close()
        self._channel.send(self._out.take())

    def _fail(self, exc: BaseException) -> None:
        """The last batch of an output: an error."""
        self._last_words()
        empty = empty_batch(self._stream.output_schema)
        self._out.write(empty, self._call.fail(exc))
        self._call.sent(empty)

    def _loop(self, reader: _IpcReader) -> BaseException | None:
        """Turn by turn until someone ends it; returns what an application raised."""
        call, channel, out = self._call, self._channel, self._out
        ticks = len(self._stream.input_schema) == 0
        plan = call.plan
        ctx = self._connection.context(call, self._log, self._budget)
        while (item := reader.read()) is not None:
            batch, metadata = item
            if metadata is not None:
                if CANCEL_KEY in metadata:
                    self._cancel()
                    return None
                if RPC_METHOD_KEY in metadata:
                    raise RpcError(
                        "ProtocolError",
                        f"a request came where the input of {call.plan.name}() was due: it is a stream method here",
                    )
            if not ticks:
                call.received(batch)
            if self._connection.shm is not None:
                self._connection.shm.sweep()
            began = time.monotonic()
            if self._budget is not None:
                ctx.deadline = began + self._budget  # callers wait for each turn as long as for the first
            try:
                finished = self._turn(batch, metadata, ctx)
            except BaseException as exc:
                self._fail(exc)
                return exc
            if finished:
                return None
            # Answers to ticks sent ahead share a write, unless that would keep one waiting (FINDINGS.md section 4).
            if reader.tick_waits() and out.size <= _SERVER_COALESCE:
                plan.quick = plan.quick + 1 if time.monotonic() - began < _SERVER_QUICK else 0
                if plan.quick >= _SERVER_STEADY:
                    continue
            channel.send(out.take())
        return None

    def _turn(self, batch: pa.RecordBatch, metadata: _IpcMetadata | None, ctx: CallContext) -> bool:
        """One input batch -> what the application emits for it; True when it was the last."""
        out = self._process(batch, metadata, ctx)
        self._write(out)
        return out.finished

    def _process(self, batch: pa.RecordBatch, metadata: _IpcMetadata | None, ctx: CallContext) -> OutputCollector:
        stream, connection = self._stream, self._connection
        if metadata is not None:
            server = connection.server
            batch, metadata = _elsewhere_local(connection.shm, batch, metadata, server.ipc_validation, server.limits)
            batch, metadata = connection.fetched(batch, metadata or {})
            _elsewhere_refuse(self._call.plan.name, batch, metadata)
        producer = len(stream.input_schema) == 0
        limit = connection.response_limit_bytes
        out = self._collector = OutputCollector(
            stream.output_schema,
            server_id=connection.server.server_id,
            producer_mode=producer,
            remaining_response_bytes=limit if producer else None,
            response_limit_bytes=limit,
            preferred_response_bytes=connection.preferred_response_bytes,
            remaining_externalized_response_bytes=self._call.externalized_room() if self._stores else None,
            externalization_enabled=connection.externalization_enabled,
        )
        if batch.schema is not stream.input_schema and not batch.schema.equals(stream.input_schema):
            batch = _server_reconcile(batch, stream.input_schema, connection.server.limits)
        stream.state.process(AnnotatedBatch(batch, _ipc_key_values(metadata)), out, ctx)
        with self._lock:
            self._collector = None
        if not out.finished:
            out.validate()
        if _LOG_WIRE_RESPONSE.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_RESPONSE.debug("Flush collector: batches=%d, route_config=inline", len(out.batches))
        return out

    def _write(self, out: OutputCollector) -> None:
        """What a turn has collected; the whole of it is kept elsewhere, or nothing (wire.md section 12)."""
        if self._logs:
            self._write_logs(self._out)
        if self._stores and out._data is not None:
            pointer = self._call.externalize(
                out._data.batch, [(item.batch, item.custom_metadata) for item in out.batches]
            )
            if pointer is not None:
                self._out.write(*pointer)
                self._call.sent(pointer[0])
                return
        shm = self._connection.shm
        for item in out.batches:
            if shm is None:
                self._out.write(item.batch, item.custom_metadata)
            else:
                self._out.write(*maybe_write_to_shm(item.batch, item.custom_metadata, shm))
            if self._call.observed:
                self._call.sent(item.batch)

    def _log(self, message: Message) -> None:
        """`ctx` outlives a turn, and any thread may use it: a message travels with the turn that runs, or the next."""
        call = self._call
        with self._lock:
            if self._ended:
                raise RuntimeError(f"{call.plan.name}() has ended; its caller can no longer be sent messages")
            if self._collector is not None:
                return self._collector.emit_client_log_message(message)
            server_id = self._connection.server.server_id
            self._logs.append(_log_metadata_bytes(message, server_id=server_id, request_id=call.request_id))

    def _last_words(self) -> None:
        """Write what was said after the last turn; nothing can be said from here on."""
        with self._lock:
            self._ended = True
            self._collector = None
        self._write_logs(self._out)

    def _cancel(self) -> None:
        call = self._call
        call.cancelled = True
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_STREAM.debug("Stream cancel received: method=%s", call.plan.name)
        try:
            self._stream.state.on_cancel(self._connection.context(call, self._log, self._budget))
        except _SERVER_OBEYED:
            raise
        except BaseException:
            _LOG_RPC.debug("on_cancel of %s raised", call.plan.name, exc_info=True)
        self._write_logs(self._out)

    def _write_logs(self, writer: _IpcWriter) -> None:
        with self._lock:
            logs, self._logs = self._logs, []
        for metadata in logs:
            empty = empty_batch(writer.schema)
            writer.write(empty, metadata)
            self._call.sent(empty)

    def _send_whole(
        self,
        schema: pa.Schema,
        batch: pa.RecordBatch,
        metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None,
    ) -> None:
        """A stream of its own: the logs so far, then one batch."""
        writer = _IpcWriter(schema)
        self._write_logs(writer)
        writer.write(batch, metadata)
        self._call.sent(batch)
        writer.close()
        self._channel.send(writer.take())


class _ServerBody(_IpcSource):
    """A whole request in memory, and the reply to it."""

    __slots__ = ("proven", "reply", "silence")

    def __init__(self, data: bytes, limits: IpcLimits) -> None:
        super().__init__(data, limits)
        self.reply: list[_IpcPiece] = []

    def send(self, pieces: _IpcMessages) -> None:
        self.reply += _ipc_pieces(pieces)

    write = send


# Of a request that opens a stream, what is not for its first turn to see: tokens, and how the request itself came.
_SERVER_OWN_KEYS = frozenset(
    (
        *(STATE_KEY, CALL_STATE_KEY, CANCEL_KEY, DEADLINE_KEY),
        *(LOCATION_KEY, LOCATION_SHA256_KEY, LOCATION_FETCH_MS_KEY, LOCATION_SOURCE_KEY),
    )
)


class ServerRequest(_ServerConnection):
    """One request of a peer that sends whole messages instead of a byte stream; HTTP is built on it. Sans I/O.

    Make one for a method, set what the transport knows, and use it for one of `unary`, `init`, `turn` and `cancel`:
    each takes a complete request and returns a complete reply. What is refused before the method runs is raised; what
    the method raises is in the reply and in `error`. Then call `finish`, once the body that goes out is known.

    Attributes:
        info: the method.
        binding: the protocol and its implementation.
        request_id, auth, transport_metadata, response_limit_bytes, preferred_response_bytes: settable.
        max_externalized_response_bytes: what the reply may keep elsewhere; settable.
        externalization_enabled: what methods are told of that; settable.
        make_context: makes the method's `ctx`; CallContext, or a subclass that a transport has extended.
        stream_id: 32 hex digits, the same for all requests of a stream; settable before `turn` and `cancel`.
        error: what the method raised.

    Raises:
        ProtocolNotSupportedError, MethodNotImplementedError: not hosted here.
    """

    __slots__ = ("_call", "_metadata", "_seal", "binding", "error", "info")

    def __init__(
        self,
        server: RpcServer,
        protocol: str,
        method: str,
        kind: TransportKind,
        auth: AuthContext = _CTX_ANONYMOUS,
        transport_metadata: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        server._start(kind, frozenset())
        super().__init__(server, None, kind, auth, transport_metadata)
        self.binding = server._binding(protocol)
        self.info = self.binding.plan(method).info
        self.error: BaseException | None = None
        self._call: _ServerCall | None = None
        self._seal: Callable[[Stream[Any, Any]], Mapping[bytes, bytes]] | None = None
        self._metadata: _IpcMetadata = {}

    def unary(self, body: bytes) -> bytes:
        """Answer a call of a unary method."""
        return self._reply(body, self.serve_one)

    def init(self, body: bytes, seal: Callable[[Stream[Any, Any]], Mapping[bytes, bytes]]) -> bytes:
        """Start a stream: its header and, of a producer, the first turn. `seal` turns its state into metadata."""
        import uuid

        self._seal = seal
        self.stream_id = uuid.uuid4().hex
        return self._reply(body, self.serve_one)

    def read(self, body: bytes) -> tuple[pa.RecordBatch, dict[bytes, bytes]]:
        """Read the input of a turn: the batch and its metadata, where the sealed state is."""
        source = _ServerBody(body, self.server.limits)
        batch, metadata, flaw = _wire_read_request(source, self.server.ipc_validation)
        if flaw:
            raise RpcError("ProtocolError", f"{self.info.name}(): {flaw}")
        return batch, metadata

    def turn(
        self,
        stream: Stream[Any, Any],
        batch: pa.RecordBatch,
        metadata: dict[bytes, bytes],
        seal: Callable[[Stream[Any, Any]], Mapping[bytes, bytes]],
    ) -> bytes:
        """Answer one input batch of a stream whose state the caller has brought along."""

        def answer() -> None:
            budget = _server_budget(metadata.pop(DEADLINE_KEY, None))  # for `ctx`; not what the caller has to say
            call = self._begin(batch, metadata)
            call.start({})
            _ServerStream(call, budget).answer(stream, (batch, metadata), seal)

        return self._reply(b"", answer)

    def cancel(self, stream: Stream[Any, Any], batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> bytes:
        """Tell the application that the caller does not want more; no dispatch hook hears of it (http.md 7.2)."""

        def answer() -> None:
            call = self._begin(batch, metadata)
            call.begin()
            _ServerStream(call, _server_budget(metadata.get(DEADLINE_KEY))).cancel(stream)

        return self._reply(b"", answer)

    def replace(self, exc: Exception) -> bytes:
        """A reply that takes the place of one that may not be sent; the call has failed with `exc`."""
        self.error = exc
        if self._call is not None:
            self._call.error = exc
        return self.server.error_body(exc, self.request_id, self._call_schema())

    def finish(self, notes: Mapping[str, Any]) -> None:
        """Write the access record and tell the hooks; `notes` is what the transport adds to the record.

        A second time it does nothing, so that it may also be called where a request goes wrong.
        """
        if self._call is not None:
            self._call.notes = notes
            self._call.finish()

    def _call_schema(self) -> pa.Schema:
        return EMPTY_SCHEMA if self.info.method_type is MethodType.STREAM else self.info.result_schema

    def _reply(self, body: bytes, answer: Callable[[], None]) -> bytes:
        self.channel = _ServerBody(body, self.server.limits)
        token = _ctx_auth.set(self.auth)
        try:
            answer()
        finally:
            _ctx_auth.reset(token)
        reply = self.channel.reply
        return reply[0] if len(reply) == 1 and type(reply[0]) is bytes else b"".join(reply)

    def _begin(self, batch: pa.RecordBatch, metadata: dict[bytes, bytes]) -> _ServerCall:
        plan = self.binding.plan(self.info.name)
        call = self._call = _ServerCall(self, self.binding, plan, self._input(batch, metadata))
        call.stream_id = self.stream_id
        call.is_turn = True
        return call

    def _serve_learned(self) -> bool:
        # The first turn of a producer sees the metadata of the request, which a layout does not keep.
        return self._seal is None and super()._serve_learned()

    def _answer(self, batch: pa.RecordBatch, metadata: _IpcMetadata, sample: bytes) -> None:
        self._metadata = metadata
        super()._answer(batch, metadata, sample)

    def _answer_builtin(self, name: str) -> None:
        raise self._mismatch(name)

    def _share(self, batch: pa.RecordBatch, metadata: _IpcMetadata) -> tuple[pa.RecordBatch, _IpcMetadata]:
        return batch, metadata

    def _route(self, name: str, metadata: _IpcMetadata) -> ProtocolBinding:
        """The path has named both; the batch may not name others (http.md section 3, step 10)."""
        if name != self.info.name:
            raise self._mismatch(name)
        protocol = _wire_protocol_name(metadata)
        if protocol is not None and protocol != self.binding.name:
            raise self._other_protocol(protocol)
        return self.binding

    def _dispatch(
        self,
        binding: ProtocolBinding,
        plan: _WirePlan,
        kwargs: dict[str, Any],
        budget: float | None,
        request: _ServerInput | None,
    ) -> None:
        self._check_target(binding, plan)
        super()._dispatch(binding, plan, kwargs, budget, request)

    def _unary_plain(self, binding: ProtocolBinding, plan: _WirePlan, kwargs: dict[str, Any]) -> None:
        self._check_target(binding, plan)
        super()._unary_plain(binding, plan, kwargs)

    def _check_target(self, binding: ProtocolBinding, plan: _WirePlan) -> None:
        """A learned layout knows what it calls; the path may have named something else."""
        if plan.name != self.info.name:
            raise self._mismatch(plan.name)
        if binding is not self.binding:
            raise self._other_protocol(binding.name)

    def _stream(self, stream: _ServerStream, kwargs: dict[str, Any]) -> None:
        value, pack = stream.start(kwargs), self._seal
        if value is None or pack is None:
            return
        failed: list[BaseException] = []

        def seal(value: Stream[Any, Any]) -> Mapping[bytes, bytes]:
            try:
                return pack(value)
            except BaseException as exc:
                failed.append(exc)
                raise

        metadata = {key: item for key, item in self._metadata.items() if key not in _SERVER_OWN_KEYS}
        stream.answer(value, None if len(value.input_schema) else (empty_batch(EMPTY_SCHEMA), metadata), seal)
        if failed:  # a stream that cannot go on has not begun: no header either
            self.channel.reply[:] = [self.server.error_body(failed[0], self.request_id)]

    def _mismatch(self, name: str) -> TypeError:
        return TypeError(
            f"Method name mismatch: the path has '{self.info.name}', the batch's 'vgi_rpc.method' has '{name}'"
        )

    def _other_protocol(self, name: str) -> ProtocolNotSupportedError:
        return ProtocolNotSupportedError(
            f"Protocol mismatch: the path has '{self.binding.name}', the batch's 'vgi_rpc.protocol' has '{name}'"
        )

    def _refuse(self, exc: Exception, plan: _WirePlan | None) -> None:
        raise exc

    def _hang_up(self, exc: Exception) -> typing.NoReturn:
        raise exc

    def drain(self) -> None:
        """Nothing follows a whole message."""

    def _finish(self, call: _ServerCall) -> None:
        self._call = call

    def _obey(self, exc: BaseException | None) -> None:
        """What ends a process is answered like any error: the thread serves other callers."""
        if exc is not None:
            self.error = exc
        if isinstance(exc, KeyboardInterrupt):
            raise exc


def _server_result(call: _ServerCall, value: Any) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | _IpcMetadata | None]:
    """The result batch, or the pointer that stands for it."""
    plan = call.plan
    if isinstance(value, ExternalRef):  # whatever the method declares: callers see the result that it stands for
        return value.pointer_batch(plan.info.result_schema)
    batch = _wire_result_batch(plan, value)
    return call.externalize(batch, [(batch, None)]) or (batch, None)


def _server_check_stream(plan: _WirePlan, value: Any) -> Stream[Any, Any]:
    """What a stream method returned must be a Stream, with schemas, and with the header it declares."""
    name = plan.name
    if not isinstance(value, Stream):
        raise TypeError(f"{name}() must return a Stream, got {type(value).__name__}")
    for field in ("output_schema", "input_schema"):
        schema = getattr(value, field)
        if not isinstance(schema, pa.Schema):
            raise TypeError(f"{name}() returned a Stream whose {field} is {type(schema).__name__}, not pa.Schema")
    _methods_settle(value.state)
    declared = plan.info.header_type
    if declared is None:
        if value.header is not None:
            raise TypeError(f"{name}() returned a header, but its annotation declares none: Stream[S, Header]")
    elif not isinstance(value.header, declared):
        raise TypeError(f"{name}() declares a header of type {declared.__name__}, got {type(value.header).__name__}")
    return value


def _server_reconcile(batch: pa.RecordBatch, schema: pa.Schema, limits: IpcLimits) -> pa.RecordBatch:
    """Fit an input batch to the declared schema: reorder, cast, or refuse (wire.md section 8.2)."""
    got = batch.schema
    refusal = f"Input schema mismatch: expected {_log_schema(schema)}, got {_log_schema(got)}"
    if not len(schema):
        refusal += "; the stream is a producer: iterate it (an exchange has Stream(..., input_schema=...))"
    elif not len(got):
        refusal += "; the stream is an exchange: send each batch with exchange()"
    if len(set(got.names)) != len(got) or set(got.names) != set(schema.names):
        raise TypeError(refusal)
    if got.names != schema.names:
        batch = batch.select(schema.names)
    try:
        return _ipc_fit(batch, schema, limits)
    except TypeError as exc:
        raise TypeError(f"{refusal}; {exc}") from exc


_SERVER_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}[!-~]{0,200}\Z")


def _server_traced(known: Mapping[str, Any], metadata: _IpcMetadata) -> Mapping[str, Any]:
    """What hooks learn of a request: the trace context of its batch goes before the transport's (observability.md 2).

    One that is malformed is ignored. Nothing outlives the request: there is no state of the thread in this.
    """
    parent = metadata.get(TRACEPARENT_KEY)
    if parent is None or not _SERVER_TRACEPARENT.match(parent):
        return known
    state = metadata.get(TRACESTATE_KEY, b"")
    return {**known, "traceparent": parent.decode("ascii"), "tracestate": state.decode("latin-1")}


def _server_budget(raw: bytes | None) -> float | None:
    """Seconds the caller is still willing to wait; anything but 16 digits is ignored like an unknown key."""
    if raw is None or len(raw) != 16 or not raw.isdigit():
        return None
    return int(raw) / 1e6


def _server_check_implementation(protocol: type, methods: Mapping[str, RpcMethodInfo], impl: object) -> frozenset[str]:
    """Check that `impl` can serve `protocol`, all problems in one TypeError; returns the methods that take `ctx`."""
    problems: list[str] = []
    ctx_methods = set()
    for name, info in methods.items():
        attribute = getattr(impl, name, None)
        if attribute is None:
            hints = ", ".join(f"{p}: {_methods_hint_name(info.param_types[p])}" for p in info.param_names)
            problems.append(f"missing method {name}({hints})")
        elif not callable(attribute):
            problems.append(f"'{name}' exists but is not callable")
        elif waits := _methods_not_called(attribute):
            problems.append(f"'{name}()' is {waits}")
        else:
            found, wants_ctx = _server_check_signature(protocol, info, attribute)
            problems += found
            if wants_ctx:
                ctx_methods.add(name)
    if problems:
        name = type(impl).__name__
        if isinstance(impl, type):
            name = impl.__name__
            problems.insert(0, f"it is a class; give an instance: {name}()")
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise TypeError(f"{name} does not implement {protocol.__name__}:\n{lines}")
    return frozenset(ctx_methods)


def _server_check_signature(protocol: type, info: RpcMethodInfo, method: Callable[..., Any]) -> tuple[list[str], bool]:
    import inspect

    try:
        parameters = inspect.signature(method).parameters
    except (TypeError, ValueError):  # a C callable without a signature: called as declared
        return [], False
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    usable = {name for name, p in parameters.items() if p.kind in keyword}
    problems = [f"'{info.name}()' missing parameter '{p}'" for p in info.param_names if p not in usable]
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        if required and name != "ctx" and name not in info.param_names:
            problems.append(f"'{info.name}()' has required parameter '{name}' not defined in {protocol.__name__}")
    return problems, "ctx" in usable


def _server_log_failure(call: _ServerCall, exc: BaseException) -> None:
    """One line about a failed method, at the level its code deserves (runtime.md section 1.3)."""
    level, with_traceback = _log_level_of(exc)
    if not _LOG_RPC.isEnabledFor(level):
        return
    code, kind = error_code_of(exc), error_kind_of(exc)
    extra = {
        "server_id": call.connection.server.server_id,
        "method": call.plan.name,
        "error_type": type(exc).__name__,
        "error_code": str(code),
        "request_id": call.request_id,
    }
    if kind:
        extra["error_kind"] = kind
    where = f"{call.binding.name}.{call.plan.name}"
    text = _log_line(exception_str(exc))
    if not with_traceback:
        text = f"{code}{f' ({kind})' if kind else ''} {type(exc).__name__}: {text}"
    _LOG_RPC.log(level, "Error in %s: %s", where, text, exc_info=exc if with_traceback else None, extra=extra)


def access_fields(
    server: RpcServer,
    method: str,
    *,
    protocol: str,
    protocol_hash: str,
    method_type: str,
    auth: AuthContext,
    remote_addr: str,
    began: float,
    request_id: str,
    error: BaseException | None,
) -> dict[str, Any]:
    """What every access record says: who, what, how long, how it ended; never a value (runtime.md section 6).

    `began` is monotonic. For transports that answer calls of their own, and log them on `vgi_rpc.access`.
    """
    found: dict[str, Any] = {
        "server_id": server.server_id,
        "protocol": protocol,
        "protocol_hash": protocol_hash,
        "method": method,
        "method_type": method_type,
        "principal": auth.principal or "",
        "auth_domain": auth.domain or "",
        "authenticated": auth.authenticated,
        "remote_addr": remote_addr,
        "duration_ms": round((time.monotonic() - began) * 1000, 2),
        "status": "ok" if error is None else "error",
        "error_type": "" if error is None else type(error).__name__,
        "request_id": request_id,
    }
    if error is not None:
        found["error_message"] = exception_str(error) or type(error).__name__
        found["error_code"] = str(error_code_of(error))
    if server.server_version:
        found["server_version"] = server.server_version
    if auth.authenticated and auth.claims:
        found["claims"] = apply_claim_redaction(auth.claims)
    return found


def _server_access_record(call: _ServerCall) -> None:
    """Write one record of a dispatched call, with how much of everything there was."""
    connection, plan, stats = call.connection, call.plan, call.stats
    extra = access_fields(
        connection.server,
        plan.name,
        protocol=call.binding.name,
        protocol_hash=call.binding.protocol_hash,
        method_type=plan.info.method_type.value,
        auth=connection.auth,
        remote_addr=str(connection.transport_metadata.get("remote_addr", "")),
        began=call.started,
        request_id=call.request_id,
        error=call.error,
    )
    extra["input_batches"], extra["output_batches"] = stats.input_batches, stats.output_batches
    extra["input_rows"], extra["output_rows"] = stats.input_rows, stats.output_rows
    extra["input_bytes"], extra["output_bytes"] = stats.input_bytes, stats.output_bytes
    if call.request is not None and not call.is_turn:
        extra["request_fields"] = [{"name": field.name, "type": str(field.type)} for field in call.request.schema]
        extra["request_rows"] = call.request.rows if len(call.request.schema) else 0
    if call.cancelled:
        extra["cancelled"] = True
    if call.stream_id:
        extra["stream_id"] = call.stream_id
    if call.externalized_bytes:
        extra["externalized_bytes"] = call.externalized_bytes
    extra.update(call.notes)
    _LOG_ACCESS.info("%s.%s %s", call.binding.name, plan.name, extra["status"], extra=extra)


# ==== 13. CLIENT ======================================================================================================
# Uses: 1, 2, 3, 4, 5, 7, 8, 9, 10, 11. The typed proxy (runtime.md section 4).
#
#   proxy.add(1.0, b=2.0)
#     _ClientMethod.__call__   binds the arguments by the Protocol's signature
#     _client_unary            enter the channel, write the request, read the reply to its end, leave
#     _wire_value              the Python value, or the error the far side raised
#
# Every conversation has the form  check; try: enter ... leave; except BaseException: raise channel.fail(exc).
# Errors of the far side are raised after `leave`: they do not cost the connection. Things that act on a connection
# are functions that take the proxy, because the proxy is typed as the user's Protocol.
#
# A RequestTransport (HTTP) holds no conversation: each request has one complete body as its answer. Binding, encoding
# and reading are the same; what differs is that threads do not queue, and how a stream goes on (http.md section 7).


class _ClientOptions(_NamedTuple):
    on_log: Callable[[Message], None] | None = None
    validation: IpcValidation = IpcValidation.FULL
    timeout: float | None = None
    read_ahead: int = 0
    call_hook: CallHook | None = None
    metadata: Mapping[bytes, bytes] = types.MappingProxyType({})  # of one call: what its hook sends along
    store: BatchStore | None = None


class RequestTransport:
    """A transport that answers each request with one complete body and holds no conversation, such as HTTP.

    Proxies over it behave like all others. Threads may use it at the same time. What its methods raise is of the
    RpcError family, with `.sent` saying whether the request reached the far side.
    """

    limits = IpcLimits()
    shm = None
    wanted = ()  # by other threads: they need not wait

    def request(
        self,
        protocol: str,
        method: str,
        pieces: Sequence[_IpcPiece],
        *,
        timeout: float | None,
        doing: str,
        metadata: Mapping[bytes, bytes],
    ) -> bytes:
        """Send a unary request, the joined `pieces`, and return the body of its answer.

        Args:
            timeout: seconds for all of it; None: as long as the far side is alive.
            doing: what an error text calls it.
            metadata: what a CallHook sends along, which is not in `pieces`.
        """
        raise NotImplementedError

    def open_stream(self, call: StreamCall) -> StreamSession:
        """Begin a stream."""
        raise NotImplementedError

    def ping(self, timeout: float | None) -> None:
        """Make one round trip to the far side."""
        raise NotImplementedError

    def close(self) -> None:
        """End it, and the requests that are under way; idempotent."""
        raise NotImplementedError

    def proxy_attribute(self, proxy: RpcProxy, name: str) -> Any:
        """Return what `proxy.<name>` is when the Protocol has no such method; AttributeError: nothing."""
        raise AttributeError(name)


class _ClientLink:
    """The connection behind a proxy; `reopen` replaces it when it is lost before anything was sent."""

    __slots__ = ("_submitter", "channel", "limits", "reopen", "transport")

    def __init__(
        self, transport: Any, reopen: Callable[[], Any] | None = None, limits: IpcLimits | None = None
    ) -> None:
        self.reopen = reopen
        self.limits = limits
        self._submitter: _ClientSubmitter | None = None
        self._use(transport)

    def _use(self, transport: Any) -> None:
        self.transport = transport
        self.channel: Any = transport if isinstance(transport, RequestTransport) else _transport_channel(transport)
        if self.limits is not None:
            self.channel.limits = self.limits
        channel = self.channel
        if isinstance(channel, Channel) and channel.inp >= 0 and getattr(transport, "channel", None) is channel:
            _transport_callers.add(channel)

    def end(self, reason: str) -> None:
        """Leave the connection to others; who still holds a proxy over this link is refused."""
        self.channel = Channel(-1, -1, lambda: None)
        self.channel.broken = reason

    def extra(self) -> dict[bytes, bytes]:
        """Metadata that goes with every request: the shared memory, if there is any (wire.md section 11.3)."""
        shm = self.channel.shm
        if shm is None:
            return {}
        return {SHM_SEGMENT_NAME_KEY: shm.name.encode(), SHM_SEGMENT_SIZE_KEY: str(shm.size).encode()}

    def submit(self, job: _ClientJob) -> Any:
        """Hand a call to the connection's thread; returns its Future."""
        import concurrent.futures

        job.future = concurrent.futures.Future()
        if job.observed is not None:
            job.future.add_done_callback(job.settled)
        if self._submitter is None or self._submitter.pid != _transport_pid:  # threads do not live on in a fork
            self._submitter = _ClientSubmitter(self)
        self._submitter.add(job)
        return job.future

    def reconnect(self, lost: Channel) -> None:
        """Replace a lost connection; of several threads the first does it."""
        assert self.reopen is not None
        with lost.lock:
            if self.channel is not lost or not lost.gone():
                return
            self.transport.close()
            try:
                self._use(self.reopen())
            except OSError as exc:
                raise ConnectionLostError(f"could not connect again: {exc}", sent="no") from exc


class RpcProxy:
    """Calls a Protocol's methods over a transport; what `connect` and the like return, typed as the Protocol.

    A shared proxy is safe: calls from several threads queue. A missing, unknown or ill-typed argument raises
    RpcArgumentError before anything is sent; whatever goes wrong later is an RpcError (API.md section 2.3).
    """

    def __init__(
        self,
        protocol: type,
        transport: RpcTransport | RequestTransport,
        on_log: Callable[[Message], None] | None = None,
        *,
        ipc_validation: IpcValidation = IpcValidation.FULL,
        external_location: BatchStore | None = None,
    ) -> None:
        options = _ClientOptions(on_log, ipc_validation, store=external_location)
        self._bind(protocol, _ClientLink(transport), options)

    def _bind(self, protocol: type, link: _ClientLink, options: _ClientOptions) -> None:
        self._methods = rpc_methods(protocol)
        self._protocol = protocol
        self._protocol_name = _methods_protocol_name(protocol)
        self._protocol_version = _methods_protocol_version(protocol)
        self._link = link
        self._options = options

    @property
    def _transport(self) -> Any:
        return self._link.transport

    def __getattr__(self, name: str) -> Any:
        methods = self.__dict__.get("_methods", {})
        info = methods.get(name)
        if info is None:
            if methods and isinstance(self._link.channel, RequestTransport):
                with contextlib.suppress(AttributeError):
                    return self._link.channel.proxy_attribute(self, name)
            raise AttributeError(
                f"{self.__dict__.get('_protocol_name', type(self).__name__)} has no RPC method '{name}'."
                f" Available: {', '.join(sorted(methods)) or '(none)'}"
            )
        plan = _client_plan(self._protocol, info, self._protocol_name, self._protocol_version)
        method = (_ClientMethod if self._options.call_hook is None else _ClientObservedMethod)(self, plan)
        self.__dict__[name] = method
        return method

    def __dir__(self) -> list[str]:
        return sorted([*super().__dir__(), *self._methods])

    def __repr__(self) -> str:
        return f"<RpcProxy of {self._protocol_name} over {type(self._link.transport).__name__}>"


_RpcProxy = RpcProxy  # the reference's spelling, imported by programs written for it


class _ClientMethod:
    # No docstring: an instance shows the method's own.
    def __init__(self, proxy: RpcProxy, plan: _WirePlan) -> None:
        self.__name__ = plan.name
        self.__doc__ = plan.info.doc
        self._link = proxy._link
        self._options = proxy._options
        self._plan = plan
        self._budget = _wire_budget(proxy._options.timeout)
        self._extra = proxy._link.extra()
        template = plan.template(self._budget, self._extra)
        self._encode = template.encode if template is not None and plan.plain else None
        self._call = _client_caller(proxy._link, plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        request = self._request(args, kwargs)
        link = self._link
        if link.reopen is None:
            return self._call(link.channel, self._plan, request, self._options)
        return _client_retry(link, self._call, self._plan, request, self._options)

    def _observe(self) -> _ClientObservation | None:
        """Tell the hook that a call begins."""
        return None

    def _request(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], observed: _ClientObservation | None = None
    ) -> _IpcMessages:
        """Most arguments are in order and need no conversion; what else may be with them, `_wire_bind` finds out."""
        values = _wire_bind(self._plan, args, kwargs) if kwargs else args
        if self._encode is not None and not _LOG_WIRE_REQUEST.isEnabledFor(logging.DEBUG):
            request = self._encode(values, self._budget)
            if request is not None:
                return request
        if not kwargs:
            values = _wire_bind(self._plan, args, kwargs)
        return _wire_request(self._plan, values, self._options.timeout, self._extra)

    def __repr__(self) -> str:
        return f"<RPC method {self._plan.protocol}.{self._plan.name}>"


class _ClientObservation:
    """One call of which a CallHook is told; it ends once, at the latest when nobody holds it any more."""

    __slots__ = ("_hook", "_info", "_token", "metadata")

    def __init__(self, hook: CallHook, info: RpcMethodInfo) -> None:
        self._hook: CallHook | None = None
        self._info = info
        self.metadata: dict[bytes, bytes] = {}
        try:
            self._token = hook.on_call_start(info, self.metadata)
            self._hook = hook
            self.metadata = dict(encode_metadata(self.metadata))
        except Exception:
            self.metadata.clear()
            _LOG_RPC.debug("a call hook failed at start", exc_info=True)

    def end(self, error: BaseException | None) -> None:
        hook, self._hook = self._hook, None
        if hook is None:
            return
        try:
            hook.on_call_end(self._token, self._info, error)
        except Exception:
            _LOG_RPC.debug("a call hook failed at end", exc_info=True)

    def __del__(self) -> None:
        self.end(None)


class _ClientObservedMethod(_ClientMethod):
    # A class of its own, so that calls without a hook do not even look for one.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observed = self._observe()
        options = self._options._replace(metadata=observed.metadata)
        link = self._link
        try:
            request = self._request(args, kwargs, observed)
            if link.reopen is None:
                value = self._call(link.channel, self._plan, request, options)
            else:
                value = _client_retry(link, self._call, self._plan, request, options)
        except BaseException as exc:
            observed.end(exc)
            raise
        if self._plan.is_stream:
            return _ClientObservedStream(value, observed)
        observed.end(None)
        return value

    def _observe(self) -> _ClientObservation:
        assert self._options.call_hook is not None
        return _ClientObservation(self._options.call_hook, self._plan.info)

    def _request(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], observed: _ClientObservation | None = None
    ) -> _IpcMessages:
        extra = None if observed is None else observed.metadata
        if not extra or isinstance(self._link.channel, RequestTransport):  # which is given the metadata itself
            return super()._request(args, kwargs)
        extra = {**self._extra, **extra}
        return _wire_request(self._plan, _wire_bind(self._plan, args, kwargs), self._options.timeout, extra)


# Plans are shared by all proxies of a Protocol: what was compiled or learned once is learned.
_CLIENT_PLANS: weakref.WeakKeyDictionary[type, dict[str, _WirePlan]] = weakref.WeakKeyDictionary()


def _client_plan(protocol: type, info: RpcMethodInfo, name: str, version: str | None) -> _WirePlan:
    plans = _CLIENT_PLANS.setdefault(protocol, {})
    plan = plans.get(info.name)
    if plan is None:
        plan = plans[info.name] = _WirePlan(info, name, version)
    return plan


def _client_unary(
    channel: Channel,
    plan: _WirePlan,
    request: _IpcMessages,
    options: _ClientOptions,
    value: Callable[[_WirePlan, _WireReply], Any] = _wire_value,
) -> Any:
    """One call: one write, and reading to the end of the reply."""
    channel.check()
    try:
        channel.enter(plan.doing, options.timeout)
        if type(request) is bytes:
            channel.write(request)
        else:
            channel.send(request)
        row = _wire_read_learned(plan, channel)
        reply = None if row is not None else _client_reply(channel, plan, options)
        channel.leave()
    except BaseException as exc:
        raise channel.fail(exc)  # noqa: B904 (fail sets the cause)
    if _LOG_WIRE_RESPONSE.isEnabledFor(logging.DEBUG):
        _LOG_WIRE_RESPONSE.debug("Read unary response: method=%s, result_type=%s", plan.name, plan.info.result_type)
    if reply is None:
        return _wire_row_value(plan, row or (), channel.limits)
    return value(plan, _client_fetched(reply, options))


def _client_reply(channel: Channel, plan: _WirePlan, options: _ClientOptions) -> _WireReply:
    """Read a reply that looks like no other, to its end; one that makes no sense is an error of this call only."""
    try:
        reply = _wire_read_reply(plan, channel, options.validation, options.on_log)
    except IPCError as exc:
        _ipc_drain(channel, _CLIENT_MAX_DRAIN)
        return _WireReply(None, None, _client_error(exc, plan.doing))
    return _client_local(channel, plan, reply, options)


def _client_error(exc: Exception, doing: str) -> RpcError:
    """What is wrong with an answer that has arrived; no connection is lost over one in whole messages."""
    if not isinstance(exc, IPCError):
        return _errors_translate(exc, doing, "answered")
    error = RpcError("IPCError", f"{doing}: the answer cannot be read: {exception_str(exc)}")
    error.__cause__ = exc
    return error


def _client_local(channel: Channel, plan: _WirePlan, reply: _WireReply, options: _ClientOptions) -> _WireReply:
    """A reply whose batch is in shared memory, read while it is still our turn. A bad pointer does not cost it."""
    if reply.batch is None or channel.shm is None:
        return reply
    try:
        found = _elsewhere_local(channel.shm, reply.batch, reply.metadata, options.validation, channel.limits)
    except Exception as exc:
        error = RpcError(type(exc).__name__, f"{plan.name}() result: {exception_str(exc)}", sent="answered")
        error.__cause__ = exc
        return _WireReply(None, None, reply.error or error)
    return _WireReply(*found, reply.error, reply.limits)


def _client_post(
    transport: RequestTransport,
    plan: _WirePlan,
    request: _IpcMessages,
    options: _ClientOptions,
    value: Callable[[_WirePlan, _WireReply], Any] = _wire_value,
) -> Any:
    """One call over a transport without conversations."""
    pieces = _ipc_pieces(request)
    body = transport.request(
        plan.protocol, plan.name, pieces, timeout=options.timeout, doing=plan.doing, metadata=options.metadata
    )
    source = _IpcSource(body, transport.limits)
    try:
        row = _wire_read_learned(plan, source)
        reply = None if row is not None else _wire_read_reply(plan, source, options.validation, options.on_log)
    except Exception as exc:
        raise _client_error(exc, plan.doing)  # noqa: B904 (it sets the cause)
    if reply is None:
        return _wire_row_value(plan, row or (), transport.limits)
    return value(plan, _client_fetched(reply, options))


def _client_fetched(reply: _WireReply, options: _ClientOptions) -> _WireReply:
    """A reply with its batch, wherever that is kept; to be called when the connection is in step."""
    if reply.batch is None or reply.metadata is None or reply.error is not None or options.store is None:
        return reply
    logs = _ElsewhereLogs(options.on_log)
    batch, metadata = _client_fetch((reply.batch, reply.metadata), options, logs, reply.limits)
    return _WireReply(batch, metadata, logs.failure, reply.limits)


def _client_fetch(
    item: tuple[pa.RecordBatch, _IpcMetadata | None],
    options: _ClientOptions,
    logs: _ElsewhereLogs,
    limits: IpcLimits,
) -> tuple[pa.RecordBatch, _IpcMetadata | None]:
    """The batch that a pointer stands for, if it is one and there is a store; `on_log` may fail into `logs`."""
    batch, metadata = item
    if options.store is None or not metadata or not is_external_location_batch(batch, metadata):
        return item
    return _elsewhere_load(options.store, batch, metadata, logs, options.validation, limits, options.timeout)


def _client_caller(link: _ClientLink, plan: _WirePlan) -> Callable[..., Any]:
    """What makes calls of a method over this link."""
    if plan.is_stream:
        return _client_open
    return _client_post if isinstance(link.channel, RequestTransport) else _client_unary


def _client_retry(
    link: _ClientLink,
    call: Callable[[Channel, _WirePlan, _IpcMessages, _ClientOptions], _T],
    plan: _WirePlan,
    request: _IpcMessages,
    options: _ClientOptions,
) -> _T:
    """`connect(..., reconnect=True)`: one new connection, and only for what was never sent."""
    channel = link.channel
    if channel.pid == os.getpid() and channel.gone():
        link.reconnect(channel)
        channel = link.channel
    try:
        return call(channel, plan, request, options)
    except ConnectionLostError as exc:
        if exc.sent != "no" or channel.broken is None:  # it was sent, or it is another connection's error
            raise
    link.reconnect(channel)
    return call(link.channel, plan, request, options)


_CLIENT_WITH = "nothing is open yet; write: with connect(...) as proxy: proxy.{}(...)"


class _ClientDoor(contextlib.AbstractContextManager[_T]):
    """What `connect` and the like return: a context manager that says so when it is taken for the proxy."""

    def __init__(self, manager: contextlib.AbstractContextManager[_T]) -> None:
        self._manager = manager

    def __enter__(self) -> _T:
        return self._manager.__enter__()

    def __exit__(self, *exc: Any) -> bool | None:
        return self._manager.__exit__(*exc)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            raise AttributeError(_CLIENT_WITH.format(name))


def _client_door(opens: Callable[_Q, Iterator[_T]]) -> Callable[_Q, contextlib.AbstractContextManager[_T]]:
    manager = contextlib.contextmanager(opens)

    @functools.wraps(opens)
    def door(*args: _Q.args, **kwargs: _Q.kwargs) -> contextlib.AbstractContextManager[_T]:
        return _ClientDoor(manager(*args, **kwargs))

    return door


class RpcConnection(Generic[_P]):
    """A context manager over any transport: entering gives the typed proxy, leaving closes the transport."""

    def __init__(
        self,
        protocol: TypeForm[_P],
        transport: RpcTransport | RequestTransport,
        on_log: Callable[[Message], None] | None = None,
        *,
        ipc_validation: IpcValidation = IpcValidation.FULL,
        timeout: float | None = None,
        limits: IpcLimits | None = None,
        external_location: BatchStore | None = None,
    ) -> None:
        options = _ClientOptions(on_log, ipc_validation, _client_check_timeout(timeout), store=external_location)
        self._proxy = _client_proxy(cast(type, protocol), _ClientLink(transport, None, limits), options)

    def __enter__(self) -> _P:
        if _LOG_WIRE_TRANSPORT.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_TRANSPORT.debug("RpcConnection open: protocol=%s", self._proxy._protocol_name)
        return cast(_P, self._proxy)

    def __exit__(self, *exc: object) -> None:
        if _LOG_WIRE_TRANSPORT.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_TRANSPORT.debug("RpcConnection close: protocol=%s", self._proxy._protocol_name)
        self._proxy._link.transport.close()

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            raise AttributeError(_CLIENT_WITH.format(name))


def _client_proxy(protocol: type, link: _ClientLink, options: _ClientOptions) -> RpcProxy:
    proxy = RpcProxy.__new__(RpcProxy)
    proxy._bind(protocol, link, options)
    return proxy


_CLIENT_WINDOW = 64  # ticks that fit any connection's buffers unread (FINDINGS.md section 4)


def _client_check_timeout(timeout: float | None) -> float | None:
    """Refuse what is not a time to wait; once, where it is given."""
    if timeout is not None and not (isinstance(timeout, (int, float)) and 0 < timeout < 1e9):
        raise ValueError(f"timeout must be a positive number of seconds or None, got {timeout!r}")
    return timeout


_UNSET: Any = object()


def with_options(
    proxy: _T,
    *,
    timeout: float | None = _UNSET,
    on_log: Callable[[Message], None] | None = _UNSET,
    read_ahead: int = _UNSET,
    call_hook: CallHook | None = _UNSET,
) -> _T:
    """Return a proxy on the same connection with other defaults; what is not given stays as it is.

    Args:
        timeout: seconds for a whole call, and for each turn of a stream; None waits for ever. Expiry raises
            DeadlineExceededError and closes the connection, because the late answer would be taken for the next one.
        on_log: receives the Messages that methods send while they run.
        read_ahead: batches that a producer may make before they are asked for, 0 to 63. Hides the latency of a turn;
            but leaving a stream early waits for those batches, and what making them does has been done.
        call_hook: is told of every call, and may send metadata along.

    >>> with serve_pipe(Calc, CalcImpl()) as calc:
    ...     with_options(calc, timeout=5.0).add(1.0, 2.0)
    3.0
    """
    old = _client_expect_proxy(proxy)
    options = old._options
    if timeout is not _UNSET:
        options = options._replace(timeout=_client_check_timeout(timeout))
    if on_log is not _UNSET:
        options = options._replace(on_log=on_log)
    if read_ahead is not _UNSET:
        if not 0 <= read_ahead < _CLIENT_WINDOW:
            raise ValueError(f"read_ahead must be within 0..{_CLIENT_WINDOW - 1}, got {read_ahead}")
        options = options._replace(read_ahead=read_ahead)
    if call_hook is not _UNSET:
        options = options._replace(call_hook=call_hook)
    return cast(_T, _client_proxy(old._protocol, old._link, options))


def with_transport(proxy: _T, derive: Callable[[RequestTransport], RequestTransport]) -> _T:
    """Return a proxy with the same options over what `derive` makes of its RequestTransport; TypeError: it has none."""
    old = _client_expect_proxy(proxy)
    if not isinstance(old._link.channel, RequestTransport):
        raise TypeError("this proxy's connection is a byte stream, not a RequestTransport such as HTTP")
    link = _ClientLink(derive(old._link.channel), None, old._link.limits)
    return cast(_T, _client_proxy(old._protocol, link, old._options))


def ping(proxy: object, *, timeout: float | None = None) -> float:
    """Return the seconds of one round trip. Every server answers it, whatever it hosts (wire.md section 10).

    >>> with serve_pipe(Calc, CalcImpl()) as calc:
    ...     0.0 < ping(calc, timeout=5.0) < 5.0
    True
    """
    link, options = _client_target(proxy)
    timeout = _client_check_timeout(timeout) if timeout is not None else options.timeout
    began = time.monotonic()
    if isinstance(link.channel, RequestTransport):
        link.channel.ping(timeout)
    else:
        _client_transport_options(link.channel, "ping", timeout)
    return time.monotonic() - began


def _client_transport_options(channel: Channel, doing: str, timeout: float | None) -> _IpcMetadata:
    """Ask the far side what its transport can do (wire.md section 10); nothing when it answers with an error."""
    channel.check()
    try:
        channel.enter(doing, timeout)
        found = _client_ask(channel)
        channel.leave()
    except BaseException as exc:
        raise channel.fail(exc)  # noqa: B904
    return found


def _client_ask(channel: Channel) -> _IpcMetadata:
    """The same within a conversation."""
    about = _wire_request_metadata(TRANSPORT_OPTIONS_METHOD_NAME, None, None)
    writer = _IpcWriter(EMPTY_SCHEMA)
    writer.write(empty_batch(EMPTY_SCHEMA), {**about, **worker_transport_metadata()})
    writer.close()
    item = None
    channel.send(writer.take())
    try:
        reader = _IpcReader(channel, IpcValidation.FULL)
        item = reader.read()
        reader.drain()  # an error is an answer too
    except IPCError:
        _ipc_drain(channel, _CLIENT_MAX_DRAIN)
    return {} if item is None or item[1] is None else item[1]


def _client_share(channel: Channel, size: int | None, timeout: float | None) -> None:
    """Make a segment for a connection whose far side says that it can use one; it goes when the connection goes."""
    if size is None or channel.owns_shm is not None:
        return
    if size <= HEADER_SIZE:
        raise ValueError(f"shm_size must be larger than the header of {HEADER_SIZE} bytes, got {size}")
    channel.owns_shm = False
    if (
        not shm_available()
        or _client_transport_options(channel, "the handshake", timeout).get(TRANSPORT_SHM_KEY) != b"true"
    ):
        _LOG_SHM.debug("no shared memory with this peer; batches are sent inline")
        return
    channel.shm = ShmSegment.create(size)
    channel.owns_shm = True


def list_protocols(target: object) -> list[HostedProtocol]:
    """List what a server hosts, application protocols first; `target` is a proxy or a transport.

    Raises ReflectionNotSupportedError when the server does not describe itself (wire.md section 9).

    >>> with connect(Calc, [sys.executable, "worker.py", "--describe"]) as calc:
    ...     [hosted.name for hosted in list_protocols(calc)]
    ['Calc', 'vgi_rpc.Reflection.v1']
    """
    return _describe_hosted(_client_reflect(target, "list_protocols"))


def describe_protocol(target: object, name: str) -> ServiceDescription:
    """Describe one hosted protocol; an unknown name is an RpcError of kind `protocol_not_supported`.

    >>> with connect(Calc, [sys.executable, "worker.py", "--describe"]) as calc:
    ...     describe_protocol(calc, "Calc").methods["add"].params_schema.names
    ['a', 'b']
    """
    hosted = _client_reflect(target, "list_protocols")
    return _describe_view(_client_reflect(target, "describe", name), hosted)


def introspect(
    transport: RpcTransport | RequestTransport,
    ipc_validation: IpcValidation = IpcValidation.FULL,
    protocol: str | None = None,
    *,
    external_location: BatchStore | None = None,
) -> ServiceDescription:
    """Describe the primary protocol of a server, or the named one; ValueError when it hosts none.

    >>> with contextlib.closing(SubprocessTransport([sys.executable, "worker.py", "--describe"])) as transport:
    ...     introspect(transport).protocol_name
    'Calc'
    """
    options = _ClientOptions(None, ipc_validation, store=external_location)
    hosted = _client_reflect(transport, "list_protocols", options=options)
    if protocol is None:
        names = [p.name for p in _describe_hosted(hosted) if not p.name.startswith(RESERVED_PROTOCOL_PREFIX)]
        if not names:
            raise ValueError("the server hosts no application protocol")
        protocol = names[0]
    return _describe_view(_client_reflect(transport, "describe", protocol, options=options), hosted)


def _client_reflect(target: object, method: str, *args: Any, options: _ClientOptions | None = None) -> Any:
    link, found = _client_target(target)
    reflection = _describe_wire().Reflection
    plan = _client_plan(reflection, rpc_methods(reflection)[method], REFLECTION_PROTOCOL_NAME, None)
    try:
        options = options or found
        request = _wire_request(plan, list(args), options.timeout)
        return _client_caller(link, plan)(link.channel, plan, request, options)
    except ReflectionNotSupportedError:
        raise
    except RpcError as exc:
        if method == "list_protocols" and exc.error_kind in _CLIENT_NOT_HOSTED:
            raise ReflectionNotSupportedError.from_rpc_error(exc) from exc
        raise


_CLIENT_NOT_HOSTED = ("protocol_not_supported", "method_not_implemented")


def _client_target(target: object) -> tuple[_ClientLink, _ClientOptions]:
    if isinstance(target, RpcProxy):
        return target._link, target._options
    try:
        return _ClientLink(target), _ClientOptions()
    except TypeError:
        raise TypeError(f"expected a proxy or a transport, got {type(target).__name__}") from None


def _client_expect_proxy(proxy: object) -> RpcProxy:
    if not isinstance(proxy, RpcProxy):
        raise TypeError(f"expected a proxy, got {type(proxy).__name__}")
    return proxy


def _client_call_described(
    target: object, protocol: str, version: str, method: MethodDescription, values: list[Any], options: _ClientOptions
) -> pa.RecordBatch | StreamSession:
    """Call a method of which only the description is known; values and batches as pyarrow has them."""
    info = RpcMethodInfo(
        name=method.name,
        params_schema=method.params_schema,
        result_schema=method.result_schema,
        result_type=None,
        method_type=method.method_type,
        has_return=method.has_return,
        doc=None,
        is_exchange=method.is_exchange,
        protocol_name=protocol,
    )
    plan = _WirePlan(info, protocol, version or None, raw=True)
    link, _ = _client_target(target)
    request = _wire_request(plan, values, options.timeout)
    if plan.is_stream:
        return _client_open(link.channel, plan, request, options, header=method.has_header)
    call = _client_caller(link, plan)
    return cast(pa.RecordBatch, call(link.channel, plan, request, options, _wire_reply_batch))


# ---- several calls at once (API.md section 12.5)


def map_calls(
    method: Callable[..., _T], kwargs_iterable: Iterable[Mapping[str, Any]], *, depth: int = 32
) -> Iterator[_T]:
    """Call a unary method once for each set of arguments, and yield the results in order.

    Up to `depth` requests (1 to 64, and 32 KiB of them) are on their way before the first is answered; that hides
    the latency of small calls. The connection is held until the iterator has ended or is closed, which waits for
    what has been sent. An error is raised where its result would have been, and ends the iteration.

    >>> with serve_pipe(Calc, CalcImpl()) as calc:
    ...     sum(map_calls(calc.add, ({"a": 1.0, "b": float(k)} for k in range(100))))
    5050.0
    """
    call = _client_expect_method(method)
    if not 1 <= depth <= _CLIENT_WINDOW:
        raise ValueError(f"depth must be within 1..{_CLIENT_WINDOW}, got {depth}")
    jobs = (_ClientJob(call, (), kwargs) for kwargs in kwargs_iterable)
    if isinstance(call._link.channel, RequestTransport):
        return _client_map_requests(call._link, depth, jobs)
    return _client_map(_ClientPipeline(call._link, depth), jobs)


def submit(method: Callable[_Q, _T], /, *args: _Q.args, **kwargs: _Q.kwargs) -> concurrent.futures.Future[_T]:
    """Start a unary call and return its Future; several of them share the connection's latency.

    Calls are sent in the order of submission by a thread of the connection, which ends when it has had nothing to do
    for a second. A wrong argument raises here; everything else is in the Future.

    >>> with serve_pipe(Calc, CalcImpl()) as calc:
    ...     futures = [submit(calc.add, 1.0, float(k)) for k in range(3)]
    ...     [future.result(timeout=5.0) for future in futures]
    [1.0, 2.0, 3.0]
    """
    call = _client_expect_method(method)
    job = _ClientJob(call, args, kwargs)
    job.pieces()
    return cast("concurrent.futures.Future[_T]", call._link.submit(job))


def _client_expect_method(method: object) -> _ClientMethod:
    if not isinstance(method, _ClientMethod):
        raise TypeError(f"expected a method of a proxy, such as proxy.add, got {type(method).__name__}")
    if method._plan.is_stream:
        raise TypeError(f"{method._plan.name}() is a stream; only unary calls can be sent ahead")
    return method


class _ClientJob:
    """One call of a pipeline."""

    __slots__ = ("args", "call", "future", "kwargs", "observed", "request", "size")

    def __init__(self, call: _ClientMethod, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.call = call
        self.args = args
        self.kwargs = kwargs
        self.request: _IpcMessages | None = None
        self.observed: _ClientObservation | None = None
        self.size = 0
        self.future: Any = None

    @property
    def options(self) -> _ClientOptions:
        """Those of the method, with what the hook sends along."""
        options = self.call._options
        return options if self.observed is None else options._replace(metadata=self.observed.metadata)

    def pieces(self) -> list[_IpcPiece]:
        """What to send; RpcArgumentError."""
        if self.request is None:
            self.observed = self.call._observe()
            try:
                self.request = self.call._request(self.args, self.kwargs, self.observed)
            except BaseException as exc:
                self.end(exc)
                raise
        pieces = _ipc_pieces(self.request)
        self.size = sum(map(len, pieces))
        return pieces

    def end(self, error: BaseException | None) -> None:
        """Tell the hook, if there is one."""
        if self.observed is not None:
            self.observed.end(error)

    def settled(self, future: concurrent.futures.Future[Any]) -> None:
        """The same for what a Future holds."""
        self.end(None if future.cancelled() else future.exception())


class _ClientPipeline:
    """Unary calls whose requests are sent before earlier replies have been read.

    What is in flight fits the buffers of any connection, so that writing never blocks: no deadlock, whatever the size
    of the replies (FINDINGS.md section 4). The channel is held while a reply is outstanding, and only then.
    """

    __slots__ = ("_depth", "_link", "_next", "_token", "waiting")

    def __init__(self, link: _ClientLink, depth: int) -> None:
        self._link = link
        self._depth = depth if link.channel.shm is None else 1  # the two sides must take turns
        self._token = object()
        self._next: _ClientJob | None = None  # taken, and did not fit
        self.waiting: collections.deque[_ClientJob] = collections.deque()

    def take(self, jobs: Iterator[_ClientJob], new: list[_ClientJob]) -> None:
        """Append the jobs that fit into the window to `new`, once half of it is used up: blocks share a write."""
        if len(self.waiting) > self._depth // 2:
            return
        if self._link.channel.wanted:
            if self.waiting:  # send no more, so that it becomes free
                return
            self._link.channel.give_way()
        size = sum(job.size for job in self.waiting)
        while len(self.waiting) + len(new) < self._depth:
            job, self._next = self._next or next(jobs, None), None
            if job is None:
                break
            job.pieces()
            if size and size + job.size > _CLIENT_IN_FLIGHT:
                self._next = job
                break
            size += job.size
            new.append(job)

    def turn(self, new: list[_ClientJob]) -> Callable[[], Any]:
        """Send these requests and read the reply of the oldest call; returns what gives its value or raises its error.

        Whatever is raised here is the connection's. If that is not broken, nothing of `new` has been sent.
        """
        link = self._link
        if not self.waiting and link.reopen is not None and link.channel.gone():
            link.reconnect(link.channel)
        channel = link.channel
        oldest = (self.waiting or new)[0]
        plan, options = oldest.call._plan, oldest.call._options
        channel.check(self._token)
        try:
            channel.enter(plan.doing, options.timeout, self._token)
            channel.begin_stream(self._token)
            self.waiting += new
            if new:
                channel.send([piece for job in new for piece in job.pieces()])
            row = _wire_read_learned(plan, channel)
            reply = None if row is not None else _client_reply(channel, plan, options)
            self.waiting.popleft()
            if not self.waiting:
                channel.end_stream()
            channel.leave()
        except BaseException as exc:
            raise channel.fail(exc)  # noqa: B904 (fail sets the cause)
        if reply is None:
            return lambda: _wire_row_value(plan, row or (), channel.limits)
        return lambda: _wire_value(plan, _client_fetched(reply, options))

    def drain(self) -> None:
        """Read the replies that nobody wants, so that the connection can be used again."""
        channel = self._link.channel
        if channel._owned() and (self.waiting or channel.stream is self._token):  # struck before `fail` could say so
            channel.fail(KeyboardInterrupt())
        while self.waiting and self._link.channel.broken is None:
            self.turn([])

    def abandon(self) -> None:
        """Give up the connection if it is still held for replies."""
        self._link.channel.abandon(self._token, "map_calls() was interrupted")


_CLIENT_IN_FLIGHT = 32_768  # bytes of requests; half of a pipe, and the kernel counts small packets at twice their size


def _client_map(pipeline: _ClientPipeline, jobs: Iterator[_ClientJob]) -> Iterator[Any]:
    try:
        yield from _client_replies(pipeline, jobs)
    except BaseException:
        pipeline.abandon()
        raise


def _client_replies(pipeline: _ClientPipeline, jobs: Iterator[_ClientJob]) -> Iterator[Any]:
    failure: Exception | None = None  # of making a request: raised where its result would have been
    try:
        while True:
            new: list[_ClientJob] = []
            if failure is None:
                try:
                    pipeline.take(jobs, new)
                except Exception as exc:
                    failure = exc
            if not new and not pipeline.waiting:
                break
            oldest = (pipeline.waiting or new)[0]
            try:
                value = pipeline.turn(new)()
            except BaseException as exc:
                oldest.end(exc)
                raise
            oldest.end(None)
            yield value
    finally:
        pipeline.drain()
    if failure is not None:
        raise failure


def _client_map_requests(link: _ClientLink, depth: int, jobs: Iterator[_ClientJob]) -> Iterator[Any]:
    futures: collections.deque[Any] = collections.deque()
    failure: Exception | None = None  # of making a request: raised where its result would have been
    try:
        for job in jobs:
            try:
                job.pieces()
            except Exception as exc:
                failure = exc
                break
            futures.append(link.submit(job))
            if len(futures) == depth:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
    if failure is not None:
        raise failure


class _ClientRequests(_ClientPipeline):
    """Calls over a transport without conversations: one at a time in each thread."""

    __slots__ = ()

    def __init__(self, link: _ClientLink) -> None:
        super().__init__(link, 1)

    def turn(self, new: list[_ClientJob]) -> Callable[[], Any]:
        job, pieces = new[0], new[0].pieces()
        return lambda: _client_post(self._link.channel, job.call._plan, pieces, job.options)


class _ClientSubmitter:
    """The threads behind `submit`: one for a connection, some for a transport without conversations."""

    def __init__(self, link: _ClientLink) -> None:
        self.pid = _transport_pid
        self._link = link
        self._jobs: collections.deque[_ClientJob] = collections.deque()
        self._wake = threading.Condition()
        self._most = _CLIENT_THREADS if isinstance(link.channel, RequestTransport) else 1
        self._threads = self._idle = 0

    def add(self, job: _ClientJob) -> None:
        with self._wake:
            self._jobs.append(job)
            self._wake.notify()
            start = self._threads < self._most and self._idle < len(self._jobs)
            self._threads += start
        if not start:
            return
        try:
            threading.Thread(target=self._run, name="vgi-rpc-submit", daemon=True).start()
        except RuntimeError as exc:  # no more threads, or the interpreter shuts down
            with self._wake:
                self._threads -= 1
                left = [] if self._threads else list(self._jobs)
                if left:
                    self._jobs.clear()
            for each in left:
                each.future.set_exception(RpcError("RuntimeError", f"no thread for submit(): {exc}", sent="no"))

    def _run(self) -> None:
        requests = isinstance(self._link.channel, RequestTransport)
        pipeline = _ClientRequests(self._link) if requests else _ClientPipeline(self._link, _CLIENT_WINDOW // 2)
        while True:
            new: list[_ClientJob] = []
            pipeline.take(self._startable(), new)
            if new or pipeline.waiting:
                self._turn(pipeline, new)
                continue
            with self._wake:
                self._idle += 1
                if not self._jobs:
                    self._wake.wait(_CLIENT_SUBMIT_IDLE)
                self._idle -= 1
                if not self._jobs:
                    self._threads -= 1
                    return

    def _startable(self) -> Iterator[_ClientJob]:
        while self._jobs:
            try:
                job = self._jobs.popleft()
            except IndexError:  # another thread took it
                return
            if job.future.set_running_or_notify_cancel():
                yield job

    def _turn(self, pipeline: _ClientPipeline, new: list[_ClientJob]) -> None:
        oldest = (pipeline.waiting or new)[0]
        channel = self._link.channel
        try:
            value = pipeline.turn(new)
        except BaseException as exc:  # on_log's SystemExit too: somebody waits for each of these
            broken = channel.broken is not None
            for job in {*new, *pipeline.waiting} if broken else new:
                own = job is oldest or isinstance(exc, Exception)
                job.future.set_exception(exc if own else channel.lost())
            if broken:
                pipeline.waiting.clear()
            return
        try:
            result = value()
        except BaseException as exc:
            oldest.future.set_exception(exc)
        else:
            oldest.future.set_result(result)


_CLIENT_SUBMIT_IDLE = 1.0  # seconds
_CLIENT_THREADS = 8


# ---- streams


class StreamSession(abc.ABC):
    """A stream as its caller sees it (API.md section 2.5): iterate or tick a producer, exchange with an exchange.

    Over a byte stream the connection belongs to the session until it ends; close it, or use it in a `with` block. A
    server error ends the session and leaves the connection usable. Producers also speak the Arrow PyCapsule
    interface, so `polars.DataFrame(session)` and a DuckDB query over it work; they can be scanned once.
    """

    def __init__(self) -> None:
        self.header: object | None = None
        self._exported = False

    @abc.abstractmethod
    def tick(
        self, custom_metadata: pa.KeyValueMetadata | None = None, *, timeout: float | None = _UNSET
    ) -> AnnotatedBatch:
        """Ask a producer for its next batch; StopIteration at its end. `timeout` in seconds for this turn.

        With `read_ahead` further ticks are on their way already, so this one's metadata would come too late:
        RpcArgumentError.
        """

    @abc.abstractmethod
    def exchange(self, input: AnnotatedBatch, *, timeout: float | None = _UNSET) -> AnnotatedBatch:
        """Send one batch and return the one that answers it. All inputs of a session have one schema."""

    @abc.abstractmethod
    def __iter__(self) -> Iterator[AnnotatedBatch]:
        """Yield a producer's batches to its end."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the input and read what the server still sends, so that the connection can be used again. Idempotent.

        An error of a stream that was never read is raised here; the connection is in step nevertheless.
        """

    @abc.abstractmethod
    def cancel(self) -> None:
        """Tell the server to stop (its `on_cancel` runs) and read to the end; never raises for a lost connection."""

    @property
    @abc.abstractmethod
    def schema(self) -> pa.Schema:
        """The producer's output schema; reads, and keeps for later, the first batch."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self.close()

    def typed_header(self, header_type: type[_T]) -> _T:
        """Return the header, checked to be a `header_type`; TypeError otherwise."""
        if self.header is None:
            raise TypeError(f"Stream has no header (expected {header_type.__name__})")
        if not isinstance(self.header, header_type):
            raise TypeError(f"Header type mismatch: expected {header_type.__name__}, got {type(self.header).__name__}")
        return self.header

    def to_reader(self) -> pa.RecordBatchReader:
        """Return the rest of a producer as a reader; a session can be exported once."""
        schema = self.schema
        if self._exported:
            raise RpcError("ProtocolError", "this stream has been consumed; call the method again", sent="no")
        self._exported = True
        return pa.RecordBatchReader.from_batches(schema, (item.batch for item in self))

    def read_all(self) -> pa.Table:
        """Return the rest of a producer as a table."""
        return self.to_reader().read_all()

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.to_reader().__arrow_c_stream__(requested_schema)

    def __arrow_c_schema__(self) -> object:
        return self.schema.__arrow_c_schema__()


class _ClientStream(StreamSession):
    """A stream over a byte stream, turn by turn; it holds the connection."""

    def __init__(self, channel: Channel, plan: _WirePlan, options: _ClientOptions) -> None:
        super().__init__()
        self._channel = channel
        self._plan = plan
        self._options = options
        self._token = object()  # what the channel remembers, so that it does not keep a dropped session alive
        self._logs = _ElsewhereLogs(options.on_log)
        self._writer: _IpcWriter | None = None
        self._reader: _IpcReader | None = None
        self._first: AnnotatedBatch | None = None  # read ahead by `schema`
        self._ahead = 0  # ticks that have been sent and not been answered
        self._doubtful = False  # what has come may not be a stream's output
        self._failed = False  # an error has come, and nothing after it is looked at
        self._closed = True  # no turns: not yet open, or no more
        self._shut = False  # by the caller
        self._untold = False  # the caller has not seen that the stream has ended

    def tick(
        self, custom_metadata: pa.KeyValueMetadata | None = None, *, timeout: float | None = _UNSET
    ) -> AnnotatedBatch:
        if self._first is not None and not self._shut:
            if custom_metadata is not None:
                raise RpcArgumentError(
                    f"{self._plan.name}(): `schema` has read a batch already; take it without metadata"
                )
            first, self._first = self._first, None
            return first
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_STREAM.debug("Stream tick: method=%s", self._plan.name)
        item = self._turn("stream tick", None, custom_metadata, timeout)
        if item is None:
            raise StopIteration
        return item

    def exchange(self, input: AnnotatedBatch, *, timeout: float | None = _UNSET) -> AnnotatedBatch:
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_STREAM.debug("Stream exchange: sending input: method=%s", self._plan.name)
        if not isinstance(input, AnnotatedBatch) or not isinstance(input.batch, pa.RecordBatch):
            got = type(input.batch if isinstance(input, AnnotatedBatch) else input).__name__
            raise RpcArgumentError(
                f"{self._plan.name}(): exchange() takes AnnotatedBatch(a pa.RecordBatch), got {got};"
                " from columns: AnnotatedBatch.from_pydict({...}, schema)"
            )
        item = self._turn("stream exchange", input.batch, input.custom_metadata, timeout)
        if item is None:
            raise RpcError("ProtocolError", f"{self._plan.name}(): the server ended the stream without an answer")
        return item

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        while self._shut or not self._closed or self._first is not None:
            try:
                yield self.tick()
            except StopIteration:
                return

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self._shut = True
        self._end("stream close", raise_unseen=kind is None)

    def close(self) -> None:
        self._shut = True
        self._end("stream close", raise_unseen=True)

    def cancel(self) -> None:
        self._shut = True
        with contextlib.suppress(ConnectionLostError):
            self._end("stream cancel", cancel=True)

    @property
    def schema(self) -> pa.Schema:
        if self._plan.info.is_exchange:
            raise RpcError("ProtocolError", f"{self._plan.name}() is an exchange: its output needs an input", sent="no")
        if self._reader is None or self._shut:
            try:
                self._first = self.tick()
            except StopIteration:
                self._untold = True
        assert self._reader is not None
        return self._reader.schema

    def __del__(self) -> None:
        if getattr(self, "_closed", True) or self._channel.broken is not None or self._channel.pid != os.getpid():
            return
        warnings.warn(f"stream of {self._plan.name}() was not closed", ResourceWarning, source=self, stacklevel=2)
        self._options = self._options._replace(timeout=5.0)
        try:
            self._end("stream close")
        except Exception:  # collected while this thread was waiting for that very stream, or the peer is silent
            self._channel.abandon(self._token, f"stream of {self._plan.name}() was not closed")

    # -- below here: turns

    def _turn(
        self,
        doing: str,
        batch: pa.RecordBatch | None,
        metadata: pa.KeyValueMetadata | None,
        timeout: float | None,
    ) -> AnnotatedBatch | None:
        """Write one batch, or None for a tick, and read until one answers. None: the stream has ended."""
        if timeout is not _UNSET:
            _client_check_timeout(timeout)
        if self._closed:
            if self._untold and not self._shut:
                self._untold = False
                return None
            raise RpcError("ProtocolError", "Stream has been closed or cancelled", sent="no")
        channel = self._channel
        channel.check(self._token)
        try:
            channel.enter(doing, self._options.timeout if timeout is _UNSET else timeout, self._token)
            pieces = self._pieces(batch, metadata)
            if pieces:
                channel.send(pieces)
            item = self._read()
            reply = None
            if isinstance(item, tuple) and item[1]:
                reply = _client_local(channel, self._plan, _WireReply(*item, None, channel.limits), self._options)
            if item is None or isinstance(item, RpcError) or self._logs.failure is not None:
                self._finish()
            elif self._doubtful:
                self._finish()
                self._untold = True
                self._prove()
            channel.leave()
        except BaseException as exc:
            try:
                raise channel.fail(exc)
            finally:
                if not isinstance(
                    exc, RpcError | IPCError
                ):  # an answer may be lost: the stream must not go on behind it
                    channel.abandon(self._token, f"{doing} did not end")
                self._closed = self._closed or channel.broken is not None
        if self._logs.failure is not None:
            raise self._logs.failure
        if isinstance(item, RpcError):
            raise item
        if item is None:
            return None
        if reply is None:
            return AnnotatedBatch(item[0])
        if reply.batch is None:
            raise cast(Exception, reply.error)
        found = self._fetched((reply.batch, reply.metadata))
        _elsewhere_refuse(self._plan.name, *found)
        shared = reply.batch is not item[0]
        return AnnotatedBatch(found[0], _ipc_key_values(found[1]), _shared=shared)

    def _fetched(self, item: tuple[pa.RecordBatch, _IpcMetadata | None]) -> tuple[pa.RecordBatch, _IpcMetadata | None]:
        """The batch behind a pointer; the connection is in step, and the stream goes on after a failure."""
        item = _client_fetch(item, self._options, self._logs, self._channel.limits)
        if self._logs.failure is not None:
            self._end("stream close")
        return item

    def _pieces(self, batch: pa.RecordBatch | None, metadata: pa.KeyValueMetadata | None) -> list[_IpcPiece]:
        """What a turn writes. A refusal leaves the conversation before anything has been sent."""
        try:
            if self._closed:  # by another thread, since `_turn` looked
                raise RpcArgumentError("Stream has been closed or cancelled")
            if batch is None and metadata is None:
                return self._ticks()
            if self._ahead:
                raise RpcArgumentError(f"{self._plan.name}(): a tick cannot carry metadata when others are ahead of it")
            if batch is None:
                batch = empty_batch(EMPTY_SCHEMA)
            return self._write(batch, metadata)
        except RpcArgumentError:
            self._channel.leave()
            raise

    def _ticks(self) -> list[_IpcPiece]:
        """One tick, or as many as fill the window when half of it is used up."""
        window = 1 if self._channel.shm is not None else self._options.read_ahead + 1
        if self._ahead > window // 2:
            self._ahead -= 1
            return []
        writer = self._writer
        if writer is None:
            writer = self._writer = _IpcWriter(EMPTY_SCHEMA)
        writer.write_ticks(window - self._ahead)
        self._ahead = window - 1
        return writer.take()

    def _write(self, batch: pa.RecordBatch, metadata: pa.KeyValueMetadata | None) -> list[_IpcPiece]:
        writer = self._writer
        if writer is None:
            writer = self._writer = _IpcWriter(batch.schema)
        elif batch.schema is not writer.schema and not batch.schema.equals(writer.schema):
            raise RpcArgumentError(
                f"{self._plan.name}(): all inputs of a stream have one schema: it began with"
                f" {_log_schema(writer.schema)}, now {_log_schema(batch.schema)}"
            )
        about = _client_metadata(self._plan, batch, metadata)
        _client_write_input(self._plan, writer, *maybe_write_to_shm(batch, about, self._channel.shm))
        return writer.take()

    def _read(self) -> tuple[pa.RecordBatch, _IpcMetadata | None] | RpcError | None:
        item: tuple[pa.RecordBatch, _IpcMetadata | None] | RpcError | None
        try:
            if self._reader is not None:
                item = _wire_read_data(self._reader, self._logs)
            else:
                self._reader = _IpcReader(self._channel, self._options.validation)
                item = _wire_read_data(self._reader, self._logs)
                if isinstance(item, tuple) and (item[0].num_rows == 1 or not item[0].num_columns):
                    self._doubtful = self.header is None and self._channel.buf.startswith(_EOS, self._channel.pos)
        except IPCError as exc:  # a whole message that makes no sense: this stream's error, not the connection's
            item = _client_error(exc, f"stream of '{self._plan.name}'")
        self._failed = isinstance(item, RpcError)
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            shown = _log_batch(item[0]) if isinstance(item, tuple) else item
            _LOG_WIRE_STREAM.debug("Stream read output: %s", shown)
        return item

    def _finish(self, cancel: bool = False) -> RpcError | None:
        """Within a conversation: end the input, read the output to its end. Returns an error that came last."""
        channel, writer = self._channel, self._writer
        if writer is None:
            writer = self._writer = _IpcWriter(EMPTY_SCHEMA)
        if cancel:
            writer.write(empty_batch(writer.schema), {CANCEL_KEY: b"1"})
        writer.close()
        channel.send(writer.take())
        error = None
        for _ in range(_CLIENT_MAX_DRAIN):
            if self._failed or (self._reader is not None and self._reader.ended):
                break
            item = self._read()
            if isinstance(item, RpcError):
                error = item
            elif item is not None and channel.shm is not None and item[1]:
                with contextlib.suppress(IPCError):
                    channel.shm.note(_shm_number(item[1].get(SHM_OFFSET_KEY, b"")))
        else:
            raise EOFError(f"gave up after {_CLIENT_MAX_DRAIN} batches that nobody wanted")
        if self._failed:
            _ipc_drain(channel, _CLIENT_MAX_DRAIN)
        self._closed = True
        channel.end_stream()
        return error

    def _prove(self) -> None:
        """Law 10: a row, and the end right behind it, may be a unary answer or a header. Ask whether all is in step."""
        self._doubtful = False
        try:
            about = _client_ask(self._channel)
        except EOFError:
            about = {}
        if TRANSPORT_SHM_KEY not in about:
            assert self._reader is not None
            raise _client_other_kind(self._plan, f"one row of {_log_schema(self._reader.schema)}, and its end")

    def _end(self, doing: str, *, cancel: bool = False, raise_unseen: bool = False) -> None:
        if self._closed:
            return
        if _LOG_WIRE_STREAM.isEnabledFor(logging.DEBUG):
            _LOG_WIRE_STREAM.debug("%s: method=%s", doing.capitalize(), self._plan.name)
        channel = self._channel
        unread = self._reader is None
        channel.check(self._token)
        try:
            channel.enter(doing, self._options.timeout, self._token)
            error = self._finish(cancel)
            if self._doubtful:
                self._prove()
            channel.leave()
        except BaseException as exc:
            self._closed = True
            try:
                raise channel.fail(exc)
            finally:
                channel.abandon(self._token, f"{doing} did not end")  # nor was it in a conversation
        if error is not None and unread and raise_unseen:
            raise error
        if self._logs.failure is not None:
            raise self._logs.failure


class _ClientObservedStream(StreamSession):
    """A session whose end a CallHook is told of; what else the transport's own session can do, it does."""

    def __init__(self, session: StreamSession, observed: _ClientObservation) -> None:
        super().__init__()
        self.header = session.header
        self._session = session
        self._observed = observed

    def tick(
        self, custom_metadata: pa.KeyValueMetadata | None = None, *, timeout: float | None = _UNSET
    ) -> AnnotatedBatch:
        given = {} if timeout is _UNSET else {"timeout": timeout}
        return self._step(lambda: self._session.tick(custom_metadata, **given))

    def exchange(self, input: AnnotatedBatch, *, timeout: float | None = _UNSET) -> AnnotatedBatch:
        given = {} if timeout is _UNSET else {"timeout": timeout}
        return self._step(lambda: self._session.exchange(input, **given))

    def __iter__(self) -> Iterator[AnnotatedBatch]:
        items = iter(self._session)
        while True:
            try:
                item = self._step(items.__next__)
            except StopIteration:
                return
            yield item

    def close(self) -> None:
        self._step(self._session.close)
        self._observed.end(None)

    def __exit__(self, kind: object, exc: object, traceback: object) -> None:
        self._step(lambda: self._session.__exit__(kind, exc, traceback))
        self._observed.end(None)

    def cancel(self) -> None:
        self._step(self._session.cancel)
        self._observed.end(None)

    @property
    def schema(self) -> pa.Schema:
        return self._step(lambda: self._session.schema)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_session"], name)

    def _step(self, step: Callable[[], _T]) -> _T:
        try:
            return step()
        except StopIteration:
            self._observed.end(None)
            raise
        except (RpcArgumentError, ValueError):  # nothing was sent, and the stream goes on
            raise
        except BaseException as exc:
            self._observed.end(exc)
            raise


_CLIENT_MAX_DRAIN = 10_000  # data batches that close() reads and drops (runtime.md section 4.2)


def _client_write_input(
    plan: _WirePlan,
    writer: _IpcWriter,
    batch: pa.RecordBatch,
    metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None,
) -> None:
    try:
        writer.write(_ipc_without_rows(batch), metadata)
    except (pa.ArrowException, ValueError, TypeError) as exc:
        raise RpcArgumentError(f"{plan.name}(): the input batch cannot be written: {exc}") from exc


def _client_metadata(
    plan: _WirePlan, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None
) -> pa.KeyValueMetadata | None:
    """What a caller says about an input, as it travels; one that he has stored himself keeps its pointer."""
    if not metadata:
        return None
    pointer = {}
    try:
        if is_external_location_batch(batch, metadata):
            pointer = {key: metadata[key] for key in (LOCATION_KEY, LOCATION_SHA256_KEY) if key in metadata}
            metadata = {key: value for key, value in metadata.items() if key not in pointer}
        return merge_metadata(encode_metadata(metadata), pointer)
    except (TypeError, ValueError, AttributeError) as exc:
        raise RpcArgumentError(f"{plan.name}(): {exc}") from exc


def _client_open(
    channel: Channel | RequestTransport,
    plan: _WirePlan,
    request: _IpcMessages,
    options: _ClientOptions,
    *,
    header: bool | None = None,
) -> StreamSession:
    """Write the request of a stream; over a byte stream the session holds the connection from here on."""
    expects_header = plan.info.header_type is not None if header is None else header
    if isinstance(channel, RequestTransport):
        return channel.open_stream(StreamCall(plan, _ipc_pieces(request), options, channel.limits, expects_header))
    channel.check()
    session = _ClientStream(channel, plan, options)
    item: Any = None
    try:
        channel.enter(plan.doing, options.timeout)
        channel.send(request)
        channel.begin_stream(session._token)
        session._closed = False
        if expects_header:
            item = _client_read_header(session)
        channel.leave()
    except BaseException as exc:
        session._closed = True
        try:
            raise channel.fail(exc)
        finally:
            channel.abandon(session._token, f"{plan.doing} did not end")
    if expects_header:
        _client_take_header(session, item)
    return session


def _client_read_header(session: _ClientStream) -> Any:
    """Read the header stream. When the init failed there is no output stream, but the input still has to follow."""
    channel = session._channel
    try:
        reader = _IpcReader(channel, session._options.validation)
        names = reader.schema.names
        declared = session._plan.info.header_type
        if (
            names
            and declared is not None
            and declared.ARROW_SCHEMA.names
            and not {*names} & {*declared.ARROW_SCHEMA.names}
        ):
            raise _client_other_kind(session._plan, _log_schema(reader.schema))
        if not channel.arrives(
            _CLIENT_HEADER_WAIT
        ):  # a header comes as a whole; the output of a stream waits for ticks
            raise _client_other_kind(session._plan, f"{_log_schema(reader.schema)} without a row")
        item = _wire_read_data(reader, session._logs)
        if isinstance(item, tuple) and _wire_read_data(reader, session._logs) is not None:
            raise _client_other_kind(session._plan, f"more than one row of {_log_schema(reader.schema)}")
        reader.drain()
    except IPCError as exc:  # the output follows as after any header
        _ipc_drain(channel, _CLIENT_MAX_DRAIN)
        return _client_error(exc, session._plan.doing)
    if not isinstance(item, tuple):
        writer = _IpcWriter(EMPTY_SCHEMA)
        writer.close()
        channel.send(writer.take())
        session._closed = True
        channel.end_stream()
    return item


_CLIENT_HEADER_WAIT = 2.0  # seconds after its first bytes


def _client_other_kind(plan: _WirePlan, got: str) -> RpcError:
    """Law 10: what has come is not an answer to this call, and what comes next cannot be known."""
    header = plan.info.header_type
    kind = "a stream" if header is None else f"a stream with a header {header.__name__}"
    return RpcError(
        "ProtocolError",
        f"{plan.name}() is declared as {kind}, and was answered with {got}; the server has another version of it."
        " The connection is closed",
        sent="answered",
    )


def _client_take_header(session: _ClientStream, item: Any) -> None:
    try:
        if session._logs.failure is not None:
            raise session._logs.failure
        session.header = _client_header(session._plan, item, session._options, session._logs, session._channel.limits)
    except Exception:
        session._end("stream close")
        raise


def _client_header(
    plan: _WirePlan,
    item: tuple[pa.RecordBatch, _IpcMetadata | None] | RpcError | None,
    options: _ClientOptions,
    logs: _ElsewhereLogs,
    limits: IpcLimits,
) -> object:
    """What a header stream has brought, as the type that the Protocol declares; a batch when that is unknown."""
    if isinstance(item, RpcError):
        raise item
    if item is None:
        raise RpcError("ProtocolError", f"{plan.name}() stream header ended without a batch")
    item = _client_fetch(item, options, logs, limits)
    if logs.failure is not None:
        raise logs.failure
    _elsewhere_refuse(plan.name, *item)
    header_type = plan.info.header_type
    try:
        return item[0] if header_type is None else header_type.deserialize_from_batch(item[0])
    except Exception as exc:
        raise RpcError(type(exc).__name__, f"{plan.name}() header: {exception_str(exc)}") from exc


class StreamReply(_NamedTuple):
    """A body that answers one turn of a stream; `error` came after the batches: the far side's, or on_log's own."""

    schema: pa.Schema
    batches: list[tuple[pa.RecordBatch, dict[bytes, bytes] | None]]  # with their metadata
    error: Exception | None
    header: object | None = None


class StreamCall:
    """One stream call as a RequestTransport sees it: what to send, and how to read what comes back.

    Attributes:
        info: the method; `protocol` is the one it belongs to.
        request: the pieces of the request's body; none for a stream that is resumed.
        timeout: seconds for each turn, or None.
        doing: what error texts call its beginning.
        metadata: what a CallHook sends along with every request of the stream.
    """

    __slots__ = (
        "_has_header",
        "_limits",
        "_options",
        "_plan",
        "doing",
        "info",
        "metadata",
        "protocol",
        "request",
        "timeout",
    )

    def __init__(
        self,
        plan: _WirePlan,
        request: Sequence[_IpcPiece],
        options: _ClientOptions,
        limits: IpcLimits,
        has_header: bool,
    ) -> None:
        self.info = plan.info
        self.protocol = plan.protocol
        self.request = request
        self.timeout = options.timeout
        self.doing = plan.doing
        self.metadata = options.metadata
        self._plan = plan
        self._options = options
        self._limits = limits
        self._has_header = has_header

    @classmethod
    def resumed(cls, proxy: object, method: str) -> StreamCall:
        """Return the call of a stream that began elsewhere; AttributeError when there is no such method."""
        target = _client_expect_proxy(proxy)
        plan = getattr(target, method)._plan
        if not plan.is_stream:
            raise TypeError(f"{plan.protocol}.{method}() is not a stream")
        return cls(plan, (), target._options, target._link.channel.limits, False)

    @staticmethod
    def check_timeout(timeout: float | None) -> float | None:
        """Return the timeout that a caller gives for one turn; ValueError for what is not a time to wait."""
        return _client_check_timeout(timeout)

    def write(self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | None) -> list[_IpcPiece]:
        """Return the pieces of a complete IPC stream of one batch; RpcArgumentError for one that cannot be written."""
        writer = _IpcWriter(batch.schema)
        _client_write_input(self._plan, writer, batch, metadata)
        writer.close()
        return writer.take()

    def encoded(
        self, batch: pa.RecordBatch, metadata: Mapping[bytes, bytes] | pa.KeyValueMetadata | None
    ) -> dict[bytes, bytes]:
        """Return what the caller says about an input as it travels; RpcArgumentError for what is not his to say."""
        return dict(_client_metadata(self._plan, batch, metadata) or {})

    def read_opening(self, body: bytes) -> StreamReply:
        """Read the answer to the request: the header stream, if the method has one, and the first turn.

        Raises what the far side raised before the stream began.
        """
        return self._read(body, self._has_header)

    def read_turn(self, body: bytes) -> StreamReply:
        """Read the answer to a later turn."""
        return self._read(body, False)

    def _read(self, body: bytes, header: bool) -> StreamReply:
        source, logs = _IpcSource(body, self._limits), _ElsewhereLogs(self._options.on_log)
        try:
            found = self._read_header(source, logs) if header else None
            return self._read_stream(source, logs)._replace(header=found)
        except Exception as exc:
            if exc is logs.failure:
                raise
            raise _client_error(exc, self.doing)  # noqa: B904

    def _read_header(self, source: _IpcSource, logs: _ElsewhereLogs) -> object:
        reader = _IpcReader(source, self._options.validation)
        item = _wire_read_data(reader, logs)
        reader.drain()
        if logs.failure is not None:
            raise logs.failure
        return _client_header(self._plan, item, self._options, logs, source.limits)

    def _read_stream(self, source: _IpcSource, logs: _ElsewhereLogs) -> StreamReply:
        reader = _IpcReader(source, self._options.validation)
        batches = []
        while isinstance(item := _wire_read_data(reader, logs), tuple):
            if item[1]:
                item = _client_fetch(item, self._options, logs, source.limits)
                _elsewhere_refuse(self._plan.name, *item)
            batches.append(item)
        reader.drain()
        return StreamReply(reader.schema, batches, logs.failure or item)


# ==== 14. POOL ========================================================================================================
# Uses: 2, 3, 4, 10, 13. Idle workers kept warm (runtime.md section 9). A worker is idle or lent to exactly one block.
# It comes back only if its connection is in step: alive, not poisoned, no stream left open. Everything else is
# discarded, so that a borrower never meets what the previous one left behind.


class PoolMetrics(_NamedTuple):
    """Counters since the pool was made, and two gauges."""

    borrows: int
    spawns: int
    reuses: int
    returns: int
    discards: int
    evictions_idle: int
    evictions_max: int
    idle: int
    active: int


class _PoolWorker(_NamedTuple):
    key: tuple[str, ...]
    transport: SubprocessTransport
    since: float  # monotonic; when it became idle


class WorkerPool:
    """Keeps idle subprocess workers, by command, and lends them out; the most recently used first.

    Args:
        max_idle: idle workers kept in all; a further one evicts the one that has been idle longest. 0 keeps none.
        idle_timeout: seconds after which an idle worker is ended.
        stderr, stderr_logger: where the workers' stderr goes, as in `connect`.
        shm_size: bytes of shared memory for each worker, as in `connect`; it is kept with the worker, because memory
            that has been used before is ten times as fast (FINDINGS.md section 5).

    Borrowing never waits: there is no limit on active workers. Safe to share between threads.

    >>> with WorkerPool() as pool, pool.connect(Calc, [sys.executable, "worker.py"]) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """

    def __init__(
        self,
        max_idle: int = 4,
        idle_timeout: float = 60.0,
        stderr: StderrMode = StderrMode.INHERIT,
        stderr_logger: logging.Logger | None = None,
        shm_size: int | None = None,
    ) -> None:
        if max_idle < 0:
            raise ValueError(f"max_idle must be non-negative, got {max_idle}")
        if idle_timeout <= 0:
            raise ValueError(f"idle_timeout must be positive, got {idle_timeout}")
        import atexit

        self._max_idle = max_idle
        self._idle_timeout = idle_timeout
        self._stderr = stderr
        self._stderr_logger = stderr_logger
        self._shm_size = shm_size
        self._lock = threading.Lock()
        self._idle: list[_PoolWorker] = []  # oldest first
        self._counts: collections.Counter[str] = collections.Counter()
        self._active = 0
        self._closed = threading.Event()
        self._pid = os.getpid()
        self._reaper: threading.Thread | None = None
        atexit.register(self.close)

    @_client_door
    def connect(
        self,
        protocol: TypeForm[_P],
        cmd: Sequence[str],
        *,
        on_log: Callable[[Message], None] | None = None,
        ipc_validation: IpcValidation = IpcValidation.FULL,
        timeout: float | None = None,
        external_location: BatchStore | None = None,
    ) -> Iterator[_P]:
        """Borrow a worker, or start one; it is given back when the block ends. RuntimeError once the pool is closed."""
        options = _ClientOptions(on_log, ipc_validation, _client_check_timeout(timeout), store=external_location)
        key = tuple(_transport_command(cmd))
        transport = self._borrow(key)
        link = _ClientLink(transport)
        try:
            _client_share(transport.channel, self._shm_size, timeout)
            yield cast(_P, _client_proxy(cast(type, protocol), link, options))
        finally:
            link.end("the block that borrowed this worker has ended")
            self._give_back(key, transport)

    @property
    def idle_count(self) -> int:
        """Workers waiting to be borrowed."""
        return len(self._idle)

    @property
    def active_count(self) -> int:
        """Workers lent out."""
        return self._active

    @property
    def metrics(self) -> PoolMetrics:
        """A consistent snapshot."""
        with self._lock:
            counts = {name: self._counts[name] for name in PoolMetrics._fields[:-2]}
            return PoolMetrics(**counts, idle=len(self._idle), active=self._active)

    def close(self) -> None:
        """End the idle workers. Borrowed ones go on and are ended when they come back. Idempotent."""
        import atexit

        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed.set()
            idle, self._idle = self._idle, []
            self._counts["discards"] += len(idle)
            active, reaper = self._active, self._reaper
        atexit.unregister(self.close)
        if active:
            _LOG_POOL.warning("closing a pool with %d worker(s) lent out", active)
        for worker in idle:
            worker.transport.close()
        if reaper is not None:
            reaper.join(5.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _borrow(self, key: tuple[str, ...]) -> SubprocessTransport:
        if self._pid != os.getpid():
            raise WrongProcessError(f"this pool was made in process {self._pid}; make another one here")
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("WorkerPool is closed")
            self._counts["borrows"] += 1
            self._active += 1
            found, dead = self._take_idle(key)
            self._counts["discards"] += len(dead)
            self._counts["reuses" if found else "spawns"] += 1
        for worker in dead:
            worker.close()  # reaps it, which gives the exit code
            _LOG_POOL.warning("idle worker died: pid=%d, exit_code=%s", worker.proc.pid, worker.proc.returncode)
        if found is not None:
            return found
        try:
            return SubprocessTransport(key, stderr=self._stderr, stderr_logger=self._stderr_logger)
        except BaseException:
            with self._lock:
                self._active -= 1
                self._counts["spawns"] -= 1
            raise

    def _take_idle(self, key: tuple[str, ...]) -> tuple[SubprocessTransport | None, list[SubprocessTransport]]:
        """Pop the youngest idle worker of a command, and dead ones on the way to it."""
        dead: list[SubprocessTransport] = []
        for at in range(len(self._idle) - 1, -1, -1):
            if self._idle[at].key == key:
                transport = self._idle.pop(at).transport
                if not transport.channel.gone():
                    return transport, dead
                dead.append(transport)
        return None, dead

    def _give_back(self, key: tuple[str, ...], transport: SubprocessTransport) -> None:
        if self._pid != os.getpid():  # a fork leaves its parent's block: the worker, and perhaps the lock, is not ours
            return
        evicted: SubprocessTransport | None = None
        usable = self._usable(transport)
        with self._lock:
            self._active -= 1
            usable = usable and not self._closed.is_set()
            self._counts["returns" if usable else "discards"] += 1
            if usable:
                self._idle.append(_PoolWorker(key, transport, time.monotonic()))
                if len(self._idle) > self._max_idle:
                    self._counts["evictions_max"] += 1
                    evicted = self._idle.pop(0).transport
                if self._idle and self._reaper is None:
                    self._reaper = threading.Thread(target=self._reap, name="vgi_rpc-pool", daemon=True)
                    self._reaper.start()
        if not usable:
            transport.close()
        if evicted is not None:
            evicted.close()

    @staticmethod
    def _usable(transport: SubprocessTransport) -> bool:
        channel, pid = transport.channel, transport.proc.pid
        if channel.stream is not None:
            _LOG_POOL.warning("Discarding worker with abandoned stream: pid=%d", pid)
        elif channel.broken is not None or channel.busy is not None:
            _LOG_POOL.warning(
                "Worker died during use: pid=%d, exit_code=%s (%s)", pid, transport.proc.poll(), channel.broken
            )
        elif transport.proc.poll() is not None or channel.gone():
            _LOG_POOL.warning("Worker died during use: pid=%d, exit_code=%s", pid, transport.proc.poll())
        else:
            return True
        return False

    def _reap(self) -> None:
        """Ends workers that have been idle for too long, until the pool is closed."""
        while not self._closed.wait(min(self._idle_timeout, 5.0)):
            limit = time.monotonic() - self._idle_timeout
            with self._lock:
                old = [worker for worker in self._idle if worker.since <= limit]
                self._idle = [worker for worker in self._idle if worker.since > limit]
                self._counts["evictions_idle"] += len(old)
            for worker in old:
                worker.transport.close()


# ==== 15. FRONT DOOR ==================================================================================================
# Uses: 3, 4, 10, 12, 13. Ways in: connect to a service, or serve one (API.md sections 2.2, 2.3, 8.2). The
# only room, with the command line, that knows every transport.
#
#   connect, unix_connect, tcp_connect                a client of a service elsewhere
#   serve_pipe, serve_unix_pipe, serve_tcp_pipe       client and server in this process, for tests and embedding
#   serve_stdio, serve_unix, serve_tcp, run_server    a server, until its input ends or it is told to stop


@_client_door
def connect(
    protocol: TypeForm[_P],
    cmd: Sequence[str],
    *,
    on_log: Callable[[Message], None] | None = None,
    stderr: StderrMode = StderrMode.INHERIT,
    stderr_logger: logging.Logger | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
    timeout: float | None = None,
    reconnect: bool = False,
    limits: IpcLimits | None = None,
    shm_size: int | None = None,
    external_location: BatchStore | None = None,
) -> Iterator[_P]:
    """Start a worker process and talk over its stdin and stdout; leaving the block ends it.

    Args:
        cmd: the program and its arguments, for example `[sys.executable, "worker.py"]`.
        on_log: receives the Messages that methods send while they run.
        timeout: seconds for each call and each turn of a stream; None waits for ever.
        reconnect: start the worker again when it is gone, and repeat only what was never sent.
        limits: what the peer may claim before memory is allocated for it.
        shm_size: bytes of shared memory for batches of 128 KiB and more, if the worker can use it (wire.md section 11).
            A batch that was read from there keeps its place until nothing refers to it; not with `reconnect`.
        external_location: fetches batches that the server keeps elsewhere (`vgi_rpc_extras.storage`).

    Raises the operating system's own error when the worker cannot be started.

    >>> with connect(Calc, [sys.executable, "worker.py"], timeout=30.0) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    spawn = functools.partial(SubprocessTransport, cmd, stderr=stderr, stderr_logger=stderr_logger)
    options = _ClientOptions(on_log, ipc_validation, timeout, store=external_location)
    yield from _door_client(protocol, spawn, options, reconnect, limits, shm_size)


@_client_door
def unix_connect(
    protocol: TypeForm[_P],
    path: str,
    *,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
    timeout: float | None = None,
    reconnect: bool = False,
    limits: IpcLimits | None = None,
    shm_size: int | None = None,
    external_location: BatchStore | None = None,
) -> Iterator[_P]:
    """Connect to a server on a Unix socket; options as in `connect`; `timeout` also bounds connecting.

    Raises the operating system's own error when nobody listens at `path`.

    >>> with unix_connect(Calc, "calc.sock", timeout=5.0) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    dial = functools.partial(_door_dial_unix, path, timeout)
    options = _ClientOptions(on_log, ipc_validation, timeout, store=external_location)
    yield from _door_client(protocol, dial, options, reconnect, limits, shm_size)


@_client_door
def tcp_connect(
    protocol: TypeForm[_P],
    host: str,
    port: int,
    *,
    connect_timeout: float | None = 5.0,
    tls_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation = IpcValidation.FULL,
    timeout: float | None = None,
    reconnect: bool = False,
    limits: IpcLimits | None = None,
    external_location: BatchStore | None = None,
) -> Iterator[_P]:
    """Connect to a server over TCP, through TLS when a context is given.

    Args:
        connect_timeout: seconds for connecting and the TLS handshake; TimeoutError when they take longer.
        server_hostname: the name the certificate must carry; `host` by default.

    >>> with tcp_connect(Calc, "127.0.0.1", port, timeout=5.0) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    if connect_timeout is not None and connect_timeout <= 0:
        raise ValueError(f"connect_timeout must be positive or None, got {connect_timeout}")

    dial = functools.partial(_door_dial_tcp, host, port, connect_timeout, tls_context, server_hostname)
    options = _ClientOptions(on_log, ipc_validation, timeout, store=external_location)
    yield from _door_client(protocol, dial, options, reconnect, limits)


def _door_client(
    protocol: Any,
    dial: Callable[[], Any],
    options: _ClientOptions,
    reconnect: bool,
    limits: IpcLimits | None,
    shm_size: int | None = None,
) -> Iterator[Any]:
    _client_check_timeout(options.timeout)
    if reconnect and shm_size is not None:
        raise ValueError("reconnect and shm_size exclude each other: what is in shared memory would be lost")
    link = _ClientLink(dial(), dial if reconnect else None, limits)
    try:
        _client_share(link.channel, shm_size, options.timeout)
        yield _client_proxy(protocol, link, options)
    finally:
        link.transport.close()


def _door_dial_unix(path: str, timeout: float | None) -> UnixTransport:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        _door_connect_unix(sock, path, None if timeout is None else time.monotonic() + timeout)
    except OSError as exc:
        sock.close()
        exc.add_note(_door_unix_note(path))
        raise
    return UnixTransport(sock)


def _door_unix_note(path: str) -> str:
    import stat

    if path.startswith("UNIX:"):  # as a server prints it
        return f"the prefix UNIX: is not part of the path {path[5:]}"
    start = f"no server answers on {path}; start one with --unix {path}"
    if len(os.fsencode(path)) > 107:
        return f"the path of a Unix socket has at most 107 bytes; {path} is longer"
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return start
    if not stat.S_ISSOCK(mode):
        return f"{path} is not a socket; a server makes one: --unix PATH"
    return f"{start} (the socket is there: its server is gone, or belongs to another user)"


def _door_connect_unix(sock: socket.socket, path: str, deadline: float | None) -> None:
    """Connect, waiting while the server's backlog is full: with a timeout the kernel says EAGAIN instead."""
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if deadline is None or time.monotonic() >= deadline:
                raise TimeoutError(f"the server on {path} did not accept the connection in time") from None
            time.sleep(0.01)


def _door_dial_tcp(
    host: str,
    port: int,
    timeout: float | None,
    tls_context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> TcpTransport:
    if "/" in host:
        raise ValueError(f"a TCP host is a name or an address, got {host!r}; for a URL there is http_connect (--url)")
    try:
        sock = socket.create_connection((host, port), timeout=timeout)
    except OSError as exc:
        exc.add_note(f"no server answers on {host}:{port}")
        raise
    try:
        if tls_context is not None:
            sock = tls_context.wrap_socket(sock, server_hostname=server_hostname or host)
        return TcpTransport(sock)
    except BaseException:
        sock.close()
        raise


# ---- client and server in one process


@_client_door
def serve_pipe(
    protocol: TypeForm[_P],
    implementation: object,
    *,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation | None = None,
    timeout: float | None = None,
    external_location: BatchStore | None = None,
    seal_state: bool = False,
) -> Iterator[_P]:
    """Serve `implementation` from a thread of this process, over pipes, and yield the proxy.

    The bytes are those of a subprocess, so what passes here passes there. With `seal_state` the states of streams are
    packed and made again between their turns, as over HTTP: what passes here then passes there, too.

    >>> with serve_pipe(Calc, CalcImpl()) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    options = _ClientOptions(on_log, timeout=timeout, store=external_location)
    served = _DoorSealed(implementation) if seal_state else implementation
    yield from _door_in_process(protocol, served, make_pipe_pair(), options, ipc_validation)


class _DoorSealed:
    """An implementation whose streams keep nothing between their turns but what their states are packed into."""

    def __init__(self, implementation: object) -> None:
        self._implementation = implementation

    def __getattr__(self, name: str) -> Any:
        import inspect

        found = getattr(self._implementation, name)
        if not inspect.isroutine(found) or inspect.iscoroutinefunction(found):
            return found

        @functools.wraps(found)
        def call(*args: Any, **kwargs: Any) -> Any:
            value = found(*args, **kwargs)
            return _DoorState(self._implementation, value).stream if isinstance(value, Stream) else value

        return call


class _DoorState(StreamState):
    """A state in packed form; of an exchange it travels before the first turn, of a producer after it (http.md 7)."""

    def __init__(self, implementation: object, stream: Stream[Any, Any]) -> None:
        state, call_state = stream.state, stream.call_state
        check_state_class(type(state))
        _methods_settle(state)
        self._implementation = implementation
        self._class: type[StreamState] = type(state)
        self._call_class: Any = type(call_state)
        self._call = None if call_state is None else seal_state(call_state)
        self._packed = seal_state(state) if len(stream.input_schema) else b""
        self._first: StreamState | None = None if self._packed else state
        self.stream: Stream[Any, Any] = Stream(
            stream.output_schema, self, stream.input_schema, stream.header, call_state
        )

    def bind_call_state(self, call_state: Any) -> None:
        if self._first is not None:
            self._first.bind_call_state(call_state)

    def process(self, input: AnnotatedBatch, out: OutputCollector, ctx: CallContext) -> None:
        state, first = self._restored(), self._first is not None
        state.process(input, out, ctx)
        self._packed, self._first = (seal_state(state) if first else state.serialize_to_bytes()), None

    def on_cancel(self, ctx: CallContext) -> None:
        self._restored().on_cancel(ctx)

    def _restored(self) -> StreamState:
        if self._first is not None:
            return self._first
        found = self._class.deserialize_from_bytes(self._packed)
        found.rehydrate(self._implementation)
        found.bind_call_state(None if self._call is None else self._call_class.deserialize_from_bytes(self._call))
        return found


@_client_door
def _door_serve_unix_pipe(
    protocol: Any,
    implementation: object,
    *,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation | None = None,
    timeout: float | None = None,
    external_location: BatchStore | None = None,
) -> Iterator[Any]:
    options = _ClientOptions(on_log, timeout=timeout, store=external_location)
    yield from _door_in_process(protocol, implementation, make_unix_pair(), options, ipc_validation)


@_client_door
def serve_tcp_pipe(
    protocol: TypeForm[_P],
    implementation: object,
    *,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation | None = None,
    timeout: float | None = None,
    external_location: BatchStore | None = None,
) -> Iterator[_P]:
    """Like `serve_pipe`, over a TCP connection on the loopback interface.

    >>> with serve_tcp_pipe(Calc, CalcImpl()) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    options = _ClientOptions(on_log, timeout=timeout, store=external_location)
    yield from _door_in_process(protocol, implementation, make_tcp_pair(), options, ipc_validation)


def _door_in_process(
    protocol: Any,
    implementation: object,
    pair: tuple[Any, Any],
    options: _ClientOptions,
    ipc_validation: IpcValidation | None,
) -> Iterator[Any]:
    client, served = pair
    try:
        _client_check_timeout(options.timeout)
        server = RpcServer(protocol, implementation, ipc_validation=ipc_validation, external_location=options.store)
        options = options._replace(validation=server.ipc_validation)
        proxy = _client_proxy(protocol, _ClientLink(client), options)
    except BaseException:
        client.close()
        served.close()
        raise
    thread = threading.Thread(target=_door_serve, args=(server, served), name="vgi_rpc-server", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        client.close()
        thread.join(5.0)


def _door_serve(server: RpcServer, transport: Any) -> None:
    """One connection, from a thread: log what ends it, and always close it."""
    try:
        server.serve(transport)
    except BaseException:
        _LOG_RPC.warning("a connection ended with an error", exc_info=True)
    finally:
        transport.close()


# ---- servers


def serve_stdio(server: RpcServer, *, orphan_grace: float | None = 1.0) -> None:
    """Serve one peer on stdin and stdout, until stdin ends.

    print(), C libraries and children cannot disturb it: the protocol moves to private descriptors, descriptor 1
    becomes stderr and descriptor 0 the null device.

    Args:
        orphan_grace: seconds that a method may go on when nobody is left who could read its answer, because the caller
            has died; then SIGTERM ends this process. None: as long as the method takes.
    """
    transport = _transport_stdio()
    _LOG_WIRE_TRANSPORT.debug("serve_stdio: server_id=%s", server.server_id)
    try:
        with _door_orphan(transport.channel.out, orphan_grace):
            server.serve(transport)
    finally:
        transport.close()


_DOOR_GRACE = 3.0  # seconds from a signal to the end of the process, whatever it does


@contextlib.contextmanager
def _door_orphan(out: int, grace: float | None) -> Iterator[None]:
    """A thread that looks after the reader of `out`: the main thread does not, while a method runs."""
    if grace is None or out < 0:
        yield
        return
    stop, wake = os.pipe()
    thread = threading.Thread(target=_door_await_death, args=(out, stop, grace), name="vgi_rpc-orphan", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(wake, b"x")
        thread.join(1.0)
        os.close(wake)


def _door_await_death(out: int, stop: int, grace: float) -> None:
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    poll.register(out, 0)  # nothing but the end: no reader is left
    ready = dict(poll.poll())
    poll.unregister(out)
    if stop not in ready and not poll.poll(grace * 1000):  # an idle server has noticed by now
        _LOG_RPC.warning("the caller has gone while a method runs; ending process %d", os.getpid())
        os.kill(os.getpid(), signal.SIGTERM)
        if not poll.poll(_DOOR_GRACE * 1000):
            os._exit(128 + signal.SIGTERM)
    os.close(stop)


@contextlib.contextmanager
def _door_mortal(stopped: list[int], tidy: bool) -> Iterator[None]:
    """Let SIGTERM and SIGINT end this process: by an exception in the main thread, and after a grace in any case.

    Nothing but a handler ends process 1 (a container's), and a handler does not run while a method is in C: then a
    thread of ours sees the signal. `stopped` is told that SIGTERM came. Without `tidy`, SIGTERM is left to the kernel
    wherever that can: a call that is cut off is no answer.
    """
    import fcntl

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        raise SystemExit(128 + number)

    ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and (tidy or os.getpid() == 1)
    if ours:
        signal.signal(signal.SIGTERM, stop)
    ends = os.pipe()
    ear, mouth = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends]  # a stdout that is closed stays so
    for end in ends:
        os.close(end)
    os.set_blocking(mouth, False)
    before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    mortal = (stop, signal.default_int_handler)
    threading.Thread(target=_door_watchdog, args=(ear, mortal), name="vgi_rpc-watchdog", daemon=True).start()
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if not (stopped or interrupted):  # else the watchdog stays
            signal.set_wakeup_fd(before)
            os.write(mouth, b"\0")
            os.close(mouth)
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _door_watchdog(ear: int, mortal: tuple[object, ...]) -> None:
    """Read the numbers of signals as they come; 0 is the end."""
    while number := (os.read(ear, 1) or b"\0")[0]:
        if number in (signal.SIGTERM, signal.SIGINT) and signal.getsignal(number) in mortal:
            time.sleep(_DOOR_GRACE)
            os._exit(128 + number)
    os.close(ear)


@overload
def serve_unix(
    server: RpcServer,
    path: str,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str], None] | None = None,
) -> None: ...


@overload
def serve_unix(server: TypeForm[_P], path: object, **options: Any) -> contextlib.AbstractContextManager[_P]: ...


def serve_unix(
    server: Any,
    path: Any,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str], None] | None = None,
    **options: Any,
) -> Any:
    """Serve on a Unix socket of mode 0600, replacing a stale one; blocks.

    Args:
        threaded: a daemon thread per connection; otherwise one connection after the other.
        max_connections: further clients wait in the backlog (threaded only); then those are closed that have been
            connected for two seconds and have not sent a whole request yet.
        idle_timeout: return this many seconds after the last connection has ended (threaded only).
        on_bound: called with the path once it accepts connections.

    Raises:
        RuntimeError: the path is not a socket, or another process listens there.
        ValueError: `idle_timeout` without `threaded`, `max_connections` below 1.

    `serve_unix(Protocol, implementation)` is `serve_unix_pipe(Protocol, implementation)` (API.md section 9.1).

    >>> serve_unix(RpcServer(Calc, CalcImpl()), "other.sock", threaded=True, idle_timeout=0.1, on_bound=print)
    other.sock
    """
    if not isinstance(server, RpcServer):
        return _door_serve_unix_pipe(server, path, **options)
    _door_check_serving(threaded, max_connections, idle_timeout)
    try:
        listener = _transport_listen_unix(path, 128 if threaded else 16)
    except (OSError, RuntimeError) as exc:
        exc.add_note(f"cannot listen on {path}; choose another path, of at most 107 bytes in a directory that exists")
        raise
    inode, owner = os.stat(path).st_ino, os.getpid()
    _LOG_WIRE_TRANSPORT.debug("serve_unix: server_id=%s, path=%s", server.server_id, path)

    def handle(sock: socket.socket) -> None:
        transport = UnixTransport(sock)
        with acceptor.guest(transport):
            server.serve(transport)

    acceptor = _TransportAcceptor(
        listener, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout
    )
    try:
        if on_bound is not None:
            on_bound(path)
        acceptor.run()
    finally:
        listener.close()
        if os.getpid() == owner:  # `on_bound` may have forked
            _transport_unlink_unix(path, inode)
    return None


@overload
def serve_unix_pipe(
    protocol: RpcServer,
    implementation: str,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str], None] | None = None,
) -> None: ...


@overload
def serve_unix_pipe(
    protocol: TypeForm[_P],
    implementation: object,
    *,
    on_log: Callable[[Message], None] | None = None,
    ipc_validation: IpcValidation | None = None,
    timeout: float | None = None,
) -> contextlib.AbstractContextManager[_P]: ...


def serve_unix_pipe(protocol: Any, implementation: Any, **options: Any) -> Any:
    """Like `serve_pipe`, over a pair of Unix sockets.

    `serve_unix_pipe(server, path)` is `serve_unix(server, path)` (API.md section 9.1).

    >>> with serve_unix_pipe(Calc, CalcImpl()) as calc:
    ...     calc.add(1.0, 2.0)
    3.0
    """
    if isinstance(protocol, RpcServer):
        return serve_unix(protocol, implementation, **options)
    return _door_serve_unix_pipe(protocol, implementation, **options)


def serve_tcp(
    server: RpcServer,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    threaded: bool = False,
    max_connections: int | None = None,
    idle_timeout: float | None = None,
    on_bound: Callable[[str, int], None] | None = None,
    tls_context: ssl.SSLContext | None = None,
    tls_handshake_timeout: float = 5.0,
) -> None:
    """Serve on a TCP port, 0 for any; options as in `serve_unix`; blocks. Plain bytes unless a TLS context is given.

    >>> server = RpcServer(Calc, CalcImpl())
    >>> serve_tcp(server, threaded=True, idle_timeout=0.1, on_bound=lambda host, port: print(host))
    127.0.0.1
    """
    _door_check_serving(threaded, max_connections, idle_timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128 if threaded else 16)
    except OSError as exc:
        exc.add_note(f"cannot listen on {host}:{port}; choose another port, or 0 for any")
        raise
    with listening as listener:
        bound = listener.getsockname()[1]
        _LOG_WIRE_TRANSPORT.debug("serve_tcp: server_id=%s, address=%s:%d", server.server_id, host, bound)

        def handle(sock: socket.socket) -> None:
            if tls_context is not None:
                sock.settimeout(tls_handshake_timeout)
                sock = tls_context.wrap_socket(sock, server_side=True)
            transport = TcpTransport(sock)
            try:
                with acceptor.guest(transport):
                    server.serve(transport)
            finally:
                transport.close()

        acceptor = _TransportAcceptor(
            listener, handle, threaded=threaded, max_connections=max_connections, idle_timeout=idle_timeout
        )
        if on_bound is not None:
            on_bound(host, bound)
        acceptor.run()


def _door_check_serving(threaded: bool, max_connections: int | None, idle_timeout: float | None) -> None:
    if idle_timeout is not None and not threaded:
        raise ValueError("idle_timeout requires threaded=True")
    if max_connections is not None and max_connections < 1:
        raise ValueError(f"max_connections must be at least 1, got {max_connections}")


def run_server(protocol_or_server: type | RpcServer, implementation: object | None = None) -> None:
    """Be a worker: parse the command line (`--help` lists the flags) and serve, on stdio by default.

    Args:
        protocol_or_server: a Protocol class with its `implementation`, or a ready RpcServer without.

    Example:
        if __name__ == "__main__":
            run_server(Calc, CalcImpl())
    """
    if isinstance(protocol_or_server, RpcServer):
        if implementation is not None:
            raise TypeError("implementation must be None when passing an RpcServer")
    elif not isinstance(protocol_or_server, type):
        raise TypeError(f"Expected a Protocol class or RpcServer, got {type(protocol_or_server).__name__}")
    elif implementation is None:
        raise TypeError("implementation is required when passing a Protocol class")
    _door_run(protocol_or_server, implementation, sys.argv[1:])


def _door_run(
    protocol_or_server: type | RpcServer,
    implementation: object | None,
    argv: Sequence[str],
    *,
    describe: bool = False,
    prog: str | None = None,
) -> None:
    """Parse a worker's flags and serve."""
    options = _door_parser(prog).parse_args(argv)
    if isinstance(protocol_or_server, RpcServer):
        server = protocol_or_server
    else:
        server = RpcServer(protocol_or_server, implementation, enable_describe=describe or options.describe)
    _door_check_options(options)
    if options.idle_message_timeout is not None:
        server.idle_message_timeout = options.idle_message_timeout or None
    stopped: list[int] = []
    try:
        with contextlib.ExitStack() as log:
            if options.workers == 1:
                log.callback(_door_access_log(options, server))
            _door_serve_options(server, options, log, stopped)
    except SystemExit:
        if stopped:  # everything is put away: die of it, as others expect; process 1 cannot, and exits
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    except KeyboardInterrupt:  # Ctrl-C in a terminal reaches the worker too
        raise SystemExit(130) from None
    except (OSError, RuntimeError) as exc:
        notes = getattr(exc, "__notes__", ())
        if not notes:
            raise
        raise SystemExit("\n".join([f"Error: {exc}", *notes])) from None  # where it cannot listen is no bug


def _door_check_options(options: Any) -> None:
    sockets = options.unix or options.tcp
    for name in ("max_response_bytes", "max_externalized_response_bytes"):
        if getattr(options, name) is not None and sockets:
            flag = f"--{name.replace('_', '-')}"
            raise SystemExit(f"{flag} (VGI_RPC_{name.upper()}) is about HTTP: give --http")
    if sockets and options.idle_timeout and not options.threaded:
        raise SystemExit("idle_timeout requires threaded=True: give --idle-timeout 0 with --no-threaded")
    if not 0 <= options.port <= 65_535:
        raise SystemExit(f"--port must be within 0..65535, got {options.port}")
    if not options.idle_timeout >= 0:  # nan as well
        raise SystemExit(f"--idle-timeout must not be negative, got {options.idle_timeout}")
    if options.idle_message_timeout is not None and not options.idle_message_timeout >= 0:
        raise SystemExit(f"--idle-message-timeout must not be negative, got {options.idle_message_timeout}")
    if options.max_connections < 0:
        raise SystemExit(f"--max-connections must not be negative, got {options.max_connections}")
    if options.workers < 1:
        raise SystemExit(f"--workers must be at least 1, got {options.workers}")
    if options.workers > 1 and not sockets:
        raise SystemExit("--workers is about sockets: give --unix or --tcp (HTTP: use a process manager)")
    if options.workers > 1 and options.access_log and "{pid}" not in options.access_log:
        raise SystemExit("--access-log needs {pid} in its path when there are several --workers")


def _door_serve_options(server: RpcServer, options: Any, log: contextlib.ExitStack, stopped: list[int]) -> None:
    sockets: dict[str, Any] = {
        "threaded": options.threaded,
        "max_connections": options.max_connections or None,
        "idle_timeout": options.idle_timeout or None,
    }

    def bound(where: str) -> None:
        print(where, flush=True)
        if options.workers > 1:
            _DoorWorkers(options.workers).run()
            log.callback(_door_access_log(options, server))
        log.enter_context(_door_mortal(stopped, tidy=True))

    if options.http:
        _door_serve_http(server, options)
    elif options.unix:
        serve_unix(server, os.path.abspath(options.unix), on_bound=lambda path: bound(f"UNIX:{path}"), **sockets)
    elif options.tcp:
        host, port = _door_host_port(options.tcp)
        serve_tcp(server, host, port, on_bound=lambda name, number: bound(f"TCP:{name}:{number}"), **sockets)
    else:
        log.enter_context(_door_mortal(stopped, tidy=False))
        serve_stdio(server, orphan_grace=None if options.orphan_grace < 0 else options.orphan_grace)


class _DoorWorkers:
    """The parent of `--workers N`: forks processes that accept from one socket, and replaces those that die.

    A worker that has been idle for its timeout is not replaced. SIGTERM and SIGINT end all of them; when the parent is
    killed, they notice that their pipe to it has closed.
    """

    PATIENCE = 10.0  # seconds until a worker that does not end is killed

    def __init__(self, count: int) -> None:
        self._count = count
        self._born: dict[int, float] = {}
        self._stopping = 0
        self._alive, self._parent = os.pipe()

    def run(self) -> None:
        """Return in each worker; the parent stays here to the end, which is a SystemExit."""
        before = [signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)]
        for _ in range(self._count):
            if self._fork(before):
                return
        while self._born:
            pid, code = self._wait()
            born = self._born.pop(pid, 0.0)
            if code == 0 or self._stopping:
                continue
            said = "an unknown status" if code is None else f"status {code}"
            _LOG_RPC.error("worker %d ended with %s; starting another", pid, said)
            if time.monotonic() - born < 1.0:  # it cannot live: do not try a thousand times a second
                time.sleep(1.0)
            if self._fork(before):
                return
        raise SystemExit(128 + self._stopping if self._stopping else 0)

    def _wait(self) -> tuple[int, int | None]:
        """Wait for a worker, and for no other child: those belong to whoever started them."""
        while True:
            for pid in list(self._born):
                try:
                    found, status = os.waitpid(pid, os.WNOHANG)
                except ChildProcessError:  # somebody else has waited for it
                    return pid, None
                if found:
                    return pid, os.waitstatus_to_exitcode(status)
            time.sleep(0.1)

    def _fork(self, handlers: list[Any]) -> bool:
        """Make one worker; True in it."""
        pid = os.fork()
        if pid:
            self._born[pid] = time.monotonic()
            if self._stopping:
                os.kill(pid, signal.SIGTERM)
            return False
        self._born.clear()
        os.close(self._parent)
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
        threading.Thread(target=self._watch, name="vgi_rpc-parent", daemon=True).start()
        return True

    def _watch(self) -> None:
        os.read(self._alive, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    def _stop(self, number: int, frame: object) -> None:
        self._stopping = number
        for pid in list(self._born):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        signal.signal(signal.SIGALRM, self._kill)
        signal.setitimer(signal.ITIMER_REAL, self.PATIENCE)

    def _kill(self, number: int, frame: object) -> None:
        for pid in list(self._born):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _door_extra(name: str, flag: str) -> Any:
    """A lazy name (room 17) that a flag of a worker needs."""
    try:
        return getattr(sys.modules[__name__], name)
    except ImportError as exc:
        raise SystemExit(f"{flag}: {exc}") from exc


def _door_serve_http(server: RpcServer, options: Any) -> None:
    serve = _door_extra("serve_http", "--http")
    key = os.environ.get("VGI_RPC_TOKEN_KEY")
    try:
        token_key = None if not key else bytes.fromhex(key)
    except ValueError:
        raise SystemExit("VGI_RPC_TOKEN_KEY must be hexadecimal digits, 32 or more") from None
    try:
        serve(
            server,
            host=options.host,
            port=options.port,
            token_key=token_key,
            max_response_bytes=options.max_response_bytes,
            max_externalized_response_bytes=options.max_externalized_response_bytes,
        )
    except ValueError as exc:
        raise SystemExit(str(exc)) from None
    except OSError as exc:
        exc.add_note(f"cannot listen on {options.host}:{options.port}; choose another --port, or 0 for any")
        raise


def _door_host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65_535 or "/" in host:
        raise SystemExit(f"--tcp expects [HOST:]PORT, got {text!r}{'; a URL goes with --url' * ('/' in text)}")
    return host.strip("[]") or "127.0.0.1", int(port)


_DOOR_FLAGS: tuple[tuple[str, type, Any, str], ...] = (
    ("max-response-bytes", int, None, "HTTP: decoded bytes of a response"),
    ("max-externalized-response-bytes", int, None, "HTTP: bytes that a response may keep in the external store"),
    ("workers", int, 1, "sockets: this many processes"),
    ("idle-timeout", float, 300.0, "sockets: exit this long after the last client; 0 never"),
    ("max-connections", int, 64, "sockets: at most this many at a time; 0 unlimited"),
    ("idle-message-timeout", float, None, "sockets: end who is silent this long in a request; 60, 0 never"),
    ("orphan-grace", float, 1.0, "stdio: end a method this long after its caller has died; -1 never"),
    ("access-log", str, None, "file of JSON lines; {pid} {server_id}"),
    ("access-log-max-bytes", int, None, "rotate above this size"),
    ("access-log-backup-count", int, 5, "rotated files to keep"),
    ("access-log-when", str, None, "rotate by time: S M H D MIDNIGHT W0-W6"),
    ("access-log-max-record-bytes", int, 1_048_576, "cut longer records"),
    ("access-log-queue-size", int, 10_000, "records that may wait when asynchronous"),
    ("access-log-sample", float, 1.0, "fraction of successful calls to record"),
)


def _door_parser(prog: str | None = None) -> Any:
    """The flags of a worker (runtime.md section 10)."""
    import argparse

    parser = argparse.ArgumentParser(prog=prog, description="Serve over stdio, a Unix socket, TCP or HTTP.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--unix", metavar="PATH", help="serve on a Unix socket")
    where.add_argument("--tcp", metavar="[HOST:]PORT", help="serve on a TCP port, 0 for any")
    where.add_argument("--http", action="store_true", help="serve over HTTP (needs the http extra)")
    parser.add_argument("--host", default="127.0.0.1", help="HTTP: the address to listen on")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="HTTP: the port, 0 for any")
    parser.add_argument("--describe", action="store_true", help="let clients ask what the service offers")
    threaded = argparse.BooleanOptionalAction
    parser.add_argument("--threaded", action=threaded, default=True, help="sockets: a thread each")
    for flag, kind, default, text in _DOOR_FLAGS:
        metavar = {int: "N", float: "X", str: "TEXT"}[kind]
        default = _door_env(flag, default, kind)
        parser.add_argument(f"--{flag}", type=kind, metavar=metavar, default=default, help=text)
    in_thread = _door_env("access-log-async", False, _door_flag)
    parser.add_argument("--access-log-async", action="store_true", default=in_thread, help="write from a thread")
    return parser


def _door_env(flag: str, default: Any, convert: Callable[[str], Any]) -> Any:
    """The default of a flag: `--max-connections` has the variable VGI_RPC_MAX_CONNECTIONS."""
    name = f"VGI_RPC_{flag.upper().replace('-', '_')}"
    raw = os.environ.get(name)
    if not raw:
        return default
    try:
        return convert(raw)
    except ValueError:
        raise SystemExit(f"{name}={raw!r} is not a valid {convert.__name__}") from None


def _door_flag(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on")


def _door_access_log(options: Any, server: RpcServer) -> Callable[[], None]:
    """Open the access log of a worker; returns what closes it."""
    if not options.access_log:
        return lambda: None
    if options.access_log_max_bytes is not None and options.access_log_when is not None:
        raise SystemExit("--access-log-max-bytes and --access-log-when exclude each other")
    if not 0.0 <= options.access_log_sample <= 1.0:
        raise SystemExit(f"--access-log-sample must be within 0..1, got {options.access_log_sample}")
    configure = _door_extra("configure_access_log", "--access-log")
    try:
        return cast(
            "Callable[[], None]",
            configure(
                options.access_log,
                max_bytes=options.access_log_max_bytes,
                backup_count=options.access_log_backup_count,
                when=options.access_log_when,
                max_record_bytes=options.access_log_max_record_bytes,
                asynchronous=options.access_log_async,
                queue_size=options.access_log_queue_size,
                sample=options.access_log_sample,
                server_id=server.server_id,
            ),
        )
    except (ValueError, OSError) as exc:
        raise SystemExit(f"--access-log: {exc}") from None


# ==== 16. COMMAND LINE ================================================================================================
# Uses: 2, 3, 4, 8, 10, 11, 12, 13, 15. A service seen from a shell (runtime.md section 11, API.md section 8.1).
#
#   main            arguments -> exit status: 0 done, 1 failed, 2 misused, 130 interrupted
#   describe, call  ask the server what it offers, then act on that description; no Protocol class is needed
#   serve, demo     the other side
#   doctor, stub, launch   live in the extras
#
# Results go to stdout (or --output), everything else to stderr. What a value looks like:
#
#   Arrow       JSON out                        key=value in
#   int float   number                          number
#   bool        true, false                     true/1/yes in any case; all else is false
#   string      string                          as it is; enum names too
#   binary      base64                          base64
#   temporal    ISO 8601                        ISO 8601
#   decimal     string                          number
#   map         object                          JSON object
#   others      array, object                   JSON


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (`sys.argv[1:]` by default) and return the exit status."""
    options: Any = None
    try:
        options = _cli_parse(sys.argv[1:] if argv is None else list(argv))
        with _cli_logging(options):
            status: int = options.run(options)
        sys.stdout.flush()
        return status
    except _CliError as exc:
        return _cli_complain(f"Error: {exc}", exc.status)
    except SystemExit as exc:  # argparse, and the flags of a worker
        return _cli_complain(exc.code, 1) if isinstance(exc.code, str) else int(exc.code or 0)
    except RpcError as exc:
        return 130 if _cli_interrupted(exc) else _cli_complain(_cli_error(exc, options), 1)
    except BrokenPipeError:
        _cli_mute()
        return 0
    except OSError as exc:
        return _cli_complain("\n".join([f"Error: {exc}", *getattr(exc, "__notes__", ())]), 1)
    except KeyboardInterrupt:
        return 130


class _CliError(Exception):
    """Ends the command with one line on stderr; status 2 for a misuse."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


def _cli_interrupted(exc: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a terminal interrupts the worker as well, and its death may come first."""
    seen: set[int] = set()  # a chain may run in a circle
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, KeyboardInterrupt):
            return True
        if isinstance(exc, WorkerDiedError) and exc.returncode == -signal.SIGINT:
            return True
        exc = exc.__cause__ or exc.__context__
    return False


def _cli_complain(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


def _cli_error(exc: RpcError, options: Any) -> str:
    """An error of a call: text for a person at a terminal, else one JSON object (runtime.md section 11)."""
    if options.format == "json" or not sys.stderr.isatty():
        return _cli_error_json(exc)
    text = f"Error: {exc}"
    if exc.remote_traceback:
        text += f"\n{exc.remote_traceback}" if options.verbose else "\n(--verbose shows the traceback of the server)"
    if exc.error_code == Code.UNAUTHENTICATED:
        text += "\n(credentials for --url: VGI_RPC_TOKEN in the environment, or --header 'NAME: VALUE')"
    return "\n".join(_log_line(line) for line in text.splitlines())


def _cli_error_json(exc: RpcError) -> str:
    import json

    found = {"type": exc.error_type, "message": exc.error_message}
    if exc.remote_traceback:
        found["traceback"] = exc.remote_traceback
    return json.dumps({"error": found})


def _cli_mute() -> None:
    """Nobody reads stdout any more: what is still buffered must not fail again when the interpreter exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# ---- options

_CLI_PATIENCE = 30.0  # seconds for a service to answer at all, unless --timeout says otherwise


def _cli_parse(argv: list[str]) -> Any:
    parser = _cli_parser()
    options, rest = parser.parse_known_args(argv)
    if options.command == "call" and not any(text.startswith("-") for text in rest):
        options.arguments += rest  # argparse leaves what follows an option in between
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.version:
        print(f"vgi-rpc {__version__} ({os.path.abspath(__file__)})")
        raise SystemExit(0)
    if options.command is None:
        parser.print_help()
        raise SystemExit(2)
    given = [flag for flag in ("url", "cmd", "unix", "tcp") if getattr(options, flag) is not None]
    if len(given) > 1:
        parser.error(f"argument --{given[1]}: not allowed with argument --{given[0]}")
    if options.timeout is not None and not 0 < options.timeout < 1e9:
        parser.error(f"argument --timeout: expected a positive number of seconds, got {options.timeout}")
    for name in ("log_logger", "header"):
        setattr(options, name, [*(getattr(options, name) or ()), *(getattr(options, f"{name}_after", None) or ())])
    return options


def _cli_parser() -> Any:
    import argparse

    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _cli_add_common(before, None)
    after = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _cli_add_common(after, argparse.SUPPRESS, "_after")  # only what is given replaces what came before
    parser = argparse.ArgumentParser(
        prog="vgi-rpc", description="Look at, call and run services.", parents=[before], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Callable[[Any], int], text: str, *, client: bool = True, **settings: Any) -> Any:
        made = commands.add_parser(
            name, help=text, description=text, parents=[after] if client else [], allow_abbrev=False, **settings
        )
        made.set_defaults(run=run)
        return made

    command("describe", _cli_describe, "show what a server offers")
    call = command("call", _cli_call, "call a method")
    call.add_argument("method", metavar="METHOD")
    call.add_argument("arguments", metavar="KEY=VALUE", nargs="*", default=[])
    call.add_argument("--json", "-j", metavar="OBJECT", help="all parameters as one JSON object")
    call.add_argument("--input", "-i", metavar="FILE", help="exchange: Arrow file with the input batches")
    call.add_argument("--no-stdin", action="store_true", help="exchange: no input")
    command("loggers", _cli_loggers, "list the loggers")
    demo = command("demo", _cli_demo, "start a small service and use it")
    demo.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    serve = command("serve", _cli_serve, "serve an implementation; flags of a worker may follow", client=False)
    serve.add_argument("protocol_class", metavar="MODULE:PROTOCOL")
    serve.add_argument("implementation", metavar="MODULE:IMPLEMENTATION", help="an object, or a class to instantiate")
    serve.add_argument("--factory", action="store_true", help="IMPLEMENTATION is called, and returns the object")
    serve.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="--unix PATH, --tcp [HOST:]PORT ...")
    command("doctor", _cli_doctor, "find out what is wrong with a service")
    command("stub", _cli_stub, "write a typed Protocol for a service")
    text = "start a shared worker, or find the running one"  # the launcher parses its own options
    launch = command("launch", _cli_launch, text, client=False, prefix_chars="\0", add_help=False)
    launch.add_argument("flags", nargs=argparse.REMAINDER, metavar="...")
    return parser


def _cli_add_common(parser: Any, default: Any, suffix: str = "") -> None:
    """The options that may stand before and after the command; `suffix` keeps the two lists of a repeated one apart."""

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, **{"default": default, **options})

    def flag(*names: str, text: str) -> None:
        add(*names, action="store_true", default=default or False, help=text)

    add("--url", "-u", metavar="URL", help="the server over HTTP")
    add("--cmd", "-c", metavar="COMMAND", help="start this worker")
    add("--unix", metavar="PATH", help="the server on a Unix socket")
    add("--tcp", metavar="HOST:PORT", help="the server on a TCP port")
    add("--protocol", metavar="NAME", help="one of several; the first by default. doctor: MODULE:CLASS too")
    add("--prefix", "-p", metavar="PATH", help="HTTP: where the service is mounted")
    formats = ("auto", "json", "table", "arrow")
    text = "HTTP: send this too; may be repeated. A bearer token is better kept in the variable VGI_RPC_TOKEN"
    add("--header", action="append", type=_cli_header, metavar="'NAME: VALUE'", dest=f"header{suffix}", help=text)
    add("--format", "-f", choices=formats, default=default or "auto", help="auto: table on a terminal, else json")
    add("--output", "-o", metavar="FILE", help="write results there")
    text = f"seconds for a call, or a turn of a stream; by default {_CLI_PATIENCE:g} to describe itself, then no limit"
    add("--timeout", type=float, metavar="S", help=text)
    flag("--verbose", "-v", text="show the server's messages")
    flag("--debug", text="log everything this side does")
    add("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    text = "only this logger; may be repeated"
    add("--log-logger", action="append", metavar="NAME", dest=f"log_logger{suffix}", help=text)
    add("--log-format", choices=("text", "json"), default=default or "text")
    add("--version", "-V", action="store_true", default=default or False, help="show the version and its file")


def _cli_header(text: str) -> tuple[str, str]:
    """Name and value of a --header. The error does not repeat the text, which may be a secret that lacks its quotes."""
    import argparse

    match = re.fullmatch(r"([\w!#$%&'*+.^`|~-]+):[ \t]*(.*\S)[ \t]*", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError("expected 'NAME: VALUE', in quotes")
    return match[1].title(), match[2]  # names have no case: a later one replaces an earlier one


_CLI_LOGGERS = (
    ("vgi_rpc", "everything below", "all of it"),
    ("vgi_rpc.access", "one record per dispatched call", "who called what, how long"),
    ("vgi_rpc.rpc", "life of servers, failed methods", "errors of an implementation"),
    ("vgi_rpc.pool", "the worker pool", "workers borrowed, returned, evicted"),
    ("vgi_rpc.subprocess.stderr", "what a worker prints on stderr", "workers that do not start"),
    ("vgi_rpc.wire.request", "requests, without values", "what is sent"),
    ("vgi_rpc.wire.response", "replies, without values", "what comes back"),
    ("vgi_rpc.wire.batch", "how batches are classified", "log, error or data"),
    ("vgi_rpc.wire.stream", "turns of streams", "streams that hang or end early"),
    ("vgi_rpc.wire.transport", "connections", "opening and closing"),
    ("vgi_rpc.wire.http", "requests over HTTP", "HTTP status, sizes"),
    ("vgi_rpc.shm", "shared memory", "batches that stay where they are"),
    ("vgi_rpc.external", "large batches kept in a store", "uploads"),
    ("vgi_rpc.external_fetch", "large batches fetched from a store", "downloads"),
    ("vgi_rpc.launcher", "shared workers", "starting and finding them"),
)


@contextlib.contextmanager
def _cli_logging(options: Any) -> Iterator[None]:
    names = options.log_logger
    if not (options.debug or options.log_level or names):
        yield
        return
    known = {name for name, _, _ in _CLI_LOGGERS}
    for name in names:
        if name not in known:
            print(f"Warning: unknown logger '{name}'", file=sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(VgiJsonFormatter() if options.log_format == "json" else text)
    chosen = [logging.getLogger(name) for name in names]
    if options.debug or not names:
        chosen.append(_LOG)
    levels = [logger.level for logger in chosen]
    for logger in chosen:
        logger.setLevel(options.log_level or logging.DEBUG)
    _LOG.addHandler(handler)
    try:
        yield
    finally:
        _LOG.removeHandler(handler)
        for logger, level in zip(chosen, levels, strict=True):
            logger.setLevel(level)


# ---- the server, as it describes itself


@contextlib.contextmanager
def _cli_connect(options: Any) -> Iterator[Any]:
    transport = _cli_dial(options)
    try:
        yield transport
    finally:
        transport.close()


def _cli_dial(options: Any) -> Any:
    import shlex

    if options.url is not None:
        try:
            load = getattr(sys.modules[__name__], "_extras_load")  # noqa: B009 (room 17)
            made = load("http.client", "--url", "http").HttpTransport
            return made(options.url, prefix=options.prefix, headers=_cli_credentials(options))
        except ImportError as exc:
            raise _CliError(str(exc)) from None
        except ValueError as exc:
            raise _CliError(f"--url: {exc}", 2) from None
    for flag in ("prefix", "header"):
        if getattr(options, flag):
            raise _CliError(f"--{flag} goes with --url", 2)
    if options.cmd is not None:
        try:
            command = shlex.split(options.cmd)
        except ValueError as exc:
            raise _CliError(f"--cmd cannot be split: {exc}", 2) from None
        if not command:
            raise _CliError("--cmd is empty", 2)
        return SubprocessTransport(command)
    if options.unix is not None:
        return _door_dial_unix(options.unix, options.timeout or _CLI_PATIENCE)
    if options.tcp is not None:
        return _door_dial_tcp(*_door_host_port(options.tcp), options.timeout or 5.0)
    raise _CliError(
        'Either --url, --cmd, or --unix is required (or --tcp), such as --cmd "python worker.py --describe"'
    )


def _cli_credentials(options: Any) -> dict[str, str]:
    token = os.environ.get("VGI_RPC_TOKEN", "").strip()
    return ({"Authorization": f"Bearer {token}"} if token else {}) | dict(options.header)


def _cli_client_options(options: Any) -> _ClientOptions:
    def show(message: Message) -> None:
        print(f"[{message.level.value}] {_log_line(message.message)}", file=sys.stderr)

    return _ClientOptions(show if options.verbose else None, timeout=options.timeout, store=_CliStore())


class _CliStore:
    """Fetches what a server keeps elsewhere, if it ever has to, and shows on a terminal how far it is."""

    def __init__(self) -> None:
        self._written = 0.0

    def wants(self, batch: pa.RecordBatch) -> bool:
        return False

    def save(self, schema: pa.Schema, data: bytes) -> tuple[str, str, int]:
        raise NotImplementedError

    def load(self, url: str, sha256: str | None, timeout: float | None) -> tuple[bytes, float]:
        extras = sys.modules[__name__]  # lazy names, room 17
        try:
            fetching = extras.FetchConfig(progress=self._show if sys.stderr.isatty() else None)
            config = extras.ClientExternalConfig(fetch_config=fetching)
        except ImportError as exc:
            raise ExternalLocationError(str(exc), error_code=Code.FAILED_PRECONDITION) from None
        with fetching:
            try:
                return cast("tuple[bytes, float]", config.load(url, sha256, timeout))
            finally:
                if self._written:
                    sys.stderr.write("\r\x1b[K")
                    sys.stderr.flush()

    def _show(self, done: int, total: int | None) -> None:
        now = time.monotonic()
        if now - self._written < 0.1 and done != total:
            return
        self._written = now
        filled = "#" * (30 * done // total) if total else ""
        of = f" of {total / 1e6:.1f}" if total else ""
        sys.stderr.write(f"\rfetching [{filled:30}] {done / 1e6:.1f}{of} MB\x1b[K")
        sys.stderr.flush()


def _cli_ask(transport: Any, options: Any) -> ServiceDescription:
    """The description of the named protocol, or of the server's first one."""
    limit = options.timeout or _CLI_PATIENCE
    bounded = _cli_client_options(options)._replace(timeout=limit)
    client = _client_proxy(_describe_wire().Reflection, _ClientLink(transport), bounded)
    name = options.protocol
    with _cli_patience(limit):
        if name is None:
            hosted = [p.name for p in list_protocols(client) if not p.name.startswith(RESERVED_PROTOCOL_PREFIX)]
            if not hosted:
                raise _CliError("the server hosts no application protocol")
            name = hosted[0]
        return describe_protocol(client, name)


@contextlib.contextmanager
def _cli_patience(limit: float) -> Iterator[None]:
    """Say what may be wrong when the block lasts, on a terminal at once: a program that is no worker says nothing."""
    hint = "a worker calls run_server()"
    timer = threading.Timer(5.0, lambda: print(f"no answer yet; {hint}", file=sys.stderr, flush=True))
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    except DeadlineExceededError as exc:
        raise DeadlineExceededError(f"no answer within {limit:g} s; {hint}; --timeout S waits longer") from exc
    finally:
        timer.cancel()


def _cli_describe(options: Any) -> int:
    with _cli_connect(options) as transport:
        found = _cli_ask(transport, options)
    with _cli_output(options) as out:
        if _cli_format(options, out) == "table":
            out.write(f"{found}\n")
        else:
            out.write(_cli_json(_cli_description(found)) + "\n")
    return 0


def _cli_description(found: ServiceDescription) -> dict[str, Any]:
    return {
        "protocol_name": found.protocol_name,
        "server_id": found.server_id,
        "request_version": found.request_version,
        "describe_version": found.describe_version,
        "protocol_hash": found.protocol_hash,
        "protocol_version": found.protocol_version,
        "methods": {
            name: {
                "method_type": method.method_type.value,
                "has_return": method.has_return,
                "params_schema": str(method.params_schema),
                "result_schema": str(method.result_schema),
            }
            for name, method in found.methods.items()
        },
    }


def _cli_loggers(options: Any) -> int:
    keys = ("name", "description", "scenario")
    with _cli_output(options) as out:
        if _cli_format(options, out) == "table":
            out.write(_cli_table(keys, _CLI_LOGGERS))
        else:
            out.write(_cli_json([dict(zip(keys, row, strict=True)) for row in _CLI_LOGGERS]) + "\n")
    return 0


# ---- call


def _cli_call(options: Any) -> int:
    with _cli_connect(options) as transport:
        service = _cli_ask(transport, options)
        method = service.methods.get(options.method)
        if method is None:
            raise _CliError(f"Unknown method '{options.method}'. Available: {', '.join(sorted(service.methods))}")
        values = _cli_arguments(options, method.params_schema)
        try:
            _cli_call_method(options, transport, service, method, values)
        except RpcError as exc:
            if forgotten := _cli_forgotten(exc, method.params_schema, values):
                raise _CliError(forgotten, 2) from exc
            raise
    return 0


def _cli_call_method(
    options: Any, transport: Any, service: ServiceDescription, method: MethodDescription, values: list[Any]
) -> None:
    client = _cli_client_options(options)
    reply = _client_call_described(transport, service.protocol_name, service.protocol_version, method, values, client)
    with _cli_output(options) as out:
        printer = _CliPrinter(out, _cli_format(options, out))
        if isinstance(reply, StreamSession):
            _cli_stream(options, method, reply, printer)
        elif method.has_return or printer.form == "arrow":
            printer.batch(reply)
            printer.close(reply.schema)
        else:
            out.write("null\n")


def _cli_forgotten(exc: RpcError, schema: pa.Schema, values: Sequence[Any]) -> str:
    """What to say when the server refuses the null of a parameter that was not given; "" for other errors.

    Which parameters have a default is not on the wire: only the server can say that one is missing.
    """
    refused = re.search(r"parameter '(.+?)' is not optional but got None", exc.error_message)
    for field, value in zip(schema, values, strict=True):
        if exc.error_type == "TypeError" and refused and refused[1] == field.name and value is None:
            return f"Missing parameter '{field.name}' ({field.type}): give {field.name}=VALUE"
    return ""


def _cli_stream(options: Any, method: MethodDescription, session: StreamSession, printer: _CliPrinter) -> None:
    with session:
        if session.header is not None:
            printer.header(cast(pa.RecordBatch, session.header))
        replies: Iterator[AnnotatedBatch]
        exchanges = method.is_exchange
        if exchanges is None:  # the server does not say: what has input is an exchange
            exchanges = options.input is not None or not (options.no_stdin or sys.stdin.isatty())
        if exchanges:
            replies = (session.exchange(AnnotatedBatch(batch)) for batch in _cli_input(options))
        else:
            replies = iter(session)
        for item in replies:
            printer.batch(item.batch)
        printer.close(None if exchanges else session.schema)


def _cli_input(options: Any) -> Iterator[pa.RecordBatch]:
    """The input batches of an exchange: one per JSON line of stdin, or those of an Arrow stream or file."""
    if options.input is not None:
        with open(options.input, "rb") as source:
            magic = source.read(6)
            source.seek(0)
            try:
                if magic == b"ARROW1":
                    file = ipc.open_file(source)
                    yield from (file.get_batch(i) for i in range(file.num_record_batches))
                else:
                    yield from ipc.open_stream(source)
            except pa.ArrowInvalid as exc:
                raise _CliError(f"--input {options.input}: {exc}") from exc
    elif not options.no_stdin:
        schema = None
        for number, line in enumerate(sys.stdin, 1):
            if line.strip():
                batch = _cli_line(line, number, schema)
                schema = batch.schema
                yield batch


def _cli_line(line: str, number: int, schema: pa.Schema | None) -> pa.RecordBatch:
    """One JSON object as a batch of one row; all lines have the first one's schema."""
    import json

    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError(f"expected a JSON object, got {type(row).__name__}")
        if schema is None:
            return pa.RecordBatch.from_pylist([row])
        if unknown := row.keys() - set(schema.names):
            raise ValueError(f"the first line has no {', '.join(sorted(unknown))}")
        row = {name: _cli_from_json(value, schema.field(name).type) for name, value in row.items()}
        return pa.RecordBatch.from_pylist([row], schema=schema)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as exc:
        raise _CliError(f"line {number} of the input: {exc}") from exc


# ---- values in


def _cli_arguments(options: Any, schema: pa.Schema) -> list[Any]:
    """The values of all parameters; one that is not given is null, which the server reads as its default."""
    available = ", ".join(schema.names) or "(none)"
    given = _cli_given_json(options) if options.json is not None else _cli_given_pairs(options.arguments, available)
    for name in given:
        if name not in schema.names:
            raise _CliError(f"Unknown parameter '{name}'. Available: {available}", 2)
    convert = _cli_from_json if options.json is not None else _cli_from_text
    values = []
    for field in schema:
        try:
            value = convert(given[field.name], field.type) if field.name in given else None
            _types_cell(value, _types_raw(field.type))
        except (ValueError, TypeError, ArithmeticError, AttributeError, pa.ArrowException) as exc:
            shown = _log_line(str(given[field.name]))[:80]
            raise _CliError(f"parameter '{field.name}': {shown!r} is not a valid {field.type}: {exc}", 2) from exc
        values.append(value)
    return values


def _cli_given_json(options: Any) -> dict[str, Any]:
    import json

    if options.arguments:
        raise _CliError("--json and key=value exclude each other", 2)
    try:
        given = json.loads(options.json)
    except ValueError as exc:
        raise _CliError(f"--json: {exc}", 2) from None
    if not isinstance(given, dict):
        raise _CliError(f"--json: expected an object, got {type(given).__name__}", 2)
    return given


def _cli_given_pairs(arguments: Sequence[str], available: str) -> dict[str, str]:
    given = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals:
            raise _CliError(f"Expected key=value, got: {text}. Parameters: {available}", 2)
        given[name] = value
    return given


def _cli_from_text(text: str, dtype: Any) -> Any:
    """The text of `key=value` as the parameter's type wants it."""
    import json

    of = pa.types
    if of.is_integer(dtype):
        return int(text)
    if of.is_floating(dtype):
        return float(text)
    if of.is_boolean(dtype):
        return text.strip().lower() in ("true", "1", "yes")
    if of.is_string(dtype) or of.is_large_string(dtype) or of.is_dictionary(dtype):
        return text
    if of.is_temporal(dtype) or of.is_decimal(dtype) or _cli_is_binary(dtype):
        return _cli_from_json(text, dtype)
    try:
        value = json.loads(text)
    except ValueError:
        raise ValueError('expected JSON, such as [1, 2] or {"a": 1}') from None
    return _cli_from_json(value, dtype)


def _cli_is_binary(dtype: Any) -> bool:
    of = pa.types
    return bool(of.is_binary(dtype) or of.is_large_binary(dtype) or of.is_fixed_size_binary(dtype))


def _cli_from_json(value: Any, dtype: Any) -> Any:
    """A value of JSON as the type wants it; what needs no change passes, right or wrong."""
    of = pa.types
    if isinstance(value, str):
        return _cli_from_string(value, dtype)
    if of.is_integer(dtype) and isinstance(value, float):
        if not value.is_integer():  # pyarrow would cut it off
            raise ValueError("not a whole number")
        return int(value)
    if of.is_decimal(dtype) and isinstance(value, int | float):
        return _cli_from_string(str(value), dtype)
    if isinstance(value, list) and (of.is_list(dtype) or of.is_large_list(dtype) or of.is_fixed_size_list(dtype)):
        return [_cli_from_json(item, dtype.value_type) for item in value]
    if isinstance(value, dict) and of.is_map(dtype):
        return [
            (_cli_from_text(key, dtype.key_type), _cli_from_json(item, dtype.item_type)) for key, item in value.items()
        ]
    if isinstance(value, dict) and of.is_struct(dtype):
        fields = {field.name: field.type for field in dtype}
        if unknown := value.keys() - fields.keys():
            raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
        return {name: _cli_from_json(item, fields[name]) for name, item in value.items()}
    return value


def _cli_from_string(text: str, dtype: Any) -> Any:
    import base64
    import datetime
    import decimal

    of = pa.types
    if _cli_is_binary(dtype):
        return base64.b64decode(text, validate=True)
    if of.is_timestamp(dtype):
        return datetime.datetime.fromisoformat(text)
    if of.is_date(dtype):
        return datetime.date.fromisoformat(text)
    if of.is_time(dtype):
        return datetime.time.fromisoformat(text)
    if of.is_duration(dtype):
        return _cli_duration(text)
    if of.is_decimal(dtype):
        return decimal.Decimal(text)
    return text


def _cli_duration(text: str) -> Any:
    import datetime

    part = r"(?:(\d+(?:\.\d+)?){})?"
    pattern = "(-)?P" + part.format("D") + "(?:T" + part.format("H") + part.format("M") + part.format("S") + ")?"
    found = re.fullmatch(pattern, text)
    if found is None or text[-1] in "PT":
        raise ValueError("expected an ISO 8601 duration such as P1DT2H or PT1.5S")
    days, hours, minutes, seconds = (float(number or 0) for number in found.groups()[1:])
    value = datetime.timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    return -value if found[1] else value


def batch_from_json(values: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """Return one row of JSON values; what is absent is null. ValueError names the field that does not fit.

    Bytes are base64, dates, times and durations ISO 8601, as in `call --json`.
    """
    if unknown := values.keys() - set(schema.names):
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}; available: {', '.join(schema.names) or '(none)'}")
    arrays = []
    for field in schema:
        try:
            arrays.append(_types_cell(_cli_from_json(values.get(field.name), field.type), _types_raw(field.type)))
        except (ValueError, TypeError, ArithmeticError, AttributeError, pa.ArrowException) as exc:
            raise ValueError(f"'{field.name}' is not a valid {field.type}: {exc}") from exc
    return pa.RecordBatch.from_arrays(arrays, schema=schema) if arrays else empty_batch(schema)


def batch_to_json(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Return the rows of a batch as JSON has them; the inverse of `batch_from_json`."""
    return list(_cli_rows(batch))


# ---- values out


@contextlib.contextmanager
def _cli_output(options: Any) -> Iterator[Any]:
    """A text file with a `buffer` below it: stdout, or --output."""
    if options.output is None:
        yield sys.stdout
        return
    with open(options.output, "w", encoding="utf-8", newline="\n") as out:
        yield out


def _cli_format(options: Any, out: Any) -> str:
    if options.format != "auto":
        return cast(str, options.format)
    return "table" if out.isatty() else "json"


class _CliPrinter:
    """Writes batches as they arrive; the first one fixes the widths of a table and the schema of an Arrow stream."""

    def __init__(self, out: Any, form: str) -> None:
        self.form = form
        self._out = out
        self._widths: list[int] | None = None
        self._writer: Any = None
        self._progress = _CliProgress(out.isatty())

    def header(self, batch: pa.RecordBatch) -> None:
        if self.form == "arrow":
            with ipc.new_stream(self._out.buffer, batch.schema) as writer:
                writer.write_batch(batch)
        elif self.form == "table":
            cells = next(_cli_rows(batch)).items()
            self._out.write("".join(["Header:\n", *(f"  {name}: {_cli_cell(v)}\n" for name, v in cells), "\n"]))
        else:
            self._out.write(_cli_json({"__header__": next(_cli_rows(batch))}) + "\n")
        self._out.flush()

    def batch(self, batch: pa.RecordBatch) -> None:
        self._progress.hide()
        if self.form == "arrow":
            self._open(batch.schema).write_batch(batch)
        elif self.form == "table":
            self._table(batch)
        else:
            self._out.write("".join(_cli_json(row) + "\n" for row in _cli_rows(batch)))
        self._out.flush()
        self._progress.show(batch)

    def close(self, schema: pa.Schema | None) -> None:
        """The end of the results; `schema` makes an Arrow stream even of no batches."""
        self._progress.erase()
        if self.form == "arrow" and schema is not None:
            self._open(schema)
        if self._writer is not None:
            self._writer.close()
        self._out.flush()

    def _open(self, schema: pa.Schema) -> Any:
        if self._writer is None:
            self._writer = ipc.new_stream(self._out.buffer, schema)
        return self._writer

    def _table(self, batch: pa.RecordBatch) -> None:
        rows = [[_cli_cell(value) for value in row.values()] for row in _cli_rows(batch)]
        if self._widths is None:
            self._widths = _cli_widths(batch.schema.names, rows)
            rows[:0] = [batch.schema.names, ["-" * width for width in self._widths]]
        self._out.write("".join(_cli_table_line(row, self._widths) for row in rows))


class _CliProgress:
    """One line on a terminal's stderr while a stream lasts longer than a second."""

    def __init__(self, beside_rows: bool) -> None:
        self._began = self._written = time.monotonic()
        self._visible = sys.stderr.isatty()
        self._beside_rows = beside_rows  # stdout is the terminal too
        self._shown = False
        self._batches = self._rows = self._bytes = 0

    def show(self, batch: pa.RecordBatch) -> None:
        self._batches += 1
        self._rows += batch.num_rows
        self._bytes += batch.nbytes
        now = time.monotonic()
        elapsed = now - self._began
        if not self._visible or elapsed < 1.0 or now - self._written < 0.1:
            return
        size, rate = self._bytes / 1e6, self._rows / elapsed
        sys.stderr.write(f"\r{self._batches} batches, {self._rows} rows, {size:.1f} MB, {rate:.0f} rows/s\x1b[K")
        sys.stderr.flush()
        self._written, self._shown = now, True

    def hide(self) -> None:
        """Make room for rows, if they go to the same terminal."""
        if self._beside_rows:
            self.erase()

    def erase(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False


def _cli_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = _cli_widths(names, rows)
    return "".join(_cli_table_line(row, widths) for row in (names, ["-" * width for width in widths], *rows))


def _cli_widths(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(names, *rows, strict=True)]


def _cli_table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() + "\n"


def _cli_cell(value: Any) -> str:
    return _log_line(value if isinstance(value, str) else _cli_json(value))


def _cli_json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower().replace("-", "") != "utf8")


def _cli_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    columns = [_cli_column(column) for column in batch.columns]
    for i in range(batch.num_rows):
        yield {name: column[i] for name, column in zip(batch.schema.names, columns, strict=True)}


def _cli_column(column: pa.Array[Any]) -> list[Any]:
    of = pa.types
    if of.is_float16(column.type):  # pyarrow below 21 makes a numpy scalar of it, and crashes where numpy is absent
        column = column.cast(pa.float32())
    if of.is_integer(column.type) or of.is_floating(column.type) or of.is_boolean(column.type):
        return cast("list[Any]", column.to_pylist())
    return [_cli_plain(scalar) for scalar in column]


def _cli_plain(scalar: Any) -> Any:
    """An Arrow value as JSON has it."""
    import base64

    of, dtype = pa.types, scalar.type
    if not scalar.is_valid:
        return None
    if of.is_map(dtype):
        return {str(_cli_plain(pair["key"])): _cli_plain(pair["value"]) for pair in scalar.values}
    if of.is_struct(dtype):
        return {field.name: _cli_plain(scalar[i]) for i, field in enumerate(dtype)}
    if of.is_nested(dtype) and hasattr(scalar, "values"):
        return _cli_column(scalar.values)
    if of.is_dictionary(dtype):
        return _cli_plain(scalar.value)
    if of.is_float16(dtype):
        return scalar.cast(pa.float32()).as_py()
    if of.is_timestamp(dtype) or of.is_time(dtype) or of.is_duration(dtype):
        return _cli_temporal(scalar, dtype)
    value = scalar.as_py()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if isinstance(value, str | int | float) else str(value)


def _cli_temporal(scalar: Any, dtype: Any) -> str:
    """ISO 8601 with all its digits; the bare count of units for what Python's calendar does not reach."""
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[dtype.unit]
    if pa.types.is_duration(dtype):
        seconds, rest = divmod(abs(scalar.value), ticks)
        digits = f"{rest * (10**9 // ticks):09d}".rstrip("0")
        return f"{'-' if scalar.value < 0 else ''}PT{seconds}{'.' * bool(digits)}{digits}S"
    try:
        if dtype.unit != "ns":
            return cast(str, scalar.as_py().isoformat())
        whole = pa.timestamp("us", dtype.tz) if pa.types.is_timestamp(dtype) else pa.time64("us")
        text = pa.scalar(scalar.value // 1000, whole).as_py().isoformat(timespec="microseconds")
    except (ValueError, OverflowError):
        return str(scalar.value)
    end = text.index(".") + 7
    return f"{text[:end]}{scalar.value % 1000:03d}{text[end:]}"


# ---- the other side


def _cli_serve(options: Any) -> int:
    flags = [flag for flag in options.flags if flag != "--factory"]
    if __name__ == "__main__":  # run as a plain file: what the service imports by this file's name is this module
        sys.modules.setdefault(os.path.splitext(os.path.basename(__file__))[0], sys.modules[__name__])
    protocol = _cli_protocol(options.protocol_class)
    found = _cli_import(options.implementation)
    factory = options.factory or len(flags) != len(options.flags)
    implementation = _cli_make(found, options.implementation) if factory or isinstance(found, type) else found
    try:
        ProtocolBinding(protocol, implementation)
    except (TypeError, ValueError) as exc:  # before any descriptor moves: one readable message
        raise _CliError(str(exc), 2) from exc
    _door_run(protocol, implementation, flags, describe=True)
    return 0


def _cli_protocol(text: str) -> type:
    """The class that `MODULE:PROTOCOL` names."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    protocol = _cli_import(text)
    if not isinstance(protocol, type):
        raise _CliError(f"{text} is not a Protocol class", 2)
    return protocol


def _cli_make(maker: Any, text: str) -> Any:
    """Call a class or factory; what goes wrong inside it keeps its traceback."""
    import inspect

    if _methods_is_protocol(maker):
        raise _CliError(f"{text} is a Protocol; the implementation comes second: MODULE:PROTOCOL MODULE:IMPL", 2)
    try:
        inspect.signature(maker).bind()
    except (TypeError, ValueError) as exc:
        raise _CliError(f"{text} cannot be called without arguments: {exc}", 2) from exc
    return maker()


def _cli_import(text: str) -> Any:
    """The object that `package.module:Name` means."""
    module_name, colon, path = text.partition(":")
    if not (module_name and colon and path):
        raise _CliError(f"expected MODULE:NAME, got {text!r}", 2)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module_name}.".startswith(f"{exc.name}."):
            raise  # the module is there; what it imports is not
        hint = f"; it is imported, not run: {module_name[:-3]}:{path}" if module_name.endswith(".py") else ""
        raise _CliError(f"{text}: no module named {exc.name!r}{hint}", 2) from None
    except TypeError as exc:  # a relative name
        raise _CliError(f"{text}: {exc}", 2) from None
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError as exc:
            raise _CliError(f"{text}: {exc}", 2) from None
    return found


def _cli_tool(name: str) -> Any:
    """A command that lives in the extras."""
    load = getattr(sys.modules[__name__], "_extras_load")  # noqa: B009 (room 17)
    try:
        return load(f"tools.{name}", f"the {name} command")
    except ImportError as exc:
        raise _CliError(str(exc)) from exc


def _cli_launch(options: Any) -> int:
    return cast(int, _cli_tool("launch").main(options.flags))


def _cli_doctor(options: Any) -> int:
    tool = _cli_tool("doctor")
    options.timeout = options.timeout or 10.0
    kind = next((flag for flag in ("cmd", "unix", "tcp", "url") if getattr(options, flag) is not None), None)
    name, against = options.protocol, None
    if name and ":" in name:  # a caller's own
        against, name = _cli_protocol(name), None
    report = tool.examine(lambda: _cli_dial(options), kind, protocol=name, against=against, timeout=options.timeout)
    with _cli_output(options) as out:
        out.write(f"{report}\n" if _cli_format(options, out) == "table" else _cli_json(report.to_json()) + "\n")
    return 0 if report.healthy else 1


def _cli_stub(options: Any) -> int:
    tool = _cli_tool("stub")
    with _cli_connect(options) as transport:
        found = _cli_ask(transport, options)
    try:
        text = tool.generate_stub(found)
    except ValueError as exc:
        raise _CliError(f"the service cannot be written as a Protocol: {_log_line(str(exc))}") from exc
    with _cli_output(options) as out:
        out.write(text)
    return 0


def _cli_demo(options: Any) -> int:
    protocol, implementation = _cli_demo_service()
    if options.as_worker:
        _door_run(protocol, implementation, [], describe=True)
        return 0
    myself = ["-m", __spec__.name] if __spec__ is not None else [os.path.abspath(__file__)]
    command = [sys.executable, *myself, "demo", "--as-worker"]

    def show(message: Message) -> None:
        print(f"  the worker says [{message.level.value}] {message.message}")

    transport = SubprocessTransport(command)
    with RpcConnection(protocol, transport, show) as calc:
        print(f"Worker started: process {transport.proc.pid}")
        print(f"calc.add(1.5, 2.0) = {calc.add(1.5, 2.0)}")
        print("calc.countdown(3):")
        with calc.countdown(3) as stream:
            for item in stream:
                print(f"  batch {item.batch.to_pydict()}")
        try:
            calc.divide(1.0, 0.0)
        except RpcError as exc:
            print(f"calc.divide(1.0, 0.0) raised {type(exc).__name__}: {exc.error_message}")
        print(f"What the worker says it offers:\n{introspect(transport)}")
    return 0


def _cli_demo_service() -> tuple[Any, Any]:
    class Calc(Protocol):
        def add(self, a: float, b: float) -> float: ...

        def divide(self, a: float, b: float) -> float: ...

        def countdown(self, start: int) -> Stream[ProducerState, None]: ...

    class Countdown(ProducerState):
        def __init__(self, left: int) -> None:
            self.left = left

        def produce(self, out: OutputCollector, ctx: CallContext) -> None:
            if self.left == 0:
                out.finish()
                return
            out.emit_pydict({"left": [self.left]})
            self.left -= 1

    class CalcImpl:
        def add(self, a: float, b: float, ctx: CallContext) -> float:
            ctx.client_log(Level.INFO, f"adding {a} and {b}")
            return a + b

        def divide(self, a: float, b: float) -> float:
            return a / b

        def countdown(self, start: int) -> Stream[ProducerState, None]:
            return Stream(pa.schema([("left", pa.int64())]), Countdown(start))

    return Calc, CalcImpl()


# ==== 17. EXTRAS ======================================================================================================
# Uses: 3, 11, 12, 16. The way to vgi_rpc_extras: names whose module needs a third-party package are found at first use.
#
#   vgi_rpc.http_connect       _extras_get -> _extras_load("http") -> vgi_rpc_extras.http, bound to this module
#   which folder               the one beside this file (`<own package>.vgi_rpc_extras`), else the installed one
#   something is missing       ImportError: the name, the missing package, what to install
#   a broken extra             its own error; never "not installed"

# fmt: off
__all__ = [  # noqa: RUF022 (plain order of the characters)
    "AnnotatedBatch", "ArrowSerializableDataclass", "ArrowType", "AuthContext", "AuthUnavailableError", "BadRequest",
    "BatchStore", "CALL_STATE_KEY", "CANCEL_KEY", "CLIENT_ERROR_CODES", "CallContext", "CallHook", "CallStatistics",
    "Channel", "ClientLog", "Code", "ConnectionLostError", "DEADLINE_KEY", "DESCRIBE_VERSION", "DeadlineExceededError",
    "DispatchHook", "EMPTY_SCHEMA", "ERROR_CODE_KEY", "ERROR_DETAILS_KEY", "ERROR_KIND_KEY",
    "ERROR_KIND_METHOD_NOT_IMPLEMENTED", "ErrorDetail", "ErrorInfo", "ExchangeState", "ExternalBatch",
    "ExternalLocationError", "ExternalRef", "FieldViolation", "HASH_DOMAIN", "HEADER_SIZE", "Help", "HelpLink",
    "HostedProtocol", "IDEMPOTENCY_LEVELS", "IPCError", "IPC_READ_OPTIONS", "IPC_WRITE_OPTIONS", "IpcLimits",
    "IpcValidation", "LEGACY_DESCRIBE_METHOD_NAME", "LEGACY_DESCRIBE_VERSION_KEY", "LEGACY_PROTOCOL_HASH_KEY",
    "LEGACY_PROTOCOL_NAME_KEY", "LOCATION_FETCH_MS_KEY", "LOCATION_KEY", "LOCATION_SHA256_KEY", "LOCATION_SOURCE_KEY",
    "LOG_EXTRA_KEY", "LOG_LEVEL_KEY", "LOG_MESSAGE_KEY", "Level", "LocalizedMessage", "MAX_ALLOCS",
    "MAX_ERROR_DETAILS_BYTES", "MAX_PROTOCOL_NAME_BYTES", "MAX_TRACEBACK_CHARS", "MAX_TRACEBACK_FRAMES", "Message",
    "MethodDescription", "MethodInfo", "MethodNotImplementedError", "MethodType", "OTEL_SERVER_ERROR_CODES",
    "OutputCollector", "PROTOCOL_KEY", "PROTOCOL_NAME_RE", "PROTOCOL_VERSION_KEY", "PipeTransport", "PoolMetrics",
    "PreconditionFailure", "PreconditionViolation", "ProducerState", "ProtocolBinding", "ProtocolError", "ProtocolList",
    "ProtocolNotSpecifiedError", "ProtocolNotSupportedError", "ProtocolSummary", "ProtocolVersionError", "QuotaFailure",
    "QuotaViolation", "REDACTED", "REFLECTION_PROTOCOL_NAME", "REQUEST_ID_KEY", "REQUEST_VERSION",
    "REQUEST_VERSION_KEY", "RESERVED_PROTOCOL_PREFIX", "RPC_METHOD_KEY", "Reflection", "ReflectionImpl",
    "ReflectionNotSupportedError", "RequestTransport", "ResourceInfo", "RetryInfo", "RpcArgumentError", "RpcConnection",
    "RpcError", "RpcMethodInfo", "RpcProxy", "RpcServer", "RpcTransport", "SEMVER_REGEX", "SERVER_ID_KEY",
    "SHM_LENGTH_KEY", "SHM_MIN_BATCH_BYTES", "SHM_OFFSET_KEY", "SHM_SEGMENT_NAME_KEY", "SHM_SEGMENT_SIZE_KEY",
    "SHM_SOURCE_KEY", "STATE_KEY", "STREAM_KINDS", "ServerDrainingError", "ServerRequest", "ServiceDescription",
    "SessionLostError", "ShmAllocator", "ShmPipeTransport", "ShmSegment", "StatusError", "StderrMode", "Stream",
    "StreamCall", "StreamReply", "StreamSession", "StreamState", "SubprocessTransport", "TRACEPARENT_KEY",
    "TRACESTATE_KEY", "TRANSIENT_ERROR_CODES", "TRANSPORT_OPTIONS_METHOD_NAME", "TRANSPORT_SHM_KEY",
    "TYPE_TOKEN_VERSION", "TcpTransport", "Transient", "TransportKind", "UnixTransport", "UnsupportedArrowTypeError",
    "ValidatedReader", "VersionError", "VgiAccessLogFormatter", "VgiJsonFormatter", "WireServiceDescription",
    "WorkerDiedError", "WorkerPool", "WrongProcessError", "access_fields", "apply_claim_redaction", "batch_from_json",
    "batch_to_json", "canonical_json", "check_state_class", "compare_protocols", "compute_protocol_hash", "connect",
    "current_auth", "decode_error_details", "describe_protocol", "describe_rpc", "deserialize_record_batch",
    "empty_batch", "encode_error_details", "encode_metadata", "error_code_of", "error_details_of", "error_kind_of",
    "exception_str", "externalize", "field_token", "introspect", "is_external_location_batch", "is_retryable",
    "is_shm_pointer_batch", "list_protocols", "main", "make_external_location_batch", "make_pipe_pair",
    "make_shm_pointer_batch", "make_tcp_pair", "make_unix_pair", "map_calls", "maybe_write_to_shm", "merge_metadata",
    "new_ipc_stream", "no_redaction", "parse_error_detail", "parse_version", "ping", "protocol_description",
    "read_answer", "read_reply", "read_single_record_batch", "redact_claims", "resolve_external_location",
    "resolve_shm_batch", "rpc_methods", "run_server", "schema_tokens", "seal_state", "serialize_record_batch",
    "serialize_record_batch_bytes", "serve_pipe", "serve_stdio", "serve_tcp", "serve_tcp_pipe", "serve_unix",
    "serve_unix_pipe", "set_claim_redactor", "shm_available", "strip_keys", "submit", "tcp_connect", "type_token",
    "unix_connect", "validate_batch", "validate_protocol_name", "with_options", "with_transport",
    "worker_transport_metadata",
]
# fmt: on

if TYPE_CHECKING:  # what __getattr__ gives
    from typing import Any as MethodInfo
    from typing import Any as ProtocolList
    from typing import Any as ProtocolSummary
    from typing import Any as Reflection
    from typing import Any as ValidatedReader
    from typing import Any as WireServiceDescription
    from typing import Any as read_single_record_batch

# Module of vgi_rpc_extras: the pip extra, the third-party modules it imports, the names it gives.
_EXTRAS_NAMES: Final = {
    "http": (
        "http",
        "",
        "http_connect http_introspect http_capabilities AuthenticationError HttpRetryConfig HttpServerCapabilities"
        " HttpStreamSession HttpTransientError MAX_REQUEST_BYTES_HEADER MAX_UPLOAD_BYTES_HEADER UPLOAD_URL_HEADER"
        " request_upload_urls",
    ),
    "http.server": ("http", "falcon cryptography", "make_wsgi_app"),
    "http.serve": ("http", "falcon cryptography waitress", "serve_http"),
    "http.testing": ("http", "falcon cryptography", "make_sync_client"),
    "auth.bearer": ("http", "", "bearer_authenticate bearer_authenticate_static chain_authenticate"),
    "auth.jwt": ("oauth", "joserfc httpx", "jwt_authenticate"),
    "auth.oauth": (
        "oauth",
        "httpx",
        "OAuthResourceMetadata OAuthResourceMetadataResponse fetch_oauth_metadata http_oauth_metadata"
        " parse_resource_metadata_url",
    ),
    "storage": (
        "external",
        "httpx",
        "ClientExternalConfig Compression ExternalLocationConfig ExternalStorage FetchConfig ServerExternalConfig"
        " UploadUrl UploadUrlProvider fetch_url https_only_validator maybe_externalize_batch"
        " maybe_externalize_collector predict_externalize_bytes_for_batch predict_externalize_bytes_for_collector"
        " publish_external redact_url",
    ),
    "storage.s3": ("s3", "boto3", "S3Storage"),
    "storage.gcs": ("gcs", "google.cloud.storage", "GCSStorage"),
    "otel": ("otel", "opentelemetry.trace", "OtelConfig instrument_client instrument_server instrument_store"),
    "sentry": ("sentry", "sentry_sdk", "SentryConfig instrument_server_sentry"),
    "access_log": ("", "", "configure_access_log AccessLogSampler DroppingQueueHandler"),
    "readers": ("", "", "ValidatedReader read_single_record_batch"),
    "tools.stub": ("", "", "generate_stub protocol_from_description"),
}
_EXTRAS_WHERE: Final = {
    name: (module, extra) for module, (extra, _, names) in _EXTRAS_NAMES.items() for name in names.split()
}
# The reflection messages of room 11: dataclasses, which are made when first asked for.
_EXTRAS_LAZY_CORE: Final = frozenset(
    ("MethodInfo", "ProtocolList", "ProtocolSummary", "Reflection", "WireServiceDescription")
)


def _extras_get(name: str) -> Any:
    """The module's `__getattr__`; the object of an extra is an ordinary name of this module from then on."""
    if name in _EXTRAS_LAZY_CORE:
        return getattr(_describe_wire(), name)
    if name not in _EXTRAS_WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extra = _EXTRAS_WHERE[name]
    found = globals()[name] = getattr(_extras_load(module, name, extra), name)
    return found


def _extras_load(module: str, wanted: str, extra: str = "") -> Any:
    """A module of vgi_rpc_extras, bound to this core. ImportError says what `wanted` needs and how to get it."""
    package = _extras_package(wanted, extra)
    name = f"{package.__name__}.{module}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        missing = exc.name or ""
        inside = missing.startswith(f"{package.__name__}.") and not f"{name}.".startswith(f"{missing}.")
        if inside or not missing:
            raise  # a fault of the extra itself
        raise _extras_missing(wanted, missing, extra) from exc


def _extras_sentry(server: RpcServer) -> None:
    """Report a new server's failures to Sentry, if the application has initialised its SDK (API.md section 7)."""
    sdk = sys.modules.get("sentry_sdk")
    if sdk is None or not getattr(sdk, "is_initialized", bool)():
        return
    try:
        _extras_load("sentry", "SentryConfig", "sentry").attach_by_default(server)
    except ImportError:  # a lone file: then the application has other plans for its Sentry
        _LOG_RPC.debug("Sentry is not attached", exc_info=True)


_server_created.append(_extras_sentry)


def _extras_places() -> list[str]:
    """Where the folder may be: beside this file first."""
    own = __name__.rpartition(".")[0]
    return [f"{own}.vgi_rpc_extras", "vgi_rpc_extras"] if own else ["vgi_rpc_extras"]


def _extras_package(wanted: str, extra: str) -> Any:
    for name in _extras_places():
        try:
            package: Any = importlib.import_module(name)
        except ModuleNotFoundError as exc:
            if exc.name != name:
                raise
            continue
        package.bind(sys.modules[__name__])
        return package
    raise _extras_missing(wanted, "vgi_rpc_extras", extra)


def _extras_missing(wanted: str, package: str, extra: str) -> ImportError:
    distribution = f"vgi-rpc-onefile[{extra}]" if extra else "vgi-rpc-onefile"
    hint = " (a lone copied file has no HTTP and no other extras: copy the folder too)"
    alone = hint if package == "vgi_rpc_extras" else ""
    return ImportError(
        f"{wanted} needs the package {package!r}, which is not installed{alone}: pip install '{distribution}'",
        name=package,
    )


if not TYPE_CHECKING:  # a checker would take any name for existing
    __getattr__ = _extras_get


def __dir__() -> list[str]:
    found = {module for module, (_, needs, _) in _EXTRAS_NAMES.items() if _extras_can_import(module, needs)}
    lazy = (name for name, (module, _) in _EXTRAS_WHERE.items() if module in found)
    return sorted({*globals(), *_EXTRAS_LAZY_CORE, *lazy})


def _extras_can_import(module: str, needs: str) -> bool:
    """Whether the folder has the module and its third-party packages are installed; imports none of them."""
    import importlib.util

    for package in _extras_places():
        try:
            if importlib.util.find_spec(package) is not None:
                names = [f"{package}.{module}", *needs.split()]
                return all(importlib.util.find_spec(name) is not None for name in names)
        except (ImportError, ValueError):
            return False
    return False


if __name__ == "__main__":
    # By its proper name, so that what a service imports is the same module.
    sys.exit(importlib.import_module(__spec__.name).main() if __spec__ is not None else main())
