"""Uploads from the pages go on where they were cut; a folder, packed while it is sent, arrives byte by byte."""

import hashlib
import random
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import running
from api_builders import RunningServer
from browsing import context, drop, visit
from furnishing import Furnished, flawed_zip
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect
from running import RunningGraft

pytestmark = pytest.mark.slow

SIDE = 800  # of a picture of noise: two megabytes, which no packing makes smaller


@pytest.fixture(scope="module")
def served_from(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def graft(served_from: Path) -> Iterator[RunningGraft]:
    """A server that may be killed."""
    with running.graft_up(served_from, allow_downloads="false") as graft:
        yield graft


@pytest.fixture
def noise_folder(tmp_path: Path) -> Path:
    """Some 23 MB: noise/one/0.png and so on, and what nobody wants to send."""
    chance = random.Random(5)
    for name in ("one", "zwei ü"):
        (tmp_path / "noise" / name).mkdir(parents=True)
        for index in range(6):
            pixels = Image.frombytes("RGB", (SIDE, SIDE), chance.randbytes(3 * SIDE * SIDE))
            pixels.save(tmp_path / "noise" / name / f"{index}.png", compress_level=0)
    (tmp_path / "noise" / "one" / ".DS_Store").write_bytes(b"junk")
    return tmp_path / "noise"


def digests(folder: Path) -> dict[str, str]:
    """By their paths in the zip, of all files that are to be sent."""
    files = {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}
    return {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}


def digests_in(archive: Path) -> dict[str, str]:
    with zipfile.ZipFile(archive) as packed:
        return {name: hashlib.sha256(packed.read(name)).hexdigest() for name in packed.namelist()}


@contextmanager
def slow_line(page: Page, bytes_a_second: int) -> Iterator[None]:
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    limits = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": bytes_a_second}
    session.send("Network.emulateNetworkConditions", limits)
    yield
    if not page.is_closed():
        session.send("Network.emulateNetworkConditions", {**limits, "uploadThroughput": -1})
        session.detach()


def sending(page: Page, megabytes: str) -> None:
    """Until so much is sent, as a regular expression."""
    expect(page.locator(".sending [role=status]")).to_contain_text(re.compile(rf"Sending: {megabytes}\.\d MB of"))


def uploads_of(page: Page) -> list[Request]:
    found: list[Request] = []
    page.on("request", lambda request: found.append(request) if "/v1/uploads" in request.url else None)
    return found


def dataset_of(page: Page, url: str) -> dict[str, Any]:
    """The data set that the page went on to, once it is checked."""
    page.wait_for_url(re.compile("/datasets/ds_"))
    found: dict[str, Any] = httpx.get(f"{url}/v1/datasets/{page.url.rpartition('/')[2]}?wait=60", timeout=70).json()
    return found


def test_an_archive_goes_on_when_the_server_is_back(browser: Browser, graft: RunningGraft, tmp_path: Path) -> None:
    archive = tmp_path / "far away.zip"
    archive.write_bytes(flawed_zip())
    with zipfile.ZipFile(archive, "a") as more:  # a file that is listed as rejected
        more.writestr("train/red/noise.jpg", random.Random(7).randbytes(3_000_000))
    with visit(browser, graft.url) as page:
        asked = uploads_of(page)
        page.goto("/datasets")
        with slow_line(page, 500_000):
            drop(page, "[data-upload]", archive)
            sending(page, r"[1-9]")
            graft.program("app.main").kill()
            found = dataset_of(page, graft.url)

    assert (found["name"], found["size_bytes"]) == ("far away", archive.stat().st_size)
    methods = [request.method for request in asked]
    assert methods.count("POST") == 1 and methods.count("PATCH") >= 2 and "HEAD" in methods


def test_a_folder_goes_on_when_the_server_is_back(
    browser: Browser, graft: RunningGraft, served_from: Path, noise_folder: Path
) -> None:
    with visit(browser, graft.url) as page:
        asked = uploads_of(page)
        page.goto("/datasets")
        with slow_line(page, 8_000_000):
            drop(page, "[data-upload]", noise_folder)
            sending(page, r"1\d")  # in the second of three pieces
            graft.program("app.main").kill()
            found = dataset_of(page, graft.url)

    assert digests_in(served_from / "data" / "datasets" / found["id"] / "archive") == digests(noise_folder)
    assert (found["name"], found["num_images"], found["num_rejected"]) == ("noise", 12, 0)
    methods = [request.method for request in asked]
    assert methods.count("POST") == 1 and methods.count("PATCH") >= 4 and "HEAD" in methods


def test_the_same_folder_dropped_again_goes_on_after_the_page_was_left(
    browser: Browser, furnished: Furnished, noise_folder: Path
) -> None:
    with context(browser, furnished.url) as opened:
        page = opened.new_page()
        page.goto("/datasets")
        with slow_line(page, 8_000_000):
            drop(page, "[data-upload]", noise_folder)
            sending(page, r"1\d")
            page.close()  # before what is on its way could arrive at once
        page = opened.new_page()
        asked = uploads_of(page)
        page.goto("/")
        drop(page, "[data-upload]", noise_folder)
        found = dataset_of(page, furnished.url)

    assert (found["name"], found["num_images"], found["num_rejected"]) == ("noise", 12, 0)
    assert [request.method for request in asked][:2] == ["HEAD", "PATCH"]
    assert int(asked[1].headers["upload-offset"]) > 8_000_000


def test_a_file_that_goes_away_meanwhile_is_named(browser: Browser, furnished: Furnished, noise_folder: Path) -> None:
    with visit(browser, furnished.url) as page:
        page.goto("/datasets")
        with slow_line(page, 8_000_000):
            drop(page, "[data-upload]", noise_folder)
            sending(page, r"[1-9]")
            (noise_folder / "zwei ü" / "5.png").unlink()
            expect(page.get_by_role("alert")).to_contain_text("noise/zwei ü/5.png cannot be read")
        expect(page.locator(".sending")).to_be_hidden()


def test_the_same_archive_under_another_name_or_of_another_kind_is_another_upload(
    browser: Browser, server: RunningServer, tmp_path: Path
) -> None:
    archive = tmp_path / "large.zip"
    archive.write_bytes(flawed_zip())
    with zipfile.ZipFile(archive, "a") as more:
        more.writestr("train/red/noise.jpg", random.Random(7).randbytes(6_000_000))
    with context(browser, server.url) as opened:
        page = opened.new_page()
        page.goto("/datasets")
        with slow_line(page, 1_000_000):
            drop(page, "[data-upload]", archive)
            sending(page, r"[1-9]")
            page.close()
        page = opened.new_page()
        asked = uploads_of(page)
        page.goto("/datasets")
        page.get_by_text("More").click()
        page.get_by_label("Name").fill("another")
        page.get_by_label("The pictures have no classes").check()
        page.locator("[data-archive]").set_input_files(archive)
        page.wait_for_url(re.compile("/datasets/ds_"))
        found = httpx.get(f"{server.url}/v1/datasets/{page.url.rpartition('/')[2]}").json()

    assert asked[0].method == "POST"
    assert (found["name"], found["kind"]) == ("another", "unlabelled")
