"""What becomes of jobs whose processes end well, badly, late, or not at all. Real processes, real signals."""

import errno
import os
import shlex
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from queue_builders import event_log, find, request_cancel, statuses, submit, write_locked
from running import command_of
from worker_process import STORIES
from workshop import FAST, Workshop, is_running, is_stopped, wait_until

from app.datasets import catalog
from app.db.engine import Database
from app.errors import DatabaseMismatch
from app.jobs import queue
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from worker.main import Child, run_worker
from worker.wakeup import Wakeup


def test_job_succeeds_and_its_files_go(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("succeed")

    assert workshop.wait_for(job, "succeeded", "failed") == "succeeded"
    wait_until(lambda: not workshop.storage.exists(f"jobs/{job}"))
    assert statuses(workshop.database, job) == ["queued", "running", "succeeded"]


def test_jobs_are_done_one_after_the_other_and_ingest_beside_them(workshop: Workshop) -> None:
    workshop.start_worker()
    first, second = workshop.submit("work_until_released"), workshop.submit("succeed")
    workshop.wait_for_pid(first)
    ingest = workshop.submit("succeed", kind=JobKind.ingest)

    workshop.wait_for(ingest, "succeeded", kind=JobKind.ingest)
    assert (workshop.status(first), workshop.status(second)) == ("running", "queued")
    workshop.release()
    workshop.wait_for(second, "succeeded")
    assert workshop.status(first) == "succeeded"


@pytest.mark.slow
def test_child_of_a_batch_is_started_for_it_and_runs_beside_training_at_a_lower_priority(workshop: Workshop) -> None:
    worker = workshop.start_worker()
    training = workshop.submit("work_until_released")
    of_training = workshop.wait_for_pid(training)
    wait_until(lambda: kinds_of_children(worker.pid) == ["ingest", "training"])
    batch = workshop.submit("work_until_released", kind=JobKind.prediction)
    of_batch = workshop.wait_for_pid(batch)

    assert os.getpriority(os.PRIO_PROCESS, of_batch) == os.getpriority(os.PRIO_PROCESS, of_training) + 6
    workshop.release()
    workshop.wait_for(batch, "succeeded", kind=JobKind.prediction)
    wait_until(lambda: kinds_of_children(worker.pid) == ["ingest", "training"])


def kinds_of_children(pid: int) -> list[str]:
    commands = [command_of(child) for child in psutil.Process(pid).children()]
    return sorted(command[command.index("--kind") + 1] for command in commands if "--kind" in command)


@pytest.mark.slow
def test_batch_of_a_dead_child_is_run_again(workshop: Workshop) -> None:
    workshop.start_worker()
    batch = workshop.submit("crash_once", kind=JobKind.prediction)

    workshop.wait_for(batch, "succeeded", "failed", kind=JobKind.prediction)
    assert find(workshop.database, batch, kind=JobKind.prediction).attempt == 2


def test_error_in_a_job_is_the_job_s_outcome_and_nothing_more(workshop: Workshop) -> None:
    worker = workshop.start_worker()
    stories = ("raise_expected", "raise_unexpected", "run_out_of_memory", "normalise_a_single_number")
    jobs = [workshop.submit(story) for story in stories]

    workshop.wait_for(jobs[-1], "failed")
    errors = [find(workshop.database, job).error or {} for job in jobs]
    assert [error["code"] for error in errors] == ["diverged", "internal_error", "out_of_memory", "batch_too_small"]
    assert errors[1]["detail"].startswith("The job stopped on an unexpected ValueError;")
    assert "/secret/path" not in str(errors[1])
    assert [statuses(workshop.database, job) for job in jobs] == [["queued", "running", "failed"]] * 4
    assert worker.poll() is None


def test_job_whose_process_dies_is_run_again(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("crash_once")

    workshop.wait_for(job, "succeeded", "failed")
    assert find(workshop.database, job).attempt == 2
    assert statuses(workshop.database, job) == ["queued", "running", "queued", "running", "succeeded"]
    requeued = event_log(workshop.database, job)[2]
    assert requeued.data["reason"] == "Its process was ended by signal SIGSEGV."


@pytest.mark.parametrize(
    ("story", "last_words"),
    [
        ("crash_always", "Its process ended with exit code 3."),
        pytest.param("forget_to_end", "Its process ended without saying how the job went.", marks=pytest.mark.slow),
    ],
)
def test_job_that_always_dies_is_given_up_and_the_next_one_runs(
    workshop: Workshop, story: str, last_words: str
) -> None:
    workshop.start_worker(max_crashes_without_progress=2)
    job, next_job = workshop.submit(story), workshop.submit("succeed")

    workshop.wait_for(next_job, "succeeded")
    found = find(workshop.database, job)
    assert found.error is not None
    assert (found.status, found.attempt, found.error["code"]) == ("failed", 2, "crash_loop")
    assert found.error["detail"].endswith(last_words)


def test_ingest_that_is_given_up_fails_its_data_set(workshop: Workshop) -> None:
    with workshop.database.write() as session:
        catalog.create(session, name="flowers", size_bytes=1, sha256="x", options={}, dataset_id="ds_1")
    workshop.start_worker(max_crashes_without_progress=1)
    ingest = workshop.submit("crash_always", kind=JobKind.ingest)

    workshop.wait_for(ingest, "failed", kind=JobKind.ingest)
    with workshop.database.read() as session:
        dataset = catalog.find(session, "ds_1")
    assert dataset.error is not None
    assert (dataset.status, dataset.error["code"]) == ("failed", "crash_loop")


@pytest.mark.slow
def test_child_whose_job_has_ended_has_time_for_what_is_not_the_job(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("say_last_words")
    workshop.wait_for(job, "succeeded")

    wait_until(lambda: workshop.storage.path("last words").exists())


def test_killed_child_is_noticed_by_its_worker_at_once(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("work_until_released")
    os.kill(workshop.wait_for_pid(job), signal.SIGKILL)

    workshop.wait_for_pid(job, fence=2)
    assert find(workshop.database, job).attempt == 2
    requeued = [event.data for event in event_log(workshop.database, job) if event.data.get("status") == "queued"][1]
    assert requeued["reason"].startswith("Its process was killed (SIGKILL)")


def test_child_dies_with_its_worker_and_the_next_worker_goes_on(workshop: Workshop) -> None:
    worker = workshop.start_worker(lease_seconds=600)
    job = workshop.submit("work_until_released")
    child = workshop.wait_for_pid(job)
    worker.kill()
    wait_until(lambda: not is_running(child))

    workshop.start_worker(lease_seconds=600)
    workshop.wait_for_pid(job, fence=2)
    assert find(workshop.database, job).attempt == 2
    # The first run's files were left for the second to go on from.
    assert workshop.storage.exists(f"jobs/{job}/1")


@pytest.mark.slow
def test_paused_worker_loses_its_job_and_stops_its_child_when_it_wakes(workshop: Workshop) -> None:
    paused = workshop.start_worker()
    job = workshop.submit("work_until_released")
    child = workshop.wait_for_pid(job)
    # Not in the middle of a commit: on SQLite, nobody else could write then until they go on.
    with write_locked(workshop.database):
        for pid in (child, paused.pid):
            os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(child) and is_stopped(paused.pid))

    workshop.start_worker()
    workshop.wait_for_pid(job, fence=2)
    paused.send_signal(signal.SIGCONT)
    os.kill(child, signal.SIGCONT)
    wait_until(lambda: not is_running(child))
    workshop.release()

    workshop.wait_for(job, "succeeded")
    assert statuses(workshop.database, job) == ["queued", "running", "queued", "running", "succeeded"]
    final = event_log(workshop.database, job)[-1]
    assert final.fence == 2
    assert paused.poll() is None


def test_running_job_is_cancelled_within_its_next_step(workshop: Workshop) -> None:
    workshop.start_worker(cancel_grace_seconds=60)
    job = workshop.submit("work_until_released")
    workshop.wait_for_pid(job)
    request_cancel(workshop.database, job)

    workshop.wait_for(job, "cancelled")
    wait_until(lambda: not workshop.storage.exists(f"jobs/{job}"))


def test_job_that_does_not_heed_its_cancel_is_killed_with_all_it_started(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("be_deaf_with_a_helper")
    child = workshop.wait_for_pid(job)
    helper = int(workshop.wait_for_file(job, "helper"))
    request_cancel(workshop.database, job)

    workshop.wait_for(job, "cancelled")
    wait_until(lambda: not is_running(child) and not is_running(helper))
    assert statuses(workshop.database, job) == ["queued", "running", "cancelled"]


def test_stopped_job_ends_early_and_succeeds(workshop: Workshop) -> None:
    workshop.start_worker()
    job = workshop.submit("work_until_released")
    workshop.wait_for_pid(job)
    with workshop.database.write() as session:
        queue.request_stop(session, job)

    assert workshop.wait_for(job, "succeeded", "failed") == "succeeded"


def test_job_that_stands_still_is_killed_and_counted_as_crashed(workshop: Workshop) -> None:
    workshop.start_worker(stall_timeout_seconds=0.5, max_crashes_without_progress=1)
    job = workshop.submit("be_deaf")

    workshop.wait_for(job, "failed")
    error = find(workshop.database, job).error
    assert error is not None
    assert error["code"] == "crash_loop"
    assert "without a step" in error["detail"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_that_is_stopped_gives_its_job_back_uncounted(workshop: Workshop, number: int) -> None:
    worker = workshop.start_worker()
    job = workshop.submit("work_until_released")
    child = workshop.wait_for_pid(job)
    worker.send_signal(number)

    assert worker.wait(timeout=20) == 0
    assert not is_running(child)
    found = find(workshop.database, job)
    assert (found.status, found.attempt, found.crashes, found.owner) == ("queued", 1, 0, None)


@pytest.mark.slow
def test_worker_that_is_stopped_kills_what_does_not_end_and_gives_it_back(workshop: Workshop) -> None:
    worker = workshop.start_worker(shutdown_grace_seconds=0.3)
    job = workshop.submit("be_deaf")
    child = workshop.wait_for_pid(job)
    worker.terminate()

    assert worker.wait(timeout=20) == 0
    assert not is_running(child)
    found = find(workshop.database, job)
    assert (found.status, found.attempt) == ("queued", 1)


def test_idle_worker_stops_when_asked(workshop: Workshop) -> None:
    worker = workshop.start_worker()
    job = workshop.submit("succeed")
    workshop.wait_for(job, "succeeded")
    worker.terminate()
    assert worker.wait(timeout=20) == 0


@pytest.mark.slow
def test_worker_outlives_a_locked_database(workshop: Workshop) -> None:
    worker = workshop.start_worker()
    job = workshop.submit("work_until_released")
    workshop.wait_for_pid(job)
    beats = find(workshop.database, job).beat
    with write_locked(workshop.database):
        release_at = time.monotonic() + 5 * workshop.settings().heartbeat_interval_seconds
        wait_until(lambda: time.monotonic() > release_at)
    wait_until(lambda: find(workshop.database, job).beat > beats)
    workshop.release()

    workshop.wait_for(job, "succeeded")
    assert find(workshop.database, job).attempt == 1
    assert worker.poll() is None


@pytest.mark.slow
def test_files_that_a_dead_worker_left_of_ended_jobs_are_swept(workshop: Workshop) -> None:
    ended, queued = workshop.submit("succeed"), workshop.submit("work_until_released")
    request_cancel(workshop.database, ended)
    for job in (ended, queued, "job_of_another_database"):
        workshop.storage.path(f"jobs/{job}/1").mkdir(parents=True)
    workshop.start_worker()

    workshop.wait_for_pid(queued)
    assert not workshop.storage.exists(f"jobs/{ended}")
    assert workshop.storage.exists(f"jobs/{queued}/1")
    assert workshop.storage.exists("jobs/job_of_another_database/1")


@pytest.mark.slow
def test_files_that_the_disk_does_not_let_go_of_keep_no_job_from_running(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(_storage: LocalStorage, _key: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    url = database.engine.url.render_as_string()
    settings = Settings(_env_file=None, data_dir=tmp_path, database_url=url, **FAST)  # type: ignore[arg-type]
    stop = Wakeup()
    worker = threading.Thread(target=lambda: run_worker(settings, child_command=STORIES, stop=stop))
    other = submit(database, story="work_until_released")
    with monkeypatch.context() as broken:
        broken.setattr(LocalStorage, "delete", delete)
        worker.start()
        wait_until(lambda: (tmp_path / f"jobs/{other}/1/pid").exists())
        batch = submit(database, kind=JobKind.prediction, story="raise_expected")
        wait_until(lambda: find(database, batch, kind=JobKind.prediction).status == "failed")
        ingest = submit(database, kind=JobKind.ingest, story="raise_expected", dataset_id="ds_none")
        wait_until(lambda: find(database, ingest, kind=JobKind.ingest).status == "failed")
        again = submit(database, kind=JobKind.ingest, story="raise_expected", dataset_id="ds_none")
        wait_until(lambda: find(database, again, kind=JobKind.ingest).status == "failed")
        assert worker.is_alive()
        assert find(database, other).status == "running"
    stop.set()
    worker.join()
    assert find(database, other).status == "queued"


def test_worker_refuses_a_database_that_was_not_migrated(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = Settings(data_dir=tmp_path_factory.mktemp("empty"))
    with pytest.raises(DatabaseMismatch, match="graft migrate"):
        run_worker(settings, stop=Wakeup())


def test_children_that_cannot_start_cost_no_job_an_attempt(workshop: Workshop) -> None:
    job = workshop.submit("succeed")
    starts = workshop.storage.path("starts")
    worker = workshop.start_worker(child_command=["/bin/sh", "-c", f"echo >> '{starts}'; exit 1"])

    wait_until(lambda: starts.exists() and len(starts.read_text()) >= 6)
    found = find(workshop.database, job)
    assert (found.status, found.attempt, found.fence) == ("queued", 1, 0)
    assert worker.poll() is None


@pytest.mark.slow
def test_worker_outlives_a_child_that_the_system_does_not_start(workshop: Workshop, tmp_path: Path) -> None:
    program, away = tmp_path / "child", tmp_path / "away"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(STORIES)} "$@"\n')
    program.chmod(0o755)
    worker = workshop.start_worker(child_command=[str(program)])
    wait_until(lambda: sorted(kinds_of_children(worker.pid)) == ["ingest", "training"])
    ingest = workshop.submit("work_until_released", kind=JobKind.ingest)
    workshop.wait_for(ingest, "running", kind=JobKind.ingest)
    program.rename(away)
    workshop.wait_for(workshop.submit("succeed"), "succeeded")
    job = workshop.submit("succeed")
    wait_until(lambda: kinds_of_children(worker.pid) == ["ingest"])
    beat = find(workshop.database, ingest, kind=JobKind.ingest).beat
    # By the second beat the worker has tried to start another.
    wait_until(lambda: find(workshop.database, ingest, kind=JobKind.ingest).beat >= beat + 2)

    away.rename(program)
    workshop.wait_for(job, "succeeded")
    found = find(workshop.database, ingest, kind=JobKind.ingest)
    assert (worker.poll(), found.status, found.fence) == (None, "running", 1)


def test_child_that_cannot_be_started_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        Child(["/nonexistent"], JobKind.training)
    assert os.listdir("/proc/self/fd") == before
