"""Every failure, from wherever it comes, is one kind of answer."""

import io
from collections.abc import Iterator

import api_builders
import httpx
import pytest
from api_builders import RunningServer, assert_is_problem

from app.api.problems import Problem


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


def test_unknown_path_is_a_problem(client: httpx.Client) -> None:
    problem = assert_is_problem(client.get("/v1/nothing"), 404, "not-found")

    assert problem["error"] == {
        "message": problem["detail"],
        "type": "not_found_error",
        "param": None,
        "code": "not-found",
    }


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/datasets", "HEAD, GET, POST, PUT"),
        ("PATCH", "/v1/datasets/ds_1", "HEAD, GET, DELETE"),
        ("GET", "/predict", "POST"),
        ("POST", "/healthz", "HEAD, GET"),
    ],
)
def test_wrong_method_names_all_that_the_path_takes(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    response = client.request(method, path)

    assert_is_problem(response, 405, "method-not-allowed")
    assert response.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v2/models/none", "/hf/none"])
def test_inference_protocols_get_the_error_as_a_string(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert response.json()["error"] == response.json()["detail"] == response.headers["x-error-message"]


def test_error_in_a_header_is_one_printable_line_of_bounded_length() -> None:
    detail = "two\r\nlines:\x0b é\x00 " + "x" * 5000
    response = Problem(status=422, code="bad", title="Bad", detail=detail).response(request_id="1", path="/hf/default")

    assert response.headers["x-error-message"].startswith("two lines: ? xxx")
    assert len(response.headers["x-error-message"]) <= 1000
    assert response.headers["x-error-code"] == "bad"


def test_mistyped_query_parameter_is_refused_with_the_known_ones(client: httpx.Client) -> None:
    problem = assert_is_problem(client.post("/predict?topk=3"), 422, "invalid-request")

    assert problem["errors"] == [{"pointer": "#/topk", "detail": "there is no such query parameter"}]
    assert "adapt_steps, coverage, explain, model, neighbors, store, top_k." in problem["detail"]


@pytest.mark.parametrize("value", ["0", "201", "x", "nan", ""])
def test_limit_out_of_range_points_at_it(client: httpx.Client, value: str) -> None:
    problem = assert_is_problem(client.get(f"/v1/datasets?limit={value}"), 422, "invalid-request")

    assert problem["errors"][0]["pointer"] == "#/limit"
    assert problem["error"]["param"] == "limit"


@pytest.mark.parametrize("path", ["/v1/datasets?after=%00", "/v1/jobs/%00"])
def test_nul_in_the_address_is_refused(client: httpx.Client, path: str) -> None:
    assert_is_problem(client.get(path), 422, "invalid-request")


def test_what_nobody_expected_is_a_problem_without_its_cause(
    server: RunningServer, client: httpx.Client, printed: io.StringIO
) -> None:
    async def broken() -> None:
        raise RuntimeError("secret: /home/someone")

    server.app.add_api_route("/v1/broken", broken)

    response = client.get("/v1/broken")

    assert_is_problem(response, 500, "internal-error")
    assert "secret" not in response.text
    assert "secret: /home/someone" in printed.getvalue()


def test_people_are_told_of_it_on_a_page_with_what_the_log_calls_it(
    server: RunningServer, client: httpx.Client, printed: io.StringIO
) -> None:
    async def broken() -> None:
        raise RuntimeError("secret: /home/someone")

    server.app.add_api_route("/broken", broken)

    response = client.get("/broken", headers={"Accept": "text/html", "X-Request-ID": "a-request"})

    assert response.status_code == 500
    assert "it has been logged under this request_id" in response.text and "<code>a-request</code>" in response.text
    assert "secret" not in response.text
    assert "a-request" in printed.getvalue()


def test_compressed_bodies_are_refused(client: httpx.Client) -> None:
    response = client.post("/v1/jobs", content=b"{}", headers={"Content-Encoding": "gzip"})

    assert_is_problem(response, 415, "unsupported-media-type")


def test_own_request_id_comes_back(client: httpx.Client) -> None:
    response = client.get("/healthz", headers={"X-Request-ID": "Trace-1.a_b"})

    assert response.headers["x-request-id"] == "Trace-1.a_b"


@pytest.mark.parametrize("insane", ["", "a b", "x" * 129, "é".encode("latin-1")])
def test_insane_request_id_is_replaced(client: httpx.Client, insane: str | bytes) -> None:
    response = client.get("/healthz", headers=[("X-Request-ID", insane)])

    assert len(response.headers["x-request-id"]) == 32


def test_head_is_answered_like_get_without_a_body(client: httpx.Client) -> None:
    response = client.head("/v1/datasets")

    assert (response.status_code, response.content) == (200, b"")
