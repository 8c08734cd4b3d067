"""What a training job is: every value that a request resolves to (TrainingSpec), and how.

Resolving is pure: facts about the data set, the backbones and the device come in as arguments. Knows no queue, no HTTP,
no files.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from app.errors import FieldError, InvalidHyperparameter, InvalidRequest, WeightsUnavailable
from app.jobs.recipes import (
    _SIDED_WORDS,
    CLASSIC,
    CLASSIC_PREPROCESSING,
    DEFAULT_EMA,
    DEFAULT_GAMMA,
    DEFAULT_MOMENTUM,
    DEFAULT_SCRATCH_BACKBONE,
    DEFAULT_STEP_SIZE,
    ENOUGH_IMAGES_PER_CLASS,
    FEW_IMAGES_PER_CLASS,
    FORMULA_RATE_FACTOR,
    ITERATIVE,
    MAX_CPU_TRAINING_GFLOPS,
    MODERN,
    MODERN_AUGMENTED_VIEWS,
    MODERN_BATCH_SIZE,
    MODERN_WARMUP_SHARE,
    MOST_SHOTS,
    OF_LABELS,
    PROTOTYPES,
    SCRATCH_BACKBONES,
    SELF_SUPERVISED,
    SELF_SUPERVISED_BATCH_SIZE,
    SGD_RATE_FACTOR,
    SGD_WEIGHT_DECAY,
    SOLVED,
    ModernDefaults,
)
from app.jobs.request import (
    FEWEST_TOGETHER,
    FROZEN_METHODS,
    Augmentation,
    ClassWeights,
    HeadStart,
    Hyperparameters,
    JobRequest,
    Method,
    Promote,
    Recipe,
    ResolvedOptimizer,
    Scheduler,
)
from app.vision import backbones
from app.vision.backbones import ALL_LAYERS, BackboneSpec
from app.vision.preprocessing import Preprocessing


@dataclass(frozen=True)
class ClassFacts:
    name: str
    train: int
    val: int


@dataclass(frozen=True)
class DatasetFacts:
    """What resolving needs to know of a ready data set: images per class and split.

    classes: of several tasks, the first one's; none for a data set without labels. further: those of the other tasks.
    unlabelled, val_unlabelled: images that have no class of the first task.
    """

    classes: tuple[ClassFacts, ...]
    unlabelled: int = 0
    val_unlabelled: int = 0
    further: tuple[tuple[ClassFacts, ...], ...] = ()

    @classmethod
    def from_counts(
        cls,
        classes: Sequence[Mapping[str, Any]],
        *,
        tasks: Sequence[Mapping[str, Any]] = (),
        splits: Mapping[str, int] | None = None,
    ) -> Self:
        """classes: rows with name, train and val, as a data set's `classes` has them. tasks, splits: as it has them,
        where images may be without a class."""

        def facts(rows: Sequence[Mapping[str, Any]]) -> tuple[ClassFacts, ...]:
            return tuple(ClassFacts(row["name"], row["train"], row["val"]) for row in rows)

        found = cls(facts(classes), further=tuple(facts(task["classes"]) for task in tasks[1:]))
        if splits is None:
            return found
        return replace(found, unlabelled=splits["train"] - found.train, val_unlabelled=splits["val"] - found.val)

    @property
    def has_labels(self) -> bool:
        return bool(self.classes)

    @property
    def train(self) -> int:
        return self.unlabelled + sum(c.train for c in self.classes)

    @property
    def val(self) -> int:
        return self.val_unlabelled + sum(c.val for c in self.classes)

    def imbalance(self, split: Literal["train", "val"]) -> float:
        """Largest class over smallest, among classes that have images in this split; 1 for a balanced or empty one."""
        counts = [n for n in (getattr(c, split) for c in self.classes) if n > 0]
        return max(counts) / min(counts) if counts else 1.0


@dataclass(frozen=True)
class StartingModel:
    """An earlier model to start from: its id, and its own preprocessing, which its weights are used to."""

    model_id: str
    backbone_name: str
    preprocessing: Preprocessing


class ResolvedHyperparameters(BaseModel):
    """Every hyperparameter with its value; None where it has no meaning for this job, such as momentum under adamw."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int
    batch_size: int
    optimizer: ResolvedOptimizer
    head_start: HeadStart  # probe: the head begins as the logistic regression on the untrained backbone's features
    learning_rate: float
    backbone_learning_rate: float | None
    momentum: float | None
    weight_decay: float
    scheduler: Scheduler
    step_size: int | None
    gamma: float | None
    warmup_epochs: float
    label_smoothing: float
    unfreeze: int | None
    feature_layer: str | None
    image_size: int
    augmentation: Augmentation
    crop_scale: tuple[float, float]  # share of the image's area that a random crop covers
    horizontal_flip: bool
    augmented_views: int | None  # of each training image, through the frozen stages; None: fresh ones in each epoch
    mixup: float
    cutmix: float = 0.0  # jobs of earlier versions have none
    ema: float
    fixed_batch_norm: bool = False  # batch-norms keep the statistics that they were pretrained with
    class_weights: ClassWeights
    early_stopping_patience: int | None

    @property
    def is_solved(self) -> bool:
        """Whether the head is solved for, once and without steps."""
        return self.optimizer in ("lbfgs", "prototypes")


class BackboneRef(BaseModel):
    """The backbone a job starts from; weights is None for from_scratch, model is an earlier model's id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weights: str | None
    model: str | None = None


class TrainingSpec(BaseModel):
    """A job with nothing left open: stored with it as JSON, and all that training reads besides the data."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str
    method: Method | Literal["auto"]
    backbone: BackboneRef
    seed: int
    recipe: Recipe
    hyperparameters: ResolvedHyperparameters
    preprocessing: Preprocessing
    promote: Promote
    budget_seconds: float | None
    exclude: list[str] = []  # paths of images that are neither trained on nor measured with
    requested: dict[str, Any]
    reasons: list[str]
    # For auto, which competes: a spec for each method, the simplest first. The values above are the last one's.
    candidates: list["TrainingSpec"] = []


@dataclass(frozen=True)
class _Start:
    """What training starts from. weights: name of those that can be had, None where none can."""

    backbone: BackboneSpec
    weights: str | None
    model: StartingModel | None

    @property
    def is_pretrained(self) -> bool:
        return self.weights is not None or self.model is not None

    @property
    def is_from_formulas(self) -> bool:
        """Whether it starts from the bundled weights, which know edges and outlines but no photograph."""
        return self.model is None and any(w.is_bundled for w in self.backbone.weights if w.name == self.weights)

    @property
    def preprocessing(self) -> Preprocessing:
        """What the weights are used to."""
        if self.model is not None:
            return self.model.preprocessing
        named = {weights.name: weights.preprocessing for weights in self.backbone.weights}
        return named.get(self.weights or "", self.backbone.preprocessing)


def resolve(
    request: JobRequest,
    *,
    dataset: DatasetFacts,
    weights: Mapping[str, str],
    device_type: str,
    starting_model: StartingModel | None = None,
) -> TrainingSpec:
    """Every value of a job, with reasons for what was chosen rather than asked for.

    weights: backbones whose pretrained weights can be had here, each with the name of the weights, such as
    IMAGENET1K_V2. device_type: "cpu", "cuda" or "mps". starting_model: the model that request.backbone names, if it
    names one.
    Raises InvalidRequest, InvalidHyperparameter or WeightsUnavailable, naming the field.
    """
    reasons: list[str] = []
    if not dataset.has_labels and request.method == "auto":
        request = request.model_copy(update={"method": "self_supervised"})
        reasons.append("method self_supervised: the data set has no labels.")
    _check_dataset(dataset, request)
    start = _start(request, weights, device_type, starting_model, reasons)
    if methods := _contenders(request, dataset, start, device_type, reasons):
        rivals = [_resolved(_entered(request, m), m, dataset=dataset, start=start, reasons=[]) for m in methods]
        return rivals[-1].model_copy(
            update={
                "method": "auto",
                "requested": request.model_dump(mode="json", exclude_unset=True),
                "reasons": reasons,
                "candidates": rivals,
            }
        )
    method = _method(request, dataset, start, device_type, reasons)
    return _resolved(request, method, dataset=dataset, start=start, reasons=reasons)


def _contenders(
    request: JobRequest, dataset: DatasetFacts, start: _Start, device_type: str, reasons: list[str]
) -> list[Method]:
    """The methods that compete under auto, the simplest first; none where one method is given by what was asked for."""
    asked = request.hyperparameters.model_fields_set
    if request.method != "auto" or request.recipe == "classic" or not start.is_pretrained:
        return []
    if {"feature_layer", "unfreeze", "augmented_views"} & asked:
        return []
    methods: list[Method] = ["feature_extraction", "fine_tuning", "full_fine_tuning"]
    epochs = request.hyperparameters.epochs or _epochs_for_steps(
        MODERN["full_fine_tuning", start.backbone.family], dataset.train, MODERN_BATCH_SIZE
    )
    # A backward pass costs about two forward passes.
    if device_type == "cpu" and 3 * start.backbone.gflops * dataset.train * epochs > MAX_CPU_TRAINING_GFLOPS:
        methods.remove("full_fine_tuning")
        reasons.append(f"all of {start.backbone.name} on {dataset.train} images would take long on a CPU: left out.")
    reasons.append(f"method auto: {', '.join(methods)} compete on the validation images; ties go to the simpler.")
    return methods


def _entered(request: JobRequest, method: Method) -> JobRequest:
    """What was asked for, as far as it has a meaning for this method: the probe is solved for, whatever the epochs."""
    asked = request.hyperparameters
    if method == "feature_extraction":
        values = asked.model_dump(exclude_unset=True, exclude=set(ITERATIVE))
        asked = Hyperparameters.model_validate(values)
    return request.model_copy(update={"method": method, "hyperparameters": asked})


def _resolved(
    request: JobRequest, method: Method, *, dataset: DatasetFacts, start: _Start, reasons: list[str]
) -> TrainingSpec:
    _check_start(method, start)
    asked = _with_implied(request.hyperparameters, method, reasons)
    _check_combinations(request, asked, method, start.backbone)
    preprocessing = _preprocessing(request, start)
    if request.recipe == "classic" and start.model is not None:
        reasons.append("preprocessing: the earlier model's own, which its weights are used to, and not the textbook's.")
    values = _classic(asked, method) if request.recipe == "classic" else _modern(asked, method, start, dataset)
    if method == "self_supervised":
        values |= SELF_SUPERVISED | _given(asked)
    if method == "few_shot":
        values |= PROTOTYPES
    reasons += _reasons(request, values, dataset, steps=MODERN[method, start.backbone.family].steps)
    hyperparameters = ResolvedHyperparameters.model_validate(values | {"image_size": preprocessing.crop})
    if hyperparameters.warmup_epochs > hyperparameters.epochs:
        raise _bad_hyperparameter("warmup_epochs", f"must be at most epochs, which is {hyperparameters.epochs}")
    return TrainingSpec(
        dataset=request.dataset,
        method=method,
        backbone=BackboneRef(
            name=start.backbone.name,
            weights=None if method == "from_scratch" else start.weights,
            model=start.model.model_id if start.model else None,
        ),
        seed=request.seed,
        recipe=request.recipe,
        hyperparameters=hyperparameters,
        preprocessing=preprocessing,
        promote=request.promote,
        budget_seconds=request.budget_seconds,
        exclude=request.exclude,
        requested=request.model_dump(mode="json", exclude_unset=True),
        reasons=reasons,
    )


def _check_dataset(dataset: DatasetFacts, request: JobRequest) -> None:
    method = request.method
    if method == "self_supervised":
        if dataset.train < FEWEST_TOGETHER:
            field, verb = ("exclude", "leaves") if request.exclude else ("dataset", "has")
            pictures = f"{dataset.train} training picture{'' if dataset.train == 1 else 's'}"
            detail = f"{verb} {pictures}, and self_supervised compares {FEWEST_TOGETHER} or more with each other"
            raise InvalidRequest(f"{field} {detail}.", errors=[FieldError(f"#/{field}", detail)])
        return
    if not dataset.has_labels:
        raise InvalidRequest(
            f'The data set has no labels, and {method} learns from them. Train a backbone on it ("method": '
            '"self_supervised"), and then a classifier on a labelled data set that starts from it.',
            errors=[FieldError("#/method", "needs a data set with labels")],
        )
    if method == "few_shot" and dataset.further:
        raise InvalidRequest(
            "few_shot learns one thing of each picture, and the data set has several label columns. Use "
            '"method": "feature_extraction", which learns all of them in seconds.',
            errors=[FieldError("#/method", "learns one task only")],
        )
    if any(sum(c.train for c in classes) == 0 for classes in dataset.further):
        raise InvalidRequest(
            "One of the data set's label columns has no training image with a label, so it cannot be learnt. Upload "
            "the data set with more labels of it, with a split of your own, or without that column.",
            errors=[FieldError("#/dataset", "has no training images with a label of each column")],
        )
    trainable = sum(c.train > 0 for c in dataset.classes)
    if trainable < 2 or sum(c.val for c in dataset.classes) == 0:
        lack = "validation images" if trainable >= 2 else "training images in at least two classes"
        raise InvalidRequest(
            f"The data set has no {lack}. Upload it with train and val folders that hold pictures of each class, or "
            "without a split, and Graft makes one.",
            errors=[FieldError("#/dataset", f"has no {lack}")],
        )


def _start(
    request: JobRequest,
    weights: Mapping[str, str],
    device_type: str,
    starting_model: StartingModel | None,
    reasons: list[str],
) -> _Start:
    if starting_model is not None:
        return _Start(backbones.find(starting_model.backbone_name), None, starting_model)
    if request.backbone != "auto":
        backbone = backbones.find(request.backbone)
        return _Start(backbone, weights.get(backbone.name), None)
    needs_weights = request.method not in ("auto", "from_scratch")
    if request.method != "from_scratch" and (weights or needs_weights):
        name, reason = backbones.choose(weights, device_type)
    else:
        name = SCRATCH_BACKBONES.get(device_type, DEFAULT_SCRATCH_BACKBONE)
        reason = f"backbone {name}: it trains from nothing in reasonable time."
    reasons.append(reason)
    return _Start(backbones.BACKBONES[name], weights.get(name), None)


def _check_start(method: Method, start: _Start) -> None:
    if method == "from_scratch" and start.model is not None:
        raise InvalidRequest(
            "method: from_scratch does not start from an earlier model; name a backbone, or choose another method.",
            errors=[FieldError("#/method", "contradicts a backbone that is an earlier model")],
        )
    if method != "from_scratch" and not start.is_pretrained:
        name = start.backbone.name
        raise WeightsUnavailable(
            f"There are no pretrained weights of {name} here, and none can be downloaded. Put them into "
            "GRAFT_WEIGHTS_DIR, allow downloads (GRAFT_ALLOW_DOWNLOADS), choose a backbone that GET /v1/backbones "
            'calls obtainable, or use "method": "from_scratch".',
            errors=[FieldError("#/backbone", f"no weights of {name} can be had")],
        )


def _method(request: JobRequest, dataset: DatasetFacts, start: _Start, device_type: str, reasons: list[str]) -> Method:
    if request.method != "auto":
        return request.method
    asked = request.hyperparameters.model_fields_set
    backbone = start.backbone
    counts = sorted(c.train for c in dataset.classes if c.train > 0)
    median = counts[len(counts) // 2]
    defaults = MODERN["full_fine_tuning", backbone.family]
    epochs = request.hyperparameters.epochs or _epochs_for_steps(defaults, dataset.train, MODERN_BATCH_SIZE)
    # A backward pass costs about two forward passes.
    full_gflops = 3 * backbone.gflops * dataset.train * epochs
    if not start.is_pretrained:
        method: Method = "from_scratch"
        reason = f"no pretrained weights of {backbone.name} can be had here."
    elif "feature_layer" in asked:
        method, reason = "feature_extraction", "feature_layer was given, which is for this method alone."
    elif "unfreeze" in asked:
        method, reason = "fine_tuning", "unfreeze was given, which is for this method alone."
    elif median < FEW_IMAGES_PER_CLASS:
        method = "feature_extraction"
        reason = f"with about {median} training images per class, training the backbone too would mostly overfit."
    elif median < ENOUGH_IMAGES_PER_CLASS:
        method = "fine_tuning"
        reason = f"with about {median} training images per class, adapting the last stage is the safest choice."
    elif device_type == "cpu" and full_gflops > MAX_CPU_TRAINING_GFLOPS:
        method = "fine_tuning"
        reason = (
            f"all of {backbone.name} on {dataset.train} images would take long on a CPU; the last stage adapts most."
        )
    else:
        method = "full_fine_tuning"
        reason = f"about {median} training images per class are enough to adapt every parameter of {backbone.name}."
    reasons.append(f"method {method}: {reason}")
    return method


def _with_implied(asked: Hyperparameters, method: Method, reasons: list[str]) -> Hyperparameters:
    """With the optimizer, the scheduler and the augmentation that a given value is for, where none was named."""
    given, implied = asked.model_fields_set, {}
    if "momentum" in given and "optimizer" not in given:
        implied["optimizer"] = "sgd"
        reasons.append("optimizer sgd: momentum was given, which is for this optimizer alone.")
    if (names := sorted({"step_size", "gamma"} & given)) and "scheduler" not in given:
        implied["scheduler"] = "step"
        reasons.append(f"scheduler step: {' and '.join(names)} was given, which is for this scheduler alone.")
    if "augmented_views" in given and "augmentation" not in given and method in FROZEN_METHODS:
        implied["augmentation"] = "classic"
        reasons.append("augmentation classic: augmented_views was given, which says how many changed views there are.")
    return Hyperparameters.model_validate(asked.model_dump(exclude_unset=True) | implied)


def _check_combinations(request: JobRequest, asked: Hyperparameters, method: Method, backbone: BackboneSpec) -> None:
    """Refuses values that could not change anything, or that this backbone cannot do."""
    given = asked.model_fields_set
    default_optimizer = "sgd" if request.recipe == "classic" else "adamw"
    if "momentum" in given and (asked.optimizer or default_optimizer) != "sgd":
        raise _bad_hyperparameter("momentum", 'is for the optimizer sgd only; add "optimizer": "sgd", or leave it out')
    default_scheduler = "step" if request.recipe == "classic" else "cosine"
    for name in ("step_size", "gamma"):
        if name in given and (asked.scheduler or default_scheduler) != "step":
            raise _bad_hyperparameter(name, 'is for the scheduler step only; add "scheduler": "step", or leave it out')
    if "unfreeze" in given and method != "fine_tuning":
        raise _bad_hyperparameter("unfreeze", f"is for the method fine_tuning only, and this is {method}")
    if method == "self_supervised" and request.promote == "always":
        raise InvalidRequest(
            "promote always is for models that predict, and self_supervised makes a backbone, which does not: leave it "
            "out.",
            errors=[FieldError("#/promote", "must be if_better or never for self_supervised, which makes a backbone")],
        )
    stages = backbone.stage_names
    if asked.unfreeze is not None and asked.unfreeze > len(stages):
        raise _bad_hyperparameter(
            "unfreeze", f"must be from 1 to {len(stages)}, the stages of {backbone.name}: {', '.join(stages)}"
        )
    if "feature_layer" in given and method not in ("feature_extraction", "few_shot"):
        raise _bad_hyperparameter(
            "feature_layer", f"is for methods that freeze the whole backbone, and this is {method}"
        )
    layers = (*stages, ALL_LAYERS) if method == "feature_extraction" else stages
    if asked.feature_layer is not None and asked.feature_layer not in layers:
        raise _bad_hyperparameter("feature_layer", f"must be one of {backbone.name}'s layers: {', '.join(layers)}")
    if "augmented_views" in given and method not in ("feature_extraction", "fine_tuning"):
        raise _bad_hyperparameter("augmented_views", f"is for methods that freeze stages, and this is {method}")
    if "augmented_views" in given and asked.augmentation == "none":
        raise _bad_hyperparameter(
            "augmented_views", "is for pictures that are changed at random, and augmentation is none"
        )
    if method == "self_supervised" and (useless := sorted(OF_LABELS & given)):
        raise _bad_hyperparameter(useless[0], "has no meaning for self_supervised, which has no labels and no head")
    if method == "self_supervised" and asked.batch_size is not None and asked.batch_size < FEWEST_TOGETHER:
        detail = f"must be at least {FEWEST_TOGETHER} for self_supervised, which compares the pictures of a batch"
        raise _bad_hyperparameter("batch_size", detail)
    if method == "self_supervised" and asked.augmentation == "none":
        raise _bad_hyperparameter(
            "augmentation", "must be classic or strong for self_supervised, which learns from what two views share"
        )
    if method == "few_shot" and (useless := sorted((ITERATIVE | {"class_weights"}) & given)):
        raise _bad_hyperparameter(useless[0], "has no meaning for few_shot, which computes its head and trains nothing")
    if "backbone_learning_rate" in given and method == "feature_extraction":
        raise _bad_hyperparameter(
            "backbone_learning_rate", "has no meaning for feature_extraction, whose backbone is frozen"
        )


def _preprocessing(request: JobRequest, start: _Start) -> Preprocessing:
    """The weights' own preprocessing, or under classic the textbook's; image_size keeps the ratio of resize to crop."""
    backbone, size = start.backbone, request.hyperparameters.image_size
    fits_classic = backbone.fixed_image_size in (None, CLASSIC_PREPROCESSING.crop)
    is_classic = request.recipe == "classic" and start.model is None and fits_classic
    base = CLASSIC_PREPROCESSING if is_classic else start.preprocessing
    if size is None:
        return base
    if backbone.fixed_image_size is not None and size != backbone.fixed_image_size:
        raise _bad_hyperparameter("image_size", f"must be {backbone.fixed_image_size} for {backbone.name}")
    if size < backbone.min_image_size:
        raise _bad_hyperparameter("image_size", f"must be at least {backbone.min_image_size} for {backbone.name}")
    return base.with_image_size(size)


def _classic(asked: Hyperparameters, method: Method) -> dict[str, Any]:
    values = CLASSIC | _given(asked)
    if values["optimizer"] != "sgd":
        values["momentum"] = None
    if values["scheduler"] != "step":
        values["step_size"] = values["gamma"] = None
    return values | _per_method(asked, method, backbone_rate=values["learning_rate"])


def _modern(asked: Hyperparameters, method: Method, start: _Start, dataset: DatasetFacts) -> dict[str, Any]:
    defaults = MODERN[method, start.backbone.family]
    ratio = defaults.backbone_ratio * (FORMULA_RATE_FACTOR if start.is_from_formulas else 1.0)
    given = _given(asked)
    is_sgd = given.get("optimizer") == "sgd"
    usual = SELF_SUPERVISED_BATCH_SIZE if method == "self_supervised" else MODERN_BATCH_SIZE
    batch_size = given.get("batch_size", usual)
    epochs = given.get("epochs", _epochs_for_steps(defaults, dataset.train, batch_size))
    is_solved = method == "few_shot" or (method == "feature_extraction" and not ITERATIVE & set(given))
    is_step = given.get("scheduler") == "step"
    values = {
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": "adamw",
        "head_start": "random" if method == "from_scratch" else "probe",
        "learning_rate": defaults.learning_rate * (SGD_RATE_FACTOR if is_sgd else 1.0),
        "momentum": DEFAULT_MOMENTUM if is_sgd else None,
        "weight_decay": SGD_WEIGHT_DECAY if is_sgd else defaults.weight_decay,
        "scheduler": "cosine",
        "step_size": DEFAULT_STEP_SIZE if is_step else None,
        "gamma": DEFAULT_GAMMA if is_step else None,
        "warmup_epochs": round(MODERN_WARMUP_SHARE * epochs, 3),
        "label_smoothing": defaults.label_smoothing,
        # One view of each image is one pass of the backbone, whatever the epochs; views gain a linear head nothing.
        "augmentation": "none" if method in FROZEN_METHODS else "classic",
        "crop_scale": defaults.crop_scale,
        "horizontal_flip": not _has_sided_classes(dataset),
        "mixup": 0.0,
        "cutmix": 0.0,
        "ema": defaults.ema,
        "fixed_batch_norm": defaults.fixed_batch_norm,
        "class_weights": "balanced" if _is_uneven_for_training_alone(dataset) else "none",
        # A third of the run without progress: the cosine's end, where most is gained, is then mostly still reached.
        "early_stopping_patience": max(5, math.ceil(epochs / 3)),
    } | given
    values |= _per_method(asked, method, backbone_rate=values["learning_rate"] * ratio)
    if method == "feature_extraction" and asked.feature_layer is None and start.is_from_formulas:
        values["feature_layer"] = ALL_LAYERS
    if method in ("feature_extraction", "fine_tuning") and values["augmentation"] != "none":
        values["augmented_views"] = min(given.get("augmented_views", MODERN_AUGMENTED_VIEWS), values["epochs"])
    if method == "feature_extraction" and is_solved:
        values |= SOLVED
    return values


def _per_method(asked: Hyperparameters, method: Method, *, backbone_rate: float) -> dict[str, Any]:
    """Values that only some methods have."""
    return {
        "unfreeze": (asked.unfreeze or 1) if method == "fine_tuning" else None,
        "feature_layer": asked.feature_layer,
        "augmented_views": asked.augmented_views,
        "backbone_learning_rate": (None if method in FROZEN_METHODS else asked.backbone_learning_rate or backbone_rate),
    }


def _given(asked: Hyperparameters) -> dict[str, Any]:
    values = asked.model_dump(exclude_unset=True)
    if "ema" in values:
        values["ema"] = {True: DEFAULT_EMA, False: 0.0}[asked.ema] if isinstance(asked.ema, bool) else asked.ema
    return values


def _epochs_for_steps(defaults: ModernDefaults, train_images: int, batch_size: int) -> int:
    steps_per_epoch = math.ceil(train_images / batch_size)
    return min(max(math.ceil(defaults.steps / steps_per_epoch), defaults.min_epochs), defaults.max_epochs)


def _has_sided_classes(dataset: DatasetFacts) -> bool:
    tasks = [[c.name.lower() for c in classes] for classes in (dataset.classes, *dataset.further)]
    names = [name for names in tasks for name in names]
    sided = [n for n in names if _SIDED_WORDS & set(n.replace("-", "_").replace(" ", "_").split("_"))]
    return bool(sided) or any(of_task and all(len(name) == 1 for name in of_task) for of_task in tasks)


def _is_uneven_for_training_alone(dataset: DatasetFacts) -> bool:
    """Whether training is much more uneven than validation: what is then asked for is the even view."""
    train, val = dataset.imbalance("train"), dataset.imbalance("val")
    return train > 3 and val < train / 2


def _reasons(request: JobRequest, values: Mapping[str, Any], dataset: DatasetFacts, *, steps: int) -> list[str]:
    """Why these values, where they were chosen and not asked for. values: as they are in the end; steps: aimed at."""
    asked, reasons = request.hyperparameters.model_fields_set, []
    is_stepped = values["optimizer"] not in ("lbfgs", "prototypes")
    if request.recipe == "modern" and is_stepped and "epochs" not in asked:
        reasons.append(f"epochs {values['epochs']}: about {steps} steps suit {dataset.train} images.")
    if values["augmentation"] != "none" and not values["horizontal_flip"]:
        reasons.append("no horizontal flips: the class names are single characters or name a side.")
    if values["class_weights"] == "balanced" and "class_weights" not in asked:
        train, val = dataset.imbalance("train"), dataset.imbalance("val")
        reasons.append(f"class_weights balanced: training is uneven ({train:.0f}:1), validation is not ({val:.0f}:1).")
    if values["feature_layer"] == ALL_LAYERS and "feature_layer" not in asked:
        reasons.append("the head reads all layers: a backbone that has seen formulas has its best ones early.")
    if values["optimizer"] == "lbfgs":
        reasons.append("the head is solved for: a logistic regression, regularised as cross-validation says.")
    if values["optimizer"] == "prototypes":
        reasons.append("the head is a prototype for each class: computed at once, without training.")
        if (most := max(c.train for c in dataset.classes)) > MOST_SHOTS:
            reasons.append(f"up to {most} images a class: feature_extraction makes more of more than {MOST_SHOTS}.")
    return reasons


def _bad_hyperparameter(name: str, detail: str) -> InvalidHyperparameter:
    return InvalidHyperparameter(f"{name} {detail}.", errors=[FieldError(f"#/hyperparameters/{name}", detail)])
