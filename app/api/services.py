"""What the routes work with: opened when the app starts, closed when it ends; and what goes on beside the requests."""

import asyncio
import threading
from dataclasses import dataclass, field

import anyio
import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import registry
from app.api.metrics import Metrics
from app.api.pictures import Pictures
from app.db.engine import Database
from app.errors import GraftError
from app.serving.predictor import Predictor
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.device import resolve_device
from app.vision.images import ImageLimits
from app.vision.weights import WeightStore

# How soon a moved `default` is loaded without anybody having asked for it.
FOLLOW_INTERVAL_SECONDS = 0.5
# Between two tries of a default model that cannot be loaded, or of a database that does not answer.
RETRY_INTERVAL_SECONDS = 5.0
SWEEP_INTERVAL_SECONDS = 3600.0
# Archives read through at once, at upload; each keeps a core busy.
PARALLEL_INSPECTIONS = 4

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Services:
    """Made once per app, by `open_services`."""

    settings: Settings
    database: Database
    storage: LocalStorage
    weights: WeightStore
    predictor: Predictor
    pictures: Pictures
    metrics: Metrics
    # Keeps threads free for everybody else while large archives are read through.
    inspections: anyio.CapacityLimiter
    # Set when the server begins to shut down: streams and waits end then instead of holding it up.
    stopping: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.stopping.set()
        self.predictor.close()
        self.database.dispose()


def open_services(settings: Settings) -> Services:
    database = Database(settings.resolved_database_url)
    storage = LocalStorage(settings.storage_root, min_free_bytes=settings.min_free_bytes)
    metrics = Metrics(database)
    predictor = Predictor(
        folder_of=lambda model_id: storage.path(f"models/{model_id}"),
        device=resolve_device(settings.device),
        limits=ImageLimits.from_settings(settings),
        max_loaded_bytes=settings.max_loaded_model_bytes,
        max_pending=settings.max_pending_predictions,
        on_load=lambda is_loaded: metrics.count_model_load(is_loaded=is_loaded),
    )
    return Services(
        settings=settings,
        database=database,
        storage=storage,
        weights=WeightStore.from_settings(settings),
        predictor=predictor,
        pictures=Pictures(storage),
        metrics=metrics,
        inspections=anyio.CapacityLimiter(PARALLEL_INSPECTIONS),
    )


async def follow_default_model(services: Services) -> None:
    """Loads whatever `default` points at, so that no request pays for it, and keeps it loaded. Never returns."""
    pinned: str | None = None
    while True:
        pause = FOLLOW_INTERVAL_SECONDS
        try:
            model_id = await asyncio.to_thread(_default_model_id, services)
            if model_id != pinned:
                await services.predictor.pin(model_id)
                pinned = model_id
                log.info("default model follows", model_id=model_id)
        except GraftError as error:
            log.error("default model cannot be loaded", reason=error.detail)
            pause = RETRY_INTERVAL_SECONDS
        except SQLAlchemyError as error:
            log.error("database does not answer", error=type(error).__name__)
            pause = RETRY_INTERVAL_SECONDS
        await asyncio.sleep(pause)


async def sweep_storage(services: Services) -> None:
    """Removes what crashes have left in staging, at the start and every hour. Never returns."""
    while True:
        try:
            removed = await asyncio.to_thread(services.storage.sweep)
            if removed:
                log.info("staging swept", removed=removed)
        except OSError as error:
            log.error("staging cannot be swept", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


def _default_model_id(services: Services) -> str | None:
    with services.database.read() as session:
        return registry.default_model_id(session)
