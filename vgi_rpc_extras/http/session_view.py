# Needs: pyarrow only. Used by client.py.
"""The client's half of sticky sessions: a view of a proxy whose requests belong together (sticky.md section 5).

with with_session_token(calc) as view:      # or calc.with_session_token()
    view.open(10)                           # the server keeps something for us from here on ...
    view.add(5)                             # ... and finds it again
                                            # leaving the block ends the session, unless it was detached
"""

from __future__ import annotations

import logging
import re
import threading
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import core as _bound_core
from ..common import names

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["SessionView", "with_session_token"]

_P = TypeVar("_P")
_LOG = logging.getLogger("vgi_rpc.http")
_TOKEN = re.compile(r"[\x21-\x7e]{1,4096}\Z")
_MAX_ECHO_HEADERS = 16
_ECHO = names.ECHO_HEADER_PREFIX.lower()


class SessionView(Generic[_P]):
    """What `with_session_token` returns: a context manager that gives the view, a proxy like the one it was made of.

    Everything called through the view, streams too, is sent with the session's token as soon as there is one, and
    nothing outside of it is. The view has the three methods below, too. After `session_lost` begin a new view.
    """

    def __init__(self, proxy: _P, token: str | None = None) -> None:
        if token is not None and _TOKEN.match(token) is None:
            raise ValueError("not a session token: it has characters that no header can carry, or too many")
        self._proxy = proxy
        self._transport: Any = None
        self._lock = threading.Lock()
        self._token = token
        self._echo: Mapping[str, str] = {}
        self._explicit: frozenset[str] = frozenset()
        self._detached = False
        self._over = False

    def current_session_token(self) -> str | None:
        """The token of the session; None while there is none. Whoever has it, and the same credentials, may use it."""
        return self._token

    def current_echo_headers(self) -> Mapping[str, str]:
        """The headers that the server wants to see with every request of the session; a copy."""
        return types.MappingProxyType(dict(self._echo))

    def detach(self) -> str | None:
        """Leave the session open at the end of the block, and return its token (None: there is no session)."""
        self._detached = True
        return self._token

    def __enter__(self) -> _P:
        if self._transport is not None:
            raise RuntimeError("a session view is used once; make another")
        return core.with_transport(self._proxy, self._derive)

    def __exit__(self, *exc: object) -> None:
        try:
            if self._token is not None and not self._detached:
                self._transport.end_session()
        finally:
            self._over = True

    def _derive(self, transport: Any) -> Any:
        if not hasattr(transport, "in_session"):
            raise TypeError("sticky sessions need a proxy over HTTP")
        self._transport, self._explicit = transport.in_session(self)
        return self._transport

    # ---- what the transport asks of it

    def stamp(self, headers: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
        """The session's token, and the headers of a request with what belongs to the session."""
        if self._over:
            raise core.ConnectionLostError("this with_session_token() block has ended; begin another", sent="no")
        with self._lock:
            token, echo = self._token, self._echo
        found = {**echo, **headers, names.SESSION_ACCEPT_HEADER: "true"}
        if token is not None:
            found[names.SESSION_HEADER] = token
        return token, found

    def learn(self, sent: str | None, headers: Mapping[str, str]) -> None:
        """Note what a response says of the session; `sent` is the token that its request had."""
        token = headers.get(names.SESSION_HEADER.lower())
        closed = headers.get(names.SESSION_CLOSE_HEADER.lower(), "").lower() == "true"
        if closed:
            with self._lock:
                if token is not None or self._token == sent:  # a late answer says nothing of a newer session
                    self._token, self._echo = None, {}
        elif token is not None:
            if _TOKEN.match(token) is None:
                _LOG.warning("the server opened a session, but its token is none that a header can carry: ignored")
                return
            echo = self._wanted(headers)
            with self._lock:
                self._token, self._echo = token, echo

    def _wanted(self, headers: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in headers.items():
            name = key.removeprefix(_ECHO)
            if name == key or name.lower() in self._explicit:  # the caller's own headers win
                continue
            if len(found) >= _MAX_ECHO_HEADERS or not names.may_echo(name, value):
                _LOG.warning("the server asks for a header that is not sent back: %.64r", name)
                continue
            found[name] = value
        return found


def with_session_token(proxy: _P, token: str | None = None) -> SessionView[_P]:
    """Call within a sticky session: `with with_session_token(proxy) as view: ...`.

    Args:
        proxy: over HTTP; other calls of it, and other views, are not part of the session.
        token: a session that exists already, as another view's `detach()` gave it.

    Raises:
        TypeError: not a proxy, or not over HTTP.
        ValueError: not a token.
    """
    return SessionView(proxy, token)
