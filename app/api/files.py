"""/v1/files: data sets as OpenAI's clients know them. A file is a data set's archive: file-<x> is ds_<x>."""

from typing import Annotated, Literal, Self, get_args

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.responses import JSONResponse, Response

from app.api import datasets
from app.api.archive_uploads import form_content
from app.api.deps import After, CallerDep, IdempotencyKey, ServicesDep
from app.api.openapi import problems
from app.api.schemas import Dataset, Deleted, Listing, Schema
from app.datasets import catalog
from app.db.tables import DatasetRow
from app.errors import FieldError, NotFound

Purpose = Literal["fine-tune"]

# Clients ask for 10,000 at once; data sets carry reports, so pages are shorter and say that there is more.
LONGEST_PAGE = 200

_FILE, _DATASET = "file-", "ds_"

router = APIRouter(tags=["openai"])

FileId = Annotated[str, Path(max_length=100)]


class FileObject(Schema):
    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Of the archive.")
    created_at: int = Field(description="In seconds since 1970.")
    filename: str
    purpose: Purpose = "fine-tune"
    status: Literal["uploaded", "processed", "error"] = Field(description="uploaded: its images are being checked.")
    status_details: str | None = Field(description="Why it cannot be trained on.")
    expires_at: int | None = None

    @classmethod
    def of(cls, dataset: Dataset) -> Self:
        return cls(
            id=file_id_of(dataset.id),
            bytes=dataset.size_bytes,
            created_at=int(dataset.created_at.timestamp()),
            filename=dataset.filename or dataset.name,
            status=_STATUSES[dataset.status],
            status_details=dataset.error["detail"] if dataset.error else None,
        )


_STATUSES: dict[str, Literal["uploaded", "processed", "error"]] = {
    "processing": "uploaded",
    "ready": "processed",
    "failed": "error",
}


def file_id_of(dataset_id: str) -> str:
    return _FILE + dataset_id.removeprefix(_DATASET)


def dataset_id_of(file_id: str) -> str:
    """A data set's own id is fine too."""
    return _DATASET + file_id.removeprefix(_FILE) if file_id.startswith(_FILE) else file_id


def find_file(session: Session, file_id: str, *, pointer: str | None = None) -> DatasetRow:
    """pointer: of the field that names the file, if it is one. Raises NotFound."""
    try:
        return catalog.find(session, dataset_id_of(file_id))
    except NotFound:
        raise NotFound(
            "There is no file with this id; GET /v1/files lists those there are.",
            code="file-not-found",
            errors=[FieldError(pointer, "names no file")] if pointer else (),
        ) from None


@router.post(
    "/v1/files",
    response_model=FileObject,
    summary="Upload a data set as a file",
    description="The same as POST /v1/datasets: an archive of images in class folders becomes a data set.",
    responses=problems(408, 409, 413, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": form_content({"purpose": {"type": "string", "enum": list(get_args(Purpose))}}),
        }
    },
)
async def upload_file(
    request: Request, services: ServicesDep, caller: CallerDep, idempotency_key: IdempotencyKey = None
) -> Response:
    answer, is_replay = await datasets.receive_once(request, services, caller, {}, idempotency_key)
    file = FileObject.of(Dataset.model_validate(answer))
    return JSONResponse(file.model_dump(mode="json"), headers={"Idempotent-Replayed": "true"} if is_replay else {})


@router.get(
    "/v1/files",
    response_model=Listing[FileObject],
    summary="List data sets as files, newest first",
    responses=problems(404),
)
def list_files(
    services: ServicesDep,
    limit: Annotated[
        int, Query(ge=1, le=10_000, description=f"Most entries; a page has {LONGEST_PAGE} at most.")
    ] = LONGEST_PAGE,
    after: After = None,
    order: Annotated[Literal["desc"], Query(description="By time; the newest first is all there is.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=100, description="All files are for fine-tune.")] = None,
) -> Listing[FileObject]:
    page = min(limit, LONGEST_PAGE)
    with services.database.read() as session:
        after_id = find_file(session, after).id if after else None
        rows = catalog.list_datasets(session, limit=page + 1, after=after_id)
    return Listing[FileObject].of(
        rows if purpose in (None, *get_args(Purpose)) else [],
        limit=page,
        render=lambda row: FileObject.of(Dataset.of(row)),
        id_of=lambda file: file.id,
    )


@router.get("/v1/files/{file_id}", response_model=FileObject, summary="One file", responses=problems(404))
def get_file(services: ServicesDep, file_id: FileId) -> FileObject:
    with services.database.read() as session:
        return FileObject.of(Dataset.of(find_file(session, file_id)))


@router.delete(
    "/v1/files/{file_id}",
    response_model=Deleted,
    summary="Delete a file, which is its data set, that no unfinished job needs",
    responses=problems(404, 409),
)
def delete_file(services: ServicesDep, file_id: FileId) -> Deleted:
    with services.database.read() as session:
        dataset_id = find_file(session, file_id).id
    datasets.delete_dataset(services, dataset_id)
    return Deleted(id=file_id_of(dataset_id), object="file")
