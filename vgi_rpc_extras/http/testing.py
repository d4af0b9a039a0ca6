# Needs: falcon. Install: pip install 'vgi-rpc-onefile[http]'.
"""The whole HTTP stack in one process, without a socket (http.md section 15.4).

client = make_sync_client(RpcServer(Calc, CalcImpl()))
with http_connect(Calc, client=client) as calc: ...
"""

from __future__ import annotations

import io
import os
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..common.coding import decode_content_encoding
from .server import make_wsgi_app

if TYPE_CHECKING:
    import vgi_rpc as core

__all__ = ["TestClient", "TestResponse", "make_sync_client"]


class _Headers(dict[str, str]):
    """Header fields by their lower-case names."""

    def __getitem__(self, name: str) -> str:
        return super().__getitem__(name.lower())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().__contains__(name.lower())

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


class TestResponse:
    """A response, complete; `content` is decoded, `raw` is as it would travel."""

    __test__ = False  # not a test of pytest's

    def __init__(self, status_code: int, headers: list[tuple[str, str]], raw: bytes) -> None:
        self.status_code = status_code
        self.raw_headers = headers
        self.headers: Mapping[str, str] = _Headers((name.lower(), value) for name, value in headers)
        self.raw = raw
        self.content = decode_content_encoding(raw, self.headers.get("Content-Encoding"))

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content.decode()


class TestClient:
    """Calls a WSGI application; the host of a URL does not matter."""

    __test__ = False

    def __init__(
        self, app: Callable[..., Iterable[bytes]], default_headers: Mapping[str, str] | None = None, prefix: str = ""
    ) -> None:
        self.prefix = prefix
        self._app = app
        self._default_headers = dict(default_headers or {})

    def request(
        self, method: str, url: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> TestResponse:
        """Send one request."""
        status_code, fields = 0, [("", "")]

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[..., None]:
            nonlocal status_code, fields
            status_code, fields = int(status[:3]), headers
            return lambda data: None

        body = self._app(self._environ(method, url, content, headers or {}), start_response)
        try:
            raw = b"".join(body)
        finally:
            close = getattr(body, "close", None)
            if close is not None:
                close()
        return TestResponse(status_code, fields, raw)

    def post(self, url: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None) -> TestResponse:
        """POST."""
        return self.request("POST", url, content=content, headers=headers)

    def get(self, url: str, *, headers: Mapping[str, str] | None = None) -> TestResponse:
        """GET."""
        return self.request("GET", url, headers=headers)

    def options(self, url: str, *, headers: Mapping[str, str] | None = None) -> TestResponse:
        """OPTIONS."""
        return self.request("OPTIONS", url, headers=headers)

    def delete(self, url: str, *, headers: Mapping[str, str] | None = None) -> TestResponse:
        """DELETE."""
        return self.request("DELETE", url, headers=headers)

    def put(self, url: str, *, content: bytes = b"", headers: Mapping[str, str] | None = None) -> TestResponse:
        """404: there is no storage here."""
        return TestResponse(404, [], b"")

    def close(self) -> None:
        """Nothing to release."""

    def _environ(self, method: str, url: str, content: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        parts = urllib.parse.urlsplit(url)
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            # WSGI hands the decoded path over as latin-1 (PEP 3333).
            "PATH_INFO": urllib.parse.unquote_to_bytes(parts.path or "/").decode("latin-1"),
            "QUERY_STRING": parts.query,
            "REQUEST_URI": parts.path or "/",
            "SERVER_NAME": "testserver",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(content),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if content or method in ("POST", "PUT"):
            environ["CONTENT_LENGTH"] = str(len(content))
        for name, value in (*self._default_headers.items(), *headers.items()):
            key = name.upper().replace("-", "_")
            environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value
        return environ


def make_sync_client(
    server: core.RpcServer, *, default_headers: Mapping[str, str] | None = None, prefix: str = "", **options: Any
) -> TestClient:
    """A client of `server` in this process; `options` are those of make_wsgi_app."""
    # A key of its own is what a test wants: without the warning.
    if options.get("token_key") is None:
        options["token_key"] = os.urandom(32)
    return TestClient(make_wsgi_app(server, prefix=prefix, **options), default_headers, prefix)
