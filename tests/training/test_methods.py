"""Which parameters each method moves, and at which rates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders

from app.datasets.manifest import Manifest, Record
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, TrainingSpec, resolve
from app.storage import LocalStorage
from worker.training import loop, methods
from worker.training.features import ActivationSource, FeatureCache
from worker.training.methods import Surroundings, Training
from worker.training.pixels import Images, PixelSource

CLASSES = ["a", "b", "c"]


def spec(
    method: str,
    *,
    recipe: str = "classic",
    backbone: str = "resnet18",
    exclude: Sequence[int] = (),
    **hyperparameters: Any,
) -> TrainingSpec:
    """exclude: numbers of the images. A hyperparameter that is None here is left to the recipe."""
    asked = {"epochs": 1, "batch_size": 6, "image_size": 32} | hyperparameters
    values = {name: value for name, value in asked.items() if value is not None}
    return resolve(
        parse_request(
            {
                "dataset": "ds_1",
                "method": method,
                "recipe": recipe,
                "backbone": backbone,
                "exclude": [f"{i}.png" for i in exclude],
                "hyperparameters": values,
            }
        ),
        dataset=DatasetFacts.from_counts([{"name": name, "train": 4, "val": 2} for name in CLASSES]),
        weights={backbone: "IMAGENET1K_V1"},
        device_type="cpu",
    )


def training(wanted: TrainingSpec, surroundings: methods.Surroundings | None = None) -> Training:
    source = builders.split(18)
    records = [
        Record(f"img_{i}", f"{i}.png", int(label), "train" if i < 12 else "val", "", 30, 24)
        for i, label in enumerate(source.labels)
    ]
    return methods.prepare(
        wanted,
        classifier=methods.build_classifier(wanted, 3),
        manifest=Manifest(CLASSES, records),
        images=source.images,
        device=torch.device("cpu"),
        surroundings=surroundings,
    )


@pytest.mark.parametrize(
    ("method", "hyperparameters", "moved"),
    [
        ("feature_extraction", {}, set()),
        ("fine_tuning", {}, {"layer4"}),
        ("fine_tuning", {"unfreeze": 2}, {"layer3", "layer4"}),
        ("full_fine_tuning", {}, {"stem", "layer1", "layer2", "layer3", "layer4"}),
        ("from_scratch", {}, {"stem", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
def test_a_method_moves_its_stages_and_the_head_and_nothing_else(
    method: str, hyperparameters: dict[str, Any], moved: set[str]
) -> None:
    prepared = training(spec(method, **hyperparameters))
    before = builders.weights(prepared.classifier)
    list(loop.fit(prepared.state, prepared.plan))
    after = builders.weights(prepared.classifier)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    stages = {name.split(".")[2] for name in changed if name.startswith("backbone.")}
    assert stages == moved
    assert {"head.weight", "head.bias"} <= changed
    # What changes is what a checkpoint holds: batch-norm statistics of trained stages too, of frozen ones not.
    assert changed <= set(prepared.state.live)


def test_what_has_no_head_is_not_prepared_as_if_it_had_one() -> None:
    with pytest.raises(AssertionError, match=r"self_supervised\.py"):
        training(spec("full_fine_tuning").model_copy(update={"method": "self_supervised"}))


def test_a_feature_layer_cuts_the_network_behind_it() -> None:
    prepared = training(spec("feature_extraction", feature_layer="layer2"))
    assert prepared.classifier.stage_names == ("stem", "layer1", "layer2")
    assert prepared.classifier.head.in_features == 128


def test_head_and_backbone_have_rates_of_their_own() -> None:
    prepared = training(spec("full_fine_tuning", recipe="modern", learning_rate=0.01, backbone_learning_rate=0.001))
    rates = {
        id(parameter): group["peak_learning_rate"]
        for group in prepared.state.optimizer.param_groups
        for parameter in group["params"]
    }
    assert {rates[id(p)] for p in prepared.classifier.head.parameters()} == {0.01}
    assert {rates[id(p)] for p in prepared.classifier.backbone.parameters()} == {0.001}


def test_classic_is_computed_in_full_precision_on_a_cpu() -> None:
    assert training(spec("full_fine_tuning")).state.precision == "fp32"


@pytest.mark.parametrize(("recipe", "momentum"), [("classic", {0.01}), ("modern", {0.1})])
def test_modern_batch_norm_follows_short_runs_and_classic_is_torchvisions(recipe: str, momentum: set[float]) -> None:
    prepared = training(spec("full_fine_tuning", recipe=recipe, backbone="mobilenet_v3_small"))
    norms = [m for m in prepared.classifier.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == momentum


@pytest.mark.parametrize(("method", "moves"), [("full_fine_tuning", False), ("from_scratch", True)])
def test_modern_tunes_a_network_with_the_statistics_that_it_was_pretrained_with(method: str, moves: bool) -> None:
    prepared = training(spec(method, recipe="modern", epochs=2))
    before = builders.weights(prepared.classifier)
    list(loop.fit(prepared.state, prepared.plan))
    after = builders.weights(prepared.classifier)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("running_mean" in name for name in moved) == moves
    assert "backbone.stages.layer4.0.0.bn2.weight" in moved


def test_balanced_weights_are_inverse_to_the_counts_and_one_in_the_mean() -> None:
    split = builders.split(9)
    uneven = type(split)(split.images, split.indices[:6], np.array([0, 0, 0, 0, 1, 1]))
    weights = methods._balanced(uneven.labels, 3)
    assert weights == (6 / (2 * 4), 6 / (2 * 2), 0.0)
    assert sum(weights[label] for label in uneven.labels) / 6 == 1.0


def test_validation_and_conclusion_see_the_same_pixels_in_the_same_order() -> None:
    wanted = spec("full_fine_tuning", epochs=2)
    prepared = training(wanted)
    results = list(loop.fit(prepared.state, prepared.plan))
    manifest = Manifest(
        CLASSES, [Record(f"img_{i}", f"{i}.png", i % 3, "train" if i < 12 else "val", "", 30, 24) for i in range(18)]
    )
    conclusion = methods.conclude(prepared, manifest)
    best = results[conclusion.metrics["best_epoch"] - 1]
    assert conclusion.metrics["val_accuracy"] == best.val_accuracy
    assert conclusion.metrics["val_loss"] == pytest.approx(best.val_loss, abs=1e-6)
    assert "test" not in conclusion.evaluation


class WatchedImages(builders.ListedImages):
    """Notes which pictures are read."""

    def __init__(self, images: list[np.ndarray]) -> None:
        super().__init__(images)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> np.ndarray:
        self.read.append(index)
        return super().__getitem__(index)


def test_test_pictures_are_looked_at_once_in_the_end_and_choose_nothing() -> None:
    source = builders.split(24).images
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6

    def train(*, test_labels_shift: int) -> tuple[methods.Conclusion, dict[str, torch.Tensor]]:
        wanted = spec("full_fine_tuning", epochs=3)
        records = [
            Record(f"img_{i}", f"{i}.png", (i + (test_labels_shift if i >= 18 else 0)) % 3, split, str(i), 30, 24)  # type: ignore[arg-type]
            for i, split in enumerate(splits)
        ]
        manifest, images = Manifest(CLASSES, records), WatchedImages([source[i] for i in range(24)])
        prepared, _computed = prepared_of(wanted, manifest, images=images)
        list(loop.fit(prepared.state, prepared.plan))
        assert set(images.read) == set(range(18))
        images.read.clear()
        concluded = methods.conclude(prepared, manifest)
        assert sorted(images.read) == list(range(12, 24))
        return concluded, builders.weights(prepared.classifier)

    (as_it_is, weights), (mislabelled, other_weights) = (train(test_labels_shift=n) for n in (0, 1))
    assert as_it_is.metrics["test_loss"] != mislabelled.metrics["test_loss"]
    assert builders.same(weights, other_weights)
    assert as_it_is.metrics["temperature"] == mislabelled.metrics["temperature"]
    of_validation = {name: value for name, value in as_it_is.metrics.items() if not name.startswith("test_")}
    assert of_validation == {k: v for k, v in mislabelled.metrics.items() if not k.startswith("test_")}
    assert as_it_is.evaluation["predictions"] == mislabelled.evaluation["predictions"]


def split_in_three(*, unsplit: Sequence[int] = ()) -> Manifest:
    """12 images to train, 6 to validate, 6 to test. unsplit: those that are for testing instead."""
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    return Manifest(
        CLASSES,
        [
            Record(f"img_{i}", f"{i}.png", i % 3, "test" if i in unsplit else split, str(i), 30, 24)  # type: ignore[arg-type]
            for i, split in enumerate(splits)
        ],
    )


@pytest.mark.parametrize("method", ["feature_extraction", "full_fine_tuning"])
def test_excluded_images_are_neither_trained_on_nor_measured_with(method: str) -> None:
    excluded = [0, 4, 13, 20]
    manifest, source = split_in_three(), builders.split(24).images
    wanted = spec(method, exclude=excluded, augmentation="classic")
    images = WatchedImages([source[i] for i in range(24)])
    prepared, _computed = prepared_of(wanted, manifest, images=images)

    list(loop.fit(prepared.state, prepared.plan))
    concluded = methods.conclude(prepared, manifest)

    assert set(images.read) == set(range(24)) - set(excluded)
    assert concluded.evaluation["predictions"]["digests"] == ["12", "14", "15", "16", "17"]
    mistakes = concluded.evaluation["mistakes"] + concluded.evaluation["test"]["mistakes"]
    assert not {f"{i}.png" for i in excluded} & {mistake["path"] for mistake in mistakes}
    assert (concluded.evaluation["images"], concluded.evaluation["test"]["images"]) == (5, 5)


class Computed:
    """Counts the images of passes through frozen stages."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, done: int, _all: int) -> None:
        self.images = max(self.images, done)


def prepared_of(
    wanted: TrainingSpec, manifest: Manifest, *, images: Images | None = None, cache: FeatureCache | None = None
) -> tuple[Training, Computed]:
    computed = Computed()
    prepared = methods.prepare(
        wanted,
        classifier=methods.build_classifier(wanted, len(manifest.classes)),
        manifest=manifest,
        images=images or builders.split(24).images,
        device=torch.device("cpu"),
        precision="fp32",
        surroundings=Surroundings(cache=cache, on_features=computed),
    )
    return prepared, computed


def test_a_head_solved_without_excluded_images_is_that_of_a_data_set_that_never_had_them() -> None:
    excluded = [0, 4, 13]

    def solved(exclude: Sequence[int], manifest: Manifest) -> Training:
        wanted = spec("feature_extraction", recipe="modern", exclude=exclude, epochs=None, batch_size=None)
        assert wanted.hyperparameters.optimizer == "lbfgs"
        return prepared_of(wanted, manifest)[0]

    without, never_there = solved(excluded, split_in_three()), solved([], split_in_three(unsplit=excluded))
    whole = solved([], split_in_three())

    assert torch.equal(without.classifier.head.weight, never_there.classifier.head.weight)
    assert not torch.equal(without.classifier.head.weight, whole.classifier.head.weight)
    assert without.solved is not None and never_there.solved is not None
    assert without.solved.val_loss == never_there.solved.val_loss


def test_jobs_with_and_without_excluded_images_share_their_features(tmp_path: Path) -> None:
    excluded, cache = [0, 4, 13], FeatureCache(LocalStorage(tmp_path), "ds_1", max_bytes=10**9)
    asked: dict[str, Any] = {"recipe": "modern", "augmented_views": 2, "epochs": 2}

    whole, computed = prepared_of(spec("fine_tuning", **asked), split_in_three(), cache=cache)
    less, computed_anew = prepared_of(spec("fine_tuning", exclude=excluded, **asked), split_in_three(), cache=cache)

    assert (computed.images, computed_anew.images) == (24, 0)
    for ours, theirs, kept in (
        (less.plan.train, whole.plan.train, [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]),
        (less.plan.val, whole.plan.val, [0, 2, 3, 4, 5]),
    ):
        assert isinstance(ours, ActivationSource) and isinstance(theirs, ActivationSource)
        assert ours.labels.tolist() == theirs.labels[kept].tolist()
        everything = np.arange(len(kept))
        assert torch.equal(ours.batch(everything).inputs, theirs.batch(np.array(kept)).inputs)
        if ours.augmented is not None and theirs.augmented is not None:
            for view in range(2):
                changed = ours.augmented.rows(view, ours.augmented_rows)
                assert torch.equal(changed, theirs.augmented.rows(view, theirs.augmented_rows[kept]))
    assert isinstance(less.plan.train, ActivationSource) and less.plan.train.augmented is not None
    list(loop.fit(less.state, less.plan))
    assert methods.conclude(less, split_in_three()).evaluation["images"] == 5


@pytest.mark.parametrize(
    ("method", "backbone"),
    [("feature_extraction", "resnet18"), pytest.param("fine_tuning", "swin_t", marks=pytest.mark.slow)],
)
def test_boxes_are_cut_from_pictures_where_activations_have_no_rows_and_columns(method: str, backbone: str) -> None:
    mixing = training(spec(method, recipe="modern", backbone=backbone, cutmix=1.0))
    assert isinstance(mixing.plan.train, PixelSource)
    (result,) = loop.fit(mixing.state, mixing.plan)
    assert np.isfinite(result.train_loss)


def test_where_features_find_no_room_on_the_disk_a_head_is_solved_for_all_the_same(tmp_path: Path) -> None:
    wanted = spec("feature_extraction", recipe="modern", image_size=32)
    wanted = wanted.model_copy(
        update={"hyperparameters": wanted.hyperparameters.model_copy(update={"optimizer": "lbfgs", "epochs": 1})}
    )
    said: list[str] = []
    cramped = methods.Surroundings(FeatureCache(LocalStorage(tmp_path), "ds_1", max_bytes=0), log=said.append)
    solved = training(wanted, cramped)
    roomy = training(wanted)
    assert solved.solved is not None
    assert builders.same(builders.weights(solved.classifier), builders.weights(roomy.classifier))
    assert said == ["There is no room to store features: this job keeps them in memory."]


def test_few_shot_computes_its_head_and_keeps_what_a_further_class_needs() -> None:
    wanted = spec("few_shot", recipe="modern", epochs=None, batch_size=None)
    assert wanted.hyperparameters.is_solved
    prepared, computed = prepared_of(wanted, split_in_three())

    assert prepared.solved is not None
    assert computed.images == 24
    assert prepared.classifier.frozen_stage_names == prepared.classifier.stage_names
    support = prepared.support
    assert support is not None
    assert len(support.images) == len(support.features) == len(prepared.val)
    assert not support.is_shot.any()
    conclusion = methods.conclude(prepared, split_in_three())
    logits = prepared.classifier.head(support.features)
    assert (logits.argmax(1) == support.labels).double().mean().item() == conclusion.metrics["val_accuracy"]
    assert training(spec("feature_extraction", recipe="modern", image_size=32)).support is None


def test_a_forecast_weighs_classes_as_the_head_does_that_it_speaks_of() -> None:
    random = np.random.default_rng(0)
    labels = [0] * 90 + [1] * 9 + [0] * 40 + [1] * 40
    brightness = random.normal(100 + 30 * np.array(labels), 20)
    images = builders.ListedImages([np.full((32, 32, 3), value.clip(0, 255), np.uint8) for value in brightness])
    records = [
        Record(f"img_{i}", f"{i}.png", label, "train" if i < 99 else "val", "", 32, 32)
        for i, label in enumerate(labels)
    ]
    wanted = spec("feature_extraction", recipe="modern", epochs=None, batch_size=None, class_weights="balanced")
    prepared, _ = prepared_of(wanted, Manifest(CLASSES[:2], records), images=images)
    assert prepared.solved is not None and prepared.forecast is not None
    found = prepared.forecast()
    assert found is not None
    assert found.now == pytest.approx(prepared.solved.val_accuracy, abs=0.03)


@pytest.mark.parametrize("part", ["the head", "the forecast"])
def test_solving_for_a_head_says_often_that_it_moves(part: str) -> None:
    class Left(Exception):
        pass

    said = 0

    def tick() -> None:
        nonlocal said
        said += 1
        if part == "the head" and said == 3:
            raise Left

    wanted = spec("feature_extraction", recipe="modern", epochs=None, batch_size=None)

    def prepared() -> Training:
        return methods.prepare(
            wanted,
            classifier=methods.build_classifier(wanted, 3),
            manifest=split_in_three(),
            images=builders.split(24).images,
            device=torch.device("cpu"),
            surroundings=Surroundings(tick=tick),
        )

    if part == "the head":
        with pytest.raises(Left):
            prepared()
        return
    training, before = prepared(), said
    assert training.forecast is not None
    training.forecast()
    assert said > before
