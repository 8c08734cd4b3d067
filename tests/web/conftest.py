"""A browser, what it looks at, and what is dropped on that."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import running
from browsing import ARGUMENTS, chromium_path
from furnishing import Furnished, furnished_graft
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Ended with each file: as long as it is there, its event loop is in the way of tests that run one of their own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(playwright), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Furnished]:
    with furnished_graft(tmp_path_factory.mktemp("graft")) as furnished:
        yield furnished


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
