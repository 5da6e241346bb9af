"""The metrics, their page, the alert rules and the dashboard say the same."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from math import isnan
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.metrics import MetricWrapperBase

import cdcsync
from cdcsync.flows.audit.comparison import FAILED, REPEATED, UNDECIDED
from cdcsync.flows.audit.soundness import Fault
from cdcsync.metrics import STATES, WAL_STATUSES, Metrics
from cdcsync.metrics.instruments import PROBLEMS
from cdcsync.model.requests import Problem
from tests import ROOT

PACKAGE = Path(cdcsync.__file__).parent
ALERTS = ROOT / "config" / "alerts.yml"
DASHBOARD = ROOT / "config" / "dashboard.json"
PAGE = ROOT / "docs" / "metrics.md"

SCRAPED = {"job", "instance", "le"}
"""Labels that a scrape adds, and the one of every histogram's buckets."""


class Described(msgspec.Struct, frozen=True):
    """What is known of a metric."""

    type: str
    labels: tuple[str, ...]


def of_code() -> dict[str, Described]:
    """Return the metrics that the code makes, under the names that are exposed."""
    made = {"cdcsync_build_info": Described("gauge", ("version",))}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            suffix = "_total" if metric._type == "counter" else ""
            made[metric._name + suffix] = Described(str(metric._type), tuple(metric._labelnames))
    return made


def of_page() -> dict[str, Described]:
    """Return the metrics that the page's tables list."""
    rows = re.findall(r"^\| `(cdcsync_\w+)` \| (\w+) \| ([^|]+) \|([^|]*)\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    return {name: Described(type_, tuple(re.findall(r"`(\w+)`", labels))) for name, type_, _, labels, _ in rows}


def expressions() -> Iterator[str]:
    """Return every expression of the rules and the dashboard."""
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    board = json.loads(DASHBOARD.read_text())
    for panel in board["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for variable in board["templating"]["list"]:
        yield str(variable.get("definition", ""))
    yield from re.findall(r"^    (.*cdcsync_.*)$", PAGE.read_text(), re.MULTILINE)


def test_the_page_lists_every_metric_with_its_type_and_labels_and_no_other() -> None:
    assert of_page() == of_code()


def test_the_page_lists_every_value_of_a_closed_label() -> None:
    listed = dict(re.findall(r"^\| `(\w+)` \| (`[^|]+) \|$", PAGE.read_text(), re.MULTILINE))
    assert tuple(re.findall(r"`(\w+)`", listed["state"])) == STATES
    assert tuple(re.findall(r"`(\w+)`", listed["status"].partition(", as")[0])) == WAL_STATUSES


def test_every_metric_of_the_registry_is_described_once() -> None:
    described = Metrics().described
    assert {one.name: Described(one.kind, one.labels) for one in described} == of_code()
    assert len(described) == len(of_code())


def test_every_label_is_explained() -> None:
    explained = set(re.findall(r"^\| `(\w+)` \| ", PAGE.read_text(), re.MULTILINE))
    assert {label for metric in of_code().values() for label in metric.labels} <= explained | {"version"}


def test_every_metric_is_set_somewhere() -> None:
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "metrics.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name | ast.Attribute)
        and (node.value.id if isinstance(node.value, ast.Name) else node.value.attr).lstrip("_") == "metrics"
    }
    # Some are set together, or by methods that also keep the last quarter of an hour.
    for method in (Metrics.note_text_freshness, Metrics.note_vector_freshness, Metrics.note_slot):
        used |= set(method.__code__.co_names)
    assert {name for name in vars(Metrics()) if name != "registry" and not name.startswith("_")} <= used


def test_counters_begin_at_zero_so_that_their_first_count_is_a_growth() -> None:
    metrics = Metrics()
    metrics.begin(["articles"], ["hosted"])
    found = metrics.registry.get_sample_value
    assert found("cdcsync_audit_differences_total", {"index": "articles", "problem": "stale"}) == 0
    assert found("cdcsync_embed_errors_total", {"embedder": "hosted", "kind": "EmbedderUnavailable"}) == 0
    assert found("cdcsync_reconnects_total", {"side": "target"}) == 0


def test_the_page_lists_what_the_audit_finds() -> None:
    kinds = {*get_args(Problem), *get_args(Fault), REPEATED, "vectors_orphaned"}
    assert set(PROBLEMS) == kinds - {FAILED, UNDECIDED}


def test_gauges_that_nobody_has_read_are_not_known() -> None:
    metrics = Metrics()
    metrics.backlog.labels("articles", "live").set(7)
    metrics.lag_bytes.set(7)
    metrics.forget()
    assert metrics.registry.get_sample_value("cdcsync_backlog_chunks", {"index": "articles", "lane": "live"}) is None
    assert isnan(metrics.registry.get_sample_value("cdcsync_lag_bytes") or 0)


def test_the_memory_of_the_process_is_exposed() -> None:
    assert b"process_resident_memory_bytes" in generate_latest(Metrics().registry)


def test_rules_and_dashboard_name_only_metrics_and_labels_that_exist() -> None:
    known = of_code()
    unknown = set()
    for expression in expressions():
        for name, selectors in re.findall(r"\b(cdcsync_\w+)(?:\{([^}]*)\})?", expression):
            base = name.removesuffix("_bucket")
            labels = set(re.findall(r"(\w+) *(?:=~|!=|!~|=)", selectors))
            if base not in known or (base != name) != (known[base].type == "histogram"):
                unknown.add(name)
            elif not labels <= {*known[base].labels, *SCRAPED}:
                unknown.add(f"{name}{{{selectors}}}")
    assert not unknown


def test_each_alert_has_a_severity_and_says_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    names = [rule["alert"] for rule in rules]
    assert len(names) == len(set(names))
    for rule in rules:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_a_panel_that_is_asked_for_a_moment_says_what_it_means_when_there_is_nothing() -> None:
    """Of a range, the last value that is known would be shown, long after the worker ended."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] == "stat":
            assert all(target["instant"] and not target["range"] for target in panel["targets"]), panel["title"]
            assert panel["fieldConfig"]["defaults"]["noValue"], panel["title"]


def test_gauges_count_once_with_a_standby_beside_the_worker() -> None:
    """A standby reads the status too. Its counters stand still, so rates need no such condition."""
    of_pipeline = {"lag", "slot", "backlog", "failed", "index", "backfill", "recall", "proven", "verify", "embedder"}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", []):
            named = re.findall(r"\bcdcsync_([a-z]+)\w*(?<!_total)(?<!_bucket)\{", target["expr"])
            if of_pipeline & set(named):
                assert "unless on (job, instance) cdcsync_standby" in target["expr"], (panel["title"], target["expr"])


# -- promtool ---------------------------------------------------------------------------------------------------


@pytest.fixture
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool: it is in Debian's package prometheus")
    return found


def test_the_rules_are_valid(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_exposed_keeps_to_the_conventions(promtool: str) -> None:
    exposed = generate_latest(Metrics().registry)
    done = subprocess.run([promtool, "check", "metrics"], input=exposed, capture_output=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")


WORKER = 'job="cdcsync", instance="a:9477"'


FOUND = f'cdcsync_audit_differences_total{{{WORKER}, index="i", problem="stale"}}'
STARTED = f"process_start_time_seconds{{{WORKER}}}"


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        ({f"up{{{WORKER}}}": "0x30"}, {"CdcsyncWorkerDown"}),
        ({f"up{{{WORKER}}}": "_x30"}, {"CdcsyncNoWorker"}),
        # Fails within two minutes of every start; meanwhile it does not answer.
        ({f"up{{{WORKER}}}": "1 0 1 0 " * 8, STARTED: "1 _ 2 _ 3 _ 4 _ " * 4}, {"CdcsyncRestarts"}),
        ({STARTED: "1x9 2x9 3x9"}, set()),
        ({f"cdcsync_ready{{{WORKER}}}": "0x30", f"cdcsync_standby{{{WORKER}}}": "0x30"}, {"CdcsyncNotReady"}),
        ({f"cdcsync_ready{{{WORKER}}}": "0x30", f"cdcsync_standby{{{WORKER}}}": "1x30"}, set()),
        (
            {
                f"cdcsync_ready{{{WORKER}}}": "0x30",
                f"cdcsync_standby{{{WORKER}}}": "1x9 0x20",
                f'cdcsync_connected{{{WORKER}, side="target"}}': "1x9 0x20",
            },
            {"CdcsyncNotReady", "CdcsyncTargetAway"},
        ),
        ({f"cdcsync_lag_seconds{{{WORKER}}}": "100x30"}, {"CdcsyncLag"}),
        (
            {f"cdcsync_slot_retained_bytes{{{WORKER}}}": "60x30", f"cdcsync_slot_safe_bytes{{{WORKER}}}": "40x30"},
            {"CdcsyncSlotHalfFull"},
        ),
        (
            {f"cdcsync_slot_retained_bytes{{{WORKER}}}": "99x30", f"cdcsync_slot_safe_bytes{{{WORKER}}}": "-7x30"},
            {"CdcsyncSlotHalfFull", "CdcsyncSlotNearlyFull"},
        ),
        (
            {f"cdcsync_slot_retained_bytes{{{WORKER}}}": "60x30", f"cdcsync_slot_safe_bytes{{{WORKER}}}": "+Inf _x30"},
            set(),
        ),
        ({f'cdcsync_backlog_chunks{{{WORKER}, index="i", lane="live"}}': "5000x40"}, {"CdcsyncBacklogNotShrinking"}),
        ({f'cdcsync_backlog_chunks{{{WORKER}, index="i", lane="live"}}': "9000-100x40"}, set()),
        ({f'cdcsync_index_state{{{WORKER}, index="i", state="paused"}}': "1x30"}, {"CdcsyncIndexPaused"}),
        ({f'cdcsync_recall{{{WORKER}, index="i"}}': "0.89x30"}, {"CdcsyncRecallLow"}),
        ({f'cdcsync_recall{{{WORKER}, index="i"}}': "0.9x30"}, set()),
        ({f'cdcsync_embedder_problem{{{WORKER}, embedder="e"}}': "1x30"}, {"CdcsyncEmbedderFails"}),
        ({f'cdcsync_embedder_problem{{{WORKER}, embedder="e"}}': "0x30"}, set()),
        ({f'cdcsync_embedder_drift{{{WORKER}, embedder="e"}}': "0.02x30"}, {"CdcsyncEmbedderChanged"}),
        ({f'cdcsync_embedder_drift{{{WORKER}, embedder="e"}}': "0.009x30"}, set()),
        ({FOUND: "0x9 1x20"}, {"CdcsyncAuditFound"}),
        ({FOUND: "1x30"}, set()),
    ],
)
def test_an_alert_fires_when_it_should(
    promtool: str, tmp_path: Path, series: dict[str, str], expected: set[str]
) -> None:
    evaluate_rules(promtool, tmp_path, {f"up{{{WORKER}}}": "1x30"} | series, expected, at="30m")


DAYS = 'index="i", ' + WORKER
LIVE = f'cdcsync_index_state{{{DAYS}, state="live"}}'
PROVEN = f"cdcsync_proven_equal_timestamp_seconds{{{DAYS}}}"


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        # Live for 55 hours, restarted on the way.
        ({LIVE: "1x600 _x6 1x54"}, {"CdcsyncNeverProvenEqual"}),
        ({LIVE: "1x660", PROVEN: "_x400 120000x260"}, set()),
        ({LIVE: "_x200 1x460"}, set()),
        ({LIVE: "1x640 0x20"}, set()),
        ({LIVE: "1x660", PROVEN: "600x660"}, {"CdcsyncNotProvenEqual"}),
    ],
)
def test_an_index_that_is_not_proven_equal_for_two_days_is_told(
    promtool: str, tmp_path: Path, series: dict[str, str], expected: set[str]
) -> None:
    evaluate_rules(promtool, tmp_path, {f"up{{{WORKER}}}": "1x660"} | series, expected, at="55h", every="5m")


def evaluate_rules(
    promtool: str, tmp_path: Path, series: dict[str, str], expected: set[str], at: str, every: str = "1m"
) -> None:
    """See which alerts fire at a time, of series with a sample every minute, or so often as is said."""
    names = [rule["alert"] for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    # What fires is read as a series, so that annotations need not be repeated here.
    fires = [
        {
            "expr": f'count(ALERTS{{alertname="{name}", alertstate="firing"}})',
            "eval_time": at,
            "exp_samples": [{"labels": "{}", "value": 1}] if name in expected else [],
        }
        for name in names
    ]
    inputs: list[dict[str, Any]] = [{"series": name, "values": values} for name, values in series.items()]
    test = {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": every,
        "tests": [{"interval": every, "input_series": inputs, "promql_expr_test": fires}],
    }
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps(test))
    done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
