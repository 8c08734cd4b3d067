"""Sends requests to one server: retries, problems as exceptions, waiting. Knows HTTP; not what is asked for.

Sent again, up to `max_retries` times with growing pauses, is

- what no connection could be made for, and what was lost on the way if it is safe to repeat: reads, and what carries an
  Idempotency-Key;
- what the server refused with Retry-After, for which nothing is done twice: 429, 503, and 409 while an earlier request
  with the same key is worked on.
"""

import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, cast
from urllib.parse import quote

import httpx

from graft_client.errors import BY_STATUS, ServerRefused, ServerUnreachable, UnexpectedAnswer, WaitTimedOut
from graft_client.wire import Pieces, W

JsonObject = dict[str, Any]
T = TypeVar("T")

CONNECT_SECONDS = 10.0
# `?wait=` takes 60 at most, but proxies commonly give up a server that has said nothing for so long, or for 50.
LONGEST_WAIT_SECONDS = 45.0
LOOK_SECONDS = 1.0  # how often whoever wants to be told of it is told how far something is
WAITING_HELPS = (409, 429, 503)
AWAY = (502, 503, 504)  # as a proxy says it of a server that is being restarted, or Graft of its database
FIRST_PAUSE_SECONDS = 0.25  # doubled each time
LONGEST_PAUSE_SECONDS = 60.0  # a server that says to come back later than this is not waited for
RECONNECT_PAUSE_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """query: members that are None are left out. pieces: of the body, read again where it is sent again.

    is_repeatable: whether it may be sent again though it may have arrived. timeout_seconds: until an answer
    begins, where that is not the client's and what `?wait=` asks for besides.
    """

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    files: Any = None
    pieces: Pieces | None = None
    is_repeatable: bool = False
    timeout_seconds: float | None = None


class Connection(Generic[W]):
    """One server by one API key.

    max_retries: beside the first try. patience_seconds: how long a server may be away while something is waited for.
    """

    def __init__(self, url: str, wire: W, *, max_retries: int, patience_seconds: float) -> None:
        self.url = url
        self.wire: W = wire
        self.max_retries = max_retries
        self.patience_seconds = patience_seconds

    async def json(self, request: Request) -> JsonObject:
        """The answer's body. Raises ServerUnreachable, ServerRefused, UnexpectedAnswer."""
        return self.parsed(await self.answer(request))

    async def answer(self, request: Request) -> httpx.Response:
        """The answer, read to its end."""
        return await self._exchange(request, is_read=True)

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[httpx.Response]:
        """The answer while its body comes. Raises ServerUnreachable, too, where it stops coming."""
        response = await self._exchange(request, is_read=False)
        try:
            yield response
        except httpx.TransportError as error:
            raise ServerUnreachable(self.url, _reason(error)) from error
        finally:
            await self.wire.close(response)

    def parsed(self, response: httpx.Response) -> JsonObject:
        try:
            body = json.loads(response.content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise UnexpectedAnswer(f"What answers at {self.url} is not Graft: it sent no JSON object.")
        return body

    async def until(
        self,
        request: Request,
        decode: Callable[[JsonObject], T],
        *,
        is_final: Callable[[T], bool],
        timeout: float | None,
        on_look: Callable[[T], object] | None = None,
    ) -> T:
        """Asks with `?wait=` until the answer is final, over restarts of the server. Raises WaitTimedOut.

        on_look: is given each answer; they come every second then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        longest = LONGEST_WAIT_SECONDS if on_look is None else LOOK_SECONDS
        patience = Patience(self)
        while True:
            asked_at = time.monotonic()
            left = longest if deadline is None else max(0.0, deadline - asked_at)
            try:
                answer = await self.json(replace(request, query={"wait": round(min(left, longest), 3)}))
            except (ServerUnreachable, ServerRefused) as error:
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                await patience.bear(error)
                continue
            patience.renew()
            found = decode(answer)
            if on_look is not None:
                on_look(found)
            if is_final(found):
                return found
            if timeout is not None and deadline is not None and time.monotonic() >= deadline:
                raise WaitTimedOut(timeout, found)
            if time.monotonic() - asked_at < RECONNECT_PAUSE_SECONDS:
                await self.wire.sleep(RECONNECT_PAUSE_SECONDS)  # a server that is about to stop holds no answers

    async def _exchange(self, request: Request, *, is_read: bool) -> httpx.Response:
        for attempt in itertools.count():
            is_last = attempt >= self.max_retries
            try:
                response = await self.wire.send(self._built(request))
                if is_read or not response.is_success:
                    await self._read(response)
            except httpx.InvalidURL as error:
                raise ServerUnreachable(self.url, str(error)) from error
            except httpx.TransportError as error:
                if is_last or not _may_repeat(request, error):
                    raise ServerUnreachable(self.url, _reason(error)) from error
                await self.wire.sleep(_pause_seconds(attempt))
                continue
            if response.is_success:
                return response
            refusal = _refusal(response)
            pause = refusal.retry_after_seconds
            if is_last or pause is None or refusal.status not in WAITING_HELPS or pause > LONGEST_PAUSE_SECONDS:
                raise refusal
            await self.wire.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _read(self, response: httpx.Response) -> None:
        try:
            await self.wire.read(response)
        finally:
            await self.wire.close(response)

    def _built(self, request: Request) -> httpx.Request:
        content = None if request.pieces is None else self.wire.body(request.pieces)
        timeout: Any = httpx.USE_CLIENT_DEFAULT
        own = self.wire.http.timeout
        if request.timeout_seconds is not None:
            timeout = httpx.Timeout(request.timeout_seconds, connect=CONNECT_SECONDS)
        elif own.read is not None and (wait := request.query.get("wait")):
            timeout = httpx.Timeout(own.read + wait, connect=own.connect)
        return self.wire.http.build_request(
            request.method,
            request.path,
            params={name: value for name, value in request.query.items() if value is not None},
            headers=dict(request.headers),
            json=request.json,
            files=request.files,
            content=cast(Any, content),
            timeout=timeout,
        )


class Patience:
    """How long a server that has been reached may be away."""

    def __init__(self, connection: Connection[Any]) -> None:
        self._connection = connection
        self._away_since: float | None = None

    def renew(self) -> None:
        """It answers."""
        self._away_since = None

    async def bear(self, error: ServerUnreachable | ServerRefused) -> None:
        """Pauses before the next try; raises the error once it has been away for too long, or if it is not away."""
        if isinstance(error, ServerRefused) and error.status not in AWAY:
            raise error
        now = time.monotonic()
        self._away_since = now if self._away_since is None else self._away_since
        if now - self._away_since >= self._connection.patience_seconds:
            raise error
        await self._connection.wire.sleep(RECONNECT_PAUSE_SECONDS)


def path_of(template: str, *names: str) -> str:
    """A path with names in the place of its braces, escaped. Raises ValueError for an empty name."""
    if not all(names):
        raise ValueError(f"{template} needs an id or a name, not an empty text")
    return template.format(*(quote(name, safe="") for name in names))


def _may_repeat(request: Request, error: httpx.TransportError) -> bool:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return True  # nothing has arrived
    return request.is_repeatable and not isinstance(error, httpx.TimeoutException | httpx.UnsupportedProtocol)


def _pause_seconds(attempt: int) -> float:
    """With chance in it, so that many callers do not come back at once."""
    pause = FIRST_PAUSE_SECONDS * 2.0**attempt
    return min(pause, LONGEST_PAUSE_SECONDS) * random.uniform(0.75, 1.25)


def _reason(error: httpx.TransportError) -> str:
    return "it took too long to answer" if isinstance(error, httpx.TimeoutException) else str(error)


def _refusal(response: httpx.Response) -> ServerRefused:
    try:
        problem = json.loads(response.content)
    except ValueError:
        problem = {}
    if response.is_redirect:
        there = response.headers.get("Location", "another address")
        problem = {"detail": f"The server sends its callers to {there}; name that address."}
    retry_after = response.headers.get("Retry-After", "")
    return BY_STATUS.get(response.status_code, ServerRefused)(
        response.status_code,
        problem if isinstance(problem, dict) else {},
        request_id=response.headers.get("X-Request-ID"),
        retry_after_seconds=float(retry_after) if retry_after.isdecimal() else None,
    )
