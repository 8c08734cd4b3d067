"""The promotion gate: whether a new model becomes the default, by comparison with the default on the same images.

Finds what both models say of the new one's validation images: the default's answers were kept with it if it was
validated on the same pictures, else it is run on them. Decides only; registry and aliases are the caller's to write.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app import registry
from app.datasets.ingest import ensure_packed, manifest_key
from app.datasets.manifest import Manifest
from app.db.engine import Database
from app.errors import JobFailed, ModelUnavailable, NotFound, StorageFull
from app.jobs.request import Promote
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.outputs import of_outputs
from app.vision.preprocessing import eval_pixels, normalise
from worker.lineage import trained_on
from worker.training.compare import Paired, Predictions, Ties, is_promotable, of_task, pair, without_task
from worker.training.loop import predict_logits
from worker.training.pixels import PixelSource, Split

_BY_HAND = "`graft models promote` makes it the default all the same."


@dataclass(frozen=True)
class Candidate:
    """A model that was just trained. start: the model that its training began with, where there was one.

    knows: classes by task, "" being the only one. predictions: of its validation images.
    """

    dataset_id: str
    start: str | None
    knows: Mapping[str, frozenset[str]]
    predictions: Predictions


@dataclass(frozen=True)
class Decision:
    """What the gate says. incumbent: the default it was decided beside; the numbers are None where none were needed."""

    promoted: bool
    reason: str
    incumbent: str | None
    images: int | None = None
    candidate_right_only: int | None = None
    incumbent_right_only: int | None = None
    p_value: float | None = None

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Incumbent:
    id: str
    dataset_id: str
    start: str | None
    knows: Mapping[str, frozenset[str]]


def decide(
    candidate: Candidate,
    *,
    policy: Promote,
    database: Database,
    storage: LocalStorage,
    device: torch.device,
    tick: Callable[[], None],
    interim: str | None = None,
) -> Decision:
    """Whether `candidate` is to become the default.

    if_better: only if it beats the default beyond chance on validation images that neither was trained on. A model of
    other classes is promoted, since somebody who trains it wants it served; `promote: never` says otherwise.
    interim: a model that is only to bridge the time until this one is there; it gives way unless it is the better one
    beyond chance. Raises what tick raises.
    """
    incumbent = _incumbent(database)
    incumbent_id = None if incumbent is None else incumbent.id
    if policy == "always":
        return Decision(True, "The model becomes the default, as the job asked for (promote: always).", incumbent_id)
    if policy == "never":
        return Decision(False, "The default model stays, as the job asked for (promote: never).", incumbent_id)
    if incumbent is None:
        return Decision(True, "The model becomes the default: there was none.", None)
    if incumbent.knows != candidate.knows:
        reason = (
            f"The model becomes the default: {incumbent.id}, the one before, knows other classes, so that their "
            "accuracies cannot be compared."
        )
        return Decision(True, reason, incumbent.id)

    seen = trained_on(incumbent.dataset_id, start=incumbent.start, database=database, storage=storage)
    seen = replace(seen, digests=seen.digests | _shots(incumbent.id, storage))
    own = trained_on(candidate.dataset_id, start=candidate.start, database=database, storage=storage)
    true = {
        digest: name
        for digest, name in candidate.predictions.true_classes().items()
        if without_task(digest) not in seen.digests | own.digests
    }
    if not true:
        reason = (
            f"The default model stays {incumbent.id}: there is no validation image that neither it nor the new model "
            f"was trained on, so that they cannot be compared. {_BY_HAND}"
        )
        return Decision(False, reason, incumbent.id, images=0)
    try:
        stored = _stored_answers(incumbent.id, true, storage)
        answers = stored or _answers(
            incumbent.id, candidate.dataset_id, true, storage=storage, device=device, tick=tick
        )
    except ModelUnavailable:
        reason = f"The model becomes the default: {incumbent.id}, the one before, cannot be loaded."
        return Decision(True, reason, incumbent.id)
    except (StorageFull, JobFailed) as error:
        # What was trained for hours is not lost for want of a comparison.
        reason = f"The default model stays {incumbent.id}: it could not be compared. {error.detail} {_BY_HAND}"
        return Decision(False, reason, incumbent.id)
    paired = pair(true, candidate.predictions.predicted_classes(), answers)
    ties: Ties = "candidate" if incumbent.id == interim else "incumbent"
    return _decision(paired, incumbent.id, ties=ties, is_new=stored is not None or seen.is_complete)


def _decision(paired: Paired, incumbent_id: str, *, ties: Ties, is_new: bool) -> Decision:
    """is_new: whether it is known that the incumbent was trained on none of the images."""
    promoted = is_promotable(paired, ties=ties)
    ours, theirs = paired.candidate_right_only, paired.incumbent_right_only
    same = f"of the same {paired.images} validation images"
    if ours == theirs == 0:
        found = f"{same}, both get the same ones right"
    else:
        found = (
            f"{same}, only the new one gets {ours} right, and only {incumbent_id} {theirs} (p = {paired.p_value:.2g})"
        )
    if promoted and paired.candidate_right_only > paired.incumbent_right_only:
        reason = f"The model becomes the default: {found}."
    elif promoted:
        reason = f"The model becomes the default, as good as the one before: {found}."
    elif ours > theirs:
        reason = f"The default model stays {incumbent_id}: {found}, which may be chance. {_BY_HAND}"
    else:
        reason = f"The default model stays {incumbent_id}; the new one is not better: {found}. {_BY_HAND}"
    if not is_new:
        reason += f" {incumbent_id} may have been trained on some of them: its data set is gone."
    return Decision(promoted, reason, incumbent_id, **asdict(paired))


def _incumbent(database: Database) -> _Incumbent | None:
    with database.read() as session:
        try:
            row = registry.find(session, registry.DEFAULT_ALIAS)
        except NotFound:
            return None
        knows = {task["name"]: frozenset(task["classes"]) for task in row.each_task}
        return _Incumbent(row.id, row.dataset_id, row.backbone.get("model"), knows)


def _shots(model_id: str, storage: LocalStorage) -> frozenset[str]:
    """Digests of the pictures that classes were added to the model with; they are in no data set."""
    try:
        return frozenset(artifact.load_description(storage.path(f"models/{model_id}"))["metadata"]["shots"])
    except (ModelUnavailable, KeyError, TypeError):
        return frozenset()  # of a model as it was trained, too


def _stored_answers(model_id: str, true: dict[str, str], storage: LocalStorage) -> dict[str, str] | None:
    """The model's classes by digest, as it gave them at its own validation; None unless all of `true` were there."""
    try:
        record = json.loads(storage.path(f"models/{model_id}/evaluation.json").read_bytes())
        stored = Predictions.of_evaluation(record)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # also of a model from before predictions were kept
    answers = stored.predicted_classes()
    return answers if true.keys() <= answers.keys() else None


def _answers(
    model_id: str,
    dataset_id: str,
    true: dict[str, str],
    *,
    storage: LocalStorage,
    device: torch.device,
    tick: Callable[[], None],
) -> dict[str, str]:
    """The model's classes by digest, for those images of the data set, preprocessed as the model itself asks for.

    Raises ModelUnavailable, StorageFull where its pixels have to be packed first, and JobFailed.
    """
    model = artifact.load(storage.path(f"models/{model_id}"))
    manifest = Manifest.read(storage.path(manifest_key(dataset_id)))
    images = ensure_packed(storage, dataset_id, model.preprocessing.side, tick=lambda _share: tick())
    place = {manifest.records[i].digest: i for i in manifest.indices("val").tolist()}
    asked = list(dict.fromkeys(without_task(digest) for digest in true))
    split = Split(images, np.array([place[digest] for digest in asked]), np.zeros(len(asked), dtype=np.int64))

    def prepare(pixels: Tensor) -> Tensor:
        return eval_pixels(pixels, model.preprocessing)

    logits = predict_logits(
        model.classifier.to(device),
        PixelSource(split, augment=None, prepare=prepare),
        normalise=lambda batch: normalise(batch, model.preprocessing),
        device=device,
        on_batch=tick,
    )
    answers = {}
    for output, of_output in zip(model.outputs, of_outputs(logits, model.outputs), strict=True):
        for digest, label in zip(asked, of_output.argmax(1).tolist(), strict=True):
            answers[of_task(digest, output.name)] = output.classes[label]
    return answers
