"""From a zip to a served classifier. Read this first: it is the product, in one process and a few seconds.

The HTTP half is the real server; the worker's half is the worker's own two stories, told here one after the other
instead of in processes of their own.
"""

import math
import zipfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

import builders
import httpx
import numpy as np
import pytest
import queue_builders
import torch
from api_builders import RunningServer
from httpx_sse import connect_sse

from app.datasets.manifest import Manifest
from app.datasets.packed import PackedPixels
from app.jobs.states import JobKind
from app.vision import artifact
from app.vision.preprocessing import eval_pixels, normalise
from worker.reporter import Reporter
from worker.run_ingest import run_ingest
from worker.run_job import run_training
from worker.training.loop import predict_logits
from worker.training.pixels import PixelSource, Split
from worker.wakeup import Wakeup

Story = Callable[..., None]

# The cats are larger than the packed side, so that serving has to make the same smaller pictures as ingest did.
CATS = {f"pets/cat/{i}.jpg": builders.jpeg(i, size=(700, 500 + i), tint=(200, 60, 60)) for i in range(11)}
ARCHIVE = builders.zip_of(
    {
        **builders.class_folders(10, root="pets/"),
        **CATS,
        "pets/dog/broken.jpg": builders.jpeg(3)[:200],
        "__MACOSX/pets/cat/._0.jpg": b"junk",
    }
)


def work(server: RunningServer, kind: JobKind, story: Story) -> None:
    """What a worker does with the next job, but for the process around it."""
    services = server.services
    claim = queue_builders.claim_next(services.database, kind=kind)
    assert claim is not None
    shutdown = Wakeup()
    story(
        claim,
        settings=services.settings,
        database=services.database,
        storage=services.storage,
        reporter=Reporter(services.database, claim, shutdown=shutdown),
    )
    shutdown.close()


def test_from_a_zip_to_a_served_classifier(server: RunningServer, client: httpx.Client) -> None:
    dataset = upload_and_ingest(server, client)
    job = train(server, client, dataset)
    watch_what_happened(client, job)
    model = look_at_the_model(client, job, dataset)
    predict_each_validation_image_as_validation_did(server, client, dataset, model)


def upload_and_ingest(server: RunningServer, client: httpx.Client) -> dict[str, Any]:
    uploaded = client.put("/v1/datasets?name=pets&val_fraction=0.3", content=ARCHIVE).json()
    assert uploaded["status"] == "processing"
    refused = client.post("/v1/jobs", json={"dataset": uploaded["id"]})
    assert (refused.status_code, "retry-after" in refused.headers) == (409, True)

    work(server, JobKind.ingest, run_ingest)

    dataset: dict[str, Any] = client.get(f"/v1/datasets/{uploaded['id']}?wait=30").json()
    assert (dataset["status"], dataset["name"], dataset["error"]) == ("ready", "pets", None)
    assert (dataset["num_images"], dataset["num_rejected"]) == (21, 1)
    assert dataset["splits"] == {"train": 15, "val": 6, "test": 0}
    assert dataset["classes"] == [
        {"name": "cat", "train": 8, "val": 3, "test": 0},
        {"name": "dog", "train": 7, "val": 3, "test": 0},
    ]
    assert [rejected["path"] for rejected in dataset["rejected"]] == ["pets/dog/broken.jpg"]
    look_at_the_images(client, dataset)
    return dataset


def look_at_the_images(client: httpx.Client, dataset: dict[str, Any]) -> None:
    images = images_of(client, dataset, {"class": "cat", "split": "val"})

    assert [(image["class"], image["split"]) for image in images] == [("cat", "val")] * 3
    thumbnail = client.get(images[0]["thumbnail"])
    assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/jpeg")
    assert client.get(f"/v1/datasets/{dataset['id']}/images?class=bird").status_code == 404


def images_of(client: httpx.Client, dataset: dict[str, Any], query: dict[str, str]) -> list[dict[str, Any]]:
    """All pages together."""
    images: list[dict[str, Any]] = []
    page: dict[str, Any] = {"last_id": "", "has_more": True}
    while page["has_more"]:
        asked = {**query, "limit": 2, "after": page["last_id"]}
        page = client.get(f"/v1/datasets/{dataset['id']}/images", params=asked).json()
        images += page["data"]
    return images


def train(server: RunningServer, client: httpx.Client, dataset: dict[str, Any]) -> dict[str, Any]:
    request = {
        "dataset": dataset["id"],
        "method": "from_scratch",
        "backbone": "squeezenet1_1",
        "recipe": "classic",
        "seed": 3,
        "hyperparameters": {"epochs": 2, "batch_size": 8, "image_size": 64, "learning_rate": 0.01},
    }
    expected = client.post("/v1/jobs?dry_run=true", json=request).json()
    queued = client.post("/v1/jobs", json=request).json()
    assert (queued["status"], queued["queue_position"], queued["spec"]) == ("queued", 1, expected["spec"])

    work(server, JobKind.training, run_training)

    job: dict[str, Any] = client.get(f"/v1/jobs/{queued['id']}?wait=30").json()
    assert (job["status"], job["attempt"], job["error"]) == ("succeeded", 1, None)
    assert job["progress"]["fraction"] == 1.0
    return job


def watch_what_happened(client: httpx.Client, job: dict[str, Any]) -> None:
    history = client.get(f"/v1/jobs/{job['id']}/history").json()["data"]
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert all(math.isfinite(epoch["train_loss"]) for epoch in history)

    listed = client.get(f"/v1/jobs/{job['id']}/events?limit=200").json()["data"]
    with connect_sse(client, "GET", f"/v1/jobs/{job['id']}/events") as source:
        *streamed, done = source.iter_sse()
    assert [(event.id, event.event) for event in streamed] == [(event["id"], event["event"]) for event in listed]
    assert done.event == "done"
    kinds = [event["event"] for event in listed]
    assert (kinds.count("epoch"), kinds.count("model"), kinds[0], kinds[-1]) == (2, 1, "status", "status")


def look_at_the_model(client: httpx.Client, job: dict[str, Any], dataset: dict[str, Any]) -> dict[str, Any]:
    model: dict[str, Any] = client.get("/v1/models/default").json()
    assert (model["id"], model["job"], model["dataset"]) == (job["model"], job["id"], dataset["id"])
    assert (model["classes"], model["aliases"]) == (["cat", "dog"], ["default"])
    assert model["metrics"]["val_accuracy"] == job["metrics"]["val_accuracy"]

    evaluation = client.get(f"/v1/models/{model['id']}/evaluation").json()
    assert np.sum(evaluation["confusion_matrix"], axis=1).tolist() == [3, 3]
    assert [quality["support"] for quality in evaluation["per_class"]] == [3, 3]
    wrong = round((1 - model["metrics"]["val_accuracy"]) * 6)
    assert len(evaluation["mistakes"]) == wrong
    assert all(client.get(mistake["thumbnail"]).status_code == 200 for mistake in evaluation["mistakes"])
    return model


def predict_each_validation_image_as_validation_did(
    server: RunningServer, client: httpx.Client, dataset: dict[str, Any], model: dict[str, Any]
) -> None:
    """The uploaded files through /predict, against the packed pixels through validation's own function."""
    validated = validation_scores(server, dataset, model)
    images = images_of(client, dataset, {"split": "val"})
    assert {image["id"] for image in images} == set(validated)

    with zipfile.ZipFile(BytesIO(ARCHIVE)) as archive:
        parts = [("file", (image["path"], archive.read(image["path"]))) for image in images]
    answer = client.post("/predict", files=parts).json()

    assert answer["model"] == model["id"]
    for image, prediction in zip(images, answer["predictions"], strict=True):
        scores = {row["label"]: row["score"] for row in prediction["top"]}
        assert scores == pytest.approx(validated[image["id"]], abs=1e-4)
    right = sum(
        prediction["label"] == image["class"] for image, prediction in zip(images, answer["predictions"], strict=True)
    )
    assert right / len(images) == pytest.approx(model["metrics"]["val_accuracy"])
    for mistake in client.get(f"/v1/models/{model['id']}/evaluation").json()["mistakes"]:
        assert validated[mistake["image_id"]][mistake["predicted"]] == pytest.approx(mistake["score"], abs=1e-4)


def validation_scores(
    server: RunningServer, dataset: dict[str, Any], model: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """Image id → class → score, as validation computes them."""
    storage = server.services.storage
    manifest = Manifest.read(storage.path(f"datasets/{dataset['id']}/manifest.jsonl"))
    loaded = artifact.load(storage.path(f"models/{model['id']}"))
    indices = manifest.indices("val")
    pixels = PackedPixels(storage.path(f"datasets/{dataset['id']}/packed-256"))
    split = Split(pixels, indices, manifest.labels[indices])
    logits = predict_logits(
        loaded.classifier,
        PixelSource(split, None, lambda picture: eval_pixels(picture, loaded.preprocessing)),
        normalise=lambda batch: normalise(batch, loaded.preprocessing),
        device=torch.device("cpu"),
    )
    rows = (logits / loaded.temperature).softmax(1).tolist()
    return {
        manifest.records[index].image_id: dict(zip(manifest.classes, row, strict=True))
        for index, row in zip(indices.tolist(), rows, strict=True)
    }
