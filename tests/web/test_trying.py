"""Trying a model: what corrects its answer stays until it is saved, and a picture is kept once."""

import random
from pathlib import Path
from typing import Any

import api_builders
import httpx
import pytest
import running
from api_builders import RunningServer
from browsing import SIZES, visit
from playwright.sync_api import Browser, Page, expect


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "one.png"
    path.write_bytes(running.picture(0, chance=random.Random(5)))
    return path


@pytest.fixture
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


def keep(page: Page, *pictures: Path) -> None:
    page.goto("/try")
    page.get_by_label("Keep the picture on the server").check()
    page.locator("[data-pictures]").set_input_files(pictures)
    expect(page.get_by_role("button", name="Save")).to_have_count(len(pictures))


def kept(server: RunningServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/v1/predictions").json()["data"]
    return found


@pytest.mark.parametrize("size", SIZES)
def test_what_was_typed_stays_with_what_is_wrong_about_it(
    browser: Browser, server: RunningServer, model: str, picture: Path, size: str
) -> None:
    with visit(browser, server.url, size) as page:
        keep(page, picture)
        label = page.get_by_label("What is it really?")
        label.fill("a horse")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("form.correct").get_by_role("alert")).to_have_text(
            "The model has no such class; its classes are: cat, dog. "
            "Tick “a class the model does not know” if it is one."
        )
        expect(label).to_have_value("a horse")
        label.fill("Dog")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("alert")).to_have_text(
            "The label differs from the class 'dog' only in case, accents' encoding, blanks or dots."
        )
        label.fill("a horse")
        page.get_by_label("a class the model does not know").check()
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Kept: a horse.")).to_be_visible()

    assert [each["feedback"]["label"] for each in kept(server)] == ["a horse"]


def test_a_server_that_is_busy_takes_nothing_that_was_typed(
    browser: Browser, server: RunningServer, model: str, picture: Path
) -> None:
    with visit(browser, server.url) as page:
        keep(page, picture)
        page.route("**/feedback", lambda route: route.fulfill(status=503, body="busy"), times=1)
        page.get_by_label("What is it really?").fill("dog")
        page.get_by_role("button", name="Save").click()
        expect(page.locator("form.correct")).to_contain_text("busy")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_text("Kept: dog.")).to_be_visible()


def test_an_option_that_changes_keeps_no_picture_again_and_nothing_typed_is_lost(
    browser: Browser, server: RunningServer, model: str, picture: Path, tmp_path: Path
) -> None:
    other = tmp_path / "two.png"
    other.write_bytes(running.picture(1, chance=random.Random(6)))
    with visit(browser, server.url) as page:
        keep(page, picture, other)
        first = page.locator(".answer").first
        first.get_by_label("What is it really?").fill("horse")
        for is_shown in (False, True):
            page.get_by_label("Show where the label was seen").set_checked(is_shown)
            expect(page.locator(".seen figure")).to_have_count(4 if is_shown else 2)
        expect(first.get_by_label("What is it really?")).to_have_value("horse")
        first.get_by_label("a class the model does not know").check()
        first.get_by_role("button", name="Save").click()
        expect(first.get_by_text("Kept: horse.")).to_be_visible()
        page.get_by_label("Show where the label was seen").uncheck()
        expect(page.locator(".seen figure")).to_have_count(2)
        expect(first.get_by_text("Kept: horse.")).to_be_visible()

    assert sorted(str(each["filename"]) for each in kept(server)) == ["one.png", "two.png"]


def test_an_option_that_changes_before_the_answer_keeps_it_once(
    browser: Browser, server: RunningServer, model: str, picture: Path
) -> None:
    with visit(browser, server.url) as page:
        page.goto("/try")
        page.get_by_label("Keep the picture on the server").check()
        page.locator("[data-pictures]").set_input_files(picture)
        page.get_by_label("Show where the label was seen").uncheck()
        expect(page.locator(".answer")).to_have_count(1)
        expect(page.locator(".seen figure")).to_have_count(1)
        expect(page.get_by_role("button", name="Save")).to_have_count(1)

    assert len(kept(server)) == 1


@pytest.mark.parametrize("size", SIZES)
def test_arrow_keys_choose_a_model_and_enter_or_leaving_asks_for_it(
    browser: Browser, server: RunningServer, size: str
) -> None:
    third, second, first = (api_builders.register_model(server.services, seed=seed) for seed in range(3))
    with visit(browser, server.url, size) as page:
        for ending, presses, expected in (("Enter", 2, third), ("Tab", 1, second)):
            page.goto(f"/try?model={first}")
            page.evaluate("window.isSame = true")
            chosen = page.get_by_role("combobox", name="Model", exact=True)
            chosen.focus()
            for _ in range(presses):
                page.keyboard.press("ArrowDown")
            expect(chosen).to_have_value(expected)
            assert page.evaluate("window.isSame") and page.url.endswith(first)
            page.keyboard.press(ending)
            page.wait_for_url(f"**/try?model={expected}")
        chosen.select_option(first)  # as by a click
        page.wait_for_url(f"**/try?model={first}")


@pytest.mark.parametrize("size", SIZES)
def test_another_model_answers_the_pictures_that_are_there(
    browser: Browser, server: RunningServer, picture: Path, size: str
) -> None:
    second, first = (api_builders.register_model(server.services, seed=seed) for seed in range(2))
    with visit(browser, server.url, size) as page:
        page.goto(f"/try?model={first}")
        page.get_by_label("Keep the picture on the server").check()
        page.locator("[data-pictures]").set_input_files(picture)
        expect(page.get_by_role("button", name="Save")).to_have_count(1)
        page.evaluate("window.isSame = true")
        for model in (second, first):
            with page.expect_response(lambda answer: answer.request.method == "POST"):
                page.get_by_role("combobox", name="Model", exact=True).select_option(model)
            expect(page.get_by_role("button", name="Save")).to_have_count(1)
            expect(page.get_by_role("combobox", name="Model", exact=True)).to_have_value(model)
            assert page.evaluate("window.isSame") and page.url.endswith(model)
        assert sorted(each["model"] for each in kept(server)) == sorted([first, second, first])
        page.route("**/try?model=*", lambda route: route.abort(), times=1)
        page.get_by_role("combobox", name="Model", exact=True).select_option(second)
        page.wait_for_url(f"**/try?model={second}")
        assert not page.evaluate("window.isSame")


def test_what_cannot_be_copied_by_a_script_is_selected(browser: Browser, tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, allowed_hosts={"graft.example"})
    with api_builders.running(settings) as server:
        model = api_builders.register_model(server.services)
        # By a name and without HTTPS, as in an office, browsers give no clipboard to scripts.
        with visit(browser, server.url.replace("127.0.0.1", "graft.example")) as page:
            page.goto(f"/models/{model}")
            button = page.get_by_role("button", name="Copy").first
            code = page.locator("pre").first.inner_text()
            button.click()
            expect(page.get_by_role("button", name="Selected")).to_have_count(1)
            assert page.evaluate("getSelection().toString()") == code
