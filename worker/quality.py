"""What a network's features say about a data set's quality: copies that pixels hide, and labels that look wrong.

Pure: takes features and what the manifest knows, returns warnings. Beside app/datasets/quality.py, which compares
pixels and so misses mirrored and cropped copies. Nothing here changes a data set: a person decides.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from app.datasets.manifest import UNLABELLED, Split
from app.datasets.report import warning
from worker.training.probe import fit_probe, out_of_fold

# Copies: cosine similarity of features less their mean, at least MIN_SIMILARITY, and with a distance (1 - similarity)
# of at most MAX_DISTANCE_RATIO of either picture's distance to its NEIGHBOUR-th nearest. The ratio is Lowe's test: on
# plain textures everything is near everything (surface_defects: half of all pictures have a neighbour above 0.85).
# Measured with MobileNetV3-small. Mirrored copies are found in 0.96 to 1.00 of cases on photos and 32-pixel pictures,
# 0.56 on sign_digits, 0.34 on textures; crops of 90 % of the side in 0.97 (hymenoptera), 0.65 (32 pixels) and 0.48
# (textures); JPEG of quality 15 in 0.22 or less. What it finds in the sets as they are: no pair in hymenoptera,
# two_trees and sign_digits; 2 in tiny_longtail, both true copies; 17 in surface_defects, looked at: about a third show
# overlapping pieces of the same steel, the others only resemble each other.
MIN_SIMILARITY = 0.8
MAX_DISTANCE_RATIO = 0.3
NEIGHBOUR = 10
# Below so many pictures "the usual distance" means nothing.
MIN_PICTURES = 8
_ROWS_AT_ONCE = 256  # times 100,000 pictures: 100 MB

# Labels: below this margin of the other class's probability over its own, a person looks at too many good labels.
# Measured with wrong labels planted, three draws each, MobileNetV3-small: hymenoptera (10 of 397) recall 0.77,
# precision 0.55; sign_digits (2 % of 1,610) 0.80 and 0.65; surface_defects (2 % of 900) 0.91 and 0.98. Without any
# planted it lists 7, 18 and 0 pictures.
MIN_MARGIN = 0.5
# Below this out-of-fold accuracy the probe's contradictions say more about itself: on tiny_longtail (0.68) a quarter of
# its suspects were the planted ones, and it had as many without any.
MIN_ACCURACY = 0.75
# What a class may ask for at most before a picture counts as its own. Well separated classes have a mean of 0.99, which
# a wrongly labelled picture seldom reaches, as it has drawn the probe towards itself.
MAX_CONFIDENCE = 0.8
# A list that is looked through: at most so many, and no more than this share of the pictures.
MAX_SUSPECTS, MAX_SUSPECT_SHARE = 50, 0.05

_EXCLUDE = 'leave pictures out with "exclude": [paths] in the job'


@dataclass(frozen=True)
class Suspect:
    """A picture whose label the others contradict. margin: probability of `suggested` less its own label's, 0 to 1."""

    index: int
    suggested: int
    margin: float


def quality_warnings(
    features: Tensor,
    labels: NDArray[np.int64],
    splits: Sequence[Split],
    copies: NDArray[np.int64],
    *,
    paths: Sequence[str],
    classes: Sequence[str],
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Warnings for a data set's report, all splits together; what pixels have shown already is not repeated.

    labels: int64 (N,), UNLABELLED for a picture whose class is not known.
    features: float32 (N, D), of each picture in the manifest's order. copies: (N,), the group of each picture as
    app.datasets.quality.group_near_copies finds it. tick: called now and then; may raise to stop.
    """
    pairs = [(i, j) for i, j in near_pairs(features, tick=tick) if copies[i] != copies[j]]
    tick()
    found = []
    if leaked := [(i, j) for i, j in pairs if splits[i] != splits[j]]:
        found.append(
            warning(
                "duplicate_across_splits",
                f"{_pictures(leaked)} look like mirrored, cropped or otherwise changed copies of pictures in another "
                f"split, so validation is easier than it should be. Look at them, and {_EXCLUDE}.",
                _paths_of(leaked, paths),
                groups=[[paths[i], paths[j]] for i, j in leaked],
            )
        )
    if contradicting := [(i, j) for i, j in pairs if _differ(labels[i], labels[j])]:
        found.append(
            warning(
                "conflicting_labels",
                f"{_pictures(contradicting)} look like changed copies of a picture in another class. Decide for one "
                f"class each, or {_EXCLUDE}.",
                _paths_of(contradicting, paths),
                groups=[[paths[i], paths[j]] for i, j in contradicting],
            )
        )
    known = np.flatnonzero(labels != UNLABELLED)
    suspects = suspicious_labels(
        features[torch.from_numpy(known)],
        labels[known],
        len(classes),
        groups=_joined(copies, pairs)[known],
        seed=seed,
        tick=tick,
    )
    if suspects:
        suspects = [replace(suspect, index=int(known[suspect.index])) for suspect in suspects]
        first = suspects[0]
        found.append(
            warning(
                "suspicious_labels",
                f"{len(suspects)} pictures look more like another class than their own, the clearest first: "
                f"{paths[first.index]} like {classes[first.suggested]}. Look at them: correct their class in a new "
                f"upload, or {_EXCLUDE}.",
                [paths[suspect.index] for suspect in suspects],
                suggested={paths[suspect.index]: classes[suspect.suggested] for suspect in suspects},
            )
        )
    return found


def _differ(first: int, second: int) -> bool:
    return UNLABELLED not in (first, second) and first != second


def near_pairs(features: Tensor, *, tick: Callable[[], None] = lambda: None) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of pictures that look like copies of each other, the most alike first.

    features: float32 (N, D). Time goes by N² D, memory by N.
    """
    count = len(features)
    if count < MIN_PICTURES:
        return []
    directions = functional.normalize(features - features.mean(0), dim=1)
    neighbours = min(NEIGHBOUR, count // 2)
    similarity, index = torch.empty(count, neighbours), torch.empty(count, neighbours, dtype=torch.int64)
    for start in range(0, count, _ROWS_AT_ONCE):
        tick()
        rows = directions[start : start + _ROWS_AT_ONCE]
        block = rows @ directions.T
        block[torch.arange(len(rows)), start + torch.arange(len(rows))] = -2  # no picture is its own neighbour
        similarity[start : start + len(rows)], index[start : start + len(rows)] = block.topk(neighbours, dim=1)
    usual = 1 - similarity[:, -1]
    # A copy is nearer than the usual distance, so it is among the neighbours that were kept, on either side.
    is_copy = (similarity >= MIN_SIMILARITY) & (
        1 - similarity <= MAX_DISTANCE_RATIO * torch.minimum(usual[:, None], usual[index])
    )
    rows, places = torch.nonzero(is_copy, as_tuple=True)
    alike = {
        (min(i, j), max(i, j)): value
        for i, j, value in zip(
            rows.tolist(), index[rows, places].tolist(), similarity[rows, places].tolist(), strict=True
        )
    }
    return sorted(alike, key=lambda pair: (-alike[pair], pair))


def suspicious_labels(
    features: Tensor,
    labels: NDArray[np.int64],
    class_count: int,
    *,
    groups: NDArray[np.int64],
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> list[Suspect]:
    """Pictures that a probe of the other pictures takes for another class, the clearest first.

    Confident learning (Northcutt, Jiang and Chuang 2021): counted for another class is a picture whose out-of-fold
    probability reaches that class's mean one over its own pictures, so that a class that is never predicted with
    confidence may be suggested with less. Empty where the probe is too often wrong to be heard.
    groups: (N,), copies of a picture, which must not vouch for each other.
    """
    if len(labels) < MIN_PICTURES or len(np.unique(labels)) < 2:
        return []
    strength = fit_probe(features, labels, class_count, groups=groups, seed=seed, tick=tick).strength
    probabilities = out_of_fold(features, labels, class_count, groups=groups, seed=seed, strength=strength, tick=tick)
    truth = torch.from_numpy(labels)
    counts = torch.bincount(truth, minlength=class_count)
    own = probabilities.gather(1, truth[:, None])[:, 0]
    confidence = (torch.zeros(class_count).index_add_(0, truth, own) / counts).clamp(max=MAX_CONFIDENCE)
    if (probabilities.argmax(1) == truth).double().mean() < MIN_ACCURACY:
        return []
    # A picture that is the only one of its class was judged by probes that never saw the class.
    is_candidate = counts[truth] > 1
    others = torch.where(probabilities >= confidence, probabilities, 0.0).scatter(1, truth[:, None], 0.0)
    best, suggested = others.max(1)
    margins = torch.where(is_candidate, best - own, 0.0)
    order = torch.argsort(margins, descending=True, stable=True)[: _max_suspects(len(labels))]
    return [Suspect(i, int(suggested[i]), float(margins[i])) for i in order.tolist() if margins[i] >= MIN_MARGIN]


def _max_suspects(count: int) -> int:
    return min(MAX_SUSPECTS, max(1, round(MAX_SUSPECT_SHARE * count)))


def _joined(copies: NDArray[np.int64], pairs: Sequence[tuple[int, int]]) -> NDArray[np.int64]:
    """Groups of `copies`, united where a pair connects them; (N,), each group named by its smallest number."""
    neighbours: dict[int, set[int]] = defaultdict(set)
    for i, j in pairs:
        a, b = int(copies[i]), int(copies[j])
        neighbours[a].add(b)
        neighbours[b].add(a)
    name: dict[int, int] = {}
    for start in sorted(neighbours):
        if start in name:
            continue
        name[start], waiting = start, [start]
        while waiting:
            for other in neighbours[waiting.pop()]:
                if other not in name:
                    name[other] = start
                    waiting.append(other)
    return np.array([name.get(int(group), int(group)) for group in copies], dtype=np.int64)


def _pictures(pairs: Sequence[tuple[int, int]]) -> str:
    return f"{len({i for pair in pairs for i in pair})} pictures"


def _paths_of(pairs: Sequence[tuple[int, int]], paths: Sequence[str]) -> list[str]:
    """Each path once, pictures of a pair beside each other."""
    return list(dict.fromkeys(paths[i] for pair in pairs for i in pair))
