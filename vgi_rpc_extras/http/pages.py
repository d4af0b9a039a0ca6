# Needs: pyarrow only. Used by server.py.
"""Pages for people: the landing page, and not found (http.md section 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.html import Page, escaped, notice, page_of

if TYPE_CHECKING:
    import vgi_rpc as core


def landing(server: core.RpcServer, prefix: str, *, describes: bool, repo_url: str | None) -> Page:
    """What a browser sees at the prefix."""
    facts = [("Protocol", server.protocol_name), ("Server", server.server_id)]
    facts += [("Protocol version", server.protocol_version)] if server.protocol_version else []
    facts += [("Server version", server.server_version)] if server.server_version else []
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts)
    links = [f'<a href="{escaped(prefix)}/describe">Methods of this service</a>'] if describes else []
    if repo_url and repo_url.lower().startswith(("https://", "http://")):
        links.append(f'<a href="{escaped(repo_url)}" rel="noreferrer">Source code</a>')
    content = (
        f'<h1>{escaped(server.protocol_name)}</h1><p class="dim">A vgi_rpc service: calls are Arrow IPC over HTTP.</p>'
        f"<dl>{rows}</dl>" + "".join(f"<p>{link}</p>" for link in links)
    )
    return page_of(server.protocol_name, content)


def not_found(server: core.RpcServer, prefix: str) -> Page:
    """The page of a path that is none."""
    return notice(
        "Not found",
        f"This server speaks {server.protocol_name}. A call goes to POST {prefix}/{{protocol}}/{{method}}, a stream"
        f" begins at {prefix}/{{protocol}}/{{method}}/init.",
    )
