"""What ended long ago goes by itself, in the order that its settings say, and what people would miss stays."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import api_builders
import builders
import pytest
import queue_builders
from api_builders import RunningServer, assert_is_problem
from disks import fill
from httpx_sse import connect_sse
from running import wait_until
from sqlalchemy import select, update

from app import holdings, workspaces
from app.api import retention
from app.api.retention import Swept
from app.api.services import Services
from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, JobRow, PredictionRow, utc_now
from app.errors import Overloaded
from app.jobs import batches, queue
from app.jobs.states import JobKind
from app.settings import MEBIBYTE, Settings
from app.storage import LocalStorage
from app.workspaces import Limits

BATCH = {"size_bytes": 1, "top_k": 1, "files": 1, "sha256": "0" * 64}


@pytest.fixture
def settings(new_database_url: Callable[[], str], tmp_path: Path) -> Settings:
    return api_builders.settings_for(tmp_path, database_url=new_database_url())


@pytest.fixture
def server(settings: Settings) -> Iterator[RunningServer]:
    with RunningServer(settings) as server:
        yield server


def submit(database: Database, *, kind: JobKind) -> str:
    with database.write() as session:
        return queue.submit(session, kind=kind, dataset_id="ds_1", model_id="mdl_1", spec=BATCH).id


def ended(database: Database, *, days_ago: float, how: str = "succeed", kind: JobKind = JobKind.training) -> str:
    """A job with an epoch, progress and a line of its log, which ended so long ago."""
    submit(database, kind=kind)
    claim = queue_builders.claim_next(database, kind=kind)
    assert claim is not None
    with database.write() as session:
        queue.record_log(session, claim, "Loading weights.")
        queue.record_epoch(session, claim, queue_builders.epoch(1), {"fraction": 0.5})
        if how == "succeed":
            queue.succeed(session, claim, metrics={"val_accuracy": 0.9})
        elif how == "fail":
            queue.fail(session, claim, queue_builders.ERROR)
        else:
            queue.request_cancel(session, claim.job_id, kind=kind)
            queue.finish_cancelled(session, claim)
        long_ago = utc_now() - timedelta(days=days_ago)
        session.execute(update(JobRow).where(JobRow.id == claim.job_id).values(finished_at=long_ago))
    return claim.job_id


def ended_batch(services: Services, *, days_ago: float) -> str:
    batch_id = ended(services.database, days_ago=days_ago, kind=JobKind.prediction)
    for key in (batches.archive_key(batch_id), f"{batches.results_key(batch_id, 1)}/results.jsonl"):
        path = services.storage.path(key)
        path.parent.mkdir(parents=True)
        path.write_text("{}\n")
    return batch_id


def sweep(server: RunningServer) -> Swept:
    return retention.sweep(server.app.state.services)


def kinds_of_events(database: Database, job_id: str) -> list[str]:
    return [event.event for event in queue_builders.event_log(database, job_id)]


def test_the_log_of_a_job_that_ended_long_ago_goes_and_all_else_of_it_stays(server: RunningServer) -> None:
    database = server.services.database
    old, recent = ended(database, days_ago=31), ended(database, days_ago=29)
    ingest = ended(database, days_ago=31, kind=JobKind.ingest)
    running = queue_builders.claimed(database)

    assert sweep(server) == Swept(logs=2, batches=0, failed_jobs=0)

    whole = ["status", "status", "log", "epoch", "status"]
    assert kinds_of_events(database, old) == kinds_of_events(database, ingest) == ["status"]
    assert kinds_of_events(database, recent) == whole
    assert kinds_of_events(database, running.job_id) == ["status", "status"]
    with api_builders.client_of(server) as client:
        job = client.get(f"/v1/jobs/{old}").json()
        assert (job["status"], job["metrics"]["val_accuracy"]) == ("succeeded", 0.9)
        assert len(client.get(f"/v1/jobs/{old}/history").json()["data"]) == 1
        assert client.get(f"/jobs/{old}", headers={"Accept": "text/html"}).status_code == 200
    assert sweep(server) == Swept(logs=0, batches=0, failed_jobs=0)


def test_a_stream_that_was_cut_before_the_log_went_still_reads_how_the_job_ended(server: RunningServer) -> None:
    job_id = ended(server.services.database, days_ago=31)
    first, *_, last = (str(event.id) for event in queue_builders.event_log(server.services.database, job_id))
    sweep(server)

    with api_builders.client_of(server) as client:
        path = f"/v1/jobs/{job_id}/events"
        for seen in ({}, {"Last-Event-ID": first}):
            with connect_sse(client, "GET", path, headers=seen) as source:
                received = [(event.event, event.json()["status"]) for event in source.iter_sse()]
            assert received == [("status", "succeeded"), ("done", "succeeded")]
        again = client.get(path, headers={"Accept": "text/event-stream", "Last-Event-ID": last})
        assert again.status_code == 204
        listing = client.get(path, params={"after": first}).json()
        assert ([event["id"] for event in listing["data"]], listing["has_more"]) == ([last], False)


def test_a_batch_that_ended_long_ago_goes_with_its_files(server: RunningServer) -> None:
    services = server.services
    old, recent = ended_batch(services, days_ago=91), ended_batch(services, days_ago=89)
    waiting = submit(services.database, kind=JobKind.prediction)

    assert sweep(server).batches == 1

    assert not services.storage.exists(batches.folder_key(old))
    assert services.storage.announced_keys() == set()
    with api_builders.client_of(server) as client:
        assert_is_problem(client.get(f"/v1/batches/{old}/results"), 404, "not-found")
        assert client.get(f"/v1/batches/{recent}/results").text == "{}\n"
        assert [batch["id"] for batch in client.get("/v1/batches").json()["data"]] == [waiting, recent]


@pytest.mark.parametrize("days", [None, 30.0])
def test_jobs_that_failed_or_were_cancelled_go_only_where_an_operator_wants_it(
    settings: Settings, days: float | None
) -> None:
    with RunningServer(settings.model_copy(update={"failed_job_days": days})) as server:
        database = server.services.database
        good, failed, cancelled = (ended(database, days_ago=31, how=how) for how in ("succeed", "fail", "cancel"))
        recent = ended(database, days_ago=29, how="fail")

        assert sweep(server).failed_jobs == (0 if days is None else 2)

        with api_builders.client_of(server) as client:
            left = [job["id"] for job in client.get("/v1/jobs").json()["data"]]
        assert left == ([recent, cancelled, failed, good] if days is None else [recent, good])


def test_a_server_sweeps_soon_after_it_starts(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "FIRST_SWEEP_SECONDS", 0.2)
    database = Database(settings.database_url).within(DEFAULT_WORKSPACE)
    job_id = ended(database, days_ago=31)
    with RunningServer(settings):
        wait_until(
            lambda: kinds_of_events(database, job_id) == ["status"], within_seconds=30, otherwise="nothing was swept"
        )
    database.dispose()


def test_batches_go_on_a_full_disk_too(small_disk: Path) -> None:
    settings = api_builders.settings_for(small_disk, ballast_bytes=MEBIBYTE)
    with api_builders.running(settings) as server, api_builders.client_of(server) as client:
        wait_until((settings.data_dir / "graft.db-ballast").exists, within_seconds=30, otherwise="no ballast")
        old = [ended_batch(server.services, days_ago=91) for _ in range(2)]
        dataset = api_builders.ready_dataset(server.services.database)
        fill(small_disk)
        request = {"dataset": dataset, "method": "from_scratch", "backbone": "squeezenet1_1"}
        # The log of the database is used up by writers who get no ballast.
        assert any(client.post("/v1/jobs", json=request).status_code == 507 for _ in range(500))

        assert sweep(server).batches == 2

        assert [server.services.storage.exists(batches.folder_key(batch)) for batch in old] == [False, False]


@pytest.mark.parametrize("what", ["model", "prediction", "expired prediction", "batch", "swept batch"])
def test_files_that_outlast_their_row_are_swept(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def delete(_storage: LocalStorage, _key: str) -> None:
        raise Overloaded("As if this process had died here.")  # known, so that nobody prints all of its frames

    services, storage = server.services, server.services.storage
    model = api_builders.register_model(services)
    other = api_builders.register_model(services, aliases=())
    batch = ended_batch(services, days_ago=91)
    with api_builders.client_of(server) as client:
        answer = client.post("/predict", params={"store": "true"}, content=builders.jpeg())
        prediction = answer.json()["predictions"][0]["id"]
        with services.database.write() as session:
            session.execute(update(PredictionRow).values(created_at=utc_now() - timedelta(days=91)))
        key, path = {
            "model": (f"models/{other}", f"/v1/models/{other}"),
            "prediction": (f"predictions/{prediction}", f"/v1/predictions/{prediction}"),
            "expired prediction": (f"predictions/{prediction}", ""),
            "batch": (f"batches/{batch}", f"/v1/batches/{batch}"),
            "swept batch": (f"batches/{batch}", ""),
        }[what]
        with monkeypatch.context() as broken:
            broken.setattr(LocalStorage, "delete", delete)
            if path:
                assert client.delete(path).status_code == 503
            else:
                with pytest.raises(Overloaded):
                    sweep(server) if what == "swept batch" else services.shelf.expire()
    is_wanted = partial(holdings.has_row, server.app.state.services.database)
    assert (is_wanted(key), storage.exists(key)) == (False, True)

    storage.sweep_announced(is_wanted, older_than_seconds=0)

    assert not storage.exists(key)
    assert storage.exists(f"models/{model}")


@pytest.mark.parametrize("path", ["batches", "jobs", "predictions", "models"])
def test_a_name_that_leads_elsewhere_deletes_nothing(server: RunningServer, path: str) -> None:
    batch = ended_batch(server.services, days_ago=1)
    for name in ("..", "%2e%2e", "."):
        request = f"DELETE /v1/{path}/{name} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
        assert b" 40" in api_builders.raw_exchange(server, request.encode()).splitlines()[0]
    assert server.services.storage.exists(batches.folder_key(batch))


def test_what_one_workspace_keeps_too_much_of_costs_no_other_a_prediction(settings: Settings) -> None:
    with RunningServer(settings) as server:
        own, whole = server.services.database, server.app.state.services.database
        with whole.write() as session:
            theirs = whole.within(workspaces.create(session, "theirs", Limits()).id)
        for database, ids in ((own, ("prd_1", "prd_2")), (theirs, ("prd_3", "prd_4", "prd_5"))):
            with database.write() as session:
                session.add_all([_kept(name) for name in ids])
        with own.write() as session:
            session.execute(update(PredictionRow).where(PredictionRow.id == "prd_1").values(size_bytes=100))

    with RunningServer(settings.model_copy(update={"max_stored_prediction_bytes": 100})) as server:
        database = server.app.state.services.database
        wait_until(lambda: len(_predictions(database)) < 5, within_seconds=30, otherwise="nothing was swept")
        wait_until(lambda: len(_predictions(database)) == 3, within_seconds=30, otherwise=str(_predictions(database)))
    assert _predictions(database) == ["prd_2", "prd_4", "prd_5"]
    database.dispose()  # the server has closed it, and this opened it again


def _kept(name: str) -> PredictionRow:
    answer = {"label": "cat", "score": 1.0, "top": []}
    return PredictionRow(
        id=name, model_id="mdl_1", dataset_id="ds_1", size_bytes=50, sha256="0", predicted={"": "cat"}, answer=answer
    )


def _predictions(database: Database) -> list[str]:
    with database.read() as session:
        return list(session.scalars(select(PredictionRow.id).order_by(PredictionRow.seq)))
