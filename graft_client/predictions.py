"""`/predict`, `/v1/predictions` and `/v1/batches`: what models say of pictures, and what people say of that."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graft_client import shared
from graft_client.answers import Batch, Deleted, JobStatus, Page, Predictions, StoredPrediction
from graft_client.calls import Resource, call, stream
from graft_client.connection import Connection, JsonObject, Request, path_of
from graft_client.decoding import decode
from graft_client.errors import InvalidRequest, TooLarge
from graft_client.uploads import (
    ArchiveSource,
    NamedPicture,
    OnProgress,
    PathLike,
    Pictures,
    as_sequence,
    form_part,
    grouped,
)
from graft_client.wire import W

PREDICTION = "/v1/predictions/{}"
BATCHES = "/v1/batches"
BATCH = "/v1/batches/{}"
UNREADABLE = "unreadable-image"


async def predict(
    connection: Connection[Any], pictures: Pictures, options: Mapping[str, Any], on_progress: OnProgress | None
) -> Predictions:
    """In the order of the pictures, asked for in as many requests as they need, of one model.

    on_progress gets numbers of pictures. Raises InvalidRequest or TooLarge if none of the pictures can be read.
    """
    wanted = as_sequence(pictures)
    if not wanted:
        raise ValueError("There are no pictures to predict.")
    groups, answer, refusal = grouped(wanted), None, None
    predictions: list[JsonObject] = []
    while group := await connection.wire.in_thread(next, groups, None):
        try:
            answer = await _ask(connection, group, options)
            predictions += answer["predictions"]
        except (InvalidRequest, TooLarge) as error:
            is_of_pictures = error.code == UNREADABLE or isinstance(error, TooLarge)
            if not is_of_pictures or len(group) == len(wanted):
                raise
            refusal = error
            predictions += [await _refused(connection, named, options) for named in group]
        if answer is not None and not options.get("store"):  # kept predictions remember the alias that was asked
            options = {**options, "model": answer["model"]}
        if on_progress is not None:
            on_progress(len(predictions), len(wanted))
    if answer is None:
        assert refusal is not None
        raise refusal
    return decode(Predictions, answer | {"predictions": predictions})


async def _ask(connection: Connection[Any], group: Sequence[NamedPicture], options: Mapping[str, Any]) -> JsonObject:
    request = Request(
        method="POST",
        path="/predict",
        query=options,
        files=[form_part(named) for named in group],
        is_repeatable=not options.get("store"),
    )
    return await connection.json(request)


async def _refused(connection: Connection[Any], named: NamedPicture, options: Mapping[str, Any]) -> JsonObject:
    """What is wrong with one picture of a request that was refused for its pictures, as an entry among others."""
    try:
        [found] = (await _ask(connection, [named], options))["predictions"]
    except (InvalidRequest, TooLarge) as error:
        return {"filename": named[0], "error": {"detail": error.detail, **error.problem}}
    entry: JsonObject = found
    return entry


class StoredPredictions(Resource[W]):
    """Predictions that were kept by `store=True`."""

    @call
    async def get(self, prediction_id: str) -> StoredPrediction:
        request = Request(method="GET", path=path_of(PREDICTION, prediction_id), is_repeatable=True)
        return decode(StoredPrediction, await self._connection.json(request))

    @call
    async def list(
        self, *, limit: int | None = None, after: str | None = None, model: str | None = None
    ) -> Page[StoredPrediction]:
        """Newest first."""
        query = {"limit": limit, "after": after, "model": model}
        return await shared.page(self._connection, "/v1/predictions", StoredPrediction, query)

    @stream
    def all(self, *, model: str | None = None) -> AsyncIterator[StoredPrediction]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, "/v1/predictions", StoredPrediction, {"model": model})

    @call
    async def picture(self, prediction_id: str) -> bytes:
        """The picture as it was sent."""
        request = Request(method="GET", path=path_of(PREDICTION + "/picture", prediction_id), is_repeatable=True)
        return (await self._connection.answer(request)).content

    @call
    async def give_feedback(
        self, prediction_id: str, label: str, *, task: str | None = None, new_class: bool = False
    ) -> StoredPrediction:
        """Says what the picture is. new_class: whether the label may be one that the model does not know."""
        request = Request(
            method="POST",
            path=path_of(PREDICTION + "/feedback", prediction_id),
            json={"label": label, "task": task, "new_class": new_class},
            is_repeatable=True,
        )
        return decode(StoredPrediction, await self._connection.json(request))

    @call
    async def delete(self, prediction_id: str) -> Deleted:
        path = path_of(PREDICTION, prediction_id)
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path)))


class Batches(Resource[W]):
    """Whole archives of pictures, classified beside training."""

    @call
    async def submit(
        self,
        source: ArchiveSource,
        *,
        model: str | None = None,
        top_k: int | None = None,
        wait: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Batch:
        """Streams an archive, or a folder as a zip, to the server. wait: seconds to hold the answer, 0 to 60."""
        query = {"model": model, "top_k": top_k, "wait": wait}
        return decode(Batch, await shared.upload(self._connection, BATCHES, source, query, on_progress))

    @call
    async def get(self, batch_id: str, *, wait: float | None = None) -> Batch:
        """wait: seconds to hold the answer until the batch has ended, 0 to 60."""
        request = Request(method="GET", path=path_of(BATCH, batch_id), query={"wait": wait}, is_repeatable=True)
        return decode(Batch, await self._connection.json(request))

    @call
    async def wait(
        self, batch_id: str, *, timeout: float | None = None, on_look: Callable[[Batch], object] | None = None
    ) -> Batch:
        """The batch once it has ended, however it did: see its `status`.

        timeout: seconds until WaitTimedOut. on_look: is given it every second, for its `progress`.
        """
        request = Request(method="GET", path=path_of(BATCH, batch_id), is_repeatable=True)
        return await self._connection.until(
            request,
            lambda answer: decode(Batch, answer),
            is_final=lambda found: found.is_final,
            timeout=timeout,
            on_look=on_look,
        )

    @call
    async def list(
        self, *, limit: int | None = None, after: str | None = None, status: JobStatus | None = None
    ) -> Page[Batch]:
        """Newest first."""
        query = {"limit": limit, "after": after, "status": status}
        return await shared.page(self._connection, BATCHES, Batch, query)

    @stream
    def all(self, *, status: JobStatus | None = None) -> AsyncIterator[Batch]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, BATCHES, Batch, {"status": status})

    @call
    async def download(self, batch_id: str, target: PathLike, *, format: Literal["jsonl", "csv"] = "jsonl") -> Path:
        """Writes the results of a batch that has succeeded to a file, whole or not at all."""
        request = Request(
            method="GET",
            path=path_of(BATCH + "/results", batch_id),
            query={"format": format},
            is_repeatable=True,
            timeout_seconds=shared.MAKING_SECONDS,
        )
        await shared.download(self._connection, request, Path(target))
        return Path(target)

    @call
    async def cancel(self, batch_id: str) -> Batch:
        request = Request(method="POST", path=path_of(BATCH + "/cancel", batch_id))
        return decode(Batch, await self._connection.json(request))

    @call
    async def delete(self, batch_id: str) -> Deleted:
        """Of a batch that has ended, with its pictures and results."""
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(BATCH, batch_id))))
