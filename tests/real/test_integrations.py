"""Integrations for monitoring and debugging, on a cluster whose servers fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.http import HttpResponse
from health_check.exceptions import ServiceUnavailable, ServiceWarning
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pinning_middleware.contrib.health_check import Replicas
from pinning_middleware.contrib.opentelemetry.instruments import Instruments
from tests.app.models import Book
from tests.conftest import Browser
from tests.contrib.test_debug_toolbar import installed, last
from tests.real.conftest import (
    PostgreSQL,
    eventually,
    make_retry_due,
    probe_replicas,
    unrelated_scope,
    write,
)

pytestmark = pytest.mark.real

OTHER = {"pg1": "pg2", "pg2": "pg1"}
PAGE = "<html><body>done</body></html>"


@pytest.fixture
def toolbar(pg: PostgreSQL) -> Iterator[None]:
    with installed():
        yield


def titles(request: Any) -> HttpResponse:
    found = list(Book.objects.order_by("title").values_list("title", flat=True))
    return HttpResponse(f"{PAGE}<!-- {json.dumps(found)} -->")


@pytest.fixture
def two_reads(
    browser: Browser, do: Callable[..., str], toolbar: None
) -> Callable[[Callable[[str], None]], str]:
    """Return a function that takes down the replica of a request between two reads."""

    def visit(break_down: Callable[[str], None]) -> str:
        chosen: list[str] = []

        def act(request: Any) -> HttpResponse:
            list(Book.objects.filter(title="first"))
            chosen.append(Book.objects.db)
            break_down(chosen[0])
            return titles(request)

        response = browser.get(f"/sync/{do(act)}/")
        assert response.status_code == 200
        assert '["new"]' in response.content.decode()
        return chosen[0]

    return visit


def test_both_panels_after_a_replica_failed(pg: PostgreSQL, two_reads: Any) -> None:
    """The SQL panel shows the failed alias, the package's panel the server of the read."""
    write()
    pg.wait_for()
    failed = two_reads(lambda alias: pg[alias].stop("immediate"))
    first, second = last()["reads"]
    assert (first["served"], first["reason"]) == (failed, "round_robin")
    assert (second["alias"], second["served"], second["reason"]) == (
        failed,
        OTHER[failed],
        "failover",
    )
    assert [query["alias"] for query in last("SQLPanel")["queries"]] == [failed, failed]
    state = {row["alias"]: row for row in last()["servers"]}
    assert (state[failed]["state"], state[failed]["reason"]) == ("out", "unreachable")


def test_both_panels_after_a_lost_connection(pg: PostgreSQL, two_reads: Any) -> None:
    write()
    pg.wait_for()
    lost = two_reads(pg.terminate)
    assert [read["served"] for read in last()["reads"]] == [lost, lost]
    assert [query["alias"] for query in last("SQLPanel")["queries"]] == [lost, lost]


def test_both_panels_with_replicas_down_from_the_start(
    pg: PostgreSQL, browser: Browser, do: Callable[..., str], toolbar: None
) -> None:
    """The alias has no connection that the SQL panel could query."""
    write()
    pg.wait_for()
    for alias in ("pg1", "pg2"):
        pg[alias].stop("immediate")
    response = browser.get(f"/sync/{do(titles)}/")
    assert response.status_code == 200
    assert '["new"]' in response.content.decode()
    (read,) = last()["reads"]
    assert read["served"] == "pg"
    assert (read["alias"], read["reason"]) in {("pg1", "failover"), ("pg2", "failover")}
    (query,) = last("SQLPanel")["queries"]
    assert query["alias"] == "pg"


def test_panel_shows_the_outgoing_position(
    pg: PostgreSQL, browser: Browser, do: Callable[..., str], toolbar: None
) -> None:
    def act(request: Any) -> HttpResponse:
        Book.objects.create(title="new")
        return HttpResponse(PAGE)

    def end_of_log() -> int:
        return int(pg["pg"].execute("SELECT pg_current_wal_insert_lsn() - '0/0'")[0][0])

    before = end_of_log()
    browser.get(f"/sync/{do(act)}/")
    (pin,) = last()["pins"]["outgoing"]
    high, _, low = pin["position"].partition("/")
    assert before < (int(high, 16) << 32) + int(low, 16) <= end_of_log()
    pg.wait_for()
    browser.get(f"/sync/{do(titles)}/")
    (read,) = last()["reads"]
    assert read["reason"] == "caught_up"
    (carried,) = last()["pins"]["inherited"]
    assert carried["position"] == pin["position"]


# django-health-check


def health(**options: Any) -> Any:
    return asyncio.run(Replicas(pool="pg", **options).get_result()).error


def test_health_check(pg: PostgreSQL) -> None:
    assert health(min_replicas=2, max_lag=10) is None
    pg["pg1"].stop("immediate")
    assert type(health(min_replicas=2)) is ServiceWarning
    assert health() is None
    pg["pg2"].stop("immediate")
    assert type(health()) is ServiceUnavailable
    pg["pg1"].start()
    assert eventually(lambda: health() is None)


def test_health_check_of_a_frozen_replica(pg: PostgreSQL) -> None:
    """Within the timeout of a check."""
    probe_replicas()
    pg["pg1"].freeze()
    try:
        error = health(min_replicas=2)
    finally:
        pg["pg1"].thaw()
    assert type(error) is ServiceWarning
    assert "pg1: unresponsive" in error.message or "pg1: unreachable" in error.message


def test_health_check_of_a_lagging_replica(pg: PostgreSQL) -> None:
    assert health(min_replicas=2, max_lag=1) is None
    pg.pause("pg1")
    write()

    def lags() -> bool:
        write()
        error = health(min_replicas=2, max_lag=1)
        return type(error) is ServiceWarning and "s behind" in error.message

    assert eventually(lags, 30)
    pg.resume("pg1")
    assert health(min_replicas=2, max_lag=1) is None


def test_health_check_closes_its_connections(pg: PostgreSQL) -> None:
    count = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'site'"
    before = pg["pg1"].execute(count)[0][0]
    for _ in range(3):
        assert health(min_replicas=2) is None
    assert eventually(lambda: pg["pg1"].execute(count)[0][0] <= before, 10)


# OpenTelemetry


def test_opentelemetry_on_real_servers(pg: PostgreSQL) -> None:
    reader, exporter = InMemoryMetricReader(), InMemorySpanExporter()
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(exporter))
    metrics = MeterProvider(metric_readers=[reader])
    instruments = Instruments(metrics, tracers)
    instruments.start()
    try:
        write()
        pg.wait_for()
        span = tracers.get_tracer("the site").start_span("work")
        with trace.use_span(span, end_on_exit=True), unrelated_scope():
            list(Book.objects.all())
        data = reader.get_metrics_data()
    finally:
        instruments.stop()
        metrics.shutdown()
    (found,) = exporter.get_finished_spans()
    attributes = dict(found.attributes or {})
    alias = str(attributes["pinning_middleware.alias"])
    assert attributes["server.port"] == pg[alias].port
    assert data is not None
    points = {
        metric.name: list(metric.data.data_points)
        for scopes in data.resource_metrics
        for scope in scopes.scope_metrics
        for metric in scope.metrics
    }
    places = {dict(point.attributes)["server"] for point in points["pinning_middleware.reads"]}
    assert f"{attributes['server.address']}:{pg[alias].port}" in places
    rotation = points["pinning_middleware.replica.in_rotation"]
    assert {str(dict(p.attributes)["alias"]): p.value for p in rotation} == {"pg1": 1, "pg2": 1}


def test_opentelemetry_gauges_of_a_paused_and_a_stopped_replica(pg: PostgreSQL) -> None:
    reader = InMemoryMetricReader()
    metrics = MeterProvider(metric_readers=[reader])
    Instruments(metrics)
    probe_replicas()
    pg.pause("pg1")
    pg["pg2"].stop("immediate")
    write()
    with unrelated_scope(write()):
        list(Book.objects.all())
    data = reader.get_metrics_data()
    metrics.shutdown()
    assert data is not None
    points = {
        metric.name.removeprefix("pinning_middleware.replica."): {
            str(dict(point.attributes or {})["alias"]): point.value  # type: ignore[union-attr]
            for point in metric.data.data_points
        }
        for scopes in data.resource_metrics
        for scope in scopes.scope_metrics
        for metric in scope.metrics
        if ".replica." in metric.name
    }
    assert points["in_rotation"] == {"pg1": 1, "pg2": 0}
    assert points["behind"]["pg1"] > 0
    assert 0 <= points["probe.age"]["pg1"] < 30
    pg["pg2"].start()
    make_retry_due("pg2")
