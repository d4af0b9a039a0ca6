"""Pages: self-contained, escaped, with a policy; and the calls with JSON behind the describe page."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from typing import Any, ClassVar, Protocol

import pytest

from tests.core import core

pytest.importorskip("falcon")
pytest.importorskip("cryptography")

from tests.extras import test_http_json as weather
from tests.extras.auth_provider import served
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
    assert (status, answer) == (500, {"error": {"code": "UNKNOWN", "message": "ValueError: no luck"}})
    assert unary("who")[1]["logs"] == [{"level": "INFO", "message": "asked"}]
    bad: list[tuple[str, dict[str, Any], int, str]] = [
        ("add", {"a": "x"}, 400, "'a' is not a valid double"),
        ("add", {}, 400, "'a' is not optional but got None"),
        ("add", {"a": 1, "c": 2}, 400, "unknown: c"),
        ("nope", {}, 404, "no method 'nope'"),
    ]
    for method, args, expected, text in bad:
        status, answer = unary(method, **args)
        assert status == expected and text in answer["error"]["message"], answer


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
    for kind in ("text/plain", "", "multipart/form-data; x=application/json"):  # what a form of another origin sends
        assert ask(on, asked, kind)[0] == 415
    guarded = core.make_sync_client(make_server(), authenticate=core.bearer_authenticate_static(tokens={}))
    assert ask(guarded, asked)[0] == 401


# ---- what a reader sees


def test_what_a_record_an_enum_and_a_protocol_say() -> None:
    text = core.make_sync_client(weather.make_server(), prefix="/weather").get("/weather/describe").text
    assert "Stations &amp; what they &lt;b&gt;measure&lt;/b&gt;.\n\nTwo paragraphs." in text
    assert "one of CELSIUS, KELVIN; default &quot;KELVIN&quot;" in text and "Unit.KELVIN" not in text
    assert "default &quot;PT3600S&quot;" in text
    section = text[text.index("<h3>echo</h3>") :].partition("</section>")[0]
    assert re.findall(r"<caption>(\w+)</caption>", section) == ["Parameters", "Result", "Station", "Place"]
    assert "<td><code>station</code></td><td>Station</td>" in section
    assert "<td><code>others</code></td><td>list&lt;Place&gt;</td>" in section
    assert "may be null; default null" in section
    example = html.unescape(re.search(r'name="args"[^>]*>(.*?)</textarea>', section, re.S)[1])  # type: ignore[index]
    assert json.loads(example) == {"station": {"place": {"name": ""}, "built": "2026-01-31"}}
    assert "map&lt;string, Place&gt;" in text and "<td>RecordBatch</td>" in text
    assert text.count('name="input"') == 1 and text.count('name="rows"') == 2


def test_paths_as_people_write_them() -> None:
    client = core.make_sync_client(weather.make_server(), prefix="/weather")
    assert client.get("/weather/").text == client.get("/weather").text
    assert client.get("/weather/describe/").text == client.get("/weather/describe").text
    assert client.get("/weather/").status_code == client.get("/weather/describe/").status_code == 200
    assert client.get("/weather/health/").status_code == 404  # http.md section 2


# ---- in a browser


def open_form(page: Any, method: str) -> Any:
    form = page.locator("section", has=page.locator(f"h3:text-is('{method}')")).locator("details")
    form.locator("summary").click()
    return form


def called(form: Any, args: str = "", **more: str) -> Any:
    """Press the button, and wait for the answer."""
    if args:
        form.locator("[name=args]").fill(args)
    for name, text in more.items():
        form.locator(f"[name={name}]").fill(text)
    form.locator("form").evaluate("form => delete form.dataset.done")
    form.locator("button").click()
    form.locator("xpath=self::*[form/@data-done]").wait_for()
    return form


@pytest.mark.parametrize("slash", ["", "/"])
def test_in_chromium(browser: Any, slash: str) -> None:
    app = core.make_wsgi_app(weather.make_server(), prefix="/weather", token_key=b"k" * 32)
    with served(app) as url:
        page = browser.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{url}/weather/")
        page.click("text=Methods of this service")
        page.goto(f"{url}/weather/describe{slash}")
        form = called(open_form(page, "echo"))
        answer = json.loads(form.locator("pre").inner_text())
        assert answer["result"]["place"] == {"name": "", "unit": "CELSIUS", "height": None}
        form = called(open_form(page, "readings"), '{"end": 9}', rows="3")
        assert form.locator("th").all_inner_texts() == ["n: int64", "at: timestamp[us, tz=UTC]"]
        assert form.locator("td").all_inner_texts()[::2] == ["0", "0", "1"]
        assert json.loads(form.locator("pre").inner_text())["more"] is True
        form = called(open_form(page, "scale"), '{"by": 2}')
        assert json.loads(form.locator("pre").inner_text())["input_columns"] == [{"name": "n", "type": "int64"}]
        called(form, input='[{"n": 4}]')
        assert form.locator("td").all_inner_texts() == ["8"]
        called(form, '{"by": 1}', input='[{"n": 9007199254740993}]')
        assert form.locator("td").all_inner_texts() == ["9007199254740993"]
        assert complaints == []
        form = called(open_form(page, "fail"), '{"code": "NOT_FOUND"}')
        assert form.locator("pre").get_attribute("class") == "bad"
        assert json.loads(form.locator("pre").inner_text())["error"]["code"] == "NOT_FOUND"
        assert all("404" in text for text in complaints)  # what the browser says of any failed request
        page.close()


def key_of_header(req: Any) -> Any:
    if req.get_header("X-API-Key") != "s3cret":
        raise ValueError("no key")
    return core.AuthContext("key", True, "alice")


@pytest.mark.parametrize("header", ["Authorization", "X-API-Key"])
def test_a_key_is_asked_for_and_kept_in_the_page_alone(browser: Any, header: str) -> None:
    alice = core.AuthContext("key", True, "alice")
    bearer = core.bearer_authenticate_static(tokens={"s3cret": alice})
    authenticate = bearer if header == "Authorization" else key_of_header
    app = core.make_wsgi_app(weather.make_server(), authenticate=authenticate, token_key=b"k" * 32)
    with served(app) as url:
        context = browser.new_context()
        page = context.new_page()
        seen: list[str] = []
        page.on("request", lambda request: seen.append(request.url))
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{url}/")
        if header != "Authorization":
            page.fill("[name=header]", header)
        page.fill("[name=key]", "wrong")
        page.click("text=Use")
        page.locator("text=invalid_credential" if header == "Authorization" else "text=unauthorized").wait_for()
        if header != "Authorization":
            page.fill("[name=header]", header)
        page.fill("[name=key]", "s3cret")
        page.keyboard.press("Enter")
        page.click("text=Methods of this service")
        page.locator("h3:text-is('sum')").wait_for()
        assert page.url == f"{url}/describe" and page.title() == "Weather: methods"
        form = called(open_form(page, "sum"), '{"values": [1, 2]}')
        assert json.loads(form.locator("pre").inner_text()) == {"result": 3}
        page.go_back()
        page.locator("text=Methods of this service").wait_for()
        page.go_forward()
        page.locator("h3:text-is('sum')").wait_for()
        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert "s3cret" not in page.evaluate(stored) and context.cookies() == []
        assert not any("s3cret" in asked for asked in seen)
        assert page.locator("[name=key]").input_value() == ""
        page.fill("[name=key]", "")
        page.locator(".key button").click()  # and it can be taken back
        form = called(open_form(page, "odd"))
        assert json.loads(form.locator("pre").inner_text())["error"] == "unauthorized"
        page.reload()
        assert page.title() == "Not authorized"
        assert errors == []
        context.close()
