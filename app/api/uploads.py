"""/v1/uploads: a data set's archive in pieces, by tus 1.0.0, so that a cut connection costs what was on its way."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, Literal, Self

import anyio
from fastapi import APIRouter, Path, Request
from pydantic import Field
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app.api import tus
from app.api.archive_uploads import BINARY, publish_and_create
from app.api.datasets import UploadOptions, archive_use, printable_base
from app.api.deps import ServicesDep, Wait, refuse_declared_size, wait_until
from app.api.failures import answer
from app.api.openapi import problems
from app.api.problems import Problem
from app.api.schemas import JsonObject, Schema
from app.api.services import Services
from app.api.tus import TusResumable, UploadChecksum, UploadLength, UploadMetadata, UploadOffset
from app.api.upload_endings import complete, expires_at, find
from app.datasets import partial, uploads
from app.datasets.partial import Arrival, Checksum, PartialFile
from app.datasets.upload import StagedUpload
from app.db.tables import UploadRow, new_id
from app.errors import ArchiveRefused, Conflict, GraftError, InvalidRequest, NotFound, TooLarge

router = APIRouter(tags=["resumable uploads"])

UploadId = Annotated[str, Path(max_length=100)]

_PIECE = {"description": "The next bytes of the archive.", "content": {tus.PIECE: BINARY}}
_DATASET = {"Graft-Dataset": {"description": "The data set, once there is one.", "schema": {"type": "string"}}}
_NUMBER = {"schema": {"type": "integer"}}
_TEXT = {"schema": {"type": "string"}}


class Upload(Schema):
    id: str
    object: Literal["upload"] = "upload"
    status: Literal["uploading", "checking", "finished", "refused"] = Field(
        description="checking: whole, and being looked through. finished: `dataset` is there. refused: see `error`."
    )
    offset: int = Field(description="Bytes that have arrived, and will be there after a crash.")
    length: int = Field(description="Bytes of the whole archive.")
    filename: str | None
    name: str = Field(description="The data set's.")
    kind: Literal["labelled", "unlabelled"]
    val_fraction: float
    seed: int
    dataset: str | None = Field(description="What it became.")
    error: JsonObject | None = Field(description="Why it was refused, as a problem.")
    created_at: datetime
    expires_at: datetime = Field(description="When it is forgotten if no further piece comes.")

    @classmethod
    def of(cls, row: UploadRow, *, offset: int, expires_at: datetime) -> Self:
        while_open = "checking" if offset == row.size_bytes else "uploading"
        return cls(
            id=row.id,
            status=while_open if row.status == "open" else row.status,
            offset=offset,
            length=row.size_bytes,
            filename=row.filename,
            **row.options,
            dataset=row.dataset_id,
            error=row.error,
            created_at=row.created_at,
            expires_at=expires_at,
        )


@router.options(
    "/v1/uploads",
    status_code=204,
    summary="What the server can do of tus",
    responses={
        204: {
            "headers": dict.fromkeys(("Tus-Version", "Tus-Extension", "Tus-Max-Size", "Tus-Checksum-Algorithm"), _TEXT)
        }
    },
)
async def tell_capabilities(services: ServicesDep) -> Response:
    headers = {
        "Tus-Extension": tus.EXTENSIONS,
        "Tus-Max-Size": str(services.settings.max_upload_bytes),
        "Tus-Checksum-Algorithm": ",".join(tus.CHECKSUM_ALGORITHMS),
    }
    return Response(status_code=204, headers=headers)


@router.post(
    "/v1/uploads",
    response_model=Upload,
    status_code=201,
    summary="Begin a resumable upload of a data set",
    description="Answers where to send the archive's pieces. The first one may come in the body, as "
    f"`{tus.PIECE}`; if that is all of it, what PATCH says of the last piece holds. A problem has `Location` and "
    "`Upload-Offset` too where the upload can be gone on with; otherwise nothing stays.",
    responses={
        201: {"headers": {"Location": _TEXT, "Upload-Offset": _NUMBER, "Upload-Expires": _TEXT, **_DATASET}},
        **problems(400, 408, 409, 412, 413, 423, 460, 507),
    },
    openapi_extra={"requestBody": {**_PIECE, "required": False}},
)
async def begin_upload(
    request: Request,
    services: ServicesDep,
    tus_resumable: TusResumable = None,
    upload_length: UploadLength = None,
    upload_metadata: UploadMetadata = None,
    upload_checksum: UploadChecksum = None,
) -> Response:
    tus.check_version(tus_resumable)
    size_bytes = _allowed_size(upload_length, services)
    checksum = tus.checksum(upload_checksum)
    if tus.has_body(request):
        tus.check_is_piece(request)
        refuse_declared_size(request, max_bytes=size_bytes)
    row = await run_in_threadpool(_create, services, size_bytes, upload_metadata or "")
    location = {"Location": f"/v1/uploads/{row.id}"}
    if tus.has_body(request):
        try:
            row = await _append(request, services, row.id, offset=0, checksum=checksum)
        except GraftError as error:
            left = await run_in_threadpool(_left_of, services, row)
            if left is None:
                raise
            return answer(request, replace(Problem.of(error), headers=location | _headers(left)))
        except BaseException:
            # Nobody has been told its name: the client has left, perhaps. What cannot be removed now expires.
            with anyio.CancelScope(shield=True), suppress(GraftError, SQLAlchemyError):
                await run_in_threadpool(_remove, services, row.id)
            raise
    upload = await run_in_threadpool(_shown, services, row)
    return JSONResponse(upload.model_dump(mode="json"), status_code=201, headers=location | _headers(upload))


@router.get(
    "/v1/uploads/{upload_id}",
    response_model=Upload,
    summary="How far a resumable upload is, and what became of it",
    description="HEAD, for clients of tus: the same as headers alone; of a refused upload, its problem.",
    responses={
        200: {"headers": {"Upload-Offset": _NUMBER, "Upload-Length": _NUMBER, "Upload-Expires": _TEXT, **_DATASET}},
        **problems(404, 412),
    },
)
async def get_upload(request: Request, services: ServicesDep, upload_id: UploadId, wait: Wait = 0) -> Response:
    def read() -> tuple[UploadRow, Upload]:
        row = find(services, upload_id)
        return row, _shown(services, row)

    if request.state.is_head:
        tus.check_version(request.headers.get("tus-resumable"))
    row, upload = await wait_until(
        read, is_final=lambda found: found[0].status != "open", seconds=wait, request=request
    )
    if request.state.is_head:
        _check_not_refused(row)
    headers = {"Upload-Length": str(upload.length), "Cache-Control": "no-store", **_headers(upload)}
    if row.client_metadata:
        headers["Upload-Metadata"] = row.client_metadata
    return JSONResponse(upload.model_dump(mode="json"), headers=headers)


@router.patch(
    "/v1/uploads/{upload_id}",
    status_code=204,
    summary="Send the next piece of a resumable upload",
    description="What has come of a piece stays when the connection breaks; HEAD says how much that is. With the last "
    "one the archive is looked through and becomes a data set, whose id is in `Graft-Dataset`; or it is refused, as "
    "POST /v1/datasets would refuse it.",
    responses={
        204: {"headers": {"Upload-Offset": _NUMBER, "Upload-Expires": _TEXT, **_DATASET}},
        **problems(400, 404, 408, 409, 412, 413, 423, 460, 507),
    },
    openapi_extra={"requestBody": {**_PIECE, "required": True}},
)
async def append_piece(
    request: Request,
    services: ServicesDep,
    upload_id: UploadId,
    tus_resumable: TusResumable = None,
    upload_offset: UploadOffset = None,
    upload_checksum: UploadChecksum = None,
) -> Response:
    tus.check_version(tus_resumable)
    tus.check_is_piece(request)
    offset, checksum = tus.number("Upload-Offset", upload_offset), tus.checksum(upload_checksum)
    row = await _append(request, services, upload_id, offset=offset, checksum=checksum)
    return Response(status_code=204, headers=_headers(await run_in_threadpool(_shown, services, row)))


@router.delete(
    "/v1/uploads/{upload_id}",
    status_code=204,
    summary="Give a resumable upload up",
    description="Its bytes are removed. The data set of a finished one stays.",
    responses=problems(404, 412, 423),
)
def end_upload(services: ServicesDep, upload_id: UploadId, tus_resumable: TusResumable = None) -> Response:
    tus.check_version(tus_resumable)
    _remove(services, upload_id)
    return Response(status_code=204)


def _allowed_size(upload_length: str | None, services: Services) -> int:
    size_bytes, most = tus.number("Upload-Length", upload_length), services.settings.max_upload_bytes
    if size_bytes > most:
        raise TooLarge(f"The upload is larger than {most} bytes, the most this server takes.")
    if size_bytes == 0:
        raise InvalidRequest("The upload is empty; send an archive of images.", code="empty-upload")
    return size_bytes


def _create(services: Services, size_bytes: int, client_metadata: str) -> UploadRow:
    said = tus.metadata(client_metadata)
    filename = printable_base(said.get("filename")) or None
    fields = {name: text for name, text in said.items() if name in UploadOptions.model_fields}
    asked = StagedUpload(services.storage.root, size_bytes, sha256="", filename=filename, fields=fields)
    options = archive_use(services.settings, {}).options(asked)
    services.storage.check_room(size_bytes)
    upload_id = new_id("up")

    def create(session: Any) -> dict[str, Any]:
        services.workspace.check_room(session, size_bytes)
        row = uploads.create(
            session,
            upload_id,
            size_bytes=size_bytes,
            filename=filename,
            options=options,
            client_metadata=client_metadata,
        )
        return {"row": row}

    with services.storage.staging() as staged:
        partial.create(staged)
        made = publish_and_create(services, staged, uploads.archive_key(upload_id), create=create)
    row: UploadRow = made["row"]
    return row


async def _append(
    request: Request, services: Services, upload_id: str, *, offset: int, checksum: Checksum | None
) -> UploadRow:
    """The upload as it is after the piece in the body. An empty one at the end of a whole upload is told its end."""
    row = await run_in_threadpool(find, services, upload_id)
    with ExitStack() as stack:
        file: PartialFile | None = None
        if row.status == "open":
            path = services.storage.path(uploads.archive_key(upload_id))
            with suppress(NotFound):
                file = await run_in_threadpool(stack.enter_context, partial.locked(path))
            # Whoever had the lock before may have ended it.
            row = await run_in_threadpool(find, services, upload_id)
        if row.status != "open":
            _check_not_refused(row)
            _check_offset(offset, row.size_bytes)
            return row
        if file is None:
            raise _gone()
        _check_offset(offset, file.size_bytes)
        refuse_declared_size(request, max_bytes=row.size_bytes - offset)
        staged = stack.enter_context(services.storage.staging())
        arrival = Arrival(
            idle_timeout_seconds=services.settings.body_idle_timeout_seconds,
            check_room=services.storage.check_room,
            staged=staged,
            checksum=checksum,
        )
        await file.append(request.stream(), arrival, max_bytes=row.size_bytes - offset)
        if file.size_bytes == row.size_bytes:
            await complete(services, row)
            row = await run_in_threadpool(find, services, upload_id)
    return row


def _left_of(services: Services, row: UploadRow) -> Upload | None:
    """A new upload whose first piece failed, if it can be gone on with. One of which nothing has come is removed."""
    upload = _shown(services, row)
    if upload.offset == 0:
        _remove(services, row.id)
        return None
    return None if upload.error else upload


def _remove(services: Services, upload_id: str) -> None:
    """Raises NotFound, and Locked while another request is at it."""
    with ExitStack() as stack:
        if find(services, upload_id).status == "open":
            stack.enter_context(partial.locked(services.storage.path(uploads.archive_key(upload_id))))
        with services.database.write() as session:
            uploads.delete(session, upload_id)
        services.storage.delete(uploads.folder_key(upload_id))


def _check_offset(given: int, actual: int) -> None:
    if given != actual:
        raise Conflict(
            f"The piece is to begin at byte {actual}, where the server's end; go on from there.",
            code="offset-mismatch",
        )


def _check_not_refused(row: UploadRow) -> None:
    if row.error is not None:
        raise ArchiveRefused(row.error["detail"], code=row.error["code"], title=row.error["title"])


def _shown(services: Services, row: UploadRow) -> Upload:
    """Raises NotFound if the file of an open upload is gone."""
    try:
        offset = row.size_bytes
        if row.status == "open":
            offset = partial.arrived_bytes(services.storage.path(uploads.archive_key(row.id)))
        return Upload.of(row, offset=offset, expires_at=expires_at(services, row))
    except FileNotFoundError:
        # Where it has just ended, the file went after the row had said so.
        if (now := find(services, row.id)).status != "open":
            return _shown(services, now)
        raise _gone() from None


def _gone() -> NotFound:
    return NotFound("What had come of this upload is not there any more; begin a new one.")


def _headers(upload: Upload) -> dict[str, str]:
    headers = {"Upload-Offset": str(upload.offset), "Upload-Expires": tus.http_date(upload.expires_at)}
    if upload.dataset is not None:
        headers["Graft-Dataset"] = upload.dataset
    return headers
