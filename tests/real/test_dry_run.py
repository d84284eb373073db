"""A dry run on a primary of PostgreSQL, whose pins have positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import OperationalError, connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from pinning_middleware import dry_run_report, pin_this_request
from pinning_middleware.handoff import has_caught_up
from pinning_middleware.routing import primary_connections
from pinning_middleware.servers import monitor
from pinning_middleware.stores import dry_run_counts
from pinning_middleware.testing import advance_window
from pinning_middleware.testing.clock import reset_window
from pinning_middleware.utils import counters
from tests.app.models import Book
from tests.real.conftest import PostgreSQL, pool, unrelated_scope

pytestmark = pytest.mark.real

LAG = 5


@pytest.fixture(autouse=True)
def dry_run(pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dry_run_counts, "has_thread", True)
    with override_settings(PINNING_REPLICAS=[], PINNING_DRY_RUN={"pg": LAG}):
        counters.missed_writes.clear()
        yield
    reset_window()


def write() -> str:
    with unrelated_scope() as scope:
        Book.objects.create(title="new")
        token = scope.token
    assert token is not None
    counters.reads.clear()
    return token


def read(token: str | None = None) -> dict[str, int]:
    """Read in a scope of its own, and return what was counted."""
    counters.reads.clear()
    with unrelated_scope(token):
        Book.objects.count()
    (found,) = dry_run_report.of_this_process()
    return dict(found.reasons)


def missed() -> int:
    (found,) = dry_run_report.of_this_process()
    return found.missed_writes


def test_pinned_read_could_go_to_a_replica_once_the_lag_has_passed(pg: PostgreSQL) -> None:
    token = write()
    assert read(token) == {"not_caught_up": 1}
    assert missed() == 1
    advance_window(LAG)
    assert read(token) == {"caught_up": 1}
    # A position counts after the window, too.
    advance_window(30)
    assert read(token) == {"caught_up": 1}
    assert read() == {"round_robin": 1}
    assert missed() == 1


def test_read_that_would_wait_is_not_delayed_and_counts_as_a_missed_write(pg: PostgreSQL) -> None:
    token = write()
    with override_settings(PINNING_WAIT=LAG + 1):
        assert read(token) == {"caught_up": 1}
        advance_window(LAG - 1)
        assert read(token) == {"caught_up": 1}
        assert missed() == 2
        advance_window(1)
        assert read(token) == {"caught_up": 1}
        assert missed() == 2


def test_manual_pin_delays_reads_and_is_no_write(pg: PostgreSQL) -> None:
    with unrelated_scope() as scope:
        pin_this_request()
        token = scope.token
    assert read(token) == {"not_caught_up": 1}
    advance_window(LAG)
    assert read(token) == {"caught_up": 1}
    assert missed() == 0


def test_reads_cost_no_query_and_no_monitor(pg: PostgreSQL) -> None:
    token = write()
    with CaptureQueriesContext(connections["pg"]) as queries:
        read(token)
        read()
    assert len(queries) == 2
    assert not monitor._monitors


def test_primary_that_is_down_raises_its_own_error(pg: PostgreSQL) -> None:
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        assert read() == {"round_robin": 1}
        pg["pg"].stop("immediate")
        connections["pg"].close()
        for _ in range(3):
            with pytest.raises(OperationalError):
                read()
            with pytest.raises(OperationalError), connections["pg"].cursor() as cursor:
                cursor.execute("SHOW server_version")
        pg["pg"].start()
        # It is not out of rotation.
        assert read() == {"round_robin": 1}


def test_connections_of_a_pinned_client_are_not_probed(
    pg: PostgreSQL, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = write()
    connections["pg"].close()
    read()
    monkeypatch.setattr(primary_connections, "FRESH_FOR", 0.0)
    probed: list[Any] = []
    monkeypatch.setattr(pool().primary_connections, "_probe", probed.append)
    with unrelated_scope(token):
        Book.objects.create(title="newer")
    assert not probed


def test_task_is_not_requeued_until_the_assumed_replica_has_caught_up(pg: PostgreSQL) -> None:
    with unrelated_scope(write()):
        assert has_caught_up()
