"""psycopg2 blocks until its server answers, so that its reads are looked at from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .conftest import PostgreSQL, entries_of, missing
from .layouts import frozen, haproxy
from .sample import ROOT

pytestmark = pytest.mark.real

PROGRAM = """
import sys

sys.modules["psycopg"] = None
from tests.real.psycopg2_site import main

main()
"""


@pytest.fixture
def site(cluster: Any) -> Iterator[subprocess.Popen[str]]:
    with running_site(entries_of(cluster)) as process:
        yield process


@contextmanager
def running_site(entries: dict[str, dict[str, Any]]) -> Iterator[subprocess.Popen[str]]:
    if importlib.util.find_spec("psycopg2") is None:
        missing("psycopg2 is missing: pip install psycopg2-binary")
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "DATABASES_OF_TEST": json.dumps(entries)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def read(site: subprocess.Popen[str], seconds: float = 0) -> int:
    """Return the port of the server that answered a read of so many seconds."""
    return ask(site, f"{seconds}")


def ask(site: subprocess.Popen[str], line: str) -> int:
    assert site.stdin is not None
    assert site.stdout is not None
    site.stdin.write(f"{line}\n")
    site.stdin.flush()
    return int(site.stdout.readline())


def test_position_that_is_queried_at_a_commit_begins_no_transaction(
    pg: PostgreSQL, site: subprocess.Popen[str]
) -> None:
    """Django turns autocommit on again after that, which psycopg2 refuses in a transaction."""
    assert ask(site, "write") == 2


def test_read_of_a_frozen_replica_runs_on_the_primary(
    pg: PostgreSQL, site: subprocess.Popen[str]
) -> None:
    assert read(site) == pg["pg1"].port
    with frozen(pg["pg1"]):
        assert read(site) == pg["pg"].port


def test_slow_read_of_a_replica_that_answers_is_left_alone(
    pg: PostgreSQL, site: subprocess.Popen[str]
) -> None:
    assert read(site, 2) == pg["pg1"].port


def test_lost_connection_is_opened_again(pg: PostgreSQL, site: subprocess.Popen[str]) -> None:
    assert read(site) == pg["pg1"].port
    pg.terminate("pg1")
    assert read(site) == pg["pg1"].port


def test_read_of_a_crashed_replica_runs_on_the_primary(
    pg: PostgreSQL, site: subprocess.Popen[str]
) -> None:
    """The driver has no descriptor for a connection that it has lost, and raises its own error."""
    assert read(site) == pg["pg1"].port
    pg["pg1"].stop("immediate")
    assert [read(site) for _ in range(2)] == [pg["pg"].port] * 2


@pytest.fixture
def balanced(pg: PostgreSQL, cluster: Any) -> Iterator[subprocess.Popen[str]]:
    """Both servers answer new connections, and no connection is identified."""
    entries = entries_of(cluster)
    with haproxy(pg["pg1"], pg["pg2"]) as proxy:
        entries["pg1"] |= {"HOST": proxy.host, "PORT": str(proxy.port)}
        with running_site(entries) as process:
            yield process


def test_read_of_a_frozen_server_behind_a_balancer_runs_on_the_primary(
    pg: PostgreSQL, balanced: subprocess.Popen[str]
) -> None:
    mine = read(balanced)
    with frozen(next(node for node in (pg["pg1"], pg["pg2"]) if node.port == mine)):
        assert read(balanced) == pg["pg"].port


def test_slow_read_of_a_server_behind_a_balancer_is_left_alone(
    pg: PostgreSQL, balanced: subprocess.Popen[str]
) -> None:
    mine = read(balanced)
    with frozen(next(node for node in (pg["pg1"], pg["pg2"]) if node.port != mine)):
        assert read(balanced, 1.5) == mine
