"""django-async-backend: connections of its own, beside those of Django."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest
from django.db import connections

from .conftest import NODES, PostgreSQL

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("django_async_backend") is None,
        reason="django-async-backend requires Django 6.1 and Python 3.12",
    ),
]

TABLE = "CREATE TABLE IF NOT EXISTS async_note (id bigserial PRIMARY KEY, text varchar(40))"


@pytest.fixture
def site(pg: PostgreSQL) -> dict[str, dict[str, Any]]:
    """The entries of DATABASES for a primary and a replica."""
    with connections["pg"].cursor() as cursor:
        cursor.execute(TABLE)
        cursor.execute("TRUNCATE async_note")
    pg.wait_for()
    return {alias: pg.cluster.database(NODES[alias], "site") for alias in ("pg", "pg1")}


def run(scenario: str, site: dict[str, dict[str, Any]]) -> Any:
    return json.loads(
        subprocess.run(
            [
                *(sys.executable, "-m", "tests.real.async_site", scenario),
                *map(json.dumps, site.values()),
            ],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        ).stdout
    )


@pytest.mark.parametrize(
    ("scenario", "found"),
    [
        (
            "transaction",
            [
                "replica1: round_robin",
                "default: transaction",
                "default: transaction",
                "replica1: round_robin",
                "replica1: round_robin",
            ],
        ),
        (
            "own_write",
            [
                "replica1: round_robin",
                "default: wrote",
                "default: not_caught_up",
                "replica1: round_robin",
            ],
        ),
        ("write_in_transaction", [False, True, False, True]),
        ("raw_write", ["default: wrote"] * 3),
        ("guard", ["rejected", "ran", "rejected"]),
        (
            "named_replica",
            [
                "replica1: explicit",
                "default: wrote",
                "replica1: use_replica",
                "replica1: explicit",
            ],
        ),
        ("instances", ["default", "replica1: round_robin"]),
        ("catching_up", "replica1: caught_up"),
        ("another_users_write", [None, "new"]),
        ("session_state", "default: session_state"),
    ],
)
def test_async_connections_are_routed_and_pinned(
    site: dict[str, dict[str, Any]], scenario: str, found: Any
) -> None:
    assert run(scenario, site) == found


def test_primary_replaces_a_replica_that_cannot_be_connected_to(
    pg: PostgreSQL, site: dict[str, dict[str, Any]]
) -> None:
    pg["pg1"].stop("immediate")
    assert run("dead_replica", site) == [
        "default: failover",
        # It is out of rotation.
        "default: no_replica",
        "default: no_replica",
    ]


def test_check_states_what_does_not_hold(site: dict[str, dict[str, Any]]) -> None:
    ((number, text),) = run("checks", site)
    assert number == "pinning_middleware.W033"
    assert "writes pin" in text
    assert "no other failure of a read is retried" in text
