"""The table of backbones, and how each of torchvision's networks is cut into named stages.

Knows architectures and what is published about their weights; not where weight files lie (that is weights.py).
A stage is what `unfreeze` counts and what `feature_layer` names; the stages in order, composed, are torchvision's own
forward up to its last linear layer.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torchvision.models
from torch import Tensor, nn

from app.errors import FieldError, InvalidRequest, WeightsUnavailable
from app.vision.preprocessing import Preprocessing

Layout = Literal["NCHW", "NHWC", "tokens"]
Family = Literal["cnn", "transformer"]

# torchvision publishes no licence per weight file. Its code is BSD-3-Clause; the files are derived from ImageNet-1k.
WEIGHTS_LICENSE = (
    "Published by torchvision, whose code is BSD-3-Clause, without a licence of their own; trained on ImageNet-1k, "
    "whose images are provided for non-commercial research. Check whether your use is covered."
)

# torchvision's other sets are left out: SWAG has its own non-commercial licence, FEATURES has no classifier.
_WEIGHTS_NAMES = ("IMAGENET1K_V2", "IMAGENET1K_V1")


@dataclass(frozen=True)
class WeightsSpec:
    """One published set of weights, with what is needed to use it."""

    backbone: str
    name: str  # torchvision's, such as IMAGENET1K_V2
    file: str  # its name ends in the first digits of its sha256, unless it is bundled
    top1: float | None  # accuracy on ImageNet-1k as published, 0..1
    preprocessing: Preprocessing
    license: str
    is_bundled: bool = False  # comes with Graft, in `BUNDLED`


@dataclass(frozen=True)
class BackboneSpec:
    """One backbone. weights: best for fine-tuning first."""

    name: str  # torchvision's, but for graft_small
    architecture: str  # torchvision's name of the network
    stages: Mapping[str, str]  # stage name -> modules in order, in the notation of `_modules`
    head: str  # path of the last linear layer, which is not part of the backbone
    layout: Layout
    family: Family  # how it likes to be optimised: "transformer" wants AdamW and a small learning rate
    parameters: int  # of torchvision's network with its 1000 classes
    gflops: float  # multiply-adds of one forward pass at the first weights' crop, in 10^9
    min_image_size: int
    fixed_image_size: int | None  # where the network accepts one size only
    weights: tuple[WeightsSpec, ...]

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(self.stages)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.weights[0].preprocessing

    @property
    def license(self) -> str:
        return self.weights[0].license


# What a head reads that reads every stage.
ALL_LAYERS = "all"


class Backbone(nn.Module):
    """A network without its head: named stages in order.

    `forward` gives the pooled features of the last stage, or with `reads_all` a summary of every stage's output.
    """

    def __init__(self, name: str, stages: "OrderedDict[str, nn.Module]", *, feature_width: int, layout: Layout) -> None:
        super().__init__()
        self.name = name
        self.stages = nn.Sequential(stages)
        self.feature_width = feature_width
        self.layout = layout
        self.reads_all = False

    @property
    def stage_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.stages.named_children())

    def forward(self, images: Tensor) -> Tensor:
        """images: float32 (N, 3, S, S), normalised. Returns (N, feature_width)."""
        if not self.reads_all:
            features: Tensor = self.stages(images)
            return self.pool(features)
        summaries, activations = [], images
        for stage in self.stages:
            activations = stage(activations)
            summaries.append(self.summary(activations))
        return torch.cat(summaries, dim=1)

    def pool(self, activations: Tensor) -> Tensor:
        """The output of any stage averaged over space: (N, D). The last stage's is pooled already."""
        if activations.ndim == 2:
            return activations
        if self.layout == "tokens":
            return activations[:, 1:].mean(1)  # without the class token, which only the last stage speaks through
        return activations.mean((2, 3) if self.layout == "NCHW" else (1, 2))

    def summary(self, activations: Tensor) -> Tensor:
        """Means and standard deviations over space: (N, 2 D), or (N, D) where the stage has pooled already."""
        if activations.ndim == 2:
            return activations
        if self.layout == "tokens":
            activations = activations[:, 1:]
        over = {"tokens": (1,), "NCHW": (2, 3), "NHWC": (1, 2)}[self.layout]
        # The root has no gradient at 0, which is where a map is flat.
        deviations = activations.var(over, correction=0).add(1e-8).sqrt()
        return torch.cat([activations.mean(over), deviations], dim=1)

    def read(self, layer: str) -> None:
        """Lets `forward` give the pooled output of this stage, and drops those behind it; or with ALL_LAYERS, of all.

        Early stages know textures and edges that a network trained for another purpose has lost at its end; a linear
        head on all of them chooses (Evci et al. 2022).
        """
        reads_all = layer == ALL_LAYERS
        kept = len(self.stages) if reads_all else self.stage_names.index(layer) + 1
        if (kept, reads_all) == (len(self.stages), self.reads_all):
            return
        self.stages, self.reads_all = self.stages[:kept], reads_all
        parameter = next(self.parameters())
        side = BACKBONES[self.name].fixed_image_size or BACKBONES[self.name].min_image_size
        was_training = self.training
        with torch.no_grad():
            self.feature_width = self.eval()(parameter.new_zeros(1, 3, side, side)).shape[1]
        self.train(was_training)


class Choice(NamedTuple):
    name: str
    reason: str


def weights_digest(described: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> str:
    """The same for the same weights, whatever made them. described: what else their features depend on."""
    digest = hashlib.sha256(repr(described).encode())
    for name, tensor in tensors.items():
        # Batch-norm counts its steps, which changes nothing of what it does.
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def find(name: str) -> BackboneSpec:
    """The backbone of this name or short name. Raises InvalidRequest."""
    spec = BACKBONES.get(ALIASES.get(name, name))
    if spec is None:
        raise InvalidRequest(
            f"There is no backbone of this name; there are: {', '.join(BACKBONES)}.",
            errors=[FieldError("#/backbone", "no such backbone; GET /v1/backbones lists them")],
        )
    return spec


def build(name: str, state_dict: Mapping[str, Tensor] | None = None, *, seed: int = 0) -> Backbone:
    """The backbone with torchvision's random initialisation from `seed`, or with a torchvision state dict.

    state_dict: of torchvision's whole network, its 1000-class head included, and loaded strictly.
    Raises WeightsUnavailable if it does not fit.
    """
    if state_dict is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return rewrap(name, torchvision.models.get_model(BACKBONES[name].architecture, weights=None))
    network = hollow(name)
    try:
        # assign: the network has no memory of its own yet. Initialising vgg16 only to overwrite it takes seconds.
        network.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        raise WeightsUnavailable(
            f"The weight file for {name} does not hold torchvision's {name} (other names or shapes inside); replace it."
        ) from error
    return rewrap(name, network)


def hollow(name: str) -> nn.Module:
    """torchvision's network to be filled by `load_state_dict(..., assign=True)`: mostly without memory of its own."""
    # RegNet's constructor computes its widths with tensors, which needs a real device.
    device = "cpu" if name.startswith("regnet") else "meta"
    with torch.random.fork_rng(devices=[]), torch.device(device):
        network: nn.Module = torchvision.models.get_model(BACKBONES[name].architecture, weights=None)
        return network


def rewrap(name: str, network: nn.Module) -> Backbone:
    """The stages of one of torchvision's networks; the modules are shared with it, not copied."""
    spec = BACKBONES[name]
    stages: OrderedDict[str, nn.Module] = OrderedDict(
        (stage, nn.Sequential(*_modules(network, notation))) for stage, notation in spec.stages.items()
    )
    head = network.get_submodule(spec.head)
    width = head.in_channels if isinstance(head, nn.Conv2d) else head.in_features
    assert isinstance(width, int), spec.head
    return Backbone(name, stages, feature_width=width, layout=spec.layout)


def choose(available: Collection[str], device_type: str) -> Choice:
    """What `backbone: auto` means, given the backbones whose weights can be had.

    device_type: "cpu", "cuda" or "mps". Raises WeightsUnavailable if there are none.
    """
    on_cpu = device_type == "cpu"
    order = _CPU_ORDER if on_cpu else _GPU_ORDER
    chosen = next((name for name in order if name in available), None)
    if chosen is None:
        raise WeightsUnavailable(
            "There are no pretrained weights here, and none can be downloaded. Put a weight file into "
            'GRAFT_WEIGHTS_DIR, allow downloads (GRAFT_ALLOW_DOWNLOADS), or use "method": "from_scratch".'
        )
    kind = "a CPU, where small networks train in minutes" if on_cpu else "a GPU"
    if chosen == GRAFT_SMALL:
        return Choice(
            chosen,
            f"backbone {chosen}: it comes with Graft; of those trained on photographs none is on this machine or can "
            "be downloaded. Put a weight file into GRAFT_WEIGHTS_DIR for a better start.",
        )
    if chosen == order[0]:
        return Choice(chosen, f"backbone {chosen}: the first choice on {kind}.")
    return Choice(
        chosen,
        f"backbone {chosen}: the best on {kind} of those whose weights can be had here; {order[0]} would be preferred, "
        "but its weights are neither on this machine nor downloadable.",
    )


def _modules(network: nn.Module, notation: str) -> list[nn.Module]:
    """Modules named by paths: "layer1", "features.4-6" (a range in a Sequential), "@flatten" (made here)."""
    modules: list[nn.Module] = []
    for word in notation.split():
        if word.startswith("@"):
            modules.append(_MADE_HERE[word](network))
            continue
        parent, _, last = word.rpartition(".")
        first, _, end = last.partition("-")
        if first.isdigit():
            children = list(network.get_submodule(parent).children())
            modules += children[int(first) : int(end or first) + 1]
        else:
            modules.append(network.get_submodule(word))
    return modules


class GlobalAverage(nn.Module):
    def forward(self, activations: Tensor) -> Tensor:
        return activations.mean((2, 3))


class _TokenStem(nn.Module):
    """What VisionTransformer.forward and Encoder.forward do before the first layer."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.projection: nn.Module = network.conv_proj
        self.class_token: nn.Parameter = network.class_token
        self.position_embedding: nn.Parameter = network.encoder.pos_embedding
        self.dropout: nn.Module = network.encoder.dropout

    def forward(self, images: Tensor) -> Tensor:
        """images: (N, 3, 224, 224). Returns (N, 1 + patches, D)."""
        patches = self.projection(images).flatten(2).transpose(1, 2)
        count = images.shape[0]  # len() would write one batch size into an exported graph
        tokens = torch.cat([self.class_token.expand(count, -1, -1), patches], dim=1)
        embedded: Tensor = self.dropout(tokens + self.position_embedding)
        return embedded


class ClassToken(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]


# What torchvision's forward methods do between modules, as modules.
_MADE_HERE: dict[str, Callable[[nn.Module], nn.Module]] = {
    "@relu": lambda _: nn.ReLU(inplace=True),
    "@average": lambda _: GlobalAverage(),
    "@flatten": lambda _: nn.Flatten(1),
    "@token_stem": _TokenStem,
    "@class_token": lambda _: ClassToken(),
}


class _Cut(NamedTuple):
    """How a family of networks is cut. Stages begin where the resolution is halved, as far as there is a choice.

    Layers between the pooled features and the last linear one belong to the last stage, so that unfreezing one stage
    always trains convolutions or attention too.
    """

    stages: Mapping[str, str]
    head: str
    layout: Layout = "NCHW"
    family: Family = "cnn"
    min_image_size: int = 32
    fixed_image_size: int | None = None


_RESNET = _Cut(
    {
        "stem": "conv1 bn1 relu maxpool",
        "layer1": "layer1",
        "layer2": "layer2",
        "layer3": "layer3",
        "layer4": "layer4 avgpool @flatten",
    },
    head="fc",
)

_MOBILENET_V2 = _Cut(
    {
        "stem": "features.0-1",
        "stage1": "features.2-3",
        "stage2": "features.4-6",
        "stage3": "features.7-13",
        "stage4": "features.14-18 @average classifier.0",
    },
    head="classifier.1",
)

_MOBILENET_V3_SMALL = _Cut(
    {
        "stem": "features.0",
        "stage1": "features.1",
        "stage2": "features.2-3",
        "stage3": "features.4-8",
        "stage4": "features.9-12 avgpool @flatten classifier.0-2",
    },
    head="classifier.3",
)

_MOBILENET_V3_LARGE = _Cut(
    {
        "stem": "features.0-1",
        "stage1": "features.2-3",
        "stage2": "features.4-6",
        "stage3": "features.7-12",
        "stage4": "features.13-16 avgpool @flatten classifier.0-2",
    },
    head="classifier.3",
)

_EFFICIENTNET = _Cut(
    {
        "stem": "features.0",
        **{f"stage{i}": f"features.{i}" for i in range(1, 7)},
        "stage7": "features.7-8 avgpool @flatten classifier.0",
    },
    head="classifier.1",
)

_EFFICIENTNET_V2 = _Cut(
    {
        "stem": "features.0",
        **{f"stage{i}": f"features.{i}" for i in range(1, 6)},
        "stage6": "features.6-7 avgpool @flatten classifier.0",
    },
    head="classifier.1",
    min_image_size=33,
)

_CONVNEXT = _Cut(
    {
        "stem": "features.0",
        "stage1": "features.1",
        "stage2": "features.2-3",
        "stage3": "features.4-5",
        "stage4": "features.6-7 avgpool classifier.0-1",
    },
    head="classifier.2",
    family="transformer",  # a convolutional network, but made to be trained as transformers are
)

_REGNET = _Cut(
    {
        "stem": "stem",
        "block1": "trunk_output.block1",
        "block2": "trunk_output.block2",
        "block3": "trunk_output.block3",
        "block4": "trunk_output.block4 avgpool @flatten",
    },
    head="fc",
)

_DENSENET = _Cut(
    {
        "stem": "features.conv0 features.norm0 features.relu0 features.pool0",
        "block1": "features.denseblock1 features.transition1",
        "block2": "features.denseblock2 features.transition2",
        "block3": "features.denseblock3 features.transition3",
        "block4": "features.denseblock4 features.norm5 @relu @average",
    },
    head="classifier",
)

# Its own head is a convolution whose ReLU comes before the pooling; Graft's is a linear layer behind it.
_SQUEEZENET = _Cut(
    {
        "stem": "features.0-1",
        "stage1": "features.2-4",
        "stage2": "features.5-7",
        "stage3": "features.8-12 @average classifier.0",
    },
    head="classifier.1",
)

_SHUFFLENET = _Cut(
    {
        "stem": "conv1 maxpool",
        "stage2": "stage2",
        "stage3": "stage3",
        "stage4": "stage4 conv5 @average",
    },
    head="fc",
)

_VGG16 = _Cut(
    {
        "block1": "features.0-4",
        "block2": "features.5-9",
        "block3": "features.10-16",
        "block4": "features.17-23",
        "block5": "features.24-30 avgpool @flatten",
        "fc6": "classifier.0-2",
        "fc7": "classifier.3-5",
    },
    head="classifier.6",
)

_VIT = _Cut(
    {
        "stem": "@token_stem",
        "stage1": "encoder.layers.0-2",
        "stage2": "encoder.layers.3-5",
        "stage3": "encoder.layers.6-8",
        "stage4": "encoder.layers.9-11 encoder.ln @class_token",
    },
    head="heads.head",
    layout="tokens",
    family="transformer",
    min_image_size=224,
    fixed_image_size=224,
)

_SWIN = _Cut(
    {
        "stem": "features.0",
        "stage1": "features.1",
        "stage2": "features.2-3",
        "stage3": "features.4-5",
        "stage4": "features.6-7 norm permute avgpool flatten",
    },
    head="head",
    layout="NHWC",
    family="transformer",
)

_MAXVIT = _Cut(
    {
        "stem": "stem",
        "block1": "blocks.0",
        "block2": "blocks.1",
        "block3": "blocks.2",
        "block4": "blocks.3 classifier.0-4",
    },
    head="classifier.5",
    family="transformer",
    min_image_size=224,
    fixed_image_size=224,
)

_CUTS: dict[str, _Cut] = {
    "resnet18": _RESNET,
    "resnet34": _RESNET,
    "resnet50": _RESNET,
    "resnet101": _RESNET,
    "resnext50_32x4d": _RESNET,
    "wide_resnet50_2": _RESNET,
    "mobilenet_v2": _MOBILENET_V2,
    "mobilenet_v3_small": _MOBILENET_V3_SMALL,
    "mobilenet_v3_large": _MOBILENET_V3_LARGE,
    "efficientnet_b0": _EFFICIENTNET,
    "efficientnet_b1": _EFFICIENTNET,
    "efficientnet_b2": _EFFICIENTNET,
    "efficientnet_b3": _EFFICIENTNET,
    "efficientnet_b4": _EFFICIENTNET,
    "efficientnet_v2_s": _EFFICIENTNET_V2,
    "convnext_tiny": _CONVNEXT,
    "convnext_small": _CONVNEXT,
    "regnet_y_400mf": _REGNET,
    "regnet_y_800mf": _REGNET,
    "regnet_y_3_2gf": _REGNET,
    "densenet121": _DENSENET,
    "squeezenet1_1": _SQUEEZENET,
    "shufflenet_v2_x1_0": _SHUFFLENET,
    "vgg16": _VGG16,
    "vit_b_16": _VIT,
    "swin_t": _SWIN,
    "swin_v2_t": _SWIN,
    "maxvit_t": _MAXVIT,
}

ALIASES = {"resnext50": "resnext50_32x4d", "wide_resnet50": "wide_resnet50_2"}

# `backbone: auto`, by judgement, not yet by measurement. On a GPU: the textbook's network first, then newer ones of its
# cost. On a CPU what counts is multiply-adds, of which mobilenet_v3_small needs a fifth of mobilenet_v2's. The rest
# follows in order of published accuracy, or of multiply-adds.
_GPU_FIRST = ("resnet50", "convnext_tiny", "regnet_y_3_2gf", "swin_t", "efficientnet_v2_s")
_CPU_FIRST = ("mobilenet_v3_large", "mobilenet_v3_small", "mobilenet_v2", "efficientnet_b0", "resnet18")


def _spec(name: str, cut: _Cut) -> BackboneSpec:
    published = {w.name: w for w in torchvision.models.get_model_weights(name)}
    weights = [published[n] for n in _WEIGHTS_NAMES if n in published]
    return BackboneSpec(
        name=name,
        architecture=name,
        stages=cut.stages,
        head=cut.head,
        layout=cut.layout,
        family=cut.family,
        parameters=weights[0].meta["num_params"],
        gflops=weights[0].meta["_ops"],
        min_image_size=cut.min_image_size,
        fixed_image_size=cut.fixed_image_size,
        weights=tuple(_weights_spec(name, w) for w in weights),
    )


def _weights_spec(backbone: str, weights: Any) -> WeightsSpec:
    """weights: a member of one of torchvision's Weights enumerations; reading it needs no network."""
    transform = weights.transforms()
    return WeightsSpec(
        backbone=backbone,
        name=weights.name,
        file=weights.url.rpartition("/")[2],
        top1=round(weights.meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100, 5),
        preprocessing=Preprocessing(
            resize=transform.resize_size[0],
            crop=transform.crop_size[0],
            mean=tuple(transform.mean),
            std=tuple(transform.std),
            interpolation=transform.interpolation.value,
        ),
        license=WEIGHTS_LICENSE,
    )


def _graft_small() -> BackboneSpec:
    """Graft's own: torchvision's mobilenet_v3_small, trained on images by formula (worker/pretraining/scenes.py)."""
    cut, architecture = _MOBILENET_V3_SMALL, "mobilenet_v3_small"
    imagenet = _spec(architecture, cut)
    weights = WeightsSpec(
        backbone=GRAFT_SMALL,
        name="FORMULA_V2",
        file=f"{GRAFT_SMALL}.safetensors",
        top1=None,
        preprocessing=replace(imagenet.preprocessing, resize=183, crop=160),
        license="Graft's own, under Graft's licence; made from images that Graft generates, and from nothing else.",
        is_bundled=True,
    )
    return replace(imagenet, name=GRAFT_SMALL, gflops=imagenet.gflops * (160 / 224) ** 2, weights=(weights,))


GRAFT_SMALL = "graft_small"
BUNDLED = Path(__file__).parent / "bundled"  # the folder of weight files that come with Graft
BACKBONES: dict[str, BackboneSpec] = {name: _spec(name, cut) for name, cut in _CUTS.items()}
BACKBONES[GRAFT_SMALL] = _graft_small()


def _first_then(first: tuple[str, ...], cost: Callable[[BackboneSpec], float]) -> tuple[str, ...]:
    rest = set(BACKBONES) - {*first, GRAFT_SMALL}
    return (*first, *sorted(rest, key=lambda name: (cost(BACKBONES[name]), name)), GRAFT_SMALL)


_GPU_ORDER = _first_then(_GPU_FIRST, lambda spec: -(spec.weights[0].top1 or 0.0))
_CPU_ORDER = _first_then(_CPU_FIRST, lambda spec: spec.gflops)
