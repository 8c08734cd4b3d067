r"""How far answers can be trusted: strange pictures, prediction sets, heat maps, and what the default answer pays.

    python benchmarks/trust.py --data FOLDER_OF_ZIPS --weights FOLDER [--networks mobilenet_v3_small:fine_tuning,…]

Strange pictures: each set's model meets the validation pictures of all other sets, by several published scores on the
same features; AUROC is the chance that a strange picture scores above one of its own. False alarms: the limit from a
random half of validation, or from 8 pictures, counted on the others, 100 times. Left-out classes: each class of the set
in turn is taken from the training pictures and asked for. Sets: all pictures of a set are split anew into training,
validation and test 20 times; probe, temperature and calibration as a job makes them, coverage on the test part. Heat
maps: the fifth of a picture where they are hottest is greyed, or where another picture's are, and the label's
probability is looked at again.
"""

import argparse
import math
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _setup import Ingested, classifier, fitted, hardware, ingested, markdown, resolved
from numpy.typing import NDArray

from app.serving.insight import insight
from app.serving.scores import Scores
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import heatmaps, images
from app.vision.evaluate import fit_temperature
from app.vision.images import ImageLimits
from app.vision.outputs import Output
from app.vision.preprocessing import Preprocessing, normalise
from app.vision.reference import MAX_IMAGES, Novelty, Reference, choose, errors_of, prediction_set, unit
from worker.training import methods
from worker.training.features import FeatureCache
from worker.training.methods import Surroundings, Training, head_features
from worker.training.pixels import PixelSource, Split
from worker.training.probe import fit_probe

SETS = ("hymenoptera", "sign_digits", "surface_defects", "tiny_longtail", "two_trees")
PHOTOS = "imagenet_check"  # 100 photographs of 100 things; no set to train on
NETWORKS = ("mobilenet_v3_small:feature_extraction", "mobilenet_v3_small:fine_tuning", "graft_small:feature_extraction")
COVERAGES = (0.8, 0.9, 0.95)
GREYED, PICTURES = 0.2, 100
CPU = torch.device("cpu")

Values = NDArray[np.floating]
Distance = Callable[[Values, Values], Values]  # features and logits of pictures -> how strange each is


@dataclass(frozen=True)
class Network:
    """A trained classifier, and what it makes of its own pictures and of others'. features, labels: by split."""

    name: str
    training: Training
    features: dict[str, Values]
    labels: dict[str, NDArray[np.int64]]
    others: dict[str, Values]

    def logits(self, features: Values) -> Values:
        with torch.no_grad():
            return self.training.classifier.head(torch.from_numpy(features)).numpy()


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(Path(folder))
        data = {name: ingested(arguments.data / f"{name}.zip", storage) for name in arguments.sets}
        for asked in arguments.networks:
            backbone, method = asked.split(":")
            strange, sets, heat = [], [], []
            for name in arguments.sets:
                network = _network(name, data, arguments, backbone=backbone, method=method)
                strange.append([name, *_strange(network)])
                if method == "feature_extraction":
                    sets += [[name, *row] for row in _sets(network, arguments.repeats)]
                heat.append([name, *_heat(network)])
                print(asked, strange[-1], heat[-1], file=sys.stderr, flush=True)
            print(f"\n## {backbone}, {method}\n\nAUROC against the other sets, mean (lowest).\n")
            print(markdown(["set", *_SCORES, "found", "false alarms", "of 8", "left-out class"], strange))
            if sets:
                print(f"\nPrediction sets, mean over {arguments.repeats} splits; ours is the least ambiguous one.\n")
                print(
                    markdown(
                        ["set", "promised", *(f"{score}: coverage, size, worst class" for score in _SET_SCORES)], sets
                    )
                )
            print(f"\nProbability of the label with {GREYED:.0%} of the picture greyed, of 1 before.\n")
            print(markdown(["set", "hottest fifth", "another's"], heat))
    print(f"\n{_latency()}\n{hardware(CPU)}.")


def _network(
    name: str, data: dict[str, Ingested], arguments: argparse.Namespace, *, backbone: str, method: str
) -> Network:
    own = data[name]
    spec = resolved(own, method=method, backbone=backbone, weights_dir=arguments.weights)
    training = methods.prepare(
        spec,
        classifier=classifier(spec, len(own.manifest.classes), arguments.weights),
        manifest=own.manifest,
        images=own.images(spec),
        device=CPU,
        surroundings=Surroundings(cache=FeatureCache(own.storage, name, 10**10)),
    )
    fitted(training)
    training.state.load_best()
    others = {other: _validation(data[other], spec) for other in data if other != name}
    others[PHOTOS] = _photos(arguments.data / f"{PHOTOS}.zip", spec.preprocessing)
    return Network(
        name,
        training,
        {"train": _seen(training, training.train), "val": _seen(training, training.val)},
        {"train": training.train.labels, "val": training.val.labels},
        {other: _seen(training, source) for other, source in others.items()},
    )


def _seen(training: Training, source: PixelSource) -> Values:
    return head_features(training, PixelSource(source.split, None, training.train.prepare)).numpy()


def _validation(data: Ingested, spec) -> PixelSource:  # type: ignore[no-untyped-def]
    indices = data.manifest.indices("val")
    return PixelSource(Split(data.images(spec), indices, data.manifest.labels[indices]), None, lambda pixels: pixels)


def _photos(archive: Path, preprocessing: Preprocessing) -> PixelSource:
    limits = ImageLimits.from_settings(Settings())
    with zipfile.ZipFile(archive) as opened:
        names = sorted(name for name in opened.namelist() if not name.endswith("/"))
        pictures = [images.decode(opened.read(name), side=preprocessing.side, limits=limits) for name in names]
    everything = np.arange(len(pictures))
    return PixelSource(Split(pictures, everything, everything), None, lambda pixels: pixels)


# Strange pictures


def _nearest(features: Values, labels: NDArray[np.int64]) -> Distance:
    """Ours: the distance to the nearest of the training pictures that are kept (Sun et al. 2022, with k = 1)."""
    return _kth(features, labels, 1)


def _kth(features: Values, labels: NDArray[np.int64], k: int) -> Distance:
    known = unit(features[choose(labels, class_count=int(labels.max()) + 1, seed=0)])
    place = min(k, len(known))
    return lambda found, _logits: 1 - np.partition(unit(found) @ known.T, -place, axis=1)[:, -place]


def _mahalanobis(features: Values, labels: NDArray[np.int64]) -> Distance:
    """To the nearest class mean, by a covariance that all classes share, shrunk by a tenth (Lee et al. 2018)."""
    means = np.stack([features[labels == label].mean(0) for label in np.unique(labels)])
    precision = _precision(features - means[np.searchsorted(np.unique(labels), labels)])
    return lambda found, _logits: np.stack([_square(found - mean, precision) for mean in means]).min(0)


def _relative(features: Values, labels: NDArray[np.int64]) -> Distance:
    """The same less the distance to the mean of all (Ren et al. 2021)."""
    nearest, mean = _mahalanobis(features, labels), features.mean(0)
    precision = _precision(features - mean)
    return lambda found, logits: nearest(found, logits) - _square(found - mean, precision)


def _normalised(features: Values, labels: NDArray[np.int64]) -> Distance:
    """Mahalanobis on features of length 1."""
    distance = _mahalanobis(unit(features), labels)
    return lambda found, logits: distance(unit(found), logits)


def _energy(features: Values, labels: NDArray[np.int64]) -> Distance:
    """Liu et al. 2020."""
    return lambda _found, logits: -np.logaddexp.reduce(logits, axis=1)


def _confidence(features: Values, labels: NDArray[np.int64]) -> Distance:
    """The highest probability, as all compare themselves with (Hendrycks and Gimpel 2017)."""
    return lambda _found, logits: np.logaddexp.reduce(logits, axis=1) - logits.max(1)


_SCORES: dict[str, Callable[[Values, NDArray[np.int64]], Distance]] = {
    "nearest": _nearest,
    "5th nearest": lambda features, labels: _kth(features, labels, 5),
    "Mahalanobis": _mahalanobis,
    "of length 1": _normalised,
    "relative": _relative,
    "energy": _energy,
    "confidence": _confidence,
}


def _precision(residuals: Values) -> Values:
    covariance = residuals.T.astype(np.float64) @ residuals / len(residuals)
    width = len(covariance)
    return np.linalg.inv(0.9 * covariance + 0.1 * np.trace(covariance) / width * np.eye(width))


def _square(residuals: Values, precision: Values) -> Values:
    return ((residuals @ precision) * residuals).sum(1)


def _strange(network: Network) -> Iterator[str]:
    """A cell for each score; then, for ours, the strangers beyond the limit, false alarms, and left-out classes."""
    train, val = network.features["train"], network.features["val"]
    for make in _SCORES.values():
        distance = make(train, network.labels["train"])
        own = distance(val, network.logits(val))
        found = [_auroc(own, distance(other, network.logits(other))) for other in network.others.values()]
        yield f"{np.mean(found):.3f} ({min(found):.3f})"
    distance = _nearest(train, network.labels["train"])
    own, strangers = (distance(each, each) for each in (val, np.concatenate(list(network.others.values()))))
    yield f"{np.mean(strangers > Novelty.of(own).limit):.3f}"
    for held_out in (len(own) // 2, min(8, len(own) // 2)):
        alarms = list(_false_alarms(own, held_out))
        yield f"{np.mean(alarms):.3f} ± {np.std(alarms):.3f}"
    yield f"{np.mean(list(_left_out(network))):.3f}"


def _auroc(own: Values, strange: Values) -> float:
    below = np.searchsorted(np.sort(own), strange, side="left") + np.searchsorted(np.sort(own), strange, side="right")
    return float(below.mean() / 2 / len(own))


def _left_out(network: Network) -> Iterator[float]:
    labels = network.labels
    for label in np.unique(labels["val"]):
        others = labels["train"] != label
        distance = _nearest(network.features["train"][others], labels["train"][others])
        found, is_left_out = distance(network.features["val"], network.features["val"]), labels["val"] == label
        yield _auroc(found[~is_left_out], found[is_left_out])


def _false_alarms(distances: Values, held_out: int) -> Iterator[float]:
    """Share beyond the limit that `held_out` of them give, of the others."""
    for seed in range(100):
        shuffled = np.random.default_rng(seed).permutation(distances)
        yield float(np.mean(shuffled[held_out:] > Novelty.of(shuffled[:held_out]).limit))


# Prediction sets


def _ambiguity(probabilities: Values, _random: Values) -> Values:
    """Ours (Sadinle et al. 2019)."""
    return 1 - probabilities


def _adaptive(probabilities: Values, random: Values) -> Values:
    """Randomised adaptive sets (Romano et al. 2020): the probability of what is more probable, and part of its own."""
    order = np.argsort(-probabilities, axis=1)
    ordered = np.take_along_axis(probabilities, order, 1)
    scores = np.empty_like(probabilities)
    np.put_along_axis(scores, order, ordered.cumsum(1) - ordered * random[:, np.newaxis], 1)
    return scores


def _regularised(probabilities: Values, random: Values) -> Values:
    """The same, with a penalty of 0.05 on each class after the first (Angelopoulos et al. 2021)."""
    ranks = np.argsort(np.argsort(-probabilities, axis=1), axis=1)
    return _adaptive(probabilities, random) + 0.05 * ranks


_SET_SCORES = {"least ambiguous": _ambiguity, "adaptive": _adaptive, "regularised": _regularised}


def _sets(network: Network, repeats: int) -> Iterator[list[str]]:
    """A row for each coverage."""
    features = np.concatenate([network.features["train"], network.features["val"]])
    labels = np.concatenate([network.labels["train"], network.labels["val"]])
    splits = [_Split.of(features, labels, seed) for seed in range(repeats)]
    truth = np.concatenate([split.truth for split in splits])
    for coverage in COVERAGES:
        row = [f"{coverage:.2f}"]
        for name in _SET_SCORES:
            held = np.concatenate([split.held(name, coverage) for split in splits])
            hits = held[np.arange(len(truth)), truth]
            worst = min(hits[truth == label].mean() for label in np.unique(truth))
            row.append(f"{hits.mean():.3f}, {held.sum(1).mean():.2f}, {worst:.2f}")
        yield row


@dataclass(frozen=True)
class _Split:
    """One split's validation part, which calibrates, and its test part. known, truth: labels of the two."""

    calibrating: Values
    known: NDArray[np.int64]
    asked: Values
    truth: NDArray[np.int64]
    random: np.random.Generator

    @classmethod
    def of(cls, features: Values, labels: NDArray[np.int64], seed: int) -> "_Split":
        random = np.random.default_rng(seed)
        train, val, test = np.split(random.permutation(len(labels)), [len(labels) // 2, len(labels) * 3 // 4])
        probe = fit_probe(torch.from_numpy(features[train]), labels[train], int(labels.max()) + 1, seed=seed)
        logits = torch.from_numpy(features) @ probe.weight.T + probe.bias
        probabilities = (logits / fit_temperature(logits[val], labels[val])).softmax(1).numpy()
        return cls(probabilities[val], labels[val], probabilities[test], labels[test], random)

    def held(self, score: str, coverage: float) -> NDArray[np.bool_]:
        """Which classes the sets of the test part hold, (N, C); ours by the very function that serves."""
        sets = np.zeros(self.asked.shape, dtype=bool)
        if _SET_SCORES[score] is _ambiguity:
            errors = errors_of(self.calibrating[np.arange(len(self.known)), self.known])
            for held, row in zip(sets, self.asked.tolist(), strict=True):
                held[prediction_set(row, errors, coverage)] = True
            return sets
        known, asked = (
            _SET_SCORES[score](part, self.random.random(len(part))) for part in (self.calibrating, self.asked)
        )
        rank = math.ceil((len(known) + 1) * coverage)
        of_true = np.sort(known[np.arange(len(known)), self.known])
        sets[asked <= (of_true[rank - 1] if rank <= len(known) else np.inf)] = True
        sets[np.arange(len(sets)), self.asked.argmax(1)] = True
        return sets


# Heat maps


def _heat(network: Network) -> tuple[str, str]:
    """The mean share of its probability that is left to the label, over validation pictures."""
    training = network.training
    backbone, head = training.classifier.backbone.eval(), training.classifier.head
    heat_maps = heatmaps.HeatMaps(backbone, training.preprocessing.crop)
    pictures = np.random.default_rng(0).permutation(len(training.val))[:PICTURES]
    images = normalise(training.val.batch(pictures).inputs, training.preprocessing)
    with torch.no_grad():
        probabilities, labels = head(backbone(images)).softmax(1).max(1)

    def greyed(image: torch.Tensor, label: int) -> torch.Tensor:
        """Where the picture is hottest: a mask (1, 1, S, S)."""
        heat = heat_maps.evidence(image, lambda features: heatmaps.log_odds(head(features), label))
        limit = np.quantile(heat, 1 - GREYED)
        return torch.from_numpy(heat > limit)[None, None].float()

    def left(masks: torch.Tensor) -> float:
        with torch.no_grad():
            after = head(backbone(images * (1 - masks))).softmax(1)
        return float((after.gather(1, labels[:, None])[:, 0] / probabilities).mean())

    masks = torch.cat([greyed(image[None], int(label)) for image, label in zip(images, labels, strict=True)])
    # Another picture's mask has the same shape, and nothing to do with this one.
    return f"{left(masks):.2f}", f"{left(masks.roll(1, 0)):.2f}"


# What the default answer pays


def _latency() -> str:
    random = np.random.default_rng(0)
    features = random.random((MAX_IMAGES + 1, 1024)).astype(np.float32)
    reference = Reference.fit(
        features[:-1],
        np.zeros(MAX_IMAGES, np.int64),
        [None] * MAX_IMAGES,
        held_out=features[:30],
        probability_of_true=[np.ones(30)],
    )
    outputs = [Output("", ["a", "b"], 1.0)]
    scores = Scores(outputs[0].classes, [0.5, 0.5], features=torch.from_numpy(features[-1]))
    seconds = []
    for _ in range(500):
        start = time.perf_counter()
        insight(scores, reference, outputs)
        seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds, [0.1, 0.5, 0.9]) * 1000
    return (
        f"in_distribution and ood_score, {MAX_IMAGES} rows of 1024: {median:.3f} ({low:.3f}–{high:.3f}) ms a picture."
    )


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    parser = argparse.ArgumentParser(description="How far answers can be trusted.")
    parser.add_argument("--data", type=Path, required=True, help="folder of zips")
    parser.add_argument("--weights", type=Path, required=True, help="folder of weight files")
    parser.add_argument("--sets", type=names, default=list(SETS))
    parser.add_argument("--networks", type=names, default=list(NETWORKS), help="backbone:method, …")
    parser.add_argument("--repeats", type=int, default=20, help="splits for the coverage of prediction sets")
    parser.add_argument("--threads", type=int, default=0, help="0 leaves torch's own number")
    parsed = parser.parse_args()
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    return parsed


if __name__ == "__main__":
    main()
