"""A model's weights under the names that torchvision's own network has for them, and that network put to use.

torchvision's network takes them as they are where a model has all its stages. One that was cut, or whose head reads
every layer, takes a few lines more; its head lies under names of Graft's.
"""

from collections.abc import Callable, Mapping

import torch
import torchvision.models
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.feature_extraction import create_feature_extractor

from app.vision import backbones, usage
from app.vision.artifact import Artifact
from app.vision.backbones import ALL_LAYERS, BACKBONES, BackboneSpec

# What torchvision's network has no place for.
HEAD_WEIGHT, HEAD_BIAS = "graft.head.weight", "graft.head.bias"

# Nodes, as torchvision's feature extraction calls them, for what a stage has beside torchvision's modules.
_MADE_HERE = {"@token_stem": "encoder.dropout", "@flatten": "flatten"}


def state(model: Artifact) -> dict[str, Tensor]:
    """Copies of the weights by torchvision's names; a backbone alone has no head among them."""
    classifier = model.classifier
    spec = _spec(model)
    network = _network(spec, classifier.class_count)
    backbone = backbones.rewrap(spec.name, network)
    backbone.read(classifier.stage_names[-1])
    backbone.read(classifier.feature_layer)
    backbone.load_state_dict(classifier.backbone.state_dict())  # into the tensors that it shares with the network
    shared = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    named = network.state_dict(keep_vars=True).items()
    found = {name: tensor.detach().clone() for name, tensor in named if id(tensor) in shared}
    if not classifier.class_count:
        return found
    weight, bias = classifier.head.weight.detach().clone(), classifier.head.bias.detach().clone()
    if not _is_whole(model):
        return found | {HEAD_WEIGHT: weight, HEAD_BIAS: bias}
    shape = network.get_submodule(spec.head).get_parameter("weight").shape  # squeezenet's head is a convolution
    return found | {f"{spec.head}.weight": weight.reshape(shape), f"{spec.head}.bias": bias}


def network(model: Artifact, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """What the lines of `lines` build: a function from images, normalised, to logits, or to features."""
    spec = _spec(model)
    made = _network(spec, model.classifier.class_count)
    if _is_whole(model):
        for path, module in _replacements(model, made).items():
            made.set_submodule(path, module)
        made.load_state_dict(dict(tensors), strict=True)
        return made.eval()
    made.set_submodule(spec.head, nn.Identity())
    of_network = {name: tensor for name, tensor in tensors.items() if name not in (HEAD_WEIGHT, HEAD_BIAS)}
    unexpected = made.load_state_dict(of_network, strict=False).unexpected_keys
    assert not unexpected, unexpected
    body = create_feature_extractor(made, _nodes(model)).eval()
    read = model.classifier.backbone

    def outputs(images: Tensor) -> Tensor:
        stages = list(body(images).values())
        features = torch.cat([read.summary(s) for s in stages], 1) if read.reads_all else read.pool(stages[-1])
        return functional.linear(features, tensors[HEAD_WEIGHT], tensors[HEAD_BIAS]) if model.classes else features

    return outputs


def lines(model: Artifact) -> str:
    """The lines of Python that ask the weights about a picture, without Graft."""
    spec = _spec(model)
    count = model.classifier.class_count
    made = f'network = torchvision.models.get_model("{spec.architecture}", weights=None'
    if _is_whole(model):
        made += f", num_classes={count})\n" if count else ")\n"
        for path, module in _replacements(model, _network(spec, count)).items():
            made += f'network.set_submodule("{path}", torch.nn.{module})  # in place of torchvision\'s\n'
        return usage.of_weights(model.outputs, network=made + "network.load_state_dict(tensors)\n")
    nodes, layout = _nodes(model), spec.layout
    made += f""")
network.set_submodule("{spec.head}", torch.nn.Identity())
"""
    if count:
        made += f'weight, bias = tensors.pop("{HEAD_WEIGHT}"), tensors.pop("{HEAD_BIAS}")\n'
    quoted = ", ".join(f'"{node}"' for node in nodes)
    made += f"""network.load_state_dict(tensors, strict=False)  # what is not read is not there
network = create_feature_extractor(network, [{quoted}])
"""
    if model.classifier.backbone.reads_all:
        made += usage.summary(layout)
        features = "torch.cat([summary(stage) for stage in output.values()], 1)"
    else:
        features = f'output["{nodes[-1]}"]'
        features = features if _is_pooled(model) else usage.pooled(layout, features)
    output = f"torch.nn.functional.linear({features}, weight, bias)" if count else features
    return usage.of_weights(model.outputs, network=made, output=output)


def _replacements(model: Artifact, made: nn.Module) -> dict[str, nn.Module]:
    """Modules by path that torchvision's network has otherwise than a model with all its stages."""
    spec, head = _spec(model), model.classifier.head
    found: dict[str, nn.Module] = {}
    if not model.classes:
        found[spec.head] = nn.Identity()
    elif made.get_submodule(spec.head).bias is None:  # maxvit's
        found[spec.head] = nn.Linear(head.in_features, head.out_features)
    if _has_relu_behind_head(spec):
        found["classifier.2"] = nn.Identity()
    return found


def _spec(model: Artifact) -> BackboneSpec:
    return BACKBONES[model.classifier.backbone.name]


def _network(spec: BackboneSpec, class_count: int) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(spec.architecture, weights=None, num_classes=max(class_count, 1))
    return network


def _is_whole(model: Artifact) -> bool:
    return model.classifier.feature_layer == _spec(model).stage_names[-1]


def _has_relu_behind_head(spec: BackboneSpec) -> bool:
    return spec.architecture.startswith("squeezenet")


def _is_pooled(model: Artifact) -> bool:
    """Whether the last stage that is read has no space left, as vgg16's linear layers have none."""
    notation = _spec(model).stages[model.classifier.feature_layer]
    return "@flatten" in notation or notation.startswith("classifier")


def _nodes(model: Artifact) -> list[str]:
    """Of the stages whose output the head reads, in order."""
    spec = _spec(model)
    layer = model.classifier.feature_layer
    if layer != ALL_LAYERS:
        return [_node(spec, layer)]
    # The backbone's last stage's output is what the head would be given, and the head is an Identity.
    last = "flatten" if _has_relu_behind_head(spec) else spec.head
    stages = model.classifier.stage_names
    return [last if stage == spec.stage_names[-1] else _node(spec, stage) for stage in stages]


def _node(spec: BackboneSpec, stage: str) -> str:
    """The node that gives the output of a stage which is not the last."""
    word = spec.stages[stage].split()[-1]
    if word in _MADE_HERE:
        return _MADE_HERE[word]
    parent, _, last = word.rpartition(".")
    if not last[0].isdigit():
        return word
    # In a Sequential a child need not be called by its number: ViT has encoder_layer_2.
    children = [name for name, _ in backbones.hollow(spec.name).get_submodule(parent).named_children()]
    return f"{parent}.{children[int(last.rpartition('-')[2])]}"
