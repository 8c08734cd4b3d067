r"""Trains `graft_small` and writes a file such as the one that ships with Graft.

    graft pretrain-bundle --folder WORK --minutes 60 [--scenes 200000] [--out FILE] [--start FILE]

Renders the bank of textures and shapes and a pool of scenes into WORK, then trains mobilenet_v3_small to tell each
scene's shape, texture and ground. What is in WORK is gone on with: a run that was ended, or one with more minutes; what
else was asked for stays as it was.
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

SCENE_SIDE = 80
# Sides that the network sees, and from which share of the training on: small ones teach as much and cost less.
SIDES: tuple[tuple[float, tuple[int, ...]], ...] = ((0.0, (64, 72)), (0.7, (80, 96)))
BATCH_SIZE = 96
LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 2e-3, 0.05, 200
LABEL_SMOOTHING, LARGEST_GRADIENT = 0.1, 5.0
EMA_DECAY = 0.998
BATCH_NORM_MOMENTUM = 0.05
CHECKPOINT_SECONDS = 60.0
# What a work folder's scenes and network follow from.
_LASTING = ("scenes", "textures", "shapes", "instances", "seed", "start")


@dataclass(frozen=True)
class Options:
    folder: Path
    out: Path
    minutes: float
    scenes: int
    textures: int
    shapes: int
    instances: int
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
        torch.manual_seed(options.seed)
        self.network = FormulaNetwork(class_counts, options.seed).to(options.device)
        self.network.to(memory_format=torch.channels_last)
        if options.start is not None:
            load_backbone(self.network.backbone, options.start)
        self.optimizer = torch.optim.AdamW(_parameter_groups(self.network), lr=LEARNING_RATE, fused=True)
        self.average = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        self.step, self.seconds = 0, 0.0

    @property
    def share(self) -> float:
        """Of the planned time that is over."""
        return min(1.0, self.seconds / (60 * self._options.minutes))

    def train(self) -> Iterator[dict[str, Any]]:
        """To the end of the planned time; yields figures about once a minute, when the state has been saved."""
        saved, correct, asked, losses = time.monotonic(), np.zeros(len(TASKS)), np.zeros(len(TASKS)), []
        while self.share < 1.0:
            began = time.monotonic()
            loss, right, of = self._train_step()
            self.seconds += time.monotonic() - began
            self.step += 1
            losses.append(loss)
            correct, asked = correct + right, asked + of
            if time.monotonic() - saved >= CHECKPOINT_SECONDS or self.share >= 1.0:
                self.save()
                yield {
                    "minutes": round(self.seconds / 60, 1),
                    "step": self.step,
                    "loss": round(float(np.mean(losses)), 3),
                    **{task: round(float(share), 3) for task, share in zip(TASKS, correct / asked, strict=True)},
                    "images_per_second": round(self.step * BATCH_SIZE / self.seconds),
                }
                saved, correct, asked, losses = time.monotonic(), correct * 0, asked * 0, []

    def write_backbone(self) -> None:
        """The averaged weights, as the file that ships."""
        prefix = "backbone."
        averaged = {n.removeprefix(prefix): t for n, t in self.average.items() if n.startswith(prefix)}
        save_backbone(averaged, self._options.out)

    def save(self) -> None:
        """Whole or not at all: written beside the one before, then renamed over it."""
        states = {
            f"optimizer.{i}.{name}": tensor
            for i, entry in self.optimizer.state_dict()["state"].items()
            for name, tensor in entry.items()
        }
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.items()} | states
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
        for name, tensor in _part(tensors, "average").items():
            self.average[name].copy_(tensor)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for key, tensor in _part(tensors, "optimizer").items():
            index, _, name = key.partition(".")
            like = parameters[int(index)]
            self.optimizer.state[like][name] = (
                torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
            )
        self.step, self.seconds = progress["step"], progress["seconds"]
        return True

    def _train_step(self) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
        """Returns the loss, and for each task how many were right of how many that were asked."""
        self._set_rate()
        torch.manual_seed(
            int(np.random.SeedSequence([self._options.seed, 2, self.step]).generate_state(1)[0])
        )  # dropout
        images, labels = self._batch()
        self.network.train()
        answers = self.network(images)
        loss = torch.stack(
            [
                functional.cross_entropy(
                    answer, labels[:, task], ignore_index=NOT_ASKED, label_smoothing=LABEL_SMOOTHING
                )
                for task, answer in enumerate(answers)
            ]
        ).sum()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self._average()
        right = [(answer.argmax(1) == labels[:, task]).sum().item() for task, answer in enumerate(answers)]
        of = [(labels[:, task] != NOT_ASKED).sum().item() for task in range(len(answers))]
        return loss.item(), np.array(right, dtype=float), np.array(of, dtype=float)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """The step's scenes, in one size and part for all, maybe mirrored: float32 (N, 3, S, S) and int64 (N, 3)."""
        options, pool = self._options, self._pool
        per_epoch = len(pool) // BATCH_SIZE
        epoch, place = divmod(self.step, per_epoch)
        order = np.random.default_rng([options.seed, 0, epoch]).permutation(len(pool))
        chosen = np.sort(order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE])
        random = np.random.default_rng([options.seed, 1, self.step])
        part = int(random.integers(SCENE_SIDE * 2 // 3, SCENE_SIDE + 1))
        top, left = random.integers(0, SCENE_SIDE - part + 1, 2)
        sides = [sides for share, sides in SIDES if self.share >= share][-1]
        side = int(random.choice(sides))
        pixels = torch.from_numpy(pool.pixels[chosen][:, top : top + part, left : left + part]).permute(0, 3, 1, 2)
        if random.random() < 0.5:
            pixels = pixels.flip(3)
        resized = functional.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
        images = normalise(resized.to(options.device), BACKBONES[GRAFT_SMALL].preprocessing)
        return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(pool.labels[chosen]).to(
            options.device
        )

    def _set_rate(self) -> None:
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * self.share))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        current = self.network.state_dict()
        for name, average in self.average.items():
            if average.is_floating_point():
                average.lerp_(current[name], 1 - decay)
            else:
                average.copy_(current[name])


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
    bank = Bank.render(textures=options.textures, shapes=options.shapes, instances=options.instances, seed=options.seed)
    pool = Pool.rendered(options.folder / "pool", bank, count=options.scenes, side=SCENE_SIDE, seed=options.seed)
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
    begun = json.loads(path.read_text("utf-8"))
    other = [f"--{name} {begun[name]}" if begun[name] is not None else f"no --{name}" for name in _LASTING]
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
    parser.add_argument("--scenes", type=_at_least(BATCH_SIZE), default=200_000)
    parser.add_argument("--textures", type=_at_least(1), default=200)
    parser.add_argument("--shapes", type=_at_least(1), default=200)
    parser.add_argument("--instances", type=_at_least(1), default=8, help="of each texture and shape")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0 is its own choice")
    parser.add_argument("--start", type=Path, help="an earlier graft_small to begin from")
    asked = vars(parser.parse_args())
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
