"""Outlines by formula: blobs, superformula, strokes, fractals, bodies with parts; classes are as textures have them."""

import math

import numpy as np
from numpy.typing import NDArray

from worker.pretraining.fractals import density

Mask = NDArray[np.float64]  # (H, W), 0 outside to 1 inside
Random = np.random.Generator

_ANGLES = np.linspace(-math.pi, math.pi, 361)


def shape(side: int, kind: Random, instance: Random, *, family: int) -> NDArray[np.uint8]:
    """Returns uint8 (side, side), 255 inside."""
    return (np.clip(FAMILIES[family % len(FAMILIES)](side, kind, instance), 0, 1) * 255).astype(np.uint8)


def _grid(side: int) -> tuple[Mask, Mask]:
    y, x = (np.mgrid[0:side, 0:side] + 0.5) / side * 2 - 1
    return x, y


def _filled(side: int, radii: Mask) -> Mask:
    """What lies within the radius of its angle; edges are a pixel soft."""
    x, y = _grid(side)
    edge = np.interp(np.arctan2(y, x).ravel(), _ANGLES, radii).reshape(side, side)
    return np.clip((edge - np.hypot(x, y)) * side / 2 + 0.5, 0, 1)


def _blob(side: int, kind: Random, instance: Random) -> Mask:
    """A radius that is a sum of cosines, as Kataoka et al. (2022) draw contours; some have holes."""
    waves = range(1, int(kind.integers(2, 12)) + 1)
    radii = np.ones_like(_ANGLES)
    for n in waves:
        radii += kind.normal(0, 0.5 / (1 + 0.5 * n)) * np.cos(n * _ANGLES + kind.uniform(0, 2 * math.pi))
    for n in range(2, 6):
        radii += 0.04 * instance.normal() * np.cos(n * _ANGLES + instance.uniform(0, 2 * math.pi))
    radii = np.maximum(radii, 0.12)
    radii = 0.95 * radii / radii.max()
    mask = _filled(side, radii)
    if kind.random() < 0.25:
        mask = mask * (1 - _filled(side, radii * kind.uniform(0.3, 0.8)))
    return mask


def _superformula(side: int, kind: Random, instance: Random) -> Mask:
    """Stars, flowers and polygons (Gielis 2003)."""
    corners, (n1, n2, n3) = kind.integers(2, 13), np.exp(kind.uniform(-1.2, 2.0, 3))
    quarter = corners * _ANGLES / 4
    radii = (np.abs(np.cos(quarter)) ** n2 + np.abs(np.sin(quarter)) ** n3) ** (-1 / n1)
    radii = 0.95 * np.clip(radii / np.percentile(radii, 98), 0.05, 1)
    return _filled(side, radii * (1 + 0.03 * instance.normal() * np.cos(2 * _ANGLES)))


def _strokes(side: int, kind: Random, instance: Random) -> Mask:
    """A glyph of one to four straight or bent strokes."""
    x, y = _grid(side)
    nearest = np.full((side, side), np.inf)
    along = np.linspace(0, 1, 40)[:, None]
    for _ in range(int(kind.integers(1, 5))):
        a, b, c, d = kind.uniform(-0.85, 0.85, (4, 2)) + instance.normal(0, 0.05, (4, 2))
        if kind.random() < 0.4:
            b, c = a + (d - a) / 3, a + (d - a) * 2 / 3
        back = 1 - along
        curve = back**3 * a + 3 * back**2 * along * b + 3 * back * along**2 * c + along**3 * d
        for px, py in curve.tolist():
            np.minimum(nearest, (x - px) ** 2 + (y - py) ** 2, out=nearest)
    width = kind.uniform(0.05, 0.14) * instance.uniform(0.8, 1.2)
    return np.asarray(np.clip((width - np.sqrt(nearest)) * side / 3 + 0.5, 0, 1))


def _fractal(side: int, kind: Random, instance: Random) -> Mask:
    visits = density(side, kind, instance, points=15_000)
    seen = visits[visits > 0]
    return np.clip(visits / np.percentile(seen, 70), 0, 1) if len(seen) else visits


def _body(side: int, kind: Random, instance: Random) -> Mask:
    """Ellipses that belong together, often in pairs: a body with parts."""
    x, y = _grid(side)
    mask, is_symmetric = np.zeros((side, side)), kind.random() < 0.6

    def add(centre_x: float, centre_y: float, a: float, b: float, angle: float) -> None:
        u = (x - centre_x) * math.cos(angle) + (y - centre_y) * math.sin(angle)
        v = (y - centre_y) * math.cos(angle) - (x - centre_x) * math.sin(angle)
        inside = np.clip((1 - np.hypot(u / a, v / b)) * min(a, b) * side / 2 + 0.5, 0, 1)
        np.maximum(mask, inside, out=mask)

    for part in range(int(kind.integers(2, 8))):
        centre_x, centre_y = kind.uniform(-0.6, 0.6, 2) * (0.3 if part == 0 else 1.0) + instance.normal(0, 0.03, 2)
        a, b = kind.uniform(0.06, 0.5, 2)
        angle = kind.uniform(0, math.pi) + instance.normal(0, 0.12)
        add(centre_x, centre_y, a, b, angle)
        if is_symmetric:
            add(-centre_x, centre_y, a, b, math.pi - angle)
    return mask


FAMILIES = (_blob, _superformula, _strokes, _fractal, _body)
