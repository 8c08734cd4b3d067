"""GET /v1/models/{model}/export and /card: a model as a file that runs outside Graft, and as a page for people."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, PlainTextResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from app import registry
from app.api.cards import card
from app.api.deps import ServicesDep
from app.api.models import ModelName
from app.api.openapi import problems
from app.api.services import Services
from app.db.tables import DatasetRow, JobRow, ModelRow
from app.vision.export import Format

router = APIRouter(tags=["models"])

_MEDIA_TYPE = "application/octet-stream"


@router.get(
    "/v1/models/{model}/export",
    response_class=FileResponse,
    summary="The model as a file that runs outside Graft",
    description="`onnx` and `pt2` (torch.export) take decoded pictures, uint8 [n, height, width, 3] in RGB and of any "
    "size, and give calibrated probabilities: preprocessing is inside. `safetensors` has torchvision's names. Class "
    "names and everything else are in the file's metadata. The first request makes the file, which takes seconds, and "
    "compares it with the model on validation pictures; `X-Graft-Verified` says how it went.",
    responses=problems(404, 507)
    | {200: {"description": "The file.", "content": {_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def export_model(
    services: ServicesDep,
    model: ModelName,
    file_format: Annotated[Format, Query(alias="format", description="What the file is for.")],
) -> FileResponse:
    facts = await run_in_threadpool(_facts, services, model)
    found = await services.exports.get(facts.model.id, file_format, _metadata(facts))
    verified = {
        "pictures": found.verified_on,
        "of": "random noise" if found.are_made_up else "the validation pictures",
        "max_difference": found.max_difference,
    }
    return FileResponse(
        found.path,
        media_type=_MEDIA_TYPE,
        filename=f"{facts.model.id}.{file_format}",
        headers={"ETag": f'"{found.sha256}"', "X-Graft-Verified": json.dumps(verified)},
    )


@router.get(
    "/v1/models/{model}/card",
    response_class=PlainTextResponse,
    summary="The model card: data, training, figures and limits, in Markdown",
    responses=problems(404)
    | {200: {"description": "The card.", "content": {"text/markdown": {"schema": {"type": "string"}}}}},
)
def get_card(services: ServicesDep, model: ModelName) -> PlainTextResponse:
    facts = _facts(services, model)
    return PlainTextResponse(facts.card, media_type="text/markdown; charset=utf-8")


@dataclass(frozen=True)
class _Facts:
    model: ModelRow
    card: str


def _facts(services: Services, name: str) -> _Facts:
    with services.database.read() as session:
        model = registry.find(session, name)
        dataset = session.scalar(select(DatasetRow).where(DatasetRow.id == model.dataset_id))
        job = session.scalar(select(JobRow).where(JobRow.id == model.job_id))
    return _Facts(model, card(model, dataset, _evaluation(services, model), job.spec if job else {}))


def _evaluation(services: Services, model: ModelRow) -> dict[str, Any]:
    try:
        found = json.loads(services.storage.path(f"models/{model.id}/evaluation.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "per_class" in found else {}


def _metadata(facts: _Facts) -> dict[str, str]:
    model = facts.model
    return {
        "model": model.id,
        "dataset": model.dataset_id,
        "method": model.method,
        "metrics": json.dumps(model.metrics, ensure_ascii=False),
        "created_at": model.created_at.isoformat(),
        "card": facts.card,
    }
