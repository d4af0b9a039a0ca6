# Needs: httpx (client side). Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: routes and 401s of the HTTP server.
"""OAuth protected-resource metadata (RFC 9728): served, announced in a 401, and read by clients (auth.md 6 and 7)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .. import core as _bound_core
from ..common.urls import check_url, origin_of
from .provider import FetchError, bounded_client, get, read_provider

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = [
    "MetadataResource",
    "OAuthResourceMetadata",
    "OAuthResourceMetadataResponse",
    "OAuthServerMetadata",
    "build_www_authenticate",
    "fetch_auth_server_metadata",
    "fetch_oauth_metadata",
    "http_oauth_metadata",
    "parse_client_id",
    "parse_client_secret",
    "parse_device_code_client_id",
    "parse_device_code_client_secret",
    "parse_resource_metadata_url",
    "parse_use_id_token_as_bearer",
    "parse_www_authenticate_params",
    "well_known_paths",
]

_WELL_KNOWN = "/.well-known/oauth-protected-resource"
_OPAQUE = re.compile(r"[A-Za-z0-9\-._~]+")
_SECRETS = frozenset({"client_secret", "device_code_client_secret"})
_CHALLENGE = ("client_id", "client_secret", "use_id_token_as_bearer", "device_code_client_id")


@dataclass(frozen=True)
class _Fields:
    """The fields that a server configures and a client reads."""

    resource: str
    authorization_servers: tuple[str, ...]
    scopes_supported: tuple[str, ...] = ()
    bearer_methods_supported: tuple[str, ...] = ("header",)
    resource_signing_alg_values_supported: tuple[str, ...] = ()
    resource_name: str | None = None
    resource_documentation: str | None = None
    resource_policy_uri: str | None = None
    resource_tos_uri: str | None = None
    client_id: str | None = None
    client_secret: str | None = field(default=None, repr=False)
    use_id_token_as_bearer: bool = False
    device_code_client_id: str | None = None
    device_code_client_secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class OAuthResourceMetadata(_Fields):
    """What a service says about how to log in to it.

    Attributes:
        resource: the service's own URL; its origin is where browsers reach it.
        authorization_servers: issuers, the preferred one first.
        client_id: for the browser login, which needs it.
        client_secret, device_code_client_secret: stay on the server, for its own calls to the provider.
        use_id_token_as_bearer: the id token is the bearer, not the access token.
        public_secrets: which of the two secrets are handed to every client. Some providers give even installed
            programs a "secret", which is none; name no other here.

    Raises ValueError for an empty resource or server list and for ids that are not unreserved characters (RFC 3986).
    """

    public_secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.resource or not self.authorization_servers:
            raise ValueError("resource and authorization_servers must not be empty")
        if re.search(r'[\x00-\x20"\\\x7f-\U0010ffff]', self.resource) or "://" not in self.resource:
            raise ValueError("resource is not a URL")
        for name in ("client_id", "client_secret", "device_code_client_id", "device_code_client_secret"):
            value = getattr(self, name)
            if value is not None and not _OPAQUE.fullmatch(value):
                raise ValueError(f"{name} may hold only letters, digits and - . _ ~")
        if not _SECRETS.issuperset(self.public_secrets):
            raise ValueError(f"public_secrets may name only {' and '.join(sorted(_SECRETS))}")

    def to_json_dict(self) -> dict[str, Any]:
        """Return the public document: what differs from the defaults, never a secret that is not declared public."""
        found: dict[str, Any] = {}
        for one in fields(_Fields):
            value = getattr(self, one.name)
            if one.name in _SECRETS and one.name not in self.public_secrets:
                continue
            if value != one.default:
                found[one.name] = list(value) if isinstance(value, tuple) else value
        return found


@dataclass(frozen=True)
class OAuthResourceMetadataResponse(_Fields):
    """What a client read from a service; `token_endpoint` is the service's own, when it has one."""

    token_endpoint: str | None = None


@dataclass(frozen=True)
class OAuthServerMetadata:
    """Where an authorization server does what."""

    authorization_endpoint: str = ""
    token_endpoint: str = ""
    device_authorization_endpoint: str = ""
    grant_types_supported: tuple[str, ...] = ()

    def supports_grant_type(self, grant_type: str) -> bool:
        """Whether the server has that grant type; one that lists none is taken to have all."""
        return not self.grant_types_supported or grant_type in self.grant_types_supported


def well_known_paths(prefix: str = "") -> list[str]:
    """Return the paths of the document: at the root, and below it for a service with a prefix."""
    return [_WELL_KNOWN] + ([_WELL_KNOWN + prefix] if prefix else [])


class MetadataResource:
    """Falcon resource that serves the document; `browser_login` adds the service's own token endpoint."""

    def __init__(self, metadata: OAuthResourceMetadata, *, prefix: str = "", browser_login: bool = False) -> None:
        document = metadata.to_json_dict()
        if browser_login and metadata.client_secret is not None:
            document["token_endpoint"] = f"{origin_of(metadata.resource)}{prefix}/_oauth/token"
        self._body = json.dumps(document, separators=(",", ":")).encode()

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer GET."""
        resp.content_type = "application/json"
        resp.set_header("Cache-Control", "public, max-age=60")
        resp.data = self._body


def build_www_authenticate(metadata: OAuthResourceMetadata, *, prefix: str = "") -> str:
    """Return the challenge of every 401 (auth.md section 6); secrets only as far as declared public."""
    document = metadata.to_json_dict()
    params = [("resource_metadata", f"{origin_of(metadata.resource)}{_WELL_KNOWN}{prefix}")]
    for name in (*_CHALLENGE, "device_code_client_secret"):
        if name in document:
            params.append((name, "true" if document[name] is True else document[name]))
    return "Bearer " + ", ".join(f'{name}="{value}"' for name, value in params)


# One parameter: a name, and a token or a quoted string (RFC 9110 section 11.2). The possessive tail keeps the search
# linear in what a hostile server sends.
_PARAM = re.compile(r'([A-Za-z0-9!#$%&\'*+.^_`|~-]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s",]+))', re.DOTALL)
_SKIP = re.compile(r'"(?:[^"\\]|\\.)*"?|[A-Za-z0-9!#$%&\'*+.^_`|~-]+|.', re.DOTALL)
_MAX_CHALLENGE = 16384


def parse_www_authenticate_params(www_authenticate: str) -> dict[str, str]:
    """Return the parameters of a WWW-Authenticate value, names in lower case; of duplicates the later wins.

    The text is read token by token: what looks like a parameter inside a quoted value is none.
    """
    text = www_authenticate[:_MAX_CHALLENGE]
    found: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _PARAM.match(text, position)
        if match is not None:
            quoted = match[2]
            found[match[1].lower()] = match[3] if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
        else:
            match = _SKIP.match(text, position)
            assert match is not None
        position = match.end()
    return found


def parse_resource_metadata_url(www_authenticate: str) -> str | None:
    """Return where a challenge says the metadata document is."""
    return parse_www_authenticate_params(www_authenticate).get("resource_metadata")


def parse_client_id(www_authenticate: str) -> str | None:
    """Return a challenge's client_id."""
    return parse_www_authenticate_params(www_authenticate).get("client_id")


def parse_client_secret(www_authenticate: str) -> str | None:
    """Return a challenge's client_secret."""
    return parse_www_authenticate_params(www_authenticate).get("client_secret")


def parse_use_id_token_as_bearer(www_authenticate: str) -> bool:
    """Return whether a challenge asks for the id token."""
    return parse_www_authenticate_params(www_authenticate).get("use_id_token_as_bearer") == "true"


def parse_device_code_client_id(www_authenticate: str) -> str | None:
    """Return a challenge's device_code_client_id."""
    return parse_www_authenticate_params(www_authenticate).get("device_code_client_id")


def parse_device_code_client_secret(www_authenticate: str) -> str | None:
    """Return a challenge's device_code_client_secret."""
    return parse_www_authenticate_params(www_authenticate).get("device_code_client_secret")


def http_oauth_metadata(
    base_url: str | None = None, *, prefix: str | None = None, client: Any = None
) -> OAuthResourceMetadataResponse | None:
    """Return what a service says about logging in; None when it says nothing (404).

    Args:
        base_url: of the service; may be left out with a client that has one.
        prefix: of its routes; None takes that of a test client.
        client: an httpx.Client or the HTTP test client, left open.

    Raises ValueError without base_url and client and for a document that is none, ConnectionLostError when the service
    cannot be reached.
    """
    if base_url is None and client is None:
        raise ValueError("give base_url or client")
    prefix = getattr(client, "prefix", "") if prefix is None else prefix
    return _fetch_resource(f"{(base_url or '').rstrip('/')}{_WELL_KNOWN}{prefix}", client, missing_ok=True)


def fetch_oauth_metadata(metadata_url: str, *, client: Any = None) -> OAuthResourceMetadataResponse:
    """Return the document at a URL, as a 401 names it. Raises as `http_oauth_metadata`, and ValueError for 404."""
    found = _fetch_resource(metadata_url, client, missing_ok=False)
    assert found is not None
    return found


def _fetch_resource(url: str, client: Any, *, missing_ok: bool) -> OAuthResourceMetadataResponse | None:
    status, found = _get(client, url)
    if status == 404 and missing_ok:
        return None
    if status != 200:
        raise ValueError(f"no OAuth metadata: {_place(url)} answered {status}")
    return _read_resource(found, url)


def _get(client: Any, url: str) -> tuple[int, Mapping[str, Any]]:
    try:
        if client is not None:
            return get(client, url)
        with bounded_client() as own:
            return get(own, check_url(url))
    except FetchError as exc:
        raise _unusable(exc) from None


def _unusable(exc: FetchError) -> Exception:
    unreached = "could not be reached" in str(exc)
    return (core.ConnectionLostError if unreached else ValueError)(f"OAuth metadata: {exc}")


def _place(url: str) -> str:
    return url.partition("?")[0]


def _read_resource(found: Mapping[str, Any], url: str) -> OAuthResourceMetadataResponse:
    values: dict[str, Any] = {}
    for one in fields(OAuthResourceMetadataResponse):
        value = found.get(one.name)
        if value is None:
            continue
        if "tuple" in str(one.type):
            values[one.name] = _texts(value, one.name, url)
        elif isinstance(value, bool if one.type == "bool" else str):
            values[one.name] = value
        else:
            raise ValueError(f"OAuth metadata at {_place(url)}: {one.name} has a wrong type")
    if not values.get("resource") or not values.get("authorization_servers"):
        raise ValueError(f"OAuth metadata at {_place(url)} lacks resource or authorization_servers")
    return OAuthResourceMetadataResponse(**values)


def _texts(value: object, name: str, url: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"OAuth metadata at {_place(url)}: {name} is not a list of strings")
    return tuple(value)


def fetch_auth_server_metadata(issuer_url: str, *, client: Any = None) -> OAuthServerMetadata:
    """Return the endpoints of an OpenID provider. ValueError for a document that lacks them or is another issuer's."""
    place = _place(issuer_url)
    try:
        if client is not None:
            found = read_provider(client, issuer_url, "token_endpoint")
        else:
            with bounded_client() as own:
                found = read_provider(own, check_url(issuer_url), "token_endpoint")
    except FetchError as exc:
        raise _unusable(exc) from None
    names = ("authorization_endpoint", "token_endpoint", "device_authorization_endpoint")
    ends = {name: str(found[name]) for name in names if found.get(name)}
    if len(ends) < 2:
        raise ValueError(f"{place} has neither an authorization_endpoint nor a device_authorization_endpoint")
    return OAuthServerMetadata(
        **ends, grant_types_supported=_texts(found.get("grant_types_supported", []), "grant_types_supported", place)
    )
