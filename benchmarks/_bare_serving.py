"""What this machine can do where nothing is served: decode, preprocess, forward, best five. For serving.py.

Prints pictures a second, CPU milliseconds a picture, and milliseconds of a picture that is alone.
"""

import itertools
import resource
import statistics
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from app.serving import engines
from app.serving.engines import Engine, TorchEngine
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact, images
from app.vision.device import usable_cores
from app.vision.images import ImageLimits
from app.vision.preprocessing import eval_pixels

BATCH = 8


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    storage = LocalStorage(folder / "data")
    (model_folder,) = storage.path("models").iterdir()
    model = artifact.load(model_folder)
    built = list(storage.path("engines").glob("*/engine.json"))
    engine: Engine | None = engines.open_built(built[0].parent)[0] if built else None
    engine = engine or TorchEngine(model.classifier.backbone, model.preprocessing, torch.device("cpu"))
    limits = ImageLimits.from_settings(Settings())
    encoded = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]
    head = model.classifier.head

    def prepared(picture: bytes) -> Tensor:
        return eval_pixels(images.decode(picture, side=model.preprocessing.side, limits=limits), model.preprocessing)

    def answered(pixels: list[Tensor]) -> None:
        with torch.no_grad():
            head(engine.features(torch.stack(pixels))).softmax(1).topk(5).values.tolist()

    alone = []
    for picture in encoded[:40]:
        start = time.perf_counter()
        answered([prepared(picture)])
        alone.append(time.perf_counter() - start)
    done, waiting = 0, deque[Future[Tensor]]()
    pictures = itertools.cycle(encoded)
    before, start = _cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(usable_cores()) as pool:
        while time.perf_counter() - start < seconds:
            while len(waiting) < 4 * BATCH:
                waiting.append(pool.submit(prepared, next(pictures)))
            answered([waiting.popleft().result() for _ in range(BATCH)])
            done += BATCH
        taken = time.perf_counter() - start
        cpu = _cpu_seconds() - before
        pool.shutdown(cancel_futures=True)
    print(done / taken, 1000 * cpu / done, 1000 * statistics.median(alone))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
