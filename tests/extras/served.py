"""A server in a thread, and a proxy of it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    from tests.core import core


@contextlib.contextmanager
def served_proxy(
    protocol: Any, server: core.RpcServer, *, over: str = "pipe", auth: Any = None, **options: Any
) -> Iterator[Any]:
    """A proxy over a pipe or a Unix socket, with options of RpcConnection; the server's thread must end with it."""
    client, far = core.make_pipe_pair() if over == "pipe" else core.make_unix_pair()

    def serve() -> None:
        with contextlib.suppress(SystemExit):  # a method's own
            server.serve(far, auth=auth)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with core.RpcConnection(protocol, client, timeout=20, **options) as proxy:
            yield proxy
    finally:
        thread.join(10)
        far.close()
        assert not thread.is_alive()
