"""Signing in with an API key, and what a cookie must not make possible. A real server; a browser where it decides."""

import re
from http.cookies import SimpleCookie

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem, create_key
from browsing import visit
from playwright.sync_api import Browser, expect

from app import access
from app.access import Scope
from app.api.traffic import WRONG_KEYS_PER_MINUTE

PERSON = {"Accept": "text/html,application/xhtml+xml"}


def token(headers: dict[str, str]) -> str:
    return headers["Authorization"].removeprefix("Bearer ")


def signed_in(client: httpx.Client, key: str, **headers: str) -> httpx.Response:
    return client.post("/sign-in", data={"key": key, "next": "/models"}, headers=headers)


def cookie_of(response: httpx.Response) -> tuple[str, dict[str, str]]:
    """Its name, and its attributes as they are."""
    [(name, morsel)] = SimpleCookie(response.headers["set-cookie"]).items()
    return name, {key: value for key, value in morsel.items() if value}


@pytest.mark.parametrize(
    "path", ["/", "/datasets", "/jobs/new?dataset=ds_1", "/models/default", "/docs", "/a-page-to-come"]
)
def test_a_person_without_a_key_is_led_to_the_sign_in_page_and_a_program_told(
    server: RunningServer, client: httpx.Client, path: str
) -> None:
    create_key(server, Scope.admin)

    led = client.get(path, headers=PERSON)

    assert (led.status_code, led.headers["location"].partition("=")[0]) == (303, "/sign-in?next")
    assert httpx.URL(led.headers["location"]).params["next"] == path
    assert client.get(led.headers["location"], headers=PERSON).status_code == 200
    assert_is_problem(client.get(path), 401, "unauthenticated")


def test_somebody_signs_in_works_and_signs_out(browser: Browser, server: RunningServer) -> None:
    key = token(create_key(server, Scope.train))
    with visit(browser, server.url) as page:
        page.goto("/jobs")
        page.get_by_label("API key").fill("ft_nonsense")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_contain_text("not a Graft API key")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(re.compile("/jobs$"))
        [cookie] = page.context.cookies()
        assert (cookie["name"], cookie["httpOnly"], cookie["sameSite"]) == ("graft-key", True, "Strict")
        assert page.evaluate("document.cookie") == ""
        # What pages ask of the API by themselves, reading and changing.
        assert page.evaluate("fetch('/v1/jobs').then(answer => answer.status)") == 200
        assert page.evaluate("fetch('/v1/jobs', {method: 'POST'}).then(answer => answer.status)") == 422
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url(re.compile("/sign-in"))
        page.goto("/jobs")
        expect(page.get_by_label("API key")).to_be_visible()


def test_over_tls_the_cookie_is_secure_and_bound_to_the_host(server: RunningServer, client: httpx.Client) -> None:
    key = token(create_key(server, Scope.predict))

    plain, encrypted = (cookie_of(signed_in(client, key, **more)) for more in ({}, {"X-Forwarded-Proto": "https"}))

    assert plain == ("graft-key", {"path": "/", "samesite": "strict", "httponly": True})
    assert encrypted == ("__Host-graft-key", {"path": "/", "samesite": "strict", "httponly": True, "secure": True})
    client.cookies.clear()
    of_other_subdomain = {"Cookie": f"graft-key={key}", "X-Forwarded-Proto": "https"}
    assert client.get("/v1/models", headers=of_other_subdomain).status_code == 401


@pytest.mark.parametrize(
    ("told", "is_ours"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "OURS"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "OURS"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("path", ["/v1/jobs/job_none/cancel", "/jobs/job_none/cancel", "/models/mdl_none/promote"])
def test_only_our_own_pages_change_anything_with_the_cookie(
    server: RunningServer, client: httpx.Client, told: dict[str, str], is_ours: bool, path: str
) -> None:
    client.cookies.set("graft-key", token(create_key(server, Scope.admin)))
    headers = {name: server.url if value == "OURS" else value for name, value in told.items()}

    response = client.post(path, headers=headers)

    assert response.status_code == (404 if is_ours else 403)
    assert is_ours or response.json()["type"].endswith("/cross-site-request")


def test_without_keys_other_sites_change_nothing_either(client: httpx.Client) -> None:
    refused = client.post("/v1/jobs", content="{}", headers={"Sec-Fetch-Site": "cross-site"})

    assert_is_problem(refused, 403, "cross-site-request")
    assert client.post("/v1/jobs", content="{}").status_code == 422  # curl


def test_where_no_key_is_asked_for_none_is_kept(client: httpx.Client) -> None:
    response = signed_in(client, "a password, perhaps: \N{EURO SIGN}")

    assert (response.status_code, response.headers["location"]) == (303, "/models")
    assert "set-cookie" not in response.headers


def test_a_stranger_gets_no_large_form_read(client: httpx.Client) -> None:
    assert client.post("/sign-in", content="key=" + "x" * 16_000).status_code == 303
    assert_is_problem(client.post("/sign-in", content="key=x&" * 6_000), 413, "too-large")


def test_a_form_of_too_many_fields_is_refused(client: httpx.Client) -> None:
    assert_is_problem(client.post("/jobs/estimate", content="&".join(["a=1"] * 11_001)), 422, "invalid-request")


def test_an_address_that_tries_many_keys_is_told_to_wait_and_a_right_one_signs_in(
    server: RunningServer, client: httpx.Client
) -> None:
    key = token(create_key(server, Scope.train))

    found = [signed_in(client, f"ft_{place}").status_code for place in range(WRONG_KEYS_PER_MINUTE + 20)]

    assert found[:WRONG_KEYS_PER_MINUTE] == [401] * WRONG_KEYS_PER_MINUTE
    assert 429 in found[WRONG_KEYS_PER_MINUTE:]
    assert signed_in(client, key).status_code == 303


def test_a_form_on_another_site_signs_nobody_in(server: RunningServer, client: httpx.Client) -> None:
    key = token(create_key(server, Scope.predict))

    refused = signed_in(client, key, **{"Sec-Fetch-Site": "cross-site"})

    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers


def test_an_authorization_header_goes_before_the_cookie(server: RunningServer, client: httpx.Client) -> None:
    client.cookies.set("graft-key", token(create_key(server, Scope.predict)))

    assert client.get("/v1/jobs", headers=create_key(server, Scope.train)).status_code == 200
    assert client.get("/v1/jobs").status_code == 403


@pytest.mark.parametrize(
    "address", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)"]
)
def test_signing_in_leads_to_no_other_server(server: RunningServer, client: httpx.Client, address: str) -> None:
    key = token(create_key(server, Scope.predict))

    response = client.post("/sign-in", data={"key": key, "next": address})

    assert response.headers["location"] == "/"


def test_a_key_for_predictions_sees_models_and_trying_alone(browser: Browser, server: RunningServer) -> None:
    key = token(create_key(server, Scope.predict))
    model = api_builders.register_model(server.services)
    with visit(browser, server.url) as page:
        page.goto("/")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(server.url + "/")
        links = page.get_by_role("navigation").get_by_role("link").all_text_contents()
        assert links == ["Models", "Try it", "API"]
        page.goto(f"/models/{model}")
        expect(page.get_by_role("button", name="Make it the default")).to_have_count(0)
        page.goto("/datasets")
        expect(page.get_by_text("Your key's scope is too small for /datasets")).to_be_visible()


@pytest.mark.parametrize(
    ("method", "path", "least"),
    [
        ("GET", "/", Scope.predict),
        ("GET", "/models", Scope.predict),
        ("GET", "/models/mdl_1/cell", Scope.predict),
        ("GET", "/try", Scope.predict),
        ("POST", "/try", Scope.predict),
        ("POST", "/try/prd_1/feedback", Scope.predict),
        ("POST", "/models/mdl_1/promote", Scope.train),
        ("POST", "/models/aliases/default/rollback", Scope.train),
        ("GET", "/datasets", Scope.train),
        ("GET", "/jobs/job_1/live", Scope.train),
        ("POST", "/jobs", Scope.train),
        ("POST", "/jobs/estimate", Scope.train),
        ("GET", "/a-page-to-come", Scope.train),
    ],
)
def test_each_page_asks_for_the_scope_of_what_it_shows(
    server: RunningServer, client: httpx.Client, method: str, path: str, least: Scope
) -> None:
    refused = {
        scope for scope in Scope if client.request(method, path, headers=create_key(server, scope)).status_code == 403
    }

    assert refused == ({Scope.predict} if least is Scope.train else set())


def test_the_look_of_the_pages_is_open_to_all_and_nothing_beside_it(
    server: RunningServer, client: httpx.Client
) -> None:
    create_key(server, Scope.admin)

    assert client.get("/static/graft.css").status_code == 200
    for path in ("/static/../graft.db", "/static/%2e%2e/site.py", "/static/", "/static/nothing.js"):
        assert client.get(path).status_code in (401, 404)


def test_a_key_that_is_revoked_ends_what_is_open(browser: Browser, server: RunningServer) -> None:
    key = token(create_key(server, Scope.train))
    with visit(browser, server.url) as page:
        page.goto("/jobs/new")
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(re.compile("/jobs/new"))
        with server.services.database.write() as session:
            (row,) = access.list_keys(session)
            access.revoke_key(session, row.id)
        page.get_by_label("Name").fill("anything")  # the estimate is asked for again
        page.get_by_label("Name").blur()
        page.wait_for_url(re.compile("/sign-in"))


@pytest.mark.parametrize("place", ["http://[", "//[", "/\t/["])
def test_an_address_that_is_none_leads_to_the_start(server: RunningServer, client: httpx.Client, place: str) -> None:
    key = token(create_key(server, Scope.predict))

    shown = client.get("/sign-in", params={"next": place}, headers=PERSON)
    led = client.post("/sign-in", data={"key": key, "next": place})

    assert (shown.status_code, led.status_code, led.headers["location"]) == (200, 303, "/")
    assert 'name="next" value="/"' in shown.text
