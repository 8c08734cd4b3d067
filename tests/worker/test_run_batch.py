"""A batch ends with a row for each file, in whole files, whatever happens to its run and its pictures meanwhile."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import builders
import numpy as np
import pytest
import torch
from queue_builders import claim_next, find, submit

from app.db.engine import Database
from app.db.tables import new_id
from app.jobs import batches, queue
from app.jobs.queue import Cancelled, Claim, ClaimLost
from app.jobs.states import JobKind
from app.serving.offline import OfflineModel
from app.settings import Settings
from app.storage import LocalStorage
from app.vision import artifact
from app.vision.artifact import Artifact
from app.vision.classifier import Classifier
from app.vision.decoding import Decoders
from app.vision.images import ImageLimits
from app.vision.outputs import Output
from app.vision.preprocessing import Preprocessing
from app.vision.reference import Reference
from worker import run_batch
from worker.batch_results import Parts
from worker.reporter import Reporter, ShuttingDown
from worker.wakeup import Wakeup

CLASSES = ["cat", "dog"]
SETTINGS = Settings(_env_file=None, device="cpu")
SMALL = Preprocessing(resize=40, crop=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), interpolation="bilinear")
FILES = {f"photos/{i}.jpg": builders.jpeg(i) for i in range(40)}

Run = Callable[[Claim], None]


@pytest.fixture
def run(database: Database, storage: LocalStorage) -> Run:
    def predict(claim: Claim) -> None:
        reporter = Reporter(database, claim, shutdown=Wakeup())
        run_batch.run_batch(claim, settings=SETTINGS, database=database, storage=storage, reporter=reporter)

    return predict


def model(storage: LocalStorage, *, classes: list[str] = CLASSES, tasks: list[Output] | None = None) -> str:
    outputs = sum(len(task.classes) for task in tasks) if tasks else len(classes)
    network = Classifier.new("squeezenet1_1", outputs, seed=0).eval()
    return published(storage, Artifact(network, classes, SMALL, temperature=1.5, tasks=tasks or []))


def published(storage: LocalStorage, made: Artifact) -> str:
    model_id = new_id("mdl")
    with storage.staging() as folder:
        artifact.save(folder, made)
        storage.publish(folder, f"models/{model_id}")
    return model_id


def opened(storage: LocalStorage, model_id: str) -> OfflineModel:
    decoders = Decoders.trusting(ImageLimits.from_settings(SETTINGS))
    return OfflineModel.open(storage, model_id, device=torch.device("cpu"), decoders=decoders, policy="torch")


def claimed_batch(
    database: Database, storage: LocalStorage, files: Mapping[str, bytes], *, model_id: str = "", rows: int = 0
) -> Claim:
    """A batch of these files, and the claim on it. rows: of the archive, where some of its files become none."""
    batch_id = new_id("batch")
    builders.written(storage.path(batches.archive_key(batch_id)), builders.zip_of(files))
    with database.write() as session:
        queue.submit(
            session,
            kind=JobKind.prediction,
            job_id=batch_id,
            dataset_id="",
            model_id=model_id or model(storage),
            spec={"top_k": 2, "files": rows or len(files), "size_bytes": 1, "sha256": "0"},
        )
    claim = claim_next(database, kind=JobKind.prediction)
    assert claim is not None
    return claim


def results(database: Database, storage: LocalStorage, claim: Claim) -> tuple[list[dict[str, Any]], str]:
    """Rows, and the text of the table."""
    job = find(database, claim.job_id, kind=JobKind.prediction)
    assert job.status == "succeeded"
    folder = storage.path(batches.results_key(job.id, job.fence))
    lines = (folder / "results.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines], (folder / "results.csv").read_bytes().decode("utf-8")


def counts(database: Database, claim: Claim) -> dict[str, Any] | None:
    return find(database, claim.job_id, kind=JobKind.prediction).metrics


def find_model(database: Database, claim: Claim) -> str:
    model_id = find(database, claim.job_id, kind=JobKind.prediction).model_id
    assert model_id is not None
    return model_id


def left_files(storage: LocalStorage) -> list[str]:
    """All that is not a model, in the storage."""
    files = [path.relative_to(storage.root) for path in storage.root.rglob("*") if path.is_file()]
    return sorted(str(path) for path in files if path.parts[0] != "models")


def test_each_file_becomes_a_row_in_the_order_of_the_archive(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    broken = builders.jpeg(1)[:-50]
    files = FILES | {"notes.txt": b"hello", "photos/cut.jpg": broken}
    passed_over = {"__MACOSX/._0.jpg": b"x", ".DS_Store": b"x", "labels.csv": b"filename,label\n"}
    claim = claimed_batch(database, storage, files | passed_over, rows=len(files))

    run(claim)

    rows, table = results(database, storage, claim)
    assert [row["path"] for row in rows] == list(files)
    assert counts(database, claim) == {"num_images": 40, "num_rejected": 2}
    for row in rows[:40]:
        assert [entry["label"] for entry in row["top"]] == sorted(CLASSES, key=lambda name: name != row["label"])
        assert (row["score"], row["label"]) == (row["top"][0]["score"], row["top"][0]["label"])
        assert sum(entry["score"] for entry in row["top"]) == pytest.approx(1.0)
    assert {row["error"]["code"] for row in rows[40:]} == {"unreadable-image"}
    assert rows[41]["error"]["detail"] == "The picture cannot be read: truncated JPEG."
    cells = list(csv.DictReader(io.StringIO(table, newline="")))
    assert table.startswith("path,label,score,error\r\n")
    assert [(cell["path"], cell["label"], cell["error"]) for cell in cells] == [
        (row["path"], row.get("label", ""), row.get("error", {}).get("detail", "")) for row in rows
    ]
    assert [float(cell["score"]) for cell in cells[:40]] == [row["score"] for row in rows[:40]]


def test_scores_are_those_of_each_picture_alone(database: Database, storage: LocalStorage, run: Run) -> None:
    model_id = model(storage)
    claim = claimed_batch(database, storage, FILES, model_id=model_id)
    alone = opened(storage, model_id)

    run(claim)

    for row in results(database, storage, claim)[0]:
        [scores] = alone.scores([alone.prepare(FILES[row["path"]])])
        assert row["score"] == pytest.approx(max(scores.values), abs=1e-5)


def test_rows_say_of_strange_pictures_what_predict_says(database: Database, storage: LocalStorage, run: Run) -> None:
    plain = model(storage)
    offline = opened(storage, plain)
    scores = offline.scores([offline.prepare(picture) for picture in FILES.values()])
    features = torch.stack([one.features for one in scores if one.features is not None]).numpy()
    with_reference = artifact.load(storage.path(f"models/{plain}"))
    with_reference.reference = Reference.fit(
        features[:20],
        np.zeros(20, dtype=np.int64),
        [None] * 20,
        held_out=features[20:],
        probability_of_true=[np.full(20, 0.5)],
    )
    model_id = published(storage, with_reference)
    black = builders.encoded(np.zeros((64, 64, 3), dtype=np.uint8))
    claim = claimed_batch(database, storage, FILES | {"black.png": black}, model_id=model_id)

    run(claim)

    *rows, strange = results(database, storage, claim)[0]
    assert all(row["in_distribution"] and row["ood_score"] < 0.1 for row in rows[:20])
    assert (strange["in_distribution"], strange["ood_score"] > 0.5) == (False, True)


def test_model_of_several_tasks_tells_all_of_them(database: Database, storage: LocalStorage, run: Run) -> None:
    tasks = [Output("colour", ["red", "blue"], 1.0), Output("=light", ["dark", "bright", "dim"], 2.0)]
    model_id = model(storage, classes=["red", "blue"], tasks=tasks)
    claim = claimed_batch(database, storage, {"a.jpg": builders.jpeg(1), "b.txt": b"text"}, model_id=model_id)

    run(claim)

    [told, refused], table = results(database, storage, claim)
    assert set(told["tasks"]) == {"colour", "=light"}
    assert told["tasks"]["colour"] == {name: told[name] for name in ("label", "score", "top")}
    header, first, second = list(csv.reader(io.StringIO(table, newline="")))
    assert header[4:] == ["label:colour", "score:colour", "label:=light", "score:=light"]
    assert first[6] == told["tasks"]["=light"]["label"]
    assert (refused["path"], second[4:]) == ("b.txt", [""] * 4)


def test_spreadsheets_calculate_nothing(database: Database, storage: LocalStorage, run: Run) -> None:
    model_id = model(storage, classes=['=HYPERLINK("x")', "@SUM(1)"])
    names = ["=1+1.jpg", "+1.jpg", "-1.jpg", "@x.jpg", '"quoted", and more;=2.jpg', "plain.jpg", "＝1.jpg"]
    claim = claimed_batch(
        database, storage, {name: builders.jpeg(i) for i, name in enumerate(names)}, model_id=model_id
    )

    run(claim)

    rows, table = results(database, storage, claim)
    cells = list(csv.DictReader(io.StringIO(table, newline="")))
    assert [row["path"] for row in rows] == names
    assert [cell["path"] for cell in cells] == [
        *("'=1+1.jpg", "'+1.jpg", "'-1.jpg", "'@x.jpg"),
        *('"quoted", and more;=2.jpg', "plain.jpg", "'＝1.jpg"),
    ]
    assert {cell["label"][:2] for cell in cells} <= {"'=", "'@"}
    # A spreadsheet that divides at semicolons sees a text in quotes there, too.
    assert '"""quoted"", and more;=2.jpg"' in table


def test_run_that_is_shut_down_is_gone_on_from_with_the_same_results(
    database: Database, storage: LocalStorage, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_batch, "PART_SECONDS", 0.0)
    many = {f"{i}.jpg": builders.jpeg(i % 7) for i in range(300)}
    undisturbed = claimed_batch(database, storage, many)
    run(undisturbed)
    disturbed = claimed_batch(database, storage, many, model_id=find_model(database, undisturbed))
    shutdown = Wakeup()

    def clock() -> float:
        if storage.exists(f"jobs/{disturbed.job_id}"):
            shutdown.set()
        return 0.0

    reporter = Reporter(database, disturbed, shutdown=shutdown, monotonic=clock)
    with pytest.raises(ShuttingDown):
        run_batch.run_batch(disturbed, settings=SETTINGS, database=database, storage=storage, reporter=reporter)
    with database.write() as session:
        queue.give_back(session, disturbed)
    second = claim_next(database, kind=JobKind.prediction)
    assert second is not None
    done = Parts(storage, job_id=second.job_id, fence=second.fence).rows
    run(second)

    assert 0 < done < 300
    assert results(database, storage, second) == results(database, storage, undisturbed)
    assert counts(database, second) == {"num_images": 300, "num_rejected": 0}


def test_results_of_a_batch_cancelled_at_the_last_moment_are_not_left(
    database: Database, storage: LocalStorage
) -> None:
    """When every row is on disk, so that only the last transaction notices."""
    claim = claimed_batch(database, storage, FILES)
    last_part = f"jobs/{claim.job_id}/1/0-40-0.jsonl"

    def clock() -> float:
        if storage.exists(last_part):
            with database.write() as session:
                queue.request_cancel(session, claim.job_id, kind=JobKind.prediction)
        return 0.0

    reporter = Reporter(database, claim, shutdown=Wakeup(), monotonic=clock)
    with pytest.raises(Cancelled):
        run_batch.run_batch(claim, settings=SETTINGS, database=database, storage=storage, reporter=reporter)

    assert left_files(storage) == [f"batches/{claim.job_id}/archive", last_part]


def test_run_that_lost_its_claim_leaves_the_results_of_the_other(
    database: Database, storage: LocalStorage, run: Run
) -> None:
    claim = claimed_batch(database, storage, FILES)
    with database.write() as session:
        queue.crashed(session, claim, "It was paused.", max_crashes=3)
    second = claim_next(database, kind=JobKind.prediction)
    assert second is not None
    run(second)
    with pytest.raises(ClaimLost):
        run(claim)

    assert len(results(database, storage, second)[0]) == 40
    assert not storage.exists(batches.results_key(claim.job_id, claim.fence))


def test_parts_of_runs_before_are_chained_and_those_of_later_ones_not_seen(storage: LocalStorage) -> None:
    first = Parts(storage, job_id="batch_1", fence=1)
    first.add([{"path": "a"}, {"path": "b", "error": {}}])
    second = Parts(storage, job_id="batch_1", fence=2)
    second.add([{"path": "c"}])
    first.add([{"path": "c"}, {"path": "d"}])
    third = Parts(storage, job_id="batch_1", fence=3)

    assert [(part.start, part.end) for part in third.parts] == [(0, 2), (2, 4)]
    assert (third.rows, third.rejected) == (4, 1)
    assert Parts(storage, job_id="batch_1", fence=1).rows == 4
    assert Parts(storage, job_id="batch_2", fence=3).rows == 0


def test_other_kinds_do_not_take_a_batch(database: Database) -> None:
    submit(database, kind=JobKind.prediction)

    assert claim_next(database) is None
    assert claim_next(database, kind=JobKind.ingest) is None
