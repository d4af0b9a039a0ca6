# Needs: pyarrow only (Falcon's response is passed in). Used by the HTTP server and by authentication.
"""Pages for people: landing, describe, not found, not let in (http.md section 13).

Everything is in the page itself: no font, script or image is fetched from anywhere. What is shown is escaped; the
scripts put answers in as text. A policy by hash keeps anything else from running.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from .. import core as _bound_core

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

CALL_NAME = "__call__"  # the describe page posts JSON here


class Page(NamedTuple):
    """A finished page and its Content-Security-Policy."""

    body: bytes
    policy: str


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--fg:#1c2024;--dim:#5d6570;--line:#dfe2e6;--card:#fff;--accent:#0b62b0;
--code:#f1f3f5;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--dim:#9aa3ad;--line:#2f353b;--card:#1b1f23;
--accent:#6cb2f5;--code:#23282d;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif}
main{max-width:58rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 .25rem;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.5rem 0 .75rem}
h3{font-size:1.05rem;margin:0;font-family:ui-monospace,monospace;overflow-wrap:anywhere}
p{margin:.4rem 0}a{color:var(--accent)}.dim{color:var(--dim)}
code,pre,textarea{font:.875rem/1.5 ui-monospace,monospace}
code{background:var(--code);padding:.1em .35em;border-radius:4px}
pre{background:var(--code);padding:.75rem;border-radius:6px;overflow:auto;max-height:24rem;margin:.6rem 0 0;
white-space:pre-wrap;overflow-wrap:anywhere}
pre.bad{color:var(--bad)}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:1rem 1.1rem;margin:.9rem 0}
.head{display:flex;gap:.6rem;align-items:center;flex-wrap:wrap}
.kind{font-size:.75rem;border:1px solid var(--line);border-radius:99px;padding:.05rem .6rem;color:var(--dim)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;margin:.5rem 0;font-size:.92rem}
caption{text-align:left;color:var(--dim);font-size:.85rem;padding:.2rem 0}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-top:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim);font-size:.82rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.2rem;margin:1.2rem 0}dt{color:var(--dim)}
dd{margin:0;overflow-wrap:anywhere}details{margin-top:.6rem}summary{cursor:pointer;color:var(--accent)}
textarea{width:100%;min-height:5rem;margin:.5rem 0;padding:.6rem;border:1px solid var(--line);border-radius:6px;
background:var(--bg);color:var(--fg);resize:vertical}
button{font:inherit;padding:.35rem 1rem;border:0;border-radius:6px;background:var(--accent);color:var(--bg);
cursor:pointer}
button:disabled{opacity:.5}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
"""

# Answers go in by textContent: nothing that a method returns becomes markup.
_SCRIPT = """
for (const form of document.querySelectorAll("form[data-method]")) {
  const input = form.querySelector("textarea"), button = form.querySelector("button");
  const output = form.querySelector("pre");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    let failed = true, text = "";
    button.disabled = true;
    try {
      const {protocol, method} = form.dataset;
      const body = {protocol, method, args: JSON.parse(input.value || "{}")};
      const answer = await fetch("CALL_NAME", {method: "POST", credentials: "same-origin",
        headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
      text = await answer.text();
      try {
        const found = JSON.parse(text);
        failed = !answer.ok || "error" in found;
        text = JSON.stringify(found, null, 2);
      } catch (_) { /* shown as it came */ }
    } catch (problem) { text = String(problem); }
    button.disabled = false;
    output.hidden = false;
    output.className = failed ? "bad" : "";
    output.textContent = text;
  });
}
""".replace("CALL_NAME", CALL_NAME)


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def _page(title: str, content: str, script: str = "") -> Page:
    policy = f"default-src 'none'; style-src {_digest(_STYLE)}; base-uri 'none'; form-action 'none'"
    policy += "; frame-ancestors 'none'"
    if script:
        policy += f"; script-src {_digest(script)}; connect-src 'self'"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>{content}</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
    return Page(text.encode("utf-8", "replace"), policy)


def _text(value: object) -> str:
    return html.escape(str(value))


def send(resp: falcon.Response, page: Page) -> None:
    """Make `page` the response."""
    resp.content_type = "text/html; charset=utf-8"
    resp.set_header("X-Content-Type-Options", "nosniff")
    resp.set_header("Content-Security-Policy", page.policy)
    resp.set_header("Referrer-Policy", "no-referrer")
    resp.data = page.body


def landing(server: core.RpcServer, prefix: str, *, describes: bool, repo_url: str | None) -> Page:
    """What a browser sees at the prefix."""
    facts = [("Protocol", server.protocol_name), ("Server", server.server_id)]
    facts += [("Protocol version", server.protocol_version)] if server.protocol_version else []
    facts += [("Server version", server.server_version)] if server.server_version else []
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    links = [f'<a href="{_text(prefix)}/describe">Methods of this service</a>'] if describes else []
    if repo_url and repo_url.lower().startswith(("https://", "http://")):
        links.append(f'<a href="{_text(repo_url)}" rel="noreferrer">Source code</a>')
    content = (
        f'<h1>{_text(server.protocol_name)}</h1><p class="dim">A vgi_rpc service: calls are Arrow IPC over HTTP.</p>'
        f"<dl>{rows}</dl>" + "".join(f"<p>{link}</p>" for link in links)
    )
    return _page(server.protocol_name, content)


def describe(server: core.RpcServer, prefix: str, calls: bool) -> Page:
    """What the service offers, and, with `calls`, a way to try a unary method."""
    shown = [b for name, b in server.bindings.items() if not name.startswith(core.RESERVED_PROTOCOL_PREFIX)]
    content = f'<h1>{_text(server.protocol_name)}</h1><p class="dim">Server {_text(server.server_id)}</p>'
    for binding in shown:
        version = f" {binding.version}" if binding.version else ""
        content += f"<h2>{_text(binding.name + version)}</h2>"
        content += f'<p class="dim">Contract <code>{_text(binding.protocol_hash[:16])}</code></p>'
        content += "".join(_method(binding.name, info, prefix, calls) for _, info in sorted(binding.methods.items()))
    return _page(f"{server.protocol_name}: methods", content, _SCRIPT if calls else "")


def _method(protocol: str, info: core.RpcMethodInfo, prefix: str, calls: bool) -> str:
    unary = info.method_type is core.MethodType.UNARY
    kind = "unary" if unary else {True: "exchange", False: "producer", None: "stream"}[info.is_exchange]
    path = f"{prefix}/{protocol}/{info.name}{'' if unary else '/init'}"
    parts = [f'<div class="head"><h3>{_text(info.name)}</h3><span class="kind">{kind}</span></div>']
    if info.doc:
        parts.append(f"<p>{_text(info.doc.strip().splitlines()[0])}</p>")
    parts.append(f'<p class="dim"><code>POST {_text(path)}</code></p>')
    parts.append(_fields("Parameters", info.params_schema, info.param_docs, info.param_defaults))
    if info.has_return:
        parts.append(_fields("Result", info.result_schema))
    if info.header_schema is not None:
        parts.append(_fields("Header", info.header_schema))
    if unary and calls:
        parts.append(_form(protocol, info))
    return f"<section>{''.join(parts)}</section>"


def _fields(
    title: str, schema: pa.Schema, docs: Mapping[str, str] | None = None, defaults: Mapping[str, object] | None = None
) -> str:
    if not len(schema):
        return ""
    rows = ""
    for field in schema:
        notes = ["may be null"] if field.nullable else []
        if defaults and field.name in defaults:
            notes.append(f"default {defaults[field.name]!r}")
        if docs and field.name in docs:
            notes.append(docs[field.name])
        rows += f"<tr><td><code>{_text(field.name)}</code></td><td>{_text(field.type)}</td>"
        rows += f"<td>{_text('; '.join(notes))}</td></tr>"
    head = "<tr><th>Name</th><th>Arrow type</th><th>Notes</th></tr>"
    return f'<div class="scroll"><table><caption>{title}</caption>{head}{rows}</table></div>'


def _form(protocol: str, info: core.RpcMethodInfo) -> str:
    needed = [field for field in info.params_schema if field.name not in info.param_defaults]
    template = {field.name: _example(field.type) for field in needed}
    return (
        f'<details><summary>Try it</summary><form data-protocol="{_text(protocol)}" data-method="{_text(info.name)}">'
        f'<textarea aria-label="Arguments of {_text(info.name)} as JSON" spellcheck="false">'
        f"{_text(json.dumps(template, indent=2))}</textarea>"
        '<button type="submit">Call</button><pre hidden aria-live="polite"></pre></form></details>'
    )


def _example(dtype: pa.DataType) -> Any:
    of = pa.types
    if of.is_integer(dtype) or of.is_floating(dtype):
        return 0
    if of.is_boolean(dtype):
        return False
    if of.is_list(dtype):
        return []
    return {} if of.is_map(dtype) or of.is_struct(dtype) else ""


def not_found(server: core.RpcServer, prefix: str) -> Page:
    """The page of a path that is none."""
    return notice(
        "Not found",
        f"This server speaks {server.protocol_name}. A call goes to POST {prefix}/{{protocol}}/{{method}}, a stream"
        f" begins at {prefix}/{{protocol}}/{{method}}/init.",
    )


def notice(title: str, *texts: str, link: tuple[str, str] | None = None) -> Page:
    """A page that only says something, with one link (URL, text) at most; empty texts are left out."""
    content = f"<h1>{_text(title)}</h1>" + "".join(f"<p>{_text(text)}</p>" for text in texts if text)
    if link is not None:
        content += f'<p><a href="{_text(link[0])}">{_text(link[1])}</a></p>'
    return _page(title, content)
