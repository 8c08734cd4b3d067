"""What this machine can do where nothing is served: decode, preprocess, forward, best five. For serving.py.

Prints pictures a second, CPU milliseconds a picture, and milliseconds of a picture that is alone.
"""

import itertools
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from app.serving import engine_builder
from app.serving.engines import Engine, Threads, TorchEngine, open_engine
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact, images
from app.vision.device import usable_cores
from app.vision.images import ImageLimits
from app.vision.preprocessing import eval_pixels

BATCH = 8

Prepare = Callable[[bytes], Tensor]
Answer = Callable[[list[Tensor]], None]


def main() -> None:
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    storage = LocalStorage(folder / "data")
    (model_folder,) = storage.path("models").iterdir()
    model = artifact.load(model_folder)
    built = list(storage.path("engines").glob("*/engine.json"))
    engine: Engine = TorchEngine(model.classifier.backbone, model.preprocessing, torch.device("cpu"))
    alone_in_its_thread: Engine | None = None
    if built:
        report = engine_builder.open_built(built[0].parent).report
        keeps_half = report.half_keeps.get(model_folder.name)
        if chosen := (report.half if keeps_half else None) or report.exact:
            file = built[0].parent / "engine.onnx"
            engine = open_engine(chosen.engine, file, chosen.threads)
            alone_in_its_thread = open_engine(chosen.engine, file, Threads(1, 1))
    limits = ImageLimits.from_settings(Settings())
    encoded = [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]
    head, best = model.classifier.head, min(5, len(model.classes))

    def prepared(picture: bytes) -> Tensor:
        return eval_pixels(images.decode(picture, side=model.preprocessing.side, limits=limits), model.preprocessing)

    def answering(features: Callable[[Tensor], Tensor]) -> Answer:
        def answered(pixels: list[Tensor]) -> None:
            with torch.no_grad():
                head(features(torch.stack(pixels))).softmax(1).topk(best).values.tolist()

        return answered

    answered = answering(engine.features)

    alone = []
    for picture in encoded[:40]:
        start = time.perf_counter()
        answered([prepared(picture)])
        alone.append(time.perf_counter() - start)
    ways = [lambda: _in_turns(prepared, answered, encoded, seconds)]
    if alone_in_its_thread is not None:
        beside = answering(alone_in_its_thread.features)
        ways.append(lambda: _side_by_side(prepared, beside, encoded, seconds))
    per_second, cpu = max(way() for way in ways)
    print(per_second, 1000 * cpu, 1000 * statistics.median(alone))


def _in_turns(prepared: Prepare, answered: Answer, encoded: list[bytes], seconds: float) -> tuple[float, float]:
    """A thread per core decodes, one runs batches. Returns pictures a second, and CPU seconds of each."""
    done, waiting = 0, deque[Future[Tensor]]()
    pictures = itertools.cycle(encoded)
    before, start = _cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(usable_cores()) as pool:
        while time.perf_counter() - start < seconds:
            while len(waiting) < 4 * BATCH:
                waiting.append(pool.submit(prepared, next(pictures)))
            answered([waiting.popleft().result() for _ in range(BATCH)])
            done += BATCH
        taken, cpu = time.perf_counter() - start, _cpu_seconds() - before
        pool.shutdown(cancel_futures=True)
    return done / taken, cpu / done


def _side_by_side(prepared: Prepare, answered: Answer, encoded: list[bytes], seconds: float) -> tuple[float, float]:
    """A thread per core does all of it."""

    def work(first: int) -> int:
        done, pictures = 0, itertools.cycle(encoded[first:] + encoded[:first])
        while time.perf_counter() - start < seconds:
            answered([prepared(next(pictures)) for _ in range(BATCH)])
            done += BATCH
        return done

    before, start = _cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(usable_cores()) as pool:
        done = sum(pool.map(work, range(usable_cores())))
    return done / (time.perf_counter() - start), (_cpu_seconds() - before) / done


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
