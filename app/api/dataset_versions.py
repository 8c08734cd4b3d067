"""POST /v1/datasets/{id}/versions: a data set of the same pictures, and of those that people have told the class of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Path, Query
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import predictions, registry
from app.api.archive_uploads import Answer, created, publish_and_create, stop_tick
from app.api.datasets import Name
from app.api.deps import ServicesDep
from app.api.openapi import problems
from app.api.schemas import Dataset
from app.api.services import Services
from app.datasets import catalog
from app.datasets.archive import ArchiveLimits
from app.datasets.ingest import archive_key, manifest_key
from app.datasets.inventory import inspect
from app.datasets.manifest import Manifest
from app.datasets.report import warning
from app.datasets.versions import Addition, Chosen, choose, write_version
from app.db.tables import DatasetRow, PredictionRow, new_id
from app.errors import Conflict, NotFound
from app.jobs import queue
from app.jobs.states import JobKind
from app.predictions import picture_key
from app.storage import file_sha256
from app.vision.images import ImageLimits, sniff

router = APIRouter(tags=["feedback"])

_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "TIFF": ".tiff", "BMP": ".bmp"}


@router.post(
    "/v1/datasets/{dataset_id}/versions",
    status_code=201,
    response_model=Dataset,
    summary="Make the next version of a data set, with the pictures that have feedback",
    description="A new data set: every picture of this one with its class and split, and to train on, the kept "
    "pictures that models of this data set and of those before it were asked, as people labelled them. What validated "
    "before validates again. It goes through the same checks as an upload.",
    responses=problems(404, 409, 413, 507),
)
async def make_version(
    services: ServicesDep,
    dataset_id: Annotated[str, Path(max_length=100)],
    name: Annotated[Name | None, Query(description="A name for people; this data set's if left out.")] = None,
    model: Annotated[
        str | None, Query(max_length=100, description="Only feedback on this one: a model's id or alias.")
    ] = None,
) -> Response:
    make = partial(_make, services, dataset_id, name=name, model=model)
    # As with uploads: only a few at a time read a whole archive.
    answer = await anyio.to_thread.run_sync(make, limiter=services.inspections)
    return created(answer, collection="/v1/datasets")


@dataclass(frozen=True)
class _Parent:
    row: DatasetRow
    manifest: Manifest
    told: Sequence[PredictionRow]  # that have feedback


def _make(services: Services, dataset_id: str, *, name: str | None, model: str | None) -> Answer:
    storage = services.storage
    parent = _open(services, dataset_id, model)
    chosen = choose(parent.manifest, _additions(services, parent.told))
    if not chosen.additions:
        raise _nothing_to_add(parent, chosen)
    limits, image_limits = ArchiveLimits.from_settings(services.settings), ImageLimits.from_settings(services.settings)
    is_stopping = stop_tick(services)

    def tick(share: float) -> None:
        is_stopping(share)
        storage.check_room()

    with storage.staging() as staged:
        try:
            old = storage.path(archive_key(dataset_id))
            storage.check_room(old.stat().st_size + sum(each.picture.stat().st_size for each in chosen.additions))
            write_version(staged, old, parent.manifest, chosen.additions, limits=limits, tick=tick)
        except FileNotFoundError:
            raise Conflict("The data set or some of the pictures were just deleted; try again.") from None
        inspect(staged, limits=limits, image_limits=image_limits, tick=is_stopping)
        return _keep(services, staged, parent.row, chosen, name=name or parent.row.name)


def _open(services: Services, dataset_id: str, model: str | None) -> _Parent:
    with services.database.read() as session:
        row = catalog.find(session, dataset_id)
        if row.status != "ready" or row.kind != "labelled":
            raise Conflict(
                f"Only a ready data set with classes has versions; this one is {row.status}, {row.kind}.",
                code="dataset-without-versions",
                retry_after_seconds=2 if row.status == "processing" else None,
            )
        told = predictions.with_feedback(
            session, _line(session, row), model_id=registry.find(session, model).id if model else None
        )
    try:
        return _Parent(row, Manifest.read(services.storage.path(manifest_key(dataset_id))), told)
    except (OSError, ValueError):
        raise NotFound(
            "The data set's files are missing or damaged; delete it and upload it again.", code="dataset-unreadable"
        ) from None


def _line(session: Session, row: DatasetRow) -> list[str]:
    """Ids of the data set and of those it came from, as far as they are still there."""
    line = [row.id]
    while row.parent_id is not None:
        line.append(row.parent_id)
        if not catalog.exists(session, row.parent_id):
            break
        row = catalog.find(session, row.parent_id)
    return line


def _additions(services: Services, told: Sequence[PredictionRow]) -> list[Addition]:
    """Of pictures that are there; one may have been deleted since its row was read."""
    found = []
    for row in told:
        picture = services.storage.path(picture_key(row.id))
        try:
            with picture.open("rb") as file:
                suffix = _SUFFIXES.get(sniff(file.read(16)) or "", "")
        except FileNotFoundError:
            continue
        found.append(Addition(f"{row.id}{suffix}", picture, row.sha256, row.feedback or {}))
    return found


def _keep(services: Services, archive: FilePath, parent: DatasetRow, chosen: Chosen, *, name: str) -> Answer:
    dataset_id = new_id("ds")
    archive_bytes, sha256 = archive.stat().st_size, file_sha256(archive)

    def create(session: Session) -> dict[str, Any]:
        services.workspace.check_room(session, archive_bytes)
        row = catalog.create(
            session,
            dataset_id=dataset_id,
            name=name,
            size_bytes=archive_bytes,
            sha256=sha256,
            options=dict(parent.options),
            parent_id=parent.id,
            warnings=_warnings(chosen),
        )
        queue.submit(session, kind=JobKind.ingest, dataset_id=dataset_id, spec=row.options)
        return Dataset.of(row).model_dump(mode="json")

    return publish_and_create(services, archive, archive_key(dataset_id), create=create)


def _warnings(chosen: Chosen) -> list[dict[str, Any]]:
    if not chosen.lonely:
        return []
    names = ", ".join(chosen.lonely[:10])
    return [
        warning(
            "new_class_left_out",
            f"A single picture is said to be of {names}: too few for a class. Say it of another picture, too.",
        )
    ]


def _nothing_to_add(parent: _Parent, chosen: Chosen) -> Conflict:
    if chosen.lonely:
        detail = _warnings(chosen)[0]["detail"]
    elif parent.told:
        detail = "Every picture with feedback is in the data set already."
    else:
        detail = (
            "No prediction by a model of this data set has feedback: ask /predict with store=true, and POST to "
            "/v1/predictions/{id}/feedback what the picture is."
        )
    return Conflict(detail, code="no-new-feedback")
