"""A person at a browser: two sizes of screen, real drops of real files, and what they must never see."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, ViewportSize, expect

SIZES: dict[str, ViewportSize] = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# What the tests wait for is made by other processes on a machine that may be busy.
DEADLINE_MILLISECONDS = 90_000
AXE = Path(__file__).parent / "vendor" / "axe-4.14.1.min.js"  # axe-core of npm, as it is
# A camera that shows a moving pattern; no sandbox, since containers' root may not have one; and names that lead here,
# as whoever has a name can make it do.
ARGUMENTS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP *.example 127.0.0.1",
]

expect.set_options(timeout=DEADLINE_MILLISECONDS)


def chromium_path(playwright: Playwright) -> str:
    """GRAFT_TEST_CHROMIUM, playwright's own, or the system's. Skips where there is none."""
    given = os.environ.get("GRAFT_TEST_CHROMIUM")
    own = playwright.chromium.executable_path
    found = given or (own if Path(own).exists() else next(filter(None, map(shutil.which, PROGRAMS)), None))
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or set GRAFT_TEST_CHROMIUM")
    return found


@contextmanager
def context(browser: Browser, url: str, size: str = "desktop", **more: Any) -> Iterator[BrowserContext]:
    opened = browser.new_context(base_url=url, viewport=SIZES[size], **more)
    opened.set_default_timeout(DEADLINE_MILLISECONDS)
    yield opened
    opened.close()


@contextmanager
def visit(browser: Browser, url: str, size: str = "desktop", **more: Any) -> Iterator[Page]:
    """A page on which nothing may go wrong that the browser tells of: a script's error, a breach of the policy."""
    with context(browser, url, size, **more) as opened:
        page = opened.new_page()
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        yield page
        # A refusal that a test provokes is told of, too; what was refused is the test's to look at.
        assert [text for text in wrong if not text.startswith("Failed to load resource")] == []


def drop(page: Page, selector: str, *paths: Path) -> None:
    """Files or folders, dropped on an element as a person does it: through the browser and not by a script."""
    box = page.locator(selector).bounding_box()
    assert box is not None
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + 40}
    session = page.context.new_cdp_session(page)
    files = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **at, "data": files})
    session.detach()


def overflow(page: Page) -> int:
    """Pixels that the page is wider than its window."""
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


def violations(page: Page) -> list[tuple[str, str]]:
    """What axe-core finds wrong, each with its first place."""
    page.evaluate(AXE.read_text("utf-8"))  # through the debugger, which the pages' policy does not concern
    found = page.evaluate("axe.run().then(found => found.violations)")
    return [(each["id"], each["nodes"][0]["html"][:200]) for each in found]
