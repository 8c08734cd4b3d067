"""A model's evaluation, as the worker left it beside the weights, for callers."""

import json
from collections import defaultdict
from typing import Any

from app.api.schemas import Evaluation, thumbnail_path
from app.db.tables import ModelRow
from app.errors import Conflict, ModelUnavailable
from app.storage import LocalStorage
from app.vision.evaluate import CALIBRATION_BINS


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
    return {**shown, "mistakes": mistakes, "reliability": _reliability(record)}


def _reliability(record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Bins of the calibrated scores of what was predicted: of the right ones it is their class's own score, and each
    of the wrong ones is a mistake that has it."""
    predictions = record.get("predictions")
    if predictions is None:
        return None
    columns = (predictions[name] for name in ("true", "predicted", "probability_of_true"))
    right = [(score, 1) for true, predicted, score in zip(*columns, strict=True) if true == predicted]
    if len(right) + len(record["mistakes"]) != len(predictions["true"]):
        return None  # a wrong one without an id is no mistake that is listed
    bins: dict[int, list[tuple[float, int]]] = defaultdict(list)
    for score, is_right in [*right, *((mistake["score"], 0) for mistake in record["mistakes"])]:
        bins[min(int(score * CALIBRATION_BINS), CALIBRATION_BINS - 1)].append((score, is_right))
    return [
        {
            "low": place / CALIBRATION_BINS,
            "high": (place + 1) / CALIBRATION_BINS,
            "images": len(found),
            "confidence": sum(score for score, _ in found) / len(found),
            "accuracy": sum(is_right for _, is_right in found) / len(found),
        }
        for place, found in sorted(bins.items())
    ]
