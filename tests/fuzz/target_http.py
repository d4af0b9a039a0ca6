"""Requests to the WSGI application: Arrow bodies of calls and streams, JSON of `/__call__`; no 500 by accident."""

from __future__ import annotations

import io
import json
import random
import sys
from typing import Any

import pyarrow as pa
from pyarrow import ipc

from tests.fuzz import service, target_requests, target_values
from tests.fuzz.child import Box, Finding
from tests.fuzz.judge import LIMITS, core
from tests.fuzz.messages import Corpus, write_stream

ARROW = "application/vnd.apache.arrow.stream"
ANSWERED = (200, 400, 404, 405, 413, 415, 422)


class Target:
    """One request a case, to the application itself; no socket."""

    def __init__(self, seed: str, box: Box) -> None:
        from vgi_rpc_extras.http import make_wsgi_app

        self.box = box
        self.server = core.RpcServer(service.Service, service.Impl(), limits=LIMITS, enable_describe=True)
        self.app = make_wsgi_app(self.server, max_request_bytes=1 << 20)
        self.nested = Corpus.of(f"http {seed}", 60, depth=2)
        rng = random.Random(f"http {seed}")
        self.names = [rng.choice(target_requests.NAMES) for _ in range(80)]
        self.corpus = Corpus(
            [service.request(name, target_requests.arguments(rng, name, self.nested)) for name in self.names]
        )
        self.number = 1

    def case(self, rng: random.Random) -> str:
        """A call, a stream or JSON."""
        how = rng.random()
        if how < 0.45:
            i = rng.randrange(len(self.names))
            data = self.corpus.mutant(rng, i)
            path = f"/Service/{self.names[i]}" + ("/init" if self.names[i] == "count" else "")
            status, body = self.post(path, data, ARROW)
        elif how < 0.6:
            status, body = self.exchange(rng)
        else:
            status, body = self.json(rng)
        told = status == 500 and body.startswith(b'{"error": {"code": ')  # what a method raised, as JSON calls say it
        if status not in ANSWERED and not told:
            raise Finding(f"status {status}: {body[:500]!r}")
        self.number += 1
        honest, answer = self.post("/Service/add", service.request("add", [self.number, 1]), ARROW, watched=False)
        with ipc.open_stream(answer) as reader:
            found = reader.read_next_batch().to_pydict()
        if honest != 200 or found != {"result": [self.number + 1]}:
            raise Finding(f"an honest call was answered with {honest} {found}")
        return "answered" if status == 200 and b"EXCEPTION" not in body and b'"error"' not in body[:9] else "refused"

    def exchange(self, rng: random.Random) -> tuple[int, bytes]:
        """Open a stream, and a turn of it with the token that it gave."""
        schema = pa.schema([("n", pa.int64())])
        service.Impl.declared = schema
        status, body = self.post("/Service/go/init", service.request("go", []), ARROW, watched=False)
        with ipc.open_stream(body) as reader:
            metadata = dict(reader.read_next_batch_with_custom_metadata()[1] or {})
        if status != 200:
            raise Finding(f"init: {status}")
        batch = pa.RecordBatch.from_pydict({"n": [1, None, 3]}, schema=schema)
        mutant = Corpus([write_stream(schema, [(batch, metadata)])]).mutant(rng)
        service.Impl.inputs.clear()
        answer = self.post("/Service/go/exchange", mutant, ARROW)
        for given in service.Impl.inputs:
            given.validate(full=True)
            if not given.schema.equals(schema):
                raise Finding(f"a method was given {given.schema}")
        return answer

    def json(self, rng: random.Random) -> tuple[int, bytes]:
        """A call of the describe page."""
        name = rng.choice([name for name in target_requests.NAMES if name != "count"])
        info = service.METHODS[name]
        args: dict[str, Any] = {f.name: target_values.good_value(rng, f.type) for f in info.params_schema}
        for key in args:
            if rng.random() < 0.5:
                args[key] = target_values.spoiled(rng, args[key], False)
        whole: Any = {"protocol": "Service", "method": name, "args": args}
        if rng.random() < 0.1:
            whole = target_values.spoiled(rng, whole, False)
        text = json.dumps(whole).encode()
        if rng.random() < 0.05:
            text = text[: rng.randrange(len(text))] + rng.choice((b"", b"\xff", b"[" * 5000))
        return self.post("/__call__", text, "application/json")

    def post(self, path: str, data: bytes, kind: str, watched: bool = True) -> tuple[int, bytes]:
        """One request."""
        environ = {
            "REQUEST_METHOD": "POST",
            "PATH_INFO": path,
            "SCRIPT_NAME": "",
            "QUERY_STRING": "",
            "SERVER_NAME": "127.0.0.1",
            "SERVER_PORT": "80",
            "HTTP_HOST": "127.0.0.1",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "CONTENT_TYPE": kind,
            "CONTENT_LENGTH": str(len(data)),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(data),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        found: list[str] = []

        def start(status: str, headers: Any, exc_info: Any = None) -> None:
            found.append(status)

        def call() -> bytes:
            pieces = self.app(environ, start)
            try:
                return b"".join(pieces)
            finally:
                close = getattr(pieces, "close", None)
                if close is not None:
                    close()

        if not watched:
            body = call()
        else:
            with self.box.ours(data):
                body = call()
        return int(found[-1].split()[0]), body
