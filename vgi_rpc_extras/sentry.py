# Needs: sentry-sdk (2 or later). Install: pip install 'vgi-rpc-onefile[sentry]'. Seam: DispatchHook.
"""Failed calls as Sentry events (observability.md section 3).

    sentry_sdk.init(dsn=...)                 the application does this; we never do
    server = RpcServer(Calc, CalcImpl())     reports its failures from here on
    instrument_server_sentry(server, SentryConfig(enable_performance=True))

Calls outside a framework that Sentry knows have a scope of their own, so that nothing of one call is in the event of
another. Events hold the stack with its local variables unless `init(include_local_variables=False)` says otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import sentry_sdk
from sentry_sdk.integrations.logging import ignore_logger

from . import core as _bound_core

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["SentryConfig", "attach_by_default", "instrument_server_sentry", "noop_redactor", "short_hash"]

Redactor = Callable[[Mapping[str, Any]], Mapping[str, Any]]

_USER = {"username": "preferred_username", "email": "email", "name": "name"}
_SECRET = re.compile("password|token|secret|key|authorization", re.IGNORECASE)
_MAX_TAG = 200  # characters; Sentry's own limit


@dataclasses.dataclass(frozen=True)
class SentryConfig:
    """What is reported.

    Args:
        enable_performance: each call is a span: of the ambient one, else a transaction of its own.
        record_request_context: events say who called what: context `rpc`, user, `auth.*` and claim tags.
        ignored_exceptions, ignored_error_codes: no events for these; by default only UNKNOWN, INTERNAL and DATA_LOSS
            make events.
        op_name: of the spans.
        claim_tags: claim -> tag; user_claim_map: field of the user -> claim.
        set_transaction_name: events are grouped under `rpc <method>`.
        record_params: arguments are data of the span.
        tag_params: arguments that become tags; hashed_tags: those whose `short_hash` does.
        param_redactor: sees the arguments first. None drops those whose name speaks of a secret.
        max_param_value_bytes: of a string, as UTF-8.
    """

    enable_error_capture: bool = True
    enable_performance: bool = False
    record_request_context: bool = True
    custom_tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored_exceptions: tuple[type[BaseException], ...] = ()
    ignored_error_codes: frozenset[core.Code] = core.CLIENT_ERROR_CODES | core.TRANSIENT_ERROR_CODES
    op_name: str = "rpc.server"
    claim_tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    user_claim_map: Mapping[str, str] = dataclasses.field(default_factory=lambda: dict(_USER))
    set_transaction_name: bool = True
    record_params: bool = False
    tag_params: Sequence[str] = ()
    param_redactor: Redactor | None = None
    max_param_value_bytes: int = 1024
    hashed_tags: Sequence[str] = ()


def instrument_server_sentry(server: core.RpcServer, config: SentryConfig | None = None) -> core.RpcServer:
    """Report the failures of `server`, in place of what was configured before; returns it.

    Raises TypeError for a config that is not a SentryConfig.
    """
    if config is not None and not isinstance(config, SentryConfig):
        raise TypeError(f"expected a SentryConfig, got {type(config).__name__}")
    for old in server.dispatch_hooks:
        if isinstance(old, _SentryHook):
            server.remove_dispatch_hook(old)
    server.add_dispatch_hook(_SentryHook(server, config or SentryConfig()))
    # The core also logs what failed, and the SDK would make events of that, whatever the configuration ignores.
    ignore_logger("vgi_rpc.rpc")
    return server


def attach_by_default(server: core.RpcServer) -> None:
    """What the core does with a new server when the SDK is initialised; an explicit configuration stays."""
    if not any(isinstance(hook, _SentryHook) for hook in server.dispatch_hooks):
        instrument_server_sentry(server)


def short_hash(value: bytes | str | None, *, length: int = 12) -> str | None:
    """Return the first hex digits of a SHA-256: tells values apart without saying what they are. None for None."""
    if value is None:
        return None
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()[:length]


def noop_redactor(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments as they are: a `param_redactor` that drops nothing."""
    return kwargs


def _redact_secrets(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in kwargs.items() if not _SECRET.search(name)}


@dataclasses.dataclass(slots=True)
class _Call:
    """One dispatched call: what its end has to undo, and the span that it is part of."""

    scopes: contextlib.ExitStack
    span: Any


class _SentryHook:
    """A core.DispatchHook. The SDK sends from a thread of its own; nothing here waits for a network."""

    def __init__(self, server: core.RpcServer, config: SentryConfig) -> None:
        self._server = server
        self._config = config

    def on_dispatch_start(
        self,
        info: core.RpcMethodInfo,
        auth: core.AuthContext,
        transport_metadata: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> _Call | None:
        if not sentry_sdk.is_initialized():
            return None
        with contextlib.ExitStack() as scopes:
            ambient = sentry_sdk.get_current_span()
            # A web framework's integration has made a scope for this request; else it is on us.
            if ambient is None or "user_agent" not in transport_metadata:
                scopes.enter_context(sentry_sdk.isolation_scope())
            span = self._span(scopes, ambient, info)
            if self._config.set_transaction_name and (ambient is not None or span is None):
                sentry_sdk.get_current_scope().set_transaction_name(f"rpc {info.name}", source="custom")
            self._describe(span, info, auth, str(transport_metadata.get("stream_id", "")), kwargs)
            return _Call(scopes.pop_all(), span)

    def on_dispatch_end(
        self,
        token: _Call | None,
        info: core.RpcMethodInfo,
        error: BaseException | None,
        *,
        stats: core.CallStatistics | None = None,
    ) -> None:
        if token is None:
            return
        with token.scopes:
            if token.span is not None:
                token.span.set_status(_status(error))
            if isinstance(error, Exception) and self._reports(error):
                sentry_sdk.capture_exception(error)

    def _span(self, scopes: contextlib.ExitStack, ambient: Any, info: core.RpcMethodInfo) -> Any:
        """What the call's data goes on: a new span, or the ambient one, or nothing."""
        config = self._config
        if not config.enable_performance:
            return ambient
        name = f"vgi_rpc/{info.name}"
        if ambient is None:
            return scopes.enter_context(sentry_sdk.start_transaction(op=config.op_name, name=name, source="custom"))
        return scopes.enter_context(sentry_sdk.start_span(op=config.op_name, name=name))

    def _describe(
        self, span: Any, info: core.RpcMethodInfo, auth: core.AuthContext, stream_id: str, kwargs: Mapping[str, Any]
    ) -> None:
        config, scope = self._config, sentry_sdk.get_isolation_scope()
        service = info.protocol_name or self._server.protocol_name
        method = {"rpc.method": info.name, "rpc.method_type": info.method_type.value}
        given = self._params(kwargs)
        if span is not None:
            data = {"rpc.system": "vgi_rpc", "rpc.service": service, **method}
            if stream_id:
                data["rpc.stream_id"] = stream_id
            if config.record_params:
                limit = config.max_param_value_bytes
                data |= {f"rpc.param.{name}": _clip(value, limit) for name, value in given.items()}
            for name, value in data.items():
                span.set_data(name, value)
        tags = {**config.custom_tags, **method, **self._param_tags(given)}
        if config.record_request_context:
            fields = {"method": info.name, "method_type": info.method_type.value, "service": service}
            scope.set_context("rpc", {**fields, "server_id": self._server.server_id})
            scope.set_user(self._user(auth))
            tags |= {"auth.domain": auth.domain or "", "auth.authenticated": str(auth.authenticated).lower()}
            tags |= {tag: str(auth.claims[c]) for c, tag in config.claim_tags.items() if _plain(auth.claims.get(c))}
        for name, value in tags.items():
            scope.set_tag(name, value[:_MAX_TAG])

    def _user(self, auth: core.AuthContext) -> dict[str, Any] | None:
        if not auth.authenticated:
            return None
        claims = {field: auth.claims.get(claim) for field, claim in self._config.user_claim_map.items()}
        found = {field: value for field, value in claims.items() if isinstance(value, str)}
        return {**found, "id": auth.principal} if auth.principal else found

    def _params(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that may be shown: redacted, and only what is plain."""
        config = self._config
        if not (config.record_params or config.tag_params or config.hashed_tags):
            return {}
        redacted = (config.param_redactor or _redact_secrets)(kwargs)
        return {name: value for name, value in redacted.items() if _plain(value) or _plain_list(value)}

    def _param_tags(self, given: Mapping[str, Any]) -> dict[str, str]:
        config = self._config
        tags = {f"rpc.param.{name}": str(given[name]) for name in config.tag_params if _plain(given.get(name))}
        for name in config.hashed_tags:
            if _plain(given.get(name)):
                tags[f"rpc.param_hash.{name}"] = short_hash(str(given[name])) or ""
        return tags

    def _reports(self, error: Exception) -> bool:
        config = self._config
        if not config.enable_error_capture or isinstance(error, config.ignored_exceptions):
            return False
        return core.error_code_of(error) not in config.ignored_error_codes


def _plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


def _plain_list(value: object) -> bool:
    return isinstance(value, list) and all(_plain(item) and type(item) is type(value[0]) for item in value)


def _clip(value: Any, limit: int) -> Any:
    """A string cut to bytes of UTF-8, never within a character; lists item by item."""
    if isinstance(value, list):
        return [_clip(item, limit) for item in value]
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "replace")[:limit].decode("utf-8", "ignore")


def _status(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    code = str(core.error_code_of(error))
    return "internal_error" if code in ("INTERNAL", "UNKNOWN") else code.lower()
