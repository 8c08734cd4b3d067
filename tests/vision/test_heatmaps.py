"""Heat maps: what they are made of where that can be computed by hand, what they find, and how they are drawn."""

import io
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.vision_transformer import VisionTransformer

from app.vision import backbones
from app.vision.backbones import ALL_LAYERS, Backbone, GlobalAverage
from app.vision.classifier import Classifier
from app.vision.heatmaps import MAX_SIDE, HeatMaps, attended, drawn, log_odds
from app.vision.preprocessing import Preprocessing

SQUARE = Preprocessing(resize=64, crop=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear")


def image(side: int = 64, *, seed: int = 0) -> Tensor:
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def heat_of(classifier: Classifier, picture: Tensor, label: int = 1) -> NDArray[np.float32]:
    heat_maps = HeatMaps(classifier.backbone, picture.shape[2])
    return heat_maps.evidence(picture, lambda features: log_odds(classifier.head(features), label))


@pytest.mark.parametrize(
    ("name", "layer", "side"),
    [
        ("resnet18", None, 64),
        ("resnet18", "layer2", 64),
        ("resnet18", ALL_LAYERS, 64),
        ("mobilenet_v2", None, 64),
        ("graft_small", ALL_LAYERS, 64),
        ("efficientnet_b0", None, 64),
        ("convnext_tiny", None, 64),
        ("regnet_y_400mf", None, 64),
        ("densenet121", None, 64),
        ("squeezenet1_1", None, 64),
        ("shufflenet_v2_x1_0", None, 64),
        ("swin_t", None, 64),
        ("swin_t", "stage2", 64),
        pytest.param("maxvit_t", None, 224, marks=pytest.mark.slow),
        pytest.param("vit_b_16", None, 224, marks=pytest.mark.slow),
        pytest.param("vit_b_16", "stage1", 224, marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_network_has_a_map_of_its_input_size(name: str, layer: str | None, side: int) -> None:
    classifier = Classifier.new(name, 3, feature_layer=layer, seed=0).eval()
    picture = image(side)

    heats = [heat_of(classifier, picture, label) for label in range(3)]

    for heat in heats:
        assert (heat.shape, heat.dtype) == ((side, side), np.float32)
        assert heat.min() >= 0.0
    # Something speaks for one of them; random weights may let nothing speak for another.
    assert max(heat.max() for heat in heats) == 1.0
    assert np.array_equal(heats[1], heat_of(classifier, picture, 1))
    assert all(parameter.grad is None for parameter in classifier.parameters())


def made_of(*layers: nn.Module, width: int) -> Classifier:
    stages = OrderedDict(only=nn.Sequential(*layers, GlobalAverage()))
    backbone = Backbone("by_hand", stages, feature_width=width, layout="NCHW")
    torch.manual_seed(0)
    return Classifier(backbone, nn.Linear(width, 2), feature_layer="only").eval()


def test_behind_a_global_average_it_is_the_class_activation_map() -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.ReLU())
    classifier = made_of(*layers, width=8)
    picture = image(64)

    found = heat_of(classifier, picture, label=1)

    with torch.no_grad():
        weights = classifier.head.weight[1] - classifier.head.weight[0]
        by_hand = torch.einsum("c,nchw->nhw", weights, layers(picture))
    enlarged = functional.interpolate(by_hand[None], size=(64, 64), mode="bilinear")[0, 0].clamp(min=0)
    assert found == pytest.approx((enlarged / enlarged.max()).numpy(), abs=1e-5)


def test_heat_is_where_the_cells_look_and_not_where_they_are_drawn() -> None:
    """Three padded convolutions that halve: cell i looks around pixel 8 i, and is drawn around 8 i + 3.5."""
    convolutions = [nn.Conv2d(width, 1, 3, stride=2, padding=1, bias=False) for width in (3, 1, 1)]
    for convolution in convolutions:
        nn.init.ones_(convolution.weight)
    classifier = made_of(*convolutions, width=1)
    with torch.no_grad():
        classifier.head.weight[:, 0] = torch.tensor([-1.0, 1.0])
    for place in (20, 32, 47):
        picture = torch.zeros(1, 3, 64, 64)
        picture[:, :, place, 64 - place] = 1.0

        heat = heat_of(classifier, picture, label=1)

        down, right = ((heat.sum(axis) * np.arange(64)).sum() / heat.sum() for axis in (1, 0))
        assert (down, right) == (pytest.approx(place, abs=2), pytest.approx(64 - place, abs=2))


def test_maps_of_two_classes_are_where_the_other_is_not() -> None:
    classifier = Classifier.new("resnet18", 2, seed=0).eval()

    for_first, for_second = (heat_of(classifier, image(), label) for label in (0, 1))

    assert (for_first * for_second).max() == 0.0


def test_map_whose_cells_are_dead_on_noise_is_drawn_where_it_is() -> None:
    """Seen are bright pictures alone: noise leaves every cell at 0, without a gradient."""
    layers = nn.Sequential(nn.Conv2d(3, 1, 8, stride=8), nn.ReLU())
    classifier = made_of(*layers, width=1)
    with torch.no_grad():
        layers[0].weight.fill_(1.0)
        layers[0].bias.fill_(-1000.0)
        classifier.head.weight[:, 0] = torch.tensor([-1.0, 1.0])
    bright = torch.zeros(1, 3, 64, 64)
    bright[:, :, 16:24, 40:48] = 10.0

    heat = heat_of(classifier, bright, label=1)

    down, right = ((heat.sum(axis) * np.arange(64)).sum() / heat.sum() for axis in (1, 0))
    assert (down, right) == (pytest.approx(19.5), pytest.approx(43.5))
    assert heat_of(classifier, image(), label=1).max() == 0.0


def test_nothing_that_speaks_for_the_label_is_no_heat() -> None:
    classifier = Classifier.new("resnet18", 2, seed=0).eval()
    with torch.no_grad():
        classifier.head.weight[0], classifier.head.weight[1] = 1.0, -1.0  # features are never negative

    assert heat_of(classifier, image(), label=1).max() == 0.0


def test_followed_attention_is_what_the_network_computes() -> None:
    block = backbones.build("vit_b_16", seed=0).eval().stages[1][0]
    tokens = torch.randn(1, 10, 768, generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        output, weights = attended(block, tokens)
        assert torch.allclose(output, block(tokens), atol=1e-5)

    assert weights.shape == (1, 12, 10, 10)
    assert torch.allclose(weights.sum(3), torch.ones(1, 12, 10))


# Tiny networks that have learnt to tell a red spot from a blue one, wherever it is.

SPOT = 8


def spots(count: int, *, seed: int) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Noise with one spot: images, labels, and (top, left) of each spot."""
    random = np.random.default_rng(seed)
    images = torch.from_numpy(random.normal(0, 0.3, (count, 3, 32, 32)).astype(np.float32))
    labels, places = random.integers(0, 2, count), random.integers(0, 32 // SPOT, (count, 2)) * SPOT
    for i, (label, (top, left)) in enumerate(zip(labels, places, strict=True)):
        images[i, 2 * label, top : top + SPOT, left : left + SPOT] += 2.0
    return images, torch.from_numpy(labels), places


def tiny_transformer() -> Backbone:
    torch.manual_seed(0)
    network = VisionTransformer(
        image_size=32, patch_size=SPOT, num_layers=12, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=2
    )
    return backbones.rewrap("vit_b_16", network)


def small_convolutions() -> Backbone:
    return Classifier.new("resnet18", 2, feature_layer="layer1", seed=0).backbone


@pytest.mark.parametrize(
    ("make", "at_least"), [(tiny_transformer, 27), pytest.param(small_convolutions, 40, marks=pytest.mark.slow)]
)
def test_trained_network_is_found_to_look_at_the_spot(make: Callable[[], Backbone], at_least: int) -> None:
    """By chance it would be 2 or 3 of the 40. In a transformer tokens mix, so that what is seen is not where it was."""
    backbone = make()
    head = nn.Linear(backbone.feature_width, 2)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    for step in range(60):
        images, labels, _ = spots(32, seed=step)
        loss = functional.cross_entropy(head(backbone.train()(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    backbone.eval()

    heat_maps = HeatMaps(backbone, 32)
    images, labels, places = spots(40, seed=1000)
    with torch.no_grad():
        assert (head(backbone(images)).argmax(1) == labels).all()
    found = 0
    for picture, label, (top, left) in zip(images, labels.tolist(), places.tolist(), strict=True):
        heat = heat_maps.evidence(picture[None], lambda features, label=label: log_odds(head(features), label))
        hottest = np.unravel_index(heat.argmax(), heat.shape)
        found += top <= hottest[0] < top + SPOT and left <= hottest[1] < left + SPOT
    assert found >= at_least


# Drawing


def opened(png: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize(("size", "expected"), [((90, 60), (96, 64)), ((60, 90), (64, 96)), ((20, 20), (64, 64))])
def test_picture_keeps_its_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)

    assert opened(drawn(pixels, np.zeros((48, 48), np.float32), SQUARE)).shape == (expected[1], expected[0], 3)


def test_heat_is_coloured_in_its_place_and_what_is_beside_the_crop_is_whitened() -> None:
    pixels = np.full((64, 128, 3), 100, dtype=np.uint8)
    heat = np.zeros((48, 48), dtype=np.float32)
    heat[8:16, 32:40] = 1.0

    seen = opened(drawn(pixels, heat, SQUARE))

    is_grey = (seen == seen[:, :, :1]).all(2)
    expected = np.ones((64, 128), dtype=bool)
    expected[16:24, 72:80] = False  # the crop begins at (8, 40)
    assert np.array_equal(is_grey, expected)
    assert (seen[20, 76] == [223, 170, 54]).all()
    assert (seen[32, 64] == 100).all()
    assert (seen[32, 39] == 193).all()
    assert (seen[32, 40] == 100).all()
    assert (seen[7, 64] == 193).all()


def test_crop_larger_than_the_picture_is_cut_to_it() -> None:
    heat = np.zeros((48, 48), dtype=np.float32)
    heat[24, 24] = 1.0
    larger = Preprocessing(resize=32, crop=48, mean=SQUARE.mean, std=SQUARE.std, interpolation="bilinear")

    seen = opened(drawn(np.zeros((32, 32, 3), np.uint8), heat, larger))

    assert np.argwhere(seen[:, :, 0] > 0).tolist() == [[16, 16]]


def test_long_strip_is_drawn_small() -> None:
    seen = opened(drawn(np.zeros((40, 4000, 3), np.uint8), np.ones((48, 48), np.float32), SQUARE))

    assert seen.shape == (10, MAX_SIDE, 3)
