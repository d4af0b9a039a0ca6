# Needs: nothing but the core (Falcon's objects are passed in). Seam: the authentication step of the HTTP server.
"""Who may pass, and how the others are answered: 401, 503 and 500 (auth.md sections 1 and 5).

    guard = AuthGuard(authenticate, prefix="/vgi")
    guard.process_request(req, resp)          # before a body is read, and before routing
    req.context.auth                          # an AuthContext in every request that passes

All refusals of one service look alike but for the reason code: the texts are constants, so that neither a verifier's
words nor a caller's input come back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from .. import core as _bound_core
from ..common import html
from ..common.names import AUTH_PROXY_REQUIRED_HEADER, AUTH_REASON_HEADER, PROOF_HEADER
from .proxies import MixedHeadersError, unforgeable
from .unauthorized import build_proxy_hint, classify_auth_failure, key_headers_of, proxy_headers_of

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core

    from .unauthorized import AuthReason
else:
    core = _bound_core()

__all__ = ["AuthGuard"]

ASKED = "vgi_rpc.asked"  # in the environ, where no header can be: what `ask` said of this request
_DETAIL = "authentication rejected"
_LOG = logging.getLogger("vgi_rpc.http.auth")
# Logging in again would end at the same refusal, and browsers would go round in circles.
_NO_LOGIN_HELPS = frozenset({"insufficient_scope", "proxy_required"})


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
        if not self.asks(req):
            return
        found = req.env.get(ASKED) or self.ask(req)
        if not isinstance(found, Exception):
            req.context.auth = found
            if self._login and self._login.hand_over(req, resp):
                resp.complete = True
        elif isinstance(found, ValueError | PermissionError):
            self._refuse(req, resp, found)
        elif isinstance(found, core.AuthUnavailableError):
            self._log(req, "authentication unavailable", found)
            _complete_json(resp, "503 Service Unavailable", "authentication authority unavailable")
            resp.set_header("Retry-After", str(max(1, int(found.retry_after))))
        elif isinstance(found, MixedHeadersError):
            _LOG.error("%s", found)
            _complete_json(resp, "500 Internal Server Error", "this service is not served as its authentication needs")
        else:
            _LOG.error("authenticator failed: %s in %s", type(found).__name__, _where(found))
            _complete_json(resp, "500 Internal Server Error")

    def ask(self, req: falcon.Request) -> core.AuthContext | Exception:
        """Who calls, or why that is not known. A server that asks before the body comes puts the answer into ASKED."""
        assert self._authenticate is not None
        try:
            auth = self._authenticate(unforgeable(req))
        except Exception as exc:
            return exc
        if not isinstance(auth, core.AuthContext):
            return TypeError("an authenticator returns an AuthContext")
        return auth

    def asks(self, req: falcon.Request) -> bool:
        """Whether this caller is asked who it is."""
        return self._authenticate is not None and not self.is_exempt(req.method, req.path)

    @property
    def guards(self) -> bool:
        """Whether anybody is asked."""
        return self._authenticate is not None

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
            html.send(resp, html.locked(*words, headers=self.key_headers))
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


def _challenge(headers: Sequence[str] | None) -> str:
    """The WWW-Authenticate value of a service whose callers have a key in one of these headers."""
    if headers is None:
        return "Proxy"  # it is the proxy that must add something: the note says what
    others = [f'ApiKey header="{name}"' for name in headers if name.lower() != "authorization"]
    return ", ".join((["Bearer"] if len(others) < len(headers) else []) + others) or "Bearer"


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
