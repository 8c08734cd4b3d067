"""settings, migrate, keys, and what `graft up` refuses; against real databases."""

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import graft_up
from scripted_server import Result, ScriptedServer
from sqlalchemy import select

from app.db.engine import Database
from app.db.tables import AuditRow
from app.settings import Settings

Graft = Callable[..., Result]
DOCKERFILE = (Path(__file__).resolve().parents[2] / "Dockerfile").read_text()


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def test_settings_shows_every_setting_with_its_meaning(graft: Graft) -> None:
    result = graft("settings")

    shown = [line.split()[0] for line in result.output.splitlines()[1:] if line.startswith("GRAFT_")]
    assert shown == [f"GRAFT_{name.upper()}" for name in Settings.model_fields]
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_shows_value_and_default(graft: Graft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_PORT", "8123")

    line = next(line for line in graft("settings").output.splitlines() if line.startswith("GRAFT_PORT"))

    assert line.split()[:3] == ["GRAFT_PORT", "8123", "8000"]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://graft:s3cret@db/graft", "postgresql://graft:***@db/graft"),
        ("postgresql://graft:s3@cret@db/graft", "postgresql://graft:***@db/graft"),
        ("postgresql://db/graft?user=graft&password=s3cret", "postgresql://db/graft?user=graft&password=***"),
    ],
)
def test_settings_masks_passwords(graft: Graft, monkeypatch: pytest.MonkeyPatch, url: str, shown: str) -> None:
    monkeypatch.setenv("GRAFT_DATABASE_URL", url)

    result = graft("settings")

    assert shown in result.output
    assert "cret" not in result.output


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("GRAFT_PORT", "70000", "Input should be less than or equal to 65535"),
        ("GRAFT_STORAGE_URL", "s3://bucket", "Value error, only file:// addresses are supported"),
    ],
)
def test_a_wrong_setting_is_named(
    graft: Graft, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)

    result = graft("up")

    assert result.exit_code == 2
    assert result.errors == f"The settings are not valid:\n  {name}: {reason}\n"


def test_dotenv_may_hold_what_commands_need_and_what_is_not_ours(
    server: ScriptedServer, graft: Graft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("GRAFT_URL", "GRAFT_API_KEY"):
        monkeypatch.setenv(name, "")  # remembered, so that what is read from the file does not outlive this test
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(f"GRAFT_URL={server.url}\nGRAFT_API_KEY=sesame\nGRAFT_PORT=8123\nOTHER=3\n")
    server.answers["GET", "/v1/jobs"] = (200, {"data": [], "has_more": False, "first_id": None, "last_id": None})

    settings, jobs = graft("settings"), graft("jobs", "list")

    assert (settings.exit_code, jobs.exit_code) == (0, 0), settings.errors + jobs.errors
    assert "8123" in settings.output
    assert "sesame" not in settings.output
    assert server.requests[-1].headers["Authorization"] == "Bearer sesame"


def test_dotenv_with_a_name_that_is_no_setting_is_refused(
    graft: Graft, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("GRAFT_PROT=8123\n")

    result = graft("settings")

    assert (result.exit_code, result.errors) == (
        2,
        "The settings are not valid:\n  GRAFT_PROT: Extra inputs are not permitted\n",
    )


def test_migrate_makes_the_database_and_may_be_repeated(graft: Graft, data_folder: Path) -> None:
    first, second = graft("migrate"), graft("migrate")

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert (data_folder / "graft.db").exists()


@pytest.mark.parametrize("name", ["feature%2Fpets", "pets?", "a b#c@d:e"])
def test_the_folders_may_have_any_name(
    graft: Graft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GRAFT_DATA_DIR", str(tmp_path / name / "data"))
    created = graft("workspaces", "create", "lab")
    backed_up = graft("backup", str(tmp_path / name / "backup"))
    monkeypatch.setenv("GRAFT_DATA_DIR", str(tmp_path / name / "restored"))
    restored = graft("restore", str(tmp_path / name / "backup"))

    assert [result.exit_code for result in (created, backed_up, restored)] == [0, 0, 0], restored.errors
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "data" / "graft.db").exists()
    assert "lab" in graft("workspaces", "list").output


def test_a_key_is_shown_once_and_can_be_revoked(graft: Graft) -> None:
    created = graft("keys", "create", "--scope", "predict", "--scope", "train", "--name", "lab", "--expires-days", "30")
    token = created.output.strip()
    key_id = f"key_{token.split('_')[1]}"

    assert created.exit_code == 0
    assert token not in graft("keys", "list").output
    row = graft("keys", "list").output.splitlines()[1].split()
    assert row[:5] == [key_id, "lab", "default", "predict", "train"]
    assert graft("keys", "revoke", key_id).output == f"Revoked {key_id}.\n"
    assert "revoked" in graft("keys", "list").output
    again = graft("keys", "revoke", key_id)
    assert again.exit_code == 1


def test_workspaces_have_keys_and_limits_of_their_own(graft: Graft) -> None:
    assert "graft keys create" in graft("workspaces", "create", "lab", "--max-bytes", "5000000").output
    assert graft("workspaces", "limit", "lab", "--max-unfinished-jobs", "2").output == "Changed lab.\n"
    first, lab = graft("workspaces", "list").output.splitlines()[1:]
    assert first.split()[0] == "default" and "0 of no limit" in first
    assert "0.0 MB of 5,000,000" in lab and "0 of 2" in lab
    graft("workspaces", "limit", "lab", "--reset")
    assert "0.0 MB of no limit" in graft("workspaces", "list").output.splitlines()[2]

    graft("keys", "create", "--scope", "train", "--workspace", "lab")
    assert graft("keys", "list").output.splitlines()[1].split()[1] == "lab"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("workspaces", "create", "default"), "There is a workspace default already."),
        (("workspaces", "create", "No Spaces"), "small letters"),
        (("workspaces", "limit", "nobody"), "no workspace nobody"),
        (("workspaces", "delete", "nobody", "--yes"), "no workspace nobody"),
        (("workspaces", "delete", "default", "--yes"), "it stays"),
        (("keys", "create", "--scope", "train", "--workspace", "nobody"), "no workspace nobody"),
    ],
)
def test_workspaces_that_cannot_be_are_refused(graft: Graft, command: tuple[str, ...], said: str) -> None:
    refused = graft(*command)
    assert refused.exit_code == 1 and said in refused.errors


def test_a_workspace_is_deleted_by_whoever_types_its_name(graft: Graft, monkeypatch: pytest.MonkeyPatch) -> None:
    graft("workspaces", "create", "lab")
    for typed, exit_code in (("lap\n", 1), ("", 1), ("lab\n", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        result = graft("workspaces", "delete", "lab")
        assert (result.exit_code, "0 jobs" in result.errors) == (exit_code, True)
    assert result.output == "Deleted lab.\n"
    assert len(graft("workspaces", "list").output.splitlines()) == 2


def test_a_workspace_with_the_only_keys_is_not_deleted(graft: Graft) -> None:
    graft("workspaces", "create", "lab")
    graft("keys", "create", "--scope", "train", "--workspace", "lab")

    assert "graft keys create --scope admin" in graft("workspaces", "delete", "lab", "--yes").errors
    graft("keys", "create", "--scope", "admin")
    assert graft("workspaces", "delete", "lab", "--yes").exit_code == 0


def test_what_is_done_at_the_command_line_is_in_the_audit_log(graft: Graft, data_folder: Path) -> None:
    graft("workspaces", "create", "lab")
    graft("keys", "create", "--scope", "train", "--workspace", "lab")
    key_id = graft("keys", "list").output.splitlines()[1].split()[0]
    graft("keys", "revoke", key_id)

    database = Database(f"sqlite:///{data_folder / 'graft.db'}")
    with database.read() as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.seq)).all()
    database.dispose()
    assert [row.action for row in rows] == ["graft workspaces create", "graft keys create", "graft keys revoke"]
    assert [row.changed for row in rows[1:]] == [[key_id], [key_id]]


def test_without_keys_the_list_says_how_to_make_one(graft: Graft) -> None:
    assert graft("keys", "list").output == "There are no keys; `graft keys create --scope admin` makes one.\n"


@pytest.mark.parametrize(
    "command",
    [
        ("workspaces", "create", "lab", "--max-bytes", str(2**63)),
        ("workspaces", "create", "lab", "--max-predictions-per-day", str(2**63)),
        ("workspaces", "limit", "default", "--max-unfinished-jobs", str(2**31)),
        ("keys", "create", "--scope", "admin", "--expires-days", "99999999"),
    ],
)
def test_numbers_that_no_database_holds_are_refused(graft: Graft, command: tuple[str, ...]) -> None:
    result = graft(*command)

    assert (result.exit_code, result.output) == (2, "")
    assert f"Invalid value for '{command[-2]}'" in result.errors


def test_an_unknown_scope_is_refused(graft: Graft) -> None:
    assert graft("keys", "create", "--scope", "everything").exit_code == 2


def test_up_refuses_a_port_that_is_taken(graft: Graft) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = graft("up", "--port", str(port))

    assert result.exit_code == 1
    assert result.errors == (
        f"Port {port} of 127.0.0.1 is in use. Stop what listens there, or choose another with --port; "
        "--port 0 picks a free one.\n"
    )


def test_up_refuses_an_address_that_is_not_this_machines(graft: Graft) -> None:
    result = graft("up", "--host", "192.0.2.1")

    assert (result.exit_code, result.errors) == (1, "Cannot listen on 192.0.2.1: Cannot assign requested address.\n")


@pytest.mark.slow
def test_up_sends_nobodys_key_to_the_server_that_it_starts(tmp_path: Path) -> None:
    with graft_up(tmp_path, api_key="ft_\u00e9") as running:
        assert running.stop() == 0

    assert "Traceback" not in (tmp_path / "graft.log").read_text()


def container_is_healthy(main_command: list[str], **environment: str) -> bool:
    """What the image's health check says of a container with this command."""
    [check] = re.findall(r"^HEALTHCHECK .*?^    CMD (.*?[^\\])$", DOCKERFILE, flags=re.DOTALL | re.MULTILINE)
    with subprocess.Popen(main_command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as main:
        try:
            own = ["sh", "-c", check.replace("/proc/1/", f"/proc/{main.pid}/")]
            python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
            return subprocess.run(own, env=python | environment, check=False).returncode == 0
        finally:
            main.kill()


def test_a_container_is_healthy_while_its_server_answers_at_its_port(server: ScriptedServer) -> None:
    up = [sys.executable, "-c", "import time; time.sleep(60)", "graft", "up"]
    port = server.url.rpartition(":")[2]
    proxy = "http://127.0.0.1:1"

    server.answers["GET", "/healthz"] = (200, {})
    assert container_is_healthy(up, GRAFT_PORT=port, http_proxy=proxy)
    assert len(server.requests) == 1
    server.answers["GET", "/healthz"] = (503, {})
    assert not container_is_healthy(up, GRAFT_PORT=port)
    assert not container_is_healthy(up, GRAFT_PORT="1")


@pytest.mark.parametrize("command", [["-m", "worker.main"], ["-c", "import time; time.sleep(60)", "graft", "worker"]])
def test_a_worker_in_a_container_is_healthy_without_a_port(command: list[str]) -> None:
    assert container_is_healthy([sys.executable, *command], GRAFT_PORT="1")
