"""/v1/usage and /v1/audit: what a workspace has and may have, and who changed what in it."""

import re
from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field

from app import audit, workspaces
from app.api.deps import NUMBERED_ID, Limit, ServicesDep
from app.api.schemas import Listing
from app.db.tables import AuditRow
from app.errors import InvalidRequest

router = APIRouter(tags=["workspaces"])


class Amount(BaseModel):
    used: int
    limit: int | None = Field(description="null: no limit")


class Usage(BaseModel):
    """What the caller's workspace has, and may have."""

    object: Literal["usage"] = "usage"
    workspace: str
    bytes: Amount = Field(description="Archives, pixel stores, models and kept pictures.")
    unfinished_jobs: Amount = Field(description="Jobs and batches that wait or run.")
    predictions_today: Amount = Field(description="Pictures predicted since midnight, UTC.")
    requests_per_second: float | None = Field(description="In the long run; null: no limit")


class Change(BaseModel):
    """A line of the audit log."""

    id: str
    object: Literal["change"] = "change"
    at: datetime
    key: str | None = Field(description="Id of the API key; null without one.")
    action: str = Field(description="Method and path, or the command.")
    request_id: str | None
    changed: list[str] = Field(description="Ids of what was made, changed or deleted.")

    @classmethod
    def of(cls, row: AuditRow) -> Self:
        return cls(
            id=str(row.seq),
            at=row.at,
            key=row.key_id,
            action=row.action,
            request_id=row.request_id,
            changed=row.changed,
        )


@router.get("/v1/usage", response_model=Usage, summary="What this key's workspace has and may have")
def get_usage(services: ServicesDep) -> Usage:
    workspace, limits = services.workspace, services.workspace.limits
    with services.database.read() as session:
        in_use, unfinished = workspaces.bytes_used(session), workspaces.unfinished_jobs(session)
    return Usage(
        workspace=workspace.name,
        bytes=Amount(used=in_use, limit=limits.max_bytes),
        unfinished_jobs=Amount(used=unfinished, limit=limits.max_unfinished_jobs),
        predictions_today=Amount(
            used=services.traffic.predictions_today(workspace), limit=limits.max_predictions_per_day
        ),
        requests_per_second=limits.requests_per_second,
    )


@router.get("/v1/audit", response_model=Listing[Change], summary="Who changed what, newest first")
def list_changes(
    services: ServicesDep,
    limit: Limit = 50,
    after: Annotated[
        str | None,
        Query(
            max_length=18,
            description="`last_id` of the page before.",
            json_schema_extra={"pattern": f"^{NUMBERED_ID}$"},
        ),
    ] = None,
) -> Listing[Change]:
    if not re.fullmatch(NUMBERED_ID, after or ""):
        raise InvalidRequest("`after` is the id of a change, a whole number; give the last one that was seen, or none.")
    with services.database.read() as session:
        rows = audit.list_changes(session, limit=limit + 1, before_seq=int(after) if after else None)
    return Listing[Change].of(rows, limit=limit, render=Change.of, id_of=lambda change: change.id)
