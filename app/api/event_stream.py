"""A job's event log as Server-Sent Events: what is there already, then what comes, to the end or until someone leaves.

The stream reads the same durable log as the list does, so ids are the same and a cut stream goes on where it was.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from app.api.schemas import Event
from app.errors import NotFound, Overloaded

PING_INTERVAL_SECONDS = 15.0
POLL_SECONDS = 0.2
RETRY_MILLISECONDS = 3000
BATCH_SIZE = 200

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class Look:
    """One look at a job: the next events, and its status if it has ended and these are all."""

    events: Sequence[Event]
    final_status: str | None


def stream(
    first: Look, look_after: Callable[[int], Look], *, after: int, is_stopping: Callable[[], bool]
) -> StreamingResponse:
    """first: what was seen after the id `after`. look_after: blocking, runs in a thread; given the last id sent."""
    return StreamingResponse(
        _lines(first, look_after, after=after, is_stopping=is_stopping), media_type="text/event-stream", headers=HEADERS
    )


async def _lines(
    look: Look, look_after: Callable[[int], Look], *, after: int, is_stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    # On its own it would be a block without data, which some clients take for an empty event.
    retry = f"retry: {RETRY_MILLISECONDS}\n"
    last_sent_at = loop.time()
    while True:
        for event in look.events:
            yield retry + _event_lines(event)
            retry = ""
            after = int(event.id)
        if look.events:
            last_sent_at = loop.time()
        if look.final_status is not None:
            yield f"{retry}event: done\ndata: {json.dumps({'status': look.final_status})}\n\n"
            return
        if is_stopping():
            return  # without `done`: the client connects again, and goes on after its last id
        if loop.time() - last_sent_at >= PING_INTERVAL_SECONDS:
            yield ": ping\n\n"
            last_sent_at = loop.time()
        if len(look.events) < BATCH_SIZE:
            await asyncio.sleep(POLL_SECONDS)
        try:
            look = await _looked(look_after, after)
        except NotFound:
            return  # the job was deleted meanwhile; who connects again is told so


async def _looked(look_after: Callable[[int], Look], after: int) -> Look:
    """Nothing new while the database is away: the stream outlasts that."""
    try:
        return await run_in_threadpool(look_after, after)
    except Overloaded:
        return Look([], None)


def _event_lines(event: Event) -> str:
    # json.dumps writes no newlines, so the data is one line.
    return f"id: {event.id}\nevent: {event.event}\ndata: {json.dumps(event.data)}\n\n"
