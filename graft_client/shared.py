"""What several groups of calls do alike: an upload, one page of a list, all pages, a download."""

import secrets
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx

from graft_client.answers import Page
from graft_client.connection import Connection, JsonObject, Request
from graft_client.decoding import decode
from graft_client.uploads import ArchiveSource, OnProgress, upload_of

T = TypeVar("T")

LARGEST_PAGE = 200
# Until an answer begins: large archives are read through first, and files may have to be made.
MAKING_SECONDS = 1800.0


def once() -> dict[str, str]:
    """The header by which a request that is sent again makes nothing twice."""
    return {"Idempotency-Key": secrets.token_hex(16)}


async def upload(
    connection: Connection[Any],
    path: str,
    source: ArchiveSource,
    query: Mapping[str, Any],
    on_progress: OnProgress | None,
    *,
    takes_name: bool = False,
) -> JsonObject:
    """takes_name: whether the file's name goes with it where the query has none."""
    archive = await connection.wire.in_thread(upload_of, source, on_progress)
    if takes_name and query["name"] is None:
        query = {**query, "name": archive.name}
    length = {} if archive.length is None else {"Content-Length": str(archive.length)}
    request = Request(
        method="PUT",
        path=path,
        query=query,
        headers=once() | length | {"Content-Type": "application/octet-stream"},
        pieces=archive.pieces,
        is_repeatable=True,
        timeout_seconds=MAKING_SECONDS,
    )
    return await connection.json(request)


async def page(connection: Connection[Any], path: str, kind: type[T], query: Mapping[str, Any]) -> Page[T]:
    listing = await connection.json(Request(method="GET", path=path, query=query, is_repeatable=True))
    return Page(
        data=[decode(kind, each) for each in listing.get("data", [])],
        has_more=bool(listing.get("has_more")),
        first_id=listing.get("first_id"),
        last_id=listing.get("last_id"),
    )


async def pages(connection: Connection[Any], path: str, kind: type[T], query: Mapping[str, Any]) -> AsyncIterator[T]:
    """Every entry, asked for as they are wanted."""
    after = None
    while True:
        found = await page(connection, path, kind, {"limit": LARGEST_PAGE, **query, "after": after})
        for entry in found:
            yield entry
        if not found.has_more:
            return
        after = found.last_id


async def download(connection: Connection[Any], request: Request, target: Path) -> httpx.Headers:
    """Writes an answer's body to a file, which is there when it is whole. Returns the answer's headers.

    What is there and is no file, as a pipe or /dev/stdout, is written to as the body comes, and stays what it is.
    """
    in_thread = connection.wire.in_thread
    is_replaceable = target.is_file() or not target.exists()
    target = target.resolve() if is_replaceable else target  # a link stays, and leads to the new file
    written = target.with_name(f"{target.name}.part") if is_replaceable else target
    async with connection.open(request) as response:
        try:
            file = await in_thread(written.open, "wb")
            try:
                async for piece in connection.wire.pieces(response):
                    await in_thread(file.write, piece)
            finally:
                await in_thread(file.close)
            if is_replaceable:
                await in_thread(written.replace, target)
        finally:
            if is_replaceable:
                written.unlink(missing_ok=True)
    return response.headers
