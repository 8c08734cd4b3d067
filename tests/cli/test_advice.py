"""What goes wrong most often, at a real server, and what the command says to do next."""

from collections.abc import Callable, Iterator
from pathlib import Path

import api_builders
import pytest
from api_builders import RunningServer
from scripted_server import Result

from app import access
from app.access import Scope

Graft = Callable[..., Result]


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """A server that wants a key, and nobody has set one."""
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    with api_builders.running(api_builders.settings_for(tmp_path)) as server:
        key_of(server, Scope.admin)
        monkeypatch.setenv("GRAFT_URL", server.url)
        yield server


def key_of(server: RunningServer, scope: Scope) -> str:
    with server.services.database.write() as session:
        return access.create_key(session, scopes=[scope], name=None, expires_at=None).token


def test_without_a_key(guarded: RunningServer, graft: Graft) -> None:
    result = graft("jobs", "list")

    assert result.exit_code == 1
    assert "Send your API key" in result.errors
    assert result.errors.endswith("there, `graft keys create --scope train` makes one.\n")


@pytest.mark.parametrize("key", ["nonsense", "ft_0000000000000000_wrong"])
def test_with_a_wrong_key(guarded: RunningServer, graft: Graft, key: str) -> None:
    result = graft("jobs", "list", "--api-key", key)

    assert result.exit_code == 1
    assert "Set GRAFT_API_KEY to a key of this server" in result.errors
    assert key not in result.errors


def test_with_a_key_that_is_none(guarded: RunningServer, graft: Graft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "ft_secr\u00e9t")

    result = graft("jobs", "list")

    assert (result.exit_code, result.output) == (1, "")
    assert result.errors.startswith("The API key is none")
    assert "ft_" not in result.errors


def test_with_a_key_that_may_not_do_this(guarded: RunningServer, graft: Graft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", key_of(guarded, Scope.predict))

    result = graft("train", "ds_1")

    assert result.exit_code == 1
    assert result.errors.endswith(
        "Set GRAFT_API_KEY to a key that may do this; there, `graft keys create --scope …` makes one.\n"
    )


def test_with_the_right_key(guarded: RunningServer, graft: Graft) -> None:
    result = graft("jobs", "list", "--url", guarded.url, "--api-key", key_of(guarded, Scope.train))

    assert result.exit_code == 0
    # The server, in this process, writes its log there too.
    assert result.output.endswith("There are no jobs; `graft train ARCHIVE_OR_FOLDER` makes one.\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["jobs", "show", "job_1"], "There is no job with this id; `graft jobs list` lists them."),
        (["batches", "results", "batch_1"], "There is no batch with this id; `graft batches list` lists them."),
        (["datasets", "show", "ds_1"], "There is no such data set; `graft datasets list` lists those there are."),
        (["models", "show", "mdl_1"], "There is no model with this id or alias; `graft models list` lists the models."),
    ],
)
def test_an_unknown_id_comes_with_the_command_that_lists_them(
    guarded: RunningServer, graft: Graft, arguments: list[str], said: str
) -> None:
    api_builders.register_model(guarded.services)

    result = graft(*arguments, "--api-key", key_of(guarded, Scope.train))

    assert (result.exit_code, result.errors) == (1, f"{said}\n")


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("http://127.0.0.1:1", "Start one with `graft up`, or name another with --url or GRAFT_URL."),
        ("http://graft.invalid", "Is it running, and is that its address? --url or GRAFT_URL names another."),
        ("ftp://graft.invalid", "Is it running, and is that its address? --url or GRAFT_URL names another."),
    ],
)
def test_without_a_server(graft: Graft, url: str, advice: str) -> None:
    result = graft("jobs", "list", "--url", url)

    assert (result.exit_code, result.output) == (3, "")
    assert result.errors.startswith(f"No Graft server answers at {url} (")
    assert result.errors.endswith(f"). {advice}\n")


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["trian", "flowers/"], "Did you mean 'train'?"),
        (["train", "flowers/", "--epoch", "3"], "--epochs"),
        (["train", "flowers/", "--method", "finetuning"], "'fine_tuning'"),
    ],
)
def test_mistyped(graft: Graft, arguments: list[str], advice: str) -> None:
    result = graft(*arguments)

    assert result.exit_code == 2
    assert advice in result.errors
