"""The documentation as `make docs` builds it: whole, and with nothing that a browser would fetch from elsewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# What a browser fetches by itself, by the tag and attribute that name it; a link that a person may follow is none.
FETCHED = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
}


class Fetched(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "link" and dict(attributes).get("rel") in ("canonical", "next", "prev"):
            return
        self.addresses += [value for name, value in attributes if (tag, name) in FETCHED and value]


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    sources = {
        path.relative_to(REPOSITORY / "docs").with_suffix(".html") for path in (REPOSITORY / "docs").rglob("*.md")
    }
    pages = {path.relative_to(site) for path in site.rglob("*.html")}

    assert pages == sources | {Path("reference.html"), Path("404.html")}


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    fetched = {}
    for page in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(page.read_text())
        fetched[page.name] = [each for each in parser.addresses if re.match(r"(https?:)?//", each)]
    sheets = "".join(sheet.read_text() for sheet in site.rglob("*.css"))
    styles = re.findall(r"(?:url\(|@import )[\"']?(https?:[^)\"']*)", sheets)

    assert ({name: addresses for name, addresses in fetched.items() if addresses}, styles) == ({}, [])


def test_formulas_are_understood_and_need_no_script(site: Path) -> None:
    page = (site / "methods.html").read_text()
    formulas = re.findall(r"<math.*?</math>", page, flags=re.DOTALL)

    assert len(formulas) > 20
    assert "arithmatex" not in page
    assert [formula for formula in formulas if "\\" in formula] == []


def test_the_reference_has_every_request(site: Path) -> None:
    page = (site / "reference.html").read_text()

    for request in ("POST /v1/jobs", "POST /predict", "GET /metrics", "POST /v2/models/{name}/infer"):
        assert f"<code>{request}</code>" in page, request
    assert "learning_rate" in page


def test_plots_are_drawn_from_the_runs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "benchmarks/plots.py", str(tmp_path)], cwd=REPOSITORY, check=True)

    for drawn in sorted(tmp_path.iterdir()):
        kept = (REPOSITORY / "docs" / "pictures" / drawn.name).read_text()
        # Where a dot or the end of a bar lies; how a version of the library writes it down may change.
        assert numbers(kept) == numbers(drawn.read_text())


def numbers(picture: str) -> list[float]:
    paths = re.findall(r' d="([^"]*)"', picture)
    return [round(float(number), 1) for path in paths for number in re.findall(r"-?\d+\.?\d*", path)]
