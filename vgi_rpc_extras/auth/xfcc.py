# Needs: the standard library only. Seam: `authenticate=` of the HTTP server.
"""Envoy's x-forwarded-client-cert header (auth.md section 4.2).

    header    element ("," element)*        element   pair (";" pair)*        pair   key "=" value
    value     bare text without , ; "       or "quoted text", in which \\" stands for a quote

Two languages are nested here: the header's quoting, and inside Subject the escaping of a distinguished name (RFC
4514). Envoy escapes quotes, not backslashes; so a backslash belongs to the name, and a doubled one, which proxies
write differently, is refused in a Subject rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote

from .. import core as _bound_core
from .bearer import Authenticate
from .proxies import ProxyHeader, TrustedProxies
from .unauthorized import AuthFailure, AuthReason, declare_proxy_headers

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["XfccElement", "mtls_authenticate_xfcc", "parse_xfcc"]

_HEADER = "x-forwarded-client-cert"
_MAX_ELEMENTS = 64
_BARE = re.compile(r'[^,;"]*')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ENCODED = frozenset({"cert", "uri", "by"})
_SINGLE = frozenset({"hash", "cert", "subject", "uri", "by"})


@dataclass(frozen=True)
class XfccElement:
    """What one hop said about the certificate of its caller; None and () for what it did not say.

    Attributes:
        hash: SHA-256 of the certificate, hex.
        cert: the certificate, PEM.
        subject: its distinguished name (RFC 4514).
        uri, dns: its subject alternative names.
        by: the hop's own URI.
    """

    hash: str | None = None
    cert: str | None = None
    subject: str | None = None
    uri: str | None = None
    dns: tuple[str, ...] = ()
    by: str | None = None


def mtls_authenticate_xfcc(
    *,
    validate: Callable[[XfccElement], core.AuthContext] | None = None,
    domain: str = "mtls",
    select_element: Literal["first", "last"] | None = None,
    trusted_proxies: TrustedProxies,
) -> Authenticate:
    """Return an authenticator for Envoy's header.

    Args:
        validate: makes the context; by default the principal is the one common name of the Subject, and the claims
            are hash, subject, uri, dns and by, as far as present.
        domain: of the default context.
        select_element: which of several counts; None refuses them. "last" is the caller of the nearest proxy. "first"
            is the original caller only when the proxy sanitises the header: with Envoy's APPEND_FORWARD the caller
            writes it.
        trusted_proxies: see `mtls_authenticate`. Without them a header of several elements is refused.

    Raises ValueError for another `select_element`, and for an empty or ill-formed list of proxies.
    """
    if select_element not in ("first", "last", None):
        raise ValueError(f"select_element must be first or last, got {select_element!r}")
    source = ProxyHeader(_HEADER, trusted_proxies)

    def authenticate(req: falcon.Request) -> core.AuthContext:
        elements = parse_xfcc(source.read(req))
        if len(elements) > 1 and not (source.restricted and select_element):
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "several elements: set trusted_proxies and select_element")
        element = elements[0 if select_element == "first" else -1]
        return validate(element) if validate else _default_context(element, domain)

    return declare_proxy_headers(authenticate, _HEADER)


def _default_context(element: XfccElement, domain: str) -> core.AuthContext:
    name = _common_name(element.subject or "")
    present = {"hash": element.hash, "subject": element.subject, "uri": element.uri, "by": element.by}
    claims: dict[str, Any] = {key: value for key, value in present.items() if value}
    if element.dns:
        claims["dns"] = list(element.dns)
    return core.AuthContext(domain, True, name, claims)


def parse_xfcc(value: str) -> list[XfccElement]:
    """Return the elements of a header, at least one. AuthFailure for what the grammar does not allow."""
    elements: list[list[tuple[str, str]]] = [[]]
    position = 0
    while position < len(value):
        if value[position] == ",":
            elements.append([])
        elif value[position] != ";":
            pair, position = _pair(value, position)
            elements[-1] += pair
            continue
        position += 1
    found = [_element(pairs) for pairs in elements if pairs]
    if not found or len(elements) > _MAX_ELEMENTS:
        raise _bad("no element, or too many")
    return found


def _bad(detail: str) -> AuthFailure:
    return AuthFailure(AuthReason.INVALID_CREDENTIAL, f"x-forwarded-client-cert: {detail}")


def _pair(value: str, start: int) -> tuple[list[tuple[str, str]], int]:
    """The pair at a position, unless it has no "=" (then none), and the position of the delimiter after it."""
    bare = _BARE.match(value, start)
    assert bare is not None
    key, equals, text = bare[0].partition("=")
    end = bare.end()
    if end < len(value) and value[end] == '"':
        quoted = _QUOTED.match(value, end)
        if not equals or text.strip() or quoted is None:
            raise _bad("a quote where none may be, or without its counterpart")
        key, text, end = key.strip().lower(), _unquote(key.strip().lower(), quoted[1]), quoted.end()
        rest = _BARE.match(value, end)
        assert rest is not None
        if rest[0].strip() or value[rest.end() : rest.end() + 1] == '"':
            raise _bad("text after a quoted value")
        return [(key, text)], rest.end()
    return ([(key.strip().lower(), text.strip())] if equals else []), end


def _unquote(key: str, text: str) -> str:
    if key == "subject" and "\\\\" in text:
        raise _bad("a doubled backslash in the subject")
    return re.sub(r'\\(["\\])', r"\1", text)


def _element(pairs: list[tuple[str, str]]) -> XfccElement:
    found: dict[str, str] = {}
    dns = []
    for key, text in pairs:
        text = _percent_decoded(text) if key in _ENCODED else text
        if key == "dns":
            dns.append(text)
        elif key in found:
            raise _bad("a key twice in one element")
        elif key in _SINGLE:
            found[key] = text
    return XfccElement(dns=tuple(dns), **found)


def _percent_decoded(text: str) -> str:
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _bad("percent-encoding that is not UTF-8") from None


# Distinguished names, RFC 4514 section 3: hexpair or escaped character, else anything but the special ones.
_NAME_KEY = re.compile(r" *([A-Za-z][A-Za-z0-9-]*|[0-9]+(?:\.[0-9]+)*) *= *")
_NAME_VALUE = re.compile(r'((?:\\[0-9A-Fa-f]{2}|\\[ "#+,;<=>\\]|[^"+,;<>\\\x00])*)')
_NAME_ESCAPE = re.compile(r"((?:\\[0-9A-Fa-f]{2})+)|\\(.)", re.DOTALL)


def _common_name(name: str) -> str:
    """The one common name of a distinguished name; AuthFailure when there is none, an empty one or several."""
    names = [value for key, value in _parse_name(name) if key.upper() in ("CN", "2.5.4.3")]
    if len(names) != 1 or not names[0].strip():
        raise _bad("the subject needs exactly one common name")
    return names[0]


def _parse_name(name: str) -> list[tuple[str, str]]:
    found = []
    position = 0
    while position < len(name):
        key = _NAME_KEY.match(name, position)
        value = key and _NAME_VALUE.match(name, key.end())
        if key is None or value is None:
            raise _bad("the subject is not a distinguished name (RFC 4514)")
        found.append((key[1], _name_value(value[1])))
        position = value.end()
        if position < len(name):
            if name[position] not in ",+" or position + 1 == len(name):
                raise _bad("the subject is not a distinguished name (RFC 4514)")
            position += 1
    return found


def _name_value(text: str) -> str:
    if text.startswith("#"):  # BER in hexadecimal: not a readable name, and not to be taken for one
        return ""
    trimmed = re.sub(r"(?<!\\) +\Z", "", text)

    def plain(match: re.Match[str]) -> str:
        return bytes.fromhex(match[1].replace("\\", "")).decode() if match[1] else match[2]

    try:
        return _NAME_ESCAPE.sub(plain, trimmed)
    except UnicodeDecodeError:
        raise _bad("the subject is not UTF-8") from None
