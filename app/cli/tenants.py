"""The commands of whoever says who may do what: keys and workspaces. They work on the database, without a server."""

import contextlib
from datetime import timedelta
from typing import Annotated

import typer

from app import access, audit, removal, workspaces
from app.access import Scope
from app.cli.server import load_settings
from app.cli.terminal import Failure, date, errors, print_line, print_table
from app.db.engine import Database
from app.db.migrate import upgrade
from app.db.tables import FIRST_WORKSPACE_NAME, utc_now
from app.db.tenancy import Actor
from app.storage import LocalStorage
from app.workspaces import Limits, Workspace

# What the databases' columns hold, and a century.
MOST, MOST_JOBS, MOST_DAYS = 2**63 - 1, 2**31 - 1, 36525

keys = typer.Typer(help="API keys: create, list, revoke.", no_args_is_help=True)
spaces = typer.Typer(
    help="Workspaces, which see nothing of one another: create, limit, list, delete.", no_args_is_help=True
)


def add_to(cli: typer.Typer) -> None:
    cli.add_typer(keys, name="keys")
    cli.add_typer(spaces, name="workspaces")


@keys.command("create")
def create_key(
    scope: Annotated[
        list[Scope], typer.Option(help="What the key may do; train includes predict, admin includes all.")
    ],
    name: Annotated[str | None, typer.Option(help="Whose key it is, or what it is for.")] = None,
    expires_days: Annotated[
        int | None, typer.Option(min=1, max=MOST_DAYS, help="Days until it expires; never if left out.")
    ] = None,
    workspace: Annotated[str, typer.Option(help="Whose data it opens; see `graft workspaces`.")] = FIRST_WORKSPACE_NAME,
) -> None:
    """Create an API key and print it, once. From then on every request needs a key."""
    expires_at = utc_now() + timedelta(days=expires_days) if expires_days else None
    with _within(workspace).write() as session:
        created = access.create_key(session, scopes=scope, name=name, expires_at=expires_at)
    errors.print(f"Created {created.id}. This is the only time the key is shown:")
    print_line(created.token)


@keys.command("list")
def list_keys() -> None:
    """List the API keys, without their secrets."""
    with _database().read() as session:
        names = {row.id: row.name for row in workspaces.list_workspaces(session)}
        rows = [
            [
                key.id,
                key.name or "",
                names[key.workspace_id],
                " ".join(key.scopes),
                date(key.created_at),
                "revoked" if key.revoked_at else date(key.expires_at) or "never",
                date(key.last_used_at),
            ]
            for key in access.list_keys(session)
        ]
    columns = ["id", "name", "workspace", "scopes", "created", "expires", "last used"]
    print_table(columns, rows, empty="There are no keys; `graft keys create --scope admin` makes one.")


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """End an API key at once."""
    with _within_that_of(key_id).write() as session:
        access.revoke_key(session, key_id)
    print_line(f"Revoked {key_id}.")


MaxBytes = Annotated[int | None, typer.Option(min=0, max=MOST, help="Most bytes that it may keep.")]
MaxJobs = Annotated[
    int | None, typer.Option(min=0, max=MOST_JOBS, help="Most jobs and batches that may wait or run at a time.")
]
MaxPredictions = Annotated[
    int | None, typer.Option(min=0, max=MOST, help="Most pictures predicted on one day, in UTC.")
]
RequestRate = Annotated[float | None, typer.Option(min=0.001, help="Requests a second, in the long run.")]


@spaces.command("create")
def create_workspace(
    name: Annotated[str, typer.Argument(help="Small letters, digits, '.', '_' and '-'.")],
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxJobs = None,
    max_predictions_per_day: MaxPredictions = None,
    requests_per_second: RequestRate = None,
) -> None:
    """Create a workspace, which sees nothing of the others. Limits that are left out are the settings'."""
    limits = Limits(max_bytes, max_unfinished_jobs, max_predictions_per_day, requests_per_second)
    with _database().write() as session:
        row = workspaces.create(session, name, limits)
        audit.add(session, row.id, action="graft workspaces create", changed=[row.id])
    print_line(f"Created {name}. `graft keys create --scope train --workspace {name}` makes a key for it.")


@spaces.command("limit")
def limit_workspace(
    name: Annotated[str, typer.Argument()],
    max_bytes: MaxBytes = None,
    max_unfinished_jobs: MaxJobs = None,
    max_predictions_per_day: MaxPredictions = None,
    requests_per_second: RequestRate = None,
    reset: Annotated[bool, typer.Option("--reset", help="Those that are left out are the settings' again.")] = False,
) -> None:
    """Change what a workspace may have and do; what is left out stays as it is."""
    limits = vars(Limits(max_bytes, max_unfinished_jobs, max_predictions_per_day, requests_per_second))
    changes = {limit: value for limit, value in limits.items() if reset or value is not None}
    with _within(name, action="graft workspaces limit").write() as session:
        workspaces.change_limits(session, name, changes)
    print_line(f"Changed {name}.")


@spaces.command("list")
def list_workspaces() -> None:
    """List the workspaces, what they have and what they may have."""
    defaults, database = Limits.from_settings(load_settings()), _database()
    with database.read() as session:
        rows = workspaces.list_workspaces(session)
    table = []
    for row in rows:
        limits = Workspace.of(row, defaults).limits
        with database.within(row.id).read() as session:
            used, jobs = workspaces.bytes_used(session), workspaces.unfinished_jobs(session)
        table.append(
            [
                row.name,
                f"{used / 1e6:,.1f} MB of {_limit(limits.max_bytes)}",
                f"{jobs} of {_limit(limits.max_unfinished_jobs)}",
                _limit(limits.max_predictions_per_day),
                _limit(limits.requests_per_second),
            ]
        )
    print_table(["name", "kept", "unfinished jobs", "predictions a day", "requests a second"], table, empty="")


@spaces.command("delete")
def delete_workspace(
    name: Annotated[str, typer.Argument()],
    cancel_jobs: Annotated[
        bool, typer.Option("--cancel-jobs", help="Cancel what waits or runs, instead of refusing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for the name once more.")] = False,
) -> None:
    """Delete a workspace with all it has, for good; its keys end at once. If it is interrupted, run it again."""
    chosen, database = load_settings(), _database()
    counts = removal.possessions(database, name)
    errors.print(f"{name} has {', '.join(f'{count:,} {noun}' for noun, count in counts.items())}.")
    if not yes and _typed("All of it will be gone. Its name, to delete it: ") != name:
        raise Failure("That is not its name; nothing was deleted.")
    removal.remove(database, LocalStorage(chosen.storage_root), name, cancels_jobs=cancel_jobs)
    print_line(f"Deleted {name}.")


def _typed(prompt: str) -> str:
    """What somebody types; nothing where nobody can."""
    with contextlib.suppress(EOFError):
        return errors.input(prompt).strip()
    return ""


def _database() -> Database:
    chosen = load_settings()
    upgrade(chosen.resolved_database_url)  # so that the first key can be made before the first start
    return Database(chosen.resolved_database_url)


def _within(name: str, action: str = "graft keys create") -> Database:
    """The database as the workspace of this name sees it. Raises NotFound."""
    database = _database()
    with database.read() as session:
        return database.within(workspaces.find_by_name(session, name).id, actor=Actor(action))


def _limit(value: float | None) -> str:
    return "no limit" if value is None else f"{value:,}"


def _within_that_of(key_id: str) -> Database:
    """The same of a key's workspace. Raises NotFound."""
    database = _database()
    with database.read() as session:
        workspace_id = access.find_key(session, key_id).workspace_id
    return database.within(workspace_id, actor=Actor("graft keys revoke"))
