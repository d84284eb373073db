"""``monotonic-reads``: what a client has seen it never sees older, within a scope and after it."""

from __future__ import annotations

from django.db import connections

from pinning_middleware.conf import conf
from pinning_middleware.pins import Pin, Position, merge_positions
from pinning_middleware.reasons import Reason
from pinning_middleware.routing.policy import Pool, Route
from pinning_middleware.scopes.scope import Facts, Scope
from pinning_middleware.servers.probe import CONNECTION_ERRORS, probing_allowed

__all__ = ["MonotonicPool"]


class MonotonicPool(Pool):
    """A pool that knows which nodes a scope has read from."""

    is_monotonic = True

    def _settle(self, scope: Scope, facts: Facts, is_lifted: bool = False) -> Route:
        route = super()._settle(scope, facts, is_lifted)
        last = facts.served[-1] if facts.served else None
        if last is None or route[0] in (last, self.primary):
            return route
        # The node changes inside the scope: it has to be where the last one is by now.
        facts.answer = None
        wanted = self._where(last)
        if wanted is not None:
            alias = self.holder(wanted, probing_allowed(connections[self.primary]))
            if alias is not None:
                facts.replica = alias
                return alias, Reason.CAUGHT_UP
        return self._primary(Reason.NOT_CAUGHT_UP)

    def note_served(self, facts: Facts, alias: str) -> None:
        if facts.served is None:
            facts.served = []
            facts.changes += 1
        if not facts.served or facts.served[-1] != alias:
            facts.served.append(alias)
            if facts.answer != alias:
                facts.answer = None

    def seen(self, facts: Facts, now: float) -> Pin | None:
        """Return the pin of what a scope has read; asks the node that it read from last."""
        if not facts.served:
            return None
        position: Position | None = None
        for alias in dict.fromkeys(facts.served):
            here = self._where(alias)
            if here is None:
                # A node that died after it was read from can't tell any more: time will.
                until = now + conf.seconds
                return Pin(until, until) if self.supports_positions else None
            position = merge_positions(position, here)
        return Pin(now + conf.seconds, 0.0, position)

    def _where(self, alias: str) -> Position | None:
        """Return how far a node is by now, ``None`` where that can't be told."""
        if alias == self.primary:
            return self.position_now()
        connection = connections[alias]
        try:
            seen = self.look_at(connection)
        except CONNECTION_ERRORS:
            return None
        if seen is None or not seen.server.position or seen.server.timeline_hidden:
            return None
        return seen.server.position
