"""
django-health-check: are there enough replicas?

Name it among the checks of a view::

    HealthCheckView.as_view(checks=[
        ("pinning_middleware.contrib.health_check.Replicas", {"min_replicas": 2, "max_lag": 30}),
    ])

Every replica is asked when the check runs, all at once and each on a connection of its own: what
answers is the very node that the alias names, and nothing stands in for one that is down.
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
from pinning_middleware.routing.policy import Pool, PrimaryOnly
from pinning_middleware.routing.pools import pools
from pinning_middleware.servers import connect, monitor

__all__ = ["Replicas"]

# Seconds for which a lag that is too long is measured again: a replica that was asked just before
# its primary seems to be behind.
AGAIN: Final = 1.0


@dataclasses.dataclass
class Replicas(HealthCheck):  # type: ignore[misc]
    """
    Check that enough replicas of a pool are in the rotation: a warning where there are fewer
    than ``min_replicas``, unavailable where there is none.

    ``pool``: the primary's alias. ``max_lag``: seconds behind which a replica does not count, nor
    does one whose lag can't be told; ``None``: any lag will do, short of ``PINNING_MAX_LAG``.
    """

    pool: str = "default"
    min_replicas: int = 1
    max_lag: float | None = None

    def run(self) -> None:
        pool = pools().by_primary.get(self.pool)
        if pool is None:
            raise ServiceUnavailable(f"{self.pool!r} is no primary of PINNING_REPLICAS")
        if isinstance(pool, PrimaryOnly):
            raise ServiceWarning(f"Every read of {self.pool!r} goes to the primary by the settings")
        used = [alias for alias, weight in pool.rotation.weights.items() if weight]
        with ThreadPoolExecutor(len(used)) as threads:
            found = threads.map(lambda alias: _fault(pool, alias), used)
            faults = dict(zip(used, found, strict=True))
        if self.max_lag is not None:
            faults |= self._late(pool, [alias for alias in used if not faults[alias]])
        out = [f"{alias}: {fault}" for alias, fault in faults.items() if fault]
        number = len(used) - len(out)
        if number < max(self.min_replicas, 1):
            message = f"{number} of {len(used)} replicas of {self.pool!r} in the rotation"
            kind = ServiceWarning if number else ServiceUnavailable
            raise kind(f"{message} ({', '.join(out)})" if out else message)

    def _late(self, pool: Pool, aliases: list[str]) -> dict[str, str]:
        """Return those that lag too much, and what to say of each."""

        def late() -> dict[str, str]:
            lags = {alias: pool.lag(alias) for alias in aliases}
            return {
                alias: "lag unknown" if lag is None else f"{lag:.1f} s behind"
                for alias, lag in lags.items()
                if lag is None or lag > (self.max_lag or 0.0)
            }

        if pool.supports_positions and aliases:
            pool.sample()
            monitor.wait_for(tuple(aliases), pool.primary, pool.judge, AGAIN, lambda: not late())
        return late()


def _fault(pool: Pool, alias: str) -> str:
    """Query a replica; return why it gets no reads, empty: it does."""
    connection = connect.dedicated_connection(alias)
    try:
        with no_failover():
            # What can't tell positions is asked for a sign of life.
            if pool.look_at(connection) is None:
                connection.ensure_connection()
                if not connection.is_usable():
                    return Fault.UNREACHABLE
    except (DatabaseError, InterfaceError):
        # Said without the error's text, which may name users and hosts.
        return pool.endpoints[alias].out_of_rotation or Fault.UNREACHABLE
    finally:
        connection.close()
    return pool.endpoints[alias].out_of_rotation
