"""A cluster of Patroni behind HAProxy, while clients write and read."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest
from django.db import Error, close_old_connections, connections

from pinning_middleware.scopes.scope import enter
from tests.app.models import Book

from .conftest import as_databases, eventually, make_tables, unrelated_scope
from .layouts import Member, PatroniCluster, database, patroni_cluster

pytestmark = pytest.mark.real

CLIENTS = 4
# After each write: some before the replicas have caught up, some afterwards.
READS = 40
READ = """
SELECT 1 AS id, inet_server_port() AS port,
    ARRAY(SELECT title FROM app_book WHERE title LIKE %s) AS titles
"""
# Seconds: a leader that was killed is replaced after 20, and HAProxy and Patroni look each second.
DEADLINE = 40


class Seen(NamedTuple):
    """A read: what its client had been told is written before it, and what the read returned."""

    acknowledged: frozenset[str]
    titles: frozenset[str]
    port: int


class Client:
    """A user who writes, and reads several times, again and again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.acknowledged: frozenset[str] = frozenset()
        self.reads: list[Seen] = []
        self.errors: list[Error] = []
        self._token: str | None = None
        self._tries = 0

    def run(self, over: threading.Event) -> None:
        try:
            while not over.is_set():
                # As each request does.
                close_old_connections()
                # Servers that are replaced meanwhile refuse.
                try:
                    self._write()
                    for _ in range(READS):
                        self._read()
                except Error as error:
                    self.errors.append(error)
                    over.wait(0.05)
        finally:
            with suppress(Error):
                connections.close_all()

    def _write(self) -> None:
        self._tries += 1
        title = f"{self.name}-{self._tries}"
        with unrelated_scope(self._token) as scope:
            Book.objects.create(title=title)
        self._token = scope.token
        self.acknowledged |= {title}

    def _read(self) -> None:
        before = self.acknowledged
        with unrelated_scope(self._token):
            (row,) = Book.objects.raw(READ, [f"{self.name}-%"])
        self.reads.append(Seen(before, frozenset(row.titles), row.port))


@contextmanager
def site(cluster: PatroniCluster) -> Iterator[None]:
    entries = {
        "site": database(cluster.primary, name="postgres", conn_max_age=None),
        "replicas": database(cluster.replicas, name="postgres", conn_max_age=None),
    }
    with as_databases(entries):
        make_tables("site")
        enter(None)
        yield


@contextmanager
def clients() -> Iterator[list[Client]]:
    them = [Client(f"client{number}") for number in range(CLIENTS)]
    over = threading.Event()
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(each.run, over) for each in them]
        try:
            yield them
        finally:
            over.set()
    for each in running:
        each.result()


def all_write(them: list[Client]) -> bool:
    """Return whether each client can write within the deadline."""
    before = [each.acknowledged for each in them]
    return eventually(
        lambda: all(each.acknowledged > old for each, old in zip(them, before, strict=True)),
        DEADLINE,
    )


def replicas_serve(them: list[Client], leader: Member) -> bool:
    """Return whether a server other than the leader answers a read of each client in time."""
    starts = [len(each.reads) for each in them]
    return eventually(
        lambda: all(
            any(seen.port != leader.port for seen in each.reads[start:])
            for each, start in zip(them, starts, strict=True)
        ),
        DEADLINE,
    )


def titles_on(member: Member) -> frozenset[str]:
    return frozenset(title for (title,) in member.execute("SELECT title FROM app_book"))


def stale(reads: Iterable[Seen], surviving: frozenset[str]) -> list[Seen]:
    return [seen for seen in reads if not seen.acknowledged & surviving <= seen.titles]


def test_sessions_read_their_writes_through_switchover_and_death_of_the_leader(
    django_db_setup: None, django_db_blocker: Any
) -> None:
    """
    A switchover loses no write, and each read has all that its session wrote before. A leader that
    is killed takes with it what it had not sent to a replica. A later read has all the rest.
    """
    # A replica is always behind, so that a read there right after a write would be stale.
    with (
        django_db_blocker.unblock(),
        patroni_cluster(3, recovery_min_apply_delay="200ms") as cluster,
        site(cluster),
    ):
        first = cluster.leader
        assert first is not None
        with clients() as them:
            assert all_write(them)
            assert replicas_serve(them, first)
            second = cluster.switchover()
            assert all_write(them)
            assert replicas_serve(them, second)
            acknowledged = frozenset[str]().union(*(each.acknowledged for each in them))
            assert acknowledged <= titles_on(second)
            until_then = [seen for each in them for seen in each.reads]
            second.kill()
            assert all_write(them)
            third = cluster.leader
            assert third not in (None, second)
            assert replicas_serve(them, third)
        surviving = titles_on(third)
        everything = frozenset[str]().union(*(each.acknowledged for each in them))
    assert stale(until_then, everything) == []
    assert stale((seen for each in them for seen in each.reads), surviving) == []
