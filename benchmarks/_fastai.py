"""fastai's fine_tune in a process of its own, by an interpreter that has fastai: prints its seconds and accuracies.

    INTERPRETER benchmarks/_fastai.py IMAGE_FOLDER WEIGHTS_FILE EPOCHS SEED THREADS

IMAGE_FOLDER has train/ and val/. Imports nothing of Graft. Seconds are from making the loaders to the end of
fine_tune (one epoch with a frozen body, then EPOCHS with all of it), imports left out.
"""

import json
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # fastai's and torch's deprecations

import torch  # noqa: E402
import torchvision.models  # noqa: E402
from fastai.vision.all import (  # noqa: E402
    ImageDataLoaders,
    Normalize,
    RandomResizedCrop,
    accuracy,
    imagenet_stats,
    set_seed,
    vision_learner,
)
from safetensors.torch import load_file  # noqa: E402


def main() -> None:
    folder, weights, epochs, seed, threads = sys.argv[1:]
    if int(threads):
        torch.set_num_threads(int(threads))
    set_seed(int(seed))

    def network(pretrained: bool = True) -> torch.nn.Module:
        found = torchvision.models.mobilenet_v3_small(weights=None)
        found.load_state_dict(load_file(weights))
        return found

    start = time.perf_counter()
    loaders = ImageDataLoaders.from_folder(
        Path(folder),
        train="train",
        valid="val",
        bs=32,
        num_workers=2,
        item_tfms=RandomResizedCrop(224, min_scale=0.35),  # its own default for training, a centre crop for validation
        batch_tfms=[Normalize.from_stats(*imagenet_stats)],
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    learner = vision_learner(loaders, network, metrics=accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(int(epochs))
        seconds = time.perf_counter() - start
        found = float(learner.validate()[1])
    print(json.dumps({"seconds": seconds, "accuracy": found}))


if __name__ == "__main__":
    main()
