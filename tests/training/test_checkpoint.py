"""Checkpoints on disk: the newest whole one is found, whatever happened to the others."""

from pathlib import Path

import pytest
import torch

from app.storage import LocalStorage
from worker.training.checkpoint import Checkpoints


def saved(storage: LocalStorage, *, fence: int = 1, steps: int = 1) -> Checkpoints:
    checkpoints = Checkpoints(storage, job_id="job_1", fence=fence)
    for step in range(steps):
        checkpoints.save({"weight": torch.full((3,), float(step))}, {"step": step})
    return checkpoints


def test_what_was_saved_is_found_again(storage: LocalStorage) -> None:
    found = saved(storage).newest()
    assert found is not None
    assert torch.equal(found.tensors["weight"], torch.zeros(3))
    assert found.numbers == {"step": 0}


def test_the_clock_of_the_work_goes_on_from_the_checkpoint(storage: LocalStorage) -> None:
    now = [100.0]
    first = Checkpoints(storage, job_id="job_1", fence=1, monotonic=lambda: now[0])
    now[0] += 5.0
    first.save({"weight": torch.zeros(3)}, {"step": 0})
    now[0] += 1000.0  # lost with the run, and waited for the next one
    second = Checkpoints(storage, job_id="job_1", fence=2, monotonic=lambda: now[0])
    second.newest()
    now[0] += 2.0
    assert second.seconds == 7.0


def test_there_is_none_at_first(storage: LocalStorage) -> None:
    assert Checkpoints(storage, job_id="job_1", fence=1).newest() is None


def test_the_last_two_are_kept(storage: LocalStorage) -> None:
    saved(storage, steps=5)
    assert sorted(path.name for path in storage.path("jobs/job_1/1").iterdir()) == ["4", "5"]


def test_a_later_run_goes_on_from_the_earlier_ones_newest(storage: LocalStorage) -> None:
    saved(storage, fence=9, steps=12)
    found = Checkpoints(storage, job_id="job_1", fence=10).newest()
    assert found is not None
    assert (found.fence, found.number, found.numbers) == (9, 12, {"step": 11})


def test_a_run_that_lost_its_claim_neither_sees_nor_drops_its_successors(storage: LocalStorage) -> None:
    old = saved(storage, fence=1, steps=2)
    saved(storage, fence=2, steps=2)
    old.save({"weight": torch.ones(3)}, {"step": 99})
    found = Checkpoints(storage, job_id="job_1", fence=2).newest()
    assert found is not None
    assert (found.fence, found.numbers) == (2, {"step": 1})


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "zeroed", "gone"])
def test_a_damaged_one_is_passed_over_and_told(storage: LocalStorage, file: str, damage: str) -> None:
    saved(storage, steps=2)
    _damage(storage.path(f"jobs/job_1/1/2/{file}"), damage)
    told: list[str] = []
    found = Checkpoints(storage, job_id="job_1", fence=2).newest(on_damaged=told.append)
    assert found is not None
    assert found.numbers == {"step": 0}
    assert len(told) == 1
    assert told[0].startswith("Checkpoint 1/2 is damaged")


def test_nothing_is_left_when_all_are_dropped(storage: LocalStorage) -> None:
    checkpoints = saved(storage, steps=2)
    checkpoints.drop_all()
    assert checkpoints.newest() is None
    assert not storage.exists("jobs/job_1")


def _damage(path: Path, damage: str) -> None:
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else bytes(len(content)))
