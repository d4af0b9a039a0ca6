# Needs: falcon, cryptography. Install: pip install 'vgi-rpc-onefile[http]'. Seam: ServerRequest of the core.
"""The WSGI application of an RpcServer (http.md sections 1 to 14).

    size -> authenticate -> decode -> session -> budget -> route -> content type -> kind -> parse -> dispatch -> limit
    -> encode

Nothing is unpacked for a caller who has not been let in, and nothing without a bound. Whatever can be known when the
application is made is made then: headers, pages, what a stream's state may be.

    _Door          middleware: the first two steps; while draining, 503; what every response carries
    RpcResource    the routes of methods: all other steps; a session (sessions.py) is held until the answer is made
    tokens.py      streams between their requests; nothing of them stays here
    uploads.py, json_calls.py, pages.py    the server's own paths
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import types
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import falcon

from .. import core as _bound_core
from ..auth.unauthorized import AuthGuard
from . import names, pages
from .coding import (
    DecompressionError,
    DecompressionLimitExceeded,
    Encoding,
    available_encodings,
    compress,
    decompress,
    negotiate,
)
from .json_calls import JsonCalls
from .names import ARROW_CONTENT_TYPE
from .sessions import SessionContext, SessionResource, Sessions, Visit, lost_body
from .tokens import StreamCall, StreamTokens, TokenScope, declared_states
from .uploads import UploadUrls, storage_capabilities, stores_results

if TYPE_CHECKING:
    import vgi_rpc as core

    from ..auth.bearer import Authenticate
    from ..auth.login import BrowserLogin
    from ..auth.oauth import OAuthResourceMetadata
    from ..otel import OtelConfig
    from ..sentry import SentryConfig
    from ..storage.store import UploadUrlProvider
else:
    core = _bound_core()

__all__ = ["ResponseTooLargeError", "make_wsgi_app"]

_LOG = logging.getLogger("vgi_rpc.http")
_LOG_ACCESS = logging.getLogger("vgi_rpc.access")
MAX_REQUEST_BYTES = 256 << 20  # where max_request_bytes is not set; applied, never advertised (DESIGN.md section 7)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z")
_BUDGET = re.compile(r"[1-9][0-9]{0,15}\Z", re.ASCII)
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]{1,4096}\Z")
# Below these paths nobody is asked who they are, so that no protocol can be there.
_OPEN_NAMES = frozenset({"health", "_oauth"})
_TOKEN_KEYS = (core.STATE_KEY, core.CALL_STATE_KEY)
_NO_NOTES: Mapping[str, Any] = types.MappingProxyType({})
_NO_VISIT: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


class ResponseTooLargeError(RuntimeError):
    """A reply is larger than the server or the caller allows."""

    error_code = core.Code.RESOURCE_EXHAUSTED


class HttpApp(falcon.App[Any, Any]):
    """The application, and what whoever serves it needs of it."""

    door: _Door
    sessions: Sessions | None = None

    def drain(self) -> None:
        """From now on new requests get 503 and no sessions are opened; open ones go on. Safe in a signal handler."""
        if self.sessions is not None:
            self.sessions.drain()
        self.door.draining = True


def make_wsgi_app(
    server: core.RpcServer,
    *,
    prefix: str = "",
    # streams between their requests
    token_key: bytes | None = None,
    token_ttl: int = 3600,
    call_state_cache_entries: int = 4096,
    # limits
    max_request_bytes: int | None = None,
    hosting_max_request_bytes: int | None = None,
    max_response_bytes: int | None = None,
    hosting_max_response_bytes: int | None = None,
    preferred_response_bytes: int | None = None,
    compression_level: int | None = 1,
    # who calls
    authenticate: Authenticate | None = None,
    proxy_proof_required: bool = False,
    proxy_auth_headers: Sequence[str] | None = None,
    oauth_resource_metadata: OAuthResourceMetadata | None = None,
    browser_login: BrowserLogin | None = None,
    # other sites
    cors_origins: str | Iterable[str] | None = None,
    cors_max_age: int | None = 7200,
    cors_resource_policy: str | None = "cross-origin",
    # pages
    enable_not_found_page: bool = True,
    enable_landing_page: bool = True,
    enable_describe_page: bool = True,
    enable_describe_calls: bool = True,
    enable_health_endpoint: bool = True,
    repo_url: str | None = None,
    # storage
    max_externalized_response_bytes: int | None = None,
    upload_url_provider: UploadUrlProvider | None = None,
    max_upload_bytes: int | None = None,
    # sticky sessions
    enable_sticky: bool = False,
    sticky_default_ttl: float = 300.0,
    sticky_echo_headers: Mapping[str, str] | None = None,
    sticky_max_ttl: float = 86_400.0,
    sticky_max_sessions: int = 10_000,
    sticky_max_per_principal: int = 1_000,
    # observers
    otel_config: OtelConfig | None = None,
    sentry_config: SentryConfig | None = None,
) -> HttpApp:
    """Make the WSGI application of `server`, for any WSGI server, behind any proxy (API.md section 3.2).

    Args:
        prefix: path below which everything is.
        token_key: seals the state of streams; every process that serves the same service needs the same one.
            None: a random one, so that only this process continues its streams.
        token_ttl: seconds that the state of a stream is good for; 0: for ever.
        call_state_cache_entries: calls whose unchanging half is kept in memory; 0: none.
        max_request_bytes, hosting_max_request_bytes: bytes of a request, encoded and decoded; the least wins. When
            neither is set, 256 MiB are accepted, and no number is advertised.
        max_response_bytes, hosting_max_response_bytes: decoded bytes of a response, 65536 to 2**53-1; the least wins.
        preferred_response_bytes: what methods are told to aim at.
        compression_level: of zstd responses; None: responses are not compressed, requests are decoded all the same.
        authenticate: says who calls (auth/bearer.py); ValueError or PermissionError: 401, AuthUnavailableError: 503,
            else 500.
        proxy_proof_required, proxy_auth_headers: tell callers that a proxy must add headers.
        oauth_resource_metadata: published (RFC 9728), and announced in every 401. With a client_id and `authenticate`,
            people without a credential are sent to log in.
        browser_login: that login, when it needs other settings than the defaults; of the same prefix and metadata.
        cors_origins: "*", an origin, or several; None: no CORS. `cors_max_age` in seconds.
        enable_describe_calls: the describe page may call unary methods with JSON.
        max_externalized_response_bytes: bytes that one response may keep in the server's `external_location`.
        upload_url_provider: gives clients places to upload requests to that are too large; S3Storage, say.
        max_upload_bytes: what clients are told about those; advice only.
        enable_sticky: methods may keep an object between the calls of a client (`ctx.open_session`); replicas then
            need server ids of their own, and requests must come back to the process that has the session.
        sticky_default_ttl, sticky_max_ttl: seconds from opening to the end of a session; the second is the most that a
            method may ask for.
        sticky_echo_headers: sent by clients with all later requests of a session, for whatever routes them.
        sticky_max_sessions, sticky_max_per_principal: sessions that may be open in this process, in all and of one
            caller; all anonymous callers are one.
        otel_config: instruments the server, and counts callers that are not let in.
        sentry_config: reports the server's failures to Sentry.

    Raises:
        TypeError: a config, or `oauth_resource_metadata`, that is not one.
        ValueError: a number out of range, a malformed prefix, a key that is too short.
    """
    if token_key is None:
        _LOG.warning("no token_key: streams cannot be continued by another process, nor after a restart")
        token_key = os.urandom(32)
    prefix = _check_prefix(prefix, server)
    limits = _Limits(
        _least("max_request_bytes", 1, max_request_bytes, hosting_max_request_bytes),
        _least("max_response_bytes", names.MIN_RESPONSE_BYTES, max_response_bytes, hosting_max_response_bytes),
        _least("preferred_response_bytes", names.MIN_RESPONSE_BYTES, preferred_response_bytes),
        max_externalized_response_bytes,
    )
    oauth = _OAuth(oauth_resource_metadata, browser_login, prefix, token_key, authenticate is not None)
    guard = AuthGuard(
        authenticate,
        prefix=prefix,
        proxy_auth_headers=proxy_auth_headers,
        proxy_proof_required=proxy_proof_required,
        challenge=oauth.challenge,
        login=oauth.login,
        on_failure=_failure_counter(otel_config, server),
    )
    produced = () if compression_level is None else available_encodings()
    capabilities = _capabilities(produced, limits, proxy_proof_required)
    capabilities += storage_capabilities(server, limits.externalized, upload_url_provider is not None, max_upload_bytes)
    sessions = None
    if enable_sticky:
        sessions = Sessions(
            server,
            token_key,
            default_ttl=sticky_default_ttl,
            max_ttl=sticky_max_ttl,
            max_sessions=sticky_max_sessions,
            max_per_principal=sticky_max_per_principal,
            echo_headers=sticky_echo_headers,
        )
        capabilities += sessions.capabilities()
    exposed = [name for name, _ in capabilities] + ([] if sessions is None else sessions.response_headers())
    cors = None if cors_origins is None else _Cors(cors_origins, cors_max_age, cors_resource_policy, exposed)
    door = _Door(server, prefix, capabilities, limits.request or MAX_REQUEST_BYTES, guard, cors, enable_sticky)
    tokens = StreamTokens(token_key, token_ttl, call_state_cache_entries, server.limits.max_metadata_entry_bytes)
    rpc = RpcResource(server, door, tokens, limits, produced, compression_level, sessions)
    app = HttpApp(middleware=[*_instrument(server, otel_config, sentry_config), door])
    app.door = door
    app.sessions = sessions
    app.resp_options.xml_error_serialization = False
    app.add_error_handler(Exception, _unexpected)
    oauth.add_routes(app)
    _add_calls(app, rpc, server, upload_url_provider)
    if enable_health_endpoint:
        app.add_route(door.health, _Health(server, door))
    not_found = pages.not_found(server, prefix) if enable_not_found_page else None
    app.add_sink(functools.partial(_unmatched, rpc, not_found))
    describes = enable_describe_page and server.describe_enabled
    if enable_landing_page:
        app.add_route(prefix or "/", _Page(pages.landing(server, prefix, describes=describes, repo_url=repo_url)))
    if describes:
        _add_describe_page(app, rpc, server, enable_describe_calls)
    return app


class _Limits(NamedTuple):
    """How many bytes one call may have; None: not limited here."""

    request: int | None
    response: int | None
    preferred: int | None
    externalized: int | None


def _least(name: str, low: int, own: int | None, hosting: int | None = None) -> int | None:
    names.check_size(name, own, low)
    names.check_size(f"hosting_{name}", hosting, low)
    return min((value for value in (own, hosting) if value is not None), default=None)


def _check_prefix(prefix: str, server: core.RpcServer) -> str:
    prefix = prefix.rstrip("/")
    if prefix and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", prefix):
        raise ValueError(f"prefix must be empty or like '/api/v1', got {prefix!r}")
    if taken := _OPEN_NAMES & server.bindings.keys():
        raise ValueError(f"a protocol cannot be named {min(taken)!r} over HTTP: that path is the server's own")
    return prefix


def _failure_counter(config: OtelConfig | None, server: core.RpcServer) -> Callable[[BaseException], None] | None:
    if config is None:
        return None
    from .. import otel  # whoever has a config has the package

    count = otel.make_auth_failure_counter(config, server.protocol_name)
    return lambda exc: count(None, type(exc).__name__)


def _instrument(
    server: core.RpcServer, otel_config: OtelConfig | None, sentry_config: SentryConfig | None
) -> list[Any]:
    """Attach what observes the server; the middleware that this needs."""
    middleware: list[Any] = []
    if otel_config is not None:
        from .. import otel

        otel.instrument_server(server, otel_config)
        middleware.append(otel.TraceMiddleware())
    if sentry_config is not None:
        from .. import sentry

        sentry.instrument_server_sentry(server, sentry_config)
    return middleware


def _add_calls(app: HttpApp, rpc: RpcResource, server: core.RpcServer, uploads: UploadUrlProvider | None) -> None:
    prefix = app.door.prefix
    method = f"{prefix}/{{protocol}}/{{method}}"
    app.add_route(method, rpc)
    app.add_route(f"{method}/init", rpc, suffix="init")
    app.add_route(f"{method}/exchange", rpc, suffix="exchange")
    if app.sessions is not None:
        app.add_route(names.reserved_path(names.SESSION_NAME, prefix=prefix), SessionResource(app.sessions))
    if uploads is not None:
        path = names.reserved_path(names.UPLOAD_URL_METHOD, prefix=prefix)
        app.add_route(f"{path}/init", UploadUrls(server, uploads, rpc.builtin))


def _add_describe_page(app: HttpApp, rpc: RpcResource, server: core.RpcServer, calls: bool) -> None:
    prefix = app.door.prefix
    app.add_route(f"{prefix}/describe", _Page(pages.describe(server, prefix, calls)))
    if calls:
        app.add_route(f"{prefix}/{pages.CALL_NAME}", JsonCalls(rpc))


def _capabilities(produced: tuple[Encoding, ...], limits: _Limits, proof: bool) -> list[tuple[str, str]]:
    """What goes on every response (http.md section 10); sessions and storage have more."""
    found = [
        (names.ACCEPT_MAX_RESPONSE_BYTES_SUPPORT_HEADER, "true"),
        (names.SUPPORTED_ENCODINGS_HEADER, ", ".join(produced)),
    ]
    if limits.request is not None:
        found.append((names.MAX_REQUEST_BYTES_HEADER, str(limits.request)))
    if limits.response is not None:
        found.append((names.MAX_RESPONSE_BYTES_HEADER, str(limits.response)))
    if proof:
        found.append((names.PROOF_REQUIRED_HEADER, "true"))
    return found


class _OAuth:
    """What OAuth metadata add to an application; their modules are loaded only then (auth.md sections 6 and 8)."""

    def __init__(
        self,
        metadata: OAuthResourceMetadata | None,
        login: BrowserLogin | None,
        prefix: str,
        token_key: bytes,
        guarded: bool,
    ) -> None:
        self.login = login
        self.challenge = ""
        self._routes: dict[str, object] = {}
        if metadata is None:
            if login is not None:
                raise ValueError("browser_login needs oauth_resource_metadata")
            return
        from ..auth import MetadataResource, OAuthResourceMetadata, build_www_authenticate, well_known_paths

        if not isinstance(metadata, OAuthResourceMetadata):
            raise TypeError(f"oauth_resource_metadata must be an OAuthResourceMetadata, got {type(metadata).__name__}")
        if login is None and guarded and metadata.client_id is not None:
            from ..auth import BrowserLogin

            self.login = BrowserLogin(metadata, prefix=prefix, token_key=token_key)
        if self.login is not None and self.login.prefix != prefix:
            raise ValueError(f"browser_login has the prefix {self.login.prefix!r}, the application {prefix!r}")
        self.challenge = build_www_authenticate(metadata, prefix=prefix)
        document = MetadataResource(metadata, prefix=prefix, browser_login=self.login is not None)
        self._routes = dict.fromkeys(well_known_paths(prefix), document)

    def add_routes(self, app: HttpApp) -> None:
        for path, resource in self._routes.items():
            app.add_route(path, resource)
        if self.login is not None:
            self.login.add_routes(app)


# ---- before and after every request


class _Door:
    """Middleware: request id, size, who calls; on the way out, what every response carries."""

    def __init__(
        self,
        server: core.RpcServer,
        prefix: str,
        capabilities: list[tuple[str, str]],
        max_request: int,
        guard: AuthGuard,
        cors: _Cors | None,
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

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        env, context = req.env, req.context
        wanted = env.get("HTTP_X_REQUEST_ID")
        context.request_id = wanted if wanted and _REQUEST_ID.match(wanted) else os.urandom(8).hex()
        if self.draining and not self._may_go_on(req):
            raise falcon.HTTPServiceUnavailable(
                description="this server is shutting down", headers={"Retry-After": "1"}
            )
        length = req.content_length
        if length is not None and length > self.max_request and not self._guard.is_exempt(req.method, req.path):
            raise too_large(self.max_request)
        self._guard.process_request(req, resp)

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
        if params["protocol"] in _OPEN_NAMES:
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
        if self._cors is not None:
            self._cors.apply(req, resp)


class _Cors:
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


def _unexpected(req: falcon.Request, resp: falcon.Response, exc: Exception, params: dict[str, Any]) -> NoReturn:
    _LOG.error("%s %s failed", req.method, req.path, exc_info=exc)
    raise falcon.HTTPInternalServerError


# ---- the calls


class _Refused(Exception):
    """A request that is not dispatched: the status, and what the caller is told (http.md section 8)."""

    def __init__(self, status: int, exc: Exception) -> None:
        self.status = status
        self.exc = exc


class _HttpContext(SessionContext):
    """What a unary method over HTTP sees: it may set cookies, too."""

    __slots__ = ("_jar",)

    def __init__(self, *args: Any, jar: list[Callable[[falcon.Response], None]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._jar = jar

    def set_cookie(self, name: str, value: str, *, same_site: str | None = None, **options: Any) -> None:
        """Set a cookie on the response; ValueError for a name, value or option that is not one."""
        if same_site is not None and same_site.lower() not in ("lax", "strict", "none"):
            raise ValueError(f"same_site must be lax, strict or none, got {same_site!r}")
        _check_cookie_name(name)
        options["same_site"] = same_site
        falcon.Response().set_cookie(name, value, **options)  # what falcon refuses, it refuses inside the method
        self._jar.append(lambda resp: resp.set_cookie(name, value, **options))

    def delete_cookie(self, name: str, *, path: str | None = None, domain: str | None = None) -> None:
        """Delete a cookie at the client."""
        _check_cookie_name(name)
        self._jar.append(lambda resp: resp.unset_cookie(name, path=path, domain=domain))


def _check_cookie_name(name: str) -> None:
    if not names.TOKEN.fullmatch(name):
        raise ValueError(f"{name!r} is not a cookie name (RFC 6265 section 4.1.1)")


class RpcResource:
    """The routes of methods."""

    def __init__(
        self,
        server: core.RpcServer,
        door: _Door,
        tokens: StreamTokens,
        limits: _Limits,
        produced: tuple[Encoding, ...],
        level: int | None,
        sessions: Sessions | None,
    ) -> None:
        self._server = server
        self._max_request = door.max_request
        self._prefix = door.prefix
        self._tokens = tokens
        self._limits = limits
        self._produced = produced
        self._level = level
        self._sessions = sessions
        self._externalizes = stores_results(server)
        self._accepted = {encoding.value: encoding for encoding in (*available_encodings(), Encoding.IDENTITY)}
        self._states = {
            (name, info.name): declared_states(binding.impl, info)
            for name, binding in server.bindings.items()
            for info in binding.methods.values()
            if info.method_type is core.MethodType.STREAM
        }

    def on_post(self, req: falcon.Request, resp: falcon.Response, protocol: str, method: str) -> None:
        self._serve(req, resp, protocol, method, core.MethodType.UNARY, self._unary)

    def on_post_init(self, req: falcon.Request, resp: falcon.Response, protocol: str, method: str) -> None:
        self._serve(req, resp, protocol, method, core.MethodType.STREAM, self._init)

    def on_post_exchange(self, req: falcon.Request, resp: falcon.Response, protocol: str, method: str) -> None:
        self._serve(req, resp, protocol, method, core.MethodType.STREAM, self._exchange)

    def single_segment(self, path: str) -> str:
        """The name in `{prefix}/name`, else nothing."""
        name = path.removeprefix(f"{self._prefix}/") if path.startswith(f"{self._prefix}/") else ""
        return "" if "/" in name else name

    def reserved(self, req: falcon.Request, resp: falcon.Response, name: str) -> None:
        """`__name__` belongs to the server, and none is built here: 404 with a kind (http.md section 2)."""
        self.body(req)
        exc = core.MethodNotImplementedError(f"No built-in method '{name}' over HTTP")
        self._refuse(req, resp, _Refused(404, exc))

    def json_call(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        protocol: str,
        method: str,
        make: Callable[[core.ProtocolBinding, core.RpcMethodInfo], bytes],
        show: Callable[[bytes], bytes],
    ) -> None:
        """A unary call whose request is made from JSON, and whose reply is shown as JSON. What is refused is raised."""
        with self._visit(req, resp) as visit:
            turn = _Turn(visit)
            try:
                call = self._open(req, protocol, method, core.MethodType.UNARY, "application/json")
            except _Refused as refused:
                raise refused.exc from None
            body = make(call.binding, call.info)
            try:
                answer = show(self._limited(call, self._unary(call, body, turn, req)))
                limited = self._limited(call, answer)
                turn.apply(resp)
                resp.content_type = "application/json"
                resp.data = answer if limited is answer else show(limited)
                self._record(req, call, turn, body, resp.data)
            finally:
                call.finish(_NO_NOTES)

    def _visit(self, req: falcon.Request, resp: falcon.Response) -> contextlib.AbstractContextManager[Visit | None]:
        """The request's use of its session; SessionLostError. Made before anything is looked up (section 3, step 5)."""
        return _NO_VISIT if self._sessions is None else self._sessions.visit(req, resp)

    def _limited(self, call: core.ServerRequest, body: bytes) -> bytes:
        """`body`, or the error in its place when it is longer than allowed; errors are never replaced."""
        limit = call.response_limit_bytes
        if limit is None or len(body) <= limit or call.error is not None:
            return body
        return call.replace(_response_too_large(call.info.name, body, limit))

    def _serve(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        protocol: str,
        method: str,
        kind: core.MethodType,
        work: Callable[[core.ServerRequest, bytes, _Turn, falcon.Request], bytes],
    ) -> None:
        body = self.body(req)
        try:
            visiting = self._visit(req, resp)
        except core.SessionLostError as exc:
            _LOG.info("no session: %s", core.exception_str(exc))
            resp.set_header(names.RPC_ERROR_HEADER, "true")
            return self._send(req, resp, lost_body(exc, req.context.request_id))
        with visiting as visit:
            try:
                call = self._open(req, protocol, method, kind)
            except _Refused as refused:
                return self._refuse(req, resp, refused)
            try:
                self._answer(req, resp, call, body, work, _Turn(visit))
            finally:  # whatever went wrong, hooks hear of the end: they may have made something current in this thread
                call.finish(_NO_NOTES)

    def _answer(
        self,
        req: falcon.Request,
        resp: falcon.Response,
        call: core.ServerRequest,
        body: bytes,
        work: Callable[[core.ServerRequest, bytes, _Turn, falcon.Request], bytes],
        turn: _Turn,
    ) -> None:
        try:
            reply = work(call, body, turn, req)
        except core.ExternalLocationError as exc:  # an argument could not be fetched (http.md section 3, step 10)
            reply = call.replace(exc)
        except Exception as exc:
            return self._refuse(req, resp, _Refused(400, exc))
        reply = self._limited(call, reply)
        turn.apply(resp)
        if call.error is not None:
            resp.set_header(names.RPC_ERROR_HEADER, "true")
        self._send(req, resp, reply)
        self._record(req, call, turn, body, resp.data)

    def _open(
        self,
        req: falcon.Request,
        protocol: str,
        method: str,
        kind: core.MethodType,
        content_type: str = ARROW_CONTENT_TYPE,
    ) -> core.ServerRequest:
        """Steps 6 to 9 of http.md section 3."""
        limit = self._budget(req)
        call = self._find(req, protocol, method)
        _check_content_type(req, content_type)
        if call.info.method_type is not kind:
            stream = "" if kind is core.MethodType.UNARY else "not "
            raise _Refused(400, TypeError(f"Method '{method}' is {stream}a stream"))
        call.request_id = req.context.request_id
        call.response_limit_bytes = limit
        call.max_externalized_response_bytes = self._limits.externalized
        call.externalization_enabled = self._externalizes
        if self._limits.preferred is not None:
            call.preferred_response_bytes = min(self._limits.preferred, limit or self._limits.preferred)
        return call

    def _find(self, req: falcon.Request, protocol: str, method: str) -> core.ServerRequest:
        if self._has_percent(req.env, protocol):
            raise _Refused(404, core.ProtocolNotSpecifiedError("The path of a call is not percent-encoded"))
        try:
            core.validate_protocol_name(protocol, allow_reserved=True)
        except ValueError as exc:
            raise _Refused(404, core.ProtocolNotSupportedError(str(exc))) from exc
        try:
            return core.ServerRequest(
                self._server, protocol, method, core.TransportKind.HTTP, req.context.auth, _transport_metadata(req)
            )
        except (core.ProtocolError, core.MethodNotImplementedError) as exc:
            raise _Refused(404, exc) from exc

    def _budget(self, req: falcon.Request) -> int | None:
        """The least of what the server and the caller allow a response."""
        own, wanted = self._limits.response, req.env.get("HTTP_VGI_ACCEPT_MAX_RESPONSE_BYTES")
        if wanted is None:
            return own
        asked = _parse_budget(wanted)
        return asked if own is None else min(own, asked)

    def builtin(
        self, req: falcon.Request, resp: falcon.Response, name: str, work: Callable[[bytes], tuple[bytes, bool]]
    ) -> None:
        """A call of the server's own: `work` turns the request into a reply, and says whether that is an error."""
        body = self.body(req)
        try:
            limit = self._budget(req)
            _check_content_type(req, ARROW_CONTENT_TYPE)
            try:
                reply, is_error = work(body)
            except Exception as exc:
                raise _Refused(400, exc) from exc
        except _Refused as refused:
            return self._refuse(req, resp, refused)
        if limit is not None and len(reply) > limit and not is_error:
            failure = _response_too_large(name, reply, limit)
            reply, is_error = self._server.error_body(failure, req.context.request_id), True
        if is_error:
            resp.set_header(names.RPC_ERROR_HEADER, "true")
        self._send(req, resp, reply)

    def _has_percent(self, env: Mapping[str, Any], protocol: str) -> bool:
        """Whether the path as it came holds a `%` after the prefix; servers that hide it leave the decoded one."""
        raw = env.get("REQUEST_URI") or env.get("RAW_URI") or ""
        return "%" in protocol or "%" in urllib.parse.urlsplit(raw).path.removeprefix(self._prefix)

    # ---- what a request asks for

    def _unary(self, call: core.ServerRequest, body: bytes, turn: _Turn, req: falcon.Request) -> bytes:
        call.make_context = functools.partial(_HttpContext, jar=turn.cookies, visit=turn.visit)
        return call.unary(body)

    def _init(self, call: core.ServerRequest, body: bytes, turn: _Turn, req: falcon.Request) -> bytes:
        scope = self._scope(call)
        call.make_context = functools.partial(SessionContext, visit=turn.visit)

        def seal(stream: core.Stream[Any, Any]) -> dict[bytes, bytes]:
            known = self._tokens.begin(scope, stream, call.stream_id, call.response_limit_bytes)
            sealed = self._seal(scope, known, stream, turn)
            return {**sealed, **self._tokens.seal_call(scope, known)}

        return call.init(body, seal)

    def _exchange(self, call: core.ServerRequest, body: bytes, turn: _Turn, req: falcon.Request) -> bytes:
        batch, metadata = call.read(body)
        call.make_context = functools.partial(SessionContext, visit=turn.visit)
        scope = self._scope(call)
        known, state, turn.state_bytes_in = self._tokens.open(scope, metadata)
        call.stream_id = known.stream_id
        limits = [limit for limit in (call.response_limit_bytes, known.response_limit) if limit is not None]
        call.response_limit_bytes = min(limits, default=None)
        state.rehydrate(call.binding.impl)
        state.bind_call_state(known.call_state)
        stream = core.Stream(known.output_schema, state, known.input_schema, call_state=known.call_state)
        metadata = {key: value for key, value in metadata.items() if key not in _TOKEN_KEYS}
        if core.CANCEL_KEY in metadata:
            return call.cancel(stream, batch, metadata)
        return call.turn(stream, batch, metadata, lambda stream: self._seal(scope, known, stream, turn))

    def _scope(self, call: core.ServerRequest) -> TokenScope:
        protocol, method = call.binding.name, call.info.name
        return self._tokens.scope(call.auth, protocol, method, self._states[protocol, method])

    def _seal(
        self, scope: TokenScope, known: StreamCall, stream: core.Stream[Any, Any], turn: _Turn
    ) -> dict[bytes, bytes]:
        sealed, turn.state_bytes_out = self._tokens.seal_state(scope, known, stream.state)
        return sealed

    # ---- bodies

    def body(self, req: falcon.Request) -> bytes:
        """Read and decode the body, never more than is allowed; JSON errors (http.md section 3, steps 1 and 2)."""
        body = read_body(req, self._max_request)
        coding = (req.env.get("HTTP_CONTENT_ENCODING") or "").strip().lower()
        if not coding:
            return body
        encoding = self._accepted.get(coding)
        if encoding is None:
            raise falcon.HTTPUnsupportedMediaType(
                title="Unsupported Content-Encoding", description=f"Accepted: {', '.join(self._accepted)}"
            )
        try:
            return decompress(encoding, body, max_output_size=self._max_request)
        except DecompressionLimitExceeded as exc:
            raise too_large(self._max_request, encoding.value) from exc
        except DecompressionError as exc:
            raise falcon.HTTPBadRequest(title="Decompression Error", description=str(exc)) from exc

    def _refuse(self, req: falcon.Request, resp: falcon.Response, refused: _Refused) -> None:
        resp.status = refused.status
        _LOG.info("refused %s: %s: %s", refused.status, type(refused.exc).__name__, core.exception_str(refused.exc))
        self._send(req, resp, self._server.error_body(refused.exc, req.context.request_id))

    def _send(self, req: falcon.Request, resp: falcon.Response, body: bytes) -> None:
        resp.content_type = ARROW_CONTENT_TYPE
        if self._produced:
            env = req.env
            resp.set_header("Vary", "Accept-Encoding, X-VGI-Accept-Encoding")
            chosen = negotiate(
                env.get("HTTP_X_VGI_ACCEPT_ENCODING", "")[:1024],
                env.get("HTTP_ACCEPT_ENCODING", "")[:1024],
                self._produced,
            )
            if chosen is not None:
                body = compress(chosen[0], body, level=self._level)
                resp.set_header(chosen[1], chosen[0].value)
        resp.data = body

    def _record(
        self, req: falcon.Request, call: core.ServerRequest, turn: _Turn, body: bytes, reply: bytes | None
    ) -> None:
        """The access record, once the body that goes out is known (http.md section 14)."""
        if not _LOG_ACCESS.isEnabledFor(logging.INFO):
            return call.finish(_NO_NOTES)
        notes: dict[str, Any] = {
            "http_status": 200 if call.error is None else 500,  # the intended one (http.md section 8)
            "request_bytes": len(body) if req.content_length is None else req.content_length,
            "response_bytes": len(reply or b""),
        }
        if turn.visit is not None:
            notes.update(turn.visit.notes)
        if turn.state_bytes_in:
            notes["request_state_bytes"] = turn.state_bytes_in
        if turn.state_bytes_out:
            notes["response_state_bytes"] = turn.state_bytes_out
        call.finish(notes)


class _Turn:
    """What one request leaves behind for its response and its record."""

    __slots__ = ("cookies", "state_bytes_in", "state_bytes_out", "visit")

    def __init__(self, visit: Visit | None) -> None:
        self.visit = visit
        self.cookies: list[Callable[[falcon.Response], None]] = []
        self.state_bytes_in = 0
        self.state_bytes_out = 0

    def apply(self, resp: falcon.Response) -> None:
        """Set the cookies that the method has set."""
        for cookie in self.cookies:
            cookie(resp)


def read_body(req: falcon.Request, limit: int) -> bytes:
    """Read the whole body; 413 as soon as it is known to be larger than `limit`."""
    length, stream = req.content_length, req.env["wsgi.input"]
    if length is not None:
        if length > limit:
            raise too_large(limit)
        return _read_up_to(stream, length)
    if "HTTP_TRANSFER_ENCODING" not in req.env and not req.env.get("wsgi.input_terminated"):
        return b""  # no body; reading might wait for ever
    body = _read_up_to(stream, limit + 1)
    if len(body) > limit:
        raise too_large(limit)
    return body


def _read_up_to(stream: Any, size: int) -> bytes:
    """At most `size` bytes, in steps: a length is a claim until the bytes are there."""
    chunks: list[bytes] = []
    while size > 0:
        chunk = stream.read(min(size, 1 << 22))
        if not chunk:
            break
        chunks.append(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _check_content_type(req: falcon.Request, wanted: str) -> None:
    if req.env.get("CONTENT_TYPE") != wanted:
        raise _Refused(415, TypeError(f"Content-Type must be exactly {wanted}"))


def _response_too_large(method: str, body: bytes, limit: int) -> ResponseTooLargeError:
    return ResponseTooLargeError(f"HTTP body exceeds max_response_bytes ({len(body)} > {limit}) for method '{method}'")


def _parse_budget(text: str) -> int:
    """VGI-Accept-Max-Response-Bytes: ASCII, canonical, in range (http.md section 5)."""
    text = text.strip(" \t")
    value = int(text) if _BUDGET.match(text) else 0
    if not names.MIN_RESPONSE_BYTES <= value <= names.MAX_SAFE_INTEGER:
        raise _Refused(
            400,
            ValueError(
                f"{names.ACCEPT_MAX_RESPONSE_BYTES_HEADER} must be a plain decimal within"
                f" {names.MIN_RESPONSE_BYTES}..{names.MAX_SAFE_INTEGER}"
            ),
        )
    return value


def _transport_metadata(req: falcon.Request) -> dict[str, Any]:
    env = req.env
    found: dict[str, Any] = {
        "remote_addr": env.get("REMOTE_ADDR", ""),
        "user_agent": env.get("HTTP_USER_AGENT", ""),
    }
    if "HTTP_TRACEPARENT" in env:
        found["traceparent"] = env["HTTP_TRACEPARENT"]
        found["tracestate"] = env.get("HTTP_TRACESTATE", "")
    if "HTTP_COOKIE" in env:
        found["cookies"] = types.MappingProxyType(dict(req.cookies))
    return found


# ---- routes


class _Health:
    """Health and the discovery of capabilities; nobody is asked who they are (http.md section 2).

    200 `"status":"ok"`, and from the signal to the end 503 `"status":"draining"`: no more requests, please.
    """

    def __init__(self, server: core.RpcServer, door: _Door) -> None:
        found = {"status": "ok", "server_id": server.server_id, "protocol": server.protocol_name}
        self._body = json.dumps(found, separators=(",", ":")).encode()
        self._draining = json.dumps({**found, "status": "draining"}, separators=(",", ":")).encode()
        self._door = door

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "application/json"
        resp.data = self._body
        if self._door.draining:
            resp.status = falcon.HTTP_503
            resp.set_header("Retry-After", "1")
            resp.data = self._draining

    def on_head(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.on_get(req, resp)


class _Page:
    def __init__(self, page: pages.Page) -> None:
        self._page = page

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        pages.send(resp, self._page)
        resp.set_header("Cache-Control", "no-cache, no-store, must-revalidate, max-age=0")


def _unmatched(rpc: RpcResource, page: pages.Page | None, req: falcon.Request, resp: falcon.Response, **_: str) -> None:
    """What no route takes (the table of http.md section 2)."""
    name = rpc.single_segment(req.path)
    if req.method == "DELETE" and name == names.SESSION_NAME:  # sticky sessions are off
        raise falcon.HTTPMethodNotAllowed(["POST"])
    if req.method != "POST":
        name = ""
    if name.startswith("__") and name.endswith("__"):
        return rpc.reserved(req, resp, name)
    if name or page is None:
        raise falcon.HTTPNotFound
    resp.status = falcon.HTTP_404
    pages.send(resp, page)
