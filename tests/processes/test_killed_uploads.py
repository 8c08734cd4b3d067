"""Uploads in pieces, by a stock client, to an API that is killed again and again: nothing acknowledged is ever lost."""

import hashlib
import io
import os
import random
import threading
import time
from pathlib import Path

import builders
import httpx
import pytest
from killed_api import killed_api
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

FINISH_WITHIN_SECONDS = 120.0
MANY = int(os.environ.get("GRAFT_TEST_KILLS", "50"))


class Uploader:
    """Uploads one archive after the other, until told to stop: in a thread, since the API is killed meanwhile."""

    def __init__(self, url: str, *, seed: int) -> None:
        self._url = url
        self._chance = random.Random(seed)
        self._is_to_stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.finished: dict[str, bytes] = {}  # archives by the uploads that were whole
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


@pytest.mark.parametrize(
    "kills", [4, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])], ids=["few", "many"]
)
def test_no_acknowledged_byte_is_lost_and_each_archive_becomes_one_data_set(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    with killed_api(tmp_path) as api:
        uploader = Uploader(api.url, seed=kills)
        uploader.start()
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 1.5))  # the moment of a kill, not a wait
            api.kill()
            api.start()
        uploader.stop()

        assert uploader.breaks >= kills / 2
        assert len(uploader.finished) >= kills / 2
        made = {}
        for address, archive in uploader.finished.items():
            upload = httpx.get(address, params={"wait": 60}, timeout=90).json()
            assert (upload["status"], upload["offset"]) == ("finished", len(archive)), upload
            made[upload["dataset"]] = hashlib.sha256(archive).hexdigest()
        assert {dataset["id"]: dataset["sha256"] for dataset in all_datasets(api.url)} == made
        stored = {path.parent.name: path.read_bytes() for path in tmp_path.glob("data/datasets/*/archive")}
        assert {id: hashlib.sha256(archive).hexdigest() for id, archive in stored.items() if id in made} == made


def all_datasets(url: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    has_more, after = True, ""
    while has_more:
        page = httpx.get(f"{url}/v1/datasets", params={"limit": 200, "after": after}).json()
        found += page["data"]
        has_more, after = page["has_more"], page["last_id"]
    return found
