"""OpenTelemetry with the real API and SDK, and the dashboard with the real exporter."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind
from prometheus_client import REGISTRY, generate_latest

from pinning_middleware import signals, stats, use_primary
from pinning_middleware.contrib.opentelemetry.instruments import Instruments
from pinning_middleware.contrib.opentelemetry.spans import annotate
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers.registry import Identity, Server
from pinning_middleware.utils import counters
from pinning_middleware.utils.counters import Read
from tests.app.models import Book
from tests.conftest import is_replica

from .pages import DOCS, load

DASHBOARD = DOCS / "_static" / "grafana-dashboard.json"
PAGE = (DOCS / "reference" / "metrics.md").read_text()

with_databases = pytest.mark.django_db(transaction=True, databases="__all__")
Watch = Callable[..., Instruments]


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Return a function that installs the instruments with the test's providers."""
    started: list[tuple[MeterProvider, Instruments]] = []

    def start(*readers: Any, tracers: TracerProvider | None = None) -> Instruments:
        provider = MeterProvider(metric_readers=readers)
        found = Instruments(provider, tracers)
        found.start()
        started.append((provider, found))
        return found

    yield start
    for provider, found in started:
        found.stop()
        provider.shutdown()
    assert counters.observers == []


@pytest.fixture(autouse=True)
def nothing_counted() -> Iterator[None]:
    names = ("reads", "pin_events", "rejected_tokens", "fallbacks", "retries")
    kept = {name: getattr(counters, name).copy() for name in names}
    for name in names:
        getattr(counters, name).clear()
    yield
    for name, before in kept.items():
        getattr(counters, name).clear()
        getattr(counters, name).update(before)


class Metrics(dict[str, Any]):
    """Return the collected metrics by name."""

    def __init__(self, reader: InMemoryMetricReader) -> None:
        data = reader.get_metrics_data()
        scopes = [s for r in data.resource_metrics for s in r.scope_metrics] if data else []
        self.scopes = {scope.scope.name: scope.scope.version for scope in scopes}
        super().__init__({m.name: m for scope in scopes for m in scope.metrics})

    def values(self, name: str) -> dict[tuple[str, ...], Any]:  # type: ignore[override]
        """Return the values by the attributes, sorted by name."""
        points = self[f"pinning_middleware.{name}"].data.data_points if self.has(name) else []
        return {
            tuple(str(value) for _, value in sorted(point.attributes.items())): point.value
            for point in points
        }

    def has(self, name: str) -> bool:
        return f"pinning_middleware.{name}" in self


def happen() -> None:
    """Cause a measurement for every metric."""
    counters.reads["default", "replica1", None, "round_robin"] += 1
    counters.pin_events["set"] += 1
    signals.fell_back_to_primary.send("default", served="default", reason="not_caught_up")
    signals.read_retried.send("default", failed="replica1", served="replica2", error="gone")
    signals.replica_wait_finished.send("default", replica="replica1", seconds=0.01, reached=True)


# Metrics


@with_databases
def test_reads_counter(watch: Watch) -> None:
    reader = InMemoryMetricReader()
    watch(reader)
    enter(None)
    list(Book.objects.all())
    list(Book.objects.all())
    with use_primary():
        list(Book.objects.all())
    list(Book.objects.using("replica1"))
    found = Metrics(reader)
    assert list(found.scopes) == ["pinning_middleware"]
    assert found.scopes["pinning_middleware"]
    metric = found["pinning_middleware.reads"]
    assert (metric.unit, metric.data.is_monotonic) == ("{read}", True)
    keys = {frozenset(point.attributes) for point in metric.data.data_points}
    assert keys == {frozenset(("pool", "alias", "server", "role", "reason"))}
    by_reason: dict[str, int] = {}
    for (_, _, reason, role, _), number in found.values("reads").items():
        by_reason[f"{role} {reason}"] = by_reason.get(f"{role} {reason}", 0) + number
    assert by_reason == {"replica round_robin": 2, "primary use_primary": 1, "replica explicit": 1}


def test_reads_of_a_restarted_server_have_the_same_address(watch: Watch) -> None:
    reader = InMemoryMetricReader()
    watch(reader)
    for started in ("one", "other"):
        server = Server(Identity(started, "10.0.0.7", 5432))
        counters.reads["default", "replica1", server, "round_robin"] += 2
    assert Metrics(reader).values("reads") == {
        ("replica1", "default", "round_robin", "replica", "10.0.0.7:5432"): 4
    }


def test_other_counters(watch: Watch) -> None:
    reader = InMemoryMetricReader()
    watch(reader)
    counters.pin_events["set"] += 3
    counters.rejected_tokens["expired"] += 2
    signals.fell_back_to_primary.send("default", served="default", reason="not_caught_up")
    signals.read_retried.send("default", failed="replica1", served="replica2", error="gone")
    found = Metrics(reader)
    assert found.values("pins") == {("set",): 3, ("inherited",): 0, ("rejected",): 2, ("lost",): 0}
    assert found.values("fallbacks") == {("default", "not_caught_up"): 1}
    assert found.values("retries") == {("replica1", "default", "replica2"): 1}
    units = {name: found[f"pinning_middleware.{name}"].unit for name in ("pins", "retries")}
    assert units == {"pins": "{pin}", "retries": "{retry}"}


def test_wait_histogram(watch: Watch) -> None:
    reader = InMemoryMetricReader()
    watch(reader)
    for seconds, reached in ((0.003, True), (0.2, True), (0.5, False)):
        signals.replica_wait_finished.send(
            "default", replica="replica1", seconds=seconds, reached=reached
        )
    metric = Metrics(reader)["pinning_middleware.wait.duration"]
    assert metric.unit == "s"
    points = {str(point.attributes["reached"]): point for point in metric.data.data_points}
    assert points["True"].count == 2
    assert points["True"].sum == pytest.approx(0.203)
    assert points["True"].attributes == {"pool": "default", "alias": "replica1", "reached": True}
    # Not the default of the SDK, which is for milliseconds.
    assert points["True"].explicit_bounds[0] == 0.001


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Return the states of two replicas and their primary."""
    rows = [
        stats.ServerState("default", "default", "10.0.0.1:5432", "primary", "primary", "in"),
        stats.ServerState(
            "default",
            "replica1",
            "10.0.0.2:5432",
            "replica",
            "replica",
            "in",
            lag=0.5,
            behind_bytes=4096,
            age=0.25,
        ),
        stats.ServerState("default", "replica2", "", "replica", None, "out", reason="unreachable"),
    ]
    monkeypatch.setattr(stats, "servers", lambda: rows)


def test_replica_gauges(watch: Watch, states: None) -> None:
    """Unknown values and primaries have no gauge."""
    reader = InMemoryMetricReader()
    watch(reader)
    found = Metrics(reader)
    one, other = (
        ("replica1", "default", "10.0.0.2:5432"),
        ("replica2", "default", "replica2"),
    )
    assert found.values("replica.lag") == {one: 0.5}
    assert found.values("replica.behind") == {one: 4096}
    assert found.values("replica.in_rotation") == {one: 1, other: 0}
    assert found.values("replica.probe.age") == {one: 0.25}
    units = {name: found[f"pinning_middleware.replica.{name}"].unit for name in ("lag", "behind")}
    assert units == {"lag": "s", "behind": "By"}


# Spans


class Traces:
    """The exported spans of the test's tracer."""

    def __init__(self, **kwargs: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**kwargs)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("the site")

    def found(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._exporter.get_finished_spans()}


def a_read(server: Server | None = None) -> Read:
    return Read("default", "replica1", "replica2", "replica", "failover", "SELECT", server, None)


@with_databases
def test_span_attributes_of_a_read(watch: Watch) -> None:
    traces = Traces()
    watch(tracers=traces.provider)
    enter(None)
    with traces.tracer.start_as_current_span("work"):
        list(Book.objects.all())
    attributes = dict(traces.found()["work"].attributes or {})
    assert is_replica(str(attributes.pop("pinning_middleware.alias")))
    assert attributes == {
        "pinning_middleware.pool": "default",
        "pinning_middleware.role": "replica",
        "pinning_middleware.reason": "round_robin",
    }


@pytest.mark.parametrize("kind", [SpanKind.INTERNAL, SpanKind.CLIENT])
def test_span_server_address(kind: SpanKind) -> None:
    traces = Traces()
    with traces.tracer.start_as_current_span("work", kind=kind):
        annotate(a_read(Server(Identity("", "10.0.0.2", 5432))))
    assert dict(traces.found()["work"].attributes or {}) == {
        "pinning_middleware.pool": "default",
        "pinning_middleware.alias": "replica2",
        "pinning_middleware.role": "replica",
        "pinning_middleware.reason": "failover",
        "pinning_middleware.server.address": "10.0.0.2",
        "pinning_middleware.server.port": 5432,
        "server.address": "10.0.0.2",
        "server.port": 5432,
    }


@pytest.mark.parametrize("kind", [SpanKind.SERVER, SpanKind.CONSUMER])
def test_request_span_keeps_its_address(kind: SpanKind) -> None:
    """In a request span it is the site's address, by the HTTP conventions."""
    traces = Traces()
    span = traces.tracer.start_span("GET", kind=kind, attributes={"server.address": "shop.example"})
    with trace.use_span(span, end_on_exit=True):
        annotate(a_read(Server(Identity("", "10.0.0.2", 5432))))
    attributes = traces.found()["GET"].attributes or {}
    assert attributes["server.address"] == "shop.example"
    assert "server.port" not in attributes
    assert attributes["pinning_middleware.server.address"] == "10.0.0.2"


def test_non_recording_span_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = Traces(sampler=ALWAYS_OFF)
    with traces.tracer.start_as_current_span("work") as span:
        monkeypatch.setattr(
            type(span), "set_attributes", lambda *args: pytest.fail("it was told"), raising=True
        )
        annotate(a_read())
    assert traces.found() == {}


def test_wait_creates_a_span(watch: Watch) -> None:
    traces = Traces()
    watch(tracers=traces.provider)
    with traces.tracer.start_as_current_span("GET"):
        signals.replica_wait_finished.send(
            "default", replica="replica1", seconds=0.25, reached=True
        )
    wait, request = (traces.found()[name] for name in ("pinning_middleware.wait", "GET"))
    assert wait.parent is not None
    assert request.context is not None
    assert wait.parent.span_id == request.context.span_id
    assert wait.end_time is not None
    assert wait.start_time is not None
    assert wait.end_time - wait.start_time == 250_000_000
    assert dict(wait.attributes or {}) == {
        "pinning_middleware.pool": "default",
        "pinning_middleware.alias": "replica1",
        "pinning_middleware.reached": True,
    }
    assert wait.instrumentation_scope is not None
    assert wait.instrumentation_scope.name == "pinning_middleware"


def test_wait_outside_a_trace_creates_no_span(watch: Watch) -> None:
    traces = Traces()
    watch(tracers=traces.provider)
    signals.replica_wait_finished.send("default", replica="replica1", seconds=0.25, reached=True)
    assert traces.found() == {}


# Without an SDK


def test_cost_without_an_sdk() -> None:
    """At most a microsecond: the best of many runs, for busy machines."""
    read = a_read()
    best = min(timeit.repeat(lambda: annotate(read), number=1000, repeat=50)) / 1000
    assert best < 1e-6


APP = """
import sys
{before}
from django.conf import settings
settings.configure(
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}},
    INSTALLED_APPS=["pinning_middleware", "pinning_middleware.contrib.opentelemetry"],
)
import django
django.setup()
from django.db import connection
from pinning_middleware.utils import counters
{after}
with connection.cursor() as cursor:
    cursor.execute("SELECT 1")
print(len(counters.observers), {told})
"""
SDK = """
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
reader = InMemoryMetricReader()
metrics.set_meter_provider(MeterProvider(metric_readers=[reader]))
"""
COLLECTED = (
    "sorted(m.name for r in reader.get_metrics_data().resource_metrics "
    "for s in r.scope_metrics for m in s.metrics)"
)


def run(before: str = "", after: str = "", told: str = "''") -> str:
    """Run the app in a subprocess, because providers can be set only once."""
    code = APP.format(before=before, after=after, told=told)
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("when", ["before", "after"])
def test_app_uses_the_global_provider(when: str) -> None:
    found = run(**{when: SDK}, told=COLLECTED)
    assert found.startswith("1 ")
    assert "'pinning_middleware.reads'" in found


def test_app_without_an_sdk() -> None:
    assert run() == "1"


def test_app_without_the_api() -> None:
    assert run(before="sys.modules['opentelemetry.metrics'] = None") == "0"


# The page

METRIC = re.compile(r"^\| `(pinning_middleware\.[\w.]+)` \| (\w+), (\S+) \| (.*?) \|", re.MULTILINE)
ATTRIBUTE = re.compile(r"`(\w+)`")


def test_metrics_are_documented(watch: Watch, states: None) -> None:
    reader = InMemoryMetricReader()
    watch(reader)
    happen()
    found = Metrics(reader)
    documented = {name: unit for name, _, unit, _ in METRIC.findall(PAGE)}
    assert documented == {name: metric.unit for name, metric in found.items()}
    for name, _, _, attributes in METRIC.findall(PAGE):
        # Attribute, colon, values.
        named = {
            match[1]
            for part in re.split(r", (?=`\w+`(?:,|:|$))", attributes)
            if (match := ATTRIBUTE.match(part))
        }
        for point in found[name].data.data_points:
            assert set(point.attributes) <= named, name


def test_app_is_documented() -> None:
    assert load("how-to/integrations.md", "OpenTelemetry")[""].INSTALLED_APPS == [
        "pinning_middleware",
        "pinning_middleware.contrib.opentelemetry",
    ]


def test_span_attributes_are_documented() -> None:
    table = PAGE.partition("| attribute |")[2].partition("\n\n")[0]
    traces = Traces()
    with traces.tracer.start_as_current_span("work"):
        annotate(a_read(Server(Identity("", "10.0.0.2", 5432))))
    for name in dict(traces.found()["work"].attributes or {}):
        last = name.removeprefix("pinning_middleware.").removeprefix("server.")
        assert f"`{name}`" in table or f"`.{last}`" in table


# The dashboard


@pytest.fixture
def exported(watch: Watch, states: None) -> dict[str, set[str]]:
    """Return the names that the Prometheus exporter writes, with their labels."""
    watch(PrometheusMetricReader())
    happen()
    found: dict[str, set[str]] = {}
    for line in generate_latest(REGISTRY).decode().splitlines():
        if match := re.match(r"(pinning_middleware_\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


def expressions() -> list[str]:
    """Return every query of the dashboard."""
    found: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            found.extend(str(node[key]) for key in ("expr", "query") if key in node)
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(json.loads(DASHBOARD.read_text()))
    return found


def test_dashboard_uses_existing_metrics(exported: dict[str, set[str]]) -> None:
    used = {name for each in expressions() for name in re.findall(r"pinning_middleware_\w+", each)}
    assert used <= set(exported)
    # All metrics are used, except the sum and count of histograms.
    forgotten = {name for name in set(exported) - used if not re.search(r"_(count|sum)$", name)}
    assert forgotten == set()


def test_dashboard_uses_existing_labels(exported: dict[str, set[str]]) -> None:
    labels = {"le", "job", "instance", *(each for known in exported.values() for each in known)}
    for each in expressions():
        for group in re.findall(r"\bby \(([^)]*)\)", each):
            assert {label.strip() for label in group.split(",")} <= labels, each
        for label in re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", each):
            assert label in labels, each


def test_dashboard_panels_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    assert len({panel["id"] for panel in panels}) == len(panels)
