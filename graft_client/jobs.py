"""`/v1/jobs`: submit, follow, wait, cancel, stop."""

import builtins
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Unpack

import httpx
from httpx_sse import SSEError

from graft_client import shared
from graft_client.answers import Deleted, DryRun, Epoch, Event, Job, JobStatus, Page
from graft_client.calls import Resource, call, stream
from graft_client.connection import RECONNECT_PAUSE_SECONDS, Connection, Patience, Request, path_of
from graft_client.decoding import decode
from graft_client.errors import ServerRefused, ServerUnreachable, UnexpectedAnswer
from graft_client.requests import JobOptions
from graft_client.wire import W

JOBS = "/v1/jobs"
JOB = "/v1/jobs/{}"
EVENTS = "/v1/jobs/{}/events"


class Jobs(Resource[W]):
    @call
    async def create(self, dataset: str, *, wait: float | None = None, **options: Unpack[JobOptions]) -> Job:
        """Submits a training job on a ready data set. wait: seconds to hold the answer until it has ended, 0 to 60."""
        request = Request(
            method="POST",
            path=JOBS,
            query={"wait": wait},
            headers=shared.once(),
            json={"dataset": dataset, **options},
            is_repeatable=True,
        )
        return decode(Job, await self._connection.json(request))

    @call
    async def estimate(self, dataset: str, **options: Unpack[JobOptions]) -> DryRun:
        """What the job would be, how long it would take and in how much memory. Queues nothing."""
        request = Request(
            method="POST",
            path=JOBS,
            query={"dry_run": True},
            json={"dataset": dataset, **options},
            is_repeatable=True,
        )
        return decode(DryRun, await self._connection.json(request))

    @call
    async def get(self, job_id: str, *, wait: float | None = None) -> Job:
        """wait: seconds to hold the answer until the job has ended, 0 to 60."""
        request = Request(method="GET", path=path_of(JOB, job_id), query={"wait": wait}, is_repeatable=True)
        return decode(Job, await self._connection.json(request))

    @call
    async def wait(self, job_id: str, *, timeout: float | None = None) -> Job:
        """The job once it has ended, however it did: see its `status`. timeout: seconds until WaitTimedOut."""
        request = Request(method="GET", path=path_of(JOB, job_id), is_repeatable=True)
        return await self._connection.until(
            request, lambda answer: decode(Job, answer), is_final=lambda found: found.is_final, timeout=timeout
        )

    @stream
    async def follow(self, job_id: str, *, after: str | None = None) -> AsyncIterator[Event]:
        """Every event of a job, then live ones as they come, until it has ended.

        after: the id of the last event seen, to go on behind it. A broken stream is resumed without loss. Raises
        ServerUnreachable once the server has been away for longer than the client's patience.
        """
        patience = Patience(self._connection)
        while True:
            try:
                async with aclosing(_events(self._connection, job_id, after, patience)) as events:
                    async for event in events:
                        if event.id == "":
                            return
                        after = event.id
                        yield event
                await self._connection.wire.sleep(RECONNECT_PAUSE_SECONDS)  # a server that stops ends its streams
            except (ServerUnreachable, ServerRefused) as error:
                await patience.bear(error)

    @call
    async def list(
        self,
        *,
        limit: int | None = None,
        after: str | None = None,
        status: JobStatus | None = None,
        dataset: str | None = None,
        method: str | None = None,
    ) -> Page[Job]:
        """Newest first."""
        query = {"limit": limit, "after": after, "status": status, "dataset": dataset, "method": method}
        return await shared.page(self._connection, JOBS, Job, query)

    @stream
    def all(
        self, *, status: JobStatus | None = None, dataset: str | None = None, method: str | None = None
    ) -> AsyncIterator[Job]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, JOBS, Job, {"status": status, "dataset": dataset, "method": method})

    @call
    async def history(self, job_id: str) -> builtins.list[Epoch]:
        request = Request(method="GET", path=path_of("/v1/jobs/{}/history", job_id), is_repeatable=True)
        return [decode(Epoch, each) for each in (await self._connection.json(request))["data"]]

    @call
    async def events(self, job_id: str, *, limit: int | None = None, after: str | None = None) -> Page[Event]:
        """What happened so far, oldest first; `follow` is the live stream of it."""
        return await shared.page(self._connection, path_of(EVENTS, job_id), Event, {"limit": limit, "after": after})

    @call
    async def cancel(self, job_id: str) -> Job:
        """A queued job ends at once, a running one within seconds."""
        return decode(Job, await self._connection.json(Request(method="POST", path=path_of(JOB + "/cancel", job_id))))

    @call
    async def stop(self, job_id: str) -> Job:
        """Ends a running job now, with its best epoch so far as the model."""
        return decode(Job, await self._connection.json(Request(method="POST", path=path_of(JOB + "/stop", job_id))))

    @call
    async def delete(self, job_id: str) -> Deleted:
        """Of a job that has ended; its model stays."""
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(JOB, job_id))))


async def _events(
    connection: Connection[Any], job_id: str, after: str | None, patience: Patience
) -> AsyncGenerator[Event, None]:
    """Of one connection; one without an id at the job's end."""
    headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
    request = Request(method="GET", path=path_of(EVENTS, job_id), headers=headers, is_repeatable=True)
    async with connection.open(request) as response:
        patience.renew()
        if response.status_code == httpx.codes.NO_CONTENT:
            yield decode(Event, {"id": "", "event": "done", "data": {}})
            return
        try:
            async for sent in connection.wire.events(response):
                event_id = "" if sent.event == "done" else sent.id
                yield decode(Event, {"id": event_id, "event": sent.event, "data": json.loads(sent.data or "{}")})
        except SSEError as error:
            raise UnexpectedAnswer(f"What answers at {connection.url} sends no events: {error}") from error
