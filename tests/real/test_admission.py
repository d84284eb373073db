"""Connections are admitted when a statement runs, however old the cursor or transaction is."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import OperationalError, connections, transaction
from django.test import override_settings

from pinning_middleware import ReplicaWriteError, scopes, tokens, use_primary
from pinning_middleware.backend import failover
from pinning_middleware.pins import Pin, PinKey, Position
from pinning_middleware.reasons import Fault
from pinning_middleware.routing import policy, route
from pinning_middleware.scopes.scope import current_scope, enter
from pinning_middleware.testing import capture_reads
from tests.app.models import Book
from tests.conftest import Visit

from .conftest import (
    PostgreSQL,
    as_databases,
    as_layout,
    eventually,
    in_thread,
    make_tables,
    pin_in,
    pool,
    position_in,
    probe_replicas,
    server_for,
    titles,
    unrelated_scope,
    write,
)
from .layouts import Forwarder, database

pytestmark = pytest.mark.real

COUNT = "SELECT count(*) FROM app_book"
WROTE = r"Cannot use 'pg1' \(this request has written to the primary\)"
NOT_CAUGHT_UP = r"Cannot use 'pg1' \(no replica is known to have replayed the earlier write\)"


def execute(cursor: Any) -> Any:
    cursor.execute(COUNT)
    return cursor.fetchone()[0]


def stream(cursor: Any) -> Any:
    ((count,),) = cursor.stream(COUNT)
    return count


def copy(cursor: Any) -> Any:
    with cursor.copy(f"COPY ({COUNT}) TO STDOUT") as rows:
        return int(b"".join(bytes(row) for row in rows))


USES = pytest.mark.parametrize("use", [execute, stream, copy])


# A cursor that is older than the write


@USES
@pytest.mark.parametrize("was_used", [False, True], ids=["unused", "used"])
def test_replica_cursor_opened_before_the_write_reads_the_write(
    pg: PostgreSQL, visit: Visit, use: Callable[[Any], Any], was_used: bool
) -> None:
    pg.pause()

    def act(request: Any) -> tuple[int, str]:
        with connections["pg1"].cursor() as cursor:
            if was_used:
                assert use(cursor) == 0
            Book.objects.create(title="new")
            return use(cursor), cursor.db.alias

    assert visit(act) == (1, "pg")


def test_server_side_cursor_opened_before_the_write_reads_the_write(
    pg: PostgreSQL, visit: Visit
) -> None:
    pg.pause()

    def act(request: Any) -> int:
        with connections["pg1"].chunked_cursor() as cursor:
            Book.objects.create(title="new")
            return int(execute(cursor))

    assert visit(act) == 1


def test_replica_cursor_opened_before_the_write_raises_in_modified_session(
    pg: PostgreSQL, visit: Visit
) -> None:
    """The statement would return something else in the session of the primary."""
    pg.pause()

    def act(request: Any) -> None:
        with connections["pg1"].cursor() as cursor:
            cursor.execute("SET search_path = public")
            Book.objects.create(title="new")
            with pytest.raises(OperationalError, match=WROTE):
                cursor.execute(COUNT)

    visit(act)
    connections["pg1"].close()


def test_executemany_of_replica_cursor_opened_before_the_write_raises(
    pg: PostgreSQL, visit: Visit
) -> None:
    pg.pause()

    def act(request: Any) -> None:
        with connections["pg1"].cursor() as cursor:
            Book.objects.create(title="new")
            with pytest.raises(OperationalError, match=WROTE):
                cursor.executemany(f"{COUNT} WHERE id > %s", [(0,), (1,)])

    visit(act)


def test_cursor_that_was_moved_to_the_primary_still_rejects_writes(pg: PostgreSQL) -> None:
    with unrelated_scope(), connections["pg1"].cursor() as cursor:
        Book.objects.create(title="new")
        assert execute(cursor) == 1
        assert cursor.db.alias == "pg"
        with pytest.raises(ReplicaWriteError):
            cursor.execute("DELETE FROM app_book")


# A cursor that is older than the pin


@USES
def test_replica_cursor_kept_between_requests_reads_what_the_pin_requires(
    pg: PostgreSQL, visit: Visit, use: Callable[[Any], Any]
) -> None:
    pg.pause()
    kept = SimpleNamespace()

    def open_cursor(request: Any) -> int:
        kept.cursor = connections["pg1"].cursor()
        return int(use(kept.cursor))

    def read(request: Any) -> tuple[int, str]:
        return use(kept.cursor), kept.cursor.db.alias

    assert visit(open_cursor) == 0
    visit(lambda request: Book.objects.create(title="new"))
    assert visit(read) == (1, "pg")
    kept.cursor.close()


def test_replica_cursor_kept_between_requests_stays_where_its_replica_has_caught_up(
    pg: PostgreSQL, visit: Visit
) -> None:
    kept = SimpleNamespace()

    def open_cursor(request: Any) -> int:
        kept.cursor = connections["pg1"].cursor()
        return int(execute(kept.cursor))

    def read(request: Any) -> tuple[int, str]:
        return execute(kept.cursor), kept.cursor.db.alias

    assert visit(open_cursor) == 0
    visit(lambda request: Book.objects.create(title="new"))
    pg.wait_for()
    pg.pause("pg2")
    assert visit(read) == (1, "pg1")
    kept.cursor.close()


def test_replica_cursor_kept_between_requests_raises_in_modified_session(
    pg: PostgreSQL, visit: Visit
) -> None:
    pg.pause()
    kept = SimpleNamespace()

    def open_cursor(request: Any) -> None:
        kept.cursor = connections["pg1"].cursor()
        kept.cursor.execute("SET search_path = public")

    def read(request: Any) -> None:
        with pytest.raises(OperationalError, match=NOT_CAUGHT_UP):
            kept.cursor.execute(COUNT)

    visit(open_cursor)
    visit(lambda request: Book.objects.create(title="new"))
    visit(read)
    kept.cursor.close()
    connections["pg1"].close()


def test_connection_is_judged_by_its_own_server_and_not_by_another_of_its_alias(
    pg: PostgreSQL,
) -> None:
    """A copy of the connection may have reached another server behind the alias."""
    with (
        Forwarder(pg["pg1"]) as readers,
        as_layout(pg, readers=database(readers, conn_max_age=None)),
        closing(connections["readers"].copy()) as copied,
    ):
        copied.connect()
        pg.pause("pg1")
        readers.point_to(pg["pg2"], cut=False)
        token = write()
        pg.wait_for("pg2")
        assert server_port(token) == pg["pg2"].port
        with unrelated_scope(token), copied.cursor() as cursor:
            assert execute(cursor) == 1


def server_port(token: str | None) -> int:
    with unrelated_scope(token), connections["readers"].cursor() as cursor:
        cursor.execute("SELECT inet_server_port()")
        return int(cursor.fetchone()[0])


# A transaction that is open on a replica


def test_open_transaction_of_replica_raises_after_the_scope_has_written(
    pg: PostgreSQL, visit: Visit
) -> None:
    pg.pause()

    def act(request: Any) -> list[int]:
        books = Book.objects.using("pg1")
        with transaction.atomic(using="pg1"):
            counts = [books.count()]
            Book.objects.create(title="new")
            with pytest.raises(OperationalError, match=WROTE):
                books.count()
            with pytest.raises(OperationalError, match=WROTE), connections["pg1"].cursor() as one:
                one.execute(COUNT)
        return [*counts, books.count()]

    assert visit(act) == [0, 1]


def test_open_transaction_of_replica_whose_snapshot_has_the_position_serves(
    pg: PostgreSQL, visit: Visit
) -> None:
    visit(lambda request: Book.objects.create(title="new"))
    pg.wait_for()

    def act(request: Any) -> tuple[list[str], str]:
        books = Book.objects.using("pg1")
        with transaction.atomic(using="pg1"), connections["pg1"].cursor() as cursor:
            found = list(books.values_list("title", flat=True))
            execute(cursor)
            return found, cursor.db.alias

    assert visit(act) == (["new"], "pg1")


def test_open_transaction_of_replica_that_lags_behind_the_pin_raises(
    pg: PostgreSQL, visit: Visit
) -> None:
    pg.pause()
    visit(lambda request: Book.objects.create(title="new"))

    def act(request: Any) -> None:
        with transaction.atomic(using="pg1"):
            for _ in range(2):
                with pytest.raises(OperationalError, match=NOT_CAUGHT_UP):
                    Book.objects.using("pg1").count()

    visit(act)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ"])
def test_transaction_of_replica_opened_before_the_pin_never_serves_its_old_snapshot(
    pg: PostgreSQL, isolation: str
) -> None:
    """Also after the replica has caught up: the rows are those of the beginning."""
    books = Book.objects.using("pg1")
    # The server of this connection is known, and later that it has caught up.
    probe_replicas()
    with transaction.atomic(using="pg1"):
        with unrelated_scope(), connections["pg1"].cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
            assert books.count() == 0
        token = in_thread(write)
        pg.wait_for()
        in_thread(probe_replicas)
        for _ in range(2):
            with unrelated_scope(token), pytest.raises(OperationalError, match=NOT_CAUGHT_UP):
                books.count()
    with unrelated_scope(token):
        assert books.count() == 1


@pytest.mark.parametrize("way", ["BEGIN", "set_autocommit"])
def test_transaction_of_replica_without_atomic_never_serves_its_old_snapshot(
    pg: PostgreSQL, way: str
) -> None:
    connection = connections["pg1"]
    try:
        with unrelated_scope(), connection.cursor() as cursor:
            if way == "BEGIN":
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            else:
                connection.set_autocommit(False)
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            assert execute(cursor) == 0
        token = in_thread(write)
        pg.wait_for()
        with (
            unrelated_scope(token),
            connection.cursor() as cursor,
            pytest.raises(OperationalError, match=NOT_CAUGHT_UP),
        ):
            cursor.execute(COUNT)
    finally:
        connection.close()


# A connection of the primary's alias to a former primary


@pytest.fixture
def former(own_pg: PostgreSQL) -> Iterator[Callable[[], str]]:
    """
    The primary's alias resolves to `pg` at first. Return a function that promotes `pg1`, lets the
    alias resolve to it and writes there by another thread; it returns the token of that write.
    Connections to `pg` stay open.
    """
    with Forwarder(own_pg["pg"]) as address:
        entries = {
            "site": database(address, conn_max_age=None),
            "reader": database(own_pg["pg2"], conn_max_age=None),
        }
        with as_databases(entries):
            make_tables("site")
            enter(None)

            def switch() -> str:
                own_pg["pg1"].promote()
                address.point_to(own_pg["pg1"], cut=False)
                return str(in_thread(write))

            yield switch


def port_of_primary() -> int:
    with connections["site"].cursor() as cursor:
        cursor.execute("SELECT inet_server_port()")
        return int(cursor.fetchone()[0])


def test_connection_to_former_primary_is_replaced_for_pinned_read(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    write("before")
    own_pg.wait_for()
    connection = connections["site"]
    before = connection.connection
    token = former()
    assert before is connection.connection
    assert policy.admit(pool(), connection, current_scope(), None) == (Fault.DEMOTED, None)
    assert titles(token) == ["before", "new"]
    assert connection.connection is not before
    with unrelated_scope(token):
        assert port_of_primary() == own_pg["pg1"].port


def test_connection_to_former_primary_raises_in_raw_transaction(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    write("before")
    own_pg.wait_for()
    with unrelated_scope(), connections["site"].cursor() as cursor:
        cursor.execute("BEGIN")
        token = former()
        with (
            unrelated_scope(token),
            pytest.raises(OperationalError, match=Fault.DEMOTED.description),
        ):
            cursor.execute(COUNT)
        cursor.execute("ROLLBACK")
    assert titles(token) == ["before", "new"]


def test_connection_to_former_primary_that_was_never_probed_is_replaced_for_pinned_read(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    with unrelated_scope():
        assert port_of_primary() == own_pg["pg"].port
    token = former()
    assert titles(token) == ["new"]


def test_connection_to_former_primary_is_replaced_if_the_pin_is_of_a_later_timeline(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    """Only another process has connected to the new primary; this one has its token."""
    write("before")
    own_pg.wait_for()
    ((log, _),) = position_in(write("also before")).items()
    token = former()
    pin = pin_in(token)
    assert pin.position is not None
    ((later, point),) = pin.position.points.items()
    assert (log.rpartition("-")[2], later.rpartition("-")[2]) == ("1", "2")
    (known,) = (s for s in pool().endpoint.servers if later in s.position)
    pool().endpoint.forget(known)
    token = tokens.dumps({PinKey("site"): Pin(pin.until, None, Position({later: point}))})
    assert "new" in titles(token)


def test_connection_to_former_primary_is_replaced_before_a_transaction_begins(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    write("before")
    own_pg.wait_for()
    token = former()
    with unrelated_scope(token), transaction.atomic(using="site"):
        assert "new" in Book.objects.values_list("title", flat=True)


def test_connection_to_former_primary_is_replaced_before_a_write(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    """What the former primary accepts is lost."""
    write("before")
    own_pg.wait_for()
    token = former()
    with unrelated_scope(token):
        Book.objects.create(title="late")
    assert in_thread(lambda: titles(token)) == ["before", "late", "new"]


@pytest.mark.parametrize("is_atomic", [False, True])
def test_write_in_a_modified_session_of_a_former_primary_raises(
    own_pg: PostgreSQL, former: Callable[[], str], is_atomic: bool
) -> None:
    """A new connection would not have what the code has set; the next one is used as it is."""

    def add() -> None:
        with transaction.atomic(using="site") if is_atomic else nullcontext():
            Book.objects.create(title="late")

    write("before")
    own_pg.wait_for()
    with connections["site"].cursor() as cursor:
        cursor.execute("SET search_path TO public")
    token = former()
    with unrelated_scope(token):
        with pytest.raises(OperationalError, match="its session was modified"):
            add()
        add()
    assert in_thread(lambda: titles(token)) == ["before", "late", "new"]


def copy_in(cursor: Any) -> None:
    with cursor.copy("COPY app_book (title) FROM STDIN") as copy:
        copy.write_row(["late"])


@pytest.mark.parametrize(
    "act", [copy_in, lambda cursor: cursor.execute("SELECT pg_advisory_lock(7)")]
)
def test_connection_to_former_primary_is_replaced_before_a_copy_and_a_lock(
    own_pg: PostgreSQL, former: Callable[[], str], act: Callable[[Any], object]
) -> None:
    write("before")
    own_pg.wait_for()
    token = former()
    with unrelated_scope(token), connections["site"].cursor() as cursor:
        act(cursor)
        cursor.execute("SELECT inet_server_port()")
        assert cursor.fetchone() == (own_pg["pg1"].port,)


@pytest.fixture
def stale() -> Iterator[None]:
    with override_settings(PINNING_PRIMARY_DOWN="stale"):
        yield


@pytest.mark.usefixtures("stale")
def test_connection_to_former_primary_is_replaced_where_replicas_may_substitute(
    own_pg: PostgreSQL, former: Callable[[], str]
) -> None:
    write("before")
    own_pg.wait_for()
    token = former()
    assert titles(token) == ["before", "new"]


# A probe of the primary's own connection that fails


class Terminator(logging.Handler):
    """Ends the session of the primary's connection at each probe, before its statement is sent."""

    def __init__(self, pg: PostgreSQL) -> None:
        super().__init__()
        self.pg, self.ended = pg, 0

    def emit(self, record: logging.LogRecord) -> None:
        pid = connections["pg"].connection.info.backend_pid
        sessions = f"FROM pg_stat_activity WHERE pid = {pid}"
        self.pg["pg"].execute(f"SELECT pg_terminate_backend(pid) {sessions}")
        assert eventually(lambda: self.pg["pg"].execute(f"SELECT count(*) {sessions}") == [(0,)])
        self.ended += 1


@pytest.fixture
def terminator(pg: PostgreSQL) -> Iterator[Terminator]:
    """An unidentified connection to the primary, whose probes fail."""
    write("before")
    connections["pg"].close()
    connections["pg"].ensure_connection()
    pool().endpoint.must_reidentify = True
    log, handler = logging.getLogger("pinning_middleware.probes"), Terminator(pg)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


def read_primary() -> None:
    with use_primary():
        assert "before" in Book.objects.values_list("title", flat=True)


def write_atomically() -> None:
    with transaction.atomic(using="pg"):
        Book.objects.create(title="new")


@pytest.mark.parametrize(
    "act", [read_primary, lambda: Book.objects.create(title="new"), write_atomically]
)
def test_failed_probe_of_the_primary_is_no_error_of_the_statement(
    terminator: Terminator, act: Callable[[], Any]
) -> None:
    with unrelated_scope():
        act()
    # A connection that is lost is opened again once for the probe.
    assert terminator.ended == 2


# One decision and one admission for each read


READS: dict[str, Callable[[Any], Any]] = {
    "list": list,
    "count": lambda books: books.count(),
    "exists": lambda books: books.exists(),
    "first": lambda books: books.first(),
    "get": lambda books: books.get(title="new"),
    "in_bulk": lambda books: books.in_bulk(),
    "values": lambda books: list(books.values_list("title", flat=True)),
    "raw": lambda books: list(books.raw("SELECT id, title FROM app_book")),
}


@contextmanager
def counting(*functions: tuple[Any, str]) -> Iterator[Counter[str]]:
    """Count the calls of functions, each given as a module and a name in it."""
    counted: Counter[str] = Counter()

    def count(patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted_call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return original(*args, **kwargs)

        patch.setattr(module, name, counted_call)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in functions:
            count(patch, module, name)
        yield counted


@pytest.fixture
def calls() -> Iterator[Counter[str]]:
    """Count the calls of decide() and admit()."""
    with counting((route, "decide"), (failover, "admit")) as counted:
        yield counted


@pytest.fixture
def token(pg: PostgreSQL) -> str:
    """The token of a write, in a process that has identified its servers."""
    token = write()
    pg.wait_for()
    probe_replicas()
    return token


ONCE = {"decide": 1, "admit": 1}


@pytest.mark.parametrize("read", READS)
def test_unpinned_read_is_decided_once_and_admitted_once(
    token: str, calls: Counter[str], read: str
) -> None:
    with unrelated_scope():
        calls.clear()
        READS[read](Book.objects.all())
        assert calls == ONCE


@pytest.mark.parametrize("read", READS)
def test_first_pinned_read_is_decided_once_and_admitted_once(
    token: str, calls: Counter[str], read: str
) -> None:
    with unrelated_scope(token):
        calls.clear()
        READS[read](Book.objects.all())
        assert calls == ONCE


@pytest.mark.parametrize("read", READS)
def test_pinned_read_of_the_primary_is_decided_once_and_admitted_once(
    pg: PostgreSQL, token: str, calls: Counter[str], read: str
) -> None:
    pg.pause()
    later = write("later")
    with unrelated_scope(later):
        calls.clear()
        READS[read](Book.objects.all())
        assert calls == ONCE


@pytest.mark.parametrize("read", READS)
def test_read_looks_up_scope_and_overrides_once_to_decide_and_once_to_run(
    token: str, read: str
) -> None:
    functions = (scopes.scope, "entered_scope"), (scopes.overrides, "current_overrides")
    for known in (None, token):
        with unrelated_scope(known), counting(*functions) as lookups:
            READS[read](Book.objects.all())
        # The overrides also when the cursor is opened.
        assert lookups == {"entered_scope": 2, "current_overrides": 3}


@pytest.mark.parametrize("alias", ["pg", "pg1"])
def test_read_of_a_named_alias_is_not_decided_and_admitted_once(
    token: str, calls: Counter[str], alias: str
) -> None:
    for known in (None, token):
        for read in READS.values():
            with unrelated_scope(known):
                calls.clear()
                read(Book.objects.using(alias))
                assert calls == {"admit": 1}


@pytest.mark.parametrize("read", READS)
def test_read_in_transaction_is_decided_once_and_admitted_once(
    token: str, calls: Counter[str], read: str
) -> None:
    with unrelated_scope(), transaction.atomic(using="pg"):
        calls.clear()
        READS[read](Book.objects.all())
        assert calls == ONCE


def test_iterator_reads_from_one_alias_although_django_asks_the_router_twice(
    token: str, calls: Counter[str]
) -> None:
    with override_settings(PINNING_BALANCE_BY="query"):
        for known in (None, token):
            with unrelated_scope(known), capture_reads() as reads:
                calls.clear()
                list(Book.objects.iterator())
                assert calls == {"decide": 2, "admit": 1}
            (read,) = reads
            assert read.role == "replica"


def test_named_replica_that_has_not_caught_up_is_admitted_once_for_each_connection_tried(
    pg: PostgreSQL, token: str, calls: Counter[str]
) -> None:
    pg.pause()
    later = write("later")
    with unrelated_scope(later):
        calls.clear()
        assert Book.objects.using("pg1").count() == 2
        # Both replicas and the primary.
        assert calls == {"admit": 3}
    assert server_for(later) == "pg"


def test_read_of_async_queryset_is_decided_once_and_admitted_once(
    token: str, calls: Counter[str], visit: Visit
) -> None:
    async def act() -> int:
        return await Book.objects.acount()

    def run(request: Any) -> Counter[str]:
        calls.clear()
        async_to_sync(act)()
        return Counter(calls)

    assert visit(run) == ONCE
