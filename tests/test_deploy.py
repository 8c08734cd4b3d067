"""What deploy/ has for operators is held against a real server's metrics, and by Prometheus's own tool."""

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import api_builders
import builders
import httpx
import pytest
import yaml
from api_builders import RunningServer
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
RULES = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())

# Given by Prometheus itself, to every scrape.
OF_PROMETHEUS = {"up": {"job", "instance"}, "ALERTS": {"alertname", "alertstate"}}
OF_EVERY_SERIES = {"job", "instance"}
SERIES = re.compile(r"\b(graft_\w+|up|ALERTS)\b(?:\{([^}]*)\})?")

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool, which comes with Debian's package prometheus"
)


def dashboard_expressions() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return [*panels, *(each["expr"] for each in DASHBOARD["annotations"]["list"])]


EXPRESSIONS = {
    **{f"alert {rule['alert']}": rule["expr"] for rule in RULES},
    **{f"panel {index}": expression for index, expression in enumerate(dashboard_expressions())},
}


def used_series(expression: str) -> dict[str, set[str]]:
    """The names of the series that an expression asks for, with the labels that it picks them by."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, labels in SERIES.findall(expression):
        found[name] |= set(re.findall(r"(\w+)(?:=~|!~|!=|=)", labels))
    return found


def unknown(expression: str, known: Mapping[str, set[str]]) -> list[str]:
    """What an expression asks for, or groups by, that is not there."""
    used = used_series(expression)
    names = [name for name in used if name not in known]
    labels = [
        f"{name}{{{label}}}"
        for name in used.keys() & known.keys()
        for label in sorted(used[name] - known[name] - OF_EVERY_SERIES)
    ]
    served = OF_EVERY_SERIES.union(*(known.get(name, set()) for name in used))
    grouped_by = {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
    return names + labels + sorted(grouped_by - served)


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, set[str]]]:
    """Every series of a server that has answered a few requests, with its labels."""
    with api_builders.running(api_builders.settings_for(tmp_path_factory.mktemp("server"))) as server:
        yield {**OF_PROMETHEUS, **served_series(server)}


def served_series(server: RunningServer) -> dict[str, set[str]]:
    with api_builders.client_of(server) as client:
        api_builders.register_model(server.services)
        assert client.post("/predict", content=builders.jpeg()).status_code == 200
        return labels_by_name(client)


def labels_by_name(client: httpx.Client) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return dict(found)


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_every_series_that_is_asked_for_is_served(where: str, series: Mapping[str, set[str]]) -> None:
    assert used_series(EXPRESSIONS[where])
    assert unknown(EXPRESSIONS[where], series) == []


@pytest.mark.parametrize(
    ("expression", "missing"),
    [
        ("graft_requests_total > 0", []),
        ("graft_request_total > 0", ["graft_request_total"]),
        ('sum by (route) (rate(graft_requests_total{code="500"}[5m])) / 2', ["graft_requests_total{code}"]),
        ("sum by (path) (graft_requests_total)", ["path"]),
        ('sum by (le) (rate(graft_request_seconds_bucket{job="$job",route="/predict"}[5m]))', []),
        (
            "predict_linear(graft_disk_spare_byte[6h], 86400) < 0 and graft_disk_spare_bytes > 0",
            ["graft_disk_spare_byte"],
        ),
    ],
)
def test_a_series_that_is_not_served_is_found(
    expression: str, missing: list[str], series: Mapping[str, set[str]]
) -> None:
    assert unknown(expression, series) == missing


def test_every_figure_is_on_the_dashboard(series: Mapping[str, set[str]]) -> None:
    """But the parts of histograms, and when counters were made."""
    shown = {name for expression in dashboard_expressions() for name in used_series(expression)}
    whole = {name for name in series if not name.endswith(("_created", "_bucket", "_sum", "_count"))}

    assert whole <= shown | {"ALERTS"}


def test_every_panel_says_what_it_shows_in_the_chosen_prometheus() -> None:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            assert panel["description"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_every_alarm_is_explained_to_who_is_woken() -> None:
    page = (DEPLOY.parent / "docs" / "operations.md").read_text()

    assert [rule["alert"] for rule in RULES if f"| `{rule['alert']}` |" not in page] == []


def test_every_alarm_is_seen_to_ring_and_to_be_silent() -> None:
    tests = yaml.safe_load((DEPLOY / "alerts_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alarms = {rule["alert"] for rule in RULES}

    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alarms
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alarms


@needs_promtool
def test_the_alarms_ring_when_they_should() -> None:
    promtool("check", "config", "prometheus.yaml")
    promtool("test", "rules", "alerts_test.yaml")


@needs_promtool
def test_prometheus_understands_every_panel(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "5m")}
        for index, expression in enumerate(dashboard_expressions())
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", str(path))


def promtool(*arguments: str) -> None:
    ran: Any = subprocess.run(["promtool", *arguments], cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
