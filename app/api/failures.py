"""Where everything that is raised becomes a problem: our own errors, and what the framework finds.

Programs get it as a document; people at a browser as a page, which is made elsewhere.
"""

import re
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from app import workspaces
from app.api.problems import Problem, invalid_fields
from app.api.services import Services
from app.db.engine import is_full
from app.errors import GraftError, StorageFull, Unauthenticated
from app.storage import is_disk_full

# What answers programs alone, whatever they say to accept.
OF_PROGRAMS = re.compile(r"/(?:v1|v2|hf|predict|openapi\.json|healthz|readyz|metrics|swagger|static)(?:/|$)")

# What routes raise that is no bug of ours.
EXPECTED = (GraftError, OperationalError, OSError, IntegrityError)
_FULL = StorageFull("The server's disk is full, and nothing was changed; its operator has to make room.")

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


ShowFailure = Callable[[Request, Problem], Response]


def handle_failures(app: FastAPI, *, show: ShowFailure) -> None:
    """Anything else that is raised is our bug, and answered by the outermost middleware. show: makes the page."""
    app.state.show_failure = show
    for kind in EXPECTED:
        app.add_exception_handler(kind, expected_failure)
    app.add_exception_handler(HTTPException, _framework_failure)
    app.add_exception_handler(RequestValidationError, _invalid_parameters)


def is_for_a_person(request: Request) -> bool:
    """Whether a page is wanted, by a browser, or a part of one, by a page's script."""
    wants_page = "text/html" in request.headers.get("accept", "") or "hx-request" in request.headers
    return wants_page and OF_PROGRAMS.match(request.url.path) is None


def answer(request: Request, problem: Problem) -> Response:
    if is_for_a_person(request):
        show: ShowFailure = request.app.state.show_failure
        return show(request, problem)
    return problem.response(request_id=request.state.request_id, path=request.url.path)


async def expected_failure(request: Request, error: Exception) -> Response:
    """The answer to one of EXPECTED; raises it anew if it is our bug after all."""
    match error:
        case GraftError():
            return answer(request, Problem.of(error))
        case OperationalError() if is_full(error):
            return answer(request, Problem.of(_FULL))
        case OSError() if is_disk_full(error):
            return answer(request, Problem.of(_FULL))
        case IntegrityError() if not await run_in_threadpool(_has_workspace, request.state.services):
            # A request that was let in just before its workspace was deleted ends as those that come now.
            return answer(request, Problem.of(Unauthenticated("This API key's workspace was just deleted.")))
    raise error


async def _framework_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    return answer(request, Problem.of_status(error.status_code, headers=headers))


async def _invalid_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Locations begin with "query", "path" or "header".
    return answer(request, Problem.of(invalid_fields({**e, "loc": e["loc"][1:]} for e in error.errors())))


def _has_workspace(services: Services) -> bool:
    with services.database.read() as session:
        return workspaces.exists(session, services.workspace.id)


def _allowed_methods(request: Request) -> list[str]:
    """All methods of the path; the router itself names those of one route only. HEAD is answered wherever GET is."""
    routes = request.app.router.routes
    found = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return ["HEAD", *found] if "GET" in found else found
