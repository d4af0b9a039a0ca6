"""Client certificates behind a proxy: real certificates, Envoy's header, and a real nginx in front."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("cryptography")
pytest.importorskip("falcon")

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.core import core
from tests.extras.auth_app import Calc, client, make_app, refused, request
from vgi_rpc_extras.auth import (
    AuthFailure,
    mtls_authenticate,
    mtls_authenticate_fingerprint,
    mtls_authenticate_subject,
    mtls_authenticate_xfcc,
    parse_xfcc,
    proxy_headers_of,
)
from vgi_rpc_extras.auth.xfcc import _common_name

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
HEADER = "X-SSL-Client-Cert"
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class Authority:
    """Makes certificates."""

    def __init__(self, name: str = "Test CA") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.name, self.key, ca=True)

    def _sign(self, subject: x509.Name, key: Any, *, ca: bool = False, start: Any = -DAY, end: Any = DAY) -> Any:
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self.name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW + start)
            .not_valid_after(NOW + end)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            usage = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
            builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            names = x509.SubjectAlternativeName([x509.DNSName("localhost")])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, *attributes: tuple[x509.ObjectIdentifier, str], **dates: Any) -> tuple[x509.Certificate, Any]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(oid, value, _validate=False) for oid, value in attributes])
        return self._sign(subject, key, **dates), key


CA = Authority()
ALICE, ALICE_KEY = CA.issue((NameOID.ORGANIZATION_NAME, "Acme, Inc."), (NameOID.COMMON_NAME, "alice"))


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def key_pem(key: Any) -> bytes:
    plain = serialization.NoEncryption()
    found: bytes = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    return found


def header(certificate: x509.Certificate) -> dict[str, str]:
    return {HEADER: quote(pem(certificate), safe="+/=")}


ALL: Any = {"trusted_proxies": None}
subject: Any = mtls_authenticate_subject(**ALL)


# PEM in a header


@pytest.mark.parametrize(
    "form",
    [
        lambda text: quote(text, safe=""),
        lambda text: quote(text, safe="+/= "),
        lambda text: text.replace("\n", " "),
        lambda text: text.strip().replace("\n", "\t"),
        lambda text: quote(text + pem(CA.certificate)),
    ],
    ids=["escaped", "plus-kept", "blanks", "tabs", "bundle"],
)
def test_forms_of_the_header(form: Any) -> None:
    auth = subject(request({HEADER: form(pem(ALICE))}))
    assert (auth.domain, auth.authenticated, auth.principal) == ("mtls", True, "alice")
    assert auth.claims == {
        "subject_dn": "CN=alice,O=Acme\\, Inc.",
        "serial": format(ALICE.serial_number, "x"),
        "not_valid_after": ALICE.not_valid_after_utc.isoformat(),
    }


def test_plus_is_not_a_blank() -> None:
    certificates = (CA.issue((NameOID.COMMON_NAME, f"n{number}"))[0] for number in range(50))
    certificate = next(one for one in certificates if "+" in pem(one))
    assert "+" in header(certificate)[HEADER]
    assert subject(request(header(certificate))).principal.startswith("n")


def test_missing_header_is_the_proxys_fault() -> None:
    for value in ({}, {HEADER: ""}):
        with refused("proxy_required"):
            subject(request(value))
    assert proxy_headers_of(subject) == (HEADER,)
    assert proxy_headers_of(mtls_authenticate_xfcc(trusted_proxies=None)) == ("x-forwarded-client-cert",)


@pytest.mark.parametrize(
    "value",
    [
        "junk",
        "(null)",
        "%zz",
        "%ff%fe",
        "-----BEGIN CERTIFICATE-----",
        "-----BEGIN CERTIFICATE----- AAAA -----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE----- A=A -----END CERTIFICATE-----",
        "-----BEGIN PRIVATE KEY----- AAAA -----END PRIVATE KEY-----",
        "x" + quote(pem(ALICE)),
        quote(pem(ALICE)) + "," + quote(pem(ALICE)),
        quote(pem(ALICE)) + "junk",
        "A" * 70_000,
    ],
    ids=range(12),
)
def test_broken_headers(value: str) -> None:
    with refused("invalid_credential"):
        subject(request({HEADER: value}))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_certificates_broken_in_many_ways(data: st.DataObject) -> None:
    der = bytearray(ALICE.public_bytes(serialization.Encoding.DER))
    for _ in range(data.draw(st.integers(1, 4))):
        kind, at = data.draw(st.sampled_from("idc")), data.draw(st.integers(0, len(der) - 2))
        der[at : at + (kind != "i")] = b"" if kind == "d" else bytes([data.draw(st.integers(0, 255))])
    import base64

    text = f"-----BEGIN CERTIFICATE----- {base64.b64encode(bytes(der)).decode()} -----END CERTIFICATE-----"
    with contextlib.suppress(AuthFailure):
        assert subject(request({HEADER: text})).principal.strip()


def test_validity_is_checked_by_default() -> None:
    old, _ = CA.issue((NameOID.COMMON_NAME, "old"), start=-2 * DAY, end=-DAY)
    early, _ = CA.issue((NameOID.COMMON_NAME, "early"), start=DAY, end=2 * DAY)
    for certificate in (old, early):
        with refused("expired_credential"):
            subject(request(header(certificate)))
        assert mtls_authenticate_subject(**ALL, check_expiry=False)(request(header(certificate))).principal


@pytest.mark.filterwarnings("ignore:Attribute's length")
@pytest.mark.parametrize("names", [[], [""], [" "], ["a", "b"]], ids=str)
def test_one_common_name_is_required(names: list[str]) -> None:
    attributes = [(NameOID.ORGANIZATION_NAME, "x"), *((NameOID.COMMON_NAME, name) for name in names)]
    with refused("invalid_credential"):
        subject(request(header(CA.issue(*attributes)[0])))


def test_allowed_subjects() -> None:
    with refused("insufficient_scope"):
        mtls_authenticate_subject(trusted_proxies=None, allowed_subjects=frozenset({"bob"}))(request(header(ALICE)))
    assert (
        mtls_authenticate_subject(trusted_proxies=None, allowed_subjects=frozenset({"alice"}))(
            request(header(ALICE))
        ).principal
        == "alice"
    )


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "sha512"])
def test_fingerprints(algorithm: str) -> None:
    digest = ALICE.fingerprint(getattr(hashes, algorithm.upper())())
    known = {digest.hex(":").upper(): core.AuthContext(None, True, "alice")}
    accept = mtls_authenticate_fingerprint(trusted_proxies=None, fingerprints=known, algorithm=algorithm)
    auth = accept(request(header(ALICE)))
    assert (auth.domain, auth.principal) == ("mtls", "alice")
    with refused("invalid_credential"):
        accept(request(header(CA.certificate)))


def test_bad_fingerprint_settings() -> None:
    for algorithm in ("sha1", "md5", "SHA256"):
        with pytest.raises(ValueError, match="algorithm"):
            mtls_authenticate_fingerprint(trusted_proxies=None, fingerprints={}, algorithm=algorithm)
    for text in ("", "zz", "ab" * 20):
        with pytest.raises(ValueError, match="fingerprint"):
            mtls_authenticate_fingerprint(trusted_proxies=None, fingerprints={text: core.AuthContext(None, True, "x")})


def test_own_validation_and_header() -> None:
    def validate(certificate: x509.Certificate) -> Any:
        assert certificate == ALICE
        return core.AuthContext("own", True, "me")

    accept = mtls_authenticate(trusted_proxies=None, validate=validate, header="X-Cert")
    assert accept(request({"X-Cert": header(ALICE)[HEADER]})).principal == "me"
    assert proxy_headers_of(accept) == ("X-Cert",)


# Who may set the header


def test_only_trusted_peers_are_believed() -> None:
    accept = mtls_authenticate_subject(trusted_proxies=["10.0.0.0/24", "::1"])
    for peer in ("10.0.0.9", "::ffff:10.0.0.9", "::1"):
        assert accept(request(header(ALICE), peer=peer)).principal == "alice"
    for peer in ("10.0.1.9", "127.0.0.1", "", "localhost", "::ffff:10.0.1.9", "not an address"):
        with refused("proxy_required"):
            accept(request({**header(ALICE), "X-Forwarded-For": "10.0.0.9", "Forwarded": "for=10.0.0.9"}, peer=peer))


def test_who_is_trusted_has_to_be_said() -> None:
    makers: tuple[Any, ...] = (mtls_authenticate_subject, mtls_authenticate_xfcc, mtls_authenticate)
    for make in makers:
        with pytest.raises(TypeError, match="trusted_proxies"):
            make()


def test_bad_trusted_proxies() -> None:
    for bad in ([], ["10.0.0.0/99"], ["proxy.example"], "10.0.0.1", ["10.0.0.1/8"]):
        with pytest.raises(ValueError):
            mtls_authenticate_subject(trusted_proxies=bad)


# Envoy's header

xfcc: Any = mtls_authenticate_xfcc(trusted_proxies=None)


def envoy(value: str) -> dict[str, str]:
    return {"x-forwarded-client-cert": value}


def test_xfcc_grammar() -> None:
    value = (
        'By=spiffe%3A//a/b;Hash=468ed;Subject="CN=alice,O=\\"Quoted; Inc\\"";URI=spiffe://x/y%20z;'
        "DNS=a.example;dns=b.example;Chain=ignored;flag , ,Hash=2"
    )
    first, second = parse_xfcc(value)
    assert (first.by, first.hash, first.uri) == ("spiffe://a/b", "468ed", "spiffe://x/y z")
    assert first.subject == 'CN=alice,O="Quoted; Inc"' and first.dns == ("a.example", "b.example")
    assert (second.hash, second.subject) == ("2", None)
    (quoted,) = parse_xfcc('Cert="-----BEGIN%20C%2B%2C-----"; Hash = x ')
    assert (quoted.cert, quoted.hash) == ("-----BEGIN C+,-----", "x")


@pytest.mark.parametrize(
    "value",
    [
        "Hash=1;Hash=2",
        "Hash=1;hash=2",
        'Subject="CN=a";Subject="CN=b"',
        'Subject="unterminated,Hash=9',
        'Subject="CN=a"x;Hash=9',
        'Subject="CN=a""CN=b"',
        'Subject=x"CN=a"',
        '"CN=a"',
        'Subject="CN=a\\',
        "",
        ",;,",
        "flag",
        "URI=%ff",
        ",".join(["Hash=1"] * 65),
        'Subject="CN=\\\\41dmin"',
    ],
    ids=range(15),
)
def test_xfcc_that_is_refused(value: str) -> None:
    with refused("invalid_credential"):
        parse_xfcc(value)


@pytest.mark.parametrize(
    ("name", "principal"),
    [
        ("CN=a\\,b,O=c", "a,b"),
        ("CN=a+OU=b,O=c", "a"),
        ("O=c,OU=x\\,CN\\=root,CN=bob", "bob"),
        ("2.5.4.3=carol", "carol"),
        ("cn = dave , O=x", "dave"),
        ("CN=\\c3\\a9va", "\u00e9va"),
        ("emailAddress=x@example.com,CN=eve", "eve"),
        ("CN=a\\ ,O=x", "a "),
    ],
)
def test_common_name_of_a_subject(name: str, principal: str) -> None:
    assert xfcc(request(envoy(f'Hash=1;Subject="{name}"'))).principal == principal


@pytest.mark.parametrize(
    "name",
    [
        "O=x,CN=first,CN=second",
        "CN=first+CN=second",
        "/C=US/CN=legacy",
        "O=x",
        "CN=",
        "CN= ",
        "CN=#0c0161",
        "CN=a,",
        "CN=a,,O=x",
        "CN=a;CN=b",
        "CN=\\ff",
        "CN=a\\z",
        "CN",
        "CN=\\ ",
        "",
    ],
)
def test_subjects_without_one_common_name(name: str) -> None:
    with refused("invalid_credential"):
        xfcc(request(envoy(f'Hash=1;Subject="{name}"')))


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=4)


@given(st.lists(NAMES, max_size=3))
def test_names_agree_with_cryptography(values: list[str]) -> None:
    expected = "".join(values) or "x"
    assume(" " not in values)  # cryptography escapes a lone space twice until version 47
    attributes = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, value, _validate=False) for value in values]
    attributes.append(x509.NameAttribute(NameOID.COMMON_NAME, expected, _validate=False))
    text = x509.Name(attributes).rfc4514_string()
    if expected.strip():
        assert _common_name(text) == expected
    else:
        with refused("invalid_credential"):
            _common_name(text)


@given(st.text(st.sampled_from('CN=ab,;+"\\ O#%4'), max_size=40))
def test_any_envoy_header_parses_or_is_refused(value: str) -> None:
    with contextlib.suppress(AuthFailure):
        assert xfcc(request(envoy(value))).principal.strip()


def test_several_elements_need_trusted_proxies() -> None:
    value = 'Subject="CN=forged",Subject="CN=real"'
    with refused("invalid_credential"):
        xfcc(request(envoy(value)))
    trusted: dict[str, Any] = {"trusted_proxies": ["10.0.0.0/8"]}
    assert mtls_authenticate_xfcc(select_element="last", **trusted)(request(envoy(value))).principal == "real"
    assert mtls_authenticate_xfcc(select_element="first", **trusted)(request(envoy(value))).principal == "forged"
    with pytest.raises(AuthFailure, match="select_element"):
        mtls_authenticate_xfcc(**trusted)(request(envoy(value)))
    with refused("proxy_required"):
        mtls_authenticate_xfcc(**trusted)(request(envoy(value), peer="192.0.2.1"))
    with pytest.raises(ValueError):
        mtls_authenticate_xfcc(**ALL, select_element="middle")  # type: ignore[arg-type]


def test_xfcc_context() -> None:
    auth = xfcc(request(envoy('Hash=1;Subject="CN=alice";URI=spiffe://x;DNS=a;DNS=b')))
    assert (auth.domain, auth.principal) == ("mtls", "alice")
    assert auth.claims == {"hash": "1", "subject": "CN=alice", "uri": "spiffe://x", "dns": ["a", "b"]}
    own = mtls_authenticate_xfcc(
        trusted_proxies=None, validate=lambda element: core.AuthContext("s", True, element.uri)
    )
    assert own(request(envoy("URI=spiffe://x"))).principal == "spiffe://x"


# A real nginx


CONFIGURATION = """
daemon off; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 32; }}
http {{
  access_log off;
  client_body_temp_path {dir}/t1; proxy_temp_path {dir}/t2; fastcgi_temp_path {dir}/t3;
  uwsgi_temp_path {dir}/t4; scgi_temp_path {dir}/t5;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {dir}/server.pem; ssl_certificate_key {dir}/server.key;
    ssl_client_certificate {dir}/ca.pem; ssl_verify_client optional;
    location / {{
      proxy_pass {backend};
      proxy_set_header X-SSL-Client-Cert $ssl_client_escaped_cert;
    }}
  }}
}}
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """nginx with TLS client authentication in front of an app; yields both URLs and the directory of the keys."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    served = pytest.importorskip("tests.extras.auth_provider").served
    place = tmp_path_factory.mktemp("nginx")
    server, server_key = CA.issue((NameOID.COMMON_NAME, "localhost"))
    stranger, stranger_key = Authority("Evil CA").issue((NameOID.COMMON_NAME, "alice"))
    files = {
        "ca.pem": pem(CA.certificate),
        "server.pem": pem(server),
        "alice.pem": pem(ALICE),
        "evil.pem": pem(stranger),
    }
    keys = {"server.key": server_key, "alice.key": ALICE_KEY, "evil.key": stranger_key}
    for name, text in files.items():
        (place / name).write_text(text)
    for name, key in keys.items():
        (place / name).write_bytes(key_pem(key))
    # nginx is the only peer of 127.0.0.0/8 here; the direct connection comes from ::1 or is refused by its header.
    with served(make_app(mtls_authenticate_subject(trusted_proxies=["127.0.0.1"]))) as backend:
        port = free_port()
        (place / "nginx.conf").write_text(CONFIGURATION.format(dir=place, port=port, backend=backend))
        process = subprocess.Popen(
            [NGINX, "-e", str(place / "error.log"), "-p", str(place), "-c", str(place / "nginx.conf")]
        )
        try:
            _await_port(port, process)
            yield f"https://localhost:{port}", backend, place
        finally:
            process.terminate()
            process.wait(10)


def _await_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None, "nginx ended"
        time.sleep(0.02)
    raise AssertionError("nginx does not listen")


def fetch(url: str, place: Path, who: str | None, headers: dict[str, str] | None = None) -> Any:
    httpx = pytest.importorskip("httpx")
    context = ssl.create_default_context(cafile=str(place / "ca.pem"))
    if who is not None:
        context.load_cert_chain(place / f"{who}.pem", place / f"{who}.key")
    with httpx.Client(verify=context) as http:
        return http.get(f"{url}/x", headers=headers)


def test_nginx_passes_the_verified_certificate(nginx: tuple[str, str, Path]) -> None:
    url, _, place = nginx
    answer = fetch(url, place, "alice")
    assert (answer.status_code, answer.json()["principal"]) == (200, "alice")


def test_calls_through_nginx(nginx: tuple[str, str, Path]) -> None:
    httpx = pytest.importorskip("httpx")
    url, backend, place = nginx
    context = ssl.create_default_context(cafile=str(place / "ca.pem"))
    context.load_cert_chain(place / "alice.pem", place / "alice.key")
    connect: Any = getattr(core, "http_connect")  # noqa: B009 (a lazy name)
    with httpx.Client(verify=context) as http, connect(Calc, url, client=http, timeout=60) as calc:
        assert (calc.who(), calc.add(1.0, 2.0)) == ("alice", 3.0)
    with connect(Calc, backend) as calc, pytest.raises(getattr(core, "AuthenticationError")) as caught:  # noqa: B009
        calc.who()
    assert caught.value.reason == "proxy_required" and HEADER in caught.value.proxy_hint


def test_nginx_replaces_spoofed_headers(nginx: tuple[str, str, Path]) -> None:
    url, _, place = nginx
    forged = header(CA.issue((NameOID.COMMON_NAME, "root"))[0])[HEADER]
    for name in (HEADER, HEADER.lower(), "X_SSL_Client_Cert", "X-SSL_Client-Cert"):
        spoofed = {name: forged}
        assert fetch(url, place, "alice", spoofed).json()["principal"] == "alice"
        answer = fetch(url, place, None, spoofed)
        assert (answer.status_code, answer.headers["VGI-Auth-Reason"]) == (401, "proxy_required")
        assert answer.headers["VGI-Auth-Proxy-Required"] == "true"
        assert HEADER in answer.json()["proxy_hint"]


def test_nginx_refuses_a_foreign_authority(nginx: tuple[str, str, Path]) -> None:
    url, _, place = nginx
    answer = fetch(url, place, "evil")
    assert answer.status_code == 400 and "alice" not in answer.text


def test_around_the_proxy() -> None:
    """The same app, reached by a peer that is not the proxy."""
    http = client(mtls_authenticate_subject(trusted_proxies=["192.0.2.1"]))
    answer = http.simulate_get("/x", headers=header(ALICE))
    assert (answer.status_code, answer.headers["VGI-Auth-Reason"]) == (401, "proxy_required")


def test_no_certificate_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    value = header(ALICE)[HEADER]
    answer = client(mtls_authenticate_subject(trusted_proxies=None, allowed_subjects=frozenset())).simulate_get(
        "/x", headers={HEADER: value}
    )
    assert answer.status_code == 401
    for part in (value, "alice", value[100:140]):
        assert part not in caplog.text and part not in answer.text
