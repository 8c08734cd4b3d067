"""The four methods, as compositions of the parts beside this file: what is frozen, what is trained, at which rates.

    feature_extraction   backbone frozen, new head
    fine_tuning          the last `unfreeze` stages and the head
    full_fine_tuning     every parameter
    from_scratch         every parameter, from random weights

`prepare` builds a training from a spec and data, `loop.fit` runs it, `conclude` measures what came of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.datasets.manifest import Manifest
from app.jobs.spec import TrainingSpec
from app.vision.classifier import Classifier
from app.vision.preprocessing import Preprocessing, eval_pixels, normalise
from worker.training import evaluate
from worker.training.augment import training_transform
from worker.training.loop import LoopState, Plan, Precision, choose_precision, predict_logits, trains_batch_norm
from worker.training.optim import Schedule, build_optimizer
from worker.training.pixels import Images, Split, class_counts, steps_per_epoch

# torch's own default, which most of torchvision's networks were trained with.
MIN_BATCH_NORM_MOMENTUM = 0.1


@dataclass
class Training:
    """A training ready to run: the network, what stays the same, and what changes. test: used once, in the end."""

    classifier: Classifier
    plan: Plan
    state: LoopState
    test: Split | None
    class_names: list[str]
    preprocessing: Preprocessing


@dataclass(frozen=True)
class Conclusion:
    """What a training came to. evaluation: the record that is published with the model, as JSON."""

    temperature: float
    metrics: dict[str, Any]
    evaluation: dict[str, Any]


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


def prepare(
    spec: TrainingSpec,
    *,
    classifier: Classifier,
    manifest: Manifest,
    images: Images,
    device: torch.device,
    precision: Precision | None = None,
) -> Training:
    """images: packed at preprocessing.side or more. precision: as an earlier attempt chose it; None chooses now."""
    values = spec.hyperparameters
    classifier.freeze(_trainable_stages(spec, classifier))
    classifier.to(device)
    if device.type != "mps":
        # The layout that convolutions are fastest in; it moves numbers in memory and changes none of them.
        classifier.to(memory_format=torch.channels_last)
    if spec.recipe == "modern":
        _quicken_batch_norm(classifier)
    classifier.train()
    train, val, test = (_split(manifest, images, manifest.indices(name)) for name in ("train", "val", "test"))
    merge_single = trains_batch_norm(classifier)
    plan = Plan(
        train=train,
        val=val,
        class_count=len(manifest.classes),
        epochs=values.epochs,
        batch_size=values.batch_size,
        seed=spec.seed,
        schedule=Schedule(
            scheduler=values.scheduler,
            epochs=values.epochs,
            steps_per_epoch=steps_per_epoch(len(train), values.batch_size, merge_single=merge_single),
            warmup_epochs=values.warmup_epochs,
            step_size=values.step_size,
            gamma=values.gamma,
        ),
        normalise=_normaliser(spec.preprocessing),
        augment=training_transform(
            values.augmentation,
            image_size=values.image_size,
            crop_scale=values.crop_scale,
            horizontal_flip=values.horizontal_flip,
            interpolation=spec.preprocessing.interpolation,
            eval_transform=_eval_transform(spec.preprocessing),
        ),
        prepare_eval=_eval_transform(spec.preprocessing),
        label_smoothing=values.label_smoothing,
        class_weights=_balanced(train, len(manifest.classes)) if values.class_weights == "balanced" else None,
        mixup=values.mixup,
        cutmix=values.cutmix,
        early_stopping_patience=values.early_stopping_patience,
        budget_seconds=spec.budget_seconds,
        merge_single=merge_single,
    )
    optimizer = build_optimizer(
        [(classifier.head, values.learning_rate), (classifier.backbone, _backbone_rate(spec))],
        optimizer=values.optimizer,
        momentum=values.momentum,
        weight_decay=values.weight_decay,
        device_type=device.type,
    )
    state = LoopState.begin(
        classifier, optimizer, precision=precision or _precision(spec, classifier, plan, device), ema=values.ema
    )
    return Training(classifier, plan, state, test if len(test) else None, list(manifest.classes), spec.preprocessing)


def conclude(training: Training, manifest: Manifest, *, on_batch: Callable[[], None] = lambda: None) -> Conclusion:
    """Loads the best epoch's weights, calibrates and measures them, in full precision as serving computes.

    Test images, where there are any, are looked at here and nowhere else: nothing is chosen by them.
    """
    training.state.load_best()
    assert training.state.best is not None
    plan, names = training.plan, training.class_names

    def logits_of(split: Split) -> Tensor:
        return predict_logits(
            training.classifier,
            split,
            prepare=plan.prepare_eval,
            normalise=plan.normalise,
            device=training.state.device,
            on_batch=on_batch,
        )

    val_logits = logits_of(plan.val)
    temperature = evaluate.fit_temperature(val_logits, plan.val.labels)
    val = evaluate.evaluate(val_logits, plan.val.labels, names, temperature=temperature)
    metrics = val.metrics("val") | {"best_epoch": training.state.best.epoch, "temperature": temperature}
    record = _evaluation_record(val, plan.val, manifest)
    if training.test is not None:
        test_logits = logits_of(training.test)
        test = evaluate.evaluate(test_logits, training.test.labels, names, temperature=temperature)
        metrics |= test.metrics("test")
        record["test"] = _evaluation_record(test, training.test, manifest)
    return Conclusion(temperature, metrics, record)


def _trainable_stages(spec: TrainingSpec, classifier: Classifier) -> int:
    if spec.method == "feature_extraction":
        return 0
    if spec.method == "fine_tuning":
        return spec.hyperparameters.unfreeze or 1
    return len(classifier.stage_names)


def _quicken_batch_norm(network: nn.Module) -> None:
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


def _precision(spec: TrainingSpec, classifier: Classifier, plan: Plan, device: torch.device) -> Precision:
    """classic is the textbook's in full precision, except on cuda, where nobody trains without tensor cores today."""
    if spec.recipe == "classic" and device.type != "cuda":
        return "fp32"
    return choose_precision(
        classifier,
        plan.normalise,
        image_size=spec.preprocessing.crop,
        batch_size=plan.batch_size,
        seed=plan.seed,
    )


def _split(manifest: Manifest, images: Images, indices: NDArray[np.int64]) -> Split:
    return Split(images, indices, manifest.labels[indices])


def _normaliser(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    return lambda batch: normalise(batch, preprocessing)


def _eval_transform(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    return lambda pixels: eval_pixels(pixels, preprocessing)


def _balanced(train: Split, class_count: int) -> tuple[float, ...]:
    """Weights inverse to the number of training images, 1 in the mean over images; 0 for a class without any."""
    counts = class_counts(train, class_count)
    present = int((counts > 0).sum())
    return tuple(len(train) / (present * int(n)) if n else 0.0 for n in counts)


def _evaluation_record(found: evaluate.Evaluation, split: Split, manifest: Manifest) -> dict[str, Any]:
    worst_first = sorted(found.mistakes, key=lambda mistake: -mistake.score)
    records = [manifest.records[int(split.indices[mistake.position])] for mistake in worst_first]
    return {
        "classes": list(manifest.classes),
        "images": len(split),
        "accuracy": found.accuracy,
        "accuracy_ci95": list(found.accuracy_ci95),
        "loss": found.loss,
        "macro_f1": found.macro_f1,
        "expected_calibration_error": found.expected_calibration_error,
        "expected_calibration_error_uncalibrated": found.expected_calibration_error_uncalibrated,
        "confusion_matrix": found.confusion.tolist(),
        "per_class": [asdict(report) for report in found.classes],
        "mistakes": [
            {
                "image_id": record.image_id,
                "path": record.path,
                "true": manifest.classes[mistake.true_label],
                "predicted": manifest.classes[mistake.predicted_label],
                "score": mistake.score,
            }
            for mistake, record in zip(worst_first, records, strict=True)
        ],
    }
