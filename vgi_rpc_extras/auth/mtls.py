# Needs: cryptography. Install: pip install 'vgi-rpc-onefile[mtls]'. Seam: `authenticate=` of the HTTP server.
"""Client certificates that a TLS-terminating proxy passes on in a header (auth.md section 4).

    authenticate = mtls_authenticate_subject(trusted_proxies=["10.0.0.0/24"], allowed_subjects=frozenset({"batch"}))

The proxy verifies the chain; nothing here does. Whoever can reach the worker around the proxy can write the header:
give `trusted_proxies`, let the worker listen where only the proxy connects, and have the proxy always set the header
(nginx: `proxy_set_header X-SSL-Client-Cert $ssl_client_escaped_cert;`), which replaces what a caller sent.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import NameOID

from .. import core as _bound_core
from .bearer import Authenticate
from .proxies import ProxyHeader, TrustedProxies
from .unauthorized import AuthFailure, AuthReason, declare_proxy_headers

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["mtls_authenticate", "mtls_authenticate_fingerprint", "mtls_authenticate_subject"]

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*")
# SHA-1 is left out: certificates that share one can be made.
_HASHES: Mapping[str, Callable[[], hashes.HashAlgorithm]] = {
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}


def mtls_authenticate(
    *,
    validate: Callable[[x509.Certificate], core.AuthContext],
    header: str = "X-SSL-Client-Cert",
    check_expiry: bool = True,
    trusted_proxies: TrustedProxies,
) -> Authenticate:
    """Return an authenticator that gives the caller's certificate to `validate`.

    Args:
        validate: returns the context, or raises ValueError or PermissionError.
        header: holds the PEM, percent-encoded or with its line ends replaced by blanks; of a bundle the first counts.
        check_expiry: refuse a certificate outside its validity.
        trusted_proxies: addresses and networks of the proxy; requests of other peers are refused. None, which has to
            be written down, believes everybody who can reach the service.

    Raises ValueError for an empty or ill-formed list of proxies.
    """
    source = ProxyHeader(header, trusted_proxies)

    def authenticate(req: falcon.Request) -> core.AuthContext:
        certificate = _parse(source.read(req))
        if check_expiry:
            _check_dates(certificate)
        return validate(certificate)

    return declare_proxy_headers(authenticate, header)


def _parse(value: str) -> x509.Certificate:
    try:
        text = unquote(value, errors="strict")  # "+" stays: it is a letter of base64 here, not a blank
    except UnicodeDecodeError:
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the header is not percent-encoded PEM") from None
    first, position = None, 0
    while position < len(text):
        match = _PEM.match(text, position)
        if match is None:  # a comma, say: two headers that the WSGI server joined
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the header is not a list of PEM certificates")
        first, position = first or match, match.end()
    if first is None:
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the header holds no certificate")
    try:
        return x509.load_der_x509_certificate(base64.b64decode("".join(first[1].split()), validate=True))
    except (ValueError, binascii.Error, x509.InvalidVersion):
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the certificate cannot be parsed") from None


def _check_dates(certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise AuthFailure(AuthReason.EXPIRED_CREDENTIAL, "the certificate is not valid now")


def mtls_authenticate_fingerprint(
    *,
    fingerprints: Mapping[str, core.AuthContext],
    header: str = "X-SSL-Client-Cert",
    algorithm: str = "sha256",
    domain: str = "mtls",
    check_expiry: bool = True,
    trusted_proxies: TrustedProxies,
) -> Authenticate:
    """Return an authenticator for known certificates.

    Args:
        fingerprints: hex over the DER, in any case, with or without colons, to the caller's context.
        algorithm: sha256, sha384 or sha512.
        domain: for contexts that have none.

    Further arguments as for `mtls_authenticate`. Raises ValueError for another algorithm or an ill-formed fingerprint.
    """
    if algorithm not in _HASHES:
        raise ValueError(f"algorithm must be one of {', '.join(_HASHES)}, got {algorithm!r}")
    size = _HASHES[algorithm]().digest_size
    known = {_fingerprint(text, size): _in_domain(auth, domain) for text, auth in fingerprints.items()}

    def validate(certificate: x509.Certificate) -> core.AuthContext:
        # A plain lookup: whoever holds the certificate knows its fingerprint, it is no secret.
        auth = known.get(certificate.fingerprint(_HASHES[algorithm]()))
        if auth is None:
            raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "an unknown certificate")
        return auth

    return mtls_authenticate(
        validate=validate, header=header, check_expiry=check_expiry, trusted_proxies=trusted_proxies
    )


def _fingerprint(text: str, size: int) -> bytes:
    try:
        digest = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        digest = b""
    if len(digest) != size:
        raise ValueError(f"fingerprint {text!r} is not {size} bytes of hexadecimal digits")
    return digest


def _in_domain(auth: core.AuthContext, domain: str) -> core.AuthContext:
    return core.AuthContext(auth.domain or domain, auth.authenticated, auth.principal, auth.claims)


def mtls_authenticate_subject(
    *,
    header: str = "X-SSL-Client-Cert",
    domain: str = "mtls",
    allowed_subjects: frozenset[str] | None = None,
    check_expiry: bool = True,
    trusted_proxies: TrustedProxies,
) -> Authenticate:
    """Return an authenticator whose principal is the certificate's common name.

    A certificate without a common name, with an empty one or with several is refused. Claims: `subject_dn`
    (RFC 4514), `serial` (hex), `not_valid_after` (ISO 8601). `allowed_subjects` limits the names; None takes every
    certificate that the proxy lets through. Further arguments as for `mtls_authenticate`.
    """

    def validate(certificate: x509.Certificate) -> core.AuthContext:
        name = _common_name(certificate)
        if allowed_subjects is not None and name not in allowed_subjects:
            raise AuthFailure(AuthReason.INSUFFICIENT_SCOPE, "the common name is not on the list")
        return core.AuthContext(domain, True, name, _claims(certificate))

    return mtls_authenticate(
        validate=validate, header=header, check_expiry=check_expiry, trusted_proxies=trusted_proxies
    )


def _common_name(certificate: x509.Certificate) -> str:
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the subject cannot be parsed") from None
    value = names[0].value if len(names) == 1 else ""
    if not isinstance(value, str) or not value.strip():
        raise AuthFailure(AuthReason.INVALID_CREDENTIAL, "the certificate needs exactly one common name")
    return value


def _claims(certificate: x509.Certificate) -> dict[str, Any]:
    return {
        "subject_dn": certificate.subject.rfc4514_string(),
        "serial": format(certificate.serial_number, "x"),
        "not_valid_after": certificate.not_valid_after_utc.isoformat(),
    }
