"""Uploading, and looking at what was found: every way in, what is refused, and leaving pictures out of the next job."""

import re
import zipfile
from pathlib import Path

import builders
import httpx
import pytest
from api_builders import RunningServer
from browsing import SIZES, drop, visit
from furnishing import Furnished, flawed_zip
from playwright.sync_api import Browser, Page, expect
from test_pretraining_journey import upload

pytestmark = pytest.mark.slow


def uploaded(page: Page, url: str) -> dict[str, object]:
    """The data set that the page went on to, once it is checked."""
    page.wait_for_url(re.compile("/datasets/ds_"))
    found: dict[str, object] = httpx.get(f"{url}/v1/datasets/{page.url.rpartition('/')[2]}?wait=60", timeout=70).json()
    return found


@pytest.mark.parametrize("size", SIZES)
def test_class_folders_are_dropped_without_a_folder_around_them(
    browser: Browser, furnished: Furnished, class_folders: Path, size: str
) -> None:
    with visit(browser, furnished.url, size) as page:
        page.goto("/datasets")
        drop(page, "[data-upload]", class_folders / "red", class_folders / "blue")
        found = uploaded(page, furnished.url)

    assert (found["name"], found["num_images"], found["num_rejected"]) == ("pictures", 24, 0)
    assert [each["name"] for each in found["classes"]] == ["blue", "red"]  # type: ignore[attr-defined]


def test_an_archive_is_dropped_and_sent_as_it_is(browser: Browser, furnished: Furnished, tmp_path: Path) -> None:
    archive = tmp_path / "my pictures.zip"
    archive.write_bytes(flawed_zip())
    with visit(browser, furnished.url) as page:
        page.goto("/")
        drop(page, "[data-upload]", archive)
        found = uploaded(page, furnished.url)

    assert (found["name"], found["size_bytes"]) == ("my pictures", archive.stat().st_size)


def test_a_folder_is_chosen_and_named(browser: Browser, furnished: Furnished, class_folders: Path) -> None:
    with visit(browser, furnished.url) as page:
        page.goto("/datasets")
        page.get_by_text("More").click()
        page.get_by_label("Name").fill("Grüne & blaue")
        page.locator("[data-folder]").set_input_files(class_folders)
        found = uploaded(page, furnished.url)

    assert (found["name"], found["num_images"]) == ("Grüne & blaue", 24)


def test_what_is_refused_is_told_where_it_was_dropped(browser: Browser, furnished: Furnished, tmp_path: Path) -> None:
    loose = tmp_path / "loose.zip"
    with zipfile.ZipFile(loose, "w") as archive:
        archive.writestr("notes.txt", "no picture")
    with visit(browser, furnished.url) as page:
        page.goto("/datasets")
        drop(page, "[data-upload]", loose)
        expect(page.locator("[data-upload]").get_by_role("alert")).to_contain_text("folder")
        expect(page.locator("[data-upload] .sending")).to_be_hidden()


def test_progress_is_shown_and_an_upload_stopped(browser: Browser, furnished: Furnished, tmp_path: Path) -> None:
    archive = tmp_path / "large.zip"
    archive.write_bytes(flawed_zip() + bytes(30_000_000))
    before = len(httpx.get(f"{furnished.url}/v1/datasets?limit=200").json()["data"])
    with visit(browser, furnished.url) as page:
        session = page.context.new_cdp_session(page)
        session.send("Network.enable")
        slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 1_000_000}
        page.goto("/datasets")
        session.send("Network.emulateNetworkConditions", slow)
        drop(page, "[data-upload]", archive)
        expect(page.locator(".sending [role=status]")).to_contain_text(
            re.compile(r"Sending: [1-9]\d*\.\d MB of 30\.\d MB")
        )
        assert 0 < float(page.get_by_label("Upload").get_attribute("value") or 0) < 1
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".sending")).to_be_hidden()
        expect(page.locator("[data-upload]").get_by_role("alert")).to_be_hidden()

    assert len(httpx.get(f"{furnished.url}/v1/datasets?limit=200").json()["data"]) == before


def test_flaws_are_shown_side_by_side_and_left_out_by_a_click(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        page.goto(f"/datasets/{furnished.dataset}")
        rejected = page.locator("section", has=page.get_by_role("heading", name="Rejected files"))
        expect(rejected.get_by_role("row", name="train/red/broken.jpg")).to_contain_text("truncated JPEG")
        copies = page.locator("details", has_text="Copies on both sides of the split")
        expect(copies.locator(".case")).to_have_count(2)
        first = copies.locator(".case").first
        paths = first.locator("input").evaluate_all("boxes => boxes.map(box => box.value)")
        assert len(paths) == 3  # on both sides, and once more in the other class
        first.get_by_label(f"Leave out {paths[0]}").check()
        expect(page.locator("[data-count-of=exclude]")).to_have_text(": 1 ticked")
        page.get_by_role("button", name="Choose how …").click()
        expect(page.get_by_label("Leave out")).to_have_value(paths[0])
        expect(page.locator("#estimate")).to_contain_text("1 picture")


def test_pictures_are_looked_through_by_class_and_split(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        page.goto(f"/datasets/{furnished.dataset}/images")
        expect(page.locator(".grid img")).to_have_count(52)
        page.get_by_label("Class").select_option("red")
        page.get_by_label("Split").select_option("val")
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".grid img")).to_have_count(9)


def test_a_data_set_is_deleted_after_a_question(browser: Browser, furnished: Furnished, class_folders: Path) -> None:
    with visit(browser, furnished.url) as page:
        page.goto("/")
        page.locator("[data-folder]").set_input_files(class_folders)
        found = uploaded(page, furnished.url)
        page.get_by_role("button", name="Start training").wait_for()  # once they are checked, it comes anew
        page.once("dialog", lambda dialog: dialog.dismiss())
        page.get_by_role("button", name="Delete this data set").click()
        assert httpx.get(f"{furnished.url}/v1/datasets/{found['id']}").status_code == 200
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Delete this data set").click()
        page.wait_for_url(re.compile("/datasets$"))

    assert httpx.get(f"{furnished.url}/v1/datasets/{found['id']}").status_code == 404


def test_a_class_with_two_spaces_in_its_name_is_found(
    browser: Browser, server: RunningServer, client: httpx.Client
) -> None:
    files = {
        f"{name}/{i}.jpg": builders.jpeg(10 * place + i) for place, name in enumerate(("a  b", "c")) for i in range(3)
    }
    dataset = upload(server, client, files)
    with visit(browser, server.url) as page:
        page.goto(f"/datasets/{dataset['id']}/images")
        page.get_by_label("Class").select_option(label="a b")  # as it is shown
        page.get_by_role("button", name="Show").click()
        expect(page.locator(".grid img")).to_have_count(3)
        expect(page.get_by_label("Class")).to_have_value("a  b")
