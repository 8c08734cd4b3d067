"""PostgreSQL is stopped for a while, under a `graft up` that trains and serves: both of its programs outlast that."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from api_builders import assert_is_problem
from running import graft_up, pictures_zip, wait_until
from test_processes import LONG, SHORT, assert_whole, epochs_done, finished, ready_dataset, submit

if TYPE_CHECKING:
    from conftest import StoppablePostgres

SOON_SECONDS = 60.0


@pytest.mark.slow
def test_stopped_postgres_is_told_with_503_and_everything_goes_on_when_it_is_back(
    tmp_path: Path, stoppable_postgres: "StoppablePostgres"
) -> None:
    with (
        graft_up(tmp_path, database_url=stoppable_postgres.url, webhooks="true") as graft,
        httpx.Client(base_url=graft.url, timeout=90) as http,
    ):
        dataset = ready_dataset(http)
        default = finished(http, submit(http, dataset, SHORT))["model"]
        job_id = submit(http, dataset, LONG)
        wait_until(lambda: epochs_done(http, job_id) >= 1, within_seconds=SOON_SECONDS, otherwise="it does not train")
        programs = [graft.program("app.main"), graft.program("worker.main"), graft.program("worker.child", "training")]
        stream = Stream(http, job_id)
        stream.wait_for_an_epoch()

        stoppable_postgres.stop()
        for method, path, content in (
            ("GET", f"/v1/jobs/{job_id}", None),
            ("GET", f"/v1/jobs/{job_id}/events", None),
            ("GET", f"/v1/jobs/{job_id}?wait=30", None),
            ("POST", f"/v1/jobs/{job_id}/cancel", None),
            ("PUT", "/v1/datasets", pictures_zip(per_class=4)),
            ("POST", "/predict", pictures_zip()[:100]),
        ):
            answer = http.request(method, path, content=content)
            assert answer.status_code == 503, (method, path, answer.text)
            assert_is_problem(answer, 503, "overloaded")
            assert int(answer.headers["retry-after"]) > 0
        assert_is_problem(http.get("/readyz"), 503, "not-ready")
        assert http.get("/healthz").status_code == 200
        page = http.get("/", headers={"Accept": "text/html"})
        assert (page.status_code, page.headers["content-type"]) == (503, "text/html; charset=utf-8")
        wait_until(
            lambda: "aliases cannot be followed" in (tmp_path / "graft.log").read_text(),
            within_seconds=SOON_SECONDS,
            otherwise="nothing beside the requests has noticed",
        )
        stoppable_postgres.start()

        wait_until(graft.is_ready, within_seconds=SOON_SECONDS, otherwise="the API did not go on by itself")
        job = finished(http, job_id)
        assert job["attempt"] == 1
        assert_whole(http, job, LONG["epochs"])
        assert [process.is_running() for process in programs[:2]] == [True, True]
        assert stream.epochs_to_its_end() == LONG["epochs"], "the stream did not outlast it"
        wait_until(
            lambda: http.get("/readyz").status_code == 200, within_seconds=SOON_SECONDS, otherwise="default not loaded"
        )
        assert job["model"] != default
        assert http.put("/v1/datasets", params={"wait": 60}, content=pictures_zip()).json()["status"] == "ready"
        assert graft.stop() == 0
    log = (tmp_path / "graft.log").read_text()
    assert '"status": 500' not in log
    assert "Traceback" not in log


class Stream:
    """The epochs that a job's event stream tells of, over one connection."""

    def __init__(self, http: httpx.Client, job_id: str) -> None:
        self._http, self._path = http, f"/v1/jobs/{job_id}/events"
        self._kinds: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait_for_an_epoch(self) -> None:
        wait_until(lambda: "epoch" in self._kinds, within_seconds=SOON_SECONDS, otherwise="the stream tells nothing")

    def epochs_to_its_end(self) -> int:
        self._thread.join(SOON_SECONDS)
        assert self._kinds[-1] == "done"
        return self._kinds.count("epoch")

    def _read(self) -> None:
        with (
            suppress(httpx.TransportError),  # cut off: it has not said that the job is done, then
            self._http.stream("GET", self._path, headers={"Accept": "text/event-stream"}) as stream,
        ):
            for line in stream.iter_lines():
                if line.startswith("event: "):
                    self._kinds.append(line.removeprefix("event: "))
