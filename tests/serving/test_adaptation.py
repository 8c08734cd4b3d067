"""Copies of a model that are tuned to one picture: by its neighbours, and by its views."""

from collections.abc import Generator, Sequence
from typing import Any

import builders
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from app.serving import adaptation
from app.serving.adaptation import (
    Head,
    Plan,
    advanced,
    by_neighbours,
    entropy_steps,
    neighbour_steps,
    share_of,
    tuned_head,
    views_of,
)
from app.vision import images
from app.vision.backbones import Backbone, build
from app.vision.images import ImageLimits
from app.vision.outputs import Output, of_outputs
from app.vision.preprocessing import Preprocessing, eval_pixels

ONE = [Output("", ["a", "b", "c"], 0.7)]
USUAL = Plan.of("neighbors")
TWO = [Output("kind", ["a", "b"], 1.0), Output("colour", ["x", "y", "z"], 2.0)]
PREPROCESSING = Preprocessing(64, 64, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


def head(outputs: Sequence[Output], width: int = 8) -> Head:
    random = torch.Generator().manual_seed(0)
    count = sum(len(output.classes) for output in outputs)
    return Head(torch.randn(width, count, generator=random), torch.randn(count, generator=random))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("outputs", [ONE, TWO], ids=["one task", "two tasks"])
def test_tuned_head_is_what_gradient_descent_on_its_copy_comes_to(outputs: Sequence[Output]) -> None:
    start, examples = head(outputs), numbers(5, 8, seed=1)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    parts = [part.softmax(1) for part in of_outputs(numbers(5, len(start.bias), seed=2), outputs)]
    if outputs is TWO:
        parts[1][3] = 0  # a picture without a label of the second task
    targets = torch.cat(parts, dim=1)

    tuned = tuned_head(start, examples, targets, weights, outputs, steps=7, learning_rate=0.9)

    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    rate = 0.9 / (examples.square().sum(1).mean() + 1)
    for _ in range(7):
        logits = of_outputs(examples @ weight + bias, outputs)
        losses = [
            -(target * part.log_softmax(1)).sum(1)
            for part, target in zip(logits, of_outputs(targets, outputs), strict=True)
        ]
        slopes = torch.autograd.grad((torch.stack(losses).sum(0) * weights).sum(), [weight, bias])
        weight, bias = ((each - rate * slope) for each, slope in zip((weight, bias), slopes, strict=True))
    torch.testing.assert_close(tuned.weight, weight.detach())
    torch.testing.assert_close(tuned.bias, bias.detach())


@pytest.mark.parametrize("steps", [20, 21])
def test_steps_come_down_whatever_their_number_where_the_head_is_unsure_and_examples_are_alike(steps: int) -> None:
    start = Head(0.02 * numbers(64, 2, seed=0), torch.zeros(2))
    examples = numbers(1, 64, seed=1) + 0.3 * numbers(24, 64, seed=2)  # mean cosine 0.9
    outputs = [Output("", ["a", "b"], 1.0)]
    targets = torch.tensor([[0.6, 0.4]]).expand(24, 2)

    weights = torch.full((24,), 1 / 24)
    tuned = tuned_head(start, examples, targets, weights, outputs, steps=steps, learning_rate=100.0)

    found = tuned.logits(examples).softmax(1)
    assert float((found[:, 0] - 0.6).abs().max()) < 0.1


def test_neighbours_that_look_as_in_training_change_nothing() -> None:
    start, near, picture = head(ONE), numbers(6, 8, seed=3), numbers(8, seed=4)

    found = by_neighbours(start, picture, near, near, ONE, Plan.of("neighbors"))

    torch.testing.assert_close(found, start.logits(picture))


def test_copy_answers_on_shifted_neighbours_what_the_model_answers_on_them_as_they_are() -> None:
    start, near = head(ONE, width=64), numbers(6, 64, seed=3)
    shift = numbers(64, seed=5)

    found = [by_neighbours(start, each + shift, near + shift, near, ONE, Plan.of("neighbors")) for each in near]

    wanted = start.logits(near).argmax(1)
    before = start.logits(near + shift).argmax(1) == wanted
    after = torch.stack(found).argmax(1) == wanted
    assert (int(before.sum()), int(after.sum())) == (3, 6)


@pytest.mark.parametrize(
    ("ood_score", "share"), [(0.0, 0.0), (0.1, 0.04), (0.25, 0.25), (0.5, 1.0), (0.9, 1.0), (None, 1.0)]
)
def test_stranger_pictures_are_answered_more_by_the_copy(ood_score: float | None, share: float) -> None:
    assert share_of(ood_score) == pytest.approx(share)


def by_entropy(*asked: Any, **options: Any) -> Tensor:
    return ended(entropy_steps(*asked, **options))


def ended(turns: Generator[None, None, Tensor]) -> Tensor:
    """All steps, one after the other."""
    while (found := advanced(turns)) is None:
        pass
    return found


def network(name: str) -> tuple[Backbone, Head]:
    backbone = build(name, seed=0).eval()
    return backbone, Head(0.05 * numbers(backbone.feature_width, 3, seed=6), torch.zeros(3))


def picture() -> Tensor:
    limits = ImageLimits(10**7, 10**7, 10_000, 100.0, 100)
    pixels = images.decode(builders.jpeg(3, size=(90, 70)), side=256, limits=limits)
    return eval_pixels(pixels, PREPROCESSING)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", "normalisation"),
        ("resnet18", "all"),
        ("mobilenet_v3_small", "normalisation"),
        pytest.param("vit_b_16", "normalisation", marks=pytest.mark.slow),
        ("squeezenet1_1", "all"),
    ],
)
def test_copy_is_surer_and_the_model_is_as_it_was(name: str, parameters: adaptation.Parameters) -> None:
    side = 224 if name == "vit_b_16" else 64
    backbone, start = network(name)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    views = views_of(functional.interpolate(picture().unsqueeze(0), (side, side))[0])[:2]
    plan = Plan.of("entropy", parameters=parameters, learning_rate=1e-4, steps=2)

    found = by_entropy(backbone, start, views, ONE, PREPROCESSING, plan, likeness=None)

    own = start.logits(backbone(adaptation.normalise(views[:1], PREPROCESSING)))[0].detach()
    entropy, entropy_before = (
        float(-(logits.div(0.7).softmax(0) * logits.div(0.7).log_softmax(0)).sum()) for logits in (found, own)
    )
    assert entropy < entropy_before
    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet18", None),
        ("mobilenet_v3_small", "all"),
        pytest.param("vit_b_16", None, marks=pytest.mark.slow),
        ("swin_t", None),
    ],
)
def test_last_stage_is_what_steps_on_a_copy_of_the_whole_network_come_to(name: str, layer: str | None) -> None:
    side = 224 if name == "vit_b_16" else 64
    backbone = build(name, seed=0).eval()
    if layer:
        backbone.read(layer)
    start = Head(0.05 * numbers(backbone.feature_width, 3, seed=6), torch.zeros(3))
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    plain = torch.randint(60, 256, (5, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    dark = plain // 3
    normalised = adaptation.normalise(dark, PREPROCESSING)
    with torch.no_grad():
        wanted = backbone(adaptation.normalise(plain[1:], PREPROCESSING))

    plan = Plan.of("neighbors", parameters="last_stage", steps=2, learning_rate=2e-4)
    found = ended(neighbour_steps(backbone, start, dark, wanted, ONE, PREPROCESSING, plan))

    assert all(torch.equal(before[key], tensor) for key, tensor in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    untouched = by_neighbours(start, backbone(normalised[:1])[0], backbone(normalised[1:]), wanted, ONE, USUAL)
    likenesses = []
    for _ in range(2):
        features = backbone(normalised)
        alike = functional.cosine_similarity(features[1:], wanted)
        weights = (functional.cosine_similarity(features[1:], features[:1]) / 0.05).softmax(0).detach()
        likenesses.append(float((weights * alike).sum().detach()))
        slopes = torch.autograd.grad((weights * alike).sum(), list(backbone.stages[-1].parameters()))
        with torch.no_grad():
            for parameter, slope in zip(backbone.stages[-1].parameters(), slopes, strict=True):
                parameter += 2e-4 * slope.sign()
    with torch.no_grad():
        features = backbone(normalised)
        expected = by_neighbours(start, features[0], features[1:], wanted, ONE, USUAL)
    assert likenesses[1] > likenesses[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - untouched.detach()).norm() > 5 * (found - expected).norm()


def test_views_that_are_nearest_to_what_is_known_are_those_that_agree() -> None:
    backbone, start = network("resnet18")
    views = views_of(picture())
    plan = Plan.of("entropy", steps=1)
    chosen = [3, 5, 6, 9]

    def likeness(features: Tensor) -> Tensor:
        assert len(features) == len(views)
        return torch.tensor([float(i in chosen) for i in range(len(views))])

    by_all = by_entropy(backbone, start, views, ONE, PREPROCESSING, plan, likeness=likeness)
    by_those = by_entropy(backbone, start, views[[0, *chosen]], ONE, PREPROCESSING, plan, likeness=None)

    torch.testing.assert_close(by_all, by_those)


def test_views_are_the_picture_itself_and_others_always_the_same() -> None:
    pixels = picture()
    views = views_of(pixels)

    assert torch.equal(views[0], pixels)
    assert views.shape == (15, 3, 64, 64)
    assert views.dtype == torch.uint8
    assert torch.equal(views, views_of(pixels))
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_network_without_normalisation_is_tuned_in_all_its_parameters() -> None:
    backbone, start = network("squeezenet1_1")
    views = views_of(picture())[:3]

    by_name = {
        parameters: by_entropy(
            backbone,
            start,
            views,
            ONE,
            PREPROCESSING,
            Plan.of("entropy", parameters=parameters, learning_rate=1e-3),
            likeness=None,
        )
        for parameters in adaptation.TUNED["entropy"]
    }

    torch.testing.assert_close(by_name["normalisation"], by_name["all"])


def test_two_tasks_are_tuned_together() -> None:
    backbone, _ = network("resnet18")
    start = Head(0.05 * numbers(backbone.feature_width, 5, seed=6), torch.zeros(5))

    found = by_entropy(backbone, start, views_of(picture())[:4], TWO, PREPROCESSING, Plan.of("entropy"), likeness=None)

    assert found.shape == (5,)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(("method", "parameters"), [("neighbors", "all"), ("entropy", "head")])
def test_method_tunes_its_own_parameters_alone(method: adaptation.Method, parameters: adaptation.Parameters) -> None:
    with pytest.raises(ValueError, match=f"adapt={method} tunes "):
        Plan.of(method, parameters=parameters)


def test_plan_takes_what_is_left_out_from_what_was_measured() -> None:
    assert Plan.of("entropy", steps=3) == Plan("entropy", "normalisation", 3, 5e-3)
    assert Plan.of("neighbors", learning_rate=2.0) == Plan("neighbors", "head", 20, 2.0)
    assert Plan.of("neighbors", parameters="last_stage") == Plan("neighbors", "last_stage", 3, 2e-4)
