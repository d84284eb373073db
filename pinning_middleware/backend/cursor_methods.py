"""Methods of cursors that do not pass Django's execute wrappers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

from django.db.backends.utils import CursorWrapper

from pinning_middleware.backend.call import UnopenedCursor, call_of, connect_anyway
from pinning_middleware.backend.execute import (
    intended_alias,
    record_modified_session,
    record_read_of,
)
from pinning_middleware.backend.failover import admit_cursor
from pinning_middleware.backend.former_primary import check_primary
from pinning_middleware.backend.session_setup import is_unmanaged, set_up_session
from pinning_middleware.backend.writes import classify, record_lock, recording_write
from pinning_middleware.conf import conf
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import effects_on
from pinning_middleware.scopes.scope import current_scope
from pinning_middleware.servers.probe import failover_disabled
from pinning_middleware.sql import StatementKind

# The methods of psycopg's, psycopg2's and sqlite3's cursors, and what they call the statement.
STATEMENT_ARGUMENTS: Final = {
    "copy": "statement",
    "copy_expert": "sql",
    "copy_from": "",
    "copy_to": "",
    "executescript": "sql_script",
    "stream": "query",
}
# The statements of methods that take none; unknown ones count as writes.
_STATEMENTS: Final = {"copy_to": "COPY source TO STDOUT"}
_UNREADABLE: Final = "?"


def record_callproc(original: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``callproc()`` a write: what a procedure does is unknown."""

    def callproc(
        self: CursorWrapper, procname: str, params: Any = None, kparams: Any = None
    ) -> Any:
        if is_unmanaged() or _is_connecting(self):
            return original(self, procname, params, kparams)
        _check_primary(self)
        set_up_session(self.db)
        with recording_write(self.db, intended_alias(self), f"CALL {procname}"):
            result = original(self, procname, params, kparams)
        _record_session(self)
        return result

    return callproc


def _is_connecting(cursor: Any) -> bool:
    """Return whether a receiver of ``connection_created`` sets up a session."""
    return bool(getattr(cursor.db, "is_connecting", False))


def _check_primary(cursor: Any) -> None:
    pool = pools().by_connection.get(cursor.db.alias)
    if pool is None or cursor.db.alias != pool.primary:
        return
    call = call_of(pool, cursor)
    connect_anyway(call)
    if not (failover_disabled.get() or call.effects.no_failover):
        check_primary(pool, call)


def _record_session(cursor: Any) -> None:
    """Record that a statement may have modified the session."""
    pool = pools().by_connection.get(cursor.db.alias)
    if pool is not None and cursor.db.connection is not None:
        record_modified_session(pool, cursor.db)


class DriverMethod:
    """
    A descriptor that returns the driver's method of this name, and records its writes. Django's
    class has no such attribute: ``CursorWrapper.__getattr__()`` returns the driver's.
    """

    pinning_original: Any

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, cursor: Any, owner: Any = None) -> Any:
        if cursor is None:
            return self
        if not isinstance(cursor.cursor, UnopenedCursor):
            # Raise AttributeError for a method that the driver does not have.
            getattr(cursor.cursor, self.name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if is_unmanaged() or _is_connecting(cursor):
                return getattr(cursor.cursor, self.name)(*args, **kwargs)
            keyword, sql = STATEMENT_ARGUMENTS[self.name], _STATEMENTS.get(self.name, _UNREADABLE)
            if keyword:
                sql = args[0] if args else kwargs.get(keyword, _UNREADABLE)
            statement = classify(cursor.db, sql)
            kind = statement.kind
            # Nothing suggests that an unreadable statement sets anything.
            modifies_session = statement.modifies_session and sql is not _UNREADABLE
            pool = pools().by_connection.get(cursor.db.alias)
            if kind is not StatementKind.WRITE:
                if pool is not None:
                    if failover_disabled.get() or effects_on(pool.primary).no_failover:
                        set_up_session(cursor.db)
                    else:
                        admit_cursor(pool, cursor)
                    if kind is StatementKind.LOCK:
                        record_lock(cursor.db.alias)
                result = getattr(cursor.cursor, self.name)(*args, **kwargs)
                if modifies_session:
                    _record_session(cursor)
                is_read = kind in (StatementKind.READ, StatementKind.LOCK)
                if is_read and pool is not None and cursor.db.connection is not None:
                    record_read_of(pool, current_scope(), cursor, kind, sql)
                return result
            alias = intended_alias(cursor)
            _check_primary(cursor)
            set_up_session(cursor.db)
            recording = recording_write(cursor.db, alias, sql)
            if modifies_session and alias not in conf.readonly_aliases:
                _record_session(cursor)
            if self.name in _DEFERRED and alias not in conf.readonly_aliases:
                return _DEFERRED[self.name](recording, cursor, *args, **kwargs)
            with recording:
                return getattr(cursor.cursor, self.name)(*args, **kwargs)

        return call


@contextmanager
def _copying(
    recording: AbstractContextManager[None], cursor: CursorWrapper, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    with recording, cursor.cursor.copy(*args, **kwargs) as copy:
        yield copy


def _streaming(
    recording: AbstractContextManager[None], cursor: CursorWrapper, *args: Any, **kwargs: Any
) -> Iterator[Any]:
    with recording:
        yield from cursor.cursor.stream(*args, **kwargs)


# Methods that return a context manager or an iterator, and run only when it is used.
_DEFERRED: Final[dict[str, Callable[..., Any]]] = {"copy": _copying, "stream": _streaming}


def open_before_recording(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Wrap the method by which django-debug-toolbar records a statement. It reads the driver's
    connection first, which is missing if the server of the cursor could not be reached.
    """

    def _record(self: Any, method: Any, sql: Any, params: Any) -> Any:
        if isinstance(self.cursor, UnopenedCursor):
            pool = pools().by_connection.get(self.db.alias)
            if pool is None or classify(self.db, sql).kind is not StatementKind.READ:
                return method(sql, params)
            admit_cursor(pool, self)
        return original(self, method, sql, params)

    return _record
