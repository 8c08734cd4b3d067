"""An archive in a request's body → what it becomes: a data set, or a batch. Received, looked through, kept, or nothing.

Knows the request, the Idempotency-Key and where bytes go; what is made of the archive is the caller's `ArchiveUse`.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread
from fastapi import Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import holdings
from app.access import Caller
from app.api import idempotency
from app.api.deps import declared_bytes, refuse_declared_size
from app.api.idempotency import Claim
from app.api.openapi import as_form_fields, form
from app.api.services import Services
from app.datasets.upload import MAX_OVERHEAD_BYTES, StagedUpload, receive
from app.errors import Overloaded
from app.settings import Settings

Found = TypeVar("Found")
Answer = Mapping[str, Any]
Tick = Callable[[float], None]

BINARY = {"schema": {"type": "string", "format": "binary"}}


def form_content(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a form with the archive as `file`, for a route's OpenAPI document. fields: besides the archive."""
    return form({"file": BINARY["schema"], **as_form_fields(fields)}, required=["file"])


def archive_body(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a route that takes the archive as it is, too: its `openapi_extra`."""
    kinds = ("application/zip", "application/x-tar", "application/gzip", "application/octet-stream")
    return {
        "requestBody": {
            "required": True,
            "description": "A form with the archive as `file`, or the archive as it is, under any Content-Type.",
            "content": {**form_content(fields), **dict.fromkeys(kinds, BINARY)},
        }
    }


@dataclass(frozen=True)
class ArchiveUse(Generic[Found]):
    """What becomes of an uploaded archive.

    text_fields: that a form may have beside the file. options: all that the upload says besides, with defaults.
    inspect: reads the archive through and refuses what is wrong; blocking. new_id, archive_key: of the new resource,
    and where its archive lies. create: makes its row and returns the answer, given its id, in a transaction that also
    ends whatever led to it.
    """

    text_fields: Collection[str]
    options: Callable[[StagedUpload], dict[str, Any]]
    inspect: Callable[[Path, Mapping[str, Any], Tick], Found]
    new_id: Callable[[], str]
    archive_key: Callable[[str], str]
    create: Callable[[Session, str, StagedUpload, Mapping[str, Any], Found], dict[str, Any]]


async def receive_once(
    request: Request, services: Services, caller: Caller, idempotency_key: str | None, use: ArchiveUse[Found]
) -> tuple[Answer, bool]:
    """The answer to the upload, and whether it was given before under the same Idempotency-Key."""
    _refuse_declared_size(request, services.settings)
    key = idempotency.parse_key(idempotency_key)
    scope = f"{caller.key_id} {request.method} {request.url.path}"
    claim = None
    if key is not None:
        claim = await run_in_threadpool(idempotency.begin, services.database, services.clock, scope=scope, key=key)
    try:
        # What was answered before takes no more room than it has.
        if claim is None or claim.answered is None:
            await run_in_threadpool(_refuse_beyond_quota, request, services)
        answer = await _receive(request, services, claim, use)
    except BaseException:
        if claim is not None:
            with anyio.CancelScope(shield=True):  # also where the client has left
                await run_in_threadpool(idempotency.release, services.database, claim)
        raise
    return answer, claim is not None and claim.answered is not None


def created(answer: Answer, *, collection: str, is_replay: bool = False) -> Response:
    """201, and where the new resource is. collection: such as "/v1/datasets"."""
    headers = {"Location": f"{collection}/{answer['id']}"}
    if is_replay:
        headers["Idempotent-Replayed"] = "true"
    return JSONResponse(dict(answer), status_code=201, headers=headers)


async def look_through_and_keep(
    services: Services,
    upload: StagedUpload,
    options: Mapping[str, Any],
    use: ArchiveUse[Found],
    *,
    settle: Callable[[Session, Answer], None],
    is_counted: bool = False,
) -> Answer:
    """The one way from an archive that has arrived whole to what it becomes, however it arrived.

    settle: what else belongs into the transaction that creates it. is_counted: whether the workspace's quota has room
    for it already.
    """
    # Reading a large archive through takes long: only a few at a time, beside the threads that answer others.
    found = await anyio.to_thread.run_sync(
        use.inspect, upload.path, options, stop_tick(services), limiter=services.inspections
    )
    return await run_in_threadpool(_keep, services, upload, options, found, use, settle, is_counted)


def publish_and_create(services: Services, archive: Path, key: str, *, create: Callable[[Session], Answer]) -> Answer:
    """Publishes the archive, then makes the row that it belongs to and its answer in one transaction; or leaves
    neither."""
    is_kept = partial(holdings.has_row, services.database)
    with services.storage.announced(key.rpartition("/")[0], is_wanted=is_kept):
        services.storage.publish(archive, key)
        with services.database.write() as session:
            return create(session)


def stop_tick(services: Services) -> Tick:
    """Ends long reading of archives when the server is to end."""

    def tick(_fraction: float) -> None:
        if services.stopping.is_set():
            raise Overloaded("The server is shutting down; send the request again.", retry_after_seconds=5)

    return tick


async def _receive(request: Request, services: Services, claim: Claim | None, use: ArchiveUse[Found]) -> Answer:
    settings = services.settings
    with services.storage.staging() as staged:
        upload = await receive(
            request.stream(),
            content_type=request.headers.get("content-type"),
            staged=staged,
            text_fields=use.text_fields,
            max_bytes=settings.max_upload_bytes,
            idle_timeout_seconds=settings.body_idle_timeout_seconds,
            check_room=services.storage.check_room,
        )
        options = use.options(upload)
        print_of_request = idempotency.fingerprint(upload.sha256, options)
        if claim is not None and claim.answered is not None:
            idempotency.check_same(claim, print_of_request)
            return claim.answered

        def settle(session: Session, answer: Answer) -> None:
            if claim is not None:
                idempotency.finish(
                    session, claim, fingerprint=print_of_request, resource_id=answer["id"], response=dict(answer)
                )

        return await look_through_and_keep(services, upload, options, use, settle=settle)


def _keep(
    services: Services,
    upload: StagedUpload,
    options: Mapping[str, Any],
    found: Found,
    use: ArchiveUse[Found],
    settle: Callable[[Session, Answer], None],
    is_counted: bool,
) -> Answer:
    resource_id = use.new_id()

    def create(session: Session) -> Answer:
        services.workspace.check_room(session, 0 if is_counted else upload.size_bytes)
        answer = use.create(session, resource_id, upload, options, found)
        settle(session, answer)
        return answer

    return publish_and_create(services, upload.path, use.archive_key(resource_id), create=create)


def _refuse_declared_size(request: Request, settings: Settings) -> None:
    is_form = request.headers.get("content-type", "").lower().startswith("multipart/form-data")
    refuse_declared_size(request, max_bytes=settings.max_upload_bytes + (MAX_OVERHEAD_BYTES if is_form else 0))


def _refuse_beyond_quota(request: Request, services: Services) -> None:
    """Before any of the body is read; how much it really is, is asked again when the row is made."""
    declared = declared_bytes(request.headers) or 1
    with services.database.read() as session:
        services.workspace.check_room(session, max(declared - MAX_OVERHEAD_BYTES, 1))
