"""What POST /predict says of one picture: its scores, and where the model has the statistics, how far to trust them.

The numbers come from `app.serving.insight`; here they become the members of an answer.
"""

import base64
from dataclasses import asdict
from typing import Any

from app.api.problems import pointer_to
from app.api.schemas import (
    DEFAULT_TOP_K,
    Adaptation,
    ClassScore,
    Coverage,
    Neighbor,
    Prediction,
    PredictOptions,
    TaskPrediction,
    thumbnail_path,
)
from app.errors import Conflict, FieldError, InvalidRequest
from app.serving.adaptation import Plan
from app.serving.insight import Insight, insight, largest_coverage
from app.serving.loaded import LoadedModel
from app.serving.scores import Adapted, Scores
from app.vision.reference import Neighbour


def check_has_reference(loaded: LoadedModel, options: PredictOptions) -> None:
    """Raises Conflict where something is asked for that the model has no statistics for."""
    asked = [name for name in ("coverage", "neighbors") if getattr(options, name) is not None]
    lacks = loaded.reference is None
    if options.adapt == "neighbors":
        asked.append("adapt=neighbors")
        lacks = loaded.reference is None or loaded.reference.lengths is None
    if asked and lacks:
        raise Conflict(
            f"This model was made without the statistics that {' and '.join(asked)} need: by an earlier version of "
            "Graft, or on a single validation picture. Train it again.",
            code="no-statistics",
        )


def plan_of(options: PredictOptions) -> Plan | None:
    """None where nothing is to be adapted. Raises InvalidRequest for what does not go together."""
    given = {name: getattr(options, f"adapt_{name}") for name in ("parameters", "steps", "learning_rate")}
    if options.adapt is None:
        lost = [f"adapt_{name}" for name, value in given.items() if value is not None]
        if lost:
            detail = "means nothing without adapt=neighbors or adapt=entropy"
            raise InvalidRequest(
                f"{', '.join(lost)} {detail}.", errors=[FieldError(pointer_to(name), detail) for name in lost]
            )
        return None
    try:
        return Plan.of(options.adapt, **given)
    except ValueError as error:
        raise InvalidRequest(f"{error}.", errors=[FieldError("#/adapt_parameters", str(error))]) from None


def coverage_of(loaded: LoadedModel, options: PredictOptions) -> Coverage | None:
    """None where no coverage is asked for."""
    if options.coverage is None or loaded.reference is None:
        return None
    images = min(map(len, loaded.reference.errors))
    return Coverage(asked=options.coverage, images=images, largest=largest_coverage(images))


def answer(
    own: Scores,
    loaded: LoadedModel,
    options: PredictOptions,
    *,
    adapted: Adapted | None,
    filename: str | None,
    explanation: bytes | None,
) -> Prediction:
    """own: the model's own scores; adapted: those of a copy, which are answered in their place. explanation: a PNG.

    What is held against the model's statistics is its own: they are of no copy.
    """
    found = _insight(own, loaded, options)
    scores = adapted.scores if adapted else own
    top_k = options.top_k or DEFAULT_TOP_K
    tasks = {task: TaskPrediction(**_best(of_task, top_k, found, task)) for task, of_task in scores.tasks.items()}
    return Prediction(
        filename=filename,
        **_best(scores, top_k, found, loaded.outputs[0].name),
        tasks=tasks or None,
        in_distribution=found and found.in_distribution,
        ood_score=found and found.ood_score,
        neighbors=[_neighbor(each, loaded) for each in found.neighbours] if found and options.neighbors else None,
        adaptation=adapted and _adaptation(adapted, own),
        explanation=None if explanation is None else f"data:image/png;base64,{base64.b64encode(explanation).decode()}",
    )


def _adaptation(adapted: Adapted, own: Scores) -> Adaptation:
    ((label, score),) = own.top(1)
    return Adaptation(
        **asdict(adapted.plan),
        share=adapted.share,
        before=ClassScore(label=label, score=score),
        seconds=round(adapted.seconds, 4),
    )


def _insight(scores: Scores, loaded: LoadedModel, options: PredictOptions) -> Insight | None:
    reference, neighbours = loaded.reference, options.neighbors or 0
    if reference is None:
        return None
    return insight(scores, reference, loaded.outputs, coverage=options.coverage, neighbours=neighbours)


def _best(scores: Scores, top_k: int, found: Insight | None, task: str) -> dict[str, Any]:
    return scores.told(top_k) | {"prediction_set": found and found.prediction_sets.get(task)}


def _neighbor(neighbour: Neighbour, loaded: LoadedModel) -> Neighbor:
    image_id, path = neighbour.image or (None, None)
    dataset_id = loaded.dataset_id
    names = {
        output.name: output.classes[label] if label >= 0 else None
        for output, label in zip(loaded.outputs, neighbour.labels, strict=True)
    }
    return Neighbor(
        id=image_id,
        path=path,
        label=names[loaded.outputs[0].name],
        tasks=names if len(names) > 1 else None,
        similarity=neighbour.similarity,
        thumbnail=thumbnail_path(dataset_id, image_id) if dataset_id and image_id else None,
    )
