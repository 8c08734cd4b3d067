"""The repository as a whole: what lies at its top, and what must appear nowhere in the source."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = sorted(
    path for folder in ("app", "graft_client", "worker", "migrations") for path in (REPOSITORY / folder).rglob("*.py")
)


@pytest.mark.parametrize(
    "name",
    [
        ".ci/run",
        ".dockerignore",
        "CHANGELOG.md",
        "Dockerfile",
        "LICENSE",
        "Makefile",
        "README.md",
        "app",
        "benchmarks",
        "docs",
        "graft_client",
        "migrations",
        "pyproject.toml",
        "requirements-dev.lock",
        "requirements.lock",
        "SECURITY.md",
        "tests",
        "worker",
    ],
)
def test_the_top_of_the_repository_has(name: str) -> None:
    assert (REPOSITORY / name).exists()


def test_the_changelog_and_the_package_name_the_same_version() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]

    assert f"## {version}" in (REPOSITORY / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", SOURCE, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_is_ever_unpickled(path: Path) -> None:
    assert unpickling(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["import of pickle"]),
        ("from joblib import load", ["import of joblib"]),
        ("torch.load(path)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=False)", ["torch.load without weights_only=True"]),
        ("torch.load(path, weights_only=True)", []),
        ("np.load(path, allow_pickle=True)", ["allow_pickle"]),
        ("np.load(path)", []),
    ],
)
def test_the_search_for_unpickling_finds_it(source: str, found: list[str]) -> None:
    assert unpickling(ast.parse(source)) == found


def unpickling(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"import of {name}" for name in names if name.split(".")[0] in UNPICKLERS]
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(node.func) == "torch.load" and not is_true(given.get("weights_only")):
                found.append("torch.load without weights_only=True")
            if is_true(given.get("allow_pickle")):
                found.append("allow_pickle")
    return found


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


@pytest.mark.slow
def test_importing_graft_opens_no_connection_and_starts_no_thread() -> None:
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        for path in SOURCE
        # Alembic runs its scripts itself, and __main__ is the command.
        if path.name not in ("__init__.py", "__main__.py") and path.parts[-2] not in ("migrations", "versions")
    ]
    script = f"""
import importlib, socket, threading
def refuse(*arguments):
    raise AssertionError("a connection at import")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
for name in {modules}:
    importlib.import_module(name)
print(*[thread.name for thread in threading.enumerate()])
"""
    imported = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (imported.stderr, imported.stdout) == ("", "MainThread\n")
