"""The two recipes as data: each number with its reason. spec.py puts them together with what was asked for."""

from dataclasses import dataclass
from typing import Any

from app.jobs.request import Hyperparameters, Method
from app.vision.backbones import Family
from app.vision.preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# The textbook's: PyTorch's transfer-learning tutorial, with batch 32.
CLASSIC_PREPROCESSING = Preprocessing(256, 224, IMAGENET_MEAN, IMAGENET_STD, "bilinear")
CLASSIC: dict[str, Any] = {
    "epochs": 25,
    "batch_size": 32,
    "optimizer": "sgd",
    "head_start": "random",
    "learning_rate": 0.001,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "scheduler": "step",
    "step_size": 7,
    "gamma": 0.1,
    "warmup_epochs": 0.0,
    "label_smoothing": 0.0,
    "augmentation": "classic",
    "crop_scale": (0.08, 1.0),
    "horizontal_flip": True,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "class_weights": "none",
    "early_stopping_patience": None,
}
# Who sets none of these under modern gets a head that is solved for, not stepped towards: it has no use for them.
ITERATIVE = frozenset(Hyperparameters.model_fields) - {"class_weights", "feature_layer", "image_size"}
DEFAULT_MOMENTUM = 0.9
DEFAULT_STEP_SIZE, DEFAULT_GAMMA = 7, 0.1
DEFAULT_EMA = 0.999


@dataclass(frozen=True)
class ModernDefaults:
    """First defaults of the modern recipe for one method and family. Rates are for adamw and a batch of 32."""

    learning_rate: float
    backbone_ratio: float  # backbone learning rate over the head's
    weight_decay: float
    steps: int  # optimiser steps aimed at; epochs follow from the number of images
    min_epochs: int
    max_epochs: int
    crop_scale: tuple[float, float]
    label_smoothing: float = 0.0
    ema: float = 0.0
    fixed_batch_norm: bool = False


# Where the numbers come from. Rates: 1e-3 for a new head and 3e-4 for a convolutional body are what AutoGluon, Geti
# and LightlyTrain ship within a factor of 3; transformers take a tenth of that (1e-4 to 5e-5 with weight decay 0.05).
# Steps by data size and not epochs, 500 for small sets: BiT's rule. Gentle crops: a crop of 8 % of the area is made
# for ImageNet from scratch, and hides the object in a few hundred photos. Scratch needs more steps, higher rates,
# stronger crops and label smoothing, as in torchvision's reference training. A moving average and the pretrained
# batch-norm statistics were measured for both fine-tunings (decision 6).
SHORT_EMA = 0.98  # over the last 50 steps, where there are some hundreds
_HEAD = ModernDefaults(2e-3, 1.0, 0.01, 500, 10, 40, (0.5, 1.0))
_CNN_SCRATCH = ModernDefaults(2e-3, 1.0, 0.05, 2000, 20, 100, (0.35, 1.0), label_smoothing=0.1)
_TRANSFORMER_SCRATCH = ModernDefaults(5e-4, 1.0, 0.05, 2000, 20, 100, (0.35, 1.0), label_smoothing=0.1)
MODERN: dict[tuple[Method, Family], ModernDefaults] = {
    ("feature_extraction", "cnn"): _HEAD,
    ("feature_extraction", "transformer"): _HEAD,
    ("fine_tuning", "cnn"): ModernDefaults(
        1e-3, 0.3, 0.01, 500, 8, 40, (0.5, 1.0), ema=SHORT_EMA, fixed_batch_norm=True
    ),
    ("fine_tuning", "transformer"): ModernDefaults(1e-3, 0.1, 0.05, 500, 8, 40, (0.5, 1.0)),
    ("full_fine_tuning", "cnn"): ModernDefaults(
        1e-3, 0.5, 0.02, 600, 8, 40, (0.5, 1.0), ema=SHORT_EMA, fixed_batch_norm=True
    ),
    ("full_fine_tuning", "transformer"): ModernDefaults(1e-3, 0.05, 0.05, 600, 8, 40, (0.5, 1.0)),
    ("from_scratch", "cnn"): _CNN_SCRATCH,
    ("from_scratch", "transformer"): _TRANSFORMER_SCRATCH,
    ("few_shot", "cnn"): _HEAD,
    ("few_shot", "transformer"): _HEAD,
    # Crops as small as contrastive learning's: what two of them share is what the network is to find.
    ("self_supervised", "cnn"): ModernDefaults(1e-3, 0.1, 1e-4, 1500, 10, 200, (0.2, 1.0)),
    ("self_supervised", "transformer"): ModernDefaults(1e-3, 0.1, 0.05, 1500, 10, 200, (0.2, 1.0)),
}
# From formulas' weights the backbone has further to go: on handwritten digits 0.981 in place of 0.935.
FORMULA_RATE_FACTOR = 4.0
# What two views of one picture have no use for.
OF_LABELS = frozenset(
    {
        "label_smoothing",
        "unfreeze",
        "feature_layer",
        "augmented_views",
        "mixup",
        "cutmix",
        "ema",
        "class_weights",
        "early_stopping_patience",
    }
)
SELF_SUPERVISED_BATCH_SIZE = 64  # what varies over a batch is part of the loss
SELF_SUPERVISED: dict[str, Any] = {
    "head_start": "random",
    "augmentation": "strong",
    "augmented_views": None,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "ema": 0.0,
    "class_weights": "none",
    "early_stopping_patience": None,
    "fixed_batch_norm": True,
}
# A logistic regression has no rate, no batches and no epochs; one pass over the images, and its line search's step.
SOLVED: dict[str, Any] = {
    "epochs": 1,
    "optimizer": "lbfgs",
    "learning_rate": 1.0,
    "momentum": None,
    "weight_decay": 0.0,
    "scheduler": "constant",
    "step_size": None,
    "gamma": None,
    "warmup_epochs": 0.0,
    "augmentation": "none",
    "augmented_views": None,
    "early_stopping_patience": None,
}
# Prototypes have not even a strength to choose. With more images a class a logistic regression has more to learn from.
PROTOTYPES = SOLVED | {"optimizer": "prototypes", "head_start": "prototypes", "class_weights": "none"}
MOST_SHOTS = 20
MODERN_AUGMENTED_VIEWS = 4
MODERN_BATCH_SIZE = 32
MODERN_WARMUP_SHARE = 0.1  # of all epochs; 5 to 10 % is common to every recipe read
SGD_RATE_FACTOR = 10.0  # sgd with momentum 0.9 wants about ten times adamw's rate: 0.01 beside 1e-3
SGD_WEIGHT_DECAY = 1e-4

# Below this many training images per class (median) a new head on frozen features is as good as anything, and cannot
# overfit much: 12 to 20 shots is where full fine-tuning overtakes linear probes in the transfer literature.
FEW_IMAGES_PER_CLASS = 20
# Below this many, auto trains the last stages only. Measured with about 120 images per class: on hymenoptera full
# fine-tuning loses 7 points to them (classic, 3 seeds: 0.858 and 0.932), on sign_digits it gains 1, on surface_defects
# nothing (docs/benchmarks.md). Where it overtakes was not measured yet; this is on the safe side.
ENOUGH_IMAGES_PER_CLASS = 500
# About 20 minutes on a CPU that does 50 GFLOP/s in training; beyond it, auto trains the last stages only.
MAX_CPU_TRAINING_GFLOPS = 60_000.0
# What auto trains where nothing pretrained can be had: small enough for the device, and known to train from nothing.
SCRATCH_BACKBONES = {"cpu": "mobilenet_v3_small"}
DEFAULT_SCRATCH_BACKBONE = "resnet18"
# A single character, or a word for a side: mirroring such pictures may change their class.
_SIDED_WORDS = frozenset({"left", "right", "leftward", "rightward", "clockwise", "counterclockwise", "anticlockwise"})
