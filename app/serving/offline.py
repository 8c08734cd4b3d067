"""A model at work on many pictures that nobody waits for: the same decoding, networks and scores as /predict's, without
queue and event loop. Knows a model's folder, pictures and numbers; not batches' archives, not the database.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from app.serving.engines import in_parts
from app.serving.insight import Insight, insight
from app.serving.loaded import LoadedModel, Network, open_built_engine, read_model
from app.serving.scores import Scores
from app.settings import ServingEngine
from app.storage import LocalStorage
from app.vision.decoding import Decoders
from app.vision.device import pass_batch_size
from app.vision.preprocessing import eval_pixels


class OfflineModel:
    """A model for one thread that asks it, and any number that prepare pictures."""

    def __init__(self, model: LoadedModel, *, decoders: Decoders, batch_size: int) -> None:
        self.batch_size = batch_size
        self._model = model
        self._decoders = decoders
        self._pool = ThreadPoolExecutor(model.engine.passes_at_once, thread_name_prefix="forward")

    @classmethod
    def open(
        cls,
        storage: LocalStorage,
        model_id: str,
        *,
        device: torch.device,
        decoders: Decoders,
        policy: ServingEngine,
    ) -> "OfflineModel":
        """policy: which of the engines that /predict had built for the network may be taken, where there are any.

        Raises ModelUnavailable if the model's files cannot be used.
        """
        artifact, key = read_model(storage.path(f"models/{model_id}"))
        network = Network(key, artifact.classifier, artifact.preprocessing, device, records=False)
        if device.type == "cpu":
            open_built_engine(storage, network, policy)
        model = LoadedModel(model_id, artifact, network)
        return cls(model, decoders=decoders, batch_size=pass_batch_size(device.type))

    @property
    def tasks(self) -> list[str]:
        """Names of all that it tells, where it tells several things; else none."""
        return [output.name for output in self._model.outputs] if len(self._model.outputs) > 1 else []

    def prepare(self, encoded: bytes) -> Tensor:
        """A picture as the network sees it: uint8 (3, S, S). Raises ImageRefused. Safe to call from many threads."""
        preprocessing = self._model.preprocessing
        return eval_pixels(self._decoders.decode(encoded, side=preprocessing.side), preprocessing)

    def scores(self, prepared: Sequence[Tensor]) -> list[Scores]:
        """Of each prepared picture; none for none."""
        if not prepared:
            return []
        features = in_parts(self._model.engine, torch.stack(list(prepared)), self._pool)
        rows = self._model.probabilities(features).tolist()
        return [Scores.of(row, self._model.outputs, features=seen) for row, seen in zip(rows, features, strict=True)]

    def insight(self, scores: Scores) -> Insight | None:
        """How strange the picture is; None of a model without statistics."""
        reference = self._model.reference
        return insight(scores, reference, self._model.outputs) if reference else None
