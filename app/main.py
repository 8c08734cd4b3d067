"""The API's only wiring: settings in, an application out. `python -m app.main` serves it."""

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version

import structlog
from fastapi import Depends, FastAPI
from starlette.middleware import Middleware

from app import access, logs, telemetry
from app.allocator import keep_freed_memory
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
    uploads,
    usage,
    webhooks,
)
from app.api.deps import refuse_unknown_query
from app.api.failures import handle_failures
from app.api.middleware import UNTRACED_PATHS, middleware
from app.api.retention import sweep_ended
from app.api.server import make_server
from app.api.services import follow_aliases, keep_ballast, open_services, sweep_storage, write_traffic_down
from app.api.upload_endings import complete_uploads, sweep_uploads
from app.api.webhook_dispatch import forget_deliveries, send_webhooks
from app.db.engine import Database
from app.db.migrate import check_is_current
from app.egress import Lookups, Resolve
from app.errors import GraftError
from app.settings import Settings
from app.storage import keep_private
from app.web import datasets as dataset_pages
from app.web import home, sign_in, site, try_it
from app.web import jobs as job_pages
from app.web import models as model_pages

# Besides the answers, as long as the app runs.
TASKS = (
    follow_aliases,
    sweep_storage,
    sweep_ended,
    keep_ballast,
    write_traffic_down,
    complete_uploads,
    sweep_uploads,
    send_webhooks,
    forget_deliveries,
)

log = structlog.get_logger(__name__)


def create_app(settings: Settings, *, resolve: Resolve | None = None) -> FastAPI:
    """The application. What it works with is opened when it starts and closed when it ends.

    resolve: looks up the hosts that webhooks go to, if not the operating system does.

    Traced if `telemetry.start` was called before, and found reason to.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = app.state.services = open_services(settings, resolve=resolve or Lookups())
        tasks = [asyncio.create_task(task(services)) for task in TASKS]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # A thread that one of them waited for goes on to its end, and what it uses must outlast it.
            await asyncio.get_running_loop().shutdown_default_executor()
            services.close()
            telemetry.stop()  # here, since the process ends when uvicorn raises the signal that stopped it once more

    app = FastAPI(
        title="Graft",
        version=version("graft"),
        lifespan=lifespan,
        middleware=[Middleware(part) for part in (*middleware(), predict.Shortcut)],
        dependencies=[Depends(refuse_unknown_query)],
        docs_url=None,  # FastAPI's own page loads its scripts from other servers; ours is in system.py
        redoc_url=None,
        telemetry={
            "auto_configure": False,  # telemetry.start does it, for every process alike
            "tracing": telemetry.is_on(),
            "metrics": False,  # metrics.py has them
            "logs": False,
            "operation_spans": False,
            "exclude": lambda scope: scope["path"] in UNTRACED_PATHS,
        },
        redirect_slashes=False,  # a redirected POST loses its body with many clients; a 404 says what is wrong
    )
    for part in (
        datasets,
        uploads,
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
        webhooks,
        system,
        usage,
        home,
        dataset_pages,
        job_pages,
        model_pages,
        try_it,
        sign_in,
    ):
        app.include_router(part.router)
    app.mount("/static", site.Assets(directory=site.STATIC))
    app.mount("/swagger", site.Assets(packages=[("fastapi_swagger", "resources")]))
    handle_failures(app, show=site.failure)
    app.openapi = openapi.describe(app)  # type: ignore[method-assign]
    return app


def main() -> int:
    """Serves until SIGINT or SIGTERM. Returns, or exits with, the status: 0 if it was asked to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        # Uvicorn has handlers of its own while it serves; once all is closed it raises the signal again.
        signal.signal(number, lambda *_: sys.exit(0))
    keep_private()
    keep_freed_memory()
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
    telemetry.start(settings, service="graft-api")
    server = make_server(create_app(settings), settings)
    # What is there by now stays: looking through half a million objects, most of them torch's, takes a request 0.2 s.
    gc.collect()
    gc.freeze()
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
