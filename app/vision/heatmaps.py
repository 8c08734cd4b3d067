"""Where in a picture a network saw what it said: a heat map of the evidence for one class, and its drawing as a PNG.

Knows backbones, pixels and gradients; not heads, models or HTTP. docs/trust.md says what the maps mean and what not.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.vision_transformer import EncoderBlock

from app.vision.backbones import Backbone, ClassToken, GlobalAverage, Layout
from app.vision.images import Pixels
from app.vision.preprocessing import Preprocessing

# To measure what a cell sees: tells its middle to a few pixels.
_NOISE_IMAGES = 2
# Of the longer side of a drawing: a strip that is 100 times as long as high must not become megabytes.
MAX_SIDE = 1024
# How much of the picture the strongest heat covers, and white the parts that the network does not see.
_STRONGEST, _UNSEEN = 0.8, 0.6
# From cold to hot, growing in lightness, so that it reads in grey and for the colour-blind too.
_COLOURS = np.array(
    [(13, 8, 135), (84, 2, 163), (139, 10, 165), (185, 50, 137), (219, 92, 104), (244, 136, 73), (254, 188, 43)]
)

Heat = NDArray[np.float32]
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeatMaps:
    """Of one backbone, in eval mode, for its input size."""

    backbone: Backbone
    side: int  # of its input, in pixels

    def evidence(self, image: Tensor, score: Score) -> Heat:
        """How much each place of the image speaks for the score: float32 (S, S), 1 where most, 0 for nothing.

        image: float32 (1, 3, S, S), normalised, on the backbone's device. score: what is to be explained, one number
        made of the features (1, D), differentiable.

        Where the features are averages of a map, a place's evidence is its activations times the score's gradient,
        summed over channels. Behind an average the gradient is the same everywhere, so for a linear head this is the
        class activation map (Zhou et al. 2016), and with layers in between Grad-CAM (Selvaraju et al. 2017); where each
        place has a weight of its own, as in VGG, it keeps it (HiResCAM; Draelos and Carin 2020). A vision transformer's
        class token is no average: there, attention is followed back through the layers, each head weighted by its
        gradient (Chefer et al. 2021). What speaks against the score is left out.
        """
        with torch.enable_grad():
            if _reads_class_token(self.backbone):
                maps, displacements = _attention(self.backbone, image, score), [(0, 0)]
            else:
                maps, displacements = _activations(self.backbone, image, score), self._displacements
        enlarged = [_enlarged(each, self.side, moved) for each, moved in zip(maps, displacements, strict=True)]
        positive = torch.stack(enlarged).sum(0).clamp(min=0).float().cpu().numpy()
        return np.asarray(positive / max(float(positive.max()), np.finfo(np.float32).tiny), dtype=np.float32)

    @cached_property
    def _displacements(self) -> list[tuple[int, int]]:
        """Of each map: how far below and right of its place lies the middle of what a cell sees, in pixels.

        Padded convolutions that halve the resolution look half a pixel up and left each, which adds up to half a cell
        of the last map, and weights from elsewhere may look further. So it is measured, as the centroid of the middle
        cell's effective receptive field on noise (Luo et al. 2016).
        """
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(_NOISE_IMAGES, 3, self.side, self.side, generator=random)
        noise = noise.to(next(self.backbone.parameters()).device).requires_grad_()
        cells: list[tuple[Tensor, float]] = []

        def take(activations: Tensor, layout: Layout) -> Tensor:
            mixed = activations * torch.randn(activations.shape, generator=random).to(activations.device)
            map_ = _as_map(mixed, layout)
            middle = map_.shape[2] // 2
            cells.append((map_[:, 0, middle, middle].sum(), (middle + 0.5) * self.side / map_.shape[2] - 0.5))
            return activations

        with torch.enable_grad():
            _features(self.backbone, noise, take)
        found = []
        for value, place in cells:
            (gradient,) = torch.autograd.grad(value, noise, retain_graph=True)
            energy = gradient.square().sum((0, 1)).double().cpu()
            if not 0 < float(energy.sum()) < math.inf:  # a dead cell, as training that went wrong leaves them
                found.append((0, 0))
                continue
            along = torch.arange(self.side, dtype=torch.float64)
            down, right = (float(energy.sum(axis) @ along / energy.sum()) - place for axis in (1, 0))
            found.append((round(down), round(right)))
        return found


def log_odds(logits: Tensor, label: int) -> Tensor:
    """log p / (1 - p) of a label, from logits (1, C), C > 1: what speaks for it and not for the others as well."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1)
    return (logits[:, label] - others.logsumexp(1)).sum()


def drawn(pixels: Pixels, heat: Heat, preprocessing: Preprocessing) -> bytes:
    """A PNG: the picture in grey, the heat over it in colours, and what lies beside the network's crop whitened.

    pixels: uint8 (H, W, 3), upright, as decoded. heat: (S, S), S being the crop. The PNG keeps the picture's ratio.
    """
    frame = _frame(pixels.shape[1], pixels.shape[0], preprocessing.resize)
    grey = Image.fromarray(pixels).convert("L").resize(frame.size, Image.Resampling.BILINEAR)
    canvas = np.asarray(grey.convert("RGB"), dtype=np.float32)
    hot, seen = frame.placed(heat), frame.placed(np.ones_like(heat))
    steps = np.arange(len(_COLOURS)) / (len(_COLOURS) - 1)
    colours = np.stack([np.interp(hot, steps, channel) for channel in _COLOURS.T], axis=2).astype(np.float32)
    canvas = _mixed(canvas, colours, _STRONGEST * hot)
    canvas = _mixed(canvas, np.full_like(canvas, 255), _UNSEEN * (1 - seen))
    encoded = io.BytesIO()
    Image.fromarray(canvas.round().astype(np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


# Evidence


def _activations(backbone: Backbone, image: Tensor, score: Score) -> list[Tensor]:
    """Activations times their gradients, for the maps that the features are averages of: each (1, 1, H, W).

    A head that reads all stages reads several; each counts by what is read of itself. Means and standard deviations
    grow in proportion to what they are taken of, so that the evidence of all places sums to that of the features.
    """
    leaves: list[Tensor] = []
    layouts: list[Layout] = []

    def take(activations: Tensor, layout: Layout) -> Tensor:
        leaves.append(activations.detach().clone().requires_grad_())
        layouts.append(layout)
        return leaves[-1]

    gradients = torch.autograd.grad(score(_features(backbone, image, take)), leaves)
    found = zip(leaves, gradients, layouts, strict=True)
    return [_as_map(values.detach() * gradient, layout) for values, gradient, layout in found]


def _features(backbone: Backbone, image: Tensor, take: Callable[[Tensor, Layout], Tensor]) -> Tensor:
    """What `Backbone.forward` gives, of what `take` makes of each map that is averaged."""
    pooling = _last_pooling(backbone)
    read: list[Tensor] = []
    activations = image
    for stage in backbone.stages:
        for module in stage.children():
            if module is pooling:
                activations = take(activations, "NCHW")
            activations = module(activations)
        if backbone.reads_all or stage is backbone.stages[-1]:
            taken = take(activations, backbone.layout) if activations.ndim > 2 else activations
            read.append(backbone.summary(taken) if backbone.reads_all else backbone.pool(taken))
    return torch.cat(read, dim=1)


def _last_pooling(backbone: Backbone) -> nn.Module | None:
    modules = [module for stage in backbone.stages for module in stage.children()]
    return next((m for m in reversed(modules) if isinstance(m, nn.AdaptiveAvgPool2d | GlobalAverage)), None)


def _as_map(values: Tensor, layout: Layout) -> Tensor:
    """(N, 1, H, W), summed over channels, and without the class token, which has no place."""
    if layout == "tokens":
        return _square(values[:, 1:].sum(2))
    return values.sum(1 if layout == "NCHW" else 3).unsqueeze(1)


def _attention(backbone: Backbone, image: Tensor, score: Score) -> list[Tensor]:
    """How much each patch's token came to matter to the class token: (1, 1, H, W)."""
    attentions: list[Tensor] = []
    activations = image.clone().requires_grad_()
    for stage in backbone.stages:
        for module in stage.children():
            if isinstance(module, EncoderBlock):
                activations, weights = attended(module, activations)
                attentions.append(weights)
            else:
                activations = module(activations)
    gradients = torch.autograd.grad(score(activations), attentions)
    relevance = torch.eye(attentions[0].shape[-1], device=image.device)
    for weights, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (weights.detach() * gradient).clamp(min=0).mean(1)[0] @ relevance
    return [_square(relevance[:1, 1:])]


def attended(block: EncoderBlock, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output, and its attention (1, heads, T, T), which torchvision's own forward keeps to itself."""
    attention = block.self_attention
    projected = functional.linear(block.ln_1(tokens), attention.in_proj_weight, attention.in_proj_bias)
    queries, keys, values = projected.reshape(*tokens.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (queries @ keys.transpose(2, 3) * queries.shape[3] ** -0.5).softmax(3)
    tokens = tokens + attention.out_proj((weights @ values).transpose(1, 2).flatten(2))
    output: Tensor = tokens + block.mlp(block.ln_2(tokens))
    return output, weights


def _reads_class_token(backbone: Backbone) -> bool:
    *_, last = backbone.stages[-1].children()
    return isinstance(last, ClassToken) and not backbone.reads_all


def _square(patches: Tensor) -> Tensor:
    """(N, P) of a square of patches: (N, 1, H, W)."""
    side = math.isqrt(patches.shape[1])
    return patches.reshape(-1, 1, side, side)


def _enlarged(map_: Tensor, side: int, moved: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) as (S, S), moved down and right; past the edge that comes in, it fades over one cell.

    A cell's evidence is shared out among its pixels, so that a coarse map's and a fine one's can be added.
    """
    large = functional.interpolate(map_ * map_.numel(), size=(side, side), mode="bilinear")[0, 0]
    for axis, by in enumerate(moved):
        wanted = torch.arange(side, device=large.device) - by
        there = wanted.clamp(0, side - 1)
        fading = (1 - (wanted - there).abs() * map_.shape[2 + axis] / side).clamp(min=0)
        large = large.index_select(axis, there) * fading.unsqueeze(1 - axis)
    return large


# Drawing


@dataclass(frozen=True)
class _Frame:
    """The picture as resized for the network, shrunk by `scale` if it is very long. size: (width, height)."""

    size: tuple[int, int]
    resized: tuple[int, int]
    scale: float

    def placed(self, square: Heat) -> Heat:
        """The network's central crop in its place: (height, width), 0 beside it."""
        side = max(1, round(len(square) * self.scale))
        scaled = Image.fromarray(square).resize((side, side), Image.Resampling.BILINEAR)
        canvas = Image.new("F", self.size)
        left, top = (round((length - len(square)) / 2 * self.scale) for length in self.resized)
        canvas.paste(scaled, (left, top))
        return np.asarray(canvas, dtype=np.float32)


def _frame(width: int, height: int, resize: int) -> _Frame:
    short = min(width, height)
    resized = (width * resize // short, height * resize // short)
    scale = min(1.0, MAX_SIDE / max(resized))
    return _Frame((max(1, round(resized[0] * scale)), max(1, round(resized[1] * scale))), resized, scale)


def _mixed(canvas: Heat, colours: Heat, share: Heat) -> Heat:
    """share: (H, W), of the colours over the canvas."""
    return np.asarray(canvas + (colours - canvas) * share[:, :, np.newaxis], dtype=np.float32)
