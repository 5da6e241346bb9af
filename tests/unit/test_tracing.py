"""When spans are made at all, and that nothing of OpenTelemetry is loaded where nobody asks for any."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from cdcsync.tracing import MOST_ORIGINS, Origin, Tracing, from_environment

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_it_is_off_unless_the_environment_names_an_endpoint(environ: dict[str, str]) -> None:
    assert not from_environment(environ).on


def test_a_worker_that_is_not_asked_for_spans_loads_no_opentelemetry() -> None:
    program = (
        "import sys, cdcsync.worker, cdcsync.tracing as t; t.from_environment({});"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "[]"


def test_a_protocol_that_is_not_spoken_is_said_and_the_worker_goes_on() -> None:
    with structlog.testing.capture_logs() as logged:
        made = from_environment({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})

    assert not made.on
    assert [(one["event"], one["log_level"], one["problem"]) for one in logged] == [
        ("tracing_off", "warning", "protocol grpc")
    ]


def test_missing_packages_are_said_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("opentelemetry", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        monkeypatch.setitem(sys.modules, name, None)
    with structlog.testing.capture_logs() as logged:
        made = from_environment(ENDPOINT)

    assert not made.on
    assert logged[0]["fix"] == "pip install 'cdcsync[otel]'"


def test_one_that_is_off_lets_everything_pass() -> None:
    tracing = Tracing()
    origins: dict[int, Origin] = {}
    tracing.begin(1)
    tracing.note(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    tracing.end(origins)
    with tracing.batch(origins, rows=1), tracing.span("cdcsync.commit"), tracing.call("model", [b"hash"]):
        tracing.follow([(1, b"hash")])
    tracing.close()

    assert origins == {}


def test_a_batch_has_no_more_origins_than_a_span_has_links() -> None:
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider

    from cdcsync.tracing import OpenTelemetry

    tracing = OpenTelemetry(TracerProvider(shutdown_on_exit=False))
    origins: dict[int, Origin] = {}
    for lsn in range(MOST_ORIGINS + 10):
        tracing.begin(lsn)
        tracing.note(f"00-{lsn + 1:032x}-b7ad6b7169203331-01".encode())
        tracing.end(origins)

    assert list(origins) == list(range(MOST_ORIGINS))
