"""Runs the README's commands, in its order, as its reader would.

Commands that go on until Ctrl-C run in the background. What a reader fills in is filled in: `ds_…` and `job_…` with the
ids that the answers before gave. The port is another one, so that a server already running here is left alone.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from running import RunningGraft, environment_for, graft_up, picture, pictures_zip, wait_until

from app.cli import main
from app.supervisor import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()

COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
[PROGRAM] = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
OF_MAKE = [command for command in COMMANDS if command.startswith("make ")]
UNTIL_CTRL_C = [".venv/bin/graft up"]
TO_RUN = [command for command in COMMANDS if command not in OF_MAKE + UNTIL_CTRL_C]


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[tuple[Path, RunningGraft]]:
    """A reader's folder, with the pictures the README speaks of, and the server it says to start."""
    # The folder of the command, wherever this test runs from: the README says .venv/bin.
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "graft").symlink_to(Path(sys.executable).parent / "graft")
    # The fewest pictures that can be split: without pretrained weights they are trained on for a hundred epochs.
    (tmp_path / "flowers.zip").write_bytes(pictures_zip(per_class=4))
    shutil.unpack_archive(tmp_path / "flowers.zip", tmp_path / "flowers")
    (tmp_path / "daisy.jpg").write_bytes(picture(0, chance=random.Random(5)))
    with graft_up(tmp_path, port=free_port("127.0.0.1")) as running:
        yield tmp_path, running


def test_the_readme_leads_with_the_demo_the_server_and_curl() -> None:
    assert COMMANDS[:2] == ["make demo", ".venv/bin/graft up"]
    assert [command.split()[0] for command in COMMANDS[2:6]] == ["curl", "curl", "curl", ".venv/bin/graft"]


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE))

    assert {command.split()[1] for command in OF_MAKE} <= targets


def test_every_graft_command_that_the_readme_mentions_exists() -> None:
    mentioned = {tuple(words.split()) for words in re.findall(r"graft ((?:[a-z]+ ?){1,2})", "\n".join(inline_code()))}

    missing = [words for words in sorted(mentioned) if not has_command(words)]

    assert missing == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's commands need curl; installed by .ci/run")
def test_the_commands_of_the_readme_work_in_its_order(reader: tuple[Path, RunningGraft]) -> None:
    folder, graft = reader
    ids: dict[str, str] = {}
    answers: dict[str, str] = {}
    for command in TO_RUN:
        ran = subprocess.run(
            ["bash", "-c", filled_in(command, ids, graft.url)],
            cwd=folder,
            env=environment_for(folder / "data") | {"GRAFT_URL": graft.url},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
        answers[command] = ran.stdout
        if command.startswith("curl"):
            answer = json.loads(ran.stdout)
            assert "error" not in answer or answer["error"] is None, f"{command}\n{ran.stdout}"
            remember_id(answer, ids)

    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=environment_for(folder / "data") | {"GRAFT_URL": graft.url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.stdout.strip() in ("colour0", "colour1"), ran.stderr) == (True, "")

    [job_line] = [command for command in TO_RUN if "/v1/jobs?wait" in command]
    assert json.loads(answers[job_line])["status"] == "succeeded"
    [predict_line] = [command for command in TO_RUN if command.endswith("/predict")]
    [prediction] = json.loads(answers[predict_line])["predictions"]
    assert {entry["label"] for entry in prediction["top"]} == {"colour0", "colour1"}


def inline_code() -> list[str]:
    return re.findall(r"`(graft [^`]+)`", README) + [c.removeprefix(".venv/bin/") for c in COMMANDS if "/graft " in c]


def has_command(words: tuple[str, ...]) -> bool:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    return ended.value.code == 0


def filled_in(command: str, ids: dict[str, str], url: str) -> str:
    for prefix, known in ids.items():
        command = command.replace(f"{prefix}_…", known)
    assert "…" not in command, f"nothing before it gives an id for {command}"
    return command.replace("localhost:8000", url.removeprefix("http://"))


def remember_id(answer: dict[str, Any], ids: dict[str, str]) -> None:
    if "id" in answer:
        ids[answer["id"].partition("_")[0]] = answer["id"]


@pytest.mark.slow
def test_the_demo_ends_by_itself_when_asked_to(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "app.cli", "demo", "--exit"],
        cwd=tmp_path,
        env=environment_for(tmp_path / "data"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    found = re.search(r"^([0-9]+) of 200 pictures kept from training are right", ran.stdout, flags=re.MULTILINE)
    assert found is not None, ran.stdout
    assert "graft_small" in ran.stdout
    # 20 would be right by chance.
    assert int(found[1]) > 180


@pytest.mark.slow
@pytest.mark.parametrize(("number", "is_serving", "exit_code"), [(signal.SIGINT, True, 0), (signal.SIGHUP, False, 130)])
def test_the_demo_goes_on_until_ctrl_c_or_its_terminal_is_closed_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, is_serving: bool, exit_code: int
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "app.cli", "demo"],
        cwd=tmp_path,
        env=environment_for(tmp_path / "data") | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as demo:
        assert demo.stdout is not None
        lines = []
        awaited = "Graft goes on serving at " if is_serving else "graft up --port "
        for line in demo.stdout:
            lines.append(line)
            if line.startswith(awaited):
                break
        assert lines[-1].startswith(awaited), "".join(lines)
        left = psutil.Process(demo.pid).children(recursive=True)
        os.kill(demo.pid, number)
        assert demo.wait(timeout=60) == exit_code

    wait_until(
        lambda: not any(process.is_running() for process in left), within_seconds=10, otherwise="a process is left"
    )
