"""`/v1/usage`, `/v1/audit`, `/v1/webhooks`: what the key's workspace has, who changed it, and who is told."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from graft_client import shared
from graft_client.answers import Change, Deleted, Delivery, NewWebhook, Page, Usage, Webhook
from graft_client.calls import Resource, call, stream
from graft_client.connection import Request, path_of
from graft_client.decoding import decode
from graft_client.wire import W

AUDIT = "/v1/audit"
WEBHOOKS = "/v1/webhooks"
WEBHOOK = "/v1/webhooks/{}"

DeliveryStatus = Literal["pending", "delivered", "failed"]


class Workspace(Resource[W]):
    @call
    async def usage(self) -> Usage:
        """What it has, and may have."""
        return decode(Usage, await self._connection.json(Request(method="GET", path="/v1/usage", is_repeatable=True)))

    @call
    async def changes(self, *, limit: int | None = None, after: str | None = None) -> Page[Change]:
        """Newest first; for keys of scope admin."""
        return await shared.page(self._connection, AUDIT, Change, {"limit": limit, "after": after})

    @stream
    def all_changes(self) -> AsyncIterator[Change]:
        """Every one of `changes`, page after page."""
        return shared.pages(self._connection, AUDIT, Change, {})


class Webhooks(Resource[W]):
    """Addresses that are told what happens; for keys of scope admin."""

    @call
    async def create(self, url: str, *, events: Sequence[str] | None = None, enabled: bool | None = None) -> NewWebhook:
        """Its `secret`, which the receiver verifies signatures with, is answered this once. events: all if left out."""
        body = _given(url=url, events=None if events is None else list(events), enabled=enabled)
        return decode(NewWebhook, await self._connection.json(Request(method="POST", path=WEBHOOKS, json=body)))

    @call
    async def get(self, webhook_id: str) -> Webhook:
        request = Request(method="GET", path=path_of(WEBHOOK, webhook_id), is_repeatable=True)
        return decode(Webhook, await self._connection.json(request))

    @call
    async def list(self, *, limit: int | None = None, after: str | None = None) -> Page[Webhook]:
        """Newest first."""
        return await shared.page(self._connection, WEBHOOKS, Webhook, {"limit": limit, "after": after})

    @stream
    def all(self) -> AsyncIterator[Webhook]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, WEBHOOKS, Webhook, {})

    @call
    async def change(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """What is left out stays."""
        body = _given(url=url, events=None if events is None else [*events], enabled=enabled)
        request = Request(method="PATCH", path=path_of(WEBHOOK, webhook_id), json=body, is_repeatable=True)
        return decode(Webhook, await self._connection.json(request))

    @call
    async def delete(self, webhook_id: str) -> Deleted:
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(WEBHOOK, webhook_id))))

    @call
    async def test(self, webhook_id: str, *, wait: float | None = None) -> Delivery:
        """Sends it a webhook.test. wait: for so many seconds at most, until what came of it is known."""
        request = Request(method="POST", path=path_of(WEBHOOK + "/test", webhook_id), query={"wait": wait})
        return decode(Delivery, await self._connection.json(request))

    @call
    async def deliveries(
        self,
        webhook_id: str,
        *,
        limit: int | None = None,
        after: str | None = None,
        status: DeliveryStatus | None = None,
    ) -> Page[Delivery]:
        """What was sent to it, newest first."""
        query = {"limit": limit, "after": after, "status": status}
        return await shared.page(self._connection, path_of(WEBHOOK + "/deliveries", webhook_id), Delivery, query)


def _given(**members: Any) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}
