"""Every block of code in docs/ runs, in its page's order, against a real server; one that cannot says why in its title.

What a reader fills in is filled in: `ds_…`, `job_…` and so on with the last id of that kind that an answer gave. What
the pages tell their reader to have is there: flowers.zip, daisy.jpg and so on, and a model of them as the default. (The
README's commands run in test_readme.py.)
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import builders
import httpx
import pytest
from markdown_it import MarkdownIt
from running import environment_for, graft_up

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))

# In its title, which the built page shows above the block.
REASON = re.compile(r'title="Not run by the tests(?: here)?: [^"]{10,}"')
SHOWN = frozenset({"text", "json"})  # what is not code: drawings, folders, answers
RUN = frozenset({"bash", "python"})
# What other tests run, with what they check of it.
ELSEWHERE = {
    ("export.md", "python"): "tests/api/test_model_files.py",
    ("client.md", "python"): "tests/client/test_client_guide.py",
    ("protocols.md", "python"): "tests/processes/test_openai_client.py",
    ("protocols.md", "bash"): "tests/processes/test_openai_client.py",
}
# Pages about the server's own database: they get one of their own, so that its keys lock nobody else out.
OF_OPERATORS = frozenset({"operations.md"})
MARKS = dict.fromkeys(("tutorial.md", "export.md", "operations.md", "adaptation.md"), pytest.mark.slow)
PATIENCE_SECONDS = 240  # for one command
CLASSES = ("daisy", "rose")

ID = re.compile(r"(ds|job|mdl|batch|prd)_[0-9a-f]{30}")

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="docs/ needs curl; installed by .ci/run")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    has_reason: bool
    code: str

    @property
    def is_run_here(self) -> bool:
        return self.language in RUN and not self.has_reason and (self.page, self.language) not in ELSEWHERE


def blocks_of(page: Path) -> list[Block]:
    """Fenced and indented ones, as Markdown understands them."""
    name = str(page.relative_to(DOCS))
    return [
        Block(
            page=name,
            line=(token.map or [0])[0] + 1,
            language=token.info.split(" ")[0],
            has_reason=bool(REASON.search(token.info)),
            code=token.content,
        )
        for token in MarkdownIt("commonmark").parse(page.read_text())
        if token.type in ("fence", "code_block")
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
TO_RUN = sorted({block.page for block in BLOCKS if block.is_run_here})


@dataclass
class Reader:
    """Somebody who does what a page says, in a folder with what it speaks of."""

    folder: Path
    url: str
    ids: dict[str, str]  # by kind, such as "ds": the last that was seen

    def do(self, block: Block, environment: dict[str, str]) -> None:
        if block.language == "python":
            self._run([sys.executable, "-c", self._filled_in(block.code)], block, environment)
            return
        shares_variables = re.search(r"^[A-Z]+=", block.code, re.MULTILINE)
        for command in [f"set -e\n{block.code}"] if shares_variables else commands_of(block.code):
            answer = self._run(["bash", "-c", self._filled_in(command)], block, environment)
            self._read(answer, block)

    def _run(self, command: list[str], block: Block, environment: dict[str, str]) -> str:
        ran = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert ran.returncode == 0, f"{block.page}:{block.line}: {command[-1]}\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def _filled_in(self, code: str) -> str:
        for kind, known in self.ids.items():
            code = code.replace(f"{kind}_…", known)
        assert "_…" not in code, f"nothing before it gives an id for {code}"
        return code.replace("localhost:8000", self.url.removeprefix("http://"))

    def _read(self, printed: str, block: Block) -> None:
        try:
            answer = json.loads(printed)
        except ValueError:
            return  # a table, a card
        assert not (isinstance(answer, dict) and answer.get("error")), f"{block.page}:{block.line}\n{printed}"
        self.ids |= {found[1]: found[0] for found in ID.finditer(printed) if is_of_the_answer(answer, found[0])}
        self._wait_for(answer)

    def _wait_for(self, answer: Any) -> None:
        """Asks again while something is under way, as the tutorial tells its reader to."""
        collections = {"dataset": "datasets", "job": "jobs", "batch": "batches"}
        noun = answer.get("object") if isinstance(answer, dict) else None
        while noun in collections and answer["status"] in ("processing", "queued", "running"):
            answer = httpx.get(f"{self.url}/v1/{collections[noun]}/{answer['id']}?wait=60", timeout=90).json()
        if noun in collections and "id" in answer:
            assert answer["status"] in ("ready", "succeeded"), answer


def commands_of(code: str) -> Iterator[str]:
    """One after the other, each with the lines that it goes on in: behind a backslash, or within quotation marks."""
    command = ""
    for line in code.splitlines():
        command += line
        try:
            is_whole = bool(shlex.split(command, comments=True)) and not command.endswith("\\")
        except ValueError:
            is_whole = False
        if is_whole:
            yield command
        command = "" if is_whole or not command else f"{command}\n"
    assert not command.strip(), f"no end: {command}"


def is_of_the_answer(answer: Any, found: str) -> bool:
    """Whether the id is that of what was answered, or of the predictions in it."""
    if not isinstance(answer, dict):
        return False
    return found == answer.get("id") or found in [each.get("id") for each in answer.get("predictions", [])]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "graft").symlink_to(Path(sys.executable).parent / "graft")
    python = folder / ".venv" / "bin" / "python"  # no link: it would look for its packages here
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    own = builders.class_folders(4, classes=CLASSES, first_seed=50)
    for name, encoded in own.items():
        (folder / "my-pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "my-pictures" / name).write_bytes(encoded)
    for name, shown in (("daisy", "daisy/0"), ("1", "daisy/1"), ("2", "daisy/2"), ("3", "rose/0")):
        (folder / f"{name}.jpg").write_bytes(own[f"{shown}.jpg"])
    (folder / "flowers.zip").write_bytes(builders.zip_of(builders.class_folders(12, classes=CLASSES)))
    (folder / "photos.zip").write_bytes(builders.zip_of(own))
    with graft_up(folder) as graft, httpx.Client(base_url=graft.url, timeout=90) as http:
        yield Reader(folder, graft.url, train_default(http, folder))


def train_default(http: httpx.Client, folder: Path) -> dict[str, str]:
    """The ids of the data set, the job and its model."""
    flowers = (folder / "flowers.zip").read_bytes()
    dataset = http.put("/v1/datasets?name=flowers&wait=60", content=flowers).json()
    assert dataset["status"] == "ready", dataset
    request = {"dataset": dataset["id"], "method": "feature_extraction", "backbone": "graft_small"}
    job = http.post("/v1/jobs?wait=60", json=request).json()
    assert job["status"] == "succeeded", job
    return {"ds": dataset["id"], "job": job["id"], "mdl": job["model"]}


@needs_curl
@pytest.mark.timeout(1200)  # the tutorial trains for a minute on two idle cores
@pytest.mark.parametrize("page", [pytest.param(page, marks=MARKS.get(page, ())) for page in TO_RUN])
def test_the_code_of_the_page_runs(page: str, reader: Reader, tmp_path: Path) -> None:
    path = f"{reader.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    data = reader.folder / "data"
    if page in OF_OPERATORS:
        data = tmp_path / "data"
        subprocess.run([sys.executable, "-m", "app.cli", "migrate"], env=environment_for(data), check=True)
    environment = environment_for(data) | {"GRAFT_URL": reader.url, "PATH": path}
    reader = Reader(reader.folder, reader.url, dict(reader.ids))  # what one page made is not another's
    for block in BLOCKS:
        if block.page == page and block.is_run_here:
            reader.do(block, environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    silent = [
        f"line {block.line}: {block.language or 'no language'}"
        for block in blocks_of(page)
        if not (block.language in RUN or block.language in SHOWN or (block.language and block.has_reason))
    ]

    assert silent == []


def test_what_other_tests_run_they_do_run() -> None:
    for (page, language), test in ELSEWHERE.items():
        source = (REPOSITORY / test).read_text()
        assert page in source
        assert language in source


def test_a_block_that_fails_is_noticed(reader: Reader) -> None:
    environment = environment_for(reader.folder / "data")

    for code in ("false", "curl -s localhost:8000/v1/jobs/job_none", "curl -s localhost:8000/v1/batches/batch_…"):
        with pytest.raises(AssertionError):
            Reader(reader.folder, reader.url, {}).do(Block("a page", 1, "bash", False, code), environment)
