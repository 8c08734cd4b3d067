"""Where pretrained weights come from: the operator's folder, torch's cache, our own, a download into it, or Graft.

Knows files and one web address; not networks. Nothing is used whose digest was not checked, except what has none in its
name: the operator's own `<backbone>.safetensors`, and the file that comes with Graft, which is trusted as its code is.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import httpx
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from app.errors import WeightsUnavailable
from app.settings import Settings
from app.vision.backbones import BACKBONES, BUNDLED, BackboneSpec, WeightsSpec, hollow

Availability = Literal["bundled", "local", "download"]
OnProgress = Callable[[int, int | None], None]  # bytes so far, bytes in all if the server said

# A job's submission waits for this probe, so it is short; its answer serves for a minute.
PROBE_TIMEOUT_SECONDS = 2.0
PROBE_MAX_AGE_SECONDS = 60.0

_DOWNLOAD_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_CHUNK_BYTES = 1024 * 1024
_STALE_PART_SECONDS = 24 * 3600  # a download that old was cut short by a crash

_REMEDY = (
    "Put the file into the folder that GRAFT_WEIGHTS_DIR names, choose a backbone that GET /v1/backbones calls local, "
    'or use "method": "from_scratch".'
)

# DenseNet's published files are older than the rule that a module's name has no dot.
OLD_DENSENET_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")


@dataclass(frozen=True)
class Found:
    """A weight file on this machine, not yet read."""

    weights: WeightsSpec
    path: Path


class WeightStore:
    """Finds, fetches and reads pretrained weights. Safe to share between threads."""

    def __init__(
        self,
        *,
        weights_dir: Path | None,
        download_dir: Path,
        base_url: str,
        allow_downloads: bool,
        cache_dir: Path | None = None,
    ) -> None:
        """cache_dir: torch's own download cache; None is where torch has it."""
        self._weights_dir = weights_dir
        self._cache_dir = cache_dir or Path(torch.hub.get_dir()) / "checkpoints"
        self._download_dir = download_dir
        self._base_url = base_url.rstrip("/")
        self._allow_downloads = allow_downloads
        self._probe_lock = threading.Lock()
        self._probes: dict[str, tuple[float, bool]] = {}

    @classmethod
    def from_settings(cls, settings: Settings) -> "WeightStore":
        return cls(
            weights_dir=settings.weights_dir,
            download_dir=settings.data_dir.resolve() / "weights",
            base_url=settings.weights_url,
            allow_downloads=settings.allow_downloads,
        )

    def find(self, name: str) -> Found | None:
        """The weight file that would be used for this backbone, if it is on this machine."""
        spec = BACKBONES[name]
        if self._weights_dir is not None:
            own = self._weights_dir / f"{name}.safetensors"
            if own.is_file():
                return Found(_oldest(spec), own)
        folders = (self._weights_dir, self._cache_dir, self._download_dir)
        for folder in (folder for folder in folders if folder is not None):
            for weights in spec.weights:
                if (folder / weights.file).is_file():
                    return Found(weights, folder / weights.file)
        bundled = next((weights for weights in spec.weights if weights.is_bundled), None)
        return Found(bundled, BUNDLED / bundled.file) if bundled else None

    def expected(self, name: str) -> WeightsSpec:
        """The weights that `obtain` will give for this backbone, where there are any."""
        found = self.find(name)
        return found.weights if found else BACKBONES[name].weights[0]

    def availability(self, name: str) -> Availability | None:
        """Where weights can be had from. Waits up to two seconds for the server, at most once a minute."""
        found = self.find(name)
        if found is not None:
            return _where(found)
        file = BACKBONES[name].weights[0].file
        return "download" if self._allow_downloads and self._answers(file, probe_key=file) else None

    def availabilities(self) -> dict[str, Availability | None]:
        """The same for all backbones, with one look at the server for the whole list."""
        here = {name: _where(found) for name in BACKBONES if (found := self.find(name)) is not None}
        missing = next((spec for name, spec in BACKBONES.items() if name not in here), None)
        can_download = (
            missing is not None
            and self._allow_downloads
            and self._answers(missing.weights[0].file, probe_key=_WHOLE_LIST)
        )
        remote: Availability | None = "download" if can_download else None
        return {name: here.get(name, remote) for name in BACKBONES}

    def obtain(self, name: str, on_progress: OnProgress | None = None) -> Found:
        """The weights of this backbone, downloaded if they are not here. Raises WeightsUnavailable."""
        found = self.find(name)
        if found is not None:
            return found
        weights = BACKBONES[name].weights[0]
        return Found(weights, self.fetch(weights, on_progress))

    def fetch(self, weights: WeightsSpec, on_progress: OnProgress | None = None) -> Path:
        """Downloads a weight file; it appears whole and checked, or not at all.

        Raises WeightsUnavailable, or what on_progress raises.
        """
        if not self._allow_downloads:
            raise WeightsUnavailable(
                f"The weights of {weights.backbone} ({weights.file}) are not on this machine, and downloads are "
                f"switched off (GRAFT_ALLOW_DOWNLOADS). {_REMEDY}"
            )
        self._download_dir.mkdir(parents=True, exist_ok=True)
        self._sweep()
        target = self._download_dir / weights.file
        part = self._download_dir / f"{weights.file}.{uuid.uuid4().hex}.part"
        try:
            with part.open("xb") as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # until this process is done with it, or dead
                digest = self._download(weights, file, on_progress)
                if not digest.startswith(_expected_digest(weights.file)):
                    raise WeightsUnavailable(
                        f"What was downloaded as {weights.file} is not that file: its digest is wrong. Check "
                        f"GRAFT_WEIGHTS_URL and any proxy in between. {_REMEDY}"
                    )
                part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def load(self, found: Found) -> dict[str, Tensor]:
        """The state dict of torchvision's whole network, on the CPU.

        Raises WeightsUnavailable if the file is damaged, or not what its name says.
        """
        file = found.path.name
        damaged = WeightsUnavailable(
            f"The weight file {file} is damaged or not what its name says; remove it or replace it by a good copy."
        )
        try:
            if found.path.suffix == ".safetensors":
                return _whole(safetensors.torch.load_file(found.path), found.weights)
            with found.path.open("rb") as stream:
                if not hashlib.file_digest(stream, "sha256").hexdigest().startswith(_expected_digest(file)):
                    raise damaged
            # torchvision publishes pickles. weights_only runs no code of theirs, and the digest above is published too.
            state_dict = torch.load(found.path, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
            raise damaged from error
        return {OLD_DENSENET_KEY.sub(r"\1\2", key): tensor for key, tensor in state_dict.items()}

    def _download(self, weights: WeightsSpec, part: BinaryIO, on_progress: OnProgress | None) -> str:
        """Streams the file to `part`, durably. Returns its sha256."""
        digest = hashlib.sha256()
        done = 0
        with (
            self._translated(weights),
            httpx.stream(
                "GET",
                f"{self._base_url}/{weights.file}",
                timeout=_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
                headers={"Accept-Encoding": "identity"},  # else Content-Length would not be the file's
            ) as response,
        ):
            response.raise_for_status()
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                part.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if on_progress is not None:
                    on_progress(done, total)
            part.flush()
            os.fsync(part.fileno())
        return digest.hexdigest()

    @contextmanager
    def _translated(self, weights: WeightsSpec) -> Iterator[None]:
        what = f"The weights of {weights.backbone} ({weights.file}) could not be downloaded"
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise WeightsUnavailable(
                f"{what}: the server answered {error.response.status_code}. Check GRAFT_WEIGHTS_URL. {_REMEDY}"
            ) from error
        except httpx.RemoteProtocolError as error:
            raise WeightsUnavailable(f"{what}: the connection was cut. Submit the job again. {_REMEDY}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise WeightsUnavailable(f"{what}: the server cannot be reached. {_REMEDY}") from error

    def _answers(self, file: str, *, probe_key: str) -> bool:
        """Whether the server says that it has this file; remembered for a minute under `probe_key`."""
        with self._probe_lock:
            known = self._probes.get(probe_key)
            if known is None or time.monotonic() - known[0] > PROBE_MAX_AGE_SECONDS:
                known = (time.monotonic(), _probe(f"{self._base_url}/{file}"))
                self._probes[probe_key] = known
            return known[1]

    def _sweep(self) -> None:
        deadline = time.time() - _STALE_PART_SECONDS
        for part in self._download_dir.glob("*.part"):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), part.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if part.stat().st_mtime < deadline:
                    part.unlink()


_WHOLE_LIST = "*"


def _where(found: Found) -> Availability:
    return "bundled" if found.path.parent == BUNDLED else "local"


def _whole(tensors: dict[str, Tensor], weights: WeightsSpec) -> dict[str, Tensor]:
    """In float32, whatever the file has: bundled ones, and some operators' own, are half as precise. These and imported
    ones may lack the head of 1000 classes, which nobody uses.

    A file that has a part of the head keeps what it has, and is refused for the rest where it is put to use.
    """
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    head = {f"{BACKBONES[weights.backbone].head}.{part}" for part in ("weight", "bias")}
    if head & tensors.keys():
        return tensors
    expected = hollow(weights.backbone).state_dict()
    return tensors | {name: torch.zeros(expected[name].shape) for name in head}


def _oldest(spec: BackboneSpec) -> WeightsSpec:
    """What `<backbone>.safetensors` is taken for: the contract gives such a file the preprocessing of IMAGENET1K_V1."""
    return spec.weights[-1]


def _expected_digest(file: str) -> str:
    """First hex digits of the sha256, from a name such as resnet50-11ad3fa6.pth."""
    return file.rpartition("-")[2].partition(".")[0]


def _probe(url: str) -> bool:
    """Whether a HEAD request succeeds within two seconds, name resolution included.

    A thread of its own, because the resolver of the operating system takes no timeout and may need much longer.
    """
    answers: list[bool] = []

    def ask() -> None:
        try:
            response = httpx.head(url, timeout=PROBE_TIMEOUT_SECONDS, follow_redirects=True)
        except (httpx.HTTPError, httpx.InvalidURL):
            return
        answers.append(response.is_success)

    thread = threading.Thread(target=ask, name="weights-probe", daemon=True)
    thread.start()
    thread.join(PROBE_TIMEOUT_SECONDS)
    return answers == [True]
