"""/v1/fine_tuning/jobs: training jobs as OpenAI's clients know them. ftjob-<x> is job_<x>; there is no other truth."""

import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import registry
from app.api import datasets, idempotency, jobs
from app.api.deps import After, CallerDep, IdempotencyKey, ServicesDep, json_body
from app.api.files import find_file
from app.api.fine_tuning_bodies import (
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    FineTuningRequest,
    Translation,
    event_number_of,
    job_id_of,
    refused_multiplier,
    translate,
)
from app.api.openapi import json_request, problems
from app.api.schemas import Listing
from app.api.services import Services
from app.db.tables import JobRow
from app.errors import Conflict, FieldError, InvalidRequest
from app.jobs import events, queue
from app.jobs.request import JobRequest

# What a filter may ask for.
_METADATA_NAME = r'[^"\\]{1,64}'
# These clients submit right after the upload. They repeat a 409 with Retry-After twice by themselves.
WAIT_FOR_FILE_SECONDS = 60.0

router = APIRouter(tags=["openai"])

JobId = Annotated[str, Path(max_length=100)]


def _limit(default: int) -> Any:
    return Query(default, ge=1, le=200, description="Most entries in one page.")


@router.post(
    "/v1/fine_tuning/jobs",
    response_model=FineTuningJob,
    summary="Submit a training job",
    responses=problems(404, 408, 409, 413),
    openapi_extra=json_request(FineTuningRequest),
)
async def create_job(
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    asked: Annotated[FineTuningRequest, Depends(json_body(FineTuningRequest, max_bytes=jobs.MAX_JOB_BYTES))],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    key = idempotency.parse_key(idempotency_key)
    scope = f"{caller.key_id} {request.method} {request.url.path}"
    translation = translate(asked)
    dataset_id = await run_in_threadpool(_dataset_id, services, asked.training_file)
    await datasets.wait_for(request, services, dataset_id, seconds=WAIT_FOR_FILE_SECONDS)
    job, is_replay = await run_in_threadpool(_submit, services, translation, scope, key)
    headers = {"Idempotent-Replayed": "true"} if is_replay else {}
    return JSONResponse(job.model_dump(mode="json"), headers=headers)


@router.get(
    "/v1/fine_tuning/jobs",
    response_model=Listing[FineTuningJob],
    summary="List training jobs, newest first",
    responses=problems(404),
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "style": "deepObject",
                "explode": True,
                "description": "Only jobs whose metadata has these texts: metadata[color]=red.",
                "schema": {
                    "type": "object",
                    "propertyNames": {"pattern": f"^{_METADATA_NAME}$"},
                    "additionalProperties": {"type": "string"},
                },
            }
        ]
    },
)
def list_jobs(
    request: Request, services: ServicesDep, limit: int = _limit(20), after: After = None
) -> Listing[FineTuningJob]:
    metadata = _metadata_filter(request)
    with services.database.read() as session:
        after_id = _find(session, after).id if after else None
        rows = queue.list_jobs(session, limit=limit + 1, after=after_id, metadata=metadata)
    return Listing[FineTuningJob].of(rows, limit=limit, render=FineTuningJob.of, id_of=lambda job: job.id)


@router.get(
    "/v1/fine_tuning/jobs/{job_id}", response_model=FineTuningJob, summary="One training job", responses=problems(404)
)
def get_job(services: ServicesDep, job_id: JobId) -> FineTuningJob:
    with services.database.read() as session:
        return FineTuningJob.of(_find(session, job_id))


@router.post(
    "/v1/fine_tuning/jobs/{job_id}/cancel",
    response_model=FineTuningJob,
    summary="Cancel a training job",
    description="A queued job ends at once, a running one within seconds; one that has ended answers 409.",
    responses=problems(404, 409),
)
def cancel_job(services: ServicesDep, job_id: JobId) -> FineTuningJob:
    return services.database.free(lambda session: FineTuningJob.of(queue.request_cancel(session, job_id_of(job_id))))


@router.post(
    "/v1/fine_tuning/jobs/{job_id}/pause",
    response_model=FineTuningJob,
    summary="Refused: jobs are not paused",
    responses=problems(404, 409),
)
def pause_job(services: ServicesDep, job_id: JobId) -> FineTuningJob:
    with services.database.read() as session:
        our_id = _find(session, job_id).id
    raise Conflict(
        "Graft does not pause jobs: cancel it, or end it with its best epoch so far as the model: "
        f"POST /v1/jobs/{our_id}/stop. A job whose worker is stopped goes on from its checkpoint by itself.",
        code="not-pausable",
    )


@router.post(
    "/v1/fine_tuning/jobs/{job_id}/resume",
    response_model=FineTuningJob,
    summary="Refused: no job is ever paused",
    responses=problems(404, 409),
)
def resume_job(services: ServicesDep, job_id: JobId) -> FineTuningJob:
    with services.database.read() as session:
        status = _find(session, job_id).status
    raise Conflict(f"The job is {status} and not paused, so there is nothing to resume.", code="not-paused")


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/events",
    response_model=Listing[FineTuningEvent],
    summary="What happened to it, newest first",
    responses=problems(404),
)
def list_events(
    services: ServicesDep, job_id: JobId, limit: int = _limit(20), after: After = None
) -> Listing[FineTuningEvent]:
    before = event_number_of(after) if after else None
    with services.database.read() as session:
        rows = events.read_before(session, _find(session, job_id).id, before, limit + 1)
    return Listing[FineTuningEvent].of(rows, limit=limit, render=FineTuningEvent.of, id_of=lambda event: event.id)


@router.get(
    "/v1/fine_tuning/jobs/{job_id}/checkpoints",
    response_model=Listing[FineTuningCheckpoint],
    summary="The models it registered, newest first",
    responses=problems(404),
)
def list_checkpoints(
    services: ServicesDep, job_id: JobId, limit: int = _limit(10), after: After = None
) -> Listing[FineTuningCheckpoint]:
    with services.database.read() as session:
        rows = registry.list_of_job(session, _find(session, job_id).id)
    found = [FineTuningCheckpoint.of(row) for row in rows]
    if after:
        ids = [checkpoint.id for checkpoint in found]
        if after not in ids:
            raise InvalidRequest(
                "There is no checkpoint with the id given as `after`; start from the first page.",
                errors=[FieldError("#/after", "names no checkpoint of this job")],
            )
        found = found[ids.index(after) + 1 :]
    return Listing[FineTuningCheckpoint].of(
        found, limit=limit, render=lambda checkpoint: checkpoint, id_of=lambda checkpoint: checkpoint.id
    )


def _find(session: Session, job_id: str) -> JobRow:
    return queue.find(session, job_id_of(job_id))


def _dataset_id(services: Services, file_id: str) -> str:
    with services.database.read() as session:
        return find_file(session, file_id, pointer="#/training_file").id


def _submit(services: Services, translation: Translation, scope: str, key: str | None) -> tuple[FineTuningJob, bool]:
    with translation.refusals_in_their_words():
        request = _with_learning_rate(services, translation)
        answer, is_replay = jobs.submit_once(services, request, scope=scope, key=key)
    with services.database.read() as session:
        return FineTuningJob.of(queue.find(session, answer["id"])), is_replay


def _with_learning_rate(services: Services, translation: Translation) -> JobRequest:
    """The multiplier times the rate that the job would have without it."""
    if translation.learning_rate_multiplier is None:
        return translation.request
    with services.database.read() as session:
        spec = jobs.resolve(session, services, translation.request)
    if spec.candidates:
        raise refused_multiplier(translation, "is for one method; choose method.type other than supervised and auto")
    if spec.hyperparameters.is_solved:
        raise refused_multiplier(
            translation, f"has no meaning for {spec.method}, whose head is computed and not stepped towards"
        )
    rate = spec.hyperparameters.learning_rate * translation.learning_rate_multiplier
    try:
        return translation.with_learning_rate(rate)
    except InvalidRequest as error:
        detail = f"makes a learning rate of {rate:g}, which {error.errors[0].detail}"
        raise refused_multiplier(translation, detail) from None


def _metadata_filter(request: Request) -> dict[str, str]:
    wanted = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata["):
            continue
        key = name.removeprefix("metadata[").removesuffix("]")
        if not re.fullmatch(_METADATA_NAME, key):
            raise InvalidRequest(
                "A name in the filter has 1 to 64 characters, without quotation marks and backslashes.",
                errors=[FieldError("#/metadata", "has a name that is not one")],
            )
        wanted[key] = value
    return wanted
