"""/v1/models/{model}/export and /card: a model as a file that runs elsewhere, and what there is to know about it."""

import base64
import json
import os
import re
from importlib.metadata import version
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from app import registry
from app.api import cards
from app.api.cards import Facts
from app.api.dataset_pictures import validation_pictures
from app.api.deps import ServicesDep
from app.api.models import ModelName
from app.api.openapi import problems
from app.api.services import Services
from app.datasets import catalog
from app.db.tables import rfc3339
from app.errors import NotFound
from app.serving.exporter import Contents, Exported
from app.vision.usage import Format

MEDIA_TYPE = "application/octet-stream"

# More digits than any file has bytes would only make slow numbers.
_ONE_RANGE = re.compile(r"bytes=(?:(?P<first>\d{1,15})-(?P<last>\d{0,15})|-(?P<tail>\d{1,15}))", re.ASCII)

router = APIRouter(tags=["models"])


@router.get(
    "/v1/models/{model}/export",
    response_class=Response,
    summary="The model as a file that runs without Graft",
    description="onnx and pt2 take decoded pictures of any size and hold preprocessing and calibration; safetensors "
    "holds the weights under torchvision's names. The file's metadata has the classes, the preprocessing, the card and "
    "the lines of Python that run it. It is made at the first request, which takes some seconds up to minutes, and "
    "handed out only if it answers the validation images as /predict does. A model without classes answers features.",
    responses={
        200: {
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            "headers": {
                "X-Graft-Verified": {
                    "description": "What was found when it was run, as JSON: pictures, source, same_label, "
                    "largest_difference, tolerance.",
                    "schema": {"type": "string"},
                }
            },
        },
        206: {"description": "The part that Range asked for."},
        304: {"description": "The file is the one that If-None-Match names."},
        **problems(404, 416, 507),
    },
)
async def export_model(
    request: Request,
    services: ServicesDep,
    model: ModelName,
    file_format: Annotated[Format, Query(alias="format", description="What kind of file.")],
) -> Response:
    model_id, stem = await run_in_threadpool(_named, services, model)
    exported = await run_in_threadpool(services.exporter.find, model_id, file_format)
    if exported is None:
        exported = await services.exporter.make(model_id, file_format, lambda: _contents(services, model_id))
    return await run_in_threadpool(_answer, request, exported, f"{stem}{exported.path.suffix}")


@router.get(
    "/v1/models/{model}/card",
    response_class=Response,
    summary="The model's card: what data, how trained, what numbers, what limits",
    responses={200: {"content": {"text/markdown": {"schema": {"type": "string"}}}}, **problems(404)},
)
def get_card(services: ServicesDep, model: ModelName) -> Response:
    return Response(cards.render(_facts(services, model)), media_type="text/markdown")


def _facts(services: Services, model: str) -> Facts:
    with services.database.read() as session:
        return cards.gather(session, services.storage, model)


def _named(services: Services, model: str) -> tuple[str, str]:
    """The model's id, and what its files are called, without an ending."""
    with services.database.read() as session:
        row = registry.find(session, model)
        try:
            return row.id, f"{catalog.find(session, row.dataset_id).name}-{row.id}"
        except NotFound:
            return row.id, row.id


def _contents(services: Services, model_id: str) -> Contents:
    """What a file says of its model, all as strings, and the pictures that it is checked on."""
    facts = _facts(services, model_id)
    model, dataset = facts.model, facts.dataset
    known: dict[str, str | None] = {
        "model": model.id,
        "job": model.job_id,
        "dataset": model.dataset_id,
        "dataset_name": dataset.name if dataset else None,
        "dataset_sha256": dataset.sha256 if dataset else None,
        "method": model.method,
        "weights": model.backbone.get("weights"),
        "weights_license": cards.weights_license(model),
        "metrics": json.dumps(model.metrics, ensure_ascii=False),
        "created_at": rfc3339(model.created_at),
        "graft_version": version("graft"),
        "card": cards.render(facts),
    }
    return Contents(
        facts={name: text for name, text in known.items() if text is not None},
        pictures=validation_pictures(model.id, services.storage),
    )


def _answer(request: Request, exported: Exported, file_name: str) -> Response:
    headers = {
        "ETag": f'"{exported.sha256}"',
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(exported.sha256)).decode()}:",
        "Content-Disposition": _disposition(file_name),
        "X-Graft-Verified": json.dumps(dict(exported.verification)),
        # A later Graft may make the same model's file anew.
        "Cache-Control": "private, no-cache",
    }
    if _is_named(headers["ETag"], request.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    try:
        stat = os.stat(exported.path)
    except FileNotFoundError:
        raise NotFound("The model was deleted a moment ago.", code="model-not-found") from None
    if request.state.is_head:
        told = {"Content-Length": str(stat.st_size), "Accept-Ranges": "bytes"}
        return Response(headers=headers | told, media_type=MEDIA_TYPE)
    _keep_one_range(request, stat.st_size, etag=headers["ETag"])
    return FileResponse(exported.path, headers=headers, media_type=MEDIA_TYPE, stat_result=stat)


def _disposition(file_name: str) -> str:
    """RFC 6266: a name in ASCII for everybody, and the whole one for those who read it."""
    name = re.sub(r"[/\\\x00-\x1f\x7f]", "_", file_name)
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"


def _is_named(etag: str, header: str) -> bool:
    named = [each.strip().removeprefix("W/") for each in header.split(",")]
    return etag in named or named == ["*"]


def _keep_one_range(request: Request, size: int, *, etag: str) -> None:
    """Passes over a Range that is not one plain part of this very file: the whole is the answer then (RFC 9110, 14.2).

    Starlette refuses such in plain text. Raises HTTPException (416) for a part behind the file's end.
    """
    asked = request.headers.get("range")
    found = _ONE_RANGE.fullmatch(asked or "")
    is_of_this = request.headers.get("if-range") in (None, etag)
    if found and is_of_this:
        first, last = found["first"], found["last"]
        if (int(first) >= size) if first else (int(found["tail"]) == 0):
            raise HTTPException(416, headers={"Content-Range": f"bytes */{size}"})
        if not last or int(first) <= int(last):
            return
    request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
