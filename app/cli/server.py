"""The commands of whoever runs a server: up, api, worker, migrate, backup, restore, check, settings."""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from app import logs
from app.backup import Contents, back_up
from app.backup import restore as put_back
from app.check import check as find_faults
from app.cli.terminal import EXIT_USAGE, Failure, errors, print_line, print_table
from app.db.engine import Database
from app.db.migrate import check_is_current, upgrade
from app.errors import listed
from app.settings import Settings
from app.storage import LocalStorage, keep_private
from app.supervisor import Program, StopRequests, Supervisor, free_port, is_port_free
from graft_client import Graft

API = Program("API", (sys.executable, "-m", "app.main"))
WORKER = Program("worker", (sys.executable, "-m", "worker.main"))
PRETRAINING = (sys.executable, "-m", "worker.pretraining.bundle")

LOOK_INTERVAL_SECONDS = 0.2
KILL_MARGIN_SECONDS = 5.0  # the programs get their own shutdown grace, and this much more

Host = Annotated[str | None, typer.Option(help="Address to listen on.  [default: GRAFT_HOST, 127.0.0.1]")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0 picks one.  [default: GRAFT_PORT, 8000]")]


def add_to(cli: typer.Typer) -> None:
    for command in (up, api, worker, migrate, backup, restore, check, settings):
        cli.command()(command)
    # The program has its own options and its own help; they are handed on as they are.
    cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})(pretrain_bundle)


def up(host: Host = None, port: Port = None) -> None:
    """Migrate the database, then run the API and one worker until Ctrl-C."""
    chosen = load_settings(host=host, port=port)
    logs.configure(chosen)
    port = _port_to_listen_on(chosen)
    upgrade(chosen.resolved_database_url)
    environment = _environment(chosen.host, port)
    with (
        StopRequests() as stop_requests,
        Supervisor(
            [API, WORKER],
            environment=environment,
            stop_within_seconds=chosen.shutdown_grace_seconds + KILL_MARGIN_SECONDS,
        ) as supervisor,
    ):
        url = f"http://{_reachable(chosen.host)}:{port}"
        if _wait_until_serving(supervisor, stop_requests, url):
            print_line(f"Graft serves at {url} and describes itself at {url}/docs. Ctrl-C stops it.")
            while not stop_requests.wait(LOOK_INTERVAL_SECONDS):
                _look_after(supervisor)
        structlog.get_logger().info("graft.stopping")


def api(host: Host = None, port: Port = None) -> None:
    """Run the API alone."""
    chosen = load_settings(host=host, port=port)
    _become(API, _environment(chosen.host, chosen.port))


def worker() -> None:
    """Run one worker alone; several may share a database."""
    load_settings()
    _become(WORKER, _environment())


def pretrain_bundle(arguments: Annotated[list[str] | None, typer.Argument(metavar="OPTIONS")] = None) -> None:
    """Make graft_small, the backbone that comes with Graft, again: --help tells how."""
    _become(Program("pretraining", (*PRETRAINING, *(arguments or []))), _environment())


def migrate() -> None:
    """Bring the database up to this version's tables."""
    chosen = load_settings()
    upgrade(chosen.resolved_database_url)
    print_line(f"The database is up to date: {_masked(chosen.resolved_database_url)}")


def backup(folder: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Copy every row and file into a folder, while Graft runs; `graft restore` puts them back."""
    chosen = load_settings()
    database = Database(chosen.resolved_database_url)
    check_is_current(database)
    made = back_up(database, LocalStorage(chosen.storage_root), folder)
    database.dispose()
    print_line(f"{folder} has {_counted(made)}.")
    if made.missing:
        errors.print(
            f"{len(made.missing)} things that the database speaks of have no files: {listed(made.missing)}.",
            style="yellow",
        )


def restore(folder: Annotated[Path, typer.Argument(help="What `graft backup` has made.")]) -> None:
    """Put a backup into an empty database and data folder, of whatever kind: SQLite or PostgreSQL."""
    if not folder.is_dir():
        raise Failure(f"There is no folder {folder}.", exit_code=EXIT_USAGE)
    chosen = load_settings()
    storage = LocalStorage(chosen.storage_root, min_free_bytes=chosen.min_free_bytes)
    made = put_back(folder, chosen.resolved_database_url, storage)
    print_line(f"Back as of {made.created_at}: {_counted(made)}. `graft up` starts the server.")


def check() -> None:
    """Look through all files that the database speaks of, while Graft runs; name what is missing, corrupt or stray."""
    chosen = load_settings()
    database = Database(chosen.resolved_database_url)
    check_is_current(database)
    counts: Counter[str] = Counter()
    for finding in find_faults(database, LocalStorage(chosen.storage_root)):
        counts[finding.what] += 1
        print_line(f"{finding.what} {finding.key}: {finding.detail}")
    database.dispose()
    if counts:
        raise Failure("Not all is well: " + ", ".join(f"{count} {what}" for what, count in counts.items()) + ".")
    print_line("All files are there, and what was stored.")


def settings() -> None:
    """Print every setting with its value, default and meaning."""
    chosen = load_settings()
    rows = [
        [f"GRAFT_{name.upper()}", _shown(getattr(chosen, name)), _shown(_default(field)), field.description or ""]
        for name, field in Settings.model_fields.items()
    ]
    print_table(["setting", "value", "default", "meaning"], rows, empty="")


def load_settings(**overrides: Any) -> Settings:
    """The settings, with those overrides that are not None, for a command that works on the data itself: what it writes
    is its user's alone. Raises Failure that names each wrong one."""
    keep_private()
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        reasons = [f"  GRAFT_{'.'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise Failure("\n".join(["The settings are not valid:", *reasons]), exit_code=EXIT_USAGE) from None


def _port_to_listen_on(chosen: Settings) -> int:
    try:
        # Chosen here and not by the API, so that a restarted API is found at the same address.
        port = chosen.port or free_port(chosen.host)
        if is_port_free(chosen.host, port):
            return port
    except OSError as error:
        raise Failure(f"Cannot listen on {chosen.host}: {error.strerror}.") from error
    raise Failure(
        f"Port {port} of {chosen.host} is in use. Stop what listens there, or choose another with --port; "
        "--port 0 picks a free one."
    )


def _environment(host: str | None = None, port: int | None = None) -> dict[str, str]:
    """This process's environment for the programs it starts, with the address they are to listen on."""
    # A folder called "app" in the working directory must not be taken for ours.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if host is not None:
        environment["GRAFT_HOST"] = host
    if port is not None:
        environment["GRAFT_PORT"] = str(port)
    return environment


def _reachable(host: str) -> str:
    """The name under which this machine reaches a server that listens on `host`."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name


def _wait_until_serving(supervisor: Supervisor, stop_requests: StopRequests, url: str) -> bool:
    """Returns whether the API answers; False when stopping was asked for first. Raises Failure if it cannot start."""
    with Graft(url, api_key="") as graft:
        while not graft.is_alive():
            if stop_requests.wait(LOOK_INTERVAL_SECONDS):
                return False
            if API.name in _look_after(supervisor):
                raise Failure("The API could not start; the lines above say why.")
    return True


def _look_after(supervisor: Supervisor) -> set[str]:
    """Restarts what has crashed, and logs it. Returns the names of the programs that crashed."""
    crashes = supervisor.look_after()
    for crash in crashes:
        structlog.get_logger().error(
            "program.crashed",
            program=crash.name,
            exit_code=crash.exit_code,
            restart_in_seconds=crash.restart_in_seconds,
        )
    return {crash.name for crash in crashes}


def _become(program: Program, environment: dict[str, str]) -> None:
    """Replaces this process, so that signals and exit codes are the program's own."""
    os.execve(program.command[0], list(program.command), environment)


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _shown(value: Any) -> str:
    match value:
        case None | "":
            return "–"
        case SecretStr():
            return "set"
        case frozenset():
            return json.dumps(sorted(value))
        case str() if "://" in value:
            return _masked(value)
        case _:
            return str(value)


def _masked(url: str) -> str:
    """The URL without its password, wherever it stands."""
    without_user_password = re.sub(r"//([^:/@]*):[^/]*@", r"//\1:***@", url)
    return re.sub(r"(?i)([?&]password=)[^&]*", r"\1***", without_user_password)


def _counted(made: Contents) -> str:
    rows = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in made.rows.items() if count)
    return f"{rows or 'no rows'} and {len(made.files) - 1} files ({made.size_bytes / 1e6:,.1f} MB)"
