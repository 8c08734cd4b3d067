"""What the shell offers behind TAB beside options and their choices: names that the server knows.

Somebody waits with a finger on the key: a server that does not answer at once is not asked again, and offers nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import typer

from graft_client import DEFAULT_URL, Graft, GraftError, Hyperparameters

ANSWER_WITHIN_SECONDS = 1.5
MOST = 50

Offers = list[tuple[str, str]]  # what is typed, and what it is


def hyperparameters(incomplete: str) -> list[str]:
    return [f"{name}=" for name in Hyperparameters.__annotations__ if name.startswith(incomplete)]


def backbones(context: typer.Context, incomplete: str) -> Offers:
    return _asked(
        context,
        incomplete,
        lambda graft: [(each.name, f"{each.parameters / 1e6:.1f} M parameters") for each in graft.models.backbones()],
    )


def datasets(context: typer.Context, incomplete: str) -> Offers:
    return _asked(
        context,
        incomplete,
        lambda graft: [(each.id, f"{each.name}, {each.status}") for each in graft.datasets.list(limit=MOST)],
    )


def jobs(context: typer.Context, incomplete: str) -> Offers:
    return _asked(
        context,
        incomplete,
        lambda graft: [(each.id, f"{each.status}, {each.method or ''}") for each in graft.jobs.list(limit=MOST)],
    )


def models(context: typer.Context, incomplete: str) -> Offers:
    """Aliases first."""
    return _asked(
        context,
        incomplete,
        lambda graft: [
            *((each.name, f"alias of {each.model}") for each in graft.aliases.list()),
            *((each.id, f"{each.method} on {each.backbone.name}") for each in graft.models.list(limit=MOST)),
        ],
    )


def aliases(context: typer.Context, incomplete: str) -> Offers:
    return _asked(
        context, incomplete, lambda graft: [(each.name, f"now {each.model}") for each in graft.aliases.list()]
    )


def batches(context: typer.Context, incomplete: str) -> Offers:
    return _asked(
        context,
        incomplete,
        lambda graft: [(each.id, f"{each.status}, {each.num_files} files") for each in graft.batches.list(limit=MOST)],
    )


def _asked(context: typer.Context, incomplete: str, ask: Callable[[Graft], Iterable[tuple[str, str]]]) -> Offers:
    given: dict[str, Any] = context.params
    try:
        with Graft(
            given.get("url") or DEFAULT_URL,
            api_key=given.get("api_key") or None,
            max_retries=0,
            timeout_seconds=ANSWER_WITHIN_SECONDS,
        ) as graft:
            return [offer for offer in ask(graft) if offer[0].startswith(incomplete)]
    except GraftError:
        return []
