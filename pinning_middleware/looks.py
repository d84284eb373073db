"""
The questions to databases: where a primary is, how far a replica is, how much it lags.

Every question is asked of one node: while it is, a node that fails is not replaced by another.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from .conf import conf
from .health import LOOK_EVERY
from .pins import Position
from .positions import Positions, Report, family_of
from .signals import primary_fallback, replica_waited

if TYPE_CHECKING:
    from .pools import Pool

__all__ = [
    "asking",
    "find_caught_up",
    "has_reached",
    "lags_less",
    "may_ask",
    "one_node",
    "order_by_freshness",
    "position_of_primary",
    "position_of_replica",
    "stand_in",
    "update",
]

logger = logging.getLogger("pinning_middleware")

T = TypeVar("T")

# Set while a question is asked of one node.
asking: ContextVar[bool] = ContextVar("pinning_asking", default=False)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.02


def may_ask() -> bool:
    """Return whether this is a place for queries: an event loop's thread is not."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def position_of_primary(pool: Pool) -> Position | None:
    """
    Return a position that includes what this thread has committed, ``None`` where that can't be
    told: then the window serves.
    """
    connection = connections[pool.primary]
    family = family_of(connection)
    if family is None or connection.in_atomic_block or not may_ask():
        return None
    if connection.connection is None and pool.health.primary_retry_at > time.monotonic():
        return None
    try:
        with one_node():
            return _persistently(connection, family.current)
    except (DatabaseError, InterfaceError) as error:
        logger.warning("The position of %s can't be read: %s", pool.primary, error)
        return None


def position_of_replica(pool: Pool, alias: str) -> Position | None:
    """Return what a replica has replayed by now, ``None`` where that can't be told."""
    if alias not in pool.health.replicas or not may_ask():
        return None
    return pool.health.replicas[alias].position if _ask(pool, alias) else None


def find_caught_up(pool: Pool, wanted: Position, *, ask: bool, wait: float) -> str | None:
    """
    Return a replica that is known to have replayed a position; where none is known to, ask each
    in turn, and then wait for one, at most ``wait`` seconds.
    """
    family = family_of(connections[pool.primary])
    if family is None:
        return None
    replicas = pool.health.replicas
    order = pool.rotation.order()
    for alias in order:
        if family.reached(wanted, replicas[alias].position):
            return alias
    if not ask:
        return None
    if pool.health.out and (retry := pool.health.claim_retry()) is not None:
        order = (*order, retry)
    for alias in order:
        if _ask(pool, alias) and family.reached(wanted, replicas[alias].position):
            return alias
    return _wait(pool, family, wanted, wait) if wait else None


def has_reached(pool: Pool, alias: str, wanted: Position) -> bool:
    """Return whether a replica has replayed a position; ask it where that is not known."""
    family = family_of(connections[alias])
    if family is None:
        return False
    replica = pool.health.replicas[alias]
    if family.reached(wanted, replica.position):
        return True
    return _ask(pool, alias) and family.reached(wanted, replica.position)


def lags_less(pool: Pool, alias: str, seconds: float) -> bool:
    """Return whether a replica is known to lag by no more than so many seconds."""
    replica = pool.health.replicas[alias]
    if may_ask() and pool.health.claim_measure(alias, min(seconds / 2, LOOK_EVERY)):
        try:
            update(pool, connections[alias], measure=True)
        except (OperationalError, InterfaceError):
            pool.health.leave_out(alias, "connect")
    return alias not in pool.health.out and replica.lag is not None and replica.lag <= seconds


def stand_in(pool: Pool) -> str | None:
    """Return the freshest replica while the primary can't be reached, else ``None``."""
    connection = connections[pool.primary]
    if connection.connection is not None:
        return None
    health = pool.health
    if health.primary_retry_at <= time.monotonic():
        try:
            with one_node():
                connection.ensure_connection()
        except (OperationalError, InterfaceError) as error:
            health.primary_retry_at = time.monotonic() + conf.retry_after
            logger.error("%s can't be reached: %s", pool.primary, error)
        else:
            return None
    freshest = next(iter(order_by_freshness(pool)), None)
    if freshest is not None:
        logger.error("%s can't be reached; %s serves what may be stale.", pool.primary, freshest)
        primary_fallback.send(pool.primary, served=freshest, reason="primary down")
    return freshest


def order_by_freshness(pool: Pool) -> list[str]:
    """Return the replicas that answer, the one that has replayed most first."""
    health = pool.health
    usable = [replica.alias for replica in health.replicas.values() if replica.out in ("", "lag")]
    if health.out and (retry := health.claim_retry()) is not None and retry not in usable:
        usable.append(retry)
    # While the primary is down nobody may be able to say of which log a position is.
    reports = {alias: _report(pool, alias) for alias in usable}
    replayed = {a: sum(r.position.values()) for a, r in reports.items() if r and r.is_replica}
    return sorted(replayed, key=lambda alias: -replayed[alias])


def update(pool: Pool, connection: BaseDatabaseWrapper, *, measure: bool = False) -> None:
    """
    Look at a replica that is about to be used: is it one, how much does it lag? Leave it out or
    take it back accordingly. Raises the error of a failed connection.
    """
    alias = connection.alias
    replica = pool.health.replicas[alias]
    family = family_of(connection)
    if family is None or connection.in_atomic_block:
        pool.health.take_back(alias)
        return
    with one_node():
        # The primary first: what it has then, a replica that has it now does not lag behind.
        measure = measure or conf.max_lag is not None
        target = position_of_primary(pool) if measure else None
        connection.ensure_connection()
        if not _ask(pool, alias):
            return
        is_behind = target is not None and not family.reached(target, replica.position)
        told = None
        if is_behind:
            told = _persistently(connection, family.behind)
            # A healthy one has it by now: what was written since the primary was asked is no lag.
            is_behind = not (_ask(pool, alias) and family.reached(target or {}, replica.position))
    if measure:
        replica.lag = None if target is None else replica.lags(is_behind, told)
        replica.measured = time.monotonic()
    if conf.max_lag is not None and (replica.lag or 0.0) > conf.max_lag:
        pool.health.leave_out(alias, "lag", min(conf.retry_after, max(conf.max_lag, 1.0)))
    else:
        pool.health.take_back(alias)


def _ask(pool: Pool, alias: str) -> bool:
    """Ask a replica how far it is; return whether it answered, as a replica."""
    report = _report(pool, alias)
    return report is not None and _take_in(pool, alias, report)


def _report(pool: Pool, alias: str) -> Report | None:
    """Return a replica's answer, ``None`` for none; leave out one that is of no use."""
    connection = connections[alias]
    family = family_of(connection)
    # Inside a transaction rows stay as they were when it began, whatever is replayed meanwhile.
    if family is None or connection.in_atomic_block:
        return None
    try:
        with one_node():
            connection.ensure_connection()
            report = _persistently(connection, family.report)
    except (OperationalError, InterfaceError) as error:
        pool.health.leave_out(alias, "connect")
        logger.info("%s did not tell its position: %s", alias, error)
        return None
    except DatabaseError as error:
        logger.warning("The position of %s can't be read: %s", alias, error)
        return None
    if not report.is_replica:
        pool.health.leave_out(alias, "role")
    elif pool.health.replicas[alias].out in ("connect", "role"):
        pool.health.take_back(alias)
    return report


def _take_in(pool: Pool, alias: str, report: Report) -> bool:
    family = family_of(connections[alias])
    if family is None or not report.is_replica:
        return False
    position = report.position
    if not family.is_certain(position):
        primary = position_of_primary(pool)
        if primary is None:
            return False
        position = family.ascertain(position, primary)
    pool.health.replicas[alias].saw(position)
    return True


def _wait(pool: Pool, family: Positions, wanted: Position, seconds: float) -> str | None:
    started = time.monotonic()
    deadline = started + seconds
    order = pool.rotation.order()
    if not order:
        return None
    found = None
    pause = _FIRST_PAUSE
    while found is None and (left := deadline - time.monotonic()) > 0:
        if not _waits_itself(family, order[0], wanted, left):
            time.sleep(min(pause, left))
            pause = min(pause * 2, _LONGEST_PAUSE)
        for alias in order:
            replica = pool.health.replicas[alias]
            if _ask(pool, alias) and family.reached(wanted, replica.position):
                found = alias
                break
    waited = time.monotonic() - started
    logger.debug("Waited %.3f s for %s.", waited, found or "a replica, in vain")
    replica_waited.send(
        pool.primary, replica=found or order[0], seconds=waited, reached=found is not None
    )
    return found


def _waits_itself(family: Positions, alias: str, wanted: Position, seconds: float) -> bool:
    connection = connections[alias]
    if connection.in_atomic_block:
        return False
    try:
        with one_node():
            return family.wait(connection, wanted, seconds)
    except (DatabaseError, InterfaceError):
        return False


def _persistently(connection: BaseDatabaseWrapper, question: Callable[..., T]) -> T:
    """Ask; if the connection turns out to be lost, once more on a new one."""
    was_open = connection.connection is not None
    try:
        return question(connection)
    except (OperationalError, InterfaceError):
        if not was_open or connection.in_atomic_block or connection.is_usable():
            raise
        connection.close()
        return question(connection)


@contextmanager
def one_node() -> Iterator[None]:
    previous = asking.get()
    asking.set(True)
    try:
        yield
    finally:
        asking.set(previous)
