"""Room 1: the bytes every implementation of the wire agrees on (wire.md section 2, API.md section 2.10)."""

from __future__ import annotations

import pytest

from tests.core import core

KEYS = {
    "RPC_METHOD_KEY": b"vgi_rpc.method",
    "REQUEST_VERSION_KEY": b"vgi_rpc.request_version",
    "PROTOCOL_KEY": b"vgi_rpc.protocol",
    "PROTOCOL_VERSION_KEY": b"vgi_rpc.protocol_version",
    "REQUEST_ID_KEY": b"vgi_rpc.request_id",
    "SERVER_ID_KEY": b"vgi_rpc.server_id",
    "DEADLINE_KEY": b"x-timeout-us",
    "LOG_LEVEL_KEY": b"vgi_rpc.log_level",
    "LOG_MESSAGE_KEY": b"vgi_rpc.log_message",
    "LOG_EXTRA_KEY": b"vgi_rpc.log_extra",
    "ERROR_CODE_KEY": b"vgi_rpc.error_code",
    "ERROR_KIND_KEY": b"vgi_rpc.error_kind",
    "ERROR_DETAILS_KEY": b"vgi_rpc.error_details",
    "CANCEL_KEY": b"vgi_rpc.cancel",
    "STATE_KEY": b"vgi_rpc.stream_state#b64",
    "CALL_STATE_KEY": b"vgi_rpc.call_state#b64",
    "LOCATION_KEY": b"vgi_rpc.location",
    "LOCATION_SHA256_KEY": b"vgi_rpc.location.sha256",
    "LOCATION_FETCH_MS_KEY": b"vgi_rpc.location.fetch_ms",
    "LOCATION_SOURCE_KEY": b"vgi_rpc.location.source",
    "SHM_OFFSET_KEY": b"vgi_rpc.shm_offset",
    "SHM_LENGTH_KEY": b"vgi_rpc.shm_length",
    "SHM_SOURCE_KEY": b"vgi_rpc.shm_source",
    "SHM_SEGMENT_NAME_KEY": b"vgi_rpc.shm_segment_name",
    "SHM_SEGMENT_SIZE_KEY": b"vgi_rpc.shm_segment_size",
    "TRANSPORT_SHM_KEY": b"vgi_rpc.transport.shm",
    "LEGACY_PROTOCOL_NAME_KEY": b"vgi_rpc.protocol_name",
    "LEGACY_DESCRIBE_VERSION_KEY": b"vgi_rpc.describe_version",
    "LEGACY_PROTOCOL_HASH_KEY": b"vgi_rpc.protocol_hash",
    "TRACEPARENT_KEY": b"traceparent",
    "TRACESTATE_KEY": b"tracestate",
}
VALUES = {
    "REQUEST_VERSION": b"1",
    "ERROR_KIND_METHOD_NOT_IMPLEMENTED": b"method_not_implemented",
    "TRANSPORT_OPTIONS_METHOD_NAME": "__transport_options__",
    "LEGACY_DESCRIBE_METHOD_NAME": "__describe__",
    "REFLECTION_PROTOCOL_NAME": "vgi_rpc.Reflection.v1",
    "MAX_ERROR_DETAILS_BYTES": 4096,
    "MAX_TRACEBACK_CHARS": 16_000,
    "MAX_TRACEBACK_FRAMES": 5,
    "REDACTED": "[redacted]",
}


@pytest.mark.parametrize(("name", "expected"), [*KEYS.items(), *VALUES.items()])
def test_value_is_exact(name: str, expected: object) -> None:
    found = getattr(core, name)
    assert type(found) is type(expected)
    assert found == expected


def test_every_key_constant_is_in_the_table() -> None:
    assert {name for name in vars(core) if name.endswith("_KEY") and not name.startswith("_")} == set(KEYS)


def test_keys_are_distinct_and_ascii() -> None:
    found = [getattr(core, name) for name in KEYS]
    assert len(set(found)) == len(found)
    assert all(key.isascii() for key in found)


def test_empty_schema_has_no_columns_and_no_metadata() -> None:
    assert core.EMPTY_SCHEMA.names == []
    assert core.EMPTY_SCHEMA.metadata is None
    assert core._EMPTY_SCHEMA is core.EMPTY_SCHEMA


def test_end_of_stream_is_what_pyarrow_writes() -> None:
    sink = core.pa.BufferOutputStream()
    core.new_ipc_stream(sink, core.EMPTY_SCHEMA).close()
    assert sink.getvalue().to_pybytes().endswith(core._EOS)
    assert bytes.fromhex("ffffffff00000000") == core._EOS
