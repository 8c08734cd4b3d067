"""How a resumable upload ends: as a data set, refused, or swept because nobody went on with it.

The last byte may have come to a process that died of it or was killed; so a task looks for uploads that are whole and
have not ended, in every API process. Whoever ends one holds its file's lock.
"""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import workspaces
from app.api.archive_uploads import Answer, look_through_and_keep
from app.api.datasets import archive_use
from app.api.services import Services
from app.datasets import partial, uploads
from app.datasets.upload import StagedUpload
from app.db.tables import UploadRow
from app.db.tenancy import Actor
from app.errors import ArchiveRefused, GraftError, Locked, NotFound, TooManyRequests
from app.storage import file_sha256
from app.workspaces import Limits

COMPLETION_INTERVAL_SECONDS = 2.0
RETRY_INTERVAL_SECONDS = 5.0
SWEEP_INTERVAL_SECONDS = 3600.0
# An archive that ends the process that reads it must not end every one after it.
MAX_ATTEMPTS = 5

log = structlog.get_logger(__name__)


async def complete(services: Services, upload: UploadRow) -> str:
    """Makes the data set of an upload that is whole, and returns its id; the same way that POST /v1/datasets goes.

    The caller holds the file's lock and has seen that the upload is open. What is wrong with the archive is raised, and
    ends the upload as refused; what may be over later (a full disk, a spent quota, a server that stops) leaves it as it
    is.
    """
    # Asked for ahead of all that costs: a quota may be spent for days, and somebody comes again every few seconds.
    await run_in_threadpool(_check_quota, services)
    try:
        await run_in_threadpool(_count_attempt, services, upload.id)
        dataset_id = await _make_dataset(services, upload)
    except GraftError as error:
        if _may_be_over_later(error):
            await run_in_threadpool(_take_attempt_back, services, upload.id)
        else:
            await run_in_threadpool(_refuse, services, upload.id, error)
        raise
    except (SQLAlchemyError, OSError):
        await run_in_threadpool(_take_attempt_back, services, upload.id)
        raise
    await run_in_threadpool(services.storage.delete, uploads.folder_key(upload.id))
    return dataset_id


async def complete_uploads(services: Services) -> None:
    """Ends uploads that are whole and that nobody is at. Never returns."""
    while True:
        pause = COMPLETION_INTERVAL_SECONDS
        try:
            for upload in await asyncio.to_thread(_whole, services):
                if not await _complete_unless_busy(services, upload.id):
                    pause = RETRY_INTERVAL_SECONDS
        except (SQLAlchemyError, GraftError) as error:
            log.error("database does not answer", error=type(error).__name__)
            pause = RETRY_INTERVAL_SECONDS
        await asyncio.sleep(pause)


async def sweep_uploads(services: Services) -> None:
    """Removes uploads that nobody went on with, and what is left of ended ones, at the start and every hour. Never
    returns."""
    while True:
        try:
            removed = await asyncio.to_thread(sweep, services)
            if removed:
                log.info("uploads expired", removed=removed)
        except (OSError, SQLAlchemyError, GraftError) as error:
            log.error("uploads cannot be swept", error=type(error).__name__)
        await asyncio.sleep(SWEEP_INTERVAL_SECONDS)


def expires_at(services: Services, upload: UploadRow) -> datetime:
    """When an upload is forgotten if nothing more happens to it. Raises FileNotFoundError if its file is gone."""
    last = upload.ended_at
    if last is None:
        path = services.storage.path(uploads.archive_key(upload.id))
        last = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC)
    return last + _expiry(services)


def _expiry(services: Services) -> timedelta:
    return timedelta(hours=services.settings.upload_expiry_hours)


def sweep(services: Services) -> int:
    """Returns how many unfinished uploads were removed."""
    with services.database.read() as session:
        unfinished, ended = uploads.list_open(session), uploads.list_ended(session)
    removed = 0
    for upload in unfinished:
        with contextlib.suppress(Locked):
            removed += _remove_if_expired(services, upload)
    for upload in ended:
        services.storage.delete(uploads.folder_key(upload.id))  # a process may have died before it came to that
    with services.database.write() as session:
        uploads.forget_ended(session, before=services.clock.before(_expiry(services)))
    return removed


def _remove_if_expired(services: Services, upload: UploadRow) -> bool:
    try:
        if not _is_expired(services, upload):
            return False
        with partial.locked(services.storage.path(uploads.archive_key(upload.id))):
            return _is_expired(services, upload) and _remove(services, upload)
    except (FileNotFoundError, NotFound):
        # Ended meanwhile; or restored from a backup, perhaps, which has no unfinished archives.
        return _remove(services, upload)


def _remove(services: Services, upload: UploadRow) -> bool:
    with services.database.write() as session:
        is_removed = uploads.expire(session, upload.id)
    services.storage.delete(uploads.folder_key(upload.id))
    return is_removed


def _is_expired(services: Services, upload: UploadRow) -> bool:
    return expires_at(services, upload) <= services.clock.before(timedelta())


def _whole(services: Services) -> list[UploadRow]:
    with services.database.read() as session:
        unfinished = uploads.list_open(session)
    found = []
    for upload in unfinished:
        with contextlib.suppress(FileNotFoundError):
            if services.storage.path(uploads.archive_key(upload.id)).stat().st_size == upload.size_bytes:
                found.append(upload)
    return found


async def _complete_unless_busy(services: Services, upload_id: str) -> bool:
    """Returns whether it need not be tried again."""
    try:
        with partial.locked(services.storage.path(uploads.archive_key(upload_id))):
            upload = await run_in_threadpool(find, services, upload_id)
            if upload.status == "open":
                dataset_id = await complete(await run_in_threadpool(_as_its_workspace, services, upload), upload)
                log.info("upload completed", upload_id=upload_id, dataset_id=dataset_id)
    except (Locked, NotFound):
        return True  # somebody else is at it, or was
    except GraftError as error:
        log.info("upload not completed", upload_id=upload_id, code=error.code)
        return not _may_be_over_later(error)
    except Exception:  # the door around what strangers' archives may do; attempts are counted
        log.exception("upload cannot be completed", upload_id=upload_id)
        return False
    return True


def _as_its_workspace(services: Services, upload: UploadRow) -> Services:
    """What a request of the workspace that the upload belongs to would be given."""
    with services.database.read() as session:
        workspace = workspaces.load(session, upload.workspace_id, Limits.from_settings(services.settings))
    return services.within(workspace, Actor(f"completion of {upload.id}"))


def find(services: Services, upload_id: str) -> UploadRow:
    """Raises NotFound."""
    with services.database.read() as session:
        return uploads.find(session, upload_id)


def _may_be_over_later(error: GraftError) -> bool:
    return error.status >= 500 or isinstance(error, TooManyRequests)


def _check_quota(services: Services) -> None:
    with services.database.read() as session:
        services.workspace.check_room(session, 0)  # the upload is counted


async def _make_dataset(services: Services, upload: UploadRow) -> str:
    def settle(session: Session, answer: Answer) -> None:
        uploads.finish(session, upload.id, dataset_id=answer["id"])

    key = uploads.archive_key(upload.id)
    with services.storage.staging() as staged:
        # A second name: until the data set is committed, the upload must not depend on this process.
        await run_in_threadpool(services.storage.link, key, staged)
        sha256 = await run_in_threadpool(file_sha256, staged)
        whole = StagedUpload(staged, upload.size_bytes, sha256, upload.filename)
        use = archive_use(services.settings, {})
        answer = await look_through_and_keep(services, whole, upload.options, use, settle=settle, is_counted=True)
    return str(answer["id"])


def _count_attempt(services: Services, upload_id: str) -> None:
    with services.database.write() as session:
        attempts = uploads.count_attempt(session, upload_id)
    if attempts > MAX_ATTEMPTS:
        raise ArchiveRefused(
            f"Looking the archive through ended the server's process {MAX_ATTEMPTS} times; it is not tried again. Its "
            "log says more.",
            code="upload-ends-server",
        )


def _take_attempt_back(services: Services, upload_id: str) -> None:
    with contextlib.suppress(SQLAlchemyError, GraftError), services.database.write() as session:
        uploads.count_attempt(session, upload_id, by=-1)


def _refuse(services: Services, upload_id: str, error: GraftError) -> None:
    with services.database.write() as session:
        uploads.refuse(session, upload_id, error.as_record())
    services.storage.delete(uploads.folder_key(upload_id))
