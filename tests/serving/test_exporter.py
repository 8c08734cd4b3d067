"""Exported files are made once, one at a time, and are gone with their model. The program is a small one of ours."""

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import builders
import psutil
import pytest

from app.errors import ExportUnavailable, ModelUnavailable, NotFound, Overloaded
from app.serving import exporter
from app.serving.exporter import Contents, Exporter, exports_of
from app.storage import LocalStorage

# Notes its runs in a file, waits for another file where the test wants so, and makes a file of a few bytes.
PROGRAM = """
import json, os, pathlib, sys, time
order = json.loads(sys.stdin.readline())
work = pathlib.Path(sys.argv[1])
with (work / "runs").open("a") as runs:
    runs.write(f"{os.getpid()} {order['file_format']} {order['pictures'] is not None}\\n")
while (work / "hold").exists():
    time.sleep(0.01)
report = {"sha256": "0" * 64, "size_bytes": 4, "verification": {"pictures": 3}}
if (work / "report").exists():
    report = json.loads((work / "report").read_text())
if (work / "crash").exists():
    sys.exit("it broke")
pathlib.Path(order["target"]).write_text("file")
pathlib.Path(order["report"]).write_text(json.dumps(report))
"""

WAIT_SECONDS = 30.0


@dataclass
class Workshop:
    """An exporter on a storage of its own, and what its program was seen doing."""

    folder: Path
    storage: LocalStorage
    registered: set[str] = field(default_factory=lambda: {"mdl_1", "mdl_2"})

    @property
    def exporter(self) -> Exporter:
        program = (sys.executable, "-c", PROGRAM, str(self.folder))
        return Exporter(
            self.storage, is_wanted=lambda key: key.removeprefix("exports/") in self.registered, program=program
        )

    @property
    def runs(self) -> list[list[str]]:
        path = self.folder / "runs"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []

    def mark(self, name: str, content: str = "") -> Path:
        path = self.folder / name
        path.write_text(content)
        return path


@pytest.fixture
def workshop(tmp_path: Path) -> Iterator[Workshop]:
    found = Workshop(tmp_path, LocalStorage(tmp_path / "data"))
    yield found
    assert not any((tmp_path / "data" / "staging").iterdir()), "nothing is left in staging"
    assert not any((tmp_path / "data" / "announced").iterdir()), "nothing is left announced"


def contents() -> Contents:
    return Contents(facts={"card": "# A card"}, pictures=[builders.picture(1)])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_file_is_made_once_and_found_from_then_on(workshop: Workshop) -> None:
    async def story() -> None:
        made = await workshop.exporter.make("mdl_1", "onnx", contents)

        assert made.path.read_text() == "file"
        assert (made.sha256, made.size_bytes, made.verification) == ("0" * 64, 4, {"pictures": 3})
        assert workshop.exporter.find("mdl_1", "onnx") == made
        assert workshop.exporter.find("mdl_1", "pt2") is None
        assert sorted(path.name for path in made.path.parent.iterdir()) == ["model.onnx", "report.json"]

    asyncio.run(story())
    assert [run[1:] for run in workshop.runs] == [["onnx", "True"]]


def test_many_who_ask_at_once_get_one_file(workshop: Workshop) -> None:
    async def story() -> None:
        made = workshop.exporter
        asked = [made.make("mdl_1", "onnx", contents) for _ in range(5)]

        found = await asyncio.gather(*asked)

        assert len({exported.path for exported in found}) == 1

    asyncio.run(story())
    assert len(workshop.runs) == 1


def test_different_files_are_made_one_after_the_other(workshop: Workshop) -> None:
    hold = workshop.mark("hold")

    async def story() -> None:
        made = workshop.exporter
        tasks = [asyncio.create_task(made.make(model, "onnx", contents)) for model in ("mdl_1", "mdl_2")]
        await until(lambda: workshop.runs)
        await asyncio.sleep(0.2)
        assert len(workshop.runs) == 1
        hold.unlink()
        await asyncio.gather(*tasks)

    asyncio.run(story())
    assert len(workshop.runs) == 2


def test_whoever_leaves_takes_the_file_from_nobody(workshop: Workshop) -> None:
    hold = workshop.mark("hold")

    async def story() -> None:
        made = workshop.exporter
        leaving, staying = (asyncio.create_task(made.make("mdl_1", "onnx", contents)) for _ in range(2))
        await until(lambda: workshop.runs)
        leaving.cancel()
        hold.unlink()
        assert (await staying).path.exists()

    asyncio.run(story())
    assert len(workshop.runs) == 1


def test_too_many_files_at_once_are_refused(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "MOST_WAITING", 1)
    hold = workshop.mark("hold")

    async def story() -> None:
        made = workshop.exporter
        first = asyncio.create_task(made.make("mdl_1", "onnx", contents))
        await until(lambda: workshop.runs)
        with pytest.raises(Overloaded) as refused:
            await made.make("mdl_2", "onnx", contents)
        assert refused.value.retry_after_seconds == 30
        hold.unlink()
        await first
        await made.make("mdl_2", "onnx", contents)

    asyncio.run(story())


def test_a_model_deleted_meanwhile_leaves_no_file(workshop: Workshop) -> None:
    hold = workshop.mark("hold")

    async def story() -> None:
        task = asyncio.create_task(workshop.exporter.make("mdl_1", "onnx", contents))
        await until(lambda: workshop.runs)
        workshop.registered.remove("mdl_1")
        hold.unlink()
        with pytest.raises(NotFound, match="deleted while it was being exported"):
            await task

    asyncio.run(story())
    assert not workshop.storage.exists(exports_of("mdl_1"))


def test_a_program_that_breaks_is_told_and_tried_again_the_next_time(workshop: Workshop) -> None:
    crash = workshop.mark("crash")

    async def story() -> None:
        made = workshop.exporter
        with pytest.raises(ExportUnavailable, match="the server's log says why"):
            await made.make("mdl_1", "onnx", contents)
        crash.unlink()
        assert (await made.make("mdl_1", "onnx", contents)).path.exists()

    asyncio.run(story())
    assert len(workshop.runs) == 2


@pytest.mark.parametrize(
    ("code", "error"), [("export-unavailable", ExportUnavailable), ("model-unavailable", ModelUnavailable)]
)
def test_what_the_program_refuses_is_said_in_its_words(
    workshop: Workshop, code: str, error: type[ExportUnavailable] | type[ModelUnavailable]
) -> None:
    workshop.mark("report", json.dumps({"code": code, "detail": "It is off by 0.3."}))

    with pytest.raises(error, match=r"It is off by 0\.3\."):
        asyncio.run(workshop.exporter.make("mdl_1", "onnx", contents))

    assert workshop.exporter.find("mdl_1", "onnx") is None


def test_a_program_that_takes_too_long_is_killed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LONGEST_EXPORT_SECONDS", 0.5)
    workshop.mark("hold")

    with pytest.raises(ExportUnavailable, match="took too long"):
        asyncio.run(workshop.exporter.make("mdl_1", "onnx", contents))

    assert not any(psutil.pid_exists(int(pid)) for pid, *_ in workshop.runs)


def test_stopping_ends_the_program_and_tells_those_who_wait(workshop: Workshop) -> None:
    workshop.mark("hold")

    async def story() -> None:
        made = workshop.exporter
        waiting = asyncio.create_task(made.make("mdl_1", "onnx", contents))
        await until(lambda: workshop.runs)
        made.stop()
        with pytest.raises(Overloaded, match="being stopped"):
            await waiting

    asyncio.run(story())
    assert not any(psutil.pid_exists(int(pid)) for pid, *_ in workshop.runs)


def test_a_file_that_was_cut_off_is_made_anew(workshop: Workshop) -> None:
    async def story() -> None:
        made = await workshop.exporter.make("mdl_1", "onnx", contents)
        made.path.write_text("fi")

        assert workshop.exporter.find("mdl_1", "onnx") is None
        assert (await workshop.exporter.make("mdl_1", "onnx", contents)).path.read_text() == "file"

    asyncio.run(story())
