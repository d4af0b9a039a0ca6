# Needs: nothing but the core. Used by client.py.
"""What responses mean that hold no Arrow body: a gateway's, a login page, a JSON error; and when to ask again."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from .. import core as _bound_core
from ..auth.unauthorized import AuthenticationError, read_unauthorized
from ..common import names
from ..common.texts import printable
from ..common.urls import redact_url
from ._connection import Response, Sent
from .capabilities import capabilities_of

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["HttpRetryConfig", "HttpTransientError"]

_T = TypeVar("_T")
_LOG_RETRY = logging.getLogger("vgi_rpc.http.retry")
_PREVIEW = 200
_GATEWAY_STATUS = frozenset({429, 502, 503, 504})


class HttpTransientError(core.RpcError):
    """The server, or something in front of it, says that trying again later may help.

    Attributes:
        status_code: 429, 502, 503 or 504.
        retry_after: seconds to wait, if it said so.
    """

    def __init__(self, status_code: int, body_preview: str, retry_after: float | None = None) -> None:
        details = [] if retry_after is None else [core.RetryInfo(retry_after).to_json()]
        shown = f": {body_preview}" if body_preview else ""
        later = "" if retry_after is None else f"; try again in {retry_after:g} s"
        sent: Sent = "maybe" if status_code in (502, 504) else "answered"  # a gateway knows less than a server
        super().__init__(
            "HttpTransientError",
            f"HTTP {status_code}{shown}{later}",
            error_code=core.Code.RESOURCE_EXHAUSTED if status_code == 429 else core.Code.UNAVAILABLE,
            error_details=details,
            sent=sent,
        )
        self.status_code = status_code
        self.body_preview = body_preview
        self.retry_after = retry_after


def unauthorized(response: Response) -> AuthenticationError:
    headers = response.headers
    request_id = printable(headers.get(names.REQUEST_ID_HEADER.lower(), ""), 128)
    body = b"" if "content-encoding" in headers else response.body
    return read_unauthorized(body, headers, request_id=request_id)


@dataclasses.dataclass(frozen=True)
class HttpRetryConfig:
    """How often, and how patiently, requests that are safe to repeat are repeated; RPC calls never are.

    Args:
        max_retries: attempts after the first.
        backoff_base: seconds; the n-th pause is a random part of `backoff_base * 2**n`.
        backoff_max: no pause is longer.
        retryable_status_codes: HTTP statuses that are worth another attempt.
        retry_on_connection_error: also repeat what found no server, or got no answer.
        respect_retry_after: wait at least as long as the server asks for, up to `backoff_max`.
    """

    max_retries: int = 3
    backoff_base: float = 0.5
    backoff_max: float = 30.0
    retryable_status_codes: frozenset[int] = _GATEWAY_STATUS
    retry_on_connection_error: bool = True
    respect_retry_after: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        for name in ("max_retries", "backoff_base", "backoff_max"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def delay(self, attempt: int, retry_after: float | None = None) -> float:
        """Seconds to wait before the attempt that follows attempt number `attempt` (0 is the first)."""
        pause = min(random.uniform(0, self.backoff_base * 2.0 ** min(attempt, 60)), self.backoff_max)
        if retry_after is not None and self.respect_retry_after:
            pause = max(pause, min(retry_after, self.backoff_max))
        return pause

    def worth_another(self, exc: core.RpcError) -> bool:
        """Whether this failure may go away by itself."""
        if isinstance(exc, HttpTransientError):
            return exc.status_code in self.retryable_status_codes
        lost = isinstance(exc, core.ConnectionLostError | core.DeadlineExceededError)
        return lost and self.retry_on_connection_error and exc.sent != "answered"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header: a number, or a date (RFC 9110 section 10.2.3)."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


def repeated(config: HttpRetryConfig, deadline: float | None, attempt_once: Callable[[], _T]) -> _T:
    attempt = 0
    while True:
        try:
            return attempt_once()
        except core.RpcError as exc:
            if attempt >= config.max_retries or not config.worth_another(exc):
                raise
            pause = config.delay(attempt, getattr(exc, "retry_after", None))
            if deadline is not None and time.monotonic() + pause >= deadline:
                raise
            _LOG_RETRY.debug("attempt %d failed (%s); the next in %.2f s", attempt + 1, exc.error_type, pause)
        time.sleep(pause)
        attempt += 1


# ---- refusals


def is_arrow(response: Response) -> bool:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() == names.ARROW_CONTENT_TYPE


def refusal(response: Response, doing: str, error_type: str) -> core.RpcError:
    """The error of a response that holds no Arrow body: a gateway's, a login page, a JSON error."""
    status = response.status
    if status == 401:
        return unauthorized(response)
    if status == 413:
        return request_too_large(f"{doing}: HTTP 413", capabilities_of(response.headers).max_request_bytes, "answered")
    preview = ""
    if status != 403 and "content-encoding" not in response.headers:
        preview = printable(response.body[: 4 * _PREVIEW].decode("utf-8", "replace"), _PREVIEW)
    if 300 <= status < 400 and "location" in response.headers:
        return core.RpcError(error_type, f"{doing}: HTTP {status} redirects to {_place(response)}; connect to that one")
    if status in _GATEWAY_STATUS:
        return HttpTransientError(status, preview, retry_after(response.headers))
    sent: Sent = "maybe" if status >= 500 else "answered"
    kind = printable(response.headers.get("content-type", "no content type"), 80)
    if "html" in kind:
        preview = f"{preview[:40]} (a web page, not a service: check the URL and its prefix, prefix= or --prefix)"
    return core.RpcError(error_type, f"{doing}: HTTP {status} ({kind}): {preview or '(no text)'}", sent=sent)


def _place(response: Response) -> str:
    """Where a redirect leads, without what may be secret in it."""
    location = response.headers["location"]
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location):
        return f"another server, {redact_url(location)}"
    return printable(location.partition("?")[0], _PREVIEW) or "nowhere"


def request_too_large(what: str, limit: int | None, sent: Sent) -> core.RpcError:
    return core.RpcError(
        "RequestTooLarge",
        f"{what}; the server takes {'less' if limit is None else limit} and the request was not uploaded"
        " (external_location= and a server that vends upload URLs allow more)",
        error_code=core.Code.RESOURCE_EXHAUSTED,
        sent=sent,
    )


def no_support(doing: str, sent: Sent) -> core.RpcError:
    return core.RpcError(
        "ProtocolError",
        f"{doing}: the server does not confirm {names.ACCEPT_MAX_RESPONSE_BYTES_HEADER}, so its responses are"
        " unbounded; accepted_max_response_bytes=None talks to it nevertheless",
        sent=sent,
    )
