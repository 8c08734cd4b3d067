"""Where everything that is raised becomes a problem: our own errors, and what the framework finds."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from app.api.problems import Problem, invalid_fields
from app.db.engine import is_full
from app.errors import GraftError, StorageFull

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def handle_failures(app: FastAPI) -> None:
    """Anything else that is raised is our bug, and answered by the outermost middleware."""
    app.add_exception_handler(GraftError, _expected_failure)
    app.add_exception_handler(HTTPException, _framework_failure)
    app.add_exception_handler(RequestValidationError, _invalid_parameters)
    app.add_exception_handler(OperationalError, _database_failure)


async def _expected_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    return _respond(request, Problem.of(error))


async def _framework_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    return _respond(request, Problem.of_status(error.status_code, headers=headers))


async def _invalid_parameters(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Locations begin with "query", "path" or "header".
    return _respond(request, Problem.of(invalid_fields({**e, "loc": e["loc"][1:]} for e in error.errors())))


async def _database_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, OperationalError)
    if not is_full(error):
        raise error
    full = StorageFull("The server's disk is full, and nothing was changed; its operator has to make room.")
    return _respond(request, Problem.of(full))


def _respond(request: Request, problem: Problem) -> Response:
    return problem.response(request_id=request.state.request_id, path=request.url.path)


def _allowed_methods(request: Request) -> list[str]:
    """All methods of the path; the router itself names those of one route only. HEAD is answered wherever GET is."""
    routes = request.app.router.routes
    found = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    return ["HEAD", *found] if "GET" in found else found
