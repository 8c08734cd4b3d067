"""Any sequence of moves, by owners, stale owners, observers and users, leaves the queue as a small model says.

The model is a dictionary of jobs; after each step the real database, changed through the real functions, must show the
same, and keep the promises of docs/job-states.md: one owner per fence, nothing written by a stale one, one end per job.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from queue_builders import ERROR, MAX_CRASHES
from sqlalchemy import delete

from app.db.engine import Database
from app.db.tables import DEFAULT_WORKSPACE, EventRow, JobRow, TurnRow, WorkspaceRow
from app.errors import Conflict, NotFound
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim, ClaimLost, LeaseObserver
from app.jobs.states import JobKind

FINAL = ("succeeded", "failed", "cancelled")
LEASE_SECONDS = 4
SEQUENCES = int(os.environ.get("GRAFT_TEST_SEQUENCES", "40"))
WORKSPACES = (DEFAULT_WORKSPACE, "ws_second", "ws_third")


@dataclass
class Model:
    """What the queue should keep of one job."""

    workspace: str
    status: str = "queued"
    attempt: int = 1
    fence: int = 0
    beat: int = 0
    step: int = 0
    step_at_claim: int = 0
    crashes: int = 0
    cancel: bool = False
    stop: bool = False
    model_id: str | None = None
    finals: list[str] = field(default_factory=list)

    def owned_by(self, fence: int) -> bool:
        return self.status == "running" and self.fence == fence

    def end(self, status: str) -> None:
        self.status = status
        self.finals.append(status)

    def crash(self) -> None:
        if self.cancel:
            self.end("cancelled")
            return
        self.crashes = 0 if self.step > self.step_at_claim else self.crashes + 1
        if self.crashes == MAX_CRASHES:
            self.end("failed")
        else:
            self.status = "queued"
            self.attempt += 1


class QueueMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    claims = Bundle("claims")

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.turns: dict[str, int] = {}  # by workspace: the number of its last claim, 0 once that was given back
        self.claimed = 0
        self.models: dict[str, Model] = {}
        self.order: list[str] = []
        self.given_out: set[tuple[str, int]] = set()

    @initialize()
    def start_empty(self) -> None:
        with self.database.write() as session:
            session.execute(delete(EventRow))
            session.execute(delete(JobRow))
            session.execute(delete(TurnRow))
        self.observer, self.now = LeaseObserver(lease_seconds=LEASE_SECONDS), 0.0

    def act(self, function: Callable[..., Any], *arguments: Any, workspace: str | None = None, **options: Any) -> Any:
        """What the function returned, or the type of what it raised."""
        try:
            with self.database.within(workspace).write() as session:
                return function(session, *arguments, **options)
        except (ClaimLost, Cancelled, Conflict, NotFound) as error:
            return type(error)

    @rule(target=jobs, workspace=st.sampled_from(WORKSPACES))
    def submit(self, workspace: str) -> str:
        job = self.act(queue.submit, kind=JobKind.training, dataset_id="ds_1", spec={}, workspace=workspace)
        self.models[job.id] = Model(workspace)
        self.order.append(job.id)
        return str(job.id)

    @rule(target=claims)
    def claim(self) -> Claim | None:
        claim: Claim | None = self.act(queue.claim_next, kind=JobKind.training, worker_id="w", owner={})
        expected = next(self.served(), None)
        assert (claim and claim.job_id) == expected
        if claim is None or expected is None:
            return None
        model = self.models[expected]
        self.claimed += 1
        self.turns[model.workspace] = self.claimed
        model.status, model.fence, model.beat, model.step_at_claim = "running", model.fence + 1, 0, model.step
        assert (claim.fence, claim.attempt) == (model.fence, model.attempt)
        assert (claim.job_id, claim.fence) not in self.given_out
        self.given_out.add((claim.job_id, claim.fence))
        return claim

    def served(self) -> Iterator[str]:
        """The queued jobs, in the order in which they are taken: by turns, and within a workspace by age."""
        left = [job for job in self.order if job in self.models and self.models[job].status == "queued"]
        turns, number = dict(self.turns), self.claimed
        while left:
            job = min(left, key=lambda job: (turns.get(self.models[job].workspace, 0), left.index(job)))
            left.remove(job)
            number += 1
            turns[self.models[job].workspace] = number
            yield job

    @rule()
    def look_at_the_positions(self) -> None:
        with self.database.read() as session:
            positions = queue.queue_positions(session, [queue.find(session, job) for job in self.models])
        assert positions == {job: number for number, job in enumerate(self.served(), start=1)}

    def note_turn(self, model: Model) -> None:
        if model.status == "queued":
            self.turns[model.workspace] = 0

    def owned(self, claim: Claim) -> Model | None:
        model = self.models.get(claim.job_id)
        return model if model is not None and model.owned_by(claim.fence) else None

    @rule(claim=claims)
    def beat(self, claim: Claim | None) -> None:
        if claim is None:
            return
        model = self.owned(claim)
        beat = self.act(queue.beat, claim)
        assert beat.lost == (model is None)
        if model is not None:
            model.beat += 1
            assert (beat.cancel_requested, beat.stop_requested) == (model.cancel, model.stop)

    @rule(claim=claims, step=st.integers(0, 5))
    def checkpoint(self, claim: Claim | None, step: int) -> None:
        if claim is None:
            return
        model = self.owned(claim)
        signal = self.act(queue.record_checkpoint, claim, step)
        if model is None:
            assert signal is ClaimLost
        else:
            model.step = max(model.step, step)
            assert (signal.cancel_requested, signal.stop_requested) == (model.cancel, model.stop)

    @rule(claim=claims)
    def succeed(self, claim: Claim | None) -> None:
        if claim is None:
            return
        model = self.owned(claim)
        answer = self.act(queue.succeed, claim, model_id=f"mdl_{claim.fence}")
        if model is None:
            assert answer is ClaimLost
        elif model.cancel:
            assert answer is Cancelled
        else:
            model.end("succeeded")
            model.model_id = f"mdl_{claim.fence}"

    @rule(claim=claims, end=st.sampled_from(["fail", "give_back", "finish_cancelled", "crashed"]))
    def leave(self, claim: Claim | None, end: str) -> None:
        if claim is None:
            return
        model = self.owned(claim)
        further: dict[str, Any] = {
            "fail": {"error": ERROR},
            "crashed": {"reason": "It crashed.", "max_crashes": MAX_CRASHES},
        }.get(end, {})
        answer = self.act(getattr(queue, end), claim, **further)
        if model is None or (end == "finish_cancelled" and not model.cancel):
            assert answer is ClaimLost
            return
        if end == "crashed":
            model.crash()
        elif model.cancel:
            model.end("cancelled")
        elif end == "fail":
            model.end("failed")
        else:
            model.status = "queued"
        self.note_turn(model)
        assert answer == model.status

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        model = self.models.get(job)
        answer = self.act(queue.request_cancel, job)
        if model is None:
            assert answer is NotFound
        elif model.status in FINAL:
            assert answer is Conflict
        elif model.status == "queued":
            model.end("cancelled")
        else:
            model.cancel = True

    @rule(job=jobs)
    def stop(self, job: str) -> None:
        model = self.models.get(job)
        answer = self.act(queue.request_stop, job)
        if model is None:
            assert answer is NotFound
        elif model.status != "running":
            assert answer is Conflict
        else:
            model.stop = True

    @rule(job=jobs)
    def delete(self, job: str) -> None:
        model = self.models.get(job)
        answer = self.act(queue.delete, job)
        if model is None:
            assert answer is NotFound
        elif model.status not in FINAL:
            assert answer is Conflict
        else:
            del self.models[job]

    @rule(seconds=st.integers(1, 2))
    def observe(self, seconds: int) -> None:
        """An observer looks, and reclaims what it finds silent; a beat since its look would stop it."""
        self.now += seconds
        with self.database.read() as session:
            leases = queue.running_leases(session)
        for lease in self.observer.expired(leases, now=self.now):
            model = self.models[lease.job_id]
            assert (model.fence, model.beat) == (lease.fence, lease.beat)
            answer = self.act(queue.reclaim, lease.job_id, lease.fence, lease.beat, max_crashes=MAX_CRASHES)
            model.crash()
            self.note_turn(model)
            assert answer == model.status

    @rule(claim=claims, behind=st.integers(1, 3))
    def reclaim_what_was_seen_before_a_beat(self, claim: Claim | None, behind: int) -> None:
        if claim is None or claim.job_id not in self.models:
            return
        stale_beat = self.models[claim.job_id].beat - behind
        assert self.act(queue.reclaim, claim.job_id, claim.fence, stale_beat, max_crashes=1) is None

    @rule()
    def restart_the_observer(self) -> None:
        self.observer = LeaseObserver(lease_seconds=LEASE_SECONDS)

    @invariant()
    def database_shows_what_the_model_says(self) -> None:
        with self.database.read() as session:
            jobs = queue.list_jobs(session, limit=200)
            finals = session.query(EventRow.job_id, EventRow.data).filter(EventRow.is_final).all()
        assert {
            job.id: (
                job.status,
                job.attempt,
                job.fence,
                job.beat,
                job.durable_step,
                job.crashes,
                job.cancel_requested,
                job.stop_requested,
                job.model_id,
            )
            for job in jobs
        } == {
            id: (m.status, m.attempt, m.fence, m.beat, m.step, m.crashes, m.cancel, m.stop, m.model_id)
            for id, m in self.models.items()
        }
        assert sorted((id, data["status"]) for id, data in finals) == sorted(
            (id, final) for id, m in self.models.items() for final in m.finals
        )
        assert all(len(m.finals) == (m.status in FINAL) for m in self.models.values())


@pytest.mark.timeout(300 + 3 * SEQUENCES)
def test_queue_follows_the_model(any_database: Database) -> None:
    everybodys = any_database.within(None)
    with everybodys.write() as session:
        session.add_all(WorkspaceRow(id=workspace, name=workspace) for workspace in WORKSPACES[1:])
    run_state_machine_as_test(
        lambda: QueueMachine(everybodys),
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=40 if SEQUENCES <= 60 else 60,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
