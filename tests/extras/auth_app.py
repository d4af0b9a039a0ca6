"""The real application with one more page, which says who is calling, for the tests of authentication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import falcon
import falcon.testing

from tests.core import core

getattr(core, "_extras_load")("auth.bearer", "authentication")  # noqa: B009 (binds the extras to the core under test)

from vgi_rpc_extras.auth import AuthFailure  # noqa: E402

KEY = b"t" * 32


class Calc(Protocol):
    def add(self, a: float, b: float) -> float: ...
    def who(self) -> str: ...


class CalcImpl:
    def add(self, a: float, b: float) -> float:
        return a + b

    def who(self, ctx: Any) -> str:
        return str(ctx.auth.principal)


class Page:
    """Says who is calling."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, **_: Any) -> None:
        auth = req.context.auth
        resp.media = {"principal": auth.principal, "domain": auth.domain, "claims": dict(auth.claims)}

    on_post = on_get


def make_app(authenticate: Any, **options: Any) -> falcon.App[Any, Any]:
    """make_wsgi_app; whatever is no route of its own is answered by Page."""
    server = core.RpcServer(Calc, CalcImpl(), enable_describe=True)
    app: falcon.App[Any, Any] = getattr(core, "make_wsgi_app")(  # noqa: B009 (a lazy name)
        server, authenticate=authenticate, **{"token_key": KEY, **options}
    )
    app.add_sink(Page().on_get, r"/.*")
    return app


def client(authenticate: Any, **options: Any) -> falcon.testing.TestClient:
    return falcon.testing.TestClient(make_app(authenticate, **options))


def request(headers: dict[str, str] | None = None, *, peer: str = "10.0.0.9", **options: Any) -> falcon.Request:
    environ = falcon.testing.create_environ(headers=headers or {}, remote_addr=peer, **options)
    return falcon.Request(environ)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """The block must raise AuthFailure with this reason."""
    try:
        yield
    except AuthFailure as exc:
        assert exc.reason == reason, f"{exc.reason} ({exc.detail})"
    else:
        raise AssertionError(f"not refused; expected {reason}")
