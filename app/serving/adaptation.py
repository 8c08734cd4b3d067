"""Instance tuning: a copy of a model is tuned to one picture before it answers. The model itself is never written to.

By neighbors: the nearest training pictures are made to look as this one was taken, and a copy of the head learns to
answer on them so what the model answers on them as they are (local learning, Bottou and Vapnik 1992; at test time,
Hardt and Sun 2024). By entropy: a copy of the parameters is moved so that several views of the picture get one sure
answer (MEMO, Zhang et al. 2022). Either way the stranger the picture, the more its copy's answer counts.
docs/adaptation.md has what was measured. Knows tensors and networks; not models' files, not HTTP.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.transforms.v2 import functional as transforms

from app.vision.backbones import Backbone
from app.vision.outputs import Output, of_outputs
from app.vision.preprocessing import Preprocessing, normalise
from app.vision.reference import LIMIT_SCORE

Method = Literal["neighbors", "entropy"]
Parameters = Literal["head", "last_stage", "normalisation", "all"]

# Of the training pictures, those that a head is tuned to.
NEIGHBOURS = 24
# Neighbours count by their likeness to the picture: weights are a softmax of cosines over this.
_LIKENESS = 0.05
# Of the views, those that are to agree, beside the picture itself.
_AGREEING = 4
# Pictures that pass the stages that are not tuned, between two turns.
_PART = 8
_cosine = nn.functional.cosine_similarity
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Plan:
    """How a copy is tuned. learning_rate: by neighbours in units of 1 over their features' mean squared length."""

    method: Method
    parameters: Parameters
    steps: int
    learning_rate: float

    @classmethod
    def of(
        cls,
        method: Method,
        *,
        parameters: Parameters | None = None,
        steps: int | None = None,
        learning_rate: float | None = None,
    ) -> Self:
        """What is left out as measurement chose it. Raises ValueError for parameters that the method does not tune."""
        parameters = parameters or TUNED[method][0]
        if parameters not in TUNED[method]:
            raise ValueError(f"adapt={method} tunes {' or '.join(TUNED[method])}")
        usual_steps, usual_rate = _USUAL[parameters]
        return cls(method, parameters, steps or usual_steps, learning_rate or usual_rate)


# The first one is the usual one.
TUNED: dict[Method, tuple[Parameters, ...]] = {
    "neighbors": ("head", "last_stage"),
    "entropy": ("normalisation", "all"),
}
_USUAL: dict[Parameters, tuple[int, float]] = {
    "head": (20, 10.0),
    "last_stage": (3, 2e-4),
    "normalisation": (1, 5e-3),
    "all": (1, 1e-4),
}


class Head(NamedTuple):
    """A linear head: weight float32 (D, C), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return features @ self.weight + self.bias


def share_of(ood_score: float | None) -> float:
    """How much the copy's answer counts, beside the model's own: 0 to 1, all of it where the picture is of no kind that
    the model knows. What is as in training needs no tuning, and tuning can only harm it.

    ood_score: 0 to 1; None where the model has no statistics to tell it.
    """
    return 1.0 if ood_score is None else min(ood_score / LIMIT_SCORE, 1.0) ** 2


# By neighbours


def tuned_head(
    head: Head,
    examples: Tensor,
    targets: Tensor,
    weights: Tensor,
    outputs: Sequence[Output],
    *,
    steps: int,
    learning_rate: float,
) -> Head:
    """A copy of the head after gradient steps on examples, by cross-entropy with their targets.

    examples: float32 (K, D), features. targets: float32 (K, C), of each task summing to 1, or to 0 for none. weights:
    (K,), summing to 1. What the steps add to the weight is a combination of the examples, so K numbers a class are
    stepped in place of D: the same steps, for less. A learning rate by which they would not come down is lowered.
    """
    products = examples @ examples.T + 1  # the 1 is the bias's
    roots = weights.sqrt()
    # Of the softmax's curvature, at most a half, times the steepest direction of the examples: with twice this rate
    # steps begin to go up and down, and their number's parity would decide.
    steepest = torch.linalg.eigvalsh(roots.unsqueeze(1) * products * roots)[-1]
    rate = torch.minimum(learning_rate / products.diagonal().mean(), 2 / steepest) * weights.unsqueeze(1)
    asked = torch.cat([part.sum(1, keepdim=True).expand_as(part) for part in of_outputs(targets, outputs)], dim=1)
    plain, share = head.logits(examples), torch.zeros(len(examples), len(head.bias))
    for _ in range(steps):
        share = share - rate * (_softmax(plain + products @ share, outputs) * asked - targets)
    return Head(head.weight + examples.T @ share, head.bias + share.sum(0))


def by_neighbours(
    head: Head, picture: Tensor, seen: Tensor, as_they_are: Tensor, outputs: Sequence[Output], plan: Plan
) -> Tensor:
    """Logits (C,) of a picture by a head tuned to its neighbours.

    picture: float32 (D,), its features. seen: (K, D), the neighbours' when they look as it does; as_they_are: (K, D).
    """
    targets = _softmax(head.logits(as_they_are), outputs)
    weights = _weights(picture, seen)
    tuned = tuned_head(head, seen, targets, weights, outputs, steps=plan.steps, learning_rate=plan.learning_rate)
    return tuned.logits(picture)


def neighbour_steps(
    backbone: Backbone,
    head: Head,
    images: Tensor,
    as_they_are: Tensor,
    outputs: Sequence[Output],
    preprocessing: Preprocessing,
    plan: Plan,
) -> Generator[None, None, Tensor]:
    """Logits (C,) of a picture by a copy whose last stage, and then head, were tuned to its neighbours; the device is
    free at each yield.

    The stage learns to give neighbours that look as the picture does the features that they have as they are, by the
    cosine: it is told more than a head is, which only hears what they are to be called. images: uint8 (1 + K, 3, S, S),
    the picture, then the neighbours as they look when they look as it does. as_they_are: float32 (K, D). The backbone
    is in eval mode and stays as it is.
    """
    stages, stage = list(backbone.stages)[:-1], backbone.stages[-1]
    fixed = {name: tensor.detach() for name, tensor in chain(stage.named_parameters(), stage.named_buffers())}
    tuned = [name for name, _ in stage.named_parameters()]
    parts, device = [], next(backbone.parameters()).device
    for part in torch.split(images, _PART):
        with torch.no_grad():
            parts.append(_through(backbone, normalise(part.to(device), preprocessing), stages))
        yield
    activations, *summaries = (torch.cat(each) for each in zip(*parts, strict=True))

    def features(copy: Sequence[Tensor]) -> Tensor:
        found = functional_call(stage, fixed | dict(zip(tuned, copy, strict=True)), (activations,))
        if backbone.reads_all:
            return torch.cat([*summaries, backbone.summary(found)], dim=1).float()
        return backbone.pool(found).float()

    wanted = as_they_are.to(device)
    copy = [fixed[name].clone() for name in tuned]
    for _ in range(plan.steps):
        yield
        with torch.enable_grad():
            copy = [tensor.requires_grad_() for tensor in copy]
            found = features(copy)
            picture, seen = found[:1], found[1:]
            weights = _weights(picture.detach(), seen.detach())
            slopes = torch.autograd.grad(-(weights * _cosine(seen, wanted)).sum(), copy)
        copy = _stepped(copy, slopes, plan.learning_rate)
    yield
    with torch.no_grad():
        found = features(copy).cpu()
    if not torch.isfinite(found).all():
        return torch.full_like(head.bias, math.nan)  # steps were too large: who asked says so
    return by_neighbours(head, found[0], found[1:], as_they_are, outputs, Plan.of("neighbors"))


def _through(backbone: Backbone, images: Tensor, stages: Sequence[nn.Module]) -> list[Tensor]:
    """What comes out of these stages, and if the head reads all layers, the summary of each."""
    summaries = []
    for stage in stages:
        images = stage(images)
        if backbone.reads_all:
            summaries.append(backbone.summary(images))
    return [images, *summaries]


def _weights(picture: Tensor, seen: Tensor) -> Tensor:
    """How much each neighbour counts: (D,) or (1, D), and (K, D), to (K,) that sum to 1."""
    return (_cosine(seen, picture) / _LIKENESS).softmax(0)


def _stepped(copy: Sequence[Tensor], slopes: Sequence[Tensor], rate: float) -> list[Tensor]:
    """The size of a step is the rate's alone, as in Adam's first one: views that agree have tiny gradients."""
    return [tensor.detach() - rate * slope.sign() for tensor, slope in zip(copy, slopes, strict=True)]


def _softmax(logits: Tensor, outputs: Sequence[Output]) -> Tensor:
    return torch.cat([part.softmax(1) for part in of_outputs(logits, outputs)], dim=1)


# By entropy


def entropy_steps(
    backbone: Backbone,
    head: Head,
    views: Tensor,
    outputs: Sequence[Output],
    preprocessing: Preprocessing,
    plan: Plan,
    *,
    likeness: Callable[[Tensor], Tensor] | None,
) -> Generator[None, None, Tensor]:
    """Logits (C,) of a picture by a copy that was tuned to its views; the device is free at each yield.

    views: uint8 (V, 3, S, S), the picture itself first. The backbone is in eval mode and stays as it is. likeness:
    how near features (V, D) are to what the model knows, (V,); the nearest views are tuned to, or without it those
    that the model is surest of (Shu et al. 2022). One picture at a time: copies of several beside each other (vmap)
    took 2 to 5 times as long for each, on a CPU.
    """
    device = next(backbone.parameters()).device
    here = Head(head.weight.to(device), head.bias.to(device))
    everything = {name: tensor.detach() for name, tensor in backbone.named_parameters()}
    tuned = _tuned_names(backbone, plan.parameters)
    fixed = everything | dict(backbone.named_buffers())
    images = normalise(views.to(device), preprocessing)
    with torch.no_grad():
        features = backbone(images).float().cpu()
        nearness = likeness(features) if likeness else -_entropies(head.logits(features), outputs)
    order = nearness[1:].topk(min(_AGREEING, len(views) - 1)).indices.tolist()
    agreeing = images[[0, *(place + 1 for place in order)]]

    def logits(copy: Sequence[Tensor], images: Tensor) -> Tensor:
        parameters = fixed | dict(zip(tuned, copy, strict=True))
        features: Tensor = functional_call(backbone, parameters, (images,))
        return here.logits(features.float())

    copy = [everything[name].clone() for name in tuned]
    for _ in range(plan.steps):
        yield
        with torch.enable_grad():
            copy = [tensor.requires_grad_() for tensor in copy]
            slopes = torch.autograd.grad(_marginal_entropy(logits(copy, agreeing), outputs), copy)
        copy = _stepped(copy, slopes, plan.learning_rate)
    with torch.no_grad():
        answer: Tensor = logits(copy, images[:1])
    return answer[0].cpu()


def advanced(turns: Generator[None, None, Tensor]) -> Tensor | None:
    """What the turns came to, after one more of them; None before the last."""
    try:
        next(turns)
    except StopIteration as end:
        found: Tensor = end.value
        return found
    return None


def _entropies(logits: Tensor, outputs: Sequence[Output]) -> Tensor:
    """Of each view's answer, in sum over tasks: logits (V, C) to (V,)."""
    parts = zip(of_outputs(logits, outputs), outputs, strict=True)
    return torch.stack([_entropy((part / output.temperature).log_softmax(1)) for part, output in parts]).sum(0)


def _marginal_entropy(logits: Tensor, outputs: Sequence[Output]) -> Tensor:
    """Of the mean answer of views, in sum over tasks: logits (V, C) to one number."""
    total = logits.new_zeros(())
    for part, output in zip(of_outputs(logits, outputs), outputs, strict=True):
        answers = (part / output.temperature).log_softmax(1)
        total = total + _entropy(answers.logsumexp(0, keepdim=True) - math.log(len(answers))).sum()
    return total


def _entropy(log_probabilities: Tensor) -> Tensor:
    """(N, C) to (N,)."""
    return -(log_probabilities.exp() * log_probabilities).sum(1)


def _tuned_names(backbone: Backbone, parameters: Parameters) -> list[str]:
    """Of the backbone's parameters. A network without normalisation has nothing but all of it to tune."""
    names = [name for name, _ in backbone.named_parameters()]
    if parameters == "all":
        return names
    of_norms = {
        f"{path}.{name}"
        for path, module in backbone.named_modules()
        if isinstance(module, _NORMS)
        for name, _ in module.named_parameters(recurse=False)
    }
    return [name for name in names if name in of_norms] or names


def views_of(pixels: Tensor) -> Tensor:
    """A picture, and how else it might have been taken: uint8 (V, 3, S, S), always the same. pixels: uint8 (3, S, S).

    In light, contrast and sharpness the views go both ways: which one leads back to what the network knows is seen
    afterwards. Crops and mirrored pictures, as MEMO has them too, cost accuracy on pictures that were not shifted.
    """
    return torch.stack([pixels, *(change(pixels) for change in _CHANGES)])


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    blurred: Tensor = transforms.gaussian_blur(pixels, [4 * round(sigma) + 1] * 2, [sigma] * 2)
    return blurred


_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    transforms.autocontrast,
    transforms.equalize,
    lambda pixels: transforms.adjust_contrast(pixels, 1.5),
    lambda pixels: transforms.adjust_contrast(pixels, 2.5),
    lambda pixels: transforms.adjust_contrast(pixels, 4.0),
    lambda pixels: transforms.adjust_brightness(pixels, 0.6),
    lambda pixels: transforms.adjust_brightness(pixels, 1.4),
    lambda pixels: transforms.adjust_gamma(pixels, 1.8),
    lambda pixels: transforms.adjust_gamma(pixels, 0.6),
    lambda pixels: transforms.adjust_sharpness(pixels, 3.0),
    lambda pixels: transforms.adjust_sharpness(pixels, 8.0),
    lambda pixels: _blurred(pixels, 1.0),
    lambda pixels: _blurred(pixels, 2.0),
    lambda pixels: transforms.autocontrast(_blurred(pixels, 1.0)),
)
