"""The operations that `strong` augmentation draws from, each on many pictures at once.

Equal to torchvision.transforms.v2.functional within two grey levels. What is one number per value (brightness,
equalisation) becomes a table and one look-up; what moves pixels becomes a matrix and one sampling. Draws nothing.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from worker.training.pixels import on_device

FILL = 127  # grey, where a moved picture leaves nothing, and where one is erased

# Largest changes, in TrivialAugment's terms moderate ones: at its own "wide" ranges photographs of small sets become
# unrecognisable.
_MAX_COLOUR = 0.6  # added to or taken from a factor of 1
_MAX_BLEND = 0.9
_MAX_POSTERIZED_BITS = 4
_MAX_SOLARIZED = 0.5  # share of the range of values that is inverted
_MAX_ANGLE = math.pi / 6
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.15  # of the side

_GREY = (0.2989, 0.587, 0.114)  # as torchvision and Pillow weigh red, green, blue


def apply(images: Tensor, operations: Sequence[str], strengths: NDArray[np.float64]) -> None:
    """Changes each image in place by one of OPERATIONS, at a strength from -1 to 1.

    images: uint8 (N, 3, S, S) in channels-last memory. Those that have no sign take the strength's absolute value.
    """
    names = np.array(operations)
    for kinds, change in ((_TABLES, _looked_up), (_BLENDS, _blended), (_MOVES, _moved)):
        replace(
            images,
            np.flatnonzero(np.isin(names, list(kinds))),
            lambda chosen, members, change=change: change(chosen, names[members], strengths[members]),  # type: ignore[misc]
        )


def replace(images: Tensor, members: NDArray[np.int64], change: Callable[[Tensor, NDArray[np.int64]], Tensor]) -> None:
    """Puts in place of some images of a batch what `change` makes of them.

    images: (N, 3, S, S) in channels-last memory. change: (images (M, 3, S, S), members) -> the same shape and type.
    """
    if len(members) == 0:
        return
    index = on_device(torch.from_numpy(members), images.device)
    rows = images.permute(0, 2, 3, 1)  # contiguous, so that whole pictures are copied
    changed = change(rows.index_select(0, index).permute(0, 3, 1, 2), members)
    rows.index_copy_(0, index, changed.permute(0, 2, 3, 1))


# Tables: (histograms (M, 3, 256), strengths (M, 1, 1)) -> what each value becomes, float (M, 1 or 3, 256).


def _brightness(histograms: Tensor, strengths: Tensor) -> Tensor:
    return _values(histograms) * (1 + _MAX_COLOUR * strengths)


def _contrast(histograms: Tensor, strengths: Tensor) -> Tensor:
    values, factor = _values(histograms), 1 + _MAX_COLOUR * strengths
    red, green, blue = ((histograms * values).sum(2) / histograms.sum(2)).unbind(1)
    # torchvision rounds each pixel's grey down before the mean, which on average takes half a level.
    grey = red * _GREY[0] + green * _GREY[1] + blue * _GREY[2] - 0.5
    return values * factor + grey.view(-1, 1, 1) * (1 - factor)


def _posterize(histograms: Tensor, strengths: Tensor) -> Tensor:
    step = 2.0 ** (_MAX_POSTERIZED_BITS * strengths.abs()).round()
    return (_values(histograms) / step).floor() * step


def _solarize(histograms: Tensor, strengths: Tensor) -> Tensor:
    values = _values(histograms)
    return torch.where(values >= 255 * (1 - _MAX_SOLARIZED * strengths.abs()), 255 - values, values)


def _autocontrast(histograms: Tensor, _strengths: Tensor) -> Tensor:
    values, is_there = _values(histograms), histograms > 0
    low = torch.where(is_there, values, 255.0).amin(2, keepdim=True)
    high = torch.where(is_there, values, 0.0).amax(2, keepdim=True)
    # A channel of one value stays as it is.
    return torch.where(high > low, (values - low) * (255 / (high - low).clamp(min=1)), values)


def _equalize(histograms: Tensor, _strengths: Tensor) -> Tensor:
    """Pillow's rule: the last value that occurs becomes 255, whatever stands before it is spread evenly."""
    values = _values(histograms)
    last = torch.where(histograms > 0, values, 0.0).amax(2, keepdim=True)
    at_last = histograms.gather(2, last.long())
    step = ((histograms.sum(2, keepdim=True) - at_last) / 255).floor()
    below = histograms.cumsum(2) - histograms
    # Where there are fewer pixels than steps, the channel stays as it is.
    spread = ((below + (step / 2).floor()) / step.clamp(min=1)).floor()
    return torch.where(step > 0, spread, values)


_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
_BY_HISTOGRAM = ("contrast", "autocontrast", "equalize")


def _looked_up(images: Tensor, operations: NDArray[np.str_], strengths: NDArray[np.float64]) -> Tensor:
    count, device = len(images), images.device
    amounts = _amounts(strengths, device)
    histograms = torch.zeros((count, 3, 256), device=device)
    counted = on_device(torch.from_numpy(np.flatnonzero(np.isin(operations, _BY_HISTOGRAM))), device)
    histograms.index_copy_(0, counted, _histograms(images.index_select(0, counted)))
    tables = torch.empty((count, 256, 3), dtype=torch.uint8, device=device)
    for name in sorted(set(operations)):
        members = on_device(torch.from_numpy(np.flatnonzero(operations == name)), device)
        table = _TABLES[name](histograms.index_select(0, members), amounts.index_select(0, members))
        table = table.clamp(0, 255).to(torch.uint8).transpose(1, 2).expand(-1, 256, 3)
        tables.index_copy_(0, members, table)
    # All tables behind one another and one look-up into them, in the order in which the pixels lie in memory.
    base = torch.arange(count, dtype=torch.int32, device=device).view(-1, 1, 1, 1) * 768
    channel = torch.arange(3, dtype=torch.int32, device=device)
    places = images.permute(0, 2, 3, 1).to(torch.int32).mul_(3).add_(base + channel)
    found = tables.view(-1).index_select(0, places.view(-1))
    return found.view(places.shape).permute(0, 3, 1, 2)


def _histograms(images: Tensor) -> Tensor:
    """float32 (M, 3, 256): how often each value occurs; counts are whole, so their order of adding changes nothing."""
    values = images.flatten(2).long()
    counts = torch.zeros((*values.shape[:2], 256), device=images.device)
    return counts.scatter_add_(2, values, counts.new_ones(1).expand_as(values))


def _values(histograms: Tensor) -> Tensor:
    return torch.arange(256, dtype=torch.float32, device=histograms.device).expand(len(histograms), 1, 256)


def _amounts(strengths: NDArray[np.float64], device: torch.device) -> Tensor:
    return on_device(torch.from_numpy(strengths.astype(np.float32)), device).view(-1, 1, 1)


# Blends with another version of the picture: float (M, 3, S, S) -> the same or with one channel.


def _greyed(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return (red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]).floor().unsqueeze(1)


def _smoothed(images: Tensor) -> Tensor:
    """Each pixel as the mean of nine, itself counted five times; the outermost as they are."""
    inner = images[..., 1:-1, 1:-1]
    smoothed = images.clone()
    if inner.numel():
        # Three columns, then three rows: an eighth of the time that avg_pool2d takes on a CPU.
        across = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
        around = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
        smoothed[..., 1:-1, 1:-1] = around.add_(inner, alpha=4).div_(13).round_()
    return smoothed


_BLENDS: dict[str, Callable[[Tensor], Tensor]] = {"saturation": _greyed, "sharpness": _smoothed}


def _blended(images: Tensor, operations: NDArray[np.str_], strengths: NDArray[np.float64]) -> Tensor:
    out = images.clone(memory_format=torch.channels_last)
    factors = (1 + _MAX_BLEND * _amounts(strengths, images.device)).unsqueeze(3)
    for name in sorted(set(operations)):
        members = np.flatnonzero(operations == name)
        index = on_device(torch.from_numpy(members), images.device)
        chosen = images.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2).float()
        factor = factors.index_select(0, index)
        mixed = chosen * factor + _BLENDS[name](chosen) * (1 - factor)
        replace(out, members, lambda _chosen, _members, mixed=mixed: mixed.clamp_(0, 255).to(torch.uint8))  # type: ignore[misc]
    return out


# Movements: (strength, side) -> the rows of the matrix that leads from a place in the result to its place in the
# picture, in coordinates from -1 to 1.
_Matrix = tuple[tuple[float, float, float], tuple[float, float, float]]


def _rotation(strength: float, _side: int) -> _Matrix:
    sine, cosine = math.sin(_MAX_ANGLE * strength), math.cos(_MAX_ANGLE * strength)
    return (cosine, sine, 0), (-sine, cosine, 0)


def _shear_x(strength: float, _side: int) -> _Matrix:
    return (1, _MAX_SHEAR * strength, 0), (0, 1, 0)


def _shear_y(strength: float, _side: int) -> _Matrix:
    return (1, 0, 0), (_MAX_SHEAR * strength, 1, 0)


def _translation_x(strength: float, side: int) -> _Matrix:
    return (1, 0, -_shift(strength, side)), (0, 1, 0)


def _translation_y(strength: float, side: int) -> _Matrix:
    return (1, 0, 0), (0, 1, -_shift(strength, side))


def _shift(strength: float, side: int) -> float:
    """By whole pixels, which leaves the picture sharp."""
    return round(_MAX_TRANSLATION * strength * side) * 2 / side


_MOVES: dict[str, Callable[[float, int], _Matrix]] = {
    "rotation": _rotation,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translation_x": _translation_x,
    "translation_y": _translation_y,
}

OPERATIONS = ("identity", *_TABLES, *_BLENDS, *_MOVES)


def _moved(images: Tensor, operations: NDArray[np.str_], strengths: NDArray[np.float64]) -> Tensor:
    side = images.shape[-1]
    pairs = zip(operations.tolist(), strengths.tolist(), strict=True)
    rows = np.array([_MOVES[name](strength, side) for name, strength in pairs], dtype=np.float32)
    matrices = on_device(torch.from_numpy(rows), images.device)
    places = (torch.arange(side, dtype=torch.float32, device=images.device) * 2 + 1) / side - 1
    # What affine_grid computes, in a quarter of its time on a CPU.
    by_column, by_row, shift = matrices.unsqueeze(2).unbind(3)
    grid = torch.empty((len(images), side, side, 2), device=images.device)
    for axis in range(2):
        along = (by_column[:, axis] * places).unsqueeze(1)
        down = (by_row[:, axis] * places + shift[:, axis]).unsqueeze(2)
        torch.add(along, down, out=grid[..., axis])
    # Outside is 0, so with grey taken off before and put back after, outside is grey.
    moved = functional.grid_sample(images.float().sub_(FILL), grid, padding_mode="zeros", align_corners=False)
    return moved.add_(FILL).round_().clamp_(0, 255).to(torch.uint8)
