"""Pages: self-contained, escaped, with a policy; and the calls with JSON behind the describe page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any, ClassVar, Protocol

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras.http_service import make_server


class Hostile(Protocol):
    protocol_name: ClassVar[str] = "Hostile.v1"

    def show(self, x: str = "</textarea><script>alert(1)</script>", flag: bool = False) -> str:
        """A <script>alert(2)</script> & more.

        Args:
            x: "><img src=x onerror=alert(3)>
        """
        ...


class HostileImpl:
    def show(self, x: str = "", flag: bool = False) -> str:
        return "ok"


@pytest.fixture(scope="module")
def hostile() -> Any:
    server = core.RpcServer(
        Hostile, HostileImpl(), server_id="<b>id", server_version="</dd><script>", enable_describe=True
    )
    return core.make_sync_client(server, repo_url='https://x/"><script>alert(4)</script>')


@pytest.mark.parametrize("path", ["/", "/describe", "/nothing/at/all/here"])
def test_pages_are_escaped_and_alone(hostile: Any, path: str) -> None:
    answer = hostile.get(path, headers={"Accept": "text/html"})
    text = answer.text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert len(scripts) == (path == "/describe")
    for content in scripts + styles:  # only what the policy names may run
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
        assert "alert" not in content
        assert "innerHTML" not in content
    assert "<img" not in text
    assert not re.search(r'(src|href)="(?!/describe|https://x/)', text)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "prefers-color-scheme:dark" in text
    if path in ("/", "/describe"):
        assert answer.headers["Cache-Control"].startswith("no-cache, no-store")
        assert "Hostile.v1" in text
        assert "&lt;b&gt;id" in text


def test_dangerous_links_are_left_out() -> None:
    client = core.make_sync_client(make_server(), repo_url="javascript:alert(1)")
    assert "javascript" not in client.get("/").text


def test_what_the_describe_page_tells() -> None:
    client = core.make_sync_client(make_server(), prefix="/api")
    text = client.get("/api/describe").text
    names = re.findall(r"<h3>(\w+)</h3>", text)
    assert names[:12] == sorted(names[:12])
    assert {"add", "count", "running_sum"} <= set(names)
    assert "POST /api/Service/add" in text
    assert "POST /api/Service/count/init" in text
    assert "default 1.0" in text
    assert "vgi_rpc.Reflection" not in text
    assert '<a href="/api/describe">' in client.get("/api").text


def test_no_describe_page_without_reflection() -> None:
    client = core.make_sync_client(make_server(enable_describe=False))
    assert client.get("/describe").status_code == 404
    assert "describe" not in client.get("/").text
    assert client.post("/__call__", headers={"Content-Type": "application/json"}).status_code == 404


def ask(client: Any, asked: Any, content_type: str = "application/json") -> tuple[int, Any]:
    content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
    answer = client.post("/__call__", content=content, headers={"Content-Type": content_type})
    return answer.status_code, json.loads(answer.content)


def test_calls_with_json() -> None:
    client = core.make_sync_client(make_server())

    def unary(method: str, **args: Any) -> Any:
        return ask(client, {"protocol": "Service", "method": method, "args": args})

    assert unary("add", a=1, b=2.5) == (200, {"result": 3.5})
    assert unary("add", a=1) == (200, {"result": 2.0})  # the default
    assert unary("nothing") == (200, {"result": None})
    assert unary("blob", size=2) == (200, {"result": "eHg="})
    status, answer = unary("fail", kind="x")
    assert (status, answer["error"]["message"]) == (200, "ValueError: no luck")
    assert unary("who")[1]["logs"] == [{"level": "INFO", "message": "asked"}]
    bad: list[tuple[str, dict[str, Any], str]] = [
        ("add", {"a": "x"}, "'a' is not a valid double"),
        ("add", {}, "missing required argument"),
        ("add", {"a": 1, "c": 2}, "unknown: c"),
        ("nope", {}, "no method 'nope'"),
        ("count", {"end": 1}, "is a stream"),
    ]
    for method, args, text in bad:
        status, answer = unary(method, **args)
        assert status == 400, answer
        assert text in answer["description"] or method == "add", answer


@pytest.mark.parametrize(
    "asked", [b"", b"[]", b'{"protocol":1,"method":"add"}', b'{"protocol":"Service"}', b"[" * 100_000]
)
def test_bad_json(asked: bytes) -> None:
    assert ask(core.make_sync_client(make_server()), asked)[0] == 400


def test_json_calls_are_guarded_and_can_be_switched_off() -> None:
    asked = {"protocol": "Service", "method": "add", "args": {"a": 1, "b": 1}}
    off = core.make_sync_client(make_server(), enable_describe_calls=False)
    assert off.post("/__call__", content=json.dumps(asked).encode()).status_code == 404
    assert "<script>" not in off.get("/describe").text
    on = core.make_sync_client(make_server())
    assert ask(on, asked, "text/plain")[0] == 400  # what a form of another origin could send
    guarded = core.make_sync_client(make_server(), authenticate=core.bearer_authenticate_static(tokens={}))
    assert ask(guarded, asked)[0] == 401
