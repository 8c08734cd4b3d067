"""Exported files as their readers use them: by the lines that each carries, in a process that has no Graft."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from safetensors import safe_open

# Whatever finds Graft's package otherwise, such as an editable install: importing it fails.
WITHOUT_GRAFT = 'import sys; sys.modules["app"] = None; exec(open("lines.py").read())'


def facts_of(path: Path) -> dict[str, str]:
    """What a file says of itself."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found: dict[str, str] = session.get_modelmeta().custom_metadata_map
        return found
    if path.suffix == ".pt2":
        files = {"metadata.json": ""}
        torch.export.load(path, extra_files=files)
        kept: dict[str, str] = json.loads(files["metadata.json"])
        return kept
    with safe_open(path, framework="pt") as file:
        written: dict[str, str] = file.metadata()
        return written


def ask_without_graft(path: Path, picture: bytes, *, lines: str | None = None) -> Any:
    """What the file's own lines print for a picture. path: model.onnx, model.pt2 or model.safetensors."""
    folder = path.parent
    (folder / "picture.jpg").write_bytes(picture)
    (folder / "lines.py").write_text(lines or facts_of(path)["usage"], encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_GRAFT], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
