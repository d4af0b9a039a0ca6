# Needs: nothing but the core (Falcon's objects are passed in). Seam: the authentication step of the HTTP server.
"""How a request that may not pass is answered: 401, 503 and 500, and what a client makes of them (auth.md 1 and 5).

    guard = AuthGuard(authenticate, prefix="/vgi")
    guard.process_request(req, resp)          # before a body is read, and before routing
    req.context.auth                          # an AuthContext in every request that passes

All refusals of one service look alike but for the reason code: the texts are constants, so that neither a verifier's
words nor a caller's input come back.
"""

from __future__ import annotations

import enum
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from .. import core as _bound_core
from ..http import page_frame
from ..http.names import AUTH_PROXY_REQUIRED_HEADER, AUTH_REASON_HEADER, PROOF_HEADER

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "AuthFailure",
    "AuthGuard",
    "AuthReason",
    "AuthenticationError",
    "build_proxy_hint",
    "classify_auth_failure",
    "declare_key_headers",
    "declare_proxy_headers",
    "key_headers_of",
    "merge_proxy_headers",
    "proxy_headers_of",
    "read_unauthorized",
]

_DETAIL = "authentication rejected"
_LOG = logging.getLogger("vgi_rpc.http.auth")
_F = TypeVar("_F")
# Logging in again would end at the same refusal, and browsers would go round in circles.
_NO_LOGIN_HELPS = frozenset({"insufficient_scope", "proxy_required"})
_MAX_TEXT = 500  # what a client keeps of a refusal's text (auth.md section 5)


class AuthReason(enum.StrEnum):
    """The closed set of reasons that a 401 carries (auth.md section 5)."""

    MISSING_CREDENTIAL = "missing_credential"
    INVALID_CREDENTIAL = "invalid_credential"
    EXPIRED_CREDENTIAL = "expired_credential"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    PROXY_REQUIRED = "proxy_required"
    UNAUTHORIZED = "unauthorized"


class AuthFailure(ValueError):
    """A credential is missing or bad: a chain tries its next member, else 401 with this reason.

    `detail` is for the developer's eyes; it reaches neither the client nor the log.
    """

    def __init__(self, reason: AuthReason, detail: str = "") -> None:
        super().__init__(detail or reason.value)
        self.reason = reason
        self.detail = detail
        self.vgi_auth_reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.detail)


class AuthenticationError(core.RpcError):
    """Client side: the service answered 401."""

    def __init__(self, reason: AuthReason, detail: str, proxy_hint: str = "", *, request_id: str = "") -> None:
        message = f"{detail} ({reason.value})" + (f"\n\n{proxy_hint}" if proxy_hint else "")
        super().__init__(
            "AuthenticationError", message, request_id=request_id, error_code=core.Code.UNAUTHENTICATED.value
        )
        self.reason = reason
        self.detail = detail
        self.proxy_hint = proxy_hint


def classify_auth_failure(exc: BaseException) -> AuthReason:
    """Return the reason an exception declares, else the one its class stands for; its text is never read."""
    declared = getattr(exc, "vgi_auth_reason", None)
    if isinstance(declared, AuthReason):
        return declared
    return AuthReason.INSUFFICIENT_SCOPE if isinstance(exc, PermissionError) else AuthReason.UNAUTHORIZED


def declare_proxy_headers(fn: _F, *headers: str) -> _F:
    """Record on an authenticator which headers a proxy must put into requests; returns it."""
    fn.vgi_proxy_headers = tuple(dict.fromkeys((*proxy_headers_of(fn), *headers)))  # type: ignore[attr-defined]
    return fn


def proxy_headers_of(fn: object) -> tuple[str, ...]:
    """Return the header names recorded by `declare_proxy_headers`, in order."""
    return tuple(getattr(fn, "vgi_proxy_headers", ()))


def merge_proxy_headers(*sources: object) -> tuple[str, ...]:
    """Return the header names of several authenticators, each once, first seen first."""
    return tuple(dict.fromkeys(name for source in sources for name in proxy_headers_of(source)))


def declare_key_headers(fn: _F, *headers: str) -> _F:
    """Record on an authenticator which request headers carry a caller's key ("X-API-Key"); returns it.

    The describe page then has a place for the key, and 401 and OpenAPI say what is wanted. Bearer authenticators have
    declared theirs, Authorization.
    """
    fn.vgi_key_headers = tuple(dict.fromkeys((*key_headers_of(fn), *headers)))  # type: ignore[attr-defined]
    return fn


def key_headers_of(*fns: object) -> tuple[str, ...]:
    """Return the header names recorded by `declare_key_headers`, of all `fns`, each once."""
    return tuple(dict.fromkeys(name for fn in fns for name in getattr(fn, "vgi_key_headers", ())))


def _challenge(headers: Sequence[str] | None) -> str:
    """The WWW-Authenticate value of a service whose callers have a key in one of these headers."""
    if headers is None:
        return "Proxy"  # it is the proxy that must add something: the note says what
    others = [f'ApiKey header="{name}"' for name in headers if name.lower() != "authorization"]
    return ", ".join((["Bearer"] if len(others) < len(headers) else []) + others) or "Bearer"


def build_proxy_hint(headers: Iterable[str]) -> str:
    """Return the note of a service behind a proxy; empty when it needs no header of one."""
    names = ", ".join(headers)
    if not names:
        return ""
    return (
        "This service is reachable only through its authenticating proxy, which must set these request headers:"
        f" {names}. When they are missing or wrong, the proxy's configuration is as likely at fault as the credential:"
        " check that the request went through the proxy."
    )


def read_unauthorized(body: bytes, headers: Mapping[str, str], *, request_id: str = "") -> AuthenticationError:
    """Return the exception for a 401 answer; any body and any headers will do.

    Args:
        body: the decoded body; no more than 64 KiB of it is read.
        headers: of the response; names in any case.
        request_id: its X-Request-ID.
    """
    names = {name.lower(): value for name, value in headers.items()}
    found = _json_object(body[:65536])
    text = body[: 4 * _MAX_TEXT].decode("utf-8", "replace").strip()
    if found is not None:
        detail = printable(found.get("detail"))
    elif "html" in names.get("content-type", "") or text.startswith("<"):
        detail = "the answer is a web page: a proxy or login page, not the service itself"
    else:
        detail = printable(text)
    reason = _reason((found or {}).get("reason", names.get(AUTH_REASON_HEADER.lower())))
    hint = printable((found or {}).get("proxy_hint"), 4 * _MAX_TEXT)
    return AuthenticationError(reason, detail or "unauthorized", hint, request_id=request_id)


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _reason(value: object) -> AuthReason:
    try:
        return AuthReason(str(value))
    except ValueError:
        return AuthReason.UNAUTHORIZED


def printable(value: object, limit: int = _MAX_TEXT) -> str:
    """A peer's text: short, on one line, without control characters (it ends on terminals)."""
    text = value[:limit] if isinstance(value, str) else ""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


class _Login(Protocol):
    """What the guard asks of a browser login (login.py)."""

    def authenticator(
        self, inner: Callable[[falcon.Request], core.AuthContext]
    ) -> Callable[[falcon.Request], core.AuthContext]: ...
    def redirect(self, req: falcon.Request, resp: falcon.Response) -> bool: ...
    def hand_over(self, req: falcon.Request, resp: falcon.Response) -> bool: ...


class AuthGuard:
    """Falcon middleware: authenticates every request that is not exempt, before it is routed.

    Args:
        authenticate: returns an AuthContext; ValueError and PermissionError mean 401, AuthUnavailableError 503,
            anything else 500. None lets everything through anonymously.
        prefix: of all routes, "" or "/something".
        proxy_auth_headers: further header names for the note of a 401.
        proxy_proof_required: add the proof's header to that note.
        challenge: the WWW-Authenticate value of every 401 (oauth.build_www_authenticate); "": by the key headers.
        login: the browser login, which turns a 401 for a person into a redirect.
        on_failure: called with the exception behind every 401, to count them; it must not keep or print it.

    Passing requests have their context in `req.context.auth`. `key_headers` are those that carry a caller's key; empty:
    not known; None: none does.
    """

    def __init__(
        self,
        authenticate: Callable[[falcon.Request], core.AuthContext] | None,
        *,
        prefix: str = "",
        proxy_auth_headers: Sequence[str] | None = None,
        proxy_proof_required: bool = False,
        challenge: str = "",
        login: _Login | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        names = (*(proxy_auth_headers or ()), *proxy_headers_of(authenticate))
        names += (PROOF_HEADER,) if proxy_proof_required else ()
        self.proxy_hint = build_proxy_hint(dict.fromkeys(names))
        self.key_headers: tuple[str, ...] | None = key_headers_of(authenticate)
        if authenticate is None or (names and not self.key_headers):
            self.key_headers = None  # nobody has a key: anonymous callers, or those whom a proxy vouches for
        self.challenge = challenge or _challenge(self.key_headers)
        self._authenticate = login.authenticator(authenticate) if login and authenticate else authenticate
        self._open = (f"{prefix}/health", *([f"{prefix}/_oauth"] if login else []))
        self._open_below = ("/.well-known/", *(f"{path}/" for path in self._open))
        self._login = login
        self._on_failure = on_failure

    def is_exempt(self, method: str, path: str) -> bool:
        """Whether a request passes unauthenticated; paths are compared by whole segments (http.md section 15)."""
        return method == "OPTIONS" or path in self._open or path.startswith(self._open_below)

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Set `req.context.auth`, or complete the response with the refusal."""
        req.context.auth = core.AuthContext.anonymous()
        if self._authenticate is None or self.is_exempt(req.method, req.path):
            return
        try:
            auth = self._authenticate(req)
            if not isinstance(auth, core.AuthContext):
                raise TypeError("an authenticator returns an AuthContext")
        except (ValueError, PermissionError) as exc:
            self._refuse(req, resp, exc)
        except core.AuthUnavailableError as exc:
            self._log(req, "authentication unavailable", exc)
            _complete_json(resp, "503 Service Unavailable", "authentication authority unavailable")
            resp.set_header("Retry-After", str(max(1, int(exc.retry_after))))
        except Exception as exc:
            _LOG.error("authenticator failed: %s in %s", type(exc).__name__, _where(exc))
            _complete_json(resp, "500 Internal Server Error")
        else:
            req.context.auth = auth
            if self._login and self._login.hand_over(req, resp):
                resp.complete = True

    def _refuse(self, req: falcon.Request, resp: falcon.Response, exc: BaseException) -> None:
        reason = classify_auth_failure(exc)
        self._log(req, reason.value, exc)
        if self._on_failure is not None:
            self._on_failure(exc)
        if self._login and reason not in _NO_LOGIN_HELPS and _wants_html(req) and req.method == "GET":
            resp.complete = self._login.redirect(req, resp)
        if not resp.complete:
            self._answer(resp, reason, _wants_html(req))

    def _answer(self, resp: falcon.Response, reason: AuthReason, as_html: bool) -> None:
        resp.status = "401 Unauthorized"
        resp.set_header(AUTH_REASON_HEADER, reason.value)
        resp.set_header("Cache-Control", "no-store")
        if self.proxy_hint:
            resp.set_header(AUTH_PROXY_REQUIRED_HEADER, "true")
        resp.set_header("WWW-Authenticate", self.challenge)
        resp.complete = True
        if as_html:
            words = ("Not authorized", f"{_DETAIL}: {reason.value}", self.proxy_hint)
            page_frame.send(resp, page_frame.locked(*words, headers=self.key_headers))
            return
        resp.set_header("X-Content-Type-Options", "nosniff")
        found = {"error": "unauthorized", "reason": reason.value, "detail": _DETAIL}
        if self.proxy_hint:
            found["proxy_hint"] = self.proxy_hint
        resp.content_type = "application/json"
        resp.data = json.dumps(found, separators=(",", ":")).encode()

    def _log(self, req: falcon.Request, reason: str, exc: BaseException) -> None:
        # Never the message, a header or the path: an authenticator may have put the credential into its words.
        _LOG.warning("request refused: %s (%s, peer %s)", reason, type(exc).__name__, req.remote_addr)


def _wants_html(req: falcon.Request) -> bool:
    return "text/html" in (req.get_header("Accept") or "").lower()


def _complete_json(resp: falcon.Response, status: str, description: str = "") -> None:
    found = {"title": status} | ({"description": description} if description else {})
    resp.status = status
    resp.set_header("Cache-Control", "no-store")
    resp.set_header("X-Content-Type-Options", "nosniff")
    resp.content_type = "application/json"
    resp.data = json.dumps(found, separators=(",", ":")).encode()
    resp.complete = True


def _where(exc: BaseException) -> str:
    """File and line of a bug, without its message: that may hold the credential."""
    last = exc.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return "?" if last is None else f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
