"""Uploads, in pieces by a stock client and whole ones under a key, to an API that is killed again and again: nothing
acknowledged is ever lost, and nothing is there twice."""

import hashlib
import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import builders
import httpx
import pytest
from killed_api import KilledApi, killed_api
from running import wait_until
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

from app.storage import LocalStorage

FINISH_WITHIN_SECONDS = 120.0
MANY = int(os.environ.get("GRAFT_TEST_KILLS", "30"))
OF_WHOLE_UPLOADS = int(os.environ.get("GRAFT_TEST_KILLS", "5"))


class Uploader:
    """Uploads one archive after the other, until told to stop: in a thread, since the API is killed meanwhile. How it
    does that is its subclasses' affair."""

    def __init__(self, url: str, *, seed: int) -> None:
        self._url = url
        self._chance = random.Random(seed)
        self._is_to_stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.finished: dict[str, bytes] = {}  # archives by what their uploads were acknowledged as
        self.breaks = 0
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns once the archive at hand is whole."""
        self._is_to_stop.set()
        self._thread.join(FINISH_WITHIN_SECONDS)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._is_to_stop.is_set():
                archive = builders.zip_of(builders.class_folders(4, first_seed=self._chance.randrange(10**6)))
                self.finished[self._upload(archive)] = archive
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self.error = error

    def _upload(self, archive: bytes) -> str:
        raise NotImplementedError


class InPieces(Uploader):
    """By tus. Acknowledged are the uploads' addresses."""

    def _upload(self, archive: bytes) -> str:
        address, acknowledged = None, 0
        deadline = time.monotonic() + FINISH_WITHIN_SECONDS
        while time.monotonic() < deadline:
            try:
                uploader = TusClient(f"{self._url}/v1/uploads").uploader(
                    file_stream=io.BytesIO(archive), url=address, chunk_size=self._chance.randrange(500, 5000)
                )
                if address is None:
                    address = uploader.create_url()
                    uploader.set_url(address)
                assert uploader.offset >= acknowledged, (uploader.offset, acknowledged)
                while uploader.offset < len(archive):
                    uploader.upload_chunk()
                    acknowledged = uploader.offset
                return str(address)
            except TusCommunicationError:
                self.breaks += 1
            except TusUploadFailed as error:
                assert error.status_code in (None, 409, 423), error
                self.breaks += 1
            time.sleep(0.02)
        raise AssertionError("an upload did not get through")


class AtOnce(Uploader):
    """In one request each, repeated under its Idempotency-Key until it is answered. Acknowledged are the data sets."""

    def _upload(self, archive: bytes) -> str:
        key = f"key-{self._chance.randrange(10**9)}"
        dataset = self._put(archive, key)
        while self._chance.random() < 0.3:  # whoever lost the answer asks again
            assert self._put(archive, key) == dataset
        return dataset

    def _put(self, archive: bytes, key: str) -> str:
        deadline = time.monotonic() + FINISH_WITHIN_SECONDS
        while time.monotonic() < deadline:
            try:
                answer = httpx.put(
                    f"{self._url}/v1/datasets",
                    content=self._trickle(archive),
                    headers={"Idempotency-Key": key},
                    timeout=60,
                )
            except httpx.TransportError:
                self.breaks += 1
                time.sleep(0.02)
                continue
            assert answer.status_code == 201, answer.text
            return str(answer.json()["id"])
        raise AssertionError("an upload did not get through")

    def _trickle(self, archive: bytes) -> Iterator[bytes]:
        """So that a kill comes as often while the body comes as after it."""
        pause = self._chance.choice([0.0, 0.02])
        for start in range(0, len(archive), 4096):
            yield archive[start : start + 4096]
            time.sleep(pause)


def kill_again_and_again(api: KilledApi, kills: int, uploader: Uploader) -> None:
    """Returns once what the uploader was at is acknowledged."""
    chance = random.Random(kills)
    uploader.start()
    for _ in range(kills):
        time.sleep(chance.uniform(0.0, 1.5))  # the moment of a kill, not a wait
        api.kill()
        api.start()
    uploader.stop()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_acknowledged_byte_is_lost_and_each_archive_becomes_one_data_set(tmp_path: Path) -> None:
    with killed_api(tmp_path) as api:
        uploader = InPieces(api.url, seed=MANY)
        kill_again_and_again(api, MANY, uploader)

        assert uploader.breaks >= MANY / 2
        assert len(uploader.finished) >= MANY / 2
        made = {}
        for address, archive in uploader.finished.items():
            upload = httpx.get(address, params={"wait": 60}, timeout=90).json()
            assert (upload["status"], upload["offset"]) == ("finished", len(archive)), upload
            made[upload["dataset"]] = hashlib.sha256(archive).hexdigest()
        assert {dataset["id"]: dataset["sha256"] for dataset in all_datasets(api.url)} == made
        stored = {path.parent.name: path.read_bytes() for path in tmp_path.glob("data/datasets/*/archive")}
        assert {id: hashlib.sha256(archive).hexdigest() for id, archive in stored.items() if id in made} == made


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_whole_upload_becomes_one_data_set_however_often_it_was_cut_and_repeated(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with killed_api(tmp_path) as api:
        uploader = AtOnce(api.url, seed=OF_WHOLE_UPLOADS)
        kill_again_and_again(api, OF_WHOLE_UPLOADS, uploader)
        record_property("broken_requests", uploader.breaks)  # of a long run, for docs/reliability.md
        record_property("data_sets", len(uploader.finished))

        assert uploader.breaks >= OF_WHOLE_UPLOADS / 2
        made = {dataset: hashlib.sha256(archive).hexdigest() for dataset, archive in uploader.finished.items()}
        assert {dataset["id"]: dataset["sha256"] for dataset in all_datasets(api.url)} == made
        api.kill()
        api.start()
        storage = LocalStorage(tmp_path / "data")
        wait_until(
            lambda: not list(storage.path("staging").iterdir()),
            within_seconds=FINISH_WITHIN_SECONDS,
            otherwise="what the dead had staged was not swept",
        )

    # What was published and never got its row is announced, and so found by a sweep.
    storage.sweep_announced(lambda key: key.removeprefix("datasets/") in made, older_than_seconds=-1)
    stored = {path.name: path / "archive" for path in storage.path("datasets").iterdir()}
    assert {id: hashlib.sha256(archive.read_bytes()).hexdigest() for id, archive in stored.items()} == made
    assert list(storage.path("announced").iterdir()) == []


def all_datasets(url: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    has_more, after = True, ""
    while has_more:
        page = httpx.get(f"{url}/v1/datasets", params={"limit": 200, "after": after}).json()
        found += page["data"]
        has_more, after = page["has_more"], page["last_id"]
    return found
