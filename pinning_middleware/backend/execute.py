"""
An execute wrapper on every connection: classify → record → admit → run → retry → report.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, Final

from django.db import DatabaseError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.backend.call import (
    Call,
    UnopenedCursor,
    connect_anyway,
    may_run_on_primary,
)
from pinning_middleware.backend.failover import execute_read
from pinning_middleware.backend.former_primary import check_primary, record_rejected_write
from pinning_middleware.backend.session_setup import (
    is_unmanaged,
    set_up_session,
    undo_session_setup,
)
from pinning_middleware.backend.writes import (
    Statement,
    classify,
    is_test_setup,
    record_lock,
    record_transaction_end,
    recording_write,
    sql_text,
)
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.guarantees import record_observed
from pinning_middleware.routing.policy import Decision
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import effects_on
from pinning_middleware.scopes.scope import Scope, current_scope
from pinning_middleware.scopes.watch import current_watch, note_read, note_write
from pinning_middleware.servers.budget import read_budget
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.probe import failover_disabled, state_of
from pinning_middleware.servers.registry import Server
from pinning_middleware.sql import StatementKind
from pinning_middleware.utils.counters import Read, missed_writes, observers, reads
from pinning_middleware.utils.transactions import driver_in_transaction

# Maximum number of routes that a scope records.
MAX_ROUTES: Final = 16


def execute_wrapper(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    """Run one statement, as an execute wrapper of every connection."""
    try:
        return _execute_statement(execute, sql, params, many, context)
    finally:
        if not (is_unmanaged() or context["connection"].is_connecting):
            # What opening its cursor has spent belongs to this statement. Those that set up a
            # connection belong to another one.
            read_budget.renew()


def _execute_statement(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    connection, cursor = context["connection"], context["cursor"]
    if connection.is_connecting:
        # A receiver of connection_created sets up the session. This is not part of the scope.
        return execute(sql, params, many, context)
    known = pools()
    pool = known.by_connection.get(connection.alias)
    if is_unmanaged() or (pool is None and connection.alias not in known.same_as_primary):
        if current_watch() is not None and classify(connection, sql).kind is StatementKind.WRITE:
            note_write()
        return execute(sql, params, many, context)
    statement = classify(connection, sql)
    if statement.begins_transaction or statement.ends_transaction:
        execute = functools.partial(_execute_control, execute, statement)
    if pool is None:
        # Another alias of a primary's database.
        is_write = statement.kind is StatementKind.WRITE
        if statement.kind is StatementKind.LOCK:
            record_lock(connection.alias)
        with recording_write(connection, connection.alias, sql) if is_write else nullcontext():
            set_up_session(connection)
            return execute(sql, params, many, context)
    scope = current_scope()
    if pool.is_dry_run and statement.kind is StatementKind.READ:
        # The primary serves it, and nothing else could.
        set_up_session(connection)
        result = execute(sql, params, many, context)
    else:
        effects = effects_on(pool.primary)
        call = Call(execute, sql, params, many, context, cursor, scope, effects)
        result = _execute(pool, call, connection, statement)
    if statement.modifies_session:
        record_modified_session(pool, cursor.db)
    if statement.kind in (StatementKind.READ, StatementKind.LOCK):
        record_read_of(pool, scope, cursor, statement.kind, sql)
    return result


def _execute(pool: Pool, call: Call, connection: BaseDatabaseWrapper, statement: Statement) -> Any:
    kind = statement.kind
    is_replica = connection.alias != pool.primary
    bypasses = failover_disabled.get() or call.effects.no_failover
    is_read = kind is StatementKind.READ and not is_test_setup(connection, call.sql)
    if not bypasses and (is_read or _may_run_anywhere(call, statement)):
        return execute_read(pool, call)
    alias = intended_alias(call.cursor)
    if is_replica and kind is not StatementKind.READ and alias == pool.primary:
        # A replica substituted for the primary, which it can for reads only: let the primary's own
        # error surface.
        call.move_to(connections[pool.primary])
    elif (
        is_replica
        and kind is StatementKind.LOCK
        and not bypasses
        and may_run_on_primary(pool, call)
    ):
        # Only the primary can take its locks.
        call.move_to(connections[pool.primary])
        call.cursor.pinning_decision = Decision(pool.primary, None, Reason.LOCK)
        call.cursor.__dict__.pop("pinning_alias", None)
    if kind is StatementKind.LOCK:
        record_lock(call.cursor.db.alias)
    if kind is not StatementKind.WRITE or alias not in conf.readonly_aliases:
        connect_anyway(call)
    locks_or_writes = kind in (StatementKind.WRITE, StatementKind.LOCK)
    if not bypasses and (locks_or_writes or statement.begins_transaction):
        check_primary(pool, call)
    if kind is not StatementKind.WRITE:
        result = call.run()
        if kind is StatementKind.LOCK and pool.tracks_reads and not bypasses:
            record_observed(pool, call.scope, call.cursor.db)
        return result
    with recording_write(call.cursor.db, alias, call.sql):
        try:
            return call.run()
        except DatabaseError as error:
            record_rejected_write(call.cursor.db, error)
            raise


def _may_run_anywhere(call: Call, statement: Statement) -> bool:
    """
    Return whether a statement may run on any server: it is neither a read nor a write, and its
    connection could not be opened.
    """
    is_unopened = isinstance(call.cursor.cursor, UnopenedCursor)
    is_control = statement.begins_transaction or statement.ends_transaction
    return (
        is_unopened
        and statement.kind is StatementKind.NEITHER
        and not (is_control or statement.modifies_session)
    )


def intended_alias(cursor: Any) -> str:
    """Return the alias that a cursor was opened on, even if it reads from another one by now."""
    # Not by getattr(), which Django's cursors pass on to the driver's.
    return str(cursor.__dict__.get("pinning_alias") or cursor.db.alias)


def record_modified_session(pool: Pool, connection: Any) -> None:
    """Record that a statement of the code has modified its session."""
    if dialect_for(connection) is not None:
        state_of(connection).session_modified = True
    if connection.alias == pool.primary and conf.session_setup is None:
        connection.has_modified_session = True
        current_scope().record_session_state(pool.key)


def _execute_control(
    execute: Any, statement: Statement, sql: Any, params: Any, many: bool, context: Any
) -> Any:
    """Run a statement that begins or ends a transaction, and record which one is open then."""
    connection = context["cursor"].db
    is_open = connection.in_raw_transaction
    try:
        result = execute(sql, params, many, context)
        is_open = statement.begins_transaction
    finally:
        # The driver knows it for certain: a COMMIT that fails ends the transaction as well.
        known = driver_in_transaction(connection)
        is_open = is_open if known is None else known
        connection.in_raw_transaction = is_open and not connection.in_atomic_block
        # What a replica had replayed when it began is unknown.
        connection.snapshot = None
        if statement.ends_transaction:
            undo_session_setup(connection)
            record_transaction_end(connection)
    return result


def record_read_of(pool: Pool, scope: Scope, cursor: Any, kind: StatementKind, sql: Any) -> None:
    """Record a read that a cursor of Django has made."""
    server = None if pool.dialect is None else state_of(cursor.db).server
    record_read(pool, scope, cursor.db, _decision_of(pool, cursor), kind, sql, server)


def record_read(
    pool: Pool,
    scope: Scope,
    connection: Any,
    decision: Decision,
    kind: StatementKind,
    sql: Any,
    server: Server | None,
) -> None:
    """
    Record the route of a completed read, count it, and notify the observers. If reads are balanced
    one by one, the scope's next read gets another replica.
    """
    reason = Reason.LOCK if kind is StatementKind.LOCK else decision.reason
    route = connection.alias, reason
    scope.record_route(route, MAX_ROUTES)
    note_read(route)
    if conf.balance_by_query:
        # Django may ask the router several times for one read; the next read gets another replica.
        scope.replicas.pop(pool.key, None)
    reads[pool.primary, connection.alias, server, reason] += 1
    if decision.would_miss_write:
        missed_writes[pool.primary] += 1
    if observers:
        chosen = decision.replica or decision.alias
        role = "primary" if decision.replica is None else "replica"
        text = sql_text(connection, sql)
        read = Read(pool.primary, chosen, connection.alias, role, reason, text, server, connection)
        for observe in tuple(observers):
            observe(read)


def _decision_of(pool: Pool, cursor: Any) -> Decision:
    """Return the decision that a cursor follows; without one, the code named its alias."""
    decision: Decision | None = cursor.__dict__.get("pinning_decision")
    if decision is None:
        raw, last = cursor.db.last_opened
        decision = last if raw is cursor.cursor else None
    return explicit_decision(pool, intended_alias(cursor)) if decision is None else decision


def explicit_decision(pool: Pool, alias: str) -> Decision:
    """Return the decision of code that has named its alias."""
    reason = Reason.EXPLICIT if pool.has_replicas else pool.default_reason
    return Decision(alias, None if alias == pool.primary else alias, reason)
