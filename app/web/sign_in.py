"""/sign-in: an API key becomes a cookie, so that a browser has it for the pages and for what they ask of the API."""

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from app import access
from app.api.cookies import authorization_of, cookie_name, is_encrypted
from app.api.middleware import services_of
from app.api.services import Services
from app.errors import GraftError, Unauthenticated
from app.web.site import HEADERS, page, read_form

# Read before anybody is known; room for a key and the longest address to go on to, all of it escaped.
MAX_FORM_BYTES = 32 * 1024

router = APIRouter(include_in_schema=False)


@router.get("/sign-in")
def sign_in_page(
    request: Request,
    next_page: Annotated[str, Query(alias="next", max_length=2000)] = "/",
) -> Response:
    services = services_of(request.scope)
    is_known = _is_known(services, request)
    with services.database.read() as session:
        needs_key = access.has_keys(session)
    return page(
        request, "sign_in.html", next_page=_ours(next_page), is_known=is_known, needs_key=needs_key, problem=None
    )


@router.post("/sign-in")
async def sign_in(request: Request) -> Response:
    authorization_of(request.scope, request.headers)  # refuses a form on another site's page
    fields = dict(await read_form(request, max_bytes=MAX_FORM_BYTES))
    key, next_page = fields.get("key", "").strip(), _ours(fields.get("next", "/"))
    services = services_of(request.scope)
    try:
        caller = await run_in_threadpool(_authenticate, services, f"Bearer {key}")
    except Unauthenticated as error:
        services.traffic.take_wrong_key(request.client.host if request.client else "")
        return page(
            request, "sign_in.html", status_code=401, next_page=next_page, is_known=False, needs_key=True, problem=error
        )
    response = RedirectResponse(next_page, status_code=303, headers=HEADERS)
    if caller.key_id is None:  # the server asks for none, and this may be anything
        return response
    response.set_cookie(
        cookie_name(request.scope, request.headers),
        key,
        httponly=True,
        samesite="strict",
        secure=is_encrypted(request.scope, request.headers),
        path="/",
    )
    return response


@router.post("/sign-in/end")
async def sign_out(request: Request) -> Response:
    authorization_of(request.scope, request.headers)
    response = RedirectResponse("/sign-in", status_code=303, headers=HEADERS)
    response.delete_cookie(
        cookie_name(request.scope, request.headers),
        httponly=True,
        samesite="strict",
        secure=is_encrypted(request.scope, request.headers),
        path="/",
    )
    return response


def _authenticate(services: Services, authorization: str | None) -> access.Caller:
    with services.database.read() as session:
        return access.authenticate(session, authorization)


def _is_known(services: Services, request: Request) -> bool:
    """Whether somebody is signed in already: then it was the key's scope that was too small."""
    try:
        return _authenticate(services, authorization_of(request.scope, request.headers)).key_id is not None
    except GraftError:
        return False


def _ours(address: str) -> str:
    """A place on this server; anything else would let a link lead people away from it."""
    try:
        host = urlsplit(address).netloc
    except ValueError:  # a bracket that is not closed, as if of an IPv6 address
        return "/"
    is_ours = address.startswith("/") and not address.startswith(("//", "/\\")) and not host
    return address if is_ours and address.isprintable() else "/"
