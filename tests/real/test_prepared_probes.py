"""Repeated probes use a prepared statement if that is safe."""

from __future__ import annotations

import pytest
from django.db import connections

from pinning_middleware.servers.probe import probe, state_of

from .conftest import PostgreSQL, as_layout, server_of, write
from .layouts import database, pgbouncer

pytestmark = pytest.mark.real

PREPARED = "SELECT name, generic_plans + custom_plans FROM pg_prepared_statements"


def prepared(alias: str) -> dict[str, int]:
    """Return the prepared statements of a connection, and their numbers of uses."""
    with connections[alias].cursor() as cursor:
        cursor.execute(PREPARED)
        return dict(cursor.fetchall())


def ask(alias: str, times: int) -> None:
    for _ in range(times):
        seen = probe(connections[alias])
        assert seen is not None
        assert seen.report is not None


@pytest.mark.parametrize("alias", ["pg", "pg1"])
def test_repeated_probe_is_prepared(pg: PostgreSQL, alias: str) -> None:
    ask(alias, 2)
    # A short-lived connection probes once or twice, without a prepared statement.
    assert prepared(alias) == {}
    ask(alias, 4)
    assert prepared(alias) == {"pinning_position": 3}


def test_prepared_probe_returns_the_same_as_the_plain_one(pg: PostgreSQL) -> None:
    ask("pg1", 5)
    write()
    pg.wait_for()
    ask("pg", 5)
    ask("pg1", 1)
    assert server_of("pg1").position == connections_position().points


def connections_position() -> object:
    seen = probe(connections["pg"])
    assert seen is not None
    assert seen.report is not None
    return seen.report.written


def test_probe_of_a_reset_session_is_prepared_again(pg: PostgreSQL) -> None:
    ask("pg1", 5)
    with connections["pg1"].cursor() as cursor:
        cursor.cursor.execute("DISCARD ALL")
    ask("pg1", 1)
    assert prepared("pg1") == {}
    ask("pg1", 3)
    assert "pinning_position" in prepared("pg1")


def test_statement_name_in_use_by_the_site_is_not_replaced(pg: PostgreSQL) -> None:
    with connections["pg1"].cursor() as cursor:
        cursor.cursor.execute("PREPARE pinning_position AS SELECT 7")
    ask("pg1", 6)
    assert prepared("pg1") == {"pinning_position": 0}


def test_probe_behind_a_pooler_is_not_prepared(pg: PostgreSQL) -> None:
    with (
        pgbouncer(pg["pg1"]) as bouncer,
        as_layout(pg, pooled=database(bouncer, conn_max_age=None)),
    ):
        ask("pooled", 6)
        assert state_of(connections["pooled"]).behind_pooler
    assert pg["pg1"].execute("SELECT count(*) FROM pg_prepared_statements") == [(0,)]
