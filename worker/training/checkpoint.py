"""Resumable state on disk: tensors as safetensors and numbers as JSON, written whole or not at all, checked on reading.

Each run of a job writes below its own fence, jobs/<job>/<fence>/<number>, so a run that lost its claim cannot overwrite
its successor's. The newest valid one is what a run begins from; two are kept, in case one turns out damaged.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.storage import LocalStorage, file_sha256

FORMAT_VERSION = 1
KEPT = 2
_TENSORS = "state.safetensors"
_NUMBERS = "state.json"
_DIGESTS = "digests.json"


@dataclass(frozen=True)
class Checkpoint:
    """seconds: that the work had taken when this was saved."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    seconds: float
    fence: int
    number: int


class CheckpointDamaged(Exception):
    """A checkpoint whose bytes are not what was written."""


class Checkpoints:
    """The checkpoints of one job, written by the run that holds `fence`; and the job's clock, which they carry on."""

    def __init__(
        self,
        storage: LocalStorage,
        *,
        job_id: str,
        fence: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage = storage
        self._monotonic = monotonic
        self._began = monotonic()
        self._key = f"jobs/{job_id}"
        self._fence = fence
        self._number = 0

    @property
    def seconds(self) -> float:
        """That the work has taken: since this was made, and in earlier runs until the checkpoint that was found."""
        return self._monotonic() - self._began

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Publishes a checkpoint, durably; then drops all but the newest two."""
        self._number += 1
        with self._storage.staging() as folder:
            folder.mkdir()
            save_file(dict(tensors), folder / _TENSORS)
            kept = {"format_version": FORMAT_VERSION, "seconds": self.seconds, **numbers}
            (folder / _NUMBERS).write_text(json.dumps(kept), encoding="utf-8")
            digests = {name: file_sha256(folder / name) for name in (_TENSORS, _NUMBERS)}
            (folder / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
            self._storage.publish(folder, f"{self._key}/{self._fence}/{self._number}")
        for fence, number in self._places()[:-KEPT]:
            self._storage.delete(f"{self._key}/{fence}/{number}")

    def newest(self, *, on_damaged: Callable[[str], None] = lambda _sentence: None) -> Checkpoint | None:
        """The newest checkpoint that is whole, of this run or of one before; a damaged one is passed over and told.

        The clock goes on from it.
        """
        for fence, number in reversed(self._places()):
            try:
                found = _read(self._storage.path(f"{self._key}/{fence}/{number}"), fence=fence, number=number)
            except CheckpointDamaged as error:
                on_damaged(f"Checkpoint {fence}/{number} is damaged ({error}); going on from the one before.")
            else:
                self._began -= found.seconds
                return found
        return None

    def drop_all(self) -> None:
        self._storage.delete(self._key)

    def _places(self) -> list[tuple[int, int]]:
        """(fence, number) of each checkpoint, oldest first; those of later runs are not ours to see."""
        root = self._storage.path(self._key)
        places = [
            (int(path.parent.name), int(path.name))
            for path in root.glob("*/*")
            if path.name.isdecimal() and path.parent.name.isdecimal()
        ]
        return sorted(place for place in places if place[0] <= self._fence)


def _read(folder: Path, *, fence: int, number: int) -> Checkpoint:
    try:
        digests = json.loads((folder / _DIGESTS).read_bytes())
        for name in (_TENSORS, _NUMBERS):
            if file_sha256(folder / name) != digests[name]:
                raise CheckpointDamaged(f"{name} is not what was written")
        numbers = json.loads((folder / _NUMBERS).read_bytes())
        if numbers.pop("format_version") != FORMAT_VERSION:
            raise CheckpointDamaged("of another version")
        seconds = float(numbers.pop("seconds", 0.0))  # none of an earlier version
        return Checkpoint(load_file(folder / _TENSORS), numbers, seconds, fence, number)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointDamaged(type(error).__name__) from error
