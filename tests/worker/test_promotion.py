"""The promotion gate: a new model becomes the default where it is better on the same pictures, beyond chance."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from app import registry
from app.datasets.ingest import manifest_key, packed_key
from app.datasets.manifest import Manifest, Record
from app.datasets.packed import PackedWriter
from app.db.engine import Database
from app.errors import JobFailed
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.preprocessing import Preprocessing, eval_pixels
from worker import promotion
from worker.promotion import Candidate, Decision
from worker.training.compare import Predictions

CLASSES = ["dark", "light"]
SMALL = Preprocessing(resize=36, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bilinear")


class Gate:
    """The gate before one database and storage, with data sets and incumbents as a test needs them."""

    def __init__(self, database: Database, storage: LocalStorage) -> None:
        self.database, self.storage = database, storage
        self.ticks = 0

    def add_dataset(self, dataset_id: str, *, train: Sequence[str] = (), val: Sequence[str] = ()) -> None:
        """Pictures by digest, alternating between the classes."""
        records = [
            Record(f"img_{split}{i}", f"{split}/{i}.png", i % 2, split, digest, 48, 40)  # type: ignore[arg-type]
            for split, digests in (("train", train), ("val", val))
            for i, digest in enumerate(digests)
        ]
        with self.storage.staging() as staged:
            staged.mkdir()
            with PackedWriter(staged / "packed") as writer:
                for record in records:
                    writer.append(np.full((40, 48, 3), 60 + 130 * record.label, dtype=np.uint8))
                writer.finish(range(len(records)))
            Manifest(CLASSES, records).write(staged / "manifest.jsonl")
            self.storage.publish(staged / "packed", packed_key(dataset_id, 256))
            self.storage.publish(staged / "manifest.jsonl", manifest_key(dataset_id))

    def add_incumbent(
        self,
        dataset_id: str,
        *,
        predictions: Predictions | None = None,
        always_says: str | None = None,
        classes: Sequence[str] = CLASSES,
        start: str | None = None,
        shots: Sequence[str] = (),
    ) -> None:
        """The default mdl_1, with stored predictions, or with a network that says the same of every picture."""
        with self.storage.staging() as folder:
            folder.mkdir()
            if always_says is not None:
                classifier = Classifier.new("mobilenet_v3_small", len(classes), seed=0).eval()
                with torch.no_grad():
                    classifier.head.weight.zero_()
                    classifier.head.bias.copy_(torch.tensor([float(name == always_says) for name in classes]))
                made = Artifact(classifier, list(classes), SMALL, metadata={"shots": list(shots)})
                artifact.save(folder, made)
            record = {} if predictions is None else {"predictions": vars(predictions)}
            (folder / "evaluation.json").write_text(json.dumps(record))
            self.storage.publish(folder, "models/mdl_1")
        self.register("mdl_1", dataset_id, classes=classes, start=start)
        with self.database.write() as session:
            registry.point_alias(session, "default", "mdl_1")

    def register(
        self, model_id: str, dataset_id: str, *, classes: Sequence[str] = CLASSES, start: str | None = None
    ) -> None:
        backbone: Mapping[str, Any] = {"name": "mobilenet_v3_small", "weights": None}
        with self.database.write() as session:
            registry.register(
                session,
                model_id=model_id,
                job_id=f"job_of_{model_id}",
                dataset_id=dataset_id,
                method="from_scratch",
                backbone={**backbone, "model": start} if start else backbone,
                classes=classes,
                metrics={"val_accuracy": 0.5},
                size_bytes=1,
                sha256="0" * 64,
            )

    def decide(self, candidate: Candidate, **options: Any) -> Decision:
        return promotion.decide(
            candidate,
            **{"policy": "if_better"} | options,
            database=self.database,
            storage=self.storage,
            device=torch.device("cpu"),
            tick=self._tick,
        )

    def _tick(self) -> None:
        self.ticks += 1


@pytest.fixture
def gate(database: Database, storage: LocalStorage) -> Gate:
    return Gate(database, storage)


def digests(count: int, *, first: int = 0) -> list[str]:
    return [f"{i:064x}" for i in range(first, first + count)]


def predictions(images: Sequence[str], *, wrong: Sequence[int] = ()) -> Predictions:
    """Of pictures whose classes alternate: all right but those at these places."""
    true = [CLASSES[i % 2] for i in range(len(images))]
    said = [CLASSES[(i + (i in wrong)) % 2] for i in range(len(images))]
    return Predictions(list(images), true, said)


def candidate(of: Predictions, *, dataset_id: str = "ds_1", start: str | None = None) -> Candidate:
    return Candidate(dataset_id=dataset_id, start=start, knows={"": frozenset(CLASSES)}, predictions=of)


def test_better_beyond_chance_on_the_same_pictures_is_promoted(gate: Gate) -> None:
    images = digests(40)
    gate.add_dataset("ds_1", train=digests(10, first=100), val=images)
    gate.add_incumbent("ds_1", predictions=predictions(images, wrong=range(10)))

    decision = gate.decide(candidate(predictions(images, wrong=[0, 20])))

    assert decision == Decision(
        promoted=True,
        reason="The model becomes the default: of the same 40 validation images, only the new one gets 9 right, and "
        "only mdl_1 1 (p = 0.011).",
        incumbent="mdl_1",
        images=40,
        candidate_right_only=9,
        incumbent_right_only=1,
        p_value=pytest.approx(11 / 1024),  # type: ignore[arg-type]
    )


def test_a_higher_accuracy_that_may_be_chance_is_held(gate: Gate) -> None:
    images = digests(40)
    gate.add_dataset("ds_1", val=images)
    gate.add_incumbent("ds_1", predictions=predictions(images, wrong=range(4)))

    decision = gate.decide(candidate(predictions(images)))

    assert (decision.promoted, decision.p_value) == (False, pytest.approx(1 / 16))
    assert decision.reason.startswith("The default model stays mdl_1: ")
    assert "which may be chance. `graft models promote`" in decision.reason


@pytest.mark.parametrize(("wrong", "found"), [([1, 2], "both get the same ones right"), ([1, 2, 3], "only mdl_1 1")])
def test_what_is_as_good_or_worse_is_not_better(gate: Gate, wrong: list[int], found: str) -> None:
    images = digests(40)
    gate.add_dataset("ds_1", val=images)
    gate.add_incumbent("ds_1", predictions=predictions(images, wrong=[1, 2]))

    decision = gate.decide(candidate(predictions(images, wrong=wrong)))

    assert (decision.promoted, decision.p_value) == (False, 1.0)
    assert "the new one is not better" in decision.reason
    assert found in decision.reason


def test_a_model_that_is_to_bridge_the_time_gives_way_to_one_that_is_as_good(gate: Gate) -> None:
    images = digests(40)
    gate.add_dataset("ds_1", val=images)
    gate.add_incumbent("ds_1", predictions=predictions(images))

    interim = gate.decide(candidate(predictions(images))).incumbent
    assert gate.decide(candidate(predictions(images)), interim=interim).promoted
    assert not gate.decide(candidate(predictions(images)), interim="mdl_another").promoted
    assert not gate.decide(candidate(predictions(images, wrong=[0])), interim=interim).promoted


def test_the_same_archive_uploaded_again_is_compared_by_what_was_said_then(gate: Gate) -> None:
    images = digests(40)
    gate.add_dataset("ds_again", val=images[::-1])
    # Its data set is gone, and it has no weights that could be run.
    gate.add_incumbent("ds_gone", predictions=predictions(images, wrong=range(6)))

    decision = gate.decide(candidate(predictions(images), dataset_id="ds_again"))

    assert (decision.promoted, decision.images, decision.candidate_right_only) == (True, 40, 6)
    assert "data set is gone" not in decision.reason


def test_the_default_is_run_on_other_pictures_of_the_same_classes(gate: Gate) -> None:
    images = digests(12, first=50)
    gate.add_dataset("ds_old", train=digests(10), val=digests(10, first=10))
    gate.add_dataset("ds_new", train=digests(10, first=70), val=images)
    # In another order of the classes, which are told apart by name.
    gate.add_incumbent(
        "ds_old", predictions=predictions(digests(10, first=10)), always_says="light", classes=CLASSES[::-1]
    )

    decision = gate.decide(candidate(predictions(images, wrong=[1]), dataset_id="ds_new"))

    assert (decision.images, decision.candidate_right_only, decision.incumbent_right_only) == (12, 6, 1)
    assert (decision.promoted, decision.p_value) == (False, pytest.approx(8 / 128))
    assert gate.ticks > 0


def test_the_default_sees_pictures_as_it_is_served_them(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(pixels: Any, preprocessing: Preprocessing) -> torch.Tensor:
        seen.append(preprocessing)
        return eval_pixels(pixels, preprocessing)

    monkeypatch.setattr(promotion, "eval_pixels", watched)
    gate.add_dataset("ds_old", val=digests(2))
    gate.add_dataset("ds_new", val=digests(3, first=10))
    gate.add_incumbent("ds_old", always_says="light")

    gate.decide(candidate(predictions(digests(3, first=10)), dataset_id="ds_new"))

    assert seen == [SMALL] * 3


def test_pictures_that_a_class_was_added_with_are_left_out(gate: Gate) -> None:
    images = digests(12)
    gate.add_dataset("ds_old", train=digests(4, first=60))
    gate.add_dataset("ds_new", train=digests(4, first=40), val=images)
    gate.add_incumbent("ds_old", always_says="light", shots=images[:5])

    decision = gate.decide(candidate(predictions(images), dataset_id="ds_new"))

    assert (decision.images, decision.candidate_right_only) == (7, 3)


def test_pictures_that_either_was_trained_on_are_left_out(gate: Gate) -> None:
    images = digests(12)
    gate.add_dataset("ds_old", train=images[:4], val=digests(4, first=60))
    gate.add_dataset("ds_oldest", train=images[4:6], val=digests(4, first=70))
    gate.add_dataset("ds_new", train=[*digests(4, first=40), images[6]], val=images)
    gate.register("mdl_0", "ds_oldest")
    gate.add_incumbent("ds_old", always_says="light", start="mdl_0")

    decision = gate.decide(candidate(predictions(images), dataset_id="ds_new"))

    # Of those at 7 to 11, the dark ones at 8 and 10 are what the default gets wrong.
    assert (decision.images, decision.candidate_right_only) == (5, 2)


def test_without_a_picture_that_is_new_to_both_the_default_stays(gate: Gate) -> None:
    images = digests(6)
    gate.add_dataset("ds_old", train=images, val=digests(2, first=60))
    gate.add_dataset("ds_new", val=images)
    gate.add_incumbent("ds_old", always_says="light")

    decision = gate.decide(candidate(predictions(images), dataset_id="ds_new"))

    assert (decision.promoted, decision.images, decision.p_value) == (False, 0, None)
    assert "no validation image that neither it nor the new model was trained on" in decision.reason


def test_that_the_default_may_know_the_pictures_is_said_where_its_data_set_is_gone(gate: Gate) -> None:
    images = digests(12)
    gate.add_dataset("ds_new", val=images)
    gate.add_incumbent("ds_gone", always_says="light")

    decision = gate.decide(candidate(predictions(images), dataset_id="ds_new"))

    assert decision.promoted
    assert decision.reason.endswith("mdl_1 may have been trained on some of them: its data set is gone.")


def test_a_model_from_before_predictions_were_kept_is_run(gate: Gate) -> None:
    images = digests(12)
    gate.add_dataset("ds_1", val=images)
    gate.add_incumbent("ds_1", always_says="light")

    assert gate.decide(candidate(predictions(images))).candidate_right_only == 6


def test_a_default_that_cannot_be_loaded_makes_room(gate: Gate) -> None:
    gate.add_dataset("ds_1", val=digests(4))
    gate.add_incumbent("ds_1")

    decision = gate.decide(candidate(predictions(digests(4))))

    assert (decision.promoted, decision.incumbent, decision.p_value) == (True, "mdl_1", None)
    assert "cannot be loaded" in decision.reason


def test_a_comparison_that_fails_costs_the_promotion_and_not_the_model(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_arguments: object, **_options: object) -> torch.Tensor:
        raise JobFailed("The device has not enough memory.")

    monkeypatch.setattr(promotion, "predict_logits", out_of_memory)
    gate.add_dataset("ds_1", val=digests(4))
    gate.add_incumbent("ds_1", always_says="light")

    decision = gate.decide(candidate(predictions(digests(4))))

    assert not decision.promoted
    assert "it could not be compared. The device has not enough memory." in decision.reason


@pytest.mark.parametrize(
    ("policy", "classes", "promoted"),
    [
        ("if_better", ["cat", "dog"], True),
        ("always", CLASSES, True),
        ("never", CLASSES, False),
        ("never", ["cat", "dog"], False),
    ],
)
def test_nothing_is_compared_where_nothing_is_to_be_decided(
    gate: Gate, policy: str, classes: list[str], promoted: bool
) -> None:
    # No data set is there that could be read.
    gate.add_incumbent("ds_1", classes=classes)

    decision = gate.decide(candidate(predictions(digests(4))), policy=policy)

    assert (decision.promoted, decision.incumbent, decision.images) == (promoted, "mdl_1", None)
    assert decision.reason.startswith("The model becomes the default" if promoted else "The default model stays")


@pytest.mark.parametrize(("policy", "promoted"), [("if_better", True), ("always", True), ("never", False)])
def test_where_there_is_no_default_the_model_becomes_it_unless_forbidden(
    gate: Gate, policy: str, promoted: bool
) -> None:
    decision = gate.decide(candidate(predictions(digests(4))), policy=policy)

    assert (decision.promoted, decision.incumbent) == (promoted, None)


def test_the_record_is_what_callers_see(gate: Gate) -> None:
    gate.add_dataset("ds_1", val=digests(4))
    gate.add_incumbent("ds_1", predictions=predictions(digests(4)))

    assert set(gate.decide(candidate(predictions(digests(4)))).as_record()) == {
        "promoted",
        "reason",
        "incumbent",
        "images",
        "candidate_right_only",
        "incumbent_right_only",
        "p_value",
    }
