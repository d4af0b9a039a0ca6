# Needs: pyarrow only (Falcon's response is passed in). Used by the HTTP server and by authentication.
"""What a page for people is: frame, style, script, a notice, a place for a key (http.md section 13).

Everything is in the page itself: no font, script or image is fetched from anywhere. What is shown is escaped; the
scripts put answers in as text. A policy by hash keeps anything else from running.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .names import CALL_NAME

if TYPE_CHECKING:
    import falcon


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
p{margin:.4rem 0;overflow-wrap:anywhere}a{color:var(--accent)}.dim{color:var(--dim)}
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
input,select{font:inherit;padding:.3rem .5rem;border:1px solid var(--line);border-radius:6px;background:var(--bg);
color:var(--fg)}.key{margin:1rem 0}.doc{white-space:pre-line}
button{font:inherit;padding:.35rem 1rem;border:0;border-radius:6px;background:var(--accent);color:var(--bg);
cursor:pointer}
button:disabled{opacity:.5}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
"""

# Answers go in by textContent: nothing that a method returns becomes markup. The key of a caller is a variable of this
# page: no storage, cookie or URL has it, and it is gone with the page.
_SCRIPT = """
const sent = {};
const element = (name, text) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  return made;
};
// Numbers of 64 bits keep their digits, there and back.
const exact = (key, value, context) => context && JSON.rawJSON && Number.isInteger(value)
  && !Number.isSafeInteger(value) ? JSON.rawJSON(context.source) : value;
const read = (text) => JSON.parse(text, exact);
const shown = (value) => typeof value === "string" ? value : JSON.stringify(value);

function keep(form) {
  const name = form.elements.header.value.trim(), key = form.elements.key.value.trim();
  for (const old of Object.keys(sent)) delete sent[old];
  if (key) sent[name] = name.toLowerCase() === "authorization" && !key.includes(" ") ? "Bearer " + key : key;
  form.elements.key.value = "";
  form.querySelector("output").textContent = key ? "used until this page is closed" : "no key is used";
}

async function visit(url) {
  const answer = await fetch(url, {headers: {...sent, Accept: "text/html"}, credentials: "same-origin"});
  const found = new DOMParser().parseFromString(await answer.text(), "text/html");
  document.querySelector("main").replaceWith(document.adoptNode(found.querySelector("main")));
  document.title = found.title;
}

function table({columns, rows}) {
  const made = element("table"), head = element("tr");
  for (const {name, type} of columns) head.append(element("th", name + ": " + type));
  made.append(head);
  for (const row of rows) {
    const line = element("tr");
    for (const {name} of columns) line.append(element("td", shown(row[name])));
    made.append(line);
  }
  return made;
}

async function call(form) {
  const button = form.querySelector("button"), output = form.querySelector("pre");
  const rows = form.querySelector(".rows");
  let failed = true, text = "";
  button.disabled = true;
  rows.replaceChildren();
  try {
    const {protocol, method} = form.dataset;
    const body = {protocol, method, args: read(form.elements.args.value || "{}")};
    if (form.elements.input && form.elements.input.value.trim()) body.input = read(form.elements.input.value);
    if (form.elements.rows) body.rows = Number(form.elements.rows.value);
    const base = location.origin + location.pathname.replace(/[/]+$/, "");
    const answer = await fetch(new URL("CALL_NAME", base), {method: "POST", credentials: "same-origin",
      headers: {...sent, "Content-Type": "application/json"}, body: JSON.stringify(body)});
    text = await answer.text();
    try {
      const found = read(text);
      failed = !answer.ok;
      if (found.columns && found.rows) {
        rows.append(table(found));
        delete found.columns;
        delete found.rows;
      }
      text = Object.keys(found).length ? JSON.stringify(found, null, 2) : "";
    } catch (_) { /* shown as it came */ }
  } catch (problem) { text = String(problem); }
  button.disabled = false;
  output.hidden = !text;
  output.className = failed ? "bad" : "";
  output.textContent = text;
  form.dataset.done = "true";
}

document.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  if (form.dataset.method) return call(form);
  keep(form);
  if (form.dataset.locked) visit(location.href);
});
document.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || link.origin !== location.origin || !Object.keys(sent).length) return;
  event.preventDefault();
  history.pushState(null, "", link.href);
  visit(link.href);
});
addEventListener("popstate", () => Object.keys(sent).length ? visit(location.href) : location.reload());
""".replace("CALL_NAME", CALL_NAME)


def _digest(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def page_of(title: str, content: str, *, with_script: bool = False) -> Page:
    """A whole page around `content`, which is HTML."""
    script = _SCRIPT if with_script else ""
    policy = f"default-src 'none'; style-src {_digest(_STYLE)}; base-uri 'none'; form-action 'none'"
    policy += "; frame-ancestors 'none'"
    if script:
        policy += f"; script-src {_digest(script)}; connect-src 'self'"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style></head>\n<body><main>{content}</main>"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )
    return Page(text.encode("utf-8", "replace"), policy)


def escaped(value: object) -> str:
    """Text of anybody as HTML."""
    return html.escape(str(value))


def send(resp: falcon.Response, page: Page) -> None:
    """Make `page` the response."""
    resp.content_type = "text/html; charset=utf-8"
    resp.set_header("X-Content-Type-Options", "nosniff")
    resp.set_header("Content-Security-Policy", page.policy)
    resp.set_header("Referrer-Policy", "no-referrer")
    resp.data = page.body


def notice(title: str, *texts: str, link: tuple[str, str] | None = None) -> Page:
    """A page that only says something, with one link (URL, text) at most; empty texts are left out."""
    content = f"<h1>{escaped(title)}</h1>" + "".join(f"<p>{escaped(text)}</p>" for text in texts if text)
    if link is not None:
        content += f'<p><a href="{escaped(link[0])}">{escaped(link[1])}</a></p>'
    return page_of(title, content)


def locked(title: str, *texts: str, headers: Sequence[str] | None) -> Page:
    """The notice of a page that wants a key, with a place for it; see `key_form`."""
    content = f"<h1>{escaped(title)}</h1>" + "".join(f"<p>{escaped(text)}</p>" for text in texts if text)
    return page_of(title, content + key_form(headers, locked=True), with_script=headers is not None)


def key_form(headers: Sequence[str] | None, *, locked: bool = False) -> str:
    """A place for a caller's key: the headers that may carry it; empty: the caller knows; None: nothing is asked for.

    A `locked` page is asked for again with the key.
    """
    if headers is None:
        return ""
    name = f'<input name="header" value="{escaped((*headers, "Authorization")[0])}" spellcheck="false">'
    if len(headers) == 1:
        name = f'<input name="header" type="hidden" value="{escaped(headers[0])}">'
    elif headers:
        options = "".join(f"<option>{escaped(header)}</option>" for header in headers)
        name = f'<select name="header">{options}</select>'
    if len(headers) != 1:
        name = f"<label>Header {name}</label> "
    return (
        f'<form class="key"{" data-locked=true" if locked else ""}>{name}'
        '<label>Key <input name="key" type="password" autocomplete="off" spellcheck="false"></label> '
        '<button type="submit">Use</button> '
        '<output class="dim">kept by this page only, until it is closed</output></form>'
    )
