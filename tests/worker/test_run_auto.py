"""Method auto's story: an instant model that is served, heats, a winner with its reasons, the same end after a kill.

Its competitors start from an earlier model, so that no pretrained weights are needed.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import queue_builders
from sqlalchemy import select
from sqlalchemy.orm import Session
from training_jobs import SIZE, Job, act_after_steps, same_weights, write_dataset

from app import registry
from app.db.engine import Database
from app.db.tables import ModelRow
from app.errors import Overloaded
from app.jobs.spec import StartingModel
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.preprocessing import Preprocessing
from worker.reporter import Reporter, ShuttingDown
from worker.training import loop, methods
from worker.training.checkpoint import Checkpoints

METHODS = ["feature_extraction", "fine_tuning", "full_fine_tuning"]
VALUES = {"epochs": 4, "image_size": SIZE, "learning_rate": 0.01}


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop reports after each step, not once a second."""
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    monkeypatch.setattr("worker.reporter.WRITE_INTERVAL_SECONDS", 0.0)


@pytest.fixture
def job(database: Database, storage: LocalStorage, tmp_path: Path) -> Callable[..., Job]:
    # Twelve of the validation pictures are in a wrong class: no method gets them right, so each is worth a heat.
    write_dataset(storage, val=27, mislabelled=range(18, 30))
    settings = Settings(data_dir=tmp_path / "storage", device="cpu", allow_downloads=False)

    def make(**body: Any) -> Job:
        return Job(database, storage, settings, **({"method": "from_scratch"} | body))

    return make


@pytest.fixture
def auto(job: Callable[..., Job], database: Database, storage: LocalStorage) -> Callable[..., Job]:
    """A job of method auto that starts from a barely trained model."""
    earlier = job(promote="never", hyperparameters={"epochs": 1})
    earlier.run()
    model_id = str(earlier.row.model_id)
    half = (0.5, 0.5, 0.5)
    start = StartingModel(model_id, "mobilenet_v3_small", Preprocessing(36, SIZE, half, half, "bilinear"))

    def make(**body: Any) -> Job:
        body = {"method": "auto", "recipe": "modern", "backbone": model_id, **body}
        return job(starting_model=start, **body)

    return make


def models(database: Database, job_id: str) -> dict[str, ModelRow]:
    with database.read() as session:
        return {row.role: row for row in session.scalars(select(ModelRow).where(ModelRow.job_id == job_id))}


def test_auto_ends_with_a_table_a_reason_and_the_winner_as_its_model(
    auto: Callable[..., Job], database: Database, storage: LocalStorage
) -> None:
    done = auto(hyperparameters=VALUES)
    assert [candidate.method for candidate in done.spec.candidates] == METHODS
    done.run()

    row, made = done.row, models(database, done.id)
    assert row.status == "succeeded"
    assert row.metrics is not None
    assert sorted(made) == ["final", "probe"]
    assert row.model_id == made["final"].id
    assert [entry["method"] for entry in row.metrics["candidates"]] == METHODS
    (winner,) = [entry for entry in row.metrics["candidates"] if entry["is_winner"]]
    assert winner["method"] == row.metrics["method"] == made["final"].method == row.method
    assert winner["val_accuracy"] == row.metrics["val_accuracy"]
    assert row.metrics["reason"] in done.messages
    assert row.metrics["reason"].startswith(f"{winner['method']} wins with")
    assert row.metrics["test_accuracy"] is not None
    assert "test_accuracy" not in made["probe"].metrics
    assert not storage.exists(f"jobs/{done.id}")


def test_the_probe_is_served_first_and_gives_way_and_a_roll_back_leads_past_it(
    auto: Callable[..., Job],
    job: Callable[..., Job],
    database: Database,
) -> None:
    before = job(promote="always")
    before.run()
    done = auto(promote="always", hyperparameters=VALUES)
    served_between: list[str | None] = []

    def look() -> None:
        with database.read() as session:
            served_between.append(registry.default_model_id(session))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
        act_after_steps(patch, 1, look)
        done.run()
    made = models(database, done.id)
    with database.read() as session:
        assert registry.default_model_id(session) == made["final"].id
        assert registry.previous_model_id(session, "default") == before.row.model_id
    assert set(served_between) == {made["probe"].id}


@pytest.mark.slow
def test_epochs_count_on_from_one_method_to_the_next_and_say_whose_they_are(
    auto: Callable[..., Job], database: Database
) -> None:
    done = auto(hyperparameters=VALUES)
    done.run()
    history = queue_builders.history(database, done.id)
    assert [epoch.epoch for epoch in history] == list(range(1, len(history) + 1))
    trained = [epoch.method for epoch in history]
    assert trained == sorted(trained, key=METHODS.index)
    assert trained[0] == "feature_extraction"


@pytest.mark.slow
def test_progress_never_goes_back_and_passes_through_frozen_stages_count(
    auto: Callable[..., Job], every_step: None, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.reporter.EVENT_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr("worker.training.features.pass_batch_size", lambda _device_type: 4)
    done = auto(hyperparameters=VALUES)
    done.run()
    told = [event.data for event in queue_builders.event_log(database, done.id) if event.event == "progress"]
    fractions = [progress["fraction"] for progress in told]
    assert fractions == sorted(fractions)
    assert len({progress["fraction"] for progress in told if progress["stage"] == "features"}) > 10
    assert fractions[-1] == 1.0


def test_a_spent_budget_leaves_the_probe(auto: Callable[..., Job], database: Database) -> None:
    done = auto(budget_seconds=1e-6, hyperparameters=VALUES)
    done.run()
    assert done.row.metrics is not None
    assert done.row.metrics["method"] == "feature_extraction"
    assert {entry["dropped"] for entry in done.row.metrics["candidates"][1:]} == {"budget_seconds is spent"}


def test_preparing_a_method_is_paid_from_the_budget_too(
    auto: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("worker.workbench.Checkpoints", partial(Checkpoints, monotonic=lambda: clock[0]))
    prepare = methods.prepare

    def slowly(*args: Any, **kwargs: Any) -> methods.Training:
        clock[0] += 2.0
        return prepare(*args, **kwargs)

    monkeypatch.setattr(methods, "prepare", slowly)
    done = auto(budget_seconds=3.0, hyperparameters=VALUES)
    done.run()
    assert done.row.metrics is not None
    table = {entry["method"]: entry for entry in done.row.metrics["candidates"]}
    assert [table[method]["seconds"] for method in METHODS] == [2.0, 2.0, 0.0]
    assert table["full_fine_tuning"]["dropped"] == "budget_seconds is spent"


@pytest.mark.slow
def test_a_heat_is_a_part_of_the_epochs_that_the_budget_has_room_for(
    auto: Callable[..., Job], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each look at the clock takes a second: in a third of the budget about ten epochs find room, not a thousand.
    monotonic = map(float, itertools.count()).__next__
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr("worker.training.competition.survives", lambda _accuracies, _leader: False)
    done = auto(budget_seconds=180.0, hyperparameters=VALUES | {"epochs": 1000})
    done.run()
    trained = Counter(epoch.method for epoch in queue_builders.history(database, done.id))
    assert 2 <= trained["fine_tuning"] <= 5
    assert {entry["dropped"] for entry in done.row.metrics["candidates"][1:]} == {"behind in its heat"}


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [1, 5])
def test_an_auto_job_given_back_in_a_heat_ends_as_if_it_had_not_been(
    auto: Callable[..., Job],
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
    database: Database,
    killed_at: int,
) -> None:
    undisturbed = auto(promote="never", hyperparameters=VALUES)
    undisturbed.run()
    disturbed = auto(promote="never", hyperparameters=VALUES)
    with pytest.MonkeyPatch.context() as patch:
        act_after_steps(patch, killed_at, disturbed.shutdown.set)
        with pytest.raises(ShuttingDown):
            disturbed.run()
    probe = models(database, disturbed.id)["probe"].id
    disturbed.give_back()
    disturbed.run()
    made = models(database, disturbed.id)
    assert made["probe"].id == probe
    assert same_weights(disturbed.weights(), undisturbed.weights())
    assert disturbed.row.metrics is not None and undisturbed.row.metrics is not None
    assert disturbed.row.metrics["val_accuracy"] == undisturbed.row.metrics["val_accuracy"]
    assert disturbed.row.metrics["method"] == undisturbed.row.metrics["method"]


def test_a_probe_whose_commit_was_not_heard_of_is_registered_once(
    auto: Callable[..., Job], database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    real = Reporter._written

    def written(reporter: Reporter, work: Callable[[Session], Any]) -> Any:
        stored = real(reporter, work)
        with database.read() as session:
            probe = registry.find_of_job(session, reporter._claim.job_id, role="probe")
        if probe is not None and not lost:
            lost.append(probe)
            raise Overloaded("The database does not answer; try again.")
        return stored

    monkeypatch.setattr(Reporter, "_written", written)
    done = auto(hyperparameters=VALUES)
    done.run()
    assert [models(database, done.id)["probe"].id] == lost
    assert done.row.status == "succeeded"


@pytest.mark.slow
def test_every_contender_does_without_what_the_job_excludes(auto: Callable[..., Job], storage: LocalStorage) -> None:
    excluded = ["train/dark/0.png", "val/light/18.png", "test/red/47.png"]
    job = auto(hyperparameters=VALUES, exclude=excluded)
    job.run()

    assert job.row.status == "succeeded"
    announced = [message for message in job.messages if message.startswith("Training ")]
    assert announced
    assert [m for m in announced if " on 17 images, validating on 26;" not in m] == []
    stored = json.loads(storage.path(f"models/{job.row.model_id}/evaluation.json").read_text())
    assert (stored["images"], len(stored["predictions"]["digests"]), stored["test"]["images"]) == (26, 26, 2)
