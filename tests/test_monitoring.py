"""docker/monitoring: promtool takes it, its alerts fire when they should, every metric in it is one that we show."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.metering import Metering
from tests.rig import ROOT

MONITORING = ROOT / "docker" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "platform.json"
DOCUMENT = ROOT / "docs" / "metrics.md"
_NAME = re.compile(r"\b(?:gpu|process)_[a-z0-9_]+\b")
#: What Prometheus makes of a histogram and a counter.
_SUFFIXES = ("_bucket", "_count", "_sum", "_total")


@pytest.fixture(scope="module")
def promtool() -> str:
    """Prometheus' own checker; skips where there is none, and fails in CI."""
    found = shutil.which("promtool")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("there is no promtool; Debian's package is prometheus")
    return str(found)


def expressions() -> Iterator[str]:
    """Every expression of alerts and dashboard."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    board = json.loads(DASHBOARD.read_text())
    yield from (target["expr"] for panel in board["panels"] for target in panel["targets"])
    yield from (variable["query"] for variable in board["templating"]["list"])


def shown() -> set[str]:
    """The metrics of a process of ours, by the names of their families."""
    own = {family.name for family in Metering().registry.collect()}
    sources = [(ROOT / "app" / name).read_text() for name in ("gauges.py", "metering.py")]
    return own | {name for source in sources for name in re.findall(r'"(gpu_[a-z0-9_]+)"', source)}


def family(name: str) -> str:
    """A sample's name without what its kind adds."""
    return next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)


def test_promtool_takes_rules_and_configuration(promtool):
    for command in (["rules", ALERTS], ["config", MONITORING / "prometheus.yml"]):
        checked = subprocess.run([promtool, "check", *map(str, command)], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_metric_of_alerts_and_dashboard_is_one_that_we_show():
    known = shown()
    named = {name for expression in expressions() for name in _NAME.findall(expression)}

    assert len(named) > 25
    assert {name for name in named if name not in known and family(name) not in known} == set()


def test_the_document_explains_every_metric():
    text = DOCUMENT.read_text()
    explained = set(_NAME.findall(text)) | {family(name) for name in _NAME.findall(text)}

    assert {name for name in shown() if name.startswith("gpu_")} - explained == set()


@pytest.mark.parametrize(
    ("alert", "series"),
    [
        pytest.param("GpuNoWorker", {'gpu_queue_jobs{region="r",type="llm",model=""}': "3x20"}, id="no worker"),
        pytest.param("GpuQueueOld", {'gpu_queue_oldest_wait_seconds{region="r",type="llm"}': "400x20"}, id="old queue"),
        pytest.param("GpuRegionAway", {'gpu_region_up{region="r",part="store"}': "0x20"}, id="store away"),
        pytest.param("GpuOutcomesForged", {'gpu_outcomes_forged_total{store="r"}': "0+1x20"}, id="forged"),
        pytest.param("GpuNobodyLeads", {'gpu_control_leader{instance="c"}': "0x20"}, id="no leader"),
        pytest.param(
            "GpuReconcilerStuck",
            {
                'gpu_control_leader{instance="c"}': "1x20",
                'gpu_control_last_tick_timestamp_seconds{instance="c"}': "0x20",
            },
            id="stuck reconciler",
        ),
        pytest.param(
            "GpuJobsFail",
            {
                'gpu_jobs_ended_total{region="r",type="llm",outcome="failed"}': "0+1x20",
                'gpu_jobs_ended_total{region="r",type="llm",outcome="completed"}': "0+9x20",
            },
            id="failing jobs",
        ),
    ],
)
def test_an_alert_fires(promtool: str, tmp_path: Path, alert: str, series: dict[str, str]):
    rule = next(
        rule
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == alert
    )
    # Alone, and its labels and words left out: that it fires is what is asked.
    bare: dict[str, Any] = {"alert": alert, "expr": rule["expr"], "for": rule.get("for", "0s")}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [bare]}]}))
    sums = {"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "15m"}
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": _values(values)} for name, values in series.items()],
                "promql_expr_test": [{**sums, "exp_samples": [{"labels": "{}", "value": 1}]}],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))

    ran = subprocess.run(
        [promtool, "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr


def _values(short: str) -> str:
    """promtool's notation: 3x20 is 3+0x20."""
    return short if "+" in short else short.replace("x", "+0x", 1)
