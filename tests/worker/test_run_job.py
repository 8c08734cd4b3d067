"""One job's story on a small data set, in this process: its end, its stops, its resumption, what it leaves behind."""

import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import builders
import numpy as np
import pytest
import queue_builders
import torch
from training_jobs import CLASSES, DATASET, Job, act_after_steps, same_weights, write_dataset

from app import registry
from app.datasets.ingest import IngestLimits, IngestOptions, archive_key, ensure_packed, ingest, manifest_key
from app.datasets.manifest import Manifest
from app.db.engine import Database
from app.errors import JobFailed, ModelUnavailable
from app.jobs import queue
from app.jobs.queue import Cancelled, Claim
from app.jobs.recipes import CLASSIC_PREPROCESSING
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, StartingModel, resolve
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.outputs import probabilities
from app.vision.preprocessing import eval_pixels, normalise
from worker import run_job
from worker.reporter import Reporter, ShuttingDown
from worker.training import loop
from worker.wakeup import Wakeup
from worker.workbench import Workbench


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "storage", device="cpu", allow_downloads=False)


@pytest.fixture
def dataset(storage: LocalStorage) -> Manifest:
    return write_dataset(storage)


@pytest.fixture
def job(database: Database, storage: LocalStorage, settings: Settings, dataset: Manifest) -> Callable[..., Job]:
    def make(**body: Any) -> Job:
        return Job(database, storage, settings, **({"method": "from_scratch"} | body))

    return make


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop reports after each step, not once a second."""
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)
    monkeypatch.setattr("worker.reporter.WRITE_INTERVAL_SECONDS", 0.0)


def test_a_job_ends_with_a_registered_model_its_history_and_no_checkpoints(
    job: Callable[..., Job], database: Database, storage: LocalStorage
) -> None:
    done = job()
    done.run()
    row = done.row
    assert row.status == "succeeded"
    assert row.metrics is not None
    assert set(row.metrics) == {
        "val_accuracy",
        "val_accuracy_ci95",
        "val_loss",
        "macro_f1",
        "macro_f1_ci95",
        "expected_calibration_error",
        "expected_calibration_error_uncalibrated",
        "validation_warning",
        "best_epoch",
        "temperature",
        "test_accuracy",
        "test_accuracy_ci95",
        "test_loss",
        "test_macro_f1",
        "test_macro_f1_ci95",
        "test_expected_calibration_error",
        "test_expected_calibration_error_uncalibrated",
    }
    with database.read() as session:
        model = registry.find(session, "default")
        assert (model.id, model.job_id, model.metrics) == (row.model_id, done.id, row.metrics)
        assert model.backbone == {"name": "mobilenet_v3_small", "weights": None}
    history = queue_builders.history(database, done.id)
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert row.metrics["val_accuracy"] == max(epoch.val_accuracy for epoch in history)
    assert not storage.exists(f"jobs/{done.id}")
    folder = storage.path(f"models/{row.model_id}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluation.json",
        "model.json",
        "reference.safetensors",
        "weights.safetensors",
    ]


def test_the_evaluation_agrees_with_the_model_that_was_saved(
    job: Callable[..., Job], storage: LocalStorage, dataset: Manifest
) -> None:
    done = job()
    done.run()
    folder = storage.path(f"models/{done.row.model_id}")
    evaluation = json.loads((folder / "evaluation.json").read_bytes())
    loaded = artifact.load(folder)
    images = ensure_packed(storage, DATASET, 256, tick=lambda _share: None)
    wrong, confusion = set(), np.zeros((3, 3), dtype=int)
    predictions: dict[str, list[Any]] = {"digests": [], "true": [], "predicted": [], "probability_of_true": []}
    with torch.inference_mode():
        for i in dataset.indices("val"):
            pixels = eval_pixels(images[int(i)], loaded.preprocessing).unsqueeze(0)
            scores = probabilities(loaded.classifier(normalise(pixels, loaded.preprocessing)), loaded.outputs)[0]
            record = dataset.records[int(i)]
            confusion[record.label, int(scores.argmax())] += 1
            predictions["digests"].append(record.digest)
            predictions["true"].append(CLASSES[record.label])
            predictions["predicted"].append(CLASSES[int(scores.argmax())])
            predictions["probability_of_true"].append(pytest.approx(float(scores[record.label]), abs=1e-5))
            if int(scores.argmax()) != record.label:
                wrong.add((record.image_id, record.path, CLASSES[record.label], CLASSES[int(scores.argmax())]))
    assert evaluation["classes"] == CLASSES
    assert evaluation["confusion_matrix"] == confusion.tolist()
    assert {(m["image_id"], m["path"], m["true"], m["predicted"]) for m in evaluation["mistakes"]} == wrong
    assert evaluation["predictions"] == predictions
    assert "predictions" not in evaluation["test"]
    assert len(evaluation["warnings"]) == 2
    assert sum(row["support"] for row in evaluation["per_class"]) == 9
    assert sum(row["support"] for row in evaluation["test"]["per_class"]) == 3


def test_the_same_job_gives_the_same_model_and_another_seed_another(job: Callable[..., Job]) -> None:
    first, again, other = job(), job(), job(seed=1)
    for one in (first, again, other):
        one.run()
    assert same_weights(first.weights(), again.weights())
    assert not same_weights(first.weights(), other.weights())


def test_the_same_training_again_is_not_better_and_the_default_stays(
    job: Callable[..., Job], database: Database
) -> None:
    first, again = job(), job()
    first.run()
    again.run()

    with database.read() as session:
        models = [registry.find(session, str(one.row.model_id)) for one in (first, again)]
        assert registry.default_model_id(session) == first.row.model_id
    decided = [model.promotion or {} for model in models]
    assert [one["promoted"] for one in decided] == [True, False]
    assert decided[0] == dict.fromkeys(decided[1]) | {
        "promoted": True,
        "reason": "The model becomes the default: there was none.",
    }
    assert decided[1] == {
        "promoted": False,
        "reason": f"The default model stays {first.row.model_id}; the new one is not better: of the same 9 validation "
        "images, both get the same ones right. `graft models promote` makes it the default all the same.",
        "incumbent": first.row.model_id,
        "images": 9,
        "candidate_right_only": 0,
        "incumbent_right_only": 0,
        "p_value": 1.0,
    }
    assert decided[1]["reason"] in again.messages


def test_a_default_that_moves_while_a_model_is_compared_with_it_is_compared_anew(
    job: Callable[..., Job], database: Database, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (job(promote=promote) for promote in ("if_better", "never", "if_better"))
    first.run()
    second.run()
    publish = storage.publish

    def publish_then_move(staged: Path, key: str) -> None:
        publish(staged, key)
        if key.startswith("models/"):
            with database.write() as session:
                registry.point_alias(session, "default", str(second.row.model_id))

    monkeypatch.setattr(storage, "publish", publish_then_move)
    third.run()

    with database.read() as session:
        decided = registry.find(session, str(third.row.model_id)).promotion
        assert registry.default_model_id(session) == second.row.model_id
    assert decided is not None
    assert (decided["promoted"], decided["incumbent"]) == (False, second.row.model_id)
    assert sum("The default model stays" in message for message in third.messages) == 1


def test_a_job_given_back_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(
    job: Callable[..., Job], every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = job(method="from_scratch", hyperparameters={"optimizer": "adamw", "ema": 0.9})
    undisturbed.run()
    disturbed = job(method="from_scratch", hyperparameters={"optimizer": "adamw", "ema": 0.9})
    act_after_steps(monkeypatch, 4, disturbed.shutdown.set)
    with pytest.raises(ShuttingDown):
        disturbed.run()
    assert disturbed.row.durable_step == 4
    disturbed.give_back()
    monkeypatch.undo()
    disturbed.run()
    assert disturbed.row.attempt == 1
    assert "Going on from epoch 1, step 1." in disturbed.messages
    assert same_weights(disturbed.weights(), undisturbed.weights())


def test_a_job_given_back_while_an_epoch_is_written_down_goes_on_behind_that_epoch(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = (job(method="from_scratch", hyperparameters={"ema": 0.9}) for _ in range(2))
    undisturbed.run()
    fit = loop.fit

    def watched(state: Any, plan: Any, hooks: Any) -> Any:
        for result in fit(state, plan, hooks):
            disturbed.shutdown.set()
            yield result

    monkeypatch.setattr(loop, "fit", watched)
    with pytest.raises(ShuttingDown):
        disturbed.run()
    monkeypatch.undo()
    disturbed.give_back()
    disturbed.run()
    assert "Going on from epoch 1, step 0." in disturbed.messages
    assert same_weights(disturbed.weights(), undisturbed.weights())


@pytest.mark.slow
def test_the_precision_is_measured_for_the_first_job_of_a_kind_and_remembered(
    job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = job(recipe="modern", hyperparameters={"epochs": 1})
    first.run()
    (line,) = [m for m in first.messages if m.startswith("Training mobilenet_v3_small")]

    def measure_again(*_arguments: object, **_options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("worker.training.methods.choose_precision", measure_again)
    second = job(recipe="modern", hyperparameters={"epochs": 1})
    second.run()
    assert line in second.messages


def test_a_stopped_job_succeeds_with_its_best_epoch_so_far(
    job: Callable[..., Job], database: Database, every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = job(hyperparameters={"epochs": 50})

    def stop() -> None:
        with database.write() as session:
            queue.request_stop(session, stopped.id)

    act_after_steps(monkeypatch, 4, stop)
    stopped.run()
    assert stopped.row.status == "succeeded"
    assert [epoch.epoch for epoch in queue_builders.history(database, stopped.id)] == [1]
    assert stopped.row.metrics is not None
    assert stopped.row.metrics["best_epoch"] == 1


@pytest.mark.slow
def test_progress_is_of_the_epochs_that_the_budget_has_room_for(
    job: Callable[..., Job], every_step: None, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each look at the clock takes a second.
    monkeypatch.setattr("worker.training.loop.time", SimpleNamespace(monotonic=map(float, count()).__next__))
    monkeypatch.setattr("worker.reporter.EVENT_INTERVAL_SECONDS", 0.0)
    done = job(budget_seconds=100.0, hyperparameters={"epochs": 1000})
    done.run()

    told = [event.data for event in queue_builders.event_log(database, done.id) if event.event == "progress"]
    of_training = [progress for progress in told if progress["stage"] == "train"]
    trained = len(queue_builders.history(database, done.id))
    assert (of_training[-1]["epoch"], of_training[-1]["epochs"]) == (trained, trained)
    assert max(progress["epochs"] for progress in of_training[1:]) < 100  # from the first step on
    fractions = [progress["fraction"] for progress in told]
    assert fractions == sorted(fractions)


def test_a_cancelled_job_leaves_no_model(
    job: Callable[..., Job],
    database: Database,
    storage: LocalStorage,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cancelled = job()
    act_after_steps(monkeypatch, 2, lambda: queue_builders.request_cancel(database, cancelled.id))
    with pytest.raises(Cancelled):
        cancelled.run()
    assert not storage.exists("models") or not list(storage.path("models").iterdir())


def test_a_cancel_that_comes_while_the_model_is_published_takes_its_files_along(
    job: Callable[..., Job], database: Database, storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = job()
    publish = storage.publish

    def cancel_then_publish(staged: Path, key: str) -> None:
        publish(staged, key)
        if key.startswith("models/"):
            queue_builders.request_cancel(database, cancelled.id)

    monkeypatch.setattr(storage, "publish", cancel_then_publish)
    with pytest.raises(Cancelled):
        cancelled.run()
    assert list(storage.path("models").iterdir()) == []
    with database.read() as session:
        assert registry.list_models(session, limit=10) == []


def test_a_model_can_be_the_start_of_the_next_job(
    job: Callable[..., Job], database: Database, storage: LocalStorage
) -> None:
    first = job()
    first.run()
    model_id = first.row.model_id
    assert model_id is not None
    second = job(
        method="feature_extraction",
        backbone=model_id,
        starting_model=StartingModel(model_id, "mobilenet_v3_small", CLASSIC_PREPROCESSING),
    )
    second.run()
    own, inherited = second.weights(), first.weights()
    backbone = {name for name in own if name.startswith("backbone.")}
    assert same_weights({n: own[n] for n in backbone}, {n: inherited[n] for n in backbone})
    assert not torch.equal(own["head.weight"], inherited["head.weight"])
    with database.read() as session:
        assert registry.find(session, str(second.row.model_id)).backbone == {
            "name": "mobilenet_v3_small",
            "weights": None,
            "model": model_id,
        }


def test_a_start_that_was_deleted_meanwhile_is_a_clear_error(job: Callable[..., Job]) -> None:
    orphan = job(
        method="fine_tuning",
        backbone="mdl_gone",
        starting_model=StartingModel("mdl_gone", "mobilenet_v3_small", CLASSIC_PREPROCESSING),
    )
    with pytest.raises(ModelUnavailable):
        orphan.run()


def test_a_data_set_whose_files_are_gone_is_a_clear_error(job: Callable[..., Job], storage: LocalStorage) -> None:
    bereft = job()
    storage.delete(manifest_key(DATASET))
    with pytest.raises(JobFailed, match="upload it again") as failure:
        bereft.run()
    assert failure.value.code == "dataset_unreadable"


DIVERGED = (
    "The loss is no longer a number: training has diverged. It goes on from the start, with {} of the learning rates."
)


def test_a_job_that_diverges_comes_to_the_model_of_one_with_a_sane_rate_and_says_so(
    job: Callable[..., Job], database: Database
) -> None:
    wild = job(backbone="squeezenet1_1", hyperparameters={"learning_rate": 10.0})
    sane = job(backbone="squeezenet1_1", hyperparameters={"learning_rate": 0.1})
    wild.run()
    sane.run()
    assert same_weights(wild.weights(), sane.weights())
    assert [message for message in wild.messages if "diverged" in message] == [
        DIVERGED.format("a tenth"),
        DIVERGED.format("a hundredth"),
    ]
    assert wild.row.metrics == {**(sane.row.metrics or {}), "setbacks": 2}
    assert [epoch.learning_rate for epoch in queue_builders.history(database, wild.id)] == [0.1, 0.1]


class Killed(Exception):
    """In place of a signal that lets nothing be stored."""


@pytest.mark.parametrize(
    ("setbacks", "steps"),
    [(0, 1), pytest.param(1, 1, marks=pytest.mark.slow), (2, 1), pytest.param(2, 4, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("end", ["killed", "given back"])
def test_a_job_that_ends_around_a_setback_goes_on_as_if_it_had_not(
    job: Callable[..., Job],
    database: Database,
    every_step: None,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    setbacks: int,
    steps: int,
) -> None:
    wild = job(backbone="squeezenet1_1", hyperparameters={"learning_rate": 10.0, "momentum": 0.5})
    undisturbed = job(backbone="squeezenet1_1", hyperparameters={"learning_rate": 0.1, "momentum": 0.5})

    def kill() -> None:
        raise Killed

    act_after_steps(monkeypatch, steps, kill if end == "killed" else wild.shutdown.set, setbacks=setbacks)
    with pytest.raises(Killed if end == "killed" else ShuttingDown):
        wild.run()
    if end == "killed":
        assert wild.claim is not None
        queue_builders.crash(database, wild.claim)
    else:
        wild.give_back()
    monkeypatch.undo()
    wild.run()
    undisturbed.run()
    assert wild.row.metrics is not None
    assert wild.row.metrics["setbacks"] == 2
    assert same_weights(wild.weights(), undisturbed.weights())


def test_a_job_that_diverges_at_any_rate_fails_and_leaves_no_model(
    job: Callable[..., Job], database: Database, storage: LocalStorage
) -> None:
    wild = job(backbone="squeezenet1_1", learning_rate=1e9)
    with pytest.raises(JobFailed, match="far lower learning_rate") as failure:
        wild.run()
    assert failure.value.code == "diverged"
    assert not storage.exists("models")
    assert queue_builders.history(database, wild.id) == []


def test_transfer_from_real_weights_learns_two_trees(
    shared_weights: Path, job: Callable[..., Job], database: Database, storage: LocalStorage
) -> None:
    settings = Settings(data_dir=storage.root, device="cpu", allow_downloads=False, weights_dir=shared_weights)
    spec_weights = {"mobilenet_v3_small": "IMAGENET1K_V1"}
    request = {"dataset": DATASET, "backbone": "mobilenet_v3_small", "method": "feature_extraction"}
    facts = DatasetFacts.from_counts([{"name": name, "train": 6, "val": 3} for name in CLASSES])
    spec = resolve(
        parse_request(request | {"hyperparameters": {"epochs": 5, "image_size": 64}}),
        dataset=facts,
        weights=spec_weights,
        device_type="cpu",
    )
    claim = _claimed(database, spec.model_dump(mode="json"))
    reporter = Reporter(database, claim, shutdown=Wakeup())
    run_job.run_training(claim, settings=settings, database=database, storage=storage, reporter=reporter)
    metrics = queue_builders.find(database, claim.job_id).metrics
    assert metrics is not None
    assert metrics["val_accuracy"] == 1.0


@pytest.mark.parametrize(
    "stricter",
    [
        {"max_image_pixels": 1000},
        {"max_image_side": 100},
        {"max_image_aspect": 1.0},
        {"max_image_bytes": 100},
        {"max_members": 1},
        {"extra_image_formats": frozenset()},
    ],
    ids=lambda stricter: next(iter(stricter)),
)
def test_a_job_reads_what_was_ingested_before_settings_became_stricter(
    database: Database, storage: LocalStorage, stricter: Mapping[str, Any]
) -> None:
    settings = Settings(data_dir=storage.root, device="cpu", extra_image_formats=frozenset({"BMP"}))
    pictures = {f"{CLASSES[i % 3]}/{i}": builders.picture(i, size=(400, 360)) for i in range(9)}
    archive = builders.zip_of({f"{path}.bmp": builders.encoded(pixels, "BMP") for path, pixels in pictures.items()})
    ingest(
        builders.written(storage.path(archive_key(DATASET)), archive),
        storage=storage,
        dataset_id=DATASET,
        options=IngestOptions(val_fraction=0.2, seed=0),
        limits=IngestLimits.from_settings(settings),
        tick=lambda _share: None,
    )
    training = Job(database, storage, settings, method="from_scratch", hyperparameters={"image_size": 300})
    claim = queue_builders.claim_next(database)
    assert claim is not None

    bench = Workbench.open(
        training.spec,
        claim,
        settings=settings.model_copy(update=stricter),
        storage=storage,
        reporter=Reporter(database, claim, shutdown=Wakeup()),
        seen_before=frozenset(),
    )

    assert training.spec.preprocessing.side == 384
    for i, record in enumerate(bench.manifest.records):
        np.testing.assert_array_equal(bench.images[i], pictures[record.path.removesuffix(".bmp")])


def _claimed(database: Database, spec: Mapping[str, Any]) -> Claim:
    with database.write() as session:
        queue.submit(session, kind=JobKind.training, dataset_id=DATASET, spec=dict(spec))
    claim = queue_builders.claim_next(database)
    assert claim is not None
    return claim
