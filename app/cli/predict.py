"""`graft predict`: pictures, or folders of them, to a table of what a model says of each."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TimeRemainingColumn

from app.cli import completion
from app.cli.terminal import (
    EXIT_FAILED,
    EXIT_USAGE,
    ApiKey,
    AsJson,
    Failure,
    Url,
    connect,
    percent,
    print_json,
    print_table,
    progress_bar,
)
from graft_client import DEFAULT_URL, FailedPrediction, Prediction
from graft_client.uploads import MOST_PICTURES, Picture, files_of

STANDARD_INPUT = Path("-")


def add_to(cli: typer.Typer) -> None:
    cli.command()(predict)


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE…", help="Pictures, folders of pictures, or - for one from standard input."),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="Model id or alias; the default model if left out.", autocompletion=completion.models),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 3,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Classify pictures."""
    paths = _pictures_of(images)
    with (
        connect(url, api_key) as graft,
        progress_bar(MofNCompleteColumn(), TimeRemainingColumn(), is_wanted=len(paths) > MOST_PICTURES) as bar,
    ):
        task = bar.add_task("predict", total=len(paths))
        answer = graft.predict(
            [_picture(path) for path in paths],
            model=model,
            top_k=top_k,
            on_progress=lambda done, _: bar.update(task, completed=done),
        )
    if as_json:
        print_json(answer.raw)
    else:
        # In the order of the pictures, and named as they were given: two folders may hold the same name.
        rows = [_prediction_row(path, found) for path, found in zip(paths, answer.predictions, strict=True)]
        print_table(["picture", "label", "score", "next"], rows, empty="")
    if any(isinstance(found, FailedPrediction) for found in answer.predictions):
        raise typer.Exit(EXIT_FAILED)


def _pictures_of(paths: Sequence[Path]) -> list[Path]:
    """The pictures, those of folders in the place of these. Raises Failure where there is nothing."""
    missing = [str(path) for path in paths if path != STANDARD_INPUT and not path.exists()]
    if missing:
        raise Failure(f"There is no file {', '.join(missing)}.", exit_code=EXIT_USAGE)
    found = [file for path in paths for file in (files_of(path) if path.is_dir() else [path])]
    if not found:
        raise Failure(f"There are no files in {', '.join(map(str, paths))}.", exit_code=EXIT_USAGE)
    return found


def _picture(path: Path) -> Picture:
    return ("standard input", sys.stdin.buffer.read()) if path == STANDARD_INPUT else path


def _prediction_row(path: Path, found: Prediction | FailedPrediction) -> list[str]:
    if isinstance(found, FailedPrediction):
        return [str(path), "–", "", found.error["detail"]]
    rest = ", ".join(f"{other.label} {percent(other.score)}" for other in found.top[1:])
    if found.in_distribution is False:
        rest = f"{rest} (unlike what it was trained on)"
    return [str(path), found.label, percent(found.score), rest]
