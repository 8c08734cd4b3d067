"""Which package may import which: the table of docs/architecture.md, held against every import in the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# What every unit may import besides itself.
FOUNDATION = frozenset(
    {
        "app.allocator",
        "app.confinement",
        "app.settings",
        "app.errors",
        "app.logs",
        "app.names",
        "app.storage",
        "app.telemetry",
    }
)

APPLICATION = frozenset(
    {
        "app.access",
        "app.api",
        "app.audit",
        "app.clock",
        "app.datasets",
        "app.db",
        "app.holdings",
        "app.jobs",
        "app.precedence",
        "app.predictions",
        "app.registry",
        "app.serving",
        "app.vision",
        "app.web",
        "app.egress",
        "app.webhooks",
        "app.workspaces",
    }
)

MAY_IMPORT: dict[str, frozenset[str]] = {
    "app.allocator": frozenset(),
    "app.confinement": frozenset(),
    "app.settings": frozenset(),
    "app.errors": frozenset(),
    "app.logs": frozenset(),
    "app.names": frozenset(),
    "app.storage": frozenset(),
    "app.telemetry": frozenset(),
    "app.precedence": frozenset(),
    "app.clock": frozenset(),
    "app.egress": frozenset(),
    "app.db": frozenset({"migrations"}),
    "app.webhooks": frozenset({"app.db"}),
    "app.vision": frozenset(),
    "app.datasets": frozenset({"app.db", "app.vision", "app.webhooks"}),
    "app.jobs": frozenset({"app.db", "app.vision", "app.webhooks"}),
    "app.registry": frozenset({"app.db", "app.vision", "app.webhooks"}),
    "app.predictions": frozenset({"app.db", "app.vision"}),
    "app.access": frozenset({"app.db", "app.vision"}),
    "app.audit": frozenset({"app.db"}),
    "app.holdings": frozenset({"app.db"}),
    "app.workspaces": frozenset({"app.db", "app.jobs"}),
    "app.serving": frozenset({"app.vision"}),
    "app.api": APPLICATION,
    "app.web": APPLICATION,
    "app.main": frozenset({"app.access", "app.api", "app.db", "app.egress", "app.serving", "app.web"}),
    # The command: the client over HTTP, and what an operator does to the database without a server.
    "graft_client": frozenset(),
    "app.demo": frozenset(),
    "app.supervisor": frozenset(),
    "app.backup": frozenset({"app.db", "app.jobs", "app.predictions"}),
    "app.check": frozenset({"app.db", "app.holdings", "app.jobs", "app.predictions"}),
    "app.removal": frozenset({"app.access", "app.audit", "app.db", "app.holdings", "app.jobs", "app.workspaces"}),
    "app.cli": frozenset(
        {
            "app.access",
            "app.audit",
            "app.backup",
            "app.check",
            "app.db",
            "app.removal",
            "app.supervisor",
            "app.workspaces",
            "graft_client",
        }
    ),
    "worker.training": frozenset(
        {"app.vision", "app.datasets.manifest", "app.datasets.packed", "app.jobs.request", "app.jobs.spec"}
    ),
    "worker": frozenset(
        {
            "app.datasets",
            "app.db",
            "app.holdings",
            "app.jobs",
            "app.precedence",
            "app.predictions",
            "app.registry",
            "app.serving",
            "app.vision",
            "worker.training",
            "app.workspaces",
        }
    ),
    "migrations": frozenset({"app.db"}),
}

# Of the server it may know nothing at all.
PUBLISHED_ALONE = "graft_client"

KNOW_HTTP = frozenset({"app.api", "app.web", "app.main"})
HTTP_LIBRARIES = frozenset({"fastapi", "starlette", "uvicorn"})


def source_files() -> list[Path]:
    folders = ("app", "graft_client", "worker", "migrations")
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def lies_in(module: str, unit: str) -> bool:
    return module == unit or module.startswith(f"{unit}.")


def unit_of(module: str) -> str | None:
    """The longest unit that holds the module; None for a bare package and for other people's modules."""
    return max((unit for unit in MAY_IMPORT if lies_in(module, unit)), key=len, default=None)


def imported_modules(path: Path) -> Iterator[str]:
    """The full names of what a file imports, as far as a name can be a module: `from app import logs` is app.logs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def is_allowed(importer: str, imported: str) -> bool:
    unit, other = unit_of(importer), unit_of(imported)
    if unit is None or other is None or unit == other:
        return True
    foundation = frozenset() if unit == PUBLISHED_ALONE else FOUNDATION
    return any(lies_in(imported, permitted) for permitted in MAY_IMPORT[unit] | foundation)


def test_every_module_belongs_to_a_unit_of_the_table() -> None:
    homeless = [module_name(path) for path in source_files() if unit_of(module_name(path)) is None]

    assert homeless == ["app"]


def test_imports_follow_the_table() -> None:
    wrong = [
        f"{module_name(path)} imports {imported}"
        for path in source_files()
        for imported in imported_modules(path)
        if not is_allowed(module_name(path), imported)
    ]

    assert wrong == []


def test_only_the_edge_knows_http_libraries() -> None:
    wrong = [
        f"{module_name(path)} imports {imported}"
        for path in source_files()
        for imported in imported_modules(path)
        if imported.split(".")[0] in HTTP_LIBRARIES and unit_of(module_name(path)) not in KNOW_HTTP
    ]

    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    modules = {module_name(path): path for path in source_files()}
    graph = {
        name: {found for imported in imported_modules(path) if (found := _module_among(imported, modules)) != name}
        for name, path in modules.items()
    }
    # Taking away modules that import nothing (left) empties a graph exactly if it has no cycle.
    while leaves := {name for name, imports in graph.items() if not imports & graph.keys()}:
        graph = {name: imports for name, imports in graph.items() if name not in leaves}

    assert graph == {}


def _module_among(imported: str, modules: dict[str, Path]) -> str | None:
    """The module that an imported name stands for: itself, or where it is defined."""
    return imported if imported in modules else next((m for m in (imported.rpartition(".")[0],) if m in modules), None)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("app.datasets.ingest", "app.jobs.queue.submit"),
        ("app.api.jobs", "worker.main"),
        ("app.serving.predictor", "app.registry.find"),
        ("app.jobs.queue", "app.api.problems"),
        ("worker.training.loop", "app.db.engine"),
        ("worker.training.pixels", "app.datasets.ingest"),
        ("app.cli.train", "app.api.schemas"),
        ("graft_client.connection", "app.settings"),
    ],
)
def test_the_table_refuses_what_the_design_forbids(importer: str, imported: str) -> None:
    assert not is_allowed(importer, imported)


def test_the_client_starts_without_anything_of_the_server() -> None:
    script = "import sys, graft_client; print(*sorted({name.split('.')[0] for name in sys.modules}))"

    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert {"httpx", "httpx_sse"} <= set(loaded)
    assert not {"app", "worker", "migrations", "pydantic", "fastapi", "sqlalchemy", "typer", "numpy", "PIL"} & set(
        loaded
    )


def test_the_command_starts_without_torch_and_without_the_api() -> None:
    heavy = ["torch", "torchvision", "fastapi", "sklearn", "app.main", "app.api"]
    script = f"import sys, app.cli; print(*[name for name in {heavy} if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert loaded == "\n"


def test_the_worker_starts_without_torch_and_what_is_optional() -> None:
    """Its children have torch; it would cost the worker some hundred megabytes, and seconds at its start."""
    heavy = ["torch", "mlflow", "tensorboard", "opentelemetry.sdk", "fastapi"]
    script = f"import sys, worker.main; print(*[name for name in {heavy} if name in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert loaded == "\n"
