"""/v1/batches: an archive of pictures in, what a model says of each of them out, as files."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, BinaryIO, Literal, Self

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session
from starlette.responses import Response, StreamingResponse

from app import holdings, registry
from app.api import archive_uploads
from app.api.archive_uploads import ArchiveUse, Tick, archive_body, created
from app.api.classifiers import model_id_of
from app.api.deps import After, CallerDep, IdempotencyKey, Limit, ServicesDep, Wait, wait_until
from app.api.evaluation import check_predicts
from app.api.openapi import problems
from app.api.schemas import DEFAULT_TOP_K, Deleted, JsonObject, Listing, Schema
from app.api.services import Services
from app.api.strict_json import parse_as
from app.datasets.archive import ArchiveLimits
from app.datasets.inventory import take_inventory
from app.datasets.upload import StagedUpload
from app.db.tables import JobRow, new_id
from app.errors import ArchiveRefused, Conflict, NotFound
from app.jobs import batches, queue
from app.jobs.batches import BatchSpec
from app.jobs.states import JobKind, JobStatus
from app.vision.images import ImageLimits

router = APIRouter(tags=["batches"])

BatchId = Annotated[str, Path(max_length=100)]
ModelName = Annotated[str, Field(min_length=1, max_length=100)]
TopK = Annotated[int, Field(ge=1, le=1000)]
Format = Literal["jsonl", "csv"]

_MEDIA_TYPES: dict[Format, str] = {"jsonl": "application/x-ndjson", "csv": "text/csv; charset=utf-8"}
_CHUNK_BYTES = 256 * 1024


class BatchOptions(BaseModel):
    """What an upload may say besides the archive, in its query or its form."""

    model_config = ConfigDict(frozen=True)

    model: ModelName | None = None
    top_k: TopK | None = None


class BatchProgress(Schema):
    stage: str = Field(description="prepare, predict, write or done.")
    fraction: float | None
    images_per_second: float | None
    eta_seconds: float | None


class BatchResults(Schema):
    """Where the results can be had."""

    jsonl: str
    csv: str


class Batch(Schema):
    id: str
    object: Literal["batch"] = "batch"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    queue_position: int | None = Field(description="1 for the batch that is taken next; null unless queued.")
    model: str = Field(description="The model that the name meant when the batch was submitted.")
    top_k: int
    progress: BatchProgress | None = Field(description="null before it starts.")
    num_files: int = Field(description="Files of the archive, each of which becomes a row.")
    num_images: int = Field(description="Rows with a prediction, so far.")
    num_rejected: int = Field(description="Rows with an error, so far: files that are no readable pictures.")
    size_bytes: int = Field(description="Of the archive.")
    sha256: str = Field(description="Of the archive.")
    results: BatchResults | None = Field(description="null until it has succeeded.")
    attempt: int = Field(description="1 on the first run, one more for each time its worker died.")
    cancel_requested: bool
    error: JsonObject | None = Field(description="Why it failed, as a problem.")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: JobRow, *, queue_position: int | None) -> Self:
        spec, counts, progress = BatchSpec.model_validate(row.spec), row.metrics or {}, row.progress
        where = f"/v1/batches/{row.id}/results?format="
        return cls(
            id=row.id,
            status=row.status,
            queue_position=queue_position,
            model=row.model_id,
            top_k=spec.top_k,
            progress=None if progress is None else {name: progress.get(name) for name in BatchProgress.model_fields},
            num_files=spec.files,
            num_images=counts.get("num_images", 0),
            num_rejected=counts.get("num_rejected", 0),
            size_bytes=spec.size_bytes,
            sha256=spec.sha256,
            results=BatchResults(jsonl=where + "jsonl", csv=where + "csv") if row.status == "succeeded" else None,
            attempt=row.attempt,
            cancel_requested=row.cancel_requested,
            error=row.error,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
        )


_UPLOAD: dict[str, Any] = {
    "response_model": Batch,
    "status_code": 201,
    "responses": problems(404, 408, 409, 413, 507),
    "description": "A zip, tar or tar.gz of pictures in any folders. Structural faults are refused at once and leave "
    "nothing. A worker then predicts beside training; a file that is no readable picture becomes a row with an error.",
    "openapi_extra": archive_body(
        {
            "model": {"type": "string", "minLength": 1, "maxLength": 100},
            "top_k": {"type": "integer", "minimum": 1, "maximum": 1000},
        }
    ),
}


@router.post("/v1/batches", summary="Classify an archive of pictures", **_UPLOAD)
@router.put("/v1/batches", summary="Classify an archive of pictures, as `curl -T` sends it", **_UPLOAD)
async def submit_batch(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    model: Annotated[ModelName | None, Query(description="A model's id or alias; `default` if left out.")] = None,
    top_k: Annotated[
        TopK | None, Query(description=f"Classes per picture, best first; {DEFAULT_TOP_K} if left out.")
    ] = None,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    if model is not None:
        await model_id_of(services, model)  # refused before the archive is sent, and not after
    use = _use(services, {"model": model, "top_k": top_k})
    answer, is_replay = await archive_uploads.receive_once(request, services, caller, idempotency_key, use)
    if wait:
        answer = (await _wait_for(request, services, answer["id"], seconds=wait)).model_dump(mode="json")
    return created(answer, collection="/v1/batches", is_replay=is_replay)


@router.get("/v1/batches", response_model=Listing[Batch], summary="List batches, newest first", responses=problems(404))
def list_batches(
    services: ServicesDep, limit: Limit = 50, after: After = None, status: JobStatus | None = None
) -> Listing[Batch]:
    with services.database.read() as session:
        if after:
            _find(session, after)
        rows = queue.list_jobs(session, limit=limit + 1, after=after or None, status=status, kind=JobKind.prediction)
        positions = queue.queue_positions(session, rows)
        return Listing[Batch].of(
            rows,
            limit=limit,
            render=lambda row: Batch.of(row, queue_position=positions.get(row.id)),
            id_of=lambda batch: batch.id,
        )


@router.get("/v1/batches/{batch_id}", response_model=Batch, summary="One batch", responses=problems(404))
async def get_batch(request: Request, services: ServicesDep, batch_id: BatchId, wait: Wait = 0) -> Batch:
    return await _wait_for(request, services, batch_id, seconds=wait)


@router.post(
    "/v1/batches/{batch_id}/cancel",
    response_model=Batch,
    summary="Cancel a batch",
    description="A queued batch ends at once, a running one within seconds; one that has ended answers 409.",
    responses=problems(404, 409),
)
def cancel_batch(services: ServicesDep, batch_id: BatchId) -> Batch:
    return services.database.free(
        lambda session: _render(session, queue.request_cancel(session, batch_id, kind=JobKind.prediction))
    )


@router.delete(
    "/v1/batches/{batch_id}",
    response_model=Deleted,
    summary="Delete a batch that has ended, with its archive and its results",
    responses=problems(404, 409),
)
def delete_batch(services: ServicesDep, batch_id: BatchId) -> Deleted:
    with services.database.read() as session:
        found = _find(session, batch_id).id
    holdings.delete(
        services.database,
        services.storage,
        batches.folder_key(found),
        f"jobs/{found}",
        rows=lambda session: queue.delete(session, found, kind=JobKind.prediction),
    )
    return Deleted(id=found, object="batch")


@router.get(
    "/v1/batches/{batch_id}/results",
    response_class=Response,
    summary="What the model says of each picture, as a file",
    description="jsonl: a line for each file, as /predict answers it, with `path` in place of `filename`. csv: a table "
    "of `path`, `label`, `score` and `error`; a text that a spreadsheet would calculate has an apostrophe before it.",
    responses={
        200: {"content": {media_type: {"schema": {"type": "string"}} for media_type in _MEDIA_TYPES.values()}},
        **problems(404, 409),
    },
)
def get_results(
    services: ServicesDep, batch_id: BatchId, format: Annotated[Format, Query()] = "jsonl"
) -> StreamingResponse:
    with services.database.read() as session:
        row = _find(session, batch_id)
    if row.status != JobStatus.succeeded:
        raise _no_results(row)
    try:
        # Opened here, so that a batch that is deleted while it is read is read to its end.
        file = services.storage.path(f"{batches.results_key(row.id, row.fence)}/results.{format}").open("rb")
    except FileNotFoundError:
        raise NotFound("The batch was just deleted, or its results are missing; submit it again.") from None
    headers = {
        "Content-Length": str(file.seek(0, 2)),
        "Content-Disposition": f'attachment; filename="{row.id}.{format}"',
    }
    return StreamingResponse(_pieces(file), media_type=_MEDIA_TYPES[format], headers=headers)


def _use(services: Services, in_query: Mapping[str, Any]) -> ArchiveUse[int]:
    def options(upload: StagedUpload) -> dict[str, Any]:
        in_form = {name: text for name, text in upload.fields.items() if text}
        asked = parse_as(BatchOptions, {**in_query, **in_form})
        return {"model": asked.model or registry.DEFAULT_ALIAS, "top_k": asked.top_k or DEFAULT_TOP_K}

    def count_files(archive: FilePath, _options: Mapping[str, Any], tick: Tick) -> int:
        settings = services.settings
        files = take_inventory(
            archive,
            limits=ArchiveLimits.from_settings(settings),
            image_limits=ImageLimits.from_settings(settings),
            tick=tick,
        ).files
        if all(file.why_not is not None for file in files):
            raise ArchiveRefused("The archive holds no pictures that can be read.", code="no-pictures")
        return len(files)

    return ArchiveUse(
        text_fields=tuple(BatchOptions.model_fields),
        options=options,
        inspect=count_files,
        new_id=partial(new_id, "batch"),
        archive_key=batches.archive_key,
        create=partial(_create, services),
    )


def _create(
    services: Services, session: Session, batch_id: str, upload: StagedUpload, options: Mapping[str, Any], files: int
) -> dict[str, Any]:
    """Raises NotFound without such a model, Conflict for a backbone, and TooManyRequests beyond a quota."""
    model = registry.hold(session, registry.find(session, options["model"]).id)
    check_predicts(model)
    services.workspace.check_jobs(session)
    spec = BatchSpec(top_k=options["top_k"], files=files, size_bytes=upload.size_bytes, sha256=upload.sha256)
    with services.traffic.predicting(services.workspace, files):
        row = queue.submit(
            session,
            kind=JobKind.prediction,
            job_id=batch_id,
            dataset_id="",
            model_id=model.id,
            spec=spec.model_dump(mode="json"),
        )
    return _render(session, row).model_dump(mode="json")


async def _wait_for(request: Request, services: Services, batch_id: str, *, seconds: float) -> Batch:
    def read() -> Batch:
        with services.database.read() as session:
            return _render(session, _find(session, batch_id))

    return await wait_until(
        read, is_final=lambda batch: JobStatus(batch.status).is_final, seconds=seconds, request=request
    )


def _find(session: Session, batch_id: str) -> JobRow:
    return queue.find(session, batch_id, kind=JobKind.prediction)


def _render(session: Session, row: JobRow) -> Batch:
    return Batch.of(row, queue_position=queue.queue_position(session, row))


def _no_results(row: JobRow) -> Conflict:
    if JobStatus(row.status).is_final:
        return Conflict(f"The batch is {row.status} and has no results; submit it again.", code="batch-without-results")
    return Conflict(
        "The batch has not ended yet; `GET /v1/batches/{id}?wait=60` returns when it has.",
        code="batch-not-finished",
        retry_after_seconds=2,
    )


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        file.seek(0)
        while piece := file.read(_CHUNK_BYTES):
            yield piece
