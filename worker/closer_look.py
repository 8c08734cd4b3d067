"""A closer look at a data set just ingested: what a pretrained network on this machine says of copies and of labels.

A help and never a condition: whatever is in the way is logged, and the data set is ready without it. The features that
it needs are kept where training jobs look for them, so the first of them need not compute them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog
import torch

from app.datasets.ingest import PACKED_SIDE, manifest_key, packed_key
from app.datasets.manifest import Manifest
from app.datasets.packed import PackedPixels
from app.datasets.report import IngestReport
from app.errors import StorageFull, WeightsUnavailable
from app.jobs.queue import Claim
from app.settings import Settings
from app.storage import LocalStorage
from app.vision.backbones import BACKBONES, choose
from app.vision.classifier import Classifier
from app.vision.device import DeviceUnavailable, resolve_device
from app.vision.weights import Found, WeightStore
from worker.quality import MIN_PICTURES, quality_warnings
from worker.reporter import Reporter
from worker.training.features import FeatureCache, plain_features
from worker.training.methods import place

# Of the folds, so any will do; always the same, so that the same archive gives the same warnings.
_SEED = 0

# What may go wrong here without anybody's fault. RuntimeError is torch's for whatever a device or a network cannot do,
# memory included; OSError is what a data set deleted meanwhile, or a failing disk, makes of reading and writing.
_EXPECTED = (WeightsUnavailable, DeviceUnavailable, StorageFull, MemoryError, RuntimeError, OSError)

# Of the time, on a CPU; what follows cannot say how far it is.
_FEATURES_SHARE = 0.9

log = structlog.get_logger(__name__)


def look_closer(
    report: IngestReport, claim: Claim, *, settings: Settings, storage: LocalStorage, reporter: Reporter, start: float
) -> list[dict[str, Any]]:
    """Warnings of `worker/quality.py` for a data set just published; empty where it cannot be looked at.

    start: share of the job that is done before. Raises what the reporter does, and nothing else that can be foreseen.
    """
    store = WeightStore.from_settings(settings)
    try:
        device = resolve_device(settings.device)
        found = _weights_here(store, device)
        reason = _reason_not_to(report, claim, settings, found)
        if found is None or reason is not None:
            log.info("quality_skipped", reason=reason)
            return []
        return _look(report, claim.dataset_id, store, found, device, settings, storage, _Progress(reporter, start))
    except _EXPECTED as error:
        log.warning("quality_skipped", reason=type(error).__name__, detail=str(error))
        return []


def _reason_not_to(report: IngestReport, claim: Claim, settings: Settings, found: Found | None) -> str | None:
    if settings.quality_max_images == 0:
        return "turned_off"
    if not report.classes:
        return "no_labels"
    if report.num_images > settings.quality_max_images:
        return "too_many_images"
    if report.num_images < MIN_PICTURES:
        return "too_few_images"
    if found is None:
        return "no_weights_here"
    if found.weights.preprocessing.side != PACKED_SIDE:
        return "other_image_size"
    if claim.attempt > 1:
        # Whatever ended that process, the kernel's out-of-memory killer for one, may have met it here.
        return "earlier_attempt_died"
    return None


def _weights_here(store: WeightStore, device: torch.device) -> Found | None:
    """What `backbone: auto` would take of the weights on this machine; the network is not asked.

    Not the bundled ones: how alike two copies look, and how sure a wrong label is, was measured with features of
    photographs, and formulas' know too little of those (copies were seen where there were none).
    """
    here = {name: file for name in BACKBONES if (file := store.find(name)) is not None}
    found = {name: file for name, file in here.items() if not file.weights.is_bundled}
    return found[choose(found, device.type).name] if found else None


@dataclass(frozen=True)
class _Progress:
    """Tells how far the look is. start: share of the job that is done before."""

    reporter: Reporter
    start: float

    def features(self, done: int, total: int) -> None:
        self._tell(_FEATURES_SHARE * done / total)

    def comparing(self) -> None:
        self._tell(_FEATURES_SHARE)

    def _tell(self, share: float) -> None:
        self.reporter.progress("quality", fraction=self.start + (1 - self.start) * share)


def _look(
    report: IngestReport,
    dataset_id: str,
    store: WeightStore,
    found: Found,
    device: torch.device,
    settings: Settings,
    storage: LocalStorage,
    progress: _Progress,
) -> list[dict[str, Any]]:
    """Raises what is expected, and what the reporter raises."""
    manifest = Manifest.read(storage.path(manifest_key(dataset_id)))
    progress.features(0, len(manifest.records))
    # As a job builds it for its probe; the head is not used.
    classifier = Classifier.new(found.weights.backbone, len(manifest.classes), seed=_SEED, state_dict=store.load(found))
    place(classifier, device)
    classifier.freeze(0)
    features = plain_features(
        classifier,
        manifest,
        PackedPixels(storage.path(packed_key(dataset_id, PACKED_SIDE))),
        preprocessing=found.weights.preprocessing,
        device=device,
        precision="fp32",
        cache=FeatureCache(storage, dataset_id, settings.feature_cache_bytes),
        on_batch=progress.features,
    ).rows(0, np.arange(len(manifest.records)))
    if not torch.isfinite(features).all():
        raise WeightsUnavailable(f"The weights {found.path.name} give features that are not numbers; replace the file.")
    assert report.groups is not None
    return quality_warnings(
        features,
        manifest.labels,
        [record.split for record in manifest.records],
        np.array(report.groups, dtype=np.int64),
        paths=[record.path for record in manifest.records],
        classes=manifest.classes,
        seed=_SEED,
        tick=progress.comparing,
    )
