"""POST /predict in its three forms, good and bad."""

import base64
from collections.abc import Iterator
from typing import Any

import api_builders
import builders
import httpx
import pytest
from api_builders import CLASSES, RunningServer, assert_is_problem

PICTURE = builders.jpeg(1)
OTHER = builders.jpeg(2)
BROKEN = PICTURE[: len(PICTURE) // 2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One for all tests here: none of them leaves anything behind."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with api_builders.client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def model(server: RunningServer) -> str:
    return api_builders.register_model(server.services)


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def assert_answers(response: httpx.Response, model: str, filenames: list[str | None]) -> list[dict[str, Any]]:
    answer = response.json()
    assert response.status_code == 200, response.text
    assert answer["model"] == model
    assert [prediction["filename"] for prediction in answer["predictions"]] == filenames
    for prediction in answer["predictions"]:
        top = prediction["top"]
        assert {row["label"] for row in top} == set(CLASSES)
        assert sum(row["score"] for row in top) == pytest.approx(1.0)
        assert top == sorted(top, key=lambda row: -row["score"])
        assert (prediction["label"], prediction["score"]) == (top[0]["label"], top[0]["score"])
    predictions: list[dict[str, Any]] = answer["predictions"]
    return predictions


def test_all_forms_answer_the_same(client: httpx.Client, model: str) -> None:
    form = client.post("/predict", files={"file": ("a/b/cat.jpg", PICTURE)})
    raw = client.post("/predict", content=PICTURE, headers={"Content-Type": "image/jpeg"})
    encoded = client.post("/predict", json={"images": [{"b64": b64(PICTURE), "filename": "cat.jpg"}]})

    (from_form,) = assert_answers(form, model, ["cat.jpg"])
    (from_raw,) = assert_answers(raw, model, [None])
    (from_json,) = assert_answers(encoded, model, ["cat.jpg"])
    assert from_form["top"] == from_raw["top"] == from_json["top"]


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json", "text/plain"])
def test_raw_picture_is_known_by_its_bytes(client: httpx.Client, model: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}

    assert_answers(client.post("/predict", content=PICTURE, headers=headers), model, [None])


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "application/json"])
def test_json_is_known_by_its_bytes(client: httpx.Client, model: str, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    body = f' {{"images": [{{"b64": "{b64(PICTURE)}"}}]}}'

    assert_answers(client.post("/predict", content=body, headers=headers), model, [None])


@pytest.mark.parametrize(
    "text",
    [
        f"data:image/jpeg;base64,{b64(PICTURE)}",
        f"data:;base64,{b64(PICTURE)}",
        "\n".join(b64(PICTURE)[i : i + 76] for i in range(0, len(b64(PICTURE)), 76)),
    ],
)
def test_base64_may_be_a_data_url_or_broken_into_lines(client: httpx.Client, model: str, text: str) -> None:
    assert_answers(client.post("/predict", json={"images": [{"b64": text}]}), model, [None])


def test_many_parts_are_answered_in_order(client: httpx.Client, model: str) -> None:
    parts = [("file", (f"{i}.jpg", picture)) for i, picture in enumerate([PICTURE, OTHER] * 20)]

    predictions = assert_answers(client.post("/predict", files=parts), model, [f"{i}.jpg" for i in range(40)])

    alone = client.post("/predict", content=OTHER).json()["predictions"][0]
    for prediction in predictions[1::2]:
        assert prediction["score"] == pytest.approx(alone["score"], abs=1e-5)


def test_unreadable_picture_in_a_batch_has_a_problem_in_its_place(client: httpx.Client, model: str) -> None:
    parts = [("file", ("a.jpg", PICTURE)), ("file", ("b.jpg", BROKEN)), ("file", ("c.txt", b"text"))]

    response = client.post("/predict", files=parts)
    good, broken, text = response.json()["predictions"]

    assert (response.status_code, good["label"] in CLASSES) == (200, True)
    assert set(broken) == {"filename", "error"}
    assert broken["error"]["detail"] == "b.jpg cannot be read: truncated JPEG."
    assert (broken["error"]["type"], broken["error"]["status"]) == ("/problems/unreadable-image", 422)
    assert "errors" not in broken["error"]
    assert broken["error"]["request_id"] == response.headers["x-request-id"]
    assert text["filename"] == "c.txt"
    assert "not a picture" in text["error"]["detail"]


@pytest.mark.parametrize("content", [BROKEN, b"hello", b"\x00" * 100, b"GIF89a" + bytes(100)])
def test_single_unreadable_picture_is_422(client: httpx.Client, model: str, content: bytes) -> None:
    assert_is_problem(client.post("/predict", content=content), 422, "unreadable-image")


def test_single_picture_over_the_limit_is_413(client: httpx.Client, model: str) -> None:
    too_large = PICTURE + bytes(32 * 1024**2)

    assert_is_problem(client.post("/predict", content=too_large), 413, "too-large")


def test_all_unreadable_is_422_for_the_whole(client: httpx.Client, model: str) -> None:
    response = client.post("/predict", json={"images": [{"b64": "!!"}, {"b64": b64(b"text"), "filename": "x"}]})

    problem = assert_is_problem(response, 422, "unreadable-image")
    assert problem["errors"] == [{"pointer": "#/images/0/b64", "detail": "is not valid base64"}]
    assert "x cannot be read" in problem["detail"]


@pytest.mark.parametrize(("top_k", "rows"), [(1, 1), (2, 2), (1000, 2), (10**30, 2)])
def test_top_k_rows_are_answered_as_far_as_there_are_classes(
    client: httpx.Client, model: str, top_k: int, rows: int
) -> None:
    in_query = client.post(f"/predict?top_k={top_k}", content=PICTURE)
    in_json = client.post("/predict", json={"images": [{"b64": b64(PICTURE)}], "top_k": top_k})
    in_form = client.post("/predict", files={"file": ("a.jpg", PICTURE)}, data={"top_k": str(top_k)})

    for response in (in_query, in_json, in_form):
        assert len(response.json()["predictions"][0]["top"]) == rows


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "1.5"])
def test_top_k_out_of_range_is_pointed_at(client: httpx.Client, model: str, top_k: str) -> None:
    for response in (
        client.post(f"/predict?top_k={top_k}", content=PICTURE),
        client.post("/predict", files={"file": ("a.jpg", PICTURE)}, data={"top_k": top_k}),
        client.post("/predict", content=f'{{"images": [{{"b64": "AAAA"}}], "top_k": "{top_k}"}}'),
    ):
        problem = assert_is_problem(response, 422, "invalid-request")
        assert problem["errors"][0]["pointer"] == "#/top_k"


@pytest.mark.parametrize(
    "request_options",
    [
        {"content": b""},
        {"content": b"[]", "headers": {"Content-Type": "application/json"}},
        {"content": b"{"},
        {"json": {}},
        {"json": {"images": []}},
        {"json": {"images": [{}]}},
        {"json": {"images": [{"b64": 5}]}},
        {"json": {"images": [{"b64": "", "url": "http://169.254.169.254/"}]}},
        {"json": {"images": [{"b64": "AAAA"}], "topk": 3}},
        {"files": {"picture": (None, "no file name")}},
        {"data": {"model": "default"}, "files": {"top_k": (None, "1")}},
        {"content": b"--x\r\n", "headers": {"Content-Type": "multipart/form-data"}},
        {"content": b"garbage", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
    ],
)
def test_request_without_pictures_is_refused_with_advice(
    client: httpx.Client, model: str, request_options: dict[str, Any]
) -> None:
    problem = assert_is_problem(client.post("/predict", **request_options), 422, "invalid-request")

    assert problem["detail"]


def form_of(filename: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + filename + b'"\r\n\r\n'
    return head + PICTURE + b"\r\n--x--\r\n"


@pytest.mark.parametrize("charset", ["undefined", "punycode", "utf-7"])
def test_a_form_in_a_charset_that_makes_no_text_is_refused(client: httpx.Client, model: str, charset: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    content = form_of(b"+2AA-\xff.jpg")  # a half of a surrogate in UTF-7

    problem = assert_is_problem(client.post("/predict", content=content, headers=headers), 422, "invalid-request")

    assert "UTF-8" in problem["detail"]


def test_a_name_with_a_nul_is_answered_without_it(client: httpx.Client, model: str) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=UTF-8"}

    response = client.post("/predict", content=form_of(b"a\x00b.jpg"), headers=headers)

    assert_answers(response, model, ["a\N{REPLACEMENT CHARACTER}b.jpg"])


def test_more_than_64_pictures_are_refused(client: httpx.Client, model: str) -> None:
    parts = [("file", (f"{i}.jpg", b"x")) for i in range(65)]

    assert_is_problem(client.post("/predict", files=parts), 422, "invalid-request")
