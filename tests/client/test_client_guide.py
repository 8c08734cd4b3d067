"""Runs the code of docs/client.md, in its order, as its reader would: at a real server with a real worker."""

import contextlib
import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from running import graft_up, picture

from graft_client import Dataset, Graft, Job, Model

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "client.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE, flags=re.DOTALL | re.MULTILINE)
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.slow
def test_the_code_of_the_guide_runs_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, name in enumerate(("daisy", "rose")):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        (tmp_path / f"{name}.jpg").write_bytes(picture(label, chance=random.Random(100 + label)))
        for index in range(12):
            encoded = picture(label, chance=random.Random(12 * label + index))
            (tmp_path / "flowers" / name / f"{index}.png").write_bytes(encoded)
    monkeypatch.chdir(tmp_path)
    said, names = io.StringIO(), dict[str, Any](__name__="guide")
    with graft_up(tmp_path) as running, contextlib.redirect_stdout(said):
        for block in BLOCKS:
            assert_speaks_of_this_machine(block)
            exec(block.replace(ADDRESS, running.url), names)
        names["graft"].close()

    assert isinstance(names["dataset"], Dataset)
    assert isinstance(names["job"], Job)
    assert isinstance(names["model"], Model)
    lines = said.getvalue().splitlines()
    assert lines[0] == "24 ['daisy', 'rose']"
    assert lines[2] == "daisy"
    assert "a name rose" in lines
    assert "#/hyperparameters/epochs must be an integer from 1 to 1000" in lines
    assert lines[-1] == "['daisy', 'rose']"
    assert (tmp_path / "results.csv").read_text().startswith("path,label,score,error")


def assert_speaks_of_this_machine(block: str) -> None:
    assert set(re.findall(r"https?://[^\"]*", block)) <= {ADDRESS}


@pytest.mark.slow
def test_following_goes_on_when_the_server_is_killed_and_restarted(tmp_path: Path) -> None:
    for label in range(2):
        (tmp_path / "pets" / str(label)).mkdir(parents=True)
        for index in range(8):
            encoded = picture(label, chance=random.Random(8 * label + index))
            (tmp_path / "pets" / str(label) / f"{index}.png").write_bytes(encoded)
    with graft_up(tmp_path) as running, Graft(running.url, patience_seconds=90.0) as graft:
        dataset = graft.datasets.wait(graft.datasets.upload(tmp_path / "pets").id)
        options = {"epochs": 6, "image_size": 64, "augmentation": "none", "early_stopping_patience": None}
        job = graft.jobs.create(dataset.id, method="full_fine_tuning", backbone="graft_small", hyperparameters=options)
        seen: list[str] = []
        epochs: list[int] = []
        for event in graft.jobs.follow(job.id):
            seen.append(event.id)
            if event.event == "epoch":
                epochs.append(event.data["epoch"])
                if event.data["epoch"] == 1:
                    running.program("app.main").kill()  # `graft up` starts it again

        assert graft.jobs.get(job.id).status == "succeeded"
        logged = [event.id for event in graft.jobs.events(job.id, limit=200)]
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert seen == sorted(set(seen), key=int)
    # Older progress is dropped from the log; what is there has been seen.
    assert set(logged) <= set(seen)
