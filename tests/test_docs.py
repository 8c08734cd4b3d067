"""What the documentation says about settings, imports and links is so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_import_directions

from app.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")])


def test_every_setting_is_documented_with_its_default_and_meaning() -> None:
    assert table_rows(REPOSITORY / "docs" / "settings.md") == [
        [f"`GRAFT_{name.upper()}`", shown(field.get_default(call_default_factory=True)), str(field.description)]
        for name, field in Settings.model_fields.items()
    ]


def test_the_table_of_imports_has_every_unit_that_is_held_to_it() -> None:
    units = [row[0] for row in table_rows(REPOSITORY / "docs" / "architecture.md")]
    documented = {name for unit in units for name in re.findall(r"`([a-z_.]+)`", unit)}

    foundation = test_import_directions.FOUNDATION | {"migrations"}
    assert documented >= test_import_directions.MAY_IMPORT.keys() - foundation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())

    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("folder", ["app", "worker", "tests", "benchmarks", "docs"])
def test_files_that_comments_and_pages_name_exist(folder: str) -> None:
    texts = [path for ending in ("py", "md") for path in (REPOSITORY / folder).rglob(f"*.{ending}")]
    named = {
        (str(text.relative_to(REPOSITORY)), name)
        for text in texts
        for name in re.findall(r"(?<![\w/.])(?:app|worker|tests|benchmarks)/[a-z_/]+\.py\b", text.read_text())
    }

    assert [(text, name) for text, name in sorted(named) if not (REPOSITORY / name).exists()] == []


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every table row on a page, header rows left out."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [
        row
        for row, following in zip(rows, [*rows[1:], [""]], strict=True)
        if not is_rule(row) and not is_rule(following)
    ]


def is_rule(row: list[str]) -> bool:
    return set("".join(row)) <= {"-", "|", " "} and row != [""]


def shown(default: Any) -> str:
    match default:
        case None | "":
            return ""
        case frozenset():
            return f"`{json.dumps(sorted(default))}`"
        case _:
            return f"`{default}`"
