# Needs: the standard library only.
"""Texts: base64url, and what a peer's text looks like on a terminal or in a log."""

from __future__ import annotations

import base64
import re

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*")


def base64url(raw: bytes) -> str:
    """Encode without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def from_base64url(text: str) -> bytes:
    """Decode what `base64url` makes; ValueError for any other text, also for one that ends in stray bits."""
    if _BASE64URL.fullmatch(text) is None or len(text) % 4 == 1:
        raise ValueError("not base64url")
    raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url(raw) != text:
        raise ValueError("not base64url: stray bits at its end")
    return raw


def printable(value: object, limit: int) -> str:
    """A peer's text: short, on one line, without control characters (it ends on terminals and in logs)."""
    text = value[:limit] if isinstance(value, str) else ""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def escaped(text: str) -> str:
    """A text whose every character is kept, and none of which does more than stand there."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
