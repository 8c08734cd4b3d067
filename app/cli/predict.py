"""`graft predict`: pictures or folders to a table of what a model says of each. `graft feedback` corrects it."""

import base64
import mimetypes
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
    errors,
    percent,
    print_json,
    print_line,
    print_table,
    progress_bar,
)
from app.errors import listed
from graft_client import DEFAULT_URL, FailedPrediction, Prediction, Predictions, PredictOptions
from graft_client.requests import Adapt
from graft_client.uploads import MOST_PICTURES, Picture, files_of

STANDARD_INPUT = Path("-")


def add_to(cli: typer.Typer) -> None:
    cli.command()(predict)
    cli.command()(feedback)


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
    coverage: Annotated[
        float | None,
        typer.Option(help="Add a set of classes that holds the true one with this probability: 0.9, for one."),
    ] = None,
    neighbors: Annotated[
        int | None, typer.Option(min=1, max=50, help="Add so many of the training pictures that are most like it.")
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write heat maps there, PNG files of where the label was seen."),
    ] = None,
    adapt: Annotated[
        Adapt | None, typer.Option(help="Tune a copy of the model to each picture before it answers.")
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Keep picture and prediction on the server, for `graft feedback`.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Classify pictures."""
    paths = _pictures_of(images)
    options: PredictOptions = {"model": model, "top_k": top_k}
    if coverage is not None:
        options["coverage"] = coverage
    if neighbors is not None:
        options["neighbors"] = neighbors
    if explain is not None:
        options["explain"] = True
        explain.mkdir(parents=True, exist_ok=True)
    if adapt is not None:
        options["adapt"] = adapt
    if store:
        options["store"] = True
    with (
        connect(url, api_key) as graft,
        progress_bar(MofNCompleteColumn(), TimeRemainingColumn(), is_wanted=len(paths) > MOST_PICTURES) as bar,
    ):
        task = bar.add_task("predict", total=len(paths))
        answer = graft.predict(
            [_picture(path) for path in paths],
            **options,
            on_progress=lambda done, _: bar.update(task, completed=done),
        )
    # In the order of the pictures, and named as they were given: two folders may hold the same name.
    told = list(zip(paths, answer.predictions, strict=True))
    maps = {} if explain is None else _write_heat_maps(explain, told)
    if as_json:
        print_json(answer.raw)
    else:
        print_table(["picture", "label", "score", "next"], [_prediction_row(*each) for each in told], empty="")
        for path, found in told:
            if isinstance(found, Prediction) and (more := _more_of(found, answer, maps.get(path))):
                print_line("\n".join(["", str(path), *(f"  {line}" for line in more)]))
        _tell_limits(answer)
    if any(isinstance(found, FailedPrediction) for found in answer.predictions):
        raise typer.Exit(EXIT_FAILED)


def feedback(
    prediction_id: Annotated[
        str, typer.Argument(metavar="PREDICTION", help="Its id (prd_…), as `graft predict --store` tells it.")
    ],
    label: Annotated[str, typer.Argument(help="What the picture is: a class's name.")],
    of_task: Annotated[
        str | None, typer.Option("--task", help="Of which of several tasks; the first one if left out.")
    ] = None,
    new_class: Annotated[
        bool, typer.Option("--new-class", help="The label may be one that the model does not know.")
    ] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = "",
) -> None:
    """Say what a picture is whose prediction was kept."""
    with connect(url, api_key) as graft:
        kept = graft.predictions.give_feedback(prediction_id, label, task=of_task, new_class=new_class)
    if as_json:
        print_json(kept.raw)
    elif kept.tasks is not None:
        print_line(f"Kept: {kept.id} is {label}.")
    else:
        said = "as the model had said" if kept.label == label else f"the model had said {kept.label}"
        print_line(f"Kept: {kept.id} is {label}; {said}.")


def _pictures_of(paths: Sequence[Path]) -> list[Path]:
    """The pictures, those of folders in the place of these. Raises Failure where there are none."""
    missing = [str(path) for path in paths if path != STANDARD_INPUT and not path.exists()]
    if missing:
        raise Failure(f"There is no file {', '.join(missing)}.", exit_code=EXIT_USAGE)
    found: list[Path] = []
    left_out: list[str] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        for file in files_of(path):
            if _may_be_picture(file):
                found.append(file)
            else:
                left_out.append(str(file))
    if left_out:
        errors.print(f"Left out, as no pictures: {listed(left_out)}.", markup=False, soft_wrap=True)
    if not found:
        raise Failure(f"There are no pictures in {', '.join(map(str, paths))}.", exit_code=EXIT_USAGE)
    return found


def _may_be_picture(file: Path) -> bool:
    """False if its name says something else; what has a name that says nothing is the server's to look at."""
    kind, _ = mimetypes.guess_type(file.name)
    return kind is None or kind.startswith("image/")


def _picture(path: Path) -> Picture:
    return ("standard input", sys.stdin.buffer.read()) if path == STANDARD_INPUT else path


def _prediction_row(path: Path, found: Prediction | FailedPrediction) -> list[str]:
    if isinstance(found, FailedPrediction):
        return [str(path), "–", "", found.error["detail"]]
    rest = ", ".join(f"{other.label} {percent(other.score)}" for other in found.top[1:])
    if found.in_distribution is False:
        rest = f"{rest} (unlike what it was trained on)"
    return [str(path), found.label, percent(found.score), rest]


def _more_of(found: Prediction, answer: Predictions, heat_map: Path | None) -> list[str]:
    """What was asked for besides label and scores, a line each."""
    lines = []
    for name, task in (found.tasks or {"": found}).items():
        if task.prediction_set is not None and answer.coverage is not None:
            of_task = f"{name}, " if name else ""
            lines.append(f"{of_task}in {answer.coverage.asked:.3g} of cases one of: {', '.join(task.prediction_set)}")
    if found.neighbors:
        near = (f"{each.label or '–'} {each.similarity:.2f} ({each.path or each.id})" for each in found.neighbors)
        lines.append(f"most similar: {', '.join(near)}")
    if found.adaptation is not None:
        before = found.adaptation.before
        lines.append(f"before tuning: {before.label} {percent(before.score)}")
    if heat_map is not None:
        lines.append(f"heat map: {heat_map}")
    if found.id is not None:
        lines.append(f"kept: `graft feedback {found.id} LABEL` says what it is")
    return lines


def _tell_limits(answer: Predictions) -> None:
    """How far the sets may be believed, where more was asked than the validation pictures can promise."""
    coverage = answer.coverage
    if coverage is not None and coverage.asked > coverage.largest:
        promised = f"{coverage.images} validation pictures promise {coverage.largest:.3g} at most"
        errors.print(f"{promised}; beyond it every class is in.", markup=False, soft_wrap=True)


def _write_heat_maps(folder: Path, told: Sequence[tuple[Path, Prediction | FailedPrediction]]) -> dict[Path, Path]:
    """Where the heat map of each picture is now; pictures of the same name get numbers."""
    written: dict[Path, Path] = {}
    for path, found in told:
        if isinstance(found, FailedPrediction) or found.explanation is None:
            continue
        stem = "standard input" if path == STANDARD_INPUT else path.stem
        names = (f"{stem}.heat.png", *(f"{stem}-{number}.heat.png" for number in range(2, len(told) + 1)))
        target = next(folder / name for name in names if folder / name not in written.values())
        target.write_bytes(base64.b64decode(found.explanation.partition(",")[2]))
        written[path] = target
    return written
