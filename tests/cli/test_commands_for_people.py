"""train, predict, jobs, datasets and models against a scripted server."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Result, ScriptedServer

Graft = Callable[..., Result]

DATASET = {
    "id": "ds_1",
    "object": "dataset",
    "kind": "labelled",
    "size_bytes": 10,
    "sha256": "0",
    "name": "flowers",
    "status": "ready",
    "num_images": 300,
    "num_rejected": 1,
    "splits": {"train": 240, "val": 60, "test": 0},
    "classes": [{"name": name, "train": 120, "val": 30, "test": 0} for name in ("daisy", "rose")],
    "warnings": [{"code": "duplicate_across_splits", "detail": "Two pictures are the same.", "paths": []}],
    "error": None,
    "created_at": "2026-11-01T10:00:00Z",
}
MODEL = {
    "id": "mdl_1",
    "object": "model",
    "job": "job_1",
    "dataset": "ds_1",
    "size_bytes": 10,
    "sha256": "0",
    "role": "final",
    "created": 1793527200,
    "owned_by": "graft",
    "method": "fine_tuning",
    "backbone": {"name": "resnet50", "weights": "IMAGENET1K_V2"},
    "classes": ["daisy", "rose"],
    "aliases": ["default"],
    "metrics": {"val_accuracy": 0.95, "val_accuracy_ci95": [0.89, 0.98], "macro_f1": 0.9512},
    "created_at": "2026-11-01T10:00:00Z",
}
ALIAS = {"name": "default", "object": "alias", "model": "mdl_1", "updated_at": "2026-11-01T10:00:00Z"}
EPOCH = {"epoch": 1, "train_loss": 0.5, "train_accuracy": 0.8, "val_loss": 0.4, "val_accuracy": 0.95}


def job(status: str, **other: Any) -> dict[str, Any]:
    fixed = {
        "id": "job_1",
        "object": "job",
        "dataset": "ds_1",
        "spec": {},
        "attempt": 1,
        "cancel_requested": False,
        "stop_requested": False,
        "status": status,
        "method": "fine_tuning",
        "backbone": {"name": "resnet50"},
        "progress": {"fraction": 0.5},
        "metrics": None,
        "model": None,
        "error": None,
        "created_at": "2026-11-01T10:00:00Z",
    }
    return fixed | other


def stream(*events: tuple[str, dict[str, Any]]) -> bytes:
    lines = [f"id: {index}\nevent: {event}\ndata: {json.dumps(data)}\n" for index, (event, data) in enumerate(events)]
    return "\n".join([*lines, "event: done\ndata: {}\n\n"]).encode()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "flowers.zip"
    path.write_bytes(b"an archive")
    return path


@pytest.fixture
def training(server: ScriptedServer) -> ScriptedServer:
    """A server on which a job on the data set ds_1 succeeds."""
    server.answers = {
        ("PUT", "/v1/datasets"): (201, DATASET | {"status": "processing"}),
        ("GET", "/v1/datasets/ds_1"): (200, DATASET),
        ("POST", "/v1/jobs"): (201, job("queued")),
        ("GET", "/v1/jobs/job_1/events"): (
            200,
            stream(("status", {"status": "running"}), ("epoch", EPOCH), ("log", {"message": "Halved the batch."})),
        ),
        ("GET", "/v1/jobs/job_1"): (200, job("succeeded", model="mdl_1")),
        ("GET", "/v1/models/mdl_1"): (200, MODEL),
    }
    return server


def test_train_goes_from_an_archive_to_the_figures_and_the_curl_line(
    training: ScriptedServer, graft: Graft, archive: Path
) -> None:
    result = graft("train", str(archive))

    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "Model mdl_1: fine_tuning on resnet50",
        "  validation accuracy 95.0% (95 % interval 89.0% to 98.0%)",
        "  macro F1            0.951",
        f"  curl -F file=@picture.jpg {training.url}/predict",
    ]
    assert result.errors.splitlines() == [
        "Data set ds_1: 300 pictures of 2 classes, 240 to train on, 60 to validate with; rejected files: 1.",
        "Warning: Two pictures are the same.",
        "Job job_1",
        "epoch   1   train loss 0.5000 accuracy 80.0%   validation loss 0.4000 accuracy 95.0%",
        "Halved the batch.",
    ]
    [upload] = training.sent("PUT", "/v1/datasets")
    assert (upload.path, upload.body) == ("/v1/datasets?name=flowers", b"an archive")


def test_train_warns_of_figures_that_say_little(training: ScriptedServer, graft: Graft) -> None:
    metrics = MODEL["metrics"] | {"validation_warning": "Measured on only 8 pictures."}
    training.answers["GET", "/v1/models/mdl_1"] = (200, MODEL | {"metrics": metrics})

    assert graft("train", "ds_1").errors.splitlines()[-1] == "Warning: Measured on only 8 pictures."


def test_train_passes_on_what_was_asked_for(training: ScriptedServer, graft: Graft, archive: Path) -> None:
    options = "--method fine_tuning --recipe classic --epochs 3 --seed 7 -H optimizer=adamw -H mixup=0.2 -H ema=true"
    graft("train", str(archive), *options.split(), "--exclude", "cat/1.jpg", "--exclude", "a dog/2.jpg")

    [submitted] = training.sent("POST", "/v1/jobs")
    assert submitted.json() == {
        "dataset": "ds_1",
        "method": "fine_tuning",
        "backbone": "auto",
        "recipe": "classic",
        "seed": 7,
        "promote": "if_better",
        "exclude": ["cat/1.jpg", "a dog/2.jpg"],
        "hyperparameters": {"epochs": 3, "optimizer": "adamw", "mixup": 0.2, "ema": True},
    }


def test_train_packs_a_folder_without_its_hidden_files(training: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    folder = tmp_path / "pets"
    for name in ("cat/1.jpg", "dog/2.jpg", ".cache/3.jpg", "dog/.DS_Store"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())

    result = graft("train", str(folder))

    assert result.exit_code == 0
    [upload] = training.sent("PUT", "/v1/datasets")
    assert upload.path == "/v1/datasets?name=pets"
    with zipfile.ZipFile(io.BytesIO(upload.body)) as packed:
        assert packed.namelist() == ["cat/1.jpg", "dog/2.jpg"]
        assert packed.read("dog/2.jpg") == b"dog/2.jpg"


def test_train_takes_a_data_set_that_is_there(training: ScriptedServer, graft: Graft) -> None:
    assert graft("train", "ds_1").exit_code == 0

    assert training.sent("PUT", "/v1/datasets") == []


def test_train_prints_nothing_but_json_where_asked(training: ScriptedServer, graft: Graft, archive: Path) -> None:
    printed = json.loads(graft("train", str(archive), "--json").output)

    assert (printed["dataset"]["id"], printed["job"]["id"], printed["model"]["id"]) == ("ds_1", "job_1", "mdl_1")


def test_train_on_a_refused_data_set_says_why(training: ScriptedServer, graft: Graft, archive: Path) -> None:
    failed = DATASET | {"status": "failed", "error": {"detail": "Class rose lost all its pictures."}}
    training.answers["GET", "/v1/datasets/ds_1"] = (200, failed)

    result = graft("train", str(archive))

    assert result.exit_code == 1
    assert result.errors.splitlines()[-1] == "Data set ds_1 failed: Class rose lost all its pictures."


def test_a_wrong_hyperparameter_is_named(training: ScriptedServer, graft: Graft, archive: Path) -> None:
    training.answers["POST", "/v1/jobs"] = (
        422,
        {
            "type": "/problems/invalid-hyperparameter",
            "detail": "A hyperparameter is not valid.",
            "errors": [{"pointer": "#/hyperparameters/epochs", "detail": "must be at least 1"}],
        },
    )

    result = graft("train", str(archive), "--epochs", "0")

    assert result.exit_code == 1
    assert result.errors.splitlines()[-2:] == [
        "A hyperparameter is not valid.",
        "  #/hyperparameters/epochs: must be at least 1",
    ]


def test_a_failed_job_ends_the_watching_with_its_reason(training: ScriptedServer, graft: Graft) -> None:
    training.answers["GET", "/v1/jobs/job_1"] = (200, job("failed", error={"detail": "The loss became NaN."}))

    result = graft("jobs", "watch", "job_1")

    assert (result.exit_code, result.output) == (1, "")
    assert result.errors.splitlines()[-1] == "Job job_1 failed: The loss became NaN."


def test_a_cancelled_job_is_not_a_success(training: ScriptedServer, graft: Graft) -> None:
    training.answers["GET", "/v1/jobs/job_1"] = (200, job("cancelled"))

    result = graft("jobs", "watch", "job_1")

    assert (result.exit_code, result.errors.splitlines()[-1]) == (1, "Job job_1 is cancelled.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.zip"], "There is no file or folder nowhere.zip."),
        (["predict", "nowhere.jpg"], "There is no file nowhere.jpg."),
        (["restore", "nowhere"], "There is no folder nowhere."),
        (["weights", "import", "nowhere.pth", "--backbone", "resnet18"], "There is no file nowhere.pth."),
        (["train", "ds_1", "-H", "epochs"], "-H takes NAME=VALUE, not 'epochs'."),
        (["train", "ds_photos.zip"], "There is no file or folder ds_photos.zip."),
        (["train", "ds_1", "--learning-rate", "nan"], "learning_rate takes a finite number, not nan."),
        (["train", "ds_1", "-H", "gamma=Infinity"], "gamma takes a finite number, not inf."),
        (["models", "export", "mdl_1", "-o", "nowhere/model.onnx"], "nowhere/model.onnx is no place for a file."),
        (
            ["train", "ds_1", "--name", "flowers"],
            "--name and --unlabelled are for an upload; the data set ds_1 is there and stays as it is.",
        ),
        (
            ["train", "ds_1", "--unlabelled"],
            "--name and --unlabelled are for an upload; the data set ds_1 is there and stays as it is.",
        ),
    ],
)
def test_wrong_usage_is_told_before_anything_is_sent(
    server: ScriptedServer, graft: Graft, arguments: list[str], message: str
) -> None:
    result = graft(*arguments)

    assert (result.exit_code, result.errors) == (2, f"{message}\n")
    assert server.requests == []


def test_predict_prints_a_row_for_each_picture(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    good, strange, broken = (tmp_path / f"{name}.jpg" for name in ("good", "strange", "broken"))
    for path in (good, strange, broken):
        path.write_bytes(b"1")
    top = [{"label": "cat", "score": 0.97}, {"label": "dog", "score": 0.03}]
    server.answers["POST", "/predict"] = (
        200,
        {
            "model": "mdl_1",
            "predictions": [
                {"filename": "good.jpg", "label": "cat", "score": 0.97, "top": top, "in_distribution": True},
                {"filename": "strange.jpg", "label": "cat", "score": 0.97, "top": top, "in_distribution": False},
                {"filename": "broken.jpg", "error": {"detail": "truncated JPEG"}},
            ],
        },
    )

    result = graft("predict", str(good), str(strange), str(broken), "--model", "mdl_1", "--top-k", "2")

    assert result.exit_code == 1
    assert [line.split() for line in result.output.splitlines()] == [
        ["picture", "label", "score", "next"],
        [str(good), "cat", "97.0%", "dog", "3.0%"],
        [str(strange), "cat", "97.0%", "dog", "3.0%", "(unlike", "what", "it", "was", "trained", "on)"],
        [str(broken), "–", "truncated", "JPEG"],
    ]
    assert server.requests[0].path == "/predict?model=mdl_1&top_k=2"


def test_a_long_name_leaves_its_label_and_score_in_the_line(
    server: ScriptedServer, graft: Graft, tmp_path: Path
) -> None:
    path = tmp_path / ("a" * 150) / ("b" * 150) / "c.jpg"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"1")
    server.answers["POST", "/predict"] = (200, predicted("c.jpg"))

    header, *rows = [line.split() for line in graft("predict", str(path)).output.splitlines()]

    assert (header, rows) == (["picture", "label", "score", "next"], [[str(path), "cat", "100.0%"]])


def test_predict_shows_what_else_was_asked_for(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    pictures = [tmp_path / folder / "1.jpg" for folder in ("a", "b")]
    for picture in pictures:
        picture.parent.mkdir()
        picture.write_bytes(b"1")
    asked = {
        "label": "cat",
        "score": 0.9,
        "top": [{"label": "cat", "score": 0.9}],
        "in_distribution": True,
        "prediction_set": ["cat", "dog"],
        "neighbors": [{"id": "img_1", "path": "cat/7.jpg", "label": "cat", "similarity": 0.981, "thumbnail": None}],
        "adaptation": {
            "method": "neighbors", "parameters": "head", "steps": 5, "learning_rate": 0.1, "share": 0.5,
            "before": {"label": "dog", "score": 0.6}, "seconds": 0.2,
        },
        "explanation": "data:image/png;base64,UE5H",
        "id": "prd_1",
    }  # fmt: skip
    answer = {
        "model": "mdl_1",
        "coverage": {"asked": 0.99, "images": 40, "largest": 0.976},
        "predictions": [{"filename": "1.jpg", **asked}, {"filename": "1.jpg", **asked, "id": "prd_2"}],
    }
    server.answers["POST", "/predict"] = (200, answer)
    maps = tmp_path / "maps" / "today"
    options = f"--coverage 0.99 --neighbors 1 --adapt neighbors --store --explain {maps}".split()

    result = graft("predict", *map(str, pictures), *options)

    assert result.exit_code == 0
    assert result.output.splitlines()[3:10] == [
        "",
        str(pictures[0]),
        "  in 0.99 of cases one of: cat, dog",
        "  most similar: cat 0.98 (cat/7.jpg)",
        "  before tuning: dog 60.0%",
        f"  heat map: {maps / '1.heat.png'}",
        "  kept: `graft feedback prd_1 LABEL` says what it is",
    ]
    assert f"  heat map: {maps / '1-2.heat.png'}" in result.output.splitlines()
    assert result.errors == "40 validation pictures promise 0.976 at most; beyond it every class is in.\n"
    assert {path.name: path.read_bytes() for path in maps.iterdir()} == {"1.heat.png": b"PNG", "1-2.heat.png": b"PNG"}
    assert server.requests[0].path == (
        "/predict?top_k=3&coverage=0.99&neighbors=1&explain=true&adapt=neighbors&store=true"
    )
    assert json.loads(graft("predict", *map(str, pictures), *options, "--json").output) == answer


@pytest.mark.parametrize(
    ("label", "said"), [("cat", "as the model had said"), ("dog", "the model had said cat")], ids=["right", "wrong"]
)
def test_feedback_says_what_the_model_had_said(server: ScriptedServer, graft: Graft, label: str, said: str) -> None:
    kept = {
        "id": "prd_1",
        "object": "prediction",
        "model": "mdl_1",
        "label": "cat",
        "score": 0.9,
        "top": [{"label": "cat", "score": 0.9}],
        "picture": "/v1/predictions/prd_1/picture",
        "size_bytes": 1,
        "feedback": {"label": label, "tasks": None, "created_at": "2026-11-01T10:00:00Z"},
        "created_at": "2026-11-01T10:00:00Z",
    }
    server.answers["POST", "/v1/predictions/prd_1/feedback"] = (200, kept)

    result = graft("feedback", "prd_1", label, "--new-class")

    assert (result.exit_code, result.output) == (0, f"Kept: prd_1 is {label}; {said}.\n")
    assert server.requests[0].json() == {"label": label, "task": None, "new_class": True}


def predicted(*names: str) -> dict[str, Any]:
    top = [{"label": "cat", "score": 1.0}]
    entries = [{"filename": name, "label": "cat", "score": 1.0, "top": top} for name in names]
    return {"model": "mdl_1", "predictions": entries}


def test_predict_takes_folders_for_the_pictures_in_them(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    for name in ("b.jpg", "a/1.jpg", ".hidden/2.jpg"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(b"1")
    server.answers["POST", "/predict"] = (200, predicted("1.jpg", "b.jpg"))

    result = graft("predict", str(tmp_path / "pets"))

    shown = [line.split()[0] for line in result.output.splitlines()[1:]]
    assert (result.exit_code, shown) == (0, [str(tmp_path / "pets" / name) for name in ("a/1.jpg", "b.jpg")])


def test_predict_leaves_out_of_a_folder_what_by_its_name_is_no_picture(
    server: ScriptedServer, graft: Graft, tmp_path: Path
) -> None:
    for name in ("a.PNG", "b.jpg", "scan", "labels.csv", "notes.txt"):
        (tmp_path / name).write_bytes(b"1")
    server.answers["POST", "/predict"] = (200, predicted("a.PNG", "b.jpg", "scan"))

    result = graft("predict", str(tmp_path))

    shown = [line.split()[0] for line in result.output.splitlines()[1:]]
    assert (result.exit_code, shown) == (0, [str(tmp_path / name) for name in ("a.PNG", "b.jpg", "scan")])
    assert result.errors == f"Left out, as no pictures: {tmp_path / 'labels.csv'}, {tmp_path / 'notes.txt'}.\n"


def test_predict_refuses_a_folder_without_pictures(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("1")

    result = graft("predict", str(tmp_path))

    assert result.exit_code == 2
    assert result.errors.endswith(f"There are no pictures in {tmp_path}.\n")
    assert server.requests == []


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_names_are_printed_as_they_are(
    server: ScriptedServer, graft: Graft, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "a:dog:[b].png").write_bytes(b"1")
    server.answers["POST", "/predict"] = (200, predicted("a:dog:[b].png"))

    result = graft("predict", str(tmp_path / "a:dog:[b].png"), *arguments)

    assert "a:dog:[b].png" in result.output


def test_names_that_are_not_utf_8_are_printed_as_they_are(server: ScriptedServer, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/k\xe4tzchen.png"
    Path(os.fsdecode(name)).write_bytes(b"1")
    server.answers["POST", "/predict"] = (200, predicted("kätzchen.png"))

    # As most people's terminals are, unlike those of the locale C.
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", "app.cli", "predict", name]
    ran = subprocess.run(command, env=environment, capture_output=True, check=False)

    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.splitlines()[1].split() == [name, b"cat", b"100.0%"]


def test_a_failure_is_told_with_names_as_they_are(graft: Graft) -> None:
    assert graft("predict", "a:dog:[b].png").errors == "There is no file a:dog:[b].png.\n"


def test_train_takes_an_archive_whose_name_begins_like_an_id(
    training: ScriptedServer, graft: Graft, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(archive.parent)
    archive.rename("ds_photos.zip")

    result = graft("train", "ds_photos.zip")

    assert result.exit_code == 0, result.errors
    [uploaded] = training.sent("PUT", "/v1/datasets")
    assert (uploaded.path, uploaded.body) == ("/v1/datasets?name=ds_photos", b"an archive")


def test_predict_takes_a_picture_from_standard_input(
    server: ScriptedServer, graft: Graft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a picture")))
    server.answers["POST", "/predict"] = (200, predicted("standard input"))

    result = graft("predict", "-", "--json")

    assert json.loads(result.output) == predicted("standard input")
    assert b"a picture" in server.requests[0].body


def test_train_detached_prints_the_job_and_ends(training: ScriptedServer, graft: Graft, archive: Path) -> None:
    result = graft("train", str(archive), "--detach")

    assert (result.exit_code, result.output) == (0, "job_1\n")
    assert training.sent("GET", "/v1/jobs/job_1/events") == []


def test_a_file_that_cannot_be_written_is_named(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    server.answers["GET", "/v1/models/mdl_1/export"] = (200, b"a file")

    result = graft("models", "export", "mdl_1", "-o", str(tmp_path / ("a" * 255)))

    assert result.exit_code == 1
    assert result.errors == f"{tmp_path / ('a' * 255)}.part: File name too long.\n"


def test_without_a_server_the_advice_is_graft_up(graft: Graft) -> None:
    result = graft("jobs", "list", "--url", "http://127.0.0.1:1")

    assert result.exit_code == 3
    assert result.errors.startswith("No Graft server answers at http://127.0.0.1:1 (")
    assert result.errors.endswith("). Start one with `graft up`, or name another with --url or GRAFT_URL.\n")


def test_a_missing_key_is_explained(server: ScriptedServer, graft: Graft) -> None:
    server.answers["GET", "/v1/models"] = (401, {"detail": "Send your API key."})

    result = graft("models", "list")

    assert result.exit_code == 1
    assert result.errors == (
        "Send your API key.\n"
        "Set GRAFT_API_KEY to a key of this server; there, `graft keys create --scope train` makes one.\n"
    )


@pytest.mark.parametrize("place", ["in front", "behind", "both"])
def test_server_and_key_are_named_in_front_of_the_command_or_behind_it(
    server: ScriptedServer, graft: Graft, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("GRAFT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("GRAFT_API_KEY", "ft_of_the_environment")
    server.answers["GET", "/v1/models"] = (200, {"data": []})
    named, wrong = ["--url", server.url, "--api-key", "ft_1"], ["--url", "http://127.0.0.1:2", "--api-key", "ft_2"]
    in_front, behind = {"in front": (named, []), "behind": ([], named), "both": (wrong, named)}[place]

    assert graft(*in_front, "models", "list", *behind).exit_code == 0
    assert server.requests[0].headers["Authorization"] == "Bearer ft_1"


def test_the_key_comes_from_the_environment(
    server: ScriptedServer, graft: Graft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "ft_1")
    server.answers["GET", "/v1/models"] = (200, {"data": []})

    result = graft("models", "list")

    assert result.output == "There are no models; `graft train ARCHIVE_OR_FOLDER` makes one.\n"
    assert server.requests[0].headers["Authorization"] == "Bearer ft_1"


@pytest.mark.parametrize(
    ("arguments", "entry", "row"),
    [
        (
            ["jobs", "list"],
            job("running", metrics={"val_accuracy": 0.9}),
            ["job_1", "running", "fine_tuning", "resnet50", "50.0%", "90.0%", "2026-11-01", "10:00Z"],
        ),
        (["datasets", "list"], DATASET, ["ds_1", "flowers", "ready", "300", "2", "2026-11-01", "10:00Z"]),
        (
            ["models", "list"],
            MODEL,
            ["mdl_1", "default", "fine_tuning", "resnet50", "2", "95.0%", "2026-11-01", "10:00Z"],
        ),
    ],
)
def test_lists_are_tables(
    server: ScriptedServer, graft: Graft, arguments: list[str], entry: dict[str, Any], row: list[str]
) -> None:
    server.answers["GET", f"/v1/{arguments[0]}"] = (200, {"data": [entry]})

    result = graft(*arguments, "--limit", "5")

    assert result.output.splitlines()[1].split() == row
    assert server.requests[0].path == f"/v1/{arguments[0]}?limit=5"


@pytest.mark.parametrize(
    ("arguments", "request_line", "answer", "printed"),
    [
        (["jobs", "cancel", "job_1"], ("POST", "/v1/jobs/job_1/cancel"), job("cancelled"), "Job job_1 is cancelled."),
        (
            ["jobs", "cancel", "job_1"],
            ("POST", "/v1/jobs/job_1/cancel"),
            job("running"),
            "Job job_1 is being cancelled.",
        ),
        (
            ["jobs", "stop", "job_1"],
            ("POST", "/v1/jobs/job_1/stop"),
            job("running"),
            "Job job_1 ends after this step and registers its best epoch.",
        ),
        (
            ["datasets", "delete", "ds_1"],
            ("DELETE", "/v1/datasets/ds_1"),
            {"id": "ds_1", "object": "dataset", "deleted": True},
            "Deleted ds_1.",
        ),
        (
            ["models", "delete", "mdl_1"],
            ("DELETE", "/v1/models/mdl_1"),
            {"id": "mdl_1", "object": "model", "deleted": True},
            "Deleted mdl_1.",
        ),
        (["models", "promote", "mdl_1"], ("PUT", "/v1/aliases/default"), ALIAS, "default is now mdl_1."),
        (
            ["models", "rollback"],
            ("POST", "/v1/aliases/default/rollback"),
            ALIAS,
            "default is mdl_1 again.",
        ),
        (
            ["models", "rollback", "--alias", "stable"],
            ("POST", "/v1/aliases/stable/rollback"),
            ALIAS,
            "stable is mdl_1 again.",
        ),
    ],
)
def test_commands_that_change_something_say_what(
    server: ScriptedServer,
    graft: Graft,
    arguments: list[str],
    request_line: tuple[str, str],
    answer: dict[str, Any],
    printed: str,
) -> None:
    server.answers[request_line] = (200, answer)

    result = graft(*arguments)

    assert (result.exit_code, result.output) == (0, f"{printed}\n")
    assert len(server.sent(*request_line)) == 1


def test_train_on_pictures_without_labels_ends_with_a_backbone_and_how_to_start_from_it(
    training: ScriptedServer, graft: Graft, archive: Path
) -> None:
    training.answers["GET", "/v1/datasets/ds_1"] = (200, DATASET | {"classes": [], "warnings": [], "num_rejected": 0})
    epoch = EPOCH | {"train_accuracy": None, "val_accuracy": None, "figures": {"feature_std": 0.5}}
    training.answers["GET", "/v1/jobs/job_1/events"] = (200, stream(("epoch", epoch)))
    metrics = {"feature_std": 0.52, "knn_accuracy": None, "warning": "The features have collapsed."}
    made = MODEL | {"classes": [], "aliases": [], "method": "self_supervised", "metrics": metrics}
    training.answers["GET", "/v1/models/mdl_1"] = (200, made)

    result = graft("train", str(archive), "--unlabelled", "--method", "self_supervised")

    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "Model mdl_1: self_supervised on resnet50",
        "  spread of the features  0.52 (1 is even, 0 a collapse)",
        "  graft train ARCHIVE_OR_FOLDER --backbone mdl_1",
    ]
    assert result.errors.splitlines() == [
        "Data set ds_1: 300 pictures without labels.",
        "Job job_1",
        "epoch   1   train loss 0.5000   validation loss 0.4000   feature std 0.500",
        "Warning: The features have collapsed.",
    ]
    [upload] = training.sent("PUT", "/v1/datasets")
    assert upload.path == "/v1/datasets?name=flowers&kind=unlabelled"


def test_extend_sends_the_pictures_of_the_new_class(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    pictures = [tmp_path / "1.jpg", tmp_path / "2.jpg"]
    for picture in pictures:
        picture.write_bytes(picture.name.encode())
    server.answers["POST", "/v1/models/mdl_1/classes"] = (201, MODEL | {"id": "mdl_2", "aliases": []})

    result = graft("models", "extend", "mdl_1", "wasp", *map(str, pictures))

    assert result.exit_code == 0
    assert result.output.splitlines()[0] == "Model mdl_2: fine_tuning on resnet50"
    [sent] = server.sent("POST", "/v1/models/mdl_1/classes")
    assert all(part in sent.body for part in (b'name="name"\r\n\r\nwasp', b"1.jpg", b"2.jpg"))


def test_personalise_sends_each_picture_behind_the_name_of_its_folder(
    server: ScriptedServer, graft: Graft, tmp_path: Path
) -> None:
    for name in ("rose/1.jpg", "rose/2.jpg", "daisy/3.jpg", "daisy/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    personal = {"images": 3, "accuracy_before": 1 / 3, "accuracy": 1.0, "accuracy_left_out": 2 / 3}
    made = MODEL | {"id": "mdl_2", "aliases": [], "metrics": MODEL["metrics"] | {"personal": personal}}
    server.answers["POST", "/v1/models/mdl_1/personalise"] = (201, made)

    result = graft("models", "personalise", "mdl_1", str(tmp_path))

    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "Model mdl_2: fine_tuning on resnet50"
    said = "Of your 3 pictures it was right about 33%, and is about 100%; about 67% of those left out in turn."
    assert lines[-1].strip() == said
    [sent] = server.sent("POST", "/v1/models/mdl_1/personalise")
    expected = [b"daisy\r\n", b"3.jpg", b"rose\r\n", b"1.jpg", b"2.jpg"]
    parts = [sent.body.index(part) for part in expected]
    assert parts == sorted(parts)
    assert b".hidden" not in sent.body


def test_personalise_wants_folders_of_pictures(graft: Graft, tmp_path: Path) -> None:
    result = graft("models", "personalise", "mdl_1", str(tmp_path))

    assert result.exit_code == 2
    assert "no folders with pictures" in " ".join(result.errors.replace("│", " ").split())


def test_personalise_sends_what_a_table_says_of_each_task(server: ScriptedServer, graft: Graft, tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    table = "\ufefffilename,label:colour,label:light\n2.jpg,blue,dark\n1.jpg,blue,\n"
    (tmp_path / "labels.csv").write_text(table, "utf-8")
    personal = {"images": 2, "accuracy_before": 0.0, "accuracy": 1.0, "accuracy_left_out": None}
    made = MODEL | {"id": "mdl_2", "aliases": [], "metrics": MODEL["metrics"] | {"personal": personal}}
    server.answers["POST", "/v1/models/mdl_1/personalise"] = (201, made)

    result = graft("models", "personalise", "mdl_1", str(tmp_path))

    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].strip() == "Of your 2 pictures it was right about 0%, and is about 100%."
    [sent] = server.sent("POST", "/v1/models/mdl_1/personalise")
    expected = [
        b"label:colour",
        b"blue\r\n",
        b"label:light",
        b"dark\r\n",
        b'"2.jpg"',
        b'"label:light"\r\n\r\n\r\n',
        b'"1.jpg"',
    ]
    parts = [sent.body.rindex(part) if part.startswith(b'"label') else sent.body.index(part) for part in expected]
    assert parts == sorted(parts)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ("filename,label\n", "has no rows"),
        ("filename,label\n9.jpg,rose\n", "no picture beside it"),
        ("label\nrose\n", "no picture beside it"),
        ("filename,label\n1.jpg\n", "does not say what 1.jpg is"),
        ("filename,class\n1.jpg,rose\n", "does not say what 1.jpg is"),
        ('filename,label\n1.jpg,"rose\n', "cannot be read"),
    ],
)
def test_personalise_says_what_is_wrong_with_a_table(graft: Graft, tmp_path: Path, table: str, why: str) -> None:
    (tmp_path / "1.jpg").write_bytes(b"1")
    (tmp_path / "labels.csv").write_text(table)

    result = graft("models", "personalise", "mdl_1", str(tmp_path))

    assert result.exit_code == 2
    assert why in " ".join(result.errors.replace("│", " ").split())


@pytest.mark.parametrize(("method", "is_told"), [("feature_extraction", True), ("full_fine_tuning", False)])
def test_the_forecast_is_told_of_the_models_that_it_is_made_with(
    training: ScriptedServer, graft: Graft, method: str, is_told: bool
) -> None:
    metrics = MODEL["metrics"] | {"forecast": {"sentence": "Twice as many would bring 0.97."}}
    training.answers["GET", "/v1/models/mdl_1"] = (200, MODEL | {"method": method, "metrics": metrics})

    assert ("  Twice as many would bring 0.97." in graft("train", "ds_1").output.splitlines()) == is_told


BATCH = {
    "id": "batch_1",
    "object": "batch",
    "top_k": 5,
    "size_bytes": 10,
    "sha256": "0",
    "attempt": 1,
    "cancel_requested": False,
    "status": "queued",
    "model": "mdl_1",
    "num_files": 3,
    "num_images": 0,
    "num_rejected": 0,
    "progress": None,
    "results": None,
    "error": None,
    "created_at": "2026-11-01T10:00:00Z",
}
DONE = BATCH | {
    "status": "succeeded",
    "num_images": 2,
    "num_rejected": 1,
    "progress": {"stage": "done", "fraction": 1.0},
    "results": {name: f"/v1/batches/batch_1/results?format={name}" for name in ("jsonl", "csv")},
}


@pytest.mark.parametrize(("output", "format"), [("told.csv", "csv"), ("told.jsonl", "jsonl"), ("told", "csv")])
def test_batch_goes_from_an_archive_to_a_file(
    server: ScriptedServer, graft: Graft, archive: Path, tmp_path: Path, output: str, format: str
) -> None:
    server.answers = {
        ("PUT", "/v1/batches"): (201, BATCH),
        ("GET", "/v1/batches/batch_1"): (200, DONE),
        ("GET", "/v1/batches/batch_1/results"): (200, b"path,label\r\n"),
    }

    result = graft("batches", "run", str(archive), "-o", str(tmp_path / output), "--model", "canary")

    assert (result.exit_code, result.errors) == (0, "Batch batch_1\n")
    assert result.output == f"{tmp_path / output}: 2 pictures; files that are no readable pictures: 1.\n"
    assert (tmp_path / output).read_bytes() == b"path,label\r\n"
    [sent] = server.sent("PUT", "/v1/batches")
    assert (sent.path, sent.body) == ("/v1/batches?model=canary", b"an archive")
    [fetched] = server.sent("GET", "/v1/batches/batch_1/results")
    assert fetched.path.endswith(f"?format={format}")
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        ({"status": "failed", "error": {"detail": "Out of memory."}}, "Batch batch_1 failed: Out of memory.\n"),
        ({"status": "cancelled"}, "Batch batch_1 is cancelled.\n"),
    ],
)
def test_batch_without_results_is_a_failure(
    server: ScriptedServer, graft: Graft, tmp_path: Path, ended: dict[str, Any], reason: str
) -> None:
    server.answers["GET", "/v1/batches/batch_1"] = (200, BATCH | ended)

    result = graft("batches", "results", "batch_1", "-o", str(tmp_path / "told.csv"))

    assert (result.exit_code, result.errors) == (1, reason)
    assert not (tmp_path / "told.csv").exists()


def test_batch_with_no_place_for_its_results_is_not_sent(server: ScriptedServer, graft: Graft, archive: Path) -> None:
    result = graft("batches", "run", str(archive), "-o", "nowhere/told.csv")

    assert (result.exit_code, result.errors) == (2, "nowhere/told.csv is no place for a file.\n")
    assert server.requests == []


def test_batches_are_listed_cancelled_and_deleted(server: ScriptedServer, graft: Graft) -> None:
    server.answers = {
        ("GET", "/v1/batches"): (200, {"data": [DONE]}),
        ("POST", "/v1/batches/batch_1/cancel"): (200, BATCH | {"status": "cancelled"}),
        ("DELETE", "/v1/batches/batch_1"): (200, {"id": "batch_1", "object": "batch", "deleted": True}),
    }

    assert graft("batches", "list").output.splitlines()[1].split() == [
        *("batch_1", "succeeded", "mdl_1", "3", "100.0%", "2026-11-01", "10:00Z")
    ]
    assert graft("batches", "cancel", "batch_1").output == "Batch batch_1 is cancelled.\n"
    assert graft("batches", "delete", "batch_1").output == "Deleted batch_1.\n"


@pytest.mark.parametrize("group", ["jobs", "datasets", "models", "batches"])
def test_the_overview_of_a_group_names_each_of_its_commands(graft: Graft, group: str) -> None:
    shown = graft(group, "--help").output
    overview = re.search(r": ([a-z,\s]+)\.", shown)
    assert overview is not None

    names = re.findall(r"^[│ ]+([a-z]+)  ", shown, flags=re.MULTILINE)
    assert sorted(re.findall("[a-z]+", overview[1])) == sorted(names)
