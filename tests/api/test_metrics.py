"""What an operator is woken by: a full disk, a queue that does not move, workers that are gone."""

import shutil
import time
from datetime import timedelta

import httpx
from api_builders import RunningServer
from prometheus_client.parser import text_string_to_metric_families
from queue_builders import claim_next, submit
from sqlalchemy import update

from app.db.tables import JobRow, utc_now
from app.jobs import queue


def value(client: httpx.Client, name: str, **labels: str) -> float:
    families = text_string_to_metric_families(client.get("/metrics").text)
    [found] = [s.value for family in families for s in family.samples if (s.name, s.labels) == (name, labels)]
    return found


def test_how_long_the_oldest_job_waits(server: RunningServer, client: httpx.Client) -> None:
    assert value(client, "graft_longest_queued_seconds", kind="training") == 0
    database = server.services.database
    first, _ = submit(database), submit(database)
    with database.write() as session:
        session.execute(update(JobRow).where(JobRow.id == first).values(created_at=utc_now() - timedelta(hours=1)))

    assert 3600 <= value(client, "graft_longest_queued_seconds", kind="training") < 3660
    claim_next(database)
    assert value(client, "graft_longest_queued_seconds", kind="training") < 60
    assert value(client, "graft_longest_queued_seconds", kind="ingest") == 0


def test_for_how_long_a_running_job_s_owner_is_silent(server: RunningServer, client: httpx.Client) -> None:
    database = server.services.database
    submit(database)
    claim = claim_next(database)
    assert claim is not None
    assert value(client, "graft_longest_silence_seconds", kind="training") == 0
    time.sleep(0.3)
    assert value(client, "graft_longest_silence_seconds", kind="training") >= 0.3

    with database.write() as session:
        queue.beat(session, claim)
    assert value(client, "graft_longest_silence_seconds", kind="training") == 0


def test_what_is_free_on_the_disk(server: RunningServer, client: httpx.Client) -> None:
    free = shutil.disk_usage(server.services.storage.root).free

    assert abs(value(client, "graft_disk_spare_bytes") - free) < 2**30
