"""The loop that courses teach (PyTorch's transfer-learning tutorial), to be measured against: nothing of Graft in it.

torchvision's ImageFolder and transforms through PIL, a DataLoader, fp32 in the default memory format, SGD 0.001 with
momentum 0.9, all modules in training mode, the running loss read with .item() after each step. What a method does not
train has requires_grad=False.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from app.jobs.recipes import CLASSIC, IMAGENET_MEAN, IMAGENET_STD
from app.vision.device import usable_cores

BATCH_SIZE = int(CLASSIC["batch_size"])
# Per network: its last layer, and what `fine_tuning` trains besides, as Graft's last stage.
HEADS = {"resnet18": "fc", "resnet50": "fc", "mobilenet_v3_small": "classifier.3"}
LAST_STAGES = {
    "resnet18": ("layer4",),
    "resnet50": ("layer4",),
    "mobilenet_v3_small": ("features.9", "features.10", "features.11", "features.12", "classifier.0"),
}


@dataclass
class Tutorial:
    """A network and its loaders; `epoch` is one pass of training and, as taught, one of validation."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    train: DataLoader[Any]
    val: DataLoader[Any]
    device: torch.device

    @classmethod
    def begin(
        cls,
        folder: Path,
        *,
        backbone: str,
        method: str,
        workers: int,
        device: torch.device,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> "Tutorial":
        """folder: with train/<class>/ and val/<class>/. state_dict: torchvision's; None is random weights."""
        normalise = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        change = transforms.Compose(
            [
                transforms.RandomResizedCrop(224),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                normalise,
            ]
        )
        look = transforms.Compose(
            [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), normalise]
        )
        train = datasets.ImageFolder(str(folder / "train"), change)
        val = datasets.ImageFolder(str(folder / "val"), look)
        network = _network(backbone, method, len(train.classes), state_dict).to(device)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return cls(
            network=network,
            optimizer=torch.optim.SGD(trainable, lr=0.001, momentum=0.9),
            train=DataLoader(train, batch_size=BATCH_SIZE, shuffle=True, num_workers=workers),
            val=DataLoader(val, batch_size=BATCH_SIZE, num_workers=workers),
            device=device,
        )

    def train_epoch(self) -> float:
        """Mean loss of one pass over the training pictures."""
        self.network.train()
        criterion = nn.CrossEntropyLoss()
        running_loss, count = 0.0, 0
        for images, labels in self.train:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            loss = criterion(self.network(images), labels)
            loss.backward()
            self.optimizer.step()
            running_loss += loss.item() * len(labels)
            count += len(labels)
        return running_loss / count

    def validate(self) -> float:
        """Accuracy on the validation pictures."""
        self.network.eval()
        correct, count = 0, 0
        with torch.no_grad():
            for images, labels in self.val:
                predicted = self.network(images.to(self.device)).argmax(1).cpu()
                correct += int((predicted == labels).sum())
                count += len(labels)
        return correct / count


def best_workers(
    begin: Callable[[int], Tutorial], *, counts: Sequence[int] = (0, 1, 2, 4, 8), tries: int = 2
) -> tuple[int, dict[int, float]]:
    """Of so many loader processes, as far as there are cores for them, those with the fastest epoch of training; and
    the seconds of each one's fastest.

    begin: a loop with this many. One epoch before the clock runs wakes threads and fills the file cache.
    """
    loops = {workers: begin(workers) for workers in counts if workers <= max(2, usable_cores())}
    next(iter(loops.values())).train_epoch()
    seconds: dict[int, float] = {}
    for _ in range(tries):
        for workers, loop in loops.items():
            start = time.perf_counter()
            loop.train_epoch()
            taken = time.perf_counter() - start
            seconds[workers] = min(taken, seconds.get(workers, taken))
    return min(seconds, key=lambda workers: seconds[workers]), seconds


def _network(backbone: str, method: str, class_count: int, state_dict: Mapping[str, Tensor] | None) -> nn.Module:
    network: nn.Module = torchvision.models.get_model(backbone, weights=None)
    if state_dict is not None:
        network.load_state_dict(state_dict)
    trained = {"feature_extraction": (), "fine_tuning": LAST_STAGES[backbone]}.get(method)
    if trained is not None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad = name.startswith(tuple(f"{part}." for part in trained))
    parent, _, last = HEADS[backbone].rpartition(".")
    owner = network.get_submodule(parent)
    setattr(owner, last, nn.Linear(network.get_submodule(HEADS[backbone]).in_features, class_count))
    return network
