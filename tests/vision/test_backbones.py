"""Every backbone of the table: its stages are torchvision's network, and can be frozen and trained."""

import pytest
import torch
import torchvision.models
from torch import nn

from app.errors import InvalidRequest, WeightsUnavailable
from app.vision import backbones
from app.vision.backbones import BACKBONES, choose
from app.vision.classifier import Classifier

LARGE = ("vgg16", "vit_b_16", "maxvit_t", "wide_resnet50_2", "convnext_small")
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in BACKBONES]


def small_images(name: str, count: int = 2) -> torch.Tensor:
    side = BACKBONES[name].min_image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", NAMES)
def test_stages_compose_to_torchvisions_forward_up_to_its_last_layer(name: str) -> None:
    torch.manual_seed(0)
    network = torchvision.models.get_model(BACKBONES[name].architecture, weights=None).eval()
    head = network.get_submodule(BACKBONES[name].head)
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = small_images(name)

    with torch.inference_mode():
        logits = network(images)
        backbone = backbones.rewrap(name, network).eval()
        features = backbone(images)
        from_features = head(features) if isinstance(head, nn.Linear) else None

    # SqueezeNet's own head works before the pooling.
    expected = seen[0] if seen[0].ndim == 2 else seen[0].mean((2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=0)
    assert features.shape == (2, backbone.feature_width)
    assert backbone.stage_names == BACKBONES[name].stage_names
    if from_features is not None:
        torch.testing.assert_close(from_features, logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_stage_and_the_head_train_while_the_rest_stays(name: str) -> None:
    classifier = Classifier.new(name, 3, seed=0).train()
    classifier.freeze(1)
    *frozen, last = classifier.backbone.stages
    before = [buffer.clone() for stage in frozen for buffer in stage.buffers()]

    logits = classifier(small_images(name))
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()

    assert logits.shape == (2, 3)
    trained = [*last.parameters(), *classifier.head.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert all(p.grad is None for stage in frozen for p in stage.parameters())
    after = [buffer for stage in frozen for buffer in stage.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_stage_but_the_last_gives_pooled_features_of_its_own(name: str) -> None:
    spec = BACKBONES[name]
    with torch.device("meta"):  # shapes alone
        images = torch.zeros(2, 3, spec.min_image_size, spec.min_image_size)
    backbone = backbones.rewrap(name, backbones.hollow(name)).to("meta").eval()
    activations = images
    for stage in backbone.stages:
        activations = stage(activations)
        pooled = backbone.pool(activations)
        assert pooled.ndim == 2
        assert pooled.shape[0] == 2
    assert pooled.shape[1] == backbone.feature_width


def test_a_torchvision_state_dict_gives_torchvisions_features() -> None:
    torch.manual_seed(3)
    network = torchvision.models.regnet_y_400mf(weights=None).eval()
    images = small_images("regnet_y_400mf")

    built = backbones.build("regnet_y_400mf", network.state_dict()).eval()

    assert torch.equal(built(images), backbones.rewrap("regnet_y_400mf", network)(images))


def test_a_state_dict_of_another_network_is_refused_with_a_remedy() -> None:
    other = torchvision.models.shufflenet_v2_x1_0(weights=None).state_dict()

    with pytest.raises(WeightsUnavailable, match="does not hold torchvision's squeezenet1_1"):
        backbones.build("squeezenet1_1", other)


def test_building_is_repeatable_from_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (backbones.build("squeezenet1_1", seed=seed) for seed in (1, 1, 2))
    backbones.hollow("regnet_y_400mf")

    assert torch.equal(torch.rand(1), expected)
    weights = [next(b.parameters()) for b in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_table_has_torchvisions_numbers() -> None:
    resnet50 = BACKBONES["resnet50"]
    first, second = resnet50.weights

    assert (first.name, first.file) == ("IMAGENET1K_V2", "resnet50-11ad3fa6.pth")
    assert (first.preprocessing.resize, first.preprocessing.crop) == (232, 224)
    assert (second.name, second.file) == ("IMAGENET1K_V1", "resnet50-0676ba61.pth")
    assert (second.preprocessing.resize, second.preprocessing.crop) == (256, 224)
    assert (resnet50.parameters, resnet50.gflops) == (25_557_032, 4.089)
    assert BACKBONES["efficientnet_b3"].preprocessing.interpolation == "bicubic"


def test_only_plain_imagenet_weights_are_offered() -> None:
    names = {weights.name for spec in BACKBONES.values() for weights in spec.weights if not weights.is_bundled}

    assert names == {"IMAGENET1K_V1", "IMAGENET1K_V2"}
    assert len(BACKBONES) == 29


def test_one_backbone_is_bundled_and_taken_where_no_other_can_be_had() -> None:
    assert [name for name, spec in BACKBONES.items() if spec.weights[0].is_bundled] == ["graft_small"]
    for device in ("cpu", "cuda"):
        chosen, reason = choose({"graft_small"}, device)
        assert chosen == "graft_small"
        assert "comes with Graft" in reason
        assert choose({"graft_small", "vgg16"}, device).name == "vgg16"


def test_short_names_mean_torchvisions() -> None:
    assert backbones.find("resnext50").name == "resnext50_32x4d"
    assert backbones.find("wide_resnet50").name == "wide_resnet50_2"
    assert backbones.find("resnet18").name == "resnet18"


def test_an_unknown_backbone_is_refused_by_field() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        backbones.find("resnet19")

    assert [e.pointer for e in refusal.value.errors] == ["#/backbone"]


@pytest.mark.parametrize(
    ("available", "device_type", "chosen"),
    [
        (set(BACKBONES), "cuda", "resnet50"),
        (set(BACKBONES), "mps", "resnet50"),
        (set(BACKBONES), "cpu", "mobilenet_v3_large"),
        ({"mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"}, "cpu", "mobilenet_v3_small"),
        ({"mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1"}, "cuda", "mobilenet_v2"),
        ({"vgg16", "densenet121"}, "cpu", "densenet121"),
    ],
)
def test_auto_takes_the_best_that_can_be_had(available: set[str], device_type: str, chosen: str) -> None:
    choice = choose(available, device_type)

    assert choice.name == chosen
    assert choice.reason.startswith(f"backbone {chosen}: ")


def test_auto_says_what_it_would_have_preferred() -> None:
    assert "resnet50 would be preferred" in choose({"squeezenet1_1"}, "cuda").reason


def test_auto_with_no_weights_at_all_is_refused_with_remedies() -> None:
    with pytest.raises(WeightsUnavailable, match=r"GRAFT_WEIGHTS_DIR.*from_scratch"):
        choose(set(), "cpu")
