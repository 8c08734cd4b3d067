"""Traces of real processes, as a real collector gets them."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from collector import Collector, Seen, collecting
from running import RunningGraft, graft_up, pictures_zip, wait_until

from app.supervisor import free_port

SENT_WITHIN_SECONDS = 60.0
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
JOB = {
    "method": "from_scratch",
    "backbone": "squeezenet1_1",
    "recipe": "classic",
    "hyperparameters": {"epochs": 3, "image_size": 32, "batch_size": 8},
}


@contextmanager
def graft_and_client(folder: Path, **settings: str) -> Iterator[tuple[RunningGraft, httpx.Client]]:
    folder.mkdir(exist_ok=True)
    with graft_up(folder, **settings) as graft, httpx.Client(base_url=graft.url, timeout=90) as http:
        yield graft, http


def upload(http: httpx.Client, **headers: str) -> str:
    answer = http.put("/v1/datasets?name=colours&wait=60", content=pictures_zip(per_class=6), headers=headers).json()
    assert answer["status"] == "ready", answer
    return str(answer["id"])


def train(http: httpx.Client, dataset: str, job: dict[str, Any] = JOB, **headers: str) -> dict[str, Any]:
    answer = http.post("/v1/jobs?wait=60", json={"dataset": dataset, **job}, headers=headers).json()
    assert answer["status"] == "succeeded", answer
    return dict(answer)


def wait_for(collector: Collector, *names: str, count: int = 1) -> None:
    wait_until(
        lambda: all(len(collector.named(name)) >= count for name in names),
        within_seconds=SENT_WITHIN_SECONDS,
        otherwise=f"spans that came: {sorted({span.name for span in collector.spans})}",
    )


def ancestors(span: Seen, collector: Collector) -> list[str]:
    """The names of what a span is part of, the nearest first, up to what the collector was never told."""
    by_id = {each.span_id: each for each in collector.spans}
    names = []
    while span.parent_id in by_id:
        span = by_id[span.parent_id]
        names.append(span.name)
    return [*names, span.parent_id]


@pytest.mark.slow
def test_one_trace_leads_from_the_caller_through_the_api_and_the_queue_into_the_jobs_process(tmp_path: Path) -> None:
    with collecting() as collector, graft_and_client(tmp_path, otlp_endpoint=collector.url) as (graft, http):
        dataset = upload(http, **TRACEPARENT)
        train(http, dataset, **TRACEPARENT)
        wait_for(collector, "job training", "run training", "job ingest", "run ingest", "POST /v1/jobs", "epoch 3")
        assert graft.stop() == 0

    assert [span for span in collector.spans if span.trace_id != TRACE] == []
    [job], [run] = collector.named("job training"), collector.named("run training")
    [last_epoch] = collector.named("epoch 3")
    assert ancestors(last_epoch, collector) == ["train", "run training", "job training", "POST /v1/jobs", CALLER]
    [ingested] = collector.named("ingest")
    assert ancestors(ingested, collector) == ["run ingest", "job ingest", "PUT /v1/datasets", CALLER]
    [submitted] = collector.named("POST /v1/jobs")
    assert (submitted.service, job.service, run.service) == ("graft-api", "graft-worker", "graft-worker")
    assert submitted.attributes["http.response.status_code"] == 201
    assert run.attributes["graft.status"] == "succeeded"
    assert last_epoch.attributes["graft.val_accuracy"] <= 1
    assert not any(span.is_error for span in collector.spans)
    # Lines of the API, the worker and the job's process, each with the trace that it belongs to.
    lines = [json.loads(line) for line in (tmp_path / "graft.log").read_text().splitlines()]
    traced = {line["event"] for line in lines if line.get("trace_id") == TRACE}
    assert {"request", "job_claimed", "job_started", "job_left"} <= traced


@pytest.mark.slow
def test_requests_without_a_trace_begin_one_each_and_probes_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
        with graft_and_client(tmp_path) as (graft, http):
            http.get("/metrics")
            http.get("/v1/jobs/job_nowhere")
            http.head("/v1/jobs")
            http.post("/predict", content=b"no picture")
            assert graft.stop() == 0

    assert sorted(span.name for span in collector.spans) == ["GET /v1/jobs/{job_id}", "HEAD /v1/jobs", "POST /predict"]
    assert len({span.trace_id for span in collector.spans}) == 3
    assert {(span.service, span.parent_id) for span in collector.spans} == {("pictures", "")}
    [missed] = collector.named("GET /v1/jobs/{job_id}")
    assert missed.attributes["http.response.status_code"] == 404
    assert not missed.is_error  # the caller's


@pytest.mark.slow
def test_a_killed_process_is_seen_in_its_workers_span(tmp_path: Path) -> None:
    job = {**JOB, "hyperparameters": {"epochs": 60, "image_size": 64, "batch_size": 2}}
    with collecting() as collector, graft_and_client(tmp_path, otlp_endpoint=collector.url) as (graft, http):
        dataset = upload(http)
        submitted = http.post("/v1/jobs", json={"dataset": dataset, **job}, headers=TRACEPARENT).json()
        job_id = submitted["id"]

        def is_training() -> bool:
            return bool(http.get(f"/v1/jobs/{job_id}/history").json()["data"])

        wait_until(is_training, within_seconds=90, otherwise="it never trained")
        [child] = [p for p in graft.descendants() if {"worker.child", "training"} <= set(p.cmdline())]
        os.kill(child.pid, signal.SIGKILL)
        wait_for(collector, "job training")
        http.post(f"/v1/jobs/{job_id}/cancel")

    [killed] = [span for span in collector.named("job training") if span.attributes["graft.attempt"] == 1]
    assert killed.is_error
    assert killed.trace_id == TRACE


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_nobody_anything_but_the_spans(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    with graft_and_client(tmp_path, otlp_endpoint=nowhere) as (graft, http):
        dataset = upload(http)
        first, second = train(http, dataset), train(http, dataset)
        assert graft.stop() == 0

    assert (first["attempt"], second["attempt"]) == (1, 1)


@pytest.mark.slow
def test_without_a_collector_nothing_is_traced_or_stored(tmp_path: Path) -> None:
    with graft_and_client(tmp_path) as (graft, http):
        upload(http, **TRACEPARENT)
        assert graft.stop() == 0

    assert "trace" not in (tmp_path / "graft.log").read_text()
