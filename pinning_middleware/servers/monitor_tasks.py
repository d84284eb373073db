"""What a monitor finds out about an endpoint when a read has noted work there."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from django.db import DatabaseError, InterfaceError
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.servers.connect import ConnectTimeout, dedicated_connection
from pinning_middleware.servers.dialects import Row, dialect_for
from pinning_middleware.servers.dialects.postgresql import STARTED, is_true
from pinning_middleware.servers.probe import fetch
from pinning_middleware.servers.registry import Endpoint
from pinning_middleware.servers.session_check import session_query

logger = logging.getLogger("pinning_middleware.servers")

# Runs an operation on the monitor's connection; returns None if the server cannot be reached.
Attempt = Callable[[Callable[[BaseDatabaseWrapper], Row]], Row | None]


def find_sessions(endpoint: Endpoint, attempt: Attempt) -> None:
    """Search for the sessions of slow reads, on the connection that the monitor has."""
    for session in tuple(endpoint.slow_sessions):
        sent_at = time.monotonic()
        sql = f"{session_query(session.pid)}, {STARTED}"
        row = attempt(partial(fetch, sql=sql))
        if row is None:
            return
        if is_true(row[0]) and session.started in ("", row[2]):
            session.waits_for_lock, session.seen_at = is_true(row[1]), sent_at


def query_replay_waits(connection: BaseDatabaseWrapper, attempt: Attempt) -> bool:
    """Return whether a server's replay waits for a lock that a query holds."""
    dialect = dialect_for(connection)
    if dialect is None or not dialect.replay_waits:
        return False
    row = attempt(partial(fetch, sql=dialect.replay_waits))
    return row is not None and is_true(row[0])


def retry_hosts(endpoint: Endpoint) -> None:
    """Find out which hosts of a list answer again."""
    for host in tuple(endpoint.unresponsive_hosts):
        connection = dedicated_connection(endpoint.alias, host)
        try:
            connection.ensure_connection()
        except ConnectTimeout:
            continue
        except (DatabaseError, InterfaceError) as error:
            logger.debug("%s answers again: %s", host, error)
        finally:
            connection.close()
        endpoint.unresponsive_hosts.discard(host)
