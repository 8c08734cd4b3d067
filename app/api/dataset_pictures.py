"""Pictures of a model's own data set: those of validation, which an engine or an exported file is held against it on,
and those of training, which a copy of it is tuned to.

Knows the storage's models and data sets; not HTTP.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.datasets.ingest import PACKED_SIDE, manifest_key, packed_key
from app.datasets.manifest import Manifest
from app.datasets.packed import PackedPixels, Pixels
from app.errors import ModelUnavailable
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.preprocessing import Preprocessing, eval_pixels

# More take longer and show the same.
MOST_CHECKED, MOST_EXPORTED = 128, 32
# For figures: tells an accuracy to within a point and a half, in seconds.
MOST_MEASURED = 1000


def check_pixels(model_id: str, preprocessing: Preprocessing, storage: LocalStorage) -> Tensor | None:
    """As the model sees them, uint8 (N, 3, S, S), for an engine; None where the data set is gone."""
    pictures = validation_pictures(model_id, storage, most=MOST_CHECKED)
    return torch.stack([eval_pixels(picture, preprocessing) for picture in pictures]) if pictures else None


def validation_pictures(model_id: str, storage: LocalStorage, *, most: int = MOST_EXPORTED) -> list[Pixels]:
    """uint8 (H, W, 3), spread over all of them; none where the data set is gone."""
    found = validation_of(model_id, storage, most=most)
    return [] if found is None else list(found.pictures)


@dataclass(frozen=True)
class Validation:
    """pictures: uint8 (H, W, 3), mapped. labels: int64 (N,), or (N, T) of several tasks. images: ids and paths."""

    pictures: Sequence[Pixels]
    labels: NDArray[np.int64]
    images: Sequence[tuple[str, str]]


def validation_of(
    model_id: str, storage: LocalStorage, *, most: int = MOST_MEASURED, without: Collection[str] = ()
) -> Validation | None:
    """What a model was validated on, `most` of it spread over all; None where the data set, or all of it, is gone.

    without: digests of pictures that are left out, as those are that the model was made of since.
    """
    try:
        description = artifact.load_description(storage.path(f"models/{model_id}"))
        metadata, preprocessing = description["metadata"], Preprocessing.from_dict(description["preprocessing"])
        dataset = metadata["dataset"]
        manifest = Manifest.read(storage.path(manifest_key(dataset)))
        pictures = _packed(dataset, storage, side=preprocessing.side)
    except (ModelUnavailable, OSError, ValueError, KeyError, TypeError):
        return None
    excluded = frozenset((metadata.get("spec") or {}).get("exclude") or ())
    learnt = frozenset([*without, *metadata.get("shots", [])])
    of_validation = manifest.indices("val", exclude=excluded)
    of_validation = of_validation[[manifest.records[i].digest not in learnt for i in of_validation.tolist()]]
    places = np.linspace(0, len(of_validation) - 1, min(most, len(of_validation))).round().astype(np.int64)
    chosen = of_validation[places]
    if not len(chosen):
        return None
    records = [manifest.records[i] for i in chosen.tolist()]
    return Validation(
        [pictures[i] for i in chosen.tolist()],
        manifest.targets[chosen],
        [(record.image_id, record.path) for record in records],
    )


def training_pictures(
    dataset_id: str, image_ids: Sequence[str | None], storage: LocalStorage, *, side: int
) -> list[Pixels | None]:
    """uint8 (H, W, 3) of each, mapped and not read yet; None for what is in no data set, or in one that is gone.

    side: as Preprocessing has it, of the model that is to see them.
    """
    path = storage.path(manifest_key(dataset_id))
    try:
        places = _places(path, path.stat().st_mtime_ns)
        pictures = _packed(dataset_id, storage, side=side)
    except (OSError, ValueError):
        return [None] * len(image_ids)
    found = [None if image_id is None else places.get(image_id) for image_id in image_ids]
    return [None if place is None else pictures[place] for place in found]


def _packed(dataset_id: str, storage: LocalStorage, *, side: int) -> PackedPixels:
    """As the model's training had them; the smaller ones of ingest where those are gone. Raises OSError, ValueError."""
    key = packed_key(dataset_id, side)
    return PackedPixels(storage.path(key if storage.exists(key) else packed_key(dataset_id, PACKED_SIDE)))


@lru_cache(maxsize=8)
def _places(manifest: Path, _changed_ns: int) -> dict[str, int]:
    """Where each image is, by its id: reading the manifest takes a second for a hundred thousand."""
    return {record.image_id: place for place, record in enumerate(Manifest.read(manifest).records)}
