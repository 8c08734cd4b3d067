"""/v1/datasets: upload, list, look at, delete."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import holdings
from app.access import Caller
from app.api import archive_uploads
from app.api.archive_uploads import BINARY, ArchiveUse, Tick, archive_body, created
from app.api.deps import After, CallerDep, IdempotencyKey, Limit, ServicesDep, Wait, wait_until
from app.api.openapi import options_of, problems
from app.api.schemas import Dataset, DatasetImage, Deleted, Listing
from app.api.services import Services
from app.api.strict_json import parse_as
from app.datasets import catalog
from app.datasets.archive import ArchiveLimits
from app.datasets.ingest import archive_key
from app.datasets.inventory import inspect
from app.datasets.layout import Kind
from app.datasets.upload import StagedUpload
from app.db.tables import DatasetRow, new_id
from app.errors import Conflict
from app.jobs import queue
from app.jobs.states import JobKind
from app.settings import Settings
from app.vision.images import ImageLimits

DEFAULT_NAME = "dataset"

_ARCHIVE_SUFFIX = re.compile(r"(\.zip|\.tar|\.tar\.gz|\.tgz)$", re.IGNORECASE)

router = APIRouter(tags=["data sets"])

# Pictures of one split, or of any. One list, so that a wrong name is pointed at as `#/split`.
OfSplit = Literal["train", "val", "test", ""]

DatasetId = Annotated[str, Path(max_length=100)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
ValFraction = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
# 2^53 - 1 is the largest integer that every JSON reader keeps exactly.
Seed = Annotated[int, Field(ge=0, le=2**53 - 1)]


class UploadOptions(BaseModel):
    """What an upload may say besides the archive, in its query or its form."""

    model_config = ConfigDict(frozen=True)

    name: Name | None = None
    kind: Kind | None = None
    val_fraction: ValFraction | None = None
    seed: Seed | None = None
    purpose: Literal["fine-tune"] | None = None  # of clients that upload files for many


_UPLOAD: dict[str, Any] = {
    "response_model": Dataset,
    "status_code": 201,
    "responses": problems(408, 409, 413, 507),
    "description": "A zip, tar or tar.gz of images in class folders, with or without train and val folders around "
    "them, or beside a labels.csv, metadata.csv or metadata.jsonl. Structural faults are refused at once and leave "
    "nothing; the images are then checked in the background.",
    "openapi_extra": archive_body({name: of for name, of in options_of(UploadOptions).items() if name != "purpose"}),
}


@router.post("/v1/datasets", summary="Upload a data set", **_UPLOAD)
@router.put("/v1/datasets", summary="Upload a data set, as `curl -T` does", **_UPLOAD)
async def upload_dataset(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    name: Annotated[Name | None, Query(description="A name for people; the file's if left out.")] = None,
    kind: Annotated[
        Kind | None,
        Query(description="unlabelled: pictures in any folders and of no class, for method self_supervised."),
    ] = None,
    val_fraction: Annotated[
        ValFraction | None, Query(description="Share of each class for validation, where the archive has no split.")
    ] = None,
    seed: Annotated[Seed | None, Query(description="Of the split.")] = None,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    in_query = {"name": name, "kind": kind, "val_fraction": val_fraction, "seed": seed}
    answer, is_replay = await receive_once(request, services, caller, in_query, idempotency_key)
    if wait:
        answer = (await wait_for(request, services, answer["id"], seconds=wait)).model_dump(mode="json")
    return created(answer, collection="/v1/datasets", is_replay=is_replay)


@router.get(
    "/v1/datasets", response_model=Listing[Dataset], summary="List data sets, newest first", responses=problems(404)
)
def list_datasets(
    services: ServicesDep,
    limit: Limit = 50,
    after: After = None,
    status: Literal["processing", "ready", "failed"] | None = None,
) -> Listing[Dataset]:
    with services.database.read() as session:
        if after:
            catalog.find(session, after)
        rows = catalog.list_datasets(session, limit=limit + 1, after=after or None, status=status)
        progress = queue.ingest_progress(session, [row.id for row in rows])
        return Listing[Dataset].of(
            rows,
            limit=limit,
            render=lambda row: Dataset.of(row, progress=progress.get(row.id)),
            id_of=lambda dataset: dataset.id,
        )


@router.get("/v1/datasets/{dataset_id}", response_model=Dataset, summary="One data set", responses=problems(404))
async def get_dataset(request: Request, services: ServicesDep, dataset_id: DatasetId, wait: Wait = 0) -> Dataset:
    return await wait_for(request, services, dataset_id, seconds=wait)


@router.delete(
    "/v1/datasets/{dataset_id}",
    response_model=Deleted,
    summary="Delete a data set that no unfinished job needs",
    responses=problems(404, 409),
)
def delete_dataset(services: ServicesDep, dataset_id: DatasetId) -> Deleted:
    def delete(session: Session) -> None:
        queue.cancel_ingest(session, found)
        catalog.delete(session, found)
        # Asked last: who was just submitting a job has held the data set until then. A refusal takes all of it back.
        if queue.needs_dataset(session, found):
            raise Conflict("A job that has not ended needs this data set; cancel it, or wait for its end.")

    with services.database.read() as session:
        found = catalog.find(session, dataset_id).id
    holdings.delete(services.database, services.storage, f"datasets/{found}", rows=delete)
    services.pictures.forget(found)
    return Deleted(id=found, object="dataset")


@router.get(
    "/v1/datasets/{dataset_id}/images",
    response_model=Listing[DatasetImage],
    summary="A page of its images",
    responses=problems(404, 409),
)
def list_images(
    services: ServicesDep,
    dataset_id: DatasetId,
    class_name: Annotated[str | None, Query(alias="class", max_length=1000)] = None,
    split: OfSplit = "",
    limit: Limit = 50,
    after: After = None,
) -> Listing[DatasetImage]:
    _check_has_images(services, dataset_id)
    found, has_more = services.pictures.page(
        dataset_id, class_name=class_name or None, split=split or None, limit=limit, after=after or None
    )
    images = [DatasetImage.of(record, name, dataset_id=dataset_id) for record, name in found]
    return Listing[DatasetImage](
        data=images,
        has_more=has_more,
        first_id=images[0].id if images else None,
        last_id=images[-1].id if images else None,
    )


@router.get(
    "/v1/datasets/{dataset_id}/images/{image_id}/thumbnail",
    response_class=Response,
    summary="A small JPEG of one image",
    responses={200: {"content": {"image/jpeg": BINARY}}, **problems(404, 409)},
)
def get_thumbnail(services: ServicesDep, dataset_id: DatasetId, image_id: DatasetId) -> Response:
    _check_has_images(services, dataset_id)
    # Pixels never change under an image's id.
    headers = {"Cache-Control": "private, max-age=86400, immutable", "Content-Security-Policy": "default-src 'none'"}
    return Response(services.pictures.thumbnail(dataset_id, image_id), media_type="image/jpeg", headers=headers)


async def receive_once(
    request: Request, services: Services, caller: Caller, in_query: Mapping[str, Any], idempotency_key: str | None
) -> tuple[Mapping[str, Any], bool]:
    """The data set made of the archive in the body, and whether it was answered before under the same Idempotency-Key.

    in_query: options of UploadOptions; a form's fields go before them.
    """
    use = archive_use(services.settings, in_query)
    return await archive_uploads.receive_once(request, services, caller, idempotency_key, use)


def archive_use(settings: Settings, in_query: Mapping[str, Any]) -> ArchiveUse[None]:
    """What a data set's archive is for, however it comes. in_query: options of UploadOptions; fields go before them."""

    def look_through(archive: FilePath, options: Mapping[str, Any], tick: Tick) -> None:
        inspect(
            archive,
            limits=ArchiveLimits.from_settings(settings),
            image_limits=ImageLimits.from_settings(settings),
            kind=options["kind"],
            tick=tick,
        )

    return ArchiveUse(
        text_fields=tuple(UploadOptions.model_fields),
        options=lambda upload: _options(in_query, upload, settings),
        inspect=look_through,
        new_id=partial(new_id, "ds"),
        archive_key=archive_key,
        create=_create,
    )


async def wait_for(request: Request, services: Services, dataset_id: str, *, seconds: float) -> Dataset:
    """The data set, once it is ready or failed, or the time is up. Raises NotFound."""

    def read() -> Dataset:
        return read_dataset(services, dataset_id)

    return await wait_until(
        read, is_final=lambda dataset: dataset.status != "processing", seconds=seconds, request=request
    )


def read_dataset(services: Services, dataset_id: str) -> Dataset:
    """Raises NotFound."""
    with services.database.read() as session:
        progress = queue.ingest_progress(session, [dataset_id]).get(dataset_id)
        return Dataset.of(catalog.find(session, dataset_id), progress=progress)


def _create(
    session: Session, dataset_id: str, upload: StagedUpload, options: Mapping[str, Any], _found: None
) -> dict[str, Any]:
    """The data set and its ingest, and the answer."""
    row = catalog.create(
        session,
        dataset_id=dataset_id,
        name=options["name"],
        size_bytes=upload.size_bytes,
        sha256=upload.sha256,
        kind=options["kind"],
        options={
            "val_fraction": options["val_fraction"],
            "seed": options["seed"],
            "filename": printable_base(upload.filename) or None,
        },
    )
    queue.submit(session, kind=JobKind.ingest, dataset_id=dataset_id, spec=row.options)
    return Dataset.of(row).model_dump(mode="json")


def _options(in_query: Mapping[str, Any], upload: StagedUpload, settings: Settings) -> dict[str, Any]:
    """Everything the upload says besides the archive, with defaults; a form's fields go before the query's."""
    in_form = {name: text for name, text in upload.fields.items() if text}
    asked = parse_as(UploadOptions, {**in_query, **in_form})
    return {
        "name": asked.name or _name_of_file(upload.filename),
        "kind": asked.kind or "labelled",
        "val_fraction": settings.val_fraction if asked.val_fraction is None else asked.val_fraction,
        "seed": asked.seed or 0,
    }


def _name_of_file(filename: str | None) -> str:
    return _ARCHIVE_SUFFIX.sub("", printable_base(filename))[:200] or DEFAULT_NAME


def printable_base(filename: str | None) -> str:
    """A caller's file name without folders, and without what cannot be shown; "" for none."""
    base = re.split(r"[/\\]", filename or "")[-1]
    return "".join(character for character in base if character.isprintable())[:255]


def _check_has_images(services: Services, dataset_id: str) -> DatasetRow:
    with services.database.read() as session:
        row = catalog.find(session, dataset_id)
    if row.status == "processing":
        raise Conflict("The data set is still being processed.", code="dataset-processing", retry_after_seconds=2)
    if row.status == "failed":
        raise Conflict("The data set could not be processed; its `error` says why.", code="dataset-failed")
    return row
