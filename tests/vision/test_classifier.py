"""Freezing, splitting and starting again from an earlier classifier."""

import pytest
import torch
from torch import nn

from app.errors import InvalidHyperparameter
from app.vision.classifier import Classifier

NAME = "mobilenet_v3_small"


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def batch_norm_statistics(module: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]


def test_statistics_of_frozen_stages_do_not_move_in_training_and_those_of_trained_ones_do() -> None:
    classifier = Classifier.new(NAME, 2, seed=0)
    classifier.freeze(2)
    classifier.train()
    *frozen, trained, last = classifier.backbone.stages
    frozen_before = [s for stage in frozen for s in batch_norm_statistics(stage)]
    trained_before = batch_norm_statistics(trained) + batch_norm_statistics(last)

    classifier(images())

    frozen_after = [s for stage in frozen for s in batch_norm_statistics(stage)]
    trained_after = batch_norm_statistics(trained) + batch_norm_statistics(last)
    assert all(torch.equal(a, b) for a, b in zip(frozen_before, frozen_after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(trained_before, trained_after, strict=True))


def test_unfreezing_in_training_sets_the_stages_to_train_at_once() -> None:
    classifier = Classifier.new(NAME, 2, seed=0).train()
    classifier.freeze(0)
    frozen_modes = [stage.training for stage in classifier.backbone.stages]

    classifier.freeze(100)

    assert frozen_modes == [False] * 5
    assert [stage.training for stage in classifier.backbone.stages] == [True] * 5
    assert all(p.requires_grad for p in classifier.parameters())


def test_only_trainable_parameters_are_grouped() -> None:
    classifier = Classifier.new(NAME, 2, seed=0)
    classifier.freeze(0)
    frozen = classifier.parameter_groups()
    classifier.freeze(1)
    last = classifier.parameter_groups()

    assert (len(frozen.head), len(frozen.backbone)) == (2, 0)
    assert {id(p) for p in last.backbone} == {id(p) for p in classifier.backbone.stages[-1].parameters()}


@pytest.mark.parametrize("trainable", [0, 1, 3, 5])
def test_prefix_and_suffix_are_the_whole(trainable: int) -> None:
    classifier = Classifier.new(NAME, 3, seed=0).eval()
    classifier.freeze(trainable)

    kept = classifier.frozen_prefix(images())

    assert torch.equal(classifier.trainable_suffix(kept), classifier(images()))
    assert not kept.requires_grad
    assert (kept.ndim == 2) == (trainable == 0)


def test_heads_come_from_their_seed_and_start_without_bias() -> None:
    first, second, other = (Classifier.new("squeezenet1_1", 3, seed=seed).head for seed in (1, 1, 2))

    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert torch.equal(first.bias, torch.zeros(3))
    assert first.weight.abs().max() <= 512**-0.5


def test_a_feature_layer_drops_the_stages_behind_it() -> None:
    whole = Classifier.new(NAME, 2, seed=0).eval()

    cut = Classifier.new(NAME, 2, seed=0, feature_layer="stage3").eval()

    assert cut.stage_names == ("stem", "stage1", "stage2", "stage3")
    assert cut.head.in_features == 48
    assert torch.equal(cut.features(images()), whole.features(images(), "stage3"))
    assert torch.equal(whole.features(images()), whole.features(images(), "stage4"))


@pytest.mark.parametrize("name", [NAME, pytest.param("vit_b_16", marks=pytest.mark.slow), "swin_t"])
def test_a_head_that_reads_all_layers_sees_each_ones_mean_and_deviation(name: str) -> None:
    side = 224 if name == "vit_b_16" else 64
    pictures = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    whole = Classifier.new(name, 2, seed=0).eval()
    with torch.inference_mode():
        every = Classifier.new(name, 2, seed=0, feature_layer="all").eval().features(pictures)
        last = every.shape[1] - whole.head.in_features
        assert torch.equal(every[:, last:], whole.features(pictures))
        at = 0
        for layer in whole.stage_names[:-1]:
            means = whole.features(pictures, layer)
            width = means.shape[1]
            torch.testing.assert_close(every[:, at : at + width], means)
            assert (every[:, at + width : at + 2 * width] > 0).all()
            at += 2 * width
    assert at == last


def test_a_start_that_reads_all_layers_reads_the_last_one_again_where_all_is_trained() -> None:
    earlier = Classifier.new(NAME, 2, seed=0, feature_layer="all").eval()
    later = Classifier.from_earlier(earlier, 7, seed=1)
    assert (later.feature_layer, later.backbone.reads_all) == ("stage4", False)
    assert later.head.in_features == Classifier.new(NAME, 2, seed=0).head.in_features
    assert later(images()).shape == (4, 7)


def test_an_unknown_feature_layer_is_refused_by_field() -> None:
    with pytest.raises(InvalidHyperparameter, match="stem, stage1") as refusal:
        Classifier.new(NAME, 2, seed=0, feature_layer="layer4")

    assert [e.pointer for e in refusal.value.errors] == ["#/hyperparameters/feature_layer"]


def test_an_earlier_classifier_lends_its_backbone_to_a_new_head() -> None:
    earlier = Classifier.new(NAME, 2, seed=0).eval()
    earlier.freeze(0)
    expected = earlier.features(images())

    later = Classifier.from_earlier(earlier, 7, seed=1).eval()

    assert torch.equal(later.features(images()), expected)
    assert later.class_count == 7
    assert all(p.requires_grad for p in later.parameters())


def test_a_cut_classifier_cannot_give_what_was_cut_off() -> None:
    earlier = Classifier.new(NAME, 2, seed=0, feature_layer="stage2")

    with pytest.raises(InvalidHyperparameter):
        Classifier.from_earlier(earlier, 7, feature_layer="stage4", seed=1)

    assert Classifier.from_earlier(earlier, 7, seed=1).stage_names == ("stem", "stage1", "stage2")
