"""The aliases of one pool are one database, also to a subquery."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from pinning_middleware.routing.pools import pools

__all__ = ["accept_pool_aliases"]


def accept_pool_aliases(original: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let ``filter(pk__in=Other.objects.using("default"))`` run on a replica.

    Django compares the alias of the subquery with that of the connection, and raises "Subqueries
    aren't allowed across different databases" for two aliases of one pool.
    """

    def process_rhs(self: Any, compiler: Any, connection: Any) -> Any:
        alias = getattr(self.rhs, "_db", None)
        if alias is not None and alias != connection.alias:
            known = pools().by_alias
            pool = known.get(alias)
            if pool is not None and pool is known.get(connection.alias):
                self = copy.copy(self)
                self.rhs = self.rhs.clone()
                self.rhs._db = None
        return original(self, compiler, connection)

    return process_rhs
