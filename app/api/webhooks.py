"""/v1/webhooks: addresses that are told what happens, signed as Standard Webhooks has it."""

import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import webhooks
from app.api.deps import After, Limit, ServicesDep, Wait, json_body, wait_until
from app.api.openapi import json_request, problems
from app.api.schemas import Deleted, JsonObject, Listing, Schema
from app.api.services import Services
from app.db.tables import DeliveryRow, WebhookRow
from app.egress import MAX_URL_CHARACTERS, Refused
from app.errors import FieldError, Forbidden, InvalidRequest
from app.webhooks import EVENTS, Event

WebhookId = Annotated[str, Path(max_length=100)]
Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_URL_CHARACTERS,
        json_schema_extra={"pattern": "^https?://"},
        description="https, at a public address. The operator may allow other networks, and http there.",
    ),
]
Events = Annotated[list[Event], Field(min_length=1, max_length=2 * len(EVENTS), description="What to be told.")]


class WebhooksOff(Forbidden):
    code = "webhooks-are-off"
    title = "Webhooks are turned off"


async def _check_is_on(services: ServicesDep) -> None:
    if not services.settings.webhooks:
        raise WebhooksOff("This server sends no webhooks; its operator can turn them on with GRAFT_WEBHOOKS=true.")


router = APIRouter(tags=["webhooks"], dependencies=[Depends(_check_is_on)])


class WebhookRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: Url
    events: Events = Field(list(EVENTS), description="What to be told; everything if left out.")
    enabled: bool = Field(True, description="false: nothing is sent, and what happens meanwhile is not kept for later.")


class WebhookChange(BaseModel):
    """What is left out stays."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    url: Url | None = None
    events: Events | None = None
    enabled: bool | None = None


class WebhookAnswer(Schema):
    id: str
    object: Literal["webhook"] = "webhook"
    url: str
    events: list[Event]
    enabled: bool
    disabled_reason: str | None = Field(description="Where Graft turned it off: why.")
    created_at: datetime

    @classmethod
    def of(cls, row: WebhookRow) -> Self:
        return cls(
            id=row.id,
            url=row.url,
            events=[event for event in EVENTS if event in row.events],
            enabled=row.is_enabled,
            disabled_reason=row.disabled_reason,
            created_at=row.created_at,
        )


class NewWebhook(WebhookAnswer):
    secret: str = Field(description="That the receiver verifies signatures with; shown only now.")


class Delivery(Schema):
    id: str = Field(description="The receiver's `webhook-id`: the same in every attempt.")
    object: Literal["webhook_delivery"] = "webhook_delivery"
    webhook: str
    event: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int = Field(description="That were begun.")
    next_attempt_at: datetime | None = Field(description="null once it has ended.")
    last_attempt_at: datetime | None
    response_status: int | None = Field(description="HTTP status of the last answer.")
    error: str | None = Field(description="Why the last attempt failed.")
    payload: JsonObject = Field(description="What is sent.")
    created_at: datetime
    ended_at: datetime | None

    @classmethod
    def of(cls, row: DeliveryRow) -> Self:
        return cls(
            id=row.id,
            webhook=row.webhook_id,
            event=row.event,
            status=row.status,
            attempts=row.attempts,
            next_attempt_at=row.next_attempt_at if row.status == "pending" else None,
            last_attempt_at=row.last_attempt_at,
            response_status=row.response_status,
            error=row.error,
            payload=json.loads(row.body),
            created_at=row.created_at,
            ended_at=row.ended_at,
        )


@router.post(
    "/v1/webhooks",
    response_model=NewWebhook,
    status_code=201,
    summary="Have an address told what happens",
    description="The answer holds the secret that signatures are verified with; it is never shown again.",
    responses=problems(409, 413),
    openapi_extra=json_request(WebhookRequest),
)
def create_webhook(
    services: ServicesDep, asked: Annotated[WebhookRequest, Depends(json_body(WebhookRequest))]
) -> Response:
    _check_url(services, asked.url)
    with services.database.write() as session:
        row = webhooks.create(session, url=asked.url, events=set(asked.events), is_enabled=asked.enabled)
        answer = NewWebhook(**WebhookAnswer.of(row).model_dump(), secret=row.secret)
    headers = {"Location": f"/v1/webhooks/{answer.id}", "Cache-Control": "no-store"}
    return JSONResponse(answer.model_dump(mode="json"), status_code=201, headers=headers)


@router.get(
    "/v1/webhooks",
    response_model=Listing[WebhookAnswer],
    summary="List webhooks, newest first",
    responses=problems(404),
)
def list_webhooks(services: ServicesDep, limit: Limit = 50, after: After = None) -> Listing[WebhookAnswer]:
    with services.database.read() as session:
        rows = webhooks.list_webhooks(session, limit=limit + 1, after=after or None)
    return Listing[WebhookAnswer].of(rows, limit=limit, render=WebhookAnswer.of, id_of=lambda webhook: webhook.id)


@router.get("/v1/webhooks/{webhook_id}", response_model=WebhookAnswer, summary="One webhook", responses=problems(404))
def get_webhook(services: ServicesDep, webhook_id: WebhookId) -> WebhookAnswer:
    with services.database.read() as session:
        return WebhookAnswer.of(webhooks.find(session, webhook_id))


@router.patch(
    "/v1/webhooks/{webhook_id}",
    response_model=WebhookAnswer,
    summary="Change a webhook, or turn it on or off",
    responses=problems(404, 413),
    openapi_extra=json_request(WebhookChange),
)
def change_webhook(
    services: ServicesDep, webhook_id: WebhookId, asked: Annotated[WebhookChange, Depends(json_body(WebhookChange))]
) -> WebhookAnswer:
    changes: dict[str, Any] = {}
    if asked.url is not None:
        _check_url(services, asked.url)
        changes["url"] = asked.url
    if asked.events is not None:
        changes["events"] = sorted(set(asked.events))
    if asked.enabled is not None:
        changes["is_enabled"] = asked.enabled
    with services.database.write() as session:
        return WebhookAnswer.of(webhooks.change(session, webhook_id, changes))


@router.delete(
    "/v1/webhooks/{webhook_id}",
    response_model=Deleted,
    summary="Delete a webhook, with what was still to be sent to it",
    responses=problems(404),
)
def delete_webhook(services: ServicesDep, webhook_id: WebhookId) -> Deleted:
    services.database.free(lambda session: webhooks.delete(session, webhook_id))
    return Deleted(id=webhook_id, object="webhook")


@router.post(
    "/v1/webhooks/{webhook_id}/test",
    response_model=Delivery,
    status_code=201,
    summary="Send a webhook.test, whatever else it is told",
    description="With `wait`, the answer says what came of the first attempt.",
    responses=problems(404, 409),
)
async def test_webhook(request: Request, services: ServicesDep, webhook_id: WebhookId, wait: Wait = 0) -> Delivery:
    def read() -> Delivery:
        with services.database.read() as session:
            return Delivery.of(webhooks.find_delivery(session, webhook_id, delivery_id))

    delivery_id = await run_in_threadpool(_emit_test, services, webhook_id)
    return await wait_until(
        read, is_final=lambda delivery: delivery.last_attempt_at is not None, seconds=wait, request=request
    )


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    response_model=Listing[Delivery],
    summary="What was sent, newest first; kept for 30 days",
    responses=problems(404),
)
def list_deliveries(
    services: ServicesDep,
    webhook_id: WebhookId,
    limit: Limit = 50,
    after: After = None,
    status: Literal["pending", "delivered", "failed"] | None = None,
) -> Listing[Delivery]:
    with services.database.read() as session:
        rows = webhooks.list_deliveries(session, webhook_id, limit=limit + 1, after=after or None, status=status)
    return Listing[Delivery].of(rows, limit=limit, render=Delivery.of, id_of=lambda delivery: delivery.id)


def _emit_test(services: Services, webhook_id: str) -> str:
    with services.database.write() as session:
        return webhooks.emit_test(session, webhook_id).id


def _check_url(services: Services, url: str) -> None:
    try:
        services.egress.check_url(url)
    except Refused as refusal:
        raise InvalidRequest(
            f"Nothing may be sent to this URL: {refusal}.", errors=[FieldError("#/url", str(refusal))]
        ) from None
