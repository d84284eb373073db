"""Tiers and groups on PostgreSQL, with replicas that are stopped and started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connections
from django.test import override_settings

from pinning_middleware import pin_this_request, tokens, use_replica
from pinning_middleware.pins import PoolKey
from pinning_middleware.scopes.scope import current_scope

from .conftest import (
    PostgreSQL,
    endpoint,
    eventually,
    make_retry_due,
    mark_unreachable,
    pool,
    probe_replicas,
    server,
    server_for,
    unrelated_scope,
    write,
)

pytestmark = pytest.mark.real


@contextmanager
def placed(**replicas: Any) -> Iterator[None]:
    with override_settings(PINNING_REPLICAS={"pg": replicas}):
        yield


@contextmanager
def stopped(pg: PostgreSQL, *aliases: str) -> Iterator[None]:
    """Stop replicas; afterwards start them, and wait until they are back in rotation."""
    for alias in aliases:
        pg[alias].stop()
    try:
        yield
    finally:
        for alias in aliases:
            pg[alias].start()
        pg.wait_for(*aliases)
        for alias in aliases:
            make_retry_due(alias)
        assert eventually(lambda: not any(endpoint(alias).out_of_rotation for alias in aliases))


def of_group(max_lag: float | None = None) -> str:
    with unrelated_scope(), use_replica(group="reports", max_lag=max_lag):
        return server()


def choose(alias: str) -> None:
    """Let the scope have read from this replica."""
    current_scope().keep_replica(PoolKey("pg"), alias)


def seen(read: Callable[[], str]) -> set[str]:
    return {read() for _ in range(4)}


def test_higher_tier_serves_while_the_lower_one_is_stopped(pg: PostgreSQL) -> None:
    with placed(pg1=3, pg2={"weight": 1, "tier": 2}):
        assert seen(lambda: server_for(None)) == {"pg1"}
        with stopped(pg, "pg1"):
            assert seen(lambda: server_for(None)) == {"pg2"}
        assert seen(lambda: server_for(None)) == {"pg1"}


@pytest.mark.parametrize("wait", [0, 0.3])
def test_primary_comes_before_a_higher_tier_for_a_pinned_read(pg: PostgreSQL, wait: float) -> None:
    with placed(pg1=1, pg2={"tier": 2}), override_settings(PINNING_WAIT=wait):
        token = write()
        pg.wait_for()
        assert eventually(lambda: server_for(token) == "pg1")
        with stopped(pg, "pg1"):
            # The first read fails over, the others are decided.
            assert seen(lambda: server_for(token)) == {"pg"}
            with unrelated_scope():
                assert server() == "pg2"
                assert pool().health.probe(connections["pg2"])
                current_scope().inherit(tokens.loads(token))
                assert server() == "pg"
        assert eventually(lambda: server_for(token) == "pg1")


def test_group_fails_over_inside_the_group_and_then_like_use_replica(pg: PostgreSQL) -> None:
    reports = {"groups": ["reports"]}
    with placed(pg1=reports, pg2=reports):
        assert seen(of_group) == {"pg1", "pg2"}
        assert server_for(None) == "pg"
        with stopped(pg, "pg1"):
            assert seen(of_group) == {"pg2"}
    with placed(pg1=1, pg2=reports):
        assert seen(of_group) == {"pg2"}
        assert seen(lambda: server_for(None)) == {"pg1"}
        with stopped(pg, "pg2"):
            assert seen(of_group) == {"pg1"}
        assert seen(of_group) == {"pg2"}


def test_group_is_stale_unless_max_lag_limits_it(pg: PostgreSQL) -> None:
    with placed(pg1=1, pg2={"groups": ["reports"]}):
        pg.pause("pg2")
        token = write()
        with unrelated_scope(token), use_replica(group="reports"):
            assert server() == "pg2"
        assert eventually(lambda: (pool().replica_set.lag("pg2") or 0) > 0.1 or of_group(60) == "")
        assert of_group(60) == "pg2"
        assert of_group(0.05) == "pg1"


@override_settings(PINNING_PRIMARY_DOWN="stale")
def test_replica_of_a_group_does_not_substitute_for_the_primary(pg: PostgreSQL) -> None:
    """Although it is the freshest one."""
    with placed(pg2={"groups": ["reports"]}, pg1=1):
        pg.pause("pg1")
        write()
        pg.wait_for("pg2")
        mark_unreachable("pg")
        with unrelated_scope():
            pin_this_request()
            assert server() == "pg1"


@override_settings(PINNING_BALANCE_BY="user")
def test_pinned_user_reads_their_own_replica_once_it_has_caught_up(pg: PostgreSQL) -> None:
    def read(user: str, own: str) -> str:
        with unrelated_scope(token):
            choose("pg1" if own == "pg2" else "pg2")
            current_scope().balance_key = lambda: user
            return server()

    token = write()
    pg.wait_for()
    probe_replicas()
    for user in map(str, range(8)):
        own = pool().replica_set.rotation.next(key=user) or ""
        assert eventually(lambda user=user, own=own: read(user, own) == own)
        assert {read(user, own) for _ in range(3)} == {own}
