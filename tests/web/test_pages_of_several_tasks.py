"""A model that tells several things: each has figures and pictures of its own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import httpx
import pytest
from api_builders import RunningServer
from browsing import SIZES, visit
from playwright.sync_api import Browser, expect
from test_pretraining_journey import train, upload

FORECAST = {
    "now": 0.8, "limit": 0.9, "scale": 1.0, "exponent": 0.5, "sentence": "More pictures would help.",
    "twice": {"train_images": 56, "accuracy": 0.85, "accuracy_ci95": [0.8, 0.9]},
    "four_times": {"train_images": 112, "accuracy": 0.87, "accuracy_ci95": [0.8, 0.9]},
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    model: str
    job: str
    evaluation: dict[str, Any]


@pytest.fixture
def trained(server: RunningServer, client: httpx.Client) -> Trained:
    """Of colour and light, with figures that no two of its tasks share, and a test split's beside them."""
    dataset = upload(server, client, builders.two_tasks(40), val_fraction="0.3")
    request = {"dataset": dataset["id"], "method": "feature_extraction", "hyperparameters": {"image_size": 64}}
    job = train(server, client, **request)
    path = server.services.storage.path(f"models/{job['model']}/evaluation.json")
    evaluation = json.loads(path.read_bytes())
    for task, tested, before in (("colour", 0.51, 0.31), ("light", 0.62, 0.42)):
        found = evaluation["tasks"][task]
        found |= {"expected_calibration_error_uncalibrated": before, "warnings": [f"Few pictures of {task}."]}
        found["test"] = {**found, "accuracy": tested}
    evaluation |= {**evaluation["tasks"]["colour"], "tasks": evaluation["tasks"], "forecast": FORECAST}
    path.write_text(json.dumps(evaluation))
    return Trained(job["model"], job["id"], evaluation)


@pytest.mark.parametrize(
    ("task", "tested", "before"),
    [("", "51.0 %", "31.0 %"), ("colour", "51.0 %", "31.0 %"), ("light", "62.0 %", "42.0 %")],
)
def test_each_task_has_its_own_figures(
    client: httpx.Client, trained: Trained, task: str, tested: str, before: str
) -> None:
    page = client.get(f"/models/{trained.model}", params={"task": task} if task else {}).text

    assert f"<strong>{tested}</strong> on test" in page
    assert f"before: {before}" in page
    other = {"light": "colour"}.get(task, "light")
    assert (page.count(f"Few pictures of {task or 'colour'}."), page.count(f"Few pictures of {other}.")) == (1, 0)
    assert ("More pictures would help." in page) == (task != "light")


def test_what_the_job_warned_of_is_told_once(client: httpx.Client, trained: Trained) -> None:
    warned = client.get(f"/v1/models/{trained.model}").json()["metrics"]["validation_warning"]

    assert warned not in client.get(f"/models/{trained.model}").text


@pytest.mark.parametrize("size", SIZES)
def test_the_pictures_that_are_right_are_those_of_the_task(
    browser: Browser, server: RunningServer, trained: Trained, size: str
) -> None:
    found = trained.evaluation["tasks"]["light"]
    with visit(browser, server.url, size) as page:
        page.goto(f"/models/{trained.model}?task=light")
        for place, name in enumerate(found["classes"]):
            count = found["confusion_matrix"][place][place]
            page.get_by_label(f"{name} taken for {name}: {count}").click()
            expect(page.locator("#cell h3")).to_contain_text(f"{name} told right: {count} picture")
            expect(page.locator("#cell img")).to_have_count(count)
            paths = page.locator("#cell img").evaluate_all("images => images.map(image => image.alt)")
            assert {int(path.removesuffix(".jpg")) // 2 % 2 for path in paths} == {found["classes"].index(name)}


def test_the_label_to_correct_is_that_of_the_chosen_task(
    browser: Browser, server: RunningServer, trained: Trained, tmp_path: Path
) -> None:
    picture = builders.written(tmp_path / "one.jpg", builders.jpeg(999, tint=(0, 0, 110)))
    with visit(browser, server.url) as page:
        page.goto("/try")
        page.get_by_label("Keep the picture on the server").check()
        page.locator("[data-pictures]").set_input_files(picture)
        label = page.get_by_label("What is it really?")
        expect(label).to_have_value("blue")
        page.get_by_label("Of what").select_option("light")
        expect(label).to_have_value("dark")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Kept: dark.")).to_be_visible()
