"""Puts the commands together, and turns what went wrong into a sentence and an exit code."""

import sys
from collections.abc import Sequence

import typer

from app.cli import batches, demo, resources, server, train, weights
from app.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_UNREACHABLE, Failure, errors
from app.client import ServerRefused, ServerUnreachable
from app.errors import GraftError

cli = typer.Typer(
    name="graft",
    help="Turns a zip of images into a served classifier by transfer learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
server.add_to(cli)
train.add_to(cli)
resources.add_to(cli)
batches.add_to(cli)
demo.add_to(cli)
weights.add_to(cli)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits.

    Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no server answers, 130 interrupted.
    """
    try:
        cli(args=arguments, prog_name="graft")
    except Failure as error:
        _fail(str(error), error.exit_code)
    except ServerUnreachable as error:
        _fail(f"{error} Start one with `graft up`, or name another with --url or GRAFT_URL.", EXIT_UNREACHABLE)
    except ServerRefused as error:
        reasons = [f"  {e.get('pointer', '')}: {e.get('detail', '')}" for e in error.problem.get("errors", [])]
        advice = ["Set GRAFT_API_KEY to a key that may do this."] if error.status in (401, 403) else []
        _fail("\n".join([str(error), *reasons, *advice]), EXIT_FAILED)
    except GraftError as error:
        _fail(error.detail, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _fail(message: str, exit_code: int) -> None:
    errors.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(exit_code)
