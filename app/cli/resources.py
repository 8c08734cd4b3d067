"""The client commands beside `train`: predict, jobs, datasets, models."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from app.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Failure,
    Limit,
    Url,
    connect,
    percent,
    print_found,
    print_json,
    print_line,
    print_table,
)
from app.cli.train import Unlabelled, describe_dataset, describe_model, model_of, upload, watch
from app.client import DEFAULT_URL, JsonObject

jobs = typer.Typer(help="Training jobs: list, show, watch, cancel, stop.", no_args_is_help=True)
datasets = typer.Typer(help="Data sets: list, show, upload, delete.", no_args_is_help=True)
models = typer.Typer(
    help="Trained models: list, show, card, export, extend, promote, rollback, delete.", no_args_is_help=True
)

JobId = Annotated[str, typer.Argument(metavar="JOB")]
DatasetId = Annotated[str, typer.Argument(metavar="DATASET")]
ModelId = Annotated[str, typer.Argument(metavar="MODEL", help="A model's id, or an alias such as default.")]


class ExportFormat(StrEnum):
    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"


def add_to(cli: typer.Typer) -> None:
    cli.command()(predict)
    cli.add_typer(jobs, name="jobs")
    cli.add_typer(datasets, name="datasets")
    cli.add_typer(models, name="models")


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE…")],
    model: Annotated[str | None, typer.Option(help="Model id or alias; the default model if left out.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 3,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Classify pictures."""
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise Failure(f"There is no file {', '.join(missing)}.", exit_code=EXIT_USAGE)
    with connect(url, api_key) as client:
        answer = client.predict(images, model=model, top_k=top_k)
    if as_json:
        print_json(answer)
    else:
        # In the order of the pictures, and named as they were given: two folders may hold the same name.
        rows = [_prediction_row(path, found) for path, found in zip(images, answer["predictions"], strict=True)]
        print_table(["picture", "label", "score", "next"], rows, empty="")
    if any("error" in found for found in answer["predictions"]):
        raise typer.Exit(EXIT_FAILED)


@jobs.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only jobs on this data set.")] = None,
    method: Annotated[str | None, typer.Option(help="Only jobs of this method.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List jobs, newest first."""
    with connect(url, api_key) as client:
        found = client.list("jobs", limit=limit, status=status, dataset=dataset, method=method)
    columns: dict[str, Callable[[JsonObject], str]] = {
        "id": lambda job: job["id"],
        "status": lambda job: job["status"],
        "method": lambda job: job["method"],
        "backbone": lambda job: job["backbone"]["name"],
        "done": lambda job: percent((job["progress"] or {}).get("fraction")),
        "accuracy": lambda job: percent((job["metrics"] or {}).get("val_accuracy")),
        "created": lambda job: job["created_at"],
    }
    print_found(found, columns, as_json=as_json, empty="There are no jobs.")


@jobs.command("show")
def show_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one job and its epochs, as JSON."""
    with connect(url, api_key) as client:
        print_json(client.job(job_id) | {"history": client.job_history(job_id)})


@jobs.command("watch")
def watch_job(job_id: JobId, as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Follow a job until it has ended. Ctrl-C ends the watching, not the job."""
    with connect(url, api_key) as client:
        job = watch(client, job_id)
        model = model_of(client, job)
        if as_json:
            print_json({"job": job, "model": model})
        else:
            describe_model(client, model)


@jobs.command("cancel")
def cancel_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a job; it makes no model."""
    with connect(url, api_key) as client:
        job = client.cancel_job(job_id)
    print_line(f"Job {job['id']} is {'being cancelled' if job['status'] == 'running' else job['status']}.")


@jobs.command("stop")
def stop_job(job_id: JobId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a running job now and keep its best epoch as a model."""
    with connect(url, api_key) as client:
        job = client.stop_job(job_id)
    print_line(f"Job {job['id']} ends after this step and registers its best epoch.")


@datasets.command("list")
def list_datasets(
    status: Annotated[str | None, typer.Option(help="processing, ready or failed.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List data sets, newest first."""
    with connect(url, api_key) as client:
        found = client.list("datasets", limit=limit, status=status)
    columns: dict[str, Callable[[JsonObject], str]] = {
        "id": lambda dataset: dataset["id"],
        "name": lambda dataset: dataset["name"],
        "status": lambda dataset: dataset["status"],
        "pictures": lambda dataset: str(dataset["num_images"]),
        "classes": lambda dataset: str(len(dataset["classes"])),
        "created": lambda dataset: dataset["created_at"],
    }
    empty = "There are no data sets; `graft datasets upload ARCHIVE` makes one."
    print_found(found, columns, as_json=as_json, empty=empty)


@datasets.command("show")
def show_dataset(dataset_id: DatasetId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one data set and what was found in it, as JSON."""
    with connect(url, api_key) as client:
        print_json(client.dataset(dataset_id))


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
    with connect(url, api_key) as client:
        dataset = upload(client, source, name=name, unlabelled=unlabelled)
    if as_json:
        print_json(dataset)
    else:
        describe_dataset(dataset)
        print_line(dataset["id"])


@datasets.command("delete")
def delete_dataset(dataset_id: DatasetId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a data set; models trained on it stay."""
    with connect(url, api_key) as client:
        client.delete_dataset(dataset_id)
    print_line(f"Deleted {dataset_id}.")


@models.command("list")
def list_models(
    dataset: Annotated[str | None, typer.Option(help="Only models trained on this data set.")] = None,
    method: Annotated[str | None, typer.Option(help="Only models of this method.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List models, newest first."""
    with connect(url, api_key) as client:
        found = client.list("models", limit=limit, dataset=dataset, method=method)
    columns: dict[str, Callable[[JsonObject], str]] = {
        "id": lambda model: model["id"],
        "aliases": lambda model: " ".join(model["aliases"]),
        "method": lambda model: model["method"],
        "backbone": lambda model: model["backbone"]["name"],
        "classes": lambda model: str(len(model["classes"])),
        "accuracy": lambda model: percent(model["metrics"].get("val_accuracy")),
        "created": lambda model: model["created_at"],
    }
    empty = "There are no models; `graft train ARCHIVE_OR_FOLDER` makes one."
    print_found(found, columns, as_json=as_json, empty=empty)


@models.command("show")
def show_model(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print one model, as JSON."""
    with connect(url, api_key) as client:
        print_json(client.model(model_id))


@models.command("promote")
def promote_model(
    model_id: ModelId,
    alias: Annotated[str, typer.Option(help="The alias to point at it; default is what /predict uses.")] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Make a model the default, or point another alias at it."""
    with connect(url, api_key) as client:
        client.point_alias(alias, model_id)
    print_line(f"{alias} is now {model_id}.")


@models.command("rollback")
def roll_back_model(
    alias: Annotated[str, typer.Option(help="The alias to move back; default is what /predict uses.")] = "default",
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Make the model from before the default again; a second time undoes it."""
    with connect(url, api_key) as client:
        model_id = client.roll_back_alias(alias)["model"]
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
    with connect(url, api_key) as client:
        model = client.add_class(model_id, name, pictures)
        if as_json:
            print_json(model)
        else:
            describe_model(client, model)


@models.command("personalise")
def personalise_model(
    model_id: ModelId,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="With a folder of pictures per class.")],
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Let a copy of a model learn a few pictures of your own, as a new model."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise typer.BadParameter("it has no folders with pictures in them", param_hint="folder")
    with connect(url, api_key) as client:
        model = client.personalise(model_id, [(path.parent.name, path) for path in files])
        if as_json:
            print_json(model)
            return
        describe_model(client, model)
    mine = model["metrics"]["personal"]
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
    with connect(url, api_key) as client:
        found = client.export_model(model_id, target, file_format=file_format.value)
    print_line(
        f"Wrote {target}: on {found['pictures']} {found['source']} its scores differ from the model's by "
        f"{found['largest_difference']:.1g} at most."
    )


@models.command("card")
def show_card(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Print a model's card: data, training, figures and limits, in Markdown."""
    with connect(url, api_key) as client:
        print_line(client.model_card(model_id).rstrip())


@models.command("delete")
def delete_model(model_id: ModelId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a model that no alias points at."""
    with connect(url, api_key) as client:
        client.delete_model(model_id)
    print_line(f"Deleted {model_id}.")


def _prediction_row(path: Path, found: JsonObject) -> list[str]:
    if "error" in found:
        return [str(path), "–", "", found["error"]["detail"]]
    rest = ", ".join(f"{other['label']} {percent(other['score'])}" for other in found["top"][1:])
    if found.get("in_distribution") is False:
        rest = f"{rest} (unlike what it was trained on)"
    return [str(path), found["label"], percent(found["score"]), rest]
