"""`graft batches`: from a folder or an archive of pictures to a file of what a model says of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import TaskProgressColumn, TimeRemainingColumn

from app.cli import completion
from app.cli.terminal import (
    EXIT_INTERRUPTED,
    ApiKey,
    AsJson,
    Failure,
    Limit,
    Url,
    check_place_for,
    connect,
    date,
    detail_of,
    errors,
    percent,
    print_found,
    print_json,
    print_line,
    progress_bar,
)
from app.cli.train import sending
from graft_client import DEFAULT_URL, Batch, Graft
from graft_client.answers import JobStatus

batches = typer.Typer(help="Many pictures at once: run, list, results, cancel, delete.", no_args_is_help=True)

BatchId = Annotated[str, typer.Argument(metavar="BATCH", autocompletion=completion.batches)]
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
    model: Annotated[
        str | None,
        typer.Option(help="Model id or alias; the default model if left out.", autocompletion=completion.models),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Classes per picture, in JSON lines.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Classify an archive or a folder of pictures, and write down the results."""
    check_place_for(output)
    with connect(url, api_key) as graft:
        with sending(source) as on_progress:
            batch = graft.batches.submit(source, model=model, top_k=top_k, on_progress=on_progress)
        errors.print(f"Batch {batch.id}")  # at once, so that its results can be had whatever becomes of this command
        _fetch(graft, batch, output, as_json=as_json)


@batches.command("list")
def list_batches(
    status: Annotated[JobStatus | None, typer.Option(help="Only of this status.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """List batches, newest first."""
    with connect(url, api_key) as graft:
        found = graft.batches.list(limit=limit, status=status)
    columns: dict[str, Callable[[Batch], str]] = {
        "id": lambda batch: batch.id,
        "status": lambda batch: batch.status,
        "model": lambda batch: batch.model,
        "files": lambda batch: str(batch.num_files),
        "done": lambda batch: "" if batch.progress is None else percent(batch.progress.fraction),
        "created": lambda batch: date(batch.created_at),
    }
    empty = "There are no batches; `graft batches run ARCHIVE_OR_FOLDER` makes one."
    print_found(found.data, columns, as_json=as_json, empty=empty)


@batches.command("results")
def fetch_results(
    batch_id: BatchId,
    output: Output = Path("results.csv"),
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Wait for a batch's end, and write down its results."""
    check_place_for(output)
    with connect(url, api_key) as graft:
        _fetch(graft, graft.batches.get(batch_id), output, as_json=as_json)


@batches.command("cancel")
def cancel_batch(batch_id: BatchId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """End a batch; it has no results."""
    with connect(url, api_key) as graft:
        batch = graft.batches.cancel(batch_id)
    print_line(f"Batch {batch.id} is {'being cancelled' if batch.status == 'running' else batch.status}.")


@batches.command("delete")
def delete_batch(batch_id: BatchId, url: Url = DEFAULT_URL, api_key: ApiKey = "") -> None:
    """Delete a batch that has ended, with its pictures and results."""
    with connect(url, api_key) as graft:
        graft.batches.delete(batch_id)
    print_line(f"Deleted {batch_id}.")


def _fetch(graft: Graft, batch: Batch, output: Path, *, as_json: bool) -> None:
    """Raises Failure, with the reason, for a batch that ends without results."""
    batch = _wait_for(graft, batch, output)
    if batch.status == "failed":
        raise Failure(f"Batch {batch.id} failed: {detail_of(batch.error)}")
    if batch.status != "succeeded":
        raise Failure(f"Batch {batch.id} is {batch.status}.")
    graft.batches.download(batch.id, output, format="jsonl" if output.suffix == ".jsonl" else "csv")
    if as_json:
        print_json(batch.raw)
        return
    refused = f"; files that are no readable pictures: {batch.num_rejected}" if batch.num_rejected else ""
    print_line(f"{output}: {batch.num_images} pictures{refused}.")


def _wait_for(graft: Graft, batch: Batch, output: Path) -> Batch:
    """The batch once it has ended. Ctrl-C ends the waiting, not the batch."""
    try:
        with progress_bar(TaskProgressColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task(batch.status, total=1.0)

            def show(found: Batch) -> None:
                stage, done = str(found.status), 0.0
                if found.progress is not None:
                    stage, done = found.progress.stage, found.progress.fraction or 0.0
                progress.update(task, description=stage, completed=done)

            return batch if batch.is_final else graft.batches.wait(batch.id, on_look=show)
    except KeyboardInterrupt:
        raise Failure(
            f"The batch goes on. `graft batches results {batch.id} -o {output}` waits for it, "
            f"`graft batches cancel {batch.id}` ends it.",
            exit_code=EXIT_INTERRUPTED,
        ) from None
