"""A job's request with what this server knows - its data, weights, earlier models, device - resolved to a spec."""

import json

from sqlalchemy.orm import Session

from app import registry
from app.api.schemas import Backbone, Estimate
from app.db.tables import DatasetRow
from app.errors import ModelUnavailable
from app.jobs import estimate as estimates
from app.jobs import spec
from app.jobs.spec import DatasetFacts, JobRequest, StartingModel, TrainingSpec
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.artifact import MODEL_FILE
from app.vision.backbones import ALIASES, BACKBONES
from app.vision.device import resolve_device
from app.vision.preprocessing import Preprocessing
from app.vision.weights import WeightStore

MODEL_ID_PREFIX = "mdl_"


def resolve(
    session: Session,
    request: JobRequest,
    *,
    dataset: DatasetRow,
    settings: Settings,
    storage: LocalStorage,
    weights: WeightStore,
) -> TrainingSpec:
    """Every value of the job. Raises what `spec.resolve` does, and NotFound for a model that does not exist."""
    starting_model = None
    if request.backbone.startswith(MODEL_ID_PREFIX):
        starting_model = _starting_model(session, request.backbone, storage)
    return spec.resolve(
        request,
        dataset=DatasetFacts.from_counts(dataset.classes),
        weights=_weights_at_hand(request, weights),
        device_type=resolve_device(settings.device).type,
        starting_model=starting_model,
    )


def estimate(session: Session, job: TrainingSpec, *, dataset: DatasetRow, settings: Settings) -> Estimate:
    """What the job would take on this server's device."""
    device = resolve_device(settings.device)
    found = estimates.estimate(
        job,
        dataset=DatasetFacts.from_counts(dataset.classes),
        speed=estimates.measure(device),
        device_type=device.type,
        past=estimates.past_speeds(session),
    )
    return Estimate(seconds=found.seconds, peak_memory_bytes=found.peak_memory_bytes)


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
        )
        for name, backbone in BACKBONES.items()
    ]


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
        description = json.loads(storage.path(f"models/{row.id}/{MODEL_FILE}").read_bytes())
        preprocessing = Preprocessing.from_dict(description["preprocessing"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(
            "The model to start from cannot be read: its description is missing or damaged. Start from another one."
        ) from error
    return StartingModel(model_id=row.id, backbone_name=row.backbone["name"], preprocessing=preprocessing)
