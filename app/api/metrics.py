"""What Prometheus reads at /metrics: counted here, or looked up in the database when asked."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select

from app.db.engine import Database
from app.db.tables import JobRow, utc_now
from app.jobs import queue
from app.jobs.queue import Lease
from app.jobs.states import JobKind, JobStatus
from app.storage import LocalStorage

# From a cached answer to a cold model; predictions on one CPU lie in the middle.
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One registry per app, never the library's global one: several apps may live in one process, as in tests."""

    def __init__(self, database: Database, storage: LocalStorage) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "graft_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "graft_request_seconds",
            "Time from a request's headers to the end of its answer.",
            ["method", "route"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._predictions = Counter(
            "graft_predictions", "Pictures sent for prediction.", ["outcome"], registry=self.registry
        )
        self._batch_size = Histogram(
            "graft_prediction_batch_size",
            "Pictures in one forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self._model_loads = Counter(
            "graft_model_loads", "Models loaded for prediction.", ["outcome"], registry=self.registry
        )
        # There from the start at 0: Prometheus sees no increase in a series that begins with its first event.
        for outcomes, counter in (
            (("answered", "refused"), self._predictions),
            (("loaded", "failed"), self._model_loads),
        ):
            for outcome in outcomes:
                counter.labels(outcome)
        self.registry.register(_JobsCollector(database))
        Gauge(
            "graft_disk_spare_bytes",
            "What is free beyond the reserve; at 0 and below, uploads and models are refused.",
            registry=self.registry,
        ).set_function(storage.spare_bytes)

    def observe_request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        # Anybody can send any method: an unbounded label would be an unbounded table.
        method = method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(method, route).observe(seconds)

    def count_predictions(self, *, answered: int, refused: int) -> None:
        self._predictions.labels("answered").inc(answered)
        self._predictions.labels("refused").inc(refused)

    def observe_batch(self, size: int) -> None:
        self._batch_size.observe(size)

    def count_model_load(self, *, is_loaded: bool) -> None:
        self._model_loads.labels("loaded" if is_loaded else "failed").inc()

    def add_gauge(self, name: str, meaning: str, read: Callable[[], Mapping[str, float]], *, label: str) -> None:
        """A gauge that is asked for its values at each scrape. read: label value -> value."""
        self.registry.register(_GaugeCollector(name, meaning, read, label))

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format. Reads the database."""
        return generate_latest(self.registry)


class _GaugeCollector(Collector):
    def __init__(self, name: str, meaning: str, read: Callable[[], Mapping[str, float]], label: str) -> None:
        self._name, self._meaning, self._read, self._label = name, meaning, read, label

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._meaning, labels=[self._label])]

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._meaning, labels=[self._label])
        for value_of_label, value in self._read().items():
            family.add_metric([value_of_label], value)
        return [family]


class _JobsCollector(Collector):
    """The queue as the database knows it: the workers are other processes, maybe on other machines."""

    def __init__(self, database: Database, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database = database
        self._monotonic = monotonic
        # Of each running job what was last seen of its lease, and when that was first seen.
        self._seen: dict[str, tuple[tuple[int, int], float]] = {}

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        jobs, depth, speed, waited, silent = families = self._families()
        with self._database.read() as session:
            rows = session.execute(
                select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
            )
            counts: dict[tuple[str, str], int] = {(kind, status): count for kind, status, count in rows}
            running = session.scalars(
                select(JobRow.progress).where(JobRow.kind == JobKind.training, JobRow.status == JobStatus.running)
            ).all()
            oldest = session.execute(
                select(JobRow.kind, func.min(JobRow.created_at))
                .where(JobRow.status == JobStatus.queued)
                .group_by(JobRow.kind)
            )
            queued_since = {row.kind: row[1] for row in oldest}
            leases = queue.running_leases(session)
        silences = self._silences(leases)
        for kind in JobKind:
            since = queued_since.get(kind)
            waited.add_metric([kind], max((utc_now() - since).total_seconds(), 0.0) if since else 0.0)
            silent.add_metric([kind], max(silences.get(kind, []), default=0.0))
            for status in JobStatus:
                jobs.add_metric([kind, status], counts.get((kind, status), 0))
            depth.add_metric([kind], counts.get((kind, JobStatus.queued), 0))
        speed.add_metric([], sum((progress or {}).get("images_per_second") or 0.0 for progress in running))
        return families

    def _silences(self, leases: Sequence[Lease]) -> dict[JobKind, list[float]]:
        """Seconds since each running job's owner was last seen to renew its lease, by this server's own clock.

        As LeaseObserver, which judges, but counting all of the time between two looks: scrapes are far apart.
        """
        now, before, self._seen = self._monotonic(), self._seen, {}
        found = defaultdict(list)
        for lease in leases:
            latest, since = before.get(lease.job_id, (None, now))
            renewed = (lease.fence, lease.beat)
            self._seen[lease.job_id] = (renewed, since if latest == renewed else now)
            found[lease.kind].append(now - self._seen[lease.job_id][1])
        return found

    def _families(self) -> tuple[GaugeMetricFamily, ...]:
        return (
            GaugeMetricFamily("graft_jobs", "Jobs by kind and status.", labels=["kind", "status"]),
            GaugeMetricFamily("graft_queue_depth", "Jobs that wait for a worker.", labels=["kind"]),
            GaugeMetricFamily(
                "graft_training_images_per_second", "Images that all running training jobs take in per second."
            ),
            GaugeMetricFamily(
                "graft_longest_queued_seconds", "Since when the oldest job that waits was submitted.", labels=["kind"]
            ),
            GaugeMetricFamily(
                "graft_longest_silence_seconds",
                "For how long the owner of a running job has not renewed its lease; beyond the lease, no worker lives.",
                labels=["kind"],
            ),
        )
