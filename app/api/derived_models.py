"""Models that are made from another one without a job: stored whole, then registered, with the other as `parent`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from safetensors import SafetensorError

from app import holdings, registry
from app.api.picture_bodies import PictureBody
from app.api.schemas import Model
from app.api.services import Services
from app.datasets.manifest import digest_of
from app.db.tables import ModelRow, new_id
from app.errors import FieldError, ImageRefused, InvalidRequest, StorageFull
from app.serving.extension import Derived
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact, Saved


def publish(
    services: Services,
    derived: Derived,
    parent: ModelRow,
    *,
    role: Literal["extended", "personalised"],
    shots: Sequence[bytes],
) -> Model:
    """Files first, whole and synced; then the model's row. shots: encoded pictures that it was made of.

    Raises StorageFull where the disk does not take it, TooManyRequests where the workspace's quota does not.
    """
    model_id = new_id("mdl")
    key = f"models/{model_id}"
    made = _described(derived, model_id, parent_id=parent.id, shots=shots)

    is_kept = partial(holdings.has_row, services.database)
    with _storing(), services.storage.announced(key, is_wanted=is_kept):
        saved = _stored(services.storage, key, made, derived.evaluation)
        with services.database.write() as session:
            services.workspace.check_room(session, saved.size_bytes)
            row = registry.register(
                session,
                model_id=model_id,
                job_id=parent.job_id,
                dataset_id=parent.dataset_id,
                method=parent.method,
                backbone=parent.backbone,
                classes=made.classes,
                tasks=parent.tasks,
                metrics=derived.metrics,
                size_bytes=saved.size_bytes,
                sha256=saved.sha256,
                role=role,
                parent_id=parent.id,
            )
            return Model.of(row, aliases=[])


def open_parent(services: Services, parent: ModelRow) -> Artifact:
    """The model that another is to be made from, if the disk has room for it. Raises StorageFull, ModelUnavailable."""
    folder = services.storage.path(f"models/{parent.id}")
    # The other is as large as this one, but for a few pictures' features.
    services.storage.check_room(sum(file.stat().st_size for file in folder.glob("*")))
    return artifact.load(folder)


def encoded_pictures(body: PictureBody, *, most: int) -> list[bytes]:
    """Raises InvalidRequest for more than `most`, ImageRefused where one is no base64."""
    if len(body.pictures) > most:
        raise InvalidRequest(
            f"{len(body.pictures)} pictures are more than the {most} that one request may have.",
            errors=[FieldError("#/file", "too many")],
        )
    refused = [picture.encoded for picture in body.pictures if isinstance(picture.encoded, ImageRefused)]
    if refused:
        raise ImageRefused(
            "A picture is not valid base64.", errors=[error for refusal in refused for error in refusal.errors]
        )
    return [picture.encoded for picture in body.pictures if isinstance(picture.encoded, bytes)]


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageFull("The server could not store the model: its disk is full or failing.") from error


def _stored(storage: LocalStorage, key: str, made: Artifact, evaluation: Mapping[str, Any]) -> Saved:
    with storage.staging() as folder:
        saved = artifact.save(folder, made)
        (folder / "evaluation.json").write_text(json.dumps(evaluation, ensure_ascii=False), "utf-8")
        storage.publish(folder, key)
        return saved


def _described(derived: Derived, model_id: str, *, parent_id: str, shots: Sequence[bytes]) -> Artifact:
    """shots: kept as digests, as a manifest has them, so that the promotion gate knows what the model has seen."""
    made = derived.artifact
    digests = [digest_of(picture) for picture in shots]
    made.metadata = {
        **made.metadata,
        "model": model_id,
        "parent": parent_id,
        "shots": [*made.metadata.get("shots", []), *digests],
        "metrics": derived.metrics,
    }
    return made
