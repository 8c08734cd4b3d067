"""`graft batches`: from a folder or an archive of pictures to a file of what a model says of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from app.cli.terminal import (
    EXIT_INTERRUPTED,
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
)
from app.cli.train import detail_of, progress_bar, sending
from app.client import DEFAULT_URL, GraftClient, JsonObject

# How often the progress bar is brought up to date.
LOOK_SECONDS = 1

batches = typer.Typer(help="Many pictures at once: run, list, results, cancel, delete.", no_args_is_help=True)

BatchId = Annotated[str, typer.Argument(metavar="BATCH")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Where the results go: a table, or JSON lines if it ends in .jsonl.")
]


def add_to(cli: typer.Typer) -> None:
    cli.add_typer(batches, name="batches")


@batches.command("run")
def run_batch(
    source: Annotated[
        Path, typer.Argument(metavar="ARCHIVE_OR_FOLDER", help="Pictures in any folders: a zip, tar, tar.gz or folder.")
    ],
    output: Output = Path("results.csv"),
    model: Annotated[str | None, typer.Option(help="Model id or alias; the default model if left out.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per picture, in JSON lines.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Classify an archive or a folder of pictures, and write down the results."""
    _check_folder_of(output)
    with connect(url, api_key) as client:
        with sending(source) as (archive, on_sent):
            batch = client.submit_batch(archive, model=model, top_k=top_k, on_sent=on_sent)
        _fetch(client, batch, output, as_json=as_json)


@batches.command("list")
def list_batches(
    status: Annotated[str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List batches, newest first."""
    with connect(url, api_key) as client:
        found = client.list("batches", limit=limit, status=status)
    columns: dict[str, Callable[[JsonObject], str]] = {
        "id": lambda batch: batch["id"],
        "status": lambda batch: batch["status"],
        "model": lambda batch: batch["model"],
        "files": lambda batch: str(batch["num_files"]),
        "done": lambda batch: percent((batch["progress"] or {}).get("fraction")),
        "created": lambda batch: batch["created_at"],
    }
    empty = "There are no batches; `graft batches run ARCHIVE_OR_FOLDER` makes one."
    print_found(found, columns, as_json=as_json, empty=empty)


@batches.command("results")
def fetch_results(
    batch_id: BatchId,
    output: Output = Path("results.csv"),
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Wait for a batch's end, and write down its results."""
    _check_folder_of(output)
    with connect(url, api_key) as client:
        _fetch(client, client.batch(batch_id), output, as_json=as_json)


@batches.command("cancel")
def cancel_batch(batch_id: BatchId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a batch; it has no results."""
    with connect(url, api_key) as client:
        batch = client.cancel_batch(batch_id)
    print_line(f"Batch {batch['id']} is {'being cancelled' if batch['status'] == 'running' else batch['status']}.")


@batches.command("delete")
def delete_batch(batch_id: BatchId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a batch that has ended, with its pictures and results."""
    with connect(url, api_key) as client:
        client.delete_batch(batch_id)
    print_line(f"Deleted {batch_id}.")


def _check_folder_of(output: Path) -> None:
    """Before hours of work, and not after."""
    if not output.parent.is_dir() or output.is_dir():
        raise Failure(f"{output} is no place for a file.", exit_code=EXIT_USAGE)


def _fetch(client: GraftClient, batch: JsonObject, output: Path, *, as_json: bool) -> None:
    """Raises Failure, with the reason, for a batch that ends without results."""
    batch = _wait_for(client, batch, output)
    if batch["status"] == "failed":
        raise Failure(f"Batch {batch['id']} failed: {detail_of(batch['error'])}")
    if batch["status"] != "succeeded":
        raise Failure(f"Batch {batch['id']} is {batch['status']}.")
    client.download_results(batch, output, format="jsonl" if output.suffix == ".jsonl" else "csv")
    if as_json:
        print_json(batch)
        return
    refused = f"; files that are no readable pictures: {batch['num_rejected']}" if batch["num_rejected"] else ""
    print_line(f"{output}: {batch['num_images']} pictures{refused}.")


def _wait_for(client: GraftClient, batch: JsonObject, output: Path) -> JsonObject:
    """The batch once it has ended. Ctrl-C ends the waiting, not the batch."""
    batch_id = batch["id"]
    try:
        with progress_bar(TaskProgressColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task(batch["status"], total=1.0)
            while batch["status"] in ("queued", "running"):
                batch = client.batch(batch_id, wait_seconds=LOOK_SECONDS)
                done = batch["progress"] or {}
                progress.update(
                    task, description=done.get("stage") or batch["status"], completed=done.get("fraction") or 0.0
                )
    except KeyboardInterrupt:
        raise Failure(
            f"The batch goes on. `graft batches results {batch_id} -o {output}` waits for it, "
            f"`graft batches cancel {batch_id}` ends it.",
            exit_code=EXIT_INTERRUPTED,
        ) from None
    return batch
