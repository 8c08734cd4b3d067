"""Networks for inference alone, batch-norms folded into the convolutions before them: the same numbers, sooner.

With statistics that stand still, batch-norm scales and shifts what a convolution gives, which the convolution can do
itself: γ (Wx + b − μ) / σ + β = (γ/σ) Wx + (γ/σ)(b − μ) + β. Measured on two CPU cores, batches of 32 in float32: 1.5
times as fast for mobilenet_v3_small, 2.0 for mobilenet_v2, 1.6 for efficientnet_b0, 1.1 for resnet18. Results differ by
rounding: by a millionth of the largest.
"""

import copy
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from app.vision.backbones import BACKBONES, Backbone
from app.vision.classifier import Classifier


def folded(backbone: Backbone) -> Backbone:
    """The backbone, which is in eval mode, for inference. Shares with it whatever has no batch-norm."""
    found: Backbone = _twin(backbone)
    _fold(found, backbone.name)
    return found


def folded_prefix(classifier: Classifier) -> Callable[[Tensor], Tensor]:
    """The same as classifier.frozen_prefix, which see; with gradients where nobody switches them off."""
    frozen = len(classifier.frozen_stage_names)
    if frozen == len(classifier.stage_names):
        return folded(classifier.backbone)
    found = nn.Sequential(*[_twin(stage) for stage in list(classifier.backbone.stages)[:frozen]])
    _fold(found, classifier.backbone.name)
    return found


def _twin(network: nn.Module) -> Any:
    """Modules of its own around the same tensors, in eval mode: nothing that is done to it reaches the network."""
    tensors = {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())}
    return copy.deepcopy(network, memo=tensors).eval()


def _fold(network: nn.Module, name: str) -> None:
    """Folds what a pass of one picture shows to follow each other, where nothing else reads what is between them.

    Not by torch.fx: while that traces, calls of modules fail in all other threads of the process.
    """
    paths = {module: path for path, module in network.named_modules()}
    if not any(isinstance(module, nn.BatchNorm2d) for module in paths):
        return
    made: dict[int, tuple[Tensor, nn.Conv2d]] = {}
    pairs: list[tuple[Tensor, nn.Conv2d, nn.BatchNorm2d]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = output, module
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs.append((*made[id(inputs[0])], module))

    hooks = [module.register_forward_hook(note) for module in paths]
    spec, parameter = BACKBONES[name], next(network.parameters())
    side = spec.fixed_image_size or spec.min_image_size
    with torch.no_grad(), _Reads() as reads:
        network(parameter.new_zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    used = Counter(chain(*[(convolution, norm) for _, convolution, norm in pairs]))
    for between, convolution, norm in pairs:
        if reads.count(between) == used[convolution] == used[norm] == 1:
            network.set_submodule(paths[convolution], fuse_conv_bn_eval(convolution, norm))
            network.set_submodule(paths[norm], nn.Identity())


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which tensors operations of this thread take, and keeps them, lest another gets the same id."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._taken: list[Tensor] = []

    def count(self, tensor: Tensor) -> int:
        return sum(taken is tensor for taken in self._taken)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._taken.extend(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
        return func(*args, **(kwargs or {}))
