"""The methods, as compositions of the parts beside this file: what is frozen, what is trained, at which rates.

    few_shot             backbone frozen, a prototype for each class
    feature_extraction   backbone frozen, new head
    fine_tuning          the last `unfreeze` stages and the head
    full_fine_tuning     every parameter
    from_scratch         every parameter, from random weights

`prepare` builds a training from a spec and data, `loop.fit` runs it, `conclude` measures what came of it. What is
frozen runs once, in `prepare`; a head that is solved for is done by then too, and `fit` has nothing left to do.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.datasets.manifest import UNLABELLED, Manifest, Task
from app.errors import StorageFull
from app.jobs.request import FROZEN_METHODS, HeadStart
from app.jobs.spec import ResolvedHyperparameters, TrainingSpec
from app.vision import evaluate
from app.vision.artifact import Support
from app.vision.classifier import Classifier
from app.vision.folding import folded
from app.vision.outputs import Output
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise
from app.vision.prototypes import Prototypes
from worker.training.augment import training_transform
from worker.training.features import Activations, ActivationSource, FeatureCache, activations, plain_features
from worker.training.forecast import Forecast, Point, forecast
from worker.training.loop import Plan, measured, predict_logits, trains_batch_norm
from worker.training.optim import Schedule, build_optimizer
from worker.training.pixels import Images, PixelSource, Source, Split, class_counts, steps_per_epoch
from worker.training.precision import Precision, choose_precision
from worker.training.probe import DEFAULT_STRENGTH, Probe, fit_probe, learning_curve
from worker.training.prototypes import fit_prototypes
from worker.training.state import EpochResult, LoopState, Measured
from worker.training.tasks import Tasks, of_task

# torch's own default, which most of torchvision's networks were trained with.
MIN_BATCH_NORM_MOMENTUM = 0.1
# Validation images that a few-shot model keeps the features of: 8 MB of 1,024 numbers each, 33 MB of vgg16's 4,096.
MAX_SUPPORT_IMAGES = 2000


@dataclass
class Training:
    """A training ready to run: the network, what stays the same, and what changes.

    train, val, test: as pixels, for the conclusion; test is used once, there. solved: the one epoch of a head that was
    solved for. support: what prototypes can be extended with. forecast: what more pictures would bring, by probes on
    fewer; None for a training without a probe. frozen_features: what the head sees of these images of the data set,
    where that was computed for its start; None where the backbone is trained, and what was seen then is no more.
    seen_before: digests of the pictures that the backbone had been trained on before.
    """

    classifier: Classifier
    plan: Plan
    state: LoopState
    train: PixelSource
    val: PixelSource
    test: PixelSource | None
    preprocessing: Preprocessing
    solved: EpochResult | None = None
    support: Support | None = None
    forecast: Callable[[], Forecast | None] | None = None
    frozen_features: Callable[[NDArray[np.int64]], Tensor] | None = None
    seen_before: frozenset[str] = frozenset()

    @property
    def epochs(self) -> int:
        """How many it takes in all, as far as that is known: a budget may have room for fewer than planned."""
        return self.state.epochs or self.plan.epochs


@dataclass(frozen=True)
class Surroundings:
    """What a training may use besides its data: where frozen features are kept, and who hears how far it is.

    on_features: images done and images in all of a pass through frozen stages; tick: called often while a head is
    solved for. Both may raise to leave.
    """

    cache: FeatureCache | None = None
    on_features: Callable[[int, int], None] = lambda _done, _all: None
    tick: Callable[[], None] = lambda: None
    log: Callable[[str], None] = lambda _message: None


@dataclass(frozen=True)
class TaskConclusion:
    """What a training came to in one task: what it predicts, and how well. evaluation: a record, as JSON.

    val: None where no validation image has a label of the task; then there are no figures.
    """

    output: Output
    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    val: evaluate.Evaluation | None


@dataclass(frozen=True)
class Conclusion:
    """What a training came to. evaluation: the record that is published with the model, as JSON.

    tasks: one for each; none for a backbone, which predicts nothing. metrics and evaluation are the first one's, with
    those of all of several as `tasks`. val_features: float32 (N, D), what the head sees of the validation images.
    """

    metrics: dict[str, Any]
    evaluation: dict[str, Any]
    tasks: Sequence[TaskConclusion] = ()
    val_features: Tensor | None = None


def build_classifier(
    spec: TrainingSpec,
    class_count: int,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    earlier: Classifier | None = None,
) -> Classifier:
    """The network before training: from pretrained weights, an earlier model, or the seed alone.

    state_dict: torchvision's. Raises what Classifier.new and Classifier.from_earlier raise.
    """
    layer = spec.hyperparameters.feature_layer
    if earlier is not None:
        return Classifier.from_earlier(earlier, class_count, feature_layer=layer, seed=spec.seed)
    return Classifier.new(spec.backbone.name, class_count, feature_layer=layer, seed=spec.seed, state_dict=state_dict)


def place(classifier: Classifier, device: torch.device) -> None:
    """Moves the network to the device it is to run on."""
    classifier.to(device)
    if device.type != "mps":
        # The layout that convolutions are fastest in; it moves numbers in memory and changes none of them.
        classifier.to(memory_format=torch.channels_last)


def prepare(
    spec: TrainingSpec,
    *,
    classifier: Classifier,
    manifest: Manifest,
    images: Images,
    device: torch.device,
    precision: Precision | None = None,
    surroundings: Surroundings | None = None,
) -> Training:
    """images: packed at preprocessing.side or more. precision: as an earlier attempt chose it; None chooses now."""
    assert spec.method != "self_supervised", "is prepared by self_supervised.py"
    values, surroundings = spec.hyperparameters, surroundings or Surroundings()
    place(classifier, device)
    if spec.recipe == "modern":
        quicken_batch_norm(classifier)
    pixels = SplitPixels(spec, manifest, images)
    frozen = _Frozen(spec, classifier, pixels, device, surroundings)
    began = time.monotonic()
    starts_as_probe = values.head_start == "probe"
    start = frozen.head(values.head_start)
    classifier.freeze(_trainable_stages(spec, classifier))
    if values.fixed_batch_norm:
        classifier.keep_statistics()
    classifier.train()
    train, val = pixels.source("train"), pixels.source("val")
    if precision is None:
        # A head alone is trained on what the probe was: features in full precision, which are there already.
        is_head_alone = start is not None and classifier.frozen_stage_names == classifier.stage_names
        precision = "fp32" if is_head_alone else _precision(spec, classifier, device)
    network: nn.Module = classifier
    sources = frozen.sources(precision)
    to_input = normaliser(spec.preprocessing)
    if sources is not None:
        network, to_input = Suffix(classifier), Tensor.float
    fewest = 2 if trains_batch_norm(classifier) else 1
    plan = Plan(
        train=sources[0] if sources else train,
        val=sources[1] if sources else val,
        tasks=Tasks.of(manifest),
        epochs=values.epochs,
        batch_size=values.batch_size,
        seed=spec.seed,
        schedule=schedule_for(values, images=len(train), fewest=fewest),
        normalise=to_input,
        label_smoothing=values.label_smoothing,
        class_weights=_class_weights(spec, train, manifest),
        mixup=values.mixup,
        cutmix=values.cutmix,
        early_stopping_patience=values.early_stopping_patience,
        budget_seconds=spec.budget_seconds,
        fewest=fewest,
        start_counts=starts_as_probe,
    )
    optimizer = build_optimizer(
        [(classifier.head, values.learning_rate), (classifier.backbone, _backbone_rate(spec))],
        optimizer="sgd" if values.optimizer == "sgd" else "adamw",
        momentum=values.momentum,
        weight_decay=values.weight_decay,
        device_type=device.type,
    )
    if start is not None:
        _set_head(classifier, *start)
    state = LoopState.begin(network, optimizer, precision=precision, ema=values.ema)
    test = pixels.source("test")
    training = Training(
        classifier,
        plan,
        state,
        train,
        val,
        test if len(test) else None,
        spec.preprocessing,
        support=frozen.support(),
        forecast=frozen.forecast if starts_as_probe else None,
        frozen_features=frozen.features if spec.method in FROZEN_METHODS and start is not None else None,
    )
    if values.is_solved:
        training.solved = _solved(training, seconds=time.monotonic() - began)
    return training


class Suffix(nn.Module):
    """The part of a classifier behind its frozen stages, as a network that takes their output."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, activations: Tensor) -> Tensor:
        """activations: as Classifier.frozen_prefix gives them. Returns logits (N, C)."""
        return self.classifier.trainable_suffix(activations)


@dataclass(frozen=True)
class SplitPixels:
    """A data set's splits as pixels, changed at random as the spec says, without the images that it excludes."""

    spec: TrainingSpec
    manifest: Manifest
    images: Images

    def source(self, split: Literal["train", "val", "test"]) -> PixelSource:
        return self.of(self.indices(split))

    def indices(self, split: Literal["train", "val", "test"]) -> NDArray[np.int64]:
        """Which images of the data set this job has in a split, ascending."""
        return self.manifest.indices(split, exclude=frozenset(self.spec.exclude))

    def of(self, indices: NDArray[np.int64]) -> PixelSource:
        values, prepare_eval = self.spec.hyperparameters, _eval_transform(self.spec.preprocessing)
        augment = training_transform(
            values.augmentation,
            image_size=values.image_size,
            crop_scale=values.crop_scale,
            horizontal_flip=values.horizontal_flip,
            interpolation=self.spec.preprocessing.interpolation,
        )
        return PixelSource(Split(self.images, indices, self.manifest.targets[indices]), augment, prepare_eval)

    def described(self) -> dict[str, Any]:
        """What augmented pixels depend on."""
        values = self.spec.hyperparameters
        return {
            "preprocessing": self.spec.preprocessing.to_dict(),
            "augmentation": values.augmentation,
            "crop_scale": list(values.crop_scale),
            "horizontal_flip": values.horizontal_flip,
        }


@dataclass(frozen=True)
class _Seen:
    """What the head sees of all of the data set's images, and how strongly a probe on it was regularised."""

    features: Activations
    strength: float | None
    prototypes: Prototypes | None = None


@dataclass(frozen=True)
class _Frozen:
    """What runs once: the passes through frozen stages. All images are taken, so jobs that leave some out share it."""

    spec: TrainingSpec
    classifier: Classifier
    pixels: SplitPixels
    device: torch.device
    surroundings: Surroundings
    _seen: list[_Seen] = field(default_factory=list)

    def head(self, start: HeadStart) -> tuple[Tensor, Tensor] | None:
        """Weight and bias that training begins from, by what the head sees of the training images; None is random.

        Freezes all stages.
        """
        if start == "random":
            return None
        self.classifier.freeze(0)
        # In full precision, as serving computes: this head is served as it is where nothing beats it.
        found = self._head_features()
        train = self.pixels.source("train").split
        features = found.rows(0, train.indices)
        if start == "prototypes":
            prototypes = fit_prototypes(features, train.labels, self._class_count, seed=self.spec.seed)
            self._seen.append(_Seen(found, None, prototypes))
            return prototypes.rows()
        probes = [
            self._probe(features, of_task(train.labels, task), class_count)
            for task, class_count in enumerate(self.pixels.manifest.class_counts)
        ]
        self._seen.append(_Seen(found, probes[0].strength))
        return torch.cat([probe.weight for probe in probes]), torch.cat([probe.bias for probe in probes])

    def _probe(self, features: Tensor, labels: NDArray[np.int64], class_count: int) -> Probe:
        """Of one task, on the images that have a label of it."""
        given = labels != UNLABELLED
        known = labels[given]
        return fit_probe(
            features if given.all() else features[torch.from_numpy(given)],
            known,
            class_count,
            class_weights=self._weights(known, class_count),
            seed=self.spec.seed,
            tick=self.surroundings.tick,
        )

    def _weights(self, labels: NDArray[np.int64], class_count: int) -> tuple[float, ...] | None:
        return _balanced(labels, class_count) if self.spec.hyperparameters.class_weights == "balanced" else None

    def support(self) -> Support | None:
        """Where the head began as prototypes: their metric, and validation images to measure a longer one with."""
        if not self._seen or self._seen[0].prototypes is None:
            return None
        chosen = self.pixels.indices("val")
        if len(chosen) > MAX_SUPPORT_IMAGES:
            chosen = chosen[np.linspace(0, len(chosen) - 1, MAX_SUPPORT_IMAGES).round().astype(np.int64)]
        records = [self.pixels.manifest.records[i] for i in chosen.tolist()]
        return Support(
            metric=self._seen[0].prototypes.metric,
            features=self._seen[0].features.rows(0, chosen),
            labels=torch.tensor([record.label for record in records]),
            is_shot=torch.zeros(len(records), dtype=torch.bool),
            images=[(record.image_id, record.path) for record in records],
        )

    def forecast(self) -> Forecast | None:
        """By probes on part of the training images; None where there are too few. The head began as a probe.

        Of several tasks, for the first one.
        """
        (probed,) = self._seen
        train, val = (self._labelled(split) for split in ("train", "val"))
        labels = self.pixels.manifest.labels
        curve = learning_curve(
            probed.features.rows(0, train),
            labels[train],
            probed.features.rows(0, val),
            labels[val],
            self._class_count,
            class_weights=self._weights(labels[train], self._class_count),
            seed=self.spec.seed,
            strength=probed.strength or DEFAULT_STRENGTH,
            tick=self.surroundings.tick,
        )
        return forecast([Point(images, accuracy, len(val)) for images, accuracy in curve], seed=self.spec.seed)

    def _labelled(self, split: Literal["train", "val"]) -> NDArray[np.int64]:
        """Which images of a split have a label of the first task."""
        indices, labels = self.pixels.indices(split), self.pixels.manifest.labels
        return np.array([i for i in indices.tolist() if labels[i] != UNLABELLED], dtype=np.int64)

    def features(self, indices: NDArray[np.int64]) -> Tensor:
        """What the head sees of these images of the data set, in full precision: what it began from."""
        return self._seen[0].features.rows(0, indices)

    @property
    def _class_count(self) -> int:
        return len(self.pixels.manifest.classes)

    def sources(self, precision: Precision) -> tuple[ActivationSource, ActivationSource] | None:
        """Training and validation as stored activations; None where training is to see pixels.

        That is where nothing is frozen, where every epoch is to see fresh views, where boxes are to be cut that
        activations without rows and columns have not, and where there is no room to store.
        """
        values = self.spec.hyperparameters
        is_augmented = values.augmentation != "none"
        if not self.classifier.frozen_stage_names or (is_augmented and values.augmented_views is None):
            return None
        if values.cutmix > 0 and (self._is_whole or self.classifier.backbone.layout != "NCHW"):
            return None
        try:
            plain = self._seen_features(precision) or self._plain(precision, self.surroundings.cache)
            augmented = self._augmented(values.augmented_views, precision) if is_augmented else None
        except StorageFull:
            self.surroundings.log("There is no room to store features: the frozen stages run in each epoch instead.")
            return None
        train, val = self.pixels.indices("train"), self.pixels.indices("val")
        labels, trained_on = self.pixels.manifest.targets, self._trained_on()
        return (
            ActivationSource(labels[train], plain, train, augmented, np.searchsorted(trained_on, train)),
            ActivationSource(labels[val], plain, val, None, val),
        )

    def _seen_features(self, precision: Precision) -> Activations | None:
        """What the head began from, where training is to see just that: a head that is solved for, always."""
        return self._seen[0].features if self._seen and self._is_whole and precision == "fp32" else None

    @property
    def _is_whole(self) -> bool:
        """Whether the whole backbone is frozen."""
        return self.classifier.frozen_stage_names == self.classifier.stage_names

    def _trained_on(self) -> NDArray[np.int64]:
        """The images of the augmented pass: all training images, those that this job excludes too."""
        return self.pixels.manifest.indices("train")

    def _head_features(self) -> Activations:
        """What the head sees of every image, in full precision. Small, so memory holds it where the disk does not."""
        try:
            return self._plain("fp32", self.surroundings.cache)
        except StorageFull:
            self.surroundings.log("There is no room to store features: this job keeps them in memory.")
            return self._plain("fp32", None)

    def _plain(self, precision: Precision, cache: FeatureCache | None) -> Activations:
        return plain_features(
            self.classifier,
            self.pixels.manifest,
            self.pixels.images,
            preprocessing=self.spec.preprocessing,
            device=self.device,
            precision=precision,
            cache=cache,
            on_batch=self.surroundings.on_features,
        )

    def _augmented(self, views: int | None, precision: Precision) -> Activations:
        return activations(
            self.classifier,
            self.pixels.of(self._trained_on()),
            views=views,
            seed=self.spec.seed,
            normalise=normaliser(self.spec.preprocessing),
            device=self.device,
            precision=precision,
            described=self.pixels.described(),
            cache=self.surroundings.cache,
            on_batch=self.surroundings.on_features,
        )


def schedule_for(values: ResolvedHyperparameters, *, images: int, fewest: int) -> Schedule:
    return Schedule(
        scheduler=values.scheduler,
        epochs=values.epochs,
        steps_per_epoch=steps_per_epoch(images, values.batch_size, fewest=fewest),
        warmup_epochs=values.warmup_epochs,
        step_size=values.step_size,
        gamma=values.gamma,
    )


def _set_head(classifier: Classifier, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        classifier.head.weight.copy_(weight)
        classifier.head.bias.copy_(bias)


def _solved(training: Training, *, seconds: float) -> EpochResult:
    """The result of a head that is solved already, as the one epoch of its training."""
    state, plan = training.state, training.plan

    def found(source: Source) -> Measured:
        logits = predict_logits(state.network, source, normalise=plan.normalise, device=state.device)
        return measured(plan.tasks, logits, torch.from_numpy(source.labels))

    return state.finish_in_one(
        found(plan.train),
        found(plan.val),
        learning_rate=state.optimizer.param_groups[0]["lr"],
        seconds=seconds,
        images=len(plan.train),
    )


def conclude(
    training: Training, manifest: Manifest, *, is_final: bool = True, on_batch: Callable[[], None] = lambda: None
) -> Conclusion:
    """Loads the best epoch's weights, calibrates and measures them, in full precision as serving computes.

    Test images, where there are any, are looked at here and nowhere else: nothing is chosen by them.
    """
    training.state.load_best()
    assert training.state.best is not None
    val_features = head_features(training, training.val, on_batch=on_batch)
    val, test = _Answered(training.val.split, _head_logits(training, val_features)), None
    if is_final and training.test is not None:
        test_features = head_features(training, training.test, on_batch=on_batch)
        test = _Answered(training.test.split, _head_logits(training, test_features))
    spans = training.plan.tasks.spans
    tasks = [
        _conclude_task(
            task,
            val.of(place, span),
            None if test is None else test.of(place, span),
            manifest,
            seen_before=training.seen_before,
        )
        for place, (task, span) in enumerate(zip(manifest.each_task, spans, strict=True))
    ]
    metrics = tasks[0].metrics | training.state.outcome
    record = dict(tasks[0].evaluation)
    if is_final and training.forecast is not None and (found := training.forecast()) is not None:
        record["forecast"] = metrics["forecast"] = asdict(found)
    if len(tasks) > 1:
        metrics["tasks"] = {task.output.name: task.metrics for task in tasks}
        record["tasks"] = {task.output.name: task.evaluation for task in tasks}
    return Conclusion(metrics, record, tasks, val_features)


def head_features(training: Training, source: PixelSource, *, on_batch: Callable[[], None] = lambda: None) -> Tensor:
    """What the head sees of the source's images as they are served: float32 (N, D) on the CPU."""
    if training.frozen_features is not None:
        return training.frozen_features(source.split.indices)
    return predict_logits(
        folded(training.classifier.backbone.eval()),
        source,
        normalise=normaliser(training.preprocessing),
        device=training.state.device,
        on_batch=on_batch,
    )


def _head_logits(training: Training, features: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = training.classifier.head(features.to(training.state.device)).float().cpu()
    return logits


@dataclass(frozen=True)
class _Answered:
    """What the network says of a split: logits, float32 (N, C)."""

    split: Split
    logits: Tensor

    def of(self, task: int, span: slice) -> "_Answered":
        """For one task: of the images that have a label of it."""
        labels = of_task(self.split.labels, task)
        given = labels != UNLABELLED
        split = Split(self.split.images, self.split.indices[given], labels[given])
        return _Answered(split, self.logits[torch.from_numpy(given), span])

    def evaluation(
        self, output: Output, manifest: Manifest, *, seen_before: frozenset[str]
    ) -> evaluate.Evaluation | None:
        """Of one task; None without images."""
        if len(self.split) == 0:
            return None
        return evaluate.evaluate(
            self.logits,
            self.split.labels,
            list(output.classes),
            temperature=output.temperature,
            seen_before=sum(manifest.records[i].digest in seen_before for i in self.split.indices.tolist()),
        )


def _conclude_task(
    task: Task, val: _Answered, test: _Answered | None, manifest: Manifest, *, seen_before: frozenset[str]
) -> TaskConclusion:
    """val, test: of the images that have a label of the task; test is None where it is not looked at."""
    temperature = evaluate.fit_temperature(val.logits, val.split.labels) if len(val.split) else 1.0
    output = Output(task.name, task.classes, temperature)
    metrics: dict[str, Any] = {}
    record: dict[str, Any] = {}
    on_val = val.evaluation(output, manifest, seen_before=seen_before)
    if on_val is not None:
        metrics = on_val.metrics("val") | {"temperature": temperature}
        predictions = _predictions(on_val, val.split, output.classes, manifest)
        record = _evaluation_record(on_val, val.split, manifest) | {"predictions": predictions}
    if test is not None and (on_test := test.evaluation(output, manifest, seen_before=seen_before)) is not None:
        metrics |= on_test.metrics("test")
        record["test"] = _evaluation_record(on_test, test.split, manifest)
    return TaskConclusion(output, metrics, record, on_val)


def _trainable_stages(spec: TrainingSpec, classifier: Classifier) -> int:
    if spec.method in FROZEN_METHODS:
        return 0
    if spec.method == "fine_tuning":
        return spec.hyperparameters.unfreeze or 1
    return len(classifier.stage_names)


def quicken_batch_norm(network: nn.Module) -> None:
    """Lets validation see the network as it is, and not as it was some hundred steps ago.

    torchvision builds MobileNetV3 with a batch-norm momentum of 0.01, made for hundreds of thousands of steps: in short
    runs its running statistics still belong to the pretrained network (measured: 3 epochs of full fine-tuning on 1,437
    digits, train accuracy 0.97, validation 0.48).
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, MIN_BATCH_NORM_MOMENTUM)


def _backbone_rate(spec: TrainingSpec) -> float:
    rate = spec.hyperparameters.backbone_learning_rate
    return spec.hyperparameters.learning_rate if rate is None else rate  # None: frozen, so it has no group anyway


def _precision(spec: TrainingSpec, classifier: Classifier, device: torch.device) -> Precision:
    """classic is the textbook's in full precision, except on cuda, where nobody trains without tensor cores today."""
    if spec.recipe == "classic" and device.type != "cuda":
        return "fp32"
    return choose_precision(
        classifier,
        normaliser(spec.preprocessing),
        image_size=spec.preprocessing.crop,
        batch_size=spec.hyperparameters.batch_size,
        seed=spec.seed,
    )


def normaliser(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    return lambda batch: normalise(batch, preprocessing)


def _eval_transform(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    return lambda pixels: eval_pixels(pixels, preprocessing)


def _class_weights(spec: TrainingSpec, train: PixelSource, manifest: Manifest) -> tuple[float, ...] | None:
    """One for each output; each task's are balanced by themselves."""
    if spec.hyperparameters.class_weights != "balanced":
        return None
    weights: tuple[float, ...] = ()
    for task, class_count in enumerate(manifest.class_counts):
        labels = of_task(train.labels, task)
        weights += _balanced(labels[labels != UNLABELLED], class_count)
    return weights


def _balanced(labels: NDArray[np.int64], class_count: int) -> tuple[float, ...]:
    """Weights inverse to the number of training images, 1 in the mean over images; 0 for a class without any."""
    counts = class_counts(labels, class_count)
    present = int((counts > 0).sum())
    return tuple(len(labels) / (present * int(n)) if n else 0.0 for n in counts)


def _evaluation_record(found: evaluate.Evaluation, split: Split, manifest: Manifest) -> dict[str, Any]:
    records = [manifest.records[i] for i in split.indices.tolist()]
    return evaluate.as_record(found, [(record.image_id, record.path) for record in records])


def _predictions(
    found: evaluate.Evaluation, split: Split, classes: Sequence[str], manifest: Manifest
) -> dict[str, list[Any]]:
    """What was said of each image, in the manifest's order: what a later model is compared by, image for image."""
    return {
        "digests": [manifest.records[i].digest for i in split.indices.tolist()],
        "true": [classes[label] for label in split.labels.tolist()],
        "predicted": [classes[label] for label in found.predicted.tolist()],
        "probability_of_true": [round(p, 6) for p in found.probability_of_true.tolist()],
    }
