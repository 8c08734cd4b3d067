"""What holds for every page: people who see, hear or type can use it, on any screen, by day and by night; it is light,
and nothing in it can be made to run what somebody else wrote."""

import re

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem
from browsing import SIZES, overflow, violations, visit
from furnishing import Furnished
from playwright.sync_api import Browser, Response

from app.db.tables import EpochRow
from app.jobs import events, queue
from app.jobs.states import JobKind
from app.web import site

MAX_PAGE_BYTES = 300_000
SHARED = ("graft.css", "page.js", "icon.svg", "vendor/htmx-2.0.11.min.js")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_is_accessible_and_fits_the_screen(browser: Browser, furnished: Furnished, size: str, scheme: str) -> None:
    wrong = {}
    with visit(browser, furnished.url, size, color_scheme=scheme) as page:
        for name, address in furnished.pages.items():
            page.goto(address, wait_until="networkidle")
            found = violations(page)
            if too_wide := overflow(page):
                found.append(("wider than the window", f"{too_wide} pixels"))
            if found:
                wrong[name] = found

    assert wrong == {}


def test_no_page_is_heavy_without_its_pictures(browser: Browser, furnished: Furnished) -> None:
    weights = {}
    for name, address in furnished.pages.items():
        with visit(browser, furnished.url) as page:  # anew, so that nothing is in its memory yet
            answers: list[Response] = []
            page.on("response", lambda response, found=answers: found.append(response))
            page.goto(address, wait_until="networkidle")
            bodies = [each.body() for each in answers if not each.headers["content-type"].startswith("image/jpeg")]
            weights[name] = sum(map(len, bodies))

    assert {name: weight for name, weight in weights.items() if weight > MAX_PAGE_BYTES} == {}


def test_everything_comes_from_this_server_and_nothing_is_inline(furnished: Furnished) -> None:
    with httpx.Client(base_url=furnished.url, headers={"Accept": "text/html"}) as client:
        for address in furnished.pages.values():
            page = client.get(address)
            policy = page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="([^"]*)"', page.text)
            assert [each for each in loaded if not each.startswith(("/static/", "/v1/"))] == []
            assert re.findall(r"<style|<script(?![^>]+src=)|\sstyle=|\son[a-z]+=", page.text) == []


def test_a_name_that_is_markup_stays_a_name(browser: Browser, furnished: Furnished) -> None:
    name = "<img src=x onerror=alert(1)>\"'&"
    with httpx.Client(base_url=furnished.url, timeout=30) as client, visit(browser, furnished.url) as page:
        content = client.get("/v1/datasets").content  # no archive at all
        assert client.put("/v1/datasets", params={"name": name}, content=content).status_code == 422
        job = {"dataset": furnished.dataset, "name": name, "method": "fine_tuning", "backbone": "graft_small"}
        made = client.post("/v1/jobs", json=job).json()
        client.post(f"/v1/jobs/{made['id']}/cancel")
        page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))

        for address in ("/", "/jobs", f"/jobs/{made['id']}", f"/datasets/{furnished.dataset}"):
            page.goto(address, wait_until="networkidle")
            assert page.get_by_text(name).first.is_visible()
        client.delete(f"/v1/jobs/{made['id']}")


def test_the_first_page_is_for_people_and_programs(furnished: Furnished) -> None:
    of_person = httpx.get(furnished.url, headers={"Accept": "text/html,*/*;q=0.8"})
    of_curl, of_program = (httpx.get(furnished.url, headers={"Accept": kind}) for kind in ("*/*", "application/json"))

    assert "<!doctype html>" in of_person.text
    assert of_curl.json() == of_program.json()
    assert httpx.get(f"{furnished.url}{of_curl.json()['openapi']}").json()["info"]["title"] == "Graft"
    assert of_curl.headers["vary"] == of_person.headers["vary"] == "Accept"


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/a-page-to-come", 404, "There is nothing at this path."),
        ("GET", "/datasets/", 404, "There is nothing at this path."),
        ("GET", "/datasets/ds_none", 404, "There is no such data set."),
        ("GET", "/jobs/job_none", 404, "There is no job with this id."),
        ("GET", "/jobs?state=queued", 422, "state"),
        ("DELETE", "/jobs", 405, "This path does not take this method"),
        ("POST", "/jobs/new", 415, "Compressed request bodies are not read"),
    ],
)
def test_failures_are_told_people_on_a_page_and_programs_as_a_problem(
    client: httpx.Client, method: str, path: str, status: int, said: str
) -> None:
    headers = {"Content-Encoding": "gzip"} if status == 415 else {}
    of_person, of_part, of_program = (
        client.request(method, path, headers={**headers, **more})
        for more in ({"Accept": "text/html,*/*;q=0.8"}, {"HX-Request": "true"}, {})
    )

    assert said in of_person.text and '<nav aria-label="Main">' in of_person.text
    assert of_part.text.startswith('<p class="problem" role="alert">') and said in of_part.text
    assert of_program.json()["status"] == of_person.status_code == of_part.status_code == status
    assert of_person.headers.get("allow") == of_program.headers.get("allow")


@pytest.mark.parametrize("path", ["/v1/jobs/job_none", "/v1/nothing", "/v2/nothing", "/predict/nothing"])
def test_the_api_answers_browsers_as_it_does_programs(client: httpx.Client, path: str) -> None:
    of_browser, of_program = client.get(path, headers={"Accept": "text/html"}), client.get(path)

    assert_is_problem(of_browser, 404, of_program.json()["type"].rpartition("/")[2])


def test_somebody_can_go_by_keyboard_alone(browser: Browser, furnished: Furnished) -> None:
    with visit(browser, furnished.url) as page:
        page.goto("/")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "To the content"
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.hasAttribute('data-folder')")
        outline = page.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
        assert outline == "solid"


def test_pages_of_much_are_light_too(server: RunningServer, client: httpx.Client) -> None:
    many = tuple(f"a class with a name of its own {number}" for number in range(1000))
    dataset = api_builders.ready_dataset(server.services.database, classes=many)
    job = _long_job(server, dataset)
    counts = [[7 if row == column else row % 3 for column in range(1000)] for row in range(1000)]
    quality = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 9, "recall_ci95": [0.4, 0.6]}
    evaluation = {
        "classes": many, "images": 9000, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "loss": 1.0, "macro_f1": 0.5,
        "expected_calibration_error": 0.1, "confusion_matrix": counts, "mistakes": [],
        "per_class": [{"name": name, **quality} for name in many],
    }  # fmt: skip
    model = api_builders.register_model(server.services, dataset_id=dataset, evaluation=evaluation)

    pages = (f"/datasets/{dataset}", f"/jobs/{job}", f"/models/{model}", f"/jobs/compare?job={job}")
    weights = {path: len(client.get(path, headers={"Accept": "text/html"}).content) for path in pages}
    shared = sum(len((site.STATIC / name).read_bytes()) for name in SHARED)
    assert {path: weight for path, weight in weights.items() if weight + shared > MAX_PAGE_BYTES} == {}


def _long_job(server: RunningServer, dataset: str) -> str:
    """With as many epochs and lines of log as a job may have."""
    figures = {"train_loss": 0.123456, "train_accuracy": 0.9, "val_loss": 0.234567, "val_accuracy": 0.8}
    with server.services.database.write() as session:
        row = queue.submit(session, kind=JobKind.training, dataset_id=dataset, spec={}, method="fine_tuning")
        for number in range(1, 1001):
            epoch = {"epoch": number, "learning_rate": 0.001, "seconds": 1.0, **figures}
            session.add(EpochRow(job_id=row.id, **epoch))
            events.append(session, row.id, 0, "log", {"message": "a sentence about what was done, and why. " * 4})
        return row.id
