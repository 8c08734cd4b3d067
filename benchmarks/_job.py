"""A training job in a process of its own: seconds and peak memory of this process as JSON, for `measured`.

    python benchmarks/_job.py STORAGE_FOLDER SET SPEC_AS_JSON DEVICE THREADS

An empty spec only imports what a training imports. Peak memory is resident memory (VmHWM), mapped files included, or
on cuda what torch reserved on the card. Seconds are from the built process to measured weights, as a worker's child
spends them on a job, with the memory settings that it has; nothing is published.
"""

import gc
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _setup import Ingested, classifier, fitted, opened

from app.allocator import keep_freed_memory
from app.jobs.spec import TrainingSpec
from app.storage import LocalStorage
from app.vision.device import resolve_device
from worker.training import methods, self_supervised


@dataclass(frozen=True)
class Cost:
    """What a job took. mapped_bytes: the part of its memory that is files, such as packed pictures, at its end."""

    seconds: float
    peak_bytes: int
    mapped_bytes: int


def measured(spec: TrainingSpec | None, data: Ingested, *, device: str, threads: int = 0) -> Cost:
    """Runs a job on random weights in a fresh process. spec: None for one that only imports."""
    text = spec.model_dump_json() if spec else ""
    command = [sys.executable, __file__, str(data.storage.root), data.name, text, device, str(threads)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Cost(**json.loads(answer.splitlines()[-1]))


def main() -> None:
    keep_freed_memory()
    gc.freeze()
    folder, name, text, device_name, threads = sys.argv[1:]
    device = resolve_device(device_name)
    if int(threads):
        torch.set_num_threads(int(threads))
    start = time.perf_counter()
    if text:
        _train(TrainingSpec.model_validate_json(text), opened(name, LocalStorage(Path(folder))), device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else _status_bytes("VmHWM")
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "mapped_bytes": _status_bytes("RssFile")}))


def _train(spec: TrainingSpec, data: Ingested, device: torch.device) -> None:
    competing = []  # auto keeps what the methods before have made
    for each in spec.candidates or [spec]:
        is_labelled = each.method != "self_supervised"
        prepare = methods.prepare if is_labelled else self_supervised.prepare
        training = prepare(
            each,
            classifier=classifier(each, len(data.manifest.classes) if is_labelled else 0, None),
            manifest=data.manifest,
            images=data.images(each),
            device=device,
        )
        for _ in fitted(training):
            pass
        competing.append(
            methods.conclude(training, data.manifest) if is_labelled else self_supervised.conclude(training)
        )


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


if __name__ == "__main__":
    main()
