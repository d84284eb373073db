"""
Async connections of django-async-backend, which exist beside those of Django.

Their writes are recorded, writes on replicas are rejected, transactions read the primary, and a
scope that has written reads no replica. A replica that cannot be connected to is replaced by the
primary. The server behind a connection is not judged, and a read that fails later is not retried;
check W033 reports that.

https://django-async-backend.readthedocs.io/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from asgiref.sync import sync_to_async
from django.db import InterfaceError, OperationalError

from pinning_middleware.backend.execute import explicit_decision, record_read
from pinning_middleware.backend.writes import (
    Statement,
    classify,
    record_lock,
    record_session_end,
    record_transaction_end,
    record_write_finished,
    record_write_started,
)
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.policy import Decision, own_pin_reason
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.routing.route import take_decision
from pinning_middleware.scopes import transactions
from pinning_middleware.scopes.overrides import OverrideKind, effects_on
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.scopes.watch import current_watch, note_write
from pinning_middleware.servers.probe import is_connection_pool_exhausted
from pinning_middleware.servers.registry import registry
from pinning_middleware.sql import StatementKind
from pinning_middleware.utils.transactions import count_open_transactions, driver_in_transaction


class InstrumentedAsyncConnection:
    """Mixed into the class of async connections; see ``wrap_create_connection()``."""

    alias: str
    connection: Any
    in_atomic_block: bool
    # The handler that it belongs to, which has the connections of the other aliases.
    handler: Any
    # The scopes with a write in the transaction that is open.
    uncommitted_scopes: frozenset[Scope] = frozenset()
    # BEGIN was sent as a statement of its own.
    in_raw_transaction = False
    # The code has changed session state of the primary, which keeps its scope there.
    has_modified_session = False

    async def _cursor(self, name: str | None = None) -> Any:
        decision = take_decision(self.alias)
        try:
            cursor = await super()._cursor(name)  # type: ignore[misc]
        except (OperationalError, InterfaceError) as error:
            pool = pools().by_replica.get(self.alias)
            if pool is None or is_connection_pool_exhausted(error) or not self._may_fall_back(pool):
                raise
            endpoint = pool.endpoints[self.alias]
            registry.mark_down(endpoint, Fault.UNREACHABLE, conf.retry_after, error)
            cursor = await self.handler[pool.primary]._cursor(name)
            decision = Decision(pool.primary, None, Reason.FAILOVER)
        cursor.pinning_decision = decision
        return cursor

    def _may_fall_back(self, pool: Pool) -> bool:
        """Return whether the primary may serve if the connection cannot be opened."""
        is_closed = self.connection is None and not self.in_atomic_block
        may_move = is_closed and not effects_on(pool.primary).no_failover
        return may_move and is_interchangeable(self.alias, pool.primary)

    def copy(self, alias: str | None = None) -> Any:
        """Return a copy of this connection."""
        return _instrument(super().copy(alias), self.handler)  # type: ignore[misc]

    async def _commit(self) -> None:
        try:
            await super()._commit()  # type: ignore[misc]
        finally:
            await self._record_transaction_end()

    async def _rollback(self) -> None:
        try:
            await super()._rollback()  # type: ignore[misc]
        finally:
            await self._record_transaction_end()

    async def _close(self) -> None:
        try:
            await super()._close()  # type: ignore[misc]
        finally:
            self.in_raw_transaction = False
            await self._record_transaction_end()
            if self.has_modified_session:
                self.has_modified_session = False
                record_session_end(self)  # type: ignore[arg-type]

    async def _record_transaction_end(self) -> None:
        await _record(self.uncommitted_scopes, record_transaction_end, self)


async def _record(scopes: Iterable[Scope], record: Callable[..., None], *args: Any) -> None:
    """Record a fact. The pins of a closed scope are saved at once, which may query the primary."""
    if any(scope.is_closed for scope in scopes):
        await sync_to_async(record)(*args)
    else:
        record(*args)


async def execute_wrapper(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    """Run one statement, as an execute wrapper of every async connection."""
    connection, cursor = context["connection"], context["cursor"]
    pool = pools().by_connection.get(connection.alias)
    if pool is None:
        if current_watch() is not None and classify(connection, sql).kind is StatementKind.WRITE:
            note_write()
        return await execute(sql, params, many, context)
    statement = classify(connection, sql)
    if statement.kind is StatementKind.WRITE:
        return await _execute_write(execute, sql, params, many, context)
    if statement.kind is StatementKind.LOCK:
        record_lock(connection.alias)
    elif statement.kind is StatementKind.READ and _must_use_primary(pool, connection):
        fresh = await connection.handler[pool.primary]._cursor(getattr(cursor.cursor, "name", None))
        cursor.cursor, cursor.db, connection = fresh.cursor, fresh.db, fresh.db
        cursor.pinning_decision = Decision(pool.primary, None, Reason.WROTE)
    try:
        result = await execute(sql, params, many, context)
    finally:
        await _record_control(connection, statement)
    if statement.modifies_session and connection.alias == pool.primary:
        connection.has_modified_session = True
        current_scope().record_session_state(pool.key)
    if statement.kind in (StatementKind.READ, StatementKind.LOCK):
        decision = cursor.__dict__.get("pinning_decision") or explicit_decision(
            pool, connection.alias
        )
        record_read(pool, current_scope(), connection, decision, statement.kind, sql, None)
    return result


def _must_use_primary(pool: Pool, connection: Any) -> bool:
    """Return whether the scope has written since a read was routed to this replica."""
    if connection.alias not in conf.readonly_aliases or connection.in_atomic_block:
        return False
    effects = effects_on(pool.primary)
    override = effects.routing
    if effects.no_failover or (override is not None and override.kind is OverrideKind.REPLICA):
        return False
    scope = current_scope()
    return own_pin_reason(scope, scope.state(pool.key)) is not None


async def _execute_write(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    connection = context["connection"]
    recorded = record_write_started(connection, connection.alias, sql)
    try:
        result = await execute(sql, params, many, context)
    except BaseException:
        record_write_finished(connection, recorded, failed=True)
        raise
    scopes = () if recorded is None else (recorded.scope,)
    await _record(scopes, record_write_finished, connection, recorded)
    return result


async def _record_control(connection: Any, statement: Statement) -> None:
    """Record which transaction is open after a statement that begins or ends one."""
    if not (statement.begins_transaction or statement.ends_transaction):
        return
    is_open = bool(driver_in_transaction(connection))
    connection.in_raw_transaction = is_open and not connection.in_atomic_block
    if statement.ends_transaction:
        await connection._record_transaction_end()


# The handlers that have made an async connection.
_handlers: set[Any] = set()


@lru_cache
def _instrumented_class(base: Any) -> Any:
    return type(base.__name__, (InstrumentedAsyncConnection, base), {"__module__": base.__module__})


def _instrument(connection: Any, handler: Any) -> Any:
    """Give a connection the mixin and the execute wrapper, and return it."""
    if not isinstance(connection, InstrumentedAsyncConnection):
        kind: Any = type(connection)
        connection.__class__ = _instrumented_class(kind)
    connection.execute_wrappers.insert(0, execute_wrapper)
    connection.handler = handler
    return connection


def wrap_create_connection(original: Any) -> Any:
    """Wrap ``AsyncConnectionHandler.create_connection``."""

    def create_connection(self: Any, alias: str) -> Any:
        if not _handlers:
            transactions.elsewhere.append(_is_transaction_open)
        _handlers.add(self)
        return _instrument(original(self, alias), self)

    return create_connection


def _is_transaction_open(alias: str) -> bool:
    """Return whether this task has a transaction open on the async connection of an alias."""
    return any(
        connection.alias == alias and count_open_transactions(connection) > 0
        for handler in _handlers
        for connection in handler.all(initialized_only=True)
    )
