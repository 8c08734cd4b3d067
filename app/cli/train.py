"""`graft train`: from a folder or an archive to a model, with progress bars."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import DownloadColumn, TaskProgressColumn, TimeRemainingColumn, TransferSpeedColumn

from app.cli import completion
from app.cli.terminal import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Failure,
    Url,
    connect,
    detail_of,
    errors,
    percent,
    print_json,
    print_line,
    progress_bar,
)
from app.cli.watching import model_of, watch
from graft_client import DEFAULT_URL, Dataset, Graft, JobOptions, Model
from graft_client.requests import Method, Promote, Recipe
from graft_client.uploads import OnProgress

DATASET_ID = re.compile(r"ds_\w+")

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
        Method,
        typer.Option(
            metavar="METHOD",
            help="few_shot, feature_extraction, fine_tuning, full_fine_tuning, from_scratch, self_supervised or auto.",
        ),
    ] = "auto",
    backbone: Annotated[
        str,
        typer.Option(help="A backbone, a model to start from (mdl_…), or auto.", autocompletion=completion.backbones),
    ] = "auto",
    recipe: Annotated[
        Recipe | None, typer.Option(help="classic is the textbook's training, modern our best and the default.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training pictures.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate at its peak.")] = None,
    hyperparameter: Annotated[
        list[str] | None,
        typer.Option(
            "--hyperparameter",
            "-H",
            metavar="NAME=VALUE",
            help="Any other; may be given several times.",
            autocompletion=completion.hyperparameters,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Path within the archive of a picture to leave out; may be given several times."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same data: same model.")] = 0,
    promote: Annotated[Promote, typer.Option(help="Whether the model becomes the default.")] = "if_better",
    name: Annotated[str | None, typer.Option(help="Name of the data set; that of the file if left out.")] = None,
    unlabelled: Unlabelled = False,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Print the job's id and end, instead of watching it.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Upload pictures, train on them, and end with a served model."""
    options = JobOptions(method=method, backbone=backbone, seed=seed, promote=promote)
    if recipe is not None:
        options["recipe"] = recipe
    if exclude:
        options["exclude"] = exclude
    named = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate}
    hyperparameters = {key: value for key, value in named.items() if value is not None}
    hyperparameters |= dict(_name_and_value(text) for text in hyperparameter or [])
    for key, value in hyperparameters.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no word for it
            raise Failure(f"{key} takes a finite number, not {value}.", exit_code=EXIT_USAGE)
    options["hyperparameters"] = hyperparameters
    # What lies here goes before an id, and no id has a dot or a slash.
    is_id = DATASET_ID.fullmatch(source) is not None and not Path(source).exists()
    if is_id and (name is not None or unlabelled):
        raise Failure(
            f"--name and --unlabelled are for an upload; the data set {source} is there and stays as it is.",
            exit_code=EXIT_USAGE,
        )
    with connect(url, api_key) as graft:
        dataset = (
            check(graft, graft.datasets.get(source))
            if is_id
            else upload(graft, Path(source), name=name, unlabelled=unlabelled)
        )
        describe_dataset(dataset)
        job = graft.jobs.create(dataset.id, **options)
        if detach:
            print_json({"dataset": dataset.raw, "job": job.raw}) if as_json else print_line(job.id)
            return
        job = watch(graft, job.id)
        model = model_of(graft, job)
        if as_json:
            print_json({"dataset": dataset.raw, "job": job.raw, "model": model.raw})
        else:
            describe_model(graft, model)


def upload(graft: Graft, source: Path, *, name: str | None, unlabelled: bool = False) -> Dataset:
    """Uploads an archive or a folder and waits until its pictures are checked. Raises Failure if they are refused."""
    with sending(source) as on_progress:
        dataset = graft.datasets.upload(
            source, name=name, kind="unlabelled" if unlabelled else None, on_progress=on_progress
        )
    return check(graft, dataset)


def check(graft: Graft, dataset: Dataset) -> Dataset:
    """The data set once its pictures are checked. Raises Failure if they are refused."""
    try:
        with progress_bar(TaskProgressColumn(), TimeRemainingColumn(), is_wanted=not dataset.is_final) as bar:
            task = bar.add_task("check", total=1.0)

            def show(found: Dataset) -> None:
                if found.progress is not None:
                    bar.update(task, completed=found.progress.fraction or 0.0)

            if not dataset.is_final:
                dataset = graft.datasets.wait(dataset.id, on_look=show)
            bar.update(task, completed=1.0)
    except KeyboardInterrupt:
        raise Failure(
            f"The checking goes on. `graft train {dataset.id}` trains on the data set.", exit_code=EXIT_INTERRUPTED
        ) from None
    if dataset.status == "failed":
        raise Failure(f"Data set {dataset.id} failed: {detail_of(dataset.error)}")
    return dataset


def describe_dataset(dataset: Dataset) -> None:
    splits = dataset.splits
    if dataset.classes:
        of = f"of {len(dataset.classes)} classes, {splits.train} to train on, {splits.val} to validate with"
    else:
        of = "without labels"
    errors.print(
        f"Data set {dataset.id}: {dataset.num_images} pictures {of}"
        + (f", {splits.test} for testing" if splits.test else "")
        + (f"; rejected files: {dataset.num_rejected}" if dataset.num_rejected else "")
        + "."
    )
    for warning in dataset.warnings:
        errors.print(f"Warning: {warning.detail}", style="yellow", markup=False, soft_wrap=True)


def describe_model(graft: Graft, model: Model) -> None:
    metrics = model.metrics
    low, high = metrics.get("val_accuracy_ci95") or (None, None)
    interval = f" (95 % interval {percent(low)} to {percent(high)})" if low is not None else ""
    print_line(f"Model {model.id}: {model.method} on {model.backbone.name}")
    if not model.classes:
        _describe_backbone(model)
        return
    print_line(f"  validation accuracy {percent(metrics['val_accuracy'])}{interval}")
    if metrics.get("macro_f1") is not None:
        print_line(f"  macro F1            {metrics['macro_f1']:.3f}")
    if metrics.get("validation_warning"):
        errors.print(f"Warning: {metrics['validation_warning']}", style="yellow", markup=False, soft_wrap=True)
    # It is measured with heads on frozen features, so beside the figures of a tuned network it would mislead.
    if metrics.get("forecast") and model.method == "feature_extraction":
        print_line(f"  {metrics['forecast']['sentence']}")
    if model.promotion is not None and not model.promotion.promoted:
        print_line(f"  not the default model: {model.promotion.reason}")
    which = "" if "default" in model.aliases else f"?model={model.id}"
    print_line(f"  curl -F file=@picture.jpg {graft.url}/predict{which}")


def _describe_backbone(model: Model) -> None:
    metrics = model.metrics
    print_line(f"  spread of the features  {metrics['feature_std']:.2f} (1 is even, 0 a collapse)")
    if metrics.get("knn_accuracy") is not None:
        print_line(f"  nearest neighbours      {percent(metrics['knn_accuracy'])}")
    if metrics.get("warning"):
        errors.print(f"Warning: {metrics['warning']}", style="yellow", markup=False, soft_wrap=True)
    print_line(f"  graft train ARCHIVE_OR_FOLDER --backbone {model.id}")


@contextmanager
def sending(source: Path) -> Iterator[OnProgress]:
    """A bar of what is sent of an archive or a folder, and what is to be told of it. Raises Failure without either."""
    if not source.exists():
        raise Failure(f"There is no file or folder {source}.", exit_code=EXIT_USAGE)
    try:
        with progress_bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("upload", total=None)
            yield lambda sent, whole: bar.update(task, completed=sent, total=whole)
    except ValueError as error:  # a folder without files
        raise Failure(str(error), exit_code=EXIT_USAGE) from None


def _name_and_value(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise Failure(f"-H takes NAME=VALUE, not {text!r}.", exit_code=EXIT_USAGE)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a word, such as adamw
