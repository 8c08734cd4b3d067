r"""What instance tuning is worth: validation pictures as they are and shifted, with and without adapting to each.

    python benchmarks/adaptation.py --data FOLDER_OF_ZIPS --weights FOLDER --results adaptation.jsonl \
        [--networks mobilenet_v3_small:feature_extraction,…] [--sets hymenoptera,…] [--pictures 40] [--skip 40] \
        [--severities 1,2,3,4,5] [--plans neighbors,entropy,entropy:all,personal:12] [--threads 1]

Each picture is shifted (blur, noise, brightness, contrast, JPEG, in the strengths of ImageNet-C as far as it has them;
Hendrycks and Dietterich 2019), and answered by the model and by a copy tuned to it. The first --skip pictures of a
random order are left out: on them the plans' numbers were chosen. personal:12 personalises the model with 12 shifted
pictures, of any classes, and asks it about the others, shifted and as they are. A JSON line is written per set,
network and shift; runs that the file has are not made again. Prints accuracy, and right answers won and lost against
the model itself.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _setup import Ingested, classifier, fitted, hardware, ingested, markdown, measure, resolved
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from app.datasets.packed import PackedPixels
from app.serving.adaptation import (
    NEIGHBOURS,
    Head,
    Plan,
    advanced,
    by_neighbours,
    entropy_steps,
    neighbour_steps,
    share_of,
    views_of,
)
from app.serving.personal import Labelled, personalise
from app.storage import LocalStorage
from app.vision.artifact import Artifact
from app.vision.likeness import seen_alike
from app.vision.outputs import Output
from app.vision.preprocessing import eval_pixels, normalise
from app.vision.reference import Reference
from worker.training import methods
from worker.training.features import FeatureCache
from worker.training.methods import Surroundings, Training
from worker.training.reference import fit_reference

SETS = ("hymenoptera", "sign_digits", "surface_defects", "tiny_longtail")
CPU = torch.device("cpu")

Picture = NDArray[np.uint8]


def _blurred(picture: Picture, severity: int) -> Picture:
    return np.array(Image.fromarray(picture).filter(ImageFilter.GaussianBlur([1, 2, 3, 4, 6][severity])))


def _noisy(picture: Picture, severity: int) -> Picture:
    noise = np.random.default_rng(0).normal(0, 255 * [0.08, 0.12, 0.18, 0.26, 0.38][severity], picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def _brighter(picture: Picture, severity: int) -> Picture:
    return (picture + 255 * [0.1, 0.2, 0.3, 0.4, 0.5][severity]).clip(0, 255).astype(np.uint8)


def _flat(picture: Picture, severity: int) -> Picture:
    mean = picture.mean((0, 1), keepdims=True)
    return ((picture - mean) * [0.4, 0.3, 0.2, 0.1, 0.05][severity] + mean).clip(0, 255).astype(np.uint8)


def _compressed(picture: Picture, severity: int) -> Picture:
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=[25, 18, 15, 10, 7][severity])
    return np.array(Image.open(encoded))


SHIFTS: dict[str, Callable[[Picture, int], Picture]] = {
    "blur": _blurred,
    "noise": _noisy,
    "brightness": _brighter,
    "contrast": _flat,
    "jpeg": _compressed,
}


def main() -> None:
    arguments = _arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shifts = [("none", 0), *((kind, severity) for kind in SHIFTS for severity in arguments.severities)]
    runs = [
        {"set": name, "network": network, "shift": kind, "severity": severity, "plan": plan}
        | {"pictures": arguments.pictures, "skipped": arguments.skip}
        for network in arguments.networks
        for name in arguments.sets
        for kind, severity in shifts
        for plan in arguments.plans
    ]
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        subjects: dict[tuple[str, str], Subject] = {}

        def outcome_of(run: dict[str, Any]) -> dict[str, Any]:
            key = run["set"], run["network"]
            if key not in subjects:
                subjects.clear()  # one network in memory at a time
                subjects[key] = _subject(*key, storage, arguments)
            plan = arguments.plans[run["plan"]]
            ask = subjects[key].outcome if isinstance(plan, Plan) else subjects[key].personal
            return ask(run["shift"], run["severity"], plan)

        lines = measure(runs, outcome_of, arguments.results)
    print(f"{table(lines)}\n\n{personal_table(lines)}")
    print(f"\n{hardware(CPU)}.")


@dataclass
class Subject:
    """A trained network, pictures to ask it about, and what its answers are held against."""

    training: Training
    reference: Reference
    neighbours: Sequence[Tensor]  # of the reference, uint8 (3, S, S) each
    pictures: Sequence[Picture]
    labels: Sequence[int]
    outputs: Sequence[Output]

    def pixels(self, kind: str, severity: int) -> Tensor:
        shifted = [SHIFTS[kind](picture, severity - 1) if severity else picture for picture in self.pictures]
        return torch.stack([eval_pixels(picture, self.training.preprocessing) for picture in shifted])

    def personal(self, kind: str, severity: int, count: int) -> dict[str, Any]:
        """So many shifted pictures are learnt; the others are asked for, and as they are too."""
        labels = np.array(self.labels)
        order = np.random.default_rng(1).permutation(len(labels))
        mine, others = order[:count], order[count:]
        shifted, clean = self._features(self.pixels(kind, severity)), self._features(self.pixels("none", 0))
        classes = self.outputs[0].classes
        parent = Artifact(
            self.training.classifier, list(classes), self.training.preprocessing, reference=self.reference
        )
        start = time.perf_counter()
        known = Labelled(clean, labels.reshape(-1, 1), [None] * len(labels))
        made = personalise(parent, Labelled(shifted[mine], labels[mine].reshape(-1, 1)), known)
        seconds = time.perf_counter() - start
        after = made.artifact.classifier.head
        found: dict[str, Any] = {"seconds": seconds, "asked": len(others)}
        for name, features in (("", shifted[others]), ("_clean", clean[others])):
            truth = torch.from_numpy(labels[others])
            with torch.no_grad():
                found[f"right{name}_before"] = int((self.head.logits(features).argmax(1) == truth).sum())
                found[f"right{name}"] = int((after(features).argmax(1) == truth).sum())
        return found

    def outcome(self, kind: str, severity: int, plan: Plan) -> dict[str, Any]:
        pixels = self.pixels(kind, severity)
        features = self._features(pixels)
        plain = self.head.logits(features)
        start = time.perf_counter()
        adapted = torch.stack([self._adapted(*each, plan) for each in zip(pixels, features, strict=True)])
        seconds = time.perf_counter() - start
        likenesses = [self.reference.similarities(each.numpy()) for each in features]
        shares = torch.tensor([share_of(self.reference.ood_score(each)) for each in likenesses])
        labels = torch.tensor(self.labels)
        right = plain.argmax(1) == labels
        found = {"right_before": int(right.sum()), "share": float(shares.mean()), "seconds_each": seconds / len(labels)}
        for name, weight in (("", shares), ("_always", torch.ones(len(labels)))):
            blended = plain + weight.unsqueeze(1) * (adapted - plain)
            after = blended.argmax(1) == labels
            found |= {f"right{name}": int(after.sum())}
            found |= {f"won{name}": int((after & ~right).sum()), f"lost{name}": int((right & ~after).sum())}
        return found

    @property
    def head(self) -> Head:
        head = self.training.classifier.head
        return Head(head.weight.detach().T.contiguous(), head.bias.detach())

    def _adapted(self, pixels: Tensor, features: Tensor, plan: Plan) -> Tensor:
        prepared = self.training.preprocessing
        if plan.method == "entropy":
            turns = entropy_steps(
                self.training.classifier.backbone,
                self.head,
                views_of(pixels),
                self.outputs,
                prepared,
                plan,
                likeness=lambda found: torch.from_numpy(self.reference.likeness(found.numpy())),
            )
            return _ended(turns)
        likeness = self.reference.similarities(features.numpy())
        places = np.argsort(-likeness, kind="stable")[:NEIGHBOURS].tolist()
        alike = seen_alike(torch.stack([self.neighbours[place] for place in places]), pixels)
        as_they_are = torch.from_numpy(self.reference.raw(places))
        if plan.parameters == "last_stage":
            turns = neighbour_steps(
                self.training.classifier.backbone,
                self.head,
                torch.cat([pixels.unsqueeze(0), alike]),
                as_they_are,
                self.outputs,
                prepared,
                plan,
            )
            return _ended(turns)
        return by_neighbours(self.head, features, self._features(alike), as_they_are, self.outputs, plan)

    def _features(self, pixels: Tensor) -> Tensor:
        backbone = self.training.classifier.backbone
        with torch.no_grad():
            parts = [backbone(normalise(part, self.training.preprocessing)) for part in pixels.split(32)]
        return torch.cat(parts)


def _ended(turns: Generator[None, None, Tensor]) -> Tensor:
    while (logits := advanced(turns)) is None:
        pass
    return logits


def _subject(name: str, network: str, storage: LocalStorage, arguments: argparse.Namespace) -> Subject:
    data = ingested(arguments.data / f"{name}.zip", storage)
    backbone, method = network.split(":")
    spec = resolved(data, method=method, backbone=backbone, weights_dir=arguments.weights)
    packed = data.images(spec)
    training = methods.prepare(
        spec,
        classifier=classifier(spec, len(data.manifest.classes), arguments.weights),
        manifest=data.manifest,
        images=packed,
        device=CPU,
        surroundings=Surroundings(cache=FeatureCache(data.storage, name, 10**10)),
    )
    fitted(training)
    conclusion = methods.conclude(training, data.manifest)
    reference = fit_reference(training, conclusion, data.manifest)
    assert reference is not None
    training.classifier.eval().to(memory_format=torch.channels_last)
    of_validation = data.manifest.indices("val")
    order = np.random.default_rng(0).permutation(len(of_validation))[arguments.skip :][: arguments.pictures]
    asked = of_validation[np.sort(order)].tolist()
    return Subject(
        training,
        reference,
        _neighbours(data, packed, reference, training),
        [np.array(packed[i]) for i in asked],
        [int(data.manifest.labels[i]) for i in asked],
        [task.output for task in conclusion.tasks],
    )


def _neighbours(data: Ingested, packed: PackedPixels, reference: Reference, training: Training) -> list[Tensor]:
    places = {record.image_id: i for i, record in enumerate(data.manifest.records)}
    found = [places[image[0]] for image in reference.images if image is not None]
    return [eval_pixels(packed[i], training.preprocessing) for i in found]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per set, network and plan; accuracy before and after, as they are and by kind of shift."""
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["plan"].startswith("personal"):
            continue
        groups[line["network"], line["set"], line["plan"]][line["shift"]].append(line)
    rows = []
    for key, by_shift in groups.items():
        shifted = [line for kind, found in by_shift.items() if kind != "none" for line in found]
        every = [line for found in by_shift.values() for line in found]
        cells = [_cell(by_shift["none"]), _cell(shifted), *(_cell(by_shift[kind]) for kind in SHIFTS)]
        rows.append([*key, *cells, f"{statistics.median(line['seconds_each'] for line in every):.2f}"])
    return markdown(["network", "set", "plan", "as they are", "shifted", *SHIFTS, "seconds"], rows)


def personal_table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per set and network; accuracy before and after on the others, shifted and as they are."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["plan"].startswith("personal") and line["shift"] != "none":
            groups[line["network"], line["set"], line["plan"]].append(line)
    rows = []
    for key, found in groups.items():
        asked = sum(line["asked"] for line in found)
        shares = [sum(line[name] for line in found) / asked for name in ("right_before", "right")]
        shares += [sum(line[name] for line in found) / asked for name in ("right_clean_before", "right_clean")]
        seconds = statistics.median(line["seconds"] for line in found)
        rows.append([*key, *("{:.3f} → {:.3f}".format(*pair) for pair in (shares[:2], shares[2:])), f"{seconds:.2f}"])
    return markdown(["network", "set", "plan", "shifted", "as they are", "seconds"], rows)


def _cell(lines: Sequence[dict[str, Any]]) -> str:
    if not lines:
        return ""
    count = sum(line["pictures"] for line in lines)
    before, after = (sum(line[name] for line in lines) / count for name in ("right_before", "right"))
    won, lost = (sum(line[name] for line in lines) for name in ("won", "lost"))
    return f"{before:.3f} → {after:.3f} (+{won} −{lost})"


def _plans(text: str) -> dict[str, Plan | int]:
    """neighbors, entropy:all, entropy:normalisation:0.001, …: method, parameters, learning rate, steps; personal:12."""
    found: dict[str, Plan | int] = {}
    for word in text.split(","):
        if word.startswith("personal:"):
            found[word] = int(word.partition(":")[2])
            continue
        method, parameters, rate, steps = (word.split(":") + [""] * 3)[:4]
        found[word] = Plan.of(
            method,  # type: ignore[arg-type]
            parameters=parameters or None,  # type: ignore[arg-type]
            learning_rate=float(rate) if rate else None,
            steps=int(steps) if steps else None,
        )
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What instance tuning is worth.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--results", type=Path, required=True, help="file that runs are added to, a JSON line each")
    parser.add_argument(
        "--networks", type=lambda text: text.split(","), default=["mobilenet_v3_small:feature_extraction"]
    )
    parser.add_argument("--sets", type=lambda text: text.split(","), default=list(SETS))
    parser.add_argument("--plans", type=_plans, default=_plans("neighbors,entropy,entropy:all,personal:12"))
    parser.add_argument(
        "--severities", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 3, 4, 5]
    )
    parser.add_argument("--pictures", type=int, default=40, help="of each set's validation pictures")
    parser.add_argument("--skip", type=int, default=40, help="pictures that the plans' numbers were chosen on")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    return parser.parse_args()


if __name__ == "__main__":
    main()
