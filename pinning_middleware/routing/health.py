"""
Which servers of a pool are out of rotation, and why.

The status is that of a server, never of an alias; the registry stores it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from pinning_middleware.conf import conf
from pinning_middleware.pins import Position, logs_of
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.compatibility import is_test_mirror
from pinning_middleware.servers import monitor
from pinning_middleware.servers.connection_state import ConnectionState
from pinning_middleware.servers.dialects import Dialect
from pinning_middleware.servers.monitor import Monitors
from pinning_middleware.servers.monitor_tasks import query_replay_waits
from pinning_middleware.servers.probe import CONNECTION_ERRORS, ProbeResult, probe, state_of
from pinning_middleware.servers.registry import Endpoint, Server, registry


class Health:
    """
    Judges the servers of one pool.

    ``endpoint`` is what the primary's alias resolves to, ``endpoints`` the same for each replica.
    ``dialect`` is None for a database without positions.
    """

    def __init__(
        self, endpoint: Endpoint, endpoints: Mapping[str, Endpoint], dialect: Dialect | None
    ) -> None:
        self.primary = endpoint.alias
        self.endpoint, self.endpoints, self.dialect = endpoint, endpoints, dialect
        self.supports_positions = dialect is not None and bool(dialect.strategies(conf.positions))
        self.monitors = Monitors(self.primary, self.update_status)
        self._max_lag = conf.max_lag
        self._next_sample = 0.0
        # Aliases that name several hosts.
        self._host_lists = {a for a in endpoints if "," in str(connections.settings[a]["HOST"])}

    def probe(self, connection: BaseDatabaseWrapper) -> ProbeResult | None:
        """
        Probe the server of a connection and update its status.

        Return None if it cannot be probed here. Raise what ``servers.probe.probe()`` raises.
        """
        result = probe(connection)
        if result is not None:
            endpoint = registry.endpoint(connection.alias, self.primary)
            self.update_status(endpoint, result.server)
        return result

    def update_status(self, endpoint: Endpoint, server: Server) -> None:
        """Update the server's rotation status from its last report."""
        is_primary = endpoint is self.endpoint and server is endpoint.server
        fault = None if is_primary else self.find_fault(server)
        if fault != server.out_of_rotation:
            registry.set_status(server, fault, _pause(fault))
        elif fault is None:
            registry.mark_up(endpoint)

    def find_fault(self, server: Server) -> Fault | None:
        """Return why a replica's server should be out of rotation, or None."""
        if server.reports_position is False or self.dialect is None:
            return None
        if server.is_replica is False and self._is_promoted(server):
            return Fault.PROMOTED
        if server.minimum_position:
            if self._has_recovered(server, self.dialect):
                server.clear_minimum()
            else:
                return Fault.STALE_RESTART
        if server.replay_waits:
            return Fault.REPLAY_WAITS
        if conf.max_lag is None:
            return None
        if server.lag is None:
            # A replica stays out until its lag is known to be small enough.
            return Fault.LAG if server.out_of_rotation is Fault.LAG else None
        return Fault.LAG if server.lag > conf.max_lag else None

    def _has_recovered(self, server: Server, dialect: Dialect) -> bool:
        """Return whether a restarted server has reached its predecessor's position."""
        minimum = server.minimum_position
        return (
            dialect.reached(Position(minimum), server.position)
            or server.reported_at_least(minimum)
            or server.reached_without_timeline(minimum)
            or bool(logs_of(server.position) - logs_of(minimum))
        )

    def _is_promoted(self, server: Server) -> bool:
        """
        Return whether a server that replicates from none is not this pool's primary: it was
        promoted, or it is a former primary.
        """
        primary = self.endpoint.server
        if primary is None:
            # The primary must be identified first; this server is judged again after that.
            self._request_samples()
            written = next((position for _, position in registry.samples(self.primary)), None)
            return written is None or logs_of(server.position) != logs_of(written.points)
        return primary is not server and primary.system == server.system

    # Admission of a connection

    def reject(
        self, connection: BaseDatabaseWrapper, max_lag: float | None, is_last_replica: bool
    ) -> Fault | None:
        """
        Return why the server of a replica's open connection must not serve reads now, or None.

        ``max_lag`` (seconds) limits the lag for this read. ``is_last_replica``: no other replica is
        in the rotation, so that one that lags serves. May probe the server if its status is
        unknown; raise what ``servers.probe.probe()`` raises.
        """
        limits_lag = max_lag is not None or self._max_lag is not None
        fault = self._reject_status(connection, is_last_replica)
        if fault is None and limits_lag:
            fault = self._reject_lag(connection, max_lag, is_last_replica)
        return self._reject_role(connection) if fault is None else fault

    def _reject_status(
        self, connection: BaseDatabaseWrapper, is_last_replica: bool
    ) -> Fault | None:
        server = state_of(connection).server
        if server is None or _serves(server, is_last_replica):
            return None
        return None if self._is_back(connection, server) else server.out_of_rotation

    def _reject_role(self, connection: BaseDatabaseWrapper) -> Fault | None:
        """
        Return why the server is no replica of this pool, or what else a probe of an unknown server
        has found.
        """
        state = state_of(connection)
        server, endpoint = state.server, state.endpoint
        if server is not None and server.is_replica is False and self.find_fault(server):
            # The primary's alias has resolved to another server since.
            self.update_status(registry.endpoint(connection.alias, self.primary), server)
            return server.out_of_rotation
        was_promoted = state.was_promoted()
        is_unknown = server is None and (endpoint.must_reidentify or endpoint.has_server_out)
        if not (was_promoted or is_unknown):
            return None
        result = self.probe(connection)
        if was_promoted:
            state.promotion_seen = state.promotion_seen or result is not None
            # The primary's alias may have resolved to another server since it was last seen.
            self.sample_lag()
        found = None if result is None else result.server
        if found is None or found.out_of_rotation in (None, Fault.LAG):
            return None
        return None if self._is_back(connection, found) else found.out_of_rotation

    def _is_back(self, connection: BaseDatabaseWrapper, server: Server) -> bool:
        """
        Probe a server that is out of rotation while others behind the same alias are not, so that
        no monitor retries it. One read does, from ``retry_at`` on.
        """
        now = time.monotonic()
        endpoint = registry.endpoint(connection.alias, self.primary)
        if endpoint.out_of_rotation or now < server.retry_at:
            return False
        server.retry_at = now + _pause(server.out_of_rotation)
        with suppress(*CONNECTION_ERRORS):
            if server.replay_waits:
                server.replay_waits = query_replay_waits(connection, lambda run: run(connection))
            found = self._measure_lag(connection)
            return found is not None and found.out_of_rotation is None
        return False

    # Lag

    def is_only_server(self, state: ConnectionState, *, certain: bool) -> bool:
        """
        Return whether a connection's server is the only one that its alias resolves to, for certain
        or as far as is known without a probe. The monitor of an alias samples that one.
        """
        servers = state.endpoint.servers
        if state.server is None:
            return not certain and len(servers) < 2 and state.alias not in self._host_lists
        return [*servers] == [state.server]

    def _measure_lag(self, connection: BaseDatabaseWrapper) -> Server | None:
        """Probe how far the server of a connection lags; None if it cannot be probed."""
        result = self.probe(connection)
        if result is None:
            return None
        if not self.is_only_server(state_of(connection), certain=True):
            monitor.measure_lag(result.server, self.primary)
            self.update_status(registry.endpoint(connection.alias, self.primary), result.server)
        return result.server

    def _reject_lag(
        self, connection: BaseDatabaseWrapper, max_lag: float | None, is_last_replica: bool
    ) -> Fault | None:
        """
        Return why the server of a connection is too far behind, or None. A monitor samples one of
        several servers behind an alias; any other is probed here, every other second.
        """
        if connection.in_atomic_block or not self.supports_positions:
            return None
        if self.is_only_server(state_of(connection), certain=max_lag is not None):
            return None
        server, now = state_of(connection).server, time.monotonic()
        if server is None or now - server.lag_measured > 2 * monitor.SAMPLE_INTERVAL:
            if server is not None:
                server.lag_measured = now
            server = self._measure_lag(connection)
        if server is None:
            return None
        if not _serves(server, is_last_replica):
            return server.out_of_rotation
        exceeds = max_lag is not None and (server.lag is None or server.lag > max_lag)
        is_only = self.is_only_server(state_of(connection), certain=True)
        return Fault.LAG if exceeds and not is_only else None

    def sample_lag(self) -> None:
        """Have the monitors measure the lag for the next ``monitor.WORK_LASTS`` seconds."""
        now = time.monotonic()
        if now >= self._next_sample and self.supports_positions:
            self._next_sample = now + monitor.SAMPLE_INTERVAL
            self._request_samples()

    def _request_samples(self) -> None:
        # A test database to which a monitor is connected could not be dropped.
        aliases = tuple(a for a in self.endpoints if not is_test_mirror(self.primary, a))
        if aliases:
            self.monitors.sample_lag(aliases)


def _serves(server: Server, is_last_replica: bool) -> bool:
    fault = server.out_of_rotation
    return fault is None or (fault is Fault.LAG and is_last_replica)


def _pause(fault: Fault | None) -> float:
    """Return the seconds until a server with this fault is probed again."""
    if fault in (Fault.STALE_RESTART, Fault.LAG, Fault.REPLAY_WAITS):
        return monitor.SAMPLE_INTERVAL
    return conf.retry_after
