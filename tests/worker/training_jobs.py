"""Training jobs that can be run in a test's own process, again and again, as their claims are; and data to train on."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pytest
import queue_builders
import torch
from safetensors.torch import load_file

from app.datasets.ingest import manifest_key, packed_key
from app.datasets.manifest import Manifest, Record
from app.datasets.packed import PackedWriter
from app.db.engine import Database
from app.db.tables import JobRow
from app.jobs import queue
from app.jobs.queue import Claim
from app.jobs.request import parse_request
from app.jobs.spec import DatasetFacts, StartingModel, resolve
from app.jobs.states import JobKind
from app.settings import Settings
from app.storage import LocalStorage
from worker import run_job
from worker.reporter import Patience, Reporter
from worker.training import loop
from worker.training.loop import Hooks, StepProgress
from worker.wakeup import Wakeup

CLASSES = ["dark", "light", "red"]
DATASET = "ds_1"
SIZE = 32


def write_dataset(storage: LocalStorage, *, val: int = 9, mislabelled: Collection[int] = ()) -> Manifest:
    """Pictures in three colours: 18 to train, `val` to validate, 3 to test.

    mislabelled: which of them are labelled as the colour that comes next.
    """
    random = np.random.default_rng(0)
    records = []
    with storage.staging() as staged:
        staged.mkdir()
        with PackedWriter(staged / "packed") as writer:
            for i in range(18 + val + 3):
                colour, split = i % 3, ("train" if i < 18 else "val" if i < 18 + val else "test")
                base = np.array([[40, 40, 40], [210, 210, 210], [210, 40, 40]])[colour]
                writer.append((random.integers(-40, 40, (40, 48, 3)) + base).clip(0, 255).astype(np.uint8))
                label = (colour + (i in mislabelled)) % 3
                path = f"{split}/{CLASSES[label]}/{i}.png"
                records.append(Record(f"img_{i}", path, label, split, f"{i:064x}", 48, 40))  # type: ignore[arg-type]
            writer.finish(range(len(records)))
        manifest = Manifest(CLASSES, records)
        manifest.write(staged / "manifest.jsonl")
        storage.publish(staged / "packed", packed_key(DATASET, 256))
        storage.publish(staged / "manifest.jsonl", manifest_key(DATASET))
    return manifest


class Job:
    """A job that can be run here, again and again, as its claims are."""

    def __init__(
        self,
        database: Database,
        storage: LocalStorage,
        settings: Settings,
        *,
        starting_model: StartingModel | None = None,
        weights: Mapping[str, str] | None = None,
        learning_rate: float | None = None,
        **body: Any,
    ) -> None:
        """learning_rate: of all that is trained, beyond what a request may ask for."""
        self._database, self._storage, self._settings = database, storage, settings
        hyperparameters = {"epochs": 2, "batch_size": 6, "image_size": SIZE, **body.pop("hyperparameters", {})}
        request = {"dataset": DATASET, "backbone": "mobilenet_v3_small", "recipe": "classic", **body}
        facts = DatasetFacts.from_counts([{"name": name, "train": 6, "val": 3} for name in CLASSES])
        self.spec = resolve(
            parse_request(request | {"hyperparameters": hyperparameters}),
            dataset=facts,
            weights=weights or {},
            device_type="cpu",
            starting_model=starting_model,
        )
        if learning_rate is not None:
            rates = {"learning_rate": learning_rate, "backbone_learning_rate": learning_rate}
            values = self.spec.hyperparameters.model_copy(update=rates)
            self.spec = self.spec.model_copy(update={"hyperparameters": values})
        with database.write() as session:
            self.id = queue.submit(
                session, kind=JobKind.training, dataset_id=request["dataset"], spec=self.spec.model_dump(mode="json")
            ).id
        self.shutdown = Wakeup()
        self.claim: Claim | None = None

    def run(self) -> None:
        claim = queue_builders.claim_next(self._database)
        assert claim is not None
        self.claim = claim
        patience = Patience.of(self._settings)
        reporter = Reporter(self._database, claim, shutdown=self.shutdown, patience=patience)
        run_job.run_training(
            claim, settings=self._settings, database=self._database, storage=self._storage, reporter=reporter
        )

    def give_back(self) -> None:
        assert self.claim is not None
        with self._database.write() as session:
            queue.give_back(session, self.claim)
        self.shutdown = Wakeup()

    @property
    def row(self) -> JobRow:
        return queue_builders.find(self._database, self.id)

    @property
    def messages(self) -> list[str]:
        log = queue_builders.event_log(self._database, self.id)
        return [event.data["message"] for event in log if event.event == "log"]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self._storage.path(f"models/{self.row.model_id}/weights.safetensors"))


def act_after_steps(
    monkeypatch: pytest.MonkeyPatch, steps: int, act: Callable[[], object], *, setbacks: int = 0
) -> None:
    """Lets the loop's own report of that step, after so many setbacks, be preceded by `act`."""
    fit = loop.fit

    def watched(state: Any, plan: Any, hooks: Hooks) -> Any:
        def on_progress(progress: StepProgress) -> bool:
            if (state.total_steps, state.setbacks) == (steps, setbacks):
                act()
            return hooks.on_progress(progress)

        return fit(state, plan, Hooks(on_progress, hooks.save, hooks.log))

    monkeypatch.setattr(loop, "fit", watched)


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
