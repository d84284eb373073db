"""
What is asked, of one server and within a deadline: who it is, and how far.

A question runs on the driver's connection, past Django's cursors: it is no statement of the site,
so it stands in no log of queries and in no count of a test. Nobody fails over while one is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from django.db import DatabaseError, InterfaceError, OperationalError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf, on_change

from .links import Link
from .positions import Ask, CannotTell, Family, Row, Who, family_of
from .server import Endpoint, Identity, Report, Server, registry
from .silence import Silent, begin, end, listen_to

__all__ = [
    "FAILURES",
    "Seen",
    "asking",
    "endpoint_of",
    "hurried",
    "link_of",
    "look",
    "may_ask",
    "one_node",
]

logger = logging.getLogger("pinning_middleware.servers")

# Each question, at the level DEBUG: they stand in no other log.
asked = logging.getLogger("pinning_middleware.questions")

FAILURES = (OperationalError, InterfaceError)
# The name of the one statement that is prepared on a connection.
_PREPARED = b"pinning_position"

# Set while a question is asked of one node.
asking: ContextVar[bool] = ContextVar("pinning_asking", default=False)
# Set while a question of ours connects, which is not to wait for as long as the site may.
hurried: ContextVar[bool] = ContextVar("pinning_hurried", default=False)

_links: WeakKeyDictionary[Any, Link] = WeakKeyDictionary()


@contextmanager
def one_node() -> Iterator[None]:
    """Let nobody stand in for a node that is talked to inside the block."""
    previous = asking.get()
    asking.set(True)
    try:
        yield
    finally:
        asking.set(previous)


def may_ask(connection: BaseDatabaseWrapper) -> bool:
    """
    Return whether this is a place for questions. An event loop's thread is not, nor is a test
    that forbids queries, nor an open transaction, in which rows stay as they were.
    """
    if connection.in_atomic_block or hasattr(connection.connect, "wrapped"):
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def endpoint_of(connection: BaseDatabaseWrapper) -> Endpoint:
    """Return what is known of where this connection's alias leads."""
    return registry.endpoint(connection.alias, conf.primary_of.get(connection.alias, ""))


def link_of(connection: BaseDatabaseWrapper, raw: Any = None) -> Link:
    """Return what is known of the connection that is open now, or of the one just made."""
    raw = connection.connection if raw is None else raw
    kept = connection.__dict__.get("_pinning_link")
    if kept is not None and kept[0] is raw and kept[1].endpoint.is_known:
        return kept[1]  # type: ignore[no-any-return]
    link = _links.get(raw)
    if link is None or not link.endpoint.is_known:
        endpoint = endpoint_of(connection)
        is_ours = "_pinning_private" in connection.__dict__
        fresh = Link(endpoint, is_ours or endpoint.alias != endpoint.pool, raw)
        if link is not None:
            fresh.is_altered = link.is_altered
        listen_to(raw, fresh)
        link = _links[raw] = fresh
    link.was_altered = link.is_altered
    connection.__dict__["_pinning_link"] = (raw, link)
    return link


class Seen(NamedTuple):
    """Which server answered, and what it said; ``None`` from one that can't tell."""

    server: Server
    report: Report | None


def look(connection: BaseDatabaseWrapper, is_trial: bool = False) -> Seen | None:
    """
    Ask how far the server of this connection is, and who it is where that is not known. ``None``
    where this is no place to ask, or the database has no positions.

    Raises ``OperationalError`` and ``InterfaceError`` where it can't be reached, or did not answer
    within the deadline: that is then known of it. A trial of one that is out neither takes it back
    nor puts off its retry.
    """
    family = family_of(connection)
    if family is None or not conf.positions or not may_ask(connection):
        return None
    before = asking.get()
    asking.set(True)
    try:
        return _look(connection, family, is_trial)
    except FAILURES as error:
        is_made = connection.connection is not None
        if not is_made or isinstance(error, Silent) or connection.is_usable():
            raise
        # It was lost while nobody looked, or cut off at once.
        connection.close()
        return _look(connection, family, is_trial)
    finally:
        asking.set(before)


def _look(connection: BaseDatabaseWrapper, family: Family, is_trial: bool) -> Seen:
    endpoint = endpoint_of(connection)
    token = hurried.set(True)
    try:
        connection.ensure_connection()
    except FAILURES as error:
        if not is_trial:
            registry.fail(endpoint, "connect", conf.retry_after, error)
        raise
    finally:
        hurried.reset(token)
    link = link_of(connection)
    ask = _asker(connection, link)
    try:
        asked_at = time.monotonic()
        server, row = _identify(connection, family, link, ask)
        report = None
        if server.tells is not False:
            report = _report(family, server, link, ask, row, asked_at)
    except Silent as error:
        if is_trial:
            pass
        elif link.server is not None:
            registry.mark(link.server, "silent", conf.retry_after, error)
        else:
            registry.fail(endpoint, "silent", conf.retry_after, error)
        # What was asked may still be answered: nobody is to take that for another answer.
        connection.close()
        raise
    if not is_trial:
        endpoint.suspect = False
        registry.succeed(endpoint)
    return Seen(server, report)


def _asker(connection: BaseDatabaseWrapper, link: Link) -> Ask:
    raw = connection.connection
    fetch = _by_protocol if hasattr(raw, "pgconn") else _by_cursor

    def ask(sql: str) -> tuple[Any, ...]:
        asked.debug("%s: %s", link.alias, sql)
        guard = begin(raw, link)
        try:
            with connection.wrap_database_errors:
                return fetch(raw, sql, link)
        finally:
            end(link, guard)

    return ask


def _by_cursor(raw: Any, sql: str, link: Link) -> Row:
    cursor = raw.cursor()
    try:
        cursor.execute(sql)
        return tuple(cursor.fetchone() or ())
    finally:
        cursor.close()


def _by_protocol(raw: Any, sql: str, link: Link) -> Row:
    """
    Ask over psycopg 3 without a cursor, which takes half of the time; values are text. What is
    asked a third time on a connection is prepared there.
    """
    from psycopg import errors, generators, pq

    pgconn = raw.pgconn
    with raw.lock:
        if link.prepared == sql:
            pgconn.send_query_prepared(_PREPARED, [])
        elif link.repeated == sql and not link.is_pooled:
            pgconn.send_prepare(_PREPARED, sql.encode())
            is_done = raw.wait(generators.execute(pgconn))[-1].status == pq.ExecStatus.COMMAND_OK
            # What the site itself prepared in that name is not ours: then never.
            link.prepared, link.repeated = sql if is_done else "", ""
            pgconn.send_query(sql.encode())
        else:
            link.repeated = sql if link.server is not None and link.prepared is None else ""
            pgconn.send_query(sql.encode())
        result = raw.wait(generators.execute(pgconn))[-1]
    if result.status != pq.ExecStatus.TUPLES_OK:
        error = errors.error_from_result(result)
        if link.prepared == sql and isinstance(error, errors.InvalidSqlStatementName):
            # Somebody has reset the session (DISCARD ALL).
            link.prepared = None
            return _by_protocol(raw, sql, link)
        raise error
    values = (result.get_value(0, column) for column in range(result.nfields))
    return tuple([None if value is None else value.decode() for value in values])


def _identify(
    connection: BaseDatabaseWrapper, family: Family, link: Link, ask: Ask
) -> tuple[Server, Row]:
    """Return the server, and what it said of itself where one statement asked both."""
    if link.server is not None and not link.is_pooled:
        return link.server, ()
    who, row = _introduce(connection, family, link, ask)
    server = registry.find(who.identity)
    if server is None:
        system, followed = link.endpoint.pool, ""
        try:
            system = family.system(ask, who.identity)
            if who.is_discreet:
                followed = family.followed(ask)
        except FAILURES:
            raise
        except DatabaseError as error:
            logger.debug("%s does not say what it belongs to: %s", link.alias, error)
        server = registry.meet(link.alias, who.identity, system)
        server.followed = followed
    else:
        registry.meet(link.alias, who.identity, server.system)
    server.is_discreet = who.is_discreet
    own = _session_of(connection)
    link.is_pooled = who.session is not None and own is not None and who.session != own
    if link.is_pooled and len(link.endpoint.current) > 1 and not link.endpoint.balances:
        link.endpoint.balances = True
        logger.warning(
            "%s leads to several servers behind a pooler: the window serves for it.", link.alias
        )
    link.server = server
    return server, row


def _introduce(
    connection: BaseDatabaseWrapper, family: Family, link: Link, ask: Ask
) -> tuple[Who, Row]:
    where = _where(connection)
    # The best way first; one that is refused leaves at least the name.
    for way in (next(iter(family.ways(conf.positions)), None), None):
        try:
            return family.identify(ask, where, way)
        except FAILURES as error:
            if family.error_code(error) not in family.refusals:
                raise
        except DatabaseError as error:
            logger.debug("%s does not say which server it is: %s", link.alias, error)
    return Who(Identity("", *where)), ()


def _report(
    family: Family, server: Server, link: Link, ask: Ask, row: Row, asked_at: float
) -> Report | None:
    ways = family.ways(conf.positions)
    why: object = f"PINNING_POSITIONS = {conf.positions!r} is no way of this database"
    # What came with the name came by the first way.
    for way in ways if row else ways[ways.index(server.way) if server.way in ways else 0 :]:
        try:
            if not row:
                asked_at = time.monotonic()
                row = family.report(ask, server, way)
            report = family.read(row, server, way)
        except CannotTell as error:
            why = error
            break
        except DatabaseError as error:
            if family.error_code(error) not in family.refusals:
                raise
            why = error
        else:
            server.way, server.tells = way, True
            registry.take_in(server, report, asked_at)
            return report
    server.tells = False
    logger.info("%s does not tell how far it is, the window serves: %s", link.alias, why)
    return None


def _where(connection: BaseDatabaseWrapper) -> tuple[str, int]:
    """Return the host and port that the driver, or the settings, know."""
    info = getattr(connection.connection, "info", None)
    settings = connection.settings_dict
    host = getattr(info, "host", None) or settings["HOST"] or ""
    port = getattr(info, "port", None) or settings["PORT"] or 0
    return str(host), int(port) if str(port).isdigit() else 0


def _session_of(connection: BaseDatabaseWrapper) -> int | None:
    """Return the id of the session as the driver knows it: a pooler makes one up."""
    raw = connection.connection
    info = getattr(raw, "info", None)
    known = getattr(info, "backend_pid", None)
    if known is None and hasattr(raw, "thread_id"):
        known = raw.thread_id()
    return known


on_change(registry.clear)
