"""Boxes of pictures, resized to one size and mirrored: by torch's uint8 kernel on CPUs, by matrices on accelerators.

Both give the same within two grey levels. Knows pixels; what is random about them is drawn in augment.py.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from worker.training.pixels import CPU, on_device

Interpolation = Literal["bilinear", "bicubic"]

# Bounds what a large batch takes of the device's memory: about half a GB for pictures of short side 256.
_PICTURES_AT_ONCE = 128

# Half precision has every grey level, and weights to a 2000th part: an eighth of a level in a sum.
_MULTIPLIED_AS = {"cuda": torch.float16}

_KEYS = -0.5  # bicubic's free number, as in Pillow and torch's antialiased kernels (Keys 1981)


def resized_crops(
    pictures: Sequence[Tensor],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    *,
    size: int,
    interpolation: Interpolation,
    device: torch.device,
) -> Tensor:
    """Each picture's box, antialiased, and mirrored left to right where `flips` says so.

    pictures: N uint8 (H, W, 3) of any sizes, never written to. boxes: (N, 4), top, left, height, width. flips: (N,).
    Returns uint8 (N, 3, size, size) in channels-last memory, on the device.
    """
    # Measured on one core, for 256 × 341 to 224 × 224: torch's kernel 0.3 ms a picture, matrices 5 ms. On an
    # accelerator it is the number of calls that costs, and matrices take the whole batch in two products.
    resized = by_interpolation if device.type == "cpu" else by_matrices
    return resized(pictures, boxes, flips, size=size, interpolation=interpolation, device=device)


def by_interpolation(
    pictures: Sequence[Tensor],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    *,
    size: int,
    interpolation: Interpolation,
    device: torch.device,
) -> Tensor:
    """`resized_crops`, one picture after the other."""
    made = torch.empty((len(pictures), size, size, 3), dtype=torch.uint8, device=device)
    images = made.permute(0, 3, 1, 2)
    for i, cut in enumerate(_cuts(pictures, boxes)):
        # Torch's vectorised uint8 kernel, without conversion to float and back. The new dimension comes first: only
        # then do the strides say channels-last; else the result is planar, and copying it costs twice the resizing.
        resized = functional.interpolate(
            cut[None].permute(0, 3, 1, 2), size=(size, size), mode=interpolation, antialias=True
        )
        images[i : i + 1] = resized.flip(-1) if flips[i] else resized
    return images


def by_matrices(
    pictures: Sequence[Tensor],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    *,
    size: int,
    interpolation: Interpolation,
    device: torch.device,
) -> Tensor:
    """`resized_crops`, many at once: the picture's rows times one matrix of weights, then its columns times another.

    Never waits for the device.
    """
    made = torch.empty((len(pictures), size, size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    for start in range(0, len(pictures), _PICTURES_AT_ONCE):
        some = slice(start, start + _PICTURES_AT_ONCE)
        made[some] = _multiplied(pictures[some], boxes[some], flips[some], size, interpolation, device)
    return made


def _multiplied(
    pictures: Sequence[Tensor],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    size: int,
    interpolation: Interpolation,
    device: torch.device,
) -> Tensor:
    """float (N, 3, size, size), whole numbers from 0 to 255."""
    count = len(pictures)
    raw = on_device(_side_by_side(pictures, boxes, device), device)
    dtype = _MULTIPLIED_AS.get(device.type, torch.float32)
    images = raw.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format)
    rows, columns = images.shape[-2:]
    lengths = on_device(torch.from_numpy(boxes[:, 2:].astype(np.float32)), device)
    mirrored = on_device(torch.from_numpy(flips), device)
    across = _weights(lengths[:, 1], size, columns, interpolation, mirrored=mirrored).to(dtype)
    down = _weights(lengths[:, 0], size, rows, interpolation, mirrored=torch.zeros_like(mirrored)).to(dtype)
    # Rounded and clipped between the two passes, as Pillow and torch's uint8 kernel do: bicubic overshoots at edges.
    wide = torch.bmm(images.reshape(count, 3 * rows, columns), across.transpose(1, 2)).round_().clamp_(0, 255)
    return torch.matmul(down.unsqueeze(1), wide.view(count, 3, rows, size)).round_().clamp_(0, 255)


def _side_by_side(pictures: Sequence[Tensor], boxes: NDArray[np.int64], device: torch.device) -> Tensor:
    """uint8 (N, rows, columns, 3) of the largest box: each box in its upper left corner, the rest left undefined.

    Only what is needed is read of a picture and sent. A box is at most 4 to 3, so a long strip makes nothing larger.
    """
    # One that was kept on the device is not fetched back for others that found no room there.
    source = device if any(picture.device.type == device.type for picture in pictures) else CPU
    rows, columns = boxes[:, 2:].max(axis=0).tolist()
    pin = source.type == "cpu" and device.type == "cuda"
    held = torch.empty((len(pictures), rows, columns, 3), dtype=torch.uint8, device=source, pin_memory=pin)
    for i, cut in enumerate(_cuts(pictures, boxes)):
        held[i, : len(cut), : cut.shape[1]] = cut
    return held


def _cuts(pictures: Sequence[Tensor], boxes: NDArray[np.int64]) -> Iterator[Tensor]:
    """What is in each picture's box, as a view of it: uint8 (height, width, 3)."""
    for picture, (top, left, height, width) in zip(pictures, boxes.tolist(), strict=True):
        yield picture[top : top + height, left : left + width]


def _weights(lengths: Tensor, size: int, places: int, interpolation: Interpolation, *, mirrored: Tensor) -> Tensor:
    """What each of `places` source pixels gives to each of `size` output pixels, as Pillow's filters say.

    lengths: float (N,), of the boxes, which begin at place 0. mirrored: bool (N,).
    Returns float32 (N, size, places); rows sum to 1, and are 0 beyond the box.
    """
    scale = (lengths / size).view(-1, 1, 1)
    out = torch.arange(size, device=lengths.device, dtype=torch.float32)
    out = torch.where(mirrored.unsqueeze(1), size - 1 - out, out).unsqueeze(2)
    place = torch.arange(places, device=lengths.device, dtype=torch.float32)
    distance = ((place + 0.5 - (out + 0.5) * scale) / scale.clamp(min=1)).abs()
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    weights = weights * (place < lengths.view(-1, 1, 1))
    return weights / weights.sum(2, keepdim=True)


def _triangle(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _cubic(distance: Tensor) -> Tensor:
    near = ((_KEYS + 2) * distance - (_KEYS + 3)) * distance.square() + 1
    far = _KEYS * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
