"""Reads fail over to another server only if that changes nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from django.db import OperationalError, connections, transaction
from django.db.backends.signals import connection_created
from django.test import override_settings
from psycopg import sql

from pinning_middleware import ignore_writes, no_failover, use_replica
from pinning_middleware.pins import PoolKey
from pinning_middleware.scopes.scope import current_scope
from tests.app.models import Book

from .conftest import (
    PostgreSQL,
    SentSignals,
    as_layout,
    mark_unreachable,
    pool,
    pooled,
    port,
    server,
    titles,
    unrelated_scope,
    write,
)
from .layouts import database, make_role

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
WHICH = "SELECT inet_server_port()"


def run(alias: str, statement: Any) -> list[Any]:
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


# The session of the site

ALTERATIONS = {
    "SET": "SET search_path = public",
    "set_config": "SELECT set_config('my.tenant', '7', false)",
    "SET ROLE": "SET ROLE postgres",
    "advisory lock": "SELECT pg_advisory_lock_shared(7)",
    "DECLARE": "DECLARE one CURSOR WITH HOLD FOR SELECT 1",
}
MILD = {
    "SHOW": "SHOW search_path",
    "set_config for a transaction": "SELECT set_config('my.tenant', '7', true)",
    "SELECT": "SELECT 1",
}


@pytest.mark.parametrize("statement", ALTERATIONS.values(), ids=list(ALTERATIONS))
def test_read_in_a_modified_session_is_not_retried_elsewhere(
    pg: PostgreSQL, sent_signals: SentSignals, statement: str
) -> None:
    """Privileges, settings or locks would differ there, so the error propagates."""
    with unrelated_scope(), no_failover():
        run("pg1", statement)
    pg.terminate("pg1")
    with unrelated_scope(), pytest.raises(OperationalError):
        run("pg1", WHICH)
    assert sent_signals.of("read_retried") == []
    connections["pg1"].close()
    # A new session is not modified yet.
    with unrelated_scope():
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
        pg.terminate("pg1")
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
    assert sent_signals.of("read_retried") == []


def test_read_is_not_moved_to_a_connection_with_a_modified_session(pg: PostgreSQL) -> None:
    with unrelated_scope(), no_failover():
        run("pg2", "SET work_mem = '65kB'")
    pg["pg1"].stop("immediate")
    with unrelated_scope():
        assert run("pg1", WHICH) == [(pg["pg"].port,)]
    connections["pg2"].close()


@pytest.mark.parametrize("statement", ["LISTEN news", "PREPARE one AS SELECT 1"])
def test_primary_with_a_modified_session_has_no_substitute(
    pg: PostgreSQL, sent_signals: SentSignals, statement: str
) -> None:
    with override_settings(PINNING_PRIMARY_DOWN="stale"), unrelated_scope():
        with ignore_writes():
            run("pg", statement)
        pg.terminate("pg")
        with pytest.raises(OperationalError):
            run("pg", WHICH)
        connections["pg"].close()
        assert run("pg", WHICH) == [(pg["pg"].port,)]
        pg["pg"].stop("immediate")
        assert run("pg", WHICH) != [(pg["pg"].port,)]
    assert len(sent_signals.of("read_retried")) == 1


@pytest.mark.parametrize("statement", MILD.values(), ids=list(MILD))
def test_read_in_an_unmodified_session_is_retried_elsewhere(
    pg: PostgreSQL, sent_signals: SentSignals, statement: str
) -> None:
    with unrelated_scope():
        run("pg1", statement)
        pg["pg1"].stop("immediate")
        assert run("pg1", WHICH) == [(pg["pg2"].port,)]
    assert len(sent_signals.of("read_retried")) == 1


@pytest.fixture
def receiver() -> Iterator[None]:
    """Configure every connection in a receiver, as sites do."""

    def set_up(connection: Any, **kwargs: Any) -> None:
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET statement_timeout = '30s'")

    connection_created.connect(set_up)
    yield
    connection_created.disconnect(set_up)


@pytest.mark.usefixtures("receiver")
def test_settings_of_every_connection_do_not_modify_the_session(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    for alias in REPLICAS:
        connections[alias].close()
    with unrelated_scope():
        assert run("pg1", "SHOW statement_timeout") == [("30s",)]
        pg["pg1"].stop("immediate")
        assert run("pg1", WHICH) == [(pg["pg2"].port,)]
        assert run("pg1", "SHOW statement_timeout") == [("30s",)]
    assert sent_signals.of("read_retried")[0]["served"] == "pg2"


@pytest.mark.usefixtures("receiver")
def test_settings_of_every_pooled_connection_do_not_modify_the_session(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """The settings are applied again at each checkout."""
    with as_layout(pg, r1=pooled(pg["pg1"]), r2=pooled(pg["pg2"])):
        for _ in range(3):
            with unrelated_scope():
                assert run("r1", WHICH) == [(pg["pg1"].port,)]
            connections["r1"].close()
        with unrelated_scope():
            run("r1", WHICH)
            pg["pg1"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg2"].port,)]
    assert sent_signals.of("read_retried")[0]["served"] == "r2"


@pytest.mark.usefixtures("receiver")
def test_modified_session_stays_modified_in_a_pool(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    with as_layout(pg, r1=pooled(pg["pg1"]), r2=pooled(pg["pg2"])):
        with unrelated_scope(), no_failover():
            run("r1", "SET search_path = public")
            connections["r1"].close()
            connections["r1"].ensure_connection()
        pg["pg1"].stop("immediate")
        with unrelated_scope(), pytest.raises(OperationalError):
            run("r1", WHICH)
    assert sent_signals.of("read_retried") == []


# The settings of the aliases


OTHER_SESSIONS: dict[str, dict[str, Any]] = {
    "options": {"options": {"options": "-c search_path=tenant,public"}},
    "assume_role": {"options": {"assume_role": "site_plain"}},
    "isolation_level": {"options": {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE}},
    "user": {"user": "site_plain"},
}


@pytest.mark.parametrize("more", OTHER_SESSIONS.values(), ids=list(OTHER_SESSIONS))
@pytest.mark.parametrize("connected", [True, False])
def test_error_propagates_if_aliases_are_not_interchangeable(
    pg: PostgreSQL, sent_signals: SentSignals, more: dict[str, Any], connected: bool
) -> None:
    """Neither the other replica nor the primary would run it with the same privileges."""
    make_role(pg.cluster)
    with as_layout(
        pg,
        r1=database(pg["pg1"], conn_max_age=None, **more),
        r2=database(pg["pg2"], conn_max_age=None),
    ):
        if connected:
            with no_failover():
                run("r1", WHICH)
        pg["pg1"].stop("immediate")
        with unrelated_scope(), pytest.raises(OperationalError):
            run("r1", WHICH)
        assert sent_signals.of("read_retried") == []


def test_rejected_read_is_not_moved_if_aliases_are_not_interchangeable(
    pg: PostgreSQL,
) -> None:
    """A pinned read routed by the router uses the primary at once."""
    user = make_role(pg.cluster)
    entries = {
        f"r{number}": database(pg[f"pg{number}"], conn_max_age=None, user=user) for number in (1, 2)
    }
    with as_layout(pg, **entries):
        for _ in range(3):
            pg.pause()
            token = write("behind")
            for alias in entries:
                connections[alias].close()
            assert "behind" in titles(token)
            pg.resume()


ALIKE: dict[str, dict[str, Any]] = {
    "connect_timeout": {"connect_timeout": 3},
    "sslmode": {"sslmode": "disable"},
    "application_name": {"application_name": "readers"},
    "keepalives": {"keepalives_idle": 30, "tcp_user_timeout": 1000},
    "target_session_attrs": {"target_session_attrs": "standby"},
}


@pytest.mark.parametrize("options", ALIKE.values(), ids=list(ALIKE))
def test_reads_fail_over_between_aliases_with_other_connection_options(
    pg: PostgreSQL, sent_signals: SentSignals, options: dict[str, Any]
) -> None:
    with as_layout(
        pg,
        r1=database(pg["pg1"], conn_max_age=None, options=options),
        r2=database(pg["pg2"], conn_max_age=None),
    ):
        with unrelated_scope():
            assert run("r1", WHICH) == [(pg["pg1"].port,)]
            pg["pg1"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg2"].port,)]
            pg["pg2"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg"].port,)]
        assert sent_signals.of("read_retried")[0]["failed"] == "r1"


# no_failover()


def test_direct_has_no_substitute(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    @no_failover()
    def decorated() -> Any:
        return run("pg1", WHICH)

    for act in (decorated, lambda: run("pg1", WHICH)):
        pg["pg1"].start()
        with unrelated_scope(), no_failover():
            connections["pg1"].close()
            assert act() == [(pg["pg1"].port,)]
            pg["pg1"].stop("immediate")
            for _ in range(2):
                with pytest.raises(OperationalError):
                    act()
    assert sent_signals.of("read_retried") == []


def test_direct_uses_the_server_of_the_alias(pg: PostgreSQL) -> None:
    """Also under a pin, after a write, and for a server out of rotation."""
    pg.pause("pg1")
    with unrelated_scope():
        Book.objects.create(title="one")
        with no_failover():
            assert run("pg1", WHICH) == [(pg["pg1"].port,)]
            assert Book.objects.using("pg1").count() == 0
        assert Book.objects.using("pg1").count() == 1
    token = write("two")
    mark_unreachable("pg1")
    with unrelated_scope(token), no_failover():
        connections["pg1"].close()
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
        assert Book.objects.using("pg1").count() == 0


# Errors


def test_replica_with_too_many_connections_is_skipped(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """53300, for a role that is not a superuser."""
    user = make_role(pg.cluster)
    pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT 2")
    pg.wait_for()
    options = {
        "primary": database(pg["pg"], conn_max_age=None, user=user),
        **{f"r{n}": database(pg[f"pg{n}"], conn_max_age=None, user=user) for n in (1, 2)},
    }
    primary = options.pop("primary")
    try:
        with as_layout(pg, **options), ExitStack() as stack:
            connections["site"].close()
            connections.settings["site"].update(primary)
            for _ in range(2):
                stack.enter_context(
                    psycopg.connect(
                        host=pg["pg1"].host, port=pg["pg1"].port, user=user, dbname="site"
                    )
                )
            with unrelated_scope():
                assert run("r1", WHICH) == [(pg["pg2"].port,)]
            assert {read_port() for _ in range(4)} == {pg["pg2"].port}
            assert {one["served"] for one in sent_signals.of("read_retried")} == {"r2"}
            assert "too many connections" in str(sent_signals.of("read_retried")[0]["error"])
    finally:
        pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")


def read_port() -> int:
    with unrelated_scope():
        return port()


def test_query_that_exceeds_resources_is_retried_on_another_replica(
    pg: PostgreSQL, sent_signals: SentSignals
) -> None:
    """53400 (configuration limit) takes no replica out of rotation."""
    sort = "SELECT md5(n::text) FROM generate_series(1, 300000) AS n ORDER BY 1"
    limited = f"SELECT count(*) FROM ({sort}) AS sorted"
    pg["pg1"].execute("ALTER SYSTEM SET temp_file_limit = '1MB'")
    pg["pg1"].execute("ALTER SYSTEM SET work_mem = '64kB'")
    pg["pg1"].execute("SELECT pg_reload_conf()")
    try:
        with unrelated_scope():
            connections["pg1"].close()
            assert run("pg1", limited) == [(300000,)]
    finally:
        for name in ("temp_file_limit", "work_mem"):
            pg["pg1"].execute(f"ALTER SYSTEM RESET {name}")
        pg["pg1"].execute("SELECT pg_reload_conf()")
    (rerun,) = sent_signals.of("read_retried")
    assert rerun["failed"] == "pg1"
    assert "temp_file_limit" in str(rerun["error"])
    assert pool().replica_set.out_of_rotation == frozenset()


def test_statement_timeout_propagates(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    for alias in ("pg", *REPLICAS):
        connections[alias].close()
        connections.settings[alias]["OPTIONS"]["options"] = "-c statement_timeout=50"
    with unrelated_scope(), pytest.raises(OperationalError, match="statement timeout"):
        run("pg1", "SELECT pg_sleep(10)")
    assert sent_signals.of("read_retried") == sent_signals.of("replica_removed") == []


FORMS: dict[str, Callable[[], Any]] = {
    "text": lambda: WHICH,
    "bytes": lambda: WHICH.encode(),
    "SQL": lambda: sql.SQL("SELECT inet_server_port()"),
    "composed": lambda: sql.SQL("SELECT {}()").format(sql.Identifier("inet_server_port")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["stopped", "terminated"])
def test_every_form_of_a_statement_is_retried(pg: PostgreSQL, form: str, how: str) -> None:
    with unrelated_scope():
        assert run("pg1", FORMS[form]()) == [(pg["pg1"].port,)]
        if how == "stopped":
            pg["pg1"].stop("immediate")
        else:
            pg.terminate("pg1")
        served = "pg2" if how == "stopped" else "pg1"
        assert run("pg1", FORMS[form]()) == [(pg[served].port,)]


# A scope that has written


LATER: dict[str, Callable[[], Callable[[], Any]]] = {
    "using": lambda: lambda: Book.objects.using("pg1").count(),
    "lazy": lambda: queryset_made_before(),
    "raw": lambda: raw_made_before(),
    "cursor": lambda: lambda: run("pg1", "SELECT count(*) FROM app_book")[0][0],
}


def queryset_made_before() -> Callable[[], Any]:
    books = Book.objects.using("pg1")
    return lambda: len(books.all())


def raw_made_before() -> Callable[[], Any]:
    books = Book.objects.using("pg1").raw("SELECT * FROM app_book")
    return lambda: len(list(books))


@pytest.mark.parametrize("way", LATER)
def test_scope_that_has_written_reads_no_replica(pg: PostgreSQL, way: str) -> None:
    pg.pause()
    with unrelated_scope():
        connections["pg1"].ensure_connection()
        count = LATER[way]()
        Book.objects.create(title="one")
        assert count() == 1
        with use_replica():
            assert LATER[way]()() == 0
        with no_failover():
            assert LATER[way]()() == 0
        assert LATER[way]()() == 1
    with unrelated_scope():
        assert LATER[way]()() == 0


def test_locking_query_runs_on_the_primary(pg: PostgreSQL) -> None:
    """The scope then stays on the primary."""
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    try:
        with unrelated_scope():
            assert server() in REPLICAS
            list(Book.objects.raw("SELECT 1 AS id, pg_advisory_lock(42)::text AS title"))
            assert [pg[alias].execute(held)[0][0] for alias in ("pg", "pg1", "pg2")] == [1, 0, 0]
            assert current_scope().state(PoolKey("pg")).holds_lock
            assert server() == "pg"
        with unrelated_scope():
            assert server() in REPLICAS
    finally:
        connections["pg"].close()


def test_locking_query_of_another_alias_of_the_primary_keeps_the_scope_there(
    pg: PostgreSQL,
) -> None:
    entries = {"r1": database(pg["pg1"]), "again": database(pg["pg"])}
    with (
        as_layout(pg, **entries),
        override_settings(PINNING_REPLICAS={"site": ["r1"]}),
        unrelated_scope(),
    ):
        assert port() == pg["pg1"].port
        with transaction.atomic(using="again"):
            list(Book.objects.using("again").select_for_update())
        assert port() == pg["pg"].port


def test_transaction_on_a_replica_is_unaffected(pg: PostgreSQL, sent_signals: SentSignals) -> None:
    with (  # noqa: PT012
        unrelated_scope(),
        pytest.raises(OperationalError),
        transaction.atomic(using="pg1"),
    ):
        run("pg1", WHICH)
        pg.terminate("pg1")
        run("pg1", WHICH)
    assert sent_signals.of("read_retried") == []
