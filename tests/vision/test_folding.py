"""Batch-norms folded into convolutions: the same numbers from fewer layers, and the network stays what it was."""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from app.vision.backbones import BACKBONES, Backbone, build
from app.vision.classifier import Classifier
from app.vision.folding import folded, folded_prefix


def pictures(side: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def norms(module: nn.Module) -> int:
    return sum(isinstance(child, nn.BatchNorm2d) for child in module.modules())


def with_statistics(network: nn.Module) -> None:
    """As if it had been trained: a fresh batch-norm does nothing, so that one that is lost would not be missed."""
    chance = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.running_mean.uniform_(-0.2, 0.2, generator=chance)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0, generator=chance)  # type: ignore[union-attr]
                module.weight.uniform_(0.5, 1.5, generator=chance)
                module.bias.uniform_(-0.2, 0.2, generator=chance)


def trained(name: str) -> Backbone:
    backbone = build(name, seed=0).eval()
    with_statistics(backbone)
    return backbone


# One of each family; densenet and maxvit have batch-norms that stand before anything they could be folded into.
@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("resnet18", 0),
        ("resnext50_32x4d", 0),
        ("mobilenet_v2", 0),
        ("mobilenet_v3_small", 0),
        ("efficientnet_b0", 0),
        ("regnet_y_400mf", 0),
        ("shufflenet_v2_x1_0", 0),
        ("graft_small", 0),
        ("densenet121", 62),
        pytest.param("maxvit_t", 11, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_features_are_the_same_without_batch_norms(name: str, left: int) -> None:
    backbone = trained(name)
    side = BACKBONES[name].fixed_image_size or 64
    expected, had = backbone(pictures(side)), norms(backbone)

    found = folded(backbone)

    assert (norms(found), norms(backbone)) == (left, had)
    torch.testing.assert_close(found(pictures(side)), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert torch.equal(backbone(pictures(side)), expected)


@torch.inference_mode()
def test_networks_without_batch_norm_are_shared() -> None:
    backbone = build("squeezenet1_1", seed=0).eval()

    assert {p.data_ptr() for p in folded(backbone).parameters()} == {p.data_ptr() for p in backbone.parameters()}


@torch.inference_mode()
def test_a_backbone_that_reads_all_layers_reads_all_layers() -> None:
    backbone = trained("graft_small")
    backbone.read("all")
    expected = backbone(pictures(64))

    found = folded(backbone)(pictures(64))

    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", [0, 1, 3, 99])
@torch.inference_mode()
def test_the_frozen_part_is_the_same_whatever_is_frozen(trainable: int) -> None:
    classifier = Classifier.new("mobilenet_v3_small", 2, seed=0)
    with_statistics(classifier)
    classifier.freeze(trainable)
    classifier.train()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}

    prefix = folded_prefix(classifier)

    expected = classifier.frozen_prefix(pictures(64))
    torch.testing.assert_close(prefix(pictures(64)), expected, rtol=1e-4, atol=1e-4)
    assert [stage.training for stage in classifier.backbone.stages][-1] == (trainable > 0)
    after = classifier.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@torch.inference_mode()
def test_the_layout_in_memory_stays() -> None:
    backbone = trained("mobilenet_v2").to(memory_format=torch.channels_last)

    convolutions = [m for m in folded(backbone).modules() if isinstance(m, nn.Conv2d) and m.weight.shape[2] > 1]

    dense = [m for m in convolutions if m.weight.shape[1] > 1]
    assert dense
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in dense)


@torch.inference_mode()
def test_other_threads_go_on_while_one_folds() -> None:
    # torch.fx replaces nn.Module.__call__ for the whole process while it traces.
    backbone = trained("mobilenet_v3_small")
    expected = backbone(pictures(64))
    begun, done = threading.Event(), threading.Event()

    def fold() -> None:
        with torch.inference_mode():
            while not done.is_set():
                folded(backbone)
                begun.set()

    with ThreadPoolExecutor(1) as pool:
        folding = pool.submit(fold)
        try:
            assert begun.wait(60)
            for _ in range(30):
                assert torch.equal(backbone(pictures(64)), expected)
        finally:
            done.set()
        folding.result()


class Chain(nn.Module):
    """A convolution, a norm, and one more thing that reads what is between, or one that is called again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convolution, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        between = self.convolution(images)
        if self.kind == "read twice":
            return self.norm(between) + between
        if self.kind == "read by name":
            return torch.add(self.norm(between), other=between)
        if self.kind == "called twice":
            return self.norm(between) + self.other(self.convolution(images + 1))
        return self.norm(between)


@pytest.mark.parametrize(("kind", "left"), [("plain", 1), ("read twice", 2), ("read by name", 2), ("called twice", 2)])
@torch.inference_mode()
def test_only_what_nothing_else_reads_is_folded(kind: str, left: int) -> None:
    network = Chain(kind).eval()
    with_statistics(network)
    backbone = Backbone("resnet18", OrderedDict(stem=network), feature_width=3, layout="NCHW").eval()
    expected = backbone(pictures(32))

    found = folded(backbone)

    assert norms(found) == left
    torch.testing.assert_close(found(pictures(32)), expected)
