"""Connections of a primary's alias: which are to a server that is no longer the primary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.pins import Points, Position, merge_points
from pinning_middleware.reasons import Fault
from pinning_middleware.scopes.scope import Requirement
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects import Dialect
from pinning_middleware.servers.probe import (
    CONNECTION_ERRORS,
    ProbeResult,
    is_session_modified,
    state_of,
)
from pinning_middleware.servers.registry import Endpoint, Server

# Seconds for which a connection cannot be one to a server that has been replaced since.
FRESH_FOR: Final = 1.0
# Maximum number of offsets of a log in ``Endpoint.reopened_for``.
MAX_NOTED: Final = 64


class PrimaryConnections:
    """
    Judges the connections of a primary's alias, which resolves to one server: that of the newest
    connection. ``probe`` is that of the pool's ``Health``.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: Dialect | None,
        probe: Callable[[BaseDatabaseWrapper], ProbeResult | None],
    ) -> None:
        self.endpoint, self.dialect, self._probe = endpoint, dialect, probe

    def reject(self, connection: BaseDatabaseWrapper, requirement: Requirement) -> Fault | None:
        """
        Return why a connection of the primary's alias must not be used any more, or None. The alias
        resolves to one server, that of the newest connection; a connection to another one is stale.

        ``requirement`` is that of the scope's pins. Probes the server if it is unknown and may be a
        former primary, or if a pin shows that there is another primary, which may close or reopen
        the connection; an error of the probe is ignored.
        """
        state = state_of(connection)
        if state.behind_pooler or self.dialect is None:
            return None
        if state.rejected_write:
            return Fault.DEMOTED
        is_pinned = not requirement.is_empty
        if is_pinned and state.is_standby and not self._has_reached(connection, requirement):
            return Fault.DEMOTED
        if state.server is None:
            if not self._may_be_former(state, requirement):
                return None
            if (found := self._probe_primary(connection)) is None:
                return None
            state, _ = found
        server, primary = state.server, self.endpoint.server
        if server is None:
            return None
        if primary is not None and primary is not server:
            if self._has_replaced(primary, server):
                return Fault.DEMOTED
            if server.last_probed < self.endpoint.servers.get(primary, 0.0):
                # Seen before, and again: it is the primary again, or one of several.
                if (found := self._probe_primary(connection)) is None:
                    return None
                state, _ = found
        if state.opened_at < server.demoted_at:
            return Fault.DEMOTED
        if requirement.position is None or self.endpoint.has_several_primaries:
            return None
        return self._reject_for_position(connection, server, requirement.position)

    def _has_reached(self, connection: BaseDatabaseWrapper, requirement: Requirement) -> bool:
        """Probe whether a standby behind the primary's alias has what the pins require."""
        position, found = requirement.position, None
        if position is not None and self.dialect is not None:
            found = self._probe_primary(connection)
        if found is None or found[1] is None or position is None or self.dialect is None:
            return False
        return self.dialect.reached(position, found[1].server.position)

    def _may_be_former(self, state: ConnectionState, requirement: Requirement) -> bool:
        """Return whether an unidentified connection may be one to a former primary."""
        if self.endpoint.must_reidentify:
            return bool(self.endpoint.servers)
        newest = max(tuple(self.endpoint.servers.values()), default=0.0)
        if requirement.position is not None:
            newest = max(newest, time.monotonic() - FRESH_FOR)
        elif not requirement.primary_only and len(self.endpoint.servers) < 2:
            # Nothing shows that the alias has ever resolved to another server.
            return False
        return state.opened_at < newest

    def _has_replaced(self, primary: Server, server: Server) -> bool:
        if self.dialect is not None and self.dialect.supersedes(primary.position, server.position):
            return True
        # Without timelines positions cannot show a promotion. Several primaries, as of a Galera
        # cluster behind a balancer, are all seen again and again.
        return self.endpoint.was_replaced(server)

    def _probe_primary(
        self, connection: BaseDatabaseWrapper
    ) -> tuple[ConnectionState, ProbeResult | None] | None:
        """
        Probe the server of a connection of the primary's alias. Return None if the connection is
        lost: the statement itself connects again, and its error is the site's own.
        """
        try:
            result = self._probe(connection)
        except CONNECTION_ERRORS as error:
            if getattr(error, "ended_modified_session", False):
                # The statement must not run in a new session.
                raise
            is_lost = connection.connection is not None and not connection.is_usable()
            if is_lost and not is_session_modified(connection):
                connection.close()
            result = None
        return None if connection.connection is None else (state_of(connection), result)

    def _reject_for_position(
        self, connection: BaseDatabaseWrapper, server: Server, position: Position
    ) -> Fault | None:
        """
        Return DEMOTED if a pin's position shows that another server is the primary by now.

        What a connection lacks that was opened for this very position is lost, as after a promotion
        or a restore from a backup.
        """
        dialect = self.dialect
        if dialect is None:
            return None
        suspected = dialect.foreign_points(position, server, server.position)
        if not self._is_unconfirmed(suspected, state_of(connection)):
            return None
        if (found := self._probe_primary(connection)) is None:
            return None
        (state, result), replayed = found, server.position
        if result is not None and result.report is not None:
            replayed = merge_points(result.server.position, result.report.replayed)
        foreign = dialect.foreign_points(position, server, replayed)
        is_former = self._is_unconfirmed(foreign, state) or state.opened_at < server.demoted_at
        for log, point in suspected.items():
            noted = self.endpoint.reopened_for.setdefault(log, [])
            if all(point > known for known, _ in tuple(noted)):
                noted.append((point, time.monotonic() if log in foreign else -math.inf))
                del noted[:-MAX_NOTED]
        return Fault.DEMOTED if is_former else None

    def _is_unconfirmed(self, foreign: Points, state: ConnectionState) -> bool:
        """Return whether no connection has been opened for these points since, nor is this one."""
        for log, point in foreign.items():
            noted = tuple(self.endpoint.reopened_for.get(log, ()))
            if not any(known >= point and state.opened_at >= at for known, at in noted):
                return True
        return False
