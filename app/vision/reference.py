"""What a model's answers are held against: training pictures as its head sees them, and how it did on held-out ones.

From these follow, for any picture, how strange it is, which training pictures are nearest, and a set of classes that
holds the true one with a promised probability. The worker fits it, serving asks it, the artifact carries it. Knows
features and probabilities; not networks, not files. docs/trust.md has the measurements behind the choices.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

# Training pictures that are kept: 0.8 MB of the usual 1,024 numbers each, compared with in 0.1 to 0.2 ms, so that 200
# models fit into 200 MB. Twice as many tell classes that were left out from the others by one point of AUROC more.
MAX_IMAGES = 800
# Held-out pictures that are looked at: more tell the quantiles no better.
MAX_HELD_OUT = 10_000
# Of held-out pictures, the share that is to count as known.
KEPT_SHARE = 0.95
# The scores of the typical held-out picture, and of the strangest that still counts as known.
TYPICAL_SCORE, LIMIT_SCORE = 0.1, 0.5
# A copy of a training picture is no nearer than this, so that logarithms and ratios of distances stay finite.
MIN_DISTANCE = 1e-6
# Numbers that are compared with at a time: half a MiB of them, for a core's cache.
_BLOCK_NUMBERS = 2**17
_PICTURES_AT_A_TIME = 128
# From here on a quantile of KEPT_SHARE can be counted off.
_COUNTABLE = 19
# Student's t at 95 %, one-sided, for 1 to 17 degrees of freedom.
_T95 = [
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833,
    1.812, 1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740,
]  # fmt: skip

Features = NDArray[np.float32]
Codes = NDArray[np.int8]


@dataclass(frozen=True)
class Novelty:
    """How far a picture's nearest training picture may be: the distance of half of the held-out ones, and the limit."""

    typical: float
    limit: float

    @classmethod
    def of(cls, distances: NDArray[np.floating]) -> Self:
        """distances: of held-out pictures, two or more.

        The limit is the conformal quantile: a new picture of the same kind is beyond it with probability 0.05 or less
        (Vovk et al. 2005). Below 19 pictures none can be counted off; then it is the upper prediction bound of a
        log-normal distribution, which on subsets of real data sets kept 93 to 97 % of the others.
        """
        known = np.maximum(distances.astype(np.float64), MIN_DISTANCE)
        count = len(known)
        if count >= _COUNTABLE:
            return cls(float(np.median(known)), float(np.sort(known)[_rank(count, KEPT_SHARE) - 1]))
        logs = np.log(known)
        centre, spread = logs.mean(), logs.std(ddof=1) * math.sqrt(1 + 1 / count)
        return cls(math.exp(centre), math.exp(centre + _T95[count - 2] * spread))

    def score(self, distance: float) -> float:
        """0 to 1, on a logistic curve: TYPICAL_SCORE at the typical distance, LIMIT_SCORE at the limit."""
        step = max(self.limit - self.typical, MIN_DISTANCE)
        odds_per_step = LIMIT_SCORE / TYPICAL_SCORE * (1 - TYPICAL_SCORE) / (1 - LIMIT_SCORE)
        steps = min(max((distance - self.limit) / step, -100.0), 100.0)
        return float(1 / (1 + odds_per_step**-steps))


@dataclass(frozen=True)
class Neighbour:
    """A training picture. labels: of each task, -1 for none. image: id and path; None for one of no data set."""

    labels: tuple[int, ...]
    image: tuple[str, str] | None
    similarity: float  # cosine, 1 for the same


class Images(Sequence[tuple[str, str] | None]):
    """Id and path of each picture, in one block: as tuples of strings, hundreds of them take 0.2 MB in each model."""

    def __init__(self, images: Iterable[tuple[str, str] | None]) -> None:
        lines = [json.dumps(image).encode() for image in images]
        self._block = b"".join(lines)
        self._ends = np.cumsum([0, *map(len, lines)], dtype=np.uint32)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> tuple[str, str] | None: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[tuple[str, str] | None]: ...
    def __getitem__(self, place: int | slice) -> tuple[str, str] | Sequence[tuple[str, str] | None] | None:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        found = json.loads(self._block[self._ends[place] : self._ends[place + 1]])
        return None if found is None else (found[0], found[1])


@dataclass(frozen=True)
class Reference:
    """codes: int8 (N, D), `coded` features of training pictures; labels: int64 (N, T).

    images: id and path of each; None for one that is in no data set. errors: for each task, float32, ascending, what
    the calibrated probability of the true class lacked to 1 on held-out pictures. lengths: float32 (N,), of the
    features before they were made unit; models of earlier versions have none.
    """

    codes: Codes
    labels: NDArray[np.int64]
    images: Sequence[tuple[str, str] | None]
    novelty: Novelty
    errors: Sequence[NDArray[np.float32]]
    lengths: NDArray[np.float32] | None = None

    @classmethod
    def fit(
        cls,
        features: NDArray[np.floating],
        labels: NDArray[np.int64],
        images: Sequence[tuple[str, str] | None],
        *,
        held_out: NDArray[np.floating],
        probability_of_true: Sequence[NDArray[np.floating]],
    ) -> Self:
        """features: (N, D), of those that `choose` chose; held_out: (M, D), M > 1, of pictures not trained on.

        labels: (N,), or (N, T) of several tasks. probability_of_true: calibrated, for each task, of the held-out
        pictures that have a label of it.
        """
        kept = coded(features)
        # By the codes, so that what is measured when fitting is what is asked.
        lengths = _lengths(kept.astype(np.float32))
        looked_at = unit(_some(held_out))
        parts = range(0, len(looked_at), _PICTURES_AT_A_TIME)
        nearest = [_similarities(kept, lengths, looked_at[i : i + _PICTURES_AT_A_TIME]).max(axis=1) for i in parts]
        distances = 1 - np.concatenate(nearest)
        return cls(
            codes=kept,
            labels=labels.reshape(len(labels), -1),
            images=images,
            novelty=Novelty.of(distances),
            errors=[errors_of(each) for each in probability_of_true],
            lengths=_lengths(features),
        )

    def extended(
        self,
        features: NDArray[np.floating],
        labels: NDArray[np.int64],
        *,
        probability_of_true: Sequence[NDArray[np.floating] | None],
    ) -> Self:
        """With pictures beside the others that are in no data set, (K, D) and (K, T), for a model that knows them now.

        labels: may be of a class that is new; -1 for none. probability_of_true: as in `fit`, by that model; None for a
        task that it answers as before. What counts as known is as it was, for held-out pictures are no further from
        more pictures than from fewer; or more, where the new ones, each left out in turn, are further from the others.
        """
        every_label = np.concatenate([self.labels, labels])
        kept = choose(every_label[:, 0], class_count=int(every_label[:, 0].max()) + 1, seed=0)
        images = [*self.images, *[None] * len(features)]
        lengths = None if self.lengths is None else np.concatenate([self.lengths, _lengths(features)])[kept]
        codes = np.concatenate([self.codes, coded(features)])
        return replace(
            self,
            novelty=replace(self.novelty, limit=max(self.novelty.limit, _furthest(codes, unit(features)))),
            codes=codes[kept],
            labels=every_label[kept],
            images=[images[i] for i in kept.tolist()],
            errors=[
                before if found is None else errors_of(found)
                for before, found in zip(self.errors, probability_of_true, strict=True)
            ],
            lengths=lengths,
        )

    @cached_property
    def _code_lengths(self) -> NDArray[np.float32]:
        return _lengths(self.codes.astype(np.float32))

    @property
    def size_bytes(self) -> int:
        lengths = 0 if self.lengths is None else self.lengths.nbytes
        return self.codes.nbytes + self.labels.nbytes + lengths + sum(errors.nbytes for errors in self.errors)

    def similarities(self, features: NDArray[np.floating]) -> Features:
        """Cosine of a picture, (D,), to each training picture: (N,); or of several, (K, D): (K, N)."""
        return _similarities(self.codes, self._code_lengths, unit(np.atleast_2d(features))).reshape(
            *features.shape[:-1], len(self.codes)
        )

    def ood_score(self, similarities: Features) -> float:
        """How strange a picture is, 0 to 1: by its distance to the nearest training picture (Sun et al. 2022).

        Of held-out pictures half are at 0.1 or below, and 95 % at 0.5 or below.
        """
        return self.novelty.score(1 - float(similarities.max()))

    def likeness(self, features: NDArray[np.floating]) -> Features:
        """Cosine of each of several pictures, (K, D), to the training picture nearest to it: (K,)."""
        return np.asarray(self.similarities(features).max(axis=1), dtype=np.float32)

    def raw(self, places: Sequence[int]) -> Features:
        """Features of these pictures as the head sees them, but for their coding: (K, D)."""
        assert self.lengths is not None, "asked for where they are"
        chosen = list(places)
        return unit(self.codes[chosen].astype(np.float32)) * self.lengths[chosen, np.newaxis]

    def nearest(self, similarities: Features, count: int) -> list[Neighbour]:
        """The min(count, N) most similar training pictures, the nearest first."""
        order = np.argsort(-similarities, kind="stable")[:count].tolist()
        return [
            Neighbour(tuple(self.labels[i].tolist()), self.images[i], min(float(similarities[i]), 1.0)) for i in order
        ]


def choose(labels: NDArray[np.int64], *, class_count: int, seed: int) -> NDArray[np.int64]:
    """Which of the training pictures are kept, ascending: MAX_IMAGES at most, or one of each class if that is more.

    At random within a class, and as many of each as there are, or as the classes get in turn.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    turns = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        of_class = labels[order] == label
        turns[of_class] = np.arange(of_class.sum())
    kept = order[np.argsort(turns, kind="stable")[: max(MAX_IMAGES, class_count)]]
    return np.sort(kept)


def errors_of(probability_of_true: NDArray[np.floating]) -> NDArray[np.float32]:
    """As a reference keeps them, for `prediction_set`."""
    return np.sort(1 - _some(probability_of_true).astype(np.float32))


def prediction_set(probabilities: Sequence[float], errors: NDArray[np.float32], coverage: float) -> list[int]:
    """Labels, most probable first, that hold the true one with probability `coverage`: split conformal prediction.

    By the least ambiguous sets (Sadinle et al. 2019): all classes whose probability lacks no more to 1 than the true
    class's did on `coverage` of the held-out pictures, with the finite-sample correction. Never empty: the most
    probable class is always in, which can only add coverage. With n held-out pictures no coverage above n / (n + 1)
    can be promised, but by all classes.
    """
    order = sorted(range(len(probabilities)), key=lambda label: -probabilities[label])
    rank = max(1, _rank(len(errors), coverage))
    if rank > len(errors):
        return order
    limit = errors[rank - 1]
    return [label for i, label in enumerate(order) if i == 0 or np.float32(1 - probabilities[label]) <= limit]


def unit(features: NDArray[np.floating]) -> Features:
    """(N, D), each row of length 1."""
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def _lengths(features: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.asarray(np.linalg.norm(features, axis=1), dtype=np.float32)


def coded(features: NDArray[np.floating]) -> Codes:
    """(N, D), each row's direction alone, its largest number as 127 or -127.

    The cosine of two pictures of the data sets in docs/trust.md is off by 0.0001 to 0.0004, and the AUROC by which a
    set is told from another by 0.0002 at most. What counts as known is measured by the codes, so its promise holds.
    """
    largest = np.abs(features).max(axis=1, keepdims=True, initial=0)
    numbers = np.round(features * (127 / np.maximum(largest, np.finfo(np.float32).tiny)))
    return np.asarray(numbers, dtype=np.int8)


def _furthest(known: Codes, last: Features) -> float:
    """Of the last K known pictures, (K, D) of unit length, the distance of the one that is furthest from all others.

    No bound beyond it, as Novelty.of has one for few: on four sets that let in up to 0.7 of pictures of other sets.
    """
    if len(last) < 2:
        return 0.0
    found = _similarities(known, _lengths(known.astype(np.float32)), last)
    np.fill_diagonal(found[:, -len(last) :], -1.0)
    return float(1 - found.max(axis=1).min())


def _similarities(known: Codes, lengths: NDArray[np.float32], pictures: Features) -> Features:
    """(N, D), their (N,) lengths, and (K, D) of unit length: (K, N); the same for a picture whatever is beside it.

    Row by row, in one thread: a matrix product asks for all cores, and beside forward passes that keep them busy it
    took 8 ms where this takes 0.1 (1,000 rows of 1,024, two cores). In blocks, which stay in a core's cache, and are
    made numbers once for all pictures.
    """
    found = np.empty((len(pictures), len(known)), dtype=np.float32)
    rows = max(1, _BLOCK_NUMBERS // max(known.shape[1], 1))
    numbers = np.empty((min(rows, len(known)), known.shape[1]), dtype=np.float32)
    for start in range(0, len(known), rows):
        block = numbers[: len(known) - start]
        np.copyto(block, known[start : start + rows])
        np.vecdot(block, pictures[:, np.newaxis], out=found[:, start : start + rows])
    return np.asarray(found / np.maximum(lengths, 1), dtype=np.float32)  # codes that are not all 0 are longer


def _rank(count: int, share: float) -> int:
    """Which of `count` values in ascending order a new one is at or below with probability `share`; there may be none.

    With the finite-sample correction: the new value is one of count + 1 that are in any order alike.
    """
    return math.ceil((count + 1) * share - 1e-9)  # 100 * 0.55 is 55.00000000000001, and must not be 56


def _some(held_out: NDArray[np.floating]) -> NDArray[np.floating]:
    """MAX_HELD_OUT of them, spread evenly, or all."""
    if len(held_out) <= MAX_HELD_OUT:
        return held_out
    return held_out[np.linspace(0, len(held_out) - 1, MAX_HELD_OUT).round().astype(np.int64)]
