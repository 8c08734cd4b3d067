"""What may be asked for besides the indispensable, by name. What is left out is the server's to choose."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

Method = Literal[
    "auto",
    "few_shot",
    "feature_extraction",
    "fine_tuning",
    "full_fine_tuning",
    "from_scratch",
    "self_supervised",
]


Recipe = Literal["classic", "modern"]
Promote = Literal["if_better", "always", "never"]
Adapt = Literal["neighbors", "entropy"]


class Hyperparameters(TypedDict, total=False):
    """Overrides of the recipe."""

    epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    backbone_learning_rate: float
    momentum: float
    weight_decay: float
    scheduler: Literal["step", "cosine", "constant"]
    step_size: int
    gamma: float
    warmup_epochs: float
    label_smoothing: float
    unfreeze: int
    feature_layer: str
    image_size: int
    augmentation: Literal["none", "classic", "strong"]
    augmented_views: int
    mixup: float
    cutmix: float
    ema: bool | float
    class_weights: Literal["none", "balanced"]
    early_stopping_patience: int | None


class JobOptions(TypedDict, total=False):
    """Of a training job.

    method: what is trained; auto chooses from the data. backbone: a name, a model's id to start from, or auto. recipe:
    classic is the textbook's, modern the server's best. promote: whether the model becomes the default one. exclude:
    paths within the archive of pictures to leave out. metadata: up to 16 texts of one's own.
    """

    method: Method
    backbone: str
    seed: int
    name: str | None
    recipe: Recipe
    hyperparameters: Hyperparameters | Mapping[str, object]
    promote: Promote
    budget_seconds: float | None
    exclude: Sequence[str]
    metadata: Mapping[str, str]


class PredictOptions(TypedDict, total=False):
    """Of a prediction.

    model: an id or alias. top_k: classes per picture. store: keep picture and prediction for feedback. explain: a heat
    map as PNG data URL. coverage: add a set of classes that holds the true one with this probability. neighbors: add so
    many of the most similar training pictures. adapt: tune a copy of the model to each picture first.
    """

    model: str | None
    top_k: int
    store: bool
    explain: bool
    coverage: float
    neighbors: int
    adapt: Adapt
    adapt_parameters: Literal["head", "last_stage", "normalisation", "all"]
    adapt_steps: int
    adapt_learning_rate: float
