"""
What runs on the connections: writes on a primary are noted in the scope, writes on a replica are
refused before they are sent.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.db.backends.utils import CursorWrapper

from .conf import conf
from .exceptions import ReplicaWriteError
from .sql import Kind, kind_of, table_of
from .state import current_scope, writes_ignored

__all__ = ["install", "watch"]

# What drivers offer beside `execute`, and Django hands through without its execute wrappers.
_PAST_THE_WRAPPERS = ("copy", "copy_expert", "copy_from", "executescript", "stream")

_UNREADABLE = "?"


def watch(
    execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: dict[str, Any]
) -> Any:
    """Note or refuse the statement, then run it: an execute wrapper of every connection."""
    _inspect(context["connection"], sql, _alias_of(context["cursor"]))
    return execute(sql, params, many, context)


def _alias_of(cursor: Any) -> str:
    # One that was opened elsewhere, because its replica failed, is still that replica's.
    alias: str = getattr(cursor, "pinning_alias", cursor.db.alias)
    return alias


def _inspect(connection: BaseDatabaseWrapper, sql: Any, alias: str) -> None:
    if (specs := conf.watched.get(alias)) is not None:
        text = _text(connection, sql)
        kind = kind_of(text, connection.vendor)
        if kind is Kind.WRITE and not _ignored(text):
            scope = current_scope()
            in_transaction = connection.in_atomic_block or not connection.autocommit
            for spec in specs:
                scope[spec.key].note_write(in_transaction)
        elif kind is Kind.LOCK:
            scope = current_scope()
            if not scope.lasting:
                for spec in specs:
                    scope[spec.key].note_lock()
    elif (primary := conf.guarded.get(alias)) is not None:
        text = _text(connection, sql)
        if kind_of(text, connection.vendor) is Kind.WRITE and not _is_bookkeeping_of_test_runner(
            text
        ):
            raise ReplicaWriteError(
                f"{alias!r} is a replica of {primary!r}, so this write was not sent: "
                f"{text[:80]!r}. Write with .using({primary!r}), or let the router choose."
            )


def _text(connection: BaseDatabaseWrapper, sql: Any) -> str:
    if isinstance(sql, str):
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    if hasattr(sql, "as_string"):  # psycopg's composed statements
        return str(sql.as_string(connection.connection))
    return _UNREADABLE


def _ignored(text: str) -> bool:
    if writes_ignored.get():
        return True
    tables = conf.ignored_tables
    if not tables or (table := table_of(text)) is None:
        return False
    return table in tables or table.rpartition(".")[2] in tables


def _is_bookkeeping_of_test_runner(text: str) -> bool:
    # A replica that is no mirror gets an empty test database of its own, and Django records
    # there which migrations it did not run.
    testing = sys.modules.get("django.test.utils")
    return (
        "django_migrations" in text
        and testing is not None
        and hasattr(testing._TestState, "saved_data")
    )


def _on_connect(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    # `connection.execute_wrapper()` is a block that appends and pops; this one stays, outermost.
    if watch not in connection.execute_wrappers:
        connection.execute_wrappers.insert(0, watch)


def install() -> None:
    """Watch every connection from now on. Calling it again changes nothing."""
    connection_created.connect(_on_connect, dispatch_uid="pinning_middleware.writes")
    if getattr(CursorWrapper.callproc, "_pinning", False):
        return
    callproc = CursorWrapper.callproc

    @functools.wraps(callproc)
    def watched_callproc(
        self: CursorWrapper, procname: str, params: Any = None, kparams: Any = None
    ) -> Any:
        _inspect(self.db, f"CALL {procname}", _alias_of(self))
        return callproc(self, procname, params, kparams)

    watched_callproc._pinning = True  # type: ignore[attr-defined]
    CursorWrapper.callproc = watched_callproc  # type: ignore[method-assign]
    for name in _PAST_THE_WRAPPERS:
        setattr(CursorWrapper, name, property(functools.partial(_watched_method, name)))


def _watched_method(name: str, wrapper: CursorWrapper) -> Callable[..., Any]:
    method = getattr(wrapper.cursor, name)

    @functools.wraps(method)
    def watched(statement: Any, *args: Any, **kwargs: Any) -> Any:
        sql = _UNREADABLE if name == "copy_from" else statement
        _inspect(wrapper.db, sql, _alias_of(wrapper))
        return method(statement, *args, **kwargs)

    return watched
