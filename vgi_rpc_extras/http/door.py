# Needs: falcon. Used by server.py.
"""What happens before and after every request, whatever it is for: its name, its size, who calls, and the headers that
every response carries (http.md sections 3, 10 and 11)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import falcon

from .. import core as _bound_core
from ..common import names

if TYPE_CHECKING:
    import vgi_rpc as core

    from ..auth.guard import AuthGuard
else:
    core = _bound_core()

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}\Z")
# Below these paths nobody is asked who they are, so that no protocol can be there.
OPEN_NAMES = frozenset({"health", "_oauth"})
_MISDIRECTED = (
    "This server does not go by that name. Without authentication a service on a loopback address answers to the names"
    " of its machine only; serve_http(allowed_hosts=[...]) or VGI_HTTP_ALLOWED_HOSTS lists others."
)


class Door:
    """Middleware: request id, size, who calls; on the way out, what every response carries."""

    def __init__(
        self,
        server: core.RpcServer,
        prefix: str,
        capabilities: list[tuple[str, str]],
        max_request: int,
        guard: AuthGuard,
        cors: Cors | None,
        sticky: bool,
    ) -> None:
        self.prefix = prefix
        self.health = f"{prefix}/health"
        self.max_request = max_request
        self._guard = guard
        self._headers = capabilities
        self._hosted = server.bindings
        self._cors = cors
        self._sticky = sticky
        self.draining = False
        self.key_id: str | None = None  # of a key that this process made for itself
        self._hosts: frozenset[str] | None = None

    def allow_hosts(self, hosts: Iterable[str]) -> None:
        """Answer requests only that name one of these hosts."""
        allowed = frozenset(host.strip().lower() for host in hosts)
        self._hosts = None if "*" in allowed else allowed

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        env, context = req.env, req.context
        wanted = env.get("HTTP_X_REQUEST_ID")
        context.request_id = wanted if wanted and _REQUEST_ID.match(wanted) else os.urandom(8).hex()
        if self._hosts is not None and not _is_named(env.get("HTTP_HOST", ""), self._hosts):
            raise falcon.HTTPError(falcon.HTTP_421, title="Misdirected Request", description=_MISDIRECTED)
        if self.draining and not self._may_go_on(req):
            raise falcon.HTTPServiceUnavailable(
                description="this server is shutting down", headers={"Retry-After": "1"}
            )
        length = req.content_length
        if length is not None and length > self.max_request and not self._guard.is_exempt(req.method, req.path):
            raise too_large(self.max_request)
        self._guard.process_request(req, resp)

    @property
    def guards(self) -> bool:
        """Whether anybody is asked who they are."""
        return self._guard.guards

    def ask(self, environ: dict[str, Any]) -> core.AuthContext | Exception | None:
        """Who calls, or why that is not known; None: nobody is asked for this path."""
        req = falcon.Request(environ)
        return self._guard.ask(req) if self._guard.asks(req) else None

    def _may_go_on(self, req: falcon.Request) -> bool:
        """What is answered while draining, too: health tells of it itself, and open sessions go on."""
        if req.path == self.health and req.method != "OPTIONS":
            return True
        return self._sticky and ("HTTP_VGI_SESSION" in req.env or "HTTP_VGI_SESSION_ACCEPT" in req.env)

    def process_resource(
        self, req: falcon.Request, resp: falcon.Response, resource: object, params: dict[str, Any]
    ) -> None:
        if "protocol" not in params:
            return
        if params["protocol"] in OPEN_NAMES:
            raise falcon.HTTPNotFound
        if req.method not in ("POST", "OPTIONS"):
            if params["protocol"] in self._hosted:
                raise falcon.HTTPMethodNotAllowed(["POST"])
            raise falcon.HTTPNotFound

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        resp.set_headers(self._headers)
        resp.set_header(names.REQUEST_ID_HEADER, getattr(req.context, "request_id", ""))
        if req.method == "OPTIONS":
            resp.set_header("Cache-Control", "public, max-age=300")
            if self.key_id is not None:
                resp.set_header(names.OWN_KEY_HEADER, self.key_id)
        if self._cors is not None:
            self._cors.apply(req, resp)


def _is_named(host: str, hosts: frozenset[str]) -> bool:
    """Whether a Host header names one of the hosts. Without one it is no browser's; nor is a bare word, as nginx writes
    it for an upstream: a browser that is led to this port writes the port, too (RFC 9110 section 7.2)."""
    if host in hosts:
        return True
    name = host.strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].removesuffix(".")
    return name in hosts or name.endswith(".localhost") or not re.search(r"[.:]", host)


class Cors:
    """Cross-origin headers (http.md section 11)."""

    def __init__(
        self,
        origins: str | Iterable[str],
        max_age: int | None,
        resource_policy: str | None,
        exposed: Sequence[str],
    ) -> None:
        self._origins = frozenset([origins] if isinstance(origins, str) else origins)
        self._any = "*" in self._origins
        self._max_age = None if max_age is None else str(max_age)
        self._policy = resource_policy
        always = ("WWW-Authenticate", names.REQUEST_ID_HEADER, names.CUSTOM_CONTENT_ENCODING_HEADER)
        errors = (names.RPC_ERROR_HEADER, names.AUTH_REASON_HEADER, names.AUTH_PROXY_REQUIRED_HEADER)
        self._exposed = ", ".join([*always, *errors, *exposed])

    def apply(self, req: falcon.Request, resp: falcon.Response) -> None:
        if self._policy is not None:
            resp.set_header("Cross-Origin-Resource-Policy", self._policy)
        if not self._any:
            resp.append_header("Vary", "Origin")
        origin = req.get_header("Origin")
        if origin is None or not (self._any or origin in self._origins):
            return
        resp.set_header("Access-Control-Allow-Origin", "*" if self._any else origin)
        resp.set_header("Access-Control-Expose-Headers", self._exposed)
        if req.method != "OPTIONS":
            return
        if self._max_age is not None:
            resp.set_header("Access-Control-Max-Age", self._max_age)
        if req.get_header("Access-Control-Request-Method"):
            methods = [m for m in (resp.get_header("Allow") or "").split(", ") if m and m != "OPTIONS"]
            resp.set_header("Access-Control-Allow-Methods", ", ".join(methods))
            wanted = req.get_header("Access-Control-Request-Headers")
            if wanted and _HEADER_NAMES.match(wanted):
                resp.set_header("Access-Control-Allow-Headers", wanted)


def too_large(limit: int, coding: str = "") -> falcon.HTTPError:
    """413, as JSON."""
    how = f"Decompressed {coding} request body" if coding else "Request body"
    return falcon.HTTPContentTooLarge(
        title="Request body exceeds max_request_bytes" + (" after decompression" if coding else ""),
        description=f"{how} exceeds the server's max_request_bytes={limit}.",
    )
