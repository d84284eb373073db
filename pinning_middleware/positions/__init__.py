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
    "mysql": "pinning_middleware.positions.mysql.Either",
}


def family_of(connection: BaseDatabaseWrapper) -> Positions | None:
    """
    Return who reads the positions of this connection's database, ``None`` where nobody can. It
    asks the database nothing: there may not be a connection yet.
    """
    path = FAMILIES.get(connection.vendor)
    return None if path is None else _family(path)


@lru_cache
def _family(path: str) -> Positions:
    family: Positions = import_string(path)()
    return family
