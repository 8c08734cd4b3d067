"""Which pictures become validation. Pure: labels, groups and digests in, a choice out.

The choice depends on the pictures' content and a seed alone: not on names, order or place in the archive.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def validation_count(pictures: int, fraction: float) -> int:
    """How many of a class's pictures become validation: rounded half up, at least one, and one is left to train on."""
    return max(0, min(max(1, int(pictures * fraction + 0.5)), pictures - 1))


def choose_validation(
    labels: Sequence[int], *, groups: Sequence[int], digests: Sequence[str], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """(N,): whether each picture becomes validation; stratified, with `validation_count` per class.

    groups: a number per picture; pictures of one group stay on one side, even where a count suffers: then the nearest
    possible count is taken, and a class that is a single group has no validation. A group that spans classes is
    trained on, since its labels contradict each other.
    digests: of the encoded pictures.
    """
    members_by_group: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members_by_group[group].append(i)
    candidates: dict[int, list[list[int]]] = defaultdict(list)  # by label
    for members in members_by_group.values():
        if len({labels[i] for i in members}) == 1:
            members.sort(key=lambda i: _key(digests[i], seed))
            candidates[labels[members[0]]].append(members)

    chosen = np.zeros(len(labels), dtype=np.bool_)
    counts = Counter(labels)
    for label, of_class in candidates.items():
        of_class.sort(key=lambda members: _key(digests[members[0]], seed))
        sizes = [len(members) for members in of_class]
        target = validation_count(counts[label], fraction)
        for at in _nearest_sum(sizes, target, most=counts[label] - 1):
            chosen[of_class[at]] = True
    return chosen


def _key(digest: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{digest}".encode()).digest()


def _nearest_sum(sizes: Sequence[int], target: int, *, most: int) -> list[int]:
    """Which of the sizes, early ones preferred, sum up to the target; or to the nearest possible from 1 to `most`."""
    taken = _first_fitting(sizes, target)
    if sum(sizes[i] for i in taken) == target:
        return taken
    # Rare: only where groups of copies are large, or the target is odd and all come in pairs.
    places: dict[int, list[int]] = defaultdict(list)  # by size
    for i, size in enumerate(sizes):
        places[size].append(i)
    # What is farther than this is nearer without one of its sizes.
    mask = (1 << min(most, target + max(sizes)) + 1) - 1
    # Bit s of reachable[k] says that the first k different sizes can sum up to s, each as often as it is there. There
    # are at most as many as the square root of twice the pictures.
    reachable = [1]
    for size, members in places.items():
        sums = reachable[-1]
        for _ in members:
            sums = (sums | sums << size) & mask
        reachable.append(sums)
    possible = [s for s in range(1, reachable[-1].bit_length()) if reachable[-1] >> s & 1]
    if not possible:
        return []
    left = min(possible, key=lambda s: (abs(s - target), s))
    chosen: list[int] = []
    for (size, members), sums in zip(reversed(places.items()), reversed(reachable[:-1]), strict=True):
        count = next(n for n in range(len(members) + 1) if sums >> left - n * size & 1)
        chosen += members[:count]
        left -= count * size
    return chosen


def _first_fitting(sizes: Sequence[int], target: int) -> list[int]:
    taken = []
    for i, size in enumerate(sizes):
        if size <= target:
            taken.append(i)
            target -= size
        if target == 0:
            break
    return taken
