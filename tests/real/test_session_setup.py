"""Session state on the primary's connection, with and without PINNING_SESSION_SETUP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import pytest
from django.db import DatabaseError, connections, transaction
from django.test import override_settings

from pinning_middleware import no_failover, propagate_scope
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import Visit
from tests.contrib.pages import load

from .conftest import PostgreSQL, as_layout, database, in_thread, server, unrelated_scope

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}
ALIASES = ("pg", "pg1", "pg2")
SCHEMA = "SELECT current_schema()"

tenant: ContextVar[str] = ContextVar("tenant", default="public")
calls: list[str] = []


def set_up(connection: Any) -> None:
    """Let a connection see the tables of the tenant."""
    calls.append(connection.alias)
    with connection.cursor() as cursor:
        cursor.execute(f"SET search_path = {tenant.get()}")


@pytest.fixture
def tenants(pg: PostgreSQL) -> Iterator[None]:
    """The schemas of two tenants, each with a table of books that has one of its own."""
    for name in ("north", "south"):
        pg["pg"].execute(f"CREATE SCHEMA {name}", database="site")
        table = f"CREATE TABLE {name}.app_book (LIKE public.app_book INCLUDING ALL)"
        pg["pg"].execute(table, database="site")
        pg["pg"].execute(
            f"INSERT INTO {name}.app_book (id, title) VALUES (0, '{name}')", database="site"
        )
    pg.wait_for()
    calls.clear()
    try:
        yield
    finally:
        for alias in ALIASES:
            connections[alias].close()
        for name in ("north", "south"):
            pg["pg"].execute(f"DROP SCHEMA {name} CASCADE", database="site")


@pytest.fixture
def set_up_sessions(tenants: None) -> Iterator[None]:
    with override_settings(PINNING_SESSION_SETUP=f"{__name__}.set_up"):
        yield


@pytest.fixture
def of_tenant() -> Iterator[Callable[[str], None]]:
    """Return a function that sets the tenant of this context."""
    before = tenant.get()
    yield tenant.set  # type: ignore[misc]
    tenant.set(before)


def run(alias: str, statement: str) -> list[Any]:
    with connections[alias].cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def titles() -> list[str]:
    return list(Book.objects.values_list("title", flat=True))


STATEMENTS = {
    "SET": "SET search_path = north",
    "SET ROLE": "SET ROLE postgres",
    "set_config": "SELECT set_config('search_path', 'north', false)",
    "temporary table": "CREATE TEMPORARY TABLE own (id int)",
}
UNMODIFIED = {
    "SHOW": "SHOW search_path",
    "SELECT": "SELECT 1",
    "set_config for a transaction": "SELECT set_config('search_path', 'north', true)",
}


# Without PINNING_SESSION_SETUP


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("statement", ["SET", "set_config"])
def test_session_state_of_primary_keeps_later_reads_on_it(visit: Visit, statement: str) -> None:
    def act(request: Any) -> tuple[list[str], list[tuple[str, str]]]:
        run("pg", STATEMENTS[statement])
        with capture_reads() as reads:
            found = titles()
            titles()
        return found, [(read.alias, read.reason) for read in reads]

    assert visit(act) == (["north"], [("pg", "session_state")] * 2)
    assert "pinning" not in visit.browser.cookies


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("statement", STATEMENTS)
def test_reason_of_read_after_session_state_is_session_state(statement: str) -> None:
    """Rule 3 precedes rule 4: creating a temporary table is a write as well."""
    with unrelated_scope():
        run("pg", STATEMENTS[statement])
        with capture_reads() as reads:
            titles()
    assert [(read.alias, read.reason) for read in reads] == [("pg", "session_state")]


@pytest.mark.usefixtures("tenants")
def test_session_state_ends_with_the_connection() -> None:
    with unrelated_scope():
        run("pg", STATEMENTS["SET"])
        connections["pg"].close()
        with capture_reads() as reads:
            titles()
    assert [read.reason for read in reads] == ["round_robin"]


@pytest.mark.usefixtures("tenants")
@pytest.mark.parametrize("statement", UNMODIFIED)
def test_statement_that_leaves_the_session_as_it_was_keeps_no_read_on_the_primary(
    statement: str,
) -> None:
    with unrelated_scope():
        run("pg", UNMODIFIED[statement])
        with capture_reads() as reads:
            titles()
    assert [(read.role, read.reason) for read in reads] == [("replica", "round_robin")]


@pytest.mark.usefixtures("tenants")
def test_session_state_of_primary_outlives_the_connection_of_another_thread() -> None:
    def read() -> None:
        run("pg", "SELECT 1")
        connections["pg"].close()

    with unrelated_scope():
        run("pg", STATEMENTS["SET"])
        in_thread(propagate_scope(read))
        assert titles() == ["north"]


@pytest.mark.usefixtures("tenants")
def test_session_state_of_primary_ends_with_the_scope() -> None:
    with unrelated_scope():
        run("pg", STATEMENTS["SET"])
    with unrelated_scope(), capture_reads() as reads:
        titles()
    assert [read.role for read in reads] == ["replica"]


# With PINNING_SESSION_SETUP


@pytest.mark.usefixtures("set_up_sessions")
def test_session_state_is_re_applied_on_replicas(
    visit: Visit, of_tenant: Callable[[str], None]
) -> None:
    def act(request: Any) -> tuple[list[str], list[tuple[str, str]]]:
        of_tenant("north")
        run("pg", STATEMENTS["SET"])
        with capture_reads() as reads:
            found = titles()
        return found, [(read.role, read.reason) for read in reads]

    for _ in range(3):
        assert visit(act) == (["north"], [("replica", "round_robin")])


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_once_for_each_connection_of_a_scope(
    of_tenant: Callable[[str], None],
) -> None:
    with unrelated_scope():
        of_tenant("north")
        for _ in range(3):
            for alias in ALIASES:
                assert run(alias, SCHEMA) == [("north",)]
    assert sorted(calls) == list(ALIASES)


@pytest.mark.usefixtures("set_up_sessions")
def test_session_of_kept_connection_is_set_up_for_each_scope(
    of_tenant: Callable[[str], None],
) -> None:
    for name in ("north", "south", "north"):
        with unrelated_scope():
            of_tenant(name)
            assert titles() == [name]
            assert run("pg", SCHEMA) == [(name,)]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_on_the_connection_that_a_read_fails_over_to(
    pg: PostgreSQL, of_tenant: Callable[[str], None]
) -> None:
    with unrelated_scope():
        of_tenant("north")
        assert run("pg1", "SELECT title FROM app_book") == [("north",)]
        pg["pg1"].stop("immediate")
        assert run("pg1", "SELECT title FROM app_book") == [("north",)]
    assert calls == ["pg1", "pg2"]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_of_reopened_connection_is_set_up_again(
    pg: PostgreSQL, of_tenant: Callable[[str], None]
) -> None:
    with unrelated_scope():
        of_tenant("north")
        assert run("pg1", SCHEMA) == [("north",)]
        pg.terminate("pg1")
        assert run("pg1", SCHEMA) == [("north",)]
        connections["pg1"].close()
        assert run("pg1", SCHEMA) == [("north",)]
    assert calls == ["pg1"] * 3


@pytest.mark.usefixtures("set_up_sessions")
def test_session_from_a_pool_is_set_up_again_after_another_scope_has_used_it(
    pg: PostgreSQL, of_tenant: Callable[[str], None]
) -> None:
    def read_as(name: str) -> None:
        with unrelated_scope():
            of_tenant(name)
            assert run("r1", SCHEMA) == [(name,)]
            connections["r1"].close()

    entry = database(pg["pg1"], pool={"min_size": 1, "max_size": 1})
    with as_layout(pg, r1=entry), unrelated_scope():
        of_tenant("north")
        assert run("r1", SCHEMA) == [("north",)]
        connections["r1"].close()
        in_thread(partial(read_as, "south"))
        assert run("r1", SCHEMA) == [("north",)]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_whose_setup_failed_is_set_up_before_the_next_statement(
    of_tenant: Callable[[str], None],
) -> None:
    with unrelated_scope():
        of_tenant("south")
        assert run("pg1", SCHEMA) == [("south",)]
    with unrelated_scope():
        of_tenant("no such; syntax")
        with pytest.raises(DatabaseError):
            run("pg1", SCHEMA)
        of_tenant("north")
        assert run("pg1", SCHEMA) == [("north",)]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_outside_the_pools_is_not_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {**connections.settings["default"], "NAME": ":memory:"}
    monkeypatch.setitem(connections.settings, "elsewhere", elsewhere)
    with unrelated_scope(), transaction.atomic(using="elsewhere"):
        assert run("elsewhere", "SELECT 1") == [(1,)]
    assert calls == []
    connections["elsewhere"].close()
    del connections["elsewhere"]


def set_up_by_procedure(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.callproc("set_config", ["search_path", tenant.get(), "false"])


@pytest.mark.usefixtures("tenants")
def test_setup_may_call_a_procedure(of_tenant: Callable[[str], None]) -> None:
    setup = f"{__name__}.set_up_by_procedure"
    with override_settings(PINNING_SESSION_SETUP=setup), unrelated_scope():
        of_tenant("north")
        for alias in ALIASES:
            assert run(alias, SCHEMA) == [("north",)]
        assert server() in REPLICAS


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_for_pinned_read_that_moves_to_the_primary(
    pg: PostgreSQL, of_tenant: Callable[[str], None]
) -> None:
    pg.pause()
    with unrelated_scope() as scope:
        of_tenant("north")
        Book.objects.create(title="new")
    of_tenant("south")
    with unrelated_scope(scope.token):
        of_tenant("north")
        assert run("pg1", "SELECT title FROM app_book ORDER BY id") == [("north",), ("new",)]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_inside_no_failover(of_tenant: Callable[[str], None]) -> None:
    with unrelated_scope(), no_failover():
        of_tenant("north")
        assert run("pg1", SCHEMA) == [("north",)]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_for_async_read(
    browser: Any, do: Callable[..., str], of_tenant: Callable[[str], None]
) -> None:
    results = []

    async def act(request: Any) -> None:
        of_tenant("south")
        results.extend([book.title async for book in Book.objects.all()])

    browser.get(f"/async/{do(act)}/")
    assert results == ["south"]


@pytest.mark.usefixtures("set_up_sessions")
@pytest.mark.parametrize("way", ["BEGIN", "savepoint", "atomic"])
def test_session_is_set_up_again_after_a_rollback(
    of_tenant: Callable[[str], None], way: str
) -> None:
    """PostgreSQL undoes a SET that ran in the transaction: the previous tenant's would be read."""
    with unrelated_scope():
        of_tenant("south")
        assert run("pg", SCHEMA) == [("south",)]
    with unrelated_scope():
        of_tenant("north")
        if way == "BEGIN":
            run("pg", "BEGIN")
            assert run("pg", SCHEMA) == [("north",)]
            run("pg", "ROLLBACK")
        elif way == "savepoint":
            with transaction.atomic(using="pg"), transaction.atomic(using="pg"):
                assert run("pg", SCHEMA) == [("north",)]
                transaction.set_rollback(True, using="pg")
        else:
            with transaction.atomic(using="pg"):
                assert run("pg", SCHEMA) == [("north",)]
                transaction.set_rollback(True, using="pg")
        assert run("pg", SCHEMA) == [("north",)]


@pytest.mark.usefixtures("set_up_sessions")
@pytest.mark.parametrize("way", ["atomic", "BEGIN"])
def test_session_is_set_up_for_the_first_statement_in_a_transaction(
    of_tenant: Callable[[str], None], way: str
) -> None:
    for name in ("south", "north"):
        with unrelated_scope():
            of_tenant(name)
            if way == "BEGIN":
                run("pg", "BEGIN")
                assert run("pg", SCHEMA) == [(name,)]
                run("pg", "COMMIT")
            else:
                with transaction.atomic(using="pg"):
                    assert run("pg", SCHEMA) == [(name,)]
            assert run("pg", SCHEMA) == [(name,)]


DRIVER_METHODS: dict[str, Callable[[Any], Any]] = {
    "stream": lambda cursor: [row[0] for row in cursor.stream("SELECT title FROM app_book")],
    "copy": lambda cursor: copied(cursor),
}


def copied(cursor: Any) -> list[str]:
    with cursor.copy("COPY (SELECT title FROM app_book) TO STDOUT") as rows:
        return b"".join(bytes(row) for row in rows).decode().split()


@pytest.mark.usefixtures("set_up_sessions")
@pytest.mark.parametrize("alias", ["pg", "pg1"])
@pytest.mark.parametrize("method", DRIVER_METHODS)
def test_session_is_set_up_for_methods_of_the_driver_s_cursor(
    of_tenant: Callable[[str], None], alias: str, method: str
) -> None:
    for name in ("south", "north"):
        with unrelated_scope():
            of_tenant(name)
            if name == "south":
                assert run(alias, SCHEMA) == [(name,)]
            with connections[alias].cursor() as cursor:
                assert DRIVER_METHODS[method](cursor) == [name]


@pytest.mark.usefixtures("set_up_sessions")
def test_session_is_set_up_for_write_by_copy(of_tenant: Callable[[str], None]) -> None:
    with unrelated_scope():
        of_tenant("south")
        assert run("pg", SCHEMA) == [("south",)]
    with unrelated_scope(), connections["pg"].cursor() as cursor:
        of_tenant("north")
        with cursor.copy("COPY app_book (id, title) FROM STDIN") as copy:
            copy.write_row([1, "copied"])
        assert run("pg", "SELECT count(*) FROM north.app_book") == [(2,)]


# Row-level security, as in docs/how-to/tenants.md


def test_setting_of_policies_is_set_on_the_replica_by_the_recipe(pg: PostgreSQL) -> None:
    load("how-to/tenants.md", "Row-level security")
    setup = "shop.policies.set_up_policy"
    with override_settings(PINNING_SESSION_SETUP=setup), unrelated_scope():
        with capture_reads() as reads:
            found = Book.objects.raw("SELECT 1 AS id, current_setting('shop.tenant') AS title")
            assert [each.title for each in found] == ["7"]
        assert reads[0].alias in REPLICAS
    for alias in ALIASES:
        connections[alias].close()
