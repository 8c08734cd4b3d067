"""`graft train`, and watching a job: from a folder or an archive to a model, with progress bars."""

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from app.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Failure,
    Url,
    connect,
    errors,
    percent,
    print_json,
    print_line,
)
from app.client import DEFAULT_URL, GraftClient, JobEvent, JsonObject

Unlabelled = Annotated[
    bool, typer.Option("--unlabelled", help="The pictures have no classes, whatever folders they lie in.")
]


def add_to(cli: typer.Typer) -> None:
    cli.command()(train)


def train(
    source: Annotated[
        str,
        typer.Argument(
            metavar="ARCHIVE_OR_FOLDER",
            help="A zip, tar or tar.gz of class folders, such a folder itself, or the id of a data set (ds_…).",
        ),
    ],
    method: Annotated[
        str,
        typer.Option(
            help="few_shot, feature_extraction, fine_tuning, full_fine_tuning, from_scratch, self_supervised or auto."
        ),
    ] = "auto",
    backbone: Annotated[str, typer.Option(help="A backbone, a model to start from (mdl_…), or auto.")] = "auto",
    recipe: Annotated[str | None, typer.Option(help="classic or modern.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    hyperparameter: Annotated[
        list[str] | None,
        typer.Option("--hyperparameter", "-H", metavar="NAME=VALUE", help="Any other; may be given several times."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Path within the archive of a picture to leave out; may be given several times."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same data: same model.")] = 0,
    promote: Annotated[str, typer.Option(help="if_better, always or never becomes the default model.")] = "if_better",
    name: Annotated[str | None, typer.Option(help="Name of the data set; that of the file if left out.")] = None,
    unlabelled: Unlabelled = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Upload pictures, train on them, and end with a served model."""
    request: JsonObject = {"method": method, "backbone": backbone, "seed": seed, "promote": promote}
    if recipe is not None:
        request["recipe"] = recipe
    if exclude:
        request["exclude"] = exclude
    named = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    request["hyperparameters"] = {key: value for key, value in named.items() if value is not None}
    request["hyperparameters"] |= dict(_name_and_value(text) for text in hyperparameter or [])
    with connect(url, api_key) as client:
        dataset = (
            client.wait_for_dataset(source)
            if source.startswith("ds_")
            else upload(client, Path(source), name=name, unlabelled=unlabelled)
        )
        describe_dataset(dataset)
        job = client.submit_job(request | {"dataset": dataset["id"]})
        job = watch(client, job["id"])
        model = model_of(client, job)
        if as_json:
            print_json({"dataset": dataset, "job": job, "model": model})
        else:
            describe_model(client, model)


def upload(client: GraftClient, source: Path, *, name: str | None, unlabelled: bool = False) -> JsonObject:
    """Uploads an archive or a folder and waits until its pictures are checked. Raises Failure if they are refused."""
    kind = "unlabelled" if unlabelled else "labelled"
    with sending(source) as (archive, on_sent):
        dataset = client.upload_dataset(archive, name=name or _stem(source), kind=kind, on_sent=on_sent)
    with errors.status("The server checks the pictures …"):
        dataset = client.wait_for_dataset(dataset["id"])
    if dataset["status"] == "failed":
        raise Failure(f"Data set {dataset['id']} failed: {detail_of(dataset['error'])}")
    return dataset


def watch(client: GraftClient, job_id: str) -> JsonObject:
    """Shows a job's events until it has ended, and returns it. Ctrl-C ends the watching, not the job."""
    errors.print(f"Job {job_id}")
    try:
        with progress_bar(MofNCompleteColumn(), TaskProgressColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("queued", total=None)
            for event in client.follow_job(job_id):
                _show(event, bar, task)
    except KeyboardInterrupt:
        raise Failure(
            f"The job goes on. `graft jobs watch {job_id}` follows it, `graft jobs cancel {job_id}` ends it.",
            exit_code=EXIT_INTERRUPTED,
        ) from None
    return client.job(job_id)


def model_of(client: GraftClient, job: JsonObject) -> JsonObject:
    """The model that a job has made. Raises Failure, with the reason, for a job that made none."""
    if job["status"] == "succeeded":
        return client.model(job["model"])
    if job["status"] == "failed":
        raise Failure(f"Job {job['id']} failed: {detail_of(job['error'])}")
    raise Failure(f"Job {job['id']} is {job['status']}.")


def describe_dataset(dataset: JsonObject) -> None:
    splits = dataset["splits"]
    if dataset["classes"]:
        of = f"of {len(dataset['classes'])} classes, {splits['train']} to train on, {splits['val']} to validate with"
    else:
        of = "without labels"
    errors.print(
        f"Data set {dataset['id']}: {dataset['num_images']} pictures {of}"
        + (f", {splits['test']} for testing" if splits.get("test") else "")
        + (f"; rejected files: {dataset['num_rejected']}" if dataset["num_rejected"] else "")
        + "."
    )
    for warning in dataset["warnings"]:
        errors.print(f"Warning: {warning['detail']}", style="yellow", markup=False)


def describe_model(client: GraftClient, model: JsonObject) -> None:
    metrics = model["metrics"]
    low, high = metrics.get("val_accuracy_ci95") or (None, None)
    interval = f" (95 % interval {percent(low)} to {percent(high)})" if low is not None else ""
    print_line(f"Model {model['id']}: {model['method']} on {model['backbone']['name']}")
    if not model["classes"]:
        _describe_backbone(model)
        return
    print_line(f"  validation accuracy {percent(metrics['val_accuracy'])}{interval}")
    if metrics.get("macro_f1") is not None:
        print_line(f"  macro F1            {metrics['macro_f1']:.3f}")
    if metrics.get("validation_warning"):
        errors.print(f"Warning: {metrics['validation_warning']}", style="yellow", markup=False, soft_wrap=True)
    # It is measured with heads on frozen features, so beside the figures of a tuned network it would mislead.
    if metrics.get("forecast") and model["method"] == "feature_extraction":
        print_line(f"  {metrics['forecast']['sentence']}")
    which = "" if "default" in model["aliases"] else f"?model={model['id']}"
    print_line(f"  curl -F file=@picture.jpg {client.url}/predict{which}")


def _describe_backbone(model: JsonObject) -> None:
    metrics = model["metrics"]
    print_line(f"  spread of the features  {metrics['feature_std']:.2f} (1 is even, 0 a collapse)")
    if metrics.get("knn_accuracy") is not None:
        print_line(f"  nearest neighbours      {percent(metrics['knn_accuracy'])}")
    if metrics.get("warning"):
        errors.print(f"Warning: {metrics['warning']}", style="yellow", markup=False, soft_wrap=True)
    print_line(f"  graft train ARCHIVE_OR_FOLDER --backbone {model['id']}")


def _show(event: JobEvent, bar: Progress, task: Any) -> None:
    match event.event:
        case "status":
            bar.update(task, description=event.data.get("status", ""))
        case "progress":
            epochs, fraction = event.data.get("epochs"), event.data.get("fraction")
            bar.update(task, description=event.data.get("stage", "train"), total=epochs)
            if epochs and fraction is not None:
                bar.update(task, completed=round(fraction * epochs, 2))
        case "epoch":
            bar.console.print(_epoch_line(event.data), soft_wrap=True)
        case "log":
            bar.console.print(event.data.get("message", ""), style="dim", markup=False, soft_wrap=True)


def _epoch_line(epoch: JsonObject) -> str:
    method = epoch.get("method")  # where several compete
    parts = [f"epoch {epoch['epoch']:3}", *([method] if method else [])]
    for split in ("train", "val"):
        accuracy = epoch[f"{split}_accuracy"]  # none where nothing is told apart
        shown = "" if accuracy is None else f" accuracy {percent(accuracy)}"
        parts.append(f"{'validation' if split == 'val' else split} loss {epoch[f'{split}_loss']:.4f}{shown}")
    parts += [f"{name.replace('_', ' ')} {value:.3f}" for name, value in (epoch.get("figures") or {}).items()]
    return "   ".join(parts)


def progress_bar(*columns: Any) -> Progress:
    """A progress bar on standard error; where that is no terminal, only the lines printed above it appear."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, console=errors, disable=not errors.is_terminal
    )


@contextmanager
def sending(source: Path) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """The archive to be sent, and what is to be told of bytes sent, for a progress bar. Raises Failure without any."""
    if not source.exists():
        raise Failure(f"There is no file or folder {source}.", exit_code=EXIT_USAGE)
    with (
        _as_archive(source) as archive,
        progress_bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar,
    ):
        task = bar.add_task("upload", total=archive.stat().st_size)
        yield archive, lambda sent_bytes: bar.advance(task, sent_bytes)


@contextmanager
def _as_archive(source: Path) -> Iterator[Path]:
    """The archive itself, or a folder packed into a temporary zip."""
    if not source.is_dir():
        yield source
        return
    members = [path for path in sorted(source.rglob("*")) if path.is_file() and not _is_hidden(path, source)]
    if not members:
        raise Failure(f"The folder {source} holds no files.", exit_code=EXIT_USAGE)
    with tempfile.NamedTemporaryFile(suffix=".zip") as packed:
        # Pictures are compressed already: storing them is faster and as small.
        with (
            zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive,
            progress_bar() as bar,
        ):
            for path in bar.track(members, description="pack"):
                archive.write(path, path.relative_to(source).as_posix())
        packed.flush()
        yield Path(packed.name)


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _stem(source: Path) -> str:
    name = source.resolve().name
    return name if source.is_dir() else name.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Failure(f"-H takes NAME=VALUE, not {text!r}.", exit_code=EXIT_USAGE)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word, such as adamw


def detail_of(problem: JsonObject | None) -> str:
    """Why something failed, as the server says it."""
    return (problem or {}).get("detail") or "the server gave no reason"
