"""Pictures that are near copies of each other: re-encoded, resized or slightly brighter. Knows pixels; not files.

Two steps, because neither would do alone. A 64-bit perceptual hash finds candidates among a million pictures without
comparing all pairs; but flat drawings, digits and plain textures share hashes without being copies, so each candidate
pair is compared as thumbnails, cell by cell.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Thumbnails = NDArray[np.uint8]  # (N, 16, 16, 3)

THUMBNAIL_SIDE: Final = 16
_HASHED_SIDE: Final = 32

# Candidates: hashes that differ in at most this many bits, which finds 98 of 100 copies on photos and on textures.
# With four bands of 16 bits, of which one must then differ in at most one bit, none within this distance is missed.
MAX_HASH_DISTANCE: Final = 7
_BAND_BITS: Final = 16

# Copies: what is left of the difference of two thumbnails once brightness and contrast are matched, as a share of
# their own contrast. Measured on photos, textures, hands and 32-pixel pictures: copies re-encoded at quality 50, halved
# and brightened by 20 stay below 0.12 in 95 of 100 cases (32 pixels: 0.25); the nearest different pictures have 0.20.
MAX_RESIDUAL_SHARE: Final = 0.15
# Different handwritten digits of 8 × 8 pixels come as near as 0.135.
MAX_RESIDUAL_SHARE_TINY: Final = 0.08
TINY_SIDE: Final = 24
# Rounding and JPEG noise, in grey levels: allowed whatever the contrast.
RESIDUAL_FLOOR: Final = 0.5
# Below this contrast (standard deviation in grey levels) a thumbnail says nothing; only equal pixels are copies then.
MIN_CONTRAST: Final = 2.0
# "Slightly" brighter or of more contrast.
MAX_BRIGHTNESS_SHIFT: Final = 40.0
CONTRAST_RANGE: Final = (0.75, 1.34)
MAX_RATIO_DIFFERENCE: Final = 0.05

_PAIRS_AT_ONCE: Final = 4096  # times a dozen float arrays of 768 numbers: some 100 MB


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is kept of a picture to find its copies."""

    thumbnail: Pixels  # (16, 16, 3)
    perceptual_hash: int  # 64 bits
    contrast: float  # of the thumbnail: standard deviation in grey levels, each channel by itself
    log_ratio: float  # of width to height
    is_tiny: bool
    digest: bytes  # of the pixels


@dataclass(frozen=True)
class Fingerprints:
    """Those of many pictures, as columns."""

    thumbnails: Thumbnails  # may be memory-mapped
    rows: NDArray[np.int64]  # where in `thumbnails` each picture's is
    hashes: NDArray[np.uint64]
    contrasts: NDArray[np.float64]
    log_ratios: NDArray[np.float64]
    are_tiny: NDArray[np.bool_]
    digests: Sequence[bytes]

    @classmethod
    def of(cls, fingerprints: Sequence[Fingerprint], *, thumbnails: Thumbnails, rows: NDArray[np.int64]) -> Self:
        """thumbnails: as kept elsewhere, since a million of them are too many for memory; rows: where each is."""
        return cls(
            thumbnails,
            rows,
            np.array([each.perceptual_hash for each in fingerprints], dtype=np.uint64),
            np.array([each.contrast for each in fingerprints], dtype=np.float64),
            np.array([each.log_ratio for each in fingerprints], dtype=np.float64),
            np.array([each.is_tiny for each in fingerprints], dtype=np.bool_),
            [each.digest for each in fingerprints],
        )


def fingerprint(pixels: Pixels) -> Fingerprint:
    """pixels: uint8 (H, W, 3)."""
    height, width, _ = pixels.shape
    image = Image.fromarray(pixels)
    thumbnail = np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BILINEAR))
    grey = image.resize((_HASHED_SIDE, _HASHED_SIDE), Image.Resampling.BOX).convert("L")
    digest = hashlib.blake2b(f"{height} {width} ".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return Fingerprint(
        thumbnail,
        _perceptual_hash(np.asarray(grey)),
        float(np.sqrt(np.mean(_centred(thumbnail[None])[1] ** 2))),
        float(np.log(width / height)),
        min(height, width) < TINY_SIDE,
        digest.digest(),
    )


def group_near_copies(pictures: Fingerprints, *, tick: Callable[[], None] = lambda: None) -> NDArray[np.int64]:
    """(N,): for each picture the number of its group, which is the index of the group's first picture.

    Pictures with equal pixels are one group, whatever they show. tick: called now and then; may raise to stop.
    """
    first: dict[bytes, int] = {}
    groups = _Groups([first.setdefault(digest, i) for i, digest in enumerate(pictures.digests)])
    # One of each group of equals is enough, and plain ones share one hash: neither may be a million pairs.
    alone = np.array(sorted(first.values()), dtype=np.int64)
    alone = alone[pictures.contrasts[alone] >= MIN_CONTRAST]
    for left, right in _candidates(pictures.hashes[alone]):
        tick()
        a, b = alone[left], alone[right]
        is_alike = np.abs(pictures.log_ratios[a] - pictures.log_ratios[b]) < MAX_RATIO_DIFFERENCE
        a, b = a[is_alike], b[is_alike]
        # Of a thousand frames of one camera each pair is a candidate, in every band anew.
        is_open = groups.are_apart(a, b)
        a, b = a[is_open], b[is_open]
        are_tiny = pictures.are_tiny[a] | pictures.are_tiny[b]
        is_copy = _are_copies(
            pictures.thumbnails[pictures.rows[a]], pictures.thumbnails[pictures.rows[b]], are_tiny=are_tiny
        )
        for i, j in zip(a[is_copy].tolist(), b[is_copy].tolist(), strict=True):
            groups.join(i, j)
    return groups.roots(np.arange(len(pictures.digests)))


def _perceptual_hash(grey: Pixels) -> int:
    """Signs of the 8 × 8 lowest frequencies against their median; brightness and contrast do not matter.

    Source: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010.
    """
    low = (_COSINES @ grey.astype(np.float32) @ _COSINES.T).reshape(64)
    bits = low > np.median(low[1:])
    bits[0] = False  # the mean
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _cosine_basis() -> NDArray[np.float32]:
    cells = np.arange(_HASHED_SIDE) + 0.5
    return np.cos(np.pi * np.arange(8)[:, None] * cells / _HASHED_SIDE).astype(np.float32)


_COSINES = _cosine_basis()


def _candidates(hashes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of indices whose hashes are near, in blocks; a pair may come more than once."""
    for band in range(64 // _BAND_BITS):
        keys = ((hashes >> np.uint64(band * _BAND_BITS)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange(2**_BAND_BITS + 1))
        for key in np.unique(keys).tolist():
            here = order[starts[key] : starts[key + 1]]
            # Each pair of buckets once: a partner with the higher key, or the bucket itself.
            partners = [key] + [other for bit in range(_BAND_BITS) if (other := key ^ (1 << bit)) > key]
            there = np.concatenate([order[starts[other] : starts[other + 1]] for other in partners])
            yield from _near_pairs(hashes, here, there)


def _near_pairs(
    hashes: NDArray[np.uint64], here: NDArray[np.int64], there: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    if len(there) < 2:
        return
    rows = max(1, 1_000_000 // len(there))
    for start in range(0, len(here), rows):
        block = here[start : start + rows]
        distance = np.bitwise_count(hashes[block][:, None] ^ hashes[there][None, :])
        left, right = np.nonzero(distance <= MAX_HASH_DISTANCE)
        a, b = block[left], there[right]
        is_new = a != b
        a, b = a[is_new], b[is_new]
        for at in range(0, len(a), _PAIRS_AT_ONCE):
            yield a[at : at + _PAIRS_AT_ONCE], b[at : at + _PAIRS_AT_ONCE]


def _are_copies(a: Thumbnails, b: Thumbnails, *, are_tiny: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of the pairs (a[i], b[i]) show the same: equal but for brightness, contrast and noise."""
    mean_a, centred_a = _centred(a)
    mean_b, centred_b = _centred(b)
    contrast_a = np.sqrt(np.mean(centred_a**2, axis=1))
    contrast_b = np.sqrt(np.mean(centred_b**2, axis=1))
    gain = np.mean(centred_a * centred_b, axis=1) / contrast_a**2
    residual = np.sqrt(np.mean((centred_b - gain[:, None] * centred_a) ** 2, axis=1))
    contrast = np.minimum(contrast_a, contrast_b)  # never below MIN_CONTRAST here
    allowed_share = np.where(are_tiny, MAX_RESIDUAL_SHARE_TINY, MAX_RESIDUAL_SHARE)
    is_same: NDArray[np.bool_] = (
        (residual <= np.maximum(allowed_share * contrast, RESIDUAL_FLOOR))
        & (gain >= CONTRAST_RANGE[0])
        & (gain <= CONTRAST_RANGE[1])
        & (np.abs(mean_a - mean_b).max(axis=1) <= MAX_BRIGHTNESS_SHIFT)
    )
    return is_same


def _centred(thumbnails: Thumbnails) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean colour (N, 3), and the rest (N, 768). Each channel by itself, so that colour alone is no contrast."""
    cells = thumbnails.reshape(len(thumbnails), THUMBNAIL_SIDE**2, 3).astype(np.float32)
    mean = cells.mean(axis=1)
    return mean, (cells - mean[:, None, :]).reshape(len(thumbnails), 3 * THUMBNAIL_SIDE**2)


class _Groups:
    """Union-find; the root of a group is its smallest member."""

    def __init__(self, above: Sequence[int]) -> None:
        """above: for each member one of its group that comes before it, or itself."""
        self._above = np.array(above, dtype=np.int64)

    def join(self, i: int, j: int) -> None:
        i, j = self.roots(np.array([i, j])).tolist()
        self._above[max(i, j)] = min(i, j)

    def are_apart(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the pairs (a[i], b[i]) are in two groups as yet."""
        are_apart: NDArray[np.bool_] = self.roots(a) != self.roots(b)
        return are_apart

    def roots(self, members: NDArray[np.int64]) -> NDArray[np.int64]:
        roots = self._above[members]
        while not np.array_equal(roots, above := self._above[roots]):
            roots = above
        self._above[members] = roots
        return roots
