"""What every page has: its frame, its headers, and failures told to people instead of programs."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

from fastapi import Path as PathParameter
from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Send
from starlette.types import Scope as AsgiScope

from app.access import Scope
from app.api.deps import read_body
from app.api.problems import Problem
from app.errors import InvalidRequest
from app.web import charts, words

STATIC = Path(__file__).parent / "static"

# Nothing inline and nothing from elsewhere; data: and blob: are heat maps, and pictures not sent yet.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cache-Control": "no-store",
    # A form's Origin would be `null` without it, where there is no Sec-Fetch-Site to say whose page it was.
    "Referrer-Policy": "same-origin",
}

# Room for 10,000 paths to exclude, as for the body of POST /v1/jobs.
MAX_FORM_BYTES = 3 * 1024 * 1024
MAX_FORM_FIELDS = 11_000


class Assets(StaticFiles):
    """Small files, which are sent whole: a Range is passed over (RFC 9110, 14.2), where Starlette would refuse a
    bad one in plain text."""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


PageId = Annotated[str, PathParameter(max_length=100)]


def page(request: Request, template: str, *, status_code: int = 200, **context: Any) -> Response:
    """A whole page, or the fragment of one, from its template."""
    text = _environment().get_template(template).render(**_frame(request), **context)
    return HTMLResponse(text, status_code=status_code, headers=HEADERS)


def failure(request: Request, problem: Problem) -> Response:
    """A page that says what went wrong; in place of a fragment, its sentence alone."""
    template = "failure_note.html" if is_fragment(request) else "failure.html"
    request_id = request.state.request_id if problem.status >= 500 else None
    response = page(request, template, status_code=problem.status, problem=problem, request_id=request_id)
    response.headers.update({**problem.response_headers(path=request.url.path), "Vary": "Accept"})
    return response


def go_to(request: Request, address: str) -> Response:
    """On to another page after a form; htmx is told by a header, since it would follow a redirect into the fragment."""
    if is_fragment(request):
        return Response(headers={"HX-Redirect": address} | HEADERS)
    return RedirectResponse(address, status_code=303, headers=HEADERS)


def is_fragment(request: Request) -> bool:
    return "hx-request" in request.headers


def may_train(request: Request) -> bool:
    return bool(request.state.caller.may(Scope.train))


async def read_form(request: Request, *, max_bytes: int = MAX_FORM_BYTES) -> list[tuple[str, str]]:
    """The fields of a form as browsers send it by default, empty ones too. Raises TooLarge, InvalidRequest."""
    body = await read_body(request, max_bytes=max_bytes)
    try:
        return await run_in_threadpool(_fields, body)  # megabytes of escapes take most of a second
    except ValueError:
        raise InvalidRequest("The form could not be read; go back, reload the page and send it again.") from None


def _fields(body: bytes) -> list[tuple[str, str]]:
    return parse_qsl(
        body.decode(),
        keep_blank_values=True,
        strict_parsing=bool(body),
        errors="strict",
        max_num_fields=MAX_FORM_FIELDS,
    )


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("app.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= words.FILTERS
    environment.globals |= {"static": _static_address, "charts": charts, "version": version("graft")}
    return environment


def _frame(request: Request) -> dict[str, Any]:
    caller = getattr(request.state, "caller", None)
    return {
        "path": request.url.path,
        "may_train": caller is not None and caller.may(Scope.train),
        "is_signed_in": caller is not None and caller.key_id is not None,
        "origin": f"{_scheme(request)}://{request.url.netloc}",
    }


def _scheme(request: Request) -> str:
    return request.headers.get("x-forwarded-proto", request.url.scheme).partition(",")[0]


@functools.cache
def _static_address(name: str) -> str:
    """With a digest, so that a browser keeps no file of an earlier version."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?{digest}"
