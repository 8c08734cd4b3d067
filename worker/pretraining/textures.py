"""Surfaces by formula. A class is a set of parameters, an instance of it another place, angle, zoom or grain.

After what the literature found to teach useful features: random shaders (Baradad et al. 2022), spectra of natural noise
and dead leaves (Baradad et al. 2021), waves, cells, and iterated function systems (Kataoka et al. 2020).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from worker.pretraining.fractals import density

Image = NDArray[np.float64]  # (H, W, 3) or (H, W), in 0..1 or, for fields, any range
Random = np.random.Generator

_ACTIVATIONS: tuple[Callable[[Image], Image], ...] = (
    np.sin,
    np.tanh,
    lambda values: np.abs(values) % 1.0,
    lambda values: np.exp(-values * values),
)


def texture(side: int, kind: Random, instance: Random, *, family: int) -> NDArray[np.uint8]:
    """kind: the class's own random numbers, the same for all its instances. Returns uint8 (side, side, 3)."""
    made = FAMILIES[family % len(FAMILIES)](side, kind, instance)
    return (np.clip(made, 0, 1) * 255).astype(np.uint8)


def _palette(kind: Random) -> Image:
    """(K, 3), two to five colours around one."""
    count = kind.integers(2, 6)
    base, spread = kind.random(3), kind.uniform(0.15, 1.0)
    if kind.random() < 0.3:  # one colour in several lights
        return np.asarray(np.clip(base * kind.uniform(0.1, 1.6, (count, 1)), 0, 1))
    return np.asarray(np.clip(base + spread * kind.uniform(-1, 1, (count, 3)), 0, 1))


def _coloured(field: Image, colours: Image, *, in_steps: bool) -> Image:
    """A field of any range through a palette, smoothly or in steps."""
    scaled = (field - field.min()) / (np.ptp(field) + 1e-9) * (len(colours) - 1)
    if in_steps:
        return np.asarray(colours[np.round(scaled).astype(int)])
    below = np.clip(np.floor(scaled).astype(int), 0, len(colours) - 2)
    share = (scaled - below)[..., None]
    return np.asarray(colours[below] * (1 - share) + colours[below + 1] * share)


def _plane(side: int, instance: Random) -> tuple[Image, Image]:
    """Coordinates in about -1..1, turned, zoomed and shifted."""
    angle, zoom, (left, top) = instance.uniform(0, 2 * math.pi), instance.uniform(0.7, 1.4), instance.uniform(-1, 1, 2)
    y, x = np.mgrid[0:side, 0:side] / side * 2 - 1
    turned = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    return zoom * turned[0] + left, zoom * turned[1] + top


def _shader(side: int, kind: Random, instance: Random) -> Image:
    """A small random network from place to colour."""
    x, y = _plane(side, instance)
    width, depth, frequency = kind.integers(8, 20), kind.integers(2, 5), kind.uniform(1.0, 5.0)
    hidden = frequency * np.stack([x, y, np.hypot(x, y), np.ones_like(x)], axis=-1)
    for layer in range(depth):
        gain = (2.4 if layer == 0 else 1.2) / math.sqrt(hidden.shape[-1])
        hidden = hidden @ kind.normal(0, gain, (hidden.shape[-1], width)) + kind.normal(0, 1, width)
        hidden = _ACTIVATIONS[kind.integers(len(_ACTIVATIONS))](hidden * kind.uniform(0.8, 2.0))
    made = hidden @ kind.normal(0, 1, (width, 3))
    if kind.random() < 0.5:
        return _coloured(made[..., 0], _palette(kind), in_steps=kind.random() < 0.25)
    return np.asarray((made - made.min((0, 1))) / (np.ptp(made, (0, 1)) + 1e-9))


def _noise(side: int, kind: Random, instance: Random) -> Image:
    """Noise with the class's spectrum: a power law or a band, maybe stretched in one direction."""
    slope, angle = kind.uniform(0.5, 3.0), kind.uniform(0, math.pi)
    stretch = kind.choice([1.0, 1.0, kind.uniform(1.5, 8)])
    is_band, centre, width = kind.random() < 0.5, kind.uniform(3, 28), kind.uniform(0.1, 0.6)
    down, across = np.meshgrid(np.fft.fftfreq(side) * side, np.fft.rfftfreq(side) * side, indexing="ij")
    zoom, turn = instance.uniform(0.8, 1.25), angle + instance.uniform(-0.3, 0.3)
    along = (across * math.cos(turn) + down * math.sin(turn)) / zoom
    beside = (down * math.cos(turn) - across * math.sin(turn)) / zoom
    frequency = np.hypot(along, beside * stretch) + 1e-3
    amplitude = np.exp(-(np.log(frequency / centre) ** 2) / (2 * width**2)) if is_band else frequency**-slope
    amplitude[0, 0] = 0
    phases = np.exp(2j * math.pi * instance.random(amplitude.shape))
    field = np.fft.irfft2(amplitude * phases * np.sqrt(instance.exponential(size=amplitude.shape)), s=(side, side))
    field = field / (field.std() + 1e-9)
    match kind.integers(4):
        case 1:
            field = np.abs(field)
        case 2:
            field = np.tanh(3 * field)
        case 3:
            field = np.sin(field * kind.uniform(1, 5))
    return _coloured(np.clip(field, -2.5, 2.5), _palette(kind), in_steps=kind.random() < 0.3)


def _waves(side: int, kind: Random, instance: Random) -> Image:
    """Stripes, checks, rings, grids or hexagons, bent by other waves."""
    x, y = _plane(side, instance)
    bend, bend_frequency, frequency = kind.uniform(0, 0.5), kind.uniform(1, 5), kind.uniform(4, 26)
    u = x + bend * np.sin(bend_frequency * y + kind.uniform(0, 6))
    v = y + bend * np.sin(bend_frequency * x + kind.uniform(0, 6))
    match kind.integers(5):
        case 0:
            field = np.sin(frequency * u)
        case 1:
            field = np.sin(frequency * u) * np.sin(frequency * kind.uniform(0.5, 2) * v)
        case 2:
            field = np.sin(frequency * np.hypot(u, v))
        case 3:
            field = np.maximum(np.cos(frequency * u), np.cos(frequency * v))
        case _:
            turned = (u, -0.5 * u + 0.866 * v, -0.5 * u - 0.866 * v)
            field = sum((np.sin(frequency * axis) for axis in turned), start=np.zeros_like(u))
    field = np.sign(field) * np.abs(field) ** kind.uniform(0.3, 3)
    return _coloured(field, _palette(kind), in_steps=kind.random() < 0.4)


def _cells(side: int, kind: Random, instance: Random) -> Image:
    """Distances to the nearest of scattered points (Worley 1996), at half the resolution."""
    count, order, stretch = int(kind.integers(15, 160)), kind.integers(3), kind.choice([1.0, kind.uniform(1, 4)])
    points = instance.uniform(-1.2, 1.2, (count, 2))
    if kind.random() < 0.3:  # nearly a grid
        edge = np.linspace(-1.2, 1.2, int(math.sqrt(count)) + 1)
        points = np.stack(np.meshgrid(edge, edge), axis=-1).reshape(-1, 2)
        points = points + instance.normal(0, kind.uniform(0, 0.06), points.shape)
    half, angle = side // 2, instance.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:half, 0:half] / half * 2 - 1
    u, v = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
    across = np.abs(u[..., None] - points[:, 0])
    down = stretch * np.abs(v[..., None] - points[:, 1])
    distances = (across + down, np.hypot(across, down), np.maximum(across, down))[order]
    nearest = np.argpartition(distances, 1, axis=-1)[..., :2]
    two = np.sort(np.take_along_axis(distances, nearest, axis=-1), axis=-1)
    first, second = two[..., 0], two[..., 1]
    colours = _palette(kind)
    match kind.integers(4):
        case 0:
            made = _coloured(first, colours, in_steps=False)
        case 1:
            made = _coloured(np.minimum(second - first, kind.uniform(0.02, 0.2)), colours, in_steps=False)
        case 2:
            is_inside = second - first > kind.uniform(0, 0.03)
            made = colours[distances.argmin(axis=-1) % len(colours)] * is_inside[..., None]
        case _:
            made = _coloured(first / (second + 1e-6), colours, in_steps=kind.random() < 0.3)
    return made.repeat(2, axis=0).repeat(2, axis=1)[:side, :side]


def _leaves(side: int, kind: Random, instance: Random) -> Image:
    """Dead leaves: shapes of one form and many sizes fallen on each other (Lee, Mumford and Huang 2001)."""
    colours = _palette(kind)
    made = np.empty((side, side, 3))
    made[:] = colours[0]
    count, form, jitter = int(kind.integers(80, 300)), kind.integers(3), kind.uniform(0, 0.25)
    largest, power = kind.uniform(8, 40), kind.uniform(1.5, 3)
    stretch, angle = math.sqrt(kind.uniform(1, 4)), kind.uniform(0, math.pi)
    low, high = 2 ** (1 - power), largest ** (1 - power)
    sizes = (low + instance.random(count) * (high - low)) ** (1 / (1 - power))
    if kind.random() < 0.3:
        sizes = np.sort(sizes)[::-1]
    for size, (row, column) in zip(sizes.tolist(), instance.integers(0, side, (count, 2)).tolist(), strict=True):
        reach = int(size * stretch) + 1
        rows = slice(max(0, row - reach), min(side, row + reach + 1))
        columns = slice(max(0, column - reach), min(side, column + reach + 1))
        y, x = np.ogrid[rows.start - row : rows.stop - row, columns.start - column : columns.stop - column]
        turn = angle + instance.normal(0, 0.3)
        u = np.abs(x * math.cos(turn) + y * math.sin(turn)) / stretch
        v = np.abs(y * math.cos(turn) - x * math.sin(turn)) * stretch
        is_inside = (np.hypot(u, v), np.maximum(u, v), u + v)[form] < size
        colour = colours[instance.integers(len(colours))] + instance.normal(0, jitter)
        made[rows, columns][is_inside] = np.clip(colour, 0, 1)
    return made


def _fractal(side: int, kind: Random, instance: Random) -> Image:
    return _coloured(density(side, kind, instance, points=40_000), _palette(kind), in_steps=False)


FAMILIES = (_shader, _shader, _noise, _noise, _waves, _cells, _leaves, _fractal)
