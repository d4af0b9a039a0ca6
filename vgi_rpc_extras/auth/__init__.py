# Needs: joserfc, authlib, httpx (jwt, oauth, logins), cryptography (mtls); bearer, chains and proxy proof need nothing.
# Install: pip install 'vgi-rpc-onefile[oauth,mtls]'. Seam: `authenticate=` of the HTTP server.
# ruff: noqa: F403 (the star imports are for type checkers; every module has __all__)
"""Authentication for services over HTTP (auth.md): who is calling, and how a refusal looks.

Names are found at first use, so bearer tokens work where the packages for JWT and certificates are absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import load

if TYPE_CHECKING:
    from .bearer import *
    from .client_login import *
    from .device_login import *
    from .guard import *
    from .jwt import *
    from .login import *
    from .mtls import *
    from .oauth import *
    from .oauth_tokens import *
    from .pkce_login import *
    from .proxy_proof import *
    from .unauthorized import *
    from .xfcc import *

_EXTRA = {"mtls": "mtls"}  # the others need [oauth]
_NAMES = {
    "guard": "AuthGuard",
    "unauthorized": "AuthFailure AuthReason AuthenticationError"
    " build_proxy_hint classify_auth_failure declare_key_headers declare_proxy_headers key_headers_of"
    " merge_proxy_headers proxy_headers_of"
    " read_unauthorized",
    "bearer": "Authenticate PreconditionGate bearer_authenticate bearer_authenticate_static chain_authenticate"
    " make_cookie_authenticate require_all",
    "jwt": "DEFAULT_ALGORITHMS jwt_authenticate",
    "mtls": "mtls_authenticate mtls_authenticate_fingerprint mtls_authenticate_subject",
    "xfcc": "XfccElement mtls_authenticate_xfcc parse_xfcc",
    "oauth": "OAuthResourceMetadata OAuthResourceMetadataResponse OAuthServerMetadata build_www_authenticate"
    " fetch_auth_server_metadata fetch_oauth_metadata http_oauth_metadata parse_client_id parse_client_secret"
    " parse_device_code_client_id parse_device_code_client_secret parse_resource_metadata_url"
    " parse_use_id_token_as_bearer parse_www_authenticate_params well_known_paths MetadataResource",
    "login": "BrowserLogin",
    "oauth_tokens": "OAuthChallenge OAuthIdentity OAuthRefreshContext OAuthTokenError OAuthTokenSet"
    " attempt_token_refresh parse_oauth_challenge",
    "device_login": "perform_device_code_flow select_device_code_client",
    "pkce_login": "OAuthPrompt is_colab_environment is_headless_environment perform_pkce_flow",
    "client_login": "OAuthFlow VgiOAuthAuth",
    "proxy_proof": "NonceCache ProofError ProxyProofConfig canonical_string"
    " derive_secret mint_proof parse_secrets proxy_proof_gate verify_proof",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a checker would take any name for existing

    def __getattr__(name: str) -> Any:
        module = _WHERE.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = load(__name__, module, name, _EXTRA.get(module, "oauth"))
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
