"""
What a database can tell of its own log: how far the primary is, how far a replica has replayed.

One file for each family of databases. To add one, derive from ``Positions``, and name its dotted
path in ``FAMILIES`` under the backend's ``connection.vendor``, in an app's ``ready()``.
"""

from __future__ import annotations

from functools import lru_cache

from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.module_loading import import_string

from .base import Positions, Report

__all__ = ["FAMILIES", "Positions", "Report", "family_of"]

# Vendors that are not here (SQLite, Oracle) have no position that a session may read.
FAMILIES = {
    "postgresql": "pinning_middleware.positions.postgresql.PostgreSQL",
    "mysql": "pinning_middleware.positions.mysql.family",
}


def family_of(connection: BaseDatabaseWrapper) -> Positions | None:
    """Return who reads the positions of this connection's database, ``None`` where nobody can."""
    path = FAMILIES.get(connection.vendor)
    return None if path is None else _family(path, connection)


def _family(path: str, connection: BaseDatabaseWrapper) -> Positions:
    found = _imported(path)
    return found if isinstance(found, Positions) else found(connection)  # type: ignore[operator]


@lru_cache
def _imported(path: str) -> object:
    found = import_string(path)
    return found() if isinstance(found, type) else found
