"""Uploads in pieces, by a stock client, to an API that is killed again and again: nothing acknowledged is ever lost."""

import hashlib
import io
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import builders
import httpx
import pytest
from running import START_WITHIN_SECONDS, environment_for, wait_until
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError, TusUploadFailed

from app.db.migrate import upgrade

FINISH_WITHIN_SECONDS = 60.0


class KilledApi:
    """The API as a process on one port and folder, whatever process it is just now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._log = (folder / "api.log").open("w")
        upgrade(f"sqlite:///{folder / 'data' / 'graft.db'}")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = environment_for(
            self.folder / "data", port=str(self._port), device="cpu", min_free_bytes="0", allow_downloads="false"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "app.main"], cwd=self.folder, env=environment, stdout=self._log, stderr=self._log
        )
        wait_until(self._is_up, within_seconds=START_WITHIN_SECONDS, otherwise="the API did not start")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.kill()
        self._log.close()

    def _is_up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "api.log").read_text()[-2000:]
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False


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


@contextmanager
def killed_api(folder: Path) -> Iterator[KilledApi]:
    (folder / "data").mkdir()
    api = KilledApi(folder)
    api.start()
    try:
        yield api
    finally:
        api.close()


@pytest.mark.parametrize(
    "kills", [4, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(5400)])], ids=["few", "many"]
)
def test_no_acknowledged_byte_is_lost_and_each_archive_becomes_one_data_set(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    with killed_api(tmp_path) as api:
        uploader = Uploader(api.url, seed=kills)
        uploader.start()
        for _ in range(kills):
            time.sleep(chance.uniform(0.0, 1.0))  # the moment of a kill, not a wait
            api.kill()
            api.start()
        uploader.stop()

        assert uploader.breaks >= kills / 2
        assert len(uploader.finished) >= kills / 2
        made = {}
        for address, archive in uploader.finished.items():
            upload = httpx.get(address, params={"wait": FINISH_WITHIN_SECONDS}, timeout=90).json()
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
