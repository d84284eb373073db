"""
django-health-check: check that enough replicas are in rotation.

Add it to the checks of a view::

    HealthCheckView.as_view(checks=[
        ("pinning_middleware.contrib.health_check.Replicas", {"min_replicas": 2, "max_lag": 30}),
    ])

The check probes all replicas at the same time, each on a connection of its own, without failover.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from django.db import DatabaseError, InterfaceError
from health_check.base import HealthCheck
from health_check.exceptions import ServiceUnavailable, ServiceWarning

from pinning_middleware.api import no_failover
from pinning_middleware.reasons import Fault
from pinning_middleware.routing.pool import Pool
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import connect

__all__ = ["Replicas"]

# Maximum time for measuring an excessive lag again (seconds). A replica that is probed just before
# its primary seems to lag.
REMEASURE: Final = 1.0


@dataclasses.dataclass
class Replicas(HealthCheck):  # type: ignore[misc]
    """
    Check that enough replicas of a pool are in rotation.

    Raise ServiceWarning if there are fewer than ``min_replicas``, and ServiceUnavailable if there
    is none. ``pool`` is the alias of the primary. With ``max_lag`` (seconds), a replica does not
    count if it lags more or if its lag is unknown; without it, only ``PINNING_MAX_LAG`` counts.
    """

    pool: str = "default"
    min_replicas: int = 1
    max_lag: float | None = None

    def run(self) -> None:
        pool = pools().by_primary.get(self.pool)
        if pool is None:
            raise ServiceUnavailable(f"{self.pool!r} is not a primary in PINNING_REPLICAS")
        if not pool.has_replicas or pool.is_dry_run:
            raise ServiceWarning(
                f"Every read of {self.pool!r} goes to the primary: see PINNING_ENABLED, "
                "PINNING_DRY_RUN and the weights in PINNING_REPLICAS"
            )
        used = [alias for alias, weight in pool.replica_set.rotations.weights.items() if weight]
        with ThreadPoolExecutor(len(used)) as threads:
            results = threads.map(lambda alias: _probe(pool, alias), used)
            faults = dict(zip(used, results, strict=True))
        if self.max_lag is not None:
            faults |= self._lagging(pool, [alias for alias in used if not faults[alias]])
        out = [f"{alias}: {fault}" for alias, fault in faults.items() if fault]
        number = len(used) - len(out)
        if number < max(self.min_replicas, 1):
            message = f"{number} of {len(used)} replicas of {self.pool!r} in rotation"
            kind = ServiceWarning if number else ServiceUnavailable
            raise kind(f"{message} ({', '.join(out)})" if out else message)

    def _lagging(self, pool: Pool, aliases: list[str]) -> dict[str, str]:
        """Return the replicas that lag too much, with a description."""

        def lagging() -> dict[str, str]:
            lags = {alias: pool.replica_set.lag(alias) for alias in aliases}
            return {
                alias: "lag unknown" if lag is None else f"{lag:.1f} s behind"
                for alias, lag in lags.items()
                if lag is None or lag > (self.max_lag or 0.0)
            }

        if pool.supports_positions and aliases:
            pool.health.sample_lag()
            pool.health.monitors.wait_for(tuple(aliases), REMEASURE, lambda: not lagging())
        return lagging()


def _probe(pool: Pool, alias: str) -> str:
    """Probe a replica; return why it is out of rotation, or ""."""
    connection = connect.dedicated_connection(alias)
    try:
        with no_failover():
            # A database without positions is only checked for a usable connection.
            if pool.health.probe(connection) is None:
                connection.ensure_connection()
                if not connection.is_usable():
                    return Fault.UNREACHABLE
    except (DatabaseError, InterfaceError):
        # Do not expose the error message, which may contain users and hosts.
        return pool.endpoints[alias].out_of_rotation or Fault.UNREACHABLE
    finally:
        connection.close()
    return pool.endpoints[alias].out_of_rotation or ""
