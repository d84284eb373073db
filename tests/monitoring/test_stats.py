"""Counters and server states, without queries."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest
from django.test import override_settings

from pinning_middleware import signals, stats
from pinning_middleware.pins import Position
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers.registry import Identity, Report, Server, registry
from pinning_middleware.stats import DEGRADED, DOWN, OK, ServerState
from pinning_middleware.utils import counters
from tests.app.models import Book


@pytest.fixture(autouse=True)
def counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other modules hold references to these dictionaries, so clear them in place.
    counters.reads.clear()
    counters.pin_events.clear()
    counters.rejected_tokens.clear()
    monkeypatch.setattr(counters, "fallbacks", Counter())
    monkeypatch.setattr(counters, "retries", Counter())
    counters.waits.clear()
    stats.recent_events.clear()


@pytest.fixture(autouse=True)
def reset_registry() -> Any:
    with override_settings(PINNING_SECONDS=15):
        yield


def row(alias: str) -> ServerState:
    (found,) = [each for each in stats.servers() if each.alias == alias]
    return found


def register_server(
    alias: str, address: str = "10.0.0.1", port: int = 5432, **known: Any
) -> Server:
    """Register a server behind an alias, which SQLite files never have."""
    server = registry.register(alias, Identity("today", address, port), "cluster")
    server.last_probed = time.monotonic()
    for name, value in known.items():
        setattr(server, name, value)
    return server


def test_servers_before_any_probe() -> None:
    pools()
    assert [(r.pool, r.alias, r.configured, r.state) for r in stats.servers()] == [
        ("default", "default", "primary", "unknown"),
        ("default", "replica1", "replica", "unknown"),
        ("default", "replica2", "replica", "unknown"),
    ]
    one = row("replica1")
    assert one.address.endswith("replica1.sqlite3")
    assert (one.role, one.since, one.weight, one.reads, one.error) == (None, None, 1, 0, "")
    assert (one.position, one.behind_bytes, one.lag, one.age, one.retry_in) == (None,) * 5


@pytest.mark.django_db(databases=["default", "replica1", "replica2"], transaction=True)
def test_servers_after_a_read() -> None:
    list(Book.objects.using("replica1"))
    Book.objects.using("default").exists()
    assert row("replica1")[5:7] == ("in", "")
    assert (row("replica1").reads, row("replica2").state) == (1, "unknown")
    assert stats.get_stats()["reads"]["default"]["replica1"] == {"": {"explicit": 1}}


def test_servers_several_behind_one_alias() -> None:
    pools()
    register_server("replica1", "10.0.0.1", lag=0.5, is_replica=True)
    lagging = register_server("replica1", "10.0.0.2", is_replica=True)
    registry.set_status(lagging, Fault.LAG)
    counters.reads["default", "replica1", lagging, Reason.ROUND_ROBIN] += 3
    first, second = [each for each in stats.servers() if each.alias == "replica1"]
    assert (first.address, first.state, first.reason, first.lag) == ("10.0.0.1:5432", "in", "", 0.5)
    assert (second.address, second.state, second.reason) == ("10.0.0.2:5432", "out", "lag")
    assert (first.reads, second.reads) == (0, 3)
    assert second.since == pytest.approx(time.time(), abs=5)


def test_freshest_replica_is_in_rotation_if_all_lag() -> None:
    pools()
    for alias, port, lag in (("replica1", 1, 7.0), ("replica2", 2, 6.0)):
        registry.set_status(register_server(alias, port=port, lag=lag, is_replica=True), Fault.LAG)
    assert (row("replica1").state, row("replica1").reason) == ("out", "lag")
    freshest = row("replica2")
    assert (freshest.state, freshest.reason, freshest.retry_in) == ("in", "", None)
    assert freshest.error == "lags, but serves because no other replica is in rotation"
    assert stats.health(stats.servers()) == DEGRADED
    registry.set_status(register_server("replica1", port=1), None)
    assert (row("replica2").state, row("replica2").error) == ("out", Fault.LAG.description)


def test_servers_unreachable_endpoint() -> None:
    pools()
    register_server("replica1", is_replica=True)
    registry.mark_down(registry.endpoint("replica1", "default"), Fault.UNREACHABLE, 10, "refused")
    out = row("replica1")
    assert (out.state, out.reason, out.error) == ("out", "unreachable", "refused")
    assert out.retry_in is not None
    assert 9 < out.retry_in < 13


def test_servers_one_of_several_out_has_a_time_of_its_retry() -> None:
    pools()
    for port in (1, 2):
        server = register_server("replica1", port=port)
    registry.set_status(server, Fault.LAG, retry_in=5)
    retries = {each.address: each.retry_in for each in stats.servers() if each.alias == "replica1"}
    assert retries["10.0.0.1:1"] is None
    assert retries["10.0.0.1:2"] == pytest.approx(5, abs=1)


def test_servers_weight_zero_is_drained_unless_faulty() -> None:
    with override_settings(PINNING_REPLICAS={"default": {"replica1": 1, "replica2": 0}}):
        pools()
        assert row("replica2").state == "unknown"
        register_server("replica2", is_replica=True)
        assert row("replica2")[5:7] == ("out", "drained")
        registry.mark_down(registry.endpoint("replica2", "default"), Fault.UNRESPONSIVE, 10, "")
        assert row("replica2").reason == "unresponsive"


@pytest.mark.parametrize(
    ("vendor", "system", "way", "position", "text"),
    [
        ("postgresql", "7", 0, {"7-1": 0x1_0300_0148}, "1/3000148"),
        ("postgresql", "7", 1, {"7x-1": 744}, "744"),
        ("mysql", "mariadb", 0, {"0-1": 8, "1-2": 3}, "0-1-8,1-2-3"),
        ("mysql", "mysql", 0, {"3e11fa47": 5}, "3e11fa47:1-5"),
        ("mysql", "mysql", 0, {}, None),
    ],
)
def test_format_position(
    vendor: str, system: str, way: int, position: dict[str, int], text: str | None
) -> None:
    server = Server(Identity("today", "10.0.0.1", 1), system)
    server.strategy = way
    server.apply_report(Report(True, position), time.monotonic())
    assert stats.format_position(server, vendor) == text


def test_servers_behind_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "_vendor", lambda alias: "postgresql")
    pools()
    primary, replica = register_server("default", "10.0.0.9"), register_server("replica1")
    report = Report(False, {"c-1": 5000}, Position({"c-1": 5000}))
    primary.apply_report(report, time.monotonic())
    replica.apply_report(Report(True, {"c-1": 4000}), time.monotonic())
    assert row("replica1").behind_bytes == 1000
    assert row("default").behind_bytes is None
    assert row("replica1").role == "replica"
    assert row("default").role == "primary"
    replica.apply_report(Report(True, {"c-1": 6000}), time.monotonic())
    assert row("replica1").behind_bytes == 0


def test_servers_ipv6_address() -> None:
    pools()
    register_server("replica1", "2001:db8::1")
    assert row("replica1").address == "[2001:db8::1]:5432"


def test_servers_replica_alias_of_the_primary_has_an_error() -> None:
    pools()
    primary = register_server("default", "10.0.0.9", is_replica=False)
    register_server("replica1", "10.0.0.9", is_replica=False)
    assert row("replica1").error == "it is connected to the primary (default), not to a replica"
    assert row("default").error == ""
    assert stats.health(stats.servers()) != stats.OK
    assert primary in registry.endpoint("replica1", "default").recent_servers


def test_servers_alias_of_primary_and_replica_has_no_error() -> None:
    pools()
    register_server("default", "10.0.0.9", is_replica=False)
    register_server("replica1", "10.0.0.9", is_replica=False)
    register_server("replica1", "10.0.0.1", is_replica=True)
    assert [each.error for each in stats.servers() if each.alias == "replica1"] == ["", ""]


# Counters


def test_get_stats_counts_signals() -> None:
    for _ in range(2):
        signals.fell_back_to_primary.send("default", served="default", reason="not_caught_up")
    signals.read_retried.send(
        "default", failed="replica1", served="replica2", error=OSError("gone\nfor good")
    )
    signals.replica_wait_finished.send("default", replica="replica1", seconds=0.25, reached=True)
    signals.replica_wait_finished.send("default", replica="replica1", seconds=0.5, reached=False)
    signals.replica_removed.send("default", replica="replica1", reason="unreachable", seconds=10)
    signals.replica_restored.send("default", replica="replica1")
    known = stats.get_stats()
    assert known["fallbacks"] == {"default": {"not_caught_up": 2}}
    assert known["retries"] == {"default": {"replica1": {"replica2": 1}}}
    assert known["waits"] == {"default": {"count": 2, "reached": 1, "seconds": 0.75}}
    assert [event[1:] for event in stats.recent_events] == [
        ("fell_back_to_primary", "default", "", "default", "not_caught_up", 2),
        ("read_retried", "default", "replica1", "replica2", "gone", 1),
        ("replica_removed", "default", "replica1", "", "unreachable", 1),
        ("replica_restored", "default", "replica1", "", "", 1),
    ]


def test_get_stats_ignores_retries_on_the_same_alias() -> None:
    signals.read_retried.send("default", failed="replica1", served="replica1", error="gone")
    assert stats.get_stats()["retries"] == {}
    assert list(stats.recent_events) == []


def test_get_stats_pins_and_tokens() -> None:
    counters.pin_events["set"] += 2
    counters.rejected_tokens["signature"] += 1
    known = stats.get_stats()
    assert known["pins"] == {"set": 2, "inherited": 0, "rejected": 1, "lost": 0}
    assert known["rejected"] == {"signature": 1}


def test_get_stats_inherited_pins() -> None:
    counters.pin_events["inherited"] += 4
    assert stats.get_stats()["pins"]["inherited"] == 4


def test_get_stats_and_servers_are_json_serialisable() -> None:
    pools()
    server = register_server("replica1")
    counters.reads["default", "replica1", server, Reason.ROUND_ROBIN] += 1
    counters.reads["default", "replica1", None, Reason.ROUND_ROBIN] += 2
    assert json.loads(json.dumps(stats.get_stats()))["reads"] == {
        "default": {"replica1": {"10.0.0.1:5432": {"round_robin": 1}, "": {"round_robin": 2}}}
    }
    assert json.loads(json.dumps([each._asdict() for each in stats.servers()]))


# Health


def state(configured: Any, state: Any = "in", **more: Any) -> ServerState:
    return ServerState("default", configured, "", configured, None, state, **more)


WELL_PRIMARY, WELL_REPLICA = state("primary"), state("replica")


@pytest.mark.parametrize(
    ("rows", "health"),
    [
        ([], OK),
        ([WELL_PRIMARY, WELL_REPLICA], OK),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", "out", reason="unreachable")], DEGRADED),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", "out", reason="drained")], OK),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", "unknown")], DEGRADED),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", lag=14.0)], OK),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", lag=16.0)], DEGRADED),
        ([WELL_PRIMARY, WELL_REPLICA, state("replica", error="paused")], DEGRADED),
        ([WELL_PRIMARY, state("replica", "out", reason="drained")], DOWN),
        ([state("primary", "out", reason="unresponsive"), WELL_REPLICA], DOWN),
        ([WELL_PRIMARY._replace(role="replica"), WELL_REPLICA], DOWN),
        ([WELL_PRIMARY], DOWN),
    ],
)
def test_health_check(rows: list[ServerState], health: int) -> None:
    assert stats.health(rows) == health


def test_health_uses_max_lag() -> None:
    late = [WELL_PRIMARY, WELL_REPLICA, state("replica", lag=3.0)]
    with override_settings(PINNING_MAX_LAG=2):
        assert stats.health(late) == DEGRADED
    with override_settings(PINNING_MAX_LAG=60):
        assert stats.health([*late, state("replica", lag=16.0)]) == OK


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119, "119 s"), (120, "2 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert stats.format_duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (16_000_000, "16 MB")]
)
def test_format_size(number: int, text: str) -> None:
    assert stats.format_size(number) == text


def test_replica_of_a_group_does_not_serve_for_others_that_are_out() -> None:
    down = state("replica", "out", reason="unreachable")
    late = state("replica", "out", reason="lag", lag=16.0, groups=("reports",))
    rows = [WELL_PRIMARY, down, late]
    assert stats.with_freshest_serving(rows) == rows
    assert stats.health(rows) == DOWN
