"""The types for TypeScript are those of today's API; without node, by the digest in their first line."""

import runpy
from pathlib import Path

TYPESCRIPT = Path(__file__).resolve().parents[2] / "clients" / "typescript"


def test_the_types_are_those_of_the_openapi_document() -> None:
    generator = runpy.run_path(str(TYPESCRIPT / "generate.py"))

    first_line, _, types = (TYPESCRIPT / "graft-api.d.ts").read_text().partition("\n")

    document = generator["document"]()
    assert first_line + "\n" == generator["header"](document), "run `make types`"
    assert all(f'    "{path}": {{\n' in types for path in document["paths"])
