"""/jobs: start one, watch it, end it, and hold several side by side."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app.api import datasets, jobs, models
from app.api.deps import After, CallerDep, ServicesDep
from app.api.problems import Problem
from app.api.schemas import Epoch, Event, Job
from app.api.services import Services
from app.errors import GraftError, InvalidRequest
from app.jobs import events, queue
from app.jobs.states import JobStatus
from app.web import curves
from app.web.datasets import dataset_if_there, dataset_names
from app.web.job_form import JobForm
from app.web.site import PageId, go_to, page, read_form

PAGE_SIZE = 50
EVENTS_READ = 500
LOG_SHOWN = 200
# Of a long job; the curves have all of them, and so has the API.
EPOCHS_LISTED = 100
MOST_COMPARED = 6
# Of a job that is watched, to people who do not see the page change.
SAID = {
    JobStatus.queued: "The job waits in the queue",
    JobStatus.running: "The job runs",
    JobStatus.succeeded: "The job has succeeded",
    JobStatus.failed: "The job has failed",
    JobStatus.cancelled: "The job was cancelled",
}

router = APIRouter(prefix="/jobs", include_in_schema=False)


@router.get("")
def list_page(
    request: Request,
    services: ServicesDep,
    after: After = None,
    status: JobStatus | Literal[""] | None = None,
    dataset: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    found = jobs.list_jobs(services, limit=PAGE_SIZE, after=after, status=status or None, dataset=dataset or None)
    template = "job_rows.html" if after else "jobs.html"
    return page(
        request,
        template,
        listing=found,
        names=dataset_names(services, [job.dataset for job in found.data]),
        status=status or "",
        dataset=dataset or "",
        statuses=[each.value for each in JobStatus],
    )


@router.post("")
async def submit(request: Request, services: ServicesDep, caller: CallerDep) -> Response:
    form = JobForm.of(await read_form(request))
    try:
        job = form.request()
        scope = f"{caller.key_id} POST /jobs"
        answer, _ = await run_in_threadpool(jobs.submit_once, services, job, scope=scope, key=None)
    except GraftError as error:
        return await run_in_threadpool(_form_page, request, services, form, error)
    return go_to(request, f"/jobs/{answer['id']}")


@router.get("/new")
def new_page(
    request: Request,
    services: ServicesDep,
    dataset: Annotated[str, Query(max_length=100)] = "",
    backbone: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    return _form_page(request, services, JobForm.of([("dataset", dataset), ("backbone", backbone)]))


@router.post("/new")
async def new_page_with(request: Request, services: ServicesDep) -> Response:
    """The same, filled in: with the pictures to leave out, for one."""
    form = JobForm.of(await read_form(request))
    return await run_in_threadpool(_form_page, request, services, form)


@router.post("/estimate")
async def estimate_fragment(request: Request, services: ServicesDep) -> Response:
    """What the form's job would be and take, or what is wrong with it."""
    form = JobForm.of(await read_form(request))
    try:
        found = await run_in_threadpool(jobs.estimated, services, form.request())
    except GraftError as error:
        return page(request, "job_estimate.html", found=None, problem=Problem.of(error))
    return page(request, "job_estimate.html", found=found, problem=None)


@router.get("/compare")
def compare_page(request: Request, services: ServicesDep, job: Annotated[list[str] | None, Query()] = None) -> Response:
    ticked = list(dict.fromkeys(job or []))
    if len(ticked) > MOST_COMPARED:
        raise InvalidRequest(
            f"{len(ticked)} jobs are too many to be held side by side: go back and tick {MOST_COMPARED} at most.",
            title="Too many jobs",
        )
    each_job = [jobs.read_job(services, job_id) for job_id in ticked]
    runs = [(found, jobs.job_history(services, found.id).data) for found in each_job]
    return page(
        request,
        "jobs_compare.html",
        runs=runs,
        charts_of_runs=curves.compared(runs),
        names=dataset_names(services, [found.dataset for found, _ in runs]),
        differing=curves.differing_values([found for found, _ in runs]),
        most=MOST_COMPARED,
    )


@router.get("/{job_id}")
def job_page(request: Request, services: ServicesDep, job_id: PageId) -> Response:
    return page(request, "job.html", **_watched(services, job_id))


@router.get("/{job_id}/live")
def live_fragment(request: Request, services: ServicesDep, job_id: PageId) -> Response:
    """What changes while it runs; asked for again after each event."""
    return page(request, "job_now.html", **_watched(services, job_id))


@router.post("/{job_id}/cancel")
def cancel(request: Request, services: ServicesDep, job_id: PageId) -> Response:
    jobs.cancel_job(services, job_id)
    return go_to(request, f"/jobs/{job_id}")


@router.post("/{job_id}/stop")
def stop(request: Request, services: ServicesDep, job_id: PageId) -> Response:
    jobs.stop_job(services, job_id)
    return go_to(request, f"/jobs/{job_id}")


@router.post("/{job_id}/delete")
def delete(request: Request, services: ServicesDep, job_id: PageId) -> Response:
    jobs.delete_job(services, job_id)
    return go_to(request, "/jobs")


def _form_page(request: Request, services: Services, form: JobForm, error: GraftError | None = None) -> Response:
    ready = datasets.list_datasets(services, limit=200, status="ready").data
    chosen = form.one("dataset")
    if chosen and chosen not in {each.id for each in ready}:
        ready.insert(0, datasets.read_dataset(services, chosen))
    problem = Problem.of(error) if error else None
    response = page(
        request,
        "job_new.html",
        status_code=problem.status if problem else 200,
        form=form,
        datasets=ready,
        backbones=models.list_backbones(services).data,
        errors=form.errors(error),
        problem=problem,
    )
    response.headers.update(problem.response_headers(path=request.url.path) if problem else {})
    return response


def _watched(services: Services, job_id: str) -> dict[str, Any]:
    # All from one state of the database: with a status of before and events of after, the end would be missed.
    with services.database.read() as session:
        row = queue.find(session, job_id)
        job = Job.of(row, queue_position=queue.queue_position(session, row))
        happened = [Event.of(each) for each in events.read_before(session, job_id, None, EVENTS_READ)][::-1]
        epochs = [Epoch.of(each) for each in queue.history(session, job_id)]
    return {
        "job": job,
        "said": SAID,
        "dataset": dataset_if_there(services, job.dataset),
        "epochs": epochs[-EPOCHS_LISTED:],
        "epochs_left_out": max(0, len(epochs) - EPOCHS_LISTED),
        "charts_of_job": curves.of_job(epochs, happened),
        "log": [event for event in happened if event.event in ("log", "status")][-LOG_SHOWN:],
        "last_event_id": happened[-1].id if happened else "0",
        "is_over": JobStatus(job.status).is_final,
    }
