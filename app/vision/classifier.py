"""Classifier = backbone + head: what is trained, saved, loaded and served.

Knows tensors; not files, not jobs.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from app.errors import FieldError, InvalidHyperparameter
from app.vision import backbones
from app.vision.backbones import Backbone


class ParameterGroups(NamedTuple):
    """Trainable parameters, by the learning rate they get. backbone: empty when all of it is frozen."""

    head: list[nn.Parameter]
    backbone: list[nn.Parameter]


class Classifier(nn.Module):
    """A backbone, possibly cut behind its `feature_layer`, and a linear head on its pooled features.

    feature_layer: a stage, or ALL_LAYERS for a head that reads every stage; then the whole backbone is to be frozen.
    """

    def __init__(self, backbone: Backbone, head: nn.Linear, *, feature_layer: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.feature_layer = feature_layer
        self._frozen_stages = 0
        self._keeps_statistics = False

    @classmethod
    def new(
        cls,
        backbone_name: str,
        class_count: int,
        *,
        feature_layer: str | None = None,
        seed: int,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """A classifier with a fresh head, every parameter trainable.

        feature_layer: the last stage that is kept; None keeps all. seed: for the head, and for the backbone where
        state_dict (of torchvision's whole network) is None.
        Raises InvalidHyperparameter for an unknown feature_layer, WeightsUnavailable for a state dict that is not
        this backbone's.
        """
        backbone = backbones.build(backbones.find(backbone_name).name, state_dict, seed=seed)
        return cls._with_new_head(backbone, class_count, feature_layer, seed)

    @classmethod
    def from_earlier(
        cls, earlier: "Classifier", class_count: int, *, feature_layer: str | None = None, seed: int
    ) -> Self:
        """A fresh head on the backbone of an earlier classifier, which is taken over and not to be used any more.

        Raises InvalidHyperparameter for a feature_layer that the earlier one does not have (it may have been cut).
        """
        earlier.freeze(len(earlier.stage_names))
        return cls._with_new_head(earlier.backbone, class_count, feature_layer, seed)

    @classmethod
    def hollow(cls, backbone_name: str, class_count: int, *, feature_layer: str, last_stage: str | None = None) -> Self:
        """The shape of a classifier, to be filled by `load_state_dict(..., assign=True)`.

        last_stage: that there is, where all layers of a backbone are read that had been cut before; None: its last.
        """
        backbone = backbones.rewrap(backbone_name, backbones.hollow(backbone_name))
        if last_stage is not None:
            backbone.read(last_stage)
        backbone.read(feature_layer)
        return cls(backbone, _hollow_head(backbone.feature_width, class_count), feature_layer=feature_layer)

    @classmethod
    def _with_new_head(cls, backbone: Backbone, class_count: int, feature_layer: str | None, seed: int) -> Self:
        stages = backbone.stage_names
        layer = feature_layer or stages[-1]
        if layer not in (*stages, backbones.ALL_LAYERS):
            detail = f"must be one of {backbone.name}'s layers: {', '.join(stages)}, or {backbones.ALL_LAYERS}"
            raise InvalidHyperparameter(
                f"feature_layer {detail}.", errors=[FieldError("#/hyperparameters/feature_layer", detail)]
            )
        backbone.read(layer)
        return cls(backbone, _new_head(backbone.feature_width, class_count, seed), feature_layer=layer)

    @property
    def stage_names(self) -> tuple[str, ...]:
        return self.backbone.stage_names

    @property
    def class_count(self) -> int:
        return self.head.out_features

    @property
    def frozen_stage_names(self) -> tuple[str, ...]:
        return self.stage_names[: self._frozen_stages]

    def frozen_state(self) -> dict[str, Tensor]:
        """Parameters and buffers of the frozen stages."""
        state = self.backbone.stages[: self._frozen_stages].state_dict()
        return {name: state[name] for name in sorted(state)}

    def freeze(self, trainable_stages: int) -> None:
        """Leaves the last `trainable_stages` stages and the head trainable; 0 freezes the whole backbone.

        Frozen stages stay in eval mode whatever `train` is called with: their batch-norm statistics must not move.
        """
        stages = list(self.backbone.stages)
        self._frozen_stages = max(len(stages) - trainable_stages, 0)
        for index, stage in enumerate(stages):
            stage.requires_grad_(index >= self._frozen_stages)
        self.train(self.training)

    def keep_statistics(self) -> None:
        """Leaves every batch-norm with the statistics it has, though its scale and shift may be trained."""
        self._keeps_statistics = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        # Not super's way, through all modules: most are frozen, and an epoch of a head alone is shorter than that.
        self.training = self.backbone.training = self.backbone.stages.training = mode
        self.head.train(mode)
        for index, stage in enumerate(self.backbone.stages):
            if index >= self._frozen_stages:
                stage.train(mode)
            elif stage.training:
                stage.eval()
        if mode and self._keeps_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 (N, 3, S, S), normalised. Returns logits (N, C)."""
        logits: Tensor = self.head(self.backbone(images))
        return logits

    def frozen_prefix(self, images: Tensor) -> Tensor:
        """What the frozen stages make of images; the same every epoch, so it may be computed once and kept.

        Returns the images themselves if nothing is frozen, and features (N, D) if all of the backbone is.
        """
        with torch.no_grad():
            if self._frozen_stages == len(self.backbone.stages):
                return self.features(images)
            activations = images
            for stage in list(self.backbone.stages)[: self._frozen_stages]:
                activations = stage(activations)
            return activations

    def trainable_suffix(self, activations: Tensor) -> Tensor:
        """Logits (N, C) from the output of `frozen_prefix`: together they are `forward`."""
        if self._frozen_stages < len(self.backbone.stages):
            for stage in list(self.backbone.stages)[self._frozen_stages :]:
                activations = stage(activations)
            activations = self.backbone.pool(activations)
        logits: Tensor = self.head(activations)
        return logits

    def features(self, images: Tensor, layer: str | None = None) -> Tensor:
        """The output of a stage averaged over space: (N, D). None is what the head sees.

        Raises ValueError for a layer that is not in `stage_names`.
        """
        if layer is None:
            features: Tensor = self.backbone(images)
            return features
        activations = images
        for stage in list(self.backbone.stages)[: self.stage_names.index(layer) + 1]:
            activations = stage(activations)
        return self.backbone.pool(activations)

    def parameter_groups(self) -> ParameterGroups:
        """Only what is trainable."""
        return ParameterGroups(
            head=[p for p in self.head.parameters() if p.requires_grad],
            backbone=[p for p in self.backbone.parameters() if p.requires_grad],
        )


def _hollow_head(feature_width: int, class_count: int) -> nn.Linear:
    """Without memory of its own. class_count: 0 for a backbone alone, which tells no classes apart."""
    with torch.device("meta"):
        head = nn.Linear(feature_width, max(class_count, 1))
    if class_count == 0:  # made so, since nn.Linear warns of a weight without elements
        head.out_features = 0
        head.weight, head.bias = nn.Parameter(head.weight[:0].detach()), nn.Parameter(head.bias[:0].detach())
    return head


def _new_head(feature_width: int, class_count: int, seed: int) -> nn.Linear:
    """A linear layer with PyTorch's usual uniform weights, drawn from `seed` alone, and no bias yet.

    Zero bias: every class starts equally likely.
    """
    head = _hollow_head(feature_width, class_count)
    bound = feature_width**-0.5
    weight = torch.empty(class_count, feature_width).uniform_(
        -bound, bound, generator=torch.Generator().manual_seed(seed)
    )
    head.load_state_dict({"weight": weight, "bias": torch.zeros(class_count)}, assign=True)
    return head
