"""From a dropped folder to a dropped picture, as somebody does it who has never trained a network. Read this first."""

import random
import re
from pathlib import Path

import httpx
import pytest
import running
from browsing import drop, overflow, visit
from playwright.sync_api import Browser, Page, expect


@pytest.mark.parametrize("size", ["desktop", pytest.param("phone", marks=pytest.mark.slow)])
def test_from_a_dropped_folder_to_a_dropped_picture(
    browser: Browser, tmp_path: Path, class_folders: Path, size: str
) -> None:
    with running.graft_up(tmp_path, allow_downloads="false") as graft, visit(browser, graft.url, size) as page:
        page.goto("/")
        drop(page, "[data-upload]", class_folders)
        look_at_the_data_set(page)
        page.get_by_role("button", name="Start training").click()
        watch_the_job(page)
        page.get_by_role("link", name="Try it").last.click()
        try_a_picture(page, tmp_path)
        say_what_it_is(page, graft.url)
        learn_from_that(page)


def look_at_the_data_set(page: Page) -> None:
    page.wait_for_url(re.compile("/datasets/ds_"))
    expect(page.get_by_role("heading", name="colours")).to_be_visible()
    expect(page.get_by_text("24 pictures · 2 classes")).to_be_visible()
    expect(page.get_by_role("row", name="red")).to_contain_text(re.compile(r"10\s*2\s*0"))
    expect(page.get_by_text("Rejected files")).to_have_count(0)  # .DS_Store was not even sent
    expect(page.locator(".samples img")).to_have_count(12)
    assert overflow(page) == 0


def watch_the_job(page: Page) -> None:
    """Without a reload: what changes comes by the event stream."""
    page.wait_for_url(re.compile("/jobs/job_"))
    expect(page.locator(".figure-large")).to_have_text(re.compile(r"\d+\.\d %"))
    expect(page.locator(".title .status")).to_have_text("succeeded")
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(page.locator(".log")).to_contain_text("compete on the validation images")
    expect(page.get_by_role("region", name="What competed")).to_contain_text("best")
    assert overflow(page) == 0


def try_a_picture(page: Page, folder: Path) -> None:
    picture = folder / "blue one.png"
    picture.write_bytes(running.picture(1, chance=random.Random(99)))
    page.get_by_label("Keep the picture on the server").check()
    drop(page, "[data-try] .drop", picture)
    answer = page.locator(".answer")
    expect(answer.get_by_role("heading", level=2)).to_contain_text("blue")
    expect(answer.get_by_alt_text("Where “blue” was seen")).to_be_visible()
    expect(answer.locator(".strip img")).to_have_count(5)
    shown = answer.get_by_alt_text("blue one.png")
    assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") == 40
    assert overflow(page) == 0


def say_what_it_is(page: Page, url: str) -> None:
    page.get_by_label("What is it really?").fill("red")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_text("The model had said blue.")).to_be_visible()
    [kept] = httpx.get(f"{url}/v1/predictions").json()["data"]
    assert (kept["label"], kept["feedback"]["label"], kept["filename"]) == ("blue", "red", "blue one.png")


def learn_from_that(page: Page) -> None:
    page.get_by_role("link", name="The model's data set").click()
    page.get_by_role("link", name="its data set").click()
    page.get_by_role("button", name="Make the next version").click()
    expect(page.get_by_text("25 pictures · 2 classes")).to_be_visible()
