"""
What a statement means to its scope: writes on a primary are noted, writes on a replica are refused
before they are sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from pinning_middleware.conf import conf
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.scopes.overrides import ignores_writes
from pinning_middleware.scopes.scope import Scope, Write, current_scope
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import Kind, alters_session, kind_of, table_of
from pinning_middleware.utils.counters import write_observers

__all__ = ["alias_of", "begin", "end", "examine", "install", "noted", "text_of"]

# What drivers offer beside `execute`, and Django hands through without its execute wrappers; and
# how they call the statement.
_PAST_THE_WRAPPERS = {
    "copy": "statement",
    "copy_expert": "sql",
    "copy_from": "",
    "executescript": "sql_script",
    "stream": "query",
}
_UNREADABLE = "?"
_CACHED_LENGTH = 4096


def alias_of(cursor: Any) -> str:
    """Return whose a cursor is: one that was opened elsewhere is still that replica's."""
    # Not by `getattr`, which Django's cursors hand on to the driver's.
    alias: str = cursor.__dict__.get("pinning_alias") or cursor.db.alias
    return alias


def examine(connection: BaseDatabaseWrapper, sql: Any) -> tuple[Kind, bool]:
    """Return what a statement does, and whether it changes the session."""
    text = text_of(connection, sql)
    if len(text) <= _CACHED_LENGTH:
        return _examined(text, connection.vendor)
    return kind_of(text, connection.vendor), alters_session(text, connection.vendor)


@lru_cache(maxsize=1024)
def _examined(text: str, vendor: str) -> tuple[Kind, bool]:
    return kind_of(text, vendor), alters_session(text, vendor)


def text_of(connection: BaseDatabaseWrapper, sql: Any) -> str:
    if isinstance(sql, str):
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    if hasattr(sql, "as_string"):  # psycopg's composed statements
        return str(sql.as_string(connection.connection))
    return _UNREADABLE


@contextmanager
def noted(connection: BaseDatabaseWrapper, alias: str, kind: Kind, sql: Any) -> Iterator[None]:
    """Refuse a write on a replica; note a write or a lock on a primary, and when it ended."""
    notes = begin(connection, alias, kind, sql)
    try:
        yield
    except BaseException:
        end(connection, notes, failed=True)
        raise
    end(connection, notes)


# A scope, and what was noted in it.
Notes = tuple[Scope, list[Write]]


def begin(connection: BaseDatabaseWrapper, alias: str, kind: Kind, sql: Any) -> Notes | None:
    """
    Note that a statement of this kind is about to run; ``end`` takes what is returned.

    Raises ``ReplicaWriteError`` for a write on a replica.
    """
    specs = conf.watched.get(alias, ())
    if not specs:
        if kind is Kind.WRITE and (primary := conf.guarded.get(alias)) is not None:
            _refuse(text_of(connection, sql), alias, primary)
        return None
    if kind is Kind.LOCK:
        scope = current_scope()
        for spec in specs:
            scope[spec.key].note_lock()
        return None
    for observe in write_observers:
        observe(alias, text_of(connection, sql))
    if _is_ignored(connection, sql):
        return None
    scope = current_scope()
    return scope, [scope[spec.key].note_write(connection) for spec in specs]


def end(connection: BaseDatabaseWrapper, notes: Notes | None, failed: bool = False) -> None:
    """Note that it is over."""
    if notes is None:
        return
    scope, writes = notes
    for write in writes:
        write.end()
    if not failed and (endpoint := registry.endpoint(connection.alias)).out_of_rotation:
        registry.mark_up(endpoint)
    if scope.ended is not None:
        _save_late(scope, connection)


def _save_late(scope: Scope, connection: BaseDatabaseWrapper) -> None:
    """Let somebody save what a child task or a thread wrote after its request was over."""
    if connection.in_atomic_block:
        connection.on_commit(scope.save_late, robust=True)
    else:
        scope.save_late()


def _refuse(text: str, alias: str, primary: str) -> None:
    if not _is_bookkeeping_of_test_runner(text):
        raise ReplicaWriteError(
            f"{alias!r} is a replica of {primary!r}, so this write was not sent: "
            f"{text[:80]!r}. Write with .using({primary!r}), or let the router choose."
        )


def _is_ignored(connection: BaseDatabaseWrapper, sql: Any) -> bool:
    if ignores_writes():
        return True
    tables = conf.ignored_tables
    if not tables or (table := table_of(text_of(connection, sql))) is None:
        return False
    return table in tables or table.rpartition(".")[2] in tables


def _is_bookkeeping_of_test_runner(text: str) -> bool:
    # A replica that is no mirror gets an empty test database of its own, and Django records
    # there which migrations it did not run.
    if "django_migrations" not in text:
        return False
    from django.test import utils

    return hasattr(utils._TestState, "saved_data")


def install() -> None:
    """Watch what runs past Django's execute wrappers. Again changes nothing."""
    if getattr(CursorWrapper.callproc, "_pinning", False):
        return
    callproc = CursorWrapper.callproc

    @functools.wraps(callproc)
    def watched_callproc(
        self: CursorWrapper, procname: str, params: Any = None, kparams: Any = None
    ) -> Any:
        with noted(self.db, alias_of(self), Kind.WRITE, f"CALL {procname}"):
            return callproc(self, procname, params, kparams)

    watched_callproc._pinning = True  # type: ignore[attr-defined]
    CursorWrapper.callproc = watched_callproc  # type: ignore[method-assign]
    for name, keyword in _PAST_THE_WRAPPERS.items():
        setattr(CursorWrapper, name, property(functools.partial(_method, name, keyword)))


def _method(name: str, keyword: str, wrapper: CursorWrapper) -> Callable[..., Any]:
    method = getattr(wrapper.cursor, name)

    @functools.wraps(method)
    def watched(*args: Any, **kwargs: Any) -> Any:
        sql = (args[0] if args else kwargs.get(keyword, _UNREADABLE)) if keyword else _UNREADABLE
        kind, _ = examine(wrapper.db, sql)
        alias = alias_of(wrapper)
        if kind < Kind.LOCK or (alias not in conf.watched and alias not in conf.guarded):
            return method(*args, **kwargs)
        if name in _LATER and alias in conf.watched:
            return _LATER[name](noted(wrapper.db, alias, kind, sql), method, *args, **kwargs)
        with noted(wrapper.db, alias, kind, sql):
            return method(*args, **kwargs)

    return watched


# What only begins to run when somebody enters it, or goes through it.


@contextmanager
def _copying(
    noting: AbstractContextManager[None], method: Callable[..., Any], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    with noting, method(*args, **kwargs) as copy:
        yield copy


def _streaming(
    noting: AbstractContextManager[None], method: Callable[..., Any], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    with noting:
        yield from method(*args, **kwargs)


_LATER: dict[str, Callable[..., Any]] = {"copy": _copying, "stream": _streaming}
