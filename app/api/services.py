"""What the routes work with: opened when the app starts, closed when it ends; and what goes on beside the requests."""

import asyncio
import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial

import anyio
import structlog
from sqlalchemy.exc import SQLAlchemyError

from app import audit, holdings, registry, workspaces
from app.api.dataset_pictures import check_pixels, training_pictures
from app.api.kept_predictions import Shelf
from app.api.metrics import Metrics
from app.api.pictures import Pictures
from app.api.remembered import Remembered
from app.api.traffic import Traffic
from app.clock import PatientClock
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, FIRST_WORKSPACE_NAME
from app.db.tenancy import Actor
from app.egress import Egress, Resolve
from app.errors import GraftError
from app.precedence import Precedence
from app.serving.exporter import Exporter
from app.serving.predictor import Predictor
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.decoding import Decoders
from app.vision.device import resolve_device
from app.vision.weights import WeightStore
from app.workspaces import Limits, Workspace

# How soon a moved `default` is loaded without anybody having asked for it.
FOLLOW_INTERVAL_SECONDS = 0.5
# Between two tries of a default model that cannot be loaded, or of a database that does not answer.
RETRY_INTERVAL_SECONDS = 5.0
SWEEP_INTERVAL_SECONDS = 3600.0
# What a process that is killed forgets of the predictions it counted.
WRITE_DOWN_INTERVAL_SECONDS = 5.0
# While the ballast that deleting has taken is not back.
BALLAST_INTERVAL_SECONDS = 60.0
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
    remembered: Remembered
    exporter: Exporter
    pictures: Pictures
    metrics: Metrics
    traffic: Traffic
    workspace: Workspace
    egress: Egress
    # Keeps threads free for everybody else while large archives are read through.
    inspections: anyio.CapacityLimiter
    clock: PatientClock = field(default_factory=PatientClock)
    # Set when the server begins to shut down: streams and waits end then instead of holding it up.
    stopping: threading.Event = field(default_factory=threading.Event)

    def within(self, workspace: Workspace, actor: Actor) -> "Services":
        """The same for one request: what it finds and makes in the database is its workspace's alone."""
        return replace(self, database=self.database.within(workspace.id, actor=actor), workspace=workspace)

    @property
    def shelf(self) -> Shelf:
        # What is kept is in no audit log: it may be every picture.
        return Shelf(self.database.within(self.database.workspace_id), self.storage, self.settings, self.clock)

    def stop(self) -> None:
        """Ends what would hold up the server's end; in the event loop's thread."""
        self.stopping.set()
        self.exporter.stop()

    def close(self) -> None:
        self.stop()
        self.predictor.close()
        _write_down(self)
        self.remembered.close()
        self.database.dispose()


def open_services(settings: Settings, *, resolve: Resolve) -> Services:
    database = Database(settings.resolved_database_url, ballast_bytes=settings.ballast_bytes)
    storage = LocalStorage(settings.storage_root, min_free_bytes=settings.min_free_bytes)
    metrics = Metrics(database, storage)
    precedence = Precedence.of(settings)
    predictor = Predictor(
        storage=storage,
        device=resolve_device(settings.device),
        decoders=Decoders.from_settings(settings),
        max_loaded_bytes=settings.max_loaded_model_bytes,
        max_pending=settings.max_pending_predictions,
        timeout_seconds=settings.predict_timeout_seconds,
        engine_policy=settings.serving_engine,
        check_pixels=lambda model_id, preprocessing: check_pixels(model_id, preprocessing, storage),
        training_pictures=lambda dataset_id, image_ids, side: training_pictures(
            dataset_id, image_ids, storage, side=side
        ),
        on_pending=lambda count: precedence.claim() if count else precedence.release(),
        on_load=lambda is_loaded: metrics.count_model_load(is_loaded=is_loaded),
        on_batch=metrics.observe_batch,
    )
    metrics.add_gauge(
        "graft_models_loaded", "Models in memory, by the engine that runs them.", predictor.engines_used, label="engine"
    )
    return Services(
        settings=settings,
        database=database,
        storage=storage,
        weights=WeightStore.from_settings(settings),
        predictor=predictor,
        remembered=Remembered(database),
        exporter=Exporter(storage, is_wanted=partial(holdings.has_row, database)),
        pictures=Pictures(storage),
        metrics=metrics,
        traffic=Traffic(database),
        # Of what runs beside the requests, which makes nothing that would count.
        workspace=Workspace(DEFAULT_WORKSPACE, FIRST_WORKSPACE_NAME, Limits.from_settings(settings)),
        egress=Egress(settings.webhook_networks, resolve),
        inspections=anyio.CapacityLimiter(PARALLEL_INSPECTIONS),
    )


async def follow_aliases(services: Services) -> None:
    """Loads whatever the first workspace's `default` points at, so that no request pays for it, and keeps it loaded;
    models with other names are the last to make room. Never returns."""
    followed: dict[tuple[str, str], str] | None = None
    while True:
        pause = FOLLOW_INTERVAL_SECONDS
        try:
            aliases = await asyncio.to_thread(_aliases, services)
            if aliases != followed:
                default = aliases.get((DEFAULT_WORKSPACE, registry.DEFAULT_ALIAS))
                await services.predictor.keep(default, aliased=aliases.values())
                followed = aliases
                log.info("aliases followed", default=default, aliased=len(aliases))
        except GraftError as error:
            log.error("aliases cannot be followed", reason=error.detail)
            pause = RETRY_INTERVAL_SECONDS
        except SQLAlchemyError as error:
            log.error("database does not answer", error=type(error).__name__)
            pause = RETRY_INTERVAL_SECONDS
        except Exception:
            # Whatever it is: a server that no longer follows its aliases serves the wrong model, or never gets ready.
            log.exception("aliases cannot be followed")
            pause = RETRY_INTERVAL_SECONDS
        await asyncio.sleep(pause)


async def write_traffic_down(services: Services) -> None:
    """Has what was predicted, and who came, outlast this process. Never returns."""
    while True:
        await asyncio.sleep(WRITE_DOWN_INTERVAL_SECONDS)
        await asyncio.to_thread(_write_down, services)


async def sweep_storage(services: Services) -> None:
    """Removes what crashes have left in staging, and predictions kept long enough, at the start and every hour. Never
    returns."""
    while True:
        try:
            await asyncio.to_thread(_expire_predictions, services)
            await asyncio.to_thread(_forget_old_changes, services)
            removed = await asyncio.to_thread(services.storage.sweep)
            if removed:
                log.info("staging swept", removed=removed)
        except (OSError, SQLAlchemyError, GraftError) as error:
            log.error("storage cannot be swept", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


async def keep_ballast(services: Services) -> None:
    """Has a little of the disk set aside for deleting, at the start and whenever it was taken. Never returns."""
    while True:
        await asyncio.to_thread(services.database.keep_ballast)
        await asyncio.sleep(BALLAST_INTERVAL_SECONDS)


def _write_down(services: Services) -> None:
    try:
        services.traffic.write_down()
    except (SQLAlchemyError, GraftError) as error:
        log.error("traffic cannot be written down", error=type(error).__name__)


def _aliases(services: Services) -> dict[tuple[str, str], str]:
    """Model ids by workspace and alias."""
    with services.database.read() as session:
        return {(alias.workspace_id, alias.name): alias.model_id for alias in registry.aliases(session)}


def _expire_predictions(services: Services) -> None:
    with services.database.read() as session:
        ids = [row.id for row in workspaces.list_workspaces(session)]
    for workspace_id in ids:
        replace(services, database=services.database.within(workspace_id)).shelf.expire()


def _forget_old_changes(services: Services) -> None:
    with services.database.write() as session:
        audit.forget_before(session, services.clock.before(timedelta(days=services.settings.audit_days)))
