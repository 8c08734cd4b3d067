"""/: where one begins. Programs that ask for it get the addresses of what there is, as JSON."""

from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app.api import datasets, jobs, models
from app.api.deps import ServicesDep
from app.api.services import Services
from app.web.datasets import dataset_names
from app.web.site import may_train, page

SHOWN = 5

router = APIRouter(include_in_schema=False)


@router.get("/")
async def home(request: Request, services: ServicesDep) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse(_index(), headers={"Vary": "Accept"})
    shown = await run_in_threadpool(_shown, services, with_training=may_train(request))
    response = page(request, "home.html", **shown)
    response.headers["Vary"] = "Accept"
    return response


def _index() -> dict[str, str]:
    return {
        "name": "Graft",
        "version": version("graft"),
        "documentation": "/docs",
        "openapi": "/openapi.json",
        "datasets": "/v1/datasets",
        "jobs": "/v1/jobs",
        "models": "/v1/models",
        "predict": "/predict",
    }


def _shown(services: Services, *, with_training: bool) -> dict[str, Any]:
    """The newest of each; of what may be seen with a key for predictions alone, the models."""
    made = models.list_models(services, limit=SHOWN).data
    return {
        "names": dataset_names(services, [model.dataset for model in made]),
        "datasets": datasets.list_datasets(services, limit=SHOWN).data if with_training else [],
        "jobs": jobs.list_jobs(services, limit=SHOWN).data if with_training else [],
        "models": made,
    }
