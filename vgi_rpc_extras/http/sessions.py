# Needs: falcon, cryptography. Used by server.py. Seam: `make_context` of ServerRequest.
"""Sticky sessions: an object that stays in this process between the calls of one client (sticky.md).

    Sessions   id -> state, owner, end, lock; of one application in one process, in memory only
    Visit      one request: holds the lock of its session until the answer is made, and sets the headers

The token in VGI-Session names a session and the server that has it, sealed for one caller; it opens nothing for others.
A state is closed once, and only by who holds its lock, so never while a call uses it: `ctx.close_session()`, DELETE,
the call in which its time ran out, else a thread that looks every second for as long as there are sessions.
"""

from __future__ import annotations

import collections
import logging
import math
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from .. import core as _bound_core
from ..common import names
from ..common.texts import base64url, from_base64url
from .tokens import TokenCipher, bound_parts, caller_parts

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["FLY_MACHINE_ID", "DrainHandle", "auto_server_id", "drain_handle", "fly_sticky_echo_headers"]

_LOG = logging.getLogger("vgi_rpc.http")
LOCK_SECONDS = 30.0  # how long a request waits for the one before it
_HANDOVER_SECONDS = 0.1  # for the call that waited, and goes on, to make room for the next one
_TICK_SECONDS = 1.0
_SHUTDOWN_SECONDS = 1.0
_MAX_TOKEN = 1024
_PLAIN = struct.Struct("<d12s")  # when it ends (Unix time), session id; then the server id

FLY_MACHINE_ID = os.environ.get("FLY_MACHINE_ID")


class Session:
    """What is kept of a session. The lock is no RLock: a method's own threads may open and close sessions."""

    __slots__ = ("ends", "id", "lock", "owner", "state", "waiting")

    def __init__(self, state: object, owner: bytes, ttl: float) -> None:
        self.id = os.urandom(12)
        self.state: object | None = state
        self.owner = owner
        self.ends = time.monotonic() + ttl
        self.waiting = threading.Lock()  # held by the one call that waits: each that does takes a thread of the server
        self.lock = threading.Lock()


class Sessions:
    """The sessions of an application in this process; a child of a fork begins with none.

    Args:
        server: its id is in the tokens; replicas share the key and differ in the id.
        key: seals the tokens, those of streams too.
        default_ttl, max_ttl: seconds from opening; a session is never prolonged.
        max_sessions, max_per_principal: more cannot be open; all anonymous callers are one principal.
        echo_headers: what clients are to send with all later requests of a session, for whatever routes them.

    Raises:
        ValueError: a number out of range, a server id that is too long, or a header that no client would send.
    """

    def __init__(
        self,
        server: core.RpcServer,
        key: bytes,
        *,
        default_ttl: float,
        max_ttl: float,
        max_sessions: int,
        max_per_principal: int,
        echo_headers: Mapping[str, str] | None,
    ) -> None:
        for name, value in (("sticky_max_sessions", max_sessions), ("sticky_max_per_principal", max_per_principal)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        self._max_ttl = _check_ttl("sticky_max_ttl", max_ttl, math.inf)
        self._default_ttl = _check_ttl("sticky_default_ttl", default_ttl, max_ttl)
        for name, text in (echo_headers or {}).items():
            if not names.may_echo(name, text):
                raise ValueError(f"sticky_echo_headers: {name!r} is not a header that clients would send back")
        self.echo_headers = dict(echo_headers or {})
        self._server_id = server.server_id.encode()
        if len(self._server_id) > 255:
            raise ValueError("with sticky sessions a server_id has at most 255 bytes: it travels in every token")
        self._scope = server.protocol_name
        self._cipher = TokenCipher(key)
        self._max_sessions = max_sessions
        self._max_per_principal = max_per_principal
        self.lock_seconds = LOCK_SECONDS
        self.draining = False
        self._shut = False
        self._inherited: object = None
        self._begin()
        _registries.add(self)

    def _begin(self) -> None:
        self._guard = threading.Lock()  # of what follows; held for moments only, and taken after a session's lock
        self._sessions: dict[bytes, Session] = {}
        self._owned: collections.Counter[bytes] = collections.Counter()
        self._reaper: threading.Thread | None = None

    def forked(self) -> None:
        """In the child of a fork: nothing in here is ours, and nothing of it may be closed or finalised."""
        self._inherited = self._inherited, self._sessions
        self._begin()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._sessions)

    def capabilities(self) -> list[tuple[str, str]]:
        """What is on every response (http.md section 10)."""
        found = [
            (names.STICKY_ENABLED_HEADER, "true"),
            (names.STICKY_DEFAULT_TTL_HEADER, str(int(self._default_ttl))),
        ]
        if self.echo_headers:
            found.append((names.STICKY_ECHO_HEADERS_HEADER, ", ".join(self.echo_headers)))
        return found

    def response_headers(self) -> list[str]:
        """What a browser's script is to see besides (http.md section 11)."""
        return [names.SESSION_HEADER, names.SESSION_CLOSE_HEADER] + [
            names.ECHO_HEADER_PREFIX + name for name in self.echo_headers
        ]

    def visit(self, req: falcon.Request, resp: falcon.Response) -> Visit:
        """Begin a request, which then has its session to itself; SessionLostError for any token that is not good."""
        env = req.env
        accepts = env.get("HTTP_VGI_SESSION_ACCEPT", "").strip().lower() == "true"
        auth, token = req.context.auth, env.get("HTTP_VGI_SESSION")
        return Visit(self, auth, accepts, None if token is None else self._enter(token, auth), resp)

    def open(self, auth: core.AuthContext, state: object, ttl: float | None) -> Session:
        """Keep `state`; the caller holds the new session's lock. Raises what `ctx.open_session()` does."""
        owner = self._owner(auth)
        seconds = self._default_ttl if ttl is None else _check_ttl("ttl", ttl, self._max_ttl)
        session = Session(state, owner, seconds)
        session.lock.acquire()
        with self._guard:
            if self.draining:
                raise core.ServerDrainingError("this server is shutting down and opens no new sessions")
            if len(self._sessions) >= self._max_sessions:
                raise _too_many("this server has", self._max_sessions, "sticky_max_sessions")
            if self._owned[owner] >= self._max_per_principal:
                raise _too_many("this caller has", self._max_per_principal, "sticky_max_per_principal")
            if self._reaper is None:
                reaper = threading.Thread(target=self._reap, name="vgi_rpc-sessions", daemon=True)
                reaper.start()
                self._reaper = reaper
            self._sessions[session.id] = session
            self._owned[owner] += 1
        return session

    def leave(self, session: Session) -> None:
        """Give the lock back; the last use of a session that is over ends it."""
        try:
            if self._is_over(session):
                self.end(session)
        finally:
            session.lock.release()

    def end(self, session: Session) -> bool:
        """Forget a session whose lock the caller holds, and close its state; False: another has done so."""
        with self._guard:
            if self._sessions.pop(session.id, None) is None:
                return False
            self._owned[session.owner] -= 1
            if not self._owned[session.owner]:
                del self._owned[session.owner]
        state, session.state = session.state, None
        close = getattr(state, "close", None)
        if callable(close):
            try:
                close()
            except (Exception, SystemExit):
                _LOG.exception("close() of the state of session %s failed", session.id.hex())
        return True

    def delete(self, token: str, auth: core.AuthContext) -> bool:
        """End the session of a token; False for any token that names none."""
        try:
            session = self._find(token, auth)
        except core.SessionLostError:
            return False
        if not session.lock.acquire(timeout=self.lock_seconds):
            session.ends = 0.0  # whoever uses it ends it
            return True
        try:
            return self.end(session)
        finally:
            session.lock.release()

    def drain(self) -> None:
        """Open no more sessions; those that are open go on."""
        self.draining = True

    def shutdown(self) -> None:
        """End all sessions; one that a call uses ends with that call."""
        self.draining = self._shut = True
        deadline = time.monotonic() + _SHUTDOWN_SECONDS
        for session in self._all():
            if session.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
                self.leave(session)

    # ---- tokens

    def seal(self, session: Session) -> str:
        """The token of a session."""
        ends = time.time() + session.ends - time.monotonic()
        plain = _PLAIN.pack(ends, session.id) + self._server_id
        return base64url(self._cipher.seal(plain, session.owner))

    def _owner(self, auth: core.AuthContext) -> bytes:
        """Whom a session belongs to; what its token is bound to. "session" keeps it apart from streams' tokens."""
        return bound_parts("session", self._scope, *caller_parts(auth))

    def _find(self, token: str, auth: core.AuthContext) -> Session:
        owner = self._owner(auth)
        try:
            plain = self._cipher.open(from_base64url(token[: _MAX_TOKEN + 1]), owner)
        except ValueError:
            plain = None
        if plain is None:  # one text for what is malformed, forged, another key's or another caller's
            raise core.SessionLostError("the session token is not valid here; begin a new session")
        ends, session_id = _PLAIN.unpack_from(plain)
        if plain[_PLAIN.size :] != self._server_id:
            raise core.SessionLostError(
                "the session is in another process of this service: either that has ended, or what routes requests"
                " does not send them there; begin a new session"
            )
        session = self._sessions.get(session_id) if time.time() < ends else None
        if session is None or session.owner != owner or self._is_over(session):
            raise core.SessionLostError("the session has expired or was closed; begin a new one")
        return session

    def _enter(self, token: str, auth: core.AuthContext) -> Session:
        """Find a session and take its lock. What has waited looks again: the one before may have closed it."""
        session = self._find(token, auth)
        if not session.lock.acquire(blocking=False):
            self._wait(session)
        if self._sessions.get(session.id) is session and not self._is_over(session):
            return session
        self.leave(session)
        raise core.SessionLostError("the session was closed while this call waited for it; begin a new one")

    def _wait(self, session: Session) -> None:
        """Take the lock of a session that another call uses; only one call may wait for it."""
        if not session.waiting.acquire(timeout=_HANDOVER_SECONDS):
            raise _busy("is in use by one call, and another one waits for it")
        try:
            if not session.lock.acquire(timeout=self.lock_seconds):
                raise _busy(f"has been in use by another call for {self.lock_seconds:g} s")
        finally:
            session.waiting.release()

    # ---- ends

    def _is_over(self, session: Session) -> bool:
        return self._shut or time.monotonic() >= session.ends

    def _all(self) -> list[Session]:
        with self._guard:
            return list(self._sessions.values())

    def _reap(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            for session in self._all():
                if self._is_over(session) and session.lock.acquire(blocking=False):  # else in use: the next time
                    self.leave(session)
            with self._guard:
                if not self._sessions:
                    self._reaper = None
                    return


_registries: weakref.WeakSet[Sessions] = weakref.WeakSet()


def _after_fork() -> None:
    for sessions in list(_registries):
        sessions.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _check_ttl(name: str, ttl: float, most: float) -> float:
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= most or math.isinf(ttl):
        limit = "" if math.isinf(most) else f" and at most {most:g} (sticky_max_ttl)"
        raise ValueError(f"{name} must be a number of seconds above 0{limit}, got {ttl!r}")
    return float(ttl)


def _busy(how: str) -> core.SessionLostError:
    busy = core.SessionLostError(
        f"the session {how}; calls of one session run one at a time, and a method cannot call its own session"
    )
    busy.error_code = core.Code.UNAVAILABLE
    return busy


def _too_many(who: str, limit: int, name: str) -> core.StatusError:
    return core.StatusError(
        f"{who} {limit} open sessions, which is the limit ({name}); close some, or wait until they expire",
        code=core.Code.RESOURCE_EXHAUSTED,
    )


def lost_body(exc: core.SessionLostError, request_id: str) -> bytes:
    """The answer to a request whose session is lost: without server id and traceback (sticky.md section 1)."""
    found = core.Message.from_exception(exc, include_traceback=False).add_to_metadata()
    found[core.REQUEST_ID_KEY.decode()] = request_id
    return core.serialize_record_batch_bytes(core.empty_batch(core.EMPTY_SCHEMA), pa.KeyValueMetadata(found))


# ---- one request


class Visit:
    """One request and the session it uses; a context manager whose end sets the headers and gives the lock back.

    Attributes:
        session: the one in use, or None.
        notes: `session_action` and `session_id` of the access record.
    """

    __slots__ = ("_accepts", "_auth", "_closed", "_lock", "_opened", "_over", "_resp", "_sessions", "notes", "session")

    def __init__(
        self,
        sessions: Sessions,
        auth: core.AuthContext,
        accepts: bool,
        session: Session | None,
        resp: falcon.Response,
    ) -> None:
        self._sessions = sessions
        self._auth = auth
        self._accepts = accepts
        self._resp = resp
        self._lock = threading.Lock()  # the method's own threads may open, too
        self._opened = self._closed = self._over = False
        self.session = session
        self.notes: dict[str, str] = {"session_action": "none"}
        if session is not None:
            self._note("resume", session)

    def open(self, state: object, ttl: float | None) -> None:
        """What `ctx.open_session()` does; its checks in the order of sticky.md section 2."""
        if not self._accepts:
            raise RuntimeError(
                f"the client does not keep sessions: it must send {names.SESSION_ACCEPT_HEADER}: true"
                " (call within with_session_token())"
            )
        with self._lock:
            self._check()
            if self.session is not None:
                raise RuntimeError("a session is open already; close_session() comes first")
            self.session = self._sessions.open(self._auth, state, ttl)
            self._opened = True
            self._note("open", self.session)

    def close(self) -> None:
        """What `ctx.close_session()` does; without a session it tells the client all the same."""
        with self._lock:
            self._check()
            session, self.session = self.session, None
            self._opened, self._closed = False, True
            self._note("close", session)
        if session is not None:
            try:
                self._sessions.end(session)
            finally:
                session.lock.release()

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._over = True
            session, self.session = self.session, None
        if session is None:
            if self._closed:
                self._resp.set_header(names.SESSION_CLOSE_HEADER, "true")
            return
        try:
            if self._opened:
                self._hand_out(session)
        finally:
            self._sessions.leave(session)

    def _hand_out(self, session: Session) -> None:
        resp = self._resp
        resp.set_header(names.SESSION_HEADER, self._sessions.seal(session))
        resp.set_header("Cache-Control", "no-store")
        for name, value in self._sessions.echo_headers.items():
            resp.set_header(names.ECHO_HEADER_PREFIX + name, value)

    def _check(self) -> None:
        if self._over:
            raise RuntimeError("this call has ended; its session is no longer at hand")

    def _note(self, action: str, session: Session | None) -> None:
        self.notes["session_action"] = action
        if session is not None:
            self.notes["session_id"] = session.id.hex()


class SessionContext(core.CallContext):
    """What methods over HTTP see. Without a visit (sticky sessions are off) it is as on any transport."""

    __slots__ = ("_visit",)

    def __init__(self, *args: Any, visit: Visit | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._visit = visit

    @property
    def session(self) -> object | None:
        """The state that open_session() was given, in this call or an earlier one; else None."""
        session = None if self._visit is None else self._visit.session
        return None if session is None else session.state

    @property
    def session_id(self) -> str | None:
        """24 hex digits that name the session in logs, or None."""
        session = None if self._visit is None else self._visit.session
        return None if session is None else session.id.hex()

    def open_session(self, state: object, ttl: float | None = None) -> None:
        """Keep `state` for later calls of this client, for `ttl` seconds from now; its `close()` is called at the end.

        When this raises, the state remains the method's to close.

        Raises:
            RuntimeError: sessions are off, the client keeps none, or one is open already.
            ServerDrainingError: the server is shutting down.
            StatusError: too many are open (RESOURCE_EXHAUSTED).
            ValueError: `ttl` is not above 0, or above the server's limit.
        """
        if self._visit is None:
            return super().open_session(state, ttl)
        return self._visit.open(state, ttl)

    def close_session(self) -> None:
        """End the session and tell the client; nothing happens when there is none."""
        if self._visit is None:
            return super().close_session()
        return self._visit.close()


class SessionResource:
    """`DELETE {prefix}/__session__`: all answers but to the owner's own token are alike (sticky.md section 7.2)."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def on_delete(self, req: falcon.Request, resp: falcon.Response) -> None:
        token = req.env.get("HTTP_VGI_SESSION")
        if token is not None and self._sessions.delete(token, req.context.auth):
            resp.status = "204 No Content"
            resp.set_header(names.SESSION_CLOSE_HEADER, "true")


# ---- for whoever runs the application


class DrainHandle(NamedTuple):
    """How the sessions of an application come to their end before its process does.

    drain() refuses new sessions, while open ones go on; shutdown() ends all, a session that a call uses with that call.
    """

    drain: Callable[[], None]
    shutdown: Callable[[], None]
    is_draining: Callable[[], bool]


def drain_handle(app: object) -> DrainHandle | None:
    """The handle of what make_wsgi_app returned, for the hooks of a WSGI server; None when sticky sessions are off."""
    sessions = getattr(app, "sessions", None)
    if not isinstance(sessions, Sessions):
        return None
    return DrainHandle(sessions.drain, sessions.shutdown, lambda: sessions.draining)


def auto_server_id() -> str | None:
    """The id of this Fly.io machine, which is a good `server_id`; None elsewhere."""
    return FLY_MACHINE_ID or None


def fly_sticky_echo_headers() -> dict[str, str] | None:
    """`sticky_echo_headers` with which Fly.io's proxy sends a session to this machine; None elsewhere."""
    return {"fly-force-instance-id": FLY_MACHINE_ID} if FLY_MACHINE_ID else None
