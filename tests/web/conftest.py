"""A browser, and a served Graft in which everything that pages show is there."""

import io
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import httpx
import pytest
import running
from browsing import ARGUMENTS, chromium_path
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(playwright), args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass(frozen=True)
class Furnished:
    """A running server with a data set that has flaws, two finished jobs and their models."""

    url: str
    dataset: str
    jobs: tuple[str, str]
    models: tuple[str, str]

    @property
    def pages(self) -> dict[str, str]:
        """Every page, by a name."""
        first, second = self.jobs
        return {
            "home": "/",
            "datasets": "/datasets",
            "dataset": f"/datasets/{self.dataset}",
            "pictures": f"/datasets/{self.dataset}/images",
            "jobs": "/jobs",
            "new job": f"/jobs/new?dataset={self.dataset}",
            "job": f"/jobs/{first}",
            "comparison": f"/jobs/compare?job={first}&job={second}",
            "models": "/models",
            "model": f"/models/{self.models[1]}",
            "try": "/try",
            "sign in": "/sign-in",
            "failure": "/models/mdl_none",
        }


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Furnished]:
    with (
        running.graft_up(tmp_path_factory.mktemp("graft"), allow_downloads="false") as graft,
        httpx.Client(base_url=graft.url, timeout=120) as client,
    ):
        uploaded = client.put("/v1/datasets?name=colours", content=flawed_zip()).json()
        dataset = client.get(f"/v1/datasets/{uploaded['id']}?wait=60").json()
        assert dataset["status"] == "ready", dataset
        jobs = [_trained(client, dataset["id"], seed=seed) for seed in (0, 1)]
        first, second = jobs
        yield Furnished(graft.url, dataset["id"], (first["id"], second["id"]), (first["model"], second["model"]))


def flawed_zip() -> bytes:
    """Two classes, split by the archive, with copies across the split and across the classes, and broken files."""
    chance = random.Random(7)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for label, name in enumerate(("red", "blue")):
            for split, count in (("train", 16), ("val", 8)):
                for index in range(count):
                    picture = running.picture(label, chance=chance)
                    archive.writestr(f"{split}/{name}/{index:03}.png", picture)
                    if index == 0 and split == "train":
                        archive.writestr(f"val/{name}/copy.png", picture)
                        archive.writestr(f"train/{('blue', 'red')[label]}/stray-{name}.png", picture)
        archive.writestr("train/red/broken.jpg", builders.jpeg(3)[:200])
        archive.writestr("train/red/notes.txt", "no picture")
    return packed.getvalue()


def _trained(client: httpx.Client, dataset: str, *, seed: int) -> dict[str, Any]:
    request = {
        "dataset": dataset,
        "method": "fine_tuning",
        "backbone": "graft_small",
        "seed": seed,
        "promote": "always",
        "hyperparameters": {"epochs": 2 + seed, "image_size": 64},
    }
    queued = client.post("/v1/jobs", json=request)
    assert queued.status_code == 201, queued.text
    job: dict[str, Any] = client.get(f"/v1/jobs/{queued.json()['id']}?wait=60").json()
    assert job["status"] == "succeeded", job
    return job


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """A folder as a person has it: colours/red/000.png and so on."""
    chance = random.Random(3)
    for label, name in enumerate(("red", "blue")):
        folder = tmp_path / "colours" / name
        folder.mkdir(parents=True)
        for index in range(12):
            (folder / f"{index:03}.png").write_bytes(running.picture(label, chance=chance))
    (tmp_path / "colours" / ".DS_Store").write_bytes(b"junk")
    return tmp_path / "colours"
