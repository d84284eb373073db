"""pgpool-II between the site and its servers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from django.core.checks import run_checks
from django.db import connections

from .conftest import (
    PostgreSQL,
    as_layout,
    endpoint,
    pool,
    position_in,
    titles,
    write,
)
from .layouts import Place, database, pgpool
from .test_status import check, skip_system_checks

__all__ = ["skip_system_checks"]

pytestmark = pytest.mark.real


def ids(*aliases: str) -> list[str]:
    found = run_checks(tags=["database"], databases=aliases)
    return [message.id[-4:] for message in found if message.id and "pinning" in message.id]


@contextmanager
def as_primary(pg: PostgreSQL, place: Place) -> Iterator[None]:
    with as_layout(pg, one=database(pg["pg1"], conn_max_age=None)):
        connections.settings["site"].update(HOST=place.host, PORT=str(place.port))
        yield
        connections["site"].close()


@pytest.mark.parametrize("mode", ["on", "off"])
def test_balanced_primary_is_an_error(
    pg: PostgreSQL, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pgpool(pg["pg"], pg["pg1"], load_balance_mode=mode) as pooler,
        as_primary(pg, pooler),
    ):
        assert ids("site", "one") == ["E025"] * (mode == "on")
        write("one")
        balanced = [r for r in caplog.records if "pgpool-II" in r.getMessage()]
        assert len(balanced) == (mode == "on")
        assert all(record.levelno == logging.ERROR for record in balanced)
        assert pool().endpoint.splits_reads_and_writes is (mode == "on")


def test_live_check_proves_that_a_standby_answers_for_the_primary(pg: PostgreSQL) -> None:
    with pgpool(pg["pg"], pg["pg1"]) as pooler, as_primary(pg, pooler):
        pg.pause("pg1")
        code, found = check("--timeout", "1")
    assert code == 2
    assert {sample["served"] for sample in found["site"]["samples"]} == {"replica"}


def test_position_of_a_replica_alias_that_is_balanced_does_not_count(pg: PostgreSQL) -> None:
    """A probe meets one standby, and a read the other."""
    with (
        pgpool(pg["pg1"], pg["pg2"]) as pooler,
        as_layout(pg, both=database(pooler, conn_max_age=None)),
    ):
        pg.pause("pg2")
        token = write("one")
        pg.wait_for("pg1")
        assert position_in(token)
        for _ in range(20):
            connections["both"].close()
            assert titles(token) == ["one"]
        assert endpoint("both").splits_reads_and_writes
        assert ids("site", "both") == ["W019"]
