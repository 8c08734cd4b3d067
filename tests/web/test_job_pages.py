"""Jobs: every option with what it costs, watching, ending, comparing."""

import re

import httpx
import pytest
from browsing import SIZES, visit
from furnishing import Furnished
from playwright.sync_api import Browser, Page, expect

from app.jobs.request import Hyperparameters

pytestmark = pytest.mark.slow


def job_of(page: Page, url: str, wait: int = 0) -> dict[str, object]:
    page.wait_for_url(re.compile("/jobs/job_"))
    found: dict[str, object] = httpx.get(f"{url}/v1/jobs/{page.url.rpartition('/')[2]}?wait={wait}", timeout=90).json()
    return found


def long_job(page: Page, furnished: Furnished) -> None:
    """Begins one that takes longer than any test looks at it."""
    page.goto(f"/jobs/new?dataset={furnished.dataset}")
    page.get_by_role("radio", name=re.compile("^full fine tuning")).check()
    page.get_by_label("Start from").select_option("graft_small")
    page.get_by_text("Every hyperparameter").click()
    page.get_by_label("Epochs", exact=False).first.fill("1000")
    page.locator("[name=early_stopping_patience]").fill("1000")
    page.get_by_role("button", name="Start training").click()


@pytest.mark.parametrize("size", SIZES)
def test_every_option_is_explained_and_its_price_told_before_the_job_starts(
    browser: Browser, furnished: Furnished, size: str
) -> None:
    with visit(browser, furnished.url, size) as page:
        page.goto(f"/jobs/new?dataset={furnished.dataset}")
        expect(page.locator("#estimate")).to_contain_text(re.compile(r"about .+ (s|min)"))
        page.get_by_role("radio", name=re.compile("^fine tuning")).check()
        expect(page.locator("#estimate")).to_contain_text("Methodfine tuning")
        page.get_by_text("Every hyperparameter").click()
        for name, field in Hyperparameters.model_fields.items():
            expect(page.locator(f"[name={name}]")).to_be_visible()
            expect(page.locator(f"#about-{name}")).to_contain_text(str(field.description))
        page.locator("[name=epochs]").fill("3")
        page.locator("[name=epochs]").blur()
        page.get_by_text("Every value").click()
        expect(page.locator("#estimate")).to_contain_text("epochs3")
        page.get_by_label("Name").fill("by hand")
        page.get_by_label("Seed").fill("5")
        page.get_by_role("button", name="Start training").click()
        job = job_of(page, furnished.url)

    spec = job["spec"]
    assert isinstance(spec, dict)
    assert (job["name"], job["method"], spec["seed"], spec["hyperparameters"]["epochs"]) == (
        "by hand", "fine_tuning", 5, 3
    )  # fmt: skip
    httpx.post(f"{furnished.url}/v1/jobs/{job['id']}/cancel")


def test_what_is_wrong_is_told_at_its_field_and_nothing_typed_is_lost(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        page.goto(f"/jobs/new?dataset={furnished.dataset}")
        page.get_by_text("Every hyperparameter").click()
        page.locator("[name=epochs]").fill("many")
        page.locator("[name=learning_rate]").fill("0.01")
        page.get_by_role("button", name="Start training").click()
        expect(page.locator("#wrong-epochs")).to_have_text("must be an integer from 1 to 1000")
        expect(page.locator("[name=epochs]")).to_have_attribute("aria-invalid", "true")
        expect(page.locator("[name=epochs]")).to_have_value("many")
        expect(page.locator("[name=learning_rate]")).to_have_value("0.01")


def test_a_running_job_is_watched_stopped_and_kept(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        long_job(page, furnished)
        epochs = page.get_by_role("region", name="Epochs").locator("tbody tr")
        expect(epochs.nth(2)).to_be_visible()  # no reload: the event stream brought them
        for drawn in ("Accuracy", "Loss", "Learning rate"):
            expect(page.get_by_role("img", name=re.compile(f"^{drawn} by epoch"))).to_be_visible()
        expect(page.get_by_label("Progress of the job")).not_to_have_attribute("value", "0")
        page.get_by_role("button", name="Stop and keep the best so far").click()
        expect(page.locator(".title .status")).to_have_text("succeeded")
        job = job_of(page, furnished.url)

    assert job["model"] is not None


def test_a_running_job_is_cancelled_and_leaves_nothing(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        long_job(page, furnished)
        expect(page.get_by_role("button", name="Stop and keep the best so far")).to_be_visible()
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator(".title .status")).to_have_text("cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_have_count(0)
        job = job_of(page, furnished.url)

    assert (job["status"], job["model"]) == ("cancelled", None)


@pytest.mark.parametrize("size", SIZES)
def test_runs_are_compared_in_one_table_and_one_plot(browser: Browser, furnished: Furnished, size: str) -> None:
    with visit(browser, furnished.url, size) as page:
        page.goto("/jobs?status=succeeded")
        for job in furnished.jobs:
            page.locator(f"input[value={job}]").check()
        page.get_by_role("button", name="Compare those ticked").click()
        page.wait_for_url(re.compile("/jobs/compare"))
        table = page.get_by_role("region", name="Runs")
        seeds = table.get_by_role("row", name="Seed").get_by_role("cell").all_text_contents()
        assert sorted(seeds) == ["0", "1"]
        expect(table.get_by_role("rowheader", name="Epochs", exact=True)).to_have_count(2)  # run, and asked for
        expect(page.get_by_role("img", name=re.compile("Validation accuracy")).locator("path.line")).to_have_count(2)
        expect(table.get_by_role("rowheader", name="Label smoothing")).to_have_count(0)  # the same in both
