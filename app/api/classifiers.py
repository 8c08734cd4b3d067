"""What the protocols of other systems' clients share: a classifier by its name, and the scores of its pictures."""

from collections.abc import Sequence

from app import registry
from app.api.evaluation import check_predicts
from app.api.services import Services
from app.db.tables import ModelRow
from app.errors import ImageRefused, TooLarge
from app.serving.loaded import LoadedModel
from app.serving.scores import Scores


def find_classifier(services: Services, name: str) -> ModelRow:
    """name: a model's id or alias. Raises NotFound, or Conflict for a backbone."""
    with services.database.read() as session:
        row = registry.find(session, name)
    check_predicts(row)
    return row


def refuse_large_single(pictures: Sequence[bytes | ImageRefused], max_bytes: int) -> None:
    """One picture that is too large is a request that is too large; within a batch it fails in its own place."""
    single = pictures[0] if len(pictures) == 1 else b""
    if isinstance(single, bytes) and len(single) > max_bytes:
        raise TooLarge(f"The picture is larger than the {max_bytes:,} bytes that are read here; send a smaller one.")


async def model_id_of(services: Services, name: str) -> str:
    """The id alone, remembered until something changes. name and errors as above."""
    return await services.remembered.get(
        ("model", services.workspace.id, name), lambda: find_classifier(services, name).id
    )


async def loaded_of(services: Services, name: str) -> LoadedModel:
    """Ready for use. Who resolves a name once, and holds what it led to, is not lost when the name moves and the model
    is deleted. name and errors as above; raises ModelUnavailable if its files cannot be used."""
    return await services.predictor.load(await model_id_of(services, name))


async def scores_of(services: Services, model: LoadedModel, pictures: Sequence[bytes]) -> list[Scores | ImageRefused]:
    """As `Predictor.predict`, counted. Raises TooLarge for a single picture that is."""
    refuse_large_single(pictures, services.settings.max_image_bytes)
    with services.traffic.predicting(services.workspace, len(pictures)):
        outcomes = await services.predictor.predict(model, pictures)
    refused = sum(isinstance(outcome, ImageRefused) for outcome in outcomes)
    services.metrics.count_predictions(answered=len(outcomes) - refused, refused=refused)
    return outcomes
