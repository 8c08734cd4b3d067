"""`/v1/datasets`: upload, wait, look at, delete."""

from collections.abc import AsyncIterator, Callable
from typing import Literal

from graft_client import shared
from graft_client.answers import Dataset, DatasetImage, DatasetStatus, Deleted, Page, Split
from graft_client.calls import Resource, call, stream
from graft_client.connection import Request, path_of
from graft_client.decoding import decode
from graft_client.uploads import ArchiveSource, OnProgress
from graft_client.wire import W

DATASETS = "/v1/datasets"
DATASET = "/v1/datasets/{}"
IMAGES = "/v1/datasets/{}/images"


class Datasets(Resource[W]):
    @call
    async def upload(
        self,
        source: ArchiveSource,
        *,
        name: str | None = None,
        kind: Literal["labelled", "unlabelled"] | None = None,
        val_fraction: float | None = None,
        seed: int | None = None,
        wait: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> Dataset:
        """Streams an archive, or a folder as a zip, to the server, which then checks the pictures: see `wait`.

        name: that of the file or folder if left out. wait: seconds to hold the answer until they are checked, 0 to 60.
        """
        query = {"name": name, "kind": kind, "val_fraction": val_fraction, "seed": seed, "wait": wait}
        answer = await shared.upload(self._connection, DATASETS, source, query, on_progress, takes_name=True)
        return decode(Dataset, answer)

    @call
    async def get(self, dataset_id: str, *, wait: float | None = None) -> Dataset:
        """wait: seconds to hold the answer until the data set is ready or failed, 0 to 60."""
        request = Request(method="GET", path=path_of(DATASET, dataset_id), query={"wait": wait}, is_repeatable=True)
        return decode(Dataset, await self._connection.json(request))

    @call
    async def wait(
        self, dataset_id: str, *, timeout: float | None = None, on_look: Callable[[Dataset], object] | None = None
    ) -> Dataset:
        """The data set once it is ready or failed.

        timeout: seconds until WaitTimedOut. on_look: is given it every second, for its `progress`.
        """
        request = Request(method="GET", path=path_of(DATASET, dataset_id), is_repeatable=True)
        return await self._connection.until(
            request,
            lambda answer: decode(Dataset, answer),
            is_final=lambda found: found.is_final,
            timeout=timeout,
            on_look=on_look,
        )

    @call
    async def list(
        self, *, limit: int | None = None, after: str | None = None, status: DatasetStatus | None = None
    ) -> Page[Dataset]:
        """Newest first."""
        query = {"limit": limit, "after": after, "status": status}
        return await shared.page(self._connection, DATASETS, Dataset, query)

    @stream
    def all(self, *, status: DatasetStatus | None = None) -> AsyncIterator[Dataset]:
        """Every one of `list`, page after page."""
        return shared.pages(self._connection, DATASETS, Dataset, {"status": status})

    @call
    async def delete(self, dataset_id: str) -> Deleted:
        """Models trained on it stay."""
        return decode(Deleted, await self._connection.json(Request(method="DELETE", path=path_of(DATASET, dataset_id))))

    @call
    async def images(
        self,
        dataset_id: str,
        *,
        class_name: str | None = None,
        split: Split | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Page[DatasetImage]:
        query = {"class": class_name, "split": split, "limit": limit, "after": after}
        return await shared.page(self._connection, path_of(IMAGES, dataset_id), DatasetImage, query)

    @stream
    def all_images(
        self, dataset_id: str, *, class_name: str | None = None, split: Split | None = None
    ) -> AsyncIterator[DatasetImage]:
        """Every one of `images`, page after page."""
        query = {"class": class_name, "split": split}
        return shared.pages(self._connection, path_of(IMAGES, dataset_id), DatasetImage, query)

    @call
    async def thumbnail(self, dataset_id: str, image_id: str) -> bytes:
        """A small JPEG."""
        path = path_of("/v1/datasets/{}/images/{}/thumbnail", dataset_id, image_id)
        return (await self._connection.answer(Request(method="GET", path=path, is_repeatable=True))).content

    @call
    async def make_version(self, dataset_id: str, *, name: str | None = None, model: str | None = None) -> Dataset:
        """A new data set of this one's pictures and of those that people gave feedback on. model: of this one alone."""
        path = path_of("/v1/datasets/{}/versions", dataset_id)
        request = Request(method="POST", path=path, query={"name": name, "model": model})
        return decode(Dataset, await self._connection.json(request))
