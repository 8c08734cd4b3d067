"""A model's evaluation, as the worker left it beside the weights, for callers."""

import json
from typing import Any

from app.api.schemas import Evaluation, thumbnail_path
from app.db.tables import ModelRow
from app.errors import Conflict, ModelUnavailable
from app.storage import LocalStorage


def check_predicts(model: ModelRow) -> None:
    """Raises Conflict for a backbone, which has no classes."""
    if not model.classes:
        raise Conflict(
            f'This model is a backbone without classes. Start a job from it: "backbone": "{model.id}" to /v1/jobs.',
            code="not-a-classifier",
        )


def read_evaluation(model: ModelRow, storage: LocalStorage) -> Evaluation:
    """Raises ModelUnavailable if it is missing or damaged."""
    try:
        stored = json.loads(storage.path(f"models/{model.id}/evaluation.json").read_bytes())
        record = _with_thumbnails(stored, model.dataset_id)
        if "tasks" in stored:
            record["tasks"] = {
                name: _with_thumbnails(task, model.dataset_id) for name, task in stored["tasks"].items() if task
            }
        return Evaluation.model_validate({**record, "model": model.id, "dataset": model.dataset_id})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable("The model's evaluation is missing or damaged; train it again.") from error


def _with_thumbnails(record: dict[str, Any], dataset_id: str) -> dict[str, Any]:
    """Without `predictions`: a line for each image, kept for comparing models and not for callers."""
    mistakes = [
        {**mistake, "thumbnail": thumbnail_path(dataset_id, mistake["image_id"])} for mistake in record["mistakes"]
    ]
    shown = {name: value for name, value in record.items() if name != "predictions"}
    if record.get("test"):
        shown["test"] = _with_thumbnails(record["test"], dataset_id)
    return {**shown, "mistakes": mistakes}
