r"""Trains `graft_small` and writes a file such as the one that ships with Graft.

    graft pretrain-bundle --folder WORK --minutes 60 [--scenes 200000] [--side 80] [--out FILE] [--start FILE]

Renders the bank of textures and shapes and a pool of scenes, then trains mobilenet_v3_small to tell each scene's shape,
texture and ground. The pool lies in WORK; on a GPU, which renders it in seconds, in its own memory. What is in WORK is
gone on with: a run that was ended, or one with more minutes; what else was asked for stays as it was.
--start begins from an earlier graft_small and not from random weights, so that a machine with no WORK can go on, too.

Supervision by formula: Kataoka et al. 2020 and 2022. That it beat contrastive learning at this budget was measured
(docs/decisions/0010-a-backbone-from-formulas.md).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from app.vision import backbones
from app.vision.backbones import BACKBONES, GRAFT_SMALL
from app.vision.device import resolve_device
from app.vision.preprocessing import normalise
from worker.pretraining.scenes import NOT_ASKED, TASKS, Bank, Pool
from worker.training.graphs import RecordedPasses
from worker.training.optim import load_optimizer_tensors, optimizer_tensors
from worker.training.pixels import on_device
from worker.training.precision import autocast
from worker.training.state import copy_into, move_average

# Sides that the network sees over that of a scene, and from which share of the training on: small ones teach as much
# and cost less.
SIDES: tuple[tuple[float, tuple[float, ...]], ...] = ((0.0, (0.8, 0.9)), (0.7, (1.0, 1.2)))
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 2e-3, 0.05, 200
LABEL_SMOOTHING, LARGEST_GRADIENT = 0.1, 5.0
EMA_DECAY = 0.998
BATCH_NORM_MOMENTUM = 0.05
CHECKPOINT_SECONDS = 60.0
# What a work folder's scenes and network follow from.
_ALWAYS_BEFORE = {"side": 80, "batch_size": 96, "learning_rate": 2e-3}  # in folders of the first release
_LASTING = ("scenes", "side", "textures", "shapes", "instances", "batch_size", "learning_rate", "seed", "start")


@dataclass(frozen=True)
class Options:
    folder: Path
    out: Path
    minutes: float
    scenes: int
    side: int
    textures: int
    shapes: int
    instances: int
    batch_size: int
    learning_rate: float
    seed: int
    device: torch.device
    start: Path | None


class FormulaNetwork(nn.Module):
    """The backbone with a linear head for each task."""

    def __init__(self, class_counts: tuple[int, ...], seed: int) -> None:
        super().__init__()
        self.backbone = backbones.build(GRAFT_SMALL, seed=seed)
        self.heads = nn.ModuleList(nn.Linear(self.backbone.feature_width, count) for count in class_counts)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = BATCH_NORM_MOMENTUM

    def forward(self, images: Tensor) -> list[Tensor]:
        """images: float32 (N, 3, S, S), normalised. Returns logits (N, classes) for each task."""
        features = self.backbone(images)
        return [head(features) for head in self.heads]


class Run:
    """A training that can be left and taken up again. Batches and changes follow from (seed, step)."""

    def __init__(self, options: Options, pool: Pool, class_counts: tuple[int, ...]) -> None:
        self._options, self._pool = options, pool
        self._order: tuple[int, NDArray[np.int64]] | None = None  # an epoch, and its scenes in their order
        torch.manual_seed(options.seed)
        self.network = FormulaNetwork(class_counts, options.seed).to(options.device)
        self.network.to(memory_format=torch.channels_last)
        if options.start is not None:
            load_backbone(self.network.backbone, options.start)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.network), lr=options.learning_rate, fused=True)
        self._live = self.network.state_dict()
        self.average = {name: tensor.clone() for name, tensor in self._live.items()}
        self._passes = RecordedPasses(self._pass, self.network)
        self.step, self.seconds = 0, 0.0

    @property
    def share(self) -> float:
        """Of the planned time that is over."""
        return min(1.0, self.seconds / (60 * self._options.minutes))

    def train(self) -> Iterator[dict[str, Any]]:
        """To the end of the planned time; yields figures about once a minute, when the state has been saved."""
        told, since, sums = time.monotonic(), self.step, self._no_sums()
        while self.share < 1.0:
            began = time.monotonic()
            sums += self._train_step()
            self.seconds += time.monotonic() - began
            self.step += 1
            if time.monotonic() - told >= CHECKPOINT_SECONDS or self.share >= 1.0:
                (loss, *_), right, asked = sums.tolist()  # waits for the device
                self.save()
                yield {
                    "minutes": round(self.seconds / 60, 1),
                    "step": self.step,
                    "loss": round(loss / (self.step - since), 3),
                    **{name: round(r / max(a, 1), 3) for name, r, a in zip(TASKS, right, asked, strict=True)},
                    "images_per_second": round(self.step * self._options.batch_size / self.seconds),
                }
                told, since, sums = time.monotonic(), self.step, self._no_sums()

    def write_backbone(self) -> None:
        """The averaged weights, as the file that ships."""
        prefix = "backbone."
        averaged = {n.removeprefix(prefix): t for n, t in self.average.items() if n.startswith(prefix)}
        save_backbone(averaged, self._options.out)

    def save(self) -> None:
        """Whole or not at all: written beside the one before, then renamed over it."""
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(self.optimizer).items()}
        staged = self._options.folder / "checkpoint.part"
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            staged,
            metadata={"progress": json.dumps({"step": self.step, "seconds": self.seconds})},
        )
        staged.replace(self._options.folder / "checkpoint.safetensors")

    def resume(self) -> bool:
        """Takes up where the folder's checkpoint left off. Returns whether there is one."""
        path = self._options.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        with safetensors.safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        self.network.load_state_dict(_part(tensors, "network"))
        copy_into(self.average, _part(tensors, "average"))
        load_optimizer_tensors(self.optimizer, _part(tensors, "optimizer"))
        self.step, self.seconds = progress["step"], progress["seconds"]
        return True

    def _train_step(self) -> Tensor:
        """Returns the loss, and for each task how many were right and how many were asked: float32 (3, tasks)."""
        self._set_rate()
        torch.manual_seed(
            int(np.random.SeedSequence([self._options.seed, 2, self.step]).generate_state(1)[0])
        )  # dropout
        self.network.train()
        (figures,) = self._passes(*self._batch())
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        move_average(self.average, self._live, decay=EMA_DECAY, steps=range(self.step, self.step + 1))
        return figures

    def _pass(self, images: Tensor, labels: Tensor) -> tuple[Tensor]:
        """Forward and backward; returns what _train_step does."""
        # bf16 on a GPU only: on CPUs this network's depthwise convolutions train slower in it.
        with autocast(images.device, "bf16" if images.device.type == "cuda" else "fp32"):
            answers = [answer.float() for answer in self.network(images)]
        loss = torch.stack(
            [
                functional.cross_entropy(
                    answer, labels[:, task], ignore_index=NOT_ASKED, label_smoothing=LABEL_SMOOTHING
                )
                for task, answer in enumerate(answers)
            ]
        ).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        right = [(answer.argmax(1) == labels[:, task]).sum() for task, answer in enumerate(answers)]
        asked = (labels != NOT_ASKED).sum(0)
        return (torch.stack([loss.detach().expand(len(TASKS)), torch.stack(right).float(), asked.float()]),)

    def _no_sums(self) -> Tensor:
        return torch.zeros((3, len(TASKS)), device=self._options.device)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The step's scenes, in one size and part for all, maybe mirrored: float32 (N, 3, S, S) and int64 (N, 3)."""
        options, pool = self._options, self._pool
        per_epoch = len(pool) // options.batch_size
        epoch, place = divmod(self.step, per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([options.seed, 0, epoch]).permutation(len(pool))
        chosen = np.sort(self._order[1][place * options.batch_size : (place + 1) * options.batch_size])
        rows = on_device(torch.from_numpy(chosen), pool.pixels.device)
        random = np.random.default_rng([options.seed, 1, self.step])
        part = int(random.integers(options.side * 2 // 3, options.side + 1))
        top, left = random.integers(0, options.side - part + 1, 2)
        scales = [scales for share, scales in SIDES if self.share >= share][-1]
        side = 8 * round(options.side * float(random.choice(scales)) / 8)
        pixels = pool.pixels[rows, top : top + part, left : left + part].permute(0, 3, 1, 2)
        if random.random() < 0.5:
            pixels = pixels.flip(3)
        if pixels.device.type != "cpu":
            pixels = pixels.float()  # only on CPUs there is a kernel for bytes
        resized = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        images = normalise(resized, BACKBONES[GRAFT_SMALL].preprocessing)
        return images.contiguous(memory_format=torch.channels_last), pool.labels[rows]

    def _set_rate(self) -> None:
        rate = (
            self._options.learning_rate
            * min(1.0, (self.step + 1) / WARMUP_STEPS)
            * 0.5
            * (1 + math.cos(math.pi * self.share))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate


def save_backbone(weights: Mapping[str, Tensor], path: Path) -> None:
    """weights: of a Backbone. Writes them under torchvision's names, in half precision and without a head."""
    network = backbones.hollow(GRAFT_SMALL)
    ours = backbones.rewrap(GRAFT_SMALL, network).state_dict(keep_vars=True)
    theirs = network.state_dict(keep_vars=True)
    name_of = {id(tensor): name for name, tensor in theirs.items()}
    named = {name_of[id(ours[name])]: tensor for name, tensor in weights.items()}
    half = {name: t.half() if t.is_floating_point() else t for name, t in named.items()}
    staged = path.with_suffix(".part")
    safetensors.torch.save_file({name: half[name].cpu().contiguous() for name in sorted(half)}, staged)
    staged.chmod(0o644)  # safetensors lets its owner alone read it
    staged.replace(path)


def load_backbone(backbone: backbones.Backbone, path: Path) -> None:
    """Takes over what save_backbone wrote."""
    network = backbones.hollow(GRAFT_SMALL)
    own = backbones.rewrap(GRAFT_SMALL, network).state_dict(keep_vars=True)
    name_of = {id(tensor): name for name, tensor in network.state_dict(keep_vars=True).items()}
    saved = safetensors.torch.load_file(path)
    backbone.load_state_dict({name: saved[name_of[id(tensor)]] for name, tensor in own.items()})


def main() -> None:
    options = _options()
    for folder in (options.folder, options.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if other := begin_or_go_on(options):
        sys.exit(f"graft pretrain-bundle: {other}")
    print(f"Rendering {options.textures} textures, {options.shapes} shapes and {options.scenes} scenes.", flush=True)
    counts = {"textures": options.textures, "shapes": options.shapes, "instances": options.instances}
    bank = Bank.render(**counts, side=options.side, seed=options.seed).to(options.device)
    if options.device.type == "cuda":
        pool = Pool.in_memory(bank, count=options.scenes, side=options.side, seed=options.seed)
    else:
        pool = Pool.on_disk(options.folder / "pool", bank, count=options.scenes, side=options.side, seed=options.seed)
    run = Run(options, pool, bank.class_counts)
    if run.resume():
        print(f"Going on from step {run.step}, after {run.seconds / 60:.1f} minutes.", flush=True)
    for figures in run.train():
        print(json.dumps(figures), flush=True)
        run.write_backbone()
    run.write_backbone()  # also where the folder's minutes were over already
    print(f"Wrote {options.out}.", flush=True)


def begin_or_go_on(options: Options) -> str | None:
    """Notes in a new work folder what was asked for. Returns why a folder cannot be gone on with; None if it can."""
    path = options.folder / "options.json"
    asked = {name: getattr(options, name) for name in _LASTING} | {"start": options.start and str(options.start)}
    if not path.exists():
        path.write_text(json.dumps(asked), encoding="utf-8")
        return None
    begun = _ALWAYS_BEFORE | json.loads(path.read_text("utf-8"))
    flags = [f"--{name.replace('_', '-')}" for name in _LASTING]
    other = [
        f"{flag} {begun[name]}" if begun[name] is not None else f"no {flag}"
        for flag, name in zip(flags, _LASTING, strict=True)
    ]
    differing = [said for name, said in zip(_LASTING, other, strict=True) if begun[name] != asked[name]]
    if not differing:
        return None
    return f"{options.folder} was begun with {', '.join(differing)}. Give the same again, or another --folder."


def _parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    return [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def _options() -> Options:
    parser = argparse.ArgumentParser(
        prog="graft pretrain-bundle", description="Trains graft_small, the bundled backbone."
    )
    parser.add_argument("--folder", type=Path, required=True, help="where scenes and checkpoints lie")
    parser.add_argument("--out", type=Path, help=f"the file to write; {GRAFT_SMALL}.safetensors in the folder if none")
    parser.add_argument("--minutes", type=_above(0.0), default=60.0, help="of training, over all runs")
    parser.add_argument("--scenes", type=_at_least(1), default=200_000, help="at least a batch")
    parser.add_argument("--side", type=_at_least(32), default=80, help="of a scene, in pixels")
    parser.add_argument("--textures", type=_at_least(1), default=200)
    parser.add_argument("--shapes", type=_at_least(1), default=200)
    parser.add_argument("--instances", type=_at_least(1), default=8, help="of each texture and shape")
    parser.add_argument("--batch-size", type=_at_least(2), default=96)
    parser.add_argument("--learning-rate", type=_above(0.0), default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 is its own choice")
    parser.add_argument("--start", type=Path, help="an earlier graft_small to begin from")
    asked = vars(parser.parse_args())
    if asked["scenes"] < asked["batch_size"]:
        parser.error("--scenes must be at least the --batch-size")
    if threads := asked.pop("threads"):
        torch.set_num_threads(threads)
    asked["out"] = asked["out"] or asked["folder"] / f"{GRAFT_SMALL}.safetensors"
    return Options(**asked | {"device": resolve_device(asked["device"])})


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if (number := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return number

    return integer


def _above(limit: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        if not (found := float(text)) > limit:
            raise argparse.ArgumentTypeError(f"must be above {limit:g}")
        return found

    return number


if __name__ == "__main__":
    main()
