"""Statements that a standby refuses for being one, and a primary runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import (
    DatabaseError,
    NotSupportedError,
    OperationalError,
    connections,
    transaction,
)
from psycopg.errors import AdminShutdown

from pinning_middleware import no_failover
from pinning_middleware.backend.execute import intended_alias
from pinning_middleware.reasons import Fault
from pinning_middleware.routing import refusals
from pinning_middleware.servers.registry import registry
from pinning_middleware.utils import counters
from tests.app.models import Account, Book
from tests.conftest import Visit
from tests.monitoring.test_commands import run as run_command

from .conftest import (
    NODES,
    PostgreSQL,
    SentSignals,
    as_databases,
    database,
    endpoint,
    pool,
    probe_replicas,
    server,
    server_for,
    server_of,
    unrelated_scope,
)
from .layouts import make_role

pytestmark = pytest.mark.real

REPLICAS = {"pg1", "pg2"}


class Refused(list[str]):
    """The statements that the replicas have refused."""


@pytest.fixture
def refused(pg: PostgreSQL) -> Iterator[Refused]:
    """Record the statements that replicas refuse, by an execute wrapper inside the package's."""
    found = Refused()

    def wrapper(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        try:
            return execute(sql, params, many, context)
        except DatabaseError:
            if context["cursor"].db.alias in REPLICAS:
                found.append(str(sql))
            raise

    for alias in REPLICAS:
        connections[alias].execute_wrappers.append(wrapper)
    yield found
    for alias in REPLICAS:
        connections[alias].execute_wrappers.remove(wrapper)


@pytest.fixture
def unlogged(pg: PostgreSQL) -> Iterator[None]:
    """The table of accounts has no WAL."""
    pg["pg"].execute("ALTER TABLE app_account SET UNLOGGED", database="site")
    pg["pg"].execute("CREATE VIEW unlogged AS SELECT * FROM app_account", database="site")
    pg.wait_for()
    yield
    pg["pg"].execute("DROP VIEW unlogged", database="site")
    pg["pg"].execute("ALTER TABLE app_account SET LOGGED", database="site")


@pytest.fixture
def writing_function(pg: PostgreSQL) -> Iterator[str]:
    pg["pg"].execute(
        "CREATE FUNCTION add_author() RETURNS bigint LANGUAGE sql AS "
        "$$ INSERT INTO app_author (name) VALUES (gen_random_uuid()::text) RETURNING id $$",
        database="site",
    )
    pg.wait_for()
    yield "SELECT add_author()"
    pg["pg"].execute("DROP FUNCTION add_author", database="site")


def run(sql: str) -> str:
    """Run a statement where the router sends the reads of a model; return the alias that ran it."""
    with connections[Book.objects.db].cursor() as cursor:
        cursor.execute(sql)
        cursor.fetchall()
        return str(cursor.db.alias)


@pytest.mark.usefixtures("unlogged")
def test_read_of_unlogged_table_runs_on_the_primary(
    refused: Refused, sent_signals: SentSignals, caplog: pytest.LogCaptureFixture
) -> None:
    with unrelated_scope():
        assert Account.objects.count() == 0
        assert server() in REPLICAS
    assert len(refused) == 1
    assert {one["served"] for one in sent_signals.of("read_retried")} == {"pg"}
    assert "No standby can serve app_account" in caplog.text


@pytest.mark.usefixtures("unlogged")
def test_unlogged_table_is_read_from_the_primary_at_once_after_the_first_refusal(
    refused: Refused,
) -> None:
    for _ in range(4):
        with unrelated_scope():
            list(Account.objects.all())
            run("SELECT count(*) FROM app_account")
    assert len(refused) == 1
    assert Account.objects.db == "pg"
    assert counters.refusals["pg", "app_account"] > 4


@pytest.mark.usefixtures("unlogged")
def test_view_of_unlogged_table_is_read_from_the_primary_at_once_after_the_first_refusal(
    refused: Refused,
) -> None:
    assert [run("SELECT * FROM unlogged") for _ in range(3)] == ["pg"] * 3
    assert len(refused) == 1


@pytest.mark.usefixtures("unlogged")
def test_replica_is_asked_again_after_a_while(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "REMEMBERED_FOR", 0.0)
    for _ in range(2):
        assert Account.objects.count() == 0
    assert len(refused) == 2


@pytest.mark.usefixtures("unlogged")
def test_refusal_is_raised_in_a_transaction_of_the_replica(refused: Refused) -> None:
    with pytest.raises(NotSupportedError), transaction.atomic(using="pg1"):
        Account.objects.using("pg1").count()
    with pytest.raises(NotSupportedError), no_failover():
        Account.objects.using("pg1").count()
    assert len(refused) == 2


@pytest.mark.usefixtures("unlogged")
def test_refusal_is_raised_in_a_modified_session(refused: Refused) -> None:
    with connections["pg1"].cursor() as cursor:
        cursor.execute("SET search_path = public")
        with pytest.raises(NotSupportedError):
            cursor.execute("SELECT * FROM app_account")
    connections["pg1"].close()


@pytest.mark.usefixtures("unlogged")
def test_read_that_two_replicas_cannot_serve_is_reported_with_the_server_that_did(
    refused: Refused, sent_signals: SentSignals
) -> None:
    probe_replicas()
    with unrelated_scope(), connections["pg1"].cursor() as cursor:
        cursor.execute("SELECT 1")
        registry.set_status(server_of("pg1"), Fault.STALE_RESTART, 60)
        cursor.execute("SELECT count(*) FROM app_account")
        assert cursor.db.alias == "pg"
        assert intended_alias(cursor) == "pg1"
    assert len(refused) == 1
    moves = [(one["failed"], one["served"]) for one in sent_signals.of("read_retried")]
    assert moves == [("pg2", "pg"), ("pg1", "pg")]


def test_statement_that_no_server_supports_raises_and_is_not_remembered(refused: Refused) -> None:
    sql = "SELECT count(*) FILTER (WHERE generate_series(1, 2) > 0)"
    for _ in range(2):
        with pytest.raises(NotSupportedError):
            run(sql)
    assert len(refused) == 2
    assert pool().refusals.find(sql) is None


def test_routed_function_that_writes_runs_on_the_primary_and_pins_the_scope(
    pg: PostgreSQL, refused: Refused, writing_function: str, visit: Visit
) -> None:
    pg.pause()

    def act(request: Any) -> tuple[str, str]:
        return run(writing_function), server()

    for _ in range(2):
        assert visit(act) == ("pg", "pg")
        assert visit(lambda request: server()) == "pg"
    for _ in range(2):
        with unrelated_scope():
            assert run(writing_function) == "pg"
            assert server() == "pg"
    assert len(refused) == 1
    assert pg["pg"].execute("SELECT count(*) FROM app_author", database="site")[0][0] == 4


@pytest.mark.parametrize("is_known", [False, True])
def test_routed_function_that_writes_is_not_run_again_after_a_lost_connection(
    pg: PostgreSQL, writing_function: str, is_known: bool
) -> None:
    ran: list[str] = []

    def losing(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        result = execute(sql, params, many, context)
        if context["cursor"].db.alias != "pg":
            return result
        ran.append(str(sql))
        raise OperationalError("lost") from AdminShutdown("terminating connection")

    if is_known:
        with unrelated_scope():
            assert run(writing_function) == "pg"
    for alias in NODES:
        connections[alias].execute_wrappers.append(losing)
    try:
        with unrelated_scope(), pytest.raises(OperationalError, match="lost"):
            run(writing_function)
    finally:
        for alias in NODES:
            connections[alias].execute_wrappers.remove(losing)
    assert ran == [writing_function]


def test_session_state_of_a_sequence_is_that_of_the_primary(
    pg: PostgreSQL, refused: Refused
) -> None:
    """currval() raises 55000 in a session that has not used the sequence."""
    with connections["pg"].cursor() as cursor:
        cursor.execute("SELECT nextval('app_author_id_seq')")
    with unrelated_scope():
        assert run("SELECT currval('app_author_id_seq')") == "pg"
        assert server() in REPLICAS
    assert len(refused) == 1


@contextmanager
def serializable_role(pg: PostgreSQL, time_zone: str) -> Iterator[str]:
    """Use a role whose default isolation level is `serializable`, in as_databases()."""
    role = make_role(pg.cluster)
    settings = {"default_transaction_isolation": "serializable", "timezone": f"'{time_zone}'"}
    for name, value in settings.items():
        pg["pg"].execute(f"ALTER ROLE {role} SET {name} = {value}")
    pg.wait_for()
    entries = {f"s{alias}": database(pg[alias], user=role, conn_max_age=None) for alias in NODES}
    try:
        with as_databases(entries):
            yield role
    finally:
        pg["pg"].execute(f"ALTER ROLE {role} RESET ALL")
        pg.wait_for()


def test_reads_of_a_serializable_role_go_to_the_primary(
    pg: PostgreSQL, caplog: pytest.LogCaptureFixture
) -> None:
    with serializable_role(pg, "UTC") as role:
        assert [server_for(None) for _ in range(4)] == ["spg"] * 4
        assert Book.objects.db == "spg"
        assert counters.refusals["spg", f"role {role}"] == 1
        assert f"role {role}" in caplog.text


def test_replica_that_refuses_to_set_up_the_session_is_out_of_rotation(pg: PostgreSQL) -> None:
    """Django sets the time zone of a new connection by a SELECT."""
    with serializable_role(pg, "Asia/Tokyo"):
        assert [server_for(None) for _ in range(4)] == ["spg"] * 4
        assert pool().replica_set.out_of_rotation == {"spg1", "spg2"}
        assert "serializable" in endpoint("spg1").error


# pinning_status


def refused_by_status(alias: str) -> tuple[list[str], str]:
    """Return the names in the JSON of pinning_status, and the text."""
    answer = json.loads(run_command("pinning_status", "--json")[1])
    return answer["pools"][alias]["refused"], run_command("pinning_status")[1]


@pytest.mark.usefixtures("unlogged")
def test_status_names_unlogged_tables(pg: PostgreSQL) -> None:
    names, text = refused_by_status("pg")
    assert "app_account" in names
    assert "No standby can serve app_account" in text


def test_status_names_a_serializable_role(pg: PostgreSQL) -> None:
    with serializable_role(pg, "UTC") as role:
        names, text = refused_by_status("spg")
    assert names == [f"role {role} (serializable)"]
    assert f"No standby can serve role {role}" in text


def test_status_names_nothing_if_standbys_refuse_nothing(pg: PostgreSQL) -> None:
    names, text = refused_by_status("pg")
    assert names == []
    assert "refuses" not in text
