"""/models: how good one is, where it errs, and which one answers."""

import sys
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from app.api import jobs, models
from app.api.deps import After, ServicesDep
from app.api.schemas import Alias, AliasRequest, Evaluation, Model, SplitEvaluation, thumbnail_path
from app.api.services import Services
from app.datasets.manifest import Record
from app.errors import Conflict, InvalidRequest, ModelUnavailable, NotFound
from app.registry import DEFAULT_ALIAS
from app.web import figures
from app.web.datasets import dataset_names
from app.web.site import PageId, go_to, page

PAGE_SIZE = 50
# More cells cannot be read on any screen; the classes most often confused are shown then.
CLASSES_IN_MATRIX = 20
MISTAKES_SHOWN = 24
PICTURES_IN_CELL = 60
CLASSES_LISTED = 200

router = APIRouter(prefix="/models", include_in_schema=False)


@dataclass(frozen=True)
class CellPicture:
    path: str
    thumbnail: str
    score: float | None  # of the predicted class; None for one that is right


@router.get("")
def list_page(request: Request, services: ServicesDep, after: After = None) -> Response:
    found = models.list_models(services, limit=PAGE_SIZE, after=after)
    template = "model_rows.html" if after else "models.html"
    names = dataset_names(services, [each.dataset for each in found.data])
    return page(request, template, listing=found, names=names, default=_alias(services))


@router.get("/{model}")
def model_page(
    request: Request,
    services: ServicesDep,
    model: PageId,
    task: Annotated[str | None, Query(max_length=255)] = None,
) -> Response:
    found = models.get_model(services, model)
    evaluation, why_not = _evaluation(services, found.id)
    chosen = _of_task(evaluation, task)
    is_first = not task or task in [each.name for each in found.tasks[:1]]  # which alone has a forecast
    forecast = evaluation.forecast if evaluation and is_first else None
    return page(
        request,
        "model.html",
        model=found,
        names=dataset_names(services, [found.dataset]),
        default=_alias(services),
        evaluation=evaluation,
        why_not=why_not,
        task=task or "",
        shown=chosen,
        matrix=figures.matrix(chosen, most=CLASSES_IN_MATRIX) if chosen else None,
        reliability=figures.reliability(chosen.reliability) if chosen and chosen.reliability else None,
        forecast=figures.forecast(forecast, found.metrics) if forecast else None,
        worst_classes=figures.worst_first(chosen.per_class)[:CLASSES_LISTED] if chosen else [],
        mistakes=chosen.mistakes[:MISTAKES_SHOWN] if chosen else [],
        has_job=_has_job(services, found),
    )


@router.get("/{model}/cell")
def cell_fragment(
    request: Request,
    services: ServicesDep,
    model: PageId,
    true: Annotated[str, Query(max_length=1000)],
    predicted: Annotated[str, Query(max_length=1000)],
    task: Annotated[str | None, Query(max_length=255)] = None,
) -> Response:
    """The pictures of one cell of the confusion matrix."""
    found = models.get_model(services, model)
    chosen = _of_task(models.get_evaluation(services, found.id), task)
    if chosen is None or {true, predicted} - set(chosen.classes):
        raise NotFound("The model has no such cell; reload its page.")
    count = chosen.confusion_matrix[chosen.classes.index(true)][chosen.classes.index(predicted)]
    if true == predicted:
        shown = _right(services, found, chosen, true, task=task)
    else:
        of_cell = [each for each in chosen.mistakes if (each.true, each.predicted) == (true, predicted)]
        shown = [CellPicture(each.path, each.thumbnail, each.score) for each in of_cell[:PICTURES_IN_CELL]]
    # Not named `true`, which is a word of the templates' own.
    return page(request, "model_cell.html", true_name=true, predicted_name=predicted, count=count, pictures=shown)


@router.post("/{model}/promote")
async def promote(request: Request, services: ServicesDep, model: PageId) -> Response:
    await models.put_alias(services, DEFAULT_ALIAS, AliasRequest(model=model))
    return go_to(request, f"/models/{model}")


@router.post("/aliases/{name}/rollback")
async def roll_back(request: Request, services: ServicesDep, name: Annotated[str, Path(max_length=100)]) -> Response:
    alias = await models.roll_back_alias(services, name)
    return go_to(request, f"/models/{alias.model}")


@router.post("/{model}/delete")
async def delete(request: Request, services: ServicesDep, model: PageId) -> Response:
    await models.delete_model(services, model)
    return go_to(request, "/models")


def _evaluation(services: Services, model_id: str) -> tuple[Evaluation | None, str | None]:
    """The evaluation, or why there is none: a backbone has no classes."""
    try:
        return models.get_evaluation(services, model_id), None
    except (Conflict, ModelUnavailable) as error:
        return None, error.detail


def _of_task(evaluation: Evaluation | None, task: str | None) -> SplitEvaluation | None:
    if evaluation is None or not task:
        return evaluation
    if task not in (evaluation.tasks or {}):
        raise InvalidRequest("The model tells nothing of this name.")
    return (evaluation.tasks or {})[task]


def _right(
    services: Services, model: Model, shown: SplitEvaluation, name: str, *, task: str | None
) -> list[CellPicture]:
    """Validation pictures of the class that are no mistakes; none where the data set is gone."""
    wrong = {mistake.path for mistake in shown.mistakes}
    passed_over = wrong | _excluded(services, model)
    enough = PICTURES_IN_CELL + len(passed_over)
    try:
        of_class = _of_class_in_task(services, model, name, task) if task else _of_class(services, model, name, enough)
    except NotFound:
        return []
    right = [record for record in of_class if record.path not in passed_over]
    return [
        CellPicture(record.path, thumbnail_path(model.dataset, record.image_id), None)
        for record in right[:PICTURES_IN_CELL]
    ]


def _of_class(services: Services, model: Model, name: str, most: int) -> list[Record]:
    found, _ = services.pictures.page(model.dataset, class_name=name, split="val", limit=most, after=None)
    return [record for record, _ in found]


def _of_class_in_task(services: Services, model: Model, name: str, task: str) -> list[Record]:
    """All of them: a data set's pictures can be asked for by the classes of its first task alone."""
    place = [each.name for each in model.tasks].index(task)
    label = model.tasks[place].classes.index(name)
    found, _ = services.pictures.page(model.dataset, class_name=None, split="val", limit=sys.maxsize - 1, after=None)
    return [record for record, _ in found if record.labels[place] == label]


def _excluded(services: Services, model: Model) -> set[str]:
    """Pictures that its job left out; unknown where the job was deleted."""
    try:
        return set(jobs.read_job(services, model.job).spec.get("exclude") or [])
    except NotFound:
        return set()


def _alias(services: Services) -> Alias | None:
    return next((alias for alias in models.list_aliases(services).data if alias.name == DEFAULT_ALIAS), None)


def _has_job(services: Services, model: Model) -> bool:
    try:
        jobs.read_job(services, model.job)
    except NotFound:
        return False
    return True
