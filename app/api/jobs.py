"""/v1/jobs: submit, watch, cancel and stop training jobs."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import holdings, registry
from app.api import event_stream, idempotency, training
from app.api.deps import NUMBERED_ID, After, CallerDep, IdempotencyKey, Limit, ServicesDep, Wait, json_body, wait_until
from app.api.event_stream import Look
from app.api.idempotency import Claim
from app.api.openapi import json_request, problems
from app.api.schemas import Deleted, DryRun, Epoch, Event, History, Job, Listing
from app.api.services import Services
from app.datasets import catalog
from app.db.tables import DatasetRow, JobRow
from app.errors import Conflict, InvalidRequest
from app.jobs import events, queue
from app.jobs.request import JobRequest, parse_request
from app.jobs.spec import TrainingSpec
from app.jobs.states import JobKind, JobStatus

router = APIRouter(tags=["jobs"])

# Room for 10,000 paths of 100 bytes in `exclude`.
MAX_JOB_BYTES = 1024 * 1024
JobId = Annotated[str, Path(max_length=100)]
_position_schema = {"pattern": f"^{NUMBERED_ID}$"}
EventPosition = Annotated[
    str | None,
    Query(description="Id of the last event seen; only later ones are answered.", json_schema_extra=_position_schema),
]
LastEventId = Annotated[
    str | None, Header(description="As `after`, sent by a stream's client.", json_schema_extra=_position_schema)
]


@router.post(
    "/v1/jobs",
    status_code=201,
    response_model=Job,
    summary="Submit a training job",
    responses={
        200: {"model": DryRun, "description": "With dry_run=true: what the job would be. Nothing is queued."},
        **problems(404, 408, 409, 413),
    },
    openapi_extra=json_request(JobRequest),
)
async def submit_job(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    job: Annotated[JobRequest, Depends(json_body(parse_request, max_bytes=MAX_JOB_BYTES))],
    dry_run: Annotated[bool, Query(description="Resolve and estimate only.")] = False,
    wait: Wait = 0,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    key = idempotency.parse_key(idempotency_key)
    if dry_run:
        return JSONResponse((await run_in_threadpool(estimated, services, job)).model_dump(mode="json"))
    scope = f"{caller.key_id} {request.method} {request.url.path}"
    answer, is_replay = await run_in_threadpool(submit_once, services, job, scope=scope, key=key)
    if wait:
        answer = (await _wait_for(request, services, answer["id"], seconds=wait)).model_dump(mode="json")
    headers = {"Location": f"/v1/jobs/{answer['id']}"} | ({"Idempotent-Replayed": "true"} if is_replay else {})
    return JSONResponse(dict(answer), status_code=201, headers=headers)


@router.get(
    "/v1/jobs", response_model=Listing[Job], summary="List training jobs, newest first", responses=problems(404)
)
def list_jobs(
    services: ServicesDep,
    limit: Limit = 50,
    after: After = None,
    status: JobStatus | None = None,
    dataset: Annotated[str | None, Query(max_length=100)] = None,
    method: Annotated[str | None, Query(max_length=100)] = None,
) -> Listing[Job]:
    with services.database.read() as session:
        if after:
            queue.find(session, after)
        rows = queue.list_jobs(
            session, limit=limit + 1, after=after or None, status=status, dataset=dataset, method=method
        )
        positions = queue.queue_positions(session, rows)
        return Listing[Job].of(
            rows,
            limit=limit,
            render=lambda row: Job.of(row, queue_position=positions.get(row.id)),
            id_of=lambda job: job.id,
        )


@router.get("/v1/jobs/{job_id}", response_model=Job, summary="One job", responses=problems(404))
async def get_job(request: Request, services: ServicesDep, job_id: JobId, wait: Wait = 0) -> Job:
    return await _wait_for(request, services, job_id, seconds=wait)


@router.post(
    "/v1/jobs/{job_id}/cancel",
    response_model=Job,
    summary="Cancel a job",
    description="A queued job ends at once, a running one within seconds; one that has ended answers 409.",
    responses=problems(404, 409),
)
def cancel_job(services: ServicesDep, job_id: JobId) -> Job:
    return services.database.free(lambda session: _render(session, queue.request_cancel(session, job_id)))


@router.post(
    "/v1/jobs/{job_id}/stop",
    response_model=Job,
    summary="End a running job now, with its best epoch so far as the model",
    responses=problems(404, 409),
)
def stop_job(services: ServicesDep, job_id: JobId) -> Job:
    return services.database.free(lambda session: _render(session, queue.request_stop(session, job_id)))


@router.delete(
    "/v1/jobs/{job_id}",
    response_model=Deleted,
    summary="Delete a job that has ended; its model stays",
    responses=problems(404, 409),
)
def delete_job(services: ServicesDep, job_id: JobId) -> Deleted:
    with services.database.read() as session:
        found = queue.find(session, job_id).id
    holdings.delete(
        services.database, services.storage, f"jobs/{found}", rows=lambda session: queue.delete(session, found)
    )
    return Deleted(id=found, object="job")


@router.get("/v1/jobs/{job_id}/history", response_model=History, summary="Its epochs", responses=problems(404))
def job_history(services: ServicesDep, job_id: JobId) -> History:
    with services.database.read() as session:
        job = queue.find(session, job_id)
        return History(data=[Epoch.of(row) for row in queue.history(session, job.id)])


@router.get(
    "/v1/jobs/{job_id}/events",
    response_model=Listing[Event],
    summary="What happened to it, oldest first; as a live stream with Accept: text/event-stream",
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        204: {"description": "A stream that was read to its end is asked for again."},
        **problems(404),
    },
)
async def job_events(
    request: Request,
    services: ServicesDep,
    job_id: JobId,
    limit: Limit = 50,
    after: EventPosition = None,
    last_event_id: LastEventId = None,
    accept: Annotated[str, Header()] = "*/*",
) -> Response:
    asked, seen = _position(after), _position(last_event_id)
    if "text/event-stream" not in accept.lower():
        listing = await run_in_threadpool(_list_events, services, job_id, asked, limit)
        return JSONResponse(listing.model_dump(mode="json"))
    # The header is where the client really is; the query may be left from its first connect.
    position = seen if last_event_id else asked
    first = await run_in_threadpool(_look, services, job_id, position)
    if position and first.final_status is not None and not first.events:
        return Response(status_code=204)
    return event_stream.stream(
        first,
        lambda last_id: _look(services, job_id, last_id),
        after=position,
        is_stopping=services.stopping.is_set,
    )


async def _wait_for(request: Request, services: Services, job_id: str, *, seconds: float) -> Job:
    def read() -> Job:
        return read_job(services, job_id)

    return await wait_until(read, is_final=lambda job: JobStatus(job.status).is_final, seconds=seconds, request=request)


def read_job(services: Services, job_id: str) -> Job:
    """Raises NotFound."""
    with services.database.read() as session:
        return _render(session, queue.find(session, job_id))


def _render(session: Session, row: JobRow) -> Job:
    return Job.of(row, queue_position=queue.queue_position(session, row))


def submit_once(
    services: Services, request: JobRequest, *, scope: str, key: str | None
) -> tuple[Mapping[str, Any], bool]:
    """The job that was queued, and whether it was answered before under the same Idempotency-Key.

    scope: what keys are unique within: API key, method and path.
    """
    print_of_request = idempotency.fingerprint(_meant(request))
    claim = None if key is None else idempotency.begin(services.database, services.clock, scope=scope, key=key)
    if claim is not None and claim.answered is not None:
        idempotency.check_same(claim, print_of_request)
        return claim.answered, True
    try:
        return _queue(services, request, claim, print_of_request), False
    except BaseException:
        if claim is not None:
            idempotency.release(services.database, claim)
        raise


def _meant(request: JobRequest) -> dict[str, Any]:
    """The request with its defaults: the same for all that ask for the same."""
    meant, asked = request.model_dump(mode="json"), request.hyperparameters
    if "early_stopping_patience" in asked.model_fields_set and asked.early_stopping_patience is None:
        # Given, null is never; left out, it is the recipe's.
        meant["hyperparameters"]["early_stopping_patience"] = "never"
    return meant


def resolve(session: Session, services: Services, request: JobRequest) -> TrainingSpec:
    """What the request resolves to on this server. Raises NotFound or Conflict for its data set, and what
    `training.resolve` does."""
    return _resolve(session, services, request, _ready_dataset(session, request.dataset))


def estimated(services: Services, request: JobRequest) -> DryRun:
    """What the job would be, and take. Raises as `resolve` does."""
    with services.database.read() as session:
        dataset = _ready_dataset(session, request.dataset)
        spec = _resolve(session, services, request, dataset)
        estimate = training.estimate(
            session, spec, dataset=dataset, settings=services.settings, storage=services.storage
        )
    return DryRun(
        seconds=estimate.seconds,
        seconds_range=estimate.seconds_range,
        peak_memory_bytes=estimate.peak_memory_bytes,
        spec=spec.model_dump(mode="json"),
        estimate=estimate,
    )


def _resolve(session: Session, services: Services, request: JobRequest, dataset: DatasetRow) -> TrainingSpec:
    return training.resolve(
        session,
        request,
        dataset=dataset,
        settings=services.settings,
        storage=services.storage,
        weights=services.weights,
    )


def _queue(services: Services, request: JobRequest, claim: Claim | None, print_of_request: str) -> Mapping[str, Any]:
    # Resolving may look for weight files, so it is done before the transaction that holds the write lock.
    with services.database.read() as session:
        spec = resolve(session, services, request)
    with services.database.write() as session:
        # Either may have been deleted meanwhile, and is not from here on.
        _check_ready(catalog.hold(session, request.dataset))
        if spec.backbone.model is not None:
            registry.hold(session, spec.backbone.model)
        services.workspace.check_jobs(session)
        services.workspace.check_room(session, 1)  # where nothing more may be kept, no model should be trained
        row = _submit_spec(session, spec, name=request.name)
        answer = _render(session, row).model_dump(mode="json")
        if claim is not None:
            idempotency.finish(session, claim, fingerprint=print_of_request, resource_id=row.id, response=answer)
    return answer


def _submit_spec(session: Session, spec: TrainingSpec, *, name: str | None) -> JobRow:
    return queue.submit(
        session,
        kind=JobKind.training,
        dataset_id=spec.dataset,
        spec=spec.model_dump(mode="json"),
        name=name,
        method=spec.method,
        backbone=spec.backbone.model_dump(mode="json"),
    )


def _ready_dataset(session: Session, dataset_id: str) -> DatasetRow:
    row = catalog.find(session, dataset_id)
    _check_ready(row)
    return row


def _check_ready(row: DatasetRow) -> None:
    if row.status == "processing":
        raise Conflict(
            "The data set is still being processed; `GET /v1/datasets/{id}?wait=60` returns when it is ready.",
            code="dataset-processing",
            retry_after_seconds=2,
        )
    if row.status == "failed":
        raise Conflict(
            "The data set could not be processed, its `error` says why; upload it again, corrected.",
            code="dataset-failed",
        )


def _list_events(services: Services, job_id: str, position: int, limit: int) -> Listing[Event]:
    with services.database.read() as session:
        job = queue.find(session, job_id)
        rows = events.read_after(session, job.id, position, limit + 1)
        return Listing[Event].of(rows, limit=limit, render=Event.of, id_of=lambda event: event.id)


def _look(services: Services, job_id: str, position: int) -> Look:
    # Status and events from one state of the database: a final status means that its event is among these.
    with services.database.read() as session:
        job = queue.find(session, job_id)
        rows = events.read_after(session, job.id, position, event_stream.BATCH_SIZE)
        is_over = JobStatus(job.status).is_final and len(rows) < event_stream.BATCH_SIZE
        return Look([Event.of(row) for row in rows], job.status if is_over else None)


def _position(event_id: str | None) -> int:
    if not re.fullmatch(NUMBERED_ID, event_id or ""):
        raise InvalidRequest("Event ids are whole numbers; give the last one that was seen, or none.")
    return int(event_id or 0)
