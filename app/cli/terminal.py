"""What the commands print with: results on standard output, everything else on standard error."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table

from graft_client import DEFAULT_URL, Graft

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_INTERRUPTED = 130

GAP = 2  # between the columns of a table, in characters
LEAST_REST = 40  # and what all but the first have together, however long that one is

# A pipe or a file has no width to fit into. A name such as a:dog:b.png holds no emoji.
output = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True, highlight=False, emoji=False, width=None if sys.stderr.isatty() else 200)


def _or_in_front(context: typer.Context, parameter: typer.CallbackParam, value: str) -> str:
    """What was given before the command's name counts where it is not given behind it, and before the environment."""
    assert parameter.name is not None
    in_front: str | None = context.find_root().params.get(parameter.name)
    source = context.get_parameter_source(parameter.name)
    return value if in_front is None or (source and source.name == "COMMANDLINE") else in_front


Url = Annotated[
    str,
    typer.Option(
        "--url", envvar="GRAFT_URL", help="Address of the Graft server.", metavar="ADDRESS", callback=_or_in_front
    ),
]
ApiKey = Annotated[
    str,
    typer.Option("--api-key", envvar="GRAFT_API_KEY", help="API key.", show_default=False, callback=_or_in_front),
]
Limit = Annotated[int, typer.Option(min=1, max=200, help="How many, newest first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]


class Answered(Protocol):
    """What a server has answered; `raw` is the JSON as it came."""

    @property
    def raw(self) -> dict[str, Any]: ...


Found = TypeVar("Found", bound=Answered)


class Failure(Exception):
    """Ends the command with a sentence for the user."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def connect(url: str = DEFAULT_URL, api_key: str = "") -> Graft:
    return Graft(url, api_key=api_key or None, user_agent="graft-cli")


def check_place_for(output: Path) -> None:
    """Before the server works for minutes or hours, and not after. Raises Failure."""
    if not output.parent.is_dir() or output.is_dir():
        raise Failure(f"{output} is no place for a file.", exit_code=EXIT_USAGE)


def is_interactive() -> bool:
    """Whether somebody looks on, who is shown what moves; TERM=dumb is a terminal that can move nothing."""
    return errors.is_terminal and os.environ.get("TERM") != "dumb"


def progress_bar(*columns: ProgressColumn, is_wanted: bool = True) -> Progress:
    """A progress bar on standard error, where somebody looks on and it is wanted: not for what takes no time."""
    is_shown = is_wanted and is_interactive()
    return Progress(TextColumn("{task.description}"), BarColumn(), *columns, console=errors, disable=not is_shown)


def print_json(answer: Any) -> None:
    output.print(json.dumps(answer, indent=2, ensure_ascii=False), markup=False, soft_wrap=True)


def print_line(text: str) -> None:
    """One line of a result, whole however narrow the terminal is."""
    output.print(text, markup=False, soft_wrap=True)


def print_table(columns: list[str], rows: list[list[str]], *, empty: str) -> None:
    """A table, or the sentence `empty` where there are no rows. Into a pipe or a file goes a line for each row."""
    if not rows:
        print_line(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, name in enumerate(columns):
        # The first one names the row: an id, a setting, a file. It stays whole, so that it can be copied.
        table.add_column(name, overflow="fold" if position == 0 else "ellipsis", no_wrap=position == 0)
    for row in rows:
        table.add_row(*row)
    if (width := _least_width(columns, rows)) > output.width:
        table.width = width  # else a long name leaves the others no room
    output.print(table, markup=False, crop=False)


def _least_width(columns: list[str], rows: list[list[str]]) -> int:
    """In characters, with the first column whole; in a terminal, cells of the others may have several lines."""
    first, *others = [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]
    rest = sum(GAP + width for width in others)
    return first + (min(rest, LEAST_REST) if output.is_terminal else rest)


def print_found(
    found: Sequence[Found],
    columns: Mapping[str, Callable[[Found], str]],
    *,
    as_json: bool,
    empty: str,
) -> None:
    """What a server listed: as it answered, or a table. columns: by name, what a row has there."""
    if as_json:
        print_json([each.raw for each in found])
        return
    print_table(list(columns), [[cell(row) for cell in columns.values()] for row in found], empty=empty)


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def date(moment: datetime | None) -> str:
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")


def detail_of(problem: Mapping[str, Any] | None) -> str:
    """Why something failed, as the server says it."""
    return (problem or {}).get("detail") or "the server gave no reason"
