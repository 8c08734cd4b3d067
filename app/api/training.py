"""A job's request with what this server knows - its data, weights, earlier models, device - resolved to a spec."""

from collections.abc import Sequence
from dataclasses import replace

import structlog
from sqlalchemy.orm import Session

from app import registry
from app.api.schemas import Backbone, Estimate
from app.datasets.ingest import manifest_key
from app.datasets.manifest import Manifest
from app.db.tables import DatasetRow
from app.errors import FieldError, InvalidRequest, ModelUnavailable, NotFound
from app.jobs import estimate as estimates
from app.jobs import spec
from app.jobs.request import BACKBONE_METHODS, JobRequest
from app.jobs.spec import ClassFacts, DatasetFacts, StartingModel, TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.artifact import read_preprocessing
from app.vision.backbones import ALIASES, BACKBONES
from app.vision.device import resolve_device
from app.vision.weights import WeightStore

MODEL_ID_PREFIX = "mdl_"
# An answer that points at more than these is not read.
MAX_LISTED_ERRORS = 20
# Older ones can be started from as well; GET /v1/models lists them.
MAX_MADE_BACKBONES = 100

log = structlog.get_logger(__name__)


def resolve(
    session: Session,
    request: JobRequest,
    *,
    dataset: DatasetRow,
    settings: Settings,
    storage: LocalStorage,
    weights: WeightStore,
) -> TrainingSpec:
    """Every value of the job.

    Raises what `spec.resolve` does, NotFound for a model that does not exist, and InvalidRequest for images to exclude
    that the data set does not have, or cannot do without.
    """
    facts = _facts(dataset, request.exclude, storage)
    starting_model = None
    if request.backbone.startswith(MODEL_ID_PREFIX):
        starting_model = _starting_model(session, request.backbone, storage)
    return spec.resolve(
        request,
        dataset=facts,
        weights=_weights_at_hand(request, weights),
        device_type=resolve_device(settings.device).type,
        starting_model=starting_model,
    )


def estimate(
    session: Session, job: TrainingSpec, *, dataset: DatasetRow, settings: Settings, storage: LocalStorage
) -> Estimate:
    """What the job would take on this server's device."""
    device = resolve_device(settings.device)
    found = estimates.estimate(
        job,
        dataset=_facts(dataset, job.exclude, storage),
        speed=estimates.measure(device),
        device_type=device.type,
        past=estimates.past_speeds(session),
    )
    return Estimate(seconds=found.seconds, seconds_range=found.seconds_range, peak_memory_bytes=found.peak_memory_bytes)


def list_backbones(weights: WeightStore) -> list[Backbone]:
    available = weights.availabilities()
    return [
        Backbone(
            name=name,
            parameters=backbone.parameters,
            image_size=backbone.preprocessing.crop,
            weights=[published.name for published in backbone.weights],
            available=available[name] or "download",
            is_obtainable=available[name] is not None,
            license=backbone.license,
            architecture=backbone.architecture,
        )
        for name, backbone in BACKBONES.items()
    ]


def made_backbones(session: Session, storage: LocalStorage) -> list[Backbone]:
    """Models that were trained here to be started from, newest first; without those whose files are damaged."""
    found = []
    for row in registry.list_of_methods(session, BACKBONE_METHODS, limit=MAX_MADE_BACKBONES):
        try:
            start = _starting_model(session, row.id, storage)
        except ModelUnavailable as error:
            log.warning("backbone_unreadable", model=row.id, error=error.detail)
            continue
        backbone = BACKBONES[start.backbone_name]
        found.append(
            Backbone(
                name=row.id,
                parameters=backbone.parameters,
                image_size=start.preprocessing.crop,
                weights=[],
                available="local",
                is_obtainable=True,
                license="Yours, as far as your pictures, and the weights that it began from, allow.",
                architecture=backbone.architecture,
                method=row.method,
            )
        )
    return found


def _facts(dataset: DatasetRow, exclude: Sequence[str], storage: LocalStorage) -> DatasetFacts:
    """The images that a job has. Reads the data set's manifest only where some are left out."""
    if not exclude:
        return DatasetFacts.from_counts(dataset.classes, tasks=dataset.tasks, splits=dataset.splits)
    manifest = _manifest(dataset.id, storage)
    _check_known(exclude, manifest)
    before, left = _counted(manifest, frozenset()), _counted(manifest, frozenset(exclude))
    pairs = [
        pair
        for was, now in zip((before.classes, *before.further), (left.classes, *left.further), strict=True)
        for pair in zip(was, now, strict=True)
    ]
    emptied = [now.name for was, now in pairs if was.train and not now.train]
    if emptied:
        raise _cannot_exclude([f"leaves no training image of {name}" for name in emptied])
    if before.train and not left.train:
        raise _cannot_exclude(["leaves no image"])
    if before.val and not left.val:
        raise _cannot_exclude(["leaves no validation image"])
    return left


def _manifest(dataset_id: str, storage: LocalStorage) -> Manifest:
    try:
        return Manifest.read(storage.path(manifest_key(dataset_id)))
    except (OSError, ValueError, KeyError, TypeError) as error:  # deleted a moment ago, or damaged
        raise NotFound(
            "The data set's files are missing or damaged; delete it and upload it again.", code="dataset-unreadable"
        ) from error


def _check_known(exclude: Sequence[str], manifest: Manifest) -> None:
    known = {record.path for record in manifest.records}
    unknown = [place for place, path in enumerate(exclude) if path not in known]
    if unknown:
        raise InvalidRequest(
            f"exclude: the data set has no image at {len(unknown)} of the {len(exclude)} paths. Give paths within the "
            "archive, as GET /v1/datasets/{id}/images lists them.",
            errors=[
                FieldError(f"#/exclude/{place}", "no such image in the data set")
                for place in unknown[:MAX_LISTED_ERRORS]
            ],
        )


def _counted(manifest: Manifest, exclude: frozenset[str]) -> DatasetFacts:
    facts = []
    for place, task in enumerate(manifest.each_task):
        train, val = (manifest.counts(split, exclude=exclude, task=place).tolist() for split in ("train", "val"))
        facts.append(tuple(ClassFacts(*row) for row in zip(task.classes, train, val, strict=True)))
    labelled = DatasetFacts(facts[0], further=tuple(facts[1:]))
    return replace(
        labelled,
        unlabelled=len(manifest.indices("train", exclude=exclude)) - labelled.train,
        val_unlabelled=len(manifest.indices("val", exclude=exclude)) - labelled.val,
    )


def _cannot_exclude(details: list[str]) -> InvalidRequest:
    listed = details[:MAX_LISTED_ERRORS]
    return InvalidRequest(
        f"exclude: {'; '.join(listed[:3])}. Exclude fewer images, or upload the data set without them.",
        errors=[FieldError("#/exclude", detail) for detail in listed],
    )


def _weights_at_hand(request: JobRequest, weights: WeightStore) -> dict[str, str]:
    """Backbone → name of its weights that can be had. Only what the request may use is looked for on the network."""
    named = ALIASES.get(request.backbone, request.backbone)
    if request.backbone == "auto":
        names = [name for name, available in weights.availabilities().items() if available is not None]
    elif named in BACKBONES and request.method != "from_scratch":
        names = [named] if weights.availability(named) is not None else []
    else:
        names = []
    return {name: weights.expected(name).name for name in names}


def _starting_model(session: Session, model_id: str, storage: LocalStorage) -> StartingModel:
    row = registry.find(session, model_id)
    try:
        preprocessing = read_preprocessing(storage.path(f"models/{row.id}"))
    except ModelUnavailable as error:
        raise ModelUnavailable(
            "The model to start from cannot be read: its description is missing or damaged. Start from another one."
        ) from error
    return StartingModel(model_id=row.id, backbone_name=row.backbone["name"], preprocessing=preprocessing)
