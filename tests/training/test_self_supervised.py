"""Learning without labels: the loss by hand, its checks against collapse, and a resumed run."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import training_builders as builders
from torch import nn

from app.datasets.manifest import UNLABELLED, Manifest, Record
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, TrainingSpec, resolve
from app.vision.backbones import Backbone
from app.vision.classifier import Classifier
from worker.training import loop, methods, self_supervised
from worker.training.loop import Hooks
from worker.training.methods import Training
from worker.training.self_supervised import (
    COLLAPSED_STD,
    COVARIANCE_WEIGHT,
    TwoViews,
    VICReg,
    feature_std,
    knn_accuracy,
)


def spec(**hyperparameters: Any) -> TrainingSpec:
    asked = {"epochs": 2, "batch_size": 16, "image_size": 32} | hyperparameters
    body = {"dataset": "ds_1", "method": "self_supervised", "backbone": "mobilenet_v3_small", "hyperparameters": asked}
    facts = DatasetFacts((), unlabelled=40)
    weights = {"mobilenet_v3_small": "IMAGENET1K_V1"}
    return resolve(parse_request(body), dataset=facts, weights=weights, device_type="cpu")


def prepared(
    wanted: TrainingSpec | None = None,
    *,
    labelled: bool = False,
    count: int = 40,
    validated: int = 6,
    classifier: Classifier | None = None,
) -> Training:
    """validated: how many of the pictures are held out, where they are labelled."""
    wanted = wanted or spec()
    source = builders.split(count)
    records = [
        Record(
            f"img_{i}",
            f"{i}.png",
            int(label) if labelled else UNLABELLED,
            "val" if labelled and i >= count - validated else "train",
            "",
            30,
            24,
        )
        for i, label in enumerate(source.labels)
    ]
    return self_supervised.prepare(
        wanted,
        classifier=classifier or methods.build_classifier(wanted, 0),
        manifest=Manifest(["dark", "middle", "light"] if labelled else [], records),
        images=source.images,
        device=torch.device("cpu"),
        precision="fp32",
    )


def flat(side: int) -> Backbone:
    """A backbone whose features are the pixels: of unit scale where those are, while a random MobileNetV3's are all
    but the same for all pictures, so that two of the loss's terms are nothing."""
    stages = OrderedDict(stem=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * side**2)))
    return Backbone("flat", stages, feature_width=3 * side**2, layout="NCHW")


def test_the_loss_is_the_papers() -> None:
    network = VICReg(flat(8), seed=0).train()
    views = torch.randn(64, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = network(views)

    first, second = network.expander(network.backbone(torch.cat([views[:, 0], views[:, 1]]))).chunk(2)
    width = first.shape[1]
    invariance = torch.nn.functional.mse_loss(first, second)
    variance = sum(torch.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean() for z in (first, second)) / 2
    covariance = (
        sum((torch.cov(z.T) ** 2).sum() - (torch.diag(torch.cov(z.T)) ** 2).sum() for z in (first, second)) / width
    )
    terms = torch.stack([invariance, torch.as_tensor(variance), COVARIANCE_WEIGHT * covariance])
    assert losses.shape == (64,)
    torch.testing.assert_close(losses.mean(), terms.sum(), rtol=1e-4, atol=0)
    # Without any of the three it would be another loss.
    assert (terms > 0.01 * terms.sum()).all(), terms


def test_checks_are_of_all_pictures_though_they_are_looked_at_in_parts() -> None:
    training = prepared(count=80, classifier=Classifier(flat(32), nn.Linear(3 * 32**2, 1), feature_layer="stem"))
    plan, network = training.plan, training.state.network
    assert isinstance(plan.train, TwoViews) and isinstance(network, VICReg) and plan.measure is not None
    found = plan.measure(lambda: None)

    with torch.inference_mode():
        parts = [
            plan.train.training_batch(positions, seed=0, epoch=0, step=step).inputs
            for step, positions in enumerate(np.array_split(np.arange(80), 3))
        ]
        losses = [network(plan.normalise(views)) for views in parts]
        features = network.backbone(plan.normalise(plan.train.batch(np.arange(80)).inputs))
    assert found.loss == pytest.approx(torch.cat(losses).mean().item())
    assert found.figures["feature_std"] == pytest.approx(feature_std(features), rel=1e-4)
    assert len({round(part.mean().item(), 4) for part in losses}) == 3  # each part's terms are its own
    assert found.figures["feature_std"] > COLLAPSED_STD


def test_two_views_of_a_picture_differ_and_follow_from_seed_epoch_and_step() -> None:
    pixels = prepared(labelled=True).plan.train
    assert isinstance(pixels, TwoViews)
    positions = np.arange(4)
    batch, again = (pixels.training_batch(positions, seed=3, epoch=1, step=2) for _ in range(2))
    assert batch.inputs.shape == (4, 2, 3, 32, 32)
    assert torch.equal(batch.inputs, again.inputs)
    assert not torch.equal(batch.inputs[:, 0], batch.inputs[:, 1])
    other = pixels.training_batch(positions, seed=3, epoch=1, step=3)
    assert not torch.equal(batch.inputs, other.inputs)


def test_features_that_are_all_the_same_have_no_spread_and_even_ones_have_one() -> None:
    assert feature_std(torch.ones(50, 64) + 1e-6 * torch.rand(50, 64)) < 0.01
    even = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(even) == pytest.approx(1.0, abs=0.02)
    assert feature_std(even[:1]) == 0.0


def test_neighbours_vote_with_their_similarity() -> None:
    features = torch.eye(3).repeat(10, 1)
    labels = np.arange(30) % 3
    new = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert knn_accuracy(features, labels, new, np.array([0, 1, 2, 2]), 3) == 0.75


def test_an_epoch_tells_the_loss_and_the_checks_and_no_accuracy() -> None:
    training = prepared()
    results = list(loop.fit(training.state, training.plan))
    assert [result.epoch for result in results] == [1, 2]
    for result in results:
        assert (result.train_accuracy, result.val_accuracy) == (None, None)
        assert set(result.figures) == {"feature_std"}
        assert result.is_best  # the last one counts
    assert training.state.best is not None
    assert training.state.best.epoch == 2


def test_where_there_are_labels_neighbours_are_asked() -> None:
    training = prepared(labelled=True)
    *_, last = loop.fit(training.state, training.plan)
    assert 0 <= last.figures["knn_accuracy"] <= 1
    conclusion = self_supervised.conclude(training)
    assert conclusion.metrics["knn_accuracy"] == last.figures["knn_accuracy"]


@pytest.mark.parametrize(("count", "validated"), [(33, 0), (24, 1), (50, 17)])
def test_checks_are_finite_however_many_pictures_they_look_at(count: int, validated: int) -> None:
    training = prepared(labelled=validated > 0, count=count, validated=validated)
    assert training.plan.measure is not None
    found = training.plan.measure(lambda: None)
    assert np.isfinite([found.loss, *found.figures.values()]).all()
    assert found.figures["feature_std"] > 0
    assert ("knn_accuracy" in found.figures) == (validated > 0)


def test_labels_change_nothing_of_what_is_learnt() -> None:
    def backbone(labels: list[int]) -> dict[str, torch.Tensor]:
        training = prepared(labelled=True)
        plan = training.plan
        assert isinstance(plan.train, TwoViews)
        split = replace(plan.train.pixels.split, labels=np.array(labels, dtype=np.int64))
        train = TwoViews(replace(plan.train.pixels, split=split))
        list(loop.fit(training.state, replace(plan, train=train)))
        return builders.weights(training.classifier.backbone)

    assert builders.same(backbone([0] * 34), backbone(list(range(34))))


def test_a_collapse_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    training = prepared()
    list(loop.fit(training.state, training.plan))
    assert training.state.best is not None
    monkeypatch.setattr("worker.training.self_supervised.COLLAPSED_STD", 0.0)
    assert self_supervised.conclude(training).metrics["warning"] is None
    monkeypatch.undo()
    # Every picture's features become the last layer's bias.
    for name, tensor in training.state.best.weights.items():
        if name.startswith("backbone.stages.stage4.") and tensor.ndim == 2:
            tensor.zero_()
    collapsed = self_supervised.conclude(training).metrics
    assert collapsed["feature_std"] < 1e-3
    assert "collapsed" in collapsed["warning"]


def test_no_step_compares_fewer_pictures_than_say_anything() -> None:
    training = prepared(count=34)  # two batches, and two pictures more
    (result, _) = loop.fit(training.state, training.plan)
    assert result.step == 2


def test_a_run_left_in_the_middle_ends_as_if_it_had_not_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.training.loop.TICK_SECONDS", 0.0)

    class Killed(Exception):
        pass

    def kill_at(step: int, training: Training) -> Hooks:
        def on_progress(_progress: loop.StepProgress) -> bool:
            if training.state.total_steps == step:
                raise Killed
            return False

        return Hooks(on_progress=on_progress)

    whole = prepared()
    list(loop.fit(whole.state, whole.plan))
    left = prepared()
    with pytest.raises(Killed):
        list(loop.fit(left.state, left.plan, kill_at(1, left)))
    resumed = prepared()
    resumed.state.restore(left.state.tensors(), left.state.numbers())
    list(loop.fit(resumed.state, resumed.plan))
    assert builders.same(builders.weights(whole.state.network), builders.weights(resumed.state.network))


def test_a_network_trained_so_is_a_start_for_a_classifier() -> None:
    training = prepared()
    list(loop.fit(training.state, training.plan))
    learnt = {name: tensor.clone() for name, tensor in training.classifier.backbone.state_dict().items()}
    assert training.classifier.class_count == 0
    later = methods.build_classifier(spec(), 3, earlier=training.classifier)
    assert later.class_count == 3
    assert builders.same(learnt, builders.weights(later.backbone))
