"""Estimates: in proportion to what they depend on, and from experience where there is some."""

from functools import partial
from typing import Any

import pytest
import queue_builders
import torch

from app.db.engine import Database
from app.db.tables import DatasetRow
from app.jobs import queue
from app.jobs.estimate import (
    FIXED_SECONDS,
    DeviceSpeed,
    Estimate,
    Kind,
    PastSpeed,
    estimate,
    measure,
    past_speeds,
    stage_costs,
)
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, TrainingSpec, resolve
from app.vision.backbones import BACKBONES

SPEED = DeviceSpeed(flops_per_second=100e9, bytes_per_second=10e9)
FACTS = DatasetFacts.from_counts([{"name": name, "train": 500, "val": 100} for name in ("a", "b")])


def spec(method: str = "full_fine_tuning", *, backbone: str = "resnet18", **hyperparameters: Any) -> TrainingSpec:
    return resolve(
        parse_request(
            {
                "dataset": "ds_1",
                "method": method,
                "recipe": "classic",
                "backbone": backbone,
                "hyperparameters": hyperparameters,
            }
        ),
        dataset=FACTS,
        weights={backbone: "IMAGENET1K_V1"},
        device_type="cpu",
    )


def estimated(wanted: TrainingSpec, *past: PastSpeed) -> Estimate:
    return estimate(wanted, dataset=FACTS, speed=SPEED, device_type="cpu", past=past)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf", "vit_b_16", "swin_t"])
def test_counted_operations_are_the_published_ones(name: str) -> None:
    # Published figures count a multiplication with its addition as one.
    counted = sum(cost.flops for cost in stage_costs(name, 224)) / 2e9
    assert counted == pytest.approx(BACKBONES[name].gflops, rel=0.05)


def test_a_pass_has_its_batch_norms_folded() -> None:
    with_norms, without = stage_costs("mobilenet_v2", 224), stage_costs("squeezenet1_1", 224)
    assert all(cost.pass_bytes < cost.activation_bytes for cost in with_norms)
    assert all(cost.pass_bytes == cost.activation_bytes for cost in without)


def test_frozen_stages_make_a_job_quicker_and_smaller() -> None:
    head, last, full = (estimated(spec(m)) for m in ("feature_extraction", "fine_tuning", "full_fine_tuning"))
    assert head.seconds < last.seconds < full.seconds
    assert head.peak_memory_bytes < last.peak_memory_bytes < full.peak_memory_bytes


def test_memory_grows_with_the_batch_and_time_with_the_epochs() -> None:
    small, middle, large = (estimated(spec(batch_size=n)).peak_memory_bytes for n in (32, 64, 128))
    assert large - middle == pytest.approx(2 * (middle - small), abs=4)
    short, middle, long = (estimated(spec(epochs=n)).seconds for n in (10, 20, 40))
    assert long - middle == pytest.approx(2 * (middle - short))


def test_what_is_frozen_runs_once_so_more_epochs_of_a_head_cost_next_to_nothing() -> None:
    kept = {"augmentation": "none"}
    one, many = (estimated(spec("feature_extraction", epochs=n, **kept)).seconds for n in (1, 100))
    assert many < 1.5 * one
    fresh = estimated(spec("feature_extraction", epochs=25)).seconds
    assert fresh > 10 * estimated(spec("feature_extraction", epochs=25, **kept)).seconds


def test_fine_tuning_pays_for_its_views_once_and_then_for_the_last_stages_alone() -> None:
    few, many = (estimated(spec("fine_tuning", epochs=20, augmented_views=n)).seconds for n in (2, 8))
    fresh = estimated(spec("fine_tuning", epochs=20)).seconds
    assert few < many < fresh


def test_auto_costs_more_than_its_probe_and_less_than_all_of_its_methods() -> None:
    each = [estimated(modern(m)) for m in ("feature_extraction", "fine_tuning", "full_fine_tuning")]
    auto = estimated(modern("auto"))
    assert each[0].seconds < auto.seconds < sum(one.seconds for one in each)
    # The probe alone, where it leaves nothing to gain; each to its last epoch, where every one gains.
    assert auto.seconds_range == (each[0].seconds, sum(one.seconds_range[1] for one in each))
    assert auto.peak_memory_bytes == max(one.peak_memory_bytes for one in each)


def test_a_job_run_before_is_believed() -> None:
    known = PastSpeed(Kind.of(spec(epochs=20)), 50.0)
    other = PastSpeed(Kind.of(spec(epochs=10, image_size=64)), 5000.0)
    found = estimated(spec(epochs=10), other, known)
    training_seconds = 10 * 1000 / 50
    assert training_seconds < found.seconds < 1.2 * training_seconds


def test_a_jobs_speed_is_that_of_its_epochs(database: Database) -> None:
    trained = spec(epochs=2)
    with database.write() as session:
        session.add(DatasetRow(id="ds_1", name="a", status="ready", size_bytes=1, sha256="", splits={"train": 1000}))
    queue_builders.submit(database, **trained.model_dump(mode="json"))
    claim = queue_builders.claim_next(database)
    assert claim is not None
    with database.write() as session:
        for number, seconds in ((1, 15.0), (2, 25.0)):
            queue.record_epoch(session, claim, queue_builders.epoch(number) | {"seconds": seconds}, {})
        queue.record_progress(session, claim, {"stage": "evaluate", "images_per_second": None}, event=False)
        queue.succeed(session, claim)
    with database.read() as session:
        assert past_speeds(session) == [PastSpeed(Kind.of(trained), 50.0)]


def test_a_job_that_trained_on_something_else_is_no_experience() -> None:
    classic = spec("fine_tuning", epochs=10)
    of_others = [
        modern("fine_tuning", epochs=10),  # on stored activations
        spec("fine_tuning", epochs=10, unfreeze=2),
        modern("feature_extraction"),  # solved for
    ]
    past = [PastSpeed(Kind.of(other), 5000.0) for other in of_others]
    assert estimated(classic, *past) == estimated(classic)
    assert estimated(modern("feature_extraction", epochs=20), *past) == estimated(
        modern("feature_extraction", epochs=20)
    )


def modern(method: str, *, budget: float | None = None, **hyperparameters: Any) -> TrainingSpec:
    asked = {"method": method, "budget_seconds": budget, "hyperparameters": hyperparameters}
    request = {"dataset": "ds_1", "backbone": "mobilenet_v3_small", **asked}
    weights = {"mobilenet_v3_small": "IMAGENET1K_V1"}
    return resolve(parse_request(request), dataset=FACTS, weights=weights, device_type="cpu")


def test_a_budget_bounds_the_epochs_and_nothing_else() -> None:
    free = estimated(modern("full_fine_tuning"))
    ample, tight = (estimated(modern("full_fine_tuning", budget=seconds)) for seconds in (1e6, 10.0))
    assert ample == free
    # Two passes over all images, for the probe and for the conclusion, are made whatever the budget.
    assert 10.0 + FIXED_SECONDS < tight.seconds == tight.seconds_range[1] < free.seconds
    assert estimated(modern("full_fine_tuning", budget=20.0)).seconds == pytest.approx(tight.seconds + 10.0)
    for solved in ("feature_extraction", "few_shot"):
        assert estimated(modern(solved, budget=1e-3)) == estimated(modern(solved))


def test_autos_budget_holds_for_all_of_it_and_its_probe_is_there_in_any_case() -> None:
    probe = estimated(modern("feature_extraction")).seconds
    assert estimated(modern("auto", budget=0.9 * probe)).seconds_range == (probe, probe)
    free = estimated(modern("auto"))
    assert estimated(modern("auto", budget=1e6)) == free
    budget = 0.8 * free.seconds_range[1]
    assert estimated(modern("auto", budget=budget)).seconds_range[1] == pytest.approx(budget)


def test_boxes_cut_from_pictures_cost_a_pass_through_frozen_stages_in_each_epoch() -> None:
    cut, mixed = (estimated(modern("feature_extraction", epochs=20, **{name: 1.0})) for name in ("cutmix", "mixup"))
    assert cut.seconds > 3 * mixed.seconds


def test_two_views_of_each_picture_cost_twice_the_training() -> None:
    def of(method: str) -> Estimate:
        asked = {"epochs": 20, "batch_size": 32, "image_size": 224}
        request = {"dataset": "ds_1", "method": method, "backbone": "resnet18", "hyperparameters": asked}
        weights = {"resnet18": "IMAGENET1K_V1"}
        found = resolve(parse_request(request), dataset=FACTS, weights=weights, device_type="cpu")
        values = found.hyperparameters.model_copy(update={"head_start": "random", "early_stopping_patience": None})
        return estimated(found.model_copy(update={"hyperparameters": values}))

    one, two = of("full_fine_tuning"), of("self_supervised")
    assert 1.8 * one.seconds < two.seconds < 2.5 * one.seconds
    assert two.peak_memory_bytes > 1.5 * one.peak_memory_bytes


def test_the_checks_of_self_supervised_count_up_to_those_it_looks_at() -> None:
    def of(wanted: TrainingSpec, train: int, val: int) -> float:
        facts = DatasetFacts((), unlabelled=train, val_unlabelled=val)
        return estimate(wanted, dataset=facts, speed=SPEED, device_type="cpu").seconds

    seconds = partial(of, modern("self_supervised", epochs=9))

    def looking(epochs: int) -> float:
        """What 500 more validation pictures take."""
        wanted = modern("full_fine_tuning", epochs=epochs)
        return of(wanted, 2000, 1000) - of(wanted, 2000, 500)

    # Each epoch passes them through the network once.
    forward = (looking(2) - looking(1)) / 500
    # Each of nine epochs, and the end, looks at a validation picture once, and at two views of it.
    assert seconds(2000, 1000) - seconds(2000, 500) == pytest.approx(10 * 500 * 3 * forward)
    assert seconds(2000, 9000) == seconds(2000, 2000)
    # Without validation the training pictures are looked at.
    assert seconds(500, 0) == pytest.approx(seconds(500, 500) - 10 * 500 * forward)


def test_prototypes_cost_their_metric_in_seconds_and_memory() -> None:
    def of(train: int, **hyperparameters: Any) -> Estimate:
        facts = DatasetFacts.from_counts([{"name": name, "train": train, "val": 10} for name in ("a", "b")])
        wanted = modern("few_shot", **hyperparameters)
        return estimate(wanted, dataset=facts, speed=DeviceSpeed(1e30, 1e30), device_type="cpu")

    # On a device that takes no time, what is left is solved for on the CPU: here a metric of 1,024 features.
    few, many, twice = (of(train) for train in (10, 20_000, 40_000))
    assert few.seconds < FIXED_SECONDS + 0.1
    assert many.seconds == pytest.approx(37, rel=0.05)
    assert twice.seconds == pytest.approx(2 * many.seconds, rel=0.1)
    # All features, and those of all folds but one.
    more_features = 2 * 40_000 * 1024 * 4
    assert twice.peak_memory_bytes - many.peak_memory_bytes == pytest.approx(more_features, rel=0.01)
    # A layer in the middle has fewer, and what lies behind it does not run.
    assert of(20_000, feature_layer="stage2").seconds < 0.2 * many.seconds


def test_patience_makes_the_time_uncertain() -> None:
    fixed, patient = estimated(spec(epochs=20)), estimated(spec(epochs=20, early_stopping_patience=5))
    assert fixed.seconds_range == (fixed.seconds, fixed.seconds)
    assert patient.seconds_range[0] < patient.seconds < patient.seconds_range[1] == fixed.seconds


def test_the_device_is_measured_once() -> None:
    first = measure(torch.device("cpu"))
    assert measure(torch.device("cpu")) is first
    assert first.flops_per_second > 0
    assert first.bytes_per_second > 0
