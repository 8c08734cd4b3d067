"""Leases are judged by the observer's own clock, and only while it looks."""

from app.jobs.queue import Lease, LeaseObserver
from app.jobs.states import JobKind

LEASE_SECONDS = 10.0


def lease(job_id: str = "job_1", *, fence: int = 1, beat: int = 0) -> Lease:
    return Lease(job_id, JobKind.training, fence, beat, owner=None, cancel_requested=False)


def silent_looks(observer: LeaseObserver, lease: Lease, *, start: float, seconds: int) -> list[list[Lease]]:
    """What the observer says when it looks once a second and sees no change."""
    return [observer.expired([lease], now=start + second) for second in range(seconds)]


def test_lease_expires_once_it_has_been_silent_for_its_whole_length() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    assert silent_looks(observer, lease(), start=0, seconds=10) == [[]] * 10
    assert observer.expired([lease()], now=10) == [lease()]


def test_every_beat_starts_the_lease_anew() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    for beat in range(5):
        assert silent_looks(observer, lease(beat=beat), start=9.0 * beat, seconds=9) == [[]] * 9


def test_next_run_of_a_job_is_not_judged_by_the_one_before() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    silent_looks(observer, lease(fence=1), start=0, seconds=10)
    assert observer.expired([lease(fence=2)], now=10) == []


def test_silence_before_the_observer_came_does_not_count() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    assert observer.expired([lease()], now=1e9) == []


def test_observer_that_was_frozen_gives_owners_time_to_beat() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    observer.expired([lease()], now=0)
    assert observer.expired([lease()], now=3600) == []
    assert observer.expired([lease(beat=1)], now=3601) == []


def test_only_the_silent_one_of_several_expires() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    for second in range(10):
        assert observer.expired([lease("job_1"), lease("job_2", beat=second)], now=second) == []
    assert observer.expired([lease("job_1"), lease("job_2", beat=10)], now=10) == [lease("job_1")]


def test_job_that_left_and_came_back_is_seen_afresh() -> None:
    observer = LeaseObserver(lease_seconds=LEASE_SECONDS)
    silent_looks(observer, lease(), start=0, seconds=10)
    observer.expired([], now=10)
    assert observer.expired([lease()], now=11) == []
