"""deploy/kubernetes: manifests that the API would take, and that fit what the worker serves."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from cdcsync.config import parse
from cdcsync.metrics import Metrics
from cdcsync.worker.http import make_app
from tests import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.29", "1.32", "1.35")
"""Minor versions of the API: PodDisruptionBudget, Deployment and Secret are stable in all of them."""


def manifest(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["deployment.yaml", "serve.yaml", "poddisruptionbudget.yaml", "secret.example.yaml"])
def test_the_api_takes_each_manifest(name: str, version: str) -> None:
    import kubernetes_validate  # it compiles grammars for seconds, which each process would do that collects tests

    kubernetes_validate.validate(manifest(name), version, strict=True)


def test_the_kustomization_names_every_manifest_that_a_pipeline_needs() -> None:
    listed = set(manifest("kustomization.yaml")["resources"])
    assert listed == {path.name for path in FOLDER.glob("*.yaml")} - {
        "kustomization.yaml",
        "secret.example.yaml",
        "serve.yaml",
    }


def test_selectors_select_the_pods() -> None:
    labels = manifest("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    for name in ("deployment.yaml", "poddisruptionbudget.yaml", "podmonitor.yaml"):
        assert manifest(name)["spec"]["selector"]["matchLabels"] == labels


def test_the_job_has_the_name_that_the_alerts_know_it_by() -> None:
    labels = manifest("deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    job = labels[manifest("podmonitor.yaml")["spec"]["jobLabel"]]
    rules = (ROOT / "config" / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'job="(\w+)"', rules)) == {job}


def container() -> Any:
    (only,) = manifest("deployment.yaml")["spec"]["template"]["spec"]["containers"]
    return only


def test_probes_and_metrics_ask_for_paths_that_the_worker_serves_on_its_port() -> None:
    class View:
        metrics = Metrics()
        standby = False

    served = {route.path for route in make_app(View()).routes}  # type: ignore[arg-type, attr-defined]
    probes = [container()[f"{kind}Probe"]["httpGet"] for kind in ("liveness", "startup", "readiness")]
    (endpoint,) = manifest("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert {probe["path"].split("?")[0] for probe in probes} | {endpoint["path"]} <= served
    (port,) = container()["ports"]
    assert {probe["port"] for probe in probes} | {endpoint["port"]} == {port["name"]}
    listen = parse((FOLDER / "cdcsync.toml").read_text(encoding="utf-8"), secret(), where="cdcsync.toml").worker.listen
    assert listen == f"0.0.0.0:{port['containerPort']}"


def secret() -> dict[str, str]:
    return dict(manifest("secret.example.yaml")["stringData"])


def test_the_secret_has_what_the_configuration_asks_for_and_nothing_else() -> None:
    text = (FOLDER / "cdcsync.toml").read_text(encoding="utf-8")
    config = parse(text, secret(), where="cdcsync.toml")
    assert {config.source.dsn, config.target.dsn} == set(secret().values())


def test_a_standby_does_not_keep_a_rollout_waiting() -> None:
    """Replicas beyond the first are standbys for as long as it works: their readiness must count them."""
    assert container()["readinessProbe"]["httpGet"]["path"] == "/readyz?standby=ok"
    deployment = manifest("deployment.yaml")["spec"]
    budget = manifest("poddisruptionbudget.yaml")["spec"]
    assert deployment["strategy"]["rollingUpdate"]["maxSurge"] >= 1
    assert budget["minAvailable"] < deployment["replicas"]


def test_the_pod_has_no_privileges_and_writes_only_to_its_cache() -> None:
    pod = manifest("deployment.yaml")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = [one["mountPath"] for one in container()["volumeMounts"] if not one.get("readOnly")]
    assert writable == ["/var/cache/cdcsync"]
    assert (
        pod["terminationGracePeriodSeconds"]
        > parse(
            (FOLDER / "cdcsync.toml").read_text(encoding="utf-8"), secret(), where="cdcsync.toml"
        ).worker.stop_timeout_s
    )
