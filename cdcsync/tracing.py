"""Spans of what the worker and the tool server do, by OpenTelemetry. Off, and free, where nobody asks for them.

    an application's transaction, with its trace context in the WAL:

        SELECT pg_logical_emit_message(true, 'traceparent', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01')

    ─► cdcsync.apply   from its arrival to its commit in the target ┐ children of the application's span, each with a
    ─► cdcsync.embed   for each call of the model for its texts     ┘ link to the span of the worker's own that did it

    cdcsync.batch ─► cdcsync.prepare (for each index), cdcsync.commit      the worker's own, with links to all
    cdcsync.call                                                           applications whose work is in them

    ─► cdcsync.serve.search   a call of the tool server, child of the caller's span (its traceparent header)
       ├ cdcsync.embed_query  the model makes the query's vector
       └ cdcsync.statement    the search in the target, whose text ends in a comment with the span's traceparent

A batch holds many transactions and a call many texts, and a span has one parent: so the worker's spans and those in an
application's trace are apart. Which text came with which transaction is kept in memory while the text waits: after
a restart, it has no place in a trace.

Spans carry names and counts, never values of cells, keys, or the words of an error. The environment says where they go:
`OTEL_EXPORTER_OTLP_ENDPOINT` and the other standard variables (docs/tracing.md).

Source: W3C, "Trace Context"; OpenTelemetry, "Environment Variable Specification", "OTLP Exporter".
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from cdcsync import __version__
from cdcsync.logs import get_logger

log = get_logger()

PREFIX = "traceparent"
"""The prefix of the logical messages that applications write."""

MOST_ORIGINS = 128
"""Traced transactions of one batch; an SDK keeps no more links of a span either."""

MOST_FOLLOWED = 20_000
"""Texts whose transactions are remembered while they wait: some 5 MB."""

CLOSE_S = 3.0
"""How long the last spans may take to get away when the worker ends."""

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Value = str | int


class Origin:
    """A traced transaction: where its span is, and when it came here (nanoseconds of this machine's clock)."""

    def __init__(self, context: Any, received_ns: int) -> None:
        self.context = context
        self.received_ns = received_ns


class Tracing:
    """Makes no spans: what a worker has that nobody asked for any."""

    on = False

    def begin(self, lsn: int) -> None:
        """Note that a transaction begins to be delivered, which the LSN names."""

    def note(self, content: bytes) -> None:
        """Take the trace context of the transaction; one that cannot be read is as none."""

    def end(self, origins: dict[int, Origin]) -> None:
        """Add the transaction, which is whole now, to those of its batch, if it is traced."""

    @contextlib.contextmanager
    def batch(self, origins: Mapping[int, Origin], **attributes: Value) -> Iterator[None]:
        """Span the application of a batch."""
        yield

    @contextlib.contextmanager
    def span(self, name: str, **attributes: Value) -> Iterator[None]:
        """Span a step of what is being done."""
        yield

    @contextlib.contextmanager
    def called(self, name: str, traceparent: str | None, **attributes: Value) -> Iterator[None]:
        """Span the answer to a call, as a child of the caller's span if the call names one."""
        yield

    def traceparent(self) -> str | None:
        """Return the trace context of the current span, for a statement's comment; None where there is none."""
        return None

    @contextlib.contextmanager
    def prepare(self, index: str, origins: Mapping[int, Origin]) -> Iterator[None]:
        """Span how the changes of an index in a batch are prepared; the batch may be one that is not begun yet."""
        yield

    def follow(self, texts: Iterable[tuple[int, bytes]]) -> None:
        """Remember which text (by its hash) of what is prepared came with which transaction (by its LSN)."""

    @contextlib.contextmanager
    def call(self, embedder: str, texts: Collection[bytes]) -> Iterator[None]:
        """Span one call of a model."""
        yield

    def close(self) -> None:
        """Send what is not sent yet; blocks for `CLOSE_S` at most."""


class OpenTelemetry(Tracing):
    """Makes spans, and hands them to a thread that sends them."""

    on = True

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("cdcsync", __version__)
        self._trace = importlib.import_module("opentelemetry.trace")
        self._nowhere = importlib.import_module("opentelemetry.context").Context()
        propagation = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()
        self._lsn = 0
        self._received_ns = 0
        self._noted: Any = None
        self._origins: Mapping[int, Origin] = {}
        """Those of the batch that is being prepared: one at a time is."""
        self._followed: OrderedDict[bytes, Origin] = OrderedDict()

    def begin(self, lsn: int) -> None:
        """Note that a transaction begins to be delivered."""
        self._lsn, self._received_ns, self._noted = lsn, time.time_ns(), None

    def note(self, content: bytes) -> None:
        """Take the trace context of the transaction; the last one counts."""
        context = self._extracted(content.decode("ascii", "replace").strip())
        found = self._trace.get_current_span(context).get_span_context()
        if found.is_valid:
            self._noted = found

    def end(self, origins: dict[int, Origin]) -> None:
        """Add the transaction to those of its batch."""
        if self._noted is not None and len(origins) < MOST_ORIGINS:
            origins[self._lsn] = Origin(self._noted, self._received_ns)
        self._noted = None

    @contextlib.contextmanager
    def batch(self, origins: Mapping[int, Origin], **attributes: Value) -> Iterator[None]:
        """Span the application of a batch, and in the traces of its applications that of their transactions."""
        contexts = [origin.context for origin in origins.values()]
        with self._spanning("cdcsync.batch", contexts, self._nowhere, attributes) as span:
            yield
        for origin in origins.values():
            self._in_trace_of(origin, "cdcsync.apply", origin.received_ns, span, {})

    @contextlib.contextmanager
    def span(self, name: str, **attributes: Value) -> Iterator[None]:
        """Span a step of what is being done."""
        with self._spanning(name, (), None, attributes):
            yield

    @contextlib.contextmanager
    def called(self, name: str, traceparent: str | None, **attributes: Value) -> Iterator[None]:
        """Span the answer to a call, as a child of the caller's span if the call names one."""
        with self._spanning(name, (), self._extracted(traceparent or ""), attributes):
            yield

    def traceparent(self) -> str | None:
        """Return the trace context of the current span."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get(PREFIX)

    def _extracted(self, traceparent: str) -> Any:
        """Return the context of a caller; an empty one if it cannot be read."""
        return self._propagator.extract({PREFIX: traceparent}, context=self._nowhere)

    @contextlib.contextmanager
    def prepare(self, index: str, origins: Mapping[int, Origin]) -> Iterator[None]:
        """Span how the changes of an index are prepared, and know meanwhile which transactions they are of."""
        self._origins = origins
        with self.span("cdcsync.prepare", index=index):
            yield

    def follow(self, texts: Iterable[tuple[int, bytes]]) -> None:
        """Remember which text came with which transaction."""
        if not self._origins:
            return
        for lsn, one in texts:
            if (origin := self._origins.get(lsn)) is not None:
                self._followed[one] = origin
        while len(self._followed) > MOST_FOLLOWED:
            self._followed.popitem(last=False)

    @contextlib.contextmanager
    def call(self, embedder: str, texts: Collection[bytes]) -> Iterator[None]:
        """Span one call of a model, and in the traces of applications that for their texts."""
        of = Counter(self._followed[one] for one in texts if one in self._followed)
        attributes: dict[str, Value] = {"embedder": embedder, "texts": len(texts)}
        started_ns = time.time_ns()
        with self._spanning("cdcsync.call", [origin.context for origin in of], None, attributes) as span:
            yield
        for one in texts:
            self._followed.pop(one, None)
        for origin, count in of.items():
            self._in_trace_of(origin, "cdcsync.embed", started_ns, span, {"embedder": embedder, "texts": count})

    def close(self) -> None:
        """Send what is not sent yet."""
        # Its own attempts last longer, and the process would wait for any other kind of thread.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)

    @contextlib.contextmanager
    def _spanning(
        self, name: str, contexts: Iterable[Any], parent: Any, attributes: Mapping[str, Value]
    ) -> Iterator[Any]:
        """Make a span the current one; of an error it keeps the kind alone."""
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            links=[self._trace.Link(context) for context in contexts],
            attributes=_named(attributes),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except Exception as error:
                span.set_status(self._trace.StatusCode.ERROR, type(error).__name__)
                raise

    def _in_trace_of(
        self, origin: Origin, name: str, started_ns: int, by: Any, attributes: Mapping[str, Value]
    ) -> None:
        """Add a span that is over to an application's trace, with a link to the worker's span that did it."""
        parent = self._trace.set_span_in_context(self._trace.NonRecordingSpan(origin.context), self._nowhere)
        self._tracer.start_span(
            name,
            context=parent,
            links=[self._trace.Link(by.get_span_context())],
            attributes=_named(attributes),
            start_time=started_ns,
        ).end()


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"cdcsync.{name}": value for name, value in attributes.items()}


def from_environment(environ: Mapping[str, str]) -> Tracing:
    """Return what makes the spans that the environment asks for, or what makes none.

    A worker that lacks the packages, or whose protocol they do not speak, says so in its log and works without tracing.
    """
    endpoint = next((environ[name] for name in ENDPOINTS if environ.get(name)), None)
    if endpoint is None or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return Tracing()
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return Tracing()
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol not in (None, "", "http/protobuf"):
        log.warning("tracing_off", problem=f"protocol {protocol}", fix="set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf")
        return Tracing()
    try:
        exporter = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        resources = importlib.import_module("opentelemetry.sdk.resources")
    except ImportError as error:
        log.warning("tracing_off", problem=f"{error.name} is not installed", fix="pip install 'cdcsync[otel]'")
        return Tracing()
    attributes = {"service.version": __version__}
    if not environ.get("OTEL_SERVICE_NAME") and "service.name=" not in environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        attributes["service.name"] = "cdcsync"
    # The worker ends it in time, and no later exit does so again.
    provider = sdk.TracerProvider(resource=resources.Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(export.BatchSpanProcessor(exporter))
    log.info("tracing_on", host=urlsplit(endpoint).hostname)
    return OpenTelemetry(provider)
