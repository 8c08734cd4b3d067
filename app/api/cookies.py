"""The API key of somebody who signed in on the pages: a cookie, which a browser sends with every request by itself.

So a request that changes something, without an `Authorization` of its own, must come from our own pages. Browsers say
where a request comes from (Sec-Fetch-Site, or Origin where there is no TLS); other clients say nothing, and have no
cookie.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.types import Scope

from app.errors import Forbidden

# A browser takes the first name only over TLS, for this host alone and every path: no other host can set it.
ENCRYPTED_NAME, PLAIN_NAME = "__Host-graft-key", "graft-key"

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_OURS = frozenset({"same-origin", "none"})  # none: typed or reloaded by the person in front of it


def is_encrypted(scope: Scope, headers: Headers) -> bool:
    """Whether the browser speaks TLS, to us or to the proxy before us. Who lies about it spoils their own cookie."""
    return scope["scheme"] == "https" or headers.get("x-forwarded-proto", "").startswith("https")


def cookie_name(scope: Scope, headers: Headers) -> str:
    return ENCRYPTED_NAME if is_encrypted(scope, headers) else PLAIN_NAME


def authorization_of(scope: Scope, headers: Headers) -> str | None:
    """The Authorization header, or what the cookie stands for. Raises Forbidden for what other sites want changed."""
    own = headers.get("authorization")
    if own is not None:
        return own
    key = cookie_parser(headers.get("cookie", "")).get(cookie_name(scope, headers))
    if scope["method"] not in SAFE_METHODS:
        _check_is_from_our_pages(headers, has_cookie=key is not None)
    return f"Bearer {key}" if key else None


def _check_is_from_our_pages(headers: Headers, *, has_cookie: bool) -> None:
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        is_ours = site in _OURS
    elif origin is not None:
        is_ours = urlsplit(origin).netloc == headers.get("host")
    else:
        is_ours = not has_cookie
    if not is_ours:
        raise Forbidden(
            "This request comes from another site's page, which may not change anything here. Programs send "
            "`Authorization: Bearer ft_…`.",
            code="cross-site-request",
            title="Not from another site",
        )
