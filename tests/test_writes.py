from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.sessions.models import Session
from django.db import DatabaseError, connection, connections, transaction
from django.db.backends.sqlite3.base import SQLiteCursorWrapper
from django.test import override_settings
from django.utils import timezone

from pinning_middleware import (
    ReplicaWriteError,
    ignore_writes,
    is_pinned,
    pinning_scope,
    use_primary,
    use_replica,
)
from pinning_middleware.pins import PoolKey
from pinning_middleware.scopes.scope import current_scope
from tests.app.models import Author, Book, Tag
from tests.conftest import Visit, is_replica, where

pytestmark = pytest.mark.django_db(transaction=True, databases="__all__")


def execute(sql: str, *params: Any, alias: str = "default") -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)


def with_cursor(call: Callable[[Any], Any], alias: str = "default") -> None:
    with connections[alias].cursor() as cursor:
        call(cursor)


def rolled_back() -> None:
    with transaction.atomic():
        Tag.objects.create(name="x")
        transaction.set_rollback(True)


def failing() -> None:
    with pytest.raises(DatabaseError):
        execute("INSERT INTO no_such_table VALUES (1)")


def book() -> Book:
    with ignore_writes():
        return Book.objects.create(title="x", author=Author.objects.create(name="x"))


MANY = "INSERT INTO app_tag (name) VALUES (%s)"
RETURNING = "INSERT INTO app_tag (name) VALUES ('x') RETURNING *"
SCRIPT = "SELECT 1; INSERT INTO app_tag (name) VALUES ('x')"
WRITES: dict[str, Callable[[], Any]] = {
    "create": lambda: Tag.objects.create(name="x"),
    "save": lambda: Tag(name="x").save(),
    "save of what is there": lambda: book().save(),
    "update": lambda: Tag.objects.update(name="x"),
    "delete of an instance": lambda: book().delete(),
    "delete of a queryset": lambda: book() and Book.objects.all().delete(),
    "bulk_create": lambda: Tag.objects.bulk_create([Tag(name="x")]),
    "bulk_update": lambda: Book.objects.bulk_update([book()], ["title"]),
    "get_or_create": lambda: Tag.objects.get_or_create(name="x"),
    "update_or_create": lambda: Tag.objects.update_or_create(name="x"),
    "many to many": lambda: book().tags.add(Tag.objects.create(name="x")),
    "reverse foreign key": lambda: book().author.book_set.clear(),
    "raw": lambda: list(Tag.objects.using("default").raw(RETURNING)),
    "cursor": lambda: execute(MANY, "x"),
    "executemany": lambda: with_cursor(lambda cursor: cursor.executemany(MANY, [["x"], ["y"]])),
    "executescript": lambda: with_cursor(lambda cursor: cursor.executescript(SCRIPT)),
    "script with a quote of SQLite's": lambda: with_cursor(
        lambda cursor: cursor.executescript("SELECT 1 AS [']; DELETE FROM app_tag; SELECT 'x'")
    ),
    "WITH": lambda: execute("WITH x AS (SELECT 1) INSERT INTO app_tag (name) SELECT 'x' FROM x"),
    "unknown statement": lambda: execute("REINDEX"),
    "rolled back": rolled_back,
    "failing": failing,
    "inside use_replica": lambda: use_replica(lambda: Tag.objects.create(name="x"))(),
    "inside atomic": lambda: transaction.atomic(lambda: Tag.objects.create(name="x"))(),
}
READS: dict[str, Callable[[], Any]] = {
    "queries": lambda: list(Tag.objects.using("default")),
    "cursor": lambda: execute("SELECT 1"),
    "transaction": lambda: transaction.atomic(lambda: execute("SELECT 1"))(),
    "savepoints": lambda: transaction.atomic(transaction.atomic(lambda: None))(),
    "pragma": lambda: execute("PRAGMA user_version"),
    "explain": lambda: Tag.objects.using("default").explain(),
    "introspection": lambda: connection.introspection.table_names(),
    "nothing to write": lambda: (Tag.objects.none().delete(), Tag.objects.bulk_create([])),
    "a primary of no pool": lambda: Tag.objects.using("elsewhere").create(name="x"),
    "ignored": lambda: ignore_writes(lambda: Tag.objects.create(name="x"))(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_write_pins(visit: Visit, write: Callable[[], Any]) -> None:
    """In a GET: pins the rest of the request, and the next one."""

    def action(request: Any) -> tuple[bool, str]:
        write()
        return is_pinned(), where()

    assert visit(action) == (True, "default")
    assert visit() == "default"


@pytest.mark.parametrize("method", ["get", "post"])
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_other_statements_do_not_pin(visit: Visit, read: Callable[[], Any], method: str) -> None:
    """A request without a write sets no pin, regardless of its method."""
    visit(lambda request: read(), method)
    assert not visit.browser.cookies
    assert is_replica(visit())


def test_stored_procedure_pins() -> None:
    """SQLite has none, but the write is recorded before the error."""
    with pinning_scope():
        with pytest.raises(AttributeError), connection.cursor() as cursor:
            cursor.callproc("procedure", [1])
        assert is_pinned()


def test_stored_procedure_may_have_modified_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by set_config(): what it has set, replicas do not have."""

    def call(self: Any, *args: Any) -> None:
        pass

    monkeypatch.setattr(SQLiteCursorWrapper, "callproc", call, raising=False)
    with pinning_scope(), connection.cursor() as cursor:
        cursor.callproc("set_tenant", ["north"])
        assert current_scope().state(PoolKey("default")).session_modified
    connection.close()


@pytest.mark.parametrize("method", ["copy", "copy_expert", "copy_from", "stream"])
def test_missing_driver_methods_stay_missing(method: str) -> None:
    with connection.cursor() as cursor:
        assert not hasattr(cursor, method)
        assert hasattr(cursor, "executescript")


def test_write_is_recorded_before_it_is_sent() -> None:
    """A statement that fails may have written."""
    with pinning_scope():
        failing()
        assert is_pinned()


# Ignored writes


@ignore_writes
def ignored_by_bare_decorator() -> None:
    Tag.objects.create(name="x")


@ignore_writes()
def ignored_by_decorator() -> None:
    Tag.objects.create(name="x")


@ignore_writes
async def ignored_by_async_decorator() -> None:
    await Tag.objects.acreate(name="x")
    await asyncio.gather(Tag.objects.acreate(name="x"), Tag.objects.acreate(name="x"))


def ignored_by_block() -> None:
    with ignore_writes():
        with ignore_writes():
            pass
        Tag.objects.create(name="x")


@pytest.mark.parametrize(
    "ignored",
    [
        ignored_by_bare_decorator,
        ignored_by_decorator,
        async_to_sync(ignored_by_async_decorator),
        ignored_by_block,
    ],
)
def test_ignored_writes(ignored: Callable[[], None]) -> None:
    with pinning_scope() as scope:
        ignored()
        assert Tag.objects.using("default").exists()
        assert not is_pinned()
        Tag.objects.create(name="counts")
        assert is_pinned()
        ignored()
        assert is_pinned(), "what was pinned stays so"
    assert scope.token


def save_session(request: Any) -> None:
    request.session["seen"] = "yes"


def test_session_write_pins_unless_its_table_is_ignored(visit: Visit) -> None:
    visit(save_session)
    assert set(visit.browser.cookies) == {"sessionid", "pinning"}
    visit.browser.cookies.clear()
    with override_settings(PINNING_IGNORED_TABLES=("django_session",)):
        visit(save_session)
        assert set(visit.browser.cookies) == {"sessionid"}
        assert Session.objects.using("default").count() == 2


@override_settings(PINNING_IGNORED_TABLES=["APP_TAG", "django_session"])
@pytest.mark.parametrize(
    ("write", "pins"),
    [
        (lambda: Tag.objects.create(name="x"), False),
        (lambda: Tag.objects.update(name="x"), False),
        (lambda: Tag.objects.all().delete(), True),  # also deletes from the table between
        (lambda: execute("INSERT INTO main.app_tag (name) VALUES ('x')"), False),
        (lambda: with_cursor(lambda cursor: cursor.executemany(MANY, [["x"]])), False),
        (lambda: execute("WITH x AS (SELECT 1) DELETE FROM app_tag WHERE id = 0"), True),
        (lambda: Author.objects.create(name="x"), True),
        (lambda: book().tags.add(Tag.objects.create(name="x")), True),
    ],
)
def test_ignored_tables(write: Callable[[], Any], pins: bool) -> None:
    with ignore_writes():
        Book.objects.create().tags.add(Tag.objects.create(name="there"))
    with pinning_scope():
        write()
        assert is_pinned() is pins


def test_clearing_sessions_is_ignored() -> None:
    with override_settings(PINNING_IGNORED_TABLES=("django_session",)), pinning_scope():
        Session.objects.create(session_key="x", expire_date=timezone.now())
        Session.objects.filter(session_key="x").delete()
        assert not is_pinned()


# Replicas

REFUSED: dict[str, Callable[[], Any]] = {
    "create": lambda: Tag.objects.using("replica1").create(name="x"),
    "save": lambda: Tag(name="x").save(using="replica1"),
    "update": lambda: Tag.objects.using("replica1").update(name="x"),
    "delete": lambda: Tag.objects.using("replica1").all().delete(),
    "bulk_create": lambda: Tag.objects.using("replica1").bulk_create([Tag(name="x")]),
    "cursor": lambda: execute("DELETE FROM app_tag", alias="replica1"),
    "raw": lambda: list(Tag.objects.using("replica1").raw(RETURNING)),
    "executemany": lambda: with_cursor(lambda c: c.executemany(MANY, [["x"]]), "replica1"),
    "executescript": lambda: with_cursor(lambda c: c.executescript(SCRIPT), "replica1"),
    "callproc": lambda: with_cursor(lambda c: c.callproc("procedure"), "replica1"),
    "unknown statement": lambda: execute("VACUUM", alias="replica1"),
    "ignored": lambda: ignore_writes(lambda: execute("DELETE FROM app_tag", alias="replica1"))(),
}


@pytest.mark.parametrize("write", REFUSED.values(), ids=REFUSED.keys())
def test_write_on_a_replica_is_rejected(
    visit: Visit, named: Callable[..., None], write: Callable[[], Any]
) -> None:
    """Rejected before they are sent, so no data is lost or diverges."""
    named()

    def action(request: Any) -> tuple[Any, ...]:
        with pytest.raises(ReplicaWriteError) as raised:
            write()
        left = list(Tag.objects.using("replica1").values_list("name", flat=True))
        return str(raised.value), left, is_pinned()

    message, left, pinned = visit(action)
    assert left == ["replica1"]
    assert not pinned
    assert message.startswith("'replica1' is a replica of 'default', so this write was not sent: ")
    assert message.endswith("Write with .using('default'), or let the router choose.")
    assert not visit.browser.cookies


def test_replica_write_error_is_a_database_error() -> None:
    """Code that handles failing writes then handles it, too."""
    with pytest.raises(DatabaseError, match=r"DELETE FROM app_tag"):
        execute("DELETE FROM app_tag", alias="replica1")


def test_replica_allows_reads_and_transactions(named: Callable[..., None]) -> None:
    named("replica1")
    with transaction.atomic(using="replica1"), transaction.atomic(using="replica1"):
        assert Tag.objects.using("replica1").get().name == "replica1"


def test_former_replica_is_writable() -> None:
    with override_settings(PINNING_REPLICAS=["replica2"]), transaction.atomic(using="replica1"):
        Tag.objects.using("replica1").create(name="x")
        transaction.set_rollback(True, using="replica1")


# Writes of tasks and threads


def write() -> None:
    Tag.objects.create(name="x")


async def awrite() -> None:
    await Tag.objects.acreate(name="x")


@pytest.mark.parametrize(
    "do_it",
    [
        lambda: Tag.objects.acreate(name="x"),
        lambda: asyncio.gather(Tag.objects.acreate(name="x"), asyncio.sleep(0)),
        lambda: asyncio.create_task(Tag.objects.acreate(name="x")),
        lambda: asyncio.wait_for(Tag.objects.acreate(name="x"), 60),
        lambda: sync_to_async(write, thread_sensitive=True)(),
        lambda: sync_to_async(write, thread_sensitive=False)(),
        lambda: sync_to_async(async_to_sync(awrite))(),
        lambda: asyncio.to_thread(write),
    ],
)
def test_write_of_a_child_task_or_thread_pins_the_parent(browser: Any, do: Any, do_it: Any) -> None:
    """The first write of a scope, in a task or thread of its own."""
    seen = []

    async def action(request: Any) -> str:
        await do_it()
        seen.append((is_pinned(), where()))
        return "done"

    browser.get(f"/async/{do(action)}/")
    assert seen == [(True, "default")]
    assert "pinning" in browser.cookies


def test_concurrent_requests_share_no_writes(do: Any) -> None:
    """Two requests alternate in one event loop, and one writes."""
    from django.test import AsyncClient

    seen: dict[str, list[Any]] = {"writer": [], "reader": []}

    async def both() -> None:
        turn = asyncio.Barrier(2)

        async def act(name: str) -> str:
            await turn.wait()
            if name == "writer":
                await Tag.objects.acreate(name="x")
            await turn.wait()
            seen[name].extend([is_pinned(), where() == "default"])
            await turn.wait()
            return name

        async def writer(request: Any) -> str:
            return await act("writer")

        async def reader(request: Any) -> str:
            return await act("reader")

        wrote, read = await asyncio.gather(
            AsyncClient().get(f"/async/{do(writer)}/"), AsyncClient().get(f"/async/{do(reader)}/")
        )
        assert "pinning" in wrote.cookies
        assert not read.cookies

    async_to_sync(both)()
    assert seen == {"writer": [True, True], "reader": [False, False]}


@pytest.mark.parametrize("in_scope", [False, True])
def test_threads_share_no_writes(in_scope: bool) -> None:
    """A thread without the context has its own ambient scope."""
    seen = []

    def ask() -> None:
        seen.append((is_pinned(), is_replica(where())))
        write()
        seen.append((is_pinned(), where() == "default"))
        connections.close_all()

    def run() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    if in_scope:
        with pinning_scope():
            write()
            run()
    else:
        run()
        assert not is_pinned()
    assert seen == [(False, True), (True, True)]


def test_use_primary_does_not_pin(visit: Visit) -> None:
    visit(lambda request: use_primary(lambda: Tag.objects.count())())
    assert not visit.browser.cookies
