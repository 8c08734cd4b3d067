"""For operators: is it alive, is it ready, how is it doing."""

from collections.abc import Callable, Mapping

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse, Response

from app import registry
from app.api.deps import ServicesDep
from app.api.openapi import problems
from app.api.problems import Problem
from app.api.schemas import Health, Readiness
from app.api.services import Services
from app.db.migrate import check_is_current
from app.db.tables import DEFAULT_WORKSPACE
from app.errors import GraftError

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Health, summary="Whether the process is alive")
async def healthz() -> Health:
    return Health()


@router.get(
    "/readyz",
    response_model=Readiness,
    summary="Whether requests can be served: database, storage, default model",
    responses=problems(503),
)
def readyz(request: Request, services: ServicesDep) -> Response:
    found = readiness(services)
    if isinstance(found, Problem):
        return found.response(request_id=request.state.request_id, path=request.url.path)
    return JSONResponse(found.model_dump())


def readiness(services: Services) -> Readiness | Problem:
    checks = {name: _outcome(check, services) for name, check in _CHECKS.items()}
    failing = {name: outcome for name, outcome in checks.items() if outcome != "ok"}
    if not failing:
        return Readiness(checks=checks)
    return Problem(
        status=503,
        code="not-ready",
        title="Not ready",
        detail="; ".join(f"{name}: {outcome}" for name, outcome in failing.items()),
        retry_after_seconds=1,
        extra={"checks": checks},
    )


@router.get(
    "/metrics",
    response_class=Response,
    summary="Prometheus metrics",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(services: ServicesDep) -> Response:
    return Response(services.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/docs", include_in_schema=False)
async def page_of_the_api() -> Response:
    """Its scripts come from this server too: there may be no internet."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Graft",
        swagger_js_url="/swagger/swagger-ui-bundle.js",
        swagger_css_url="/swagger/swagger-ui.css",
        swagger_favicon_url="/swagger/favicon-32x32.png",
    )


def _check_database(services: Services) -> None:
    check_is_current(services.database)


def _check_storage(services: Services) -> None:
    services.storage.check_room()
    with services.storage.staging() as probe:
        probe.touch()


class _NotYet(Exception):
    pass


def _check_default_model(services: Services) -> None:
    with services.database.within(DEFAULT_WORKSPACE).read() as session:
        model_id = registry.default_model_id(session)
    if model_id is not None and not services.predictor.is_loaded(model_id):
        raise _NotYet


def _outcome(check: Callable[[Services], None], services: Services) -> str:
    """ "ok", or why not. The words are for strangers too: nothing of the library's own message."""
    try:
        check(services)
    except GraftError as error:
        return error.detail
    except _NotYet:
        return "the default model is not loaded yet"
    except SQLAlchemyError:
        return "the database does not answer"
    except OSError:
        return "the storage cannot be written to"
    return "ok"


_CHECKS: Mapping[str, Callable[[Services], None]] = {
    "database": _check_database,
    "storage": _check_storage,
    "default_model": _check_default_model,
}
