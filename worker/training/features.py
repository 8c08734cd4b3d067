"""What the frozen stages make of a data set's images, computed once and kept: training then pays for the rest alone.

Kept below the data set, named by everything that they depend on (the frozen weights themselves, preprocessing,
augmentation, number of views, precision), so any job that needs the same finds them. Deleted with the data set, or when
others need the room. Knows networks, pixels and storage; not jobs.
"""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.datasets.manifest import Manifest
from app.errors import StorageFull
from app.storage import LocalStorage, is_disk_full
from app.vision.backbones import ALL_LAYERS, weights_digest
from app.vision.classifier import Classifier
from app.vision.device import pass_batch_size
from app.vision.folding import folded_prefix
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise
from worker.training.pixels import (
    CPU,
    VIEW,
    Batch,
    Images,
    Kept,
    PixelSource,
    Split,
    as_tensor,
    on_device,
    pinned,
    prefetched,
    random_stream,
)

FORMAT_VERSION = 2
_VALUES = "values.bin"
_SHAPE = "shape.json"

OnBatch = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Activations:
    """Stored values: (views, N, ...), as float32 or as the bits of bfloat16, mapped from disk or in memory.

    channels_last: a row is (H, W, C) in memory and (C, H, W) to the network.
    """

    values: NDArray[Any]
    channels_last: bool

    @property
    def views(self) -> int:
        return len(self.values)

    def rows(self, views: NDArray[np.int64] | int, rows: NDArray[np.int64]) -> Tensor:
        """A copy of these rows: float32 or bfloat16 (len(rows), ...)."""
        return self._as_seen(torch.from_numpy(np.ascontiguousarray(self.values[views, rows])))

    def rows_of(self, whole: Tensor, views: NDArray[np.int64] | int, rows: NDArray[np.int64]) -> Tensor:
        """The same of `whole`, which is all values on any device."""
        places = on_device(torch.from_numpy(views * self.values.shape[1] + rows), whole.device)
        return self._as_seen(whole.flatten(0, 1).index_select(0, places))

    @property
    def whole(self) -> Tensor:
        """All values, in their own memory; half precision as int16, since torch selects no rows of uint16."""
        values = as_tensor(self.values)
        return values.view(torch.int16) if values.dtype == torch.uint16 else values

    def _as_seen(self, taken: Tensor) -> Tensor:
        taken = taken.view(torch.bfloat16) if taken.dtype in (torch.uint16, torch.int16) else taken
        return taken.permute(0, 3, 1, 2) if self.channels_last else taken


@dataclass(frozen=True)
class ActivationSource:
    """Batches of stored activations. plain: as served, one view. augmented: another view in each epoch, or None.

    rows, augmented_rows: where this source's images are within `plain` and `augmented`. kept: where what is trained on
    is as a whole, once it has been.
    """

    labels: NDArray[np.int64]
    plain: Activations
    rows: NDArray[np.int64]
    augmented: Activations | None
    augmented_rows: NDArray[np.int64]
    kept: Kept | None = None

    @property
    def is_light(self) -> bool:
        return self.plain.values.ndim == 3  # a vector for each image, and only the head is trained

    def __len__(self) -> int:
        return len(self.labels)

    def training_batch(
        self, positions: NDArray[np.int64], *, seed: int, epoch: int, step: int, device: torch.device = CPU
    ) -> Batch:
        views: NDArray[np.int64] | int
        if self.augmented is None:
            stored, views, rows = self.plain, 0, self.rows[positions]
        else:
            # Each image goes round its views from a place of its own, so that no epoch is all of one view.
            first = random_stream(seed, VIEW).integers(0, self.augmented.views, len(self))
            views = (first[positions] + epoch) % self.augmented.views
            stored, rows = self.augmented, self.augmented_rows[positions]
        if self.kept is None:
            inputs = pinned(stored.rows(views, rows), device)
        else:
            whole = self.kept.get("activations", lambda: stored.whole)
            inputs = pinned(stored.rows_of(whole, views, rows), device)
        return Batch(inputs, pinned(torch.from_numpy(self.labels[positions]), device))

    def batch(self, positions: NDArray[np.int64], *, device: torch.device = CPU) -> Batch:
        inputs = self.plain.rows(0, self.rows[positions])
        return Batch(pinned(inputs, device), torch.from_numpy(self.labels[positions]))

    def keeping(self, kept: Kept) -> "ActivationSource":
        stored = self.augmented or self.plain
        return replace(self, kept=kept) if stored.values.nbytes <= kept.free else self


@dataclass(frozen=True)
class FeatureCache:
    """The stored activations of one data set. max_bytes: of all data sets' together; what was used least goes first."""

    storage: LocalStorage
    dataset_id: str
    max_bytes: int

    def find(self, key: str) -> Activations | None:
        folder = self.storage.path(self._place(key))
        try:
            os.utime(folder)  # used now
            return _read(folder)
        except FileNotFoundError:  # not computed yet, or another process just made room
            return None

    @contextmanager
    def writing(self, key: str, shape: Sequence[int], dtype: Any, *, channels_last: bool) -> Iterator[NDArray[Any]]:
        """An array to be filled; kept when the block ends well. Raises StorageFull if there is no room for it."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._make_room(size)
        with self.storage.staging() as folder:
            folder.mkdir()
            try:
                # All of it now: writing to a mapped hole on a full disk ends the process by a signal.
                with (folder / _VALUES).open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
                values = np.memmap(folder / _VALUES, dtype=dtype, mode="r+", shape=tuple(shape))
                yield values
                values.flush()
                record = {"shape": list(shape), "dtype": np.dtype(dtype).name, "channels_last": channels_last}
                (folder / _SHAPE).write_text(json.dumps(record), "utf-8")
                self.storage.publish(folder, self._place(key))
            except OSError as error:
                if not is_disk_full(error):
                    raise
                raise StorageFull("The disk became full while features were stored.") from error

    def _place(self, key: str) -> str:
        return f"datasets/{self.dataset_id}/features/{key}"

    def _make_room(self, incoming_bytes: int) -> None:
        if incoming_bytes > self.max_bytes:
            raise StorageFull("The features are larger than GRAFT_FEATURE_CACHE_BYTES allows.")
        self.storage.check_room(incoming_bytes)
        kept: list[tuple[float, int, str]] = []
        # By `glob`, which passes over folders that go while it looks; Path.glob raises.
        for name in glob.iglob("*/features/*", root_dir=self.storage.path("datasets")):
            folder = self.storage.path(f"datasets/{name}")
            with contextlib.suppress(FileNotFoundError):  # just deleted, with its data set or by another process
                kept.append((folder.stat().st_mtime, (folder / _VALUES).stat().st_size, name))
        room = self.max_bytes - incoming_bytes - sum(size for _, size, _ in kept)
        for _, size, name in sorted(kept):
            if room >= 0:
                return
            room += size
            # Whoever has it mapped can go on reading it.
            self.storage.delete(f"datasets/{name}")


def plain_features(
    classifier: Classifier,
    manifest: Manifest,
    images: Images,
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
    cache: FeatureCache | None,
    on_batch: OnBatch = lambda _done, _all: None,
) -> Activations:
    """`activations` of every image of the data set as it is served, in the manifest's order.

    Whoever asks with the same frozen weights, preprocessing and precision finds the same, ingest and jobs alike.
    """

    def prepare(pixels: Tensor) -> Tensor:
        return eval_pixels(pixels, preprocessing)

    everything = Split(images, np.arange(len(manifest.records)), manifest.labels)
    return activations(
        classifier,
        PixelSource(everything, None, prepare),
        views=None,
        seed=0,
        normalise=lambda batch: normalise(batch, preprocessing),
        device=device,
        precision=precision,
        described={"preprocessing": preprocessing.to_dict()},
        cache=cache,
        on_batch=on_batch,
    )


def activations(
    classifier: Classifier,
    source: PixelSource,
    *,
    views: int | None,
    seed: int,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: str,
    described: Mapping[str, Any],
    cache: FeatureCache | None,
    on_batch: OnBatch = lambda _done, _all: None,
) -> Activations:
    """The output of the classifier's frozen stages for every image of the source, in its order.

    views: how many times each image is changed at random; None takes it as it is served, once. described: what the
    pixels depend on, preprocessing and augmentation, as JSON. Without a cache the values are kept in memory.
    Raises StorageFull if they fit nowhere, and what on_batch raises.
    """
    key = _key(classifier, source, views=views, seed=seed, precision=precision, described=described)
    found = cache.find(key) if cache else None
    if found is not None:
        return found
    prefix = folded_prefix(classifier)
    first = _forward(prefix, _view(source, [0], None, seed, device), normalise, device, precision)
    is_map = first.ndim > 2
    channels_last = first.ndim == 4 and classifier.backbone.layout == "NCHW"
    row = first.permute(0, 2, 3, 1).shape[1:] if channels_last else first.shape[1:]
    # What the head sees stays exact; maps are large, and training does not notice their last bits.
    dtype = np.uint16 if is_map else np.float32
    shape = (views or 1, len(source), *row)

    def fill(values: NDArray[Any]) -> None:
        places = _places(len(source), views, device)
        total, done = shape[0] * len(source), 0
        seen = (_view(source, images, None if views is None else view, seed, device) for view, images in places)
        with contextlib.closing(prefetched(seen, device=device)) as batches:
            for (view, images), batch in zip(places, batches, strict=True):
                made = _forward(prefix, batch, normalise, device, precision)
                made = made.permute(0, 2, 3, 1) if channels_last else made
                kept = made.to(torch.bfloat16 if is_map else torch.float32).contiguous()
                values[view, images.start : images.stop] = (kept.view(torch.uint16) if is_map else kept).numpy()
                done += len(batch)
                on_batch(done, total)

    if cache is None:
        values = np.empty(shape, dtype=dtype)
        fill(values)
        return Activations(values, channels_last)
    with cache.writing(key, shape, dtype, channels_last=channels_last) as values:
        fill(values)
    # As they are mapped: what was just published may be gone already, where others need the room.
    return Activations(values, channels_last)


def _key(
    classifier: Classifier,
    source: PixelSource,
    *,
    views: int | None,
    seed: int,
    precision: str,
    described: Mapping[str, Any],
) -> str:
    record = {
        "version": FORMAT_VERSION,
        "weights": _digest_of_frozen(classifier),
        "rows": hashlib.sha256(source.split.indices.tobytes()).hexdigest(),
        "views": views,
        "seed": None if views is None else seed,
        "precision": precision,
        "described": dict(described),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of_frozen(classifier: Classifier) -> str:
    """Of the frozen stages' names and values."""
    read = (ALL_LAYERS,) if classifier.backbone.reads_all else ()
    described = (classifier.backbone.name, classifier.frozen_stage_names, *read)
    return weights_digest(described, classifier.frozen_state())


def _places(count: int, views: int | None, device: torch.device) -> list[tuple[int, range]]:
    """Of each batch the view and the images."""
    # One size for all, so that the same image has the same features whichever job computes them.
    size = pass_batch_size(device.type)
    return [
        (view, range(start, min(start + size, count))) for view in range(views or 1) for start in range(0, count, size)
    ]


def _view(source: PixelSource, positions: Sequence[int], view: int | None, seed: int, device: torch.device) -> Batch:
    if view is None:
        return source.batch(np.array(positions), device=device)
    step = positions[0] // pass_batch_size(device.type)
    return source.training_batch(np.array(positions), seed=seed, epoch=view, step=step, device=device)


def _forward(
    prefix: Callable[[Tensor], Tensor],
    batch: Batch,
    normalise: Callable[[Tensor], Tensor],
    device: torch.device,
    precision: str,
) -> Tensor:
    with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        return prefix(normalise(batch.inputs.to(device, non_blocking=True))).cpu()


def _read(folder: Path) -> Activations:
    record = json.loads((folder / _SHAPE).read_bytes())
    values = np.memmap(folder / _VALUES, dtype=record["dtype"], mode="r", shape=tuple(record["shape"]))
    return Activations(values, record["channels_last"])
