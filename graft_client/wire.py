"""What differs between the two clients: how they send, read and sleep. Everything else is written once, with await.

A `BlockingWire` never suspends, so what awaits nothing else is run to its end by one step (`calls.py`).
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import anyio.to_thread
import httpx
from httpx_sse import EventSource, ServerSentEvent

T = TypeVar("T")
Pieces = Callable[[], Iterator[bytes]]  # a body; called again where the request is sent again


class BlockingWire:
    """Over an httpx.Client. is_direct: by no proxy, whatever the environment says."""

    def __init__(self, *, transport: httpx.BaseTransport | None, is_direct: bool, **options: Any) -> None:
        self.http = httpx.Client(transport=transport or (httpx.HTTPTransport() if is_direct else None), **options)

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The answer from when its headers are there; whoever sent it reads or closes it."""
        return self.http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> bytes:
        return response.read()

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        for piece in response.iter_bytes():
            yield piece

    async def events(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        for event in EventSource(response).iter_sse():
            yield event

    async def close(self, response: httpx.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What reads or writes files: where nothing else waits, at once."""
        return function(*arguments)

    def body(self, pieces: Pieces) -> Iterator[bytes]:
        return pieces()

    async def end(self) -> None:
        self.http.close()


class AsyncWire:
    """Over an httpx.AsyncClient. is_direct: by no proxy, whatever the environment says."""

    def __init__(self, *, transport: httpx.AsyncBaseTransport | None, is_direct: bool, **options: Any) -> None:
        direct = httpx.AsyncHTTPTransport() if is_direct else None
        self.http = httpx.AsyncClient(transport=transport or direct, **options)

    async def send(self, request: httpx.Request) -> httpx.Response:
        return await self.http.send(request, stream=True)

    async def read(self, response: httpx.Response) -> bytes:
        return await response.aread()

    async def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]:
        async for piece in response.aiter_bytes():
            yield piece

    async def events(self, response: httpx.Response) -> AsyncIterator[ServerSentEvent]:
        async for event in EventSource(response).aiter_sse():
            yield event

    async def close(self, response: httpx.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await anyio.to_thread.run_sync(function, *arguments)

    async def body(self, pieces: Pieces) -> AsyncIterator[bytes]:
        reading = pieces()
        while piece := await anyio.to_thread.run_sync(next, reading, b""):
            yield piece

    async def end(self) -> None:
        await self.http.aclose()


Wire = BlockingWire | AsyncWire
W = TypeVar("W", bound=Wire)
