# Needs: authlib, joserfc, httpx. Install: pip install 'vgi-rpc-onefile[oauth]'. Seam: routes and AuthGuard of the HTTP
# server.
"""Login of people with a browser: authorization code with PKCE (auth.md section 8, RFC 7636, OpenID Connect Core).

    login = BrowserLogin(metadata, prefix="/vgi", token_key=key)
    app = make_wsgi_app(server, authenticate=authenticate, prefix="/vgi", token_key=key,
                        oauth_resource_metadata=metadata, browser_login=login)

Without `browser_login`, make_wsgi_app makes one with the defaults, for metadata that have a client_id.

    GET page, 401  ->  302 to the provider, cookie _vgi_oauth_session (verifier, state, nonce, where to return)
    GET callback   ->  code for tokens; cookie _vgi_auth, 302 to the page
    POST token     ->  the provider's token endpoint for public clients; the secret is added here

The bearer cookie is HttpOnly and SameSite=Lax. What comes back from the provider is shown nowhere.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import struct
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import httpx
from authlib.common.errors import AuthlibBaseError
from authlib.oauth2.client import OAuth2Client

from .. import core as _bound_core
from ..common import html
from ..common.texts import base64url, escaped, from_base64url, printable
from ..common.urls import is_loopback_url, origin_of
from .bearer import Authenticate, make_cookie_authenticate
from .jwt import JwtVerifier
from .oauth import OAuthResourceMetadata
from .provider import FetchError, bounded_client, json_object, read_provider
from .proxy_proof import NonceCache
from .unauthorized import declare_proxy_headers, merge_proxy_headers

if TYPE_CHECKING:
    import falcon

    import vgi_rpc as core
else:
    core = _bound_core()

__all__ = ["BrowserLogin"]

_LOG = logging.getLogger("vgi_rpc.http.auth")
_SESSION_COOKIE = "_vgi_oauth_session"
_AUTH_COOKIE = "_vgi_auth"
_IDENTITY_COOKIE = "_vgi_identity"
_SESSION_SECONDS = 600
_SESSION_VERSION = 5  # that of auth.md section 8 is 4, and has no nonce
_DISCOVERY_PAUSE = 30.0
_MAX_URL = 2048
_MAX_FORM = 16384
_MAX_SESSION = 12_000  # characters of the session cookie that are looked at
_MAX_COOKIE = 3800  # browsers drop cookies above 4096 bytes, name and attributes included
_IDENTITY = ("sub", "email", "preferred_username", "name", "picture")
_FORWARDED = frozenset({"code", "code_verifier", "redirect_uri", "refresh_token", "scope"})
_B64TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")  # RFC 6750 section 2.1


@dataclass(frozen=True, repr=False)
class _Session:
    """What the browser keeps during a login, signed; `original` and `return_to` are checked again when used."""

    verifier: str
    state: str
    original: str
    return_to: str
    nonce: str


class _Refused(Exception):
    """A page for the person: status and a text, which holds nothing from outside but what the provider says."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class BrowserLogin:
    """The login of one service.

    Args:
        metadata: must have client_id; its first authorization server is the provider.
        prefix: of the service's routes.
        token_key: the key of the service's tokens, shared by its processes; 16 bytes or more.
        return_origins: other sites to which a login may hand its token ("https://app.example.com"), compared exactly.
        allow_loopback_return: also to http://localhost and http://127.0.0.1, whatever listens there.
        javascript_cookie: let scripts of the service's pages read the bearer.
        transport: for calls to the provider, when they need a proxy or a private CA.

    A login works once: its state is remembered in this process until its cookie would be too old.

    Raises ValueError without a client_id, for a short key, and for return_origins that are no origins.
    """

    def __init__(
        self,
        metadata: OAuthResourceMetadata,
        *,
        prefix: str = "",
        token_key: bytes,
        return_origins: Collection[str] = (),
        allow_loopback_return: bool = False,
        javascript_cookie: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if metadata.client_id is None:
            raise ValueError("the browser login needs a client_id in its OAuthResourceMetadata")
        if len(token_key) < 16:
            raise ValueError("token_key must be at least 16 bytes")
        if isinstance(return_origins, str) or any(origin_of(one) != one for one in return_origins):
            raise ValueError("return_origins are scheme://host[:port], in lower case, without a path")
        self.prefix = prefix
        self.redirect_uri = f"{origin_of(metadata.resource)}{prefix}/_oauth/callback"
        self._metadata = metadata
        self._secure = metadata.resource.startswith("https:")
        if not self._secure and not is_loopback_url(metadata.resource):
            _LOG.warning("the browser login runs without https: its cookies can be read on the way")
        self._key = hmac.digest(token_key, b"vgi_rpc.oauth.session.v5", hashlib.sha256)
        self._return_origins = frozenset(return_origins)
        self._allow_loopback = allow_loopback_return
        self._javascript_cookie = javascript_cookie
        self._used = NonceCache(ttl_seconds=_SESSION_SECONDS + 1)
        self._provider = _Provider(metadata, self.redirect_uri, transport)

    def add_routes(self, app: Any) -> None:
        """Add callback, logout and (with a client secret) token to a Falcon app."""
        app.add_route(f"{self.prefix}/_oauth/callback", self, suffix="callback")
        app.add_route(f"{self.prefix}/_oauth/logout", self, suffix="logout")
        if self._metadata.client_secret is not None:
            app.add_route(f"{self.prefix}/_oauth/token", self, suffix="token")

    def authenticator(self, inner: Authenticate) -> Authenticate:
        """Return an authenticator that shows the login's cookie to `inner` when there is no Authorization header.

        `inner` runs once per request: a proof of the proxy inside it can be used only once.
        """
        by_cookie = make_cookie_authenticate(inner, _AUTH_COOKIE)

        def authenticate(req: falcon.Request) -> core.AuthContext:
            return by_cookie(req) if self._cookie_token(req) else inner(req)

        return declare_proxy_headers(authenticate, *merge_proxy_headers(inner))

    def _cookie_token(self, req: falcon.Request) -> str:
        if req.get_header("Authorization") is not None:
            return ""
        return (req.get_cookie_values(_AUTH_COOKIE) or [""])[0]

    # The start: a request that got no further.

    def redirect(self, req: falcon.Request, resp: falcon.Response) -> bool:
        """Send a browser to the provider; False, and nothing done, when the provider cannot be reached."""
        try:
            provider = self._provider.configuration()
        except FetchError as exc:
            _LOG.warning("browser login: %s", escaped(str(exc)))
            return False
        return_to = self._return_to(req)
        tokens = [secrets.token_urlsafe(32) for _ in range(3)]
        session = _Session(tokens[0], tokens[1], self._original(req), return_to, tokens[2])
        url = self._provider.authorization_url(provider, session)
        self._set_cookie(resp, _SESSION_COOKIE, self._seal(session), _SESSION_SECONDS, path=f"{self.prefix}/_oauth/")
        _redirect(resp, url)
        return True

    def hand_over(self, req: falcon.Request, resp: falcon.Response) -> bool:
        """Send an already logged-in browser back to the site that asked for its token; False when none did."""
        token = self._cookie_token(req)
        return_to = self._return_to(req) if token and req.method == "GET" else ""
        if not return_to:
            return False
        self._redirect_out(resp, return_to, token)
        return True

    def _return_to(self, req: falcon.Request) -> str:
        url = req.get_param("_vgi_return_to") or ""
        return url if self._may_return(url) else ""

    def _may_return(self, url: str) -> bool:
        if not url or len(url) > _MAX_URL or not re.fullmatch(r"[!-~]+", url) or "\\" in url or "#" in url:
            return False
        try:
            parts, origin = urlsplit(url), origin_of(url)
        except ValueError:
            return False
        if parts.username is not None or parts.scheme not in ("http", "https"):
            return False
        loopback = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1")
        return origin in self._return_origins or (self._allow_loopback and loopback)

    def _original(self, req: falcon.Request) -> str:
        query = [pair for pair in parse_qsl(req.query_string, True) if pair[0] != "_vgi_return_to"]
        path = quote(req.path, safe="/-._~!$&'()*+,;=:@")
        return self._local(path + (f"?{urlencode(query)}" if query else ""))

    def _local(self, url: str) -> str:
        """A URL of this service's own pages, else its first page: never another site (auth.md section 8, c)."""
        path = url.partition("?")[0]
        inside = path == self.prefix or path.startswith(f"{self.prefix}/")
        good = re.fullmatch(r"/(?![/\\])[!-~]*", url) and "\\" not in url and len(url) <= _MAX_URL
        return url if inside and good else self.prefix or "/"

    # The callback.

    def on_get_callback(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer the provider's redirect: 302 to the original page, or a page that says what failed (400, 502)."""
        resp.set_header("Referrer-Policy", "no-referrer")
        resp.set_header("Cache-Control", "no-store")
        try:
            self._callback(req, resp)
        except _Refused as exc:
            self._page(resp, exc.status, exc.text)
        except FetchError as exc:
            _LOG.warning("browser login: %s", escaped(str(exc)))
            self._page(resp, "502 Bad Gateway", "The login service could not complete the login. Try again.")

    def _callback(self, req: falcon.Request, resp: falcon.Response) -> None:
        error, code, state = req.get_param("error"), req.get_param("code"), req.get_param("state")
        if not state or not (code or error):
            raise _Refused("400 Bad Request", "The answer of the login service is incomplete.")
        session = self._open((req.get_cookie_values(_SESSION_COOKIE) or [""])[0])
        if session is None or not hmac.compare_digest(state.encode(), session.state.encode()):
            raise _Refused("400 Bad Request", "This login has expired or was started elsewhere. Start again.")
        if not self._used.check_and_add(session.state):
            raise _Refused("400 Bad Request", "This login was used already. Start again.")
        if error is not None or code is None:  # words of the provider now, not of whoever made up a link
            detail = printable(req.get_param("error_description") or error, 200)
            raise _Refused("400 Bad Request", f"The login service refused: {detail}")
        provider = self._provider.configuration()
        self._check_issuer(req.get_param("iss"), provider)
        token, claims = self._provider.exchange(provider, code, session)
        self._log_in(resp, session, token, claims)

    def _check_issuer(self, given: str | None, provider: Mapping[str, Any]) -> None:
        """RFC 9207: an answer of another provider than the one asked is refused."""
        required = provider.get("authorization_response_iss_parameter_supported") is True
        if given != provider["issuer"] and (given is not None or required):
            raise _Refused("400 Bad Request", "The answer came from another login service. Start again.")

    def _log_in(
        self, resp: falcon.Response, session: _Session, token: Mapping[str, Any], claims: Mapping[str, Any]
    ) -> None:
        bearer = token.get("id_token" if self._metadata.use_id_token_as_bearer else "access_token")
        if not isinstance(bearer, str) or not _B64TOKEN.fullmatch(bearer) or len(bearer) > _MAX_COOKIE:
            raise FetchError("the provider's token is missing, not a bearer token, or too long for a cookie")
        seconds = _lifetime(token.get("expires_in"), claims.get("exp"))
        page = self.prefix or "/"
        self._set_cookie(resp, _AUTH_COOKIE, bearer, seconds, path=page, readable=self._javascript_cookie)
        identity = {name: claims[name] for name in _IDENTITY if isinstance(claims.get(name), str)}
        shown = base64url(json.dumps(identity).encode())
        if identity and len(shown) <= _MAX_COOKIE:
            self._set_cookie(resp, _IDENTITY_COOKIE, shown, seconds, path=page, readable=True)
        self._clear(resp, _SESSION_COOKIE, f"{self.prefix}/_oauth/")
        if session.return_to and self._may_return(session.return_to):
            self._redirect_out(resp, session.return_to, bearer)
        else:
            _redirect(resp, self._local(session.original))

    def _redirect_out(self, resp: falcon.Response, url: str, bearer: str) -> None:
        """To an allowed site, with the bearer in the fragment; refresh token and client secret stay here."""
        fragment = {"token": bearer, "client_id": self._metadata.client_id or ""}
        if self._metadata.client_secret is not None:
            fragment["token_endpoint"] = f"{origin_of(self._metadata.resource)}{self.prefix}/_oauth/token"
        if self._metadata.use_id_token_as_bearer:
            fragment["use_id_token"] = "true"
        resp.set_header("Referrer-Policy", "no-referrer")
        _redirect(resp, f"{url}#{urlencode(fragment)}")

    def on_get_logout(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Forget the login on this browser; 302 to the first page."""
        page = self.prefix or "/"
        for name in (_AUTH_COOKIE, _IDENTITY_COOKIE):
            self._clear(resp, name, page)
        _redirect(resp, page)

    # The token endpoint for public clients.

    def on_options_token(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Answer a preflight."""
        self._cors(req, resp)
        resp.set_header("Access-Control-Allow-Methods", "POST")
        resp.set_header("Access-Control-Allow-Headers", "Content-Type")
        resp.status = "204 No Content"

    def on_post_token(self, req: falcon.Request, resp: falcon.Response) -> None:
        """Pass a token request on to the provider, with client id and secret added."""
        self._cors(req, resp)
        resp.set_header("Cache-Control", "no-store")
        resp.content_type = "application/json"
        try:
            resp.status, resp.data = self._proxy_token(req)
        except _Refused as exc:
            resp.status = exc.status
            resp.data = json.dumps({"error": exc.text}).encode()
        except FetchError as exc:
            _LOG.warning("token endpoint: %s", escaped(str(exc)))
            resp.status, resp.data = "502 Bad Gateway", b'{"error": "temporarily_unavailable"}'

    def _proxy_token(self, req: falcon.Request) -> tuple[str, bytes]:
        if (req.content_type or "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
            raise _Refused("415 Unsupported Media Type", "invalid_request")
        if (req.content_length or 0) > _MAX_FORM:
            raise _Refused("413 Content Too Large", "invalid_request")
        try:
            pairs = parse_qsl(req.bounded_stream.read(_MAX_FORM).decode(), strict_parsing=True, max_num_fields=20)
        except ValueError:
            raise _Refused("400 Bad Request", "invalid_request") from None
        form = dict(pairs)
        if len(form) != len(pairs):
            raise _Refused("400 Bad Request", "invalid_request")
        if form.get("grant_type") not in ("authorization_code", "refresh_token"):
            raise _Refused("400 Bad Request", "unsupported_grant_type")
        if form.get("client_id", self._metadata.client_id) != self._metadata.client_id:
            raise _Refused("400 Bad Request", "invalid_client")
        return self._provider.forward_token(form)

    def _cors(self, req: falcon.Request, resp: falcon.Response) -> None:
        origin = req.get_header("Origin") or ""
        resp.append_header("Vary", "Origin")
        loopback = self._allow_loopback and re.fullmatch(r"http://(localhost|127\.0\.0\.1)(:[0-9]{1,5})?", origin)
        if origin in self._return_origins or loopback:
            resp.set_header("Access-Control-Allow-Origin", origin)

    # Cookies and pages.

    def _set_cookie(
        self, resp: falcon.Response, name: str, value: str, seconds: int, *, path: str, readable: bool = False
    ) -> None:
        resp.set_cookie(
            name, value, max_age=seconds, path=path, secure=self._secure, http_only=not readable, same_site="Lax"
        )

    def _clear(self, resp: falcon.Response, name: str, path: str) -> None:
        self._set_cookie(resp, name, "", -1, path=path)  # Falcon leaves a Max-Age of 0 out

    def _page(self, resp: falcon.Response, status: str, text: str) -> None:
        self._clear(resp, _SESSION_COOKIE, f"{self.prefix}/_oauth/")
        resp.status = status
        html.send(resp, html.notice("Login failed", text, link=(self.prefix or "/", "Start again")))

    def _seal(self, session: _Session) -> str:
        raw = struct.pack("<BQ", _SESSION_VERSION, int(time.time()))
        for text in (session.verifier, session.state, session.original, session.return_to, session.nonce):
            raw += struct.pack("<H", len(text.encode())) + text.encode()
        return base64url(raw + hmac.digest(self._key, raw, hashlib.sha256))

    def _open(self, cookie: str) -> _Session | None:
        """The session of a cookie that this service made not too long ago; None for any other."""
        try:
            sealed = from_base64url(cookie[:_MAX_SESSION])
        except ValueError:
            return None
        raw, mac = sealed[:-32], sealed[-32:]
        if len(raw) < 9 or not hmac.compare_digest(mac, hmac.digest(self._key, raw, hashlib.sha256)):
            return None
        version, created = struct.unpack_from("<BQ", raw)
        if version != _SESSION_VERSION or not 0 <= time.time() - created <= _SESSION_SECONDS:
            return None
        texts, position = [], 9
        while position < len(raw):
            (size,) = struct.unpack_from("<H", raw, position)
            texts.append(raw[position + 2 : position + 2 + size].decode())
            position += 2 + size
        return _Session(*texts)


def _redirect(resp: falcon.Response, url: str) -> None:
    resp.status = "302 Found"
    resp.set_header("Location", url)
    resp.set_header("Cache-Control", "no-store, no-cache")
    resp.data = b""


def _lifetime(expires_in: object, exp: object) -> int:
    """How long the cookie lives: the token's seconds, else those of the id token, else an hour; at most 30 days."""
    if isinstance(expires_in, int) and not isinstance(expires_in, bool) and expires_in > 0:
        return min(expires_in, 2_592_000)
    if isinstance(exp, int | float):
        return int(min(max(exp - time.time(), 60), 2_592_000))
    return 3600


class _AuthlibSession:
    """What Authlib's client asks of an HTTP session, on an httpx client."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def post(self, url: str, *, data: Mapping[str, str], headers: Mapping[str, str], auth: Any) -> httpx.Response:
        url, prepared, body = auth.prepare("POST", url, dict(headers), urlencode(data))
        return self._client.post(url, content=body, headers=prepared)


class _Provider:
    """The OpenID provider: its configuration, kept for the life of the process, and the calls to it."""

    def __init__(
        self, metadata: OAuthResourceMetadata, redirect_uri: str, transport: httpx.BaseTransport | None
    ) -> None:
        self._metadata = metadata
        self._issuer = metadata.authorization_servers[0]
        self._redirect_uri = redirect_uri
        self._transport = transport
        self._lock = threading.Lock()
        self._found: Mapping[str, Any] | None = None
        self._verifier: JwtVerifier | None = None
        self._not_before = 0.0

    def configuration(self) -> Mapping[str, Any]:
        """The provider's document; FetchError, at once for a while after a failure."""
        with self._lock:
            if self._found is None:
                if time.monotonic() < self._not_before:
                    raise FetchError("the provider could not be reached a moment ago")
                self._not_before = time.monotonic() + _DISCOVERY_PAUSE
                with bounded_client(self._transport) as client:
                    self._found = read_provider(
                        client, self._issuer, "authorization_endpoint", "token_endpoint", "jwks_uri"
                    )
            return self._found

    def authorization_url(self, provider: Mapping[str, Any], session: _Session) -> str:
        """Where the browser logs in."""
        scope = " ".join(self._metadata.scopes_supported) or "openid email"
        extra = {"access_type": "offline", "prompt": "consent"} if session.return_to else {}
        client = OAuth2Client(
            None,
            client_id=self._metadata.client_id,
            redirect_uri=self._redirect_uri,
            scope=scope,
            code_challenge_method="S256",
        )
        url, _ = client.create_authorization_url(
            provider["authorization_endpoint"],
            state=session.state,
            code_verifier=session.verifier,
            nonce=session.nonce,
            **extra,
        )
        return str(url)

    def exchange(
        self, provider: Mapping[str, Any], code: str, session: _Session
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The token response for a code, and the verified claims of its id token ({} without one). FetchError."""
        token = self._fetch_token(provider, code, session)
        id_token = token.get("id_token")
        if id_token is None:
            return token, {}
        try:
            claims = self._id_token_verifier(provider).verify(str(id_token))
        except (ValueError, core.AuthUnavailableError):
            raise FetchError("the provider's id token does not verify") from None
        several = isinstance(claims.get("aud"), list) and len(claims["aud"]) > 1
        if claims.get("nonce") != session.nonce or (several and claims.get("azp") != self._metadata.client_id):
            raise FetchError("the provider's id token belongs to another login")
        return token, claims

    def _fetch_token(self, provider: Mapping[str, Any], code: str, session: _Session) -> Mapping[str, Any]:
        methods = provider.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        method = "client_secret_basic" if "client_secret_basic" in methods else "client_secret_post"
        try:
            with bounded_client(self._transport) as client:
                oauth = OAuth2Client(
                    _AuthlibSession(client),
                    client_id=self._metadata.client_id,
                    client_secret=self._metadata.client_secret,
                    token_endpoint_auth_method=method if self._metadata.client_secret else "none",
                    redirect_uri=self._redirect_uri,
                )
                found: Mapping[str, Any] = oauth.fetch_token(
                    provider["token_endpoint"],
                    grant_type="authorization_code",
                    code=code,
                    code_verifier=session.verifier,
                )
                return found
        except (AuthlibBaseError, httpx.HTTPError, ValueError, OSError) as exc:
            raise FetchError(f"{origin_of(self._issuer)} did not exchange the code: {type(exc).__name__}") from None

    def _id_token_verifier(self, provider: Mapping[str, Any]) -> JwtVerifier:
        with self._lock:
            if self._verifier is None:
                assert self._metadata.client_id is not None
                self._verifier = JwtVerifier(
                    issuer=self._issuer,
                    audience=self._metadata.client_id,
                    jwks_uri=provider["jwks_uri"],
                    transport=self._transport,
                )
            return self._verifier

    def forward_token(self, form: Mapping[str, str]) -> tuple[str, bytes]:
        """Status line and body of the provider's token endpoint for a client's form, with id and secret added."""
        endpoint = str(self.configuration()["token_endpoint"])
        kept = {name: value for name, value in form.items() if name in _FORWARDED}
        kept |= {"grant_type": form["grant_type"], "client_id": self._metadata.client_id or ""}
        kept["client_secret"] = self._metadata.client_secret or ""
        try:
            with bounded_client(self._transport) as client:
                response = client.post(endpoint, data=kept, headers={"Accept": "application/json"})
        except httpx.HTTPError as exc:
            raise FetchError(f"{origin_of(endpoint)} could not be reached: {type(exc).__name__}") from None
        if response.status_code >= 500 or 300 <= response.status_code < 400:
            raise FetchError(f"{origin_of(endpoint)} answered {response.status_code}")
        json_object(response.content, endpoint)
        return f"{response.status_code} {response.reason_phrase}".strip(), response.content
