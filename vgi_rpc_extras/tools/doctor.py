# Needs: pyarrow only; --url needs http/ beside it. Seam: transports and their Channel.
"""What is wrong with a service: reach it, look at what it says, and give advice.

    python -m vgi_rpc doctor --cmd "python worker.py --describe"

Every check waits for a bounded time. What a peer says is shown in one line, escaped and cut.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pyarrow as pa

from .. import core as _bound_core
from ..common.texts import escaped

if TYPE_CHECKING:
    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["Check", "Report", "examine"]

_Kind = Literal["cmd", "unix", "tcp", "url"]
_MARKER = b"\xff\xff\xff\xff"  # what an Arrow IPC message begins with (wire.md section 1)
_FIRST = core.IpcLimits(65_536, 1, 1, 65_536, 65_536)  # of the first answer, which has no columns
_SHOWN_BYTES = 80
_SHOWN_TEXT = 1000
_MAX_DIALS = 16  # to meet more than one process of a service
_PINGS, _PING_SECONDS = 20, 1.0
_EXTRAS = {
    "http client": "http_connect",
    "http server": "make_wsgi_app",
    "jwt": "jwt_authenticate",
    "storage": "FetchConfig",
    "s3": "S3Storage",
    "gcs": "GCSStorage",
    "otel": "OtelConfig",
    "sentry": "SentryConfig",
}


class Check(NamedTuple):
    """One thing that was looked at. A `note` is worth knowing, a `fail` keeps callers from working."""

    name: str
    status: Literal["ok", "note", "fail"]
    text: str
    advice: str = ""


class Report:
    """The checks in their order, and what was found out, by topic, for programs."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.facts: dict[str, Any] = {}

    @property
    def healthy(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def add(self, name: str, status: Literal["ok", "note", "fail"], text: str, advice: str = "") -> None:
        """Append a check; its texts may come from a peer."""
        self.checks.append(Check(name, status, _printable(text), _printable(advice)))

    def to_json(self) -> dict[str, Any]:
        """What JSON has of this report."""
        return {"healthy": self.healthy, "checks": [check._asdict() for check in self.checks], **self.facts}

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            lines.append(f"{check.status:4}  {check.name:9}  {check.text}")
            if check.advice:
                lines.append(f"{'':17}-> {check.advice}")
        return "\n".join([*lines, "healthy" if self.healthy else "not healthy"])


def examine(
    dial: Callable[[], Any],
    kind: _Kind,
    *,
    protocol: str | None = None,
    against: type | None = None,
    timeout: float = 10.0,
) -> Report:
    """Reach a service and report on it; the service is left, and a worker that was started is ended.

    Args:
        dial: makes a transport, possibly twice. Its OSErrors and RpcErrors are part of the report.
        kind: how the service is reached, for the advice.
        protocol: which one to describe; the server's first by default.
        against: the Protocol class of a caller, to compare with what the service says of itself.
        timeout: seconds for each step.
    """
    report = Report()
    _here(report)
    try:
        transport = dial()
    except (OSError, core.RpcError) as exc:
        report.add("connect", "fail", _story(exc), _advice(exc, kind))
        return report
    with core.RpcConnection(core.Reflection, transport, timeout=timeout) as proxy:
        if kind == "cmd":
            argv = list(map(str, transport.proc.args))
            report.add("start", "ok", f"process {transport.proc.pid}: {' '.join(argv)}")
            answers = _contact(report, dial, transport, kind, timeout)
            _python(report, argv[0], timeout)
        elif kind == "url":
            answers = _http(report, dial, transport, timeout)
        else:
            answers = _contact(report, dial, transport, kind, timeout)
        if answers and _ping(report, proxy, kind):
            _describe(report, proxy, kind, protocol, against)
        if kind == "cmd" and transport.channel.broken is None:
            _ending(report, transport, timeout)
    return report


# ---- this side


def _here(report: Report) -> None:
    known = dir(core)
    found = {extra: name in known for extra, name in _EXTRAS.items()}
    versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "vgi_rpc": core.__version__}
    report.facts["versions"] = {**versions, "python_path": sys.executable, "vgi_rpc_path": core.__file__}
    report.facts["extras"] = found
    report.add("here", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    missing = ", ".join(extra for extra, there in found.items() if not there)
    have = ", ".join(extra for extra, there in found.items() if there)
    report.add("extras", "ok", f"{have or 'none'}{f'; not installed: {missing}' if missing else ''}")


# ---- a worker that was started


def _python(report: Report, program: str, timeout: float) -> None:
    """If the worker is started by a Python, say which: it need not be the one of this command."""
    if not re.fullmatch(r"python[0-9.]*(?:\.exe)?", os.path.basename(program)):
        return
    code = (
        "import sys; print('%d.%d.%d' % sys.version_info[:3], flush=True); import pyarrow; print(pyarrow.__version__)"
    )
    try:
        ran = subprocess.run(
            [program, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired, ValueError) as exc:
        return report.add("python", "note", f"{program}: {exc}", "does this Python start at all?")
    python, _, arrow = ran.stdout.strip().partition("\n")
    report.facts["worker"] = {"python": python, "pyarrow": arrow or None}
    if not arrow:
        last = ran.stderr.strip().rpartition("\n")[2]
        return report.add("python", "note", f"{python}, no pyarrow: {last}", f"{program} -m pip install pyarrow")
    old = tuple(map(int, re.findall(r"\d+", python)[:2])) < (3, 11)
    return report.add(
        "python",
        "note" if old else "ok",
        f"the worker's is {python}, pyarrow {arrow}",
        "vgi_rpc needs Python 3.11: start the worker with another one" if old else "",
    )


def _ending(report: Report, transport: core.SubprocessTransport, timeout: float) -> None:
    """End the worker's input: it should say no more, and go."""
    channel, proc = transport.channel, transport.proc
    assert proc.stdin is not None
    channel.check()
    try:
        channel.enter("the worker's end", timeout)
        proc.stdin.close()
        more = b"" if channel.at_end() else bytes(channel.buf[channel.pos :])
        channel.buf, channel.pos = b"", 0
        channel.leave()
    except BaseException as exc:
        failure = channel.fail(exc)  # which kills the worker
        if not isinstance(failure, core.RpcError):
            raise failure  # noqa: B904 (fail sets the cause)
        return report.add("end", "note", _story(failure), _STAYS)
    if more:
        report.add("stdout", "fail", f"after the last answer came {_shown(more)}", _PRINTS)
    else:
        report.add("stdout", "ok", "nothing but Arrow")
    try:
        status = proc.wait(timeout)
    except subprocess.TimeoutExpired:
        proc.kill()
        return report.add(
            "end", "note", f"it still ran {timeout:g} s after its input had ended, and was killed", _STAYS
        )
    said = f"exit status {status}" if status >= 0 else f"signal {-status}"
    return report.add("end", "ok" if status == 0 else "note", f"{said} when its input ended")


_STAYS = "a worker should end when its stdin ends, or it stays behind when its caller is killed"
_PRINTS = "something prints to the worker's stdout: run_server() first, or print to stderr"


# ---- first contact


class _Foreign(Exception):
    """The peer does not speak Arrow; `data` is what it said first."""

    def __init__(self, data: bytes) -> None:
        super().__init__(f"instead of Arrow came {_shown(data)}")
        self.data = data


def _contact(report: Report, dial: Callable[[], Any], transport: Any, kind: _Kind, timeout: float) -> bool:
    """Ask what every server answers, `__transport_options__` (wire.md section 10), and look at the raw bytes."""
    began = time.monotonic()
    try:
        options = _ask(transport.channel, timeout)
    except core.RpcError as exc:
        cause = exc.__cause__
        if kind != "cmd" and _is_http(dial):
            report.add("answer", "fail", "an HTTP server answers there", _HTTP)
        elif isinstance(cause, _Foreign):
            name = "stdout" if kind == "cmd" else "answer"
            report.add(name, "fail", str(cause), _foreign_advice(cause.data, kind))
        else:
            report.add("answer", "fail", _story(exc), _advice(exc, kind))
        return False
    shm = options.get(core.TRANSPORT_SHM_KEY) == b"true"
    took = time.monotonic() - began
    report.facts["transport"] = {"first_answer_seconds": round(took, 6), "shared_memory": shm}
    report.add("answer", "ok", f"Arrow after {_span(took)}; shared memory: {'yes' if shm else 'no'}")
    return True


def _ask(channel: core.Channel, timeout: float) -> Mapping[bytes, bytes]:
    metadata = {
        core.RPC_METHOD_KEY: core.TRANSPORT_OPTIONS_METHOD_NAME.encode(),
        core.REQUEST_VERSION_KEY: core.REQUEST_VERSION,
        **core.worker_transport_metadata(),
    }
    request = core.serialize_record_batch_bytes(core.empty_batch(core.EMPTY_SCHEMA), pa.KeyValueMetadata(metadata))
    channel.check()
    try:
        channel.enter("the first question", timeout)
        with contextlib.suppress(BrokenPipeError):  # what it said before it went may tell why
            channel.write(request)
        while len(channel.buf) < len(_MARKER) and _MARKER.startswith(channel.buf):
            channel.more(len(_MARKER))
        if not channel.buf.startswith(_MARKER):
            raise _Foreign(bytes(channel.buf))
        limits, channel.limits = channel.limits, _FIRST
        found = core.read_answer(channel)[1]
        channel.limits = limits
        channel.leave()
    except BaseException as exc:
        raise channel.fail(exc)  # noqa: B904 (fail sets the cause)
    return found


def _is_http(dial: Callable[[], Any]) -> bool:
    """Whether who is silent, or hangs up, on Arrow answers HTTP."""
    try:
        transport = dial()
    except OSError:
        return False
    channel = transport.channel
    try:
        channel.enter("a look for HTTP", 1.0)
        channel.write(b"GET / HTTP/1.0\r\n\r\n")
        channel.more(5)
        found: bool = channel.buf.startswith(b"HTTP/")
        channel.buf = b""
        channel.leave()
    except Exception as exc:
        channel.fail(exc)
        return False
    finally:
        transport.close()
    return found


# ---- over HTTP


def _http(report: Report, dial: Callable[[], Any], transport: Any, timeout: float) -> bool:
    try:
        found = transport.capabilities(timeout)
    except (OSError, core.RpcError) as exc:
        report.add("answer", "fail", _story(exc), _advice(exc, "url"))
        return False
    names = ("max_request_bytes", "max_response_bytes", "max_externalized_response_bytes", "max_upload_bytes")
    sizes = {name: getattr(found, name) for name in names}
    encodings = [encoding.value for encoding in found.supported_encodings]
    report.facts["http"] = {
        **sizes,
        "upload_url_support": found.upload_url_support,
        "externalization_enabled": found.externalization_enabled,
        "sticky_enabled": found.sticky_enabled,
        "supported_encodings": encodings,
    }
    said = [f"{name.removeprefix('max_')} at most {size}" for name, size in sizes.items() if size is not None]
    coded = f"encodings {', '.join(encodings) or 'none'}"
    report.add("answer", "ok", f"HTTP; {'; '.join([*said, coded])}")
    if found.own_token_key is not None:
        _own_keys(report, dial, {found.own_token_key}, timeout)
    return True


def _own_keys(report: Report, dial: Callable[[], Any], keys: set[str | None], timeout: float) -> None:
    """A process without a token_key: are there others, which cannot go on with its streams?"""
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError, core.RpcError):
        for _ in range(_MAX_DIALS):
            if len(keys) > 1:
                break
            transport = stack.enter_context(contextlib.closing(dial()))
            keys.add(transport.capabilities(timeout).own_token_key)
    advice = "give all processes the same token_key= of make_wsgi_app (worker --http: VGI_RPC_TOKEN_KEY)"
    if len(keys) > 1:
        text = "several processes, each with a key of its own: none continues a stream that another one began"
        return report.add("token key", "fail", text, advice)
    report.add("token key", "note", "made by the process itself: no other one continues its streams", advice)


# ---- what the service says


def _ping(report: Report, proxy: Any, kind: _Kind) -> bool:
    times: list[float] = []
    end = time.monotonic() + _PING_SECONDS
    try:
        while len(times) < _PINGS and (not times or time.monotonic() < end):
            times.append(core.ping(proxy))
    except (OSError, core.RpcError) as exc:
        report.add("ping", "fail", _story(exc), _advice(exc, kind))
        return False
    median = statistics.median(times)
    report.facts["ping"] = {"median_seconds": median, "max_seconds": max(times), "count": len(times)}
    report.add("ping", "ok", f"median {_span(median)}, at most {_span(max(times))}, of {len(times)}")
    return True


def _describe(report: Report, proxy: Any, kind: _Kind, protocol: str | None, against: type | None) -> None:
    try:
        hosted = [p.name for p in core.list_protocols(proxy)]
        about = proxy.list_protocols()
        ours = [name for name in hosted if not name.startswith(core.RESERVED_PROTOCOL_PREFIX)]
        report.facts["server"] = {"id": about.server_id, "version": about.server_version, "protocols": hosted}
        if against is not None:
            protocol = next((info.protocol_name for info in core.rpc_methods(against).values()), against.__name__)
        name = protocol or next(iter(ours), "")
        if name not in hosted:
            said = f"the server hosts no protocol '{name}'" if name else "the server hosts no application protocol"
            return report.add("describe", "fail", said, f"it hosts {', '.join(hosted)}")
        found = core.describe_protocol(proxy, name)
        _service(report, found)
        if against is not None:
            _compare(report, against, found)
    except core.ReflectionNotSupportedError:
        return report.add("describe", "note", "the service does not describe itself", _DESCRIBE)
    except (OSError, core.RpcError) as exc:
        closed = isinstance(exc, core.RpcError) and exc.error_code == core.Code.UNAUTHENTICATED
        return report.add("describe", "note" if closed else "fail", _story(exc), _advice(exc, kind))
    if len(ours) > 1:
        report.add("protocols", "ok", ", ".join(ours))
    return None


def _compare(report: Report, against: type, found: core.ServiceDescription) -> None:
    """Whether a caller with this Protocol can talk to the service."""
    differences = core.compare_protocols(against, found)
    report.facts["differences"] = differences
    if not differences:
        report.add("protocol", "ok", f"{against.__name__} here is what the service has")
    for text in differences:
        report.add("protocol", "fail", text, "caller and service are of different versions")


def _service(report: Report, found: core.ServiceDescription) -> None:
    methods = found.methods.values()
    streams = sum(method.method_type is core.MethodType.STREAM for method in methods)
    schemas = [schema for m in methods for schema in (m.params_schema, m.result_schema, m.header_schema) if schema]
    size = sum(schema.serialize().size for schema in schemas)
    report.facts["service"] = {
        "protocol": found.protocol_name,
        "protocol_version": found.protocol_version,
        "protocol_hash": found.protocol_hash,
        "methods": len(found.methods),
        "streams": streams,
        "schema_bytes": size,
    }
    version = f" {found.protocol_version}" if found.protocol_version else ""
    counted = f"{len(found.methods)} methods, {streams} of them streams, {size} bytes of schemas"
    report.add("describe", "ok", f"{found.protocol_name}{version}, hash {found.protocol_hash}; {counted}")


# ---- words

_HTTP = "this is an HTTP server: --url http://HOST:PORT instead of --tcp or --unix"
_DESCRIBE = "start it with --describe, or enable_describe=True; calls through a Protocol class work without it"
_CONNECT_ADVICE: tuple[tuple[type[BaseException], Mapping[str, str]], ...] = (
    (
        FileNotFoundError,
        {
            "cmd": "there is no such program: is it installed, and on PATH? No shell is involved in --cmd",
            "unix": "there is no such socket: start a server with --unix PATH, or look for a typing error",
        },
    ),
    (
        PermissionError,
        {
            "cmd": "the program may not be executed by this user: chmod +x, or name its interpreter first",
            "unix": "this user may not connect: look at the modes of the socket and of the directories above it",
        },
    ),
    (
        ConnectionRefusedError,
        {
            "unix": "nobody listens: the server is gone and has left its socket, or the path is no socket",
            "tcp": "nobody listens: is the server running, on this address and port?",
            "url": "nobody listens: is the server running, on this address and port?",
        },
    ),
    (socket.gaierror, dict.fromkeys(("tcp", "url"), "this host name is not known here")),
    (
        TimeoutError,
        {
            "cmd": "it started but does not answer: does it call run_server()? --timeout waits longer",
            "unix": "somebody listens but does not answer: busy with another client (--threaded), or another program",
            "tcp": "no answer: a firewall, a busy server (--threaded), or another protocol on this port",
            "url": "no answer: a firewall, or a server that is too busy",
        },
    ),
    (core.WorkerDiedError, {"cmd": "the worker ended before it answered; what it said is above, on stderr"}),
    (
        ConnectionError,
        dict.fromkeys(("unix", "tcp", "url"), "the far side hung up: another protocol, TLS, or a server that failed"),
    ),
)


def _advice(exc: BaseException, kind: _Kind) -> str:
    if isinstance(exc, core.WorkerDiedError):
        missing = re.search(r"No module named '([^']{1,100})'", "\n".join(exc.stderr_tail))
        if missing:
            return f"the worker's Python lacks the module {missing[1]}: install it there, or start another Python"
    if kind == "url" and isinstance(exc, core.RpcError):
        status = re.search(r"HTTP (\d{3})", exc.error_message)
        if exc.error_code == core.Code.UNAUTHENTICATED:
            return "the service wants credentials: VGI_RPC_TOKEN in the environment, or --header 'NAME: VALUE'"
        if status and status[1] in ("404", "405", "501"):
            return "no service under this path: is it mounted under a prefix? Put it into the URL, or --prefix /PATH"
    for candidate in (exc.__cause__, exc):
        for known, advice in _CONNECT_ADVICE:
            if isinstance(candidate, known) and kind in advice:
                return advice[kind]
    return ""


def _foreign_advice(first: bytes, kind: _Kind) -> str:
    if first[:2] in (b"\x15\x03", b"\x16\x03"):
        return "this port speaks TLS: --url https://HOST:PORT if it is HTTP, else tcp_connect(..., tls_context=)"
    if kind != "cmd":
        return "another protocol is spoken there: look at the port or path"
    if re.match(rb"(PORT|UNIX|TCP):", first):
        return "this command serves on a socket: leave out its --http, --unix or --tcp, or connect to what it says"
    return _PRINTS


def _story(exc: BaseException) -> str:
    """What happened, in one line."""
    if not isinstance(exc, core.RpcError):
        return "; ".join([str(exc) or type(exc).__name__, *getattr(exc, "__notes__", ())])
    words = exc.stderr_tail[-1:] if isinstance(exc, core.WorkerDiedError) else ()
    return "; its last words: ".join([exc.error_message, *words])


def _shown(data: bytes) -> str:
    """The bytes before the next Arrow message, escaped and cut."""
    junk = bytes(data[: 4 * _SHOWN_BYTES]).split(_MARKER)[0] or bytes(data[:_SHOWN_BYTES])
    return f"{junk[:_SHOWN_BYTES]!r}{'...' if len(junk) > _SHOWN_BYTES else ''}"


def _printable(text: str) -> str:
    cut = text if len(text) <= _SHOWN_TEXT else text[:_SHOWN_TEXT] + "..."
    return escaped(cut)


def _span(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"
