"""A server without a key, and what pages elsewhere can have a browser do to it: call it by a name of theirs, or send it
forms. A real server; a browser where it decides."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem, client_of, create_key, raw_exchange
from browsing import context
from playwright.sync_api import Browser

from app.access import Scope

# What a page may send anywhere without being asked first whether it may.
FORMS = """
<form id="job" method="post" enctype="text/plain" target="_blank" action="{graft}/v1/jobs">
<input name='{{"dataset": "ds_1", "name": "' value='"}}'></form>
<form id="dataset" method="post" enctype="multipart/form-data" target="_blank" action="{graft}/v1/datasets">
<input type="file" name="file"></form>
<form id="page" method="post" target="_blank" action="{graft}/jobs/job_1/cancel"></form>
"""


@contextmanager
def foreign_site(html: str) -> Iterator[str]:
    """A page on another port, which makes it another site of every name but Graft's own."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield f"http://attacker.example:{site.server_port}"
        site.shutdown()
        thread.join()


def as_called(client: httpx.Client, host: str, path: str = "/v1/datasets") -> httpx.Response:
    return client.get(path, headers={"Host": host})


OURS = (
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "graft.localhost:8000",
    "workstation",
    "127.0.0.1",
    "127.8.0.1:80",
    "192.168.1.5:8000",
    "[::1]:8000",
    "[fe80::1]",
)
OTHERS = (
    "attacker.example",
    "attacker.example:8000",
    "localhost.attacker.example",
    "127.0.0.1.attacker.example",
    "192.168.1.5.attacker.example",
    "192.168.1",
    "a@localhost",
    "localhost:8000:1",
    "[::1",
    "",
)


def test_names_that_nobody_can_be_given_are_served(client: httpx.Client) -> None:
    assert {host: as_called(client, host).status_code for host in OURS} == dict.fromkeys(OURS, 200)


def test_other_names_are_refused(client: httpx.Client) -> None:
    assert {host: as_called(client, host).status_code for host in OTHERS} == dict.fromkeys(OTHERS, 421)


@pytest.mark.parametrize("path", ["/v1/datasets", "/", "/predict", "/v2", "/metrics"])
def test_a_refused_name_is_told_what_to_do(client: httpx.Client, path: str) -> None:
    detail = assert_is_problem(as_called(client, "attacker.example", path), 421, "unknown-host")["detail"]

    assert "GRAFT_ALLOWED_HOSTS" in detail
    assert "graft keys create" in detail


def test_probes_are_answered_by_any_name(client: httpx.Client) -> None:
    assert as_called(client, "graft.example", "/healthz").status_code == 200


def test_a_client_too_old_to_say_a_name_is_served(server: RunningServer) -> None:
    assert raw_exchange(server, b"GET /v1/datasets HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def test_names_of_the_setting_are_served_as_a_proxy_passes_them_on(tmp_path: Path) -> None:
    settings = api_builders.settings_for(tmp_path, allowed_hosts=["Graft.example"])
    with api_builders.running(settings) as server, client_of(server) as client:
        found = {host: as_called(client, host).status_code for host in ("graft.EXAMPLE:443", "www.example")}

    assert found == {"graft.EXAMPLE:443": 200, "www.example": 421}


def test_with_a_key_any_name_will_do(server: RunningServer, client: httpx.Client) -> None:
    key = create_key(server, Scope.admin)

    assert client.get("/v1/datasets", headers={"Host": "graft.example", **key}).status_code == 200
    assert_is_problem(as_called(client, "graft.example"), 401, "unauthenticated")


@pytest.mark.parametrize(
    "told", [{"Origin": "http://attacker.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
def test_requests_of_other_sites_change_nothing(client: httpx.Client, told: dict[str, str]) -> None:
    for method, path, kind in [
        ("POST", "/v1/jobs", "text/plain"),
        ("POST", "/v1/datasets", "multipart/form-data; boundary=x"),
        ("POST", "/predict?store=true", "multipart/form-data; boundary=x"),
        ("POST", "/v1/uploads", "application/x-www-form-urlencoded"),
        ("DELETE", "/v1/models/default", "text/plain"),
    ]:
        refused = client.request(method, path, headers={"Content-Type": kind, **told}, content=b"{}")
        assert_is_problem(refused, 403, "cross-site-request")


def test_a_page_elsewhere_gets_nowhere_in_a_real_browser(
    browser: Browser, server: RunningServer, client: httpx.Client
) -> None:
    archive = {"name": "a.zip", "mimeType": "application/zip", "buffer": api_builders.archive_of_classes()}
    with foreign_site(FORMS.format(graft=server.url)) as site, context(browser, site) as opened:
        page = opened.new_page()
        page.goto("/")
        page.locator("#dataset input").set_input_files(archive)
        statuses = {}
        for form in ("job", "dataset", "page"):
            with opened.expect_event("response", lambda response: response.url.startswith(server.url)) as answered:
                page.evaluate("form => document.getElementById(form).submit()", form)
            statuses[form] = (answered.value.request.method, answered.value.status)
        # Its own name, which it has let lead here since, so that for the browser this is the page's own server.
        rebound = page.goto(server.url.replace("127.0.0.1", "attacker.example") + "/v1/datasets")

    assert statuses == dict.fromkeys(("job", "dataset", "page"), ("POST", 403))
    assert rebound is not None
    assert rebound.status == 421
    assert client.get("/v1/datasets").json()["data"] == []
