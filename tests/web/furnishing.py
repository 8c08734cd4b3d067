"""A served Graft in which everything that pages show is there."""

import io
import random
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import httpx
import running

END_WITHIN_SECONDS = 200.0


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


@contextmanager
def furnished_graft(folder: Path) -> Iterator[Furnished]:
    with (
        running.graft_up(folder, allow_downloads="false") as graft,
        httpx.Client(base_url=graft.url, timeout=120) as client,
    ):
        uploaded = client.put("/v1/datasets?name=colours", content=flawed_zip()).json()
        dataset = _ended(client, f"/v1/datasets/{uploaded['id']}")
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
    job = _ended(client, f"/v1/jobs/{queued.json()['id']}")
    assert job["status"] == "succeeded", job
    return job


def _ended(client: httpx.Client, path: str) -> dict[str, Any]:
    """What is there once it is in a final state."""
    deadline = time.monotonic() + END_WITHIN_SECONDS
    while True:
        found: dict[str, Any] = client.get(f"{path}?wait=30").json()
        if found["status"] not in ("processing", "queued", "running"):
            return found
        assert time.monotonic() < deadline, found
