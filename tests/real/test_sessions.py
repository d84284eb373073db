"""Reads that move to another node where that changes nothing else, and only there."""

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
from pinning_middleware.scopes.scope import current_scope
from tests.app.models import Book

from .conftest import (
    Heard,
    PostgreSQL,
    as_layout,
    pool,
    pooled,
    port,
    server,
    stranger,
    take_out,
    titles,
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
def test_a_read_of_an_altered_session_is_not_run_elsewhere(
    pg: PostgreSQL, heard: Heard, statement: str
) -> None:
    """It would have other rights, other settings or no lock there: the node's error stands."""
    with stranger(), no_failover():
        run("pg1", statement)
    pg.terminate("pg1")
    with stranger(), pytest.raises(OperationalError):
        run("pg1", WHICH)
    assert heard.of("read_retried") == []
    connections["pg1"].close()
    # A new session is nobody's yet.
    with stranger():
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
        pg.terminate("pg1")
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
    assert len(heard.of("read_retried")) == 1


@pytest.mark.parametrize("statement", ["LISTEN news", "PREPARE one AS SELECT 1"])
def test_nobody_stands_in_for_the_primary_in_an_altered_session(
    pg: PostgreSQL, heard: Heard, statement: str
) -> None:
    with override_settings(PINNING_PRIMARY_DOWN="stale"), stranger():
        with ignore_writes():
            run("pg", statement)
        pg.terminate("pg")
        with pytest.raises(OperationalError):
            run("pg", WHICH)
        connections["pg"].close()
        assert run("pg", WHICH) == [(pg["pg"].port,)]
        pg["pg"].stop("immediate")
        assert run("pg", WHICH) != [(pg["pg"].port,)]
    assert len(heard.of("read_retried")) == 1


@pytest.mark.parametrize("statement", MILD.values(), ids=list(MILD))
def test_a_read_of_a_session_as_it_was_is_run_elsewhere(
    pg: PostgreSQL, heard: Heard, statement: str
) -> None:
    with stranger():
        run("pg1", statement)
        pg["pg1"].stop("immediate")
        assert run("pg1", WHICH) == [(pg["pg2"].port,)]
    assert len(heard.of("read_retried")) == 1


@pytest.fixture
def receiver() -> Iterator[None]:
    """What sites do for every connection."""

    def set_up(connection: Any, **kwargs: Any) -> None:
        if connection.vendor == "postgresql":
            with connection.cursor() as cursor:
                cursor.execute("SET statement_timeout = '30s'")

    connection_created.connect(set_up)
    yield
    connection_created.disconnect(set_up)


@pytest.mark.usefixtures("receiver")
def test_what_every_connection_is_given_does_not_count(pg: PostgreSQL, heard: Heard) -> None:
    for alias in REPLICAS:
        connections[alias].close()
    with stranger():
        assert run("pg1", "SHOW statement_timeout") == [("30s",)]
        pg["pg1"].stop("immediate")
        assert run("pg1", WHICH) == [(pg["pg2"].port,)]
        assert run("pg1", "SHOW statement_timeout") == [("30s",)]
    assert heard.of("read_retried")[0]["served"] == "pg2"


@pytest.mark.usefixtures("receiver")
def test_what_every_connection_is_given_does_not_count_in_a_pool(
    pg: PostgreSQL, heard: Heard
) -> None:
    """It is given once more, each time that a connection is taken."""
    with as_layout(pg, r1=pooled(pg["pg1"]), r2=pooled(pg["pg2"])):
        for _ in range(3):
            with stranger():
                assert run("r1", WHICH) == [(pg["pg1"].port,)]
            connections["r1"].close()
        with stranger():
            run("r1", WHICH)
            pg["pg1"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg2"].port,)]
    assert heard.of("read_retried")[0]["served"] == "r2"


@pytest.mark.usefixtures("receiver")
def test_what_a_site_has_altered_stays_so_in_a_pool(pg: PostgreSQL, heard: Heard) -> None:
    with as_layout(pg, r1=pooled(pg["pg1"]), r2=pooled(pg["pg2"])):
        with stranger(), no_failover():
            run("r1", "SET search_path = public")
            connections["r1"].close()
            connections["r1"].ensure_connection()
        pg["pg1"].stop("immediate")
        with stranger(), pytest.raises(OperationalError):
            run("r1", WHICH)
    assert heard.of("read_retried") == []


# The settings of the aliases


OTHER_SESSIONS: dict[str, dict[str, Any]] = {
    "options": {"options": {"options": "-c search_path=tenant,public"}},
    "assume_role": {"options": {"assume_role": "site_plain"}},
    "isolation_level": {"options": {"isolation_level": psycopg.IsolationLevel.SERIALIZABLE}},
    "user": {"user": "site_plain"},
}


@pytest.mark.parametrize("more", OTHER_SESSIONS.values(), ids=list(OTHER_SESSIONS))
@pytest.mark.parametrize("connected", [True, False])
def test_where_sessions_differ_the_node_s_error_is_the_answer(
    pg: PostgreSQL, heard: Heard, more: dict[str, Any], connected: bool
) -> None:
    """Neither the other replica nor the primary would run it with the same rights."""
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
        with stranger(), pytest.raises(OperationalError):
            run("r1", WHICH)
        assert heard.of("read_retried") == []


def test_where_sessions_differ_a_read_that_may_not_be_there_is_not_elsewhere(
    pg: PostgreSQL,
) -> None:
    """A pinned read by way of the router goes to the primary all the same, at once."""
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
def test_where_only_the_way_there_differs_reads_move(
    pg: PostgreSQL, heard: Heard, options: dict[str, Any]
) -> None:
    with as_layout(
        pg,
        r1=database(pg["pg1"], conn_max_age=None, options=options),
        r2=database(pg["pg2"], conn_max_age=None),
    ):
        with stranger():
            assert run("r1", WHICH) == [(pg["pg1"].port,)]
            pg["pg1"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg2"].port,)]
            pg["pg2"].stop("immediate")
            assert run("r1", WHICH) == [(pg["pg"].port,)]
        assert heard.of("read_retried")[0]["failed"] == "r1"


# no_failover()


def test_inside_direct_nobody_stands_in(pg: PostgreSQL, heard: Heard) -> None:
    @no_failover()
    def decorated() -> Any:
        return run("pg1", WHICH)

    for act in (decorated, lambda: run("pg1", WHICH)):
        pg["pg1"].start()
        with stranger(), no_failover():
            connections["pg1"].close()
            assert act() == [(pg["pg1"].port,)]
            pg["pg1"].stop("immediate")
            for _ in range(2):
                with pytest.raises(OperationalError):
                    act()
    assert heard.of("read_retried") == []


def test_inside_direct_an_alias_is_its_node(pg: PostgreSQL) -> None:
    """Also under a pin, after a write, and for a node that is known to be out."""
    pg.pause("pg1")
    with stranger():
        Book.objects.create(title="one")
        with no_failover():
            assert run("pg1", WHICH) == [(pg["pg1"].port,)]
            assert Book.objects.using("pg1").count() == 0
        assert Book.objects.using("pg1").count() == 1
    token = write("two")
    take_out("pg1")
    with stranger(token), no_failover():
        connections["pg1"].close()
        assert run("pg1", WHICH) == [(pg["pg1"].port,)]
        assert Book.objects.using("pg1").count() == 0


# Errors


def test_a_replica_without_room_for_a_connection_is_passed_by(pg: PostgreSQL, heard: Heard) -> None:
    """53300, for one that is no superuser."""
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
            with stranger():
                assert run("r1", WHICH) == [(pg["pg2"].port,)]
            assert {use_and_tell() for _ in range(4)} == {pg["pg2"].port}
            assert {one["served"] for one in heard.of("read_retried")} == {"r2"}
            assert "too many connections" in str(heard.of("read_retried")[0]["error"])
    finally:
        pg["pg"].execute(f"ALTER ROLE {user} CONNECTION LIMIT -1")


def use_and_tell() -> int:
    with stranger():
        return port()


def test_a_query_that_is_too_much_for_one_replica_runs_on_another(
    pg: PostgreSQL, heard: Heard
) -> None:
    """53400, a class of its own reasons; no replica is out for it."""
    sort = "SELECT md5(n::text) FROM generate_series(1, 300000) AS n ORDER BY 1"
    limited = f"SELECT count(*) FROM ({sort}) AS sorted"
    pg["pg1"].execute("ALTER SYSTEM SET temp_file_limit = '1MB'")
    pg["pg1"].execute("ALTER SYSTEM SET work_mem = '64kB'")
    pg["pg1"].execute("SELECT pg_reload_conf()")
    try:
        with stranger():
            connections["pg1"].close()
            assert run("pg1", limited) == [(300000,)]
    finally:
        for name in ("temp_file_limit", "work_mem"):
            pg["pg1"].execute(f"ALTER SYSTEM RESET {name}")
        pg["pg1"].execute("SELECT pg_reload_conf()")
    (rerun,) = heard.of("read_retried")
    assert rerun["failed"] == "pg1"
    assert "temp_file_limit" in str(rerun["error"])
    assert pool().out == frozenset()


def test_a_timeout_is_the_query_s_own(pg: PostgreSQL, heard: Heard) -> None:
    for alias in ("pg", *REPLICAS):
        connections[alias].close()
        connections.settings[alias]["OPTIONS"]["options"] = "-c statement_timeout=50"
    with stranger(), pytest.raises(OperationalError, match="statement timeout"):
        run("pg1", "SELECT pg_sleep(10)")
    assert heard.of("read_retried") == heard.of("replica_removed") == []


FORMS: dict[str, Callable[[], Any]] = {
    "text": lambda: WHICH,
    "bytes": lambda: WHICH.encode(),
    "SQL": lambda: sql.SQL("SELECT inet_server_port()"),
    "composed": lambda: sql.SQL("SELECT {}()").format(sql.Identifier("inet_server_port")),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["stopped", "terminated"])
def test_every_form_of_a_statement_runs_again(pg: PostgreSQL, form: str, how: str) -> None:
    with stranger():
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
def test_a_scope_that_has_written_reads_no_replica_by_any_way(pg: PostgreSQL, way: str) -> None:
    pg.pause()
    with stranger():
        connections["pg1"].ensure_connection()
        count = LATER[way]()
        Book.objects.create(title="one")
        assert count() == 1
        with use_replica():
            assert LATER[way]()() == 0
        with no_failover():
            assert LATER[way]()() == 0
        assert LATER[way]()() == 1
    with stranger():
        assert LATER[way]()() == 0


def test_a_lock_that_a_query_takes_is_taken_on_the_primary(pg: PostgreSQL) -> None:
    """And the scope stays where it is held."""
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    try:
        with stranger():
            assert server() in REPLICAS
            list(Book.objects.raw("SELECT 1 AS id, pg_advisory_lock(42)::text AS title"))
            assert [pg[alias].execute(held)[0][0] for alias in ("pg", "pg1", "pg2")] == [1, 0, 0]
            assert current_scope()["pg"].is_locked
            assert server() == "pg"
        with stranger():
            assert server() in REPLICAS
    finally:
        connections["pg"].close()


def test_a_transaction_on_a_replica_is_none_of_this(pg: PostgreSQL, heard: Heard) -> None:
    with (  # noqa: PT012
        stranger(),
        pytest.raises(OperationalError),
        transaction.atomic(using="pg1"),
    ):
        run("pg1", WHICH)
        pg.terminate("pg1")
        run("pg1", WHICH)
    assert heard.of("read_retried") == []
