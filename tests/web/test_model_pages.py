"""Models: where one errs, which one answers, and how to call it; then trying one, in every way to show it a picture."""

import random
import re
import subprocess
from pathlib import Path

import api_builders
import httpx
import numpy as np
import pytest
import running
from api_builders import RunningServer
from browsing import SIZES, visit
from furnishing import Furnished
from playwright.sync_api import Browser, Page, expect

from app.vision.reference import Reference

pytestmark = pytest.mark.slow


def evaluation_of(furnished: Furnished) -> dict[str, object]:
    found: dict[str, object] = httpx.get(f"{furnished.url}/v1/models/{furnished.models[1]}/evaluation").json()
    return found


@pytest.mark.parametrize("size", SIZES)
def test_each_cell_of_the_confusion_matrix_shows_its_pictures(
    browser: Browser, furnished: Furnished, size: str
) -> None:
    counts = np.array(evaluation_of(furnished)["confusion_matrix"])
    with visit(browser, furnished.url, size) as page:
        page.goto(f"/models/{furnished.models[1]}")
        for true, predicted in np.argwhere(counts).tolist():
            names = ("blue", "red")
            count = counts[true, predicted]
            page.get_by_label(f"{names[true]} taken for {names[predicted]}: {count}").click()
            told = "told right" if true == predicted else f"taken for {names[predicted]}"
            expect(page.locator("#cell h3")).to_contain_text(f"{names[true]} {told}: {count} picture")
            expect(page.locator("#cell img")).to_have_count(int(count))
        mistakes = page.locator("section", has=page.get_by_role("heading", name="Worst mistakes"))
        assert mistakes.locator("img").count() == counts.sum() - np.trace(counts)


def test_figures_come_with_intervals_and_as_drawings(browser: Browser, furnished: Furnished) -> None:
    told = evaluation_of(furnished)
    bins = told["reliability"]
    assert isinstance(bins, list)
    assert sum(each["images"] for each in bins) == told["images"]
    with visit(browser, furnished.url) as page:
        page.goto(f"/models/{furnished.models[1]}")
        expect(page.get_by_label("Figures", exact=True)).to_contain_text(re.compile(r"% accuracy \d+ to \d+ %"))
        drawn = page.get_by_role("img", name=re.compile("Share that is right by score"))
        expect(drawn.locator("rect")).to_have_count(len(bins))
        expect(page.get_by_role("region", name="Figures of each class").get_by_role("row", name="red")).to_be_visible()


def test_reliability_is_what_the_calibration_error_is_made_of(furnished: Furnished) -> None:
    told = evaluation_of(furnished)
    gaps = [each["images"] * abs(each["accuracy"] - each["confidence"]) for each in told["reliability"]]  # type: ignore[attr-defined]

    assert sum(gaps) / told["images"] == pytest.approx(told["expected_calibration_error"], abs=1e-4)  # type: ignore[operator]


def test_the_default_is_promoted_and_rolled_back(browser: Browser, furnished: Furnished) -> None:
    first, second = furnished.models

    def default() -> str:
        model: str = httpx.get(f"{furnished.url}/v1/models/default").json()["id"]
        return model

    httpx.put(f"{furnished.url}/v1/aliases/default", json={"model": second}, timeout=60)
    with visit(browser, furnished.url) as page:
        page.goto(f"/models/{first}")
        page.get_by_role("button", name="Make it the default").click()
        expect(page.locator(".title .alias")).to_have_text("default")
        assert default() == first
        page.get_by_role("button", name=re.compile("^Roll back to")).click()
        page.wait_for_url(re.compile(second))
        assert default() == second


def test_the_line_for_curl_works_and_the_card_is_downloaded(
    browser: Browser, furnished: Furnished, tmp_path: Path
) -> None:
    (tmp_path / "picture.jpg").write_bytes(running.picture(0, chance=random.Random(5)))
    with visit(browser, furnished.url) as page:
        page.goto(f"/models/{furnished.models[1]}")
        [line] = [text for text in page.locator("pre").all_text_contents() if text.startswith("curl")]
        with page.expect_download() as download:
            page.get_by_role("link", name="Model card").click()
        card = download.value.path().read_text()

    answer = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert '"label":"red"' in answer
    assert furnished.models[1] in card


def answered(page: Page, label: str) -> None:
    expect(page.locator(".answer h2").first).to_contain_text(label)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_is_chosen_pasted_or_taken(browser: Browser, furnished: Furnished, tmp_path: Path, size: str) -> None:
    picture = tmp_path / "one.png"
    picture.write_bytes(running.picture(0, chance=random.Random(5)))
    with visit(browser, furnished.url, size, permissions=["camera"]) as page:
        page.goto("/try")
        page.locator("[data-pictures]").set_input_files(picture)
        answered(page, "red")
        page.goto("/try")
        page.evaluate(
            """async (pixels) => {
                const picture = new File([new Uint8Array(pixels)], "pasted.png", { type: "image/png" });
                const carried = new DataTransfer();
                carried.items.add(picture);
                window.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried }));
            }""",
            list(running.picture(1, chance=random.Random(6))),
        )
        answered(page, "blue")
        page.goto("/try")
        page.get_by_role("button", name="Camera").click()
        page.get_by_role("button", name="Take it").click()
        expect(page.locator(".answer figcaption").first).to_have_text("camera.jpg")
        expect(page.locator("video")).to_be_hidden()


def test_what_is_asked_for_is_answered_anew_when_it_changes(
    browser: Browser, furnished: Furnished, tmp_path: Path
) -> None:
    paths = [tmp_path / name for name in ("one.png", "two.png")]
    for label, path in enumerate(paths):
        path.write_bytes(running.picture(label, chance=random.Random(label)))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with visit(browser, furnished.url) as page:
        page.goto("/try")
        page.locator("[data-pictures]").set_input_files([*paths, tmp_path / "torn.png"])
        expect(page.locator(".answer")).to_have_count(3)
        expect(page.locator(".answer").nth(2).get_by_role("alert")).to_contain_text("torn.png cannot be read")
        expect(page.get_by_text("With 90 % certainty one of")).to_have_count(2)
        page.get_by_label("A set of classes that holds the true one").select_option("not wanted")
        expect(page.get_by_text("certainty one of")).to_have_count(0)
        page.get_by_label("Show where the label was seen").uncheck()
        expect(page.locator(".answer .seen figure")).to_have_count(2)


def test_a_picture_unlike_all_of_training_is_told_to_be_strange(
    browser: Browser, server: RunningServer, tmp_path: Path
) -> None:
    chance = np.random.default_rng(0)
    # Training pictures that look nearly the same to the network, and like nothing that it is shown.
    features = (1000 + chance.standard_normal((52, 512))).astype(np.float32)
    reference = Reference.fit(
        features[:12],
        np.arange(12) % 2,
        [(f"img_{i}", f"{i}.jpg") for i in range(12)],
        held_out=features[12:],
        probability_of_true=[np.linspace(0.02, 0.8, 39)],
    )
    api_builders.register_model(server.services, reference=reference)
    picture = tmp_path / "strange.png"
    picture.write_bytes(running.picture(0, chance=random.Random(5)))
    with visit(browser, server.url) as page:
        page.goto("/try")
        page.locator("[data-pictures]").set_input_files(picture)
        expect(page.locator(".answer .note")).to_contain_text("Unlike what the model was trained on")


def test_a_model_without_statistics_is_not_asked_for_them(
    browser: Browser, server: RunningServer, tmp_path: Path
) -> None:
    model = api_builders.register_model(server.services)
    picture = tmp_path / "one.png"
    picture.write_bytes(running.picture(0, chance=random.Random(5)))
    with visit(browser, server.url) as page:
        page.goto(f"/try?model={model}")
        page.locator("[data-pictures]").set_input_files(picture)
        expect(page.locator(".answer h2")).to_be_visible()
        page.get_by_label("Most similar training pictures").select_option("3")
        expect(page.locator("#answers").get_by_role("alert")).to_contain_text("without the statistics")
