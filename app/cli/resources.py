"""The client commands for what there is: jobs, datasets, models."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from app.cli import completion
from app.cli.labelled import LABELS_FILE, labelled_pictures
from app.cli.terminal import (
    ApiKey,
    AsJson,
    Failure,
    Limit,
    Url,
    check_place_for,
    connect,
    date,
    percent,
    print_found,
    print_json,
    print_line,
)
from app.cli.train import Unlabelled, describe_dataset, describe_model, upload
from app.cli.watching import model_of, watch
from graft_client import DEFAULT_URL, Dataset, Graft, Job, Model
from graft_client.answers import DatasetStatus, JobStatus
from graft_client.requests import Method

NO_JOBS = "There are no jobs; `graft train ARCHIVE_OR_FOLDER` makes one."

jobs = typer.Typer(help="Training jobs: list, show, watch, cancel, stop.", no_args_is_help=True)
datasets = typer.Typer(help="Data sets: list, show, upload, delete.", no_args_is_help=True)
models = typer.Typer(
    help="Trained models: list, show, card, export, extend, personalise, promote, rollback, delete.",
    no_args_is_help=True,
)

JobId = Annotated[str, typer.Argument(metavar="JOB", autocompletion=completion.jobs)]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET", autocompletion=completion.datasets)]
ModelId = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="An id, or an alias such as default.", autocompletion=completion.models),
]
JobStatusOption = Annotated[JobStatus | None, typer.Option("--status", help="Only of this status.", show_choices=True)]
DatasetStatusOption = Annotated[DatasetStatus | None, typer.Option("--status", help="Only of this status.")]
OfDataset = Annotated[
    str | None, typer.Option("--dataset", help="Only of this data set.", autocompletion=completion.datasets)
]
OfMethod = Annotated[Method | None, typer.Option("--method", help="Only of this method.")]


class ExportFormat(StrEnum):
    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"


def add_to(cli: typer.Typer) -> None:
    cli.add_typer(jobs, name="jobs")
    cli.add_typer(datasets, name="datasets")
    cli.add_typer(models, name="models")


@jobs.command("list")
def list_jobs(
    status: JobStatusOption = None,
    dataset: OfDataset = None,
    method: OfMethod = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List jobs, newest first."""
    with connect(url, api_key) as graft:
        found = graft.jobs.list(limit=limit, status=status, dataset=dataset, method=method)
    columns: dict[str, Callable[[Job], str]] = {
        "id": lambda job: job.id,
        "status": lambda job: job.status,
        "method": lambda job: job.method or "",
        "backbone": lambda job: job.backbone.name if job.backbone else "",
        "done": lambda job: percent((job.progress or {}).get("fraction")),
        "accuracy": lambda job: percent((job.metrics or {}).get("val_accuracy")),
        "created": lambda job: date(job.created_at),
    }
    print_found(found.data, columns, as_json=as_json, empty=NO_JOBS)


@jobs.command("show")
def show_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one job and its epochs, as JSON."""
    with connect(url, api_key) as graft:
        print_json(graft.jobs.get(job_id).raw | {"history": [epoch.raw for epoch in graft.jobs.history(job_id)]})


@jobs.command("watch")
def watch_job(
    job_id: Annotated[
        str | None,
        typer.Argument(metavar="JOB", help="The newest one if left out.", autocompletion=completion.jobs),
    ] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Follow a job until it has ended. Ctrl-C ends the watching, not the job."""
    with connect(url, api_key) as graft:
        job = watch(graft, job_id or _newest_job(graft))
        model = model_of(graft, job)
        if as_json:
            print_json({"job": job.raw, "model": model.raw})
        else:
            describe_model(graft, model)


@jobs.command("cancel")
def cancel_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a job; it makes no model."""
    with connect(url, api_key) as graft:
        job = graft.jobs.cancel(job_id)
    print_line(f"Job {job.id} is {'being cancelled' if job.status == 'running' else job.status}.")


@jobs.command("stop")
def stop_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a running job now and keep its best epoch as a model."""
    with connect(url, api_key) as graft:
        job = graft.jobs.stop(job_id)
    print_line(f"Job {job.id} ends after this step and registers its best epoch.")


@datasets.command("list")
def list_datasets(
    status: DatasetStatusOption = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List data sets, newest first."""
    with connect(url, api_key) as graft:
        found = graft.datasets.list(limit=limit, status=status)
    columns: dict[str, Callable[[Dataset], str]] = {
        "id": lambda dataset: dataset.id,
        "name": lambda dataset: dataset.name,
        "status": lambda dataset: dataset.status,
        "pictures": lambda dataset: str(dataset.num_images),
        "classes": lambda dataset: str(len(dataset.classes)),
        "created": lambda dataset: date(dataset.created_at),
    }
    empty = "There are no data sets; `graft datasets upload ARCHIVE` makes one."
    print_found(found.data, columns, as_json=as_json, empty=empty)


@datasets.command("show")
def show_dataset(dataset_id: DatasetId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one data set and what was found in it, as JSON."""
    with connect(url, api_key) as graft:
        print_json(graft.datasets.get(dataset_id).raw)


@datasets.command("upload")
def upload_dataset(
    source: Annotated[Path, typer.Argument(metavar="ARCHIVE_OR_FOLDER")],
    name: Annotated[str | None, typer.Option(help="Name of the data set; that of the file if left out.")] = None,
    unlabelled: Unlabelled = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Upload pictures and wait until they are checked."""
    with connect(url, api_key) as graft:
        dataset = upload(graft, source, name=name, unlabelled=unlabelled)
    if as_json:
        print_json(dataset.raw)
    else:
        describe_dataset(dataset)
        print_line(dataset.id)


@datasets.command("delete")
def delete_dataset(dataset_id: DatasetId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a data set; models trained on it stay."""
    with connect(url, api_key) as graft:
        graft.datasets.delete(dataset_id)
    print_line(f"Deleted {dataset_id}.")


@models.command("list")
def list_models(
    dataset: OfDataset = None,
    method: OfMethod = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List models, newest first."""
    with connect(url, api_key) as graft:
        found = graft.models.list(limit=limit, dataset=dataset, method=method)
    columns: dict[str, Callable[[Model], str]] = {
        "id": lambda model: model.id,
        "aliases": lambda model: " ".join(model.aliases),
        "method": lambda model: model.method,
        "backbone": lambda model: model.backbone.name,
        "classes": lambda model: str(len(model.classes)),
        "accuracy": lambda model: percent(model.metrics.get("val_accuracy")),
        "created": lambda model: date(model.created_at),
    }
    empty = "There are no models; `graft train ARCHIVE_OR_FOLDER` makes one."
    print_found(found.data, columns, as_json=as_json, empty=empty)


@models.command("show")
def show_model(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one model, as JSON."""
    with connect(url, api_key) as graft:
        print_json(graft.models.get(model_id).raw)


@models.command("promote")
def promote_model(
    model_id: ModelId,
    alias: Annotated[
        str,
        typer.Option(
            help="The alias to point at it; default is what /predict uses.", autocompletion=completion.aliases
        ),
    ] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Make a model the default, or point another alias at it."""
    with connect(url, api_key) as graft:
        graft.aliases.point(alias, model_id)
    print_line(f"{alias} is now {model_id}.")


@models.command("rollback")
def roll_back_model(
    alias: Annotated[
        str,
        typer.Option(help="The alias to move back; default is what /predict uses.", autocompletion=completion.aliases),
    ] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Make the model from before the default again; a second time undoes it."""
    with connect(url, api_key) as graft:
        model_id = graft.aliases.roll_back(alias).model
    print_line(f"{alias} is {model_id} again.")


@models.command("extend")
def extend_model(
    model_id: ModelId,
    name: Annotated[str, typer.Argument(help="Of the new class.")],
    pictures: Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="Of the new class, one or more.")],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Give a few-shot model one class more, as a new model."""
    with connect(url, api_key) as graft:
        model = graft.models.add_class(model_id, name, pictures)
        if as_json:
            print_json(model.raw)
        else:
            describe_model(graft, model)


@models.command("personalise")
def personalise_model(
    model_id: ModelId,
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            help=f"With a folder of pictures per class, or pictures and a {LABELS_FILE}: filename,label, or, where the "
            "model tells several things, filename,label:<task>,…",
        ),
    ],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Let a copy of a model learn a few pictures of your own, as a new model."""
    pictures = labelled_pictures(folder)
    with connect(url, api_key) as graft:
        model = graft.models.personalise(model_id, pictures)
        if as_json:
            print_json(model.raw)
            return
        describe_model(graft, model)
    mine = model.metrics["personal"]
    held_out = mine["accuracy_left_out"]
    print_line(
        f"  Of your {mine['images']} pictures it was right about {mine['accuracy_before']:.0%}, and is about "
        f"{mine['accuracy']:.0%}" + ("." if held_out is None else f"; about {held_out:.0%} of those left out in turn.")
    )


@models.command("export")
def export_model(
    model_id: ModelId,
    file_format: Annotated[ExportFormat, typer.Option("--format", help="What the file is for.")] = ExportFormat.onnx,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to; MODEL.FORMAT in this folder if left out.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Write a model to a file that runs outside Graft."""
    target = output or Path(f"{model_id}.{file_format.value}")
    check_place_for(target)
    with connect(url, api_key) as graft:
        found = graft.models.export(model_id, target, format=file_format.value).verification
    print_line(
        f"Wrote {target}: on {found['pictures']} {found['source']} its scores differ from the model's by "
        f"{found['largest_difference']:.1g} at most."
    )


@models.command("card")
def show_card(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print a model's card: data, training, figures and limits, in Markdown."""
    with connect(url, api_key) as graft:
        print_line(graft.models.card(model_id).rstrip())


@models.command("delete")
def delete_model(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a model that no alias points at."""
    with connect(url, api_key) as graft:
        graft.models.delete(model_id)
    print_line(f"Deleted {model_id}.")


def _newest_job(graft: Graft) -> str:
    for job in graft.jobs.list(limit=1):
        return job.id
    raise Failure(NO_JOBS)
