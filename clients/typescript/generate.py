"""Writes graft-api.d.ts, the types of the API for TypeScript, from the server's OpenAPI document; needs node.

    python clients/typescript/generate.py

The first line of the file has the digest of the document, so that a test knows, without node, whether it is current.
"""

import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from app.main import create_app
from app.settings import Settings

TYPES = Path(__file__).with_name("graft-api.d.ts")
GENERATOR = "openapi-typescript@7.13.0"


def document() -> dict[str, Any]:
    """The document as a server without any settings gives it."""
    return create_app(Settings(_env_file=None)).openapi()


def header(of: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
    return f"// Types of Graft's HTTP API, by `make types`. OpenAPI document: sha256 {digest}\n"


def main() -> None:
    described = document()
    with tempfile.TemporaryDirectory() as folder:
        written, generated = Path(folder) / "openapi.json", Path(folder) / TYPES.name
        written.write_text(json.dumps(described))
        subprocess.run(["npx", "--yes", GENERATOR, str(written), "--output", str(generated)], check=True)
        TYPES.write_text(header(described) + generated.read_text())


if __name__ == "__main__":
    main()
