"""The API's only wiring: settings in, an application out. `python -m app.main` serves it."""

import asyncio
import contextlib
import gc
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

import structlog
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from app import access, logs
from app.api import (
    batches,
    classes,
    dataset_versions,
    datasets,
    feedback,
    files,
    fine_tuning,
    huggingface,
    jobs,
    model_files,
    models,
    open_inference,
    openapi,
    personalise,
    predict,
    system,
)
from app.api.deps import refuse_unknown_query
from app.api.failures import handle_failures
from app.api.middleware import MIDDLEWARE
from app.api.server import make_server
from app.api.services import follow_aliases, keep_ballast, open_services, sweep_storage
from app.db.engine import Database
from app.db.migrate import check_is_current
from app.errors import GraftError
from app.settings import Settings

log = structlog.get_logger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The application. What it works with is opened when it starts and closed when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = app.state.services = open_services(settings)
        tasks = [asyncio.create_task(task(services)) for task in (follow_aliases, sweep_storage, keep_ballast)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            services.close()

    app = FastAPI(
        title="Graft",
        version=version("graft"),
        lifespan=lifespan,
        middleware=[Middleware(middleware) for middleware in (*MIDDLEWARE, predict.Shortcut)],
        dependencies=[Depends(refuse_unknown_query)],
        docs_url=None,  # FastAPI's own page loads its scripts from other servers; ours is in system.py
        redoc_url=None,
        redirect_slashes=False,  # a redirected POST loses its body with many clients; a 404 says what is wrong
    )
    for part in (
        datasets,
        jobs,
        models,
        model_files,
        classes,
        personalise,
        predict,
        feedback,
        dataset_versions,
        batches,
        open_inference,
        huggingface,
        files,
        fine_tuning,
        system,
    ):
        app.include_router(part.router)
    app.mount("/swagger", StaticFiles(packages=[("fastapi_swagger", "resources")]))
    handle_failures(app)
    app.openapi = openapi.describe(app)  # type: ignore[method-assign]
    return app


def main() -> int:
    """Serves until SIGINT or SIGTERM. Returns the exit status."""
    settings = Settings()
    logs.configure(settings)
    database = Database(settings.resolved_database_url)
    try:
        check_is_current(database)
        with database.read() as session:
            access.check_listen_address(settings.host, has_keys=access.has_keys(session))
    except (GraftError, ValueError) as error:
        log.error("cannot start", reason=str(error))
        return 1
    finally:
        database.dispose()
    server = make_server(create_app(settings), settings)
    # What is there by now stays: looking through half a million objects, most of them torch's, takes a request 0.2 s.
    gc.collect()
    gc.freeze()
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
