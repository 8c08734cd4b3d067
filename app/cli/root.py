"""Puts the commands together, and turns what went wrong into a sentence and an exit code."""

import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from dotenv import dotenv_values

from app.cli import batches, demo, predict, resources, server, tenants, train, weights
from app.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREACHABLE, Failure, errors
from app.errors import GraftError as ServersOwnError
from graft_client import Forbidden, GraftError, ServerRefused, ServerUnreachable, Unauthenticated

# How the server says where ids are listed; the list of models has the aliases, too.
LISTING = re.compile(
    r"GET /v1/(jobs|models|datasets|batches) lists (them|those there are|the models)(?:, GET /v1/aliases the aliases)?"
)
OF_COMMANDS = ("GRAFT_URL", "GRAFT_API_KEY")

cli = typer.Typer(
    name="graft",
    help="Turns a zip of images into a served classifier by transfer learning.",
    epilog="Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no server answers, 130 interrupted. "
    "The server: --url or GRAFT_URL; the key: GRAFT_API_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cli.callback()
def _for_every_command(
    url: Annotated[str | None, typer.Option(help="Address of the Graft server.", metavar="ADDRESS")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key.")] = None,
) -> None:
    """The commands that ask a server look here for what they are not given themselves."""


server.add_to(cli)
tenants.add_to(cli)
train.add_to(cli)
predict.add_to(cli)
resources.add_to(cli)
batches.add_to(cli)
demo.add_to(cli)
weights.add_to(cli)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits, with the exit codes of the epilog above."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 are printed as they are
    try:
        _read_dotenv()
        cli(args=arguments, prog_name="graft")
    except Failure as error:
        _fail(str(error), error.exit_code)
    except ServerUnreachable as error:
        _fail(f"{error} {_where_to_find_one(error.url)}", EXIT_UNREACHABLE)
    except ServerRefused as error:
        _fail(_explained(error), EXIT_FAILED)
    except GraftError as error:
        _fail(str(error), EXIT_FAILED)
    except ServersOwnError as error:
        _fail(error.detail, EXIT_FAILED)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head` does; nothing may be written at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}.", EXIT_FAILED)  # a file that cannot be read, or written
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _read_dotenv() -> None:
    """What commands take from the environment may stand in `.env`, as all settings; the environment goes first."""
    for name, value in dotenv_values(".env").items():
        if name in OF_COMMANDS and value:
            os.environ.setdefault(name, value)


def _where_to_find_one(url: str) -> str:
    if re.match(r"https?://(127\.|localhost|\[::1\])", url):
        return "Start one with `graft up`, or name another with --url or GRAFT_URL."
    return "Is it running, and is that its address? --url or GRAFT_URL names another."


def _explained(error: ServerRefused) -> str:
    """What the server said, in the words of the command line, and what to do next."""
    said = LISTING.sub(r"`graft \1 list` lists \2", error.detail)
    lines = [said, *(f"  {each.pointer}: {each.detail}" for each in error.errors)]
    if isinstance(error, Unauthenticated):
        lines.append("Set GRAFT_API_KEY to a key of this server; there, `graft keys create --scope train` makes one.")
    elif isinstance(error, Forbidden):
        lines.append("Set GRAFT_API_KEY to a key that may do this; there, `graft keys create --scope …` makes one.")
    elif error.status >= 500 and error.request_id:
        lines.append(f"The server's log has it under request_id {error.request_id}.")
    return "\n".join(lines)


def _fail(message: str, exit_code: int) -> None:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)
