"""Decoded images on disk, back to back: written once at ingest, memory-mapped by training ever after.

A folder with `pixels.bin` (uint8 RGB rows of one image after the other, each in its own size) and `index.npy`
(int64, one row of offset, height, width per image). Knows numbers; not archives, not classes.
"""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

_PIXELS = "pixels.bin"
_INDEX = "index.npy"
_INDEX_HEADER_BYTES = 128  # of the npy format, version 1.0, for a shape of any length that we can have


def folder_bytes(pixel_bytes: int, count: int) -> int:
    """The size of both files of a store with this many bytes of pixels in this many images."""
    return pixel_bytes + _INDEX_HEADER_BYTES + count * 3 * np.dtype(np.int64).itemsize


class PackedPixels:
    """Reads a packed folder. Stays readable after the folder is deleted, as long as it is open."""

    def __init__(self, folder: Path) -> None:
        self._index: NDArray[np.int64] = np.load(folder / _INDEX, allow_pickle=False)
        # A plain array of the mapped file: slicing a memmap itself costs 5 µs, more than all else that reading does.
        self._pixels: Pixels = np.asarray(np.memmap(folder / _PIXELS, dtype=np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Pixels:
        """Image i: uint8 (H, W, 3), a read-only view into the file."""
        offset, height, width = self._index[i].tolist()
        return self._pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N, 2): height and width of each image."""
        return self._index[:, 1:]


class PackedWriter:
    """Writes a packed folder: images in any order, put into their final order by `finish`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._file = (folder / _PIXELS).open("wb")
        self._index: list[tuple[int, int, int]] = []
        self._offset = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def size_bytes(self) -> int:
        return self._offset

    def append(self, pixels: Pixels) -> None:
        """pixels: uint8 (H, W, 3)."""
        height, width, _ = pixels.shape
        self._file.write(np.ascontiguousarray(pixels).data)
        self._index.append((self._offset, height, width))
        self._offset += pixels.nbytes

    def finish(self, order: Sequence[int]) -> None:
        """Writes the index. order: for each image of the store, which of the appended ones it is."""
        self._file.close()
        np.save(self._folder / _INDEX, np.array(self._index, dtype=np.int64).reshape(-1, 3)[list(order)])
