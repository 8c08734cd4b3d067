"""The story of a data set, from an archive to what training reads: look, decode once, compare, split, publish."""

import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from app.datasets.archive import ArchiveLimits, shown
from app.datasets.inventory import inspect
from app.datasets.layout import Kind, Layout, Picture, Rejected, check, check_enough
from app.datasets.manifest import SPLITS, UNLABELLED, Manifest, Record, Split, Task, digest_of
from app.datasets.packed import PackedPixels, PackedWriter, folder_bytes
from app.datasets.quality import THUMBNAIL_SIDE, Fingerprint, Fingerprints, fingerprint, group_near_copies
from app.datasets.report import MAX_LISTED_REJECTED, IngestReport, merged, warning
from app.datasets.split import choose_validation
from app.datasets.threads import each_file
from app.errors import ArchiveRefused, ImageRefused, listed
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.decoding import Decoders
from app.vision.images import NO_LIMITS, ImageLimits, Pixels, decode, decoded_bytes

PACKED_SIDE = 256

_ROOM_CHECK_BYTES = 256 * 1024**2

# Shares of the work, for progress: reading once, then decoding.
_INSPECTED, _DECODED = 0.1, 0.95

# Below this an accuracy has a 95 % interval wider than ±15 points (at 80 % correct).
SMALL_VALIDATION = 30
# Largest class to smallest, in training pictures, from which on the smallest is easily never predicted.
STRONG_IMBALANCE = 10

Tick = Callable[[float], None]


@dataclass(frozen=True)
class IngestOptions:
    """What the uploader chose. seed and fraction matter only where the archive has no validation split."""

    val_fraction: float
    seed: int
    kind: Kind = "labelled"


@dataclass(frozen=True)
class IngestLimits:
    """What archives and pictures may cost."""

    archive: ArchiveLimits
    images: ImageLimits

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        return cls(ArchiveLimits.from_settings(settings), ImageLimits.from_settings(settings))


def manifest_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/manifest.jsonl"


def packed_key(dataset_id: str, side: int) -> str:
    return f"datasets/{dataset_id}/packed-{side}"


def archive_key(dataset_id: str) -> str:
    return f"datasets/{dataset_id}/archive"


def ingest(
    archive: Path,
    *,
    storage: LocalStorage,
    dataset_id: str,
    options: IngestOptions,
    limits: IngestLimits,
    tick: Tick,
    decoders: Decoders | None = None,
    state_size: Callable[[int], None] = lambda _packed_bytes: None,
) -> IngestReport:
    """Publishes the packed pixels and then the manifest; the report is for the data set's row.

    tick: called often with the share of the work done; may raise to stop, and then nothing is left behind.
    decoders: what decodes pictures; without them it is done here, for an archive that is trusted.
    state_size: told, before the first pixel is written, the bytes that the packed folder will have; pictures that turn
    out to be damaged make it smaller.
    A data set that cannot be used after all gives a report with `error`, and publishes nothing. Raises StorageFull
    when the disk is; running it again, after a kill for example, gives the same.
    """
    sizes = _Sizes(limits.images)
    layout = inspect(
        archive,
        limits=limits.archive,
        image_limits=limits.images,
        kind=options.kind,
        tick=lambda read: tick(_INSPECTED * read),
        on_picture=sizes.measure,
    )
    packed_bytes = sizes.packed_bytes(layout.pictures)
    # Thumbnails lie beside the pixels until near copies are found.
    storage.check_room(packed_bytes + len(layout.pictures) * THUMBNAIL_SIDE**2 * 3)
    state_size(packed_bytes)
    with storage.staging() as staged:
        staged.mkdir()
        images, unreadable = _pack_all(
            archive, layout, staged, storage=storage, limits=limits, decoders=decoders, tick=tick
        )
        rejected = [*layout.rejected, *unreadable]
        is_labelled = options.kind == "labelled"
        try:
            if is_labelled:
                check(layout, [image.picture for image in images])
            else:
                check_enough(len(images))
        except ArchiveRefused as error:
            records = _records(layout, images, [image.picture.split or "train" for image in images])
            return _report(layout, records, rejected, warnings=[], error=error)

        groups = group_near_copies(_fingerprints(images, staged), tick=lambda: tick(_DECODED))
        tick(_DECODED)
        splits: Sequence[Split] = ["train"] * len(images)
        if is_labelled:
            splits = _splits(layout, images, groups, options)
        records = _records(layout, images, splits)
        warnings = _warnings(layout, records, groups) if is_labelled else []
        if is_labelled and "val" not in splits:
            return _report(layout, records, rejected, warnings=warnings, error=_no_validation(layout))

        Manifest(layout.classes, records, layout.tasks).write(staged / "manifest.jsonl")
        # The manifest last: where it is, everything is.
        storage.publish(staged / "packed", packed_key(dataset_id, PACKED_SIDE))
        storage.publish(staged / "manifest.jsonl", manifest_key(dataset_id))
        return replace(
            _report(layout, records, rejected, warnings=warnings),
            packed_bytes=folder_bytes(sum(image.height * image.width * 3 for image in images), len(images)),
            groups=tuple(groups.tolist()),
        )


def ensure_packed(storage: LocalStorage, dataset_id: str, side: int, *, tick: Tick) -> PackedPixels:
    """The data set's pixels with a short side of up to `side`, made from the kept archive where they are not there.

    The archive was within the limits when it was ingested; today's may be stricter, and are for new ones.
    Raises StorageFull, and whatever tick raises.
    """
    key = packed_key(dataset_id, side)
    if not storage.exists(key):
        manifest = Manifest.read(storage.path(manifest_key(dataset_id)))
        place = {record.path: i for i, record in enumerate(manifest.records)}
        pictures = {record.path: Picture(record.path, "", None) for record in manifest.records}
        storage.check_room(_room_needed(len(pictures), side=side))
        order = np.zeros(len(place), dtype=np.int64)
        archive = storage.path(archive_key(dataset_id))
        with storage.staging() as staged, PackedWriter(staged) as writer:
            images = _decoded(archive, pictures, side=side, limits=_NO_LIMITS, tick=tick)
            for appended, image in enumerate(images):
                # The archive is the one that was ingested, so what could be read then, in a process that could have
                # been killed, can be read now.
                assert not isinstance(image, Rejected), image
                order[place[image.picture.path]] = appended
                writer.append(image.pixels)
            writer.finish(order.tolist())
            storage.publish(staged, key)
    return PackedPixels(storage.path(key))


# Decoding


_NO_LIMITS = IngestLimits(
    ArchiveLimits(
        max_unpacked_bytes=sys.maxsize,
        max_member_bytes=sys.maxsize,
        max_members=sys.maxsize,
        max_compression_ratio=math.inf,
    ),
    NO_LIMITS,
)


class _Sizes:
    """Bytes that each picture will take in the store, by its header."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._pixel_bytes: dict[str, int] = {}

    def measure(self, path: str, encoded: bytes) -> None:
        # What the header refuses is refused when it is decoded too, and then reported.
        with suppress(ImageRefused):
            self._pixel_bytes[path] = decoded_bytes(encoded, side=PACKED_SIDE, limits=self._limits)

    def packed_bytes(self, pictures: Sequence[Picture]) -> int:
        sizes = [self._pixel_bytes[picture.path] for picture in pictures if picture.path in self._pixel_bytes]
        return folder_bytes(sum(sizes), len(sizes))


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A picture in memory."""

    picture: Picture
    pixels: Pixels
    digest: str  # of the encoded picture
    fingerprint: Fingerprint


@dataclass(frozen=True, slots=True)
class _Packed:
    """A picture on disk."""

    picture: Picture
    height: int
    width: int
    digest: str
    fingerprint: Fingerprint  # without its thumbnail, which lies on disk too


def _pack_all(
    archive: Path,
    layout: Layout,
    staged: Path,
    *,
    storage: LocalStorage,
    limits: IngestLimits,
    decoders: Decoders | None,
    tick: Tick,
) -> tuple[Sequence[_Packed], Sequence[Rejected]]:
    """Packs every picture that can be read into `staged/packed`, and its thumbnail into `staged/thumbnails`.

    Returns those packed, in order of their paths, and those that cannot be read.
    """
    pictures = {picture.path: picture for picture in layout.pictures}
    images: list[_Packed] = []
    unreadable: list[Rejected] = []
    room_checked_to = 0
    decoded = _decoded(
        archive,
        pictures,
        side=PACKED_SIDE,
        limits=limits,
        decoders=decoders,
        tick=lambda read: tick(_INSPECTED + (_DECODED - _INSPECTED) * read),
    )
    with PackedWriter(staged / "packed") as writer, (staged / "thumbnails").open("wb") as thumbnails:
        for image in decoded:
            if isinstance(image, Rejected):
                unreadable.append(image)
                continue
            if writer.size_bytes >= room_checked_to:
                storage.check_room(_ROOM_CHECK_BYTES)
                room_checked_to = writer.size_bytes + _ROOM_CHECK_BYTES
            height, width, _ = image.pixels.shape
            writer.append(image.pixels)
            thumbnails.write(image.fingerprint.thumbnail.tobytes())
            kept = replace(image.fingerprint, thumbnail=_ON_DISK)
            images.append(_Packed(image.picture, height, width, image.digest, kept))
        # By path, so that labels, splits and batches do not depend on the order of the archive.
        order = sorted(range(len(images)), key=lambda i: images[i].picture.path)
        writer.finish(order)
    np.save(staged / "order.npy", np.array(order, dtype=np.int64))
    return [images[i] for i in order], unreadable


_ON_DISK = np.zeros((0, 0, 3), dtype=np.uint8)


def _fingerprints(images: Sequence[_Packed], staged: Path) -> Fingerprints:
    order = np.load(staged / "order.npy", allow_pickle=False)
    thumbnails = np.memmap(staged / "thumbnails", dtype=np.uint8, mode="r")
    return Fingerprints.of(
        [image.fingerprint for image in images],
        thumbnails=thumbnails.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3),
        rows=order,
    )


def _decoded(
    archive: Path,
    pictures: dict[str, Picture],
    *,
    side: int,
    limits: IngestLimits,
    decoders: Decoders | None = None,
    tick: Tick,
) -> Iterator[_Decoded | Rejected]:
    """Each of the pictures, in the order of the archive."""

    def decoded(encoded: bytes) -> Pixels:
        if decoders is not None:
            return decoders.decode(encoded, side=side)
        return decode(encoded, side=side, limits=limits.images)

    return each_file(
        archive,
        lambda path, encoded: _decode_one(pictures[path], encoded, decoded),
        is_wanted=pictures.__contains__,
        limits=limits.archive,
        tick=tick,
    )


def _decode_one(picture: Picture, encoded: bytes, decoded: Callable[[bytes], Pixels]) -> _Decoded | Rejected:
    try:
        pixels = decoded(encoded)
    except ImageRefused as refusal:
        return Rejected(picture.path, refusal.detail)
    return _Decoded(picture, pixels, digest_of(encoded), fingerprint(pixels))


# Comparing and splitting


def _splits(
    layout: Layout, images: Sequence[_Packed], groups: NDArray[np.int64], options: IngestOptions
) -> Sequence[Split]:
    """The archive's own splits; where it has no validation, some of the training pictures."""
    splits: list[Split] = [image.picture.split or "train" for image in images]
    if "val" in splits:
        return splits
    trained_on = [i for i, split in enumerate(splits) if split == "train"]
    is_validation = choose_validation(
        _strata([images[i].picture for i in trained_on]),
        groups=[int(groups[i]) for i in trained_on],
        digests=[images[i].digest for i in trained_on],
        fraction=options.val_fraction,
        seed=options.seed,
    )
    for i, is_chosen in zip(trained_on, is_validation.tolist(), strict=True):
        if is_chosen:
            splits[i] = "val"
    return splits


def _strata(pictures: Sequence[Picture]) -> list[int]:
    """A number for each picture: its class. Of several tasks' classes, the one with the fewest pictures (as Sechidis et
    al. 2011 stratify several labels), so that small classes of every task are on both sides."""
    named = [list(enumerate(picture.class_names or (picture.class_name,))) for picture in pictures]
    sizes = Counter(each for names in named for each in names if each[1])
    rarest = [min((each for each in names if each[1]), key=lambda each: (sizes[each], each)) for names in named]
    number = {each: i for i, each in enumerate(sorted(sizes))}
    return [number[each] for each in rarest]


def _records(layout: Layout, images: Sequence[_Packed], splits: Sequence[Split]) -> list[Record]:
    label = {name: i for i, name in enumerate(layout.classes)}
    of_tasks = [{name: i for i, name in enumerate(task.classes)} for task in layout.tasks]
    return [
        Record(
            image_id=f"img_{hashlib.sha256(image.picture.path.encode()).hexdigest()[:24]}",
            path=image.picture.path,
            label=label.get(image.picture.class_name, UNLABELLED),
            split=split,
            digest=image.digest,
            width=image.width,
            height=image.height,
            labels=[
                labels.get(name, UNLABELLED) for labels, name in zip(of_tasks, image.picture.class_names, strict=True)
            ],
        )
        for image, split in zip(images, splits, strict=True)
    ]


def _no_validation(layout: Layout) -> ArchiveRefused:
    return ArchiveRefused(
        f"In each class ({_listed(layout.classes)}) all pictures are copies of one another, or each of them lies in "
        "another class as well, so none can be kept back for validation. Add pictures that differ, and have each in "
        "one class.",
        code="no-validation-possible",
    )


def _room_needed(pictures: int, *, side: int) -> int:
    """Bytes that packing takes at most, for pictures of up to 2 to 1; what longer ones take is watched underway."""
    return pictures * side * 2 * side * 3


# Reporting


def _warnings(layout: Layout, records: Sequence[Record], groups: NDArray[np.int64]) -> list[dict[str, Any]]:
    found = []
    together: dict[int, list[Record]] = defaultdict(list)
    for record, group in zip(records, groups.tolist(), strict=True):
        together[group].append(record)
    copies = [members for members in together.values() if len(members) > 1]
    if leaked := [members for members in copies if len({member.split for member in members}) > 1]:
        found.append(
            warning(
                "duplicate_across_splits",
                f"{_counted(leaked)} on more than one side of the archive's own split, so validation is easier than "
                "it should be. Keep copies on one side.",
                _paths(leaked),
                groups=_grouped(leaked),
            )
        )
    if contradicting := [members for members in copies if _contradict(members)]:
        found.append(
            warning(
                "conflicting_labels",
                f"{_counted(contradicting)} in more than one class. Decide for one class each.",
                _paths(contradicting),
                groups=_grouped(contradicting),
            )
        )
    for place, task in enumerate(layout.tasks or [Task("", layout.classes)]):
        labelled = [(record.split, (record.labels or [record.label])[place]) for record in records]
        warnings = _count_warnings(task.classes, Counter(labelled))
        if task.name:
            warnings = [each | {"detail": f"Of the task {shown(task.name)}: {each['detail']}"} for each in warnings]
        found = merged(found, warnings)
    return found


def _contradict(members: Sequence[Record]) -> bool:
    """Whether labels of one task differ; one that is missing contradicts nothing."""
    of_tasks = zip(*(member.labels or [member.label] for member in members), strict=True)
    return any(len(set(labels) - {UNLABELLED}) > 1 for labels in of_tasks)


def _count_warnings(classes: Sequence[str], counts: Mapping[tuple[Split, int], int]) -> list[dict[str, Any]]:
    found = []
    validated = [counts["val", label] for label in range(len(classes))]
    trained = [counts["train", label] for label in range(len(classes))]
    if without := [name for name, count in zip(classes, trained, strict=True) if count == 0]:
        found.append(warning("class_without_training", f"No training pictures in {_listed(without)}: not learnt."))
    if without := [name for name, count in zip(classes, validated, strict=True) if count == 0]:
        found.append(
            warning(
                "class_without_validation", f"No validation pictures in {_listed(without)}: its quality is unknown."
            )
        )
    if sum(validated) < SMALL_VALIDATION:
        found.append(
            warning(
                "small_validation",
                f"Only {sum(validated)} pictures are for validation, so accuracies are rough estimates. "
                f"Add pictures: {SMALL_VALIDATION} or more are better.",
            )
        )
    fewest, most = min(trained), max(trained)
    if most >= STRONG_IMBALANCE * fewest:
        found.append(
            warning(
                "class_imbalance",
                f"{shown(classes[trained.index(most)])} has {most} training pictures and "
                f"{shown(classes[trained.index(fewest)])} only {fewest}. Add pictures to the small classes, or "
                'train with "class_weights": "balanced".',
            )
        )
    return found


def _counted(groups: Sequence[Sequence[Record]]) -> str:
    return "A picture and its near copies are" if len(groups) == 1 else f"{len(groups)} pictures and near copies are"


def _paths(groups: Sequence[Sequence[Record]]) -> list[str]:
    return [path for members in _grouped(groups) for path in members]


def _grouped(groups: Sequence[Sequence[Record]]) -> list[list[str]]:
    return [[record.path for record in members] for members in groups]


def _listed(names: Sequence[str]) -> str:
    return listed([shown(name) for name in names], most=10)


def _report(
    layout: Layout,
    records: Sequence[Record],
    rejected: Sequence[Rejected],
    *,
    warnings: list[dict[str, Any]],
    error: ArchiveRefused | None = None,
) -> IngestReport:
    def counted(classes: Sequence[str], labelled: Sequence[tuple[Split, int]]) -> list[dict[str, Any]]:
        counts = Counter(labelled)
        return [
            {"name": name, **{split: counts[split, label] for split in SPLITS}} for label, name in enumerate(classes)
        ]

    return IngestReport(
        num_images=len(records),
        num_rejected=len(rejected),
        splits={split: sum(record.split == split for record in records) for split in SPLITS},
        classes=counted(layout.classes, [(record.split, record.label) for record in records]),
        tasks=[
            {
                "name": task.name,
                "classes": counted(task.classes, [(record.split, record.labels[place]) for record in records]),
            }
            for place, task in enumerate(layout.tasks)
        ],
        rejected=[{"path": each.path, "reason": each.reason} for each in rejected[:MAX_LISTED_REJECTED]],
        warnings=warnings,
        error=error,
    )
