"""Room 6 is empty so far: a batch that is in shared memory must fail loudly, and servers must not promise any."""

from __future__ import annotations

import threading
from typing import Protocol

import pytest

from tests.core import core


class Svc(Protocol):
    def echo(self, text: str) -> str: ...


class Impl:
    def echo(self, text):
        return text


def exchange(metadata: dict[bytes, bytes], batch) -> tuple[object, dict[bytes, bytes]]:
    """One hand-made request to a real server; afterwards a good call on the same connection must be answered."""
    client, served = core.make_pipe_pair()
    thread = threading.Thread(target=core.RpcServer(Svc, Impl()).serve, args=(served,))
    thread.start()
    writer = core._IpcWriter(batch.schema)
    writer.write(batch, metadata)
    writer.close()
    client.channel.send(writer.take())
    reader = core._IpcReader(client.channel, core.IpcValidation.FULL)
    found = reader.read()
    reader.drain()
    assert core.RpcProxy(Svc, client).echo("alive") == "alive"
    client.close()
    thread.join(5)
    served.close()
    return found


def test_a_server_says_that_it_has_no_shared_memory() -> None:
    request = {b"vgi_rpc.method": b"__transport_options__", b"vgi_rpc.request_version": b"1"}
    _, answer = exchange(request, core.empty_batch(core.EMPTY_SCHEMA))
    assert answer[b"vgi_rpc.transport.shm"] == b"false" and answer[b"vgi_rpc.request_version"] == b"1"


def test_a_request_by_pointer_is_refused_and_never_taken_for_empty() -> None:
    request = {
        b"vgi_rpc.method": b"echo",
        b"vgi_rpc.request_version": b"1",
        b"vgi_rpc.protocol": b"Svc",
        b"vgi_rpc.shm_offset": b"65536",
        b"vgi_rpc.shm_length": b"304",
    }
    schema = core.rpc_methods(Svc)["echo"].params_schema
    _, answer = exchange(request, core.empty_batch(schema))
    assert answer[b"vgi_rpc.log_message"].startswith(b"RpcError: ProtocolError: Expected 1 row in request batch, got 0")


@pytest.mark.parametrize(
    ("key", "text"), [(b"vgi_rpc.shm_offset", "shared memory"), (b"vgi_rpc.location", "external storage")]
)
def test_a_result_by_pointer_raises(key: bytes, text: str) -> None:
    plan = core._WirePlan(core.rpc_methods(Svc)["echo"], "Svc", None)
    reply = core._WireReply(core.empty_batch(plan.info.result_schema), {key: b"1"}, None)
    with pytest.raises(core.RpcError, match=text):
        core._wire_value(plan, reply)
