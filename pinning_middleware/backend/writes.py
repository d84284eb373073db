"""
What a statement means for its scope: a write to a primary is recorded, a write to a replica is
rejected before it is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change
from pinning_middleware.exceptions import ReplicaWriteError
from pinning_middleware.pins import PoolKey
from pinning_middleware.routing.compatibility import is_testing
from pinning_middleware.routing.outgoing import announce
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import writes_ignored
from pinning_middleware.scopes.scope import Scope, current_scope, entered_scope
from pinning_middleware.scopes.watch import note_write
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import (
    StatementKind,
    alters_session,
    begins_transaction,
    ends_transaction,
    kind_of,
    table_of,
)
from pinning_middleware.utils import clock
from pinning_middleware.utils.counters import write_observers
from pinning_middleware.utils.transactions import is_transaction_open

_UNREADABLE = "?"
_TEST_SETUP = re.compile(r"\b(?:django_migrations|sqlite_master|pg_catalog|information_schema)\b")
# Longer statements are classified each time, so that the cache stays small.
_CACHED_LENGTH = 4096


def sql_text(connection: BaseDatabaseWrapper, sql: Any) -> str:
    """Return the text of a statement as the site passed it: str, bytes or a composed statement."""
    if isinstance(sql, str):
        return sql
    if isinstance(sql, bytes):
        return sql.decode(errors="replace")
    if hasattr(sql, "as_string"):
        return _composed_text(connection.connection, sql)
    if hasattr(sql, "interpolations"):
        return _template_text(connection, sql)
    return _UNREADABLE


def _composed_text(raw: Any, sql: Any) -> str:
    """
    Return the text of a composed statement of psycopg or psycopg2. The latter quotes names and
    values by a connection; without one, as for a server that is down, values are placeholders.
    """
    try:
        return str(sql.as_string(raw))
    except TypeError:
        if hasattr(sql, "seq"):
            return "".join(_composed_text(raw, part) for part in sql.seq)
        return ".".join(f'"{name}"' for name in sql.strings) if hasattr(sql, "strings") else "%s"


def _template_text(connection: BaseDatabaseWrapper, template: Any) -> str:
    """
    Return the text of a template string (Python 3.14, psycopg 3.3), with placeholders for values.

    https://www.psycopg.org/psycopg3/docs/basic/tstrings.html
    """
    parts = []
    for part in template:
        if isinstance(part, str):
            parts.append(part)
        elif part.format_spec == "q":
            # A part of the statement: another template, or a composed one.
            parts.append(sql_text(connection, part.value))
        else:
            parts.append(f'"{part.value}"' if part.format_spec == "i" else "%s")
    return "".join(parts)


class Statement(NamedTuple):
    """What a statement does to the data, to its session and to the transaction."""

    kind: StatementKind
    modifies_session: bool
    begins_transaction: bool
    ends_transaction: bool


def classify(connection: BaseDatabaseWrapper, sql: Any) -> Statement:
    """Return what a statement does."""
    text = sql_text(connection, sql)
    if len(text) <= _CACHED_LENGTH:
        return _classify_cached(text, connection.vendor)
    return _classify(text, connection.vendor)


def _classify(text: str, vendor: str) -> Statement:
    return Statement(
        kind_of(text, vendor, conf.writing_functions),
        alters_session(text, vendor),
        begins_transaction(text, vendor),
        ends_transaction(text, vendor),
    )


_classify_cached = lru_cache(maxsize=1024)(_classify)
on_change(_classify_cached.cache_clear)


class Recorded(NamedTuple):
    """A write that is running: its scope, and the pools that it pins."""

    scope: Scope
    keys: tuple[PoolKey, ...]


def record_lock(alias: str) -> None:
    """Record a locking read on a primary."""
    scope = current_scope()
    for key in _pools_written(alias):
        scope.record_lock(key)


def record_write_started(connection: BaseDatabaseWrapper, alias: str, sql: Any) -> Recorded | None:
    """
    Record that a write on this alias is about to run; ``record_write_finished()`` takes the result.

    Raise ReplicaWriteError if the alias is a replica.
    """
    keys = _pools_written(alias)
    if not keys:
        if (primary := conf.readonly_aliases.get(alias)) is not None:
            _reject(connection, sql, alias, primary)
        return None
    for observe in tuple(write_observers):
        observe(alias, sql_text(connection, sql))
    note_write()
    if _is_ignored(connection, sql):
        return None
    scope = current_scope()
    # Recorded before it runs: a read of another thread of this scope may follow at once.
    for key in keys:
        scope.record_write(key, connection)
    return Recorded(scope, keys)


def record_write_finished(
    connection: BaseDatabaseWrapper, recorded: Recorded | None, *, failed: bool = False
) -> None:
    """Record that a write has run. It becomes visible now, or when its transaction ends."""
    if not failed and (endpoint := registry.endpoint(connection.alias)).out_of_rotation:
        registry.mark_up(endpoint)
    if recorded is None:
        return
    if is_transaction_open(connection) and hasattr(connection, "uncommitted_scopes"):
        connection.uncommitted_scopes |= {recorded.scope}
        return
    recorded.scope.record_visible(connection, clock.now())
    announce(recorded.scope)


def record_transaction_end(connection: BaseDatabaseWrapper) -> None:
    """Record that the transaction of a connection has ended: its writes are visible."""
    scopes = connection.uncommitted_scopes  # type: ignore[attr-defined]
    connection.uncommitted_scopes = frozenset()  # type: ignore[attr-defined]
    for scope in scopes:
        scope.record_visible(connection, clock.now())
        announce(scope)


def record_session_end(connection: BaseDatabaseWrapper) -> None:
    """Record that the session of a connection has ended: what the code set in it is gone."""
    if (scope := entered_scope()) is None:
        return
    for key in _pools_written(connection.alias):
        if scope.state(key).session_modified:
            scope.record_session_state(key, is_modified=False)


@contextmanager
def recording_write(connection: BaseDatabaseWrapper, alias: str, sql: Any) -> Iterator[None]:
    """Record the write that runs inside the block. Raise ReplicaWriteError on a replica."""
    recorded = record_write_started(connection, alias, sql)
    try:
        yield
    except BaseException:
        record_write_finished(connection, recorded, failed=True)
        raise
    record_write_finished(connection, recorded)


def _pools_written(alias: str) -> tuple[PoolKey, ...]:
    """Return the keys of the pools that a write through this alias pins."""
    primary = pools().same_as_primary.get(alias, alias)
    return tuple(spec.key for spec in conf.pools_by_primary.get(primary, ()))


def is_test_setup(connection: BaseDatabaseWrapper, sql: Any) -> bool:
    """
    Return whether a statement belongs to the creation of test databases. A replica that is not a
    test mirror gets an empty one of its own, in which Django records the migrations that it did not
    run.
    """
    return is_testing() and _TEST_SETUP.search(sql_text(connection, sql)) is not None


def _reject(connection: BaseDatabaseWrapper, sql: Any, alias: str, primary: str) -> None:
    if is_test_setup(connection, sql):
        return
    text = sql_text(connection, sql)
    raise ReplicaWriteError(
        f"{alias!r} is a replica of {primary!r}, so this write was not sent: {text[:80]!r}. "
        f"Write with .using({primary!r}), or let the router choose."
    )


def _is_ignored(connection: BaseDatabaseWrapper, sql: Any) -> bool:
    if writes_ignored():
        return True
    tables = conf.ignored_tables
    if not tables:
        return False
    table = table_of(sql_text(connection, sql), conf.writing_functions)
    if table is None:
        return False
    return table in tables or table.rpartition(".")[2] in tables
