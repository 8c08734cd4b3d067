"""What a trained model's answers are held against, from its training and validation images. Knows networks and pixels.

Training images are taken as they are served, without augmentation; where the backbone was trained they run through it
once more, 800 at most: less than the forward passes of one epoch.
"""

from collections.abc import Callable

import numpy as np

from app.datasets.manifest import Manifest
from app.vision.reference import Reference, choose
from worker.training.methods import Conclusion, Training, head_features
from worker.training.pixels import PixelSource, Split
from worker.training.tasks import of_task


def fit_reference(
    training: Training, conclusion: Conclusion, manifest: Manifest, *, on_batch: Callable[[], None] = lambda: None
) -> Reference | None:
    """None for a backbone, which predicts nothing, and where validation is a single image, which says no spread.

    The training's classifier is on its device, as `conclude` left it. Raises what on_batch raises.
    """
    if not conclusion.tasks or conclusion.val_features is None or len(conclusion.val_features) < 2:
        return None
    split = training.train.split
    kept = choose(of_task(split.labels, 0), class_count=len(manifest.classes), seed=training.plan.seed)
    chosen = Split(split.images, split.indices[kept], split.labels[kept])
    records = [manifest.records[i] for i in chosen.indices.tolist()]
    return Reference.fit(
        head_features(training, PixelSource(chosen, None, training.train.prepare), on_batch=on_batch).numpy(),
        chosen.labels,
        [(record.image_id, record.path) for record in records],
        held_out=conclusion.val_features.numpy(),
        # A task that no validation image has a label of promises nothing.
        probability_of_true=[task.val.probability_of_true if task.val else np.zeros(0) for task in conclusion.tasks],
    )
