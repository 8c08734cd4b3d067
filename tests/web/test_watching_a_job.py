"""A job's page while it waits, runs and ends: nothing is missed, and whoever reads or listens is not disturbed.

In place of a worker, the test itself says what happens to the job.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import api_builders
import httpx
import pytest
import queue_builders
import sqlalchemy
from api_builders import RunningServer
from browsing import SIZES, visit
from playwright.sync_api import Browser, Locator, Page, expect

from app.db.tables import EventRow
from app.jobs import events, queue
from app.jobs.queue import Claim

METRICS = {"val_accuracy": 0.9, "val_accuracy_ci95": [0.8, 0.95]}


@pytest.fixture
def claim(server: RunningServer) -> Claim:
    """A job that runs."""
    return queue_builders.claimed(server.services.database)


def succeed(server: RunningServer, claim: Claim, metrics: dict[str, Any] | None = None) -> None:
    """With a model."""
    model = api_builders.register_model(server.services)
    with server.services.database.write() as session:
        queue.succeed(session, claim, model_id=model, metrics=METRICS if metrics is None else metrics)


def record_epochs(server: RunningServer, claim: Claim, *numbers: int) -> None:
    for number in numbers:
        with server.services.database.write() as session:
            queue.record_epoch(session, claim, queue_builders.epoch(number), {"epoch": number, "fraction": number / 50})
            queue.record_log(session, claim, f"Epoch {number} is done.")


def status_of(page: Page) -> Locator:
    return page.locator(".title .status")


def within_box(line: Locator) -> float:
    """Pixels from the top of what scrolls to a line of it."""
    place: float = line.evaluate(
        "line => line.getBoundingClientRect().top - line.closest('.short').getBoundingClientRect().top"
    )
    return place


@contextmanager
def when_events_are_read(server: RunningServer, act: Any) -> Iterator[None]:
    """Does it once, just before the next request reads a job's events."""
    done: list[bool] = []

    def before(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if f"FROM {EventRow.__tablename__}" in statement and not done:
            done.append(True)
            act()

    engine = server.services.database.engine
    sqlalchemy.event.listen(engine, "before_cursor_execute", before)
    yield
    sqlalchemy.event.remove(engine, "before_cursor_execute", before)
    assert done


@pytest.mark.parametrize("refused", [503, *(pytest.param(other, marks=pytest.mark.slow) for other in (429, 502))])
def test_the_end_is_seen_although_the_event_stream_was_refused(
    browser: Browser, server: RunningServer, claim: Claim, refused: int
) -> None:
    with visit(browser, server.url) as page:
        page.route("**/events?after=*", lambda route: route.fulfill(status=refused), times=1)
        page.goto(f"/jobs/{claim.job_id}")
        expect(status_of(page)).to_have_text("running")
        succeed(server, claim)
        expect(status_of(page)).to_have_text("succeeded")


@pytest.mark.slow
def test_a_failure_to_look_leaves_the_page_as_it_is_until_the_next_look(
    browser: Browser, server: RunningServer, claim: Claim
) -> None:
    with visit(browser, server.url) as page:
        page.goto(f"/jobs/{claim.job_id}")
        page.route("**/live", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"), times=1)
        with page.expect_response("**/live"):
            succeed(server, claim)
        expect(status_of(page)).to_have_text("running")
        expect(status_of(page)).to_have_text("succeeded")


def test_an_end_while_the_page_is_made_is_still_to_come(
    server: RunningServer, client: httpx.Client, claim: Claim
) -> None:
    with when_events_are_read(server, lambda: succeed(server, claim)):
        page = client.get(f"/jobs/{claim.job_id}").text

    last = page.partition('data-after="')[2].partition('"')[0]
    with server.services.database.read() as session:
        still_to_come = [row.event for row in events.read_after(session, claim.job_id, int(last), 100)]
    assert 'data-status="running"' in page
    assert still_to_come == ["model", "status"]


@pytest.mark.slow
def test_the_place_in_the_queue_changes_while_one_looks(browser: Browser, server: RunningServer) -> None:
    database = server.services.database
    ahead, waiting = queue_builders.submit(database), queue_builders.submit(database)
    with visit(browser, server.url) as page:
        page.goto(f"/jobs/{waiting}")
        expect(page.get_by_text("Number 2 in the queue")).to_be_visible()
        queue_builders.request_cancel(database, ahead)
        expect(page.get_by_text("Next in the queue")).to_be_visible()
        expect(page).to_have_title("– · queued · Graft")


def test_the_end_changes_the_title_brings_the_button_to_delete_and_is_told(
    browser: Browser, server: RunningServer, claim: Claim
) -> None:
    with visit(browser, server.url) as page:
        page.goto(f"/jobs/{claim.job_id}")
        delete = page.get_by_role("button", name="Delete this job")
        expect(delete).to_have_count(0)
        expect(page).to_have_title("– · running · Graft")
        expect(page.get_by_role("status")).to_have_text("The job runs.")
        page.evaluate("window.told = document.querySelector('[role=status]')")
        succeed(server, claim)
        expect(page).to_have_title("– · succeeded · Graft")
        expect(page.get_by_role("status")).to_have_text(
            "The job has succeeded: 90.0 % of the validation pictures are told right."
        )
        assert page.evaluate("window.told.isConnected")  # in a new one, a screen reader would not notice the change
        page.once("dialog", lambda dialog: dialog.accept())
        delete.click()
        page.wait_for_url("**/jobs")

    assert httpx.get(f"{server.url}/v1/jobs/{claim.job_id}").status_code == 404


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("list_name", ["Epochs", "Log"])
def test_what_comes_takes_neither_focus_nor_the_line_that_is_read(
    browser: Browser, server: RunningServer, claim: Claim, size: str, list_name: str
) -> None:
    record_epochs(server, claim, *range(1, 41))
    with visit(browser, server.url, size) as page:
        page.goto(f"/jobs/{claim.job_id}")
        box = page.get_by_label(list_name).first
        box.focus()
        box.evaluate("box => (box.scrollTop = 300)")
        line = page.locator(f"#{box.locator('li, tbody tr').nth(12).get_attribute('id')}")
        before, text = within_box(line), line.inner_text()
        record_epochs(server, claim, *range(41, 46))
        expect(page.locator("#epoch-45")).to_be_attached()
        assert within_box(line) == pytest.approx(before, abs=1)
        assert line.inner_text() == text
        assert box.evaluate("box => box === document.activeElement")


def test_a_button_stays_the_one_that_has_the_focus(browser: Browser, server: RunningServer, claim: Claim) -> None:
    with visit(browser, server.url) as page:
        page.goto(f"/jobs/{claim.job_id}")
        cancel = page.get_by_role("button", name="Cancel")
        cancel.evaluate("button => { window.cancel = button; button.focus(); }")
        record_epochs(server, claim, 1)
        expect(page.locator("#epoch-1")).to_be_attached()
        httpx.post(f"{server.url}/v1/jobs/{claim.job_id}/stop")
        record_epochs(server, claim, 2)
        expect(page.get_by_role("button", name="Stop")).to_have_count(0)
        assert page.evaluate("window.cancel === document.activeElement")


@pytest.mark.parametrize("size", SIZES)
def test_a_backbone_is_to_be_started_from_and_not_to_be_tried(
    browser: Browser, server: RunningServer, claim: Claim, size: str
) -> None:
    api_builders.ready_dataset(server.services.database)
    model = api_builders.register_model(server.services, aliases=(), method="self_supervised")
    with visit(browser, server.url, size) as page:
        page.goto(f"/jobs/{claim.job_id}")
        with server.services.database.write() as session:
            queue.succeed(session, claim, model_id=model, metrics={"val_loss": 3.2})
        result = page.get_by_role("region", name="Result")
        expect(result).to_contain_text("A backbone to start later jobs from.")
        expect(page.get_by_role("status")).to_have_text("The job has succeeded.")
        expect(page.get_by_text("told right")).to_have_count(0)
        expect(result.get_by_role("link", name="Try it")).to_have_count(0)
        expect(result.get_by_role("link", name="See the backbone")).to_have_attribute("href", f"/models/{model}")
        result.get_by_role("link", name="Start a job from it").click()
        expect(page.get_by_label("Start from")).to_have_value(model)
