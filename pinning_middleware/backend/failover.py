"""
Reads that outlive their server: on another node, without an error.

Three moments tell that the node which an alias leads to will not do: it can't be reached, its
server turns out to be of no use to this scope, or a statement fails because of the node. Each ends
in ``serve_elsewhere``. It never happens where that would change more than the node: inside a
transaction, in a session that the site has altered, between aliases whose sessions differ, for
anything but a read, or inside ``no_failover()``. There the node's own error is the answer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from pinning_middleware.backend.writes import alias_of
from pinning_middleware.conf import conf
from pinning_middleware.reasons import Fault, Reason
from pinning_middleware.routing.compatibility import is_interchangeable
from pinning_middleware.routing.policy import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.scopes.overrides import Kind as BlockKind
from pinning_middleware.scopes.overrides import failover_suppressed, open_blocks, override
from pinning_middleware.scopes.scope import Scope, entered_scope
from pinning_middleware.servers.connect import apply_timeouts
from pinning_middleware.servers.dialects import dialect_for
from pinning_middleware.servers.liveness import ServerUnresponsive
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    endpoint_for,
    failover_disabled,
    state_of,
    without_failover,
)
from pinning_middleware.servers.registry import registry
from pinning_middleware.signals import fell_back_to_primary, fell_back_to_replica, read_retried
from pinning_middleware.sql import Kind
from pinning_middleware.utils.logging import log_rate_limited

__all__ = ["install", "run", "serve_elsewhere"]

logger = logging.getLogger("pinning_middleware.reads")

# How often a connection is opened that is found to be lost before anything has run on it.
MOST_TRIES = 3
# Reasons that only the primary answers, and that are no failure of anybody.
_PRIMARY_ONLY = (Reason.WROTE, Reason.LOCK, Reason.PINNED)


def open_cursor(
    connection: BaseDatabaseWrapper,
    cursor: Callable[..., Any],
    name: str | None = None,
    tries: int = 1,
) -> Any:
    """Do what ``connection._cursor`` does, on another node where this one is of no use."""
    alias = connection.alias
    pool = pools().moving.get(alias)
    if (
        pool is None
        or connection.in_atomic_block
        or failover_disabled.get()
        or (open_blocks() is not None and failover_suppressed())
    ):
        return cursor(name)
    scope = entered_scope()
    is_replica = alias != pool.primary
    failure: Exception | None = None
    if is_replica and connection.connection is not None and pool.is_free(connection, scope):
        # Nearly every read: the connection is there, and its server will do.
        try:
            return cursor(name)
        except CONNECTION_ERRORS as error:
            logger.debug("The connection to %s has to be looked into: %s", alias, error)
            failure = error
    endpoint = pool.endpoints[alias] if is_replica else pool.endpoint

    def elsewhere(why: object) -> Any:
        def attempt(other: BaseDatabaseWrapper) -> Any:
            opened = other._cursor(name)  # type: ignore[attr-defined]
            opened.__class__ = _moved(type(opened), other, alias, _reason(why))
            opened.pinning_alias, opened.pinning_reason = alias, _reason(why)
            return opened

        return serve_elsewhere(pool, connection, attempt, why)

    if is_replica and alias in conf.guarded and _has_written(pool, scope):
        return elsewhere(Reason.WROTE)
    before = connection.connection
    if before is None and endpoint.out_of_rotation in (Fault.UNREACHABLE, Fault.UNRESPONSIVE):
        return elsewhere(endpoint.error)
    try:
        if failure is not None:
            raise failure
        opened = cursor(name)
        if not is_replica:
            return opened
        made = connection.connection
        why = pool.refusal(connection, scope)
    except CONNECTION_ERRORS as error:
        if not _is_lost(connection, error):
            raise
        is_silent, was_made = (
            isinstance(error, ServerUnresponsive),
            connection.connection is not None,
        )
        connection.close()
        if was_made and not is_silent and tries < MOST_TRIES:
            # It was lost while nobody looked, or cut off at once: again, on a new one.
            return open_cursor(connection, cursor, name, tries + 1)
        registry.mark_down(
            endpoint,
            Fault.UNRESPONSIVE if is_silent else Fault.UNREACHABLE,
            conf.retry_after,
            error,
        )
        return elsewhere(error)
    if why:
        opened.close()
        return elsewhere(why)
    if connection.connection is not made:
        # Lost while it was asked how far it is, and asked again on a new connection.
        opened.close()
        return open_cursor(connection, cursor, name)
    return opened


def _moved(base: type[Any], other: BaseDatabaseWrapper, alias: str, reason: str) -> type[Any]:
    """
    Return the class of a cursor that was opened elsewhere. Tools that wrap cursors make another
    one of it, with the driver's cursor and the connection that was meant: that would not fit.
    """

    class Moved(base):  # type: ignore[misc]
        def __init__(self, cursor: Any, db: BaseDatabaseWrapper) -> None:
            super().__init__(cursor, other)
            self.pinning_alias, self.pinning_reason = alias, reason

    return Moved


def run(
    pool: Pool,
    kind: Kind,
    execute: Callable[..., Any],
    call: tuple[Any, Any, bool],
    context: dict[str, Any],
) -> Any:
    """Run a statement; a read that fails for a reason that another node would not share, there."""
    connection = context["connection"]
    is_replica = connection.alias != pool.primary
    if is_replica and kind is not Kind.READ:
        cursor = context["cursor"]
        if alias_of(cursor) == pool.primary:
            # A replica stands in for the primary, but for reads only: here is its own error.
            with without_failover():
                fresh = connections[pool.primary].cursor()
            cursor.cursor, cursor.db = fresh.cursor, fresh.db
        elif kind is Kind.LOCK and _may_move(connection):
            return _again(pool, execute, call, context, Reason.LOCK)
    stale = None
    if not is_replica and conf.primary_down == "stale" and _may_move(connection):
        stale = state_of(connection)
        stale.may_fail_over = kind is Kind.READ
    try:
        result = execute(*call, context)
    except CONNECTION_ERRORS as error:
        if (
            call[2]
            or kind is not Kind.READ
            or not _may_move(connection)
            or state_of(connection).session_modified
        ):
            raise
        is_lost = _is_lost(connection, error)
        dialect = dialect_for(connection)
        if not is_lost and (dialect is None or not dialect.is_retryable(error)):
            raise
        endpoint = endpoint_for(connection)
        if is_lost:
            connection.close()
            endpoint.must_reidentify = True
        is_silent = isinstance(error, ServerUnresponsive) or (
            is_replica and endpoint.out_of_rotation == Fault.UNRESPONSIVE
        )
        return _again(pool, execute, call, context, error, is_lost and not is_silent)
    finally:
        if stale is not None:
            stale.may_fail_over = False
    if pool.minds_servers:
        _note(pool, connection.alias)
    return result


def _note(pool: Pool, alias: str) -> None:
    """Note who answered a read, where that is worth knowing."""
    scope = entered_scope()
    facts = None if scope is None else scope.get(pool.key)
    if facts is not None and not failover_disabled.get():
        if conf.spread_by_query:
            facts.replica = None
        pool.note_served(facts, alias)


def _may_move(connection: BaseDatabaseWrapper) -> bool:
    """Return whether a statement of this connection may run on another one."""
    return not (
        connection.in_atomic_block
        or not connection.autocommit
        or failover_disabled.get()
        or failover_suppressed()
    )


def _again(
    pool: Pool,
    execute: Callable[..., Any],
    call: tuple[Any, Any, bool],
    context: dict[str, Any],
    why: object,
    same_first: bool = False,
) -> Any:
    cursor, connection = context["cursor"], context["connection"]
    chunked = getattr(cursor.cursor, "name", None) is not None
    failed = alias_of(cursor)

    def attempt(other: BaseDatabaseWrapper) -> Any:
        fresh = other.chunked_cursor() if chunked else other.cursor()
        # The caller goes on to fetch from here. A write that is meant for the replica is refused,
        # wherever its cursor leads to.
        cursor.cursor, cursor.db = fresh.cursor, fresh.db
        cursor.pinning_reason = _reason(why)
        if other.alias != failed != pool.primary:
            cursor.pinning_alias = failed
        if why == Reason.LOCK:
            # It locks there, so the scope stays there.
            cursor.__dict__.pop("pinning_alias", None)
            return fresh.execute(call[0], call[1])
        return execute(*call, context)

    return serve_elsewhere(pool, connection, attempt, why, same_first)


def serve_elsewhere(
    pool: Pool,
    failed: BaseDatabaseWrapper,
    attempt: Callable[[BaseDatabaseWrapper], Any],
    why: object,
    same_first: bool = False,
) -> Any:
    """
    Return what ``attempt`` returns on the first node of the pool that may serve this scope in
    place of the failed one. ``why``: the error that it failed with, or a reason.

    Raises the last node's error; ``OperationalError`` where no node is the same but for the node.
    """
    scope = entered_scope()
    error: Exception | None = why if isinstance(why, Exception) else None
    for alias in _candidates(pool, failed.alias, why, same_first):
        if alias != failed.alias and not is_interchangeable(failed.alias, alias):
            continue
        other = connections[alias]
        # One that was lost while nobody looked is tried once more, on a new connection. A new one
        # that is lost by the statement is not: it may be that somebody ended this very statement.
        for is_again in (False, True):
            was_open, has_run = other.connection is not None, False
            try:
                with without_failover():
                    other.close_if_health_check_failed()
                    other.ensure_connection()
                    if alias != pool.primary and pool.refusal(other, scope):
                        break
                    has_run = True
                    result = attempt(other)
            except CONNECTION_ERRORS as next_error:
                error = next_error
                if other.in_atomic_block or not _is_lost(other, next_error):
                    break
                is_silent, was_made = (
                    isinstance(next_error, ServerUnresponsive),
                    other.connection is not None,
                )
                other.close()
                is_news = was_open or not has_run
                if was_made and is_news and not is_silent and not is_again:
                    endpoint_for(other).must_reidentify = True
                    continue
                reason = Fault.UNRESPONSIVE if is_silent else Fault.UNREACHABLE
                registry.mark_down(endpoint_for(other), reason, conf.retry_after, next_error)
                break
            _tell(pool, scope, failed.alias, alias, why)
            return result
    raise error or OperationalError(
        f"{failed.alias} can't serve this read ({why}), and no other database of its pool has the "
        "same user, name and options."
    )


def _candidates(pool: Pool, failed: str, why: object, same_first: bool) -> Iterator[str]:
    """Yield the nodes that may serve instead, each once, and the primary last."""
    if why in _PRIMARY_ONLY:
        yield pool.primary
        return
    if same_first:
        yield failed
    if failed == pool.primary:
        yield from pool.by_freshness()
        return
    block = open_blocks() and override(open_blocks(), pool.primary)
    max_lag = block.max_lag if block else None
    for alias in pool.rotation.order():
        if alias != failed:
            lag = pool.lag(alias) if max_lag is not None else 0.0
            if max_lag is None or (lag is not None and lag <= max_lag):
                yield alias
    yield pool.primary


def _reason(why: object) -> str:
    return Reason(why) if isinstance(why, str) and why in set(Reason) else Reason.FAILOVER


def _has_written(pool: Pool, scope: Scope | None) -> bool:
    """Return whether this scope reads no replica by any way, since it has written."""
    facts = None if scope is None else scope.get(pool.key)
    if scope is None or facts is None or not pool.has_written(scope, facts):
        return False
    block = open_blocks()
    found = None if block is None else override(block, pool.primary)
    return found is None or found.kind is not BlockKind.REPLICA


def _is_lost(connection: BaseDatabaseWrapper, error: Exception) -> bool:
    if isinstance(error, ServerUnresponsive) or connection.connection is None:
        return True
    dialect = dialect_for(connection)
    if dialect is not None and dialect.is_lost(error):
        return True
    with without_failover():
        try:
            return not connection.is_usable()
        except ServerUnresponsive:
            return True


def _tell(pool: Pool, scope: Scope | None, failed: str, alias: str, why: object) -> None:
    """Say who served instead, and let the rest of the scope go there at once."""
    if why in (*_PRIMARY_ONLY, Reason.NOT_CAUGHT_UP):
        logger.debug("A read of %s went to %s: %s", failed, alias, why)
    else:
        log_rate_limited(
            logger,
            logging.WARNING,
            (pool.primary, failed, alias),
            "A read of %s went to %s: %s",
            failed,
            alias,
            why,
            extra={
                "pool": pool.primary,
                "failed": failed,
                "served": alias,
                "reason": _reason(why),
                "error": str(why),
            },
        )
        read_retried.send_robust(pool.primary, failed=failed, served=alias, error=why)
        if failed == pool.primary != alias:
            fell_back_to_replica.send_robust(pool.primary, served=alias, reason=Reason.PRIMARY_DOWN)
        elif alias == pool.primary != failed:
            fell_back_to_primary.send_robust(pool.primary, served=alias, reason=Reason.NO_REPLICA)
    facts = None if scope is None else scope.get(pool.key)
    if facts is None or alias == failed:
        return
    if failed in pool.out or why == Reason.NOT_CAUGHT_UP:
        facts.leave(failed)
    if pool.minds_servers:
        _note(pool, alias)


# Wiring


def _meet(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    if dialect_for(connection) is not None and connection.alias in pools().aliases:
        state_of(connection)


def install() -> None:
    """Let every connection fail over from now on. Calling it again changes nothing."""
    connection_created.connect(_meet, dispatch_uid="pinning_middleware.failover")
    create = connections.create_connection
    if getattr(create, "_pinning", False):
        return

    def create_connection(alias: str) -> BaseDatabaseWrapper:
        return _prepare(create(alias))

    create_connection._pinning = True  # type: ignore[attr-defined]
    # The signal comes when a connection is there; what can't be reached never sends it.
    connections.create_connection = create_connection  # type: ignore[method-assign]
    for connection in connections.all(initialized_only=True):
        _prepare(connection)


def _prepare(connection: BaseDatabaseWrapper) -> BaseDatabaseWrapper:
    if dialect_for(connection) is None:
        return connection
    made: Any = connection
    made._cursor = functools.partial(open_cursor, connection, made._cursor)
    made.connect = functools.partial(_connect, connection, made.connect)
    apply_timeouts(connection)
    return connection


def _connect(connection: BaseDatabaseWrapper, connect: Callable[[], None]) -> None:
    # A pool may give back the one that was here last.
    connection.__dict__.pop("_pinning_link", None)
    connect()
    # What the receivers of `connection_created` did to the session belongs to every one of them.
    kept = connection.__dict__.get("_pinning_link")
    if kept is not None:
        kept[1].session_modified = kept[1].session_modified_at_checkout
