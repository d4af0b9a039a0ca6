# Needs: the standard library only (Falcon's response is passed in).
"""A page that only says something; no script, nothing from elsewhere, every text escaped."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import falcon

_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1c2024;--accent:#0b62b0}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--accent:#6cb2f5}}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem;overflow-wrap:anywhere}p{margin:.4rem 0;overflow-wrap:anywhere}
a{color:var(--accent)}
"""
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def send_notice(resp: falcon.Response, title: str, *texts: str, link: tuple[str, str] | None = None) -> None:
    """Make the response a page with these texts, and one link (URL, text) at most; empty texts are left out."""
    content = f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(text)}</p>" for text in texts if text)
    if link is not None:
        content += f'<p><a href="{html.escape(link[0])}">{html.escape(link[1])}</a></p>'
    resp.content_type = "text/html; charset=utf-8"
    resp.set_header("X-Content-Type-Options", "nosniff")
    resp.set_header("Content-Security-Policy", _POLICY)
    resp.set_header("Referrer-Policy", "no-referrer")
    resp.data = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>{content}</main></body></html>\n"
    ).encode("utf-8", "replace")
