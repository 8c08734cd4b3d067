"""Iterated function systems: random contractions whose attractor is the picture (Kataoka et al. 2020)."""

import math

import numpy as np
from numpy.typing import NDArray

_WALKERS, _SETTLING = 256, 20


def density(side: int, kind: np.random.Generator, instance: np.random.Generator, *, points: int) -> NDArray[np.float64]:
    """How often each pixel is visited, as a logarithm: (side, side). kind draws the system, instance varies it a bit.

    Singular values are scaled to a sum that Anderson and Farrell (2022) found to give well-filled pictures.
    """
    count = int(kind.integers(2, 7))
    maps = np.stack([_map(kind) for _ in range(count)])
    shifts = kind.uniform(-1, 1, (count, 2))
    values = np.linalg.svd(maps, compute_uv=False)
    wanted = 0.9 * kind.uniform(0.5 * (5 + count), 0.5 * (6 + count))
    maps = maps * min(1.0, wanted / float((values[:, 0] + 2 * values[:, 1]).sum())) * instance.uniform(0.96, 1.0)
    chances = np.abs(np.linalg.det(maps)) + 0.02
    places = instance.normal(0, 0.1, (_WALKERS, 2))
    visited = []
    for step in range(points // _WALKERS + _SETTLING):
        chosen = instance.choice(count, _WALKERS, p=chances / chances.sum())
        places = np.einsum("nij,nj->ni", maps[chosen], places) + shifts[chosen]
        if step >= _SETTLING:
            visited.append(places)
    found = np.concatenate(visited)
    found = found[np.isfinite(found).all(axis=1)]
    if len(found) == 0:
        return np.zeros((side, side))
    low, high = np.percentile(found, 1, axis=0), np.percentile(found, 99, axis=0)
    scaled = ((found - (low + high) / 2) / (float((high - low).max()) + 1e-6) * 0.9 + 0.5) * side
    visits, _, _ = np.histogram2d(scaled[:, 1], scaled[:, 0], bins=side, range=[[0, side], [0, side]])
    return np.asarray(np.log1p(visits))


def _map(kind: np.random.Generator) -> NDArray[np.float64]:
    first, second = (_turn(angle) for angle in kind.uniform(0, 2 * math.pi, 2))
    lengths = np.sort(kind.uniform(0.25, 0.95, 2))[::-1] * [1, kind.choice([-1, 1])]
    return np.asarray(first @ np.diag(lengths) @ second)


def _turn(angle: float) -> NDArray[np.float64]:
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
